#!/bin/sh
# Install Orchestra for this user, or upgrade it:
#
#   sh install.sh                                              from a checkout
#   curl -fsSLO URL/install.sh && ORCHESTRA_URL=URL sh install.sh
#                                                              from a web server that has orchestra.py beside it
#   sh install.sh --uninstall                                  remove it; the registry, backups and hashes stay
#
# ORCHESTRA_SHA256 is compared with the download's; ORCHESTRA_PYTHON is the Python to use.

set -eu

say() { printf '%s\n' "$*"; }

die() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 2
}

need() { command -v "$1" >/dev/null 2>&1 || die "$1 is missing: install it first"; }

# Leave relative folders out of PATH: they could have programs of the current folder.
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

# Without the developer tools, macOS's own python3 is a placeholder that opens a dialog when
# it is run. xcode-select may print a folder that does not exist, so look for a Python there.
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
        echo "Apple's placeholder: xcode-select --install"
    else
        { command -v python3 >/dev/null && python3 --version 2>&1; } || echo none
    fi
}

find_python() {
    if [ -n "${ORCHESTRA_PYTHON:-}" ]; then
        works "$ORCHESTRA_PYTHON" || die "ORCHESTRA_PYTHON: expected Python 3.9 or newer, got $ORCHESTRA_PYTHON"
        command -v "$ORCHESTRA_PYTHON"
        return
    fi
    for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9; do
        if command -v "$python" >/dev/null 2>&1 && works "$python"; then
            command -v "$python"
            return
        fi
    done
    die "needs Python 3.9 or newer (found $(found_python3)). Debian: sudo apt install python3; macOS: brew install python"
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
        cp -- "$beside" "$1" || die "could not copy $beside"
    elif [ -n "${ORCHESTRA_URL:-}" ]; then
        url=${ORCHESTRA_URL%/}/orchestra.py
        download "$url" "$1" || die "could not download $url"
    else
        die "no orchestra.py beside install.sh: run it in a checkout, or set ORCHESTRA_URL to the address of the folder that has it"
    fi
}

sha256_of() {
    if command -v sha256sum >/dev/null 2>&1; then
        sha256sum <"$1" | cut -d ' ' -f 1
    elif command -v shasum >/dev/null 2>&1; then
        shasum -a 256 <"$1" | cut -d ' ' -f 1
    else
        die "ORCHESTRA_SHA256 needs sha256sum or shasum: install one first"
    fi
}

check_script() {
    last='# The last line: install.sh takes no copy without it.'
    # The dot keeps the final newline, which $(...) would remove.
    [ "$(tail -n 1 "$1" && echo .)" = "$last
." ] || die "orchestra.py is incomplete, or not Orchestra's: download it again"
    if [ -n "${ORCHESTRA_SHA256:-}" ]; then
        sum=$(sha256_of "$1") || exit 2
        [ "$sum" = "$ORCHESTRA_SHA256" ] || die "orchestra.py: expected SHA-256 $ORCHESTRA_SHA256, got $sum"
    fi
}

# Remove the temporary file, and folders that were made but not used.
clean_up() {
    [ -z "$temporary" ] || rm -f -- "$temporary"
    rmdir -- "$root/lib" "$root" 2>/dev/null || :
}

install() {
    python=$(find_python) || exit 2
    temporary=
    trap clean_up EXIT
    trap 'exit 130' INT TERM HUP
    (umask 077 && mkdir -p -- "$root/lib") || die "could not create $root/lib"
    temporary=$(mktemp "$root/lib/.install-XXXXXX") || die "could not write to $root/lib"
    fetch_script "$temporary"
    check_script "$temporary"
    version=$("$python" -I "$temporary" --version 2>&1) || die "orchestra.py does not start: $version"
    "$python" -I "$temporary" self-install || exit 2
    say "$version, with $python"
    start_at_login
    program=orchestra
    case ":$PATH:" in
    *":$HOME/.local/bin:"*) ;;
    *)
        program=\~/.local/bin/orchestra
        tell_path
        ;;
    esac
    tell_next
}

# Where launchd or systemd runs, it starts the daemon; else `tell_next` says how.
start_at_login() {
    starts=
    if [ "$(uname)" = Darwin ]; then
        "$root/bin/orchestra" daemon install || exit 2
        starts=yes
    elif has_user_manager && "$root/bin/orchestra" daemon install --systemd; then
        starts=yes
    fi
}

