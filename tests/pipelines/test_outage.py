"""A real MLflow server behind a proxy that does what servers do on a bad day: nothing is lost, nothing is there twice,
nobody waits."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipelines import tracking
from pipelines.entries import Entry, Status
from pipelines.errors import TryAgainError
from pipelines.mlflow_run import MLflowRun
from pipelines.replay import ReplayJob, dry_run, replay
from pipelines.run_folder import count_start
from pipelines.storage import Folder
from pipelines.tracking import Tracker, open_tracker
from pipelines.tracking_config import TrackingConfig
from tests.conftest import free_ports
from tests.faults.proxy import FaultProxy, Rule
from tests.pipelines import recorder
from tests.processes import CODE, kill, without_ray

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's own dependencies
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
FAULTS = {
    "500": Rule("500"), "hung": Rule("hung"), "reset": Rule("reset"), "dropped": Rule("dropped", every=2),
    "slow": Rule("slow", slow_s=0.1), "truncated": Rule("truncated", every=6),
}  # fmt: skip
"""What is dropped is asked for again by itself; what is truncated fails an entry, which takes up to five requests."""
STAYS = {"500", "hung", "reset"}
"""These let nothing through as long as they last."""


@dataclass(frozen=True)
class Yard:
    """A folder for one run, and the tracker that it is recorded by."""

    root: Folder
    proxy: FaultProxy
    server: str
    run_id: str

    @property
    def home(self) -> Folder:
        return self.root / "runs" / "digits"

    def start(self, parameters: dict[str, Any] | None = None, **tags: str) -> Tracker:
        config = TrackingConfig(uri=self.proxy.url, experiment=self.run_id, spool_mb=1)
        number = count_start(self.home, "")
        return open_tracker(
            config, self.root, self.home, "digits", self.run_id, parameters or {"seed": 3}, tags, number
        )

    def replay(self, patience_s: float = 60) -> int:
        self.home.create("run.json", json.dumps({"id": self.run_id}).encode())
        return int(replay(ReplayJob(runs=(self.home.url,), patience_s=patience_s))["delivered"])

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.server)

    def runs(self) -> list[Any]:
        """All that were not deleted, in any experiment."""
        every = [experiment.experiment_id for experiment in self.client.search_experiments()]
        return list(self.client.search_runs(every, f"tags.`brickyard.run` = '{self.run_id}'"))

    def run(self) -> Any:
        (run,) = self.runs()
        return run

    def history(self, key: str) -> list[tuple[int, float]]:
        """In the order of positions; what is there twice is here twice."""
        found = self.client.get_metric_history(self.run().info.run_id, key)
        return sorted((metric.step, metric.value) for metric in found)

    def pictures(self) -> list[str]:
        """Key, position and kind of each, without what makes names unique."""
        files = [file.path for file in self.client.list_artifacts(self.run().info.run_id, "images")]
        return sorted(re.sub(r"\+timestamp\+\d+\+[0-9a-f-]{36}", "", path) for path in files)

    def file(self, name: str) -> str:
        return Path(self.client.download_artifacts(self.run().info.run_id, name)).read_text()


@pytest.fixture
def yard(mlflow_on_sqlite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Yard]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)  # of the other server, which goes nowhere else
    with FaultProxy(mlflow_on_sqlite) as proxy:
        yield Yard(Folder(str(tmp_path)), proxy, mlflow_on_sqlite, f"run of {tmp_path.name}")
        proxy.rules = []  # whoever still waits may go


def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the end of a job wait for a shorter time than it does."""
    monkeypatch.setattr(tracking, "SERVER_PATIENCE_S", 0.5)


def phase(tracker: Tracker, number: int) -> None:
    """Record what :func:`check` looks for."""
    for position in range(100 * number + 10, 100 * number + 101, 10):
        tracker.metrics({"loss": 1 / position, "nothing": float("nan")}, position)
    tracker.picture(recorder.picture(position), "samples", position)
    tracker.file("config.yaml", f"until {position}".encode())
    tracker.tags({"until": str(position)})


