"""Sampling jobs that are killed, and two that work in one folder: each seed once, with the pixels that it has."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from ray.cluster_utils import Cluster

from pipelines.draw_config import DrawConfig
from pipelines.draw_shard import DrawShard
from pipelines.sample_config import SampleJob
from pipelines.sample_plan import plan_samples
from pipelines.storage import Folder
from tests.pipelines.committed import committed
from tests.pipelines.helpers import beside, drawn
from tests.processes import CODE, kill, of_session, of_this_cluster, wait_for, without_ray

pytestmark = pytest.mark.ray

SHARDS, IN_EACH, AT_ONCE, ACTORS = 16, 8, 4, 2
DRAW = DrawConfig(sampler="posterior", steps=150, shard_images=IN_EACH, batch_images=AT_ONCE, actors=ACTORS)
FLAGS = [
    "--draw.sampler=posterior", "--draw.steps=150", f"--draw.shard-images={IN_EACH}",
    f"--draw.batch-images={AT_ONCE}", f"--draw.actors={ACTORS}", f"--seeds=0-{SHARDS * IN_EACH - 1}",
    "--tracking.uri=none",
]  # fmt: skip


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two CPUs: just enough for the actors of one job, and for nothing beside them."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return committed(Folder(str(tmp_path_factory.mktemp("run"))), classes=0)


@pytest.fixture(scope="module")
def expected(run: Folder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards as one process draws them, without Ray."""
    out = tmp_path_factory.mktemp("expected")
    seeds = f"0-{SHARDS * IN_EACH - 1}"
    plan = plan_samples(SampleJob(checkpoint=run.url, out=str(out), seeds=seeds, draw=DRAW))
    list(DrawShard(plan)({"id": np.arange(SHARDS)}))
    return shards(out)


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("part-*.parquet")}


def written_at(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}


@pytest.fixture
def start(address: str, run: Folder, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the job: that of a user, or the same but that its actors leave word of what they have drawn."""
    started: list[subprocess.Popen[str]] = []

    def one(with_words: bool = False) -> subprocess.Popen[str]:
        script = ["-m", "tests.jobs.drawn"] if with_words else ["jobs/sample.py"]
        command = [sys.executable, *script, f"--checkpoint={run.url}", f"--out={tmp_path / 'out'}", *FLAGS]
        log = (tmp_path / f"log-{len(started)}").open("w")
        environment = without_ray() | of_this_cluster() | {"RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=CODE, env=environment, text=True, stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
        started.append(process)
        return process

    yield one
    for process in started:
        if process.poll() is None:
            kill(process)


def finish(process: subprocess.Popen[str], log: Path) -> dict[str, object]:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, log.read_text()[-3000:]
    return dict(json.loads(out.splitlines()[-1]))


def check_the_cost(out: Path, killed: set[int]) -> None:
    """See that all was drawn, and that of what was drawn again each process that was killed had drawn one shard to its
    end at most, and begun another."""
    words = drawn(beside(str(out)))
    times = Counter(one.seed for one in words)
    assert times.keys() == set(range(0, SHARDS * IN_EACH, AT_ONCE))
    assert max(times.values()) <= 2
    for process in killed:
        again = Counter(one.seed // IN_EACH for one in words if one.process == process and times[one.seed] == 2)
        assert len(again) <= 2 and list(again.values()).count(IN_EACH // AT_ONCE) <= 1, again


def test_actors_that_are_killed_cost_what_they_had_not_written(
    start: Callable[..., subprocess.Popen[str]], expected: dict[str, bytes], tmp_path: Path
) -> None:
    out, job = tmp_path / "out", start(with_words=True)
    actors: list[int] = []

    def at_work() -> bool:
        actors[:] = of_session(os.getsid(0), b"ray::MapWorker")
        return len(actors) == ACTORS and len(written_at(out)) >= 3

    wait_for(at_work, job)
    before = written_at(out)
    for actor in actors:
        os.kill(actor, signal.SIGKILL)
    finish(job, tmp_path / "log-0")
    assert shards(out) == expected
    assert before.items() <= written_at(out).items(), "nothing is stored twice"
    check_the_cost(out, set(actors))


def test_a_job_that_is_killed_and_fired_again_draws_what_is_missing(
    start: Callable[..., subprocess.Popen[str]], expected: dict[str, bytes], tmp_path: Path
) -> None:
    out, job = tmp_path / "out", start(with_words=True)
    wait_for(lambda: len(written_at(out)) >= 3, job)
    kill(job)
    # The actors go with their driver; what they write until then counts.
    wait_for_the_end_of_actors()
    before = written_at(out)
    assert 3 <= len(before) < SHARDS and not (out / "_SUCCESS").exists()
    actors = {one.process for one in drawn(beside(str(out)))}
    done = finish(start(with_words=True), tmp_path / "log-1")
    assert done["drawn_now"] == (SHARDS - len(before)) * IN_EACH
    assert shards(out) == expected
    assert before.items() <= written_at(out).items(), "nothing is stored twice"
    check_the_cost(out, actors)


def wait_for_the_end_of_actors() -> None:
    end = time.monotonic() + 60
    while list(of_session(os.getsid(0), b"ray::MapWorker")):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_two_jobs_at_once_make_one_set(
    start: Callable[[], subprocess.Popen[str]], expected: dict[str, bytes], tmp_path: Path
) -> None:
    """There are CPUs for the actors of one of them."""
    one, other = start(), start()
    finish(one, tmp_path / "log-0")
    finish(other, tmp_path / "log-1")
    assert shards(tmp_path / "out") == expected
    verified = subprocess.run(
        [sys.executable, "jobs/sample.py", f"--out={tmp_path / 'out'}", "--verify"],
        check=True, cwd=CODE, text=True, capture_output=True, env=without_ray(),
    )  # fmt: skip
    assert json.loads(verified.stdout.splitlines()[-1])["verified"] == SHARDS * IN_EACH


HALF_A_WRITE = """
import os, signal, sys
import numpy as np
from pipelines.draw_config import DrawConfig
from pipelines.draw_shard import DrawShard
from pipelines.sample_config import SampleJob
from pipelines.sample_plan import claim, plan_samples

draw = DrawConfig(sampler="posterior", steps=150, shard_images=8, batch_images=4)
plan = plan_samples(SampleJob(checkpoint=sys.argv[1], out=sys.argv[2], seeds="0-127", draw=draw))
claim(plan)
list(DrawShard(plan)({"id": np.array([0])}))
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
list(DrawShard(plan)({"id": np.array([1])}))
"""


def test_what_is_killed_while_it_writes_leaves_no_shard(
    run: Folder, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", HALF_A_WRITE, run.url, str(out)], check=False, cwd=CODE)
    assert done.returncode == -signal.SIGKILL
    assert shards(out) == {"part-000000.parquet": expected["part-000000.parquet"]}
    assert len(list(out.iterdir())) == 3, "the claim, a shard, and what was being written"
