"""Nodes that go and come, workers that hang, and errors that no new start would mend: real raylets, real signals.

One cluster for all, with a worker to a node; each job is the command of a user that joins it.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from jobs.presets import DIGITS
from pipelines import checkpoints
from pipelines.manifest import Manifest
from pipelines.plan import Plan, window_batches
from pipelines.storage import Folder
from tests.jobs import recorded
from tests.processes import CODE, kill, of_session, of_this_cluster, wait_for, without_ray

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's own dependencies
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

FLAGS = [
    "--fit.log-images=640", "--fit.checkpoint-images=1280", "--fit.warm-up-images=640", "--evaluate-images=0",
    "--scaling.cpus-per-worker=2",
]  # fmt: skip
QUICK = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",
}
"""Ray's own times, shorter; what is tried stays the same."""


class Yard:
    """A cluster of a head, where there is room to read but not to train, and of nodes of one worker each."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.nodes: list[Any] = []

    def grow(self, nodes: int) -> None:
        while len(self.nodes) < nodes:
            self.nodes.append(self.cluster.add_node(num_cpus=3))

    def drain(self, node: Any, seconds: int) -> None:
        """A cloud's notice that a node is about to be taken away."""
        ray = str(Path(sys.executable).parent / "ray")
        words = [ray, "drain-node", f"--address={self.cluster.address}", f"--node-id={node.node_id}",
                 "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=taken back",
                 f"--deadline-remaining-seconds={seconds}"]  # fmt: skip
        subprocess.run(words, check=True, capture_output=True)

    def lose(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes = [other for other in self.nodes if other is not node]


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in QUICK.items():
            environment.setenv(name, value)
        yard = Yard()
        yield yard
        yard.cluster.shutdown()


class Job:
    """A training job as a process, and what it has said so far."""

    def __init__(self, yard: Yard, root: Path, *flags: str, handed: Path | None = None) -> None:
        """Start it; `handed` is where its workers write down what they are handed, if anywhere."""
        self.root, self._log = root, root.with_suffix(".log")
        script = ["-m", "tests.jobs.recorded", str(handed), "-1"] if handed else ["jobs/train.py"]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *script, "digits", f"--root={root}", *FLAGS, *flags],
                cwd=CODE, text=True, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
                env=without_ray() | of_this_cluster() | QUICK
                | {"RAY_ADDRESS": yard.cluster.address, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self._log.read_text()

    @property
    def starts(self) -> list[tuple[int, int]]:
        """Number of workers and position of each start."""
        found = re.findall(r"(\d+) workers train from (\d+) images on", self.said)
        return [(int(workers), int(position)) for workers, position in found]

    @property
    def left(self) -> list[tuple[int, str]]:
        found = re.findall(r"the workers leave at (\d+) images: (.*)", self.said)
        return [(int(position), why) for position, why in found]

    @property
    def seen(self) -> int:
        """Images, as last reported."""
        found = re.findall(r"([\d,]+) of [\d,]+ images ·", self.said)
        return int(found[-1].replace(",", "")) if found else 0

    @property
    def saved(self) -> int:
        """Images of the newest checkpoint."""
        found = re.findall(r"checkpoint at (\d+) images,", self.said)
        return int(found[-1]) if found else 0

    def wait_for(self, condition: Any) -> None:
        try:
            wait_for(condition, self.process)
        except (AssertionError, AttributeError) as error:  # what it said is not in a pipe
            raise AssertionError(self.said[-5000:]) from error

    def finish(self, code: int) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == code, self.said[-5000:]
        return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.fixture
def start(yard: Yard, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []
    yield lambda *flags, **more: jobs.append(Job(yard, tmp_path / "job", *flags, **more)) or jobs[-1]
    for job in jobs:
        kill(job.process)  # or it would keep the workers' places


def train_workers() -> list[int]:
    """The processes of the workers that train: children of the raylets, which are children of this process."""
    return sorted(of_session(os.getsid(0), b"ray::RayTrainWorker"))


def manifest_of(job: Job) -> Manifest:
    data = Folder(f"{job.root}/data")
    return next(Manifest.load(data / name) for name in data.names() if "-8x8x1-" in name)


def test_nodes_that_go_and_come(yard: Yard, start: Callable[..., Job], tmp_path: Path) -> None:
    """A notice, more room, and a node that dies: 2 → 1 → 2 → 1 workers, within one job, and the images of one."""
    yard.grow(2)
    handed = tmp_path / "handed"
    handed.mkdir()
    job = start("--fit.images=128000000", "--scaling.min-workers=1", "--scaling.resize-s=3", handed=handed)
    job.wait_for(lambda: job.seen > 0)
    taken = yard.nodes[1]
    yard.drain(taken, seconds=60)
    job.wait_for(lambda: len(job.starts) == 2)
    assert [workers for workers, _ in job.starts] == [2, 1]
    (left,) = job.left
    assert left[0] == job.starts[1][1], "nothing is computed again"
    # The controller hears of the notice, or looks for how many workers there is room, whichever is first; where their
    # number is fixed, as below, there is but the notice.
    assert left[1] in ("a node is taken away", "there is room for 1 of the workers")

    yard.lose(taken)
    yard.grow(2)
    job.wait_for(lambda: len(job.starts) == 3)
    assert job.starts[2] == (2, job.left[1][0]) and job.left[1][1] == "there is room for 2 of the workers"

    seen = 0

    def far_enough() -> bool:
        """And the checkpoint that was due by then is there: one that is on its way is lost, too."""
        nonlocal seen
        seen = job.seen
        return seen > job.starts[2][1] + 2 * 1280 and job.saved >= seen // 1280 * 1280

    job.wait_for(far_enough)
    yard.lose(yard.nodes[1])
    job.wait_for(lambda: len(job.starts) == 4)
    assert job.starts[3][0] == 1 and job.starts[3][1] >= seen - 1280, "a checkpoint interval at most"

    seen = job.seen
    job.wait_for(lambda: job.seen > seen)
    job.process.send_signal(signal.SIGTERM)
    assert job.finish(130)["error"] == "interrupted"

    (run,) = recorded.mlflow_runs(job.root)
    assert run.info.status == "KILLED"

    attempts, manifest = recorded.written(handed), manifest_of(job)
    assert [(attempt.world, at) for at, attempt in attempts.items()] == job.starts
    rows = 128 * window_batches(DIGITS.data.window_bytes, manifest.row_bytes, 128)
    recorded.check_ids(attempts, Plan(0, manifest.rows, manifest.row_group_rows, rows))


def test_a_notice_and_a_worker_that_stands_still(yard: Yard, start: Callable[..., Job]) -> None:
    """The number of workers is fixed: each time there is a place for the one that is replaced."""
    yard.grow(2)
    job = start("--fit.images=128000000", "--scaling.hang-s=20", "--tracking.uri=none")
    job.wait_for(lambda: job.seen > 0)
    taken = yard.nodes[0]
    yard.grow(3)
    yard.drain(taken, seconds=60)
    job.wait_for(lambda: len(job.starts) == 2)
    (left,) = job.left
    assert left[1] == "a node is taken away"
    assert job.starts[1] == (2, left[0]) and left[0] > 0, "nothing is computed again"
    yard.lose(taken)

    seen = job.seen
    job.wait_for(lambda: job.seen > seen)
    stopped = train_workers()[1]
    os.kill(stopped, signal.SIGSTOP)
    job.wait_for(lambda: len(job.starts) == 3)
    assert not Path(f"/proc/{stopped}").exists(), "it would hold its GPU, and might go on"
    waiting = set(re.findall(r"worker (\d) has made no step for 20 s", job.said))
    assert "pipelines/fit.py" in job.said and len(waiting) == 1, job.said[-5000:]
    assert job.starts[2][0] == 2 and len(job.left) == 1
    seen = job.seen
    job.wait_for(lambda: job.seen > seen)
    job.process.send_signal(signal.SIGINT)
    assert job.finish(130)["error"] == "interrupted"


def test_a_gradient_that_is_not_finite_ends_the_job_at_once(
    yard: Yard, start: Callable[..., Job], tmp_path: Path
) -> None:
    yard.grow(2)
    job = start("--fit.images=12800", "--fit.learning-rate=1e30", "--fit.checkpoint-images=128",
                "--fit.grid-images=12800", "--tracking.uri=none")  # fmt: skip
    error = job.finish(1)["error"]
    found = re.match(r"the gradient of positions (\d+)\.\.\d+ is (nan|inf)", error)
    assert found
    assert len(job.starts) == 1, "a new start would end the same"
    newest = checkpoints.newest(Folder(str(tmp_path / "job" / "runs" / "digits")))
    assert newest and newest[1].position == int(found[1]) > 0, "what was on its way to storage has arrived"


def test_a_controller_that_dies_ends_the_job_for_another_try(yard: Yard, start: Callable[..., Job]) -> None:
    yard.grow(2)
    job = start("--fit.images=128000000", "--tracking.uri=none")
    job.wait_for(lambda: job.seen > 0)
    (controller,) = of_session(os.getsid(0), b"ray::TrainController")
    os.kill(controller, signal.SIGKILL)
    assert "run the same command to go on" in job.finish(75)["error"]
