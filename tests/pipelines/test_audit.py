import io
import json
import os
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray.data import DataContext

from jobs.audit import main
from pipelines import audit_search
from pipelines.audit import audit_job, dry_run, find
from pipelines.audit_config import AuditJob
from pipelines.audit_plan import plan_audit
from pipelines.config import DataConfig
from pipelines.digits import write_digits
from pipelines.errors import ConfigurationError, DataError
from pipelines.ingest import ingest
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.manifest import Manifest
from pipelines.plan import held_out_rows
from pipelines.sample_set import SampleSet
from pipelines.storage import Folder
from pipelines.tracking_config import TrackingConfig
from tests.pipelines.sample_sets import write_samples
from tests.pipelines.states import ABOUT
from tests.pipelines.test_features import Pooled, put, script

pytestmark = pytest.mark.ray
HELD = 180
EXACT, NOISY, TURNED = (range(0, 40), range(40, 80), range(80, 85))
"""Seeds whose pictures are training images: as they are, with a little noise, and mirrored. The others are new."""
TWIN = 157
"""A new one, a 1 that lies as near to another as a copy would: there are such pairs in the data, and in the control."""


class Yard(NamedTuple):
    """A data set, the checkpoint of a network that was trained on it, and samples that are said to be of that."""

    data: Folder
    samples: Folder
    copied: np.ndarray
    """The row that each of the first seeds was copied from."""
    lineage: dict[str, Any]


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Yard:
    root = Folder(str(tmp_path_factory.mktemp("audit")))
    write_digits(root / "raw")
    form = IngestConfig(side=8, channels=1, shard_rows=600)
    manifest = ingest(IngestPlan.make(root / "raw", root / "data", form))
    held = held_out_rows(manifest.rows, HELD)
    trained = np.setdiff1d(np.arange(manifest.rows), held)
    images = manifest.read(root / "data", np.arange(manifest.rows)).image
    rng = np.random.default_rng(0)
    copied = rng.choice(trained, 85, replace=False)
    pictures = images[copied].astype(float)
    pictures[NOISY.start : NOISY.stop] += rng.normal(size=(40, 8, 8, 1)) * 4
    pictures[TURNED.start :] = pictures[TURNED.start :, :, ::-1]
    everything = np.concatenate([np.rint(pictures.clip(0, 255)).astype(np.uint8), images[held]])
    config = {"data": asdict(DataConfig(url="x", held_out=HELD)), "fit": {"flip": True}}
    checkpoint = replace(ABOUT, config=config, data_digest=manifest.digest, labels=manifest.labels)
    where = root / "run" / "checkpoint-000000000000"
    where.put("manifest.json", json.dumps(asdict(checkpoint)).encode())
    lineage = {
        "checkpoint": where.url, "checkpoint_digest": checkpoint.digest, "position": 0, "tracking_uri": "none",
        "tracking_run": "r", "data_digest": manifest.digest, "data_url": (root / "data").url, "draw": {},
    }  # fmt: skip
    seeds = np.arange(len(everything))
    samples = write_samples(root / "samples", everything, lineage, labels=seeds % 10)
    return Yard(root / "data", samples, copied, lineage)


def rows_of(folder: Folder) -> dict[str, np.ndarray]:
    return {name: column.to_numpy() for name, column in zip(*_columns(folder), strict=True)}


def _columns(folder: Folder) -> Any:
    table = pq.read_table(io.BytesIO(folder.get("audit.parquet")))
    return table.column_names, table.columns


@pytest.fixture(scope="module")
def audited(yard: Yard) -> dict[str, Any]:
    return audit_job(AuditJob(samples=yard.samples.url))


def test_all_copies_are_found_and_nothing_else(yard: Yard, audited: dict[str, Any]) -> None:
    found = rows_of(yard.samples)
    assert np.flatnonzero(found["copy"]).tolist() == [*range(85), TWIN]
    assert found["seed"].tolist() == list(range(265))
    assert found["row"][:85].tolist() == yard.copied.tolist()
    assert found["mirrored"][:85].tolist() == [seed in TURNED for seed in range(85)]
    identical = [*EXACT, *TURNED]
    assert np.flatnonzero(~np.isnan(found["identical_row"].astype(float))).tolist() == identical
    assert not found["distance"][identical].any() and found["distance"][40:80].min() > 0.05


