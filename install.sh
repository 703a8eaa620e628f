#!/bin/sh
# Install Orchestra for this user, or upgrade it:
#
#   sh install.sh                                              from a checkout
#   curl -fsSL URL/install.sh | ORCHESTRA_URL=URL sh           from a web server that has orchestra.py beside it
#   sh install.sh --uninstall                                  take it back; the registry and the backups stay
#
# ORCHESTRA_SHA256 checks the download; ORCHESTRA_PYTHON names the Python to use.

set -eu

say() { printf '%s\n' "$*"; }

die() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 2
}

need() { command -v "$1" >/dev/null 2>&1 || die "$1: expected it on PATH, found none: install it first"; }

works() { "$1" -I -c 'import sys; sys.exit(sys.version_info < (3, 9))' >/dev/null 2>&1; }

# macOS's own python3 opens a dialog where the developer tools are missing.
is_shim() { [ "$(command -v "$1")" = /usr/bin/python3 ] && [ "$(uname)" = Darwin ] && ! xcode-select -p >/dev/null 2>&1; }

find_python() {
    if [ -n "${ORCHESTRA_PYTHON:-}" ]; then
        works "$ORCHESTRA_PYTHON" || die "ORCHESTRA_PYTHON: expected Python 3.9 or newer, got $ORCHESTRA_PYTHON, which is not"
        command -v "$ORCHESTRA_PYTHON"
        return
    fi
    for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9; do
        if command -v "$python" >/dev/null 2>&1 && ! is_shim "$python" && works "$python"; then
            command -v "$python"
            return
        fi
    done
    die "python3: expected Python 3.9 or newer on PATH, found $(python3 --version 2>/dev/null || echo none): install one first"
}

download() {
    if command -v curl >/dev/null 2>&1; then
        curl -fsSL -o "$2" "$1"
    else
        need wget
        wget -q -O "$2" "$1"
    fi
}

fetch_script() {
    beside=$(dirname -- "$0")/orchestra.py
    if [ "$(basename -- "$0")" = install.sh ] && [ -f "$beside" ] && [ -z "${ORCHESTRA_URL:-}" ]; then
        cp -- "$beside" "$1" || die "$beside: expected to copy it, could not"
    elif [ -n "${ORCHESTRA_URL:-}" ]; then
        download "${ORCHESTRA_URL%/}/orchestra.py" "$1" || die "${ORCHESTRA_URL%/}/orchestra.py: expected to download it, could not"
    else
        die "ORCHESTRA_URL: expected the address of a folder that has orchestra.py, got nothing"
    fi
}

sha256_of() {
    if command -v sha256sum >/dev/null 2>&1; then
        sha256sum <"$1" | cut -d ' ' -f 1
    elif command -v shasum >/dev/null 2>&1; then
        shasum -a 256 <"$1" | cut -d ' ' -f 1
    else
        die "sha256sum or shasum: expected one for ORCHESTRA_SHA256, found none"
    fi
}

check_script() {
    last='# The last line: install.sh takes no copy without it.'
    # The dot keeps the final newline, which $(...) would drop.
    [ "$(tail -n 1 "$1" && echo .)" = "$last
." ] || die "orchestra.py: expected the whole script, got something else or a part of it: try again"
    if [ -n "${ORCHESTRA_SHA256:-}" ]; then
        sum=$(sha256_of "$1") || exit 2
        [ "$sum" = "$ORCHESTRA_SHA256" ] || die "orchestra.py: expected SHA-256 $ORCHESTRA_SHA256, got $sum"
    fi
}

# Leaves nothing behind but what is in use: folders made for nothing go again.
clean_up() {
    [ -z "$temporary" ] || rm -f -- "$temporary"
    rmdir -- "$root/lib" "$root" 2>/dev/null || :
}

install() {
    python=$(find_python) || exit 2
    temporary=
    trap clean_up EXIT
    trap 'exit 130' INT TERM HUP
    (umask 077 && mkdir -p -- "$root/lib") || die "$root/lib: expected to make this folder, could not"
    temporary=$(mktemp "$root/lib/.install-XXXXXX") || die "$root/lib: expected to write there, could not"
    fetch_script "$temporary"
    check_script "$temporary"
    version=$("$python" -I "$temporary" --version 2>&1) || die "orchestra.py: expected it to start, got: $version"
    "$python" -I "$temporary" self-install || exit 2
    [ "$(uname)" != Darwin ] || "$root/bin/orchestra" daemon install || exit 2
    say "$version, with $python"
    case ":$PATH:" in
    *":$HOME/.local/bin:"*) ;;
    *) say "add it to your PATH:  export PATH=\"\$HOME/.local/bin:\$PATH\"" ;;
    esac
    say "next:  orchestra init PATH -p PROJECT --sync"
    [ "$(uname)" = Darwin ] || say "then:  orchestra daemon start    (a running one keeps its version until it is restarted)"
}

uninstall() {
    if [ "$(uname)" = Darwin ]; then
        plist=$HOME/Library/LaunchAgents/dev.orchestra.daemon.plist
        if [ -e "$plist" ] && ! "$root/bin/orchestra" daemon uninstall; then
            launchctl bootout "gui/$(id -u)/dev.orchestra.daemon" 2>/dev/null || :
            rm -f -- "$plist"
        fi
    elif [ -x "$root/bin/orchestra" ]; then
        "$root/bin/orchestra" daemon stop || say "a daemon that still runs ends with its session"
    fi
    if [ "$(readlink "$HOME/.local/bin/orchestra" 2>/dev/null)" = "$root/bin/orchestra" ]; then
        rm -f -- "$HOME/.local/bin/orchestra"
    fi
    for part in bin lib run logs hashes daemon.sock; do
        rm -rf -- "${root:?}/$part"
    done
    rmdir -- "$root" 2>/dev/null || [ ! -d "$root" ] || say "kept: $root/projects (the registry), $root/backups"
    say "uninstalled"
}

main() {
    case "${HOME:-}" in
    /*) ;;
    *) die "HOME: expected an absolute path, got '${HOME:-}'" ;;
    esac
    root=$HOME/.orchestra
    case "${1:-}" in
    '') install ;;
    --uninstall) uninstall ;;
    *) die "$1: expected nothing or --uninstall" ;;
    esac
}

{ main "$@"; }