def check(yard: Yard, phases: int, status: str = "FINISHED") -> None:
    """Everything of so many phases is there, once."""
    run = yard.run()
    assert run.info.status == status and run.info.run_name == "digits"
    positions = range(10, 100 * phases + 1, 10)
    assert yard.history("loss") == [(position, 1 / position) for position in positions]
    assert [position for position, _ in yard.history("nothing")] == list(positions)
    sheets = sorted(f"images/samples+step+{100 * n}{end}" for n in range(1, phases + 1) for end in ENDS)
    assert yard.pictures() == sheets
    assert yard.file("config.yaml") == f"until {100 * phases}"
    assert run.data.tags["until"] == str(100 * phases) and run.data.tags["mlflow.loggedImages"] == "True"
    assert run.data.params["seed"] == "3"


ENDS = ("+compressed.webp", ".png")


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)


@pytest.mark.parametrize("when", ["start", "middle", "end"])
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_the_server_does_whenever(
    yard: Yard, fault: str, when: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("start", "middle", "end")):
        yard.proxy.rules = [FAULTS[fault]] if name == when else []
        if number == 0:
            tracker = yard.start()
        if name == "end":
            phase(tracker, number)
            if fault in STAYS and when == "end":
                until(lambda: bool(yard.proxy.injected[fault]))
                no_patience(monkeypatch)
            tracker.finish("FINISHED")
        else:
            before = yard.proxy.injected.total()
            phase(tracker, number)
            if name == when:
                until(lambda: yard.proxy.injected.total() > before)  # noqa: B023
    assert yard.proxy.injected[fault]
    if fault in STAYS and when == "end":
        assert re.search(r"has not taken all .* python jobs/replay.py file:", caplog.text)
        assert tracker.see == f"python jobs/replay.py {yard.home.url}"
        with pytest.raises(TryAgainError, match=r"records of file:"):
            yard.replay(patience_s=0.1)
        yard.proxy.rules = []
        assert yard.replay()
    assert yard.replay() == 0
    check(yard, 3)
    if tracker.see.startswith("http"):
        its_id = yard.run().info.run_id
        assert tracker.tracker_id == its_id and tracker.see.endswith(f"/runs/{its_id}?workflowType=machine_learning")


