#!/usr/bin/env python3
"""Tests of orchestra.py, in its order and under its banners.

    python3 test_orchestra.py [pytest's arguments]

runs them on any Python from 3.9 on: where pytest or PyYAML is missing, a virtual environment is made beside this file.
"""

from __future__ import annotations

import ast
import errno
import functools
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import os
import plistlib
import random
import re
import resource
import select
import selectors  # before a stand-in for kqueue can mislead it
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "pytest", "PyYAML"]
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
ALL_TARGETS = list(orchestra.TARGETS)
BEGIN, END = orchestra.BLOCK_BEGIN.encode(), orchestra.BLOCK_END.encode()


# ── Helpers ───────────────────────────────────────────────────────────────────


class Ran(NamedTuple):
    """What a command left: its exit status and what it said."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Tell of each file that was, or is to be, written."""
        return [line for line in self.out.splitlines() if not re.match(r"\d+ (written|to write), ", line)]

    @property
    def complaints(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("orchestra: ")]


class Home:
    """A home folder with a registry to write, and beside it the folders of the codebases."""

    def __init__(self, folder: str, capsys: Any) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.path = str(self.folder / "home")
        self.code = self.folder / "code"
        self.environ = {"HOME": self.path}
        self.capsys = capsys
        os.mkdir(self.path)
        self.code.mkdir()

    def write_registry(self, name: str, text: Any) -> Path:
        """Write a file below projects/: text as it is, a mapping as YAML."""
        file = Path(orchestra.projects_root(self.path), name)
        file.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(text, (str, bytes)):
            text = yaml.safe_dump(text, sort_keys=False, allow_unicode=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    def make_codebase(self, label: str = "shop/api", files: dict[str, Any] = {}, **values: Any) -> Path:
        """Make a codebase's folder with some files in it, and register it by hand."""
        root = self.code / label
        root.mkdir(parents=True, exist_ok=True)
        put_files(root, files)
        self.register(label, **values)
        return root

    def register(self, label: str = "shop/api", **values: Any) -> Path:
        return self.write_registry(
            f"{label}.yaml", {"name": label.split("/")[1], "path": str(self.code / label), **values}
        )

    def run(self, *argv: str) -> Ran:
        """Run one command in this process."""
        self.capsys.readouterr()
        try:
            status = orchestra.main(argv, self.environ)
        except SystemExit as error:  # argparse's own exits
            status = int(error.code or 0)
        said = self.capsys.readouterr()
        return Ran(status, said.out, said.err)

    def run_fine(self, *argv: str) -> Ran:
        ran = self.run(*argv)
        assert ran.status == 0, ran
        return ran

    def sync(self, *argv: str) -> Ran:
        return self.run_fine("sync", *(argv or ("--all",)))

    def start(self, *argv: str, **options: Any) -> subprocess.Popen[str]:
        """Start the real script."""
        environ = {**os.environ, "HOME": self.path, **options.pop("environ", {})}
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen([sys.executable, str(SCRIPT), *argv], env=environ, text=True, **options)

    def run_script(self, *argv: str, **options: Any) -> Ran:
        return finish(self.start(*argv, **options))

    def run_as_nobody(self, *argv: str) -> Ran:
        """Run one command as a user whom permissions hold back, which root they do not."""
        if os.geteuid() != 0:
            return self.run(*argv)
        self.run("status", "--json")  # imports what the child may not be able to read
        import difflib  # noqa: F401

        for parent, folders, files in os.walk(self.folder):
            for path in (parent, *(os.path.join(parent, name) for name in (*folders, *files))):
                os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        return in_child(lambda: self.run(*argv))

    def registry(self) -> orchestra.Registry:
        return orchestra.load_registry(self.path)

    def problems(self) -> list[str]:
        return [str(problem) for problem in self.registry().problems]

    def status_of(self, label: str = "shop/api") -> str:
        return str(self.staleness(label)["status"])

    def staleness(self, label: str = "shop/api") -> dict[str, Any]:
        entries = json.loads(self.run("status", "--json").out)["codebases"]
        return next(entry for entry in entries if f"{entry['project']}/{entry['codebase']}" == label)

    def backups(self, label: str = "shop/api") -> dict[str, bytes]:
        """Give the newest kept version of each file."""
        key = tuple(label.split("/"))
        return {backup.path: Path(backup.file).read_bytes() for backup in orchestra.list_backups(self.path, key)}

    def leftovers(self) -> list[str]:
        return [path for path in tree(self.folder) if path.endswith(".tmp")]


def in_child(work: Callable[[], Ran]) -> Ran:
    """Call `work` in a child process that has given up being root."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            ran = work()
        except BaseException:
            ran = Ran(-1, "", traceback.format_exc())
        os.write(writer, json.dumps(ran).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        ran = Ran(*json.loads(pipe.read()))
    os.waitpid(pid, 0)
    return ran


def finish(process: subprocess.Popen[str], timeout: float = 60) -> Ran:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Ran(process.returncode, out, err)


def put_files(root: Path, files: dict[str, Any]) -> None:
    """Write files; a value is text, bytes, None for a folder, or a function that makes what is to stand there."""
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


def tree(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Give the inode, time and bytes of every file below a folder; of a link, where it leads."""
    found = {}
    for parent, _, files in os.walk(root):
        for name in files:
            path = os.path.join(parent, name)
            info = os.lstat(path)
            if stat.S_ISREG(info.st_mode):
                data = Path(path).read_bytes()
            else:
                data = os.readlink(path).encode() if os.path.islink(path) else b""
            found[os.path.relpath(path, root)] = (info.st_ino, info.st_mtime_ns, data)
    return found


def contents(root: Path) -> dict[str, bytes]:
    return {path: data for path, (_, _, data) in tree(root).items()}


def wait_until(is_true: Callable[[], Any], timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def codebase_with(**values: Any) -> orchestra.Codebase:
    return orchestra.Codebase("shop", "api", "/code/api", **values)


CLINE = ".clinerules/orchestra.md"


def block(text: str = "x") -> bytes:
    return BEGIN + f"\n{text}\n".encode() + END


@pytest.fixture
def home(capsys: Any) -> Any:
    folder = tempfile.mkdtemp(prefix="orc", dir="/tmp")
    yield Home(folder, capsys)
    shutil.rmtree(folder)


@pytest.fixture(params=["libyaml", "pure Python"])
def loader(request: Any, monkeypatch: Any) -> Any:
    """Read YAML with each of PyYAML's two parsers."""
    if request.param == "libyaml" and not yaml.__with_libyaml__:
        pytest.skip("this PyYAML has no libyaml")
    monkeypatch.setattr(yaml, "__with_libyaml__", request.param == "libyaml")
    orchestra.text_loader.cache_clear()
    yield request.param
    orchestra.text_loader.cache_clear()


class Clock:
    """A clock that only tests wind."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Live:
    """A home folder, its registry, its codebases, and the daemons started in it."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.path = str(self.folder / "h")
        self.code = self.folder / "c"
        self.projects = Path(orchestra.projects_root(self.path))
        self.socket = orchestra.socket_path(self.path)
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.lookouts: list[Lookout] = []
        self.code.mkdir()
        self.projects.mkdir(parents=True)

    # The registry

    def file(self, label: str = "shop/api") -> Path:
        return self.projects / f"{label}.yaml"

    def text(self, label: str = "shop/api", note: str = "first") -> str:
        root = self.code / label
        root.mkdir(parents=True, exist_ok=True)
        return f"name: {label.split('/')[1]}\npath: {root}\ntargets: [claude]\nnotes:\n- {note}\n"

    def save(self, label: str = "shop/api", note: str = "first") -> Path:
        """Save a registry file as most editors do: a reader sees the old text or the new."""
        file = self.file(label)
        file.parent.mkdir(exist_ok=True)
        return replace(file, self.text(label, note))

    def save_many(self, count: int, note: str = "first") -> list[str]:
        labels = [f"p{number % 10}/c{number}" for number in range(count)]
        for label in labels:
            self.save(label, note)
        return labels

    def has(self, note: str, label: str = "shop/api") -> bool:
        return f"- {note}\n" in self.read(label)

    def read(self, label: str = "shop/api") -> str:
        file = self.code / label / "CLAUDE.md"
        return file.read_text() if file.exists() else ""

    # The daemon

    def command(self, *argv: str, kind: str = "") -> list[str]:
        if kind == "kqueue" and not HAS_KQUEUE:
            return [sys.executable, "-c", DRIVER, *argv]
        return [sys.executable, str(SCRIPT), *argv]

    def start(self, kind: str = "", wait: bool = True, **options: Any) -> subprocess.Popen[bytes]:
        """Start the real daemon as a process; what it says goes to the file `said`."""
        environ = {**os.environ, "HOME": self.path, "ORCHESTRA_WATCHER": kind, **options.pop("environ", {})}
        with open(self.folder / "said", "ab") as said:
            options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": said, **options}
            daemon = subprocess.Popen(self.command("daemon", "start", kind=kind), env=environ, **options)
        self.daemons.append(daemon)
        if wait:
            wait_until(lambda: daemon.poll() is not None or self.answers())
            assert daemon.poll() is None, self.said()
        return daemon

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def run(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run one command as a process."""
        options = {"env": {**os.environ, "HOME": self.path}, "capture_output": True, "text": True, **options}
        return subprocess.run(self.command(*argv), check=False, timeout=60, stdin=subprocess.DEVNULL, **options)

    def answers(self) -> bool:
        return self.served_by() != 0

    def served_by(self) -> int:
        """Give the process that answers on the socket, 0 for none."""
        try:
            return int(self.status()["pid"])
        except orchestra.DaemonError:
            return 0

    def status(self) -> Any:
        return orchestra.send_request(self.path, {"cmd": "status"}, 60)

    def is_quiet(self) -> bool:
        """Say whether all that was submitted is done and logged: jobs end with a line each."""
        return self.status()["queue_depth"] == 0 and self.synced() > 0

    def log(self) -> str:
        return Path(orchestra.stdout_log_path(self.path)).read_text()

    def errors(self) -> str:
        return Path(orchestra.stderr_log_path(self.path)).read_text()

    def synced(self, source: str = "") -> int:
        return self.log().count(f" source={source}") if source else self.log().count(" synced ")

    def wait_for_start_job(self) -> None:
        wait_until(lambda: self.synced("start") == 1)

    def stop(self, daemon: subprocess.Popen[bytes]) -> None:
        """Stop a daemon that should have nothing to complain of, and see it leave nothing behind."""
        orchestra.request_stop(self.path)
        self.expect_end(daemon)

    def expect_end(self, daemon: subprocess.Popen[bytes], status: int = 0) -> None:
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
        """Send bytes and no more, and give all that comes back."""
        with self.connection(data) as client:
            client.shutdown(socket.SHUT_WR)
            return read_all(client)

    def close(self) -> None:
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()
        for lookout in self.lookouts:
            lookout.close()
        shutil.rmtree(self.folder)


def replace(file: Path, text: str) -> Path:
    temporary = file.with_name(f".{file.name}.new")
    temporary.write_text(text)
    temporary.replace(file)
    return file


def read_all(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


def read_line(client: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        more = client.recv(1)
        assert more, data
        data += more
    return data


def run_git(folder: Path, *argv: str) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "init.defaultBranch=one", "-c", "gc.auto=0"]
    environ = {**os.environ, "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(["git", *identity, *argv], cwd=folder, check=True, capture_output=True, env=environ)


@pytest.fixture
def live() -> Iterator[Live]:
    live = Live(tempfile.mkdtemp(prefix="orc", dir="/tmp"))
    yield live
    live.close()


@pytest.fixture
def served(live: Live) -> Iterator[Live]:
    """A home with a daemon in it, which must end well after the test."""
    daemon = live.start()
    live.wait_for_start_job()
    yield live
    live.stop(daemon)


# ── The shape of the file ─────────────────────────────────────────────────────

SOURCE = SCRIPT.read_text(encoding="utf-8")
MODULE = ast.parse(SOURCE)
BANNER = re.compile(r"(?m)^# ── (\d+) (.+?) ─+$")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


SECTION_STARTS = [(SOURCE.count("\n", 0, match.start()) + 1, int(match[1])) for match in BANNER.finditer(SOURCE)]


def section_of(node: Any) -> int:
    """Give the number of the section a node stands in; 0 above the first."""
    return next((number for line, number in reversed(SECTION_STARTS) if line <= node.lineno), 0)


def without_annotations(node: ast.AST) -> list[ast.AST]:
    """List a node and all below it but annotations, which are never evaluated."""
    nodes = [node]
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns"):
            for item in value if isinstance(value, list) else [value]:
                nodes += without_annotations(item) if isinstance(item, ast.AST) else []
    return nodes


def names_defined_by(node: ast.stmt) -> set[str]:
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return {node.name}
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}


def dotted(node: ast.AST) -> str:
    """Spell a call's function as it was written: os.path.join."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def sections_where(is_it: Callable[[ast.AST], bool]) -> set[int]:
    return {section_of(node) for node in ast.walk(MODULE) if hasattr(node, "lineno") and is_it(node)}


def sections_that_call(*names: str) -> set[int]:
    return sections_where(lambda node: isinstance(node, ast.Call) and dotted(node.func) in names)


def sections_that_import(*names: str) -> set[int]:
    def imports(node: ast.AST) -> bool:
        if isinstance(node, ast.ImportFrom):
            return (node.module or "").split(".")[0] in names
        return isinstance(node, ast.Import) and any(alias.name.split(".")[0] in names for alias in node.names)

    return sections_where(imports)


def test_the_contents_in_the_docstring_are_the_banners() -> None:
    contents = re.findall(r"(?m)^ +(\d+) (\S.*?) {2,}\S", (ast.get_docstring(MODULE, clean=False) or ""))
    assert contents == BANNER.findall(SOURCE)
    assert [int(number) for number, _ in contents] == sorted(int(number) for number, _ in contents)


def test_each_section_uses_only_those_above_it() -> None:
    defined = {name: section_of(node) for node in MODULE.body for name in names_defined_by(node)}
    below = []
    for node in MODULE.body:
        inner = without_annotations(node)
        own = {n.id for n in inner if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        own |= {n.arg for n in inner if isinstance(n, ast.arg)}
        used = {n.id for n in inner if isinstance(n, ast.Name)} - (own - names_defined_by(node))
        below += [(section_of(node), name) for name in used if defined.get(name, 0) > section_of(node)]
    assert below == []


def test_main_is_last() -> None:
    *_, main, start = MODULE.body
    assert isinstance(main, ast.FunctionDef) and main.name == "main"
    assert isinstance(start, ast.If) and ast.unparse(start.test) == "__name__ == '__main__'"


def test_only_the_commands_print() -> None:
    assert sections_that_call("print") == {13}


CHANGES_ON_DISK = (
    *("rename", "renames", "replace", "link", "symlink", "unlink", "remove", "mkdir", "makedirs", "rmdir"),
    *("removedirs", "truncate", "ftruncate", "fsync", "chown", "utime", "mkfifo", "pwrite"),
)


def test_only_the_files_section_changes_files() -> None:
    assert sections_that_call(*(f"os.{name}" for name in CHANGES_ON_DISK)) == {3}


def test_only_the_files_section_opens_files_for_writing() -> None:
    harmless = {
        flag
        for node in ast.walk(MODULE)
        if isinstance(node, ast.Call) and node.args and dotted(node.args[0]) == "os.devnull"
        for flag in ast.walk(node)
    }
    flags = ("os.O_WRONLY", "os.O_RDWR", "os.O_CREAT", "os.O_APPEND", "os.O_TRUNC")
    assert sections_where(lambda node: dotted(node) in flags and node not in harmless) == {3}

    def opens_to_write(node: ast.AST) -> bool:
        if not isinstance(node, ast.Call) or dotted(node.func) != "open" or dotted(node.args[0]) == "os.devnull":
            return False
        words = [word.value for word in ast.walk(node) if isinstance(word, ast.Constant)]
        return any(isinstance(word, str) and set(word) & set("wax+") for word in words)

    assert sections_where(opens_to_write) <= {3}
    assert sections_that_import("shutil", "tempfile", "pathlib") <= {3}


def test_sockets_and_programs_have_their_sections() -> None:
    assert sections_where(lambda node: dotted(node).startswith("socket.")) <= {10, 11}
    assert sections_that_import("socket", "selectors") <= {0, 9, 10, 11}
    assert sections_that_import("subprocess") <= {12, 13}
    assert sections_where(lambda node: dotted(node) in ("os.fork", "os.system", "os.popen", "os.posix_spawn")) == set()


def test_there_is_no_global_state() -> None:
    assert sections_where(lambda node: isinstance(node, (ast.Global, ast.Nonlocal))) == set()


def test_functions_fit_on_a_screen() -> None:
    lengths = {n.name: (n.end_lineno or 0) - n.lineno + 1 for n in ast.walk(MODULE) if isinstance(n, FUNCTIONS)}
    assert {name: length for name, length in lengths.items() if length > 60 and name != "build_parser"} == {}


# ── 1 Errors ──────────────────────────────────────────────────────────────────


def test_an_os_error_is_told_in_one_line_with_its_place() -> None:
    told = "^/no/where: no such file or directory$"
    with pytest.raises(orchestra.IoError, match=told) as caught, orchestra.blame("/no/where"):
        os.stat("/no/where")
    assert isinstance(caught.value.source, FileNotFoundError)


def test_an_error_that_has_a_way_out_names_it() -> None:
    assert "free some space" in orchestra.hint_for_os_error(OSError(28, "No space left on device"))


def test_the_user_sees_one_line_and_the_way_out(home: Home) -> None:
    ran = home.run("diff", "nope")
    assert ran == (
        2,
        "",
        "orchestra: codebase nope: expected a registered name, got an unknown one\n  try: orchestra project list\n",
    )


# ── 2 Places ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (orchestra.orchestra_root("/h"), "/h/.orchestra"),
        (orchestra.projects_root("/h"), "/h/.orchestra/projects"),
        (orchestra.project_path("/h", "shop"), "/h/.orchestra/projects/shop/project.yaml"),
        (orchestra.codebase_path("/h", ("shop", "api")), "/h/.orchestra/projects/shop/api.yaml"),
        (orchestra.record_path("/h", ("shop", "api")), "/h/.orchestra/hashes/shop/api.json"),
        (orchestra.backups_of("/h", ("shop", "api")), "/h/.orchestra/backups/shop/api"),
        (orchestra.socket_path("/h"), "/h/.orchestra/daemon.sock"),
        (orchestra.stdout_log_path("/h"), "/h/.orchestra/logs/daemon.log"),
        (orchestra.stderr_log_path("/h"), "/h/.orchestra/logs/daemon-err.log"),
        (orchestra.launchd_plist_path("/h"), "/h/Library/LaunchAgents/dev.orchestra.daemon.plist"),
    ],
)
def test_everything_has_its_place_below_the_home(place: str, expected: str) -> None:
    assert place == expected


@pytest.mark.parametrize("path", ["/h/code/api", "/h2/code", "/h", "/other", "/h/~/x"])
def test_shortening_a_path_is_undone_by_expanding_it(path: str) -> None:
    assert orchestra.expand_home("/h", orchestra.shorten_home("/h", path)) == path


def test_what_orchestra_keeps_is_private(home: Home) -> None:
    home.make_codebase()
    shutil.rmtree(orchestra.orchestra_root(home.path))
    home.run_fine("init", str(home.code / "shop/api"), "-p", "shop", "--sync")
    for parent, folders, files in os.walk(orchestra.orchestra_root(home.path)):
        modes = {stat.S_IMODE(os.stat(os.path.join(parent, name)).st_mode) for name in folders}
        assert modes <= {0o700}
        assert {stat.S_IMODE(os.stat(os.path.join(parent, name)).st_mode) for name in files} <= {0o600}
    assert stat.S_IMODE(os.stat(orchestra.orchestra_root(home.path)).st_mode) == 0o700


# ── 3 Files ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"text", "file"),
        (None, "folder"),
        (link_to("elsewhere"), "symlink"),
        (link_to("."), "symlink"),
        (os.mkfifo, "special"),
        (make_socket, "special"),
    ],
)
def test_a_look_at_the_disk_never_follows_or_waits(home: Home, content: Any, kind: str) -> None:
    put_files(home.code, {"x": content})
    disk = orchestra.read_disk(str(home.code / "x"))
    assert (disk.kind, disk.data) == (kind, b"text" if kind == "file" else b"")


def test_what_is_not_there_is_absent(home: Home) -> None:
    put_files(home.code, {"file": "x"})
    assert orchestra.read_disk(str(home.code / "none")) == orchestra.ABSENT
    assert orchestra.read_disk(str(home.code / "file/below")) == orchestra.ABSENT


@pytest.mark.parametrize("size", [0, 1, 5, (1 << 20) + 7])
@pytest.mark.parametrize("limit", [-1, 4, 5, 6])
def test_a_file_is_read_whole_or_up_to_the_limit(home: Home, size: int, limit: int) -> None:
    data = os.urandom(size)
    put_files(home.code, {"x": data})
    assert orchestra.read_disk(str(home.code / "x"), limit).data == (data if limit < 0 else data[:limit])


@pytest.fixture
def lock(home: Home) -> Iterator[orchestra.Lock]:
    with orchestra.hold_lock(os.path.join(home.path, "lock"), sweep=print) as lock:
        yield lock


def test_replacing_keeps_the_mode_and_leaves_no_temporary(home: Home, lock: orchestra.Lock) -> None:
    path = home.code / "x"
    path.write_bytes(b"old")
    path.chmod(0o640)
    orchestra.replace_file(str(path), b"new", orchestra.read_disk(str(path)), lock)
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", 0o640)
    assert os.listdir(home.code) == ["x"]


@pytest.mark.parametrize(
    ("planned", "content"),
    [(b"old", b"saved"), (b"old", None), (b"old", link_to("y")), (None, b"saved"), (None, link_to("y"))],
)
def test_a_file_that_is_not_as_planned_is_not_touched(
    home: Home, lock: orchestra.Lock, planned: Optional[bytes], content: Any
) -> None:
    expected = orchestra.ABSENT if planned is None else orchestra.Disk("file", planned, 0o644)
    put_files(home.code, {"x": content})
    before = tree(home.code)
    with pytest.raises(orchestra.FileChanged):
        orchestra.replace_file(str(home.code / "x"), b"new", expected, lock)
    with pytest.raises(orchestra.FileChanged):
        orchestra.remove_file(str(home.code / "x"), expected, lock)
    assert tree(home.code) == before


def test_a_file_that_appears_at_the_last_moment_is_not_replaced(
    home: Home, lock: orchestra.Lock, monkeypatch: Any
) -> None:
    path = home.code / "x"

    def look_then_let_it_appear(*args: Any) -> orchestra.Disk:
        path.write_bytes(b"the user's")
        return orchestra.ABSENT

    monkeypatch.setattr(orchestra, "read_disk", look_then_let_it_appear)
    with pytest.raises(orchestra.FileChanged):
        orchestra.replace_file(str(path), b"new", orchestra.ABSENT, lock)
    assert contents(home.code) == {"x": b"the user's"}


def test_a_reader_sees_the_old_text_or_the_new(home: Home, lock: orchestra.Lock) -> None:
    path = home.code / "x"
    texts = [bytes([65 + i]) * 200_000 for i in range(2)]
    path.write_bytes(texts[0])
    seen = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(100):
        orchestra.replace_file(str(path), texts[(i + 1) % 2], orchestra.read_disk(str(path)), lock)
    done.set()
    reader.join()
    assert seen <= set(texts)


def test_one_writer_has_the_lock_at_a_time(home: Home) -> None:
    path = os.path.join(home.path, "lock")
    with orchestra.hold_lock(path, sweep=print):
        second = orchestra.hold_lock(path, sweep=print, timeout=0.05)
        with pytest.raises(orchestra.SyncError, match="another orchestra holds it"), second:
            pass
    with orchestra.hold_lock(path, sweep=print, timeout=0.05):
        pass


def test_a_turn_sweeps_up_after_a_killed_one_and_nothing_else(home: Home) -> None:
    path = os.path.join(home.path, "lock")
    put_files(home.code, {".orchestra-dead.tmp": "half", ".orchestra-dead-2.tmp": "half"})
    put_files(home.code, {".orchestra-alive.tmp": "x", "dead.tmp": "x"})
    Path(path).write_text('["dead", null]\nand what a longer one left')
    folders = [str(home.code), "/no/where"]
    with orchestra.hold_lock(path, lambda left: orchestra.sweep_folders(folders, left)) as lock:
        assert Path(path).read_bytes() == b""
        assert lock.token != "dead" and lock.token in Path(path).read_text()
    assert Path(path).read_bytes() == b""
    assert sorted(os.listdir(home.code)) == [".orchestra-alive.tmp", "dead.tmp"]


def test_each_version_is_backed_up_once_even_when_the_clock_stands_still(home: Home) -> None:
    key = ("shop", "api")
    for text in (b"1", b"2", b"2", b"3", b"1"):
        disk = orchestra.Disk("file", text, 0o640)
        orchestra.back_up(home.path, key, "a/CLAUDE.md", disk, "why", "t", lambda: 1e9)
    kept = orchestra.list_backups(home.path, key)
    assert [Path(backup.file).read_bytes() for backup in kept] == [b"1", b"2", b"3", b"1"]
    assert {(backup.path, backup.why, backup.when[:15]) for backup in kept} == {
        ("a/CLAUDE.md", "why", "20010909T014640")
    }
    assert home.leftovers() == []


DAYS = [f"202601{day:02d}T120000.000000Z" for day in range(1, 32)]
MONTHS = [f"{2020 + i // 12}{i % 12 + 1:02d}01T000000.000000Z" for i in range(60)]
MINUTES = [f"20260301T12{minute:02d}00.000000Z" for minute in range(60)]


@pytest.mark.parametrize(
    ("times", "dropped"),
    [
        ([], []),
        (MINUTES[:11], []),
        (MINUTES[:12], MINUTES[1:2]),
        (MINUTES, MINUTES[1:50]),
        (DAYS, []),
        ([*DAYS, "20260201T000000.000000Z"], DAYS[1:2]),
        ([*DAYS, *MINUTES], [*DAYS[1:2], *MINUTES[:50]]),
        (MONTHS, []),
    ],
)
def test_the_first_backup_stays_for_good_and_later_ones_are_thinned(times: list[str], dropped: list[str]) -> None:
    assert orchestra.times_to_drop(times) == set(dropped)


def test_thinned_backups_leave_no_empty_folders(home: Home) -> None:
    key = ("shop", "api")
    for i in range(15):
        for path in ("a/CLAUDE.md", "GEMINI.md"):
            if path == "a/CLAUDE.md" or i % 2:
                disk = orchestra.Disk("file", b"%d" % i, 0o640)
                orchestra.back_up(home.path, key, path, disk, "why", "t", lambda now=i: 1e9 + now)
    kept = orchestra.list_backups(home.path, key)
    texts = {path: [Path(b.file).read_text() for b in kept if b.path == path] for path in ("a/CLAUDE.md", "GEMINI.md")}
    assert texts["a/CLAUDE.md"] == ["0", *map(str, range(5, 15))]
    assert texts["GEMINI.md"] == [str(i) for i in range(15) if i % 2]
    assert {backup.why for backup in kept} == {"why"}
    assert len(os.listdir(orchestra.backups_of(home.path, key))) == len({backup.when for backup in kept})


@pytest.mark.skipif(not hasattr(os, "setxattr"), reason="extended attributes: only os of Linux has them")
def test_replacing_keeps_extended_attributes(home: Home, lock: orchestra.Lock) -> None:
    path = home.code / "x"
    path.write_bytes(b"old")
    try:
        os.setxattr(path, "user.note", b"mine")
    except OSError as error:
        pytest.skip(f"the file system has no extended attributes: {error}")
    orchestra.replace_file(str(path), b"new", orchestra.read_disk(str(path)), lock)
    assert (path.read_bytes(), os.getxattr(path, "user.note")) == (b"new", b"mine")


def test_on_macos_attributes_are_copied_by_the_systems_own_call(
    home: Home, lock: orchestra.Lock, monkeypatch: Any
) -> None:
    path = home.code / "x"
    path.write_bytes(b"old")
    calls = []

    class Libc:
        def fcopyfile(self, source: int, target: int, state: None, flags: int) -> int:
            calls.append((os.pread(source, 9, 0), os.fstat(target).st_size, state, flags))
            return 0

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.delattr(os, "listxattr", raising=False)
    monkeypatch.setattr("ctypes.CDLL", lambda name, use_errno: Libc())
    monkeypatch.setattr(orchestra, "swap_files", lambda one, other: False)
    orchestra.replace_file(str(path), b"newer", orchestra.read_disk(str(path)), lock)
    assert (path.read_bytes(), calls) == (b"newer", [(b"old", 5, None, 5)])


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize(
    ("user", "group", "mode", "expected"),
    [
        (0, NOBODY, 0o640, (0, NOBODY, 0o640)),
        (NOBODY, NOBODY, 0o640, (NOBODY, NOBODY, 0o640)),
        (NOBODY, 0, 0o604, (NOBODY, 0, 0o604)),
    ],
)
def test_replacing_keeps_owner_and_group(
    home: Home, lock: orchestra.Lock, user: int, group: int, mode: int, expected: tuple[int, int, int]
) -> None:
    path = home.code / "x"
    path.write_bytes(b"old")
    path.chmod(mode)
    os.chown(path, user, group)
    orchestra.replace_file(str(path), b"new", orchestra.read_disk(str(path)), lock)
    info = path.stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == expected


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_a_file_whose_group_cannot_be_kept_is_not_opened_to_another(home: Home) -> None:
    path = home.code / "x"
    path.write_bytes(b"old")
    path.chmod(0o640)
    os.chown(path, NOBODY, 12345)
    for folder in (home.folder, home.code):
        folder.chmod(0o777)

    def replace_as_nobody() -> Ran:
        with orchestra.hold_lock(str(home.code / "lock"), sweep=print) as lock:
            orchestra.replace_file(str(path), b"new", orchestra.read_disk(str(path)), lock)
        return Ran(0, "", "")

    assert in_child(replace_as_nobody).err == ""
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", 0o600)


@pytest.mark.skipif(not IS_LINUX, reason="only Linux tells who writes")
def test_a_file_that_is_open_for_writing_is_waited_for_and_then_left_alone(home: Home, lock: orchestra.Lock) -> None:
    path = home.code / "x"
    path.write_bytes(b"old")
    planned = orchestra.read_disk(str(path))
    with open(path, "r+b") as file:
        with pytest.raises(orchestra.FileChanged):
            orchestra.replace_file(str(path), b"new", planned, lock)
        file.write(b"users")
    assert contents(home.code) == {"x": b"users"}
    with open(path, "rb"):
        orchestra.replace_file(str(path), b"new", orchestra.read_disk(str(path)), lock)
    assert contents(home.code) == {"x": b"new"}


# ── 4 Registry ────────────────────────────────────────────────────────────────

GOOD = "name: api\npath: /code/api\n"


def read(home: Home, text: Any, label: str = "shop/api") -> tuple[Optional[orchestra.Codebase], list[str]]:
    home.write_registry(f"{label}.yaml", text)
    codebase, problems = orchestra.read_codebase(home.path, tuple(label.split("/")))
    return codebase and without_source(codebase), [str(problem) for problem in problems]


def without_source(codebase: orchestra.Codebase) -> orchestra.Codebase:
    return codebase._replace(source="")