def test_the_report_sets_the_samples_beside_images_that_were_held_out(yard: Yard, audited: dict[str, Any]) -> None:
    samples, control = audited["of_samples"], audited["of_control"]
    assert (samples["n"], samples["copies"]["count"], samples["identical"]) == (265, 86, 45)
    assert (control["n"], control["copies"]["count"], control["identical"]) == (HELD, 1, 0)
    assert audited["excess_share"] == 86 / 265 - 1 / 180
    # The new samples are the held-out images themselves: as often nearer as not; the copies always.
    assert audited["nearer_than_control"] == pytest.approx((85 + 180 * 0.5) / 265)
    assert audited["terms"]["control"] == "held out" and audited["reference_n"] == 1797 - HELD
    assert sum(one["copies"] for one in audited["by_label"].values()) == 86
    assert audited["by_label"]["3"] == {"samples": 27, "copies": 9, "near_duplicates": 0}
    assert json.loads(yard.samples.get("audit.json")) == {k: v for k, v in audited.items() if k not in
                                                          ("audit", "pairs", "recorded")}  # fmt: skip


def test_the_distances_are_those_of_numpy(yard: Yard, audited: dict[str, Any], digits: Any) -> None:
    manifest = Manifest.load(yard.data)
    images = manifest.read(yard.data, np.arange(1797)).image / 255
    kept = np.delete(images, held_out_rows(1797, HELD), axis=0)
    held = images[held_out_rows(1797, HELD)]
    both = [np.sqrt(np.square(view[None] - held[:, None]).sum((2, 3, 4))) for view in (kept, kept[:, :, ::-1])]
    distance = np.sort(np.minimum(*both), axis=1)
    found = rows_of(yard.samples)
    np.testing.assert_allclose(found["distance"][85:], distance[:, 0], atol=1e-12)
    np.testing.assert_allclose(found["ratio"][85:], distance[:, 0] / distance[:, :50].mean(1), atol=1e-12)


def test_the_picture_shows_the_closest_pairs(yard: Yard, audited: dict[str, Any]) -> None:
    with Image.open(io.BytesIO(yard.samples.get("pairs.png"))) as picture:
        assert picture.width > 1000 and picture.height > 400
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100


def test_fired_again_it_writes_nothing_and_otherwise_the_same_bytes(
    yard: Yard, audited: dict[str, Any], folder: Folder
) -> None:
    shutil.copytree(yard.samples.path(), folder.path())
    paths = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(folder.path()).iterdir()}
    assert audit_job(AuditJob(samples=folder.url))["of_samples"] == audited["of_samples"]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(folder.path()).iterdir()} == paths
    Path(folder.path("audit.parquet")).write_bytes(b"half")
    with pytest.raises(ConfigurationError, match=r"holds another audit: its threshold is 0\.333, this job's is 0\.5"):
        audit_job(AuditJob(samples=folder.url, threshold=0.5))
    audit_job(AuditJob(samples=folder.url))
    again = {path.name: path.read_bytes() for path in Path(folder.path()).iterdir()}
    expected = {path.name: data for path, (_, data) in paths.items()}
    told = [json.loads(content.pop("audit.json")) for content in (again, expected)]
    assert again == expected and {**told[0], "samples": ""} == {**told[1], "samples": ""}