has_user_manager() {
    case $(systemctl --user is-system-running 2>/dev/null) in
    initializing | starting | running | degraded | maintenance) ;;
    *) return 1 ;;
    esac
}

# No startup file is changed: say which line to add to which.
tell_path() {
    # shellcheck disable=SC2016 # for the user's shell
    line='export PATH="$HOME/.local/bin:$PATH"'
    shell=${SHELL:-}
    case ${shell##*/}-$(uname) in
    fish-*)
        line='fish_add_path ~/.local/bin'
        file=\~/.config/fish/config.fish
        ;;
    zsh-*) file=\~/.zshrc ;;
    bash-Darwin) file=\~/.bash_profile ;;
    bash-*) file=\~/.bashrc ;;
    *) file=\~/.profile ;;
    esac
    say "your PATH lacks ~/.local/bin: add this line to $file, and open a new terminal"
    say "  $line"
}

tell_next() {
    say "next:  $program $(next_command)"
    if [ -z "$starts" ]; then
        running=$([ ! -S "$root/daemon.sock" ] || "$root/bin/orchestra" daemon status --short 2>/dev/null) || running=
        case $running in
        '' | *'not running'*) say "then:  $program daemon start --detach" ;;
        *) say "then:  $program daemon restart    (the running daemon may be older)" ;;
        esac
    fi
}

next_command() {
    for file in "$root"/projects/*/*.yaml; do
        case $file in
        */project.yaml | *.local.yaml) ;;
        *)
            if [ -e "$file" ]; then
                echo status
                return
            fi
            ;;
        esac
    done
    echo "init PATH -p PROJECT --sync"
}

uninstall() {
    if [ "$(uname)" = Darwin ]; then
        plist=$HOME/Library/LaunchAgents/dev.orchestra.daemon.plist
        if [ -e "$plist" ] && ! "$root/bin/orchestra" daemon uninstall; then
            launchctl bootout "gui/$(id -u)/dev.orchestra.daemon" 2>/dev/null || :
            rm -f -- "$plist"
        fi
    elif [ -x "$root/bin/orchestra" ]; then
        [ ! -e "$HOME/.config/systemd/user/orchestra.service" ] || "$root/bin/orchestra" daemon uninstall --systemd || :
        "$root/bin/orchestra" daemon stop || say "a daemon that is still running ends with its session"
    fi
    ! is_own_link "$HOME/.local/bin/orchestra" || rm -f -- "$HOME/.local/bin/orchestra"
    [ ! -d "$root/run" ] || clear_up_syncs
    for part in bin lib logs daemon.sock schema.json; do
        rm -rf -- "${root:?}/$part"
    done
    for folder in "$root/projects" "$root/backups" "$root/hashes" "$root"; do
        remove_if_empty "$folder"
    done
    kept projects "the registry"
    kept backups "what syncs replaced"
    kept hashes "checksums of what Orchestra wrote"
    kept run "needed to clean up after killed syncs"
    kept notify "your own program"
    say "uninstalled"
}

# Whether self-install made this link. If the home folder was renamed, an old one leads nowhere.
is_own_link() {
    case $(readlink "$1" 2>/dev/null) in
    "$root/bin/orchestra" | ../../.orchestra/bin/orchestra) ;;
    */.orchestra/bin/orchestra) [ ! -e "$1" ] ;;
    *) return 1 ;;
    esac
}

# A killed sync may have left the user's text under another name; only the files in run say where.
clear_up_syncs() {
    if { [ -x "$root/bin/orchestra" ] && "$root/bin/orchestra" self-uninstall; } || [ ! -d "$root/run/codebases" ]; then
        rm -rf -- "${root:?}/run"
    fi
}

# A folder with only Finder's .DS_Store counts as empty.
remove_if_empty() {
    if [ -d "$1" ] && [ ! -L "$1" ]; then
        [ "$(ls -A -- "$1")" != .DS_Store ] || rm -f -- "$1/.DS_Store"
        rmdir -- "$1" 2>/dev/null || :
    fi
}

kept() { [ ! -e "$root/$1" ] || say "kept: $root/$1 ($2)"; }

# In another user's home folder, root would create files that this user cannot change.
check_owner() {
    for folder in "$HOME" "$root"; do
        [ ! -d "$folder" ] || [ "$(id -u)" -ne 0 ] || [ -n "$(find "$folder/." -prune -user 0)" ] ||
            die "$folder belongs to another user: run this as that user, or set HOME"
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
    *) die "$1: unknown argument; the only one is --uninstall" ;;
    esac
}

{ main "$@"; }
