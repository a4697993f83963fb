"""Commands as processes of their own, with all that they start: what a user runs, and what a test kills."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

CODE = Path(__file__).parents[1]


def side_by_side(commands: Iterable[Sequence[object]], seconds: float = 600) -> list[int]:
    """Run commands at once, and return their exit codes; none is left behind, also if one of them stands still."""
    started = [subprocess.Popen([str(word) for word in command], cwd=CODE) for command in commands]
    end = time.monotonic() + seconds
    try:
        return [process.wait(timeout=max(0, end - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


def of_this_cluster() -> dict[str, str]:
    """What a process needs to join a cluster that this one has started: its token, if Ray has made one up."""
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}


def without_ray() -> dict[str, str]:
    """The environment, but for what Ray or MLflow have put into it."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 300) -> None:
    """Wait while a process, which must not end before, comes to a point."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()[-5000:]  # type: ignore[union-attr]
        assert time.monotonic() < end, "the moment to strike never came"
        time.sleep(0.02)


def with_word(word: bytes) -> Iterator[int]:
    """Yield the processes whose command line has a word in it."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if word in (entry / "cmdline").read_bytes():
                yield int(entry.name)


def of_session(session: int, word: bytes = b"") -> Iterator[int]:
    """Yield the processes of a session whose command line has a word in it."""
    for entry in Path("/proc").iterdir():
        try:
            stat = (entry / "stat").read_text() if entry.name.isdigit() else ""
            state, *_, its_session = stat.rsplit(")", 1)[1].split()[:4] if stat else ("", "-1")
            if int(its_session) == session and state != "Z" and word in (entry / "cmdline").read_bytes():
                yield int(entry.name)
        except OSError:
            continue


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL a process that began a session, and all that are in it: Ray's workers have process groups of their own,
    and would go on for a moment."""
    while found := list(of_session(process.pid)):
        for each in found:
            try:
                os.kill(each, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.poll()
        time.sleep(0.02)
    process.communicate()
