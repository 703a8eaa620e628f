#!/usr/bin/env python3
"""The tests of orchestra.py.

    python3 test_orchestra.py [bench [peers] | soak] [pytest's arguments]

Runs on Python 3.9 or newer; where pytest or PyYAML is missing, a virtual environment
is made beside this file. Without arguments, ORCHESTRA_PROCESSES=2 share the tests, and
report one after the other. `bench` prints a table of measurements instead, taken in
ORCHESTRA_BENCH_IN (ORCHESTRA_MOST=1000 leaves out the largest registry,
ORCHESTRA_IDLE=20 shortens the idle watch); `bench peers` compares Orchestra with other
programs of its kind, which npm fetches; `soak` runs the tests that take minutes:
ORCHESTRA_SOAK seconds each, the long run ORCHESTRA_LONG_RUN; ORCHESTRA_SEED=N repeats
what a failure names.

Contents
  Helpers                  Home: a home folder with its registry, codebases and daemon.
                           Files and pictures of the disk; wait_until, the one wait.
  The shape of the file    What keeps orchestra.py readable: its map, its layers, where
                           effects live, limits on lengths and names.

  The sections of orchestra.py follow, in its order and under its banners, as
  `grep -n '^# [─═]'` lists them. A test stands under the section whose code it checks; a
  new case is a row of its table. An agent's expected text is in Agents and Text;
  registry files that are refused are BAD_FILES in YAML; what a command prints is under
  the section that does its work: init in Registering, sync and restore in Sync, diff
  and show in Status and diff, status in Status screen, daemon in Logs, Daemon and
  Services, doctor in Doctor, others in Commands.

  Every step interrupted   Each change of the disk, killed after every operation and
                           failing at every one. A new command is a row of SCENARIOS.
  Random histories         A user and Orchestra take turns at random; pictures of the
                           disk tell what was lost. A new act is a method of History.
  Races                    A save at the worst instant, and editors that save in a loop.
                           A new instant is a test; a new way to save a row of WHOLE_SAVES.
  Sharing                  Registries that travel by git: two homes, two daemons, and what
                           git does to files. A new place for a clone is a row of CLONES.
  Fuzzing                  Odd bytes for everything that reads: at most a problem, in
                           bounded time and memory. A new reader is a test with `dose`.
  The long run             A daemon under turmoil for minutes: true to the disk, and small.
                           A new trouble is an act of Turmoil.
  Start-up                 The modules that a command may load. A module that costs
                           time is a word in HEAVY.
  The README               What it tells people to type, typed in four shells, and what
                           it shows. A new section is a row of PASTED or of ELSEWHERE.
  Benchmarks               Figures, each beside a yardstick of the same minute. A new
                           one is a bench_ function that measure_all calls, another
                           program to compare with a row of PEERS.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import errno
import fcntl
import functools
import gc
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import plistlib
import random
import re
import resource
import select
import selectors  # noqa: F401 before a stand-in for kqueue can mislead it
import shlex
import shutil
import signal
import socket
import stat
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import termios
import threading
import time
import traceback
import types
import weakref
import zipfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

HERE = Path(__file__).resolve().parent
NEEDED = "import pytest, yaml"


def run_in_own_environment() -> None:
    """Start this file again in a virtual environment that has what the tests need."""
    folder = HERE / ".venv-tests" / f"py{sys.version_info[0]}.{sys.version_info[1]}"
    python = folder / "bin" / "python"
    if not is_ready(python):
        if importlib.util.find_spec("ensurepip") is None:
            give_up("this Python cannot make virtual environments: apt install python3-venv")
        print(f"making {folder} with pytest and PyYAML", file=sys.stderr)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["pytest", "PyYAML", "jsonschema"]
        for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], pip):
            if subprocess.call(command, stdin=subprocess.DEVNULL):
                give_up(f"this failed: {' '.join(command)}")
        if not is_ready(python):
            give_up(f"pytest and PyYAML are in {folder}, but cannot be imported")
    os.execv(python, [str(python), __file__, *sys.argv[1:]])


def is_ready(python: Path) -> bool:
    return python.exists() and not subprocess.call([str(python), "-c", NEEDED], stderr=subprocess.DEVNULL)


def give_up(why: str) -> None:
    print(f"{Path(__file__).name}: {why}", file=sys.stderr)
    sys.exit(2)


try:
    import pytest
    import yaml
except ImportError:
    if __name__ != "__main__":
        raise
    run_in_own_environment()

import orchestra  # noqa: E402 - the environment comes first

SCRIPT = HERE / "orchestra.py"
NOBODY = 65534
IS_LINUX = sys.platform.startswith("linux")
HAS_KQUEUE = hasattr(select, "kqueue")
ALL_TARGETS = ["claude", "codex", "gemini", "copilot", "cursor", "windsurf", "cline", "antigravity"]  # of all kinds
SOAK_SECONDS = float(os.environ.get("ORCHESTRA_SOAK") or 300)
SEED = int(os.environ.get("ORCHESTRA_SEED") or 0)  # 0: a new one for each soak

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell script's background job ignores it, and its children would too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# ── Helpers ───────────────────────────────────────────────────────────────────

API = ("shop", "api")
BEGIN, END = orchestra.BLOCK_BEGIN.encode(), orchestra.BLOCK_END.encode()
CLINE, COPILOT = ".clinerules/orchestra.md", ".github/copilot-instructions.md"
CURSOR = ".cursor/rules/orchestra.mdc"
DEAD = 2**22 + 1  # no process has such a number: proc(5), pid_max
KILLED = "killed"


# Files


def put_files(root: Path, files: dict[str, Any]) -> None:
    """Write each file's text or bytes; None makes a folder, a function makes the file."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        elif callable(content):
            content(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def replace(file: Path, text: str) -> Path:
    """Save as most editors do: a reader sees the old text or the new."""
    temporary = file.with_name(f".{file.name}.new")
    temporary.write_text(text)
    temporary.replace(file)
    return file


def edit(file: Path, old: str, new: str) -> bytes:
    """Edit a file by hand, and return its new bytes."""
    data = file.read_bytes()
    assert old.encode() in data
    file.write_bytes(data.replace(old.encode(), new.encode(), 1))
    return file.read_bytes()


class Seen(NamedTuple):
    """What stands at a path; a folder's inode and time change with what is in it."""

    kind: str
    mode: int = 0
    data: bytes = b""  # of a link, where it leads
    inode: int = 0
    mtime: int = 0


def look_at(path: str) -> Seen:
    info = os.lstat(path)
    mode, age = stat.S_IMODE(info.st_mode), (info.st_ino, info.st_mtime_ns)
    if stat.S_ISDIR(info.st_mode):
        return Seen("folder", mode)
    if stat.S_ISLNK(info.st_mode):
        return Seen("link", mode, os.readlink(path).encode(), *age)
    if stat.S_ISREG(info.st_mode):
        return Seen("file", mode, Path(path).read_bytes(), *age)
    return Seen("special", mode, b"", *age)


def take_picture(top: Any) -> dict[str, Seen]:
    """Return all that stands below a folder, by its path from there."""
    paths = [os.path.join(at, name) for at, folders, files in os.walk(top) for name in (*folders, *files)]
    return {os.path.relpath(path, top): look_at(path) for path in paths}


def without_age(picture: dict[str, Seen]) -> dict[str, Seen]:
    """Leave out what differs from run to run."""
    return {path: seen._replace(inode=0, mtime=0) for path, seen in picture.items()}


def tree(root: Path) -> dict[str, Seen]:
    """Return the files below a folder; not the cache of parsed files, which any look fills."""
    picture = take_picture(root).items()
    return {path: seen for path, seen in picture if seen.kind != "folder" and "run/parsed." not in path}


def contents(root: Path) -> dict[str, bytes]:
    return {path: seen.data for path, seen in tree(root).items()}


def run_git(folder: Path, *argv: str) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "init.defaultBranch=one", "-c", "gc.auto=0"]
    environ = {**os.environ, "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(["git", *identity, *argv], cwd=folder, check=True, capture_output=True, env=environ)


needs_leases = pytest.mark.skipif(not IS_LINUX, reason="only Linux knows who has a file open for writing")


def hide_writers(monkeypatch: Any) -> None:
    """Hide who writes to a file, as where the system has no leases."""
    monkeypatch.setattr(orchestra, "has_writer", lambda fd: None)
    monkeypatch.setattr(orchestra, "find_busy_files", frozenset)


def refuse(reason: Any, path: str = "") -> Callable[..., Any]:
    """Make a function that raises an error, or an errno's; with a path, as Orchestra's own do."""

    def fail(*args: Any, **options: Any) -> Any:
        error = OSError(reason, os.strerror(reason)) if isinstance(reason, int) else reason
        raise orchestra.IoError(path, error) if path else error

    return fail


# Codebases and their text


def codebase_with(**values: Any) -> orchestra.Codebase:
    return orchestra.Codebase("shop", "api", "/code/api", **values)


def block(text: str = "x") -> bytes:
    return BEGIN + f"\n{text}\n".encode() + END


def seal(data: bytes) -> bytes:
    """Seal a changed text, as if Orchestra had written it."""
    head, banner, text = re.split(rb"(<!-- Written by Orchestra .*-->)", data)
    right = orchestra.seal_of(text.rpartition(END)[0] or text).encode()
    return head + re.sub(rb"\((.*)\)", b"(%b)" % right, banner) + text


HOSTILE = [
    *("-->", "<!-->", "<!-- orchestra:end -->", "<!-- orchestra:begin -->\n<!-- orchestra:end -->"),
    *("x\n<!-- orchestra:end -->\ny", "a | b\n|---|---|", "one\r\ntwo\rthree\nfour"),
    *("see @README.md", "`@in/span` and @outside", "``a ` @in`` @out", "a ` b @README.md", "mail me@example.org"),
    *("@first\n@second (@third, @fourth)", "@~/secret and @./here and @/etc/passwd"),
    *("```\n@in/fence\n```\n@behind/fence", "```\n@in/fence never closed", "~~~\n```\n@in\n~~~\n@out"),
    *("````\n```\n@in\n````", "`", "```", "\x85\n\n~~~", " x\n\n```", "  \n\n```", "a\n\n\f~~~", " ]()\n\n<?"),
    *("\x00\x07\x1b[31mred\x85\u2028\u2029\ufeff\x7f", "\ud800", "---\ntrigger: manual\n---", "# heading", "   "),
    *("key: value # comment", "'quoted' \"twice\"", "{title} {0} %s"),
]


AGENTS_BY_PATH = {agent.path: agent for agent in orchestra.AGENTS.values()}


def hostile_codebase(text: str, targets: Any = tuple(orchestra.AGENTS)) -> orchestra.Codebase:
    name = " ".join(text.split())[:90].replace("/", "-") or "x"
    task = orchestra.Task(text, text, "pending", text)
    component = orchestra.Component(text, "ml", (task,), (orchestra.AgentRole(text, text, (text,)),))
    return orchestra.Codebase(
        *("shop", name, "/code/api", text, targets),
        commands=((text, text),),
        conventions=(text, text),
        notes=(text,),
        skills=(orchestra.Skill(text, text),),
        projects=(component,),
    )


@pytest.fixture(params=["libyaml", "pure Python"])
def loader(request: Any, monkeypatch: Any) -> Any:
    """Read YAML with each of PyYAML's two parsers."""
    if request.param == "libyaml" and not yaml.__with_libyaml__:
        pytest.skip("this PyYAML has no libyaml")
    monkeypatch.setattr(yaml, "__with_libyaml__", request.param == "libyaml")
    orchestra.text_loader.cache_clear()
    yield request.param
    orchestra.text_loader.cache_clear()


# Time and processes


class Clock:
    """A clock that moves only when a test moves it."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def wait_until(is_true: Callable[[], Any], timeout: float = 30, describe: Callable[[], Any] = str) -> None:
    """Wait for what must come true within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not is_true():
        assert time.monotonic() < deadline, f"waited in vain {describe()}"
        time.sleep(0.002)


class Ran(NamedTuple):
    """What a command left: its exit status and its output."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines about files that were written, or are to be."""
        return [line for line in self.out.splitlines() if not re.match(r"\d+ (written|to write), ", line)]

    @property
    def complaints(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("orchestra: ")]


def finish(process: subprocess.Popen[str], timeout: float = 60) -> Ran:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Ran(process.returncode, out, err)


class Child:
    """Work in a forked process; what it returns comes back as JSON."""

    def __init__(self, work: Callable[[Callable[[], bool]], Any]) -> None:
        self.reader, writer = os.pipe()
        self.is_over, self.end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            gc.disable()  # it would touch, and so copy, all of the parent's memory
            try:
                result = [work(lambda: bool(select.select([self.is_over], [], [], 0)[0]) or os.getppid() == 1), ""]
            except BaseException:
                result = [None, traceback.format_exc()]
            with open(writer, "wb") as pipe:
                pipe.write(json.dumps(result).encode())
            os._exit(0)
        os.close(writer)

    def stop(self) -> Any:
        """Tell the work that it is over, and wait for its result."""
        os.write(self.end, b"x")
        return self.wait()

    def wait(self) -> Any:
        """Return what the work returned, as JSON has it, or KILLED."""
        with open(self.reader, "rb") as pipe:
            report = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        os.close(self.is_over)
        os.close(self.end)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return KILLED
        result, failure = json.loads(report)
        assert not failure, failure
        return result


def run_in_child(work: Callable[[], Any]) -> Any:
    return Child(lambda is_over: work()).wait()


def run_as_nobody(work: Callable[[], Any]) -> Any:
    """Call `work` in a child process that has given up being root."""
    orchestra._find_rename()  # imports what the child may not be able to read

    def work_as_nobody() -> Any:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        return work()

    return run_in_child(work_as_nobody)


def memory_of(pid: int) -> int:
    """Return the resident memory of a process, in bytes."""
    if IS_LINUX:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)], text=True)) * 1024


def cpu_seconds(pid: int) -> float:
    """Return the CPU time a process has used so far."""
    if IS_LINUX:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    said = subprocess.check_output(["ps", "-o", "time=", "-p", str(pid)], text=True).strip()
    seconds = 0.0
    for part in re.split("[-:]", said):  # of minutes and seconds, on macOS with hundredths
        seconds = seconds * 60 + float(part)
    return seconds


def cpu_seconds_within(seconds: float, pid: int) -> float:
    before = cpu_seconds(pid)
    time.sleep(seconds)
    return cpu_seconds(pid) - before


def read_all(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


def read_line(client: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        more = client.recv(1)
        assert more, data
        data += more
    return data


# The world


class Home:
    """A home folder, its registry, the codebases beside it, and its processes."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.path = str(self.folder / "home")
        self.code = self.folder / "code"
        self.environ = {"HOME": self.path}  # of commands that run in this process
        self.daemons: list[subprocess.Popen[Any]] = []
        self.cleanup = ExitStack()
        self.cleanup.callback(shutil.rmtree, self.folder)
        os.mkdir(self.path)
        self.code.mkdir()

    def move(self, name: str) -> None:
        """Rename the home folder."""
        moved = self.folder / name
        os.rename(self.path, moved)
        self.path = self.environ["HOME"] = str(moved)

    # The registry: `register` takes values and `save` a note; both make what is valid.

    @property
    def projects(self) -> Path:
        return Path(orchestra.projects_root(self.path))

    @property
    def record(self) -> Path:
        return Path(orchestra.record_path(self.path, API))

    def file(self, label: str = "shop/api") -> Path:
        return self.projects / f"{label}.yaml"

    def write_registry(self, name: str, text: Any) -> Path:
        """Write a file below projects/: text as it is, a mapping as YAML."""
        if not isinstance(text, (str, bytes)):
            text = yaml.safe_dump(text, sort_keys=False, allow_unicode=True)
        put_files(self.projects, {name: text})
        return self.projects / name

    def register(self, label: str = "shop/api", **values: Any) -> Path:
        """Register a codebase by hand; its text says at least a note, unless it is to say nothing."""
        named = {"name": label.split("/")[1], "path": str(self.code / label), "notes": ["noted"]}
        return self.write_registry(f"{label}.yaml", {**named, **values})

    def make_codebase(self, label: str = "shop/api", files: dict[str, Any] = {}, **values: Any) -> Path:
        """Make a codebase's folder with some files in it, and register it by hand."""
        root = self.code / label
        root.mkdir(parents=True, exist_ok=True)
        put_files(root, files)
        self.register(label, **values)
        return root

    def make_synced(self, label: str = "shop/api", files: dict[str, Any] = {}, **values: Any) -> Path:
        root = self.make_codebase(label, files, **values)
        self.sync()
        return root

    def text(self, label: str = "shop/api", note: str = "first") -> str:
        root = self.code / label
        root.mkdir(parents=True, exist_ok=True)
        return f"name: {label.split('/')[1]}\npath: {root}\ntargets: [claude]\nnotes:\n- {note}\n"

    def save(self, label: str = "shop/api", note: str = "first") -> Path:
        """Save a registry file as an editor does, and make the codebase's folder."""
        file = self.file(label)
        file.parent.mkdir(parents=True, exist_ok=True)
        return replace(file, self.text(label, note))

    def save_many(self, count: int, note: str = "first") -> list[str]:
        labels = [f"p{number % 10}/c{number}" for number in range(count)]
        for label in labels:
            self.save(label, note)
        return labels

    def registry(self) -> orchestra.Registry:
        return orchestra.load_registry(self.path)

    def problems(self) -> list[str]:
        return [str(problem) for problem in self.registry().problems]

    # What was written

    def read(self, label: str = "shop/api") -> str:
        try:
            return (self.code / label / "CLAUDE.md").read_text()
        except FileNotFoundError:  # for good, or while an editor makes it anew
            return ""

    def has(self, note: str, label: str = "shop/api") -> bool:
        return f"- {note}\n" in self.read(label)

    def backups(self, label: str = "shop/api") -> dict[str, bytes]:
        """Return the newest backup of each file."""
        key = tuple(label.split("/"))
        return {backup.path: Path(backup.file).read_bytes() for backup in orchestra.Backups(self.path, key).versions()}

    def leftovers(self) -> list[str]:
        return [path for path in tree(self.folder) if path.endswith(".tmp")]

    # Commands in this process

    def run(self, *argv: str) -> Ran:
        streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", newline="", write_through=True) for _ in range(2)]
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            status = orchestra.main(argv, self.environ)
        return Ran(status, *(stream.buffer.getvalue().decode() for stream in streams))

    def run_fine(self, *argv: str) -> Ran:
        ran = self.run(*argv)
        assert ran.status == 0, ran
        return ran

    def run_as_nobody(self, *argv: str) -> Ran:
        """Run one command as a user whom permissions hold back, as they do not root."""
        if os.geteuid() != 0:
            return self.run(*argv)
        self.run("status", "--json")  # imports what the child may not be able to read
        import difflib  # noqa: F401

        for parent, folders, files in os.walk(self.folder):
            for path in (parent, *(os.path.join(parent, name) for name in (*folders, *files))):
                os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        return Ran(*run_as_nobody(lambda: self.run(*argv)))

    def sync(self, *argv: str) -> Ran:
        return self.run_fine("sync", *(argv or ("--all",)))

    def staleness(self, label: str = "shop/api") -> dict[str, Any]:
        entries = json.loads(self.run("status", "--json").out)["codebases"]
        return next(entry for entry in entries if f"{entry['project']}/{entry['codebase']}" == label)

    def status_of(self, label: str = "shop/api") -> str:
        return str(self.staleness(label)["status"])

    # Commands as processes

    def variables(self, **more: Optional[str]) -> dict[str, str]:
        """Return a process's environment, without the caller's settings; None removes one."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ORCHESTRA_", "PYTHON"))}
        found = {**kept, "HOME": self.path, **more}
        return {name: value for name, value in found.items() if value is not None}

    def command(self, *argv: str, kind: str = "") -> list[str]:
        """Return the script's command line, with a stand-in for kqueue if need be."""
        if kind == "kqueue" and not HAS_KQUEUE:
            return [sys.executable, "-c", DRIVER, *argv]
        return [sys.executable, str(SCRIPT), *argv]

    def launch(self, command: Sequence[str], environ: dict[str, Optional[str]] = {}, **options: Any) -> Any:
        """Start a process that ends with the test at the latest."""
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        options = {"stdin": subprocess.DEVNULL, **pipes, "text": True, **options}
        process = subprocess.Popen(command, env=self.variables(**environ), **options)
        self.cleanup.callback(process.wait)
        self.cleanup.callback(process.kill)
        return process

    def start(self, *argv: str, **options: Any) -> Any:
        return self.launch(self.command(*argv), **options)

    def run_script(self, *argv: str, **options: Any) -> Ran:
        return finish(self.start(*argv, **options))

    # The daemon

    def start_daemon(self, kind: str = "", wait: bool = True, command: Sequence[str] = (), **options: Any) -> Any:
        """Start a daemon as a process; what it says goes to the file `said`."""
        command = command or self.command("daemon", "start", kind=kind)
        options = {"environ": {"ORCHESTRA_WATCHER": kind}, "stdout": subprocess.DEVNULL, **options}
        with open(self.folder / "said", "ab") as said:
            daemon = self.launch(command, **{"stderr": said, "text": False, **options})
        self.daemons.append(daemon)
        if wait:
            wait_until(lambda: daemon.poll() is not None or self.answers())
            assert daemon.poll() is None, self.said()
        return daemon

    @property
    def socket(self) -> str:
        return orchestra.socket_path(self.path)

    def status(self) -> Any:
        return orchestra.send_request(self.path, {"cmd": "status"}, 60)

    def answers(self) -> int:
        """Return the process that answers on the socket, 0 for none."""
        try:
            return int(self.status()["pid"])
        except orchestra.DaemonError:
            return 0

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def log(self) -> str:
        return Path(orchestra.stdout_log_path(self.path)).read_text()

    def errors(self) -> str:
        return Path(orchestra.stderr_log_path(self.path)).read_text()

    def complaints(self) -> list[str]:
        """Return the daemon's warnings, except those about replaced hand edits."""
        return [line for line in self.errors().splitlines() if "replaced hand-written text" not in line]

    def synced(self, source: str = "") -> int:
        return self.log().count(f" source={source}") if source else self.log().count(" synced ")

    def wait_for_start_job(self) -> None:
        wait_until(lambda: self.synced("start") == 1)

    def stop(self, daemon: subprocess.Popen[Any]) -> None:
        """Stop a daemon, which should complain of nothing and leave nothing."""
        orchestra.request_stop(self.path)
        self.expect_end(daemon)

    def stop_detached(self) -> None:
        """Stop a daemon that is no child of this process, if one runs, and wait for its end."""
        with contextlib.suppress(orchestra.DaemonNotRunning):
            orchestra.request_stop(self.path)
        wait_until(lambda: not orchestra.is_locked(orchestra.daemon_lock_path(self.path)))

    def expect_end(self, daemon: subprocess.Popen[Any], status: int = 0) -> None:
        assert daemon.wait(60) == status, self.said()
        assert not os.path.lexists(self.socket)
        assert "Traceback" not in self.said() + self.errors()

    @contextmanager
    def connection(self, data: bytes = b"") -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(self.socket)
            client.sendall(data)
            yield client

    def talk(self, data: bytes) -> bytes:
        """Send bytes and no more, and return all that comes back."""
        with self.connection(data) as client:
            client.shutdown(socket.SHUT_WR)
            return read_all(client)


class Tty:
    """A program on a terminal of its own, and what it has shown."""

    def __init__(self, home: Home, command: Sequence[str], size: tuple[int, int] = (24, 80), **environ: Any) -> None:
        self.master, slave = os.openpty()
        home.cleanup.callback(os.close, self.master)
        self.resize(*size)
        self.before = termios.tcgetattr(slave)
        self._slave = slave
        home.cleanup.callback(os.close, slave)
        self.shown = ""
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        variables = {"TERM": "xterm-256color", "COLUMNS": None, "LINES": None, **environ}
        self.process = home.launch(
            command, variables, **streams, text=False, start_new_session=True, preexec_fn=self._take_over
        )

    @staticmethod
    def _take_over() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    @property
    def settings(self) -> list[Any]:
        return termios.tcgetattr(self._slave)

    @property
    def has_changed(self) -> bool:
        return self.settings != self.before

    def read(self, seconds: float = 0.02) -> None:
        while select.select([self.master], [], [], seconds)[0]:
            self.shown += os.read(self.master, 1 << 16).decode("utf-8", "replace")
            seconds = 0

    def wait_for(self, text: str, timeout: float = 30) -> str:
        """Wait until a text was shown; forget it, and return what was shown till then."""

        def is_shown() -> bool:
            self.read()
            return text in self.shown

        wait_until(is_shown, timeout, lambda: f"for {text!r} in {self.shown[-2000:]!r}")
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def type(self, keys: str, after: str = "") -> None:
        if after:
            self.wait_for(after)
        os.write(self.master, keys.encode())

    def finish(self) -> tuple[int, str]:
        """Wait for its end; return its exit status and what it has shown since."""
        wait_until(lambda: (self.read(), self.process.poll() is not None)[1], describe=lambda: self.shown)
        self.read()
        return self.process.returncode, self.shown


@pytest.fixture
def home() -> Iterator[Home]:
    home = Home(tempfile.mkdtemp(prefix="orc", dir="/tmp"))
    with home.cleanup:
        yield home


@pytest.fixture
def live(home: Home) -> Home:
    """A home whose registry has its folder, as a watcher needs it."""
    home.projects.mkdir(parents=True)
    return home


@pytest.fixture
def served(live: Home) -> Iterator[Home]:
    """A home with a daemon, which must end well after the test."""
    daemon = live.start_daemon()
    live.wait_for_start_job()
    yield live
    live.stop(daemon)


def sync_later(home: Home, seconds: float = 100) -> orchestra.SyncCodebaseResult:
    """Sync shop/api as if so many seconds had passed."""
    registry = home.registry()
    codebase = registry.codebases[API]
    return orchestra.sync_codebase(home.path, codebase, registry.owners, clock=lambda: time.time() + seconds)


# ── The shape of the file ─────────────────────────────────────────────────────

SOURCE = SCRIPT.read_text(encoding="utf-8")
MODULE = ast.parse(SOURCE)
MODULE_DOC = ast.get_docstring(MODULE, clean=False) or ""
BANNER = re.compile(r"(?m)^# (?:══ ([IV]+) (\w+) ═+|── (?:(\d+) )?(.+?) ─+)$")  # of a part, or of a section
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef, ast.Assign, ast.AnnAssign)
SECTION_STARTS = [(SOURCE.count("\n", 0, m.start()) + 1, m[4]) for m in BANNER.finditer(SOURCE) if m[4]]
SECTIONS = ["", *(title for _, title in SECTION_STARTS)]


def section_of(node: Any) -> str:
    """Name the section a node stands in; "" above the first."""
    return next((title for line, title in reversed(SECTION_STARTS) if line <= node.lineno), "")


def without_annotations(node: ast.AST) -> list[ast.AST]:
    """List a node and all below it, except annotations, which are never evaluated."""
    nodes = [node]
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns"):
            for item in value if isinstance(value, list) else [value]:
                nodes += without_annotations(item) if isinstance(item, ast.AST) else []
    return nodes


def names_defined_by(node: ast.stmt) -> set[str]:
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return {node.name}
    inner = [n for target in node.targets for n in ast.walk(target)] if isinstance(node, ast.Assign) else ast.walk(node)
    return {name.id for name in inner if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}


def dotted(node: ast.AST) -> str:
    """Spell a call's function as it was written: os.path.join."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def sections_where(is_it: Callable[[ast.AST], bool]) -> set[str]:
    return {section_of(node) for node in ast.walk(MODULE) if hasattr(node, "lineno") and is_it(node)}


def sections_that_call(*names: str) -> set[str]:
    return sections_where(lambda node: isinstance(node, ast.Call) and dotted(node.func) in names)


def sections_that_import(*names: str) -> set[str]:
    def imports(node: ast.AST) -> bool:
        if isinstance(node, ast.ImportFrom):
            return (node.module or "").split(".")[0] in names
        return isinstance(node, ast.Import) and any(alias.name.split(".")[0] in names for alias in node.names)

    return sections_where(imports)


def test_the_contents_in_the_docstring_are_the_banners() -> None:
    contents = MODULE_DOC[MODULE_DOC.index("Contents") :]
    listed = re.findall(r"(?m)^ {2}([IV]+) (\w+)$|^ +(\d+) (\S.*?) {2,}\S", contents)
    assert listed == BANNER.findall(SOURCE)
    assert [int(number) for _, _, number, _ in listed if number] == list(range(1, len(SECTIONS)))


def test_the_tests_stand_under_the_programs_banners_between_the_helpers_and_the_rigs() -> None:
    banners = BANNER.findall(Path(__file__).read_text(encoding="utf-8"))
    listed = re.findall(r"(?m)^ {2}([A-Z]\S*(?: \S+)*) {2,}\S", (__doc__ or "").partition("Contents")[2])
    listed_banners = [("", "", "", title) for title in listed]
    assert banners == listed_banners[:2] + BANNER.findall(SOURCE) + listed_banners[2:]


def test_each_section_uses_only_those_above_it() -> None:
    at = {name: SECTIONS.index(section_of(node)) for node in MODULE.body for name in names_defined_by(node)}
    below = []
    for node in MODULE.body:
        inner = without_annotations(node)
        own = {n.id for n in inner if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        own |= {n.arg for n in inner if isinstance(n, ast.arg)}
        used = {n.id for n in inner if isinstance(n, ast.Name)} - (own - names_defined_by(node))
        here = SECTIONS.index(section_of(node))
        below += [(section_of(node), name) for name in used if at.get(name, 0) > here]
    assert below == []


def test_main_is_last() -> None:
    *_, main, start = MODULE.body
    assert isinstance(main, ast.FunctionDef) and main.name == "main"
    assert isinstance(start, ast.If) and ast.unparse(start.test) == "__name__ == '__main__'"


def test_nothing_is_imported_before_sys_path_is_narrowed_but_what_is_built_in() -> None:
    first = next(n for n in MODULE.body if isinstance(n, ast.If) and ast.unparse(n.test) == "__name__ == '__main__'")
    imports = [n for n in ast.walk(MODULE) if isinstance(n, (ast.Import, ast.ImportFrom)) and n.lineno < first.lineno]
    names = [alias.name for node in imports for alias in node.names]
    assert names == ["sys", "posix"] and set(names) <= set(sys.builtin_module_names)


def test_a_record_has_its_fields_where_python_evaluates_annotations_on_demand() -> None:
    # As Python 3.14 makes a class's namespace.
    namespace = {"__annotate_func__": lambda format: {"one": int, "two": str}, "two": "x", "three": 3}
    record = orchestra.RecordMaker("R", (orchestra.NamedTuple,), namespace)
    assert (record(1), record._fields, record.three) == ((1, "x"), ("one", "two"), 3)


@pytest.mark.parametrize("base", [orchestra.NamedTuple, NamedTuple], ids=["orchestra", "typing"])
def test_a_record_is_what_typing_makes_of_its_class(base: Any) -> None:
    body: dict[str, Any] = {"__module__": __name__, "__annotations__": {"one": int, "two": str}, "two": "x"}
    body["text"] = lambda self: f"{self.one} and {self.two}"
    record = types.new_class("Pair", (base,), exec_body=lambda namespace: namespace.update(body))
    pair = record(1)
    assert [pair, record(two="y", one=2), pair._replace(one=3)] == [(1, "x"), (2, "y"), (3, "x")]
    assert (pair._asdict(), repr(pair), pair.text()) == ({"one": 1, "two": "x"}, "Pair(one=1, two='x')", "1 and x")
    assert (record._fields, record._field_defaults, hasattr(pair, "__dict__")) == (("one", "two"), {"two": "x"}, False)
    for wrong in (record, lambda: record(1, 2, 3), lambda: record(1, no=2), lambda: pair._replace(no=2)):
        with pytest.raises((TypeError, ValueError)):
            wrong()


def test_only_output_and_the_commands_print() -> None:
    assert sections_that_call("print") <= {"Output", "Commands", "Command line"}


CHANGES_ON_DISK = (
    *("rename", "renames", "replace", "link", "symlink", "unlink", "remove", "mkdir", "makedirs", "rmdir"),
    *("removedirs", "truncate", "ftruncate", "fsync", "chown", "utime", "mkfifo", "pwrite"),
)
CHANGE_FILES = {"Files", "Locks", "Replacing", "Backups", "Turns", "Logs"}


def test_files_are_changed_in_few_sections() -> None:
    assert sections_that_call(*(f"os.{name}" for name in CHANGES_ON_DISK)) <= CHANGE_FILES


def test_files_are_opened_for_writing_in_few_sections() -> None:
    harmless = {
        flag
        for node in ast.walk(MODULE)
        if isinstance(node, ast.Call) and node.args and dotted(node.args[0]) == "os.devnull"
        for flag in ast.walk(node)
    }
    flags = ("os.O_WRONLY", "os.O_RDWR", "os.O_CREAT", "os.O_APPEND", "os.O_TRUNC")
    assert sections_where(lambda node: dotted(node) in flags and node not in harmless) <= CHANGE_FILES

    def opens_to_write(node: ast.AST) -> bool:
        if not isinstance(node, ast.Call) or dotted(node.func) != "open" or dotted(node.args[0]) == "os.devnull":
            return False
        words = [word.value for word in ast.walk(node) if isinstance(word, ast.Constant)]
        return any(isinstance(word, str) and set(word) & set("wax+") for word in words)

    assert sections_where(opens_to_write) <= CHANGE_FILES
    assert sections_that_import("shutil", "tempfile", "pathlib") <= CHANGE_FILES


def test_sockets_and_programs_have_their_sections() -> None:
    assert sections_where(lambda node: dotted(node).startswith("socket.")) <= {"Control socket", "Daemon"}
    assert sections_that_import("socket", "_socket", "selectors") <= {"Watching", "Control socket", "Daemon", "Worker"}
    assert sections_that_import("subprocess") <= {"Programs"}
    assert sections_where(lambda node: dotted(node) in ("os.system", "os.popen", "os.posix_spawn")) == set()
    assert sections_where(lambda node: dotted(node) == "os.fork") == {"Programs"}


def test_there_is_no_global_state() -> None:
    assert sections_where(lambda node: isinstance(node, (ast.Global, ast.Nonlocal))) == set()


def test_functions_fit_on_a_screen() -> None:
    lengths = {n.name: (n.end_lineno or 0) - n.lineno + 1 for n in ast.walk(MODULE) if isinstance(n, FUNCTIONS)}
    too_long = {name: length for name, length in lengths.items() if length > 60}
    assert too_long == {}, "no function is longer than 60 lines"


def test_no_section_is_longer_than_620_lines() -> None:
    lines = [line for line, _ in SECTION_STARTS] + [SOURCE.count("\n") + 2]
    lengths = {title: end - start for start, end, title in zip(lines, lines[1:], SECTIONS[1:])}
    too_long = {title: length for title, length in lengths.items() if length > 620}
    assert too_long == {}, "split these sections, or move what belongs elsewhere"


def test_a_section_reads_from_callees_to_callers() -> None:
    made = {name: node for node in MODULE.body if isinstance(node, DEFINITIONS) for name in names_defined_by(node)}
    uses = [
        (name.id, made[name.id].lineno < name.lineno)
        for node in MODULE.body
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and made.get(name.id, node) is not node
        if section_of(made[name.id]) == section_of(node)
    ]
    down = [name for name, is_up in uses if not is_up]
    assert len(down) < 0.05 * len(uses), f"95 % of the references inside sections point up; these do not: {down}"


def test_few_names_stand_at_module_level() -> None:
    names = sum(len(names_defined_by(node)) for node in MODULE.body if isinstance(node, DEFINITIONS))
    rate = names / SOURCE.count("\n") * 100
    assert rate < 6, f"{rate:.2f} names per 100 lines: inline a helper, make a class, move constants into it"


def test_few_functions_have_five_parameters() -> None:
    many = []
    for node in ast.walk(MODULE):
        if isinstance(node, FUNCTIONS):
            names = [arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)]
            many += [node.name] * (len(set(names) - {"self", "cls"}) >= 5)
    assert len(many) < 8, f"what is passed together belongs in one object: {many}"


# ══ I Ground ══════════════════════════════════════════════════════════════════

# ── 1 Errors ──────────────────────────────────────────────────────────────────


def test_an_os_error_is_told_in_one_line_with_its_place() -> None:
    told = "^/no/where: no such file or directory$"
    with pytest.raises(orchestra.IoError, match=told) as caught, orchestra.blame("/no/where"):
        os.stat("/no/where")
    assert isinstance(caught.value.source, FileNotFoundError)


@pytest.mark.parametrize(
    ("platform", "code", "words"),
    [
        ("linux", errno.ENOSPC, ["free some space"]),
        ("linux", errno.EPERM, []),
        ("darwin", errno.EPERM, [f"Full Disk Access for {sys.executable}", "uchg", "chflags nouchg"]),
    ],
)
def test_an_os_error_that_has_a_way_out_names_it(monkeypatch: Any, platform: str, code: int, words: list[str]) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    hint = orchestra.IoError("x", OSError(code, os.strerror(code))).hint
    assert all(word in hint for word in words) and bool(hint) == bool(words)


@pytest.mark.parametrize(
    ("error", "where", "told"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), "", "/x: no such file"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), "CLAUDE.md", "CLAUDE.md: no such file"),
        (orchestra.IoError("/x", OSError(errno.EIO, "Bad")), "", "/x: bad"),
        (orchestra.IoError("/x", OSError(errno.EIO, "Bad")), "CLAUDE.md", "CLAUDE.md: bad"),
        (OSError("odd"), "", "odd"),
        (orchestra.SyncError("wrong", "mend it"), "CLAUDE.md", "CLAUDE.md: wrong"),
        (orchestra.SyncError("wrong", "mend it"), "", "wrong"),
    ],
)
def test_a_problem_tells_an_error_and_names_its_place_once(error: Any, where: str, told: str) -> None:
    problem = orchestra.Problem.from_error(error, where)
    assert (str(problem), problem.hint, problem.retry) == (told, getattr(error, "hint", ""), False)
    assert str(problem.below("shop/api")) == f"shop/api: {told}"
    assert orchestra.Problem.from_error(orchestra.FileBusy()).retry


def test_the_user_sees_one_line_and_the_way_out(home: Home) -> None:
    ran = home.run("diff", "nope")
    assert ran == (2, "", 'orchestra: no codebase is called "nope"\n  try: orchestra project list\n')


# ── 2 Places ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (orchestra.orchestra_root("/h"), "/h/.orchestra"),
        (orchestra.projects_root("/h"), "/h/.orchestra/projects"),
        (orchestra.project_path("/h", "shop"), "/h/.orchestra/projects/shop/project.yaml"),
        (orchestra.codebase_path("/h", API), "/h/.orchestra/projects/shop/api.yaml"),
        (orchestra.record_path("/h", API), "/h/.orchestra/hashes/shop/api.json"),
        (orchestra.backups_of("/h", API), "/h/.orchestra/backups/shop/api"),
        (orchestra.socket_path("/h"), "/h/.orchestra/daemon.sock"),
        (orchestra.stdout_log_path("/h"), "/h/.orchestra/logs/daemon.log"),
        (orchestra.stderr_log_path("/h"), "/h/.orchestra/logs/daemon-err.log"),
        (orchestra.launchd_plist_path("/h"), "/h/Library/LaunchAgents/dev.orchestra.daemon.plist"),
    ],
)
def test_everything_has_its_place_below_the_home(place: str, expected: str) -> None:
    assert place == expected


SHELL_WORDS = {  # by what is written
    "shop/api": "shop/api",
    "tools/日本": "tools/日本",
    "a-b@1.0+c,d:e=f%g_h": "a-b@1.0+c,d:e=f%g_h",
    "~/code/api": "~/code/api",
    "~/My Work/it's": "~/'My Work/it'\\''s'",
    "~/~root": "~/'~root'",
    "~/$(touch PW)": "~/'$(touch PW)'",
    "~root": "'~root'",
    "~": "'~'",
    "a=~root": "'a=~root'",
    "=ls": "'=ls'",
    "": "''",
    "zé$(touch PW)": "'zé$(touch PW)'",
    "`touch PW`": "'`touch PW`'",
    "a;touch PW #": "'a;touch PW #'",
    "*": "'*'",
    '!!"\\': "'!!\"\\'",
}


@pytest.mark.parametrize("text", SHELL_WORDS)
def test_a_shell_reads_what_typed_writes(home: Home, text: str) -> None:
    assert orchestra.typed(text) == SHELL_WORDS[text]
    for shell in filter(shutil.which, ("sh", "bash", "zsh")):
        argv = [shell, "-c", f"printf %s {SHELL_WORDS[text]}"]
        read = subprocess.check_output(argv, cwd=home.folder, env=home.variables(), text=True)
        assert read == (text if text == "~" else orchestra.expand_home(home.path, text))
    assert not (home.folder / "PW").exists()


@pytest.mark.parametrize("path", ["/h/code/api", "/h2/code", "/h", "/other", "/h/~/x"])
def test_shortening_a_path_is_undone_by_expanding_it(path: str) -> None:
    assert orchestra.expand_home("/h", orchestra.shorten_home("/h", path)) == path


def test_what_orchestra_keeps_is_private(home: Home) -> None:
    home.make_codebase()
    shutil.rmtree(orchestra.orchestra_root(home.path))
    home.run_fine("init", str(home.code / "shop/api"), "-p", "shop", "--sync")
    home.start_daemon()
    modes: dict[bool, set[int]] = {True: set(), False: set()}  # of folders, and of files
    for path in (home.folder / "home/.orchestra", *(home.folder / "home/.orchestra").rglob("*")):
        modes[path.is_dir()].add(stat.S_IMODE(path.stat().st_mode))
    assert modes == {True: {0o700}, False: {0o600}}


# ── 3 Files ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("content", "name", "kind"),
    [
        (b"text", "x", "file"),
        (b"text", "y", "absent"),
        (b"text", "x/below", "absent"),
        (None, "x", "folder"),
        (link_to("elsewhere"), "x", "symlink"),
        (link_to("."), "x", "symlink"),
        (os.mkfifo, "x", "special"),
        (make_socket, "x", "special"),
    ],
)
def test_a_look_at_the_disk_never_follows_or_waits(home: Home, content: Any, name: str, kind: str) -> None:
    put_files(home.code, {"x": content})
    disk = orchestra.read_disk(str(home.code / name))
    assert (disk.kind, disk.data) == (kind, b"text" if kind == "file" else b"")


@pytest.mark.parametrize("limit", [-1, 4, 5, 6, 4999])
@pytest.mark.parametrize(
    ("size", "piece"), [(0, 1), (1, 1), (5, 1), (5, 9), (5000, 1), (5000, 7), (5000, 1000), ((1 << 20) + 7, 1 << 21)]
)
def test_a_file_is_read_whole_or_up_to_the_limit_though_the_system_hands_it_over_in_pieces(
    home: Home, monkeypatch: Any, size: int, piece: int, limit: int
) -> None:
    data, read = os.urandom(size), os.read
    put_files(home.code, {"x": data})
    monkeypatch.setattr(os, "read", lambda fd, count: read(fd, min(count, piece)))
    assert orchestra.read_disk(str(home.code / "x"), limit).data == (data if limit < 0 else data[:limit])


@pytest.mark.parametrize(("has", "refused"), [(False, 0), (True, 0), (True, errno.ENOTSUP), (True, errno.ENOTTY)])
def test_what_must_not_be_lost_is_flushed_to_the_drive_where_fsync_does_not(
    home: Home, monkeypatch: Any, has: bool, refused: int
) -> None:
    calls: list[Any] = []

    def control(fd: int, command: int) -> None:
        calls.append(command)
        if refused:
            raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    if not has:
        monkeypatch.delattr(fcntl, "F_FULLFSYNC")
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync"))
    orchestra.flush(0)
    assert calls == [51] * has + ["fsync"] * (not has or bool(refused))


def test_a_socket_is_told_by_the_word_of_macos_too(monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "open", refuse(errno.EOPNOTSUPP))  # xnu: vn_open_auth
    assert orchestra.read_disk("/socket").kind == "special"


# ── 4 Locks ───────────────────────────────────────────────────────────────────


def test_one_writer_has_the_lock_at_a_time(home: Home) -> None:
    path = os.path.join(home.path, "lock")
    second = orchestra.Lock(path, timeout=0.05)
    with orchestra.Lock(path), pytest.raises(orchestra.SyncError, match=r"has been busy for 0\.05 s$"), second:
        pass
    with second:
        pass


def test_a_turn_sweeps_up_after_a_killed_one_and_nothing_else(home: Home) -> None:
    path = str(home.code / "lock")
    put_files(home.code, {".orchestra-dead.tmp": "half", ".orchestra-dead-2.tmp": "half"})
    put_files(home.code, {".orchestra-alive.tmp": "x", "dead.tmp": "x"})
    Path(path).write_text("dead\n[0, null, 0]\nand what a longer one left")
    orchestra.sweep_folder("/no/where", "dead")
    with orchestra.Lock(path) as lock:
        assert Path(path).read_bytes() == b""
        assert lock.token != "dead" and lock.token in Path(path).read_text()
    assert Path(path).read_bytes() == b""
    assert sorted(os.listdir(home.code)) == [".orchestra-alive.tmp", "dead.tmp", "lock"]


def test_a_turn_that_could_not_clean_up_leaves_its_lock_file_as_a_kill_does(home: Home) -> None:
    with orchestra.Lock(str(home.code / "lock")) as lock:
        lock.announce(orchestra.Swap("/code/x", "/code/.orchestra-1.tmp", ["ab"]))
        lock.is_clean = False
    assert orchestra.Leftover.parse((home.code / "lock").read_bytes()) == lock.leftover


def test_a_swap_is_announced_whole_though_the_system_takes_it_in_pieces(home: Home, monkeypatch: Any) -> None:
    write, lock = os.pwrite, orchestra.Lock(str(home.code / "lock"))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:7], at))
    swap = orchestra.Swap("/code/CLAUDE.md", "/code/.orchestra-1.tmp", ["ab", "cd"])
    with pytest.raises(KeyError), lock:
        lock.announce(swap)
        raise KeyError
    found = orchestra.Leftover.parse((home.code / "lock").read_bytes())
    assert found == orchestra.Leftover(lock.leftover.token, swap)


@pytest.mark.parametrize("path", ["/code/CLAUDE.md", "/c/CLAUDE.md", "/code/a\nb/\udcff/CLAUDE.md"])
def test_a_swap_whose_announcement_was_cut_short_is_not_taken_for_another(path: str) -> None:
    older = orchestra.Swap("/code/AGENTS.md", "/code/.orchestra-1-1.tmp", ["ab" * 32, "cd" * 32])
    newer = orchestra.Swap(path, f"{path}.tmp", ["ef" * 32])
    old, new = (orchestra.Leftover("1-aa", swap).format(number) for number, swap in enumerate((older, newer), 1))
    for cut in range(len("1-aa\n") + 1, len(new) + 1):
        found = orchestra.Leftover.parse(new[:cut] + old[cut:])
        assert found and found.swap in (None, newer)
    assert found.swap == newer


def test_asking_whether_a_lock_is_held_makes_nothing_and_lets_others_take_it(home: Home, monkeypatch: Any) -> None:
    path = str(home.folder / "x/daemon.lock")
    assert not orchestra.is_locked(path) and not os.path.exists(home.folder / "x")
    lock = orchestra.try_lock(path)
    assert orchestra.is_locked(path) and orchestra.try_lock(path) is None
    os.close(lock)
    asking = os.open(path, os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda seconds: os.close(asking))
    lock = orchestra.try_lock(path)
    assert lock is not None
    os.close(lock)


# ── 5 Replacing ───────────────────────────────────────────────────────────────


class OldFile:
    """A file x with the text "old", and the lock to replace or remove it."""

    def __init__(self, home: Home, lock: orchestra.Lock) -> None:
        self.lock = lock
        self.path = home.code / "x"
        self.path.write_bytes(b"old")
        self.path.chmod(0o644)

    def look(self) -> orchestra.Disk:
        return orchestra.read_disk(str(self.path))

    def replace(self, data: bytes = b"new", expected: Optional[orchestra.Disk] = None, **options: Any) -> None:
        with orchestra.open_place(str(self.path)) as place:
            orchestra.replace_file(place, data, expected or self.look(), self.lock, **options)

    def remove(self, expected: orchestra.Disk) -> None:
        with orchestra.open_place(str(self.path)) as place:
            orchestra.remove_file(place, expected, self.lock)

    def replace_as_nobody(self, home: Home) -> None:
        for folder in (home.folder, home.code):
            folder.chmod(0o777)

        def replace() -> None:
            with orchestra.Lock(str(home.code / "lock")) as self.lock:
                self.replace()

        run_as_nobody(replace)


@pytest.fixture
def old(home: Home) -> Iterator[OldFile]:
    with orchestra.Lock(os.path.join(home.path, "lock")) as lock:
        yield OldFile(home, lock)


def test_replacing_keeps_the_mode_and_leaves_no_temporary(home: Home, old: OldFile) -> None:
    old.path.chmod(0o640)
    old.replace()
    assert old.look() == ("file", b"new", 0o640)
    assert os.listdir(home.code) == ["x"]


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize(
    ("planned", "content"),
    [*((b"old", found) for found in (b"saved", b"new", None, link_to("y"))), (None, b"saved"), (None, link_to("y"))],
)
def test_a_file_that_is_not_as_planned_is_not_touched(
    home: Home, old: OldFile, monkeypatch: Any, planned: Optional[bytes], content: Any, swaps: bool
) -> None:
    if not swaps:
        monkeypatch.setattr(orchestra, "swap_files", lambda *names: False)
    expected = orchestra.ABSENT if planned is None else orchestra.Disk("file", planned, 0o644)
    old.path.unlink()
    put_files(home.code, {"x": content})
    before = tree(home.code)
    with pytest.raises(orchestra.FileChanged):
        old.replace(expected=expected)
    monkeypatch.setattr(orchestra.Place, "rename", lambda *names: 1 / 0)  # keeps its name all the time
    with pytest.raises(orchestra.FileChanged):
        old.remove(expected)
    assert tree(home.code) == before
    assert swaps or not os.path.exists(old.lock.aside)


def test_a_private_file_is_private_while_it_is_written(old: OldFile, monkeypatch: Any) -> None:
    modes, finish = [], orchestra.finish_file

    def note_and_finish(fd: int, *args: Any) -> None:
        modes.append(stat.S_IMODE(os.fstat(fd).st_mode))
        finish(fd, *args)

    monkeypatch.setattr(orchestra, "finish_file", note_and_finish)
    old.path.chmod(0o600)
    old.replace()
    orchestra.save_private(str(old.path.with_name("y")), b"", "t")
    assert modes == [0o600, 0o600]


def test_a_link_by_the_name_of_the_temporary_file_is_not_followed(home: Home, old: OldFile) -> None:
    put_files(home.folder, {"outside": "theirs"})
    put_files(home.code, {orchestra.temporary_name(f"{old.lock.token}-1", "x"): link_to("../outside")})
    with pytest.raises(FileExistsError):
        old.replace()
    assert (old.look().data, (home.folder / "outside").read_text()) == (b"old", "theirs")


def test_a_save_of_orchestras_own_that_fails_leaves_nothing(home: Home) -> None:
    put_files(home.code, {"x": None})
    with pytest.raises(orchestra.IoError):
        orchestra.save_private(str(home.code / "x"), b"new", "t")
    assert os.listdir(home.code) == ["x"]


@pytest.mark.parametrize(
    ("during", "save"),
    [
        ("planning", lambda path: path.write_bytes(b"longer")),
        ("planning", lambda path: path.chmod(0o600)),
        ("fsync", lambda path: path.write_bytes(b"new")),
        ("fsync", lambda path: path.write_bytes(b"longer")),
    ],
)
def test_a_file_that_was_saved_meanwhile_keeps_its_name_all_the_time(
    old: OldFile, monkeypatch: Any, during: str, save: Callable[[Path], Any]
) -> None:
    planned, fsync = old.look(), os.fsync
    if during == "planning":
        save(old.path)
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), save(old.path)))
    monkeypatch.setattr(orchestra, "swap_files", lambda *names: 1 / 0)
    with pytest.raises(orchestra.FileChanged):
        old.replace(b"fresh", planned, durable=during == "fsync")


@pytest.mark.parametrize("file_system", ["any", "without exclusive renames", "without links too"])
def test_a_file_that_appears_at_the_last_moment_is_not_replaced(
    old: OldFile, monkeypatch: Any, file_system: str
) -> None:
    finish = orchestra.finish_file
    if file_system != "any":
        monkeypatch.setattr(orchestra, "rename_exclusively", lambda *names: False)
    if file_system == "without links too":
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(orchestra, "finish_file", lambda *args: (finish(*args), old.path.write_bytes(b"the user's")))
    old.path.unlink()
    with pytest.raises(orchestra.FileChanged):
        old.replace(expected=orchestra.ABSENT)
    assert contents(old.path.parent) == {"x": b"the user's"}


def test_a_reader_sees_the_old_text_or_the_new(old: OldFile) -> None:
    texts = [bytes([65 + i]) * 200_000 for i in range(2)]
    old.path.write_bytes(texts[0])
    seen: set[bytes] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(old.path.read_bytes())

    with ThreadPoolExecutor() as pool:
        reading = pool.submit(read)
        for i in itertools.count(1):
            old.replace(texts[i % 2])
            if reading.done() or (i >= 100 and len(seen) > 1):
                break
        done.set()
    reading.result()
    assert seen == set(texts)


needs_attributes = pytest.mark.skipif(not hasattr(os, "setxattr"), reason="only Linux has extended attributes in os")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")


def set_attribute(path: Path, name: str, value: bytes) -> None:
    try:
        os.setxattr(path, name, value)
    except OSError as error:
        pytest.skip(f"the file system has no {name}: {error}")


@needs_attributes
def test_replacing_keeps_extended_attributes(old: OldFile) -> None:
    set_attribute(old.path, "user.note", b"mine")
    old.replace()
    assert (old.look().data, os.getxattr(old.path, "user.note")) == (b"new", b"mine")


@pytest.mark.parametrize(("failing", "mode"), [(0, 0o644), (4, 0o644), (1, 0o600)])
def test_on_macos_an_attribute_that_cannot_be_set_costs_neither_mode_nor_access_list(
    old: OldFile, monkeypatch: Any, failing: int, mode: int
) -> None:
    calls = []

    class Libc:
        def fcopyfile(self, source: int, target: int, state: None, flags: int) -> int:
            calls.append((os.pread(source, 9, 0), os.fstat(target).st_size, state, flags))
            return -(flags == failing)

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.delattr(os, "listxattr", raising=False)
    monkeypatch.setattr("ctypes.CDLL", lambda name, use_errno: Libc())
    monkeypatch.setattr(orchestra, "swap_files", lambda *names: False)
    old.replace(b"newer")
    assert old.look() == ("file", b"newer", mode)
    assert calls == [(b"old", 5, None, 4), (b"old", 5, None, 1)]


@needs_root
@pytest.mark.parametrize(("user", "group", "mode"), [(0, NOBODY, 0o640), (NOBODY, NOBODY, 0o640), (NOBODY, 0, 0o604)])
def test_replacing_keeps_owner_and_group(old: OldFile, user: int, group: int, mode: int) -> None:
    old.path.chmod(mode)
    os.chown(old.path, user, group)
    old.replace()
    info = old.path.stat()
    assert (old.look(), info.st_uid, info.st_gid) == (("file", b"new", mode), user, group)


@needs_root
@needs_attributes
def test_a_file_whose_group_cannot_be_kept_is_not_opened_to_another_but_keeps_its_attributes(
    home: Home, old: OldFile
) -> None:
    old.path.chmod(0o640)
    set_attribute(old.path, "user.note", b"mine")
    os.chown(old.path, NOBODY, 12345)
    old.replace_as_nobody(home)
    assert (old.look(), os.getxattr(old.path, "user.note")) == (("file", b"new", 0o600), b"mine")


@pytest.mark.parametrize("saved", [b"old", b"saved in that instant"])
def test_a_swap_that_is_interrupted_is_settled_at_once(old: OldFile, monkeypatch: Any, saved: bytes) -> None:
    swap, saves = orchestra.swap_files, iter([saved])

    def swap_and_be_interrupted(*names: Any) -> bool:
        for text in saves:
            old.path.write_bytes(text)
            swap(*names)
            raise KeyboardInterrupt
        return swap(*names)

    monkeypatch.setattr(orchestra, "swap_files", swap_and_be_interrupted)
    with pytest.raises(KeyboardInterrupt):
        old.replace()
    assert contents(old.path.parent) == {"x": b"new" if saved == b"old" else saved}


@needs_root
def test_another_users_file_is_not_taken_from_him(home: Home) -> None:
    home.make_codebase("shop/api", {"CLAUDE.md": "his"}, targets=["claude", "codex"])
    home.run_as_nobody("project", "list")
    path = home.code / "shop/api/CLAUDE.md"
    os.chown(path, 12345, NOBODY)
    path.chmod(0o664)
    ran = Ran(*run_as_nobody(lambda: home.run("sync", "--all")))
    assert "the file belongs to user 12345: chown it" in ran.err
    assert (ran.status, ran.out.splitlines()[0]) == (2, "create   shop/api AGENTS.md")
    info = path.stat()
    assert (path.read_bytes(), info.st_uid, stat.S_IMODE(info.st_mode)) == (b"his", 12345, 0o664)


def access_list(user: int) -> bytes:
    """Make an access control list with one user more than a mode has (acl(5), linux/posix_acl_xattr.h)."""
    nobody = 0xFFFFFFFF
    entries = [(0x01, 7, nobody), (0x02, 6, user), (0x04, 7, nobody), (0x10, 7, nobody), (0x20, 0, nobody)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@needs_attributes
@pytest.mark.parametrize("has_list", [False, True])
def test_a_folders_default_access_list_opens_no_old_file(home: Home, old: OldFile, has_list: bool) -> None:
    old.path.chmod(0o660)
    set_attribute(home.code, "system.posix_acl_default", access_list(1234))
    if has_list:
        set_attribute(old.path, "system.posix_acl_access", access_list(4321))
    names, mode = os.listxattr(old.path), old.path.stat().st_mode
    old.replace()
    assert (old.look().data, os.listxattr(old.path), old.path.stat().st_mode) == (b"new", names, mode)
    if has_list:
        assert os.getxattr(old.path, "system.posix_acl_access") == access_list(4321)


@pytest.mark.skipif(not IS_LINUX, reason="only Linux has /proc")
def test_where_leases_do_not_tell_who_writes_proc_does(old: OldFile, monkeypatch: Any) -> None:
    monkeypatch.setattr(orchestra, "has_writer", lambda fd: None)
    argv = ["sh", "-c", 'exec 3>>"$0"; echo; cat', str(old.path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout and writer.stdin and writer.stdout.readline()
        with pytest.raises(orchestra.FileBusy):
            old.replace()
        writer.stdin.close()
    del old.lock.busy
    old.replace()
    assert contents(old.path.parent) == {"x": b"new"}


@needs_leases
def test_a_file_that_is_open_for_writing_is_waited_for_and_then_left_alone(old: OldFile) -> None:
    with open(old.path, "r+b") as file:
        with pytest.raises(orchestra.FileBusy):
            old.replace()
        file.write(b"users")
    assert contents(old.path.parent) == {"x": b"users"}
    with open(old.path, "rb"):
        old.replace()
    assert contents(old.path.parent) == {"x": b"new"}


# ── 6 Backups ─────────────────────────────────────────────────────────────────


def test_each_version_is_backed_up_once_even_when_the_clock_stands_still(home: Home) -> None:
    for text in (b"1", b"2", b"2", b"3", b"1"):
        keep(home, text, path="a/CLAUDE.md")
    assert kept_texts(home) == [b"1", b"2", b"3", b"1"]
    kept = {(backup.path, backup.why, backup.when[:15]) for backup in kept_versions(home)}
    assert kept == {("a/CLAUDE.md", orchestra.Reason.EDITED, "20010909T014640")}
    assert home.leftovers() == []


HAND_EDIT, DISPLACED = orchestra.HAND_EDIT, orchestra.DISPLACED
DAYS = [f"202601{day:02d}T120000.000000Z" for day in range(1, 32)]
MONTHS = [f"{2020 + i // 12}{i % 12 + 1:02d}01T000000.000000Z" for i in range(60)]
MINUTES = [f"20260301T12{minute:02d}00.000000Z" for minute in range(60)]
FUTURE = [f"2099{month:02d}{day:02d}T120000.000000Z" for month in (1, 2) for day in range(1, 29)]
PAST = [f"19700101T0000{second:02d}.000000Z" for second in range(40)]


def versions(times: Iterable[str], origin: str = HAND_EDIT, first: int = 1) -> list[orchestra.Backup]:
    """Make versions of one file, of these times in this order; `first` is the number of the first, 0 for none."""
    numbers = itertools.count(first) if first else itertools.repeat(0)
    return [orchestra.Backup(when, "CLAUDE.md", when, "why", number, origin) for when, number in zip(times, numbers)]


@pytest.mark.parametrize(
    ("kept", "dropped"),
    [
        ([], []),
        (versions(MINUTES[:11]), []),
        (versions(MINUTES[:12]), MINUTES[1:2]),
        (versions(MINUTES), MINUTES[1:50]),
        (versions(DAYS), []),
        (versions([*DAYS, "20260201T000000.000000Z"]), DAYS[1:2]),
        (versions([*DAYS, *MINUTES]), [*DAYS[1:2], *MINUTES[:50]]),
        (versions(MONTHS), []),
        # A clock that was wrong for a while: its days take none of the thirty; its months keep their last.
        (versions([*DAYS, *FUTURE, MINUTES[0]]), DAYS[1:2]),
        (versions([FUTURE[0], *DAYS, MINUTES[0]]), DAYS[:2]),
        (versions([*DAYS, *PAST]), [*DAYS[1:2], *PAST[:30]]),
        (versions([DAYS[0], *PAST, *DAYS[1:]]), PAST[:-1]),
        # The first with a number stays beside the first without; each origin is thinned by itself.
        ([*versions(MINUTES[:20], first=0), *versions(MINUTES[20:40])], [*MINUTES[1:20], *MINUTES[21:30]]),
        ([*versions(DAYS), *versions(MINUTES, DISPLACED, 100)], MINUTES[1:50]),
    ],
)
def test_the_first_backup_stays_for_good_and_later_ones_are_thinned(kept: Any, dropped: list[str]) -> None:
    found = orchestra.versions_to_drop(kept, "20260301T130000.000000Z")
    assert [backup.when for backup in found] == dropped


def test_a_clock_set_to_1970_drops_no_day_that_is_in_its_future() -> None:
    assert orchestra.versions_to_drop(versions([*FUTURE, *DAYS, PAST[0]]), PAST[0]) == []


def turn_at(home: Home, now: float) -> orchestra.Turn:
    turn = orchestra.CodebaseTurn(home.path, orchestra.Codebase("shop", "api", "/x"), lambda: now)
    turn.leftover = orchestra.Leftover("t")
    return turn


def keep(
    home: Home, text: bytes, now: float = 1e9, path: str = "CLAUDE.md", origin: str = HAND_EDIT, mode: int = 0o640
) -> str:
    """Back up one version of a file."""
    why = orchestra.Reason.EDITED if origin == HAND_EDIT else orchestra.Reason.RESTORED
    return turn_at(home, now).back_up(path, orchestra.Disk("file", text, mode), why)


def kept_versions(home: Home) -> list[orchestra.Backup]:
    return orchestra.Backups(home.path, API).versions()


def kept_texts(home: Home) -> list[bytes]:
    return [Path(backup.file).read_bytes() for backup in kept_versions(home)]


def backups_folder(home: Home) -> Path:
    return Path(orchestra.backups_of(home.path, API))


def test_thinned_backups_leave_no_empty_folders(home: Home) -> None:
    for i in range(15):
        keep(home, b"%d" % i, 1e9 + i, "a/CLAUDE.md")
        if i % 2:
            keep(home, b"%d" % i, 1e9 + i, "GEMINI.md")
    kept = kept_versions(home)
    assert [Path(b.file).read_text() for b in kept if b.path == "GEMINI.md"] == [str(i) for i in range(1, 15, 2)]
    assert [Path(b.file).read_text() for b in kept if b.path == "a/CLAUDE.md"] == ["0", *map(str, range(5, 15))]
    assert {backup.why for backup in kept} == {orchestra.Reason.EDITED}
    assert len(os.listdir(backups_folder(home))) == len({backup.when for backup in kept})


def test_snapshots_of_orchestras_own_push_out_no_hand_edit(home: Home) -> None:
    edits = [b"edit %d" % i for i in range(5)]
    for i, text in enumerate(edits):
        keep(home, text, 1e9 + i)
    for i in range(40):
        keep(home, b"snapshot %d" % i, 1e9 + 100 + i, origin=DISPLACED)
    assert kept_texts(home) == [*edits, b"snapshot 0", *(b"snapshot %d" % i for i in range(30, 40))]


def test_a_hand_edit_equal_to_a_snapshot_is_kept_as_a_hand_edit_too(home: Home) -> None:
    for origin in (DISPLACED, DISPLACED, HAND_EDIT, HAND_EDIT, DISPLACED):
        keep(home, b"x", origin=origin)
    assert [backup.origin for backup in kept_versions(home)] == [DISPLACED, HAND_EDIT]


NOISY = b"""# Title

- one
- two
  1. three
text

```sh
-  a

  b
```
end
    code


    more
"""


SPACED_OTHERWISE = (
    *((b"# Title\n\n", b"\n# Title\n"), (b"- two", b"-   two"), (b"- two", b"-\ttwo"), (b"1. three", b"1.   three")),
    *((b"text\n", b"text  \n"), (b"text\n", b"text\n \t\n\n"), (b"    more\n", b"    more")),
)
CHANGED = (
    (b"\n", b"\n\n"),  # in code as well
    *((b"- two", b"* two"), (b"- two", b"-two"), (b"1. three", b"2. three"), (b"  1. three", b"    1. three")),
    *((b"text\n", b"te xt\n"), (b"text\n", b"text\xc2\xa0\n"), (b"text\n", b"text\r\n"), (b"text\n", b" text\n")),
    *((b"-  a\n\n", b"-  a\n"), (b"-  a", b"- a"), (b"  b\n", b"  b \n")),
    *((b"code\n\n\n", b"code\n\n"), (b"code\n", b"code  \n")),
)


@pytest.mark.parametrize(
    ("old", "new", "is_kept"),
    [*((*pair, False) for pair in SPACED_OTHERWISE), *((*pair, True) for pair in CHANGED)],
)
def test_a_version_that_a_formatter_only_spaced_otherwise_is_not_kept_again(
    home: Home, old: bytes, new: bytes, is_kept: bool
) -> None:
    formatted = NOISY.replace(old, new)
    assert formatted != NOISY
    first, second = keep(home, NOISY), keep(home, formatted)
    assert (second != first, kept_texts(home)) == (is_kept, [NOISY, formatted] if is_kept else [NOISY])
    keep(home, NOISY, path="api.yaml")
    keep(home, formatted, path="api.yaml")  # is no Markdown
    assert len([backup for backup in kept_versions(home) if backup.path == "api.yaml"]) == 2


CLOSED = (b"```\na\n```\n", b"~~~ a`b\n~~~~\n", b"1. > ```sh\n   > ```\n", b"```a```\n", b"```\r\na\r\n```\r\n")
STILL_OPEN = (b"```\na\n", b"````\n```\n", b"~~~\n```\n", b"1. > ```sh\n", b"```\n``` a\n")


@pytest.mark.parametrize(
    ("fenced", "is_code_after"), [*((text, False) for text in CLOSED), *((text, True) for text in STILL_OPEN)]
)
def test_white_space_counts_only_in_code(fenced: bytes, is_code_after: bool) -> None:
    one, other = (orchestra.significant_text("a.md", fenced + b"x" + end) for end in (b"\n", b"\n\n\n"))
    assert (one != other) == is_code_after


@pytest.mark.parametrize(
    ("now", "name"),
    [
        (0.0, "19700101T000000.000000Z"),
        (-1e30, "19700101T000000.000000Z"),
        (1e9 + 0.25, "20010909T014640.250000Z"),
        (4e9, "20961002T070640.000000Z"),
        (1e30, "99991231T000000.000000Z"),
    ],
)
def test_any_clock_names_a_version_by_a_time(home: Home, now: float, name: str) -> None:
    assert [keep(home, text, now) for text in (b"1", b"2")] == [name, name.replace("0Z", "1Z")]
    assert kept_texts(home) == [b"1", b"2"]


def test_the_version_kept_last_is_the_last_though_the_clock_was_set_back(home: Home) -> None:
    whens = [keep(home, b"%d" % number, now) for number, now in enumerate((2e9, 1e9, 1e9, 2e9, 3e9))]
    late, early = "20330518T033320.00000", "20010909T014640.00000"
    assert whens == [f"{late}0Z", f"{early}0Z", f"{early}1Z", f"{late}1Z", "20650124T052000.000000Z"]
    assert [backup.when for backup in kept_versions(home)] == whens
    assert kept_texts(home) == [b"0", b"1", b"2", b"3", b"4"]


def test_versions_of_older_programs_come_first_and_count_as_hand_edits(home: Home) -> None:
    folder = backups_folder(home)
    for year in (2030, 2025):
        notes = json.dumps({"CLAUDE.md": f"edited in {year}"})
        put_files(folder / f"{year}0101T000000.000000Z", {"CLAUDE.md": str(year), orchestra.Backups.NOTES: notes})
    keep(home, b"new")
    assert kept_texts(home) == [b"2025", b"2030", b"new"]
    expected = [("edited in 2025", 0), ("edited in 2030", 0), (orchestra.Reason.EDITED, 1)]
    assert [backup[3:] for backup in kept_versions(home)] == [(*pair, HAND_EDIT) for pair in expected]


def test_an_old_folder_with_several_files_is_thinned_file_by_file(home: Home) -> None:
    folder = backups_folder(home)
    for minute in MINUTES[:11]:
        put_files(folder / minute, {"CLAUDE.md": minute, "AGENTS.md": minute, orchestra.Backups.NOTES: "{}"})
    keep(home, b"new")
    assert sorted(os.listdir(folder / MINUTES[1])) == [orchestra.Backups.NOTES, "AGENTS.md"]
    assert len(kept_versions(home)) == 22


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"CLAUDE.md": []}', b'{"CLAUDE.md": {"number": -1, "quota": 7}}']
    + [b'{"CLAUDE.md": {"number": %s, "why": {}}}' % number for number in (b"1e9", b"true", b"9" * 4300, b'"1"')]
    + [b'{"CLAUDE.md": {"quota": %s}}' % quota for quota in (b"[]", b'"other"')]
    + [None, link_to(".orchestra.json"), os.mkfifo, make_socket],
    ids=lambda damage: repr(damage)[:40],
)
def test_damaged_notes_hide_no_version_and_stop_nothing(home: Home, damage: Any) -> None:
    keep(home, b"1", 2e9)
    when = keep(home, b"2")
    (backups_folder(home) / when / orchestra.Backups.NOTES).unlink()
    put_files(backups_folder(home) / when, {orchestra.Backups.NOTES: damage})
    assert sorted(kept_texts(home)) == [b"1", b"2"]
    keep(home, b"3")
    assert sorted(kept_texts(home)) == [b"1", b"2", b"3"] and kept_texts(home)[-1] == b"3"
    assert {(backup.origin, backup.number >= 0) for backup in kept_versions(home)} == {(HAND_EDIT, True)}


def test_what_is_not_orchestras_in_the_backups_is_neither_listed_nor_touched(home: Home) -> None:
    folder = backups_folder(home)
    outside = home.folder / "outside"
    put_files(outside, {"CLAUDE.md": "outside"})
    foreign = {"other/CLAUDE.md": "other", f"{MINUTES[0]}.zip/CLAUDE.md": "other", MINUTES[1]: "a file"}
    put_files(folder, {**foreign, MINUTES[2]: link_to(str(outside)), "20010909T014640.000000Z": "taken"})
    put_files(folder / MINUTES[3], {"CLAUDE.md": link_to(str(outside / "CLAUDE.md")), "sub": link_to(str(outside))})
    put_files(folder / MINUTES[4], {".orchestra-1-dead.tmp": "half of one, as older programs left it"})
    before = contents(folder)
    for i in range(15):
        when = keep(home, b"%d" % i)
        put_files(folder / when, {"mine.txt": "mine"} if i % 2 else {"mine": link_to(str(outside))})
    assert [text for text in kept_texts(home) if text != b"mine"] == [b"0", *(b"%d" % i for i in range(5, 15))]
    assert before.items() <= contents(folder).items()
    assert len(list(folder.glob("*/mine*"))) == 15 and contents(outside) == {"CLAUDE.md": b"outside"}


def test_a_version_that_cannot_be_read_stops_nothing(home: Home, monkeypatch: Any) -> None:
    keep(home, b"1")
    monkeypatch.setattr(orchestra, "read_disk", refuse(errno.EACCES, "x"))
    keep(home, b"1")
    assert kept_texts(home) == [b"1", b"1"]


@pytest.mark.parametrize(
    ("path", "mode", "kept_mode"),
    [
        ("CLAUDE.md", 0, 0o400),
        ("CLAUDE.md", 0o200, 0o600),
        ("\udcff\n.md", 0o444, 0o444),
        ("a b/'\".md", 0o755, 0o755),
        *((path, 0o640, 0o640) for path in (".orchestra-x.md", "-/.orchestra.json", "é/" * 50 + "x.md")),
    ],
)
def test_a_file_of_any_name_is_kept_readable_for_its_owner(home: Home, path: str, mode: int, kept_mode: int) -> None:
    keep(home, b"1", path=path, mode=mode)
    (kept,) = kept_versions(home)
    assert (kept.path, orchestra.read_disk(kept.file)) == (path, ("file", b"1", kept_mode))


def test_a_version_is_kept_with_one_look_at_the_others(home: Home, monkeypatch: Any) -> None:
    folder = backups_folder(home)
    for minute in MINUTES:
        put_files(folder / minute, {"CLAUDE.md": minute})
    looks = []
    real = orchestra.Backups._versions_of
    monkeypatch.setattr(orchestra.Backups, "_versions_of", lambda self, when: looks.append(when) or real(self, when))
    keep(home, b"new")
    assert sorted(looks) == MINUTES
    assert sorted(os.listdir(folder)) == ["20010909T014640.000000Z", MINUTES[0], *MINUTES[-9:]]


def test_a_version_that_cannot_be_finished_leaves_nothing(home: Home, monkeypatch: Any) -> None:
    monkeypatch.setattr(orchestra.Backups, "_publish", refuse(errno.ENOSPC))
    with pytest.raises(orchestra.IoError, match="no space left on device"):
        keep(home, b"1")
    assert os.listdir(backups_folder(home)) == []


def test_a_version_that_cannot_be_dropped_is_told_once_the_new_one_is_kept(home: Home, monkeypatch: Any) -> None:
    for minute in MINUTES[:12]:
        put_files(backups_folder(home) / minute, {"CLAUDE.md": minute})
    monkeypatch.setattr(orchestra.Backups, "drop", refuse(errno.EACCES))
    with pytest.raises(orchestra.IoError, match="permission denied"):
        keep(home, b"new")
    assert kept_texts(home)[-1] == b"new"


def test_a_temporary_folder_that_cannot_be_removed_stops_nothing(home: Home, monkeypatch: Any) -> None:
    put_files(backups_folder(home) / ".orchestra-old.tmp", {"CLAUDE.md": "half"})
    monkeypatch.setattr(orchestra, "remove_private_folder", refuse(errno.EACCES, "x"))
    keep(home, b"1", time.time() + 1e6)
    assert kept_texts(home) == [b"1"]


@pytest.mark.parametrize("name", ["zzz", "99991231T235959.999999Z", "20269999T000000.000000Z"])
def test_a_folder_in_the_backups_that_is_named_by_no_time_is_left_out(home: Home, name: str) -> None:
    put_files(backups_folder(home), {f"{name}/CLAUDE.md": "by hand"})
    assert keep(home, b"new").startswith("2001")


# 2026-11-29 12:00:00 UTC, and some versions' names
NOON = 1795953600.0
KEPT_AT = ("20261127T090000.000000Z", "20261128T235959.000000Z", "20261129T000000.000000Z", "20261129T114930.500000Z")


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("20261129", (2, 3)),
        ("20261129T1149", (3,)),
        ("20261129t114930.5Z", (3,)),
        ("2026", (0, 1, 2, 3)),
        ("today", (2, 3)),
        ("Yesterday ", (1,)),
        ("2026-11-27", (0,)),
        ("2026-11-29 11:49", (3,)),
        ("2026-11-29T11:49:30Z", (3,)),
        ("11:49", (3,)),
        ("11:49:31", ()),
        ("10 min ago", (0, 1, 2, 3)),
        ("11 minutes ago", (0, 1, 2)),
        ("1d ago", (0,)),
        ("2 weeks ago", ()),
    ],
)
def test_a_version_is_found_by_what_people_type(monkeypatch: Any, typed: str, found: tuple[int, ...]) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    is_wanted = orchestra.parse_when(typed, lambda: NOON)
    assert tuple(i for i, when in enumerate(KEPT_AT) if is_wanted(when)) == found


def test_a_time_of_the_day_is_local_unless_z_follows(monkeypatch: Any) -> None:
    monkeypatch.setenv("TZ", "UTC-9")
    time.tzset()
    try:
        for typed, when in (("08:59", KEPT_AT[1]), ("23:59 Z", KEPT_AT[1]), ("today", KEPT_AT[2])):
            day = NOON - 86400 if "Z" in typed else NOON
            assert orchestra.parse_when(typed, lambda day=day: day)(when), typed
        assert orchestra.local_time(KEPT_AT[1]) == "2026-11-29 08:59:59"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("kept", "taken"),
    [
        (["00 a x", "01 b x", "02 c x"], "abc"),
        (["00 a x", "03 b x", "05 c x"], "bc"),
        (["00 b x", "01 a x", "02 b x"], "ab"),
        (["00 a y", "01 b x"], "b"),
        (["61 a x", "01 b x"], "b"),  # a damaged name
    ],
)
def test_versions_kept_one_soon_after_the_other_are_of_one_sync(kept: list[str], taken: str) -> None:
    rows = [row.split() for row in kept]
    backups = [orchestra.Backup(f"20260301T1010{at}.000000Z", path, "", why) for at, path, why in rows]
    assert "".join(backup.path for backup in orchestra.take_last_group(backups)) == taken


@pytest.mark.parametrize("typed", ["", "tomorrow", "10 months ago", "25:00", "2026-13-01", "-1", "9" * 30, "\x1b"])
def test_what_is_no_time_is_one_line(typed: str) -> None:
    with pytest.raises(orchestra.UsageError, match=r"^--at: expected a time, got '"):
        orchestra.parse_when(typed)


# ── 7 Turns ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("days", [0, 2])
@pytest.mark.parametrize("sweeps", [False, True])
def test_an_abandoned_temporary_folder_is_removed_at_once_or_after_a_day(home: Home, days: int, sweeps: bool) -> None:
    folder, mine, alive = backups_folder(home), ".mine.tmp", f".orchestra-{os.getpid()}-1.tmp"
    for name in (".orchestra-t.tmp", f".orchestra-{DEAD}-1.tmp", mine, ".orchestra-x.tmp", alive):
        put_files(folder / name, {"CLAUDE.md": "half"})
    put_files(folder, {f".orchestra-{DEAD}-2.tmp": "half", f".orchestra-{DEAD}-3.tmp": link_to(str(home.code))})
    put_files(home.code, {"mine": "mine"})
    now = time.time() + days * 86400
    if sweeps:
        turn_at(home, now).clean_up([], str, orchestra.Leftover("t"))
    else:
        keep(home, b"1", now)
    left = {name for name in os.listdir(folder) if "tmp" in name}
    assert left == ({mine} if days else {mine, ".orchestra-x.tmp", alive})
    assert contents(home.code) == {"mine": b"mine"}


@needs_leases
def test_a_file_that_is_opened_for_writing_while_it_is_released_stays(home: Home) -> None:
    put_files(home.code, {".orchestra-1-aa-1-x.tmp": "old", "x": "new"})
    temporary = home.code / ".orchestra-1-aa-1-x.tmp"
    turn = turn_at(home, time.time())

    def open_it(*args: Any) -> bool:
        with pytest.raises(BlockingIOError):  # instead of a wait for the lease
            os.open(temporary, os.O_WRONLY | os.O_NONBLOCK)
        return True

    turn.back_up = open_it  # type: ignore[assignment]
    with orchestra.open_place(str(home.code / "x")) as place:
        assert not orchestra.Displaced(place, temporary.name, ["00"], turn).remove(open_it)
        assert not turn._remove_aside(place.folder, temporary.name, "x", "00")
    assert temporary.read_text() == "old"


@needs_leases
def test_what_is_still_written_to_is_backed_up_only_once_it_is_whole(home: Home) -> None:
    put_files(home.code, {"x": "half"})
    turn = turn_at(home, time.time())
    with orchestra.open_place(str(home.code / "x")) as place:
        with open(home.code / "x", "ab"):
            assert (turn._remove_aside(place.folder, "x", "x", "00"), kept_texts(home)) == (False, [])
        assert (turn._remove_aside(place.folder, "x", "x", "00"), kept_texts(home)) == (True, [b"half"])


# What a killed turn left behind, recorded nowhere


def leave_temporary(folder: Path, end: str = "-1-CLAUDE.md", text: Any = "u1x\n", process: int = DEAD) -> Path:
    put_files(folder, {f".orchestra-{process}-aa{end}.tmp": text})
    return folder / f".orchestra-{process}-aa{end}.tmp"


@needs_leases
@pytest.mark.parametrize("is_linked", [False, True])
@pytest.mark.parametrize("path", ["CLAUDE.md", COPILOT, CURSOR, ".agents/rules/orchestra.md"])
@pytest.mark.parametrize("has_name", [False, True])
def test_a_save_in_a_temporary_file_in_no_record_is_backed_up(
    home: Home, path: str, is_linked: bool, has_name: bool
) -> None:
    files: dict[str, Any] = {"gh": None, ".github": link_to("gh")} if is_linked else {".github": None}
    root = home.make_codebase("shop/api", {**files, ".cursor/rules/x": "", ".agents/rules/x": ""}, targets=ALL_TARGETS)
    for start in ("", "b"):
        leave_temporary((root / path).parent, f"{start}-1-{os.path.basename(path)}" if has_name else f"{start}-1")
    home.sync()
    assert home.backups() == {path if has_name or "/" in path else "leftover.md": b"u1x\n"}
    assert home.leftovers() == []


@pytest.mark.parametrize("folder", [".cursor", ".cursor/rules"])
def test_temporary_files_outside_of_the_codebase_are_left_alone(home: Home, folder: str) -> None:
    outside = home.code / "outside"
    leave_temporary(outside)
    leave_temporary(outside / "rules")
    home.make_codebase("shop/api", {folder: link_to(str(outside))}, targets=["claude", "cursor"])
    before = tree(outside)
    lock = Path(orchestra.codebase_lock_path(home.path, API))
    for text in ("", "1-dead\n"):
        put_files(lock.parent, {lock.name: text})
        home.run("sync", "--all")
        assert tree(outside) == before


def places_kept(home: Home) -> list[str]:
    backups = contents(Path(orchestra.backups_root(home.path)))
    return [re.sub(r"/\d{8}T.*Z/", "/TIME/", path) for path, data in backups.items() if data == b"u1x\n"]


@needs_leases
@pytest.mark.parametrize("name", [".", "..", ".orchestra.json", "..%2F..", "a%2Fb", "%2Fetc"])
@pytest.mark.parametrize("kind", ["", "kept"])
def test_the_name_of_a_temporary_file_leads_nowhere(home: Home, name: str, kind: str) -> None:
    head = f".orchestra-kept-{DEAD}-aa-{'0' * 64}-" if kind else f".orchestra-{DEAD}-aa-1-"
    root = home.make_codebase("shop/api", {f"{head}{name}.tmp": "u1x\n"}, targets=["claude"])
    for _ in range(2):
        home.sync()
    assert b"u1x\n" in home.backups().values() and home.leftovers() == []
    assert (root / "CLAUDE.md").exists()
    assert places_kept(home) == ["shop/api/TIME/leftover.md"] or "%" in name


@needs_leases
def test_the_name_of_a_registrys_temporary_file_leads_nowhere(home: Home) -> None:
    file = leave_temporary(home.projects / "shop", "-1-..")
    put_files(Path(orchestra.run_dir(home.path)), {"registry.lock": "1-dead\n"})
    orchestra.clear_registry(home.path)
    assert not file.exists()
    assert [path.partition("/TIME")[0] for path in places_kept(home)] == ["unknown/unknown"]


def test_a_registry_file_set_aside_beside_the_new_one_goes_at_a_turn_a_minute_later(
    home: Home, monkeypatch: Any
) -> None:
    file = home.write_registry("shop/api.yaml", GOOD)
    put_files(Path(orchestra.backups_root(home.path)), {".aside": link_to("nowhere")})  # or on another disk
    hide_writers(monkeypatch)
    orchestra.save_codebase(home.path, codebase_with(description="new"))
    (left,) = file.parent.glob(".orchestra-kept-*.tmp")
    orchestra.clear_registry(home.path)
    assert left.read_text() == GOOD
    later = orchestra.RegistryTurn(home.path)
    later.clock = lambda: time.time() + 100
    with later:
        assert not left.exists()
    assert (home.backups(), Path(orchestra.run_dir(home.path), "registry.lock").read_bytes()) == ({}, b"")


@pytest.mark.parametrize("name", ["notes.md", "sub/.orchestra-1-aa-1.tmp"])
def test_a_damaged_lock_file_that_names_another_file_as_the_temporary_one_costs_nothing(home: Home, name: str) -> None:
    root = home.make_codebase("shop/api", {"CLAUDE.md": "mine\n", name: "u1x\n"}, targets=["claude"])
    swap = orchestra.Swap(f"{root}/CLAUDE.md", f"{root}/{name}", [orchestra.sha256_of(b"u1x\n")])
    lock = Path(orchestra.codebase_lock_path(home.path, API))
    put_files(lock.parent, {lock.name: orchestra.Leftover("1-aa", swap).format(1)})
    home.sync()
    assert (root / name).read_text() == "u1x\n"


@needs_leases
@pytest.mark.parametrize(
    ("swap", "backups"),
    [
        ('[1, ["/code/CLAUDE.md", "/code/.orchestra-1.tmp", ["ab", "cd"]], 1]\n', {"CLAUDE.md": b"u1x\n"}),
        ("1\0/code", {}),  # cut short, so it was yet to come
    ],
)
def test_a_swap_announced_by_another_version_costs_no_save(home: Home, swap: str, backups: Any) -> None:
    left = leave_temporary(home.make_codebase("shop/api", targets=["claude"]))
    lock = Path(orchestra.codebase_lock_path(home.path, API))
    put_files(lock.parent, {lock.name: f"{DEAD}-aa\n{swap}"})
    home.sync()
    assert (home.backups(), left.exists()) == (backups, False)


def test_what_a_killed_turn_of_the_first_versions_left_is_cleaned_up(home: Home) -> None:
    home.make_synced("shop/api", targets=["claude"])
    leave_temporary(Path(orchestra.backups_of(home.path, API)), "")
    lock = Path(orchestra.codebase_lock_path(home.path, API))
    put_files(lock.parent, {lock.name: f"{DEAD}-aa"})
    home.sync()
    assert (home.leftovers(), lock.read_bytes()) == ([], b"")


@pytest.mark.parametrize("content", [None, os.mkfifo, make_socket, link_to("README.md")])
def test_what_has_a_temporary_files_name_and_is_no_file_stays(home: Home, content: Any) -> None:
    root = home.make_codebase("shop/api", {"README.md": "mine"}, targets=["claude"])
    left = leave_temporary(root, text=content)
    assert sync_later(home).errors == ()
    assert (os.path.lexists(left), home.backups()) == (True, {})


def test_a_huge_temporary_file_is_not_read(home: Home) -> None:
    huge = leave_temporary(home.make_codebase("shop/api", targets=["claude"]), text="")
    os.truncate(huge, orchestra.Turn.MAX_ASIDE + 1)
    assert sync_later(home).has_files_aside and huge.exists()


@needs_leases
@pytest.mark.parametrize("is_known", [False, True])
def test_a_temporary_file_goes_though_there_is_nothing_else_to_do(home: Home, is_known: bool) -> None:
    root = home.make_synced("shop/api", {"CLAUDE.md": "mine\n"}, targets=["claude"])
    leave_temporary(root, text=(root / "CLAUDE.md").read_bytes() if is_known else "u1x\n")
    assert home.sync().lines == []
    assert (home.backups(), home.leftovers()) == ({} if is_known else {"CLAUDE.md": b"u1x\n"}, [])


@needs_leases
def test_a_leftover_that_is_no_agents_file_is_not_advised_to_be_the_registry(home: Home) -> None:
    leave_temporary(home.make_codebase("shop/api", targets=["claude"]), "-1")
    home.sync()
    ran = home.run("restore", "api", "leftover.md")
    assert "only agents' instruction files are restored" in ran.err and "cp " not in ran.err


def test_a_temporary_file_of_a_turn_that_may_still_run_stays_for_a_minute(home: Home) -> None:
    left = leave_temporary(home.make_codebase("shop/api", targets=["claude"]), process=os.getpid())
    assert sync_later(home, 0).has_files_aside and left.exists()
    assert not sync_later(home, orchestra.Turn.ASIDE_TIME + 10).has_files_aside and not left.exists()
    assert home.backups() == {"CLAUDE.md": b"u1x\n"}


@needs_leases
@pytest.mark.parametrize(
    "after", ["rename the codebase", "remove it and register it anew", "lose all but the registry"]
)
def test_a_save_displaced_by_a_killed_sync_is_kept_whatever_comes_next(home: Home, after: str) -> None:
    root = home.make_codebase("shop/api", {"CLAUDE.md": "ours\n", "gh": None, ".github": link_to("gh")})
    left = leave_swap(home, root, "CLAUDE.md")
    renamed = left.rename(root / f".orchestra-{DEAD}-aa-1-CLAUDE.md.tmp")
    edit(Path(orchestra.codebase_lock_path(home.path, API)), left.name, renamed.name)
    name = "web" if after == "rename the codebase" else "api"
    if after == "rename the codebase":
        Path(orchestra.codebase_path(home.path, API)).unlink()
        home.register("shop/web", path=str(root))
    elif after == "remove it and register it anew":
        home.run_fine("project", "remove", "api")
        assert home.leftovers() == [] and SAVED_IN_THE_INSTANT in home.backups().values()
        home.register("shop/api")
    else:
        shutil.rmtree(orchestra.run_dir(home.path))
    home.sync()
    assert SAVED_IN_THE_INSTANT in (*home.backups(f"shop/{name}").values(), *home.backups().values())
    assert home.leftovers() == []


# ══ II Registry ═══════════════════════════════════════════════════════════════

# ── 8 Agents ──────────────────────────────────────────────────────────────────


def frontmatter_of(data: bytes) -> Any:
    found = re.match(rb"---\n(.*?\n)---\n\n", data, re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


@pytest.mark.parametrize("text", HOSTILE)
def test_each_agents_frontmatter_says_that_it_applies_always(text: str) -> None:
    files = orchestra.render_files(hostile_codebase(text))
    found = {agent.target: frontmatter_of(files[agent.path]) for agent in orchestra.AGENTS.values() if agent.owned}
    title = found["cursor"].pop("description")
    assert isinstance(title, str) and title.endswith(": instructions")
    assert found["cursor"] == {"globs": None, "alwaysApply": True}
    always_on = {"trigger": "always_on", "description": title}
    assert found["windsurf"] == found["antigravity"] == found["devin"] == always_on
    assert found["continue"] == {"name": title, "alwaysApply": True}
    assert found["copilot-rules"] == {"applyTo": "**"} and found["augment"] == {"type": "always_apply"}
    plain = {"cline", "claude-rules", "kiro", "amazonq", "aiassistant", "tabnine", "qwen", "roo"}
    assert {target for target, header in found.items() if header is None} == plain
    assert all(files[orchestra.AGENTS[target].path].startswith(b"<!-- Written") for target in plain)


# ── 9 YAML ────────────────────────────────────────────────────────────────────

GOOD = "name: api\npath: /code/api\n"
FROM_RUST = """\
name: api
path: /code/api
projects:
- name: api
  project_type: backend
  tasks:
  - id: T-1
    title: Ship v2
    status: inprogress
    description: null
    subtasks:
    - id: T-1.1
      title: half of it
      done: false
    tracked_files:
    - src/main.rs
    created_at: 2026-03-01T09:15:02.123456789Z
    updated_at: 2026-03-01T09:15:02.123456789Z
  agents:
  - agent_id: reviewer
    entry_point: AGENT/reviewer.md
    skills: [rust]
created_at: 2026-03-01T09:15:02.123456789Z
updated_at: 2026-03-01T09:15:02.123456789Z
"""


def without_digest(codebase: orchestra.Codebase) -> orchestra.Codebase:
    return codebase._replace(digest="", layers=())


def read(home: Home, text: Any) -> tuple[Optional[orchestra.Codebase], list[str]]:
    """Read a registry file; return the codebase and its problems."""
    home.write_registry("shop/api.yaml", text)
    codebase, problems = orchestra.LayerReader(home.path).read(API)
    return codebase and without_digest(codebase), [str(problem) for problem in problems]


@pytest.mark.parametrize(
    "typed",
    ["no", "Yes", "1.10", "12:30", "0x1F", "1_000", "2026-03-01", "2026-03-01T00:00:00Z", "007", "1e3", ".inf", "="],
)
def test_scalars_are_the_text_that_was_typed(home: Home, loader: str, typed: str) -> None:
    expected = codebase_with(description=typed, notes=(typed,), commands=((typed, typed),))
    text = f"{GOOD}description: {typed}\nnotes: [{typed}]\ncommands: {{{typed}: {typed}}}\n"
    assert read(home, text) == (expected, [])


@pytest.mark.parametrize("null", ["", "~", "null", "Null", "NULL"])
def test_null_means_absent(home: Home, loader: str, null: str) -> None:
    text = f"{GOOD}description: {null}\ntargets: {null}\nprojects: {null}\n"
    assert read(home, text) == (codebase_with(), [])


@pytest.mark.parametrize("quoted", ["'null'", '"~"', "'no'"])
def test_quoted_text_is_never_null(home: Home, loader: str, quoted: str) -> None:
    codebase, _ = read(home, f"{GOOD}description: {quoted}\n")
    assert codebase and codebase.description == quoted[1:-1]


def task_file(fields: str) -> str:
    return f"{GOOD}projects:\n- name: a\n  project_type: ml\n  tasks:\n  - {{{fields}}}\n"


def parts_file(*parts: str) -> str:
    return f"{GOOD}projects:\n" + "".join(f"- {{project_type: ml, {part}}}\n" for part in parts)


def deep_lists(count: int) -> str:
    """Nest lists that are indented like their keys: two levels per column."""
    return f"{GOOD}x:\n" + "".join(f"{' ' * i}-\n{' ' * (i + 1)}a:\n" for i in range(count))


TASK = r"7: projects\[0\]\.tasks\[0\]"
NO_PATH = r"2: path: expected an absolute path or ~/\.\.\., got "
TOO_DEEP = "1: yaml: expected at most 100 levels of nesting, got more"
UNFINISHED = "found git's conflict markers: finish the merge first"


def target_file(fields: str) -> str:
    return f"{GOOD}custom_targets:\n  mine: {{{fields}}}\n"


def bad_values(what: str, text: str, problem: str, *values: str) -> dict[str, tuple[str, str]]:
    """Make a bad file of each value, which stands for the % in a text."""
    return {f"{what} {value}": (text.replace("%", value), problem) for value in values}


TARGET_PATH = r"4: custom_targets\.mine\.path: expected a relative path without \.\. to a text for agents .*"
BAD_FILES = {
    "empty": (b"", "1: file: expected a mapping, got nothing"),
    "only a comment": ("# soon\n", "1: file: expected a mapping, got nothing"),
    "NUL": ("name: api\npath: /x\0y\n", "2: yaml: expected printable text, got the character #x0000"),
    "NUL behind other scripts": (f"# {'é' * 20}\n\0\n" + "\n" * 10, "2: yaml: expected printable text, .*"),
    "list at top": ("- api\n", "1: file: expected a mapping, got a list"),
    "text at top": ("api\n", "1: file: expected a mapping, got 'api'"),
    "alias cycle": (GOOD + "x: &a [*a]\n", "1: yaml: an alias contains itself"),
    "deep cycle": (GOOD + "x: &a {b: [{c: *a}]}\n", "1: yaml: an alias contains itself"),
    "deep brackets": (GOOD + "x: " + "[" * 100_000, TOO_DEEP),
    "deep lists": (deep_lists(51), TOO_DEEP),
    "deeper ones": (deep_lists(400), TOO_DEEP),
    "deep dashes": (GOOD + "x:\n" + "- " * 10_000 + "a\n", TOO_DEEP),
    "2 MiB": (GOOD + "# " + "x" * (2 << 20), "1: file: expected at most 1048576 bytes, got more"),
    "long aliases": (f"{GOOD}x: &t {'x' * 10_000}\nnotes: [{'*t,' * 1000}]\n", ".* characters .*, aliases expanded"),
    "keys of aliases": (
        f"{GOOD}skills:\n- &a {{id: x, {', '.join(f'u{i}: 1' for i in range(2000))}}}\n" + "- *a\n" * 101,
        r"4: skills\[99\]: expected at most 200000 keys in the file, aliases expanded",
    ),
    "invalid UTF-8": (b"name: api\npath: /x\xff\n", "2: file: expected UTF-8, got the byte 0xff"),
    "half a character": ('name: api\npath: "/x\\ud800"\n', ".*"),
    "open list": (GOOD + "targets: [claude\n", r"\d: yaml: (did not find )?expected .*"),
    "tab": ("name: api\n\tpath: /x\n", "2: yaml: tabs cannot indent YAML"),
    "at sign": (GOOD + "notes: [@x]\n", "3: yaml: put quotes around text that starts with @"),
    "backtick": (GOOD + "description: `x` is it\n", "3: yaml: put quotes around text that starts with `"),
    "at sign at first": (GOOD + "description: @x is it\n", "3: yaml: put quotes around text that starts with @"),
    "colon": (
        GOOD + "description: a: b\n",
        '3: yaml: this line is indented .*, or text that contains ": " needs quotes',
    ),
    **bad_values(
        *(
            "indentation",
            GOOD + "%",
            "5: yaml: this line is indented .*, or text that begins with a quote or bracket .*",
        ),
        *("commands:\n  build: x\n test: y\n", "projects:\n  - name: x\n  project_type: ml\n"),
    ),
    **bad_values(
        *(
            "text behind",
            GOOD + "notes:\n- %\n",
            "4: yaml: .*, or text that begins with a quote or bracket needs quotes .*",
        ),
        *("'a' b", "{fmt} is", "[x] done"),
    ),
    **bad_values(
        *("no pair", GOOD + "%\nnotes: []\n", '3: yaml: expected "key: value" or "- item"'),
        *("description it is", "description:it is", "-item"),
    ),
    **bad_values(
        *("sign at first", GOOD + "notes:\n- %\n", r"4: yaml: put quotes around text that starts with [*>?].*"),
        *("*.md", "&.md", "> so", "| so"),
    ),
    "question": (GOOD + "description: ? why\n", r"3: yaml: put quotes around text that starts with \?"),
    "list in a line": (GOOD + "notes: - a\n", "3: yaml: a list begins on the next line; .*"),
    "colon in a list": (GOOD + "notes:\n- see: here\n", r'4: notes\[0\]: needs quotes, because it contains ": "'),
    "unknown anchor": (
        "name: api\npath: *nope\n",
        r"2: yaml: put quotes around text that starts with \*",
    ),
    "percent sign": (GOOD + "%x y\n", "[34]: yaml: (put quotes around text that starts with %|expected .*)"),
    "open quote": (GOOD + "description: 'a\nnotes: [b]\n", "3: yaml: the quote that opens here is not closed"),
    "merge conflict": (GOOD + "<<<<<<< HEAD\nnotes: [a]\n=======\n>>>>>>> x\n", "3: yaml: " + UNFINISHED),
    "merge conflict in a list": (GOOD + "notes: [a,\n<<<<<<< HEAD\nb, '\n>>>>>>> x\n']\n", "4: yaml: " + UNFINISHED),
    "half a conflict": (GOOD + "notes:\n- a\n=======\r\n- b\n", "5: yaml: " + UNFINISHED),
    "end of a conflict": (GOOD + "notes:\n- a\n>>>>>>> x\n", "5: yaml: " + UNFINISHED),
    "two documents": (GOOD + "---\n" + GOOD, "3: yaml: expected one document, got another after ---"),
    "key twice": (GOOD + "path: /y\n", "3: path: duplicate key"),
    "nested key twice": (task_file("id: 1, title: t, id: 2"), TASK + r"\.id: duplicate key"),
    "list as key": (GOOD + "? [a]\n: b\n", "3: key: expected text as a key, got a list"),
    "list as key after an unknown one": (GOOD + "x: y\n? [a]\n: b\n", "4: key: expected text as a key, got a list"),
    "merge key": (GOOD + "<<: {a: b}\n", "3: <<: merge keys are not supported, as in YAML 1.2"),
    "no name": ("path: /x\n", "1: name: required, but missing"),
    "empty name": ("name: ''\npath: /x\n", "1: name: expected a value, got nothing"),
    "empty path": ("name: api\npath: ''\n", "2: path: expected an absolute path or ~/..., got ''"),
    "list as name": ("name: [api]\npath: /x\n", "1: name: expected text, got a list"),
    "mapping as path": ("name: api\npath: {a: b}\n", "2: path: expected text, got a mapping"),
    "other name": ("name: web\npath: /x\n", "1: name: the file is called api.yaml, but name says 'web'"),
    "relative path": ("name: api\npath: code/api\n", NO_PATH + "'code/api'"),
    "dot path": ("name: api\npath: .\n", NO_PATH + r"'\.'"),
    "NUL in path": ('name: api\npath: "/a\\0b"\n', NO_PATH + r"'/a\\x00b'"),
    "text as targets": (GOOD + "targets: claude\n", "3: targets: expected a list, got 'claude'"),
    "mapping as targets": (GOOD + "targets: {a: b}\n", "3: targets: expected a list, got a mapping"),
    "unknown target": (GOOD + "targets: [claude, vi]\n", r"3: targets\[1\]: expected claude \| codex .*, got 'vi'"),
    "null target": (GOOD + "targets: [~]\n", r"3: targets\[0\]: expected text, got nothing"),
    "empty target": (GOOD + "targets: ['']\n", r"3: targets\[0\]: expected claude \| .*, got ''"),
    "list as commands": (GOOD + "commands: [make]\n", "3: commands: expected a mapping, got a list"),
    "list as command": (GOOD + "commands: {a: [b]}\n", r"3: commands\.a: expected text, got a list"),
    "text as notes": (GOOD + "notes: text\n", "3: notes: expected a list, got 'text'"),
    "mapping as note": (GOOD + "notes: [a: b]\n", r"3: notes\[0\]: expected text, got a mapping"),
    "text as skill": (GOOD + "skills: [sql]\n", r"3: skills\[0\]: expected a mapping, got 'sql'"),
    "skill without id": (GOOD + "skills: [{description: d}]\n", r"3: skills\[0\]\.id: required, but missing"),
    "text as projects": (GOOD + "projects: text\n", "3: projects: expected a list, got 'text'"),
    "task without title": (task_file("id: 1"), TASK + r"\.title: required, but missing"),
    "empty status": (task_file("id: 1, title: t, status: ''"), TASK + r"\.status: expected pending \| .*, got ''"),
    "unknown status": (
        task_file("id: 1, title: t, status: later"),
        TASK + r"\.status: expected pending \| inprogress \| blocked \| done, got 'later'",
    ),
    **bad_values(
        *("target's path that is too long", target_file("path: %"), TARGET_PATH),
        *("a/" * 100_000 + "x.md", "é" * 127 + ".md"),
    ),
    **bad_values(
        *("target's path", target_file("path: %"), TARGET_PATH),
        *("/x.md", "../x.md", "a/../x.md", "./x.md", "a//x.md", ".git/x.md", ".GIT/x.md", "docs/", "x", "x.py"),
        *("CMakeLists.txt", "requirements-dev.txt", r'"a\nb.md"'),
        *(".claude/skills/x/SKILL.md", ".github/Agents/x.agent.md", "web/.opencode/command/x.md"),
    ),
    **bad_values(
        *("target's path", target_file("path: %"), r".* expected a file that no target has \(use .*"),
        *("AGENTS.md", "agents.md", ".cursor/Rules/orchestra.mdc"),
    ),
    **bad_values(
        *("header", target_file('path: x.md, header: "%"'), r"4: custom_targets\.mine\.header: expected front.*"),
        *("x", "---", "--- a ---", r"---\na", r"---\n---\nx\n---", r"---\n\e\n---", r"x\n---", r"---\nx: <!--\n---"),
    ),
    **bad_values(
        *("limit", target_file("path: x.md, limit: %"), r"4: custom_targets\.mine\.limit: expected .*"),
        *("3 words", r'"3 bytes\n"'),
    ),
    **bad_values(
        *("target's name", GOOD + "custom_targets: {%: {path: x.md}}", "3: custom_targets: expected a new .*"),
        *("codex", r'"mine\n"'),
    ),
    **bad_values(
        "part's path",
        *(parts_file("name: a, path: '%'"), r"4: projects\[0\]\.path: expected a folder's relative path, .*"),
        *("/x", "..", "a/../b", ".", "./a", "a//b", "a/", ".git", "a/.GIT", "~/a", "a*", "a[b]", "@a", "a ", ".x"),
    ),
    "two parts of one name": (
        parts_file("name: a b, path: x", "name: a-B, path: y"),
        r"5: projects\[1\]\.name: projects\[0\] has the same",
    ),
    "two parts of one folder": (
        parts_file("name: a, path: x", "name: c", "name: b, path: X"),
        r"6: projects\[2\]\.path: projects\[0\] has the same",
    ),
    "target in a part's place": (
        parts_file("name: a, path: x, notes: [b]") + "custom_targets: {mine: {path: X/agents.md}}\n",
        r"5: custom_targets\.mine\.path: the part in x has that file",
    ),
    "header of a block": (
        target_file('path: x.md, owns: block, header: "---\\na: b\\n---"'),
        r"4: custom_targets\.mine\.header: only a target that owns the file may have one",
    ),
    "two targets of one file": (
        target_file("path: a/x.md") + "  other: {path: A/X.md}\n",
        r"5: custom_targets\.other\.path: mine has that file",
    ),
    "target without a path": (target_file("owns: file"), r"4: custom_targets\.mine\.path: required, but missing"),
    "target that owns": (target_file("path: x.md, owns: all"), r"4: .*\.owns: expected file \| block, got 'all'"),
    "unknown target beside a custom one": (
        target_file("path: x.md") + "targets: [mine, mien]\n",
        r"5: targets\[1\]: expected one of \d+ names, got 'mien' \(did you mean \"mine\"\?\)",
    ),
    "unknown type": (
        GOOD + "projects: [{name: a, project_type: cloud}]\n",
        r"3: projects\[0\]\.project_type: expected backend \| frontend \| mobile \| ml, got 'cloud'",
    ),
}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("# a\n\n<<<<<<< HEAD\nb\n=======\nc\n>>>>>>> x\n", 3),
        ("<<<<<<< HEAD\r\n=======\r\nc\r\n>>>>>>> x\r\n", 1),
        ("A heading\n=======\n\n<<<<<<<\n>>>>>>>\n", 0),
        ("<<<<<<< HEAD is how it begins\n=======\n", 0),
        ("> >>>>>>> x\n>>>>>>> x\n<<<<<<< HEAD\n", 0),
        (" <<<<<<< HEAD\n=======\n >>>>>>> x\n", 0),
    ],
)
def test_a_conflict_of_gits_has_a_beginning_and_an_end(text: str, line: int) -> None:
    assert orchestra.conflict_line(text) == line
    assert orchestra.find_conflict(text.encode()) == (line, False)


@pytest.mark.parametrize(("text", "expected"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_problem_and_the_others_go_on(home: Home, loader: str, text: Any, expected: str) -> None:
    home.register("shop/good")
    codebase, problems = read(home, text)
    (problem,) = problems
    assert codebase is None
    assert re.fullmatch(rf"~/\.orchestra/projects/shop/api\.yaml:{expected}", problem), problem
    assert list(home.registry().codebases) == [("shop", "good")]
    assert home.problems() == problems


def run_in_time(home: Home, *argv: str) -> Ran:
    return finish(home.start(*argv), timeout=15)


@pytest.mark.parametrize(("title", "problems"), [("t", 1), ("x" * 10_000, 2)], ids=["items", "items and text"])
def test_an_alias_bomb_is_refused_quickly(home: Home, title: str, problems: int) -> None:
    component = "&c {name: a, project_type: ml, tasks: [" + "*t," * 9999 + "]}"
    bomb = f"{GOOD}x: &t {{id: 1, title: {title}}}\nprojects:\n- {component}\n" + "- *c\n" * 9999
    home.write_registry("shop/api.yaml", bomb)
    ran = run_in_time(home, "project", "list")
    assert (ran.status, len(ran.complaints)) == (2, problems)
    assert all(" at most " in complaint for complaint in ran.complaints)


def test_of_many_problems_in_a_file_twenty_are_told(home: Home) -> None:
    targets = [f"t{i}" for i in range(10_000)]
    custom = "".join(f"  u{i}: {{path: u{i}.md}}\n" for i in range(10_000))
    home.write_registry("shop/api.yaml", f"{GOOD}targets: [{', '.join(targets)}]\ncustom_targets:\n{custom}")
    ran = run_in_time(home, "project", "list")
    assert (ran.status, len(ran.complaints)) == (2, 20) and len(ran.err) < 10_000
    assert all(re.search(r": expected one of 10020 names, got", complaint) for complaint in ran.complaints)


@pytest.mark.parametrize(
    ("name", "text"),
    [("api", GOOD + 'commands: {"a\\nb": [x]}\n'), ("api", GOOD + '"a\\nb": 1\n"a\\nb": 1\n'), ("a\nb", GOOD)],
)
def test_a_line_end_in_a_name_does_not_break_the_line_of_a_problem(home: Home, name: str, text: str) -> None:
    home.write_registry(f"shop/{name}.yaml", text)
    (problem,) = home.problems()
    assert "\n" not in problem


# Editing in place


def save_changed(home: Home, text: str, **changes: Any) -> str:
    """Save a codebase's file with some fields changed; return the file's new text."""
    file = home.write_registry("shop/api.yaml", text)
    codebase = orchestra.load_codebase(home.path, *API)
    orchestra.save_codebase(home.path, codebase._replace(**changes))
    reread = orchestra.load_codebase(home.path, *API)
    assert [getattr(reread, name) for name in changes] == list(changes.values())
    return file.read_bytes().decode()


TYPED = """\
# The API.
name: api   # as in the address
path: "/code/api"

colour: red          # Orchestra does not know this
limits: {cpu: 0x10, on: yes}
description: old    # short
projects:
- name: api
  project_type: ml
  owner: kim
# the end
created_at: 2026-03-01T00:00:00Z
"""
LAST = "created_at: 2026-03-01T00:00:00Z\n"


SKILLS = "skills:\n- {id: a, description: x}  # one\n- {id: b}\n"
NEW_SKILLS = (orchestra.Skill("a", "longer"), orchestra.Skill("b", "z"))


@pytest.mark.parametrize(
    ("text", "changes", "old", "new"),
    [
        (TYPED, {}, "", ""),
        (TYPED, {"description": "new"}, "description: old ", "description: new "),
        (TYPED, {"description": "1.10"}, "description: old ", "description: '1.10' "),
        (TYPED, {"description": "a: b # c"}, "description: old ", "description: 'a: b # c' "),
        (TYPED, {"notes": ("n",)}, LAST, LAST + "notes: [n]\n"),
        (TYPED, {"targets": ("claude",)}, LAST, LAST + "targets: [claude]\n"),
        (TYPED, {"targets": ()}, LAST, LAST + "targets: []\n"),
        (TYPED, {"projects": ()}, "projects:\n- name: api\n  project_type: ml\n  owner: kim\n", ""),
        # What says nothing stays.
        *(
            (f"{GOOD}{empty}  # to come\n{LAST}", {"created_at": "y"}, LAST, "created_at: y\n")
            for empty in ("notes: []", "notes:", "commands: {}", "description: ''", "colour: ~")
        ),
        # What differs in more than scalars is replaced whole, and text of several lines becomes a block.
        (
            f"{GOOD}{SKILLS}# end\n",
            {"skills": NEW_SKILLS},
            SKILLS,
            "skills:\n- id: a\n  description: longer\n- id: b\n  description: z\n",
        ),
        (f"{GOOD}description: old\n", {"description": "a\nb"}, "old\n", "|-\n  a\n  b\n"),
    ],
)
def test_a_save_changes_only_what_changed(
    home: Home, loader: str, text: str, changes: dict[str, Any], old: str, new: str
) -> None:
    assert save_changed(home, text, **changes) == text.replace(old, new)


def test_unknown_keys_survive_inside_what_changed(home: Home, loader: str) -> None:
    file = home.write_registry("shop/api.yaml", FROM_RUST)
    codebase = orchestra.load_codebase(home.path, *API)
    projects = (codebase.projects[0]._replace(project_type="ml"), orchestra.Component("api", "backend"))
    orchestra.save_codebase(home.path, codebase._replace(projects=projects))
    values = yaml.load(file.read_bytes(), Loader=yaml.BaseLoader)["projects"]
    assert values[0]["tasks"][0]["tracked_files"] == ["src/main.rs"]
    assert values[0]["tasks"][0]["subtasks"] == [{"id": "T-1.1", "title": "half of it", "done": "false"}]
    assert [component["project_type"] for component in values] == ["ml", "backend"]
    assert yaml.safe_load(file.read_bytes())["projects"][0]["tasks"][0]["subtasks"][0]["done"] is False


@pytest.mark.parametrize(
    "text",
    [
        "{name: api, path: /code/api, colour: red, description: old}",
        "--- # first\nname: api\npath: /code/api\ncolour: red\n...\n",
        "name: api\r\npath: /code/api\r\ncolour: red\r\ndescription: old\r\n",
        "\ufeffname: api\npath: /code/api\ncolour: red",
        "name: api\npath: &p /code/api\ncolour: red\nbase: &b [1]\nagain: [*b, *p]\ndescription: old\n",
        "name: api\npath: /code/api\ncolour: red\ndescription: |\n  old\n  text\n\n# after\nnotes:\n  - a\n",
        "description: ä日\N{GRINNING FACE} old\nname: api\npath: /code/api\ncolour: red\n",
        "name: api\npath: /code/api\ndescription:\ncolour: red\n",
        "? name\n: api\npath: /code/api\ncolour: red\ndescription: >-\n  old\n",
    ],
)
def test_a_save_survives_every_style_of_yaml(home: Home, loader: str, text: str) -> None:
    saved = save_changed(home, text, description="new: ä\N{GRINNING FACE}\nline", notes=("no", "-", "x: y", "\ttab"))
    values = yaml.load(saved, Loader=yaml.BaseLoader)
    assert values["colour"] == "red" and "old" not in saved
    assert values.get("again") in (None, [["1"], "/code/api"])
    assert ("# after" in saved) == ("# after" in text) and ("\ufeff" in saved) == ("\ufeff" in text)
    assert "\r\n" not in text or saved.count("\r\n") == saved.count("\n")


@pytest.mark.parametrize(
    "keys",
    [
        "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10) if i else 'lol'}]\n" for i in range(10)),
        f"a: &a [{'x,' * 30_000}]\n" + "".join(f"a{i}: *a\n" for i in range(10_000)),
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000)),
    ],
    ids=["laughs", "repeated", "nested"],
)
def test_an_alias_bomb_in_unknown_keys_does_not_stop_a_save(home: Home, keys: str) -> None:
    root = home.make_codebase("shop/api")
    home.write_registry("shop/api.yaml", f"name: api\npath: {root}\n{keys}")
    assert run_in_time(home, "init", str(root), "-p", "shop", "-t", "ml").status == 0


def test_saved_text_of_any_kind_is_read_back(home: Home, loader: str) -> None:
    hostile = (
        *("no", "1.10", "~", "null", "'", '"', "- a", "a: b", "#", "a #b", " lead", "trail ", "a\nb\n", "\n", "["),
        *("*a", "&a", "!x", "a\x85b", "a\u2028b\u2029c"),
    )
    codebase = codebase_with(notes=hostile, commands=tuple((text, text) for text in hostile))
    orchestra.save_codebase(home.path, codebase)
    assert without_digest(orchestra.load_codebase(home.path, *API)) == codebase


# ── 10 Kinds ──────────────────────────────────────────────────────────────────

# Kinds have no tests of their own: files are read and written with them, in YAML,
# Codebases and Layers.


# ── 11 Codebases ──────────────────────────────────────────────────────────────


def test_a_file_of_the_rust_original_loads(home: Home, loader: str) -> None:
    codebase, problems = read(home, FROM_RUST)
    assert problems == [] and codebase
    (component,) = codebase.projects
    (task,) = component.tasks
    assert task[:4] == ("T-1", "Ship v2", "inprogress", "")
    assert task.created_at == codebase.created_at == "2026-03-01T09:15:02.123456789Z"
    assert [name for name, _ in task.extra] == ["subtasks", "tracked_files"]
    assert component.agents[0][:3] == ("reviewer", "AGENT/reviewer.md", ("rust",))


@pytest.mark.parametrize(
    ("typed", "status"),
    [("pending", "pending"), ("in_progress", "inprogress"), ("in-progress", "inprogress"), ("done", "done")],
)
def test_a_task_status_has_several_spellings(home: Home, typed: str, status: str) -> None:
    tasks = f"{GOOD}projects: [{{name: a, project_type: ml, tasks: [{{id: 1, title: t, status: {typed}}}]}}]\n"
    codebase, _ = read(home, tasks)
    assert codebase and codebase.projects[0].tasks[0].status == status


# Two slashes at the beginning may mean something else in POSIX, but they do so nowhere.
@pytest.mark.parametrize("slashes", ["", "/"])
@pytest.mark.parametrize("spelling", ["shop/x/../api/", "shop//api", "./shop/api/.", "/shop/api"])
def test_two_codebases_cannot_claim_one_path(home: Home, spelling: str, slashes: str) -> None:
    home.make_codebase("shop/api", created_at="2026-01-02T00:00:00Z")
    home.register("shop/old", path=f"{slashes}{home.code}/{spelling}", created_at="2026-01-01T00:00:00Z")
    assert list(home.registry().codebases) == [("shop", "old")]
    (problem,) = home.problems()
    assert re.fullmatch(r"~/.*shop/api\.yaml:1: path: .* already belongs to shop/old", problem)
    path = home.registry().codebases[("shop", "old")].path
    put_files(home.projects, {"shop/api.yaml": "name: api\n", "shop/api.local.yaml": f"path: {path}\n"})
    assert "shop/api.local.yaml:1: path: " in home.problems()[0]


def test_of_two_links_to_one_folder_the_first_by_name_has_it(home: Home) -> None:
    root = home.code / "real"
    root.mkdir()
    for name in ("one", "two"):
        (home.code / name).symlink_to(root)
        home.register(f"shop/{name}", path=str(home.code / name))
    for _ in range(2):
        ran = home.run("sync", "--all")
        assert ran.status == 2 and len(ran.complaints) == 1 and "belongs to shop/one" in ran.complaints[0]
    assert ran.lines == []


def test_the_folder_of_another_codebase_is_refused_through_a_link_too(home: Home) -> None:
    root = home.make_codebase("shop/api")
    (home.code / "link").symlink_to(root)
    home.register("shop/web", path=str(home.code / "link"))
    ran = home.run("sync", "--all")
    (problem,) = ran.complaints
    assert ran.status == 2 and re.match("orchestra: shop/web: .*: this folder belongs to shop/api", problem)
    assert home.run("status").out.count("current") == 1


WEB = ("shop", "web")


def owners_of(look: Callable[[str], Any], **paths: str) -> orchestra.Owners:
    """Make the owners of folders: `api` is that of shop/api. They were registered in this order."""
    keys = [("shop", name) for name in paths]
    codebases = {key: orchestra.Codebase(*key, "", created_at=str(i)) for i, key in enumerate(keys)}
    return orchestra.Owners(dict(zip(paths.values(), keys)), codebases, look=look)


def test_of_two_paths_with_one_device_and_inode_the_codebase_registered_first_has_the_folder() -> None:
    folders = {"/code/api": (1, 2), "/Code/API": (1, 2), "/code/ops": (2, 2), "/mnt/api": (1, 2)}
    owners = owners_of(folders.get, web="/Code/API", api="/code/api", ops="/code/ops", mnt="/mnt/api", gone="/gone")
    assert [owners.owner_at((1, 2), ("shop", name), "/new") for name in ("web", "api", "mnt", "new")] == [WEB] * 4
    assert owners.keys_at((1, 2)) == [WEB, API, ("shop", "mnt")] and owners.keys_at((1, 2), WEB)[0] == API
    assert owners.owner_at((2, 2), ("shop", "ops"), "/code/ops") == ("shop", "ops") and owners.keys_at((9, 9)) == []
    assert owners.keys_at(None) == []  # as the missing folder is, which is no other's


def test_a_folder_that_was_replaced_after_it_was_looked_at_is_nobody_elses() -> None:
    folders = {"/a": (1, 2), "/b": (1, 3), "/around": (1, 9), "/around/c": (1, 4)}
    owners = owners_of(folders.get, api="/a", web="/b", c="/around/c")
    assert owners.keys_at((1, 2), WEB) == [API] and owners.key_inside((1, 9)) == ("shop", "c")
    folders.update({"/a": (1, 5), "/b": (1, 2), "/around": (1, 6)})
    assert owners.owner_at((1, 2), WEB, "/b") == WEB and owners.key_inside((1, 9)) is None


def test_a_folder_that_was_mounted_after_the_others_were_looked_at_is_known_from_its_first_sync() -> None:
    folders = {"/b": (1, 2)}
    owners = owners_of(folders.get, api="/a", web="/b")
    assert owners.owner_at((1, 2), WEB, "/b") == WEB
    folders["/a"] = (1, 2)
    assert owners.owner_at((1, 2), API, "/a") == API == owners.owner_at((1, 2), WEB, "/b")


def test_reading_the_registry_looks_at_no_folder_and_a_sync_at_each_but_once(home: Home) -> None:
    looks: collections.Counter[str] = collections.Counter()

    def look(path: str) -> Any:
        looks[path] += 1
        return orchestra.identity_of(path)

    for i in range(30):
        home.make_codebase(f"shop/c{i}", targets=[])
    registry = home.registry()
    assert registry.owners._folders is None
    owners = orchestra.Owners(registry.owners, registry.codebases, look=look)
    assert looks == {}
    orchestra.run_pipeline(home.path, orchestra.SyncScope.all(), registry=registry._replace(owners=owners))
    assert len(looks) > 30 and max(looks[path] for path in owners) == 1 and sum(looks.values()) <= 3 * 30


def test_folders_stay_known_until_the_registry_names_others(home: Home) -> None:
    for label in ("shop/api", "shop/web"):
        home.make_codebase(label)
    before = home.registry()
    folders = before.owners.folders
    home.register("shop/api", notes=["new"])
    after = orchestra.reload_codebases(home.path, before, [API])
    assert after.owners.folders is folders
    home.register("shop/api", path=str(home.code))
    moved = orchestra.reload_codebases(home.path, after, [API])
    assert moved.owners.folders.spellings.keys() != folders.spellings.keys()


def test_a_folder_that_never_answers_holds_nobody_up(monkeypatch: Any) -> None:
    monkeypatch.setattr(orchestra.FolderIndex, "PATIENCE", 0.01)
    answer, answered = threading.Event(), []

    def look(path: str) -> orchestra.Identity:
        if path == "/dead":
            answered.append(answer.wait(10))
        return (1, 2)

    owners = owners_of(look, api="/api", web="/dead")
    assert owners.keys_at((1, 2)) == [API] and answered == []
    answer.set()


def test_folders_that_answer_slowly_are_waited_for(monkeypatch: Any) -> None:
    monkeypatch.setattr(orchestra.FolderIndex, "PATIENCE", 0.5)
    owners = owners_of(lambda path: (1, time.sleep(0.05) or 2), **{f"c{i}": f"/{i}" for i in range(12)})
    assert len(owners.folders.spellings[1, 2]) == 12


@contextmanager
def bound(source: Path, target: Path) -> Iterator[None]:
    """Show a folder at a second place, as macOS shows /Users below /System/Volumes/Data."""
    target.mkdir(parents=True)
    command = ["mount", "--bind", str(source), str(target)]
    if not IS_LINUX or subprocess.call(command, stderr=subprocess.DEVNULL) != 0:
        pytest.skip("needs the right to bind a mount")
    try:
        yield
    finally:
        subprocess.check_call(["umount", "-l", str(target)])


def test_a_folder_under_a_second_path_is_the_same_folder(home: Home, monkeypatch: Any) -> None:
    root = home.make_codebase("shop/api", {"src/a.py": ""}, created_at="2026-01-02T00:00:00Z")
    with bound(root, home.code / "other"):
        ran = home.run("init", str(home.code / "other"), "-p", "shop")
        problem = f"orchestra: {home.code}/other: this folder is already registered as shop/api"
        assert (ran.status, ran.complaints) == (2, [problem])
        assert "is already registered" in home.run_fine("init", f"{home.code}/other", "-p", "shop", "--name", "api").out
        monkeypatch.chdir(home.code / "other" / "src")
        created = ["create   shop/api CLAUDE.md", "create   shop/api AGENTS.md"]
        assert home.sync("--dry-run").lines == created
        home.register("shop/web", path=str(home.code / "other"))
        ran = home.run("sync", "--all")
        assert (ran.status, ran.lines) == (2, created)
        assert ran.complaints == [f"orchestra: shop/web: {home.code}/other: this folder belongs to shop/api"]
        assert home.run("project", "remove", "web", "--purge").status == 2 and (root / "CLAUDE.md").exists()
        home.register("shop/web", path=str(home.code / "other"), created_at="2026-01-01T00:00:00Z")
        assert "this folder belongs to shop/web" in home.run("sync", "api").err
        monkeypatch.chdir("/")


def test_the_folder_above_is_known_under_a_second_path_too(home: Home) -> None:
    home.make_codebase("shop/api")
    with bound(home.code / "shop", home.code / "other"), bound(Path(home.path), home.code / "home"):
        for path, found in [("other", "it contains shop/api"), ("home", "the home folder")]:
            ran = home.run("init", str(home.code / path), "-p", "shop")
            assert ran.status == 2 and f"{path}: {found}" in ran.err
        (home.code / "home/code").mkdir()
        home.run_fine("init", str(home.code / "home/code"), "-p", "shop")
        assert home.registry().codebases[("shop", "code")].path == "~/code"


UNFIT = {
    "the home folder cannot be a codebase": ("~/", "~/link"),
    "the root of the file system cannot be a codebase": ("/",),
    "a folder of Orchestra's own cannot be a codebase": ("~/.orchestra", "~/.orchestra/projects/shop", "~/own"),
    "a hidden folder in the home folder is a codebase only in a repository (git init)": (
        "~/.claude",
        "~/.config/x",
        "~/claude",
    ),
    "it contains shop/api and is not a repository itself": ("{code}", "{code}/shop/", "{code}/real", "{code}/deep"),
}


@pytest.mark.parametrize(("path", "found"), [(path, found) for found, paths in UNFIT.items() for path in paths])
def test_folders_that_cannot_be_a_codebase_are_refused(home: Home, path: str, found: str) -> None:
    root = home.make_codebase()
    put_files(home.code, {"real/x": "", "link": link_to("real/api"), "deep/er/x": "", "via": link_to("deep/er")})
    put_files(Path(home.path), {"link": link_to("."), "own": link_to(".orchestra/hashes")})
    put_files(Path(home.path), {".claude/x": "", ".config/x/y": "", "claude": link_to(".claude")})
    if path.endswith("real"):
        shutil.move(str(root), home.code / "real/api")
        home.register(path=str(home.code / "link"))
    if path.endswith("deep"):
        shutil.move(str(root), home.code / "deep/er/api")
        home.register(path=str(home.code / "via/api"))
    home.sync()
    path = path.format(code=home.code)
    before = contents(home.folder)
    ran = home.run("init", path, "-p", "shop")
    place = os.path.normpath(path.replace("~", home.path))
    assert ran.status == 2
    assert ran.complaints == [f"orchestra: {place}: {found}"]
    home.register("shop/half", path=path)
    ran = home.run("sync", "half", *(["--dry-run"] if path == "/" else []))
    problem = f"{place}: {found}: nothing is written there"
    assert (ran.status, ran.err) == (2, f"orchestra: shop/half: {problem}\n  try: orchestra edit shop/half\n")
    assert home.status_of("shop/half") == "error"
    os.unlink(orchestra.codebase_path(home.path, ("shop", "half")))
    assert {name for name in contents(home.folder).keys() - before.keys() if "/run/" not in name} == set()


@pytest.mark.parametrize("entry", [".git", ".hg", ".svn", ".jj", ""])
def test_a_repository_may_hold_codebases_and_any_other_folder_not_any_more(home: Home, entry: str) -> None:
    root = home.make_synced("shop/whole", {entry: "gitdir: /elsewhere\n"} if entry else {})
    (root / "api").mkdir()
    ran = home.run_fine("init", str(root / "api"), "-p", "shop", "--sync")
    note = "shop/whole is no longer synced: its folder contains this one and is not a repository"
    note = "this folder is in that of shop/whole" if entry else note
    note = f"note: {note}; if that was not meant: orchestra project remove shop/api\n"
    assert ran.err == note
    assert home.status_of("shop/api") == "current" and home.status_of("shop/whole") == ("current" if entry else "error")
    assert (root / "CLAUDE.md").exists()
    home.run_fine("project", "remove", "whole", "--purge")
    assert not (root / "CLAUDE.md").exists() and (root / "api/CLAUDE.md").exists()


def test_a_hidden_folder_of_the_home_folder_may_be_in_a_repository(home: Home) -> None:
    put_files(Path(home.path), {".dots/.git/config": "", ".dots/api/x": "", "code/.x/y/z": ""})
    for name in ("~/.dots/api", "~/code/.x/y"):
        home.run_fine("init", name, "-p", "shop", "--sync")


def test_a_repository_in_another_may_be_a_codebase_without_ado(home: Home) -> None:
    root = home.make_synced("shop/whole", {".git": None, "sub/.git": "gitdir: ../.git/modules/sub"})
    assert home.run_fine("init", str(root / "sub"), "-p", "shop").err == ""


def test_a_path_that_was_cut_short_to_the_folder_above_gets_no_files(home: Home) -> None:
    root = home.make_synced()
    home.register(path=str(root.parent))
    ran = home.run("sync", "--all")
    problem = "this folder holds the codebase's former one"
    assert ran.status == 2 and f"shop/api: {root.parent}: {problem}, {root}, and is no repository itself" in ran.err
    assert os.listdir(root.parent) == ["api"] and (root / "CLAUDE.md").exists()
    (root.parent / ".git").mkdir()
    home.sync()
    assert (root.parent / "CLAUDE.md").exists()


@pytest.mark.parametrize(
    ("name", "listed"), [("shop", "shop"), ("Shop", "shop"), ("SHOP", "shop"), ("new", "new"), ("Blog", "blog")]
)
def test_a_name_is_spelled_as_its_folder_lists_it(name: str, listed: str) -> None:
    # A volume that ignores case, where blog is a link to shop.
    inodes = {"shop": 1, "blog": 2, "apart": 3}

    def look(path: str, follow: bool) -> Optional[orchestra.Identity]:
        inode = inodes.get(os.path.basename(path).lower())
        return None if inode is None else (1, 1 if follow and inode == 2 else inode)

    assert orchestra.listed_name("/r", name, lambda folder: list(inodes), look) == listed


def test_init_lands_in_the_project_and_the_name_that_are_listed(home: Home, monkeypatch: Any) -> None:
    home.write_registry("shop/project.yaml", "name: shop\n")
    (home.code / "API").mkdir()
    monkeypatch.setattr(orchestra, "listed_name", lambda folder, name: name.lower())
    ran = home.run_fine("init", str(home.code / "API"), "-p", "Shop")
    assert ran.out.splitlines()[0].startswith("registered shop/api: ")
    assert home.registry().keys == [API]


@pytest.mark.parametrize(
    "name",
    [
        *("", "../x", "a/b", "/", ".x", "..", ".", "#x", "x~", "a\0b", "a\nb", "a\x7fb", "a\x85b", "\udcff"),
        *("a\u202eb", "a\u2028b", "\u2067a"),
        *("a" * 101, "a" * 300, "\N{GRINNING FACE}" * 100),
    ],
)
def test_names_that_would_leave_the_registry_or_hide_in_it_are_refused(home: Home, name: str) -> None:
    for kind in ("project", "codebase"):
        with pytest.raises(orchestra.RegistryError, match=f"^{kind} name '.*': "):
            orchestra.check_name(kind, name)
    project, codebase = home.run("init", home.path, "-p", name), home.run("init", home.path, "-p", "p", "--name", name)
    assert (project.status, codebase.status) == (2, 2)
    assert contents(home.folder) == {}


@pytest.mark.parametrize(
    "name", ["a", "a" * 100, "Ünï", "日本", "a b", "a.b-c_d", "-x", "*", "x'y\"", "\N{GRINNING FACE}" * 60]
)
def test_any_other_name_works_everywhere(home: Home, name: str) -> None:
    root = home.code / "x"
    root.mkdir()
    home.run_fine("init", str(root), f"--project={name}", f"--name={name}", "--sync")
    assert home.status_of(f"{name}/{name}") == "current"
    assert home.sync("--", name).lines == []


def test_a_codebase_is_not_called_project_but_a_project_may_be(home: Home) -> None:
    assert home.run("init", str(home.code), "-p", "shop", "--name", "project").status == 2
    assert home.run("init", str(home.code), "-p", "project", "--name", "api").status == 0


KEYS = [("blog", "api"), API, ("shop", "web")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("web", "--- /dev/null"),
        ("shop/api", "--- /dev/null"),
        ("blog/api", "--- /dev/null"),
        ("api", 'orchestra: "api" is in 2 projects: blog/api, shop/api'),
        ("blog/web", 'orchestra: no codebase is called "blog/web" (did you mean "shop/web"?)'),
        ("", 'orchestra: no codebase is called ""'),
        ("/api", "orchestra: /api is not in a registered codebase"),
    ],
)
def test_a_short_name_is_enough_while_it_is_unique(home: Home, name: str, expected: str) -> None:
    for key in KEYS:
        home.make_codebase("/".join(key))
    ran = home.run("diff", name)
    assert (ran.out + ran.err).splitlines()[0] == expected


def test_the_short_names_of_codebases_are_those_that_find_them() -> None:
    assert [*orchestra.short_names(KEYS).values()] == ["blog/api", "shop/api", "web"]


@pytest.mark.parametrize(
    ("home_folder", "path", "written"),
    [("/", "/code/api", "~/code/api"), ("/nowhere", "/code/api", "/code/api"), ("/h", "/h", "/h")],
)
def test_a_path_is_spelled_from_the_home_and_read_as_the_same(home_folder: str, path: str, written: str) -> None:
    assert orchestra.spell_path(home_folder, path) == written
    assert orchestra.codebase_root(home_folder, orchestra.Codebase(*API, written)) == path


# ── 12 Markdown ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", None),
        (b"text\n", None),
        (block(), block()),
        (b"a\n" + block() + b"\nb", block()),
        (b"a\r\n" + block().replace(b"\n", b"\r\n") + b"\r\n", block().replace(b"\n", b"\r\n")),
        (BEGIN + b"  \nx\n" + END + b"\t\n", BEGIN + b"  \nx\n" + END),
        (b"inline " + block(), "found orchestra:end on line 3 without orchestra:begin: put the begin marker back"),
        (b"> " + BEGIN + b"\n`" + END + b"`\n", None),
        (block() + b"\n" + block(), "begin on line 1, end on line 3, begin on line 4, end on line 6"),
        (
            BEGIN + b"\nx",
            "found orchestra:begin on line 1 without orchestra:end: put the end marker back,"
            " or delete the begin marker",
        ),
        (b"x\n" + END, "found orchestra:end on line 2 without orchestra:begin: put the begin marker back"),
        (END + b"\n" + BEGIN, "end on line 1, begin on line 2"),
        (BEGIN + b"\n" + block(), "begin on line 1, begin on line 2, end on line 4"),
    ],
)
def test_a_block_is_found_whole_or_refused(data: bytes, found: Any) -> None:
    try:
        span = orchestra.find_block(data)
    except orchestra.SyncError as error:
        assert isinstance(found, str) and found in str(error)
    else:
        assert (data[span] if span else None) == found


FENCED = b"```\n" + block("example") + b"\n```\n"


@pytest.mark.parametrize(
    ("data", "blocks"),
    [
        (FENCED, 0),
        (FENCED.replace(b"```", b"~~~"), 0),
        (FENCED.replace(b"```\n<", b"```md x=1\n<"), 0),
        (FENCED.replace(b"```", b"   ```"), 0),
        (FENCED.replace(b"\n```\n", b"\n````` \n"), 0),
        (b"````\n```\n" + block() + b"\n```\n````\n", 0),
        (FENCED + block(), 1),
        (block() + b"\n" + FENCED, 1),
        (b"```\n" + BEGIN + b"\n```\n" + block(), 1),
        (block() + b"\n~~~\n" + END + b"\n~~~\n", 1),
        (b"- x\n  ```\n  code\n  ```\n" + FENCED, 0),
        (b"- ```sh\n  code\n  ```\n" + FENCED, 0),
        (b"1. - ```\n     code\n" + block() + b"\n```\n", 1),
        (b"- ```\n  left open\n\n" + block() + b"\n  ```\n", 1),
        (b"> ```\n" + block() + b"\n", 1),
        (b"```\n" + block(), 1),
        (b"```\n" + block() + b"\n    ```\n", 1),
        (b"```\n" + block() + b"\n~~~\n", 1),
        (b"````\n" + block() + b"\n```\n", 1),
        (b"```\n" + block() + b"\n``` sh\n", 1),
        (b"``` a`b\n" + block() + b"\n```\n", 1),
        (b"    ```\n" + block() + b"\n```\n", 1),
        (b"<!-- a\n```\n-->\n" + block() + b"\n```\n", 1),
        (b"<!-- a -->\n" + FENCED, 0),
        (b"<!-- a\n" + FENCED, 1),  # its marker ends the comment
    ],
)
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_markers_in_a_code_fence_do_not_count_once_it_is_closed(data: bytes, blocks: int, newline: bytes) -> None:
    span = orchestra.find_block(data.replace(b"\n", newline))
    assert (span is not None) == bool(blocks)


@pytest.mark.parametrize(
    ("text", "line", "is_fenced"),
    [
        ("```\n<<<<<<< HEAD\na\n=======\nb\n>>>>>>> x\n```\n", 2, True),
        ("~~~\r\n<<<<<<< 1a2b3c4 (x)\r\n=======\r\n>>>>>>> x\r\n~~~\r\n", 2, True),
        ("```\n<<<<<<< ours:r.md\n=======\n>>>>>>> theirs:s.md\n```\n", 2, True),
        ("```\n<<<<<<< Updated upstream\n=======\n>>>>>>> Stashed changes\n```\n", 2, True),
        ("```\n<<<<<<< .merge_file_IIKOCF\n=======\n>>>>>>> .merge_file_zLCZuq\n```\n", 2, True),
        ("```\n<<<<<<< feature\n=======\n>>>>>>> local\n```\n", 2, True),
        ("```\r\n<<<<<<< feature:r.md\r\n=======\r\n>>>>>>> local\r\n```\r\n", 2, True),
        ("```\n<<<<<<< main:r.md\n=======\n>>>>>>> local:s.md\n```\n", 2, True),
        ("```\n<<<<<<< yours\n=======\n>>>>>>> local edits\n```\n", 0, False),
        ("```\n<<<<<<< feature\n>>>>>>> local\n```\n", 0, False),
        ("```\n<<<<<<< yours\na\n=======\nb\n>>>>>>> theirs\n```\n", 0, False),
        ("```\n<<<<<<< HEAD\n>>>>>>> x\n```\n\nHeading\n=======\n", 0, False),
        ("```\n<<<<<<< yours\n>>>>>>> x\n```\n<<<<<<< a\n>>>>>>> b\n", 5, False),
        ("```\n<<<<<<< yours\n=======\n>>>>>>> x\n", 2, False),
        ("```\n```\n<<<<<<< yours\n>>>>>>> x\n```\n```\n", 3, False),
        ("```\n<<<<<<< yours\na\n```\nb\n=======\n```\n>>>>>>> x\n```\n```\n", 2, False),
        ("<<<<<<< yours\n```\n=======\n```\n>>>>>>> x\n", 1, False),
        ("<!--\n<<<<<<< yours\n>>>>>>> x\n-->\n", 2, False),
    ],
)
def test_less_than_git_writes_of_a_conflict_is_an_example_in_a_closed_fence(
    home: Home, text: str, line: int, is_fenced: bool
) -> None:
    assert orchestra.find_conflict(text.encode()) == (line, is_fenced)
    home.write_registry("shop/api.md", text)
    root = home.make_codebase(targets=["codex"])
    ran = home.run("sync", "--all")
    assert ("or indent the example" in ran.err, ran.status == 2) == (is_fenced, line > 0)
    assert line or (root / "AGENTS.md").read_text().count("<<<<<<< ") == 1


# ── 13 Layers ─────────────────────────────────────────────────────────────────


LAYERED = {
    "all.yaml": "conventions: [all, same]\ncommands: {lint: all, test: all}\nskills: [{id: sql, description: all}]\n"
    "description: all\ntargets: [codex]\ninclude: [python.md]\n",
    "all.md": "of all",
    "all.local.yaml": "conventions: [mine]\nnotes: [n]\n",
    "shop/project.yaml": "name: shop\nconventions: [same, shop]\ncommands: {test: shop}\ncreated_at: 2020-01-01\n",
    "shop/project.md": "of shop\n",
    "shop/project.local.md": "of my shop\n",
    "shop/api.yaml": "name: api\ncommands: {build: api}\nskills: [{id: sql, description: api}, {id: css}]\n"
    "include: [sub/deep.md, python.md]\n",
    "shop/api.md": "\n\n  of api  \n\n",
    "shop/api.local.yaml": "path: ~/api\ntargets: []\ndescription: local\n",
    "shop/api.local.md": "of my api",
    "python.md": "root's python",
    "shop/python.md": "shop's python",
    "shop/sub/deep.md": "deep",
    "README.md": "# not this",
    "shop/web.md": "<!-- orchestra:begin -->",
}


def test_the_layers_of_a_codebase_are_joined_from_the_weakest_to_the_strongest(home: Home) -> None:
    put_files(home.projects, LAYERED)
    registry = home.registry()
    api = registry.codebases[API]
    sql, css = (orchestra.Skill("sql", "api"), orchestra.Skill("css"))
    commands = (("lint", "all"), ("test", "shop"), ("build", "api"))
    conventions = ("all", "same", "mine", "shop")
    assert api[2:9] == ("~/api", "local", (), commands, conventions, ("n",), (sql, css))
    assert (api.name, api.created_at, registry.problems, registry.remarks([API])) == ("api", "", [], [])
    texts = ["root's python", "of all", "of shop", "of my shop", "deep", "shop's python", "  of api", "of my api"]
    assert [prose.text for prose in api.prose] == texts
    assert [os.path.basename(layer.path) for layer in api.layers][2:4] == ["project", "project.local"]


def what_is_known(registry: orchestra.Registry) -> orchestra.Registry:
    """Leave out what was read for it."""
    return registry._replace(seen={})


@pytest.mark.parametrize("name", sorted({*LAYERED} - {"README.md", "shop/web.md"} | {"shop/project.local.yaml"}))
def test_a_change_of_any_layer_counts_at_the_next_look(home: Home, name: str) -> None:
    put_files(home.projects, LAYERED)
    before = home.registry()
    api = before.codebases[API]
    assert orchestra.is_current(home.path, api) and orchestra.load_with_layers(home.path, API) == api
    assert what_is_known(orchestra.reload_codebases(home.path, before, [API])) == what_is_known(before)
    put_files(home.projects, {name: LAYERED.get(name, "notes: [x]") + "\n# x\n"})
    assert not orchestra.is_current(home.path, api)
    after = orchestra.reload_codebases(home.path, before, [API])
    assert after.codebases[API].digest not in ("", api.digest) and after.codebases == home.registry().codebases
    (home.projects / name).unlink()
    assert orchestra.is_current(home.path, api) == (name not in LAYERED)


def test_what_codebases_share_is_read_once_and_kept_once(home: Home, monkeypatch: Any) -> None:
    put_files(home.projects, LAYERED)
    home.write_registry("shop/web.yaml", LAYERED["shop/api.yaml"].replace("name: api", "name: web"))
    read: list[str] = []
    make = orchestra.RegistryFile.__init__

    def note_reading(file: Any, home: str, path: str, *rest: Any) -> None:
        read.append(path)
        make(file, home, path, *rest)

    monkeypatch.setattr(orchestra.RegistryFile, "__init__", note_reading)
    before = home.registry()
    assert len(read) == len(set(read))
    after = orchestra.reload_codebases(home.path, before, [API, WEB])
    for label in (API, WEB):
        one, other = before.codebases[label], after.codebases[label]
        shared = {id(prose) for prose in one.prose if "/api" not in prose.file and "/web" not in prose.file}
        assert shared <= {id(prose) for prose in other.prose}
        assert [a is b for a, b in zip(one.layers, other.layers)][:4] == [True] * 4
    put_files(home.projects, {"shop/web.yaml": "name: web\n"})
    again = orchestra.load_registry(home.path, before)
    assert what_is_known(again) == what_is_known(home.registry()) and again.codebases[WEB] != before.codebases[WEB]
    assert again.codebases[API] is before.codebases[API]
    put_files(home.projects, {"shop/api.yaml": LAYERED["shop/api.yaml"] + "notes: [new]\n"})
    edited = orchestra.reload_codebases(home.path, again, [API])
    old, new = (registry.codebases[API].layers[4].said for registry in (again, edited))
    assert (old.notes, new.notes) == ((), ("new",)) and new.skills is old.skills


@pytest.mark.parametrize("stem", ["shop/api", "shop/project"])
def test_a_codebase_may_be_called_as_a_file_of_prose(home: Home, stem: str) -> None:
    files = {f"{stem}.md": "prose", f"{stem}.md.yaml": f"name: {stem[5:]}.md\n", "shop/api.yaml": "name: api\n"}
    put_files(home.projects, files)
    before = home.registry()
    assert len(before.codebases) == 2 and orchestra.load_registry(home.path, before) == before


BAD_LAYERS = {
    "a folder": ({"all.yaml": None}, "all.yaml:1: file: expected a file, got a folder"),
    "a folder of prose": ({"shop/api.md": None}, "shop/api.md:1: file: expected a file, got a folder"),
    "a circle": ({"shop/project.md": link_to("project.md")}, "shop/project.md:1: file: .*(link|links)"),
    "2 MiB": ({"shop/project.local.md": "x" * (2 << 20)}, "shop/project.local.md:1: file: expected at most 1048576 .*"),
    "not UTF-8": ({"all.local.md": b"a\nb\xff"}, "all.local.md:2: file: expected UTF-8, got the byte 0xff"),
    "YAML": ({"shop/api.local.yaml": "notes: text"}, "shop/api.local.yaml:1: notes: expected a list, got 'text'"),
    "a name": (
        {"shop/api.local.yaml": "name: api.local"},  # as before 0.2 it could be called
        r"shop/api\.local\.yaml:1: name: the codebase is called api, but name says 'api\.local'",
    ),
    "a project's name": (
        {"shop/project.yaml": "name: other"},
        "shop/project.yaml:1: name: the folder is called shop, but name says 'other'",
    ),
    "a merge": ({"all.md": "a\n<<<<<<< a\nb\n=======\n>>>>>>> c\n"}, "all.md:2: file: found git's conflict markers.*"),
    "a link out": ({"all.md": link_to("/etc/hostname")}, "all.md:1: file: .*, got a link to /.*"),
    "a link out to YAML": (
        {"shop/project.yaml": link_to("/etc/hostname")},
        "shop/project.yaml:1: file: .*, got a link .*",
    ),
    "include: missing": (
        {"all.yaml": "notes: [a]\ninclude:\n- python.md\n- no.md\n", "python.md": ""},
        r"all.yaml:4: include\[1\]: no file no.md beside this one or in the registry's root",
    ),
    "include: up": (
        {"shop/project.yaml": "include: [../x.md]"},
        r"shop/project.yaml:1: include\[0\]: expected a rel.*",
    ),
    "include: absolute": ({"all.yaml": "include: [/x.md]"}, r"all.yaml:1: include\[0\]: expected a relative path .*"),
    "include: YAML": (
        {"all.yaml": "include: [all.yaml]"},
        r"all.yaml:1: include\[0\]: expected .* that ends in .md, .*",
    ),
    "include: hidden": (
        {"all.yaml": "include: [.x.md]", ".x.md": "x"},
        r"all.yaml:1: include\[0\]: expected .* without hidden names .*",
    ),
    "include: more than a file can have": (
        {
            "shop/project.yaml": f"include: [{', '.join(f'{i}.md' for i in range(100))}]",
            "big.md": "x" * orchestra.MAX_REGISTRY_FILE,
            **{f"shop/{i}.md": link_to("../big.md") for i in range(9)},
        },
        "shop/project.yaml:1: include: expected files of at most 8388608 characters together, got more",
    ),
    "include: not UTF-8": ({"all.yaml": "include: [x.md]", "x.md": b"\xff"}, "x.md:1: file: expected UTF-8, .*"),
    "include: a link out": (
        {"all.yaml": "include: [sub/x.md]", "sub": link_to("shop"), "shop/x.md": link_to("/etc/hostname")},
        "sub/x.md:1: file: .*, got a link to /.*",
    ),
    "include: a folder out": (
        {"shop/project.yaml": "include: [sub/hostname.md]", "shop/sub": link_to("/etc")},
        r"shop/project.yaml:1: include\[0\]: no file sub/hostname.md .*",
    ),
}


@pytest.mark.parametrize(("files", "expected"), BAD_LAYERS.values(), ids=BAD_LAYERS)
def test_a_bad_layer_is_one_problem_and_stops_what_it_covers(home: Home, files: dict[str, Any], expected: str) -> None:
    for label in ("shop/api", "shop/web", "blog/api"):
        home.make_synced(label, targets=["claude"])
    put_files(home.projects, files)
    (problem,) = home.problems()
    assert re.fullmatch(rf"~/\.orchestra/projects/{expected}", problem), problem
    name = re.match(r"(?:(\w+)/)?(\w+)", expected)
    assert name
    spared = {"api": {"shop/web", "blog/api"}, "project": {"blog/api"}}.get(name[2], set())
    assert {orchestra.label_for(key) for key in home.registry().codebases} == spared
    home.register("blog/api", notes=["new"], targets=["claude"])
    ran = home.run("sync", "--all")
    assert ran.status == 2 and ran.err.count("orchestra: ~") == 1
    assert home.has("new", "blog/api") == ("blog/api" in spared)
    assert all(home.read(label).startswith("<!--") for label in ("shop/api", "shop/web", "blog/api"))


@pytest.mark.parametrize(("linked", "target"), [("projects", "../blog/kept.md"), ("projects/shop", "sub/kept.md")])
def test_a_link_may_lead_to_another_file_of_a_registry_or_project_that_is_a_link(
    home: Home, linked: str, target: str
) -> None:
    home.make_codebase()
    put_files(home.projects, {"blog/kept.md": "kept", "shop/sub/kept.md": "kept", "shop/api.md": link_to(target)})
    folder = Path(orchestra.orchestra_root(home.path), linked)
    folder.rename(home.folder / "elsewhere")
    folder.symlink_to(home.folder / "elsewhere")
    assert [prose.text for prose in home.registry().codebases[API].prose] == ["kept"]


def test_each_included_file_that_is_missing_is_a_problem(home: Home) -> None:
    home.make_codebase(include=["a.md", "b.md", "a.md"])
    lost = "no file {} beside this one or in the registry's root"
    expected = [f"include[{i}]: {lost.format(name)}" for i, name in enumerate(["a.md", "b.md", "a.md"])]
    assert [problem.partition("yaml:")[2].partition(": ")[2] for problem in home.problems()] == expected


@pytest.mark.parametrize(
    ("name", "text", "notes"),
    [
        ("all.yaml", "path: /x\nname: all\n", ["1: path: ignored here: .* own file", "2: name: ignored here: .*"]),
        ("shop/project.yaml", "a: b\nprojects: x\n", ["1: a: unknown key, ignored", "2: projects: ignored .*"]),
        ("shop/api.local.yaml", "created_at: x\n", ["1: created_at: ignored here: .* file or project.yaml"]),
        (
            "shop/project.yaml",
            "convention:\n- x\n",
            ["1: convention: unknown key, ignored: did you mean conventions.?"],
        ),
        ("shop/project.yaml", "skills:\n- {id: a, desc: b}\n", [r"2: skills\[0\]\.desc: unknown key, ignored"]),
        ("shop/project.yaml", "".join(f"key{n}: x\n" for n in range(999)), ["[0-9]+: key[0-9]+: unknown .*"] * 20),
        (
            "shop/project.yaml",
            "notes:\n- é😀 see #12 now\n- 'see' #x\n- see # x\n- C#\n- see\n  all #y\n- |\n  see #z\n",
            [r"2: notes\[0\]: '#12' begins a comment, so it is left out: .*", r"6: notes\[4\]: '#y' begins .*"],
        ),
        ("all.yaml", "notes:\n- !important x\n- !!str 1.10\n", [r"2: notes\[0\]: '!important' is a tag in YAML, .*"]),
        ("all.yaml", "x" * 999 + ": y\n", [r"1: 'x+\.\.\.': unknown key, ignored"]),
        ("all.md", "# A\n```sh\nls\n", ["2: the code fence is never closed: closed at the end of the file"]),
        ("shop/api.md", "a\n<!-- b\n```\nc\n", ["2: the comment is never closed: closed at the end of the file"]),
        ("all.md", "`@/a` @docs/x.md a@/b\n@~/.x/y, @/a\n", ["2: agents may import @~/.x/y from .*: put .*"]),
        ("all.md", "<!-- Orchestra:END -->\n", ["1: a marker of Orchestra's own: agents see it as text"]),
    ],
)
@pytest.mark.usefixtures("loader")
def test_what_is_ignored_in_a_file_is_noted(home: Home, name: str, text: str, notes: list[str]) -> None:
    home.make_codebase()
    home.write_registry(name, text)
    for _ in range(2):  # from the file, then from the cache
        registry = home.registry()
        found = [str(note) for note in registry.remarks([API])]
        assert registry.problems == [] and len(found) == len(notes)
        for note, expected in zip(found, notes):
            assert re.fullmatch(rf"~/\.orchestra/projects/{name}:{expected}", note), note


def test_init_keeps_the_schema_where_new_files_say_that_it_is(home: Home) -> None:
    for name in ("api", "web"):
        folder = home.code / name
        folder.mkdir()
        home.run_fine("init", str(folder), "-p", "shop")
        schema = Path(orchestra.schema_path(home.path))
        assert schema.read_text() == home.run_fine("schema").out
        schema.write_text("{}")  # an older version's
    for name in ("api", "web", "project"):
        head, _, text = home.file(f"shop/{name}").read_text().partition("\n")
        assert head.startswith("# yaml-language-server: $schema=") and text.startswith("name: ")
        assert (home.projects / "shop" / head.partition("=")[2]).samefile(schema)


def test_notes_are_told_by_every_command_and_with_strict_a_failure(home: Home) -> None:
    note = "~/.orchestra/projects/all.yaml:1: convention: unknown key, ignored: did you mean conventions?"
    home.write_registry("all.yaml", "convention: [a]\n")
    for label in ("shop/api", "shop/web"):
        home.make_codebase(label)
    for argv in (["sync", "--all"], ["status"], ["sync", "api"], ["status", "web"]):
        ran, strict, quiet = (home.run(*argv, *option) for option in ([], ["--strict"], ["-q"]))
        assert (ran.status, strict.status, quiet.err) == (0, 2, ""), ran
        assert (ran.out + ran.err).count(f"note: {note}\n") == 1 == (strict.out + strict.err).count(note)
        (notes,) = [json.loads(home.run(*argv, "--json").out)]
        assert (notes if isinstance(notes, dict) else notes[0])["notes"] == [note]
    home.environ["EDITOR"] = "true"
    assert home.run_fine("edit", "api").err == f"note: {note}\n"


def test_the_daemon_logs_each_note_once_while_it_lasts(served: Home) -> None:
    served.save("shop/api")
    served.write_registry("shop/project.yaml", "note: [a]\n")
    wait_until(lambda: served.log().count("INFO note text=") == 1)
    for label in ("shop/web", "shop/new"):
        served.save(label)
        wait_until(lambda label=label: served.has("first", label))
    served.write_registry("shop/project.yaml", "x: y\nnote: [a]\n")
    wait_until(lambda: served.log().count("INFO note text=") == 3)
    assert served.log().count("project.yaml:1: note: unknown key, ignored: did you mean notes?") == 1


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("# A\n\n@docs/a.md `x` <b>\n", "# A\n\n@docs/a.md `x` <b>"),
        ("\ufeffa\r\nb\rc\x1b[0m\x00\n", "a\nb\nc [0m"),
        ("```sh\nls\n```\n", "```sh\nls\n```"),
        ("```sh\nls\n", "```sh\nls\n```"),
        ("~~~~\n```\n~~~\n", "~~~~\n```\n~~~\n~~~~"),
        ("- a\n\n  ```\n  b\n", "- a\n\n  ```\n  b"),  # the end of the item closes it
        ("- a\n\n  ```\n\n```\n", "- a\n\n  ```\n\n```\n```"),
        ("<!-- a -->\n<!-- b\n", "<!-- a -->\n<!-- b\n-->"),
        ("<!-- a\n```\n-->\n", "<!-- a\n```\n-->"),
        ("```\n<!-- a\n```\n", "```\n<!-- a\n```"),
        ("a <!-- b\n", "a <!-- b"),  # no comment, for CommonMark
        (f"x\n{orchestra.BLOCK_END}\n", "x\n&lt;!-- orchestra:end -->"),
        (f"{orchestra.BANNER}\n", f"&lt;{orchestra.BANNER[1:]}"),
        (">>>>>>> a\n||||||| b\n=======\n", " >>>>>>> a\n ||||||| b\n======="),
        ("\n \n", ""),
    ],
)
def test_prose_stays_as_typed_but_cannot_be_taken_for_orchestras(home: Home, typed: str, told: str) -> None:
    root = home.make_codebase(targets=["claude", "cursor"])
    home.write_registry("shop/api.md", typed.encode())
    (prose,) = home.registry().codebases[API].prose
    assert prose.text == told
    home.sync()
    assert home.sync().lines == [] and home.status_of() == "current"
    (root / "CLAUDE.md").write_text(f"mine\n{home.read()}\nmine\n")
    home.write_registry("shop/api.md", typed.encode() + b"\n\nmore\n")
    home.sync()
    text = home.read()
    assert text.startswith("mine\n") and text.endswith("\nmine\n") and text.count("\nmore\n") == 1


# ── 14 Registry ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "expected a file, got a folder"),
        (os.mkfifo, "expected a file, got a pipe, socket or device"),
        (link_to("nowhere"), "expected a file, got none"),
        (link_to("bad.yaml"), "expected a file, got a link|too many levels of symbolic links"),
    ],
)
def test_what_is_not_a_file_is_one_problem(home: Home, content: Any, expected: str) -> None:
    home.register("shop/good")
    put_files(home.projects, {"shop/bad.yaml": content})
    (problem,) = home.problems()
    assert re.fullmatch(rf"~/\.orchestra/projects/shop/bad\.yaml:1: file: .*(?:{expected})", problem)
    assert list(home.registry().codebases) == [("shop", "good")]


@pytest.mark.parametrize(
    "name", ["all.yaml", "shop/project.md", "shop/bad.yaml", "shop/bad.local.yaml", "shop/bad.md", "python.md"]
)
def test_an_unreadable_file_is_one_problem_and_the_others_go_on(home: Home, name: str) -> None:
    home.make_codebase("blog/good")
    home.make_codebase("shop/bad", include=["python.md"])
    put_files(home.projects, {"python.md": "x", name: "notes: [x]"})
    (home.projects / name).chmod(0)
    ran = home.run_as_nobody("sync", "--all")
    problem = f"orchestra: ~/.orchestra/projects/{name}:1: file: cannot be read: permission denied"
    assert (ran.status, ran.complaints) == (2, [problem])
    assert (home.code / "blog/good/CLAUDE.md").exists() == (name != "all.yaml")


def test_a_sync_reports_each_broken_file_in_one_line_and_syncs_the_rest(home: Home) -> None:
    root = home.make_codebase("shop/good")
    for number, (text, _) in enumerate(BAD_FILES.values()):
        home.write_registry(f"shop/bad{number}.yaml", text)
    ran = home.run("sync", "--all")
    files = [re.match(r"orchestra: ~/\.orchestra/projects/shop/(bad\d+)\.yaml:\d+: \S.*", c) for c in ran.complaints]
    assert ran.status == 2 and all(files)
    assert {match[1] for match in files if match} == {f"bad{number}" for number in range(len(BAD_FILES))}
    assert (root / "CLAUDE.md").exists()
    assert ran.err.count("\n  try: orchestra edit shop/bad") == len(ran.complaints) == ran.err.count("\n") / 2


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("shop/api.yml", "shop/api.yml:1: ignored: rename it to api.yaml"),
        ("shop/api.YAML", "shop/api.YAML:1: ignored: rename it to api.yaml"),
        ("api.yaml", "api.yaml:1: ignored: it belongs in a project's folder"),
        ("api.yml", "api.yml:1: ignored: it belongs in a project's folder"),
        ("shop/deep/api.yaml", "shop/deep:1: ignored: YAML files belong right in the project's folder"),
        (
            "shop/Project.yaml",
            "shop/Project.yaml:1: codebase name 'Project': project.yaml describes the project itself",
        ),
        (
            "shop/a\x7fb.yaml",
            r"shop/a\x7fb.yaml:1: codebase name 'a\x7fb': names cannot contain slashes or control characters",
        ),
    ],
)
def test_a_stray_file_is_one_problem_and_the_others_go_on(home: Home, name: str, problem: str) -> None:
    home.register("shop/good")
    home.write_registry(name, GOOD)
    assert home.problems() == [f"~/.orchestra/projects/{problem}"]
    assert list(home.registry().codebases) == [("shop", "good")]
    assert home.run("sync", "--all").status == 2


@pytest.mark.parametrize(
    "name",
    [
        *("shop/api.yaml~", "shop/.api.yaml.swp", "shop/.#api.yaml", "shop/#api.yaml#", "shop/.hidden.yaml"),
        *("shop/api.yaml.bak", "shop/notes.txt", "shop/4913", ".git/config.yaml", "README.md", "#x#/api.yaml"),
    ],
)
def test_editors_files_and_others_are_ignored(home: Home, name: str) -> None:
    home.register("shop/good")
    home.write_registry(name, "{")
    assert home.problems() == []
    assert list(home.registry().codebases) == [("shop", "good")]


@pytest.mark.parametrize("name", ["odd", "shop/odd"])
@pytest.mark.parametrize("is_loop", [True, False], ids=["a link to itself", "an unreadable folder"])
def test_an_odd_entry_of_the_registry_stops_nothing_else(home: Home, name: str, is_loop: bool) -> None:
    home.make_codebase("shop/good")
    if is_loop:
        (home.projects / name).symlink_to("odd")
    else:
        home.write_registry(f"{name}/api.yaml", GOOD).parent.chmod(0)
    ran = home.run_as_nobody("sync", "--all")
    if not is_loop:
        (home.projects / name).chmod(0o700)
    assert (home.code / "shop/good/CLAUDE.md").exists()
    assert is_loop or ran.status == 2


def test_a_project_whose_link_leads_nowhere_is_a_problem(home: Home) -> None:
    home.make_synced("team/api")
    home.make_synced("shop/good")
    (home.projects / "team").rename(home.folder / "unmounted")
    put_files(home.projects, {"team": link_to("/gone/team"), "notes.md": link_to("/gone/notes.md")})
    files, problem = contents(home.code), "~/.orchestra/projects/team:1: cannot be listed: no such file or directory"
    assert home.problems() == [problem]
    for argv, status in {("status",): 2, ("doctor",): 1, ("sync", "--all"): 2}.items():
        ran = home.run(*argv)
        assert (ran.status, problem in ran.out + ran.err, contents(home.code)) == (status, True, files), ran


def test_a_broken_project_file_is_a_problem_even_without_codebases(home: Home) -> None:
    home.write_registry("shop/project.yaml", "{")
    assert len(home.problems()) == 1


def test_codebases_inherit_what_they_lack_from_their_project(home: Home) -> None:
    home.write_registry(
        "shop/project.yaml",
        "name: shop\ndescription: of the shop\ntargets: [gemini]\ncommands: {build: make, lint: ruff}\n"
        "conventions: [ours]\ncolour: red\n",
    )
    home.register("shop/plain")
    home.register("shop/own", description="d", targets=[], commands={"build": "ninja"}, conventions=["mine"])
    own, plain = orchestra.list_codebases(home.path)
    assert plain[3:7] == ("of the shop", ("gemini",), (("build", "make"), ("lint", "ruff")), ("ours",))
    assert own[3:7] == ("d", (), (("build", "ninja"), ("lint", "ruff")), ("ours", "mine"))
    home.write_registry("blog/project.yaml", "targets: []\n")
    home.register("blog/api")
    assert home.registry().codebases[("blog", "api")].targets == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"shop/web": {"description": "new"}},
        {"shop/web": None},
        {"shop/new": {}},
        {"shop/api": "{"},
        {"shop/bad": {}},
        {"shop/web": {"path": "/a/api"}},  # which shop/api has
        {"shop/api": {"path": "/a/web"}},
        {"shop/api": {"path": "/a/other"}},  # whose old path shop/late claims too
        {"shop/api": None, "shop/web": "- a"},
        {"shop/late": {"path": "/a/late"}},
        {},
    ],
)
def test_reading_only_what_changed_gives_what_reading_all_gives(home: Home, changes: dict[str, Any]) -> None:
    def write(label: str, values: Any) -> None:
        if isinstance(values, dict):
            name = label.split("/")[1]
            values = {"name": name, "path": f"/a/{name}", "created_at": f"2026-01-{len(name):02}", **values}
        home.write_registry(f"{label}.yaml", values)

    for label, values in {"shop/api": {}, "shop/web": {}, "shop/late": {"path": "/a/api"}, "shop/bad": ""}.items():
        write(label, values)
    before = home.registry()
    for label, values in changes.items():
        if values is None:
            os.unlink(orchestra.codebase_path(home.path, tuple(label.split("/"))))
        else:
            write(label, values)
    after = orchestra.reload_codebases(home.path, before, [tuple(label.split("/")) for label in changes])
    assert what_is_known(after) == what_is_known(home.registry())


def test_a_codebase_whose_file_was_just_renamed_keeps_its_folder(home: Home) -> None:
    home.register("shop/api", created_at="2026-01-01T00:00:00Z")
    before = home.registry()
    home.register("shop/web", path=str(home.code / "shop/api"), created_at="2026-01-02T00:00:00Z")
    home.file("shop/api").unlink()
    after = orchestra.reload_codebases(home.path, before, [WEB])
    assert (after.keys, list(after.codebases)) == ([WEB], [WEB])


@pytest.mark.parametrize("text", ["{", "- a\n", b"\xff", ""])
def test_a_save_does_not_replace_a_file_that_cannot_be_read(home: Home, text: Any) -> None:
    file = home.write_registry("shop/api.yaml", text)
    before = file.read_bytes()
    with pytest.raises(orchestra.RegistryError):
        orchestra.save_codebase(home.path, codebase_with())
    assert file.read_bytes() == before


def linked_registry_file(home: Home) -> tuple[Path, Path]:
    """Make a registry file that is a link in the registry; return the link and the file."""
    file, real = home.write_registry("shop/api.yaml", GOOD), home.projects / ".kept/api.yaml"
    real.parent.mkdir()
    file.rename(real)
    file.symlink_to(real)
    return file, real


def test_a_registry_file_that_is_a_link_stays_one(home: Home) -> None:
    file, real = linked_registry_file(home)
    orchestra.save_codebase(home.path, codebase_with(description="new"))
    assert file.is_symlink() and "new" in real.read_text()


def test_removing_a_codebase_whose_file_is_a_link_removes_only_the_link(home: Home) -> None:
    file, real = linked_registry_file(home)
    (kept,) = orchestra.retire_codebase(home.path, API)
    assert not os.path.lexists(file) and real.read_text() == Path(kept).read_text() == GOOD


def test_reading_never_rewrites(home: Home) -> None:
    home.make_codebase("shop/api")
    file = home.write_registry("shop/api.yaml", TYPED.replace("/code/api", str(home.code / "shop/api")))
    before = file.stat()
    home.sync()
    home.run_fine("status")
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def fill_registry(home: Home, count: int) -> None:
    for i in range(count):
        home.make_codebase(f"shop/c{i}", description=f"number {i}", mine={"a": "b"})


def known_codebases(home: Home) -> dict[orchestra.Key, orchestra.Codebase]:
    """Load the registry, and leave out unknown keys, which are not cached."""
    return {key: codebase._replace(extra=()) for key, codebase in home.registry().codebases.items()}


def test_files_are_parsed_again_only_if_their_bytes_changed(home: Home, monkeypatch: Any) -> None:
    fill_registry(home, 5)
    put_files(home.projects, {"shop/project.yaml": "name: shop\n"})
    fresh = known_codebases(home)
    assert os.path.exists(f"{orchestra.run_dir(home.path)}/parsed.jsonl")
    parsed: list[str] = []
    real = orchestra.Document.compose

    def compose(doc: orchestra.Document, text: str) -> Any:
        parsed.extend([] if doc.place.endswith("project.yaml") else [doc.place])
        return real(doc, text)

    monkeypatch.setattr(orchestra.Document, "compose", compose)
    assert home.registry().codebases == fresh and parsed == []
    registry = home.registry()
    for i in range(3):
        home.write_registry(f"shop/d{i}.yaml", f"name: d{i}\n")
    orchestra.load_registry(home.path, registry)  # as a daemon does, without the cache
    assert len(parsed) == 3
    home.registry()
    parsed.clear()
    assert home.registry().codebases.keys() > fresh.keys() and parsed == []
    home.write_registry("shop/c3.yaml", f"name: c3\npath: {home.code}/shop/c3\nnotes: [changed]\n")
    assert home.registry().codebases[("shop", "c3")].notes == ("changed",)
    assert parsed == ["~/.orchestra/projects/shop/c3.yaml"]
    shutil.copy(home.file("shop/c4"), home.file("shop/other"))  # whose bytes are known
    assert ("shop", "other") in home.registry().broken
    put_files(home.projects, {"blog/project.yaml": "name: shop\n"})
    assert "name says 'shop'" in home.problems()[0]


@pytest.mark.parametrize("damage", [b"", b"x", b"[]", b'"', b"{}", b"\xff", b'["shop","c1",5]'])
def test_a_damaged_cache_of_parsed_files_only_costs_time(home: Home, damage: bytes) -> None:
    fill_registry(home, 3)
    fresh = known_codebases(home)
    path = Path(orchestra.run_dir(home.path), "parsed.jsonl")
    whole = path.read_bytes()
    head, *lines = whole.splitlines()
    damaged_lines = b"".join(line.partition(b" ")[0] + b" " + damage + b"\n" for line in lines)
    for data in (damage, head + b"\n" + damaged_lines, whole.replace(b"number 1", b"number 2")):
        path.write_bytes(data)
        assert known_codebases(home) == fresh


def test_a_registry_file_that_disappears_while_it_is_listed_is_no_problem(home: Home, monkeypatch: Any) -> None:
    file = home.register()
    scanned = orchestra.RegistryScan(home.path)
    shutil.rmtree(file.parent)
    monkeypatch.setattr(orchestra, "RegistryScan", lambda home: scanned)
    assert (home.registry().keys, home.problems()) == ([], [])


def test_a_file_that_vanishes_while_it_is_read_is_no_bug(home: Home, monkeypatch: Any) -> None:
    file = home.save("shop/one")
    read = orchestra.LayerReader.read

    def read_and_remove(*args: Any) -> Any:
        result = read(*args)
        file.unlink()
        return result

    monkeypatch.setattr(orchestra.LayerReader, "read", read_and_remove)
    assert list(home.registry().codebases) == [("shop", "one")]


# ── 15 Manifests ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", {}),
        ("a = 1 # x\n[b]\nc = 'd'\n", {"a": "1", "b": {"c": "d"}}),
        ('a.b = "x"\n"c d" = true\n[e."f.g".h]\n', {"a": {"b": "x"}, "c d": True, "e": {"f.g": {"h": {}}}}),
        ("a = [1, [2.5], # x\n  {b = 'c', d = []},\n]\r\ne = 1979-05-27\n", None),
        ('a = """\nx "y" \\\n z\\t""""\nb = \'\'\'\\n\'\'\'\n', {"a": 'x "y" z\t"', "b": "\\n"}),
        ('a = "\\u00e9\\t\\"" \n', {"a": 'é\t"'}),
        ('a = "\\U0001F600"\n', {"a": "\\U0001F600"}),
        ("[[a]]\nb = 1\n[[a]]\nb = 2\n[a.c]\nd = 3\n", {"a": [{"b": "1"}, {"b": "2", "c": {"d": "3"}}]}),
        *((broken, ValueError) for broken in ("a", "a = ", "a = [", "a = {b", "a = 'x", "[a", "a = '''x", "= 1")),
        *((broken, ValueError) for broken in ("a = 1\n[a]\n", "[[a]]\nb = [1 2]", "a = " + "[" * 100_000)),
        ("[" + "a." * 100 + "a]", ValueError),
    ],
)
def test_toml_is_read_the_same_by_every_python(text: str, value: Any) -> None:
    if value is ValueError:
        with pytest.raises(ValueError):
            orchestra.Toml(text).read()
        return
    read = orchestra.Toml(text).read()
    assert read == value or value is None
    if sys.version_info >= (3, 11):  # as Python reads it, but that numbers stay as written
        import tomllib

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return (
                [plain(item) for item in value] if isinstance(value, list) else value if value is True else str(value)
            )

        assert plain(read) == plain(tomllib.loads(text)) or "U0001F600" in text


@pytest.mark.parametrize(
    ("evidence", "source", "quoted"),
    [
        ("a.toml", "a.toml", ""),
        ("*.toml", "a.toml", ""),
        ("b.toml", "", ""),
        ("sub/c", "sub/c", ""),
        ("a.toml x y", "a.toml", "1"),
        ("a.toml x z", "", ""),
        ("a.json x y", "a.json", "one"),
        ("a.json x y z", "", ""),
        ("a.yaml x y", "a.yaml", "no"),
        ("setup.cfg tool:pytest", "setup.cfg", ""),
        ("setup.cfg options.extras_require dev", "setup.cfg", "a\nb"),
        ("bomb.yaml a", "", ""),
        ("broken.json a", "", ""),
        ("broken.toml a", "", ""),
        ("mix.exs :credo", "mix.exs", ""),
        ("mix.exs :dialyxir", "", ""),
        ("mix.exs elixir:", "mix.exs", '"~> 1.15",'),
        (".nvmrc", ".nvmrc", "v20"),
        ("a.toml + not b.toml", "a.toml", ""),
        ("a.toml + not a.json", "", ""),
        ("not b.toml + mix.exs", "mix.exs", ""),
        ("b.toml or a.json + not a.toml or .nvmrc or a.toml", ".nvmrc", ""),
        ("b.toml or a.toml x z", "", ""),
    ],
)
def test_evidence_is_a_file_and_what_is_in_it(home: Home, evidence: str, source: str, quoted: str) -> None:
    files = {
        "a.toml": "[x]\ny = 1\n",
        "a.json": '{"x": {"y": "one"}}',
        "a.yaml": "x: {y: no}\n",
        "setup.cfg": "[tool:pytest]\n[options.extras_require]\ndev =\n  a\n  b\n",
        "bomb.yaml": "a: &a [x, x]\n"
        + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijklmnop", "bcdefghijklmnopq")),
        "broken.json": "{",
        "broken.toml": "a = ",
        "mix.exs": '  elixir: "~> 1.15",\n  {:credo, 1}\n  # {:dialyxir, 1}\n',
        ".nvmrc": "# x\nv20\n",
        "sub/c": "",
    }
    put_files(home.code, files)
    folder = orchestra.Folder(str(home.code))
    assert folder.holds(evidence) == source
    if quoted:
        assert folder.quote(evidence) == quoted


@pytest.mark.parametrize(
    ("text", "version"),
    [
        *(("3.14", "3.14"), (">=3.10", "3.10+"), (">=3.8,!=3.9.*,<4", "3.8+"), ("==3.11.*", "3.11"), ("~=3.9", "3.9+")),
        *(("^18.0.0", "18"), ("^18", "18"), ("^5.4.2", "5.4+"), ("~5.4.2", "5.4"), ("~> 1.15", "1.15+")),
        ("python-3.11.4", "3.11.4"),
        *(("18.x", "18"), ("v20.11.1", "20.11.1"), ("^18.0.0 || >=20.0.0", "18 or 20.0.0+"), ("<4", "")),
        *(("lts/*", ""), ("catalog:", ""), ("workspace:^1.0.0", ""), ("*", ""), ("", ""), ("latest", "")),
    ],
)
def test_a_version_is_told_as_short_as_it_can_be(text: str, version: str) -> None:
    assert orchestra.shorten_version(text) == version


@pytest.mark.parametrize(
    ("globs", "members"),
    [
        (["packages/*"], ["a", "b"]),
        (["./packages/*/", "!packages/b"], ["a"]),
        (["packages/a"], ["a"]),
        (["pack*/a*", "packages/a"], ["a"]),
        (["packages/*", "again/*"], ["a", "b"]),
        (["*"], []),
        (["../*", "/etc", "packages/../packages/*", ""], []),
        (["nowhere/*"], []),
        (["a\0/*", "*/\0", "\ud800/*", "[", "[!", "packages/a"], ["a"]),
        (["packages/*" + "[" * 1000, "packages/a"], ["a"]),
    ],
)
def test_the_members_of_a_workspace_have_a_manifest(home: Home, globs: list[str], members: list[str]) -> None:
    put_files(
        home.code,
        {"packages/a/m": "", "packages/b/m": "", "packages/c/x": "", "packages/.d/m": "", "node_modules/m": ""},
    )
    put_files(home.code, {"again": link_to("packages")})
    assert [os.path.basename(member.path) for member in orchestra.Folder(str(home.code)).members(globs, "m")] == members


def test_links_in_a_circle_are_followed_only_so_far(home: Home, monkeypatch: Any) -> None:
    for number in range(5):
        (home.code / f"circle{number}").symlink_to(".")
    monkeypatch.setattr(orchestra.Folder, "MAX_LOOKS", 100)
    folder = orchestra.Folder(str(home.code))
    assert len(folder.expand("*/*/*")) < 125 and folder.expand("*") == []
    assert len(orchestra.Folder(str(home.code)).expand("*/*")) == 25


# ── 16 Scripts ────────────────────────────────────────────────────────────────


def package(**sections: Any) -> dict[str, str]:
    return {"package.json": json.dumps(sections)}


def toml(text: str) -> dict[str, str]:
    return {"pyproject.toml": text}


def npm(**scripts: str) -> dict[str, str]:
    return package(scripts=scripts)


def listed(commands: Iterable[Any]) -> str:
    """List all commands in the form in which `check_found` expects some."""
    return " | ".join(f"{command.name}: {command.text}" for command in commands)


def check_found(home: Home, files: Any, expected: str) -> None:
    """Compare what is found with "name: text | ...": - stands for nothing, and names left out are not looked at."""
    put_files(home.code, files)
    detected = orchestra.detect(str(home.code))
    texts = (detected.description, detected.built_with, detected.packages, *detected.commands)
    found = {item.name: item.text for item in texts if item}
    found["type"] = detected.project_type
    names = [part.partition(": ")[0] for part in expected.split(" | ")]
    assert " | ".join(f"{name}: {found.get(name, '-')}" for name in names) == expected


@pytest.mark.parametrize(
    ("scripts", "commands"),
    [
        ({"build": "tsc", "test": "jest", "odd": "x"}, "build: build | test: test"),
        ({"test": 'echo "Error: no test specified" && exit 1'}, ""),
        ({"test": "exit 0", "tests": "jest"}, "test: tests"),
        ({"test": ""}, ""),
        ({"test:unit": "jest", "fmt": "prettier --write ."}, "test: test:unit | format: fmt"),
        ({"format": "prettier --check .", "format:fix": "prettier --write ."}, "format: format:fix"),
        ({"format": "prettier --check ."}, "format (checks only): format"),
        ({"lint": "eslint --fix ."}, "lint (rewrites files): lint"),
        ({"lint": "eslint --fix .", "lint:check": "eslint ."}, "lint: lint:check"),
        ({"lint": "npm run style", "style": "prettier --write ."}, "lint (rewrites files): lint"),
        ({"lint": "black --check . && isort --check ."}, "lint: lint"),
        ({"lint": "black . && flake8"}, "lint (rewrites files): lint"),
        ({"lint": "standardrb --fix-unsafely"}, "lint (rewrites files): lint"),
        ({"lint": "eslint --fix-dry-run ."}, "lint: lint"),
        ({"lint": "cargo fmt --version && cargo fmt -- --check"}, "lint: lint"),
        ({"lint:fix": "eslint --fix ."}, "format: lint:fix"),
        ({"type-check": "tsc"}, "type check: type-check"),
        ({"check:types": "turbo run types"}, "type check: check:types"),
        ({"types": "tsc --noEmit"}, "type check: types"),
        ({"types": "graphql-codegen"}, ""),
        ({"tsc": "tsc"}, "type check: tsc"),
        ({"check": "npm run lint && npm test", "lint": "x", "test": "y"}, "test: test | lint: lint | check: check"),
        ({"check": "biome check ."}, "lint: check"),
        ({"check": "svelte-check"}, "type check: check"),
        ({"verify": "npm run a && npm run b"}, "check: verify"),
        ({"ci": "npm test && npm publish"}, ""),
        ({"precommit": "lint-staged"}, ""),
        ({"dev": "vite", "start": "node ."}, "run: dev"),
        ({"dev": "tsup --watch", "start": "node ."}, "run: start"),
        ({"dev": "cargo build\n\tcp ./target/debug/x ~/bin/", "start": "cp .env.example .env; node ."}, "run: start"),
        ({"test": "vitest"}, "test: test +--run"),
        ({"test": "vitest run --coverage"}, "test: test"),
        ({"test": "vitest", "test:run": "vitest --run"}, "test: test:run"),
        ({"test": "npm run test:all", "test:all": "vitest"}, ""),
        ({"test": "npm run unit run", "unit": "vitest"}, "test: test"),
        ({"test": "jest --watch"}, ""),
        ({"test": "cargo watch -x test"}, ""),
        ({"test": "tsc && vitest --coverage"}, "test: test +--run"),
        ({"test": "react-scripts test"}, "test: test +--watchAll=false"),
        ({"test": "ng test"}, "test: test +--watch=false"),
        ({"install": "cp x /usr/local/bin"}, ""),
        ({"install": "pip install -e ."}, "install: install"),
        ({"setup": "uv sync"}, "install: setup"),
    ],
)
def test_a_script_is_taken_for_what_its_name_and_its_text_say(scripts: Any, commands: str) -> None:
    assert listed(orchestra.Scripts("package.json", "{}", scripts, " +").find()) == commands


def test_a_script_that_another_one_calls_counts_as_its_text() -> None:
    callers = "npm run|pnpm|yarn|bun run|run-s|run-p|npm-run-all|npm-run-all2|make|$(MAKE)|just|task"
    for call in f"{callers}|composer|composer run|deno run|melos run".split("|"):
        assert orchestra.Script("x", {"x": f"{call} y", "y": "eslint --fix ."}).rewrites, call
    assert not orchestra.Script("x", {"x": "echo y", "y": "eslint --fix ."}).rewrites


JUSTFILE = """\
set shell := ["bash", "-c"]
alias t := test
name := "x"
# Runs the tests
@test *ARGS: build
    pytest {{ARGS}}
build mode="a: b":
    make
lint target:
    ruff {{target}}
[private]
fmt:
    black .
_check:
    x
"""
TASKFILE = """\
version: '3'
tasks:
  test: {cmds: [go test ./...], deps: [build]}
  build: go build
  lint: {requires: {vars: [X]}, cmds: [x]}
  fmt: {internal: true, cmds: [x]}
  run:
    cmds: [{task: build}, {cmd: ./x}]
"""


@pytest.mark.parametrize(
    ("files", "commands"),
    [
        ({"Makefile": "test lint: x\n\tgo\n.PHONY: run\nfmt:=no\nrun ?= x:y\n"}, "test: make test | lint: make lint"),
        ({"Makefile": "tests::\n\tx\nfmt: ; black .\n"}, "test: make tests | format: make fmt"),
        ({"Makefile": "test:\n"}, ""),
        ({"Makefile": "%test: x\n$(A)test: x\n"}, ""),
        ({"GNUmakefile": "test:\n\tx\n", "Makefile": "lint:\n\tx\n"}, "test: make test"),
        ({"Makefile": "lint: fmt\n\tx\nfmt:\n\tblack .\n"}, "lint (rewrites files): make lint | format: make fmt"),
        ({"Makefile": "install:\n\tinstall x /usr/bin\n"}, ""),
        ({"Makefile": "install:\n\tpoetry install\n"}, "install: make install"),
        ({"justfile": JUSTFILE}, "build: just build | test: just test"),
        ({".justfile": "test:\n  x\n", "Makefile": "test: x\nlint: x\n"}, "test: just test | lint: make lint"),
        ({"Taskfile.yml": TASKFILE}, "build: task build | test: task test | run: task run"),
        ({"Taskfile.yml": TASKFILE + "# long\n" * 30_000}, ""),
        ({"justfile": "run *ARGS:\n  uv run -- {{ARGS}}\n"}, ""),
        ({"mise.toml": "[task_config]\nincludes = ['x/../t.toml']\n", "x/y": "", "t.toml": "[lint]\nrun = 'x'\n"}, ""),
        ({"Taskfile.yml": "tasks: [x]\n"}, ""),
        ({"mise.toml": '[tasks]\ntest = "x"\n[tasks.lint]\nrun = ["y"]'}, "test: mise run test | lint: mise run lint"),
        (
            {"mise.toml": "[task_config]\nincludes = ['t.toml', 'x', '../t.toml']\n", "t.toml": "[lint]\nrun = 'x'\n"},
            "lint: mise run lint",
        ),
        ({".mise.toml": "[tasks.build]\nusage = 'x'\nrun = 'y'\n"}, ""),
    ],
)
def test_task_runners_come_first(home: Home, files: Any, commands: str) -> None:
    put_files(home.code, files)
    assert listed(orchestra.detect(str(home.code)).commands) == commands


# ── 17 Node and Python ────────────────────────────────────────────────────────


WORKSPACE = {".git": None, "package.json": '{"packageManager": "pnpm@9.1.0+sha512.abc"}', "package-lock.json": ""}
MEMBER = {"packages/a/package.json": '{"scripts": {"test": "vitest", "build": "x"}}'}


@pytest.mark.parametrize(
    ("files", "folder", "first"),
    [
        (package(), "", "npm install"),
        ({**package(), "package-lock.json": ""}, "", "npm install"),
        ({**package(), "yarn.lock": ""}, "", "yarn install"),
        ({**package(), "bun.lockb": ""}, "", "bun install"),
        ({**package(), "pnpm-workspace.yaml": ""}, "", "pnpm install"),
        (package(packageManager="yarn@4.0.0"), "", "yarn install"),
        ({**package(packageManager="pnpm@9"), "yarn.lock": ""}, "", "pnpm install"),
        (package(packageManager="constructor@1"), "", "npm install"),
        (package(packageManager=7), "", "npm install"),
        ({**WORKSPACE, **MEMBER}, "packages/a", "pnpm install"),
        ({**WORKSPACE, **MEMBER, "packages/a/yarn.lock": ""}, "packages/a", "pnpm install"),
        ({".git": None, "yarn.lock": "", **MEMBER}, "packages/a", "yarn install"),
        ({".git": None, "yarn.lock": "", **MEMBER, "packages/a/bun.lock": ""}, "packages/a", "bun install"),
        ({"yarn.lock": "", **MEMBER}, "packages/a", "npm install"),  # above it is no repository
        ({"yarn.lock": "", "packages/.git": None, **MEMBER}, "packages/a", "npm install"),
        ({"yarn.lock": "", "packages/a/.git": "gitdir: x", **MEMBER}, "packages/a", "npm install"),
        ({".git": None, "uv.lock": "", "a/pyproject.toml": "[project]\n"}, "a", "uv sync"),
        ({".git": None, "gradlew": "", "a/b/build.gradle": ""}, "a/b", "../../gradlew assemble"),
        ({".git": None, "mvnw": "", "a/pom.xml": "", "a/mvnw": ""}, "a", "./mvnw package -DskipTests"),
        ({".git": None, ".fvmrc": "", "a/pubspec.yaml": ""}, "a", "fvm dart pub get"),
    ],
)
def test_the_package_manager_is_the_repositorys(home: Home, files: Any, folder: str, first: str) -> None:
    put_files(home.code, files)
    assert orchestra.detect(str(home.code / folder)).commands[0].text == first


def test_nothing_is_looked_up_in_the_home_folder_or_above(home: Home) -> None:
    put_files(home.code, {".git": None, "yarn.lock": "", **MEMBER})
    commands = orchestra.detect(str(home.code / "packages/a"), str(home.code)).commands
    assert commands[0].text == "npm install"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (npm(test="jest", lint="x"), "test: npm test | lint: npm run lint"),
        ({**npm(test="x"), "yarn.lock": ""}, "test: yarn test"),
        ({**npm(test="x"), "bun.lock": ""}, "test: bun run test"),
        (npm(test="vitest"), "test: npm test -- --run"),
        ({**npm(test="vitest"), "pnpm-lock.yaml": ""}, "test: pnpm test --run"),
        (npm(install="node-gyp rebuild && npm install"), "install: npm install"),
        (npm(test="jest"), "one test: npm test -- path/to/file.test.js"),
        ({**npm(test="vitest"), "tsconfig.json": ""}, "one test: npm test -- --run path/to/file.test.ts"),
        ({**npm(test="jest --ci -c x.js"), "yarn.lock": ""}, "one test: yarn test path/to/file.test.js"),
        (npm(test="mocha test/**/*.js"), 'one test: npm test -- -g "name"'),
        (npm(test="node --test test/a.js"), "one test: -"),
        *(
            (npm(test=call), f"one test: npm test -- {one}")
            for call, one in (
                ("react-scripts test", "--watchAll=false path/to/file.test.js"),
                ("playwright test", "path/to/file.spec.js"),
                ("ng test", "--watch=false --include path/to/file.spec.js"),
                ("node --test", "path/to/file.test.js"),
                ("ava", "path/to/test.js"),
                ("ava test/a.js", '--match "name"'),
                ("tap", "path/to/test.js"),
            )
        ),
        (npm(test="npm run unit", unit="tsc && jest"), "one test: npm run unit -- path/to/file.test.js"),
        (npm(test="jest && tsc"), "one test: -"),
        ({**npm(test="bun test"), "bun.lock": ""}, "one test: bun test path/to/file.test.js"),
        (npm(test="npm run a && npm run b", a="jest", b="mocha"), "test: npm test | one test: -"),
        (npm(test="npm run lint && npm run a", a="jest", lint="x"), "one test: npm run a -- path/to/file.test.js"),
        (npm(prettier="prettier **/*.ts"), "format: -"),
        (package(devDependencies={"express": "1", "vue": "^3"}), "built with: Node.js, Vue 3"),
        (npm(test="turbo run test"), "test: npm test | one test: -"),
        ({**package(), "turbo.json": '{"tasks": {"test": {}, "x": {}}}'}, "test: npx turbo run test | build: -"),
        ({**package(), "turbo.json": '{"pipeline": {"lint": {}}}'}, "lint: npx turbo run lint"),
        ({**package(), "nx.json": '{"targetDefaults": {"test": {}}}'}, "test: npx nx run-many -t test"),
        (
            {**package(devDependencies={"vitest": "1", "eslint": "9"}), "vitest.config.ts": "", "eslint.config.js": ""},
            "test: npx vitest run | lint: npx eslint .",
        ),
        ({**package(), "vitest.config.ts": "", "eslint.config.js": ""}, "test: - | lint: -"),
        ({**package(devDependencies={"eslint": "9"}), "eslint.config.js": "", "nx.json": "{}"}, "lint: -"),
        (
            package(dependencies={"react": "^18.2.0", "x": "1"}, devDependencies={"typescript": "catalog:"}),
            "built with: Node.js, TypeScript, React 18.2+",
        ),
        ({**package(packageManager="pnpm@9.1.0"), ".nvmrc": "v20\n"}, "built with: Node.js 20, pnpm 9"),
        ({**package(engines={"node": ">=18"}), ".tool-versions": "nodejs 22.1.0\n"}, "built with: Node.js 22.1.0"),
        ({**package(), ".nvmrc": "lts/*", "mise.toml": "[tools]\nnode = '20'\n"}, "built with: Node.js 20"),
    ],
)
def test_node_has_the_commands_of_its_scripts_and_tools(home: Home, files: Any, expected: str) -> None:
    check_found(home, files, expected)


@pytest.mark.parametrize(
    ("kind", "packages"),
    [
        ("mobile", "expo react-native @capacitor/core nativescript"),
        ("frontend", "next nuxt @sveltejs/kit astro @angular/core react vue svelte preact solid-js lit ember-source"),
        ("backend", "express fastify koa hono @nestjs/core @hapi/hapi"),
    ],
)
def test_a_framework_is_told_and_decides_the_type(home: Home, kind: str, packages: str) -> None:
    for name in packages.split():
        put_files(home.code, package(dependencies={name: "^2.5.0"}))
        detected = orchestra.detect(str(home.code))
        assert (detected.project_type, detected.reason) == (kind, f"{name} in package.json")
        assert detected.built_with and detected.built_with.text.endswith(" 2.5+"), name


def pyproject(text: str, *tools: str, **files: str) -> dict[str, str]:
    """Make a pyproject.toml with a development group of tools, and other files, with _ for a dot."""
    group = f"[dependency-groups]\ndev = {json.dumps(list(tools))}\n"
    return {
        "pyproject.toml": f"[project]\nname = 'shop'\n{group}{text}",
        **{n.replace("_", "."): t for n, t in files.items()},
    }


SETUP_CFG = "[metadata]\nname = x\n[options.extras_require]\ntest =\n    pytest>=7\n[flake8]\nmax = 1\n"
NOXFILE = """\
nox.options.sessions = ["tests"]
@nox.session(python=["3.12"])
def tests(session):
    session.run("pytest", *session.posargs)

@nox.session(name="lint")
def check_style(session):
    session.run("ruff", "check")

def build(session):
    pass
"""
POETRY = "[tool.poetry]\nname = 'x'\n[tool.poetry.dependencies]\npython = '^3.9'\n"
HATCH = "[tool.hatch.envs.default]\ndependencies = ['pytest', 'ruff']\n[tool.hatch.envs.default.scripts]\ncov = 'x'\n"
TOX = "[tox]\nenvlist = py,lint\n[testenv]\ndeps = pytest\ncommands = pytest {posargs}\n[testenv:lint]\ncommands = x\n"
DEPENDABLE = "[project.optional-dependencies]\ndev = ['pytest']\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            pyproject("[tool.ruff]\n[tool.mypy]\nfiles = 'x'\n", "pytest", "ruff", "mypy>=1", uv_lock=""),
            "install: uv sync | test: uv run pytest | one test: uv run pytest path/to/test_file.py::test_name | "
            "lint: uv run ruff check . | format: - | type check: uv run mypy | built with: Python, uv",
        ),
        (pyproject("[tool.ruff.format]\n", "ruff", uv_lock=""), "test: - | format: uv run ruff format ."),
        (pyproject("[tool.ruff]\n", uv_lock=""), "lint: uvx ruff check ."),
        (pyproject("[tool.ruff]\n[tool.mypy]\n"), "lint: ruff check . | type check: -"),
        ({**pyproject("[tool.ruff]\n"), ".pre-commit-config.yaml": "- id: ruff"}, "lint: -"),
        ({**pyproject("[tool.mypy]\n", "mypy"), "src": None}, "type check: mypy src"),
        ({**pyproject("[tool.mypy]\n", "mypy"), "shop": None}, "type check: mypy shop"),
        ({**pyproject("[tool.black]\n[tool.ty]\n", "black", "ty")}, "format: black . | type check: ty check"),
        ({**pyproject("", "pyright"), "pyrightconfig.json": ""}, "type check: pyright"),
        (
            {**pyproject("", "pytest", "pre-commit", uv_lock=""), ".pre-commit-config.yaml": ""},
            "before a commit: uv run pre-commit run --all-files",
        ),
        ({**pyproject("", "pytest"), ".pre-commit-config.yaml": ""}, "before a commit: pre-commit run --all-files"),
        (
            {**pyproject("", "prek", uv_lock=""), ".pre-commit-config.yaml": ""},
            "before a commit: uv run prek run --all-files",
        ),
        (pyproject("", "pytest"), "install: pip install -e . --group dev | test: pytest"),
        (pyproject(DEPENDABLE), "install: pip install -e '.[dev]' | test: pytest"),
        (pyproject(DEPENDABLE, uv_lock=""), "install: uv sync --extra dev"),
        ({**pyproject(""), "requirements-dev.txt": "pytest\n"}, "install: pip install -e . -r requirements-dev.txt"),
        ({"requirements.txt": "flask\npytest==8\n"}, "install: pip install -r requirements.txt | test: pytest"),
        ({"setup.cfg": SETUP_CFG}, "install: pip install -e '.[test]' | test: pytest | lint: -"),
        ({"setup.py": "extras_require={'dev': ['pytest']}"}, "install: pip install -e '.[dev]' | test: pytest"),
        ({"setup.py": "", "tests": None}, "install: pip install -e . | test: -"),
        ({"setup.py": "", "tests/conftest.py": ""}, "test: pytest"),
        (toml(POETRY + "[tool.poetry.group.test.dependencies]\npytest = '*'\n"), "test: poetry run pytest"),
        (
            toml(POETRY + "[tool.poetry.group.t]\noptional = true\n[tool.poetry.group.t.dependencies]\npytest = 1\n"),
            "install: poetry install --with t | built with: Python 3.9+, Poetry",
        ),
        (pyproject("", "pytest", pdm_lock=""), "install: pdm install | test: pdm run pytest"),
        (pyproject(DEPENDABLE, "pytest", pdm_lock=""), "install: pdm install"),
        (pyproject(DEPENDABLE, pdm_lock=""), "install: pdm install -G dev"),
        ({**pyproject("", pdm_lock=""), "requirements-dev.txt": "pytest\n"}, "install: pdm install"),
        (pyproject("[tool.pdm.build]\nx = 1\n", "pytest"), "test: pytest"),
        (
            {"Pipfile": "[dev-packages]\npytest = '*'\n[scripts]\nlint = 'x'\n"},
            "install: pipenv install --dev | test: pipenv run pytest | lint: pipenv run lint | "
            "built with: Python, Pipenv",
        ),
        (
            pyproject("", "pytest", poetry_lock=""),
            "install: poetry install | test: poetry run pytest | built with: Python, Poetry",
        ),
        (pyproject(DEPENDABLE, poetry_lock=""), "install: poetry install --extras dev"),
        (
            toml("[project]\n[tool.pdm.dev-dependencies]\ntest = ['pytest']\n[tool.pdm.scripts]\nlint = 'x'\n"),
            "install: pdm install | test: pdm run pytest | lint: pdm run lint | built with: Python, PDM",
        ),
        (
            pyproject("[tool.pixi.tasks]\nlint = 'x'\n", "pytest", pixi_lock=""),
            "install: pixi install | test: pixi run pytest | lint: pixi run lint",
        ),
        (pyproject("t = ['pytest']\n", uv_lock=""), "install: uv sync --group t | test: uv run pytest"),
        (pyproject("[tool.taskipy.tasks]\nlint = 'x'\n"), "lint: task lint"),
        (pyproject("", "flake8", _flake8=""), "lint: flake8"),
        (pyproject("[tool.basedpyright]\n", "basedpyright"), "type check: basedpyright"),
        (toml(HATCH), "install: - | test: hatch run pytest | lint: hatch run ruff check . | built with: Python, Hatch"),
        (toml(HATCH.replace("cov", "test")), "test: hatch run test"),
        (toml("[tool.hatch.envs.docs.scripts]\nbuild = 'x'\n"), "build: - | test: hatch test"),
        (toml("[tool.hatch.envs.types.scripts]\ncheck = 'mypy x'\n"), "type check: hatch run types:check"),
        (pyproject("[tool.poe.tasks]\nlint = {cmd = 'y'}\n", uv_lock=""), "lint: uv run poe lint"),
        ({"pixi.toml": "[tasks]\ntest = 'x'\n", "setup.py": ""}, "test: pixi run test"),
        (
            {"noxfile.py": NOXFILE, "setup.py": ""},
            "test: nox -s tests | one test: nox -s tests -- path/to/test_file.py::test_name | lint: nox -s lint | "
            "build: - | check: nox",
        ),
        ({"noxfile.py": NOXFILE.replace(", *session.posargs", ""), "setup.py": ""}, "test: nox -s tests | one test: -"),
        (toml("[project]\n[dependency-groups]\n'x; y' = ['pytest']\n"), "install: pip install -e . | test: -"),
        ({"noxfile.py": NOXFILE, **pyproject("", "pytest", uv_lock="")}, "test: uv run pytest | lint: nox -s lint"),
        (
            {"tox.ini": TOX, "setup.py": ""},
            "test: tox -e py | one test: tox -e py -- path/to/test_file.py::test_name | lint: tox -e lint | check: tox",
        ),
        ({"tox.ini": TOX, **pyproject("", "pytest", "tox", uv_lock="")}, "test: uv run pytest | check: uv run tox"),
        ({"tox.ini": TOX, **pyproject("", "pytest", uv_lock="")}, "lint: - | check: -"),
        ({"tox.ini": "[flake8]\n", "setup.py": ""}, "check: -"),
        (
            {"manage.py": "", "requirements.txt": "django\n"},
            "test: python manage.py test | one test: python manage.py test app.tests.TestCase.test_name | "
            "run: python manage.py runserver",
        ),
        ({"manage.py": "", **pyproject("", "pytest-django", "pytest", uv_lock="")}, "test: uv run pytest | run: -"),
        (pyproject("", "pytest", Makefile="x:\n\tuv run pytest\n"), "test: uv run pytest"),
        ({**pyproject(""), ".python-version": "3.14\n"}, "built with: Python 3.14"),
        ({"setup.py": "setup(\n    python_requires='>=3.8',\n)"}, "built with: Python 3.8+"),
        (
            {"setup.cfg": "[metadata]\ndescription = Sells\n[options]\npython_requires = >=3.9\n"},
            "description: Sells | built with: Python 3.9+",
        ),
        ({"setup.py": "", "mise.toml": "[tools]\npython = '3.13'\n"}, "built with: Python 3.13"),
    ],
)
def test_python_has_the_commands_of_its_environment(home: Home, files: Any, expected: str) -> None:
    check_found(home, files, expected)


# ── 18 Ecosystems ─────────────────────────────────────────────────────────────

# What a language's function finds is among the cases of Languages.


# ── 19 Languages ──────────────────────────────────────────────────────────────


CARGO = "[package]\nname = 'shop'\n[[bin]]\nname = 'shop'\n"
MIX = """
defmodule Shop.MixProject do
  use Mix.Project

  def project do
    [app: :shop, elixir: "~> 1.15", description: "Sells", aliases: aliases(), deps: deps()]
  end

  defp deps do
    [{:phoenix, "~> 1.8.1"}, {:credo, "~> 1.7", only: :dev}, {:dialyxir, ">= 0.0.0"}]
  end

  defp aliases do
    [
      setup: ["deps.get", "ecto.setup"],
      precommit: ["compile --warning-as-errors", "format", "test"],
      ci: ["lint", "test"]
    ]
  end
end
"""
GEMSPEC = 'Gem::Specification.new do |s|\n  s.summary     = "Bakes"\n  s.required_ruby_version = ">= 3.1"\nend\n'
CMAKE = """
cmake_minimum_required(VERSION 3.14)
set(CMAKE_CXX_STANDARD 17)
enable_testing()
add_test(NAME all COMMAND x)
"""
CONFIGURE = "AC_INIT([x], [1])\nAC_PROG_CC\n"
PHP_TOOLS = {"require-dev": {"phpunit/phpunit": "^11", "laravel/pint": "^1", "phpstan/phpstan": "^2"}}
KOTLIN = '[versions]\nkotlin = "2.1.0"'
MANIFEST = "app/src/main/AndroidManifest.xml"
SLN = 'Project("{9A}") = "Shop", "src\\Shop\\Shop.csproj", "{1}"\nProject("{9A}") = "Tests", "t\\T.csproj", "{2}"\n'
SOLUTION = '<Solution><Project Path="src/Shop.csproj" /><Project Path="test/Shop.Tests.csproj" /></Solution>'
PBXPROJ = "SDKROOT = {};\nproductType = com.apple.product-type.bundle.unit-test\n"
SCHEME = "App.xcodeproj/xcshareddata/xcschemes/App.xcscheme"
PRESETS = {
    "configurePresets": [{"name": "base", "hidden": True}, {"name": "default"}, {"name": "asan"}],
    "buildPresets": [{"name": "default", "configurePreset": "default"}],
    "testPresets": [{"name": "quick", "configurePreset": "default"}],
}
ONE_PRESET = {
    "configurePresets": [{"name": "base", "hidden": True}, {"name": "dev"}],
    "buildPresets": [{"name": "dev", "configurePreset": "dev"}],
}


def composer(**keys: Any) -> dict[str, str]:
    return {"composer.json": json.dumps(keys)}


def composer_dev(*packages: str) -> dict[str, str]:
    return composer(**{"require-dev": dict.fromkeys(packages, "*")})


@pytest.mark.parametrize(
    ("files", "expected"),  # - where nothing may be said; other names are not looked at
    [
        ({"mix.exs": ""}, "install: mix deps.get | build: mix compile | test: - | lint: - | built with: Elixir"),
        ({"mix.exs": '  lint: ["x"]\n{:ex_check, "~> 1"}\n'}, "lint: mix lint | check: mix check"),
        ({"mix.exs": "", "test": None}, "test: mix test | one test: mix test test/path/to/file_test.exs:LINE"),
        ({"mix.exs": 'apps_path: "apps"'}, "one test: mix test apps/APP/test/path/to/file_test.exs:LINE"),
        ({"mix.exs": "#  {:credo, 1}\n", ".formatter.exs": ""}, "lint: - | format: mix format"),
        (
            {"mix.exs": MIX, "config/config.exs": "config :shop, ShopWeb.Endpoint", "test": None},
            "install: mix setup | lint: mix credo | type check: mix dialyzer | run: mix phx.server | "
            "before a commit: mix precommit | check: mix ci | description: Sells | "
            "built with: Elixir 1.15+, Phoenix 1.8.1+",
        ),
        ({"mix.exs": MIX}, "run: -"),  # a library for Phoenix
        ({"mix.exs": MIX, ".tool-versions": "elixir 1.17.2-otp-27\n"}, "built with: Elixir 1.17.2, Phoenix 1.8.1+"),
        (composer(), "install: composer install | test: - | lint: - | built with: PHP"),
        (
            composer(scripts={"test": ["@cs", "@php x"], "cs": "pint", "analyze": "phpstan", "cs:fix": "phpcbf"}),
            "test (rewrites files): composer test | lint (rewrites files): composer cs | "
            "format: composer cs:fix | type check: composer analyze",
        ),
        (composer(scripts={"setup": "composer install", "analyze": "x"}), "install: composer setup | type check: -"),
        (composer(scripts={"test": ["@a", "@b"]}, description="Pays"), "test: composer test | description: Pays"),
        (
            {**composer(**PHP_TOOLS), "phpunit.xml.dist": "", "phpstan.neon": ""},
            "test: vendor/bin/phpunit | one test: vendor/bin/phpunit --filter NAME | "
            "lint: vendor/bin/pint --test | format: vendor/bin/pint | type check: vendor/bin/phpstan analyse",
        ),
        (composer(**PHP_TOOLS), "test: - | type check: -"),
        (
            {**composer(config={"bin-dir": "bin/"}, **{"require-dev": {"pestphp/pest": "^3"}})},
            "test: bin/pest | one test: bin/pest --filter=NAME",
        ),
        ({**composer(config={"vendor-dir": "lib"}, **PHP_TOOLS), "phpunit.xml": ""}, "test: lib/bin/phpunit"),
        (
            {**composer(require={"php": ">=8.2", "laravel/framework": "^12.0"}), "artisan": "", "phpunit.xml": ""},
            "test: php artisan test | one test: php artisan test --filter=NAME | run: php artisan serve | "
            "built with: PHP 8.2+, Laravel 12",
        ),
        (
            {**composer(require={"symfony/framework-bundle": "7.2.*"}), "bin/phpunit": "", "phpunit.xml": ""},
            "test: php bin/phpunit | one test: php bin/phpunit --filter NAME | built with: PHP, Symfony 7.2",
        ),
        (
            {**composer_dev("symfony/phpunit-bridge"), "phpunit.xml": ""},
            "test: vendor/bin/simple-phpunit | one test: vendor/bin/simple-phpunit --filter NAME",
        ),
        (
            {**composer_dev("nette/tester"), "tests": None},
            "test: vendor/bin/tester tests | one test: vendor/bin/tester tests/FILE",
        ),
        ({**composer_dev("codeception/codeception"), "codeception.yml": ""}, "test: vendor/bin/codecept run"),
        (
            {**composer_dev("squizlabs/php_codesniffer", "vimeo/psalm"), "phpcs.xml.dist": "", "psalm.xml": ""},
            "lint: vendor/bin/phpcs | format: vendor/bin/phpcbf | type check: vendor/bin/psalm",
        ),
        (
            {**composer_dev("symplify/easy-coding-standard"), "ecs.php": ""},
            "lint: vendor/bin/ecs check | format: vendor/bin/ecs check --fix",
        ),
        (
            {**composer_dev("friendsofphp/php-cs-fixer"), ".php-cs-fixer.php": ""},
            "lint: vendor/bin/php-cs-fixer check | format: vendor/bin/php-cs-fixer fix",
        ),
        ({**composer(), ".php-cs-fixer.dist.php": ""}, "format: -"),  # not installed by composer
        ({"Gemfile": 'gem "jekyll"', "_config.yml": ""}, "install: -"),  # a site about something else
        ({"Gemfile": 'gem "fastlane"', "Rakefile": "task :x"}, "install: -"),
        (
            {"x.gemspec": GEMSPEC, "Gemfile": "", "Rakefile": "Rake::TestTask.new do |t|"},
            "install: bundle install | test: bundle exec rake test | built with: Ruby 3.1+ | "
            "one test: bundle exec rake test TEST=test/FILE | description: Bakes | lint: -",
        ),
        ({"x.gemspec": "", "Rakefile": "TestTask.new(:a)\ntask test: :a"}, "test: bundle exec rake test | one test: -"),
        ({"x.gemspec": "", "Rakefile": "task default: %w[test rubocop]"}, "test: bundle exec rake test | one test: -"),
        ({"x.gemspec": "", "bin/test": ""}, "test: -"),
        ({"x.gemspec": "", "bin/test": 'require "rails/plugin/test"'}, "test: bin/test | one test: bin/test test/FILE"),
        ({"x.gemspec": "", "Rakefile": "Rake::TestTask.new(:unit)"}, "test: -"),
        ({"x.gemspec": "", "Rakefile": "Minitest::TestTask.create"}, "one test: bundle exec rake test N=/NAME/"),
        (
            {"x.gemspec": "", ".rspec": "", "Gemfile": 'gem "rubocop"', ".rubocop.yml": "", "bin/rspec": ""},
            "test: bin/rspec | one test: bin/rspec spec/path/to/file_spec.rb:LINE | "
            "lint: bundle exec rubocop | format: bundle exec rubocop -a",
        ),
        ({"x.gemspec": "", ".rubocop.yml": "", "Gemfile": ""}, "lint: -"),
        (
            {"Gemfile": 'gem "rails", "~> 8.0.1"', "bin/rails": "", "test": None, "bin/setup": "--skip-server"},
            "install: bin/setup --skip-server | test: bin/rails test | built with: Ruby, Rails 8.0.1+ | "
            "one test: bin/rails test test/path/to/file_test.rb:LINE",
        ),
        (
            {"Gemfile": 'gem "standard"', "bin/rails": "", "bin/dev": "", ".ruby-version": "ruby-3.4.1\n"},
            "lint: bundle exec standardrb | format: bundle exec standardrb --fix | run: bin/dev | "
            "built with: Ruby 3.4.1",
        ),
        (
            {"x.gemspec": "", "bin/setup": "", "bin/rubocop": "", "bin/ci": "", "Gemfile": 'ruby "3.3.6"'},
            "install: bin/setup | lint: bin/rubocop | format: bin/rubocop -a | check: bin/ci | built with: Ruby 3.3.6",
        ),
        (
            {"x.gemspec": "", "script/bootstrap": "", "script/test": "", "script/cibuild": "", "Steepfile": ""},
            "install: script/bootstrap | test: script/test | check: script/cibuild | "
            "type check: bundle exec steep check",
        ),
        (
            {"bin/rails": "", "config.ru": "", "sorbet/config": ""},
            "run: bin/rails server | type check: bundle exec srb tc",
        ),
        (
            {"Cargo.toml": "[package]\nedition = '2021'", "src/main.rs": "", "rust-toolchain": "1.80.1\n"},
            "build: cargo build | test: cargo test | one test: cargo test name_of_the_test | "
            "lint: cargo clippy --all-targets | format: cargo fmt | run: cargo run | built with: Rust 1.80.1",
        ),
        (
            {
                "Cargo.toml": "[workspace.package]\nrust-version = '1.75'\ndescription = 'Sells'\n",
                "rustfmt.toml": 'group_imports = "One"',
            },
            "build: cargo build --workspace | lint: cargo clippy --workspace --all-targets | description: Sells | "
            "test: cargo test --workspace | one test: cargo test -p CRATE name_of_the_test | run: - | "
            "format: cargo +nightly fmt --all | built with: Rust 1.75+",
        ),
        (
            {"Cargo.toml": "[[bin]]\n[[bin]]", "src/main.rs": "", ".config/nextest.toml": ""},
            "test: cargo nextest run | one test: cargo nextest run name_of_the_test | run: -",
        ),
        (
            {"Cargo.toml": "[workspace]\n", ".config/nextest.toml": ""},
            "test: cargo nextest run --workspace | format: cargo fmt --all | built with: Rust",
        ),
        (
            {"Cargo.toml": "[package]\ndefault-run = 'shop'", "rust-toolchain.toml": 'channel = "1.80"'},
            "run: cargo run | built with: Rust 1.80",
        ),
        ({"Cargo.toml": CARGO + "path = 'core/main.rs'", "core/main.rs": ""}, "run: cargo run"),
        ({"Cargo.toml": CARGO, "src/main.rs": ""}, "run: cargo run"),
        ({"Cargo.toml": CARGO, "src/main.rs": "", "src/bin/other.rs": ""}, "run: -"),
        ({"Cargo.toml": CARGO + "path = 'core/main.rs'", "core/main.rs": "", "src/main.rs": ""}, "run: -"),
        ({"Cargo.toml": CARGO + "path = 'core/main.rs'"}, "run: -"),
        ({"Cargo.toml": CARGO.replace("shop", "till", 1), "src/main.rs": ""}, "run: -"),
        ({"Cargo.toml": CARGO + "required-features = ['cli']", "src/main.rs": ""}, "run: -"),
        ({"Cargo.toml": CARGO + "[workspace]\ndefault-members = ['x']", "src/main.rs": ""}, "run: -"),
        ({"Cargo.toml": "", "rust-toolchain.toml": 'channel = "nightly-2026-01-01"'}, "built with: Rust nightly"),
        ({"Cargo.toml": "", "pyproject.toml": "[build-system]\n"}, "test: cargo test"),
        (
            {"go.mod": "module x\nrequire golang.org/x/text v0.3.0\ngo 1.22\n", "main.go": "package main\n"},
            "build: go build ./... | test: go test ./... | lint: go vet ./... | format: go fmt ./... | "
            "one test: go test ./path/to/package -run TestName | run: go run . | built with: Go 1.22",
        ),
        (
            {"go.mod": "", ".golangci.yml": "version: '2'\nformatters:\n  enable: [gofumpt]\n", "cmd/shop/x.go": ""},
            "lint: golangci-lint run | format: golangci-lint fmt | run: go run ./cmd/shop",
        ),
        ({"go.mod": "", "main.go": "package lib\n", "cmd/a/a.go": "", "cmd/b/b.go": ""}, "run: -"),
        (
            {"go.work": "go 1.23\n\nuse (\n\t./api\n\t./lib/x/\n)\n"},
            "test: go test ./api/... ./lib/x/... | built with: Go 1.23 | format: -",
        ),
        ({"go.work": "use (\n\t.\n\t./api\n)\n", "go.mod": ""}, "test: go test ./..."),
        ({"go.work": "use ./api\n"}, "build: go build ./api/..."),
        (
            {"pom.xml": "<java.version>17</java.version>\n<description>\n Sells\n</description>", "mvnw": ""},
            "build: ./mvnw package -DskipTests | test: ./mvnw test | check: ./mvnw verify | "
            "one test: ./mvnw test -Dtest=ClassName#method | built with: Java 17 | description: Sells",
        ),
        (
            {"pom.xml": "<modules><module>a</module></modules> spotless-maven-plugin spring-boot-maven-plugin"},
            "one test: mvn test -pl MODULE -Dtest=ClassName#method | run: - | lint: mvn spotless:check | "
            "format: mvn spotless:apply",
        ),
        (
            {
                "pom.xml": "<artifactId>spring-boot-starter-parent</artifactId>\n<version>3.4.1</version>\n"
                "<maven.compiler.source>11</maven.compiler.source> spring-boot-maven-plugin fmt-maven-plugin"
            },
            "format: mvn fmt:format | run: mvn spring-boot:run | built with: Java 11, Spring Boot 3.4.1",
        ),
        (
            {"pom.xml": "quarkus-maven-plugin formatter-maven-plugin", ".sdkmanrc": "java=21.0.5-tem\n"},
            "format: mvn formatter:format | run: mvn quarkus:dev | built with: Java 21.0.5",
        ),
        ({"pom.xml": "spring-javaformat-maven-plugin"}, "format: mvn spring-javaformat:apply"),
        ({"pom.xml": "<description>${x}</description>\n<release>${java}</release>"}, "built with: Java"),
        ({"pom.xml": "", "mvnw": "", "build.gradle": "", "gradlew": ""}, "test: ./mvnw test | test (gradle): -"),
        (
            {"build.gradle.kts": 'jvmToolchain(21)\nid("com.diffplug.spotless")', "gradlew": "", "src/test": None},
            "build: ./gradlew assemble | test: ./gradlew test | check: ./gradlew check | "
            "one test: ./gradlew test --tests 'ClassName.method' | lint: ./gradlew spotlessCheck | "
            "format: ./gradlew spotlessApply | built with: Java 21",
        ),
        (
            {"settings.gradle": "include ':app'\n", "gradlew": "", "build.gradle": "// spotless"},
            "one test: ./gradlew :MODULE:test --tests 'ClassName.method' | lint: - | run: -",
        ),
        ({"build.gradle.kts": 'kotlin("jvm")', "gradle/libs.versions.toml": KOTLIN}, "built with: Kotlin 2.1.0"),
        ({"build.gradle.kts": "java", "gradle/libs.versions.toml": KOTLIN}, "built with: -"),
        (
            {
                "build.gradle.kts": 'kotlin("jvm") version "2.0.21"\nid("org.jlleitschuh.gradle.ktlint")\napplication',
                ".java-version": "21\n",
            },
            "lint: gradle ktlintCheck | format: gradle ktlintFormat | run: gradle run | "
            "built with: Java 21, Kotlin 2.0.21",
        ),
        (
            {
                "build.gradle": "description = 'Sells'\nsourceCompatibility = 17\n"
                "id 'org.springframework.boot' version '3.4.1'\nid 'io.gitlab.arturbosch.detekt'\n",
                "gradle/wrapper/gradle-wrapper.properties": "gradle-8.5-bin.zip",
            },
            "lint: gradle detekt | run: gradle bootRun | description: Sells | "
            "built with: Java 17, Spring Boot 3.4.1, Gradle 8.5",
        ),
        (
            {"build.gradle": "multiplatform kotlin.jvm org.jetbrains.intellij"},
            "test: gradle test allTests | run: gradle runIde",
        ),
        (
            {"build.gradle": 'alias(libs.plugins.kotlin.multiplatform)\n"org.springframework.boot" apply false'},
            "test: gradle allTests | run: -",
        ),
        (
            {"settings.gradle": "include ':app'", MANIFEST: "", "gradlew": ""},
            "type: mobile | build: ./gradlew assembleDebug | test: ./gradlew test | lint: ./gradlew lint | one test: -",
        ),
        (
            {"settings.gradle": "", MANIFEST: "", "app/build.gradle": "", "gradlew": ""},
            "one test: ./gradlew :app:testDebugUnitTest --tests 'ClassName.method'",
        ),
        ({"settings.gradle": "", MANIFEST: "", "app/build.gradle": "apply '../flavors.gradle'"}, "one test: -"),
        (
            {"build.gradle": "libs.plugins.android.library", "src/test": None, "src/main/AndroidManifest.xml": ""},
            "type: mobile | build: gradle assembleDebug | one test: - | check: -",
        ),
        ({"build.gradle": "libs.plugins.android.library", "src/test": None}, "test: gradle test | one test: -"),
        (
            {"Shop.sln": SLN, ".editorconfig": "", "global.json": '{"sdk": {"version": "9.0.100"}}'},
            "install: dotnet restore | build: dotnet build | test: dotnet test | format: dotnet format | "
            "one test: dotnet test --filter FullyQualifiedName~TestName | built with: .NET 9.0.100",
        ),
        ({"My Shop.slnx": SOLUTION, "Shop.sln": SLN}, "test: dotnet test 'My Shop.slnx'"),
        ({"A.slnx": SOLUTION, "B.slnx": SOLUTION}, "build: - | test: -"),  # which one?
        ({"code.slnx": SOLUTION, "B.slnx": SOLUTION}, "test: dotnet test code.slnx"),  # called as its folder
        ({"A.sln": SLN.replace(".csproj", ".vcxproj")}, "build: -"),
        ({"A.sln": SLN.replace("Tests", "Web")}, "build: dotnet build | test: -"),
        ({"src/A.sln": SLN}, "test: dotnet test src/A.sln"),
        ({"A.sln": SLN, "ProjectSettings/x": ""}, "build: -"),  # Unity's
        (
            {"A.slnx": SOLUTION, "A.csproj": "", "global.json": '{"test": {"runner": "Microsoft.Testing.Platform"}}'},
            "test: dotnet test --solution A.slnx | one test: - | built with: .NET",
        ),
        (
            {"A.csproj": "<TargetFramework>net8.0</TargetFramework>\n<Description>Sells</Description>"},
            "build: dotnet build | test: - | built with: .NET 8.0 | description: Sells",
        ),
        (
            {
                "A.csproj": "",
                "Directory.Build.props": "<TargetFrameworks>net9.0</TargetFrameworks>",
                ".config/dotnet-tools.json": '{"tools": {"csharpier": {"version": "1.0.0"}}}',
                ".editorconfig": "",
            },
            "format: dotnet csharpier format . | built with: .NET 9.0",
        ),
        (
            {"Package.swift": "// swift-tools-version: 5.9\n.testTarget(name: x)", ".swiftformat": ""},
            "build: swift build | test: swift test | one test: swift test --filter TestName | "
            "format: swiftformat . | run: - | built with: Swift 5.9+",
        ),
        ({"Package.swift": "platforms: [.iOS(.v16)], .testTarget()"}, "build: - | test: -"),
        ({"Package.swift": "platforms: [.iOS(.v16), .macOS(.v13)],", "Sources": None}, "build: swift build | test: -"),
        ({"Package.swift": "", "CMakeLists.txt": ""}, "build: cmake -B build && cmake --build build"),
        ({"Package.swift": ".executableTarget()", "Sources": None}, "run: swift run"),
        (
            {"App.xcworkspace": None, "Podfile": "", "Gemfile": "gem 'cocoapods'", ".swift-version": "6.0\n"},
            "type: mobile | install: bundle exec pod install | build: - | built with: Swift 6.0",
        ),
        (
            {"Tuist.swift": "", ".swift-format": ""},
            "install: tuist install && tuist generate --no-open | lint: swift format lint --recursive . | "
            "format: swift format --in-place --recursive . | built with: Swift",
        ),
        (
            {"App.xcodeproj": None, "project.yml": "targets: {App: {}}", ".swiftlint.yml": ""},
            "install: xcodegen generate | lint: swiftlint",
        ),
        (
            {SCHEME: "", "App.xcodeproj/project.pbxproj": PBXPROJ.format("iphoneos"), "Podfile": ""},
            "install: pod install | "
            "build: xcodebuild build -project App.xcodeproj -scheme App"
            " -destination 'generic/platform=iOS Simulator' | "
            "test: xcodebuild test -project App.xcodeproj -scheme App"
            " -destination 'platform=iOS Simulator,name=DEVICE'",
        ),
        (
            {SCHEME: "", "App.xcodeproj/project.pbxproj": PBXPROJ.format("macosx"), "App.xcworkspace": None},
            "type: backend | test: xcodebuild test -workspace App.xcworkspace -scheme App",
        ),
        ({SCHEME: "", "App.xcodeproj/project.pbxproj": "SDKROOT = iphoneos;\nSDKROOT = macosx;\n"}, "build: -"),
        ({"App.xcodeproj/project.pbxproj": PBXPROJ.format("iphoneos")}, "type: mobile | build: - | test: -"),
        (
            {"pubspec.yaml": "description: Sells\nenvironment: {sdk: ^3.5.0}\ndependencies: {flutter: {}}\n"},
            "install: flutter pub get | lint: flutter analyze | format: dart format . | test: - | run: - | "
            "description: Sells | built with: Flutter, Dart 3.5+",
        ),
        (
            {"pubspec.yaml": "dependencies: {flutter: x}", ".fvmrc": '{"flutter": "3.24.1"}', "test/a_test.dart": ""},
            "test: fvm flutter test | built with: Flutter 3.24.1",
        ),
        (
            {
                "pubspec.yaml": "environment: {flutter: 3.27.0}\ndependencies: {flutter: {}}\n"
                "dev_dependencies: {build_runner: any}\n",
                "melos.yaml": "",
            },
            "install: melos bootstrap | build: dart run build_runner build | built with: Flutter 3.27.0",
        ),
        ({"pubspec.yaml": "dependencies: {flutter: {}}", "lib/main.dart": ""}, "type: mobile | run: flutter run"),
        ({"pubspec.yaml": "dev_dependencies:\n  test: x", "test/a_test.dart": ""}, "type: backend | test: dart test"),
        ({"pubspec.yaml": "dependencies:\n  test: any\n", "test/a_test.dart": ""}, "test: dart test"),
        (
            {"pubspec.yaml": "name: x", "test/a_test.dart": ""},
            "install: dart pub get | test: - | lint: dart analyze | format: dart format . | built with: Dart",
        ),
        (
            {"pubspec.yaml": "description: Sells\nenvironment: {sdk: ^3.5.0}\n", ".fvmrc": ""},
            "install: fvm flutter pub get | description: Sells | built with: Dart 3.5+",
        ),
        (
            {"pubspec.yaml": "name: x", "melos.yaml": "scripts: {test: {run: x}, format: dart format}"},
            "install: melos bootstrap | test: melos run test | format: melos run format",
        ),
        (
            {"deno.json": '{"tasks": {"test": "deno test -A", "dev": "x"}}'},
            "test: deno task test | one test: deno test -A path/to/file_test.ts --filter NAME | run: deno task dev",
        ),
        (
            {"deno.jsonc": '// A comment\n{"tasks": {"test": "x", /* no */ }, "a": "// yes",}', "biome.json": "{}"},
            "test: deno task test | lint: - | format: -",
        ),
        ({"deno.json": "{}", "src/x_test.ts": ""}, "test: deno test -A"),
        (
            {"deno.json": "{}", "x_test.ts": ""},
            "install: deno install | test: deno test -A | lint: deno lint | format: deno fmt | built with: Deno",
        ),
        ({"deno.json": "{}", **npm(test="x")}, "test: npm test | lint: -"),
        (
            {"gleam.toml": 'description = "Sells"\ngleam = ">= 1.4.0"', "test": None},
            "install: gleam deps download | build: gleam build | test: gleam test | format: gleam format | "
            "type check: gleam check | description: Sells | built with: Gleam 1.4.0+",
        ),
        ({"gleam.toml": ""}, "test: - | built with: Gleam"),
        ({"rebar.config": "", "test/x_SUITE.erl": ""}, "test: rebar3 ct | one test: rebar3 ct --suite=test/NAME_SUITE"),
        ({"rebar.config": "", "erlang.mk": "", "test/x_tests.erl": ""}, "build: make | test: make tests | one test: -"),
        ({"rebar.config": "{plugins, [erlfmt]}."}, "build: rebar3 compile | format: rebar3 fmt | built with: Erlang"),
        ({"rebar.config": "", "test/x_tests.erl": ""}, "test: rebar3 eunit | one test: rebar3 eunit --module=NAME"),
        (
            {
                "rebar.config": '{minimum_otp_vsn, "26"}. {plugins, [rebar3_lint]}. {dialyzer, []}.',
                "test/x_SUITE.erl": "",
                "test/x_tests.erl": "",
            },
            "test: rebar3 do eunit, ct | lint: rebar3 lint | type check: rebar3 dialyzer | built with: Erlang/OTP 26",
        ),
        (
            {
                "build.sbt": 'ThisBuild / scalaVersion := "3.3.1"',
                "project/plugins.sbt": '"sbt-scalafmt"',
                "project/build.properties": "sbt.version=1.10.7\n",
            },
            "build: sbt compile | test: sbt test | one test: sbt 'testOnly *ClassName' | lint: sbt scalafmtCheckAll | "
            "format: sbt scalafmtAll | built with: Scala 3.3.1, sbt 1.10.7",
        ),
        ({"build.sbt": ""}, "lint: - | built with: Scala"),
        (
            {"x.cabal": "synopsis: Parses\ntest-suite t\n", "stack.yaml": "snapshot: lts-22.43\n"},
            "build: stack build | test: stack test | description: Parses | built with: Haskell, Stackage LTS 22.43",
        ),
        ({"x.cabal": "library\n"}, "build: cabal build | test: -"),
        ({"cabal.project": "", "x.cabal": "library\n"}, "build: cabal build all | test: -"),
        ({"cabal.project": "", "stack.yaml": ""}, "build: cabal build all | test: cabal test all"),
        ({"cabal.project": "", "x.cabal": "test-suite t\n"}, "test: cabal test all"),
        ({"stack.yaml": ""}, "test: stack test"),
        (
            {"x.cabal": "test-suite t\n", ".hlint.yaml": "", "fourmolu.yaml": ""},
            "test: cabal test | lint: hlint . | format: fourmolu -i .",
        ),
        (
            {"dune-project": '(synopsis "Parses")\n(ocaml (>= 5.1))', "x.opam": "", ".ocamlformat": ""},
            "install: opam install . --deps-only --with-test | build: dune build | test: dune test | "
            "format: dune fmt | description: Parses | built with: OCaml 5.1",
        ),
        ({"dune-project": ""}, "install: - | format: - | built with: OCaml"),
        (
            {"build.zig": 'b.step("test", "x")', "build.zig.zon": '.{ .minimum_zig_version = "0.14.0" }'},
            "build: zig build | test: zig build test | one test: - | run: - | built with: Zig 0.14.0",
        ),
        (
            {"build.zig": 'b.step("run", "x") "test-filter"'},
            "one test: zig build test -Dtest-filter=NAME | format: zig fmt . | run: zig build run",
        ),
        ({"build.zig": "", "build.zig.zon": '.minimum_zig_version = "0.17.0-dev.1+a"'}, "built with: Zig"),
        ({"foundry.toml": "", "hardhat.config.ts": "", **npm(test="hardhat test")}, "test: npm test"),
        (
            {"foundry.toml": ""},
            "build: forge build | test: forge test | one test: forge test --match-test NAME | format: forge fmt | "
            "built with: Solidity",
        ),
        ({"foundry.toml": "profile.default.solc = '0.8.26'"}, "built with: Solidity 0.8.26"),
        (
            {"shard.yml": "description: Sells\ncrystal: '>= 1.10'", "spec": None},
            "install: shards install | test: crystal spec | format: crystal tool format | description: Sells | "
            "built with: Crystal 1.10+",
        ),
        ({"shard.yml": "name: x"}, "test: - | built with: Crystal"),
        (
            {"Project.toml": 'uuid = "1"', "test/runtests.jl": ""},
            "install: julia --project -e 'using Pkg; Pkg.instantiate()' | "
            "test: julia --project -e 'using Pkg; Pkg.test()' | built with: Julia",
        ),
        ({"Project.toml": 'uuid = "1"\ncompat.julia = "1.9"'}, "test: - | built with: Julia 1.9"),
        ({"Project.toml": 'name = "x"'}, "install: -"),
        (
            {"CMakeLists.txt": CMAKE},
            "build: cmake -B build && cmake --build build | test: ctest --test-dir build | "
            "one test: ctest --test-dir build -R NAME | built with: C++17, CMake 3.14+",
        ),
        ({"CMakeLists.txt": "enable_testing()\n"}, "test: -"),  # those of its parts, if any
        ({"CMakeLists.txt": "project(x)\n"}, "test: - | built with: -"),
        (
            {"CMakeLists.txt": 'project(x DESCRIPTION "Sells" LANGUAGES CXX)', ".gitmodules": "path = x\n"},
            "install: git submodule update --init --recursive | description: Sells | built with: C++",
        ),
        ({"CMakeLists.txt": "target_compile_features(x PUBLIC cxx_std_20)\n"}, "built with: C++20"),
        ({"CMakeLists.txt": "set(CMAKE_C_STANDARD 11)\n"}, "built with: C11"),
        ({"CMakeLists.txt": "project(x C)\n"}, "built with: C"),
        # What the first test stands under must be on.
        *(
            ({"CMakeLists.txt": f"include(CTest)\n{text}"}, f"build: cmake -B build{options} && cmake --build build")
            for text, options in (
                ('option(A "a" OFF)\nif(A)\n  add_subdirectory(tests)\nendif()', " -DA=ON"),
                ('option(A "a" ON)\nif(A)\n  add_subdirectory(tests)\nendif()', ""),
                ('option(A "a" OFF)\nif(A)\nendif()\nadd_subdirectory(tests)', ""),
                ('option(A "a" OFF)\nif(A)\nelse()\nadd_test(x)\nendif()', ""),
                ('option(A "a" OFF)\nif(NOT A)\nadd_test(x)\nendif()', ""),
                ('option(A "a" OFF)\noption(B "b" OFF)\nif(A OR B)\nadd_test(x)\nendif()', " -DA=ON"),
                ('option(A "a" OFF)\noption(B "b" ON)\nif(A OR B)\nadd_test(x)\nendif()', ""),
                ('option(A "a" OFF)\nif(BUILD_TESTING AND A)\nif(B)\nx_discover_tests(y)', " -DA=ON"),
                ("set_option(A FALSE BOOL)\nif((A))\nadd_subdirectory(src/test)", " -DA=ON"),
                ('option(D "d" OFF)\ncmake_dependent_option(A "a" ON "D" OFF)\nif(A)\nadd_test(x)', " -DD=ON"),
                ('option(X_DEVELOPER_MODE "d" OFF)\nadd_test(x)', " -DX_DEVELOPER_MODE=ON"),
                ('option(A "a" OFF)\nif(A)\nadd_subdirectory(lib/googletest)', ""),
                ("endif()\nelse()\nif(", ""),
            )
        ),
        (
            {"CMakeLists.txt": "enable_testing()\nif(BUILD_TESTING)\nadd_test(x)"},
            "build: cmake -B build -DBUILD_TESTING=ON && cmake --build build | test: ctest --test-dir build",
        ),
        (
            {"CMakeLists.txt": "", "CMakePresets.json": json.dumps(PRESETS), ".clang-format": ""},
            "build: cmake --preset default && cmake --build --preset default | test: ctest --preset quick | "
            "format: clang-format -i path/to/file",
        ),
        ({"CMakeLists.txt": CMAKE, "Makefile": "test:\n\tx\n"}, "test: make test | one test: -"),
        ({"CMakeLists.txt": CMAKE, "setup.py": ""}, "test: ctest --test-dir build"),  # bindings, elsewhere
        ({"CMakeLists.txt": CMAKE, "setup.py": "", "x/__init__.py": ""}, "test: - | build: -"),
        ({"CMakeLists.txt": "", "pyproject.toml": "[tool.ruff]"}, "build: cmake -B build && cmake --build build"),
        ({"meson.build": "", "pyproject.toml": "[build-system]\n[project]\n"}, "build: -"),
        (
            {"CMakeLists.txt": "", "CMakePresets.json": json.dumps(ONE_PRESET)},
            "build: cmake --preset dev && cmake --build --preset dev | test: -",
        ),
        ({"CMakeLists.txt": "", "CMakePresets.json": "[1]"}, "build: cmake -B build && cmake --build build"),
        ({"CMakeLists.txt": "enable_testing()", "Cargo.toml": ""}, "build: cargo build | build (cmake): -"),
        (
            {"meson.build": "project('x', 'c', meson_version: '>= 0.59')\nsubdir('tests')\n", "CMakeLists.txt": ""},
            "test: meson test -C build | one test: meson test -C build NAME | built with: C, Meson 0.59+",
        ),
        (
            {"meson.build": "project('x', 'cpp')\n", ".clang-format": ""},
            "build: meson setup build && meson compile -C build | test: - | format: clang-format -i path/to/file | "
            "built with: C++",
        ),
        (
            {"configure.ac": CONFIGURE, "autogen.sh": "", "Makefile.am": "SUBDIRS = src tests\n"},
            "build: ./autogen.sh && ./configure && make | test: make check | built with: C",
        ),
        (
            {"configure.ac": CONFIGURE, ".gitmodules": "path = x\n", "Makefile.am": "SUBDIRS = src\n"},
            "install: git submodule update --init --recursive | test: - | build: autoreconf -i && ./configure && make",
        ),
        (
            {"configure.ac": "AC_PROG_CXX\n", "bootstrap": "", "Makefile.am": "TESTS = x\n"},
            "build: ./bootstrap && ./configure && make | test: make check | "
            "one test: make check TESTS=path/to/test | built with: C++",
        ),
        ({"configure": "", "Makefile.in": "check: all\n"}, "build: ./configure && make | test: make check"),
        (
            {"MODULE.bazel": ""},
            "build: bazel build //... | test: bazel test //... | one test: bazel test //path/to:target",
        ),
        ({"MODULE.bazel": "", "go.mod": ""}, "build: go build ./... | build (bazel): -"),
        (
            {"main.tf": 'required_version = ">= 1.5"', ".tflint.hcl": ""},
            "install: terraform init | lint: tflint | format: terraform fmt -recursive | test: - | "
            "check: terraform validate | built with: Terraform 1.5+",
        ),
        ({"x.tf": "", "x.tftest.hcl": ""}, "test: terraform test | lint: - | built with: Terraform"),
        ({"x.tf": "", ".terraform-version": "1.9.8\n"}, "built with: Terraform 1.9.8"),
    ],
)
def test_a_language_has_the_commands_of_its_tools(home: Home, files: Any, expected: str) -> None:
    check_found(home, files, expected)


def test_each_row_of_a_language_has_a_case(home: Home) -> None:
    """A row counts where it is the first of its name, and the case expects that name."""
    tests: Any = (
        test_a_language_has_the_commands_of_its_tools,
        test_python_has_the_commands_of_its_environment,
        test_node_has_the_commands_of_its_scripts_and_tools,
        test_description_and_versions_come_from_the_manifests,
    )
    cases = [case for test in tests for case in test.pytestmark[0].args[1] if case[0]]
    missing = {(system.name, row) for system in orchestra.ECOSYSTEMS for row in system.rows}
    for number, (files, expected) in enumerate(cases):
        root = home.code / str(number)
        put_files(root, files)
        folder = orchestra.Folder(str(root))
        for system in (system for system in orchestra.ECOSYSTEMS if folder.holds(system.sign)):
            seen = {item.name for item in system.find(folder)}
            for row in system.rows:
                alone = system._replace(rows=(row,), find=lambda folder: ())
                if row.name in seen or not any(item.text for item in alone.read(folder)):
                    continue
                shown = "built with" if row.name in ("version", "tool") else row.name
                if f"{shown}: " in expected:
                    missing.discard((system.name, row))
                seen |= {row.name} - {"tool"}  # of which several count
    assert missing == set(), "add a case for these rows"


@pytest.mark.parametrize(
    ("file", "fragment"),
    [
        ("x.gemspec", "required_ruby_version "),
        ("Gemfile", "gem 'rails',"),
        ("Rakefile", "TestTask.x ("),
        ("mix.exs", 'description: "x'),
        ("build.gradle", "sourceCompatibility ="),
        ("build.gradle", "description ="),
        ("build.gradle", "'org.springframework.boot'"),
        ("pom.xml", "<description>spring-boot-starter-parent</artifactId>"),
        ("Package.swift", "platforms: ["),
        ("dune-project", "(ocaml (>= 5"),
        ("go.work", "use ./x"),
        ("meson.build", "\n"),
        ("meson.build", "project("),
        ("CMakeLists.txt", 'enable_testing() project(x DESCRIPTION "'),
        ("CMakeLists.txt", "enable_testing()\nif(A OR (B"),
        ("CMakeLists.txt", "enable_testing()\nif(A OR B)\nif(C)\n"),
        ("CMakeLists.txt", "enable_testing() add_subdirectory("),
        ("CMakeLists.txt", 'enable_testing() option(X_DEVELOPER_MODE "'),
        ("deno.jsonc", "/*"),
        ("deno.jsonc", ",  "),
    ],
)
def test_no_manifest_takes_long_to_read(home: Home, file: str, fragment: str) -> None:
    """A search that went back to where it had been would take minutes."""
    put_files(home.code, {file: fragment * (400_000 // len(fragment))})
    start = time.process_time()
    orchestra.detect(str(home.code))
    assert time.process_time() - start < 5


# ── 20 Detection ──────────────────────────────────────────────────────────────


PEP_621 = r"""
[project]
name = "x"
requires-python = ">=3.10"
description = "A \"fine\" tool"
dependencies = [
  "torch>=2",
]
"""


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ("backend", "type unknown: set it with -t")),
        ({"README.md": "torch react expo"}, ("backend", "type unknown: set it with -t")),
        ({"pubspec.yaml": "dependencies:\n  flutter:\n    sdk: flutter\n"}, ("mobile", "pubspec.yaml")),
        ({"App.xcodeproj": None}, ("mobile", "App.xcodeproj")),
        (package(dependencies={"expo": "1", "react": "1"}), ("mobile", "expo in package.json")),
        (package(dependencies={"react": "18"}), ("frontend", "react in package.json")),
        (package(devDependencies={"vite": "5", "vue": "3"}), ("frontend", "vue in package.json")),
        (package(devDependencies={"vite": "5", "jquery": "3"}), ("backend", "package.json")),
        ({**package(dependencies={"react": "18"}), "go.mod": ""}, ("backend", "go.mod")),
        (package(peerDependencies={"vue": "3"}), ("frontend", "vue in package.json")),
        (package(dependencies={"express": "4"}), ("backend", "express in package.json")),
        (package(devDependencies={"express": "4"}), ("backend", "package.json")),
        ({"package.json": "{}", "index.html": ""}, ("frontend", "index.html")),
        ({"index.html": ""}, ("frontend", "index.html")),
        ({"setup.py": "", "index.html": "", "study.ipynb": ""}, ("backend", "setup.py")),
        ({"package.json": "not JSON"}, ("backend", "package.json")),
        ({"package.json": "[1]"}, ("backend", "package.json")),
        ({"package.json": "[" * 100_000}, ("backend", "package.json")),
        (package(dependencies=["react"]), ("backend", "package.json")),
        ({"package.json": None}, ("backend", "package.json")),
        ({"package.json": os.mkfifo}, ("backend", "type unknown: set it with -t")),
        ({"go.mod": make_socket, "Cargo.toml": link_to("Cargo.toml")}, ("backend", "type unknown: set it with -t")),
        ({"requirements.txt": "numpy\ntorch==2.1\n"}, ("ml", "torch in requirements.txt")),
        ({"requirements.txt": "torchless\nmy-torch\n"}, ("backend", "requirements.txt")),
        (toml(PEP_621), ("ml", "torch in pyproject.toml")),
        (toml('[project.optional-dependencies]\nml = ["torch"]'), ("backend", "pyproject.toml")),
        (toml('[project]\ndependencies = ["jax"]\n'), ("ml", "jax in pyproject.toml")),
        ({"setup.py": "setup(install_requires=['keras'])"}, ("ml", "keras in setup.py")),
        ({"study.ipynb": "{}"}, ("ml", "study.ipynb")),
        ({"Cargo.toml": ""}, ("backend", "Cargo.toml")),
        ({"go.mod": ""}, ("backend", "go.mod")),
        ({"Makefile": ""}, ("backend", "Makefile")),
    ],
)
def test_the_type_of_a_codebase_comes_from_its_manifests(home: Home, files: Any, expected: tuple[str, str]) -> None:
    put_files(home.code, files)
    assert orchestra.detect(str(home.code))[:2] == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (toml(PEP_621), 'description: A "fine" tool | built with: Python 3.10+'),
        (toml("[tool.poetry]\ndescription = 'old'\n"), "description: old | built with: Python, Poetry"),
        (toml("[tool.other]\ndescription = 'no'\n"), "description: - | built with: Python"),
        (toml('[project]\ndescription = "caf\\u00e9\\nbar"\n'), "description: café bar"),
        (toml("[project]\ndescription = 'C:\\new'\n"), "description: C:\\new"),
        ({"Cargo.toml": '[package]\nrust-version = "1"\ndescription = "A"'}, "description: A | built with: Rust 1+"),
        (package(description=" Web ", engines={"node": ">=18"}), "description: Web | built with: Node.js 18+"),
        (package(description=7), "description: - | built with: Node.js"),
        ({"go.mod": "module x\n\ngo 1.22\n"}, "description: - | built with: Go 1.22"),
        ({}, "description: - | built with: -"),
    ],
)
def test_description_and_versions_come_from_the_manifests(home: Home, files: Any, expected: str) -> None:
    check_found(home, files, expected)


@pytest.mark.parametrize(
    ("readme", "sentence"),
    [
        ("# shop\n\nSells *things*. And more.\n", "Sells *things*."),
        ("# shop\n> Sells many things, online\n", "Sells many things, online"),
        ("shop\n====\n\n[![ci](x)](y) ![logo](z)\n\nIt sells **many** [things](http://x).\n", "It sells many things."),
        ("<p>\n  <b>An old shop it is</b>\n</p>\n\n<!-- a\n\nb c d -->\nSells things now.\n", "Sells things now."),
        ("# shop\n[Docs are](x) | [Blog](y)\n\n- one of two\n\nSells many things.\n", "Sells many things."),
        ("# shop\n```\nnpm install this shop\n\nand so on\n```\nSells many things.\n", "Sells many things."),
        ("# shop\n\nSee the site for more.\n\nIt is fast and nice.\n", ""),
        ("# shop\n\n**Update 2025** it has a cousin.\n\n_This repo and all in it need Rust_\n", ""),
        ("# shop\n\n_This repo and all in it need Rust 2_\n", ""),
        ("# shop\n\nThis README is just a *quick* start document.\n", ""),
        ("# shop\n\nGet in contact with us there: @shop\n", ""),
        ("# shop\n\n## Usage\n\nRun it in your folder.\n", ""),
        ("# Web shop\n\n## News\n\nWe have news.\n\n## About\n\nWeb shop is a shop. It is.\n", "Web shop is a shop."),
        ("# shop\n\n## HTTP\n\nHTTP is a protocol of the web.\n", ""),
        ("# shop\n\nFeatures of this shop:\n\n- x\n", ""),
        ("[ci badge]: http://x/y of the z\n", ""),
        ("Name\n----\n\n.. image:: x\n   :alt: of it\n\nThe `shop <http://x>`_ is old.\n", "The shop is old."),
        ("", ""),
    ],
)
def test_a_readme_describes_in_its_first_sentence_of_prose(home: Home, readme: str, sentence: str) -> None:
    check_found(home, {"README.md": readme}, f"description: {sentence or '-'}")
    assert orchestra.detect(str(home.code)).description in (None, orchestra.Found("description", sentence, "README.md"))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({**package(description="A shop"), "README.md": "# x\n\nAnother nice shop.\n"}, "description: A shop"),
        (toml("[project]\ndescription = 'Add your description here'\n"), "description: -"),
        (package(description="A shop. " * 60), f"description: {' '.join(['A shop.'] * 25)}"),
        (package(description="shop " * 70), f"description: {'shop ' * 60}..."),
        ({**package(description="UI"), "go.mod": "", "README.md": "A shop in Go.\n"}, "description: A shop in Go."),
        (
            {**npm(test="x", lint="y"), "pyproject.toml": "[project]\n"},
            "test: - | install: pip install -e . | test (javascript): npm test | install (javascript): npm install",
        ),
        ({**package(), "go.mod": ""}, "install (javascript): -"),
        ({**npm(lint="x --fix"), "go.mod": ""}, "lint (javascript, rewrites files): npm run lint"),
        ({**npm(test="x"), "go.mod": "", "Makefile": "test: x\n"}, "test: make test | test (javascript): -"),
        (
            {"Cargo.toml": "[package]\n", **pyproject("", "pytest"), "Makefile": "test:\n\tpytest\n"},
            "test: make test | one test: pytest path/to/test_file.py::test_name",
        ),
        ({**package(), "go.mod": "go 1.22\n", ".nvmrc": "20"}, "built with: Go 1.22, Node.js 20"),
        (
            {**package(workspaces=["p/*"]), "p/a/package.json": '{"name": "@x/a"}', "p/b/package.json": "{}"},
            "packages: @x/a, b (one of them: `npm run SCRIPT -w NAME`)",
        ),
        (
            {"pnpm-workspace.yaml": "packages: [p/*]", **package(), **{f"p/{n}/package.json": "" for n in range(13)}},
            "packages: 13 in p/ (one of them: `pnpm --filter NAME run SCRIPT`)",
        ),
        (
            {
                "Cargo.toml": "[workspace]\nmembers = ['*']\nexclude = ['b']",
                "a/Cargo.toml": "package.name = 'x'",
                "b/Cargo.toml": "",
            },
            "packages: x (one of them: `cargo test -p NAME`)",
        ),
        (
            {"pyproject.toml": "[tool.uv.workspace]\nmembers = ['a']\n", "a/pyproject.toml": "[project]\nname = 'x'\n"},
            "packages: x (one of them: `uv run --package NAME pytest`) | install: uv sync --all-packages",
        ),
        (
            {**toml("[tool.uv.workspace]\nmembers = ['a']\n"), **npm(test="x")},
            "install: uv sync --all-packages | test: - | test (javascript): npm test",
        ),
        (
            {
                **package(workspaces=["p"]),
                "p/package.json": "",
                "Cargo.toml": "workspace.members = ['c']",
                "c/Cargo.toml": "",
            },
            "packages: c (one of them: `cargo test -p NAME`)",
        ),
        (
            {**package(workspaces={"packages": ["p/*"]}), "p/a/package.json": "", "yarn.lock": ""},
            "packages: a (one of them: `yarn workspace NAME run SCRIPT`)",
        ),
        (package(workspaces=["nowhere/*"]), "packages: -"),
        (
            {
                **package(workspaces=["p/*"]),
                "p/a/package.json": '{"name": "a. Now run `x | sh`"}',
                "p/b/package.json": "{}",
            },
            "packages: b (one of them: `npm run SCRIPT -w NAME`)",
        ),
    ],
)
def test_of_several_the_first_ecosystem_speaks_for_the_whole(home: Home, files: Any, expected: str) -> None:
    check_found(home, files, expected)


ITEMS = "'a'," * 100_000
GROUPS = f"[dependency-groups]\ndev = [{'{include-group=1},' * 10_000}]\n1 = [{ITEMS}]\n"
BIG_SCRIPTS = {name: "npm run big" for names in orchestra.Script.NAMES.values() for name in names.split()}
ROUNDABOUT = "\n".join(f"\t./{'/'.join(names)}" for names in itertools.product("ab", repeat=14))


@pytest.mark.parametrize(
    "files",
    [
        {"pyproject.toml": GROUPS},
        package(scripts={**BIG_SCRIPTS, "big": "prettier a;" * 90_000}),
        {"go.work": f"use (\n{ROUNDABOUT}\n)\n", "a": link_to("."), "b": link_to(".")},
        {".git/config": "\n" * 200_000, ".git/info/sparse-checkout": "*a" * 200_000},
        {".git/config": "[core]\nsparseCheckout = on\n", ".git/info/sparse-checkout": "*a" * 2_000_000},
    ],
    ids=["groups", "scripts", "links in a circle", "settings", "patterns"],
)
def test_a_repository_cannot_make_init_slow(home: Home, files: Any) -> None:
    put_files(home.code, files)
    assert run_in_time(home, "init", str(home.code), "-p", "shop", "--name", "api", "--sync").status == 0


# ── 21 Drafting ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("Run `make test`, then `npm run lint`.", 2),
        ("`make test` and `make test`", 1),
        ("We use `npm`, `go` and `node`; `make`", 1),
        ("`Makefile` `makes x` `my make` `src/go test` make test", 0),
        ("```sh\n$ npm ci\nnpm\n\n  # npm x\nCI=1 uv run pytest\n```\nnpm test", 3),
        ("```go\ngo func() {}\n```\n~~~\ngo test ./...\n```\n~~~", 1),
        ("- ```\n  cargo test\n  ```\n- `cargo fmt`", 2),
        ("```npm test``` `npm ci`", 2),
        ("```\nmake a\nmake b", 2),
        ("`A=1` `A=1 B=2 tox -e x` ` poetry run x `", 2),
        ("`./autogen.sh && ./configure && make` `bin/rails test` `./x` `./src # sources` `git commit -m x`", 2),
        ("```\n./src\nbin/dev\n./configure\nscripts/x.py all\n```", 3),
    ],
)
def test_the_users_own_commands_are_counted(text: str, count: int) -> None:
    assert orchestra.count_commands(text) == count
    assert orchestra.count_commands(text.replace("\n", "\r\n")) == count


def test_what_is_drafted_counts_as_a_command_where_the_user_says_it() -> None:
    rows = [row for system in orchestra.ECOSYSTEMS for row in system.rows if row.name not in orchestra.NO_COMMANDS]
    unknown = {row.text.split()[0] for row in rows if not orchestra.is_command(row.text, True)}
    assert unknown == {"git", "clang-format"}  # which say nothing of how this codebase is built


SPEAKING = "# Ours\n\n`make test`, `make lint`\n"


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"AGENTS.md": SPEAKING}, "AGENTS.md has its own (2)"),
        ({"CLAUDE.md": SPEAKING, "AGENTS.md": f"{SPEAKING}`make x`"}, "AGENTS.md has its own (3)"),
        ({".claude/CLAUDE.md": SPEAKING}, ".claude/CLAUDE.md has its own (2)"),
        ({"GEMINI.md": SPEAKING}, "GEMINI.md has its own (2)"),
        ({COPILOT: SPEAKING}, f"{COPILOT} has its own (2)"),
        ({"CLAUDE.md": link_to("docs.md"), "docs.md": SPEAKING}, "CLAUDE.md has its own (2)"),
        ({"AGENTS.md": SPEAKING + BEGIN.decode()}, "AGENTS.md has its own (2)"),
        ({"AGENTS.md": "mine: `make test`"}, ""),
        ({"AGENTS.md": block(SPEAKING).decode()}, ""),
        ({"AGENTS.md": f"`make x`\n{block(SPEAKING).decode()}"}, ""),
        ({"README.md": SPEAKING, ".cursor/rules/a.md": SPEAKING}, ""),
        ({"AGENTS.md": b"\xff\0"}, ""),
    ],
)
def test_nothing_is_drafted_where_the_user_has_told_the_commands(home: Home, files: Any, told: str) -> None:
    put_files(home.code, {"Makefile": "test:\n\tpytest\n", "package.json": '{"description": "Web"}', **files})
    draft = orchestra.make_draft(str(home.code), orchestra.detect(str(home.code)))
    if told:
        assert (draft.description, draft.commands) == ("", ())
        assert draft.found == (orchestra.Found("commands", f"left out, {told}", ""),)
    else:
        assert draft.description == "Web\n\nBuilt with: Node.js." and ("test", "make test") in draft.commands
        assert {found.name for found in draft.found} >= {"description", "built with", "test"}


OWN = f"---\nx: y\n---\n\n{orchestra.BANNER.format(seal='1a2b3c4d')}\n\n# x\n"


@pytest.mark.parametrize(
    ("files", "targets"),
    [
        ({}, ()),
        ({"CLAUDE.md": ""}, ("claude",)),
        ({".claude/CLAUDE.md": ""}, ("claude",)),
        ({"AGENTS.md": "", "GEMINI.md": ""}, ("codex", "gemini")),
        ({".github/workflows/ci.yml": ""}, ()),
        ({COPILOT: ""}, ("copilot",)),
        ({".github/instructions/a.md": ""}, ("copilot-rules",)),
        ({".claude/rules/a.md": "", ".devin/rules/a.md": "", ".roorules": ""}, ("claude-rules", "devin", "roo")),
        ({".cursorrules": "", ".windsurfrules": ""}, ("cursor", "windsurf")),
        ({".cursor/rules": None, ".windsurf/rules": None}, ("cursor", "windsurf")),
        ({".clinerules/a.md": ""}, ("cline",)),
        ({".clinerules": "plain file"}, ()),
        ({".agent/rules": None}, ("antigravity",)),
        ({".agents/skills": None}, ()),
        # Folders say less than files.
        ({".claude/settings.json": "", ".gemini": None, ".cursor": None, ".windsurf": None, ".codex": None}, ()),
        ({".claude/settings.json": "", "AGENTS.md": ""}, ("codex",)),
        # The same text is not to arrive twice.
        ({"CLAUDE.md": "@AGENTS.md\n", "AGENTS.md": "x"}, ("codex",)),
        ({"CLAUDE.md": "# Claude\n\nSee @./AGENTS.md.\n"}, ("codex",)),
        ({".claude/CLAUDE.md": "@../AGENTS.md", "GEMINI.md": "x"}, ("codex", "gemini")),
        ({"GEMINI.md": "@./AGENTS.md", "AGENTS.md": "x"}, ("codex",)),
        ({"AGENTS.md": "This is @AGENTS.md."}, ("codex",)),
        ({"CLAUDE.md": "`@AGENTS.md` me@AGENTS.md @AGENTS.mdx @docs/AGENTS.md"}, ("claude-rules",)),
        ({"CLAUDE.md": f"x\n{BEGIN.decode()}\n@AGENTS.md\n{END.decode()}\n", "AGENTS.md": "x"}, ("claude", "codex")),
        ({"CLAUDE.md": link_to("AGENTS.md"), "AGENTS.md": "x"}, ("codex",)),
        ({"CLAUDE.md": "x", "AGENTS.md": link_to("CLAUDE.md")}, ("claude-rules",)),
        ({"CLAUDE.md": link_to("docs.md"), "docs.md": "x"}, ("claude-rules",)),
        ({"CLAUDE.md": link_to("a.md"), "AGENTS.md": link_to("a.md"), "a.md": "x"}, ("claude-rules", "codex")),
        # A file of the user's is not touched where the agent reads another.
        ({"CLAUDE.md": "x", "AGENTS.md": "x", "GEMINI.md": "x"}, ("claude-rules", "codex", "gemini")),
        ({".claude/CLAUDE.md": "x", ".claude/rules/a.md": "x", COPILOT: "x"}, ("claude-rules", "copilot-rules")),
        # Orchestra's own text means its target, whatever of the user's is beside it.
        ({"CLAUDE.md": block().decode(), COPILOT: block().decode()}, ("claude", "copilot")),
        ({"CLAUDE.md": f"x\n{block().decode()}", COPILOT: f"{block().decode()}\nx"}, ("claude", "copilot")),
        ({"CLAUDE.md": block().decode(), ".claude/CLAUDE.md": "x", ".cursor/rules/a.mdc": "x"}, ("claude",)),
        ({"CLAUDE.md": f"@AGENTS.md\n{block().decode()}", "AGENTS.md": block().decode()}, ("claude", "codex")),
        ({"CLAUDE.md": block().decode(), ".claude/rules/orchestra.md": OWN}, ("claude", "claude-rules")),
        ({"CLAUDE.md": "x", "AGENTS.md": block().decode(), CURSOR: OWN}, ("claude-rules", "codex", "cursor")),
        ({"AGENTS.md": block().decode(), "CLAUDE.md": link_to("AGENTS.md"), ".roorules": "x"}, ("codex",)),
        ({"CLAUDE.md": f"x\n{BEGIN.decode()}\n", ".roorules": "x"}, ("claude-rules", "roo")),
        # No new file is to hide one of the user's.
        ({".junie/guidelines.md": "x", "AGENTS.md": "x"}, ("codex",)),
        ({".junie/AGENTS.md": "x", "AGENTS.md": "x"}, ("codex", "junie")),
        ({".junie/guidelines.md": "x"}, ("junie",)),
    ],
)
def test_the_targets_are_the_agents_whose_files_are_there(home: Home, files: Any, targets: tuple[str, ...]) -> None:
    put_files(home.code, files)
    root = str(home.code)
    texts, written = orchestra.read_own_texts(root), orchestra.find_written(root)
    assert orchestra.find_targets(root, texts, written) == targets


@pytest.mark.parametrize(
    ("files", "targets", "more"),
    [
        # A file of Orchestra's own is not made only to say nothing.
        ({"AGENTS.md": SPEAKING, ".cursorrules": "x", "GEMINI.md": ""}, ("codex", "gemini"), ()),
        ({".claude/CLAUDE.md": SPEAKING, ".cursorrules": "x"}, ("claude-rules",), ()),
        ({"AGENTS.md": "x", ".cursorrules": "x"}, ("codex", "cursor"), ()),
        ({"AGENTS.md": SPEAKING, CURSOR: OWN}, ("codex", "cursor"), ("cursor",)),
        # The folders of agents add to the default.
        ({}, (), ()),
        ({".gemini": None}, (), ("gemini",)),
        ({".claude": None, ".cursor/mcp.json": "", ".windsurf": None}, (), ("cursor", "windsurf")),
        ({".gemini": "a file"}, (), ()),
    ],
)
def test_a_draft_has_targets_and_what_is_taken_where_it_has_none(
    home: Home, files: Any, targets: tuple[str, ...], more: tuple[str, ...]
) -> None:
    put_files(home.code, files)
    draft = orchestra.make_draft(str(home.code), orchestra.Detected("backend", ""))
    assert (draft.targets, draft.defaults) == (targets, ("claude", "codex", *more))


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({".ruler/AGENTS.md": "x"}, [".ruler/"]),
        ({"AGENTS.md": "<!-- Source: .ruler/AGENTS.md -->\nx"}, ["AGENTS.md"]),
        ({"CLAUDE.md": "<!-- GENERATED FILE -->", "GEMINI.md": "Generated by rulesync"}, ["CLAUDE.md", "GEMINI.md"]),
        ({"AGENTS.md": "<!-- do not edit directly -->"}, ["AGENTS.md"]),
        ({"AGENTS.md": "x\n" * 1000 + "generated by y", "CLAUDE.md": "Do not edit generated files."}, []),
        ({"AGENTS.md": block("<!-- generated by x -->").decode()}, []),
        ({"AGENTS.md": "Parts of `release.yml` are generated by cargo-dist."}, []),
    ],
)
def test_other_tools_that_write_the_same_files_are_told(home: Home, files: Any, told: list[str]) -> None:
    put_files(home.code, files)
    notes = orchestra.find_other_tools(str(home.code), orchestra.read_own_texts(str(home.code)))
    assert [note.split()[0] for note in notes] == told


# ══ III Sync ══════════════════════════════════════════════════════════════════

# ── 22 Text ───────────────────────────────────────────────────────────────────


def outside_fences(text: str) -> str:
    """Drop the fenced code; a fence within a list item ends with the item."""
    lines, fence, in_item = [], "", False
    for line in text.split("\n"):
        if in_item and line and not line.startswith("  "):
            fence = ""
        mark = re.match(r"(- )? *(`{3,}(?!.*`)|~{3,})", line)
        if fence:
            fence = "" if mark and mark[2].startswith(fence) and line.strip() == mark[2] else fence
        elif mark:
            fence, in_item = mark[2], line.startswith(("- ", "  "))
        else:
            lines.append(line)
    assert fence == "" or in_item, "a fence is left open"
    return "\n".join(lines)


def bare_at_words(text: str) -> list[str]:
    """Find the @words that Markdown puts neither into a code span nor into a fence: an agent would import them."""
    found = []
    for paragraph in re.split(r"\n[ >]*\n|\n(?=\s*[-#>])", outside_fences(text)):
        prose = re.sub(r"(?s)(?<![`\\])(?:\\\\)*(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", paragraph)
        found += re.findall(r"(?<!\w)@[\w./~]\S*", prose)
    return found


def test_the_helper_finds_bare_at_words() -> None:
    assert bare_at_words("a @b `@c` ``d ` @e`` \n```\n@f\n```\n- `g\n- @h`") == ["@b", "@h`"]


@pytest.mark.parametrize("text", HOSTILE)
def test_all_eight_targets_are_valid_whatever_the_registry_holds(text: str) -> None:
    files = orchestra.render_files(hostile_codebase(text))
    assert sorted(files) == sorted(agent.path for agent in orchestra.AGENTS.values())
    for path, data in files.items():
        agent = AGENTS_BY_PATH[path]
        assert b"\r" not in data and not data.startswith(b"\xef\xbb\xbf")
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff]", data.decode())
        assert not re.search(rb"(?m)^ *- ?\n\n +\S", data), "what follows is in no list item"
        if agent.owned:
            assert re.search(rb"[^\n]\n\Z", data)
            assert BEGIN not in data and END not in data
            assert data.count(b"<!--") == data.count(b"-->") == 1
        else:
            assert re.match(BEGIN + b"\n\n<!-- Written by .*-->\n\n# ", data) and data.endswith(b"\n\n" + END)
            assert data.count(b"<!--") == data.count(b"-->") == 3
        assert re.search(rb"\A(---\n(?s:.*?)\n---\n\n|%b\n\n|)<!-- Written by Orchestra" % BEGIN, data)


UNCLOSED = "~~~\n@in/fence never closed"


@pytest.mark.parametrize("text", [*HOSTILE, "@README.md`x", "`two\nlines @README.md`", "a \\` b @README.md", UNCLOSED])
def test_no_text_imports_a_file_or_leaves_a_fence_open(text: str) -> None:
    assert bare_at_words(orchestra.render_body(hostile_codebase(text))) == []


def test_code_in_a_whole_fence_stays_as_it_is() -> None:
    body = orchestra.render_body(codebase_with(notes=("```sh\nmake @all `date`\n```",)))
    assert "- ```sh\n  make @all `date`\n  ```\n" in body


@pytest.mark.parametrize("text", [UNCLOSED, "intro\n```sh\n@in", "````\n```", "~~~\n~~~~\n~~~ x"])
def test_what_a_text_opens_it_closes(text: str) -> None:
    for values in ({"description": text}, {"notes": (text, "@next")}, {"conventions": (text,)}):
        assert bare_at_words(orchestra.render_body(codebase_with(**values))) == []


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_neither_ends_the_block_nor_makes_the_next_sync_write(home: Home, text: str) -> None:
    text = text.replace("\ud800", "?")
    tasks = [{"id": "T-1", "title": text, "description": text}]
    home.make_codebase(
        *("shop/api", {"CLAUDE.md": "mine\n", "AGENTS.md": "mine too"}),
        description=text,
        targets=ALL_TARGETS,
        conventions=[text],
        commands={"run": text},
        projects=[{"name": "a", "project_type": "ml", "tasks": tasks}],
    )
    home.sync()
    before = tree(home.folder)
    assert home.sync().lines == []
    assert tree(home.folder) == before
    assert home.status_of() == "current"


HEAD = """\
# api

Orders.

Built with: make.
"""

BODY = """\
## Commands

- build: `make`
- both:

  ```
  make
  make test
  ```

## Conventions

- Money is cents
- Two
  lines

## Tasks

- T-1 (in progress): Ship

  With care

- T-2 (to do): Rest

## Skills

- sql: Postgres 16
- git

## Agents

- reviewer: `AGENT/reviewer.md` (skills: rust, go)
- idle

## Notes

- see `@README.md`
"""


def test_a_full_codebase_reads_well() -> None:
    tasks = (
        orchestra.Task("T-1", "Ship", "inprogress", "With care"),
        orchestra.Task("T-0", "Begun", "done"),
        orchestra.Task("T-2", "Rest"),
    )
    roles = (orchestra.AgentRole("reviewer", "AGENT/reviewer.md", ("rust", "go")), orchestra.AgentRole("idle"))
    codebase = codebase_with(
        description="Orders.\n\nBuilt with: make.\n",
        commands=(("build", "make"), ("both", "make\nmake test\n")),
        conventions=("Money is cents", "Two\nlines"),
        notes=("see @README.md",),
        skills=(orchestra.Skill("sql", "Postgres 16"), orchestra.Skill("git")),
        projects=(orchestra.Component("api", "backend", tasks, roles),),
    )
    assert orchestra.render_head(codebase) == HEAD
    assert orchestra.render_body(codebase) == BODY
    assert orchestra.render_files(codebase)["AGENTS.md"].decode() == sealed_block(f"{HEAD}\n{BODY}")


def sealed_block(text: str) -> str:
    """Make the block that holds a text, as the issue tracker's example has it."""
    digits = hashlib.sha256(b" ".join(text.encode().split())).hexdigest()[:8]
    banner = f"<!-- Written by Orchestra ({digits}); edits are lost: use `orchestra edit`. -->"
    assert len(banner) <= 80
    return f"<!-- orchestra:begin -->\n\n{banner}\n\n{text}\n<!-- orchestra:end -->"


@pytest.mark.parametrize(
    ("parts", "stack", "is_said_beside_the_users_text"),
    [
        ([], "", False),
        ([("api", "backend")], "", False),
        ([("api", "frontend")], "- api: frontend\n", False),
        ([("server", "backend")], "- server: backend\n", True),
        ([("api", "backend"), ("web", "frontend")], "- api: backend\n- web: frontend\n", True),
        ([("api", "backend"), ("api", "backend")], "- api: backend\n- api: backend\n", True),
    ],
)
def test_the_stack_is_told_where_it_says_more_than_that_this_is_a_backend(
    parts: Any, stack: str, is_said_beside_the_users_text: bool
) -> None:
    codebase = codebase_with(projects=tuple(orchestra.Component(*part) for part in parts))
    head, body = orchestra.render_head(codebase), orchestra.render_body(codebase)
    told = f"## Stack\n\n{stack}" if stack else ""
    assert (head, body) == (
        ("# api\n", told) if is_said_beside_the_users_text or not told else (f"# api\n\n{told}", "")
    )


@pytest.mark.parametrize(
    ("beside", "importing", "notes", "text"),
    [
        ((), (), ("n",), "# api\n\nOrders.\n\n## Notes\n\n- n\n"),
        ((), (), (), "# api\n\nOrders.\n"),
        (("CLAUDE.md",), (), ("n",), "## Notes\n\n- n\n"),
        (("CLAUDE.md",), (), (), ""),
        ((), ("CLAUDE.md",), ("n",), "## Notes\n\n- n\n\n@AGENTS.md\n"),
        ((), ("CLAUDE.md",), (), "@AGENTS.md\n"),
    ],
)
def test_a_block_has_no_head_beside_the_users_text_and_none_that_says_nothing_is_written(
    beside: Any, importing: Any, notes: Any, text: str
) -> None:
    files = orchestra.render_files(codebase_with(description="Orders.", notes=notes), beside, importing)
    assert files["CLAUDE.md"].decode() == (sealed_block(text) if text else "")
    assert files["AGENTS.md"].startswith(b"<!-- orchestra:begin -->\n") and b"# api\n\nOrders.\n" in files["AGENTS.md"]


def test_rendering_twice_gives_the_same_bytes() -> None:
    assert orchestra.render_files(hostile_codebase("x")) == orchestra.render_files(hostile_codebase("x"))


@pytest.mark.parametrize(
    ("target", "fits", "told"),
    [
        ("claude", b"x\n" * 200, "201 lines; Anthropic recommends at most 200"),
        ("codex", b"x" * 32768, "32769 bytes; Codex reads at most 32768"),
        ("windsurf", "ä".encode() * 12000, "12001 characters; Windsurf reads at most 12000"),
        ("antigravity", "ä".encode() * 12000, "12001 characters; Antigravity documents at most 12000"),
        ("gemini", b"x\n" * 100_000, ""),
    ],
)
def test_only_an_excess_is_reported(target: str, fits: bytes, told: str) -> None:
    agent = orchestra.AGENTS[target]
    assert orchestra.describe_size(agent, fits, only_excess=True) == ""
    assert orchestra.describe_size(agent, fits + (b"x\n" if target == "claude" else b"x"), only_excess=True) == told


def test_a_text_over_its_budget_is_written_with_a_note(home: Home) -> None:
    home.make_codebase("shop/api", notes=["x" * 40_000], targets=["codex"])
    ran = home.sync()
    assert ran.lines == ["create   shop/api AGENTS.md"]
    assert re.search(r"(?m)^note: shop/api: AGENTS.md: \d+ bytes; Codex reads at most 32768$", ran.err)


@pytest.mark.parametrize("text", [*HOSTILE, "", "a", " a", "a ", "a  b", "naïve", "x -- y", "a_b*c*", "#1", "- a"])
def test_what_counts_as_plain_would_be_left_as_it_is(text: str, monkeypatch: Any) -> None:
    quick = [orchestra.one_line(text), orchestra.many_lines(text), orchestra.code_span(text)]
    monkeypatch.setattr(orchestra, "is_plain", lambda text: False)
    assert quick == [orchestra.one_line(text), orchestra.many_lines(text), orchestra.code_span(text)]


# What takes a backtick for itself where Markdown is read from left to right: escapes, tags, links with a title, spans.
TAKERS = re.compile(
    r"""\\[!-/:-@\[-`{-~]|<[A-Za-z/!?][^<>]*>|\]\([^\s)]*\s(?:"[^"]*"|'[^']*')\)|(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)""",
    re.S,
)


def words_read_as_imports(item: str) -> list[str]:
    """Read a list item as CommonMark does, with tables, and give the @words that are prose."""
    found = []
    definition = r"\A(?:- )?\[[^\]]*(?<!\\)\]: \S+ (?:'[^']*'|\"[^\"]*\")"
    for paragraph in (re.sub(definition, "", part) for part in re.split(r"\n\s*\n", outside_fences(item))):
        is_html = re.match(r"(?:- |\s)*<[a-zA-Z/!?]", paragraph)
        is_table = re.search(r"(?m)^[-\s|:]*-[-\s|:]*\|[-\s|:]*$", paragraph)
        pieces = re.split(r"(?<!\\)\||\n", paragraph) if is_table else [paragraph]
        for piece in pieces:
            found += re.findall(r"(?<!\w)@\S+", piece if is_html else TAKERS.sub("", piece))
    return found


def test_the_helper_reads_as_markdown_does() -> None:
    read = words_read_as_imports
    assert read("- `@a` @b ``@c ` ``") == ["@b"] and read("- | ` | @a ` |\n  |---|---|") == ["@a"]
    assert read('- <a b="`"> @a <c d="`">') == ["@a"] and read('- [a](/u "`") @a `') == ["@a"]
    assert read("- <div>\n  `@a`\n  </div>") == ["@a`"] and read("- \\`@a`") == ["@a`"]
    assert read("- [a]: /u '`' @a `") == ["@a"]


# fmt: off
SEEMS_TO_BE_CODE = (
    "| ` | @x.md ` |\n|---|---|", "a ` | @x.md ` b\n-|-", '[a](/u "`") b ` @x.md', '[a]: /u "`" ` @x.md `',
    "\\@x.md `a`", '<a b="`"> @x.md <c d="`">', 'a <b c="`"> @x.md <d e="`">', "\\`@x.md`",
    "```\n\t```\n```\n@x.md\n```", "- ```\n@x.md\n```", "<div>\n`@x.md`\n</div>", '<a\nb="`"> @x.md `',
    '[a](u "@x.md"),b @y.md @z.md', "```\n ```\n@x.md\n```", "``` a b\n```\n@x.md\n```", "```\n\t```\n@x.md\n```",
    "~~~\n~~~~\n@x.md\n~~~", "`@x.md\\` @y.md`", "@(x.md) @y.md", '@"x.md" @y.md', "`\n@x.md\n`", "<!-- ` --> @x.md `",
    "- ```\n  x\n```\n@x.md\n```",
)
# fmt: on


@pytest.mark.parametrize("text", SEEMS_TO_BE_CODE)
def test_what_only_seems_to_be_code_protects_no_at_word(text: str) -> None:
    for safe in (orchestra.many_lines(text), orchestra.one_line(text)):
        assert words_read_as_imports(f"- {safe}") == [], safe


ONE_TEXT_AND_THE_NEXT = [
    *(("a `", "`@x.md` b"), ('a <b c="', '`"> @x.md `'), ('<a b="', '`"> @x.md `')),
    *(('[a](/u "', '`") @x.md `'), ("[a]", "/u '`' @x.md `")),
]


@pytest.mark.parametrize(("one", "other"), ONE_TEXT_AND_THE_NEXT)
def test_what_one_text_leaves_open_takes_nothing_of_the_next(one: str, other: str) -> None:
    line = orchestra._render_skill(orchestra.Skill(one, other))
    assert words_read_as_imports(line) == [], line


def test_code_that_is_code_stays_code() -> None:
    for text in (
        "`@in/span` x",
        "use `Vec<T>` and `a|b`, see @x",
        "```c++\n@x <T>\n```\nVec<T> <b>@y</b>",
        "[d](https://x.org) `@x`",
        "`a[0]: @x` and a[1]: b",
    ):
        safe = orchestra.many_lines(text)
        assert safe.replace("\n  ", "\n").replace("`@y`", "@y").replace("see `@x`", "see @x") == text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a\u202eb", "U+202E RIGHT-TO-LEFT OVERRIDE"),
        ("a\u2066b\u2069", "U+2066 LEFT-TO-RIGHT ISOLATE, U+2069 POP DIRECTIONAL ISOLATE"),
        ("a\u200bb", "U+200B ZERO WIDTH SPACE"),
        ("soft\xadhyphen", "U+00AD SOFT HYPHEN"),
        ("x\U000e0041\U000e007f", "U+E0041 TAG LATIN CAPITAL LETTER A, U+E007F CANCEL TAG"),
        ("a\u200db", "U+200D ZERO WIDTH JOINER"),
        (
            "a\u2060\u2061\u2062\u2063",
            "U+2060 WORD JOINER, U+2061 FUNCTION APPLICATION, U+2062 INVISIBLE TIMES and 1 more",
        ),
        ("a\ufe00\ufe01", "U+FE00 VARIATION SELECTOR-1"),
        ("\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \u2764\ufe0f\u200d\U0001f525", ""),
        ("\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", ""),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645, \u0915\u094d\u200d\u0937", ""),
        ("caf\xe9, \u65e5\u672c, a\xa0b", ""),
    ],
)
def test_hidden_characters_are_reported_with_their_file(home: Home, text: str, told: str) -> None:
    home.make_codebase("shop/api", {"CLAUDE.md": "the user's own \u200b\n"}, targets=["claude", "cline"], notes=[text])
    notes = [f"{path}: contains invisible characters: {told}" for path in ("CLAUDE.md", CLINE)] if told else []
    assert home.sync().err.splitlines() == [f"note: shop/api: {note}" for note in notes]
    assert home.staleness()["detail"] == "; ".join(notes)


# ── 23 Blocks ─────────────────────────────────────────────────────────────────


# Linear in the length of their text


# Each function is checked twice: its steps in Python are counted for a text and for one
# twice as long; and the patterns it uses, whose steps cannot be counted, are searched
# for signs of super-linear matching. The processor's time is a net below both.


def repeated(piece: str, front: str = "", end: str = "") -> Callable[[int], str]:
    return lambda size: front + piece * (size // len(piece)) + end


def growing(piece: str, end: str) -> Callable[[int], str]:
    """Make runs of a piece, each longer by one: no two of them can be a pair."""
    return lambda size: "".join(piece * i + end for i in range(1, math.isqrt(2 * size // len(piece))))


# fmt: off
PIECES = (
    "\n", " ", "\t", " \n", "\r\n", "\\", '"', "'", "`", "` ", "`` ` ", "```\n", "~~~\n", "~~~~\n~~~\n", "```a b\n",
    " ```\n", "- ```\n", "- ", "- a\n", "> ", "* * ", "1. ", "#", "<", "<a ", '<a b="', "<!--", "-->", "@", "@a ",
    "@.", "\\@", "@(", "](", "[a](", "]:", "|", "| a ", "|-", "|-\n", "*a ", "_a", "__", "<!-- orchestra:",
    "<!-- orchestra:begin -->", "<!-- orchestra:end -->\n", "<!--\torchestra:end -->\n", "<<<<<<< a\n",
    ">>>>>>> a\n", "<<<<<<< a\n=======\n>>>>>>> a\n", "\u202e", "\u200d", "\ufe0f", "a\x1b", "[project]\n",
    "```\n<!-- orchestra:begin -->\n", "<!-- orchestra:begin -->\n\n<!-- Written by Orchestra (12345678); x -->\n",
    "dependencies = [\n",
)
# fmt: on
ADVERSARIAL = [
    *map(repeated, PIECES),
    repeated("  ```\n<!-- orchestra:begin -->\n  x\n", "- a\n"),
    repeated("\n", "<!-- orchestra:begin -->"),
    repeated("\\", '[project]\ndescription = "'),
    repeated('\\"', '[project]\ndescription = "'),
    repeated("description = '\n", "[project]\n"),
    repeated("\n", "dependencies = [", "x"),
    repeated('"\\"', "dependencies = ["),
    repeated('\\"', 'dependencies = ["'),
    growing("`", " "),
    growing("`", "\n"),
    growing("  ", "- x\n"),
    lambda size: "  " * 100 + growing("- ", "x\n")(size),
]


def of_bytes(function: Callable[[bytes], Any]) -> Callable[[str], Any]:
    """Take text for a function of bytes; a SyncError is as good as a result."""

    def call(text: str) -> None:
        with contextlib.suppress(orchestra.SyncError):
            function(text.encode("utf-8", "replace"))

    return call


def or_value_error(function: Callable[[str], Any]) -> Callable[[str], Any]:
    """Take a ValueError of a function for a result."""

    def call(text: str) -> None:
        with contextlib.suppress(ValueError):
            function(text)

    return call


def sealed_with(text: bytes) -> bytes:
    return BEGIN + b"\n\n" + orchestra.BANNER.format(seal="0" * 8).encode() + b"\n" + text + END


CODEX = orchestra.AGENTS["codex"]
TEXT_FUNCTIONS: dict[str, Callable[[str], Any]] = {
    "tidy": orchestra.tidy,
    "Toml": or_value_error(lambda text: orchestra.Toml(text).read()),
    "read_ini": orchestra.read_ini,
    "strip_comments": orchestra.strip_comments,
    "shorten_version": orchestra.shorten_version,
    "first_sentence": lambda text: orchestra.Readme(text, "shop").first_sentence(),
    "Scripts": lambda text: list(
        orchestra.Scripts("x", "x {}", {"test": text, "a": text, "lint": "run-s " + text}).find()
    ),
    "Script.rewrites": lambda text: orchestra.Script("a", {"a": text}).rewrites,
    "count_commands": orchestra.count_commands,
    "count_commands, fenced": lambda text: orchestra.count_commands(f"```\n{text}"),
    "defuse": orchestra.defuse,
    "one_line": orchestra.one_line,
    "many_lines": orchestra.many_lines,
    "many_lines, with an @word": lambda text: orchestra.many_lines(text + " @a"),
    "paragraphs": lambda text: orchestra.paragraphs(f"a{text}b"),
    "code_span": orchestra.code_span,
    "code_block": lambda text: orchestra.code_block(text, "  "),
    "visible": orchestra.visible,
    "describe_hidden": orchestra.describe_hidden,
    "show_hidden": orchestra.show_hidden,
    "render_files": lambda text: orchestra.render_files(codebase_with(description=text, notes=(text, "@a"))),
    "find_block": of_bytes(orchestra.find_block),
    "find_open_block": of_bytes(orchestra.find_open_block),
    "find_conflict": of_bytes(orchestra.find_conflict),
    "read_prose": of_bytes(lambda data: read_prose("/h", data)),
    "managed_text, owned": of_bytes(lambda data: orchestra.managed_text(orchestra.AGENTS["cline"], data)),
    "managed_text, shared": of_bytes(lambda data: orchestra.managed_text(CODEX, sealed_with(b"") + b"\n" + data)),
    "remove_managed_text": of_bytes(
        lambda data: orchestra.remove_managed_text(CODEX, file_of(data + b"\n\n" + block()), "\n\n")
    ),
    "digest_of": of_bytes(orchestra.digest_of),
    "is_reformatted": of_bytes(lambda data: orchestra.is_reformatted(data, data.replace(b"*", b"_"))),
    "is_sealed": of_bytes(lambda data: orchestra.is_sealed(CODEX, sealed_with(data))),
    "_lines_of": of_bytes(orchestra._lines_of),
}
text_functions = pytest.mark.parametrize("name", TEXT_FUNCTIONS)


def count_steps(function: Callable[[str], Any], text: str) -> int:
    """Count the lines of Python that are run."""
    steps = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal steps
        steps += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(text)
    finally:
        sys.settrace(before)
    return steps


@text_functions
def test_a_text_twice_as_long_takes_no_more_than_twice_the_steps(name: str) -> None:
    function = TEXT_FUNCTIONS[name]
    for shape in ADVERSARIAL:
        once, twice = shape(400), shape(800)
        for text in (once, twice):
            function(text + "x")  # compiles its patterns
        assert count_steps(function, twice + "y") < 2.3 * count_steps(function, once + "y") + 200


def time_of(function: Callable[[str], Any], text: str) -> float:
    started = time.process_time()
    function(text)
    return time.process_time() - started


@text_functions
def test_a_long_text_takes_no_time(name: str) -> None:
    function = TEXT_FUNCTIONS[name]
    for shape in ADVERSARIAL:
        short, long = (shape(size) for size in (3_000, 24_000))
        if time_of(function, long) > 0.2:  # of 8 times the length, a quadratic function would take 64 times as long
            assert min(time_of(function, long) for _ in range(3)) < 40 * max(time_of(function, short), 0.001)


def test_a_long_line_of_markers_is_not_looked_back_on_from_each_of_them() -> None:
    find = TEXT_FUNCTIONS["find_block"]
    short, long = (" <!-- orchestra:begin --> x" * count for count in (20_000, 160_000))
    took = time_of(find, long)
    assert took < 0.3 or took < 40 * time_of(find, short)


def patterns_in_source() -> dict[str, int]:
    """Find the patterns that are given to re, and the lines where they stand; what an f-string puts in is an x."""
    constants = {
        node.targets[0].id: node.value
        for node in MODULE.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }

    def text_of(node: Any) -> str:
        if isinstance(node, ast.Name):
            node = constants.get(node.id)
        if isinstance(node, ast.JoinedStr):
            return "".join("x" if isinstance(part, ast.FormattedValue) else text_of(part) for part in node.values)
        if isinstance(node, ast.BinOp):
            return text_of(node.left) + text_of(node.right)
        value = getattr(node, "value", "")
        return value.decode("latin-1") if isinstance(value, bytes) else value if isinstance(value, str) else ""

    calls = [
        node
        for node in ast.walk(MODULE)
        if isinstance(node, ast.Call) and dotted(node.func).startswith("re.") and dotted(node.func) != "re.escape"
    ]
    return {text_of(node.args[0]): node.lineno for node in calls if text_of(node.args[0])}


try:
    from re import _parser as sre_parse  # type: ignore[attr-defined]
except ImportError:  # before Python 3.11
    import sre_parse  # type: ignore[no-redef]
SAMPLE = [chr(code) for code in (*range(256), 0x2028, 0x3042)]
CATEGORIES = {
    "CATEGORY_DIGIT": str.isdigit,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda char: char.isalnum() or char == "_",
}


def chars_of(op: Any, arg: Any) -> set[str]:
    """Return the characters of a sample that a node for one character matches."""
    name = str(op)
    if name == "LITERAL":
        return {chr(arg)}
    if name == "RANGE":
        return {char for char in SAMPLE if arg[0] <= ord(char) <= arg[1]}
    if name == "CATEGORY":
        category = str(arg)
        wanted = {char for char in SAMPLE if CATEGORIES[category.replace("_NOT_", "_")](char)}
        return set(SAMPLE) - wanted if "_NOT_" in category else wanted
    if name == "NOT_LITERAL":
        return set(SAMPLE) - {chr(arg)}
    if name == "ANY":
        return set(SAMPLE) - {"\n"}
    assert name == "IN", name
    found = set().union(*(chars_of(*item) for item in arg if str(item[0]) != "NEGATE"))
    return set(SAMPLE) - found if str(arg[0][0]) == "NEGATE" else found


def faults_of_pattern(pattern: str) -> list[str]:
    """List what may make a pattern take more than linear time: repeats within repeats, or beside similar ones."""
    faults: list[str] = []

    def walk(nodes: Any, is_repeated: bool, before: list[set[str]]) -> tuple[set[str], list[set[str]], bool]:
        """Return a sequence's characters, the repeats open at its end, and whether it may be empty."""
        chars, is_empty = set(), True
        for op, arg in nodes:
            name = str(op)
            if name in ("AT", "ASSERT", "ASSERT_NOT", "GROUPREF"):
                if name.startswith("ASSERT"):
                    walk(arg[1], False, [])
                elif is_by_line and str(arg) == "AT_BEGINNING":
                    before = [{"\n"}]  # a search begins again at each of many line ends
                continue
            if name in ("MAX_REPEAT", "MIN_REPEAT"):
                is_endless = arg[1] == sre_parse.MAXREPEAT
                if is_endless and is_repeated:
                    faults.append("a repeat in a repeat")
                inside, within, _ = walk(arg[2], is_repeated or is_endless, before)
                if is_endless and any(inside & other for other in before):
                    faults.append("two repeats of the same characters side by side")
                before = [*(before if arg[0] == 0 else []), *within, *([inside] if is_endless else [])]
                optional = arg[0] == 0
            elif name == "SUBPATTERN":
                inside, before, optional = walk(arg[-1], is_repeated, before)
            elif name == "BRANCH":
                found = [walk(branch, is_repeated, before) for branch in arg[1]]
                inside = set().union(*(one for one, _, _ in found))
                before = [chars for _, open_, _ in found for chars in open_]
                optional = any(empty for _, _, empty in found)
            else:
                inside, before, optional = chars_of(op, arg), [], False
            chars |= inside
            is_empty = is_empty and optional
        return chars, before, is_empty

    tree = sre_parse.parse(pattern)
    is_by_line = bool(tree.state.flags & re.MULTILINE)
    walk(tree, False, [])
    return faults


@pytest.mark.parametrize(
    ("pattern", "is_fine"),
    [
        (r"a*b", True),
        (r"[^a]*a", True),
        (r"(?:[^\"\\]|\\.)*", True),
        (r"\s*=\s*\[", True),
        (r"a*a*", False),
        (r"\s*(?:[-*+])?\s*x", False),
        (r"(?:a+)+b", False),
        (r"(?:a*b)*c", False),
        (r"(\w+)(?:|x)\d*!", False),
        (r"(?:\n.*?)?\s*", False),
        (r"(?m)^[ \t]*a", True),
        (r"(?m)^\s*a", False),
    ],
)
def test_the_helper_tells_patterns_apart(pattern: str, is_fine: bool) -> None:
    assert (faults_of_pattern(pattern) == []) is is_fine


def example_of(pattern: str) -> str:
    """Make a text that a pattern matches, each of its repeats once."""

    def walk(nodes: Any) -> Iterator[str]:
        for op, arg in nodes:
            name = str(op)
            if name in ("MAX_REPEAT", "MIN_REPEAT"):
                yield from list(walk(arg[2])) * max(1, arg[0])
            elif name in ("SUBPATTERN", "BRANCH"):
                yield from walk(arg[-1] if name == "SUBPATTERN" else arg[1][0])
            elif name != "AT" and not name.startswith("ASSERT"):
                yield min(chars_of(op, arg), key=lambda char: (not char.isalnum(), char))

    return "".join(walk(sre_parse.parse(pattern, re.M)))


def test_no_evidence_takes_more_than_linear_time() -> None:
    evidence = [
        text for system in orchestra.ECOSYSTEMS for text in (system.sign, *(row.evidence for row in system.rows))
    ]
    parts = (part.partition(" ~ ")[2] for text in evidence for part in re.split(r" (?:\+|or) ", text))
    patterns = dict.fromkeys(filter(None, parts))
    assert len(patterns) > 50
    for pattern in patterns:
        example = example_of(pattern)
        for end in range(1, len(example) + 1):
            for piece in (example[:end], example[:end] + "\n"):
                text = piece * (30_000 // len(piece))
                took = min(time_of(lambda text, p=pattern: re.search(p, text, re.M), text) for _ in range(2))  # type: ignore[misc]
                assert took < 0.2, (pattern, piece)


def test_no_pattern_takes_more_than_linear_time() -> None:
    patterns = patterns_in_source()
    assert len(patterns) > 30
    faults = {pattern: faults_of_pattern(pattern) for pattern in patterns}
    # Except the one for the path of the running Python.
    assert [pattern for pattern, found in faults.items() if found and "/Cellar/" not in pattern] == []


# What formatters and git do to a block


SAME_DIGEST = [
    (b"a\nb\n", b"\n\na\n\n\nb"),
    (b"a\nb", b"a  \nb\t"),
    (b"a\nb", b"a\r\nb\r\n"),
    (b"- a\n* b\n1. c", b"-   a\n*\tb\n1.  c"),
    (b"  - a", b"  -   a"),
]
OTHER_DIGEST = [
    *((b"a\nb", b"a\nc"), (b"a\nb", b"a b"), (b"a b", b"a  b"), (b"- a", b"  - a")),
    *((b"- a", b"-a"), (b"  x", b"x"), (b"*a*", b"_a_")),
]


def test_white_space_that_formatters_change_is_no_edit() -> None:
    for one, other in SAME_DIGEST:
        assert orchestra.digest_of(one) == orchestra.digest_of(other), (one, other)
    for one, other in OTHER_DIGEST:
        assert orchestra.digest_of(one) != orchestra.digest_of(other), (one, other)


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        (b"*a* __b__", b"_a_ **b**", True),
        (b"- a\n* b\n  + c", b"- a\n\n- b\n    - c", True),
        (b"1. a\n2. b", b"1. a\n1. b", True),
        (b"- a_b\\*", b"- a\\_b\\*", True),
        (b"a | b\n|---|:-:|\n| 1 | 2 |", b"| a   |  b  |\n| --- | :-: |\n| 1   |  2  |", True),
        (b"~~~sh\nx\n~~~", b"```sh\nx\n```", True),
        (b"- ---", b"- ***", True),
        (b"one two three", b"one two\nthree", True),
        (b"&lt;a>", b"\\<a>", True),
        (b"- a", b"- b", False),
        (b"a_b", b"a*b", False),
        (b"1. a", b"- a", False),
        (b"> a", b"a", False),
        (b"make -j", b"make j", False),
    ],
)
def test_what_formatters_choose_is_left_as_they_chose(one: bytes, other: bytes, is_same: bool) -> None:
    assert orchestra.is_reformatted(one, other) is is_same


RICH = [
    "*em* _em_ **strong** __strong__ ***both*** 2*3*4 a_b_c _lead *lone star_ and *.py,*.md, src/**/*.ts",
    "a list:\n* a\n* b\n    * nested\n+ c",
    "1. one\n2. two\n10. ten",
    "- a\n- b\n    - c\n      more",
    "-   wide\n-   gaps",
    "`code` ``a ` b`` `a_b*c`",
    "```sh\nmake  *x*\n\n  indented\n```",
    "~~~\nx\n~~~",
    "a table:\n\n| a | b |\n|---|:-:|\n| 1 | `x` |",
    "word " * 60,
    '<https://x.org> [l](https://x.org "t") ![i](a.png) <b>x</b>',
    "# heading\n\ntext",
    "C:\\new \\d+ \\* [x] & < > $x$ ~a~ #tag <!-- comment -->",
    "one  \nbreak",
    "1) first\n2) second",
]


def rich_values() -> dict[str, Any]:
    tasks = [{"id": f"T-{i}", "title": text.split("\n")[0], "description": text} for i, text in enumerate(RICH)]
    return {
        "description": "Orders *and* payments.\n\nThe second __paragraph__.",
        "commands": {"build": "make *x*", "both": "make\nmake test"},
        "conventions": RICH,
        "skills": [{"id": "a_b", "description": text} for text in RICH if "\n" not in text],
        "projects": [{"name": "api", "project_type": "ml", "tasks": tasks}],
    }


@pytest.mark.parametrize("command", ["prettier --write", "prettier --write --prose-wrap always", "mdformat"])
@pytest.mark.parametrize("values", [{"notes": ["plain", "another"]}, rich_values()], ids=["plain", "rich"])
@pytest.mark.parametrize("original", [None, "# Mine\n\n```\ncode\n```\n"])
def test_a_formatter_leaves_nothing_to_sync(home: Home, command: str, values: Any, original: Optional[str]) -> None:
    if not shutil.which(command.split(maxsplit=1)[0]):
        pytest.skip(f"needs {command.split(maxsplit=1)[0]} on PATH")
    root = home.make_synced("shop/api", {"AGENTS.md": original} if original else {}, targets=["codex"], **values)
    synced = (root / "AGENTS.md").read_bytes()
    subprocess.run([*command.split(), "AGENTS.md"], cwd=root, check=True, capture_output=True)
    formatted = contents(root)
    if values.keys() == {"notes"} and not original:
        assert formatted == {"AGENTS.md": synced}
    assert home.status_of() == "current"
    assert home.sync().lines == []
    assert (contents(root), home.backups()) == (formatted, {})


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.replace(b"\n", b"\n\n"),
        lambda d: d.replace(b"- x", b"* x"),
        lambda d: d.replace(b"- x", b" - x"),  # has its seal still
    ],
)
@pytest.mark.parametrize("path", ["CLAUDE.md", CLINE])
def test_a_reformatted_text_is_current_until_the_registry_changes(home: Home, change: Any, path: str) -> None:
    root = home.make_synced("shop/api", targets=["claude", "cline"], notes=["x"])
    changed = change((root / path).read_bytes())
    (root / path).write_bytes(changed)
    assert (home.status_of(), home.sync().lines) == ("current", [])
    assert ((root / path).read_bytes(), home.backups()) == (changed, {})
    home.register("shop/api", targets=["claude", "cline"], notes=["y"])
    is_known = b"\n- x" in changed
    assert f"{'update  ' if is_known else 'replace '} shop/api {path}" in home.sync().lines
    assert home.backups() == ({} if is_known else {path: changed})


def old_text(begin: str = "", end: str = "") -> str:
    """Return a text as versions before 0.2 wrote it."""
    return (
        f"{begin}# api\n\n> Generated by Orchestra from `~/.orchestra/projects/shop/api.yaml`. To change this text,"
        f" edit that file and run\n> `orchestra sync shop/api`; edits made here are replaced by the next sync.\n{end}"
    )


@pytest.mark.parametrize("source", [{"source": "of an older version"}, {}])  # the first ones had none
@pytest.mark.parametrize("edits", [False, True])
def test_what_an_older_version_wrote_is_known_and_an_edit_of_it_is_kept(
    home: Home, edits: bool, source: dict[str, str]
) -> None:
    texts = {
        "AGENTS.md": old_text("mine\n\n" + orchestra.BLOCK_BEGIN + "\n", orchestra.BLOCK_END + "\n").encode(),
        CLINE: old_text().replace("\n", "\r\n").encode(),
    }
    root = home.make_codebase("shop/api", texts, targets=["codex", "cline"])
    exact = {
        "AGENTS.md": hashlib.sha256(texts["AGENTS.md"][len(b"mine\n\n") : -1]).hexdigest(),
        CLINE: hashlib.sha256(old_text().encode()).hexdigest(),
    }
    record = {"synced_at": "2026-01-01T00:00:00Z", "files": exact, "earlier": {}, "joins": {"AGENTS.md": "\n"}}
    file = home.record
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({**record, "folders": [], **source}))
    if edits:
        texts = {path: edit(root / path, "# api", "# my api") for path in texts}
    assert home.status_of() == "stale"
    verb = "replace" if edits else "update"
    assert sorted(home.sync().lines) == [f"{verb:8} shop/api {CLINE}", f"{verb:8} shop/api AGENTS.md"]
    assert home.backups() == (texts if edits else {})
    assert home.sync().lines == []
    (root / "AGENTS.md").write_bytes(texts["AGENTS.md"])  # a git checkout brings it back
    assert home.sync().lines == [f"{verb:8} shop/api AGENTS.md"]


# Markers that do not count


@pytest.mark.parametrize("head", ["```\n", "- x\n  ```\n", "~~~\n", "```\n```\n````\n", "text\n"])
def test_a_block_below_an_open_fence_is_found_whatever_is_in_it(home: Home, head: str) -> None:
    values: dict[str, Any] = {"targets": ["codex"], "commands": {"a": "x\ny", "b": "x\ny", "c": "x\ny"}}
    root = home.make_codebase("shop/api", {"AGENTS.md": head}, **values)
    ran = home.sync()
    assert ran.lines == ["append   shop/api AGENTS.md"]
    line = {"```\n": 1, "~~~\n": 1, "```\n```\n````\n": 3}.get(head)
    assert (f"AGENTS.md: the code fence on line {line} is never closed" in ran.err) == bool(line)
    assert bool(ran.err) == bool(line)
    assert (home.status_of(), home.sync().lines) == ("current", [])
    home.register("shop/api", **values, notes=["new"])
    assert home.sync().lines == ["update   shop/api AGENTS.md"]
    home.run_fine("project", "remove", "api", "--purge")
    assert (root / "AGENTS.md").read_text() == head


def test_an_example_in_a_fence_stays_and_the_block_goes_behind_it(home: Home) -> None:
    root = home.make_codebase("shop/api", {"AGENTS.md": FENCED}, targets=["codex"])
    assert home.sync().lines == ["append   shop/api AGENTS.md"]
    assert (root / "AGENTS.md").read_bytes().startswith(FENCED)
    assert home.sync().lines == []
    home.run_fine("project", "remove", "api", "--purge")
    assert (root / "AGENTS.md").read_bytes() == FENCED


LIKE_A_MARKER = [
    *("  <!-- orchestra:begin -->", "\t<!-- orchestra:begin -->", "<!--orchestra:begin-->", "<!-- ORCHESTRA:BEGIN -->"),
    *(
        "<!--  orchestra:begin -->",
        "<!-- orchestra: begin -->",
        "<!-- Orchestra:begin --> ",
        "<!-- oRchestra:begin -->",
    ),
]


@pytest.mark.parametrize("marker", LIKE_A_MARKER)
@pytest.mark.parametrize("is_end", [False, True])
def test_what_looks_like_a_marker_is_an_error_but_in_a_fence(home: Home, marker: str, is_end: bool) -> None:
    if is_end:
        marker = marker.replace("begin", "end").replace("BEGIN", "END")
    text = f"mine\n\n{marker}\nx\n"
    root = home.make_codebase("shop/api", {"AGENTS.md": text}, targets=["codex"])
    ran = home.run("sync", "--all")
    right = orchestra.BLOCK_END if is_end else orchestra.BLOCK_BEGIN
    assert ran.status == 2
    assert ran.err.startswith(f"orchestra: shop/api: AGENTS.md: expected {right} at the very start of line 3, got '")
    assert contents(root) == {"AGENTS.md": text.encode()} and home.status_of() == "error"
    (root / "AGENTS.md").write_text(f"```\n{text}```\n")
    assert home.sync().lines == ["append   shop/api AGENTS.md"]


# Unfinished merges

OURS, BOTH, THEIRS = "<<<<<<< HEAD\n", "=======\n", ">>>>>>> other\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("mine\n{begin}\n# api\n" + OURS + "a\n" + BOTH + "b\n" + THEIRS + "{end}\n", 4),
        (OURS + "{begin}\nx\n{end}\n" + BOTH + "{begin}\ny\n{end}\n" + THEIRS, 1),
        (OURS + BOTH + "{begin}\ny\n{end}\n" + THEIRS, 1),
        (OURS + "a\n{begin}\n" + BOTH + "b\n" + THEIRS + "x\n{end}\n", 1),
        ("{begin}\nx\n" + OURS + "{end}\na\n" + BOTH + THEIRS, 3),
        ("{begin}\nx\n" + THEIRS + "{end}\n", 3),
        ("{begin}\nx\n||||||| base\n{end}\n", 3),
        ("{begin}\r\n<<<<<<<\r\nx\r\n{end}\r\n", 2),
        (OURS + "a\n" + BOTH + "b\n" + THEIRS + "{begin}\nx\n{end}\n", 0),
        ("{begin}\nx\n{end}\n" + OURS + "a\n" + BOTH + "b\n" + THEIRS, 0),
        (OURS + "a\n" + BOTH + "b\n" + THEIRS, 0),
        ("{begin}\nTitle\n" + BOTH + "{end}\n", 0),
        ("{begin}\n  " + OURS + "<<<<<<<x\n{end}\n", 0),
    ],
)
def test_an_unfinished_merge_is_an_error_where_it_touches_the_block(home: Home, text: str, line: int) -> None:
    data = text.format(begin=orchestra.BLOCK_BEGIN, end=orchestra.BLOCK_END).encode()
    root = home.make_codebase("shop/api", {"AGENTS.md": data}, targets=["codex"])
    ran = home.run("sync", "--all")
    if not line:
        assert ran.status == 0 and len(ran.lines) == 1
        return
    assert ran.complaints == [
        f"orchestra: shop/api: AGENTS.md: found git's conflict markers on line {line}: finish the merge first"
    ]
    assert (ran.status, home.status_of(), contents(root)) == (2, "error", {"AGENTS.md": data})


def test_an_owned_file_in_an_unfinished_merge_is_left_and_no_text_looks_like_one(home: Home) -> None:
    texts = [OURS + "x\n" + BOTH + "y\n||||||| base\n" + THEIRS, "x\n" + THEIRS, "x\n||||||| base\n"]
    root = home.make_codebase("shop/api", targets=["codex", "cline"])
    for text in texts:
        home.register("shop/api", targets=["codex", "cline"], description=text, notes=[text])
        home.sync()
        assert home.sync().lines == []
    data = (root / CLINE).read_bytes()
    for merge in (OURS, THEIRS):
        (root / CLINE).write_bytes(data + merge.encode())
        ran = home.run("sync", "--all")
        line = data.count(b"\n") + 1
        assert ran.complaints == [
            f"orchestra: shop/api: {CLINE}: found git's conflict markers on line {line}: finish the merge first"
        ]
        assert (root / CLINE).read_bytes() == data + merge.encode()


# Files that users have before Orchestra comes.
ORIGINALS = {
    "one line": b"# Mine\n",
    "many lines": b"# Mine\n\ntext\n",
    "no final newline": b"# Mine",
    "CRLF": b"# Mine\r\ntext\r\n",
    "CRLF, no final newline": b"# Mine\r\ntext",
    "mixed line ends": b"# Mine\r\nand\nothers\n",
    "old Mac": b"# Mine\rtext\r",
    "empty": b"",
    "one newline": b"\n",
    "blank lines at the end": b"# Mine\n\n\n",
    "blanks": b"   ",
    "BOM": b"\xef\xbb\xbf# Mine\n",
    "BOM, CRLF": b"\xef\xbb\xbf# Mine\r\n",
    "not English": "# Mün 日本\u2028\x85\n".encode(),
    "mentions the markers": b"See `<!-- orchestra:begin -->` and\nthe <!-- orchestra:end -->\n",
}
ONLY_BOM = b"\xef\xbb\xbf"
originals = pytest.mark.parametrize("original", [pytest.param(data, id=name) for name, data in ORIGINALS.items()])


@originals
def test_a_block_is_appended_and_everything_before_it_stays(home: Home, original: bytes) -> None:
    root = home.make_codebase("shop/api", {"AGENTS.md": original}, targets=["codex"])
    assert home.sync().lines == ["append   shop/api AGENTS.md"]
    data = (root / "AGENTS.md").read_bytes()
    newline = b"\r\n" if original.find(b"\r\n") == original.find(b"\n") - 1 >= 0 else b"\n"
    assert data.startswith(original) and data.endswith(newline + END + newline)
    assert home.backups() == {}


@originals
def test_bytes_outside_the_block_survive_repeated_syncs(home: Home, original: bytes) -> None:
    root = home.make_codebase("shop/api", targets=["codex"])
    file = root / "AGENTS.md"
    file.write_bytes(original)
    home.sync()
    head, tail = file.read_bytes().split(BEGIN)[0], b"\n\nbehind it\r\nmixed \xc3\xa4"
    file.write_bytes(file.read_bytes() + tail)
    after = file.read_bytes().split(END)[-1]
    for number in range(4):
        home.register("shop/api", targets=["codex"], notes=[f"version {number}"])
        assert home.sync().lines == ["update   shop/api AGENTS.md"]
        data = file.read_bytes()
        assert data.startswith(head) and data.endswith(after) and f"version {number}".encode() in data
        assert data.count(BEGIN) == data.count(END) == 1 + original.count(BEGIN)
    assert home.backups() == {}


@originals
@pytest.mark.parametrize("how", ["purge", "drop"])
def test_taking_the_block_out_restores_the_original_bytes(home: Home, original: bytes, how: str) -> None:
    root = home.make_synced("shop/api", {"AGENTS.md": original})
    home.register("shop/api", notes=["another version"])
    home.sync()
    if how == "purge":
        home.run_fine("project", "remove", "api", "--purge")
    else:
        home.register("shop/api", targets=[])
        home.sync()
    assert contents(root) == {"AGENTS.md": original}


def test_a_block_right_behind_a_bom_is_found(home: Home) -> None:
    home.make_synced("shop/api", {"AGENTS.md": ONLY_BOM}, targets=["codex"])
    assert home.sync().lines == []


@pytest.mark.parametrize(
    ("targets", "files"), [(None, ["CLAUDE.md", "AGENTS.md"]), ((), []), (("gemini", "gemini"), ["GEMINI.md"])]
)
def test_only_the_chosen_targets_are_rendered(targets: Any, files: list[str]) -> None:
    assert list(orchestra.render_files(codebase_with(targets=targets))) == files


# ── 24 Records ────────────────────────────────────────────────────────────────


def test_a_lost_record_proves_nothing_so_what_differs_is_backed_up(home: Home) -> None:
    root = home.make_codebase("shop/api", targets=["cline"])
    for broken in ("", "{", "[]", '{"files": []}', "null", "[" * 100_000, '{"synced_at": 1, "files": {}}'):
        home.sync()
        old = edit(root / CLINE, "# api", f"# api {len(broken)}")
        home.record.write_text(broken)
        assert home.status_of() == "never_synced"
        home.sync()
        assert home.backups()[".clinerules/orchestra.md"] == old


def test_a_wrong_hash_in_the_record_heals(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["codex"])
    record = home.record
    values = json.loads(record.read_text())
    record.write_text(json.dumps({**values, "files": {"AGENTS.md": "0" * 64}}))
    before = tree(root)
    home.sync()
    assert (tree(root), home.status_of(), json.loads(record.read_text())["files"]) == (
        before,
        "current",
        values["files"],
    )


@pytest.mark.parametrize("values", [{"folders": ["\ud800"]}, {"joins": {"AGENTS.md": "\ud800"}}])
def test_a_record_that_orchestra_cannot_have_written_counts_as_none(home: Home, values: dict[str, Any]) -> None:
    home.make_synced("shop/api", {"AGENTS.md": "mine"}, targets=["codex"])
    record = home.record
    record.write_text(json.dumps({**json.loads(record.read_text()), **values}))
    assert home.sync().err == ""
    assert home.run_fine("project", "remove", "api", "--purge").err == ""


def test_an_older_text_brought_back_by_git_is_updated_without_a_backup(home: Home) -> None:
    root = home.make_codebase("shop/api", targets=["claude"])
    texts = []
    for number in range(4):
        home.register("shop/api", targets=["claude"], notes=[f"version {number}"])
        home.sync()
        texts.append((root / "CLAUDE.md").read_bytes())
    for text in texts[:-1]:
        (root / "CLAUDE.md").write_bytes(text)
        assert home.status_of() == "stale"
        assert home.sync().lines == ["update   shop/api CLAUDE.md"]
    assert home.backups() == {}


def test_an_older_text_is_remembered_only_so_far(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["claude"])
    first = (root / "CLAUDE.md").read_bytes()
    for number in range(orchestra.MAX_EARLIER + 1):
        home.register("shop/api", targets=["claude"], notes=[f"version {number}"])
        home.sync()
    (root / "CLAUDE.md").write_bytes(first)
    home.sync()
    assert home.backups() == {"CLAUDE.md": first}


def test_the_record_names_what_was_written_and_when(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["cline"])
    record = json.loads(home.record.read_text())
    digest = orchestra.digest_of((root / CLINE).read_bytes())
    assert record["files"] == {".clinerules/orchestra.md": digest}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["synced_at"])


def rename_codebase(home: Home, old: str, new: str) -> None:
    """Rename a codebase, or a whole project, as a person does: the file or folder, then the names within."""
    projects = home.projects
    if "/" in old:
        (projects / f"{old}.yaml").rename(projects / f"{new}.yaml")
        old, new = old.split("/")[1], new.split("/")[1]
        files = [projects / "shop" / f"{new}.yaml"]
    else:
        (projects / old).rename(projects / new)
        files = [projects / new / "project.yaml"]
    for file in files:
        file.write_text(re.sub(f"(?m)^name: {old}$", f"name: {new}", file.read_text()))


@pytest.mark.parametrize(
    ("old", "new", "label"), [("shop/api", "shop/api2", "shop/api2"), ("shop", "store", "store/api")]
)
def test_a_renamed_codebase_keeps_its_record_and_its_backups(home: Home, old: str, new: str, label: str) -> None:
    home.write_registry("shop/project.yaml", "name: shop\n")
    root = home.make_synced(targets=["claude", "cline", "gemini"])
    mine = edit(root / CLINE, "api", "mine")
    home.sync()
    kept = home.backups()
    assert kept == {CLINE: mine}
    edit(root / "GEMINI.md", BEGIN.decode(), "mine\n" + BEGIN.decode())
    rename_codebase(home, old, new)
    dry = home.run("sync", "--all", "--dry-run")
    assert home.backups() == kept and home.staleness(label)["last_sync_at"]
    lines = home.sync().lines
    assert lines == dry.lines and {line.split()[0] for line in lines} <= {"update"}  # its own text is no edit
    assert home.backups(label) == kept and home.backups() == {}
    assert not home.record.exists()
    home.write_registry(f"{label}.yaml", {"name": label.split("/")[1], "path": str(root), "targets": []})
    home.sync()
    assert contents(root) == {"GEMINI.md": b"mine\n"}


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_an_adoption_that_was_cut_short_is_finished(home: Home, monkeypatch: Any, moves: int) -> None:
    root = home.make_synced(targets=["claude"])
    put_files(backups_folder(home), {"20260101T000000.000000Z/CLAUDE.md": "older"})
    mine = edit(root / "CLAUDE.md", "api", "mine")
    home.sync()
    rename_codebase(home, "shop/api", "shop/api2")
    real, done = orchestra.move_private, []

    def move_some(path: str, new: str) -> None:
        if len(done) == moves:
            raise orchestra.IoError(path, OSError(errno.EIO, "Input/output error"))
        real(path, new)
        done.append(new)

    monkeypatch.setattr(orchestra, "move_private", move_some)
    assert home.run("sync", "--all").status == 2
    monkeypatch.undo()
    assert home.sync().lines == ["update   shop/api2 CLAUDE.md"]
    kept = orchestra.Backups(home.path, ("shop", "api2")).versions()
    assert [Path(backup.file).read_bytes() for backup in kept] == [b"older", mine]


FORMERS = [
    ("renamed", True),
    ("among others of no use", True),
    ("reached by a link", True),
    ("the newer of two", True),
    ("the newer under two paths", True),
    ("still registered, but broken", False),
    ("of another folder", False),
    ("still being synced", False),
    ("damaged", False),
    ("not needed", False),
]


@pytest.mark.parametrize(("case", "is_taken"), FORMERS)
def test_only_the_record_of_the_same_folder_under_an_unregistered_name_is_adopted(
    home: Home, case: str, is_taken: bool
) -> None:
    root = path = home.make_codebase(targets=["claude"])
    home.sync()
    record = home.record
    data = record.read_bytes()
    older = data.replace(b'"synced_at":"2', b'"synced_at":"1')
    os.unlink(orchestra.codebase_path(home.path, API))
    if case == "reached by a link":
        path = home.code / "link"
        path.symlink_to(root)
    elif case == "the newer of two":
        put_files(record.parent, {"zzz.json": older})
    elif case == "the newer under two paths":
        (home.code / "link").symlink_to(root)
        put_files(record.parent, {"zzz.json": older.replace(str(root).encode(), f"{home.code}/link".encode())})
    elif case == "among others of no use":
        odd = {
            "file": "",
            "shop/folder.json/x": "",
            "shop/none.json": "{}",
            "shop/old.json": data.replace(b"root", b"x"),
        }
        put_files(record.parent.parent, odd)
    elif case == "still registered, but broken":
        home.write_registry("shop/api.yaml", "{")
    elif case == "of another folder":
        path = Path(shutil.copytree(root, home.code / "copy"))
    elif case == "damaged":
        record.write_bytes(data[:-9])
    elif case == "not needed":
        put_files(record.parent, {"web.json": older})
    home.register("shop/web", path=str(path), targets=["claude"])
    lock = orchestra.try_lock(orchestra.codebase_lock_path(home.path, API)) if case == "still being synced" else None
    home.sync("web")
    assert record.exists() != is_taken
    if lock is not None:
        os.close(lock)


def test_a_home_that_was_moved_finds_its_codebases_again(home: Home) -> None:
    root = Path(home.path, "code/api")
    root.mkdir(parents=True)
    home.run_fine("init", str(root), "-p", "shop", "--sync")
    home.move("moved")
    assert home.sync().out == "0 written, 2 unchanged in 1 codebase\n"
    assert json.loads(home.run_fine("project", "list", "--json").out)[0]["path"] == f"{home.path}/code/api"


def test_looking_for_renamed_codebases_reads_each_record_once(home: Home, monkeypatch: Any) -> None:
    for i in range(30):
        home.make_codebase(f"old/c{i}", targets=["claude"])
    home.sync()
    shutil.rmtree(home.projects / "old")
    reads: collections.Counter[orchestra.Key] = collections.Counter()
    real = orchestra.load_record
    monkeypatch.setattr(orchestra, "load_record", lambda home, key: [reads.update([key]), real(home, key)][1])
    for i in range(30):
        home.make_codebase(f"new/c{i}", targets=["claude"])
    home.sync()
    assert {reads["old", f"c{i}"] for i in range(30)} == {1}


def test_a_copy_of_the_home_folder_is_on_its_own(home: Home) -> None:
    code = Path(home.path, "code/api")
    put_files(code, {"code.py": ""})
    home.register("shop/api", path="~/code/api", targets=["claude"])
    home.sync()
    other = home.folder / "copy"
    shutil.copytree(home.path, other)
    before = tree(code)
    assert orchestra.main(["sync", "--all"], {"HOME": str(other)}) == 0
    assert tree(code) == before and (other / "code/api/CLAUDE.md").exists()


@pytest.mark.parametrize("path", ["../outside.md", ".git/x.md", "code.py", "a/../code.py", "CMakeLists.txt"])
def test_a_record_never_leads_to_a_file_that_cannot_be_orchestras(home: Home, path: str) -> None:
    root = home.make_synced("shop/api", {"a/x": ""}, targets=["codex"])
    put_files(root, {path: "kestrel\n"})
    values = json.loads(home.record.read_bytes())
    values["files"][path], values["owned"] = orchestra.digest_of(b"kestrel\n"), [path]
    home.record.write_text(json.dumps(values))
    assert home.sync().lines == [] and (root / path).read_bytes() == b"kestrel\n"
    home.run_fine("project", "remove", "api", "--purge")
    assert (root / path).read_bytes() == b"kestrel\n"


# ── 25 Plan ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("disk", "known", "wanted", "purge", "action"),
    [
        *((None, known, None, purge, "keep") for known in ([], ["old"]) for purge in (False, True)),
        *(("new", known, "new", False, "keep") for known in ([], ["old"])),
        *((None, known, "new", False, "create") for known in ([], ["new"])),
        *((disk, ["old", "older"], "new", False, "update") for disk in ("old", "older")),
        *(("edited", known, "new", False, "replace") for known in ([], ["old"])),
        *((disk, ["old", "older"], None, disk == "older", "remove") for disk in ("old", "older")),
        *(("edited", ["old"], None, purge, "evict" if purge else "release") for purge in (False, True)),
    ],
)
def test_three_hashes_decide(disk: Any, known: list[str], wanted: Any, purge: bool, action: str) -> None:
    assert orchestra.decide(disk, known, wanted, purge) == action


@pytest.mark.parametrize("target", ["AGENTS.md", "../../outside.md", "nowhere", "CLAUDE.md"])
def test_a_symlinked_managed_file_is_skipped_with_a_note(home: Home, target: str) -> None:
    put_files(home.code, {"outside.md": "mine"})
    root = home.make_codebase("shop/api", {"CLAUDE.md": link_to(target)})
    ran = home.sync()
    assert ran.lines == ["create   shop/api AGENTS.md"]
    assert f"note: shop/api: CLAUDE.md: skipped: it is a symbolic link to {target}\n" in ran.err
    assert os.readlink(root / "CLAUDE.md") == target
    assert home.status_of() == "current"
    is_served = target == "AGENTS.md"  # by the block there
    assert (home.staleness()["detail"] == "", "link" not in home.run("doctor").out) == (is_served, is_served)
    home.run_fine("project", "remove", "api", "--purge")
    assert os.readlink(root / "CLAUDE.md") == target and os.listdir(root) == ["CLAUDE.md"]
    assert (home.code / "outside.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("path", "data", "is_link"),
    [
        ("CLAUDE.md", "AGENTS.md", True),
        ("CLAUDE.md", "./AGENTS.md", True),
        (".github/copilot-instructions.md", "../AGENTS.md", True),
        (".clinerules/orchestra.md", "../AGENTS.md", True),
        ("CLAUDE.md", "AGENTS.md\n", False),
        ("CLAUDE.md", "nowhere.md", False),
        ("CLAUDE.md", "See AGENTS.md", False),
        ("CLAUDE.md", "", False),
    ],
)
def test_a_link_that_git_wrote_as_text_is_skipped_with_a_note(home: Home, path: str, data: str, is_link: bool) -> None:
    target = next(agent.target for agent in orchestra.AGENTS.values() if agent.path == path)
    root = home.make_codebase("shop/api", {"AGENTS.md": "mine\n", path: data}, targets=[target])
    os.utime(root / path, (1e9, 1e9))
    ran = home.sync()
    note = f"note: shop/api: {path}: skipped: git wrote it in place of a symbolic link to {data}\n"
    assert ((root / path).read_text() == data, ran.err == note) == (is_link, is_link)
    assert (note[len("note: shop/api: ") : -1] in home.staleness()["detail"]) == is_link


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
@pytest.mark.parametrize(
    ("patterns", "left_out"),
    [
        (None, []),
        (["src"], [COPILOT, CURSOR]),
        (["src", ".github"], [CURSOR]),
        (["--no-cone", "/*", "!/.github/"], [COPILOT]),
        (["--no-cone", "/src/", "*.mdc"], ["CLAUDE.md", COPILOT]),
    ],
)
def test_a_file_outside_a_sparse_checkout_is_not_made(home: Home, patterns: Any, left_out: list[str]) -> None:
    team = {COPILOT: "the team's\n", CURSOR: "the team's\n", "CLAUDE.md": "the team's\n", "src/code.py": ""}
    root = home.make_codebase("shop/api", team, targets=["claude", "copilot", "cursor"])
    for command in ("init -q", "add .", "commit -qm x"):
        run_git(root, *command.split())
    if patterns:
        run_git(root, "sparse-checkout", "set", *(patterns if patterns[0] == "--no-cone" else ["--cone", *patterns]))
    assert sorted(path for path in team if not (root / path).exists()) == sorted(left_out)
    ran = home.sync()
    assert sorted(path for path in team if not (root / path).exists()) == sorted(left_out)
    assert ran.err.count("skipped: it is outside git's sparse checkout") == len(left_out)
    assert home.status_of() == "current"


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
def test_a_sparse_worktree_has_its_settings_in_the_common_folder(home: Home) -> None:
    root = home.code / "repo"
    put_files(root, {COPILOT: "the team's\n", "src/code.py": ""})
    for command in ("init -q", "add .", "commit -qm x", "config core.sparseCheckout true"):
        run_git(root, *command.split())
    run_git(root, "worktree", "add", "-q", "--no-checkout", str(home.code / "shop/api"))
    put_files(root, {".git/worktrees/api/info/sparse-checkout": "/src/\n"})
    run_git(home.code / "shop/api", "read-tree", "-mu", "HEAD")
    home.register("shop/api", targets=["copilot"])
    assert home.sync().lines == [] and not (home.code / "shop/api" / COPILOT).exists()


@pytest.mark.parametrize("git", ["gitdir: a\0b", b"gitdir: \xff", "gitdir:", "[core]\nsparseCheckout = true"])
def test_an_odd_git_file_is_no_sparse_checkout(home: Home, git: Any) -> None:
    home.make_codebase("shop/api", {".git": git}, targets=["cursor"])
    assert home.sync().lines == [f"create   shop/api {CURSOR}"]


@pytest.mark.parametrize("targets", [["claude", "codex"], ALL_TARGETS])
def test_a_folder_that_was_synced_and_is_empty_now_is_not_written_to(home: Home, targets: list[str]) -> None:
    root = home.make_synced("shop/api", {"code.py": ""}, targets=targets)
    shutil.rmtree(root)
    root.mkdir()
    ran = home.run("sync", "--all")
    assert (ran.status, os.listdir(root)) == (2, [])
    assert "the folder is empty now, but was synced before: is its disk mounted?" in ran.complaints[0]
    assert home.status_of() == "error" and home.run("sync", "--check", "--all").status == 2
    hint = re.search(r"try: if it is meant to be empty: orchestra (.*)", ran.err)
    assert hint and home.run_fine(*shlex.split(hint[1])).lines
    assert (root / "CLAUDE.md").exists() and home.sync().lines == []


@pytest.mark.parametrize("is_old_gone", [False, True])
def test_another_folder_may_be_empty_and_an_emptied_one_that_has_other_files_is_written_to(
    home: Home, is_old_gone: bool
) -> None:
    root = home.make_synced("shop/api", {"code.py": ""}, targets=["claude"])
    (root / "CLAUDE.md").unlink()
    created = "create   shop/api CLAUDE.md"
    assert home.sync().lines == [created]
    if is_old_gone:
        shutil.rmtree(root)
    (home.code / "other").mkdir()
    home.register("shop/api", path=str(home.code / "other"), targets=["claude"])
    lines = home.sync().lines
    assert lines == [created] if is_old_gone else created in lines


@pytest.mark.parametrize("kind", ["moved", "copied", "left", "left and edited", "of another codebase now"])
def test_when_a_path_changes_the_old_folder_is_left_as_for_a_dropped_target(home: Home, kind: str) -> None:
    files = {"AGENTS.md": "mine\n", ".cursor/rules/mine.mdc": "mine", "code.py": ""}
    root, other = home.make_codebase("shop/api", files, targets=["claude", "codex", "cline"]), home.code / "other"
    home.sync()
    if kind == "moved":
        root.rename(other)
    elif kind == "copied":
        shutil.copytree(root, other)
    else:
        put_files(other, {"code.py": ""})
    if kind == "left and edited":
        edit(root / "CLAUDE.md", "- noted", "- mine")
    home.register("shop/api", path=str(other), targets=["claude", "codex", "cline"])
    if kind == "of another codebase now":
        home.register("shop/web", path=str(root), targets=["claude", "codex", "cline"])
    status, detail = home.status_of(), home.staleness()["detail"]
    check, diff = home.run("sync", "--check", "api"), home.run_fine("diff", "api").out
    ran = home.run_fine("sync", "api")
    left = sorted(contents(root)) if root.exists() else []
    if kind in ("moved", "copied"):
        assert [line for line in ran.lines if "other" not in line and str(root) not in line] == []
        assert contents(other).keys() >= {"CLAUDE.md", "AGENTS.md", CLINE}
    if kind in ("copied", "left", "left and edited"):
        assert left == sorted([*files, *["CLAUDE.md"] * (kind == "left and edited")])
        assert (root / "AGENTS.md").read_text() == "mine\n"
        assert f"remove       shop/api {root}/{CLINE}" in ran.out and check.status == 1
        assert f"remove block shop/api {root}/AGENTS.md" in ran.out
        assert f"--- a/{root}/{CLINE}" in diff
        assert not (root / ".clinerules").exists()
        if kind == "copied":
            assert (status, f"{root}/CLAUDE.md" in detail) == ("orphan", True)
    if kind == "left and edited":
        assert f"{root}/CLAUDE.md: you edited it, so it stays" in ran.err
    if kind == "of another codebase now":
        assert {"CLAUDE.md", CLINE} <= set(left)
    assert home.backups() == {}
    assert home.run_fine("sync", "api").lines == [] and home.status_of() == "current"


def test_the_text_in_a_copy_of_the_old_folder_is_known(home: Home) -> None:
    root = home.make_synced("shop/api", {"code.py": ""}, targets=["codex"])
    other = Path(shutil.copytree(root, home.code / "other"))
    home.register("shop/api", path=str(other), targets=["codex"], notes=["new"])
    assert "update   shop/api AGENTS.md" in home.sync().lines and home.backups() == {}


def test_codebases_that_swap_folders_get_each_others_text(home: Home) -> None:
    for name in ("api", "web"):
        home.make_codebase(f"shop/{name}", {"code.py": ""}, targets=["codex"])
    home.sync()
    for name, path in (("api", "web"), ("web", "api")):
        home.register(f"shop/{name}", path=str(home.code / "shop" / path), targets=["codex"])
    ran = home.sync()
    assert "skipped" not in ran.err
    for name, path in (("api", "web"), ("web", "api")):
        assert f"# {name}\n" in (home.code / "shop" / path / "AGENTS.md").read_text()
    assert home.sync().lines == []


@pytest.mark.parametrize("place", ["last", "above"])
def test_nothing_is_taken_out_of_a_folder_that_the_old_path_leads_to_by_a_link(home: Home, place: str) -> None:
    (home.code / "shop/x").mkdir(parents=True)
    root = home.make_codebase("shop/x/api", {"code.py": ""})
    os.unlink(orchestra.codebase_path(home.path, ("shop", "x/api")))
    home.register("shop/api", path=str(root), targets=["claude"])
    home.sync()
    shutil.copytree(home.code / "shop/x", home.code / "shop/clone")
    shutil.copytree(home.code / "shop/x", home.code / "shop/moved")
    shutil.rmtree(home.code / "shop/x")
    if place == "above":
        (home.code / "shop/x").symlink_to("clone")
    else:
        (home.code / "shop/x").mkdir()
        (home.code / "shop/x/api").symlink_to("../clone/api")
    home.register("shop/api", path=str(home.code / "shop/moved/api"), targets=["claude"])
    before = tree(home.code / "shop/clone")
    home.sync()
    assert tree(home.code / "shop/clone") == before


@pytest.mark.parametrize("inner", [".cursor/rules", "packages/web"])
def test_a_path_may_move_into_the_old_folder_and_out_of_it(home: Home, inner: str) -> None:
    root = home.make_synced("shop/api", {"code.py": ""}, targets=["claude", "cursor"])
    (root / inner).mkdir(parents=True, exist_ok=True)
    home.register("shop/api", path=str(root / inner), targets=["claude"])
    home.sync()
    assert (root / inner / "CLAUDE.md").exists() and not (root / "CLAUDE.md").exists()
    put_files(root, {".git/config": ""})
    home.register("shop/api", path=str(root), targets=["claude"])
    home.sync()
    assert (root / "CLAUDE.md").exists() and not (root / inner / "CLAUDE.md").exists()
    assert home.sync().lines == []


def test_a_file_that_the_old_folder_and_the_new_one_share_stays(home: Home) -> None:
    root = home.make_synced("shop/api", {"code.py": ""}, targets=["cursor"])
    put_files(home.code / "shop", {".git/config": "", ".cursor": link_to("api/.cursor")})
    home.register("shop/api", path=str(home.code / "shop"), targets=["cursor"])
    home.sync()
    assert (root / CURSOR).exists() and home.status_of() == "current"


def test_a_file_set_aside_in_the_folder_that_was_left_is_released_there(home: Home, monkeypatch: Any) -> None:
    root = home.make_synced("shop/api", {"code.py": ""}, targets=["claude"])
    kept = root / f".orchestra-kept-{DEAD}-aa-{'0' * 64}-CLAUDE.md.tmp"
    kept.write_text("u1x\n")
    hide_writers(monkeypatch)
    put_files(home.code / "other", {"code.py": ""})
    home.register("shop/api", path=str(home.code / "other"), targets=["claude"])
    assert sync_later(home, 0).has_files_aside and kept.exists()
    sync_later(home)
    assert not kept.exists() and home.backups()["CLAUDE.md"] == b"u1x\n"
    sync_later(home, 300)
    assert not sync_later(home, 300).has_files_aside


@pytest.mark.parametrize("path", ["GEMINI.md", CLINE])
def test_a_managed_file_that_is_too_large_is_an_error_for_it_alone(home: Home, path: str) -> None:
    target = "gemini" if path == "GEMINI.md" else "cline"
    root = home.make_codebase(
        "shop/api", {path: b"x" * (orchestra.MAX_MANAGED_FILE - 1000)}, targets=["claude", target]
    )
    assert home.run("sync", "--all").status == 0
    os.truncate(root / path, orchestra.MAX_MANAGED_FILE + 1)
    home.register("shop/api", targets=["claude", target], notes=["new"])
    ran = home.run("sync", "--all")
    assert ran.complaints == [f"orchestra: shop/api: {path}: expected at most 8 MiB, got more"]
    assert ran.lines == ["update   shop/api CLAUDE.md"]


def test_a_text_larger_than_a_managed_file_can_be_is_not_written(home: Home) -> None:
    pieces = {f"{i}.md": "x" * orchestra.MAX_REGISTRY_FILE for i in range(8)}
    put_files(home.projects, pieces)
    root = home.make_synced(targets=["claude"])
    before = tree(root)
    home.register(targets=["claude"], include=[*pieces])
    for _ in range(2):
        ran = home.run("sync", "--all")
        assert ran.status == 2 and tree(root) == before
        assert "CLAUDE.md: expected at most 8 MiB, got 8388" in ran.err and "show shop/api --origin" in ran.err
    home.register(targets=["claude"], include=["0.md"])
    home.sync()


@pytest.mark.parametrize("link", [".cursor", ".cursor/rules"])
@pytest.mark.parametrize("name", ["outside", "shop/api-outside"])
def test_a_folder_that_leads_out_of_the_codebase_is_refused(home: Home, link: str, name: str) -> None:
    outside = home.code / name
    outside.mkdir(parents=True)
    home.make_codebase("shop/api", {link: link_to(str(outside))}, targets=["claude", "cursor"])
    ran = home.run("sync", "--all")
    assert (ran.status, ran.lines) == (2, ["create   shop/api CLAUDE.md"])
    problem = f"expected a folder inside the codebase, got a link to {outside}"
    assert ran.complaints == [f"orchestra: shop/api: {CURSOR}: {problem}"]
    assert (os.listdir(outside), home.status_of()) == ([], "error")


def test_a_folder_linked_within_the_codebase_is_fine(home: Home) -> None:
    root = home.make_codebase(
        "shop/api", {"config/cursor": None, ".cursor": link_to("config/cursor")}, targets=["cursor"]
    )
    home.sync()
    assert (root / "config/cursor/rules/orchestra.mdc").exists()
    assert home.sync().lines == []


def test_one_file_under_two_managed_paths_is_written_once(home: Home) -> None:
    files = {".windsurf/rules": None, ".clinerules": link_to(".windsurf/rules")}
    home.make_codebase("shop/api", files, targets=["windsurf", "cline"])
    ran = home.sync()
    assert ran.lines == ["create   shop/api .windsurf/rules/orchestra.md"]
    assert f"{CLINE}: skipped: it is .windsurf/rules/orchestra.md by another name" in ran.err
    assert (home.status_of(), home.sync().lines) == ("current", [])


def test_a_codebase_reached_through_a_link_is_fine(home: Home) -> None:
    root = home.make_codebase("shop/real")
    os.unlink(orchestra.codebase_path(home.path, ("shop", "real")))
    (home.code / "link").symlink_to(root)
    home.register("shop/api", path=str(home.code / "link"), targets=["cursor"])
    home.sync()
    assert (root / ".cursor/rules/orchestra.mdc").exists()


def test_text_in_a_folder_that_changed_hands_is_still_this_registrys(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["claude"])
    home.make_codebase("shop/new", targets=["claude"])
    home.register("shop/new", path=str(root), targets=["claude"])
    home.register("shop/api", path=str(home.code / "shop/new"), targets=["claude"], notes=["another text"])
    ran = home.sync("--all")
    assert (ran.status, ran.out.splitlines()[-1]) == (0, "2 written, 0 unchanged in 2 codebases")
    assert orchestra.FOREIGN not in ran.err and home.sync("--all", "--check").status == 0


def test_a_dropped_target_is_an_orphan_and_removed(home: Home) -> None:
    root = home.make_synced("shop/api", {"AGENTS.md": "mine\n"}, targets=["claude", "codex", "cursor"])
    home.register("shop/api", targets=["claude"])
    assert home.staleness()["status"] == "orphan"
    assert set(home.staleness()["detail"].split(", ")) == {".cursor/rules/orchestra.mdc", "AGENTS.md"}
    lines = ["remove       shop/api .cursor/rules/orchestra.mdc", "remove block shop/api AGENTS.md"]
    assert home.run_fine("sync", "--dry-run", "--all").out.endswith(
        "\n0 to write, 2 to remove, 1 unchanged in 1 codebase\n"
    )
    ran = home.sync()
    assert sorted(ran.lines) == lines and ran.out.endswith("\n0 written, 2 removed, 1 unchanged in 1 codebase\n")
    assert sorted(contents(root)) == ["AGENTS.md", "CLAUDE.md"]
    assert (root / "AGENTS.md").read_bytes() == b"mine\n"
    assert not (root / ".cursor").exists()
    assert home.status_of() == "current"


def test_an_edited_orphan_is_released_and_stays(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["cursor", "codex"])
    edited = [edit(root / path, "# api", "# mine") for path in (".cursor/rules/orchestra.mdc", "AGENTS.md")]
    home.register("shop/api", targets=[])
    assert home.status_of() == "orphan"
    ran = home.sync()
    assert sorted(line.split()[0] for line in ran.lines) == ["release", "release"]
    assert "you edited it, so it stays; Orchestra no longer manages it" in ran.err
    assert [(root / path).read_bytes() for path in (".cursor/rules/orchestra.mdc", "AGENTS.md")] == edited
    assert home.sync().lines == [] and home.status_of() == "current"


@pytest.mark.parametrize(
    ("files", "targets", "imports"),
    [
        ({"AGENTS.md": "mine"}, ["claude", "codex"], True),
        ({"AGENTS.md": "mine"}, ["claude"], True),
        ({"AGENTS.md": "mine", "CLAUDE.md": "mine too"}, ["claude"], False),
        ({"AGENTS.md": "  \n"}, ["claude", "codex"], False),
        ({}, ["claude", "codex"], False),
        ({"AGENTS.md": link_to("docs.md"), "docs.md": "mine"}, ["claude"], False),
        ({"AGENTS.md": "mine", ".claude/CLAUDE.md": "mine too"}, ["claude"], False),
    ],
)
def test_claude_md_imports_an_agents_md_that_it_would_hide(home: Home, files: Any, targets: Any, imports: bool) -> None:
    root = home.make_synced("shop/api", files, targets=targets)
    assert (b"\n@AGENTS.md\n" in (root / "CLAUDE.md").read_bytes()) == imports
    assert home.sync().lines == []


@pytest.mark.parametrize(
    ("mine", "target", "told"),
    [
        (["CLAUDE.md"], "codex", ["OpenCode, Kilo, Pi, Zed and Codebuff will read it instead of your CLAUDE.md"]),
        (["AGENTS.md", "CLAUDE.md"], "copilot", ["Zed will read it instead of your AGENTS.md", "Zed will read it"]),
        (["AGENTS.md"], "junie", ["Junie will read it instead of your AGENTS.md: drop the target junie"]),
        (["AGENTS.md"], "copilot-rules", []),
        (["CLAUDE.md", "AGENTS.md"], "codex", []),  # it is there already
        ([], "codex", []),
    ],
)
def test_a_new_file_that_hides_the_users_own_from_an_agent_is_told_once(
    home: Home, mine: list[str], target: str, told: list[str]
) -> None:
    home.make_codebase("shop/api", dict.fromkeys(mine, "mine\n"), targets=[target])
    notes = home.sync().err.split("; ")
    assert len(notes) == max(1, len(told)) and all(text in note for text, note in zip(told, notes))
    assert ("~/.orchestra/projects/shop/api.md" in notes[0]) == (target == "codex" and bool(told))
    home.register("shop/api", targets=[target], notes=["changed"])
    assert home.sync().err == "" and home.status_of() == "current"


def test_so_is_one_of_a_part(home: Home) -> None:
    home.make_codebase("shop/api", {"packages/web/CLAUDE.md": "mine\n"})
    home.register(targets=["codex"], projects=[WEB_PART])
    note = home.sync().err
    assert "packages/web/AGENTS.md: OpenCode, Kilo" in note and "instead of your packages/web/CLAUDE.md: move " in note
    assert home.sync().err == ""


def test_the_import_comes_and_goes_with_the_users_text(home: Home) -> None:
    root = home.make_synced()
    agents = root / "AGENTS.md"
    agents.write_bytes(b"mine\n" + agents.read_bytes())
    assert home.sync().lines == ["update   shop/api CLAUDE.md", "update   shop/api AGENTS.md"]
    agents.write_bytes(agents.read_bytes()[len(b"mine\n") :])
    assert home.sync().lines == ["update   shop/api CLAUDE.md", "update   shop/api AGENTS.md"]
    assert home.backups() == {}


# Files where the user has said it all


@pytest.mark.parametrize(
    ("mine", "targets"),
    [
        (["AGENTS.md"], ["codex", "claude-rules", "cursor"]),
        (["AGENTS.md"], ["codex", "junie"]),
        (["CLAUDE.md", "AGENTS.md"], ["claude", "codex"]),
    ],
)
def test_no_file_is_made_where_the_users_own_says_it_all(home: Home, mine: list[str], targets: list[str]) -> None:
    root = home.make_codebase("shop/api", dict.fromkeys(mine, "mine\n"), targets=targets, notes=[])
    assert home.sync().lines == [] and home.status_of() == "current"
    assert contents(root) == dict.fromkeys(mine, b"mine\n")
    home.register("shop/api", targets=targets, notes=["something"])
    assert len(home.sync().lines) == len(targets) and home.status_of() == "current"
    home.register("shop/api", targets=targets, notes=[])
    assert len(home.sync().lines) == len(targets) and home.status_of() == "current"
    assert contents(root) == dict.fromkeys(mine, b"mine\n")


def test_a_block_comes_where_there_is_something_to_add_and_goes_with_it(home: Home) -> None:
    root = home.make_codebase("shop/api", {"AGENTS.md": "mine\n", "x": ""}, targets=["codex"], notes=[])
    file = root / "AGENTS.md"

    def say(*notes: str) -> None:
        home.register("shop/api", targets=["codex"], description="Orders.", notes=notes)

    steps: list[tuple[Callable[[], Any], list[str], bytes]] = [
        (lambda: None, [], b"mine\n"),
        (lambda: say("n"), ["append"], b"mine\n\n" + sealed_block("## Notes\n\n- n\n").encode() + b"\n"),
        (lambda: say(), ["remove"], b"mine\n"),
        (file.unlink, ["create"], sealed_block("# api\n\nOrders.\n").encode() + b"\n"),
        (lambda: file.write_bytes(b"me\n" + file.read_bytes()), ["remove"], b"me\n"),
        (
            lambda: file.write_bytes(BOM + b"\n"),
            ["append"],
            BOM + b"\n\n" + sealed_block("# api\n\nOrders.\n").encode(),
        ),
        (lambda: file.write_bytes(b"you\n"), [], b"you\n"),
    ]
    for act, verbs, data in steps:
        act()
        assert ("missing: AGENTS.md" in home.staleness()["detail"]) == (act == file.unlink)
        assert [line.split()[0] for line in home.sync().lines] == verbs
        assert file.read_bytes().rstrip(b"\n") == data.rstrip(b"\n")
        before = tree(home.folder)
        assert (home.sync().lines, home.status_of(), home.run_fine("diff", "api").out) == ([], "current", "")
        assert home.run("sync", "--all", "--check").status == 0 and tree(home.folder) == before
    assert home.backups() == {}
    home.run_fine("project", "remove", "api", "--purge")
    assert contents(root) == {"AGENTS.md": b"you\n", "x": b""}


@pytest.mark.parametrize("is_known", [True, False])
def test_an_edited_block_with_nothing_left_to_say_is_backed_up_and_an_old_one_is_not(
    home: Home, is_known: bool
) -> None:
    root = home.make_synced("shop/api", {"AGENTS.md": "mine\n"}, targets=["codex"])
    old = (root / "AGENTS.md").read_bytes()
    home.register("shop/api", targets=["codex"], notes=[])
    assert home.sync().lines == ["remove block shop/api AGENTS.md"]
    (root / "AGENTS.md").write_bytes(old if is_known else old.replace(b"noted", b"mine as well"))
    assert home.staleness()["detail"] == "block no longer needed: AGENTS.md"
    ran = home.sync("--all")
    assert ran.lines == ["remove block shop/api AGENTS.md"] and contents(root) == {"AGENTS.md": b"mine\n"}
    assert ("orchestra restore shop/api AGENTS.md" in ran.err) == (not is_known)
    assert b"mine as well" in home.backups().get("AGENTS.md", b"mine as well") and bool(home.backups()) != is_known
    if not is_known:
        home.run_fine("restore", "api")
        assert b"mine as well" in (root / "AGENTS.md").read_bytes()


def test_a_colleagues_block_stays_where_there_is_nothing_to_add(home: Home) -> None:
    root = home.make_synced("shop/api", {"AGENTS.md": "mine\n"}, targets=["codex"], notes=["one"])
    first = contents(root)
    other = other_home(home, targets=["codex"], notes=[])
    ran = other.sync("--all")
    assert ran.lines == [] and orchestra.FOREIGN in ran.err and contents(root) == first
    assert (other.status_of(), other.backups()) == ("stale", {})
    assert other.sync("api").lines == ["remove block shop/api AGENTS.md"]
    # Who appended it is not known, so its blank line is not either.
    assert contents(root) == {"AGENTS.md": b"mine\n\n"} and other.backups() == first


def test_an_empty_folder_is_refused_even_if_nothing_was_written_there(home: Home) -> None:
    root = home.make_synced("shop/api", {"AGENTS.md": "mine\n"}, targets=["codex"], notes=[])
    (root / "AGENTS.md").unlink()
    ran = home.run("sync", "--all")
    assert ran.status == 2 and "is its disk mounted?" in ran.err and os.listdir(root) == []


def test_a_block_of_an_older_version_is_replaced_without_a_word(home: Home) -> None:
    older = "# api\n\n## Stack\n\n- api: backend\n\n## Notes\n\n- noted\n"
    root = home.make_codebase("shop/api", {"AGENTS.md": f"mine\n\n{sealed_block(older)}\n"}, targets=["codex"])
    digest = orchestra.digest_of(sealed_block(older).encode())
    record = {"synced_at": "2026-10-01T00:00:00Z", "files": {"AGENTS.md": digest}, "earlier": {}, "folders": []}
    put_files(
        Path(home.path, ".orchestra/hashes/shop"),
        {"api.json": json.dumps({**record, "joins": {"AGENTS.md": "\n"}, "source": "older", "root": str(root)})},
    )
    assert home.sync() == Ran(0, "update   shop/api AGENTS.md\n1 written, 0 unchanged in 1 codebase\n", "")
    assert (root / "AGENTS.md").read_text() == f"mine\n\n{sealed_block('## Notes' + older.partition('## Notes')[2])}\n"
    assert (home.sync().lines, home.backups()) == ([], {})


def test_claude_md_says_nothing_twice_beside_the_users_other_one(home: Home) -> None:
    files = {".claude/CLAUDE.md": "mine\n"}
    root = home.make_synced("shop/api", files, targets=["claude"], notes=[])
    assert contents(root) == {".claude/CLAUDE.md": b"mine\n"} and home.status_of() == "current"
    home.make_synced("shop/api", targets=["claude"], notes=["n"])
    assert home.read() == f"{sealed_block(chr(10).join(['## Notes', '', '- n', '']))}\n"
    (root / ".claude/CLAUDE.md").unlink()
    assert home.sync().lines == ["update   shop/api CLAUDE.md"] and "# api\n" in home.read()
    put_files(root, files)
    home.make_synced("shop/api", targets=["claude"], notes=[])
    assert contents(root) == {".claude/CLAUDE.md": b"mine\n"} and home.backups() == {}


@pytest.mark.parametrize(("target", "other"), [("claude-rules", "claude"), ("copilot-rules", "copilot")])
def test_a_file_beside_the_users_own_is_made_only_to_say_something(home: Home, target: str, other: str) -> None:
    path, mine = (orchestra.AGENTS[name].path for name in (target, other))
    root = home.make_synced("shop/api", {mine: "mine\n", "x": ""}, targets=[target], notes=[])
    assert not (root / path).exists() and home.status_of() == "current"
    (root / path).parent.mkdir(parents=True)
    (root / path).write_text("mine too\n")
    assert (home.sync().lines, home.status_of()) == ([], "current")
    (root / path).unlink()
    home.register("shop/api", targets=[target], notes=["n"])
    assert home.sync().lines == [f"create   shop/api {path}"]
    assert b"## Notes" in (root / path).read_bytes() and b"# api\n" not in (root / path).read_bytes()
    home.register("shop/api", targets=[other], notes=["n"])
    assert sorted(line.split()[0] for line in home.sync().lines) == ["append", "remove"]
    home.register("shop/api", targets=[target], notes=["n"])
    assert sorted(line.split()[0] for line in home.sync().lines) == ["create", "remove"]
    assert (root / mine).read_bytes() == b"mine\n" and home.sync().lines == []
    home.register("shop/api", targets=[target], notes=[])
    assert home.sync().lines == [f"remove   shop/api {path}"] and home.sync().lines == []
    (root / mine).write_text("")
    assert home.sync().lines == [f"create   shop/api {path}"] and home.sync().lines == []
    home.register("shop/api", targets=[other, target], notes=[])
    assert len(home.sync().lines) == 1 and home.sync().lines == [] and home.backups() == {}


# Other registries


def other_home(home: Home, **values: Any) -> Home:
    """Make a colleague's home, with the same codebase in its registry."""
    other = Home(tempfile.mkdtemp(dir=home.folder))
    other.code = home.code
    other.register("shop/api", **values)
    return other


@pytest.mark.parametrize("path", ["AGENTS.md", CLINE, ".cursor/rules/orchestra.mdc"])
def test_two_registries_do_not_replace_each_others_text_in_turns(home: Home, path: str) -> None:
    target = AGENTS_BY_PATH[path].target
    root = home.make_codebase("shop/api", targets=[target], notes=["one"])
    other = other_home(home, targets=[target], notes=["two"])
    home.sync()
    first = contents(root)
    for _ in range(2):
        ran = other.sync("--all")
        assert ran.lines == []
        assert ran.err == (
            f"note: shop/api: {path}: skipped: written from another registry (a colleague's?);"
            " to replace it: orchestra sync shop/api\n"
        )
        assert home.sync("--all") == Ran(0, "0 written, 1 unchanged in 1 codebase\n", "")
    assert contents(root) == first
    entry = other.staleness()
    assert (entry["status"], entry["detail"]) == ("stale", f"{orchestra.FOREIGN}: {path}")
    assert other.run("status").out.endswith("\nnext: orchestra diff shop/api\n")
    for command in (("sync", "--all", "--check"), ("sync", "api", "--check"), ("status", "--check")):
        assert other.run(*command).status == 1, command
    told = json.loads(other.sync("--all", "--json").out)[0]
    assert [told[name] for name in ("written", "unchanged", "foreign", "failed")] == [[], [], [path], []]
    totals = f"0 to write, 0 unchanged, 1 {orchestra.FOREIGN} in 1 codebase\n"
    assert other.sync("--all", "--dry-run").out == totals
    assert "+- two" in other.run_fine("diff", "api").out
    ran = other.sync("api")
    assert ran.lines == [f"replace  shop/api {path}"] and "orchestra restore shop/api" in ran.err
    assert other.backups() == first
    second = contents(root)
    assert home.sync("--all").lines == other.sync("--all").lines == []
    assert contents(root) == second
    other.register("shop/api", targets=[target], notes=["three"])
    assert other.sync("--all").lines == [f"update   shop/api {path}"]
    assert home.sync("--all").lines == []
    assert home.backups() == {}


def test_a_machine_that_has_only_clones_finds_what_is_out_of_date(home: Home) -> None:
    home.make_synced("shop/api", targets=["codex", "cursor"], notes=["one"])
    home.make_synced("shop/web", targets=["codex"], notes=["one"])
    for note, status in (("one", 0), ("two", 1)):  # the text that is wanted is no other registry's
        other = other_home(home, targets=["codex", "cursor"], notes=[note])
        other.register("shop/web", targets=["codex"], notes=["one"])
        before = take_picture(home.code)
        for command in ("sync", "status"):
            assert other.run(command, "--all", "--check").status == status, command
        assert take_picture(home.code) == before
    assert other.run("status").out.splitlines() == [
        "2 codebases in 1 project: 1 current, 1 to sync",
        "daemon: not running (orchestra daemon start --detach)",
        "",
        "CODEBASE  STATE  SYNCED  WHAT",
        f"shop/api  new    never   {orchestra.FOREIGN}: AGENTS.md, {CURSOR}",
        "",
        "next: orchestra diff shop/api",
    ]


@pytest.mark.parametrize("theirs", [["claude", "codex", "cursor", "windsurf"], ["cursor", "windsurf"]])
@pytest.mark.parametrize("mine", [[], ["CLAUDE.md"], ["AGENTS.md"], ["CLAUDE.md", "AGENTS.md"]])
@pytest.mark.parametrize("notes", [[], ["one"], ["two"]])
def test_a_sync_by_name_leaves_nothing_of_another_registrys_out_of_date(
    home: Home, theirs: list[str], mine: list[str], notes: list[str]
) -> None:
    home.make_synced("shop/api", dict.fromkeys(mine, "mine\n"), targets=theirs, notes=["one"])
    other = other_home(home, targets=["claude", "codex", "cursor", "windsurf"], notes=notes)
    checks = (("sync", "--all", "--check"), ("sync", "api", "--check"), ("status", "--check"))
    is_outdated = {other.run(*check).status for check in checks}
    assert is_outdated == {int(bool(other.sync("api").lines))}
    assert [other.run_fine(*check).err for check in checks] == [""] * 3
    assert other.status_of() == "current"
    assert dict.fromkeys(mine, True) == {path: (home.code / "shop/api" / path).exists() for path in mine}


def test_a_hand_edit_of_a_colleagues_text_is_a_hand_edit(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["codex", "cursor"], notes=["one"])
    other = other_home(home, targets=["codex", "cursor"], notes=["two"])
    edits = {
        "AGENTS.md": edit(root / "AGENTS.md", "- one", "- mine"),
        ".cursor/rules/orchestra.mdc": edit(root / ".cursor/rules/orchestra.mdc", "alwaysApply: true", "globs: x"),
    }
    assert [line.split()[0] for line in other.sync("--all").lines] == ["replace", "replace"]
    assert other.backups() == edits


def test_a_block_that_another_machine_appended_is_taken_out_with_its_blank_line(home: Home) -> None:
    root = home.make_synced("shop/api", {"AGENTS.md": "mine\n"}, targets=["codex"])
    for notes, lines in ((["noted"], []), (["two"], ["replace  shop/api AGENTS.md"])):
        home.sync("--all")
        other = other_home(home, targets=["codex"], notes=notes)
        assert other.sync("api").lines == lines
        other.run_fine("project", "remove", "api", "--purge")
        assert contents(root) == {"AGENTS.md": b"mine\n"}


@pytest.mark.parametrize("is_synced", [True, False])
def test_a_purge_leaves_a_colleagues_text_alone(home: Home, is_synced: bool) -> None:
    root = home.make_synced("shop/api", {"AGENTS.md": "mine\n"}, targets=["codex", "cursor"], notes=["one"])
    before = contents(root)
    other = other_home(home, targets=["claude", "codex", "cursor"], notes=["two"])
    if is_synced:
        assert other.sync("--all").lines == ["create   shop/api CLAUDE.md"]
    ran = other.run_fine("project", "remove", "api", "--purge")
    assert ran.lines[1:] == ["remove   shop/api CLAUDE.md"] * is_synced
    left = "skipped: written from another registry (a colleague's?); to remove it: delete it by hand"
    for path in ("AGENTS.md", CURSOR):
        assert f"note: shop/api: {path}: {left}\n" in ran.err
    assert contents(root) == before and list(other.backups()) == ["api.yaml"]
    assert home.sync("--all") == Ran(0, "0 written, 2 unchanged in 1 codebase\n", "")


def test_a_renamed_codebase_is_no_colleagues(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["codex"], notes=["one"])
    os.unlink(orchestra.codebase_path(home.path, API))
    home.register("shop/web", path=str(root), targets=["codex"], notes=["two"])
    assert home.sync().lines == ["update   shop/web AGENTS.md"]


def test_init_says_that_a_colleagues_text_is_there(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["codex"], notes=["one"])
    other = Home(tempfile.mkdtemp(dir=home.folder))
    ran = other.run_fine("init", str(root), "-p", "shop")
    note = f"skipped: {orchestra.FOREIGN} (a colleague's?); to replace it: orchestra sync shop/api"
    assert ran.err == f"note: shop/api: AGENTS.md: {note}\n"


def test_init_with_sync_takes_a_colleagues_text_over(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["codex"], notes=["one"])
    other = Home(tempfile.mkdtemp(dir=home.folder))
    ran = other.run_fine("init", str(root), "-p", "shop", "--sync")
    assert "replace  shop/api AGENTS.md" in ran.out and "orchestra restore shop/api AGENTS.md" in ran.err
    assert home.sync("--all").lines == []


# Custom targets

RULES = {"path": ".x/rules.md", "header": "---\nalways: true\n---", "limit": "10 characters"}
NOTES = {"path": "docs/NOTES.txt", "owns": "block"}


def test_a_custom_target_is_written_as_an_agents_is(home: Home) -> None:
    home.write_registry(
        "all.yaml", {"custom_targets": {"rules": RULES, "notes": {"path": "x.md"}}, "targets": ["rules"]}
    )
    root = home.make_codebase("shop/api", {"docs/NOTES.txt": "mine\n"}, custom_targets={"notes": NOTES})
    ran = home.sync()
    assert ran.lines == ["create   shop/api .x/rules.md"]
    assert re.search(r"\.x/rules\.md: \d+ characters; rules may have at most 10$", ran.err.strip())
    text = (root / ".x/rules.md").read_bytes()
    assert text.startswith(b"---\nalways: true\n---\n\n<!-- Written by Orchestra") and b"- noted\n" in text
    home.register(custom_targets={"notes": NOTES}, targets=["rules", "notes"])
    assert home.sync().lines == ["append   shop/api docs/NOTES.txt"]
    assert home.run_fine("show", "api", "--target", "notes").out == (root / "docs/NOTES.txt").read_text()
    edited = edit(root / ".x/rules.md", "noted", "edited")
    assert "restore shop/api .x/rules.md" in home.sync().err and (root / ".x/rules.md").read_bytes() == text
    home.run_fine("restore", "api", ".x/rules.md")
    assert (root / ".x/rules.md").read_bytes() == edited
    home.sync()
    home.run_fine("project", "remove", "api", "--purge")
    assert contents(root) == {"docs/NOTES.txt": b"mine\n"}


@pytest.mark.parametrize("owns", ["file", "block"])
@pytest.mark.parametrize("is_edited", [False, True])
def test_a_custom_target_that_is_gone_leaves_only_what_was_edited(home: Home, owns: str, is_edited: bool) -> None:
    target = {"path": "docs/x/mine.md", "owns": owns}
    root = home.make_synced("shop/api", {"code.py": ""}, targets=["mine"], custom_targets={"mine": target})
    if is_edited:
        edit(root / "docs/x/mine.md", "noted", "kestrel")
    home.register(targets=[])
    assert home.status_of() == "orphan"
    assert home.sync().lines == [f"{'release' if is_edited else 'remove':8} shop/api docs/x/mine.md"]
    assert ("kestrel" in (root / "docs/x/mine.md").read_text()) if is_edited else contents(root) == {"code.py": b""}
    assert home.run("restore", "api", "docs/x/mine.md").status == 2  # there is no backup


def test_a_file_that_was_owned_turns_into_a_block_and_back(home: Home) -> None:
    target = {"path": "MINE.md", "owns": "file"}
    root = home.make_synced(targets=["mine"], custom_targets={"mine": target})
    for owns, starts in (("block", BEGIN), ("file", b"<!-- Written"), ("block", BEGIN)):
        home.register(targets=["mine"], custom_targets={"mine": {**target, "owns": owns}})
        home.sync()
        assert (root / "MINE.md").read_bytes().startswith(starts)
        assert (root / "MINE.md").read_bytes().count(b"- noted\n") == 1
        assert home.status_of() == "current"
    edit(root / "MINE.md", "noted", "kestrel")
    home.register(targets=["mine"], custom_targets={"mine": target})
    home.sync()
    assert b"kestrel" in home.backups()["MINE.md"]


def test_the_file_of_a_codebase_inside_is_its_own(home: Home) -> None:
    inner = home.make_synced("shop/web", {"x": ""}, path=str(home.code / "shop/api/web"), targets=["codex"])
    inner = home.code / "shop/api/web"
    put_files(inner, {"x": ""})
    target = {"path": "web/AGENTS.md", "owns": "block"}
    put_files(home.code / "shop/api/.git", {"HEAD": ""})
    home.make_codebase(targets=["mine"], custom_targets={"mine": target}, notes=["outer"])
    for _ in range(2):
        home.sync()
        assert home.staleness()["detail"] == "web/AGENTS.md: skipped: it is in the folder of shop/web"
        assert b"outer" not in (inner / "AGENTS.md").read_bytes()
    home.run_fine("project", "remove", "api", "--purge")
    assert b"- noted" in (inner / "AGENTS.md").read_bytes()


# Parts

ALL_WITH_PARTS = [agent.target for agent in orchestra.AGENTS.values() if agent.has_parts]
WEB_PART = {"name": "web", "project_type": "frontend", "path": "packages/web", "commands": {"test": "pnpm test"}}
LIB_PART = {"name": "lib", "project_type": "backend", "path": "packages/lib", "conventions": ["Money is cents"]}
TASKS = [{"id": "T-1", "title": "Ship it", "status": "pending"}, {"id": "T-2", "title": "Done", "status": "done"}]


def test_a_part_gets_files_that_are_its_own_alone(home: Home) -> None:
    assert len(ALL_WITH_PARTS) == 10
    mine = {"packages/web/AGENTS.md": "mine\n", "packages/lib/x": ""}
    parts = [{**WEB_PART, "tasks": TASKS}, LIB_PART]
    root = home.make_synced("shop/api", mine, targets=[*ALL_WITH_PARTS, "copilot"], projects=parts)
    files = contents(root)
    of_web = {path: data for path, data in files.items() if "web" in path}
    of_root = {path: data for path, data in files.items() if not re.search("web|lib", path)}
    assert (len(of_web), len(of_root)) == (10, 11)
    for data in of_web.values():
        assert b"- test: `pnpm test`\n" in data and b"- T-1 (to do): Ship it\n" in data and b"noted" not in data
    for path, data in of_root.items():
        assert b"- web: frontend, in `packages/web` (1 open task)\n- lib: backend, in `packages/lib`\n" in data
        assert b"pnpm" not in data and (b"T-1" in data) == (path == COPILOT)  # which has no other place for it
    assert files["packages/web/AGENTS.md"].startswith(b"mine\n\n" + BEGIN)
    assert home.sync().lines == [] and home.status_of() == "current"
    home.run_fine("project", "remove", "api", "--purge")
    assert contents(root) == {path: data.encode() for path, data in mine.items()}


def test_each_agents_frontmatter_limits_a_file_to_its_part() -> None:
    part = orchestra.Component(*("a: b", "ml"), path="x/a-b c.d/e", notes=("n",))
    files = orchestra.render_files(codebase_with(targets=tuple(orchestra.AGENTS), projects=(part,)))
    agents = {agent.target: agent for agent in orchestra.AGENTS.values() if agent.part_header}
    found = {}
    for target, agent in agents.items():
        folder, name = os.path.split(agent.path)
        found[target] = frontmatter_of(files[f"{folder}/{name.replace('orchestra', 'orchestra-a-b')}"])
    glob, title = "x/a-b c.d/e/**", "a: b: instructions"
    assert found["cursor"] == {"description": title, "globs": glob, "alwaysApply": False}
    by_glob = {"trigger": "glob", "globs": glob, "description": title}
    assert found["windsurf"] == found["devin"] == found["antigravity"] == by_glob
    assert found["cline"] == found["claude-rules"] == {"paths": [glob]}
    assert found["copilot-rules"] == {"applyTo": glob} and len(found) == 7


def to_link(root: Path) -> None:
    (root / "packages/web").rename(root / "web")
    (root / "packages/web").symlink_to("../web")


def register_inside(home: Home, root: Path) -> None:
    put_files(root, {".git/HEAD": ""})
    home.register("shop/web", path=str(root / "packages/web"), targets=[])


PART_FILES = ["packages/web/AGENTS.md", ".cursor/rules/orchestra-web.mdc"]
UNFIT = "packages/web: skipped: the part web's folder"
OUTCOMES: dict[str, Any] = {  # what happens, the parts then, what is written, the state's detail, what is still there
    "taken out": (None, [LIB_PART], {"remove": PART_FILES}, "", []),
    "nothing left to say": (None, [{**WEB_PART, "commands": {}}, LIB_PART], {"remove": PART_FILES}, "", []),
    "renamed": (
        lambda home, root: (root / "packages/web").rename(root / "packages/site"),
        [{**WEB_PART, "path": "packages/site"}, LIB_PART],
        {"keep": ["packages/site/AGENTS.md"], "update": [".cursor/rules/orchestra-web.mdc"]},
        "",
        ["packages/site/AGENTS.md"],
    ),
    "called otherwise": (
        None,
        [{**WEB_PART, "name": "www"}, LIB_PART],
        {"create": [".cursor/rules/orchestra-www.mdc"], "update": PART_FILES[:1], "remove": PART_FILES[1:]},
        "",
        PART_FILES[:1],
    ),
    "a part inside": (
        lambda home, root: (root / "packages/web/src").mkdir(),
        [WEB_PART, LIB_PART, {**WEB_PART, "name": "src", "path": "packages/web/src"}],
        {"create": ["packages/web/src/AGENTS.md", ".cursor/rules/orchestra-src.mdc"]},
        "",
        PART_FILES,
    ),
    "a codebase of its own": (
        register_inside,
        [WEB_PART, LIB_PART],
        {"remove": PART_FILES[1:]},
        "belongs to shop/web",
        PART_FILES[:1],
    ),
    "a repository": (
        lambda home, root: put_files(root / "packages/web", {".git": "gitdir: x\n"}),
        [WEB_PART, LIB_PART],
        {"remove": PART_FILES[1:]},
        "is in a repository of its own",
        PART_FILES[:1],
    ),
    "a link": (
        lambda home, root: to_link(root),
        [WEB_PART, LIB_PART],
        {"remove": PART_FILES[1:]},
        "is reached through a link",
        PART_FILES[:1],
    ),
    "missing": (
        lambda home, root: shutil.rmtree(root / "packages/web"),
        [WEB_PART, LIB_PART],
        {"remove": PART_FILES[1:]},
        "is missing",
        [],
    ),
}


@pytest.mark.parametrize(("change", "parts", "written", "unfit", "left"), OUTCOMES.values(), ids=OUTCOMES)
def test_what_becomes_of_a_part(home: Home, change: Any, parts: Any, written: Any, unfit: str, left: Any) -> None:
    root = home.make_codebase("shop/api", {"packages/web/x": "", "packages/lib/x": ""})
    home.register(targets=["codex", "cursor"], projects=[WEB_PART, LIB_PART])
    home.sync()
    if change:
        change(home, root)
    home.register(targets=["codex", "cursor"], projects=parts)
    ran = home.run("sync", "api")
    changed = {(verb, path) for verb, _, path in map(str.split, ran.lines)}
    of_parts = {(verb, path) for verb, path in changed if re.search("web|www|src|site", path)}
    assert of_parts == {(verb, path) for verb, paths in written.items() if verb != "keep" for path in paths}
    assert ran.status == 0 and home.staleness()["detail"] == (f"{UNFIT} {unfit}" if unfit else "")
    assert ran.err.count("packages/web") == bool(unfit)
    assert home.sync().lines == [] and home.backups() == {}
    assert not unfit or "packages/web" not in (root / "AGENTS.md").read_text()
    for path in PART_FILES:
        assert (root / path).exists() == (path in left or ("update", path) in changed)
    home.run_fine("project", "remove", "api", "--purge")
    assert not [path for path in contents(root) if "orchestra" in path]


def test_a_part_that_is_passed_over_for_another_reason_is_told_of_again(home: Home) -> None:
    root = home.make_codebase("shop/api", {"x": ""})
    home.register(targets=["codex"], projects=[WEB_PART])
    assert f"{UNFIT} is missing" in home.sync().err and home.sync().err == ""
    put_files(root / "packages/web", {".git": "gitdir: x\n"})
    assert f"{UNFIT} is in a repository of its own" in home.sync().err and home.sync().err == ""


def test_the_folder_of_a_part_is_never_made(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    root = home.make_codebase("shop/api", {"packages/web/x": "", "packages/lib/x": ""})
    home.register(targets=["codex"], projects=[WEB_PART, LIB_PART])
    apply = orchestra.CodebaseTurn.apply

    def apply_late(turn: Any, plan: Any) -> Any:
        shutil.rmtree(root / "packages/web", ignore_errors=True)
        return apply(turn, plan)

    monkeypatch.setattr(orchestra.CodebaseTurn, "apply", apply_late)
    assert home.run("sync", "api").status == 2
    assert not (root / "packages/web").exists() and (root / "packages/lib/AGENTS.md").exists()


# ── 26 Sync ───────────────────────────────────────────────────────────────────


def test_purge_leaves_nothing_of_orchestra_and_everything_of_the_user(home: Home) -> None:
    mine = {".cursor/rules/mine.mdc": b"mine", "src/a.py": b"x", ".github/workflows/ci.yml": b"y"}
    root = home.make_synced("shop/api", mine, targets=ALL_TARGETS)
    assert len(contents(root)) == len(mine) + len(ALL_TARGETS)
    ran = home.run_fine("project", "remove", "api", "--purge")
    assert len([line for line in ran.lines if line.startswith("remove   ")]) == len(ALL_TARGETS)
    assert contents(root) == mine
    assert sorted(os.listdir(root)) == [".cursor", ".github", "src"]
    assert home.registry().keys == []


def test_purge_tells_of_a_link_though_there_is_nothing_to_do(home: Home) -> None:
    home.make_synced("shop/api", {"CLAUDE.md": link_to("README.md")}, targets=["claude"])
    assert home.sync().err == "" and "symbolic link" in home.run_fine("project", "remove", "api", "--purge").err


def test_purge_keeps_an_edited_block_in_the_backups_and_an_edited_owned_file_in_place(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["claude", "cline"])
    edit(root / "CLAUDE.md", "# api", "# my api")
    edit(root / CLINE, "# api", "# my api")
    home.run_fine("project", "remove", "api", "--purge")
    assert b"# my api" in home.backups()["CLAUDE.md"]
    assert os.listdir(root) == [".clinerules"] and b"# my api" in (root / CLINE).read_bytes()


def test_notes_on_links_and_budgets_are_told_again_only_after_a_change(home: Home) -> None:
    files = {"CLAUDE.md": link_to("README.md")}
    notes = [
        "CLAUDE.md: skipped: it is a symbolic link to README.md",
        r"AGENTS.md: \d+ bytes; Codex reads at most 32768",
    ]
    for number in range(2):
        home.make_codebase("shop/api", files, targets=["claude", "codex"], notes=["x" * 40_000, str(number)])
        for told in ("".join(f"note: shop/api: {note}\n" for note in notes), "", ""):
            assert re.fullmatch(told, home.run_fine("sync", "--all", "--dry-run").err)
            assert re.fullmatch(told, home.sync().err)
            assert re.fullmatch("; ".join(notes), home.staleness()["detail"])
        files = {}


def test_status_notes_a_file_that_an_agent_reads_in_place_of_a_managed_one(home: Home) -> None:
    files = {"AGENTS.override.md": "mine", "WARP.md": "mine", ".cursorrules": "mine"}
    home.make_synced("shop/api", files, targets=["codex"])
    note = "AGENTS.override.md: Codex reads it instead of AGENTS.md; WARP.md: Warp reads it instead of AGENTS.md"
    assert (home.status_of(), home.staleness()["detail"]) == ("current", note)
    put_files(home.code / "shop/api", {f"packages/web/{path}": text for path, text in files.items()})
    home.register("shop/api", targets=["codex"], projects=[WEB_PART])
    home.sync()
    of_part = re.sub("(AGENTS|WARP)", r"packages/web/\1", note)
    assert sorted(home.staleness()["detail"].split("; ")) == sorted(f"{note}; {of_part}".split("; "))
    home.register("shop/api", targets=["claude"])
    home.sync()
    assert home.staleness()["detail"] == ""


def test_a_hand_edit_outside_the_block_survives(home: Home) -> None:
    root = home.make_synced()
    file = root / "CLAUDE.md"
    file.write_bytes(b"my own\n" + file.read_bytes() + b"and this\n")
    edited = file.read_bytes()
    assert home.sync().lines == ["update   shop/api CLAUDE.md"]
    head, block_then, tail = re.split(BEGIN + b"|" + END, file.read_bytes())
    assert (head, tail) == (b"my own\n", b"\nand this\n") and b"# api" in edited and b"# api" not in block_then
    assert home.sync().lines == [] and home.backups() == {}


@pytest.mark.parametrize(("target", "path"), [("claude", "CLAUDE.md"), ("cursor", ".cursor/rules/orchestra.mdc")])
@pytest.mark.parametrize("registry_changes", [False, True])
def test_an_edit_of_managed_text_is_backed_up_first_and_can_be_restored(
    home: Home, target: str, path: str, registry_changes: bool
) -> None:
    root = home.make_synced("shop/api", targets=[target])
    synced = (root / path).read_bytes()
    edited = edit(root / path, "# api", "# my api")
    if registry_changes:
        home.register("shop/api", targets=[target], notes=["new"])
    else:
        assert home.status_of() == "modified"
    ran = home.sync()
    assert ran.lines == [f"replace  shop/api {path}"]
    assert f"orchestra restore shop/api {path} --at " in ran.err
    assert ((root / path).read_bytes() == synced) == (not registry_changes)
    assert home.backups() == {path: edited}
    command = re.search(r"orchestra (restore .*)", ran.err)
    assert command
    home.run_fine(*command[1].split())
    assert (root / path).read_bytes() == edited


def replace_edit(home: Home, path: str) -> bytes:
    """Sync a codebase, edit a file, and sync again; return the edited bytes."""
    root = home.make_synced("shop/api", targets=[AGENTS_BY_PATH[path].target])
    edited = edit(root / path, "# api", "# my api")
    home.sync()
    return edited


def test_restore_puts_back_only_the_block_of_a_shared_file(home: Home) -> None:
    edited = replace_edit(home, "CLAUDE.md")
    file = home.code / "shop/api/CLAUDE.md"
    file.write_bytes(b"written later\r\n" + file.read_bytes())
    home.run_fine("restore", "api")
    assert file.read_bytes().replace(b"\r\n", b"\n") == b"written later\n" + edited


def test_restore_keeps_what_it_replaces(home: Home) -> None:
    first = replace_edit(home, CLINE)
    file = home.code / "shop/api" / CLINE
    second = edit(file, "# api", "# second")
    for expected in (first, second):
        home.run_fine("restore", "api", CLINE)
        assert file.read_bytes() == expected
    assert [(backup.why, backup.origin) for backup in kept_versions(home)] == [
        (orchestra.Reason.EDITED, HAND_EDIT),
        ("replaced by restore", DISPLACED),
        ("replaced by restore", DISPLACED),
    ]


def test_restore_lists_and_chooses(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["claude", "codex"])
    assert home.run("restore", "api", "--list") == Ran(0, "", "shop/api: no backups yet\n")
    assert home.run("restore", "api").complaints == ["orchestra: shop/api: nothing to restore: no backups yet"]
    edited = [edit(root / "CLAUDE.md", "# api", "# my api")]
    home.sync()
    edited.append(edit(root / "CLAUDE.md", "# api", "# our api"))
    edit(root / "AGENTS.md", "# api", "# agents")
    home.sync()
    rows = [line.split() for line in home.run_fine("restore", "api", "--list").out.splitlines()]
    assert rows[0] == ["WHEN", "(UTC)", "LOCAL", "TIME", "FILE", "WHY"]
    assert sorted(row[3] for row in rows[1:]) == ["AGENTS.md", "CLAUDE.md", "CLAUDE.md"]
    times = [row[0] for row in rows[1:] if row[3] == "CLAUDE.md"]
    assert len(times) == len(edited)
    for when, text in zip(times, edited):
        home.run_fine("restore", "api", "./CLAUDE.md", "--at", when)
        assert (root / "CLAUDE.md").read_bytes() == text
    assert "no backup of CLAUDE.md at 1999; times look" in home.run("restore", "api", "CLAUDE.md", "--at", "1999").err
    assert home.run("restore", "api", "GEMINI.md").status == 2
    assert home.run("restore", "api", "../../etc/passwd").status == 2
    home.file().write_text("name: [")
    assert home.run("restore", "api").status == 2
    assert len(home.run_fine("restore", "api", "--list").out.splitlines()) > len(rows)


def test_restore_brings_back_all_that_the_last_sync_replaced_and_a_second_one_undoes_that(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["claude", "codex", "gemini"])
    written = contents(root)
    edited = {path: edit(root / path, "# api", "# my api") for path in ("AGENTS.md", "CLAUDE.md")}
    home.sync()
    for expected in ({**written, **edited}, written):
        assert len(home.run_fine("restore", "api").lines) == 2
        assert contents(root) == expected


@pytest.mark.parametrize("link", [".clinerules", CLINE])
def test_restore_does_not_write_through_links(home: Home, link: str) -> None:
    replace_edit(home, CLINE)
    root = home.code / "shop/api"
    shutil.rmtree(root / ".clinerules")
    put_files(home.code, {"outside/orchestra.md": "the user's"})
    put_files(root, {link: link_to(str(home.code / "outside" / ("orchestra.md" if link == CLINE else "")))})
    ran = home.run("restore", "api")
    assert ran.status == 2 and len(ran.complaints) == 1
    assert contents(home.code / "outside") == {"orchestra.md": b"the user's"}


def test_a_registry_file_in_the_backups_is_put_back_by_cp(home: Home) -> None:
    home.make_codebase("bob's shop/api")
    file = home.register("bob's shop/api", notes=["second"])
    file.write_text("{name: api, path: /x, notes: [one, two]}\n")
    codebase = orchestra.load_codebase(home.path, "bob's shop", "api")
    orchestra.save_codebase(home.path, codebase._replace(conventions=("a: b\n\x85",)))
    (backup,) = orchestra.Backups(home.path, codebase.key).versions()
    assert (backup.path, backup.origin) == ("api.yaml", DISPLACED)
    ran = home.run("restore", "api", "api.yaml")
    assert ran.status == 2
    assert "only agents' instruction files are restored" in ran.err
    command = ran.err.partition("try: ")[2].strip()
    subprocess.run(["/bin/sh", "-c", command], check=True)
    assert file.read_text() == "{name: api, path: /x, notes: [one, two]}\n"


def test_each_of_a_removed_codebases_own_files_is_put_back_by_cp_in_its_place(home: Home) -> None:
    files = {"api.local.yaml": "notes: [mine]\n", "api.md": "prose\n", "api.local.md": "my prose\n"}
    home.make_codebase()
    put_files(home.projects / "shop", files)
    home.run_fine("project", "remove", "api")
    home.register()
    for name in files:
        ran = home.run("restore", "api", name)
        subprocess.run(["/bin/sh", "-c", ran.err.partition("try: ")[2].strip()], check=True)
    assert {name: (home.projects / "shop" / name).read_text() for name in files} == files


def test_a_codebase_that_disappears_during_its_sync_is_not_recreated(home: Home, monkeypatch: Any) -> None:
    root = home.make_codebase("shop/api", targets=["cursor"])
    real = orchestra.save_record

    def save_record(*args: Any) -> None:
        real(*args)
        if root.exists():
            root.rename(home.code / "moved")

    monkeypatch.setattr(orchestra, "save_record", save_record)
    ran = home.run("sync", "api")
    assert ran.status == 2 and len(ran.complaints) == 1
    assert not root.exists()
    assert contents(home.code / "moved") == {}


def test_what_orchestra_did_not_write_is_backed_up_from_an_owned_path(home: Home) -> None:
    home.make_codebase("shop/api", {CLINE: b"\xff\0mine"}, targets=["cline"])
    assert home.sync().lines == ["replace  shop/api .clinerules/orchestra.md"]
    assert home.backups() == {CLINE: b"\xff\0mine"}


SAVED_IN_THE_INSTANT = b"saved in that instant"
DAMAGED_SWAPS = (
    b"",
    b"1",
    b"1\0/a\0/a",
    b"\0" * 10,
    b"1\0" * 10,
    b"1\0\xff\0b\x001\0",
    b"1\0/a/CLAUDE.md\0/etc/hostname\x001\0",
    b"1\0/a/CLAUDE.md\0/etc\0x\x001\0",
    b"[" * 60_000,
)


def leave_swap(home: Home, root: Path, path: str) -> Path:
    """Leave what a sync leaves that is killed right after a swap which brought a user's save out."""
    temporary = (root / path).with_name(".orchestra-77-aa-1.tmp")
    temporary.write_bytes(SAVED_IN_THE_INSTANT)
    lock = Path(orchestra.codebase_lock_path(home.path, API))
    lock.parent.mkdir(parents=True, exist_ok=True)
    swap = "\0".join(["1", str(root / path), str(temporary), "00", "1", ""])
    lock.write_text(f"77-aa\n{swap}")
    return temporary


@pytest.mark.parametrize("path", ["CLAUDE.md", COPILOT])
@pytest.mark.parametrize("moves", [False, True])
def test_a_save_of_the_last_instant_is_kept_though_the_codebase_is_elsewhere_by_then(
    home: Home, path: str, moves: bool
) -> None:
    root = home.make_codebase("shop/api", {".github/x": ""}, targets=["claude", "copilot"])
    left = leave_swap(home, root, path)
    other = home.code / "1/2/3/4/5/api"
    if moves:
        other.parent.mkdir(parents=True)
        root.rename(other)
    else:
        (other / ".github").mkdir(parents=True)
    before = {name: data for name, data in contents(home.code).items() if not name.endswith(".tmp")}
    home.register("shop/api", path=str(other), targets=["claude", "copilot"])
    home.sync()
    places = [file for file in (root / path, other / path) if file.exists()]
    assert any(SAVED_IN_THE_INSTANT in file.read_bytes() for file in places)
    assert (home.backups(), home.leftovers(), left.exists()) == ({}, [], False)
    assert before.items() <= contents(home.code).items()


@pytest.mark.parametrize("swap", DAMAGED_SWAPS)
def test_a_damaged_lock_file_stops_nothing_and_moves_nothing(home: Home, swap: bytes) -> None:
    home.make_codebase("shop/api")
    put_files(home.folder, {"etc/hostname": "x"})
    swap = swap.replace(b"\0/", f"\0{home.folder}/".encode())  # were a guard missing, root would move the real /etc
    for lock in (
        orchestra.codebase_lock_path(home.path, API),
        f"{orchestra.run_dir(home.path)}/registry.lock",
    ):
        Path(lock).parent.mkdir(parents=True, exist_ok=True)
        Path(lock).write_bytes(b"x\n" + swap)
    assert home.sync().err == ""
    assert home.run_fine("project", "remove", "api").err == ""
    assert contents(home.folder / "etc") == {"hostname": b"x"}


def test_a_restore_that_fails_says_where(home: Home) -> None:
    replace_edit(home, "AGENTS.md")
    root = home.code / "shop/api"
    with open(root / "AGENTS.md", "ab") as file:
        file.write(BEGIN + b"\n")
    assert home.run("restore", "api").err.startswith(f"orchestra: {root}/AGENTS.md: expected one orchestra:begin and")


@pytest.mark.parametrize("kind", ["gone", "a pipe", "a link"])
def test_a_backup_that_is_not_a_file_restores_nothing(home: Home, kind: str) -> None:
    replace_edit(home, "AGENTS.md")
    root = home.code / "shop/api"
    (backup,) = orchestra.Backups(home.path, API).versions()
    file = Path(backup.file)
    file.unlink()
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a link":
        file.symlink_to(root / "AGENTS.md")
    before = tree(root)
    with pytest.raises(orchestra.SyncError, match="expected a backup, got "):
        orchestra.restore_file(home.path, home.registry().readable(API), backup)
    assert tree(root) == before


@pytest.mark.parametrize("others", [{".clinerules": "rules"}, {"GEMINI.md": b"a\0b"}])
def test_a_purge_skips_files_without_managed_text(home: Home, others: dict[str, Any]) -> None:
    root = home.make_codebase("shop/api", others, targets=["claude", "codex"])
    before = tree(root)
    home.sync()
    assert "skipped: expected" in home.run_fine("project", "remove", "api", "--purge").err
    assert tree(root) == before


def test_a_second_sync_writes_nothing(home: Home) -> None:
    home.make_synced("shop/api", {"CLAUDE.md": "mine"}, targets=ALL_TARGETS, notes=["a"])
    before = tree(home.folder)
    assert home.sync().out == "0 written, 8 unchanged in 1 codebase\n"
    assert tree(home.folder) == before


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444, 0o755])
def test_the_mode_of_a_file_is_kept(home: Home, mode: int) -> None:
    root = home.make_codebase("shop/api", {"CLAUDE.md": "mine"})
    (root / "CLAUDE.md").chmod(mode)
    home.sync()
    assert stat.S_IMODE((root / "CLAUDE.md").stat().st_mode) == mode


def test_a_new_file_has_the_mode_of_the_umask(home: Home) -> None:
    root = home.make_codebase("shop/api", targets=["cursor"])
    old = os.umask(0o027)
    try:
        home.sync()
    finally:
        os.umask(old)
    modes = [stat.S_IMODE((root / name).stat().st_mode) for name in (".cursor", ".cursor/rules/orchestra.mdc")]
    assert modes == [0o750, 0o640]


def test_line_ends_that_git_turned_into_crlf_are_no_hand_edit(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["claude", "cursor"])
    for path in ("CLAUDE.md", ".cursor/rules/orchestra.mdc"):
        (root / path).write_bytes((root / path).read_bytes().replace(b"\n", b"\r\n"))
    assert home.sync().lines == []
    home.register("shop/api", targets=["claude", "cursor"], notes=["new"])
    assert {line.split()[0] for line in home.sync().lines} == {"update"}
    assert b"\n" not in (root / "CLAUDE.md").read_bytes().replace(b"\r\n", b"")


@pytest.mark.parametrize(
    ("files", "target", "place", "mode", "where"),
    [
        ({"CLAUDE.md": "mine"}, "claude", "CLAUDE.md", 0, "CLAUDE.md"),
        ({"CLAUDE.md": "mine"}, "claude", ".", 0o555, "CLAUDE.md"),
        *(
            ({".cursor/rules/mine.mdc": "mine"}, "cursor", place, 0, CURSOR)
            for place in (".cursor", ".cursor/rules", ".")
        ),
    ],
)
def test_what_permissions_forbid_is_one_problem_and_the_others_go_on(
    home: Home, files: dict[str, Any], target: str, place: str, mode: int, where: str
) -> None:
    root = home.make_codebase("shop/api", files, targets=[target])
    home.make_codebase("shop/good")
    (root / place).chmod(mode)
    ran = home.run_as_nobody("sync", "--all")
    (root / place).chmod(0o755)
    assert (ran.status, ran.complaints) == (2, [f"orchestra: shop/api: {where}: permission denied"])
    assert contents(root) == {path: data.encode() for path, data in files.items()}
    assert (home.code / "shop/good/CLAUDE.md").exists()


def test_a_read_only_folder_is_one_problem_for_all_its_files(home: Home) -> None:
    root = home.make_codebase("shop/api", targets=ALL_TARGETS)
    root.chmod(0o555)
    ran = home.run_as_nobody("sync", "--all")
    root.chmod(0o755)
    assert len(ran.complaints) == 1 and ran.complaints[0].endswith(": permission denied")


def test_a_synced_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["claude"])
    (root / "CLAUDE.md").unlink()
    root.chmod(0o311)
    ran = home.run_as_nobody("sync", "--all")
    root.chmod(0o755)
    assert ran.complaints == [f"orchestra: shop/api: {root}: permission denied"]


def test_one_codebases_error_does_not_keep_the_others_from_it(home: Home, monkeypatch: Any) -> None:
    for name in ("api", "good"):
        home.make_codebase(f"shop/{name}", targets=["claude"])
    real = orchestra.find_root

    def fail(home: str, codebase: orchestra.Codebase, *args: Any, **options: Any) -> str:
        if codebase.name == "api":
            raise OSError(errno.EIO, "Input/output error", "/the/disk")
        return real(home, codebase, *args, **options)

    monkeypatch.setattr(orchestra, "find_root", fail)
    ran = home.run("sync", "--all")
    assert (ran.status, ran.complaints) == (2, ["orchestra: shop/api: /the/disk: input/output error"])
    assert (home.code / "shop/good/CLAUDE.md").exists() and home.status_of() == "error"


@pytest.mark.parametrize(
    ("content", "problem"),
    [("a file", "that is a file, not a folder"), (link_to("gone"), "too many levels of symbolic links")],
)
def test_something_else_than_a_folder_is_an_error_for_its_codebase_alone(
    home: Home, content: Any, problem: str
) -> None:
    home.make_codebase("shop/good")
    home.register("shop/gone", path=str(home.code / "gone"))
    put_files(home.code, {"gone": content})
    ran = home.run("sync", "--all")
    assert (ran.status, ran.complaints) == (2, [f"orchestra: shop/gone: {home.code}/gone: {problem}"])
    assert os.path.lexists(home.code / "gone")
    assert (home.code / "shop/good/CLAUDE.md").exists()
    assert (home.status_of("shop/gone"), home.status_of("shop/good")) == ("error", "current")


# How a codebase comes to have no folder on this machine, and what naming it says.
ABSENT: dict[str, tuple[Callable[[Home], Any], str, str]] = {
    "never here": (
        lambda home: home.register(),
        "{root}: the folder is missing",
        "orchestra init PATH -p shop --name api",
    ),
    "no path": (
        lambda home: home.write_registry("shop/api.yaml", "name: api\npath: ~\n"),
        "~/.orchestra/projects/shop/api.yaml: no path on this machine",
        "orchestra init PATH -p shop --name api",
    ),
    "a dead link": (
        lambda home: [home.register(), put_files(home.code, {"shop/api": link_to("nowhere")})],
        "{root}: the folder is missing",
        "orchestra init PATH -p shop --name api",
    ),
    "a file above": (
        lambda home: [home.register(path=f"{home.code}/file/api"), put_files(home.code, {"file": ""})],
        "{code}/file/api: the folder is missing",
        "orchestra init PATH -p shop --name api",
    ),
    "gone since it was synced": (
        lambda home: shutil.rmtree(home.make_synced()),
        "{root}: the folder is missing",
        "orchestra project move shop/api PATH, or bring the folder back, or orchestra project remove shop/api",
    ),
}


@pytest.mark.parametrize(("take", "problem", "hint"), ABSENT.values(), ids=ABSENT)
def test_an_absent_codebase_is_an_error_only_to_who_names_it(home: Home, take: Any, problem: str, hint: str) -> None:
    home.make_synced("shop/good")
    take(home)
    records, disk = contents(Path(orchestra.hashes_root(home.path))), take_picture(home.code)
    for command in (["sync", "--all"], ["sync", "--all", "--check"], ["status", "--check"], ["project", "list"]):
        assert home.run_fine(*command).err == ""
    assert home.sync().out.splitlines()[-1].endswith(" in 1 codebase, 1 absent")
    results = json.loads(home.sync("--all", "--json").out)
    assert [(result["absent"], result["errors"]) for result in results] == [(True, []), (False, [])]
    problem = problem.format(root=home.code / "shop/api", code=home.code)
    status = json.loads(home.run_fine("status", "--json").out)
    assert (status["summary"]["stale"], home.status_of(), home.staleness()["detail"]) == (0, "absent", problem)
    ran = home.run("sync", "api")
    assert (ran.status, ran.err) == (2, f"orchestra: shop/api: {problem}\n  try: {hint}\n")
    assert ran.out == "0 written, 0 unchanged, 1 failed in 1 codebase\n"
    assert home.run("sync", "shop/api", "--check").status == home.run("diff", "api").status == 2
    assert take_picture(home.code) == disk and contents(Path(orchestra.hashes_root(home.path))) == records


def test_a_check_where_no_codebase_is_says_that_it_looked_at_nothing(home: Home) -> None:
    home.register()
    ran = home.run("sync", "--all", "--check")
    assert (ran.status, ran.lines) == (0, [])
    assert ran.err == "note: no codebase is on this machine, so there was nothing to look at: orchestra status\n"


def test_a_folder_that_was_missing_for_a_while_is_current_when_it_is_back(home: Home) -> None:
    root = home.make_synced()
    root.rename(home.code / "elsewhere")
    home.sync()
    (home.code / "elsewhere").rename(root)
    assert home.sync().lines == [] and home.status_of() == "current" and home.backups() == {}


def test_codebases_without_a_path_do_not_dispute_a_folder(home: Home) -> None:
    for name in ("api", "web"):
        home.write_registry(f"shop/{name}.yaml", f"name: {name}\n")
    assert home.problems() == [] and home.registry().keys == [API, ("shop", "web")]
    entries = json.loads(home.run_fine("project", "list", "--json").out)
    assert [entry["path"] for entry in entries] == [None, None]


@pytest.mark.parametrize(
    ("files", "target", "expected"),
    [
        ({".clinerules": "rules"}, "cline", "expected .clinerules to be a folder, got a file: rename it, .*"),
        ({".cursor/rules": "rules"}, "cursor", "expected .cursor/rules to be a folder, got a file: rename it, .*"),
        ({"GEMINI.md": None}, "gemini", "expected a file, got a folder"),
        ({"GEMINI.md": os.mkfifo}, "gemini", "expected a file, got a pipe, socket or device"),
        ({".clinerules/orchestra.md": make_socket}, "cline", "expected a file, got a pipe, socket or device"),
        ({"GEMINI.md": block() + b"\n" + block()}, "gemini", "expected one orchestra:begin and then one .*"),
        ({"GEMINI.md": b"x\n" + BEGIN + b"\nx\n"}, "gemini", "found orchestra:begin on line 2 without .*"),
        ({"GEMINI.md": END + b"\n" + BEGIN}, "gemini", "expected one .*, got end on line 1, begin on line 2: .*"),
        ({"GEMINI.md": b"a\0b"}, "gemini", "expected text, got a NUL byte at 1"),
        ({"GEMINI.md": b"a\xff"}, "gemini", "expected UTF-8 text, got the byte 0xff at 1"),
        ({"GEMINI.md": "x".encode("utf-16")}, "gemini", "expected UTF-8 text, got the byte 0xff at 0"),
    ],
)
def test_a_file_that_cannot_be_managed_is_one_problem_and_stays(
    home: Home, files: dict[str, Any], target: str, expected: str
) -> None:
    root = home.make_codebase("shop/api", files, targets=["claude", target])
    before = {path: data for path, data in contents(root).items() if path != "CLAUDE.md"}
    ran = home.run("sync", "--all")
    path = orchestra.AGENTS[target].path
    assert (ran.status, ran.lines) == (2, ["create   shop/api CLAUDE.md"])
    assert len(ran.complaints) == 1
    assert re.fullmatch(rf"orchestra: shop/api: {re.escape(path)}: {expected}", ran.complaints[0]), ran
    assert {path: data for path, data in contents(root).items() if path != "CLAUDE.md"} == before
    assert home.status_of() == "error"
    assert home.run("sync", "--check", "--all").status == 2
    assert home.run("diff", "api").status == 2


def test_what_could_not_be_written_is_still_recorded(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["claude", "gemini"])
    (root / "GEMINI.md").rename(home.code / "aside")
    (root / "GEMINI.md").mkdir()
    assert home.run("sync", "--all").status == 2
    (root / "GEMINI.md").rmdir()
    (home.code / "aside").rename(root / "GEMINI.md")
    home.register("shop/api", targets=["claude"])
    assert home.sync().lines == ["remove   shop/api GEMINI.md"]


def test_what_could_not_be_removed_stays_recorded(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["claude", "cursor"])
    home.register("shop/api", targets=["claude"])
    (root / ".cursor/rules").chmod(0o555)
    assert home.run_as_nobody("sync", "--all").status == 2
    (root / ".cursor/rules").chmod(0o755)
    assert home.run_as_nobody("sync", "--all").lines == [f"remove   shop/api {CURSOR}"]


def test_a_read_only_file_in_a_writable_folder_is_still_replaced(home: Home) -> None:
    root = home.make_codebase("shop/api", {"CLAUDE.md": "mine\n"})
    (root / "CLAUDE.md").chmod(0o444)
    assert home.run_as_nobody("sync", "--all").status == 0
    assert (root / "CLAUDE.md").read_bytes().startswith(b"mine\n\n" + BEGIN)


# Interrupted and overtaken


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("synced_before", [False, True])
@pytest.mark.parametrize("written", [0, 3])
def test_a_crash_between_record_and_files_is_no_hand_edit(
    home: Home, monkeypatch: Any, synced_before: bool, written: int
) -> None:
    home.make_codebase("shop/api", {"AGENTS.md": "mine\n"}, targets=ALL_TARGETS)
    if synced_before:
        home.sync()
        home.register("shop/api", targets=ALL_TARGETS, notes=["new"])
    real, calls = orchestra.CodebaseTurn._write_file, itertools.count()

    def write_some(*args: Any) -> orchestra.FilePlan:
        if next(calls) == written:
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(orchestra.CodebaseTurn, "_write_file", write_some)
        with pytest.raises(Killed):
            home.run("sync", "--all")
    assert home.status_of() == "stale"
    lines = home.sync().lines
    assert len(lines) == len(ALL_TARGETS) - written
    assert {line.split()[0] for line in lines} <= ({"update"} if synced_before else {"create", "append"})
    assert (home.backups(), home.leftovers(), home.status_of()) == ({}, [], "current")


def test_a_registry_sweep_that_ended_in_its_backup_is_swept_up_itself(home: Home) -> None:
    file = home.write_registry("shop/api.yaml", "name: api\npath: /x\n")
    home.run_fine("project", "list")
    saved = home.write_registry("shop/.orchestra-1-dead-1.tmp", "the user's save")
    swap = "\0".join(["1", str(file), str(saved), "0" * 64, "1", ""])
    put_files(Path(orchestra.run_dir(home.path)), {"registry.lock": f"1-dead\n{swap}"})
    put_files(backups_folder(home), {".orchestra-1-dead.tmp": "half of it"})
    orchestra.clear_registry(home.path)
    assert home.backups() == {"api.yaml": b"the user's save"}
    assert home.leftovers() == []


def test_after_a_clean_up_that_failed_nothing_else_is_swapped(home: Home, monkeypatch: Any) -> None:
    root = home.make_codebase("shop/api", {"CLAUDE.md": "mine\n", "AGENTS.md": "mine\n"}, targets=["claude", "codex"])

    with monkeypatch.context() as patch:
        for owner, name in ((orchestra, "replace_file"), (orchestra.CodebaseTurn, "clean_up")):
            patch.setattr(owner, name, refuse(errno.ENOSPC, "a place"))
        ran = home.run("sync", "api")
    assert ran.status == 2
    assert ran.complaints == [
        "orchestra: shop/api: CLAUDE.md: no space left on device",
        "orchestra: shop/api: AGENTS.md: skipped because an earlier file failed",
    ]
    assert contents(root) == {"CLAUDE.md": b"mine\n", "AGENTS.md": b"mine\n"}
    assert len(home.sync().lines) == 2
    assert home.status_of() == "current"


@pytest.mark.parametrize(
    "place",
    [
        "code/shop/api",
        "code/shop/api/.cursor/rules",
        "home/.orchestra/hashes/shop",
        "home/.orchestra/backups/shop/api",
        "home/.orchestra/backups/shop/api/20260101T000000.000000Z",
        "home/.orchestra/backups/shop/api/.orchestra-1-dead.tmp/.cursor",
    ],
)
def test_leftovers_of_a_killed_run_are_swept_by_the_next(home: Home, place: str) -> None:
    home.make_synced("shop/api", targets=ALL_TARGETS)
    put_files(home.folder / place, {".orchestra-1-dead.tmp": "half"})
    Path(orchestra.codebase_lock_path(home.path, API)).write_text("1-dead\n")
    assert home.sync().lines == []
    assert home.leftovers() == [] and not list(home.folder.rglob(".orchestra-*.tmp"))


def test_leftovers_of_a_killed_save_are_swept_by_a_sync_of_all(home: Home, monkeypatch: Any) -> None:
    half = home.write_registry("shop/.orchestra-1-dead.tmp", "half")
    home.run_fine("project", "list")
    lock = Path(orchestra.run_dir(home.path), "registry.lock")
    put_files(lock.parent, {lock.name: "1-dead\n"})
    assert "orchestra sync --all" in home.run("doctor").out
    home.run_fine("sync", "--all", "--dry-run")
    holder = orchestra.try_lock(str(lock))
    home.run_fine("sync", "--all")  # while a command runs, nothing of its turn is touched
    os.close(holder)
    assert half.exists() and lock.read_bytes() == b"1-dead\n"
    with monkeypatch.context() as patch:
        patch.setattr(orchestra.RegistryTurn, "clean_up", refuse(errno.EROFS, "a place"))
        assert home.run("sync", "--all").status == 2
    home.run_fine("sync", "--all")
    assert home.leftovers() == [] and not half.exists() and "killed commands" not in home.run("doctor").out


@pytest.mark.parametrize("project", ["shop", "blog"])
def test_leftovers_of_a_killed_save_are_swept_by_the_next(home: Home, project: str) -> None:
    home.write_registry("shop/.orchestra-1-dead.tmp", "half")
    home.run_fine("project", "list")
    put_files(Path(orchestra.run_dir(home.path)), {"registry.lock": "1-dead\n"})
    orchestra.save_codebase(home.path, orchestra.Codebase(project, "api", "/x"))
    assert home.leftovers() == []


def test_a_save_of_a_file_without_a_block_between_plan_and_write_is_not_lost(home: Home) -> None:
    root = home.make_codebase("shop/api", {"CLAUDE.md": "mine\n"}, targets=["claude"])
    file = root / "CLAUDE.md"
    with instants(root, [lambda: file.write_bytes(b"saved meanwhile\n")]):
        ran = home.sync()
    assert ran.lines == ["append   shop/api CLAUDE.md"]
    assert file.read_bytes().startswith(b"saved meanwhile\n\n" + BEGIN)
    assert home.sync().lines == []


def test_a_folder_swapped_for_a_link_between_plan_and_write_is_refused(home: Home) -> None:
    root = home.make_codebase("shop/api", {".cursor": None}, targets=["claude", "cursor"])
    outside = home.code / "outside"
    (outside / "rules").mkdir(parents=True)

    def swap() -> None:
        (root / ".cursor").rmdir()
        (root / ".cursor").symlink_to(outside)

    with instants(root / "CLAUDE.md", [swap]):
        assert home.run("sync", "--all").status == 2
    assert contents(outside) == {}


@pytest.mark.parametrize("folder", [".cursor", ".cursor/rules"])
def test_nothing_is_written_outside_while_a_folder_is_flipped_to_a_link_and_back(home: Home, folder: str) -> None:
    root = home.make_codebase("shop/api", {"code.py": ""}, targets=["cursor"])
    outside = home.code / "outside"
    put_files(outside, {"rules": None})
    kept, link = root / "kept", root / "link"
    (root / folder).parent.mkdir(parents=True, exist_ok=True)
    (root / folder).mkdir()
    link.symlink_to(outside if folder == ".cursor" else outside / "rules")

    def flip(is_over: Callable[[], bool]) -> int:
        count = 0
        while not is_over():
            orchestra._find_rename()(-100, os.fsencode(root / folder), -100, os.fsencode(link), 2)
            count += 1
        return count

    flipper = Child(flip)
    started = time.monotonic()
    number = 0
    while number < 11 or time.monotonic() < started + 1:
        number += 1
        home.register("shop/api", targets=["cursor"] if number % 3 else [], notes=[f"change {number}"])
        home.run("sync", "--all")
    assert flipper.stop() > number
    assert (contents(outside), kept.exists()) == ({}, False)


def test_a_folder_that_turns_into_a_link_after_the_last_look_at_it_is_not_followed(
    home: Home, monkeypatch: Any
) -> None:
    root, outside = home.make_codebase("shop/api", {".cursor": None}, targets=["cursor"]), home.code / "outside"
    put_files(outside, {"rules": None})
    real = orchestra.check_parents

    def check_and_turn(*args: Any) -> str:
        place = real(*args)
        if not (root / ".cursor").is_symlink() and "_write_file" in {f.name for f in traceback.extract_stack()}:
            (root / ".cursor").rmdir()
            (root / ".cursor").symlink_to(outside)
        return place

    monkeypatch.setattr(orchestra, "check_parents", check_and_turn)
    assert home.run("sync", "--all").status == 2
    assert contents(outside) == {} and (root / ".cursor").is_symlink()


def test_no_folder_is_made_through_a_link_that_appears_between_plan_and_write(home: Home) -> None:
    root = home.make_codebase("shop/api", targets=["claude", "cursor"])
    (home.code / "outside").mkdir()
    with instants(root / "CLAUDE.md", [lambda: (root / ".cursor").symlink_to(home.code / "outside")]):
        home.run("sync", "--all")
    assert os.listdir(home.code / "outside") == []


def test_no_folder_outside_the_codebase_is_removed(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["cursor"])
    shutil.rmtree(root / ".cursor")
    (home.code / "outside/rules").mkdir(parents=True)
    (root / ".cursor").symlink_to(home.code / "outside")
    home.register("shop/api", targets=["claude"])
    home.run("sync", "--all")
    assert (home.code / "outside/rules").is_dir()


def test_a_codebase_removed_while_a_sync_waits_is_not_written_again_nor_an_error(home: Home) -> None:
    root = home.make_codebase()
    codebase = home.registry().codebases[API]
    os.unlink(orchestra.codebase_path(home.path, codebase.key))
    result = orchestra.sync_codebase(home.path, codebase)
    assert (result.files, result.errors, contents(root)) == ((), (), {})


def test_a_lock_that_stays_taken_is_an_error_for_that_codebase(home: Home, monkeypatch: Any) -> None:
    for name in ("api", "web"):
        home.make_codebase(f"shop/{name}")
    take = orchestra.try_lock
    monkeypatch.setattr(orchestra, "try_lock", lambda path, timeout: take(path, 0.05))
    with orchestra.Lock(orchestra.codebase_lock_path(home.path, API)):
        ran = home.run("sync", "--all")
    assert ran.status == 2 and "another orchestra command has been busy for 30 s" in ran.complaints[0]
    assert contents(home.code / "shop/api") == {} and (home.code / "shop/web/CLAUDE.md").exists()


# The pipeline


def test_a_sync_of_an_empty_registry_returns_nothing_and_writes_nothing(home: Home) -> None:
    assert orchestra.run_pipeline(home.path, orchestra.SyncScope.all()) == []
    assert contents(home.folder) == {}


def test_a_sync_of_one_codebase_returns_one_result(home: Home) -> None:
    home.make_codebase("shop/api")
    home.make_codebase("shop/web")
    (result,) = orchestra.run_pipeline(home.path, orchestra.SyncScope.codebase("api"))
    assert (result.project, result.codebase, result.written) == ("shop", "api", ["CLAUDE.md", "AGENTS.md"])
    assert result.errors == ()
    assert not (home.code / "shop/web/CLAUDE.md").exists()


def test_a_dry_run_of_the_pipeline_writes_nothing(home: Home) -> None:
    root = home.make_codebase()
    before = contents(home.folder)
    (result,) = orchestra.run_pipeline(home.path, orchestra.SyncScope.all(), orchestra.SyncMode(dry_run=True))
    assert result.written == ["CLAUDE.md", "AGENTS.md"]
    assert contents(home.folder) == before and os.listdir(root) == []


# Whole processes


def make_many(home: Home, count: int) -> list[Path]:
    return [home.make_codebase(f"p{i % 5}/c{i}", {"CLAUDE.md": f"mine {i}\n"}, notes=["d"]) for i in range(count)]


def alarms_in(err: str) -> list[str]:
    """List what was told but that AGENTS.md is new beside the user's CLAUDE.md."""
    return [line for line in err.splitlines() if "AGENTS.md: OpenCode" not in line]


def assert_all_complete(home: Home, roots: list[Path]) -> None:
    for i, root in enumerate(roots):
        claude, agents = (root / "CLAUDE.md").read_bytes(), (root / "AGENTS.md").read_bytes()
        assert claude.startswith(f"mine {i}\n\n".encode() + BEGIN) and claude.endswith(END + b"\n")
        assert agents.startswith(BEGIN) and agents.endswith(END + b"\n")
        assert claude.count(BEGIN) == agents.count(BEGIN) == 1
    assert home.leftovers() == []
    assert not os.path.exists(orchestra.backups_root(home.path))
    assert {entry["status"] for entry in json.loads(home.run_fine("status", "--json").out)["codebases"]} == {"current"}


@pytest.mark.parametrize("round", range(2))
def test_two_syncs_at_once_do_not_disturb_each_other(home: Home, round: int) -> None:
    roots = make_many(home, 100)
    both = [finish(process) for process in [home.start("sync", "--all") for _ in range(2)]]
    assert [(ran.status, alarms_in(ran.err)) for ran in both] == [(0, []), (0, [])]
    written = [line for ran in both for line in ran.lines]
    assert len(written) >= 200 and {line.split()[0] for line in written} == {"append", "create"}
    assert_all_complete(home, roots)


@pytest.mark.parametrize("written", [1, 60, 150])
def test_a_sync_after_a_kill_completes_and_reports_no_hand_edit(home: Home, written: int) -> None:
    roots = make_many(home, 200)
    process = home.start("sync", "--all")
    wait_until(
        lambda: (roots[written] / "AGENTS.md").exists() or sum((r / "AGENTS.md").exists() for r in roots) > written
    )
    process.kill()
    finish(process)
    ran = home.sync()
    assert {line.split()[0] for line in ran.lines} <= {"append", "create"} and alarms_in(ran.err) == []
    assert_all_complete(home, roots)


def test_an_interrupted_sync_ends_quietly_and_leaves_nothing_half(home: Home) -> None:
    roots = make_many(home, 100)
    process = home.start("sync", "--all")
    wait_until(lambda: any((root / "AGENTS.md").exists() for root in roots))
    process.send_signal(signal.SIGINT)
    ran = finish(process)
    assert ran.status in (0, 130) and ran.err == ""
    assert home.leftovers() == []
    home.sync()
    assert_all_complete(home, roots)


# ── 27 Status and diff ────────────────────────────────────────────────────────


def sync_it(home: Home) -> None:
    home.run("sync", "--all")


def add_it(targets: Any = ALL_TARGETS, files: dict[str, Any] = {}, **values: Any) -> Callable[[Home], None]:
    return lambda home: home.make_codebase("shop/api", files, targets=targets, **values) and None


def change_file(path: str, content: Any) -> Callable[[Home], None]:
    """Replace a file's bytes; None removes it."""

    def change(home: Home) -> None:
        file = home.code / "shop/api" / path
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content(file.read_bytes()))

    return change


def register_as_old(home: Home) -> None:
    (home.code / "shop/api").mkdir(parents=True)
    home.register("shop/old", path=str(home.code / "shop/api"))


def edit_block(data: bytes) -> bytes:
    return data.replace(b"# api", b"# my api")


def age_notes(data: bytes) -> bytes:
    return seal(data.replace(b"- n\n", b"- noted\n"))


MINE = {"AGENTS.md": "mine\n"}

# How a codebase came to be as it is, and what status says of it.
STATES: dict[str, tuple[list[Callable[[Home], Any]], str]] = {
    "new": ([add_it()], "never_synced"),
    "new, among others": ([add_it(files={"CLAUDE.md": "mine", "AGENTS.md": "x\r\n", CLINE: "y"})], "never_synced"),
    "new, nothing wanted": ([add_it([])], "current"),
    "synced": ([add_it(), sync_it], "current"),
    "text around the block": (
        [add_it(files={"CLAUDE.md": "mine"}), sync_it, change_file("CLAUDE.md", lambda d: b"a\n" + d + b"b")],
        "current",
    ),
    "text beside our own": ([add_it(), sync_it, change_file("CLAUDE.md", lambda d: b"a\n" + d + b"b")], "stale"),
    "new, nothing to add": ([add_it(["codex"], MINE, notes=[])], "current"),
    "nothing to add": ([add_it(["codex"], MINE, notes=[]), sync_it], "current"),
    "something to add again": ([add_it(["codex"], MINE, notes=[]), sync_it, add_it(["codex"])], "stale"),
    "nothing left to add": ([add_it(["codex"], MINE), sync_it, add_it(["codex"], notes=[])], "stale"),
    "nothing to add, edited": (
        [add_it(["codex"], MINE), sync_it, change_file("AGENTS.md", edit_block), add_it(["codex"], notes=[])],
        "stale",
    ),
    "nothing to add, gone": (
        [add_it(["codex"], {**MINE, "x": ""}, notes=[]), sync_it, change_file("AGENTS.md", None)],
        "stale",
    ),
    "nothing to add, disk gone": (
        [add_it(["codex"], MINE, notes=[]), sync_it, change_file("AGENTS.md", None)],
        "error",
    ),
    "nothing to add, dropped": ([add_it(["codex"], MINE, notes=[]), sync_it, add_it([], notes=[])], "current"),
    "registry changed": ([add_it(), sync_it, add_it(notes=["n"])], "stale"),
    "target added": ([add_it(["claude"]), sync_it, add_it(["claude", "cline"])], "stale"),
    "file missing": ([add_it(), sync_it, change_file("GEMINI.md", None)], "stale"),
    "block missing": ([add_it(), sync_it, change_file("GEMINI.md", lambda d: b"mine\n")], "stale"),
    "older text": ([add_it(), sync_it, add_it(notes=["n"]), sync_it, change_file(CLINE, age_notes)], "stale"),
    "changed and edited": ([add_it(), sync_it, add_it(notes=["n"]), change_file(CLINE, edit_block)], "stale"),
    "block edited": ([add_it(), sync_it, change_file("CLAUDE.md", edit_block)], "modified"),
    "owned file edited": ([add_it(), sync_it, change_file(CLINE, edit_block)], "modified"),
    "one missing": ([add_it(), sync_it, change_file("GEMINI.md", None), change_file(CLINE, edit_block)], "stale"),
    "target dropped": ([add_it(), sync_it, add_it(["claude"])], "orphan"),
    "edited and dropped": ([add_it(), sync_it, change_file(CLINE, edit_block), add_it(["claude"])], "orphan"),
    "orphan gone": ([add_it(["claude", "cline"]), sync_it, change_file(CLINE, None), add_it(["claude"])], "current"),
    "one edited": ([add_it(), sync_it, change_file("CLAUDE.md", edit_block), add_it(["claude"])], "modified"),
    "all dropped": ([add_it(), sync_it, add_it([])], "orphan"),
    "linked": ([add_it(["claude"], {"CLAUDE.md": link_to("README.md")})], "current"),
    "import to come": ([add_it(["claude"]), sync_it, add_it(["claude"], {"AGENTS.md": "mine"})], "stale"),
    "two blocks": ([add_it(files={"GEMINI.md": block() + b"\n" + block()}), sync_it], "error"),
    "folder gone": ([add_it(), lambda home: shutil.rmtree(home.code / "shop/api")], "absent"),
    "broken": ([lambda home: home.write_registry("shop/api.yaml", "{")], "error"),
    "renamed": ([register_as_old, sync_it, lambda home: rename_codebase(home, "shop/old", "shop/api")], "stale"),
}


@pytest.fixture(params=STATES)
def status(home: Home, request: Any) -> str:
    """Bring a codebase into the state that has this status."""
    steps, status = STATES[request.param]
    for step in steps:
        step(home)
    return status


def test_status_has_one_word_for_a_codebases_state(home: Home, status: str) -> None:
    before = contents(home.folder)
    ran = home.run("status", "--json")
    entry = json.loads(ran.out)["codebases"][0]
    assert list(entry) == ["project", "codebase", "status", "detail", "last_sync_age", "last_sync_at", "active_tasks"]
    assert entry["status"] == status
    assert bool(entry["detail"]) == (
        status not in ("current", "never_synced")
        or (home.code / "shop/api/CLAUDE.md").is_symlink()
        or "will read it instead" in entry["detail"]
    )
    assert ran.status == (2 if status == "error" else 0)
    assert home.run("status", "--check").status == {"current": 0, "absent": 0, "error": 2}.get(status, 1)
    assert json.loads(ran.out)["summary"] == {
        "projects": 1,
        "codebases": 1,
        "stale": int(status not in ("current", "absent", "error")),
    }
    assert contents(home.folder) == before


def test_a_failed_first_sync_is_no_sync(home: Home) -> None:
    home.make_codebase("shop/api", {"CLAUDE.md": b"a\0b"}, targets=["claude"])
    assert home.run("sync", "--all").status == 2
    assert home.staleness()["last_sync_at"] is None


def test_a_file_without_its_block_is_not_called_missing(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["claude", "codex"])
    (root / "CLAUDE.md").write_text("all mine\n")
    (root / "AGENTS.md").unlink()
    assert home.staleness()["detail"] == "missing: AGENTS.md; block missing: CLAUDE.md"


def upgrade_from_first(home: Home) -> None:
    """Make it look as if version 0.1 had written the record, of two registry files."""
    change_file("AGENTS.md", lambda d: d + b"mine\n")(home)
    home.record.write_text(re.sub(r"(shop/api )([0-9a-f]{64})", r"\1\2\2", home.record.read_text()))


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (add_it(["codex"], notes=["n"]), "registry changed: AGENTS.md"),
        (change_file("AGENTS.md", lambda d: d + b"mine\n"), "out of date: AGENTS.md"),
        (upgrade_from_first, "out of date: AGENTS.md"),
    ],
)
def test_status_tells_a_changed_registry_from_text_of_ones_own(home: Home, change: Any, detail: str) -> None:
    for step in (add_it(["codex"]), sync_it, change):
        step(home)
    assert home.staleness()["detail"] == detail


def test_status_names_every_change_whatever_the_state(home: Home) -> None:
    root = home.make_codebase("shop/api", targets=["claude", "codex", "cline"])
    home.sync()
    edit(root / "CLAUDE.md", "# api", "# my api")
    (root / "AGENTS.md").unlink()
    home.register("shop/api", targets=["claude", "codex"])
    detail = f"missing: AGENTS.md; edited by hand: CLAUDE.md; no longer wanted: {CLINE}"
    assert (home.status_of(), home.staleness()["detail"]) == ("stale", detail)


def test_a_dry_run_lists_exactly_what_sync_then_writes(home: Home, status: str) -> None:
    before = tree(home.folder)
    dry, check = home.run("sync", "--all", "--dry-run"), home.run("sync", "--all", "--check")
    json_dry = json.loads(home.run("sync", "--all", "--dry-run", "--json").out)
    assert tree(home.folder) == before
    files = tree(home.code)
    real = home.run("sync", "--all")
    assert dry.lines == check.lines == real.lines
    written = [line.split()[-1] for line in real.lines if not line.startswith("release")]
    assert [path for result in json_dry for path in result["written"]] == written
    assert dry.status == real.status == (2 if status == "error" else 0)
    assert check.status == (2 if status == "error" else 1 if real.lines else 0)
    released = {f"shop/api/{line.split()[-1]}" for line in real.lines if line.startswith("release")}
    touched = {path for path, _ in files.items() ^ tree(home.code).items()}
    assert touched == {f"shop/api/{line.split()[-1]}" for line in real.lines} - released
    assert (status in ("current", "absent")) == (not real.lines) or status == "error"
    if status not in ("absent", "error"):
        after = tree(home.folder)
        assert home.sync().lines == [] and home.status_of() == "current"
        assert tree(home.folder) == after


def test_diff_shows_what_sync_then_writes(home: Home, status: str) -> None:
    before = contents(home.code)
    ran = home.run("diff", "api", "--exit-code")
    assert contents(home.code) == before
    if status in ("absent", "error"):
        assert ran.status == 2
        return
    home.sync()
    changed = {path for path, _ in before.items() ^ contents(home.code).items()}
    named = set(re.findall(r"(?m)^(?:---|\+\+\+) [ab]/(.*)$", ran.out))
    assert named == {path[len("shop/api/") :] for path in changed}
    assert ran.status == (1 if changed else 0)
    assert home.run("diff", "api").status == 0


def test_a_diff_can_be_applied(home: Home) -> None:
    root = home.make_codebase("shop/api", {"CLAUDE.md": "mine"})
    copy = home.code / "copy"
    shutil.copytree(root, copy)
    (home.code / "d.patch").write_text(home.run_fine("diff", "api").out)
    if not shutil.which("patch"):
        pytest.skip("needs patch")
    subprocess.run(["patch", "-p1", "-s", "-i", str(home.code / "d.patch")], cwd=copy, check=True)
    home.sync()
    assert contents(copy) == contents(root)


def test_status_counts_what_is_to_do_and_how_long_ago_it_was_synced(home: Home) -> None:
    tasks = [{"id": str(i), "title": "t", "status": s} for i, s in enumerate(orchestra.TASK_STATUSES)]
    home.make_codebase("shop/api", projects=[{"name": "a", "project_type": "ml", "tasks": tasks}])
    assert home.staleness() == {
        "project": "shop",
        "codebase": "api",
        "status": "never_synced",
        "detail": "",
        "last_sync_age": None,
        "last_sync_at": None,
        "active_tasks": 3,
    }
    home.sync()
    codebase = home.registry().codebases[API]
    at = home.staleness()["last_sync_at"]
    later = orchestra.check_staleness(home.path, codebase, clock=lambda: time.time() + 3600)
    assert later.last_sync_age in (3600, 3601)
    assert abs(orchestra.age_of(at, time.time) or 0) <= 2


@pytest.mark.parametrize(
    ("when", "age"),
    [("2026-01-01T00:00:00Z", 60), ("2026-01-01T00:02:00Z", 0), ("", None), (None, None), ("yesterday", None)],
)
def test_an_age_is_in_whole_seconds_or_none(when: Optional[str], age: Optional[int]) -> None:
    assert orchestra.age_of(when, lambda: 1767225660.9) == age


@pytest.mark.parametrize(
    "breaks",
    [
        lambda home: home.write_registry("shop/api.yaml", "{"),
        lambda home: home.write_registry("shop/project.yaml", "{"),
        lambda home: home.register(path="/etc/passwd"),
    ],
)
def test_what_is_broken_keeps_the_time_of_its_last_sync(home: Home, breaks: Callable[[Home], None]) -> None:
    home.make_synced()
    at = home.staleness()["last_sync_at"]
    breaks(home)
    entry = home.staleness()
    assert (entry["status"], entry["last_sync_at"]) == ("error", at) and at
    assert entry["last_sync_age"] in range(60)


def test_show_in_a_parts_folder_is_of_the_part(home: Home, monkeypatch: Any) -> None:
    web = {"name": "web", "project_type": "frontend", "path": "packages/web", "commands": {"test": "pnpm test"}}
    targets = ["codex", "cursor", "kiro"]
    root = home.make_synced("shop/api", {"packages/web/src/x": ""}, targets=targets, projects=[web], notes=["noted"])
    files = {path: data.decode() for path, data in contents(root).items()}
    whole = home.run_fine("show", "api")
    assert whole.out.startswith("# api\n") and len(whole.err.splitlines()) == 5
    monkeypatch.chdir(root / "packages/web/src")
    for argv in ((), ("..",), (str(root / "packages/web"),)):
        ran = home.run_fine("show", *argv)
        assert ran.out.startswith("# web\n") and "pnpm test" in ran.out and "noted" not in ran.out
        origin = "this is for all of shop/api; what is for packages/web alone is from shop/api.yaml"
        assert home.run_fine("show", *argv, "--origin").err == f"note: {origin}\n"
        note, *sizes = ran.err.splitlines()
        assert note == "note: this is for packages/web alone; the codebase's: orchestra show shop/api"
        assert [size.split(":")[1].strip() for size in sizes] == [
            "packages/web/AGENTS.md",
            ".cursor/rules/orchestra-web.mdc",
        ]
    for target, path in (
        ("codex", "packages/web/AGENTS.md"),
        ("cursor", ".cursor/rules/orchestra-web.mdc"),
        ("kiro", ".kiro/steering/orchestra.md"),
    ):
        assert home.run_fine("show", "--target", target).out == files[path]
    assert home.run_fine("show", "api", "--origin").err == ""
    assert home.run_fine("show", "api") == whole == home.run_fine("show", str(root))
    monkeypatch.chdir(root / "packages")
    assert home.run_fine("show") == whole


def test_show_prints_what_an_agent_is_told_and_where_it_is_from(home: Home) -> None:
    put_files(home.projects, LAYERED)
    root = home.code / "api"
    put_files(root, {"AGENTS.md": "mine\n"})
    home.write_registry("shop/api.local.yaml", f"path: {root}\ntargets: [codex, cursor]\nnotes: [{'x' * 99}]\n")
    home.write_registry("all.local.md", " \n")
    plain, codex, cursor = (
        home.run_fine("show", "api", *argv) for argv in ((), ("--target", "codex"), ("--target", "cursor"))
    )
    codebase = home.registry().codebases[API]
    text = orchestra.render_text(codebase, orchestra.render_body(codebase))
    assert plain.out == text and plain.err.splitlines() == [
        f"note: AGENTS.md: {len(codex.out)} bytes; Codex reads at most 32768",
        f"note: .cursor/rules/orchestra.mdc: {cursor.out.count(chr(10))} lines; Cursor recommends at most 500",
    ]
    home.sync("api")
    assert (root / "AGENTS.md").read_text() == codex.out and codex.out.startswith("mine\n")
    assert (root / ".cursor/rules/orchestra.mdc").read_text() == cursor.out
    assert "shop's python" in plain.out.partition("## Conventions")[2].partition("## Skills")[0]
    rows = home.run_fine("show", "api", "--origin").lines
    expected = f"""\
WHAT         FROM                         TEXT
path         shop/api.local.yaml          {root}
description  all.yaml                     all
targets      shop/api.local.yaml          codex, cursor
commands     all.yaml                     lint: all
commands     shop/project.yaml            test: shop
commands     shop/api.yaml                build: api
conventions  all.yaml                     all
conventions  all.yaml, shop/project.yaml  same
conventions  all.local.yaml               mine
conventions  shop/project.yaml            shop
notes        all.local.yaml               n
notes        shop/api.local.yaml          {"x" * 57}...
skills       shop/api.yaml                sql: api
skills       shop/api.yaml                css
prose        python.md                    root's python
prose        all.md                       of all
prose        shop/project.md              of shop
prose        shop/project.local.md        of my shop
prose        shop/sub/deep.md             deep
prose        shop/python.md               shop's python
prose        shop/api.md                  of api
prose        shop/api.local.md            of my api"""
    assert [row.split() for row in rows] == [row.split() for row in expected.splitlines()]


def test_show_tells_which_file_is_not_written(home: Home) -> None:
    home.make_codebase("shop/api", {COPILOT: "mine\n"}, targets=["copilot-rules"], notes=[])
    note = f"note: {orchestra.AGENTS['copilot-rules'].path}: not written: there is nothing to add to your own text\n"
    for argv, out in (((), "# api\n"), (("--target", "copilot-rules"), "")):
        ran = home.run_fine("show", "api", *argv)
        assert (ran.out, ran.err) == (out, note)
    assert home.sync().lines == []


@pytest.mark.parametrize("target", ["AGENTS.md", "own.md", "nowhere.md"])
def test_show_follows_a_link(home: Home, target: str) -> None:
    files = {"AGENTS.md": "mine\n", "own.md": "my own\n", "CLAUDE.md": link_to(target)}
    root = home.make_synced("shop/api", files, notes=["a"])
    ran = home.run_fine("show", "api", "--target", "claude")
    linked = root / target
    assert ran.out == linked.read_text() if linked.exists() else ran.out.startswith(BEGIN.decode())
    lines = ran.out.count("\n")
    assert f"note: CLAUDE.md: {lines} lines;" in ran.err


def test_show_needs_no_folder(home: Home) -> None:
    home.write_registry("shop/api.yaml", "name: api\nnotes: [a]\n")
    assert home.run_fine("show", "api", "--target", "claude").out.count("\n- a\n") == 1


def test_a_diff_of_many_lines_that_are_alike_replaces_all_of_them(home: Home) -> None:
    root = home.make_codebase(files={CURSOR: "".join(f"{i % 150}\n" for i in range(100_000))}, targets=["cursor"])
    put_files(home.projects, {"shop/api.md": "".join(f"{i % 149}\n" for i in range(20_000))})
    ran = run_in_time(home, "diff", "api")
    home.sync()
    removed, added = ran.lines[3:100_003], ran.lines[100_003:]
    assert ran.lines[2] == f"@@ -1,100000 +1,{len(added)} @@" and {line[0] for line in removed} == {"-"}
    assert "".join(f"{line[1:]}\n" for line in added) == (root / CURSOR).read_text()


def test_a_diff_shows_what_would_move_the_cursor(home: Home) -> None:
    text = "\x1b[2J\x07 \x9b31m \u202e\u200b tab\t lone\r cr \u65e5\xe9"
    home.make_codebase("shop/api", {CLINE: f"{text}\r\n"}, targets=["cline"])
    out = home.run("diff", "api").out
    assert "-\\x1b[2J\\x07 \\x9b31m \\u202e\\u200b tab\t lone\\r cr \u65e5\xe9\r\n" in out


# ══ IV Daemon ═════════════════════════════════════════════════════════════════

# ── 28 Watching ───────────────────────────────────────────────────────────────

# kqueue off macOS: a stand-in over inotify that follows kqueue(2) and xnu's behaviour.

KQUEUE_NAMES = {"KQ_FILTER_VNODE": -4, "KQ_EV_ADD": 1, "KQ_EV_DELETE": 2, "KQ_EV_CLEAR": 0x20}
DELETE, WRITE, EXTEND, ATTRIB, LINK, RENAME, REVOKE = 1, 2, 4, 8, 16, 32, 64
NOTE_NAMES = ("DELETE", "WRITE", "EXTEND", "ATTRIB", "LINK", "RENAME", "REVOKE")
KQUEUE_NAMES.update({f"KQ_NOTE_{name}": 1 << number for number, name in enumerate(NOTE_NAMES)})


class Kevent(NamedTuple):
    ident: int
    filter: int
    flags: int
    fflags: int = 0


class Knote:
    """One watched descriptor: what it led to, and what to report of it."""

    def __init__(self, ident: int, fflags: int) -> None:
        info = os.fstat(ident)
        self.ident = ident
        self.fflags = fflags
        self.inode = (info.st_dev, info.st_ino)
        self.is_folder = stat.S_ISDIR(info.st_mode)
        self.size = info.st_size
        self.links = info.st_nlink
        self.wds: set[int] = set()
        self.pending = 0

    @property
    def is_open(self) -> bool:
        try:
            info = os.fstat(self.ident)
        except OSError:
            return False
        return (info.st_dev, info.st_ino) == self.inode

    def note_link_count(self) -> int:
        """Return what a changed number of names means: a removed folder has none."""
        links, self.links = self.links, os.fstat(self.ident).st_nlink
        return DELETE | LINK if self.links < links else LINK if self.links > links else 0

    def note_size(self) -> int:
        size, self.size = self.size, os.fstat(self.ident).st_size
        if self.size < size or self.size == size == 0:
            return ATTRIB
        return WRITE | EXTEND if self.size > size else WRITE


class StandInKqueue:
    """select.kqueue for EVFILT_VNODE, over inotify(7). As there, closing a descriptor ends its watch."""

    IN = orchestra.InotifyBackend
    FILE_MASK = IN.IN_MODIFY | IN.IN_ATTRIB | IN.IN_MOVE_SELF | IN.IN_DELETE_SELF
    ENTRY_MASK = IN.IN_CREATE | IN.IN_DELETE | IN.IN_MOVED_FROM | IN.IN_MOVED_TO
    FOLDER_MASK = ENTRY_MASK | IN.IN_MOVE_SELF | IN.IN_DELETE_SELF
    IN_ISDIR = 0x40000000

    def __init__(self) -> None:
        self._inotify = orchestra.InotifyBackend()
        self._knotes: dict[int, Knote] = {}
        self._more, self._more_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)  # readable while events are left over
        self._epoll = select.epoll()
        self._epoll.register(self._inotify.fileno(), select.EPOLLIN)
        self._epoll.register(self._more, select.EPOLLIN)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def control(self, changes: Optional[Iterable[Kevent]], max_events: int, timeout: Optional[float] = None) -> Any:
        for change in changes or ():
            assert change.filter == KQUEUE_NAMES["KQ_FILTER_VNODE"]
            self._forget(change.ident)
            if change.flags & KQUEUE_NAMES["KQ_EV_ADD"]:
                assert change.flags & KQUEUE_NAMES["KQ_EV_CLEAR"]
                self._add(Knote(change.ident, change.fflags))
        if not max_events:
            return []
        select.select([self._epoll], [], [], timeout)
        self._read()
        told = [knote for knote in self._knotes.values() if knote.pending & knote.fflags][:max_events]
        events = [Kevent(knote.ident, -4, 0x20, knote.pending & knote.fflags) for knote in told]
        for knote in told:
            knote.pending = 0
        if len(told) == max_events:
            os.write(self._more_in, b"x")
        return events

    def close(self) -> None:
        self._epoll.close()
        self._inotify.close()
        os.close(self._more)
        os.close(self._more_in)

    def _add(self, knote: Knote) -> None:
        folder_of = Path(os.readlink(f"/proc/self/fd/{knote.ident}")).parent
        knote.wds.add(self._watch(f"/proc/self/fd/{knote.ident}", knote.is_folder))
        if knote.is_folder:
            # While it is open, inotify tells of a folder's removal only where it was listed.
            try:
                knote.wds.add(-self._watch(str(folder_of), True))
            except FileNotFoundError:
                pass
        self._knotes[knote.ident] = knote

    def _watch(self, path: str, is_folder: bool) -> int:
        mask = self.FOLDER_MASK if is_folder else self.FILE_MASK
        wd = self._inotify._libc.inotify_add_watch(self._inotify.fileno(), os.fsencode(path), mask)
        return self._inotify._check(wd, path)

    def _forget(self, ident: int) -> None:
        knote = self._knotes.pop(ident, None)
        for wd in knote.wds if knote else ():
            if not any({wd, -wd} & other.wds for other in self._knotes.values()):
                self._inotify._libc.inotify_rm_watch(self._inotify.fileno(), abs(wd))

    def _read(self) -> None:
        try:
            os.read(self._more, 1 << 16)
        except BlockingIOError:
            pass
        for ident in [ident for ident, knote in self._knotes.items() if not knote.is_open]:
            self._forget(ident)
        while True:
            try:
                data = os.read(self._inotify.fileno(), 1 << 16)
            except BlockingIOError:
                return
            for wd, mask, _ in self._inotify._parse(data):
                for knote in self._knotes.values():
                    try:
                        knote.pending |= self._notes_for(knote, wd, mask)
                    except OSError:
                        pass  # closed, while another thread used its number

    def _notes_for(self, knote: Knote, wd: int, mask: int) -> int:
        if mask & self.IN.IN_Q_OVERFLOW:
            return knote.fflags
        if wd not in knote.wds:
            is_gone = -wd in knote.wds and mask & self.IN.IN_DELETE and not os.fstat(knote.ident).st_nlink
            return DELETE | LINK if is_gone else 0
        notes = RENAME if mask & self.IN.IN_MOVE_SELF else 0
        if knote.is_folder:
            is_new_link = mask & self.IN_ISDIR and mask & (self.IN.IN_CREATE | self.IN.IN_DELETE)
            return notes | (WRITE if mask & self.ENTRY_MASK else 0) | (LINK if is_new_link else 0)
        if mask & self.IN.IN_ATTRIB:
            notes |= knote.note_link_count() or ATTRIB
        return notes | (knote.note_size() if mask & self.IN.IN_MODIFY else 0)


def install_stand_in(set_name: Callable[[Any, str, Any], None] = setattr) -> None:
    set_name(select, "kqueue", StandInKqueue)
    set_name(select, "kevent", Kevent)
    for name, value in KQUEUE_NAMES.items():
        set_name(select, name, value)


DRIVER = f"""
import sys
sys.path[:0] = [{str(HERE)!r}]
import {Path(__file__).stem} as tests
tests.install_stand_in()
sys.exit(tests.orchestra.main(sys.argv[1:]))
"""


def require(kind: str, monkeypatch: Any) -> None:
    if kind == "kqueue" and not HAS_KQUEUE:
        if not IS_LINUX:
            pytest.skip("neither kqueue nor inotify to make a stand-in of")
        install_stand_in(lambda place, name, value: monkeypatch.setattr(place, name, value, raising=False))
    if kind == "inotify" and not IS_LINUX:
        pytest.skip("inotify is Linux's")


@pytest.fixture(params=["kqueue", "inotify", "polling"])
def kind(request: Any, monkeypatch: Any) -> str:
    """Each of the watchers in turn."""
    require(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture
def kqueue(monkeypatch: Any) -> None:
    require("kqueue", monkeypatch)


KQUEUE_NOTES = {  # what is done to a folder or a file, and what is reported of it
    "folder: create": (lambda folder: (folder / "new").write_text("x"), WRITE),
    "folder: make a folder": (lambda folder: (folder / "new").mkdir(), WRITE | LINK),
    "folder: write an entry in place": (lambda folder: (folder / "file").write_text("longer than before"), 0),
    "folder: remove an entry": (lambda folder: (folder / "file").unlink(), WRITE),
    "folder: rename over an entry": (lambda folder: (folder / "other").replace(folder / "file"), WRITE),
    "folder: rename an entry out": (lambda folder: (folder / "file").rename(folder.parent / "out"), WRITE),
    "folder: rename it": (lambda folder: folder.rename(folder.parent / "renamed"), RENAME),
    "folder: remove it": (shutil.rmtree, WRITE | DELETE | LINK),
    "file: append": (lambda file: file.open("a").write("more"), WRITE | EXTEND),
    "file: write in place": (lambda file: file.open("r+").write("TEXT"), WRITE),
    "file: truncate": (lambda file: os.truncate(file, 1), ATTRIB),
    "file: chmod": (lambda file: file.chmod(0o600), ATTRIB),
    "file: unlink": (lambda file: file.unlink(), DELETE | LINK),
    "file: rename over": (lambda file: (file.parent / "other").replace(file), DELETE),
    "file: rename": (lambda file: file.rename(file.parent / "new"), RENAME),
    "file: read": (lambda file: file.read_text(), 0),
}


@pytest.mark.parametrize("name", KQUEUE_NOTES)
def test_kqueue_reports_what_the_table_says(live: Home, kqueue: None, name: str) -> None:
    put_files(live.code, {"folder/file": "text", "folder/other": "x"})
    act, notes = KQUEUE_NOTES[name]
    path = live.code / "folder" / ("" if name.startswith("folder") else "file")
    queue: Any = select.kqueue()  # type: ignore[attr-defined,unused-ignore]
    fd = os.open(path, os.O_RDONLY)
    flags = KQUEUE_NAMES["KQ_EV_ADD"] | KQUEUE_NAMES["KQ_EV_CLEAR"]
    queue.control([select.kevent(fd, -4, flags, 127)], 0)  # type: ignore[attr-defined,unused-ignore]
    assert select.select([queue], [], [], 0)[0] == []
    act(path)
    told = 0
    while select.select([queue], [], [], 0.02)[0]:
        assert select.select([queue], [], [], 0)[0] == [queue]  # level-triggered
        for event in queue.control(None, 8, 0):
            assert event.ident == fd
            told |= event.fflags
    os.close(fd)
    queue.close()
    assert told & ~LINK == notes & ~LINK


# The three watchers


def snapshot_of(watcher: orchestra.Watcher) -> dict[str, str]:
    """Return every file in a watcher's snapshot with its digest."""
    return {path: seen.digest for files in watcher._snapshot.values() for path, seen in files.items()}


class Lookout:
    """A watcher, turned by hand, and what it reported."""

    def __init__(self, live: Home, kind: str, make: Any = orchestra.Watcher) -> None:
        self.live = live
        self.backend = orchestra.open_backend(kind, 4096) if isinstance(kind, str) else kind
        self.is_open = True
        live.cleanup.callback(self.close)
        self.watcher = make(live.path, self.backend)
        self.saved: set[str] = set()
        self.deleted: set[str] = set()
        self.take(self.watcher.look())
        self.drain()
        self.forget()

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.backend.close()

    def forget(self) -> None:
        self.saved, self.deleted = set(), set()

    def take(self, changed: set[str]) -> None:
        self.saved |= {self.name(path) for path in changed if os.path.exists(path)}
        self.deleted |= {self.name(path) for path in changed if not os.path.exists(path)}

    def name(self, path: str) -> str:
        return os.path.relpath(path, self.live.projects)

    def turn(self, seconds: float = 0.02) -> bool:
        """Look where there were events, or everywhere; return whether there were some."""
        fd = self.backend.fileno()
        if fd < 0:
            time.sleep(0.001)
            self.take(self.watcher.look())
        elif select.select([fd], [], [], seconds)[0]:
            self.take(self.watcher.drain())
            return True
        return False

    def drain(self) -> None:
        for _ in range(1000):
            if not self.turn(0.015):
                return
        raise AssertionError("the watcher wakes itself")

    def files(self) -> dict[str, str]:
        return {self.name(path): digest for path, digest in snapshot_of(self.watcher).items()}

    def is_true_to_disk(self) -> bool:
        fresh = orchestra.Watcher(self.live.path, orchestra.Backend())
        fresh.look()
        return bool(snapshot_of(fresh) == snapshot_of(self.watcher))

    def expect(self, saved: Iterable[str] = (), deleted: Iterable[str] = (), timeout: float = 20) -> None:
        """Wait until these were reported, and check that the snapshot is true to the disk."""
        wanted = [name if "." in name else f"{name}.yaml" for name in saved]
        gone = [name if "." in name else f"{name}.yaml" for name in deleted]
        deadline = time.monotonic() + timeout
        while not (self.saved >= set(wanted) and self.deleted >= set(gone) and self.is_true_to_disk()):
            assert time.monotonic() < deadline, (self.saved, self.deleted, wanted, gone)
            self.turn()
        self.drain()
        assert self.is_true_to_disk()
        assert self.backend.fileno() < 0 or not self.watcher.must_poll
        self.forget()


@pytest.mark.parametrize("becomes", ["nothing", "a file"])
def test_a_folder_that_goes_after_it_was_listed_keeps_no_other_from_being_looked_at(
    live: Home, monkeypatch: Any, becomes: str
) -> None:
    others = [f"p{number}/api" for number in range(20)]
    for label in ("shop/api", *others):
        live.save(label)
    watcher = orchestra.Watcher(live.path, orchestra.Backend())
    watcher.look()
    list_folder = orchestra.list_folder

    def list_and_remove(folder: str) -> Any:
        entries = list_folder(folder)
        if folder == str(live.projects / "shop"):
            shutil.rmtree(folder)
            if becomes == "a file":
                Path(folder).write_text("")
        return entries

    for label in others:
        live.save(label, note="again")
    monkeypatch.setattr(orchestra, "list_folder", list_and_remove)
    assert watcher.look() == {str(live.file(label)) for label in ("shop/api", *others)}


def test_what_is_below_a_folder_that_cannot_be_listed_now_is_not_taken_for_gone(live: Home, monkeypatch: Any) -> None:
    put_files(live.projects, {"shop/more/python.md": "text"})
    watcher = orchestra.Watcher(live.path, orchestra.Backend())
    watcher.look()
    before = snapshot_of(watcher)
    list_folder = orchestra.list_folder
    fails = refuse(errno.EMFILE, "shop")
    shop = str(live.projects / "shop")
    monkeypatch.setattr(orchestra, "list_folder", lambda folder: fails() if folder == shop else list_folder(folder))
    assert watcher.look() == set() and snapshot_of(watcher) == before


def test_a_link_to_all_of_the_disk_is_followed_only_so_far(live: Home, monkeypatch: Any) -> None:
    put_files(live.code, {f"disk/{i}/some.md": "" for i in range(30)})
    put_files(live.projects, {"all": link_to(str(live.code / "disk"))})
    live.register("shop/api")
    monkeypatch.setattr(orchestra.Watcher, "MAX_FOLDERS", 20)
    watcher = orchestra.Watcher(live.path, orchestra.Backend())
    changed = watcher.look()
    assert str(live.file("shop/api")) in changed and 1 < len(changed) < 20


def test_a_link_that_goes_while_it_is_followed_stops_nothing(live: Home, monkeypatch: Any) -> None:
    file = live.save("shop/one")
    watcher = orchestra.Watcher(live.path, orchestra.Backend())
    monkeypatch.setattr(orchestra, "find_first_link", lambda path: str(file))
    watcher._anchors.add(str(file))
    assert watcher.look() == {str(file)}


@pytest.mark.parametrize("kind", ["kqueue", "inotify"])
def test_many_saves_at_once_are_taken_in_turns_that_leave_the_sockets_theirs(
    live: Home, kind: str, monkeypatch: Any
) -> None:
    require(kind, monkeypatch)
    labels = live.save_many(3 * orchestra.EVENTS_PER_STEP)
    lookout = Lookout(live, kind)
    for label in labels:
        live.file(label).write_text(live.text(label, note="again"))
    turns = 0
    while len(lookout.saved) < len(labels):
        known = len(lookout.saved)
        assert lookout.turn(20)
        assert len(lookout.saved) <= known + orchestra.EVENTS_PER_STEP
        turns += 1
    assert turns >= 3


def save_in_place(file: Path, text: str) -> None:
    with open(file, "r+") as out:
        out.write(text)
        out.truncate()


def save_after_truncating(file: Path, text: str) -> None:
    with open(file, "w") as out:
        time.sleep(0.01)
        out.write(text)


def save_keeping_backup(file: Path, text: str) -> None:
    """Save as vim does with backup on and backupcopy=no."""
    file.rename(f"{file}~")
    file.write_text(text)


def save_without_backup(file: Path, text: str) -> None:
    """Save as vim does with backup off and backupcopy=no."""
    save_keeping_backup(file, text)
    os.unlink(f"{file}~")


def save_over_a_copy(file: Path, text: str) -> None:
    """Save as vim does with backupcopy=yes: through a swap file, keeping the inode."""
    swap = file.with_name(f".{file.name}.swp")
    swap.write_text("b0VIM")
    shutil.copy(file, f"{file}~")
    with open(file, "w") as out:
        out.write(text)
    swap.unlink()


def save_with_sed(file: Path, text: str) -> None:
    subprocess.run(["sed", "-i.bak", f"s/^- .*/{text.splitlines()[-1]}/", str(file)], check=True)


def save_with_vim(*settings: str) -> Callable[[Path, str], None]:
    def save(file: Path, text: str) -> None:
        if not shutil.which("vim"):
            pytest.skip("no vim here")
        commands = [f"+{one}" for one in (*(f"set {s}" for s in settings), f"%s/^- .*/{text.splitlines()[-1]}/", "wq")]
        subprocess.run(["vim", "-u", "NONE", "-es", *commands, str(file)], check=True, stdin=subprocess.DEVNULL)

    save.__name__ = "vim-" + "-".join(settings)
    return save


SAVES = [
    replace,
    save_in_place,
    save_after_truncating,
    save_keeping_backup,
    save_without_backup,
    save_over_a_copy,
    save_with_sed,
    save_with_vim("backup", "backupcopy=no"),
    save_with_vim("nobackup", "backupcopy=yes"),
]


@pytest.mark.parametrize("save", SAVES, ids=lambda save: save.__name__)
def test_every_way_to_save_is_noticed(live: Home, kind: str, save: Callable[[Path, str], Any]) -> None:
    file = live.save()
    live.save("shop/web")
    lookout = Lookout(live, kind)
    for note in ("other", "third"):
        save(file, live.text(note=note))
        lookout.expect(saved=["shop/api"])
    assert file.read_text() == live.text(note="third")


def test_an_emptied_file_is_reported_when_it_is_written_or_stays_empty(live: Home, kind: str) -> None:
    clock = Clock()
    known, new = live.save(), live.file("shop/web")
    lookout = Lookout(live, kind, functools.partial(orchestra.Watcher, monotonic=clock))
    for file in (known, new):
        file.write_text("")
    lookout.drain()
    (live.projects / "other").mkdir()  # has the watcher look at everything, and drop the watches it no longer needs
    lookout.drain()
    assert lookout.saved == set() and lookout.watcher.suspects.next_due() == clock.now + orchestra.RECHECK_PAUSE
    for file, label in ((known, "shop/api"), (new, "shop/web")):
        save_in_place(file, live.text(label, "whole"))
    lookout.expect(saved=["shop/api", "shop/web"])
    assert lookout.watcher.suspects.next_due() is None
    known.write_text("")
    lookout.drain()
    started, looks = clock.now, 0
    while not lookout.saved:
        due = lookout.watcher.suspects.next_due()
        assert due is not None and clock.now < due <= started + orchestra.DEBOUNCE_WINDOW
        clock.now, looks = due, looks + 1
        lookout.take(lookout.watcher.recheck())
    assert clock.now == started + orchestra.DEBOUNCE_WINDOW and looks < 10
    lookout.expect(saved=["shop/api"])
    known.unlink()
    new.write_text("")
    lookout.drain()
    new.unlink()
    lookout.expect(deleted=["shop/api", "shop/web"])
    assert lookout.watcher.suspects.next_due() is None


def test_without_events_an_emptied_file_is_looked_at_again_in_time(live: Home) -> None:
    clock = Clock()
    file = live.save()
    lookout = Lookout(live, "polling", functools.partial(orchestra.Watcher, monotonic=clock))
    file.write_text("")
    lookout.drain()
    file.write_text(live.text(note="whole"))
    assert lookout.watcher.recheck() == set()
    clock.now += orchestra.RECHECK_PAUSE
    assert lookout.watcher.recheck() == {str(file)}


@pytest.mark.skipif(not IS_LINUX, reason="inotify is Linux's")
def test_a_file_that_is_open_for_writing_is_reported_when_it_is_closed_or_takes_too_long(live: Home) -> None:
    clock = Clock()
    file = live.save()
    lookout = Lookout(live, "inotify", functools.partial(orchestra.Watcher, monotonic=clock))
    with open(file, "w") as out:
        for line in live.text(note="whole").splitlines(keepends=True):
            out.write(line)
            out.flush()
            file.chmod(0o600)
            lookout.drain()
            assert lookout.saved == set()
    lookout.expect(saved=["shop/api"])
    with open(file, "a") as out:
        for number in range(2):
            out.write(f"- more {number}\n")
            out.flush()
            lookout.drain()
            assert lookout.saved == set()
            clock.now += orchestra.DEBOUNCE_WINDOW
            lookout.take(lookout.watcher.recheck())
            lookout.expect(saved=["shop/api"])
    assert lookout.watcher.suspects.next_due() is None


# What is done to a registry, a line each: paths are below projects/, or below ~ (the codebases' folder). What stands
# before the empty line is there when the watcher starts. After -> is what it reports as saved (+) and deleted (-).
SCENES = {
    "Markdown, local sisters and shared layers": """
        write shop/api.yaml

        write shop/api.md -> +shop/api.md
        replace shop/api.md -> +shop/api.md
        move shop/api.md shop/web.md -> +shop/web.md -shop/api.md
        remove shop/web.md -> -shop/web.md
        write shop/api.local.yaml -> +shop/api.local.yaml
        write shop/project.local.md -> +shop/project.local.md
        remove shop/api.local.yaml -> -shop/api.local.yaml
        write all.md -> +all.md
        write all.local.yaml -> +all.local.yaml
        replace all.md -> +all.md
        write all.md -> +all.md
        remove all.md -> -all.md
    """,
    "Markdown by a link": """
        write ~/api.md
        write shop/api.yaml
        link shop/api.md ~/api.md

        write ~/api.md -> +shop/api.md
        replace ~/api.md -> +shop/api.md
        remove ~/api.md -> -shop/api.md
        write ~/api.md -> +shop/api.md
    """,
    "a folder below a project's": """
        write shop/api.yaml

        write shop/more/python.md -> +shop/more/python.md
        write shop/more/python.md -> +shop/more/python.md
        replace shop/more/python.md -> +shop/more/python.md
        write shop/.git/python.md ->
        write shop/more/deep/go.md -> +shop/more/deep/go.md
        remove shop/more/deep -> -shop/more/deep/go.md
        move shop/more shop/pieces -> +shop/pieces/python.md -shop/more/python.md
        write shop/pieces/python.md -> +shop/pieces/python.md
        remove shop/pieces/python.md -> -shop/pieces/python.md
        write shop/pieces/rust.md -> +shop/pieces/rust.md
        remove shop/pieces -> -shop/pieces/rust.md
        write ~/team/pieces/go.md
        link shop/pieces ~/team/pieces -> +shop/pieces/go.md
        write ~/team/pieces/go.md -> +shop/pieces/go.md
        move ~/team ~/gone -> -shop/pieces/go.md
        move shop ~/shop -> -shop/api.yaml
    """,
    "a folder below a project's from the start": """
        write shop/more/python.md
        write shop/more/rust.md

        write shop/more/python.md -> +shop/more/python.md
        move shop store -> +store/more/python.md +store/more/rust.md -shop/more/python.md -shop/more/rust.md
        write store/more/python.md -> +store/more/python.md
    """,
    "files made, removed and renamed": """
        write shop/api.yaml

        write shop/web.yaml -> +shop/web.yaml
        move shop/web.yaml shop/app.yaml -> +shop/app.yaml -shop/web.yaml
        remove shop/app.yaml -> -shop/app.yaml
        write shop/app.yaml -> +shop/app.yaml
        write astray.yml -> +astray.yml
        replace shop/app.yaml
        move shop/app.yaml shop/api.yaml -> +shop/api.yaml -shop/app.yaml
    """,
    "folders made, removed and renamed": """

        write shop/api.yaml -> +shop/api.yaml
        remove shop -> -shop/api.yaml
        write shop/api.yaml -> +shop/api.yaml
        remove shop
        write shop/api.yaml -> +shop/api.yaml
        move shop store -> +store/api.yaml -shop/api.yaml
        replace store/api.yaml -> +store/api.yaml
        write store/api.yaml -> +store/api.yaml
        move store ~/away -> -store/api.yaml
        write ~/away/api.yaml
        move ~/away back -> +back/api.yaml
        write back/api.yaml -> +back/api.yaml
    """,
    "a linked folder": """
        write ~/team/shop/api.yaml

        link shop ~/team/shop -> +shop/api.yaml
        write ~/team/shop/api.yaml -> +shop/api.yaml
        remove ~/team -> -shop/api.yaml
        write ~/team/shop/api.yaml -> +shop/api.yaml
        move ~/team ~/away -> -shop/api.yaml
        move ~/away ~/team -> +shop/api.yaml
        replace ~/team/shop/api.yaml -> +shop/api.yaml
    """,
    "a linked folder that comes back step by step": """
        link shop.d ~/team/shop

        make ~/team ->
        make ~/team/shop -> +shop.d
        write ~/team/shop/api.yaml -> +shop.d/api.yaml
    """,
    "a linked file": """
        write ~/api.yaml
        make shop
        link shop/api.yaml ~/api.yaml

        write ~/api.yaml -> +shop/api.yaml
        replace ~/api.yaml -> +shop/api.yaml
        remove ~/api.yaml -> -shop/api.yaml
        write ~/api.yaml -> +shop/api.yaml
    """,
    "a file linked meanwhile": """
        write ~/api.yaml
        make shop

        link shop/api.yaml ~/api.yaml -> +shop/api.yaml
        write ~/api.yaml -> +shop/api.yaml
    """,
    "a link by way of another link": """
        write ~/v1/shop/api.yaml
        write ~/v2/shop/api.yaml
        link-beside ~/current ~/v1
        link shop ~/current/shop

        link-beside ~/next ~/v2
        move ~/next ~/current -> +shop/api.yaml
    """,
    "a registry that is replaced": """
        write shop/api.yaml
        write shop/web.yaml

        move . ~/old -> -shop/api.yaml -shop/web.yaml
        make . ->
        write shop/api.yaml -> +shop/api.yaml
        move . ~/older
        move ~/old . -> +shop/api.yaml +shop/web.yaml
        write shop/web.yaml -> +shop/web.yaml
    """,
    "a registry that is a link": """
        write shop/api.yaml
        move . ~/registry
        link . ~/registry

        replace shop/api.yaml -> +shop/api.yaml
        move ~/registry ~/away -> -shop/api.yaml
        move ~/away ~/registry -> +shop/api.yaml
        write shop/api.yaml -> +shop/api.yaml
    """,
    "a project's folder replaced by another": """
        write shop/api.yaml
        write blog/web.yaml
        write ~/elsewhere/new.yaml

        move shop ~/old
        move ~/elsewhere shop -> +shop/new.yaml -shop/api.yaml
        write ~/old/api.yaml
        write shop/new.yaml -> +shop/new.yaml
    """,
    "a project's folder replaced by a link": """
        write shop/api.yaml
        write blog/web.yaml
        write ~/team/shop/new.yaml

        move shop ~/old
        link shop ~/team/shop -> +shop/new.yaml -shop/api.yaml
        write ~/old/api.yaml
        write ~/team/shop/new.yaml -> +shop/new.yaml
        move ~/team ~/gone -> -shop/new.yaml
        write ~/team/shop/new.yaml -> +shop/new.yaml
    """,
    "a project's folder replaced by a file": """
        write shop/api.yaml
        write blog/web.yaml

        move shop ~/old
        write shop -> -shop/api.yaml
        write ~/old/api.yaml ->
    """,
    "a project's folder moved away": """
        write shop/api.yaml
        write blog/web.yaml

        move shop ~/old -> -shop/api.yaml
        write ~/old/api.yaml ->
    """,
}


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
def test_what_is_done_to_the_registry_is_noticed(live: Home, kind: str, scene: str) -> None:
    before, after = scene.split("\n\n")
    for line in before.splitlines():
        act_out(live, line)
    lookout = Lookout(live, kind)
    for line in after.splitlines():
        act, arrow, reported = line.partition("->")
        act_out(live, act)
        names = reported.split()
        if names:
            lookout.expect([n[1:] for n in names if n[0] == "+"], [n[1:] for n in names if n[0] == "-"])
        elif arrow:
            lookout.drain()
            assert (lookout.saved, lookout.deleted) == (set(), set()) and lookout.is_true_to_disk()


def act_out(live: Home, line: str) -> None:
    """Do what a line of a scene says."""
    verb, *names = line.split() or [""]
    paths = [live.code / name[2:] if name.startswith("~/") else live.projects / name for name in names]
    if verb == "write":
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(new_text())
    elif verb == "replace":
        replace(paths[0], new_text())
    elif verb == "make":
        paths[0].mkdir()
    elif verb == "remove":
        shutil.rmtree(paths[0]) if paths[0].is_dir() else paths[0].unlink()
    elif verb == "move":
        paths[0].rename(paths[1])
    elif verb:
        paths[0].symlink_to(paths[1] if verb == "link" else paths[1].name)


def new_text() -> str:
    return f"note {os.urandom(4).hex()}"


@pytest.mark.parametrize("is_linked", [False, True], ids=["in the registry", "linked from it"])
def test_a_git_checkout_of_many_files_is_noticed(live: Home, kind: str, is_linked: bool) -> None:
    repository = live.code / "team" if is_linked else live.projects
    repository.mkdir(exist_ok=True)
    run_git(repository, "init", "-q")
    whole = {f"shop/c{number}.yaml": f"one {number}" for number in range(30)}
    changed = {f"shop/c{number}.yaml": f"two {number}, and longer" for number in range(20)}
    for branch, files, gone in (("one", whole, ()), ("two", changed, ["shop/c29.yaml"]), ("none", {}, ["shop"])):
        run_git(repository, "checkout", "-qb", branch)
        put_files(repository, files)
        if gone:
            run_git(repository, "rm", "-qr", *gone)
        run_git(repository, "add", ".")
        run_git(repository, "commit", "-qm", branch)
    run_git(repository, "checkout", "-q", "one")
    if is_linked:
        (live.projects / "shop").symlink_to(repository / "shop")
    lookout = Lookout(live, kind)
    assert len(lookout.files()) == 30
    run_git(repository, "checkout", "-q", "two")
    lookout.expect(changed, ["shop/c29.yaml"])
    run_git(repository, "checkout", "-q", "none")
    lookout.expect(deleted=whole.keys() - {"shop/c29.yaml"})
    run_git(repository, "checkout", "-q", "one")
    lookout.expect(whole)


def test_many_files_at_once_are_noticed(live: Home, kind: str) -> None:
    lookout = Lookout(live, kind)
    labels = live.save_many(300)
    lookout.expect(saved=labels)
    for label in labels:
        save_in_place(live.file(label), f"in place {label}")
    lookout.expect(saved=labels)


def test_an_edit_of_the_same_size_and_time_is_noticed(live: Home, kind: str) -> None:
    file = live.save(note="one")
    before = file.stat()
    lookout = Lookout(live, kind)
    save_in_place(file, live.text(note="two"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and file.stat().st_mtime_ns == before.st_mtime_ns
    lookout.expect(saved=["shop/api"])


def save_with_known_stamp(live: Home, file: Path, age: float) -> orchestra.Watcher:
    """Save a file with a stamp that the watcher knows, as where a file system's clock ticks slowly."""
    changed = max(file.stat().st_mtime, file.stat().st_ctime)
    watcher = orchestra.Watcher(live.path, orchestra.Backend(), clock=lambda: changed + age)
    watcher.look()
    save_in_place(file, live.text(note="two"))
    info = file.stat()
    stamp = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
    seen = watcher._snapshot[str(file.parent)]
    seen[str(file)] = seen[str(file)]._replace(stamp=stamp)
    return watcher


def test_a_file_with_an_event_is_read_even_if_its_stamp_is_known(live: Home) -> None:
    file = live.save(note="one")
    watcher = save_with_known_stamp(live, file, 100)
    assert watcher.look({str(file.parent)}) == set()
    assert watcher.look({str(file)}) == {str(file)}


@pytest.mark.parametrize(("age", "is_read"), [(0.0, True), (1.9, True), (60.0, False)])
def test_a_young_file_is_read_whatever_its_stamp(live: Home, age: float, is_read: bool) -> None:
    watcher = save_with_known_stamp(live, live.save(note="one"), age)
    assert bool(watcher.look()) == is_read


def test_what_is_not_a_registry_file_is_passed_over(live: Home, kind: str) -> None:
    live.save()
    lookout = Lookout(live, kind)
    for name in (".hidden.yaml", "#lock.yaml", "api.yaml~", "api.yaml.swp", "4913", "api.md~", ".api.md.swp"):
        (live.projects / "shop" / name).write_text("x")
        lookout.drain()
    (live.projects / "shop" / "api.yaml").chmod(0o600)
    live.file().touch()
    lookout.drain()
    assert (lookout.saved, lookout.deleted) == (set(), set())
    assert list(lookout.files()) == ["shop/api.yaml"]


def test_looking_wakes_nobody(live: Home, kind: str) -> None:
    labels = live.save_many(20)
    lookout = Lookout(live, kind)
    lookout.take(lookout.watcher.look())
    for label in labels:
        live.file(label).read_text()
    assert lookout.turn() is False
    assert (lookout.saved, lookout.deleted) == (set(), set())


@pytest.mark.skipif(not IS_LINUX, reason="inotify is Linux's")
def test_after_an_overflow_of_inotify_everything_is_looked_at(live: Home) -> None:
    files = [live.save("shop/api"), live.save("shop/web")]
    lookout = Lookout(live, "inotify")
    for _ in range(int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())):
        for file in files:
            os.utime(file)
    live.save("new/api")
    lookout.expect(saved=["new/api"])


def test_what_finds_no_descriptor_is_polled(live: Home, kqueue: None) -> None:
    live.save_many(5)
    watcher = orchestra.Watcher(live.path, orchestra.KqueueBackend(4))
    watcher.look()
    assert watcher.must_poll and watcher.interval == orchestra.POLL_INTERVAL
    save_in_place(live.file("p4/c4"), "other")
    assert watcher.look() == {str(live.file("p4/c4"))}
    for label in ("p2/c2", "p3/c3", "p4/c4", "p1/c1"):
        live.file(label).unlink()
        live.file(label).parent.rmdir()
    watcher.look()
    watcher.look()
    watcher.backend.close()


@pytest.mark.parametrize("kind", ["kqueue", "inotify"])
def test_watches_of_what_is_gone_are_dropped(live: Home, kind: str, monkeypatch: Any) -> None:
    require(kind, monkeypatch)
    live.save()
    lookout = Lookout(live, kind)

    def count_watches() -> int:
        if kind == "kqueue":
            return len(os.listdir("/dev/fd"))
        return Path(f"/proc/self/fdinfo/{lookout.backend.fileno()}").read_text().count("inotify wd:")

    before = count_watches()
    for turn in range(5):
        live.save_many(20)
        lookout.expect(saved=["p0/c0"])
        for number in range(10):
            (live.projects / f"p{number}").rename(live.code / f"gone {turn} {number}")  # the kernel keeps their watches
        lookout.expect(deleted=["p0/c0"])
    assert count_watches() == before
    descriptors = len(os.listdir("/dev/fd"))
    lookout.close()
    assert len(os.listdir("/dev/fd")) < descriptors


@pytest.mark.parametrize(
    ("wanted", "name"),
    [("", None), ("polling", "polling"), ("kqueue", "kqueue"), ("inotify", "inotify"), ("Polling", ""), ("x", "")],
)
def test_a_backend_is_opened_by_name_or_the_best(wanted: str, name: Optional[str]) -> None:
    best = "kqueue" if HAS_KQUEUE else "inotify" if IS_LINUX else "polling"
    if name == "" or (name in ("kqueue", "inotify") and name != best):
        with pytest.raises(orchestra.NotifyError, match=f"ORCHESTRA_WATCHER: .*, got '{wanted}'"):
            orchestra.open_backend(wanted, 4096)
        return
    source = orchestra.open_backend(wanted, 4096)
    assert source.name == (name or best)
    source.close()


@pytest.mark.skipif(not IS_LINUX, reason="inotify is Linux's")
def test_a_backend_asked_for_that_is_not_available_is_an_error() -> None:
    with without_descriptors(), pytest.raises(orchestra.NotifyError):
        orchestra.open_backend("inotify", 4096)


@contextmanager
def without_descriptors() -> Iterator[None]:
    """Let this process open no more files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


class Meddler(orchestra.Backend):
    """A backend on whose first watch of a folder something happens just before it is set."""

    def __init__(self, folder: Path, act: Callable[[], None]) -> None:
        self.folder = str(folder)
        self.act: Optional[Callable[[], None]] = act
        self.watched: set[str] = set()

    def fileno(self) -> int:
        return 0

    def watch(self, path: str, is_file: bool = False) -> bool:
        if path == self.folder and self.act:
            act, self.act = self.act, None
            act()
        os.stat(path)
        self.watched.add(path)
        return True


def test_a_link_whose_target_comes_back_while_it_is_anchored_is_watched(live: Home) -> None:
    target = live.code / "team" / "shop"
    (live.projects / "shop").symlink_to(target)
    # The folder above the target is made just before the watch on the one above that is set.
    source = Meddler(live.code, (live.code / "team").mkdir)
    orchestra.Watcher(live.path, source).look()
    assert str(live.code / "team") in source.watched


def test_a_file_that_is_made_just_before_its_folder_is_watched_is_in_the_snapshot(live: Home) -> None:
    live.save("shop/api")
    late = live.file("shop/web")
    source = Meddler(late.parent, lambda: replace(late, live.file("shop/api").read_text()))
    assert str(late) in orchestra.Watcher(live.path, source).look()


def test_an_event_of_a_projects_folder_is_a_look_at_that_alone(live: Home, monkeypatch: Any) -> None:
    live.save_many(30)
    watcher = orchestra.Watcher(live.path, orchestra.Backend())
    watcher.look()
    looked: list[str] = []
    real = orchestra.list_folder
    monkeypatch.setattr(orchestra, "list_folder", lambda folder: [looked.append(folder), real(folder)][1])
    live.save("p3/c3", "second")
    changed = watcher.look({str(live.projects / "p3")})
    assert changed == {str(live.file("p3/c3"))}
    assert looked == [str(live.projects / "p3")]


# At random


class Churn:
    """Creates, saves, renames and deletes files and folders of a registry at random."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.count = 0

    def run(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.step()

    def step(self) -> None:
        self.count += 1
        text = f"{self.count}" * self.random.randint(1, 40)
        acts: list[Callable[[], Any]] = [
            lambda: self.folder().mkdir(),
            lambda: self.file().write_text(text),
            lambda: self.file().write_text(text),
            lambda: replace(self.file(), text),
            lambda: replace(self.file(), text),
            lambda: save_in_place(self.file(), text),
            lambda: save_in_place(self.file(), text),
            lambda: self.file().unlink(),
            lambda: self.file().rename(self.file()),
            lambda: self.folder().rename(self.folder()),
            lambda: shutil.rmtree(self.folder()),
        ]
        try:
            self.random.choice(acts)()
        except OSError:
            pass  # that file does not exist now
        time.sleep(self.random.choice((0, 0, 0.001, 0.003)))

    def folder(self) -> Path:
        return self.root / self.random.choice(("p", "q", "r", "p/more"))

    def file(self) -> Path:
        return self.folder() / self.random.choice(("a.yaml", "b.yaml", "c.yaml", "a.md"))


def is_stale_after_churn(lookout: Lookout, seed: int, seconds: float) -> bool:
    churn = Churn(lookout.live.projects, seed)
    thread = threading.Thread(target=churn.run, args=(seconds,))
    thread.start()
    while thread.is_alive():
        lookout.turn(0.005)
    lookout.drain()
    return not lookout.is_true_to_disk()


@pytest.mark.parametrize("seed", [1, 2])
def test_the_snapshot_equals_the_disk_after_random_changes(live: Home, kind: str, seed: int) -> None:
    lookout = Lookout(live, kind)
    assert not is_stale_after_churn(lookout, seed, 1.5)
    assert lookout.backend.fileno() < 0 or not lookout.watcher.must_poll


class FoldersOnly(orchestra.KqueueBackend):
    def watch(self, path: str, is_file: bool = False) -> bool:
        return not is_file and super().watch(path)


class RegisteringLate(orchestra.KqueueBackend):
    """Registers after the scan, 5 ms late."""

    def __init__(self, budget: int) -> None:
        super().__init__(budget)
        self.late: list[tuple[str, bool]] = []

    def watch(self, path: str, is_file: bool = False) -> bool:
        self.late.append((path, is_file))
        return False

    def fileno(self) -> int:
        late, self.late = self.late, []
        time.sleep(0.005 if late else 0)
        for path, is_file in dict.fromkeys(late):
            with contextlib.suppress(OSError):
                super().watch(path, is_file)
        return super().fileno()


@pytest.mark.parametrize("backend", [orchestra.KqueueBackend, FoldersOnly, RegisteringLate])
def test_a_save_right_after_the_scan_tells_sound_watchers_from_unsound(live: Home, kqueue: None, backend: Any) -> None:
    lookout = Lookout(live, backend(4096))
    file = live.write_registry("p/a.yaml", "old")
    wait_until(lambda: lookout.turn() and "p/a.yaml" in lookout.files())
    save_in_place(file, "a longer text")
    lookout.drain()
    assert lookout.is_true_to_disk() is (backend is orchestra.KqueueBackend)


@pytest.mark.soak
@pytest.mark.parametrize("backend", [FoldersOnly, RegisteringLate])
def test_the_random_changes_catch_unsound_watchers(live: Home, kqueue: None, backend: Any) -> None:
    lookout = Lookout(live, backend(4096))
    assert any(is_stale_after_churn(lookout, seed, 0.03) for seed in range(300))


# Debouncing


@pytest.mark.parametrize(
    ("notes", "fired"),
    [
        ([0], [0]),  # the first fires at once
        ([0, 100], [0, 500]),  # what comes inside the window fires when it closes
        ([0, 100, 200, 300, 499], [0, 500]),
        ([0, 500], [0, 500]),  # the window is over
        ([0, 499, 501], [0, 500, 1000]),
        ([0, 600], [0, 600]),
        ([0, 100, 600, 700], [0, 500, 1000]),
        (list(range(0, 2000, 20)), [0, 500, 1000, 1500, 2000]),
    ],
)
def test_debounce_coalesces_rapid_events(notes: list[int], fired: list[int]) -> None:
    clock = Clock(0)
    debouncer = orchestra.Debouncer(0.5, clock)
    seen: list[int] = []
    for now in range(3000):
        clock.now = now / 1000
        if now in notes:
            debouncer.note(["api"])
        due = debouncer.next_due()
        if due is not None and due <= clock.now:
            assert debouncer.take_due() == {"api"}
            seen.append(now)
        else:
            assert debouncer.take_due() == set()
    assert seen == fired
    assert max(seen) >= max(notes)
    assert debouncer.next_due() is None


def test_a_key_whose_window_is_ended_fires_at_its_next_note() -> None:
    clock = Clock()
    debouncer = orchestra.Debouncer(0.5, clock)
    debouncer.note(["api", "web"])
    assert debouncer.take_due() == {"api", "web"}
    debouncer.end_window(["api", "never noted"])
    assert debouncer.next_due() is None
    debouncer.note(["api", "web"])
    assert debouncer.take_due() == {"api"}


STAMP = orchestra.Stamp(*range(5))


def test_a_suspect_is_looked_at_again_after_pauses_that_double() -> None:
    clock = Clock(0)
    suspects = orchestra.Suspects(0.5, clock)
    for found in ({"api": STAMP}, {"api": STAMP._replace(mtime=5)}):  # the second time all begins anew
        started, looks = clock.now, []
        suspects.add(found)
        while not suspects.find_overdue():
            due = suspects.next_due()
            assert due is not None and suspects.take_due() == set()
            clock.now = due
            looks.append(round((clock.now - started) * 1000))
            taken = suspects.take_due()
            assert taken == {"api"} == set(suspects) and suspects.next_due() is None
            suspects.add(found)
            suspects.discard_unrenewed(taken)
        assert suspects.find_overdue() == found and looks == [4, 8, 16, 32, 64, 128, 256, 500]
    clock.now = suspects.next_due() or 0  # if it does not count yet, nor does it make the loop spin
    assert (round((clock.now - started) * 1000), suspects.take_due()) == (1000, {"api"})
    suspects.discard_unrenewed(["api"])
    assert set(suspects) == set()


def test_a_suspect_that_keeps_changing_is_looked_at_once_per_window_in_the_end() -> None:
    clock, looks = Clock(0), []
    suspects = orchestra.Suspects(0.5, clock)
    suspects.add({"api": STAMP})
    while len(looks) < 1000 and clock.now < 5:  # a program writes it all the time
        clock.now = suspects.next_due() or 0
        assert suspects.take_due() == {"api"}
        looks.append(clock.now)
        suspects.add({"api": STAMP._replace(size=len(looks))})
    assert clock.now >= 5 and sum(at > 2 for at in looks) <= 7
    suspects.discard(["api"])
    suspects.add({"api": STAMP})
    assert suspects.next_due() == pytest.approx(clock.now + orchestra.RECHECK_PAUSE)


def test_an_event_has_a_suspect_looked_at_soon_but_not_for_longer() -> None:
    clock = Clock(0)
    suspects = orchestra.Suspects(0.5, clock)
    suspects.add({"api": STAMP, "web": STAMP})
    clock.now = 0.1
    suspects.add({"api": STAMP})
    assert suspects.take_due() == {"web"}
    suspects.discard_unrenewed(["web"])
    suspects.discard(["api"])
    assert (set(suspects), suspects.next_due()) == (set(), None)
    suspects.add({"web": STAMP})
    clock.now = 0.7  # the loop was kept from looking
    suspects.add({"web": STAMP})  # it polls everything first
    assert (suspects.take_due(), suspects.find_overdue()) == ({"web"}, {"web": STAMP})


def test_keys_are_debounced_independently() -> None:
    clock = Clock()
    debouncer = orchestra.Debouncer(0.5, clock)
    debouncer.note(["api", "web"])
    assert debouncer.take_due() == {"api", "web"}
    clock.now += 0.2
    debouncer.note(["api", "app"])
    assert debouncer.take_due() == {"app"}
    assert debouncer.next_due() == 1000.5
    clock.now = 1000.5
    debouncer.note(["app"])
    assert debouncer.take_due() == {"api"}
    assert debouncer.next_due() == pytest.approx(1000.7)
    clock.now += 10
    assert debouncer.take_due() == {"app"}
    assert (debouncer.take_due(), debouncer.next_due()) == (set(), None)


def test_of_too_many_keys_those_that_have_waited_longest_fire_first() -> None:
    clock = Clock()
    debouncer = orchestra.Debouncer(0.5, clock)
    for keys in (["web"], ["app", "api"], ["web"]):
        debouncer.note(keys)
    assert debouncer.take_due(1) == {"web"}
    debouncer.note(["web"])
    assert debouncer.next_due() == 0.0  # at once
    assert debouncer.take_due(3) == {"app", "api"}
    assert debouncer.next_due() == clock.now + 0.5


# ── 29 Logs ───────────────────────────────────────────────────────────────────


STREAMS = {
    "both to one file": ("out", "out"),
    "each to its log": ("daemon.log", "daemon-err.log"),
    "both to daemon.log": ("daemon.log", "daemon.log"),
}


@pytest.mark.parametrize(("out_name", "err_name"), STREAMS.values(), ids=STREAMS)
def test_a_line_is_once_in_each_log_and_stream(live: Home, out_name: str, err_name: str) -> None:
    live.save("shop/api").write_text("name: api\npath: [")
    logs = Path(orchestra.logs_dir(live.path))
    logs.mkdir()
    with open(logs / out_name, "ab") as out, open(logs / err_name, "ab") as err:
        daemon = live.start_daemon(stdout=out, stderr=err)
    live.wait_for_start_job()
    wait_until(lambda: "WARNING" in live.errors())
    live.stop(daemon)
    info, warnings = live.log().splitlines(), live.errors().splitlines()
    assert [line.split()[1] for line in warnings] == ["WARNING"] * len(warnings)
    assert set(warnings) <= set(info) and len(info) > len(warnings) >= 1 and " stopped " in info[-1]
    assert len(set(info)) == len(info) and len(set(warnings)) == len(warnings)
    assert (logs / out_name).read_text().splitlines() == info
    assert all(line[:4].isdigit() and line[23] == "Z" for line in info)


def test_a_new_log_is_its_owners_alone(live: Home) -> None:
    orchestra.Log(live.path).close()
    assert stat.S_IMODE(os.stat(orchestra.stdout_log_path(live.path)).st_mode) == 0o600


WRITE_LOG = """
import sys
sys.path[:0] = [sys.argv[1]]
import orchestra
log = orchestra.Log(sys.argv[2], limit=4000)
for number in range(int(sys.argv[3])):
    (log.warning if number % 2 else log.info)("line", number=number)
"""


@pytest.mark.parametrize("is_stream", [False, True], ids=["apart", "streams are the logs"])
@pytest.mark.parametrize("count", [300, 1500])
def test_rotation_loses_and_doubles_nothing(live: Home, is_stream: bool, count: int) -> None:
    os.mkdir(orchestra.logs_dir(live.path))
    out_path, err_path = orchestra.stdout_log_path(live.path), orchestra.stderr_log_path(live.path)
    if not is_stream:
        out_path, err_path = str(live.folder / "out"), str(live.folder / "err")
    with open(out_path, "ab") as out, open(err_path, "ab") as err:
        subprocess.run(
            [sys.executable, "-c", WRITE_LOG, str(HERE), live.path, str(count)], check=True, stdout=out, stderr=err
        )
    names = [*(f"daemon.log.{number}" for number in (5, 4, 3, 2, 1)), "daemon.log"]
    files = [file for name in names if (file := Path(orchestra.logs_dir(live.path), name)).exists()]
    numbers = [int(line.rpartition("number=")[2]) for file in files for line in file.read_text().splitlines()]
    assert numbers == list(range(count - len(numbers), count))
    assert all(file.stat().st_size <= 4000 for file in files)
    if count == 300:
        assert len(numbers) == count
    else:
        assert len(files) == len(names)
    if not is_stream:
        told = [int(line.rpartition("=")[2]) for line in Path(out_path).read_text().splitlines()]
        assert told == list(range(count))


def write_logs(live: Home, count: int = 10) -> None:
    os.makedirs(orchestra.logs_dir(live.path), exist_ok=True)
    for path, name in ((orchestra.stdout_log_path(live.path), "out"), (orchestra.stderr_log_path(live.path), "err")):
        with open(path, "a") as file:
            file.writelines(f"{name} {number}\n" for number in range(count))


@pytest.mark.parametrize(
    ("argv", "out"),
    [
        (
            ("--lines", "2"),
            "==> ~/.orchestra/logs/daemon.log <==\nout 8\nout 9\n"
            "==> ~/.orchestra/logs/daemon-err.log <==\nerr 8\nerr 9\n",
        ),
        (("--lines", "2", "--stderr-only"), "err 8\nerr 9\n"),
        (("--lines", "0", "--stderr-only"), ""),
        (("--lines", "99", "--stderr-only"), "".join(f"err {number}\n" for number in range(10))),
        (("--stderr-only",), "".join(f"err {number}\n" for number in range(10))),
    ],
    ids=range(5),
)
def test_daemon_logs_prints_the_end_of_both(live: Home, argv: tuple[str, ...], out: str) -> None:
    write_logs(live)
    ran = live.run_script("daemon", "logs", *argv)
    assert (ran.status, ran.out, ran.err) == (0, out, "")


def test_daemon_logs_without_logs_is_no_error(live: Home) -> None:
    ran = live.run_script("daemon", "logs", "--stderr-only")
    assert (ran.status, ran.out, ran.err) == (0, "", "")
    assert live.run_script("daemon", "logs", "--lines", "-1").status == 2


@pytest.mark.parametrize(
    ("data", "count", "tail"),
    [
        (b"", 3, b""),
        (b"a\nb\nc\n", 2, b"b\nc\n"),
        (b"a\nb\nc", 2, b"b\nc"),
        (b"a\nb\n", 2, b"a\nb\n"),
        (b"a\n", 0, b""),
        (b"\n\n\n", 2, b"\n\n"),
        (b"one\ntwo\rstill two\n", 1, b"two\rstill two\n"),
        (b"x" * 200_000 + b"\nlast\n", 1, b"last\n"),
        (b"x" * 200_000 + b"\nlast\n", 2, b"x" * 200_000 + b"\nlast\n"),
        (b"line\n" * 100_000, 50_000, b"line\n" * 50_000),
    ],
    ids=range(10),
)
def test_the_last_lines_are_read(live: Home, data: bytes, count: int, tail: bytes) -> None:
    file = live.code / "log"
    file.write_bytes(data)
    assert orchestra.LogReader(str(file)).tail(count) == tail


def test_the_last_lines_of_a_huge_file_come_at_once(live: Home) -> None:
    write_logs(live, 0)
    path = orchestra.stderr_log_path(live.path)
    os.truncate(path, 200 << 20)
    write_logs(live, 150)
    started = time.monotonic()
    tail = orchestra.LogReader(path).tail(100)
    assert time.monotonic() - started < 5
    assert tail.splitlines() == [f"err {number}".encode() for number in range(50, 150)]


@contextmanager
def following(live: Home, *argv: str) -> Iterator[Any]:
    follower = live.start("daemon", "logs", "-f", *argv, text=False)
    yield follower
    follower.send_signal(signal.SIGINT)
    assert follower.communicate(timeout=60)[1] == b""
    assert follower.returncode == 130


def test_following_goes_on_across_rotations(live: Home) -> None:
    write_logs(live, 2)
    path = orchestra.stderr_log_path(live.path)
    with following(live, "--stderr-only") as follower:
        assert [follower.stdout.readline() for _ in range(2)] == [b"err 0\n", b"err 1\n"]
        for number in range(8):
            with open(path, "a") as file:
                file.write(f"before {number}\n")
            orchestra.LogFile.rotate(path)
            with open(path, "a") as file:
                file.write(f"after {number}\n")
            for word in (b"before", b"after"):
                assert follower.stdout.readline() == b"%s %d\n" % (word, number)


def test_following_waits_for_a_log_that_is_not_there_yet(live: Home) -> None:
    with following(live) as follower:
        assert [follower.stdout.readline()[:3] for _ in range(2)] == [b"==>"] * 2  # it has looked at the first log
        write_logs(live, 2)
        assert [follower.stdout.readline() for _ in range(2)] == [b"out 0\n", b"out 1\n"]


def test_following_loses_nothing_between_the_tail_and_the_rest(live: Home) -> None:
    write_logs(live, 50_000)  # more than a pipe holds
    with following(live, "--stderr-only", "--lines", "50000") as follower:
        assert follower.stdout.readline() == b"err 0\n"
        with open(orchestra.stderr_log_path(live.path), "a") as file:
            file.write("meanwhile\n")
        lines = [follower.stdout.readline() for _ in range(49_999)]
        assert lines[-1] == b"err 49999\n"
        time.sleep(0.6)
        with open(orchestra.stderr_log_path(live.path), "a") as file:
            file.write("later\n")
        assert follower.stdout.readline() == b"meanwhile\n"


def test_two_rotations_between_two_looks_lose_no_line_that_is_kept(live: Home) -> None:
    write_logs(live, 1)
    path = orchestra.stderr_log_path(live.path)
    follower = orchestra.LogReader(path)
    assert follower.tail(1) == b"err 0\n"
    with open(path, "a") as file:
        file.write("old\n")
    orchestra.LogFile.rotate(path)
    with open(path, "a") as file:
        file.write("new\n")
    assert follower.read() == b"old\nnew\n"
    assert follower.read() == b""


# ── 30 Programs ───────────────────────────────────────────────────────────────


def test_a_program_is_ended_when_its_time_is_over() -> None:
    started = time.monotonic()
    assert orchestra.run_program(["sleep", "60"], 0.2) == (orchestra.TIMED_OUT, "no answer within 0.2 s")
    assert time.monotonic() - started < 10
    assert orchestra.run_program(["sh", "-c", "echo out; echo err >&2; exit 7"], 10) == (7, "out\nerr")
    assert orchestra.run_program(["/nowhere"], 10).code == orchestra.NOT_STARTED


def test_a_program_is_not_run_in_the_current_folder_nor_looked_up_there(machine: Machine) -> None:
    environ = {"PATH": f".::{machine.tools}:x:{os.environ['PATH']}:", "PYTHONPATH": ".", "PYTHONHOME": "kept"}
    machine.make_tool("say", 'pwd\necho "$PATH"\necho "${PYTHONPATH-none} $PYTHONHOME"')
    done = orchestra.run_program(["say"], 10, environ=environ)
    absolute = ":".join(folder for folder in os.environ["PATH"].split(":") if folder.startswith("/"))
    assert done == (0, f"/\n{machine.tools}:{absolute}\nnone kept")
    assert orchestra.run_program(["pwd"], 10, folder=machine.path).output == machine.path


class Notifying:
    """A notifier whose program notes down what it was told, and a clock of its own."""

    def __init__(self, home: Home, text: str = "") -> None:
        self.program = Path(orchestra.notify_path(home.path))
        self.told = home.folder / "told"
        put_files(self.program.parent, {"notify": text or f"#!/bin/sh\nprintf '%s|%s\\n' $# \"$@\" >>{self.told}\n"})
        self.program.chmod(0o700)
        self.clock = Clock()
        self.warnings: list[str] = []
        self.notifier = orchestra.Notifier(str(self.program), self.warn, self.clock)
        home.cleanup.callback(self.notifier.close)

    def warn(self, message: str, program: str, error: str) -> None:
        assert (message, program) == ("could not notify", str(self.program))
        self.warnings.append(error)

    def tell(self, *lines: str) -> str:
        """Have some lines told, and return all that was told so far."""
        for line in lines:
            self.notifier.add(line)
        self.notifier.step()
        wait_until(self.is_idle)
        return self.told.read_text() if self.told.exists() else ""

    def is_idle(self) -> bool:
        self.notifier.step()
        return self.notifier._running is None


def test_the_users_own_program_is_told_in_one_argument_that_no_shell_reads(home: Home) -> None:
    line = "--x 'a' \"b\" $(touch x) `y` ; \n \x00 \udcff"
    notifying = Notifying(home)
    assert notifying.tell(line) == f"1|orchestra: {orchestra.visible(line)}\n" and notifying.warnings == []
    assert notifying.notifier.next_due() is None


def test_a_storm_is_told_at_once_and_then_together(home: Home) -> None:
    notifying = Notifying(home)
    assert notifying.tell("first") == notifying.tell(*(f"line {number}" for number in range(100)))
    assert notifying.notifier.next_due() == notifying.clock.now + notifying.notifier.PAUSE
    notifying.clock.now += notifying.notifier.PAUSE
    _, *lines = notifying.tell().splitlines()
    assert lines == ["1|orchestra: line 0", *(f"line {number}" for number in range(1, 10)), "and 90 more"]


WRITABLE = "others may write to it"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda file: file.unlink(), None),
        (lambda file: file.chmod(0o720), WRITABLE),
        (lambda file: file.chmod(0o702), WRITABLE),
        (lambda file: os.chown(file, NOBODY, -1) if os.geteuid() == 0 else file.chmod(0o720), WRITABLE),
        (lambda file: [file.chmod(0o600), file.write_text("#!/bin/sh\n")], "not executable"),
        (lambda file: [file.unlink(), file.mkdir()], "expected a program, found none"),
        (lambda file: [file.unlink(), os.mkfifo(file)], "expected a program, found none"),
        (lambda file: [file.unlink(), file.symlink_to("/nowhere/x")], "no such file or directory"),
        (lambda file: file.write_text("told=1"), "exec format error"),
        (lambda file: file.write_text("#!/nowhere/x"), "no such file or directory"),
        (lambda file: file.write_text("#!/bin/sh\nexit 3"), "exit status 3"),
        (lambda file: file.write_text("#!/bin/sh\nkill -9 $$"), "ended by signal 9"),
    ],
    ids=range(12),
)
def test_a_program_that_cannot_be_trusted_or_started_is_a_warning(home: Home, change: Any, problem: str) -> None:
    notifying = Notifying(home)
    change(notifying.program)
    assert notifying.tell("x") == ""
    assert notifying.warnings == ([] if problem is None else [problem])


@pytest.mark.parametrize("ends", ["in time", "too late", "with the daemon"])
def test_a_program_that_hangs_is_ended_with_what_it_started_and_delays_nothing(home: Home, ends: str) -> None:
    notifying = Notifying(home, "#!/bin/sh\nsleep 100 & sleep 100\n")
    notifying.notifier.add("first")
    notifying.notifier.step()
    process = notifying.notifier._running
    notifying.clock.now += 9.9
    notifying.notifier.add("second")
    assert not notifying.is_idle() and notifying.notifier.next_due() == notifying.clock.now + notifying.notifier.LOOK
    if ends == "with the daemon":
        notifying.notifier.close()
        process.wait(20)
    else:
        notifying.clock.now += 0.2
        wait_until(lambda: notifying.is_idle() or notifying.notifier._running is not process)
        assert notifying.warnings == ["ended by signal 9"]
        assert notifying.notifier._running is not process  # the second message has its turn
    with pytest.raises(ProcessLookupError):  # neither it nor its child is there, or a zombie
        wait_until(lambda: os.killpg(process.pid, 0))


# ── 31 Control socket ─────────────────────────────────────────────────────────

STATUS = b'{"cmd":"status"}'
NOT_UTF8 = b'{"ok":false,"error":"request: expected UTF-8, got the byte 0xff"}\n'
TOO_LONG = b'{"ok":false,"error":"request: expected a line of at most 65536 bytes, got a longer one"}\n'


@pytest.mark.parametrize(
    ("data", "lines", "last"),
    [
        (b"", [], None),
        (b"one\n", [b"one"], None),
        (b"one\r\ntwo\r\n", [b"one", b"two"], None),
        (b"one\ntwo\nthree", [b"one", b"two"], b"three"),
        (b"\n\n", [b"", b""], None),
        (b"one\rtwo\n", [b"one\rtwo"], None),
        (b"no end\r", [], b"no end"),
        (b"x" * orchestra.MAX_LINE + b"\ny\n", [b"x" * orchestra.MAX_LINE, b"y"], None),
        (b"x" * orchestra.MAX_LINE, [], b"x" * orchestra.MAX_LINE),
    ],
    ids=range(9),
)
@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_lines_are_cut_whatever_the_pieces(data: bytes, lines: list[bytes], last: Optional[bytes], size: int) -> None:
    buffer = orchestra.LineBuffer()
    found = []
    for at in range(0, len(data), size):
        buffer.feed(data[at : at + size])
        found += list(iter(buffer.next_line, None))
    assert found == lines
    assert buffer.next_line(at_end=True) == last
    assert buffer.next_line(at_end=True) is None
    assert buffer._data == b""


@pytest.mark.parametrize("end", [b"", b"\n", b"\nmore\n"])
@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_a_line_too_long_ends_the_conversation(end: bytes, size: int) -> None:
    buffer = orchestra.LineBuffer()
    data = b"x" * (orchestra.MAX_LINE + 1) + end
    with pytest.raises(orchestra.ProtocolError, match="at most 65536 bytes") as error:
        for at in range(0, len(data), size):
            buffer.feed(data[at : at + size])
            assert buffer.next_line() is None
    assert error.value.closes


@pytest.mark.parametrize(
    ("line", "request_"),
    [
        (STATUS, ("status", None)),
        (b' { "cmd" : "stop" } ', ("stop", None)),
        (b'{"cmd":"sync"}', ("sync", None)),
        (b'{"cmd":"sync","codebase":null}', ("sync", None)),
        (b'{"cmd":"sync","codebase":"shop/api"}', ("sync", "shop/api")),
        (b'{"cmd":"sync","codebase":"../../etc"}', ("sync", "../../etc")),
        (b'{"cmd":"sync","codebase":"\\ud800"}', ("sync", "\ud800")),
        ('{"cmd":"sync","codebase":"größe","more":[1]}'.encode(), ("sync", "größe")),
        (b'{"cmd":"stop","cmd":"status"}', ("status", None)),
        (b'{"cmd":"status","pretty":true}', ("status", None, True)),
        (b'{"cmd":"status","pretty":1}', ("status", None)),
    ],
)
def test_a_request_is_understood(line: bytes, request_: tuple[Any, ...]) -> None:
    assert orchestra.parse_request(line) == orchestra.Request(*request_)


BAD_REQUESTS = [
    (b"hello", "request: expected JSON, got 'hello'"),
    (b"{", "request: expected JSON, got '{'"),
    (b'{"cmd":"status"} {}', "request: expected JSON, got"),
    (b"[" * 60000, "request: expected JSON, got '[[["),
    (b'{"a":' * 10000, "request: expected JSON, got"),
    (b"[]", "request: expected a JSON object, got '[]'"),
    (b"null", "request: expected a JSON object, got 'null'"),
    (b'"\\ud800"', "request: expected a JSON object"),
    (b"{}", "cmd: expected status, sync or stop, got 'null'"),
    (b'{"cmd":7}', "cmd: expected status, sync or stop, got '7'"),
    (b'{"cmd":{"a":[1]}}', "cmd: expected status, sync or stop, got"),
    (b'{"cmd":NaN}', "cmd: expected status, sync or stop, got 'NaN'"),
    (b'{"cmd":' + b"9" * 5000 + b"}", ""),
    (b'{"cmd":"Status"}', "cmd: expected status, sync or stop, got unknown command 'Status'"),
    (b'{"cmd":"\\ud800"}', "cmd: expected status, sync or stop, got unknown command"),
    (b'{"cmd":"' + b"x" * 60000 + b'"}', "cmd: expected status, sync or stop, got unknown command 'xxx"),
    (b'{"cmd":"sync","codebase":[]}', "codebase: expected text, got '[]'"),
    (b'{"cmd":"sync","codebase":1}', "codebase: expected text, got '1'"),
    (b"\x00", "request: expected JSON"),
    (b"\xef\xbb\xbf" + STATUS, "request: expected JSON"),
]


@pytest.mark.parametrize("text", ['{"cmd":%s}', '{"cmd":"sync","codebase":%s}', "%s"])
@pytest.mark.parametrize("brackets", ["[]", '{"":0}'])
def test_nesting_at_the_very_limit_of_the_parser_is_refused(text: str, brackets: str) -> None:
    opening, closing = brackets[:-1].rstrip("0"), brackets[-1]
    middle = "0" if closing == "}" else ""

    def nested(depth: int) -> str:
        return text % (opening * depth + middle + closing * depth)

    low, high = 1, 30000
    while high - low > 1:
        depth = (low + high) // 2
        try:
            json.loads(nested(depth))
            low = depth
        except RecursionError:
            high = depth
    for depth in range(max(1, low - 40), low + 10):
        with pytest.raises(orchestra.ProtocolError):
            orchestra.parse_request(nested(depth).encode())


def test_replies_are_lines_of_ascii() -> None:
    assert orchestra.encode_reply({"stopping": True}) == b'{"ok":true,"data":{"stopping":true}}\n'
    assert orchestra.encode_error("größe \ud800\n") == b'{"ok":false,"error":"gr\\u00f6\\u00dfe \\ud800\\n"}\n'


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b'{"ok":true,"data":{"running":true}}\n', ""),
        *(
            (b'{"ok":true,"data":%b}\n' % data, "expected a daemon's reply, got ")
            for data in (b"5", b"null", b"[1]", b'{"pid":"1"}', b'{"pid":1%b}' % (b"0" * 400), b'{"version":1}')
        ),
        *(
            (b'{"ok":true,"data":{"problems":%b}}\n' % problems, "expected a daemon's reply, got ")
            for problems in (b"1", b"[1]", b'["x"]', b'[{"where":"x"}]', b'[{"where":"x","message":1}]')
        ),
        (b'{"ok":false,"error":"what now"}\n', "what now"),
        (b"", "expected a reply, got the end of the connection"),
        (b'{"ok":true', "expected a reply, got the end of the connection"),
        (b"hello\n", "expected JSON, got 'hello"),
        (b"\xff\n", "expected JSON"),
        (b"[]\n", "expected a reply with ok, got"),
        (b"{}\n", "expected a reply with ok, got"),
    ],
)
def test_the_client_understands_replies(live: Home, reply: bytes, error: str) -> None:
    with answering(live, [reply]) as requests:
        if error:
            with pytest.raises(orchestra.ProtocolError, match=error):
                orchestra.send_request(live.path, {"cmd": "status"})
        else:
            assert orchestra.send_request(live.path, {"cmd": "status"}) == json.loads(reply).get("data")
    assert requests == [STATUS + b"\n"]


@pytest.mark.parametrize("data", [{}, {"version": orchestra.__version__}, [], {"started_at_unix": 10**400}])
@pytest.mark.parametrize("command", ["status", "daemon status", "daemon status --short", "doctor", "daemon stop"])
def test_a_reply_that_no_daemon_gives_is_no_traceback(live: Home, command: str, data: Any) -> None:
    with answering(live, [orchestra.encode_reply(data)]) as requests:
        ran = live.run(*command.split())
    assert "Traceback" not in ran.err and len(ran.complaints) <= 1 and len(requests) == 1
    assert "daemon: daemon" not in ran.out


@pytest.mark.parametrize("request_", [orchestra.request_status, orchestra.request_stop])
def test_the_client_asks_again_while_the_daemon_is_busy(live: Home, request_: Callable[[str], Any]) -> None:
    busy = orchestra.encode_error(f"{orchestra.TOO_MANY_CLIENTS} 4, got one more")
    with answering(live, [busy, busy, b'{"ok":true,"data":{"pid":7}}\n']) as requests:
        assert request_(live.path) == {"pid": 7}
    assert len(requests) == 3
    with answering(live, [busy] * 5), pytest.raises(orchestra.DaemonBusy):
        request_(live.path)


def test_the_client_gives_up_on_a_silent_daemon(live: Home) -> None:
    with answering(live, [None]), pytest.raises(orchestra.ProtocolError, match="timed out"):
        orchestra.send_request(live.path, {"cmd": "status"}, timeout=0.05)


@contextmanager
def answering(live: Home, replies: Sequence[Optional[bytes]], reads: bool = True) -> Iterator[list[bytes]]:
    """Answer at the control socket, one connection after the other; None is silence."""
    requests: list[bytes] = []

    def answer() -> None:
        for reply in replies:
            connection = opened.enter_context(listener.accept()[0])
            requests.append(read_line(connection) if reads else b"")
            if reply is not None:
                with contextlib.suppress(OSError):  # the client would not wait
                    connection.sendall(reply)
                connection.close()

    with ExitStack() as opened, socket.socket(socket.AF_UNIX) as listener:
        opened.callback(os.unlink, live.socket)
        listener.bind(live.socket)
        listener.listen()
        thread = threading.Thread(target=answer)
        thread.start()
        opened.callback(thread.join, 20)
        yield requests


def test_a_client_that_is_turned_away_while_it_sends_hears_why(live: Home) -> None:
    busy = orchestra.encode_error(f"{orchestra.TOO_MANY_CLIENTS} 4, got one more")
    with answering(live, [busy], reads=False), pytest.raises(orchestra.DaemonBusy):
        orchestra.send_request(live.path, {"cmd": "x" * 5_000_000})


@pytest.mark.skipif(not IS_LINUX, reason="elsewhere a full backlog refuses")
def test_a_backlog_that_is_full_means_busy(live: Home) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(live.socket)
        listener.listen(0)
        first.connect(live.socket)
        with pytest.raises(orchestra.DaemonBusy):
            orchestra.send_request(live.path, {"cmd": "status"})


def test_a_refused_connection_means_busy_while_the_daemons_lock_is_held(live: Home) -> None:
    """macOS refuses where more clients wait than the daemon takes; Linux does where it does not listen, as here."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(live.socket)
        lock = orchestra.try_lock(orchestra.daemon_lock_path(live.path))
        for ask in (orchestra.request_stop, orchestra.request_status):
            with pytest.raises(orchestra.DaemonBusy, match="is running, but did not accept the connection") as error:
                ask(live.path)
            assert error.value.hint == "run the command again"  # shown after "try:"
        os.close(lock)
        with pytest.raises(orchestra.DaemonNotRunning):
            orchestra.request_stop(live.path)


@pytest.mark.parametrize("stale", [{}, {"daemon.sock": make_socket}, {"daemon.sock": ""}, None], ids=str)
def test_without_a_daemon_the_client_says_so(live: Home, stale: Optional[dict[str, Any]]) -> None:
    root = Path(live.socket).parent
    if stale is None:
        shutil.rmtree(root)
    put_files(root, stale or {})
    with pytest.raises(orchestra.DaemonNotRunning, match="daemon is not running"):
        orchestra.request_stop(live.path)


class Channel:
    """A connection in memory, as the server sees it; a test is its other end."""

    def __init__(self, sent: bytes = b"", uid: Optional[int] = None) -> None:
        self.incoming = bytearray(sent)
        self.is_ended = False
        self.got = bytearray()
        self.room = 1 << 30  # bytes the other end will take
        self.is_closed = False
        self.uid = os.getuid() if uid is None else uid

    def setblocking(self, flag: bool) -> None:
        assert flag is False

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        if sys.platform == "darwin":
            return struct.pack("=IIhxx16I", 0, self.uid, 1, *[0] * 16)
        return struct.pack("3i", 1, self.uid, 1)

    def recv(self, size: int) -> bytes:
        assert not self.is_closed
        if not self.incoming and not self.is_ended:
            raise BlockingIOError
        data = bytes(self.incoming[:size])
        del self.incoming[:size]
        return data

    def send(self, data: bytes) -> int:
        taken = bytes(data[: self.room])
        if not taken:
            raise BlockingIOError
        self.room -= len(taken)
        self.got += taken
        return len(taken)

    def close(self) -> None:
        self.is_closed = True

    @property
    def replies(self) -> list[Any]:
        return [json.loads(line) for line in self.got.splitlines()]


class Exchange:
    """A server with its listener and selector in memory; clients are channels.

    It answers every request with its `cmd`, or as `handle` does.
    """

    def __init__(self, handle: Any = None, **options: Any) -> None:
        self.calling: list[Any] = []
        self.watched: dict[Any, tuple[int, Any]] = {}
        self.clock = Clock()
        self.server = orchestra.SocketServer(self, handle or self.answer, clock=self.clock, **options)
        self.server.listen(self)

    def answer(self, request: orchestra.Request, client: orchestra.Client) -> None:
        client.unsent += orchestra.encode_reply(request.cmd)

    def accept(self) -> tuple[Any, str]:
        if not self.calling:
            raise BlockingIOError
        caller = self.calling.pop(0)
        if isinstance(caller, OSError):
            raise caller
        return caller, ""

    def register(self, thing: Any, events: int, data: Any) -> None:
        assert thing not in self.watched and events
        self.watched[thing] = (events, data)

    def unregister(self, thing: Any) -> None:
        del self.watched[thing]

    def close(self) -> None:
        self.calling.clear()

    def turn(self) -> bool:
        """Call everyone who is ready, and return whether anyone was."""
        ready = []
        for thing, (events, act) in self.watched.items():
            is_readable = self.calling if thing is self else thing.incoming or thing.is_ended
            is_writable = thing is not self and thing.room
            mask = (orchestra.READABLE if is_readable else 0) | (orchestra.WRITABLE if is_writable else 0)
            if mask & events:
                ready.append((act, mask & events))
        for act, mask in ready:
            act(mask)
        return bool(ready)

    def run(self) -> None:
        for _ in range(10000):
            if not self.turn():
                return
        raise AssertionError("the server spins")

    def connect(self, *channels: Any) -> Any:
        self.calling += channels
        self.run()
        return channels[0]

    def ask(self, line: bytes = STATUS) -> Any:
        """Connect, send a line, and return the connection and its first reply."""
        channel = self.connect(Channel(line + b"\n"))
        return channel, channel.replies[0] if channel.got else None

    def fill(self, count: int) -> list[Any]:
        """Connect clients that have had a request answered."""
        channels = [Channel(STATUS + b"\n") for _ in range(count)]
        self.connect(*channels)
        return channels


ANSWERED = {"ok": True, "data": "status"}


@pytest.mark.parametrize(("line", "message"), BAD_REQUESTS, ids=range(len(BAD_REQUESTS)))
def test_a_bad_request_is_refused_and_the_connection_kept(line: bytes, message: str) -> None:
    channel, reply = Exchange().ask(line + b"\n" + STATUS)
    assert reply["error"].startswith(message) and len(reply["error"]) < 150 and not reply["ok"]
    assert channel.replies[1:] == [ANSWERED] and not channel.is_closed


def test_another_user_is_not_admitted() -> None:
    exchange = Exchange()
    channel = exchange.connect(Channel(STATUS + b"\n", uid=os.getuid() + 1))
    assert channel.is_closed and channel.got == b"" and channel.incoming
    assert exchange.ask()[1] == ANSWERED


def test_one_client_too_many_is_turned_away() -> None:
    exchange = Exchange(max_clients=3)
    first = [Channel() for _ in range(3)]
    exchange.connect(*first)
    late, reply = exchange.ask()
    assert reply == {"ok": False, "error": f"{orchestra.TOO_MANY_CLIENTS} 3, got one more"} and late.is_closed
    exchange.clock.now += orchestra.SILENT_GRACE
    assert exchange.ask()[1] == ANSWERED
    assert sum(channel.is_closed for channel in first) == 1
    assert len(exchange.server.clients) == 3


def test_clients_that_have_spoken_keep_their_places() -> None:
    exchange = Exchange(max_clients=2)
    first = exchange.fill(2)
    exchange.clock.now += 5
    assert not exchange.ask()[1]["ok"]
    assert not any(channel.is_closed for channel in first)


def test_when_all_places_to_stay_are_taken_a_guest_has_one_request_answered() -> None:
    exchange = Exchange(max_clients=8)
    talkative = exchange.fill(6)
    for line, is_ok in ((STATUS, True), (b'{"cmd":"stop"}', True), (b'{"cmd":"sync"}', False), (b"hello", False)):
        late, _ = exchange.ask(line + b"\n" + STATUS)
        assert [reply["ok"] for reply in late.replies] == [is_ok] and late.is_closed
    assert exchange.ask(b'{"cmd":"sync"}')[1]["error"].startswith(orchestra.TOO_MANY_CLIENTS)
    assert exchange.ask(b"")[0].is_closed
    assert not any(channel.is_closed for channel in talkative)
    late = exchange.connect(Channel())
    talkative[0].is_ended = True
    exchange.run()
    late.incoming += STATUS + b"\n"
    exchange.run()
    assert late.replies == [ANSWERED] and not late.is_closed  # there is a place to stay now


@pytest.mark.parametrize("sent", [b"", b"{", STATUS + b"\n"], ids=["say nothing", "never end a line", "never read"])
def test_guests_that_keep_their_places_give_way_in_time(sent: bytes) -> None:
    exchange = Exchange(max_clients=8)
    exchange.fill(6)
    mute = [Channel(), Channel()]
    for channel in mute:
        channel.room = 0
    exchange.connect(*mute)
    for _ in range(2):
        for channel in mute:
            channel.incoming += sent
        exchange.run()
        assert not exchange.ask(b'{"cmd":"stop"}')[1]["ok"]
        exchange.clock.now += orchestra.SILENT_GRACE / 2
    assert exchange.ask(b'{"cmd":"stop"}')[1] == {"ok": True, "data": "stop"}
    assert len(exchange.server.clients) == 7


def test_the_oldest_of_those_that_say_nothing_gives_way_though_it_sends_bytes() -> None:
    exchange = Exchange(max_clients=8)
    exchange.fill(6)
    trickling = exchange.connect(Channel())
    exchange.clock.now += 0.8 * orchestra.SILENT_GRACE
    young = exchange.connect(Channel())
    exchange.clock.now += 0.2 * orchestra.SILENT_GRACE
    trickling.incoming += b"{"  # in the turn in which its place goes to another
    assert exchange.ask(b'{"cmd":"stop"}')[1]["ok"]
    assert trickling.is_closed and not young.is_closed


def test_a_client_has_a_while_to_read_its_last_reply_however_old_it_is() -> None:
    exchange = Exchange(max_clients=2)
    first, second = exchange.fill(2)
    exchange.clock.now += 10
    second.room = 0
    second.incoming += b"\xff\n"
    exchange.run()
    assert not exchange.ask()[1]["ok"] and not second.is_closed
    exchange.clock.now += orchestra.SILENT_GRACE
    assert exchange.ask()[1] == ANSWERED and second.is_closed and not first.is_closed


def test_silent_clients_are_dropped_in_time() -> None:
    exchange = Exchange()
    silent = exchange.connect(Channel())
    exchange.clock.now += 20
    spoken = exchange.connect(Channel(STATUS + b"\n"))
    assert exchange.server.next_expiry() == 1030
    exchange.clock.now = 1029.9
    exchange.server.drop_silent()
    assert not silent.is_closed
    exchange.clock.now = 1030
    exchange.server.drop_silent()
    assert silent.is_closed and not spoken.is_closed
    assert exchange.server.next_expiry() == 1050


def test_a_client_that_has_ended_and_does_not_read_does_not_make_the_server_spin() -> None:
    exchange = Exchange()
    deaf = Channel(STATUS + b"\n")
    deaf.room, deaf.is_ended = 0, True
    exchange.connect(deaf)
    deaf.room = 1 << 30
    exchange.run()
    assert deaf.replies == [ANSWERED] and deaf.is_closed


def test_a_client_that_waits_for_a_job_is_not_dropped() -> None:
    def wait(request: orchestra.Request, client: orchestra.Client) -> None:
        client.state = client.WAITING

    exchange = Exchange(wait)
    channel, _ = exchange.ask()
    exchange.clock.now += 1000
    exchange.server.drop_silent()
    assert exchange.server.next_expiry() is None
    (client,) = exchange.server.clients
    exchange.server.reply(client, b'"done"\n')
    assert channel.replies == ["done"] and not channel.is_closed


def test_a_client_that_never_reads_costs_little() -> None:
    def answer(request: orchestra.Request, client: orchestra.Client) -> None:
        client.unsent += orchestra.encode_reply("x" * 1000)

    exchange = Exchange(answer)
    deaf = Channel()
    deaf.room = 0
    exchange.connect(deaf)
    for _ in range(300):
        deaf.incoming += (STATUS + b"\n") * 100
        exchange.run()
    (client,) = exchange.server.clients
    assert len(client.unsent) < orchestra.Client.MAX_UNSENT + 2000
    assert len(client.lines._data) <= 2 * orchestra.MAX_LINE
    assert len(exchange.connect(Channel(STATUS + b"\n")).replies) == 1
    deaf.is_ended = True
    deaf.room = 1 << 30
    exchange.run()
    assert len(deaf.replies) == 30000 and deaf.is_closed


def test_a_client_that_asks_without_end_lets_others_speak() -> None:
    exchange = Exchange()
    exchange.calling += [Channel((STATUS + b"\n") * 1000), Channel(STATUS + b"\n")]
    greedy, modest = exchange.calling
    for _ in range(3):
        exchange.turn()
    assert len(modest.replies) == 1 and len(greedy.replies) <= 3 * orchestra.SocketServer.REQUESTS_PER_STEP
    exchange.run()
    assert len(greedy.replies) == 1000


def test_running_out_of_descriptors_turns_callers_away_and_waits_for_none(monkeypatch: Any) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    for callers in ([Channel(STATUS + b"\n")], []):  # Linux says so before it looks whether anyone is there
        exchange = Exchange()
        exchange.connect(OSError(errno.EMFILE, "no descriptor"), *callers)
        assert exchange.server.clients == set() and exchange.ask()[1] == ANSWERED
    assert pauses == []


def test_a_spare_descriptor_that_the_worker_takes_does_no_harm() -> None:
    taken: list[int] = []

    class Taker(Channel):
        """The worker opens a file just when the spare descriptor is free."""

        def close(self) -> None:
            super().close()
            taken.append(os.open(os.devnull, os.O_RDONLY))

    exchange = Exchange()
    with without_descriptors():
        exchange.connect(OSError(errno.EMFILE, "no descriptor"), Taker())
    (fd,) = taken
    os.close(fd)
    assert exchange.server.clients == set()
    assert exchange.ask()[1] == ANSWERED


# As a process: the socket


def wait_for(live: Home, note: str, *labels: str) -> None:
    """Wait until the files of some codebases have a note."""
    wait_until(lambda: all(live.has(note, label) for label in labels or ("shop/api",)))


def seconds_for(act: Callable[[], Any]) -> float:
    started = time.monotonic()
    act()
    return time.monotonic() - started


def check_quick(waits: list[float]) -> None:
    """Check that answers come at once, a few of them later on a busy machine."""
    print(f"{len(waits)} asked, worst {max(waits) * 1000:.1f} ms")
    assert statistics.median(waits) < 0.25 and max(waits) < 5


def test_conversations_are_as_agreed_byte_for_byte(served: Home) -> None:
    served.save()
    wait_for(served, "first")
    data = json.dumps(served.status(), separators=(",", ":")).encode()
    said = b'{"ok":true,"data":' + data + b"}\n"
    # Between two questions a staleness scan may have been queued, or done.
    wait_until(lambda: served.talk(STATUS + b"\n") == said.replace(b'"queue_depth":1', b'"queue_depth":0'))
    assert list(served.status()) == [
        *("running", "label", "started_at_unix", "codebase_count", "codebases", "socket", "projects_root"),
        *("version", "pid", "watcher", "last_sync_at_unix", "queue_depth", "problems", "absent"),
    ]
    assert data.startswith(b'{"running":true,"label":"dev.orchestra.daemon","started_at_unix":')
    for request, target in ((b'{"cmd":"sync","codebase":"api"}', b"api"), (b'{"cmd":"sync"}', b"all")):
        reply = served.talk(request + b"\n")
        start, end = reply.split(b'"duration_ms":')
        assert start == (
            b'{"ok":true,"data":{"target":"' + target + b'","source":"socket",'
            b'"codebases":["api"],"written":0,"unchanged":1,'
        )
        assert end.endswith(b"}}\n") and end[:-3].isdigit()
    for unknown in ("nope", "../../etc/passwd", "shop/nope", "", "\ud800", "x" * 60000):
        reply = json.loads(served.talk(json.dumps({"cmd": "sync", "codebase": unknown}).encode() + b"\n"))
        assert reply["ok"] is False and "no codebase is called" in reply["error"]


def test_half_closed_clients_get_all_their_replies(served: Home) -> None:
    sync = b'{"cmd":"sync"}'
    rows = [
        (STATUS + b"\n", 1),
        (STATUS, 1),
        (STATUS + b"\r\n", 1),
        ((STATUS + b"\n") * 100, 100),
        ((STATUS + b"\r\n") * 3 + STATUS, 4),
        (b"\n\r\n  \n" + STATUS + b"\n", 1),
        (b"", 0),
        (b"\n", 0),
        (sync + b"\n" + STATUS + b"\n" + sync, 3),
        (b"hello\n[1]\n{}\n" + STATUS + b"\n", 4),
    ]
    for data, count in rows:
        replies = served.talk(data).splitlines()
        assert len(replies) == count, data
        assert all(json.loads(reply)["ok"] for reply in replies) is (b"hello" not in data)
        with served.connection() as client:
            for byte in data:
                client.sendall(bytes([byte]))
            client.shutdown(socket.SHUT_WR)
            assert len(read_all(client).splitlines()) == count, data


def test_a_line_beyond_use_gets_an_error_and_the_end(served: Home) -> None:
    size = orchestra.MAX_LINE
    for data in (b"\xff\n", b"x" * size + b"x\n", b"x" * (size + 1), b"[" * 100_000 + b"\n", b"x" * (10 << 20)):
        for more in (b"", b"\n" + STATUS + b"\n"):
            with served.connection() as client, contextlib.suppress(ConnectionResetError):
                with contextlib.suppress(OSError):  # the daemon need not read it all
                    client.sendall(data + more)
                assert read_line(client) == (TOO_LONG if len(data) > 2 else NOT_UTF8)
                assert client.recv(1) == b""
    assert served.answers()
    with served.connection(b" " * (size - len(STATUS)) + STATUS + b"\n") as client:
        assert json.loads(read_line(client))["ok"] is True


@pytest.mark.parametrize("asks", [b"", STATUS + b"\n", b'{"cmd":"sync"}\n'], ids=["silent", "talkative", "syncing"])
def test_a_crowd_cannot_shut_out_status_and_stop(live: Home, asks: bytes) -> None:
    live.save()
    daemon = live.start_daemon()
    with ExitStack() as stack:
        crowd = [stack.enter_context(live.connection()) for _ in range(orchestra.MAX_CLIENTS)]
        is_over = threading.Event()

        def ask_again_and_again() -> None:
            while not is_over.wait(0.1):
                for client in crowd:
                    with contextlib.suppress(OSError):
                        client.setblocking(False)
                        client.send(asks)
                        client.recv(1 << 16)

        thread = threading.Thread(target=ask_again_and_again)
        thread.start()
        try:
            if asks:
                wait_until(lambda: live.synced("socket") or asks.startswith(STATUS))
            for _ in range(3):
                assert orchestra.request_status(live.path)["pid"] == daemon.pid
            assert orchestra.request_stop(live.path) == {"stopping": True}
            live.expect_end(daemon)
        finally:
            is_over.set()
            thread.join()


@pytest.mark.parametrize("kind", ["", "kqueue"])
def test_with_few_descriptors_it_lives_and_serves(live: Home, kind: str, monkeypatch: Any) -> None:
    if kind:
        require(kind, monkeypatch)
    live.save_many(20)
    few = 64
    daemon = live.start_daemon(kind, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (few, few)))
    clients = [socket.socket(socket.AF_UNIX) for _ in range(100)]
    for client in clients:
        client.connect(live.socket)
    for number in range(5):
        live.save("shop/api", f"save {number}")
        wait_until(lambda: live.answers())
        time.sleep(0.1)
    wait_for(live, "save 4")
    for client in clients:
        client.close()
    wait_until(live.answers)
    live.stop(daemon)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("is_open", [False, True], ids=["as it is", "with modes that let everyone in"])
def test_another_user_gets_nothing(served: Home, is_open: bool) -> None:
    if is_open:
        for path in (served.folder, Path(served.path), Path(served.socket).parent):
            path.chmod(0o755)
        os.chmod(served.socket, 0o666)

    def ask() -> str:
        try:
            return served.talk(STATUS + b"\n").decode() or "nothing"
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    said = run_as_nobody(ask)
    assert said in (["nothing", "ECONNRESET", "EPIPE", "ENOTCONN"] if is_open else ["EACCES"])
    assert served.answers()


@pytest.mark.parametrize(
    ("data", "described"),
    [
        (f"{os.getpid()} 0", f" (running since 1970-01-01 00:00, pid {os.getpid()})"),
        (f"{os.getpid()} NOW {orchestra.__version__}", f" (running since HH:MM, pid {os.getpid()})"),
        (f"{os.getpid()} NOW 9.9", f" (running since HH:MM, pid {os.getpid()}, 9.9: orchestra daemon restart)"),
        ("", ""),
        ("x y\n", ""),
        ("\udcff 0", ""),
        (f"{DEAD} 0", ""),  # it was killed
        *((f"{os.getpid()} {10**digits}", "") for digits in (17, 30)),  # no such time
    ],
)
def test_the_holder_of_the_daemons_lock_is_described(live: Home, monkeypatch: Any, data: str, described: str) -> None:
    monkeypatch.setattr(orchestra, "STATUS_PAUSE", 0)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    now = int(time.time())
    lock = orchestra.try_lock(orchestra.daemon_lock_path(live.path))
    assert lock is not None
    orchestra.write_lock(lock, b"longer than what follows, and older")
    orchestra.write_lock(lock, data.replace("NOW", str(now)).encode("utf-8", "surrogateescape"))
    found = orchestra.describe_lock_holder(live.path)
    os.close(lock)
    assert found == described.replace("HH:MM", time.strftime("%H:%M", time.localtime(now)))
    monkeypatch.undo()
    time.tzset()


# ── 32 Worker ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("is_read_before", [False, True])
def test_a_file_that_may_be_cut_short_is_no_problem_at_first(
    live: Home, monkeypatch: Any, is_read_before: bool
) -> None:
    live.save()
    cache = orchestra.RegistryCache.load(live.path)
    live.save(note="second")
    pipeline = orchestra.run_pipeline

    def empty_and_sync(*args: Any, **options: Any) -> Any:
        live.file().write_text("")
        return pipeline(*args, **options)

    if is_read_before:
        monkeypatch.setattr(orchestra, "run_pipeline", empty_and_sync)
    else:
        live.file().write_text(f"name: api\npath: {live.code}/shop/api\nnotes: [sec")
    cache, outcome = run_watcher_job(live, cache, "api")
    assert list(outcome.suspects) == [str(live.file())]
    assert outcome.summary.errors == [] and cache.problems == []
    cache, outcome = run_watcher_job(live, cache, "api", overdue=outcome.suspects)
    assert outcome.suspects == {} and len(cache.problems) == 1


def test_a_codebase_whose_path_is_cut_short_is_passed_over(live: Home) -> None:
    live.save()
    cache = orchestra.RegistryCache.load(live.path)
    for text in (f"name: api\npath: {live.code}/sh", "name: api\n", "name: api\npath: ["):
        live.file().write_text(text)
        cache, outcome = run_watcher_job(live, cache, "api")
        assert (cache.problems, outcome.summary.errors, outcome.summary.codebases) == ([], [], [])
        assert cache.absent == {API}
    assert list(outcome.suspects) == [str(live.file())]
    for text in ("name: {}\n", "name: {}\npath: ["):  # two without a path
        for name in ("api", "web"):
            live.file(f"shop/{name}").write_text(text.format(name))
        cache, outcome = run_watcher_job(live, cache, "api", "web")
        assert cache.problems == [] and cache.absent == {API, ("shop", "web")}
    live.file("shop/web").unlink()
    live.save(note="whole")
    overdue = {str(file): orchestra.Stamp.at(str(file)) for file in (live.file(), live.file("shop/web"))}
    cache, outcome = run_watcher_job(live, cache, "api", "web", overdue=overdue)
    assert live.has("whole") and cache.absent == set()


def test_a_broken_file_that_is_saved_again_is_a_suspect_though_it_is_as_broken_as_before(live: Home) -> None:
    live.save().write_text("# one")
    cache = orchestra.RegistryCache.load(live.path)
    live.file().write_text("# two")
    cache, outcome = run_watcher_job(live, cache, "other")
    assert list(outcome.suspects) == [str(live.file("shop/other"))]
    cache, outcome = run_watcher_job(live, cache, "api")
    assert list(outcome.suspects) == [str(live.file())] and len(cache.problems) == 1


def test_registry_cache_reload_updates_changed_codebase(live: Home) -> None:
    live.save("shop/api", "one")
    live.save("shop/web", "one")
    cache = orchestra.RegistryCache.load(live.path)
    live.save("shop/api", "two")
    live.save("shop/web", "two")
    job = orchestra.SyncJob(orchestra.SyncTarget.codebase("shop/api"), "watcher", None, frozenset([API]))
    new, outcome = orchestra.run_job(live.path, cache, job)
    notes = {key: codebase.notes for key, codebase in new.registry.codebases.items()}
    assert notes == {API: ("two",), ("shop", "web"): ("one",)}
    assert outcome.summary.codebases == ["api"] and outcome.summary.written == 1
    assert cache.registry.codebases["shop", "api"].notes == ("one",)
    assert live.has("two") and live.read("shop/web") == ""


LAYER_FILES = {
    name: "notes: [{}]\n" if name.endswith(".yaml") else "- {}\n"
    for stem in ("all", "shop/project", "shop/api")
    for name in (f"{stem}.yaml", f"{stem}.md", f"{stem}.local.yaml", f"{stem}.local.md")
    if name != "shop/api.yaml"
}


WAYS_TO_GO: dict[str, Callable[[Path], Any]] = {"gone": Path.unlink, "emptied": lambda file: file.write_text("")}


def lose_again(file: Path, text: str, lose: Callable[[Path], Any]) -> None:
    """Write a file and lose it until that can be told by the time of the disk."""
    stamp = orchestra.Stamp.at(str(file))
    while orchestra.Stamp.at(str(file)) == stamp:
        file.write_text(text)
        lose(file)


@pytest.mark.parametrize("lose", WAYS_TO_GO.values(), ids=WAYS_TO_GO)
@pytest.mark.parametrize("name", LAYER_FILES)
def test_each_layer_that_is_gone_or_empty_is_waited_for_by_itself(live: Home, name: str, lose: Any) -> None:
    others = {other: text.format(f"in {other}") for other, text in LAYER_FILES.items() if other != name}
    text, file = LAYER_FILES[name].format("mine"), live.projects / name
    put_files(live.projects, {**others, name: text})
    live.save()
    cache = orchestra.RegistryCache.load(live.path)
    everything = orchestra.SyncJob(orchestra.SyncTarget.all(), "watcher", None, frozenset([orchestra.EVERYTHING]))
    cache, _ = orchestra.run_job(live.path, cache, everything)

    def lose_and_sync(overdue: Any = {}) -> Any:
        nonlocal cache
        before = live.read()
        cache, outcome = orchestra.run_job(live.path, cache, everything._replace(overdue=overdue))
        assert live.read() == before and live.has("mine") and outcome.summary.codebases == []
        return outcome.suspects

    overdue = {}
    for other, whole in others.items():  # each is back when the next is gone
        (live.projects / other).unlink()
        overdue.update(lose_and_sync(overdue))
        put_files(live.projects, {other: whole})
    lose(file)
    suspects = lose_and_sync(overdue)
    assert list(suspects) == [str(file)]
    lose_again(file, text, lose)
    suspects = lose_and_sync(suspects)
    (live.projects / other).unlink()
    assert set(lose_and_sync(suspects)) == {str(file), str(live.projects / other)}
    put_files(live.projects, {other: whole})
    cache, outcome = orchestra.run_job(live.path, cache, everything._replace(overdue=lose_and_sync()))
    assert outcome.suspects == {} and "mine" not in live.read() and live.has("first")


@pytest.mark.parametrize("lose", WAYS_TO_GO.values(), ids=WAYS_TO_GO)
def test_a_layer_that_goes_after_its_codebase_was_read_takes_no_text_away(
    live: Home, monkeypatch: Any, lose: Any
) -> None:
    put_files(live.projects, {"shop/api.md": "- old\n"})
    live.save()
    cache = orchestra.RegistryCache.load(live.path)
    run_pipeline = orchestra.run_pipeline

    def lose_and_sync(*args: Any, **options: Any) -> Any:
        lose(live.projects / "shop/api.md")
        return run_pipeline(*args, **options)

    monkeypatch.setattr(orchestra, "run_pipeline", lose_and_sync)
    put_files(live.projects, {"shop/api.md": "- new\n"})
    cache, outcome = run_watcher_job(live, cache, "api")
    assert live.has("new") and list(outcome.suspects) == [str(live.projects / "shop/api.md")]


@needs_leases
@pytest.mark.parametrize("name", ["all.yaml", "shop/project.md", "shop/api.local.yaml"])
def test_a_layer_that_is_being_written_is_waited_for(live: Home, name: str) -> None:
    text, file = LAYER_FILES[name], live.projects / name
    put_files(live.projects, {name: text.format("old")})
    live.save()
    cache = orchestra.RegistryCache.load(live.path)
    cache, _ = run_watcher_job(live, cache, "api")
    with open(file, "w") as out:
        out.write(text.format("half"))
        out.flush()
        cache, outcome = run_watcher_job(live, cache, "api")
        assert live.has("old") and list(outcome.suspects) == [str(file)]
        cache, _ = run_watcher_job(live, cache, "api", overdue=outcome.suspects)
        assert live.has("half")
    put_files(live.projects, {name: text.format("whole")})
    cache, outcome = run_watcher_job(live, cache, "api")
    assert live.has("whole") and outcome.suspects == {}


def run_watcher_job(live: Home, cache: orchestra.RegistryCache, *names: str, overdue: Any = {}) -> Any:
    changed = frozenset(("shop", name) for name in names)
    job = orchestra.SyncJob(orchestra.SyncTarget.codebase(), "watcher", None, changed, overdue)
    return orchestra.run_job(live.path, cache, job)


def test_a_folder_stays_with_its_codebase_while_that_is_half_written_and_another_claims_it(live: Home) -> None:
    one, two = live.text("shop/one"), live.text("shop/two")
    taken = two.replace(str(live.code / "shop/two"), str(live.code / "shop/one"))
    replace(live.save("shop/one"), one)
    replace(live.save("shop/two"), two)
    cache = orchestra.RegistryCache.load(live.path)
    replace(live.file("shop/one"), "name: [")
    replace(live.file("shop/two"), taken)
    cache, outcome = run_watcher_job(live, cache, "one", "two")
    replace(live.file("shop/one"), one)
    cache, outcome = run_watcher_job(live, cache, "one", overdue=outcome.suspects)
    assert len(cache.problems) == 1  # both name the folder
    replace(live.file("shop/two"), two)
    cache, outcome = run_watcher_job(live, cache, "two")
    replace(live.file("shop/one"), one.replace("first", "last"))
    cache, outcome = run_watcher_job(live, cache, "one")
    assert outcome.error == "" and cache.problems == [] and live.has("last", "shop/one")


def test_a_bug_in_a_job_costs_no_save(live: Home, monkeypatch: Any) -> None:
    live.save()
    damaged = orchestra.RegistryCache.load(live.path)
    worker = orchestra.Worker(live.path, damaged, lambda: None)
    run_job = orchestra.run_job

    def fail_if_damaged(home: str, cache: orchestra.RegistryCache, job: orchestra.SyncJob) -> Any:
        return {}["bug"] if cache is damaged else run_job(home, cache, job)

    monkeypatch.setattr(orchestra, "run_job", fail_if_damaged)
    worker.thread.start()
    worker.submit(orchestra.SyncJob(orchestra.SyncTarget.all(), "watcher", None, frozenset([orchestra.EVERYTHING])))
    wait_until(lambda: worker.outcomes)
    worker.finish()
    assert "KeyError" in worker.outcomes[0].bug and worker.outcomes[0].summary is not None
    assert live.has("first")


def test_a_save_does_not_wait_for_memory_that_a_scan_cut_short_would_release(live: Home, monkeypatch: Any) -> None:
    live.save()
    worker = orchestra.Worker(live.path, orchestra.RegistryCache.load(live.path), lambda: None)
    released: list[int] = []
    monkeypatch.setattr(orchestra, "release_memory", lambda: released.append(len(worker.outcomes)))
    scan = orchestra.SyncJob(orchestra.SyncTarget(()), orchestra.Source.STALENESS)
    for job in (scan, orchestra.SyncJob(orchestra.SyncTarget.all(), "watcher", None, frozenset([API])), scan):
        worker.submit(job)
    worker.thread.start()
    wait_until(lambda: len(worker.outcomes) == 3)
    worker.finish()
    assert [outcome.statuses for outcome in worker.outcomes] == [{}, {}, {"current": 1}]
    assert released == [2]  # after the scan that had nothing waiting


def test_the_daemon_leaves_a_colleagues_text(live: Home) -> None:
    """The pipeline as the daemon calls it, for one codebase by name."""
    live.save("shop/api", "one")
    orchestra.run_pipeline(live.path, orchestra.SyncScope.all())
    first = live.read()
    shutil.rmtree(orchestra.hashes_root(live.path))
    live.save("shop/api", "two")
    cache = orchestra.RegistryCache.load(live.path)
    _, outcome = orchestra.run_job(live.path, cache, orchestra.SyncJob(orchestra.SyncScope.codebase("api"), "socket"))
    assert outcome.summary and (outcome.summary.written, outcome.summary.unchanged) == (0, 1)
    assert live.read() == first


# ── 33 Daemon ─────────────────────────────────────────────────────────────────

# In this process


@contextmanager
def turned_by_hand(live: Home, kind: str = "", clock: Callable[[], float] = time.time) -> Iterator[orchestra.Daemon]:
    daemon = orchestra.Daemon(live.path, {"ORCHESTRA_WATCHER": kind}, clock)
    yield daemon
    for _ in daemon._worker.finish():
        pass
    wait_until(lambda: not daemon._worker.thread.is_alive())
    daemon.close()


@pytest.fixture
def turned(live: Home) -> Iterator[orchestra.Daemon]:
    """A daemon in this process, turned by hand."""
    with turned_by_hand(live) as daemon:
        yield daemon


def turn(daemon: orchestra.Daemon, seconds: float = 0.03) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        daemon.step(0.002)


def turn_until(daemon: orchestra.Daemon, is_true: Callable[[], Any]) -> None:
    def turn() -> Any:
        daemon.step(0.002)
        return is_true()

    wait_until(turn)


def test_socket_protocol_status_and_stop_over_in_memory_channels(live: Home, turned: orchestra.Daemon) -> None:
    live.save()
    exchange = Exchange(turned.handle_request)
    turn_until(turned, lambda: turned.status()["codebases"] == ["api"])
    channel = exchange.connect(Channel(STATUS + b'\n{"cmd":"fly"}\n'))
    status, error = channel.replies
    assert status == {"ok": True, "data": turned.status()}
    assert list(status["data"])[:7] == [
        *("running", "label", "started_at_unix", "codebase_count", "codebases", "socket", "projects_root")
    ]
    assert error == {"ok": False, "error": "cmd: expected status, sync or stop, got unknown command 'fly'"}
    assert not turned.is_done and not channel.is_closed
    channel.incoming += b'{"cmd":"stop"}\n'
    exchange.run()
    assert channel.got.endswith(b'{"ok":true,"data":{"stopping":true}}\n')
    turn_until(turned, lambda: turned.is_done)


def test_a_status_is_encoded_again_only_when_it_has_changed(live: Home, edited: Edited) -> None:
    daemon = edited.daemon
    queue = [orchestra.SyncJob(orchestra.SyncTarget.all(), orchestra.Source.SOCKET)] * 2

    def told() -> Any:
        reply = daemon._encode_status()
        assert daemon._encode_status() is reply and json.loads(reply)["data"] == daemon.status()
        assert json.loads(daemon._encode_status(pretty=True)) == json.loads(reply) and reply.count(b"\n") == 1
        return json.loads(reply)["data"]

    assert len(told()["problems"]) == 1
    edited.run("restore", "api")  # by another process
    assert told()["problems"] == []
    live.save("shop/web")
    turn_until(daemon, lambda: "web" in daemon.status()["codebases"] and daemon.status()["queue_depth"] == 0)
    assert b'"web"' in daemon._encode_status()
    with orchestra.Lock(orchestra.codebase_lock_path(live.path, API)):
        assert all(map(daemon._worker.submit, queue))
        wait_until(lambda: daemon.status()["queue_depth"] == 1)
        assert told()["queue_depth"] == 1
    turn_until(daemon, lambda: b'"queue_depth":0,' in daemon._encode_status())


def test_a_status_that_was_told_keeps_no_old_registry_in_memory(live: Home, turned: orchestra.Daemon) -> None:
    live.save()
    turn_until(turned, lambda: b'"api"' in turned._encode_status())
    old = weakref.ref(turned._worker.cache.registry.owners)
    live.save(note="second")
    turn_until(turned, lambda: live.has("second") and old() is None)


def write_in_pieces(file: Path, *pieces: str) -> Iterator[None]:
    with open(file, "w") as out:
        for piece in pieces:
            yield
            out.write(piece)
            out.flush()


def write_by_twos(file: Path, text: str) -> Iterator[None]:
    """Save twice in a row, the first time without the end."""
    file.write_text(text[: text.index("[") + 1])
    yield
    file.write_text(text)


def rename_away_and_write_anew(file: Path, text: str) -> Iterator[None]:
    file.rename(f"{file}~")
    yield
    file.write_text(text)


# How a file is saved, with the pauses in which the daemon may look at it.
SLOW_SAVES = {
    "emptied, then written": write_in_pieces,
    "emptied, written in goes": lambda file, text: write_in_pieces(file, *text.partition("claude")),
    "broken, then whole": write_by_twos,
    "renamed away, then made anew": rename_away_and_write_anew,
}


@pytest.fixture
def patient(live: Home, kind: str, monkeypatch: Any) -> Iterator[orchestra.Daemon]:
    """A daemon turned by hand, whose windows stay open for longer than any test waits, and which waits for events."""
    monkeypatch.setattr(orchestra, "DEBOUNCE_WINDOW", 600.0)
    if kind == "polling":
        monkeypatch.setattr(orchestra, "POLL_INTERVAL", 0.01)
    else:
        monkeypatch.setattr(orchestra, "RECHECK_PAUSE", 600.0)
    live.save("shop/api", "zero")
    live.save("shop/bad").write_text("name: [")
    with turned_by_hand(live, kind) as daemon:
        turn_until(daemon, lambda: live.synced("start"))
        yield daemon


@pytest.mark.parametrize("label", ["shop/api", "shop/new", "shop/bad"], ids=["known", "new", "broken"])
@pytest.mark.parametrize("save", SLOW_SAVES.values(), ids=SLOW_SAVES)
def test_a_file_caught_half_written_arrives_as_soon_as_it_is_whole(
    live: Home, patient: orchestra.Daemon, kind: str, label: str, save: Callable[[Path, str], Iterator[None]]
) -> None:
    told, problems, codebases = live.errors(), patient.status()["problems"], patient.status()["codebases"]
    file = live.file(label)
    if not file.exists():
        file.write_text("")
    for _ in save(file, live.text(label, "whole")):
        turn(patient)
        assert not live.has("whole", label) and (label != "shop/api" or live.has("zero"))
        if save is not rename_away_and_write_anew:
            assert patient.status()["problems"] == problems and patient.status()["codebases"] == codebases
    turn_until(patient, lambda: live.has("whole", label))
    turn_until(patient, lambda: live.synced("watcher") == 1)
    assert live.errors() == told
    assert patient.status()["codebases"] == sorted({*codebases, label.split("/")[1]})
    for number in range(5):  # the window is open now
        for _ in save(file, live.text(label, f"again {number}")):
            patient.step(0.002)
    turn(patient)
    assert live.synced("watcher") == 1 and live.has("whole", label)


@pytest.mark.parametrize("name", ["all.yaml", "shop/project.md", "shop/api.md", "shop/api.local.yaml", "python.md"])
@pytest.mark.parametrize("save", [write_in_pieces, rename_away_and_write_anew])
def test_a_layer_caught_half_written_never_takes_its_text_away(
    live: Home, patient: orchestra.Daemon, kind: str, name: str, save: Callable[[Path, str], Iterator[None]]
) -> None:
    file, words = live.projects / name, "notes: [{}]\n" if name.endswith(".yaml") else "- {}\n"
    keys = [API, orchestra.EVERYTHING, orchestra.prose_key(str(file))]

    def turn_while_no_window_is_open(is_true: Callable[[], Any]) -> None:
        turn_until(patient, lambda: patient._schedule._debouncer.end_window(keys) or is_true())

    put_files(live.projects, {"python.md": "- python\n", name: words.format("old")})
    replace(live.file(), live.text() + "include: [python.md]\n")
    worker = patient._worker
    turn_while_no_window_is_open(lambda: live.has("old") and worker.cache.registry.codebases[API].include)
    told, before = live.errors(), worker.cache.registry.codebases[API]
    for _ in save(file, words.format("whole")):
        turn(patient)
        assert live.has("old") and worker.cache.registry.codebases[API] == before
    turn_while_no_window_is_open(lambda: live.has("whole"))
    assert live.errors() == told and not live.has("old")


def test_a_projects_file_caught_half_written_arrives_as_soon_as_it_is_whole(
    live: Home, patient: orchestra.Daemon
) -> None:
    told = live.errors()
    file = live.file("shop/project")
    for note in ("from the project", "new"):
        file.write_text("name: shop\nconventions: [")
        turn(patient)
        assert live.errors() == told and live.has("zero") and note not in live.read()
        file.write_text(f"name: shop\nconventions: [{note}]\n")
        turn_until(patient, lambda note=note: live.has(note))  # type: ignore[misc]
        patient._schedule._debouncer.end_window([orchestra.EVERYTHING])


def append_for_ever(file: Path) -> Iterator[None]:
    with open(file, "a") as out:
        while True:
            out.write("- more\n")
            out.flush()
            yield


def remove_and_save_others_for_ever(file: Path) -> Iterator[None]:
    file.unlink()
    while True:
        replace(file.with_name("new.txt"), "")
        yield


@pytest.mark.parametrize("write", [pytest.param(append_for_ever, marks=needs_leases), remove_and_save_others_for_ever])
def test_a_layer_that_never_comes_to_rest_does_not_starve_its_codebases(
    live: Home, kind: str, monkeypatch: Any, write: Callable[[Path], Iterator[None]]
) -> None:
    monkeypatch.setattr(orchestra, "DEBOUNCE_WINDOW", 0.05)
    monkeypatch.setattr(orchestra, "POLL_INTERVAL", 0.01)
    file, told = live.projects / "all.md", set()
    file.write_text("- old\n")
    live.save("shop/api", "zero")
    with turned_by_hand(live, kind) as daemon:
        turn_until(daemon, lambda: live.synced("start"))
        writing = write(file)
        next(writing)
        live.save("shop/api", "urgent")

        def is_synced_meanwhile() -> bool:
            next(writing)
            told.update(problem["where"] for problem in daemon.status()["problems"])
            return live.has("urgent")

        turn_until(daemon, is_synced_meanwhile)
        writing.close()
        turn_until(daemon, lambda: live.has("old") == file.exists() and daemon.status()["problems"] == [])
    assert told == {"~/.orchestra/projects/all.md"}


@pytest.mark.parametrize("label", ["shop/api", "shop/project"])
def test_what_stays_broken_is_reported_once_when_its_window_closes(
    live: Home, turned: orchestra.Daemon, label: str
) -> None:
    live.save()
    turn_until(turned, lambda: live.has("first") and live.synced("watcher"))
    live.file(label).write_text("notes: [")
    started = time.monotonic()
    turn_until(turned, lambda: turned.status()["problems"])
    assert time.monotonic() - started > orchestra.DEBOUNCE_WINDOW
    assert len(live.errors().splitlines()) == 1 and f"{label}.yaml" in live.errors()
    looks = live.log()
    turn(turned, 0.1)
    assert live.log() == looks and set(turned._schedule.suspects) == set()


def test_a_project_whose_link_leads_nowhere_for_a_while_is_a_problem_till_then(live: Home, kind: str) -> None:
    disk, link = live.folder / "disk", live.projects / "shop"
    disk.mkdir()
    link.symlink_to(disk)
    live.save("shop/api")
    live.save("blog/web")
    where = "~/.orchestra/projects/{}:1"
    with turned_by_hand(live, kind) as daemon:
        turn_until(daemon, lambda: live.has("first") and live.synced("start"))
        files = contents(live.code)
        disk.rename(live.folder / "unmounted")
        link.with_name("new").symlink_to("nowhere")
        turn_until(
            daemon, lambda: live.errors().count("cannot be listed") == 2 and daemon.status()["codebases"] == ["web"]
        )
        assert [problem["where"] for problem in daemon.status()["problems"]] == [
            where.format("new"),
            where.format("shop"),
        ]
        assert contents(live.code) == files
        (live.folder / "unmounted").rename(disk)
        link.with_name("new").unlink()
        turn_until(daemon, lambda: daemon.status()["problems"] == [] and daemon.status()["codebases"] == ["api", "web"])


def test_a_file_with_a_wrong_name_is_logged_once(live: Home, turned: orchestra.Daemon) -> None:
    put_files(live.projects, {"shop/api.yml": "name: api\n"})
    turn_until(turned, lambda: "shop/api.yml" in live.errors())
    live.save("shop/web")
    turn_until(turned, lambda: live.has("first", "shop/web") and live.synced("watcher") >= 2)
    assert len(live.errors().splitlines()) == 1


def test_a_file_that_stays_empty_is_reported_when_its_windows_have_closed(live: Home, turned: orchestra.Daemon) -> None:
    live.save()
    turn_until(turned, lambda: live.has("first") and " staleness " in live.log())
    live.file().write_text("")
    turn_until(turned, lambda: turned._watcher.suspects.next_due() is not None)
    assert turned._time_left() <= orchestra.RECHECK_PAUSE  # the loop wakes by itself
    turn_until(turned, lambda: turned._schedule.suspects.next_due() is not None)
    now = time.monotonic()
    left, due = turned._time_left(), turned._schedule.suspects.next_due()
    assert due is not None and left <= max(0.0, due - now) + 0.02
    turn_until(turned, lambda: turned.status()["problems"])
    assert len(live.errors().splitlines()) == 1 and live.has("first")


def turn_for_reply(daemon: orchestra.Daemon, client: socket.socket) -> Any:
    turn_until(daemon, lambda: select.select([client], [], [], 0)[0])
    return json.loads(read_line(client))


def test_a_socket_that_is_removed_is_made_again(live: Home, kind: str) -> None:
    with turned_by_hand(live, kind) as daemon, live.connection(STATUS + b"\n") as older:
        assert turn_for_reply(daemon, older)["ok"]
        for number in range(2):
            with live.connection(STATUS + b"\n") as waiting:  # not let in yet
                os.unlink(live.socket)
                if number:
                    os.mkfifo(live.socket)  # something else has its name
                turn_until(daemon, lambda: os.path.lexists(live.socket) and stat.S_ISSOCK(os.stat(live.socket).st_mode))
                assert turn_for_reply(daemon, waiting)["ok"]
            assert stat.S_IMODE(os.stat(live.socket).st_mode) == 0o600
            with live.connection(STATUS + b"\n") as newer:
                assert turn_for_reply(daemon, newer)["ok"]
        older.sendall(STATUS + b"\n")
        assert turn_for_reply(daemon, older)["ok"]
    assert not os.path.lexists(live.socket)


def test_a_socket_that_cannot_be_made_again_yet_is_made_later(
    live: Home, turned: orchestra.Daemon, monkeypatch: Any
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(socket, "socket", refuse(errno.ENFILE))
        os.unlink(live.socket)
        turn_until(turned, lambda: "could not recreate it: " in live.errors())
    (Path(live.socket).parent / "wake").write_text("")
    turn_until(turned, lambda: os.path.lexists(live.socket))
    assert "too many open files in system" in live.errors()


def test_a_socket_whose_name_is_taken_is_reported_once_until_it_is_free(live: Home, turned: orchestra.Daemon) -> None:
    os.unlink(live.socket)
    Path(live.socket).write_text("precious")
    turn_until(turned, lambda: "expected a socket or nothing, got a file" in live.errors())
    (Path(live.socket).parent / "wake").write_text("")
    turn(turned)
    assert len(live.errors().splitlines()) == 1 and Path(live.socket).read_text() == "precious"
    turned._socket.unbind()  # as at its end
    os.unlink(live.socket)
    turn_until(turned, lambda: os.path.lexists(live.socket))
    assert len(live.errors().splitlines()) == 2


def test_a_sync_that_ends_just_before_a_stop_is_answered(live: Home, turned: orchestra.Daemon) -> None:
    turn_until(turned, lambda: live.synced("start"))
    replies: list[orchestra.JobOutcome] = []
    job = orchestra.SyncJob(orchestra.SyncTarget.all(), "socket", replies.append)
    assert turned._worker.submit(job)
    wait_until(lambda: turned._worker.outcomes)
    turned._stop("test")
    wait_until(lambda: not turned._worker.thread.is_alive())
    while not turned.is_done:
        turned.step()
    assert len(replies) == 1


def test_a_full_queue_is_an_error_reply_and_does_not_make_the_loop_spin(live: Home, turned: orchestra.Daemon) -> None:
    live.save()
    turn_until(turned, lambda: live.has("first") and live.synced("watcher"))
    exchange = Exchange(turned.handle_request)
    running, *others = [Channel(b'{"cmd":"sync"}\n') for _ in range(orchestra.QUEUE_SIZE + 3)]
    with orchestra.Lock(orchestra.codebase_lock_path(live.path, API)):
        exchange.connect(running)
        wait_until(lambda: not turned._worker.jobs.qsize())
        exchange.connect(*others)
        refused = [channel for channel in others if channel.got]
        assert len(refused) == 2 and "the daemon's queue is full (64 jobs)" in refused[0].replies[0]["error"]
        assert turned.status()["queue_depth"] == orchestra.QUEUE_SIZE
        live.save(note="second")
        turn(turned, orchestra.STALENESS_DELAY + 0.2)
        assert turned._time_left() > 0
    turn_until(turned, lambda: live.has("second") and live.synced("watcher") == 2)  # it always has room


PROSE_NAMES = ("python", "shop/python", "shop/api", "shop/api.local", "shop/more/project", "shop/README")


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("shop/api.yaml", API),
        ("shop/project.yaml", orchestra.EVERYTHING),
        ("astray.yaml", orchestra.STRAY),
        ("shop/api.yml", orchestra.STRAY),
        ("shop/API.YAML", orchestra.STRAY),
        ("shop/a.b.yaml", ("shop", "a.b")),
        ("shop/api.local.yaml", API),
        ("shop/project.local.md", orchestra.EVERYTHING),
        ("all.local.yaml", orchestra.EVERYTHING),
        ("shop/all.yaml", orchestra.STRAY),
        (f"shop/{'x' * 101}.yaml", orchestra.STRAY),  # as at the start
        ("all.yaml", orchestra.EVERYTHING),
        ("all.local.md", orchestra.EVERYTHING),
        ("shop/more/api.yaml", orchestra.STRAY),
        *((f"{name}.md", orchestra.prose_key(f"/home/x/.orchestra/projects/{name}.md")) for name in PROSE_NAMES),
    ],
)
def test_a_change_means_its_codebase_or_everything(path: str, key: orchestra.Key) -> None:
    file = os.path.join(orchestra.projects_root("/home/x"), path)
    assert orchestra.key_of_change("/home/x", file) == key


FAILED = orchestra.SyncCodebaseResult("shop", "api", errors=(orchestra.Problem("api", "the folder is missing"),))


LEFT_OVER = FAILED._replace(errors=(), has_files_aside=True)
FAILURES = [{"results": [FAILED]}, {"results": [LEFT_OVER]}, {"error": "the registry cannot be read"}]


@pytest.mark.parametrize("failure", FAILURES, ids=["codebase", "leftovers", "registry"])
def test_what_failed_is_tried_again_at_a_rescan_but_not_every_second(failure: dict[str, Any]) -> None:
    clock = Clock()
    schedule = orchestra.Schedule("/home", clock)
    schedule.note([FAILED.key])
    tries = []
    for _ in range(61):  # as when polling
        schedule.note_failed()
        job = schedule.take_job()
        if job is not None:
            tries.append(clock.now - 1000)
            schedule.finish(orchestra.JobOutcome(job, **failure))
        clock.now += 1
    assert tries == [0, 1, 31]


@pytest.mark.parametrize("failure", FAILURES[:2], ids=["codebase", "leftovers"])
def test_what_has_been_synced_since_it_failed_is_not_tried_again(failure: dict[str, Any]) -> None:
    schedule = orchestra.Schedule("/home", Clock())
    for outcome in (failure, {"results": [FAILED._replace(errors=())]}):
        job = orchestra.SyncJob(orchestra.SyncTarget.codebase(), "watcher", None, frozenset([FAILED.key]))
        schedule.finish(orchestra.JobOutcome(job, **outcome))
    schedule.note_failed()
    assert schedule.take_job() is None


@pytest.mark.parametrize(
    ("last", "sizes"), [(("shop", "last"), [100, 100, 51]), (orchestra.EVERYTHING, [100, 151])], ids=["one", "all"]
)
def test_many_changed_codebases_are_synced_in_parts_until_all_are(last: orchestra.Key, sizes: list[int]) -> None:
    schedule = orchestra.Schedule("/home", Clock())
    schedule.note([("shop", f"c{number}") for number in range(150)])
    schedule.note([last, *(("shop", f"d{number}") for number in range(100))])
    jobs = []
    while schedule.next_due() == 0:  # at once
        job = schedule.take_job()
        assert job is not None and schedule.take_job() is None  # while one runs
        jobs.append(job)
        schedule.finish(orchestra.JobOutcome(job))
    assert [len(job.changed) for job in jobs] == sizes
    assert last in jobs[1].changed


def test_a_file_that_was_overdue_may_be_a_suspect_again() -> None:
    clock, found = Clock(), {orchestra.codebase_path("/home", API): STAMP}
    schedule = orchestra.Schedule("/home", clock)
    for _ in range(2):
        schedule.note([API])
        job = schedule.take_job()
        assert job is not None and (job.changed, job.overdue) == ({API}, {})
        assert schedule.take_job() is None  # while one runs
        schedule.finish(orchestra.JobOutcome(job, suspects=found))
        clock.now += orchestra.DEBOUNCE_WINDOW
        job = schedule.take_job()
        assert job is not None and (job.changed, job.overdue) == ({API}, found)
        schedule.finish(orchestra.JobOutcome(job))
        assert schedule.next_due() is None
        clock.now += orchestra.DEBOUNCE_WINDOW


def test_a_codebase_waits_for_files_that_keep_changing_but_not_for_ever() -> None:
    clock, files = Clock(), [f"{stem}.md" for stem in orchestra.layer_paths("/home", API)]
    schedule = orchestra.Schedule("/home", clock)
    other = orchestra.SyncJob(orchestra.SyncTarget.codebase(), "watcher", None, frozenset([("shop", "web")]))
    for _ in range(2):
        started, told = clock.now, []
        for number in range(100):
            schedule.note([orchestra.EVERYTHING])
            job = schedule.take_job()
            assert job is not None
            if job.late:
                break
            told += [clock.now - started] if schedule.problems else []
            doubtful = files[number % 2]  # by turns
            suspects = {doubtful: STAMP._replace(size=number)}
            schedule.finish(orchestra.JobOutcome(job, suspects=suspects, in_doubt={API: {doubtful}}))
            schedule.finish(orchestra.JobOutcome(other))
            schedule.finish(orchestra.JobOutcome(job, error="the registry cannot be read"))
            clock.now += 0.25
        assert (job.late, clock.now - started, told[0]) == ({API}, 5, 1.5)
        assert [problem.where for problem in schedule.problems] == [doubtful.replace("/home/", "~/")]
        schedule.finish(orchestra.JobOutcome(job._replace(changed=frozenset([API]))))
        assert schedule.problems == []
        clock.now += orchestra.DEBOUNCE_WINDOW


# As a process: from a save to the file


def test_daemon_autosync_after_registry_change(live: Home) -> None:
    shutil.rmtree(live.path)
    os.mkdir(live.path)
    daemon = live.start_daemon()
    wait_until(lambda: json.loads(live.run_script("daemon", "status").out)["running"])
    (live.code / "api").mkdir()
    assert live.run_script("init", str(live.code / "api"), "-p", "shop").status == 0
    assert live.run_script("sync", "api").status == 0
    claude = live.code / "api" / "CLAUDE.md"
    assert "SENTINEL" not in claude.read_text()
    with open(live.file(), "a") as file:
        file.write("notes:\n- SENTINEL\n")
    wait_until(lambda: "SENTINEL" in claude.read_text())
    assert live.run_script("daemon", "stop").out == "daemon stop requested\n"
    live.expect_end(daemon)


def test_every_watcher_drives_the_daemon(live: Home, kind: str) -> None:
    live.save("shop/api")
    daemon = live.start_daemon(kind)
    assert live.status()["watcher"] == kind
    wait_for(live, "first")
    for note, save in [("second", replace), ("third", save_in_place), ("fourth", save_after_truncating)]:
        save(live.file(), live.text(note=note))
        wait_for(live, note)
    live.save("new/app", "at once")
    wait_for(live, "at once", "new/app")
    (live.code / "web").mkdir()
    assert live.run_script("project", "add", "web", "-p", "team", "--path", str(live.code / "web")).status == 0
    wait_until(lambda: (live.code / "web" / "CLAUDE.md").exists())
    (live.projects / "new").rename(live.projects / "newer")
    wait_until(lambda: os.path.exists(orchestra.record_path(live.path, ("newer", "app"))))
    shutil.rmtree(live.projects / "team")
    wait_until(lambda: live.status()["codebases"] == ["api", "app"])
    live.stop(daemon)
    assert live.complaints() == []


def words_of(live: Home) -> tuple[str, str]:
    """Return which words, of all that a test writes, shop/api and shop/web have."""
    api, web = (" ".join(re.findall(r"\bw-\w+", live.read(f"shop/{name}"))) for name in ("api", "web"))
    return api, web


# What is saved, or removed (None), beside two codebases, and the words that they have then.
LAYER_SAVES: list[tuple[dict[str, Optional[str]], str, str]] = [
    ({"shop/api.md": "w-api\n"}, "w-api", ""),
    ({"shop/api.md": "w-again\n"}, "w-again", ""),
    ({"shop/api.local.md": "w-local\n", "shop/README.md": "w-readme\n"}, "w-again w-local", ""),
    ({"shop/project.md": "w-project\n"}, "w-project w-again w-local", "w-project"),
    ({"all.md": "w-all\n"}, "w-all w-project w-again w-local", "w-all w-project"),
    ({"shop/api.md": None, "shop/project.md": None}, "w-all w-local", "w-all"),
    ({"all.md": None, "shop/api.local.md": None}, "", ""),
    ({"all.local.yaml": "notes: [w-all]\n", "shop/project.yaml": "notes: [w-project]\n"}, *["w-all w-project"] * 2),
    ({"shop/api.local.yaml": "notes: [w-local]\n"}, "w-all w-project w-local", "w-all w-project"),
    ({"all.local.yaml": "# notes: [w-all]\n"}, "w-project w-local", "w-project"),
    ({"all.local.yaml": None, "shop/project.yaml": None}, "w-local", ""),
    ({"some.md": "w-some\n", "shop/api.local.yaml": "include: [some.md]\n"}, "w-some", ""),
    ({"some.md": "w-other\n"}, "w-other", ""),
    ({"shop/some.md": "w-beside\n"}, "w-beside", ""),
    ({"shop/some.md": None}, "w-other", ""),
    ({"shop/a/b/c.md": "w-deep\n", "shop/api.local.yaml": "include: [a/b/c.md]\n"}, "w-deep", ""),
    ({"shop/a/b/c.md": "w-deeper\n"}, "w-deeper", ""),
    ({"shop/more/some.md": "w-more\n", "shop/api.local.yaml": "include: [more/some.md]\n"}, "w-more", ""),
    ({"shop/more/some.md": "w-less\n", "shop/project.yaml": "include: [some.md]\n"}, "w-other w-less", "w-other"),
    ({"shop/project.yaml": None, "shop/api.local.yaml": None}, "", ""),
]


def put_or_remove(live: Home, files: dict[str, Optional[str]]) -> None:
    for name, text in files.items():
        if text is None:
            (live.projects / name).unlink()
        else:
            (live.projects / name).parent.mkdir(parents=True, exist_ok=True)
            replace(live.projects / name, text)


def test_every_layer_and_its_prose_drive_the_daemon(live: Home, kind: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(orchestra, "DEBOUNCE_WINDOW", 0.01)
    monkeypatch.setattr(orchestra, "POLL_INTERVAL", 0.01)
    for name in ("api", "web"):
        live.save(f"shop/{name}")
    with turned_by_hand(live, kind) as daemon:
        turn_until(daemon, lambda: live.synced("start"))
        for files, *words in LAYER_SAVES:
            put_or_remove(live, files)
            turn_until(daemon, lambda: [*words_of(live)] == words)  # noqa: B023
        assert live.complaints() == []
        (live.projects / "all.yaml").mkdir()
        turn_until(daemon, lambda: "all.yaml:1: file: expected a file, got a folder" in "".join(live.complaints()))


def test_what_changed_while_no_daemon_ran_is_synced_at_the_start(live: Home) -> None:
    files = {"all.md": "w-down\n", "shop/api.md": "w-api\n", "shop/web.local.yaml": "notes: [w-web]\n"}
    rows = [("w-1", files, ("w-down w-api w-1", "w-down w-1 w-web")), ("w-2", dict.fromkeys(files), ("w-2", "w-2"))]
    for note, saved, words in rows:
        for name in ("api", "web"):
            live.save(f"shop/{name}", note)
        put_or_remove(live, saved)
        daemon = live.start_daemon()
        wait_until(lambda: words_of(live) == words)  # noqa: B023
        live.stop(daemon)


def test_of_a_burst_of_saves_the_last_arrives_and_few_syncs_are_made(served: Home) -> None:
    started = time.monotonic()
    for number in range(20):
        served.save(note=f"save {number}")
        time.sleep(0.02)
    windows = int((time.monotonic() - started) / orchestra.DEBOUNCE_WINDOW)
    wait_for(served, "save 19")
    time.sleep(2 * orchestra.DEBOUNCE_WINDOW)  # time for surplus syncs
    assert served.synced("watcher") <= 3 + windows


def test_the_second_of_two_saves_arrives(served: Home) -> None:
    pauses = (0.0, 0.15, 0.45, 0.55)
    ways = {f"shop/c{number}": way for number, way in enumerate(itertools.product(pauses, (replace, save_in_place)))}
    for label in ways:
        served.save(label, "one")
    wait_for(served, "one", *ways)
    time.sleep(orchestra.DEBOUNCE_WINDOW)
    started = time.monotonic()
    for label, (_, save) in ways.items():
        save(served.file(label), served.text(label, "first of two"))
    for label, (pause, save) in ways.items():
        time.sleep(max(0.0, started + pause - time.monotonic()))
        save(served.file(label), served.text(label, "second"))
    wait_for(served, "second", *ways)


def test_a_save_during_a_sync_of_the_same_codebase_arrives(served: Home) -> None:
    served.save(note="one")
    wait_until(lambda: served.synced("watcher") == 1)
    time.sleep(orchestra.DEBOUNCE_WINDOW)
    with orchestra.Lock(orchestra.codebase_lock_path(served.path, API)):
        served.save(note="two")
        time.sleep(0.2)
        for note in ("three", "four"):
            served.save(note=note)
            time.sleep(0.3)
        assert served.has("one")
        assert served.status()["running"]
    wait_for(served, "four")
    wait_until(lambda: served.synced("watcher") >= 2)
    assert served.synced("watcher") <= 3  # 2 where this machine is too busy to see each save


def test_a_save_while_hundreds_sync_arrives_and_status_is_quick(live: Home) -> None:
    labels = live.save_many(300)
    daemon = live.start_daemon()
    assert live.status()["codebase_count"] == 300
    waits = []
    live.save(labels[0], "second")
    live.save(labels[-1], "second")
    while not live.synced("start"):
        waits.append(seconds_for(live.status))
    check_quick(waits)
    wait_for(live, "second", labels[0], labels[-1])
    assert all(live.read(label) for label in labels)
    live.stop(daemon)
    assert live.errors() == ""


def test_a_broken_file_is_a_problem_until_it_is_mended_and_others_go_on(live: Home) -> None:
    live.save("shop/web")
    live.save("shop/api").write_text("name: api\npath: [")  # broken from the start
    daemon = live.start_daemon()
    wait_for(live, "first", "shop/web")
    for note in ("one", "two"):
        wait_until(lambda: live.status()["problems"])
        (problem,) = live.status()["problems"]
        assert problem["where"].startswith("~/.orchestra/projects/shop/api.yaml:")
        assert "daemon-err" not in problem["message"]
        wait_until(lambda: live.errors().count("shop/api.yaml"))  # logged a moment later
        live.save("shop/web", note)
        wait_for(live, note, "shop/web")
        assert live.status()["problems"] == [problem] and live.status()["codebases"] == ["api", "web"]
        save_in_place(live.file(), live.text(note=note))
        wait_for(live, note)
        wait_until(lambda: live.status()["problems"] == [])
        if note == "one":
            save_in_place(live.file(), live.text(note="bad") + "targets: [\n")
    assert len(live.errors().splitlines()) == 2
    live.stop(daemon)


def test_a_codebase_that_fails_is_a_problem_until_it_syncs(served: Home) -> None:
    served.save()
    wait_for(served, "first")
    root = served.code / "shop" / "api"
    shutil.rmtree(root)
    text = served.text(note="second")
    root.rmdir()
    root.write_text("in its place")
    replace(served.file(), text)
    wait_until(lambda: served.status()["problems"])
    assert str(root) in served.status()["problems"][0]["message"] + served.status()["problems"][0]["where"]
    root.unlink()
    put_files(root, {"README.md": "not empty: an emptied folder is another matter"})
    assert orchestra.request_sync(served.path, "api")["written"] == 1
    assert served.status()["problems"] == []


def test_a_folder_that_comes_back_is_synced_at_the_next_rescan(live: Home, turned: orchestra.Daemon) -> None:
    text = live.text("shop/api")
    root = live.code / "shop/api"
    root.rmdir()
    put_files(live.projects, {"shop/api.yaml": text, "shop/web.yaml": "name: web\n"})
    turn_until(turned, lambda: turned.status()["absent"] == ["api", "web"])
    root.mkdir()
    turned._rescan_at = 0.0
    turn_until(turned, lambda: live.has("first") and turned.status()["absent"] == ["web"])
    assert turned.status()["problems"] == [] and live.errors() == ""


def test_to_name_an_absent_codebase_on_the_socket_is_an_error(served: Home) -> None:
    served.write_registry("shop/api.yaml", "name: api\n")
    wait_until(lambda: served.status()["absent"] == ["api"])
    assert orchestra.request_sync(served.path)["codebases"] == []
    with pytest.raises(orchestra.ProtocolError, match=r"shop/api: ~/.*/api\.yaml: no path on this machine"):
        orchestra.request_sync(served.path, "api")
    assert served.status()["problems"] == [] and served.status()["absent"] == ["api"]


def test_a_local_sister_that_is_left_alone_is_a_problem(live: Home, turned: orchestra.Daemon) -> None:
    live.save()
    live.write_registry("shop/api.local.yaml", "notes: [mine]\n")
    turn_until(turned, lambda: live.has("mine"))
    text = live.file().read_text()
    live.file().unlink()
    turn_until(turned, lambda: turned.status()["problems"])
    assert turned.status()["problems"][0]["message"].startswith("ignored: it belongs to api.yaml, which is missing")
    live.file().write_text(text)
    turn_until(turned, lambda: turned.status()["problems"] == [])


def test_the_problem_of_a_project_without_codebases_ends_when_it_is_mended(live: Home) -> None:
    live.save()
    live.write_registry("team/project.yaml", "include: [python.md]\n")
    with turned_by_hand(live) as daemon:
        turn_until(daemon, lambda: live.has("first") and daemon.status()["last_sync_at_unix"])
        assert daemon.status()["problems"]
        put_files(live.projects, {"python.md": "Use ruff."})
        turn_until(daemon, lambda: daemon.status()["problems"] == [])


def test_a_codebase_whose_file_is_deleted_leaves_the_status(served: Home) -> None:
    served.save("shop/api")
    served.save("team/api")
    wait_until(lambda: served.status()["codebases"] == ["shop/api", "team/api"])
    served.file("team/api").unlink()
    wait_until(lambda: served.status()["codebases"] == ["api"])
    assert served.status()["codebase_count"] == 1
    assert served.has("first", "team/api")


# As a process: signals, one alone, what stands in the way


def test_sighup_looks_at_everything_again(served: Home) -> None:
    served.save()
    wait_for(served, "first")
    put_files(served.code / "shop/api", {"README.md": ""})
    (served.code / "shop" / "api" / "CLAUDE.md").unlink()
    served.daemons[-1].send_signal(signal.SIGHUP)
    wait_for(served, "first")
    assert "rescanning everything reason=SIGHUP" in served.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_daemon(live: Home, number: signal.Signals) -> None:
    daemon = live.start_daemon()
    live.wait_for_start_job()
    daemon.send_signal(number)
    live.expect_end(daemon)
    assert f"stopping reason={number.name}" in live.log()
    assert live.errors() == "" and live.said() == ""


def test_a_stop_does_not_wait_for_ever_for_a_job_that_hangs(live: Home, monkeypatch: Any) -> None:
    monkeypatch.setattr(orchestra, "STOP_PATIENCE", 0.2)
    live.save()
    go_on = threading.Event()
    monkeypatch.setattr(orchestra, "run_job", lambda *args: go_on.wait(60) and None)
    daemon = orchestra.Daemon(live.path, {})
    turn_until(daemon, lambda: daemon._worker.jobs.empty())
    daemon._stop("SIGTERM")
    assert not daemon.is_done
    turn_until(daemon, lambda: daemon.is_done)
    assert daemon._worker.thread.is_alive()
    go_on.set()
    wait_until(lambda: not daemon._worker.thread.is_alive())
    daemon.close()


COMPUTES = f"""
import sys, time
sys.path[:0] = [{str(HERE)!r}]
import orchestra

def compute(*args):
    deadline = time.monotonic() + 2
    while sys.getswitchinterval() > 0.001 and time.monotonic() < deadline:
        sum(range(1000))
    sys.stdout.write(f"interval {{sys.getswitchinterval()}}\\n")
    sys.stdout.flush()
    while True:
        sum(range(1000))

orchestra.run_job = compute
orchestra.STOP_PATIENCE = 0.3
sys.exit(orchestra.main(sys.argv[1:]))
"""


def test_a_job_that_computes_without_end_holds_up_neither_status_nor_stop(live: Home, monkeypatch: Any) -> None:
    monkeypatch.setattr(live, "command", lambda *argv, kind: [sys.executable, "-c", COMPUTES, *argv])
    daemon = live.start_daemon(stdout=subprocess.PIPE)
    assert daemon.stdout is not None
    interval = next(line for line in daemon.stdout if line.startswith(b"interval "))
    assert float(interval.split()[1]) <= 0.001
    waits = [seconds_for(live.status) for _ in range(20)]
    check_quick(waits)
    assert seconds_for(lambda: live.stop(daemon)) < orchestra.STOP_PATIENCE
    daemon.stdout.close()


def test_at_a_stop_the_running_job_ends_and_queued_ones_are_answered(live: Home) -> None:
    live.save()
    daemon = live.start_daemon()
    live.wait_for_start_job()
    sync = b'{"cmd":"sync","codebase":"api"}\n'
    refusal = {"ok": False, "error": "daemon: expected to sync, but it is stopping"}
    with live.connection() as running, live.connection() as queued, live.connection() as stopper:
        with orchestra.Lock(orchestra.codebase_lock_path(live.path, API)):
            running.sendall(sync)
            wait_until(lambda: live.status()["queue_depth"] == 0)
            queued.sendall(sync)
            wait_until(lambda: live.status()["queue_depth"] == 1)
            stopper.sendall(b'{"cmd":"stop"}\n')
            assert read_line(stopper) == b'{"ok":true,"data":{"stopping":true}}\n'
            assert json.loads(read_line(queued)) == refusal
            stopper.sendall(STATUS + b"\n" + sync)
            assert json.loads(read_line(stopper))["ok"] is True
            assert json.loads(read_line(stopper)) == refusal
            assert daemon.poll() is None
        assert json.loads(read_line(running))["data"]["codebases"] == ["api"]
    live.expect_end(daemon)


def test_without_a_daemon_stop_and_status_say_so(live: Home) -> None:
    ran = live.run_script("daemon", "stop")
    assert (ran.status, ran.out, ran.err) == (0, "daemon is not running\n", "")
    started = time.monotonic()
    ran = live.run_script("daemon", "status")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == f'{{\n  "running": false,\n  "socket": "{live.socket}"\n}}\n'
    assert time.monotonic() - started > 4 * orchestra.STATUS_PAUSE


def test_status_waits_for_a_daemon_that_is_starting(live: Home, monkeypatch: Any) -> None:
    real = orchestra.send_request

    def send_and_start(*args: Any) -> Any:
        try:
            return real(*args)
        except orchestra.DaemonNotRunning:
            live.daemons or live.start_daemon()
            raise

    monkeypatch.setattr(orchestra, "send_request", send_and_start)
    assert json.loads(live.run_fine("daemon", "status").out)["running"] is True
    live.stop(live.daemons[0])


@pytest.fixture
def detached(live: Home) -> Iterator[Home]:
    """A home whose detached daemon ends with the test."""
    yield live
    live.stop_detached()


def test_a_detached_daemon_outlives_what_started_it_and_is_restarted(detached: Home) -> None:
    for argv, verb in ((["restart"], "started"), (["restart"], "restarted"), (["restart"], "restarted")):
        ran = detached.run_script("daemon", *argv)
        assert (ran.status, ran.out, ran.err) == (0, f"daemon {verb}, pid {detached.answers()}\n", "")
    assert detached.log().count(" started ") == 3 and detached.log().count(" stopped ") == 2
    assert os.getsid(detached.answers()) == detached.answers() != os.getsid(0)
    ran = detached.run_script("daemon", "start", "--detach")
    assert (ran.status, ran.out) == (2, "") and f"daemon socket already in use: {detached.socket}" in ran.err
    detached.save()
    wait_for(detached, "first")
    assert detached.errors() == ""
    ran = detached.run_script("daemon", "status", "--short")
    assert (
        ran.out.startswith("daemon: running ")
        and ran.out.count("\n") == 1
        and json.loads(detached.run_script("daemon", "status", "--json").out)["running"]
    )


def test_a_detached_daemon_that_cannot_start_says_why(detached: Home) -> None:
    put_files(Path(detached.socket).parent, {"daemon.sock/x": ""})
    ran = detached.run_script("daemon", "start", "--detach")
    assert ran.complaints == [
        f"orchestra: the daemon did not start: {detached.socket}: expected a socket or nothing, got a folder: "
        "move it away"
    ]
    assert (ran.status, ran.out) == (2, "")
    shutil.rmtree(detached.socket)


def test_a_daemon_of_another_version_is_told_and_restarted(detached: Home) -> None:
    put_files(detached.folder, {"newer.py": new_version()})
    detached.start_daemon(command=[sys.executable, str(detached.folder / "newer.py"), "daemon", "start"])
    python = orchestra.Installer(detached.path).choose_python()
    binary = orchestra.Installer(detached.path).install_program(python, str(SCRIPT))
    ran = finish(detached.launch([binary, "daemon", "status"]))
    assert json.loads(ran.out)["version"] == "9.9.10"
    assert "9.9.10" in ran.err and "orchestra daemon restart" in ran.err and ran.err.count("\n") == 1
    assert detached.run_script("daemon", "restart").status == 0
    detached.daemons[0].wait(20)
    ran = detached.run_script("daemon", "status")
    assert (json.loads(ran.out)["version"], ran.err) == (orchestra.__version__, "")


@pytest.mark.parametrize("rounds", [5, pytest.param(40, marks=pytest.mark.soak)])
def test_of_two_daemons_started_at_once_one_survives(live: Home, rounds: int) -> None:
    for number in range(rounds):
        said = len(live.said()) if live.daemons else 0
        both = [live.start_daemon(wait=False), live.start_daemon(wait=False)]
        wait_until(lambda: any(daemon.poll() is not None for daemon in both))  # noqa: B023
        winner, loser = sorted(both, key=lambda daemon: daemon.poll() is not None)
        assert loser.returncode == 2
        assert live.said()[said:].splitlines()[0] == f"orchestra: daemon socket already in use: {live.socket}"
        wait_until(live.answers)
        assert live.status()["pid"] == winner.pid and winner.poll() is None
        if number % 2:
            live.stop(winner)
        else:
            winner.kill()
            winner.wait()
            assert os.path.lexists(live.socket)


def test_a_second_daemon_ends_at_once_and_leaves_the_first_alone(served: Home) -> None:
    first = served.daemons[0]
    for number, is_deaf in ((1, False), (2, True)):
        if is_deaf:
            first.send_signal(signal.SIGSTOP)
            os.rename(served.socket, f"{served.socket}.away")
        second = served.start_daemon(wait=False)
        assert second.wait(60) == 2
        said, hint = served.said().splitlines()[-2:]
        assert said == f"orchestra: daemon socket already in use: {served.socket}"
        assert re.fullmatch(rf"  try: orchestra daemon status \(running since .*\d\d:\d\d, pid {first.pid}\)", hint)
        assert len(served.said().splitlines()) == 2 * number
    os.rename(f"{served.socket}.away", served.socket)
    first.send_signal(signal.SIGCONT)
    assert served.answers()
    assert stat.S_IMODE(os.stat(served.socket).st_mode) == 0o600


UNFIT_HOMES = {  # for a daemon: what stands at a path below the home folder, a part of the refusal
    "a file for a socket": (".orchestra/daemon.sock", "precious", "expected a socket or nothing, got a "),
    "a folder for a socket": (".orchestra/daemon.sock", None, "expected a socket or nothing, got a "),
    "a link for a socket": (".orchestra/daemon.sock", link_to("elsewhere"), "expected a socket or nothing, got a "),
    "a file for its folder": (".orchestra", "a file", "/.orchestra"),
}


@pytest.mark.parametrize(("name", "content", "refusal"), UNFIT_HOMES.values(), ids=UNFIT_HOMES)
def test_a_daemon_refuses_an_unfit_home_in_one_line(home: Home, name: str, content: Any, refusal: str) -> None:
    put_files(Path(home.path), {name: content})
    before = tree(Path(home.path))
    ran = home.run_script("daemon", "start")
    assert ran.status == 2 and ran.err.startswith("orchestra: ") and refusal in ran.err
    assert len(ran.err.splitlines()) == 1 and before.items() <= tree(Path(home.path)).items()


def test_a_home_too_long_for_a_socket_is_an_error(live: Home) -> None:
    live.path += "/" + "x" * 100
    os.mkdir(live.path)
    limit = 103 if sys.platform == "darwin" else 107
    ran = live.run_script("daemon", "start")
    assert ran.status == 2 and f"expected a socket path of at most {limit} bytes, got {len(live.socket)}" in ran.err
    for command in ("stop", "status"):
        assert "Traceback" not in live.run_script("daemon", command).err


def test_an_unknown_watcher_is_an_error(live: Home) -> None:
    ran = live.run_script("daemon", "start", environ={"ORCHESTRA_WATCHER": "eyes"})
    assert ran.status == 2 and ran.err.startswith("orchestra: ORCHESTRA_WATCHER: expected ")
    assert not os.path.lexists(live.socket)


def test_a_pipe_in_the_place_of_a_managed_file_holds_nobody_up(served: Home) -> None:
    served.text("shop/api")  # makes its folder
    os.mkfifo(served.code / "shop" / "api" / "CLAUDE.md")
    served.save("shop/api")
    waits = []
    for number in range(20):
        waits.append(seconds_for(served.status))
        served.save("shop/web", f"save {number}")
    wait_for(served, "save 19", "shop/web")
    check_quick(waits)
    wait_until(lambda: served.status()["problems"])
    assert "CLAUDE.md" in json.dumps(served.status()["problems"])


@pytest.mark.skipif(not IS_LINUX, reason="reads /proc")
@pytest.mark.parametrize("kind", ["kqueue", "inotify"])
def test_an_idle_daemon_sleeps(live: Home, kind: str, monkeypatch: Any) -> None:
    require(kind, monkeypatch)
    live.save()
    daemon = live.start_daemon(kind)
    wait_for(live, "first")
    with live.connection(b'{"cmd":') as half, live.connection() as ended:
        ended.shutdown(socket.SHUT_RD)
        half.shutdown(socket.SHUT_WR)
        wait_until(lambda: " staleness " in live.log())
        assert any(cpu_seconds_within(0.5, daemon.pid) <= 0.03 for _ in range(4))  # the scan may go on for a while
    live.stop(daemon)


# Hand edits that it replaces, and what may work in a while


class Edited(NamedTuple):
    """A daemon turned by hand that has just replaced a hand edit, and a clock for it."""

    live: Home
    daemon: orchestra.Daemon
    clock: Clock

    def run(self, *argv: str) -> None:
        assert self.live.run(*argv).status in (0, 1)

    def sync_by_socket(self) -> None:
        with self.live.connection(b'{"cmd":"sync","codebase":"api"}\n') as client:
            assert turn_for_reply(self.daemon, client)["ok"]

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds


@pytest.fixture
def edited(live: Home) -> Iterator[Edited]:
    live.save()
    clock = Clock(1_800_000_000)
    with turned_by_hand(live, clock=clock) as daemon:
        turn_until(daemon, lambda: live.synced("start"))
        claude = live.code / "shop" / "api" / "CLAUDE.md"
        claude.write_text(claude.read_text().replace("- first", "- by hand"))
        live.save(note="second")
        turn_until(daemon, lambda: live.synced("watcher"))
        yield Edited(live, daemon, clock)


@pytest.mark.parametrize(
    ("is_edit", "message"),
    [
        (True, "shop/api: CLAUDE.md: hand-written text was replaced; .*: orchestra restore shop/api .*"),
        (False, "~/.orchestra/projects/shop/api.yaml:2: yaml: .*"),
    ],
    ids=["replaced edit", "broken file"],
)
def test_what_the_user_should_hear_of_is_told_to_a_program_of_his_own(live: Home, is_edit: bool, message: str) -> None:
    told, claude = live.folder / "told", live.code / "shop/api/CLAUDE.md"
    put_files(Path(live.socket).parent, {"notify": f"#!/bin/sh\nprintf '%s\\n' \"$1\" >>{told}\nexec sleep 100\n"})
    Path(orchestra.notify_path(live.path)).chmod(0o700)
    live.save()
    daemon = live.start_daemon()
    wait_for(live, "first")
    if is_edit:
        claude.write_text(claude.read_text().replace("- first", "- by hand"))
        live.save(note="second")
    else:
        replace(live.file(), "name: [")
    wait_until(lambda: told.exists() and told.read_text().endswith("\n"))
    assert re.fullmatch(f"orchestra: {message}\n", told.read_text()), told.read_text()
    live.save(note="third")
    started = time.monotonic()
    wait_for(live, "third")
    assert live.status()["running"]
    live.stop(daemon)
    assert time.monotonic() - started < orchestra.Notifier.TIMEOUT - 1  # though the program hangs


def test_a_replaced_hand_edit_is_logged_with_the_way_back(live: Home, edited: Edited) -> None:
    (line,) = live.errors().splitlines()
    assert 'WARNING replaced hand-written text file="shop/api: CLAUDE.md"' in line
    (problem,) = edited.daemon.status()["problems"]
    assert problem["where"] == "shop/api: CLAUDE.md"
    command = re.search(r"orchestra (restore shop/api CLAUDE.md --at \S+)", problem["message"])
    assert command is not None and command[0] in line
    edited.run(*command[1].split())
    assert live.has("by hand") and edited.daemon.status()["problems"] == []


@pytest.mark.parametrize(
    ("act", "stays"),
    [
        (lambda edited: edited.wait(86_399), True),
        (lambda edited: edited.wait(86_400), False),
        (lambda edited: edited.run("sync", "api"), False),
        (lambda edited: edited.run("sync", "--all"), False),
        (lambda edited: edited.run("sync", "--all", "--dry-run"), True),
        (lambda edited: edited.run("sync", "--all", "--check"), True),
        (lambda edited: edited.run("status"), True),
        (lambda edited: edited.sync_by_socket(), False),
        (lambda edited: edited.run("restore", "api"), False),
        (lambda edited: edited.run("restore", "api", "--list"), True),
    ],
    ids=range(10),
)
def test_a_replaced_hand_edit_is_a_problem_for_a_day_or_until_the_user_deals_with_it(
    live: Home, edited: Edited, act: Callable[[Edited], Any], stays: bool
) -> None:
    act(edited)
    for _ in range(2):
        assert len(edited.daemon.status()["problems"]) == stays
    assert os.path.exists(orchestra.replaced_path(live.path, API)) == stays


def test_nothing_is_reported_of_a_codebase_that_is_no_longer_registered(live: Home, edited: Edited) -> None:
    edited.run("project", "remove", "api")
    turn_until(edited.daemon, lambda: edited.daemon.status()["codebases"] == [])
    assert edited.daemon.status()["problems"] == []


def test_a_note_of_replaced_text_that_is_damaged_is_forgotten(live: Home, edited: Edited) -> None:
    file = Path(orchestra.replaced_path(live.path, API))
    whole = file.read_text()
    huge = f'{{"at": 1{"0" * 400}, "notes": {{}}}}'
    for data in ("", "{", "[]", "{}", '{"at": "x", "notes": {}}', '{"at": 1, "notes": 5}', "\xff", huge):
        file.write_text(data)
        assert edited.daemon.status()["problems"] == [] and not file.exists()
    file.write_text(whole)
    assert len(edited.daemon.status()["problems"]) == 1


def test_a_sync_whose_error_may_pass_is_tried_again_and_logged_once(
    live: Home, turned: orchestra.Daemon, monkeypatch: Any
) -> None:
    monkeypatch.setattr(orchestra, "RETRY_INTERVAL", 0.02)
    sync_codebase, tries = orchestra.sync_codebase, []

    def fail_at_first(home: str, codebase: orchestra.Codebase, *args: Any, **options: Any) -> Any:
        tries.append(codebase.key)
        if codebase.name != "api" or tries.count(codebase.key) > 3:
            return sync_codebase(home, codebase, *args, **options)
        file = orchestra.FilePlan(
            "CLAUDE.md",
            orchestra.Action.SKIP,
            orchestra.AGENTS["claude"],
            problem=orchestra.Problem("CLAUDE.md", "open elsewhere", retry=True),
        )
        return orchestra.SyncCodebaseResult(*codebase.key, (file,), (orchestra.Problem("shop/api", "open elsewhere"),))

    turn_until(turned, lambda: live.synced("start"))
    monkeypatch.setattr(orchestra, "sync_codebase", fail_at_first)
    live.save("shop/web")
    live.save("shop/api")
    turn_until(turned, lambda: live.has("first") and turned.status()["problems"] == [])
    assert tries.count(API) == 4 and tries.count(("shop", "web")) == 1
    assert live.errors().count("open elsewhere") == 1
    turn(turned, 0.1)
    assert len(tries) == 5 and turned._schedule.retry_at == {}


def test_a_link_that_comes_and_goes_stops_nothing(served: Home) -> None:
    file = served.save("shop/one")
    target = served.code / "one.yaml"
    target.write_text(served.text("shop/one"))
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        file.unlink()
        file.symlink_to(target)
        file.unlink()
        file.write_text(served.text("shop/one"))
    served.save("shop/one", "last")
    wait_for(served, "last", "shop/one")


def test_a_client_that_connects_in_the_turn_of_a_stop_does_no_harm(live: Home) -> None:
    daemon = live.start_daemon()
    live.wait_for_start_job()
    daemon.send_signal(signal.SIGSTOP)
    with live.connection(b'{"cmd":"stop"}\n') as client, live.connection():
        daemon.send_signal(signal.SIGCONT)
        assert read_line(client) == b'{"ok":true,"data":{"stopping":true}}\n'
    live.expect_end(daemon)


def test_a_reader_of_stdout_that_has_stopped_does_not_stop_the_daemon(live: Home) -> None:
    live.save()
    daemon = live.start_daemon(stdout=subprocess.PIPE)
    with live.connection(b'{"cmd":"sync"}\n' * 800) as client:
        for _ in range(800):
            assert read_line(client).startswith(b'{"ok":true')
    assert live.synced("socket") == 800
    assert daemon.stdout is not None and len(os.read(daemon.stdout.fileno(), 1 << 20)) > 4096
    live.stop(daemon)
    daemon.stdout.close()


def test_a_bug_in_the_staleness_scan_is_logged_once(live: Home, turned: orchestra.Daemon, monkeypatch: Any) -> None:
    live.save()
    monkeypatch.setattr(orchestra, "check_staleness", refuse(ZeroDivisionError()))
    monkeypatch.setattr(orchestra, "STALENESS_DELAY", 0.0)
    told = Path(orchestra.stderr_log_path(live.path))
    turn_until(turned, lambda: told.read_text().count("job failed") >= 2)  # at first, and after a fresh start
    counts = []
    for _ in range(2):
        turn(turned, 0.4)
        counts.append(told.read_text().count("job failed"))
    assert counts[0] == counts[1]


def test_the_staleness_scan_waits_for_the_end_of_a_long_job(
    live: Home, turned: orchestra.Daemon, monkeypatch: Any
) -> None:
    live.save()
    turn_until(turned, lambda: " staleness " in live.log())
    monkeypatch.setattr(orchestra, "STALENESS_DELAY", 0.1)
    live.save("shop/web")
    turn_until(turned, lambda: turned._staleness_at is not None)
    with orchestra.Lock(orchestra.codebase_lock_path(live.path, API)):
        live.save(note="second")
        turn_until(turned, lambda: turned._schedule.is_running)
        turn(turned, 0.3)
        assert turned._worker.jobs.empty()
    turn_until(turned, lambda: live.has("second") and live.log().count(" staleness ") == 2)


def test_a_daemon_whose_lock_was_removed_ends_and_leaves_the_next_ones_socket(live: Home) -> None:
    first = live.start_daemon()
    shutil.rmtree(orchestra.run_dir(live.path))
    second = live.start_daemon(wait=False)
    wait_until(lambda: live.answers() == second.pid)
    assert first.wait(30) == 0 and 'reason="the lock file was removed"' in live.log()
    assert live.answers() == second.pid
    live.stop(second)


# ══ V Program ═════════════════════════════════════════════════════════════════

# ── 34 Installing ─────────────────────────────────────────────────────────────

INSTALLER = HERE / "install.sh"
ORCHESTRA_PY = SCRIPT.read_bytes()
PYTHON_XY = f"python{sys.version_info[0]}.{sys.version_info[1]}"
# A virtual environment's Python is not what is installed: the one below it is.
BASE_PYTHON = os.path.join(sys.base_prefix, "bin", PYTHON_XY) if sys.prefix != sys.base_prefix else sys.executable
SHORT_PATH = "/usr/bin:/bin:/usr/sbin:/sbin"  # launchd's
VERSION_LINE = f"orchestra {orchestra.__version__}\n"
SHELLS = {"sh": ["sh"], "dash": ["dash"], "bash": ["bash", "--posix"], "busybox": ["busybox", "sh"]}


class Machine(Home):
    """A home on a machine that has no Orchestra yet, and beside it the programs of its PATH."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        # The real launchd and systemd are kept out of it.
        self.tools = self.make_tool("uname", "echo Linux").parent
        self.make_tool("systemctl", "echo offline; exit 1")

    @property
    def home(self) -> Path:
        return Path(self.path)

    def variables(self, **more: Optional[str]) -> dict[str, str]:
        return super().variables(**{"PATH": f"{self.tools}:{os.environ['PATH']}", **more})

    def run_program(self, *argv: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; `environ` holds variables to change, None for one to remove."""
        environ = self.variables(**options.pop("environ", {}))
        options = {"stdin": subprocess.DEVNULL, "cwd": "/", **options}
        if "input" in options:
            del options["stdin"]
        return subprocess.run(
            list(map(str, argv)), env=environ, check=False, capture_output=True, text=True, timeout=120, **options
        )

    def run_well(self, *argv: object, **options: Any) -> str:
        """Run a program that has nothing to complain of; return its output."""
        return self.output_of(self.run_program(*argv, **options))

    def install_well(self, *argv: str, shell: str = "sh", **options: Any) -> str:
        return self.output_of(self.install(shell, *argv, **options))

    def output_of(self, done: subprocess.CompletedProcess[str]) -> str:
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    def install_program(self, folder: str = "") -> str:
        """Install the program for a Python of that folder; return the executable's path."""
        python = self.folder / folder / "python" if folder else Path(BASE_PYTHON)
        if folder:
            put_files(python.parent, {"python": link_to(BASE_PYTHON)})
        return orchestra.Installer(self.path).install_program(str(python), str(SCRIPT))

    @property
    def link(self) -> Path:
        return Path(orchestra.link_path(self.path))

    def make_link(self, target: object) -> None:
        put_files(self.link.parent, {self.link.name: link_to(str(target))})

    def install(self, shell: str = "sh", *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run install.sh: as a file, or, where `url` is given, from a pipe."""
        url = options.pop("url", None)
        environ = {"ORCHESTRA_PYTHON": BASE_PYTHON, **options.pop("environ", {})}
        if url is None:
            return self.run_program(*find_shell(shell), INSTALLER, *argv, environ=environ, **options)
        text = INSTALLER.read_text()
        environ["ORCHESTRA_URL"] = url
        return self.run_program(*find_shell(shell), "-s", "--", *argv, input=text, environ=environ, **options)

    def orchestra(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run what was installed, from another folder and with launchd's short PATH."""
        return self.run_program(orchestra.link_path(self.path), *argv, **{"environ": {"PATH": SHORT_PATH}, **options})

    def make_tool(self, name: str, text: str, folder: str = "tools") -> Path:
        tool = self.folder / folder / name
        put_files(tool.parent, {name: f"#!/bin/sh\n{text}\n"})
        tool.chmod(0o755)
        return tool

    def only_tools(self, *names: str) -> str:
        """Return a PATH that has these programs, and those that every machine has."""
        folder = self.folder / "only"
        folder.mkdir()
        every = "sh dirname basename cp mktemp rm rmdir mkdir tail cut sha256sum shasum perl readlink cat uname id find"
        for name in (*every.split(), "ls", *names):
            found = shutil.which(name)
            if found:
                (folder / name).symlink_to(found)
        return f"{self.tools}:{folder}"

    def give_yaml(self) -> None:
        """Put PyYAML where an earlier fetch would have put it, so that nothing is fetched."""
        target = Path(orchestra.python_lib_dir(self.path), "yaml")
        shutil.copytree(Path(yaml.__file__).parent, target, ignore=shutil.ignore_patterns("__pycache__"))

    def listing(self) -> dict[str, Seen]:
        return without_age(take_picture(self.home))

    @contextmanager
    def daemon(self, *command: object, kind: str = "") -> Iterator[subprocess.Popen[bytes]]:
        """Run a real daemon, as if started by hand."""
        command = command or (orchestra.link_path(self.path),)
        daemon = self.start_daemon(kind, command=[*map(str, command), "daemon", "start"])
        try:
            yield daemon
        finally:
            daemon.kill()
            daemon.wait()


def find_shell(name: str) -> list[str]:
    if not shutil.which(SHELLS[name][0]):
        pytest.skip(f"no {SHELLS[name][0]} here")
    return [str(shutil.which(SHELLS[name][0])), *SHELLS[name][1:]]


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine(tempfile.mkdtemp(prefix="ori", dir="/tmp"))
    with machine.cleanup:
        yield machine


@pytest.fixture(scope="module")
def bare_python() -> Any:
    """A Python without PyYAML, in a virtual environment."""
    pip = importlib.util.find_spec("pip")
    with tempfile.TemporaryDirectory(prefix="orv", dir="/tmp") as folder:
        # Borrowed, for pip takes seconds to install.
        borrows = ["--without-pip"] if pip else []
        subprocess.run([BASE_PYTHON, "-m", "venv", *borrows, folder], check=True, stdin=subprocess.DEVNULL)
        if pip:
            os.symlink(pip.submodule_search_locations[0], f"{folder}/lib/{PYTHON_XY}/site-packages/pip")
        yield os.path.join(folder, "bin", "python")


@functools.cache
def reaches_pypi() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--isolated", "download", "--quiet", "--no-deps", "--dest", folder]
        return subprocess.call([*pip, "PyYAML>=6"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0


def need_pypi() -> None:
    if not reaches_pypi():
        pytest.skip("pip cannot fetch PyYAML here")


@pytest.fixture
def server(machine: Machine) -> Any:
    """A web server with a copy of the checkout; yields its address and its folder."""
    folder = machine.folder / "www"
    folder.mkdir()
    shutil.copy(INSTALLER, folder)
    (folder / "orchestra.py").write_bytes(ORCHESTRA_PY)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", folder
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("python", "stable"),
    [
        ("/opt/homebrew/Cellar/python@3.12/3.12.4/bin/python3.12", "/opt/homebrew/opt/python@3.12/bin/python3.12"),
        (
            "/opt/homebrew/Cellar/python@3.13/3.13.0_1/Frameworks/Python.framework/Versions/3.13/bin/python3.13",
            "/opt/homebrew/opt/python@3.13/bin/python3.13",
        ),
        ("/usr/local/Cellar/python@3.9/3.9.1/bin/python3", "/usr/local/opt/python@3.9/bin/python3"),
        (
            "/u/uv/python/cpython-3.13.1-linux-x86_64-gnu/bin/python3",
            "/u/uv/python/cpython-3.13-linux-x86_64-gnu/bin/python3",
        ),
        ("/usr/bin/python3", "/usr/bin/python3"),
        ("/Users/me/Cellar/bin/python3", "/Users/me/Cellar/bin/python3"),
    ],
)
def test_a_python_is_named_by_the_link_that_survives_an_upgrade(python: str, stable: str) -> None:
    assert orchestra.stable_python_path(python, exists=lambda path: True) == stable
    assert orchestra.stable_python_path(python, exists=lambda path: path == python) == python


def test_the_installed_python_is_not_a_virtual_environments(machine: Machine, bare_python: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import orchestra"
    code += "\nprint(orchestra.Installer('/').choose_python())"
    chosen = machine.run_well(bare_python, "-I", "-c", code).strip()
    assert not chosen.startswith(os.path.dirname(bare_python))
    code = "import sys; print(sys.version_info[:2], sys.prefix == sys.base_prefix)"
    assert machine.run_well(chosen, "-c", code) == f"{sys.version_info[:2]} True\n"


@pytest.mark.parametrize("is_any_working", [False, True])
def test_a_python_that_does_not_run_is_not_chosen(is_any_working: bool) -> None:
    candidates = [*dict.fromkeys(map(orchestra.stable_python_path, (BASE_PYTHON, sys.executable)))]
    tried: list[str] = []

    def run(argv: Sequence[str], timeout: float) -> orchestra.Completed:
        tried.append(argv[0])
        return orchestra.Completed(0 if is_any_working and argv[0] == candidates[-1] else 1, "")

    installer = orchestra.Installer("/", run=run)
    if is_any_working:
        assert installer.choose_python() == candidates[-1]
    else:
        with pytest.raises(orchestra.UsageError, match="found no working Python"):
            installer.choose_python()
    assert tried == candidates


@pytest.mark.parametrize(
    "folder", ["plain", "with space", "a'quote", "a' b", "'", "ends' '", "Zoë", '$HOME `x` "q"', "long" * 40, "a \\x"]
)
def test_the_launcher_runs_with_a_python_wherever_it_lies(machine: Machine, folder: str) -> None:
    binary = machine.install_program(folder)
    for _ in range(2):
        assert machine.run_well(binary, "--version", environ={"PATH": SHORT_PATH}) == VERSION_LINE
    assert machine.run_program(binary, "sync", "a 'b", "--nope").returncode == 2


def test_the_installed_program_is_private_and_cached_and_deaf_to_the_environment(machine: Machine) -> None:
    binary = machine.install_program()
    assert binary == f"{machine.path}/.orchestra/bin/orchestra"
    assert stat.S_IMODE(os.stat(binary).st_mode) == 0o700
    assert Path(binary).read_text().startswith(f"#!{BASE_PYTHON} -IS\n")
    trap = machine.folder / "trap"
    put_files(trap, {"json.py": "1 / 0", "orchestra.py": "1 / 0"})
    assert machine.run_well(binary, "--version", environ={"PYTHONPATH": str(trap)}, cwd=trap) == VERSION_LINE
    assert list(Path(orchestra.installed_script_path(machine.path)).parent.glob("__pycache__/orchestra.*.pyc"))


def give_packages(folder: Path) -> None:
    shutil.copytree(Path(yaml.__file__).parent, folder / "yaml")


@pytest.mark.parametrize("place", ["here", "moved", "gone, fetched", "gone", "of another Python"])
@pytest.mark.parametrize("name", ["py", "Zoë's"])  # a launcher of each form
def test_the_launcher_finds_pyyaml_without_pythons_site_and_else_with_it(
    machine: Machine, name: str, place: str
) -> None:
    python = machine.folder / name / "bin/python"
    machine.run_well(BASE_PYTHON, "-m", "venv", "--without-pip", python.parent.parent)
    site = python.parent.parent / f"lib/{PYTHON_XY}/site-packages"
    give_packages(site)
    (site / "said.pth").write_text("import sys; sys.stderr.write('site was asked')")
    installer = orchestra.Installer(machine.path)
    found = installer._find_packages(str(python))
    assert ast.literal_eval(found) == str(site)
    binary = Path(installer.install_program(str(python), str(SCRIPT), found))
    if place != "here":
        os.rename(site / "yaml", machine.folder / "yaml")
        if place == "moved":
            (site / "x.pth").write_text(str(machine.folder))
        elif "fetched" in place:
            machine.give_yaml()
        elif "another" in place:
            os.rename(machine.folder / "yaml", site / "yaml")
            binary.write_text(binary.read_text().replace(str(sys.version_info[:2]), "(2, 7)"))
    done = machine.run_program(binary, "status", "--json", environ=FORBIDDEN)
    asks_site = place not in ("here", "gone, fetched")
    assert (done.returncode, "site was asked" in done.stderr) == (2 if place == "gone" else 0, asks_site), done


@pytest.mark.parametrize("folder", ["plain", "with space"])
def test_the_launcher_prints_the_status_of_its_daemon_without_the_program(machine: Machine, folder: str) -> None:
    machine.give_yaml()
    machine.save("shop/größe 日本")
    script = Path(orchestra.installed_script_path(machine.path))
    binary = machine.install_program(folder)
    plain = machine.run_well(binary, "daemon", "status")
    with machine.daemon(binary):
        wait_until(lambda: machine.status()["queue_depth"] == 0 and "staleness" in machine.log())
        whole = machine.run_well(BASE_PYTHON, SCRIPT, "daemon", "status")
        script.rename(script.with_name("away"))
        assert machine.run_well(binary, "daemon", "status") == whole and "größe 日本" in whole
        assert machine.run_program(binary, "daemon", "status", "--short").returncode == 1
        assert machine.run_program(binary, "daemon", "status", environ={"HOME": "."}).returncode == 1
        script.with_name("away").rename(script)
        with open("/dev/full", "w") as full:
            done = subprocess.run([binary, "daemon", "status"], env=machine.variables(), stdout=full, check=False)
        assert done.returncode == 2
        closed = machine.run_program("sh", "-c", f'"{binary}" daemon status >&-')
        assert (closed.returncode, closed.stderr) == (0, "")
    assert (
        plain
        == machine.run_well(binary, "daemon", "status")
        == f'{{\n  "running": false,\n  "socket": "{machine.socket}"\n}}\n'
    )


@pytest.mark.parametrize("folder", ["plain", "with space"])  # of Python: the launcher's two forms
def test_the_installed_program_works_after_the_home_was_renamed(machine: Machine, folder: str) -> None:
    machine.give_yaml()
    machine.run_well(BASE_PYTHON, SCRIPT, "self-install")
    machine.install_program(folder)
    machine.move("Ann's new home")
    assert_works(machine)
    for path in (orchestra.binary_path(machine.path), orchestra.link_path(machine.path)):
        assert machine.run_well(path, "--version", cwd=os.path.dirname(path)) == VERSION_LINE


def test_a_link_left_dangling_by_a_renamed_home_is_renewed_and_uninstalled(machine: Machine) -> None:
    machine.make_link("/old/.orchestra/bin/orchestra")
    machine.install_well("--uninstall")
    assert not os.path.lexists(machine.link)
    machine.make_link("/old/.orchestra/bin/orchestra")
    machine.give_yaml()
    machine.install_well()
    assert_works(machine)


def test_the_link_is_absolute_where_its_folder_lies_elsewhere(machine: Machine) -> None:
    installer = orchestra.Installer(machine.path)
    assert os.readlink(installer.make_link()) == "../../.orchestra/bin/orchestra"
    os.rename(machine.home / ".local", machine.folder / "dotfiles")
    (machine.home / ".local").symlink_to(machine.folder / "dotfiles")
    assert os.readlink(installer.make_link()) == orchestra.binary_path(machine.path)


@pytest.mark.parametrize("home", ["h", "Ann & Zoë's home"])
def test_a_copy_of_another_name_installs_itself_and_is_no_longer_needed(machine: Machine, home: str) -> None:
    machine.move(home)
    machine.give_yaml()
    copy, link = machine.folder / "alone/downloaded (1).txt", machine.folder / "o"
    put_files(machine.folder, {"alone/downloaded (1).txt": ORCHESTRA_PY, link.name: link_to(str(copy))})
    copy.chmod(0o444)
    machine.run_well(sys.executable, copy, "project", "list", "--json")
    assert machine.run_well(BASE_PYTHON, link, "self-install") == "installed ~/.local/bin/orchestra\n"
    assert os.listdir(copy.parent) == [copy.name]
    copy.unlink()
    link.unlink()
    assert Path(orchestra.installed_script_path(machine.path)).read_bytes() == ORCHESTRA_PY
    assert_works(machine)


def assert_works(machine: Machine) -> None:
    """Check that what is installed does its work from any folder."""
    for argv in (("init", str(machine.code), "-p", "demo", "--sync"), ("status", "--check")):
        done = machine.orchestra(*argv)
        assert (done.returncode, done.stderr) == (0, ""), done
    assert (machine.code / "CLAUDE.md").exists()


def test_installing_again_upgrades_in_place_even_from_the_installed_copy(machine: Machine) -> None:
    machine.give_yaml()
    newer = machine.folder / "newer.py"
    newer.write_bytes(new_version())
    for script in (SCRIPT, newer):
        machine.run_well(BASE_PYTHON, script, "self-install")
    for _ in range(2):
        assert machine.orchestra("--version").stdout == "orchestra 9.9.10\n"
        assert machine.orchestra("self-install").returncode == 0
    assert [path for path in machine.listing() if path.endswith(".tmp")] == []


def new_version() -> bytes:
    # Of another length: bytecode is cached by seconds and size.
    return re.sub(rb'(?m)^__version__ = ".*"', b'__version__ = "9.9.10"', ORCHESTRA_PY)


def test_a_script_that_is_no_file_cannot_be_installed(machine: Machine) -> None:
    with pytest.raises(orchestra.UsageError, match="the running script is not a file"):
        orchestra.Installer(machine.path).install_program(BASE_PYTHON, str(machine.folder))
    assert machine.listing() == {}


# Code in the current folder

STDLIB = os.path.dirname(os.__file__)


@pytest.fixture
def traps(machine: Machine) -> Any:
    """A folder with a module of every name that could be imported; yields it, and those that were."""
    names = {*sys.builtin_module_names, "yaml", "pip", "orchestra"}
    for path in (STDLIB, *filter(os.path.isdir, [f"{STDLIB}/lib-dynload"])):
        names |= {re.split(r"\W", name)[0] for name in os.listdir(path)}
    ran = machine.folder / "ran"
    files = {f"{name}.py": name for name in names if name}
    files["yaml/__init__.py"] = "yaml"
    folder = machine.folder / "traps"
    put_files(folder, {file: f"open({str(ran)!r}, 'a').write('{name} ')" for file, name in files.items()})
    yield folder, lambda: ran.read_text() if ran.exists() else ""


def disarm(folder: Path, names: Iterable[str]) -> None:
    """Remove the traps for modules that Python itself imports from PYTHONPATH before the script's first line."""
    for name in names:
        (folder / f"{name.partition('.')[0]}.py").unlink(missing_ok=True)


# As a program does that has the current folder on its import path.
RUN_AS_SCRIPT = """
import sys
sys.path.insert(0, "")
with open(sys.argv[1], "rb") as script:
    exec(script.read(), {"__name__": "__main__", "__file__": sys.argv.pop(1)})
"""


@pytest.mark.parametrize(
    "where", ["current", "script", "link", "PYTHONPATH", "relative PYTHONPATH", "empty PYTHONPATH"]
)
def test_started_as_a_script_it_runs_no_code_of_other_folders(machine: Machine, traps: Any, where: str) -> None:
    folder, ran = traps
    python, script, cwd, environ = [sys.executable], SCRIPT, machine.code, {}
    if where == "current":
        python, cwd = [sys.executable, "-I", "-c", RUN_AS_SCRIPT], folder
    elif "PYTHONPATH" in where:
        disarm(folder, machine.run_well(sys.executable, "-c", "import sys; print(*sys.modules)").split())
        environ = {"PYTHONPATH": {"P": str(folder), "r": f"x:{folder.name}", "e": "/nowhere:"}[where[0]]}
        cwd = {"r": machine.folder, "e": folder}.get(where[0], cwd)
    else:
        script = folder / "orchestra.py"
        script.write_bytes(ORCHESTRA_PY)
        if where == "link":
            script = machine.folder / "o"
            script.symlink_to(folder / "orchestra.py")
    for argv in (["init", machine.code, "-p", "demo", "--sync"], ["status", "--check", "--json"]):
        machine.run_well(*python, script, *argv, cwd=cwd, environ=environ)
        assert ran() == ""
    assert (machine.code / "CLAUDE.md").exists()


@pytest.mark.parametrize("name", ["colorsys.py", "wsgiref/__init__.py", ""])
def test_a_module_that_python_itself_took_from_pythonpath_is_told_in_one_line(machine: Machine, name: str) -> None:
    word = name.partition("/")[0].partition(".")[0]
    folder = machine.folder / "x"
    put_files(folder, {"sitecustomize.py": f"import {word}", name: ""} if name else {"sitecustomize.py": ""})
    done = machine.run_program(sys.executable, SCRIPT, "project", "list", environ={"PYTHONPATH": str(folder)})
    if name:
        told = f"orchestra: {folder}/{name} was loaded in place of Python's own {word}"
        assert (done.returncode, done.stderr.splitlines()) == (2, [told, "  try: unset PYTHONPATH"])
    else:
        assert done.returncode == 0, done


def test_python_m_pip_runs_no_code_of_the_current_folder(machine: Machine, traps: Any, bare_python: str) -> None:
    folder, ran = traps
    for environ in ({}, {"PYTHONPATH": str(folder)}):
        disarm(folder, ("sitecustomize", "usercustomize", *sys.modules) if environ else ())
        no_index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": None, **environ}
        done = machine.run_program(bare_python, SCRIPT, "init", ".", "-p", "demo", cwd=folder, environ=no_index)
        assert (ran(), done.returncode) == ("", 2), done
        assert "no wheel of PyYAML 6.0.3" in done.stderr


@pytest.mark.parametrize("folder", [*filter(os.path.exists, [STDLIB, f"{STDLIB}/lib-dynload"])])
def test_pythons_own_folders_are_trusted_even_as_the_current_one(machine: Machine, folder: str) -> None:
    machine.run_well(sys.executable, SCRIPT, "status", "--json", cwd=folder)


def test_imported_it_leaves_the_import_path_alone(machine: Machine) -> None:
    code = f"import sys; sys.path.insert(1, {str(HERE)!r}); before = sys.path[:]"
    code += "\nimport orchestra; print(sys.path == before)"
    assert machine.run_well(sys.executable, "-c", code, environ={"PYTHONPATH": "x"}) == "True\n"


# PyYAML


def test_pyyaml_is_pinned_to_its_published_files() -> None:
    hashes = orchestra.PYYAML_HASHES.split()
    assert len(set(hashes)) == len(hashes) == 7 * 6
    assert all(re.fullmatch("[0-9a-f]{64}", word) for word in hashes)


OTHER_FILE = "pip found another file than the published one of version 6.0.3"
NO_WHEEL = f"no wheel of PyYAML 6.0.3 for Python {PYTHON_XY[6:]}"
FETCHING = f"orchestra: fetching PyYAML into ~/.orchestra/lib/{PYTHON_XY}"
FORBIDDEN = {"ORCHESTRA_NO_FETCH": "1"}


def look_in(folder: Path) -> dict[str, Optional[str]]:
    """Have pip look for packages in a folder alone."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("PyYAML-6.0.3-py3-none-any.whl", OTHER_FILE),
        ("PyYAML-6.0.3.tar.gz", NO_WHEEL),
        ("PyYAML-9.9.9-py3-none-any.whl", NO_WHEEL),
        ("", "no connection to the package index"),
    ],
)
def test_another_pyyaml_than_the_published_one_is_refused_in_a_line(
    machine: Machine, bare_python: str, name: str, reason: str
) -> None:
    folder, ran = machine.folder / "index", machine.folder / "ran"
    put_files(machine.folder, {"PyYAML-6.0.3/setup.py": f"open({str(ran)!r}, 'w')", "index": None})
    if name.endswith(".tar.gz"):
        with tarfile.open(folder / name, "w:gz") as archive:
            archive.add(machine.folder / "PyYAML-6.0.3", "PyYAML-6.0.3")
    elif name:
        with zipfile.ZipFile(folder / name, "w") as wheel:
            wheel.writestr("yaml/__init__.py", "")
    offline = {"PIP_NO_INDEX": None, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "1"}
    done = machine.run_program(bare_python, SCRIPT, "status", environ={**look_in(folder), **({} if name else offline)})
    assert done.returncode == 2 and not ran.exists()
    first, refusal, way_out = done.stderr.splitlines()
    assert (first, refusal) == (FETCHING, f"orchestra: could not fetch PyYAML: {reason}")
    hint = f"  try: {bare_python} -m pip install PyYAML, or your system's package of it (python3-yaml)"
    assert way_out == hint if name else way_out.startswith("  try: again when you are online, or ")
    assert left_of_pyyaml(machine) == [] and not Path(orchestra.run_dir(machine.path), "pyyaml.txt").exists()


def left_of_pyyaml(machine: Machine) -> list[str]:
    """Return what a first run left but the lock's file; pip's own things beside ~/.orchestra are not ours."""
    return [path for path in machine.listing() if path.startswith(".orchestra/lib/")]


def test_an_index_of_ones_own_may_serve_the_published_file(machine: Machine, bare_python: str) -> None:
    need_pypi()
    folder = machine.folder / "index"
    download = [bare_python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "PyYAML==6.0.3"]
    assert machine.run_program(*download).returncode == 0
    assert machine.run_program(bare_python, SCRIPT, "status", "--json", environ=look_in(folder)).returncode == 0


def test_a_bare_python_fetches_pyyaml_once_and_says_so(machine: Machine, bare_python: str) -> None:
    need_pypi()
    for said in (f"{FETCHING}\n", ""):
        done = machine.run_program(bare_python, SCRIPT, "init", machine.code, "-p", "demo", "--sync")
        assert (done.returncode, done.stderr) == (0, said)
    assert (machine.code / "CLAUDE.md").exists()
    assert os.listdir(machine.home / ".orchestra/lib") == [PYTHON_XY]


def test_two_first_runs_at_once_do_not_harm_each_other(machine: Machine, bare_python: str) -> None:
    need_pypi()
    pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    argv = [bare_python, str(SCRIPT), "status", "--json"]
    runs = [subprocess.Popen(argv, env=machine.variables(), **pipes) for _ in range(2)]
    said = [run.communicate(timeout=100) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert "".join(err for _, err in said).count("fetching PyYAML") == 1
    assert os.listdir(machine.home / ".orchestra/lib") == [PYTHON_XY]


@pytest.mark.skipif(
    not os.path.exists("/usr/bin/python3")
    or subprocess.call(["/usr/bin/python3", "-c", "import yaml"], stderr=subprocess.DEVNULL) == 0
    or subprocess.call(["/usr/bin/python3", "-m", "pip", "--version"], stdout=subprocess.DEVNULL) != 0,
    reason="/usr/bin/python3 has PyYAML, or has no pip, or is not there",
)
def test_the_systems_own_python_fetches_pyyaml(machine: Machine) -> None:
    need_pypi()
    done = machine.run_program("/usr/bin/python3", SCRIPT, "status", "--json")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done


@pytest.mark.parametrize(
    ("other", "found", "way_out"),
    [
        ("", "PyYAML is missing from {python}, and ORCHESTRA_NO_FETCH is set", "pip install PyYAML"),
        ("yaml/notes.txt", "the PyYAML in {lib} cannot be imported", "rm -r"),
        ("yaml/__init__.py", "{lib}/{other} is not PyYAML, or is incomplete", "install PyYAML"),
        ("yaml.py", "{lib}/{other} is not PyYAML, or is incomplete", "install PyYAML"),
    ],
)
def test_without_pyyaml_where_fetching_is_forbidden_one_line_says_so(
    machine: Machine, bare_python: str, other: str, found: str, way_out: str
) -> None:
    lib = Path(orchestra.python_lib_dir(machine.path))
    put_files(lib, {other: ""} if other else {})
    done = machine.run_program(bare_python, SCRIPT, "init", machine.code, "-p", "demo", environ=FORBIDDEN)
    found = re.escape(found.format(lib=lib, other=other, python=bare_python))
    assert (done.returncode, done.stdout, other or machine.listing()) == (2, "", other or {})
    assert re.match(rf"orchestra: {found}\n  try: .*{way_out}.*\n\Z", done.stderr), done


def test_pyyaml_that_is_there_serves_where_fetching_is_forbidden(machine: Machine, bare_python: str) -> None:
    told: list[str] = []
    installer = orchestra.Installer(machine.path, FORBIDDEN, told.append, no_program)
    installer._copy_yaml(yaml.__file__)  # from an environment that may vanish
    machine.run_well(bare_python, SCRIPT, "status", "--json", environ=FORBIDDEN)
    installer.fetch_yaml(sys.executable)  # an upgrade
    assert told == [] and os.listdir(machine.home / ".orchestra/lib") == [PYTHON_XY]


def no_program(argv: Sequence[str], timeout: float) -> orchestra.Completed:
    raise AssertionError(argv)


@pytest.mark.parametrize(
    ("code", "output", "reason"),
    [
        (1, "WARNING: x\nERROR: it is broken", "ERROR: it is broken"),
        (1, "ERROR: No matching distribution found for PyYAML==6.0.3", NO_WHEEL),
        (1, "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n    Got  1234", OTHER_FILE),
        (1, "", "exit status 1"),
        (orchestra.TIMED_OUT, "no answer within 300 s", "no answer within 300 s"),
        (1, "/x/python: No module named pip", "pip is missing"),
        (1, "NewConnectionError\nERROR: No matching distribution found", "no connection to the package index"),
        (0, "did nothing", "did nothing"),
        (-2, "", ""),
    ],
)
def test_a_failing_or_interrupted_pip_leaves_nothing_half_installed(
    machine: Machine, code: int, output: str, reason: str
) -> None:
    told: list[str] = []

    def run(argv: Sequence[str], timeout: float, folder: str) -> orchestra.Completed:
        Path(argv[argv.index("--target") + 1], "half").mkdir(parents=True)
        if code == -2:
            raise KeyboardInterrupt
        return orchestra.Completed(code, output)

    with pytest.raises((orchestra.OrchestraError, KeyboardInterrupt)) as caught:
        orchestra.Installer(machine.path, {}, told.append, run).fetch_yaml("/x/python")
    if reason:
        assert str(caught.value) == f"could not fetch PyYAML: {reason}"
        package = next(filter(os.path.exists, orchestra.SYSTEM_PACKAGES), "")
        way_out = orchestra.SYSTEM_PACKAGES.get(package, "install your system's package of PyYAML")
        hint = str(getattr(caught.value, "hint", ""))
        if "connection" in reason:
            assert hint.endswith(f"or {way_out}")
        else:
            assert hint == way_out if "missing" in reason else "/x/python -m pip install PyYAML" in hint
    assert told == [FETCHING] and left_of_pyyaml(machine) == []


@pytest.mark.parametrize(
    "argv", ["--help", "--version", "daemon status", "daemon stop", "daemon logs", "sync --help", "self-uninstall"]
)
def test_what_reads_no_registry_needs_no_pyyaml(machine: Machine, bare_python: str, argv: str) -> None:
    machine.run_well(bare_python, SCRIPT, *argv.split(), environ=FORBIDDEN)
    assert machine.listing() == {}


# Pythons that are too old


def old_python(version: str) -> str:
    found = [*Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    if not found:
        pytest.skip(f"no Python {version} here")
    return str(found[0])


@pytest.mark.parametrize("argv", [["--version"], ["sync", "--all"], []])
@pytest.mark.parametrize("version", ["3.6", "3.7", "3.8"])
def test_on_an_old_python_one_clear_line_is_said(machine: Machine, version: str, argv: list[str]) -> None:
    done = machine.run_program(old_python(version), SCRIPT, *argv)
    expected = f"orchestra: needs Python 3.9 or newer on macOS or Linux (found Python {version} on {sys.platform})\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_python_3_7_can_parse_the_script_to_say_that_it_is_too_old() -> None:
    ast.parse(SOURCE, feature_version=(3, 7))
    # What that does not refuse: `return *a, b` without parentheses.
    tuples = [
        n.value for n in ast.walk(MODULE) if isinstance(n, (ast.Return, ast.Yield)) and isinstance(n.value, ast.Tuple)
    ]
    bare = [n for n in tuples if n.elts and n.elts[0].col_offset == n.col_offset]
    assert [n.lineno for n in bare if any(isinstance(item, ast.Starred) for item in n.elts)] == []


# Tools that read the PEP 723 header


@pytest.mark.parametrize("tool", [["uv", "run", "--python", BASE_PYTHON], ["pipx", "run"]], ids=["uv", "pipx"])
def test_tools_that_read_the_header_run_the_script(machine: Machine, tool: list[str]) -> None:
    program = shutil.which(tool[0])
    if not program:
        pytest.skip(f"no {tool[0]} here")
    need_pypi()
    put_files(machine.folder, {"orchestra.py": ORCHESTRA_PY})
    for argv in (["--version"], ["status", "--json"]):
        done = machine.run_program(program, *tool[1:], "./orchestra.py", *argv, cwd=machine.folder)
        assert done.returncode == 0 and "fetching PyYAML" not in done.stderr, done


# Tools that read pyproject.toml

INSTALLS_A_PACKAGE = {
    "pip": 'python -m venv "$HOME/v" && "$HOME/v/bin/pip" install --quiet . && ln -s ../v/bin/orchestra "$HOME/bin/"',
    "uv": "uv tool install --quiet --python python .",
    "pipx": "pipx install --quiet --python python .",
}
# A systemd that starts the daemon and no more.
ONE_START = """
case "$2" in is-system-running) echo running;; restart)
    sed -n 's/^ExecStart="\\(.*\\)" daemon start/\\1/p' "$HOME/.config/systemd/user/orchestra.service" >"$HOME/program"
    setsid "$(cat "$HOME/program")" daemon start >/dev/null 2>&1 & ;;
esac
"""


@pytest.mark.skipif(not shutil.which("setsid"), reason="no setsid here")
@pytest.mark.parametrize("tool", INSTALLS_A_PACKAGE)
def test_a_package_works_and_its_daemon_survives_it(machine: Machine, tool: str) -> None:
    if not shutil.which(tool):
        pytest.skip(f"no {tool} here")
    need_pypi()
    put_files(machine.home, {"bin": None})
    put_files(machine.tools, {"python": link_to(BASE_PYTHON)})
    where = {"UV_TOOL_BIN_DIR": f"{machine.home}/bin", "PIPX_BIN_DIR": f"{machine.home}/bin", "PIPX_HOME": None}
    checkout = sorted(os.listdir(HERE))
    machine.run_well("sh", "-c", INSTALLS_A_PACKAGE[tool], cwd=HERE, environ=where)
    assert sorted(os.listdir(HERE)) == checkout
    program = machine.home / "bin/orchestra"
    assert machine.run_well(program, "--version") == VERSION_LINE
    assert machine.run_well(program, "init", machine.code, "-p", "demo", "--sync").startswith("registered demo/code")
    machine.make_tool("systemctl", ONE_START)
    assert machine.run_program(program, "daemon", "install", "--systemd").returncode == 0
    try:
        for folder in (machine.home / "v", machine.home / ".local", machine.home / "bin"):
            shutil.rmtree(folder, ignore_errors=True)
        installed = machine.run_program(orchestra.binary_path(machine.path), "sync", "--all", environ=FORBIDDEN)
        assert installed.returncode == 0 and machine.answers()
    finally:
        machine.stop_detached()


# install.sh

every_shell = pytest.mark.parametrize("shell", [name for name in SHELLS if name != "sh"])
SHA256 = hashlib.sha256(ORCHESTRA_PY).hexdigest()


def assert_refused(done: Any, *words: str) -> None:
    """Check that install.sh said in one line why not."""
    assert (done.returncode, done.stdout) == (2, ""), done
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("install.sh: ")]
    for word in words:
        assert word in line


@every_shell
def test_install_sh_from_a_checkout_leaves_a_working_program(machine: Machine, shell: str) -> None:
    machine.move("home of Ann" if shell == "dash" else "h2")
    machine.give_yaml()
    first, second, *lines = machine.install_well(shell=shell).splitlines()
    assert first == "installed ~/.local/bin/orchestra"
    assert second == f"orchestra {orchestra.__version__}, with {BASE_PYTHON}"
    assert [line for line in lines if line.startswith("next:  ~/.local/bin/orchestra init")]
    put_files(machine.projects, {"shop/project.yaml": "", "shop/api.local.yaml": ""})
    assert "\nnext:  ~/.local/bin/orchestra init" in machine.install_well(shell=shell)
    put_files(machine.projects, {"shop/my api.yaml": ""})
    assert "\nnext:  ~/.local/bin/orchestra status\n" in machine.install_well(shell=shell)
    shutil.rmtree(machine.projects / "shop")
    assert Path(orchestra.binary_path(machine.path)).read_text().startswith(f"#!{BASE_PYTHON} -IS\n")
    assert os.path.samefile(machine.link, orchestra.binary_path(machine.path))
    assert sorted(os.listdir(machine.home / ".orchestra/lib")) == ["orchestra.py", PYTHON_XY]
    assert_works(machine)


@every_shell
def test_install_sh_from_a_pipe_leaves_a_working_program(machine: Machine, shell: str, server: Any) -> None:
    machine.give_yaml()
    machine.install_well(shell=shell, url=server[0] + "/", environ={"ORCHESTRA_SHA256": SHA256})
    assert Path(orchestra.installed_script_path(machine.path)).read_bytes() == ORCHESTRA_PY
    assert_works(machine)


LINE = 'export PATH="$HOME/.local/bin:$PATH"'


@pytest.mark.parametrize(
    ("shell", "file", "line"),
    [
        ("/bin/bash", "~/.bashrc", LINE),
        ("/usr/bin/zsh", "~/.zshrc", LINE),
        ("/opt/fish/bin/fish", "~/.config/fish/config.fish", "fish_add_path ~/.local/bin"),
        ("/bin/dash", "~/.profile", LINE),
        (None, "~/.profile", LINE),
        ("/bin/bash", "", ""),
    ],
)
def test_install_sh_tells_the_line_for_path_and_its_file(
    machine: Machine, shell: Optional[str], file: str, line: str
) -> None:
    machine.give_yaml()
    path = f"{machine.tools}:{'' if file else f'{machine.home}/.local/bin:'}{os.environ['PATH']}"
    said = machine.install_well(environ={"SHELL": shell, "PATH": path}).splitlines()[2:]
    program = "~/.local/bin/orchestra" if file else "orchestra"
    told = [f"your PATH lacks ~/.local/bin: add this line to {file}, and open a new terminal", f"  {line}"]
    assert said == [
        *(told if file else []),
        f"next:  {program} init PATH -p PROJECT --sync",
        f"then:  {program} daemon start --detach",
    ]


@pytest.mark.skipif(not shutil.which("setsid"), reason="no setsid here")
def test_install_sh_has_systemd_run_the_daemon_where_it_runs(machine: Machine) -> None:
    machine.give_yaml()
    machine.make_tool("systemctl", ONE_START)
    try:
        said = machine.install().stdout
        assert "installed orchestra.service" in said and "then: " not in said and machine.answers()
        assert machine.install("sh", "--uninstall").stdout.endswith("\nuninstalled\n")
        assert not machine.answers() and list(machine.home.rglob("*.service")) == []
    finally:
        machine.stop_detached()


def test_install_sh_installs_where_systemd_cannot_start_the_daemon(machine: Machine) -> None:
    machine.give_yaml()
    machine.make_tool("systemctl", '[ "$2" = is-system-running ] && echo degraded || exit 1')
    done = machine.install()
    assert done.returncode == 0 and "systemd error" in done.stderr and "daemon start --detach" in done.stdout


def test_install_sh_upgrades_in_place_while_a_daemon_runs(machine: Machine, server: Any) -> None:
    machine.give_yaml()
    url, folder = server
    machine.install_well(url=url)
    machine.register(path=str(machine.code), targets=["claude"])
    (folder / "orchestra.py").write_bytes(new_version())
    with machine.daemon() as daemon:
        said = machine.install_well(url=url)
        assert re.search("(?m)^then: .*orchestra daemon restart  ", said)
        assert machine.orchestra("--version").stdout == "orchestra 9.9.10\n"
        assert machine.answers()
        assert machine.orchestra("daemon", "stop").returncode == 0
        assert daemon.wait(20) == 0
    assert (machine.code / "CLAUDE.md").exists()


DOES_NOT_START = b"1 / 0\n# The last line: install.sh takes no copy without it.\n"
SIZE = len(ORCHESTRA_PY)
# All over the script, and in its last line and the one above it.
CUTS = sorted({0, 1, 20, *(SIZE * part // 8 for part in range(1, 8)), SIZE - 1, SIZE - 2, SIZE - 53, SIZE - 54})
DOWNLOADS: list[tuple[str, Optional[bytes], dict[str, str], str]] = [
    ("a page", b"<!DOCTYPE html>\n<title>Sign in\n", {}, "orchestra.py is incomplete, or not Orchestra's"),
    ("no start", DOES_NOT_START, {}, "orchestra.py does not start: "),
    ("none", None, {}, "could not download {url}/orchestra.py"),
    ("no server", None, {"ORCHESTRA_URL": "http://127.0.0.1:9"}, "could not download http://127.0.0.1:9/orchestra.py"),
    ("no address", None, {"ORCHESTRA_URL": ""}, "set ORCHESTRA_URL to the address of the folder"),
    *(
        (f"checksum {sums[:9]}", ORCHESTRA_PY, {"ORCHESTRA_SHA256": sums}, f"expected SHA-256 {sums}, got {SHA256}")
        for sums in ("0" * 64, SHA256[:-1], "sha256")
    ),
    *((f"cut at {end}", ORCHESTRA_PY[:end], {}, "orchestra.py is incomplete") for end in CUTS),
]


@pytest.mark.parametrize("is_installed", [False, True])
def test_a_download_that_is_not_the_whole_script_changes_nothing(
    machine: Machine, server: Any, is_installed: bool
) -> None:
    url, folder = server
    if is_installed:
        machine.give_yaml()
        machine.install_well(url=url)
    before = machine.listing()
    for name, script, environ, message in DOWNLOADS:
        (folder / "orchestra.py").unlink(missing_ok=True)
        if script is not None:
            (folder / "orchestra.py").write_bytes(script)
        where = environ.get("ORCHESTRA_URL", url)
        assert_refused(machine.install(url=where, environ=environ), message.format(url=url))
        assert machine.listing() == before, name


def check_of_cuts(machine: Machine, ends: Sequence[int]) -> list[int]:
    """Call install.sh's own check on the script cut at many places; return the cuts that it lets pass."""
    functions = INSTALLER.read_text().rsplit('{ main "$@"; }', 1)[0]
    check = f"{functions}\ncd {shlex.quote(str(machine.folder))}\nORCHESTRA_SHA256=\nwhile read -r end; do\n"
    check += 'head -c "$end" whole >cut\n(check_script cut) 2>/dev/null && echo "$end"\ndone\nexit 0\n'
    put_files(machine.folder, {"whole": ORCHESTRA_PY, "check.sh": check})
    return list(
        map(int, machine.run_well("sh", machine.folder / "check.sh", input="\n".join(map(str, ends)) + "\n").split())
    )


@pytest.mark.parametrize("count", [200, pytest.param(SIZE, marks=pytest.mark.soak)], ids=["few", "all"])
def test_no_cut_of_the_scripts_last_bytes_passes_the_check(machine: Machine, count: int) -> None:
    assert check_of_cuts(machine, range(SIZE - count, SIZE + 1)) == [SIZE]


def runs_something(machine: Machine, shell: str, text: bytes) -> bool:
    """Return whether a (part of) install.sh from a pipe does anything: looking for a Python is the first."""
    mark, python = machine.folder / "ran", machine.tools / "python"
    if not python.exists():
        machine.make_tool("python", f"echo x >{shlex.quote(str(mark))}\nexit 1")
        machine.make_tool("id", "echo 1000")
    environ = {"ORCHESTRA_PYTHON": str(python), "PATH": str(machine.tools), "ORCHESTRA_URL": "http://127.0.0.1:9"}
    pipe: Any = {"input": text, "capture_output": True, "timeout": 20}
    subprocess.run(find_shell(shell), env=machine.variables(**environ), cwd=machine.code, check=False, **pipe)
    return mark.exists()


@every_shell
@pytest.mark.parametrize("step", [211, pytest.param(1, marks=pytest.mark.soak)])
def test_install_sh_cut_short_runs_nothing(machine: Machine, shell: str, step: int) -> None:
    text = INSTALLER.read_bytes()
    last = 200 if shell == "dash" else 40
    # Missing only its final newline, it is complete.
    for end in (*range(0, len(text) - last, step), *range(len(text) - last, len(text) - 1)):
        assert not runs_something(machine, shell, text[:end]), end
    assert (machine.listing(), list(machine.code.iterdir())) == ({}, [])
    assert runs_something(machine, shell, text)


OLD_PYTHON = '[ "$1" = --version ] || exit 1\necho Python 3.8.10'


@pytest.mark.parametrize("found", ["none", "a stand-in", "2.7", "3.6", "3.8"])
def test_install_sh_without_a_python_says_which_it_wants(machine: Machine, found: str) -> None:
    path = machine.only_tools()
    if found == "a stand-in":
        machine.make_tool("python3", OLD_PYTHON, "only")
        found = "3.8"
    elif found != "none":
        (machine.folder / "only/python3").symlink_to(old_python(found))
    found = found if found == "none" else f"Python {found}."
    done = machine.install(environ={"PATH": path, "ORCHESTRA_PYTHON": None})
    way_out = ". Debian: sudo apt install python3; macOS: brew install python"
    assert_refused(done, f"needs Python 3.9 or newer (found {found}", way_out)
    assert machine.listing() == {}


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="install.sh looks for names up to python3.14")
def test_install_sh_takes_a_newer_python_beside_an_old_python3(machine: Machine) -> None:
    machine.give_yaml()
    path = machine.only_tools()
    machine.make_tool("python3", OLD_PYTHON, "only")
    machine.make_tool(PYTHON_XY, f'exec "{BASE_PYTHON}" "$@"', "only")
    assert machine.install(environ={"PATH": path, "ORCHESTRA_PYTHON": None}).returncode == 0
    assert_works(machine)


def test_install_sh_does_not_take_another_python_than_the_one_asked_for(machine: Machine) -> None:
    machine.give_yaml()
    assert_refused(machine.install(environ={"ORCHESTRA_PYTHON": "/nowhere/python3"}), "/nowhere/python3")


def test_install_sh_runs_no_program_of_the_current_folder(machine: Machine) -> None:
    machine.give_yaml()
    ran = machine.folder / "ran"
    for name in ("python3", "uname", "id", "cp", "mktemp", "orchestra"):
        machine.make_tool(name, f"echo {name} >>{shlex.quote(str(ran))}\nexit 1", "bad")
    path = f".::../bad:{machine.tools}:{os.path.dirname(BASE_PYTHON)}:{os.environ['PATH']}:"
    environ = {"PATH": path, "ORCHESTRA_PYTHON": None}
    machine.run_well("/bin/sh", INSTALLER, environ=environ, cwd=machine.folder / "bad")
    assert not ran.exists()
    assert_works(machine)


@pytest.mark.parametrize(
    ("xcode_select", "is_run"),
    [("exit 2", False), ("echo /nowhere", False), ("echo", False), ('echo "$(dirname "$0")/developer"', True)],
)
@pytest.mark.parametrize("how", ["found", "linked", "named"])
def test_install_sh_never_starts_apples_placeholder(
    machine: Machine, xcode_select: str, is_run: bool, how: str
) -> None:
    path = machine.only_tools()
    ran = machine.folder / "ran"
    stub = machine.make_tool("python3", f"echo ran >>{ran}\nexit 1", "only" if how != "linked" else "apple")
    if how == "linked":
        (machine.folder / "only/python3").symlink_to(stub)
    machine.make_tool("uname", "echo Darwin")
    machine.make_tool("xcode-select", xcode_select)
    machine.make_tool("python3", f"echo ran >>{ran}\nexit 1", "tools/developer/usr/bin")
    text = INSTALLER.read_text().replace("/usr/bin/python3 ]", f"{stub} ]")
    environ = {"PATH": path, "ORCHESTRA_PYTHON": "python3" if how == "named" else None}
    done = machine.run_program("/bin/sh", "-s", input=text, environ=environ)
    assert_refused(done, "Python 3.9 or newer")
    if not is_run and how != "named":
        assert_refused(done, "(found Apple's placeholder: xcode-select --install)")
    assert (ran.exists(), machine.listing()) == (is_run, {})


@pytest.mark.parametrize("has", ["wget", "neither"])
def test_install_sh_downloads_with_wget_where_there_is_no_curl(machine: Machine, server: Any, has: str) -> None:
    if has == "wget" and not shutil.which("wget"):
        pytest.skip("no wget here")
    machine.give_yaml()
    before = machine.listing()
    done = machine.install(url=server[0], environ={"PATH": machine.only_tools(has)})
    if has == "wget":
        assert (done.returncode, done.stderr) == (0, ""), done
        assert_works(machine)
    else:
        assert done.returncode == 2 and "install.sh: wget is missing: install it first" in done.stderr
        assert machine.listing() == before


@pytest.mark.parametrize("what", ["home", "local"])
def test_install_sh_into_a_folder_that_cannot_be_written_changes_nothing(machine: Machine, what: str) -> None:
    python, as_whom = (python_for_nobody(), AS_NOBODY) if ME == 0 else (BASE_PYTHON, {})
    put_files(machine.folder, {"install.sh": INSTALLER.read_bytes(), "orchestra.py": ORCHESTRA_PY})
    if what == "local":
        machine.give_yaml()
    put_files(machine.home, {".local": None})
    if ME == 0:
        for path in (machine.folder, machine.home, *machine.home.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    blocked = machine.home if what == "home" else machine.home / ".local"
    before = machine.listing()
    blocked.chmod(0o555)
    environ = {"ORCHESTRA_PYTHON": python, "PATH": f"{machine.tools}:{SHORT_PATH}"}
    done = machine.run_program("/bin/sh", machine.folder / "install.sh", environ=environ, **as_whom)
    blocked.chmod(0o755)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert re.search(r"could not |not a folder that you can write to$", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr and machine.listing() == before


@pytest.mark.parametrize("other", ["another orchestra", "/opt/another", "theirs/.orchestra/bin/orchestra", None])
def test_install_sh_leaves_another_programs_file_alone(machine: Machine, other: Optional[str]) -> None:
    put_files(machine.home, {"theirs/.orchestra/bin/orchestra": "their launcher"})
    is_link = other is not None and "/" in other
    put_files(machine.link.parent, {machine.link.name: link_to(f"{machine.home / str(other)}") if is_link else other})
    before = machine.listing()
    done = machine.install()
    assert done.returncode == 2 and "exists, and is not Orchestra's link" in done.stderr
    assert machine.listing() == before
    machine.install_well("--uninstall")
    assert machine.listing() == before


@every_shell
def test_uninstalling_leaves_the_registry_and_the_backups(machine: Machine, shell: str) -> None:
    machine.give_yaml()
    machine.install_well(shell=shell)
    (machine.code / "CLAUDE.md").write_text("by hand\n")
    assert_works(machine)
    put_files(machine.home / ".orchestra", {"backups/demo/code/x": "", "run/x": ""})
    with machine.daemon() as daemon:
        assert machine.install_well("--uninstall", shell=shell).endswith("\nuninstalled\n")
        assert daemon.wait(20) == 0
    assert sorted(os.listdir(machine.home / ".orchestra")) == ["backups", "hashes", "projects"]
    assert not os.path.lexists(machine.link) and (machine.code / "CLAUDE.md").exists()


def test_uninstalling_cleans_up_after_a_killed_sync(machine: Machine) -> None:
    machine.give_yaml()
    machine.install_well()
    assert_works(machine)
    codebase = orchestra.load_codebase(machine.path, "demo", "code")
    with pytest.raises(KeyboardInterrupt), orchestra.CodebaseTurn(machine.path, codebase, time.time) as turn:
        left = machine.code / turn.new_temporary("CLAUDE.md")
        left.write_text("half")
        raise KeyboardInterrupt
    put_files(machine.projects, {"demo/broken.yaml": "["})
    done = machine.install("sh", "--uninstall")
    assert done.returncode == 0 and not left.exists()
    # What cannot be read may have left something too, and that stays known.
    assert "orchestra: ~/.orchestra/projects/demo/broken.yaml" in done.stderr
    assert f"kept: {machine.path}/.orchestra/run (needed to clean up after killed syncs)" in done.stdout
    assert sorted(os.listdir(machine.home / ".orchestra")) == ["hashes", "projects", "run"]
    done = machine.install("sh", "--uninstall")
    assert (done.returncode, done.stderr) == (0, "") and "/.orchestra/run (needed" in done.stdout


def test_one_codebase_that_cannot_be_cleaned_up_does_not_keep_the_others_from_it(home: Home, monkeypatch: Any) -> None:
    for name in ("shop/a", "shop/b", "shop/c"):
        home.make_codebase(name)
    home.sync()
    cleaned = []

    def clean_up(path: str, codebase: orchestra.Codebase) -> None:
        cleaned.append(codebase.name)
        if codebase.name == "b":
            raise orchestra.SyncError("it is in use", "wait")

    monkeypatch.setattr(orchestra, "clean_up_codebase", clean_up)
    ran = home.run("self-uninstall")
    assert (ran.status, ran.err) == (2, "orchestra: it is in use\n  try: wait\n")
    assert cleaned == ["a", "b", "c"]


def test_cleaning_up_where_nothing_was_synced_fetches_nothing(machine: Machine, bare_python: str) -> None:
    os.makedirs(orchestra.run_dir(machine.path))
    machine.run_well(bare_python, SCRIPT, "self-uninstall")
    assert left_of_pyyaml(machine) == []


def test_what_finder_leaves_does_not_keep_folders(machine: Machine) -> None:
    root = machine.home / ".orchestra"
    put_files(root, {".DS_Store": "x", "projects/.DS_Store": "x", "backups/.DS_Store": "x"})
    for _ in range(2):  # what is not there can be uninstalled too
        assert machine.install_well("--uninstall") == "uninstalled\n"
        assert machine.listing() == {}
    put_files(root, {".DS_Store": "x", "projects/a/b.yaml": "x", "projects/.DS_Store": "x"})
    assert machine.install_well("--uninstall") == f"kept: {root}/projects (the registry)\nuninstalled\n"
    assert (root / "projects/a/b.yaml").exists()


def test_uninstalling_works_when_the_python_is_gone(machine: Machine) -> None:
    machine.give_yaml()
    machine.install_program("gone")
    (machine.folder / "gone/python").unlink()
    assert machine.install("sh", "--uninstall").returncode == 0
    assert not os.path.exists(machine.home / ".orchestra")


@every_shell
def test_install_sh_refuses_what_it_does_not_know(machine: Machine, shell: str) -> None:
    for word in ("--help-me", "uninstall", "-x"):
        assert_refused(machine.install(shell, word), f"{word}: unknown argument; the only one is --uninstall")
    for home in (None, "here"):
        done = machine.install(shell, environ={"HOME": home})
        assert_refused(done, f"HOME: expected an absolute path, got '{home or ''}'")
    assert machine.listing() == {}


@pytest.mark.skipif(sys.platform == "darwin", reason="launchd is here")
def test_install_sh_has_launchd_run_the_daemon_on_macos(machine: Machine) -> None:
    machine.give_yaml()
    machine.make_tool("uname", "echo Darwin")
    machine.make_tool("xcode-select", "echo /")  # so /usr/bin/python3 is no placeholder
    done = machine.install()
    # The script knows better where it runs.
    assert done.returncode == 2
    assert "orchestra: launchd error: launchd management is only supported on macOS" in done.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here")
def test_shellcheck_finds_nothing_in_install_sh(machine: Machine) -> None:
    machine.run_well("shellcheck", INSTALLER)


# ── 35 Services ───────────────────────────────────────────────────────────────

# The property list


HOMES = ["/Users/me", "/Users/Ann & Bob", "/Users/<x>", "/Users/Zoë Łuk/日本", "/Users/'\"]]>"]


@pytest.mark.parametrize("home", HOMES)
def test_plist_contains_required_launchd_fields(home: str) -> None:
    data = orchestra.generate_plist(f"{home}/.orchestra/bin/orchestra", f"{home}/.orchestra/logs")
    assert plistlib.loads(data) == {
        "Label": "dev.orchestra.daemon",
        "ProgramArguments": [f"{home}/.orchestra/bin/orchestra", "daemon", "start"],
        "RunAtLoad": True,
        "KeepAlive": True,
        "StandardOutPath": f"{home}/.orchestra/logs/daemon.log",
        "StandardErrorPath": f"{home}/.orchestra/logs/daemon-err.log",
        "SoftResourceLimits": {"NumberOfFiles": 10240},
        "ExitTimeOut": 20,
    }


@pytest.mark.skipif(not shutil.which("plistutil"), reason="no plistutil here")
@pytest.mark.parametrize("home", HOMES)
def test_apples_format_is_understood_by_another_reader_than_pythons(machine: Machine, home: str) -> None:
    file, binary = machine.folder / "p.plist", machine.folder / "p.bin"
    file.write_bytes(orchestra.generate_plist(f"{home}/bin/orchestra", f"{home}/logs"))
    done = machine.run_program("plistutil", "-i", file, "-f", "bin", "-o", binary)
    assert done.returncode == 0, done
    assert plistlib.loads(binary.read_bytes()) == plistlib.loads(file.read_bytes())


@pytest.mark.parametrize("path", ["/a\x01b", "/a\nb\x00", "/a\x1b", "/\udcff", "/a\nb"])
def test_a_path_that_a_supervisors_file_cannot_hold_is_an_error(path: str) -> None:
    with pytest.raises(orchestra.SystemdError, match="a path that a unit can hold"):
        orchestra.generate_unit(path)
    if path != "/a\nb":
        with pytest.raises(orchestra.LaunchdError, match="property list"):
            orchestra.generate_plist(path, "/logs")


# launchd


class Answerer:
    """Something that answers on the control socket, as a daemon does."""

    pids = itertools.count(100)

    def __init__(self, path: str, version: str = orchestra.__version__) -> None:
        self.path = path
        self.pid = next(self.pids)
        self.version = version
        if os.path.lexists(path):
            os.unlink(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(8)
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def reply(self) -> bytes:
        return orchestra.encode_reply({"running": True, "pid": self.pid, "version": self.version})

    def serve(self) -> None:
        while True:
            with self.listener.accept()[0] as client:
                line = client.recv(4096)
                if line == b"end":
                    return
                client.sendall(self.reply())

    def stop(self) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(self.path)
            client.sendall(b"end")
            self.thread.join()
        self.listener.close()  # which leaves a stale socket


class Busy(Answerer):
    """A daemon with no room for another client."""

    def reply(self) -> bytes:
        return orchestra.encode_error(orchestra.TOO_MANY_CLIENTS)


class Service:
    """A daemon run as launchd runs it: from its plist, with HOME, a short PATH, and logs opened for appending."""

    def __init__(self, home: str, plist: dict[str, Any]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        out, err = (os.open(plist[name], flags, 0o600) for name in ("StandardOutPath", "StandardErrorPath"))
        environ = {"HOME": home, "PATH": SHORT_PATH}
        self.process = subprocess.Popen(
            plist["ProgramArguments"], env=environ, cwd="/", stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        os.close(out)
        os.close(err)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


GUI = f"gui/{os.getuid()}"
BINARY = "/opt/orchestra"
PLIST = "HOME/Library/LaunchAgents/dev.orchestra.daemon.plist"
UNLOADING = ["print GUI", "bootout GUI/dev.orchestra.daemon", "print GUI/dev.orchestra.daemon"]
LOADING = ["enable GUI/dev.orchestra.daemon", f"bootstrap GUI {PLIST}"]
STAY = orchestra.Launchd.STAY_TIME


class FakeSupervisor:
    """What a launchd and a systemd that keep state have in common: a service that runs, and a clock."""

    def __init__(self, machine: Machine) -> None:
        self.home = machine.path
        self.start_service: Callable[..., Any] = lambda *_: Answerer(orchestra.socket_path(self.home))
        self.running: Any = None
        self.now = 0.0
        self.calls: list[str] = []
        machine.cleanup.callback(self.stop)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def launch(self, *how: Any) -> int:
        self.stop()
        self.running = self.start_service(*how)
        return 0

    def stop(self) -> None:
        if self.running is not None:
            self.running.stop()
        self.running = None


class FakeLaunchctl(FakeSupervisor):
    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.plist = Path(orchestra.launchd_plist_path(self.home))
        self.codes: dict[str, Iterator[int]] = {}  # exit statuses that a subcommand gives first
        self.teardown = 0.0  # seconds that a service is still known after bootout
        self.runs_at_load = self.has_session = True
        self.disabled = False
        self.claims = 0  # what bootstrap answers when it has loaded the service
        self.loaded: Optional[dict[str, Any]] = None
        self.loaded_bytes = b""
        self.gone_at: Optional[float] = None
        self.events: dict[float, Callable[[FakeLaunchctl], object]] = {}  # what happens at a time
        self.times: list[float] = []

    def given(self, codes: dict[str, Sequence[int]] = {}, events: Any = {}, **state: Any) -> FakeLaunchctl:
        vars(self).update(state, codes={verb: iter(left) for verb, left in codes.items()}, events=dict(events))
        return self

    def launchd(self, **options: Any) -> orchestra.Launchd:
        options = {"run": self.run, "clock": lambda: self.now, "sleep": self.sleep, **options}
        return orchestra.Launchd(self.home, **{"platform": "darwin", **options})

    def install(self, binary: str = BINARY, **options: Any) -> bytes:
        """Install, and return the plist's bytes."""
        orchestra.install_launchd(self.launchd(**options), binary)
        return self.plist.read_bytes()

    def refusal(self, binary: str = BINARY) -> orchestra.LaunchdError:
        with pytest.raises(orchestra.LaunchdError) as caught:
            self.install(binary)
        return caught.value

    def uninstall(self, **options: Any) -> bool:
        return orchestra.uninstall_launchd(self.launchd(**options))

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        for when in [when for when in self.events if when <= self.now]:
            self.events.pop(when)(self)

    def run(self, argv: Sequence[str], timeout: float) -> orchestra.Completed:
        assert argv[0] == "/bin/launchctl" and timeout > 0
        self.calls.append(" ".join(argv[1:]).replace(GUI, "GUI").replace(self.home, "HOME"))
        self.times.append(self.now)
        if self.gone_at is not None and self.now >= self.gone_at:
            self.loaded = self.gone_at = None
        code = next(self.codes.get(argv[1], iter(())), None)
        code = getattr(self, argv[1])(*argv[2:]) if code is None else code
        return orchestra.Completed(code, f"{argv[1]} said {code}")

    def verbs(self) -> str:
        """Return what was asked for, leaving out `print`."""
        return " ".join(call.split()[0] for call in self.calls if not call.startswith("print"))

    def bootout(self, service: str) -> int:
        assert service == f"{GUI}/dev.orchestra.daemon"
        if self.loaded is None:
            return 3
        self.stop()
        self.gone_at = self.now + self.teardown
        return 0

    def print(self, target: str) -> int:
        if target == GUI:
            return 0 if self.has_session else 113
        return 113 if self.loaded is None else 0

    def bootstrap(self, domain: str, plist: str) -> int:
        assert domain == GUI
        if self.loaded is not None:
            return 37 if self.gone_at else 5
        if self.disabled or not self.has_session:
            return 5  # what 119 and 125 are for
        self.loaded_bytes = Path(plist).read_bytes()
        self.loaded = plistlib.loads(self.loaded_bytes)
        if self.runs_at_load:
            self.start()
        return self.claims

    def kickstart(self, flag: str, service: str) -> int:
        assert flag == "-k"
        self.stop()
        return 113 if self.loaded is None else self.start()

    def enable(self, service: str) -> int:
        self.disabled = False
        return 0

    def start(self) -> int:
        return self.launch(self.loaded or {})


@pytest.fixture
def launchctl(machine: Machine) -> FakeLaunchctl:
    return FakeLaunchctl(machine)


def start_nothing(plist: Any) -> None:
    """Start a daemon that ends at once."""


def test_install_loads_the_plist_and_leaves_alone_what_it_started(machine: Machine, launchctl: FakeLaunchctl) -> None:
    data = launchctl.install()
    assert launchctl.calls == [*UNLOADING, *LOADING] and launchctl.now == STAY
    assert data == launchctl.loaded_bytes == orchestra.generate_plist(BINARY, orchestra.logs_dir(machine.path))
    assert os.path.isdir(orchestra.run_dir(machine.path)) and os.path.isdir(orchestra.logs_dir(machine.path))


NEVER = {"start_service": start_nothing}
INSTALLS: dict[str, tuple[dict[str, Any], str, float]] = {
    "loading did not start it": ({"runs_at_load": False}, "bootout enable bootstrap kickstart", 10),
    "it starts slowly": ({"runs_at_load": False, "events": {9: FakeLaunchctl.start}}, "bootout enable bootstrap", 9),
    "the label was disabled": ({"disabled": True}, "bootout enable bootstrap", 0),  # else bootstrap answers 5
    "it answers 5 though it has loaded it": ({"claims": 5}, "bootout enable bootstrap", 0),
    **{
        f"launchd is busy: {codes}": (
            {"codes": {"bootstrap": codes}},
            "bootout enable bootstrap" + " bootstrap" * len(codes),
            len(codes) / 2,
        )
        for codes in ([5], [37], [36], [5, 37, 5], [5] * 20)
    },
}


@pytest.mark.parametrize(("state", "verbs", "seconds"), INSTALLS.values(), ids=INSTALLS)
def test_install_waits_no_longer_and_kills_no_more_than_it_must(
    machine: Machine, launchctl: FakeLaunchctl, state: dict[str, Any], verbs: str, seconds: float
) -> None:
    launchctl.given(**state).install()
    assert (launchctl.verbs(), launchctl.now) == (verbs, seconds + STAY)
    assert machine.answers()


FAILURES: dict[str, tuple[dict[str, Any], str, str, float]] = {
    "launchd stays busy": ({"codes": {"bootstrap": [5] * 1000}}, "launchctl bootstrap: .*: exit status 5: ", "", 31),
    "launchd refuses": (
        {"codes": {"bootstrap": [78]}},
        "exit status 78: bootstrap said 78$",
        "bootout enable bootstrap bootout",
        0,
    ),
    "launchctl hangs at loading": ({"codes": {"bootstrap": [124]}}, "bootstrap said 124$", "", 0),
    "it never answers": (
        NEVER,
        "the new daemon does not answer on .*sock$",
        "bootout enable bootstrap kickstart bootout",
        41,
    ),
    "it ends at once": ({"events": {0.9: FakeLaunchctl.stop}}, "the new daemon did not keep running$", "", 2),
    "another takes its place": (
        {"events": {0.9: FakeLaunchctl.start}},
        r"the new daemon did not keep running; another one does, pid \d+$",
        "",
        2,
    ),
}


@pytest.mark.parametrize(("state", "message", "verbs", "at_most"), FAILURES.values(), ids=FAILURES)
def test_a_failed_first_install_leaves_no_plist(
    launchctl: FakeLaunchctl, state: dict[str, Any], message: str, verbs: str, at_most: float
) -> None:
    error = launchctl.given(**state).refusal()
    assert re.search(f"^launchd error: .*{message}", str(error))
    assert ("daemon logs" in error.hint) == ("the new daemon" in message)
    assert verbs in ("", launchctl.verbs()) and launchctl.verbs().endswith(" bootout")
    assert launchctl.now <= at_most and list(launchctl.plist.parent.iterdir()) == []


@pytest.mark.parametrize("teardown", [0, 3])
@pytest.mark.parametrize("new", [None, {"pid": 0}, {"version": "0.0.1"}], ids=["silent", "old pid", "old version"])
def test_a_failed_upgrade_has_the_old_service_running_again(
    machine: Machine, launchctl: FakeLaunchctl, new: Optional[dict[str, Any]], teardown: float
) -> None:
    old, alive, pid = launchctl.install(), launchctl.start_service, launchctl.running.pid

    def start(plist: Any) -> Any:
        is_old = plist["ProgramArguments"][0] == BINARY
        running = alive(plist) if is_old or new is not None else None
        if new and not is_old:
            vars(running).update({"pid": pid} if "pid" in new else new)
        return running

    launchctl.calls.clear()
    error = launchctl.given(start_service=start, teardown=teardown).refusal("/opt/new")
    other = "" if new is None else r"; another one does, pid \d+"
    assert re.search(f"the new daemon does not answer on .*sock{other}$", str(error)) and "daemon logs" in error.hint
    assert launchctl.verbs() == "bootout enable bootstrap kickstart bootout bootstrap"
    assert launchctl.plist.read_bytes() == launchctl.loaded_bytes == old
    assert launchctl.gone_at is None and machine.answers()


def test_a_service_that_cannot_be_unloaded_stops_the_install(launchctl: FakeLaunchctl) -> None:
    old = launchctl.given(teardown=1000.0).install()
    assert "still loaded after 30 s" in str(launchctl.refusal("/opt/new"))
    assert launchctl.plist.read_bytes() == old


@pytest.mark.parametrize("code", [112, 113, 125])
def test_without_a_desktop_session_nothing_is_changed_and_the_message_says_so(
    machine: Machine, launchctl: FakeLaunchctl, code: int
) -> None:
    before = machine.listing()
    error = launchctl.given({"print": [code]}, has_session=False).refusal()
    assert str(error) == f"launchd error: {GUI}: there is no desktop session (launchctl exit status {code})"
    assert "log in" in error.hint
    assert (launchctl.calls, launchctl.now, machine.listing()) == (["print GUI"], 0, before)


@pytest.mark.parametrize("code", [orchestra.TIMED_OUT, orchestra.NOT_STARTED])
@pytest.mark.parametrize("call", [0, 1])  # of print
def test_a_launchctl_that_does_not_answer_is_an_error_and_the_old_plist_is_back(
    launchctl: FakeLaunchctl, code: int, call: int
) -> None:
    old = orchestra.generate_plist("/old/orchestra", "/old/logs")
    put_files(launchctl.plist.parent, {launchctl.plist.name: old})
    error = launchctl.given({"print": [*[0] * call, code]}).refusal()
    assert str(error) == f"launchd error: launchctl print: print said {code}"
    assert launchctl.plist.read_bytes() == old


@pytest.mark.skipif(os.path.exists("/bin/launchctl"), reason="launchctl is here")
def test_a_launchctl_that_is_not_there_is_an_error(machine: Machine) -> None:
    with pytest.raises(orchestra.LaunchdError, match="launchctl print: no such file"):
        orchestra.install_launchd(orchestra.Launchd(machine.path, "darwin"), BINARY)
    assert machine.listing() == {}


def test_install_waits_while_the_old_service_is_torn_down(machine: Machine, launchctl: FakeLaunchctl) -> None:
    launchctl.given(teardown=18.0).install()  # launchd kills it after 20
    launchctl.given(teardown=18.0, calls=[], times=[], now=0).install()
    looks = ["print GUI/dev.orchestra.daemon"] * 36
    assert launchctl.calls == [*UNLOADING, *looks, *LOADING]
    assert launchctl.times == [0, 0, *(number / 2 for number in range(37)), 18, 18]
    assert launchctl.now == 18 + STAY and machine.answers()


def test_every_wait_for_a_service_is_longer_than_launchd_gives_it() -> None:
    waits = (orchestra.Launchd.SETTLE_TIMEOUT, orchestra.Launchd.CALL_TIMEOUT)
    assert min(waits) > plistlib.loads(orchestra.generate_plist("/b", "/l"))["ExitTimeOut"] > orchestra.STOP_PATIENCE


def test_installing_again_replaces_the_plist_and_restarts_the_service(
    machine: Machine, launchctl: FakeLaunchctl
) -> None:
    for binary in ("/old/orchestra", BINARY, BINARY):
        running = launchctl.running
        data = launchctl.given(calls=[]).install(binary)
        assert data == launchctl.loaded_bytes == orchestra.generate_plist(binary, orchestra.logs_dir(machine.path))
        assert launchctl.verbs() == "bootout enable bootstrap" and launchctl.running is not running


def test_a_plist_that_cannot_be_written_is_an_error_and_changes_nothing(
    machine: Machine, launchctl: FakeLaunchctl
) -> None:
    (machine.home / "Library").write_text("not a folder")
    with pytest.raises(orchestra.IoError, match=r"dev\.orchestra\.daemon\.plist"):
        launchctl.install()
    assert launchctl.calls == ["print GUI"]


@pytest.mark.parametrize("plist", ["", "deleted"])
def test_uninstall_removes_the_service_the_plist_and_a_stale_socket(
    machine: Machine, launchctl: FakeLaunchctl, plist: str
) -> None:
    launchctl.given(teardown=3.0).install()
    if plist:
        launchctl.plist.unlink()
    assert launchctl.given(teardown=3.0, now=0).uninstall() is True
    assert (launchctl.now, launchctl.loaded) == (3.0, None)
    assert not launchctl.plist.exists() and not os.path.lexists(orchestra.socket_path(machine.path))


def test_uninstall_when_nothing_is_installed_says_so(machine: Machine, launchctl: FakeLaunchctl) -> None:
    before = machine.listing()
    assert launchctl.uninstall() is False
    assert (launchctl.verbs(), machine.listing()) == ("", before)


def test_uninstall_leaves_the_socket_of_a_daemon_that_is_busy(machine: Machine, launchctl: FakeLaunchctl) -> None:
    busy = Busy(orchestra.socket_path(machine.path))
    launchctl.uninstall()
    assert os.path.lexists(busy.path)
    busy.stop()


def test_uninstall_leaves_the_socket_that_refuses_while_the_lock_is_held(
    machine: Machine, launchctl: FakeLaunchctl
) -> None:
    path = orchestra.socket_path(machine.path)
    lock = orchestra.try_lock(orchestra.daemon_lock_path(machine.path))
    make_socket(Path(path))
    launchctl.uninstall()
    assert os.path.lexists(path)
    os.close(lock)
    launchctl.uninstall()
    assert not os.path.lexists(path)


class Ending(Answerer):
    """A daemon that was told to stop: it answers no more, but has its lock for a while."""

    def __init__(self, home: str) -> None:
        self.lock = orchestra.try_lock(orchestra.daemon_lock_path(home))
        self.has_lock = True
        super().__init__(orchestra.socket_path(home))

    def serve(self) -> None:
        line = b""
        while b"stop" not in line:
            with self.listener.accept()[0] as client:
                line = client.recv(4096)
                client.sendall(b'{"ok":true,"data":{}}\n')
        self.listener.close()

    def end(self, _: Any) -> None:
        os.close(self.lock)
        self.has_lock = False


def test_install_waits_for_the_lock_of_a_daemon_that_answers_no_more(
    machine: Machine, launchctl: FakeLaunchctl
) -> None:
    ending = Ending(machine.path)
    had_lock = []

    def start(plist: Any) -> Answerer:
        had_lock.append(ending.has_lock)
        return Answerer(orchestra.socket_path(machine.path))

    launchctl.given(start_service=start, events={3.5: ending.end}).install()
    assert had_lock == [False]


# Real daemons need real time.
REAL: dict[str, Any] = {"clock": time.monotonic, "sleep": lambda _: time.sleep(0.02)}


def test_install_takes_over_from_a_daemon_started_by_hand(machine: Machine, launchctl: FakeLaunchctl) -> None:
    machine.give_yaml()
    binary = machine.install_program()
    launchctl.given(start_service=lambda plist: Service(machine.path, plist))
    with machine.daemon(binary) as by_hand:
        launchctl.install(binary, **REAL)
        assert by_hand.wait(20) == 0 and machine.answers()
        assert orchestra.send_request(machine.path, {"cmd": "status"})["label"] == "dev.orchestra.daemon"
        machine.register(path=str(machine.code), targets=["claude"])
        orchestra.request_sync(machine.path)
        assert (machine.code / "CLAUDE.md").exists()
        assert "source=socket" in Path(orchestra.stdout_log_path(machine.path)).read_text()
    assert launchctl.uninstall(**REAL) is True
    assert not machine.answers() and not os.path.lexists(orchestra.socket_path(machine.path))


def test_install_upgrades_a_running_service(machine: Machine) -> None:
    machine.move("Ann & Zoë")
    machine.give_yaml()
    binary = machine.install_program()
    launchctl = FakeLaunchctl(machine).given(start_service=lambda plist: Service(machine.path, plist))
    first = launchctl.install(binary, **REAL)
    assert launchctl.install(binary, **REAL) == first and machine.answers()


@pytest.mark.skipif(sys.platform == "darwin", reason="launchd is here")
@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_elsewhere_than_on_macos_launchd_is_an_error_that_changes_nothing(
    machine: Machine, launchctl: FakeLaunchctl, capsys: Any, command: str
) -> None:
    before = machine.listing()
    assert orchestra.main(["daemon", command], {"HOME": machine.path}) == 2
    out, err = capsys.readouterr()
    first, way_out = err.splitlines()
    assert (out, first) == ("", "orchestra: launchd error: launchd management is only supported on macOS")
    assert way_out.startswith(f"  try: orchestra daemon {command} --systemd")
    with pytest.raises(orchestra.LaunchdError):
        getattr(launchctl, command)(platform="linux")
    assert (launchctl.calls, machine.listing()) == ([], before)


# systemd


class FakeSystemctl(FakeSupervisor):
    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.file = Path(orchestra.systemd_unit_path(self.home))
        self.state = "running"
        self.codes: dict[str, int] = {}  # exit statuses of subcommands that fail
        self.is_enabled = False
        self.loaded = b""

    def systemd(self) -> orchestra.Systemd:
        return orchestra.Systemd(self.home, run=self.run, clock=lambda: self.now, sleep=self.sleep)

    def install(self, binary: str = BINARY) -> bytes:
        orchestra.install_systemd(self.systemd(), binary)
        return self.file.read_bytes()

    def refusal(self, binary: str = BINARY) -> orchestra.SystemdError:
        with pytest.raises(orchestra.SystemdError) as caught:
            self.install(binary)
        return caught.value

    def run(self, argv: Sequence[str], timeout: float) -> orchestra.Completed:
        assert argv[:2] == ["systemctl", "--user"] and timeout > 20
        verb, *rest = argv[2:]
        if verb == "is-system-running":
            return orchestra.Completed(self.state != "running", self.state)
        self.calls.append(verb)
        code = self.codes.get(verb) or getattr(self, verb.replace("-", "_"))(*rest)
        return orchestra.Completed(code, f"Failed: {verb}" if code else "")

    def daemon_reload(self) -> int:
        self.loaded = self.file.read_bytes() if self.file.exists() else b""
        return 0

    def enable(self, file: str) -> int:
        assert file == str(self.file)
        if not self.is_enabled:
            put_files(self.file.parent, {f"default.target.wants/{self.file.name}": link_to(file)})
        self.is_enabled = True
        return 0

    def restart(self, unit: str) -> int:
        assert unit == "orchestra.service" and self.loaded
        return self.launch()

    def disable(self, now: str, unit: str) -> int:
        assert (now, unit) == ("--now", "orchestra.service")
        self.stop()
        self.is_enabled = False
        return 0


@pytest.fixture
def systemctl(machine: Machine) -> FakeSystemctl:
    return FakeSystemctl(machine)


STARTING = ["daemon-reload", "enable", "restart"]


@pytest.mark.parametrize("path", ["/opt/orchestra", '/A "b" \\ 100%/Zoë/o'])
def test_systemd_runs_the_daemon_from_a_unit(machine: Machine, systemctl: FakeSystemctl, path: str) -> None:
    data = systemctl.install(path)
    quoted = path.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    assert f'ExecStart="{quoted}" daemon start\nRestart=on-failure\n' in data.decode()
    assert systemctl.calls == STARTING and systemctl.loaded == data and systemctl.is_enabled
    assert machine.answers() and systemctl.now == STAY
    assert orchestra.uninstall_systemd(systemctl.systemd()) is True
    assert systemctl.calls == [*STARTING, "disable", "daemon-reload"] and not systemctl.loaded
    assert not os.path.lexists(orchestra.socket_path(machine.path)) and list(machine.home.rglob("*.service")) == []
    assert orchestra.uninstall_systemd(systemctl.systemd()) is False


@pytest.mark.parametrize("is_upgrade", [False, True])
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"codes": {"enable": 1}}, "systemctl --user enable: Failed: enable$"),
        ({"codes": {"restart": 1}}, "systemctl --user restart: Failed: restart$"),
        ({"start_service": lambda: None}, "orchestra.service: the new daemon does not answer on .*sock$"),
        ({"start_service": None}, "the new daemon does not answer on .*; another one does, pid 0$"),
    ],
    ids=["not enabled", "not started", "silent", "another version"],
)
def test_a_failed_install_leaves_systemd_as_it_was(
    machine: Machine, systemctl: FakeSystemctl, state: dict[str, Any], message: str, is_upgrade: bool
) -> None:
    def start_older() -> Answerer:
        older = Answerer(orchestra.socket_path(machine.path), "0.0.1")
        older.pid = 0
        return older

    old = systemctl.install() if is_upgrade else b""
    vars(systemctl).update(state, **({"start_service": start_older} if state.get("start_service", 1) is None else {}))
    error = systemctl.refusal("/opt/new")
    assert re.search(f"^systemd error: .*{message}", str(error)), error
    assert (systemctl.file.read_bytes() if is_upgrade else b"") == systemctl.loaded == old
    assert systemctl.is_enabled == is_upgrade and systemctl.calls[-1] == ("restart" if is_upgrade else "daemon-reload")
    assert is_upgrade or list(machine.home.rglob("*.service")) == []


def test_systemd_takes_over_from_a_daemon_started_by_hand(machine: Machine, systemctl: FakeSystemctl) -> None:
    machine.give_yaml()

    def start() -> Answerer:
        assert not orchestra.is_locked(orchestra.daemon_lock_path(machine.path))
        return Answerer(orchestra.socket_path(machine.path))

    systemctl.start_service = start
    with machine.daemon(machine.install_program()) as daemon:
        systemctl.install()
        assert daemon.wait(20) == 0 and machine.answers() == systemctl.running.pid


def test_without_a_user_manager_nothing_is_installed_and_one_line_says_so(machine: Machine) -> None:
    for said in ("echo offline; exit 1", "echo Failed to connect to bus: No medium found >&2; exit 1"):
        machine.make_tool("systemctl", said)
        done = machine.run_program(BASE_PYTHON, SCRIPT, "daemon", "install", "--systemd")
        assert (done.returncode, done.stdout) == (2, "")
        what, way_out = done.stderr.splitlines()
        assert re.fullmatch(r"orchestra: systemd error: no user manager is running \(systemctl: .+\)", what)
        assert way_out == "  try: orchestra daemon start --detach"
    assert machine.listing() == {}
    done = machine.run_program(BASE_PYTHON, SCRIPT, "daemon", "install", "--systemd", environ={"PATH": "/nowhere"})
    assert "(systemctl: no such file or directory)" in done.stderr


# A user manager of its own, in namespaces of its own.
REAL_SYSTEMD = """
mount --make-rprivate / && mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system || exit 77
mkdir -m 700 /run/user /run/user/0; export XDG_RUNTIME_DIR=/run/user/0
umount -R /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup || exit 77
/usr/lib/systemd/systemd --user >/dev/null 2>&1 &
for _ in 1 2 3 4 5 6 7 8 9 10; do
    systemctl --user is-system-running >/dev/null 2>&1 && break; sleep 0.5
done
systemctl --user is-system-running >/dev/null 2>&1 || exit 77
set -eux
pid() { "$1" daemon status | sed -n 's/.*"pid": //p'; }
becomes() { until [ "$(systemctl --user is-active orchestra)" = "$1" ]; do sleep 0.2; done; }
"$1" daemon install --systemd
first=$(pid "$1"); systemctl --user is-enabled orchestra; becomes active
"$1" daemon restart
second=$(pid "$1"); [ "$first" != "$second" ]
kill -KILL "${second%,}"
until third=$(pid "$1"); [ -n "$third" ] && [ "$third" != "$second" ]; do sleep 0.2; done
"$1" daemon stop; becomes inactive
"$1" daemon start --detach
"$1" daemon install --systemd; becomes active
"$1" daemon uninstall --systemd; becomes inactive
"""


def test_a_real_systemd_runs_the_daemon(machine: Machine) -> None:
    programs = [shutil.which(name) for name in ("unshare", "systemctl", "/usr/lib/systemd/systemd")]
    if os.geteuid() != 0 or None in programs:
        pytest.skip("needs root, for namespaces, and systemd")
    machine.give_yaml()
    (machine.tools / "systemctl").unlink()
    binary = machine.install_program()
    command = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", REAL_SYSTEMD, "sh", binary]
    done = machine.run_program(*command)
    if done.returncode == 77:
        pytest.skip("no systemd can be started here")
    assert done.returncode == 0, done
    assert list(machine.home.rglob("*.service")) == [] and "Traceback" not in machine.errors()


# ── 36 Registering ────────────────────────────────────────────────────────────


def test_init_registers_detects_and_syncs(home: Home) -> None:
    put_files(home.code, {"web/package.json": '{"dependencies": {"react": "18"}}', "web/GEMINI.md": "mine\n"})
    ran = home.run_fine("init", str(home.code / "web"), "-p", "shop", "--sync")
    assert ran.out.splitlines() == [
        "registered shop/web: frontend (react in package.json)",
        "  built with: Node.js, React 18 (package.json)",
        "  install:    npm install (package.json)",
        "  targets:    gemini (already used in this folder)",
        "  edit:       ~/.orchestra/projects/shop/web.yaml",
        "append   shop/web GEMINI.md",
        "1 written, 0 unchanged in 1 codebase",
    ]
    values = yaml.load(Path(orchestra.codebase_path(home.path, ("shop", "web"))).read_bytes(), Loader=yaml.BaseLoader)
    assert values["path"] == f"{home.code}/web" and values["targets"] == ["gemini"]
    assert values["projects"] == [{"name": "web", "project_type": "frontend"}]
    assert Path(orchestra.project_path(home.path, "shop")).exists()


def test_a_registry_that_is_a_link_to_nowhere_is_not_an_empty_one(home: Home) -> None:
    home.projects.parent.mkdir(parents=True, exist_ok=True)
    home.projects.symlink_to("unmounted")
    for words in ("status", "sync --all", "project list", "doctor"):
        ran = home.run(*words.split())
        assert ran.status and f"{home.projects}: no such file" in ran.out + ran.err, ran
    assert home.run("doctor").out.count("no such file") == 1


@pytest.mark.parametrize("sync", [(), ("--sync",)])
def test_a_dry_run_of_init_says_the_same_and_writes_nothing(home: Home, sync: Any) -> None:
    put_files(home.code / "web", {"pyproject.toml": "[project]\ndescription = 'Shop'\n", "uv.lock": "", ".ruler": None})
    argv = ("init", str(home.code / "web"), "-p", "shop", *sync)
    before = take_picture(home.folder)
    dry = home.run_fine(*argv, "--dry-run")
    assert without_age(take_picture(home.folder)) == without_age(before)
    real = home.run_fine(*argv)
    assert dry.out.replace("would register", "registered").replace("to write", "written") == real.out
    assert dry.err == real.err and ".ruler/ is there" in real.err
    assert "  description: Shop (pyproject.toml)\n" in real.out and "  install:     uv sync (uv.lock)\n" in real.out
    assert "description: |-\n  Shop\n\n  Built with: Python, uv.\n" in home.file("shop/web").read_text()
    shutil.rmtree(home.code / "web")
    (home.code / "web").mkdir()  # which a real init would take for meant
    before = take_picture(home.folder)
    assert home.run_fine(*argv, "--dry-run", "-t", "ml").lines[0].startswith("shop/web: type would change to ml (")
    assert without_age(take_picture(home.folder)) == without_age(before)


def test_init_tells_what_was_written_though_the_daemon_was_faster(home: Home) -> None:
    home.start_daemon()
    put_files(home.code, {"silent/AGENTS.md": "mine\n"})
    ran = home.run_fine("init", str(home.code / "silent"), "-p", "shop", "--sync")
    assert ran.out.endswith("\n0 written, 1 unchanged in 1 codebase\n")  # nothing is added to it
    for name in "abcdef":
        root = home.code / name
        put_files(root, {"AGENTS.md": "mine\n", "Makefile": "test:\n\tpytest\n"})
        ran = home.run_fine("init", str(root), "-p", "shop", "--sync")
        assert ran.out.endswith(f"\nappend   shop/{name} AGENTS.md\n1 written, 0 unchanged in 1 codebase\n")
        os.utime(root / "AGENTS.md", (0, 0))
        ran = home.run_fine("init", str(root), "-p", "shop", "--sync")
        assert ran.out.endswith("\n0 written, 1 unchanged in 1 codebase\n")
    home.stop(home.daemons[0])


def test_init_tells_an_update_of_the_daemons_from_a_new_file(home: Home) -> None:
    put_files(home.code, {"shop/api/AGENTS.md": "mine\n"})
    for notes, verb in ((["one"], "append"), (["two"], "update")):
        root = home.make_synced(notes=notes)
        result = orchestra.sync_codebase(home.path, home.registry().codebases[API])
        counted = orchestra.count_daemons_files(home.path, result, str(root), 0.0)
        assert {file.path: file.verb for file in counted.files}["AGENTS.md"] == verb


def test_init_fits_a_terminal_and_says_which_files_it_leaves_alone(home: Home) -> None:
    put_files(home.code / "web", {"CLAUDE.md": "mine", ".github/copilot-instructions.md": "mine", "GEMINI.md": "mine"})
    home.environ["COLUMNS"] = "60"
    assert home.run_fine("init", str(home.code / "web"), "-p", "shop").lines[1:] == [
        "  targets: claude-rules, gemini, copilot-rules (already used",
        "           in this folder; left alone:",
        "           .github/copilot-instructions.md, CLAUDE.md)",
        "  edit:    ~/.orchestra/projects/shop/web.yaml",
    ]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "claude, codex (default)"),
        ({".gemini": None}, "claude, codex, gemini (default, and agents with a folder here)"),
    ],
)
def test_init_tells_the_default_from_agents_with_a_folder_there(home: Home, files: Any, told: str) -> None:
    put_files(home.code, files)
    assert home.run_fine("init", str(home.code), "-p", "shop").lines[1] == f"  targets: {told}"


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_an_init_whose_sync_fails_is_exit_status_2(home: Home, dry_run: Any) -> None:
    put_files(home.code, {"GEMINI.md": orchestra.BLOCK_BEGIN})
    ran = home.run("init", str(home.code), "-p", "shop", "--sync", *dry_run)
    assert (ran.status, len(ran.complaints)) == (2, 1) and "GEMINI.md: found orchestra:begin" in ran.err


def test_init_adds_nothing_to_a_file_that_has_commands_of_its_own(home: Home) -> None:
    files = {"AGENTS.md": SPEAKING, "package.json": '{"dependencies": {"react": "^18"}, "scripts": {"test": "x"}}'}
    put_files(home.code / "web", files)
    ran = home.run_fine("init", str(home.code / "web"), "-p", "shop", "--sync")
    assert ran.lines[1:3] == [
        "  commands: left out, AGENTS.md has its own (2)",
        "  targets:  codex (already used in this folder)",
    ]
    assert contents(home.code / "web") == {path: data.encode() for path, data in files.items()}
    assert home.status_of("shop/web") == "current"


PACKAGE = '{"name": "x", "description": "The thing.", "scripts": {"test": "vitest run"}}'
MEMBERS = ["packages/api", "packages/web"]
MONOREPOS: dict[str, tuple[Any, list[str]]] = {
    "pnpm": (
        {"pnpm-workspace.yaml": "packages: ['packages/*', '!packages/old']", "packages/old/package.json": "{}"},
        MEMBERS,
    ),
    "pnpm, with the fixtures of tests": (
        {
            "pnpm-workspace.yaml": "packages: ['packages/*', 'packages/*/test/*/*', tests/e2e]",
            **{f"packages/{path}/package.json": "{}" for path in ("api/test/apps/basic", "web/test/a/b", "test")},
            "tests/e2e/package.json": PACKAGE,
            "packages/test/package.json": PACKAGE,
        },
        ["packages/api", "packages/test", "packages/web", "tests/e2e"],
    ),
    "npm": ({"package.json": '{"workspaces": ["packages/*"]}'}, MEMBERS),
    "yarn": ({"package.json": '{"workspaces": {"packages": ["packages/*"]}}'}, MEMBERS),
    "cargo": ({"Cargo.toml": '[workspace]\nmembers = ["packages/*"]\n'}, MEMBERS),
    "uv": ({"pyproject.toml": '[tool.uv.workspace]\nmembers = ["packages/*"]\n'}, MEMBERS),
    "go": ({"go.work": "go 1.22\nuse ./packages/api // x\nuse (\n\t./packages/web\n\t./no\n)\n"}, MEMBERS),
    "go, one by one": ({"go.work": "use ./packages/api\nuse ./packages/web\n"}, MEMBERS),
    "npm, a name with a line end": ({"package.json": '{"workspaces": ["*/*"]}', "odd/a\n/package.json": "{}"}, MEMBERS),
    "gradle": ({"settings.gradle": "include ':packages:api', 'packages:web'\n"}, MEMBERS),
    "gradle in Kotlin": (
        {"settings.gradle.kts": 'rootProject.name = "packages"\ninclude(\n  ":packages:api",\n)\n'},
        MEMBERS[:1],
    ),
    "maven": ({"pom.xml": "<modules><module> packages/web </module><module>../x</module></modules>"}, MEMBERS[1:]),
    "maven and npm": (
        {
            "pom.xml": "<modules><module>api</module></modules>",
            "api/pom.xml": "",
            "package.json": '{"workspaces": ["*/web"]}',
        },
        ["api", "packages/web"],
    ),
    "none": ({"package.json": "{}"}, []),
}


@pytest.mark.parametrize(("files", "paths"), MONOREPOS.values(), ids=MONOREPOS)
def test_init_proposes_the_parts_of_a_monorepo_and_writes_them_when_asked(home: Home, files: Any, paths: Any) -> None:
    root = home.code / "mono"
    manifests = {"Cargo.toml": "[package]\nname = 'x'", "pyproject.toml": "[project]\nname = 'x'"}
    for path in MEMBERS:
        put_files(root, {f"{path}/{file}": text for file, text in {**manifests, "package.json": PACKAGE}.items()})
    put_files(root, files)
    names = ", ".join(os.path.basename(path) for path in paths)
    dry = home.run_fine("init", str(root), "-p", "shop", "--dry-run")
    told = re.findall(r"parts: +(.*) \(.*; with --parts each gets files of its own\)", dry.out)
    assert told == [names] * bool(paths)
    home.run_fine("init", str(root), "-p", "shop", "--parts", "--sync")
    parts = home.registry().codebases["shop", "mono"].projects[1:]
    assert [part.path for part in parts] == paths and ", ".join(part.name for part in parts) == names
    assert all("test: `" in (root / path / "AGENTS.md").read_text() for path in paths)
    assert "Packages: " not in (root / "AGENTS.md").read_text()  # the list of the parts says it
    assert home.sync().lines == [] and home.run_fine("init", str(root), "-p", "shop", "--parts").lines


def test_parts_that_would_be_called_alike_are_called_by_their_paths(home: Home) -> None:
    root = home.code / "mono"
    paths = ("a/web", "b/web", "a-web", "c/api")
    manifest = {"workspaces": ["*/web", "a-web", "c/*"], "scripts": {"test": "turbo run test"}}
    put_files(root, {"package.json": json.dumps(manifest), "package-lock.json": ""})
    put_files(root, {f"{path}/package.json": PACKAGE for path in paths})
    home.run_fine("init", str(root), "-p", "shop", "--parts", "--sync")
    parts = home.registry().codebases["shop", "mono"].projects[1:]
    assert [(part.name, part.path) for part in parts] == [
        *(("a-web", "a-web"), ("1-a-web", "a/web"), ("b-web", "b/web"), ("api", "c/api"))
    ]
    assert all({"test": "npm test"}.items() <= dict(part.commands).items() for part in parts)
    assert not any("install" in dict(part.commands) for part in parts)
    home.run_fine("project", "remove", "mono")
    home.run_fine("init", str(root), "-p", "shop")
    ran = home.run_fine("init", str(root), "-p", "shop", "--parts")
    assert ran.err == "note: add these to its `projects`: orchestra edit shop/mono\n"
    first, proposal = ran.out.split("\n", 1)
    assert "is already registered" in first
    file = home.file("shop/mono")
    file.write_text(file.read_text().replace("project_type: backend\n", f"project_type: backend\n{proposal[10:]}"))
    assert home.registry().codebases["shop", "mono"].projects[1:] == parts
    assert home.run_fine("init", str(root), "-p", "shop", "--parts").lines == [first]


MAKE_INSTALL = {"Makefile": "install:\n\tpip install x\n"}


@pytest.mark.parametrize(
    ("files", "part", "installs"),
    [
        ({}, {}, []),
        ({"CLAUDE.md": SPEAKING}, {}, []),
        ({"Cargo.toml": "[workspace]"}, {"Cargo.toml": ""}, []),
        ({"Cargo.toml": "[workspace]"}, {}, []),
        ({}, {"yarn.lock": ""}, ["yarn install"]),
        (MAKE_INSTALL, MAKE_INSTALL, ["make install"]),
    ],
)
def test_a_part_does_not_repeat_what_is_installed_for_the_whole(
    home: Home, files: Any, part: Any, installs: list[str]
) -> None:
    put_files(home.code / "mono", {".git": None, **package(workspaces=["a"], scripts={"build": "tsc"}), **files})
    put_files(home.code / "mono/a", {"package.json": PACKAGE, **part})
    home.run_fine("init", str(home.code / "mono"), "-p", "shop", "--parts")
    part = home.registry().codebases["shop", "mono"].projects[1]
    assert [text for name, text in part.commands if "install" in name] == installs


def test_parts_that_nothing_lists_are_told(home: Home) -> None:
    for _ in range(2):
        ran = home.run_fine("init", str(home.code), "-p", "shop", "--parts")
        assert ran.err == "note: --parts: no file here lists the packages of a workspace\n"


def test_init_again_changes_nothing(home: Home) -> None:
    home.run_fine("init", str(home.code), "-p", "shop")
    before = tree(home.folder)
    assert "is already registered" in home.run_fine("init", f"{home.code}/../code/", "-p", "shop").out
    assert {path: seen.data for path, seen in before.items()} == contents(home.folder)


def test_init_with_another_type_changes_the_type_alone(home: Home) -> None:
    home.run_fine("init", str(home.code), "-p", "shop")
    file = Path(orchestra.codebase_path(home.path, ("shop", "code")))
    file.write_text("# mine\n" + file.read_text() + "colour: red\n")
    home.run_fine("init", str(home.code), "-p", "shop", "-t", "ml")
    codebase = orchestra.load_codebase(home.path, "shop", "code")
    assert [component.project_type for component in codebase.projects] == ["ml"]
    assert file.read_text().startswith("# mine\n") and file.read_text().endswith("colour: red\n")


def test_init_of_another_folder_under_a_taken_name_says_how(home: Home) -> None:
    for name in ("a/api", "b/api"):
        (home.code / name).mkdir(parents=True)
    home.run_fine("init", str(home.code / "a/api"), "-p", "shop")
    ran = home.run("init", str(home.code / "b/api"), "-p", "shop")
    said = f"shop/api already exists, for the folder {home.code}/a/api\n  try: orchestra init {home.code}/b/api -p shop"
    assert (ran.status, ran.err) == (2, f"orchestra: {said} --name ANOTHER_NAME\n")
    home.run_fine("init", str(home.code / "b/api"), "-p", "shop", "--name", "api2")
    assert home.registry().keys == [API, ("shop", "api2")]


def test_init_of_a_folder_registered_under_another_name_is_refused(home: Home) -> None:
    root = home.make_codebase("shop/api")
    (home.code / "link").symlink_to(root)
    for path in (root, home.code / "link"):
        ran = home.run("init", str(path), "-p", "blog", "--name", "other")
        assert ran.complaints == [f"orchestra: {path}: this folder is already registered as shop/api"]
    assert home.registry().keys == [API]


@pytest.mark.parametrize(
    ("content", "found"),
    [("x", "that is a file, not a folder"), (link_to("nowhere"), "no such folder"), ("", "no such folder")],
)
def test_init_needs_a_folder(home: Home, content: Any, found: str) -> None:
    if content:
        put_files(home.code, {"x": content})
    ran = home.run("init", str(home.code / "x"), "-p", "shop")
    assert ran.status == 2 and ran.complaints == [f"orchestra: {home.code}/x: {found}"]
    assert not os.path.exists(orchestra.orchestra_root(home.path))


@pytest.mark.parametrize("spelling", ["{home}/code/api", "{link}/code/api", "{home}/../link/code/../code/api/"])
@pytest.mark.parametrize("is_home_linked", [False, True])
def test_init_writes_a_path_below_the_home_with_a_tilde(home: Home, spelling: str, is_home_linked: bool) -> None:
    link = home.folder / "link"
    link.symlink_to(home.path)
    put_files(Path(home.path), {"code/api/x": ""})
    path = spelling.format(home=home.path, link=link)
    if is_home_linked:
        home.path = home.environ["HOME"] = str(link)
    home.run_fine("init", path, "-p", "shop", "--sync")
    assert home.registry().codebases[API].path == "~/code/api"
    assert "is already registered" in home.run_fine("init", path, "-p", "shop").out


@pytest.mark.parametrize("layer", ["all.yaml", "shop/project.yaml", "shop/project.local.yaml"])
def test_init_takes_the_targets_that_a_layer_names(home: Home, layer: str) -> None:
    home.write_registry(layer, "targets: [gemini]\n")
    put_files(home.code, {"CLAUDE.md": "mine\n", ".cursorrules": "x"})
    ran = home.run_fine("init", str(home.code), "-p", "shop", "--sync")
    assert f"targets: gemini (from {os.path.basename(layer)})" in ran.out
    assert "targets" not in home.file("shop/code").read_text()
    assert sorted(contents(home.code)) == [".cursorrules", "CLAUDE.md", "GEMINI.md"]


def test_init_in_a_clone_takes_the_targets_that_its_files_were_written_for(home: Home) -> None:
    targets = ["claude", "codex", "cursor", "copilot"]
    files = {"CLAUDE.md": "mine\n", "AGENTS.md": SPEAKING, COPILOT: "mine\n"}
    root = home.make_synced("shop/api", files, targets=targets)
    shutil.copytree(root, home.code / "clone")
    ran = home.run_fine("init", str(home.code / "clone"), "-p", "shop", "--sync")
    assert "targets:  claude, codex, copilot, cursor (already used in this folder)" in ran.out
    assert contents(home.code / "clone").keys() == contents(root).keys()


# What an absent codebase's files say, and its local sister after its init.
FILLED_IN = {
    "another machine's path": ("path: /their/api\n", None, "path: {path}\n"),
    "no path": ("", None, "path: {path}\n"),
    "a local sister": ("path: /their/api\n", "# mine\nnotes: [a]\n", "# mine\nnotes: [a]\npath: {path}\n"),
    "a local path": ("", "path: /gone  # long ago\nnotes: [a]\n", "path: {path}  # long ago\nnotes: [a]\n"),
    "flow style": ("", "{notes: [a]}\n", "notes: [a]\npath: {path}\n"),
}


@pytest.mark.parametrize(("text", "local", "expected"), FILLED_IN.values(), ids=FILLED_IN)
def test_init_of_an_absent_codebase_writes_its_path_beside_it(
    home: Home, text: str, local: Optional[str], expected: str
) -> None:
    file = home.write_registry("shop/api.yaml", f"name: api\n{text}description: d\n")
    if local:
        home.write_registry("shop/api.local.yaml", local)
    root = home.code / "api"
    root.mkdir()
    before = contents(home.projects)
    dry = home.run_fine("init", str(root), "-p", "shop", "--sync", "--dry-run")
    assert contents(home.projects) == before and not (root / "CLAUDE.md").exists()
    ran = home.run_fine("init", str(root), "-p", "shop", "--sync")
    said = f"shop/api is on this machine: {root} (~/.orchestra/projects/shop/api.local.yaml)"
    assert ran.out.splitlines()[:2] == [said, "create   shop/api CLAUDE.md"] and ran.err == ""
    assert dry.out.splitlines()[:2] == [said.replace(" is ", " would be "), "create   shop/api CLAUDE.md"]
    assert (home.projects / "shop/api.local.yaml").read_text() == expected.format(path=root)
    assert file.read_text() == f"name: api\n{text}description: d\n"
    assert "already registered" in home.run_fine("init", str(root), "-p", "shop").out
    moved = root.rename(home.code / "moved")
    home.run_fine("project", "move", "api", str(moved))
    assert (home.projects / "shop/api.local.yaml").read_text() == expected.format(path=moved)
    assert home.status_of() == "current"


def test_init_of_an_absent_codebase_may_change_its_type(home: Home) -> None:
    file = home.write_registry("shop/api.yaml", "# mine\nname: api\nprojects: [{name: api, project_type: ml}]\n")
    ran = home.run_fine("init", str(home.code), "-p", "shop", "--name", "api", "-t", "mobile")
    assert "type changed to mobile" in ran.out and "project_type: mobile" in file.read_text()


# How a codebase's file has its path, before it is moved and after.
MOVES = {
    "plain": ("# mine\nname: api\npath: {old}  # where it is\nnotes: [a]\n", "path: {old}", "path: {new}"),
    "quoted, CRLF": ("path: '{old}'\r\nname: api\r\nnotes: [a]\r\n", "path: '{old}'", "path: {new}"),
    "flow": ("{{name: api, path: {old}, notes: [a]}}\n", "path: {old}", "path: {new}"),
    "folded": ("name: api\npath: >-\n  {old}\nnotes: [a]\n", "path: >-\n  {old}", "path: {new}"),
}


@pytest.mark.parametrize(("text", "old", "new"), MOVES.values(), ids=MOVES)
def test_project_move_changes_the_path_alone(home: Home, text: str, old: str, new: str) -> None:
    places = {"old": home.code / "shop/api", "new": home.code / "api 2"}
    root = home.make_codebase(files={"CLAUDE.md": "mine\n"})
    file = home.write_registry("shop/api.yaml", text.format(**places))
    home.sync()
    edit(root / "AGENTS.md", "# api", "# my api")
    home.sync()
    backups, before = home.backups(), contents(root)
    root.rename(places["new"])
    ran = home.run_fine("project", "move", "api", str(places["new"]))
    said = f"moved shop/api: {root} -> {places['new']}\n  edit:    ~/.orchestra/projects/shop/api.yaml\n"
    assert (ran.out, ran.err) == (said, "")
    assert file.read_bytes().decode() == text.format(**places).replace(old.format(**places), new.format(**places))
    assert home.sync().lines == [] and home.status_of() == "current" and contents(places["new"]) == before
    assert home.backups() == backups != {}
    assert json.loads(home.record.read_bytes())["root"] == str(places["new"])
    assert "is already in" in home.run_fine("project", "move", "shop/api", f"{places['new']}/").out


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("nowhere", "no such folder"),
        ("file", "that is a file, not a folder"),
        ("shop/web", "this folder is already registered as shop/web"),
        ("shop", "it contains shop/api and is not a repository itself"),
        ("../home", "the home folder cannot be a codebase"),
    ],
)
def test_project_move_needs_a_folder_of_its_own(home: Home, path: str, problem: str) -> None:
    for name in ("api", "web"):
        home.make_codebase(f"shop/{name}")
    put_files(home.code, {"file": ""})
    before = contents(home.folder)
    ran = home.run("project", "move", "api", str(home.code / path))
    assert (ran.status, len(ran.complaints)) == (2, 1) and ran.complaints[0].endswith(problem)
    assert {path: data for path, data in contents(home.folder).items() if "/run/" not in path} == before
    assert home.run("project", "move", "nope", str(home.code)).status == 2


@pytest.mark.parametrize(("name", "has_text"), [("api", True), ("api", False), ("orders", True), ("orders", False)])
def test_init_of_a_folder_that_moved_says_how_to_go_on(home: Home, name: str, has_text: bool) -> None:
    root, moved = home.make_synced(), home.code / "new" / name
    home.make_codebase("shop/web")
    moved.parent.mkdir()
    root.rename(moved)
    if not has_text:
        (moved / "CLAUDE.md").unlink()
        (moved / "AGENTS.md").unlink()
    before = contents(home.projects)
    ran = home.run("init", str(moved), "-p", "shop", "--sync")
    if name == "orders" and not has_text:
        assert ran.status == 0  # nothing tells that it is the same
        return
    said = f"orchestra: shop/api was in {root}, which is gone\n  try: orchestra project move shop/api {moved} if it is"
    assert ran.status == 2 and ran.err.startswith(said) and contents(home.projects) == before
    home.run_fine("project", "move", "shop/api", str(moved))
    assert len(home.sync("api").lines) == 2 * (not has_text) and home.status_of() == "current"


def test_what_is_registered_by_a_relative_path_has_an_absolute_one(home: Home, monkeypatch: Any) -> None:
    put_files(home.code, {"api": None, "web": None, ".git": None})
    monkeypatch.chdir(home.code)
    home.run_fine("project", "add", "api", "-t", "ml")
    home.run_fine("project", "add", "whole", "-p", "shop", "--path", ".")
    home.run_fine("init", "web", "-p", "shop")
    rows = [("api", "api", f"{home.code}/api", ["ml"])]
    rows += [
        ("shop", name, path, ["backend"]) for name, path in (("web", f"{home.code}/web"), ("whole", f"{home.code}"))
    ]
    names = ("project", "codebase", "path", "project_types", "targets")
    entries = [dict(zip(names, (*row, ["claude", "codex"]))) for row in rows]
    assert json.loads(home.run_fine("project", "list", "--json").out) == entries
    assert home.run("project", "add", "nowhere").status == 2


def test_project_list_says_each_type_once(home: Home) -> None:
    types = ("backend", "frontend", "backend")
    home.register("shop/api", projects=[{"name": str(i), "project_type": kind} for i, kind in enumerate(types)])
    assert home.run_fine("project", "list").lines[1].split()[:3] == ["shop/api", "backend,", "frontend"]


# ── 37 Output ─────────────────────────────────────────────────────────────────


def test_what_moves_a_terminals_cursor_is_escaped(home: Home) -> None:
    odd = "odd \x1b[2J\x9b31m\u202e\xe9"
    home.write_registry("shop/api.yaml", f"name: api\npath: {json.dumps(str(home.code / odd))}\n")
    out = home.run("status", "--json").out
    assert "odd \\u001b[2J\\u009b31m\\u202e\xe9" in out
    assert f"/{odd}: " in json.loads(out)["codebases"][0]["detail"]
    (home.code / f"{odd}!").mkdir()
    moved = home.run_fine("project", "move", "api", str(home.code / f"{odd}!"))
    assert moved.lines[0].endswith("odd \\x1b[2J\\x9b31m\\u202e\xe9!")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("is_terminal", "environ", "expected"),
    [
        (True, {"COLUMNS": "100"}, (100, True)),
        (True, {}, (80, True)),
        (True, {"COLUMNS": "none", "NO_COLOR": ""}, (80, False)),
        (True, {"TERM": "dumb"}, (80, False)),
        (False, {}, (0, False)),
        (False, {"COLUMNS": "60", "CLICOLOR_FORCE": "0"}, (60, False)),
        (False, {"CLICOLOR_FORCE": "1"}, (0, True)),
        (False, {"CLICOLOR_FORCE": "1", "NO_COLOR": "1"}, (0, False)),
    ],
)
def test_what_a_screen_shows(monkeypatch: Any, is_terminal: bool, environ: dict[str, str], expected: Any) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal() if is_terminal else io.StringIO())
    assert tuple(orchestra.Screen.find(environ)) == expected


@pytest.mark.parametrize(
    ("text", "width"), [("abc", 3), ("日本", 4), ("e\u0301\u20dd", 1), ("한글 ｆ", 7), ("", 0), ("\u00e9", 1)]
)
def test_a_texts_width_is_what_a_terminal_shows(text: str, width: int) -> None:
    assert orchestra.text_width(text) == width


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("", 5, [""]),
        ("one two three", 7, ["one two", "three"]),
        ("a muchtoolongword b", 6, ["a", "muchto", "olongw", "ord b"]),
        ("日本語日本語", 5, ["日本", "語日", "本語"]),
        ("日本", 1, ["日", "本"]),
    ],
)
def test_a_text_is_wrapped_at_spaces_or_where_it_must_be(text: str, width: int, lines: list[str]) -> None:
    assert orchestra.wrap(text, width) == lines


def test_what_is_wide_or_has_many_pieces_is_soon_printed(home: Home) -> None:
    many = ", ".join(f"c{i}" for i in range(19_000))
    wide = f"{{name: '{'a ' * 400_000}', project_type: ml, path: q, notes: [x]}}"
    home.make_codebase()
    home.write_registry("shop/api.yaml", f"{home.text()}conventions: [{many}]\nprojects: [{wide}]\n")
    home.write_registry("shop/project.yaml", f"notes: [{many}]\n")
    started = time.process_time()
    assert len(home.run_fine("show", "api", "--origin").lines) > 38_000
    assert "'s folder is missing" in home.run_fine("status", "api").out
    assert time.process_time() - started < 5


def test_a_table_is_aligned_and_its_last_column_wrapped(monkeypatch: Any) -> None:
    rows = [("NAME", "STATE", "WHAT"), ("日本", "stale", "one two three four five six"), ("a", "current", "x\x1b[0m\n")]
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    orchestra.Screen(36, True).print_table(rows, {"stale": "33", "current": "32"})
    assert out.getvalue().splitlines() == [
        "NAME  STATE    WHAT",
        "日本  \x1b[33mstale\x1b[0m    one two three four",
        "               five six",
        "a     \x1b[32mcurrent\x1b[0m  x\\x1b[0m\\n",
    ]
    assert orchestra.format_table(rows)[1] == "日本  stale    one two three four five six"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "never"), (0, "0 s ago"), (59, "59 s ago"), (60, "1 min ago"), (7199, "1 h ago"), (172800, "2 d ago")],
)
def test_an_age_is_told_in_its_largest_unit(seconds: Optional[int], text: str) -> None:
    assert orchestra.format_age(seconds) == text


def test_progress_is_for_terminals(monkeypatch: Any) -> None:
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    orchestra.show_progress(0, 21, API)
    orchestra.show_progress(0, 20, ("shop", "web"))
    assert "1/21 shop/api" in err.getvalue() and "web" not in err.getvalue()


# ── 38 Arguments ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sync", {"codebases": [], "all": False, "quiet": False}),
        ("sync a b --all -q", {"codebases": ["a", "b"], "all": True, "quiet": True}),
        ("sync --dry-run -- --all -q", {"codebases": ["--all", "-q"], "dry_run": True}),
        ("restore --at=2026 api x.md", {"codebase": "api", "path": "x.md", "at": "2026"}),
        ("restore --at -1 -", {"codebase": "-", "path": None, "at": "-1"}),
        ("sync -x/api -q/api --x/api", {"codebases": ["-x/api", "-q/api", "--x/api"], "quiet": False}),
        ("init -p/x -p -x -y/z", {"path": "-y/z", "project": "-x"}),
        ("init -pshop . -tml", {"path": ".", "project": "shop", "type": "ml"}),
        ("init -p=shop . -t=ml", {"path": ".", "project": "shop", "type": "ml"}),
        ("init -p shop", {"path": ".", "project": "shop", "type": None}),
        ("daemon logs -fq --lines 3", {"follow": True, "quiet": True, "lines": 3}),
        ("edit -h", {"help": True}),
        ("-q sync --all", {"all": True, "quiet": True}),
        ("-h -q sync", {"help": True, "quiet": True, "codebases": []}),
        ("init --help", {"help": True}),
    ],
)
def test_a_command_line_is_parsed(line: str, expected: dict[str, Any]) -> None:
    args = vars(orchestra.CommandLine(orchestra.COMMANDS, line.split()).parse())
    assert {name: args[name] for name in expected} == expected


WRONG_LINES = {
    "": 'there is no command ""\n  try: orchestra help',
    "nope": 'there is no command "nope"\n  try: orchestra help',
    "stats": 'there is no command "stats" (did you mean "status"?)\n  try: orchestra help',
    "self-instal": 'there is no command "self-instal"\n  try: orchestra help',
    "--verison": 'there is no option --verison (did you mean "--version"?)\n  try: orchestra help',
    "daemon strat": 'there is no command "daemon strat" (did you mean "start"?)\n  try: orchestra help daemon',
    "sync --al": 'sync: there is no option --al (did you mean "--all"?)\n  try: orchestra help sync',
    "sync --all=1": "sync: --all takes no value\n  try: orchestra help sync",
    "sync --al=/x": 'sync: there is no option --al (did you mean "--all"?)\n  try: orchestra help sync',
    "sync -xq": "sync: there is no option -x\n  try: orchestra help sync",
    "init": "init: -p PROJECT is missing\n  try: orchestra help init",
    "init . -p": "init: -p: expected PROJECT, got nothing\n  try: orchestra help init",
    "init . -p x -t mobil": "init: --type: expected backend | frontend | mobile | ml, got 'mobil'"
    ' (did you mean "mobile"?)\n  try: orchestra help init',
    "init a b -p x": "init: did not expect 'b'\n  try: orchestra help init",
    "project remove": "project remove: CODEBASE is missing\n  try: orchestra help project remove",
    "daemon logs --lines -1": "daemon logs: --lines: expected a whole number, 0 or more, got '-1'"
    "\n  try: orchestra help daemon logs",
    "start": 'there is no command "start" (did you mean "daemon start"?)\n  try: orchestra help',
    "version": 'there is no command "version" (did you mean "--version"?)\n  try: orchestra help',
    "--all sync": "--all goes after the command\n  try: orchestra sync --all",
    "project --json list": "--json goes after the command\n  try: orchestra project list --json",
    "--jsno status": "there is no option --jsno\n  try: orchestra help",
    "daemon list": 'there is no command "daemon list"\n  try: orchestra help daemon',
    "help syn": 'there is no command "syn" (did you mean "sync"?)\n  try: orchestra help',
}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_wrong_command_line_is_exit_status_2_and_says_how(home: Home, line: str) -> None:
    assert home.run(*(line.split() or [""])) == (2, "", f"orchestra: {WRONG_LINES[line]}\n")
    assert contents(home.folder) == {}


def test_each_command_is_explained_in_80_columns(home: Home) -> None:
    overview = home.run_fine()
    assert len(overview.out.splitlines()) <= 24 and "self-" not in overview.out
    for name, row in orchestra.COMMANDS.items():
        ran = home.run_fine(*name.split(), "--help")
        assert ran == home.run_fine("help", *name.split()) and max(map(len, ran.out.splitlines())) < 80
        usage = f"\n\nusage: orchestra {name}".rstrip()
        assert row.purpose[1:] in ran.out and usage in ran.out
        for argument in row.arguments if name else ():
            assert argument.value_name in ran.out and all(
                name in ran.out for name in argument.names if argument.is_option
            )
    assert home.run_fine("daemon").out == home.run_fine("daemon", "-h").out
    rows = {"cmd_" + re.sub("[ -]", "_", name) for name in orchestra.COMMANDS} - {"cmd_", "cmd_project", "cmd_daemon"}
    assert {name for name in vars(orchestra.Commands) if name.startswith("cmd_")} == rows
    assert home.run_fine("--help").out.splitlines()[0] == overview.out.splitlines()[0] == MODULE_DOC.splitlines()[0]
    assert home.run_fine("--version").out == home.run_fine("-V").out == VERSION_LINE
    for words in ("CODEBASE is", "Exit status: 0", "NO_COLOR", "Every day"):
        assert words in home.run_fine("help").out


# Completion

NAMES = ["blog/web", "api", "shop/web"]  # as short as is unique
CUSTOM_TARGETS = {  # in each way to write them
    "all.local.yaml": "\n\n  crush:  \n    path: .crush/rules.md\n    header: |\n      ---\n      zap: x\n      ---\n",
    "shop/project.local.yaml": " {zed: {path: a.md, owns: block}, 'zoo': {owns: file, path: b.md}}\r\n",
    "shop/api.local.yaml": " {\n  z.1: {\n    path: a.md\n  }\n}\n",
    "blog/web.local.yaml": "\n  z2: {path: a.md}\n  z3:\n    owns: file\n    path: zip.md\n",
}


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("sta", ["status"]),
        ("daemon ", ["start", "stop", "status", "install", "uninstall", "logs"]),
        ("help dae", ["daemon"]),
        ("help project mo", ["move"]),
        ("nope ", []),
        ("sync ", NAMES),
        ("sync api ", NAMES),
        ("sync shop/", ["shop/web", "shop/api"]),
        ("diff --exit-code a", ["api"]),
        ("edit ", NAMES),
        ("edit api ", []),
        ("restore api ", []),
        ("project remove b", ["blog/web"]),
        ("sync ./s", []),
        ("init . -t ", ["backend", "frontend", "mobile", "ml"]),
        ("init -t ml -p ", ["blog", "shop"]),
        ("status --project s", ["shop"]),
        ("sync --a", ["--all"]),
        ("sync --nope ", []),
        ("show --target cru", ["crush"]),
        ("show api --target z", ["z.1", "z2", "z3", "zed", "zoo"]),
        ("completion ", ["bash", "zsh", "fish"]),
        ("daemon logs --lines ", []),
    ],
)
def test_a_word_is_completed(home: Home, typed: str, expected: list[str]) -> None:
    for label in ("shop/api", "shop/web", "blog/web"):
        home.write_registry(f"{label}.yaml", "{ broken")  # nothing is read
    for name in ("shop/project.yaml", "shop/.hidden.yaml", "shop/a\tb.yaml", "shop/notes.md", "all.yaml"):
        home.write_registry(name, "x")
    for name, text in CUSTOM_TARGETS.items():
        home.write_registry(name, f"custom_targets:{text}notes: [zip: 1]\n")
    found = [line.split("\t")[0] for line in home.run_fine("complete", "--", *typed.split(" ")).out.splitlines()]
    assert set(expected) <= set(found) if typed == "daemon " else found == expected


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("sync ", ["api"]),
        ("sync dash/", ["dash/--all", "dash/-y"]),
        ("edit -", ["--help", "--quiet"]),
        ("init -p ", ["dash", "shop"]),
        ("init -p -", []),
    ],
)
def test_no_name_is_offered_that_looks_like_an_option(home: Home, typed: str, expected: list[str]) -> None:
    for label in ("shop/api", "dash/-y", "dash/--all", "-p/-x"):
        home.write_registry(f"{label}.yaml", "x")
    found = [line.split("\t")[0] for line in home.run_fine("complete", "--", *typed.split(" ")).out.splitlines()]
    assert sorted(found) == expected


def offer(machine: Machine, shell: str, typed: str, word: str, **environ: str) -> list[str]:
    """Return what a shell offers for a word."""
    if shell == "fish":
        argv = ["fish", "--no-config", "-c", f"orchestra completion fish | source; complete -C '{typed} {word}'"]
    else:
        replaced = re.split("[\"']", word)[-1]  # as readline has it
        code = f"COMP_LINE={shlex.quote(f'{typed} {word}')}; COMP_WORDS=({typed} {shlex.quote(word)})"
        code += f"; COMP_CWORD={len(typed.split())}; _orchestra orchestra {shlex.quote(replaced)}"
        code += '; printf "%s\\n" "${COMPREPLY[@]}"'
        argv = ["bash", "--norc", "-c", f'eval "$(orchestra completion bash)"; complete -p orchestra >&2; {code}']
    environ["PATH"] = f"{machine.link.parent}:{os.environ['PATH']}"
    done = machine.run_program(*argv, environ=environ)
    assert done.returncode == 0, done
    return [line.split("\t")[0] for line in done.stdout.splitlines()]


@pytest.fixture
def on_path(machine: Machine) -> Machine:
    """A machine with the program on its PATH, and two registered codebases."""
    binary = machine.install_program()
    put_files(machine.home, {".local/bin/orchestra": link_to(binary)})
    for label in ("shop/api", "shop/my web", "shop/x\\$(y)"):
        machine.write_registry(f"{label}.yaml", "x")
    return machine


def needs_shell(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name), reason=f"needs {name}"))


@pytest.mark.parametrize("shell", [needs_shell("bash"), needs_shell("fish")])
@pytest.mark.parametrize(
    ("typed", "word", "offered"),
    [
        ("orchestra", "stat", ["status"]),
        ("orchestra daemon", "un", ["uninstall"]),
        ("orchestra sync --all", "a", ["api"]),
        ("orchestra diff", "shop/m", ["shop/my web"]),
        ("orchestra diff", "my\\ w", ["my web"]),
        ("orchestra diff", '"my w', ["my web"]),
        ("orchestra diff", "x", ["x\\$(y)"]),
        ("orchestra init -t", "m", ["mobile", "ml"]),
        ("orchestra sync", "--c", ["--check"]),
    ],
)
def test_a_shell_completes(on_path: Machine, shell: str, typed: str, word: str, offered: list[str]) -> None:
    found = offer(on_path, shell, typed, word)
    assert sorted(re.sub(r"\\(.)", r"\1", text) if shell == "bash" else text for text in found) == sorted(offered)
    if "$" in offered[0] and shell == "bash":
        assert found == ["x\\\\\\$\\(y\\)"]  # not to be run by the shell


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@pytest.mark.parametrize("begun", ["", '"', "'", "$'", 'shop/"', "shop/'"])
def test_no_name_that_bash_completes_is_run(on_path: Machine, locale: str, begun: str) -> None:
    for name in ("zé$(touch PW)", "z㇯$(touch PW)", "z`touch PW`", 'z"$(touch PW)"', "z'$(touch PW)'", "z; touch PW"):
        on_path.write_registry(f"shop/{name}.yaml", "x")
    for word in offer(on_path, "bash", "orchestra sync", f"{begun}z", LC_ALL=locale):
        line = f": {begun}{word}{begun[-1:]}"  # as readline inserts it
        on_path.run_program("bash", "--norc", "-c", line, environ={"LC_ALL": locale}, cwd=on_path.folder)
    assert not (on_path.folder / "PW").exists()


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("shop/a:", ["shop/a:b=c"]),
        ("a:b", ["a:b=c"]),
        ("a:b=", ["a:b=c"]),
        ("a\\:b", ["a:b=c"]),
        ("shop/a:b=c a:", ["shop/a:b=c", "a:b=c"]),
        ('shop/"my', ["shop/my web"]),
        ("x", ["x\\$(y)"]),
        ("q:", ["q:$(touch PW)"]),
    ],
)
def test_bash_completes_a_word_that_it_splits(on_path: Machine, typed: str, words: list[str]) -> None:
    for name in ("a:b=c", "q:$(touch PW)"):
        on_path.write_registry(f"shop/{name}.yaml", "x")
    os.unlink(on_path.projects / "shop/api.yaml")
    path = f"{on_path.link.parent}:{os.environ['PATH']}"
    bash = Tty(on_path, ["bash", "--norc", "--noprofile", "-i"], PATH=path, PS1="READY$ ", TERM="dumb")
    bash.type('eval "$(orchestra completion bash)"\r', after="READY$ ")
    bash.wait_for("READY$ ")
    bash.type(f"orchestra sync {typed}\t\x01printf '<%s>' \r")  # ^A: at the start of the line
    bash.wait_for("".join(f"<{word}>" for word in ["orchestra", "sync", *words]))
    bash.type("exit\r", after="READY$ ")
    assert bash.process.wait(30) == 0


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_zsh_completes(on_path: Machine) -> None:
    path = f"{on_path.link.parent}:{os.environ['PATH']}"
    zsh = Tty(on_path, ["zsh", "-f", "-i"], PATH=path, PS1="READY$ ", ZDOTDIR=on_path.path)
    zsh.type('autoload -Uz compinit; compinit -u -D; eval "$(orchestra completion zsh)"\r', after="READY$ ")
    zsh.wait_for("READY$ ")
    words = (("orchestra stat\t", "status"), ("--ch\t", "--check"), ("a\t", "api"))
    for typed, shown in (*words, ("my\\ \t", "my\\ web"), ("x\t", "x\\\\\\$\\(y\\)")):
        zsh.type(typed)
        zsh.wait_for(shown)
    zsh.type("\x15exit\r")
    assert zsh.process.wait(30) == 0


# ── 39 Status screen ──────────────────────────────────────────────────────────


def make_troubled(home: Home) -> None:
    """Make a codebase in each state."""
    for label in ("bank/web", "shop/api", "shop/infra", "tools/日本", "tools/fine", "tools/link"):
        home.make_codebase(label, targets=["claude"])
    home.register("shop/gone")  # on another machine
    home.sync()
    edit(home.code / "shop/api/CLAUDE.md", "# api", "# mine")
    home.register("bank/web", targets=["claude"], conventions=["one"])
    home.register("shop/infra", conventions=[{"a": "b"}])
    (home.code / "tools/link/CLAUDE.md").unlink()
    (home.code / "tools/link/CLAUDE.md").symlink_to("README.md")
    home.register("tools/日本", targets=["claude", "codex"])
    home.make_codebase("shop/new", targets=["claude"])
    age = orchestra.now_rfc3339(lambda: time.time() - 7300)
    for file in Path(orchestra.hashes_root(home.path)).glob("*/*.json"):
        file.write_text(re.sub('"synced_at": *"[^"]*"', f'"synced_at": "{age}"', file.read_text()))


TROUBLED = """\
8 codebases in 3 projects: 2 current, 3 to sync, 1 edited by hand, 1 absent, 1
broken
daemon: not running (orchestra daemon start --detach)

CODEBASE    STATE    SYNCED   WHAT
shop/infra  broken   2 h ago  infra.yaml:6: conventions[0]: needs quotes,
                              because it contains ": "
shop/api    edited   2 h ago  CLAUDE.md
bank/web    stale    2 h ago  registry changed: CLAUDE.md
tools/日本  stale    2 h ago  registry changed: AGENTS.md
shop/new    new      never
tools/link  current  2 h ago  CLAUDE.md: skipped: it is a symbolic link to
                              README.md

next: orchestra edit shop/infra    then: orchestra diff shop/api
"""


def test_status_shows_what_needs_attention_in_80_columns(home: Home) -> None:
    make_troubled(home)
    home.environ["COLUMNS"] = "80"
    ran = home.run("status")
    assert (ran.status, ran.err) == (2, "") and ran.out.splitlines() == TROUBLED.splitlines()
    home.environ["CLICOLOR_FORCE"] = "1"
    assert re.sub(r"\x1b\[\d*m", "", home.run("status").out) == ran.out != home.run("status").out
    del home.environ["CLICOLOR_FORCE"], home.environ["COLUMNS"]
    more = home.run("status", "--all").out
    assert "tools/fine  current  2 h ago\n" in more and "shop/gone: the folder is missing\n" in more
    assert len(more.splitlines()) == 4 + 8 + 2  # in a pipe, nothing is wrapped


@pytest.mark.parametrize("text", ["notes: x\n", "targets: [vi]\n"])
@pytest.mark.parametrize("name", ["all", "shop/project.local", "shop/api", "shop/api.local"])
def test_the_next_step_of_a_problem_is_to_edit_its_file(home: Home, name: str, text: str) -> None:
    home.make_codebase("shop/api", notes=[])
    own = home.file().read_text().replace("notes", "x") if name == "shop/api" else ""
    put_files(home.projects, {"shop/api.local.yaml": "", f"{name}.yaml": own + text})
    edit = "orchestra edit shop/api" if name == "shop/api" else f"edit ~/.orchestra/projects/{name}.yaml"
    assert home.run("status").out.endswith(f"next: {edit}\n")


def test_the_next_step_for_an_unfit_folder_is_to_edit_the_file_that_has_its_path(home: Home) -> None:
    put_files(home.projects, {"shop/api.yaml": "name: api\n", "shop/api.local.yaml": f"path: {home.path}\n"})
    assert home.run("status").out.endswith("next: edit ~/.orchestra/projects/shop/api.local.yaml\n")


def test_status_tells_the_problem_of_a_shared_layer_once(home: Home) -> None:
    for label in ("shop/api", "shop/web", "blog/c"):
        home.make_codebase(label)
    home.write_registry("all.yaml", "notes: x\n")
    problem = "~/.orchestra/projects/all.yaml:1: notes: expected a list, got 'x'"
    ran = home.run("status")
    assert f"blog/c and 2 more  broken  never   {problem}\n" in ran.out and ran.out.count("all.yaml:1:") == 1
    assert ran.out.endswith("next: edit ~/.orchestra/projects/all.yaml\n")
    assert home.run("status", "--all").out.count(problem) == 3


STEPS: dict[str, tuple[list[Callable[[Home], Any]], str]] = {
    "nothing to do": ([add_it(), sync_it], ""),
    "never synced": ([add_it()], "next: orchestra sync shop/api"),
    "edited": ([add_it(), sync_it, change_file("CLAUDE.md", edit_block)], "next: orchestra diff shop/api    then: "
               "orchestra sync shop/api"),
    "several": ([add_it(), lambda home: home.make_codebase("shop/b")], "next: orchestra sync --all"),
    "broken": ([lambda home: home.write_registry("shop/api.yaml", "{")], "next: orchestra edit shop/api"),
    "absent": ([add_it(), lambda home: home.make_codebase("shop/b"), lambda home:
                shutil.rmtree(home.code / "shop/api")], "next: orchestra sync shop/b"),
    "all absent": ([add_it(), lambda home: shutil.rmtree(home.code / "shop/api")], "next: orchestra init PATH -p shop "
                   "--name api"),
    "gone": ([add_it(), sync_it, lambda home: shutil.rmtree(home.code / "shop/api")], "next: orchestra project move "
             "shop/api PATH, or bring the folder back, or orchestra project remove shop/api"),
    "gone and broken": ([add_it(), sync_it, lambda home: shutil.rmtree(home.code / "shop/api"), lambda home:
                        home.write_registry("shop/b.yaml", "{")], "next: orchestra edit shop/b    then: "
                        "orchestra project move shop/api PATH, or bring the folder back, or "
                        "orchestra project remove shop/api"),
    "gone and new": ([add_it(), sync_it, lambda home: shutil.rmtree(home.code / "shop/api"), lambda home:
                     home.make_codebase("shop/b")], "next: orchestra sync shop/b    then: orchestra project move "
                     "shop/api PATH, or bring the folder back, or orchestra project remove shop/api"),
}  # fmt: skip


@pytest.mark.parametrize("state", STEPS)
def test_status_says_what_to_type_next(home: Home, state: str) -> None:
    steps, said = STEPS[state]
    for step in steps:
        step(home)
    last = home.run("status").out.splitlines()[-1]
    assert last == (said or "daemon: not running (orchestra daemon start --detach)")


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        ({"running": False}, "daemon: not running (orchestra daemon start --detach)"),
        ({"running": True, "started_at_unix": 0, "version": orchestra.__version__}, "daemon: running 16 min"),
        (
            {"running": True, "started_at_unix": 2000, "version": "0.0.1"},
            f"daemon: running 0 s, 0.0.1 (installed: {orchestra.__version__} - orchestra daemon restart)",
        ),
        ({"running": True, "problem": "busy"}, "daemon: busy"),
    ],
)
def test_status_has_a_line_on_the_daemon(reply: dict[str, Any], line: str) -> None:
    assert orchestra.describe_daemon(reply, Clock()) == line


def test_status_asks_the_daemon_and_tells_of_replaced_text(served: Home) -> None:
    root = served.make_codebase(targets=["claude"])
    wait_until(lambda: served.has("x") or (root / "CLAUDE.md").exists())
    edit(root / "CLAUDE.md", "# api", "# mine")
    served.register(targets=["claude"], notes=["next"])
    wait_until(lambda: served.has("next"))
    wait_until(lambda: "note: shop/api: CLAUDE.md: hand-written text was replaced" in served.run("status").out)
    assert re.match("1 codebase in 1 project: 1 current\ndaemon: running \\d+ s\n", served.run("status").out)
    status = json.loads(served.run("status", "--json").out)
    assert [note.startswith("shop/api: CLAUDE.md: hand-written text") for note in status["notes"]] == [True]
    assert status["daemon"] == {"running": True, "version": orchestra.__version__, "pid": served.answers()}


def test_status_tells_what_the_daemon_has_trouble_with_once() -> None:
    entry = orchestra.Staleness("shop", "api", "error", "CLAUDE.md: wrong")
    problems = [{"where": "shop/api: CLAUDE.md", "message": "wrong"}, {"where": "socket", "message": "no descriptors"}]
    daemon = {"running": True, "problems": problems, "version": orchestra.__version__}
    notes = [orchestra.Problem("x", "noted; to get it back: orchestra " + "y" * 90)]
    view = orchestra.StatusView(orchestra.Status((entry,), ()), daemon, notes)
    told = ["note: x: noted", "  try: orchestra " + "y" * 90, "daemon: socket: no descriptors"]
    assert view.format_entries(80)[2:] == told


def test_a_daemon_that_does_not_answer_holds_nothing_up(live: Home) -> None:
    live.make_codebase()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(live.socket)
        listener.listen()
        started = time.monotonic()
        assert "daemon: " in live.run("status").out and time.monotonic() - started < 10


# Live


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ("INFO synced target=api source=watcher codebases=1 written=2 errors=0 ms=6", "api  2 written  6 ms"),
        ('WARNING problem error="~/.orchestra/projects/shop/a.yaml:4: \\"x\\""', '! problem: shop/a.yaml:4: "x"'),
        ('INFO synced target="2 codebases" written=1 ms=2', "2 codebases  1 written  2 ms"),
        ("INFO started pid=7 version=0.1.0", "started pid 7, version 0.1.0"),
        ('WARNING odd error="\\u001b[2J"', r"! odd: \x1b[2J"),
        ('INFO note text="~/.orchestra/projects/shop/a.yaml:4: x"', "note shop/a.yaml:4: x"),
        ("INFO staleness current=3", ""),
        ('WARNING broken error="\\q"', ""),
    ],
)
def test_an_event_is_shortened_for_the_screen(line: str, event: str) -> None:
    shown = orchestra.format_event(f"2026-11-29T01:53:37.123Z {line}", 60)
    assert re.sub(r"^\d\d:53:37  ", "", shown) == event[:50]
    assert orchestra.format_event(f"2026-11-29T01:53:37.123Z {line}", 12)[:12] == shown[:12]
    assert orchestra.format_event("garbage", 60) == orchestra.format_event("", 60) == ""


@pytest.mark.parametrize("size", [(80, 24), (40, 8), (10, 3), (200, 60)])
def test_a_frame_fits_the_terminal(home: Home, size: tuple[int, int]) -> None:
    make_troubled(home)
    home.write_registry("shop/x.yml", "")
    orchestra.Log(home.path).info("synced", target="shop/api", written=1, ms=3)
    live = orchestra.LiveStatus(home.path, lambda: orchestra.scan_staleness(home.path, home.registry()))
    live.look()
    lines = live.frame(*size)
    assert len(lines) <= size[1] and all(orchestra.text_width(line) < size[0] for line in lines)
    if size == (80, 24):
        assert lines[0].startswith("daemon: not running") and lines[0].endswith("  q quit")
        assert lines[3].split() == ["CODEBASE", "STATE", "SYNCED", "WHAT"]
        assert lines[-1].endswith("  shop/api  1 written  3 ms")
    if size == (200, 60):
        assert "note: ~/.orchestra/projects/shop/x.yml:1: ignored: rename it to x.yaml" in lines


def watch(home: Home) -> Tty:
    live = Tty(home, home.command("status", "--watch"))
    live.wait_for("q quit")
    return live


def test_a_live_status_shows_syncs_and_ends_with_q(served: Home) -> None:
    live = watch(served)
    assert live.has_changed
    served.make_codebase(targets=["claude"])
    live.wait_for("api  1 written")
    live.wait_for("1 codebase in 1 project: 1 current")
    edit(served.code / "shop/api/CLAUDE.md", "# api", "# mine")  # which no daemon sees
    live.wait_for("1 edited by hand")
    live.resize(10, 30)
    live.wait_for("\r\n" + "-" * 29 + "\x1b[K")
    suspend = [settings[6][termios.VSUSP] for settings in (live.before, live.settings)]
    assert suspend[0] != suspend[1]  # Ctrl-Z would leave the screen behind
    live.type("q")
    status, shown = live.finish()
    assert status == 0 and shown.endswith("\x1b[?25h\x1b[?1049l") and not live.has_changed


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda home, live: live.type("\x03"), 130),
        (lambda home, live: live.process.terminate(), 128 + signal.SIGTERM),
        (lambda home, live: put_in("home/.orchestra/projects")(home), 2),  # an error
        (lambda home, live: os.kill(live.process.pid, signal.SIGHUP), 128 + signal.SIGHUP),
    ],
)
def test_however_a_live_status_ends_the_terminal_is_as_before(home: Home, end: Any, status: int) -> None:
    put_files(Path(home.path), {".orchestra": None})
    live = watch(home)
    end(home, live)
    found, shown = live.finish()
    assert found == status and "\x1b[?25h\x1b[?1049l" in shown and not live.has_changed


def test_a_live_status_finds_its_codebases_before_it_takes_the_screen_and_misses_none_later(home: Home) -> None:
    home.make_codebase("shop/web")
    for argv in (["nope"], ["--project", "nope"]):
        status, shown = Tty(home, home.command("status", "--watch", *argv)).finish()
        assert status == 2 and 'is called "nope"' in shown and "\x1b[?1049h" not in shown
    live = Tty(home, home.command("status", "--watch", "web"))
    live.wait_for("1 codebase in 1 project")
    home.file("shop/web").unlink()
    live.wait_for("0 codebases in 0 projects")
    live.type("q")
    status, shown = live.finish()
    assert status == 0 and "orchestra:" not in shown


def test_a_live_status_needs_a_terminal(home: Home) -> None:
    assert Tty(home, home.command("status", "--watch"), TERM="dumb").finish()[0] == 2
    said = "orchestra: --watch needs a terminal\n  try: orchestra status\n"
    assert home.run("status", "--watch") == home.run_script("status", "--watch") == (2, "", said)
    for option in ("--json", "--check", "--strict"):
        said = f"orchestra: give either --watch or {option}, not both\n"
        assert home.run("status", "--watch", option) == (2, "", said)


@pytest.mark.parametrize("name", ["api", "日本", "my shop", "$(touch x)", "`id`", "a;b", "it's", 'say "hi"', "*"])
def test_what_a_hint_says_to_type_can_be_pasted(home: Home, name: str) -> None:
    put_files(home.projects, {f"shop/{name}.yaml": "name: other\n", "shop/b b.yaml": f"name: b b\npath: {home.code}\n"})
    said = "\n".join(ran for words in ("status", "sync --all", "doctor") for ran in home.run(*words.split())[1:])
    lines = re.findall(r"(?m)(?:next: |try: |fix: |then: )(orchestra (?:edit|sync) [^-\n].*?)(?:    |$)", said)
    assert {shlex.split(line)[2] for line in lines} == {f"shop/{name}", "shop/b b"}


@pytest.mark.parametrize("project", ["-x", "-q", "--all"])
def test_what_is_said_of_a_project_called_like_an_option_can_be_typed(home: Home, project: str) -> None:
    put_files(home.code, {"api/main.c": ""})
    home.run_fine("init", str(home.code / "api"), "-p", project)
    assert home.run("status").out.endswith(f"\nnext: orchestra sync {project}/api\n")
    for words in ("sync", "show --origin", "project remove"):
        home.run_fine(*words.split(), f"{project}/api")
    assert home.registry().keys == []


# ── 40 Doctor ─────────────────────────────────────────────────────────────────


def put_in(path: str, content: Any = "x\n") -> Callable[[Home], None]:
    return lambda home: put_files(home.folder, {path: content})


def put_program(path: str, script: str) -> Callable[[Home], None]:
    def put(home: Home) -> None:
        put_files(home.folder, {path: f"#!/bin/sh\n{script}\n"})
        (home.folder / path).chmod(0o700)

    return put


# How a home came to be, and what doctor says of it: the finding and its fix.
FINDINGS: dict[str, tuple[list[Callable[[Home], Any]], str, str]] = {
    "program": ([], f"ok orchestra {orchestra.__version__}, {sys.executable} (", ""),
    "not on PATH": ([], "warn no program on PATH is called orchestra", "run install.sh"),
    "link not on PATH": (
        [put_in("home/.local/bin/orchestra", link_to("/nowhere"))],
        "warn ~/.local/bin is not on PATH",
        'export PATH="$HOME/.local/bin:$PATH", in your shell\'s startup file',
    ),
    "old launcher": (
        [put_program("home/.orchestra/bin/orchestra", "echo orchestra 0.0.1")],
        f"warn ~/.orchestra/bin/orchestra is orchestra 0.0.1, and this is {orchestra.__version__}",
        "run install.sh again",
    ),
    "broken launcher": (
        [put_in("home/.orchestra/bin/orchestra")],
        "FAIL ~/.orchestra/bin/orchestra does not run: permission denied",
        "run install.sh again",
    ),
    "no daemon": ([], "warn the daemon is not running", "orchestra daemon start --detach"),
    "notify": (
        [put_in("home/.orchestra/notify")],
        "warn ~/.orchestra/notify is not run: not executable",
        "chmod u+x /",
    ),
    "notify of others": (
        [put_in("home/.orchestra/notify"), lambda home: os.chmod(orchestra.notify_path(home.path), 0o777)],
        "warn ~/.orchestra/notify is not run: others may write to it",
        "chown it to yourself, and chmod go-w /",
    ),
    "notify leads nowhere": (
        [put_in("home/.orchestra/notify", link_to("/nowhere"))],
        "warn ~/.orchestra/notify is not run: no such file or directory",
        "mend or remove it",
    ),
    "no login": (
        [put_program("code/bin/systemctl", "echo running")],
        "warn the daemon will not start after a reboot",
        "orchestra daemon install",
    ),
    **({"no systemd": ([], "ok nothing here could start the daemon at login: ", "")} if IS_LINUX else {}),
    "registry": ([add_it(), sync_it], "ok registry: 1 codebase in 1 project", ""),
    "broken": (
        [put_in("home/.orchestra/projects/shop/bad.yaml", "name: bad\nnotes: x\n")],
        "FAIL ~/.orchestra/projects/shop/bad.yaml:2: notes: ",
        "orchestra edit shop/bad",
    ),
    "half a block": ([add_it(files={"GEMINI.md": orchestra.BLOCK_BEGIN})], "FAIL shop/api: GEMINI.md: ", ""),
    "linked": (
        [add_it(["claude"], {"CLAUDE.md": link_to("README.md")})],
        "warn shop/api: CLAUDE.md: skipped: it is a symbolic link to README.md",
        "put a file in its place, or drop its target: orchestra edit shop/api",
    ),
    "too long": (
        [add_it(["claude"], notes=["x"] * 250), sync_it],
        "warn shop/api: CLAUDE.md: 2",
        "orchestra edit shop/api, or shorten your own text in the file",
    ),
    "hidden characters": (
        [add_it(["claude"], notes=["a\u200bb"]), sync_it],
        "warn shop/api: CLAUDE.md: contains invisible characters: ",
        "type the text anew: orchestra edit shop/api",
    ),
    "foreign": (
        [add_it(["claude"]), lambda home: other_home(home, targets=["claude"], notes=["two"]).sync()],
        "warn shop/api: CLAUDE.md: skipped: written from another registry (a colleague's?)",
        "orchestra sync shop/api",
    ),
    "replaced": (
        [add_it(["codex"], {"AGENTS.override.md": "mine"}), sync_it],
        "warn shop/api: AGENTS.override.md: Codex reads it instead of AGENTS.md",
        "orchestra edit shop/api",
    ),
    "absent": ([add_it(), lambda home: shutil.rmtree(home.code / "shop/api")], "ok not on this machine: shop/api", ""),
    "gone": (
        [add_it(), sync_it, lambda home: shutil.rmtree(home.code / "shop/api")],
        "warn shop/api: was synced here, but ",
        "orchestra project move shop/api PATH",
    ),
    "removed by hand": (
        [add_it(["codex", "cursor"]), sync_it, lambda home: home.file().unlink()],
        "warn shop/api has no registry file any more, but its text is still in ",
        "orchestra init ",
    ),
    "doubles": (
        [add_it(["codex", "cursor"]), sync_it],
        f"warn Cursor reads the same text in AGENTS.md and {CURSOR}: shop/api",
        "drop the target cursor: orchestra edit shop/api",
    ),
    "doubles by a layer": (
        [lambda home: home.write_registry("all.yaml", "targets: [codex, cursor]\n"), add_it(None), sync_it],
        f"warn Cursor reads the same text in AGENTS.md and {CURSOR}: shop/api",
        "drop the target cursor: edit ~/.orchestra/projects/all.yaml",
    ),
    "linked by a sister": (
        [
            lambda home: home.write_registry("shop/api.local.yaml", "targets: [claude]\n"),
            add_it(["claude"], {"CLAUDE.md": link_to("README.md")}),
        ],
        "warn shop/api: CLAUDE.md: skipped: it is a symbolic link to README.md",
        "put a file in its place, or drop its target: edit ~/.orchestra/projects/shop/api.local.yaml",
    ),
    "temporary file": (
        [put_in(f"home/.orchestra/hashes/.orchestra-{pid}-aa.tmp") for pid in (DEAD, os.getpid())],
        f"warn killed commands left 1 file: ~/.orchestra/hashes/.orchestra-{DEAD}-aa.tmp",
        "orchestra sync --all",
    ),
    "stale lock": (
        [put_in(f"home/.orchestra/run/{name}.lock", f"{DEAD}-aaaa\n") for name in ("codebases/shop/api", "pip")],
        "warn killed commands left 1 file: ~/.orchestra/run/codebases/shop/api.lock",
        "orchestra sync --all",
    ),
    "killed purge": (
        [
            add_it(["codex"]),
            sync_it,
            lambda home: home.run("project", "remove", "api") and None,
            put_in("home/.orchestra/run/codebases/shop/api.lock", f"{DEAD}-aaaa\n"),
        ],
        "warn killed commands left 1 file: ~/.orchestra/run/codebases/shop/api.lock",
        "orchestra init ",
    ),
    "backups": (
        [add_it(), sync_it, change_file("CLAUDE.md", edit_block), sync_it],
        "ok backups: 1 file, 1 kB",
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FINDINGS)
def test_doctor_finds_what_is_wrong_and_names_its_mend(home: Home, what: str) -> None:
    steps, text, fix = FINDINGS[what]
    for step in steps:
        step(home)
    home.environ["PATH"] = f"relative:{home.code}/bin"
    home.run("status")  # makes the cache of parsed files
    before = contents(home.folder)
    ran = home.run("doctor", "--json")
    assert ran.status == 1 and contents(home.folder) == before
    report = json.loads(ran.out)
    (found,) = [f for f in report["findings"] if f"{f['level']} {f['text']}".startswith(text)]
    assert found["fix"].startswith(fix) and bool(found["fix"]) == bool(fix or found["level"] != "ok")
    assert not found["fix"] or found["fix"] not in found["text"]
    levels = collections.Counter(finding["level"] for finding in report["findings"])
    assert (report["failures"], report["warnings"]) == (levels["FAIL"], levels["warn"])
    lines = home.run("doctor").out.splitlines()
    assert (
        lines[-1] == f"{orchestra.count_of(levels['FAIL'], 'failure')}, {orchestra.count_of(levels['warn'], 'warning')}"
    )


def test_doctor_tells_what_a_codebase_left_until_it_is_purged(home: Home) -> None:
    def ask() -> list[dict[str, str]]:
        findings = json.loads(home.run("doctor", "--json").out)["findings"]
        return [finding for finding in findings if "has no registry file" in finding["text"]]

    root = home.make_synced(files={"AGENTS.md": "mine\n"}, targets=["claude", "codex"])
    (root / "CLAUDE.md").unlink()
    os.rename(home.file(), home.projects / "shop/web.yaml")
    edit(home.projects / "shop/web.yaml", "name: api", "name: web")
    assert ask() == []  # the next sync knows it by its new name
    (home.projects / "shop/web.yaml").unlink()
    (finding,) = ask()
    assert finding["text"].endswith(f"text is still in {root}: AGENTS.md")
    before = (root / "AGENTS.md").read_bytes()
    for text in ("mine\n", f"mine\n\n{sealed_block('a colleague wrote this')}\n"):
        (root / "AGENTS.md").write_text(text)
        assert ask() == []
    (root / "AGENTS.md").write_bytes(before)
    again, purge = finding["fix"].replace("orchestra ", "").split(" && ")
    home.run_fine(*again.split())
    assert ask() == []
    home.run_fine(*purge.split())
    assert ask() == [] and contents(root) == {"AGENTS.md": b"mine\n"}
    home.make_synced()
    home.run_fine("project", "remove", "api")  # whose output says what is left
    assert ask() == []
    backups = Path(orchestra.backups_of(home.path, API))
    for number, folder in enumerate(backups.iterdir()):
        folder.rename(backups / f"20200101T00000{number}.000000Z")  # long before the last sync
    assert len(ask()) == 1


def test_the_fix_for_a_killed_purge_cleans_up_what_it_left(home: Home, monkeypatch: Any) -> None:
    root, name = home.make_synced(files={"CLAUDE.md": "mine\n"}), f".orchestra-{DEAD}-aa-1-AGENTS.md.tmp"
    home.run_fine("project", "remove", "api")
    put_files(root, {name: "new text\n"})
    put_files(home.folder, {"home/.orchestra/run/codebases/shop/api.lock": f"{DEAD}-aa\n"})
    monkeypatch.chdir(root)
    findings = json.loads(home.run("doctor", "--json").out)["findings"]
    (fix,) = [finding["fix"] for finding in findings if finding["text"].startswith("killed commands left")]
    for command in fix.replace("orchestra ", "").split(" && "):
        home.run_fine(*command.split())
    assert contents(root) == {"CLAUDE.md": b"mine\n"} and "killed commands" not in home.run("doctor").out


def test_doctor_is_content_with_a_machine_that_is_set_up(machine: Machine) -> None:
    machine.give_yaml()
    binary = machine.install_program()
    os.makedirs(os.path.dirname(orchestra.link_path(machine.path)))
    os.symlink(binary, orchestra.link_path(machine.path))
    unit = orchestra.launchd_plist_path if sys.platform == "darwin" else orchestra.systemd_unit_path
    put_files(Path("/"), {unit(machine.path): ""})
    path = f"{os.path.dirname(orchestra.link_path(machine.path))}:{os.environ['PATH']}"
    with machine.daemon(binary):
        done = machine.run_program(binary, "doctor", environ={"PATH": path})
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("\n0 failures, 0 warnings\n"), done
    assert re.search(r"(?m)^ok    daemon: running \d+ s, pid \d+, watcher \w+$", done.stdout)


def test_doctor_says_so_where_there_is_no_pyyaml(home: Home, monkeypatch: Any) -> None:
    monkeypatch.setattr(orchestra, "find_yaml", lambda: None)
    before = [*sys.path]
    ran = home.run("doctor")
    sys.path[:] = before
    assert ran.status == 1 and ran.out.startswith(f"FAIL  PyYAML is missing from {sys.executable}")
    assert "\n      fix: " in ran.out and ran.out.endswith("\n1 failure, 0 warnings\n")
    assert contents(home.folder) == {}


# ── 41 Commands ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("argv", "at", "found"),
    [
        ([], "shop/api/src", ["shop/api"]),
        (["."], "shop/api/src", ["shop/api"]),
        ([".."], "shop/web/deep", ["shop/web"]),
        (["api", "../web", "{code}/shop/api"], "shop/api", ["shop/api", "shop/web"]),
        (["shop/web", "web/deep"], "shop", ["shop/web"]),  # a name, and a folder that is there
        (["src/"], "shop/api", ["shop/api"]),
        (["nope", "web"], "", ["shop/web"]),
    ],
)
@pytest.mark.parametrize("command", [["sync", "--dry-run"], ["diff"], ["status"]])
def test_codebases_are_names_or_paths(
    home: Home, monkeypatch: Any, command: list[str], argv: list[str], at: str, found: list[str]
) -> None:
    home.make_codebase("shop/api", {"src/a.py": ""}, targets=["claude"])
    home.make_codebase("shop/web", {"deep/a.py": ""}, targets=["claude"])
    monkeypatch.chdir(home.code / at)
    if command == ["status"] and not argv:
        argv = ["."]  # without a name it shows all
    ran = home.run(*command, *(word.format(code=home.code) for word in argv))
    lines = ran.lines if command[0] != "diff" else re.findall("(?m)^[+]# (.*)$", ran.out)
    seen = [label for label in ("shop/api", "shop/web") if any(label in f"shop/{line} {line}" for line in lines)]
    assert seen == found
    assert (ran.status, "nope" in ran.err) == ((2, True) if "nope" in argv else (0, False))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("diff apy", 'no codebase is called "apy" (did you mean "api"?)'),
        ("edit shp/api", 'no codebase is called "shp/api" (did you mean "shop/api"?)'),
        ("status nope", 'no codebase is called "nope"'),  # although shop/e has three of its letters
        ("show api --target codx", 'show: no target is called "codx" (did you mean "codex"?)'),
        ("status --project shp", 'no project is called "shp" (did you mean "shop"?)'),
        ("sync {code}", "{code} is not in a registered codebase"),
        ("restore", "this folder is not in a registered codebase"),
        ("sync api --all", "give either CODEBASE or --all, not both"),
        ("project remove ..", ".. is not in a registered codebase"),
        ("sync {code}/odd", "{code}/odd is not in a registered codebase"),
    ],
)
def test_a_codebase_that_is_not_found_is_one_line(home: Home, monkeypatch: Any, command: str, said: str) -> None:
    home.make_codebase("shop/api")
    home.register("shop/e", path=None)
    put_files(home.code, {"odd/.git": b"gitdir: \xff/.git/modules/odd"})
    monkeypatch.chdir(home.code)
    ran = home.run(*command.format(code=home.code).split())
    assert (ran.status, ran.out, ran.complaints) == (2, "", [f"orchestra: {said.format(code=home.code)}"])


def add_worktree(root: Path, tree: Path, is_relative: bool = False) -> Path:
    """Make the files that `git worktree add` makes; git 2.48 writes relative paths, if asked to."""
    git = root / ".git/worktrees" / tree.name
    there, back = git, tree / ".git"
    if is_relative:
        there, back = Path(os.path.relpath(there, tree)), Path(os.path.relpath(back, git))
    put_files(git, {"gitdir": f"{back}\n", "commondir": "../..\n"})
    put_files(tree, {".git": f"gitdir: {there}\n", "src/a.py": ""})
    return git


@pytest.mark.parametrize("place", ["tree", "tree/src", "near", "shop/api/inside", "shop/outer/deep/tree/src", "real"])
def test_a_git_worktree_means_its_codebase(home: Home, monkeypatch: Any, place: str) -> None:
    root = home.make_codebase("shop/api", targets=["claude"])
    home.make_codebase("shop/outer", targets=["claude"])
    top = home.code / place.replace("/src", "")
    if place == "real":
        if not shutil.which("git"):
            pytest.skip("there is no git")
        for command in ("init -q", "commit -q --allow-empty -m x", f"worktree add -q {top}"):
            run_git(root, *command.split())
    else:
        add_worktree(root, top, place == "near")
    where = f"is in another git worktree of shop/api, whose files are written to {root}\n"
    monkeypatch.chdir(home.code / place)
    assert "+++ b/CLAUDE.md" in home.run_fine("diff", ".").out
    ran = home.run_fine("sync")
    assert (ran.lines, ran.err) == (["create   shop/api CLAUDE.md"], f"note: this folder {where}")
    assert home.run_fine("status", str(home.code / place)).err == f"note: {home.code / place} {where}"
    assert home.run_fine("sync", "--quiet").err == home.run_fine("sync", "api").err == ""
    assert home.run_fine("restore", "--list").err.startswith(f"note: this folder {where}")
    for command, hint in (
        ("project remove . --purge --yes", "project remove shop/api"),
        ("project move . /x", "project move shop/api /x"),
        ("restore", "restore shop/api"),
        ("restore CLAUDE.md", "restore shop/api CLAUDE.md"),
    ):
        shown = "this folder" if command.startswith("restore") else "."
        said = f"orchestra: {shown} is in another git worktree of shop/api\n  try: orchestra {hint}\n"
        ran = home.run(*command.split())
        assert (ran.status, ran.err) == (2, said) and (root / "CLAUDE.md").exists()
    if place == "tree":
        home.run_fine("init", ".", "-p", "shop")
        ran = home.run_fine("sync")
        assert ran.err == "" and "shop/tree CLAUDE.md" in ran.out


@pytest.mark.parametrize("place", ["tree", "shop/outer/tree"])
@pytest.mark.parametrize(
    "fault", ["forged", "pruned", "copied", "linked", "gitdir", "commondir", "empty", "climbing", "unregistered"]
)
def test_what_is_no_git_worktree_of_a_codebase_means_none(home: Home, monkeypatch: Any, place: str, fault: str) -> None:
    root = home.make_synced("shop/api", targets=["claude"])
    home.make_synced("shop/outer", targets=["claude"])
    put_files(home.code, {"evil/deep/a.py": "", "evil/shop/api/a.py": "", "shop/outer/repo/a.py": ""})
    tree = home.code / place
    if fault == "forged":
        put_files(root, {".git/worktrees": None})
        put_files(tree, {".git": f"gitdir: {root}/.git/worktrees/tree\n"})
    else:
        git = add_worktree(home.code / "shop/outer/repo" if fault == "unregistered" else root, tree)
    if fault == "pruned":
        shutil.rmtree(git)
    elif fault in ("copied", "linked"):  # by `cp -r`, and by `cp -al`
        tree = tree.parent / "copy"
        shutil.copytree(home.code / place, tree, copy_function=os.link if fault == "linked" else shutil.copy2)
    elif fault in ("gitdir", "commondir"):
        (git / fault).unlink()
    elif fault == "empty":
        put_files(git, {"gitdir": "", "commondir": "a\0b"})
    elif fault == "climbing":  # its text leads to shop/api, and the link that it goes through elsewhere
        shutil.rmtree(git)
        add_worktree(home.code / "evil/shop/api", tree)
        put_files(home.code, {"link": link_to("evil/deep")})
        put_files(tree, {".git": f"gitdir: {home.code}/link/../shop/api/.git/worktrees/tree\n"})
    monkeypatch.chdir(tree)
    ran = home.run("project", "remove", ".", "--purge")
    assert "worktree" not in ran.err and (root / "CLAUDE.md").exists()
    said = "removed shop/outer from the registry" if "outer" in place else ""
    assert (ran.status, ran.out[: len(said)]) == (0 if said else 2, said)
    assert said or "this folder is not in a registered codebase" in home.run("sync").err


def test_what_a_hint_says_to_type_is_one_word(home: Home) -> None:
    put_files(home.code, {"my $(date)": None})
    assert f"init '{home.code}/my $(date)' -p PROJECT" in home.run("sync", f"{home.code}/my $(date)").err


@pytest.mark.parametrize("command", [["sync"], ["diff"], ["status"], ["sync", "--check"]])
def test_of_several_codebases_all_are_tried(home: Home, command: list[str]) -> None:
    for label in ("shop/a", "shop/gone", "shop/z"):
        home.make_codebase(label, targets=["claude"])
    shutil.rmtree(home.code / "shop/gone")
    home.write_registry("shop/broken.yaml", "{")
    ran = home.run(*command, "a", "broken", "nope", "gone", "z")
    assert ran.status == 2 and "nope" in ran.err
    if command == ["diff"]:
        assert ran.out.count("--- /dev/null") == 2 and len(ran.complaints) == 3
    else:
        assert "shop/a " in ran.out and "shop/z " in ran.out


def test_quiet_commands_print_nothing_but_errors(home: Home) -> None:
    for argv in (["status"], ["project", "list"]):
        assert home.run(*argv, "-q") == (0, "", "")
    root = home.make_synced(targets=["claude"])
    edit(root / "CLAUDE.md", "# api", "# mine")
    for argv in (["status"], ["sync", "--all"], ["project", "list", "--json"], ["restore", "api"]):
        assert home.run(*argv, "-q") == (0, "", "")
    assert home.run("sync", "nope", "--quiet").err == home.run("sync", "nope").err != ""


def test_project_list_is_a_table_with_paths_as_they_were_written(home: Home) -> None:
    for words in ("project list", "status", "sync --all"):
        assert home.run_fine(*words.split()).err.startswith("no codebases yet\n  try: orchestra init ")
    stray = home.write_registry("shop/api.yml", "")
    for words in ("project list", "status", "sync --all"):
        assert home.run(*words.split()).err.startswith("orchestra: ~/.orchestra/projects/shop/api.yml:1: ignored")
    stray.unlink()
    home.make_codebase("shop/api", projects=[{"name": "api", "project_type": "ml"}])
    home.register("shop/near", path="~/near")
    assert home.run_fine("project", "list").out.splitlines() == [
        "CODEBASE   TYPE  PATH",
        f"shop/api   ml    {home.code}/shop/api",
        "shop/near        ~/near",
    ]
    home.write_registry("shop/api.yaml", "{")
    ran = home.run("project", "list")
    assert ran.status == 2 and "api.yaml:" in ran.err and re.search("(?m)^shop/api +broken +-$", ran.out)
    entry = {"project": "shop", "codebase": "api", "path": None, "project_types": [], "targets": []}
    assert json.loads(home.run("project", "list", "--json").out)[0] == entry


def test_project_remove_deregisters_and_keeps_the_file(home: Home, monkeypatch: Any) -> None:
    root = home.make_synced()
    before, file = contents(root), home.register().read_bytes()
    ran = home.run_fine("project", "remove", "api")
    assert contents(root) == before and home.registry().keys == []
    kept = re.search(r"kept as ~(/\S+)", ran.out)
    assert kept and Path(home.path + kept[1]).read_bytes() == file and ran.err == ""
    assert home.run("project", "remove", "api").status == 2
    for name in ("api", "shop/api"):
        ran = home.run("restore", name)
        message = f'orchestra: no codebase is called "{name}"\n  try: ls ~/.orchestra/backups/shop/api\n'
        assert (ran.status, ran.err) == (2, message)
    home.write_registry("shop/api.yaml", "{")
    assert home.run("restore", "api").err.endswith("\n  try: orchestra edit shop/api\n")
    home.file().unlink()
    monkeypatch.chdir(root.parent)  # where the name is a folder's, too
    assert "try: ls ~/.orchestra/backups/shop/api\n" in home.run("restore", "api").err
    assert "orchestra init . -p" in home.run("restore").err


def test_what_is_printed_to_be_typed_survives_a_shell(home: Home) -> None:
    project = "My $(touch PW)'s"
    label, shared = f"{project}/zed", home.projects / project / "project.yaml"
    home.make_codebase(label, {"CLAUDE.md": link_to("README.md")}, targets=None)
    shared.write_text("targets: [claude]\n")
    fixes = [finding["fix"] for finding in json.loads(home.run("doctor", "--json").out)["findings"]]
    hints = [fix.partition("drop its target: ")[2] for fix in fixes]
    shared.write_text("{")
    hints.append(home.run("status").out.partition("\nnext: ")[2])
    shared.write_text("targets: [codex]\n")
    home.sync()
    edit(home.code / label / "AGENTS.md", "# zed", "# mine")
    home.sync()
    home.run_fine("project", "remove", label)
    hints.append(home.run("restore", label).err.partition("try: ")[2])
    hints = [hint for hint in hints if hint]
    assert [hint.split()[0] for hint in hints] == ["edit", "edit", "ls"]
    for hint in hints:
        code = f'edit() {{ test -f "$1"; }}; {hint}'
        subprocess.run(["sh", "-c", code], check=True, cwd=home.folder, env=home.variables())
    assert not (home.folder / "PW").exists()


def test_a_broken_codebase_can_be_removed_but_not_purged(home: Home) -> None:
    home.write_registry("shop/api.yaml", "{")
    assert home.run("project", "remove", "api", "--purge").status == 2
    assert home.run("project", "remove", "api").status == 0
    assert home.registry().keys == []


def test_a_purge_that_cannot_succeed_deregisters_nothing(home: Home) -> None:
    root = home.make_codebase(files={"CLAUDE.md": orchestra.BLOCK_BEGIN})
    before = contents(root)
    ran = home.run("project", "remove", "api", "--purge")
    assert ran.status == 2 and "try: fix that, then purge again; nothing was changed" in ran.err
    assert contents(root) == before and home.registry().keys == [API]


def test_a_codebase_registered_again_after_a_removal_is_current(home: Home) -> None:
    root = home.make_synced()
    home.run_fine("project", "remove", "api")
    home.run_fine("init", str(root), "-p", "shop", "--sync")
    assert home.status_of() == "current" and home.backups().keys() == {"api.yaml"}


def test_two_projects_may_have_a_codebase_of_the_same_name(home: Home) -> None:
    for project in ("blog", "shop"):
        (home.code / project / "api").mkdir(parents=True)
        home.run_fine("init", str(home.code / project / "api"), "-p", project, "--sync")
    assert (home.code / "blog/api/CLAUDE.md").exists() and (home.code / "shop/api/CLAUDE.md").exists()
    edited = edit(home.code / "blog/api/CLAUDE.md", "# api", "# mine")
    for command in (["sync"], ["diff"], ["restore"], ["edit"], ["project", "remove"]):
        ran = home.run(*command, "api")
        assert (ran.status, ran.complaints) == (2, ['orchestra: "api" is in 2 projects: blog/api, shop/api'])
        assert ran.err.splitlines()[1] == f"  try: orchestra {' '.join(command)} blog/api"
    assert home.sync("blog/api").lines == ["replace  blog/api CLAUDE.md"]
    assert home.backups("shop/api") == {} and home.backups("blog/api") == {"CLAUDE.md": edited}
    home.run_fine("project", "remove", "blog/api", "--purge")
    assert contents(home.code / "blog") == {} and home.status_of("shop/api") == "current"
    assert home.sync("api").lines == []


def test_sync_without_a_name_is_for_the_current_folder(home: Home, monkeypatch: Any) -> None:
    root = home.make_codebase("shop/api", {"src/a.py": ""})
    home.make_codebase("shop/web")
    monkeypatch.chdir(root / "src")
    assert home.sync("--dry-run").lines == ["create   shop/api CLAUDE.md", "create   shop/api AGENTS.md"]
    monkeypatch.chdir(home.code)
    ran = home.run("sync")
    assert ran.status == 2 and "orchestra init . -p PROJECT --sync" in ran.err
    home.sync()
    (home.code / "new").mkdir()
    monkeypatch.chdir(root.rename(home.code / "new/api") / "src")
    ran, init = home.run("sync"), "orchestra init . -p PROJECT --sync"
    move = f"orchestra project move shop/api {home.code}/new/api"
    assert (ran.status, ran.err.splitlines()[1:]) == (2, [f"  try: {move} if it is that one; otherwise {init}"])


def test_sync_in_the_folder_of_a_broken_registry_file_says_what_is_broken(home: Home, monkeypatch: Any) -> None:
    root = home.make_codebase("shop/api", notes="none")
    monkeypatch.chdir(root)
    ran = home.run("sync")
    assert ran.status == 2
    assert "api.yaml:3: notes: expected" in ran.complaints[0]
    assert "no readable registry file names this folder" in ran.err


def test_a_folder_that_was_synced_is_known_while_its_registry_file_is_broken(home: Home, monkeypatch: Any) -> None:
    put_files(home.make_synced(), {"src": None})
    home.register(notes="none")
    monkeypatch.chdir(home.code / "shop/api/src")
    home.environ["VISUAL"] = f"{sys.executable} -c \"import sys; open(sys.argv[1], 'a').write('# mine')\""
    for command in ("sync", "edit"):
        ran = home.run(command)
        assert ran.status == 2 and len(ran.complaints) == 1 and "api.yaml:3: notes: expected" in ran.err
    assert home.file().read_text().endswith("# mine")


def test_the_totals_count_codebases_that_failed_as_a_whole(home: Home) -> None:
    home.make_codebase("shop/api", targets=["claude"])
    home.make_codebase("shop/web", notes="none")
    ran = home.run("sync", "--all")
    assert ran.status == 2
    assert ran.out.splitlines()[-1] == "1 written, 0 unchanged, 1 failed in 2 codebases"


def test_a_record_that_cannot_be_read_is_its_own_codebases_error(home: Home) -> None:
    for label in ("shop/api", "shop/web"):
        home.make_codebase(label)
    home.sync()
    home.record.chmod(0)
    ran = home.run_as_nobody("status", "--json")
    assert ran.status == 2
    statuses = {entry["codebase"]: entry["status"] for entry in json.loads(ran.out)["codebases"]}
    assert statuses == {"api": "error", "web": "current"}


def test_sync_in_a_codebase_within_a_codebase_is_for_the_inner(home: Home, monkeypatch: Any) -> None:
    home.make_codebase("shop/whole")
    inner = home.make_codebase("shop/whole/inner")
    os.unlink(orchestra.codebase_path(home.path, ("shop", "whole/inner")))
    home.register("shop/inner", path=str(inner))
    monkeypatch.chdir(inner)
    assert home.sync("--dry-run").lines == ["create   shop/inner CLAUDE.md", "create   shop/inner AGENTS.md"]


def test_a_file_in_place_of_orchestras_folder_is_one_line(home: Home) -> None:
    Path(home.path, ".orchestra").write_text("")
    ran = home.run("init", str(home.code), "-p", "shop")
    assert ran.status == 2 and len(ran.complaints) == 1


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("pass", 0, ""),
        ("raise SystemExit(3)", 2, "the editor exited with status 3"),
        ("import os; os.kill(os.getpid(), 9)", 2, "the editor was killed by signal 9"),
    ],
)
def test_edit_opens_the_editor_and_checks_the_file(home: Home, code: str, status: int, said: str) -> None:
    home.make_codebase()
    editor = home.code / "my editor.py"
    editor.write_text(f"import sys\nopen({str(home.code / 'seen')!r}, 'w').write(sys.argv[-1])\n{code}\n")
    home.environ.update(VISUAL="", EDITOR=f"{sys.executable} '{editor}' --wait")
    ran = home.run("edit", "api")
    assert ran.status == status and said in ran.err
    assert (home.code / "seen").read_text() == orchestra.codebase_path(home.path, API)


def test_edit_tells_what_was_broken(home: Home) -> None:
    home.make_codebase()
    editor = home.code / "editor.py"
    editor.write_text("import sys\nopen(sys.argv[1], 'a').write('tasks: [\\n')\n")
    home.environ["VISUAL"] = f"{sys.executable} {editor}"
    ran = home.run("edit", "api")
    assert ran.status == 2 and re.match(r"orchestra: ~/.*/api.yaml:\d: yaml: ", ran.err)
    assert "[Y/n]" not in ran.err
    home.environ["VISUAL"] = "/no/such/editor"
    assert 'editor "/no/such/editor" not found' in home.run("edit", "api").err
    home.environ["VISUAL"] = "'unclosed"
    assert "a quote is not closed" in home.run("edit", "api").err


def test_what_a_repository_has_cannot_forge_a_message(home: Home) -> None:
    put_files(home.code, {"odd/x\x1b[31m.ipynb": "{}"})
    assert "ml (x\\x1b[31m.ipynb)\n" in home.run_fine("init", str(home.code / "odd"), "-p", "q").out
    root = home.make_codebase(targets=["codex", "cursor"])
    (root / "AGENTS.md").symlink_to("x\x1b[31m\norchestra: forged")
    (root / ".cursor").symlink_to("/nowhere\norchestra: forged")
    ran = home.run("sync", "--all")
    assert "\x1b" not in ran.err
    assert not any(line.startswith("orchestra: forged") for line in ran.err.splitlines())
    assert r"it is a symbolic link to x\x1b[31m\norchestra: forged" in ran.err


# On a terminal

SHOW = "import sys; print('PAGED', sys.stdin.read().replace('\x1b', 'ESC'))"


def test_a_diff_is_painted_and_paged_on_a_terminal(home: Home) -> None:
    home.make_codebase(files={CLINE: "old \x1b[2J\n"}, targets=["cline"])
    pager = f"{sys.executable} -c {shlex.quote(SHOW)}"
    for argv, environ, shown in (
        ([], {"PAGER": pager}, "PAGED ESC[1m--- a/.clinerules/orchestra.mdESC[0m\r\n"),
        ([], {"PAGER": pager}, "ESC[31m-old \\x1b[2JESC[0m\r\n"),
        ([], {"PAGER": pager, "NO_COLOR": "1"}, "\r\n-old \\x1b[2J\r\n"),
        ([], {"PAGER": pager, "TERM": "dumb"}, "--- a/.clinerules/orchestra.md\r\n"),
        ([], {"PAGER": pager, "TERM": None}, "--- a/.clinerules/orchestra.md\x1b[0m\r\n"),
        (["--no-pager"], {"PAGER": pager}, "\x1b[31m-old \\x1b[2J\x1b[0m\r\n"),
        ([], {"PAGER": "cat"}, "\x1b[31m-old"),
        ([], {"PAGER": "/no/such/pager -x"}, "\x1b[31m-old"),
        ([], {"PAGER": "'"}, "\x1b[31m-old"),
        ([], {"PAGER": "true"}, ""),  # a pager that reads nothing
        ([], {"PAGER": "false"}, "\x1b[31m-old"),
        ([], {"PAGER": f"{pager[:-1]}; sys.exit(1)'"}, "PAGED ESC[1m"),
    ):
        tty = Tty(home, home.command("diff", "api", *argv), **environ)
        status, out = tty.finish()
        assert status == 0 and shown in out and "Traceback" not in out, (environ, out)
        assert ("PAGED" in out) == (shown.startswith("PAGED") or "ESC" in shown or "NO_COLOR" in environ)
    assert "\x1b[" not in home.run_script("diff", "api").out


def test_ctrl_c_is_the_editors_own_and_ends_a_question(home: Home) -> None:
    home.make_codebase()
    (home.code / "editor.py").write_text(
        "import signal, sys\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\nprint('EDITING', flush=True)\n"
        "signal.sigwait([signal.SIGINT])\nopen(sys.argv[1], 'a').write('x: [')\n"
    )
    tty = Tty(home, home.command("edit", "api"), VISUAL=f"{sys.executable} {home.code}/editor.py")
    tty.type("\x03", after="EDITING")
    tty.wait_for("open it again? [Y/n] ")
    wait_until(lambda: not IS_LINUX or "S (sleeping)" in Path(f"/proc/{tty.process.pid}/status").read_text())
    tty.type("\x03")  # not before its read(2): Python would not see the signal there
    status, shown = tty.finish()
    assert status == 130 and shown.endswith("\r\n") and home.file().read_text().endswith("x: [")


def test_edit_offers_to_open_a_broken_file_again(home: Home) -> None:
    home.make_codebase()
    good = home.file().read_text()
    (home.code / "editor.py").write_text(
        f"import os, sys\nnew = {good!r} if os.path.exists('/{home.code}/seen') else 'tasks: ['\n"
        f"open(sys.argv[1], 'w').write(new)\nopen('/{home.code}/seen', 'w')\n"
    )
    environ = {"VISUAL": f"{sys.executable} {home.code}/editor.py"}
    tty = Tty(home, home.command("edit", "api"), **environ)
    tty.type("\r", after="open it again? [Y/n] ")
    assert tty.finish() == (0, "\r\nok shop/api\r\n")
    home.file().write_text("x: [")
    os.unlink(home.code / "seen")
    tty = Tty(home, home.command("edit", "api"), **environ)
    tty.type("n\r", after="open it again? [Y/n] ")
    assert tty.finish()[0] == 2


@pytest.mark.parametrize(
    ("argv", "answer", "status", "said"),
    [
        ([], "y", 0, "remove   shop/api"),
        ([], "n", 2, "orchestra: nothing was changed"),
        ([], "", 2, "orchestra: nothing was changed"),
        (["-y"], None, 0, "remove   shop/api"),
    ],
)
def test_a_purge_asks_on_a_terminal(home: Home, argv: list[str], answer: Any, status: int, said: str) -> None:
    root = home.make_synced(targets=["cline"])
    tty = Tty(home, home.command("project", "remove", "api", "--purge", *argv))
    if answer is not None:
        question = f"remove shop/api from the registry, and Orchestra's text from 1 file in {root}? [y/N] "
        tty.type(f"{answer}\r", after=question)
    found, shown = tty.finish()
    assert (found, said in shown) == (status, True), shown
    assert (home.registry().keys == [API], (root / CLINE).exists()) == (status == 2, status == 2)


def test_a_removal_says_what_it_leaves_and_how_to_undo_it(home: Home) -> None:
    root = home.make_synced()
    more = {"shop/api.md": "of api", "shop/api.local.yaml": "notes: [mine]", "shop/api.local.md": "of my api"}
    put_files(home.projects, {**more, "shop/project.md": "of shop"})
    home.sync()
    before, registry = contents(root), contents(home.projects)
    first, left, undo = home.run_fine("project", "remove", "api").out.splitlines()
    assert first.startswith("removed shop/api from the registry; its YAML is kept as ~/.orchestra/backups/shop/api/")
    assert left.startswith("  left in its folder: AGENTS.md, CLAUDE.md (")
    assert [path.name for path in home.projects.glob("*/*")] == ["project.md"]
    assert undo.startswith("  undo: cp ~/.orchestra/backups/shop/api/") and undo.endswith(" ~/.orchestra/projects/shop")
    subprocess.run(undo.partition("undo: ")[2], shell=True, check=True, env={**os.environ, "HOME": home.path})
    assert home.status_of() == "current" and (contents(root), contents(home.projects)) == (before, registry)


def test_a_file_of_this_folder_is_restored_by_its_name_alone(home: Home, monkeypatch: Any) -> None:
    root = home.make_synced(targets=["claude"])
    edited = edit(root / "CLAUDE.md", "noted", "mine")
    home.sync()
    monkeypatch.chdir(root)
    assert home.run_fine("restore", "CLAUDE.md", "--at", "today").out.startswith("restored shop/api CLAUDE.md (")
    assert (root / "CLAUDE.md").read_bytes() == edited
    assert "--at: expected a time, got ''" in home.run("restore", "--at", "").err
    ran = home.run("restore", "--at", "3 days ago")
    assert ran.status == 2 and "no backup of any instruction file at 3 days ago; times look like 20" in ran.err


# ── 42 Command line ───────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ZeroDivisionError(), "ZeroDivisionError"),  # a bug keeps its traceback, and is not taken for out of date
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/place"),
            "\\Aorchestra: /a/place: permission denied\n\\Z",
        ),
    ],
)
def test_an_error_that_nobody_caught_is_exit_status_2(home: Home, monkeypatch: Any, error: Any, said: str) -> None:
    monkeypatch.setattr(orchestra, "load_registry", refuse(error))
    ran = home.run("sync", "--all", "--check")
    assert ran.status == 2 and re.search(said, ran.err)
    assert ("Traceback" in ran.err) == isinstance(error, ZeroDivisionError)


@pytest.mark.parametrize("environ", [{}, {"HOME": ""}, {"HOME": "relative/home"}])
def test_a_home_that_is_no_absolute_path_is_refused_in_one_line(home: Home, environ: dict[str, str]) -> None:
    home.environ = environ
    ran = home.run("status")
    assert ran.status == 2 and ran.complaints[0].startswith("orchestra: HOME: expected an absolute path, got ")


def test_the_script_runs_by_itself(home: Home) -> None:
    (home.code / "api").mkdir()
    ran = home.run_script("init", ".", "-p", "shop", "--sync", cwd=home.code / "api")
    assert (ran.status, ran.err) == (0, "")
    assert home.run_script("sync", cwd=home.code / "api").out == "0 written, 2 unchanged in 1 codebase\n"
    assert home.run_script("sync", "--check", "--all").status == 0
    home.register("shop/api", path=str(home.code / "api"), notes=["new"])
    assert home.run_script("sync", "--check", "--all").status == 1
    assert home.run_script("status", "--check").status == 1
    assert home.run_script("diff", "api", "--exit-code").status == 1
    assert home.run_script("sync", "nope").status == 2


@pytest.mark.parametrize("argv", [["project", "list"], ["status", "--json"], ["diff", "c0"]])
def test_a_reader_that_has_gone_is_no_traceback(home: Home, argv: list[str]) -> None:
    for i in range(30):
        home.make_codebase(f"shop/c{i}", notes=["long " * 2000])
    reader, writer = os.pipe()
    os.close(reader)
    process = home.start(*argv, stdout=writer)
    os.close(writer)
    assert finish(process).err == ""


def run_in_shell(home: Home, command: str, *argv: str, **environ: Optional[str]) -> Ran:
    """Run a shell command whose first words are Python and the script."""
    return finish(home.launch(["/bin/sh", "-c", command, *home.command(*argv)], environ, cwd=home.code))


needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@needs_dev_full
@pytest.mark.parametrize("argv", ["project list", "--help", "--version"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
def test_an_output_that_takes_nothing_is_no_traceback(home: Home, redirection: str, unbuffered: str, argv: str) -> None:
    home.make_codebase()
    ran = run_in_shell(home, f'exec "$0" "$1" {argv} {redirection}', PYTHONUNBUFFERED=unbuffered)
    assert "Traceback" not in ran.err
    assert (ran.status, ran.err.count("\n")) == ((2, 1) if "full" in redirection else (0, 0))


@pytest.mark.parametrize(
    ("argv", "status"), [("project remove api --purge", 0), ("status --watch", 2), ("edit api", 2), ("daemon stop", 0)]
)
def test_a_closed_input_is_an_empty_one(home: Home, argv: str, status: int) -> None:
    home.make_codebase()
    (home.code / "editor.py").write_text("import sys\nopen(sys.argv[1], 'a').write('x: [')\n")
    ran = run_in_shell(home, f'exec "$0" "$1" {argv} <&-', VISUAL=f"{sys.executable} {home.code}/editor.py")
    assert (ran.status, "Traceback" in ran.err) == (status, False)


@needs_dev_full
def test_errors_that_nobody_takes_still_show_in_the_exit_status(home: Home) -> None:
    assert run_in_shell(home, 'exec "$0" "$1" sync nope 2>/dev/full').status == 2


def test_an_output_that_cannot_spell_it_is_no_traceback(home: Home) -> None:
    home.make_codebase("shop/api", description="日本")
    assert "Traceback" not in home.run_script("diff", "api", environ={"PYTHONIOENCODING": "ascii"}).err


@pytest.mark.parametrize("argv", [["sync"], ["init", ".", "-p", "shop"], ["project", "add", "x"]])
def test_a_current_folder_that_is_gone_is_one_line(home: Home, argv: list[str]) -> None:
    ran = run_in_shell(home, 'mkdir gone && cd gone && rmdir ../gone && exec "$0" "$@"', *argv)
    assert (ran.status, ran.err.splitlines()[-1][:11]) == (2, "orchestra: ") and "Traceback" not in ran.err


# Whose home it is

ME = os.geteuid()
OTHER = NOBODY if ME == 0 else ME  # who may own a file here


@pytest.mark.parametrize("what", [".", ".orchestra", "link", "not/there"])
def test_root_keeps_out_of_another_users_home(machine: Machine, what: str) -> None:
    home = machine.home
    (home / ".orchestra").mkdir()
    orchestra.check_owner(machine.path, ME)
    if what == "link":
        home = machine.folder / "link"
        home.symlink_to(machine.home)
    elif what == "not/there":
        home /= what
    os.chown(machine.home / ".orchestra" if what == ".orchestra" else machine.home, OTHER, -1)
    name = "~/.orchestra" if what == ".orchestra" and ME == 0 else "HOME"
    owner, root = orchestra.user_name(OTHER), orchestra.user_name(0)
    with pytest.raises(orchestra.UsageError, match=rf"^{name} belongs to user {owner}, and this is {root}: ") as caught:
        orchestra.check_owner(str(home), 0)
    assert caught.value.hint == f"run it as {owner}, or set HOME"


def test_a_user_needs_no_home_of_his_own_but_one_he_can_write_to(machine: Machine) -> None:
    (machine.home / ".orchestra").mkdir()
    for home in (machine.path, f"{machine.path}/none"):
        orchestra.check_owner(home, 12345)  # whom the system lets write there, for this process may
    assert orchestra.user_name(4_000_000_000) == "4000000000"
    for path, name, way_out in (
        (machine.home / ".orchestra", "~/.orchestra", f"sudo chown -R 12345 {machine.path}/.orchestra"),
        (machine.home, "HOME", f"run it as {orchestra.user_name(ME)}, or set HOME"),
    ):
        path.chmod(0o555)
        if ME:
            with pytest.raises(orchestra.UsageError, match=f"^{name} belongs to user .*, and this is 12345: ") as error:
                orchestra.check_owner(machine.path, 12345)
            assert error.value.hint == way_out
        path.chmod(0o700)


@pytest.mark.skipif(ME != 0, reason="needs root")
def test_root_writes_nothing_into_another_users_home(machine: Machine) -> None:
    os.chown(machine.home, NOBODY, NOBODY)
    for argv in (["status"], ["init", machine.code, "-p", "demo"], ["daemon", "start"], ["self-install"]):
        done = machine.run_program(sys.executable, SCRIPT, *argv)
        assert done.returncode == 2
        assert re.match(r"orchestra: HOME belongs to user .*, and this is root.*\n.*\n\Z", done.stderr), done
    for word in ("--version", "--help"):
        machine.run_well(sys.executable, SCRIPT, word)
    for argv in ([], ["--uninstall"]):
        assert_refused(machine.install("sh", *argv), "belongs to another user")
    assert machine.listing() == {}


AS_NOBODY: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []}


def python_for_nobody() -> str:
    """Find a Python that another user may run."""
    for python in (BASE_PYTHON, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            argv = [python, "-I", "-c", "import sys; sys.exit(sys.version_info < (3, 9))"]
            if subprocess.call(argv, user=NOBODY) == 0:
                return python
        except OSError:
            pass
    pytest.skip("no Python here that another user may run")


@pytest.mark.skipif(ME != 0, reason="needs root")
def test_a_user_who_cannot_write_to_another_users_home_is_told_so(machine: Machine) -> None:
    python = python_for_nobody()
    machine.folder.chmod(0o755)
    put_files(machine.folder, {"orchestra.py": ORCHESTRA_PY})
    put_files(machine.home, {".orchestra": None})
    for owner, way_out in ((0, "run it as root, or set HOME"), (NOBODY, "sudo chown -R ")):
        os.chown(machine.home, owner, -1)
        done = machine.run_program(python, machine.folder / "orchestra.py", "daemon", "logs", **AS_NOBODY)
        assert done.returncode == 2 and way_out in done.stderr, done
        assert "belongs to user root, and this is " in done.stderr


# ── Every step interrupted ────────────────────────────────────────────────────

# A command runs again and again in a child process: killed after its first operation
# on the disk, then after its second, and so on until a child survives; then with each
# of the operations failing instead. strace shows that the rig misses no operation.

# The rig: what happens to a child, or beside it, at a chosen instant


def kill_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


RENAMES = ("rename", "replace", "link", "unlink", "swap_files", "rename_exclusively")
DISK_CALLS = (
    *RENAMES,
    *("open", "write", "pwrite", "ftruncate", "fchmod", "fchown", "fsync", "remove", "symlink", "mkdir", "rmdir"),
    *("chmod", "chown", "truncate", "utime", "setxattr"),
)
FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Call(NamedTuple):
    """A call of a function of `os`, or of orchestra."""

    name: str
    real: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def kind(self) -> str:
        return "read" if self.name == "open" and not self.args[1] & FOR_WRITING else self.name

    @property
    def paths(self) -> list[str]:
        """The absolute paths that the call is about."""
        names, folders = self.args[:1], [self.options.get("dir_fd")]
        if self.name in ("swap_files", "rename_exclusively"):
            names, folders = self.args[1:], [self.args[0]] * 2
        elif isinstance(names[0], int):
            return [path_of(names[0])]
        elif self.name in ("rename", "replace", "link", "symlink"):
            names, folders = self.args, [self.options.get("src_dir_fd"), self.options.get("dst_dir_fd", folders[0])]
        return [os.path.join(path_of(folder), name) for folder, name in zip(folders, names)]


def path_of(fd: Optional[int]) -> str:
    """Return the path of an open file or folder; "" for none."""
    if fd is None or fd < 0:
        return ""
    if IS_LINUX:
        return os.readlink(f"/proc/self/fd/{fd}")
    return os.fsdecode(fcntl.fcntl(fd, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))


@contextmanager
def watching(
    names: Iterable[str], before: Callable[[Call], object] = bool, after: Callable[[Call], object] = bool
) -> Iterator[None]:
    """Call `before` and `after` around each call of these functions, not their own."""
    is_acting = False

    def act(what: Callable[[Call], object], call: Call) -> None:
        nonlocal is_acting
        is_acting = True
        try:
            what(call)
        finally:
            is_acting = False

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*args: Any, **options: Any) -> Any:
            if is_acting:
                return real(*args, **options)
            call = Call(name, real, args, options)
            act(before, call)
            try:
                # What is written outlives a killed process without a slow fsync.
                return None if name == "fsync" else real(*args, **options)
            finally:
                act(after, call)

        return stand_in

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            module = os if hasattr(os, name) else orchestra
            if hasattr(module, name):  # a Mac has no setxattr
                patch.setattr(module, name, wrap(name, getattr(module, name)))
        yield


Acts = Iterable[Callable[[], object]]


@contextmanager
def instants(place: Path, before: Acts = (), after: Acts = ()) -> Iterator[list[Call]]:
    """Act before and after each replacing of a file at or below a place.

    Each of the acts must happen, once and in turn, unless they are an iterator; placing
    and removing count as replacing.
    """
    calls: list[Call] = []
    acts_before, acts_after = iter(before), iter(after)

    def is_there(call: Call) -> bool:
        return any(f"{path}/".startswith(f"{place}/") for path in call.paths)

    def enter(call: Call) -> None:
        if is_there(call):
            calls.append(call)
            next(acts_before, int)()

    def leave(call: Call) -> None:
        if is_there(call):
            next(acts_after, int)()

    with watching(RENAMES, enter, leave):
        yield calls
    for acts, left in ((before, acts_before), (after, acts_after)):
        assert isinstance(acts, Iterator) or not list(left), "an instant never came"


class Fault(NamedTuple):
    """An error at operation number `at`, counted from 1, or else a kill."""

    at: int = 0
    error: int = 0
    sticky: bool = False  # all operations from then on fail
    half: bool = False  # the last write reaches the disk only in part
    early: bool = False  # the last operation is not carried out

    def counts(self, call: Call) -> bool:
        return call.name == "open" if self.error == errno.EMFILE else call.kind != "read"


NO_FAULT = Fault()


class Outcome(NamedTuple):
    """What a child returned and did, and what failed; nothing if it was killed."""

    ran: Any
    done: Sequence[tuple[str, str]] = ()
    hit: tuple[str, str] = ("", "")


def run_with_fault(work: Callable[[], Any], fault: Fault = NO_FAULT) -> Outcome:
    """Do `work` in a child, counting its operations on the disk."""
    done: list[tuple[str, str]] = []

    def enter(call: Call) -> None:
        if not fault.counts(call):
            return
        done.append((call.kind, call.paths[-1]))
        is_due = len(done) == fault.at or (fault.sticky and len(done) > fault.at)
        if is_due and fault.error:
            path = [] if isinstance(call.args[0], int) else [call.paths[-1]]
            raise OSError(fault.error, os.strerror(fault.error), *path)
        if is_due and fault.half and call.name in ("write", "pwrite"):
            call.real(call.args[0], bytes(call.args[1])[: len(call.args[1]) // 2], *call.args[2:])
        if is_due and (fault.half or fault.early):
            kill_now()

    def leave(call: Call) -> None:
        if fault.counts(call) and len(done) == fault.at and not fault.error:
            kill_now()

    def work_watched() -> Any:
        with watching(DISK_CALLS, enter, leave):
            result = work()
        return result, done, done[fault.at - 1] if 0 < fault.at <= len(done) else ("", "")

    report = run_in_child(work_watched)
    if report == KILLED:
        return Outcome(None)
    result, operations, hit = report
    return Outcome(result, [(name, path) for name, path in operations], tuple(hit))


# What stands on the disk


def is_temporary(path: str) -> bool:
    return bool(re.fullmatch(r"\.orchestra-.*\.tmp", os.path.basename(path)))


def is_kept_version(path: str) -> bool:
    """Tell a backup from a file set aside for a minute, as on a Mac."""
    return not any(part.startswith((".orchestra", ".aside")) for part in path.split("/"))


class Picture(NamedTuple):
    """All that matters of a home folder at one moment."""

    files: dict[str, Seen]  # of the codebases and the registry, without dates
    backups: list[tuple[str, bytes]]

    @classmethod
    def of(cls, home: Home) -> Picture:
        found = {f"code/{path}": seen for path, seen in take_picture(home.code).items()}
        for path, seen in take_picture(home.projects).items():
            found[path] = seen._replace(data=re.sub(rb"(?m)^(created|updated)_at: .*$", b"", seen.data))
        backups = contents(Path(orchestra.backups_root(home.path)))
        kept = sorted((path.split("/", 3)[3], data) for path, data in backups.items() if is_kept_version(path))
        return cls(without_age(found), kept)


# What is interrupted


class Scenario(NamedTuple):
    """A command to interrupt.

    `words` are the user's, each with the file it has to stay in, or "" for any file
    or backup.
    """

    prepare: Callable[[Home], object]
    command: str
    words: dict[str, str]
    edited: tuple[str, ...] = ()  # the files that a sync may call edited by hand
    mend: Callable[[Home], object] = lambda home: None  # what a user does after an interruption
    stays_synced: bool = True  # a sync after the command has nothing to do


WEB_FILES = {"pages/CLAUDE.md": "dipper\n", "docs/MINE.md": "siskin\n", "old/x": "", "new/x": ""}


def web_with(word: str) -> dict[str, Any]:
    """Return what a codebase with custom targets and parts says, one of each gone or new."""
    custom = {"mine": {"path": "docs/MINE.md", "owns": "block"}, word: {"path": f".x/{word}.md"}}
    parts = [
        {"name": "pages", "project_type": "ml", "path": "pages", "notes": [word]},
        {"name": "part", "project_type": "ml", "path": word, "notes": [word]},
    ]
    return {"targets": ["claude", "cline", *custom], "custom_targets": custom, "projects": parts}


def edit_everything(home: Home) -> None:
    """Leave one of everything for a sync to do, between two plain updates."""
    kept = [target for target in ALL_TARGETS if target not in ("windsurf", "cline")]
    root = home.make_codebase("shop/api", {"AGENTS.md": "osprey\n", COPILOT: "kite\n"}, targets=ALL_TARGETS)
    home.write_registry("shop/project.yaml", {"name": "shop"})
    home.make_codebase("shop/aaa", {"CLAUDE.md": "finch\n"}, targets=["claude"])
    home.make_synced("shop/web", {"CLAUDE.md": "wren\n", **WEB_FILES}, **web_with("old"))
    edit(home.code / "shop/web/docs/MINE.md", "noted", "nuthatch")
    (root / "CLAUDE.md").write_text("kestrel\n")
    (root / "CLAUDE.md").chmod(0o640)
    (root / "AGENTS.md").write_bytes((root / "AGENTS.md").read_bytes().replace(END, b"merlin\n" + END))
    (root / "GEMINI.md").unlink()
    (root / "GEMINI.md").symlink_to("AGENTS.md")
    for name, word in ((COPILOT, "buzzard"), (CURSOR, "harrier"), (CLINE, "goshawk")):
        (root / name).write_bytes((root / name).read_bytes() + f"\n{word}\n".encode())
    shutil.rmtree(root / ".agents")
    file = home.register("shop/api", targets=kept, notes=["new"])
    file.write_text(file.read_text() + "# comment: dunlin\n")
    home.register("shop/aaa", targets=["claude"], notes=["new"])
    home.register("shop/web", **web_with("new"), notes=["new"])


def say_nothing_more(home: Home) -> None:
    """Leave two blocks that have nothing to say any more, one of them edited."""
    files = {"CLAUDE.md": "kestrel\n", "AGENTS.md": "osprey"}
    root = home.make_synced("shop/api", files, targets=["claude", "codex"])
    edit(root / "AGENTS.md", "- noted", "- merlin")
    home.register("shop/api", targets=["claude", "codex"], notes=[])


def sync_everything(home: Home) -> None:
    edit_everything(home)
    home.sync()


def crowd_backups(home: Home) -> None:
    """Leave an edit to be kept, which pushes two kept versions out."""
    root = home.make_synced("shop/api", targets=["claude"])
    edit(root / "CLAUDE.md", "# api", "# merlin")
    for minute, word in itertools.zip_longest(MINUTES[:12], ["harrier"], fillvalue=""):
        put_files(backups_folder(home) / minute, {"CLAUDE.md": minute + word, orchestra.Backups.NOTES: "{}"})


def write_layers(home: Home) -> None:
    """Register a codebase with all the files of the registry that can be its own."""
    home.make_codebase("shop/api", targets=["claude"])
    more = {
        "project.yaml": "name: shop\n",
        "api.md": "dunlin\n",
        "api.local.yaml": "notes: [plover]\n",
        "api.local.md": "redshank\n",
    }
    put_files(home.projects / "shop", more)
    home.sync()


def make_new_folder(home: Home) -> None:
    put_files(home.code / "shop/api", {"CLAUDE.md": "kestrel\n", ".cursor/rules/mine.mdc": "osprey\n"})


def register_with(home: Home, text: str) -> None:
    root = home.code / "shop/api"
    root.mkdir(parents=True)
    home.write_registry("shop/api.yaml", text.format(root=root))


def register_again(home: Home) -> None:
    if API not in home.registry().codebases:
        home.run_fine("init", str(home.code / "shop/api"), "-p", "shop")


EDITED_WORDS = {
    "finch": "aaa/CLAUDE.md",
    "wren": "web/CLAUDE.md",
    "dipper": "web/pages/CLAUDE.md",
    "siskin": "web/docs/MINE.md",
    "kestrel": "api/CLAUDE.md",
    "osprey": "api/AGENTS.md",
    **dict.fromkeys(("kite", "buzzard"), f"api/{COPILOT}"),
    "goshawk": f"api/{CLINE}",
    **dict.fromkeys(("merlin", "harrier", "dunlin", "nuthatch"), ""),
}
EDITED_FILES = ("AGENTS.md", CURSOR)
NEW_WORDS = {"kestrel": "api/CLAUDE.md", "osprey": "api/.cursor/rules/mine.mdc"}
REGISTRY_WORDS = dict.fromkeys(("dunlin", "redshank", "plover"), "")
RETYPED: Any = {"command": "init {root} -p shop -t mobile", "words": REGISTRY_WORDS, "stays_synced": False}
USER_YAML = (
    "# comment: dunlin\nname: api\npath: {root}\ntargets: [claude]\nnotes:\n- x # comment: redshank\nmine: plover\n"
)
FLOW_YAML = "# comment: dunlin\n{{name: api, path: {root}, targets: [claude], # comment: redshank\n mine: plover}}\n"
SCENARIOS = {
    "sync": Scenario(edit_everything, "sync --all", EDITED_WORDS, EDITED_FILES),
    "nothing to add": Scenario(
        say_nothing_more,
        "sync --all",
        {"kestrel": "api/CLAUDE.md", "osprey": "api/AGENTS.md", "merlin": ""},
        ("AGENTS.md",),
    ),
    "init": Scenario(make_new_folder, "init {root} -p shop --sync", NEW_WORDS),
    "purge": Scenario(
        edit_everything, "project remove shop/api --purge", EDITED_WORDS, EDITED_FILES, register_again, False
    ),
    "remove": Scenario(write_layers, "project remove shop/api", REGISTRY_WORDS, (), register_again, False),
    "crowded backups": Scenario(crowd_backups, "sync --all", {"merlin": "", "harrier": ""}, ("CLAUDE.md",)),
    # By its time: what the interrupted restore put away may be the newest by now.
    "restore": Scenario(
        sync_everything, "restore shop/api AGENTS.md --at {oldest}", EDITED_WORDS, EDITED_FILES, stays_synced=False
    ),
    "registry": Scenario(functools.partial(register_with, text=USER_YAML), **RETYPED),
    "registry afresh": Scenario(functools.partial(register_with, text=FLOW_YAML), **RETYPED),
}


class Stage:
    """A home folder in which a scenario can be played any number of times."""

    def __init__(self, home: Home, scenario: Scenario) -> None:
        self.home, self.scenario = home, scenario
        self.kept = home.folder / "kept"
        scenario.prepare(home)
        age_records(home)
        for name in ("home", "code"):
            shutil.copytree(home.folder / name, self.kept / name, symlinks=True)
        oldest = [kept.when for kept in orchestra.Backups(home.path, API).versions() if kept.path == "AGENTS.md"]
        self.argv = scenario.command.format(root=home.code / "shop/api", oldest=(*oldest, "")[0]).split()
        self.before = Picture.of(home)
        done = self.play()
        assert done.ran.status == 0, done.ran
        self.operations = done.done
        self.after = Picture.of(home)

    def set(self) -> None:
        """Put everything back to where it was before the command."""
        for name in ("home", "code"):
            shutil.rmtree(self.home.folder / name)
            shutil.copytree(self.kept / name, self.home.folder / name, symlinks=True)

    def play(self, fault: Fault = NO_FAULT, file_size: int = 0) -> Outcome:
        """Run the command from the beginning, with a fault or a limit on file sizes."""
        self.set()
        return self.run(fault, file_size)

    def run(self, fault: Fault = NO_FAULT, file_size: int = 0) -> Outcome:
        def work() -> Ran:
            if file_size:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
            return self.home.run(*self.argv)

        outcome = run_with_fault(work, fault)
        return outcome if outcome.ran is None else outcome._replace(ran=Ran(*outcome.ran))

    def play_all(self, faults: Iterable[Fault]) -> int:
        """Play with each fault until one has no effect; return how many had one."""
        count = 0
        for fault in faults:
            operations = [*self.operations, ("nothing", "")]
            with blamed_on(f"{fault}, {operations[min(fault.at, len(operations)) - 1]}"):
                outcome = self.play(fault)
                if outcome.ran is not None:
                    if not any(outcome.hit):
                        break
                    self.check_report(outcome)
                is_messy = outcome.ran is not None and not IS_LINUX
                self.check_disk(has_rubbish=is_messy or outcome.hit[0] in ("rmdir", "read"))
            count += 1
        return count

    def check_report(self, outcome: Outcome) -> None:
        """Check that a failure is reported with its place, and all the rest is done."""
        ran = outcome.ran
        assert "Traceback" not in ran.err, ran.err
        assert ran.status in (0, 2), ran
        now, after = without_rubbish(Picture.of(self.home).files), without_rubbish(self.after.files)
        if ran.status == 0:
            assert self.is_harmless(*outcome.hit), outcome.hit
            assert now == after
            return
        assert ran.complaints
        for line in ran.complaints:
            assert "shop/" in line or self.home.path in line or "~/.orchestra" in line, line
        # All inherit from project.yaml.
        named = {label for label in LABELS if label in ran.err or "shop/project.yaml:" in ran.err}
        if self.argv[0] == "sync":
            assert named
            for label in LABELS - named:
                files, wanted = (
                    {p: f for p, f in picture.items() if f"code/{label}/" in p} for picture in (now, after)
                )
                assert files == wanted, (label, ran)

    def is_harmless(self, name: str, path: str) -> bool:
        """Return whether an operation may fail unreported: the work is done without it.

        Where link() fails, rename() takes its place. A folder to create may exist. What
        could not be read at first is read again. An empty folder may stay, and a
        temporary file whose text is in its place. What YAML files say is parsed again.
        """
        is_cache = "/run/parsed." in path or os.path.dirname(path) == orchestra.run_dir(self.home.path)
        is_there = self.before.files.get(os.path.relpath(path, self.home.folder), Seen("")).kind == "folder"
        is_spare = (name in ("unlink", "remove") and is_temporary(path)) or "/.aside" in path
        return name in ("link", "read", "rmdir") or (name == "mkdir" and is_there) or is_spare or is_cache

    def check_disk(self, has_rubbish: bool = False) -> None:
        """Check that nothing is lost, and that the same command finishes its work."""
        self.check_nothing_lost()
        self.scenario.mend(self.home)
        if self.argv[0] == "sync":
            self.sync()
        else:
            self.home.run_fine(*self.argv)
        self.check_finished(has_rubbish)

    def check_nothing_lost(self) -> None:
        """Check that files are old or new, and no word of the user's is lost.

        A folder of Orchestra's may be gone until the file that was to be new there is written.
        """
        now = Picture.of(self.home)
        old, new, found = (picture.files for picture in (self.before, self.after, now))
        for path in {*old, *new, *found}:
            is_spare = path not in found and old.get(path, Seen("")).kind == "folder"
            assert is_temporary(path) or is_spare or found.get(path) in (old.get(path), new.get(path)), path
        texts = [seen.data for path, seen in found.items() if not is_temporary(path)]
        anywhere = b"\n".join([*texts, *(data for _, data in now.backups)])
        for word, name in self.scenario.words.items():
            assert word.encode() in (found[f"code/shop/{name}"].data if name else anywhere), (word, name)
        if self.argv[0] != "sync":  # where the recovery sees it too
            self.sync(dry_run=True)

    def check_finished(self, has_rubbish: bool) -> None:
        """Check that the disk is as if nothing had happened.

        `has_rubbish` allows empty folders and, where writers are unknown, what stays
        for a minute.
        """
        now = Picture.of(self.home)
        tidy = without_rubbish if has_rubbish else dict
        assert tidy(now.files) == tidy(self.after.files)
        # A codebase that is registered and removed again leaves another file.
        kept, wanted = ([file for file in picture.backups if file[0] != "api.yaml"] for picture in (now, self.after))
        assert kept == wanted
        for folder in Path(orchestra.backups_root(self.home.path)).glob("*/*/*"):
            assert list(filter(is_kept_version, contents(folder))), f"{folder} is empty"
        assert self.sync() == [] or not self.scenario.stays_synced
        if IS_LINUX or not has_rubbish:
            everything = {**take_picture(self.home.path), **take_picture(self.home.code)}
            assert list(filter(is_temporary, everything)) == []
        for path in filter(Path.is_file, Path(orchestra.run_dir(self.home.path)).rglob("*")):
            fd = orchestra.try_lock(str(path))
            assert fd is not None
            os.close(fd)
            # The registry's may name a killed turn until the next writer reads it.
            assert path.parent.name == "run" or path.read_bytes() == b""

    def sync(self, dry_run: bool = False) -> list[str]:
        """Sync all, and check that there are neither errors nor false hand edits."""
        results = orchestra.run_pipeline(self.home.path, orchestra.SyncScope.all(), orchestra.SyncMode(dry_run))
        for result in results:
            assert result.errors == ()
            edited = {file.path for file in result.files if file.action in orchestra.Action.BACKED_UP}
            allowed = {"api": self.scenario.edited, "web": ("docs/MINE.md",)}.get(result.codebase, ())
            assert edited <= {*allowed}, result
        return [path for result in results for path in result.written]


def age_records(home: Home) -> None:
    """Date what was written last back: within one second there is one write more."""
    for file in Path(orchestra.hashes_root(home.path)).glob("*/*.json"):
        values = json.loads(file.read_bytes())
        file.write_text(json.dumps({**values, "synced_at": "2026-03-01T00:00:00Z"}))


LABELS = frozenset({"shop/aaa", "shop/api", "shop/web"})


def without_rubbish(files: dict[str, Seen]) -> dict[str, Seen]:
    """Leave out temporary files and empty folders, which a failing clean-up leaves."""
    return {path: seen for path, seen in files.items() if seen.kind != "folder" and not is_temporary(path)}


@contextmanager
def blamed_on(what: str) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error


@pytest.fixture
def quick_home() -> Iterator[Home]:
    """Make a home in memory if possible: it is filled and emptied a thousand times."""
    folder = tempfile.mkdtemp(prefix="orc", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp")
    yield Home(folder)
    shutil.rmtree(folder)


@pytest.fixture
def stage(request: Any, quick_home: Home) -> Stage:
    return Stage(quick_home, SCENARIOS[getattr(request, "param", "sync")])


every_scenario = pytest.mark.parametrize("stage", SCENARIOS, indirect=True)


# Killed


@every_scenario
def test_a_kill_after_any_operation_loses_nothing_and_the_next_run_finishes(stage: Stage) -> None:
    assert stage.play_all(map(Fault, itertools.count(1))) == len(stage.operations)


@every_scenario
def test_a_kill_in_the_middle_of_any_write_loses_nothing(stage: Stage) -> None:
    writes = [number for number, (name, _) in enumerate(stage.operations, 1) if name in ("write", "pwrite")]
    assert stage.play_all(Fault(number, half=True) for number in writes) == len(writes) > 0


def test_a_version_is_durable_before_its_file_is_replaced(quick_home: Home) -> None:
    root = quick_home.make_synced("shop/api", targets=["claude"])
    edit(root / "CLAUDE.md", "# api", "# merlin")
    done = run_with_fault(lambda: quick_home.sync()).done
    backups = orchestra.backups_root(quick_home.path)
    steps = [
        (name, re.sub(r"/\.orchestra-[^/]*\.tmp", "/TMP", place).replace(backups, "~"))
        for name, place in done
        if place.startswith((orchestra.orchestra_root(quick_home.path), str(root)))
    ]
    (renamed,) = (number for number, step in enumerate(steps) if step[0] == "rename" and step[1].startswith("~/"))
    written = [place for _, place in steps[:renamed] if place.startswith("~/shop/api/TMP")]
    assert {"~/shop/api/TMP", "~/shop/api/TMP/CLAUDE.md", "~/shop/api/TMP/.orchestra.json"} == set(written)
    for place in {*written, "~", "~/shop", os.path.dirname(backups)}:
        assert ("fsync", place) in steps[:renamed], place
    assert steps[renamed + 1] == ("fsync", "~/shop/api")
    assert not [step for step in steps[:renamed] if step[1].startswith(str(root))]


# Failing

ERRORS = ("ENOSPC", "EACCES", "EROFS", "EIO", "EMFILE")


def failures(error: str, sticky: bool, first: int = 1, step: int = 1) -> Iterator[Fault]:
    """Let one operation after the other fail, each in its own run."""
    return (Fault(number, getattr(errno, error), sticky) for number in itertools.count(first, step))


@pytest.mark.parametrize("stage", ["sync", "restore", "registry", "registry afresh"], indirect=True)
def test_an_operation_that_fails_once_is_reported_and_the_next_run_finishes(stage: Stage) -> None:
    # The longest row in part; the soak takes all.
    assert stage.play_all(failures("ENOSPC", False, step=3 if stage.argv[0] == "sync" else 1)) > 2


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("step", [30, pytest.param(1, marks=pytest.mark.soak)])
@every_scenario
def test_every_kind_of_failure_is_reported(stage: Stage, error: str, sticky: bool, step: int) -> None:
    first = 1 + ERRORS.index(error) % step  # a sample begins elsewhere for each kind
    assert stage.play_all(failures(error, sticky, first, step)) > 0


def check_report_and_disk(stage: Stage, outcome: Outcome, reason: str) -> None:
    assert outcome.ran.status == 2
    assert reason in outcome.ran.err
    stage.check_report(outcome)
    stage.check_disk()


@pytest.mark.parametrize("size", [10, 300, 700])
def test_a_limit_to_the_size_of_files_is_reported(stage: Stage, size: int) -> None:
    check_report_and_disk(stage, stage.play(file_size=size), "file too large")


@contextmanager
def mounted(folder: Path, kept: Path) -> Iterator[None]:
    """Mount a small file system at a folder, with a copy of another folder."""
    shutil.rmtree(folder)
    folder.mkdir()
    mount = shutil.which("mount") or "false"
    if subprocess.call([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], stderr=subprocess.DEVNULL):
        pytest.skip("mounting is not allowed")
    try:
        shutil.copytree(kept, folder, symlinks=True, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(not IS_LINUX, reason="needs tmpfs")
@pytest.mark.parametrize("place", ["code/shop/api", "home/.orchestra"])
def test_a_full_disk_is_reported_and_the_next_run_finishes(stage: Stage, place: str) -> None:
    folder = stage.home.folder / place
    stage.set()
    with mounted(folder, stage.kept / place):
        with open(folder / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(b"x" * 512):
                pass
        outcome = stage.run()
        (folder / "filler").unlink()
        check_report_and_disk(stage, outcome, "no space left on device")


def test_a_folder_that_may_not_be_written_is_reported_and_the_next_run_finishes(home: Home) -> None:
    stage = Stage(home, SCENARIOS["sync"])
    stage.set()
    root = home.code / "shop/api"
    mode = root.stat().st_mode
    root.chmod(0o555)
    ran = home.run_as_nobody(*stage.argv)
    root.chmod(mode)
    assert [line for line in ran.complaints if "CLAUDE.md" in line and "permission denied" in line]
    check_report_and_disk(stage, Outcome(ran), "permission denied")


# The real process

SAME_CALLS = {
    "replace": "rename",
    "rename_exclusively": "rename",
    "remove": "unlink",
    "swap_files": "swap",
    "pwrite64": "pwrite",
    "creat": "open",
}
SYSTEM_CALLS = """
    open openat openat2 creat write writev pwrite64 pwritev ftruncate truncate fchmod chmod fchmodat fchown chown
    lchown fchownat fsync fdatasync rename renameat renameat2 link linkat unlink unlinkat rmdir symlink symlinkat
    mkdir mkdirat mknod mknodat setxattr lsetxattr fsetxattr utimensat fallocate copy_file_range sendfile
"""


def run_traced(stage: Stage, *options: str, status: int = 0) -> list[tuple[str, str]]:
    """Run the real program under strace; return what it did to the disk.

    Of each call, what strace needs to inject a fault there, and its name in the rig.
    """
    strace = shutil.which("strace")
    if strace is None or subprocess.call([strace, "-o", os.devnull, "true"], stderr=subprocess.DEVNULL):
        pytest.skip("there is no strace that may trace here")
    stage.set()
    trace = stage.home.folder / "trace"
    options = ("-f", "-y", "-o", str(trace), "-e", "trace=?" + ",?".join(SYSTEM_CALLS.split()), *options)
    argv = [strace, *options, sys.executable, str(SCRIPT), *stage.argv]
    environ = {**os.environ, **stage.home.environ}
    ran = subprocess.run(argv, env=environ, check=False, capture_output=True, text=True, timeout=60)
    assert ran.returncode in (status, 128 - status), (options, ran)
    count: collections.Counter[str] = collections.Counter()
    found = []
    for name, rest in re.findall(r"(?m)^(?:\d+ +)?(\w+)\((.*)$", trace.read_text()):
        count[name] += 1
        kind = SAME_CALLS.get(name) or re.sub(r"(?<!ch)at2?$", "", name)
        kind = "rmdir" if "AT_REMOVEDIR" in rest else "swap" if "RENAME_EXCHANGE" in rest else kind
        changes = kind != "open" or name == "creat" or re.search("O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", rest)
        if changes and f"{stage.home.folder}/" in rest.rsplit(" = ", 1)[0]:
            found.append((f"{name}:when={count[name]}", kind))
    return found


def test_the_rig_misses_nothing_that_the_real_process_does(stage: Stage) -> None:
    traced = collections.Counter(kind for _, kind in run_traced(stage))
    watched = collections.Counter(SAME_CALLS.get(name, name) for name, _ in stage.operations)
    assert sum(traced.values()) > 50
    assert traced - watched == {}
    assert Picture.of(stage.home).files == stage.after.files


@pytest.mark.soak
def test_a_real_process_killed_at_any_system_call_loses_nothing(stage: Stage) -> None:
    for call, _ in run_traced(stage):
        run_traced(stage, "-e", f"inject={call}:signal=SIGKILL", status=-signal.SIGKILL)
        with blamed_on(f"killed before {call}"):
            stage.check_disk()


# ── Random histories ──────────────────────────────────────────────────────────

# A user and Orchestra take turns at random. What Orchestra did is judged from two
# pictures of the disk, by a parser of blocks and a list of backups of the test's own.

BOM = b"\xef\xbb\xbf"
NEWLINES = (b"\n", b"\r\n")
ONE_OR_TWO = (*NEWLINES, *(newline * 2 for newline in NEWLINES))
CUSTOM = {"mine": {"path": "docs/MINE.md", "owns": "block"}, "ours": {"path": ".x/ours.md"}}
PATHS = {
    **{target: orchestra.AGENTS[target].path for target in ALL_TARGETS},
    "mine": "docs/MINE.md",
    "ours": ".x/ours.md",
}
PART_PATHS = {
    "claude": "pages/CLAUDE.md",
    "codex": "pages/AGENTS.md",
    "gemini": "pages/GEMINI.md",
    **{target: PATHS[target].replace("orchestra", "orchestra-pages") for target in ("cursor", "windsurf", "cline")},
    "antigravity": ".agents/rules/orchestra-pages.md",
}
MANAGED = [*PATHS.values(), *PART_PATHS.values()]
IS_SHARED = {path: "orchestra" not in path and path != ".x/ours.md" for path in MANAGED}
MANAGED_FOLDERS = {str(parent) for path in MANAGED for parent in Path(path).parents} - {"."}
Spot = tuple[str, str]  # a codebase's label, and a path in its folder


class Parts(NamedTuple):
    """A shared file cut at its block."""

    head: bytes
    block: Optional[bytes] = None
    tail: bytes = b""


def cut_up(data: bytes) -> Optional[Parts]:
    """Cut a shared file at its block; None where Orchestra has to leave it alone."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return None
    found, offset = [], 0
    for line in data.split(b"\n"):
        bare = line.rstrip(b" \t\r")
        start = offset + (3 if bare.startswith(BOM) else 0)
        if bare[start - offset :] in (BEGIN, END):
            found.append((bare[start - offset :], start))
        offset += len(line) + 1
    if b"\0" in data or [marker for marker, _ in found] not in ([], [BEGIN, END]):
        return None
    if not found:
        return Parts(data)
    start, end = found[0][1], found[1][1] + len(END)
    return Parts(data[:start], data[start:end], data[end:])


def cut_managed(path: str, data: bytes) -> Optional[Parts]:
    return cut_up(data) if IS_SHARED[path] else Parts(b"", data)


def without_block(parts: Parts) -> set[bytes]:
    """Return what may remain without a block: the user's text, but for blank lines."""
    tails = {parts.tail, *(parts.tail[len(n) :] for n in NEWLINES if parts.tail.startswith(n))}
    heads = {parts.head}
    for _ in range(2):
        heads |= {head[: -len(n)] for head in heads for n in NEWLINES if head.endswith(n)}
    return {head + seam + tail for head in heads for tail in tails for seam in (b"", *NEWLINES)}


def user_words(data: bytes) -> set[bytes]:
    return set(re.findall(rb"\bu\d+x\b", data))


def spot_of(path: str) -> Spot:
    """Return the codebase and the path there of what lies in the home's code/."""
    parts = path.split("/", 3)
    return ("/".join(parts[1:3]), parts[3]) if parts[0] == "code" and len(parts) == 4 else ("", path)


def key_of(label: str) -> tuple[str, str]:
    project, _, name = label.partition("/")
    return project, name


def with_one_space(data: bytes) -> bytes:
    """Make white space one: a difference in it alone is no edit."""
    return b" ".join(data.split())


class History(Home):
    """A home folder whose user and whose Orchestra act at random."""

    def __init__(self, folder: str, seed: int) -> None:
        super().__init__(folder)
        self.seed, self.random = seed, random.Random(seed)
        self.code, self.copy = Path(self.path, "code"), self.folder / "copy"
        self.steps = [""]  # the choices of each
        self.count = itertools.count(1)
        self.clock = Clock(1.6e9)
        self.ours: dict[Spot, set[bytes]] = collections.defaultdict(set)  # what Orchestra wrote
        self.appended: dict[Spot, tuple[bytes, Parts]] = {}  # before and after a first block
        self.spoilt: dict[Path, bytes] = {}
        self.values: dict[str, dict[str, Any]] = {}
        self.killed: set[str] = set()
        self.registered: set[str] = set()
        self.broken: set[str] = set()
        self.purged: set[str] = set()
        self.layers: dict[str, str] = {}  # the word of each, "" for a broken one
        put_files(Path(self.path), {"outside/CLAUDE.md": "u0x outside\n", "outside/rules/mine.md": "u0x\n"})
        for label in ("shop/api", "shop/web"):
            self.values[label] = {"targets": ["claude", "codex"], "description": self.word("r"), "notes": []}
            self.values[label].update(custom_targets=CUSTOM, projects=[])
            self.enter(label)
            put_files(self.code / label, {"code.py": "", "pages/code.py": ""})
        self.cache = orchestra.RegistryCache.load(self.path)

    # Words and choices

    def choose(self, choices: Iterable[Any]) -> Any:
        choice = self.random.choice(list(choices))
        self.steps[-1] += f" {getattr(choice, '__name__', choice)!s:.50}"
        return choice

    def is_likely(self, chance: float) -> bool:
        return self.random.random() < chance

    def word(self, letter: str = "u") -> str:
        return f"{letter}{next(self.count)}x"

    def line(self, newline: bytes = b"\n") -> bytes:
        return f"{self.word()} of the user".encode() + newline

    def paths_of(self, label: str) -> list[str]:
        """Return the files that a codebase wants."""
        targets, parts = self.values[label]["targets"], PART_PATHS if self.values[label]["projects"] else {}
        return [PATHS[target] for target in targets] + [parts[target] for target in targets if target in parts]

    def pick(self) -> tuple[str, str, Path]:
        """Choose a managed file of a codebase."""
        label = self.choose(self.values)
        os.stat(self.code / label)  # no user makes it anew while it is away
        wanted = self.paths_of(label)
        path = self.choose(wanted if wanted and self.is_likely(0.8) else MANAGED)
        return label, path, self.code / label / path

    def write(self, file: Path, data: bytes) -> None:
        """Save as an editor does: in place, or by renaming."""
        file.parent.mkdir(parents=True, exist_ok=True)
        if self.is_likely(0.5):
            file.write_bytes(data)
        else:
            beside = file.with_name(f"{file.name}.swp")
            beside.write_bytes(data)
            beside.replace(file)
        if not data:  # else Orchestra waits, as for an editor that has just emptied it
            os.utime(file, (1e9, 1e9))

    def forget(self, label: str, path: str) -> None:
        self.appended.pop((label, path), None)
        self.spoilt.pop(self.code / label / path, None)

    def clear(self, label: str, path: str) -> None:
        self.forget(label, path)
        file = self.code / label / path
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        elif os.path.lexists(file):
            file.unlink()

    # The user's steps; an impossible one is skipped

    def edit_inside(self) -> None:
        _, path, file = self.pick()
        parts = cut_managed(path, file.read_bytes())
        if parts is None or parts.block is None:
            return
        lines = parts.block.splitlines(keepends=True)
        last = len(lines) - 1 if IS_SHARED[path] else len(lines)
        at = self.random.randint(1, max(1, last))
        how = self.choose(("insert", "replace", "drop"))
        newline = b"\r\n" if b"\r\n" in parts.block else b"\n"
        lines[at : at + (how != "insert" and at < last)] = [] if how == "drop" else [self.line(newline)]
        self.write(file, parts.head + b"".join(lines) + parts.tail)

    def edit_outside(self) -> None:
        _, path, file = self.pick()
        newline, where = self.choose(NEWLINES), self.choose(("before", "after", "both"))
        data = file.read_bytes() if file.is_file() and not file.is_symlink() else b""
        parts = cut_up(data) if IS_SHARED[path] else Parts(b"")
        if parts is None or os.path.lexists(file) != bool(data):
            return
        head = self.line(newline) + parts.head if where != "after" else parts.head
        tail = parts.tail + self.line(newline) if where != "before" else parts.tail
        if parts.block is None and self.is_likely(0.3):
            tail = tail[: -len(newline)] if tail.endswith(newline) else tail
        if parts.block is not None and tail and not tail.startswith(NEWLINES):
            tail = newline + tail
        bom = BOM if not data and self.is_likely(0.1) else b""
        self.write(file, bom + head + (parts.block or b"") + tail)

    def rewrite(self) -> None:
        """Empty a file, or write it anew, without its block or with other line ends."""
        label, path, file = self.pick()
        data = file.read_bytes() if file.exists() else b""
        parts = cut_up(data) or Parts(data)
        ways = {
            "anew": b"# mine\n" + self.line() * self.random.randint(1, 2),
            "empty": b"",
            "without block": parts.head + parts.tail,
            "lf": data.replace(b"\r\n", b"\n"),
            "crlf": data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"),
        }
        how = "anew" if file.is_symlink() or not data or self.is_likely(0.5) else self.choose(ways)
        self.forget(label, path)
        if file.is_symlink():
            file.unlink()
        self.write(file, ways[how])

    def displace(self) -> None:
        """Delete a file, or put a link or a folder in its place."""
        label, path, file = self.pick()
        inside = self.code / label / self.choose(other for other in MANAGED if other != path)
        target = self.choose(("nothing", "nothing", "a folder", inside, Path(self.path, "outside/CLAUDE.md")))
        self.clear(label, path)
        if target == "a folder":
            put_files(file, {"mine.md": self.line()})
        elif target != "nothing":
            put_files(file.parent, {file.name: link_to(os.path.relpath(target, file.parent))})

    def untangle(self) -> None:
        """Take links and folders away from where managed files belong."""
        for label, path in itertools.product(self.values, MANAGED):
            file = self.code / label / path
            if file.is_symlink() or file.is_dir():
                self.clear(label, path)

    def spoil(self) -> None:
        _, path, file = self.pick()
        if not IS_SHARED[path] or file.is_symlink() or file in self.spoilt:
            return
        data = file.read_bytes()
        wrong = {
            "doubled": data + b"\n" + BEGIN + b"\n" + self.line() + END + b"\n",
            "no end": data.replace(END, b""),
            "no begin": data.replace(BEGIN, self.line()),
            "turned": data.replace(BEGIN, b"@").replace(END, BEGIN).replace(b"@", END),
            "no text": data + b"\xff\xfe",
            "NUL": data + b"\0",
        }
        how = self.choose(wrong)
        self.spoilt[file] = data
        self.write(file, wrong[how])

    def mend(self) -> None:
        for file, data in self.spoilt.items():
            if file.is_file():
                self.write(file, data)
        self.spoilt.clear()

    def change_mode(self) -> None:
        file = self.pick()[2]
        if file.is_file() and not file.is_symlink():
            file.chmod(self.choose((0o600, 0o640, 0o644, 0o755)))

    def link_parent(self) -> None:
        """Lead the folder of an owned file out of the codebase, or back."""
        folder = self.code / self.choose(self.values) / ".clinerules"
        beside = folder.with_name("rules.mine")
        if folder.is_symlink():
            folder.unlink()
            beside.rename(folder)
        elif folder.is_dir() and not self.leftovers():
            folder.rename(beside)
            folder.symlink_to(os.path.relpath(Path(self.path, "outside/rules"), folder.parent))

    def move_root(self) -> None:
        root = self.code / self.choose(self.values)
        away = root.with_name(f"{root.name}.away")
        old, new = (away, root) if away.exists() else (root, away)
        old.rename(new)

    def enter(self, label: str) -> None:
        """Register a codebase, below `~` so that a copy of the home has its own."""
        self.register(label, path=f"~/code/{label}", **self.values[label])
        self.registered.add(label)
        self.broken.discard(label)

    def change_registry(self) -> None:
        keys = ("targets", "notes", "conventions", "description", "projects")
        label, key = self.choose(self.values), self.choose(keys)
        value: Any = self.word("r") if key == "description" else [self.word("r")] * self.choose((0, 1))
        if key == "targets":
            value = self.random.sample([*PATHS], self.choose((0, 1, 2, 3, len(PATHS))))
        elif key == "projects":
            value = [{"name": "pages", "project_type": "backend", "path": "pages", "notes": value}] if value else []
        self.values[label][key] = value
        if label in self.registered:
            self.enter(label)

    def layers_of(self, label: str) -> list[str]:
        """Return the names of all layers of a codebase but its own file."""
        stems = (f"{stem}{end}" for stem in ("all", "shop/project", label) for end in ("", ".local"))
        return [f"{stem}{suffix}" for stem in stems for suffix in (".yaml", ".md") if stem + suffix != f"{label}.yaml"]

    def stopped(self) -> set[str]:
        """Return the codebases with a broken file."""
        return {
            label
            for label in self.values
            if label in self.broken or "" in (self.layers.get(name, "fine") for name in self.layers_of(label))
        }

    def pick_layer(self) -> str:
        label = self.choose(self.values)
        names = self.layers_of(label)
        return str(self.choose(names if label in self.registered else names[:8]))

    def save_layer(self) -> None:
        name, word = self.pick_layer(), self.word("r")
        text = f"conventions: [{word}]\n" if name.endswith(".yaml") else f"- {word}\n"
        self.write(self.projects / name, text.encode())
        self.layers[name] = word

    def remove_layer(self) -> None:
        name = self.pick_layer()
        (self.projects / name).unlink()
        del self.layers[name]

    def break_layer(self) -> None:
        name = self.pick_layer()
        text = b"notes: [\n" if name.endswith(".yaml") else b"<<<<<<< HEAD\n=======\n>>>>>>> x\n"
        self.write(self.projects / name, text)
        self.layers[name] = ""

    def mend_layers(self) -> None:
        for name in [name for name, word in self.layers.items() if not word]:
            (self.projects / name).unlink()
            del self.layers[name]

    def break_registry(self) -> None:
        label = self.choose(self.values)
        if label in self.registered:
            self.write_registry(f"{label}.yaml", "name: [\n")
            self.broken.add(label)

    def mend_registry(self) -> None:
        """Register again what is broken or removed."""
        for label in sorted(self.broken | (self.values.keys() - self.registered)):
            self.enter(label)

    def wind(self) -> None:
        self.clock.now += self.choose((-1e6, -5, 0, 1, 1e6))

    # Pictures, and what Orchestra may have done between two

    def see(self, own: str = "backups|hashes|run") -> dict[str, Seen]:
        """Look at all but some folders that are Orchestra's own."""
        pattern = re.compile(rf"\.orchestra/({own})(/|$)")
        return {path: seen for path, seen in take_picture(self.path).items() if not pattern.match(path)}

    def kept(self) -> dict[Spot, dict[str, bytes]]:
        """Return what is in the backups, by time."""
        found: dict[Spot, dict[str, bytes]] = collections.defaultdict(dict)
        for path, seen in take_picture(orchestra.backups_root(self.path)).items():
            parts = path.split("/", 3)
            if seen.kind == "file" and len(parts) == 4 and is_kept_version(path):
                found["/".join(parts[:2]), parts[3]][parts[2]] = seen.data
        return found

    @contextmanager
    def judged(
        self, labels: set[str], is_whole: bool = True, is_restore: bool = False, but: Collection[str] = ()
    ) -> Iterator[dict[str, Seen]]:
        """Check that only managed files of `labels` change, and only as they may."""
        before, kept = self.see(), self.kept()
        changed: dict[str, Seen] = {}
        yield changed
        after, kept_now = self.see(), self.kept()
        for spot, versions in kept.items():
            assert versions.items() <= kept_now[spot].items(), f"the backups of {spot} have changed"
        for where in sorted(before.keys() | after.keys()):
            old, new = before.get(where), after.get(where)
            label, path = spot = spot_of(where)
            if old == new or where in but:
                continue
            if label in labels and path in IS_SHARED:
                changed[where] = old or Seen("absent")
                is_ours = self.judge(spot, old, new, kept_now[spot], is_restore)
                # After a kill amid a swap it may be kept for safety's sake.
                is_excused = is_restore or (label in self.killed)
                is_more = len(kept_now[spot]) > len(kept[spot])
                assert is_excused or not (is_ours and is_more), f"{where}: kept as if edited by hand"
            elif label in labels and path in MANAGED_FOLDERS:
                assert "folder" in (old or new or Seen("")).kind, where
            else:
                assert is_temporary(where) and (new is None or not is_whole), f"{where}: {old} became {new}"

    def judge(
        self, spot: Spot, old: Optional[Seen], new: Optional[Seen], kept: dict[str, bytes], is_restore: bool
    ) -> bool:
        """Check a managed file; return whether Orchestra had written its own part."""
        for seen in (old, new):
            assert seen is None or seen.kind == "file", f"{spot}: {old} became {new}"
        assert old is None or new is None or old.mode == new.mode, f"{spot}: the mode has changed"
        was, now = old.data if old else b"", new.data if new else b""
        lost = user_words(was) - user_words(now)
        assert lost <= user_words(b" ".join(kept.values())), f"{spot}: {lost} is lost"
        is_kept = old is None or with_one_space(was) in map(with_one_space, kept.values())
        if is_restore:
            assert is_kept, f"{spot}: what was restored over is not kept"
            return False
        ours_was, ours_now = self.judge_outside(spot, old, new) if IS_SHARED[spot[1]] else (was, now)
        is_ours = with_one_space(ours_was) in self.ours[spot]
        if ours_was and ours_was != ours_now and not is_ours:
            assert is_kept, f"{spot}: edited by hand, replaced, and not kept"
        if ours_now and ours_now != ours_was:
            self.ours[spot].add(with_one_space(ours_now))
        return is_ours

    def judge_outside(self, spot: Spot, old: Optional[Seen], new: Optional[Seen]) -> tuple[bytes, bytes]:
        """Check the user's text around a block; return the block before and after."""
        was, now = old.data if old else b"", new.data if new else b""
        a, b = cut_up(was), cut_up(now)
        assert a and b, f"{spot}: {was!r} became {now!r}"
        if a.block is None:
            assert b.block is not None, f"{spot}: {was!r} became {now!r}"
            join = b.head[len(was) :]
            assert b.head.startswith(was) and join in {b"", *ONE_OR_TWO}, f"{spot}: {b}"
            assert b.tail in NEWLINES, f"{spot}: {b}"
            self.appended.pop(spot, None)
            if old is not None:
                self.appended[spot] = (was, b)
        elif b.block is not None:
            assert (a.head, a.tail) == (b.head, b.tail), f"{spot}: the user's text has changed: {a} became {b}"
        elif new is None:
            assert not a.head and a.tail in (b"", *NEWLINES), f"{spot}: {a} was removed"
        else:
            assert now in without_block(a), f"{spot}: {a} became {now!r}"
            text, then = self.appended.pop(spot, (b"", Parts(b"?")))
            if (then.head, then.tail) == (a.head, a.tail):
                assert now == text, f"{spot}: {text!r} did not come back, but {now!r}"
        return a.block or b"", b.block or b""

    # Orchestra's steps; a scope is one label, or none for all

    def choose_scope(self) -> str:
        return str(self.choose(("", *sorted(self.registered))))

    def labels_of(self, scope: str) -> set[str]:
        return {scope} if scope else set(self.registered)

    def run_in(self, home: Any, *argv: str) -> Ran:
        self.environ = {"HOME": str(home)}
        return self.run(*argv)

    def sync_by(self, way: str, home: str, scope: str) -> None:
        scoped = orchestra.SyncScope.codebase(scope) if scope else orchestra.SyncScope.all()
        if way == "main":
            self.run_in(home, "sync", scope or "--all")
        elif way == "pipeline":
            orchestra.run_pipeline(home, scoped)
        elif way == "one by one":
            registry = orchestra.load_registry(home)
            for label in sorted(self.labels_of(scope)):
                codebase = registry.codebases.get(key_of(label))
                if codebase:
                    orchestra.sync_codebase(home, codebase, registry.owners, clock=self.clock)
        else:
            self.run_job(home, scope, scoped)

    def run_job(self, home: str, scope: str, scoped: orchestra.SyncScope) -> None:
        """Sync as the daemon's worker does, with its cache from job to job."""
        cache = self.cache if home == self.path else orchestra.RegistryCache.load(home)
        keys = frozenset(map(key_of, self.labels_of(scope)))
        job = orchestra.SyncJob(scoped, "watcher" if scope else "start", changed=keys)
        cache, outcome = orchestra.run_job(home, cache, job)
        if outcome.suspects:
            again = job._replace(overdue=outcome.suspects)
            cache, outcome = orchestra.run_job(home, cache, again)
        if home == self.path:
            self.cache = cache

    def look(self) -> dict[str, orchestra.SyncCodebaseResult]:
        """Return what a sync would write, and check that `status` says the same."""
        before = self.see()
        registry = orchestra.load_registry(self.path)
        results = orchestra.run_pipeline(
            self.path, orchestra.SyncScope.all(), orchestra.SyncMode(dry_run=True), registry
        )
        status = orchestra.scan_staleness(self.path, registry, clock=self.clock)
        for result, entry in zip(results, status.codebases):
            is_current = not (any(file.writes for file in result.files) or result.errors or result.is_absent)
            assert (entry.project, entry.codebase) == result.key
            assert (entry.status == orchestra.State.CURRENT) == is_current, (entry, result.written, result.errors)
            assert (entry.status == orchestra.State.ERROR) == bool(result.errors), entry
            assert (entry.status == orchestra.State.ABSENT) == result.is_absent, entry
        assert len(results) == len(status.codebases) == len(self.registered)
        assert self.see() == before, "looking has changed something"
        return {orchestra.label_for(result.key): result for result in results}

    def sync(self, *argv: str) -> Any:
        scope = self.choose_scope()
        ways = ["main", "pipeline", "one by one", "job"]
        way = self.choose(ways)
        if not scope and not self.registered:
            return
        planned, labels = self.look(), self.labels_of(scope)
        if way == "job":  # what was known broken is looked at again
            labels |= set(map(orchestra.label_for, self.cache.registry.broken)) & self.registered
        is_compared = labels == self.labels_of(scope) and self.is_likely(0.2)
        if is_compared:
            shutil.copytree(self.path, self.copy, symlinks=True)
        with self.judged(labels) as changed:
            self.sync_by(way, self.path, scope)
        self.judge_sync(labels, planned, changed)
        if is_compared:  # with another way, in a copy of the home as it was before
            other = self.choose(other for other in ways if other != way)
            self.sync_by(other, str(self.copy), scope)
            mine, its = (without_age(take_picture(top)) for top in (self.code, self.copy / "code"))
            assert mine == its, f"by {other} it is something else"
            shutil.rmtree(self.copy)
        if changed and self.is_likely(0.3):
            self.restore_copy(*self.choose(sorted(changed.items())))

    def judge_sync(self, labels: set[str], planned: dict[str, Any], changed: dict[str, Seen]) -> None:
        files = {
            f"code/{label}/{file.path}"
            for label in labels
            for file in planned[label].files
            if file.writes and file.action != orchestra.Action.RELEASE
        }
        assert files == set(changed), "a dry run said otherwise"
        for label in labels:
            self.judge_result(label)
        self.killed -= {label for label in labels if (self.code / label).exists()} - self.stopped()
        before = self.see("run")
        orchestra.run_pipeline(self.path, orchestra.SyncScope.codebase(*labels))
        assert self.see("run") == before, "a second sync has changed something"
        for label, result in self.look().items():
            assert label not in labels or not result.written, result.written

    def judge_result(self, label: str) -> None:
        """Check that every file that can be synced is, and no temporary one is left."""
        root = self.code / label
        if label in self.stopped() or not root.exists():
            assert root.exists() or not os.path.lexists(root)
            return
        assert not any(map(is_temporary, take_picture(root)))
        for path in self.paths_of(label):
            file = root / path
            if not file.is_file() or file.is_symlink() or file.parent.is_symlink():
                assert os.path.lexists(file) or file.parent.is_symlink(), f"{file} is missing"
                continue
            parts = cut_managed(path, file.read_bytes())
            if parts is not None:
                self.judge_text(label, path, parts)
                self.ours[label, path].add(with_one_space(parts.block or b""))

    def judge_text(self, label: str, path: str, parts: Parts) -> None:
        """Check that a block says all that is to be said there, or is gone if that is nothing."""
        values, block = self.values[label], parts.block or b""
        words = [*values.get("notes", ()), *values.get("conventions", ())]
        words += [self.layers[name] for name in self.layers_of(label) if name in self.layers]
        words += ["in `pages`"] if values["projects"] else []
        if path in PART_PATHS.values():
            words = values["projects"][0]["notes"]
        said = {*re.findall(r"\br\d+x\b", block.decode())}
        assert said <= {*words, values["description"], *values.get("notes", ())}, f"{path}: {words}, {parts}"
        is_beside = IS_SHARED[path] and bool((parts.head + parts.tail).replace(BOM, b"").strip())
        if not is_beside and b"\n@AGENTS.md" not in block and path not in PART_PATHS.values():
            words.append(values["description"])
        assert all(word.encode() in block for word in words), f"{path}: {words}, {parts}"
        assert not is_beside or bool(words) == (parts.block is not None), f"{path}: {words}, {parts}"
        assert not is_beside or values["description"].encode() not in block, f"{path}: {parts}"

    def restore_copy(self, where: str, old: Seen) -> None:
        """Check that what a sync replaced can be restored, in a copy of the home."""
        label, path = spot_of(where)
        file = Path(self.path, where)
        now = file.read_bytes() if os.path.lexists(file) else b""
        lost = user_words(old.data) - user_words(now)
        if not lost or label not in self.registered - self.stopped():
            return
        when = next(when for when, data in sorted(self.kept()[label, path].items()) if data == old.data)
        shutil.copytree(self.path, self.copy, symlinks=True)
        ran = self.run_in(self.copy, "restore", label, path, "--at", when)
        restored = (self.copy / where).read_bytes()
        assert ran.status == 0 and lost <= user_words(restored), f"{where}: {lost} did not come back"
        a, b = cut_up(now), cut_up(restored)
        if a and not IS_SHARED[path]:
            assert restored == old.data
        elif a:  # a block that was taken out is appended
            assert b and (a.head == b.head or (a.block is None and b.head in (a.head + n for n in ONE_OR_TWO)))
        shutil.rmtree(self.copy)

    def restore(self) -> None:
        found = sorted(
            (spot, when)
            for spot, versions in self.kept().items()
            if spot[1] in IS_SHARED and spot[0] in self.registered - self.stopped()
            for when, data in versions.items()
            # What was written before a purge counts as a colleague's.
            if spot[0] not in self.purged or b"Written by Orchestra" not in data
        )
        if found:
            (label, path), when = self.choose(found)
            self.forget(label, path)
            with self.judged({label}, is_restore=True):
                self.run_in(self.path, "restore", label, path, "--at", when)

    def crash(self) -> None:
        scope, fault = self.choose_scope(), Fault(self.choose(range(1, 71)), early=self.choose((False, True)))
        way = self.choose(("pipeline", "one by one"))
        with self.judged(self.labels_of(scope), is_whole=False):
            run_with_fault(lambda: self.sync_by(way, self.path, scope), fault)
        self.killed |= self.labels_of(scope)

    def remove(self) -> None:
        label = self.choose(self.values)
        if label not in self.registered:
            return
        file, purge = self.file(label), self.choose(((), ("--purge",), ("--purge",)))
        text = file.read_bytes()
        own = {name for name in self.layers_of(label)[8:] if name in self.layers}
        gone = [os.path.relpath(self.projects / name, self.path) for name in (*own, f"{label}.yaml")]
        with self.judged({label} if purge else set(), but=gone):
            ran = self.run_in(self.path, "project", "remove", label, *purge)
        if file.exists():
            assert purge and ran.status == 2 and file.read_bytes() == text
            return
        assert text in self.kept()[label, file.name].values()
        assert {name for name in own if (self.projects / name).exists()} == set()
        self.layers = {name: word for name, word in self.layers.items() if name not in own}
        self.registered.discard(label)
        self.broken.discard(label)
        self.purged |= {label} if purge else set()
        for path in MANAGED if purge else ():
            self.forget(label, path)
            self.ours.pop((label, path), None)
            where = self.code / label / path
            parts = cut_up(where.read_bytes()) if where.is_file() and IS_SHARED[path] else None
            assert where.is_symlink() or parts is None or parts.block is None, f"{where}: not purged"

    # A history

    def one_step(self) -> None:
        users = [
            *(self.edit_inside, self.edit_outside, self.change_registry, self.displace) * 4,
            *(self.change_mode, self.spoil, self.link_parent) * 3,
            *(self.untangle, self.mend_registry, self.mend_layers, self.rewrite, self.save_layer) * 2,
            *(self.mend, self.move_root, self.remove_layer, self.break_layer, self.break_registry, self.wind),
        ]
        orchestras = [*(self.sync,) * 6, self.restore, *(self.crash,) * 2, self.remove]
        self.steps.append("")
        try:
            self.choose(users if self.is_likely(0.6) else orchestras)()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError):
            if orchestra.__file__ in traceback.format_exc():
                raise
            # an impossible step

    def tidy_up(self) -> None:
        """Put everything right, and check that one sync makes and leaves all tidy."""
        for away in self.code.glob("*/*.away"):
            away.rename(away.with_suffix(""))
        for file in self.code.glob("*/*/.clinerules"):
            if file.is_symlink():
                file.unlink()
        for put_right in (self.mend_registry, self.mend_layers, self.mend, self.untangle):
            put_right()
        for label, path in itertools.product(self.values, MANAGED):
            file = self.code / label / path
            if file.is_file() and cut_managed(path, file.read_bytes()) is None:
                file.unlink()
        with self.judged(set(self.values)):
            ran = self.run_in(self.path, "sync", "--all")
            assert ran.status == orchestra.OK, ran
        assert {result.errors for result in self.look().values()} == {()}
        assert self.leftovers() == []

    def play(self, steps: int) -> None:
        try:
            for _ in range(steps):
                self.one_step()
            self.steps.append("tidy up")
            self.tidy_up()
        except Exception as error:
            played = "\n".join(f"  {number}: {step}" for number, step in enumerate(self.steps))
            raise AssertionError(f"History({self.seed}), after\n{played}\n{error}") from error


def play_history(seed: int, steps: int) -> None:
    folder = tempfile.mkdtemp(prefix="orc", dir="/tmp")
    History(folder, seed).play(steps)
    shutil.rmtree(folder)


@pytest.mark.parametrize("first", [0, 100, 200])
def test_whatever_user_and_orchestra_do_in_turns_nothing_is_lost(first: int) -> None:
    for seed in range(first, first + 4):
        play_history(seed, 40)


@pytest.mark.soak
def test_nothing_is_lost_in_many_histories(capsys: Any) -> None:
    first = SEED or random.randrange(1 << 40)
    seed, deadline = first, time.monotonic() + SOAK_SECONDS
    while time.monotonic() < deadline:
        play_history(seed, 60)
        seed += 1
    with capsys.disabled():
        print(f"\n{seed - first} histories from seed {first} on")


# ── Races ─────────────────────────────────────────────────────────────────────

# First the worst instants on purpose: between the last check of a file and its
# replacing, and right after that. Then by chance: editors, commands and the daemon in
# loops.

Change = Callable[[bytes], bytes]
Save = Callable[[Path, Change], None]


def save_renaming(file: Path, change: Change) -> None:
    beside = file.with_name(f".{file.name}.swp")
    beside.write_bytes(change(file.read_bytes()))
    beside.replace(file)


def save_over(file: Path, change: Change) -> None:
    file.write_bytes(change(file.read_bytes()))


def save_patching(file: Path, change: Change) -> None:
    with open(file, "r+b") as opened:
        data = change(opened.read())
        opened.seek(0)
        opened.write(data)
        opened.truncate()


def save_anew(file: Path, change: Change) -> None:
    data = change(file.read_bytes())
    file.unlink()
    file.write_bytes(data)


def save_slowly(file: Path, change: Change) -> None:
    data = change(file.read_bytes())
    with open(file, "wb") as opened:
        time.sleep(0.05)
        opened.write(data)


def append(file: Path, change: Change) -> None:
    """Append what the change adds to an empty file, as `>>` does."""
    with open(file, "ab") as opened:
        opened.write(change(b""))


def add(word: bytes) -> Change:
    return lambda data: word + b"\n" + data


def name_of(way: Any) -> str:
    return getattr(way, "__name__", str(way))


WHOLE_SAVES = [save_renaming, save_over, save_patching, save_anew]
every_way = pytest.mark.parametrize("save", WHOLE_SAVES, ids=name_of)


class Scene:
    """A codebase whose file, with a block in the user's text, the next sync changes."""

    PLACES = {  # by target: the file, and what the registry says for a note in it
        "team": (".team/rules.md", {"custom_targets": {"team": {"path": ".team/rules.md", "owns": "block"}}}),
        "part": ("packages/web/CLAUDE.md", {"targets": ["claude"]}),
    }

    def __init__(self, home: Home, text: Optional[str] = "mine\n", target: str = "claude") -> None:
        self.home = home
        self.path, self.fields = self.PLACES.get(target) or (orchestra.AGENTS[target].path, {})
        self.fields = {"targets": [target], **self.fields}
        place = "CLAUDE.md" if target in orchestra.AGENTS else self.path
        files = {"README.md": ""} if text is None else {"README.md": "", place: text}
        self.root = home.make_codebase("shop/api", files, **self.fields_with("first"))
        self.file = self.root / self.path
        home.sync()
        home.register("shop/api", **self.fields_with("second"))

    def fields_with(self, note: str) -> dict[str, Any]:
        if not self.path.startswith("packages/"):
            return {**self.fields, "notes": [note]}
        part = {"name": "web", "project_type": "frontend", "path": "packages/web", "notes": [note]}
        return {**self.fields, "notes": [], "projects": [part]}

    def race(self, before: Acts = (), after: Acts = (), argv: Sequence[str] = ("sync", "--all")) -> Ran:
        """Run a command, with the user's acts around each replacing of the file."""
        with instants(self.file, before, after) as calls:
            ran = self.home.run(*argv)
        assert calls
        return ran

    def user_text(self) -> bytes:
        parts = cut_up(self.file.read_bytes())
        assert parts and parts.block
        return parts.head + parts.tail

    def words(self) -> set[bytes]:
        """Return the user's words that are in the file or in what is kept of it."""
        now = self.file.read_bytes() if self.file.is_file() else b""
        # Where writers are unknown, the old file is set aside for a minute.
        kept = kept_words(self.home, name=self.file.name) | kept_words(self.home, name=".aside/*")
        return user_words(now) | kept

    def check_synced(self) -> None:
        """Sync, and check that the file is current and nothing temporary is left."""
        self.home.sync()
        assert b"second" in self.file.read_bytes()
        assert (self.home.sync().lines, self.home.leftovers()) == ([], [])


@pytest.fixture
def scene(home: Home) -> Scene:
    return Scene(home)


@pytest.fixture(params=["claude", "team", "part"])
def any_scene(home: Home, request: Any) -> Scene:
    """Return the scene of an agent's file, of a custom target's, and of a part's."""
    return Scene(home, target=request.param)


@pytest.mark.parametrize(("before", "after"), [(1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (4, 0)])
@pytest.mark.parametrize("save", [*WHOLE_SAVES, append], ids=name_of)
def test_lines_added_in_the_instants_of_replacing_are_not_lost(
    any_scene: Scene, save: Any, before: int, after: int
) -> None:
    if after and not IS_LINUX:
        pytest.skip("a save right after is found in the backups")
    words: list[bytes] = []

    def save_one() -> None:
        words.append(b"u%dx" % len(words))
        save(any_scene.file, add(words[-1]))

    any_scene.race([save_one] * before, [save_one] * after)
    assert len(words) == before + after
    for _ in range(2):
        assert any_scene.words() == set(words) and b"mine\n" in any_scene.user_text()
        assert words[-1] in any_scene.user_text() or before > 1
        any_scene.check_synced()
    assert sorted(any_scene.user_text().split()) == [b"mine", b"u0x"] or len(words) > 1


@every_way
@pytest.mark.parametrize("target", ["claude", "cline"])
def test_an_edit_of_orchestras_text_in_the_instant_of_replacing_is_kept(home: Home, target: str, save: Any) -> None:
    scene = Scene(home, target=target)
    edited = scene.file.read_bytes().replace(b"first", b"first u1x")
    scene.race([lambda: save(scene.file, lambda data: edited)])
    scene.check_synced()
    assert home.backups() == {scene.path: edited}


@every_way
def test_a_file_saved_at_every_try_has_the_last_save_in_it(any_scene: Scene, save: Any) -> None:
    saved = [any_scene.file.read_bytes()]

    def save_again() -> None:
        if any_scene.file.read_bytes() == saved[-1]:  # else it is being put back
            saved.append(b"u%dx\n" % len(saved))
            save(any_scene.file, lambda data: saved[-1])

    ran = any_scene.race(itertools.repeat(save_again))
    assert (ran.status, ran.lines) == (2, []) and "it kept changing" in ran.complaints[0]
    assert any_scene.file.read_bytes() == saved[-1] and len(saved) > 2
    any_scene.check_synced()
    assert any_scene.user_text().startswith(saved[-1])


def make_link_of(file: Path) -> None:
    file.rename(file.with_name("mine.md"))
    file.symlink_to("mine.md")


def make_folder_of(file: Path) -> None:
    file.unlink()
    put_files(file, {"mine.md": "mine\n"})


@pytest.mark.parametrize("change", [make_link_of, make_folder_of], ids=name_of)
def test_what_is_no_file_any_more_in_the_instant_of_replacing_stays(any_scene: Scene, change: Any) -> None:
    any_scene.race([lambda: change(any_scene.file)])
    mine = any_scene.file.with_name("mine.md") if any_scene.file.is_symlink() else any_scene.file / "mine.md"
    assert b"mine\n" in mine.read_bytes() and b"second" not in mine.read_bytes()
    assert any_scene.home.leftovers() == []


def test_a_file_deleted_in_the_instant_of_replacing_does_not_come_back(any_scene: Scene) -> None:
    assert any_scene.race([any_scene.file.unlink]).status == 0
    any_scene.check_synced()
    assert b"mine" not in any_scene.file.read_bytes()


@pytest.mark.parametrize("save", [replace, Path.write_text], ids=name_of)
def test_a_file_that_appears_in_the_instant_of_placing_stays(home: Home, save: Any) -> None:
    file = home.make_codebase("shop/api", targets=["claude"]) / "CLAUDE.md"
    with instants(file, [lambda: save(file, "u1x\n")]):
        home.run("sync", "--all")
    home.sync()
    assert file.read_bytes().startswith(b"u1x\n\n" + BEGIN)


@pytest.mark.parametrize("argv", [("sync", "--all"), ("project", "remove", "api", "--purge")], ids=lambda argv: argv[0])
@pytest.mark.parametrize("save", [save_renaming, save_over, save_patching], ids=name_of)
def test_a_save_in_the_instant_of_removing_stays(home: Home, save: Any, argv: Any) -> None:
    scene = Scene(home, None)
    home.register("shop/api", targets=[])
    scene.race([lambda: save(scene.file, add(b"u1x"))], argv=argv)
    assert scene.file.exists(), "the user's save was removed"
    assert user_words(scene.file.read_bytes()) == {b"u1x"}
    assert home.leftovers() == []


@every_way
def test_a_save_in_the_instant_of_restoring_is_not_lost(scene: Scene, save: Any) -> None:
    edit(scene.file, "first", "first by hand")
    scene.home.sync()
    scene.race([lambda: save(scene.file, add(b"u1x"))], argv=("restore", "api"))
    assert b"u1x\n" in scene.user_text() and scene.home.leftovers() == []


# A writer that has the file open


@needs_leases
@pytest.mark.parametrize("mode", ["ab", "r+b", "wb"])
@pytest.mark.parametrize("is_late", [False, True])
def test_a_file_keeps_what_a_program_writes_that_has_it_open(scene: Scene, mode: str, is_late: bool) -> None:
    whole = scene.file.read_bytes()
    with ExitStack() as stack:
        opened: list[Any] = []
        opening = instants(scene.file, [lambda: opened.append(stack.enter_context(open(scene.file, mode)))])
        if is_late:
            with opening:
                scene.home.run("sync", "--all")
        else:
            opened = [stack.enter_context(open(scene.file, mode))]
            scene.home.run("sync", "--all")
        opened[0].seek(0, os.SEEK_END)
        opened[0].write(whole * (mode == "wb") + b"u1x\n")
    scene.check_synced()
    assert scene.user_text().startswith(b"mine\n") and scene.user_text().endswith(b"u1x\n")


@needs_leases
def test_a_reader_does_not_keep_a_file_from_being_replaced(scene: Scene) -> None:
    with open(scene.file, "rb"):
        scene.home.sync()
        assert b"second" in scene.file.read_bytes()
    scene.check_synced()


# Unknown writers, and file systems that cannot exchange names


@pytest.fixture(params=["exchange", "link", "rename"])
def way_to_replace(request: Any, monkeypatch: Any) -> str:
    """Simulate a file system that cannot exchange names, or has no hard links either."""
    if request.param != "exchange":
        monkeypatch.setattr(orchestra, "swap_files", lambda *names: False)
    if request.param == "rename":
        monkeypatch.setattr(orchestra, "rename_exclusively", lambda *names: False)
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    return str(request.param)


def everything_below(folder: Path) -> bytes:
    return b"\n".join(contents(folder).values())


@pytest.mark.parametrize("change", ["update", "drop", "drop all of it"])
def test_what_is_written_to_a_file_of_unknown_writers_is_kept(
    home: Home, monkeypatch: Any, way_to_replace: str, change: str
) -> None:
    hide_writers(monkeypatch)
    scene = Scene(home, "" if change == "drop all of it" else "mine\n")
    if change != "update":
        home.register("shop/api", targets=[])
    aside = backups_folder(home) / ".aside"
    with open(scene.file, "ab", buffering=0) as opened:
        home.sync()
        opened.write(b"u1x\n")
        assert b"u1x" in everything_below(aside)
        assert home.sync().lines == [] and b"u1x" in everything_below(aside)
        opened.write(b"u2x\n")
    result = sync_later(home)
    assert (result.errors, result.has_files_aside, aside.exists()) == ((), False, False)
    assert user_words(home.backups()["CLAUDE.md"]) == {b"u1x", b"u2x"}
    assert home.leftovers() == []


def test_a_file_of_unknown_writers_goes_after_a_minute_without_a_change(
    scene: Scene, monkeypatch: Any, way_to_replace: str
) -> None:
    hide_writers(monkeypatch)
    scene.home.sync()
    aside = backups_folder(scene.home) / ".aside"
    assert sync_later(scene.home, orchestra.Turn.ASIDE_TIME - 30).has_files_aside and os.listdir(aside) != []
    assert not sync_later(scene.home, orchestra.Turn.ASIDE_TIME + 30).has_files_aside and not aside.exists()
    assert scene.home.backups() == {}
    scene.check_synced()


@pytest.mark.skipif(not IS_LINUX or not os.path.isdir("/dev/shm"), reason="needs a second file system")
def test_where_the_backups_are_on_another_disk_the_file_keeps_a_name_beside_the_new_one(
    home: Home, quick_home: Home, monkeypatch: Any
) -> None:
    if os.stat(home.path).st_dev == os.stat(quick_home.path).st_dev:
        pytest.skip("both are on one file system")
    scene = Scene(home)
    Path(orchestra.backups_root(home.path)).symlink_to(quick_home.path)
    hide_writers(monkeypatch)
    with open(scene.file, "ab", buffering=0) as opened:
        result = sync_later(home, 0)
        assert (result.errors, result.has_files_aside) == ((), True)
        opened.write(b"u1x\n")
    (left,) = scene.root.glob(".orchestra-kept-*.tmp")
    assert b"u1x" in left.read_bytes()
    assert sync_later(home, 0).has_files_aside and left.exists()
    assert not sync_later(home).has_files_aside and not left.exists()
    assert b"u1x" in home.backups()["CLAUDE.md"]
    assert Path(orchestra.codebase_lock_path(home.path, API)).read_bytes() == b""


def hold_open(file: Path, stdin: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start a process that holds a file open until it reads a line, then writes."""
    script = 'exec 3>> "$0"; echo open; read line; echo u1x >&3'
    process = subprocess.Popen(["sh", "-c", script, str(file)], stdin=stdin, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "open\n"
    return process


BUSY = "another program has it open for writing"


@needs_leases
@pytest.mark.parametrize("source", ["by leases", "by /proc"])
def test_a_file_that_another_program_writes_to_is_left_alone_and_synced_later(
    scene: Scene, monkeypatch: Any, source: str
) -> None:
    if source == "by /proc":
        monkeypatch.setattr(orchestra, "has_writer", lambda fd: None)
    before = scene.file.read_bytes()
    writer = hold_open(scene.file)
    ran = scene.home.run("sync", "--all")
    assert ran.complaints == [f"orchestra: shop/api: CLAUDE.md: {BUSY}"]
    assert (ran.status, scene.file.read_bytes(), scene.home.leftovers()) == (2, before, [])
    assert sync_later(scene.home, 0).retry
    writer.communicate("go\n", timeout=30)
    assert not sync_later(scene.home).errors
    assert scene.user_text().endswith(b"u1x\n") and b"second" in scene.file.read_bytes()


@needs_leases
@pytest.mark.parametrize("folder", ["shop/api", "other"])
def test_a_busy_file_that_is_to_lose_its_block_loses_it_later(scene: Scene, folder: str) -> None:
    home, root = scene.home, scene.home.code / folder
    put_files(root, {"code.py": ""})
    home.register("shop/api", path=str(root), targets=["codex"])
    with open(scene.file, "ab"):
        ran = home.run("sync", "--all")
    name = "CLAUDE.md" if folder == "shop/api" else scene.file
    assert (ran.status, ran.complaints) == (2, [f"orchestra: shop/api: {name}: {BUSY}"])
    assert folder == "other" or home.status_of() == "orphan"
    assert home.sync().lines[-1] == f"remove block shop/api {name}"
    assert scene.file.read_text() == "mine\n" and home.sync().lines == []


@needs_leases
def test_a_purge_that_meets_a_busy_file_says_how_to_finish_it(scene: Scene) -> None:
    with open(scene.file, "ab"):
        ran = scene.home.run("project", "remove", "api", "--purge")
    hint = re.search(r"try: fix that; orchestra (.*), then remove it again", ran.err)
    assert ran.status == 2 and hint
    scene.home.run_fine(*shlex.split(hint[1]))
    scene.home.run_fine("project", "remove", "api", "--purge")
    assert scene.file.read_text() == "mine\n"


@needs_leases
def test_a_restore_of_a_busy_file_names_it(scene: Scene) -> None:
    edit(scene.file, "- first", "- mine")
    scene.home.sync()
    with open(scene.file, "ab"):
        assert scene.home.run("restore", "api").complaints == [f"orchestra: {scene.file}: {BUSY}"]


@pytest.mark.parametrize("source", ["by leases", "not at all"])
def test_no_line_of_writers_that_go_on_all_the_time_is_lost(
    scene: Scene, monkeypatch: Any, source: str, way_to_replace: str
) -> None:
    home = scene.home
    if source == "not at all":
        hide_writers(monkeypatch)
    elif not IS_LINUX:
        pytest.skip("only Linux has read leases")

    def write_on(word: bytes, held: Any, is_over: Callable[[], bool]) -> int:
        for number in itertools.count():
            if is_over():
                return number
            with held or open(scene.file, "ab", buffering=0) as file:
                file.write(b"%b%d\n" % (word, number))
            time.sleep(0.0025)
        return 0

    def written() -> set[bytes]:
        return set(re.findall(rb"(?m)^(?:held|opened)\d+$", everything_below(home.folder)))

    for round_number in range(3):
        writers = [Child(functools.partial(write_on, b"opened", None))]
        with open(scene.file, "ab", buffering=0) as file:
            writers.append(Child(functools.partial(write_on, b"held", contextlib.nullcontext(file))))
        wait_until(lambda: b"held9" in written())
        home.register("shop/api", targets=["claude"] if round_number < 2 else [], notes=[f"change {round_number}"])
        home.run("sync", "--all")
        home.run("sync", "--all")
        counts = zip((b"opened", b"held"), [writer.stop() for writer in writers])
        lost = {b"%b%d" % (name, number) for name, count in counts for number in range(count)} - written()
        # A plain rename loses what is opened and saved in the same instant.
        assert not lost or (way_to_replace != "exchange" and not any(word.startswith(b"held") for word in lost))
        found = written()
        sync_later(home)
        assert written() >= found
        shutil.rmtree(orchestra.backups_root(home.path), ignore_errors=True)
        scene.file.write_bytes(b"mine\n")


# Kills in the instant of replacing


@pytest.mark.parametrize("end", [kill_now, refuse(errno.EIO)], ids=name_of)
def test_a_block_that_was_to_go_goes_at_the_next_sync(home: Home, end: Callable[[], None]) -> None:
    file = home.make_synced(description="of the registry", notes=[], targets=["claude"]) / "CLAUDE.md"
    file.write_bytes(b"mine\n" + file.read_bytes())

    def sync() -> None:
        with instants(file, [end]):
            home.run("sync", "--all")

    run_in_child(sync)
    assert b"of the registry" in file.read_bytes() and home.status_of() != "current"
    home.sync()
    assert file.read_bytes() == b"mine\n" and home.status_of() == "current"


@pytest.mark.parametrize("instant", ["before", "after"])
@pytest.mark.parametrize("save", [None, save_renaming, save_over, append], ids=name_of)
def test_a_kill_in_the_instant_of_replacing_loses_no_save(any_scene: Scene, save: Any, instant: str) -> None:
    def act() -> None:
        if save:
            save(any_scene.file, add(b"u1x"))
        if instant == "before":
            kill_now()

    assert run_in_child(lambda: any_scene.race([act], [kill_now])) == KILLED
    assert b"mine\n" in any_scene.file.read_bytes()
    any_scene.home.sync()
    assert any_scene.words() == ({b"u1x"} if save else set())
    assert b"mine\n" in any_scene.user_text()
    any_scene.check_synced()


@needs_leases
@pytest.mark.parametrize("end", [refuse(errno.EIO), refuse(KeyboardInterrupt()), kill_now], ids=name_of)
@pytest.mark.parametrize("operation", range(4))
def test_a_replacing_that_ends_half_way_leaves_the_old_text_or_the_new(
    scene: Scene, way_to_replace: str, end: Callable[[], None], operation: int
) -> None:
    def sync() -> None:
        with instants(scene.file, after=iter([*[int] * operation, end])), contextlib.suppress(KeyboardInterrupt):
            orchestra.run_pipeline(scene.home.path, orchestra.SyncScope.all())

    run_in_child(sync)
    assert scene.file.exists() or end is kill_now
    scene.home.sync()
    assert b"mine\n" in scene.file.read_bytes() and b"second" in scene.file.read_bytes()
    assert sync_later(scene.home).errors == () and scene.home.backups() == {} and scene.home.leftovers() == []


@needs_leases
def test_a_writer_whose_file_was_displaced_by_a_killed_sync_gets_it_back(scene: Scene) -> None:
    fifo = scene.home.folder / "fifo"
    os.mkfifo(fifo)
    writer = os.open(fifo, os.O_RDWR)
    hold = functools.partial(hold_open, scene.file, writer)
    assert run_in_child(lambda: scene.race([hold], [kill_now])) == KILLED
    assert b"second" in scene.file.read_bytes(), "the kill came before the exchange"
    ran = scene.home.run("sync", "--all")
    assert ran.status == 2 and BUSY in ran.err
    os.write(writer, b"go\n")
    wait_until(lambda: b"u1x" in scene.file.read_bytes())
    os.close(writer)
    wait_until(lambda: scene.home.run("sync", "--all").status == 0)
    assert scene.user_text().endswith(b"u1x\n")
    scene.check_synced()


# Editors that save in a loop, as processes of their own

RACE_SECONDS = [0.5, pytest.param(SOAK_SECONDS / 10, marks=pytest.mark.soak)]
WAYS_IN_PLACE = [save_over, save_patching, save_slowly, append]
WAYS_OF_EDITING = [save_renaming, save_anew, *(WAYS_IN_PLACE if IS_LINUX else [])]


def kept_words(home: Home, label: str = "shop/api", name: str = "CLAUDE.md") -> set[bytes]:
    """Return the user's words in the backups of a file."""
    words = set()
    for file in Path(orchestra.backups_root(home.path), label).glob(f"**/{name}"):
        with contextlib.suppress(FileNotFoundError):  # thinned out meanwhile
            words |= user_words(file.read_bytes())
    return words


class Saver:
    """A user who saves whole files.

    Each save has its own word outside the block, some have one inside it. Nothing is
    lost if the word outside is in the file, and the one inside there or in the backups.
    The user waits for that before the next save, which overwrites the words.
    """

    def __init__(self, file: Path, kept: Callable[[], set[bytes]], save: Save) -> None:
        self.file, self.kept, self.save = file, kept, save
        self.random = random.Random(1)
        self.number = 0
        self.lost: list[str] = []
        self.blocks: set[bytes] = set()

    def next_word(self) -> bytes:
        self.number += 2
        return b"u%07dx" % self.number

    def change(self, data: bytes) -> bytes:
        parts = cut_up(data) or Parts(data)
        block = parts.block or b""
        self.outside = self.next_word()
        self.inside = b"u%07dx" % (self.number + 1) if block and self.number % 8 == 0 else b""
        if block:
            self.blocks.add(with_one_space(re.sub(rb"u\d+x\n", b"", block)))
            block = block.replace(BEGIN, BEGIN + b"\n" + self.inside, 1) if self.inside else block
        return re.sub(rb"u\d+x", self.outside, parts.head) + block + parts.tail

    def rest(self) -> None:
        """Pause briefly, but now and then long enough for a sync."""
        time.sleep(self.random.random() * 0.004 * (40 if self.random.random() < 0.1 else 1))

    def is_safe(self) -> bool:
        data = self.file.read_bytes() if self.file.exists() else b""
        parts = cut_up(data)
        is_outside = parts and self.outside in parts.head
        if self.file.suffix == ".yaml":
            is_outside = is_outside or self.outside in self.kept()
        return bool(is_outside) and (not self.inside or self.inside in data or self.inside in self.kept())

    def run(self, is_over: Callable[[], bool]) -> tuple[int, int, list[str]]:
        while not is_over():
            self.save(self.file, self.change)
            self.rest()
            try:
                wait_until(self.is_safe)
            except AssertionError:
                self.lost.append(f"save {self.number} of {self.file}")
                if not self.file.exists() or b"mine" not in self.file.read_bytes():
                    break
        return self.number // 2, len(self.blocks), self.lost


class Appender(Saver):
    """A user who appends lines; each is in the file or in the backups in the end."""

    def run(self, is_over: Callable[[], bool]) -> tuple[int, int, list[str]]:
        while not is_over():
            append(self.file, add(self.next_word()))
            self.rest()
        return self.number // 2, 2, []


def stir(live: Home, labels: list[str], seconds: float, act: Callable[[], None] = lambda: None) -> int:
    """Keep changing the registry while daemon and commands sync; count the changes."""
    deadline, dice = time.monotonic() + seconds, random.Random(2)
    seen: dict[str, set[str]] = {label: set() for label in labels}
    commands: list[Any] = []
    number = 0
    # Until each was written three times: less proves nothing.
    while time.monotonic() < deadline or (min(map(len, seen.values())) < 3 and time.monotonic() < deadline + 20):
        number += 1
        label = labels[number % len(labels)]
        live.save(label, note=f"note {number}")
        seen[label] |= set(re.findall(r"note \d+", live.read(label)))
        act()
        if all(command.poll() is not None for command in commands[-2:]):
            commands += [live.start("sync", "--all") for _ in range(2)]
        time.sleep(dice.random() * 0.03)
    for command in commands:
        ran = finish(command)
        assert "Traceback" not in ran.err
        # Only a writer that keeps the file open may make a sync fail.
        way_out = (BUSY, "it kept changing while Orchestra was writing it")
        others = [line for line in ran.complaints if not line.endswith(way_out)]
        assert others == [] and ran.status == (2 if ran.complaints else 0), ran
    return number


def settle(live: Home, labels: list[str]) -> None:
    """Wait for the last change, and check that everything is current."""
    for label in labels:
        live.save(label, note="the last")
    wait_until(lambda: live.status()["queue_depth"] == 0)
    ran = live.run_script("sync", "--all")
    assert ran.status == 0, ran
    assert all(live.has("the last", label) for label in labels)
    assert live.run_script("status", "--check").status == 0
    assert not any(map(is_temporary, take_picture(live.folder)))


def print_soak(capsys: Any, seconds: float, text: str) -> None:
    if seconds > 1.5:
        with capsys.disabled():
            print(f"\n{text}")


@pytest.mark.parametrize(
    ("ways", "seconds"),
    [
        pytest.param(WAYS_OF_EDITING, 1.5, id="all"),
        *(pytest.param([way], SOAK_SECONDS / 10, id=name_of(way), marks=pytest.mark.soak) for way in WAYS_OF_EDITING),
    ],
)
def test_what_editors_save_during_syncs_is_not_lost(served: Home, capsys: Any, ways: list[Any], seconds: float) -> None:
    savers = {}
    for number, way in enumerate(ways):
        label = f"shop/c{number}"
        served.save(label)
        file = served.code / label / "CLAUDE.md"
        put_files(file.parent, {"CLAUDE.md": "mine: u0000000x\n\n", "code.py": ""})
        savers[label] = (Appender if way is append else Saver)(file, lambda at=label: kept_words(served, at), way)
    assert served.run_script("sync", "--all").status == 0
    children = {label: Child(saver.run) for label, saver in savers.items()}
    try:
        changes = stir(served, list(savers), seconds)
    finally:
        results = {label: child.stop() for label, child in children.items()}
    assert [lost for _, _, many in results.values() for lost in many] == [], results
    settle(served, list(savers))
    for label, (saves, blocks, _) in results.items():
        saver, name = savers[label], name_of(savers[label].save)
        appends = isinstance(saver, Appender)
        words = {b"u%07dx" % (number * 2) for number in (range(1, saves + 1) if appends else [saves])}
        in_file = user_words(saver.file.read_bytes())
        assert words <= in_file | (saver.kept() if appends else set()), f"{name}: {words - in_file}"
        assert saves > 5, name
        counted = f"{saves} saves, {blocks} versions met, {changes} changes, {len(words - in_file)} only in the backups"
        print_soak(capsys, seconds, f"{name}: {counted}")


# Several syncs at once, and a removal during syncs


@pytest.mark.parametrize("seconds", RACE_SECONDS)
def test_daemon_and_commands_at_once_leave_whole_files(served: Home, capsys: Any, seconds: float) -> None:
    labels = [f"shop/c{number}" for number in range(5)]
    files = [served.code / label / "CLAUDE.md" for label in labels]
    for label, file in zip(labels, files):
        served.save(label)
        replace(file, "u1x mine\n")
    looks = itertools.count()

    def look() -> None:
        for file in files:
            parts = cut_up(file.read_bytes())
            assert parts and parts.head.startswith(b"u1x mine\n") and parts.tail in (b"", b"\n"), parts
            next(looks)

    changes = stir(served, labels, seconds, look)
    settle(served, labels)
    assert [kept_words(served, label) for label in labels] == [set()] * 5
    print_soak(capsys, seconds, f"{changes} changes, {next(looks)} looks")


@pytest.mark.parametrize("seconds", RACE_SECONDS)
def test_a_codebase_removed_during_syncs_stays_as_the_removal_left_it(served: Home, seconds: float) -> None:
    root = served.code / "shop/api"
    text = served.text().replace("[claude]", f"[{', '.join(ALL_TARGETS)}]")
    deadline, rounds = time.monotonic() + seconds, 0
    while rounds < 2 or time.monotonic() < deadline:
        rounds += 1
        purge = rounds % 2 == 0
        put_files(root, {"CLAUDE.md": "u1x mine\n"})
        put_files(served.projects, {"shop/api.yaml": text + f"- round {rounds}\n"})
        syncs = [served.start("sync", "--all") for _ in range(2)]
        ran = served.run_script("project", "remove", "api", *["--purge"] * purge)
        assert ran.status == 0, ran
        for sync in syncs:
            said = finish(sync)
            assert "Traceback" not in said.err and said.status in (0, 2), said
        wait_until(lambda: served.status()["queue_depth"] == 0)
        assert not served.file().exists()
        found = {path: seen.data for path, seen in take_picture(str(root)).items() if seen.kind == "file"}
        assert not any(map(is_temporary, found))
        if purge:
            assert found == {"CLAUDE.md": b"u1x mine\n"}
            assert not served.record.exists()
        else:
            assert found["CLAUDE.md"].startswith(b"u1x mine\n") and cut_up(found["CLAUDE.md"])


# The registry's own files


@pytest.mark.parametrize("seconds", RACE_SECONDS)
@pytest.mark.parametrize("save", [save_renaming, save_over, save_slowly], ids=name_of)
def test_what_an_editor_saves_of_a_registry_file_during_init_is_not_lost(
    live: Home, capsys: Any, save: Save, seconds: float
) -> None:
    file = live.save(note="mine u0000000x  # u0000000x")
    root, environ = str(live.code / "shop/api"), {"HOME": live.path}
    child = Child(Saver(file, lambda: kept_words(live, name="api.yaml"), save).run)
    deadline, rounds = time.monotonic() + seconds, 0
    try:
        while rounds < 5 or time.monotonic() < deadline:
            rounds += 1
            kind = ("backend", "frontend")[rounds % 2]
            orchestra.main(["init", root, "-p", "shop", "-t", kind], environ)
    finally:
        saves, _, lost = child.stop()
    assert lost == [], f"{len(lost)} of {saves} saves are lost"
    assert b"u%07dx" % (saves * 2) in file.read_bytes(), "the last save is not in the file"
    assert "Traceback" not in capsys.readouterr().err
    print_soak(capsys, seconds, f"{name_of(save)}: {saves} saves, {rounds} of init")


@pytest.mark.parametrize("function", ["load_codebase", "edit_yaml", "the replacing"])
@pytest.mark.parametrize("save", [save_renaming, save_over], ids=name_of)
def test_a_save_of_a_registry_file_while_init_changes_it_is_not_lost(home: Home, save: Any, function: str) -> None:
    root = home.make_codebase("shop/api", notes=["mine"])
    file = Path(orchestra.codebase_path(home.path, API))
    acts = iter([lambda: save(file, lambda data: data.replace(b"mine", b"u1x"))])
    with ExitStack() as stack:
        if function == "the replacing":
            stack.enter_context(instants(file, acts))
        else:
            stack.enter_context(watching([function], after=lambda call: next(acts, int)()))
        home.run("init", str(root), "-p", "shop", "-t", "mobile")
    assert list(acts) == []
    assert user_words(file.read_bytes()) == {b"u1x"}


# A clock that jumps back


def test_under_a_clock_that_jumps_back_each_edit_is_kept_and_can_be_restored(home: Home) -> None:
    root = home.make_synced("shop/api", targets=["cline"])
    registry, clock, edits = home.registry(), Clock(2e9), []
    for jump in (0, 0, -1e9, 0, 5e8, -1e-6, 1e9, -1.5e9):
        clock.now += jump
        edits.append(b"u%dx\n" % len(edits))
        (root / CLINE).write_bytes(edits[-1])
        result = orchestra.sync_codebase(home.path, registry.codebases[API], registry.owners, clock=clock)
        assert result.written == [CLINE] and not result.errors
    when = {backup.file: backup.when for backup in orchestra.Backups(home.path, API).versions()}
    assert sorted(Path(file).read_bytes() for file in when) == edits
    for file, time_kept in when.items():
        home.run_fine("restore", "api", CLINE, "--at", time_kept)
        assert (root / CLINE).read_bytes() == Path(file).read_bytes()
    assert home.staleness()["last_sync_age"] >= 0


# ── Sharing ───────────────────────────────────────────────────────────────────

# Where a registry's clone lies, what links to it, and where it has a project's files.
CLONES = {
    "the registry": ("home/.orchestra/projects", "", "shop/"),
    "the registry, linked": ("dotfiles", "home/.orchestra/projects", "shop/"),
    "a project's folder": ("home/.orchestra/projects/shop", "", ""),
    "a project's folder, linked": ("home/My $(touch PW)/team", "home/.orchestra/projects/shop", ""),
}


def commit(repository: Path, files: dict[str, Any], *options: str) -> None:
    put_files(repository, files)
    run_git(repository, "add", "-A")
    run_git(repository, "commit", "-qm", "x", *options)


def make_repository(path: Path, files: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    run_git(path, "init", "-q")
    commit(path, files)
    return path


def fail_to(*argv: Any) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        run_git(*argv)


@pytest.mark.parametrize(("place", "link", "prefix"), CLONES.values(), ids=CLONES)
def test_init_says_what_git_should_ignore(home: Home, place: str, link: str, prefix: str) -> None:
    clone = home.folder / place
    clone.parent.mkdir(parents=True, exist_ok=True)
    make_repository(clone, {"README.md": ""})
    if link:
        (home.folder / link).parent.mkdir(parents=True)
        (home.folder / link).symlink_to(clone)
    for name in ("api", "web"):
        (home.code / name).mkdir()
        ran = home.run_fine("init", str(home.code / name), "-p", "shop")
        found = re.fullmatch(r"note: git keeps this registry; .*: (echo '\*\.local\.\*' >> .+)\n", ran.err)
        assert bool(found) == (name == "api"), ran.err
        if found:
            subprocess.run(["sh", "-c", found[1]], check=True, env=home.variables())
            assert home.run_fine("init", str(home.code / name), "-p", "shop").err == ""
    put_files(clone, {f"{prefix}api.local.yaml": ""})
    status = subprocess.check_output(["git", "status", "--porcelain"], cwd=clone, text=True)
    assert ".gitignore" in status and "local" not in status
    note = "note: git keeps this registry: once you push the removal, shop/api is gone for everybody\n"
    assert home.run_fine("project", "remove", "api").err == note


def test_a_home_folder_in_git_is_not_a_registry_in_git(home: Home) -> None:
    put_files(Path(home.path), {".git": None})
    assert home.run_fine("init", str(home.code), "-p", "shop").err == ""


@pytest.mark.parametrize(("place", "link", "prefix"), CLONES.values(), ids=CLONES)
def test_a_daemon_follows_what_git_does_to_the_registry(home: Home, place: str, link: str, prefix: str) -> None:
    def texts(note: str, *names: str) -> dict[str, Any]:
        return {f"{prefix}{name}.yaml": home.text(f"shop/{name}", note) for name in names}

    api, clone = f"{prefix}api.yaml", home.folder / place
    upstream = make_repository(home.code / "upstream", texts("first", "api", "web"))
    daemon = home.start_daemon()
    home.wait_for_start_job()
    run_git(home.code, "clone", "-q", str(upstream), str(clone))
    if link:
        with contextlib.suppress(OSError):
            (home.folder / link).rmdir()
        (home.folder / link).symlink_to(clone)
    wait_for(home, "first", "shop/api", "shop/web")

    commit(upstream, texts("pulled", "api"))
    run_git(clone, "pull", "-q")
    wait_for(home, "pulled")
    run_git(clone, "checkout", "-qb", "topic")
    commit(clone, texts("of a branch", "api"))
    wait_for(home, "of a branch")
    run_git(clone, "checkout", "-q", "one")
    wait_for(home, "pulled")

    for how, take in (("--no-rebase", "--theirs"), ("--rebase", "--ours")):
        commit(clone, texts(f"mine {how}", "api"))
        wait_for(home, f"mine {how}")
        commit(upstream, texts(f"other {how}", "api", "web"))
        fail_to(clone, "pull", "-q", how)
        wait_for(home, f"other {how}", "shop/web")
        wait_until(lambda: home.status()["problems"])
        (problem,) = home.status()["problems"]
        line = (clone / api).read_text().split("\n").index("<<<<<<< HEAD") if how == "--no-rebase" else 4
        assert (problem["where"], problem["message"]) == (
            f"~/.orchestra/projects/shop/api.yaml:{line + 1}",
            "yaml: found git's conflict markers: finish the merge first",
        )
        assert home.has(f"mine {how}") or home.has(f"other {how}")
        assert (home.status_of(), home.status_of("shop/web")) == ("error", "current")
        run_git(clone, "checkout", take, api)
        run_git(clone, "add", api)
        run_git(clone, *(("commit", "-qm", "x") if how == "--no-rebase" else ("rebase", "--skip")))
        run_git(upstream, "pull", "-q", str(clone), "one")
        wait_for(home, f"other {how}")
        wait_until(lambda: home.status()["problems"] == [])

    put_files(clone, texts("untracked", "new"))
    wait_for(home, "untracked", "shop/new")
    run_git(clone, "clean", "-qfd")
    wait_until(lambda: home.status()["codebases"] == ["api", "web"])
    home.stop(daemon)
    assert len(home.complaints()) == 2 and all("conflict markers" in line for line in home.complaints())
    assert home.sync().lines == [] and home.leftovers() == []


ORDERS = """\
name: api
path: ~/code/shop/api
description: Orders

targets: [claude, cursor]

notes:
- first
"""


def share(home: Home, clone: Path) -> None:
    """Commit, pull and push, as people do; raises CalledProcessError in a conflict."""
    wait_until(lambda: home.sync("--all", "--dry-run").lines == [])  # also with a newer text of the other's
    run_git(clone, "add", "-A")
    with contextlib.suppress(subprocess.CalledProcessError):  # there may be nothing to commit
        run_git(clone, "commit", "-qm", "x")
    run_git(clone, "pull", "-q", "--no-rebase", "--no-edit")
    run_git(clone, "push", "-q")


@pytest.fixture
def team() -> Iterator[list[Home]]:
    """Two homes, each with clones of one registry and of one codebase, and a daemon."""
    with ExitStack() as cleanup:
        homes = [Home(tempfile.mkdtemp(prefix="orc", dir="/tmp")) for _ in range(2)]
        central = homes[0].folder / "central"
        for home in homes:
            cleanup.enter_context(home.cleanup)
            home.code = Path(home.path) / "code"
        for name, files in (("registry", {"shop/api.yaml": ORDERS}), ("api", {"README.md": "# api\n"})):
            make_repository(homes[0].folder / name, files)
            run_git(homes[0].folder, "clone", "-q", "--bare", name, str(central / name))
        for home in homes:
            run_git(home.folder, "clone", "-q", str(central / "registry"), str(home.projects))
            run_git(home.folder, "clone", "-q", str(central / "api"), str(home.code / "shop/api"))
            home.start_daemon()
            home.wait_for_start_job()
            assert home.has("first")
            share(home, home.code / "shop/api")
        yield homes
        for home in homes:
            home.stop(home.daemons[0])


def check_same(team: list[Home], *notes: str) -> None:
    for home in team:
        wait_until(lambda: all(note in home.read() for note in notes), describe=home.read)  # noqa: B023
        assert home.run_fine("status", "--check").err == home.run_fine("sync", "--all").err == ""
        # The daemon may see the merge before it is finished.
        assert [c for c in home.complaints() if "finish the merge" not in c] == [] and home.leftovers() == []
    for place in ("projects", "code"):
        one, two = ({p: d for p, d in contents(getattr(home, place)).items() if ".git/" not in p} for home in team)
        assert one == two


@pytest.mark.parametrize("order", [("projects", "code"), ("code", "projects")], ids=" first, then ".join)
def test_two_who_edit_one_registry_in_turns_have_the_same_files(team: list[Home], order: tuple[str, str]) -> None:
    for number, (writer, reader) in enumerate([team, team[::-1], team]):
        note = f"save {number}"
        edit(writer.file(), "- first", f"- first\n- {note}")
        wait_for(writer, note)
        for home in (writer, reader):
            for place in order:
                share(home, home.projects if place == "projects" else home.code / "shop/api")
        check_same(team, note)


@pytest.mark.parametrize("choice", ["--ours", "--theirs"])
def test_two_who_edit_one_registry_at_once_have_the_same_files(team: list[Home], choice: str) -> None:
    one, two = team
    edit(one.file(), "Orders", "Orders and payments")
    edit(two.file(), "- first", "- first\n- second")
    wait_until(lambda: "payments" in one.read() and two.has("second"))
    for home, clone in ((one, one.projects), (one, one.code / "shop/api"), (two, two.projects)):
        share(home, clone)
    wait_until(lambda: "payments" in two.read())
    code = two.code / "shop/api"
    with pytest.raises(subprocess.CalledProcessError):
        share(two, code)  # both wrote the block
    assert (code / ".git/MERGE_HEAD").exists()
    run_git(code, "checkout", choice, ".")
    two.sync("api")
    share(two, code)
    for clone in (one.projects, one.code / "shop/api"):
        share(one, clone)
    check_same(team, "payments", "- second")


def test_what_git_clean_takes_away_makes_a_codebase_absent_and_nothing_worse(home: Home) -> None:
    home.projects.mkdir(parents=True)
    make_repository(home.projects, {"shop/api.yaml": "name: api\npath: ~/their/api\n", ".gitignore": "*.local.*\n"})
    root = home.code / "api"
    root.mkdir()
    home.run_fine("init", str(root), "-p", "shop", "--sync")
    before = contents(root)
    run_git(home.projects, "clean", "-qfdX")
    assert home.sync().lines == [] and home.status_of() == "absent" and contents(root) == before
    home.run_fine("init", str(root), "-p", "shop", "--sync")
    assert home.status_of() == "current" and contents(root) == before and home.backups() == {}


# ── Fuzzing ───────────────────────────────────────────────────────────────────

# No bytes, however odd, make more than a problem. Each test tries some inputs whose
# seeds never change; marked soak, it tries new ones. ORCHESTRA_SEED=N begins with N.

MOST_BYTES = 64 << 10  # of an input
MOST_SECONDS = 2.0  # of the processor, for one input
MOST_MEMORY = 256 << 20  # bytes that a test's inputs may add to the peak


class Dose:
    """How many inputs a test tries."""

    def __init__(self, is_soak: bool) -> None:
        self.is_soak = is_soak
        self.seed = 0
        self.tried = 0

    def inputs(self, count: int) -> Iterator[random.Random]:
        """Yield a random generator per input: `count`, or as many as a soak has time for."""
        deadline = time.monotonic() + SOAK_SECONDS
        first = SEED or (time.time_ns() // 1000 if self.is_soak else 0)
        while time.monotonic() < deadline if self.is_soak else self.tried < count:
            self.seed = first + self.tried
            yield random.Random(self.seed)
            self.tried += 1


@pytest.fixture(params=["some", pytest.param("soak", marks=pytest.mark.soak)])
def dose(request: Any) -> Iterator[Dose]:
    dose = Dose(request.param == "soak")
    yield dose
    print(f"{request.node.name}: {dose.tried} inputs were fine, the last one tried was ORCHESTRA_SEED={dose.seed}")


def mutate(dice: random.Random, data: bytes, tokens: Sequence[bytes], others: Sequence[bytes]) -> bytes:
    """Flip, delete, insert, repeat and splice some pieces."""
    for _ in range(dice.choice((1, 1, 2, 3, 5, 10, 30))):
        start = dice.randint(0, len(data))
        piece = data[start : start + dice.choice((0, 0, 1, 1, 2, 5, 20, 100))]
        end = start + len(piece)
        other = dice.choice(others)
        other = other[dice.randint(0, len(other)) :]
        pieces = (
            b"",
            bytes(byte ^ 1 << dice.randrange(8) for byte in piece),
            bytes(dice.choices(range(256), k=dice.randint(1, 4))),
            dice.choice(tokens),
            dice.choice(tokens) + piece + dice.choice(tokens),
            piece * dice.choice((2, 3, 10, 100)),
            (dice.choice(tokens)[:100] * dice.choice((1, 1, 1, 2, 50, 3000)))[:MOST_BYTES],
            other[: dice.choice((5, 50, 500))],
        )
        data = data[:start] + dice.choice(pieces) + data[end:]
    return data[:MOST_BYTES]


@contextmanager
def bounded() -> Iterator[None]:
    """Check that the inputs of a test take little memory: the process's peak hardly grows."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget earlier peaks: proc(5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1024 if IS_LINUX else 1) < MOST_MEMORY


ODD_CHARACTERS = (
    *("x", " ", "\n", "\n\n", "\r\n", "\r", "\t", "\0", "\x01", "\x0b", "\x0c", "\x1b", "\x1c", "\x7f", "\x85", "\xa0"),
    *("\u2028", "\ufeff", "\ufffe", "\uffff", "e\u0301", "Ünï", "\N{GRINNING FACE}", "'", '"', "`", "\\", "#", "~"),
    *("%", "<", ">", "-", "&", "|", "*", "{x}", "[x]", "\x1b[31m", "long " * 300),
)
ODD_BYTES = (*(text.encode() for text in ODD_CHARACTERS), b"\xff", b"\xef", b"\xef\xbb\xbb", b"\xed\xa0\x80")
ODD_TEXTS = (
    *(*ODD_CHARACTERS, "", "``", "```", "\n```sh\n", "~~~", "\\`", "@AGENTS.md", "@x"),
    *("<!--", "-->", "<!-", "--!>", orchestra.BLOCK_BEGIN, orchestra.BLOCK_END, "\n" + orchestra.BLOCK_END),
    *("null", "1.10", "0x1F", "yes", "2026-03-01T00:00:00Z", "12:30", "=", "<<", "- x", "# x", "? ", ": ", "a: b"),
    *("a:", "%YAML 1.2", "---", "...", "&a", "*a", "!x"),
)


def odd_text(dice: random.Random) -> str:
    return "".join(dice.choices(ODD_TEXTS, k=dice.choice((1, 1, 2, 3, 6))))


# The registry

REGISTRY_TEXTS = (
    b"""\
# one comment
name: api
path: /code/api   # another
description: Orders and payments
targets: [claude, codex, cursor, team]
commands: {build: make, test: 'make test'}
conventions: ["Money is integer cents", Never `rm`]
notes:
- |
  several
    lines
- >-
  folded
  text
skills: [{id: sql, description: Postgres 16}]
colour: &c {deep: [1, 2.0, yes, *d]}
custom_targets:
  team: {path: .team/rules.md, owns: file, header: "---\\nalways: true\\n---\\n", limit: 9 lines}
projects:
- {name: web, project_type: frontend, path: packages/web, commands: {run: vite}, notes: [n]}
- name: api
  project_type: backend
  tasks:
  - {id: T-1, title: Ship v2, status: in_progress, description: "soon\\n<!-- orchestra:end -->", due: 2026-03-01}
  agents:
  - agent_id: reviewer
    entry_point: AGENT/reviewer.md
    skills: [sql]
created_at: 2026-03-01T00:00:00Z
updated_at: 2026-03-01T00:00:00Z
""".replace(b", *d", b""),
    b"name: api\npath: ~/code/api\nnotes: [&a x, *a, *a]\nskills: &s [{id: *a}]\nmine: *s\nother: &t {a: *s, b: *s}\n",
    b'\xef\xbb\xbf%YAML 1.1\n---\n"name": "api"\r\n? path\r\n: "/\\u00e9\\x41\\N"\r\ntargets: []\r\n'
    b"notes: !!seq [!x y]\r\n...\r\n",
    b"name: api\npath: /x\nmine: {a: , b: [x, {c}]}\nskills: [{id: s, due: }]\nprojects: []\n",
    b"name: api\npath: /x\nnotes: ['null', '~', '<<', '']\ncommands: {'<<': '', '~': \"a\\Nb\\nc\"}\n",
    b"{name: api, path: /x, description: null, targets: ~, commands: {}, notes: [], projects: []}",
    b"description: of the shop\ntargets: [gemini]\ncommands:\n  build: make\n  lint: |\n    a\n    b\n"
    b"conventions: [ours]\n",
)
BROKEN_TEXTS = (
    *(b"commands: {'a': x, \"\\e[31m\\n\": [x]}", b"mine: &a [x, *a]", b"mine: " + b"[" * 2000 + b"]" * 2000),
    *(b'notes: ["\\ud800"]', b'notes: ["\\U00110000"]', b"notes: [\0]", b"notes: [\xff]", b"<<: {a: b}"),
)
YAML_PIECES = (
    *(b"- ", b"? ", b": ", b":", b", ", b",", b"[", b"]", b"{", b"}", b"[],", b"{},", b"a,", b"a: ", b"[a, ", b"{a: "),
    *(b"&a ", b"*a", b"*a : ", b"!x ", b"!!str ", b"!!seq ", b"!!binary ", b"!<", b"'' ", b'"" ', b"''", b'"\\\n'),
    *(b" #", b"|\n", b">-\n", b"|2+\n", b"- x\n", b"a: b\n", b"x\n", b"a:\n ", b"- - ", b"? a\n", b"---\n", b"...\n"),
    *(b"--- ", b"--- a\n...\n", b"%YAML 1.2\n", b"<<: ", b"\\N", b"  "),
)
REGISTRY_TOKENS = (
    *(*ODD_BYTES, *YAML_PIECES, b"null", b"0", b"-1", b"1e999", b'"\\ud800"', b'"\\U00110000"', b'"\\UFFFFFFFF"'),
    *(b'"\\0\\r\\n\\N\\L"', b'"\\x"', b"name: ", b"path: /", b"\npath: /a\x85b\n", b"\ntargets: ", b"\nprojects:\n- "),
    *(b"\ntasks: ", b"\nnotes: ", b"status: ", b"[&a [*a]]", b"[" * 99, b"{a: " * 99, b"? " * 99, b"- " * 99, END),
)
STATUSES = (*orchestra.TASK_STATUSES, *orchestra.TASK_STATUS_ALIASES)


def odd_values(dice: random.Random) -> dict[str, Any]:
    """Make a codebase of odd texts, all in their right places."""

    def texts() -> list[str]:
        return [odd_text(dice) for _ in range(dice.choice((0, 1, 2, 3)))]

    def role() -> dict[str, Any]:
        return {"agent_id": odd_text(dice) or "r", "entry_point": odd_text(dice), "skills": texts()}

    def task() -> dict[str, Any]:
        task = {name: odd_text(dice) for name in ("id", "title", "description", "due", "created_at")}
        return {**task, "id": task["id"] or "T", "title": task["title"] or "t", "status": dice.choice(STATUSES)}

    def component() -> dict[str, Any]:
        kind = dice.choice(orchestra.PROJECT_TYPES)
        own = {"path": dice.choice(("web", "packages/web", odd_text(dice))), "description": odd_text(dice)}
        own.update({"commands": {"k": odd_text(dice)}, "conventions": texts(), "notes": texts()})
        part = {"name": odd_text(dice) or "x", "project_type": kind, "tasks": [task()], "agents": [role()], "k": None}
        return {**part, **(own if dice.random() < 0.3 else {})}

    def custom_target() -> dict[str, Any]:
        path = dice.choice((".team/rules.md", "TEAM.md", odd_text(dice)))
        header = dice.choice(("", f"---\nx: {odd_text(dice)}\n---\n", odd_text(dice)))
        return {"path": path, "owns": dice.choice(("file", "block")), "header": header, "limit": "9 lines"}

    values = {
        "description": odd_text(dice),
        "targets": [*dice.sample(ALL_TARGETS, dice.randrange(9)), *["team"] * dice.choice((0, 0, 0, 1))],
        "custom_targets": {"team": custom_target()},
        "commands": {name or "k": odd_text(dice) for name in texts()},
        "conventions": texts(),
        "notes": texts(),
        "skills": [{"id": name or "s", "description": odd_text(dice)} for name in texts()],
        "projects": [component() for _ in range(dice.choice((0, 1, 2)))],
        "created_at": odd_text(dice),
        "mine": dice.choice((5, 1.5, True, None, {"a": [odd_text(dice), 1]}, odd_text(dice))),
    }
    chosen = dice.sample(sorted(values), dice.randint(1, len(values)))
    return {"name": "api", "path": "/" + odd_text(dice).replace("\0", ""), **{name: values[name] for name in chosen}}


def odd_registry_text(dice: random.Random) -> bytes:
    """Make a registry file that can be read, nearly so, or not at all."""
    data = dice.choice(REGISTRY_TEXTS)
    if dice.random() < 0.5:
        style: dict[str, Any] = {"default_flow_style": dice.choice((True, False)), "allow_unicode": dice.random() < 0.5}
        style["default_style"] = dice.choice((None, None, "'", '"', "|", ">"))
        data = yaml.safe_dump(odd_values(dice), sort_keys=False, width=dice.choice((20, 1000)), **style).encode()
    if dice.random() < 0.6:
        data = mutate(dice, data, REGISTRY_TOKENS, REGISTRY_TEXTS)
    if dice.random() < 0.1:
        wide = data.decode("utf-8", "replace").encode("utf-16")
        data = dice.choice((data.replace(b"\n", b"\r\n"), wide, data.rstrip()))
    return data


def meaning_of(value: Any) -> Any:
    """Return what a codebase says, whatever its file looks like."""
    if isinstance(value, yaml.Node):
        return orchestra.digest_node(value)
    if hasattr(value, "_asdict"):
        fields = {name: item for name, item in value._asdict().items() if name != "digest"}
        return {name: meaning_of(dict(item) if name == "extra" else item) for name, item in fields.items()}
    if isinstance(value, dict):
        return {name: meaning_of(item) for name, item in value.items()}
    return [meaning_of(item) for item in value] if isinstance(value, tuple) else value


def check_text_for_agents(codebase: orchestra.Codebase, has_import: bool) -> None:
    """Check that no text for agents gets out of its block."""
    importing = ["CLAUDE.md"] if has_import else []
    files = orchestra.render_files(codebase, importing=importing)
    assert files == orchestra.render_files(codebase, importing=importing)
    managed = orchestra.managed_files(codebase)
    for path, data in files.items():
        agent = managed[path]
        if agent.owned:
            assert orchestra.find_block(data) is None and data.count(b"<!--") == data.count(b"-->") == 1
            continue
        assert data.startswith(BEGIN + b"\n\n") and data.endswith(b"\n\n" + END)
        assert data.count(b"<!--") == data.count(b"-->") == 3
        for text in (data, data.replace(b"\n", b"\r\n")):
            head = b"mine\n\n"
            assert orchestra.find_block(head + text + b"\n\nmine\n") == slice(len(head), len(head) + len(text))


def check_save(home: str, codebase: orchestra.Codebase) -> orchestra.Codebase:
    orchestra.save_codebase(home, codebase)
    again = orchestra.load_codebase(home, *codebase.key)
    assert meaning_of(again) == meaning_of(codebase)
    return again


def changed_at_random(dice: random.Random, codebase: orchestra.Codebase) -> orchestra.Codebase:
    changes: list[dict[str, Any]] = [
        {"description": odd_text(dice), "updated_at": odd_text(dice)},
        {"notes": (*codebase.notes, odd_text(dice)), "conventions": codebase.conventions[1:]},
        {"targets": dice.choice((None, (), ("claude",))), "commands": (("k", odd_text(dice)), ("l", odd_text(dice)))},
        {"skills": (orchestra.Skill("s", odd_text(dice)),), "projects": (), "notes": ()},
        {"projects": tuple(component._replace(tasks=component.tasks[1:]) for component in codebase.projects)},
    ]
    return codebase._replace(**dice.choice(changes))


FINE = "name: fine\npath: /a/path/that/is/made/nowhere/else\n"


def test_any_bytes_in_the_registry_make_a_codebase_or_problems(live: Home, loader: str, dose: Dose) -> None:
    live.save("blog/fine").write_text(FINE)
    read = 0
    text = b""
    with bounded():
        for line in BROKEN_TEXTS:
            live.write_registry("shop/api.yaml", b"name: api\npath: /x\n" + line)
            assert not check_registry(live.path, random.Random(0))
        for dice in dose.inputs(100 if loader == "libyaml" else 25):
            for name, odds in (("api", 1.0), ("web", 0.3), ("project", 0.2)):
                live.file(f"shop/{name}").unlink(missing_ok=True)
                if dice.random() < odds:
                    text = text if name == "web" and dice.random() < 0.5 else odd_registry_text(dice)
                    text = text.replace(b"name: api\n", f"name: {name}\n".encode())
                    live.file(f"shop/{name}").write_bytes(text)
            read += check_registry(live.path, dice)
    assert read > dose.tried / 5


def check_registry(home: str, dice: random.Random) -> bool:
    """Read a registry with some odd files; return whether api could be read."""
    started = time.process_time()
    registry = orchestra.load_registry(home)
    assert ("blog", "fine") in registry.codebases
    for problem in registry.problems:
        assert str(problem).isprintable(), problem
        assert re.match(r"~/\.orchestra/projects/.+?:\d+: .", str(problem)), problem
    for codebase in registry.codebases.values():
        check_text_for_agents(codebase, dice.random() < 0.5)
    assert time.process_time() - started < MOST_SECONDS
    orchestra.run_pipeline(home, orchestra.SyncScope.all(), orchestra.SyncMode(dry_run=True), registry)
    is_readable = API in registry.codebases
    if is_readable and dice.random() < 0.5:
        check_save(home, changed_at_random(dice, check_save(home, orchestra.load_codebase(home, *API))))
    return is_readable


# What a JSON Schema cannot say of a file that it accepts.
BEYOND_SCHEMAS = re.compile(
    r".*(duplicate key|name: required, but missing|name says '|levels of nesting|aliases expanded|half a surrogate"
    r"|expected at most|merge keys|NUL|name: expected a value|ignored here|custom_targets.*: expected"
    r"|projects\[.*path: expected|has the same|so it is left out)"
)


def value_of(node: yaml.Node) -> Any:
    """Make of a node what YAML 1.2 does where all scalars are text."""
    if isinstance(node, yaml.ScalarNode):
        return None if orchestra.is_null(node) else node.value
    if isinstance(node, yaml.SequenceNode):
        return [value_of(item) for item in node.value]
    return {str(key.value): value_of(value) for key, value in node.value}


def test_the_schema_accepts_what_is_read_without_a_note_and_nothing_else(live: Home, dose: Dose) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(live.run_fine("schema").out)
    jsonschema.Draft7Validator.check_schema(schema)
    validator = jsonschema.Draft7Validator(schema)
    texts = [*(text for text, _ in BAD_FILES.values()), GOOD, TYPED, FROM_RUST]
    names = ("a.md", "b/a.md", "a/../b.md", "../a.md", "./a.md", "/a.md", "a//b.md", "a.txt", ".md", ".b/a.md", "#a.md")
    texts += [f"{GOOD}include: ['{name}']" for name in (*names, "b~/a.md")]
    random_texts = (odd_registry_text(dice) for dice in dose.inputs(150))
    accepted = 0
    for text in itertools.chain(texts, random_texts):
        data = text.encode() if isinstance(text, str) else text
        live.write_registry("shop/api.yaml", data)
        file = orchestra.RegistryFile(live.path, str(live.file("shop/api")))
        file.read_layer("codebase", API)
        found = [str(problem) for problem in (*file.problems, *file.notes)]
        try:
            root = orchestra.Document("").compose(data.decode("utf-8-sig"))
        except UnicodeDecodeError:
            root = None
        if root is not None:
            is_valid = validator.is_valid(value_of(root))
            accepted += is_valid
            assert is_valid == (not found) or (is_valid and all(map(BEYOND_SCHEMAS.match, found))), (found, data)
    assert accepted > 10


LONG_FRAMES = (b"%b", b"notes: %b", b"notes: [%b", b"notes:\n- '%b", b'notes: "%b', b"notes: |\n  %b", b"- %b", b"{%b")


def test_no_file_of_64_kib_takes_long_to_read(live: Home, loader: str, dose: Dose) -> None:
    live.save("blog/fine").write_text(FINE)
    with bounded():
        for dice in dose.inputs(10 if loader == "libyaml" else 4):
            piece = b"".join(dice.choices((*ODD_BYTES, *YAML_PIECES), k=dice.choice((1, 1, 2, 3))))
            text = b"name: api\npath: /x\n" + dice.choice(LONG_FRAMES) % (piece * (MOST_BYTES // len(piece)))
            live.write_registry("shop/api.yaml", text[:MOST_BYTES])
            check_registry(live.path, dice)


# Manifests

MANIFEST_TEXTS = {
    name: text.encode()
    for name, text in {
        **package(
            scripts={"test": "npm run a && vitest", "a": "x --fix", "lint": "run-s a test"},
            packageManager="pnpm@9",
            workspaces=["p/*", "!p/b"],
            devDependencies={"react": "^18 || >=19"},
        ),
        **composer(scripts={"test": ["@a", "phpunit"]}),
        "p/a/package.json": '{"name": "a"}',
        "pyproject.toml": PEP_621
        + POETRY
        + HATCH
        + "[dependency-groups]\ndev = ['a', {include-group = 'b'}]\nb = ['pytest']\n",
        "Cargo.toml": "[workspace]\nmembers = ['p/*']\n[workspace.package]\nedition = '2021'\n",
        "Makefile": "test lint: x\n\tgo ; black .\n.PHONY: x\nbuild::\n\t@echo\n",
        "justfile": JUSTFILE,
        "Taskfile.yml": TASKFILE,
        "mise.toml": "[tasks]\ntest = 'x'\n[tasks.lint]\nrun = ['y']\n[tools]\nnode = '20'\n",
        "pnpm-workspace.yaml": "packages: &a [p/*, *a]\n".replace(", *a", ""),
        "turbo.json": '{"tasks": {"test": {}}}',
        "setup.cfg": SETUP_CFG,
        "tox.ini": TOX,
        "noxfile.py": NOXFILE,
        "mix.exs": MIX,
        "x.gemspec": GEMSPEC,
        "configure.ac": CONFIGURE,
        "README.md": "# shop\n\n> Sells *many* [things](x) <b>now</b>.\n\n```\nx\n```\n\n## More\n\nshop is a shop.\n",
        ".pre-commit-config.yaml": "repos: [{id: ruff}]\n",
        ".python-version": "3.14\n",
    }.items()
}
MANIFEST_TOKENS = (
    *(*ODD_BYTES, *YAML_PIECES, b'"""', b"'''", b"[[", b"]]", b"[tool.x]\n", b" = ", b"true", b"\n\t", b"&&", b"||"),
    *(b"pnpm run test", b"../", b"*/", b"**", b'{"a": ', b"[" * 2000, b"a." * 60, b"test: ", b"    ", b"<!--", b"\n#"),
)


def test_any_bytes_in_the_manifests_make_one_line_of_each_thing_found(home: Home, dose: Dose) -> None:
    found_any = 0
    with bounded():
        for dice in dose.inputs(60):
            chosen = dice.sample(sorted(MANIFEST_TEXTS), dice.choice((1, 3, len(MANIFEST_TEXTS))))
            shutil.rmtree(home.code)
            for name in chosen:
                others = tuple(MANIFEST_TEXTS.values())
                put_files(home.code, {name: mutate(dice, MANIFEST_TEXTS[name], MANIFEST_TOKENS, others)})
            started = time.process_time()
            found = orchestra.detect(str(home.code))
            assert time.process_time() - started < MOST_SECONDS
            assert orchestra.detect(str(home.code)) == found
            for item in filter(None, (found.description, found.built_with, found.packages, *found.commands)):
                assert item.text and item.text.isprintable() and item.source, item
            names = [command.name for command in found.commands]
            assert len(names) == len(set(names))
            found_any += bool(names)
    assert found_any > dose.tried / 3


@pytest.mark.parametrize("piece", ["[", '{"a":', "a: &a [*a, ", "[a.", "\\", "a."])
def test_no_manifest_of_a_mebibyte_takes_long(home: Home, piece: str) -> None:
    names = (*MANIFEST_TEXTS, "GNUmakefile", "deno.json", "Pipfile", "mypy.ini")
    put_files(home.code, dict.fromkeys(names, piece * ((1 << 20) // len(piece))))
    assert time_of(lambda text: orchestra.detect(str(home.code)), "") < 20  # for all of them


# Managed files

MANAGED_TEXTS = (
    b"",
    b"# Mine\n\nSome text.\n",
    b"# Mine\r\n\r\nSome text.",
    b"\xef\xbb\xbfmine\n",
    b"above\n\n" + block("old") + b"\n\nbelow\n",
    b"above\r\n\r\n" + block("old\r") + b"\r\n",
    block("# shop/api") + b"\n",
    b"\xef\xbb\xbf" + block() + b"\r\nbelow",
    b"\xef\xbb\xbf\xef\xbb\xbf",
    b"\xef\xbb\xbb",
    b"---\ndescription: mine\n---\n\n" + block() + b"\n" + block(),
)
MANAGED_TOKENS = (
    *(*ODD_BYTES, BEGIN, END, BEGIN + b"\n", b"\n" + END + b"\n", BEGIN + b" \t\r\n", b" " + END, BEGIN[:-1], END[1:]),
    *(BEGIN + END, block("old"), b"\n" + block("x") + b"\n", b"<!--", b"-->", b"orchestra:begin", b"```\n"),
)
SHARED = [agent for agent in orchestra.AGENTS.values() if not agent.owned]
BREAKS = bytes.maketrans(b"", b""), b"\r\n"


def odd_managed_text(dice: random.Random) -> bytes:
    data = dice.choice(MANAGED_TEXTS)
    return data if dice.random() < 0.1 else mutate(dice, data, MANAGED_TOKENS, MANAGED_TEXTS)


def file_of(data: bytes) -> orchestra.Disk:
    return orchestra.Disk("file", data, 0o644)


def split_at_block(data: bytes) -> tuple[bytes, bytes]:
    block = orchestra.find_block(data)
    assert block
    return data[: block.start], data[block.stop :]


def test_any_bytes_around_a_block_survive(dose: Dose) -> None:
    appended = 0
    for dice in dose.inputs(1500):
        data, agent = odd_managed_text(dice), dice.choice(SHARED)
        wanted = block(dice.choice(("", "new", "new\n\nlines\n", "x" * 100)))
        try:
            ours = orchestra.managed_text(agent, data)
        except orchestra.SyncError as error:
            assert str(error).isprintable()
            continue
        after, join = orchestra.insert_managed_text(agent, file_of(data), wanted)
        assert orchestra.digest_of(orchestra.managed_text(agent, after) or b"") == orchestra.digest_of(wanted)
        assert orchestra.insert_managed_text(agent, file_of(after), wanted) == (after, None)
        if ours is None:
            appended += 1
            assert after.startswith(data) and join is not None
            assert orchestra.remove_managed_text(agent, file_of(after), join) == data
        else:
            assert split_at_block(after) == split_at_block(data)
        check_text_left(dice, agent, after)
    assert appended > dose.tried / 5


def check_text_left(dice: random.Random, agent: orchestra.Agent, data: bytes) -> None:
    """Check that removing the block leaves the rest, but for line ends at the seam."""
    head, tail = split_at_block(data)
    join = dice.choice((None, "", "\n", "\n\n", "\r\n", "\r\n\r\n"))
    left = orchestra.remove_managed_text(agent, file_of(data), join) or b""
    assert left.startswith(head.rstrip(b"\r\n")) and left.endswith(tail.lstrip(b"\r\n"))
    assert left.translate(*BREAKS) == (head + tail).translate(*BREAKS)
    assert left.count(b"\n") + 3 >= (head + tail).count(b"\n")


PROSE_TOKENS = (
    *(*MANAGED_TOKENS, b"- ", b"    ", b"\n  ", b"~~~~\n", b"\n```sh\n", b"\n<!-- a\n", b"-->\n", b"> ", b"10. "),
    *(b"\n<<<<<<< a\n", b"\n>>>>>>> b\n", b"\n||||||| c\n", b"<!-- Written by Orchestra (", b"\n\n", b"\t", b"# B\n"),
)


def read_prose(home: str, data: bytes) -> orchestra.Prose:
    return orchestra.RegistryFile(home, f"{home}/x.md", disk=file_of(data)).read_prose()


def test_any_bytes_as_prose_stay_in_their_block_and_leave_nothing_open(home: Home, dose: Dose) -> None:
    read = 0
    for dice in dose.inputs(1000):
        data = mutate(dice, dice.choice(MANAGED_TEXTS), PROSE_TOKENS, MANAGED_TEXTS)
        prose = read_prose(home.path, data)
        if prose.problems:
            continue
        read += 1
        again = read_prose(home.path, prose.text.encode())
        assert (again.text, again.problems, again.notes) == (prose.text, (), ())
        assert orchestra.find_open_block(f"{prose.text}\n\n## Next\n".encode()) == (0, "")
        codebase = codebase_with(layers=(orchestra.Layer("", codebase_with(), (prose,)),))
        text = orchestra.render_files(codebase)["CLAUDE.md"]
        assert orchestra.find_block(b"mine\n\n" + text + b"\n\nmine\n") == slice(6, 6 + len(text))
        assert orchestra.managed_text(orchestra.AGENTS["claude"], text) == text
    assert read > dose.tried / 3


@pytest.mark.parametrize(
    "piece", ["<!-- ", "- ", "```\n", "<!--\n", "~", "<<<<<<< a\n", ">", "<!--" + " " * 99, "- ```\n"]
)
def test_no_prose_of_a_mebibyte_takes_long_to_read(home: Home, piece: str) -> None:
    text = piece * ((1 << 20) // len(piece))
    assert time_of(lambda text: read_prose(home.path, text.encode()), text) < 20


def test_any_three_hashes_lead_to_a_fate_that_destroys_nothing(dose: Dose) -> None:
    for dice in dose.inputs(500):
        disk, wanted = (dice.choice((None, "a", "b", "c")) for _ in range(2))
        known = dice.choices("abc", k=dice.randrange(3))
        action = orchestra.decide(disk, known, wanted, evict=dice.random() < 0.5)
        is_lost = action in (orchestra.Action.UPDATE, orchestra.Action.REMOVE)  # without a backup
        assert not is_lost or disk in known
        assert (action == orchestra.Action.KEEP) is (disk == wanted)
        assert (action == orchestra.Action.CREATE) is (disk is None and wanted is not None)


def test_any_bytes_in_the_managed_files_survive_syncs_and_a_purge(live: Home, dose: Dose) -> None:
    codebase = orchestra.Codebase("shop", "api", str(live.code / "api"), targets=tuple(ALL_TARGETS))
    live.save("shop/api").write_text(f"name: api\npath: {live.code}/api\ntargets: [{', '.join(ALL_TARGETS)}]\n")
    for dice in dose.inputs(10):
        root = live.code / "api"
        for folder in (root, orchestra.backups_root(live.path), orchestra.hashes_root(live.path)):
            shutil.rmtree(folder, ignore_errors=True)
        root.mkdir()
        put_files(root, {path: odd_managed_text(dice) for path in AGENTS_BY_PATH if dice.random() < 0.6})
        check_syncs(live.path, codebase, root)


def check_syncs(home: str, codebase: orchestra.Codebase, root: Path) -> None:
    """Sync twice and purge: what is in no block and no backup is as it was."""
    before = contents(root)
    first = orchestra.sync_codebase(home, codebase)
    synced = contents(root)
    second = orchestra.sync_codebase(home, codebase)
    assert contents(root) == synced and not second.written
    assert first.failed == second.failed and all(str(problem).isprintable() for problem in first.errors)
    orchestra.sync_codebase(home, codebase, mode=orchestra.SyncMode(purge=True))
    left = contents(root)
    kept = {backup.path: Path(backup.file).read_bytes() for backup in orchestra.Backups(home, codebase.key).versions()}
    for path, data in before.items():
        has_block = not AGENTS_BY_PATH[path].owned and END in data
        if path in first.failed:
            assert synced[path] == left[path] == data
        elif path in kept:
            assert kept[path] == data
        elif not has_block and path in first.written:
            assert left[path] == data
    assert set(left) <= set(before)


# Requests

REQUEST_TEXTS = (
    *(STATUS + b"\n", b'{"cmd":"sync","codebase":"api"}\r\n', b'{"cmd":"stop"}\n', b"\n\n"),
    *(b'{"cmd":"sync","codebase":null}\n' + STATUS, b"[" * 2000 + b"]" * 2000),
    b'{"cmd": ["status"], "codebase": 5, "x": {"y": [1.5e3, true, "\\ud83d\\ude00"]}}\n',
)
JSON_TOKENS = (
    *(*ODD_BYTES, b"{", b"}", b"[", b"]", b'"', b":", b",", b"null", b"NaN", b"-Infinity", b"5", b"1e999", b"9" * 5000),
    *(b'"\\ud800"', b'"\\u0000"', b"\\", b"[" * 3000, b'{"a":' * 3000, b"{" * 500, b" " * 1000, b'"x"', b'["x"]'),
)
REQUEST_TOKENS = (
    *(*JSON_TOKENS, b'"cmd":', b'"codebase":', b'"status"', b'"sync"', b'"api"', b'{"cmd":' * 300, b"../../x"),
    *(STATUS, STATUS + b"\n", b"x" * orchestra.MAX_LINE),
)


def odd_requests(dice: random.Random) -> bytes:
    data = b"".join(dice.choices(REQUEST_TEXTS, k=dice.choice((1, 1, 2, 5))))
    if dice.random() < 0.3:
        depth = dice.randint(1, 2 * sys.getrecursionlimit())
        data += b'{"cmd":' + b"[" * depth + b"]" * depth + b"}\n" + STATUS + b"\n"
    return mutate(dice, data, REQUEST_TOKENS, REQUEST_TEXTS) + dice.choice((b"", b"", b"x" * orchestra.MAX_LINE * 2))


def pieces_of(dice: random.Random, data: bytes) -> Iterator[bytes]:
    """Cut bytes into pieces of a random size each."""
    largest = dice.choice((10, 1000, 1 << 16)) if len(data) < 5000 else 1 << 16
    start = 0
    while start < len(data):
        end = start + dice.randint(1, largest)
        yield data[start:end]
        start = end


def lines_of(pieces: Iterable[bytes]) -> list[bytes]:
    """Cut a stream into lines as the server does; an error that ends it comes last."""
    lines = orchestra.LineBuffer()
    found: list[bytes] = []
    try:
        for piece in (*pieces, b""):
            lines.feed(piece)
            while (line := lines.next_line(at_end=not piece)) is not None:
                found.append(line)
    except orchestra.ProtocolError as error:
        assert error.closes
        found.append(b"error: " + str(error).encode())
    return found


def lines_expected(data: bytes) -> list[bytes]:
    found = []
    for line in data.removesuffix(b"\n").split(b"\n") if data else ():
        if len(line) > orchestra.MAX_LINE:
            return [*found, b"error: " + json.loads(TOO_LONG)["error"].encode()]
        found.append(line.rstrip(b"\r"))
    return found


def test_any_bytes_as_requests_are_understood_or_refused(dose: Dose) -> None:
    for dice in dose.inputs(150):
        data = odd_requests(dice)
        lines = lines_of(pieces_of(dice, data))
        assert lines == lines_expected(data)
        for line in lines:
            try:
                request = orchestra.parse_request(line)
                assert request.cmd in ("status", "sync", "stop") and isinstance(request.codebase, (str, type(None)))
            except orchestra.ProtocolError as error:
                assert str(error).isprintable() and len(str(error)) < 500
                assert json.loads(orchestra.encode_error(str(error))) == {"ok": False, "error": str(error)}


def test_any_bytes_on_the_socket_leave_the_others_served(served: Home, dose: Dose) -> None:
    pid, before = served.daemons[0].pid, memory_of(served.daemons[0].pid)
    for dice in dose.inputs(30):
        data = odd_requests(dice).replace(b"stop", b"halt")
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(served.socket)
            babble(dice, client, data)
            assert orchestra.send_request(served.path, {"cmd": "status"}, 2)["pid"] == pid
            if dice.random() < 0.5:
                check_replies(client)
    assert memory_of(pid) - before < 30 << 20
    assert "Traceback" not in served.said() + served.log()


def babble(dice: random.Random, client: socket.socket, data: bytes) -> None:
    try:
        for piece in pieces_of(dice, data):
            client.sendall(piece)
            if dice.random() < 0.02:
                break
        if dice.random() < 0.7:
            client.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # given up by the daemon, or full of replies that nobody reads


def check_replies(client: socket.socket) -> None:
    """Check that a client receives nothing but replies, line by line."""
    client.settimeout(0.05)
    data = b""
    try:
        data = read_all(client)
    except OSError:
        pass  # the daemon waits for the rest of a line
    for line in data.splitlines():
        assert "ok" in json.loads(line)


# Other files: the property list, the launcher, the record, backups, logs

PATH_PIECES = (
    *(*ODD_CHARACTERS, "a", "/", "/Users/x/", "$HOME", "$(id)", "!", "&amp;", "]]>", ";", "(", "\udcff", "\udc80"),
    *("-I", "-*- coding: utf-16 -*-", "coding:latin-1", "long" * 40),
)


def odd_path(dice: random.Random, pieces: Sequence[str] = PATH_PIECES) -> str:
    return "/" + "".join(dice.choices(pieces, k=dice.choice((1, 2, 3, 6))))


def test_any_path_is_in_the_plist_as_it_is_or_refused(dose: Dose) -> None:
    fine = 0
    for dice in dose.inputs(500):
        binary, logs = odd_path(dice), odd_path(dice)
        try:
            values = plistlib.loads(orchestra.generate_plist(binary, logs))
        except orchestra.LaunchdError as error:
            assert str(error).isprintable()
            continue
        assert values["ProgramArguments"] == [binary, "daemon", "start"]
        assert values["StandardOutPath"] == os.path.join(logs, "daemon.log")
        assert values["StandardErrorPath"] == os.path.join(logs, "daemon-err.log")
        fine += 1
    assert fine > dose.tried / 5


STAND_IN = "import sys\n\n\ndef main():\n    print(ascii([__file__, *sys.argv[1:]]))\n    return 7\n"


def test_a_launcher_runs_with_any_home_and_python(live: Home, dose: Dose) -> None:
    pieces = [piece.replace("/", "").replace("\0", "") or "x" for piece in PATH_PIECES]
    for dice in dose.inputs(6):
        home = str(live.code) + odd_path(dice, pieces)[:200]
        python = str(live.folder / "bin") + odd_path(dice, pieces)[:200] + "/python"
        try:
            check_launcher(home, python)
        finally:
            shutil.rmtree(live.folder / "bin", ignore_errors=True)
            shutil.rmtree(live.code)


def check_launcher(home: str, python: str) -> None:
    os.makedirs(os.path.dirname(python))
    os.symlink(BASE_PYTHON, python)
    script = Path(orchestra.installed_script_path(home))
    script.parent.mkdir(parents=True)
    script.write_text(STAND_IN)
    binary = orchestra.Installer(home).install_program(python, str(script))
    done = subprocess.run([binary, "a 'b", "\N{GRINNING FACE}"], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (7, b""), (python, done)
    assert ast.literal_eval(done.stdout.decode()) == [str(script), "a 'b", "\N{GRINNING FACE}"]


RECORD_TEXTS = (
    b'{"synced_at":"2026-03-01T00:00:00Z","files":{"CLAUDE.md":"a1","AGENTS.md":"b2",".clinerules/orchestra.md":"c3"},'
    b'"earlier":{"CLAUDE.md":["d4"]},"joins":{"AGENTS.md":"\\n\\n"},"folders":[".clinerules",".github"]}',
    b'{"CLAUDE.md": "edited by hand", ".clinerules/orchestra.md": "x"}',
    b"[" * 100_000,
)
RECORD_TOKENS = (
    *(*JSON_TOKENS, b'"files":', b'"folders":', b'"joins":', b'"earlier":', b'"CLAUDE.md":', b'"../../x"', b'"/etc"'),
    *(b'"."', b'""', b'".github"', b'"AGENTS.md":"\\ud800"', b'".github/\\ud800"'),
)


def test_any_bytes_in_the_record_and_the_backups_stop_nothing(live: Home, dose: Dose) -> None:
    live.save("shop/api")
    codebase = orchestra.Codebase("shop", "api", str(live.code / "shop/api"), targets=("claude", "cline"))
    record = Path(orchestra.record_path(live.path, codebase.key))
    notes = Path(orchestra.backups_of(live.path, codebase.key)) / "20260301T000000.000000Z" / orchestra.Backups.NOTES
    mine = {"mine.txt": b"mine"}
    for dice in dose.inputs(15):
        shutil.rmtree(codebase.path)
        managed = {"CLAUDE.md": b"x\n" + block(), "AGENTS.md": b"mine\n\n" + block("old") + b"\nmore\n"}
        put_files(Path(codebase.path), {**mine, **dice.choice(({}, managed))})
        for file in (record, notes):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(mutate(dice, dice.choice(RECORD_TEXTS), RECORD_TOKENS, RECORD_TEXTS))
        (notes.parent / "CLAUDE.md").write_bytes(b"old")
        assert any(backup.path == "CLAUDE.md" for backup in orchestra.Backups(live.path, codebase.key).versions())
        orchestra.load_record(live.path, codebase.key)
        assert orchestra.sync_codebase(live.path, codebase, mode=orchestra.SyncMode(dry_run=True)).errors == ()
        assert orchestra.sync_codebase(live.path, codebase).errors == ()
        assert orchestra.sync_codebase(live.path, codebase, mode=orchestra.SyncMode(purge=True)).errors == ()
        assert (Path(codebase.path) / "mine.txt").read_bytes() == b"mine"
        shutil.rmtree(notes.parent.parent)


def test_the_tail_of_any_log_is_its_last_lines(live: Home, dose: Dose) -> None:
    path = live.folder / "log"
    for dice in dose.inputs(40):
        line = dice.choice((b"\n", b"x\n", b"\r\n", b"long" * 5000 + b"\n", b"\0\xff\n", b"x"))
        data = mutate(dice, line * dice.choice((0, 1, 10, 3000)), (b"\n", b"x", b"\xff", b"\n\n"), (line * 100,))
        data = b"x" * dice.choice((0, orchestra.LogReader.STEP - 1, orchestra.LogReader.STEP)) + data
        path.write_bytes(data)
        count = dice.choice((0, 1, 2, 10, 100, 100_000))
        reader = orchestra.LogReader(str(path))
        lines = io.BytesIO(data).readlines()
        assert reader.tail(count) == b"".join(lines[max(0, len(lines) - count) :])
        with open(path, "ab") as log:
            log.write(b"more")
        assert reader.read() == b"more"


# ── The long run ──────────────────────────────────────────────────────────────

# A daemon, with few descriptors, under all that users and systems do to it at once.


class Figures(NamedTuple):
    """What a daemon takes, and what it was put through so far."""

    seconds: int
    memory: int  # KiB
    descriptors: int
    threads: int
    wait: float  # seconds for an answer to status
    codebases: int
    acts: dict[str, int]


class Turmoil:
    """Does to a daemon, at random, all that users, editors and programs do."""

    HANDS = "hands"  # the one project whose managed files are edited by hand
    MIX = (*["edits"] * 50, *["hands"] * 20, *["clients"] * 20, *["syncs"] * 5, *["signals"] * 3, *["logs"] * 2)

    def __init__(self, live: Home, daemon: subprocess.Popen[bytes], seed: int) -> None:
        self.live = live
        self.daemon = daemon
        self.random = random.Random(seed)
        self.counts = dict.fromkeys(("edits", "hands", "syncs", "clients", "signals", "logs"), 0)
        self.later: list[tuple[float, Callable[[], Any]]] = []
        self.clients: list[socket.socket] = []
        self.programs: list[subprocess.Popen[bytes]] = []
        self.complaints = orchestra.LogReader(orchestra.stderr_log_path(live.path))
        put_files(live.folder, {"elsewhere": None, "programs-said": ""})

    # The turns

    def run(self, seconds: float, acts: dict[str, Sequence[Callable[[], Any]]]) -> None:
        deadline = time.monotonic() + seconds
        kinds = [kind for kind in self.MIX if kind in acts]
        while time.monotonic() < deadline:
            kind = self.random.choice(kinds)
            self.do(kind, self.random.choice(acts[kind]))
            self.do_what_is_due()
            time.sleep(self.random.choice((0, 0.001, 0.01, 0.05, 0.1)))

    def do(self, kind: str, act: Callable[[], Any]) -> None:
        try:
            act()
            self.counts[kind] += 1
        except OSError:
            pass  # that file does not exist now

    def do_what_is_due(self) -> None:
        now = time.monotonic()
        due = [act for when, act in self.later if when <= now]
        self.later = [(when, act) for when, act in self.later if when > now]
        for act in due:
            self.do("edits", act)
        self.programs = [program for program in self.programs if program.poll() is None]

    def soon(self, act: Callable[[], Any]) -> None:
        self.later.append((time.monotonic() + self.random.choice((0.001, 0.05, 0.3, 0.6, 2)), act))

    def all_acts(self) -> dict[str, Sequence[Callable[[], Any]]]:
        talk: list[Callable[[], Any]] = [
            lambda: self.connect(STATUS + b"\n").recv(1 << 16),
            lambda: self.connect(STATUS[: self.random.randrange(len(STATUS))]),
            lambda: babble(self.random, self.connect(), odd_requests(self.random)[:20000].replace(b"stop", b"halt")),
            self.connect,
            self.request_sync,
        ]
        hands: list[Callable[[], Any]] = [
            lambda: self.change(lambda text: f"above\n\n{text[-5000:]}\nbelow\n"),
            lambda: self.change(lambda text: text.replace("\n- ", f"\n- {self.random.random()}\n- ", 1)),
            lambda: self.soon(self.change(lambda text: text + f"\n{orchestra.BLOCK_END}\n")),
            lambda: self.managed().unlink(),
        ]
        return {
            "edits": self.edits(),
            "hands": hands,
            "clients": [*talk * 4, self.crowd, self.connect_deaf],
            "syncs": [self.run_program],
            "signals": [self.hang_up],
            "logs": [self.touch_logs],
        }

    # The registry

    def edits(self) -> list[Callable[[], Any]]:
        saves = [replace, Path.write_text, save_without_backup, self.write_in_halves, self.write_anew]
        others = [self.write_project, self.write_through_link, self.write_stray, self.write_broken, self.write_bytes]
        removals: list[Callable[[], Any]] = [
            lambda: self.file().unlink(),
            lambda: self.plain_file().rename(self.plain_file()),
            lambda: self.plain_file().parent.rename(self.live.projects / f"p{self.random.randrange(5)}"),
            lambda: shutil.rmtree(self.plain_file().parent),
        ]
        return [
            *(functools.partial(self.save, way) for way in saves * 4 + others * 2),
            *[self.save_twin] * 2,
            *removals,
        ]

    def label(self) -> str:
        project = self.random.choice((self.HANDS, self.HANDS, "p0", "p1", "p2", "p3", "p4"))
        return f"{project}/c{self.random.randrange(5)}"

    def plain_file(self) -> Path:
        """Choose a registry file whose codebase is not edited by hand."""
        return self.file(f"p{self.random.randrange(5)}/c{self.random.randrange(5)}")

    def file(self, label: str = "") -> Path:
        file = self.live.file(label or self.label())
        file.parent.mkdir(exist_ok=True)
        return file

    def save(self, write: Callable[[Path, str], Any] = replace) -> None:
        file = self.file()
        root = self.live.code / file.parent.name / file.stem
        put_files(root, {"not-empty": ""})  # an empty folder might be a disk that is not mounted
        targets = ", ".join(self.random.sample(ALL_TARGETS, self.random.choice((1, 2, 2, 3, 8))))
        write(file, f"name: {file.stem}\npath: {root}\ntargets: [{targets}]\nnotes:\n- note {self.random.random()}\n")

    def write(self, file: Path, text: str) -> None:
        self.random.choice((replace, save_in_place))(file, text)

    def write_in_halves(self, file: Path, text: str) -> None:
        file.write_text(text[: self.random.randrange(len(text))])
        self.soon(lambda: file.write_text(text))

    def write_anew(self, file: Path, text: str) -> None:
        file.unlink(missing_ok=True)
        self.soon(lambda: file.write_text(text))

    def write_broken(self, file: Path, text: str) -> None:
        self.write(file, text + self.random.choice(("tasks: [", "\t", "notes: again\n", "skills: 5\n", "%", "x: *y\n")))
        if self.random.random() < 0.8:
            self.soon(lambda: replace(file, text))

    def write_bytes(self, file: Path, text: str) -> None:
        file.write_bytes(mutate(self.random, b"name: c1\n", REGISTRY_TOKENS, (b"notes: [x]\n",)))

    def write_project(self, file: Path, text: str) -> None:
        file = file.with_name("project.yaml")
        texts = ("conventions: [one]\n", "conventions: [two]\n", "commands: {a: b}\n", "targets: 5\n", "")
        self.write(file, self.random.choice(texts))
        self.soon(lambda: file.write_text("conventions: [three]\n") if self.random.random() < 0.5 else file.unlink())

    def write_through_link(self, file: Path, text: str) -> None:
        target = self.live.folder / "elsewhere" / f"{file.parent.name}-{file.name}"
        self.write(target, text)
        if not file.is_symlink():
            file.unlink(missing_ok=True)
            file.symlink_to(target)

    def write_stray(self, near: Path, text: str) -> None:
        places = (near.with_suffix(".yml"), self.live.projects / "c.yaml", near.parent / "x" / "c.yaml")
        file = self.random.choice(places)
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
        self.soon(file.unlink)

    def save_twin(self) -> None:
        one, other = self.plain_file(), self.plain_file()
        other.write_bytes(one.read_bytes().replace(b"name: %b" % one.stem.encode(), b"name: %b" % other.stem.encode()))

    # The managed files

    def managed(self) -> Path:
        path = self.random.choice(list(AGENTS_BY_PATH))
        return self.live.code / self.HANDS / f"c{self.random.randrange(5)}" / path

    def change(self, change: Callable[[str], str]) -> Callable[[], Any]:
        """Change a managed file, and return a function that puts its text back."""
        file = self.managed()
        text = file.read_text()
        file.write_text(change(text))
        return lambda: file.write_text(text)

    # Clients, programs, signals, logs

    def connect(self, data: bytes = b"") -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        self.clients.append(client)
        client.connect(self.live.socket)  # no timeout: a full backlog would be an error
        client.settimeout(2)
        client.sendall(data)
        if len(self.clients) > 20:
            self.clients.pop(self.random.randrange(20)).close()
        return client

    def request_sync(self) -> None:
        label = json.dumps(self.random.choice((None, self.label(), self.label(), "nope")))
        client = self.connect(b'{"cmd":"sync","codebase":%b}\n' % label.encode())
        if self.random.random() < 0.5:
            client.shutdown(socket.SHUT_WR)

    def connect_deaf(self) -> None:
        client = self.connect()
        client.setblocking(False)
        client.sendall((STATUS + b"\n") * 5000)

    def crowd(self) -> None:
        with ExitStack() as stack:
            for _ in range(150):
                stack.enter_context(socket.socket(socket.AF_UNIX)).connect(self.live.socket)
            self.counts["clients"] += 150
            self.answer_time()

    def hang_up(self) -> None:
        self.daemon.send_signal(signal.SIGHUP)

    def run_program(self) -> None:
        if len(self.programs) < 2:
            commands = (["sync", "--all"], ["sync", self.label()], ["status"], ["sync", "--all", "--dry-run"])
            with open(self.live.folder / "programs-said", "ab") as said:
                options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": said}
                self.programs.append(self.live.start(*self.random.choice(commands), **options))

    def touch_logs(self) -> None:
        self.read_complaints()
        path = self.random.choice((orchestra.stdout_log_path, orchestra.stderr_log_path))(self.live.path)
        almost_full = orchestra.LOG_LIMIT - 100
        acts: list[Callable[[], Any]] = [
            lambda: os.rename(path, f"{path}.moved"),
            lambda: os.unlink(path),
            lambda: os.truncate(path, 0),
            *[lambda: os.truncate(path, almost_full)] * 2,
        ]
        self.random.choice(acts)()
        self.complaints = orchestra.LogReader(orchestra.stderr_log_path(self.live.path))

    def read_complaints(self) -> None:
        """Check that nothing has complained of a bug."""
        text = self.complaints.read() + (self.live.folder / "programs-said").read_bytes() + self.live.said().encode()
        assert b"Traceback" not in text and b"internal error" not in text, text[text.find(b"Traceback") - 500 :][:5000]

    # What comes of it

    def answer_time(self) -> float:
        started = time.monotonic()
        wait_until(lambda: self.daemon.poll() is not None or self.live.answers(), 2)
        assert self.daemon.poll() is None, self.live.said()
        return time.monotonic() - started

    def hush(self) -> None:
        """End all that others do to the daemon, and wait until it has noticed."""
        for client in self.clients:
            client.close()
        self.clients.clear()
        for program in self.programs:
            program.wait(60)
        wait_until(lambda: self.live.status()["queue_depth"] == 0)

    def measure(self, started: float) -> Figures:
        wait = self.answer_time()
        self.read_complaints()
        self.hush()
        pid = self.daemon.pid
        seen = []

        def is_settled() -> bool:
            seen.append([len(os.listdir(f"/proc/{pid}/{name}")) for name in ("fd", "task")])  # descriptors, threads
            return len(seen) > 5 and all(one == seen[-1] for one in seen[-5:])

        wait_until(is_settled)
        count = self.live.status()["codebase_count"]
        return Figures(int(time.monotonic() - started), memory_of(pid) >> 10, *seen[-1], wait, count, dict(self.counts))

    def fresh_cache(self) -> orchestra.RegistryCache:
        """Look at everything as a fresh process does, and change nothing."""
        cache = orchestra.RegistryCache.load(self.live.path)
        results = orchestra.run_pipeline(
            self.live.path, orchestra.SyncScope.all(), orchestra.SyncMode(dry_run=True), cache.registry
        )
        self.behind = [label for result in results if result.written and (label := orchestra.label_for(result.key))]
        return orchestra.RegistryCache.renewed(cache, cache.registry, results)

    def differences(self, all_of_them: bool) -> list[Any]:
        """List where the daemon's picture is not the disk's.

        Unless `all_of_them` are asked for, leave out what the daemon sees only when it looks at everything: what
        hands have edited, and files in a folder of a project's folder.
        """
        fresh, known = self.fresh_cache(), self.live.status()
        wanted = [{"where": problem.where, "message": problem.message} for problem in fresh.problems]
        found = [problem for problem in known["problems"] if "hand-written text was replaced" not in problem["message"]]
        if not all_of_them:
            wanted, found = (
                [p for p in problems if p["where"][0] == "~" and not p["where"].endswith("/x:1")]
                for problems in (wanted, found)
            )
            self.behind = [label for label in self.behind if not label.startswith(f"{self.HANDS}/")]
        lacking = [problem for problem in wanted if problem not in found]
        too_much = [problem for problem in found if problem not in wanted]
        names = sorted(set(known["codebases"]) ^ set(fresh.names.values()))
        return [*lacking, *too_much, *names, *self.behind]

    def expect_picture(self, all_of_them: bool) -> None:
        """Wait until the daemon is right, less long than to its next full rescan."""
        wait_until(lambda: not self.differences(all_of_them), 15, lambda: self.differences(all_of_them))

    def mend(self) -> None:
        """Remove what cannot be read or synced."""
        for problem in self.live.status()["problems"]:
            if problem["where"].startswith("~"):
                file = problem["where"].rpartition(":")[0].replace("~", self.live.path, 1)
                shutil.rmtree(file) if os.path.isdir(file) else Path(file).unlink(missing_ok=True)
        shutil.rmtree(self.live.code / self.HANDS, ignore_errors=True)
        put_files(self.live.code / self.HANDS, {f"c{number}/not-empty": "" for number in range(5)})


@pytest.mark.soak
@pytest.mark.skipif(not IS_LINUX, reason="reads /proc")
def test_a_daemon_under_all_that_happens_stays_true_and_small(live: Home) -> None:
    seconds = float(os.environ.get("ORCHESTRA_LONG_RUN") or 1200)
    seed = SEED or int(time.time())
    print(f"ORCHESTRA_SEED={seed}")
    few = 96
    daemon = live.start_daemon(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (few, few)))
    turmoil = Turmoil(live, daemon, seed)
    started = time.monotonic()
    turmoil.run(min(5, seconds / 10), {"edits": [turmoil.save]})
    figures = [turmoil.measure(started)]
    while time.monotonic() < started + seconds:
        turmoil.run(min(10, seconds / 8), turmoil.all_acts())
        figures.append(turmoil.measure(started))
        print(figures[-1], flush=True)
    # From here on, only the daemon sees the edits: nobody else syncs.
    turmoil.run(5, {"edits": turmoil.edits()})
    turmoil.run(3, {"edits": [turmoil.save]})
    wait_until(lambda: turmoil.do_what_is_due() or not turmoil.later)
    turmoil.expect_picture(all_of_them=False)
    for _ in range(5):  # a file that is mended may uncover what is wrong with another
        turmoil.mend()
        turmoil.hang_up()
        turmoil.expect_picture(all_of_them=True)
    checked = live.run_script("sync", "--all", "--check")
    assert (checked.status, checked.complaints) == (0, []), checked
    live.run_script("sync", "--all")  # which ends the problems of replaced hand edits
    assert live.status()["problems"] == []
    turmoil.read_complaints()
    size = len(figures) // 4
    second, last = figures[size : 2 * size], figures[-size:]  # quarters of the run

    def median(part: Sequence[Figures], name: str) -> float:
        return statistics.median(getattr(figure, name) for figure in part)

    assert median(last, "memory") - median(second, "memory") < max(3 << 10, median(second, "memory") / 10)
    assert median(last, "descriptors") <= median(second, "descriptors")
    assert {figure.threads for figure in figures} == {figures[0].threads}
    asked = time.monotonic()
    live.stop(daemon)
    assert time.monotonic() - asked < 2


# ── Start-up ──────────────────────────────────────────────────────────────────

# What the installed program loads, without `site` and the .pth files it reads.
LOADED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import orchestra
status = orchestra.main()
sys.stdout.flush()
print(*sys.modules, file=sys.stderr)
sys.exit(status)
"""
# Each costs a start more than 1 ms, or belongs to work that these commands do not do.
HEAVY = {
    *("asyncio", "concurrent", "ctypes", "dataclasses", "datetime", "difflib", "email", "html", "http", "inspect"),
    *("importlib.metadata", "logging", "multiprocessing", "pathlib", "pickle", "plistlib", "queue", "random"),
    *("resource", "shlex", "shutil", "signal", "subprocess", "tempfile", "textwrap", "threading", "traceback"),
    *("typing", "unittest", "urllib", "uuid", "xml", "yaml", "zipfile"),
}


def load_without_site(machine: Machine, *argv: str) -> set[str]:
    """Return the modules that a command of the installed program has loaded at its end."""
    lib = os.path.dirname(orchestra.installed_script_path(machine.path))
    done = machine.run_program(BASE_PYTHON, "-I", "-S", "-c", LOADED, lib, *argv)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


def heavy_ones(modules: Iterable[str]) -> list[str]:
    return sorted(name for name in modules if name in HEAVY or name.partition(".")[0] in HEAVY)


@pytest.mark.parametrize("argv", [["daemon", "status"], ["daemon", "stop"], ["complete", "--", "sync", "a"]])
@pytest.mark.parametrize("is_running", [False, True])
def test_asking_the_daemon_loads_nothing_heavy(machine: Machine, argv: list[str], is_running: bool) -> None:
    binary = machine.install_program()
    if not is_running:
        assert heavy_ones(load_without_site(machine, *argv)) == []
        return
    machine.give_yaml()
    with machine.daemon(binary):
        assert heavy_ones(load_without_site(machine, *argv)) == []


@pytest.mark.parametrize(
    "argv", [["sync", "--all"], ["status"], ["show", "api", "--target", "claude"], ["diff", "api"]]
)
def test_files_that_were_parsed_before_need_no_yaml(machine: Machine, argv: list[str]) -> None:
    machine.give_yaml()
    machine.install_program()
    machine.make_codebase()
    machine.write_registry("shop/project.yaml", "notes: [shared]\n")
    assert "yaml" in load_without_site(machine, "sync", "--all")
    assert "yaml" not in load_without_site(machine, *argv)
    machine.write_registry("shop/project.yaml", "notes: [changed]\n")
    assert "yaml" in load_without_site(machine, *argv)


def test_the_installed_program_is_compiled_at_its_first_run_alone(machine: Machine) -> None:
    binary = machine.install_program()
    lib = Path(orchestra.installed_script_path(machine.path)).parent
    assert machine.run_program(binary, "--version").returncode == 0
    (cached,) = lib.glob("__pycache__/orchestra.*.pyc")
    first = cached.stat()
    done = machine.run_program(BASE_PYTHON, "-I", "-v", binary, "--version")
    assert done.returncode == 0
    assert f"code object from '{cached}'" in done.stderr
    assert f"code object from {lib}/orchestra.py\n" not in done.stderr  # what -v says of a compilation
    assert (cached.stat().st_ino, cached.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)


# ── The README ────────────────────────────────────────────────────────────────

README = (HERE / "README.md").read_text(encoding="utf-8")
TERMINALS = {
    "bash": ["bash", "--norc", "--noediting", "-i"],
    "zsh": ["zsh", "-f", "-i", "+o", "promptsp"],
    "dash": ["dash", "-i"],
    "fish": ["fish"],
}

# Sections whose shell blocks are pasted into one terminal, in this order, and why others are not.
PASTED = ("The first minute", "Layers", "Any agent", "Parts of a monorepo")
ELSEWHERE = {
    "Installing": "needs a server: test_the_readmes_download_installs_or_fails",
    "Sharing a registry": "needs two homes: test_the_readmes_way_to_share_a_registry_works",
}


class Pasted(NamedTuple):
    """A shell block, and the output that the README shows for it: "" for none."""

    section: str
    typed: str
    shown: str


def readme_blocks() -> list[Pasted]:
    parts = re.split(r"(?m)^##+ (.*)\n", README)
    pairs = zip(parts[1::2], parts[2::2])
    block = re.compile(r"(?ms)^```sh\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?")
    return [Pasted(title, typed, shown) for title, text in pairs for typed, shown in block.findall(text)]


def without_times(text: str) -> list[str]:
    """Split into lines, without what differs from run to run, and the width of columns."""
    stamps = r"\d{8}T[\d.]+Z|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|pid \d+|\b\d+ s\b"
    return [re.sub(" {2,}", "  ", re.sub(stamps, "N", line)) for line in text.strip().splitlines()]


@pytest.fixture(params=TERMINALS)
def terminal(request: Any) -> str:
    if not shutil.which(request.param):
        pytest.skip(f"no {request.param} here")
    return str(request.param)


def test_each_shell_block_of_the_readme_is_tested() -> None:
    assert {block.section for block in readme_blocks()} == {*PASTED, *ELSEWHERE}
    for block in readme_blocks():
        assert not re.search(r"(?m)(^|\s)#", block.typed), "an interactive zsh takes no comments"


def test_the_readmes_blocks_can_be_pasted_and_print_what_it_shows(machine: Machine, terminal: str) -> None:
    machine.give_yaml()
    blocks = [block for section in PASTED for block in readme_blocks() if block.section == section]
    typed = "".join(f"{block.typed}echo '=''=='\n" for block in blocks)
    typed = typed.replace("sleep 1\ngrep ", "wait-for ")  # this machine may be busy
    machine.make_tool("wait-for", 'for _ in $(seq 600); do grep -s "$@" && exit; sleep 0.05; done; exit 1')
    environ = {"ORCHESTRA_PYTHON": BASE_PYTHON, "SHELL": f"/bin/{terminal}", "PS1": "", "PS2": ""}
    done = machine.run_program(
        *("sh", "-c", 'exec "$@" 2>&1', "sh"), *TERMINALS[terminal], input=typed, cwd=HERE, environ=environ
    )
    machine.stop_detached()
    outputs = done.stdout.split("===\n")
    assert len(outputs) == len(blocks) + 1, done
    for block, output in zip(blocks, outputs):
        if block.shown:
            shown = without_times(block.shown)
            assert without_times(output)[-len(shown) :] == shown, done.stdout


@pytest.mark.parametrize("is_there", [True, False], ids=["works", "download fails"])
@pytest.mark.skipif(not shutil.which("curl"), reason="no curl here")
def test_the_readmes_download_installs_or_fails(machine: Machine, server: Any, terminal: str, is_there: bool) -> None:
    machine.give_yaml()
    url, folder = server
    if not is_there:
        (folder / "install.sh").unlink()
    (line,) = re.findall("(?m)^curl .*", README)
    done = machine.run_program(terminal, "-c", line.replace("http://HOST:8000", url), cwd=machine.code)
    assert (done.returncode == 0, machine.link.exists()) == (is_there, is_there), done
    if is_there:
        assert_works(machine)


def test_the_readmes_way_to_share_a_registry_works(home: Home, terminal: str) -> None:
    (home.folder / "other").mkdir()
    other = Home(str(home.folder / "other"))
    other.cleanup.pop_all()  # its folder goes with that of the first
    remote = str(home.folder / "shop.git")
    assert finish(home.launch(["git", "init", "-q", "--bare", remote])).status == 0
    put_files(home.projects, {"shop/api.md": "Ask before you drop a table.\n"})
    put_files(Path(home.path), {"code/api/README.md": ""})
    put_files(Path(other.path), {"work/api/README.md": ""})
    put_files(home.folder, {"bin/orchestra": f'#!/bin/sh\nexec {sys.executable} {SCRIPT} "$@"\n'})
    (home.folder / "bin/orchestra").chmod(0o755)
    home.run_fine("init", f"{home.path}/code/api", "-p", "shop")
    (shared,) = [block.typed for block in readme_blocks() if block.section == "Sharing a registry"]
    share = ["git init", "echo '*.local.*' > .gitignore", "git add .", "git commit -m shop", f"git push {remote} HEAD"]
    for at, script in ((home, "\n".join(["cd ~/.orchestra/projects/shop", *share])), (other, shared)):
        environ: dict[str, Optional[str]] = {"PATH": f"{home.folder}/bin:{os.environ['PATH']}"}
        environ.update({f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")})
        script_here = script.replace("git@example.com:team/shop.git", remote)
        ran = finish(at.launch([terminal, "-c", script_here], environ=environ))
        assert ran.status == 0, ran
    assert "Ask before" in Path(other.path, "work/api/CLAUDE.md").read_text()
    clone = other.projects / "shop"
    assert subprocess.check_output(["git", "status", "--porcelain"], cwd=clone) == b""
    assert (clone / "api.local.yaml").read_text() == "path: ~/work/api\n"
    assert other.run_fine("init", f"{other.path}/work/api", "-p", "shop").err == ""
    assert other.run_fine("sync", "api", "--check").lines == []  # as in CI
    (clone / "api.local.yaml").unlink()
    assert other.run("sync", "--all", "--check").out.endswith("in 0 codebases, 1 absent\n")


def test_what_the_readme_makes_of_its_first_file(home: Home) -> None:
    registry, made = re.findall(r"(?ms)^```(?:yaml|markdown)\n(.*?)^```", README)[:2]
    put_files(home.projects, {"demo/hello.yaml": registry})
    put_files(Path(home.path), {"code/hello/main.c": ""})
    home.sync()
    for name in ("CLAUDE.md", "AGENTS.md"):
        assert Path(home.path, "code/hello", name).read_text() == made


def test_the_readmes_picture_of_status(home: Home) -> None:
    for name in ("api", "web", "infra"):
        home.make_codebase(f"shop/{name}", conventions=["first"])
    home.register("shop/site")  # on another machine
    home.sync()
    edit(home.code / "shop/api/CLAUDE.md", "- first", "- third")
    home.write_registry("shop/infra.yaml", "name: infra\nconventions: [Money: integer cents]\n")
    edit(home.file("shop/web"), "conventions", "convention: [x]\nconventions")
    edit(home.file("shop/web"), "noted", "changed")
    (shown,) = re.findall(r"(?ms)^```text\n(4 codebases .*?)^```", README)
    ran = home.run_script("status", stderr=subprocess.STDOUT)
    assert without_times(ran.out) == without_times(shown)


def test_the_readmes_registry_file_has_no_problem(home: Home) -> None:
    (text,) = re.findall(r"(?ms)^```yaml\n(name: api\n.*?)^```", README)
    put_files(home.projects, {"shop/api.yaml": text})
    put_files(Path(home.path), {"code/api/main.c": ""})
    assert home.run_fine("sync", "--all", "--strict").err == ""


def test_the_readme_names_every_command_and_every_agent() -> None:
    commands = " ".join(README.partition("\n## Commands\n")[2].partition("\n## ")[0].split())
    for name, row in orchestra.COMMANDS.items():
        *group, word = name.split() or [""]
        if word and row.purpose and name != "help":
            listed = re.search(rf"`{group[0]}` \(([^)]*)\)", commands) if group else None
            assert word in re.findall(r"\w+", listed[1]) if listed else f"`{name}`" in commands, name
    agents = README.partition("\n## Any agent\n")[2].partition("If an agent is not here")[0]
    blocks, owned, _ = re.split(r" is yours\. |Nearly", agents.replace("\n", " "))
    assert dict(re.findall(r"`(\S+)` \(`([\w-]+)`\)", blocks)) == {
        agent.path: agent.target for agent in orchestra.AGENTS.values() if not agent.owned
    }
    assert re.findall(r"`([\w-]+)`", owned) == [agent.target for agent in orchestra.AGENTS.values() if agent.owned]


@pytest.mark.parametrize("line", sorted({*re.findall(r"(?m)(?:^|`|\()orchestra ([a-z][^`)#;|\n]*)", README)}))
def test_what_the_readme_says_to_type_exists(line: str) -> None:
    orchestra.CommandLine(orchestra.COMMANDS, shlex.split(line)).parse()


# ── Benchmarks ────────────────────────────────────────────────────────────────

# Machines differ, and this one may be busy: each figure stands beside a yardstick of
# the same minute, the least that any program doing that work would take. Nothing here
# asserts how long something takes.

IDLE_SECONDS = float(os.environ.get("ORCHESTRA_IDLE", "60"))
MOST_CODEBASES = int(os.environ.get("ORCHESTRA_MOST", "10000"))
BENCH_FOLDER = os.environ.get("ORCHESTRA_BENCH_IN", "/tmp")  # on the file system to measure; a short path
WINDOW = orchestra.DEBOUNCE_WINDOW
SAVES_TIMED = 30  # of which the median is shown
GAPS = (0, 0.0005, 0.002, 0.01, 0.05)  # seconds for which a file is empty while it is saved in place
NOTIFIERS = ["kqueue"] if HAS_KQUEUE else ["inotify", "kqueue (stand-in)"]
PARTS = 20
BULK, ALL_SAVED, PROJECT_SAVED = "all YAML files changed at once", "all.yaml saved", "project.md saved"
GROWTH = {
    **dict.fromkeys(["save to file written", "save of its Markdown"], "0"),
    **dict.fromkeys(["sync --all, first", "sync --all, unchanged", BULK, ALL_SAVED, PROJECT_SAVED], "1"),
    **dict.fromkeys(["status", "completion of a name"], "1"),
}
BENCH_YAML = """\
name: {name}
path: {path}
description: Orders and payments of the shop, served to the web and to the phones
targets: [{targets}]
commands:
  build: make build
  test: make test
  lint: make lint
conventions:
- Money is integer cents, never a float
- Every endpoint has a test that calls it
- Errors are logged once, where they are handled
- SQL lives in migrations and queries, nowhere else
- {note}
skills:
- id: sql
  description: Postgres 16, window functions, explain
- id: rust
  description: tokio and axum
projects:
- name: {name}
  project_type: backend
  tasks:
{tasks}
created_at: 2026-03-01T00:00:00Z
updated_at: 2026-03-01T00:00:00Z
"""
BENCH_PART = """\
- name: part{number}
  path: parts/{number}
  project_type: backend
  description: Part {number} of the shop
  commands: {{test: make test-{number}}}
  conventions:
  - {note}
"""
BENCH_TASK = """\
  - id: T-{number}
    title: Take the fees of payment provider {number} into the ledger
    status: {status}
    description: The monthly report shows them already, the ledger does not.
    created_at: 2026-03-01T00:00:00Z
    updated_at: 2026-03-02T00:00:00Z
"""
# The least that can stand in for `sync --all`: the same reading and writing.
BARE_SYNC = """
import glob, os, sys
kind, registry, source, target = sys.argv[1:5]
if kind != "look":
    sys.path[:0] = sys.argv[5:]
    import yaml
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
for file in glob.glob(registry):
    with open(file, "rb") as stream:
        data = stream.read()
    if kind != "look":
        yaml.load(data, loader)
for folder, _, files in os.walk(source):
    to = target + folder[len(source):]
    if kind != "look":
        os.makedirs(to, exist_ok=True)
    for name in files:
        with open(f"{folder}/{name}", "rb") as stream:
            data = stream.read()
        if kind != "look":
            path = f"{to}/{name}"
            with open(path + ".new" if kind == "update" else path, "wb") as stream:
                stream.write(data)
            if kind == "update":
                os.rename(path + ".new", path)
"""
# A server that answers each line with as many bytes as the daemon would.
BARE_SERVER = """
import socket, sys
reply = b"x" * (int(sys.argv[2]) - 1) + b"\\n"
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print(flush=True)
client, _ = listener.accept()
while client.recv(1 << 16):
    client.sendall(reply)
"""


class Cost(NamedTuple):
    """What work took, in seconds; a busy machine changes `cpu` less than `wall`."""

    wall: float
    cpu: float = 0


class Row(NamedTuple):
    """A line of the table."""

    work: str
    count: Optional[int]  # of codebases
    figure: str
    limit: str = ""
    yardstick: str = ""
    ratio: Optional[float] = None
    cost: Cost = Cost(0)

    def cells(self) -> tuple[str, ...]:
        count = f"{self.count:,}" if self.count else ""
        cpu = format_seconds(self.cost.cpu) if self.cost.cpu else ""
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        return self.work, count, self.figure, cpu, self.limit, self.yardstick, ratio


def timed(work: str, count: Optional[int], cost: Cost, limit: str, against: tuple[str, Cost]) -> Row:
    what, bare = against
    told = f"{what}: {format_seconds(bare.wall)}"
    return Row(work, count, format_seconds(cost.wall), limit, told, cost.wall / bare.wall, cost)


def format_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def format_bytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def format_table(rows: Sequence[Row]) -> str:
    cells = [("work", "N", "figure", "CPU", "limit", "yardstick", "ratio"), *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, tuple("─" * width for width in widths))
    template = "{:<{}}  {:>{}}  {:>{}}  {:>{}}  {:<{}}  {:<{}}  {:>{}}"
    return "\n".join(template.format(*itertools.chain(*zip(row, widths))).rstrip() for row in cells)


def median_cost(costs: Iterable[Cost]) -> Cost:
    return Cost(*(statistics.median(column) for column in zip(*costs)))


def describe_machine(folder: str) -> str:
    python = f"{platform.python_implementation()} {platform.python_version()}"
    libyaml = f"PyYAML {yaml.__version__} {'with' if yaml.__with_libyaml__ else 'without'} libyaml"
    system = f"{platform.system()} {platform.release()}"
    where = f"{folder} on {file_system(folder)}"
    return " · ".join([f"{cpu_model()}, {os.cpu_count()} cores", python, libyaml, system, where])


def cpu_model() -> str:
    if IS_LINUX:
        found = re.search(r"(?m)^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text())
        return found[1] if found else platform.machine()
    done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], check=False, capture_output=True, text=True)
    return done.stdout.strip() or platform.machine()


def file_system(folder: str) -> str:
    """Name the type of the file system that holds a folder."""
    if not IS_LINUX:
        return "the temporary folder's file system"
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(len(top), device, kind) for device, top, kind in mounts if folder.startswith(top.rstrip("/") + "/")]
    _, device, kind = max(above)
    # Without a journal, ext4 is slow to reuse inodes freed within the last minute.
    has_journal = any(Path("/proc/fs/jbd2").glob(f"{os.path.basename(os.path.realpath(device))}-*"))
    return kind if kind != "ext4" or has_journal else "ext4 without a journal"


def measure_process(argv: Sequence[str], environ: dict[str, str]) -> Cost:
    """Run a program that must succeed; its output is thrown away."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    nothing: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    subprocess.run(argv, env=environ, check=True, **nothing)
    took, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(took, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


class Bench(Machine):
    """A machine with so many codebases of so many parts, whose Python has no .pth files."""

    def __init__(self, folder: str, python: str, count: int, parts: int = 0) -> None:
        os.mkdir(f"{folder}/n{count}")
        super().__init__(f"{folder}/n{count}")
        self.python = python
        self.count = count
        self.parts = parts
        self.prefix = f"{parts} parts: " if parts else ""
        self.away = itertools.count()
        self.give_yaml()
        self.binary = orchestra.Installer(self.path).install_program(python, str(SCRIPT))
        self.labels = self.save_many(count, "As it was at first")
        self.make_codebases()
        self.measure("--version")  # compiles

    def variables(self, **more: Optional[str]) -> dict[str, str]:
        return super().variables(**{"ORCHESTRA_NO_FETCH": "1", **more})

    def written(self, label: str) -> Path:
        """The file that a sync writes last."""
        path = self.code / label / orchestra.AGENTS[ALL_TARGETS[-1]].path
        return path.with_name(f"{path.stem}-part{self.parts - 1}.md") if self.parts else path

    def text(self, label: str = "", note: str = "") -> str:
        states = ("pending", "inprogress", "blocked", "done", "pending")
        tasks = "".join(BENCH_TASK.format(number=i, status=states[i % 5]) for i in range(10))
        parts = "".join(BENCH_PART.format(number=i, note=note) for i in range(self.parts))
        name, path, targets = label.split("/")[1], self.code / label, ", ".join(ALL_TARGETS)
        return BENCH_YAML.format(name=name, path=path, targets=targets, note=note, tasks=(tasks + parts).rstrip("\n"))

    def make_codebases(self) -> None:
        for label in self.labels:
            (self.code / label).mkdir(parents=True)
            for number in range(self.parts):
                (self.code / label / f"parts/{number}").mkdir(parents=True)

    def forget_syncs(self) -> None:
        """Make it as if nothing had ever been synced."""
        for folder in (self.code, orchestra.hashes_root(self.path), orchestra.run_dir(self.path)):
            self.put_away(Path(folder))
        self.make_codebases()

    def put_away(self, folder: Path) -> None:
        # Not deleted: ext4 is slow to reuse inodes freed within the last minute.
        folder.rename(self.folder / f"away{next(self.away)}")

    def measure(self, *argv: str) -> Cost:
        return measure_process([self.binary, *argv], self.variables())

    def measure_bare_start(self) -> Cost:
        return measure_process([self.python, "-I", "-c", "pass"], self.variables())

    def measure_bare_sync(self, kind: str, project: str = "*") -> Cost:
        """Measure the least that can stand in for a sync: cold, update or look."""
        copy, code = self.folder / "copy", self.code / project.strip("*")
        if kind == "cold" and copy.exists():
            self.put_away(copy)
        paths = (self.projects / project / "*.yaml", code, copy, orchestra.python_lib_dir(self.path))
        return measure_process([self.python, "-I", "-c", BARE_SYNC, kind, *map(str, paths)], self.variables())

    @contextmanager
    def watched(self, kind: str = "") -> Iterator[None]:
        """Run a daemon; begin when all is written, looked at once more, and quiet."""
        for log in (orchestra.stdout_log_path(self.path), orchestra.stderr_log_path(self.path)):
            Path(log).unlink(missing_ok=True)
        command = [sys.executable, "-c", DRIVER] if "stand-in" in kind else [self.binary]
        with self.daemon(*command, kind=kind.partition(" ")[0]):
            wait_until(lambda: "staleness" in self.log(), 120)
            yield

    @property
    def pid(self) -> int:
        return int(self.daemons[-1].pid)

    def log_bytes(self) -> int:
        return sum(log.stat().st_size for log in Path(orchestra.logs_dir(self.path)).iterdir())

    def prepare_changes(
        self, labels: Sequence[str], texts: dict[Path, str]
    ) -> tuple[Callable[[], None], Callable[[], bool]]:
        """Return functions that change registry files, and test if some codebases were written."""
        files = [(file.with_name(f".{file.stem}.new"), file) for file in texts]
        for (temporary, _), text in zip(files, texts.values()):
            temporary.write_text(text)
        waiting = {self.written(label): self.written(label).stat().st_ino for label in labels}

        def change() -> None:
            for temporary, file in files:
                temporary.replace(file)

        def is_done() -> bool:
            while waiting:
                path, inode = next(reversed(waiting.items()))
                if path.stat().st_ino == inode:
                    return False
                del waiting[path]
            return True

        return change, is_done


@contextmanager
def connect(path: str) -> Iterator[Callable[[], bytes]]:
    """Connect, and yield a function that asks for the status once."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(path)

        def ask() -> bytes:
            client.sendall(STATUS + b"\n")
            data = client.recv(1 << 20)
            while not data.endswith(b"\n"):
                data += client.recv(1 << 20)
            return data

        yield ask


# What is measured, in the order of the table


def bench_starts(bench: Bench) -> Iterator[Row]:
    bare = "bare start", median_cost(bench.measure_bare_start() for _ in range(21))
    yield timed("orchestra --version", None, median_cost(bench.measure("--version") for _ in range(21)), "", bare)
    asked = median_cost(bench.measure("daemon", "status") for _ in range(3))
    yield timed("daemon status, none running", None, asked, "", bare)
    with bench.watched():
        pairs = [(bench.measure_bare_start(), bench.measure("daemon", "status")) for _ in range(31)]
    bare_start, asked = (median_cost(costs) for costs in zip(*pairs))
    yield timed("daemon status, running", bench.count, asked, "3.0 ×", ("bare start", bare_start))


def bench_sync(bench: Bench, runs: int) -> Iterator[Row]:
    limits = {100: ("250 ms, 2.5 ×", "100 ms"), 1000: ("1.5 s, 2.5 ×", "0.4 s")}.get(bench.count, ("2.5 ×", ""))
    for kind, work, limit, yardstick in (
        ("cold", "sync --all, first", limits[0], "yaml.load, writing plainly"),
        ("look", "sync --all, unchanged", limits[1], "reading plainly, no YAML"),
    ):
        costs = []
        for number in range(runs):
            if number and kind == "cold":
                bench.forget_syncs()
            costs.append((bench.measure("sync", "--all"), bench.measure_bare_sync(kind)))
        cost, bare = (median_cost(column) for column in zip(*costs))
        yield timed(bench.prefix + work, bench.count, cost, limit, (yardstick, bare))


def bench_names(bench: Bench) -> Iterator[Row]:
    """Measure the command `status`, and what a shell runs to complete a codebase's name."""
    pairs = [(bench.measure_bare_start(), bench.measure("complete", "--", "sync", "c")) for _ in range(21)]
    bare, cost = (median_cost(costs) for costs in zip(*pairs))
    yield timed("completion of a name", bench.count, cost, "100 ms", ("bare start", bare))
    pairs = [(bench.measure_bare_sync("look"), bench.measure("status")) for _ in range(5)]
    bare, cost = (median_cost(costs) for costs in zip(*pairs))
    yield timed("status", bench.count, cost, "", ("reading plainly, no YAML", bare))


def bench_saves(bench: Bench) -> Iterator[Row]:
    limit = {10: "4 ms", 1000: "5 ms"}.get(bench.count, "")
    works = {"save to file written": ".yaml", **({} if bench.parts else {"save of its Markdown": ".md"})}
    for work, suffix in works.items():
        pairs = [(bare_save(bench, label), time_save(bench, label, suffix)) for label in rotate(bench)]
        bare, cost = (Cost(statistics.median(column)) for column in zip(*pairs))
        yield timed(bench.prefix + work, bench.count, cost, limit, ("yaml.load, replacing", bare))


def bench_saves_in_place(bench: Bench) -> Iterator[Row]:
    """Measure saves that leave a file empty for a while, each after an atomic save."""
    for kind in NOTIFIERS:
        with bench.watched(kind):
            for gap in GAPS:
                labels = rotate(bench)
                pairs = [(time_save(bench, label), time_save(bench, next(labels), gap=gap)) for label in labels]
                atomic, cost = (Cost(statistics.median(column)) for column in zip(*pairs))
                work = f"{kind}: save in place, after {gap * 1000:g} ms empty"
                yield timed(work, bench.count, cost, "1.0 ×", ("atomic save", atomic))


def bench_saves_in_scan(bench: Bench) -> Iterator[Row]:
    """Measure saves that come while the daemon scans for staleness after another."""
    pairs = []
    for first, second in zip(bench.labels[::2], bench.labels[1:15:2]):
        idle = time_save(bench, first)
        time.sleep(orchestra.STALENESS_DELAY + 0.1)
        pairs.append((idle, time_save(bench, second)))
    idle_save, cost = (Cost(statistics.median(column)) for column in zip(*pairs))
    yield timed("save during the staleness scan", bench.count, cost, "", ("save before it", idle_save))


def rotate(bench: Bench) -> Iterator[str]:
    """Yield a codebase for each save, no sooner again than when its window has closed."""
    some = bench.labels[:10]
    count = SAVES_TIMED if len(some) > 1 else SAVES_TIMED // 3
    for label in itertools.islice(itertools.cycle(some), count):
        time.sleep(WINDOW * 1.2 / len(some))
        yield label


def time_save(bench: Bench, label: str, suffix: str = ".yaml", gap: Optional[float] = None) -> float:
    """Measure from a save, atomic or after a gap, to the last file written, polled every 0.05 ms."""
    written, note = bench.written(label), f"Save {time.monotonic()}"
    text = bench.text(label, note) if suffix == ".yaml" else f"{note}\n"
    file = bench.file(label).with_suffix(suffix)
    inode = written.stat().st_ino
    for _ in rename_over(file, text) if gap is None else write_in_pieces(file, text):
        if gap:
            time.sleep(gap)
        started = time.perf_counter()
    while written.stat().st_ino == inode:
        assert time.perf_counter() < started + 60, "waited in vain"
        time.sleep(0.00005)
    return time.perf_counter() - started


def rename_over(file: Path, text: str) -> Iterator[None]:
    temporary = file.with_name(".save")
    temporary.write_text(text)
    yield
    temporary.replace(file)


def bare_save(bench: Bench, label: str) -> float:
    """Measure the least that a save costs: parsing one file, replacing the managed ones."""
    paths = [path for path in (bench.code / label).rglob("*") if path.is_file()]
    datas = [path.read_bytes() for path in paths]
    started = time.perf_counter()
    yaml.load(bench.file(label).read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    for path, data in zip(paths, datas):
        temporary = path.with_name(f"{path.name}.new")
        temporary.write_bytes(data)
        temporary.replace(path.with_name(f"{path.name}.copy"))
    took = time.perf_counter() - started
    for path in paths:
        path.with_name(f"{path.name}.copy").unlink()
    return took


def bench_bulk(bench: Bench, work: str = BULK) -> Iterator[Row]:
    """Measure all registry files changed at once, or a layer of all or of a tenth of them."""
    project = bench.labels[0].split("/")[0] if work == PROJECT_SAVED else "*"
    labels = [label for label in bench.labels if label.startswith(project.strip("*"))]
    texts = {
        BULK: {bench.file(label): bench.text(label, "All at once") for label in labels},
        ALL_SAVED: {bench.projects / "all.yaml": "notes: [All at once]\n"},
        PROJECT_SAVED: {bench.projects / project / "project.md": "All at once\n"},
    }
    bench.measure_bare_sync("cold", project)
    bare = "yaml.load, replacing", bench.measure_bare_sync("update", project)
    cpu, logged = cpu_seconds(bench.pid), bench.log_bytes()
    rounds = bench.log().count("staleness")
    change, is_done = bench.prepare_changes(labels, texts[work])
    started = time.perf_counter()
    change()
    wait_until(is_done, 120)
    cost = Cost(time.perf_counter() - started, cpu_seconds(bench.pid) - cpu)
    wait_until(lambda: bench.log().count("staleness") > rounds, 60)
    limits = ("2 s", "1 MB") if bench.count == 1000 else ("", "")
    yield timed(work, bench.count, cost, limits[0], bare)
    if work == BULK:
        yield Row(f"{work}: log", bench.count, format_bytes(bench.log_bytes() - logged), limits[1])
        with_scan = format_seconds(cpu_seconds(bench.pid) - cpu)
        yield Row(f"{work}: CPU with the staleness scan", bench.count, with_scan, limits[0])


def bench_burst(bench: Bench) -> Iterator[Row]:
    """Measure from the last of 20 quick saves to its arrival, at several paces."""
    label, took = bench.labels[-1], []
    for pace in (0.0, 0.005, 0.01, 0.02, 0.03):
        for number in range(20):
            note = f"Burst {pace} {number}"
            bench.save(label, note)
            time.sleep(pace)
        last = time.perf_counter()
        wait_until(lambda note=note: note in bench.written(label).read_text(), 10)  # type: ignore[misc]
        took.append(time.perf_counter() - last)
        time.sleep(WINDOW * 1.2)
    window = "the window", Cost(WINDOW)
    yield timed("last of 20 quick saves, worst of 5", bench.count, Cost(max(took)), "550 ms", window)


def bench_requests(bench: Bench) -> Iterator[Row]:
    with connect(bench.socket) as ask:
        size = len(ask())
        rate = rate_of(ask)
    path = str(bench.folder / "echo")
    server = subprocess.Popen([bench.python, "-I", "-c", BARE_SERVER, path, str(size)], stdout=subprocess.PIPE)
    assert server.stdout and server.stdout.readline()
    with connect(path) as ask:
        bare = rate_of(ask)
    server.wait(10)
    server.stdout.close()
    limit = "8,000 /s" if bench.count == 10 else ""
    told = f"bare echo of {format_bytes(size)}: {bare:,.0f} /s"
    yield Row("status on one connection", bench.count, f"{rate:,.0f} /s", limit, told, bare / rate)


def rate_of(ask: Callable[[], bytes], seconds: float = 1.5) -> float:
    started = time.perf_counter()
    count = 0
    while time.perf_counter() < started + seconds:
        ask()
        count += 1
    return count / (time.perf_counter() - started)


def bench_status_under_load(bench: Bench) -> Iterator[Row]:
    with connect(bench.socket) as ask:
        idle = times_of(ask, lambda: True)
        change, is_done = bench.prepare_changes(
            bench.labels, {bench.file(label): bench.text(label, "And again") for label in bench.labels}
        )
        change()
        busy = times_of(ask, is_done)
    bare = "median when idle", Cost(statistics.median(idle))
    p99 = Cost(busy[len(busy) * 99 // 100])
    yield timed("status while all is synced, p99", bench.count, p99, "15 ms", bare)
    yield timed("status while all is synced, worst", bench.count, Cost(busy[-1]), "", bare)


def times_of(ask: Callable[[], bytes], is_done: Callable[[], bool], at_least: int = 200) -> list[float]:
    took: list[float] = []
    while len(took) < at_least or not is_done():
        started = time.perf_counter()
        ask()
        took.append(time.perf_counter() - started)
        time.sleep(0.001)
    return sorted(took)


def bench_memory(bench: Bench, when: str = "after its start") -> Iterator[Row]:
    limit = {10: "25 MB", 1000: "32 MB"}.get(bench.count, "")
    argv = [bench.python, "-I", "-c", "import sys; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        bare = memory_of(process.pid)
        process.communicate()
    resident = memory_of(bench.pid)
    told = f"bare interpreter: {format_bytes(bare)}"
    yield Row(f"daemon memory {when}", bench.count, format_bytes(resident), limit, told, resident / bare)


def work_of(pid: int) -> tuple[int, float]:
    """Return how often a process has gone to sleep (0 if unknown), and its CPU time."""
    tasks = Path(f"/proc/{pid}/task").glob("*/status")
    found = [re.search(r"(?m)^voluntary_ctxt_switches:\s*(\d+)", task.read_text()) for task in tasks]
    return sum(int(match[1]) for match in found if match), cpu_seconds(pid)


def bench_idle(homes: dict[int, Bench]) -> Iterator[Row]:
    """Leave a daemon of each watcher alone, all for the same time."""
    benches = {NOTIFIERS[-1]: homes[10], NOTIFIERS[0]: homes[100], "polling": homes[1000]}
    with ExitStack() as stack:
        for kind, bench in benches.items():
            stack.enter_context(bench.watched(kind))
        before = {kind: work_of(bench.pid) for kind, bench in benches.items()}
        time.sleep(IDLE_SECONDS)
        for kind, bench in benches.items():
            slept, cpu = (now - then for now, then in zip(work_of(bench.pid), before[kind]))
            share = f"{cpu / IDLE_SECONDS * 100:.2f} % CPU"
            figure = f"{slept * 60 / IDLE_SECONDS:.1f} wake-ups/min, {share}" if IS_LINUX else share
            limit = "0.5 % CPU" if kind == "polling" else "1 wake-up/min"
            told = "60 looks/min by design" if kind == "polling" else f"over {IDLE_SECONDS:g} s"
            yield Row(f"idle: {kind}", bench.count, figure, limit, told)


def growths(rows: Sequence[Row]) -> Iterator[Row]:
    """Fit cost = a * N^b for the works whose growth counts."""
    for work, limit in GROWTH.items():
        points = [(row.count, row.cost.cpu or row.cost.wall) for row in rows if row.work == work and row.count]
        assert points, f"{work} was not measured"
        if len(points) > 1:
            xs, ys = ([math.log(value) for value in column] for column in zip(*points))
            x, y = statistics.mean(xs), statistics.mean(ys)
            slope = sum((a - x) * (b - y) for a, b in zip(xs, ys)) / sum((a - x) ** 2 for a in xs)
            counts = f"{points[0][0]:,} to {points[-1][0]:,}"
            yield Row(f"growth of {work}", None, f"N^{slope:.2f}", limit, counts)


def measure_all(make: Callable[..., Bench]) -> Iterator[Row]:
    homes = {count: make(count) for count in (10, 100, 1000)}
    whole = make(1, PARTS)
    yield from bench_starts(homes[10])
    for bench, runs in zip([*homes.values(), whole], (5, 5, 3, 5)):
        yield from bench_sync(bench, runs)
    for bench in (homes[10], make(60), homes[1000]):
        with bench.watched():
            yield from bench_names(bench)
    with whole.watched():
        yield from bench_saves(whole)
    for bench in homes.values():
        with bench.watched():
            yield from bench_memory(bench)
            if bench.count != 100:
                yield from bench_saves(bench)
                yield from bench_requests(bench)
            yield from bench_bulk(bench)
            if bench.count == 1000:
                yield from bench_memory(bench, "after changing all")
                yield from bench_status_under_load(bench)
                yield from bench_burst(bench)
                yield from bench_saves_in_scan(bench)
            yield from bench_bulk(bench, ALL_SAVED)
            yield from bench_bulk(bench, PROJECT_SAVED)
    yield from bench_saves_in_place(homes[10])
    yield from bench_idle(homes)
    if MOST_CODEBASES > 1000:
        yield from bench_sync(make(MOST_CODEBASES), 1)


def print_table(measured: Iterator[Row], conclude: Callable[[Sequence[Row]], Iterable[Row]]) -> None:
    """Print what is measured, even if a later measurement fails."""
    rows: list[Row] = []
    started = time.monotonic()
    try:
        rows.extend(measured)
    finally:
        took = f"Figures are medians, from a run of {time.monotonic() - started:.0f} s."
        print(f"{took}\n\n{format_table([*rows, *conclude(rows)])}")


@pytest.mark.bench
def test_print_the_figures(bare_python: str) -> None:
    with tempfile.TemporaryDirectory(prefix="orb", dir=BENCH_FOLDER) as folder:
        print("\n" + describe_machine(folder))
        print_table(measure_all(functools.partial(Bench, folder, bare_python)), growths)


# Peers: other programs that write agents' files, the yardsticks of `bench peers`

PEER_FILES = "CLAUDE.md", "AGENTS.md"
PEER_COUNTS = 1, 50  # of repositories
PEER_ROUNDS = 5  # of pairs; one where a peer has to be run in each of many repositories
FIRST_NOTE = "As it was at first"
OLDEST_NODE, NODE = 22, "node@22.23.3"  # what the peers need; fetched where the machine's is older
# A small process runs what is measured: a child's peak begins with its parent's memory.
RUN_EACH = """
import json, os, sys, time
null, peak, started = os.open(os.devnull, os.O_RDWR), 0, time.perf_counter()
for folder, argv in json.loads(sys.argv[1]):
    pid = os.fork()
    if not pid:
        for number in range(3):
            os.dup2(null, number)
        os.chdir(folder)
        os.execv(argv[0], argv)
    peak = max(peak, os.wait4(pid, 0)[2].ru_maxrss)
print(time.perf_counter() - started, peak * (1 if sys.platform == "darwin" else 1024))
"""


class Peer(NamedTuple):
    """A program, told to write PEER_FILES and nothing else."""

    name: str
    package: str  # on npm
    program: str  # below node_modules
    sources: dict[str, str]  # of a repository
    run: str  # in a repository, or beside a shared source
    run_all: str = ""  # in the folder above; where there is none, `run` in each
    watch: str = ""  # where `run` is run
    shared: bool = False  # one source, in the folder above, for all repositories


RULESYNC = "generate --silent --targets claudecode,codexcli --features rules"
RULESYNC_ALL = f"{RULESYNC} --output-roots {{roots}}"
RULESYNC_SOURCES = {".rulesync/rules/rules.md": "---\nroot: true\n---\n{rules}"}
RULESYNC_ON_NPM = "rulesync@17.0.0", "rulesync/dist/cli/index.js", RULESYNC_SOURCES
RULER = "apply --agents claude,codex --local-only --no-mcp --no-skills --no-gitignore --no-backup"
RULER_ON_NPM = "@intellectronica/ruler@0.3.44", "@intellectronica/ruler/dist/cli/index.js"
AI_RULEZ = 'version: "4.0"\nname: shop\npresets: [claude, codex]\nbuiltins: false\ngitignore: false\n'
AI_RULEZ_SOURCES = {".ai-rulez/config.yaml": AI_RULEZ, ".ai-rulez/rules/rules.md": "{rules}"}
AI_RULEZ_ON_NPM = "ai-rulez@4.11.5", "ai-rulez/bin/ai-rulez-bin", AI_RULEZ_SOURCES  # fetched by its first start
PEERS = (
    Peer("rulesync", *RULESYNC_ON_NPM, RULESYNC, watch=f"{RULESYNC} --watch"),
    Peer("rulesync with one source", *RULESYNC_ON_NPM, RULESYNC_ALL, watch=f"{RULESYNC_ALL} --watch", shared=True),
    Peer("ruler", *RULER_ON_NPM, {".ruler/AGENTS.md": "{rules}"}, RULER, f"{RULER} --nested"),
    Peer("ai-rulez", *AI_RULEZ_ON_NPM, "generate --quiet", "generate --quiet --recursive"),
)


def peer_rules(note: str) -> str:
    rules = (f"Rule {number} of the shop, money is integer cents and never a float" for number in range(30))
    return "".join(f"- {rule}\n" for rule in (*rules, note))


class PeerSide:
    """A peer with its repositories."""

    def __init__(self, peer: Peer, folder: str, modules: Path, node: str, count: int) -> None:
        self.peer, self.folder = peer, Path(folder)
        self.roots = [self.folder / f"r{number}" for number in range(count)]
        self.changed = self.roots if peer.shared else self.roots[-1:]  # by an edit
        self.places = [self.folder] if peer.shared else self.roots  # of the sources
        program = str(modules / peer.program)
        self.program = [node, program] if program.endswith(".js") else [program]
        self.environ = {**os.environ, "HOME": folder}

    def prepare(self) -> None:
        """Make the repositories anew, with nothing but the sources."""
        if self.folder.exists():
            self.folder.rename(tempfile.mkdtemp(dir=self.folder.parent))
        for root in self.roots:
            root.mkdir(parents=True)
        for place in self.places:
            self.edit(FIRST_NOTE, place)

    def edit(self, note: str, place: Optional[Path] = None) -> None:
        for name, text in self.peer.sources.items():
            file = (place or self.places[-1]) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            replace(file, text.replace("{rules}", f"# Rules\n\n{peer_rules(note)}"))

    def command(self, words: str) -> list[str]:
        return [*self.program, *words.format(roots=",".join(root.name for root in self.roots)).split()]

    def commands(self) -> list[tuple[str, list[str]]]:
        """Return what writes all files: commands, each with the folder to run it in."""
        run, places = self.peer.run, self.places
        if len(self.roots) > 1 and self.peer.run_all:
            run, places = self.peer.run_all, [self.folder]
        return [(str(place), self.command(run)) for place in places]

    def start(self, words: str) -> subprocess.Popen[bytes]:
        nothing: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        return subprocess.Popen(self.command(words), cwd=self.places[-1], env=self.environ, **nothing)

    @contextmanager
    def watched(self) -> Iterator[int]:
        """Run the watch mode, begin when it has seen an edit, and yield its pid; 0 without one."""
        if not self.peer.watch:
            yield 0
            return
        with self.start(self.peer.watch) as process:
            try:
                tries = itertools.count()
                wait_until(lambda: edit_to_file(self, f"Begin {next(tries)}", deadline=2) < 2)
                yield process.pid
            finally:
                process.kill()


class OrchestraSide(Bench):
    """Orchestra as installed, with the peers' rules: in each registry file, or in all.yaml."""

    def __init__(self, folder: str, python: str, count: int, shared: bool) -> None:
        os.mkdir(folder)
        self.shared = shared
        super().__init__(folder, python, count)
        self.roots = [self.code / label for label in self.labels]
        self.changed = self.roots if shared else self.roots[-1:]
        self.environ = self.variables()
        self.measure("sync", "--all")

    def text(self, label: str = "", note: str = "") -> str:
        rules = "" if self.shared else f"conventions:\n{peer_rules(note)}"
        return f"name: {label.split('/')[1]}\npath: {self.code / label}\ntargets: [claude, codex]\n{rules}"

    def prepare(self) -> None:
        self.forget_syncs()
        self.edit(FIRST_NOTE)

    def edit(self, note: str) -> None:
        if self.shared:
            replace(self.projects / "all.yaml", f"conventions:\n{peer_rules(note)}")
        else:
            self.save(self.labels[-1], note)

    def commands(self) -> list[tuple[str, list[str]]]:
        return [(str(self.folder), [self.binary, "sync", "--all"])]


def is_told(roots: Sequence[Path], note: str) -> bool:
    rules, files = peer_rules(note), (root / name for root in roots for name in PEER_FILES)
    return all(file.exists() and rules in file.read_text() for file in files)


def run_each(side: PeerSide | OrchestraSide) -> tuple[float, float]:
    """Run what writes all files; return the seconds, and the peak memory of the largest process."""
    argv = [sys.executable, "-I", "-S", "-c", RUN_EACH, json.dumps(side.commands())]
    done = subprocess.run(argv, env=side.environ, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    seconds, peak = map(float, done.stdout.split())
    return seconds, peak


def edit_to_file(side: PeerSide | OrchestraSide, note: str, run: str = "", deadline: float = 60) -> float:
    """Measure from a save to files that agree; `run` is a command for right after the save."""
    time.sleep(WINDOW * 1.2)
    last = side.changed[-1] / PEER_FILES[-1]
    old, started = last.stat().st_mtime_ns, time.perf_counter()
    side.edit(note)
    if run and isinstance(side, PeerSide):
        side.start(run).wait()
    # Looked at cheaply while they wait, for what is measured needs the processor.
    while last.stat().st_mtime_ns == old or not is_told(side.changed, note):
        if time.perf_counter() > started + deadline:
            break
        time.sleep(0.0002)
    return time.perf_counter() - started


def compare(side: PeerSide, ours: OrchestraSide) -> Iterator[Row]:
    """Measure in pairs: the peer, Orchestra, the peer ..."""
    peer, count, runs = side.peer, len(side.roots), len(side.commands())

    def row(work: str, how: str, theirs: Sequence[float], own: Sequence[float], aim: str = "0.20 ×") -> Row:
        form = format_seconds if aim == "0.20 ×" else format_bytes
        told = f"{peer.name}{how}: {form(statistics.median(theirs))}"
        ratio = statistics.median(mine / their for mine, their in zip(own, theirs))
        return Row(work, count, form(statistics.median(own)), aim, told, ratio)

    how = "" if count == 1 else ", one run" if runs == 1 else f", {runs} runs"
    for work in ("first run", "unchanged run"):
        pairs = []
        for _ in range(PEER_ROUNDS if runs == 1 else 1):
            if work == "first run":
                side.prepare()
                ours.prepare()
            pairs.append((run_each(side), run_each(ours)))
        assert is_told(ours.roots, FIRST_NOTE)
        if not is_told(side.roots, FIRST_NOTE):
            yield Row("not measured", count, "", "", f"{peer.name}: does not run, or does not write the rules")
            return
        (theirs, peaks), (own, own_peaks) = (zip(*column) for column in zip(*pairs))
        yield row(work, how, theirs, own)
        yield row(f"{work}: peak memory", how, peaks, own_peaks, "0.25 ×")
    with side.watched() as pid, ours.watched():
        run, how = ("", ", watching") if pid else (peer.run, ", its command run at once")
        notes = [f"Edit {number}" for number in range(PEER_ROUNDS)]
        times = [(edit_to_file(side, note, run), edit_to_file(ours, note)) for note in notes]
        yield row("edit to file", how, *zip(*times))
        if pid:
            yield row("memory after the edits", how, [memory_of(pid)], [memory_of(ours.pid)], "0.25 ×")


def install_peers(folder: Path) -> tuple[str, Path]:
    """Have npm fetch them; return a Node that is new enough, and node_modules."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if not npm or not node:
        pytest.exit("bench peers: needs npm and Node (Debian: apt install npm; macOS: brew install node)", 2)
    version = subprocess.check_output([node, "--version"], text=True)
    packages = {peer.package for peer in PEERS} | ({NODE} if int(version[1:].split(".")[0]) < OLDEST_NODE else set())
    argv = [npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--fetch-retries=0", *packages]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        why = " ".join(re.findall(r"(?m)^npm (?:error|ERR!) (.*)", done.stderr)[:3])
        pytest.exit(f"bench peers: npm could not fetch the other programs: {why}", 2)
    modules = folder / "node_modules"
    node = str(modules / "node/bin/node") if NODE in packages else node
    # ai-rulez fetches its program when it is first started.
    subprocess.run([node, modules / ".bin/ai-rulez", "--version"], check=False, capture_output=True, timeout=120)
    return node, modules


def measure_peers(folder: str, python: str, node: str, modules: Path) -> Iterator[Row]:
    kinds = [*((count, False) for count in PEER_COUNTS), (PEER_COUNTS[-1], True)]
    ours = {kind: OrchestraSide(f"{folder}/o{number}", python, *kind) for number, kind in enumerate(kinds)}
    for number, (peer, kind) in enumerate(itertools.product(PEERS, kinds)):
        if kind[1] == peer.shared:
            yield from compare(PeerSide(peer, f"{folder}/p{number}", modules, node, kind[0]), ours[kind])


def rows_ahead(rows: Sequence[Row]) -> Iterator[Row]:
    compared = [row.ratio for row in rows if row.ratio is not None]
    yield Row(
        "rows in which a peer is ahead", None, f"{sum(ratio > 1 for ratio in compared)} of {len(compared)} measured"
    )


@pytest.mark.peers
def test_print_the_figures_beside_the_peers(bare_python: str) -> None:
    with tempfile.TemporaryDirectory(prefix="orb", dir=BENCH_FOLDER) as folder:
        node, modules = install_peers(Path(folder, "npm"))
        version = subprocess.check_output([node, "--version"], text=True).strip()
        packages = ", ".join(dict.fromkeys(peer.package for peer in PEERS))
        print(f"\n{describe_machine(folder)}\nNode {version}, {packages}")
        print_table(measure_peers(folder, bare_python, node, modules), rows_ahead)


def pytest_arguments(argv: Sequence[str]) -> list[str]:
    """Let first words `bench`, `bench peers` or `soak` choose what a normal run leaves out."""
    if argv[:2] == ["bench", "peers"]:
        argv = argv[1:]
    if argv[:1] in (["bench"], ["peers"], ["soak"]):
        return ["-m", argv[0], "-s", "-q", *argv[1:]]
    return list(argv)


def test_bench_and_soak_choose_what_a_normal_run_leaves_out() -> None:
    assert pytest_arguments(["bench", "-x"]) == ["-m", "bench", "-s", "-q", "-x"]
    assert pytest_arguments(["bench", "peers", "-x"]) == ["-m", "peers", "-s", "-q", "-x"]
    assert pytest_arguments(["soak"]) == ["-m", "soak", "-s", "-q"]
    assert pytest_arguments(["-k", "bench"]) == ["-k", "bench"]
    assert pytest_arguments([]) == []


class Share:
    """A plugin for pytest in one of several processes: it leaves out the tests that another has taken."""

    def __init__(self, taken: Any) -> None:
        self.taken = taken  # how many tests were taken, by all of them
        self.passed = 0  # how many have had their turn here

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self) -> Optional[bool]:
        with self.taken.get_lock():
            is_free = self.passed == self.taken.value
            self.taken.value += is_free
        self.passed += 1
        return None if is_free else True


def run_shared(processes: int) -> int:
    """Run all tests in several processes. This one reports as it goes; the others' reports follow."""
    fork = multiprocessing.get_context("fork")
    share = Share(fork.Value("i", 0))

    def work(report: Any) -> None:
        os.dup2(report.fileno(), 1)
        os.dup2(1, 2)
        sys.exit(pytest.main([__file__], [share]))

    with ExitStack() as stack:
        reports = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(processes - 1)]
        others = [fork.Process(target=work, args=(report,)) for report in reports]
        for other in others:
            other.start()
        statuses = [int(pytest.main([__file__], [share]))]
        for other, report in zip(others, reports):
            other.join()
            statuses.append(abs(other.exitcode or 0))
            report.seek(0)
            print(report.read().decode("utf-8", "replace"), flush=True)
    return max(statuses)


if __name__ == "__main__":
    arguments = pytest_arguments(sys.argv[1:])
    if arguments:
        sys.exit(pytest.main([__file__, *arguments]))
    sys.exit(run_shared(int(os.environ.get("ORCHESTRA_PROCESSES") or 2)))
