#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["PyYAML>=6"]
# ///
"""Keep AI coding agents' instruction files in sync, from one registry.

    ~/.orchestra/projects/shop/api.yaml         registry: one YAML file per codebase
        │  read and checked (9 to 14)
        ▼
    Codebase ── rendered (22) ──► the text each agent should see
                                 │  compared with the disk and the last sync (23, 24)
                                 ▼
                               Plan ──► status, diff, sync --dry-run    (looks only)
                                 │
                                 ▼  backed up, then replaced in one step (26, 5 to 7)
                  CLAUDE.md, AGENTS.md, .cursor/rules/orchestra.mdc ...

    The daemon: a registry file is saved ─► event ─► what changed ─► debounced (28)
                ─► job (32) ─► Plan, as above

Contents
  I Ground
     1 Errors             what the user can put right: exceptions and problems
     2 Places             every path below the home folder
     3 Files              reading, naming and writing files; who else has them open
     4 Locks              one process at a time, and a note of what it is doing
     5 Replacing          replacing a user's file in six steps that lose no save
     6 Backups            what was replaced is kept, and thinned out
     7 Turns              a lock on a user's files, and what a killed holder left

  II Registry
     8 Agents             one row per agent: its file, and how to write it
     9 YAML               reading nodes, and editing a file in place
    10 Kinds              what a key may hold: read, cached, written, joined
    11 Codebases          their records, schema and names; whose folder is whose
    12 Markdown           markers, code fences and unfinished merges in a text
    13 Layers             what one registry file says, and what codebases share
    14 Registry           listing, loading and writing its files
    15 Manifests          what the manifests in a folder say
    16 Scripts            what a file lets one run by name, as make's targets
    17 Node and Python    their package managers, environments and tools
    18 Ecosystems         how a language's table is read, and what takes code
    19 Languages          a table per language: its commands, and the evidence for them
    20 Detection          what a folder holds, by its manifests
    21 Drafting           what init registers, where the user has not spoken already

  III Sync
    22 Text               what agents read, rendered from a codebase
    23 Blocks             Orchestra's part of a shared file: markers, seals, merging
    24 Records            what was last written, which proves that it is Orchestra's
    25 Plan               what is to be written now, and what becomes of what is there
    26 Sync               carrying a plan out, and bringing replaced text back
    27 Status and diff    a plan put into a word or a diff; what an agent is told

  IV Daemon
    28 Watching           events say where to look; the tree, what changed
    29 Logs               the daemon's log files, written and followed
    30 Programs           other programs, started and waited for
    31 Control socket     lines of JSON, the client, the server
    32 Worker             jobs, one at a time, beside the loop
    33 Daemon             the loop: watcher, socket, signals and timers

  V Program
    34 Installing         PyYAML and the installed program
    35 Services           the daemon in the background: launchd, systemd
    36 Registering        a folder becomes a codebase
    37 Output             messages, tables and colors for a terminal or a pipe
    38 Arguments          the rows of the table of commands
    39 Status screen      what status shows, once or live
    40 Doctor             checks for what commonly goes wrong
    41 Commands           one method per command
    42 Command line       the table of commands, and main

Each section uses only those above it.
"""

# Start-up. Until `narrow_import_path` is called, only built-in modules may be imported.
# `__future__` is not one: annotations are evaluated, and those that name a class from
# further down are quoted.
import sys

if sys.version_info < (3, 9) or sys.platform == "win32":
    # Python 3.7 and 3.8 can run this file up to here.
    found = f"Python {sys.version_info[0]}.{sys.version_info[1]} on {sys.platform}"
    sys.stderr.write(f"orchestra: needs Python 3.9 or newer on macOS or Linux (found {found})\n")
    sys.exit(2)


def narrow_import_path() -> None:
    """Remove untrusted folders from sys.path: a json.py in one must not be imported.

    They are the current folder, the script's, and PYTHONPATH's, unless they are
    Python's own. If Python has already imported a module from one, exit with a message.
    """
    import posix

    def identify(path: str) -> "Optional[tuple[int, int]]":
        try:
            found = posix.stat(path or ".")
        except (OSError, ValueError):
            return None  # nothing can be imported from there
        return found.st_dev, found.st_ino

    untrusted = ["."]
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        untrusted.append(sys.path[0])  # the script's folder; with python -m, the current one
    if not sys.flags.ignore_environment:
        variable = posix.environ.get(b"PYTHONPATH", b"")
        untrusted += variable.decode("utf-8", "surrogateescape").split(":")
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    prefixes = (sys.base_prefix, sys.base_exec_prefix)
    own = [f"{prefix}/{sys.platlibdir}/{version}" for prefix in prefixes]
    own += [f"{folder}/lib-dynload" for folder in own]
    removed = {*map(identify, untrusted)} - {*map(identify, own)}
    sys.path[:] = [path for path in sys.path if identify(path) not in removed]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        folder = file.replace("/__init__.py", ".py").rpartition("/")[0]
        # Debian has a sitecustomize.py of its own there, and anyone may have another.
        is_pythons = name not in ("__main__", "sitecustomize") and any(
            identify(f"{own[0]}/{name}{end}") for end in ("", ".py")
        )
        if is_pythons and folder and identify(folder) in removed:  # by sitecustomize or a .pth file
            problem = f"{file} was loaded in place of Python's own {name}"
            sys.stderr.write(f"orchestra: {problem}\n  try: unset PYTHONPATH\n")
            sys.exit(2)


if __name__ == "__main__":
    narrow_import_path()

# ruff: noqa: E402
import errno
import fcntl
import functools
import itertools
import json
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from types import SimpleNamespace

# Importing typing would cost 7 ms of each start, so these stand in for it.
TYPE_CHECKING = False  # mypy assumes True
if TYPE_CHECKING:
    from typing import Any, NamedTuple, Optional, TypeVar

    AnyLock = TypeVar("AnyLock", bound="Lock")
else:
    from collections import _tuplegetter

    class RecordMaker(type):
        """Make what typing.NamedTuple makes, without its checks."""

        def __new__(cls, name, bases, namespace):
            if bases == (tuple,):
                return super().__new__(cls, name, bases, namespace)
            fields = namespace.pop("__annotations__", None)
            if fields is None:
                # Python 3.14 evaluates annotations on demand (PEP 749).
                fields = namespace.pop("__annotate_func__")(1)
            defaults = {field: namespace[field] for field in fields if field in namespace}
            namespace.update({field: _tuplegetter(at, "") for at, field in enumerate(fields)})
            namespace.update(__slots__=(), _fields=tuple(fields), _field_defaults=defaults)
            return super().__new__(cls, name, bases, namespace)

    class NamedTuple(tuple, metaclass=RecordMaker):
        """The base of 50 records: namedtuple() would take 0.15 ms to make each."""

        __slots__ = ()

        def __new__(cls, *values, **named):
            # Compiled at the first use: a run needs few of the classes.
            names = ", ".join(cls._fields)
            make = eval(f"lambda _cls, {names}: _new(_cls, ({names},))", {"_new": tuple.__new__})
            make.__defaults__ = tuple(cls._field_defaults.values())
            cls.__new__ = staticmethod(make)
            return make(cls, *values, **named)

        def _replace(self, **named):
            values = list(self)
            for field, value in named.items():
                values[self._fields.index(field)] = value
            return tuple.__new__(type(self), values)

        def _asdict(self):
            return dict(zip(self._fields, self))

        def __repr__(self):
            pairs = (f"{field}={value!r}" for field, value in self._asdict().items())
            return f"{type(self).__name__}({', '.join(pairs)})"

    class Optional:
        """Lets Optional[...] be evaluated in annotations."""

        def __class_getitem__(cls, item):
            return object

    Any = object

__version__ = "0.2.0"

Clock = Callable[[], float]  # returns seconds
Buffer = Any  # bytes or a memoryview; collections.abc.Buffer is newer than Python 3.9


# ══ I Ground ══════════════════════════════════════════════════════════════════

# ── 1 Errors ──────────────────────────────────────────────────────────────────

# What the user can put right is an OrchestraError, and is reported on one line;
# anything else is a bug, and keeps its traceback. A failure that stops one file or
# codebase, but not the command, becomes a Problem where it arises, and stays one until
# it is reported.


class OrchestraError(Exception):
    """What is wrong (place, expected, got); `hint` is the way out.

    `retry` means that the same may work in a little while.
    """

    retry = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(OrchestraError):
    """A command line that cannot be carried out."""


class RegistryError(OrchestraError):
    """A registry file, or the name of one, that cannot be used."""


class SyncError(OrchestraError):
    """A file or folder that cannot be synced, or a lock that is not released."""


class FolderAbsent(SyncError):
    """A codebase's folder is not on this machine, as is usual in a shared registry.

    Every plan begins by looking (`find_root`); `is_absent` asks before a plan.
    """


class DaemonError(OrchestraError):
    """A failure of the daemon, its socket or its service; or, as IoError, of a file."""


def explain_os_error(error: OSError) -> str:
    """Return the system's own words, without Python's decoration."""
    return (error.strerror or str(error) or type(error).__name__).lower()


class IoError(DaemonError):
    """An operating system error, with the path it happened at."""

    def __init__(self, path: str, source: OSError) -> None:
        hint = ""
        if source.errno == errno.ENOSPC:
            hint = "free some space, then run orchestra sync --all"
        elif source.errno == errno.EPERM and sys.platform == "darwin":
            # Background programs get it in ~/Documents, ~/Desktop and ~/Downloads, even
            # where the shell may read (Transparency, Consent and Control); and anyone
            # for a file with the flag uchg.
            hint = (
                f"System Settings > Privacy & Security > Full Disk Access for {sys.executable},"
                " or move the codebase out of Documents, Desktop and Downloads;"
                " a locked file (ls -lO shows uchg) is unlocked by chflags nouchg FILE"
            )
        super().__init__(f"{path}: {explain_os_error(source)}", hint)
        self.path = path
        self.source = source


class blame:
    """Turn an OSError inside the `with` into an IoError that names `path`."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if isinstance(error, OSError):
            raise IoError(self._path, error) from error


class LaunchdError(DaemonError):
    """A failure of launchd."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"launchd error: {message}", hint)


class SystemdError(DaemonError):
    """A failure of systemd."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"systemd error: {message}", hint)


class NotifyError(DaemonError):
    """The requested watcher is not available here."""


class ProtocolError(DaemonError):
    """A request or reply that is not understood; `closes` if it ends the connection."""

    def __init__(self, message: str, hint: str = "", *, closes: bool = False) -> None:
        super().__init__(message, hint)
        self.closes = closes


class DaemonBusy(ProtocolError):
    """The daemon has as many clients as it takes."""


class DaemonNotRunning(DaemonError):
    """Nothing listens at `socket`."""

    def __init__(self, socket: str) -> None:
        super().__init__("daemon is not running", "orchestra daemon start")
        self.socket = socket


def visible(text: str) -> str:
    """Escape what one line cannot show: line ends, control characters, surrogates."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def format_json(value: Any) -> str:
    """Write JSON for people, with what a line cannot show escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def excerpt(text: str) -> str:
    """Quote a text, or the beginning of a long one."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


def count_of(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the known word that is closest to a mistyped one, "" if none is close."""
    import difflib

    spellings = {other.casefold(): other for other in known}
    # Not the default of 0.6: "nope" and "shop/e" are that much alike.
    found = difflib.get_close_matches(word[:100].casefold(), spellings, 1, cutoff=0.61)
    return spellings[found[0]] if found else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean "status"?)` for a mistyped word, "" if none is close."""
    near = nearest(word, known)
    return f' (did you mean "{near}"?)' if near else ""


class Problem(NamedTuple):
    """One thing wrong: where (file:line), what, on one line, and the way out.

    `retry` means that the same may work in a little while.
    """

    where: str
    message: str
    hint: str = ""
    retry: bool = False

    @classmethod
    def from_error(cls, error: "OrchestraError | OSError", where: str = "") -> "Problem":
        """Describe an error; without `where`, an OSError's own path is the place."""
        if isinstance(error, OSError):
            error = IoError(str(error.filename or ""), error)
        if isinstance(error, IoError):
            return cls(where or error.path, explain_os_error(error.source), error.hint)
        return cls(where, str(error), error.hint, error.retry)

    def below(self, label: str) -> "Problem":
        """Put `label` in front of the place."""
        return self._replace(where=f"{label}: {self.where}" if self.where else label)

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


# ── 2 Places ──────────────────────────────────────────────────────────────────

# Everything Orchestra keeps is below the home folder, which every function here takes:
#
#   ~/.orchestra/                      private (mode 0700)
#     projects/PROJECT/NAME.yaml       the registry; project.yaml is shared
#     schema.json                      the JSON Schema of its files, for editors
#     hashes/PROJECT/NAME.json         the record of what was last written to a codebase
#     backups/PROJECT/NAME/TIME/PATH   what was replaced
#     run/                             locks, what was parsed, what the daemon replaced
#     logs/, daemon.sock               the daemon's
#     notify                           the user's own program, run with what went wrong
#     lib/, bin/                       the installed program, and its PyYAML
#   ~/.local/bin/orchestra             the link to it
#   ~/Library/LaunchAgents/            launchd's property list
#   ~/.config/systemd/user/            systemd's unit

DAEMON_LABEL = "dev.orchestra.daemon"
DAEMON_SOCKET = "daemon.sock"
DAEMON_STDOUT_LOG = "daemon.log"
DAEMON_STDERR_LOG = "daemon-err.log"
Key = tuple[str, str]  # (project, codebase)


def orchestra_root(home: str) -> str:
    return os.path.join(home, ".orchestra")


def _below_root(path: str) -> Callable[[str], str]:
    """Make the function that returns a path in Orchestra's folder of a home."""
    return lambda home: f"{orchestra_root(home)}/{path}"


def _of_codebase(folder: str, suffix: str = "") -> Callable[[str, Key], str]:
    """Make the function that returns the path of a codebase in such a folder."""
    return lambda home, key: f"{orchestra_root(home)}/{folder}/{key[0]}/{key[1]}{suffix}"


projects_root = _below_root("projects")
codebase_path = _of_codebase("projects", ".yaml")
schema_path = _below_root("schema.json")
hashes_root = _below_root("hashes")
record_path = _of_codebase("hashes", ".json")
backups_root = _below_root("backups")
backups_of = _of_codebase("backups")
run_dir = _below_root("run")
codebase_lock_path = _of_codebase("run/codebases", ".lock")
daemon_lock_path = _below_root("run/daemon.lock")
replaced_root = _below_root("run/replaced")
replaced_path = _of_codebase("run/replaced", ".json")
notify_path = _below_root("notify")
socket_path = _below_root(DAEMON_SOCKET)
logs_dir = _below_root("logs")
stdout_log_path = _below_root(f"logs/{DAEMON_STDOUT_LOG}")
stderr_log_path = _below_root(f"logs/{DAEMON_STDERR_LOG}")
python_lib_dir = _below_root(f"lib/python{sys.version_info[0]}.{sys.version_info[1]}")  # of its own PyYAML
installed_script_path = _below_root("lib/orchestra.py")
binary_path = _below_root("bin/orchestra")


def project_path(home: str, project: str) -> str:
    return f"{projects_root(home)}/{project}/project.yaml"


def link_path(home: str) -> str:
    return os.path.join(home, ".local", "bin", "orchestra")


def launchd_plist_path(home: str) -> str:
    return os.path.join(home, "Library", "LaunchAgents", DAEMON_LABEL + ".plist")


def systemd_unit_path(home: str) -> str:
    return os.path.join(home, ".config", "systemd", "user", "orchestra.service")


def label_for(key: Key) -> str:
    return f"{key[0]}/{key[1]}"


def typed(text: str) -> str:
    """Write a word as it is typed in a shell: a name may hold `$(...)`.

    Only a leading ~/ is for the shell to expand, unlike ~user and zsh's =program.
    """
    home, rest = ("~/", text[2:]) if text.startswith("~/") else ("", text)
    return home + (rest if re.fullmatch(r"(?!=)[\w@%+=:,./-]+", rest) else "'" + rest.replace("'", "'\\''") + "'")


def shorten_home(home: str, path: str) -> str:
    """Write a path below the home folder as ~/..."""
    return "~" + path[len(home) :] if path.startswith(home + os.sep) else path


def expand_home(home: str, path: str) -> str:
    """Undo `shorten_home`; only a leading ~/, or ~ alone, is special."""
    return home + path[1:] if path == "~" or path.startswith("~/") else path


# ── 3 Files ───────────────────────────────────────────────────────────────────

# Only sections 3 to 7 change files on disk, except for pip, the socket and the logs.
# Readers see the old text or the new, never a mixture. A file of the user's is changed
# through its opened folder (Place), so that no link put in the way leads elsewhere.

# O_NONBLOCK, or opening a FIFO for reading would wait for its writer.
READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
REFUSED_KINDS = {  # what is there, by the errno of an open(2) that failed
    errno.ENOENT: "absent",
    errno.ENOTDIR: "absent",  # a file in a folder's place is reported where parents are checked
    errno.ELOOP: "symlink",
    errno.EMLINK: "symlink",  # on FreeBSD
    errno.ENXIO: "special",  # a socket
    errno.EOPNOTSUPP: "special",  # a socket, in POSIX and on macOS
}
BOM = b"\xef\xbb\xbf"  # which some editors write at the beginning of a file

# Reading


class Disk(NamedTuple):
    """What is at a path: `kind` is absent, file, symlink, folder or special."""

    kind: str
    data: bytes = b""
    mode: int = 0

    @property
    def noun(self) -> str:
        """Name it, for messages."""
        nouns = {"absent": "none", "file": "a file", "symlink": "a link", "folder": "a folder"}
        return nouns.get(self.kind, "a pipe, socket or device")


ABSENT = Disk("absent")


def read_opened(fd: int, limit: int = -1) -> Disk:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        return Disk("folder" if stat.S_ISDIR(info.st_mode) else "special")
    # One byte more than expected: a read that ends at the file's size shows in one call
    # that this was all. A shorter one may have been cut, as Linux does at 2 GiB.
    data, step = b"", info.st_size + 1
    while True:
        step = step if limit < 0 else min(step, limit - len(data))
        more = os.read(fd, step) if step else b""
        data = data + more if data else more
        if not more or (len(more) < step and len(data) == info.st_size):
            return Disk("file", data, stat.S_IMODE(info.st_mode))
        step = 1 << 20


def read_disk(path: str, limit: int = -1, folder: Optional[int] = None) -> Disk:
    """Read what is at a path; never follow a link, or wait for a pipe.

    At most `limit` bytes are read, or all if it is negative. Raises IoError.
    """
    try:
        fd = os.open(path, READ_FLAGS, dir_fd=folder)
    except OSError as error:
        if error.errno not in REFUSED_KINDS:
            raise IoError(path, error) from error
        return Disk(REFUSED_KINDS[error.errno])
    try:
        return read_opened(fd, limit)
    except OSError as error:
        raise IoError(path, error) from error
    finally:
        os.close(fd)


def parse_object(text: "str | bytes") -> dict[str, Any]:
    """Parse a JSON object; {} where the text is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def sha256_of(data: Buffer) -> str:
    import hashlib  # here, since asking the daemon for its status needs no OpenSSL

    return hashlib.sha256(data).hexdigest()


# Times


def now_rfc3339(clock: Clock = time.time) -> str:
    """Return the time as records have it: 2026-03-01T00:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(clock()))


def age_of(when: Optional[str], clock: Clock) -> Optional[int]:
    """Return the age of an RFC 3339 time in whole seconds, None if there is none."""
    from datetime import datetime

    try:
        then = datetime.fromisoformat((when or "").replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None
    return max(0, int(clock() - then))


# Folders and names


def names_in(folder: str) -> list[str]:
    """List a folder; one that cannot be read has no names."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def keys_below(root: str, suffix: str = "") -> list[Key]:
    """List the codebases that have a file PROJECT/NAME, with a suffix, in a folder."""
    names = [(project, name) for project in names_in(root) for name in names_in(f"{root}/{project}")]
    return [(project, name[: len(name) - len(suffix)]) for project, name in names if name.endswith(suffix)]


def is_ignored(name: str) -> bool:
    """Return whether a name is hidden, or an editor's backup, swap or lock file's."""
    return name.startswith((".", "#")) or name.endswith("~")


def folders_below(path: str) -> list[str]:
    """List a folder and all below it; links are not followed."""
    return [folder for folder, _, _ in os.walk(path)]


def files_below(path: str) -> Iterator[str]:
    """Iterate over all files below a folder; links are not followed."""
    return (f"{folder}/{name}" for folder, _, names in os.walk(path) for name in names)


def real_path(path: str) -> str:
    """Resolve all links of a path, as far as possible."""
    try:
        return os.path.realpath(path)
    except OSError:  # a link that went while it was followed
        return path


def follow_link(path: str) -> str:
    """Return where a symbolic link leads; any other path stays as it is."""
    return real_path(path) if os.path.islink(path) else path


class Stamp(NamedTuple):
    """What changes when a file is written."""

    device: int
    inode: int
    size: int
    mtime: int
    ctime: int

    @classmethod
    def from_stat(cls, info: os.stat_result) -> "Stamp":
        return cls(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)

    @classmethod
    def at(cls, path: str) -> "Stamp":
        """Return the stamp of a file, or of the folder in which it is missing."""
        for place in (path, os.path.dirname(follow_link(path))):
            with suppress(OSError):
                return cls.from_stat(os.stat(place))
        return cls(0, 0, 0, 0, 0)


def is_same_file(one: "int | str", other: "int | str") -> bool:
    """Return whether two paths or open descriptors lead to the same existing file."""
    try:
        return os.path.samestat(os.stat(one), os.stat(other))
    except OSError:
        return False


class Place(NamedTuple):
    """A file to change: its opened folder, its path, and its name in the backups.

    `with` closes the folder at the end.
    """

    folder: int
    path: str
    backup_name: str = ""

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.folder)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def read(self, name: str = "", limit: int = -1) -> Disk:
        try:
            return read_disk(name or self.name, limit, self.folder)
        except IoError as error:
            raise error.source from None  # as the others do: the caller knows the path

    def rename(self, name: str, new: str) -> None:
        os.rename(name, new, src_dir_fd=self.folder, dst_dir_fd=self.folder)

    def link(self, name: str, new: str) -> None:
        os.link(name, new, src_dir_fd=self.folder, dst_dir_fd=self.folder, follow_symlinks=False)

    def unlink(self, name: str) -> None:
        os.unlink(name, dir_fd=self.folder)

    def is_same(self, name: str) -> bool:
        """Return whether another name in the folder leads to the same file."""
        try:
            one, other = (os.stat(n, dir_fd=self.folder, follow_symlinks=False) for n in (self.name, name))
        except OSError:
            return False
        return os.path.samestat(one, other)

    def age(self, clock: Clock) -> float:
        """Return the seconds since the file was last written, 0 if it is gone."""
        try:
            return clock() - os.stat(self.name, dir_fd=self.folder).st_mtime
        except OSError:
            return 0.0


def open_place(path: str, backup_name: str = "") -> Place:
    """Open the folder of a file; links in its path are followed. Raises OSError."""
    return Place(os.open(os.path.dirname(path), FOLDER_FLAGS), path, backup_name)


def open_place_below(root: str, path: str, backup_name: str, make: bool = False) -> Place:
    """Open the folder of the file at `path` below `root`, which is a real path.

    `make` makes missing folders. Links on the way are refused (OSError), so that
    nothing outside `root` is ever changed.
    """
    flags = FOLDER_FLAGS | os.O_NOFOLLOW
    folder = os.open(root, flags)
    try:
        for name in path.split("/")[:-1]:
            try:
                inner = os.open(name, flags, dir_fd=folder)
            except FileNotFoundError:
                if not make:
                    raise
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=folder)
                inner = os.open(name, flags, dir_fd=folder)
            os.close(folder)
            folder = inner
    except BaseException:
        os.close(folder)
        raise
    return Place(folder, f"{root}/{path}", backup_name)


def make_folders(path: str) -> None:
    """Create a folder of the user's and those above it, with the umask's modes."""
    os.makedirs(path, exist_ok=True)


# Temporary files


def new_token() -> str:
    return f"{os.getpid()}-{os.urandom(6).hex()}"


def temporary_name(token: str, name: str = "") -> str:
    """Name a temporary file, with the file it belongs to if that leaves room."""
    long = f".orchestra-{token}-{name}.tmp"
    return long if name and len(os.fsencode(long)) <= 255 else f".orchestra-{token}.tmp"


def is_temporary_name(name: str) -> bool:
    return name.startswith(".orchestra-") and name.endswith(".tmp")


def is_named_by(name: str, token: str) -> bool:
    """Return whether a temporary file's name begins with a token."""
    return name.startswith((f".orchestra-{token}-", f".orchestra-{token}."))


def parse_temporary(name: str) -> tuple[int, str]:
    """Return the process that made a temporary file (or 0), and its file (or "")."""
    found = re.fullmatch(r"(?s)\.orchestra-(\d{1,9})-[0-9a-f]+(?:-\d+(?:-(.+))?)?\.tmp", name)
    return (int(found[1]), found[2] or "") if found else (0, "")


def has_exited(process: int) -> bool:
    """Return whether a process has ended; process 0, an unknown one, may run."""
    try:
        if process:
            os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # another user's
    return False


# Exchanging names


@functools.cache
def _find_rename() -> Optional[Callable[..., int]]:
    """Find the rename with flags: renameat2(2) of Linux or renameatx_np(2) of macOS."""
    try:
        import ctypes
    except ImportError:  # a Python built without libffi
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    rename = getattr(libc, "renameatx_np", None) or getattr(libc, "renameat2", None)
    return None if rename is None else lambda *arguments: ctypes.get_errno() if rename(*arguments) else 0


def _rename_by_flag(folder: int, one: str, other: str, flags: Mapping[str, int]) -> bool:
    flag, rename = flags.get(sys.platform), _find_rename()
    if not flag or not rename:
        return False
    code = rename(folder, os.fsencode(one), folder, os.fsencode(other), flag)
    if code in UNSUPPORTED:
        return False
    if code:
        raise OSError(code, os.strerror(code), one, None, other)
    return True


def swap_files(folder: int, one: str, other: str) -> bool:
    """Exchange two names atomically; False if it is not supported; raises OSError."""
    flags = {"linux": 0x2, "darwin": 0x2}  # RENAME_EXCHANGE, RENAME_SWAP
    return _rename_by_flag(folder, one, other, flags)


def rename_exclusively(folder: int, name: str, new: str) -> bool:
    """Rename unless the name is taken; False if unsupported; raises OSError."""
    flags = {"linux": 0x1, "darwin": 0x4}  # RENAME_NOREPLACE, RENAME_EXCL
    return _rename_by_flag(folder, name, new, flags)


# Writing


def flush(fd: int) -> None:
    """Wait until a file is on the disk, and on macOS out of the drive's cache."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    try:
        if full is None:
            os.fsync(fd)
        else:
            fcntl.fcntl(fd, full)
    except OSError as error:
        if full is None or error.errno not in (*UNSUPPORTED, errno.ENOTTY):
            raise
        os.fsync(fd)  # on a network file system, which has no drive to ask


def flush_folder(path: str) -> None:
    """Wait until the names in a folder are on the disk."""
    fd = os.open(path, FOLDER_FLAGS)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def new_file(path: str, data: bytes, mode: Optional[int], folder: Optional[int] = None) -> Iterator[int]:
    """Write a new file, for the `with` to finish; raises OSError.

    Until then it is private, unless `mode` is None.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(path, flags, 0o666 if mode is None else 0o600, dir_fd=folder)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        yield fd
    finally:
        os.close(fd)


def finish_file(fd: int, mode: Optional[int], durable: bool) -> None:
    """Set a new file's mode; if `durable`, wait for the disk."""
    if mode is not None:
        os.fchmod(fd, mode)
    if durable:
        flush(fd)


def _copy_attributes(like: int, fd: int) -> None:
    """Copy the extended attributes, and the access control list or its absence.

    Raises OSError if the list could not be copied.
    """
    if hasattr(os, "listxattr"):  # Linux
        acl = "system.posix_acl_access"  # acl(5)
        names = os.listxattr(like)
        if acl not in names and acl in os.listxattr(fd):  # from the folder, for new files
            os.removexattr(fd, acl)
        for name in sorted(names, key=lambda name: name == acl):  # the list last: it may raise
            try:
                os.setxattr(fd, name, os.getxattr(like, name))
            except OSError:
                if name == acl:
                    raise
                # Some of the system's own cannot be set; access is no wider without.
    elif sys.platform == "darwin":
        import ctypes

        # Two calls, since fcopyfile ends at the first attribute that cannot be set.
        libc = ctypes.CDLL(None, use_errno=True)
        libc.fcopyfile(like, fd, None, 0b100)  # COPYFILE_XATTR in copyfile.h
        if libc.fcopyfile(like, fd, None, 0b001):  # COPYFILE_ACL
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


def copy_metadata(like: int, fd: int, path: str) -> int:
    """Copy owner, group and attributes to the file to replace `like`; return its mode.

    The mode is without group and other bits if ownership or the access control list
    could not be copied. Raises OSError for another user's file: its owner would be
    locked out.
    """
    old, new = os.fstat(like), os.fstat(fd)
    if old.st_uid != new.st_uid and os.geteuid() != 0:
        raise OSError(errno.EACCES, f"the file belongs to user {old.st_uid}: chown it", path)
    is_guarded = True
    try:
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            os.fchown(fd, old.st_uid, old.st_gid)
    except OSError:
        is_guarded = False
    try:
        _copy_attributes(like, fd)
    except OSError as error:
        is_guarded = is_guarded and error.errno == errno.ENOTSUP
    mode = stat.S_IMODE(old.st_mode)
    return mode if is_guarded else mode & ~0o077


# Who writes


def has_writer(fd: int) -> Optional[bool]:
    """Return whether a program has a file open for writing; None if that is unknown.

    Linux then refuses a read lease (F_SETLEASE in fcntl(2)). Some file systems have
    none, and other users' files need CAP_LEASE. A lease is held until `fd` is closed.
    """
    if not sys.platform.startswith("linux"):
        return None
    import signal

    try:
        # Instead of SIGIO, which would end us if a program opened the file now.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    return False


def is_lease_whole(fd: int) -> bool:
    """Return whether no program has opened a file for writing since `has_writer`."""
    return fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK


def find_busy_files() -> frozenset[tuple[int, int]]:
    """List the files that programs have open for writing, by device and inode.

    /proc shows them on Linux, but not those of other users' programs (proc(5)).
    """
    found = set()
    for process in names_in("/proc"):
        if not process.isdigit() or process == str(os.getpid()):
            continue
        for number in names_in(f"/proc/{process}/fd"):
            try:
                info = os.stat(f"/proc/{process}/fd/{number}")
                if stat.S_ISREG(info.st_mode):
                    with open(f"/proc/{process}/fdinfo/{number}", encoding="ascii") as file:
                        flags = int(file.read().partition("flags:")[2].split()[0], 8)
                    if flags & os.O_ACCMODE != os.O_RDONLY:
                        found.add((info.st_dev, info.st_ino))
            except (OSError, ValueError, IndexError):
                pass  # closed, or ended, meanwhile
    return frozenset(found)


# Orchestra's own files


def make_private_folder(path: str, durable: bool = False) -> None:
    """Create a folder of Orchestra's own, and those above it; raises OSError."""
    if not os.path.isdir(path):
        make_private_folder(os.path.dirname(path), durable)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not os.path.isdir(path):
                raise
        if durable:
            flush_folder(os.path.dirname(path))


def save_private(path: str, data: bytes, token: str, *, mode: int = 0o600, durable: bool = True) -> None:
    """Atomically save a file of Orchestra's own; raises IoError."""
    folder = os.path.dirname(path)
    temporary = f"{folder}/{temporary_name(token)}"
    with blame(path):
        make_private_folder(folder)
        try:
            with new_file(temporary, data, mode) as fd:
                finish_file(fd, mode, durable)
            # On ext4 a rename that replaces a file waits for its new bytes to be
            # allocated; a swap does not.
            if durable or not (os.path.exists(path) and swap_files(-1, temporary, path)):
                os.rename(temporary, path)
            else:
                os.unlink(temporary)
        except BaseException:
            with suppress(OSError):  # it may never have been made
                os.unlink(temporary)
            raise
        if durable:
            flush_folder(folder)


def move_private(path: str, new: str) -> None:
    """Move a file or folder of Orchestra's own to a free path; raises IoError."""
    with blame(path):
        make_private_folder(os.path.dirname(new))
        os.rename(path, new)


def remove_private(path: str) -> None:
    """Remove a file of Orchestra's own, if there is one; raises IoError."""
    with blame(path), suppress(FileNotFoundError):
        os.unlink(path)


def remove_private_folder(path: str) -> None:
    """Remove a folder of Orchestra's own with all that is in it; raises IoError."""
    import shutil

    with blame(path):
        if os.path.lexists(path):
            shutil.rmtree(path)


def remove_empty_folder(path: str, folder: Optional[int] = None) -> bool:
    """Remove a folder if nothing is in it, and return whether it is gone."""
    try:
        os.rmdir(path, dir_fd=folder)
    except OSError as error:
        return error.errno == errno.ENOENT
    return True


def make_link(target: str, link: str) -> None:
    """Atomically make or renew a symbolic link; raises OSError."""
    folder = os.path.dirname(link)
    make_folders(folder)
    temporary = f"{folder}/{temporary_name(new_token())}"
    os.symlink(target, temporary)
    os.replace(temporary, link)


# ── 4 Locks ───────────────────────────────────────────────────────────────────

# One writer at a time, across processes (flock(2)). A turn is the time a process holds
# a lock; it ends with the process. Between turns the lock's file is empty; during one
# it tells what to clean up after a kill:
#
#   1 Before the first temporary file is made, write the token that is in their names.
#   2 Before a user's file is replaced or removed, write where its old text will be
#     (Swap).
#   3 At the end, empty the file, unless some files are set aside beside the user's.
#   4 At the beginning, if something is there, settle what a killed turn left.
#
# What needs no turn has a token of its own (`new_token`) for its temporary files: a
# kill leaves little of these, and nothing of the user's.


class Swap(NamedTuple):
    """A file of the user's, and the temporary file that it changes places with.

    The hashes are of the expected text and, if there is one, of the new text.
    """

    path: str
    temporary: str
    hashes: Sequence[str]


class Leftover(NamedTuple):
    """What a killed turn may have left: temporary files with a token, and a swap."""

    token: str
    swap: Optional[Swap] = None
    is_read: bool = True  # if not, another version wrote the swap

    @classmethod
    def parse(cls, data: bytes) -> "Optional[Leftover]":
        """Read a lock file, None if it is empty; first versions wrote a token only."""
        token, newline, rest = data.partition(b"\n")
        if not token:
            return None
        number, *parts = os.fsdecode(rest).split("\0")
        swap = None
        if number and number in parts[3:]:
            path, temporary, *hashes = parts[: parts.index(number, 3)]
            swap = Swap(path, temporary, hashes)
        # One that was cut short has not taken place: it is announced before.
        is_read = bool(newline) and (number.isdigit() or not number)
        return cls(token.decode("utf-8", "replace"), swap, is_read)

    def format(self, number: int) -> bytes:
        """Write what `parse` reads; a number around the swap shows that it is whole."""
        swap = self.swap
        parts = [str(number), swap.path, swap.temporary, *swap.hashes, str(number), ""] if swap else []
        return os.fsencode(f"{self.token}\n" + "\0".join(parts))


def sweep_folder(folder: str, token: str) -> None:
    """Remove the temporary files in a folder that a token names; raises IoError."""
    with blame(folder):
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in names:
            path = os.path.join(folder, name)
            if is_named_by(name, token) and os.path.isfile(path):
                os.unlink(path)


def try_lock(path: str, timeout: float = 0.0) -> Optional[int]:
    """Take a lock until its descriptor is closed; None if taken; raises IoError."""
    deadline = time.monotonic() + timeout
    is_last = False  # try at least twice: `is_locked` holds the lock for an instant
    with blame(path):
        make_private_folder(os.path.dirname(path))
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return fd
                if is_last:
                    break
                is_last = time.monotonic() >= deadline
                time.sleep(0.01)
        except BaseException:  # a file system without locks
            os.close(fd)
            raise
    os.close(fd)
    return None


class Lock:
    """An exclusive lock whose file records what to clean up if its holder is killed.

    `with` waits for it, at most `timeout` seconds, and settles what a killed turn left;
    raises SyncError if the lock is not released, IoError. A turn that ends by an
    exception leaves the file as a kill does.
    """

    def __init__(self, path: str, timeout: float = 30.0) -> None:
        self.leftover = Leftover(new_token())  # what a kill would leave now
        self.aside = f"{path}.aside"  # the folder for files that are set aside
        self.has_files_aside = False  # beside the user's: the next turn looks there
        self.is_clean = True  # if not, the file is left as by a kill
        self._path = path
        self._timeout = timeout
        self._is_settled = False  # the file has nothing of a turn before
        self._is_announced = False  # the file has the token
        self._count = 0  # of temporary files

    def __enter__(self: "AnyLock") -> "AnyLock":
        fd = try_lock(self._path, self._timeout)
        if fd is None:
            problem = f"another orchestra command has been busy for {self._timeout:g} s"
            raise SyncError(problem, "wait for it to finish, or stop it")
        self._fd = fd
        with blame(self._path):
            try:
                found = Leftover.parse(os.pread(self._fd, 1 << 16, 0))
                if found:
                    self.settle(found)
                    if not self.has_files_aside:
                        os.ftruncate(self._fd, 0)
                self._is_settled = True
                self.collect()
            except BaseException:
                os.close(self._fd)
                raise
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if kind is None:
                self.collect()
                if self.is_clean and (self._is_announced or self.has_files_aside):
                    with blame(self._path):
                        os.ftruncate(self._fd, 0)
                        if self.has_files_aside:
                            self.announce()
        finally:
            os.close(self._fd)

    def settle(self, leftover: Leftover) -> None:
        """Clean up after a killed turn; here, in the folder of the lock file."""
        sweep_folder(os.path.dirname(self._path), leftover.token)

    def collect(self) -> None:
        """Remove files set aside that nothing writes to any more; here are none."""

    @property
    def token(self) -> str:
        """What names this turn's temporary files; the lock file has it from now on."""
        if self._is_settled and not self._is_announced:
            self.announce()
        return self.leftover.token

    @functools.cached_property
    def busy(self) -> frozenset[tuple[int, int]]:
        """The files that programs had open for writing when first asked."""
        return find_busy_files()

    def new_temporary(self, name: str) -> str:
        """Name a new temporary file for the file called `name`."""
        self._count += 1
        return temporary_name(f"{self.token}-{self._count}", name)

    def announce(self, swap: Optional[Swap] = None) -> None:
        """Write to the lock file what a kill would leave from now on."""
        self.leftover = self.leftover._replace(swap=swap)
        data, written = self.leftover.format(self._count), 0
        with blame(self._path):
            while written < len(data):
                written += os.pwrite(self._fd, data[written:], written)
        self._is_announced = True


def is_locked(path: str) -> bool:
    """Return whether a process holds a lock; nothing is made or changed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def is_abandoned(path: str) -> bool:
    """Return whether a lock file tells what a killed turn left; raises IoError."""
    return not is_locked(path) and Leftover.parse(read_disk(path).data) is not None


def write_lock(fd: int, data: bytes) -> None:
    """Write what others may want to know of a lock's holder; raises OSError."""
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)


# ── 5 Replacing ───────────────────────────────────────────────────────────────

# How a file of the user's is replaced. The law: a file that may still be written to is
# never removed, and never left without a name; "unknown" counts as "may".
#
#   1 `_open_idle`: if a program has the file open for writing, wait a moment, then give
#     up (FileBusy).
#   2 `new_file`: write the new text to a temporary file beside it, with the old one's
#     owner, mode and attributes.
#   3 `Displaced.announce`: write to the lock file where the old text will be, and the
#     hashes of both. After a kill the next turn does the rest (`Displaced.settle`).
#   4 `swap_files`: exchange the names, atomically.
#   5 `Displaced.remove`: if the displaced file has the expected text and nothing
#     writes to it, remove it. If that cannot be determined, set it aside.
#   6 `Displaced.give_back`: otherwise raise FileChanged. If the file still is what step
#     4 put there, exchange the names back, once; a newer save keeps its name. Remove
#     the file that has no name now, as in step 5, or set it aside.
#
# Files are set aside in a folder of the backups; if that is on another disk, beside the
# user's file by a temporary name. Each turn looks at them again (`Turn`, section 7),
# and removes those that nothing writes to or, if that is unknown, that have not changed
# for a minute. A text that is not the expected one is backed up first.
#
# Where names cannot be exchanged (`_replace_by_rename`), the old file is first linked
# to the temporary name (renamed to it where there are no links), and step 4 is a plain
# rename. A file that is saved by renaming in between is lost (README, What remains). If
# a kill leaves no file of the name, `settle` restores the old one. To remove a file is
# the same, with a rename to the temporary name as step 4.
#
# Linux refuses a read lease on a file that is open for writing. The lease is held until
# the file is gone, so that a later open for writing breaks it and is noticed. Two kinds
# of writer go unnoticed: one whose open(2) found the file before step 4 and did not
# return until after step 5, and one that has it open for reading and later opens that
# descriptor for writing through /proc/self/fd.

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class FileChanged(Exception):
    """The file changed after planning. Internal: callers retry, or report it."""

    message = "it kept changing while Orchestra was writing it"


class FileBusy(SyncError):
    """A program keeps the file open for writing."""

    retry = True

    def __init__(self) -> None:
        super().__init__("another program has it open for writing", "close it there, then sync again")


# Before the swap


@contextmanager
def _open_idle(place: Place, expected: Disk, lock: Lock) -> Iterator[int]:
    """Step 1: open the file, if it has the expected size and mode.

    Raises FileBusy, FileChanged, OSError.
    """
    deadline = time.monotonic() + 0.2
    while True:
        try:
            fd = os.open(place.name, READ_FLAGS, dir_fd=place.folder)
        except OSError as error:
            if error.errno in REFUSED_KINDS:
                raise FileChanged(place.path) from error
            raise
        try:
            is_busy, info = has_writer(fd), os.fstat(fd)
            if is_busy is False:
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)  # or an open waits for us
            elif is_busy is None and (info.st_dev, info.st_ino) in lock.busy:
                raise FileBusy
            if not is_busy:
                if (info.st_size, info.st_mode) != (len(expected.data), stat.S_IFREG | expected.mode):
                    raise FileChanged(place.path)
                yield fd
                return
            if time.monotonic() > deadline:
                raise FileBusy
        finally:
            os.close(fd)
        time.sleep(0.005)


@contextmanager
def _removed_on_error(place: Place, temporary: str) -> Iterator[None]:
    """Remove a temporary file if the `with` fails; if a folder is gone, FileChanged."""
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # it may never have been made
            place.unlink(temporary)
        if isinstance(error, FileNotFoundError):
            raise FileChanged(place.path) from error
        raise


def _place_new_file(place: Place, temporary: str) -> None:
    """Give a temporary file its name; raises FileChanged if it is taken, OSError."""
    # A plain rename would replace what has appeared since the last look.
    try:
        if rename_exclusively(place.folder, temporary, place.name):
            return
        place.link(temporary, place.name)
    except FileExistsError:
        raise FileChanged(place.path) from None
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if place.read(limit=0).kind != "absent":
            raise FileChanged(place.path) from None
        place.rename(temporary, place.name)  # the instant since the last look stays open
    else:
        place.unlink(temporary)


# After the swap


class Displaced:
    """A file that loses its name, to become `temporary`; with the later steps."""

    def __init__(self, place: Place, temporary: str, hashes: Sequence[str], lock: Lock) -> None:
        self.place = place
        self.temporary = temporary
        self.hashes = hashes
        self.lock = lock

    def announce(self) -> None:
        """Step 3; raises IoError."""
        folder, slash, _ = self.place.path.rpartition("/")
        self.lock.announce(Swap(self.place.path, folder + slash + self.temporary, self.hashes))

    def remove(self, is_known: Callable[[Disk], bool]) -> bool:
        """Step 5. Return whether the file is gone, or set aside; raises OSError."""
        place = self.place
        try:
            fd = os.open(self.temporary, READ_FLAGS, dir_fd=place.folder)
        except FileNotFoundError:
            return True
        except OSError:
            return False  # a link, or what else was put there at the last instant
        try:
            is_busy = has_writer(fd)
            found = read_opened(fd)
            if found.kind != "file" or not is_known(found):
                return False
            if is_busy is None:
                self._set_aside()
            elif not is_lease_whole(fd):  # nor is one that was refused
                return False
            else:
                place.unlink(self.temporary)
            return True
        finally:
            os.close(fd)

    def give_back(self) -> None:
        """Step 6, unless a newer save has the name; raises OSError, IoError."""
        place, ours = self.place, self.hashes[-1]
        if place.is_same(self.temporary):
            place.unlink(self.temporary)  # its second name
            return
        shown = place.read()
        if shown.kind == "absent":
            with suppress(FileChanged):
                _place_new_file(place, self.temporary)
                return
        elif shown.kind == "file" and sha256_of(shown.data) == ours:
            is_swapped = swap_files(place.folder, self.temporary, place.name)
            if is_swapped and self.remove(lambda disk: sha256_of(disk.data) == ours):
                return
        self._set_aside()

    def _set_aside(self) -> None:
        """Move the file where the next turn finds it, named for `parse_aside`."""
        place, digest = self.place, self.hashes[0]
        name = (place.backup_name or place.name).replace("%", "%25").replace("/", "%2F")
        try:
            make_private_folder(self.lock.aside)
            aside = os.path.join(self.lock.aside, f"{new_token()}-{digest}-{name}")
            os.rename(self.temporary, aside, src_dir_fd=place.folder)
        except OSError:  # another disk; or a name too long
            place.rename(self.temporary, temporary_name(f"kept-{new_token()}-{digest}", place.name))
            self.lock.has_files_aside = True

    def verify(self, expected: Disk) -> None:
        """Steps 5 and 6: raise FileChanged if what was displaced is not `expected`."""
        if not self.remove(lambda disk: disk == expected):
            self.give_back()
            raise FileChanged(self.place.path)

    def settle(self) -> None:
        """Take steps 5 and 6 for a swap that was cut short; raises OSError, IoError."""
        # If no file has the name, the old text lost it in a plain rename: restore it.
        known = self.hashes[1:] if self.place.read(limit=0).kind == "absent" else self.hashes
        if not self.remove(lambda disk: sha256_of(disk.data) in known):
            self.give_back()

    @contextmanager
    def settled_on_error(self) -> Iterator[None]:
        """Settle if the `with` fails or is interrupted; or else the next turn does."""
        try:
            yield
        except FileChanged:
            raise
        except BaseException as error:
            with suppress(OSError, IoError):
                self.settle()
            if isinstance(error, FileNotFoundError):
                raise FileChanged(self.place.path) from error
            raise


# Replacing and removing


def _replace_by_rename(displaced: Displaced, expected: Disk) -> None:
    """Steps 3 to 6 where names cannot be exchanged; raises like `replace_file`."""
    place, new = displaced.place, displaced.temporary
    old = displaced.lock.new_temporary(place.name)
    try:
        # The old file is the one to announce; the new one holds nothing of the user's.
        displaced.temporary = old
        displaced.announce()
        has_both = True
        try:
            place.link(place.name, old)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            has_both = False
            place.rename(place.name, old)
        if place.read(old) != expected:
            displaced.give_back()
            raise FileChanged(place.path)
        if has_both:
            place.rename(new, place.name)  # the instant since the last look stays open
        else:
            _place_new_file(place, new)
        displaced.verify(expected)
    finally:
        with suppress(OSError):
            place.unlink(new)


def replace_file(
    place: Place, data: bytes, expected: Disk, lock: Lock, *, mode: Optional[int] = None, durable: bool = False
) -> None:
    """Atomically replace a file, by the steps at the head of this section.

    It keeps its mode, owner and attributes; a new file gets `mode`, or the umask's.
    `durable` waits for the disk, for text that exists nowhere else. Raises FileChanged
    if the file is not `expected`, FileBusy, OSError, IoError.
    """
    temporary = lock.new_temporary(place.name)
    with _removed_on_error(place, temporary):
        if expected.kind == "absent":
            with new_file(temporary, data, mode, place.folder) as fd:
                finish_file(fd, mode, durable)
            _place_new_file(place, temporary)
            return
        with _open_idle(place, expected, lock) as old, new_file(temporary, data, 0, place.folder) as fd:
            finish_file(fd, copy_metadata(old, fd, place.path), durable)
        if durable and place.read() != expected:  # the disk took its time
            raise FileChanged(place.path)
        displaced = Displaced(place, temporary, [sha256_of(expected.data), sha256_of(data)], lock)
        displaced.announce()
    with displaced.settled_on_error():
        if swap_files(place.folder, temporary, place.name):
            displaced.verify(expected)
        else:
            _replace_by_rename(displaced, expected)


def remove_file(place: Place, expected: Disk, lock: Lock) -> None:
    """Remove a file, if it is `expected`; raises like `replace_file`."""
    if place.read() != expected:
        raise FileChanged(place.path)
    with _open_idle(place, expected, lock):
        pass
    displaced = Displaced(place, lock.new_temporary(place.name), [sha256_of(expected.data)], lock)
    displaced.announce()
    with displaced.settled_on_error():
        place.rename(place.name, displaced.temporary)
        displaced.verify(expected)


# ── 6 Backups ─────────────────────────────────────────────────────────────────

# What is replaced or removed without proof that Orchestra wrote it is kept here first,
# and a kept version never changes: it stays, or is dropped whole. A version is a folder
# named by the UTC time, with the file at its path and the notes beside it: why it was
# kept, its number, and its origin. To keep one (`Turn.back_up`):
#
#   1 Skip a text equal to the newest version's but for white space that Markdown
#     ignores, unless a user wrote it and that is Orchestra's.
#   2 Write file and notes to a temporary folder, and flush them. If a kill ends this,
#     the next turn removes the folder.
#   3 Rename the folder to its time; now it is a version. If that name is taken, try the
#     next microsecond.
#   4 Drop old versions, by file and origin. Each becomes a temporary folder first.
#
# Order and time are separate: the number says which version is newer, the time what the
# clock said, right or wrong. Versions of older Orchestras have no number, and come
# first, in the order of their names. The caller holds a lock, so that no other process
# keeps a version of the same file; other files' versions may come and go.

HAND_EDIT = "hand edit"  # an origin: a user wrote the text
DISPLACED = "displaced"  # an origin: Orchestra kept it in an operation of its own


class Reason:
    """Why a version was kept; versions of each origin are thinned separately."""

    EDITED = "edited by hand, or not written by Orchestra"
    RETIRED = "removed from the registry"
    SAVED = "saved while Orchestra was writing it"
    REWRITTEN = "written afresh"
    RESTORED = "replaced by restore"
    ORIGINS = {EDITED: HAND_EDIT, RETIRED: HAND_EDIT, SAVED: DISPLACED, REWRITTEN: DISPLACED, RESTORED: DISPLACED}


# Markdown

LIST_MARK = rb"(?:[-*+]|[0-9]{1,9}[.)])"
LIST_GAP = re.compile(rb"(?m)^([ \t]*" + LIST_MARK + rb")[ \t]+")
FENCE = rb"(?:(`{3,})[^`\n]*$|(~{3,}))"  # what opens fenced code


def significant_text(path: str, data: bytes) -> bytes:
    """Leave out of a Markdown file what formatters change; other files stay as is.

    That is blank lines, white space at the end of a line, and more than one space after
    a list mark, but nothing in code (fenced, or indented by four spaces or a tab).
    """
    if not path.endswith((".md", ".mdc", ".markdown")):
        return data
    lines: list[bytes] = []
    blank: list[bytes] = []
    fence, is_code = b"", False
    for line in data.split(b"\n"):
        body = line.rstrip(b" \t\r")
        if fence:
            lines.append(line)
            closing = body.lstrip(b" \t>")
            fence = b"" if closing.startswith(fence) and not closing.strip(fence[:1]) else fence
        elif not body:
            blank.append(line)
        else:
            was_code, is_code = is_code, bool(re.match(rb" {4}| {0,3}\t", line))
            lines += blank if was_code and is_code else []
            blank = []
            line_end = b"\r" if line.endswith(b"\r") else b""  # a changed one is a change
            lines.append(line if is_code else LIST_GAP.sub(rb"\1 ", body) + line_end)
            opening = re.match(rb"[ \t>0-9.)*+-]*" + FENCE, body)  # in lists and quotes too
            fence = opening[1] or opening[2] if opening else b""
    return b"\n".join(lines)


# Versions

GROUP_TIME = 2.0  # seconds at most between what one sync keeps of two files


class Backup(NamedTuple):
    """A version of the file at `path`, kept at `when` (UTC; its folder) as `file`.

    `number` is 0 if an older Orchestra kept it.
    """

    when: str
    path: str
    file: str
    why: str
    number: int = 0
    origin: str = HAND_EDIT

    def has_text(self, data: bytes) -> bool:
        """Compare the significant text with that of `data`."""
        try:
            disk = read_disk(self.file)
        except IoError:
            return False
        mine, other = (significant_text(self.path, text) for text in (disk.data, data))
        return disk.kind == "file" and mine == other


def time_name(now: float, step: int = 0) -> str:
    """Name a version by a time in seconds (1970 to 9999) and microseconds."""
    seconds, micro = divmod(int(min(max(now, 0.0), 253402214400) * 1e6) + step, 10**6)
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds)) + f".{micro:06d}Z"


def seconds_of(when: str) -> float:
    """Read the time of a version, 0 for no time."""
    from datetime import datetime, timezone

    try:
        return datetime.strptime(when, "%Y%m%dT%H%M%S.%fZ").replace(tzinfo=timezone.utc).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def local_time(when: str) -> str:
    """Write the time of a version as local time."""
    seconds = seconds_of(when)
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def take_last_group(backups: Sequence[Backup]) -> list[Backup]:
    """Return the last version, and those of other files that the same sync kept.

    It keeps them one soon after the other, and for the same reason.
    """
    found: dict[str, Backup] = {}
    last = backups[-1]
    for backup in reversed(backups):
        is_near = seconds_of(last.when) - seconds_of(backup.when) <= GROUP_TIME
        if backup.path in found or not is_near or backup.why != last.why:
            break
        found[backup.path] = last = backup
    return [*found.values()][::-1]


def parse_when(text: str, clock: Clock = time.time) -> Callable[[str], bool]:
    """Return a function that recognizes the versions of a time that a user typed.

    That is the beginning of a name, in UTC; a day or a time of the day, local if no Z
    follows; or an age, for all versions at least as old. Raises UsageError.
    """
    from datetime import datetime, timedelta, timezone

    words = " ".join(text.lower().replace("t", " ").split()) if re.match(r"\d+-", text) else text.lower().strip()
    if re.fullmatch(r"\d{4,8}(t\d{0,6}(\.\d*)?)?z?", words):
        return lambda when: when.startswith(words.upper().rstrip("Z"))
    units = "s|sec|seconds?|m|min|minutes?|h|hours?|d|days?|w|weeks?"
    age = re.fullmatch(rf"(\d{{1,6}}) ?({units}) ago", words)
    if age:
        sizes = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
        latest = time_name(clock() - int(age[1]) * sizes[age[2][0]])
        return lambda when: when <= latest
    zone = timezone.utc if words.endswith("z") else None
    now = datetime.fromtimestamp(clock(), zone)
    days = {"today": now, "yesterday": now - timedelta(days=1)}
    if words in days:
        words = f"{days[words]:%Y-%m-%d}"
    for form, size in (("%Y-%m-%d", 86400), ("%Y-%m-%d %H:%M", 60), ("%Y-%m-%d %H:%M:%S", 1)):
        for spelled in (words.rstrip("z").strip(), f"{now:%Y-%m-%d} {words.rstrip('z').strip()}"):
            try:
                start = datetime.strptime(spelled, form).replace(tzinfo=zone).timestamp()
            except (ValueError, OverflowError):
                continue
            return lambda when: time_name(start) <= when < time_name(start + size)
    hint = "10 min ago, yesterday, 2026-11-29, 14:05, or a time from --list"
    raise UsageError(f"--at: expected a time, got {excerpt(text)}", hint)


def versions_to_drop(kept: Sequence[Backup], now: str) -> list[Backup]:
    """Choose the versions to drop of a file's, oldest first; `now` is a `time_name`.

    Of each origin there stay: the first, which is the user's original, and the first
    with a number; the newest ten; the last of each of the newest 30 days that have any;
    the last of each month. Days in the future, by a wrong clock, keep their last
    version too, but are not among the 30.
    """
    dropped = []
    for origin in (HAND_EDIT, DISPLACED):
        versions = [backup for backup in kept if backup.origin == origin]
        last_of_day = {backup.when[:8]: backup for backup in versions}
        last_of_month = {backup.when[:6]: backup for backup in versions}
        # The newest days by number: a wrong clock may have put them into the past.
        newest_days = dict.fromkeys(backup.when[:8] for backup in reversed(versions))
        days = [day for day in newest_days if day <= now[:8]][:30]
        days += [day for day in newest_days if day > now[:8]]
        numbered = [backup for backup in versions if backup.number]
        staying = {*versions[:1], *numbered[:1], *versions[-10:], *last_of_month.values()}
        staying.update(last_of_day[day] for day in days)
        dropped += [backup for backup in versions if backup not in staying]
    return dropped


class Backups:
    """The kept versions of one codebase's files."""

    NOTES = ".orchestra.json"  # {path: {"why": ..., "number": ..., "quota": ...}}

    def __init__(self, home: str, key: Key) -> None:
        self.folder = backups_of(home, key)

    def versions(self) -> list[Backup]:
        """List all versions, oldest first; raises IoError.

        Folders that are not named by a time are not Orchestra's: they are left alone.
        """
        with blame(self.folder):
            try:
                names = os.listdir(self.folder)
            except FileNotFoundError:
                return []
        times = [name for name in names if re.fullmatch(r"[0-9]{8}T[0-9]{6}\.[0-9]{6}Z", name)]
        found = [backup for when in times for backup in self._versions_of(when)]
        return sorted(found, key=lambda backup: (backup.number, backup.when, backup.path))

    def _versions_of(self, when: str) -> Iterator[Backup]:
        folder = os.path.join(self.folder, when)
        if os.path.islink(folder):
            return
        try:
            notes = parse_object(read_disk(os.path.join(folder, self.NOTES), 1 << 20).data)
        except IoError:
            notes = {}
        for file, is_regular in self._files_below(folder):
            path = file[len(folder) + 1 :]
            if is_regular and path != self.NOTES and not is_temporary_name(os.path.basename(path)):
                yield Backup(when, path, file, *self._parse_note(notes.get(path)))

    @staticmethod
    def _files_below(folder: str) -> Iterator[tuple[str, bool]]:
        """List all but folders, and whether each is a regular file; links are not."""
        for parent, folders, names in os.walk(folder):
            for name in (*folders, *names):
                path = os.path.join(parent, name)
                try:
                    mode = os.lstat(path).st_mode
                except OSError:
                    mode = 0
                if not stat.S_ISDIR(mode):
                    yield path, stat.S_ISREG(mode)

    @staticmethod
    def _parse_note(value: Any) -> tuple[str, int, str]:
        """Read why a file was kept, its number and origin; first versions wrote why."""
        if not isinstance(value, dict):
            return str(value or ""), 0, HAND_EDIT
        why, number, origin = str(value.get("why", "")), value.get("number"), value.get("quota")
        if type(number) is not int or not 0 < number < 1 << 62:  # larger is damage
            number = 0
        return why, number, DISPLACED if origin == DISPLACED else HAND_EDIT

    def write(self, temporary: str, backup: Backup, disk: Disk, now: float) -> Backup:
        """Write a version, and return it with its time; raises OSError."""
        note = {"why": backup.why, "number": backup.number, "quota": backup.origin}
        # Always readable for its owner, or it could be neither compared nor restored.
        files = {backup.path: (disk.data, disk.mode | stat.S_IRUSR)}
        files[self.NOTES] = (json.dumps({backup.path: note}).encode(), 0o600)
        try:
            for path, (data, mode) in files.items():
                file = os.path.join(temporary, path)
                make_private_folder(os.path.dirname(file))
                with new_file(file, data, mode) as fd:
                    finish_file(fd, mode, durable=True)
            for folder in folders_below(temporary):
                flush_folder(folder)
            when = self._publish(temporary, now)
        except BaseException:
            with suppress(IoError):
                remove_private_folder(temporary)
            raise
        flush_folder(self.folder)
        return backup._replace(when=when, file=os.path.join(self.folder, when, backup.path))

    def _publish(self, temporary: str, now: float) -> str:
        """Rename a finished version to its time, or the next free microsecond."""
        step = 0
        while True:
            when = time_name(now, step)
            try:
                os.rename(temporary, f"{self.folder}/{when}")
                return when
            except OSError:
                if not os.path.lexists(f"{self.folder}/{when}"):
                    raise
            step += 1

    def drop(self, backup: Backup, temporary: str) -> None:
        """Remove a version, with its folder if that is all; raises OSError, IoError."""
        folder = os.path.join(self.folder, backup.when)
        files = {file for file, _ in self._files_below(folder)}
        if files - {backup.file, os.path.join(folder, self.NOTES)}:
            os.unlink(backup.file)
        else:
            os.rename(folder, temporary)
            remove_private_folder(temporary)

    def move_to(self, other: "Backups") -> None:
        """Move all versions but those of a time that `other` has; raises IoError."""
        with blame(self.folder):
            try:
                times = os.listdir(self.folder)
            except FileNotFoundError:
                return
            for when in times:
                if not os.path.lexists(f"{other.folder}/{when}"):
                    move_private(f"{self.folder}/{when}", f"{other.folder}/{when}")
            remove_empty_folder(self.folder)


# ── 7 Turns ───────────────────────────────────────────────────────────────────

# A turn at a user's files, the registry's or a codebase's: a lock, with their backups,
# and with what earlier turns left.
#
#   1 Enter (`Lock.__enter__`). If the lock file names a turn that was killed, clean up:
#     remove unfinished backups, settle the swap, remove the temporary files.
#   2 Look at the files that were set aside (`collect`).
#   3 Back up what is to be replaced (`back_up`), and replace it (section 5).
#   4 Leave: look at the files set aside again, and empty the lock file.


class Turn(Lock):
    """A lock on files of the user's that keeps their backups and what was set aside.

    A file's backup name tells whose backups it has, and by which path in them
    (`split_name`).
    """

    ASIDE_TIME = 60.0  # seconds without a change, if it is unknown what writes to a file
    MAX_ASIDE = 64 << 20  # bytes; a larger file that was set aside stays

    def __init__(self, home: str, path: str, backups: str, clock: Clock) -> None:
        super().__init__(path)
        self.home = home
        self.clock = clock
        self.aside = f"{backups}/.aside"
        self._backups = backups

    def split_name(self, backup_name: str) -> tuple[Key, str]:
        raise NotImplementedError

    @staticmethod
    def can_be_kept_as(name: str) -> bool:
        """Return whether a version can have the name found in a temporary file's."""
        return bool(name) and "/" not in name and not name.startswith((".", "\0"))

    @staticmethod
    def parse_aside(name: str) -> Optional[tuple[str, str]]:
        """Read from a name of `_set_aside` the expected hash and the backup name."""
        kept, token, digest = r"(?:\.orchestra-kept-)?", r"\d+-[0-9a-f]+-", r"([0-9a-f]{64})"
        found = re.fullmatch(f"(?s){kept}{token}{digest}" + r"(?:-(.+?))?(?:\.tmp)?", name)
        return (found[1], (found[2] or "").replace("%2F", "/").replace("%25", "%")) if found else None

    def _age(self, info: os.stat_result) -> float:
        """Return the seconds since a file or folder last changed."""
        return self.clock() - max(info.st_mtime, info.st_ctime)

    def back_up(self, backup_name: str, disk: Disk, why: str) -> str:
        """Keep a file's bytes before they are replaced; return the version's time.

        A text equal to the newest version's is not kept again, unless a user wrote it
        and that is Orchestra's. Raises IoError.
        """
        key, path = self.split_name(backup_name)
        origin = Reason.ORIGINS[why]
        backups, now = Backups(self.home, key), self.clock()
        everything = backups.versions()
        kept = [backup for backup in everything if backup.path == path]
        temporary = os.path.join(backups.folder, temporary_name(self.token))
        if not (kept and kept[-1].origin in (origin, HAND_EDIT) and kept[-1].has_text(disk.data)):
            number = 1 + max((backup.number for backup in everything), default=0)
            backup = Backup("", path, "", why, number, origin)
            with blame(backups.folder):
                make_private_folder(backups.folder, durable=True)
                with suppress(OSError, IoError):
                    self._remove_unfinished(backups.folder, self.leftover.token)
                kept.append(backups.write(temporary, backup, disk, now))
        with blame(backups.folder):
            for backup in versions_to_drop(kept, time_name(now)):
                backups.drop(backup, temporary)
        return kept[-1].when

    def _remove_unfinished(self, folder: str, token: str) -> None:
        """Remove temporary files and folders that `token` names, or that are abandoned.

        Raises OSError, IoError.
        """
        for name in filter(is_temporary_name, os.listdir(folder)):
            path = os.path.join(folder, name)
            try:
                info = os.lstat(path)
            except OSError:
                continue  # a version that got its name meanwhile
            if self._age(info) > 86400 or is_named_by(name, token) or has_exited(parse_temporary(name)[0]):
                remove = remove_private_folder if stat.S_ISDIR(info.st_mode) else remove_private
                remove(path)

    def clean_up(self, folders: Sequence[str], name_of: Callable[[str], str], leftover: Leftover) -> None:
        """Clean up after a turn that was killed, or had trouble; raises IoError."""
        for folder in folders_below(self._backups):  # an earlier clean-up may have been killed here
            with blame(folder), suppress(FileNotFoundError):
                self._remove_unfinished(folder, leftover.token)
        if leftover.swap:
            with blame(os.path.dirname(leftover.swap.path)):
                self._settle_swap(leftover.swap, folders, name_of)
        self.remove_temporaries(folders, name_of, leftover if leftover.is_read else None)

    def _settle_swap(self, swap: Swap, folders: Sequence[str], name_of: Callable[[str], str]) -> None:
        """Settle a swap where it was made or, if that moved, in one of `folders`."""
        there, temporary = os.path.split(swap.temporary)
        if not is_temporary_name(temporary) or os.path.dirname(swap.path) != there:
            return  # a damaged lock file
        for folder in dict.fromkeys([there, *folders]):
            if os.path.lexists(os.path.join(folder, temporary)):
                path = os.path.join(folder, os.path.basename(swap.path))
                with open_place(path, name_of(path)) as place:
                    Displaced(place, temporary, swap.hashes, self).settle()

    def remove_temporaries(
        self, folders: Iterable[str], name_of: Callable[[str], str], leftover: Optional[Leftover] = None
    ) -> bool:
        """Remove Orchestra's temporary files from folders; return whether all are gone.

        Those that `leftover` names go at once: once its swap is settled, none of them
        has been a file of the user's. Any other is backed up, unless its text is known;
        it stays while it may be written to, and while the turn that made it may run.
        Raises IoError.
        """
        are_gone = True
        for folder in folders:
            with blame(folder):
                are_gone &= self._remove_temporaries_in(folder, name_of, leftover)
        self.has_files_aside |= not are_gone
        return are_gone

    def _remove_temporaries_in(self, path: str, name_of: Callable[[str], str], leftover: Optional[Leftover]) -> bool:
        try:
            folder = os.open(path, FOLDER_FLAGS | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return True  # nothing was written there, or it is reported when it is
        are_gone = True
        try:
            for name in filter(is_temporary_name, os.listdir(folder)):
                try:
                    info = os.stat(name, dir_fd=folder, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                aside = self.parse_aside(name)
                process, owner = parse_temporary(name)
                if leftover and is_named_by(name, leftover.token):
                    if stat.S_ISREG(info.st_mode):
                        os.unlink(name, dir_fd=folder)
                elif aside:
                    digest, owner = aside
                    are_gone &= self._remove_aside(folder, name, name_of(f"{path}/{owner}"), digest)
                elif has_exited(process) or self._age(info) > self.ASIDE_TIME:
                    shown = read_disk(owner, folder=folder) if owner else ABSENT
                    digest = sha256_of(shown.data)
                    are_gone &= self._remove_aside(folder, name, name_of(f"{path}/{owner}"), digest)
                else:
                    are_gone = False
        finally:
            os.close(folder)
        return are_gone

    def collect(self) -> None:
        """Remove files set aside that nothing writes to any more; raises IoError."""
        with blame(self.aside):
            try:
                folder = os.open(self.aside, FOLDER_FLAGS)
            except FileNotFoundError:
                return
            try:
                for name in os.listdir(folder):
                    digest, backup_name = self.parse_aside(name) or ("", name)
                    self._remove_aside(folder, name, backup_name, digest)
            finally:
                os.close(folder)
            remove_empty_folder(self.aside)

    def _remove_aside(self, folder: int, name: str, backup_name: str, digest: str) -> bool:
        """Remove a file set aside if nothing writes to it; return whether it is gone.

        A text that does not have the hash `digest` is backed up first. Raises OSError,
        IoError.
        """
        try:
            fd = os.open(name, READ_FLAGS, dir_fd=folder)
        except OSError:
            return True  # or a link: not one of Orchestra's
        try:
            is_busy, info = has_writer(fd), os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                return True
            is_quiet = is_busy is False or (is_busy is None and self._age(info) > self.ASIDE_TIME)
            if not is_quiet or info.st_size > self.MAX_ASIDE:
                return False
            found = read_opened(fd)
            if sha256_of(found.data) != digest:
                self.back_up(backup_name, found, Reason.SAVED)
            if is_busy is False and not is_lease_whole(fd):
                return False
            os.unlink(name, dir_fd=folder)
            return True
        finally:
            os.close(fd)


# ══ II Registry ═══════════════════════════════════════════════════════════════

# ── 8 Agents ──────────────────────────────────────────────────────────────────

# One row per agent: a new agent is a new row here, and a word in the README. Agents
# that read AGENTS.md, and need no file of their own, have no row. What agents read
# together, or in place of another file, is in the tables behind. All is from the
# makers' documentation, as of November 2026.


class Budget(NamedTuple):
    """How long an agent's file may be: `rule` is a sentence that ends with `limit`."""

    limit: int
    unit: str  # lines, characters or bytes
    rule: str


class Agent(NamedTuple):
    """An agent's file.

    Either all of it is Orchestra's (`owned`), or a marked block in a file of the
    user's.
    """

    target: str
    path: str
    traces: tuple[str, ...] = ()  # other files that instruct it; "x/" is a folder of them
    folders: tuple[str, ...] = ()  # others that it is set up by
    owned: bool = False
    header: str = ""  # frontmatter of an owned file
    budget: Optional[Budget] = None
    twins: tuple[str, ...] = ()  # files of the user's that the agent reads as well as this one
    hides: str = ""  # a file that the agent reads only where this and its twins are missing
    is_nested: bool = False  # the agent reads such a file in each folder
    part_header: str = ""  # frontmatter of a second file that is for one folder alone
    part: str = ""  # the folder, in a file that is for one alone

    @property
    def has_parts(self) -> bool:
        """Whether parts of a codebase have files of their own for the agent."""
        return self.is_nested or self.part_header != ""


def _rules(target: str, path: str, *traces: str, **more: Any) -> Agent:
    """Describe an agent with a folder of rules, where one file is all Orchestra's."""
    return Agent(target, path, (f"{os.path.dirname(path)}/", *traces), owned=True, **more)


TRIGGERS = {  # of Windsurf, which Antigravity and Devin took over
    "header": "---\ntrigger: always_on\ndescription: {title}\n---\n\n",
    "part_header": "---\ntrigger: glob\nglobs: {glob}\ndescription: {title}\n---\n\n",
}
AGENTS = {
    agent.target: agent
    for agent in (
        Agent(
            "claude",
            "CLAUDE.md",
            (".claude/CLAUDE.md",),
            (".claude",),
            budget=Budget(200, "lines", "Anthropic recommends at most"),
            twins=(".claude/CLAUDE.md",),
            hides="AGENTS.md",
            is_nested=True,
        ),
        Agent(
            "codex",
            "AGENTS.md",
            folders=(".codex",),
            budget=Budget(32 << 10, "bytes", "Codex reads at most"),
            is_nested=True,
        ),
        Agent("gemini", "GEMINI.md", folders=(".gemini",), is_nested=True),
        Agent("copilot", ".github/copilot-instructions.md"),
        _rules(
            "cursor",
            ".cursor/rules/orchestra.mdc",
            ".cursorrules",
            folders=(".cursor",),
            header="---\ndescription: {title}\nglobs:\nalwaysApply: true\n---\n\n",
            part_header="---\ndescription: {title}\nglobs: {glob}\nalwaysApply: false\n---\n\n",
            budget=Budget(500, "lines", "Cursor recommends at most"),
        ),
        _rules(
            "windsurf",
            ".windsurf/rules/orchestra.md",
            ".windsurfrules",
            folders=(".windsurf",),
            budget=Budget(12000, "characters", "Windsurf reads at most"),
            **TRIGGERS,
        ),
        # In old repositories .clinerules is a file: then there is no room for ours.
        _rules("cline", ".clinerules/orchestra.md", part_header='---\npaths:\n  - "{glob}"\n---\n\n'),
        _rules(
            "antigravity",
            ".agents/rules/orchestra.md",
            ".agent/rules/",
            budget=Budget(12000, "characters", "Antigravity documents at most"),
            **TRIGGERS,
        ),
        # Loaded with the rank of CLAUDE.md, and hides no AGENTS.md.
        _rules(
            "claude-rules",
            ".claude/rules/orchestra.md",
            part_header='---\npaths:\n  - "{glob}"\n---\n\n',
            twins=("CLAUDE.md", ".claude/CLAUDE.md"),
        ),
        _rules(
            "copilot-rules",
            ".github/instructions/orchestra.instructions.md",
            header='---\napplyTo: "**"\n---\n\n',
            part_header='---\napplyTo: "{glob}"\n---\n\n',
            twins=(".github/copilot-instructions.md",),
        ),
        _rules("devin", ".devin/rules/orchestra.md", **TRIGGERS),
        _rules("kiro", ".kiro/steering/orchestra.md", folders=(".kiro",)),
        _rules(
            "augment", ".augment/rules/orchestra.md", ".augment-guidelines", header="---\ntype: always_apply\n---\n\n"
        ),
        _rules("continue", ".continue/rules/orchestra.md", header="---\nname: {title}\nalwaysApply: true\n---\n\n"),
        _rules("amazonq", ".amazonq/rules/orchestra.md", folders=(".amazonq",)),
        _rules("aiassistant", ".aiassistant/rules/orchestra.md"),
        _rules("tabnine", ".tabnine/guidelines/orchestra.md"),
        _rules("qwen", ".qwen/rules/orchestra.md", folders=(".qwen",)),
        _rules("roo", ".roo/rules/orchestra.md", ".roorules"),
        Agent("junie", ".junie/AGENTS.md", (".junie/guidelines.md",)),
    )
}


class Hiding(NamedTuple):
    """A file that, once it is there, is read by some agents in place of another."""

    path: str
    hidden: str
    readers: str
    mend: str = ""


HIDING = (  # files of Orchestra's that would hide the user's
    Hiding("AGENTS.md", "CLAUDE.md", "OpenCode, Kilo, Pi, Zed and Codebuff", "move that text into {prose}"),
    Hiding(".github/copilot-instructions.md", "AGENTS.md", "Zed", "use the target copilot-rules"),
    Hiding(".github/copilot-instructions.md", "CLAUDE.md", "Zed", "use the target copilot-rules"),
    Hiding(".junie/AGENTS.md", "AGENTS.md", "Junie", "drop the target junie"),
)
SHADOWING = (  # the user's that hide Orchestra's, in each folder
    Hiding("AGENTS.override.md", "AGENTS.md", "Codex"),
    Hiding("WARP.md", "AGENTS.md", "Warp"),
)
ALSO_SHADOWING = (  # files of other agents, in the top folder: no news for a status
    Hiding(".rules", "AGENTS.md", "Zed"),
    Hiding(".cursorrules", "AGENTS.md", "Zed"),
    Hiding(".junie/AGENTS.md", "AGENTS.md", "Junie"),
)
# Who joins which files: what targets of both write, this agent reads twice. That of the
# two defaults is no finding.
JOINED = {
    "Copilot in VS Code": ("CLAUDE.md", "AGENTS.md", ".github/copilot-instructions.md"),
    "Antigravity": ("AGENTS.md", "GEMINI.md", ".agents/rules/orchestra.md"),
    "Cursor": ("AGENTS.md", ".cursor/rules/orchestra.mdc"),
    "Devin": ("CLAUDE.md", "AGENTS.md", ".cursor/rules/orchestra.mdc"),
}
DEFAULT_TARGETS = ("claude", "codex")
MANAGED_SUFFIXES = (".md", ".mdc", ".markdown", ".txt")


@functools.lru_cache(maxsize=1 << 10)
def is_managed_path(path: str) -> bool:
    """Return whether Orchestra may write a file, by its path in a codebase's folder."""
    names = path.casefold().split("/")
    is_short = len(path) <= 4096 and path.isprintable() and max(map(len, path.encode().split(b"/"))) <= 255
    is_inside = is_short and not {"", ".", "..", ".git"} & {*names}
    is_program = re.match(r"cmakelists\.txt|.*(?:requirements|constraints)", names[-1])  # or lists what to install
    return is_inside and names[-1].endswith(MANAGED_SUFFIXES) and not is_program


def spelled_alike(path: str) -> str:
    """Return what all spellings of a path share, on a volume that ignores case."""
    if not path.isascii():
        from unicodedata import normalize

        path = normalize("NFC", path)
    return path.casefold()


# ── 9 YAML ────────────────────────────────────────────────────────────────────

# A registry file is read from its YAML nodes, not from the values that PyYAML makes of
# them: a node knows its line and has the text as typed, so `no`, `1.10` and `12:30` are
# text. Only null means nothing.
#
# A file is changed by edit_yaml, which leaves alone all that need not change.

YamlNode = Any  # a yaml.Node, whose attributes PyYAML's stubs leave out


def find_yaml() -> Optional[str]:
    """Find the file that `import yaml` would load; importing it takes 12 ms."""
    from importlib.util import find_spec

    spec = find_spec("yaml")
    return spec.origin if spec else None


def import_yaml() -> Any:
    """Import PyYAML; raises OrchestraError where there is none."""
    try:
        import yaml
        from yaml import SafeLoader  # noqa: F401  another package may be called so
    except ImportError:
        file, hint = find_yaml(), f"{typed(sys.executable)} -m pip install PyYAML"
        hint = f"move it away, then: {hint}" if file else hint
        problem = f"{file} is not PyYAML, or is incomplete"
        raise OrchestraError(problem if file else f"PyYAML is missing from {sys.executable}", hint) from None
    return yaml


@functools.cache
def text_loader() -> Any:
    """Make the loader that leaves scalars as typed, with libyaml if PyYAML has it."""
    import operator

    yaml = import_yaml()
    base = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    tags: dict[Any, str] = {
        yaml.ScalarNode: base.DEFAULT_SCALAR_TAG,
        yaml.SequenceNode: base.DEFAULT_SEQUENCE_TAG,
        yaml.MappingNode: base.DEFAULT_MAPPING_TAG,
    }

    def resolve(loader: Any, kind: Any, value: Any, implicit: Any) -> str:
        return tags[kind]

    # Called at every node, for path resolvers: there are none, and builtins are
    # fastest.
    descend, ascend = operator.is_, tuple
    return type("TextLoader", (base,), {"resolve": resolve, "descend_resolver": descend, "ascend_resolver": ascend})


def is_null(node: YamlNode) -> bool:
    return node.value in ("", "~", "null", "Null", "NULL") and not node.style  # YAML 1.2, 10.3.2


# Reading

UNFINISHED_MERGE = "found git's conflict markers: finish the merge first"


def conflict_line(text: str) -> int:
    """Find the line where a conflict of git's begins in YAML, 0 for none.

    A marker alone is none: it may be in a text.
    """
    start = re.search("(?m)^<{7} ", text) if "<<<<<<< " in text else None
    if start is None or not re.compile("(?m)^>{7} ").search(text, start.end()):
        return 0
    return text.count("\n", 0, start.start()) + 1


class Document:
    """A YAML file being read, and its problems, in which it is called `place`.

    `at` is the path of a node in it, as the problems have it.
    """

    MAX_DEPTH = 100  # libyaml overflows the C stack at about ten thousand levels
    MAX_TEXT = 8 << 20  # characters, including those that aliases repeat
    MAX_ITEMS = {"sequence": 20_000, "mapping": 200_000}  # of all of a kind together, likewise
    MAX_TOLD = 20  # problems, and notes
    INDENTED = "this line is indented differently from the one above,"
    ADVICE = {  # by what YAML's two readers say
        "tab character": "tabs cannot indent YAML",
        "cannot start any token": "put quotes around text that starts with {}",
        "undefined alias": "put quotes around text that starts with *",
        "unknown directive name": "put quotes around text that starts with %",
        "unexpected end of stream": "the quote that opens here is not closed",
        "mapping values are not allowed": f'{INDENTED} or text that contains ": " needs quotes',
        "expected (?:key|'-'|<block end>)": INDENTED
        + " or text that begins with a quote or bracket needs quotes around all of it",
        "expected ':'": 'expected "key: value" or "- item"',
        "entries are not allowed": 'a list begins on the next line; text that starts with "- " needs quotes',
        "keys are not allowed": "put quotes around text that starts with ?",
        "alphabetic or numeric": "put quotes around text that starts with * or &",
        "comment or (?:a )?line break": "put quotes around text that starts with > or |",
        "another document": "expected one document, got another after ---",
    }

    def __init__(self, place: str, hint: str = "") -> None:
        self.place = place
        self.problems: list[Problem] = []
        self.notes: list[Problem] = []  # on what is ignored, or written in another way
        self._comments: dict[int, str] = {}  # those without a blank after the #, by where they begin
        self._hint = hint
        self._text_size = 0
        self._counts = Counter[str]()  # of items, by the kind of node
        self.has_enough = False  # of problems: others may only follow from them

    def problem(self, message: str, line: int = 1) -> Problem:
        return Problem(visible(f"{self.place}:{line}"), visible(message), self._hint)

    def complain(self, message: str, node: YamlNode = None, line: int = 1) -> None:
        """Add a problem, at the line of a node if there is one."""
        line = node.start_mark.line + 1 if node is not None else line
        if not self.has_enough:
            self.problems.append(self.problem(message, line))
            self.has_enough = len(self.problems) >= self.MAX_TOLD

    def note(self, message: str, line: int) -> None:
        if len(self.notes) < self.MAX_TOLD:
            self.notes.append(self.problem(message, line))

    def note_unknown(self, node: YamlNode, at: str, known: Iterable[str]) -> None:
        """Add a note on an unknown key."""
        near = nearest(node.value, known) if len(self.notes) < self.MAX_TOLD else ""
        at = at if len(at) <= 200 else excerpt(at)
        line = node.start_mark.line + 1 if node.start_mark else 1  # one that was made has no mark
        self.note(f"{at}: unknown key, ignored{near and f': did you mean {near}?'}", line)

    def reject(self, node: YamlNode, at: str, expected: str, guess: str = "") -> None:
        found = {"mapping": "a mapping", "sequence": "a list"}.get(node.id)
        found = found or ("nothing" if is_null(node) else excerpt(node.value))
        self.complain(f"{at}: expected {expected}, got {found}{guess}", node)

    def compose(self, text: str) -> Optional[YamlNode]:
        """Parse YAML text to its root node; None where a problem says why."""
        yaml = import_yaml()
        conflict = conflict_line(text)
        if conflict:
            self.complain(f"yaml: {UNFINISHED_MERGE}", line=conflict)
            return None
        line = 1
        self._comments = {found.start(): found[1] for found in re.finditer(r"(?<=\S)[ \t]+(#[^\s#]\S*)", text)}
        try:
            self._check_depth(text)
            root: Optional[YamlNode] = yaml.compose(text, Loader=text_loader())
            if root is None:
                self.complain("file: expected a mapping, got nothing")
            elif "*" in text and self._has_cycle(root):
                raise ValueError("an alias contains itself")
            return root
        except yaml.reader.ReaderError as error:
            # libyaml counts bytes, PyYAML's own reader characters.
            before = text.encode()[: error.position].decode("utf-8", "ignore") if yaml.__with_libyaml__ else text
            line += before.count("\n", 0, error.position)
            problem = f"expected printable text, got the character #x{error.character:04x}"
        except yaml.MarkedYAMLError as error:
            problem, mark = error.problem or error.context, error.problem_mark or error.context_mark
            if error.context_mark and re.search("end of stream|expected ':'", problem):
                mark = error.context_mark  # where the quote opens, or the line that is no pair
            line += mark.line if mark else 0
            problem = self._explain(problem, text[mark.index :][:1] if mark else "")
            leftover = re.search(r"(?m)^(?:(?:<{7}|\|{7}|>{7}) |={7}\r?$)", text)
            if leftover:
                line, problem = text.count("\n", 0, leftover.start()) + 1, UNFINISHED_MERGE
        except (ValueError, OverflowError) as error:  # also PyYAML's own parser, on escapes beyond Unicode
            problem = str(error)
        self.complain(f"yaml: {problem}", line=line)
        return None

    def _explain(self, problem: str, character: str) -> str:
        problem = "tab character" if character == "\t" else problem
        return next((text.format(character) for sign, text in self.ADVICE.items() if re.search(sign, problem)), problem)

    def _check_depth(self, text: str) -> None:
        # A level of nesting needs a bracket or half a column (a list may be indented
        # like its key), so most files need no second parse.
        deepest = max((len(line) - len(line.lstrip(" \t-?:")) for line in text.splitlines()), default=0)
        if 2 * (deepest + 1) + text.count("[") + text.count("{") <= self.MAX_DEPTH:
            return
        yaml = import_yaml()
        depth = 0
        try:
            for event in yaml.parse(text, Loader=text_loader()):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if depth > self.MAX_DEPTH:
                    break
            else:
                return
        except yaml.MarkedYAMLError as error:
            # libyaml's own limit (1,000, since 0.2.6), met while it parses ahead.
            if error.problem != "exceeded maximum nesting depth":
                raise
        raise ValueError(f"expected at most {self.MAX_DEPTH} levels of nesting, got more")

    def _has_cycle(self, root: YamlNode) -> bool:
        is_done: dict[int, bool] = {}  # by id; False while the nodes below are visited

        def visit(node: YamlNode) -> bool:
            if isinstance(node.value, str):
                return False
            if id(node) in is_done:
                return not is_done[id(node)]
            is_done[id(node)] = False
            below = itertools.chain.from_iterable(node.value) if node.id == "mapping" else node.value
            is_cyclic = any(map(visit, below))
            is_done[id(node)] = True
            return is_cyclic

        return visit(root)

    def read_text(self, node: YamlNode, at: str) -> Optional[str]:
        """Read a scalar as typed; None where a problem says why."""
        text = node.value
        if node.id == "mapping" and not node.flow_style and at.endswith("]"):  # - see: here
            self.complain(f'{at}: needs quotes, because it contains ": "', node)
            return None
        if not isinstance(text, str) or is_null(node):
            self.reject(node, at, "text")
            return None
        if self._comments and not node.style and node.end_mark and node.end_mark.index in self._comments:
            word = excerpt(self._comments[node.end_mark.index])
            advice = "put quotes around the text, or a blank after the #"
            self.note(f"{at}: {word} begins a comment, so it is left out: {advice}", node.start_mark.line + 1)
        if node.tag.startswith("!"):
            tag = f"{excerpt(node.tag)} is a tag in YAML, so it is left out: put quotes around the text"
            self.note(f"{at}: {tag}", node.start_mark.line + 1)
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            self.complain(f"{at}: expected text in Unicode, got half a surrogate pair", node)
            return None
        self._text_size += len(text)
        if self._text_size <= self.MAX_TEXT:
            return sys.intern(text)  # codebases share much of it; the daemon keeps all
        if self._text_size - len(text) <= self.MAX_TEXT:
            self.complain(f"{at}: expected at most {self.MAX_TEXT} characters in the file, aliases expanded", node)
        return None

    def read_items(self, node: YamlNode, at: str) -> list[YamlNode]:
        """Read the nodes of a list."""
        if node.id != "sequence":
            self.reject(node, at, "a list")
            return []
        return [] if self._exceeds_items(node, at) else list(node.value)

    def read_mapping(self, node: YamlNode, at: str) -> dict[str, YamlNode]:
        """Read the keys of a mapping as text, each once; the values stay nodes."""
        if node.id != "mapping":
            self.reject(node, at or "file", "a mapping")
            return {}
        prefix = f"{at}." if at else ""
        items: dict[str, YamlNode] = {}
        if self._exceeds_items(node, at or "file"):
            return items
        for name, value in node.value:
            text = name.value
            if not text or not isinstance(text, str):
                self.reject(name, at or "key", "text as a key")
            elif text == "<<" and not name.style:
                self.complain(f"{prefix}<<: merge keys are not supported, as in YAML 1.2", name)
            elif text in items:
                self.complain(f"{prefix}{text}: duplicate key", name)
            else:
                items[text] = value
        return items

    def _exceeds_items(self, node: YamlNode, at: str) -> bool:
        """Count the items of a node; return whether the file has too many by now."""
        limit, before = self.MAX_ITEMS[node.id], self._counts[node.id]
        self._counts[node.id] += len(node.value)
        if self._counts[node.id] <= limit:
            return False
        if before <= limit:
            noun = "list items" if node.id == "sequence" else "keys"
            self.complain(f"{at}: expected at most {limit} {noun} in the file, aliases expanded", node)
            self.has_enough = True
        return True


# Writing nodes


def _text_node(text: str) -> YamlNode:
    # What other YAML readers would take for a number or boolean is quoted; times stay
    # bare.
    yaml = import_yaml()
    resolver = yaml.resolver.Resolver()
    tag = resolver.resolve(yaml.ScalarNode, text, (True, False))
    tag = tag if tag.endswith(":timestamp") else resolver.DEFAULT_SCALAR_TAG
    node = yaml.ScalarNode(tag, text, style="|" if "\n" in text else None)
    has_line_ends = re.search("[\x85\u2028\u2029]", text)  # that readers may take for spaces
    if is_null(node) or text == "<<" or has_line_ends:
        node.style = '"'
    return node


def _mapping_node(items: Mapping[str, YamlNode]) -> YamlNode:
    yaml = import_yaml()
    pairs = [(_text_node(name), value) for name, value in items.items()]
    return yaml.MappingNode(yaml.SafeLoader.DEFAULT_MAPPING_TAG, pairs, flow_style=False)


def _retag(node: YamlNode, done: dict[int, YamlNode]) -> YamlNode:
    # A bare `5` of an unknown key stays bare only with the tag that YAML 1.1 gives it.
    if id(node) not in done:
        yaml = import_yaml()
        if node.id == "scalar":
            bare = (not node.style, bool(node.style))
            tag = yaml.resolver.Resolver().resolve(yaml.ScalarNode, node.value, bare)
            text = "null" if is_null(node) else node.value  # "" is not always valid
            done[id(node)] = yaml.ScalarNode(tag, text, style=node.style)
        elif node.id == "sequence":
            items = [_retag(item, done) for item in node.value]
            done[id(node)] = yaml.SequenceNode(node.tag, items, flow_style=node.flow_style)
        else:
            pairs = [(_retag(key, done), _retag(value, done)) for key, value in node.value]
            done[id(node)] = yaml.MappingNode(node.tag, pairs, flow_style=node.flow_style)
    return done[id(node)]


def dump_yaml(node: YamlNode) -> str:
    yaml = import_yaml()
    return str(yaml.serialize(node, Dumper=yaml.SafeDumper, allow_unicode=True, width=1000))


# Editing in place


def digest_node(node: YamlNode, done: Optional[dict[int, str]] = None) -> str:
    """Hash what a node means, whatever its style and the order of its keys."""
    done = {} if done is None else done
    if id(node) not in done:
        if node.id == "scalar":
            parts = ["null"] if is_null(node) else ["text", node.value]
        elif node.id == "sequence":
            parts = ["list", *(digest_node(item, done) for item in node.value)]
        else:
            pairs = ((digest_node(key, done), digest_node(value, done)) for key, value in node.value)
            parts = ["mapping", *(digest for pair in sorted(pairs) for digest in pair)]
        done[id(node)] = sha256_of(json.dumps(parts).encode())
    return done[id(node)]


class NotSpliced(Exception):
    """Two nodes differ in more than scalars."""


def _scalar_edits(old: YamlNode, new: Optional[YamlNode], digests: dict[int, str]) -> Iterator[tuple[int, int, str]]:
    """Iterate over the scalars that differ: start, end, new text.

    `digests` are those known, by id: aliases may repeat a long list in every key.
    Raises NotSpliced if more than scalars differ.
    """
    if new is None or old.id != new.id:
        raise NotSpliced
    if digest_node(old, digests) == digest_node(new, digests):
        return
    if old.id == "scalar":
        entry = dump_yaml(_mapping_node({"k": new}))[3:-1]
        if "\n" in entry or old.style in ("|", ">"):
            raise NotSpliced
        yield old.start_mark.index, old.end_mark.index, entry
    elif old.id == "mapping":
        wanted = {key.value: value for key, value in new.value}
        if wanted.keys() - {key.value for key, _ in old.value}:
            raise NotSpliced
        for key, value in old.value:
            if key.value in wanted:
                yield from _scalar_edits(value, wanted[key.value], digests)
    elif len(old.value) == len(new.value):
        for one, other in zip(old.value, new.value):
            yield from _scalar_edits(one, other, digests)
    else:
        raise NotSpliced


def _end_of_value(text: str, value: YamlNode) -> int:
    # A block collection ends behind the comments below it, which belong to the next
    # key.
    end = int(value.end_mark.index)
    while True:
        line = text.rfind("\n", 0, end - 1) + 1
        if line <= value.start_mark.index or (text[line:end].strip() and text[line] != "#"):
            return end
        end = line


def edit_yaml(text: str, old: YamlNode, new: YamlNode, normalize: Callable[[YamlNode], YamlNode]) -> Optional[str]:
    """Change a YAML text only where it differs from `new`; None if that cannot be.

    1 If the values of a top-level key differ in scalars only, these are replaced; if in
      more, the key's whole entry is.
    2 A key that is not in `new` is removed, unless it says nothing: `normalize` drops
      it.
    3 Keys that are only in `new` are added at the end.
    4 The result is parsed and compared: anchors, flow style, document markers or a key
      that is dropped deep inside can defeat these edits.
    """
    wanted = {key.value: value for key, value in new.value}
    said = {key.value for key, _ in normalize(old).value}
    newline = "\r\n" if "\r\n" in text else "\n"
    digests: dict[int, str] = {}
    edits = []
    for key, value in old.value:
        node = wanted.pop(key.value, None)
        if node is None and key.value not in said:
            continue
        try:
            edits += [*_scalar_edits(value, node, digests)]
        except NotSpliced:
            start, end = key.start_mark.index, _end_of_value(text, value)
            entry = "" if node is None else dump_yaml(_mapping_node({key.value: node}))
            edits.append((start, end, entry if text[end - 1 : end] == "\n" else entry.rstrip("\n")))
    for start, end, entry in sorted(edits, reverse=True):
        text = text[:start] + entry.replace("\n", newline) + text[end:]
    if wanted:
        text += "" if text.endswith("\n") else newline
        text += dump_yaml(_mapping_node(wanted)).replace("\n", newline)
    again = Document("").compose(text)
    is_done = again is not None and digest_node(normalize(again)) == digest_node(normalize(new))
    return text if is_done else None


# ── 10 Kinds ──────────────────────────────────────────────────────────────────

# A Kind describes what a key of a registry file may hold, in three forms:
#   read     from a YAML node; the Document collects the problems
#   restore  from JSON, in which parsed files are cached
#   write    as a YAML node
# and `join` makes one of what two layers say, `describe` a JSON Schema for editors.
# A Schema is the Kind of a mapping: the fields of a record are its keys.

Pairs = tuple[tuple[str, str], ...]


class Kind:
    """What a key may hold; `at` is its path in a file, as projects[0].tasks[2].id."""

    restore: Callable[[Any], Any]

    def read(self, doc: Document, node: YamlNode, at: str) -> Any: ...

    def write(self, value: Any) -> YamlNode: ...

    def describe(self) -> Any: ...

    def join(self, weaker: Any, stronger: Any) -> Any:
        """Return what two layers say together; here, the stronger if it has a value."""
        return stronger or weaker


class Text(Kind):
    """Text as typed."""

    restore = staticmethod(sys.intern)

    def read(self, doc: Document, node: YamlNode, at: str) -> str:
        return doc.read_text(node, at) or ""

    def write(self, value: str) -> YamlNode:
        return _text_node(value)

    def describe(self) -> dict[str, Any]:
        return {"type": ["string", "number", "boolean"]}  # as other readers see 1.10 and no


class FormedText(Text):
    """Text of one form: editors know it as `PATTERN`, `is_fit` decides."""

    PATTERN: str
    EXPECTED: str

    def is_fit(self, text: str) -> bool:
        return re.fullmatch(self.PATTERN, text) is not None

    def read(self, doc: Document, node: YamlNode, at: str) -> str:
        text = doc.read_text(node, at)
        if text is not None and not self.is_fit(text):
            doc.reject(node, at, self.EXPECTED)
        return text or ""

    def describe(self) -> dict[str, Any]:
        return {"type": ["string"], "pattern": self.PATTERN}


class AbsolutePath(FormedText):
    """An absolute path, or one below the home folder: ~/..."""

    PATTERN = r"^(/|~/)[^\x00]*$"
    EXPECTED = "an absolute path or ~/..."


class MarkdownPath(FormedText):
    """A Markdown file, by its path below a folder of the registry."""

    PATTERN = r"^((?![.#])(?![^/]*~/)[^/\x00]+/)*(?![.#])[^/\x00]*\.md$"
    EXPECTED = "a relative path without hidden names or .. that ends in .md"


class ManagedPath(FormedText):
    """A file for agents, by its path below a codebase's folder."""

    INSIDE = r"(?!\.\.?/|\.[Gg][Ii][Tt]/)[^/\x00-\x1f]+/"
    PATTERN = rf"^({INSIDE})*[^/\x00-\x1f]*\.(md|mdc|markdown|txt)$"
    EXPECTED = f"a relative path without .. to a text for agents ({' '.join(MANAGED_SUFFIXES)}), not to what they run"
    # In a folder like .claude: the frontmatter of these may name programs that start by
    # themselves (hooks, MCP servers), and tools that need no permission.
    RUN = "agent agents chatmodes command commands droids hooks modes plugins prompts skill skills workflows"

    def is_fit(self, text: str) -> bool:
        folders = text.casefold().split("/")[:-1]
        hidden = itertools.dropwhile(lambda name: not name.startswith("."), folders)
        return is_managed_path(text) and not {*hidden} & {*self.RUN.split()}

    def read(self, doc: Document, node: YamlNode, at: str) -> str:
        path = super().read(doc, node, at)
        for agent in AGENTS.values():
            if spelled_alike(agent.path) == spelled_alike(path):
                doc.reject(node, at, f"a file that no target has (use {agent.target})")
        return path


class PartPath(FormedText):
    """A folder, by its path below a codebase's, without what has a meaning in globs."""

    PATTERN = r"^(?!(.*/)?(\.|\.\.|\.[Gg][Ii][Tt])(/|$))(?=\w)[\w@.+ -]+(/[\w@.+ -]+)*$"
    EXPECTED = "a folder's relative path, of letters, digits and - _ . + @, without .."

    def is_fit(self, text: str) -> bool:
        return super().is_fit(text) and text.isprintable() and text == text.strip()


class Frontmatter(FormedText):
    """Lines between --- and ---, at the top of a file."""

    PATTERN = r"^\s*---\n[^\x00]*---\s*$"
    EXPECTED = "frontmatter: --- on its first and its last line alone, and no HTML comment"

    def is_fit(self, text: str) -> bool:
        lines = text.strip("\n").split("\n")
        is_whole = len(lines) > 1 and lines[0] == lines[-1] == "---" and not re.search("<!--|-->", text)
        return is_whole and "---" not in map(str.strip, lines[1:-1]) and all(map(str.isprintable, lines))


class Limit(FormedText):
    """How long a file may be: 12000 characters."""

    PATTERN = r"^([1-9][0-9]{0,8}) (characters|bytes|lines)$"
    EXPECTED = "a number of characters, bytes or lines: 12000 characters"


class TargetName(Text):
    """An agent's target or a custom one, which any other layer may have."""

    def describe(self) -> dict[str, Any]:
        return {"anyOf": [{"enum": [*AGENTS]}, {"type": "string"}]}


class OneOf(Text):
    """One of some words; `aliases` are read as another."""

    def __init__(self, options: Collection[str], aliases: Mapping[str, str] = {}) -> None:
        self.options = options
        self.aliases = aliases

    def describe(self) -> dict[str, Any]:
        return {"enum": [*self.options, *self.aliases]}

    def read(self, doc: Document, node: YamlNode, at: str) -> str:
        text = doc.read_text(node, at)
        text = self.aliases.get(text, text) if text else text
        if text is not None and text not in self.options:
            like = "" if doc.has_enough else did_you_mean(text, itertools.islice(self.options, 200))
            is_long = len(self.options) > (8 if like else 100)
            names = f"one of {len(self.options)} names" if is_long else " | ".join(self.options)
            doc.reject(node, at, names, like)
        return text or ""


class ListOf(Kind):
    """A list whose items are all of one Kind."""

    def __init__(self, item: Kind) -> None:
        self.item = item

    def read(self, doc: Document, node: YamlNode, at: str) -> tuple[Any, ...]:
        nodes = doc.read_items(node, at)
        return tuple([self.item.read(doc, item, f"{at}[{i}]") for i, item in enumerate(nodes)])

    def restore(self, value: Any) -> Optional[tuple[Any, ...]]:
        return None if value is None else tuple(map(self.item.restore, value))

    def write(self, value: Iterable[Any]) -> YamlNode:
        yaml = import_yaml()
        nodes = [self.item.write(item) for item in value]
        is_inline = isinstance(self.item, Text)
        return yaml.SequenceNode(yaml.SafeLoader.DEFAULT_SEQUENCE_TAG, nodes, flow_style=is_inline)

    def describe(self) -> dict[str, Any]:
        return {"type": ["array"], "items": self.item.describe()}

    def join(self, weaker: Any, stronger: Any) -> Any:
        """Join two lists; of records with the same first field one stays."""
        if not weaker or not stronger:
            return stronger or weaker
        is_named = isinstance(self.item, Schema)
        return tuple({item[0] if is_named else item: item for item in (*weaker, *stronger)}.values())


class MapOf(ListOf):
    """A mapping of names to records, each of which has its name as its first field."""

    NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,49}$"

    def __init__(self, item: "Schema", taken: Collection[str]) -> None:
        super().__init__(item)
        self._record = item
        self._taken = taken

    def read(self, doc: Document, node: YamlNode, at: str) -> tuple[Any, ...]:
        found = []
        for name, value in doc.read_mapping(node, at).items():
            if name in self._taken or not re.fullmatch(self.NAME, name):
                doc.complain(f"{at}: expected a new name of letters, digits, - _ and ., got {excerpt(name)}", value)
            found.append(self._record.read(doc, value, f"{at}.{name}", **{self._record.make._fields[0]: name}))
        return tuple(found)

    def restore(self, value: Any) -> tuple[Any, ...]:
        return tuple([self._record.restore(values[1:], sys.intern(values[0])) for values in value])

    def write(self, value: Iterable[Any]) -> YamlNode:
        return _mapping_node({item[0]: self._record.write(item) for item in value})

    def describe(self) -> dict[str, Any]:
        names = {"pattern": self.NAME, "not": {"enum": [*self._taken]}}
        return {"type": ["object"], "propertyNames": names, "additionalProperties": self._record.describe()}


class PartList(ListOf):
    """The parts of a codebase; of those with folders, no two are called alike."""

    def read(self, doc: Document, node: YamlNode, at: str) -> tuple[Any, ...]:
        parts = super().read(doc, node, at)
        seen: dict[str, str] = {}
        for i, part in enumerate(parts):
            for name in ({"path": part.path, "name": part.stem} if part.path else {}).items():
                mark = f"{name[0]} {spelled_alike(name[1])}"
                if mark in seen:
                    doc.complain(f"{at}[{i}].{name[0]}: {seen[mark]} has the same", node.value[i])
                seen[mark] = f"{at}[{i}]"
        return parts


class Choice(ListOf):
    """A list that replaces that of a weaker layer, even with none: []."""

    def join(self, weaker: Any, stronger: Any) -> Any:
        return weaker if stronger is None else stronger


class TextMap(Kind):
    """A mapping of text to text, as pairs."""

    def read(self, doc: Document, node: YamlNode, at: str) -> Pairs:
        items = doc.read_mapping(node, at)
        return tuple([(name, doc.read_text(value, f"{at}.{name}") or "") for name, value in items.items()])

    def restore(self, value: Any) -> Pairs:
        return tuple([(sys.intern(name), sys.intern(text)) for name, text in value])

    def write(self, value: Pairs) -> YamlNode:
        return _mapping_node({name: _text_node(text) for name, text in value})

    def describe(self) -> dict[str, Any]:
        return {"type": ["object"], "additionalProperties": Text().describe()}

    def join(self, weaker: Pairs, stronger: Pairs) -> Pairs:
        return tuple({**dict(weaker), **dict(stronger)}.items()) if weaker and stronger else stronger or weaker


class Schema(Kind):
    """A mapping whose keys are a record's fields, of text unless `kinds` says more.

    A field without a default is required. Unknown keys are noted, kept in `extra` and
    written back.
    """

    NO_KEYS = ("project", "target", "extra", "digest", "layers")  # fields that are not keys

    def __init__(self, make: Any, **kinds: Kind) -> None:
        self.make = make
        self.defaults: dict[str, Any] = make._field_defaults
        self.kinds = {**{name: Text() for name in make._fields if name not in self.NO_KEYS}, **kinds}
        self.is_all_text = all(isinstance(kind, Text) for kind in self.kinds.values())

    def without_required_keys(self) -> "Schema":
        other = Schema(self.make, **self.kinds)
        other.defaults = {**dict.fromkeys(self.kinds, ""), **self.defaults}
        return other

    def read(self, doc: Document, node: YamlNode, at: str = "", **values: Any) -> Any:
        """Read a record; `values` are those of the fields that are not keys."""
        items = doc.read_mapping(node, at)
        prefix = f"{at}." if at else ""
        for name, kind in self.kinds.items():
            value = items.pop(name, None)
            is_required = name not in self.defaults
            if value is not None and not is_null(value) and not (is_required and value.value == ""):
                values[name] = kind.read(doc, value, prefix + name)
            elif name not in self.make._field_defaults:
                values[name] = ""
                if is_required and node.id == "mapping":
                    problem = "expected a value, got nothing" if value else "required, but missing"
                    doc.complain(f"{prefix}{name}: {problem}", value or node)
        for name, _ in node.value if items else ():
            if name.id == "scalar" and name.value in items:
                doc.note_unknown(name, prefix + name.value, self.kinds)
        return self.make(**values, extra=tuple(items.items()))

    def restore(self, value: Any, *first: str) -> Any:
        """Restore a record from its keys' values, behind its `first` fields."""
        if self.is_all_text:  # as tasks are: faster
            return self.make(*first, *map(sys.intern, value[: len(self.kinds)]))
        return self.make(*first, *[kind.restore(v) for kind, v in zip(self.kinds.values(), value)])

    def write(self, value: Any) -> YamlNode:
        nodes = {}
        retagged: dict[int, YamlNode] = {}
        for name, kind in self.kinds.items():
            field = getattr(value, name)
            if field != self.defaults.get(name, ""):
                nodes[name] = kind.write(field)
        return _mapping_node({**nodes, **{name: _retag(node, retagged) for name, node in value.extra}})

    def describe(self) -> dict[str, Any]:
        """Describe the mapping as it is read without problems and notes."""
        properties = {}
        for name, kind in self.kinds.items():
            value = kind.describe()
            if name not in self.defaults:
                value["minLength"] = 1
            else:  # null means nothing
                kinds = "enum" if "enum" in value else "type"
                value[kinds] = [*value[kinds], None if kinds == "enum" else "null"]
            properties[name] = value
        required = [name for name in self.kinds if name not in self.defaults]
        return {"type": ["object"], "properties": properties, "required": required, "additionalProperties": False}

    def join(self, weaker: Any, stronger: Any) -> Any:
        """Join two records; what is not a key is the stronger one's."""
        joined = {}
        for name, kind in self.kinds.items():
            value = getattr(weaker, name)
            if value or value != self.defaults.get(name, ""):
                joined[name] = kind.join(value, getattr(stronger, name))
        return stronger._replace(**joined) if joined else stronger


# ── 11 Codebases ──────────────────────────────────────────────────────────────

# A codebase is known by its key, (project, name), and owns one folder. Its record says
# what its registry files say, and never changes: a file that changed is read again.

# Records

Extra = tuple[tuple[str, YamlNode], ...]  # unknown keys, kept for the next save


class Task(NamedTuple):
    id: str
    title: str
    status: str = "pending"
    description: str = ""
    created_at: str = ""
    updated_at: str = ""
    extra: Extra = ()


class AgentRole(NamedTuple):
    agent_id: str
    entry_point: str = ""
    skills: tuple[str, ...] = ()
    extra: Extra = ()


class Skill(NamedTuple):
    id: str
    description: str = ""
    extra: Extra = ()


class CustomTarget(NamedTuple):
    """The file of an agent that has no row in the table of agents."""

    target: str
    path: str
    owns: str = "file"  # or a block
    header: str = ""
    limit: str = ""
    extra: Extra = ()

    @property
    def agent(self) -> Agent:
        limit, _, unit = self.limit.partition(" ")
        budget = Budget(int(limit), unit, f"{self.target} may have at most") if limit else None
        header = self.header and self.header.strip("\n") + "\n\n"
        return Agent(self.target, self.path, owned=self.owns == "file", header=header, budget=budget)


class Component(NamedTuple):
    """One entry of a codebase's `projects` list."""

    name: str
    project_type: str
    tasks: tuple[Task, ...] = ()
    agents: tuple[AgentRole, ...] = ()
    path: str = ""  # of its folder below the codebase's, if it has files of its own there
    description: str = ""
    commands: Pairs = ()
    conventions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    extra: Extra = ()

    @property
    def stem(self) -> str:
        """Its name, as it can stand in a file's."""
        return re.sub(r"[^\w.-]+", "-", self.name).strip("-.")[:60] or "part"

    @property
    def open_tasks(self) -> list[Task]:
        return [task for task in self.tasks if task.status != "done"]

    @property
    def has_files(self) -> bool:
        """Whether there is something to be said in files of its own."""
        return bool(self.path) and bool(
            self.description.strip() or self.commands or self.conventions or self.notes or self.open_tasks
        )


class Codebase(NamedTuple):
    """What one layer says, or all `layers` of a codebase together.

    `targets` is None if they are a weaker layer's choice. Where `path` is "", the
    codebase has no folder on this machine.
    """

    project: str
    name: str
    path: str = ""
    description: str = ""
    targets: Optional[tuple[str, ...]] = None
    commands: Pairs = ()
    conventions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    skills: tuple[Skill, ...] = ()
    projects: tuple[Component, ...] = ()
    created_at: str = ""
    updated_at: str = ""
    include: tuple[str, ...] = ()
    custom_targets: tuple[CustomTarget, ...] = ()
    extra: Extra = ()
    digest: str = ""  # of the files it was read from
    layers: "tuple[Layer, ...]" = ()  # the weakest first

    @property
    def key(self) -> Key:
        return (self.project, self.name)

    @property
    def prose(self) -> "list[Prose]":
        """The Markdown of all layers, each file once."""
        return [*{prose.file: prose for layer in self.layers for prose in layer.prose}.values()]

    def has_prose(self, files: Collection[str]) -> bool:
        """Return whether it has, or misses, one of some Markdown files."""
        found = (path for layer in self.layers for path in (*layer.missing, *(prose.file for prose in layer.prose)))
        return any(path in files for path in found)

    @property
    def remarks(self) -> list[Problem]:
        """What a user should know of the files, although nothing is wrong."""
        return [note for layer in self.layers for note in layer.notes]


# Schema

# A new key is a new field of its record and, unless it holds plain text, its Kind here.

PROJECT_TYPES = ("backend", "frontend", "mobile", "ml")
TASK_STATUSES = ("pending", "inprogress", "blocked", "done")
TASK_STATUS_ALIASES = {"in_progress": "inprogress", "in-progress": "inprogress"}
TEXTS = ListOf(Text())
CODEBASE_SCHEMA = Schema(
    Codebase,
    path=AbsolutePath(),
    targets=Choice(TargetName()),
    commands=TextMap(),
    conventions=TEXTS,
    notes=TEXTS,
    skills=ListOf(Schema(Skill)),
    include=ListOf(MarkdownPath()),
    custom_targets=MapOf(
        Schema(CustomTarget, path=ManagedPath(), owns=OneOf(("file", "block")), header=Frontmatter(), limit=Limit()),
        taken=AGENTS,
    ),
    projects=PartList(
        Schema(
            Component,
            project_type=OneOf(PROJECT_TYPES),
            path=PartPath(),
            commands=TextMap(),
            conventions=TEXTS,
            notes=TEXTS,
            tasks=ListOf(Schema(Task, status=OneOf(TASK_STATUSES, TASK_STATUS_ALIASES))),
            agents=ListOf(Schema(AgentRole, skills=TEXTS)),
        )
    ),
)
LAYER_SCHEMA = CODEBASE_SCHEMA.without_required_keys()


# Files


def targets_of(codebase: Codebase) -> tuple[str, ...]:
    return DEFAULT_TARGETS if codebase.targets is None else codebase.targets


def managed_files(codebase: Codebase) -> dict[str, Agent]:
    """Return the files that a codebase wants, by their paths in its folder."""
    custom = {target.target: target.agent for target in codebase.custom_targets}
    agents = {**AGENTS, **custom} if custom else AGENTS
    wanted = [agents[target] for target in targets_of(codebase) if target in agents]
    files = {agent.path: agent for agent in wanted}
    for part in codebase.projects:
        if part.has_files:
            files.update((agent.path, agent) for agent in _files_of_part(part, wanted))
    return files


def _files_of_part(part: Component, agents: Iterable[Agent]) -> Iterator[Agent]:
    for agent in agents:
        if agent.is_nested:
            twins = tuple(f"{part.path}/{twin}" for twin in agent.twins)
            hides = agent.hides and f"{part.path}/{agent.hides}"
            yield agent._replace(path=f"{part.path}/{agent.path}", twins=twins, hides=hides, part=part.path)
        elif agent.part_header:
            folder, _, name = agent.path.rpartition("/")
            path = f"{folder}/{name.replace('orchestra', f'orchestra-{part.stem}', 1)}"
            header = agent.part_header.replace("{glob}", f"{part.path}/**")
            yield agent._replace(path=path, twins=(), header=header, part=part.path)


def possible_files(codebase: Codebase) -> dict[str, Agent]:
    """Return the files that a codebase would have with every target there is."""
    custom = [target.target for target in codebase.custom_targets]
    return managed_files(codebase._replace(targets=(*AGENTS, *custom)))


# Names


def check_name(kind: str, name: str) -> None:
    """Raise RegistryError if a project or codebase cannot be called so."""
    rules = (
        (not 1 <= len(name) <= 100, "names have 1 to 100 characters"),
        (re.search("[\ud800-\udfff]", name), "names must be valid UTF-8"),
        (len(name.encode("utf-8", "replace")) > 240, "names have at most 240 bytes"),  # a suffix must fit, too
        (
            re.search("[/\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]", name),
            "names cannot contain slashes or control characters",
        ),
        (is_ignored(name), "names cannot start with . or #, or end in ~"),
        (kind == "codebase" and name.casefold() == "project", "project.yaml describes the project itself"),
        (kind == "codebase" and name.casefold() == "all", "all.yaml is what all codebases share"),
        (kind == "codebase" and name.casefold().endswith(".local"), "names cannot end in .local"),
    )
    for is_broken, rule in rules:
        if is_broken:
            raise RegistryError(f"{kind} name {excerpt(name)}: {rule}", f"choose another {kind} name")


def is_valid_key(key: Key) -> bool:
    try:
        check_name("project", key[0])
        check_name("codebase", key[1])
    except RegistryError:
        return False
    return True


# Whose folder

# A folder belongs to one codebase. It may have several paths (links, bind mounts, a
# volume that ignores case), so folders are compared by device and inode. It may be on a
# dead mount, so a thread looks up all of them, once the first is asked for.

Identity = tuple[int, int]  # device and inode


def absolute_path(home: str, path: str) -> str:
    """Make a path absolute, without ~, //, . and final slash, but not free of links."""
    return "/" + os.path.abspath(expand_home(home, path)).lstrip("/")


def codebase_root(home: str, codebase: Codebase) -> str:
    """Return the absolute path of a codebase's folder, "" if it has none here."""
    return absolute_path(home, codebase.path) if codebase.path else ""


def is_absent(home: str, codebase: Codebase) -> bool:
    """Return whether a codebase's folder is not on this machine."""
    try:
        os.stat(codebase_root(home, codebase))
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass  # it may be there, and is not for us to see
    return False


def identity_of(path: str, follow: bool = True) -> Optional[Identity]:
    """Return a folder's device and inode; None if it cannot be reached."""
    try:
        info = os.stat(path, follow_symlinks=follow)
    except (OSError, ValueError):
        return None
    return (info.st_dev, info.st_ino)


def climb(folder: str) -> Iterator[str]:
    """Iterate over a folder and those above it, innermost first."""
    while True:
        yield folder
        folder, below = os.path.dirname(folder), folder
        if folder == below:
            return


def is_repository(folder: str) -> bool:
    return any(os.path.lexists(f"{folder}/{name}") for name in (".git", ".hg", ".svn", ".jj"))


def find_git_folder(top: str) -> str:
    """Find where the .git of a checkout leads: that of a worktree is a file.

    Raises IoError.
    """
    link = read_disk(f"{top}/.git", 4096).data.decode("utf-8", "surrogateescape")
    return os.path.join(top, link[7:].strip()) if link.startswith("gitdir:") else f"{top}/.git"


def read_git_path(git: str, name: str) -> str:
    """Read the path in a file of a git folder; raises IoError."""
    return os.path.join(git, read_disk(f"{git}/{name}", 4096).data.decode("utf-8", "surrogateescape").strip())


def find_main_worktree(top: str) -> str:
    """Find the main worktree of the one that has this top folder; "" for none.

    Any archive may hold a .git file, and a copied worktree does, so it counts only if
    the repository names this folder in turn (gitrepository-layout(5)).
    """
    with suppress(IoError, ValueError):  # no path
        git = real_path(find_git_folder(top))
        main, _, name = git.rpartition("/.git/worktrees/")
        if main and "/" not in name and is_same_file(read_git_path(git, "commondir"), f"{main}/.git"):
            folder, file = os.path.split(read_git_path(git, "gitdir"))
            return main if file == ".git" and is_same_file(folder, top) else ""
    return ""


class FolderIndex:
    """The folders that some paths lead to, by device and inode.

    `spellings` has the paths of each, `inner` one of the paths below each folder above
    them. A folder that does not answer in time is in neither.
    """

    PATIENCE = 2.0  # seconds for each folder
    WAITS = 20  # parts of it, since the clock may jump

    def __init__(self, paths: Iterable[str], look: Callable[[str], Optional[Identity]]) -> None:
        import _thread  # importing threading takes a millisecond

        self.paths = frozenset(paths)
        self.spellings: dict[Identity, list[str]] = {}
        self.inner: dict[Identity, str] = {}
        self._look = look
        self._count = 0  # of paths looked at
        done = _thread.allocate_lock()
        done.acquire()
        _thread.start_new_thread(self._look_at_all, (done,))
        count, waits = 0, 0
        # Give up only if nothing was looked up for as long as PATIENCE.
        while waits < self.WAITS and not done.acquire(timeout=self.PATIENCE / self.WAITS):
            count, waits = self._count, waits + 1 if count == self._count else 0

    @staticmethod
    def above(path: str, seen: Container[str] = ()) -> Iterator[Iterator[str]]:
        """Iterate over the folders above a path as spelled, and as links lead."""
        parent = os.path.dirname(path)
        if parent not in seen:
            yield climb(parent)
            yield climb(real_path(parent))
        if os.path.islink(path):
            yield climb(os.path.dirname(real_path(path)))

    def _look_at_all(self, done: Any) -> None:
        seen: set[str] = set()
        try:
            for path in sorted(self.paths):
                identity = self._look(path)
                self._count += 1
                if identity:
                    self.spellings.setdefault(identity, []).append(path)
                    self._look_above(path, seen)
        finally:
            done.release()

    def _look_above(self, path: str, seen: set[str]) -> None:
        for folders in self.above(path, seen):
            for folder in itertools.takewhile(lambda folder: folder not in seen, folders):
                seen.add(folder)
                identity = self._look(folder)
                if identity:
                    self.inner.setdefault(identity, path)


def claim_order(codebases: Mapping[Key, Codebase], key: Key) -> tuple[bool, str, Key]:
    """Return a sort key: a folder belongs to the codebase that was registered first."""
    created_at = codebases[key].created_at if key in codebases else ""
    return (not created_at, created_at, key)


class Owners(dict[str, Key]):
    """The codebases by the absolute paths of their folders.

    Folders are looked up all at once; what concerns one codebase is checked again.
    """

    def __init__(
        self,
        owners: Mapping[str, Key] = {},
        codebases: Mapping[Key, Codebase] = {},
        old: "Optional[Owners]" = None,
        look: Callable[[str], Optional[Identity]] = identity_of,
    ) -> None:
        super().__init__(owners)
        self._look_once = functools.cache(look)
        self._look_around_once = functools.cache(lambda folder: frozenset(map(look, climb(folder))))
        self.orphans: Optional[Owners] = None  # of records whose codebase is gone
        self._look = look
        self._codebases = codebases
        self._folders: Optional[FolderIndex] = old._folders if old is not None else None
        self._is_fitting = False  # whether they are those of these paths

    @property
    def folders(self) -> FolderIndex:
        if self._folders is None or not (self._is_fitting or self.keys() == self._folders.paths):
            self._folders = FolderIndex(self, self._look)
        self._is_fitting = True
        return self._folders

    def keys_at(self, identity: Optional[Identity], without: Optional[Key] = None) -> list[Key]:
        """List the codebases that have a folder, the one it belongs to first."""
        paths = self.folders.spellings.get(identity, ()) if identity else ()
        found = {self[path] for path in paths if self[path] != without and self._look(path) == identity}
        return sorted(found, key=lambda key: claim_order(self._codebases, key)) if found else []

    def key_around(self, path: str) -> tuple[Optional[Key], bool]:
        """Find the codebase of a folder, and whether it is in another git worktree."""
        for top in climb(path):
            main = find_main_worktree(top)
            for folder in (top, *(climb(main + path[len(top) :]) if main else ())):
                keys = self.keys_at(self._look(folder))
                if keys and (folder == top or len(folder) >= len(main)):
                    return keys[0], folder != top
        return None, False

    def owner_at(self, identity: Identity, key: Key, path: str) -> Key:
        """Find the owner of a folder to which the path of `key` leads."""
        known = self.folders.spellings.setdefault(identity, [])
        if path in self and path not in known:
            known.append(path)  # made or mounted since they were looked up
        others = self.keys_at(identity, key)
        return min(key, others[0], key=lambda key: claim_order(self._codebases, key)) if others else key

    def why_not_part(self, root: str, path: str, key: Key) -> str:
        """Return why a folder below a codebase's is not its own; "" if it is."""
        names = path.split("/")
        for folder in (os.path.join(root, *names[: i + 1]) for i in range(len(names))):
            try:
                info = os.lstat(folder)
            except OSError:
                return "is missing"
            if not stat.S_ISDIR(info.st_mode):
                return "is reached through a link" if stat.S_ISLNK(info.st_mode) else "is a file"
            if is_repository(folder):
                return "is in a repository of its own"
            others = self.keys_at((info.st_dev, info.st_ino), key)
            if others:
                return f"belongs to {label_for(others[0])}"
        return ""

    def key_inside(self, identity: Optional[Identity]) -> Optional[Key]:
        """Find a codebase whose folder is below a folder."""
        path = self.folders.inner.get(identity) if identity else None
        above = itertools.chain.from_iterable(FolderIndex.above(path)) if path else ()
        return self[path] if path and identity in map(self._look, above) else None

    def why_unfit(self, home: str, folder: str, identity: Identity) -> str:
        """Return why a folder, by its real path, cannot be a codebase; "" if it can."""
        if identity == self._look_once(home):
            return "the home folder cannot be a codebase"
        if identity == self._look_once("/"):
            return "the root of the file system cannot be a codebase"
        own = self._look_once(orchestra_root(home))
        if own and (own == identity or own in self._look_around_once(os.path.dirname(folder))):
            return "a folder of Orchestra's own cannot be a codebase"
        # A registry from others might lead to ~/.claude, whose CLAUDE.md is read
        # everywhere.
        if "/." in folder:
            top = real_path(home)
            places = itertools.takewhile(lambda place: place != top, climb(folder))
            if shorten_home(top, folder).startswith("~/.") and not any(map(is_repository, places)):
                return "a hidden folder in the home folder is a codebase only in a repository (git init)"
        inner = self.key_inside(identity)
        if inner and not is_repository(folder):
            return f"it contains {label_for(inner)} and is not a repository itself"
        return ""


def spell_path(home: str, path: str) -> str:
    """Write a path through the home folder, however that is spelled, as ~/...

    It stays right when the home folder is moved.
    """
    short = shorten_home(home, path)
    identity = identity_of(home) if short == path else None
    for folder in climb(os.path.dirname(path)) if identity else ():
        if identity_of(folder) == identity:
            return "~/" + path[len(folder) :].lstrip("/")
    return short


def listed_name(
    folder: str,
    name: str,
    list_names: Callable[[str], Sequence[str]] = os.listdir,
    look: Callable[[str, bool], Optional[Identity]] = identity_of,
) -> str:
    """Spell a name as its folder lists it: some volumes ignore case."""
    identity = look(f"{folder}/{name}", False)
    names = sorted(list_names(folder)) if identity else []
    if name in names:
        return name
    return next((other for other in names if look(f"{folder}/{other}", False) == identity), name)


def short_names(keys: Collection[Key]) -> dict[Key, str]:
    """Names as short as is unique: api, or shop/api if two projects have one."""
    counts = Counter(name for _, name in keys)
    return {key: key[1] if counts[key[1]] == 1 else label_for(key) for key in keys}


# ── 12 Markdown ───────────────────────────────────────────────────────────────

# How Markdown is read, where Orchestra's markers may stand in it:
#
#   1 A marker has its line to itself, written as it is written here. A line that only
#     looks like one (indented, other spaces, other case) is an error outside a fence:
#     if it counted as text, the file would get a second block.
#   2 A code fence hides the markers in it, as an example in the user's text has them.
#     It opens and closes as in CommonMark 0.31: three or more backticks or tildes
#     behind at most three spaces, closed by as many or more, or by the end of the list
#     item it is in.
#   3 A fence that stays open hides no marker.
#   4 Between a begin marker with Orchestra's banner and the end marker that is next,
#     nothing is read: what is written there can neither close a fence above the block
#     nor hide its end. So an appended block is always found.
#   5 Anything but one begin marker and then one end marker, or none, is an error:
#     nothing is written.

BLOCK_BEGIN = "<!-- orchestra:begin -->"
BLOCK_END = "<!-- orchestra:end -->"
BANNER = "<!-- Written by Orchestra ({seal}); edits are lost: use `orchestra edit`. -->"
BANNER_LINE = rb"(?m)^<!-- Written by Orchestra \(([0-9a-f]{8})\); [^\n]*-->[ \t]*\r?$"


class Marker(NamedTuple):
    """A marker's comment: `kind` is begin or end, "" for what only looks like one."""

    start: int
    end: int
    kind: str


def _line_at(data: bytes, place: int) -> int:
    return 1 + data.count(b"\n", 0, place)


def _list_markers(data: bytes) -> list[Marker]:
    """List the markers, and what looks like one, wherever they stand (step 1)."""
    comment = rb"(<!--[ \t]*(?i:orchestra):[ \t]*((?i:begin|end))[ \t]*-->)[ \t]*\r?(?![^\n])"
    markers = []
    for found in re.finditer(comment, data):
        before = data[data.rfind(b"\n", 0, found.start()) + 1 : found.start()]
        blank = re.fullmatch(rb"(?:\xef\xbb\xbf)*([ \t]*)", before)
        if blank:
            is_exact = not blank[1] and found[1] in (BLOCK_BEGIN.encode(), BLOCK_END.encode())
            markers.append(Marker(*found.span(1), found[2].decode() if is_exact else ""))
    return markers


def _is_own_block(data: bytes, pair: Sequence[Marker]) -> bool:
    """Recognize a begin marker with Orchestra's banner below it, and its end marker."""
    if [marker.kind for marker in pair] != ["begin", "end"]:
        return False
    banner = re.compile(BANNER_LINE).search(data, pair[0].end, pair[1].start)
    return banner is not None and not data[pair[0].end : banner.start()].strip()


def _open_items(data: bytes, place: int, indent: int, items: list[int]) -> int:
    """Enter the list items that a line begins; return where its text begins."""
    mark = re.compile(LIST_MARK + rb"(?: {1,4}(?! )|[ \t]|(?=\r?$))", re.MULTILINE)
    found = mark.match(data, place)
    while found:
        indent += max(2, found.end() - place)
        items.append(indent)
        place = found.end()
        found = mark.match(data, place)
    return place


class Reading(NamedTuple):
    """What a file has, read line by line."""

    markers: tuple[Marker, ...]  # that no fence hides
    opened: int  # where the line begins of a fence or comment that is never closed
    closing: bytes  # what would close it; empty if there is none
    fences: list[int]  # where each closed fence begins and ends, in turn


def _read_lines(data: bytes, markers: Sequence[Marker]) -> Reading:
    """Read a file and the markers in it (steps 2 to 4)."""
    found: list[Marker] = []
    hidden: list[Marker] = []  # if the open fence gets closed
    items: list[int] = []  # where the text of each open list item begins
    fence, depth, opened = b"", 0, -1  # its closing text; in how many items; where it is
    fences: list[int] = []
    end = passed = seen = 0
    while end < len(data):
        start, end = end, data.find(b"\n", end) + 1 or len(data)
        line = data[start:end]
        text = line.lstrip(b" \t")
        if start < passed or not text.strip():
            continue
        indent = len(line[: len(line) - len(text)].expandtabs(4))
        while items and indent < items[-1]:
            items.pop()
        if fence and depth > len(items):  # its item has ended, and the fence with it
            found += hidden
            hidden, fence = [], b""
        is_comment = fence == b"-->"
        fence = b"" if is_comment and fence in line else fence
        if seen < len(markers) and markers[seen].start < end:
            count = 2 if _is_own_block(data, markers[seen : seen + 2]) else 1
            (hidden if fence else found).extend(markers[seen : seen + count])
            seen += count
            passed = markers[seen - 1].end
        elif is_comment or indent - (items[-1] if items else 0) > 3:
            pass  # indented code, or the middle of a paragraph
        elif fence:
            if text.startswith(fence) and not text.strip(fence[:1] + b" \t\r\n"):
                hidden, fence = [], b""
                fences += opened, start
        else:
            place = _open_items(data, end - len(text), indent, items)
            mark = re.compile(FENCE, re.MULTILINE).match(data, place)
            if mark:
                fence, depth, opened = mark[1] or mark[2], len(items), start
            elif data.startswith(b"<!--", place) and data.find(b"-->", place, end) < 0:
                fence, depth, opened = b"-->", len(items), start
    closing = b"" if depth else fence  # in a list item, it would end before what is appended
    return Reading((*found, *hidden), opened, closing, fences)


@functools.lru_cache(maxsize=len(AGENTS))  # asked several times for each file of a codebase
def find_markers(data: bytes) -> tuple[Marker, ...]:
    """Find the markers that count, and what looks like one (steps 1 to 4)."""
    markers = _list_markers(data) if b"<!--" in data else []
    if [marker.kind for marker in markers] == ["begin", "end"]:
        around = data[: markers[0].start], data[markers[1].end :]
        if not any(fence in part for part in around for fence in (b"```", b"~~~")):
            return tuple(markers)  # as most files have them
    return _read_lines(data, markers).markers if markers else ()


def find_block(data: bytes) -> Optional[slice]:
    """Find the block of a shared file, markers included; raises SyncError (step 5)."""
    markers = find_markers(data)
    kinds = [marker.kind for marker in markers]
    if kinds == ["begin", "end"]:
        return slice(markers[0].start, markers[1].end)
    if not markers:
        return None
    most = 4  # markers named in a message
    lines = [_line_at(data, marker.start) for marker in markers[:most]]
    if "" in kinds[:most]:
        at = kinds.index("")
        line = data[data.rfind(b"\n", 0, markers[at].start) + 1 : markers[at].end].decode("utf-8", "replace")
        marker = BLOCK_BEGIN if "begin" in line.lower() else BLOCK_END
        raise SyncError(
            f"expected {marker} at the very start of line {lines[at]}, got {excerpt(line)}",
            "correct that line, or delete it",
        )
    if len(kinds) == 1:
        other, side, marker = ("end", "below", BLOCK_END) if kinds[0] == "begin" else ("begin", "above", BLOCK_BEGIN)
        raise SyncError(
            f"found orchestra:{kinds[0]} on line {lines[0]} without orchestra:{other}:"
            f" put the {other} marker back, or delete the {kinds[0]} marker",
            f"put this line {side} Orchestra's text: {marker}",
        )
    found = ", ".join(f"{kind or 'another'} on line {line}" for kind, line in zip(kinds, lines))
    found += f" and {len(kinds) - len(lines)} more" if len(kinds) > len(lines) else ""
    raise SyncError(f"expected one orchestra:begin and then one orchestra:end, got {found}: delete all but one block")


def blank_controls(text: str) -> str:
    """Blank what ends a line for some reader, or shows for none, but not tabs."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff]", " ", text)


def _is_evidently_closed(data: bytes) -> bool:
    """Recognize fences in plain pairs and comments of one line, as most are."""
    lines = [line for line in data.split(b"\n") if b"```" in line or b"~~~" in line or b"<!--" in line]
    if any(b"-->" not in line.partition(b"<!--")[2] for line in lines if b"<!--" in line):
        return False
    fences = [line.rstrip() for line in lines if not line.startswith(b"<!--")]
    begin_well = (one == b"```" or (one[:3] == b"```" and one[3:].isalnum()) for one in fences[::2])
    return len(fences) % 2 == 0 and all(begin_well) and all(other == b"```" for other in fences[1::2])


def find_open_block(data: bytes) -> tuple[int, str]:
    """Find the line of a code fence or comment that is open at the end of a text.

    Return it with what closes it; 0 and "" for none.
    """
    if _is_evidently_closed(data):
        return 0, ""
    found = _read_lines(data, ())
    return (_line_at(data, found.opened), found.closing.decode()) if found.closing else (0, "")


def find_conflict(data: bytes) -> tuple[int, bool]:
    """Find the line where a conflict of git's begins in Markdown, 0 for none.

    Return also whether it is in a code fence. What one fence shows of a conflict is an
    example, except all three markers with a label that git writes: these may be either,
    and two versions at once would do more harm than a message.
    """
    from bisect import bisect

    labels = rb"HEAD|ours|Updated upstream|\.merge_file_\w+|[0-9a-f]{7,40}"
    starts = [*re.finditer(rb"(?m)^<{7} (?:(%s)\b)?" % labels, data)]
    ends = [*re.finditer(rb"(?m)^>{7} (local(?:$|[\r:]))?", data)]  # local: git switch -m
    middles, stops = ([mark.start() for mark in marks] for marks in (re.finditer(rb"(?m)^={7}\r?$", data), ends))
    fences = _read_lines(data, ()).fences if starts else []
    for start in starts:
        place, number = start.start(), bisect(stops, start.start())
        if number == len(ends):
            break
        end, fence = stops[number], bisect(fences, place)
        is_fenced = fence % 2 == 1 and fence == bisect(fences, end)
        is_whole = bisect(middles, place) < bisect(middles, end)
        if not is_fenced or ((start[1] or ends[number][1]) and is_whole):
            return _line_at(data, place), is_fenced
    return 0, False


def check_merge(data: bytes, start: int, end: int) -> None:
    """Raise SyncError if an unfinished merge of git's touches data[start:end]."""
    if not (b"<<<<<<<" in data or b">>>>>>>" in data or b"|||||||" in data):
        return
    opened = -1
    for mark in re.finditer(rb"(?m)^(<{7}|>{7}|\|{7})(?: [^\n]*|\r?)$", data):
        if mark[1][:1] == b"<":
            opened = mark.start()
        is_around = mark[1][:1] == b">" and 0 <= opened < end and start < mark.end()
        if start <= mark.start() < end or is_around:
            line = _line_at(data, opened if opened >= 0 else mark.start())
            raise SyncError(f"found git's conflict markers on line {line}: finish the merge first")
        if mark[1][:1] == b">":
            opened = -1


# ── 13 Layers ─────────────────────────────────────────────────────────────────

# What several codebases share is written once. For shop/api these layers count, the
# weakest first; each is a YAML file, a Markdown file or both, and only the codebase's
# YAML file must be there:
#
#     all               projects/all.yaml and all.md
#     all.local         projects/all.local.yaml ...: one person's, on one machine
#     project           projects/shop/project.yaml ...
#     project.local
#     codebase          projects/shop/api.yaml ...
#     codebase.local
#
# A layer adds to the text the Markdown files that its YAML file includes, and then its
# own. Markdown stays as it was typed, but cannot be taken for Orchestra's marks, and
# leaves no fence or comment open. `render_body` puts it below the conventions.
#
# A layer that cannot be read stops the codebases it covers. `Schema.join` makes one
# Codebase of what its layers say.

MAX_REGISTRY_FILE = 1 << 20  # bytes
LAYERS = ("all", "all.local", "project", "project.local", "codebase", "codebase.local")
SHARED, OWN = LAYERS[:4], LAYERS[4:]


class Prose(NamedTuple):
    """A Markdown file of the registry, as it can stand amidst other text."""

    file: str
    text: str = ""
    digest: str = ""
    problems: tuple[Problem, ...] = ()
    notes: tuple[Problem, ...] = ()


class Layer(NamedTuple):
    """One layer, by its `path` without suffix, with what its YAML file says."""

    path: str
    said: Codebase
    prose: tuple[Prose, ...] = ()
    missing: tuple[str, ...] = ()  # where an included file was looked for in vain
    problems: tuple[Problem, ...] = ()  # of all its files, as are the notes
    notes: tuple[Problem, ...] = ()

    @property
    def digest(self) -> str:
        """A hash of all its files."""
        return sha256_of(repr(self.digests).encode()) if self.prose or self.missing else self.said.digest

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of its files by path, "" for one that is missing."""
        files = {prose.file: prose.digest for prose in self.prose}
        return {f"{self.path}.yaml": self.said.digest, **dict.fromkeys(self.missing, ""), **files}


def layer_stem(name: str) -> str:
    """Return what a layer's file belongs to, by its name: api for api.local.md."""
    stem = os.path.splitext(name)[0]
    return stem[: -len(".local")] if stem.endswith(".local") else stem


def layer_paths(home: str, key: Key) -> list[str]:
    """Return the path of each of LAYERS, without suffix."""
    root = projects_root(home)
    stems = (f"{root}/all", f"{root}/{key[0]}/project", f"{root}/{key[0]}/{key[1]}")
    return [f"{stem}{end}" for stem in stems for end in ("", ".local")]


def own_files(home: str, key: Key) -> list[str]:
    """Return the paths that a codebase's own files can have, the YAML file first."""
    return [path + suffix for path in layer_paths(home, key)[len(SHARED) :] for suffix in (".yaml", ".md")]


def find_layer_key(home: str, path: str) -> Optional[Key]:
    """Find whose layer a file is by its name, None if it is nobody's.

    What all codebases share has the key ("", ""), and what those of a project share has
    the name "".
    """
    folder, name = os.path.split(path)
    stem = layer_stem(name)
    above, project = os.path.split(folder)
    if folder == projects_root(home):
        return ("", "") if stem == "all" else None
    return (project, "" if stem == "project" else stem) if above == projects_root(home) else None


def edit_command(home: str, file: str) -> str:
    """Return how to edit a registry file: `orchestra edit` opens codebases' own."""
    key = find_layer_key(home, file)
    if key and file == codebase_path(home, key):
        return f"orchestra edit {typed(label_for(key))}"
    return f"edit {typed(shorten_home(home, file))}"


def find_outside(home: str, file: str) -> str:
    """Return where a registry file is if a link leads out of the registry, "" if not.

    The registry itself and a project's folder may be links.
    """
    root = projects_root(home)
    project, slash, below = file[len(root) + 1 :].partition("/")
    folder = f"{root}/{project}" if slash else root
    names = (below or project).split("/")
    if not any(os.path.islink("/".join([folder, *names[: i + 1]])) for i in range(len(names))):
        return ""
    real = real_path(file)
    is_inside = any(real.startswith(f"{real_path(above)}/") for above in (root, folder))
    return "" if is_inside else real


# Reading files


class RegistryFile(Document):
    """One file of the registry, on its way to a record or to prose."""

    LIMITED_KEYS = {  # the layers of those keys that may not stand in every one
        "name": ("project", "project.local", *OWN),
        "path": OWN,
        "projects": ("codebase",),
        "created_at": ("project", "codebase"),
        "updated_at": ("project", "codebase"),
    }
    IMPORT = r"(?<![\w`@/.])@(?:~/|/|\.\./)[^\s`]{0,200}"  # from outside the codebase
    MARK = r"<!--(?=[ \t]*(?:(?i:orchestra):|Written by Orchestra \())"

    def __init__(self, home: str, file: str, disk: Optional[Disk] = None) -> None:
        super().__init__(shorten_home(home, file))
        self.path = file
        self._home = home
        self.digest = ""
        self._data = b""
        self._included_size = 0  # characters
        real = follow_link(file)
        if disk is None and (real != file or file.count("/") > projects_root(home).count("/") + 2):
            outside = find_outside(home, file)
            if outside:
                self.complain(f"file: expected a file in the registry, got a link to {shorten_home(home, outside)}")
                return
        try:
            disk = disk or read_disk(real, MAX_REGISTRY_FILE + 1)
        except IoError as error:
            self.complain(f"file: cannot be read: {Problem.from_error(error).message}")
            return
        if disk.kind != "file":
            self.complain(f"file: expected a file, got {disk.noun}")
            return
        self.digest = sha256_of(disk.data)
        self._data = disk.data
        if len(disk.data) > MAX_REGISTRY_FILE:
            self.complain(f"file: expected at most {MAX_REGISTRY_FILE} bytes, got more")

    def problem(self, message: str, line: int = 1) -> Problem:
        return super().problem(message, line)._replace(hint=edit_command(self._home, self.path))

    def decode(self) -> Optional[str]:
        """Return the file's text; None where a problem says why."""
        if self.problems:
            return None
        try:
            return self._data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = self._data.count(b"\n", 0, error.start) + 1
            self.complain(f"file: expected UTF-8, got the byte 0x{self._data[error.start]:02x}", line=line)
            return None

    def parse(self) -> Optional[YamlNode]:
        """Parse the file to its root node; None where a problem says why."""
        text = self.decode()
        return None if text is None else self.compose(text)

    def parse_items(self) -> dict[str, YamlNode]:
        """Parse the file to its keys and their nodes; {} where a problem says why."""
        root = self.parse()
        return {} if root is None else self.read_mapping(root, "")

    def read_layer(self, kind: str, key: Key) -> Codebase:
        """Read what a YAML file says as a layer; `kind` is one of LAYERS.

        Only a codebase's own file must say something.
        """
        text = self.decode() or ""
        is_empty = kind != "codebase" and all(line.strip()[:1] in ("", "#") for line in text.split("\n"))
        root = None if self.problems or is_empty else self.compose(text)
        if root is None:
            return Codebase(key[0], "", digest=self.digest)
        if root.id == "mapping":
            root.value[:] = [pair for pair in root.value if self._belongs(pair[0], kind)]
        schema = CODEBASE_SCHEMA if kind == "codebase" else LAYER_SCHEMA
        said: Codebase = schema.read(self, root, project=key[0], digest=self.digest)
        node = next((value for name, value in root.value if name.value == "name"), root) if said.name else root
        name = key[1] if kind in OWN else key[0]
        called = {"codebase": f"file is called {name}.yaml", "codebase.local": f"codebase is called {name}"}
        if said.name and said.name != name:
            problem = called.get(kind, f"folder is called {name}")
            self.complain(f"name: the {problem}, but name says {said.name!r}", node)
        self.notes.sort(key=lambda note: int(note.where.rpartition(":")[2]))
        return said

    def _belongs(self, name: YamlNode, kind: str) -> bool:
        """Return whether a key may stand in a layer; if not, add a note."""
        allowed = self.LIMITED_KEYS.get(name.value, LAYERS) if name.id == "scalar" else LAYERS
        if kind not in allowed:
            where = "a codebase's own file" + (" or project.yaml" if "project" in allowed else "")
            self.note(f"{name.value}: ignored here: it belongs in {where}", name.start_mark.line + 1)
        return kind in allowed

    def read_prose(self) -> Prose:
        """Read a Markdown file."""
        text = self.decode() or ""
        conflict, is_fenced = find_conflict(text.encode()) if "<<<<<<< " in text else (0, False)
        if conflict:
            self.complain(f"file: {UNFINISHED_MERGE}{', or indent the example' * is_fenced}", line=conflict)
        text = blank_controls(text)
        mark = re.search(self.IMPORT, text)
        if mark:
            problem = f"agents may import {mark[0].rstrip('.,;:)')} from outside of the codebase: put it in backticks"
            self.note(problem, text.count("\n", 0, mark.start()) + 1)
        mark = re.search(self.MARK, text)
        if mark:
            self.note("a marker of Orchestra's own: agents see it as text", text.count("\n", 0, mark.start()) + 1)
            text = re.sub(self.MARK, "&lt;!--", text)
        # Part of an unfinished merge, which no sync would write over. Markdown does not
        # mind the space.
        text = re.sub(r"(?m)^(?=(?:<{7}|>{7}|\|{7})(?: |$))", " ", text)
        line, closing = find_open_block(text.encode())
        if line:
            noun = "comment" if closing == "-->" else "code fence"
            self.note(f"the {noun} is never closed: closed at the end of the file", line)
            text = f"{text.rstrip()}\n{closing}"
        text = sys.intern(text.strip("\n").rstrip())  # thousands of links may lead to one file
        return Prose(self.path, text, self.digest, tuple(self.problems), tuple(self.notes))

    def count_included(self, text: str) -> None:
        self._included_size += len(text)
        if self._included_size > self.MAX_TEXT:
            self.complain(f"include: expected files of at most {self.MAX_TEXT} characters together, got more")


def edit_source(home: str, codebase: Codebase, name: str) -> str:
    """Return how to edit the file that a codebase's path, or its targets, are from."""
    files = [f"{layer.path}.yaml" for layer in codebase.layers if getattr(layer.said, name) not in (None, "")]
    return edit_command(home, [codebase_path(home, codebase.key), *files][-1])


def digests_of(home: str, key: Key, layers: Iterable[Layer]) -> dict[str, str]:
    """Return the SHA-256 of a codebase's files by path, "" for one that is missing."""
    digests = {path + suffix: "" for path in layer_paths(home, key) for suffix in (".yaml", ".md")}
    for layer in layers:
        digests.update(layer.digests)
    return digests


def is_current(home: str, codebase: Codebase) -> bool:
    """Return whether the files that a codebase was read from have not changed."""
    known = digests_of(home, codebase.key, codebase.layers)

    def digest(path: str) -> str:
        if not (known[path] or os.access(path, os.F_OK)):
            return ""  # as most are
        disk = read_disk(follow_link(path), MAX_REGISTRY_FILE + 1)
        return sha256_of(disk.data) if disk.kind == "file" else ""

    return all(digest(path) == known[path] for path in known)


@functools.cache
def program_stamp() -> str:
    """Return a text that changes with this program, and with it all that is cached."""
    try:
        info = os.stat(__file__)
    except OSError:
        return __version__
    return f"{__version__}-{info.st_size}-{info.st_mtime_ns}"


class ParsedFiles:
    """What YAML files say, by their SHA-256: parsing is the costliest step.

    Even for one file, since importing PyYAML takes as long as most commands. They are
    kept in one file, one per line: the hash and the kind of layer, and what the file
    says in JSON. The first line has the version of the program and the hash of the
    other lines: if these differ, the file counts as empty.
    """

    def __init__(self, home: str) -> None:
        self._home = home
        self._known = {name: said for name, _, said in (line.partition(b" ") for line in self._load())}
        self._used: dict[bytes, bytes] = {}
        self._has_news = False

    def _load(self) -> list[bytes]:
        try:
            data = read_disk(f"{run_dir(self._home)}/parsed.jsonl").data
        except IoError:
            return []
        lines = memoryview(data)[data.find(b"\n") + 1 :]  # no copy: that may be big
        return data.splitlines()[1:] if data.startswith(self._head(lines)) else []

    def _head(self, lines: Buffer) -> bytes:
        return f"{program_stamp()} {sha256_of(lines)}\n".encode()

    def find(self, file: RegistryFile, kind: str, key: Key) -> Optional[Codebase]:
        """Find what a file says, without unknown keys, and add its notes to it."""
        name = f"{file.digest}:{kind}".encode()
        try:
            notes, *values = json.loads(self._known[name])
            said: Codebase = CODEBASE_SCHEMA.restore(values, key[0])
            notes = [(str(message), int(line)) for message, line in notes]
        except (KeyError, ValueError, TypeError):  # unknown, or damaged
            return None
        if said.name not in ("", key[1] if kind in OWN else key[0]):
            return None  # the same file in another place
        for message, line in notes:
            file.note(message, line)
        self._used[name] = self._known[name]
        return said._replace(digest=file.digest)

    def add(self, file: RegistryFile, kind: str, said: Codebase) -> None:
        notes = [(note.message, int(note.where.rpartition(":")[2])) for note in file.notes]
        values = said[1 : 1 + len(CODEBASE_SCHEMA.kinds)]
        line = json.dumps([notes, *values], default=lambda node: None, separators=(",", ":"))
        self._used[f"{said.digest}:{kind}".encode()] = line.encode()
        self._has_news = True

    def save(self) -> None:
        """Save it if anything was parsed anew, or a kill cut the last save short."""
        cache, lock_path = f"{run_dir(self._home)}/parsed.jsonl", f"{run_dir(self._home)}/parsed.lock"
        with suppress(OrchestraError):  # another process is saving it, or the disk is full
            if self._has_news or read_disk(lock_path).data:
                lines = b"".join(b"%b %b\n" % item for item in self._used.items())
                with Lock(lock_path, timeout=0) as lock:
                    save_private(cache, self._head(lines) + lines, lock.token, durable=False)


def keep_equal(old: Codebase, new: Codebase) -> Codebase:
    """Give a codebase that was read again its old values where they are equal.

    An edit leaves most of a file as it was, and a daemon need not hold that twice.
    """
    values: list[Any] = [value if value == other else other for value, other in zip(old, new)]
    return Codebase(*values)


class LayerReader:
    """Reads the layers of codebases; what several of them share is read once.

    `names` are those in each folder that has been listed. `known` are what earlier
    readers made: layers and prose by file, codebases by key. What has not changed stays
    the same object, so that a daemon does not keep it twice.
    """

    def __init__(
        self,
        home: str,
        parsed: Optional[ParsedFiles] = None,
        names: Mapping[str, Container[str]] = {},
        known: Mapping[Any, Any] = {},
    ) -> None:
        self.shared: dict[str, Any] = {}  # a Layer, Prose, or None for none
        self.seen: dict[str, str] = {}  # `digests_of` all codebases that are broken
        self._home = home
        self._parsed = parsed
        self._names = names
        self._known = known
        self._bases: dict[str, Codebase] = {}
        self._root = projects_root(home)

    def read(self, key: Key) -> tuple[Optional[Codebase], tuple[Problem, ...]]:
        """Read a codebase with all its layers, or the problems that stop it.

        It lacks unknown keys, which only a save needs.
        """
        base, path = self.read_base(key[0]), f"{self._root}/{key[0]}/{key[1]}"
        found = (self._read_layer("codebase", path, key), self._read_layer("codebase.local", f"{path}.local", key))
        own = [layer for layer in found if layer]
        codebase, problems = self._join(key, base, own)
        if codebase is None:
            self.seen.update(digests_of(self._home, key, (*base.layers, *own)))
        return codebase, problems

    def _join(self, key: Key, base: Codebase, own: Sequence[Layer]) -> tuple[Optional[Codebase], tuple[Problem, ...]]:
        """Make a codebase of its layers, or return the problems that stop it."""
        layers = (*base.layers, *own)
        problems = [problem for layer in reversed(layers) for problem in layer.problems]
        if problems:
            return None, tuple(problems)
        known: Optional[Codebase] = self._known.get(key)
        if known and tuple(map(id, known.layers)) == tuple(map(id, layers)):
            return known, ()
        records, digests = [layer.said for layer in own], [layer.digest for layer in own]
        if base.layers:
            records, digests = [base, *records], [base.digest, *digests]
        # A file alone, as most codebases have, needs no other hash than its own.
        digest = digests[0] if len(digests) == 1 else sha256_of(repr(digests).encode())
        said = functools.reduce(CODEBASE_SCHEMA.join, records)._replace(digest=digest, layers=layers)
        said = keep_equal(known, said) if known else said
        problems = self._check_targets(said)
        return (None, tuple(problems)) if problems else (said, ())

    def _check_targets(self, codebase: Codebase) -> list[Problem]:
        """Check the targets, of which only all layers together know."""
        custom = codebase.custom_targets
        known = {**AGENTS, **{target.target: target for target in custom}} if custom else AGENTS
        paths = {spelled_alike(target.path): target.target for target in reversed(custom)}
        if custom:
            parts = (agent for agent in possible_files(codebase).values() if agent.part)
            paths.update((spelled_alike(agent.path), f"the part in {agent.part}") for agent in parts)
        problems = []
        for layer in codebase.layers:
            bad = {i for i, target in enumerate(layer.said.targets or ()) if target not in known}
            wrong = {}
            for target in layer.said.custom_targets:
                other = paths.get(spelled_alike(target.path), target.target)
                if known[target.target] == target and other != target.target:
                    wrong[target.target] = f"path: {other} has that file"
                elif target.header and target.owns == "block":
                    wrong[target.target] = "header: only a target that owns the file may have one"
            if bad or wrong:
                file = RegistryFile(self._home, f"{layer.path}.yaml")
                problems += self._find_lines(file, OneOf(known), bad, wrong)
        return problems

    @staticmethod
    def _find_lines(file: RegistryFile, kind: OneOf, bad: Container[int], wrong: Mapping[str, str]) -> list[Problem]:
        """Complain of targets at their lines, which the parsed values lack."""
        nodes = file.parse_items()
        targets = file.read_items(nodes["targets"], "targets") if bad and "targets" in nodes else []
        for i, node in enumerate(targets):
            if i in bad:
                kind.read(file, node, f"targets[{i}]")
        for name, value in nodes["custom_targets"].value if wrong and "custom_targets" in nodes else ():
            if name.value in wrong:
                file.complain(f"custom_targets.{name.value}.{wrong[name.value]}", value)
        return file.problems

    def read_base(self, project: str) -> Codebase:
        """Read what all codebases of a project share."""
        if project not in self._bases:
            layers = []
            for kind, path in zip(SHARED, layer_paths(self._home, (project, ""))):
                file = f"{path}.yaml"
                if file not in self.shared:
                    self.shared[file] = self._read_layer(kind, path, (project, ""))
                layers += [self.shared[file]] if self.shared[file] else []
            said = functools.reduce(CODEBASE_SCHEMA.join, (layer.said for layer in layers), Codebase(project, ""))
            digest = sha256_of(repr([layer.digests for layer in layers]).encode())
            unnamed = said._replace(name="", created_at="", updated_at="", digest=digest)
            self._bases[project] = unnamed._replace(layers=tuple(layers))
        return self._bases[project]

    def _open(self, path: str, must_exist: bool = False) -> Optional[RegistryFile]:
        """Open a file of the registry; None if there is none."""
        folder, _, name = path.rpartition("/")
        # A name in Unicode may be listed in another form of it (macOS).
        names = self._names.get(folder) if name.isascii() else None
        if not (must_exist or (os.path.lexists(path) if names is None else name in names)):
            return None  # as most are
        file = RegistryFile(self._home, path)
        return None if file.problems and not must_exist and not os.path.lexists(path) else file

    def _read_layer(self, kind: str, path: str, key: Key) -> Optional[Layer]:
        file = self._open(f"{path}.yaml", must_exist=kind == "codebase")
        own = self._read_prose(f"{path}.md", is_shared=kind in SHARED)
        if file is None and own is None:
            return None
        known = self._known.get(f"{path}.yaml")
        said = self._read_said(file, kind, key, known) if file else Codebase(key[0], "")
        prose: list[Prose] = []
        missing: list[str] = []
        if file and not file.problems:
            lost = {name for name in said.include if not self._include(file, name, prose, missing)}
            self._complain_of_lost(file, lost)
        prose += [own] if own else []
        found = [source for source in (file, *prose) if source]
        problems = tuple(problem for source in found for problem in source.problems)
        notes = tuple(note for source in found for note in source.notes)
        layer = Layer(path, said, tuple(prose), tuple(missing), problems, notes)
        is_same = known and known.digests == layer.digests and known.problems == problems
        return known if is_same else layer

    def _read_said(self, file: RegistryFile, kind: str, key: Key, known: Optional[Layer]) -> Codebase:
        if known and file.digest and known.said.digest == file.digest and not known.problems:
            file.notes += [note for note in known.notes if note.where.startswith(f"{file.place}:")]
            return known.said
        said = self._parsed.find(file, kind, key) if self._parsed and file.digest else None
        if said is None:
            said = file.read_layer(kind, key)
            if self._parsed and not file.problems:
                self._parsed.add(file, kind, said)
            said = keep_equal(known.said, said) if known else said
        return said._replace(extra=()) if said.extra else said

    def _include(self, file: RegistryFile, name: str, prose: list[Prose], missing: list[str]) -> bool:
        """Add an included file to `prose`, and where it is not to `missing`."""
        if file.problems:
            return True
        for folder in dict.fromkeys((os.path.dirname(file.path), self._root)):
            found = self._read_prose(f"{folder}/{name}", is_shared=True)
            if found:
                prose.append(found)
                file.count_included(found.text)
                return True
            missing.append(f"{folder}/{name}")
        return False

    @staticmethod
    def _complain_of_lost(file: RegistryFile, names: Container[str]) -> None:
        nodes = file.parse_items() if names else {}  # again: what was parsed before has no lines
        for i, item in enumerate(file.read_items(nodes["include"], "include") if "include" in nodes else ()):
            if item.value in names:
                file.complain(f"include[{i}]: no file {item.value} beside this one or in the registry's root", item)

    def _read_prose(self, path: str, is_shared: bool) -> Optional[Prose]:
        if path in self.shared:
            prose: Optional[Prose] = self.shared[path]
            return prose
        file, known = self._open(path), self._known.get(path)
        if file is None:
            prose = None
        elif known and file.digest and known.digest == file.digest:
            prose = known
        else:
            prose = file.read_prose()
        if is_shared:
            self.shared[path] = prose
        return prose


# ── 14 Registry ───────────────────────────────────────────────────────────────

# A broken file stops only the codebases whose layer it is. From files to a Registry:
#
#   1 RegistryScan lists the files of codebases, and stray ones, without reading them.
#   2 A LayerReader makes a Codebase of its layers, or the problems that stop it. A file
#     that has been parsed before comes from ParsedFiles.
#   3 If several codebases claim one folder, it belongs to the one registered first.
#
# load_registry takes all three steps, reload_codebases the last two for some
# codebases, and load_with_layers the second for one.
#
# Files are written by a RegistryTurn, one at a time.


def error_for(problems: Sequence[Problem]) -> RegistryError:
    return RegistryError("\n".join(map(str, problems)), problems[0].hint)


class Registry(NamedTuple):
    """All codebases that could be read, each with its layers, and all problems."""

    codebases: Mapping[Key, Codebase]
    broken: Mapping[Key, tuple[Problem, ...]]
    stray: tuple[Problem, ...]  # of files that are not a codebase's
    owners: Owners
    shared: Mapping[str, Any] = {}  # of several codebases, as LayerReader keeps it
    seen: Mapping[str, str] = {}  # what was read of the broken ones, likewise

    @property
    def keys(self) -> list[Key]:
        return sorted([*self.codebases, *self.broken])

    @property
    def problems(self) -> list[Problem]:
        return list(dict.fromkeys([*self.stray, *(p for key in sorted(self.broken) for p in self.broken[key])]))

    def known_of(self, keys: Iterable[Key]) -> dict[Any, Any]:
        """Return what a LayerReader of some codebases need not make again."""
        codebases = {key: self.codebases[key] for key in keys if key in self.codebases}
        layers = [layer for codebase in codebases.values() for layer in codebase.layers]
        prose = {prose.file: prose for layer in layers for prose in layer.prose}
        return {**self.shared, **codebases, **{f"{layer.path}.yaml": layer for layer in layers}, **prose}

    def remarks(self, keys: Iterable[Key]) -> list[Problem]:
        """List what a user should know of the files of some codebases, each once.

        They are notes in `status`, `sync`, `edit` and the daemon's log, and warnings in
        `doctor`.
        """
        found = (self.codebases[key].remarks for key in keys if key in self.codebases)
        return list(dict.fromkeys(itertools.chain.from_iterable(found)))

    def find(self, name: str, hint: str = "give its project too:") -> Key:
        """Find a codebase by name, api or shop/api; raises RegistryError.

        Where a name is not unique, a whole one follows the `hint`.
        """
        project, slash, codebase = name.rpartition("/")
        if slash and ((project, codebase) in self.codebases or (project, codebase) in self.broken):
            return (project, codebase)
        found = [key for key in self.keys if key[1] == codebase and not slash]
        if len(found) == 1:
            return found[0]
        if found:
            labels = ", ".join(map(label_for, found))
            raise RegistryError(
                f'"{name}" is in {len(found)} projects: {labels}', f"{hint} {typed(label_for(found[0]))}"
            )
        shown = name if len(name) <= 200 else excerpt(name)
        like = did_you_mean(name, [*map(label_for, self.keys), *(key[1] for key in self.keys)])
        raise RegistryError(f'no codebase is called "{shown}"{like}', "orchestra project list")

    def readable(self, key: Key) -> Codebase:
        """Return a registered codebase; raises RegistryError if its file is broken."""
        if key in self.broken:
            raise error_for(self.broken[key])
        return self.codebases[key]


# Listing


def list_folder(folder: str) -> list[os.DirEntry[str]]:
    """List a folder, in no order; a missing one is empty. Raises IoError."""
    with blame(folder):
        try:
            with os.scandir(folder) as entries:
                return list(entries)
        except FileNotFoundError:
            return []


def find_keys(home: str) -> list[Key]:
    """List the registered codebases by the names of their files; none is read."""
    return sorted(filter(is_valid_key, keys_below(projects_root(home), ".yaml")))


def find_custom_targets(home: str) -> list[str]:
    """List the custom targets of all files, found by a pattern: parsing takes long."""
    root = projects_root(home)
    pattern = r"""(?<![\w.-])([\w.-]{1,99})["']?:\s{0,99}\{?\s{0,9}(?:path|owns|header|limit):"""
    found: set[str] = set()
    for folder in (root, *(f"{root}/{project}" for project in names_in(root))):
        for name in filter(lambda name: name.endswith(".yaml"), names_in(folder)):
            with suppress(IoError):
                data = read_disk(f"{folder}/{name}", 1 << 20).data
                text = (b"\n" + data).partition(b"\ncustom_targets:")[2].decode("utf-8", "replace")
                found.update(re.findall(pattern, text))
    return sorted(found)


def listed_key(home: str, key: Key) -> Key:
    """Spell a codebase's project and name as the registry has them."""
    project = listed_name(projects_root(home), key[0])
    file = listed_name(f"{projects_root(home)}/{project}", f"{key[1]}.yaml")
    return (project, file[:-5] if file.endswith(".yaml") else key[1])


def is_registry_file(name: str) -> bool:
    """Return whether a name is that of a YAML file, .yml and .YAML included."""
    return name.lower().endswith((".yaml", ".yml"))


class RegistryScan:
    """The keys of a registry's codebases, and the problems of stray files.

    `names` are those in each folder, `idle` the projects without codebases. Files are
    not read. Raises IoError if the registry cannot be listed at all.
    """

    def __init__(self, home: str) -> None:
        self.home = home
        self.keys: list[Key] = []
        self.idle: list[str] = []
        self.stray: list[Problem] = []
        self.names: dict[str, Container[str]] = {}
        root = projects_root(home)
        if os.path.islink(root):
            with blame(root):
                os.stat(root)  # a link to nowhere, a disk that is not mounted, is no empty registry
        for entry in self._list(root):
            with self._reject_unreadable(entry):
                if entry.is_dir():
                    found = [*self._find_keys(entry.name, self._list(entry.path))]
                    self.keys += found
                    self.idle += [] if found else [entry.name]
                elif is_registry_file(entry.name) and entry.name not in ("all.yaml", "all.local.yaml"):
                    self._reject(entry, "ignored: it belongs in a project's folder")
                elif entry.is_symlink():
                    entry.stat()  # raises OSError if it leads nowhere: a project's folder may

    def _list(self, folder: str) -> list[os.DirEntry[str]]:
        entries = [entry for entry in list_folder(folder) if not is_ignored(entry.name)]
        self.names[folder] = {entry.name for entry in entries}
        return sorted(entries, key=lambda entry: entry.name)

    def _reject(self, entry: os.DirEntry[str], message: str, hint: str = "") -> None:
        self.stray.append(Document(shorten_home(self.home, entry.path), hint).problem(message))

    @contextmanager
    def _reject_unreadable(self, entry: os.DirEntry[str]) -> Iterator[None]:
        try:
            yield
        except (IoError, OSError) as error:
            # A link to itself that is called .md is a layer's, or nobody's.
            if isinstance(error, IoError) or not entry.name.endswith(".md"):
                self._reject(entry, f"cannot be listed: {Problem.from_error(error).message}")

    def _find_keys(self, project: str, entries: Sequence[os.DirEntry[str]]) -> Iterator[Key]:
        names = {entry.name for entry in entries}
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if suffix == ".yaml":
                try:
                    check_name("project", project)
                    whole = layer_stem(entry.name) if stem.endswith(".local") else ""
                    if whole and whole != "project" and f"{whole}.yaml" not in names:
                        self._reject(entry, f"ignored: it belongs to {whole}.yaml, which is missing")
                    elif stem != "project" and not whole:
                        check_name("codebase", stem)
                        yield (project, stem)
                except RegistryError as error:
                    self._reject(entry, str(error), error.hint)
            elif is_registry_file(entry.name):
                self._reject(entry, f"ignored: rename it to {stem}.yaml")
            else:
                with self._reject_unreadable(entry):
                    if entry.is_dir() and any(is_registry_file(e.name) for e in self._list(entry.path)):
                        self._reject(entry, "ignored: YAML files belong right in the project's folder")


# Loading


def _explain_lost_claim(home: str, codebase: Codebase, owner: Key) -> Problem:
    """Explain that a codebase's folder is another's, at the file that has its path."""
    file = next(f"{layer.path}.yaml" for layer in reversed(codebase.layers) if layer.said.path)
    problem = f"path: {codebase.path} already belongs to {label_for(owner)}"
    return Document(shorten_home(home, file), edit_command(home, file)).problem(problem)


def reload_codebases(
    home: str, registry: Registry, keys: Iterable[Key], reader: Optional[LayerReader] = None
) -> Registry:
    """Read some codebases again, and all broken ones; drop those whose file is gone.

    The cost is that of reading these, however large the registry.
    """
    again = {*keys, *registry.broken}
    codebases, owners = dict(registry.codebases), dict(registry.owners)
    for key in again & codebases.keys():
        root = codebase_root(home, codebases.pop(key))
        if owners.get(root) == key:
            del owners[root]
    broken: dict[Key, tuple[Problem, ...]] = {}
    reader = reader or LayerReader(home, known=registry.known_of(again))

    def is_missing(key: Key) -> bool:
        return not os.path.lexists(codebase_path(home, key))

    for key in sorted(again):
        codebase, problems = reader.read(key)
        if codebase is None and is_missing(key):
            continue
        if codebase is None:
            broken[key] = problems
            continue
        codebases[key] = codebase
        root = codebase_root(home, codebase)
        if not root:
            continue
        other = owners.get(root, key)
        if other != key and is_missing(other):  # renamed a moment ago
            codebases.pop(other, None)
            other = key
        owners[root] = first = min(key, other, key=lambda key: claim_order(codebases, key))
        if other != key:
            loser = codebases.pop(other if first == key else key)
            broken[loser.key] = (_explain_lost_claim(home, loser, first),)
            reader.seen.update(digests_of(home, loser.key, loser.layers))
    shared = {**registry.shared, **reader.shared}
    return Registry(codebases, broken, registry.stray, Owners(owners, codebases, registry.owners), shared, reader.seen)


def load_registry(home: str, old: Optional[Registry] = None) -> Registry:
    """Read the whole registry; raises IoError if it cannot be listed.

    What has not changed since `old` stays the same object; the rest is parsed anew, as
    what a daemon has read before is of no use to it.
    """
    scan, parsed = RegistryScan(home), None if old else ParsedFiles(home)
    reader = LayerReader(home, parsed, scan.names, old.known_of(old.codebases) if old else {})
    idle = [layer.problems for project in scan.idle for layer in reader.read_base(project).layers]
    stray = (*scan.stray, *itertools.chain.from_iterable(idle))
    registry = reload_codebases(home, Registry({}, {}, stray, Owners()), scan.keys, reader)
    if parsed:
        parsed.save()
    return registry


def list_codebases(home: str) -> list[Codebase]:
    """List all readable codebases with all their layers, by project and name.

    For programs that import this one; Orchestra itself uses load_registry.
    """
    return [codebase for _, codebase in sorted(load_registry(home).codebases.items())]


def load_codebase(home: str, project: str, name: str) -> Codebase:
    """Load one codebase from its own file; raises RegistryError."""
    key = (project, name)
    file = RegistryFile(home, codebase_path(home, key))
    codebase = file.read_layer("codebase", key)
    if file.problems:
        raise error_for(file.problems)
    return codebase


def load_with_layers(home: str, key: Key) -> Codebase:
    """Load one codebase from all its layers; raises RegistryError."""
    codebase, problems = LayerReader(home).read(key)
    if codebase is None:
        raise error_for(problems)
    return codebase


# Writing


class RegistryTurn(Turn):
    """A turn at the registry. A file's backup name begins with its codebase's."""

    LOCK = "registry.lock"

    def __init__(self, home: str) -> None:
        super().__init__(home, f"{run_dir(home)}/{self.LOCK}", backups_root(home), time.time)

    def name_of(self, key: Key, file: str) -> str:
        return f"{label_for(key)}/{os.path.basename(file)}"

    def find_name(self, path: str) -> str:
        """Find a file's backup name by its path; in unknown/unknown if it is stray."""
        folder, name = os.path.split(path)
        key = (os.path.basename(folder), layer_stem(name))
        name = name if self.can_be_kept_as(name) else "leftover.yaml"
        return self.name_of(key if is_valid_key(key) else ("unknown", "unknown"), name)

    def split_name(self, backup_name: str) -> tuple[Key, str]:
        project, codebase, name = [*backup_name.split("/", 2), "unknown", "unknown"][:3]
        return (project, codebase), name

    def settle(self, leftover: Leftover) -> None:
        folders = folders_below(projects_root(self.home))
        if leftover.swap:
            folders.append(os.path.dirname(leftover.swap.path))
        self.clean_up(folders, self.find_name, leftover)
        sweep_folder(os.path.dirname(schema_path(self.home)), leftover.token)

    def write(self, file: str, backup_name: str, text: str, expected: Disk) -> None:
        with blame(file):
            make_private_folder(os.path.dirname(file))
            with open_place(file, backup_name) as place:
                replace_file(place, text.encode(), expected, self, mode=0o600, durable=True)
            flush_folder(os.path.dirname(file))

    def edit(
        self, file: str, backup_name: str, disk: Disk, change: Callable[[YamlNode], YamlNode], normalize: Any
    ) -> None:
        """Write a file as `change` makes it of its old root node; what is equal stays.

        If that is not possible, it is written anew, and the old one backed up. Raises
        RegistryError for an old file that cannot be read, FileChanged, IoError.
        """
        text: Optional[str] = None
        old: YamlNode = None
        if disk.kind == "file":
            doc = RegistryFile(self.home, file, disk)
            old = doc.parse()
            if old is not None:
                doc.read_mapping(old, "")
            if doc.problems:
                raise error_for(doc.problems)
        new = change(old)
        if old is not None:
            text = edit_yaml(disk.data.decode("utf-8-sig"), old, new, normalize)
            if text is None:
                self.back_up(backup_name, disk, Reason.REWRITTEN)
            elif disk.data.startswith(BOM):
                text = "\ufeff" + text
        self.write(file, backup_name, dump_yaml(new) if text is None else text, disk)

    @contextmanager
    def refusing_changes(self, file: str) -> Iterator[None]:
        """Raise RegistryError if the file changes meanwhile, IoError for an OSError."""
        with blame(file):
            try:
                yield
            except FileChanged:
                raise RegistryError(
                    f"{file}: changed while Orchestra was writing it", "run the command again"
                ) from None


def save_codebase(home: str, codebase: Codebase) -> None:
    """Save a codebase's file; comments, unknown keys and what did not change stay.

    If that is not possible, the file is written anew and the old one backed up. Raises
    RegistryError for an invalid name or an old file that cannot be read, FileChanged if
    that is not the one that the codebase was loaded from, IoError.
    """

    def normalize(root: YamlNode) -> YamlNode:
        return CODEBASE_SCHEMA.write(CODEBASE_SCHEMA.read(Document(""), root, project=""))

    check_name("project", codebase.project)
    check_name("codebase", codebase.name)
    new = CODEBASE_SCHEMA.write(codebase)
    file = real_path(codebase_path(home, codebase.key))
    with RegistryTurn(home) as turn:
        name = turn.name_of(codebase.key, file)
        disk = read_disk(file)
        if codebase.digest and codebase.digest != sha256_of(disk.data):
            raise FileChanged(file)
        turn.edit(file, name, disk, lambda old: new, normalize)


def save_path(home: str, key: Key, path: str, is_local: bool) -> str:
    """Save a codebase's path where it has one, and return that file.

    Where it has none, or `is_local`, this is its local sister, which is made if there
    is none. Raises RegistryError, IoError.
    """
    local, shared = codebase_path(home, (key[0], f"{key[1]}.local")), codebase_path(home, key)

    def says_path(file: str) -> bool:
        return "path" in RegistryFile(home, file).parse_items()

    file = shared if not is_local and says_path(shared) and not says_path(local) else local

    def set_path(old: YamlNode) -> YamlNode:
        pairs = _retag(old, {}).value if old is not None else []
        items = {name.value: value for name, value in pairs}
        return _mapping_node({**items, "path": _text_node(path)})

    with RegistryTurn(home) as turn, turn.refusing_changes(file):
        real = real_path(file)
        turn.edit(real, turn.name_of(key, file), read_disk(real), set_path, lambda root: root)
    return file


def describe_registry() -> str:
    """Write a JSON Schema of registry files, for editors.

    It cannot tell one layer from another, so it requires none of their keys.
    """
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Orchestra's registry"}
    return json.dumps({**head, **LAYER_SCHEMA.describe()}, indent=2) + "\n"


def create_registry_file(home: str, file: str, root: YamlNode) -> bool:
    """Write a registry file unless there is one; return whether there was none.

    It begins with what tells editors its schema, which is kept up to date.
    """
    schema, comment = describe_registry().encode(), "# yaml-language-server: $schema="
    comment += os.path.relpath(schema_path(home), os.path.dirname(file))
    with RegistryTurn(home) as turn:
        if os.path.lexists(file):
            return False
        if read_disk(schema_path(home)).data != schema:
            save_private(schema_path(home), schema, turn.token, durable=False)
        with turn.refusing_changes(file):
            turn.write(file, turn.find_name(file), f"{comment}\n{dump_yaml(root)}", ABSENT)
    return True


def retire_codebase(home: str, key: Key) -> list[str]:
    """Move a codebase's files to the backups; return their paths there.

    The first is that of the YAML file, without which the others are nobody's. Raises
    RegistryError if there is none, IoError.
    """
    main, kept = codebase_path(home, key), []
    with RegistryTurn(home) as turn:
        for file in own_files(home, key):
            name, disk = turn.name_of(key, file), read_disk(real_path(file))
            if disk.kind != "file":
                if file == main:
                    raise RegistryError(f"{file}: expected a file, got {disk.noun}", "move it away")
                continue
            when = turn.back_up(name, disk, Reason.RETIRED)
            kept.append(os.path.join(backups_of(home, key), when, os.path.basename(file)))
            with turn.refusing_changes(file):
                if os.path.islink(file):
                    remove_private(file)  # its target stays: another registry may have it
                else:
                    with open_place(file, name) as place:
                        remove_file(place, disk, turn)
    return kept


def clear_registry(home: str) -> None:
    """Clean up after a command that was killed in its turn; raises IoError."""
    with RegistryTurn(home):
        pass


# ── 15 Manifests ──────────────────────────────────────────────────────────────

# What the manifests in a folder say. No program is run; each file is read once, 1 MiB
# of it at most, and one that is broken says nothing. Evidence is a condition on
# files, written as text and decided by `Folder.holds`:
#
#   mix.exs|test/*.exs               one of the files is there; * stands for any text
#   package.json engines node        JSON, TOML, YAML, INI: a value under these keys
#   mix.exs :credo                   other text: the words occur outside comment lines
#   Gemfile ~ ^ruby "(.*)"           any text: the pattern matches; ^, $ are a line's
#   setup.py + not pyproject.toml    the first holds, and the second does not
#   ruff.toml or setup.cfg flake8    one of the two holds; the first that does counts
#
# Patterns are kept as text, here and below: `re` compiles and keeps one at its first
# use, and commands that detect nothing start faster.


class Toml:
    """Reads the TOML of manifests: Python's own reader came with 3.11.

    Numbers and dates stay as written. What TOML forbids may be accepted.
    """

    BLANKS = r"(?:[ \t\r\n]+|#[^\n]*)*"  # comments count as such
    STRING = r""""(?:[^"\\\n]|\\.)*"|'[^'\n]*'"""
    KEY = r"[\w-]+"
    SCALAR = r"\d{4}-\d\d-\d\d [\d:.Z+-]+|[^\s,\]}#]+"
    MAX_DEPTH = 50

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def read(self) -> dict[str, Any]:
        """Read the whole text; raises ValueError."""
        root: dict[str, Any] = {}
        table = root
        while self._peek():
            if self._take("["):
                is_list = self.text.startswith("[", self.at)
                self.at += is_list
                *keys, last = self._read_keys()
                table = self._descend(root, keys)
                if is_list and isinstance(table.setdefault(last, []), list):
                    table[last].append({})
                table = self._descend(table, [last])
                if not self._take("]") or (is_list and not self._take("]")):
                    raise ValueError("expected ]")
            else:
                self._read_pair(table, 0)
        return root

    def _peek(self) -> str:
        """Skip blanks; return the next character, "" at the end."""
        self._match(self.BLANKS)
        return self.text[self.at : self.at + 1]

    def _take(self, mark: str) -> bool:
        is_next = self._peek() == mark
        self.at += is_next
        return is_next

    def _match(self, pattern: str) -> str:
        found = re.compile(pattern).match(self.text, self.at)
        if not found:
            raise ValueError("unexpected text")
        self.at = found.end()
        return found[0]

    def _descend(self, table: dict[str, Any], keys: list[str]) -> dict[str, Any]:
        for key in keys:
            value = table.setdefault(key, {})
            value = value[-1] if isinstance(value, list) and value else value
            if not isinstance(value, dict):
                raise ValueError(f"{key} is no table")
            table = value
        return table

    def _read_keys(self) -> list[str]:
        keys: list[str] = []
        while not keys or self._take("."):
            keys.append(self._read_string() if self._peek() in ('"', "'") else self._match(self.KEY))
            if len(keys) > self.MAX_DEPTH:
                raise ValueError("too deep")
        return keys

    def _read_pair(self, table: dict[str, Any], depth: int) -> None:
        *keys, last = self._read_keys()
        if not self._take("="):
            raise ValueError("expected =")
        self._descend(table, keys)[last] = self._read_value(depth + 1)

    def _read_value(self, depth: int) -> Any:
        start = self._peek()
        if depth > self.MAX_DEPTH:
            raise ValueError("too deep")
        if start in ('"', "'"):
            return self._read_string()
        if start not in ("[", "{"):
            word = self._match(self.SCALAR)
            return {"true": True, "false": False}.get(word, word)
        self.at += 1
        items: list[Any] = []
        table: dict[str, Any] = {}
        while not self._take("]" if start == "[" else "}"):
            if start == "[":
                items.append(self._read_value(depth + 1))
            else:
                self._read_pair(table, depth + 1)
            if not self._take(",") and self._peek() not in ("]", "}"):
                raise ValueError("expected a comma")
        return items if start == "[" else table

    def _read_string(self) -> str:
        quotes = self.text[self.at : self.at + 3]
        if quotes not in ('"""', "'''"):
            text = self._match(self.STRING)
            return self._unescape(text[1:-1]) if text[0] == '"' else text[1:-1]
        end = self.text.index(quotes, self.at + 3)
        for _ in range(2):  # the string may end with one or two quotes of its own
            end += self.text.startswith(quotes[0], end + 3)
        text = self.text[self.at + 3 : end].removeprefix("\n")
        self.at = end + 3
        return self._unescape(text) if quotes == '"""' else text

    @staticmethod
    def _unescape(text: str) -> str:
        """Replace escapes; they are JSON's, but for two, which stay as they are."""
        text = re.sub(r"\\\r?\n\s*", "", text)
        with suppress(ValueError):
            quoted = re.sub(r'(\\.)|"', lambda match: match[1] or '\\"', text)
            return str(json.loads(f'"{quoted}"', strict=False))
        return text


def tidy(text: str) -> str:
    """Make one line of text, at most 300 characters, that any YAML file can hold."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    return "".join(c for c in text if c.isprintable())[:300]


def strip_comments(text: str) -> str:
    """Remove comments and trailing commas from JSON."""
    for pattern in (r"//[^\n]*|/\*(?:[^*]|\*(?!/))*(?:\*/)?", r",(?=\s*[]}])"):
        text = re.sub(rf'("(?:[^"\\\n]|\\.)*"?)|{pattern}', lambda match: match[1] or "", text)
    return text


def read_ini(text: str) -> dict[str, dict[str, str]]:
    """Read sections of keys; the lines of a long value are joined by newlines."""
    sections: dict[str, dict[str, str]] = {}
    lines: dict[tuple[str, str], list[str]] = {}
    section = key = ""
    for line in text.split("\n"):
        words = line.strip()
        if words.startswith("[") and words.endswith("]"):
            section, key = words[1:-1].strip(), ""
            sections.setdefault(section, {})
        elif words and words[0] not in "#;":
            if line[0] not in " \t":
                name, *values = re.split("[=:]", words, maxsplit=1)
                key, words = name.strip(), "".join(values).strip()
            lines.setdefault((section, key), []).append(words)
    for (section, key), values in lines.items():
        sections.setdefault(section, {})[key] = "\n".join(values).strip()
    return sections


class Folder:
    """The names in a folder, and what its manifests say; raises IoError."""

    STRUCTURED = (".json", ".jsonc", ".toml", "Pipfile", ".yaml", ".yml", ".cfg", ".ini")
    MAX_MEMBERS = 1000
    MAX_YAML = 128 << 10  # characters, since its parser is slow
    MAX_NODES = 20000  # aliases expanded
    MAX_GLOB = 200  # characters
    MAX_LOOKS = 100000  # folders listed for globs, and the names in them

    def __init__(self, path: str, above: "Sequence[Folder]" = ()) -> None:
        with blame(path), os.scandir(path) as entries:
            self.names = sorted(entry.name for entry in entries if self._is_evidence(entry))
        self.path = path
        self._names = frozenset(self.names)
        self.above = above  # up to the repository's root, innermost first
        self._texts: dict[str, str] = {}
        self._values: dict[str, Any] = {}
        self._looks = 0

    @staticmethod
    def _is_evidence(entry: "os.DirEntry[str]") -> bool:
        """Return whether it is a file or a folder, and not a pipe."""
        try:
            return entry.is_file() or entry.is_dir()
        except OSError:  # a link to itself
            return False

    def find(self, *patterns: str) -> str:
        """Find the first name that matches the first pattern to match any."""
        import fnmatch

        for pattern in patterns:
            is_path, path = "/" in pattern, f"{self.path}/{pattern}"
            if pattern in self._names or (is_path and os.path.exists(path)):
                return pattern
            if set(pattern) & set("*?["):
                found = self.expand(pattern) if is_path else fnmatch.filter(self.names, pattern)
                if found:
                    return found[0]
        return ""

    def expand(self, glob: str) -> list[str]:
        """List the paths below that a glob names."""
        found = [""]
        for part in glob.removeprefix("./").strip("/").split("/"):
            steps = ((at, name) for at in found for name in self._match(at, part))
            found = [*map("/".join, itertools.islice(steps, self.MAX_MEMBERS))]
        return [path[1:] for path in found if os.path.exists(self.path + path)]

    def text(self, name: str) -> str:
        if name not in self._texts:
            self._texts[name] = ""
            with suppress(IoError):
                data = read_disk(f"{self.path}/{name}", 1 << 20).data
                self._texts[name] = data.decode("utf-8-sig", "replace")
        return self._texts[name]

    def value(self, name: str, *keys: str) -> Any:
        """Look up a value of a structured file; None where there is none."""
        if name not in self._values:
            self._values[name] = self._parse(name)
        value = self._values[name]
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def table(self, name: str, *keys: str) -> dict[str, Any]:
        """Look up a mapping, as `value` does; {} where there is none."""
        value = self.value(name, *keys)
        return value if isinstance(value, dict) else {}

    def texts(self, name: str, *keys: str) -> list[str]:
        """Look up the texts in a list, as `value` does; [] where there is none."""
        value = self.value(name, *keys)
        items = value if isinstance(value, list) else []
        return [item for item in items if isinstance(item, str)]

    def _parse(self, name: str) -> Any:
        text = self.text(name)
        if name.endswith((".json", ".jsonc")):
            return parse_object(text) or parse_object(strip_comments(text))
        with suppress(ValueError):
            if name.endswith((".toml", "Pipfile")):
                return Toml(text).read()
            if name.endswith((".yaml", ".yml")) and len(text) <= self.MAX_YAML:
                return self._plain(Document(name).compose(text), itertools.count())
        return read_ini(text) if name.endswith((".cfg", ".ini")) else {}

    def _plain(self, node: YamlNode, count: Iterator[int]) -> Any:
        if next(count) > self.MAX_NODES:
            raise ValueError("too much of it, or too many aliases")
        if node is None or isinstance(node.value, str):
            return node and node.value
        if node.id == "sequence":
            return [self._plain(item, count) for item in node.value]
        named = ((key.value, value) for key, value in node.value if key.id == "scalar")
        return {key: self._plain(value, count) for key, value in named}

    def members(self, globs: Sequence[str], manifest: str) -> "Iterator[Folder]":
        """Open the folders that globs of a workspace name, if they have a manifest.

        One that several links lead to is opened once.
        """
        import fnmatch

        globs = [glob for glob in globs if len(glob) <= self.MAX_GLOB][:100]
        excluded = [glob[1:].strip("./") for glob in globs if glob.startswith("!")]
        paths = dict.fromkeys(path for glob in globs if glob[:1] != "!" for path in self.expand(glob))
        members: dict[Optional[Identity], str] = {}
        for path in paths:
            place = f"{self.path}/{path}"
            is_excluded = any(fnmatch.fnmatch(path, glob) for glob in excluded)
            if not is_excluded and os.path.isfile(f"{place}/{manifest}"):
                members.setdefault(identity_of(place), place)
        return map(Folder, itertools.islice(members.values(), self.MAX_MEMBERS))

    def _match(self, above: str, part: str) -> list[str]:
        """List the names in a folder below that match one part of a glob."""
        import fnmatch

        if not set(part) & set("*?["):
            return [part] if part not in ("", "..") else []
        if self._looks > self.MAX_LOOKS:
            return []  # a glob of the world, or links in a circle
        with suppress(OSError, ValueError):
            names = sorted(os.listdir(f"{self.path}{above}"))
            self._looks += 1 + len(names)
            found = fnmatch.filter(names, part)
            return [n for n in found if n[0] != "." and n != "node_modules"]
        return []

    # Evidence

    def locate(self, condition: str) -> tuple[str, list[str], str]:
        """Find the file of a condition; also return its keys and its pattern."""
        where, _, pattern = condition.partition(" ~ ")
        names, *keys = where.split()
        return self.find(*names.split("|")), keys, pattern

    def holds(self, evidence: str) -> str:
        """Return the first file that evidence names; "" if it does not hold."""
        return next(filter(None, map(self._holds_all, evidence.split(" or "))), "")

    def _holds_all(self, conditions: str) -> str:
        source = ""
        for condition in conditions.split(" + "):
            is_wanted = not condition.startswith("not ")
            name, keys, pattern = self.locate(condition.removeprefix("not "))
            holds = self._search(name, pattern) if pattern else self._has(name, keys)
            if bool(name and holds) != is_wanted:
                return ""
            source = source or name
        return source

    def quote(self, evidence: str) -> str:
        """Return what the first condition of evidence leads to.

        That is the text under the keys, the rest of the line that the words begin, or
        the pattern's last group.
        """
        name, keys, pattern = self.locate(evidence.partition(" + ")[0])
        if not pattern and name.endswith(self.STRUCTURED):
            value = self.value(name, *keys)
            return value if isinstance(value, str) else ""
        words = self._whole_word(" ".join(keys)) + "[ \t]*" if keys else ""
        return self._search(name, pattern or rf"^[ \t]*{words}([^\s#][^\n]*)")

    def _search(self, name: str, pattern: str) -> str:
        found = re.search(pattern, self.text(name), re.MULTILINE)
        return found[found.lastindex or 0] if found else ""

    def _has(self, name: str, keys: list[str]) -> bool:
        if name.endswith(self.STRUCTURED):
            return not keys or self.value(name, *keys) is not None
        text = self.text(name) if keys else ""
        text = re.sub(r"(?m)^[ \t]*(?:#|//|;)[^\n]*", "", text)
        return all(re.search(self._whole_word(key), text) for key in keys)

    @staticmethod
    def _whole_word(word: str) -> str:
        """Make a pattern for a word that is no part of a longer one."""
        start = r"(?<![\w-])" if word[:1].isalnum() else ""
        return start + re.escape(word) + (r"(?![\w-])" if word[-1:].isalnum() else "")


class Found(NamedTuple):
    """Something found: a command, or text to be read, and the file it is from."""

    name: str
    text: str
    source: str


class Row(NamedTuple):
    """What evidence shows; {} in `text` stands for what `quote` finds by it.

    Without `evidence`, the ecosystem's sign counts. A test's text may end in brackets,
    with what is added to run one test. Four names are not commands: `description`,
    `type` (of the codebase), `version` (of the language) and `tool` (what else it is
    built with).
    """

    name: str
    text: str
    evidence: str = ""


NO_COMMANDS = ("description", "type", "version", "tool")


def spell_tests(command: str, source: str) -> Iterator[Found]:
    """Spell how all tests are run, and how one: with what stands in brackets."""
    parts = re.fullmatch(r"(?s)(.*) \[(.*)\]", command)
    yield Found("test", parts[1] if parts else command, source)
    if parts:
        yield Found("one test", f"{parts[1]} {parts[2]}", source)


def shorten_version(text: str) -> str:
    """Make 3.10+ of ">=3.10,<4", 18 of ^18.0.0; "" where no version is named."""
    if re.match(r"[a-z]+:", text):  # catalog: or workspace:
        return ""
    versions = []
    for either in text.split("||")[:3]:
        found = re.search(r"([><^~=]{0,2}) {0,3}v?(\d[\w.]*)", either)
        if found and not found[1].startswith("<"):
            operator = ">" if found[1] in ("~>", "~=") else found[1].rstrip("=") or "="
            numbers = [part for part in found[2].split(".") if part not in ("", "x")]
            if operator == "^" and numbers[1:2] in ([], ["0"]):
                numbers = numbers[:1]
            elif operator in "^~>":
                numbers = numbers[: 3 if operator == ">" else 2]
            is_least = operator == ">" or (operator == "^" and len(numbers) > 1)
            versions.append(".".join(numbers) + "+" * is_least)
    return " or ".join(dict.fromkeys(versions))


# ── 16 Scripts ────────────────────────────────────────────────────────────────

# What a file lets one run by name, and which of it builds or tests: a Makefile's
# targets, a justfile's recipes, npm's scripts. A script is proposed by its name and
# judged by its text: one that would go on watching, or does nothing, is passed over,
# and one that rewrites files is labelled so.
#
# A new name for what builds or tests is a word in Script.NAMES; a new task runner is
# a function that returns Scripts, in TASK_RUNNERS.


class Script:
    """One script: its name, and the text of its commands and of those it calls."""

    NAMES = {  # what a command's script may be called, best first; : _ . count as -
        "install": "install-dev dev-install setup-dev dev-setup setup bootstrap install deps init",
        "build": "build compile build-dev dev-build",
        "test": "test tests test-run test-once test-unit unit-test unit-tests unit test-lib test-vitest test-jest",
        "lint": (
            "lint lint-check check-lint lint-ci eslint test-eslint test-lint ruff"
            " flake8 cs cs-check check-cs check-style phpcs"
        ),
        "format": (
            "format fmt format-fix fix-format format-write prettier black"
            " fix lint-fix cs-fix fix-cs fix-style phpcbf pint"
        ),
        "type check": (
            "typecheck type-check check-types types tsc types-check lint-types"
            " test-types lint-typecheck test-typecheck typing mypy pyright phpstan psalm"
            " stan static-analysis analyse analyze"
        ),
        "run": "dev develop start serve run runserver",
        "check": "check verify ci precommit check-all validate",
    }
    CALLERS = (
        *("npm", "pnpm", "yarn", "bun", "run-s", "run-p", "npm-run-all"),
        *("npm-run-all2", "make", "$(MAKE)", "just", "task", "composer", "deno", "melos"),
    )
    INSTALLS = (
        r"\b(?:(?:npm|pnpm|yarn|bun|bundle|composer|poetry|pdm|pip3?|pipenv|mise)"
        r" (?:install|ci|sync|i)|pre-commit install"
        r"|uv (?:sync|pip|venv)|go mod download|mix deps\.get)\b"
    )
    REWRITES = (
        r"--(?:fix(?:-only|-unsafely)?|autocorrect(?:-all)?|autofix)(?![\w-])"
        r"|--(?:write|apply|in-?place)(?![\w-])"
        r"|\b(?:gofmt|goimports|gofumpt|prettier|shfmt) [^|]{0,99}-w\b"
        r"|\brubocop [^|]{0,99}-[aA]\b"
        r"|\b(?:sed|clang-format|yapf|autopep8) [^|]{0,99}-i\b"
        r"|\b(?:black|isort|ruff format|cargo fmt|go fmt|dart format|mix format)\b"
        r"|\b(?:terraform fmt|docformatter)\b"
        r"|\b(?:php-cs-fixer fix|phpcbf|pint|rector process|mago (?:format|fmt))\b"
    )
    CHECKS = (
        r"-(?:check|-diff|-test\b|-dry-run|-version|-help|-list-different)"
        r"|--output[ =]none"
        r"|\b(?:gofmt -l|(?:isort|prettier) -c)\b"
    )
    KINDS = {  # what a script called `check` does, by the words in it
        "test": r"\b(?:test|tests|pytest|vitest|jest|mocha|ava|tox|nox)\b",
        "type check": (
            r"\b(?:tsc|vue-tsc|tsgo|svelte-check|astro check|mypy|pyright|ty)\b"
            r"|\b(?:type-?check|check-types|phpstan|psalm)\b"
        ),
        "lint": r"\b(?:(?:es|ox|py)?lint|biome|ruff|flake8|xo|standard|clippy)\b",
        "format": r"\b(?:prettier|black|fmt|format)\b",
    }
    CURES = (  # what makes a program run once, and the words with which it does anyway
        ("vitest", "--run", "run --no-watch --watch=false related bench --version"),
        ("react-scripts", "--watchAll=false", "--ci build start eject CI=true"),
        ("ng", "--watch=false", "--no-watch build serve lint e2e"),
    )

    MAX_TEXT = 20_000  # characters that are read

    def __init__(self, name: str, bodies: Mapping[str, str]) -> None:
        self.name = name
        body = bodies[name][: self.MAX_TEXT]
        self.own = self._split(body)
        self.last = self.own[-1] if self.own else ""  # gets further arguments
        self.text = "\n".join([body, *self._expand(bodies)])[: self.MAX_TEXT]
        self.commands = self._split(self.text)

    @classmethod
    def call_of(cls, command: str) -> list[str]:
        """Return the words after a program that calls scripts; [] for another one."""
        caller, *words = re.sub("^([a-z]+) run ", r"\1 ", command).split()
        return words if caller in cls.CALLERS else []

    def _expand(self, bodies: Mapping[str, str]) -> Iterator[str]:
        """Iterate over the scripts that it calls, with the arguments it gives."""
        done = {self.name}
        for words in map(self.call_of, self.own):
            names = [word for word in dict.fromkeys(words) if word in bodies and word not in done]
            arguments = " ".join(words[words.index(names[0]) + 1 :]) if len(names) == 1 else ""
            done.update(names)
            yield from (f"{bodies[name]} {arguments}" for name in names)

    @staticmethod
    def _split(text: str) -> list[str]:
        parts = map(str.strip, re.split(r"&&|\|\||[;\n]", text))
        return [*filter(None, parts)]

    @property
    def does_nothing(self) -> bool:
        """Whether it only says something, as npm's "no test specified" does."""
        own = (command.lstrip("@-+ ").partition(" ")[0] for command in self.commands)
        return all(word in ("echo", "exit", "true", ":", "printf") for word in own)

    @property
    def rewrites(self) -> bool:
        found = filter(re.compile(self.REWRITES).search, self.commands)
        return not all(re.search(self.CHECKS, command) for command in found)

    @property
    def only_checks(self) -> bool:
        checks = re.search(self.CHECKS, self.text) or "biome format" in self.text
        return bool(checks) and not self.rewrites

    @property
    def watches(self) -> bool:
        """Whether it is made to go on until it is stopped."""
        text = self.text.replace("pnpm -w", "pnpm")
        options = r"(?m)(?:^| )(?:--watch(?:All|=true)?|-w|watch|--stub)(?: |$)"
        return bool(re.search(options, text))

    @property
    def cure(self) -> Optional[str]:
        """What makes a test script run once: "" for nothing, None if nothing does."""
        cures: dict[str, str] = {}
        for command in self.commands:
            words = set(command.split())
            for program, cure, once in self.CURES:
                if program in words and words.isdisjoint((cure, *once.split())):
                    cures.setdefault(command, cure)
        is_curable = not self.watches and all(command == self.last for command in cures)
        return next(iter(cures.values()), "") if is_curable else None

    def serves(self, command: str) -> bool:
        """Return whether it is what a command of this name should be."""
        if self.does_nothing or (self.watches and command not in ("run", "format")):
            return False
        if command == "install":
            return bool(re.search(self.INSTALLS, self.text))
        if command == "type check" and self.name in ("types", "analyze"):
            return bool(re.search(self.KINDS[command], self.text))
        if command == "format" and self.name in ("fix", "prettier"):
            return self.rewrites
        if command == "run":
            builders = r"\b(?:tsc|tsup|rollup|unbuild|tsdown|esbuild|babel)\b"
            copying = r"[@-]*(?:sudo )?(?:cp|mv|ln|install) "  # what was built
            only_builds = self.watches and re.search(builders, self.text)
            return not only_builds and not re.match(copying, self.last)
        if command == "check":
            acts = r"\b(?:publish|deploy|release|upload|lint-staged)\b"
            return not re.search(acts, self.text)
        return command != "test" or self.cure is not None


class Scripts(NamedTuple):
    """What a file lets one run by name. {} in `call` is for the name."""

    source: str
    call: str
    bodies: Mapping[str, str]
    more: str = ""  # what comes between a call and further arguments, if any can

    def script(self, name: str) -> Script:
        return Script(name, self.bodies)

    def pick(self) -> Iterator[tuple[str, Script]]:
        """Iterate over the commands, and the script for each."""
        called = {re.sub("[_:.]", "-", name): name for name in [*self.bodies][::-1]}
        taken: dict[str, Script] = {}
        for command, names in Script.NAMES.items():
            known = [called[name] for name in names.split() if name in called]
            scripts = [script for script in map(self.script, known) if script.serves(command)]
            if scripts:  # the first of the fittest
                flaws = {"format": "only_checks", "test": "cure"}
                flaw = flaws.get(command, "rewrites")
                taken[command] = min(scripts, key=lambda one: bool(getattr(one, flaw)))
        if "check" in taken:
            check = taken["check"].text
            kinds = [k for k, words in Script.KINDS.items() if re.search(words, check)]
            if len(kinds) == 1:
                taken.setdefault(kinds[0], taken["check"])
                del taken["check"]
        yield from taken.items()

    def find(self) -> Iterator[Found]:
        for command, script in self.pick():
            note = ""
            if command == "format":
                note = " (checks only)" * script.only_checks
            elif command not in ("run", "install", "build"):
                note = " (rewrites files)" * script.rewrites
            cure = script.cure if command in ("test", "check") else ""
            yield Found(command + note, self.spell(script, cure or ""), self.source)

    def leaves(self, script: Script) -> Iterator[Script]:
        """Iterate over the scripts that one comes down to, itself if it calls none."""
        waiting, seen = [script], {script.name}
        while waiting:
            script = waiting.pop()
            own = (command for command in script.own if command != "bun test")  # bun's
            calls = map(Script.call_of, own)
            names = [call[0] for call in calls if len(call) == 1 and call[0] in self.bodies]
            if not names:
                yield script
            new = [name for name in dict.fromkeys(names) if name not in seen][:20]
            seen.update(new)
            waiting += map(self.script, new if len(seen) < 100 else ())

    def spell(self, script: Script, arguments: str = "") -> str:
        """Spell the command that runs a script, with arguments if it takes any."""
        line = self.call.replace("{}", script.name)
        line = re.sub("^(npm|pnpm|yarn) run test$", r"\1 test", line)
        return line + (self.more and self.more + arguments) if arguments else line


# Task runners


def flatten(value: Any) -> str:
    """Join all texts in a value, by lines."""
    texts: list[str] = []
    waiting = [value]  # not recursion: JSON may be nested deeper than Python calls
    while waiting:
        item = waiting.pop()
        if isinstance(item, (dict, list)):
            waiting += [*(item.values() if isinstance(item, dict) else item)][::-1]
        elif isinstance(item, str):
            texts.append(item)
    return "\n".join(texts)


def read_scripts(folder: Folder, call: str, place: str) -> Scripts:
    """Read a table of scripts; its place is written as in evidence."""
    source, keys, _ = folder.locate(place)
    table = folder.table(source, *keys)
    return Scripts(source, call, {name: flatten(body) for name, body in table.items()})


def read_makefile(folder: Folder) -> Scripts:
    """Read the targets of a Makefile; what they need counts as called."""
    name = folder.find("GNUmakefile", "makefile", "Makefile")
    lines: dict[str, list[str]] = {}
    for rule in re.split(r"\n(?=[^ \t\n#])", f"\n{folder.text(name)}"):
        head, *body = rule.split("\n")
        targets, colon, rest = head.partition(":")
        if colon and rest[:1] != "=" and not set(targets) & set("=$%("):
            needs = rest.strip(":").partition("#")[0].strip()
            recipe = [f"make {needs}"] if needs else []
            recipe += [line for line in body if line[:1] == "\t"]
            for target in targets.split()[:20]:
                lines.setdefault(target, []).extend(recipe)
    bodies = {target: "\n".join(lines[target]) for target in lines if target[0] != "."}
    return Scripts(name, "make {}", bodies)


def read_justfile(folder: Folder) -> Scripts:
    """Read the recipes of a justfile that need no arguments."""
    name = folder.find("[jJ]ustfile", "JUSTFILE", ".justfile")
    lines: dict[str, list[str]] = {}
    attributes = ""
    for rule in re.split(r"\n(?=[^ \t\n])", f"\n{folder.text(name)}"):
        line, *body = rule.split("\n")
        if line.startswith("["):
            attributes += line
            continue
        bare = re.sub(r"\"[^\"]*\"|'[^']*'", "x", line)
        head, colon, rest = bare.lstrip("@").partition(":")
        recipe, *parameters = head.split() or [""]
        is_rule = colon and rest[:1] != "=" and recipe[:1].isalpha()
        is_free = all("=" in word or word[0] == "*" for word in parameters)
        waits = recipe == "run" and parameters  # for a name
        if is_rule and is_free and not waits and "private" not in attributes:
            needs = re.sub("[()]", " ", rest.partition("#")[0]).strip()
            lines.setdefault(recipe, [f"just {needs}"] if needs else []).extend(body)
        attributes = attributes if line[:1] == "#" else ""
    bodies = {recipe: "\n".join(body) for recipe, body in lines.items()}
    return Scripts(name, "just {}", bodies)


def read_taskfile(folder: Folder) -> Scripts:
    name = folder.find("[Tt]askfile.yml", "[Tt]askfile.yaml", "Taskfile.dist.y*ml")
    bodies: dict[str, str] = {}
    for task, value in folder.table(name, "tasks").items():
        table = value if isinstance(value, dict) else {"cmds": value}
        if table.get("internal") != "true" and "requires" not in table:
            needs = flatten(table.get("deps")).replace("\n", " ")
            own = flatten([table.get("cmds"), table.get("cmd")])
            bodies[task] = f"task {needs}\n{own}" if needs else own
    return Scripts(name, "task {}", bodies)


def read_mise(folder: Folder) -> Scripts:
    name = folder.find("mise.toml", ".mise.toml", ".config/mise.toml", "mise/config.toml")
    files = folder.texts(name, "task_config", "includes")
    files = [file for file in files if file.endswith(".toml") and ".." not in file]
    tables = [folder.table(name, "tasks"), *map(folder.table, files[:9])]
    bodies = {
        task: flatten(value)
        for table in tables
        for task, value in table.items()
        if not (isinstance(value, dict) and "usage" in value)
    }
    return Scripts(name, "mise run {}", bodies)


# The first that has a command counts.
TASK_RUNNERS = (read_justfile, read_taskfile, read_mise, read_makefile)


# ── 17 Node and Python ────────────────────────────────────────────────────────

# Two ecosystems in which the package manager decides how a command is spelled. A new
# one of Node is a row in Node.MANAGERS; one of Python is a row in Python.MANAGERS,
# with its ways to install in INSTALLS and, if it has them, its scripts in SCRIPTS and
# its lists of requirements in `_list_requirements`.

# Node


class Node:
    """A folder with a package.json: its package manager, scripts and packages."""

    MANAGERS = {
        # What comes before further arguments of a script, how it runs the program of a
        # package and a script of one package of a workspace, and its lock files.
        "pnpm": (" ", "pnpm exec ", "pnpm --filter NAME run SCRIPT", "pnpm-lock.yaml|pnpm-workspace.yaml"),
        "yarn": (" ", "yarn ", "yarn workspace NAME run SCRIPT", "yarn.lock|.yarnrc.yml"),
        "bun": (" ", "bunx ", "bun run --filter NAME SCRIPT", "bun.lock|bun.lockb"),
        "npm": (" -- ", "npx ", "npm run SCRIPT -w NAME", "package-lock.json|npm-shrinkwrap.json"),
    }
    ONE_TEST = (  # test runners, how each takes one file, or one name beside its files
        ("vitest", "path/to/file.test.{}", '-t "name"'),
        ("jest", "path/to/file.test.{}", '-t "name"'),
        ("react-scripts", "path/to/file.test.{}", '-t "name"'),
        ("playwright", "path/to/file.spec.{}", '-g "name"'),
        ("mocha", "path/to/test.{}", '-g "name"'),
        ("ava", "path/to/test.{}", '--match "name"'),
        ("ng", "--include path/to/file.spec.{}", ""),
        ("--test", "path/to/file.test.{}", ""),  # of Node itself
        ("tap", "path/to/test.{}", ""),
    )
    FRAMEWORKS = (  # a package, its title, and the type of what is built with it
        ("typescript", "TypeScript", ""),
        ("expo", "Expo", "mobile"),
        ("react-native", "React Native", "mobile"),
        ("@capacitor/core", "Capacitor", "mobile"),
        ("nativescript", "NativeScript", "mobile"),
        ("next", "Next.js", "frontend"),
        ("nuxt", "Nuxt", "frontend"),
        ("@sveltejs/kit", "SvelteKit", "frontend"),
        ("astro", "Astro", "frontend"),
        ("@angular/core", "Angular", "frontend"),
        ("react", "React", "frontend"),
        ("vue", "Vue", "frontend"),
        ("svelte", "Svelte", "frontend"),
        ("preact", "Preact", "frontend"),
        ("solid-js", "Solid", "frontend"),
        ("lit", "Lit", "frontend"),
        ("ember-source", "Ember", "frontend"),
        ("express", "Express", "backend"),
        ("fastify", "Fastify", "backend"),
        ("koa", "Koa", "backend"),
        ("hono", "Hono", "backend"),
        ("@nestjs/core", "NestJS", "backend"),
        ("@hapi/hapi", "hapi", "backend"),
    )

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.manager, self.manager_source, self.manager_version = self._find_manager()
        self.more, self.exec, self.call_member, _ = self.MANAGERS[self.manager]
        dev = folder.table("package.json", "devDependencies")
        self.packages = {**dev, **folder.table("package.json", "dependencies")}

    def _find_manager(self) -> tuple[str, str, str]:
        """Find the one that a package.json names, or else whose lock is nearest."""
        folders = (self.folder, *self.folder.above)
        for place in folders:
            named = place.value("package.json", "packageManager")
            name, _, version = (named if isinstance(named, str) else "").partition("@")
            if name in self.MANAGERS:
                return name, "package.json", version
        for place in folders:
            for manager, (*_, locks) in self.MANAGERS.items():
                if place.holds(locks):
                    return manager, place.holds(locks), ""
        return "npm", "package.json", ""

    def read(self) -> Iterator[Found]:
        yield Found("install", f"{self.manager} install", self.manager_source)
        bodies = {
            name: body
            for name, body in self.folder.table("package.json", "scripts").items()
            if isinstance(body, str) and name not in Script.NAMES["install"].split()
        }
        scripts = Scripts("package.json", f"{self.manager} run {{}}", bodies, self.more)
        yield from scripts.find()
        yield from self._find_one_test(scripts)
        for call, place in (
            ("turbo run {}", "turbo.json tasks"),
            ("turbo run {}", "turbo.json pipeline"),
            ("nx run-many -t {}", "nx.json targetDefaults"),
        ):
            source, keys, _ = self.folder.locate(place)
            tasks = dict.fromkeys(self.folder.table(source, *keys), call)
            yield from Scripts(source, self.exec + call, tasks).find()
        is_workspace = self.folder.holds("nx.json|turbo.json|lerna.json|pnpm-workspace.yaml")
        for name, command, config in (
            ("test", "vitest run", "vitest.config.*"),
            ("test", "jest", "jest.config.*"),
            ("lint", "eslint .", "eslint.config.*"),
        ):
            source = self.folder.find(config)
            if source and not is_workspace and command.partition(" ")[0] in self.packages:
                yield Found(name, self.exec + command, source)
        yield from self._find_tools()

    def _find_one_test(self, scripts: Scripts) -> Iterator[Found]:
        whole = dict(scripts.pick()).get("test")
        leaves = [*scripts.leaves(whole)] if whole else []
        runners = {name for name, _, _ in self.ONE_TEST}
        testing = [leaf for leaf in leaves if runners & {*leaf.last.split()}]
        script = testing[0] if len(testing) == 1 else whole if leaves == [whole] else None
        if not script:
            return
        words = script.last.split()
        is_typed = self.folder.find("tsconfig.json") or "typescript" in self.packages
        suffix = "ts" if is_typed else "js"
        for runner, file, name in self.ONE_TEST:
            if runner in words:
                rest = words[words.index(runner) + 1 :]
                files = {
                    word
                    for before, word in zip([runner, *rest], rest)
                    # A word after an option may be its value.
                    if word[0] != "-"
                    if before == runner or before[0] != "-" or "=" in before
                }
                arguments = name if files - {"run", "test", "watch"} else file.format(suffix)
                if arguments:
                    call = scripts.spell(script, f"{script.cure or ''} {arguments}".strip())
                    yield Found("one test", call, "package.json")
                return
        if any(line.startswith("bun test") for line in script.commands):
            yield Found("one test", f"bun test path/to/file.test.{suffix}", "package.json")

    def _find_tools(self) -> Iterator[Found]:
        if self.manager != "npm":
            version = shorten_version(self.manager_version).partition(".")[0]
            tool = f"{self.manager} {version}".rstrip()
            yield Found("tool", tool, self.manager_source)
        used = self.folder.table("package.json", "dependencies")
        for package, name, kind in self.FRAMEWORKS:
            if package in (used if kind == "backend" else self.packages):
                version = self.packages[package]
                version = shorten_version(version) if isinstance(version, str) else ""
                yield Found("tool", f"{name} {version}".rstrip(), "package.json")


# Python


class Python:
    """A Python project: what makes its environment, and the packages that are in it.

    Each package has the place that asks for it: "extra dev", "group test", "file
    requirements-dev.txt", "env docs" (of Hatch), or "" for the project itself.
    """

    TOML = "pyproject.toml"
    ONE_TEST = "path/to/test_file.py::test_name"
    MANAGERS = (  # each with its evidence
        ("uv", "uv.lock"),
        ("poetry", "poetry.lock"),
        ("pdm", "pdm.lock"),
        ("pipenv", "Pipfile"),
        ("pixi", "pixi.lock"),
        ("uv", "pyproject.toml tool uv"),
        ("poetry", "pyproject.toml tool poetry"),
        ("pdm", "pyproject.toml tool pdm dev-dependencies"),
        ("hatch", "pyproject.toml tool hatch envs or hatch.toml"),
        ("uv", r"[jJ]ustfile ~ \buv run\b or Makefile ~ \buv run\b"),
    )
    TITLES = {"poetry": "Poetry", "pdm": "PDM", "pipenv": "Pipenv", "hatch": "Hatch"}
    INSTALLS = {  # by the manager, and the kind of place that asks for the test runner
        "uv": "uv sync",
        "uv group": "uv sync --group {}",
        "uv extra": "uv sync --extra {}",
        "poetry": "poetry install",
        "poetry optional": "poetry install --with {}",
        "poetry extra": "poetry install --extras {}",
        "pdm": "pdm install",
        "pdm extra": "pdm install -G {}",
        "pipenv": "pipenv install --dev",
        "pixi": "pixi install",
        " extra": "pip install -e '.[{}]'",
        " group": "pip install -e . --group {}",
        " file": "pip install -r {}",
    }
    PYTEST = (
        "pytest.ini or pyproject.toml tool pytest or setup.cfg tool:pytest"
        " or tox.ini pytest or conftest.py|tests/conftest.py|test/conftest.py"
    )
    TOOLS = (
        Row("lint", "ruff check .", "pyproject.toml tool ruff or ruff.toml|.ruff.toml"),
        Row("lint", "flake8", ".flake8 or setup.cfg flake8 or tox.ini flake8"),
        Row("format", "ruff format .", "pyproject.toml tool ruff format"),
        Row("format", "black .", "pyproject.toml tool black"),
        Row("type check", "mypy", "mypy.ini|.mypy.ini or pyproject.toml tool mypy or setup.cfg mypy"),
        Row("type check", "ty check", "pyproject.toml tool ty or ty.toml"),
        Row("type check", "pyright", "pyrightconfig.json or pyproject.toml tool pyright"),
        Row("type check", "basedpyright", "pyproject.toml tool basedpyright"),
    )
    SCRIPTS = (  # how a script is run, and the table it is in
        ("poe {}", "pyproject.toml tool poe tasks"),
        ("task {}", "pyproject.toml tool taskipy tasks"),
        ("pdm run {}", "pyproject.toml tool pdm scripts"),
        ("pixi run {}", "pyproject.toml tool pixi tasks"),
        ("pixi run {}", "pixi.toml tasks"),
        ("pipenv run {}", "Pipfile scripts"),
    )

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        places = (folder, *folder.above)
        self.manager, self.manager_source = next(
            (
                (manager, place.holds(evidence))
                for manager, evidence in self.MANAGERS
                for place in (places if evidence.endswith(".lock") else places[:1])
                if place.holds(evidence)
            ),
            ("", ""),
        )
        self.prefix = "" if self.manager in ("", "hatch") else f"{self.manager} run "
        envs = folder.table(self.TOML, "tool", "hatch", "envs")
        envs = envs or folder.table("hatch.toml", "envs")
        self.hatch = {name: env for name, env in envs.items() if isinstance(env, dict)}
        self.packages: dict[str, str] = {}
        for place, requirements in self._list_requirements():
            if not re.fullmatch(r"[\w ./-]*", place):  # it becomes part of a command
                continue
            for text in requirements:
                found = re.match(r"[\w.-]+", text.strip())
                if found:
                    name = re.sub("[_.]", "-", found[0].lower())
                    self.packages.setdefault(name, place)

    def _list_requirements(self) -> Iterator[tuple[str, Iterable[str]]]:
        """List the places that ask for packages, and what each asks for."""
        folder, toml = self.folder, self.TOML
        yield "", folder.texts(toml, "project", "dependencies")
        groups = folder.table(toml, "dependency-groups")
        for group in sorted(groups, key=lambda name: name != "dev"):
            yield f"group {group}", folder.texts(toml, "dependency-groups", group)
            items = groups[group] if group == "dev" and isinstance(groups[group], list) else ()
            included = {str(item.get("include-group")): None for item in items if isinstance(item, dict)}
            for other in included:
                yield "group dev", folder.texts(toml, "dependency-groups", other)
        yield "group dev", folder.texts(toml, "tool", "uv", "dev-dependencies")
        yield "", folder.table(toml, "tool", "poetry", "dependencies")
        yield "group dev", folder.table(toml, "tool", "poetry", "dev-dependencies")
        poetry = ("tool", "poetry", "group")
        for group in folder.table(toml, *poetry):
            is_optional = folder.value(toml, *poetry, group, "optional") is True
            kind = "optional" if is_optional else "group"
            yield f"{kind} {group}", folder.table(toml, *poetry, group, "dependencies")
        for kind, *keys in (
            ("group", "tool", "pdm", "dev-dependencies"),
            ("extra", "project", "optional-dependencies"),
        ):
            for name in folder.table(toml, *keys):
                yield f"{kind} {name}", folder.texts(toml, *keys, name)
        yield "", folder.table("Pipfile", "packages")
        yield "", folder.table("Pipfile", "dev-packages")
        names = [f"requirements/{name}.txt" for name in ("dev", "test", "tests")]
        files = [*folder.names, *filter(folder.find, names)]
        files = [f for f in files if re.match(r"[\w-]*requirements[\w/-]*\.txt$", f)]
        for file in sorted(files, key=lambda name: not re.search("dev|test", name)):
            yield f"file {file}", folder.text(file).split("\n")
        for name, env in self.hatch.items():
            texts = flatten([env.get("dependencies"), env.get("extra-dependencies")])
            yield f"env {name}", texts.split("\n")
        yield from self._list_setuptools()

    def _list_setuptools(self) -> Iterator[tuple[str, Iterable[str]]]:
        options = self.folder.table("setup.cfg", "options")
        yield "", str(options.get("install_requires", "")).split("\n")
        extras_of = self.folder.table("setup.cfg", "options.extras_require")
        for extra, names in extras_of.items():
            yield f"extra {extra}", str(names).split("\n")
        text = self.folder.text("setup.py")
        extras = re.search(r"[\"'](dev|develop|tests?|testing)[\"'](?: ?:|\])", text)
        place = f"extra {extras[1]}" if extras else ""
        yield place, re.findall(r"[\"']([a-z][\w-]*)", text)

    def read(self) -> Iterator[Found]:
        yield from self._find_scripts()
        sessions = self._read_noxfile()
        if not self.manager:  # else its environment is used first
            yield from self._find_sessions(sessions)
        yield from self._find_install()
        yield from self._find_tests()
        if "hatch-static-analysis" in self.hatch:
            yield Found("lint", "hatch fmt --check", self.manager_source)
            yield Found("format", "hatch fmt", self.manager_source)
        for row in self.TOOLS:
            source = self.folder.holds(row.evidence)
            if source:
                yield Found(row.name, self.spell(row.text), source)
        if "ruff" in self.packages:
            yield Found("lint", self.spell("ruff check ."), self.TOML)
        hooks = ".pre-commit-config.yaml"
        for program in ("pre-commit", "prek") if self.folder.find(hooks) else ():
            call = re.escape(f"{self.prefix}{program}")
            is_called = self.folder.holds(f"Makefile ~ {call} or [jJ]ustfile ~ {call}")
            if program in self.packages or is_called:
                yield Found("before a commit", f"{self.prefix}{program} run --all-files", hooks)
        yield from self._find_sessions(sessions)
        yield from self._find_tox()
        if self.manager:
            title = self.TITLES.get(self.manager, self.manager)
            yield Found("tool", title, self.manager_source)

    def spell(self, command: str) -> str:
        """Spell a command for the project's environment.

        Return "" if its program is not there, or is what pre-commit runs.
        """
        program, _, rest = command.partition(" ")
        if program in self.packages:
            kind, _, place = self.packages[program].partition(" ")
            envs = ("default", "lint", "style", "types", "typing")
            if kind == "env" and place not in envs:
                return ""
            prefix = f"hatch run {place}:" if kind == "env" else self.prefix
            if program == "mypy":
                command = f"{program} {rest or self._find_sources()}"
            command = (prefix + command).replace("hatch run default:", "hatch run ")
            return command.strip()
        is_elsewhere = self.folder.holds(rf".pre-commit-config.yaml ~ \b{program}\b")
        if is_elsewhere or program not in ("ruff", "black", "ty"):
            return ""
        return f"uvx {command}" if self.manager == "uv" else "" if self.manager else command

    def _find_sources(self) -> str:
        """Find what mypy is to check, if its configuration does not say."""
        folder = self.folder
        table = folder.table(self.TOML, "tool", "mypy")
        for file in ("mypy.ini", "setup.cfg"):
            table = table or folder.table(file, "mypy")
        if {"files", "packages", "modules"} & set(table):
            return ""
        name = folder.value(self.TOML, "project", "name")
        package = re.sub("[-.]", "_", name).lower() if isinstance(name, str) else ""
        return folder.find("src", *[package] * package.isidentifier()) or "."

    def _find_scripts(self) -> Iterator[Found]:
        for call, place in self.SCRIPTS:
            prefix = "" if call.startswith(("pdm", "pixi", "pipenv")) else self.prefix
            yield from read_scripts(self.folder, prefix + call, place).find()
        source = self.folder.find("hatch.toml", self.TOML)
        for name, env in self.hatch.items():
            scripts = env.get("scripts")
            table = scripts if isinstance(scripts, dict) else {}
            bodies = {script: flatten(body) for script, body in table.items()}
            env_name = re.sub(r"[^\w.-]", "", name)  # it becomes part of a command
            call = f"hatch run {env_name}:{{}}".replace("default:", "")
            kinds = ("test", "lint", "format", "type check")
            for item in Scripts(source, call, bodies).find():
                if name in ("types", "typing") and item.name == "check":
                    yield item._replace(name="type check")
                elif name == "default" or item.name.startswith(kinds):
                    yield item

    def _read_noxfile(self) -> Scripts:
        bodies: dict[str, str] = {}
        decorators = ""
        for part in re.split(r"\n(?=@|def )", "\n" + self.folder.text("noxfile.py")):
            if part.startswith("@"):
                decorators += part
            elif part.startswith("def "):
                named = re.search(r"\bname=[\"']([\w.-]+)", decorators)
                name = named[1] if named else part[4:].partition("(")[0].strip()
                if re.search(r"@(?:\w+\.)?session\b", decorators):
                    bodies[name] = f"{bodies.get(name, '')}\n{part}"
                decorators = ""
        return Scripts("noxfile.py", "nox -s {}", bodies)

    def _find_sessions(self, sessions: Scripts) -> Iterator[Found]:
        yield from sessions.find()
        for command, script in sessions.pick():
            if command == "test" and "posargs" in script.text:
                call = f"{sessions.spell(script)} -- {self.ONE_TEST}"
                yield Found("one test", call, sessions.source)
        defaults = "noxfile.py ~ options[.]sessions|default=False"
        if sessions.bodies and self.folder.holds(defaults):
            yield Found("check", "nox", sessions.source)

    def _find_install(self) -> Iterator[Found]:
        folder, manager, installs = self.folder, self.manager, self.INSTALLS
        places = map(self.packages.get, ("pytest", "ruff", "mypy", "tox"))
        place = next(filter(None, places), "")
        kind, _, name = place.partition(" ")
        defaults = folder.value(self.TOML, "tool", "uv", "default-groups")
        groups = defaults if isinstance(defaults, list) else ()
        if manager and (place == "group dev" or defaults == "all" or name in groups):
            kind = ""
        is_package = folder.holds("pyproject.toml project or setup.py or setup.cfg metadata")
        text = installs.get(manager, "")
        if not manager and is_package:
            text = "pip install -e ."
        elif not manager and folder.find("requirements.txt"):
            text = "pip install -r requirements.txt"
        text = installs.get(f"{manager} {kind}", text).replace("{}", name)
        if kind == "file" and is_package and not manager:
            text = text.replace("install", "install -e .")
        workspace = "pyproject.toml tool uv workspace + not pyproject.toml project"
        if text == "uv sync" and folder.holds(workspace):
            text = "uv sync --all-packages"
        sources = (self.TOML, "setup.py", "setup.cfg", "requirements.txt")
        source = name if kind == "file" else folder.find(*sources)
        yield Found("install", text, self.manager_source or source)

    def _find_tests(self) -> Iterator[Found]:
        folder = self.folder
        source = folder.holds(self.PYTEST)
        if folder.find("manage.py") and "pytest-django" not in self.packages:
            python = f"{self.prefix}python manage.py"
            yield from spell_tests(f"{python} test [app.tests.TestCase.test_name]", "manage.py")
            yield Found("run", f"{python} runserver", "manage.py")
        elif self.manager == "hatch" and ("pytest" not in self.packages or "hatch-test" in self.hatch):
            yield from spell_tests(f"hatch test [{self.ONE_TEST}]", self.manager_source)
        elif "pytest" in self.packages or (source and not folder.find("tox.ini", "noxfile.py")):
            is_listed = "pytest" in self.packages
            call = self.spell("pytest") or "pytest" if is_listed else f"{self.prefix}pytest"
            source = source or folder.find(self.TOML, "setup.cfg", "setup.py", "requirements*.txt", "Pipfile")
            yield from spell_tests(f"{call} [{self.ONE_TEST}]", source)

    def _find_tox(self) -> Iterator[Found]:
        folder, prefix = self.folder, self.prefix if "tox" in self.packages else ""
        if self.manager and "tox" not in self.packages:  # it may be out of date
            return
        environments = folder.table("tox.ini")
        test = flatten(environments.get("testenv", {}))
        if "pytest" in test:
            one = f" [-- {self.ONE_TEST}]" if "{posargs" in test else ""
            yield from spell_tests(f"{prefix}tox -e py{one}", "tox.ini")
        named = {
            name.removeprefix("testenv:"): flatten(body)
            for name, body in environments.items()
            if name.startswith("testenv:")
        }
        yield from Scripts("tox.ini", f"{prefix}tox -e {{}}", named).find()
        configs = "tox.ini tox envlist or tox.ini tox env_list or pyproject.toml tool tox env_list"
        source = folder.holds(configs)
        if source:
            yield Found("check", f"{prefix}tox", source)


# ── 18 Ecosystems ─────────────────────────────────────────────────────────────

# How a language's table is read, and functions for what takes code to find: which of
# several solutions is meant, which options the tests need.


class Ecosystem(NamedTuple):
    """A language and its tools. It is in a folder where its `sign`, evidence, holds.

    What `find` yields comes before the rows, and the first of a name counts. `spell`
    makes a command of a row's text: it adds a wrapper, or "" leaves it out.
    """

    name: str  # in lower case: it labels commands, as in "test (python)"
    sign: str
    rows: tuple[Row, ...] = ()
    find: "Callable[[Folder], Iterable[Found]]" = lambda folder: ()
    spell: "Callable[[Folder, str], str]" = lambda folder, command: command
    only_first: bool = False  # left out where another comes before it

    def read(self, folder: Folder) -> Iterator[Found]:
        """Iterate over all that is found, the surest of each name first."""
        yield from self.find(folder)
        for row in self.rows:
            for evidence in (row.evidence or self.sign).split(" or "):
                source = folder.holds(evidence)
                shorten = shorten_version if row.name in ("version", "tool") else tidy
                value = shorten(folder.quote(evidence)) if source and "{}" in row.text else ""
                if not source or ("{}" in row.text and not value):
                    continue
                text = row.text.replace("{}", value)
                if row.name in NO_COMMANDS:
                    yield Found(row.name, text, source)
                elif row.name == "test":
                    for item in spell_tests(text, source):
                        yield item._replace(text=self.spell(folder, item.text))
                else:
                    yield Found(row.name, self.spell(folder, text), source)


def ecosystem(name: str, sign: str, *rows: Row, **more: Any) -> Ecosystem:
    return Ecosystem(name, sign, rows, **more)


def use_wrapper(folder: Folder, command: str) -> str:
    """Call the repository's script that gets the tool in the right version."""
    files = {"mvn": "mvnw", "gradle": "gradlew", "flutter": ".fvmrc", "dart": ".fvmrc"}
    tool, _, rest = command.partition(" ")
    file = files.get(tool, "")
    above = next((n for n, place in enumerate((folder, *folder.above)) if place.find(file)), None)
    if above is None:
        return command
    return f"fvm {command}" if file == ".fvmrc" else f"{'../' * above or './'}{file} {rest}"


def use_binstub(folder: Folder, command: str) -> str:
    """Call a gem by its script in bin/ where there is one."""
    stub = command.replace("bundle exec ", "bin/", 1)
    return stub if folder.find(stub.partition(" ")[0]) else command


def use_composer_bin(folder: Folder, command: str) -> str:
    """Call a tool where composer.json has it installed."""
    config = folder.table("composer.json", "config")
    place = config.get("bin-dir", f"{config.get('vendor-dir', 'vendor')}/bin")
    return command.replace("vendor/bin", str(place).strip("/"), 1)


def find_composer_scripts(folder: Folder) -> Iterator[Found]:
    """Find composer's scripts, of which @name calls another one."""
    scripts = read_scripts(folder, "composer {}", "composer.json scripts")
    call = "(?m)^@(?!php)(?:composer )?"
    bodies = {name: re.sub(call, "composer ", body) for name, body in scripts.bodies.items()}
    return scripts._replace(bodies=bodies, more=" -- ").find()


def find_melos_scripts(folder: Folder) -> Iterator[Found]:
    for place in ("melos.yaml scripts", "pubspec.yaml melos scripts"):
        yield from read_scripts(folder, "melos run {}", place).find()


def find_cargo(folder: Folder) -> Iterator[Found]:
    """Find the only program: src/main.rs and those in src/bin are more of them."""
    package, programs = folder.table("Cargo.toml", "package"), folder.value("Cargo.toml", "bin")
    if not isinstance(programs, list) or len(programs) != 1 or not isinstance(programs[0], dict):
        return
    path = programs[0].get("path", "src/main.rs" if programs[0].get("name") == package.get("name") else "")
    has_more = folder.find("src/bin") or (path != "src/main.rs" and folder.find("src/main.rs"))
    is_elsewhere = folder.value("Cargo.toml", "workspace", "default-members") is not None
    if has_more or is_elsewhere or "required-features" in programs[0]:
        return
    if isinstance(path, str) and folder.find(path):
        yield Found("run", "cargo run", "Cargo.toml")


def find_go(folder: Folder) -> Iterator[Found]:
    """Find a workspace's modules where it is none itself, and the only program."""
    programs = {os.path.dirname(path) for path in folder.expand("cmd/*/*.go")}
    if len(programs) == 1:
        yield Found("run", f"go run ./{min(programs)}", min(programs))
    modules = re.findall(r"(?m)^(?:use)?[ \t]+(\./[\w./-]+)[ \t]*$", folder.text("go.work"))
    if 0 < len(modules) <= 8 and not folder.find("go.mod"):
        places = " ".join(f"{module.rstrip('/')}/..." for module in modules)
        for name, verb in (("build", "build"), ("test", "test"), ("lint", "vet")):
            yield Found(name, f"go {verb} {places}", "go.work")


def find_dotnet(folder: Folder) -> Iterator[Found]:
    """Find the solution, or else the project; one of several must be named."""
    import shlex

    here = [name for name in folder.names if name.endswith((".slnx", ".sln", "proj"))]
    places = here or folder.expand("src/*.sln*")
    kinds = [[name for name in places if name.endswith(end)] for end in (".slnx", ".sln", "proj")]
    names = next(filter(None, kinds), [])
    own = [name for name in names if os.path.splitext(name)[0] == os.path.basename(folder.path)]
    name = (names if len(names) == 1 else [*own, ""])[0]
    if not name:
        return
    argument = "" if here == [name] else f" {shlex.quote(name)}"
    yield Found("install", f"dotnet restore{argument}", name)
    yield Found("build", f"dotnet build{argument}", name)
    if re.search(r"(?i)test", folder.text(name)):
        # The runner that is new with .NET 10 wants an option, and filters otherwise.
        is_new = folder.value("global.json", "test", "runner") == "Microsoft.Testing.Platform"
        option = " --project" if name.endswith("proj") else " --solution"
        call = "dotnet test" + option * bool(is_new and argument) + argument
        one = "" if is_new else " [--filter FullyQualifiedName~TestName]"
        yield from spell_tests(call + one, name)
    if folder.find(".editorconfig") and not folder.value(".config/dotnet-tools.json", "tools", "csharpier"):
        yield Found("format", f"dotnet format{argument}", ".editorconfig")


def leave_out_ios(folder: Folder, command: str) -> str:
    """Leave out what builds for this computer, where a package is for iOS alone."""
    platforms = re.search(r"platforms: *\[([^\[\]]*)\]", folder.text("Package.swift"))
    is_ios = platforms and re.findall(r"\.(\w+)\(", platforms[1]) == ["iOS"]
    return "" if is_ios and re.match("swift (build|test|run)", command) else command


def find_xcode(folder: Folder) -> Iterator[Found]:
    """Find the only shared scheme, or that of the project's name."""
    import shlex

    project = folder.find("*.xcodeproj")
    place = folder.find("*.xcworkspace") or project
    paths = folder.expand("*.xc*/xcshareddata/xcschemes/*.xcscheme")
    schemes = {os.path.basename(path)[: -len(".xcscheme")] for path in paths}
    scheme = next(iter(schemes), "") if len(schemes) == 1 else os.path.splitext(project)[0]
    text = folder.text(f"{project}/project.pbxproj")
    is_mac, is_ios = "SDKROOT = macosx" in text, "SDKROOT = iphoneos" in text
    if scheme not in schemes or is_mac == is_ios or folder.find("Package.swift"):
        return
    flag = "-workspace" if place.endswith("workspace") else "-project"
    call = f"{flag} {shlex.quote(place)} -scheme {shlex.quote(scheme)}"
    simulator = " -destination 'generic/platform=iOS Simulator'" * is_ios
    yield Found("build", f"xcodebuild build {call}{simulator}", project)
    if "product-type.bundle.unit-test" in text:
        device = " -destination 'platform=iOS Simulator,name=DEVICE'" * is_ios
        one = "[-only-testing:TARGET/CLASS/METHOD]"
        yield from spell_tests(f"xcodebuild test {call}{device} {one}", project)


def find_test_options(text: str) -> Optional[list[str]]:
    """Find what to switch on to have a CMakeLists.txt's tests; None if it has none."""
    token = re.compile(
        r"(?im)^[ \t]*(if|elseif|else|endif)[ \t]*\(((?:[^()]|\([^()]{0,200}\))*)\)"
        r"|\badd_test\s*\(|_discover_tests\s*\(|\badd_subdirectory\s*\(\s*[^\s()]*(?<![a-z])tests?\b"
    )
    uses_ctest = re.search(r"(?im)^[ \t]*include[ \t]*\([ \t]*CTest\b", text)
    if not uses_ctest and not re.search(r"(?im)^[ \t]*enable_testing\b", text):
        return None

    def is_off(name: str) -> bool:
        if name == "BUILD_TESTING":
            return not uses_ctest and not re.search(r"(?i)option\s*\(\s*BUILD_TESTING\b", text)
        return bool(re.search(rf'(?i)option\s*\(\s*{name}\s+(?:"[^"]*"\s+)?(?:OFF|FALSE)\b', text))

    conditions = []  # that the first test stands under
    for match in token.finditer(text):
        word = (match[1] or "").lower()
        if not word:
            break
        if word == "if":
            conditions.append(match[2])
        elif conditions:
            conditions[-1:] = [] if word == "endif" else [match[2]]
    else:
        return None
    modes = re.findall(r"(?i)\boption\s*\(\s*(\w+_DEVELOPER_MODE)\b", text)[:1]
    needed = [name for name in modes if is_off(name)]
    for condition in conditions[:9]:
        names = re.findall(r"[A-Za-z_]\w*", re.sub(r"\bNOT\s+\w+|\b(?:AND|OR)\b", "", condition))[:9]
        depends = (re.search(rf'dependent_option\s*\(\s*{name}\s+"[^"]*"\s+ON\s+"(\w+)"', text) for name in names)
        names = [found[1] if found else name for name, found in zip(names, depends)]
        off = [name for name in names if is_off(name)]
        is_either = re.search(r"\bOR\b", condition)
        needed += off if not is_either else off[:1] if len(off) == len(names) else []
    return needed


def pick_preset(folder: Folder, kind: str, configure: str = "") -> str:
    """Pick the preset of a kind that is the only one, or called default."""
    presets = folder.value("CMakePresets.json", kind)
    ours = [one for one in presets if isinstance(one, dict)] if isinstance(presets, list) else []
    ours = [one for one in ours if not one.get("hidden") and one.get("configurePreset", "") == configure]
    names = [str(one.get("name")) for one in ours]
    return "default" if "default" in names else names[0] if len(names) == 1 else ""


def find_cmake(folder: Folder) -> Iterator[Found]:
    """Find the default presets, or the options that tests need."""
    name, text = "CMakeLists.txt", folder.text("CMakeLists.txt")
    configure = pick_preset(folder, "configurePresets")
    build = configure and pick_preset(folder, "buildPresets", configure)
    if build:
        source, test = "CMakePresets.json", pick_preset(folder, "testPresets", configure)
        yield Found("build", f"cmake --preset {configure} && cmake --build --preset {build}", source)
        if test:
            yield from spell_tests(f"ctest --preset {test} [-R NAME]", source)
        return
    needed = find_test_options(text)
    options = "".join(f" -D{option}=ON" for option in dict.fromkeys(needed or ()))
    yield Found("build", f"cmake -B build{options} && cmake --build build", name)
    if needed is not None:
        # A Makefile may call another test by `test`.
        one = "" if folder.find("Makefile") else " [-R NAME]"
        yield from spell_tests(f"ctest --test-dir build{one}", name)


# ── 19 Languages ──────────────────────────────────────────────────────────────

# What is customary in each ecosystem, and the evidence that it is so here. To add
# one, add an ecosystem, with a Row for each command and each fact; where several rows
# have one name, the first that holds counts.

NO_PYTHON = " + not pyproject.toml build-system + not pyproject.toml project + not setup.py"
PHPCS = "*phpcs.xml* + composer.json ~ codesniffer|coding-standard|/wpcs"
PHP_CS_FIXER = ".php-cs-fixer* + composer.json ~ php-cs-fixer"
TEST_TASK = r"TestTask\.\w+\b(?![ (]*:(?!test\b))"
STANDARD_RB = r""".standard.yml or Gemfile ~ ^[ \t]*gem[ (]+["']standard["']"""
RUBOCOP = ".rubocop.yml + Gemfile rubocop or .rubocop.yml + *.gemspec rubocop"
ANDROID = "app*/src/main/AndroidManifest.xml|src/main/AndroidManifest.xml"
CTEST = r"CMakeLists.txt ~ (?i)^[ \t]*(?:enable_testing|include[ \t]*\([ \t]*CTest)\b"
MESON_TEST = r"meson.build ~ ^[ \t]*(?:test *\(|subdir *\( *'tests?')"

ECOSYSTEMS = (  # those further up come first where several are in one folder
    ecosystem(
        "elixir",
        "mix.exs",
        Row("description", "{}", r'mix.exs ~ (?:@description|\bdescription:) *"([^"\n]+)"'),
        Row("version", "Elixir {}", ".tool-versions elixir"),
        Row("version", "Elixir {}", r'mix.exs ~ \belixir: *"([^"\n]+)"'),
        Row("version", "Elixir"),
        Row("tool", "Phoenix {}", r'mix.exs ~ \{:phoenix, *"([^"\n]+)"'),
        Row("install", "mix setup", r'mix.exs ~ ^[ \t]+"?setup"?: *\['),
        Row("install", "mix deps.get"),
        Row("build", "mix compile"),
        Row("test", "mix test [apps/APP/test/path/to/file_test.exs:LINE]", "mix.exs apps_path:"),
        Row("test", "mix test [test/path/to/file_test.exs:LINE]", "mix.exs + test"),
        Row("lint", "mix lint", r'mix.exs ~ ^[ \t]+"?lint"?: *\['),
        Row("lint", "mix credo", "mix.exs :credo"),
        Row("format", "mix format", ".formatter.exs"),
        Row("type check", "mix dialyzer", "mix.exs :dialyxir"),
        Row("run", "mix phx.server", "mix.exs :phoenix + config/config.exs ~ Endpoint"),
        Row("check", "mix {}", r'mix.exs ~ ^[ \t]+"?(check|ci)"?: *\['),
        Row("check", "mix check", "mix.exs :ex_check"),
        Row("before a commit", "mix precommit", r'mix.exs ~ ^[ \t]+"?precommit"?: *\['),
    ),
    ecosystem(
        "php",
        "composer.json",
        Row("description", "{}", "composer.json description"),
        Row("version", "PHP {}", "composer.json require php"),
        Row("version", "PHP"),
        Row("tool", "Laravel {}", "composer.json require laravel/framework"),
        Row("tool", "Symfony {}", "composer.json require symfony/framework-bundle"),
        Row("install", "composer install"),
        Row("test", "php artisan test [--filter=NAME]", "artisan + phpunit*.xml*"),
        Row("test", "vendor/bin/pest [--filter=NAME]", 'composer.json ~ "pestphp/pest"'),
        Row("test", "php bin/phpunit [--filter NAME]", "bin/phpunit + phpunit*.xml*"),
        Row("test", "vendor/bin/phpunit [--filter NAME]", 'composer.json ~ "phpunit/phpunit" + phpunit*.xml*'),
        Row("test", "vendor/bin/simple-phpunit", 'composer.json ~ "symfony/phpunit-bridge" + phpunit*.xml*'),
        Row("test", "vendor/bin/tester tests", 'composer.json ~ "nette/tester" + tests'),
        Row("test", "vendor/bin/codecept run", 'codeception*.yml + composer.json ~ "codeception/'),
        Row("one test", "vendor/bin/simple-phpunit --filter NAME", 'composer.json ~ "symfony/phpunit-bridge"'),
        Row("one test", "vendor/bin/tester tests/FILE", 'composer.json ~ "nette/tester" + tests'),
        Row("lint", "vendor/bin/pint --test", 'composer.json ~ "laravel/pint"'),
        Row("lint", "vendor/bin/phpcs", PHPCS),
        Row("lint", "vendor/bin/ecs check", "ecs.php + composer.json ~ easy-coding-standard"),
        Row("lint", "vendor/bin/php-cs-fixer check", PHP_CS_FIXER),
        Row("format", "vendor/bin/pint", 'composer.json ~ "laravel/pint"'),
        Row("format", "vendor/bin/phpcbf", PHPCS),
        Row("format", "vendor/bin/ecs check --fix", "ecs.php + composer.json ~ easy-coding-standard"),
        Row("format", "vendor/bin/php-cs-fixer fix", PHP_CS_FIXER),
        Row("type check", "vendor/bin/phpstan analyse", 'phpstan.* + composer.json ~ "phpstan/phpstan|larastan"'),
        Row("type check", "vendor/bin/psalm", "psalm.xml* + composer.json require-dev vimeo/psalm"),
        Row("run", "php artisan serve", "artisan"),
        find=find_composer_scripts,
        spell=use_composer_bin,
    ),
    ecosystem(
        "ruby",
        "*.gemspec|bin/rails or Gemfile + .rspec|config.ru or Gemfile + Rakefile ~ TestTask|RSpec::Core|load_tasks",
        Row("description", "{}", r"""*.gemspec ~ \.summary[ \t]*=[ \t]*(?:"([^"\n]+)"|'([^'\n]+)')"""),
        Row("version", "Ruby {}", ".ruby-version or .tool-versions ruby"),
        Row("version", "Ruby {}", r"""Gemfile ~ ^[ \t]*ruby[ (]+["']([^"'\n]+)"""),
        Row("version", "Ruby {}", r"""*.gemspec ~ required_ruby_version[^"'\n]{0,40}["']([^"'\n]+)"""),
        Row("version", "Ruby"),
        Row("tool", "Rails {}", r"""Gemfile ~ ^[ \t]*gem[ (]+["']rails["'], *["']([^"'\n]+)"""),
        Row("install", "bin/setup --skip-server", "bin/setup --skip-server"),
        Row("install", "bin/setup", "bin/setup"),
        Row("install", "script/bootstrap", "script/bootstrap"),
        Row("install", "bundle install", "Gemfile"),
        Row("test", "bundle exec rspec [spec/path/to/file_spec.rb:LINE]", ".rspec or spec/spec_helper.rb RSpec"),
        Row("test", "bin/rails test [test/path/to/file_test.rb:LINE]", "bin/rails + test"),
        Row("test", "script/test", "script/test"),
        Row("test", "bundle exec rake test [N=/NAME/]", f"Rakefile ~ Minitest::{TEST_TASK}"),
        Row("test", "bundle exec rake test [TEST=test/FILE]", f"Rakefile ~ {TEST_TASK}"),
        Row("test", "bundle exec rake test", r"Rakefile ~ ^task[ (]+:?(?:test|default\b.*\btest)\b"),
        Row("test", "bin/test [test/FILE]", "bin/test rails/plugin/test"),
        Row("lint", "bundle exec standardrb", STANDARD_RB),
        Row("lint", "bin/rubocop", "bin/rubocop"),
        Row("lint", "bundle exec rubocop", RUBOCOP),
        Row("format", "bundle exec standardrb --fix", STANDARD_RB),
        Row("format", "bin/rubocop -a", "bin/rubocop"),
        Row("format", "bundle exec rubocop -a", RUBOCOP),
        Row("type check", "bundle exec srb tc", "sorbet/config"),
        Row("type check", "bundle exec steep check", "Steepfile"),
        Row("run", "bin/dev", "bin/dev"),
        Row("run", "bin/rails server", "bin/rails + config.ru"),
        Row("check", "bin/ci", "bin/ci"),
        Row("check", "script/cibuild", "script/cibuild"),
        spell=use_binstub,
    ),
    ecosystem(
        "rust",
        "Cargo.toml",
        Row("description", "{}", "Cargo.toml package description"),
        Row("description", "{}", "Cargo.toml workspace package description"),
        Row("version", "Rust {}", r'rust-toolchain* ~ ^channel[ \t]*=[ \t]*"(\d[^"\n]*)"'),
        Row("version", "Rust {}", r"rust-toolchain ~ \A(\d[\w.]*)\s*\Z"),
        Row("version", "Rust nightly", "rust-toolchain* ~ nightly"),
        Row("version", "Rust {}+", "Cargo.toml package rust-version"),
        Row("version", "Rust {}+", "Cargo.toml workspace package rust-version"),
        Row("version", "Rust"),
        Row("build", "cargo build --workspace", "Cargo.toml workspace"),
        Row("build", "cargo build"),
        Row("test", "cargo nextest run --workspace", "Cargo.toml workspace + .config/nextest.toml"),
        Row("test", "cargo nextest run", "Cargo.toml + .config/nextest.toml"),
        Row("one test", "cargo nextest run name_of_the_test", ".config/nextest.toml"),
        Row("test", "cargo test --workspace", "Cargo.toml workspace"),
        Row("one test", "cargo test -p CRATE name_of_the_test", "Cargo.toml workspace"),
        Row("test", "cargo test [name_of_the_test]"),
        Row("lint", "cargo clippy --workspace --all-targets", "Cargo.toml workspace"),
        Row("lint", "cargo clippy --all-targets"),
        Row("format", "cargo +nightly fmt --all", "*rustfmt.toml ~ ^(imports|group|unstable)_ + not rust-toolchain*"),
        Row("format", "cargo fmt --all", "Cargo.toml workspace"),
        Row("format", "cargo fmt"),
        Row("run", "cargo run", "Cargo.toml package default-run"),
        Row("run", "cargo run", "src/main.rs + not src/bin + not Cargo.toml bin"),
        find=find_cargo,
    ),
    ecosystem(
        "go",
        "go.mod|go.work",
        Row("version", "Go {}", "go.mod|go.work go"),
        Row("build", "go build ./...", "go.mod"),
        Row("test", "go test ./...", "go.mod"),
        Row("one test", "go test ./path/to/package -run TestName"),
        Row("lint", "golangci-lint run", ".golangci.yml|.golangci.yaml|.golangci.toml + go.mod"),
        Row("lint", "go vet ./...", "go.mod"),
        Row("format", "golangci-lint fmt", ".golangci.y*ml formatters"),
        Row("format", "go fmt ./...", "go.mod"),
        Row("run", "go run .", r"main.go ~ ^package main\b"),
        find=find_go,
    ),
    ecosystem(
        "maven",
        "pom.xml + mvnw or pom.xml + not gradlew",
        Row("description", "{}", "pom.xml ~ <description>([^<$]+)</description>"),
        Row("version", "Java {}", ".java-version or .tool-versions java or .sdkmanrc ~ ^java=(.+)"),
        Row("version", "Java {}", "pom.xml ~ <(?:maven.compiler.release|java.version|release)>([^<$]+)<"),
        Row("version", "Java {}", "pom.xml ~ <maven.compiler.(?:source|target)>([^<$]+)<"),
        Row("version", "Java"),
        Row("tool", "Spring Boot {}", r"pom.xml ~ >spring-boot-starter-parent</artifactId>\s*<version>([^<$]+)<"),
        Row("build", "mvn package -DskipTests"),
        Row("one test", "mvn test -pl MODULE -Dtest=ClassName#method", "pom.xml <modules>"),
        Row("test", "mvn test [-Dtest=ClassName#method]"),
        Row("lint", "mvn spotless:check", "pom.xml spotless-maven-plugin"),
        Row("format", "mvn spotless:apply", "pom.xml spotless-maven-plugin"),
        Row("format", "mvn spring-javaformat:apply", "pom.xml spring-javaformat-maven-plugin"),
        Row("format", "mvn fmt:format", "pom.xml fmt-maven-plugin"),
        Row("format", "mvn formatter:format", "pom.xml formatter-maven-plugin"),
        Row("run", "mvn spring-boot:run", "pom.xml spring-boot-maven-plugin + not pom.xml <modules>"),
        Row("run", "mvn quarkus:dev", "pom.xml quarkus-maven-plugin + not pom.xml <modules>"),
        Row("check", "mvn verify"),
        spell=use_wrapper,
    ),
    ecosystem(
        "gradle",
        "settings.gradle*|build.gradle* + not mvnw",
        Row("type", "mobile", ANDROID),
        Row("description", "{}", r"""build.gradle* ~ ^description[ \t=]*["']([^"'\n]+)"""),
        Row("version", "Java {}", ".java-version or .tool-versions java or .sdkmanrc ~ ^java=(.+)"),
        Row("version", "Java {}", r"build.gradle* ~ (?:JavaLanguageVersion\.of|jvmToolchain)\(\s*(\d+)"),
        Row("version", "Java {}", r"build.gradle* ~ sourceCompatibility[ =][^\d\n]{0,40}([\d.]+)"),
        Row(
            "tool",
            "Kotlin {}",
            "gradle/libs.versions.toml versions kotlin + build.gradle* ~ kotlin.{1,3}(?:jvm|android|multi)",
        ),
        Row("tool", "Kotlin {}", r'build.gradle* ~ \bkotlin\("\w+"\) version "([^"\n]+)"'),
        Row("tool", "Spring Boot {}", r"""build.gradle* ~ org\.springframework\.boot.{0,9}version ["']([^"'\n]+)"""),
        Row("tool", "Gradle {}", "gradle/wrapper/gradle-wrapper.properties ~ gradle-([0-9.]+[0-9])"),
        Row("build", "gradle assembleDebug", ANDROID),
        Row("build", "gradle assemble"),
        Row("test", "gradle test allTests", "build.gradle* multiplatform kotlin.jvm"),
        Row("test", "gradle allTests", "build.gradle* multiplatform"),
        Row("test", "gradle test"),
        Row("one test", "gradle :MODULE:test --tests 'ClassName.method'", f"settings.gradle* include + not {ANDROID}"),
        Row(
            "one test", "gradle test --tests 'ClassName.method'", "build.gradle* + src/test + not build.gradle* android"
        ),
        Row(
            "one test",
            "gradle :app:testDebugUnitTest --tests 'ClassName.method'",
            "app/build.gradle* + not app/build.gradle* ~ lavor + not build-logic",
        ),
        Row("lint", "gradle spotlessCheck", "build.gradle* spotless"),
        Row("lint", "gradle ktlintCheck", r"build.gradle* ~ jlleitschuh|libs\.plugins\.ktlint\b"),
        Row("lint", "gradle detekt", "build.gradle* detekt"),
        Row("lint", "gradle lint", ANDROID),
        Row("format", "gradle spotlessApply", "build.gradle* spotless"),
        Row("format", "gradle ktlintFormat", r"build.gradle* ~ jlleitschuh|libs\.plugins\.ktlint\b"),
        Row("run", "gradle bootRun", r"""build.gradle* ~ ["']org\.springframework\.boot["'](?!.{0,40}apply false)"""),
        Row("run", "gradle runIde", "build.gradle* org.jetbrains.intellij"),
        Row("run", "gradle run", r"build.gradle* ~ ^[ \t]*(?:application$|id[ (]+[\"']application[\"'])"),
        Row("check", "gradle check", f"*.gradle* + not {ANDROID}"),
        spell=use_wrapper,
    ),
    ecosystem(
        ".net",
        r"*.slnx|*.sln|src/*.slnx|src/*.sln ~ \.(?:cs|fs|vb)proj + not ProjectSettings"
        " or *.csproj|*.fsproj + not ProjectSettings",
        Row("description", "{}", "*.csproj|Directory.Build.props ~ <Description>([^<$]+)</Description>"),
        Row("version", ".NET {}", "global.json sdk version"),
        Row("version", ".NET {}", "Directory.Build.props ~ <TargetFrameworks?>net([^<]+)<"),
        Row("version", ".NET {}", "*.csproj ~ <TargetFrameworks?>net([^<]+)<"),
        Row("version", ".NET"),
        Row("format", "dotnet csharpier format .", ".config/dotnet-tools.json tools csharpier"),
        find=find_dotnet,
    ),
    ecosystem(
        "swift",
        "Package.swift + Sources + not package.json"
        " or Package.swift .testTarget + not package.json"
        " or *.xcodeproj|*.xcworkspace|Tuist.swift",
        Row("type", "mobile", "*.xcodeproj + not Package.swift + not *.xcodeproj/project.pbxproj ~ SDKROOT = macosx"),
        Row("type", "mobile", "*.xcworkspace + not *.xcodeproj + not Package.swift"),
        Row("version", "Swift {}", ".swift-version"),
        Row("version", "Swift {}+", "Package.swift ~ swift-tools-version: *([0-9.]+)"),
        Row("version", "Swift"),
        Row("install", "bundle exec pod install", "Podfile + Gemfile cocoapods"),
        Row("install", "pod install", "Podfile"),
        Row("install", "tuist install && tuist generate --no-open", "Tuist.swift"),
        Row("install", "xcodegen generate", "project.yml targets"),
        Row("build", "swift build", "Package.swift"),
        Row("test", "swift test [--filter TestName]", "Package.swift .testTarget"),
        Row("lint", "swiftlint", ".swiftlint.yml"),
        Row("lint", "swift format lint --recursive .", ".swift-format"),
        Row("format", "swiftformat .", ".swiftformat"),
        Row("format", "swift format --in-place --recursive .", ".swift-format"),
        Row("run", "swift run", "Package.swift .executableTarget + not Package.swift .library"),
        find=find_xcode,
        spell=leave_out_ios,
    ),
    ecosystem(
        "flutter",
        "pubspec.yaml dependencies flutter",
        Row("type", "mobile"),
        Row("description", "{}", "pubspec.yaml description"),
        Row("version", "Flutter {}", '.fvmrc ~ "flutter": *"([^"]+)"'),
        Row("version", "Flutter {}", "pubspec.yaml environment flutter"),
        Row("version", "Flutter"),
        Row("tool", "Dart {}", "pubspec.yaml environment sdk"),
        Row("install", "melos bootstrap", "melos.yaml"),
        Row("install", "flutter pub get"),
        Row("build", "dart run build_runner build", "pubspec.yaml dev_dependencies build_runner"),
        Row("test", "flutter test [test/FILE --plain-name 'NAME']", "pubspec.yaml + test"),
        Row("lint", "flutter analyze"),
        Row("format", "dart format ."),
        Row("run", "flutter run", "lib/main.dart"),
        find=find_melos_scripts,
        spell=use_wrapper,
    ),
    ecosystem(
        "dart",
        "pubspec.yaml + not pubspec.yaml dependencies flutter",
        Row("description", "{}", "pubspec.yaml description"),
        Row("version", "Dart {}", "pubspec.yaml environment sdk"),
        Row("version", "Dart"),
        Row("install", "melos bootstrap", "melos.yaml"),
        Row("install", "flutter pub get", ".fvmrc"),
        Row("install", "dart pub get"),
        Row("test", "dart test [test/FILE --plain-name 'NAME']", "pubspec.yaml ~ ^ +test: + test"),
        Row("lint", "dart analyze"),
        Row("format", "dart format ."),
        find=find_melos_scripts,
        spell=use_wrapper,
    ),
    ecosystem(
        "deno",
        "deno.json|deno.jsonc + not package.json or deno.lock",
        Row("version", "Deno"),
        Row("install", "deno install"),
        Row("test", "deno test -A [path/to/file_test.ts --filter NAME]", "*_test.ts|src/*_test.ts|tests"),
        Row("one test", "deno test -A path/to/file_test.ts --filter NAME", "deno.json* tasks test"),
        Row("lint", "deno lint", "deno.json* + not eslint.config.* + not biome.json*"),
        Row("format", "deno fmt", "deno.json* + not .prettierrc* + not biome.json*"),
        find=lambda folder: read_scripts(folder, "deno task {}", "deno.json|deno.jsonc tasks").find(),
    ),
    ecosystem(
        "gleam",
        "gleam.toml",
        Row("description", "{}", "gleam.toml description"),
        Row("version", "Gleam {}", "gleam.toml gleam"),
        Row("version", "Gleam"),
        Row("install", "gleam deps download"),
        Row("build", "gleam build"),
        Row("test", "gleam test", "gleam.toml + test"),
        Row("format", "gleam format"),
        Row("type check", "gleam check"),
    ),
    ecosystem(
        "erlang",
        "rebar.config",
        Row("version", "Erlang/OTP {}", 'rebar.config ~ minimum_otp_vsn, *"([^"\n]+)"'),
        Row("version", "Erlang"),
        Row("build", "make", "erlang.mk"),
        Row("build", "rebar3 compile"),
        Row("test", "make tests", "erlang.mk"),
        Row("test", "rebar3 do eunit, ct", "test/*_SUITE.erl + test/*_tests.erl"),
        Row("test", "rebar3 ct", "test/*_SUITE.erl"),
        Row("test", "rebar3 eunit", "test/*_tests.erl"),
        Row("one test", "rebar3 ct --suite=test/NAME_SUITE", "test/*_SUITE.erl + not erlang.mk"),
        Row("one test", "rebar3 eunit --module=NAME", "test/*_tests.erl + not erlang.mk"),
        Row("lint", "rebar3 lint", "rebar.config rebar3_lint"),
        Row("format", "rebar3 fmt", "rebar.config erlfmt"),
        Row("type check", "rebar3 dialyzer", "rebar.config dialyzer"),
    ),
    ecosystem(
        "scala",
        "build.sbt",
        Row("version", "Scala {}", r'build.sbt ~ scalaVersion *:= *"([^"\n]+)"'),
        Row("version", "Scala"),
        Row("tool", "sbt {}", r"project/build.properties ~ sbt.version *= *(\S+)"),
        Row("build", "sbt compile"),
        Row("test", "sbt test"),
        Row("one test", "sbt 'testOnly *ClassName'"),
        Row("lint", "sbt scalafmtCheckAll", "project/plugins.sbt sbt-scalafmt"),
        Row("format", "sbt scalafmtAll", "project/plugins.sbt sbt-scalafmt"),
    ),
    ecosystem(
        "haskell",
        "cabal.project|stack.yaml|*.cabal",
        Row("description", "{}", "*.cabal synopsis: or package.yaml synopsis"),
        Row("version", "Haskell"),
        Row("tool", "Stackage LTS {}", r"stack.yaml ~ ^(?:resolver|snapshot): *lts-([\d.]+)"),
        Row("build", "cabal build all", "cabal.project"),
        Row("build", "stack build", "stack.yaml"),
        Row("build", "cabal build", "*.cabal"),
        Row("test", "cabal test all", "cabal.project + *.cabal ~ (?i)^test-suite"),
        Row("test", "cabal test all", "cabal.project + not *.cabal"),
        Row("test", "stack test", "stack.yaml + not cabal.project + *.cabal ~ (?i)^test-suite"),
        Row("test", "stack test", "stack.yaml + not cabal.project + not *.cabal"),
        Row("test", "cabal test", "*.cabal ~ (?i)^test-suite"),
        Row("lint", "hlint .", ".hlint.yaml"),
        Row("format", "fourmolu -i .", "fourmolu.yaml"),
    ),
    ecosystem(
        "ocaml",
        "dune-project",
        Row("description", "{}", r'dune-project ~ \(synopsis[ \n]+"([^"\n]+)"'),
        Row("version", "OCaml {}", r"dune-project ~ \(ocaml[ \n]+\(>= ([\d.]+)\)"),
        Row("version", "OCaml"),
        Row("install", "opam install . --deps-only --with-test", "*.opam"),
        Row("build", "dune build"),
        Row("test", "dune test"),
        Row("format", "dune fmt", ".ocamlformat"),
    ),
    ecosystem(
        "zig",
        "build.zig",
        Row("version", "Zig {}", r'build.zig.zon ~ \.minimum_zig_version *= *"([\d.]+)"'),
        Row("version", "Zig"),
        Row("build", "zig build"),
        Row("test", "zig build test", r'build.zig ~ \.step\("test"'),
        Row("one test", "zig build test -Dtest-filter=NAME", 'build.zig "test-filter"'),
        Row("format", "zig fmt ."),
        Row("run", "zig build run", r'build.zig ~ \.step\("run"'),
    ),
    ecosystem(
        "foundry",
        "foundry.toml + not hardhat.config.*",
        Row("version", "Solidity {}", "foundry.toml profile default solc"),
        Row("version", "Solidity"),
        Row("build", "forge build"),
        Row("test", "forge test [--match-test NAME]"),
        Row("format", "forge fmt"),
    ),
    ecosystem(
        "crystal",
        "shard.yml",
        Row("description", "{}", "shard.yml description"),
        Row("version", "Crystal {}", "shard.yml crystal"),
        Row("version", "Crystal"),
        Row("install", "shards install"),
        Row("test", "crystal spec [spec/path/to/file_spec.cr:LINE]", "shard.yml + spec"),
        Row("format", "crystal tool format"),
    ),
    ecosystem(
        "julia",
        "Project.toml uuid",
        Row("version", "Julia {}", "Project.toml compat julia"),
        Row("version", "Julia"),
        Row("install", "julia --project -e 'using Pkg; Pkg.instantiate()'"),
        Row("test", "julia --project -e 'using Pkg; Pkg.test()'", "test/runtests.jl"),
    ),
    ecosystem(
        "cmake",
        f"CMakeLists.txt + not meson.build{NO_PYTHON} or {CTEST}{NO_PYTHON}"
        f" or {CTEST} + not */__init__.py + not src/*/__init__.py",
        Row("description", "{}", r'CMakeLists.txt ~ (?i)\bproject\s*\([^()]*\bDESCRIPTION\s+"([^"]+)"'),
        Row("version", "C++{}", r"CMakeLists.txt ~ (?i)^set *\( *CMAKE_CXX_STANDARD +(\d+)"),
        Row("version", "C++{}", r"CMakeLists.txt ~ (?i)^target_compile_features *\([^()]*\bcxx_std_(\d+)"),
        Row("version", "C{}", r"CMakeLists.txt ~ (?i)^set *\( *CMAKE_C_STANDARD +(\d+)"),
        Row("version", "C++", r"CMakeLists.txt ~ (?i)\bproject *\([^()]*\bCXX\b"),
        Row("version", "C", r"CMakeLists.txt ~ (?i)\bproject *\([^()]*\sC\b"),
        Row("tool", "CMake {}+", r"CMakeLists.txt ~ (?i)cmake_minimum_required\s*\(\s*VERSION\s+(\d+\.\d+)"),
        Row("install", "git submodule update --init --recursive", ".gitmodules path"),
        Row("format", "clang-format -i path/to/file", ".clang-format"),
        find=find_cmake,
        only_first=True,
    ),
    ecosystem(
        "meson",
        "meson.build" + NO_PYTHON,
        Row("version", "C++", "meson.build ~ project *\\([^()]*'cpp'"),
        Row("version", "C", "meson.build ~ project *\\([^()]*'c'"),
        Row("tool", "Meson {}", r"meson.build ~ meson_version *: *'([^'\n]+)'"),
        Row("build", "meson setup build && meson compile -C build"),
        Row("test", "meson test -C build", MESON_TEST),
        Row("one test", "meson test -C build NAME", MESON_TEST + " + not [Mm]akefile"),
        Row("format", "clang-format -i path/to/file", ".clang-format"),
        only_first=True,
    ),
    ecosystem(
        "autotools",
        f"configure.ac{NO_PYTHON} or configure + Makefile.in{NO_PYTHON}",
        Row("version", "C++", "configure.ac AC_PROG_CXX"),
        Row("version", "C", "configure.ac AC_PROG_CC"),
        Row("install", "git submodule update --init --recursive", ".gitmodules path"),
        Row("build", "./configure && make", "configure"),
        Row("build", "./autogen.sh && ./configure && make", "autogen.sh"),
        Row("build", "./bootstrap && ./configure && make", "bootstrap"),
        Row("build", "autoreconf -i && ./configure && make", "configure.ac"),
        Row("test", "make check", r"Makefile.am ~ ^(?:TESTS|check-local)\b"),
        Row("test", "make check", r"Makefile.am ~ ^SUBDIRS *\+?=.*\btests?\b"),
        Row("test", "make check", "Makefile.in ~ ^check:"),
        Row("one test", "make check TESTS=path/to/test", r"Makefile.am ~ ^TESTS\b"),
        only_first=True,
    ),
    ecosystem(
        "python",
        "pyproject.toml project or pyproject.toml tool poetry"
        " or pyproject.toml build-system or setup.py or setup.cfg metadata or Pipfile|manage.py"
        " or pyproject.toml tool uv workspace"
        " or pyproject.toml|requirements.txt|noxfile.py + not package.json",
        Row("description", "{}", "pyproject.toml project description"),
        Row("description", "{}", "pyproject.toml tool poetry description"),
        Row("description", "{}", "setup.cfg metadata description"),
        Row("version", "Python {}", ".python-version or .tool-versions python"),
        Row("version", "Python {}", "mise.toml tools python"),
        Row("version", "Python {}", "pyproject.toml project requires-python"),
        Row("version", "Python {}", "pyproject.toml tool poetry dependencies python"),
        Row("version", "Python {}", "setup.cfg options python_requires"),
        Row("version", "Python {}", "setup.py python_requires="),
        Row("version", "Python"),
        find=lambda folder: Python(folder).read(),
    ),
    ecosystem(
        "bazel",
        "MODULE.bazel|WORKSPACE",
        Row("build", "bazel build //..."),
        Row("test", "bazel test //..."),
        Row("one test", "bazel test //path/to:target"),
        only_first=True,
    ),
    ecosystem(
        "javascript",
        "package.json",
        Row("description", "{}", "package.json description"),
        Row("version", "Node.js {}", ".nvmrc or .node-version or .tool-versions nodejs"),
        Row("version", "Node.js {}", "mise.toml tools node"),
        Row("version", "Node.js {}", "package.json volta node or package.json engines node"),
        Row("version", "Node.js"),
        find=lambda folder: Node(folder).read(),
    ),
    ecosystem(
        "terraform",
        "*.tf",
        Row("version", "Terraform {}", ".terraform-version"),
        Row("version", "Terraform {}", r'versions.tf|terraform.tf|main.tf ~ \brequired_version *= *"([^"\n]+)"'),
        Row("version", "Terraform"),
        Row("install", "terraform init"),
        Row("test", "terraform test", "*.tftest.hcl"),
        Row("lint", "tflint", ".tflint.hcl"),
        Row("format", "terraform fmt -recursive"),
        Row("check", "terraform validate"),
    ),
)


# ── 20 Detection ──────────────────────────────────────────────────────────────

# What `init` finds in a folder is the first draft of a registry file, which then is
# the user's. A wrong command is worse than none: where the evidence is weak, nothing
# is said. `detect` takes these steps:
#
#   1 Open the folder, and those above it in its repository: a lock file may be there.
#   2 Read the ecosystems that have a sign there, in the order of ECOSYSTEMS.
#   3 Of the commands of one name, a task runner's counts, then the first ecosystem's.
#     Those of the other ecosystems follow, with the ecosystem in their names.
#   4 The type has the first of the reasons in `detect_type`. The description is the
#     first ecosystem's, the README's or another ecosystem's.


class Detected(NamedTuple):
    """What was found in a folder; `reason` is what decided the type."""

    project_type: str
    reason: str
    description: Optional[Found] = None
    built_with: Optional[Found] = None
    packages: Optional[Found] = None  # of a workspace
    commands: tuple[Found, ...] = ()


def open_folder(path: str, home: str) -> Folder:
    """Open a folder, and those above it up to its repository's root."""
    places: list[str] = []
    for place in climb(path):
        if place == home:
            break
        places.append(place)
        if is_repository(place):
            return Folder(path, [*map(Folder, places[1:])])
    return Folder(path)


# Description


class Readme:
    """A README, of which a sentence may say what `name` is."""

    SENTENCE_END = r"(?<=[.!?]) (?=[A-Z`(])"
    NO_PROSE = ("#", "<", "|", "- ", "* ", "+ ", "..", ":", "~~~", "[!", "---", "    ", "\t")
    NO_DESCRIPTION = (  # what a first sentence begins with that says something else
        r"(?i)[\W_]*(?:see|for|check|click|read|visit|warning|note|important|welcome|if"
        r"|to|we(?:'re| are)|thanks?|please|looking|you|first|begin|install|sponsor\w*"
        r"|deprecated|update|this (?:readme|repo(?:sitory)?) (?:is|and)|an extra special|get in|join|follow)\b"
    )
    MARKUP = (  # what is taken out: images, tags, reStructuredText's links, emphasis
        (r"!\[[^\[\]]*\](?:\([^()]*\)|\[[^\[\]]*\])", ""),
        (r"<[^<>]*>(?!`)|&nbsp;", ""),
        (r"`([^`<>]*) <[^<>`]*>`_{1,2}", r"\1"),
        (r"\*{2,3}|__", ""),
    )

    def __init__(self, text: str, name: str) -> None:
        parts = text[:20000].split("```")[::2]  # outside code
        first, *others = "\n".join(parts).split("<!--")
        text = first + "".join(other.partition("-->")[2] for other in others)
        text = re.sub(r"(?m)^(#[^\n]*)$", r"\n\1\n", text)
        self.paragraphs = re.split(r"\n[ \t\r]*\n", text)
        self.name = name

    def first_sentence(self) -> str:
        """Find the sentence that describes; "" if none does.

        Headings, badges and lists are passed over. The first sentence of prose counts
        unless it begins as in NO_DESCRIPTION; a later one must define the name.
        """
        names, headings, is_early = self.name, 0, True
        for paragraph in self.paragraphs:
            unquoted = re.sub("(?m)^> ?", "", paragraph.strip("\r\n"))
            lines = [line.strip() for line in unquoted.split("\n")]
            if unquoted.startswith("#") or any(line and not line.strip("=-~^*") for line in lines[1:]):
                headings += 1
                names += f" {lines[0]}" if headings == 1 else ""
                is_early = headings == 1
            elif not unquoted.startswith(self.NO_PROSE) and not re.match(r"\[[^\[\]]*\]: ", unquoted):
                sentence = self._read_prose(" ".join(lines))
                subject = re.match(r"\W{0,3}(\w[\w.-]*)(?: [\w.-]+){0,3} (?:is|are) an? ", sentence)
                if subject and subject[1].casefold() in names.casefold():
                    return sentence
                if sentence and is_early and not re.match(self.NO_DESCRIPTION, sentence):
                    return sentence
                is_early = is_early and not sentence
        return ""

    def _read_prose(self, prose: str) -> str:
        """Return the first sentence without markup; "" if links are all there is."""
        for markup, plain in self.MARKUP:
            prose = re.sub(markup, plain, prose)
        own = re.sub(r"\[[^\[\]]*\]", "", re.sub(r"\]\([^()]*\)|\]\[[^\[\]]*\]", "]", prose))
        prose = re.sub(r"\[([^\[\]]*)\](?:\([^()]*\)|\[[^\[\]]*\])?", r"\1", prose)
        sentence = re.split(self.SENTENCE_END, tidy(prose))[0]
        is_text = len(re.findall(r"[^\W\d_]{2,}", own)) >= 3
        return sentence if is_text and not sentence.endswith((":", "...")) else ""


def whole_sentences(text: str) -> str:
    """Leave out the sentences that do not fit; a long first one ends after a word."""
    first, *others = re.split(Readme.SENTENCE_END, text)
    for sentence in others:
        if len(first) + len(sentence) > 200:
            break
        first += f" {sentence}"
    return first if len(first) < 300 else f"{first.rpartition(' ')[0]} ..."


def detect_description(folder: Folder, found: Mapping[str, list[Found]]) -> Optional[Found]:
    """Choose the first ecosystem's, the README's first sentence, or another's."""
    placeholder = r"(?i)^(?:add your description here|a new \w+ project|todo|description|my project|\W*$)"
    names = ("README.md", "[Rr][Ee][Aa][Dd][Mm][Ee].[Mm][Dd]", "README.rst")
    readme = folder.find(*names, "README", "README.txt")
    sentence = Readme(folder.text(readme), os.path.basename(folder.path)).first_sentence()
    groups = [*found.values()]
    groups.insert(1, [Found("description", sentence, readme)] if sentence else [])
    for item in itertools.chain.from_iterable(groups):
        is_usable = item.source == readme or not re.search(placeholder, item.text)
        if item.name == "description" and is_usable:
            return item._replace(text=whole_sentences(item.text))
    return None


# Type


def find_ml_package(folder: Folder) -> str:
    words = (
        *("torch", "tensorflow", "jax", "keras", "scikit-learn", "transformers", "xgboost"),
        *("lightgbm", "pytorch-lightning", "lightning", "spacy", "onnxruntime"),
    )
    # A dependency stands at the start of a line or quoted string; extras and tables
    # of tools do not count.
    wanted = re.compile(rf"(?m)(?:^[ \t-]*|[\"'])({'|'.join(words)})(?![\w-])")
    names = ("requirements.txt", "environment.yml", "pyproject.toml", "setup.py", "setup.cfg")
    for name in names:
        text = folder.text(name)
        if name == "pyproject.toml":
            text = "\n".join(folder.texts(name, "project", "dependencies"))
        match = wanted.search(text)
        if match:
            return f"{match[1]} in {name}"
    return ""


def detect_type(folder: Folder, first: Optional[Ecosystem], items: Iterable[Found]) -> tuple[str, str]:
    """Detect the type, and what decided it; `first` is the first ecosystem."""
    told = next((item for item in items if item.name == "type"), None)
    if told:
        return told.text, told.source

    is_node = bool(first and first.name == "javascript")

    def package(kind: str, *sections: str) -> str:
        tables = (folder.table("package.json", name) for name in sections if is_node)
        there = set(itertools.chain.from_iterable(tables))
        rows = (row for row in Node.FRAMEWORKS if row[2] == kind and row[0] in there)
        return next((f"{row[0]} in package.json" for row in rows), "")

    used = ("dependencies", "peerDependencies")
    rules = (
        ("mobile", package("mobile", *used)),
        ("ml", find_ml_package(folder)),
        ("frontend", package("frontend", *used, "devDependencies")),
        ("backend", package("backend", *used)),
        ("frontend", folder.holds("index.html + package.json") if is_node else ""),
        ("backend", folder.holds(first.sign) if first else ""),
        ("backend", folder.find("Makefile")),
        ("ml", folder.find("*.ipynb")),
        ("frontend", folder.find("index.html")),
        ("backend", "type unknown: set it with -t"),
    )
    return next((kind, reason) for kind, reason in rules if reason)


# The packages of a workspace


WORKSPACES = (  # whose, where globs and members' names are, and how one is used
    ("javascript", "pnpm-workspace.yaml packages", "package.json name", ""),
    ("javascript", "package.json workspaces", "package.json name", ""),
    ("javascript", "package.json workspaces packages", "package.json name", ""),
    ("rust", "Cargo.toml workspace members", "Cargo.toml package name", "cargo test -p NAME"),
    (
        *("python", "pyproject.toml tool uv workspace members", "pyproject.toml project name"),
        "uv run --package NAME pytest",
    ),
)
OTHER_WORKSPACES = (  # the file, where in it members stand, and what each looks like
    ("go.work", r"(?m)^[ \t]*(?:use[ \t(]+)?\./.*$", r"\./([^\s)]+)"),
    ("settings.gradle.kts", r"(?m)^[ \t]*(?:include\b|\":).*$", r"\"(:?[\w.:-]+)\""),
    ("settings.gradle", r"(?m)^[ \t]*(?:include\b|['\"]:).*$", r"['\"](:?[\w.:-]+)['\"]"),
    ("pom.xml", r"<module>[^<]*</module>", r"<module>\s*([^<\s]+)\s*</module>"),
)


def find_members(folder: Folder, globs: str, name: str) -> Iterator[Folder]:
    """Open the members of a workspace, by its columns of WORKSPACES."""
    source, *keys = globs.split()
    excluded = (f"!{glob}" for glob in folder.texts(source, *keys[:-1], "exclude"))
    return folder.members([*folder.texts(source, *keys), *excluded], name.partition(" ")[0])


def find_part_paths(folder: Folder) -> Iterator[tuple[str, str]]:
    """Iterate over the paths of the members of all workspaces, and what lists each."""
    for _, globs, name, _ in WORKSPACES:
        for member in find_members(folder, globs, name):
            yield os.path.relpath(member.path, folder.path), globs.partition(" ")[0]
    for source, around, pattern in OTHER_WORKSPACES:
        text = "\n".join(re.findall(around, folder.text(source)))
        for path in re.findall(pattern, text):
            yield path.replace(":", "/").strip("./"), source


def detect_packages(folder: Folder, first: str) -> Optional[Found]:
    """Describe the packages of a workspace: up to 12 by name, more by their number."""
    for _, globs, name, one in sorted(WORKSPACES, key=lambda row: row[0] != first):
        names, places = set(), Counter[str]()
        for member in find_members(folder, globs, name):
            own = member.value(*name.split()) or os.path.basename(member.path)
            # Only what looks like a name: other text could tell agents anything.
            if isinstance(own, str) and re.fullmatch(r"@?[\w./-]{1,200}", own):
                names.add(own)
            path = os.path.relpath(member.path, folder.path)
            places[f"{os.path.dirname(path) or '.'}/"] += 1
        if names:
            most = ", ".join(place for place, _ in places.most_common(4))
            most += ", ..." * (len(places) > 4)
            listed = f"{len(names)} in {tidy(most)}"
            if len(names) <= 12:
                listed = ", ".join(sorted(names))
            call = one or Node(folder).call_member
            return Found("packages", f"{listed} (one of them: `{call}`)", globs.partition(" ")[0])
    return None


# Commands


class Selection:
    """The commands of a folder: the first of each name, with its label."""

    NAMES = (
        *("install", "build", "test", "one test", "lint", "format", "type check"),
        *("run", "check", "before a commit"),
    )
    TESTERS = (
        r"\b(?:pytest|vitest|jest|mocha|phpunit|rspec|ctest"
        r"|(?:cargo|go|mix|dotnet|swift|dart|flutter) test)\b"
    )

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.found: dict[tuple[str, str], Found] = {}  # by ecosystem ("" for the first) and name
        self.covered: set[str] = set()  # by a task runner

    def add(self, item: Found, ecosystem: str = "") -> None:
        name, _, note = item.name.partition(" (")
        notes = ", ".join(filter(None, (ecosystem, note.rstrip(")"))))
        label = f"{name} ({notes})" if notes else name
        self.found.setdefault((ecosystem, name), item._replace(name=label))

    def add_runners(self, found: Mapping[str, list[Found]]) -> None:
        """Add task runners' commands, and how their tester runs one test."""
        for read_runner in TASK_RUNNERS:
            scripts = read_runner(self.folder)
            test = dict(scripts.pick()).get("test")
            tester = re.search(self.TESTERS, test.text) if test else None
            if tester and ("", "test") not in self.found:
                items = itertools.chain.from_iterable(found.values())
                for item in items:
                    if item.name == "one test" and tester[0] in item.text:
                        self.add(item)  # the first counts
            for item in scripts.find():
                self.add(item)
        self.covered = {name for _, name in self.found}

    def add_ecosystem(self, name: str, items: Iterable[Found]) -> None:
        """Add an ecosystem's commands: of a second one, only what no runner covers."""
        covered = self.covered if name else ()
        others = {*NO_COMMANDS, *covered}
        commands = [i for i in items if i.text and i.name.partition(" (")[0] not in others]
        # Alone, install is of no use.
        if not name or any(item.name != "install" for item in commands):
            for item in commands:
                self.add(item, "" if item.name == "before a commit" else name)

    def put_in_order(self, ecosystems: Iterable[str]) -> tuple[Found, ...]:
        """Order the commands by ecosystem, and as in NAMES."""
        keys = ((ecosystem, name) for ecosystem in ecosystems for name in self.NAMES)
        return tuple(self.found[key] for key in keys if key in self.found)


def detect_commands(folder: Folder, found: Mapping[str, list[Found]]) -> tuple[Found, ...]:
    selection = Selection(folder)
    selection.add_runners(found)
    for index, (ecosystem, items) in enumerate(found.items()):
        selection.add_ecosystem(ecosystem if index else "", items)
    hooks = ".pre-commit-config.yaml"
    if folder.find(hooks):
        selection.add(Found("before a commit", "pre-commit run --all-files", hooks))
    return selection.put_in_order(["", *found])


# All together


def detect_versions(found: Mapping[str, list[Found]]) -> Optional[Found]:
    """Put the first ecosystem's version and tools into one line, then the others'."""
    parts: list[Found] = []
    for index, items in enumerate(found.values()):
        parts += [item for item in items if item.name == "version"][:1]
        if index == 0:
            parts += [item for item in items if item.name == "tool"][:6]
    text = ", ".join(dict.fromkeys(item.text for item in parts))
    return Found("built with", text, parts[0].source) if parts else None


def detect(path: str, home: str = "") -> Detected:
    """Detect what a folder holds; raises IoError if it cannot be listed."""
    folder = open_folder(path, home)
    systems: list[Ecosystem] = []
    for system in ECOSYSTEMS:
        if folder.holds(system.sign) and not (system.only_first and systems):
            systems.append(system)
    found = {system.name: list(system.read(folder)) for system in systems}
    items = [item for system in found.values() for item in system]
    return Detected(
        *detect_type(folder, systems[0] if systems else None, items),
        detect_description(folder, found),
        detect_versions(found),
        detect_packages(folder, next(iter(found), "")),
        detect_commands(folder, found),
    )


# ── 21 Drafting ───────────────────────────────────────────────────────────────

# What `init` makes of what was found. Where the user's own instruction files already
# have commands, none are drafted: what repeats them costs attention, and what
# contradicts them does harm.


class Draft(NamedTuple):
    """What to register of a folder, and what `init` prints about it.

    `targets` is empty if nothing there says which; then `defaults` are taken. Where a
    layer says some, neither counts. `found` is printed as results, `notes` as notes.
    """

    description: str
    commands: Pairs
    targets: tuple[str, ...]
    defaults: tuple[str, ...]
    found: tuple[Found, ...]
    notes: tuple[str, ...]


def read_own_texts(root: str) -> dict[str, str]:
    """Read the files that instruct agents, without a block of Orchestra's."""
    texts = {}
    for agent in AGENTS.values():
        for path in () if agent.owned else (agent.path, *agent.traces):
            with suppress(IoError):
                data = read_disk(real_path(f"{root}/{path}"), 1 << 20).data
                with suppress(SyncError):  # half a block: all of it may be the user's
                    block = find_block(data)
                    data = data if block is None else data[: block.start] + data[block.stop :]
                if data.strip():
                    texts[path] = data.decode("utf-8", "replace")
    return texts


@functools.lru_cache(1)
def known_runners() -> frozenset[str]:
    """Return what commands begin with: task runners, and whatever is drafted."""
    names = (
        "npm npx pnpm yarn bun bunx node nx turbo make just task mise uv uvx poetry"
        " pdm hatch tox nox pytest python python3 pip pre-commit php bundle rake rspec"
        " mvn gradle fvm ninja gofmt docker"
    )
    rows = (row for system in ECOSYSTEMS for row in system.rows if row.name not in NO_COMMANDS)
    drafted = (row.text.split(" ", 1)[0] for row in rows)
    return frozenset((*names.split(), *drafted)) - {"git", "clang-format"}


def is_command(text: str, is_fenced: bool) -> bool:
    """Recognize a command of a known runner; a runner's bare name may be just that."""
    alone = ("make", "ninja", "tox", "nox", "pytest", "ctest", "rake", "rspec")
    words = [*itertools.dropwhile(lambda word: "=" in word, text.strip().removeprefix("$ ").split())]
    if not words or words[1:2] == ["#"]:
        return False
    is_script = len(words) > 1 and re.match(r"(?:\./|bin/|scripts?/|vendor/bin/)\w", words[0])
    is_known = words[0] in known_runners() and (len(words) > 1 or is_fenced or words[0] in alone)
    return bool(is_script or is_known)


def count_commands(text: str) -> int:
    """Count the different commands in a text's code spans and fenced lines."""
    shells = ("", "sh", "bash", "zsh", "fish", "shell", "console", "terminal", "text")
    found: set[str] = set()
    fence, is_shell = "", False
    for line in map(str.strip, text.split("\n")):
        inner = line.lstrip("-*+>.) 0123456789")  # a fence may be in a list item
        mark = inner[:3]
        if mark in ("```", "~~~") and mark not in inner[3:] and fence in ("", mark):
            fence = "" if fence else mark
            is_shell = inner.strip("`~").strip().lower() in shells
        elif not fence:
            spans = re.findall("`([^`]+)`", re.sub("`{2,}", "`", line))
            found.update(span.strip() for span in spans if is_command(span, False))
        elif is_shell and is_command(line, True):
            found.add(line)
    return len(found)


def find_written(root: str) -> set[str]:
    """Find the agents that already have Orchestra's text there, from any registry."""
    found = set()
    for agent in AGENTS.values():
        with suppress(IoError, SyncError):
            data = read_disk(f"{root}/{agent.path}", 1 << 20).data
            if re.search(BANNER_LINE, data) if agent.owned else find_block(data):
                found.add(agent.target)
    return found


def find_targets(root: str, texts: Mapping[str, str], written: Collection[str]) -> tuple[str, ...]:
    """Find the agents whose instruction files are there.

    Those that Orchestra has `written` for stay; if there are any, no traces of others
    count. One is left out if its file imports AGENTS.md, or is a link to another's
    file: it reads the text there, and would read it twice. So is one whose new file
    would hide the user's own. Where the user's own text is, the agent's target with a
    file of Orchestra's alone is taken, if it has one.
    """

    def has(path: str) -> bool:
        return os.path.exists(f"{root}/{path}")

    def is_link(path: str) -> bool:
        others = (f"{root}/{agent.path}" for agent in AGENTS.values() if agent.path != path)
        own = f"{root}/{path}"
        return os.path.islink(own) and any(is_same_file(own, it) for it in others if not os.path.islink(it))

    def hides(path: str) -> bool:
        return any(row.hidden in texts for row in HIDING if row.path == path)

    imports_agents = r"(?<![\w`@/.])@(?:\.{1,2}/)*AGENTS\.md\b"
    importing = {
        agent.target
        for agent in AGENTS.values()
        if agent.path != "AGENTS.md"
        and any(re.search(imports_agents, texts.get(path, "")) for path in (agent.path, *agent.traces))
    }
    owned = {path: agent.target for agent in AGENTS.values() for path in agent.twins if agent.owned}
    targets: dict[str, None] = {}
    for agent in AGENTS.values():
        is_imported = agent.path == "AGENTS.md" and bool(importing)
        is_used = not written and any(map(has, agent.traces)) and not hides(agent.path)
        is_there = is_imported or has(agent.path) or is_used
        if agent.target in written:
            targets[agent.target] = None
        elif is_there and agent.target not in importing and not is_link(agent.path):
            has_text = any(path in texts for path in (agent.path, *agent.twins))
            targets[owned.get(agent.path, agent.target) if has_text else agent.target] = None
    return tuple(targets)


def find_other_tools(root: str, texts: Mapping[str, str]) -> list[str]:
    """Note what shows that another tool writes instruction files too."""
    generated = r"(?i)\b(?:(?<!\bare )generated (?:by|from|with|file\b)|do not edit (?:this|directly)|source: \.ruler/)"
    notes = [
        f"{path} says that another tool generates it, which would overwrite Orchestra's block"
        for path, text in texts.items()
        if re.search(generated, text[:1000])
    ]
    if os.path.isdir(f"{root}/.ruler"):
        notes.append(".ruler/ is there: ruler writes the same files, so let one of the two do it")
    return notes


def make_draft(root: str, found: Detected) -> Draft:
    """Draft what to register of a folder in which something was detected."""
    texts, written = read_own_texts(root), find_written(root)
    targets = find_targets(root, texts, written)
    counts = {path: count_commands(text) for path, text in texts.items()}
    most = max(counts, key=lambda path: counts[path], default="")
    shown = [found.description, found.built_with, found.packages, *found.commands]
    if most and counts[most] >= 2:  # one alone may be in passing
        found = found._replace(description=None, built_with=None, packages=None, commands=())
        shown = [Found("commands", f"left out, {most} has its own ({counts[most]})", "")]
        # A file of Orchestra's own would say nothing, but for one beside the user's.
        staying = {t for t in targets if any(twin in texts for twin in AGENTS[t].twins)}
        staying.update(written)
        kept = [t for t in targets if not AGENTS[t].owned or t in staying]
        targets = tuple(kept) or targets
    paragraphs = (
        (found.description, "{}"),
        (found.built_with, "Built with: {}."),
        (found.packages, "Packages: {}."),
    )
    in_use = [
        agent.target for agent in AGENTS.values() if any(os.path.isdir(f"{root}/{folder}") for folder in agent.folders)
    ]
    return Draft(
        "\n\n".join(form.format(item.text) for item, form in paragraphs if item),
        tuple((command.name, command.text) for command in found.commands),
        targets,
        tuple(target for target in AGENTS if target in (*DEFAULT_TARGETS, *in_use)),
        tuple(filter(None, shown)),
        tuple(find_other_tools(root, texts)),
    )


def is_fixture_of(member: str, path: str) -> bool:
    """Return whether a path is in a member's folder of tests: nobody works on that."""
    return path.startswith(f"{member}/") and bool(re.search("/(tests?|__tests__|fixtures)/", path[len(member) :]))


def name_parts(root: str) -> tuple[str, dict[str, str]]:
    """Name up to 100 members of workspaces, by path; also return what lists them.

    A part is called after its folder, or by its path where two would be called alike.
    """
    sources = dict([*find_part_paths(Folder(root))][::-1])  # the first counts
    usable = (path for path in sorted(sources) if PartPath().is_fit(path) and os.path.isdir(f"{root}/{path}"))
    members = [*itertools.islice(usable, Folder.MAX_MEMBERS)]
    paths = [path for path in members if not any(is_fixture_of(other, path) for other in members)]
    counts = Counter(os.path.basename(path).casefold() for path in paths)
    names: dict[str, str] = {}
    stems: set[str] = set()
    for path in paths[:100]:
        base = os.path.basename(path)
        name = base if counts[base.casefold()] == 1 else path.replace("/", "-")
        while spelled_alike(Component(name, "").stem) in stems:
            name = f"{len(stems)}-{name}"  # in front: the stem is cut at its end
        names[path] = name
        stems.add(spelled_alike(Component(name, "").stem))
    return ", ".join(dict.fromkeys(sources[path] for path in names)), names


def draft_parts(root: str, home: str, names: Mapping[str, str], whole: Detected) -> Iterator[Component]:
    """Draft a codebase's parts, without what is installed once for the whole of it."""
    folder = Folder(root)
    runners = [read_runner(folder).source for read_runner in TASK_RUNNERS]  # a part has its own
    installs = [c.text for c in whole.commands if c.name.startswith("install") and c.source not in runners]
    for path, name in names.items():
        detected = detect(f"{root}/{path}", home)
        draft = make_draft(f"{root}/{path}", detected)
        commands = tuple(pair for pair in draft.commands if pair[1] not in installs)
        yield Component(name, detected.project_type, (), (), path, draft.description, commands)


# ══ III Sync ══════════════════════════════════════════════════════════════════

# ── 22 Text ───────────────────────────────────────────────────────────────────

# What agents read is a pure function of the registry: no time, no counter, no look at
# the disk. So a second sync writes nothing. Text from the registry is made harmless by
# `one_line`, `many_lines`, `paragraphs`, `code_span` and `code_block`, each for one
# place in the Markdown that `render_body` makes.
#
# An agent imports the file that a bare @word names (Claude, Gemini), so each bare @word
# is put in backticks. Backticks already in the text count only if every reader pairs
# them the same way: on one line, all of them, with nothing near that could consume one
# (an HTML tag, a link's title, an escape, a table's cell). In doubt they become
# apostrophes.
#
# All of it is linear in the text's length: no pattern has two unbounded repeats that
# could share characters, and no failed scan is started again one character on.

LINE_PREFIX = " \t>*+-0123456789.)"  # in front of what begins a block in a line
NOT_PLAIN = re.compile(r"[<>`@~\[\]]").search

# Text from the registry made harmless


def is_plain(text: str) -> bool:
    """Recognize a line that is harmless as it is, as most are."""
    return text.isprintable() and not NOT_PLAIN(text) and "  " not in text and text.strip() == text


def defuse(text: str) -> str:
    """Blank control characters, and escape what could open or close an HTML comment."""
    return blank_controls(text).replace("<!--", "&lt;!--").replace("-->", "--&gt;")


def _split_at_spans(line: str) -> list[str]:
    """Split a line into text, code span, text, ...; [] if a backtick has no partner."""
    if "`" not in line:
        return [line]
    parts, done = [], 0
    runs = iter(re.finditer("`+", line))
    for start in runs:
        end = next((run for run in runs if len(run[0]) == len(start[0])), None)
        if end is None or line.endswith("\\", done, start.start()):
            return []
        parts += [line[done : start.start()], line[start.start() : end.end()]]
        done = end.end()
    return [*parts, line[done:]]


def _quote_at_words(text: str) -> str:
    """Put bare @words in backticks; escape what could take a backtick for itself."""

    def quote(match: re.Match[str]) -> str:
        word, follows = match[0].rstrip(".,;:!?}"), match.string[match.end() : match.end() + 1]
        return f"`{word}`{match[0][len(word) :]}" if word.strip("\\@") or follows.strip() else match[0]

    lines = text.split("\n")
    parts = [_split_at_spans(line) for line in lines]
    spans = [span for line in parts for span in line[1::2]]
    # In a table any bar but \| ends the cell, and the code span with it.
    has_bar = any("|" in span.replace("\\\\", "|").replace("\\|", "") for span in spans)
    has_table = any("-" in line and ("|" in line or ":" in line) and not line.strip(" \t>|:-") for line in lines)
    if not all(parts) or (has_bar and has_table):
        parts = [[line.replace("`", "'")] for line in lines]
    for line in parts:
        if not re.search(r"[<@\]]", "".join(line[::2])):
            continue
        begins = line[0].lstrip(LINE_PREFIX)[:1]
        if begins == "<":  # it may begin a block of HTML, where backticks mean nothing
            line[0] = line[0].replace("<", "&lt;", 1)
        elif begins == "[" and "]:" in "".join(line):  # a link's definition may have a title
            line[0] = line[0].replace("[", "\\[", 1)
        for i in range(0, len(line), 2):
            # Neither <b>, <https://x> nor a link without a title can take a backtick.
            line[i] = re.sub(r"<(?=[A-Za-z/!?])(?![^<>`\"'@]*>)", "&lt;", line[i])
            line[i] = re.sub(r"\](?=\((?![^\s()<>\"'`\[\]]*\)))", r"]\\", line[i])
            line[i] = re.sub(r"(?<![\w`\\])\\*@[^\s`\"'()<>\[\]|\\]*", quote, line[i])
    return "\n".join(map("".join, parts))


def one_line(text: str) -> str:
    """Make text harmless inside a line: it opens no fence and leaves nothing open."""
    if is_plain(text):
        return text
    text = " ".join(defuse(text).split())
    is_definition = text.startswith("[") and text.endswith("]")  # of a link, if a colon follows
    if is_definition or (text.startswith(("```", "~~~")) and re.match(FENCE.decode(), text)):
        text = "\\" + text
    return _quote_at_words(text)


def _find_fences(lines: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Find fenced blocks that every reader sees alike, up to the first doubtful one."""
    fence, start = "", 0
    for i, line in enumerate(lines):
        if not fence:
            opened = re.match(FENCE.decode(), line.lstrip(LINE_PREFIX))
            if opened and not re.fullmatch(r"(?:`{3,}|~{3,})[\w+#.-]*", line):
                return
            fence, start = (opened[1] or opened[2], i) if opened else ("", 0)
        elif line.strip(" \t").startswith(fence) and not line.strip(f" \t{fence[0]}"):
            if not line.lstrip(" ").startswith(fence) or line.startswith("    "):
                return
            yield start, i + 1
            fence = ""


def many_lines(text: str, indent: str = "  ") -> str:
    """Make Markdown harmless inside a list item, which closes what it leaves open."""
    if is_plain(text):
        return text
    lines = defuse(text).strip().split("\n")
    if "@" in text:
        safe: list[str] = []
        done = 0
        for start, end in (*_find_fences(lines), (len(lines), len(lines))):
            safe += _quote_at_words("\n".join(lines[done:start])).split("\n") if start > done else []
            safe += lines[start:end]
            done = end
        lines = safe
    return "\n".join((indent + line if i else line).rstrip() for i, line in enumerate(lines))


def paragraphs(text: str) -> str:
    """Make Markdown harmless at the top of a file, in a list item if need be."""
    text = defuse(text).strip()
    for line in text.split("\n"):
        opens_block = line.lstrip(LINE_PREFIX).startswith(("```", "~~~", "<"))
        if opens_block or re.match(r"    |\t|(?:>{7}|\|{7}) ", line):  # the last as git's conflicts have
            return f"- {many_lines(text)}"
    return many_lines(text, "")


def _longer_backticks(text: str, least: int) -> str:
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def code_span(text: str) -> str:
    """Put text of one line into backticks, however many it has itself."""
    if is_plain(text):
        return f"`{text}`"
    text = " ".join(defuse(text).split())
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    fence = _longer_backticks(text, 1)
    return f"{fence}{pad}{text}{pad}{fence}"


def code_block(text: str, indent: str) -> str:
    """Put text into an indented fence, which no line of it can close."""
    fence = _longer_backticks(text, 3)
    return "\n".join((indent + line).rstrip() for line in [fence, *defuse(text).strip("\n").split("\n"), fence])


# The text


def _render_command(name: str, command: str) -> str:
    if "\n" in command.strip():
        return f"- {one_line(name)}:\n\n{code_block(command, '  ')}\n"
    return f"- {one_line(name)}: {code_span(command)}"


def _render_task(task: Task) -> str:
    status = {"pending": "to do", "inprogress": "in progress"}.get(task.status, task.status)
    line = f"- {one_line(task.id)} ({status}): {one_line(task.title)}"
    return f"{line}\n\n  {many_lines(task.description)}\n" if task.description.strip() else line


def _render_skill(skill: Skill) -> str:
    description = one_line(skill.description)
    return f"- {one_line(skill.id)}" + (f": {description}" if description else "")


def _render_role(role: AgentRole) -> str:
    entry = f": {code_span(role.entry_point)}" if role.entry_point.strip() else ""
    skills = f" (skills: {', '.join(map(one_line, role.skills))})" if role.skills else ""
    return f"- {one_line(role.agent_id)}{entry}{skills}"


def _render_section(title: str, lines: Sequence[str]) -> str:
    return (title and f"## {title}\n\n") + "\n".join(lines).rstrip("\n") + "\n"


def _render_stack(parts: Iterable[Component]) -> Iterator[str]:
    for part in parts:
        place = f", in {code_span(part.path)}" if part.path else ""
        tasks = f" ({count_of(len(part.open_tasks), 'open task')})" if part.path and part.open_tasks else ""
        yield f"- {one_line(part.name)}: {part.project_type}{place}{tasks}"


def _is_simple(codebase: Codebase) -> bool:
    """Return whether a codebase has one part at most, and that is all of it."""
    return len(codebase.projects) < 2 and all(p.name == codebase.name and not p.path for p in codebase.projects)


def render_head(codebase: Codebase) -> str:
    """Write what a codebase is, unless the user's own text is there to say it.

    A type is shown unless it is the one that is taken without evidence.
    """
    text = [f"# {one_line(codebase.name)}\n"]
    if codebase.description.strip():
        text.append(f"{paragraphs(codebase.description)}\n")
    if _is_simple(codebase) and any(part.project_type != "backend" for part in codebase.projects):
        text.append(_render_section("Stack", [*_render_stack(codebase.projects)]))
    return "\n".join(text)


def render_body(codebase: Codebase, is_split: bool = False) -> str:
    """Write all else that an agent is told about a codebase, "" if that is nothing.

    `is_split` leaves out the tasks of parts, which stand in files of their own.
    """
    parts = codebase.projects
    tasks = (task for part in parts if not (is_split and part.path) for task in part.open_tasks)
    sections = (
        ("Stack", [] if _is_simple(codebase) else [*_render_stack(parts)]),
        ("Commands", [_render_command(name, command) for name, command in codebase.commands]),
        ("Conventions", [f"- {many_lines(text)}" for text in codebase.conventions]),
        *(("", [prose.text]) for prose in codebase.prose),
        ("Tasks", [*map(_render_task, tasks)]),
        ("Skills", [_render_skill(skill) for skill in codebase.skills]),
        ("Agents", [_render_role(role) for part in parts for role in part.agents]),
        ("Notes", [f"- {many_lines(text)}" for text in codebase.notes]),
    )
    return "\n".join(itertools.starmap(_render_section, ((title, lines) for title, lines in sections if any(lines))))


def render_text(codebase: Codebase, body: str) -> str:
    """Write all that an agent is told about a codebase; `render_body` made the body."""
    head = render_head(codebase)
    return f"{head}\n{body}" if body else head


def codebase_of_part(codebase: Codebase, path: str) -> Codebase:
    """Return what there is to say of the part in a folder, as if it were a codebase."""
    part = next(part for part in codebase.projects if part.path == path)
    alone = Component(part.name, "backend", part.tasks)
    return Codebase(
        *(codebase.project, part.name, "", part.description, (), part.commands, part.conventions, part.notes),
        projects=(alone,),
    )


# What a user should know of a text


def describe_hidden(text: str) -> str:
    """Name the characters that only an agent sees, "" if there are none.

    That is soft hyphens, marks of direction, zero widths, fillers, tags and other
    formats, by the Unicode Character Database 15; but neither the joiners of emoji and
    of Arabic or Indic letters, nor the tags of a flag.
    """
    text = re.sub("\U0001f3f4[\U000e0030-\U000e007a]{3,6}\U000e007f", "", text)
    hidden = (
        "[\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164"
        "\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]|[\ufe00-\ufe0f]{2}"
        "|(?<![\u0600-\u0fff\u200c\u2190-\u2bff\u3000-\u33ff\ufe0f\U0001f000-\U0001faff])[\u200c\u200d]"
        "|[\u200c\u200d](?![\u0600-\u0fff\u2190-\u2bff\u3000-\u33ff\U0001f000-\U0001faff])"
    )
    found = sorted(set(re.findall(hidden, text)))
    if not found:
        return ""
    from unicodedata import name

    names = [f"U+{ord(c[0]):04X} {name(c[0], 'without a name')}" for c in found]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"contains invisible characters: {', '.join(names[:3])}{more}"


def show_hidden(text: str) -> str:
    """Escape control characters and marks of direction; tabs and line ends stay."""
    return re.sub(
        "[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
        "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]|\r(?!\n)",
        lambda match: repr(match[0])[1:-1],
        text,
    )


def describe_size(agent: Agent, data: bytes, only_excess: bool = False) -> str:
    """Compare a file with its agent's budget; `only_excess` leaves out what fits."""
    if only_excess and (agent.budget is None or len(data) <= agent.budget.limit):
        return ""
    limit, unit, rule = agent.budget or Budget(0, "bytes", "")
    count = {"bytes": len(data), "lines": data.count(b"\n"), "characters": len(data.decode("utf-8", "replace"))}[unit]
    if only_excess and count <= limit:
        return ""
    return f"{count} {unit}" + (f"; {rule} {limit}" if rule else "")


# ── 23 Blocks ─────────────────────────────────────────────────────────────────

# Managed text is what is Orchestra's in a managed file: all of an owned file, and of a
# shared one the block between two markers. The rest of a shared file is the user's, and
# every byte of it stays.

# Normal forms

# Formatters and git change what Orchestra wrote, and that is no edit. Each of these is
# looser than the one before:
#
#   1 `exact_digest_of` ignores CRLF. Records of earlier versions hold these.
#   2 `digest_of` ignores white space as well. Records hold these: it can never change.
#   3 `is_reformatted` ignores all that formatters rewrite. It compares a file only with
#     the very text that is wanted there, so it may be that loose.
#
# That of the backups (`significant_text`) is for the user's text, where white space in
# code matters.


def exact_digest_of(text: bytes) -> str:
    return sha256_of(text.replace(b"\r\n", b"\n"))


@functools.lru_cache(maxsize=len(AGENTS))  # most files of a codebase have one text
def digest_of(text: bytes) -> str:
    """Hash a managed text without the white space that formatters and git change."""
    text = b"\n".join(filter(None, map(bytes.rstrip, text.split(b"\n"))))
    # Every file at every look comes through here, so the expression is left for those
    # that need it.
    if b"\t" in text or any(part.endswith((b"-", b"*", b"+", b".", b")")) for part in text.split(b"  ")):
        text = LIST_GAP.sub(rb"\1 ", text)
    return sha256_of(text)


def _loosen(line: bytes) -> bytes:
    """Drop what formatters choose: list marks, emphasis, fences, escapes, spaces."""

    def loosen_stars(run: re.Match[bytes]) -> bytes:
        around = (run.string[max(0, run.start() - 1) : run.start()], run.string[run.end() : run.end() + 1])
        is_inside_word = all(char.isalnum() or char > b"\x7f" for char in around)
        return run[0] if is_inside_word else b"*" * len(run[0])

    line = b" ".join(line.split())
    if line.isalnum() or not line:
        return line
    if re.fullmatch(rb"(?:[-*_] ?){3,}", line):
        return b"---"
    found = re.match(rb"(?:" + LIST_MARK + rb" )*", line)
    marks = found[0] if found else b""
    text = re.sub(rb"\\([!-/:-@\[-`{-~])", rb"\1", line[len(marks) :])
    text = re.sub(rb"[*_]+", loosen_stars, text)
    for one, other in ((b"&lt;", b"<"), (b"&gt;", b">"), (b"&amp;", b"&"), (b"~~~", b"```"), (b" ", b"")):
        text = text.replace(one, other)
    kinds = [b"- " if mark in (b"-", b"*", b"+") else b"1. " for mark in marks.split()]
    return b"".join([*kinds, re.sub(rb"-{2,}", b"-", text).strip(b"|")])


def is_reformatted(one: bytes, other: bytes) -> bool:
    """Return whether two texts differ only in what Markdown formatters rewrite."""
    first, second = (b"".join(map(_loosen, text.split(b"\n"))) for text in (one, other))
    return first == second


# Seals


def seal_of(text: bytes) -> str:
    """Hash a text to the 8 hex digits in its banner, which prove who wrote it.

    White space does not count: formatters change it.
    """
    return sha256_of(b" ".join(text.split()))[:8]


def seal_in(text: bytes) -> str:
    """Read the seal in a text's banner, "" if it has none."""
    banner = re.search(BANNER_LINE, text)
    return banner[1].decode() if banner else ""


def is_sealed(agent: Agent, text: bytes) -> bool:
    """Return whether a managed text is as some Orchestra wrote it: its seal fits."""
    banner = re.search(BANNER_LINE, text)
    if banner is None:
        return False
    head, body = text[: banner.start()], text[banner.end() :]
    if not agent.owned:
        return head.strip() == BLOCK_BEGIN.encode() and seal_of(body[: -len(BLOCK_END)]) == banner[1].decode()
    found = [line.rstrip() for line in head.decode("utf-8", "replace").split("\n") if line.strip()]
    expected = [line.partition("{title}") for line in agent.header.split("\n") if line]
    has_header = len(found) == len(expected) and all(
        line.startswith(start) if title else line == start for line, (start, title, _) in zip(found, expected)
    )
    return has_header and seal_of(body) == banner[1].decode()


# Rendering, reading, inserting and removing managed text


def render_files(codebase: Codebase, beside: Collection[str] = (), importing: Container[str] = ()) -> dict[str, bytes]:
    """Render each target's managed text: an owned file, or the block of a shared one.

    Blocks `beside` the user's own text are left without a head, and are b"" if nothing
    remains; so is any other file then that would have but a heading. Those at
    `importing` get a line that imports the user's file which they hide.
    """

    def seal(text: str) -> str:
        return f"{BANNER.format(seal=seal_of(text.encode('utf-8', 'replace')))}\n\n{text}"

    @functools.cache
    def render(part: str, is_split: bool) -> tuple[str, str, str, bool]:
        told = codebase_of_part(codebase, part) if part else codebase
        title = json.dumps(" ".join(defuse(f"{told.name}: instructions").split()), ensure_ascii=False)
        body = render_body(told, is_split)
        text = render_text(told, body)
        return title, body, seal(text), text.count("\n") == 1

    files = {}
    has_parts = any(part.path for part in codebase.projects)
    for agent in managed_files(codebase).values():
        title, body, text, is_heading = render(agent.part, has_parts and not agent.part and agent.has_parts)
        if agent.path in importing:
            text = seal(f"{body}\n@{os.path.basename(agent.hides)}\n".lstrip("\n"))
        elif agent.path in beside:
            text = seal(body) if body else ""
        elif beside and is_heading:
            text = ""
        if text:
            header = agent.header.replace("{title}", title)
            text = header + text if agent.owned else f"{BLOCK_BEGIN}\n\n{text}\n{BLOCK_END}"
        files[agent.path] = text.encode("utf-8", "replace")
    return files


def managed_text(agent: Agent, data: bytes) -> Optional[bytes]:
    """Cut out what is Orchestra's; raises SyncError for a file it must not change."""
    if agent.owned:
        check_merge(data, 0, len(data))
        return data
    return _managed_block(data)


@functools.lru_cache(maxsize=len(AGENTS))  # most shared files of a codebase are alike
def _managed_block(data: bytes) -> Optional[bytes]:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SyncError(f"expected UTF-8 text, got the byte 0x{data[error.start]:02x} at {error.start}") from None
    if b"\0" in data:
        raise SyncError(f"expected text, got a NUL byte at {data.index(0)}")
    markers = find_markers(data)
    if markers:
        check_merge(data, markers[0].start, markers[-1].end)
    block = find_block(data)
    return None if block is None else data[block]


def has_own_text(data: bytes) -> bool:
    """Return whether a shared file has text of the user's; raises SyncError."""
    block = find_block(data)
    around = data if block is None else data[: block.start] + data[block.stop :]
    return bool(around.replace(BOM, b"").strip())


def newline_of(data: bytes) -> bytes:
    end = data.find(b"\n")
    return b"\r\n" if end > 0 and data[end - 1 : end] == b"\r" else b"\n"


def insert_managed_text(agent: Agent, before: Disk, wanted: bytes) -> tuple[bytes, Optional[str]]:
    """Put managed text into a file's bytes; also return what joins an appended one."""
    data = before.data
    block = None if agent.owned else find_block(data)
    newline = newline_of(data[block.start :] if block else data)
    if newline != b"\n":
        wanted = wanted.replace(b"\n", newline)
    if agent.owned:
        return wanted, None
    if block is not None:
        return data[: block.start] + wanted + data[block.stop :], None
    if before.kind == "absent":
        return wanted + b"\n", None
    join = b"" if not data.replace(BOM, b"") else newline if data.endswith(b"\n") else newline * 2
    return data + join + wanted + newline, join.decode()


def remove_managed_text(agent: Agent, before: Disk, join: Optional[str]) -> Optional[bytes]:
    """Take managed text out of a file's bytes; None if nothing of the user's is left.

    `join` is what `insert_managed_text` returned; None if Orchestra made the file.
    """
    block = None if agent.owned else find_block(before.data)
    if block is None:
        return None
    head, tail = before.data[: block.start], before.data[block.stop :]
    tail = tail[1 if tail[:1] == b"\n" else 2 if tail[:2] == b"\r\n" else 0 :]
    seam = (join or "").encode()
    count, newline = seam.count(b"\n"), newline_of(seam)
    has_turned = newline_of(before.data[block.start :]) != newline  # git has changed the line ends since
    left = head
    for _ in range(count):
        end = newline_of(left[-2:]) if has_turned else newline
        left = left[: -len(end)] if left.endswith(end) else left
    if count == 2 or (left != head and left.endswith(b"\n")):
        # Two were put where the user's text had no final line end; what follows it
        # needs one.
        head = left + (newline_of(seam) if tail and count == 2 else b"")
    return None if join is None and not head + tail else head + tail


def describe_text(agent: Agent, before: Disk, after: bytes, join: Optional[str]) -> Iterator[str]:
    """Yield what a user should know: excess, hidden characters, an open fence."""
    excess = describe_size(agent, after, only_excess=True)
    if excess:
        yield excess
    if not after.isascii():
        hidden = describe_hidden((managed_text(agent, after) or b"").decode("utf-8", "replace"))
        if hidden:
            yield hidden
    line, closing = find_open_block(before.data) if join is not None else (0, "")
    if line:
        noun, reading = ("comment", "one") if closing == "-->" else ("code fence", "code")
        yield f"the {noun} on line {line} is never closed: agents may take Orchestra's text below it for {reading}"


# ── 24 Records ────────────────────────────────────────────────────────────────

# A codebase's record holds what Orchestra last wrote into its folder. It is what proves
# a text to be Orchestra's, so it is saved before the files are; one that is missing or
# damaged proves nothing, and then more is backed up. Whose record it is:
#
#   1 It lies in hashes/ under the codebase's name, and says of which folder it is
#     (`root`). A record of another folder means that the codebase has moved (section
#     Plan, step 4).
#   2 A codebase without one may have had another name. Then there is a record of this
#     very folder whose codebase is no longer registered, an orphan (`find_former`).
#   3 A sync moves that, and the backups before it, to the new name (`adopt_record`).

MAX_EARLIER = 24  # earlier hashes per file
MAX_SEALS = 120  # per codebase


class Record(NamedTuple):
    """What Orchestra last wrote into a codebase's folder.

    The hashes in `earlier` prove as much as those in `files`: a crash between record
    and write, or git, brings such a text back. `root` is written as ~/... below the
    home folder, so that a copy of a home is on its own. By `seals`, a text of
    Orchestra's own that was reformatted long after is not taken for another registry's.
    """

    synced_at: str = ""
    files: Mapping[str, str] = {}  # the hash of the managed text at each path, "" for none
    earlier: Mapping[str, Sequence[str]] = {}  # those before it, the newest first
    joins: Mapping[str, str] = {}  # what joins an appended block to the user's text
    folders: Sequence[str] = ()  # made for managed files
    inputs: str = ""  # stands for what `files` were rendered from; "source" on disk
    root: str = ""  # the folder's real path; "" in records of older versions
    seals: Sequence[str] = ()  # of all texts written
    owned: Sequence[str] = ()  # those of the paths where the whole file is Orchestra's

    def known(self, path: str) -> tuple[str, ...]:
        return (*filter(None, [self.files.get(path)]), *self.earlier.get(path, ()))

    def agent_at(self, path: str) -> Agent:
        """Return what is known of a file, whose agent may be unknown by now."""
        return Agent("", path, owned=path in self.owned)


def load_record(home: str, key: Key) -> Optional[Record]:
    """Load a codebase's record, None for a missing or damaged one; raises IoError."""
    data = read_disk(record_path(home, key)).data

    def is_inside(folder: str) -> bool:
        return bool(folder) and "\0" not in folder and not folder.startswith("/") and ".." not in folder.split("/")

    try:
        values = json.loads(data)
        files = {str(path): str(digest) for path, digest in values["files"].items() if is_managed_path(path)}
        earlier = {
            str(path): [str(digest) for digest in digests]
            for path, digests in values["earlier"].items()
            if is_managed_path(path)
        }
        # Records of older versions know only the files of this version's agents.
        owned = values.get("owned", [agent.path for agent in AGENTS.values() if agent.owned])
        record = Record(
            str(values["synced_at"]),
            files,
            earlier,
            {str(path): str(join) for path, join in values["joins"].items()},
            [str(folder) for folder in values["folders"] if is_inside(folder)],
            str(values.get("source", "")),
            str(values.get("root", "")),
            [str(seal) for seal in values.get("seals", ())],
            [path for path in owned if path in files or path in earlier],
        )
        # Half a character was not written by Orchestra.
        os.fsencode("".join([record.root, *record.files, *record.earlier, *record.folders, *record.joins.values()]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return record if "\0" not in record.root else None


def save_record(home: str, key: Key, record: Record, lock: Lock) -> None:
    # Not durable: after a power cut an older record only makes the next sync back up
    # more than it must.
    values = record._asdict()
    values["source"] = values.pop("inputs")
    data = json.dumps(values, separators=(",", ":")).encode()
    save_private(record_path(home, key), data, lock.token, durable=False)


def list_orphans(home: str, registered: set[Key]) -> dict[str, Key]:
    """List the codebases that have a record but are not registered, by folder."""
    found = []
    for key in keys_below(hashes_root(home), ".json"):
        with suppress(IoError):
            record = None if key in registered else load_record(home, key)
            if record and record.root:
                found.append((record.synced_at, expand_home(home, record.root), key))
    return {root: key for _, root, key in sorted(found)}


def find_former(home: str, root: str, owners: Optional[Owners]) -> Optional[Key]:
    """Find the former name of a folder's codebase; of several, the one synced last."""
    if owners is None:
        return None
    if owners.orphans is None:
        owners.orphans = Owners(list_orphans(home, {*owners.values()}))
    found = []
    for former in owners.orphans.keys_at(identity_of(root)):
        record = None if os.path.lexists(codebase_path(home, former)) else load_record(home, former)
        if record:
            found.append((record.synced_at, former))
    return max(found)[1] if found else None


def adopt_record(home: str, key: Key, root: str, owners: Optional[Owners]) -> None:
    """Move record and backups to a new name, its lock held; raises OrchestraError.

    There is no record under the new name yet.
    """
    former = find_former(home, root, owners)
    turn = try_lock(codebase_lock_path(home, former)) if former else None
    if former is None or turn is None:
        return  # never had another name, or is still being synced under that
    try:
        if find_former(home, root, owners) == former:
            Backups(home, former).move_to(Backups(home, key))
            # Last: until then the former name is found again.
            move_private(record_path(home, former), record_path(home, key))
    finally:
        os.close(turn)


def known_files(codebase: Codebase, record: Record) -> dict[str, Agent]:
    """Return all files that may be Orchestra's in a codebase's folder, by path."""
    written = {path: record.agent_at(path) for path in {**record.files, **record.earlier}}
    return {**written, **possible_files(codebase)}


def list_written(home: str, codebase: Codebase) -> list[str]:
    """List the files with Orchestra's text in a codebase's folder."""
    root, record = codebase_root(home, codebase), load_record(home, codebase.key) or Record()
    return [path for path in sorted(record.files) if root and os.path.lexists(f"{root}/{path}")]


def accept_empty_folder(home: str, codebase: Codebase) -> None:
    """Forget what was written into a folder that is empty now; raises IoError."""
    root = codebase_root(home, codebase)
    with blame(root):
        if not os.listdir(root):
            remove_private(record_path(home, codebase.key))


@functools.lru_cache(maxsize=1 << 12)
def _seals_in_record(path: str, mtime_ns: int, size: int) -> bytes:
    """Return a record's seals in their quotes; read again if its time or size differ.

    As bytes, since thousands of sets would take 25 MB.
    """
    return b"".join(re.findall(b'"[0-9a-f]{8}"', read_disk(path).data))


def is_own_seal(home: str, seal: str) -> bool:
    """Look for a seal in all records, since a codebase may have been renamed."""
    for path in files_below(hashes_root(home)):
        with suppress(OSError, IoError):
            info = os.stat(path)
            if f'"{seal}"'.encode() in _seals_in_record(path, info.st_mtime_ns, info.st_size):
                return True
    return False


def is_foreign_text(home: str, agent: Agent, text: bytes) -> bool:
    """Return whether a managed text was written by another registry's Orchestra."""
    return is_sealed(agent, text) and not is_own_seal(home, seal_in(text))


# ── 25 Plan ───────────────────────────────────────────────────────────────────

# The one law: Orchestra never destroys what it cannot prove it wrote. Three hashes of
# managed text decide what happens to a file (`decide`): of the text on the disk, of
# those known from the record, and of the text that the registry wants.
#
#     on the disk  wanted     action    the old text
#     -----------  ---------  --------  ------------------------------------------------
#     as wanted               keep      stays
#     none         a text     create    there is none
#     known        a text     update    is replaced: Orchestra wrote it
#     not known    a text     replace   is backed up, then replaced
#     known        none       remove    is removed: Orchestra wrote it
#     not known    none       release   stays, and is the user's from now on
#     not known    none       evict     (a block, in a purge or in a target's file) is
#                                       backed up, then removed
#
# No text is wanted in a target's file where the user's own is, and the registry has
# nothing to add to it. The record then has "" for the file: it was left so on purpose.
#
# A file that cannot safely be read or written is skipped, with a problem or a note. So
# is another registry's text that is not known, but for a sync by name.
#
# How a plan is made (`Planner.plan`); all of this only looks:
#
#   1 Find the folder. It must be there, fit to be a codebase's, and no other's.
#   2 Load the record, if need be under the codebase's former name. A folder above the
#     recorded one is refused: the path may be half-typed.
#   3 Leave out the parts whose folders are not the codebase's own.
#   4 If the record is of another folder that is still there, plan the files there as
#     for a dropped target. Their texts count as known in the new folder, which may be
#     a copy.
#   5 Look at the managed files that are wanted or recorded; for a purge, at every one.
#   6 Refuse a folder that was synced and is empty now: its disk may not be mounted.
#   7 Render what is wanted, unless the record holds the hashes of the same rendering.
#   8 Decide what happens to each file.
#   9 Make the record that is true before, during and after the writing of the files.

MAX_MANAGED_FILE = 8 << 20  # bytes
FOREIGN = "written from another registry"


class SyncMode(NamedTuple):
    """How to sync a codebase."""

    dry_run: bool = False  # only plan
    purge: bool = False  # nothing is wanted any more
    take_over: bool = False  # replace the text of another registry's Orchestra like a hand edit
    accept_empty: bool = False  # a folder that was synced before is empty on purpose
    reload: Callable[[str, Key], Codebase] = load_with_layers  # reads what was saved meanwhile


DEFAULT_MODE = SyncMode()


class Action:
    """What happens to a managed file, in the words of `sync` and its JSON."""

    KEEP, CREATE, UPDATE, REPLACE = "keep", "create", "update", "replace"
    REMOVE, RELEASE, EVICT, SKIP = "remove", "release", "evict", "skip"
    BACKED_UP = (REPLACE, EVICT)


class FilePlan(NamedTuple):
    """What is to happen to one managed file; `after` is None to remove it."""

    path: str
    action: str
    agent: Agent
    before: Disk = ABSENT
    after: Optional[bytes] = None
    digest: Optional[str] = None  # of the text wanted there; "" if the user's says it all
    join: Optional[str] = None  # set where a block is appended
    note: str = ""
    problem: Optional[Problem] = None
    changed: bool = False  # by someone else, between plan and write
    is_foreign: bool = False  # another registry's text, so it is skipped

    @property
    def writes(self) -> bool:
        return self.action not in (Action.KEEP, Action.SKIP)

    @property
    def verb(self) -> str:
        """What happens to the file, in the words of a command's output."""
        if self.action in (Action.REMOVE, Action.EVICT):
            return "remove" if self.after is None else "remove block"
        return "append" if self.join is not None else self.action


class Plan(NamedTuple):
    """What a sync of one codebase would do, and the record it would leave.

    `former` is the plan of the folder where the codebase was before.
    """

    root: str
    files: tuple[FilePlan, ...]
    old_record: Optional[Record]
    record: Record
    former: "Optional[Plan]" = None

    @property
    def writes(self) -> bool:
        return any(file.writes for file in self.files) or (self.former is not None and self.former.writes)

    @property
    def is_done(self) -> bool:
        return not self.writes and self.record == self.old_record

    def all_files(self, home: str) -> tuple[FilePlan, ...]:
        """List the files, those in the former folder under their whole paths."""
        if self.former is None:
            return self.files
        folder = shorten_home(home, self.former.root)
        return (*self.files, *(file._replace(path=os.path.join(folder, file.path)) for file in self.former.files))

    def problems(self, home: str) -> list[Problem]:
        """List the problems, each once: a read-only folder fails all files alike."""
        paths: dict[tuple[str, str], list[str]] = {}
        for file in self.all_files(home):
            if file.problem:
                paths.setdefault((file.problem.message, file.problem.hint), []).append(file.path)
        return [Problem(", ".join(found), *problem) for problem, found in paths.items()]


def decide(disk: Optional[str], known: Sequence[str], wanted: Optional[str], evict: bool = False) -> str:
    """Decide what happens to a file, by the table above."""
    if disk == wanted:
        return Action.KEEP
    if disk is None:
        return Action.CREATE
    if wanted is None:
        return Action.REMOVE if disk in known else Action.EVICT if evict else Action.RELEASE
    return Action.UPDATE if disk in known else Action.REPLACE


# Looking


class Look(NamedTuple):
    """What was found at a managed path."""

    agent: Agent
    disk: Disk = ABSENT
    text: Optional[bytes] = None  # the managed text
    digest: Optional[str] = None  # its hash
    resolved: str = ""  # the path, with all links in its folders followed
    has_own_text: bool = False  # the user's, outside the block of a shared file
    note: str = ""  # why it is skipped
    problem: Optional[Problem] = None


@functools.cache
def folders_above(path: str) -> tuple[str, ...]:
    """List the folders that a relative path leads through, the topmost first."""
    parts = path.split("/")
    return tuple("/".join(parts[:i]) for i in range(1, len(parts)))


def check_parents(root: str, path: str) -> str:
    """Resolve a managed path; raises SyncError if it leads out of the codebase."""
    has_link = False
    for above in folders_above(path):
        folder = f"{root}/{above}"
        try:
            mode = os.lstat(folder).st_mode
        except FileNotFoundError:
            break
        if stat.S_ISLNK(mode):
            has_link = True
            real = real_path(folder)
            if not real.startswith(root.rstrip("/") + "/"):
                raise SyncError(f"expected a folder inside the codebase, got a link to {visible(real)}")
            if not os.path.exists(real):
                raise SyncError(f"expected a folder, got a broken link to {visible(real)}")
            mode = os.stat(folder).st_mode
        if not stat.S_ISDIR(mode):
            raise SyncError(f"expected {above} to be a folder, got a file: rename it, and move its text into {above}/")
    if has_link:
        folder, name = os.path.split(path)
        return f"{real_path(f'{root}/{folder}')}/{name}"
    return f"{root}/{path}"


def open_managed(root: str, path: str, make: bool = False) -> Place:
    """Open a managed file's folder, so that no link put there later is followed.

    Raises SyncError as `check_parents`, FileChanged if a folder was replaced meanwhile,
    OSError.
    """
    below = check_parents(root, path)[len(root.rstrip("/")) + 1 :]
    try:
        return open_place_below(root, below, path, make)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENOTDIR):
            raise FileChanged(path) from error
        raise


def _read_link_text(path: str, data: bytes) -> str:
    """Read the target of a symbolic link that git wrote as text, "" for other files.

    Git does so where core.symlinks is false: the link's path without a line end
    (git-config(1)).
    """
    if not 0 < len(data) <= 255 or data != data.strip() or b"\n" in data or b"\0" in data:
        return ""
    target = os.path.join(os.path.dirname(path), os.fsdecode(data))
    return visible(os.fsdecode(data)) if os.path.lexists(target) else ""


def look_at(root: str, agent: Agent) -> Look:
    """Look at one managed file; what keeps it from being managed is in the look."""
    disk, path = ABSENT, agent.path
    try:
        place = check_parents(root, path)
        disk = read_disk(place, MAX_MANAGED_FILE + 1)
        if disk.kind == "symlink":
            note = f"skipped: it is a symbolic link to {visible(os.readlink(place))}"
            return Look(agent, disk, resolved=place, note=note)
        if disk.kind not in ("file", "absent"):
            raise SyncError(f"expected a file, got {disk.noun}")
        if len(disk.data) > MAX_MANAGED_FILE:
            raise SyncError(f"expected at most {MAX_MANAGED_FILE >> 20} MiB, got more")
        link = _read_link_text(place, disk.data)
        if link:
            note = f"skipped: git wrote it in place of a symbolic link to {link}"
            return Look(agent, disk, resolved=place, note=note)
        text = managed_text(agent, disk.data) if disk.kind == "file" else None
        digest = None if text is None else digest_of(text)
        return Look(agent, disk, text, digest, place, not agent.owned and has_own_text(disk.data))
    except (OrchestraError, OSError) as error:
        return Look(agent, disk, problem=Problem.from_error(error, path))


class Sparse(NamedTuple):
    """The top folder and patterns of a sparse checkout (git-sparse-checkout(1))."""

    top: str = ""
    patterns: Sequence[str] = ()

    @classmethod
    def find(cls, root: str) -> "Sparse":
        """Look for a sparse checkout that a folder is in."""
        top = next((folder for folder in climb(root) if os.path.lexists(f"{folder}/.git")), "")
        if not top:
            return cls()

        def read(path: str) -> bytes:
            return read_disk(path, 1 << 20).data

        try:
            git = find_git_folder(top)
            common = read_git_path(git, "commondir")
            settings = read(f"{common}/config") + read(f"{git}/config.worktree")
            if not re.search(rb"(?im)^[ \t]*sparsecheckout\s*=\s*(?:true|yes|on|1)\s*$", settings):
                return cls()
            text = read(f"{git}/info/sparse-checkout").decode()
        except (IoError, ValueError):  # not text, or no path
            return cls()
        lines = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
        return cls(top, [line for line in lines if len(line) <= 4096])  # as paths can have

    @staticmethod
    def _matches(pattern: str, names: Sequence[str], is_folder: bool) -> bool:
        from fnmatch import fnmatchcase

        if pattern.endswith("/") and not is_folder:
            return False
        parts = pattern.strip("/").split("/")
        if "/" not in pattern.rstrip("/"):
            return fnmatchcase(names[-1], parts[0])
        return len(parts) == len(names) and all(map(fnmatchcase, names, parts))

    def leaves_out(self, path: str) -> bool:
        """Return whether a file is left out: one made here would hide that in git."""
        if not self.patterns:
            return False
        names = os.path.relpath(path, self.top).split("/")
        # As in gitignore(5): the last pattern that fits the file or, where none does,
        # the nearest folder above it.
        for count in range(len(names), 0, -1):
            for pattern in reversed(self.patterns):
                if self._matches(pattern.lstrip("!"), names[:count], count < len(names)):
                    return pattern.startswith("!")
        return True


# Planning


def _hint_for_absent(home: str, key: Key) -> str:
    if load_record(home, key):  # so its folder was here
        label = typed(label_for(key))
        return f"orchestra project move {label} PATH, or bring the folder back, or orchestra project remove {label}"
    return f"orchestra init PATH -p {typed(key[0])} --name {typed(key[1])}"


def find_root(home: str, codebase: Codebase, owners: Optional[Owners] = None, purge: bool = False) -> str:
    """Resolve a codebase's folder; raises FolderAbsent, SyncError, IoError.

    With the registry's `owners` it must also be fit to be a codebase's, and no other's;
    an unfit folder may still be purged.
    """
    path = codebase_root(home, codebase)
    if not path:
        file = shorten_home(home, codebase_path(home, codebase.key))
        raise FolderAbsent(f"{file}: no path on this machine", _hint_for_absent(home, codebase.key))
    with blame(path):
        try:
            info = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            hint = _hint_for_absent(home, codebase.key)
            raise FolderAbsent(f"{path}: the folder is missing", hint) from None
    if not stat.S_ISDIR(info.st_mode):
        hint = f"{edit_source(home, codebase, 'path')}, or bring the folder back"
        raise SyncError(f"{path}: that is a file, not a folder", hint)
    root = real_path(path)
    if owners is None:
        return root
    identity = (info.st_dev, info.st_ino)
    owner = owners.owner_at(identity, codebase.key, path)
    if owner != codebase.key:
        raise SyncError(f"{path}: this folder belongs to {label_for(owner)}", edit_source(home, codebase, "path"))
    problem = "" if purge else owners.why_unfit(home, root, identity)
    if problem:
        raise SyncError(f"{path}: {problem}: nothing is written there", edit_source(home, codebase, "path"))
    return root


def _known_digests(record: Record, path: str, look: Look) -> Sequence[str]:
    """List the digests known at a path; records of earlier versions have exact ones."""
    known = record.known(path)
    if look.text is None or look.digest is None or not known or look.digest in known:
        return known
    return (*known, look.digest) if exact_digest_of(look.text) in known else known


def _plan_unwanted(look: Look, record: Record, evict: bool = False) -> FilePlan:
    """Plan a file that is skipped, or in which nothing is wanted."""
    agent, before, path = look.agent, look.disk, look.agent.path
    if look.note or look.problem:
        return FilePlan(path, Action.SKIP, agent, before, note=look.note, problem=look.problem)
    # A block is Orchestra's by its markers; a file that only has the name may be the
    # user's own.
    action = decide(look.digest, _known_digests(record, path, look), None, evict and not agent.owned)
    after = before.data if before.kind == "file" else None
    if action in (Action.REMOVE, Action.EVICT):
        after = remove_managed_text(agent, before, record.joins.get(path))
    return FilePlan(path, action, agent, before, after)


class Planner:
    """Compares a codebase's files with the registry and the record."""

    def __init__(
        self, home: str, codebase: Codebase, owners: Optional[Owners] = None, mode: SyncMode = DEFAULT_MODE
    ) -> None:
        self._home = home
        self._codebase = codebase
        self._owners = owners
        self._others = Owners() if owners is None else owners  # whose folders may be inside
        self._mode = mode
        self._wanted: dict[str, Agent] = {}
        self._unfit: list[FilePlan] = []  # folders of parts that get no files
        self._beside: list[str] = []  # files that have the user's own text in or beside them
        self._importing: list[str] = []  # files that import the one they hide
        self._root = ""
        self._record = Record()

    @functools.cached_property
    def _texts(self) -> Mapping[str, bytes]:
        return render_files(self._codebase, self._beside, self._importing)

    @functools.cached_property
    def _sparse(self) -> Sparse:
        return Sparse.find(self._root)

    def plan(self) -> Plan:
        """Make the plan, by the steps above; raises SyncError, IoError."""
        key, is_purge = self._codebase.key, self._mode.purge
        self._root = find_root(self._home, self._codebase, self._owners, is_purge)
        old_record = load_record(self._home, key)
        if old_record is None:
            old_key = find_former(self._home, self._root, self._owners)
            old_record = load_record(self._home, old_key) if old_key else None
        self._record = old_record or Record()
        if not is_purge:
            self._check_is_not_above()
        self._pass_over_parts()
        self._wanted = {} if is_purge else managed_files(self._codebase)
        former = self._plan_former()
        looks = self._look_at_files()
        self._beside = [
            agent.path
            for agent in self._wanted.values()
            if looks[agent.path].has_own_text or any(self._has_own_text(twin, looks) for twin in agent.twins)
        ]
        # Files that would hide a hand-written one from their agent. If a file has the
        # user's own text, that was so before Orchestra came.
        self._importing = [
            agent.path
            for agent in self._wanted.values()
            if agent.hides and agent.path not in self._beside and self._has_own_text(agent.hides, looks)
        ]
        unfit = [file.path + file.note for file in self._unfit]
        surroundings = ",".join([*self._beside, "", *self._importing, *unfit])
        inputs = f"{program_stamp()} {surroundings} {label_for(key)} {self._codebase.digest}"
        digests = self._digest_wanted(looks, inputs)
        plans = (
            self._plan_wanted(look, digests[path])
            if path in self._wanted and not (look.note or look.problem)
            else _plan_unwanted(look, self._record, evict=is_purge)
            for path, look in looks.items()
        )
        files = (*map(self._spare_foreign, plans, looks.values()), *(() if is_purge else self._unfit))
        inputs = "" if any(file.problem for file in files) else inputs
        record = self._next_record(files)._replace(inputs=inputs, root=self._spell_root())
        return Plan(self._root, files, old_record, record, former)

    def _spell_root(self) -> str:
        """Spell the folder as its record does, as long as that leads to it."""
        recorded = self._record.root
        is_same = expand_home(self._home, recorded) == self._root
        return recorded if is_same else spell_path(self._home, self._root)

    def _pass_over_parts(self) -> None:
        """Leave out parts whose folders are not the codebase's own (step 3)."""
        parts = []
        for part in self._codebase.projects:
            reason = self._others.why_not_part(self._root, part.path, self._codebase.key) if part.path else ""
            if reason:
                note = f"skipped: the part {visible(part.name)}'s folder {reason}"
                self._unfit.append(FilePlan(part.path, Action.SKIP, Agent("", part.path), note=note))
            parts.append(part._replace(path="") if reason else part)
        if self._unfit:
            self._codebase = self._codebase._replace(projects=tuple(parts))

    def _check_is_not_above(self) -> None:
        """Refuse a folder above the one synced before (step 2)."""
        root, former = self._root, expand_home(self._home, self._record.root)
        if former.startswith(root.rstrip("/") + "/") and os.path.isdir(former) and not is_repository(root):
            raise SyncError(
                f"{root}: this folder holds the codebase's former one, {former}, and is no repository itself:"
                " nothing is written there",
                edit_source(self._home, self._codebase, "path"),
            )

    def _plan_former(self) -> Optional[Plan]:
        """Plan the folder where the codebase was before (step 4).

        A folder that was moved, and is gone, is the same folder. One that is a link, or
        reached through one now, is not looked at.
        """
        record, old = self._record, expand_home(self._home, self._record.root)
        with blame(old):
            if old in ("", self._root) or not os.path.isdir(old) or os.path.samefile(old, self._root):
                return None
        earlier = {path: record.known(path) for path in {**record.files, **record.earlier}}
        self._record = Record(record.synced_at, earlier=earlier, seals=record.seals, owned=record.owned)
        is_taken = self._owners is not None and self._owners.keys_at(identity_of(old))
        if real_path(old) != expand_home(real_path(self._home), record.root) or old == self._home or is_taken:
            return None
        places = {look_at(self._root, agent).resolved for agent in known_files(self._codebase, record).values()}
        looks = [look_at(old, record.agent_at(path)) for path in record.files]
        files = [_plan_unwanted(look, record) for look in looks if look.resolved not in places]
        return Plan(old, tuple(file for file in files if file.writes or file.problem), record, record)

    def _look_at_files(self) -> dict[str, Look]:
        """Look at the managed files, by their paths (steps 5 and 6)."""
        record, is_purge = self._record, self._mode.purge
        others = {path: record.agent_at(path) for path in record.files if path not in self._wanted}
        files = {**self._wanted, **(known_files(self._codebase, record) if is_purge else others)}
        looks = {path: look_at(self._root, agent) for path, agent in files.items()}
        for path, agent in files.items():
            if agent.target in AGENTS and not agent.part:  # in no folder but its own
                continue
            folders = [f"{self._root}/{folder}" for folder in folders_above(path)]
            inner = (self._others.keys_at(identity_of(folder), self._codebase.key) for folder in folders)
            notes = [f"skipped: it is in the folder of {label_for(keys[0])}" for keys in inner if keys]
            unfit = [file.note for file in self._unfit if file.path in folders_above(path)]
            if unfit and not is_purge and path not in self._wanted:
                del looks[path]  # told once, of the part
            elif notes or unfit:
                looks[path] = Look(agent, resolved=f"{self._root}/{path}", note=[*notes, *unfit][0])
        for path, agent in self._wanted.items():
            if path in record.owned and not agent.owned:  # a block is wanted now
                look = look_at(self._root, record.agent_at(path))
                looks[path] = look._replace(agent=agent) if look.digest in record.known(path) else looks[path]
        is_gone = record.files and all(look.disk.kind == "absent" for look in looks.values())
        if is_gone and not self._mode.accept_empty:
            self._check_not_emptied()
        first: dict[str, str] = {}
        for path, look in looks.items():
            twin = path if look.problem else first.setdefault(look.resolved, path)
            if twin != path:  # folders of several agents may be links to one: one file is written once
                looks[path] = look._replace(note=f"skipped: it is {twin} by another name")
            elif look.problem and is_purge and path not in {*record.files, *managed_files(self._codebase)}:
                looks[path] = look._replace(problem=None, note=f"skipped: {look.problem.message}")
        return looks

    def _check_not_emptied(self) -> None:
        """Raise SyncError if the folder is empty (step 6)."""
        codebase = self._codebase
        if self._record.root not in ("", self._spell_root()):
            return  # another folder may well be empty
        with blame(self._root), os.scandir(self._root) as entries:
            if next(entries, None) is None:
                raise SyncError(
                    f"{self._root}: the folder is empty now, but was synced before: is its disk mounted?",
                    f"if it is meant to be empty: orchestra init {typed(codebase.path)}"
                    f" -p {typed(codebase.project)} --name {typed(codebase.name)} --sync",
                )

    def _has_own_text(self, path: str, looks: Mapping[str, Look]) -> bool:
        """Return whether a file that agents share has text of the user's."""
        return (looks.get(path) or look_at(self._root, Agent("", path))).has_own_text

    def _digest_wanted(self, looks: Mapping[str, Look], inputs: str) -> Mapping[str, str]:
        """Return the hashes of the wanted texts (step 7)."""
        recorded = self._record.files
        # The record may be damaged, so it counts only if it agrees with the disk.
        if inputs == self._record.inputs and all(
            looks[path].note or recorded.get(path) == (looks[path].digest or "") for path in self._wanted
        ):
            return recorded
        return {path: digest_of(text) if text else "" for path, text in self._texts.items()} if self._wanted else {}

    def _spare_foreign(self, plan: FilePlan, look: Look) -> FilePlan:
        """Skip another registry's text: two who share a repository must not fight."""
        is_purge = self._mode.purge
        is_unknown = plan.action in Action.BACKED_UP or (is_purge and plan.action == Action.RELEASE)
        if not is_unknown or self._mode.take_over or not is_foreign_text(self._home, look.agent, look.text or b""):
            return plan
        sync = f"to replace it: orchestra sync {typed(label_for(self._codebase.key))}"
        note = f"skipped: {FOREIGN} (a colleague's?); {'to remove it: delete it by hand' if is_purge else sync}"
        return FilePlan(plan.path, Action.SKIP, look.agent, look.disk, note=note, is_foreign=True)

    def _plan_wanted(self, look: Look, digest: str) -> FilePlan:
        """Plan a target's file, whoever wrote what is there."""
        agent, before, path = look.agent, look.disk, look.agent.path
        if not digest:  # the user's own text is there, and says it all
            plan = _plan_unwanted(look, self._record, evict=True)._replace(digest="")
            return plan._replace(action=Action.KEEP) if plan.action == Action.RELEASE else plan
        action = decide(look.digest, _known_digests(self._record, path, look), digest)
        if action == Action.CREATE and before.kind == "absent" and self._sparse.leaves_out(look.resolved):
            return FilePlan(path, Action.SKIP, agent, before, note="skipped: it is outside git's sparse checkout")
        if action == Action.REPLACE and is_reformatted(look.text or b"", self._texts[path]):
            action = Action.KEEP
        after, join = before.data, None
        if action != Action.KEEP:
            is_whole = not agent.owned and path in self._record.owned and look.text == before.data
            after, join = insert_managed_text(agent, ABSENT if is_whole else before, self._texts[path])
        if len(after) > MAX_MANAGED_FILE:
            got = f"got {len(after)} bytes with the text from the registry"
            hint = f"orchestra show {typed(label_for(self._codebase.key))} --origin"
            problem = Problem(path, f"expected at most {MAX_MANAGED_FILE >> 20} MiB, {got}", hint)
            return FilePlan(path, Action.SKIP, agent, before, problem=problem)
        notes = [*describe_text(agent, before, after, join)]
        if action == Action.CREATE and before.kind == "absent" and path not in self._record.files:
            notes += self._describe_hiding(agent)
        return FilePlan(path, action, agent, before, after, digest, join, "; ".join(notes))

    def _describe_hiding(self, agent: Agent) -> Iterator[str]:
        """Note which agents will read a new file in place of one of the user's."""
        folder = f"{agent.part}/" if agent.is_nested and agent.part else ""
        file = codebase_path(self._home, self._codebase.key)
        prose = shorten_home(self._home, f"{os.path.splitext(file)[0]}.md")
        for row in HIDING:
            hidden = folder + row.hidden
            if folder + row.path != agent.path:
                continue
            is_target = hidden in self._wanted
            if hidden in self._beside if is_target else self._has_own_text(hidden, {}):
                yield f"{row.readers} will read it instead of your {hidden}: {row.mend.format(prose=prose)}"

    def _next_record(self, files: Sequence[FilePlan]) -> Record:
        """Make the record (step 9)."""
        record = self._record
        if len(files) == len(record.files) and all(
            file.action == Action.KEEP and record.files.get(file.path) == file.digest for file in files
        ):
            return record
        new_files = {file.path: file.digest for file in files if file.digest is not None}
        new_files.update({f.path: record.files[f.path] for f in files if f.problem and f.path in record.files})
        earlier = dict(record.earlier)
        for path in {**record.files, **new_files}:
            older = [digest for digest in record.known(path) if digest != new_files.get(path)]
            earlier[path] = list(dict.fromkeys(older))[:MAX_EARLIER]
        joins, folders = dict(record.joins), set(record.folders)
        for file in files:
            if file.action != Action.CREATE and file.digest and file.path not in record.files:
                block = None if file.agent.owned else find_block(file.before.data)
                if block and file.before.data[: block.start].replace(BOM, b""):
                    # It came with the repository: another machine appended it, with the
                    # usual line in front.
                    joins.setdefault(file.path, "\n")
            if file.action == Action.CREATE:
                if file.join is not None:
                    joins[file.path] = file.join
                elif file.before.kind == "absent":
                    joins.pop(file.path, None)
                folders.update(
                    above for above in folders_above(file.path) if not os.path.isdir(f"{self._root}/{above}")
                )
        seals = [seal_in(file.after) for file in files if file.digest and file.after is not None]
        is_owned = {path: path in record.owned for path in earlier}
        is_owned.update({file.path: file.agent.owned for file in files if file.digest is not None})
        return Record(
            record.synced_at,
            new_files,
            {path: digests for path, digests in sorted(earlier.items()) if digests},
            joins,
            sorted(folders),
            seals=list(dict.fromkeys(filter(None, [*seals, *record.seals])))[:MAX_SEALS],
            owned=sorted(path for path in is_owned if is_owned[path]),
        )


# ── 26 Sync ───────────────────────────────────────────────────────────────────

# A sync takes the codebase's lock, plans, and applies the plan; and repeats that, up to
# MAX_TRIES times, if a file is saved meanwhile (`CodebaseTurn.sync`). It begins with
# adopting the record of a renamed codebase, reads registry files again that have
# changed since they were read, and removes temporary files that others left. A plan is
# applied in steps:
#
#   1 Clean the folder where the codebase was before. The record goes on naming that
#     folder until nothing of Orchestra's is left there. If a file there is busy,
#     nothing else is done this time.
#   2 Save the record, before the files: so a crash never looks like a hand edit. A file
#     to be removed stays recorded until it is gone; `inputs` is empty for as long, so
#     that the next plan renders again.
#   3 Back up each old text that may be a user's, and replace or remove the file
#     (section Replacing). One that fails becomes a problem of the plan; the others go
#     on.
#   4 Remove folders made for files that are gone.
#   5 Save the record again, if steps 3 and 4 changed it.

MAX_TRIES = 5  # for a file that keeps changing


class SyncScope(NamedTuple):
    """What to sync: codebases by name (api, shop/api), all if `names` is None."""

    names: Optional[tuple[str, ...]]

    @classmethod
    def all(cls) -> "SyncScope":
        return cls(None)

    @classmethod
    def codebase(cls, *names: str) -> "SyncScope":
        return cls(names)


class SyncCodebaseResult(NamedTuple):
    """What a sync did to one codebase, or would do; its files without their bytes."""

    project: str
    codebase: str
    files: tuple[FilePlan, ...] = ()
    errors: tuple[Problem, ...] = ()
    has_files_aside: bool = False  # a file is set aside, as it may still be written to
    is_absent: bool = False  # its folder is not on this machine
    remarks: Sequence[Problem] = ()  # on its registry files, in which nothing is wrong

    @property
    def key(self) -> Key:
        return (self.project, self.codebase)

    @property
    def retry(self) -> bool:
        """Whether a file that failed may be written in a little while."""
        return any(file.problem is not None and file.problem.retry for file in self.files)

    @property
    def written(self) -> list[str]:
        return [file.path for file in self.files if file.writes and file.action != Action.RELEASE]

    @property
    def removed(self) -> list[str]:
        """Those of the written that are removed, or lose their block."""
        return [file.path for file in self.files if file.action in (Action.REMOVE, Action.EVICT)]

    @property
    def unchanged(self) -> list[str]:
        return [file.path for file in self.files if not (file.writes or file.problem or file.is_foreign)]

    @property
    def foreign(self) -> list[str]:
        return [file.path for file in self.files if file.is_foreign]

    @property
    def failed(self) -> list[str]:
        return [file.path for file in self.files if file.problem]


class CodebaseTurn(Turn):
    """A turn at a codebase's files; their backup names are the managed paths."""

    def __init__(self, home: str, codebase: Codebase, clock: Clock = time.time) -> None:
        self.codebase = codebase
        self.key = codebase.key
        super().__init__(home, codebase_lock_path(home, self.key), backups_of(home, self.key), clock)

    def split_name(self, backup_name: str) -> tuple[Key, str]:
        return self.key, backup_name or "leftover.md"

    # Cleaning up

    def settle(self, leftover: Leftover) -> None:
        self._clean_up_below(find_root(self.home, self.codebase), leftover)

    def _clean_up_below(self, root: str, leftover: Leftover) -> None:
        """Clean up after a turn that was killed or had trouble; raises IoError."""
        folders = self._list_folders(root, self._known_files())
        self.clean_up(folders, functools.partial(self._find_name, root), leftover)
        sweep_folder(os.path.dirname(record_path(self.home, self.key)), leftover.token)

    def _remove_temporaries(self, root: str, paths: Collection[str]) -> bool:
        """Remove temporary files beside some files; return whether all are gone.

        Raises IoError.
        """
        folders = {path.rpartition("/")[0] for path in paths}
        names = itertools.chain.from_iterable(names_in(f"{root}/{folder}") for folder in folders)
        if not any(map(is_temporary_name, names)):
            return True  # nearly always, and listing is cheaper than the care to be taken below
        return self.remove_temporaries(self._list_folders(root, paths), functools.partial(self._find_name, root))

    def _known_files(self) -> dict[str, Agent]:
        return known_files(self.codebase, load_record(self.home, self.key) or Record())

    @staticmethod
    def _list_folders(root: str, paths: Iterable[str]) -> list[str]:
        """List the folders of files that can be reached inside the codebase."""
        folders = []
        for path in {os.path.dirname(path): path for path in paths}.values():
            with suppress(SyncError, OSError):  # whoever writes there is told
                folders.append(os.path.dirname(check_parents(root, path)))
        return folders

    def _find_name(self, root: str, path: str) -> str:
        """Find the managed path that leads to a file, its name alone if there is none.

        If its name is not known, it is the managed path in that folder, if there is
        only one.
        """
        folder, name = os.path.split(path)
        real, known = real_path(folder), self._known_files()
        folders = dict.fromkeys(map(os.path.dirname, known))
        here = [f for f in folders if real_path(os.path.join(root, f)) == real]
        if not self.can_be_kept_as(name):
            first = here[0] if here else ""
            paths = [path for path in known if os.path.dirname(path) == first]
            return paths[0] if len(paths) == 1 else os.path.join(first, "leftover.md")
        named = [path for path in known if os.path.basename(path) == name]
        return next((path for path in named if os.path.dirname(path) in here), named[0] if named else name)

    @staticmethod
    def _remove_spare_folders(root: str, record: Record) -> Record:
        """Remove the folders made for files that are gone, and forget them."""

        def is_removed(folder: str) -> bool:
            try:
                with open_managed(root, folder) as place:
                    return remove_empty_folder(place.name, place.folder)
            except FileNotFoundError:
                return True
            except (SyncError, FileChanged, OSError):
                return False  # it leads elsewhere by now

        needed = {folder for path in record.files for folder in folders_above(path)}
        gone = [folder for folder in reversed(record.folders) if folder not in needed and is_removed(folder)]
        return record._replace(folders=[folder for folder in record.folders if folder not in gone])

    # Applying a plan

    def _write_file(self, root: str, file: FilePlan) -> FilePlan:
        """Back up a file if need be, and replace or remove it; return it with notes.

        Raises FileChanged, OrchestraError, OSError.
        """
        before = file.before
        if file.action in Action.BACKED_UP:
            when = self.back_up(file.path, before, Reason.EDITED)
            restore = f"orchestra restore {typed(label_for(self.key))} {typed(file.path)} --at {when}"
            note = f"the replaced version is kept; to get it back: {restore}"
            if file.digest is None and file.action == Action.EVICT:  # in a purge
                kept = os.path.join(backups_of(self.home, self.key), when, file.path)
                note = f"the replaced version is kept as {shorten_home(self.home, kept)}"
            file = file._replace(note="; ".join(filter(None, [note, file.note])))
        if file.action == Action.RELEASE:
            return file._replace(note="you edited it, so it stays; Orchestra no longer manages it")
        is_in_part = file.agent.part != "" and file.agent.is_nested
        with open_managed(root, file.path, make=file.after is not None and not is_in_part) as place:
            if file.after is None:
                remove_file(place, before, self)
                return file
            if before.kind == "file" and not before.data and place.age(self.clock) < 2.0:
                time.sleep(0.2)  # it may be written anew; replace_file looks again
            managed = managed_text(file.agent, before.data) or b""
            has_user_text = bool(before.data) and managed.strip() != before.data.strip()
            replace_file(place, file.after, before, self, durable=has_user_text)
        return file

    def _apply_file(self, root: str, file: FilePlan) -> FilePlan:
        """Do what is planned for one file; what goes wrong becomes its problem."""
        if not file.writes:
            return file
        if not self.is_clean:  # the lock file tells where a save may be: keep it
            problem = Problem(file.path, "skipped because an earlier file failed", retry=True)
            return file._replace(action=Action.SKIP, problem=problem)
        try:
            return self._write_file(root, file)
        except FileChanged as error:
            problem = Problem(file.path, error.message, "sync again", retry=True)
            failed = file._replace(action=Action.SKIP, problem=problem, changed=True)
        except (OrchestraError, OSError) as error:
            failed = file._replace(action=Action.SKIP, problem=Problem.from_error(error, file.path))
        try:
            self._clean_up_below(root, self.leftover)
        except IoError:
            self.is_clean = False
        return failed

    def _apply_files(self, plan: Plan) -> Plan:
        return plan._replace(files=tuple(self._apply_file(plan.root, file) for file in plan.files))

    def _leave(self, former: Plan, root: str) -> bool:
        """Clean a folder that was left for `root`; return whether all is gone."""
        is_gone = not any(file.problem for file in former.files)
        with suppress(IoError):
            is_gone = self._remove_temporaries(former.root, self._known_files()) and is_gone
        if former.files:
            spare = [f for f in former.record.folders if not f"{root}/".startswith(f"{former.root}/{f}/")]
            there = {file.path: "" for file in former.files if file.problem}
            self._remove_spare_folders(former.root, former.record._replace(files=there, folders=spare))
        return is_gone

    def apply(self, plan: Plan) -> Plan:
        """Apply a plan, by the steps above; raises IoError if the record fails."""
        old_record = plan.old_record or Record()
        record, known = plan.record._replace(synced_at=now_rfc3339(self.clock)), old_record.files
        if plan.former:
            former, known = self._apply_files(plan.former), {}
            plan = plan._replace(former=former)
            if any(file.problem and file.problem.retry for file in former.files):
                return plan._replace(files=())
            record = record if self._leave(former, plan.root) else record._replace(root=old_record.root)
        doomed = {f.path: known[f.path] for f in plan.files if f.writes and not f.digest and f.path in known}
        first = record._replace(files={**record.files, **doomed}, inputs="" if doomed else record.inputs)
        save_record(self.home, self.key, first, self)
        done = self._apply_files(plan)
        stuck = {file.path: known[file.path] for file in done.files if file.path in doomed and file.problem}
        record = record._replace(files={**record.files, **stuck}, inputs="" if stuck else record.inputs)
        record = self._remove_spare_folders(plan.root, record)
        has_problem = any(file.problem for file in done.files)
        if not any(file.writes for file in done.files) and (plan.writes or has_problem):
            record = record._replace(synced_at=plan.record.synced_at)  # nothing came of it
        if record != first:
            save_record(self.home, self.key, record, self)
        return done._replace(record=record)

    def sync(self, owners: Optional[Owners], mode: SyncMode) -> Plan:
        """Plan and apply, again while a file is saved in between."""
        home, key, codebase = self.home, self.key, self.codebase
        is_new = not os.path.lexists(record_path(home, key))
        if is_new and find_former(home, codebase_root(home, codebase), owners):
            adopt_record(home, key, find_root(home, codebase, owners, purge=True), owners)
        written: dict[str, FilePlan] = {}
        former: Optional[Plan] = None
        for tries in range(MAX_TRIES):
            plan = Planner(home, codebase, owners, mode).plan()
            is_done = plan.is_done
            if tries == 0 and not (mode.purge or is_done or is_current(home, codebase)):
                # Saved, or removed, since it was read: whoever writes last must write
                # the newest.
                if not os.path.lexists(codebase_path(home, key)):
                    return plan._replace(files=(), former=None)
                codebase = mode.reload(home, key)
                continue
            if tries == 0 or not is_done:
                try:
                    self._remove_temporaries(plan.root, [*(file.path for file in plan.files), *plan.record.earlier])
                except IoError:
                    self.has_files_aside = True  # the next turn tries again
            if not is_done:
                plan = self.apply(plan)
            former = plan.former if plan.former and plan.former.files else former
            files = (written.get(file.path, file) if file.action == Action.KEEP else file for file in plan.files)
            plan = plan._replace(files=tuple(files))
            if not any(file.changed for file in plan.files):
                break
            written.update({file.path: file for file in plan.files if file.writes})
        return plan._replace(former=former)

    # Restoring

    def restore(self, root: str, backup: Backup) -> bool:
        """Put a backup back, as `restore_file`; also raises FileChanged."""
        agent, kept = self._known_files()[backup.path], read_disk(backup.file)
        if kept.kind != "file":
            raise SyncError(f"expected a backup, got {kept.noun} at {backup.file}")
        before = read_disk(check_parents(root, backup.path))
        if before.kind not in ("file", "absent"):
            raise SyncError(f"expected a file, got {before.noun}")
        try:
            text = managed_text(agent, kept.data)
        except SyncError as error:
            raise SyncError(f"the backup {backup.file}: {error}", error.hint) from None
        after = kept.data
        if before.kind == "file":
            if not agent.owned and text is not None:
                after, _ = insert_managed_text(agent, before, text.replace(b"\r\n", b"\n"))
            if after == before.data:
                return False
        with blame(os.path.join(root, backup.path)):
            if before.kind == "file":
                self.back_up(backup.path, before, Reason.RESTORED)
            with open_managed(root, backup.path, make=True) as place:
                replace_file(place, after, before, self, mode=kept.mode, durable=True)
        return True


_share_plan = functools.lru_cache(maxsize=1 << 8)(FilePlan)  # those of 1,000 codebases are mostly alike


def _without_bytes(file: FilePlan, is_news: bool) -> FilePlan:
    """Drop bytes and hash, of which there may be thousands, and a note told before."""
    note = file.note if is_news or file.is_foreign else ""
    after = None if file.after is None else b""
    return _share_plan(*file._replace(before=ABSENT, after=after, digest=None, note=note))


def sync_codebase(
    home: str,
    codebase: Codebase,
    owners: Optional[Owners] = None,
    mode: SyncMode = DEFAULT_MODE,
    clock: Clock = time.time,
) -> SyncCodebaseResult:
    """Bring one codebase's files up to date; what goes wrong is in the result."""
    key, label, has_files_aside = codebase.key, label_for(codebase.key), False
    try:
        if mode.dry_run:
            plan = Planner(home, codebase, owners, mode).plan()
        else:
            with CodebaseTurn(home, codebase, clock) as turn:
                plan = turn.sync(owners, mode)
            has_files_aside = turn.has_files_aside or os.path.lexists(turn.aside)
    except (OrchestraError, OSError) as error:  # of this codebase: the others go on
        problem = Problem.from_error(error).below(label)
        return SyncCodebaseResult(*key, errors=(problem,), is_absent=isinstance(error, FolderAbsent))
    is_news = mode.purge or not plan.is_done
    files = tuple(_without_bytes(file, is_news) for file in plan.all_files(home))
    problems = tuple(problem.below(label) for problem in plan.problems(home))
    return SyncCodebaseResult(*key, files, problems, has_files_aside)


def clean_up_codebase(home: str, codebase: Codebase) -> None:
    """Clean up after a killed sync, before a codebase goes; raises OrchestraError."""
    if os.path.isdir(codebase_root(home, codebase)):
        with CodebaseTurn(home, codebase):
            pass


def choose_backups(home: str, codebase: Codebase, path: Optional[str], at: Optional[str]) -> list[Backup]:
    """Choose the latest backups of a path, or of all, that a typed time allows.

    Raises SyncError if there are none, UsageError for a time that is not understood.
    """
    label, backups = label_for(codebase.key), Backups(home, codebase.key).versions()
    files = known_files(codebase, load_record(home, codebase.key) or Record())
    is_wanted = parse_when(at) if at is not None else lambda when: True
    found = [b for b in backups if b.path in files and is_wanted(b.when)]
    if path is not None:
        found = [b for b in found if b.path == os.path.normpath(path)]
    if found:
        return take_last_group(found)
    for backup in reversed(backups):
        if backup.path == path and path not in files:
            problem = f"only agents' instruction files are restored; this one is kept as {backup.file}"
            places = (file for file in own_files(home, codebase.key) if os.path.basename(file) == path)
            copies = (f"cp {typed(backup.file)} {typed(file)}" for file in places)
            raise SyncError(f"{path}: {problem}", next(copies, ""))
    if not backups:
        raise SyncError(f"{label}: nothing to restore: no backups yet")
    wanted = path or "any instruction file"
    wanted += f" at {at}; times look like {backups[-1].when[:15]}" if at else ""
    raise SyncError(f"{label}: no backup of {wanted}", f"orchestra restore {typed(label)} --list")


def suggest_old_backups(home: str, registry: Registry, name: Optional[str]) -> str:
    """Suggest to list the backups of a codebase that is no longer registered."""
    found = [key for key in (*registry.keys, *keys_below(backups_root(home))) if name in (key[1], label_for(key))]
    is_old = bool(found) and found[0] not in registry.keys
    return f"ls {typed(shorten_home(home, backups_of(home, found[0])))}" if is_old else ""


def restore_file(home: str, codebase: Codebase, backup: Backup) -> bool:
    """Put a backup back, and return whether that changed anything.

    What it replaces is backed up in turn. Of a shared file only the block is put back,
    since the text around it is the user's; a backup without a block is put back whole.
    Raises SyncError, IoError.
    """
    root = find_root(home, codebase)
    with CodebaseTurn(home, codebase) as turn:
        try:
            return turn.restore(root, backup)
        except FileChanged as error:
            problem, hint = error.message, "run the command again"
        except SyncError as error:
            problem, hint = str(error), error.hint
        raise SyncError(f"{os.path.join(root, backup.path)}: {problem}", hint)


# The pipeline


def pass_over_absent(results: Iterable[SyncCodebaseResult]) -> list[SyncCodebaseResult]:
    """Drop the errors of absent codebases: one is an error only if it is named."""
    return [result._replace(errors=()) if result.is_absent else result for result in results]


def run_pipeline(
    home: str,
    scope: SyncScope,
    mode: SyncMode = DEFAULT_MODE,
    registry: Optional[Registry] = None,
    progress: Callable[[int, int, Key], None] = lambda done, total, key: None,
) -> list[SyncCodebaseResult]:
    """Sync the codebases of a scope one by one; each one's errors are in its result.

    The command line and the daemon both come through here. An absent codebase is an
    error only if it is named. Raises RegistryError for a name that is not one
    codebase's, IoError for a registry that cannot be read.
    """
    registry = registry or load_registry(home)
    keys = registry.keys if scope.names is None else [registry.find(name) for name in scope.names]
    results = []
    for done, key in enumerate(keys):
        progress(done, len(keys), key)
        if key in registry.broken:
            results.append(SyncCodebaseResult(*key, errors=tuple(registry.broken[key])))
        else:
            codebase = registry.codebases[key]
            result = sync_codebase(home, codebase, registry.owners, mode)
            remarks = codebase.remarks
            results.append(result._replace(remarks=remarks) if remarks else result)
    return results if scope.names is not None else pass_over_absent(results)


# ── 27 Status and diff ────────────────────────────────────────────────────────

# Status is sync without its last step: the same plan, put into a word and its detail.


class State:
    """How a codebase stands, in the words of `status` and its JSON."""

    CURRENT, NEVER_SYNCED, STALE = "current", "never_synced", "stale"
    MODIFIED, ORPHAN, ABSENT, ERROR = "modified", "orphan", "absent", "error"
    FINE = (CURRENT, ABSENT)
    WORDS = {  # for people: in the table, and in the summary
        CURRENT: ("current", "current"),
        NEVER_SYNCED: ("new", "to sync"),
        STALE: ("stale", "to sync"),
        ORPHAN: ("orphan", "to sync"),
        MODIFIED: ("edited", "edited by hand"),
        ABSENT: ("absent", "absent"),
        ERROR: ("broken", "broken"),
    }


class Staleness(NamedTuple):
    """How far a codebase's files are from what they should be; `status` is a State."""

    project: str
    codebase: str
    status: str
    detail: str = ""
    last_sync_at: Optional[str] = None
    last_sync_age: Optional[int] = None  # seconds
    active_tasks: int = 0
    hint: str = ""  # the way out of an error, or what shows another registry's text

    @property
    def label(self) -> str:
        return label_for((self.project, self.codebase))

    @property
    def is_outdated(self) -> bool:
        """Whether a sync, or a decision on a hand edit, would bring it up to date."""
        return self.status not in (*State.FINE, State.ERROR)

    @property
    def needs_attention(self) -> bool:
        if self.status == State.ABSENT:
            return self.last_sync_at is not None  # its folder was here
        return self.status != State.CURRENT or self.detail != ""


class Status(NamedTuple):
    """The staleness of every codebase, and the problems that belong to none."""

    codebases: tuple[Staleness, ...]
    stray: tuple[Problem, ...]

    @property
    def summary(self) -> dict[str, int]:
        return {
            "projects": len({entry.project for entry in self.codebases}),
            "codebases": len(self.codebases),
            "stale": sum(entry.is_outdated for entry in self.codebases),
        }

    def describe(self) -> str:
        """Count the codebases and their states in one line."""
        counts = Counter(State.WORDS[entry.status][1] for entry in self.codebases)
        words = dict.fromkeys(word for _, word in State.WORDS.values())
        states = ", ".join(f"{counts[word]} {word}" for word in words if counts[word])
        summary = self.summary
        places = f"{count_of(summary['codebases'], 'codebase')} in {count_of(summary['projects'], 'project')}"
        return f"{places}: {states}" if states else places


def _name_change(file: FilePlan, plan: Plan) -> str:
    record = plan.old_record or Record()
    if file.is_foreign:
        return FOREIGN
    if file.action in (Action.REMOVE, Action.RELEASE, Action.EVICT):
        return "no longer wanted" if file.digest is None else "block no longer needed"
    recorded = record.files.get(file.path)
    if file.action == Action.CREATE and recorded is not None and file.before.kind == "absent":
        return "missing"
    if file.action == Action.CREATE and recorded:
        return "block missing"
    if recorded == file.digest and file.action != Action.UPDATE:
        return "edited by hand"
    # Otherwise the user's own text changed around the block, or Orchestra was upgraded.
    # (0.1 recorded two hashes where there is a project.yaml.)
    before, now = (inputs.rpartition(" ")[2] for inputs in (record.inputs, plan.record.inputs))
    return "registry changed" if len(before) == len(now) and before != now else "out of date"


def judge_plan(home: str, plan: Plan) -> tuple[str, str]:
    """Return the first state that applies, in the order below, and its detail.

    A plan with problems is the caller's to judge. Another registry's text is stale,
    although only a sync by name replaces it.
    """
    foreign = ", ".join(file.path for file in plan.files if file.is_foreign)
    if not plan.writes and not foreign:
        return State.CURRENT, ""
    if plan.old_record is None:
        return State.NEVER_SYNCED, foreign and f"{FOREIGN}: {foreign}"
    states = {
        "missing": State.STALE,
        "block missing": State.STALE,
        "registry changed": State.STALE,
        "out of date": State.STALE,
        "block no longer needed": State.STALE,
        FOREIGN: State.STALE,
        "edited by hand": State.MODIFIED,
        "no longer wanted": State.ORPHAN,
    }
    paths: dict[str, list[str]] = {change: [] for change in states}
    for file in plan.all_files(home):
        if file.writes or file.is_foreign:
            paths[_name_change(file, plan)].append(file.path)
    found = [change for change in states if paths[change]]
    state = states[found[0]]
    if state != State.STALE and len(found) == 1:
        return state, ", ".join(paths[found[0]])
    return state, "; ".join(f"{change}: {', '.join(paths[change])}" for change in found)


def find_shadowing(plan: Plan, also: Iterable[Hiding] = ()) -> Iterator[tuple[str, str]]:
    """Find files of the user's that an agent reads in place of a planned one."""
    written = {file.path for file in plan.files if file.after is not None}
    parts = sorted({f"{file.agent.part}/" for file in plan.files if file.agent.part})
    found = [(folder, row) for row in SHADOWING for folder in ("", *parts)]
    for folder, row in (*found, *(("", row) for row in also)):
        path, hidden = folder + row.path, folder + row.hidden
        if hidden in written and path not in written and os.path.lexists(f"{plan.root}/{path}"):
            yield path, f"{row.readers} reads it instead of {hidden}"


def find_noted(plan: Plan) -> Iterator[FilePlan]:
    """Iterate over the files with notes that call for something.

    A link to a file that is written calls for nothing: its agent reads that.
    """
    written = [file for file in plan.files if file.path in plan.record.files and file.before.kind != "symlink"]
    for file in plan.files:
        is_served = file.before.kind == "symlink" and any(
            other.agent.part == file.agent.part
            and is_same_file(f"{plan.root}/{file.path}", f"{plan.root}/{other.path}")
            for other in written
        )
        if file.note and not is_served:
            yield file


def _last_sync_at(home: str, key: Key) -> str:
    with suppress(OrchestraError):
        record = load_record(home, key)
        return record.synced_at if record else ""
    return ""


def check_staleness(
    home: str, codebase: Codebase, owners: Optional[Owners] = None, clock: Clock = time.time
) -> Staleness:
    """Judge one codebase; if that fails, its status is `error`, or `absent`."""
    tasks = sum(len(part.open_tasks) for part in codebase.projects)
    try:
        plan = Planner(home, codebase, owners).plan()
        problems = plan.problems(home)
        status, detail = (State.ERROR, "; ".join(map(str, problems))) if problems else judge_plan(home, plan)
        is_foreign = any(file.is_foreign for file in plan.files)
        hint = f"orchestra diff {typed(label_for(codebase.key))}" if is_foreign else ""
        noted = ((file.path, file.note) for file in find_noted(plan) if not file.is_foreign)
        notes = [*noted, *find_shadowing(plan)]
        detail = "; ".join(filter(None, [detail, *map(": ".join, notes)]))
        synced_at = plan.old_record.synced_at if plan.old_record else ""
    except (OrchestraError, OSError) as error:
        problems, hint = [Problem.from_error(error)], ""
        status = State.ABSENT if isinstance(error, FolderAbsent) else State.ERROR
        detail, synced_at = str(error), _last_sync_at(home, codebase.key)
    hint = problems[0].hint if problems else hint
    return Staleness(*codebase.key, status, detail, synced_at or None, age_of(synced_at, clock), tasks, hint)


def scan_staleness(
    home: str, registry: Registry, keys: Optional[Iterable[Key]] = None, clock: Clock = time.time
) -> Status:
    """Judge some codebases of the registry; by default, all."""
    entries = []
    for key in registry.keys if keys is None else keys:
        if key in registry.broken:
            problems, synced_at = registry.broken[key], _last_sync_at(home, key)
            detail, age = "; ".join(map(str, problems)), age_of(synced_at, clock)
            entries.append(Staleness(*key, State.ERROR, detail, synced_at or None, age, hint=problems[0].hint))
        else:
            entries.append(check_staleness(home, registry.codebases[key], registry.owners, clock))
    return Status(tuple(entries), registry.stray)


def _lines_of(data: bytes) -> list[str]:
    # Not splitlines(): to diff and patch only a line feed ends a line.
    return [line for line in re.split(r"(?<=\n)", data.decode("utf-8", "replace")) if line]


def _diff_lines(old: Sequence[str], new: Sequence[str], old_name: str, new_name: str) -> Iterable[str]:
    """Write a unified diff; where difflib might take hours, one that replaces all."""
    import difflib

    counts = Counter(new)
    often = len(new) // 100 + 1 if len(new) >= 200 else 200  # difflib passes over what is there more often
    pairs = sum(counts[line] for line in old if counts[line] <= often)
    if pairs <= 20_000:
        return difflib.unified_diff(old, new, old_name, new_name)
    head = [f"--- {old_name}\n", f"+++ {new_name}\n", f"@@ -1,{len(old)} +1,{len(new)} @@\n"]
    return [*head, *(f"-{line}" for line in old), *(f"+{line}" for line in new)]


def diff_codebase(home: str, codebase: Codebase, owners: Owners) -> tuple[str, tuple[Problem, ...]]:
    """Write a unified diff of what a sync would do; also return the problems.

    Characters that do not show on a terminal, or move its cursor, are escaped.
    """
    plan = Planner(home, codebase, owners, SyncMode(take_over=True)).plan()
    parts: list[str] = []
    for file in plan.all_files(home):
        if file.writes and file.action != Action.RELEASE:
            old, new = _lines_of(file.before.data), _lines_of(file.after or b"")
            old_name = "/dev/null" if file.before.kind == "absent" else f"a/{file.path}"
            new_name = "/dev/null" if file.after is None else f"b/{file.path}"
            for line in _diff_lines(old, new, old_name, new_name):
                parts.append(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n")
    problems = tuple(problem.below(label_for(codebase.key)) for problem in plan.problems(home))
    return show_hidden("".join(parts)), problems


# What an agent is told


def find_part(home: str, codebase: Codebase, folder: str) -> str:
    """Find the part of a codebase that a folder is in, by its path, "" for none."""
    root, folder = real_path(codebase_root(home, codebase)).rstrip("/"), real_path(folder)
    parts = (part.path for part in codebase.projects if part.has_files)
    return max((path for path in parts if f"{folder}/".startswith(f"{root}/{path}/")), key=len, default="")


def preview_files(home: str, codebase: Codebase, owners: Owners) -> dict[str, bytes]:
    """Return the codebase's files as a sync would leave them, with the user's own text.

    Of a link it is what that leads to. Where there is no folder, or a file cannot be
    written, it is what would be new. A file that is not needed is empty.
    """
    files = render_files(codebase)
    with suppress(OrchestraError, OSError):
        plan = Planner(home, codebase, owners, SyncMode(take_over=True)).plan()
        for file in plan.files:
            is_link = file.before.kind == "symlink"
            linked = read_disk(real_path(f"{plan.root}/{file.path}"), MAX_MANAGED_FILE) if is_link else ABSENT
            after = linked.data if linked.kind == "file" else file.after
            if file.path in files and (after is not None or file.digest == ""):
                files[file.path] = after or b""
    return files


def trace_origins(home: str, codebase: Codebase) -> Iterator[tuple[str, str, str]]:
    """Iterate over the pieces of a codebase: key, text, and the files that say it."""
    start = len(projects_root(home)) + 1
    keys = (
        "path",
        "description",
        "targets",
        "commands",
        "conventions",
        "notes",
        "skills",
        "projects",
        "custom_targets",
    )
    for key in keys:
        value = getattr(codebase, key)
        is_list = isinstance(value, tuple) and key != "targets"
        kind: Any = frozenset if is_list else lambda own: own
        said = [(layer.path[start:], kind(getattr(layer.said, key))) for layer in codebase.layers]
        for item in value if is_list else filter(None, [value]):
            files = [f"{path}.yaml" for path, own in said if (item in own if is_list else item == own)]
            parts = (item,) if isinstance(item, str) else item if key == "targets" else filter(None, item[:2])
            yield key, (", " if key == "targets" else ": ").join(parts), ", ".join(files if is_list else files[-1:])
    for prose in codebase.prose:
        if prose.text.strip():
            yield "prose", prose.text.strip(), prose.file[start:]


# ══ IV Daemon ═════════════════════════════════════════════════════════════════

# ── 28 Watching ───────────────────────────────────────────────────────────────

# An event says only where to look. What counts is how the tree differs from its last
# snapshot, so lost, repeated and merged events do no harm. A watch is set before what
# it watches is read: a change is either read, or announced afterwards.
#
# A file caught half-written. Most editors empty a file and then write it, or rename it
# away and write a new one. First the watcher suspects a file, then a job:
#
#   1 A changed file that is empty, or that inotify knows to be open for writing,
#     becomes a suspect and is not reported yet.
#   2 A suspect is looked at again at its next event, at once; without an event after
#     RECHECK_PAUSE, and then whenever it has kept its stamp for twice as long. One that
#     is never left alone does not keep the daemon busy: `Suspects.LASTING`.
#   3 A suspect that has kept its stamp for DEBOUNCE_WINDOW is overdue: it counts as it
#     is. A missing file has its folder's stamp.
#   4 What counts is noted by its codebase (`Debouncer`): a job reads and syncs it, the
#     first time at once, then once per window.
#   5 A file that the job finds broken, emptied, gone or being written becomes a suspect
#     in turn. The codebases whose layer it is are in doubt: neither synced nor
#     reported, they stay as they were known. Its window ends, so its next event starts
#     a job at once; without an event, step 2 does.
#   6 Once all files for which a codebase is in doubt are overdue, the next job takes
#     them as they are: what is broken is reported. It does the same for a codebase
#     that has been in doubt for MAX_WINDOWS: a program may write all.md for hours.

DEBOUNCE_WINDOW = 0.5  # seconds
MAX_WINDOWS = 10  # far longer than a save takes; a user still waits for 5 s
RECHECK_PAUSE = 0.004  # seconds until a suspect is first looked at again
POLL_INTERVAL = 1.0  # seconds between two looks at everything where not all is watched
RESCAN_INTERVAL = 60.0  # seconds between two looks at everything otherwise
EVENTS_PER_STEP = 64  # then it is the sockets' turn; the rest stays readable

# Backends


class Backend:
    """What announces changes. This one announces nothing: everything is polled.

    `fileno` is readable while there are events, or -1; `being_written` are the paths
    known to be open for writing since their last change.
    """

    name = "polling"

    def __init__(self) -> None:
        self.being_written: set[str] = set()

    def fileno(self) -> int:
        return -1

    def watch(self, path: str, is_file: bool = False) -> bool:
        """Watch a path and return whether the watch is new; raises OSError."""
        return False

    def retain(self, paths: set[str]) -> None:
        """Drop all watches except those of some paths."""

    def drain(self) -> Optional[set[str]]:
        """Take the paths that had events; None stands for all paths."""
        return None

    def close(self) -> None:
        pass


class InotifyBackend(Backend):
    """Linux's inotify(7), through ctypes. Watching a folder covers the files in it."""

    name = "inotify"

    # linux/inotify.h. IN_OPEN, IN_ACCESS and IN_CLOSE_NOWRITE are left out: the
    # daemon's own reads would wake it.
    IN_MODIFY, IN_ATTRIB, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO = 0x2, 0x4, 0x8, 0x40, 0x80
    IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_MOVE_SELF = 0x100, 0x200, 0x400, 0x800
    IN_Q_OVERFLOW, IN_IGNORED, IN_ONLYDIR = 0x4000, 0x8000, 0x1000000
    MASK = IN_MODIFY | IN_ATTRIB | IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO
    MASK |= IN_CREATE | IN_DELETE | IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR
    HEADER = 16  # bytes of struct inotify_event before the name: wd, mask, cookie, len
    EVENT = 32  # bytes of an event with a short name; with the longest it has 272

    def __init__(self) -> None:
        try:
            import ctypes
        except ImportError as error:  # a Python built without libffi
            raise OSError(errno.ENOSYS, "this Python has no ctypes") from error
        super().__init__()
        self._libc: Any = ctypes.CDLL(None, use_errno=True)
        self._get_errno = ctypes.get_errno
        self._fd = self._check(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify")
        self._paths: dict[int, set[str]] = {}  # a folder may have several

    def _check(self, result: int, path: str) -> int:
        if result < 0:
            code = self._get_errno()
            raise OSError(code, os.strerror(code), path)
        return result

    def fileno(self) -> int:
        return self._fd

    def watch(self, path: str, is_file: bool = False) -> bool:
        if is_file:
            return False
        wd = self._libc.inotify_add_watch(self._fd, os.fsencode(path), self.MASK)
        paths = self._paths.setdefault(self._check(wd, path), set())
        is_new = path not in paths
        paths.add(path)
        return is_new

    def retain(self, paths: set[str]) -> None:
        for wd in list(self._paths):
            self._paths[wd] &= paths
            if not self._paths[wd]:
                del self._paths[wd]
                self._libc.inotify_rm_watch(self._fd, wd)

    def drain(self) -> Optional[set[str]]:
        try:
            data = os.read(self._fd, EVENTS_PER_STEP * self.EVENT)
        except BlockingIOError:
            return set()
        changed: set[str] = set()
        for wd, mask, name in self._parse(data):
            if mask & self.IN_Q_OVERFLOW:
                self.being_written.clear()
                return None
            for folder in self._paths.get(wd, ()):
                path = os.path.join(folder, name) if name else folder
                changed.add(path)
                if mask & self.IN_MODIFY:
                    self.being_written.add(path)
                elif not mask & self.IN_ATTRIB:  # closed, or another file by now
                    self.being_written.discard(path)
            if mask & self.IN_IGNORED:
                self._paths.pop(wd, None)
        return changed

    def _parse(self, data: bytes) -> Iterator[tuple[int, int, str]]:
        import struct

        at = 0
        while at < len(data):
            wd, mask, _cookie, length = struct.unpack_from("=iIII", data, at)
            at += self.HEADER + length
            yield wd, mask, os.fsdecode(data[at - length : at].rstrip(b"\0"))

    def close(self) -> None:
        os.close(self._fd)


class KqueueBackend(Backend):
    """kqueue's EVFILT_VNODE (macOS, BSD): every folder and file takes a descriptor.

    A folder's descriptor tells of entries that come and go. A write in place shows only
    on the file's, and a truncation there only as ATTRIB (xnu: kpi_vfs.c,
    kqueue_file_tests.c).
    """

    name = "kqueue"
    RESERVE = 128  # descriptors not spent on watches
    O_EVTONLY = 0x8000  # fcntl.h (in os from 3.10): does not keep a volume mounted

    def __init__(self, budget: int) -> None:
        import select

        super().__init__()
        self._select: Any = select  # mypy knows kqueue only on macOS
        self._queue: Any = self._select.kqueue()
        self._budget = budget
        self._watched: dict[str, tuple[int, int, int]] = {}  # path: fd, device, inode
        self._path_of: dict[int, str] = {}

    def fileno(self) -> int:
        return int(self._queue.fileno())

    def watch(self, path: str, is_file: bool = False) -> bool:
        info = os.stat(path)
        known = self._watched.get(path)
        if known and known[1:] == (info.st_dev, info.st_ino):
            return False
        if known:
            self._forget(path)
        if len(self._watched) >= self._budget:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        flags = self.O_EVTONLY if sys.platform == "darwin" else os.O_RDONLY
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._add(fd, is_file)
            info = os.fstat(fd)
        except OSError:
            os.close(fd)
            raise
        self._watched[path] = (fd, info.st_dev, info.st_ino)
        self._path_of[fd] = path
        return True

    def _add(self, fd: int, is_file: bool) -> None:
        s = self._select
        notes = s.KQ_NOTE_WRITE | s.KQ_NOTE_DELETE | s.KQ_NOTE_RENAME | s.KQ_NOTE_REVOKE
        if is_file:
            notes |= s.KQ_NOTE_EXTEND | s.KQ_NOTE_ATTRIB
        event = s.kevent(fd, s.KQ_FILTER_VNODE, s.KQ_EV_ADD | s.KQ_EV_CLEAR, notes)
        self._queue.control([event], 0)  # one at a time, so that an error raises

    def _forget(self, path: str) -> None:
        fd = self._watched.pop(path)[0]
        del self._path_of[fd]
        os.close(fd)

    def retain(self, paths: set[str]) -> None:
        for path in [path for path in self._watched if path not in paths]:
            self._forget(path)

    def drain(self) -> Optional[set[str]]:
        events = self._queue.control(None, EVENTS_PER_STEP, 0)
        return {self._path_of[event.ident] for event in events if event.ident in self._path_of}

    def close(self) -> None:
        self.retain(set())
        self._queue.close()


def open_backend(wanted: str, descriptors: int) -> Backend:
    """Open the backend named `wanted`, or the best one where that is empty.

    `descriptors` is the process's limit on open files. Raises NotifyError if the wanted
    backend is unknown or not available here.
    """
    import select

    available: dict[str, Callable[[], Backend]] = {"polling": Backend}
    if sys.platform.startswith("linux"):
        available = {"inotify": InotifyBackend, **available}
    if hasattr(select, "kqueue"):
        available = {"kqueue": lambda: KqueueBackend(descriptors - KqueueBackend.RESERVE), **available}
    if wanted and wanted not in available:
        raise NotifyError(f"ORCHESTRA_WATCHER: expected {' or '.join(available)}, got {wanted!r}")
    name = wanted or next(iter(available))
    try:
        return available[name]()
    except OSError as error:
        if wanted:
            raise NotifyError(f"cannot watch files with {name}: {explain_os_error(error)}") from error
        return Backend()


# Timers


class Debouncer:
    """Fires a key at once, then at most once per window while it keeps being noted.

    The last note always fires. `window` is in seconds of `clock`.
    """

    def __init__(self, window: float, clock: Clock) -> None:
        self._window = window
        self._clock = clock
        self._open_until: dict[Any, float] = {}
        self._waiting: dict[Any, None] = {}  # the longest first

    def note(self, keys: Iterable[Any]) -> None:
        self._waiting.update(dict.fromkeys(keys))

    def take_due(self, most: Optional[int] = None) -> set[Any]:
        """Take noted keys that have no open window, and open one for each.

        If there are more than `most`, take those that have waited longest.
        """
        now = self._clock()
        self._open_until = {key: end for key, end in self._open_until.items() if end > now}
        due = [key for key in self._waiting if key not in self._open_until][:most]
        for key in due:
            del self._waiting[key]
        self._open_until.update(dict.fromkeys(due, now + self._window))
        return set(due)

    def end_window(self, keys: Iterable[Any]) -> None:
        """Let keys fire at their next note."""
        for key in keys:
            self._open_until.pop(key, None)

    def next_due(self) -> Optional[float]:
        """Return when there will be something to take, in the clock's seconds."""
        return min((self._open_until.get(key, 0.0) for key in self._waiting), default=None)


class Suspects:
    """Files that may be half-written, by path, and when to look at each again.

    A suspect is overdue when it has had one stamp for `window`, in seconds of `clock`.
    """

    LASTING = 3  # windows, after which it is looked at once per window

    def __init__(self, window: float, clock: Clock) -> None:
        self._window = window
        self._clock = clock
        self._since: dict[str, tuple[Stamp, float]] = {}
        self._found_at: dict[str, float] = {}
        self._again_at: dict[str, float] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._since)

    def add(self, found: Mapping[str, Stamp]) -> None:
        """Add suspects with their stamps; a poll puts off none that is overdue."""
        now = self._clock()
        for path, stamp in found.items():
            known, since = self._since.get(path, (None, now))
            since = since if known == stamp else now
            self._since[path] = stamp, since
            is_lasting = now - self._found_at.setdefault(path, now) > self.LASTING * self._window
            end = since + self._window
            later = now + max(self._window if is_lasting else RECHECK_PAUSE, now - since)
            self._again_at[path] = min(end, later) if end > now else self._again_at.get(path, later)

    def discard(self, paths: Iterable[str]) -> None:
        for path in paths:
            for known in (self._since, self._found_at, self._again_at):
                known.pop(path, None)

    def take_due(self) -> set[str]:
        """Take the suspects to look at again."""
        now = self._clock()
        due = {path for path, at in self._again_at.items() if at <= now}
        for path in due:
            del self._again_at[path]
        return due

    def find_overdue(self) -> dict[str, Stamp]:
        """Return the stamps of those that are overdue."""
        now = self._clock()
        return {path: stamp for path, (stamp, since) in self._since.items() if since + self._window <= now}

    def discard_unrenewed(self, taken: Iterable[str]) -> None:
        """Discard those taken that have not been added again."""
        self.discard([path for path in taken if path not in self._again_at])

    def next_due(self) -> Optional[float]:
        """Return when there will be something to take, in the clock's seconds."""
        return min(self._again_at.values(), default=None)


# The watcher


class SeenFile(NamedTuple):
    """A file in a snapshot; a new stamp has it read, a new digest reported."""

    stamp: Stamp
    digest: str
    is_racy: bool


def find_first_link(path: str) -> Optional[str]:
    """Find the first part of an absolute path that is a link."""
    parts = os.path.normpath(path).split(os.sep)
    prefixes = (os.sep.join(parts[: i + 1]) for i in range(1, len(parts)))
    return next((prefix for prefix in prefixes if os.path.islink(prefix)), None)


class Anchors:
    """The folders to watch because a link leads through them, with the names in each.

    What a link leads to may go and come back (a git checkout), and links on the way to
    it may be changed. Watches are set by `watch`.
    """

    MAX_LINKS = 40  # followed from one name, as Linux does

    def __init__(self, watch: Callable[[str], object]) -> None:
        self._watch = watch
        self._names: dict[str, set[str]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def concern(self, path: str) -> bool:
        folder, name = os.path.split(path)
        return path in self._names or name in self._names.get(folder, ())

    def reset(self, root: str) -> None:
        self._names = {os.path.dirname(root): {os.path.basename(root)}, root: set()}
        for folder in self._names:
            self._watch(folder)
        self.add(root)

    def add(self, path: str) -> None:
        """Add the folders and names that a path leads through, its links followed."""
        for _ in range(self.MAX_LINKS):
            link = find_first_link(path)
            self._add_name(link or path)
            if link is None:
                return
            try:
                target = os.readlink(link)
            except OSError:
                return  # gone or replaced meanwhile: the watch just set has the event
            path = os.path.join(os.path.dirname(link), target) + path[len(link) :]

    def _add_name(self, path: str) -> None:
        """Watch the nearest existing ancestor, before testing which it is."""
        while True:
            folder, name = os.path.split(path)
            while not os.path.isdir(folder):
                folder, name = os.path.split(folder)
            self._names.setdefault(folder, set()).add(name)
            self._watch(folder)
            nearer = os.path.join(folder, name)
            if nearer == path or not os.path.isdir(nearer):
                return


WATCHED_FILE = re.compile(r"(?is)[^.#].*\.(?:ya?ml|md)")


class Watcher:
    """Keeps a snapshot of the registry's files, and reports how the disk differs.

    It looks into the projects' folders, and all folders in these: Markdown that is
    included may be there. Links to folders count only right in a project's folder, so
    that none leads in a circle. Whatever users and editors do to the tree meanwhile
    raises nothing; what cannot be watched is polled.
    """

    RACY_TIME = 2 * 10**9  # ns: a younger file may change without a new stamp
    MAX_FOLDERS = 10_000  # a shared registry's link may lead to all of the disk

    def __init__(
        self, home: str, backend: Backend, clock: Clock = time.time, monotonic: Clock = time.monotonic
    ) -> None:
        self.backend = backend
        self.must_poll = backend.fileno() < 0
        self.suspects = Suspects(DEBOUNCE_WINDOW, monotonic)
        self._root = projects_root(home)
        self._clock = clock
        self._snapshot: dict[str, dict[str, SeenFile]] = {}  # folder: path: file
        self._folders: set[str] = set()
        self._dangling: set[str] = set()  # links to nowhere, as to a disk that is not mounted
        self._anchors = Anchors(self._watch)
        self._overdue: dict[str, Stamp] = {}  # suspects that count as they are
        self._has_looked = False
        self._changed: set[str] = set()

    @property
    def interval(self) -> float:
        """Seconds until everything should be looked at again."""
        return POLL_INTERVAL if self.must_poll else RESCAN_INTERVAL

    def drain(self) -> set[str]:
        """Look where the backend has events."""
        return self.look(self.backend.drain())

    def recheck(self) -> set[str]:
        """Look again at the suspects whose time has come."""
        due, self._overdue = self.suspects.take_due(), self.suspects.find_overdue()
        changed = self.look(due)
        self._overdue = {}
        self.suspects.discard_unrenewed(due)
        return changed

    def look(self, paths: Optional[set[str]] = None) -> set[str]:
        """Compare some paths with the disk, or all; return which files changed."""
        self._changed = set()
        try:
            if paths is None or any(map(self._is_structural, paths)):
                self._look_at_all()
            else:
                self._look_at_paths(paths)
        except OSError:
            self.must_poll = True  # something went meanwhile: look again soon
        self._has_looked = True
        return self._changed

    def _is_structural(self, path: str) -> bool:
        """Return whether an event may change which folders to watch."""
        if self._anchors.concern(path):
            return True
        folder, name = os.path.split(path)
        if path in self._folders:
            # kqueue names a folder for every entry that comes or goes in it.
            return not os.path.isdir(path) or os.path.islink(path)
        is_new_folder = folder in self._folders and not is_ignored(name) and os.path.isdir(path)
        return folder == self._root or is_new_folder

    def _look_at_paths(self, paths: set[str]) -> None:
        for path in paths:
            folder, name = os.path.split(path)
            if path in self._folders:
                self._look_at_folder(path)
            elif folder in self._folders and WATCHED_FILE.fullmatch(name):
                if os.path.islink(path):
                    self._anchors.add(path)
                self._look_at_file(self._snapshot.setdefault(folder, {}), path, trust_stamp=False)

    def _look_at_all(self) -> None:
        """Compare the whole tree; find its folders anew, and drop other watches."""
        self.must_poll = self.backend.fileno() < 0
        self._anchors.reset(self._root)
        entries = self._list(self._root)
        if entries is None:
            return
        entries = [entry for entry in entries if not is_ignored(entry.name)]
        self._follow_links(entries)
        self._folders = {entry.path for entry in entries if os.path.isdir(entry.path)}
        links = (e.path for e in entries if e.is_symlink() and not WATCHED_FILE.fullmatch(e.name))
        known, self._dangling = self._dangling, {path for path in links if not os.path.exists(path)}
        self._changed |= known ^ self._dangling
        # A folder that is called all.yaml stops all codebases.
        self._look_at_files(self._root, [entry.path for entry in entries if WATCHED_FILE.fullmatch(entry.name)])
        for folder in [*self._folders]:
            self._look_at_folder(folder)
        for folder in self._snapshot.keys() - self._folders - {self._root}:
            if os.path.dirname(folder) in self._folders and os.path.isdir(folder):
                self._folders.add(folder)  # the one above could not be listed
            else:
                self._look_at_files(folder, ())
        self.backend.retain({*self._folders, *self._anchors, *self.suspects}.union(*self._snapshot.values()))

    def _look_at_folder(self, top: str) -> None:
        """Watch and compare a folder, and all below it, up to MAX_FOLDERS in all."""
        waiting = [top]  # not recursion: they may be nested deeper than Python calls
        while waiting:
            below = self._look_into(waiting.pop())
            below = below[: max(0, self.MAX_FOLDERS - len(self._folders))]
            self._folders.update(below)
            waiting += below

    def _look_into(self, folder: str) -> list[str]:
        """Watch and compare a folder, and return those in it."""
        self._watch(folder)
        entries = self._list(folder)
        if entries is None:
            return []
        known = self._snapshot.get(folder, {})
        files = [entry for entry in entries if entry.path in known or WATCHED_FILE.fullmatch(entry.name)]
        self._follow_links(files)
        self._look_at_files(folder, [entry.path for entry in files])
        is_project = os.path.dirname(folder) == self._root
        below = [e for e in entries if not is_ignored(e.name) and self._is_folder(e, follow=is_project)]
        self._follow_links(below)
        return [entry.path for entry in below]

    @staticmethod
    def _is_folder(entry: os.DirEntry[str], follow: bool) -> bool:
        return entry.is_dir(follow_symlinks=False) or (follow and entry.is_symlink() and os.path.isdir(entry.path))

    def _follow_links(self, entries: list[os.DirEntry[str]]) -> None:
        for entry in entries:
            if entry.is_symlink():
                self._anchors.add(entry.path)

    def _list(self, folder: str) -> Optional[list[os.DirEntry[str]]]:
        """List a folder, empty if there is none; return None if an error may pass."""
        try:
            return list_folder(folder)
        except IoError:
            self.must_poll = True
            return None

    def _look_at_files(self, folder: str, paths: Sequence[str]) -> None:
        """Look at all registry files of a folder; others known of it are gone."""
        known = self._snapshot.setdefault(folder, {})
        for path in paths:
            self._look_at_file(known, path)
        for path in known.keys() - set(paths):
            self._forget(known, path)

    def _look_at_file(self, known: dict[str, SeenFile], path: str, trust_stamp: bool = True) -> None:
        """Compare a file; read it unless its stamp is known, and can be trusted."""
        is_new_watch = self._watch(path, is_file=True)
        try:
            info = os.stat(path)
        except OSError:
            self._forget(known, path)
            return
        stamp, seen = Stamp.from_stat(info), known.get(path)
        if seen and seen.stamp == stamp and trust_stamp and not seen.is_racy and not is_new_watch:
            return
        if self._may_be_half_written(path, stamp, seen):
            self.suspects.add({path: stamp})
            return
        self.suspects.discard([path])
        age = self._clock() * 1e9 - max(stamp.mtime, stamp.ctime)
        known[path] = SeenFile(stamp, self._digest(path), age < self.RACY_TIME)
        if seen is None or seen.digest != known[path].digest:
            self._changed.add(path)

    def _may_be_half_written(self, path: str, stamp: Stamp, seen: Optional[SeenFile]) -> bool:
        if self._overdue.get(path) == stamp or not self._has_looked:
            return False
        is_emptied = stamp.size == 0 and not (seen and seen.stamp.size == 0)
        return is_emptied or path in self.backend.being_written

    @staticmethod
    def _digest(path: str) -> str:
        try:
            disk = read_disk(follow_link(path), MAX_REGISTRY_FILE + 1)
        except IoError as error:
            return str(error.source.errno)
        return f"{disk.kind} {sha256_of(disk.data)}"

    def _forget(self, known: dict[str, SeenFile], path: str) -> None:
        self.suspects.discard([path])
        if known.pop(path, None):
            self._changed.add(path)

    def _watch(self, path: str, is_file: bool = False) -> bool:
        try:
            return self.backend.watch(path, is_file)
        except OSError as error:
            # Gone meanwhile: its folder has the event. All else (descriptors or watches
            # used up, a network file system) leaves only polling.
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                self.must_poll = True
            return False


# ── 29 Logs ───────────────────────────────────────────────────────────────────

# Logging never stops the work that it reports: on a full disk, or without a reader,
# lines are lost.

LOG_LIMIT = 10 << 20  # bytes of a log file


class LogFile:
    """A rotating log file, and the standard stream that shows the same lines.

    launchd opens the file itself and passes it as the stream. Then a line is written
    once, and after a rotation the stream is moved to the new file. The constructor
    raises IoError.
    """

    KEPT = 5  # older files
    PIPE_PIECE = 512  # bytes that a writable pipe takes whole: POSIX's least PIPE_BUF

    def __init__(self, path: str, stream: int, limit: int) -> None:
        self._path = path
        self._stream = stream
        self._limit = limit
        with blame(path):
            make_private_folder(os.path.dirname(path))
        self._fd = self._open()

    def _open(self) -> int:
        # O_NONBLOCK: a FIFO is an error instead of a wait for its reader.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        with blame(self._path):
            return os.open(self._path, flags, 0o600)

    def is_at(self, stream: int) -> bool:
        return is_same_file(self._fd, stream)

    def take_stream(self) -> None:
        """Append to the file what the program writes to the stream, as launchd does."""
        os.dup2(self._fd, self._stream)

    def write(self, line: bytes, echo: bool = True) -> None:
        """Append a line, after a rotation if need be; `echo` shows it as well."""
        is_stream = self.is_at(self._stream)
        with suppress(OSError, IoError):
            if os.fstat(self._fd).st_size + len(line) > self._limit:
                self.rotate(self._path)
            if not os.path.exists(self._path):  # rotated, or removed by the user
                new = self._open()
                os.dup2(new, self._fd, inheritable=False)
                os.close(new)
                if is_stream:
                    self.take_stream()
            os.write(self._fd, line)
        if echo and not is_stream:
            self._echo(line)

    def _echo(self, line: bytes) -> None:
        """Write as much as the stream takes at once: its reader may have stopped."""
        import select

        with suppress(OSError, ValueError):  # the terminal is gone
            while line and select.select([], [self._stream], [], 0)[1]:
                line = line[os.write(self._stream, line[: self.PIPE_PIECE]) :]

    @classmethod
    def rotate(cls, path: str) -> None:
        """Rename log to log.1, that to log.2 and so on."""
        for number in range(cls.KEPT, 0, -1):
            newer = f"{path}.{number - 1}" if number > 1 else path
            if os.path.exists(newer):
                os.replace(newer, f"{path}.{number}")

    def close(self) -> None:
        os.close(self._fd)


class Log:
    """Writes events, one per line, to the log files and the standard streams.

    INFO goes to daemon.log and stdout; WARNING to daemon-err.log and stderr as well.
    """

    def __init__(self, home: str, limit: int = LOG_LIMIT) -> None:
        self._out = LogFile(stdout_log_path(home), 1, limit)
        self._err = LogFile(stderr_log_path(home), 2, limit)

    def info(self, message: str, **fields: object) -> None:
        self._out.write(self._format("INFO", message, fields))

    def warning(self, message: str, **fields: object) -> None:
        line = self._format("WARNING", message, fields)
        # Where both streams lead to one terminal or file, it gets the line once.
        self._out.write(line, echo=not is_same_file(1, 2) and not self._err.is_at(1))
        self._err.write(line, echo=not self._out.is_at(2))

    def _format(self, level: str, message: str, fields: Mapping[str, object]) -> bytes:
        now = time.time()
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
        words = [when, level, message]
        for name, value in fields.items():
            text = str(value)
            if not (text.isprintable() and re.fullmatch(r"[^\s\"=]+", text)):
                text = json.dumps(text, ensure_ascii=not text.isprintable())
            words.append(f"{name}={text}")
        return (" ".join(words) + "\n").encode("utf-8", "backslashreplace")

    def close(self) -> None:
        self._out.close()
        self._err.close()


def log_streams(home: str) -> None:
    """Append what the program writes to stdout and stderr to the log files."""
    for path, stream in ((stdout_log_path(home), 1), (stderr_log_path(home), 2)):
        with closing(LogFile(path, stream, LOG_LIMIT)) as file:
            file.take_stream()


class LogReader:
    """Reads a log's end, then what is appended, across rotations; raises IoError."""

    STEP = 64 << 10  # bytes

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = self._open()

    def _open(self) -> Optional[int]:
        with blame(self._path), suppress(FileNotFoundError):
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        return None

    def tail(self, count: int) -> bytes:
        """Take the last `count` lines of a log of any size; `read` continues there."""
        if self._fd is None:
            return b""
        data = b""
        with blame(self._path):
            start = end = os.lseek(self._fd, 0, os.SEEK_END)
            while start > 0 and data.count(b"\n") <= count:
                size = min(start, self.STEP)
                start -= size
                data = os.pread(self._fd, size, start) + data
            os.lseek(self._fd, end, os.SEEK_SET)
        lines = re.findall(rb"[^\n]*\n|[^\n]+", data)
        return b"".join(lines[-count:] if count else [])

    def read(self) -> bytes:
        """Take what was appended since the last call."""
        data = b""
        if self._fd is not None:
            is_current = is_same_file(self._fd, self._path) or not os.path.exists(self._path)
            data = self._read_rest(self._fd)  # nothing is added to a rotated log
            if is_current:
                return data
            os.close(self._fd)
        self._fd = self._open()
        return data if self._fd is None else data + self._read_rest(self._fd)

    def _read_rest(self, fd: int) -> bytes:
        with blame(self._path):
            return b"".join(iter(lambda: os.read(fd, self.STEP), b""))


# ── 30 Programs ───────────────────────────────────────────────────────────────

# Other programs are started here alone: by one runner that tests replace, and never in
# the current folder, except for the user's editor and pager.


class Completed(NamedTuple):
    """How a program ended: its exit status and its output."""

    code: int
    output: str

    @property
    def last_line(self) -> str:
        return (self.output.splitlines() or [f"exit status {self.code}"])[-1]


Runner = Callable[..., Completed]  # called like run_program
TIMED_OUT, NOT_STARTED = 124, 127  # exit statuses, as of timeout(1) and sh(1)


def clean_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Leave out what could make a program run code from the current folder."""
    folders = environ.get("PATH", os.defpath).split(os.pathsep)
    kept = {name: value for name, value in environ.items() if name != "PYTHONPATH"}
    return {**kept, "PATH": os.pathsep.join(filter(os.path.isabs, folders))}


def run_program(
    argv: Sequence[str], timeout: float, folder: str = "/", environ: Mapping[str, str] = os.environ
) -> Completed:
    """Run a program for at most `timeout` seconds."""
    import subprocess

    try:
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(argv, cwd=folder, env=clean_environ(environ), timeout=timeout, check=False, **pipes)
    except subprocess.TimeoutExpired:
        return Completed(TIMED_OUT, f"no answer within {timeout:g} s")
    except OSError as error:
        return Completed(NOT_STARTED, explain_os_error(error))
    return Completed(done.returncode, done.stdout.decode("utf-8", "replace").strip())


class Notifier:
    """Runs the user's own program, ~/.orchestra/notify, with what went wrong.

    The loop calls `step`, and never waits. One program runs at a time, for at most
    TIMEOUT; what comes while it runs, or in the PAUSE after its start, is collected for
    the next one. The program is started by no shell, and only if nobody but the user
    could have written it.
    """

    TIMEOUT = 10.0  # seconds that a program may run
    PAUSE = 10.0  # seconds between two starts
    LOOK = 0.1  # seconds between two looks at a running program
    MOST = 10  # lines of one message

    def __init__(self, path: str, warn: Callable[..., None], clock: Clock) -> None:
        self._path = path
        self._warn = warn
        self._clock = clock
        self._lines: list[str] = []
        self._left_out = 0  # lines beyond MOST
        self._running: Any = None  # a subprocess.Popen
        self._started_at = clock() - self.PAUSE
        self._look_at = 0.0

    def add(self, line: str) -> None:
        if len(self._lines) < self.MOST:
            self._lines.append(visible(line)[:1000])
        else:
            self._left_out += 1

    def next_due(self) -> Optional[float]:
        """Return when `step` has something to do, in the clock's seconds."""
        if self._running is not None:
            return self._look_at
        return self._started_at + self.PAUSE if self._lines else None

    def step(self) -> None:
        """See whether the running program has ended, and start the next one."""
        if self._running is not None and not self._has_ended():
            return
        if self._lines and self._clock() >= self._started_at + self.PAUSE:
            lines = self._lines + [f"and {self._left_out} more"] * bool(self._left_out)
            self._lines, self._left_out = [], 0
            # Its first word keeps a message from being an option of the program.
            self._start("orchestra: " + "\n".join(lines))

    def _start(self, message: str) -> None:
        import subprocess

        if not os.path.lexists(self._path):
            return
        problem = self.find_problem(self._path)
        try:
            if problem is None:
                pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
                pipes.update(cwd="/", env=clean_environ(os.environ), start_new_session=True)
                self._running = subprocess.Popen([self._path, message], **pipes)
        except OSError as error:
            problem = Problem.from_error(error)
        self._started_at = self._clock()
        if problem:
            self._warn("could not notify", program=self._path, error=problem.message)

    @staticmethod
    def find_problem(path: str) -> Optional[Problem]:
        """Return why the program is not run, if one is there."""
        mend = "mend or remove it"
        if not os.path.lexists(path):
            return None
        try:
            found = os.stat(path)
        except OSError as error:
            return Problem(path, explain_os_error(error), mend)
        if not stat.S_ISREG(found.st_mode):
            return Problem(path, "expected a program, found none", mend)
        if found.st_uid not in (os.geteuid(), 0) or found.st_mode & 0o022:
            return Problem(path, "others may write to it", f"chown it to yourself, and chmod go-w {typed(path)}")
        is_executable = os.access(path, os.X_OK)
        return None if is_executable else Problem(path, "not executable", f"chmod u+x {typed(path)}")

    def _has_ended(self) -> bool:
        """Return whether the program has ended; kill one that runs for too long."""
        status = self._running.poll()
        self._look_at = self._clock() + self.LOOK
        if status is None:
            if self._clock() >= self._started_at + self.TIMEOUT:
                self._kill()
            return False
        self._running = None
        if status:
            end = f"exit status {status}" if status > 0 else f"ended by signal {-status}"
            self._warn("could not notify", program=self._path, error=end)
        return True

    def _kill(self) -> None:
        import signal

        with suppress(OSError):
            os.killpg(self._running.pid, signal.SIGKILL)  # and all that it has started

    def close(self) -> None:
        if self._running is not None:
            self._kill()


def start_apart(work: Callable[[], int]) -> int:
    """Do work in a new process, which outlives this one, and return its pid.

    It runs in a session of its own, so that neither the terminal's end nor Ctrl-C
    reaches it; `work` returns its exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        os.chdir("/")
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        status = work()
        sys.stdout.flush()
    finally:
        os._exit(status)


# The user's own programs, on the terminal


def run_editor(environ: Mapping[str, str], path: str) -> None:
    """Let the user edit a file; raises UsageError if that does not end well."""
    import shlex
    import subprocess

    editor = environ.get("VISUAL") or environ.get("EDITOR") or "vi"
    hint = "set VISUAL or EDITOR"
    try:
        process = subprocess.Popen([*shlex.split(editor), path])
    except FileNotFoundError:
        raise UsageError(f'editor "{editor}" not found', hint) from None
    except OSError as error:
        raise UsageError(f'editor "{editor}": {explain_os_error(error)}', hint) from None
    except ValueError:
        raise UsageError(f'editor "{editor}": a quote is not closed', hint) from None
    status = None
    while status is None:
        with suppress(KeyboardInterrupt):  # Ctrl-C is the editor's
            status = process.wait()
    if status:
        end = f"exited with status {status}" if status > 0 else f"was killed by signal {-status}"
        raise UsageError(f"the editor {end}")


def run_pager(environ: Mapping[str, str], text: str) -> bool:
    """Show a text in the user's pager; return False if it may not have been shown."""
    import shlex
    import subprocess

    try:
        argv = shlex.split(environ.get("PAGER", "less"))
        if not argv or argv[0] == "cat":
            return False
        pager = subprocess.Popen(argv, stdin=subprocess.PIPE, env={"LESS": "FRX", "LV": "-c", **environ})
    except (OSError, ValueError):
        return False
    rest: Optional[bytes] = text.encode("utf-8", "backslashreplace")
    is_interrupted = False
    while True:
        with suppress(KeyboardInterrupt):  # Ctrl-C is the pager's
            pager.communicate(rest)
            return is_interrupted or pager.returncode <= 0  # otherwise it failed
        rest, is_interrupted = None, True


# ── 31 Control socket ─────────────────────────────────────────────────────────

# One request per line, one reply per line, both JSON; only the status for the launcher
# is indented, and has several. Lines are cut and parsed without a socket, and the
# server takes its listener and selector as arguments, so that both can be tested in
# memory.

MAX_LINE = 64 << 10  # bytes
STATUS_TRIES = 5
STATUS_PAUSE = 0.1  # seconds between two tries
MAX_CLIENTS = 128  # fewer where few descriptors are allowed (`Daemon`)
SILENT_GRACE = 0.25  # seconds after which a silent client may be dropped to make room
TOO_MANY_CLIENTS = "daemon: expected at most as many clients as"
READABLE, WRITABLE = 1, 2  # as in selectors, whose import takes time

# Lines


class LineBuffer:
    """Cuts a stream of bytes into lines, whatever pieces it comes in."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        self._data += data

    def next_line(self, at_end: bool = False) -> Optional[bytes]:
        """Take one line without its end; `at_end` takes an unfinished last one too.

        Raises ProtocolError for a line longer than MAX_LINE.
        """
        end = self._data.find(b"\n")
        size = end if end >= 0 else len(self._data)
        if size > MAX_LINE:
            message = f"request: expected a line of at most {MAX_LINE} bytes, got a longer one"
            raise ProtocolError(message, closes=True)
        if end < 0 and not (size and at_end):
            return None
        line = bytes(self._data[:size])
        del self._data[: size + 1]
        return line.rstrip(b"\r")


class Request(NamedTuple):
    """A parsed line: `cmd` is status, sync or stop; `print_status` asks `pretty`."""

    cmd: str
    codebase: Optional[str] = None
    pretty: bool = False


@functools.lru_cache(4)  # clients that poll send one line again and again
def parse_request(line: bytes) -> Request:
    """Parse one line; raises ProtocolError, whose `closes` ends the connection."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"request: expected UTF-8, got the byte 0x{line[error.start]:02x}"
        raise ProtocolError(message, closes=True) from None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ProtocolError(f"request: expected JSON, got {excerpt(text)}") from None
    if not isinstance(value, dict):
        raise ProtocolError(f"request: expected a JSON object, got {excerpt(text)}")
    cmd, codebase = value.get("cmd"), value.get("codebase")
    if cmd not in ("status", "sync", "stop"):
        got = f"unknown command {excerpt(cmd)}" if isinstance(cmd, str) else excerpt(json.dumps(cmd))
        raise ProtocolError(f"cmd: expected status, sync or stop, got {got}")
    if not isinstance(codebase, (str, type(None))):
        raise ProtocolError(f"codebase: expected text, got {excerpt(json.dumps(codebase))}")
    return Request(cmd, codebase, value.get("pretty") is True)


def encode_line(value: Mapping[str, Any]) -> bytes:
    # ASCII only, so that a lone surrogate sent by a client cannot prevent a reply.
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def encode_reply(data: Any, pretty: bool = False) -> bytes:
    if pretty:
        return b'{"ok":true,"data":%b}\n' % format_json(data).encode()
    return encode_line({"ok": True, "data": data})


def encode_error(message: str) -> bytes:
    return encode_line({"ok": False, "error": message})


# Asking the daemon


def _explain_refusal(home: str, error: OSError) -> DaemonError:
    path = socket_path(home)
    # A full backlog is EAGAIN on Linux; on macOS ECONNREFUSED, as if nobody listened.
    if error.errno == errno.EAGAIN or (error.errno == errno.ECONNREFUSED and is_locked(daemon_lock_path(home))):
        return DaemonBusy(f"{path}: the daemon is running, but did not accept the connection", "run the command again")
    if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK, errno.ENOTDIR, errno.EPROTOTYPE):
        return DaemonNotRunning(path)
    return IoError(path, error)


def _read_reply(client: Any) -> Any:
    data = b""
    while not data.endswith(b"\n"):
        more = client.recv(1 << 16)
        if not more:
            raise ProtocolError("daemon: expected a reply, got the end of the connection")
        data += more
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ProtocolError(f"daemon: expected JSON, got {excerpt(data.decode('utf-8', 'replace'))}") from None


def _is_reply(data: Any) -> bool:
    """Return whether the data of a reply has a daemon's types, of any version."""
    try:
        numbers = [data.get(name, 0) for name in ("pid", "started_at_unix", "queue_depth")]
        texts = [data.get(name, "") for name in ("version", "watcher")]
        texts += [problem[name] for problem in data.get("problems", ()) for name in ("where", "message")]
    except (AttributeError, KeyError, TypeError):
        return False
    are_numbers = all(isinstance(number, int) and abs(number) < 1 << 63 for number in numbers)
    return are_numbers and all(isinstance(text, str) for text in texts)


def send_request(home: str, request: Mapping[str, Any], timeout: Optional[float] = 10.0) -> Any:
    """Send one request to the daemon and return the reply's data.

    `timeout` is in seconds. Raises DaemonNotRunning; DaemonBusy; ProtocolError for an
    error reply or none at all.
    """
    import _socket  # importing socket would take a tenth of what `daemon status` takes

    path = socket_path(home)
    with closing(_socket.socket(_socket.AF_UNIX)) as client:
        client.settimeout(timeout)
        try:
            client.connect(path)
        except OSError as error:
            raise _explain_refusal(home, error) from error
        try:
            with suppress(BrokenPipeError):  # turned away: the reply says why
                client.sendall(encode_line(request))
            reply = _read_reply(client)
        except OSError as error:
            raise ProtocolError(f"{path}: expected a reply, got: {explain_os_error(error)}") from error
    if not isinstance(reply, dict) or "ok" not in reply:
        raise ProtocolError(f"{path}: expected a reply with ok, got {excerpt(json.dumps(reply))}")
    if not reply["ok"]:
        message = str(reply.get("error"))
        raise DaemonBusy(message) if message.startswith(TOO_MANY_CLIENTS) else ProtocolError(message)
    data = reply.get("data")
    if not _is_reply(data):
        raise ProtocolError(f"{path}: expected a daemon's reply, got {excerpt(json.dumps(data))}")
    return data


def _request_patiently(home: str, cmd: str, *passing: type[DaemonError]) -> Any:
    """Send a request up to STATUS_TRIES times, while the error is one that may pass."""
    for _ in range(STATUS_TRIES - 1):
        with suppress(*passing):
            return send_request(home, {"cmd": cmd})
        time.sleep(STATUS_PAUSE)
    return send_request(home, {"cmd": cmd})


def request_status(home: str) -> Any:
    """Request the daemon's status, with retries while it may still be starting."""
    return _request_patiently(home, "status", DaemonNotRunning, DaemonBusy)


def print_status(path: bytes, version: bytes) -> bool:
    """Print the status of a daemon of this version; return False if that is not all.

    The launcher has a copy of this function, which uses built-in modules alone, since
    scripts poll the status: so it takes as long as Python's own start (10 ms of CPU),
    and with all of Orchestra loaded 3.7 times as long. The rest is left to the latter.
    """
    import _socket
    import posix
    import sys

    start = b'{"ok":true,"data":'
    try:
        if sys.stdout.encoding != "utf-8":
            return False
        client = _socket.socket(_socket.AF_UNIX)
        client.settimeout(10)
        client.connect(path)
        client.sendall(b'{"cmd":"status","pretty":true}\n')
        client.shutdown(_socket.SHUT_WR)
        reply = b"".join(iter(lambda: client.recv(1 << 16), b""))
        if not reply.startswith(start) or b'"version": "%b"' % version not in reply:
            return False
        text = reply[len(start) : -2] + b"\n"
        while text:
            text = text[posix.write(1, text) :]
    except (OSError, AttributeError):  # nobody answers, or stdout is closed
        return False
    return True


def request_sync(home: str, codebase: Optional[str] = None) -> Any:
    """Have the daemon sync one codebase, or all, and return the summary."""
    return send_request(home, {"cmd": "sync", **({"codebase": codebase} if codebase else {})}, timeout=None)


def request_stop(home: str) -> Any:
    """Ask the daemon to stop, with retries while it accepts no clients."""
    return _request_patiently(home, "stop", DaemonBusy)


# Clients


class Client:
    """One connection: what it sent that is not answered, and what it has not read."""

    # Its `state`
    NEW = "new"  # its first line has not arrived
    IDLE = "idle"  # all its lines are answered
    ANSWERING = "answering"  # there may be lines to answer
    WAITING = "waiting"  # for the job that its last line started
    CLOSING = "closing"  # to be closed when it has read its replies

    MAX_UNSENT = 256 << 10  # bytes waiting for a client that does not read

    def __init__(self, connection: Any, clock: Clock) -> None:
        self.connection = connection
        self.state = self.NEW
        self.has_ended = False  # it will send no more
        self.is_guest = False  # accepted when all places to stay were taken
        self.lines = LineBuffer()
        self.unsent = bytearray()
        self.events = 0  # that the selector waits for
        self.last_active = self.silent_since = clock()
        self._clock = clock

    def end(self) -> None:
        """Answer no more, and close the connection when its replies are read."""
        self.state = self.CLOSING
        self.silent_since = self._clock()

    @property
    def may_answer(self) -> bool:
        is_held = self.state in (self.WAITING, self.CLOSING)
        return not is_held and len(self.unsent) < self.MAX_UNSENT

    @property
    def wanted_events(self) -> int:
        wants_step = self.unsent or self.state == self.ANSWERING
        wants_to_read = self.may_answer and not self.has_ended
        return (READABLE if wants_to_read else 0) | (WRITABLE if wants_step else 0)

    @property
    def is_finished(self) -> bool:
        has_had_all = self.has_ended and self.state in (self.NEW, self.IDLE)
        return not self.unsent and (self.state == self.CLOSING or has_had_all)

    def receive(self) -> None:
        try:
            data = self.connection.recv(MAX_LINE)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # the connection was reset
        if data:
            self.last_active = self._clock()
            self.lines.feed(data)
        else:
            self.has_ended = True

    def send(self) -> bool:
        """Send what can be sent now; return False if the connection was reset."""
        try:
            while self.unsent:
                sent = self.connection.send(self.unsent)
                del self.unsent[:sent]
                self.last_active = self._clock()
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True


def peer_uid(connection: Any) -> Optional[int]:
    """Return the user at the other end of a Unix socket; None if that is unknown.

    It is -1, nobody, if the other end has disconnected. Linux: unix(7), SO_PEERCRED.
    macOS: sys/ucred.h, struct xucred by LOCAL_PEERCRED at level 0.
    """
    import socket
    import struct

    try:
        if sys.platform == "darwin":
            data = connection.getsockopt(0, 1, 76)
            return int(struct.unpack("=IIhxx16I", data)[1])
        if hasattr(socket, "SO_PEERCRED"):
            data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return int(struct.unpack("3i", data)[1])
    except OSError:
        return -1  # disconnected
    return None


# The server


class SocketServer:
    """Serves the clients of the control socket, whose requests `handle` answers.

    However many clients there are, and whatever they do, `status` and `stop` are
    answered, if not at the first try:

    1 Clients may stay, silent for IDLE_TIMEOUT, while there are places to stay.
    2 When those are taken, a client is let in as a guest: it has one request answered
       and is closed. A sync, which may take long, is refused.
    3 When all places are taken, the next client gets that of the oldest one that has
       been silent, or has left its last reply unread, for SILENT_GRACE. If there is
       none, the next client is turned away with TOO_MANY_CLIENTS.
    """

    GUEST_PLACES = 8  # of all places
    IDLE_TIMEOUT = 30.0  # seconds
    ACCEPTS_PER_STEP = 64  # then it is the other sockets' turn
    REQUESTS_PER_STEP = 32  # of one client

    def __init__(
        self,
        selector: Any,
        handle: Callable[[Request, Client], None],
        max_clients: int = MAX_CLIENTS,
        clock: Clock = time.monotonic,
    ) -> None:
        self.clients: set[Client] = set()
        self._listener: Any = None
        self._selector = selector
        self._handle = handle
        self._max_clients = max_clients
        self._refusal = f"{TOO_MANY_CLIENTS} {max_clients}, got one more"
        self._places_to_stay = max_clients - min(self.GUEST_PLACES, max_clients // 4)
        self._clock = clock
        self._spare: Optional[int] = None
        self._take_spare()

    def listen(self, listener: Any) -> None:
        """Accept clients from a listening socket, and no longer from an older one."""
        for _ in range(MAX_CLIENTS // self.ACCEPTS_PER_STEP):
            self._accept(READABLE)  # those that wait at the older one
        self.stop_listening()
        self._listener = listener
        self._selector.register(listener, READABLE, self._accept)

    def stop_listening(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def close(self) -> None:
        """Close everything, after a last try to send what clients have not read."""
        self.stop_listening()
        for client in list(self.clients):
            client.send()
            self._close(client)
        if self._spare is not None:
            os.close(self._spare)

    # Letting clients in

    def _accept(self, mask: int) -> None:
        for _ in range(self.ACCEPTS_PER_STEP):
            if self._listener is None:
                return  # stopped by another client in this step
            try:
                connection, _address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    return  # the client has disconnected
                if self._turn_away_without_descriptor():
                    continue
                return
            connection.setblocking(False)
            if peer_uid(connection) not in (os.getuid(), None):
                connection.close()
            elif len(self.clients) >= self._max_clients and not self._make_room():
                self._turn_away(connection)
            else:
                client = Client(connection, self._clock)
                client.is_guest = len(self.clients) >= self._places_to_stay
                self.clients.add(client)
                self._wait_for(client, READABLE)

    def _make_room(self) -> bool:
        """Close the oldest silent client, unless it is young; return success."""
        silent = (Client.NEW, Client.CLOSING)
        silents = [client for client in self.clients if client.state in silent]
        oldest = min(silents, key=lambda client: client.silent_since, default=None)
        if oldest is None or self._clock() - oldest.silent_since < SILENT_GRACE:
            return False
        self._close(oldest)
        return True

    def _turn_away(self, connection: Any) -> None:
        with suppress(OSError):
            connection.send(encode_error(self._refusal))
        connection.close()

    def _turn_away_without_descriptor(self) -> bool:
        # A connection left in the backlog would wake the loop for ever. The spare
        # descriptor accepts it.
        if self._spare is not None:
            os.close(self._spare)
        try:
            self._turn_away(self._listener.accept()[0])
            return True
        except BlockingIOError:
            return False  # none waits: Linux says EMFILE before it looks
        except OSError:
            time.sleep(0.01)  # the worker took the descriptor, for a moment
            return False
        finally:
            self._take_spare()

    def _take_spare(self) -> None:
        self._spare = None
        with suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    # Serving them

    def reply(self, client: Client, data: bytes) -> None:
        """Send the reply that a client waits for, and answer its next requests."""
        client.unsent += data
        client.state = Client.ANSWERING
        self._advance(client)

    def next_expiry(self) -> Optional[float]:
        """Return when `drop_silent` has something to do, in the clock's seconds."""
        times = [client.last_active for client in self.clients if client.state != Client.WAITING]
        return min(times) + self.IDLE_TIMEOUT if times else None

    def drop_silent(self) -> None:
        limit = self._clock() - self.IDLE_TIMEOUT
        for client in list(self.clients):
            if client.state != Client.WAITING and client.last_active <= limit:
                self._close(client)

    def _on_ready(self, client: Client, mask: int) -> None:
        if client not in self.clients:
            return  # closed in this step
        if mask & READABLE:
            client.receive()
        self._advance(client)

    def _advance(self, client: Client) -> None:
        """Answer some requests, send what can be sent, and wait for the next turn."""
        for _ in range(self.REQUESTS_PER_STEP):
            if not client.may_answer or not self._answer_next(client):
                break
        if not client.send() or client.is_finished:
            self._close(client)
        elif client in self.clients:
            self._wait_for(client, client.wanted_events)

    def _answer_next(self, client: Client) -> bool:
        """Answer a client's next line; return False if there is none."""
        try:
            line = client.lines.next_line(at_end=client.has_ended)
            if line is None:
                if client.state == Client.ANSWERING:
                    client.state = Client.IDLE
                return False
            client.is_guest &= len(self.clients) > self._places_to_stay
            client.state = Client.ANSWERING
            if client.is_guest:
                client.end()
            if line.strip():
                request = parse_request(line)
                if client.is_guest and request.cmd == "sync":
                    raise ProtocolError(self._refusal)
                self._handle(request, client)
        except ProtocolError as error:
            client.unsent += encode_error(str(error))
            if error.closes:
                client.end()
        return True

    def _wait_for(self, client: Client, events: int) -> None:
        """Have the selector wait for some events of a client."""
        if events == client.events:
            return
        if client.events:
            self._selector.unregister(client.connection)
        if events:
            on_ready = functools.partial(self._on_ready, client)
            self._selector.register(client.connection, events, on_ready)
        client.events = events

    def _close(self, client: Client) -> None:
        if client in self.clients:
            self.clients.remove(client)
            self._wait_for(client, 0)
            client.connection.close()


# The socket's name


def describe_lock_holder(home: str) -> str:
    """Describe the daemon's process, and since when it runs; "" if that is unknown.

    A killed daemon leaves its lock file; one that is starting writes it in a moment.
    """
    for _ in range(STATUS_TRIES):
        with suppress(OSError, IoError, ValueError, OverflowError):  # localtime raises three of them
            first, second, *versions = read_disk(daemon_lock_path(home)).data.decode().split()
            pid, started_at = int(first), int(second)
            if not has_exited(pid):
                when = time.localtime(started_at)
                is_today = time.strftime("%x", when) == time.strftime("%x")
                since = time.strftime("%H:%M" if is_today else "%Y-%m-%d %H:%M", when)
                others = "".join(f", {v}: orchestra daemon restart" for v in versions if v != __version__)
                return f" (running since {since}, pid {pid}{others})"
        time.sleep(STATUS_PAUSE)
    return ""


class DaemonSocket:
    """The name of a home's control socket, and the lock that only one daemon can take.

    Raises DaemonError if another one has it, IoError.
    """

    def __init__(self, home: str, started_at: int) -> None:
        self._home = home
        self._bound: Optional[os.stat_result] = None
        lock = try_lock(daemon_lock_path(home))
        if lock is None:
            hint = f"orchestra daemon status{describe_lock_holder(home)}"
            raise DaemonError(f"daemon socket already in use: {socket_path(home)}", hint)
        self._lock = lock
        with suppress(OSError):  # a full disk
            write_lock(lock, f"{os.getpid()} {started_at} {__version__}\n".encode())

    @property
    def has_lock(self) -> bool:
        """Whether others would find the lock taken: its file may have been removed."""
        return is_same_file(self._lock, daemon_lock_path(self._home))

    @property
    def is_bound(self) -> bool:
        """Whether the name still leads to the socket that was bound last."""
        try:
            found = os.lstat(socket_path(self._home))
        except OSError:
            return False
        return self._bound is not None and os.path.samestat(found, self._bound)

    def bind(self) -> Any:
        """Bind a socket to which only its owner can connect; remove a stale one.

        Raises IoError; ProtocolError for a path that cannot be a socket's.
        """
        import socket

        path = socket_path(self._home)
        limit = 103 if sys.platform == "darwin" else 107  # sun_path less its final NUL
        if len(os.fsencode(path)) > limit:
            problem = f"expected a socket path of at most {limit} bytes, got {len(os.fsencode(path))}"
            raise ProtocolError(f"{path}: {problem}", "a HOME with a shorter path")
        disk = read_disk(path)
        if disk.kind not in ("absent", "special"):
            raise ProtocolError(f"{path}: expected a socket or nothing, got {disk.noun}: move it away")
        remove_private(path)
        with blame(path), ExitStack() as opened:
            listener = opened.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            # Nobody can connect before it listens. An umask would do as well, but for
            # the worker's files too.
            os.chmod(path, 0o600)
            listener.listen(MAX_CLIENTS)
            self._bound = os.lstat(path)
            listener.setblocking(False)
            opened.pop_all()
        return listener

    def unbind(self) -> None:
        if self.has_lock and self.is_bound:
            remove_private(socket_path(self._home))

    def close(self) -> None:
        self.unbind()
        os.close(self._lock)


# ── 32 Worker ─────────────────────────────────────────────────────────────────

# One thread does the syncing, one job after the other, so that a hung network mount or
# a thousand codebases never keep `status` or `stop` waiting. It shares three things
# with the loop: the queue of jobs, the queue of outcomes, and a frozen cache that it
# replaces.

QUEUE_SIZE = 64
MAX_LOGGED_ERRORS = 10  # of one job
EVERYTHING = ("", "")  # stands for all codebases: a shared layer changed
STRAY = ("", "stray")  # stands for files that belong to no codebase
SyncTarget = SyncScope  # of a job; no agent's target


def prose_key(path: str) -> Key:
    """Make what stands for the codebases that have a Markdown file in their text."""
    return ("", path)


# What is known


class RegistryCache(NamedTuple):
    """What the daemon knows, frozen: the worker makes a new one, the loop reads it."""

    registry: Registry
    names: Mapping[Key, str] = {}  # each as short as it is unique
    failures: Mapping[Key, tuple[Problem, ...]] = {}  # of readable codebases
    absent: frozenset[Key] = frozenset()  # whose folder is not on this machine
    last_sync_at: Optional[int] = None  # Unix time

    @classmethod
    def load(cls, home: str) -> "RegistryCache":
        return cls(Registry({}, {}, (), Owners())).renewed(load_registry(home)._replace(seen={}))

    def renewed(self, registry: Registry, results: Sequence[SyncCodebaseResult] = ()) -> "RegistryCache":
        """Make the next cache, after the registry was read and codebases synced."""
        names = self.names
        if self.registry.codebases.keys() != registry.codebases.keys() or self.registry.broken or registry.broken:
            names = short_names(registry.keys)
        failures = {key: problems for key, problems in self.failures.items() if key in registry.codebases}
        for result in results:
            failures.pop(result.key, None)
            if result.errors and not result.is_absent and result.key in registry.codebases:
                failures[result.key] = result.errors
        absent = self.absent.difference(result.key for result in results) & registry.codebases.keys()
        absent |= {result.key for result in results if result.is_absent}
        has_synced = any(not (result.errors or result.is_absent) for result in results)
        last_sync_at = int(time.time()) if has_synced else self.last_sync_at
        return RegistryCache(registry, names, failures, frozenset(absent), last_sync_at)

    @property
    def problems(self) -> list[Problem]:
        return [*self.registry.problems, *(problem for key in sorted(self.failures) for problem in self.failures[key])]


# Jobs


class Source:
    """Where a job comes from."""

    START = "start"
    WATCHER = "watcher"
    SOCKET = "socket"
    STALENESS = "staleness"  # a scan that syncs nothing
    ABSENT = "absent"  # a look for folders that were absent


class SyncJob(NamedTuple):
    """Work for the worker; `source` is one of Source.

    `changed` are the keys whose files differ, EVERYTHING, STRAY and prose keys among
    them; the watcher's `target` names none. `overdue` are the suspects that count as
    they are, with the stamps they had; `late` the codebases that are taken as they are,
    whatever is suspected.
    """

    target: SyncTarget
    source: str
    respond_to: "Optional[Callable[[JobOutcome], None]]" = None
    changed: frozenset[Key] = frozenset()
    overdue: Mapping[str, Stamp] = {}
    late: Container[Key] = ()


class SyncSummary(NamedTuple):
    target: str
    source: str
    codebases: list[str]
    written: int
    unchanged: int
    duration_ms: int
    errors: list[str]


class JobOutcome(NamedTuple):
    """What became of a job: a summary, or the error that prevented it."""

    job: SyncJob
    summary: Optional[SyncSummary] = None
    error: str = ""
    bug: str = ""  # the traceback of the first try, if that was a bug
    results: Sequence[SyncCodebaseResult] = ()
    suspects: Mapping[str, Stamp] = {}
    in_doubt: Mapping[Key, Collection[str]] = {}  # neither synced nor reported, with their suspects
    statuses: Mapping[str, int] = {}  # found by a staleness scan
    found: frozenset[Key] = frozenset()  # were absent, and have their folders now
    stray: Sequence[Problem] = ()  # of files that belong to no codebase

    def encode(self) -> bytes:
        """Make a sync's reply: an error if it was prevented or all codebases failed."""
        summary = self.summary
        if summary is None:
            return encode_error(self.error)
        if summary.errors and len(summary.errors) >= len(summary.codebases) and not summary.written + summary.unchanged:
            return encode_error("; ".join(summary.errors[:MAX_LOGGED_ERRORS]))
        data = summary._asdict()
        if not summary.errors:
            del data["errors"]
        return encode_reply(data)


def is_at_rest(path: str, digest: str) -> bool:
    """Return whether a file still has the hash it was read with, and nobody writes it.

    Where it is unknown who writes, as on macOS, it is at rest.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False  # gone since
    try:
        is_written = has_writer(fd)
        return is_written is None or (not is_written and sha256_of(os.read(fd, MAX_REGISTRY_FILE + 1)) == digest)
    except OSError:
        return True
    finally:
        os.close(fd)


class SyncRun:
    """A run of a job: reads its codebases again, leaves those in doubt, syncs the rest.

    In doubt is a codebase that is broken, or that has a file which is gone, emptied or
    being written. These files become suspects, unless all of them are overdue or the
    codebase is late. `registry`, `suspects` and `in_doubt` are then what is known.
    Raises RegistryError, IoError.
    """

    def __init__(self, home: str, old: Registry, job: SyncJob) -> None:
        self._home = home
        self._old = old
        self._job = job
        self._is_asked = job.source == Source.SOCKET  # a client waits for the truth
        self._changed = self._find_changed()
        self.registry = self._reload()
        self.suspects: dict[str, Stamp] = {}
        self.in_doubt = {} if self._is_asked else self._find_doubtful()
        self._keep_doubtful()

    def sync(self) -> list[SyncCodebaseResult]:
        """Sync what the job is for, except what is in doubt, now or by the end."""
        mode = DEFAULT_MODE if self._is_asked else SyncMode(reload=self._reload_one)
        results = run_pipeline(self._home, self._scope(), mode, self.registry)
        results = results if self._is_asked else pass_over_absent(results)
        half_read = {result.key for result in results if self._may_be_half_read(result)}
        self.in_doubt.update({key: {codebase_path(self._home, key)} for key in half_read})
        return [result for result in results if result.key not in self.in_doubt]

    def _find_changed(self) -> set[Key]:
        """Find the codebases that changed; Markdown may be in the text of several."""
        changed = {key for key in self._job.changed if key[0]}
        prose = {path for project, path in self._job.changed - {EVERYTHING, STRAY} if not project}
        if prose:
            own = {find_layer_key(self._home, path) for path in prose}
            changed |= {key for key in self._old.keys if key in own}
            changed |= {key for key, codebase in self._old.codebases.items() if codebase.has_prose(prose)}
        return changed

    def _reload(self) -> Registry:
        """Read again what may have changed: all, or some codebases."""
        names = self._job.target.names
        if names is None or STRAY in self._job.changed or self._concerns_stray_files():
            return load_registry(self._home, self._old)
        if not self._is_asked:
            return reload_codebases(self._home, self._old, self._changed)
        # A client may name what was saved a moment ago, before the watcher's turn.
        stems = {name.rpartition("/")[2] for name in names}
        keys = [key for key in RegistryScan(self._home).keys if key[1] in stems or key not in self._old.codebases]
        return reload_codebases(self._home, self._old, keys)

    def _concerns_stray_files(self) -> bool:
        """Return whether a change may end or cause a problem that is no codebase's.

        A local sister may have found its codebase, or lost it.
        """
        whose = {key if key[0] else find_layer_key(self._home, key[1]) for key in self._job.changed}
        if self._old.stray and not whose <= {*self._old.codebases, *self._old.broken}:
            return True
        stems = [os.path.splitext(path)[0] for path in self._job.overdue]
        return any(os.path.lexists(f"{stem}.local.yaml") and not os.path.lexists(f"{stem}.yaml") for stem in stems)

    def _find_doubtful(self) -> dict[Key, Collection[str]]:
        """Find which of the codebases that were read again are in doubt, and why."""
        codebases, old, broken = self.registry.codebases, self._old, self.registry.broken
        read = {key for key in self._changed if key not in codebases}
        read |= {key for key, problems in broken.items() if problems != old.broken.get(key)}
        read |= {key for key, new in codebases.items() if new is not old.codebases.get(key, new)}
        seen = self.registry.seen
        found = {key: self._suspect_files_of(key, old.codebases.get(key), codebases.get(key), seen) for key in read}
        return {key: files for key, files in found.items() if files}

    def _suspect_files_of(
        self, key: Key, old: Optional[Codebase], new: Optional[Codebase], seen: Mapping[str, str]
    ) -> Collection[str]:
        """Return the suspects for which a codebase that was read again is in doubt.

        They are the files that were gone or empty, and those being written; if it is
        broken, all that differ.
        """
        digests, none = digests_of(self._home, key, old.layers) if old else {}, ("", sha256_of(b""))
        found = digests_of(self._home, key, new.layers) if new else seen
        changed = {path for path, digest in digests.items() if found.get(path, digest) != digest}
        if new:
            lost = {path for path in changed if digests[path] not in none and found[path] in none}
            changed = lost | {path for path in changed if not is_at_rest(path, found[path])}
        return self._suspect(key, changed if new or changed else {codebase_path(self._home, key)})

    def _suspect(self, key: Key, files: Iterable[str]) -> Collection[str]:
        """Make suspects of a codebase's files, unless all are overdue or it is late."""
        found = {path: Stamp.at(path) for path in files}
        if key in self._job.late or found.items() <= self._job.overdue.items():
            return ()
        self.suspects.update(found)
        return found.keys()

    def _reload_one(self, home: str, key: Key) -> Codebase:
        """Do as `load_with_layers`, but return the old one if the new is in doubt."""
        reader, old = LayerReader(home), self.registry.codebases[key]
        new, problems = reader.read(key)
        if self._suspect_files_of(key, old, new, reader.seen):
            return old
        if new is None:
            raise error_for(problems)
        return new

    def _keep_doubtful(self) -> None:
        """Leave what is in doubt as it was, unless another has its folder now."""
        doubtful = self.in_doubt.keys() & {*self.registry.broken, *self.registry.codebases}
        self.registry = self.registry._replace(seen={})
        if not doubtful:
            return
        codebases, broken = dict(self.registry.codebases), dict(self.registry.broken)
        owners = dict(self.registry.owners)
        for key in doubtful & self._old.codebases.keys():
            root = codebase_root(self._home, self._old.codebases[key])
            if owners.get(root, key) == key:
                new = codebases.pop(key, None)
                if new:
                    owners.pop(codebase_root(self._home, new), None)
                codebases[key] = self._old.codebases[key]
                broken.pop(key, None)
                if root:
                    owners[root] = key
        for key in doubtful & broken.keys():
            if key in self._old.broken:
                broken[key] = self._old.broken[key]
            elif key not in self._old.codebases:
                del broken[key]
        new_owners = Owners(owners, codebases, self.registry.owners)
        self.registry = self.registry._replace(codebases=codebases, broken=broken, owners=new_owners)

    def _scope(self) -> SyncScope:
        """Return what to sync: a watcher's job is for what changed, or was mended."""
        registry, job = self.registry, self._job
        if self._is_asked or (job.target.names is None and not self.in_doubt):
            return job.target
        wanted = {*registry.codebases, *registry.broken}
        if job.target.names is not None:
            mended = self._old.broken.keys() & registry.codebases.keys()
            wanted &= {*self._changed, *mended}
        return SyncScope.codebase(*map(label_for, sorted(wanted - self.in_doubt.keys())))

    def _may_be_half_read(self, result: SyncCodebaseResult) -> bool:
        """Return whether a codebase failed on a file saved since it was read."""
        codebase = self.registry.codebases.get(result.key)
        if codebase is None or not result.errors or result.files or self._is_asked:
            return False
        file = codebase_path(self._home, result.key)
        return not is_current(self._home, codebase) and bool(self._suspect(result.key, {file}))


def run_job(home: str, cache: RegistryCache, job: SyncJob) -> tuple[RegistryCache, JobOutcome]:
    """Run a job and return what is known then; raises RegistryError, IoError."""
    started = time.monotonic()
    run = SyncRun(home, cache.registry, job)
    results = run.sync()
    cache = cache.renewed(run.registry, results)
    names = [cache.names[result.key] for result in results]
    if job.target.names is None:
        target = "all"
    elif job.source == Source.SOCKET:
        target = job.target.names[0]
    else:
        target = names[0] if len(names) == 1 else f"{len(names)} codebases"
    summary = SyncSummary(
        target,
        job.source,
        [name for name, result in zip(names, results) if not result.is_absent],
        sum(len(result.written) for result in results),
        sum(len(result.unchanged) + len(result.foreign) for result in results),
        int((time.monotonic() - started) * 1000),
        [str(problem) for result in results for problem in result.errors],
    )
    outcome = JobOutcome(job, summary, results=results, stray=run.registry.stray)
    return cache, outcome._replace(suspects=run.suspects, in_doubt=run.in_doubt)


# The thread


def release_memory() -> None:
    """Return freed memory to the system: glibc keeps 16 MB after 1,000 codebases."""
    import gc

    gc.collect()
    with suppress(ImportError):  # a Python built without libffi
        import ctypes

        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)


class Worker:
    """Runs one job after the other in a thread, and leaves outcomes for the loop."""

    def __init__(self, home: str, cache: RegistryCache, wake: Callable[[], None]) -> None:
        import queue
        import threading
        from collections import deque

        self.cache = cache
        self.jobs: queue.Queue[Optional[SyncJob]] = queue.Queue()
        self.outcomes: deque[JobOutcome] = deque()
        self._home = home
        self._wake = wake
        # Not waited for at exit: a job that hangs on a dead network mount must not keep
        # the process alive.
        self.thread = threading.Thread(target=self._work, name="sync processor", daemon=True)

    def submit(self, job: SyncJob) -> bool:
        """Queue a job if there is room; for the watcher's only job there always is."""
        has_room = job.source == Source.WATCHER or self.jobs.qsize() < QUEUE_SIZE
        if has_room:
            self.jobs.put(job)
        return has_room

    def finish(self) -> list[SyncJob]:
        """End after the running job, and return those that were still queued."""
        import queue

        queued: list[Optional[SyncJob]] = []
        with suppress(queue.Empty):  # the worker may take the last one
            while True:
                queued.append(self.jobs.get_nowait())
        self.jobs.put(None)
        return [job for job in queued if job is not None]

    def _work(self) -> None:
        for job in iter(self.jobs.get, None):
            self.outcomes.append(self._run(job))  # kept in no variable: it may be megabytes
            self._wake()
        self._wake()

    def _run(self, job: SyncJob) -> JobOutcome:
        outcome = self._try(job)
        if outcome.bug and self._rebuild_cache():
            outcome = self._try(job)._replace(bug=outcome.bug)
        return outcome

    def _try(self, job: SyncJob) -> JobOutcome:
        try:
            if job.source == Source.STALENESS:
                statuses = self._count_statuses()
                if self.jobs.empty():
                    release_memory()
                return JobOutcome(job, statuses=statuses)
            if job.source == Source.ABSENT:
                return JobOutcome(job, found=self._find_returned())
            self.cache, outcome = run_job(self._home, self.cache, job)
            return outcome
        except OrchestraError as error:
            return JobOutcome(job, error=str(error))
        except Exception:  # our bug: it belongs in the log, and the daemon goes on
            import traceback

            trace = traceback.format_exc()
            return JobOutcome(job, error=trace.strip().rpartition("\n")[2], bug=f"internal error: {trace}")

    def _rebuild_cache(self) -> bool:
        """Load the cache from disk, so that a bug in renewing it cannot lose a save."""
        try:
            self.cache = RegistryCache.load(self._home)
        except Exception:  # then the bug is elsewhere, and is logged
            return False
        return True

    def _find_returned(self) -> frozenset[Key]:
        codebases = self.cache.registry.codebases
        return frozenset(key for key in self.cache.absent if not is_absent(self._home, codebases[key]))

    def _count_statuses(self) -> Mapping[str, int]:
        """Count the codebases by status, unless a job comes in."""
        registry, counts = self.cache.registry, Counter[str]()
        for codebase in registry.codebases.values():
            if not self.jobs.empty():
                return {}
            counts[check_staleness(self._home, codebase, registry.owners).status] += 1
        return counts


# ── 33 Daemon ─────────────────────────────────────────────────────────────────

# From a save to a sync:
#
#   1 Compare the paths that had events with the snapshot (`_on_events`,
#     `Watcher.drain`; suspects: `Watcher.recheck`).
#   2 Note in the schedule the codebases that changed (`note_files`, `key_of_change`).
#   3 Make the watcher's next job of what is due, or of the part that has waited longest
#     (`Schedule.take_job`, `_submit`).
#   4 In the worker, run the job, replace the cache and wake the loop (`Worker._work`,
#     `run_job`).
#   5 Take its outcome: suspects and failures go back to the schedule, the rest to the
#     log and to the client that asked (`_finish_job`).
#
# To stop: `_stop` closes the listener and refuses the queued jobs; the running one has
# STOP_PATIENCE to end (`is_done`). The loop thread owns the selector, and with it
# watcher, sockets, signals and timers.

STALENESS_DELAY = 1.0  # seconds without work before the staleness scan
STOP_PATIENCE = 15.0  # seconds a job has to end; launchd's ExitTimeOut is 20
MOST_CHANGED = 100  # keys of one job, which has their codebases in memory twice
RETRY_INTERVAL = 10.0  # seconds until a sync whose error may pass is tried again
MAX_DESCRIPTORS = 10240
SOCKET = ("", "socket")  # stands for the control socket, in the log of problems


def raise_descriptor_limit() -> int:
    """Raise the soft limit on open files (launchd's is 256) and return it."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


# What to sync, and when


def key_of_change(home: str, path: str) -> Key:
    """Return the codebase whose file changed, EVERYTHING, STRAY, or a `prose_key`."""
    suffix, key = os.path.splitext(path)[1], find_layer_key(home, path)
    if key and not key[1] and suffix in (".yaml", ".md"):
        return EVERYTHING
    if suffix == ".md":
        return prose_key(path)
    return key if key and suffix == ".yaml" and is_valid_key(key) else STRAY


class Schedule:
    """What the watcher's next job takes, and when. One of its jobs runs at a time."""

    def __init__(self, home: str, clock: Clock) -> None:
        self.suspects = Suspects(DEBOUNCE_WINDOW, clock)
        self.is_running = False
        self.retry_at: dict[Key, float] = {}
        self._home = home
        self._debouncer = Debouncer(DEBOUNCE_WINDOW, clock)
        self._clock = clock
        self._waiting: dict[Key, tuple[float, Collection[str]]] = {}  # since when, for which suspects
        self._failed: set[Key] = set()  # to be tried again at a rescan
        self._try_failed_at = 0.0

    def note(self, keys: Iterable[Key]) -> None:
        self._debouncer.note(keys)

    def note_files(self, paths: Iterable[str]) -> None:
        self.note(self._keys_of(paths))

    def _keys_of(self, paths: Iterable[str]) -> set[Key]:
        return {key_of_change(self._home, path) for path in paths}

    def note_failed(self) -> None:
        """Note what failed, at a rescan; if those are frequent, only now and then."""
        now = self._clock()
        if self._failed and now >= self._try_failed_at:
            self._debouncer.note(self._failed)
            self._failed.clear()
            self._try_failed_at = now + RESCAN_INTERVAL / 2

    def next_due(self) -> Optional[float]:
        """Return when `take_job` will have something to do, in the clock's seconds."""
        times = [*self.retry_at.values(), self.suspects.next_due()]
        if not self.is_running:
            times.append(self._debouncer.next_due())
        return min((at for at in times if at is not None), default=None)

    def take_job(self) -> Optional[SyncJob]:
        now = self._clock()
        self._debouncer.note(key for key, at in self.retry_at.items() if at <= now)
        self.retry_at = {key: at for key, at in self.retry_at.items() if at > now}
        self.note_files(self.suspects.take_due())
        changed: set[Key] = set() if self.is_running else self._debouncer.take_due(MOST_CHANGED)
        if EVERYTHING in changed:
            changed |= self._debouncer.take_due()
        if not changed:
            return None
        self.is_running = True
        target = SyncTarget.all() if EVERYTHING in changed else SyncTarget(())
        overdue, late = self.suspects.find_overdue(), self._find_waiting(MAX_WINDOWS)
        return SyncJob(target, Source.WATCHER, None, frozenset(changed), overdue, late)

    def _find_waiting(self, windows: int) -> set[Key]:
        """Find the codebases that have been in doubt for some windows."""
        until = self._clock() - windows * DEBOUNCE_WINDOW
        return {key for key, (since, _) in self._waiting.items() if since <= until}

    @property
    def problems(self) -> list[Problem]:
        """Describe what keeps codebases in doubt for longer than a save takes."""
        files = {path for key in self._find_waiting(3) for path in self._waiting[key][1]}
        text = "a program keeps writing it or its folder; codebases that use it are synced up to {:g} s late"
        most = MAX_WINDOWS * DEBOUNCE_WINDOW
        return [Problem(shorten_home(self._home, path), text.format(most)) for path in sorted(files)]

    def finish(self, outcome: JobOutcome) -> None:
        """Take the suspects and the failures of a job, whatever its source."""
        job = outcome.job
        if job.source == Source.WATCHER:
            self.is_running = False
        if outcome.error and job.source in (Source.WATCHER, Source.START):
            self._failed |= job.changed or {EVERYTHING}
        looked_at = [path for path in self.suspects if {EVERYTHING, *self._keys_of([path])} & job.changed]
        self.suspects.discard(path for path in looked_at if path not in outcome.suspects)
        self.suspects.add(outcome.suspects)
        self._debouncer.end_window(self._keys_of(outcome.suspects))
        self._debouncer.note(outcome.found)
        now = self._clock()
        self._note_waiting(outcome, now)
        for result in outcome.results:
            if not result.retry:
                self.retry_at.pop(result.key, None)
            else:
                self.retry_at.setdefault(result.key, now + RETRY_INTERVAL)
            self._failed.discard(result.key)
            if result.has_files_aside or result.errors:
                self._failed.add(result.key)  # a folder may come back, a lock be free

    def _note_waiting(self, outcome: JobOutcome, now: float) -> None:
        """Note which codebases are in doubt, and since when, unless a job failed."""
        if outcome.error:
            return
        looked_at = {*outcome.job.changed, *(result.key for result in outcome.results)}
        before, is_all = self._waiting, EVERYTHING in looked_at
        self._waiting = {key: wait for key, wait in before.items() if not is_all and key not in looked_at}
        for key, files in outcome.in_doubt.items():
            self._waiting[key] = before.get(key, (now, ()))[0], files


# What is logged


class JobLog:
    """Logs what jobs did, and each problem once while it lasts."""

    def __init__(self, log: Log, notify: Callable[[str], None]) -> None:
        self._log = log
        self._notify = notify
        self._logged: dict[Key, Sequence[Problem]] = {}
        self._noted: dict[Key, Sequence[Problem]] = {}

    def write(self, outcome: JobOutcome) -> None:
        """Log what became of a job, and notify of replaced text and of problems."""
        if outcome.bug:
            self._log.warning("job failed", source="bug", error=outcome.bug)
        for result in outcome.results:
            for file in result.files:
                place = f"{label_for(result.key)}: {file.path}"
                if file.action in Action.BACKED_UP:
                    self._log.warning("replaced hand-written text", file=place, note=file.note)
                    self._notify(f"{place}: hand-written text was replaced; {file.note}")
                elif file.is_foreign:
                    self._log.warning("left alone", file=place, note=file.note)
        summary, absent = outcome.summary, sum(result.is_absent for result in outcome.results)
        if outcome.error:
            self._log.warning("job failed", source=outcome.job.source, error=outcome.error)
        elif outcome.statuses:
            self._log.info("staleness", **outcome.statuses)
        elif summary and (summary.written or summary.errors or not outcome.suspects):
            self._log.info(
                "synced",
                target=summary.target,
                source=summary.source,
                codebases=len(summary.codebases),
                written=summary.written,
                unchanged=summary.unchanged,
                errors=len(summary.errors),
                ms=summary.duration_ms,
                **({"absent": absent} if absent else {}),
            )
            self.write_problems({STRAY: outcome.stray, **{r.key: r.errors for r in outcome.results}})
            for note in self._take_new(self._noted, {r.key: r.remarks for r in outcome.results}):
                self._log.info("note", text=note)

    @staticmethod
    def _take_new(known: dict[Key, Sequence[Problem]], found: Mapping[Key, Sequence[Problem]]) -> list[Problem]:
        """Update `known` by what some codebases have; return what none had before."""
        before = set(itertools.chain.from_iterable(known.values()))
        known.update(found)
        for key in [key for key, problems in found.items() if not problems]:
            del known[key]
        return [p for p in dict.fromkeys(itertools.chain.from_iterable(found.values())) if p not in before]

    def write_problems(self, found: Mapping[Key, Sequence[Problem]]) -> None:
        """Log the problems that some codebases have now and none had before."""
        new = self._take_new(self._logged, found)
        for problem in new[:MAX_LOGGED_ERRORS]:
            self._log.warning("problem", error=problem)
            self._notify(str(problem))
        if len(new) > MAX_LOGGED_ERRORS:
            self._log.warning("more problems", count=len(new) - MAX_LOGGED_ERRORS)


# Replaced text

# Where the daemon replaced hand-written text, `daemon status` reports it for a day, or
# until the codebase is restored or synced by hand. The notes are kept in a file per
# codebase, so that they outlast the daemon and commands can remove them.

REPLACED_KEPT = 86_400  # seconds


def forget_replaced(home: str, keys: Iterable[Key]) -> None:
    """Remove the notes of codebases that the user has dealt with; raises IoError."""
    if os.path.isdir(replaced_root(home)):
        for key in keys:
            remove_private(replaced_path(home, key))


def load_replaced(home: str, key: Key, now: float) -> dict[str, str]:
    """Load a codebase's notes by path; remove them if they are too old, or damaged."""
    with suppress(IoError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        value = parse_object(read_disk(replaced_path(home, key)).data)
        if now - float(value["at"]) < REPLACED_KEPT:
            return {str(path): str(note) for path, note in value["notes"].items()}
    with suppress(IoError):
        forget_replaced(home, [key])
    return {}


def note_replaced(home: str, key: Key, notes: Mapping[str, str], now: float) -> None:
    data = json.dumps({"at": now, "notes": {**load_replaced(home, key, now), **notes}}).encode()
    with suppress(IoError):  # the log has it
        save_private(replaced_path(home, key), data, new_token(), durable=False)


def replaced_problems(home: str, keys: Container[Key], now: float) -> list[Problem]:
    """List what is noted of some codebases, and remove what is too old of any."""
    problems = []
    for key in keys_below(replaced_root(home), ".json"):
        for path, note in load_replaced(home, key, now).items():
            if key in keys:
                problems.append(Problem(f"{label_for(key)}: {path}", f"hand-written text was replaced; {note}"))
    return sorted(problems)


# The loop


class Daemon:
    """The one process that keeps all codebases in sync. `run` it, or turn it by `step`.

    The constructor takes the lock and opens the rest; it raises DaemonError and
    RegistryError.
    """

    STOPPING = "daemon: expected to sync, but it is stopping"

    def __init__(self, home: str, environ: Mapping[str, str] = os.environ, clock: Clock = time.time) -> None:
        import selectors
        import socket

        self.home = home
        self._clock = time.monotonic
        self._wall_clock = clock
        self._started_at = int(clock())
        self._schedule = Schedule(home, self._clock)
        self._staleness_at: Optional[float] = None
        self._is_stopping = False
        self._stop_by = 0.0
        # The last status, as `_gather_status` found it, and its replies, pretty or not.
        self._told: tuple[Optional[RegistryCache], list[Any], dict[bool, bytes]] = (None, [], {})
        with ExitStack() as opened:
            self._socket = DaemonSocket(home, self._started_at)
            opened.callback(self._socket.close)
            limit = raise_descriptor_limit()
            self._log = Log(home)
            opened.callback(self._log.close)
            self._notifier = Notifier(notify_path(home), self._log.warning, self._clock)
            opened.callback(self._notifier.close)
            self._job_log = JobLog(self._log, self._notifier.add)
            with blame(projects_root(home)):
                make_private_folder(projects_root(home))
            self._selector = opened.enter_context(selectors.DefaultSelector())
            backend = open_backend(environ.get("ORCHESTRA_WATCHER", ""), limit)
            opened.callback(backend.close)
            self._watcher = Watcher(home, backend)
            self._watcher.look()
            if backend.fileno() >= 0:
                self._selector.register(backend, READABLE, self._on_events)
            self._wake_in, self._wake_out = socket.socketpair()
            for end in (self._wake_in, self._wake_out):
                opened.enter_context(end).setblocking(False)
            self._selector.register(self._wake_out, READABLE, self._on_wake)
            self._worker = Worker(home, RegistryCache.load(home), self._wake)
            max_clients = max(4, min(MAX_CLIENTS, limit - 32))
            self._server = SocketServer(self._selector, self.handle_request, max_clients)
            opened.callback(self._server.close)
            self._server.listen(self._socket.bind())
            self._rescan_at = self._clock() + self._watcher.interval
            self._worker.thread.start()
            self._worker.submit(SyncJob(SyncTarget.all(), Source.START))
            self._log.info("started", pid=os.getpid(), version=__version__, watcher=backend.name)
            self._opened = opened.pop_all()

    def close(self) -> None:
        self._opened.close()

    def run(self) -> int:
        """Serve until `stop`, SIGINT or SIGTERM; return the exit status."""
        with self._opened:
            self._install_signals()
            sys.setswitchinterval(0.001)  # seconds that the loop waits for the worker
            while not self.is_done:
                self.step()
            self._log.info("stopped", pid=os.getpid())
        return 0

    @property
    def is_done(self) -> bool:
        if not self._is_stopping:
            return False
        has_ended = not self._worker.thread.is_alive() and not self._worker.outcomes
        # A job that is cut short leaves each file old or new.
        return has_ended or self._clock() >= self._stop_by

    def step(self, timeout: Optional[float] = None) -> None:
        """Wait for what comes next, at most `timeout` seconds, and do it."""
        left = self._time_left()
        for key, mask in self._selector.select(left if timeout is None else min(left, timeout)):
            key.data(mask)
        if left <= 0 and not self._is_stopping:
            self._do_due()

    def _time_left(self) -> float:
        """Return in how many seconds `_do_due` will have something to do."""
        if self._is_stopping:
            return 0.05  # the worker ends a moment after its last wake-up
        deadlines = [
            self._rescan_at,
            self._staleness_at,
            self._watcher.suspects.next_due(),
            self._schedule.next_due(),
            self._server.next_expiry(),
            self._notifier.next_due(),
        ]
        return max(0.0, min(at for at in deadlines if at is not None) - self._clock())

    def _do_due(self) -> None:
        """Look where it is time to, drop silent clients, and submit the next job."""
        now = self._clock()
        if now >= self._rescan_at:
            self._check_socket()
            self._schedule.note_files(self._watcher.look())
            self._schedule.note_failed()
            if self._worker.cache.absent and self._worker.jobs.empty():
                self._worker.submit(SyncJob(SyncTarget(()), Source.ABSENT))
            self._rescan_at = now + self._watcher.interval
        self._schedule.note_files(self._watcher.recheck())
        self._server.drop_silent()
        self._notifier.step()
        job = self._schedule.take_job()
        if job is None and self._staleness_at is not None and now >= self._staleness_at:
            job = SyncJob(SyncTarget(()), Source.STALENESS)
        if job is not None:
            self._submit(job)

    def _submit(self, job: SyncJob) -> bool:
        # The end of this job sets it again, or the end of those that fill the queue.
        self._staleness_at = None
        return self._worker.submit(job)

    # What wakes it

    def _on_events(self, mask: int) -> None:
        self._schedule.note_files(self._watcher.drain())
        self._check_socket()
        if self._watcher.must_poll:
            self._rescan_at = min(self._rescan_at, self._clock() + self._watcher.interval)

    def _check_socket(self) -> None:
        """Stop if the lock file was removed; bind the socket again if that was."""
        if not self._socket.has_lock:
            self._stop("the lock file was removed")
        if self._is_stopping or self._socket.is_bound:
            return
        path = socket_path(self.home)
        try:
            self._server.listen(self._socket.bind())
        except DaemonError as error:
            self._job_log.write_problems({SOCKET: [Problem(path, f"could not recreate it: {error}")]})
        else:
            self._job_log.write_problems({SOCKET: []})
            self._log.warning("recreated the missing socket", socket=path)

    def _wake(self) -> None:
        with suppress(OSError):  # it has plenty of reasons to wake already, or is gone
            self._wake_in.send(b"\0")

    def _on_wake(self, mask: int) -> None:
        import signal

        try:
            numbers = self._wake_out.recv(4096)
        except BlockingIOError:
            return
        if signal.SIGHUP in numbers and not self._is_stopping:
            self._log.info("rescanning everything", reason="SIGHUP")
            self._watcher.look()
            self._schedule.note([EVERYTHING])
        for number in (signal.SIGINT, signal.SIGTERM):
            if number in numbers:
                self._stop(signal.Signals(number).name)
        while self._worker.outcomes:
            self._finish_job(self._worker.outcomes.popleft())

    def _install_signals(self) -> None:
        import signal

        signal.set_wakeup_fd(self._wake_in.fileno(), warn_on_full_buffer=False)
        self._opened.callback(signal.set_wakeup_fd, -1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, frame: None)

    def _finish_job(self, outcome: JobOutcome) -> None:
        job = outcome.job
        self._told = None, [], {}  # or it would keep the previous registry in memory
        self._schedule.finish(outcome)
        for result in outcome.results:
            if job.source == Source.SOCKET:
                with suppress(IoError):
                    forget_replaced(self.home, [result.key])
            notes = {file.path: file.note for file in result.files if file.action in Action.BACKED_UP}
            if notes:
                note_replaced(self.home, result.key, notes, self._wall_clock())
        self._job_log.write(outcome)  # before the reply, so that the client finds it
        if job.respond_to:
            job.respond_to(outcome)
        if job.source not in (Source.STALENESS, Source.ABSENT):
            self._staleness_at = self._clock() + STALENESS_DELAY

    # Requests

    def handle_request(self, request: Request, client: Client) -> None:
        if request.cmd == "status":
            client.unsent += self._encode_status(request.pretty)
        elif request.cmd == "stop":
            client.unsent += encode_reply({"stopping": True})
            self._stop("socket")
        else:
            self._handle_sync(request, client)

    def _handle_sync(self, request: Request, client: Client) -> None:
        if self._is_stopping:
            raise ProtocolError(self.STOPPING)
        target = SyncTarget.all() if request.codebase is None else SyncTarget.codebase(request.codebase)
        job = SyncJob(target, Source.SOCKET, lambda outcome: self._server.reply(client, outcome.encode()))
        if not self._submit(job):
            raise ProtocolError(f"the daemon's queue is full ({QUEUE_SIZE} jobs): try again")
        client.state = Client.WAITING

    def _gather_status(self) -> tuple[RegistryCache, list[Problem], int]:
        """Gather what changes in a status: the cache, other problems, the queue."""
        cache = self._worker.cache
        replaced = replaced_problems(self.home, cache.names, self._wall_clock())
        return cache, [*self._schedule.problems, *replaced], self._worker.jobs.qsize()

    def _encode_status(self, pretty: bool = False) -> bytes:
        """Encode the status, or return the last reply if nothing has changed."""
        cache, *rest = found = self._gather_status()
        if self._told[0] is not cache or self._told[1] != rest:
            self._told = cache, rest, {}
        replies = self._told[2]
        if pretty not in replies:
            replies[pretty] = encode_reply(self._describe(*found), pretty)
        return replies[pretty]

    def status(self) -> dict[str, Any]:
        return self._describe(*self._gather_status())

    def _describe(self, cache: RegistryCache, others: list[Problem], queue_depth: int) -> dict[str, Any]:
        problems = [*cache.problems, *others]
        return {
            "running": True,
            "label": DAEMON_LABEL,
            "started_at_unix": self._started_at,
            "codebase_count": len(cache.names),
            "codebases": sorted(cache.names.values()),
            "socket": socket_path(self.home),
            "projects_root": projects_root(self.home),
            "version": __version__,
            "pid": os.getpid(),
            "watcher": self._watcher.backend.name,
            "last_sync_at_unix": cache.last_sync_at,
            "queue_depth": queue_depth,
            "problems": [{"where": p.where, "message": p.message} for p in problems],
            "absent": sorted(cache.names[key] for key in cache.absent),
        }

    def _stop(self, reason: str) -> None:
        if self._is_stopping:
            return
        self._is_stopping = True
        self._stop_by = self._clock() + STOP_PATIENCE
        self._log.info("stopping", reason=reason)
        self._server.stop_listening()
        for job in self._worker.finish():
            if job.respond_to:
                job.respond_to(JobOutcome(job, error=self.STOPPING))


def start_blocking(home: str, environ: Mapping[str, str] = os.environ) -> int:
    """Run the daemon until it is stopped; raises DaemonError, RegistryError."""
    return Daemon(home, environ).run()


# ══ V Program ═════════════════════════════════════════════════════════════════

# ── 34 Installing ─────────────────────────────────────────────────────────────

# What is installed is the running script, which so is known to run, for a Python that
# was tried. PyYAML is made as a whole or not at all.

# The program and PyYAML

PYTHON_TIMEOUT = 60.0  # seconds for a Python to show that it works
PIP_TIMEOUT = 300.0  # seconds
PYYAML_VERSION = "6.0.3"
# The SHA-256 of its wheels on PyPI, as `uv pip compile --generate-hashes` lists them.
# Per Python, 3.9 to 3.14 and 3.14t, they are those of macOS x86-64 and ARM64, Linux
# with glibc ARM64 and x86-64, with musl ARM64 and x86-64. The source is left out, since
# building it would run what pip fetches without a check, setuptools and Cython.
PYYAML_HASHES = """
b865addae83924361678b652338317d1bd7e79b1f4596f96b96c77a5a34b34da
c3355370a2c156cffb25e876646f149d5d68f5e0a3ce86a5084dd0b64a994917
3c5677e12444c15717b902a5798264fa7909e41153cdf9ef7ad571b704a63dd9
0150219816b6a1fa26fb4699fb7daa9caf09eb1999f3b70fb6e786805e80375a
fa160448684b4e94d80416c0fa4aac48967a969efe22931448d853ada8baf926
27c0abcb4a5dac13684a37f76e701e054692a9b2d3064b70f5e4eb54810553d7
214ed4befebe12df36bcc8bc2b64b396ca31be9304b8f59e25c11cf94a4c033b
02ea2dfa234451bbb8772601d7b8e426c2bfa197136796224e50e35a78777956
b30236e45cf30d2b8e7b3e85881719e98507abed1011bf463a8fa23e9c3e98a8
9c7708761fccb9397fe64bbc0395abcae8c4bf7b0eac081e12b809bf47700d0b
418cf3f2111bc80e0933b2cd8cd04f286338bb88bdc7bc8e6dd775ebde60b5e0
5e0b74767e5f8c593e8c9b5912019159ed0533c70051e9cce3e8b6aa699fcd69
44edc647873928551a01e7a563d7452ccdebee747728c1080d881d68af7b997e
652cb6edd41e718550aad172851962662ff2681490a8a711af6a4d288dd96824
10892704fc220243f5305762e276552a0395f7beb4dbf9b14ec8fd43b57f126c
b8bb0864c5a28024fac8a632c443c87c5aa6f215c0b126c449ae1a150412f31d
1d37d57ad971609cf3c53ba6a7e365e40660e3be0e5175fa9f2365a379d6095a
37503bfbfc9d2c40b344d06b2199cf0e96e97957ab1c1b546fd4f87e53e5d3e4
7f047e29dcae44602496db43be01ad42fc6f1cc0d8cd6c83d342306c32270196
fc09d0aa354569bc501d4e787133afc08552722d3ab34836a80547331bb5d4a0
9149cad251584d5fb4981be1ecde53a1ca46c891a79788c0df828d2f166bda28
ba1cc08a7ccde2d2ec775841541641e4548226580ab850948cbfda66a1befcdc
8dc52c23056b9ddd46818a57b78404882310fb473d63f17b07d5c40421e47f8e
41715c910c881bc081f1e8872880d3c650acf13dfa8214bad49ed4cede7c34ea
8da9669d359f02c0b91ccc01cac4a67f16afec0dac22c2ad09f46bee0697eba8
2283a07e2c21a2aa78d9c4442724ec1eb15f5e42a723b99cb3d822d48f5f7ad1
ee2922902c45ae8ccada2c5b501ab86c36525b883eff4255313a253a3160861c
0f29edc409a6392443abf94b9cf89ce99889a1dd5376d94316ae5145dfedd5d6
f7057c9a337546edc7973c0d3ba84ddcdf0daa14533c2065749c9075001090e6
eda16858a3cab07b80edaf74336ece1f986ba330fdb8ee0d6c0d68fe82bc96be
8d1fab6bb153a416f9aeb4b8763bc0f22a5586065f86f7664fc23339fc1c1fac
34d5fcd24b8445fadc33f9cf348c1047101756fd760b4dacb5c3e99755703310
501a031947e3a9025ed4405a168e6ef5ae3126c59f90ce0cd6f2bfc477be31b7
c458b6d084f9b935061bc36216e8a69a7e293a2f1e68bf956dcd9e6cbcd143f5
7c6610def4f163542a622a73fb39f534f8c101d690126992300bf3207eab9764
5190d403f121660ce8d1d2c1bb2ef1bd05b5f68533fc5c2ea899bd15f4399b35
02893d100e99e03eda1c8fd5c441d8c60103fd175728e23e431db1b589cf5ab3
c1ff362665ae507275af2853520967820d9124984e0f7466736aea23d8611fba
6adc77889b628398debc7b65c073bcb99c4a0237b248cacaf3fe8a557563ef6c
00c4bdeba853cc34e7dd471f16b4114f4162dc03e6b7afcc2128711f0eca823c
66e1674c3ef6f541c35191caae2d429b967b99e02040f5ba928632d9a7f0f065
16249ee61e95f858e83976573de0f5b2893b3677ba71c9dd36b9cf8be9ac6d65
"""

# What installs PyYAML where there is no pip.
SYSTEM_PACKAGES = {
    "/usr/bin/apt": "sudo apt install python3-yaml",
    "/usr/bin/dnf": "sudo dnf install python3-pyyaml",
    "/usr/bin/pacman": "sudo pacman -S python-yaml",
    "/sbin/apk": "sudo apk add py3-yaml",
}


def stable_python_path(python: str, exists: Callable[[str], bool] = os.path.exists) -> str:
    """Name Homebrew's or uv's Python by a link: an upgrade removes its own folder."""
    homebrew = r"(.*)/Cellar/(python@[\d.]+)/[^/]+/(?:.*/)?(bin/[^/]+)$", r"\1/opt/\2/\3"
    uv = r"(.*/cpython-\d+\.\d+)\.\d+(-[^/]+/bin/[^/]+)$", r"\1\2"  # its "minor version link"
    stable = re.sub(*uv, re.sub(*homebrew, python))
    return stable if exists(stable) else python


# What ~/.orchestra/bin/orchestra is made of. It imports the installed script, but for
# `daemon status`, which scripts poll, it first tries a copy of `print_status`.
LAUNCHER = """\
import posix, sys

{print_status}
if sys.argv[1:] == ["daemon", "status"]:
    home = posix.environ.get(b"HOME", b"")
    if home[:1] == b"/" and print_status(home + b"/.orchestra/daemon.sock", b"{version}"):
        sys.exit()
import os
sys.path.insert(0, os.path.realpath(__file__ + "/{lib}"))
{packages}
import orchestra
sys.exit(orchestra.main())
"""


class Installer(NamedTuple):
    """Installs the running script for this user, and PyYAML for its Python.

    All methods raise OrchestraError. `say` is called before something slow.
    """

    home: str
    environ: Mapping[str, str] = os.environ
    say: Callable[[str], None] = lambda text: None
    run: Runner = run_program

    def ensure_yaml(self) -> None:
        """Make PyYAML importable: Python's own, or a copy fetched on the first run."""
        if find_yaml():
            return
        lib = python_lib_dir(self.home)
        sys.path.append(lib)
        if sys.flags.no_site and not find_yaml():
            import site

            site.main()  # PyYAML is no longer where the launcher says
        if not find_yaml():
            import importlib

            self.fetch_yaml(sys.executable)
            importlib.invalidate_caches()  # slow: it loads importlib.metadata
        if not find_yaml():
            raise OrchestraError(f"the PyYAML in {lib} cannot be imported", f"rm -r {typed(lib)}")

    def fetch_yaml(self, python: str) -> None:
        """Install PyYAML below ~/.orchestra/lib with pip, as a whole or not at all."""
        lib = python_lib_dir(self.home)
        hint = f"{typed(python)} -m pip install PyYAML, or your system's package of it (python3-yaml)"
        if os.path.isdir(f"{lib}/yaml"):
            return
        if self.environ.get("ORCHESTRA_NO_FETCH"):
            raise OrchestraError(f"PyYAML is missing from {python}, and ORCHESTRA_NO_FETCH is set", hint)

        def fetch(folder: str, token: str) -> None:
            self.say(f"orchestra: fetching PyYAML into {shorten_home(self.home, lib)}")
            done = self._run_pip(python, folder, token)
            if done.code or not os.path.isdir(f"{folder}/yaml"):
                problem, other_hint = self._explain_pip(done, hint)
                raise OrchestraError(f"could not fetch PyYAML: {problem}", other_hint)

        self._make_lib(fetch)

    def _make_lib(self, fill: Callable[[str, str], None]) -> None:
        """Make the folder of PyYAML as a whole or not at all, unless it is there.

        `fill` is called with a folder beside it, and the token for temporary names.
        """
        lib = python_lib_dir(self.home)
        temporary = f"{lib}.new"
        with Lock(f"{run_dir(self.home)}/pip.lock", timeout=PIP_TIMEOUT) as lock:
            if os.path.isdir(f"{lib}/yaml"):
                return  # another first run has just made it
            remove_private_folder(temporary)  # a killed run left it
            try:
                fill(temporary, lock.token)
                remove_private_folder(lib)
                move_private(temporary, lib)
            finally:
                remove_private_folder(temporary)

    def _run_pip(self, python: str, target: str, token: str) -> Completed:
        """Run pip; externally managed Pythons (PEP 668) allow `--target` too."""
        requirements = f"{run_dir(self.home)}/pyyaml.txt"
        hashes = "".join(f" --hash=sha256:{digest}" for digest in PYYAML_HASHES.split())
        # pip refuses --target together with these two settings.
        argv = ["/usr/bin/env", "PIP_USER=0", "PIP_REQUIRE_VIRTUALENV=0", python, "-m", "pip", "install"]
        argv += ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--target", target]
        argv += ["--require-hashes", "--only-binary", ":all:", "--requirement", requirements]
        try:
            text = f"PyYAML=={PYYAML_VERSION}{hashes}\n"
            save_private(requirements, text.encode(), token, durable=False)
            # `python -m pip` would run a pip.py in its current folder.
            return self.run(argv, PIP_TIMEOUT, folder=run_dir(self.home))
        finally:
            remove_private(requirements)

    def _explain_pip(self, done: Completed, hint: str) -> tuple[str, str]:
        """Return why pip failed, and the way out: for most causes `hint`."""
        packagers = (command for tool, command in SYSTEM_PACKAGES.items() if os.path.exists(tool))
        package = next(packagers, "install your system's package of PyYAML")
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        offline = "NewConnectionError|Connection refused|name resolution|Failed to establish"
        causes = {
            "No module named pip": ("pip is missing", package),
            offline: ("no connection to the package index", f"again when you are online, or {package}"),
            "DO NOT MATCH": (f"pip found another file than the published one of version {PYYAML_VERSION}", hint),
            "No matching dist": (f"no wheel of PyYAML {PYYAML_VERSION} for Python {version}", hint),
        }
        found = (cause for sign, cause in causes.items() if re.search(sign, done.output))
        return next(found, (done.last_line, hint))

    def choose_python(self) -> str:
        """Choose the Python to install for: one that lasts, and that works."""
        candidates = [sys.executable]
        if sys.prefix != sys.base_prefix:
            # A virtual environment (uv run and pipx run make one) may be gone tomorrow.
            version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
            candidates.insert(0, os.path.join(sys.base_prefix, "bin", version))
        check = "import sys; sys.exit(sys.version_info < (3, 9))"
        for python in map(stable_python_path, candidates):
            if self.run([python, "-I", "-c", check], PYTHON_TIMEOUT).code == 0:
                return python
        raise UsageError(f"found no working Python (tried {' and '.join(candidates)})")

    def install(self) -> str:
        """Install the running script and PyYAML; return the executable's path."""
        python = self.choose_python()
        packages = self._find_packages(python)
        if not packages:
            self._copy_yaml(find_yaml() or "")
            self.fetch_yaml(python)
        return self.install_program(python, os.path.abspath(__file__), packages)

    def _find_packages(self, python: str) -> str:
        """Return the folder from which a Python imports PyYAML, as a literal, or ""."""
        code = "import yaml, os; print('\\n' + ascii(os.path.dirname(os.path.dirname(yaml.__file__))))"
        done = self.run([python, "-I", "-c", code], PYTHON_TIMEOUT)
        found = re.search(r"(?m)^(['\"])/.*\1$", done.output)  # beside what .pth files say
        return found[0] if found and done.code == 0 else ""

    def _copy_yaml(self, module: str) -> None:
        """Copy the PyYAML of the running Python, whose folder (pipx's) may not last."""
        package, name = os.path.split(module)
        if name != "__init__.py" or os.path.isdir(f"{python_lib_dir(self.home)}/yaml"):
            return

        def copy(lib: str, token: str) -> None:
            for path in files_below(package):
                save_private(f"{lib}/yaml{path[len(package) :]}", read_disk(path).data, token)

        self._make_lib(copy)

    def install_program(self, python: str, script: str, packages: str = "") -> str:
        """Copy the script to ~/.orchestra/lib, and make an executable that imports it.

        Imported, the script is compiled once; run directly, at every start.
        """
        disk = read_disk(real_path(script))
        if disk.kind != "file":
            raise UsageError(f"{script}: the running script is not a file", "save it to a file first")
        installed, binary = installed_script_path(self.home), binary_path(self.home)
        save_private(installed, disk.data, new_token())
        # Python matches bytecode to its source by size and time, in whole seconds: it
        # would run the old one after a quick upgrade of the same size.
        remove_private_folder(f"{os.path.dirname(installed)}/__pycache__")
        save_private(binary, os.fsencode(self._launcher(python, packages)), new_token(), mode=0o700)
        return binary

    def _launcher(self, python: str, packages: str) -> str:
        """Write a program that runs the installed script, whatever the environment.

        It finds the script from its own path, through links, so that the home folder
        may be renamed. It runs without `site`, which may take longer than Orchestra (25
        of 45 ms where packages have .pth files). So it adds the folder that has PyYAML
        itself, if Python is still the one that the folder is for.
        """
        lib = os.path.relpath(os.path.dirname(installed_script_path(self.home)), binary_path(self.home))
        import inspect

        packages = f"if sys.version_info[:2] == {sys.version_info[:2]}: sys.path.append({packages})" if packages else ""
        program = LAUNCHER.format(
            print_status=inspect.getsource(print_status), version=__version__, lib=lib, packages=packages
        )
        shebang = f"#!{python} -IS\n"
        # Linux allows 127 bytes, and no space; Python would look for an encoding in it.
        if python.isascii() and not re.search(r"\s|coding", python) and len(shebang) <= 127:
            return shebang + program
        program = typed(f"import sys; __file__ = sys.argv.pop(1)\n{program}")
        return f'#!/bin/sh\nexec {typed(python)} -IS -c {program} "$0" "$@"\n'

    def check_link(self) -> None:
        """Raise UsageError if the link cannot be made, or is another program's."""
        link = link_path(self.home)
        if os.path.lexists(link) and not self._is_own(link):
            raise UsageError(f"{link} exists, and is not Orchestra's link", "move it away")
        folder = os.path.dirname(link)
        while not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise UsageError(f"{folder} is not a folder that you can write to")

    def _is_own(self, link: str) -> bool:
        """Return whether a link leads to the launcher, or did before a renaming."""
        if not os.path.islink(link) or not os.readlink(link).endswith("/.orchestra/bin/orchestra"):
            return False
        return not os.path.exists(link) or real_path(link) == real_path(binary_path(self.home))

    def make_link(self) -> str:
        """Make or renew the link, and return its path.

        Its target is relative if possible, so that the home folder may be renamed.
        """
        link, binary = link_path(self.home), binary_path(self.home)
        folder = os.path.dirname(link)
        is_in_place = real_path(folder) == real_path(self.home) + folder[len(self.home) :]
        with blame(link):
            make_link(os.path.relpath(binary, folder) if is_in_place else binary, link)
        return link


# ── 35 Services ───────────────────────────────────────────────────────────────

# The daemon in the background: started by launchd or systemd, now and at each login, or
# detached from the terminal. A start has succeeded only when a new daemon answers. A
# new supervisor is a class below Service and the functions that install and uninstall.


class Service:
    """What starts the daemon, and waits for it; this one knows no supervisor.

    All methods raise DaemonError. Times are in seconds.
    """

    SETTLE_TIMEOUT = 30.0  # for a daemon to end, or to start: above launchd's EXIT_TIMEOUT
    STAY_TIME = 1.0  # that a new daemon must last
    PAUSE = 0.05  # between tries
    HINT = "orchestra daemon logs --stderr-only"
    service = label = "daemon"  # its name in full, and in short
    file = ""  # the plist or unit that the supervisor reads
    error: type[DaemonError] = DaemonError

    def __init__(
        self,
        home: str,
        run: Runner = run_program,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.home = home
        self._run = run
        self._clock = clock
        self._sleep = sleep

    def _tries(self, timeout: float) -> Iterator[None]:
        deadline = self._clock() + timeout
        yield
        while self._clock() < deadline:
            self._sleep(self.PAUSE)
            yield

    def wait_until(self, condition: Callable[[], bool], timeout: float = SETTLE_TIMEOUT) -> bool:
        """Return whether the condition became true in time."""
        return any(condition() for _ in self._tries(timeout))

    def daemon_pid(self, version: str = "") -> Optional[int]:
        """Return the pid of the daemon that answers, if any, and has this version."""
        try:
            status = send_request(self.home, {"cmd": "status"})
        except DaemonError:
            return None
        pid: Optional[int] = status.get("pid")
        return pid if version in ("", status.get("version")) else None

    def stop_daemon(self) -> None:
        """Stop a running daemon: it holds the lock that the next one needs."""
        for _ in self._tries(self.SETTLE_TIMEOUT):
            if not is_locked(daemon_lock_path(self.home)):
                return
            with suppress(DaemonError):  # it is ending already, or has too many clients
                request_stop(self.home)
        hint = f"end it{describe_lock_holder(self.home)}"
        raise self.error(f"{socket_path(self.home)}: the running daemon did not stop", hint)

    def has_new_daemon(self, old_pid: Optional[int]) -> bool:
        return self.daemon_pid(__version__) not in (None, old_pid)

    def expect_new_daemon(self, old_pid: Optional[int]) -> None:
        """See that a daemon other than the old one answers, and keeps running."""
        if not self.wait_until(lambda: self.has_new_daemon(old_pid)):
            raise self.failure(f"does not answer on {socket_path(self.home)}")
        pid = self.daemon_pid(__version__)
        self._sleep(self.STAY_TIME)
        if pid in (None, old_pid) or self.daemon_pid() != pid:
            raise self.failure("did not keep running")

    def failure(self, problem: str) -> DaemonError:
        pid = self.daemon_pid()
        other = "" if pid is None else f"; another one does, pid {pid}"
        return self.error(f"{self.service}: the new daemon {problem}{other}", self.HINT)

    def remove_stale_socket(self) -> None:
        try:
            request_status(self.home)
        except DaemonNotRunning:
            remove_private(socket_path(self.home))
        except DaemonError:
            pass  # it runs, but takes no more clients: the socket is its own

    def start_detached(self, start: Callable[[], int]) -> int:
        """Start a daemon that outlives the terminal; return its pid when it answers.

        What it says goes to its logs; if it ends, the error has the log's last lines.
        """
        log = LogReader(stderr_log_path(self.home))
        log.tail(0)

        def work() -> int:
            log_streams(self.home)
            return start()

        pid = start_apart(work)
        for _ in self._tries(self.SETTLE_TIMEOUT):
            if self.daemon_pid() == pid:
                return pid
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended and not status:
                raise self.failure("was stopped at once")
            if ended:
                said = log.read().decode("utf-8", "replace").strip()
                why = re.search(r"(?m)^orchestra: (.*)", said) or ["", said or "it ended at once"]
                raise DaemonError(f"the daemon did not start: {why[1]}", self.HINT)
        raise self.failure("does not answer yet")


# launchd

# An exit status of launchctl proves little (5 means five things), and `bootout` returns
# before the service is gone; so `launchctl print` and the daemon itself are asked.
# Sources: launchd.plist(5), launchctl(1), and issues of tools that use them.
# `install_launchd` takes these steps:
#
#   1 `check_session`: without a desktop session, nothing can be loaded.
#   2 Save the plist; `unload` the old service and `stop_daemon`, if one was started by
#     hand. Both wait for its end.
#   3 Enable the label, since a disabled one is refused, and `load` the plist.
#   4 `start_daemon`: RunAtLoad starts it. Only if it does not answer, `kickstart -k`:
#     that kills one that is still starting, and launchd then waits for 10 s.
#   5 Succeed only if a new daemon of this version answers, and again a second later.
#
# If one of steps 2 to 5 fails, the old plist is put back and loaded again.


class Launchd(Service):
    """The user's launchd, called through launchctl(1), and the daemon that it runs.

    All methods raise LaunchdError. Times are in seconds.
    """

    EXIT_TIMEOUT = 20  # for a service to end; 5 in practice where the plist has none
    CALL_TIMEOUT = 30.0  # above EXIT_TIMEOUT: some calls wait for a service to end
    START_TIMEOUT = 10.0  # for a daemon to answer before it is kickstarted
    PAUSE = 0.5  # between tries
    BUSY = (5, 36, 37)  # exit statuses: input/output error (among others), in progress
    label = DAEMON_LABEL
    error = LaunchdError

    def __init__(self, home: str, platform: str = sys.platform, **options: Any) -> None:
        super().__init__(home, **options)
        self.file = launchd_plist_path(home)
        self.domain = f"gui/{os.getuid()}"
        self.service = f"{self.domain}/{DAEMON_LABEL}"
        self._platform = platform

    def call(self, *arguments: str) -> Completed:
        return self._run(["/bin/launchctl", *arguments], self.CALL_TIMEOUT)

    def _print(self, target: str) -> int:
        done = self.call("print", target)
        if done.code in (TIMED_OUT, NOT_STARTED):
            raise LaunchdError(f"launchctl print: {done.output}")
        return done.code

    def is_loaded(self) -> bool:
        return self._print(self.service) == 0

    def check_platform(self, hint: str) -> None:
        if self._platform != "darwin":
            raise LaunchdError("launchd management is only supported on macOS", hint)

    def check_session(self) -> None:
        """Require macOS with a desktop session. Over ssh there may be none."""
        self.check_platform("orchestra daemon install --systemd")
        code = self._print(self.domain)
        if code:
            problem = f"there is no desktop session (launchctl exit status {code})"
            hint = "log in at the Mac's screen, and run orchestra daemon install there"
            raise LaunchdError(f"{self.domain}: {problem}", hint)

    def unload(self) -> None:
        self.call("bootout", self.service)
        if not self.wait_until(lambda: not self.is_loaded()):
            raise LaunchdError(f"{self.service}: still loaded after {self.SETTLE_TIMEOUT:g} s")

    def load(self) -> None:
        for _ in self._tries(self.SETTLE_TIMEOUT):
            code, output = self.call("bootstrap", self.domain, self.file)
            if code == 0 or self.is_loaded():
                return
            if code not in self.BUSY:
                break
        raise LaunchdError(f"launchctl bootstrap: {self.file}: exit status {code}: {output}")

    def start_daemon(self, old_pid: Optional[int]) -> None:
        """Wait for a daemon other than the old one, and see that it stays."""
        if not self.wait_until(lambda: self.has_new_daemon(old_pid), self.START_TIMEOUT):
            self.call("kickstart", "-k", self.service)
        self.expect_new_daemon(old_pid)


def generate_plist(binary_path: str, log_dir: str) -> bytes:
    """Write the service's launchd.plist(5).

    Raises LaunchdError for paths that XML cannot hold.
    """
    import plistlib
    from xml.parsers.expat import ExpatError

    values = {
        "Label": DAEMON_LABEL,
        "ProgramArguments": [binary_path, "daemon", "start"],
        "RunAtLoad": True,
        "KeepAlive": True,
        "StandardOutPath": os.path.join(log_dir, DAEMON_STDOUT_LOG),
        "StandardErrorPath": os.path.join(log_dir, DAEMON_STDERR_LOG),
        "SoftResourceLimits": {"NumberOfFiles": MAX_DESCRIPTORS},  # the default is 256
        "ExitTimeOut": Launchd.EXIT_TIMEOUT,
    }
    try:
        data = plistlib.dumps(values)
        if plistlib.loads(data) != values:
            raise ValueError("a line end that XML changes")
        return data
    except (ValueError, ExpatError) as error:
        problem = f"{binary_path!r}: expected a path that a property list can hold, got: {error}"
        raise LaunchdError(problem) from None


def install_launchd(launchd: Launchd, binary: str) -> None:
    """Have launchd run the daemon from now on.

    Raises LaunchdError or IoError; the old plist is then back.
    """
    home, plist = launchd.home, launchd.file
    launchd.check_session()
    new = generate_plist(binary, logs_dir(home))
    with blame(plist):
        make_folders(os.path.dirname(plist))
        make_private_folder(logs_dir(home))
        make_private_folder(run_dir(home))
        old = read_disk(plist)
    old_pid = launchd.daemon_pid()
    save_private(plist, new, new_token())
    try:
        launchd.unload()
        launchd.stop_daemon()
        launchd.call("enable", launchd.service)
        launchd.load()
        launchd.start_daemon(old_pid)
    except DaemonError:
        if old.kind == "file":
            save_private(plist, old.data, new_token())
        else:
            remove_private(plist)
        with suppress(LaunchdError):  # the first error is the one to report
            launchd.unload()
            if old.kind == "file":
                launchd.load()
        raise


def uninstall_launchd(launchd: Launchd) -> bool:
    """Have launchd no longer run the daemon; return whether it did.

    Raises LaunchdError, IoError.
    """
    launchd.check_platform("orchestra daemon uninstall --systemd, or orchestra daemon stop")
    was_installed = os.path.lexists(launchd.file) or launchd.is_loaded()
    if was_installed:
        launchd.unload()
        remove_private(launchd.file)
    launchd.remove_stale_socket()
    return was_installed


# systemd

# `install_systemd` takes these steps:
#
#   1 `check_manager`: without a manager of the user's own, nothing can be started.
#   2 Save the unit; `stop_daemon`, if one runs. It ends well, so that it is not
#     restarted.
#   3 `start_daemon`: reload, enable, restart, and succeed only if a new daemon of this
#     version answers on the socket, and again a second later.
#
# If step 2 or 3 fails, the old unit is put back and started again.


class Systemd(Service):
    """The user's systemd, called through systemctl(1), and the daemon that it runs.

    All methods raise SystemdError.
    """

    service = label = "orchestra.service"
    CALL_TIMEOUT = 60.0  # seconds: above the unit's TimeoutStopSec
    UP = ("initializing", "starting", "running", "degraded", "maintenance")
    error = SystemdError

    def __init__(self, home: str, **options: Any) -> None:
        super().__init__(home, **options)
        self.file = systemd_unit_path(home)

    def call(self, *arguments: str) -> Completed:
        return self._run(["systemctl", "--user", *arguments], self.CALL_TIMEOUT)

    def require(self, *arguments: str) -> None:
        done = self.call(*arguments)
        if done.code:
            raise SystemdError(f"systemctl --user {arguments[0]}: {done.last_line}")

    def check_manager(self) -> None:
        """Require a user manager: most containers, and sessions by su, have none."""
        state = self.call("is-system-running").last_line
        if state not in self.UP:
            problem = f"no user manager is running (systemctl: {state})"
            raise SystemdError(problem, "orchestra daemon start --detach")

    def start_daemon(self, old_pid: Optional[int]) -> None:
        self.require("daemon-reload")
        self.require("enable", self.file)  # by its path: systemd may look elsewhere (XDG_CONFIG_HOME)
        self.require("restart", self.label)
        self.expect_new_daemon(old_pid)

    def forget(self) -> None:
        """Stop and disable the service, and remove its unit, manager or not."""
        self.call("disable", "--now", self.label)
        remove_private(self.file)
        remove_private(f"{os.path.dirname(self.file)}/default.target.wants/{self.label}")
        self.call("daemon-reload")


def generate_unit(binary_path: str) -> bytes:
    """Write the service's systemd.service(5).

    Raises SystemdError for paths that a unit cannot hold.
    """
    if not binary_path.isprintable():
        raise SystemdError(f"{binary_path!r}: expected a path that a unit can hold")
    path = re.sub(r'["\\]', r"\\\g<0>", binary_path).replace("%", "%%")
    return f"""\
[Unit]
Description=Orchestra keeps AI coding agents' instruction files in sync

[Service]
ExecStart="{path}" daemon start
Restart=on-failure
RestartSec=5
TimeoutStopSec=20
StandardOutput=null

[Install]
WantedBy=default.target
""".encode()


def install_systemd(systemd: Systemd, binary: str) -> None:
    """Have systemd run the daemon, now and at each login.

    Raises SystemdError or IoError; the old unit is then back.
    """
    systemd.check_manager()
    new = generate_unit(binary)
    with blame(systemd.file):
        make_folders(os.path.dirname(systemd.file))
        old = read_disk(systemd.file)
    old_pid = systemd.daemon_pid()
    save_private(systemd.file, new, new_token())
    try:
        systemd.stop_daemon()
        systemd.start_daemon(old_pid)
    except DaemonError:
        if old.kind == "file":
            save_private(systemd.file, old.data, new_token())
            systemd.call("daemon-reload")
            systemd.call("restart", systemd.label)
        else:
            systemd.forget()
        raise


def uninstall_systemd(systemd: Systemd) -> bool:
    """Have systemd no longer run the daemon; return whether it did.

    Raises SystemdError, IoError.
    """
    was_installed = os.path.lexists(systemd.file)
    if was_installed:
        systemd.forget()
    systemd.remove_stale_socket()
    return was_installed


# ── 36 Registering ────────────────────────────────────────────────────────────

# A folder is registered under one name, and a name has one folder:
#
#   1 Refuse a folder that cannot be a codebase's, and names that cannot be used.
#   2 Clean up after a killed command, and load the registry.
#   3 Refuse a name that another folder has, and a folder that another name has.
#   4 If it is registered with this folder, change its type, or propose its parts, if
#     asked to, and stop (`_update`).
#   5 Refuse a folder to which another codebase may have moved: `project move` is for
#     that. It takes steps 1 and 3, and saves the path.
#   6 If it is registered, but has no folder on this machine, save this one as its own
#     (`_fill_in`). Otherwise detect what is in the folder, draft the codebase's file,
#     and create it (`_create`).


def list_checkout_folders(home: str, key: Key) -> list[str]:
    """List the folders from a codebase's registry file up to its git checkout's top."""
    folders = [*climb(real_path(os.path.dirname(codebase_path(home, key))))]
    tops = [folder for folder in folders if os.path.lexists(f"{folder}/.git")]
    inside = folders[: folders.index(tops[0]) + 1] if tops else []
    return [] if real_path(home) in inside else inside


def list_gone(home: str, registry: Registry) -> Iterator[tuple[Key, Record]]:
    """Iterate over the codebases that were synced here, and whose folder is gone."""
    for key, codebase in registry.codebases.items():
        record = load_record(home, key) if is_absent(home, codebase) else None
        if record and not os.path.exists(expand_home(home, record.root)):
            yield key, record


NO_PARTS = "--parts: no file here lists the packages of a workspace"


class Registered(NamedTuple):
    """A codebase as registered, and what to tell the user: what was done, and notes.

    A line is a head and a text beside it, which alone may be wrapped.
    """

    codebase: Codebase
    lines: list[tuple[str, str]]
    notes: list[str]


class Registration(NamedTuple):
    """A folder to register under a name. A `project_type` of None is detected.

    A `dry_run` changes nothing on the disk, and says the same.
    """

    home: str
    key: Key
    path: str
    project_type: Optional[str]
    dry_run: bool = False
    has_parts: bool = False  # what a workspace is made of is registered as its parts

    @property
    def label(self) -> str:
        return label_for(self.key)

    @property
    def file(self) -> str:
        return shorten_home(self.home, codebase_path(self.home, self.key))

    def run(self) -> Registered:
        """Register the folder; raises OrchestraError."""
        self._check_folder(Owners())
        check_name("project", self.key[0])
        check_name("codebase", self.key[1])
        self._check_is_folder()
        if not self.dry_run:
            clear_registry(self.home)
        registry = load_registry(self.home)
        listed = self._replace(key=listed_key(self.home, self.key))
        registered = listed._register(registry)
        return registered._replace(notes=[*registered.notes, *listed._suggest_gitignore()])

    def _register(self, registry: Registry) -> Registered:
        self._check_is_free(registry)
        self._check_folder(registry.owners)
        codebase = registry.codebases.get(self.key)
        if codebase and not is_absent(self.home, codebase):
            return self._update(codebase)
        self._check_has_not_moved(registry)
        if codebase:
            return self._fill_in(codebase)
        registered = self._create()
        return registered._replace(notes=[*registered.notes, *self._find_outer_codebases(registry)])

    def move(self, registry: Registry) -> list[str]:
        """Give a registered codebase this folder, and return what was done, by line.

        Its record and its backups are kept under its name, so they need no change.
        """
        self._check_is_folder()
        self._check_folder(registry.owners)
        self._check_has_no_other_name(registry)
        old = codebase_root(self.home, registry.codebases[self.key])
        if identity_of(old) == identity_of(self.path):
            return [f"{self.label} is already in {shorten_home(self.home, self.path)}"]
        path = self._spell_path()
        file = save_path(self.home, self.key, path, is_local=False)
        return [
            f"moved {self.label}: {shorten_home(self.home, old) or 'no path'} -> {path}",
            f"  edit:    {shorten_home(self.home, file)}",
        ]

    def _check_is_folder(self) -> None:
        if not os.path.isdir(self.path):
            is_file = os.path.exists(self.path)
            problem = "that is a file, not a folder" if is_file else "no such folder"
            raise RegistryError(f"{self.path}: {problem}")

    def _check_folder(self, owners: Owners) -> None:
        identity = identity_of(self.path)
        problem = identity and owners.why_unfit(self.home, real_path(self.path), identity)
        if problem:
            hint = "name the folder of one codebase, or of a repository that holds several"
            raise RegistryError(f"{self.path}: {problem}", hint)

    def _check_is_free(self, registry: Registry) -> None:
        if self.key in registry.broken:
            raise error_for(registry.broken[self.key])
        identity = identity_of(self.path)
        codebase = registry.codebases.get(self.key)
        if codebase:
            folder = codebase_root(self.home, codebase)
            if not (folder == self.path or identity_of(folder) == identity or is_absent(self.home, codebase)):
                hint = f"orchestra init {typed(self.path)} -p {typed(self.key[0])} --name ANOTHER_NAME"
                raise RegistryError(f"{self.label} already exists, for the folder {folder}", hint)
        self._check_has_no_other_name(registry)

    def _check_has_no_other_name(self, registry: Registry) -> None:
        others = registry.owners.keys_at(identity_of(self.path), self.key)
        if others:
            label = label_for(others[0])
            problem = f"{self.path}: this folder is already registered as {label}"
            remove = f"orchestra project remove {typed(label)}"
            raise RegistryError(problem, f"{remove} first, to move it elsewhere")

    def _check_has_not_moved(self, registry: Registry) -> None:
        """Raise RegistryError if a codebase that is absent now may have moved here."""
        for key, record in list_gone(self.home, registry):
            texts = ((path, look_at(self.path, record.agent_at(path)).digest) for path in record.files)
            if key == self.key or any(digest in record.known(path) for path, digest in texts):
                label = label_for(key)
                place = shorten_home(self.home, expand_home(self.home, record.root)) or "another folder"
                move = f"orchestra project move {typed(label)} {typed(self.path)}"
                remove = f"orchestra project remove {typed(label)}"
                hint = f"{move} if it is here now; otherwise {remove} first"
                raise RegistryError(f"{label} was in {place}, which is gone", hint)

    def _update(self, codebase: Codebase) -> Registered:
        """Change a registered codebase's type, or propose its parts, if asked to."""
        lines, notes = [("", self._change_type())], []
        if not self.dry_run:
            accept_empty_folder(self.home, codebase)
        if self.has_parts and not any(part.path for part in codebase.projects):
            parts = (*draft_parts(self.path, self.home, name_parts(self.path)[1], detect(self.path, self.home)),)
            if parts:
                text = dump_yaml(CODEBASE_SCHEMA.write(Codebase("", "", projects=parts)))
                lines += [(line, "") for line in text.splitlines()]
            notes = [f"add these to its `projects`: orchestra edit {typed(self.label)}" if parts else NO_PARTS]
        return Registered(codebase, lines, notes)

    def _change_type(self) -> str:
        for _ in range(MAX_TRIES):
            codebase = load_codebase(self.home, *self.key)
            if self.project_type in (None, *(part.project_type for part in codebase.projects)):
                return f"{self.label} is already registered: {self.file}"
            first, *rest = codebase.projects or (Component(self.key[1], ""),)
            first = first._replace(project_type=self.project_type or "")
            changed = codebase._replace(projects=(first, *rest), updated_at=now_rfc3339())
            try:
                if not self.dry_run:
                    save_codebase(self.home, changed)
            except FileChanged:
                continue
            changes = "would change" if self.dry_run else "changed"
            return f"{self.label}: type {changes} to {self.project_type} ({self.file})"
        raise RegistryError(f"{self.file}: {FileChanged.message}", "run the command again")

    def _fill_in(self, codebase: Codebase) -> Registered:
        """Give a codebase that other machines have its folder on this one."""
        path, verb = self._spell_path(), "would be" if self.dry_run else "is"
        file = codebase_path(self.home, (self.key[0], f"{self.key[1]}.local"))
        if not self.dry_run:
            file = save_path(self.home, self.key, path, is_local=True)
        lines = [("", f"{self.label} {verb} on this machine: {path} ({shorten_home(self.home, file)})")]
        lines += [("", self._change_type())] if self.project_type else []
        return Registered(codebase._replace(path=path), lines, [])

    def _create(self) -> Registered:
        base = LayerReader(self.home).read_base(self.key[0])
        problems = [problem for layer in base.layers for problem in layer.problems]
        if problems:
            raise error_for(problems)
        detected = detect(self.path, self.home)
        origin, parts = name_parts(self.path)
        if parts and self.has_parts:
            detected = detected._replace(packages=None)  # the list of parts says it
        draft = make_draft(self.path, detected)
        targets, source = self._choose_targets(base, draft)
        component = Component(self.key[1], self.project_type or detected.project_type)
        asked = parts if self.has_parts else {}
        codebase = Codebase(
            *(*self.key, self._spell_path(), draft.description, targets),
            commands=draft.commands,
            projects=(component, *draft_parts(self.path, self.home, asked, detected)),
        )
        if not self.dry_run:
            self._save(codebase)
        joined = CODEBASE_SCHEMA.join(base, codebase)._replace(layers=base.layers)
        rows = [*draft.found, Found("targets", ", ".join(targets_of(joined)) or "none", source)]
        if parts:
            more = f" and {len(parts) - 12} more" if len(parts) > 12 else ""
            hint = "" if self.has_parts else "; with --parts each gets files of its own"
            rows.append(Found("parts", ", ".join([*parts.values()][:12]) + more, origin + hint))
        rows.append(Found("edit", self.file, ""))
        verb = "would register" if self.dry_run else "registered"
        reason = "from --type" if self.project_type else detected.reason
        first = f"{verb} {self.label}: {component.project_type} ({reason})"
        notes = [*draft.notes, *([NO_PARTS] if self.has_parts and not parts else [])]
        return Registered(joined, [("", visible(first)), *self._format(rows)], notes)

    def _choose_targets(self, base: Codebase, draft: Draft) -> tuple[Optional[tuple[str, ...]], str]:
        """Return the targets to save, None to leave them to the layers, and why."""
        layers = [layer.path for layer in base.layers if layer.said.targets is not None]
        if layers:  # the user has decided
            return None, f"from {os.path.basename(layers[-1])}.yaml"
        if draft.targets:
            agents = [AGENTS[target] for target in draft.targets]
            twins = {twin for agent in agents if agent.owned for twin in agent.twins} - {a.path for a in agents}
            alone = ", ".join(sorted(twin for twin in twins if os.path.exists(f"{self.path}/{twin}")))
            return draft.targets, f"already used in this folder{alone and f'; left alone: {alone}'}"
        if draft.defaults == DEFAULT_TARGETS:
            return None, "default"
        return draft.defaults, "default, and agents with a folder here"

    @staticmethod
    def _format(rows: Sequence[Found]) -> Iterator[tuple[str, str]]:
        width = max(len(row.name) for row in rows) + 1
        for row in rows:
            source = f" ({row.source})" if row.source else ""
            yield visible(f"  {row.name + ':':{width}} "), visible(f"{row.text}{source}")

    def _spell_path(self) -> str:
        try:
            self.path.encode()
        except UnicodeEncodeError:
            raise RegistryError(f"{self.path!r}: not a path in UTF-8", "rename the folder") from None
        return spell_path(self.home, self.path)

    def _save(self, codebase: Codebase) -> None:
        now = now_rfc3339()
        project = Codebase("", self.key[0], created_at=now)
        file = project_path(self.home, self.key[0])
        create_registry_file(self.home, file, CODEBASE_SCHEMA.write(project))
        codebase = codebase._replace(created_at=now, updated_at=now)
        file = codebase_path(self.home, self.key)
        if not create_registry_file(self.home, file, CODEBASE_SCHEMA.write(codebase)):
            raise RegistryError(f"another command registered {self.label} just now")

    def _suggest_gitignore(self) -> list[str]:
        """Note what git should ignore, if it keeps the project's files and does not."""
        folders = list_checkout_folders(self.home, self.key)
        for folder in folders:
            with suppress(IoError):
                if b".local." in read_disk(f"{folder}/.gitignore", MAX_REGISTRY_FILE).data:
                    return []
        if not folders:
            return []
        command = f"echo '*.local.*' >> {typed(shorten_home(self.home, f'{folders[-1]}/.gitignore'))}"
        return [f"git keeps this registry; let it ignore what is for one machine: {command}"]

    def _find_outer_codebases(self, registry: Registry) -> Iterator[str]:
        undo = "" if self.dry_run else f"; if that was not meant: orchestra project remove {typed(self.label)}"
        reason = "its folder contains this one and is not a repository"
        for folder in climb(os.path.dirname(self.path)):
            for label in map(label_for, registry.owners.keys_at(identity_of(folder))):
                if not is_repository(folder):
                    yield f"{label} is no longer synced: {reason}{undo}"
                elif not is_repository(self.path):
                    yield f"this folder is in that of {label}{undo}"


def suggest_moves(home: str, registry: Registry, folder: str) -> list[str]:
    """Suggest to move codebases that are gone to the folders that have their names."""
    gone = {os.path.basename(record.root): key for key, record in list_gone(home, registry)}
    found = [(gone.get(os.path.basename(above)), shorten_home(home, above)) for above in climb(folder)]
    return [f"orchestra project move {typed(label_for(key))} {typed(place)}" for key, place in found if key]


def count_daemons_files(home: str, result: SyncCodebaseResult, root: str, since: float) -> SyncCodebaseResult:
    """Count as written what the daemon has written since, if it was the faster."""
    record = load_record(home, result.key) or Record()

    def count(file: FilePlan) -> FilePlan:
        is_ours = file.action == Action.KEEP and record.files.get(file.path)
        if not is_ours or os.path.getmtime(f"{root}/{file.path}") < since:
            return file
        if record.earlier.get(file.path):
            return file._replace(action=Action.UPDATE)
        return file._replace(action=Action.CREATE, join=record.joins.get(file.path))

    return result._replace(files=tuple(map(count, result.files)))


# ── 37 Output ─────────────────────────────────────────────────────────────────

# stdout carries results; stderr carries notes and errors. The exit status is 0 if all
# is well, 1 if something is out of date (only with --check and --exit-code) or doctor
# found something, 2 after a failure, and 130 after an interrupt, as in shells. With
# several codebases, all are tried before a failure is returned.

OK, OUT_OF_DATE, FAILED, INTERRUPTED = 0, 1, 2, 130
NO_CODEBASES = "no codebases yet\n  try: orchestra init PATH -p PROJECT --sync"


# Messages


def discard_output(stream: int) -> None:
    """Point a standard stream at /dev/null, so that Python's flush at exit succeeds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def say(text: str) -> None:
    """Print to stderr; where that fails, the exit status has to suffice."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        discard_output(2)


def report_all(problems: Iterable[Problem]) -> int:
    """Print each problem once, and what to do about it; return the exit status."""
    problems = list(dict.fromkeys(problems))
    for problem in problems:
        for line in str(problem).split("\n"):
            say(f"orchestra: {visible(line)}")
        if problem.hint:
            say(f"  try: {visible(problem.hint)}")
    return FAILED if problems else OK


def attempt(act: Callable[..., object], *arguments: Any) -> int:
    """Do one thing of several; report an OrchestraError, and return the exit status."""
    try:
        act(*arguments)
    except OrchestraError as error:
        return report_all([Problem.from_error(error)])
    return OK


def ask(question: str, default: bool) -> bool:
    """Ask a yes-or-no question; no terminal, or no answer, is a no."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(f"{question} [{'Y/n' if default else 'y/N'}] ")
    sys.stderr.flush()
    answer = ""
    try:
        answer = sys.stdin.readline()
    finally:
        if not answer:  # Ctrl-C, or Ctrl-D, which end no line
            sys.stderr.write("\n")
    return default if answer == "\n" else answer.strip().lower() in ("y", "yes")


def print_json(value: Any) -> None:
    print(format_json(value))


def pick(record: Any, *names: str) -> dict[str, Any]:
    """Make some of a record's attributes a JSON object."""
    return {name: getattr(record, name) for name in names}


# Text in columns


def text_width(text: str) -> int:
    """Count the columns a text takes: Chinese characters two, combining ones none."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def pieces(word: str, width: int) -> Iterator[str]:
    """Cut a word into pieces of at most so many columns, or of one character."""
    while word:
        piece = word[:width]
        while len(piece) > 1 and text_width(piece) > width:
            piece = piece[:-1]
        yield piece
        word = word[len(piece) :]


def cut(text: str, width: int) -> str:
    """Return as much of a text as fits into some columns."""
    return next(pieces(text, width), "")


def wrap(text: str, width: int) -> list[str]:
    """Break a text at spaces, and words that are too long where they must be."""
    lines = [""]
    for word in text.split(" "):
        line = f"{lines[-1]} {word}" if lines[-1] else word
        if text_width(line) <= width:
            lines[-1] = line
        else:
            lines[len(lines) - (not lines[-1]) :] = pieces(word, width)
    return lines


def hang(head: str, text: str, width: int) -> list[str]:
    """Wrap a text beside its head; a width of 0 has room for all."""
    lines = wrap(text, max(width - text_width(head), 20)) if width else [text]
    return [head + lines[0], *(" " * text_width(head) + line for line in lines[1:])]


def format_table(rows: Sequence[Sequence[str]], width: int = 0) -> list[str]:
    """Align rows in columns; the last one is wrapped to the width, if there is one."""
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(text_width, column)) for column in zip(*rows)][:-1]
    lines: list[str] = []
    for *cells, last in rows:
        head = ""
        for cell, size in zip(cells, widths):
            head += cell + " " * (size - text_width(cell) + 2)
        lines += [line.rstrip() for line in hang(head, last, width)]
    return lines


class Screen(NamedTuple):
    """What stdout shows: `width` is 0 for a pipe, whose lines may have any length."""

    width: int
    has_colors: bool

    @classmethod
    def find(cls, environ: Mapping[str, str]) -> "Screen":
        is_terminal = sys.stdout.isatty()
        forced = environ.get("CLICOLOR_FORCE", "0") != "0"
        has_colors = (is_terminal and environ.get("TERM") != "dumb") or forced
        columns, width = environ.get("COLUMNS", ""), 0
        if re.fullmatch("[1-9][0-9]*", columns):
            width = int(columns)
        elif is_terminal:
            width = 80
            with suppress(OSError, ValueError):
                width = os.get_terminal_size(sys.stdout.fileno()).columns
        return cls(width, has_colors and "NO_COLOR" not in environ)

    def paint(self, text: str, color: str) -> str:
        return f"\033[{color}m{text}\033[0m" if self.has_colors and color else text

    def print_table(self, rows: Sequence[Sequence[str]], colors: Mapping[str, str] = {}) -> None:
        """Print a table, and the words in it that are keys of `colors` in color."""
        for line in format_table(rows, self.width):
            print(self.paint_words(line, colors))

    def paint_diff(self, text: str) -> str:
        """Paint the lines of a unified diff by how they begin."""
        if not self.has_colors:
            return text
        colors = {"--- ": "1", "+++ ": "1", "@@": "36", "-": "31", "+": "32"}
        starts = "|".join(map(re.escape, colors))
        return re.sub(f"(?m)^({starts}).*", lambda match: self.paint(match[0], colors[match[1]]), text)

    def paint_words(self, line: str, colors: Mapping[str, str]) -> str:
        """Paint the first of the words that stands between two columns."""
        if not colors or not self.has_colors:
            return line
        word = f"(?:^|(?<=  ))({'|'.join(map(re.escape, colors))})(?=  |$)"
        return re.sub(word, lambda match: self.paint(match[1], colors[match[1]]), line, count=1)


def show_progress(done: int, total: int, key: Key) -> None:
    """Overwrite one line of the terminal during long work."""
    if total > 20 and sys.stderr.isatty():
        end = "\r" if done + 1 < total else "\r\033[K"
        sys.stderr.write(f"\r\033[K{done + 1}/{total} {label_for(key)}{end}")
        sys.stderr.flush()


def format_duration(seconds: int) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def format_age(seconds: Optional[int]) -> str:
    return "never" if seconds is None else f"{format_duration(seconds)} ago"


def describe_results(results: Sequence[SyncCodebaseResult], dry_run: bool) -> str:
    """Count the files of a sync in one line."""
    removed = sum(len(result.removed) for result in results)
    written = sum(len(result.written) for result in results) - removed
    unchanged = sum(len(result.unchanged) for result in results)
    foreign = sum(len(result.foreign) for result in results)
    failed = sum(len(result.failed) or bool(result.errors) for result in results)
    absent = sum(result.is_absent and not result.errors for result in results)
    totals = f"{written} {'to write' if dry_run else 'written'}"
    totals += f", {removed} {'to remove' if dry_run else 'removed'}" if removed else ""
    totals += f", {unchanged} unchanged"
    totals += f", {foreign} {FOREIGN}" if foreign else ""
    totals += f", {failed} failed" if failed else ""
    totals += f" in {count_of(len(results) - absent, 'codebase')}"
    return totals + (f", {absent} absent" if absent else "")


# ── 38 Arguments ──────────────────────────────────────────────────────────────

# The rows of the table of commands serve the parser, the help and the completion.
# argparse would cost 7 ms of each start, and could do less.


class Argument(NamedTuple):
    """One argument of a command: positional, or an option by its names.

    `nargs` is "" for exactly one value, "?" for at most one, "*" for any number, "0"
    for a switch, which is an option without a value.
    """

    names: tuple[str, ...]
    help: str = ""
    metavar: str = ""
    nargs: str = ""
    choices: Collection[str] = ()
    default: Any = None
    required: bool = False
    type: Callable[[str], Any] = str

    @property
    def is_option(self) -> bool:
        return self.names[0].startswith("-")

    @property
    def name(self) -> str:
        """What its value is called in the parsed command line."""
        return max(self.names, key=len).lstrip("-").replace("-", "_")

    @property
    def is_switch(self) -> bool:
        return self.nargs == "0"

    @property
    def value_name(self) -> str:
        return "" if self.is_switch else self.metavar or self.name.upper()

    @property
    def usage(self) -> str:
        text = f"{self.names[0]} {self.value_name}".rstrip() if self.is_option else self.value_name
        text += " ..." if self.nargs == "*" else ""
        return text if self.required or not (self.is_option or self.nargs) else f"[{text}]"

    def parse(self, text: str) -> Any:
        """Return the value that a user typed; raises UsageError."""
        name = self.names[-1] if self.is_option else self.value_name
        if self.choices and text not in self.choices:
            expected = f"expected {' | '.join(self.choices)}, got {excerpt(text)}"
            raise UsageError(f"{name}: {expected}{did_you_mean(text, self.choices)}")
        try:
            return self.type(text)
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from None


class Command(NamedTuple):
    """A row of the table of commands, by its words.

    `heading` is the part of the overview that it is in; without a `purpose` it is
    hidden.
    """

    purpose: str
    arguments: tuple[Argument, ...] = ()
    needs_yaml: bool = True
    heading: str = ""


def command(purpose: str, *arguments: Argument, **settings: Any) -> Command:
    return Command(purpose, arguments, **settings)


def argument(*names: str, **settings: Any) -> Argument:
    return Argument(names, **settings)


def switch(*names: str, help: str) -> Argument:
    return Argument(names, help, nargs="0", default=False)


def parse_count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"expected a whole number, 0 or more, got {text!r}")
    return int(text)


COMMON = (
    switch("-q", "--quiet", help="print nothing but errors"),
    switch("-h", "--help", help="show this help"),
)


class CommandLine:
    """What was typed, taken apart by the table of commands.

    `name` are the words of the command, "" for none; `rest` is what follows them.
    """

    def __init__(self, table: Mapping[str, Command], argv: Sequence[str]) -> None:
        self.table = table
        self.name = ""
        names = [name for argument in COMMON for name in argument.names]
        first = [*itertools.takewhile(lambda word: word in names, argv)]
        self.rest = [*argv[len(first) :], *first]  # those in front are the command's too
        while self.rest and self.rest[0] and self._longer_name in table:
            self.name = self._longer_name
            del self.rest[0]

    @property
    def _longer_name(self) -> str:
        return f"{self.name} {self.rest[0]}".lstrip()

    @property
    def command(self) -> Command:
        return self.table[self.name]

    @property
    def is_group(self) -> bool:
        """Whether a word of a command should follow."""
        return not self.name or bool(self.subcommands())

    @property
    def options(self) -> dict[str, Argument]:
        found = (*self.command.arguments, *COMMON)
        return {name: argument for argument in found for name in argument.names if argument.is_option}

    @property
    def positional(self) -> list[Argument]:
        return [argument for argument in self.command.arguments if not argument.is_option]

    def subcommands(self) -> dict[str, Command]:
        """Return the commands that may follow, by their last word; no hidden ones."""
        rows = {name.rpartition(" "): row for name, row in self.table.items() if name}
        return {name: row for (group, _, name), row in rows.items() if group == self.name and row.purpose}

    @property
    def awaits_value(self) -> bool:
        """Whether the last word is an option that a value should follow."""
        option = self.options.get(self.rest[-1]) if self.rest else None
        return option is not None and not option.is_switch

    def find_next(self) -> Optional[Argument]:
        """Find the argument that the next word would be a value of."""
        if self.awaits_value:
            return self.options[self.rest[-1]]
        try:
            given = self._parse_options(SimpleNamespace())
        except UsageError:
            return None
        last = [argument for argument in self.positional[-1:] if argument.nargs == "*"]
        return next(iter(self.positional[len(given) :] or last), None)

    def parse(self) -> SimpleNamespace:
        """Return the values by name, and this `line`; raises UsageError."""
        args = SimpleNamespace(line=self)
        for argument in (*self.command.arguments, *COMMON):
            setattr(args, argument.name, [] if argument.nargs == "*" else argument.default)
        if self.is_group and self.rest:
            self._refuse()
        try:
            positional = self._parse_options(args)
            if not args.help:
                self._place(args, positional)
        except UsageError as error:
            raise UsageError(f"{self.name}: {error}".removeprefix(": "), self.hint) from None
        return args

    def _refuse(self) -> None:
        """Raise UsageError if what follows a group's name is none of its commands."""
        first, *others = self.rest
        if not first.startswith("-"):
            known = [name for name in self.table if not self.name and name.endswith(f" {first}")]  # daemon start
            like = did_you_mean(known[0] if known else first, known or [*self.subcommands(), *self.options])
            raise UsageError(f'there is no command "{visible(self._longer_name)}"{like}', self.hint)
        line = CommandLine(self.table, [*self.name.split(), *others])
        if first in line.options and first not in self.options:
            raise UsageError(f"{first} goes after the command", f"orchestra {line.name} {first}")

    @property
    def hint(self) -> str:
        return f"orchestra help {self.name}".rstrip()

    def _parse_options(self, args: SimpleNamespace) -> list[str]:
        """Note the options' values in `args`, and return the other words."""
        options, words = self.options, self.rest[::-1]
        positional: list[str] = []
        while words:
            word = words.pop()
            if word == "--":
                return positional + words[::-1]
            if not word.startswith("-") or word == "-":
                positional.append(word)
                continue
            name, equals, value = word.partition("=")
            if not word.startswith("--"):  # -p=shop, or -pshop
                name, equals, value = word[:2], word[2:], word[2:].removeprefix("=")
            argument = options.get(name)
            if "/" in word.partition("=")[0] and (argument is None or argument.is_switch):
                positional.append(word)  # a codebase of a project called -x: no option has a slash
                continue
            if argument is None:
                raise UsageError(f"there is no option {visible(name)}{did_you_mean(name, options)}")
            if argument.is_switch:
                if equals and not word.startswith("--"):
                    words.append(f"-{equals}")  # several letters after one dash
                elif equals:
                    raise UsageError(f"{name} takes no value")
                setattr(args, argument.name, True)
                continue
            if not equals and not words:
                raise UsageError(f"{name}: expected {argument.value_name}, got nothing")
            setattr(args, argument.name, argument.parse(value if equals else words.pop()))
        return positional

    def _place(self, args: SimpleNamespace, words: list[str]) -> None:
        """Give the other words to the positional arguments; check what is required."""
        for argument in self.positional:
            if argument.nargs == "*":
                setattr(args, argument.name, [argument.parse(word) for word in words])
                words = []
            elif words:
                setattr(args, argument.name, argument.parse(words[0]))
                words = words[1:]
            elif not argument.nargs:
                raise UsageError(f"{argument.value_name} is missing")
        if words:
            raise UsageError(f"did not expect {excerpt(words[0])}")
        for argument in self.command.arguments:
            if argument.required and getattr(args, argument.name) is None:
                raise UsageError(f"{argument.names[0]} {argument.value_name} is missing")


# Help

HELP_WIDTH = 79  # columns
MORE_HELP = "More: orchestra help, orchestra help COMMAND"
HELP_NOTES = """\
CODEBASE is a name (api), PROJECT/name or a path; default: this folder.
Options everywhere: -h help, -q quiet (only errors); alone: -V version.
Exit status: 0 fine, 1 out of date (--check, --exit-code, doctor), 2 failed.
Environment: EDITOR VISUAL PAGER NO_COLOR CLICOLOR_FORCE ORCHESTRA_WATCHER
ORCHESTRA_NO_FETCH
More: orchestra help COMMAND"""


def format_help(line: CommandLine, notes: str = "") -> str:
    """Describe a command, or what commands a group has; `notes` end it."""
    row = line.command
    purpose = row.purpose[:1].upper() + row.purpose[1:] + "."
    usage = f"usage: orchestra {line.name}".rstrip()
    rows: list[tuple[str, str]] = []
    if line.is_group:
        lines = [f"{usage} COMMAND [options]"]
        for heading, found in itertools.groupby(line.subcommands().items(), lambda item: item[1].heading):
            rows += [(heading, "")] if heading else []
            rows += [(f"  {_usage_of(name, row)}", row.purpose) for name, row in found]
    else:
        lines = hang(f"{usage} ", " ".join(argument.usage for argument in row.arguments), HELP_WIDTH)
        rows += [(f"  {_spell(argument)}", argument.help) for argument in (*row.arguments, *COMMON)]
    parts = [purpose, "\n".join(lines).rstrip(), "\n".join(format_table(rows, HELP_WIDTH)), notes]
    return "\n\n".join(filter(None, parts)) + "\n"


def _usage_of(name: str, row: Command) -> str:
    return " ".join([name, *(argument.usage for argument in row.arguments if not argument.is_option)])


def _spell(argument: Argument) -> str:
    names = ", ".join(argument.names) if argument.is_option else ""
    return f"{names} {argument.value_name}".strip()


# Completion

# The scripts ask `orchestra complete` for lines of a word, a tab and its meaning. Where
# there are none, the shell completes files.

COMPLETION = {
    "bash": r"""# In ~/.bashrc: eval "$(orchestra completion bash)"
_orchestra() {
    local word begun= rest=" $COMP_LINE" words=() n=-1
    for word in "${COMP_WORDS[@]:0:COMP_CWORD+1}"; do  # split at : and =, not only at blanks
        if [[ -z $rest || $rest == [[:space:]]* ]]; then
            n=$((n + 1)) rest=${rest#"${rest%%[![:space:]]*}"}
        fi
        words[n]+=$word rest=${rest#"$word"}
    done
    local typed=${words[n]}
    if [[ $typed == *"$2" ]]; then  # only $2 is replaced
        begun=${typed%"$2"} begun=${begun//[\\\"\']/}
    fi
    words=("${words[@]//[\\\"\']/}")
    COMPREPLY=()
    while IFS=$'\t' read -r word _; do
        word=${word#"$begun"}
        if [[ $typed != *[\'\"]* ]]; then
            printf -v word %q "$word"
        elif [[ $word == *[!\ [:alnum:]%+,./:@_-]* ]]; then
            continue  # inside quotes, %q's $'...' would run a $(...)
        fi
        COMPREPLY+=("$word")
    done < <("${COMP_WORDS[0]}" complete -- "${words[@]:1}" 2>/dev/null)
}
complete -o default -F _orchestra orchestra
""",
    "zsh": r"""#compdef orchestra
# In ~/.zshrc, after compinit: eval "$(orchestra completion zsh)"
_orchestra() {
    local -a found
    local line word meaning
    for line in "${(@f)$("${words[1]}" complete -- "${(@Q)words[2,CURRENT]}" 2>/dev/null)}"; do
        word=${line%%$'\t'*} meaning=${line#*$'\t'}
        word=${word//\\/\\\\} word=${word//:/\\:}
        [[ -n $word ]] && found+=("$word${meaning:+:$meaning}")
    done
    if (( $#found )); then _describe orchestra found; else _files; fi
}
if [[ $funcstack[1] = _orchestra ]]; then _orchestra "$@"; else compdef _orchestra orchestra; fi
""",
    "fish": r"""# In ~/.config/fish/config.fish: orchestra completion fish | source
function __orchestra_complete
    set -l words (commandline -opc) (string unescape -- (commandline -ct); or commandline -ct)
    set -l found (command $words[1] complete -- $words[2..-1] 2>/dev/null)
    if set -q found[1]
        printf '%s\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c orchestra -f -a '(__orchestra_complete)'
""",
}


def complete(
    table: Mapping[str, Command], words: Sequence[str], list_known: Callable[[str], Iterable[str]]
) -> Iterator[tuple[str, str]]:
    """Yield what the last of some words may become, and what it means.

    `list_known` lists what an argument of some name (CODEBASE, PROJECT) may be.
    """
    *before, last = words or [""]
    line = CommandLine(table, before)
    if line.name == "help":
        line = CommandLine(table, line.rest)
    if last.startswith("-") and not line.awaits_value:
        found = {name: argument.help for name, argument in line.options.items() if name.startswith("--")}
    elif line.is_group and not line.rest:
        found = {name: row.purpose for name, row in line.subcommands().items()}
    else:
        argument = line.find_next()
        known = [*argument.choices, *list_known(argument.value_name)] if argument else []
        found = {word: "" for word in known if not word.startswith("-")}  # those are options
    yield from ((word, meaning) for word, meaning in found.items() if word.startswith(last))


# ── 39 Status screen ──────────────────────────────────────────────────────────

# What `status` shows: a summary, the daemon, and what needs attention. `StatusView`
# formats it once; `LiveStatus` makes frames of it, which `show_live` draws.

STATE_COLORS = {
    State.WORDS[State.CURRENT][0]: "32",
    State.WORDS[State.NEVER_SYNCED][0]: "33",
    State.WORDS[State.STALE][0]: "33",
    State.WORDS[State.MODIFIED][0]: "35",
    State.WORDS[State.ORPHAN][0]: "36",
    State.WORDS[State.ERROR][0]: "31",
}


def ask_daemon(home: str) -> dict[str, Any]:
    """Return the daemon's status, at once: `running` is False if nothing listens."""
    try:
        reply = send_request(home, {"cmd": "status"}, timeout=1.0)
    except DaemonNotRunning:
        return {"running": False}
    except DaemonError as error:
        return {"running": True, "problem": str(error).removeprefix("daemon: ")}
    return {"running": True, **reply}


def describe_daemon(daemon: Mapping[str, Any], clock: Clock = time.time) -> str:
    if not daemon.get("running"):
        return "daemon: not running (orchestra daemon start --detach)"
    if "problem" in daemon:
        return f"daemon: {daemon['problem']}"
    seconds = int(clock() - daemon.get("started_at_unix", clock()))
    words = f"daemon: running {format_duration(max(0, seconds))}"
    version = daemon.get("version", "an old version")
    if version != __version__:
        words += f", {version} (installed: {__version__} - orchestra daemon restart)"
    return words


def next_steps(status: Status) -> list[str]:
    """Return the commands to type next, at most two; those for absent ones are last."""
    entries = status.codebases
    none_here = all(e.status == State.ABSENT for e in entries)
    stuck = [(e.status, e.hint) for e in entries if e.hint and (e.needs_attention or none_here)]
    steps = [hint for state, hint in stuck if state == State.ERROR][:1]
    absent = [hint for state, hint in stuck if state == State.ABSENT]
    edited = [typed(e.label) for e in entries if e.status == State.MODIFIED]
    steps += [f"orchestra diff {label}" for label in edited[:1]]
    outdated = [e for e in entries if e.is_outdated]
    by_all = [typed(e.label) for e in outdated if not e.hint]
    if by_all:
        steps.append("orchestra sync --all" if len(by_all) > 1 else f"orchestra sync {by_all[0]}")
    return [*steps, *(e.hint for e in outdated if e.hint), *absent[:1]][:2]


class StatusView(NamedTuple):
    """A scan of the codebases to show, with the daemon's status and notes."""

    status: Status
    daemon: Mapping[str, Any]
    notes: Sequence[Problem] = ()
    is_full: bool = False  # otherwise only what needs attention is listed

    @property
    def all_notes(self) -> list[str]:
        """List the notes, and what else the daemon has trouble with."""
        notes = map(str, (*self.notes, *self.status.stray))
        known = "\n".join([*notes, *(entry.detail for entry in self.status.codebases)])
        problems = self.daemon.get("problems", ())
        news = [Problem(p["where"], p["message"]) for p in problems if p["message"] not in known]
        return [*(f"note: {note}" for note in self.notes), *(f"daemon: {new}" for new in news)]

    def format_entries(self, width: int) -> list[str]:
        """List the codebases in a table, and the notes below it."""
        entries = [entry for entry in self.status.codebases if self.is_full or entry.needs_attention]
        entries.sort(key=lambda entry: list(State.WORDS)[::-1].index(entry.status))
        alike: dict[str, list[Staleness]] = {}  # a broken layer stops all it covers
        for entry in entries:
            is_grouped = entry.status == State.ERROR and not self.is_full
            alike.setdefault(entry.detail if is_grouped else entry.label, []).append(entry)
        rows = [("CODEBASE", "STATE", "SYNCED", "WHAT")]
        for entry, *others in alike.values():
            detail = entry.detail.replace(f"~/.orchestra/projects/{entry.project}/", "")
            label = f"{entry.label} and {len(others)} more" if others else entry.label
            rows.append((label, State.WORDS[entry.status][0], format_age(entry.last_sync_age), detail))
        lines = format_table(rows, width) if entries else []
        for note in self.all_notes:
            said, _, hint = visible(note).partition("; to get it back: ")
            lines += hang("", said, width)
            lines += [f"  try: {hint}"] if hint else []  # to be pasted: not wrapped
        return lines

    def format(self, width: int) -> list[str]:
        heads = (self.status.describe(), describe_daemon(self.daemon))
        lines = [line for head in heads for line in hang("", head, width)]
        entries, steps = self.format_entries(width), next_steps(self.status)
        if entries:
            lines += ["", *entries]
        if steps:
            steps = [*map(" ".join, zip(("next:", "then:"), map(visible, steps)))]
            joined = "    ".join(steps)
            lines += ["", *(steps if 0 < width < text_width(joined) else [joined])]
        return lines

    def as_json(self) -> dict[str, Any]:
        names = ("project", "codebase", "status", "detail", "last_sync_age", "last_sync_at", "active_tasks")
        return {
            "summary": self.status.summary,
            "codebases": [pick(entry, *names) for entry in self.status.codebases],
            "daemon": {name: self.daemon[name] for name in ("running", "version", "pid") if name in self.daemon},
            "notes": [str(note) for note in self.notes],
        }


# Live

# `status --watch` draws a frame whenever one differs from the last. At each tick it
# asks the daemon and reads its log. The codebases are judged again after a sync, and
# now and then, since the daemon does not see hand edits.


def format_event(line: str, width: int) -> str:
    """Shorten a line of the daemon's log; "" for one that says nothing to a user."""
    from datetime import datetime

    when, _, rest = line.partition(" ")
    level, _, text = rest.partition(" ")
    message = re.split(r" \w+=", text, maxsplit=1)[0]
    fields = dict(re.findall(r' (\w+)=("(?:[^"\\]|\\.)*"|[^\s"]+)', text))
    try:
        at = datetime.fromisoformat(when.replace("Z", "+00:00")).astimezone().strftime("%H:%M:%S")
        values = [json.loads(value) if value.startswith('"') else value for value in fields.values()]
    except ValueError:
        return ""
    if message == "staleness":
        return ""
    if message == "synced":
        target, written, ms = map(dict(zip(fields, values)).get, ("target", "written", "ms"))
        said = f"{target or ''}  {written or '?'} written  {ms or '?'} ms"
    else:
        named = ", ".join(f"{name} {value}".removeprefix("text ") for name, value in zip(fields, values))
        said = ": ".join([f"! {message}", *values]) if level == "WARNING" else f"{message} {named}"
    return cut(visible(f"{at}  {said}").replace("~/.orchestra/projects/", ""), width)


class LiveStatus:
    """What `status --watch` shows. `scan` judges the codebases."""

    MOST_EVENTS = 200
    TICK = 0.25  # seconds between two looks
    RESCAN = 2.0  # seconds between two scans, or more if scans are slow:
    RESCAN_SHARE = 20  # times what the last one took

    def __init__(self, home: str, scan: Callable[[], Status], clock: Clock = time.monotonic) -> None:
        self._home = home
        self._scan = scan
        self._clock = clock
        self._log = LogReader(stdout_log_path(home))
        self._events = self._log.tail(self.MOST_EVENTS)
        self._daemon: Mapping[str, Any] = {}
        self._status = Status((), ())
        self._scan_at = 0.0

    def look(self) -> None:
        """Ask the daemon, read its log, and judge the codebases if that is due."""
        last_sync = self._daemon.get("last_sync_at_unix")
        self._daemon = ask_daemon(self._home)
        new = self._log.read()
        self._events = b"".join((self._events + new).splitlines(True)[-self.MOST_EVENTS :])
        now = self._clock()
        if now >= self._scan_at or last_sync != self._daemon.get("last_sync_at_unix"):
            self._status = self._scan()
            took = self._clock() - now
            self._scan_at = now + max(self.RESCAN, self.RESCAN_SHARE * took)

    def frame(self, width: int, height: int) -> list[str]:
        """Return the lines of the screen, as many as fit."""
        daemon, width = self._daemon, width - 1  # a full line might scroll
        facts = [describe_daemon(daemon)]
        facts += [f"pid {daemon['pid']}", daemon["watcher"]] if {"pid", "watcher"} <= {*daemon} else []
        facts += [f"{daemon['queue_depth']} queued"] if daemon.get("queue_depth") else []
        entries = StatusView(self._status, daemon, self._status.stray).format_entries(width)
        events = [format_event(line, width) for line in self._events.decode("utf-8", "replace").splitlines()]
        events = [event for event in reversed(events) if event]
        room = max(height - 5, 2)
        fits = max(room // 2, room - len(events))
        if len(entries) > fits:
            entries[fits - 1 :] = [f"... and more: orchestra status ({len(entries) - fits + 1} lines)"]
        rule = "-" * width
        lines = [f"{', '.join(facts).ljust(width - 8)}  q quit", self._status.describe(), rule, *entries, rule, *events]
        return [cut(line, width) for line in lines[:height]]


@contextmanager
def own_screen() -> Iterator[None]:
    """Take the terminal over, key by key, and leave it as it was, however that ends."""
    import signal
    import termios

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = termios.tcgetattr(0)
    mode = [*before[:6], [*before[6]]]
    mode[3] &= ~(termios.ICANON | termios.ECHO)
    mode[6][termios.VSUSP] = bytes([os.fpathconf(0, "PC_VDISABLE")])  # a stopped one would keep the screen
    handlers = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        termios.tcsetattr(0, termios.TCSADRAIN, mode)
        sys.stdout.write("\033[?1049h\033[?25l")
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        with suppress(OSError, termios.error):  # the terminal is gone
            termios.tcsetattr(0, termios.TCSADRAIN, before)
            sys.stdout.write("\033[?25h\033[?1049l")
            sys.stdout.flush()


def show_live(live: LiveStatus, screen: Screen) -> None:
    """Keep a live status on the terminal until q is typed."""
    import select

    with own_screen():
        shown: tuple[Any, ...] = ()
        while True:
            live.look()
            size = os.get_terminal_size(sys.stdout.fileno())
            lines = live.frame(size.columns, size.lines)
            if (size, lines) != shown:
                text = "\033[K\n".join(screen.paint_words(line, STATE_COLORS) for line in lines)
                sys.stdout.write(f"\033[H{text}\033[K\033[J")
                sys.stdout.flush()
                shown = (size, lines)
            if select.select([0], [], [], live.TICK)[0]:
                keys = os.read(0, 64)
                if not keys or b"q" in keys.lower():
                    return


# ── 40 Doctor ─────────────────────────────────────────────────────────────────

# What commonly goes wrong, and how to fix it. Nothing is changed. A new check is a
# method of Doctor that is called _check_... and yields findings; they run in the order
# they stand in. A check that fails is a finding itself, and the others go on.


class Level:
    OK, WARNING, FAILURE = "ok", "warn", "FAIL"
    COLORS = {OK: "32", WARNING: "33", FAILURE: "31"}


class Finding(NamedTuple):
    """What a check found, in one line; `fix` is a command, or what else to do."""

    level: str
    text: str
    fix: str = ""


fine = functools.partial(Finding, Level.OK)
warning = functools.partial(Finding, Level.WARNING)
failure = functools.partial(Finding, Level.FAILURE)


NOTE_FIXES = {  # what to do about a note on a file, by words in the note; the first counts
    FOREIGN: "orchestra sync {label}",
    "symbolic link": "put a file in its place, or drop its target: {edit_targets}",
    "invisible characters": "type the text anew: orchestra edit {label}",
    "at most": "orchestra edit {label}, or shorten your own text in the file",
    "": "orchestra edit {label}",
}


class Doctor:
    """Looks at a home's installation, its daemon, registry and codebases."""

    def __init__(self, home: str, environ: Mapping[str, str]) -> None:
        self.home = home
        self._environ = environ
        self._run = functools.partial(run_program, environ=environ)
        self._daemon = ask_daemon(home)

    def _short(self, path: str) -> str:
        return shorten_home(self.home, path)

    @functools.cached_property
    def _registry(self) -> Registry:
        return load_registry(self.home)

    def findings(self) -> Iterator[Finding]:
        for name in [name for name in vars(Doctor) if name.startswith("_check_")]:
            try:
                yield from getattr(self, name)()
            except (OrchestraError, OSError) as error:
                problem = Problem.from_error(error)
                yield failure(str(problem), problem.hint)
                if name == "_check_program":
                    return  # without PyYAML, the registry cannot be read

    def _check_program(self) -> Iterator[Finding]:
        Installer(self.home, {**self._environ, "ORCHESTRA_NO_FETCH": "1"}).ensure_yaml()
        yaml = import_yaml()
        python = ".".join(map(str, sys.version_info[:3]))
        kind = "" if yaml.__with_libyaml__ else " (without libyaml: slower)"
        program = f"orchestra {__version__}, {sys.executable} ({python})"
        yield fine(f"{program}, PyYAML {yaml.__version__}{kind}")

    def _check_path(self) -> Iterator[Finding]:
        folders = filter(os.path.isabs, self._environ.get("PATH", "").split(":"))
        files = [f"{folder}/orchestra" for folder in folders]
        found = [file for file in files if os.access(file, os.X_OK)]
        link, binary = link_path(self.home), binary_path(self.home)
        if not found and os.path.lexists(link):
            fix = 'export PATH="$HOME/.local/bin:$PATH", in your shell\'s startup file'
            yield warning(f"{self._short(os.path.dirname(link))} is not on PATH", fix)
        elif not found:
            yield warning("no program on PATH is called orchestra", "run install.sh")
        elif os.path.exists(binary) and real_path(found[0]) != real_path(binary):
            place = self._short(os.path.dirname(link))
            text = f"{found[0]} comes first on PATH, and is another program"
            yield warning(text, f"remove it, or put {place} before it on PATH")

    def _check_launcher(self) -> Iterator[Finding]:
        binary = binary_path(self.home)
        if not os.path.lexists(binary):
            return
        done = self._run([binary, "--version"], PYTHON_TIMEOUT)
        place, again = self._short(binary), "run install.sh again"
        if done.code:
            yield failure(f"{place} does not run: {done.last_line}", again)
        elif done.output != f"orchestra {__version__}":
            yield warning(f"{place} is {done.output}, and this is {__version__}", again)

    def _check_daemon(self) -> Iterator[Finding]:
        daemon = self._daemon
        if not daemon["running"]:
            yield warning("the daemon is not running", "orchestra daemon start --detach")
        elif "problem" in daemon:
            text = f"the daemon does not answer: {daemon['problem']}"
            yield failure(text, "orchestra daemon stop")
        elif daemon.get("version") != __version__:
            version = daemon.get("version", "older")
            text = f"the daemon is {version}, and this is orchestra {__version__}"
            yield failure(text, "orchestra daemon restart")
        else:
            pid, watcher = daemon.get("pid"), daemon.get("watcher")
            yield fine(f"{describe_daemon(daemon)}, pid {pid}, watcher {watcher}")

    def _check_notify(self) -> Iterator[Finding]:
        path = notify_path(self.home)
        problem = Notifier.find_problem(path)
        if problem:
            yield warning(f"{self._short(path)} is not run: {problem.message}", problem.hint)

    def _check_login(self) -> Iterator[Finding]:
        is_mac = sys.platform == "darwin"
        service = launchd_plist_path(self.home) if is_mac else systemd_unit_path(self.home)
        if os.path.exists(service):
            yield fine(f"the daemon starts at login: {self._short(service)}")
            return
        try:
            if not is_mac:
                Systemd(self.home, run=self._run).check_manager()
        except SystemdError:  # a container, or no systemd
            reason = "no systemd user manager runs"
            yield fine(f"nothing here could start the daemon at login: {reason}")
            return
        fix = f"orchestra daemon install{'' if is_mac else ' --systemd'}"
        yield warning("the daemon will not start after a reboot", fix)

    def _check_registry(self) -> Iterator[Finding]:
        registry = self._registry
        for problem in registry.problems:
            yield failure(str(problem), problem.hint)
        for remark in registry.remarks(registry.keys):
            yield warning(str(remark), remark.hint or "edit that file")
        projects = {project for project, _ in registry.keys}
        codebases = count_of(len(registry.keys), "codebase")
        yield fine(f"registry: {codebases} in {count_of(len(projects), 'project')}")

    def _check_codebases(self) -> Iterator[Finding]:
        absent: list[str] = []
        for key, codebase in sorted(self._registry.codebases.items()):
            label = label_for(key)
            try:
                plan = Planner(self.home, codebase, self._registry.owners).plan()
            except FolderAbsent as error:
                if load_record(self.home, key):
                    yield warning(f"{label}: was synced here, but {error}", error.hint)
                else:
                    absent.append(label)
                continue
            except (OrchestraError, OSError) as error:
                problem = Problem.from_error(error)
                yield failure(f"{label}: {problem}", problem.hint)
                continue
            for problem in plan.problems(self.home):
                yield failure(str(problem.below(label)), problem.hint)
            for path, note in self._notes_on(plan):
                fix = next(fix for words, fix in NOTE_FIXES.items() if words in note)
                fix = fix.format(label=typed(label), edit_targets=edit_source(self.home, codebase, "targets"))
                said = note.partition("; to replace it: ")[0]  # the fix says the rest
                yield warning(f"{label}: {path}: {said}", fix)
        if absent:
            yield fine(f"not on this machine: {', '.join(absent)}")

    def _check_unregistered(self) -> Iterator[Finding]:
        """Look for the text of codebases whose registry file was removed by hand."""
        for root, key in list_orphans(self.home, {*self._registry.keys}).items():
            record = load_record(self.home, key) or Record()
            looks = [look_at(root, record.agent_at(path)) for path in record.files]
            left = [look.agent.path for look in looks if look.digest in record.known(look.agent.path)]
            synced_at = re.sub("[-:Z]", "", record.synced_at)
            backups = Backups(self.home, key).versions()
            is_retired = any(b.why == Reason.RETIRED and b.when >= synced_at for b in backups)
            if not left or is_retired or self._registry.owners.keys_at(identity_of(root)):
                continue  # renamed, in the last case: its next sync takes all over
            text = f"{label_for(key)} has no registry file any more, but its text is still in {self._short(root)}"
            yield warning(f"{text}: {', '.join(left)}", self._purge_again(root, key))

    def _purge_again(self, root: str, key: Key) -> str:
        """Say how to purge a codebase that is not registered any more."""
        again = f"orchestra init {typed(self._short(root))} -p {typed(key[0])} --name {typed(key[1])}"
        return f"{again} && orchestra project remove {typed(label_for(key))} --purge"

    def _notes_on(self, plan: Plan) -> Iterator[tuple[str, str]]:
        """Iterate over notes on the files that are written, or stay, by path."""
        yield from ((file.path, file.note) for file in find_noted(plan))
        for file in plan.files:
            if not file.note and file.action == Action.KEEP:
                for note in describe_text(file.agent, ABSENT, file.before.data, None):
                    yield file.path, note
        yield from find_shadowing(plan, ALSO_SHADOWING)

    def _check_doubles(self) -> Iterator[Finding]:
        readers: dict[tuple[str, tuple[str, ...]], list[Key]] = {}
        by_path = {agent.path: agent.target for agent in AGENTS.values()}
        defaults = {AGENTS[target].path for target in DEFAULT_TARGETS}
        for key, codebase in sorted(self._registry.codebases.items()):
            paths = managed_files(codebase)
            for reader, joined in JOINED.items():
                twice = tuple(path for path in joined if path in paths)
                if len(twice) > 1 and not defaults.issuperset(twice):
                    readers.setdefault((reader, twice), []).append(key)
        for (reader, twice), keys in readers.items():
            labels = ", ".join(map(label_for, keys))
            text = f"{reader} reads the same text in {' and '.join(twice)}: {labels}"
            extra = next(path for path in reversed(twice) if path not in defaults)
            edit = edit_source(self.home, self._registry.codebases[keys[0]], "targets")
            fix = f"drop the target {by_path[extra]}: {edit}"
            yield warning(text, fix)

    def _check_leftovers(self) -> Iterator[Finding]:
        names = ((file, os.path.basename(file)) for file in files_below(orchestra_root(self.home)))
        files = [file for file, name in names if is_temporary_name(name) and has_exited(parse_temporary(name)[0])]
        # The next fetch of PyYAML cleans up after one that failed.
        others = {daemon_lock_path(self.home), f"{run_dir(self.home)}/pip.lock"}
        for lock in sorted({*files_below(run_dir(self.home))} - others):
            files += [lock] if lock.endswith(".lock") and is_abandoned(lock) else []
        if files:
            text = f"killed commands left {count_of(len(files), 'file')}: {self._short(files[0])}"
            text += " and others" if files[1:] else ""
            # No sync takes the turn of a codebase that is gone: a purge was killed.
            fixes = [
                self._purge_again(root, key)
                for root, key in list_orphans(self.home, {*self._registry.keys}).items()
                if codebase_lock_path(self.home, key) in files and not self._registry.owners.keys_at(identity_of(root))
            ]
            yield warning(text, fixes[0] if fixes else "orchestra sync --all")

    def _check_backups(self) -> Iterator[Finding]:
        files = [file for file in files_below(backups_root(self.home)) if os.path.basename(file) != Backups.NOTES]
        sizes = [os.lstat(file).st_size for file in files]
        kilobytes = -(-sum(sizes) // 1000)
        yield fine(f"backups: {count_of(len(sizes), 'file')}, {kilobytes} kB")


# ── 41 Commands ───────────────────────────────────────────────────────────────

# A command finds what it is about in the registry, leaves the work to the sections
# above, prints the result, and returns the exit status. Only here is anything asked.


class Commands(NamedTuple):
    """One method per command. It prints results, and returns the exit status."""

    home: str
    args: Any  # what CommandLine.parse returns
    environ: Mapping[str, str]

    @property
    def screen(self) -> Screen:
        return Screen.find(self.environ)

    def _say(self, text: str) -> None:
        if not self.args.quiet:
            say(text)

    def _note(self, text: str) -> None:
        self._say(f"note: {text}")

    def _find(self, registry: Registry, name: Optional[str]) -> Key:
        """Find a codebase by its name, or by a path; None is the current folder."""
        if name is None or name.startswith((".", "/", "~")) or name.endswith("/"):
            return self._find_at(registry, name)
        is_name = any(name in (key[1], label_for(key)) for key in registry.keys)
        if os.path.isdir(name) and not is_name:
            return self._find_at(registry, name)
        return registry.find(name, f"orchestra {self.args.line.name}")

    def _find_at(self, registry: Registry, path: Optional[str]) -> Key:
        """Find the codebase that a folder is in; raises UsageError.

        What is in another git worktree means the codebase of the main one. A command
        that changes more than a sync asks for its name there.
        """
        with blame("the current folder"):
            folder = real_path(os.getcwd() if path is None else self._absolute(path))
        shown = "this folder" if path is None else path
        key, is_elsewhere = registry.owners.key_around(folder)
        if key and is_elsewhere:
            found = f"{shown} is in another git worktree of {label_for(key)}"
            is_look = getattr(self.args, "list", False)
            if self.args.line.name in ("project move", "project remove", "restore") and not is_look:
                words = [label_for(key), *filter(None, [getattr(self.args, "path", None)])]
                raise UsageError(found, f"orchestra {self.args.line.name} {' '.join(map(typed, words))}")
            root = shorten_home(self.home, codebase_root(self.home, registry.codebases[key]))
            self._note(f"{found}, whose files are written to {root}")
        if key:
            return key
        for key in registry.broken:
            record = load_record(self.home, key)
            if record and expand_home(self.home, record.root) in climb(folder):
                return key
        if registry.broken:
            report_all(registry.problems)
            raise UsageError(f"no readable registry file names {shown}", "fix the files above first")
        moves = suggest_moves(self.home, registry, folder)
        init = f"orchestra init {typed(path or '.')} -p PROJECT --sync"
        hint = f"{moves[0]} if it is that one; otherwise {init}" if moves else init
        raise UsageError(f"{shown} is not in a registered codebase", hint)

    def _find_all(self, registry: Registry, names: Sequence[str]) -> tuple[list[Key], int]:
        """Find codebases, by default the current folder's; report what is not found."""
        keys: dict[Key, None] = {}
        wanted: list[Optional[str]] = [*names] or [None]
        statuses = [attempt(lambda name=name: keys.setdefault(self._find(registry, name))) for name in wanted]
        return list(keys), max(statuses)

    def _readable(self, registry: Registry, name: Optional[str]) -> Codebase:
        return registry.readable(self._find(registry, name))

    # Help

    def cmd_help(self) -> int:
        args = self.args
        if getattr(args, "version", False):
            print(f"orchestra {__version__}")
            return OK
        line = args.line
        if line.name == "help" and not args.help:
            line = CommandLine(line.table, args.words)
        if line.is_group:
            line.parse()  # or say that there is no such command
        is_asked = args.help or args.line.name == "help"
        notes = HELP_NOTES if is_asked else MORE_HELP
        sys.stdout.write(format_help(line, "" if line.name else notes))
        return OK

    def cmd_completion(self) -> int:
        sys.stdout.write(COMPLETION[self.args.shell])
        return OK

    def cmd_complete(self) -> int:
        """Print what may stand in place of the last word, for the shells."""
        words = self.args.words
        for word, meaning in complete(self.args.line.table, words, self._list_known):
            if word.isprintable():
                print(f"{word}\t{meaning}")
        return OK

    def _list_known(self, kind: str) -> Iterable[str]:
        """List the registered names of a kind; whole labels for a begun word only."""
        keys = find_keys(self.home) if kind in ("CODEBASE", "PROJECT") else []
        if kind == "TARGET":
            return [*AGENTS, *find_custom_targets(self.home)]
        if kind == "PROJECT":
            return sorted({project for project, _ in keys})
        labels = map(label_for, keys if self.args.words[-1:] != [""] else ())
        return [*short_names(keys).values(), *labels]

    # Registering

    def cmd_init(self) -> int:
        path = self._absolute(self.args.path)
        name = self.args.name if self.args.name is not None else os.path.basename(path)
        key, args = (self.args.project, name), self.args
        return self._register(Registration(self.home, key, path, args.type, args.dry_run, args.parts), args.sync)

    def cmd_project_add(self) -> int:
        name = self.args.name
        path = self._absolute(self.args.path if self.args.path is not None else name)
        return self._register(Registration(self.home, (self.args.project or name, name), path, self.args.type))

    def _absolute(self, path: str) -> str:
        if not path:
            raise UsageError("path: expected a folder, got nothing")
        with blame("the current folder"):
            return absolute_path(self.home, path)

    def _register(self, registration: Registration, sync: bool = False) -> int:
        started = time.time() - 0.01  # a file's time may lag by a tick of the kernel's clock
        registered, dry_run = registration.run(), registration.dry_run
        for head, text in registered.lines:
            print(*hang(visible(head), visible(text), self.screen.width if " " in text else 0), sep="\n")
        for note in registered.notes:
            self._note(note)
        key = registered.codebase.key
        if sync and dry_run:
            mode = SyncMode(dry_run=True, take_over=True, accept_empty=True)
            result = sync_codebase(self.home, registered.codebase, None, mode)
        elif sync:
            result = self._sync(load_registry(self.home), SyncScope.codebase(label_for(key)))[0]
            result = count_daemons_files(self.home, result, registration.path, started)
        if sync:
            self._print_results([result], dry_run)
            return report_all(result.errors)
        if dry_run:
            return OK
        registry = load_registry(self.home)
        if key in registry.codebases:
            result = sync_codebase(self.home, registry.codebases[key], registry.owners, SyncMode(dry_run=True))
            for file in result.files:
                if file.is_foreign:
                    self._note(f"{label_for(key)}: {file.path}: {file.note}")
        return OK

    def cmd_project_list(self) -> int:
        registry = load_registry(self.home)
        entries: list[dict[str, Any]] = []
        rows = [("CODEBASE", "TYPE", "PATH")]
        for key in registry.keys:
            codebase = registry.codebases.get(key, Codebase(*key, targets=()))
            path = codebase_root(self.home, codebase)
            types = [part.project_type for part in codebase.projects]
            kind = State.WORDS[State.ERROR][0] if key in registry.broken else ", ".join(dict.fromkeys(types))
            rows.append((label_for(key), kind, shorten_home(self.home, path) or "-"))
            entry = {"project": key[0], "codebase": key[1], "path": path or None, "project_types": types}
            entries.append({**entry, "targets": list(targets_of(codebase))})
        if self.args.json:
            print_json(entries)
        elif entries:
            self.screen.print_table(rows)
        elif not registry.problems:
            self._say(NO_CODEBASES)
        return report_all(registry.problems)

    def cmd_project_move(self) -> int:
        path = self._absolute(self.args.path)
        clear_registry(self.home)
        registry = load_registry(self.home)
        key = self._readable(registry, self.args.codebase).key
        for line in Registration(self.home, key, path, None).move(registry):
            print(visible(line))
        return OK

    def cmd_project_remove(self) -> int:
        registry = load_registry(self.home)
        key = self._find(registry, self.args.codebase)
        codebase, label = registry.codebases.get(key), label_for(key)
        if self.args.purge:
            self._confirm_purge(registry.readable(key), registry.owners)
        if codebase:
            clean_up_codebase(self.home, codebase)
        left = list_written(self.home, codebase) if codebase and not self.args.purge else []
        # It is deregistered first, so that no sync writes again what is purged.
        kept = retire_codebase(self.home, key)
        print(f"removed {label} from the registry; its YAML is kept as {shorten_home(self.home, kept[0])}")
        if list_checkout_folders(self.home, key):
            self._note(f"git keeps this registry: once you push the removal, {label} is gone for everybody")
        if codebase and self.args.purge:
            return self._purge(codebase, registry.owners)
        if left:
            print(f"  left in its folder: {', '.join(left)} (--purge would have taken Orchestra's text out)")
        files = [*kept, os.path.dirname(codebase_path(self.home, key))]
        print("  undo: cp", *(typed(shorten_home(self.home, file)) for file in files))
        return OK

    def _confirm_purge(self, codebase: Codebase, owners: Owners) -> None:
        """Raise OrchestraError if a purge would fail, or the user does not want it."""
        result = sync_codebase(self.home, codebase, owners, SyncMode(dry_run=True, purge=True))
        if result.errors:
            hint = "fix that, then purge again; nothing was changed"
            raise SyncError("\n".join(map(str, result.errors)), hint)
        count = count_of(sum(file.writes for file in result.files), "file")
        root = shorten_home(self.home, codebase_root(self.home, codebase))
        question = f"remove {label_for(codebase.key)} from the registry, and Orchestra's text from {count} in {root}?"
        if sys.stdin.isatty() and not self.args.yes and not ask(question, default=False):
            raise UsageError("nothing was changed")

    def _purge(self, codebase: Codebase, owners: Owners) -> int:
        result = sync_codebase(self.home, codebase, owners, SyncMode(purge=True))
        self._print_result(result)
        if not result.errors:
            remove_private(record_path(self.home, codebase.key))
            return OK
        path = typed(shorten_home(self.home, codebase_root(self.home, codebase)))
        again = f"orchestra init {path} -p {typed(codebase.project)} --name {typed(codebase.name)}"
        return report_all(error._replace(hint=f"fix that; {again}, then remove it again") for error in result.errors)

    # Syncing

    def cmd_sync(self) -> int:
        args = self.args
        if args.codebases and args.all:
            raise UsageError("give either CODEBASE or --all, not both")
        dry_run = args.dry_run or args.check
        cleared = attempt(self._clear_abandoned) if args.all and not dry_run else OK
        registry = load_registry(self.home)
        keys, failed = ([], OK) if args.all else self._find_all(registry, args.codebases)
        if failed and not keys:
            return failed
        scope = SyncScope.all() if args.all else SyncScope.codebase(*map(label_for, keys))
        results = self._sync(registry, scope, dry_run)
        if args.json:
            print_json([self._describe(result) for result in results])
        elif results or registry.stray:
            self._print_results(results, dry_run)
        else:
            self._say(NO_CODEBASES)
        if args.all and results and all(result.is_absent for result in results):
            self._note("no codebase is on this machine, so there was nothing to look at: orchestra status")
        errors = [error for result in results for error in result.errors]
        problems = [*registry.stray, *errors] if args.all else errors
        failed = max(failed, cleared, self._note_remarks(remark for result in results for remark in result.remarks))
        files = [file for result in results for file in result.files]
        is_outdated = args.check and any(file.writes or file.is_foreign for file in files)
        return max(failed, report_all(problems)) or (OUT_OF_DATE if is_outdated else OK)

    def _clear_abandoned(self) -> None:
        """Clean up after a command that was killed while it changed the registry."""
        if is_abandoned(f"{run_dir(self.home)}/{RegistryTurn.LOCK}"):
            clear_registry(self.home)

    def _note_remarks(self, remarks: Iterable[Problem]) -> int:
        """Print notes on registry files, which with --strict are a failure."""
        found = list(dict.fromkeys(remarks))
        for remark in found:
            self._note(visible(str(remark)))
        return FAILED if found and getattr(self.args, "strict", False) else OK

    def _sync(self, registry: Registry, scope: SyncScope, dry_run: bool = False) -> list[SyncCodebaseResult]:
        mode = SyncMode(dry_run, take_over=scope.names is not None)
        results = run_pipeline(self.home, scope, mode, registry, show_progress)
        if not dry_run:
            forget_replaced(self.home, [result.key for result in results])
        return results

    def _print_result(self, result: SyncCodebaseResult) -> None:
        """Print a line per file that was or would be written, and the notes."""
        label = label_for(result.key)
        width = max([8, *(len(file.verb) for file in result.files if file.writes)])
        for file in result.files:
            if file.writes:
                print(f"{file.verb:{width}} {label} {file.path}")
            if file.note:
                self._note(f"{label}: {file.path}: {visible(file.note)}")

    def _print_results(self, results: Sequence[SyncCodebaseResult], dry_run: bool = False) -> None:
        for result in results:
            self._print_result(result)
        print(describe_results(results, dry_run))

    def _describe(self, result: SyncCodebaseResult) -> dict[str, Any]:
        return {
            **pick(result, "project", "codebase", "written", "unchanged", "foreign", "failed"),
            "files": [pick(file, "path", "action", "note") for file in result.files],
            "errors": [str(problem) for problem in result.errors],
            "notes": [str(remark) for remark in result.remarks],
            "absent": result.is_absent,
        }

    # Looking

    def _choose_codebases(self, registry: Registry) -> tuple[list[Key], int]:
        """Find the codebases of `status`: those named, of a project, or all."""
        project = self.args.project
        if self.args.codebases:
            return self._find_all(registry, self.args.codebases)
        if project is None:
            return registry.keys, OK
        keys = [key for key in registry.keys if key[0] == project]
        if not keys:
            like = did_you_mean(project, {key[0] for key in registry.keys})
            raise RegistryError(f'no project is called "{project}"{like}', "orchestra project list")
        return keys, OK

    def cmd_status(self) -> int:
        if self.args.watch:
            return self._watch()
        registry = load_registry(self.home)
        keys, failed = self._choose_codebases(registry)
        status, remarks = scan_staleness(self.home, registry, keys), registry.remarks(keys)
        is_full = self.args.all or bool(self.args.codebases)
        notes = [*replaced_problems(self.home, set(keys), time.time()), *remarks]
        view = StatusView(status, ask_daemon(self.home), notes, is_full)
        if self.args.json:
            print_json(view.as_json())
        elif status.codebases:
            for line in view.format(self.screen.width):
                print(self.screen.paint_words(line, STATE_COLORS))
        elif not (failed or status.stray):
            self._say(NO_CODEBASES)
        failed = max(failed, report_all(status.stray))
        is_broken = any(entry.status == State.ERROR for entry in status.codebases)
        if failed or is_broken or (self.args.strict and remarks):
            return FAILED
        return OUT_OF_DATE if self.args.check and status.summary["stale"] else OK

    def _watch(self) -> int:
        for name in ("json", "check", "strict"):
            if getattr(self.args, name):
                raise UsageError(f"give either --watch or --{name}, not both")

        def scan() -> Status:
            registry = load_registry(self.home)
            is_named, project = bool(self.args.codebases), self.args.project
            keys = [key for key in registry.keys if (key in chosen if is_named else project in (None, key[0]))]
            return scan_staleness(self.home, registry, keys)

        if not (sys.stdin.isatty() and sys.stdout.isatty()) or self.environ.get("TERM") == "dumb":
            raise UsageError("--watch needs a terminal", "orchestra status")
        chosen, failed = self._choose_codebases(load_registry(self.home))
        if failed:
            return failed
        show_live(LiveStatus(self.home, scan), self.screen)
        return OK

    def cmd_diff(self) -> int:
        registry = load_registry(self.home)
        keys, failed = self._find_all(registry, self.args.codebases)
        parts: list[str] = []

        def compare(key: Key) -> None:
            text, problems = diff_codebase(self.home, registry.readable(key), registry.owners)
            parts.append(text)
            if problems:
                raise error_for(problems)

        failed = max([failed, *(attempt(compare, key) for key in keys)])
        text = "".join(parts)
        self._show(self.screen.paint_diff(text))
        return failed or (OUT_OF_DATE if self.args.exit_code and text else OK)

    def _show(self, text: str) -> None:
        """Print a long text, on a terminal by the user's pager."""
        is_dumb = self.environ.get("TERM", "dumb") == "dumb"  # pagers complain there
        is_paged = text and sys.stdout.isatty() and not (self.args.no_pager or is_dumb)
        if not (is_paged and run_pager(self.environ, text)):
            sys.stdout.write(text)

    def cmd_show(self) -> int:
        registry = load_registry(self.home)
        codebase = self._readable(registry, self.args.codebase)
        label, name, target = label_for(codebase.key), self.args.codebase, self.args.target
        part = "" if name in (codebase.name, label) else find_part(self.home, codebase, self._absolute(name or "."))
        if self.args.origin:
            rows = [("WHAT", "FROM", "TEXT")]
            for key, whole, file in trace_origins(self.home, codebase):
                text = whole.partition("\n")[0]
                rows.append((key, file, text if len(text) <= 60 else f"{text[:57]}..."))
            self.screen.print_table(rows)
            if part:
                self._note(f"this is for all of {label}; what is for {part} alone is from {label}.yaml")
            return OK
        shown = codebase._replace(targets=(target,)) if target else codebase
        files = preview_files(self.home, shown, registry.owners)
        agents = [*managed_files(shown).values()]
        of_part = [agent for agent in agents if part and agent.part == part]
        path = next((agent.path for agent in of_part or agents if agent.target == target), "")
        if target and not path:
            names = [*AGENTS, *(custom.target for custom in codebase.custom_targets)]
            like = did_you_mean(target, names) or f": expected {' | '.join(names)}"
            raise UsageError(f'show: no target is called "{visible(target)}"{like}')
        told = codebase_of_part(codebase, part) if of_part else codebase
        text = files[path].decode("utf-8", "replace") if target else render_text(told, render_body(told))
        self._show(show_hidden(text))
        if of_part:
            self._note(f"this is for {part} alone; the codebase's: orchestra show {typed(label)}")
        for agent in of_part or agents:
            data = files[agent.path]
            size = describe_size(agent, data) if data else "not written: there is nothing to add to your own text"
            self._note(f"{agent.path}: {size}")
        return OK

    def cmd_schema(self) -> int:
        print(describe_registry(), end="")
        return OK

    # Restoring and editing

    def cmd_restore(self) -> int:
        args = self.args
        if args.path is None and args.codebase and is_managed_path(args.codebase):
            args.codebase, args.path = None, args.codebase
        registry = load_registry(self.home)
        try:
            key = self._find(registry, args.codebase)
            codebase = None if args.list else registry.readable(key)
        except OrchestraError as error:
            error.hint = suggest_old_backups(self.home, registry, args.codebase) or error.hint
            raise
        label = label_for(key)
        if codebase is None:
            rows = [("WHEN (UTC)", "LOCAL TIME", "FILE", "WHY")]
            for backup in Backups(self.home, key).versions():
                rows.append((backup.when, local_time(backup.when), backup.path, backup.why))
            if rows[1:]:
                self.screen.print_table(rows)
            else:
                self._say(f"{label}: no backups yet")
            return OK
        for backup in choose_backups(self.home, codebase, args.path, args.at):
            changed = restore_file(self.home, codebase, backup)
            print(f"{'restored' if changed else 'unchanged'} {label} {backup.path} ({backup.when})")
        forget_replaced(self.home, [key])
        self._note(
            f"the next sync replaces it again; to keep a change, put it in the registry: orchestra edit {typed(label)}"
        )
        return OK

    def cmd_edit(self) -> int:
        """Open the file in the editor until it is right, or the user gives up."""
        key = self._find(load_registry(self.home), self.args.codebase)
        while True:
            run_editor(self.environ, codebase_path(self.home, key))
            registry = load_registry(self.home)
            self._note_remarks(registry.remarks([key]))
            if key not in registry.broken:
                print(f"ok {label_for(key)}")
                return OK
            failed = report_all(registry.broken[key])
            if not ask("open it again?", default=True):
                return failed

    # Looking after the installation

    def cmd_doctor(self) -> int:
        findings = list(dict.fromkeys(Doctor(self.home, self.environ).findings()))
        levels = Counter(finding.level for finding in findings)
        failures, warnings = levels[Level.FAILURE], levels[Level.WARNING]
        if self.args.json:
            print_json({"failures": failures, "warnings": warnings, "findings": [f._asdict() for f in findings]})
        else:
            rows: list[tuple[str, str]] = []
            for finding in findings:
                rows.append((f"{finding.level:4}", finding.text))
                rows += [("", f"fix: {finding.fix}")] if finding.fix else []
            self.screen.print_table(rows, Level.COLORS)
            print(f"\n{count_of(failures, 'failure')}, {count_of(warnings, 'warning')}")
        return OUT_OF_DATE if failures or warnings else OK

    # The daemon

    def cmd_daemon_start(self) -> int:
        if not self.args.detach:
            return start_blocking(self.home, self.environ)
        DaemonSocket(self.home, 0).close()  # fails if another one runs
        return self._start_detached("started")

    def _start_detached(self, verb: str) -> int:
        pid = Service(self.home).start_detached(lambda: attempt(start_blocking, self.home, self.environ))
        print(f"daemon {verb}, pid {pid}")
        return OK

    def cmd_daemon_restart(self) -> int:
        has_plist = sys.platform == "darwin" and os.path.exists(launchd_plist_path(self.home))
        if not has_plist and not os.path.exists(systemd_unit_path(self.home)):
            verb = "restarted" if is_locked(daemon_lock_path(self.home)) else "started"
            Service(self.home).stop_daemon()
            return self._start_detached(verb)
        service = self._supervise(by_systemd=not has_plist)  # of this version
        print(f"daemon restarted, pid {service.daemon_pid()}")
        return OK

    def cmd_daemon_stop(self) -> int:
        try:
            request_stop(self.home)
        except DaemonNotRunning as error:
            print(error)
            return OK
        print("daemon stop requested")
        if sys.platform == "darwin" and os.path.exists(launchd_plist_path(self.home)):
            self._note("launchd restarts it; to stop it for good: orchestra daemon uninstall")
        return OK

    def cmd_daemon_status(self) -> int:
        try:
            status = request_status(self.home)
        except DaemonNotRunning as error:
            status = {"running": False, "socket": error.socket}
        if self.args.short:
            print(describe_daemon(status))
            return OK
        print_json(status)
        if status.get("running") and status.get("version") != __version__:
            self._note(describe_daemon(status))
        return OK

    def cmd_daemon_logs(self) -> int:
        errors = stderr_log_path(self.home)
        paths = [errors] if self.args.stderr_only else [stdout_log_path(self.home), errors]
        logs = [LogReader(path) for path in paths]
        for path, log in zip(paths, logs):
            if len(paths) > 1:
                print(f"==> {shorten_home(self.home, path)} <==", flush=True)
            sys.stdout.buffer.write(log.tail(self.args.lines))
        while self.args.follow:  # the first log alone: it has the warnings too
            sys.stdout.buffer.write(logs[0].read())
            sys.stdout.flush()
            time.sleep(0.2)
        return OK

    # Installing

    def _supervise(self, by_systemd: bool) -> Service:
        """Install the program, and have a supervisor run it."""
        installer = Installer(self.home, self.environ, say)
        if by_systemd:
            systemd = Systemd(self.home)
            systemd.check_manager()
            install_systemd(systemd, installer.install())
            return systemd
        launchd = Launchd(self.home)
        launchd.check_session()
        install_launchd(launchd, installer.install())
        return launchd

    def cmd_daemon_install(self) -> int:
        service = self._supervise(self.args.systemd)
        print(f"installed {service.label}: {shorten_home(self.home, service.file)}")
        if self.args.systemd:
            self._note("it runs while you are logged in; to keep it running: loginctl enable-linger")
        return OK

    def cmd_daemon_uninstall(self) -> int:
        by_systemd = self.args.systemd
        label = Systemd.label if by_systemd else Launchd.label
        was_installed = uninstall_systemd(Systemd(self.home)) if by_systemd else uninstall_launchd(Launchd(self.home))
        print(f"uninstalled {label}" if was_installed else f"{label} was not installed")
        return OK

    def cmd_self_install(self) -> int:
        """Do what install.sh needs Python for: the program, PyYAML, the link."""
        installer = Installer(self.home, self.environ, say)
        installer.check_link()
        installer.install()
        print(f"installed {shorten_home(self.home, installer.make_link())}")
        return OK

    def cmd_self_uninstall(self) -> int:
        """Do what install.sh --uninstall needs Python for: clean up after syncs."""
        if not os.path.isdir(run_dir(self.home)):
            return OK
        with suppress(OrchestraError):  # not fetched only to be removed; loading reports it
            Installer(self.home, {**self.environ, "ORCHESTRA_NO_FETCH": "1"}, say).ensure_yaml()
        statuses = [attempt(clear_registry, self.home)]
        registry = load_registry(self.home)
        statuses.append(report_all(registry.problems))  # what syncs of these left is unknown
        for codebase in registry.codebases.values():
            statuses.append(attempt(clean_up_codebase, self.home, codebase))
        return max(statuses)


# ── 42 Command line ───────────────────────────────────────────────────────────

# A new command is a row in COMMANDS and a method above, which `main` finds by its name:
# cmd_daemon_start is `daemon start`. The help and the completion follow from the row. A
# new option is an argument in the row, and its value is `self.args.NAME` in the method.
# README.md names each command.

START, DAILY, MANAGE = "Start", "Every day", "Manage"
A_CODEBASE = "a name (api), PROJECT/name or a path; default: this folder"
CODEBASE = argument("codebase", metavar="CODEBASE", nargs="?", help=A_CODEBASE)
CODEBASES = argument("codebases", metavar="CODEBASE", nargs="*", help=A_CODEBASE)
TYPE = argument("-t", "--type", choices=PROJECT_TYPES, help=f"{' | '.join(PROJECT_TYPES)}; default: detected")
JSON = switch("--json", help="print JSON")
STRICT = switch("--strict", help="exit 2 if a registry file has keys that are ignored")
NO_PAGER = switch("--no-pager", help="print it at once, also on a terminal")
SYSTEMD = switch("--systemd", help="with the systemd of Linux instead")
COMMANDS = {
    "": command(
        (__doc__ or "").partition(".\n")[0],
        switch("-V", "--version", help="show the version"),
        needs_yaml=False,
    ),
    "init": command(
        "register a folder",
        argument("path", metavar="PATH", nargs="?", default=".", help="the folder; default: this one"),
        argument("-p", "--project", required=True, help="the project it belongs to"),
        TYPE,
        argument("--name", help="the codebase's name; default: the folder's"),
        switch("--sync", help="write the instruction files at once"),
        switch("--parts", help="give the packages of a workspace files of their own"),
        switch("--dry-run", help="only show what was found, and would be registered"),
        heading=START,
    ),
    "edit": command("edit its registry file, and check it", CODEBASE, heading=START),
    "status": command(
        "show what is out of date, and the daemon",
        CODEBASES._replace(help="a name (api), PROJECT/name or a path; default: all"),
        argument("--project", help="only this project's codebases"),
        switch("--all", help="list those that are current, too"),
        switch("--watch", help="keep it on the screen, with what the daemon does"),
        switch("--check", help="exit 1 if anything is out of date"),
        STRICT,
        JSON,
        heading=DAILY,
    ),
    "sync": command(
        "write what is out of date",
        CODEBASES,
        switch("--all", help="every registered codebase"),
        switch("--dry-run", help="only show what would be written"),
        switch("--check", help="write nothing; exit 1 if anything is out of date"),
        STRICT,
        JSON,
        heading=DAILY,
    ),
    "diff": command(
        "show what sync would write",
        CODEBASES,
        switch("--exit-code", help="exit 1 if there is a difference"),
        NO_PAGER,
        heading=DAILY,
    ),
    "show": command(
        "show what an agent is told, and its size",
        CODEBASE,
        argument("--target", help="the whole file of this target"),
        switch("--origin", help="list which file of the registry each piece is from"),
        NO_PAGER,
        heading=DAILY,
    ),
    "restore": command(
        "bring back a file that a sync replaced",
        CODEBASE,
        argument("path", metavar="PATH", nargs="?", help="default: every file that the last sync replaced"),
        switch("--list", help="list the backups"),
        argument("--at", metavar="TIME", help="'10 min ago', yesterday, 2026-11-29, 14:05, or from --list"),
        heading=DAILY,
    ),
    "project": command("list, add, move or remove codebases", heading=MANAGE),
    "project list": command("list the registered codebases", JSON),
    "project add": command(
        "register a folder under a name",
        argument("name", metavar="NAME", help="the codebase's name"),
        argument("-p", "--project", help="the project it belongs to; default: NAME"),
        TYPE,
        argument("--path", metavar="DIR", help="the folder; default: NAME, in the current folder"),
    ),
    "project move": command(
        "say where a codebase's folder is now",
        argument("codebase", metavar="CODEBASE", help="a name (api) or PROJECT/name"),
        argument("path", metavar="PATH", help="the folder it moved to"),
    ),
    "project remove": command(
        "remove a codebase from the registry; its files stay",
        argument("codebase", metavar="CODEBASE", help="a name (api), PROJECT/name or a path"),
        switch("--purge", help="also remove Orchestra's files and blocks from it"),
        switch("-y", "--yes", help="ask nothing before a purge"),
    ),
    "daemon": command("sync automatically in the background", heading=MANAGE),
    "daemon start": command(
        "run the daemon in the foreground",
        switch("--detach", help="run it in the background, and return when it answers"),
    ),
    "daemon stop": command("stop the daemon", needs_yaml=False),
    "daemon restart": command("stop the daemon, and start it again in the background"),
    "daemon status": command(
        "print the daemon's state as JSON",
        JSON,
        switch("--short", help="print one line instead"),
        needs_yaml=False,
    ),
    "daemon install": command("start it now and at each login, with macOS's launchd", SYSTEMD, needs_yaml=False),
    "daemon uninstall": command("stop it for good, if it was installed", SYSTEMD, needs_yaml=False),
    "daemon logs": command(
        "print the end of the logs",
        argument("--lines", metavar="N", type=parse_count, default=100, help="lines of each log; default: 100"),
        switch("--stderr-only", help="only daemon-err.log: warnings and errors"),
        switch("-f", "--follow", help="keep printing new lines"),
        needs_yaml=False,
    ),
    "doctor": command("check this installation, and say how to fix it", JSON, needs_yaml=False, heading=MANAGE),
    "schema": command("print the JSON Schema of registry files", needs_yaml=False, heading=MANAGE),
    "help": command(
        "explain a command",
        argument("words", metavar="COMMAND", nargs="*", help="default: all commands"),
        needs_yaml=False,
        heading=MANAGE,
    ),
    "completion": command(
        "print what makes bash, zsh or fish complete",
        argument("shell", metavar="SHELL", choices=tuple(COMPLETION), help=" | ".join(COMPLETION)),
        needs_yaml=False,
        heading=MANAGE,
    ),
    # For the completion scripts, and two for install.sh.
    "complete": command("", argument("words", nargs="*"), needs_yaml=False),
    "self-install": command("", needs_yaml=False),
    "self-uninstall": command("", needs_yaml=False),
}


def find_home(environ: Mapping[str, str]) -> str:
    home = environ.get("HOME", "")
    if not os.path.isabs(home):
        raise UsageError(f"HOME: expected an absolute path, got {home!r}", "export HOME=/path/to/your/home")
    return os.path.normpath(home)


def user_name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)  # a container's, or a directory service does not answer


def check_owner(home: str, uid: Optional[int] = None) -> None:
    """Raise UsageError if Orchestra cannot write here, or would lock the owner out.

    Root may write anywhere, but in another user's home folder it would leave files
    that this user cannot change.
    """
    uid = os.geteuid() if uid is None else uid
    folder = home
    while uid == 0 and not os.path.exists(folder):
        folder = os.path.dirname(folder)  # root can create the rest of it
    for path, name in ((folder, "HOME"), (orchestra_root(home), "~/.orchestra")):
        try:
            owner = os.stat(path).st_uid
        except OSError:
            continue  # whatever writes there reports it
        if owner == uid or (uid and os.access(path, os.W_OK | os.X_OK)):
            continue
        names = f"user {user_name(owner)}, and this is {user_name(uid)}"
        if uid and path != folder:
            hint = f"sudo chown -R {typed(user_name(uid))} {typed(path)}"
        else:
            hint = f"run it as {user_name(owner)}, or set HOME"
        raise UsageError(f"{name} belongs to {names}: {path}", hint)


def prepare_streams() -> None:
    """Let any text be printed, even to closed streams, and a closed one be read.

    They are opened on /dev/null, so that no other file gets descriptors 0 to 2.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def main(argv: Optional[Sequence[str]] = None, environ: Mapping[str, str] = os.environ) -> int:
    """Run one command and return its exit status."""
    import gc

    gc.set_threshold(10000)  # objects; cycles are rare here, and looking for them is slow
    prepare_streams()
    try:
        line = CommandLine(COMMANDS, sys.argv[1:] if argv is None else argv)
        args = line.parse()
        if args.help or line.is_group or line.name == "help":
            status = Commands("", args, environ).cmd_help()
        else:
            home = find_home(environ)
            check_owner(home)
            if line.command.needs_yaml:
                Installer(home, environ, say).ensure_yaml()
            if args.quiet:
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            method = "cmd_" + re.sub("[ -]", "_", line.name)
            status = getattr(Commands(home, args, environ), method)()
        sys.stdout.flush()
        return int(status)
    except BrokenPipeError:
        discard_output(1)  # the reader (head, less) has exited
        return FAILED
    except (OrchestraError, OSError) as error:
        problem = Problem.from_error(error)
        if isinstance(error, OSError) and not error.filename:  # only writes to stdout have no file name
            discard_output(1)
            problem = Problem("stdout", explain_os_error(error))
        return report_all([problem])
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:  # a bug: Python's own exit status, 1, would mean OUT_OF_DATE
        import traceback

        traceback.print_exc()
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
# The last line: install.sh takes no copy without it.
