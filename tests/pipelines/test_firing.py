"""Firings of a schedule: each slot once, however often it is fired, and whatever befalls who works on it."""

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread, Timer
from typing import Any

import pytest
import ray

from pipelines.errors import ConfigurationError, DamagedError, DataError, TryAgainError
from pipelines.firing import Slot, due, fire
from pipelines.firing_config import FiringConfig
from pipelines.lease import hold
from pipelines.slots import folder_name, shifted
from pipelines.storage import Folder
from tests.faults.proxy import FaultProxy, Rule
from tests.processes import CODE, without_ray
from tests.webhook import Webhook


@pytest.fixture(params=["on this machine", "on s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(str(tmp_path)) if request.param == "on this machine" else request.getfixturevalue("s3")


PATIENCE_S = 300.0
"""For which a process may live that says nothing of what it is asked."""
HERE = pytest.mark.parametrize("out", ["on this machine"], indirect=True)


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    monkeypatch.setattr("pipelines.alerts.PAUSE_S", 0.01)
    with Webhook() as hook:
        monkeypatch.setenv("BRICKYARD_ALERT_URL", hook.url)
        yield hook


def on(day: int, hour: int = 3) -> datetime:
    return datetime(2026, 11, day, hour, tzinfo=UTC)


def nightly(day: int, **settings: Any) -> FiringConfig:
    return FiringConfig(**{"slot": f"2026-11-{day}T03:00Z", "backoff_s": 0.0, "attempts": 1} | settings)


def named(day: int) -> str:
    return f"2026-11-{day}T03:00Z"


class Work:
    """What is done in a slot; it meets the errors of its list first, in turn."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors, self.did = list(errors), list[str]()

    def __call__(self, slot: Slot) -> dict[str, Any]:
        self.did.append(slot.id)
        slot.check()
        if self.errors:
            raise self.errors.pop(0)
        slot.folder.put("_SUCCESS", b"")
        return {"seeds": list(slot.seeds(range(5, 7)))}


def states(said: dict[str, Any]) -> dict[str, str]:
    return {slot: about["state"] for slot, about in said["slots"].items()}


def about(out: Folder, day: int) -> dict[str, Any]:
    """What the slot's folder says of it."""
    return dict(json.loads((out / f"2026-11-{day}T03-00Z").get("firing.json")))


def test_a_slot_is_worked_on_once_and_then_nothing_is_written(out: Folder) -> None:
    work = Work()
    said = fire(nightly(20), out, work, on(20))
    assert said == {"slots": {named(20): {"state": "done", "seeds": [5, 6]}}}
    assert about(out, 20)["state"] == "done" and about(out, 20)["lease"] == 1
    before = out.find()
    assert states(fire(nightly(20), out, work, on(21))) == {named(20): "already done"}
    assert out.find() == before and work.did == [named(20)]


def test_what_was_missed_is_caught_up_with_the_oldest_first(tmp_path: Path) -> None:
    out, work = Folder(str(tmp_path)), Work()
    assert states(fire(nightly(17), out, work, on(17))) == {named(17): "done"}, (
        "the schedule begins: nothing was missed"
    )
    assert due(nightly(22, catch_up=2), out, on(22)) == dict.fromkeys(map(named, (18, 19, 22)), "to do")
    assert states(fire(nightly(22, catch_up=2), out, work, on(22))) == dict.fromkeys(map(named, (18, 19, 22)), "done")
    assert states(fire(nightly(23, catch_up=0), out, work, on(23))) == {named(23): "done"}, "missed ones are skipped"
    said = fire(nightly(24, catch_up=9, late="4d"), out, work, on(24))
    assert states(said) == dict.fromkeys(map(named, (20, 21, 24)), "done")
    assert work.did == [named(day) for day in (17, 18, 19, 22, 23, 20, 21, 24)]


def test_a_slot_that_was_begun_and_not_finished_was_missed(tmp_path: Path) -> None:
    out = Folder(str(tmp_path))
    with pytest.raises(TryAgainError):
        fire(nightly(20), out, Work(TryAgainError("no")), on(20))
    assert about(out, 20) | {"began": "", "ended": ""} == {
        "slot": named(20), "lease": 1, "state": "failed", "error": "no", "links": {}, "began": "", "ended": "",
    }  # fmt: skip
    assert states(fire(nightly(21), out, Work(), on(21))) == {named(20): "done", named(21): "done"}


def test_what_is_too_late_is_skipped_and_said(tmp_path: Path, hook: Webhook) -> None:
    out, work = Folder(str(tmp_path)), Work()
    assert states(fire(nightly(20, late="12h"), out, work, on(20, 16))) == {named(20): "too late"}
    assert not out.find() and not work.did
    assert hook.got == [
        {"slot": named(20), "state": "too late", "error": "it is older than 12h (firing.late), and is skipped",
         "links": {"folder": f"{out.url}/2026-11-20T03-00Z"}}
    ]  # fmt: skip
    assert states(fire(nightly(20, late="12h"), out, work, on(20, 15))) == {named(20): "done"}


def test_each_night_has_seeds_of_its_own_if_it_is_to(tmp_path: Path) -> None:
    out = Folder(str(tmp_path))
    for day in (20, 21):
        said = fire(nightly(day, seeds="fresh", every="12h"), out, Work(), on(day))
        half_days = 2 * (on(day) - datetime(1970, 1, 1, tzinfo=UTC)).days
        expected = list(shifted(range(5, 7), on(day), FiringConfig(every="12h").period))
        assert said["slots"][named(day)]["seeds"] == expected == [5 + 2 * half_days, 6 + 2 * half_days]


def test_what_may_pass_is_tried_again(tmp_path: Path, hook: Webhook) -> None:
    out, work = Folder(str(tmp_path)), Work(TryAgainError("storage naps"), ConnectionError("gone"))
    assert states(fire(nightly(20, attempts=3), out, work, on(20))) == {named(20): "done"}
    assert work.did == [named(20)] * 3 and hook.got == []
    assert about(out, 20)["lease"] == 3, "each try takes the lease anew"


def test_when_the_tries_are_used_up_it_is_told(tmp_path: Path, hook: Webhook, caplog: pytest.LogCaptureFixture) -> None:
    out, work = Folder(str(tmp_path)), Work(*[TryAgainError("storage naps") for _ in range(3)])
    with pytest.raises(TryAgainError, match=f"slot {named(20)}: storage naps"):
        fire(nightly(20, attempts=2), out, work, on(20))
    assert work.did == [named(20)] * 2
    told = {"slot": named(20), "state": "failed", "error": "storage naps",
            "links": {"folder": f"{out.url}/2026-11-20T03-00Z"}}  # fmt: skip
    assert hook.got == [told]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        f"ALERT {json.dumps(told)}"
    ]


@pytest.mark.parametrize("error", [ConfigurationError("no such thing"), DamagedError("a bit flipped"), KeyError("x")])
def test_what_would_not_pass_is_not_tried_again_and_others_are_none_the_worse(
    error: Exception, tmp_path: Path, hook: Webhook
) -> None:
    out = Folder(str(tmp_path))
    fire(nightly(19), out, Work(), on(19))
    work = Work(error)
    with pytest.raises(type(error)) as told:
        fire(nightly(21, attempts=5), out, work, on(21))
    assert work.did == [named(20), named(21)] and about(out, 21)["state"] == "done"
    words = str(error) if not isinstance(error, KeyError) else "KeyError: 'x'"
    assert [one["error"] for one in hook.got] == [words]
    if not isinstance(error, KeyError):
        assert str(told.value) == f"slot {named(20)}: {error}"


def test_of_two_that_fail_the_one_counts_that_no_other_try_would_mend(tmp_path: Path, hook: Webhook) -> None:
    out = Folder(str(tmp_path))
    fire(nightly(19), out, Work(), on(19))
    with pytest.raises(DataError, match=f"slot {named(21)}: damaged"):
        fire(nightly(21), out, Work(TryAgainError("naps"), DataError("damaged")), on(21))
    assert [(one["slot"], one["error"]) for one in hook.got] == [(named(20), "naps"), (named(21), "damaged")]


def test_links_of_the_work_are_in_the_alert(tmp_path: Path, hook: Webhook) -> None:
    def work(slot: Slot) -> dict[str, Any]:
        slot.links["mlflow"] = "http://mlflow/run"
        raise DataError("damaged")

    with pytest.raises(DataError):
        fire(nightly(20), Folder(str(tmp_path)), work, on(20))
    assert hook.got[0]["links"]["mlflow"] == "http://mlflow/run"


def test_a_slot_that_there_was_no_time_left_for_is_told(tmp_path: Path, hook: Webhook) -> None:
    """The one before was caught up with, and the deadline came at its end."""
    out = Folder(str(tmp_path))
    (out / folder_name(on(19))).put("part-0", b"begun")

    def slow(slot: Slot) -> dict[str, Any]:
        slot.folder.put("_SUCCESS", b"")
        time.sleep(5.1)
        return {}

    with pytest.raises(TryAgainError, match=f"slot {named(20)}: there was no time left for it; its deadline is 5 s"):
        fire(nightly(20, deadline_s=5.0), out, slow, on(20))
    assert (out / folder_name(on(19))).exists("_SUCCESS") and not (out / folder_name(on(20))).exists("_SUCCESS")
    assert [(one["slot"], one["state"]) for one in hook.got] == [(named(20), "failed")]


def test_an_interrupt_ends_it_at_once_and_frees_the_lease(tmp_path: Path, hook: Webhook) -> None:
    out, work = Folder(str(tmp_path)), Work(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fire(nightly(20, attempts=3, lease_s=3600.0), out, work, on(20))
    assert work.did == [named(20)] and not hook.got
    assert states(fire(nightly(20, lease_s=3600.0), out, work, on(20))) == {named(20): "done"}


@pytest.mark.parametrize("held", ["leave", "try-again"])
def test_while_another_works_a_firing_leaves(held: str, tmp_path: Path, hook: Webhook) -> None:
    out, work = Folder(str(tmp_path)), Work()
    with hold(out / "lease", 12.0):
        if held == "leave":
            said = fire(nightly(20, held=held), out, work, on(20))
            assert states(said) == {named(20): "held elsewhere"}
        else:
            with pytest.raises(TryAgainError, match="another firing works at"):
                fire(nightly(20, held=held), out, work, on(20))
    assert not work.did and not hook.got


def test_storage_that_is_away_is_tried_again_and_told(
    s3: Folder, s3_server: str, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRICKYARD_RETRY_S", "0.1")
    with FaultProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        out, work = Folder(s3.url), Work()
        proxy.rules = [Rule("503")]
        with pytest.raises(TryAgainError, match="answers 503"):
            fire(nightly(20, attempts=2, backoff_s=0.1), out, work, on(20))
        assert [one["slot"] for one in hook.got] == [named(20)] and not work.did
        asked = proxy.injected["503"]

        def mend() -> None:
            while proxy.injected["503"] == asked:
                time.sleep(0.01)
            proxy.rules = []

        mending = Thread(target=mend)
        mending.start()
        assert states(fire(nightly(20, attempts=9, backoff_s=0.1), out, work, on(20))) == {named(20): "done"}
        mending.join()


@pytest.mark.ray
def test_a_worker_that_is_lost_is_another_try(tmp_path: Path, ray_cluster: None) -> None:
    """A real one: SIGKILL of the process that the work waits for."""
    tries = []

    @ray.remote(max_retries=0)
    def worker(first: bool) -> None:
        import os

        if first:
            os.kill(os.getpid(), signal.SIGKILL)

    def work(slot: Slot) -> dict[str, Any]:
        tries.append(slot.id)
        ray.get(worker.remote(len(tries) == 1))
        slot.folder.put("_SUCCESS", b"")
        return {}

    assert states(fire(nightly(20, attempts=2), Folder(str(tmp_path)), work, on(20))) == {named(20): "done"}
    assert len(tries) == 2


@pytest.mark.ray
def test_an_error_in_a_worker_is_not(tmp_path: Path, ray_cluster: None) -> None:
    tries = []

    @ray.remote
    def worker() -> None:
        raise ValueError("of the code")

    def work(slot: Slot) -> dict[str, Any]:
        tries.append(slot.id)
        ray.get(worker.remote())
        return {}

    with pytest.raises(ValueError, match="of the code"):
        fire(nightly(20, attempts=3), Folder(str(tmp_path)), work, on(20))
    assert len(tries) == 1


class Night:
    """A firing as a process."""

    def __init__(self, out: Folder, *flags: str) -> None:
        today = f"{datetime.now(UTC):%Y-%m-%d}T00:00Z"
        self.folder = out / today.replace(":", "-")
        self.process = subprocess.Popen(
            [sys.executable, CODE / "tests/pipelines/firing_worker.py", "--out", out.url, "--firing.slot", today,
             "--firing.lease-s", "6", "--firing.backoff-s", "0", *flags],
            cwd=CODE, env=without_ray() | {"PYTHONPATH": str(CODE)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.heard: list[str] = []
        self._patience = Timer(PATIENCE_S, self.process.kill)
        self._patience.start()

    def __enter__(self) -> "Night":
        return self

    def __exit__(self, *_: object) -> None:
        self._patience.cancel()
        self.process.kill()
        self.process.communicate()

    def step(self, part: int) -> None:
        """Let it make a part, and wait until it has."""
        self.go_on()
        self.hear(f"part {part}")

    def go_on(self, times: int = 1) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n" * times)
        self.process.stdin.flush()

    def hear(self, word: str) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.heard.append(line)
            if word in line:
                return
        raise AssertionError(f"it never said {word!r}: {''.join(self.heard)}")

    def end(self) -> dict[str, Any]:
        """What it says at its end, with its exit code."""
        said, more = self.process.communicate()
        self.heard.append(more)
        return dict(json.loads(said.splitlines()[-1])) if said else {"exit_code": self.process.returncode}


@pytest.fixture
def night(out: Folder) -> Iterator[Callable[..., Night]]:
    with ExitStack() as stack:
        yield lambda *flags: stack.enter_context(Night(out, *flags))


def ends(night: Night) -> tuple[int, str, list[int] | None]:
    """Its exit code, and the state of its slot with the parts that it made."""
    said = night.end()
    assert said["exit_code"] == night.process.returncode
    (slot,) = said["slots"].values()
    return said["exit_code"], slot["state"], slot.get("made")


def test_fired_twice_at_once_one_works_and_the_other_waits_for_it(night: Callable[..., Night]) -> None:
    first = night("--step")
    first.hear("works")
    second = night()
    second.hear("which is alive")
    first.go_on(3)
    assert ends(first) == (0, "done", [0, 1, 2])
    assert ends(second) == (0, "already done", None)


def test_killed_and_fired_again_it_makes_what_is_missing(night: Callable[..., Night], out: Folder) -> None:
    first = night("--step")
    first.step(0)
    first.process.kill()
    second = night()
    assert ends(second) == (0, "done", [1, 2])
    assert second.folder.names() == ["_SUCCESS", "firing.json", "part-0", "part-1", "part-2"]
    assert json.loads(second.folder.get("firing.json"))["lease"] == 2


def test_one_that_was_stopped_while_another_took_over_finds_out(night: Callable[..., Night]) -> None:
    """Its next commit is refused; then it waits for the other, and finds that there is nothing left to do."""
    first = night("--step")
    first.step(0)
    first.process.send_signal(signal.SIGSTOP)
    second = night("--step")
    second.step(0)
    first.process.send_signal(signal.SIGCONT)
    first.go_on()
    first.hear("another firing has taken the lease")
    second.go_on(2)
    assert ends(second) == (0, "done", [1, 2])
    assert ends(first) == (0, "already done", None)


@HERE
def test_sigterm_is_an_interrupt_and_the_next_one_need_not_wait(night: Callable[..., Night]) -> None:
    first = night("--step", "--firing.lease-s", "3600")
    first.step(0)
    first.process.send_signal(signal.SIGTERM)
    assert first.end() == {"error": "interrupted", "exit_code": 130}
    assert json.loads(first.folder.get("firing.json"))["state"] == "interrupted"
    assert ends(night()) == (0, "done", [1, 2])


@HERE
def test_at_the_deadline_the_work_learns_of_it(night: Callable[..., Night]) -> None:
    late = night("--step", "--firing.deadline-s", "6", "--firing.attempts", "5")
    late.step(0)
    time.sleep(6)
    late.go_on()
    said = late.end()
    assert said["exit_code"] == late.process.returncode == 75
    assert "the deadline of 6 s (firing.deadline_s) is over" in said["error"]
    assert '"state": "failed", "error": "the deadline of 6 s' in "".join(late.heard), "the line for whoever is on duty"
    assert late.folder.names() == ["firing.json", "part-0"]
    assert ends(night()) == (0, "done", [1, 2])


@pytest.mark.parametrize("trouble", ["sleeps", "does not listen"])
def test_work_that_does_not_ask_is_ended(trouble: str, tmp_path: Path) -> None:
    """Also where Ctrl-C is ignored, as shells have it for what they start in the background."""
    with Webhook() as hook:
        # Twice the grace must pass before the hard end, which is not meant to come to one that sleeps; to the other
        # it is meant to come when its work has begun.
        grace_s, deadline_s = (3, 6) if trouble == "does not listen" else (20, 1)
        flags = ["--trouble", trouble, f"--grace-s={grace_s}", f"--firing.deadline-s={deadline_s}"]
        flags += ["--firing.attempts", "5"]
        with pytest.MonkeyPatch.context() as context:
            context.setenv("BRICKYARD_ALERT_URL", hook.url)
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a child inherits it
            try:
                started = Night(Folder(str(tmp_path)), *flags)
            finally:
                signal.signal(signal.SIGINT, before)
        with started as late:
            said = late.end()
    assert said["exit_code"] == late.process.returncode == 75
    (told,) = hook.got
    assert ("the process is ended" if trouble == "does not listen" else "is over; the same command") in told["error"]
    assert "s3cret" not in "".join(late.heard)
    if trouble == "sleeps":
        lease = json.loads(Folder(f"{tmp_path}/lease").get("lease-000001.json"))
        assert lease["released"] and "deadline of 1 s" in said["error"]


@HERE
def test_to_wait_for_another_has_an_end_too(night: Callable[..., Night], out: Folder) -> None:
    first = night("--step")
    first.hear("works")
    second = night("--firing.deadline-s", "2")
    assert second.end()["exit_code"] == 75
    first.go_on(3)
    assert ends(first) == (0, "done", [0, 1, 2])


@HERE
def test_a_dry_run_says_what_is_to_do_and_does_nothing(night: Callable[..., Night], out: Folder) -> None:
    said = night("--dry-run").end()
    assert said["exit_code"] == 0 and list(said["slots"].values()) == ["to do"] and not out.find()
