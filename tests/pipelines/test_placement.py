"""On a cluster of several nodes, on one machine: who reads where."""

from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from pipelines.cluster import check_node_labels
from pipelines.errors import ConfigurationError
from pipelines.images import View, encode
from pipelines.ingest import ingest
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.plan import Plan
from pipelines.storage import Folder
from pipelines.stream import Deal, batches, open_stream
from tests.pipelines.helpers import WhereItReads

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A node that trains, two CPU-only ones that read, told apart by their labels."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "labels": {"role": "trainer"}})
    for _ in range(2):
        cluster.add_node(num_cpus=2, labels={"role": "data"})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_only_nodes_with_the_labels_read(nodes: Cluster, folder: Folder, digits) -> None:
    source, out = folder / "raw", folder / "data"
    for i in range(256):
        source.put(f"{i}.png", encode(digits[0][i], "png"))
    manifest = ingest(IngestPlan.make(source, out, IngestConfig(side=8, channels=1)))
    deal = Deal(start=0, stop=2048, batch_images=64, micro_images=32, window_batches=2, image_bytes=64)
    plan = Plan(0, 256, manifest.row_group_rows, 128)
    view = View(side=8, channels=1)
    read = WhereItReads(out, manifest, plan, deal, view, False, max_bad_share=0.0, quarantine=folder / "quarantine")
    (shard,) = open_stream(read, {"role": "data"}).streaming_split(1, equal=True)
    rows = [row for batch in batches(shard, deal, 0, 1) for row in batch.row.tolist()]
    assert rows == plan.rows(0, 2048).tolist()
    role = {node["NodeID"]: node["Labels"]["role"] for node in ray.nodes()}
    used = {out.get(f"nodes/{window}").decode() for window in deal.windows}
    assert {role[node] for node in used} == {"data"}
    assert len(used) == 2, "both of them"


def test_labels_that_no_node_has_are_said(nodes: Cluster, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    check_node_labels({})
    check_node_labels({"role": "data"})
    with pytest.raises(ConfigurationError, match=r"data.node_labels is role=dat; no node of the cluster has that"):
        check_node_labels({"role": "dat"})
    assert not caplog.records
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)  # a cluster that nodes may join
    check_node_labels({"role": "dat"})
    assert "reading waits until one joins" in caplog.text
