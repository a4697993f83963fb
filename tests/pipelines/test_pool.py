"""A sampling job on a cluster that grows and shrinks under it: real raylets, of which one is killed."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from pipelines import sampling
from pipelines.draw_config import DrawConfig
from pipelines.draw_shard import DrawShard
from pipelines.sample_config import SampleJob
from pipelines.sample_plan import SamplePlan, plan_samples
from pipelines.storage import Folder
from tests.pipelines.committed import committed
from tests.pipelines.helpers import WaitsOnceDrawn, beside, drawn

pytestmark = pytest.mark.ray

SHARDS, IN_EACH, ACTORS = 12, 8, 3


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A node with room for one actor."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def plan(run: Folder, out: Path) -> SamplePlan:
    draw = DrawConfig(steps=3, shard_images=IN_EACH, batch_images=IN_EACH, actors=ACTORS)
    return plan_samples(SampleJob(checkpoint=run.url, out=str(out), seeds=f"0-{SHARDS * IN_EACH - 1}", draw=draw))


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("part-*.parquet")}


def wait_for(condition: Callable[[], bool], job: Future[Any]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert not job.done() and time.monotonic() < end
        time.sleep(0.05)


def test_actors_begin_where_there_is_room_join_with_a_node_and_are_lost_with_it(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of three at first, all three with the node, one without it; and the bytes are those of one process alone."""
    run = committed(Folder(str(tmp_path / "run")), classes=0)
    list(DrawShard(plan(run, tmp_path / "expected"))({"id": np.arange(SHARDS)}))
    monkeypatch.setattr(sampling, "DrawShard", WaitsOnceDrawn)
    home = beside(str(tmp_path / "out"))

    def stand_still(actors: int) -> Callable[[], bool]:
        return lambda: sorted(Counter(one.process for one in drawn(home)).values()) == [2] * actors

    with ThreadPoolExecutor(1) as other:  # Ray adds nodes in the main thread only
        job = other.submit(sampling.draw_samples, plan(run, tmp_path / "out"))
        try:
            wait_for(stand_still(1), job)
            before = drawn(home)
            node = cluster.add_node(num_cpus=ACTORS - 1)
            wait_for(stand_still(ACTORS), job)
            here = drawn(home)
            cluster.remove_node(node, allow_graceful=False)
            lost = {one.process for one in here if one.node == node.node_id}
            wait_for(lambda: not any(Path(f"/proc/{process}").exists() for process in lost), job)  # they may linger
        finally:
            (home / "go").touch()
        assert job.result()["images"] == SHARDS * IN_EACH

    (first,) = {one.node for one in before}
    assert first != node.node_id
    assert Counter(one.node for one in here) == {first: 2, node.node_id: 2 * (ACTORS - 1)}
    assert shards(tmp_path / "out") == shards(tmp_path / "expected")
    times = Counter(one.seed for one in drawn(home))
    twice = {seed for seed, count in times.items() if count > 1}
    assert len(times) == SHARDS and max(times.values()) <= 2
    assert len(twice) == ACTORS - 1, "of what was lost with the node, each actor's one shard that was not yet written"