@pytest.mark.parametrize(
    "typed",
    ["no", "Yes", "1.10", "12:30", "0x1F", "1_000", "2026-03-01", "2026-03-01T00:00:00Z", "007", "1e3", ".inf", "="],
)
def test_scalars_are_the_text_that_was_typed(home: Home, loader: str, typed: str) -> None:
    codebase, problems = read(home, f"{GOOD}description: {typed}\nnotes: [{typed}]\ncommands: {{{typed}: {typed}}}\n")
    assert problems == []
    assert codebase == codebase_with(description=typed, notes=(typed,), commands=((typed, typed),))._replace(
        path="/code/api"
    )


@pytest.mark.parametrize("null", ["", "~", "null", "Null", "NULL"])
def test_null_means_absent(home: Home, loader: str, null: str) -> None:
    codebase, problems = read(home, f"{GOOD}description: {null}\ntargets: {null}\nprojects: {null}\n")
    assert (codebase, problems) == (codebase_with(), [])


@pytest.mark.parametrize("quoted", ["'null'", '"~"', "'no'"])
def test_quoted_text_is_never_null(home: Home, loader: str, quoted: str) -> None:
    codebase, _ = read(home, f"{GOOD}description: {quoted}\n")
    assert codebase and codebase.description == quoted[1:-1]


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


def task_file(fields: str) -> str:
    return f"{GOOD}projects:\n- name: a\n  project_type: ml\n  tasks:\n  - {{{fields}}}\n"


BAD_FILES = [
    ("empty", b"", "1: file: expected a mapping, got nothing"),
    ("only a comment", "# soon\n", "1: file: expected a mapping, got nothing"),
    ("NUL", "name: api\npath: /x\0y\n", "2: yaml: expected printable text, got the character #x0000"),
    ("list at top", "- api\n", "1: file: expected a mapping, got a list"),
    ("text at top", "api\n", "1: file: expected a mapping, got 'api'"),
    ("alias cycle", GOOD + "x: &a [*a]\n", "1: yaml: expected aliases that end, got an alias cycle"),
    ("deep cycle", GOOD + "x: &a {b: [{c: *a}]}\n", "1: yaml: expected aliases that end, got an alias cycle"),
    ("deep brackets", GOOD + "x: " + "[" * 100_000, "1: yaml: expected at most 100 levels of nesting, got more"),
    ("deep dashes", GOOD + "x:\n" + "- " * 10_000 + "a\n", "1: yaml: expected at most 100 levels of nesting, got more"),
    ("2 MiB", GOOD + "# " + "x" * (2 << 20), "1: file: expected at most 1048576 bytes, got more"),
    ("invalid UTF-8", b"name: api\npath: /x\xff\n", "2: file: expected UTF-8, got the byte 0xff"),
    ("open list", GOOD + "targets: [claude\n", r"\d: yaml: expected valid YAML, got: .*"),
    ("tab", "name: api\n\tpath: /x\n", r"\d: yaml: expected valid YAML, got: .*"),
    ("unknown anchor", "name: api\npath: *nope\n", r"2: yaml: expected valid YAML, got: .*undefined alias.*"),
    ("two documents", GOOD + "---\n" + GOOD, r"3: yaml: expected valid YAML, got: .*another document.*"),
    ("key twice", GOOD + "path: /y\n", "3: path: expected once, got it again"),
    (
        "nested key twice",
        task_file("id: 1, title: t, id: 2"),
        r"7: projects\[0\].tasks\[0\].id: expected once, got it again",
    ),
    ("list as key", GOOD + "? [a]\n: b\n", "3: key: expected text as a key, got a list"),
    ("merge key", GOOD + "<<: {a: b}\n", "3: <<: expected no merge key, which YAML 1.2 lacks, got one"),
    ("no name", "path: /x\n", "1: name: expected a value, got nothing"),
    ("no path", "name: api\n", "1: path: expected a value, got nothing"),
    ("null path", "name: api\npath: ~\n", "2: path: expected a value, got nothing"),
    ("list as name", "name: [api]\npath: /x\n", "1: name: expected text, got a list"),
    ("mapping as path", "name: api\npath: {a: b}\n", "2: path: expected text, got a mapping"),
    ("other name", "name: web\npath: /x\n", "1: name: expected api, as the registry has it, got 'web'"),
    ("relative path", "name: api\npath: code/api\n", r"2: path: expected an absolute path or ~/\.\.\., got 'code/api'"),
    ("dot path", "name: api\npath: .\n", r"2: path: expected an absolute path or ~/\.\.\., got '\.'"),
    ("NUL in path", 'name: api\npath: "/a\\0b"\n', r"2: path: expected an absolute path or ~/\.\.\., got '/a\\x00b'"),
    ("text as targets", GOOD + "targets: claude\n", "3: targets: expected a list, got 'claude'"),
    ("mapping as targets", GOOD + "targets: {a: b}\n", "3: targets: expected a list, got a mapping"),
    (
        "unknown target",
        GOOD + "targets:\n- claude\n- emacs\n",
        r"5: targets\[1\]: expected claude \| codex .*, got 'emacs'",
    ),
    ("null target", GOOD + "targets: [~]\n", r"3: targets\[0\]: expected text, got nothing"),
    ("list as commands", GOOD + "commands: [make]\n", "3: commands: expected a mapping, got a list"),
    ("list as command", GOOD + "commands: {a: [b]}\n", r"3: commands\.a: expected text, got a list"),
    ("text as notes", GOOD + "notes: text\n", "3: notes: expected a list, got 'text'"),
    ("mapping as note", GOOD + "notes: [a: b]\n", r"3: notes\[0\]: expected text, got a mapping"),
    ("text as skill", GOOD + "skills: [sql]\n", r"3: skills\[0\]: expected a mapping, got 'sql'"),
    ("skill without id", GOOD + "skills: [{description: d}]\n", r"3: skills\[0\]\.id: expected a value, got nothing"),
    ("text as projects", GOOD + "projects: text\n", "3: projects: expected a list, got 'text'"),
    ("task without title", task_file("id: 1"), r"7: projects\[0\]\.tasks\[0\]\.title: expected a value, got nothing"),
    (
        "unknown status",
        task_file("id: 1, title: t, status: later"),
        r"7: projects\[0\]\.tasks\[0\]\.status: expected pending \| inprogress \| blocked \| done, got 'later'",
    ),
    (
        "unknown type",
        GOOD + "projects: [{name: a, project_type: cloud}]\n",
        r"3: projects\[0\]\.project_type: expected backend \| frontend \| mobile \| ml, got 'cloud'",
    ),
]


@pytest.mark.parametrize(("text", "expected"), [pytest.param(*case[1:], id=case[0]) for case in BAD_FILES])
def test_a_bad_file_is_one_line_and_the_others_go_on(home: Home, loader: str, text: Any, expected: str) -> None:
    home.register("shop/good")
    codebase, problems = read(home, text)
    (problem,) = problems
    assert codebase is None
    assert re.fullmatch(rf"~/\.orchestra/projects/shop/api\.yaml:{expected}", problem), problem
    assert list(home.registry().codebases) == [("shop", "good")]
    assert home.problems() == problems


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "expected a file, got a folder"),
        (os.mkfifo, "expected a file, got a pipe, socket or device"),
        (link_to("nowhere"), "expected a file, got none"),
        (link_to("bad.yaml"), "expected a file, got a link|too many levels of symbolic links"),
    ],
)
def test_what_is_no_file_is_one_line(home: Home, content: Any, expected: str) -> None:
    home.register("shop/good")
    put_files(Path(orchestra.projects_root(home.path)), {"shop/bad.yaml": content})
    (problem,) = home.problems()
    assert re.fullmatch(rf"~/\.orchestra/projects/shop/bad\.yaml:1: file: .*(?:{expected})", problem)
    assert list(home.registry().codebases) == [("shop", "good")]


def test_an_unreadable_file_is_one_line_and_the_others_go_on(home: Home) -> None:
    home.make_codebase("shop/good")
    home.register("shop/bad").chmod(0)
    ran = home.run_as_nobody("sync", "--all")
    assert ran.status == 2
    assert ran.complaints == [
        "orchestra: ~/.orchestra/projects/shop/bad.yaml:1: file: expected a readable file, got: permission denied"
    ]
    assert (home.code / "shop/good/CLAUDE.md").exists()


def test_a_registry_of_broken_files_says_a_line_for_each_and_syncs_the_rest(home: Home) -> None:
    root = home.make_codebase("shop/good")
    for number, (_, text, _) in enumerate(BAD_FILES):
        home.write_registry(f"shop/bad{number}.yaml", text)
    ran = home.run("sync", "--all")
    files = [re.match(r"orchestra: ~/\.orchestra/projects/shop/(bad\d+)\.yaml:\d+: \S.*", c) for c in ran.complaints]
    assert ran.status == 2 and all(files)
    assert {match[1] for match in files if match} == {f"bad{number}" for number in range(len(BAD_FILES))}
    assert (root / "CLAUDE.md").exists()
    assert ran.err.count("\n") == 2 * len(ran.complaints)  # each with its way out, and nothing else


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shop/api.yml", "file: expected the name api.yaml, got api.yml"),
        ("shop/api.YAML", "file: expected the name api.yaml, got api.YAML"),
        ("api.yaml", "file: expected a place in a project's folder, got one beside the folders"),
        ("api.yml", "file: expected a place in a project's folder, got one beside the folders"),
        ("shop/Project.yaml", r"codebase name: expected any name but project .*, got 'Project'"),
        ("shop/a\x7fb.yaml", r"codebase name: expected no slash and no control character, got 'a\\x7fb'"),
    ],
)
def test_what_lies_astray_is_one_line_and_the_others_go_on(home: Home, name: str, expected: str) -> None:
    home.register("shop/good")
    home.write_registry(name, GOOD)
    (problem,) = home.problems()
    shown = re.escape(name.replace("\x7f", "\\x7f"))
    assert re.fullmatch(rf"~/\.orchestra/projects/{shown}:1: {expected}", problem)
    assert list(home.registry().codebases) == [("shop", "good")]
    assert home.run("sync", "--all").status == 2


def test_a_folder_of_yaml_files_in_a_project_is_one_line(home: Home) -> None:
    home.register("shop/good")
    home.write_registry("shop/nested/api.yaml", GOOD)
    assert home.problems() == [
        "~/.orchestra/projects/shop/nested:1: file: expected YAML files right in the project's folder,"
        " got a folder of them"
    ]


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


def test_two_codebases_cannot_claim_one_path(home: Home) -> None:
    home.make_codebase("shop/api", created_at="2026-01-02T00:00:00Z")
    home.register("shop/old", path=f"{home.code}/shop/x/../api/", created_at="2026-01-01T00:00:00Z")
    assert list(home.registry().codebases) == [("shop", "old")]
    (problem,) = home.problems()
    assert re.fullmatch(
        r"~/.*shop/api\.yaml:1: path: expected a folder of its own, got .*, which shop/old has", problem
    )


def test_of_two_links_to_one_folder_the_first_by_name_has_it(home: Home) -> None:
    root = home.code / "real"
    root.mkdir()
    for name in ("one", "two"):
        (home.code / name).symlink_to(root)
        home.register(f"shop/{name}", path=str(home.code / name))
    for _ in range(2):
        ran = home.run("sync", "--all")
        assert ran.status == 2 and len(ran.complaints) == 1 and "which shop/one has" in ran.complaints[0]
    assert ran.lines == []


def test_a_folder_that_another_codebase_has_is_refused_under_a_link_s_name_too(home: Home) -> None:
    root = home.make_codebase("shop/api")
    (home.code / "link").symlink_to(root)
    home.register("shop/web", path=str(home.code / "link"))
    ran = home.run("sync", "--all")
    assert ran.status == 2 and len(ran.complaints) == 1
    assert "which shop/api has" in ran.complaints[0] and ran.complaints[0].startswith("orchestra: shop/web: ")
    assert home.run("status").out.count("current") == 1


@pytest.mark.parametrize("text", ["name: ''\npath: /x\n", "name: api\npath: ''\n"])
def test_required_text_is_not_empty(home: Home, text: str) -> None:
    codebase, problems = read(home, text)
    assert codebase is None and len(problems) == 1


@pytest.mark.parametrize("text", [GOOD + "targets: ['']\n", task_file("id: 1, title: t, status: ''")])
def test_an_empty_word_is_no_enum_value(home: Home, text: str) -> None:
    codebase, problems = read(home, text)
    assert codebase is None and len(problems) == 1


@pytest.mark.parametrize("name", ["loop", "shop/loop"])
def test_a_link_to_itself_in_the_registry_stops_nothing(home: Home, name: str) -> None:
    home.make_codebase("shop/good")
    os.symlink(os.path.basename(name), Path(orchestra.projects_root(home.path), name))
    home.run("sync", "--all")
    assert (home.code / "shop/good/CLAUDE.md").exists()


@pytest.mark.parametrize("name", ["locked", "shop/locked"])
def test_an_unreadable_folder_in_the_registry_stops_nothing_else(home: Home, name: str) -> None:
    home.make_codebase("shop/good")
    home.write_registry(f"{name}/api.yaml", GOOD).parent.chmod(0)
    ran = home.run_as_nobody("sync", "--all")
    Path(orchestra.projects_root(home.path), name).chmod(0o700)
    assert (home.code / "shop/good/CLAUDE.md").exists()
    assert ran.status == 2


def limited(home: Home, *argv: str) -> Ran:
    """Run the script with a deadline."""
    return finish(home.start(*argv), timeout=3)


def alias_bomb(task: str) -> str:
    component = "&c {name: a, project_type: ml, tasks: [" + "*t," * 9999 + "]}"
    return f"{GOOD}x: &t {task}\nprojects:\n- {component}\n" + "- *c\n" * 9999


@pytest.mark.parametrize("task", ["{id: 1, title: t}", "{id: 1, title: " + "x" * 10_000 + "}"])
def test_an_alias_bomb_is_refused_quickly(home: Home, task: str) -> None:
    home.write_registry("shop/api.yaml", alias_bomb(task))
    ran = limited(home, "project", "list")
    assert ran.status == 2 and " at most " in ran.complaints[0]


def test_text_that_aliases_repeat_is_limited(home: Home, loader: str) -> None:
    _, problems = read(home, f"{GOOD}x: &t {'x' * 10_000}\nnotes: [{'*t,' * 1000}]\n")
    assert len(problems) == 1 and " characters of text in all, aliases repeated, got " in problems[0]


def test_an_alias_bomb_is_one_line(home: Home) -> None:
    _, problems = read(home, alias_bomb("{id: 1, title: t}"))
    assert len(problems) == 1


def test_an_alias_bomb_in_unknown_keys_does_not_stop_a_save(home: Home) -> None:
    laughs = "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10) if i else 'lol'}]\n" for i in range(10))
    root = home.make_codebase("shop/api")
    home.write_registry("shop/api.yaml", f"name: api\npath: {root}\n{laughs}")
    assert limited(home, "init", str(root), "-p", "shop", "-t", "ml").status == 0


def test_the_line_of_an_unprintable_character_is_right_behind_other_scripts(home: Home, loader: str) -> None:
    _, problems = read(home, "# " + "é" * 20 + "\n\0\n" + "\n" * 10)
    assert problems[0].startswith("~/.orchestra/projects/shop/api.yaml:2: ")


@pytest.mark.parametrize(
    ("name", "text"),
    [("api", GOOD + 'commands: {"a\\nb": [x]}\n'), ("api", GOOD + '"a\\nb": 1\n"a\\nb": 1\n'), ("a\nb", GOOD)],
)
def test_a_line_end_in_a_name_does_not_break_a_problems_line(home: Home, name: str, text: str) -> None:
    home.write_registry(f"shop/{name}.yaml", text)
    (problem,) = home.problems()
    assert "\n" not in problem


def test_half_a_character_is_one_line(home: Home, loader: str) -> None:
    codebase, problems = read(home, 'name: api\npath: "/x\\ud800"\n')
    assert codebase is None and len(problems) == 1


def test_a_broken_project_file_is_told_even_without_codebases(home: Home) -> None:
    home.write_registry("shop/project.yaml", "{")
    assert len(home.problems()) == 1


def test_a_problem_is_followed_by_the_way_out(home: Home) -> None:
    home.register("shop/api", targets="claude")
    assert "  try: orchestra edit shop/api\n" in home.run("project", "list").err


def test_a_project_gives_its_codebases_what_they_lack(home: Home) -> None:
    home.write_registry(
        "shop/project.yaml",
        "name: shop\ndescription: of the shop\ntargets: [gemini]\ncommands: {build: make, lint: ruff}\n"
        "conventions: [ours]\ncolour: red\n",
    )
    home.register("shop/plain")
    home.register("shop/own", description="d", targets=[], commands={"build": "ninja"}, conventions=["mine"])
    plain, own = home.registry().codebases[("shop", "plain")], home.registry().codebases[("shop", "own")]
    assert plain[3:7] == ("of the shop", ("gemini",), (("build", "make"), ("lint", "ruff")), ("ours",))
    assert own[3:7] == ("d", (), (("build", "ninja"), ("lint", "ruff")), ("ours", "mine"))


def test_a_broken_project_file_stops_its_own_codebases_alone(home: Home) -> None:
    home.write_registry("shop/project.yaml", "name: other\n")
    home.register("shop/api")
    home.register("blog/api")
    assert list(home.registry().codebases) == [("blog", "api")]
    assert home.problems() == [
        "~/.orchestra/projects/shop/project.yaml:1: name: expected shop, as the registry has it, got 'other'"
    ]


@pytest.mark.parametrize(
    "name",
    [
        *("", "../x", "a/b", "/", ".x", "..", ".", "#x", "x~", "a\0b", "a\nb", "a\x7fb", "a\x85b", "\udcff"),
        *("a" * 101, "a" * 300, "\N{GRINNING FACE}" * 100),
    ],
)
def test_names_that_would_leave_the_registry_or_hide_in_it_are_refused(home: Home, name: str) -> None:
    for kind in ("project", "codebase"):
        with pytest.raises(orchestra.RegistryError, match=f"^{kind} name: expected .*, got "):
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
    home.run_fine("init", str(root), "-p", name, f"--name={name}", "--sync") if name != "-x" else home.run_fine(
        "init", str(root), "--project=-x", "--name=-x", "--sync"
    )
    assert home.status_of(f"{name}/{name}") == "current"
    assert home.sync("--", name).lines == []


def test_a_codebase_is_not_called_project_but_a_project_may_be(home: Home) -> None:
    assert home.run("init", str(home.code), "-p", "shop", "--name", "project").status == 2
    assert home.run("init", str(home.code), "-p", "project", "--name", "api").status == 0


KEYS = [("blog", "api"), ("shop", "api"), ("shop", "web")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("web", "--- /dev/null"),
        ("shop/api", "--- /dev/null"),
        ("blog/api", "--- /dev/null"),
        ("api", "orchestra: codebase api: expected one, got 2: blog/api, shop/api"),
        ("blog/web", "orchestra: codebase blog/web: expected a registered name, got an unknown one"),
        ("", "orchestra: codebase : expected a registered name, got an unknown one"),
        ("/api", "orchestra: codebase /api: expected a registered name, got an unknown one"),
    ],
)
def test_a_short_name_is_enough_while_it_is_unique(home: Home, name: str, expected: str) -> None:
    for key in KEYS:
        home.make_codebase("/".join(key))
    ran = home.run("diff", name)
    assert (ran.out + ran.err).splitlines()[0] == expected


def test_the_short_names_of_codebases_are_those_that_find_them() -> None:
    assert sorted(orchestra.short_names(KEYS).values()) == ["blog/api", "shop/api", "web"]


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
    assert comparable(after) == comparable(home.registry())


def comparable(registry: orchestra.Registry) -> Any:
    # Nodes of unknown keys differ from one reading to the next.
    assert not any(codebase.extra for codebase in registry.codebases.values())
    return registry


def save_changed(home: Home, text: str, **changes: Any) -> str:
    """Save a codebase's file with some fields changed, and give the file's new text."""
    file = home.write_registry("shop/api.yaml", text)
    codebase = orchestra.load_codebase(home.path, "shop", "api")
    orchestra.save_codebase(home.path, codebase._replace(**changes))
    reread = orchestra.load_codebase(home.path, "shop", "api")
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


@pytest.mark.parametrize(
    ("changes", "old", "new"),
    [
        ({}, "", ""),
        ({"description": "new"}, "description: old ", "description: new "),
        ({"description": "1.10"}, "description: old ", "description: '1.10' "),
        ({"description": "a: b # c"}, "description: old ", "description: 'a: b # c' "),
        (
            {"notes": ("n",)},
            "# the end\ncreated_at: 2026-03-01T00:00:00Z\n",
            "# the end\ncreated_at: 2026-03-01T00:00:00Z\nnotes: [n]\n",
        ),
        ({"projects": ()}, "projects:\n- name: api\n  project_type: ml\n  owner: kim\n", ""),
        ({"targets": ("claude",)}, "03-01T00:00:00Z\n", "03-01T00:00:00Z\ntargets: [claude]\n"),
    ],
)
def test_a_save_changes_only_what_changed(home: Home, loader: str, changes: dict[str, Any], old: str, new: str) -> None:
    assert save_changed(home, TYPED, **changes) == TYPED.replace(old, new)


def test_keys_orchestra_does_not_know_survive_inside_what_changed(home: Home, loader: str) -> None:
    component = orchestra.Component("api", "backend")
    file = home.write_registry("shop/api.yaml", FROM_RUST)
    codebase = orchestra.load_codebase(home.path, "shop", "api")
    (old,) = codebase.projects
    orchestra.save_codebase(home.path, codebase._replace(projects=(old._replace(project_type="ml"), component)))
    values = yaml.load(file.read_bytes(), Loader=yaml.BaseLoader)
    assert values["projects"][0]["tasks"][0]["tracked_files"] == ["src/main.rs"]
    assert values["projects"][0]["tasks"][0]["subtasks"] == [{"id": "T-1.1", "title": "half of it", "done": "false"}]
    assert [component["project_type"] for component in values["projects"]] == ["ml", "backend"]
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
    assert values["colour"] == "red"
    assert "old" not in saved
    if "again" in text:
        assert values["again"] == [["1"], "/code/api"]
    if "# after" in text:
        assert "# after" in saved


@pytest.mark.parametrize("text", ["{", "- a\n", b"\xff", ""])
def test_a_save_does_not_replace_a_file_that_cannot_be_read(home: Home, text: Any) -> None:
    file = home.write_registry("shop/api.yaml", text)
    before = file.read_bytes()
    with pytest.raises(orchestra.RegistryError):
        orchestra.save_codebase(home.path, codebase_with())
    assert file.read_bytes() == before


def test_a_registry_file_that_is_a_link_stays_one(home: Home) -> None:
    file = home.write_registry("shop/api.yaml", GOOD)
    real = home.code / "api.yaml"
    file.rename(real)
    file.symlink_to(real)
    orchestra.save_codebase(home.path, codebase_with(description="new"))
    assert file.is_symlink() and "new" in real.read_text()


def test_reading_never_rewrites(home: Home) -> None:
    home.make_codebase("shop/api")
    file = home.write_registry("shop/api.yaml", TYPED.replace("/code/api", str(home.code / "shop/api")))
    before = file.stat()
    home.sync()
    home.run_fine("status")
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_saved_text_of_any_kind_is_read_back(home: Home, loader: str) -> None:
    hostile = (
        "no",
        "1.10",
        "~",
        "null",
        "'",
        '"',
        "- a",
        "a: b",
        "#",
        "a #b",
        " lead",
        "trail ",
        "a\nb\n",
        "\n",
        "[",
        "*a",
        "&a",
        "!x",
    )
    codebase = codebase_with(notes=hostile, commands=tuple((text, text) for text in hostile))
    orchestra.save_codebase(home.path, codebase)
    assert without_source(orchestra.load_codebase(home.path, "shop", "api")) == codebase


# ── 5 Detection ───────────────────────────────────────────────────────────────


def package_json(**sections: Any) -> str:
    return json.dumps(sections)


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
        ({}, ("backend", "nothing recognized")),
        ({"README.md": "torch react expo"}, ("backend", "nothing recognized")),
        ({"pubspec.yaml": "", "package.json": "{}"}, ("mobile", "pubspec.yaml")),
        ({"App.xcodeproj": None}, ("mobile", "App.xcodeproj")),
        ({"package.json": package_json(dependencies={"expo": "1", "react": "1"})}, ("mobile", "expo in package.json")),
        ({"package.json": package_json(dependencies={"react": "18"})}, ("frontend", "react in package.json")),
        ({"package.json": package_json(devDependencies={"vite": "5"})}, ("frontend", "vite in package.json")),
        ({"package.json": package_json(peerDependencies={"vue": "3"})}, ("frontend", "vue in package.json")),
        ({"package.json": package_json(dependencies={"express": "4"})}, ("backend", "express in package.json")),
        ({"package.json": package_json(devDependencies={"express": "4"})}, ("backend", "package.json")),
        ({"package.json": "{}", "index.html": ""}, ("frontend", "index.html")),
        ({"package.json": "{}", "vite.config.ts": ""}, ("frontend", "vite.config.ts")),
        ({"package.json": "not JSON"}, ("backend", "package.json")),
        ({"package.json": "[1]"}, ("backend", "package.json")),
        ({"package.json": "[" * 100_000}, ("backend", "package.json")),
        ({"package.json": package_json(dependencies=["react"])}, ("backend", "package.json")),
        ({"package.json": None}, ("backend", "package.json")),
        ({"package.json": os.mkfifo}, ("backend", "package.json")),
        ({"requirements.txt": "numpy\ntorch==2.1\n"}, ("ml", "torch in requirements.txt")),
        ({"requirements.txt": "torchless\nmy-torch\n"}, ("backend", "requirements.txt")),
        ({"pyproject.toml": PEP_621}, ("ml", "torch in pyproject.toml")),
        (
            {"pyproject.toml": '[project]\nname = "x"\n[project.optional-dependencies]\nml = ["torch"]\n'},
            ("backend", "pyproject.toml"),
        ),
        ({"pyproject.toml": '[project]\ndependencies = ["jax"]\n'}, ("ml", "jax in pyproject.toml")),
        ({"setup.py": "setup(install_requires=['keras'])"}, ("ml", "keras in setup.py")),
        ({"study.ipynb": "{}"}, ("ml", "study.ipynb")),
        ({"Cargo.toml": ""}, ("backend", "Cargo.toml")),
        ({"go.mod": ""}, ("backend", "go.mod")),
        ({"build.gradle.kts": ""}, ("backend", "build.gradle.kts")),
        ({"Makefile": ""}, ("backend", "Makefile")),
    ],
)
def test_the_type_of_a_codebase_is_told_by_its_manifests(home: Home, files: Any, expected: tuple[str, str]) -> None:
    put_files(home.code, files)
    assert orchestra.detect(str(home.code))[:2] == expected


@pytest.mark.parametrize(
    ("files", "targets"),
    [
        ({}, ()),
        ({"CLAUDE.md": ""}, ("claude",)),
        ({".claude": None}, ("claude",)),
        ({"AGENTS.md": "", "GEMINI.md": ""}, ("codex", "gemini")),
        ({".github/workflows/ci.yml": ""}, ()),
        ({".github/copilot-instructions.md": ""}, ("copilot",)),
        ({".cursorrules": "", ".windsurfrules": ""}, ("cursor", "windsurf")),
        ({".clinerules/a.md": ""}, ("cline",)),
        ({".clinerules": "plain file"}, ()),
        ({".agent/rules": None}, ("antigravity",)),
        ({".agents/skills": None}, ()),
    ],
)
def test_the_targets_are_the_agents_that_left_traces(home: Home, files: Any, targets: tuple[str, ...]) -> None:
    put_files(home.code, files)
    assert orchestra.detect(str(home.code)).targets == targets


@pytest.mark.parametrize(
    ("files", "commands"),
    [
        ({}, {}),
        (
            {"package.json": package_json(scripts={"build": "tsc", "test": "jest", "odd": "x"})},
            {"build": "npm run build", "test": "npm test"},
        ),
        ({"package.json": package_json(scripts={"lint": "x"}), "yarn.lock": ""}, {"lint": "yarn run lint"}),
        ({"package.json": package_json(scripts={"lint": "x"}), "pnpm-lock.yaml": ""}, {"lint": "pnpm run lint"}),
        ({"package.json": package_json(scripts={"build": 1})}, {}),
        ({"Cargo.toml": ""}, {"build": "cargo build", "test": "cargo test"}),
        ({"go.mod": ""}, {"build": "go build ./...", "test": "go test ./..."}),
        ({"Makefile": "test: x\n\tgo\nlint:=no\n"}, {"test": "make test"}),
        ({"tox.ini": "", "setup.py": "", "tests": None}, {"test": "tox"}),
        ({"pyproject.toml": "", "tests": None}, {"test": "python -m pytest"}),
        ({"pyproject.toml": ""}, {}),
    ],
)
def test_commands_come_from_the_manifests(home: Home, files: Any, commands: dict[str, str]) -> None:
    put_files(home.code, files)
    assert dict(orchestra.detect(str(home.code)).commands) == commands


@pytest.mark.parametrize(
    ("files", "description", "skills"),
    [
        ({"pyproject.toml": PEP_621}, 'A "fine" tool', ["Python >=3.10"]),
        ({"pyproject.toml": "[tool.poetry]\ndescription = 'old'\n"}, "old", ["Python"]),
        ({"pyproject.toml": "[tool.other]\ndescription = 'no'\n"}, "", ["Python"]),
        ({"Cargo.toml": '[package]\nedition = "2021"\ndescription = "Fast"\n'}, "Fast", ["Rust, edition 2021"]),
        (
            {
                "package.json": package_json(
                    description=" Web ", engines={"node": ">=18"}, dependencies={"react": "^18"}
                )
            },
            "Web",
            ["JavaScript", "Node.js >=18", "react ^18"],
        ),
        ({"package.json": package_json(description=7), "tsconfig.json": ""}, "", []),
        ({"package.json": package_json(name="x"), "tsconfig.json": ""}, "", ["TypeScript", "Node.js"]),
        ({"go.mod": "", "Dockerfile": ""}, "", ["Go", "Docker"]),
    ],
)
def test_description_and_stack_come_from_the_manifests(
    home: Home, files: Any, description: str, skills: list[str]
) -> None:
    put_files(home.code, files)
    found = orchestra.detect(str(home.code))
    assert found.description == description
    if skills:
        assert [skill.description for skill in found.skills] == skills


# ── 6 Agents ──────────────────────────────────────────────────────────────────

HOSTILE = [
    "-->",
    "<!-- orchestra:end -->",
    "<!-- orchestra:begin -->\n<!-- orchestra:end -->",
    "<!-->",
    "x\n<!-- orchestra:end -->\ny",
    "a | b\n|---|---|",
    "one\r\ntwo\rthree\nfour",
    "see @README.md",
    "`@in/span` and @outside",
    "``a ` @in`` @out",
    "```\n@in/fence\n```\n@behind/fence",
    "```\n@in/fence never closed",
    "a ` b @README.md",
    "~~~\n```\n@in\n~~~\n@out",
    "````\n```\n@in\n````",
    "@first\n@second (@third, @fourth)",
    "mail me@example.org",
    "@~/secret and @./here and @/etc/passwd",
    "`",
    "```",
    "\x00\x07\x1b[31mred\x85\u2028\u2029\ufeff\x7f",
    "---\ntrigger: manual\n---",
    "key: value # comment",
    "'quoted' \"twice\"",
    "{title} {0} %s",
    "\ud800",
    "# heading",
    "   ",
]


def hostile_codebase(text: str, targets: Any = orchestra.TARGETS) -> orchestra.Codebase:
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