def test_no_bit_depends_on_the_blocks_and_without_record_training_images_are_the_control(
    yard: Yard, folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each training image is then judged as if it were not in the data."""
    lineage = yard.lineage | {"checkpoint": (folder / "gone").url}
    pictures = np.concatenate([Manifest.load(yard.data).read(yard.data, np.arange(0, 300, 4)).image] * 2)
    tables = []
    for name, block, piece in (("a", 8192, 256), ("b", 333, 100)):
        monkeypatch.setattr(audit_search, "BLOCK_ROWS", block)
        monkeypatch.setattr(audit_search, "PIECE_IMAGES", piece)
        samples = write_samples(folder / name, pictures, lineage, first=7, shard_images=150 if name == "a" else 40)
        job = AuditJob(samples=samples.url, out=(folder / f"{name}-out").url, control_images=200)
        found = audit_job(job)
        assert (found["terms"]["control"], found["of_control"]["n"], found["of_control"]["identical"]) == (
            "left out", 200, 0,
        )  # fmt: skip
        assert "not known whether images were held out" in found["notes"][1] and "gone" in caplog.text
        tables.append(rows_of(folder / f"{name}-out"))
    assert all(tables[0][name].tobytes() == tables[1][name].tobytes() for name in tables[0])
    assert tables[0]["identical_row"].tolist() == [*range(0, 300, 4)] * 2
    assert tables[0]["nearest_seed"].tolist() == [*range(82, 157), *range(7, 82)]
    assert tables[0]["near_duplicate"].all() and not tables[0]["nearest_seed_distance"].any()


def test_a_network_in_a_file_finds_the_same_in_its_actors_and_the_driver_reads_no_shard(
    yard: Yard, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the mean of 4 x 4 pixels: of each picture four numbers, by which numpy finds the nearest image."""
    images = Manifest.load(yard.data).read(yard.data, np.arange(1797)).image
    samples = write_samples(
        folder / "samples", images[::300], yard.lineage, first=5, labels=np.arange(6), shard_images=2
    )
    features = put(folder, script(Pooled()), batch_images=64, actors=1)
    job = AuditJob(samples=samples.url, features=features, mirrored="no", control_images=0, neighbours=4)
    plan = plan_audit(job)
    with monkeypatch.context() as here:
        here.setattr(SampleSet, "read", None)
        found = find(plan)
    assert found.seed.tolist() == [*range(5, 11)] and found.label.tolist() == [*range(6)]
    pooled = images.reshape(1797, 2, 4, 2, 4).mean((2, 4)).reshape(1797, 4)
    trained = np.setdiff1d(np.arange(1797), held_out_rows(1797, HELD))
    distance = np.sqrt(np.square(pooled[trained][None] - pooled[::300][:, None]).sum(2))
    np.testing.assert_allclose(found.judged.distance, distance.min(1), atol=1e-4)
    several, one = ({told["pid"] for told in audit_search._in_order(process, 6, used)} for used in (None, features))
    assert len(one) == 1 and not one & several


def process(row: dict[str, int]) -> dict[str, Any]:
    time.sleep(0.2)
    return {"pid": os.getpid()}


def test_a_dry_run_says_what_would_be_compared(yard: Yard, folder: Folder) -> None:
    told = dry_run(AuditJob(samples=yard.samples.url, out=folder.url))
    assert (told["samples_n"], told["reference_n"], told["is_there"]) == (265, 1797 - HELD, False)
    assert told["terms"]["mirrored"] is True and not folder.names()


def test_what_cannot_be_audited_is_named(
    yard: Yard, folder: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--samples", yard.data.url]) == 3
    assert "is no finished set of samples" in json.loads(capsys.readouterr().out)["error"]
    assert main(["--samples", yard.samples.url, "--threshold", "1.5"]) == 2
    new = np.zeros((4, 8, 8, 1), np.uint8)
    changed = write_samples(folder / "changed", new, yard.lineage | {"data_digest": "0" * 64})
    with pytest.raises(DataError, match="is not what it was when the network was trained on it"):
        audit_job(AuditJob(samples=changed.url))
    unknown = write_samples(folder / "unknown", new, yard.lineage | {"data_url": ""})
    with pytest.raises(ConfigurationError, match=r"give --reference FOLDER"):
        audit_job(AuditJob(samples=unknown.url))
    larger = write_samples(folder / "larger", np.zeros((4, 9, 9, 1), np.uint8), yard.lineage)
    with pytest.raises(DataError, match=r"samples are 9 x 9 x 1, the images of .* are 8 x 8 x 1; they cannot be"):
        audit_job(AuditJob(samples=larger.url))
    with pytest.raises(DataError, match="1797 images, 1795 of them held out; three must be left"):
        audit_job(AuditJob(samples=yard.samples.url, held_out=1795))
    damaged = write_samples(folder / "damaged", new, yard.lineage)
    damaged.put("part-000000.parquet", damaged.get("part-000000.parquet")[:-9])
    capsys.readouterr()
    monkeypatch.setattr(DataContext.get_current(), "raise_original_map_exception", True)  # as a cluster of our own has
    assert main(["--samples", damaged.url]) == 3
    assert "part-000000.parquet is not what was written" in json.loads(capsys.readouterr().out)["error"]
    damaged.put("manifest.json", b'{"seeds": [0, 3]}')
    with pytest.raises(DataError, match="is not the manifest of samples: it must have"):
        audit_job(AuditJob(samples=damaged.url))


def test_the_shares_and_the_picture_join_the_run_that_trained_the_network(
    yard: Yard, folder: Folder, mlflow_on_sqlite: str
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=mlflow_on_sqlite)
    run = client.create_run("0", tags={"brickyard.run": "audited"}).info.run_id
    client.set_terminated(run)
    trained = np.setdiff1d(np.arange(1797), held_out_rows(1797, HELD))
    new = Manifest.load(yard.data).read(yard.data, trained[:5]).image
    samples = write_samples(
        folder / "samples", new, yard.lineage | {"tracking_uri": mlflow_on_sqlite, "tracking_run": "audited"}
    )
    assert not audit_job(AuditJob(samples=samples.url))["recorded"], "nobody but the samples names the server"
    tracking = TrackingConfig(uri=mlflow_on_sqlite)
    for _ in range(2):  # the second time nothing is recorded twice
        told = audit_job(AuditJob(samples=samples.url, tracking=tracking))
        assert told["recorded"]
    metrics = {name: client.get_metric_history(run, name) for name in client.get_run(run).data.metrics}
    assert {name: [metric.value for metric in told] for name, told in metrics.items()} == {
        "copied_share": [1],
        "copied_share_control": [told["of_control"]["copies"]["count"] / HELD],
        "near_duplicate_share": [0],
    }  # fmt: skip
    assert [file.path for file in client.list_artifacts(run)] == ["pairs-0.png"]
