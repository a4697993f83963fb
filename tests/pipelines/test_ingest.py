import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.digits import write_digits
from pipelines.errors import ConfigurationError, DataError, TryAgainError
from pipelines.images import encode
from pipelines.ingest import ingest
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.manifest import Manifest
from pipelines.parts import WritePart
from pipelines.storage import Folder

pytestmark = pytest.mark.ray

CONFIG = IngestConfig(side=8, channels=1, shard_rows=500, row_group_rows=64)
Digits = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = Folder(str(tmp_path_factory.mktemp("raw")))
    write_digits(folder)
    return folder


def write(plan: IngestPlan, part: int) -> None:
    WritePart(plan.source, plan.out, plan.form)(plan.part(part).row())


def times(folder: Folder) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in Path(folder.path()).rglob("*") if path.is_file()}


def test_the_digits_come_through_whole(raw: Folder, folder: Folder, digits: Digits, ray_cluster: None) -> None:
    manifest = ingest(IngestPlan.make(raw, folder, CONFIG))
    assert Manifest.load(folder) == manifest
    assert manifest.rows == 1797 and manifest.quarantined == 0
    assert manifest.labels == [str(i) for i in range(10)]
    assert manifest.label_counts == np.bincount(digits[1]).tolist()
    pixels, labels, rows, bad = manifest.read(folder, np.arange(1797))
    assert np.array_equal(rows, np.arange(1797)) and not bad
    paths = [
        path
        for shard in manifest.shards
        for path in pq.read_table(io.BytesIO(folder.get(shard.name)), columns=["path"])["path"].to_pylist()
    ]
    source = np.array([int(path.split("/")[1].removesuffix(".png")) for path in paths])
    assert np.array_equal(np.sort(source), np.arange(1797)), "each image once"
    assert np.array_equal(pixels, digits[0][source])
    assert np.array_equal(labels, digits[1][source])
    assert abs(np.corrcoef(source, np.arange(1797))[0, 1]) < 0.1, "neighbours come from anywhere"
    assert [shard.rows for shard in manifest.shards] == [500, 500, 500, 297]


def test_a_finished_ingest_writes_nothing(raw: Folder, folder: Folder, ray_cluster: None) -> None:
    first = ingest(IngestPlan.make(raw, folder, CONFIG))
    before = times(folder)
    assert ingest(IngestPlan.make(raw, folder, CONFIG)) == first
    assert times(folder) == before


def test_a_killed_ingest_goes_on_where_it_was(raw: Folder, tmp_path: Path, ray_cluster: None) -> None:
    whole = ingest(IngestPlan.make(raw, Folder(str(tmp_path / "whole")), CONFIG))
    out = Folder(str(tmp_path / "out"))
    plan = IngestPlan.make(raw, out, CONFIG)
    write(plan, 2)
    out.put("shard-000001-0000.parquet", b"a shard whose record was never written")
    before = times(out)["shard-000002-0000.parquet"]
    assert ingest(plan).digest == whole.digest
    assert times(out)["shard-000002-0000.parquet"] == before


@pytest.fixture
def some(tmp_path: Path, digits: Digits) -> Folder:
    """Twenty good images and two bad ones, without labels."""
    folder = Folder(str(tmp_path / "some photographs, ünïcode"))
    for i, picture in enumerate(digits[0][:20]):
        folder.put(f"{i:02d} ü [1] what?*.png", encode(picture, "png"))
    folder.put("truncated.png", encode(digits[0][20], "png")[:60])
    folder.put("empty.jpg", b"")
    folder.put("notes.txt", b"no image, and not taken for one")
    return folder


def test_a_bad_image_costs_itself(some: Folder, folder: Folder, ray_cluster: None) -> None:
    manifest = ingest(IngestPlan.make(some, folder, replace(CONFIG, max_bad_share=0.1)))
    assert (manifest.rows, manifest.quarantined, manifest.labels) == (20, 2, [])
    listed = [json.loads(line) for line in folder.get("quarantine.jsonl").decode().splitlines()]
    assert {entry["path"]: bool(entry["reason"]) for entry in listed} == {"truncated.png": True, "empty.jpg": True}


def test_too_many_bad_images_stop_the_job(some: Folder, folder: Folder, ray_cluster: None) -> None:
    with pytest.raises(DataError, match=r"2 of 22 images are unusable, more than ingest.max_bad_share = 0.05"):
        ingest(IngestPlan.make(some, folder, replace(CONFIG, max_bad_share=0.05)))
    assert not folder.exists("manifest.json")
    assert len(folder.get("quarantine.jsonl").splitlines()) == 2


def test_a_raised_share_goes_on_with_what_was_made(some: Folder, folder: Folder, ray_cluster: None) -> None:
    with pytest.raises(DataError):
        ingest(IngestPlan.make(some, folder, replace(CONFIG, max_bad_share=0.05)))
    before = times(folder)["shard-000000-0000.parquet"]
    assert ingest(IngestPlan.make(some, folder, replace(CONFIG, max_bad_share=0.1))).rows == 20
    assert times(folder)["shard-000000-0000.parquet"] == before


def test_storage_that_fails_costs_no_image(raw: Folder, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(*_: object, **__: object) -> bytes:
        raise ConnectionResetError(104, "Connection reset by peer")

    plan = IngestPlan.make(raw, folder, CONFIG)
    monkeypatch.setattr(type(raw.filesystem), "cat_file", reset)
    with pytest.raises(TryAgainError, match="does not answer"):
        write(plan, 0)
    assert folder.names() == []


def test_no_images_is_a_clear_error(folder: Folder) -> None:
    folder.put("a.txt", b"x")
    with pytest.raises(DataError, match=r"holds no images: none of its 1 files ends in \.png, \.jpg"):
        IngestPlan.make(folder, folder, CONFIG)


def test_another_source_or_form_is_refused(raw: Folder, some: Folder, folder: Folder, ray_cluster: None) -> None:
    ingest(IngestPlan.make(raw, folder, CONFIG))
    for plan in (IngestPlan.make(some, folder, CONFIG), IngestPlan.make(raw, folder, replace(CONFIG, side=16))):
        with pytest.raises(ConfigurationError, match=r"holds an ingest of .*: give another folder"):
            ingest(plan)


def test_a_shard_that_is_not_what_the_manifest_says_is_refused(raw: Folder, folder: Folder, ray_cluster: None) -> None:
    manifest = ingest(IngestPlan.make(raw, folder, CONFIG))
    folder.put(manifest.shards[0].name, folder.get(manifest.shards[3].name))
    with pytest.raises(DataError, match="has 297 rows, the manifest says 500"):
        manifest.read(folder, np.array([0]))
    folder.put(manifest.shards[0].name, b"not parquet at all")
    with pytest.raises(DataError, match="cannot be read"):
        manifest.read(folder, np.array([0]))


def test_a_manifest_changed_by_hand_is_refused(raw: Folder, folder: Folder, ray_cluster: None) -> None:
    ingest(IngestPlan.make(raw, folder, CONFIG))
    content = json.loads(folder.get("manifest.json"))
    content["shards"][0]["rows"] -= 1
    folder.put("manifest.json", json.dumps(content).encode())
    with pytest.raises(DataError, match="does not agree with its own digest"):
        Manifest.load(folder)