def frontmatter_of(data: bytes) -> Any:
    found = re.match(rb"---\n(.*?\n)---\n\n", data, re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


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
        agent = orchestra.AGENTS_BY_PATH[path]
        assert b"\r" not in data and not data.startswith(b"\xef\xbb\xbf")
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff]", data.decode())
        if agent.owned:
            assert re.search(rb"[^\n]\n\Z", data)
            assert BEGIN not in data and END not in data
        else:
            assert data.startswith(BEGIN + b"\n# ") and data.endswith(b"\n" + END)
            assert data.count(b"<!--") == data.count(b"-->") == 2


@pytest.mark.parametrize("text", HOSTILE)
def test_each_agents_frontmatter_says_that_it_applies_always(text: str) -> None:
    files = orchestra.render_files(hostile_codebase(text))
    found = {agent.target: frontmatter_of(files[agent.path]) for agent in orchestra.AGENTS.values() if agent.owned}
    title = found["cursor"].pop("description")
    assert isinstance(title, str) and title.endswith(": instructions")
    assert found["cursor"] == {"globs": None, "alwaysApply": True}
    assert found["windsurf"] == found["antigravity"] == {"trigger": "always_on", "description": title}
    assert found["cline"] is None and files[".clinerules/orchestra.md"].startswith(b"# ")


UNCLOSED = "~~~\n@in/fence never closed"


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_imports_a_file_or_leaves_a_fence_open(text: str) -> None:
    assert bare_at_words(orchestra.render_body(hostile_codebase(text))) == []


def test_code_in_a_whole_fence_stays_as_it_is() -> None:
    body = orchestra.render_body(codebase_with(notes=("```sh\nmake @all `date`\n```",)))
    assert "- ```sh\n  make @all `date`\n  ```\n" in body


@pytest.mark.parametrize("text", [UNCLOSED, "intro\n```sh\n@in", "````\n```", "~~~\n~~~~\n~~~ x"])
def test_what_a_text_opens_it_closes(text: str) -> None:
    for values in ({"description": text}, {"notes": (text, "@next")}, {"conventions": (text,)}):
        assert bare_at_words(orchestra.render_body(codebase_with(**values))) == []


@pytest.mark.parametrize(
    "text",
    [
        "@README.md`x",
        "`two\nlines @README.md`",
        "a \\` b @README.md",
        UNCLOSED,
    ],
)
def test_stray_backticks_do_not_uncover_an_at_word(text: str) -> None:
    assert bare_at_words(orchestra.render_body(hostile_codebase(text))) == []


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


FULL = """\
# api

Orders.

> Generated by Orchestra from `~/.orchestra/projects/shop/api.yaml`. To change this text, edit that file and run
> `orchestra sync shop/api`; edits made here are replaced by the next sync.

## Stack

- api: backend

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
        description="Orders.",
        commands=(("build", "make"), ("both", "make\nmake test\n")),
        conventions=("Money is cents", "Two\nlines"),
        notes=("see @README.md",),
        skills=(orchestra.Skill("sql", "Postgres 16"), orchestra.Skill("git")),
        projects=(orchestra.Component("api", "backend", tasks, roles),),
    )
    assert orchestra.render_body(codebase) == FULL
    assert orchestra.render_files(codebase)["AGENTS.md"] == BEGIN + b"\n" + FULL.encode() + END


def test_rendering_twice_gives_the_same_bytes() -> None:
    assert orchestra.render_files(hostile_codebase("x")) == orchestra.render_files(hostile_codebase("x"))


@pytest.mark.parametrize(
    ("targets", "files"), [(None, ["CLAUDE.md", "AGENTS.md"]), ((), []), (("gemini", "gemini"), ["GEMINI.md"])]
)
def test_only_the_chosen_targets_are_rendered(targets: Any, files: list[str]) -> None:
    assert list(orchestra.render_files(codebase_with(targets=targets))) == files


@pytest.mark.parametrize(
    ("target", "fits", "told"),
    [
        ("claude", b"x\n" * 200, "201 lines are over the budget of 200"),
        ("codex", b"x" * 32768, "32769 bytes are over the budget of 32768"),
        ("windsurf", "ä".encode() * 12000, "12001 characters are over the budget of 12000"),
        ("antigravity", b"x" * 24000, "24001 bytes are over the budget of 24000"),
        ("gemini", b"x\n" * 100_000, ""),
    ],
)
def test_an_excess_is_told_and_only_an_excess(target: str, fits: bytes, told: str) -> None:
    agent = orchestra.AGENTS[target]
    assert orchestra.describe_excess(agent, fits) == ""
    assert orchestra.describe_excess(agent, fits + (b"x\n" if target == "claude" else b"x")).startswith(told)


def test_a_text_over_its_budget_is_written_and_said(home: Home) -> None:
    home.make_codebase("shop/api", notes=["x" * 40_000], targets=["codex"])
    ran = home.sync()
    assert ran.lines == ["create   shop/api AGENTS.md"]
    assert re.search(r"(?m)^note: shop/api: AGENTS.md: \d+ bytes are over the budget of 32768: ", ran.err)


@pytest.mark.parametrize("text", [*HOSTILE, "", "a", " a", "a ", "a  b", "naïve", "x -- y", "a_b*c*", "#1", "- a"])
def test_what_counts_as_plain_would_be_left_as_it_is(text: str, monkeypatch: Any) -> None:
    quick = [orchestra.one_line(text), orchestra.many_lines(text), orchestra.code_span(text)]
    monkeypatch.setattr(orchestra, "is_plain", lambda text: False)
    assert quick == [orchestra.one_line(text), orchestra.many_lines(text), orchestra.code_span(text)]


# ── 7 Sync ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("disk", "known", "wanted", "purge", "action"),
    [
        (None, [], None, False, "keep"),
        (None, ["old"], None, False, "keep"),
        ("new", [], "new", False, "keep"),
        ("new", ["old"], "new", False, "keep"),
        (None, [], "new", False, "create"),
        (None, ["new"], "new", False, "create"),
        ("old", ["old"], "new", False, "update"),
        ("older", ["old", "older"], "new", False, "update"),
        ("edited", ["old"], "new", False, "replace"),
        ("edited", [], "new", False, "replace"),
        ("old", ["old"], None, False, "remove"),
        ("older", ["old", "older"], None, True, "remove"),
        ("edited", ["old"], None, False, "release"),
        ("edited", ["old"], None, True, "evict"),
        (None, ["old"], None, True, "keep"),
    ],
)
def test_three_hashes_decide(disk: Any, known: list[str], wanted: Any, purge: bool, action: str) -> None:
    assert orchestra.decide(disk, known, wanted, purge) == action


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", None),
        (b"text\n", None),
        (block(), block()),
        (b"a\n" + block() + b"\nb", block()),
        (b"a\r\n" + block().replace(b"\n", b"\r\n") + b"\r\n", block().replace(b"\n", b"\r\n")),
        (BEGIN + b"  \nx\n" + END + b"\t\n", BEGIN + b"  \nx\n" + END),
        (b"inline " + block(), "end on line 3"),
        (b"> " + BEGIN + b"\n`" + END + b"`\n", None),
        (block() + b"\n" + block(), "begin on line 1, end on line 3, begin on line 4, end on line 6"),
        (BEGIN + b"\nx", "begin on line 1"),
        (b"x\n" + END, "end on line 2"),
        (END + b"\n" + BEGIN, "end on line 1, begin on line 2"),
        (BEGIN + b"\n" + block(), "begin on line 1, begin on line 2, end on line 4"),
    ],
)
def test_a_block_is_found_whole_or_refused(data: bytes, found: Any) -> None:
    try:
        span = orchestra.find_block(data)
    except orchestra.SyncError as error:
        assert isinstance(found, str) and f"got {found}: delete one" in str(error)
    else:
        assert (data[span.start : span.end] if span else None) == found


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
    "mentions the markers": b"See `<!-- orchestra:begin -->` and\n <!-- orchestra:end -->\n",
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
def test_bytes_outside_the_block_survive_any_number_of_syncs(home: Home, original: bytes) -> None:
    root = home.make_codebase("shop/api", targets=["codex"])
    file = root / "AGENTS.md"
    file.write_bytes(original)
    home.sync()
    head, tail = file.read_bytes().split(BEGIN)[0], b"\n\nbehind it\r\nmixed \xc3\xa4"
    file.write_bytes(file.read_bytes() + tail)
    after = file.read_bytes().split(END)[-1]
    for number in range(4):
        home.register("shop/api", targets=["codex"], description=f"version {number}")
        assert home.sync().lines == ["update   shop/api AGENTS.md"]
        data = file.read_bytes()
        assert data.startswith(head) and data.endswith(after) and f"version {number}".encode() in data
        assert data.count(BEGIN) == data.count(END) == 1 + original.count(BEGIN)
    assert home.backups() == {}


@originals
@pytest.mark.parametrize("how", ["purge", "drop"])
def test_taking_the_block_out_gives_back_the_original_bytes(home: Home, original: bytes, how: str) -> None:
    root = home.make_codebase("shop/api", {"AGENTS.md": original})
    home.sync()
    home.register("shop/api", description="another version")
    home.sync()
    if how == "purge":
        home.run_fine("project", "remove", "api", "--purge")
    else:
        home.register("shop/api", targets=[])
        home.sync()
    assert contents(root) == {"AGENTS.md": original}


def test_a_block_right_behind_a_bom_is_found(home: Home) -> None:
    home.make_codebase("shop/api", {"AGENTS.md": ONLY_BOM}, targets=["codex"])
    home.sync()
    assert home.sync().lines == []


def test_purge_leaves_nothing_of_orchestra_and_everything_of_the_user(home: Home) -> None:
    mine = {".cursor/rules/mine.mdc": b"mine", "src/a.py": b"x", ".github/workflows/ci.yml": b"y"}
    root = home.make_codebase("shop/api", mine, targets=ALL_TARGETS)
    home.sync()
    assert len(contents(root)) == len(mine) + 8
    ran = home.run_fine("project", "remove", "api", "--purge")
    assert len([line for line in ran.lines if line.startswith("remove ")]) == 8
    assert contents(root) == mine
    assert sorted(os.listdir(root)) == [".cursor", ".github", "src"]
    assert home.registry().keys == []


def test_purge_keeps_an_edited_block_in_the_backups_and_an_edited_owned_file_in_place(home: Home) -> None:
    root = home.make_codebase("shop/api", targets=["claude", "cline"])
    home.sync()
    edit(root / "CLAUDE.md", "# api", "# my api")
    edit(root / CLINE, "# api", "# my api")
    home.run_fine("project", "remove", "api", "--purge")
    assert b"# my api" in home.backups()["CLAUDE.md"]
    assert os.listdir(root) == [".clinerules"] and b"# my api" in (root / CLINE).read_bytes()


def edit(file: Path, old: str, new: str) -> bytes:
    """Edit a file by hand, and give its new bytes."""
    data = file.read_bytes()
    assert old.encode() in data
    file.write_bytes(data.replace(old.encode(), new.encode(), 1))
    return file.read_bytes()


def test_a_hand_edit_outside_the_block_survives(home: Home) -> None:
    root = home.make_codebase()
    home.sync()
    file = root / "CLAUDE.md"
    file.write_bytes(b"my own\n" + file.read_bytes() + b"and this\n")
    edited = file.read_bytes()
    assert home.sync().lines == []
    assert file.read_bytes() == edited and home.backups() == {}


@pytest.mark.parametrize(("target", "path"), [("claude", "CLAUDE.md"), ("cursor", ".cursor/rules/orchestra.mdc")])
@pytest.mark.parametrize("registry_changes", [False, True])
def test_a_hand_edit_of_ours_is_backed_up_first_and_restore_gives_it_back(
    home: Home, target: str, path: str, registry_changes: bool
) -> None:
    root = home.make_codebase("shop/api", targets=[target])
    home.sync()
    synced = (root / path).read_bytes()
    edited = edit(root / path, "# api", "# my api")
    if registry_changes:
        home.register("shop/api", targets=[target], description="new")
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


def test_restore_gives_back_only_the_block_of_a_shared_file(home: Home) -> None:
    root = home.make_codebase("shop/api", targets=["claude"])
    home.sync()
    edited = edit(root / "CLAUDE.md", "# api", "# my api")
    home.sync()
    file = root / "CLAUDE.md"
    file.write_bytes(b"written later\r\n" + file.read_bytes())
    home.run_fine("restore", "api")
    assert file.read_bytes().replace(b"\r\n", b"\n") == b"written later\n" + edited


def test_restore_keeps_what_it_replaces(home: Home) -> None:
    root = home.make_codebase("shop/api", targets=["cline"])
    home.sync()
    first = edit(root / CLINE, "# api", "# first")
    home.sync()
    second = edit(root / CLINE, "# api", "# second")
    home.run_fine("restore", "api", ".clinerules/orchestra.md")
    assert (root / CLINE).read_bytes() == first
    home.run_fine("restore", "api")
    assert (root / CLINE).read_bytes() == second


def test_restore_lists_and_chooses(home: Home) -> None:
    root = home.make_codebase("shop/api", targets=["claude", "codex"])
    home.sync()
    assert home.run_fine("restore", "api", "--list").out == ""
    assert home.run("restore", "api").complaints == [
        "orchestra: shop/api: expected a kept version of a file, found none"
    ]
    edited = [edit(root / "CLAUDE.md", "# api", "# my api")]
    home.sync()
    edited.append(edit(root / "CLAUDE.md", "# api", "# our api"))
    edit(root / "AGENTS.md", "# api", "# agents")
    home.sync()
    rows = [line.split() for line in home.run_fine("restore", "api", "--list").out.splitlines()]
    assert rows[0] == ["WHEN", "FILE", "WHY"]
    assert sorted(row[1] for row in rows[1:]) == ["AGENTS.md", "CLAUDE.md", "CLAUDE.md"]
    times = [row[0] for row in rows[1:] if row[1] == "CLAUDE.md"]
    for when, text in zip(times, edited):
        home.run_fine("restore", "api", "./CLAUDE.md", "--at", when)
        assert (root / "CLAUDE.md").read_bytes() == text
    assert home.run("restore", "api", "--at", "1999").status == 2
    assert home.run("restore", "api", "GEMINI.md").status == 2
    assert home.run("restore", "api", "../../etc/passwd").status == 2


@pytest.mark.parametrize("link", [".clinerules", CLINE])
def test_restore_does_not_write_through_links(home: Home, link: str) -> None:
    root = home.make_codebase("shop/api", targets=["cline"])
    home.sync()
    edit(root / CLINE, "# api", "# my api")
    home.sync()
    shutil.rmtree(root / ".clinerules")
    put_files(home.code, {"outside/orchestra.md": "the user's"})
    put_files(root, {link: link_to(str(home.code / "outside" / ("orchestra.md" if link == CLINE else "")))})
    ran = home.run("restore", "api")
    assert ran.status == 2 and len(ran.complaints) == 1
    assert contents(home.code / "outside") == {"orchestra.md": b"the user's"}


def test_what_orchestra_did_not_write_is_backed_up_from_an_owned_path(home: Home) -> None:
    home.make_codebase("shop/api", {CLINE: b"\xff\0mine"}, targets=["cline"])
    assert home.sync().lines == ["replace  shop/api .clinerules/orchestra.md"]
    assert home.backups() == {CLINE: b"\xff\0mine"}


def test_a_lost_record_proves_nothing_so_what_differs_is_backed_up(home: Home) -> None:
    root = home.make_codebase("shop/api", targets=["cline"])
    for broken in ("", "{", "[]", '{"files": []}', "null", "[" * 100_000, '{"synced_at": 1, "files": {}}'):
        home.sync()
        old = edit(root / CLINE, "# api", f"# api {len(broken)}")
        Path(orchestra.record_path(home.path, ("shop", "api"))).write_text(broken)
        assert home.status_of() == "never_synced"
        home.sync()
        assert home.backups()[".clinerules/orchestra.md"] == old


def test_a_second_sync_writes_nothing(home: Home) -> None:
    home.make_codebase("shop/api", {"CLAUDE.md": "mine"}, targets=ALL_TARGETS, notes=["a"])
    home.sync()
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
    root = home.make_codebase("shop/api", targets=["claude", "cursor"])
    home.sync()
    for path in ("CLAUDE.md", ".cursor/rules/orchestra.mdc"):
        (root / path).write_bytes((root / path).read_bytes().replace(b"\n", b"\r\n"))
    assert home.sync().lines == []
    home.register("shop/api", targets=["claude", "cursor"], description="new")
    assert {line.split()[0] for line in home.sync().lines} == {"update"}
    assert b"\n" not in (root / "CLAUDE.md").read_bytes().replace(b"\r\n", b"")


@pytest.mark.parametrize("target", ["AGENTS.md", "/etc/hostname", "nowhere", "CLAUDE.md"])
def test_a_symlinked_managed_file_is_left_alone_and_said(home: Home, target: str) -> None:
    root = home.make_codebase("shop/api", {"CLAUDE.md": link_to(target)})
    ran = home.sync()
    assert ran.lines == ["create   shop/api AGENTS.md"]
    assert f"note: shop/api: CLAUDE.md: left alone: it is a link to {target}\n" in ran.err
    assert os.readlink(root / "CLAUDE.md") == target
    assert home.status_of() == "current"
    home.run_fine("project", "remove", "api", "--purge")
    assert os.readlink(root / "CLAUDE.md") == target and os.listdir(root) == ["CLAUDE.md"]


@pytest.mark.parametrize("link", [".cursor", ".cursor/rules"])
def test_a_folder_that_leads_out_of_the_codebase_is_refused(home: Home, link: str) -> None:
    outside = home.code / "outside"
    outside.mkdir()
    home.make_codebase("shop/api", {link: link_to(str(outside))}, targets=["claude", "cursor"])
    ran = home.run("sync", "--all")
    assert (ran.status, ran.lines) == (2, ["create   shop/api CLAUDE.md"])
    assert ran.complaints == [
        "orchestra: shop/api: .cursor/rules/orchestra.mdc: expected a folder inside the codebase,"
        f" got a link to {outside}"
    ]
    assert os.listdir(outside) == []
    assert home.status_of() == "error"


def test_a_folder_that_leads_beside_the_codebase_is_refused(home: Home) -> None:
    home.make_codebase("shop/api", {".cursor": link_to("../api-outside")}, targets=["cursor"])
    (home.code / "shop/api-outside").mkdir()
    assert home.run("sync", "--all").status == 2
    assert os.listdir(home.code / "shop/api-outside") == []


def test_a_folder_linked_within_the_codebase_is_fine(home: Home) -> None:
    root = home.make_codebase(
        "shop/api", {"config/cursor": None, ".cursor": link_to("config/cursor")}, targets=["cursor"]
    )
    home.sync()
    assert (root / "config/cursor/rules/orchestra.mdc").exists()
    assert home.sync().lines == []


def test_a_codebase_reached_through_a_link_is_fine(home: Home) -> None:
    root = home.make_codebase("shop/real")
    os.unlink(orchestra.codebase_path(home.path, ("shop", "real")))
    (home.code / "link").symlink_to(root)
    home.register("shop/api", path=str(home.code / "link"), targets=["cursor"])
    home.sync()
    assert (root / ".cursor/rules/orchestra.mdc").exists()


@pytest.mark.parametrize("content", ["a file", "nothing", link_to("nowhere")])
def test_a_missing_codebase_folder_is_an_error_for_it_alone(home: Home, content: Any) -> None:
    home.make_codebase("shop/good")
    home.register("shop/gone", path=str(home.code / "gone"))
    if content != "nothing":
        put_files(home.code, {"gone": content})
    before = os.path.lexists(home.code / "gone")
    ran = home.run("sync", "--all")
    assert ran.status == 2 and len(ran.complaints) == 1
    assert f"{home.code}/gone: expected the codebase's folder, found " in ran.complaints[0]
    assert os.path.lexists(home.code / "gone") == before
    assert (home.code / "shop/good/CLAUDE.md").exists()
    assert (home.status_of("shop/gone"), home.status_of("shop/good")) == ("error", "current")


@pytest.mark.parametrize(
    ("files", "target", "expected"),
    [
        ({".clinerules": "rules"}, "cline", "expected .clinerules to be a folder, got a file: move its text into one"),
        (
            {".cursor/rules": "rules"},
            "cursor",
            "expected .cursor/rules to be a folder, got a file: move its text into one",
        ),
        ({"GEMINI.md": None}, "gemini", "expected a file, got a folder"),
        ({"GEMINI.md": os.mkfifo}, "gemini", "expected a file, got a pipe, socket or device"),
        ({".clinerules/orchestra.md": make_socket}, "cline", "expected a file, got a pipe, socket or device"),
        (
            {"GEMINI.md": block() + b"\n" + block()},
            "gemini",
            "expected one orchestra:begin and then one orchestra:end, got .*",
        ),
        ({"GEMINI.md": b"x\n" + BEGIN + b"\nx\n"}, "gemini", "expected one .*, got begin on line 2: delete one"),
        (
            {"GEMINI.md": END + b"\n" + BEGIN},
            "gemini",
            "expected one .*, got end on line 1, begin on line 2: delete one",
        ),
        ({"GEMINI.md": b"a\0b"}, "gemini", "expected text, got a NUL byte at 1"),
        ({"GEMINI.md": b"a\xff"}, "gemini", "expected UTF-8 text, got the byte 0xff at 1"),
        ({"GEMINI.md": "x".encode("utf-16")}, "gemini", "expected UTF-8 text, got the byte 0xff at 0"),
    ],
)
def test_a_file_orchestra_cannot_take_part_in_is_one_line_and_stays(
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


def test_what_could_not_be_written_is_still_known_to_be_ours(home: Home) -> None:
    root = home.make_codebase("shop/api", targets=["claude", "gemini"])
    home.sync()
    (root / "GEMINI.md").rename(home.code / "aside")
    (root / "GEMINI.md").mkdir()
    assert home.run("sync", "--all").status == 2
    (root / "GEMINI.md").rmdir()
    (home.code / "aside").rename(root / "GEMINI.md")
    home.register("shop/api", targets=["claude"])
    assert home.sync().lines == ["remove   shop/api GEMINI.md"]


def test_a_read_only_codebase_is_one_line_and_the_others_go_on(home: Home) -> None:
    root = home.make_codebase("shop/api", {"CLAUDE.md": "mine"}, targets=ALL_TARGETS)
    home.make_codebase("shop/good")
    root.chmod(0o555)
    ran = home.run_as_nobody("sync", "--all")
    root.chmod(0o755)
    assert ran.status == 2
    assert len(ran.complaints) == 1 and ran.complaints[0].endswith(": permission denied")
    assert contents(root) == {"CLAUDE.md": b"mine"}
    assert (home.code / "shop/good/CLAUDE.md").exists()


@pytest.mark.parametrize("locked", [".cursor", ".cursor/rules", "."])
def test_a_folder_that_cannot_be_searched_is_one_line_and_the_others_go_on(home: Home, locked: str) -> None:
    root = home.make_codebase("shop/api", {".cursor/rules/mine.mdc": "mine"}, targets=["cursor"])
    home.make_codebase("shop/good")
    (root / locked).chmod(0)
    ran = home.run_as_nobody("sync", "--all")
    (root / locked).chmod(0o755)
    assert ran.status == 2
    assert ran.complaints == ["orchestra: shop/api: .cursor/rules/orchestra.mdc: permission denied"]
    assert (home.code / "shop/good/CLAUDE.md").exists()


def test_a_read_only_file_in_a_writable_folder_is_still_replaced(home: Home) -> None:
    root = home.make_codebase("shop/api", {"CLAUDE.md": "mine\n"})
    (root / "CLAUDE.md").chmod(0o444)
    assert home.run_as_nobody("sync", "--all").status == 0
    assert (root / "CLAUDE.md").read_bytes().startswith(b"mine\n\n" + BEGIN)


def test_a_file_that_cannot_be_read_is_one_line_and_stays(home: Home) -> None:
    root = home.make_codebase("shop/api", {"CLAUDE.md": "mine"})
    (root / "CLAUDE.md").chmod(0)
    ran = home.run_as_nobody("sync", "--all")
    assert ran.complaints == ["orchestra: shop/api: CLAUDE.md: permission denied"]
    assert (root / "AGENTS.md").exists() and os.stat(root / "CLAUDE.md").st_size == 4


def test_a_dropped_target_is_an_orphan_and_removed(home: Home) -> None:
    root = home.make_codebase("shop/api", {"AGENTS.md": "mine\n"}, targets=["claude", "codex", "cursor"])
    home.sync()
    home.register("shop/api", targets=["claude"])
    assert home.staleness()["status"] == "orphan"
    assert set(home.staleness()["detail"].split(", ")) == {".cursor/rules/orchestra.mdc", "AGENTS.md"}
    assert sorted(home.sync().lines) == ["remove   shop/api .cursor/rules/orchestra.mdc", "remove   shop/api AGENTS.md"]
    assert sorted(contents(root)) == ["AGENTS.md", "CLAUDE.md"]
    assert (root / "AGENTS.md").read_bytes() == b"mine\n"
    assert not (root / ".cursor").exists()
    assert home.status_of() == "current"


def test_an_edited_orphan_is_released_and_stays(home: Home) -> None:
    root = home.make_codebase("shop/api", targets=["cursor", "codex"])
    home.sync()
    edited = [edit(root / path, "# api", "# mine") for path in (".cursor/rules/orchestra.mdc", "AGENTS.md")]
    home.register("shop/api", targets=[])
    assert home.status_of() == "orphan"
    ran = home.sync()
    assert sorted(line.split()[0] for line in ran.lines) == ["release", "release"]
    assert "edited by hand, so it stays and is yours now" in ran.err
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
    ],
)
def test_claude_md_imports_an_agents_md_that_it_would_hide(home: Home, files: Any, targets: Any, imports: bool) -> None:
    root = home.make_codebase("shop/api", files, targets=targets)
    home.sync()
    assert (b"\n@AGENTS.md\n" in (root / "CLAUDE.md").read_bytes()) == imports
    assert home.sync().lines == []


def test_the_import_comes_and_goes_with_the_users_text(home: Home) -> None:
    root = home.make_codebase()
    home.sync()
    agents = root / "AGENTS.md"
    generated = agents.read_bytes()
    agents.write_bytes(b"mine\n" + generated)
    assert home.sync().lines == ["update   shop/api CLAUDE.md"]
    agents.write_bytes(generated)
    assert home.sync().lines == ["update   shop/api CLAUDE.md"]
    assert home.backups() == {}


# Interrupted and overtaken


class Killed(BaseException):
    """Stands for the end of the process."""


def die(*args: Any, **options: Any) -> None:
    raise Killed


@pytest.mark.parametrize("synced_before", [False, True])
@pytest.mark.parametrize("function", ["replace_file", "_write_file"])
def test_a_crash_between_record_and_file_is_no_hand_edit(
    home: Home, monkeypatch: Any, synced_before: bool, function: str
) -> None:
    home.make_codebase("shop/api", {"AGENTS.md": "mine\n"}, targets=ALL_TARGETS)
    if synced_before:
        home.sync()
        home.register("shop/api", targets=ALL_TARGETS, description="new")
    with monkeypatch.context() as patch:
        patch.setattr(orchestra, function, die)
        with pytest.raises(Killed):
            home.run("sync", "--all")
    assert home.status_of() == "stale"
    verbs = {line.split()[0] for line in home.sync().lines}
    assert verbs == ({"update"} if synced_before else {"create", "append"})
    assert home.backups() == {} and home.leftovers() == []
    assert home.status_of() == "current"


def test_a_crash_between_two_files_is_no_hand_edit(home: Home, monkeypatch: Any) -> None:
    home.make_codebase("shop/api", targets=ALL_TARGETS)
    home.sync()
    home.register("shop/api", targets=ALL_TARGETS, description="new")
    real, calls = orchestra.replace_file, itertools.count()

    def replace_three(*args: Any, **options: Any) -> None:
        if next(calls) == 3:
            raise Killed
        real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(orchestra, "replace_file", replace_three)
        with pytest.raises(Killed):
            home.run("sync", "--all")
    lines = home.sync().lines
    assert len(lines) == 5 and {line.split()[0] for line in lines} == {"update"}
    assert home.backups() == {}


def test_an_older_text_brought_back_by_git_is_updated_without_a_backup(home: Home) -> None:
    root = home.make_codebase("shop/api", targets=["claude"])
    texts = []
    for number in range(4):
        home.register("shop/api", targets=["claude"], description=f"version {number}")
        home.sync()
        texts.append((root / "CLAUDE.md").read_bytes())
    for text in texts[:-1]:
        (root / "CLAUDE.md").write_bytes(text)
        assert home.status_of() == "stale"
        assert home.sync().lines == ["update   shop/api CLAUDE.md"]
    assert home.backups() == {}


def test_an_older_text_is_remembered_only_so_far(home: Home) -> None:
    root = home.make_codebase("shop/api", targets=["claude"])
    home.sync()
    first = (root / "CLAUDE.md").read_bytes()
    for number in range(orchestra.MAX_EARLIER + 1):
        home.register("shop/api", targets=["claude"], description=f"version {number}")
        home.sync()
    (root / "CLAUDE.md").write_bytes(first)
    home.sync()
    assert home.backups() == {"CLAUDE.md": first}


@pytest.mark.parametrize(
    "place",
    [
        "code/shop/api",
        "code/shop/api/.cursor/rules",
        "home/.orchestra/hashes/shop",
        "home/.orchestra/backups/shop/api",
        "home/.orchestra/backups/shop/api/20260101T000000.000000Z",
    ],
)
def test_leftovers_of_a_killed_run_are_swept_by_the_next(home: Home, place: str) -> None:
    home.make_codebase("shop/api", targets=ALL_TARGETS)
    home.sync()
    put_files(home.folder / place, {".orchestra-1-dead.tmp": "half"})
    Path(orchestra.codebase_lock_path(home.path, ("shop", "api"))).write_text('["1-dead", null]')
    assert home.sync().lines == []
    assert home.leftovers() == []


@pytest.mark.parametrize("project", ["shop", "blog"])
def test_leftovers_of_a_killed_save_are_swept_by_the_next(home: Home, project: str) -> None:
    home.write_registry("shop/.orchestra-1-dead.tmp", "half")
    home.run_fine("project", "list")
    put_files(Path(orchestra.run_dir(home.path)), {"registry.lock": '["1-dead", null]'})
    orchestra.save_codebase(home.path, orchestra.Codebase(project, "api", "/x"))
    assert home.leftovers() == []


@contextmanager
def meddling(monkeypatch: Any, root: Path, meddle: Callable[[int], None]) -> Any:
    """Call `meddle`, with the number of calls before, whenever a file of the codebase is about to be replaced."""
    real, calls = orchestra._write_temporary, itertools.count()

    def write(path: str, *args: Any, **options: Any) -> None:
        real(path, *args, **options)
        if path.startswith(f"{root}/"):
            meddle(next(calls))

    with monkeypatch.context() as patch:
        patch.setattr(orchestra, "_write_temporary", write)
        yield


@pytest.mark.parametrize("before", [b"mine\n", None])
def test_a_save_between_plan_and_write_is_not_lost(home: Home, monkeypatch: Any, before: Optional[bytes]) -> None:
    root = home.make_codebase("shop/api", {} if before is None else {"CLAUDE.md": before}, targets=["claude"])
    file = root / "CLAUDE.md"
    with meddling(monkeypatch, root, lambda call: None if call else file.write_bytes(b"saved meanwhile\n") and None):
        ran = home.sync()
    assert ran.lines == ["append   shop/api CLAUDE.md"]
    assert file.read_bytes().startswith(b"saved meanwhile\n\n" + BEGIN)
    assert home.sync().lines == []


def test_what_was_edited_between_plan_and_write_is_backed_up(home: Home, monkeypatch: Any) -> None:
    root = home.make_codebase("shop/api", targets=["cline"])
    home.sync()
    home.register("shop/api", targets=["cline"], description="new")
    file = root / CLINE
    with meddling(monkeypatch, root, lambda call: None if call else file.write_bytes(b"saved meanwhile\n") and None):
        ran = home.sync()
    assert ran.lines == ["replace  shop/api .clinerules/orchestra.md"]
    assert home.backups() == {CLINE: b"saved meanwhile\n"}


def test_a_file_that_never_holds_still_is_left_to_its_writer(home: Home, monkeypatch: Any) -> None:
    root = home.make_codebase("shop/api", targets=["claude"])
    file = root / "CLAUDE.md"
    with meddling(monkeypatch, root, lambda call: file.write_bytes(b"save %d\n" % call) and None):
        ran = home.run("sync", "--all")
    assert ran.status == 2 and ran.lines == []
    assert "expected it to hold still" in ran.complaints[0]
    assert re.fullmatch(rb"save \d\n", file.read_bytes())
    assert home.sync().lines == ["append   shop/api CLAUDE.md"]


def test_a_folder_swapped_for_a_link_between_plan_and_write_is_refused(home: Home, monkeypatch: Any) -> None:
    root = home.make_codebase("shop/api", {".cursor": None}, targets=["claude", "cursor"])
    outside = home.code / "outside"
    (outside / "rules").mkdir(parents=True)

    def swap(call: int) -> None:
        if call == 0:  # CLAUDE.md is about to be placed
            (root / ".cursor").rmdir()
            (root / ".cursor").symlink_to(outside)

    with meddling(monkeypatch, root, swap):
        assert home.run("sync", "--all").status == 2
    assert contents(outside) == {}


def test_no_folder_is_made_through_a_link_that_appears_between_plan_and_write(home: Home, monkeypatch: Any) -> None:
    root = home.make_codebase("shop/api", targets=["claude", "cursor"])
    (home.code / "outside").mkdir()
    with meddling(
        monkeypatch, root, lambda call: None if call else (root / ".cursor").symlink_to(home.code / "outside")
    ):
        home.run("sync", "--all")
    assert os.listdir(home.code / "outside") == []


def test_no_folder_outside_the_codebase_is_removed(home: Home) -> None:
    root = home.make_codebase("shop/api", targets=["cursor"])
    home.sync()
    shutil.rmtree(root / ".cursor")
    (home.code / "outside/rules").mkdir(parents=True)
    (root / ".cursor").symlink_to(home.code / "outside")
    home.register("shop/api", targets=["claude"])
    home.run("sync", "--all")
    assert (home.code / "outside/rules").is_dir()


def test_a_codebase_removed_while_a_sync_waits_is_not_written_again(home: Home) -> None:
    root = home.make_codebase()
    codebase = home.registry().codebases[("shop", "api")]
    os.unlink(orchestra.codebase_path(home.path, codebase.key))
    assert len(orchestra.sync_codebase(home.path, codebase).errors) == 1
    assert contents(root) == {}


def test_a_lock_that_does_not_come_is_an_error_for_that_codebase(home: Home, monkeypatch: Any) -> None:
    for name in ("api", "web"):
        home.make_codebase(f"shop/{name}")
    real = orchestra.hold_lock
    monkeypatch.setattr(orchestra, "hold_lock", lambda path, sweep: real(path, sweep, 0.05))
    with real(orchestra.codebase_lock_path(home.path, ("shop", "api")), sweep=print):
        ran = home.run("sync", "--all")
    assert ran.status == 2 and "expected the lock within 0.05 s" in ran.complaints[0]
    assert contents(home.code / "shop/api") == {} and (home.code / "shop/web/CLAUDE.md").exists()


# The pipeline


def test_run_all_empty_registry_returns_empty(home: Home) -> None:
    assert orchestra.run_pipeline(home.path, orchestra.SyncScope.all()) == []
    assert contents(home.folder) == {}


def test_run_single_codebase_returns_single_result(home: Home) -> None:
    home.make_codebase("shop/api")
    home.make_codebase("shop/web")
    (result,) = orchestra.run_pipeline(home.path, orchestra.SyncScope.codebase("api"))
    assert (result.project, result.codebase, result.written) == ("shop", "api", ["CLAUDE.md", "AGENTS.md"])
    assert result.errors == ()
    assert not (home.code / "shop/web/CLAUDE.md").exists()


def test_a_dry_run_of_the_pipeline_writes_nothing(home: Home) -> None:
    root = home.make_codebase()
    before = contents(home.folder)
    (result,) = orchestra.run_pipeline(home.path, orchestra.SyncScope.all(), dry_run=True)
    assert result.written == ["CLAUDE.md", "AGENTS.md"]
    assert contents(home.folder) == before and os.listdir(root) == []


def test_the_record_names_what_was_written_and_when(home: Home) -> None:
    root = home.make_codebase("shop/api", targets=["cline"])
    home.sync()
    record = json.loads(Path(orchestra.record_path(home.path, ("shop", "api"))).read_text())
    digest = orchestra.digest_of((root / CLINE).read_bytes())
    assert record["files"] == {".clinerules/orchestra.md": digest}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["synced_at"])


# Whole processes


def make_many(home: Home, count: int) -> list[Path]:
    return [home.make_codebase(f"p{i % 5}/c{i}", {"CLAUDE.md": f"mine {i}\n"}, description="d") for i in range(count)]


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
    assert [(ran.status, ran.err) for ran in both] == [(0, ""), (0, "")]
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
    assert {line.split()[0] for line in ran.lines} <= {"append", "create"} and ran.err == ""
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


# ── 8 Staleness ───────────────────────────────────────────────────────────────


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


def edit_block(data: bytes) -> bytes:
    return data.replace(b"# api", b"# my api")


# How a codebase came to be as it is, and what status says of it.
SCENARIOS = {
    "new": ([add_it()], "never_synced"),
    "new, among the user's files": (
        [add_it(files={"CLAUDE.md": "mine", "AGENTS.md": "x\r\n", CLINE: "y"})],
        "never_synced",
    ),
    "new, nothing wanted": ([add_it([])], "current"),
    "synced": ([add_it(), sync_it], "current"),
    "text around the block": ([add_it(), sync_it, change_file("CLAUDE.md", lambda d: b"a\n" + d + b"b")], "current"),
    "registry changed": ([add_it(), sync_it, add_it(notes=["n"])], "stale"),
    "target added": ([add_it(["claude"]), sync_it, add_it(["claude", "cline"])], "stale"),
    "file missing": ([add_it(), sync_it, change_file("GEMINI.md", None)], "stale"),
    "block missing": ([add_it(), sync_it, change_file("GEMINI.md", lambda d: b"mine\n")], "stale"),
    "older text": (
        [
            add_it(),
            sync_it,
            add_it(notes=["n"]),
            sync_it,
            change_file(CLINE, lambda d: d.replace(b"\n## Notes\n\n- n\n", b"")),
        ],
        "stale",
    ),
    "changed and edited": ([add_it(), sync_it, add_it(notes=["n"]), change_file(CLINE, edit_block)], "stale"),
    "block edited": ([add_it(), sync_it, change_file("CLAUDE.md", edit_block)], "modified"),
    "owned file edited": ([add_it(), sync_it, change_file(CLINE, edit_block)], "modified"),
    "missing and edited": (
        [add_it(), sync_it, change_file("GEMINI.md", None), change_file(CLINE, edit_block)],
        "stale",
    ),
    "target dropped": ([add_it(), sync_it, add_it(["claude"])], "orphan"),
    "edited and dropped": ([add_it(), sync_it, change_file(CLINE, edit_block), add_it(["claude"])], "orphan"),
    "orphan gone by hand": (
        [add_it(["claude", "cline"]), sync_it, change_file(CLINE, None), add_it(["claude"])],
        "current",
    ),
    "edited beside an orphan": (
        [add_it(), sync_it, change_file("CLAUDE.md", edit_block), add_it(["claude"])],
        "modified",
    ),
    "all dropped": ([add_it(), sync_it, add_it([])], "orphan"),
    "linked": ([add_it(["claude"], {"CLAUDE.md": link_to("README.md")})], "current"),
    "import to come": ([add_it(["claude"]), sync_it, add_it(["claude"], {"AGENTS.md": "mine"})], "stale"),
    "two blocks": ([add_it(files={"GEMINI.md": block() + b"\n" + block()}), sync_it], "error"),
    "folder gone": ([add_it(), lambda home: shutil.rmtree(home.code / "shop/api")], "error"),
    "broken": ([lambda home: home.write_registry("shop/api.yaml", "{")], "error"),
}
scenarios = pytest.mark.parametrize(
    ("steps", "status"), [pytest.param(*case, id=name) for name, case in SCENARIOS.items()]
)


@scenarios
def test_status_puts_it_in_a_word(home: Home, steps: Any, status: str) -> None:
    for step in steps:
        step(home)
    before = contents(home.folder)
    ran = home.run("status", "--json")
    entry = json.loads(ran.out)["codebases"][0]
    assert list(entry) == ["project", "codebase", "status", "detail", "last_sync_age", "last_sync_at", "active_tasks"]
    assert entry["status"] == status
    assert bool(entry["detail"]) == (status not in ("current", "never_synced"))
    assert ran.status == (2 if status == "error" else 0)
    assert home.run("status", "--check").status == {"current": 0, "error": 2}.get(status, 1)
    assert json.loads(ran.out)["summary"] == {
        "projects": 1,
        "codebases": 1,
        "stale": int(status not in ("current", "error")),
    }
    assert contents(home.folder) == before


@scenarios
def test_a_dry_run_lists_exactly_what_sync_then_writes(home: Home, steps: Any, status: str) -> None:
    for step in steps:
        step(home)
    before = tree(home.folder)
    dry, check = home.run("sync", "--all", "--dry-run"), home.run("sync", "--all", "--check")
    json_dry = json.loads(home.run("sync", "--all", "--dry-run", "--json").out)
    assert tree(home.folder) == before
    files = tree(home.code)
    real = home.run("sync", "--all")
    assert dry.lines == check.lines == real.lines
    assert [path for result in json_dry for path in result["written"]] == [line.split()[2] for line in real.lines]
    assert dry.status == real.status == (2 if status == "error" else 0)
    assert check.status == (2 if status == "error" else 1 if real.lines else 0)
    released = {f"shop/api/{line.split()[2]}" for line in real.lines if line.startswith("release")}
    touched = {
        path for path, entry in {**files, **tree(home.code)}.items() if files.get(path) != tree(home.code).get(path)
    }
    assert touched == {f"shop/api/{line.split()[2]}" for line in real.lines} - released
    assert (status == "current") == (not real.lines) or status == "error"
    if status != "error":
        after = tree(home.folder)
        assert home.sync().lines == [] and home.status_of() == "current"
        assert tree(home.folder) == after


@scenarios
def test_diff_shows_what_sync_then_writes(home: Home, steps: Any, status: str) -> None:
    for step in steps:
        step(home)
    before = contents(home.code)
    ran = home.run("diff", "api", "--exit-code")
    assert contents(home.code) == before
    if status == "error":
        assert ran.status == 2
        return
    home.sync()
    changed = {
        path
        for path, data in {**before, **contents(home.code)}.items()
        if before.get(path) != contents(home.code).get(path)
    }
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
    codebase = home.registry().codebases[("shop", "api")]
    at = home.staleness()["last_sync_at"]
    assert orchestra.check_staleness(home.path, codebase, clock=lambda: time.time() + 3600).last_sync_age in (
        3600,
        3601,
    )
    assert abs(orchestra.age_of(at, time.time) or 0) <= 2


@pytest.mark.parametrize(
    ("when", "age"),
    [("2026-01-01T00:00:00Z", 60), ("2026-01-01T00:02:00Z", 0), ("", None), (None, None), ("yesterday", None)],
)
def test_an_age_is_in_whole_seconds_or_none(when: Optional[str], age: Optional[int]) -> None:
    assert orchestra.age_of(when, lambda: 1767225660.9) == age


def test_status_as_a_table(home: Home) -> None:
    home.make_codebase("shop/api")
    home.make_codebase("blog/site", {"CLAUDE.md": block() + b"\n" + block()})
    home.sync("shop/api")
    ran = home.run("status")
    lines = [re.split(r" {2,}", line) for line in ran.out.splitlines()]
    assert lines[0] == ["CODEBASE", "STATUS", "LAST SYNC", "TASKS", "DETAIL"]
    assert lines[1][:4] == ["blog/site", "error", "never", "0"] and lines[1][4].startswith("CLAUDE.md: expected one")
    assert lines[2][:2] == ["shop/api", "current"] and re.fullmatch(r"\d s ago", lines[2][2])
    assert home.run("status", "--project", "shop").out.count("\n") == 2
    assert home.run("status", "--project", "nope").status == 2


# ── 9 Watching ────────────────────────────────────────────────────────────────

# kqueue off macOS: a stand-in that follows the table in macos.md, over inotify.

KQUEUE_NAMES = {"KQ_FILTER_VNODE": -4, "KQ_EV_ADD": 1, "KQ_EV_DELETE": 2, "KQ_EV_CLEAR": 0x20}
DELETE, WRITE, EXTEND, ATTRIB, LINK, RENAME, REVOKE = 1, 2, 4, 8, 16, 32, 64
NOTES = {
    "DELETE": DELETE,
    "WRITE": WRITE,
    "EXTEND": EXTEND,
    "ATTRIB": ATTRIB,
    "LINK": LINK,
    "RENAME": RENAME,
    "REVOKE": REVOKE,
}
KQUEUE_NAMES.update({f"KQ_NOTE_{name}": value for name, value in NOTES.items()})


class Kevent(NamedTuple):
    ident: int
    filter: int
    flags: int
    fflags: int = 0


class Knote:
    """One watched descriptor: what it led to, and what is to be told of it."""

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
        """Say what a changed number of names means: a folder that is gone has none."""
        links, self.links = self.links, os.fstat(self.ident).st_nlink
        return DELETE | LINK if self.links < links else LINK if self.links > links else 0

    def note_size(self) -> int:
        size, self.size = self.size, os.fstat(self.ident).st_size
        if self.size < size or self.size == size == 0:
            return ATTRIB
        return WRITE | EXTEND if self.size > size else WRITE


class StandInKqueue:
    """select.kqueue for EVFILT_VNODE, over inotify(7). As there, closing a descriptor ends its watch."""

    IN = orchestra.InotifySource
    FILE_MASK = IN.IN_MODIFY | IN.IN_ATTRIB | IN.IN_MOVE_SELF | IN.IN_DELETE_SELF
    ENTRY_MASK = IN.IN_CREATE | IN.IN_DELETE | IN.IN_MOVED_FROM | IN.IN_MOVED_TO
    FOLDER_MASK = ENTRY_MASK | IN.IN_MOVE_SELF | IN.IN_DELETE_SELF
    IN_ISDIR = 0x40000000

    def __init__(self) -> None:
        self._inotify = orchestra.InotifySource()
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


def act_on_entry(path: Path, act: str) -> None:
    if act == "create":
        (path / "new").write_text("x")
    elif act == "make a folder":
        (path / "new").mkdir()
    elif act == "write an entry in place":
        (path / "file").write_text("longer than before")
    elif act == "remove an entry":
        (path / "file").unlink()
    elif act == "rename over an entry":
        (path / "other").replace(path / "file")
    elif act == "rename an entry out":
        (path / "file").rename(path.parent / "out")
    elif act == "rename it":
        path.rename(path.parent / "renamed")
    elif act == "remove it":
        shutil.rmtree(path)


@pytest.mark.parametrize(
    ("act", "notes"),
    [
        ("create", WRITE),
        ("make a folder", WRITE | LINK),
        ("write an entry in place", 0),
        ("remove an entry", WRITE),
        ("rename over an entry", WRITE),
        ("rename an entry out", WRITE),
        ("rename it", RENAME),
        ("remove it", WRITE | DELETE | LINK),
    ],
)
def test_kqueue_tells_of_a_folder_what_the_table_says(live: Live, kqueue: None, act: str, notes: int) -> None:
    folder = live.code / "watched"
    folder.mkdir()
    (folder / "file").write_text("x")
    (folder / "other").write_text("x")
    assert notes_told(folder, lambda: act_on_entry(folder, act)) & ~LINK == notes & ~LINK


@pytest.mark.parametrize(
    ("act", "notes"),
    [
        ("append", WRITE | EXTEND),
        ("write in place", WRITE),
        ("truncate", ATTRIB),
        ("chmod", ATTRIB),
        ("unlink", DELETE | LINK),
        ("rename over", DELETE),
        ("rename", RENAME),
        ("read", 0),
    ],
)
def test_kqueue_tells_of_a_file_what_the_table_says(live: Live, kqueue: None, act: str, notes: int) -> None:
    file, other = live.code / "file", live.code / "other"
    file.write_text("text")
    other.write_text("x")

    def do() -> None:
        if act == "append":
            with open(file, "a") as out:
                out.write("more")
        elif act == "write in place":
            with open(file, "r+") as out:
                out.write("TEXT")
        elif act == "truncate":
            os.truncate(file, 1)
        elif act == "chmod":
            file.chmod(0o600)
        elif act == "unlink":
            file.unlink()
        elif act == "rename over":
            other.replace(file)
        elif act == "rename":
            file.rename(live.code / "new")
        else:
            file.read_text()

    assert notes_told(file, do) & ~LINK == notes & ~LINK


def notes_told(path: Path, act: Callable[[], None]) -> int:
    queue: Any = select.kqueue()  # type: ignore[attr-defined,unused-ignore]
    fd = os.open(path, os.O_RDONLY)
    flags = KQUEUE_NAMES["KQ_EV_ADD"] | KQUEUE_NAMES["KQ_EV_CLEAR"]
    queue.control([select.kevent(fd, -4, flags, sum(NOTES.values()))], 0)  # type: ignore[attr-defined,unused-ignore]
    assert select.select([queue], [], [], 0)[0] == []
    act()
    told = 0
    while select.select([queue], [], [], 0.02)[0]:
        assert select.select([queue], [], [], 0)[0] == [queue]  # level-triggered
        for event in queue.control(None, 8, 0):
            assert event.ident == fd
            told |= event.fflags
    os.close(fd)
    queue.close()
    return told


# The three watchers


class Lookout:
    """A watcher, turned by hand, and what it told of."""

    def __init__(self, live: Live, kind: str, make: Any = orchestra.Watcher) -> None:
        self.live = live
        self.source = orchestra.open_source(kind, 4096) if isinstance(kind, str) else kind
        self.is_open = True
        live.lookouts.append(self)
        self.watcher = make(live.path, self.source)
        self.saved: set[str] = set()
        self.deleted: set[str] = set()
        self.take(self.watcher.look())
        self.drain()
        self.forget()

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.source.close()

    def forget(self) -> None:
        self.saved, self.deleted = set(), set()

    def take(self, changes: orchestra.Changes) -> None:
        self.saved |= set(map(self.name, changes.saved))
        self.deleted |= set(map(self.name, changes.deleted))

    def name(self, path: str) -> str:
        return os.path.relpath(path, self.live.projects)

    def turn(self, seconds: float = 0.02) -> bool:
        """Look where there are hints, or everywhere where nothing hints; say whether there were some."""
        fd = self.source.fileno()
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

    def files(self) -> dict[str, bytes]:
        return {self.name(path): digest for path, digest in self.watcher.files().items()}

    def is_true_to_disk(self) -> bool:
        fresh = orchestra.Watcher(self.live.path, orchestra.PollingSource())
        fresh.look()
        return bool(fresh.files() == self.watcher.files())

    def expect(self, saved: Iterable[str] = (), deleted: Iterable[str] = (), timeout: float = 20) -> None:
        """Wait until these were told of, then see that the picture is the disk's."""
        wanted = [name if "." in name else f"{name}.yaml" for name in saved]
        gone = [name if "." in name else f"{name}.yaml" for name in deleted]
        deadline = time.monotonic() + timeout
        while not (self.saved >= set(wanted) and self.deleted >= set(gone) and self.is_true_to_disk()):
            assert time.monotonic() < deadline, (self.saved, self.deleted, wanted, gone)
            self.turn()
        self.drain()
        assert self.is_true_to_disk()
        assert self.source.fileno() < 0 or not self.watcher.must_poll
        self.forget()


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
def test_every_way_to_save_is_noticed(live: Live, kind: str, save: Callable[[Path, str], Any]) -> None:
    file = live.save()
    live.save("shop/web")
    lookout = Lookout(live, kind)
    for note in ("other", "third"):
        save(file, live.text(note=note))
        lookout.expect(saved=["shop/api"])
    assert file.read_text() == live.text(note="third")


