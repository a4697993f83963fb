"""On a cluster of several nodes, on one machine: who ingests and who reads where."""

import io
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster

from pipelines.cluster import check_node_labels
from pipelines.config import DataConfig, TrainJob
from pipelines.errors import ConfigurationError
from pipelines.images import View, encode
from pipelines.ingest import IngestJob, ingest, ingest_job
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.plan import Plan
from pipelines.storage import Folder
from pipelines.stream import Deal, batches, open_stream
from pipelines.tracking_config import TrackingConfig
from pipelines.training import train
from tests.pipelines.helpers import WhereItDigests, WhereItReads, WhereItWrites

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


def test_only_nodes_with_the_labels_ingest_and_read(
    nodes: Cluster, folder: Folder, digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large Parquet file, which is spread over both; and where it is done is not in what is made."""
    source, out, buffer = folder / "raw", folder / "data", io.BytesIO()
    pictures = [encode(digit, "png") for digit in digits[0][:256]]
    pq.write_table(pa.table({"image": pictures}), buffer, row_group_size=16)
    source.put("a.parquet", buffer.getvalue())
    monkeypatch.setattr("pipelines.ingest.WritePart", WhereItWrites)
    monkeypatch.setattr("pipelines.ingest.DigestPart", WhereItDigests)
    config = IngestConfig(side=8, channels=1, shard_rows=16, drop_duplicates=True)
    manifest = ingest(IngestPlan.make(source, out, config), {"role": "data"})
    assert manifest.rows == 256
    role = {node["NodeID"]: node["Labels"]["role"] for node in ray.nodes()}
    for task in ("write", "digest"):
        used = [out.get(f"nodes/{task}-{part}").decode() for part in range(16)]
        assert {role[node] for node in used} == {"data"}
        assert len(set(used)) == 2, "both of them"
    assert ingest(IngestPlan.make(source, out, config)) == manifest, "it is finished, wherever it was done"
    deal = Deal(start=0, stop=2048, batch_images=64, micro_images=32, window_batches=2, image_bytes=64)
    plan = Plan(0, 256, manifest.row_group_rows, 128)
    view = View(side=8, channels=1)
    read = WhereItReads(out, manifest, plan, deal, view, False, max_bad_share=0.0, quarantine=folder / "quarantine")
    (shard,) = open_stream(read, {"role": "data"}).streaming_split(1, equal=True)
    rows = [row for batch in batches(shard, deal, 0, 1) for row in batch.row.tolist()]
    assert rows == plan.rows(0, 2048).tolist()
    used = {out.get(f"nodes/read-{window}").decode() for window in deal.windows}
    assert {role[node] for node in used} == {"data"}
    assert len(used) == 2, "both of them"


def test_either_job_ingests_where_it_is_told_to(nodes: Cluster, folder: Folder, digits) -> None:
    """Told of labels that no node has, none does a task of either; told of others then, it is the same ingest."""
    for i in range(64):
        (folder / "raw").put(f"{i}.png", encode(digits[0][i], "png"))
    form = IngestConfig(side=8, channels=1)
    job = IngestJob(source=f"{folder.url}/raw", out=f"{folder.url}/data", ingest=form, node_labels=("role=dat",))
    data = DataConfig(url=job.source, ingest=form, node_labels=job.node_labels)
    training = TrainJob(root=f"{folder.url}/yard", data=data, tracking=TrackingConfig(uri="none"))
    for start in (lambda: ingest_job(job), lambda: train(training)):
        with pytest.raises(ConfigurationError, match=r"node_labels is role=dat; no node of the cluster has that"):
            start()
    (made,) = (folder / "yard" / "data").names()
    for out in (folder / "data", folder / "yard" / "data" / made):
        assert out.names() == ["ingest.json"]
    assert ingest_job(replace(job, node_labels=("role=data",)))["images"] == 64


def test_labels_that_no_node_has_are_said(nodes: Cluster, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    check_node_labels({})
    check_node_labels({"role": "data"})
    with pytest.raises(ConfigurationError, match=r"node_labels is role=dat; no node of the cluster has that"):
        check_node_labels({"role": "dat"})
    assert not caplog.records
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)  # a cluster that nodes may join
    check_node_labels({"role": "dat"})
    assert "reading waits until one joins" in caplog.text
