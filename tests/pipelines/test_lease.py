"""One holder at a time, with processes that are really killed and stopped, on a disk and on a real S3 server."""

import json
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Timer

import pytest

from pipelines import lease as module
from pipelines.errors import TryAgainError
from pipelines.lease import hold
from pipelines.storage import Folder
from tests.faults.proxy import FaultProxy, Rule
from tests.processes import CODE, without_ray

LEASE_S, LONG_S = 6.0, 30.0
"""Six times what a holder takes to give a sign of life; the longer one where nobody has to be found dead, on a machine
where much else runs."""
PATIENCE_S = 300.0
"""For which a process may live that says nothing of what it is asked."""


@pytest.fixture(params=["on this machine", "on s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(str(tmp_path)) if request.param == "on this machine" else request.getfixturevalue("s3")


class Worker:
    """A process that wants the lease; its lines as they come."""

    def __init__(self, how: str, folder: Folder, lease_s: float) -> None:
        command = [sys.executable, CODE / "tests/pipelines/lease_worker.py", how, folder.url, str(lease_s)]
        self.process = subprocess.Popen(
            command, cwd=CODE, env=without_ray() | {"PYTHONPATH": str(CODE)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

        self._patience = Timer(PATIENCE_S, self.process.kill)
        self._patience.start()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._patience.cancel()
        self.process.kill()
        self.process.communicate()

    def hears(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def say(self, word: str) -> None:
        assert self.process.stdin
        print(word, file=self.process.stdin, flush=True)

    def end(self) -> int:
        self.say("end")
        return self.process.wait(60)


@pytest.fixture
def start(folder: Folder) -> Iterator[Callable[..., Worker]]:
    with ExitStack() as stack:
        yield lambda how, lease_s=LEASE_S: stack.enter_context(Worker(how, folder, lease_s))


def commits(folder: Folder) -> list[str]:
    """Who committed, in order."""
    return [folder.get(name).decode() for name in folder.names() if name.startswith("commit-")]


def newest(folder: Folder) -> dict[str, object]:
    """What the one object that is left says."""
    (name,) = (folder / "lease").names()
    return dict(json.loads((folder / "lease").get(name)))


def test_eight_starters_at_once_hold_it_one_after_the_other(folder: Folder, start: Callable[..., Worker]) -> None:
    workers = [start("count", LONG_S) for _ in range(8)]
    assert sorted(worker.hears() for worker in workers) == [f"holds {number}" for number in range(1, 9)]
    assert [worker.process.wait(60) for worker in workers] == [0] * 8
    assert folder.get("count") == b"8"
    assert newest(folder)["number"] == 8 and newest(folder)["released"], "old numbers are swept"


def test_of_eight_that_do_not_wait_one_at_a_time_works(folder: Folder, start: Callable[..., Worker]) -> None:
    holder = start("commit", LONG_S)
    assert holder.hears() == "holds 1"
    assert [worker.hears() for worker in [start("leave", LONG_S) for _ in range(8)]] == ["held"] * 8
    assert not folder.exists("count")
    assert holder.end() == 0


def test_who_lives_keeps_it_however_long_others_wait(folder: Folder, start: Callable[..., Worker]) -> None:
    holder = start("commit", 2 * LEASE_S)
    assert holder.hears() == "holds 1"
    waits = start("commit", 2 * LEASE_S)
    time.sleep(3 * LEASE_S)
    holder.say("go on")
    assert holder.hears() == "committed"
    assert holder.end() == 0
    assert waits.hears() == "holds 2"
    assert waits.end() == 0


def test_after_a_kill_another_takes_over(folder: Folder, start: Callable[..., Worker]) -> None:
    first = start("commit")
    assert first.hears() == "holds 1"
    second = start("commit")
    first.say("go on")
    assert first.hears() == "committed"
    first.process.kill()
    assert second.hears() == "holds 2"
    second.say("go on")
    assert second.hears() == "committed"
    assert second.end() == 0
    assert commits(folder) == ["1", "2"]


def test_one_that_would_leave_finds_out_whether_the_holder_lives(folder: Folder, start: Callable[..., Worker]) -> None:
    first = start("commit")
    assert first.hears() == "holds 1"
    first.process.kill()
    assert start("leave").hears() == "holds 2"


def test_one_that_was_stopped_for_too_long_commits_no_more(folder: Folder, start: Callable[..., Worker]) -> None:
    """It believes in its lease until it looks: it was asleep when another took it."""
    first = start("commit")
    assert first.hears() == "holds 1"
    first.say("go on")
    assert first.hears() == "committed"
    first.process.send_signal(signal.SIGSTOP)
    second = start("commit")
    assert second.hears() == "holds 2"
    second.say("go on")
    assert second.hears() == "committed"
    first.process.send_signal(signal.SIGCONT)
    first.say("go on")
    assert first.hears().startswith("lost") and first.process.wait(60) == 75
    second.say("go on")
    assert second.hears() == "committed"
    assert second.end() == 0
    assert commits(folder) == ["1", "2", "2"]


def test_one_that_was_stopped_and_not_missed_does_not_believe_either(
    folder: Folder, start: Callable[..., Worker]
) -> None:
    """Somebody may be about to take the lease that it has not renewed, so it does not use it again."""
    worker = start("commit")
    assert worker.hears() == "holds 1"
    worker.process.send_signal(signal.SIGSTOP)
    time.sleep(LEASE_S)
    worker.process.send_signal(signal.SIGCONT)
    worker.say("go on")
    assert "storage took no sign of life within" in worker.hears()
    assert worker.process.wait(60) == 75 and not commits(folder)
    assert newest(folder)["released"], "it is over for this one, and the next need not wait"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_it_it_is_released(error: type[BaseException], folder: Folder) -> None:
    with pytest.raises(error), hold(folder / "lease", 3600):
        raise error
    assert newest(folder)["released"]
    with hold(folder / "lease", 3600) as lease:  # an hour is not waited for
        assert lease and lease.fence.number == 2


def test_a_number_that_was_swept_is_not_held_again(folder: Folder) -> None:
    """One who was about to create it slept meanwhile: the name is free, and the lease is not."""
    for _ in range(3):
        with hold(folder / "lease", 3600):
            pass
    with hold(folder / "lease", 3600) as lease:
        assert lease and lease.fence.number == 4
        assert module._create(folder / "lease", 2, 3600, "") is None
        lease.check()
    with hold(folder / "lease", 3600) as lease:
        assert lease and lease.fence.number == 5
    assert newest(folder)["number"] == 5


def test_a_fence_travels(folder: Folder) -> None:
    with hold(folder / "lease", 3600) as lease:
        assert lease
        fence = pickle.loads(pickle.dumps(lease.fence))
        fence.check()
        (folder / "lease").put("lease-000009.json", b"{}")
        with pytest.raises(TryAgainError, match="another firing has taken the lease"):
            fence.check()
        with pytest.raises(TryAgainError, match="number 9, this one has 1"):
            lease.check()


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setenv("BRICKYARD_RETRY_S", "0.3")
    with FaultProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def behind(s3: Folder) -> Folder:
    """The same folder, by a client of its own: that of the environment, which the proxy is in now."""
    return Folder(s3.url) / "lease"


def test_storage_that_is_away_for_a_moment_costs_nothing(s3: Folder, proxy: FaultProxy) -> None:
    with hold(behind(s3), LEASE_S) as lease:
        assert lease
        proxy.rules = [Rule("503")]
        wait_until(lambda: proxy.injected["503"] > 1)
        proxy.rules = []
        lease.check()
        beats = len(proxy.requests)
        wait_until(lambda: len(proxy.requests) > beats + 1)
        lease.check()


def test_storage_that_is_away_for_longer_ends_the_belief(s3: Folder, proxy: FaultProxy) -> None:
    """For good, also when it is back, and though nobody else took the lease."""
    with hold(behind(s3), LEASE_S) as lease:
        assert lease
        proxy.rules = [Rule("503")]
        wait_until(lambda: lease.lost)
        proxy.rules = []
        with pytest.raises(TryAgainError, match="storage took no sign of life"):
            lease.check()
    with hold(behind(s3), LEASE_S) as lease:
        assert lease and lease.fence.number == 2


@pytest.fixture
def direct(s3: Folder) -> Folder:
    """The folder of the lease, by a client that does without the proxy."""
    assert (s3 / "lease").names() == s3.names() == []
    return s3


def test_a_sign_of_life_that_arrives_too_late_is_none(direct: Folder, proxy: FaultProxy) -> None:
    """It began in time, so that it would do for a while; but before it was there others may have looked."""
    with hold(behind(direct), LEASE_S) as lease:
        assert lease
        proxy.rules = [Rule("slow", method="PUT", slow_s=0.85 * LEASE_S)]
        wait_until(lambda: json.loads(direct.get("lease/lease-000001.json"))["beat"])
        with pytest.raises(TryAgainError, match="storage took no sign of life"):
            lease.check()


def test_to_leave_storage_that_is_away_takes_a_moment(
    s3: Folder, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BRICKYARD_RETRY_S", "600")
    monkeypatch.setattr("pipelines.lease.LEAVE_S", 0.5)
    with hold(behind(s3), LEASE_S) as lease:
        assert lease
        proxy.rules = [Rule("503")]
    assert lease._thread.is_alive()
    assert "cannot be told that the lease is free" in caplog.text
    proxy.rules = []
    wait_until(lambda: not lease._thread.is_alive())