def test_files_made_removed_and_renamed_are_noticed(live: Live, kind: str) -> None:
    live.save()
    lookout = Lookout(live, kind)
    live.save("shop/web")
    lookout.expect(saved=["shop/web"])
    live.file("shop/web").rename(live.file("shop/app"))
    lookout.expect(saved=["shop/app"], deleted=["shop/web"])
    live.file("shop/app").unlink()
    lookout.expect(deleted=["shop/app"])
    live.save("shop/app")
    lookout.expect(saved=["shop/app"])
    (live.projects / "astray.yml").write_text("x")
    lookout.expect(saved=["astray.yml"])
    live.save("shop/app", "other")
    live.file("shop/app").rename(live.file())
    lookout.expect(saved=["shop/api"], deleted=["shop/app"])


def test_folders_made_removed_and_renamed_are_noticed(live: Live, kind: str) -> None:
    lookout = Lookout(live, kind)
    live.save("shop/api")
    lookout.expect(saved=["shop/api"])
    shutil.rmtree(live.projects / "shop")
    lookout.expect(deleted=["shop/api"])
    live.save("shop/api")
    lookout.expect(saved=["shop/api"])
    shutil.rmtree(live.projects / "shop")
    live.save("shop/api", "other")
    lookout.expect(saved=["shop/api"])
    (live.projects / "shop").rename(live.projects / "store")
    lookout.expect(saved=["store/api"], deleted=["shop/api"])
    live.save("store/api", "third")
    lookout.expect(saved=["store/api"])
    save_in_place(live.file("store/api"), "fourth")
    lookout.expect(saved=["store/api"])
    (live.projects / "store").rename(live.code / "away")
    lookout.expect(deleted=["store/api"])
    (live.code / "away/api.yaml").write_text("not watched any more")
    (live.code / "away").rename(live.projects / "back")
    lookout.expect(saved=["back/api"])
    save_in_place(live.file("back/api"), "fifth")
    lookout.expect(saved=["back/api"])


def test_a_linked_folder_is_watched_where_it_is(live: Live, kind: str) -> None:
    elsewhere = live.code / "team" / "shop"
    elsewhere.mkdir(parents=True)
    (elsewhere / "api.yaml").write_text("one")
    lookout = Lookout(live, kind)
    (live.projects / "shop").symlink_to(elsewhere)
    lookout.expect(saved=["shop/api"])
    save_in_place(elsewhere / "api.yaml", "two")
    lookout.expect(saved=["shop/api"])
    shutil.rmtree(elsewhere.parent)
    lookout.expect(deleted=["shop/api"])
    elsewhere.parent.mkdir()
    lookout.drain()
    elsewhere.mkdir()
    lookout.drain()
    (elsewhere / "api.yaml").write_text("three")
    lookout.expect(saved=["shop/api"])
    elsewhere.parent.rename(live.code / "away")
    lookout.expect(deleted=["shop/api"])
    (live.code / "away").rename(elsewhere.parent)
    lookout.expect(saved=["shop/api"])
    replace(elsewhere / "api.yaml", "four")
    lookout.expect(saved=["shop/api"])


def test_a_linked_file_is_watched_where_it_is(live: Live, kind: str) -> None:
    elsewhere = live.code / "api.yaml"
    elsewhere.write_text("one")
    (live.projects / "shop").mkdir()
    live.file().symlink_to(elsewhere)
    lookout = Lookout(live, kind)
    save_in_place(elsewhere, "two")
    lookout.expect(saved=["shop/api"])
    replace(elsewhere, "three")
    lookout.expect(saved=["shop/api"])
    elsewhere.unlink()
    lookout.expect(deleted=["shop/api"])
    elsewhere.write_text("four")
    lookout.expect(saved=["shop/api"])


def test_a_file_linked_meanwhile_is_watched_where_it_is(live: Live, kind: str) -> None:
    elsewhere = live.code / "api.yaml"
    elsewhere.write_text("one")
    (live.projects / "shop").mkdir()
    lookout = Lookout(live, kind)
    live.file().symlink_to(elsewhere)
    lookout.expect(saved=["shop/api"])
    save_in_place(elsewhere, "two")
    lookout.expect(saved=["shop/api"], timeout=1)


@pytest.mark.parametrize("is_linked", [False, True], ids=["in the registry", "linked from it"])
def test_a_git_checkout_of_many_files_is_noticed(live: Live, kind: str, is_linked: bool) -> None:
    repository = live.code / "team" if is_linked else live.projects
    repository.mkdir(exist_ok=True)
    run_git(repository, "init", "-q")
    shops = repository / "shop"
    shops.mkdir()
    for number in range(30):
        (shops / f"c{number}.yaml").write_text(f"one {number}")
    run_git(repository, "add", ".")
    run_git(repository, "commit", "-qm", "one")
    run_git(repository, "checkout", "-qb", "two")
    for number in range(20):
        (shops / f"c{number}.yaml").write_text(f"two {number}, and longer")
    (shops / "c29.yaml").unlink()
    run_git(repository, "commit", "-qam", "two")
    run_git(repository, "checkout", "-qb", "none")
    run_git(repository, "rm", "-q", "-r", "shop")
    run_git(repository, "commit", "-qm", "none")
    run_git(repository, "checkout", "-q", "one")
    if is_linked:
        (live.projects / "shop").symlink_to(shops)
    lookout = Lookout(live, kind)
    assert len(lookout.files()) == 30
    run_git(repository, "checkout", "-q", "two")
    lookout.expect([f"shop/c{number}" for number in range(20)], ["shop/c29"])
    run_git(repository, "checkout", "-q", "none")
    lookout.expect(deleted=[f"shop/c{number}" for number in range(29)])
    run_git(repository, "checkout", "-q", "one")
    lookout.expect([f"shop/c{number}" for number in range(30)])


def test_the_registry_itself_may_be_replaced(live: Live, kind: str) -> None:
    live.save()
    live.save("shop/web")
    lookout = Lookout(live, kind)
    live.projects.rename(live.code / "old")
    lookout.expect(deleted=["shop/api", "shop/web"])
    live.projects.mkdir()
    lookout.drain()
    live.save(note="other")
    lookout.expect(saved=["shop/api"])
    shutil.copytree(live.code / "old", live.code / "new")
    live.projects.rename(live.code / "older")
    (live.code / "new").rename(live.projects)
    lookout.expect(saved=["shop/api", "shop/web"])
    save_in_place(live.file("shop/web"), "at once")
    lookout.expect(saved=["shop/web"])


def test_the_registry_may_be_a_link(live: Live, kind: str) -> None:
    live.save()
    live.projects.rename(live.code / "registry")
    live.projects.symlink_to(live.code / "registry")
    lookout = Lookout(live, kind)
    live.save(note="other")
    lookout.expect(saved=["shop/api"])
    (live.code / "registry").rename(live.code / "away")
    lookout.expect(deleted=["shop/api"])
    (live.code / "away").rename(live.code / "registry")
    lookout.expect(saved=["shop/api"])
    save_in_place(live.file(), "third")
    lookout.expect(saved=["shop/api"])


def test_many_files_at_once_are_noticed(live: Live, kind: str) -> None:
    lookout = Lookout(live, kind)
    labels = live.save_many(300)
    lookout.expect(saved=labels)
    for label in labels:
        save_in_place(live.file(label), f"in place {label}")
    lookout.expect(saved=labels)