@pytest.mark.parametrize(
    ("status", "entry_s", "waits_s"), [("FINISHED", 5, None), ("FINISHED", 7, 60), ("FAILED", 7, 60), ("KILLED", 5, 8)]
)
def test_the_end_waits_for_a_server_that_is_slow_but_no_more_than_a_minute(
    yard: Yard,
    status: Status,
    entry_s: int,
    waits_s: int | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By a clock that each entry moves on: ten of them are taken within 50 s, or not within 60; nor, of a job that was
    interrupted, within 8."""
    clock, take = SimpleNamespace(now=0.0, monotonic=lambda: clock.now), MLflowRun.take

    def slowly(recipient: MLflowRun, entries: Sequence[Entry]) -> None:
        assert tracker._delivery._closing.wait(timeout=60)
        take(recipient, entries)
        clock.now += entry_s
        if waits_s and clock.now > waits_s:
            assert tracker._delivery._left.wait(timeout=60)

    monkeypatch.setattr("pipelines.delivery.time", clock)
    monkeypatch.setattr(tracking, "SERVER_PATIENCE_S", 8.0)
    with monkeypatch.context() as context:
        context.setattr(MLflowRun, "take", slowly)
        tracker = yard.start()
        for number in range(7):  # after its beginning and its settings, and before its end
            tracker.file(f"{number}.txt", b"")
        tracker.finish(status)
    assert ("has not taken all" in caplog.text) is bool(waits_s)
    assert bool(yard.replay()) is bool(waits_s)
    assert clock.now == (10 * entry_s if waits_s is None else entry_s * (waits_s // entry_s + 1))
    assert yard.run().info.status == status and len(yard.client.list_artifacts(yard.run().info.run_id)) == 7


def test_the_next_start_delivers_what_was_left_and_then_its_own(yard: Yard) -> None:
    yard.proxy.rules = [FAULTS["500"]]
    first = yard.start(starts="1")
    phase(first, 0)
    with pytest.MonkeyPatch.context() as context:
        no_patience(context)
        first.finish("FAILED")
    yard.proxy.rules = []
    second = yard.start(starts="2")
    until(lambda: bool(yard.runs()) and "starts" in yard.run().data.tags)
    phase(second, 0)  # what is computed again is not recorded again
    phase(second, 1)
    second.finish("FINISHED")
    check(yard, 2)
    assert yard.run().data.tags["starts"] == "2"


def test_a_start_after_an_end_runs_again(yard: Yard) -> None:
    phase(first := yard.start(), 0)
    first.finish("KILLED")
    check(yard, 1, "KILLED")
    second = yard.start({"seed": 4, "workers": 2})
    until(lambda: yard.run().info.status == "RUNNING")
    phase(second, 0)  # what is computed again is not recorded again
    phase(second, 1)
    second.finish("FINISHED")
    check(yard, 2)
    assert yard.run().data.params == {"seed": "3", "workers": "2"}, "a parameter keeps its first value"


def test_a_bad_value_loses_itself(
    yard: Yard, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # nothing hangs here, and so much takes a while
    many = {f"p{i:05d}": i for i in range(10_000)}
    tracker = yard.start({"seed": 3, "long": "x" * 7000, "no/../way": 1, "what?": 2} | many)
    tracker.metrics({"loss": 1.0, "loss!": 2.0, "nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}, 10)
    tracker.metrics({"text": "abc", "none": None, "loss": 2.0}, 20)  # type: ignore[dict-item]
    tracker.tags({"what?": "a", "long": "y" * 9000, "fine": "b"})
    tracker.picture(np.zeros((8, 8, 1), np.uint8), "what+ever", 10)
    tracker.file("../outside", b"")
    tracker.metrics({"loss": 3.0}, 30)
    tracker.finish("FINISHED")
    yard.home.create("run.json", b'{"id": "x"}')
    yard.replay(60)  # of 10,000 parameters some may be left
    run = yard.run()
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "3", "long": "x" * 6000} | {key: str(value) for key, value in many.items()}
    assert yard.history("loss") == [(10, 1.0), (20, 2.0), (30, 3.0)]
    assert np.isnan(yard.history("nan")[0][1])
    assert [yard.history(key)[0][1] for key in ("inf", "-inf")] == [1.7976931348623157e308, -1.7976931348623157e308]
    assert "loss!" not in run.data.metrics and run.data.tags["fine"] == "b" and len(run.data.tags["long"]) == 8000
    assert not [file for file in yard.client.list_artifacts(run.info.run_id) if file.path != "images"]
    for words in (
        "'what+ever' cannot", "'../outside' is no name", "refuses the metric loss!", "refuses the parameter what?",
        "refuses the tag what?", "metric text is 'abc'", "metric none is None", "long has 7000",
    ):  # fmt: skip
        assert caplog.text.count(words) == 1, words


def test_what_fails_alone_is_dropped_and_said(yard: Yard, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr("pipelines.delivery.LONGEST_WAIT_S", 0.01)
    yard.proxy.rules = [Rule("500", path="config.yaml")]
    phase(tracker := yard.start(), 0)
    until(lambda: bool(yard.runs()) and yard.run().data.tags.get("until") == "100")
    tracker.finish("FINISHED")
    assert re.search(r"a record \(File\) failed 8 times and is dropped", caplog.text)
    assert len(yard.history("loss")) == 10 and yard.run().info.status == "FINISHED"


def test_what_fails_now_and_then_is_not_dropped(yard: Yard, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """An entry of several requests, of which each second is lost, never gets through; it is there when that is over."""
    monkeypatch.setattr("pipelines.delivery.LONGEST_WAIT_S", 0.01)
    tracker = yard.start()
    until(lambda: bool(yard.runs()))
    yard.proxy.rules = [Rule("truncated", every=2)]
    phase(tracker, 0)
    until(lambda: yard.proxy.injected["truncated"] > 20)
    yard.proxy.rules = []
    tracker.finish("FINISHED")
    assert "is dropped" not in caplog.text
    check(yard, 1)


def test_a_full_spool_drops_and_says(yard: Yard, caplog: pytest.LogCaptureFixture) -> None:
    yard.proxy.rules = [FAULTS["reset"]]
    tracker = yard.start()
    noise = np.random.Generator(np.random.PCG64(0))
    for position in range(1, 6):
        tracker.picture(noise.integers(0, 256, (300, 300, 3), np.uint8), "noise", position)  # 270 kB each
        tracker.metrics({"loss": 1.0}, position)
    with pytest.MonkeyPatch.context() as context:
        no_patience(context)
        tracker.finish("FAILED")
    assert caplog.text.count("is full (tracking.spool_mb is 1)") == 1
    yard.proxy.rules = []
    yard.replay()
    run = yard.run()
    assert run.info.status == "FAILED" and run.data.tags["brickyard.records_dropped"] == "2"
    assert [position for position, _ in yard.history("loss")] == [1, 2, 3, 4, 5]
    assert len(yard.pictures()) == 3 * 2


def test_a_run_that_was_deleted_is_restored_and_one_that_is_gone_is_made_anew(yard: Yard) -> None:
    phase(tracker := yard.start(), 0)
    until(lambda: bool(yard.runs()) and yard.run().data.tags.get("until") == "100")
    deleted = yard.run().info.run_id
    yard.client.delete_run(deleted)
    phase(tracker, 1)
    tracker.finish("FINISHED")
    assert yard.run().info.run_id == deleted
    check(yard, 2)

    yard.client.delete_experiment(yard.run().info.experiment_id)
    phase(tracker := yard.start(), 2)
    tracker.finish("FINISHED")
    check(yard, 3)

    claim = next(name for name in yard.home.names() if name.startswith("mlflow-"))
    yard.home.put(claim, json.dumps({"mlflow_run": "0" * 32}).encode())  # as if it were collected as garbage
    yard.client.delete_run(deleted)
    phase(tracker := yard.start(), 0)
    tracker.finish("FINISHED")
    assert yard.run().info.run_id != deleted
    check(yard, 1)


def test_what_comes_late_from_elsewhere_does_not_end_what_goes_on(yard: Yard) -> None:
    """A first start on another machine left its spool there; it is delivered while a second one trains."""
    elsewhere = yard.root / "elsewhere"
    yard.proxy.rules = [FAULTS["reset"]]
    config = TrackingConfig(uri=yard.proxy.url, experiment=yard.run_id)
    first = count_start(yard.home, "")
    late = open_tracker(config, yard.root, elsewhere, "digits", yard.run_id, {"seed": 3}, {"until": "never"}, first)
    late.metrics({"loss": 0.5}, 5)
    late.file("config.yaml", b"until never")
    with pytest.MonkeyPatch.context() as context:
        no_patience(context)
        late.finish("FAILED")
    until(lambda: late._delivery.ended)  # or its last request would get through, and make a run of its own
    yard.proxy.rules = []
    phase(tracker := yard.start(), 0)
    until(lambda: bool(yard.runs()) and yard.run().data.tags.get("until") == "100")
    claim = next(name for name in yard.home.names() if name.startswith("mlflow-"))
    elsewhere.put(claim, yard.home.get(claim))
    elsewhere.put("run.json", b'{"id": ""}')
    assert replay(ReplayJob(runs=(elsewhere.url,)))["delivered"]
    assert yard.run().info.status == "RUNNING" and yard.run().data.tags["until"] == "100"
    assert yard.file("config.yaml") == "until 100"
    assert yard.history("loss")[0] == (5, 0.5) and len(yard.history("loss")) == 11
    tracker.finish("FINISHED")


def test_from_one_machine_to_another(yard: Yard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the run is in object storage; each machine has a cache of its own."""
    home = Folder(f"memory://{yard.run_id.replace(' ', '-')}")
    config = TrackingConfig(uri=yard.proxy.url, experiment=yard.run_id)

    def start(machine: str) -> Tracker:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        number = count_start(home, "")
        return open_tracker(config, yard.root, home, "digits", yard.run_id, {"seed": 3}, {}, number)

    for number, machine in enumerate(("one", "two")):
        yard.proxy.rules = [FAULTS["500"]]
        phase(tracker := start(machine), number)
        with pytest.MonkeyPatch.context() as context:
            no_patience(context)
            tracker.finish("KILLED")
        assert len((home / "spool").names()) == number + 1
    yard.proxy.rules = []
    phase(tracker := start("three"), 2)
    tracker.finish("FINISHED")
    assert (home / "spool").names() == []
    check(yard, 3)


def record(yard: Yard, entries: int = 5, uri: str = "") -> subprocess.Popen[str]:
    """A driver that records."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.pipelines.recorder", uri or yard.proxy.url, yard.root.path(), str(entries)],
        cwd=CODE, env=without_ray() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CODE)}, text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def say(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdin and process.stdout
    process.stdin.write(f"{word}\n")
    return process.stdout.readline()


def replay_command(yard: Yard, patient: bool = True) -> tuple[int, dict[str, Any]]:
    yard.home.create("run.json", json.dumps({"id": recorder.RUN_ID}).encode())
    done = subprocess.run(
        [sys.executable, "jobs/replay.py", yard.home.path(), "--patience-s", "20" if patient else "1"],
        cwd=CODE, env=without_ray() | {"PYTHONPATH": str(CODE)}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == 1, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture
def recorded(yard: Yard) -> Iterator[Yard]:
    """The run that a process records, with an MLflow of its own: the recorder's id is always the same."""
    from dataclasses import replace

    yield replace(yard, run_id=recorder.RUN_ID)
    for run in replace(yard, run_id=recorder.RUN_ID).runs():
        yard.client.delete_run(run.info.run_id)


def check_recorded(yard: Yard, last: int) -> None:
    for key in ("loss", "images_per_s"):
        positions = range(100, last + 1, 100)
        assert yard.history(key) == [(position, recorder.values(position)[key]) for position in positions]
    sheets = sorted(f"images/samples+step+{p}{end}" for p in range(500, last + 1, 500) for end in ENDS)
    assert yard.pictures() == sheets
    assert yard.file("config.yaml") == f"position: {last}"


@pytest.mark.parametrize("fault", ["hung", "refused"])
def test_the_process_leaves_a_server_that_is_away(recorded: Yard, fault: str) -> None:
    """From the start; MLflow by itself would try for four minutes at each call."""
    recorded.proxy.rules = [FAULTS["hung"]]
    port = free_ports(1)
    uri = recorded.proxy.url if fault == "hung" else f"http://127.0.0.1:{port}"
    process = record(recorded, uri=uri)
    assert say(process, "") == "ready\n"
    assert process.stdout and process.stdout.readline() == "recorded 500\n"
    out, err = process.communicate("end\n", timeout=60)
    left_ms = time.time() * 1000
    assert process.returncode == 0, err
    assert json.loads(out) == {"tracker_id": "", "see": f"python jobs/replay.py {recorded.home.url}"}
    assert "Traceback" not in err and "has not taken all" in err

    code, said = replay_command(recorded, patient=False)
    assert code == said["exit_code"] == 75 and "did not take all" in said["error"]
    waiting = dry_run(ReplayJob(runs=(recorded.home.url,)))["waiting"]
    recorded.proxy.rules = []
    if fault == "hung":
        code, said = replay_command(recorded)
        check_recorded(recorded, 500)
    else:
        with FaultProxy(recorded.server, port):
            code, said = replay_command(recorded)
            check_recorded(recorded, 500)
    assert code == 0 and said["delivered"] == said["runs"][recorded.home.url] == waiting > 8
    assert replay_command(recorded)[1]["delivered"] == 0
    run = recorded.run().info
    assert run.status == "FINISHED" and run.start_time < run.end_time < left_ms, "when it was, not when it is told"


@pytest.mark.parametrize("fault", ["none", "500", "dropped"])
def test_killed_while_it_records(recorded: Yard, fault: str) -> None:
    if fault != "none":
        recorded.proxy.rules = [FAULTS[fault]]
    process = record(recorded)
    assert say(process, "") == "ready\n"
    assert process.stdout and process.stdout.readline() == "recorded 500\n"
    assert say(process, "") == "recorded 1000\n"
    if fault == "none":  # in the middle of it
        until(lambda: any("log-batch" in path for _, path in recorded.proxy.requests))
    kill(process)
    recorded.proxy.rules = []
    assert replay_command(recorded)[0] == 0
    check_recorded(recorded, 1000)
    assert recorded.run().info.status == "RUNNING", "nobody ended it"

    process = record(recorded)  # the same command goes on
    assert say(process, "") == "ready\n"
    _, err = process.communicate("\n\nend\n", timeout=120)
    assert process.returncode == 0, err
    code, said = replay_command(recorded)
    assert code == 0 and bool(said["delivered"]) == ("has not taken all" in err), "but what it was too busy to take"
    check_recorded(recorded, 1500)
    assert recorded.run().info.status == "FINISHED"


def test_two_drivers_of_one_run_and_one_spool(recorded: Yard) -> None:
    both = [record(recorded), record(recorded)]
    assert [say(process, "") for process in both] == ["ready\n"] * 2
    ends = [process.communicate("\nend\n", timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert replay_command(recorded)[0] == 0
    check_recorded(recorded, 1000)


STARTER = """
import sys
from pipelines.entries import Begin, Metrics, Target
from pipelines.storage import Folder
from pipelines.mlflow_door import recipient_of
uri, home, run_id, number = sys.argv[1:]
run = recipient_of(Target(uri=uri, experiment=run_id, artifacts="", name="digits", run_id=run_id), Folder(home))
print("ready", flush=True)
sys.stdin.readline()
run.take([Begin(int(number), 7)])
run.take([Metrics({f"of_{number}": 1.0}, 1, 1)])
print(run.run_id)
"""


def test_a_race_of_starters_makes_one_run(yard: Yard) -> None:
    """Each in a process of its own, on machines that share the run's folder but no spool."""
    yard.proxy.rules = [Rule("slow", path="runs/create", slow_s=5), Rule("slow", path="experiments/create", slow_s=5)]
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER, yard.proxy.url, yard.home.path(), yard.run_id, str(number)],
            cwd=CODE, env=os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "60", "PYTHONPATH": str(CODE)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(3)
    ]  # fmt: skip
    assert [starter.stdout.readline() for starter in starters] == ["ready\n"] * 3  # type: ignore[union-attr]
    for starter in starters:
        starter.stdin.write("go\n")  # type: ignore[union-attr]
        starter.stdin.flush()  # type: ignore[union-attr]
    told = {starter.communicate(timeout=120)[0].strip() for starter in starters}
    assert [starter.returncode for starter in starters] == [0, 0, 0]
    created = [path for method, path in yard.proxy.requests if path.endswith("runs/create")]
    assert len(created) > 1, "there was no race"
    assert told == {yard.run().info.run_id}
    assert set(yard.run().data.metrics) == {"of_0", "of_1", "of_2"}


def test_an_answer_that_is_lost_makes_no_second_run(yard: Yard) -> None:
    yard.proxy.rules = [Rule("dropped", path="(runs|experiments)/create", first=1)]
    phase(tracker := yard.start(), 0)
    tracker.finish("FINISHED")
    assert yard.proxy.injected["dropped"] == 2
    yard.replay()
    check(yard, 1)


def test_nothing_waits_for_a_server_that_hangs(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is recorded, and the end has come, while the first request still waits for its answer."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    yard.proxy.rules = [FAULTS["hung"]]
    phase(tracker := yard.start(), 0)
    phase(tracker, 1)
    until(lambda: bool(yard.proxy.injected["hung"]))
    no_patience(monkeypatch)
    tracker.finish("FINISHED")
    assert yard.proxy.injected["hung"] == 1
