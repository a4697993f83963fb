"""The scripts of infra/local one by one, and what they have in common: what dies, what is another's, what is left."""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import free_ports, need_postgres
from tests.infra.tools import BIN, INFRA
from tests.processes import kill, of_session, wait_for

LOCAL = INFRA / "local"
OURS = {"s3.sh": "fsid", "mlflow.sh": "postgres.secret", "stack.sh": "ray-token"}


@dataclass
class Server:
    """A script with a folder and ports of its own."""

    script: str
    data: Path
    port: int
    asked: dict[str, str]
    """Its environment."""

    def run(self, command: str, code: int = 0, **others: str) -> str:
        where = [str(self.data), str(self.port)] if self.script != "stack.sh" else []
        asked = {"STACK_DATA": str(self.data), "STACK_BIN": str(BIN), "MLFLOW_BIN": str(BIN / "mlflow")}
        done = subprocess.run(
            [LOCAL / self.script, command, *where], env=asked | self.asked | others, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def names(self) -> set[str]:
        return {path.name for path in self.data.iterdir()}

    def processes(self) -> dict[int, str]:
        """Those that it has started, by their mark or by the folder in their command line, and that line."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if str(self.data).encode() in (entry / "environ").read_bytes() or str(self.data) in line:
                    found[int(entry.name)] = line
        return found

    def strike(self) -> None:
        """Kill them, and wait until they are dead."""
        struck = list(self.processes())
        for process in struck:
            os.kill(process, signal.SIGKILL)
        for process in struck:
            until_gone(process)


def until_gone(process: int) -> None:
    """Wait until nothing is left of a process that was killed but a zombie: its threads hold files and ports."""

    def alive() -> bool:
        first, *others = Path(f"/proc/{process}/task").glob("*/stat")
        return bool(others) or first.read_text().rpartition(")")[2].split()[0] not in "ZX"

    end = time.monotonic() + 120
    with suppress(OSError, ValueError):  # it is not there
        while alive():
            assert time.monotonic() < end, f"{process} does not die"
            time.sleep(0.02)


def plain() -> dict[str, str]:
    names = ("AWS_", "S3_", "MLFLOW_", "STACK_", "TMPDIR", "http_proxy", "no_proxy", "NO_PROXY")
    return {name: value for name, value in os.environ.items() if not name.startswith(names)}


@pytest.fixture
def s3_alone(tmp_path: Path) -> Iterator[Server]:
    server = Server("s3.sh", tmp_path / "a server", free_ports(13), plain())
    try:
        yield server
    finally:
        server.run("stop")


@pytest.fixture
def mlflow_alone(tmp_path: Path, s3_server: str) -> Iterator[Server]:
    need_postgres()
    storage = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    server = Server("mlflow.sh", tmp_path / "a server", free_ports(2), plain() | storage)
    try:
        yield server
    finally:
        server.run("stop")
        assert not server.processes()


@contextmanager
def listener(port: int = 0) -> Iterator[socket.socket]:
    """Whoever comes is let in and hears nothing."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        taken.setblocking(False)
        yield taken


def test_they_are_called_from_anywhere(tmp_path: Path) -> None:
    for script in ("stack.sh", "s3.sh", "mlflow.sh"):
        for called in (LOCAL / script, Path(os.path.relpath(LOCAL / script, tmp_path))):
            done = subprocess.run(["bash", called], cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 2 and f"{script} {{" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("script", OURS)
def test_a_folder_of_others_is_not_made_ours(tmp_path: Path, script: str) -> None:
    """It would be removed by `wipe`."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters").write_text("dear")
    missing = {"STACK_BIN": "/nowhere", "POSTGRES_BIN": "/nowhere", "DEBIAN_MIRROR": "file:///nowhere"}
    missing["XDG_CACHE_HOME"] = str(tmp_path)  # a script that goes on gets nowhere
    server = Server(script, tmp_path / "home", free_ports(13), plain() | missing)
    for command in ("up", "wipe"):
        assert "is not one of ours" in server.run(command, code=1)
        assert server.names() == {"letters"}


@pytest.mark.parametrize("script", OURS)
def test_of_ours_nothing_is_left(tmp_path: Path, script: str) -> None:
    server = Server(script, tmp_path / "a server", free_ports(13), plain())
    server.run("wipe")  # which is not there
    server.data.mkdir()
    for name in ("lock", OURS[script], "letters"):
        (server.data / name).write_text("")
    server.run("wipe")
    assert not server.data.exists()


def test_s3_has_a_folder_for_sockets_while_it_runs(s3_alone: Server, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    s3_alone.run("up", TMPDIR=str(here))
    (folder,) = here.iterdir()
    s3_alone.run("up", TMPDIR=str(there))
    assert not list(there.iterdir()), "while it runs it is where it was begun"
    s3_alone.run("stop")
    assert not list(here.iterdir()) and "run" not in s3_alone.names()

    folder.symlink_to(tmp_path)  # as anybody can in /tmp
    assert "is another's: give another TMPDIR" in s3_alone.run("up", code=1, TMPDIR=str(here))
    s3_alone.run("up", TMPDIR=str(there))
    s3_alone.strike()
    shutil.rmtree(there)  # as when the machine was started anew, and TMPDIR was the session's
    s3_alone.run("up", TMPDIR=str(tmp_path))
    s3_alone.run("status")


def test_the_folder_for_sockets_is_of_who_started_last(s3_alone: Server, tmp_path: Path) -> None:
    (tmp_path / "sockets").mkdir()
    asked = s3_alone.asked | {"TMPDIR": str(tmp_path / "sockets")}
    s3_alone.run("up", **asked)
    s3_alone.strike()
    other = Server("s3.sh", tmp_path / "other", s3_alone.port, asked)
    try:
        other.run("up")
        s3_alone.run("stop")
        other.run("up")  # it finds its sockets
        assert len(list((tmp_path / "sockets").iterdir())) == 1
    finally:
        other.run("stop")
    assert not list((tmp_path / "sockets").iterdir())


@pytest.mark.parametrize("offset", [0, 1, 5])
def test_a_silent_port_is_anothers_too(s3_alone: Server, offset: int) -> None:
    with listener(s3_alone.port + offset):
        for command in ("check", "up"):
            assert f"port {s3_alone.port + offset} is another's" in s3_alone.run(command, code=1)
            assert not s3_alone.data.exists() or s3_alone.names() <= {"lock", "fsid"}
    assert not s3_alone.processes()


def test_no_proxy_is_asked(s3_alone: Server) -> None:
    with listener() as proxy:
        s3_alone.run("up", http_proxy=f"http://127.0.0.1:{proxy.getsockname()[1]}")
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_what_a_killed_mlflow_leaves_is_ended(mlflow_alone: Server) -> None:
    def strike() -> int:
        """Kill the first process; return the one that it leaves, which answers."""
        first = int((mlflow_alone.data / "server.pid").read_text())
        (left,) = [one for one, line in mlflow_alone.processes().items() if "uvicorn" in line and one != first]
        os.kill(first, signal.SIGKILL)
        until_gone(first)
        return left

    with listener() as proxy:
        asked = {"http_proxy": f"http://127.0.0.1:{proxy.getsockname()[1]}"}
        mlflow_alone.run("up", **asked)
        left = strike()
        assert "down" in mlflow_alone.run("status", code=1)
        mlflow_alone.run("check")  # it is not another's
        mlflow_alone.run("up", **asked)
        assert left not in mlflow_alone.processes() and "healthy" in mlflow_alone.run("status", **asked)
        with pytest.raises(BlockingIOError):
            proxy.accept()
    assert "down" in Server("mlflow.sh", mlflow_alone.data, mlflow_alone.port + 1, mlflow_alone.asked).run(
        "status", code=1
    )
    strike()
    (mlflow_alone.data / "server.pid").unlink()  # as if `up` had been interrupted before it was written
    mlflow_alone.run("wipe")
    assert not mlflow_alone.processes() and not mlflow_alone.data.exists()


# --- what they have in common -----------------------------------------------------------------------------------------


def shell(folder: Path, words: str) -> subprocess.Popen[str]:
    """Words in a script with a folder, after what all of them have in common."""
    head = f"set -euo pipefail\nCOMMAND=up DATA={folder} OURS=ours\n. {LOCAL}/common.sh\n"
    return subprocess.Popen(
        ["bash", "-c", head + words], env=plain(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def test_who_waited_for_a_lock_that_was_wiped_holds_the_new_one(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiter = shell(tmp_path, 'work() { touch "$DATA/begun"; sleep 600; }; alone work')
        try:
            wait_for(lambda: any(of_session(waiter.pid, b"flock")), waiter)
            lock.unlink()
            assert not (tmp_path / "begun").exists()
            fcntl.flock(file, fcntl.LOCK_UN)
            wait_for((tmp_path / "begun").exists, waiter)
            with lock.open("w") as third, pytest.raises(BlockingIOError):
                fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            kill(waiter)


def test_who_waited_to_stop_what_was_wiped_has_nothing_to_do(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiter = shell(tmp_path / "data", "COMMAND=stop; work() { echo worked; }; alone work")
        try:
            wait_for(lambda: any(of_session(waiter.pid, b"flock")), waiter)
            shutil.rmtree(tmp_path / "data")
            fcntl.flock(file, fcntl.LOCK_UN)
            assert waiter.communicate() == ("", "") and waiter.returncode == 0
            assert not (tmp_path / "data").exists()
        finally:
            kill(waiter)


def test_who_is_not_a_program_yet_is_waited_for(tmp_path: Path) -> None:
    """A child that has not come as far as its program is known by nothing yet. This one waits until its log is read."""
    (tmp_path / "log").mkdir()
    os.mkfifo(tmp_path / "log" / "one.out")
    words = """
        answers() { touch "$DATA/asked"; alive one && [ -e "$DATA/answers" ]; }
        spawn one sh -c 'echo it runs; touch "$DATA/answers"; sleep 600'
        await one answers
        end one TERM
        [ -z "$(names)" ]
        echo done
    """
    waiter = shell(tmp_path, "export DATA\n" + words)
    try:
        wait_for((tmp_path / "asked").exists, waiter, 60)
        (tmp_path / "asked").unlink()
        wait_for((tmp_path / "asked").exists, waiter, 60)
        assert (tmp_path / "log" / "one.out").read_text() == "it runs\n"  # until nobody has it open: it was ended
        assert waiter.communicate() == ("done\n", "") and waiter.returncode == 0
    finally:
        kill(waiter)


def test_who_dies_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    waiter = shell(tmp_path, "spawn one sh -c 'echo I cannot; exit 1'; await one false")
    try:
        _, said = waiter.communicate()
        assert waiter.returncode == 1 and "I cannot" in said and "one did not come up" in said
    finally:
        kill(waiter)


def test_all_that_one_has_started_is_ended(tmp_path: Path) -> None:
    """Be it in a session of its own, and be the number of the first one lost; but nobody else's."""
    (tmp_path / "log").mkdir()
    ours = Server("", tmp_path, 0, {})

    def sleepers() -> int:
        return sum(line.startswith("sleep") for line in ours.processes().values())

    others = subprocess.Popen(["sleep", "600"], env=plain() | {"BRICKYARD_LOCAL": f"{tmp_path}:one-more"})
    try:
        begin = shell(tmp_path, "spawn one sh -c 'setsid sleep 600 & sleep 600; true'; spawn two sleep 600; sleep 600")
        wait_for(lambda: sleepers() == 4, begin)
        kill(begin)
        (tmp_path / "one.pid").unlink()
        said, _ = shell(tmp_path, "names; end one TERM; names").communicate()
        assert said.split() == ["one", "one-more", "two", "one-more", "two"]
        assert sleepers() == 2
        said, _ = shell(tmp_path, "end two TERM; names").communicate()
        assert said.split() == ["one-more"] and set(ours.processes()) == {others.pid}
    finally:
        for process in ours.processes():
            os.kill(process, signal.SIGKILL)
        others.wait()