def test_a_hinted_edit_of_the_same_size_and_time_is_noticed(live: Live, kind: str) -> None:
    file = live.save(note="one")
    before = file.stat()
    lookout = Lookout(live, kind)
    save_in_place(file, live.text(note="two"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and file.stat().st_mtime_ns == before.st_mtime_ns
    lookout.expect(saved=["shop/api"])


def test_a_hinted_file_is_read_even_if_its_stamp_is_known(live: Live) -> None:
    file = live.save(note="one")
    watcher = orchestra.Watcher(live.path, orchestra.PollingSource(), clock=lambda: time.time() + 100)
    watcher.look()
    save_in_place(file, live.text(note="two"))
    # Where the clock of the file system ticks slowly, both edits have one stamp.
    info = file.stat()
    stamp = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
    seen = watcher._picture[str(file.parent)]
    seen[str(file)] = seen[str(file)]._replace(stamp=stamp)
    assert watcher.look({str(file.parent)}).saved == frozenset()
    assert watcher.look({str(file)}).saved == {str(file)}


@pytest.mark.parametrize(("age", "is_read"), [(0.0, True), (1.9, True), (60.0, False)])
def test_a_young_file_is_read_whatever_its_stamp(live: Live, age: float, is_read: bool) -> None:
    file = live.save(note="one")
    changed = max(file.stat().st_mtime, file.stat().st_ctime)
    watcher = orchestra.Watcher(live.path, orchestra.PollingSource(), clock=lambda: changed + age)
    watcher.look()
    save_in_place(file, live.text(note="two"))
    info = file.stat()
    stamp = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
    seen = watcher._picture[str(file.parent)]
    seen[str(file)] = seen[str(file)]._replace(stamp=stamp)
    assert bool(watcher.look().saved) == is_read


def test_what_is_not_a_registry_file_is_passed_over(live: Live, kind: str) -> None:
    live.save()
    lookout = Lookout(live, kind)
    for name in (".hidden.yaml", "#lock.yaml", "api.yaml~", "api.yaml.swp", "4913", "README.md"):
        (live.projects / "shop" / name).write_text("x")
        lookout.drain()
    (live.projects / "shop" / "api.yaml").chmod(0o600)
    live.file().touch()
    lookout.drain()
    assert (lookout.saved, lookout.deleted) == (set(), set())
    assert list(lookout.files()) == ["shop/api.yaml"]


def test_looking_wakes_nobody(live: Live, kind: str) -> None:
    labels = live.save_many(20)
    lookout = Lookout(live, kind)
    lookout.take(lookout.watcher.look())
    for label in labels:
        live.file(label).read_text()
    assert lookout.turn() is False
    assert (lookout.saved, lookout.deleted) == (set(), set())


@pytest.mark.skipif(not IS_LINUX, reason="inotify is Linux's")
def test_after_an_overflow_of_inotify_everything_is_looked_at(live: Live) -> None:
    files = [live.save("shop/api"), live.save("shop/web")]
    lookout = Lookout(live, "inotify")
    for _ in range(int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())):
        for file in files:
            os.utime(file)
    live.save("new/api")
    lookout.expect(saved=["new/api"])


def test_what_finds_no_descriptor_is_polled(live: Live, kqueue: None) -> None:
    live.save_many(5)
    watcher = orchestra.Watcher(live.path, orchestra.KqueueSource(4))
    watcher.look()
    assert watcher.must_poll and watcher.interval == orchestra.POLL_INTERVAL
    save_in_place(live.file("p4/c4"), "other")
    assert watcher.look().saved == {str(live.file("p4/c4"))}
    for label in ("p2/c2", "p3/c3", "p4/c4", "p1/c1"):
        live.file(label).unlink()
        live.file(label).parent.rmdir()
    watcher.look()
    watcher.look()
    watcher.source.close()


def test_watches_of_what_is_gone_are_dropped(live: Live, kqueue: None) -> None:
    live.save()
    lookout = Lookout(live, "kqueue")
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        live.save_many(20)
        lookout.expect(saved=["p0/c0"])
        for number in range(10):
            shutil.rmtree(live.projects / f"p{number}")
        lookout.expect(deleted=["p0/c0"])
    assert len(os.listdir("/dev/fd")) == before
    lookout.close()
    assert len(os.listdir("/dev/fd")) < before


@pytest.mark.parametrize(
    ("wanted", "name"),
    [("", None), ("polling", "polling"), ("kqueue", "kqueue"), ("inotify", "inotify"), ("Polling", ""), ("x", "")],
)
def test_a_source_is_opened_by_name_or_the_best(wanted: str, name: Optional[str]) -> None:
    best = "kqueue" if HAS_KQUEUE else "inotify" if IS_LINUX else "polling"
    if name == "" or (name in ("kqueue", "inotify") and name != best):
        with pytest.raises(orchestra.NotifyError, match=f"ORCHESTRA_WATCHER: .*, got '{wanted}'"):
            orchestra.open_source(wanted, 4096)
        return
    source = orchestra.open_source(wanted, 4096)
    assert source.name == (name or best)
    source.close()


@pytest.mark.skipif(not IS_LINUX, reason="inotify is Linux's")
def test_a_source_asked_for_that_cannot_be_had_is_an_error_of_ours() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        with pytest.raises(orchestra.OrchestraError):
            orchestra.open_source("inotify", 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


class Meddler(orchestra.PollingSource):
    """A source on whose first watch of a folder something happens just before the watch is set."""

    def __init__(self, folder: Path, act: Callable[[], None]) -> None:
        self.folder = str(folder)
        self.act: Optional[Callable[[], None]] = act
        self.watched: set[str] = set()

    def fileno(self) -> int:
        return 0

    def watch_folder(self, path: str) -> bool:
        if path == self.folder and self.act:
            act, self.act = self.act, None
            act()
        os.stat(path)
        self.watched.add(path)
        return True


def test_a_link_whose_target_comes_back_while_it_is_anchored_is_watched(live: Live) -> None:
    target = live.code / "team" / "shop"
    (live.projects / "shop").symlink_to(target)
    # The folder above the target is made just before the watch on the one above that is set.
    source = Meddler(live.code, (live.code / "team").mkdir)
    orchestra.Watcher(live.path, source).look()
    assert str(live.code / "team") in source.watched


def test_a_link_by_way_of_another_link_is_followed_anew(live: Live) -> None:
    for version in ("v1", "v2"):
        (live.code / version / "shop").mkdir(parents=True)
        (live.code / version / "shop" / "api.yaml").write_text(version)
    (live.code / "current").symlink_to("v1")
    (live.projects / "shop").symlink_to(live.code / "current" / "shop")
    lookout = Lookout(live, "")
    (live.code / "next").symlink_to("v2")
    (live.code / "next").replace(live.code / "current")
    lookout.expect(saved=["shop/api"], timeout=1)


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
            pass  # the dice ask for what is not there
        time.sleep(self.random.choice((0, 0, 0.001, 0.003)))

    def folder(self) -> Path:
        return self.root / self.random.choice(("p", "q", "r"))

    def file(self) -> Path:
        return self.folder() / self.random.choice(("a.yaml", "b.yaml", "c.yaml"))


def is_stale_after_churn(lookout: Lookout, seed: int, seconds: float) -> bool:
    churn = Churn(lookout.live.projects, seed)
    thread = threading.Thread(target=churn.run, args=(seconds,))
    thread.start()
    while thread.is_alive():
        lookout.turn(0.005)
    lookout.drain()
    return not lookout.is_true_to_disk()


@pytest.mark.parametrize("seed", [1, 2])
def test_the_picture_equals_the_disk_after_random_changes(live: Live, kind: str, seed: int) -> None:
    lookout = Lookout(live, kind)
    assert not is_stale_after_churn(lookout, seed, 1.5)
    assert lookout.source.fileno() < 0 or not lookout.watcher.must_poll


@contextmanager
def folders_only() -> Iterator[Any]:
    class FoldersOnly(orchestra.KqueueSource):
        def watch_file(self, path: str) -> bool:
            return False

    yield FoldersOnly


@contextmanager
def registering_late() -> Iterator[Any]:
    class RegisteringLate(orchestra.KqueueSource):
        """Registers after the scan, 5 ms late."""

        def __init__(self, budget: int) -> None:
            super().__init__(budget)
            self.late: list[tuple[Callable[[str], bool], str]] = []

        def watch_folder(self, path: str) -> bool:
            self.late.append((super().watch_folder, path))
            return False

        def watch_file(self, path: str) -> bool:
            self.late.append((super().watch_file, path))
            return False

        def fileno(self) -> int:
            late, self.late = self.late, []
            for number, (watch, path) in enumerate(dict.fromkeys(late)):
                if number == 0:
                    time.sleep(0.005)
                try:
                    watch(path)
                except OSError:
                    pass
            return super().fileno()

    yield RegisteringLate


@contextmanager
def as_it_is() -> Iterator[Any]:
    yield orchestra.KqueueSource


@pytest.mark.parametrize(
    ("make", "is_sound"), [(as_it_is, True), (folders_only, False), (registering_late, False)], ids=lambda v: str(v)
)
def test_the_random_changes_catch_unsound_watchers(live: Live, kqueue: None, make: Any, is_sound: bool) -> None:
    with make() as source_class:
        lookout = Lookout(live, source_class(4096))
        stale = False
        for seed in range(15 if is_sound else 300):
            stale = is_stale_after_churn(lookout, seed, 0.03)
            if stale:
                break
    assert stale is not is_sound


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
        ([0, 450], [0, 500]),
        ([0, 2000], [0, 2000]),
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


def test_targets_are_debounced_each_for_itself() -> None:
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


# ── 10 Protocol ───────────────────────────────────────────────────────────────

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
    assert len(buffer) == 0


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
    ],
)
def test_a_request_is_understood(line: bytes, request_: tuple[str, Optional[str]]) -> None:
    assert orchestra.parse_request(line) == request_


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


@pytest.mark.parametrize(("line", "message"), BAD_REQUESTS, ids=range(len(BAD_REQUESTS)))
def test_a_bad_request_is_refused_and_the_connection_kept(line: bytes, message: str) -> None:
    with pytest.raises(orchestra.ProtocolError) as error:
        orchestra.parse_request(line)
    assert str(error.value).startswith(message) and len(str(error.value)) < 150
    assert not error.value.closes
    reply = orchestra.encode_error(str(error.value))
    assert json.loads(reply) == {"ok": False, "error": str(error.value)}


def test_a_request_that_is_not_utf8_ends_the_conversation() -> None:
    with pytest.raises(orchestra.ProtocolError, match="request: expected UTF-8, got the byte 0xff") as error:
        orchestra.parse_request(b'{"cmd":"\xff"}')
    assert error.value.closes


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
        (b'{"ok":true,"data":[1]}\n', ""),
        (b'{"ok":true}\n', ""),
        (b'{"ok":false,"error":"what now"}\n', "what now"),
        (b"", "expected a reply, got the end of the connection"),
        (b'{"ok":true', "expected a reply, got the end of the connection"),
        (b"hello\n", "expected JSON, got 'hello"),
        (b"\xff\n", "expected JSON"),
        (b"[]\n", "expected a reply with ok, got"),
        (b"{}\n", "expected a reply with ok, got"),
    ],
)
def test_the_client_understands_replies(live: Live, reply: bytes, error: str) -> None:
    with answering(live, [reply]) as requests:
        if error:
            with pytest.raises(orchestra.ProtocolError, match=error):
                orchestra.send_request(live.path, {"cmd": "status"})
        else:
            assert orchestra.send_request(live.path, {"cmd": "status"}) == json.loads(reply).get("data")
    assert requests == [STATUS + b"\n"]


def test_the_client_asks_again_while_the_daemon_is_busy(live: Live) -> None:
    busy = orchestra.encode_error(f"{orchestra.TOO_MANY_CLIENTS} 4, got one more")
    with answering(live, [busy, busy, b'{"ok":true,"data":7}\n']) as requests:
        assert orchestra.request_status(live.path) == 7
    assert len(requests) == 3
    with answering(live, [busy] * 5), pytest.raises(orchestra.DaemonBusy):
        orchestra.request_status(live.path)


def test_the_client_gives_up_on_a_silent_daemon(live: Live) -> None:
    with answering(live, [b""], is_silent=True), pytest.raises(orchestra.ProtocolError, match="timed out"):
        orchestra.send_request(live.path, {"cmd": "status"}, timeout=0.05)


@contextmanager
def answering(
    live: Live, replies: list[bytes], is_silent: bool = False, asks_nothing: bool = False
) -> Iterator[list[bytes]]:
    """Answer at the control socket with what is given, one connection after the other."""
    requests: list[bytes] = []
    done = threading.Event()

    def answer() -> None:
        for reply in replies:
            connection = listener.accept()[0]
            requests.append(b"" if asks_nothing else read_line(connection))
            if is_silent:
                done.wait(20)
            try:
                connection.sendall(reply)
            except OSError:
                pass  # the client would not wait
            connection.close()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(live.socket)
        listener.listen()
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield requests
        finally:
            done.set()
            thread.join(20)
    os.unlink(live.socket)


def test_a_client_that_is_turned_away_while_it_sends_hears_why(live: Live) -> None:
    busy = orchestra.encode_error(f"{orchestra.TOO_MANY_CLIENTS} 4, got one more")
    with answering(live, [busy], asks_nothing=True), pytest.raises(orchestra.DaemonBusy):
        orchestra.send_request(live.path, {"cmd": "x" * 5_000_000})


@pytest.mark.skipif(not IS_LINUX, reason="elsewhere a full backlog refuses")
def test_a_backlog_that_is_full_means_busy(live: Live) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(live.socket)
        listener.listen(0)
        first.connect(live.socket)
        with pytest.raises((orchestra.DaemonBusy, orchestra.DaemonNotRunning)):
            orchestra.send_request(live.path, {"cmd": "status"})


@pytest.mark.parametrize("stale", ["nothing", "socket", "file", "no folder"])
def test_without_a_daemon_the_client_says_so(live: Live, stale: str) -> None:
    if stale == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(live.socket)
    elif stale == "file":
        Path(live.socket).write_text("")
    elif stale == "no folder":
        shutil.rmtree(Path(live.socket).parent)
    with pytest.raises(orchestra.DaemonNotRunning, match="daemon is not running"):
        orchestra.request_stop(live.path)


# ── 11 Daemon ─────────────────────────────────────────────────────────────────

# In this process


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


class Switchboard:
    """A listener and a selector in memory: `turn` calls who is ready, once."""

    def __init__(self) -> None:
        self.calling: list[Any] = []
        self.keys: dict[Any, selectors.SelectorKey] = {}

    def accept(self) -> tuple[Any, str]:
        if not self.calling:
            raise BlockingIOError
        caller = self.calling.pop(0)
        if isinstance(caller, OSError):
            raise caller
        return caller, ""

    def register(self, thing: Any, events: int, data: Any) -> None:
        assert thing not in self.keys and events
        self.keys[thing] = selectors.SelectorKey(thing, 0, events, data)

    def modify(self, thing: Any, events: int, data: Any) -> None:
        self.unregister(thing)
        self.register(thing, events, data)

    def unregister(self, thing: Any) -> None:
        del self.keys[thing]

    def get_map(self) -> Any:
        return self.keys

    def get_key(self, thing: Any) -> selectors.SelectorKey:
        return self.keys[thing]

    def close(self) -> None:
        self.calling.clear()

    def turn(self) -> bool:
        """Call everyone who is ready, and say whether anyone was."""
        ready = []
        for thing, key in self.keys.items():
            if thing is self:
                mask = orchestra.READABLE if self.calling else 0
            else:
                mask = orchestra.READABLE if thing.incoming or thing.is_ended else 0
                mask |= orchestra.WRITABLE if thing.room else 0
            if mask & key.events:
                ready.append((key, mask & key.events))
        for key, mask in ready:
            key.data(mask)
        return bool(ready)

    def run(self) -> None:
        for _ in range(10000):
            if not self.turn():
                return
        raise AssertionError("the server spins")


class Exchange:
    """A server whose clients are channels, and which answers every request with its `cmd`."""

    def __init__(self, handle: Any = None, **options: Any) -> None:
        self.board = Switchboard()
        self.clock = Clock()
        handle = handle or self.answer
        self.server = orchestra.SocketServer(self.board, self.board, handle, clock=self.clock, **options)

    def answer(self, request: orchestra.Request, client: orchestra.Client) -> None:
        client.unsent += orchestra.encode_reply(request.cmd)

    def connect(self, *channels: Any) -> Any:
        self.board.calling += channels
        self.board.run()
        return channels[0]


@pytest.fixture
def turned(live: Live) -> Iterator[orchestra.Daemon]:
    """A daemon in this process, turned by hand."""
    daemon = orchestra.Daemon(live.path, {})
    daemon.open()
    yield daemon
    for _ in daemon._processor.finish():
        pass
    wait_until(lambda: not daemon._processor.is_alive)
    daemon.close()


def turn_until(daemon: orchestra.Daemon, is_true: Callable[[], Any]) -> None:
    def turn() -> Any:
        daemon.step(0.002)
        return is_true()

    wait_until(turn)


def test_socket_protocol_status_and_stop_over_in_memory_channels(live: Live, turned: orchestra.Daemon) -> None:
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
    exchange.board.run()
    assert channel.got.endswith(b'{"ok":true,"data":{"stopping":true}}\n')
    turn_until(turned, lambda: turned.is_done)


def test_registry_cache_reload_updates_changed_codebase(live: Live) -> None:
    live.save("shop/api", "one")
    live.save("shop/web", "one")
    cache = orchestra.load_cache(live.path)
    live.save("shop/api", "two")
    live.save("shop/web", "two")
    job = orchestra.SyncJob(orchestra.SyncTarget.codebase("shop/api"), "watcher", None, frozenset([("shop", "api")]))
    new, outcome = orchestra.run_job(live.path, cache, job)
    notes = {key: codebase.notes for key, codebase in new.registry.codebases.items()}
    assert notes == {("shop", "api"): ("two",), ("shop", "web"): ("one",)}
    assert outcome.summary.codebases == ["api"] and outcome.summary.written == 1
    assert cache.registry.codebases["shop", "api"].notes == ("one",)
    assert live.has("two") and live.read("shop/web") == ""


def test_another_user_is_not_admitted() -> None:
    exchange = Exchange()
    channel = exchange.connect(Channel(STATUS + b"\n", uid=os.getuid() + 1))
    assert channel.is_closed and channel.got == b"" and channel.incoming
    assert exchange.connect(Channel(STATUS + b"\n")).replies == [{"ok": True, "data": "status"}]


def test_one_client_too_many_is_told_so_and_closed() -> None:
    exchange = Exchange(max_clients=3)
    first = [Channel() for _ in range(3)]
    exchange.connect(*first)
    late = exchange.connect(Channel(STATUS + b"\n"))
    assert late.replies == [{"ok": False, "error": f"{orchestra.TOO_MANY_CLIENTS} 3, got one more"}] and late.is_closed
    exchange.clock.now += orchestra.SILENT_GRACE
    late = exchange.connect(Channel(STATUS + b"\n"))
    assert late.replies == [{"ok": True, "data": "status"}]
    assert sum(channel.is_closed for channel in first) == 1
    assert len(exchange.server.clients) == 3


def test_clients_that_have_spoken_keep_their_places() -> None:
    exchange = Exchange(max_clients=2)
    first = [Channel(STATUS + b"\n") for _ in range(2)]
    exchange.connect(*first)
    exchange.clock.now += 5
    assert not exchange.connect(Channel(STATUS + b"\n")).replies[0]["ok"]
    assert not any(channel.is_closed for channel in first)


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


def test_a_client_that_never_reads_costs_little() -> None:
    def answer(request: orchestra.Request, client: orchestra.Client) -> None:
        client.unsent += orchestra.encode_reply("x" * 1000)

    exchange = Exchange(answer)
    deaf = Channel()
    deaf.room = 0
    exchange.connect(deaf)
    for _ in range(300):
        deaf.incoming += (STATUS + b"\n") * 100
        exchange.board.run()
    (client,) = exchange.server.clients
    assert len(client.unsent) < orchestra.MAX_UNSENT + 2000
    assert len(client.lines) <= 2 * orchestra.MAX_LINE
    assert len(exchange.connect(Channel(STATUS + b"\n")).replies) == 1
    deaf.room = 1 << 30
    deaf.is_ended = True
    exchange.board.run()
    assert len(deaf.replies) == 30000 and deaf.is_closed


def test_a_client_that_asks_without_end_lets_others_speak() -> None:
    exchange = Exchange()
    exchange.board.calling += [Channel((STATUS + b"\n") * 1000), Channel(STATUS + b"\n")]
    greedy, modest = exchange.board.calling
    for _ in range(3):
        exchange.board.turn()
    assert len(modest.replies) == 1 and len(greedy.replies) <= 3 * orchestra.REQUESTS_A_TURN
    exchange.board.run()
    assert len(greedy.replies) == 1000


def test_running_out_of_descriptors_turns_callers_away() -> None:
    exchange = Exchange()
    late = exchange.connect(OSError(errno.EMFILE, "no descriptor"), Channel(STATUS + b"\n")) and None
    assert late is None
    assert exchange.server.clients == set()
    assert exchange.connect(Channel(STATUS + b"\n")).replies == [{"ok": True, "data": "status"}]


def test_a_spare_descriptor_that_the_worker_takes_does_no_harm() -> None:
    taken: list[int] = []

    class Taker(Channel):
        """The worker opens a file just when the spare descriptor is free."""

        def close(self) -> None:
            super().close()
            taken.append(os.open(os.devnull, os.O_RDONLY))

    exchange = Exchange()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        exchange.connect(OSError(errno.EMFILE, "no descriptor"), Taker())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)


def test_a_sync_that_ends_just_before_a_stop_is_answered(live: Live, turned: orchestra.Daemon) -> None:
    turn_until(turned, lambda: live.synced("start"))
    replies: list[orchestra.JobOutcome] = []
    job = orchestra.SyncJob(orchestra.SyncTarget.all(), "socket", replies.append)
    assert turned._processor.submit(job)
    wait_until(lambda: turned._processor.outcomes)
    turned._stop("test")
    wait_until(lambda: not turned._processor.is_alive)
    while not turned.is_done:
        turned.step()
    assert len(replies) == 1


def test_a_full_queue_does_not_make_the_loop_spin(live: Live, turned: orchestra.Daemon) -> None:
    turn_until(turned, lambda: live.synced("start"))
    live.save()
    turn_until(turned, lambda: live.has("first"))
    turn_until(turned, lambda: live.synced("watcher"))
    with orchestra.hold_lock(orchestra.codebase_lock_path(live.path, ("shop", "api")), print):
        job = orchestra.SyncJob(orchestra.SyncTarget.all(), "socket")
        assert turned._processor.submit(job)
        wait_until(lambda: not turned._processor.jobs.qsize())
        while turned._processor.submit(job):
            pass
        live.save(note="second")
        deadline = time.monotonic() + orchestra.STALENESS_DELAY + 0.2
        while time.monotonic() < deadline:
            turned.step(0.01)
        left = turned._time_left()
    assert left > 0
    turn_until(turned, lambda: live.has("second"))


def test_a_queue_without_room_is_an_error_reply(live: Live, turned: orchestra.Daemon) -> None:
    live.save()
    turn_until(turned, lambda: live.has("first") and live.synced("watcher"))
    with orchestra.hold_lock(orchestra.codebase_lock_path(live.path, ("shop", "api")), print):
        exchange = Exchange(turned.handle_request)
        channels = [Channel(b'{"cmd":"sync"}\n') for _ in range(orchestra.QUEUE_SIZE + 3)]
        exchange.connect(*channels)
        refused = [channel for channel in channels if channel.got]
        assert 1 <= len(refused) <= 3
        assert "expected room for the job, got a queue of 64" in refused[0].replies[0]["error"]
        assert turned.status()["queue_depth"] >= 60
        turned._processor.finish()


@pytest.mark.parametrize(
    ("path", "is_saved", "key"),
    [
        ("shop/api.yaml", True, ("shop", "api")),
        ("shop/api.yaml", False, ("shop", "api")),
        ("shop/project.yaml", True, orchestra.EVERYTHING),
        ("shop/project.yaml", False, orchestra.STRAY),
        ("astray.yaml", True, orchestra.STRAY),
        ("shop/api.yml", True, orchestra.STRAY),
        ("shop/API.YAML", True, orchestra.STRAY),
        ("shop/a.b.yaml", True, ("shop", "a.b")),
    ],
)
def test_a_change_means_its_codebase_or_everything(path: str, is_saved: bool, key: orchestra.Key) -> None:
    file = os.path.join(orchestra.projects_root("/home/x"), path)
    assert orchestra.key_of_change("/home/x", file, is_saved) == key


# As a process: from a save to the file


def test_daemon_autosync_after_registry_change(live: Live) -> None:
    shutil.rmtree(live.path)
    os.mkdir(live.path)
    daemon = live.start()
    wait_until(lambda: json.loads(live.run("daemon", "status").stdout)["running"])
    (live.code / "api").mkdir()
    assert live.run("init", str(live.code / "api"), "-p", "shop").returncode == 0
    assert live.run("sync", "api").returncode == 0
    claude = live.code / "api" / "CLAUDE.md"
    assert "SENTINEL" not in claude.read_text()
    with open(live.file(), "a") as file:
        file.write("notes:\n- SENTINEL\n")
    wait_until(lambda: "SENTINEL" in claude.read_text(), 10)
    assert live.run("daemon", "stop").stdout == "daemon stop requested\n"
    live.expect_end(daemon)


def test_every_watcher_drives_the_daemon(live: Live, kind: str) -> None:
    live.save("shop/api")
    daemon = live.start(kind)
    assert live.status()["watcher"] == kind
    wait_until(lambda: live.has("first"))
    for note, save in [("second", replace), ("third", save_in_place), ("fourth", save_after_truncating)]:
        save(live.file(), live.text(note=note))
        wait_until(lambda note=note: live.has(note))  # type: ignore[misc]
    live.save("new/app", "at once")
    wait_until(lambda: live.has("at once", "new/app"))
    (live.code / "web").mkdir()
    assert live.run("project", "add", "web", "-p", "team", "--path", str(live.code / "web")).returncode == 0
    wait_until(lambda: (live.code / "web" / "CLAUDE.md").exists())
    time.sleep(1.2 * orchestra.DEBOUNCE_WINDOW)
    (live.projects / "new").rename(live.projects / "newer")
    wait_until(lambda: "projects/newer/app.yaml" in live.read("new/app"))
    shutil.rmtree(live.projects / "team")
    wait_until(lambda: live.status()["codebases"] == ["api", "app"])
    live.stop(daemon)
    assert live.errors() == ""


def test_a_folder_renamed_soon_after_a_save_is_no_problem(served: Live) -> None:
    served.save("new/app", "at once")
    wait_until(lambda: served.has("at once", "new/app"))
    (served.projects / "new").rename(served.projects / "newer")
    wait_until(lambda: "projects/newer/app.yaml" in served.read("new/app"))
    assert served.errors() == ""


def test_of_a_burst_of_saves_the_last_arrives_and_few_syncs_are_made(served: Live) -> None:
    started = time.monotonic()
    for number in range(20):
        served.save(note=f"save {number}")
        time.sleep(0.02)
    windows = int((time.monotonic() - started) / orchestra.DEBOUNCE_WINDOW)
    wait_until(lambda: served.has("save 19"))
    time.sleep(2 * orchestra.DEBOUNCE_WINDOW)  # for syncs too many
    assert served.synced("watcher") <= 3 + windows


@pytest.mark.parametrize("save", [replace, save_in_place], ids=lambda save: save.__name__)
def test_the_second_of_two_saves_arrives(served: Live, save: Callable[[Path, str], Any]) -> None:
    file = served.save(note="one")
    for pause in (0.0, 0.15, 0.45, 0.55):
        time.sleep(orchestra.DEBOUNCE_WINDOW)
        save(file, served.text(note=f"first of {pause}"))
        time.sleep(pause)
        save(file, served.text(note=f"second of {pause}"))
        wait_until(lambda pause=pause: served.has(f"second of {pause}"))  # type: ignore[misc]


def test_a_save_during_a_sync_of_the_same_codebase_arrives(served: Live) -> None:
    served.save(note="one")
    wait_until(lambda: served.synced("watcher") == 1)
    time.sleep(orchestra.DEBOUNCE_WINDOW)
    with orchestra.hold_lock(orchestra.codebase_lock_path(served.path, ("shop", "api")), print):
        served.save(note="two")
        time.sleep(0.2)
        for note in ("three", "four"):
            served.save(note=note)
            time.sleep(0.3)
        assert served.has("one")
        assert served.status()["running"]
    wait_until(lambda: served.has("four"))
    wait_until(lambda: served.synced("watcher") == 3)


def test_a_save_while_hundreds_sync_arrives_and_status_is_quick(live: Live) -> None:
    labels = live.save_many(300)
    daemon = live.start()
    served = live
    waits = []
    served.save(labels[0], "second")
    served.save(labels[-1], "second")
    while not served.synced("start"):
        started = time.monotonic()
        status = served.status()
        waits.append(time.monotonic() - started)
        assert status["codebase_count"] == 300
    print(f"status while 300 sync: {len(waits)} asked, worst {max(waits) * 1000:.1f} ms")
    assert max(waits) < 0.25
    wait_until(lambda: served.has("second", labels[0]) and served.has("second", labels[-1]))
    assert all(served.read(label) for label in labels)
    live.stop(daemon)
    assert live.errors() == ""


def test_a_file_caught_half_written_is_never_reported(served: Live) -> None:
    file = served.save(note="one")
    wait_until(lambda: served.has("one"))
    for number in range(3):
        time.sleep((1.2, 0.5, 1.2)[number] * orchestra.DEBOUNCE_WINDOW)
        text = served.text(note=f"whole {number}")
        started = time.monotonic()
        with open(file, "w") as out:
            out.write("notes: [")
            out.flush()
            while time.monotonic() < started + 0.1:
                assert served.status()["problems"] == []
                time.sleep(0.01)
            out.seek(0)
            out.write(text)
        if time.monotonic() - started > 0.4:
            pytest.skip("this machine is too busy to be broken for 100 ms only")
        wait_until(lambda number=number: served.has(f"whole {number}"))  # type: ignore[misc]
    time.sleep(1.2 * orchestra.DEBOUNCE_WINDOW)
    assert served.status()["problems"] == []
    assert served.errors() == ""


def test_a_file_that_stays_broken_is_a_problem_until_it_is_mended(served: Live) -> None:
    served.save("shop/api", "one")
    served.save("shop/web", "one")
    wait_until(lambda: served.has("one") and served.has("one", "shop/web"))
    save_in_place(served.file(), served.text(note="bad") + "targets: [\n")
    wait_until(lambda: served.status()["problems"])
    (problem,) = served.status()["problems"]
    assert problem["where"].startswith("~/.orchestra/projects/shop/api.yaml:")
    assert "daemon-err" not in problem["message"]
    assert "shop/api.yaml" in served.errors()
    assert served.status()["codebases"] == ["api", "web"]
    served.save("shop/web", "two")
    wait_until(lambda: served.has("two", "shop/web"))
    assert served.has("one") and served.status()["problems"] == [problem]
    save_in_place(served.file(), served.text(note="mended"))
    wait_until(lambda: served.has("mended"))
    wait_until(lambda: served.status()["problems"] == [])


def test_a_file_broken_from_the_start_is_a_problem_and_others_go_on(live: Live) -> None:
    live.save("shop/web")
    live.save("shop/api").write_text("name: api\npath: [")
    daemon = live.start()
    wait_until(lambda: live.has("first", "shop/web"))
    (problem,) = live.status()["problems"]
    assert problem["where"].startswith("~/.orchestra/projects/shop/api.yaml:")
    live.save("shop/api", "mended")
    wait_until(lambda: live.has("mended"))
    wait_until(lambda: live.status()["problems"] == [])
    live.stop(daemon)


def test_a_codebase_that_fails_is_a_problem_until_it_syncs(served: Live) -> None:
    served.save()
    wait_until(lambda: served.has("first"))
    root = served.code / "shop" / "api"
    shutil.rmtree(root)
    text = served.text(note="second")
    root.rmdir()
    replace(served.file(), text)
    wait_until(lambda: served.status()["problems"])
    assert str(root) in served.status()["problems"][0]["message"] + served.status()["problems"][0]["where"]
    root.mkdir()
    assert orchestra.request_sync(served.path, "api")["written"] == 1
    assert served.status()["problems"] == []


def test_a_codebase_whose_file_is_deleted_leaves_the_status(served: Live) -> None:
    served.save("shop/api")
    served.save("team/api")
    wait_until(lambda: served.status()["codebases"] == ["shop/api", "team/api"])
    served.file("team/api").unlink()
    wait_until(lambda: served.status()["codebases"] == ["api"])
    assert served.status()["codebase_count"] == 1
    assert served.has("first", "team/api")


def test_edits_made_while_it_was_down_are_synced_at_the_start(live: Live) -> None:
    live.save("shop/api")
    live.save("shop/web")
    for note in ("one", "two"):
        live.save(note=note)
        daemon = live.start()
        wait_until(lambda note=note: live.has(note) and live.read("shop/web"))  # type: ignore[misc]
        live.stop(daemon)


def test_a_change_of_the_project_syncs_all(served: Live) -> None:
    served.save("shop/api")
    served.save("shop/web")
    wait_until(lambda: served.has("first") and served.has("first", "shop/web"))
    project = served.projects / "shop" / "project.yaml"
    for note in ("of the shop", "of the new shop"):
        project.write_text(f"name: shop\nconventions:\n- {note}\n")
        wait_until(lambda note=note: served.has(note) and served.has(note, "shop/web"))  # type: ignore[misc]


# As a process: signals, one alone, what stands in the way


def test_sighup_looks_at_everything_again(served: Live) -> None:
    served.save()
    wait_until(lambda: served.has("first"))
    (served.code / "shop" / "api" / "CLAUDE.md").unlink()
    served.daemons[-1].send_signal(signal.SIGHUP)
    wait_until(lambda: served.has("first"))
    assert "rescanning everything reason=SIGHUP" in served.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_well(live: Live, number: signal.Signals) -> None:
    daemon = live.start()
    live.wait_for_start_job()
    daemon.send_signal(number)
    live.expect_end(daemon)
    assert f"stopping reason={number.name}" in live.log()
    assert live.errors() == "" and live.said() == ""


def test_at_a_stop_the_running_job_ends_and_queued_ones_are_answered(live: Live) -> None:
    live.save()
    daemon = live.start()
    live.wait_for_start_job()
    sync = b'{"cmd":"sync","codebase":"api"}\n'
    refusal = {"ok": False, "error": "daemon: expected to sync, but it is stopping"}
    with live.connection() as running, live.connection() as queued, live.connection() as stopper:
        with orchestra.hold_lock(orchestra.codebase_lock_path(live.path, ("shop", "api")), print):
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


def test_without_a_daemon_stop_and_status_say_so(live: Live) -> None:
    ran = live.run("daemon", "stop")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "daemon is not running\n", "")
    started = time.monotonic()
    ran = live.run("daemon", "status")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == f'{{\n  "running": false,\n  "socket": "{live.socket}"\n}}\n'
    assert time.monotonic() - started > 4 * orchestra.STATUS_PAUSE


