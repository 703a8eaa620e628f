#!/bin/sh
# Install Orchestra for this user, or upgrade it:
#
#   sh install.sh                                              from a checkout
#   curl -fsSL URL/install.sh | ORCHESTRA_URL=URL sh           from a web server that has orchestra.py beside it
#   sh install.sh --uninstall                                  take it back; the registry, the backups and hashes stay
#
# ORCHESTRA_SHA256 checks the download; ORCHESTRA_PYTHON names the Python to use.

set -eu

say() { printf '%s\n' "$*"; }

die() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 2
}

need() { command -v "$1" >/dev/null 2>&1 || die "$1: expected it on PATH, found none: install it first"; }

# Programs are looked up in PATH's absolute folders alone: the others lie in the current folder.
absolute_path() {
    rest=$PATH:
    found=
    while [ -n "$rest" ]; do
        case $rest in
        /*) found=$found:${rest%%:*} ;;
        esac
        rest=${rest#*:}
    done
    printf '%s\n' "${found#:}"
}

# Where the developer tools are missing, macOS's own python3 is a placeholder: started, it opens a dialog. xcode-select
# may name a folder where nothing is, so the Python there counts.
is_placeholder() {
    found=$(command -v "$1") || return 1
    [ "$found" = /usr/bin/python3 ] || [ "$(readlink "$found")" = /usr/bin/python3 ] || return 1
    [ "$(uname)" = Darwin ] || return 1
    tools=$(xcode-select -p 2>/dev/null) || tools=
    [ ! -x "${tools:-/nowhere}/usr/bin/python3" ]
}

works() { ! is_placeholder "$1" && "$1" -I -c 'import sys; sys.exit(sys.version_info < (3, 9))' >/dev/null 2>&1; }

found_python3() {
    if is_placeholder python3; then
        echo "Apple's placeholder, which xcode-select --install replaces"
    else
        python3 --version 2>/dev/null || echo none
    fi
}

find_python() {
    if [ -n "${ORCHESTRA_PYTHON:-}" ]; then
        works "$ORCHESTRA_PYTHON" || die "ORCHESTRA_PYTHON: expected Python 3.9 or newer, got $ORCHESTRA_PYTHON, which is not"
        command -v "$ORCHESTRA_PYTHON"
        return
    fi
    for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9; do
        if command -v "$python" >/dev/null 2>&1 && works "$python"; then
            command -v "$python"
            return
        fi
    done
    die "python3: expected Python 3.9 or newer on PATH, found $(found_python3): install one first"
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
    ! is_own_link "$HOME/.local/bin/orchestra" || rm -f -- "$HOME/.local/bin/orchestra"
    [ ! -d "$root/run" ] || clear_up_syncs
    for part in bin lib logs daemon.sock; do
        rm -rf -- "${root:?}/$part"
    done
    for folder in "$root/projects" "$root/backups" "$root/hashes" "$root"; do
        remove_if_empty "$folder"
    done
    kept projects "the registry"
    kept backups "what syncs replaced"
    kept hashes "what tells Orchestra's text from yours"
    kept run "what killed syncs may have left is still to be cleared up"
    say "uninstalled"
}

# The one that self-install makes; after the home folder was renamed, an older one leads nowhere.
is_own_link() {
    case $(readlink "$1" 2>/dev/null) in
    "$root/bin/orchestra" | ../../.orchestra/bin/orchestra) ;;
    */.orchestra/bin/orchestra) [ ! -e "$1" ] ;;
    *) return 1 ;;
    esac
}

# A killed sync may have left a save of the user's under another name, and only the files in run say so.
clear_up_syncs() {
    if "$root/bin/orchestra" self-uninstall || [ ! -d "$root/run/codebases" ]; then
        rm -rf -- "${root:?}/run"
    fi
}

# Finder's .DS_Store counts for nothing.
remove_if_empty() {
    if [ -d "$1" ] && [ ! -L "$1" ]; then
        [ "$(ls -A -- "$1")" != .DS_Store ] || rm -f -- "$1/.DS_Store"
        rmdir -- "$1" 2>/dev/null || :
    fi
}

kept() { [ ! -e "$root/$1" ] || say "kept: $root/$1 ($2)"; }

# Root's files would lock the home folder's owner out of them.
check_owner() {
    for folder in "$HOME" "$root"; do
        [ ! -d "$folder" ] || [ "$(id -u)" -ne 0 ] || [ -n "$(find "$folder/." -prune -user 0)" ] ||
            die "$folder: expected root's own folder, got another user's: run it as that user, or set HOME"
    done
}

main() {
    case "${HOME:-}" in
    /*) ;;
    *) die "HOME: expected an absolute path, got '${HOME:-}'" ;;
    esac
    root=$HOME/.orchestra
    PATH=$(absolute_path)
    check_owner
    case "${1:-}" in
    '') install ;;
    --uninstall) uninstall ;;
    *) die "$1: expected nothing or --uninstall" ;;
    esac
}

{ main "$@"; }