def test_status_waits_for_a_daemon_that_is_starting(live: Live) -> None:
    asking = subprocess.Popen(
        live.command("daemon", "status"), env={**os.environ, "HOME": live.path}, stdout=subprocess.PIPE
    )
    daemon = live.start(wait=False)
    out = asking.communicate(timeout=60)[0]
    assert json.loads(out)["running"] in (True, False)
    wait_until(live.answers)
    live.stop(daemon)


def check_that_one_of_two_survives(live: Live, is_killed: bool) -> None:
    said = len(live.said()) if live.daemons else 0
    started = time.monotonic()
    both = [live.start(wait=False), live.start(wait=False)]
    wait_until(lambda: any(daemon.poll() is not None for daemon in both))
    assert time.monotonic() - started < 15
    (loser,) = (daemon for daemon in both if daemon.poll() is not None)
    (winner,) = (daemon for daemon in both if daemon is not loser)
    assert loser.returncode == 2
    assert live.said()[said:].splitlines()[0] == f"orchestra: daemon socket already in use: {live.socket}"
    wait_until(live.answers)
    assert live.status()["pid"] == winner.pid and winner.poll() is None
    if is_killed:
        winner.kill()
        winner.wait()
        assert os.path.lexists(live.socket)
    else:
        live.stop(winner)


@pytest.mark.parametrize("rounds", [5, pytest.param(40, marks=pytest.mark.soak)])
def test_of_two_daemons_started_at_once_one_survives(live: Live, rounds: int) -> None:
    for number in range(rounds):
        check_that_one_of_two_survives(live, is_killed=number % 2 == 0)


def test_a_second_daemon_ends_at_once_and_leaves_the_first_alone(served: Live) -> None:
    second = served.start(wait=False)
    assert second.wait(60) == 2
    assert served.said().splitlines() == [
        f"orchestra: daemon socket already in use: {served.socket}",
        "  try: orchestra daemon status",
    ]
    assert served.answers()
    assert stat.S_IMODE(os.stat(served.socket).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(served.socket)).st_mode) & 0o077 in (0, 0o055)


@pytest.mark.parametrize(
    "what",
    [
        "file",
        "folder",
        "link",
    ],
)
def test_what_is_not_a_socket_is_not_removed(live: Live, what: str) -> None:
    path = Path(live.socket)
    if what == "file":
        path.write_text("precious")
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("elsewhere")
    daemon = live.start(wait=False)
    assert daemon.wait(60) == 2
    assert live.said().startswith(f"orchestra: {live.socket}: expected a socket or nothing, got a ")
    assert os.path.lexists(path) and (what != "file" or path.read_text() == "precious")
    assert "Traceback" not in live.said()


def test_a_home_too_long_for_a_socket_is_an_error(live: Live) -> None:
    live.path += "/" + "x" * 100
    live.socket = orchestra.socket_path(live.path)
    os.mkdir(live.path)
    daemon = live.start(wait=False)
    assert daemon.wait(60) == 2
    limit = 103 if sys.platform == "darwin" else 107
    assert f"expected a socket path of at most {limit} bytes, got {len(live.socket)}" in live.said()
    for command in ("stop", "status"):
        ran = live.run("daemon", command)
        assert "Traceback" not in ran.stderr


def test_an_unknown_watcher_is_an_error(live: Live) -> None:
    daemon = live.start(wait=False, environ={"ORCHESTRA_WATCHER": "eyes"})
    assert daemon.wait(60) == 2
    assert live.said().startswith("orchestra: ORCHESTRA_WATCHER: expected kqueue, inotify or polling")
    assert not os.path.lexists(live.socket)


def test_a_pipe_in_the_place_of_a_managed_file_holds_nobody_up(served: Live) -> None:
    text = served.text("shop/api")
    os.mkfifo(served.code / "shop" / "api" / "CLAUDE.md")
    replace_in_new_folder(served, "shop/api", text)
    waits = []
    for number in range(20):
        started = time.monotonic()
        served.status()
        waits.append(time.monotonic() - started)
        served.save("shop/web", f"save {number}")
    wait_until(lambda: served.has("save 19", "shop/web"))
    print(f"status beside a pipe: worst {max(waits) * 1000:.1f} ms")
    assert max(waits) < 0.25
    wait_until(lambda: served.status()["problems"])
    assert "CLAUDE.md" in json.dumps(served.status()["problems"])


def replace_in_new_folder(live: Live, label: str, text: str) -> None:
    live.file(label).parent.mkdir(exist_ok=True)
    replace(live.file(label), text)


@pytest.mark.skipif(not IS_LINUX, reason="reads /proc")
@pytest.mark.parametrize("kind", ["kqueue", "inotify"])
def test_an_idle_daemon_sleeps(live: Live, kind: str, monkeypatch: Any) -> None:
    require(kind, monkeypatch)
    live.save()
    daemon = live.start(kind)
    wait_until(lambda: live.has("first"))
    with live.connection(b'{"cmd":') as half, live.connection() as ended:
        ended.shutdown(socket.SHUT_RD)
        half.shutdown(socket.SHUT_WR)
        wait_until(lambda: " staleness " in live.log())
        before = cpu_ticks(daemon.pid)
        time.sleep(0.7)
        assert cpu_ticks(daemon.pid) - before <= 5  # of 10 ms
    live.stop(daemon)


def cpu_ticks(pid: int) -> int:
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


# As a process: the socket


def test_conversations_are_as_agreed_byte_for_byte(served: Live) -> None:
    served.save()
    wait_until(lambda: served.has("first"))
    data = json.dumps(served.status(), separators=(",", ":")).encode()
    said = b'{"ok":true,"data":' + data + b"}\n"
    # Between two questions a staleness scan may have been queued, or done.
    wait_until(lambda: served.talk(STATUS + b"\n") == said.replace(b'"queue_depth":1', b'"queue_depth":0'))
    assert list(served.status()) == [
        *("running", "label", "started_at_unix", "codebase_count", "codebases", "socket", "projects_root"),
        *("version", "pid", "watcher", "last_sync_at_unix", "queue_depth", "problems"),
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
        assert reply["ok"] is False and "expected a registered name, got an unknown one" in reply["error"]


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (STATUS + b"\n", 1),
        (STATUS, 1),
        (STATUS + b"\r\n", 1),
        ((STATUS + b"\n") * 100, 100),
        ((STATUS + b"\r\n") * 3 + STATUS, 4),
        (b"\n\r\n  \n" + STATUS + b"\n", 1),
        (b"", 0),
        (b"\n", 0),
        (b'{"cmd":"sync"}\n' + STATUS + b'\n{"cmd":"sync"}', 3),
        (b"hello\n[1]\n{}\n" + STATUS + b"\n", 4),
    ],
    ids=range(10),
)
def test_half_closed_clients_get_all_their_replies(served: Live, data: bytes, count: int) -> None:
    replies = served.talk(data).splitlines()
    assert len(replies) == count
    assert all(json.loads(reply)["ok"] for reply in replies) is (b"hello" not in data)
    with served.connection() as client:
        for byte in data:
            client.sendall(bytes([byte]))
        client.shutdown(socket.SHUT_WR)
        assert len(read_all(client).splitlines()) == count


def test_bad_requests_leave_the_connection_open(served: Live) -> None:
    with served.connection() as client:
        for line, message in BAD_REQUESTS:
            client.sendall(line + b"\n")
            reply = json.loads(read_line(client))
            assert reply["ok"] is False and reply["error"].startswith(message)
        client.sendall(STATUS + b"\n")
        assert json.loads(read_line(client))["ok"] is True


@pytest.mark.parametrize(
    ("data", "reply"),
    [
        (b"\xff\n", NOT_UTF8),
        (b"x" * (orchestra.MAX_LINE + 1) + b"\n", TOO_LONG),
        (b"x" * (orchestra.MAX_LINE + 1), TOO_LONG),
        (b"[" * 100_000 + b"\n", TOO_LONG),
        (b"x" * (10 << 20), TOO_LONG),
        (b"x" * (10 << 20) + b"\n" + STATUS + b"\n", TOO_LONG),
    ],
    ids=["not UTF-8", "too long", "without end", "brackets", "10 MB", "10 MB and a request"],
)
def test_a_line_beyond_use_gets_an_error_and_the_end(served: Live, data: bytes, reply: bytes) -> None:
    with served.connection() as client:
        try:
            client.sendall(data)
        except OSError:
            pass  # the daemon need not read it all
        assert read_line(client) == reply
        try:
            assert client.recv(1) == b""
        except ConnectionResetError:
            pass
    assert served.answers()
    with served.connection(b" " * (orchestra.MAX_LINE - len(STATUS)) + STATUS + b"\n") as client:
        assert json.loads(read_line(client))["ok"] is True


def test_hundreds_of_silent_clients_and_a_deaf_one_hold_nobody_up(served: Live) -> None:
    before = memory_of(served.daemons[0].pid)
    deaf = socket.socket(socket.AF_UNIX)
    deaf.connect(served.socket)
    deaf.setblocking(False)
    asked = 0
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        try:
            asked += deaf.send((STATUS + b"\n") * 1000)
        except BlockingIOError:
            time.sleep(0.01)
    assert asked > 1000
    silent = [socket.socket(socket.AF_UNIX) for _ in range(200)]
    for client in silent:
        client.connect(served.socket)  # without a timeout, which would make a full backlog an error
    time.sleep(orchestra.SILENT_GRACE)
    waits = []
    for number in range(20):
        started = time.monotonic()
        wait_until(served.answers)
        waits.append(time.monotonic() - started)
        served.save(note=f"save {number}")
    wait_until(lambda: served.has("save 19"))
    print(f"status among 200 silent: worst {max(waits) * 1000:.1f} ms")
    assert sorted(waits)[10] < 0.25
    assert memory_of(served.daemons[0].pid) - before < 50 << 20
    for client in (*silent, deaf):
        client.close()
    wait_until(served.answers)


def memory_of(pid: int) -> int:
    if not IS_LINUX:
        return 0
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("kind", ["", "kqueue"])
def test_with_few_descriptors_it_lives_and_serves(live: Live, kind: str, monkeypatch: Any) -> None:
    if kind:
        require(kind, monkeypatch)
    live.save_many(20)
    few = 64
    daemon = live.start(kind, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (few, few)))
    clients = [socket.socket(socket.AF_UNIX) for _ in range(100)]
    for client in clients:
        client.connect(live.socket)
    for number in range(5):
        live.save("shop/api", f"save {number}")
        wait_until(lambda: live.answers())
        time.sleep(0.1)
    wait_until(lambda: live.has("save 4"))
    for client in clients:
        client.close()
    wait_until(live.answers)
    live.stop(daemon)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("is_open", [False, True], ids=["as it is", "with modes that let everyone in"])
def test_another_user_gets_nothing(served: Live, is_open: bool) -> None:
    if is_open:
        for path in (served.folder, Path(served.path), Path(served.socket).parent):
            path.chmod(0o755)
        os.chmod(served.socket, 0o666)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            said = served.talk(STATUS + b"\n")
        except OSError as error:
            said = errno.errorcode[error.errno or 0].encode()
        os.write(writer, said or b"nothing")
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    assert said in ([b"nothing", b"ECONNRESET", b"EPIPE", b"ENOTCONN"] if is_open else [b"EACCES"])
    assert served.answers()


# Logs


def log_files(live: Live) -> list[Path]:
    """List daemon.log and its older versions, oldest first."""
    path = Path(orchestra.stdout_log_path(live.path))
    return [*sorted(path.parent.glob("daemon.log.*"), key=lambda p: -int(p.suffix[1:])), path]


def test_a_foreground_run_leaves_both_logs(live: Live) -> None:
    live.save("shop/api").write_text("name: api\npath: [")
    said = live.folder / "out"
    with open(said, "wb") as out:
        daemon = live.start(stdout=out, stderr=subprocess.STDOUT)
        live.wait_for_start_job()
        wait_until(lambda: "WARNING" in live.errors())
        live.stop(daemon)
    info, warnings = live.log().splitlines(), live.errors().splitlines()
    assert [line.split()[1] for line in warnings] == ["WARNING"] * len(warnings)
    assert set(warnings) <= set(info) and len(info) > len(warnings) >= 1
    assert said.read_text().splitlines() == info
    assert all(line[:4].isdigit() and line[23] == "Z" for line in info)
    assert stat.S_IMODE(os.stat(orchestra.stdout_log_path(live.path)).st_mode) == 0o600


@pytest.mark.parametrize(
    "is_one",
    [
        pytest.param(False, id="each into its own"),
        pytest.param(True, id="both into daemon.log"),
    ],
)
def test_streams_that_are_the_log_files_are_not_doubled(live: Live, is_one: bool) -> None:
    live.save("shop/api").write_text("name: api\npath: [")
    os.mkdir(orchestra.logs_dir(live.path))
    out_path, err_path = orchestra.stdout_log_path(live.path), orchestra.stderr_log_path(live.path)
    with open(out_path, "ab") as out, open(out_path if is_one else err_path, "ab") as err:
        daemon = live.start(stdout=out, stderr=err)
    wait_until(lambda: " job" in live.log() or "WARNING" in live.errors())
    live.stop(daemon)
    info, warnings = live.log().splitlines(), live.errors().splitlines()
    assert len(warnings) >= 1 and " stopped " in info[-1]
    assert len(set(info)) == len(info) and len(set(warnings)) == len(warnings)
    assert set(warnings) <= set(info)


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
def test_rotation_loses_and_doubles_nothing(live: Live, is_stream: bool, count: int) -> None:
    os.mkdir(orchestra.logs_dir(live.path))
    out_path, err_path = orchestra.stdout_log_path(live.path), orchestra.stderr_log_path(live.path)
    if not is_stream:
        out_path, err_path = str(live.folder / "out"), str(live.folder / "err")
    with open(out_path, "ab") as out, open(err_path, "ab") as err:
        subprocess.run(
            [sys.executable, "-c", WRITE_LOG, str(HERE), live.path, str(count)], check=True, stdout=out, stderr=err
        )
    files = log_files(live)
    numbers = [int(line.rpartition("number=")[2]) for file in files for line in file.read_text().splitlines()]
    assert numbers == list(range(count - len(numbers), count))
    assert all(file.stat().st_size <= 4000 for file in files)
    if count == 300:
        assert len(numbers) == count
    else:
        assert [file.name for file in files] == [*(f"daemon.log.{n}" for n in (5, 4, 3, 2, 1)), "daemon.log"]
    if not is_stream:
        told = [int(line.rpartition("=")[2]) for line in Path(out_path).read_text().splitlines()]
        assert told == list(range(count))


def write_logs(live: Live, count: int = 10) -> None:
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
def test_daemon_logs_prints_the_end_of_both(live: Live, argv: tuple[str, ...], out: str) -> None:
    write_logs(live)
    ran = live.run("daemon", "logs", *argv)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, out, "")


def test_daemon_logs_without_logs_is_no_error(live: Live) -> None:
    ran = live.run("daemon", "logs", "--stderr-only")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert live.run("daemon", "logs", "--lines", "-1").returncode == 2


@pytest.mark.parametrize(
    ("data", "count", "tail"),
    [
        (b"", 3, b""),
        (b"a\nb\nc\n", 2, b"b\nc\n"),
        (b"a\nb\nc", 2, b"b\nc"),
        (b"a\nb\n", 2, b"a\nb\n"),
        (b"a\n", 0, b""),
        (b"\n\n\n", 2, b"\n\n"),
        (b"x" * 200_000 + b"\nlast\n", 1, b"last\n"),
        (b"x" * 200_000 + b"\nlast\n", 2, b"x" * 200_000 + b"\nlast\n"),
        (b"line\n" * 100_000, 50_000, b"line\n" * 50_000),
    ],
    ids=range(9),
)
def test_the_last_lines_are_read(live: Live, data: bytes, count: int, tail: bytes) -> None:
    file = live.code / "log"
    file.write_bytes(data)
    assert orchestra.LogReader(str(file)).tail(count) == tail


def test_a_carriage_return_ends_no_line_of_a_log(live: Live) -> None:
    file = live.code / "log"
    file.write_bytes(b"one\ntwo\rstill two\n")
    assert orchestra.LogReader(str(file)).tail(2) == b"one\ntwo\rstill two\n"


def test_the_last_lines_of_a_huge_file_come_at_once(live: Live) -> None:
    write_logs(live, 0)
    path = orchestra.stderr_log_path(live.path)
    os.truncate(path, 200 << 20)
    write_logs(live, 150)
    started = time.monotonic()
    tail = orchestra.LogReader(path).tail(100)
    print(f"100 lines of 200 MB: {(time.monotonic() - started) * 1000:.1f} ms")
    assert time.monotonic() - started < 0.5
    assert tail.splitlines() == [f"err {number}".encode() for number in range(50, 150)]


@contextmanager
def following(live: Live, *argv: str) -> Iterator[Any]:
    command = live.command("daemon", "logs", "-f", "--stderr-only", *argv)
    environ = {**os.environ, "HOME": live.path}
    follower = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield follower
        follower.send_signal(signal.SIGINT)
        assert follower.communicate(timeout=60)[1] == b""
        assert follower.returncode == 130
    finally:
        follower.kill()
        follower.communicate()


def test_following_goes_on_across_rotations(live: Live) -> None:
    write_logs(live, 2)
    path = orchestra.stderr_log_path(live.path)
    with following(live) as follower:
        assert [follower.stdout.readline() for _ in range(2)] == [b"err 0\n", b"err 1\n"]
        time.sleep(0.5)  # until it follows
        for number in range(8):
            with open(path, "a") as file:
                file.write(f"before {number}\n")
            orchestra.rotate_log(path, 5)
            with open(path, "a") as file:
                file.write(f"after {number}\n")
            for word in (b"before", b"after"):
                assert follower.stdout.readline() == b"%s %d\n" % (word, number)


def test_following_waits_for_a_log_that_is_not_there_yet(live: Live) -> None:
    with following(live) as follower:
        time.sleep(0.5)  # until it follows
        write_logs(live, 2)
        assert [follower.stdout.readline() for _ in range(2)] == [b"err 0\n", b"err 1\n"]


def test_following_loses_nothing_between_the_tail_and_the_rest(live: Live) -> None:
    write_logs(live, 50_000)  # more than a pipe holds
    with following(live, "--lines", "50000") as follower:
        assert follower.stdout.readline() == b"err 0\n"
        with open(orchestra.stderr_log_path(live.path), "a") as file:
            file.write("meanwhile\n")
        lines = [follower.stdout.readline() for _ in range(49_999)]
        assert lines[-1] == b"err 49999\n"
        time.sleep(0.6)
        with open(orchestra.stderr_log_path(live.path), "a") as file:
            file.write("later\n")
        assert follower.stdout.readline() == b"meanwhile\n"


def test_two_rotations_between_two_looks_lose_no_line_that_is_kept(live: Live) -> None:
    write_logs(live, 1)
    path = orchestra.stderr_log_path(live.path)
    follower = orchestra.LogReader(path)
    assert follower.tail(1) == b"err 0\n"
    with open(path, "a") as file:
        file.write("old\n")
    orchestra.rotate_log(path, 5)
    with open(path, "a") as file:
        file.write("new\n")
    assert follower.read() == b"old\nnew\n"
    assert follower.read() == b""


# What hostile users found


def run_watcher_job(live: Live, cache: orchestra.RegistryCache, *names: str, suspects: Any = ()) -> Any:
    changed = frozenset(("shop", name) for name in names)
    job = orchestra.SyncJob(
        orchestra.SyncTarget.codebase(), "watcher", None, changed, frozenset(("shop", name) for name in suspects)
    )
    return orchestra.run_job(live.path, cache, job)


def test_a_folder_that_changes_hands_while_its_codebase_is_half_written_stays_one_codebases(live: Live) -> None:
    one, two = live.text("shop/one"), live.text("shop/two")
    taken = two.replace(str(live.code / "shop/two"), str(live.code / "shop/one"))
    replace(live.save("shop/one"), one)
    replace(live.save("shop/two"), two)
    cache = orchestra.load_cache(live.path)
    replace(live.file("shop/one"), "name: [")
    replace(live.file("shop/two"), taken)
    cache, outcome = run_watcher_job(live, cache, "one", "two")
    replace(live.file("shop/one"), one)
    cache, outcome = run_watcher_job(live, cache, "one", suspects=[key[1] for key in outcome.suspects])
    assert len(cache.problems) == 1  # both name the folder
    replace(live.file("shop/two"), two)
    cache, outcome = run_watcher_job(live, cache, "two")
    replace(live.file("shop/one"), one.replace("first", "last"))
    cache, outcome = run_watcher_job(live, cache, "one")
    assert outcome.error == "" and cache.problems == [] and live.has("last", "shop/one")


def test_a_file_that_vanishes_while_it_is_read_is_no_bug(live: Live, monkeypatch: Any) -> None:
    file = live.save("shop/one")
    read = orchestra.read_codebase

    def read_and_remove(home: str, key: orchestra.Key) -> Any:
        result = read(home, key)
        file.unlink()
        return result

    monkeypatch.setattr(orchestra, "read_codebase", read_and_remove)
    assert list(orchestra.load_registry(live.path).codebases) == [("shop", "one")]


def test_a_link_that_goes_while_it_is_followed_stops_nothing(live: Live, monkeypatch: Any) -> None:
    file = live.save("shop/one")
    watcher = orchestra.Watcher(live.path, orchestra.PollingSource())
    monkeypatch.setattr(orchestra, "_first_link", lambda path: str(file))
    watcher._anchor(str(file))
    assert watcher.look().saved == {str(file)}


def test_a_link_that_comes_and_goes_stops_nothing(served: Live) -> None:
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
    wait_until(lambda: served.has("last", "shop/one"))


def test_a_client_that_connects_in_the_turn_of_a_stop_does_no_harm(live: Live) -> None:
    daemon = live.start()
    live.wait_for_start_job()
    daemon.send_signal(signal.SIGSTOP)
    with live.connection(b'{"cmd":"stop"}\n') as client, live.connection():
        daemon.send_signal(signal.SIGCONT)
        assert read_line(client) == b'{"ok":true,"data":{"stopping":true}}\n'
    live.expect_end(daemon)


def test_a_reader_of_stdout_that_has_stopped_does_not_stop_the_daemon(live: Live) -> None:
    live.save()
    daemon = live.start(stdout=subprocess.PIPE)
    with live.connection(b'{"cmd":"sync"}\n' * 800) as client:
        for _ in range(800):
            assert read_line(client).startswith(b'{"ok":true')
    assert live.synced("socket") == 800
    assert daemon.stdout is not None and len(os.read(daemon.stdout.fileno(), 1 << 20)) > 4096
    live.stop(daemon)
    daemon.stdout.close()


def test_a_bug_in_a_job_costs_no_save(live: Live, monkeypatch: Any) -> None:
    live.save()
    processor = orchestra.SyncProcessor(live.path, orchestra.load_cache(live.path), lambda: None)
    run_job, calls = orchestra.run_job, []

    def fail_once(*arguments: Any) -> Any:
        calls.append(arguments)
        return run_job(*arguments) if len(calls) > 1 else {}["bug"]

    monkeypatch.setattr(orchestra, "run_job", fail_once)
    processor.start()
    processor.submit(orchestra.SyncJob(orchestra.SyncTarget.all(), "watcher", None, frozenset([orchestra.EVERYTHING])))
    wait_until(lambda: len(processor.outcomes) == 2)
    processor.finish()
    assert "KeyError" in processor.outcomes[0].error and processor.outcomes[1].summary is not None
    assert live.has("first")


def test_a_daemon_whose_lock_was_removed_ends_and_leaves_the_next_ones_socket(live: Live) -> None:
    first = live.start()
    shutil.rmtree(orchestra.run_dir(live.path))
    second = live.start(wait=False)
    wait_until(lambda: live.served_by() == second.pid)
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 0
    assert live.served_by() == second.pid
    live.stop(second)


def test_names_that_a_fresh_start_refuses_are_refused_while_it_runs(live: Live) -> None:
    path = live.projects / "shop" / f"{'x' * 101}.yaml"
    assert orchestra.key_of_change(live.path, str(path), True) == orchestra.STRAY


# ── 12 launchd and installing ─────────────────────────────────────────────────

INSTALLER = HERE / "install.sh"
ORCHESTRA_PY = (HERE / "orchestra.py").read_bytes()
PYTHON_XY = f"python{sys.version_info[0]}.{sys.version_info[1]}"
# A virtual environment's Python is not what is installed: the one below it is.
BASE_PYTHON = os.path.join(sys.base_prefix, "bin", PYTHON_XY) if sys.prefix != sys.base_prefix else sys.executable
SHORT_PATH = "/usr/bin:/bin:/usr/sbin:/sbin"  # launchd's
SHELLS = {"sh": ["sh"], "dash": ["dash"], "bash": ["bash", "--posix"], "busybox": ["busybox", "sh"]}


class Place:
    """A home folder of a machine that has no Orchestra yet, and beside it room for a test's own things."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.home = self.folder / "h"
        self.home.mkdir()
        self.tools = self.make_tool("uname", "echo Linux").parent  # keeps the real launchd out of it on macOS
        self.code = self.folder / "c"
        self.code.mkdir()

    @property
    def path(self) -> str:
        return str(self.home)

    def move_home(self, name: str) -> None:
        self.home = self.home.rename(self.folder / name)

    def environ(self, **more: Optional[str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ORCHESTRA_", "PYTHON"))}
        found = {**kept, "HOME": self.path, "PATH": f"{self.tools}:{os.environ['PATH']}", **more}
        return {name: value for name, value in found.items() if value is not None}

    def run(self, *argv: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; `environ` holds variables to change, None for one to take away."""
        environ = self.environ(**options.pop("environ", {}))
        options = {"stdin": subprocess.DEVNULL, "cwd": "/", **options}
        if "input" in options:
            del options["stdin"]
        return subprocess.run(
            list(map(str, argv)), env=environ, check=False, capture_output=True, text=True, timeout=120, **options
        )

    def install(self, shell: str = "sh", *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run install.sh: as a file, or, where `url` is given, from a pipe."""
        url = options.pop("url", None)
        environ = {"ORCHESTRA_PYTHON": BASE_PYTHON, **options.pop("environ", {})}
        if url is None:
            return self.run(*find_shell(shell), INSTALLER, *argv, environ=environ, **options)
        text = INSTALLER.read_text()
        environ["ORCHESTRA_URL"] = url
        return self.run(*find_shell(shell), "-s", "--", *argv, input=text, environ=environ, **options)

    def orchestra(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run what was installed, from another folder and with launchd's short PATH."""
        return self.run(orchestra.link_path(self.path), *argv, **{"environ": {"PATH": SHORT_PATH}, **options})

    def make_tool(self, name: str, text: str, folder: str = "tools") -> Path:
        tool = self.folder / folder / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\n{text}\n")
        tool.chmod(0o755)
        return tool

    def only_tools(self, *names: str) -> str:
        """Give a PATH that has these programs, and those that every machine has."""
        folder = self.folder / "only"
        folder.mkdir()
        every = "sh dirname basename cp mktemp rm rmdir mkdir tail cut sha256sum shasum perl readlink cat uname"
        for name in (*every.split(), *names):
            found = shutil.which(name)
            if found:
                (folder / name).symlink_to(found)
        return f"{self.tools}:{folder}"

    def give_yaml(self) -> None:
        """Put PyYAML where an earlier fetch would have put it, so that nothing is fetched."""
        import yaml

        target = Path(orchestra.python_lib_dir(self.path), "yaml")
        shutil.copytree(Path(yaml.__file__).parent, target, ignore=shutil.ignore_patterns("__pycache__"))

    def listing(self) -> dict[str, tuple[str, bytes]]:
        """Give the mode and bytes of all below HOME, folders too; of a link, where it leads."""
        found = {}
        for path in sorted(self.home.rglob("*")):
            mode = path.lstat().st_mode
            data = path.read_bytes() if stat.S_ISREG(mode) else b""
            data = os.readlink(path).encode() if stat.S_ISLNK(mode) else data
            found[str(path.relative_to(self.home))] = (stat.filemode(mode), data)
        return found

    def answers(self) -> bool:
        try:
            return bool(orchestra.send_request(self.path, {"cmd": "status"}))
        except orchestra.DaemonError:
            return False

    @contextmanager
    def daemon(self, *command: object) -> Iterator[subprocess.Popen[bytes]]:
        """Run a real daemon that somebody starts by hand."""
        command = command or (orchestra.link_path(self.path),)
        with open(self.folder / "said", "wb") as said:
            argv = [*map(str, command), "daemon", "start"]
            process = subprocess.Popen(argv, env=self.environ(), stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            until(lambda: process.poll() is not None or self.answers())
            assert process.poll() is None, (self.folder / "said").read_text()
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def until(is_true: Callable[[], Any], timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def find_shell(name: str) -> list[str]:
    if not shutil.which(SHELLS[name][0]):
        pytest.skip(f"no {SHELLS[name][0]} here")
    return [str(shutil.which(SHELLS[name][0])), *SHELLS[name][1:]]


@functools.cache
def reaches_pypi() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--isolated", "download", "--quiet", "--no-deps", "--dest", folder]
        return subprocess.call([*pip, "PyYAML>=6"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0


def need_pypi() -> None:
    if not reaches_pypi():
        pytest.skip("pip cannot fetch PyYAML here")


@pytest.fixture
def place() -> Any:
    folder = tempfile.mkdtemp(prefix="ori", dir="/tmp")
    yield Place(folder)
    shutil.rmtree(folder)


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


@pytest.fixture
def server(place: Place) -> Any:
    """A web server with a copy of the checkout; yields its address and its folder."""
    folder = place.folder / "www"
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


# The property list


def test_plist_contains_required_launchd_fields() -> None:
    data = orchestra.generate_plist("/Users/me/.orchestra/bin/orchestra", "/Users/me/.orchestra/logs")
    assert plistlib.loads(data) == {
        "Label": "dev.orchestra.daemon",
        "ProgramArguments": ["/Users/me/.orchestra/bin/orchestra", "daemon", "start"],
        "RunAtLoad": True,
        "KeepAlive": True,
        "StandardOutPath": "/Users/me/.orchestra/logs/daemon.log",
        "StandardErrorPath": "/Users/me/.orchestra/logs/daemon-err.log",
        "SoftResourceLimits": {"NumberOfFiles": 10240},
        "ExitTimeOut": 20,
    }


@pytest.mark.parametrize(
    "home", ["/Users/me", "/Users/Ann & Bob", "/Users/<x>", "/Users/Zoë Łuk/日本", "/Users/'\"]]>"]
)
def test_a_plist_holds_whatever_the_home_folder_is_called(home: str) -> None:
    data = orchestra.generate_plist(f"{home}/bin/orchestra", f"{home}/logs")
    values = plistlib.loads(data)
    assert values["ProgramArguments"] == [f"{home}/bin/orchestra", "daemon", "start"]
    assert values["StandardErrorPath"] == f"{home}/logs/daemon-err.log"


@pytest.mark.skipif(not shutil.which("plistutil"), reason="no plistutil here")
@pytest.mark.parametrize("home", ["/Users/me", "/Users/A & <B>", "/Users/Zoë 日本"])
def test_apples_format_is_understood_by_another_reader_than_pythons(place: Place, home: str) -> None:
    file = place.folder / "p.plist"
    file.write_bytes(orchestra.generate_plist(f"{home}/bin/orchestra", f"{home}/logs"))
    binary = place.folder / "p.bin"
    done = place.run("plistutil", "-i", file, "-f", "bin", "-o", binary)
    assert done.returncode == 0, done
    assert plistlib.loads(binary.read_bytes()) == plistlib.loads(file.read_bytes())


@pytest.mark.parametrize("home", ["/a\x01b", "/a\nb\x00", "/a\x1b", "/\udcff"])
def test_a_home_that_xml_cannot_hold_is_a_launchd_error(home: str) -> None:
    with pytest.raises(orchestra.LaunchdError, match="property list"):
        orchestra.generate_plist(f"{home}/bin/orchestra", f"{home}/logs")


# A launchd to test with


class Answerer:
    """Something that answers on the control socket, as a daemon does."""

    def __init__(self, path: str) -> None:
        self.path = path
        if os.path.lexists(path):
            os.unlink(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(8)
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while True:
            with self.listener.accept()[0] as client:
                line = client.recv(4096)
                if line == b"end":
                    return
                client.sendall(b'{"ok":true,"data":{"running":true}}\n')

    def stop(self) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(self.path)
            client.sendall(b"end")
            self.thread.join()
        self.listener.close()  # and leaves a stale socket


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


class FakeLaunchctl:
    """A launchd that keeps state; `codes` are exit codes to answer a subcommand with before it does its work."""

    def __init__(self, home: str, teardown: float = 0.0, start: Any = None, **codes: Sequence[int]) -> None:
        self.home = home
        self.teardown = teardown  # seconds that a service is still known after bootout
        self.start_service = start or (lambda plist: Answerer(orchestra.socket_path(home)))
        self.codes = {name: list(left) for name, left in codes.items()}
        self.loaded: Optional[dict[str, Any]] = None
        self.loaded_bytes = b""
        self.gone_at: Optional[float] = None
        self.disabled = False
        self.running: Any = None
        self.now = 0.0
        self.calls: list[str] = []

    def launchd(self, **options: Any) -> orchestra.Launchd:
        return orchestra.Launchd(
            **{"run": self.run, "uid": 501, "clock": lambda: self.now, "sleep": self.sleep, **options}
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def run(self, argv: Sequence[str], timeout: float) -> orchestra.Completed:
        assert argv[0] == "/bin/launchctl"
        assert timeout > 0
        words = [word.replace("gui/501", "GUI").replace(self.home, "HOME") for word in argv[1:]]
        self.calls.append(" ".join(words))
        if self.gone_at is not None and self.now >= self.gone_at:
            self.loaded = self.gone_at = None
        left = self.codes.get(argv[1], [])
        code = left.pop(0) if left else getattr(self, argv[1])(*argv[2:])
        return orchestra.Completed(code, f"{argv[1]} said {code}")

    def verbs(self) -> list[str]:
        """Give what was asked for, without the looking."""
        return [call.split()[0] for call in self.calls if not call.startswith("print")]

    def bootout(self, service: str) -> int:
        assert service == "gui/501/dev.orchestra.daemon"
        if self.loaded is None:
            return 3
        self.stop()
        self.gone_at = self.now + self.teardown
        return 0

    def print(self, service: str) -> int:
        return 113 if self.loaded is None else 0

    def bootstrap(self, domain: str, plist: str) -> int:
        assert domain == "gui/501"
        if self.loaded is not None:
            return 37 if self.gone_at else 5
        if self.disabled:
            return 119
        self.loaded_bytes = Path(plist).read_bytes()
        self.loaded = plistlib.loads(self.loaded_bytes)
        return self.start()

    def kickstart(self, flag: str, service: str) -> int:
        assert flag == "-k"
        self.stop()
        return 113 if self.loaded is None else self.start()

    def enable(self, service: str) -> int:
        self.disabled = False
        return 0

    def start(self) -> int:
        self.running = self.start_service(self.loaded)
        return 0

    def stop(self) -> None:
        if self.running is not None:
            self.running.stop()
        self.running = None


@pytest.fixture
def launchctl(place: Place) -> Any:
    """Make a stand-in for launchd, whose services end with the test."""
    made = []

    def make(**options: Any) -> FakeLaunchctl:
        made.append(FakeLaunchctl(place.path, **options))
        return made[-1]

    yield make
    for fake in made:
        fake.stop()


BINARY = "/opt/orchestra"


def install_with(place: Place, fake: FakeLaunchctl, binary: str = BINARY, **options: Any) -> bytes:
    """Install, and give the plist's bytes."""
    orchestra.install_launchd(place.path, binary, "darwin", fake.launchd(**options))
    return plist_of(place).read_bytes()


def plist_of(place: Place) -> Path:
    return Path(orchestra.launchd_plist_path(place.path))


def no_daemon(plist: Any) -> None:
    """Start a daemon that ends at once."""


def test_install_boots_out_then_bootstraps_then_kickstarts(place: Place, launchctl: Any) -> None:
    fake = launchctl()
    data = install_with(place, fake)
    assert fake.calls == [
        "bootout GUI/dev.orchestra.daemon",
        "print GUI/dev.orchestra.daemon",
        "bootstrap GUI HOME/Library/LaunchAgents/dev.orchestra.daemon.plist",
        "kickstart -k GUI/dev.orchestra.daemon",
    ]
    assert data == fake.loaded_bytes == orchestra.generate_plist(BINARY, orchestra.logs_dir(place.path))
    assert os.path.isdir(orchestra.run_dir(place.path))
    assert os.path.isdir(orchestra.logs_dir(place.path))
    assert fake.now == 0.0


def test_install_waits_while_the_old_service_is_torn_down(place: Place, launchctl: Any) -> None:
    fake = launchctl(teardown=4.0)
    install_with(place, fake)
    fake.calls.clear()
    install_with(place, fake)
    assert fake.now == 4.0
    assert fake.verbs() == ["bootout", "bootstrap", "kickstart"]
    assert [call.split()[0] for call in fake.calls].count("print") == 9
    assert place.answers()


@pytest.mark.parametrize("codes", [[5], [37], [36], [5, 37, 5], [5] * 20])
def test_install_tries_again_while_launchd_is_busy(place: Place, launchctl: Any, codes: list[int]) -> None:
    fake = launchctl(bootstrap=codes)
    install_with(place, fake)
    assert fake.verbs() == ["bootout", *["bootstrap"] * (len(codes) + 1), "kickstart"]
    assert fake.now == len(codes) * 0.5


def test_install_gives_up_when_launchd_stays_busy(place: Place, launchctl: Any) -> None:
    fake = launchctl(bootstrap=[5] * 1000)
    with pytest.raises(
        orchestra.LaunchdError, match=r"^launchd error: launchctl bootstrap: expected it to load .* got 5"
    ):
        install_with(place, fake)
    assert fake.now <= 16
    assert not plist_of(place).exists()


def test_exit_code_5_is_fine_when_the_service_is_loaded_all_the_same(place: Place, launchctl: Any) -> None:
    fake = launchctl()
    inner = fake.bootstrap

    def bootstrap(domain: str, plist: str) -> int:
        inner(domain, plist)
        return 5

    fake.bootstrap = bootstrap
    install_with(place, fake)
    assert fake.verbs() == ["bootout", "bootstrap", "kickstart"]
    assert place.answers()


def test_an_unknown_exit_code_is_not_tried_again(place: Place, launchctl: Any) -> None:
    fake = launchctl(bootstrap=[78])
    with pytest.raises(orchestra.LaunchdError, match="got 78: bootstrap said 78"):
        install_with(place, fake)
    assert fake.verbs() == ["bootout", "bootstrap", "bootout"]


def test_a_disabled_service_is_enabled_then_loaded(place: Place, launchctl: Any) -> None:
    fake = launchctl()
    fake.disabled = True
    install_with(place, fake)
    assert fake.verbs() == ["bootout", "bootstrap", "enable", "bootstrap", "kickstart"]


@pytest.mark.parametrize("code", [112, 125])
def test_without_a_desktop_session_the_message_says_so(place: Place, launchctl: Any, code: int) -> None:
    fake = launchctl(bootout=[code] * 9, print=[code] * 9, bootstrap=[code] * 9)
    with pytest.raises(orchestra.LaunchdError, match="expected a desktop session, found none") as caught:
        install_with(place, fake)
    assert "gui/501" in str(caught.value)
    assert str(code) in str(caught.value)
    assert "log in" in caught.value.hint
    assert not plist_of(place).exists()
    assert fake.now < 1


def test_a_service_that_cannot_be_unloaded_stops_the_install(place: Place, launchctl: Any) -> None:
    fake = launchctl(teardown=1000.0)
    old = install_with(place, fake)
    with pytest.raises(orchestra.LaunchdError, match="expected it to be unloaded"):
        install_with(place, fake, "/opt/new")
    assert plist_of(place).read_bytes() == old


def test_reinstalling_the_same_bytes_restarts_the_service(place: Place, launchctl: Any) -> None:
    fake = launchctl()
    first = install_with(place, fake)
    running = fake.running
    fake.calls.clear()
    assert install_with(place, fake) == first
    assert fake.verbs() == ["bootout", "bootstrap", "kickstart"]
    assert fake.running is not running


def test_an_install_whose_daemon_never_answers_restores_the_old_plist(place: Place, launchctl: Any) -> None:
    fake = launchctl()
    old = install_with(place, fake)
    alive = fake.start_service
    fake.start_service = lambda plist: alive(plist) if plist["ProgramArguments"][0] == BINARY else no_daemon(plist)
    with pytest.raises(orchestra.LaunchdError, match="expected the daemon to answer") as caught:
        install_with(place, fake, "/opt/broken")
    assert "daemon logs" in caught.value.hint
    assert plist_of(place).read_bytes() == fake.loaded_bytes == old
    assert place.answers()


def test_a_failed_first_install_leaves_no_plist(place: Place, launchctl: Any) -> None:
    fake = launchctl(start=no_daemon)
    with pytest.raises(orchestra.LaunchdError, match="expected the daemon to answer"):
        install_with(place, fake)
    assert not plist_of(place).exists()
    assert fake.verbs()[-1] == "bootout"
    assert list(plist_of(place).parent.iterdir()) == []


def test_a_failed_install_has_the_old_service_running_again(place: Place, launchctl: Any) -> None:
    fake = launchctl(teardown=3.0)
    old = install_with(place, fake)
    alive = fake.start_service
    fake.start_service = lambda plist: alive(plist) if plist["ProgramArguments"][0] == BINARY else no_daemon(plist)
    with pytest.raises(orchestra.LaunchdError, match="expected the daemon to answer"):
        install_with(place, fake, "/opt/broken")
    assert plist_of(place).read_bytes() == fake.loaded_bytes == old
    assert fake.gone_at is None
    assert place.answers()


def test_a_plist_that_cannot_be_written_is_an_error_and_asks_launchd_nothing(place: Place, launchctl: Any) -> None:
    (place.home / "Library").write_text("not a folder")
    fake = launchctl()
    with pytest.raises(orchestra.IoError, match=r"dev\.orchestra\.daemon\.plist"):
        install_with(place, fake)
    assert fake.calls == []


def test_uninstall_removes_the_service_the_plist_and_a_stale_socket(place: Place, launchctl: Any) -> None:
    fake = launchctl(teardown=3.0)
    install_with(place, fake)
    assert orchestra.uninstall_launchd(place.path, "darwin", fake.launchd()) is True
    assert fake.now == 3.0
    assert fake.loaded is None
    assert not plist_of(place).exists()
    assert not os.path.lexists(orchestra.socket_path(place.path))


def test_uninstall_when_nothing_is_installed_says_so(place: Place, launchctl: Any) -> None:
    fake = launchctl()
    before = place.listing()
    assert orchestra.uninstall_launchd(place.path, "darwin", fake.launchd()) is False
    assert fake.verbs() == []
    assert place.listing() == before


def test_uninstall_unloads_a_service_whose_plist_was_deleted(place: Place, launchctl: Any) -> None:
    fake = launchctl()
    install_with(place, fake)
    plist_of(place).unlink()
    assert orchestra.uninstall_launchd(place.path, "darwin", fake.launchd()) is False
    assert fake.loaded is None


def test_uninstall_leaves_the_socket_of_a_daemon_that_is_busy(place: Place, launchctl: Any) -> None:
    path = orchestra.socket_path(place.path)
    os.mkdir(os.path.dirname(path))
    is_over = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(8)
        listener.settimeout(0.02)

        def refuse() -> None:
            while not is_over.is_set():
                try:
                    client, _ = listener.accept()
                except socket.timeout:
                    continue
                with client:
                    client.sendall(orchestra.encode_error(orchestra.TOO_MANY_CLIENTS))

        thread = threading.Thread(target=refuse)
        thread.start()
        try:
            orchestra.uninstall_launchd(place.path, "darwin", launchctl().launchd())
        finally:
            is_over.set()
            thread.join()
    assert os.path.lexists(path)


# launchctl as a program

LAUNCHCTL_PROGRAM = """\
#!/bin/sh
# A line of the file named like a subcommand is what it does next: an exit code, or hang.
cd "$(dirname "$0")" || exit 99
echo "$1" >>calls
if [ -s "$1" ]; then
    next=$(head -n 1 "$1")
    tail -n +2 "$1" >rest
    mv rest "$1"
    [ "$next" != hang ] || exec sleep 60
    exit "$next"
fi
case $1 in
    bootout) [ -e loaded ] || exit 3; rm loaded ;;
    print) [ -e loaded ] || exit 113 ;;
    bootstrap) [ ! -e loaded ] || exit 5; cp "$3" loaded ;;
    kickstart) [ -e loaded ] || exit 113 ;;
esac
"""


def launchctl_program(place: Place, timeout: float = 20.0, **nexts: str) -> orchestra.Runner:
    """Make the program, and a runner that starts it where /bin/launchctl is asked for."""
    folder = place.folder / "launchctl"
    folder.mkdir(exist_ok=True)
    program = folder / "launchctl"
    program.write_text(LAUNCHCTL_PROGRAM)
    program.chmod(0o755)
    for name, text in nexts.items():
        (folder / name).write_text("".join(f"{word}\n" for word in text.split()))
    return lambda argv, _: orchestra.run_program([{"/bin/launchctl": str(program)}[argv[0]], *argv[1:]], timeout)


def calls_of(place: Place) -> list[str]:
    return [line for line in (place.folder / "launchctl/calls").read_text().split() if line != "print"]


def test_install_holds_with_a_real_program_for_launchctl(place: Place) -> None:
    run = launchctl_program(place, bootstrap="5 37")
    (place.folder / "launchctl/loaded").touch()
    started: list[Answerer] = []
    naps: list[float] = []

    def run_and_answer(argv: Sequence[str], timeout: float) -> orchestra.Completed:
        if argv[1] == "kickstart":
            started.append(Answerer(orchestra.socket_path(place.path)))
        return run(argv, timeout)

    launchd = orchestra.Launchd(run=run_and_answer, uid=501, sleep=naps.append)
    orchestra.install_launchd(place.path, BINARY, "darwin", launchd)
    started[0].stop()
    assert calls_of(place) == ["bootout", "bootstrap", "bootstrap", "bootstrap", "kickstart"]
    assert (place.folder / "launchctl/loaded").read_bytes() == plist_of(place).read_bytes()
    assert naps == [0.5, 0.5]
    assert orchestra.uninstall_launchd(place.path, "darwin", launchd) is True
    assert not (place.folder / "launchctl/loaded").exists()


@pytest.mark.parametrize("hangs", ["print", "bootstrap"])
def test_a_launchctl_that_hangs_is_an_error_and_the_old_plist_is_back(place: Place, hangs: str) -> None:
    plist_of(place).parent.mkdir(parents=True)
    plist_of(place).write_bytes(b"the old one")
    run = launchctl_program(place, 0.3, **{hangs: "hang"})
    with pytest.raises(orchestra.LaunchdError, match=r"no answer within 0\.3 s"):
        orchestra.install_launchd(place.path, BINARY, "darwin", orchestra.Launchd(run=run, uid=501))
    assert plist_of(place).read_bytes() == b"the old one"


def test_a_launchctl_that_cannot_be_started_is_an_error(place: Place) -> None:
    launchd = orchestra.Launchd(run=lambda argv, timeout: orchestra.run_program(["/nowhere/launchctl"], timeout))
    with pytest.raises(orchestra.LaunchdError, match="no such file"):
        orchestra.install_launchd(place.path, BINARY, "darwin", launchd)
    assert not plist_of(place).exists()


def test_a_program_is_ended_when_its_time_is_over() -> None:
    started = time.monotonic()
    assert orchestra.run_program(["sleep", "60"], 0.2) == (orchestra.TIMED_OUT, "no answer within 0.2 s")
    assert time.monotonic() - started < 10
    assert orchestra.run_program(["sh", "-c", "echo out; echo err >&2; exit 7"], 10) == (7, "out\nerr")
    assert orchestra.run_program(["/nowhere"], 10).code == orchestra.NOT_STARTED


# The real daemon, run as launchd runs it


def test_install_takes_over_from_a_daemon_started_by_hand(place: Place, launchctl: Any) -> None:
    place.give_yaml()
    binary = orchestra.install_program(place.path, BASE_PYTHON, str(HERE / "orchestra.py"))
    fake = launchctl(start=lambda plist: Service(place.path, plist))
    with place.daemon(binary) as by_hand:
        # Real time: the daemons are real.
        install_with(place, fake, binary, clock=time.monotonic, sleep=lambda _: time.sleep(0.02))
        assert by_hand.wait(20) == 0
        assert place.answers()
        status = orchestra.send_request(place.path, {"cmd": "status"})
        assert status["label"] == "dev.orchestra.daemon"
        register(place)
        orchestra.request_sync(place.path)
        assert (place.code / "CLAUDE.md").exists()
        assert "source=socket" in Path(orchestra.stdout_log_path(place.path)).read_text()
    launchd = fake.launchd(clock=time.monotonic, sleep=lambda _: time.sleep(0.02))
    assert orchestra.uninstall_launchd(place.path, "darwin", launchd) is True
    assert not place.answers()
    assert not os.path.lexists(orchestra.socket_path(place.path))


def test_install_upgrades_a_running_service(place: Place, launchctl: Any) -> None:
    place.move_home("Ann & Zoë")
    place.give_yaml()
    binary = orchestra.install_program(place.path, BASE_PYTHON, str(HERE / "orchestra.py"))
    fake = FakeLaunchctl(place.path, start=lambda plist: Service(place.path, plist))
    options = {"clock": time.monotonic, "sleep": lambda _: time.sleep(0.02)}
    try:
        first = install_with(place, fake, binary, **options)
        assert install_with(place, fake, binary, **options) == first
        assert place.answers()
    finally:
        fake.stop()


def register(place: Place) -> None:
    file = Path(orchestra.codebase_path(place.path, ("shop", "api")))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"name: api\npath: {place.code}\ntargets: [claude]\n")


@pytest.mark.skipif(sys.platform == "darwin", reason="launchd is here")
@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_elsewhere_than_on_macos_launchd_is_an_error_that_changes_nothing(
    place: Place, capsys: Any, command: str
) -> None:
    before = place.listing()
    assert orchestra.main(["daemon", command], {"HOME": place.path}) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert lines[0] == "orchestra: launchd error: launchd management is only supported on macOS"
    assert "systemd" in lines[1]
    assert place.listing() == before


def test_the_platform_is_checked_before_anything_is_done(place: Place, launchctl: Any) -> None:
    fake = launchctl()
    for act in (
        lambda: orchestra.install_launchd(place.path, BINARY, "linux", fake.launchd()),
        lambda: orchestra.uninstall_launchd(place.path, "linux", fake.launchd()),
    ):
        with pytest.raises(orchestra.LaunchdError):
            act()
    assert fake.calls == []
    assert place.listing() == {}


# The installed program


@pytest.mark.parametrize(
    ("python", "stable"),
    [
        ("/opt/homebrew/Cellar/python@3.12/3.12.4/bin/python3.12", "/opt/homebrew/opt/python@3.12/bin/python3.12"),
        (
            "/opt/homebrew/Cellar/python@3.13/3.13.0_1/Frameworks/Python.framework/Versions/3.13/bin/python3.13",
            "/opt/homebrew/opt/python@3.13/bin/python3.13",
        ),
        ("/usr/local/Cellar/python@3.9/3.9.1/bin/python3", "/usr/local/opt/python@3.9/bin/python3"),
        ("/usr/bin/python3", "/usr/bin/python3"),
        ("/Users/me/Cellar/bin/python3", "/Users/me/Cellar/bin/python3"),
    ],
)
def test_homebrews_python_is_named_by_the_link_that_survives_an_upgrade(python: str, stable: str) -> None:
    assert orchestra.stable_python_path(python, exists=lambda path: True) == stable
    assert orchestra.stable_python_path(python, exists=lambda path: path == python) == python


def test_the_installed_python_is_not_a_virtual_environments(place: Place, bare_python: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import orchestra; print(orchestra.choose_python())"
    done = place.run(bare_python, "-I", "-c", code)
    assert not done.stdout.startswith(os.path.dirname(bare_python)), done
    version = place.run(
        done.stdout.strip(), "-c", "import sys; print(sys.version_info[:2], sys.prefix == sys.base_prefix)"
    )
    assert version.stdout == f"{sys.version_info[:2]} True\n"


def test_a_python_that_does_not_run_is_not_chosen() -> None:
    tried = []

    def run(argv: Sequence[str], timeout: float) -> orchestra.Completed:
        tried.append(argv[0])
        return orchestra.Completed(1 if len(tried) == 1 else 0, "")

    if sys.prefix == sys.base_prefix:
        pytest.skip("there is one candidate outside a virtual environment")
    assert orchestra.choose_python(run) == orchestra.stable_python_path(sys.executable)
    assert tried == [orchestra.stable_python_path(BASE_PYTHON), orchestra.stable_python_path(sys.executable)]


def test_without_any_python_that_runs_the_message_says_so() -> None:
    with pytest.raises(orchestra.UsageError, match="got none that does"):
        orchestra.choose_python(lambda argv, timeout: orchestra.Completed(1, ""))


@pytest.mark.parametrize(
    "folder", ["plain", "with space", "a'quote", "a' b", "'", "ends' '", "Zoë", '$HOME `x` "q"', "long" * 40]
)
def test_the_launcher_runs_with_a_python_wherever_it_lies(place: Place, folder: str) -> None:
    python = place.folder / folder / "python"
    python.parent.mkdir()
    python.symlink_to(BASE_PYTHON)
    binary = orchestra.install_program(place.path, str(python), str(HERE / "orchestra.py"))
    for _ in range(2):
        done = place.run(binary, "--version", environ={"PATH": SHORT_PATH})
        assert (done.returncode, done.stdout, done.stderr) == (0, f"orchestra {orchestra.__version__}\n", "")
    assert place.run(binary, "sync", "a 'b", "--nope").returncode == 2


def test_the_launcher_runs_with_a_python_whose_path_has_a_backslash(place: Place) -> None:
    python = place.folder / "a \\x" / "python"
    python.parent.mkdir()
    python.symlink_to(BASE_PYTHON)
    binary = orchestra.install_program(place.path, str(python), str(HERE / "orchestra.py"))
    assert place.run(binary, "--version").stdout == f"orchestra {orchestra.__version__}\n"


def test_the_installed_program_is_private_and_cached_and_deaf_to_the_environment(place: Place) -> None:
    binary = orchestra.install_program(place.path, BASE_PYTHON, str(HERE / "orchestra.py"))
    assert binary == f"{place.path}/.orchestra/bin/orchestra"
    assert stat.S_IMODE(os.stat(binary).st_mode) == 0o700
    first, *rest = Path(binary).read_text().splitlines()
    assert first == f"#!{BASE_PYTHON} -I"
    assert len(rest) == 2
    trap = place.folder / "trap"
    trap.mkdir()
    (trap / "json.py").write_text("1 / 0")
    (trap / "orchestra.py").write_text("1 / 0")
    done = place.run(binary, "--version", environ={"PYTHONPATH": str(trap)}, cwd=str(trap))
    assert done.stdout == f"orchestra {orchestra.__version__}\n", done
    assert list(Path(orchestra.installed_script_path(place.path)).parent.glob("__pycache__/orchestra.*.pyc"))


@pytest.mark.parametrize("home", ["h", "Ann & Zoë's home"])
def test_a_copy_of_another_name_installs_itself_and_is_no_longer_needed(place: Place, home: str) -> None:
    place.move_home(home)
    place.give_yaml()
    copy = place.folder / "downloaded (1).txt"
    copy.write_bytes(ORCHESTRA_PY)
    copy.chmod(0o444)
    link = place.folder / "o"
    link.symlink_to(copy)
    done = place.run(BASE_PYTHON, link, "self-install")
    assert (done.returncode, done.stdout, done.stderr) == (0, "installed ~/.local/bin/orchestra\n", "")
    copy.unlink()
    link.unlink()
    assert Path(orchestra.installed_script_path(place.path)).read_bytes() == ORCHESTRA_PY
    assert_works(place)


def assert_works(place: Place) -> None:
    """Show that what is installed does its work from any folder."""
    for argv in (("init", str(place.code), "-p", "demo", "--sync"), ("status", "--check")):
        done = place.orchestra(*argv)
        assert (done.returncode, done.stderr) == (0, ""), done
    assert (place.code / "CLAUDE.md").exists()


def test_installing_again_upgrades_in_place_even_from_the_installed_copy(place: Place) -> None:
    place.give_yaml()
    assert place.run(BASE_PYTHON, HERE / "orchestra.py", "self-install").returncode == 0
    newer = place.folder / "newer.py"
    newer.write_bytes(new_version())
    assert place.run(BASE_PYTHON, newer, "self-install").returncode == 0
    assert place.orchestra("--version").stdout == "orchestra 9.9.10\n"
    assert place.orchestra("self-install").returncode == 0
    assert place.orchestra("--version").stdout == "orchestra 9.9.10\n"
    assert [path for path in place.listing() if path.endswith(".tmp")] == []


def new_version() -> bytes:
    # Of another length: bytecode is cached by seconds and size.
    return re.sub(rb'(?m)^__version__ = ".*"', b'__version__ = "9.9.10"', ORCHESTRA_PY)


def test_a_script_that_is_no_file_cannot_be_installed(place: Place) -> None:
    with pytest.raises(orchestra.UsageError, match="expected the script's own file"):
        orchestra.install_program(place.path, BASE_PYTHON, str(place.folder))
    assert place.listing() == {}


def test_the_script_alone_in_an_empty_folder_under_another_name_works(place: Place) -> None:
    script = place.folder / "alone" / "tool"
    script.parent.mkdir()
    script.write_bytes(ORCHESTRA_PY)
    for argv in (["init", ".", "-p", "demo"], ["sync", "c"], ["status", "--check"], ["project", "list"]):
        done = place.run(sys.executable, script, *argv, cwd=place.code)
        assert (done.returncode, done.stderr) == (0, ""), done
    assert (place.code / "CLAUDE.md").exists()
    assert list(script.parent.iterdir()) == [script]


# PyYAML


def test_a_bare_python_fetches_pyyaml_once_and_says_so(place: Place, bare_python: str) -> None:
    need_pypi()
    argv = [bare_python, HERE / "orchestra.py", "init", place.code, "-p", "demo", "--sync"]
    first = place.run(*argv)
    assert (first.returncode, first.stderr) == (0, f"orchestra: fetching PyYAML into ~/.orchestra/lib/{PYTHON_XY}\n")
    assert (place.code / "CLAUDE.md").exists()
    second = place.run(*argv)
    assert (second.returncode, second.stderr) == (0, "")
    assert [path.name for path in (place.home / ".orchestra/lib").iterdir()] == [PYTHON_XY]


def test_two_first_runs_at_once_do_not_harm_each_other(place: Place, bare_python: str) -> None:
    need_pypi()
    argv = [bare_python, str(HERE / "orchestra.py"), "status", "--json"]
    options: dict[str, Any] = {
        "env": place.environ(),
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    runs = [subprocess.Popen(argv, stdin=subprocess.DEVNULL, **options) for _ in range(2)]
    said = [run.communicate(timeout=100) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert "".join(err for _, err in said).count("fetching PyYAML") == 1
    assert [path.name for path in (place.home / ".orchestra/lib").iterdir()] == [PYTHON_XY]


@pytest.mark.skipif(
    not os.path.exists("/usr/bin/python3")
    or subprocess.call(["/usr/bin/python3", "-c", "import yaml"], stderr=subprocess.DEVNULL) == 0
    or subprocess.call(["/usr/bin/python3", "-m", "pip", "--version"], stdout=subprocess.DEVNULL) != 0,
    reason="/usr/bin/python3 has PyYAML, or has no pip, or is not there",
)
def test_the_systems_own_python_fetches_pyyaml(place: Place) -> None:
    need_pypi()
    done = place.run("/usr/bin/python3", HERE / "orchestra.py", "status", "--json")
    assert done.returncode == 0, done
    assert len(done.stderr.splitlines()) == 1


def left_of_pyyaml(place: Place) -> list[str]:
    """Give what a first run left but the lock's file; pip's own things beside ~/.orchestra are none of ours."""
    return [path for path in place.listing() if path.startswith(".orchestra/lib/")]


def test_pyyaml_is_not_fetched_where_that_is_forbidden(place: Place, bare_python: str) -> None:
    done = place.run(bare_python, HERE / "orchestra.py", "status", environ={"ORCHESTRA_NO_FETCH": "1"})
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert re.match(r"orchestra: PyYAML: expected it in .*, found none, and ORCHESTRA_NO_FETCH is set$", lines[0])
    assert "pip install PyYAML" in lines[1]
    assert len(lines) == 2
    assert place.listing() == {}


def test_pyyaml_fetched_before_serves_where_fetching_is_forbidden(place: Place, bare_python: str) -> None:
    place.give_yaml()
    environ = {"ORCHESTRA_NO_FETCH": "1"}
    done = place.run(bare_python, HERE / "orchestra.py", "status", "--json", environ=environ)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_upgrade_fetches_nothing_where_pyyaml_was_fetched_before(place: Place) -> None:
    place.give_yaml()
    told: list[str] = []
    orchestra.fetch_yaml(place.path, sys.executable, {"ORCHESTRA_NO_FETCH": "1"}, told.append, no_program)
    assert told == []


def no_program(argv: Sequence[str], timeout: float) -> orchestra.Completed:
    raise AssertionError(argv)


@pytest.mark.parametrize(
    ("done", "reason"),
    [
        (orchestra.Completed(1, "WARNING: x\nERROR: No matching distribution"), "ERROR: No matching distribution"),
        (orchestra.Completed(1, ""), "exit status 1"),
        (orchestra.Completed(orchestra.TIMED_OUT, "no answer within 300 s"), "no answer within 300 s"),
        (orchestra.Completed(1, "/x/python: No module named pip"), "No module named pip"),
        (orchestra.Completed(0, "did nothing"), "did nothing"),
    ],
)
def test_a_failing_pip_leaves_nothing_half_installed(place: Place, done: orchestra.Completed, reason: str) -> None:
    told: list[str] = []

    def run(argv: Sequence[str], timeout: float) -> orchestra.Completed:
        target = Path(argv[argv.index("--target") + 1])
        (target / "half").mkdir(parents=True)
        return done

    with pytest.raises(orchestra.OrchestraError, match=r"^PyYAML: expected pip to fetch it, got: ") as caught:
        orchestra.fetch_yaml(place.path, "/x/python", {}, told.append, run)
    assert str(caught.value).endswith(reason)
    assert "/x/python -m pip install PyYAML" in caught.value.hint
    assert told == [f"orchestra: fetching PyYAML into ~/.orchestra/lib/{PYTHON_XY}"]
    assert left_of_pyyaml(place) == []


def test_an_interrupted_pip_leaves_nothing_half_installed(place: Place) -> None:
    def run(argv: Sequence[str], timeout: float) -> orchestra.Completed:
        Path(argv[argv.index("--target") + 1], "half").mkdir(parents=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        orchestra.fetch_yaml(place.path, "/x/python", {}, lambda text: None, run)
    assert left_of_pyyaml(place) == []


@pytest.mark.parametrize(
    "environ", [{"PIP_NO_INDEX": "1"}, {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0"}]
)
def test_pip_hears_the_users_own_settings_and_failing_leaves_nothing(
    place: Place, bare_python: str, environ: dict[str, str]
) -> None:
    need_pypi()
    nothing_else = {"PIP_FIND_LINKS": None, "PIP_EXTRA_INDEX_URL": None, "PIP_CONFIG_FILE": os.devnull}
    done = place.run(bare_python, HERE / "orchestra.py", "status", environ={**nothing_else, **environ})
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected pip to fetch it" in done.stderr
    assert "Traceback" not in done.stderr
    assert left_of_pyyaml(place) == []


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["--version"], ["daemon", "status"], ["daemon", "stop"], ["daemon", "logs"], ["sync", "--help"]],
)
def test_what_reads_no_registry_needs_no_pyyaml(place: Place, bare_python: str, argv: list[str]) -> None:
    done = place.run(bare_python, HERE / "orchestra.py", *argv, environ={"ORCHESTRA_NO_FETCH": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert place.listing() == {}


# Pythons that are too old


def old_python() -> str:
    found = Path.home() / ".pyenv/versions/3.8.18/bin/python"
    if not found.exists():
        pytest.skip("no Python 3.8 here")
    return str(found)


@pytest.mark.parametrize("argv", [["--version"], ["sync", "--all"], []])
def test_on_python_3_8_one_clear_line_is_said(place: Place, argv: list[str]) -> None:
    done = place.run(old_python(), HERE / "orchestra.py", *argv)
    assert (done.returncode, done.stdout) == (2, "")
    expected = "orchestra: expected Python 3.9 or newer on macOS or Linux, got Python 3.8 on"
    assert done.stderr == f"{expected} {sys.platform}\n"


# Tools that read the PEP 723 header


@pytest.mark.parametrize("tool", [["uv", "run", "--python", BASE_PYTHON], ["pipx", "run"]], ids=["uv", "pipx"])
def test_tools_that_read_the_header_run_the_script(place: Place, tool: list[str]) -> None:
    program = shutil.which(tool[0])
    if not program:
        pytest.skip(f"no {tool[0]} here")
    need_pypi()
    shutil.copy(HERE / "orchestra.py", place.folder)
    for argv in (["--version"], ["status", "--json"]):
        done = place.run(program, *tool[1:], "./orchestra.py", *argv, cwd=place.folder)
        assert done.returncode == 0, done
        assert "fetching PyYAML" not in done.stderr


# install.sh

every_shell = pytest.mark.parametrize("shell", [name for name in SHELLS if name != "sh"])


def assert_refused(done: Any, *words: str) -> None:
    """Show that install.sh said in one line why not."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("install.sh: "), done
    for word in words:
        assert word in last


@every_shell
def test_install_sh_from_a_checkout_leaves_a_working_program(place: Place, shell: str) -> None:
    place.move_home("home of Ann" if shell == "dash" else "h2")
    place.give_yaml()
    done = place.install(shell)
    assert (done.returncode, done.stderr) == (0, ""), done
    lines = done.stdout.splitlines()
    assert lines[0] == "installed ~/.local/bin/orchestra"
    assert lines[1] == f"orchestra {orchestra.__version__}, with {BASE_PYTHON}"
    assert [line for line in lines if line.startswith("next:  orchestra init")]
    assert Path(orchestra.binary_path(place.path)).read_text().startswith(f"#!{BASE_PYTHON} -I\n")
    assert os.readlink(orchestra.link_path(place.path)) == orchestra.binary_path(place.path)
    assert sorted(os.listdir(place.home / ".orchestra/lib")) == ["orchestra.py", PYTHON_XY]
    assert_works(place)


@every_shell
def test_install_sh_from_a_pipe_leaves_a_working_program(place: Place, shell: str, server: Any) -> None:
    place.give_yaml()
    done = place.install(
        shell, url=server[0] + "/", environ={"ORCHESTRA_SHA256": hashlib.sha256(ORCHESTRA_PY).hexdigest()}
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    assert Path(orchestra.installed_script_path(place.path)).read_bytes() == ORCHESTRA_PY
    assert_works(place)


def test_install_sh_piped_from_curl_as_the_readme_says_fetches_all_it_needs(place: Place, server: Any) -> None:
    need_pypi()
    if not shutil.which("curl"):
        pytest.skip("no curl here")
    done = place.run("sh", "-c", f"curl -fsSL {server[0]}/install.sh | ORCHESTRA_URL={server[0]} sh")
    assert done.returncode == 0, done
    assert_works(place)


def test_install_sh_upgrades_in_place_while_a_daemon_runs(place: Place, server: Any) -> None:
    place.give_yaml()
    url, folder = server
    assert place.install(url=url).returncode == 0
    register(place)
    (folder / "orchestra.py").write_bytes(new_version())
    with place.daemon() as daemon:
        done = place.install(url=url)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert place.orchestra("--version").stdout == "orchestra 9.9.10\n"
        assert place.answers()
        assert place.orchestra("daemon", "stop").returncode == 0
        assert daemon.wait(20) == 0
    assert (place.code / "CLAUDE.md").exists()


def cut_points(count: int) -> list[int]:
    """Give places all over the script, and all those of its last line and the one above it."""
    size = len(ORCHESTRA_PY)
    return sorted(
        {0, 1, 20, *(size * number // count for number in range(1, count)), size - 1, size - 2, size - 53, size - 54}
    )


def test_a_download_cut_short_changes_nothing(place: Place, server: Any) -> None:
    url, folder = server
    before = place.listing()
    for end in cut_points(8):
        (folder / "orchestra.py").write_bytes(ORCHESTRA_PY[:end])
        done = place.install(url=url)
        assert_refused(done, "expected the whole script")
        assert place.listing() == before, end


def test_a_download_cut_short_leaves_an_earlier_install_as_it_was(place: Place, server: Any) -> None:
    url, folder = server
    place.give_yaml()
    assert place.install(url=url).returncode == 0
    before = place.listing()
    for end in (len(ORCHESTRA_PY) - 1, len(ORCHESTRA_PY) // 2):
        (folder / "orchestra.py").write_bytes(ORCHESTRA_PY[:end])
        assert_refused(place.install(url=url), "expected the whole script")
        assert place.listing() == before


def check_of_cuts(place: Place, ends: Sequence[int]) -> list[int]:
    """Call install.sh's own check on the script cut at many places; give the cuts that it lets pass."""
    functions = INSTALLER.read_text().rsplit('{ main "$@"; }', 1)[0]
    check = f"{functions}\ncd {shlex.quote(str(place.folder))}\nORCHESTRA_SHA256=\nwhile read -r end; do\n"
    check += 'head -c "$end" whole >cut\n(check_script cut) 2>/dev/null && echo "$end"\ndone\nexit 0\n'
    (place.folder / "whole").write_bytes(ORCHESTRA_PY)
    script = place.folder / "check.sh"
    script.write_text(check)
    done = subprocess.run(
        ["sh", script], input="".join(f"{end}\n" for end in ends), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [int(end) for end in done.stdout.split()]


def test_no_cut_of_the_scripts_last_200_bytes_passes_the_check(place: Place) -> None:
    size = len(ORCHESTRA_PY)
    assert check_of_cuts(place, range(size - 200, size + 1)) == [size]


@pytest.mark.soak
def test_no_cut_of_the_script_at_all_passes_the_check(place: Place) -> None:
    size = len(ORCHESTRA_PY)
    assert check_of_cuts(place, range(size + 1)) == [size]


def runs_something(place: Place, shell: str, text: bytes) -> bool:
    """Say whether a (part of) install.sh from a pipe does anything: looking for a Python is the first."""
    mark = place.folder / "ran"
    python = place.folder / "tools/python"
    if not python.exists():
        place.make_tool("python", f"echo x >{shlex.quote(str(mark))}\nexit 1")
    environ = place.environ(ORCHESTRA_PYTHON=str(python), PATH=str(place.tools), ORCHESTRA_URL="http://127.0.0.1:9")
    subprocess.run(
        find_shell(shell), input=text, env=environ, cwd=place.code, capture_output=True, check=False, timeout=20
    )
    return mark.exists()


@every_shell
def test_install_sh_cut_short_runs_nothing(place: Place, shell: str) -> None:
    text = INSTALLER.read_bytes()
    last = 200 if shell == "dash" else 40
    # Without only the final line end it is whole.
    for end in (*range(0, len(text) - last, 211), *range(len(text) - last, len(text) - 1)):
        assert not runs_something(place, shell, text[:end]), end
    assert (place.listing(), list(place.code.iterdir())) == ({}, [])
    assert runs_something(place, shell, text)


@pytest.mark.soak
@every_shell
def test_install_sh_cut_short_anywhere_runs_nothing(place: Place, shell: str) -> None:
    text = INSTALLER.read_bytes()
    for end in range(len(text) - 1):
        assert not runs_something(place, shell, text[:end]), end
    assert (place.listing(), list(place.code.iterdir())) == ({}, [])


def test_install_sh_refuses_a_script_of_another_checksum(place: Place, server: Any) -> None:
    for sums in ("0" * 64, hashlib.sha256(ORCHESTRA_PY).hexdigest()[:-1], "sha256"):
        done = place.install(url=server[0], environ={"ORCHESTRA_SHA256": sums})
        assert_refused(done, f"expected SHA-256 {sums}, got {hashlib.sha256(ORCHESTRA_PY).hexdigest()}")
        assert place.listing() == {}


def test_install_sh_refuses_a_page_instead_of_the_script(place: Place, server: Any) -> None:
    url, folder = server
    (folder / "orchestra.py").write_text("<!DOCTYPE html>\n<title>Sign in to the network</title>\n")
    assert_refused(place.install(url=url), "expected the whole script, got something else")
    assert place.listing() == {}


def test_install_sh_refuses_a_script_that_does_not_start(place: Place, server: Any) -> None:
    url, folder = server
    (folder / "orchestra.py").write_bytes(b"1 / 0\n# The last line: install.sh takes no copy without it.\n")
    done = place.install(url=url)
    assert done.returncode == 2
    assert "expected it to start, got: " in done.stderr
    assert place.listing() == {}


def test_install_sh_says_so_when_the_script_is_not_there(place: Place, server: Any) -> None:
    url, folder = server
    (folder / "orchestra.py").unlink()
    assert_refused(place.install(url=url), f"{url}/orchestra.py: expected to download it, could not")
    assert_refused(place.install(url="http://127.0.0.1:9"), "http://127.0.0.1:9/orchestra.py")
    assert_refused(place.install(url=""), "ORCHESTRA_URL: expected the address of a folder")
    assert place.listing() == {}


def test_install_sh_without_python_says_which_it_wants(place: Place) -> None:
    path = place.only_tools()
    done = place.install(environ={"PATH": path, "ORCHESTRA_PYTHON": None})
    assert_refused(done, "python3: expected Python 3.9 or newer on PATH, found none")
    assert place.listing() == {}


@pytest.mark.parametrize("kind", ["real", "stand-in"])
def test_install_sh_with_only_python_3_8_says_which_it_wants(place: Place, kind: str) -> None:
    path = place.only_tools()
    if kind == "real":
        (place.folder / "only/python3").symlink_to(old_python())
    else:
        place.make_tool("python3", '[ "$1" = --version ] || exit 1\necho Python 3.8.10', "only")
    done = place.install(environ={"PATH": path, "ORCHESTRA_PYTHON": None})
    assert_refused(done, "expected Python 3.9 or newer on PATH, found Python 3.8.")
    assert place.listing() == {}


def test_install_sh_takes_a_newer_python_beside_an_old_python3(place: Place) -> None:
    place.give_yaml()
    path = place.only_tools()
    place.make_tool("python3", '[ "$1" = --version ] || exit 1\necho Python 3.8.10', "only")
    if sys.version_info >= (3, 14):
        pytest.skip("install.sh looks for names up to python3.13")
    place.make_tool(PYTHON_XY, f'exec "{BASE_PYTHON}" "$@"', "only")
    done = place.install(environ={"PATH": path, "ORCHESTRA_PYTHON": None})
    assert done.returncode == 0, done
    assert_works(place)


def test_install_sh_does_not_take_another_python_than_the_one_asked_for(place: Place) -> None:
    place.give_yaml()
    done = place.install(environ={"ORCHESTRA_PYTHON": "/nowhere/python3"})
    assert_refused(done, "/nowhere/python3")


@pytest.mark.parametrize("has", ["wget", "neither"])
def test_install_sh_downloads_with_wget_where_there_is_no_curl(place: Place, server: Any, has: str) -> None:
    if has == "wget" and not shutil.which("wget"):
        pytest.skip("no wget here")
    place.give_yaml()
    before = place.listing()
    environ = {"PATH": place.only_tools(has), "ORCHESTRA_PYTHON": BASE_PYTHON, "ORCHESTRA_URL": server[0]}
    done = place.run("/bin/sh", input=INSTALLER.read_text(), environ=environ)
    if has == "wget":
        assert (done.returncode, done.stderr) == (0, ""), done
        assert_works(place)
    else:
        assert done.returncode == 2
        assert "install.sh: wget: expected it on PATH, found none" in done.stderr
        assert place.listing() == before


@pytest.mark.parametrize("what", ["home", "local"])
def test_install_sh_into_a_folder_that_cannot_be_written_changes_nothing(place: Place, what: str) -> None:
    place.give_yaml()
    (place.home / ".local").mkdir()
    options: dict[str, Any] = {}
    python = BASE_PYTHON
    if os.geteuid() == 0:
        options = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        for path in (place.folder, place.home, *place.home.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        candidates = [BASE_PYTHON, "/usr/bin/python3", "/usr/local/bin/python3"]
        python = next((path for path in candidates if is_for_nobody(path)), "")
        if not python:
            pytest.skip("no Python here that another user may run")
    shutil.copy(INSTALLER, place.folder)
    shutil.copy(HERE / "orchestra.py", place.folder)
    if what == "home":
        shutil.rmtree(place.home / ".orchestra")
    blocked = place.home if what == "home" else place.home / ".local"
    before = place.listing()
    blocked.chmod(0o555)
    environ = {"ORCHESTRA_PYTHON": python, "PATH": f"{place.tools}:{SHORT_PATH}"}
    done = place.run("/bin/sh", place.folder / "install.sh", environ=environ, **options)
    blocked.chmod(0o755)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert "expected " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert place.listing() == before


def is_for_nobody(python: str) -> bool:
    try:
        return (
            subprocess.call([python, "-I", "-c", "import sys; sys.exit(sys.version_info < (3, 9))"], user=NOBODY) == 0
        )
    except OSError:
        return False


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_install_sh_leaves_another_programs_file_alone(place: Place, kind: str) -> None:
    link = Path(orchestra.link_path(place.path))
    link.parent.mkdir(parents=True)
    if kind == "file":
        link.write_text("another orchestra")
    elif kind == "link":
        link.symlink_to("/opt/another")
    else:
        link.mkdir()
    before = place.listing()
    done = place.install()
    assert done.returncode == 2
    assert "expected nothing or Orchestra's link, found something else" in done.stderr
    assert place.listing() == before
    assert place.install("sh", "--uninstall").returncode == 0
    assert place.listing() == before


@every_shell
def test_uninstalling_leaves_the_registry_and_the_backups(place: Place, shell: str) -> None:
    place.give_yaml()
    assert place.install(shell).returncode == 0
    (place.code / "CLAUDE.md").write_text("by hand\n")
    assert_works(place)
    backups = place.home / ".orchestra/backups"
    backups.mkdir(exist_ok=True)
    with place.daemon() as daemon:
        done = place.install(shell, "--uninstall")
        assert (done.returncode, done.stderr) == (0, ""), done
        assert daemon.wait(20) == 0
    assert done.stdout.splitlines()[-1] == "uninstalled"
    assert sorted(os.listdir(place.home / ".orchestra")) == ["backups", "projects"]
    assert not os.path.lexists(orchestra.link_path(place.path))
    assert (place.code / "CLAUDE.md").exists()


def test_uninstalling_what_is_not_there_is_fine(place: Place) -> None:
    done = place.install("sh", "--uninstall")
    assert (done.returncode, done.stdout, done.stderr) == (0, "uninstalled\n", "")
    assert place.listing() == {}


def test_uninstalling_works_when_the_python_is_gone(place: Place) -> None:
    place.give_yaml()
    python = place.folder / "gone"
    python.symlink_to(BASE_PYTHON)
    orchestra.install_program(place.path, str(python), str(HERE / "orchestra.py"))
    python.unlink()
    done = place.install("sh", "--uninstall")
    assert done.returncode == 0, done
    assert not os.path.exists(place.home / ".orchestra")


@every_shell
def test_install_sh_refuses_what_it_does_not_know(place: Place, shell: str) -> None:
    for word in ("--help-me", "uninstall", "-x"):
        assert_refused(place.install(shell, word), f"{word}: expected nothing or --uninstall")
    assert_refused(place.install(shell, environ={"HOME": None}), "HOME: expected an absolute path, got ''")
    assert_refused(place.install(shell, environ={"HOME": "here"}), "HOME: expected an absolute path, got 'here'")
    assert place.listing() == {}


@pytest.mark.skipif(sys.platform == "darwin", reason="launchd is here")
def test_install_sh_has_launchd_run_the_daemon_on_macos(place: Place) -> None:
    place.give_yaml()
    place.make_tool("uname", "echo Darwin")
    done = place.install()
    # The script knows better where it runs.
    assert done.returncode == 2
    assert "orchestra: launchd error: launchd management is only supported on macOS" in done.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here")
def test_shellcheck_finds_nothing_in_install_sh(place: Place) -> None:
    done = place.run("shellcheck", INSTALLER)
    assert (done.returncode, done.stdout) == (0, "")


# ── 13 Commands ───────────────────────────────────────────────────────────────


def test_init_registers_detects_and_syncs(home: Home) -> None:
    put_files(home.code, {"web/package.json": package_json(dependencies={"react": "18"}), "web/GEMINI.md": "mine\n"})
    ran = home.run_fine("init", str(home.code / "web"), "-p", "shop", "--sync")
    assert ran.out.splitlines() == [
        "registered shop/web: frontend (react in package.json)",
        "  targets: gemini (found there)",
        "  edit:    ~/.orchestra/projects/shop/web.yaml",
        "append   shop/web GEMINI.md",
        "1 written, 0 unchanged in 1 codebase",
    ]
    values = yaml.load(Path(orchestra.codebase_path(home.path, ("shop", "web"))).read_bytes(), Loader=yaml.BaseLoader)
    assert values["path"] == f"{home.code}/web" and values["targets"] == ["gemini"]
    assert values["projects"] == [{"name": "web", "project_type": "frontend"}]
    assert Path(orchestra.project_path(home.path, "shop")).exists()


def test_init_again_changes_nothing(home: Home) -> None:
    home.run_fine("init", str(home.code), "-p", "shop")
    before = tree(home.folder)
    assert "is registered already" in home.run_fine("init", f"{home.code}/../code/", "-p", "shop").out
    assert {path: data for path, (_, _, data) in before.items()} == contents(home.folder)


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
    assert ran.status == 2 and "the name is taken" in ran.err and "--name ANOTHER_NAME" in ran.err
    home.run_fine("init", str(home.code / "b/api"), "-p", "shop", "--name", "api2")
    assert home.registry().keys == [("shop", "api"), ("shop", "api2")]


def test_init_of_a_folder_registered_under_another_name_is_refused(home: Home) -> None:
    root = home.make_codebase("shop/api")
    (home.code / "link").symlink_to(root)
    for path in (root, home.code / "link"):
        ran = home.run("init", str(path), "-p", "blog", "--name", "other")
        assert ran.status == 2 and "got the folder of shop/api" in ran.err
    assert home.registry().keys == [("shop", "api")]


@pytest.mark.parametrize(("content", "found"), [("x", "a file"), (link_to("nowhere"), "none"), ("", "none")])
def test_init_needs_a_folder(home: Home, content: Any, found: str) -> None:
    if content:
        put_files(home.code, {"x": content})
    ran = home.run("init", str(home.code / "x"), "-p", "shop")
    assert ran.status == 2 and ran.complaints == [f"orchestra: {home.code}/x: expected a folder, found {found}"]
    assert not os.path.exists(orchestra.orchestra_root(home.path))


def test_a_relative_path_is_registered_as_an_absolute_one(home: Home, monkeypatch: Any) -> None:
    (home.code / "api").mkdir()
    monkeypatch.chdir(home.code)
    home.run_fine("init", "api", "-p", "shop")
    home.run_fine("project", "add", "web", "--path", ".")
    assert [codebase.path for codebase in orchestra.list_codebases(home.path)] == [f"{home.code}/api", str(home.code)]


def test_init_takes_the_targets_its_project_names(home: Home) -> None:
    home.write_registry("shop/project.yaml", "name: shop\ntargets: [gemini]\n")
    ran = home.run_fine("init", str(home.code), "-p", "shop", "--sync")
    assert "targets: gemini (as project.yaml says)" in ran.out
    assert os.listdir(home.code) == ["GEMINI.md"]


def test_project_add_registers_a_folder_below_the_current_one(home: Home, monkeypatch: Any) -> None:
    (home.code / "api").mkdir()
    monkeypatch.chdir(home.code)
    home.run_fine("project", "add", "api", "-t", "ml")
    home.run_fine("project", "add", "all", "-p", "shop", "--path", str(home.code))
    assert json.loads(home.run_fine("project", "list", "--json").out) == [
        {
            "project": "api",
            "codebase": "api",
            "path": f"{home.code}/api",
            "project_types": ["ml"],
            "targets": ["claude", "codex"],
        },
        {
            "project": "shop",
            "codebase": "all",
            "path": str(home.code),
            "project_types": ["backend"],
            "targets": ["claude", "codex"],
        },
    ]
    assert home.run("project", "add", "nowhere").status == 2


def test_project_list_as_a_table(home: Home) -> None:
    assert home.run_fine("project", "list").err.startswith("no codebases yet\n  try: orchestra init ")
    home.make_codebase("shop/api", projects=[{"name": "api", "project_type": "ml"}])
    home.register("shop/near", path="~/near")
    assert home.run_fine("project", "list").out.splitlines() == [
        "CODEBASE   TYPE  PATH",
        f"shop/api   ml    {home.code}/shop/api",
        "shop/near        ~/near",
    ]


def test_project_remove_deregisters_and_keeps_the_file(home: Home) -> None:
    root = home.make_codebase()
    home.sync()
    before, file = contents(root), home.register().read_bytes()
    ran = home.run_fine("project", "remove", "api")
    assert contents(root) == before and home.registry().keys == []
    kept = re.search(r"kept as ~(/\S+)", ran.out)
    assert kept and Path(home.path + kept[1]).read_bytes() == file
    assert home.run("project", "remove", "api").status == 2


def test_a_broken_codebase_can_be_removed_but_not_purged(home: Home) -> None:
    home.write_registry("shop/api.yaml", "{")
    assert home.run("project", "remove", "api", "--purge").status == 2
    assert home.run("project", "remove", "api").status == 0
    assert home.registry().keys == []


def test_a_codebase_registered_again_after_a_removal_is_current(home: Home) -> None:
    root = home.make_codebase()
    home.sync()
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
        assert (ran.status, ran.complaints) == (2, ["orchestra: codebase api: expected one, got 2: blog/api, shop/api"])
    assert home.sync("blog/api").lines == ["replace  blog/api CLAUDE.md"]
    assert home.backups("shop/api") == {} and home.backups("blog/api") == {"CLAUDE.md": edited}
    home.run_fine("project", "remove", "blog/api", "--purge")
    assert contents(home.code / "blog") == {} and home.status_of("shop/api") == "current"
    assert home.sync("api").lines == []


def test_sync_without_a_name_is_for_the_current_folder(home: Home, monkeypatch: Any) -> None:
    root = home.make_codebase("shop/api", {"src/a.py": ""})
    home.make_codebase("shop/web")
    for folder in (root, root / "src"):
        monkeypatch.chdir(folder)
        assert all(" shop/api " in line for line in home.sync("--dry-run").lines)
    monkeypatch.chdir(home.code)
    ran = home.run("sync")
    assert ran.status == 2 and "orchestra sync --all" in ran.err


def test_sync_in_a_codebase_within_a_codebase_is_for_the_inner(home: Home, monkeypatch: Any) -> None:
    home.make_codebase("shop/all")
    inner = home.make_codebase("shop/all/inner")
    os.unlink(orchestra.codebase_path(home.path, ("shop", "all/inner")))
    home.register("shop/inner", path=str(inner))
    monkeypatch.chdir(inner)
    assert all(" shop/inner " in line for line in home.sync("--dry-run").lines)


@pytest.mark.parametrize(
    "argv", [["sync", "api", "--all"], ["sync", "nope"], ["diff", "nope"], ["edit", "nope"], ["restore", "nope"]]
)
def test_what_cannot_be_done_is_exit_status_2(home: Home, argv: list[str]) -> None:
    home.make_codebase()
    ran = home.run(*argv)
    assert ran.status == 2 and len(ran.complaints) == 1 and ran.out == ""


@pytest.mark.parametrize(
    "argv", [[], ["nope"], ["init"], ["init", "x"], ["sync", "--nope"], ["init", ".", "-p", "x", "-t", "cloud"]]
)
def test_a_wrong_command_line_is_exit_status_2_and_says_how(home: Home, argv: list[str]) -> None:
    ran = home.run(*argv)
    assert ran.status == 2 and ran.err.startswith("usage: orchestra") and contents(home.folder) == {}


def test_help_begins_with_the_purpose(home: Home) -> None:
    purpose = (orchestra.__doc__ or "").splitlines()[0]
    assert purpose in " ".join(home.run_fine("--help").out.split())
    assert home.run_fine("--version").out == f"orchestra {orchestra.__version__}\n"


@pytest.mark.parametrize("environ", [{}, {"HOME": ""}, {"HOME": "relative/home"}])
def test_a_home_that_is_none_is_one_line(home: Home, environ: dict[str, str]) -> None:
    home.environ = environ
    ran = home.run("status")
    assert ran.status == 2 and ran.complaints[0].startswith("orchestra: HOME: expected an absolute path, got ")


def test_a_file_in_place_of_orchestras_folder_is_one_line(home: Home) -> None:
    Path(home.path, ".orchestra").write_text("")
    ran = home.run("init", str(home.code), "-p", "shop")
    assert ran.status == 2 and len(ran.complaints) == 1


@pytest.mark.parametrize(("code", "status", "said"), [("pass", 0, ""), ("raise SystemExit(3)", 2, "exit status 3")])
def test_edit_opens_the_editor_and_checks_the_file(home: Home, code: str, status: int, said: str) -> None:
    home.make_codebase()
    editor = home.code / "my editor.py"
    editor.write_text(f"import sys\nopen({str(home.code / 'seen')!r}, 'w').write(sys.argv[-1])\n{code}\n")
    home.environ.update(VISUAL="", EDITOR=f"{sys.executable} '{editor}' --wait")
    ran = home.run("edit", "api")
    assert ran.status == status and said in ran.err
    assert (home.code / "seen").read_text() == orchestra.codebase_path(home.path, ("shop", "api"))


def test_edit_tells_what_was_broken(home: Home) -> None:
    home.make_codebase()
    editor = home.code / "editor.py"
    editor.write_text("import sys\nopen(sys.argv[1], 'a').write('tasks: [\\n')\n")
    home.environ["VISUAL"] = f"{sys.executable} {editor}"
    ran = home.run("edit", "api")
    assert ran.status == 2 and re.match(r"orchestra: ~/.*/api.yaml:\d: yaml: expected valid YAML", ran.err)
    home.environ["VISUAL"] = "/no/such/editor"
    assert "expected a program" in home.run("edit", "api").err
    home.environ["VISUAL"] = "'unclosed"
    assert home.run("edit", "api").status == 2


def test_the_script_runs_by_itself(home: Home) -> None:
    (home.code / "api").mkdir()
    ran = home.run_script("init", ".", "-p", "shop", "--sync", cwd=home.code / "api")
    assert (ran.status, ran.err) == (0, "")
    assert home.run_script("sync", cwd=home.code / "api").out == "0 written, 2 unchanged in 1 codebase\n"
    assert home.run_script("sync", "--check", "--all").status == 0
    home.register("shop/api", path=str(home.code / "api"), description="new")
    assert home.run_script("sync", "--check", "--all").status == 1
    assert home.run_script("status", "--check").status == 1
    assert home.run_script("diff", "api", "--exit-code").status == 1
    assert home.run_script("sync", "nope").status == 2


def test_output_in_a_pipe_is_plain(home: Home) -> None:
    home.make_codebase()
    assert "\033" not in home.run_script("status").out


@pytest.mark.parametrize("argv", [["project", "list"], ["status", "--json"], ["diff", "c0"]])
def test_a_reader_that_has_gone_is_no_traceback(home: Home, argv: list[str]) -> None:
    for i in range(30):
        home.make_codebase(f"shop/c{i}", notes=["long " * 2000])
    reader, writer = os.pipe()
    os.close(reader)
    process = home.start(*argv, stdout=writer)
    os.close(writer)
    assert finish(process).err == ""


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
def test_an_output_that_takes_nothing_is_no_traceback(home: Home, redirection: str) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    home.make_codebase()
    command = f'exec "$0" "$1" project list {redirection}'
    process = subprocess.run(
        ["/bin/sh", "-c", command, sys.executable, str(SCRIPT)],
        env={**os.environ, "HOME": home.path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in process.stderr
    assert (process.returncode, process.stderr.count("\n")) == ((2, 1) if "full" in redirection else (0, 0))


def test_an_output_that_cannot_spell_it_is_no_traceback(home: Home) -> None:
    home.make_codebase("shop/api", description="日本")
    assert "Traceback" not in home.run_script("diff", "api", environ={"PYTHONIOENCODING": "ascii"}).err


@pytest.mark.parametrize("argv", [["sync"], ["init", ".", "-p", "shop"], ["project", "add", "x"]])
def test_a_current_folder_that_is_gone_is_one_line(home: Home, argv: list[str]) -> None:
    gone = home.code / "gone"
    gone.mkdir()
    script = "import os, sys; os.rmdir(os.getcwd()); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    process = subprocess.run(
        [sys.executable, "-c", script, str(SCRIPT), *argv],
        cwd=gone,
        env={**os.environ, "HOME": home.path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2 and "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "never"), (0, "0 s ago"), (59, "59 s ago"), (60, "1 min ago"), (7199, "1 h ago"), (172800, "2 d ago")],
)
def test_an_age_is_told_in_its_largest_unit(seconds: Optional[int], text: str) -> None:
    assert orchestra.format_age(seconds) == text


def test_progress_and_colour_are_for_terminals(home: Home, monkeypatch: Any) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert orchestra.paint("x", "31", {}) == "\033[31mx\033[0m"
    assert orchestra.paint("x", "31", {"NO_COLOR": ""}) == orchestra.paint("x", "31", {"TERM": "dumb"}) == "x"
    orchestra.show_progress(0, 21, ("shop", "api"))
    orchestra.show_progress(0, 20, ("shop", "web"))
    assert "1/21 shop/api" in err.getvalue() and "web" not in err.getvalue()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
