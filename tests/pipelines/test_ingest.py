"""An ingest makes the same data set whatever happens on the way, once."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.digits import write_digits
from pipelines.errors import ConfigurationError, DataError, TryAgainError
from pipelines.images import View, encode
from pipelines.ingest import IngestJob, dry_run, ingest, ingest_job
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.manifest import Manifest
from pipelines.parts import DigestPart, Part, WritePart, as_row, do, find_duplicates, rows_for
from pipelines.retries import retries
from pipelines.storage import Folder
from pipelines.stored import Stored
from tests.processes import CODE, kill, without_ray

CONFIG = IngestConfig(side=8, channels=1, shard_rows=500, row_group_rows=64)
Digits = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = Folder(str(tmp_path_factory.mktemp("raw")))
    write_digits(folder)
    return folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Folder:
    """Every digit in ten tars, and every seventh once more at the end of the next; in the last a broken one."""
    folder, contents = Folder(str(tmp_path_factory.mktemp("tars"))), [encode(digit, "png") for digit in digits[0]]
    for t in range(10):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as file:
            rows = np.concatenate([np.arange(t, 1797, 10), np.arange(t - 1, 1797, 10)[::7] if t else np.arange(0)])
            for place, i in enumerate(rows.tolist()):
                add(file, f"{place:04d}.png", contents[i])
                add(file, f"{place:04d}.cls", str(digits[1][i]).encode())
            if t == 9:
                add(file, "broken.png", contents[0][:50])
        folder.put(f"{t}.tar", buffer.getvalue())
    return folder


def add(file: tarfile.TarFile, name: str, data: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(data)
    file.addfile(about, io.BytesIO(data))


def write(plan: IngestPlan, part: int) -> None:
    WritePart(plan.source, plan.out, plan.form)(as_row([plan.part(part)]))


def times(folder: Folder) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in Path(folder.path()).rglob("*") if path.is_file()}


def contents(folder: Folder) -> dict[str, bytes]:
    """What a killed process was about to put has a name of its own, which nobody asks for."""
    return {found.name: folder.get(found.name) for found in folder.find() if "/." not in f"/{found.name}"}


def paths(folder: Folder, manifest: Manifest) -> list[str]:
    return [
        path
        for shard in manifest.shards
        for path in pq.read_table(folder.path(shard.name), columns=["path"])["path"].to_pylist()
    ]


@pytest.mark.ray
def test_the_digits_come_through_whole(raw: Folder, folder: Folder, digits: Digits, ray_cluster: None) -> None:
    manifest = ingest(IngestPlan.make(raw, folder, CONFIG))
    assert Manifest.load(folder) == manifest
    assert manifest.rows == 1797 and manifest.quarantined == 0
    assert manifest.labels == [str(i) for i in range(10)]
    assert manifest.label_counts == np.bincount(digits[1]).tolist()
    read = manifest.read(folder, np.arange(1797))
    source = np.array([int(path.split("/")[1].removesuffix(".png")) for path in paths(folder, manifest)])
    assert np.array_equal(np.sort(source), np.arange(1797)), "each image once"
    assert np.array_equal(read.image, digits[0][source])
    assert np.array_equal(read.label, digits[1][source])
    assert abs(np.corrcoef(source, np.arange(1797))[0, 1]) < 0.1, "neighbours come from anywhere"
    assert [shard.rows for shard in manifest.shards] == [500, 500, 500, 297]


@pytest.mark.ray
def test_what_other_processes_asked_again_is_summed(ray_cluster: None) -> None:
    def task(row: dict[str, bytes]) -> dict[str, int]:
        return {"part": pickle.loads(row["run"])[0].number, "images": 1, "bad": 0, "retries": 3}

    runs = [[Part(number, [Stored(f"{number}.png", 1, "")], {})] for number in range(4)]
    before = retries()
    do(runs, task, on_cluster=True)
    assert retries() - before == 12
    do(runs, task, on_cluster=False)
    assert retries() - before == 12, "this process counts its own where they are made"


@pytest.mark.ray
def test_an_ingest_that_is_killed_goes_on_to_the_same_bytes(tars: Folder, tmp_path: Path, alone: None) -> None:
    """SIGKILL to the job and all below it while it writes; some digests of duplicates are there from before."""
    config = replace(CONFIG, drop_duplicates=True, row_group_rows=32)
    flags = ["--ingest.side=8", "--ingest.channels=1", "--ingest.drop-duplicates", "--ingest.row-group-rows=32",
             "--ingest.shard-rows=500"]  # fmt: skip
    out, whole = (IngestPlan.make(tars, Folder(str(tmp_path / name)), config) for name in ("out", "whole"))
    for part in (1, 7):
        DigestPart(out.source, out.out)(as_row([out.part(part)]))
    stands_still = (
        "from jobs.ingest import main; from pipelines import ingest; from tests.pipelines.helpers import WritesTwo\n"
        "ingest.WritePart = WritesTwo; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", stands_still, "--source", tars.url, "--out", out.out.url, *flags],
        cwd=CODE, env=without_ray() | {"PYTHONPATH": str(CODE)}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    while len((out.out / "records").names()) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    kill(process)
    before = contents(out.out)
    assert "manifest.json" not in before and len((out.out / "records").names()) == 2
    manifest = ingest(out)
    assert ingest(whole) == manifest
    assert contents(out.out) == contents(whole.out)
    assert all(contents(out.out)[name] == data for name, data in before.items())
    assert (manifest.rows, manifest.quarantined) == (1797, 1)


def test_the_first_of_each_is_kept(tars: Folder, folder: Folder, digits: Digits, alone: None) -> None:
    config = replace(CONFIG, drop_duplicates=True)
    manifest = ingest(IngestPlan.make(tars, folder, config))
    assert manifest.rows == 1797
    assert manifest.label_counts == np.bincount(digits[1]).tolist()
    listed = [json.loads(line) for line in folder.get("duplicates.jsonl").decode().splitlines()]
    assert manifest.duplicates == len(listed) == sum(len(np.arange(t - 1, 1797, 10)[::7]) for t in range(1, 10))
    for line in listed:
        (t, member), (first, same) = (path.split("/") for path in (line["path"], line["same_as"]))
        assert int(t[0]) == int(first[0]) + 1, "the one that comes later goes"
        assert int(member[:4]) >= len(np.arange(int(t[0]), 1797, 10)) and int(same[:4]) % 7 == 0
    kept = paths(folder, manifest)
    assert len(set(kept)) == 1797 and not set(kept) & {line["path"] for line in listed}
    assert manifest.read(folder, np.arange(1797)).image.sum(dtype=int) == digits[0].sum(dtype=int)


@pytest.mark.parametrize("encoding", ["raw", "in-place"])
def test_duplicates_among_files_do_not_hang_on_the_order_of_shards(
    encoding: str, folder: Folder, digits: Digits, alone: None
) -> None:
    source = folder / "source"
    for i in range(60):
        source.put(f"{i:02d}.png", encode(digits[0][i % 20], "png"))
    source.put("empty-1.png", b"")
    source.put("empty-2.png", b"")
    config = replace(CONFIG, drop_duplicates=True, shard_rows=7, row_group_rows=4, max_bad_share=0.2)
    config = config if encoding == "raw" else replace(config, encoding="in-place", side=0)
    manifest = ingest(IngestPlan.make(source, folder / "out", config))
    assert sorted(paths(folder / "out", manifest)) == [f"{i:02d}.png" for i in range(20)]
    assert (manifest.duplicates, manifest.quarantined) == (40, 2), "empty files are bad, each for itself"
    listed = [json.loads(line) for line in (folder / "out").get("duplicates.jsonl").decode().splitlines()]
    assert listed == [{"path": f"{i:02d}.png", "same_as": f"{i % 20:02d}.png"} for i in range(20, 60)]


def test_duplicates_are_found_by_their_digest() -> None:
    found = [[("b", "1"), ("z", ""), ("c", "2")], [("a", "1"), ("y", ""), ("d", "1")], []]
    by_path = find_duplicates(found, by_path=True)
    assert [(d.part, d.place, d.path, d.same_as) for d in by_path] == [(0, 0, "b", "a"), (1, 2, "d", "a")]
    as_given = find_duplicates(found, by_path=False)
    assert [(d.part, d.place, d.path, d.same_as) for d in as_given] == [(1, 0, "a", "b"), (1, 2, "d", "b")]
    assert find_duplicates([[]], by_path=True) == [] and find_duplicates([[("a", "")] * 3], by_path=True) == []


def test_tars_and_parquet_come_through_whole(tars: Folder, folder: Folder, digits: Digits, alone: None) -> None:
    """In their own order, in shards of the size that was said; and the same from both."""
    config = replace(CONFIG, shard_rows=64, row_group_rows=16)
    rows = np.arange(1797)
    for f, some in enumerate(np.split(rows, [100, 164, 1000])):
        images = pa.array([{"bytes": encode(digits[0][i], "png"), "path": ""} for i in some])
        buffer = io.BytesIO()
        pq.write_table(pa.table({"image": images, "label": digits[1][some]}), buffer, row_group_size=50)
        (folder / "parquet").put(f"{f}.parquet", buffer.getvalue())
    manifest = ingest(IngestPlan.make(folder / "parquet", folder / "a", config))
    assert [shard.rows for shard in manifest.shards][:4] == [64, 36, 64, 64]
    read = manifest.read(folder / "a", rows)
    assert np.array_equal(read.image, digits[0]) and np.array_equal(read.label, digits[1])
    assert manifest.labels == [str(i) for i in range(10)]

    manifest = ingest(IngestPlan.make(tars, folder / "b", replace(config, drop_duplicates=True)))
    order = np.concatenate([np.arange(t, 1797, 10) for t in range(10)])
    read = manifest.read(folder / "b", rows)
    assert np.array_equal(read.image, digits[0][order]) and np.array_equal(read.label, digits[1][order])


def test_training_from_raw_files_needs_no_copy(raw: Folder, folder: Folder, digits: Digits) -> None:
    config = IngestConfig(side=0, channels=1, encoding="in-place")
    manifest = ingest(IngestPlan.make(raw, folder, config))  # no Ray, and nothing is fetched
    assert sum(shard.size_bytes for shard in manifest.shards) < 60 * 1797
    source = np.array([int(path.split("/")[1].removesuffix(".png")) for path in paths(folder, manifest)])
    rows = np.random.default_rng(0).permutation(1797)[:300]
    read = manifest.read(folder, rows, View(side=8, channels=1))
    assert np.array_equal(read.image, digits[0][source[rows]])
    assert np.array_equal(read.label, digits[1][source[rows]])
    assert manifest.label_counts == np.bincount(digits[1]).tolist()


def test_a_source_in_place_that_has_changed_is_another_data_set(folder: Folder, digits: Digits) -> None:
    source, config = folder / "source", IngestConfig(side=0, channels=1, encoding="in-place")
    for i in range(20):
        source.put(f"{i}.png", encode(digits[0][i], "png"))
    first = ingest(IngestPlan.make(source, folder / "a", config))
    assert ingest(IngestPlan.make(source, folder / "b", config)).digest == first.digest
    os.utime(source.path("7.png"), (1, 1))
    with pytest.raises(ConfigurationError, match="holds an ingest of"):
        ingest(IngestPlan.make(source, folder / "a", config))
    assert ingest(IngestPlan.make(source, folder / "c", config)).digest != first.digest


def test_a_source_in_place_that_has_moved_is_another_data_set(folder: Folder, digits: Digits) -> None:
    """To read there what was listed here would fail, or find something else. Of a copy it does not matter."""
    for i in range(20):
        (folder / "here").put(f"{i}.png", encode(digits[0][i], "png"))
    shutil.copytree((folder / "here").path(), (folder / "there").path())  # with its times
    here, there = folder / "here", folder / "there"
    assert here.find() == there.find()
    in_place = IngestConfig(side=0, channels=1, encoding="in-place")
    one, other = (IngestPlan.make(source, folder / "a", in_place) for source in (here, there))
    assert one.digest != other.digest
    ingest(one)
    with pytest.raises(ConfigurationError, match=r"holds an ingest of .*/here as it was"):
        ingest(other)
    copied = [IngestPlan.make(source, folder / "b", CONFIG).digest for source in (here, there)]
    assert copied[0] == copied[1]


def test_a_finished_ingest_writes_nothing(raw: Folder, folder: Folder, alone: None) -> None:
    first = ingest(IngestPlan.make(raw, folder, CONFIG))
    before = times(folder)
    assert ingest(IngestPlan.make(raw, folder, CONFIG)) == first
    assert times(folder) == before


def test_an_ingest_goes_on_where_it_was(raw: Folder, tmp_path: Path, alone: None) -> None:
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


def test_too_many_bad_images_stop_the_job(some: Folder, folder: Folder, alone: None) -> None:
    with pytest.raises(DataError, match=r"2 of 22 images are unusable, more than ingest.max_bad_share = 0.05"):
        ingest(IngestPlan.make(some, folder, replace(CONFIG, max_bad_share=0.05)))
    assert not folder.exists("manifest.json")
    assert len(folder.get("quarantine.jsonl").splitlines()) == 2
    before = times(folder)["shard-000000-0000.parquet"]
    assert ingest(IngestPlan.make(some, folder, replace(CONFIG, max_bad_share=0.1))).rows == 20
    assert times(folder)["shard-000000-0000.parquet"] == before, "a raised share goes on with what was made"


def test_too_many_broken_tars_stop_the_job(tars: Folder, folder: Folder, alone: None) -> None:
    """However few images are known to be lost with them: nobody knows how many were in there."""
    for name, data in contents(tars).items():
        (folder / "tars").put(name, data if name != "3.tar" else data[: len(data) // 2 // 512 * 512])
    with pytest.raises(DataError, match=r"1 of 10 files are unusable.*the first: 3.tar: .*is cut off or damaged"):
        ingest(IngestPlan.make(folder / "tars", folder / "out", replace(CONFIG, max_bad_share=0.05)))
    manifest = ingest(IngestPlan.make(folder / "tars", folder / "out", replace(CONFIG, max_bad_share=0.1)))
    assert manifest.quarantined == 2 and 1900 < manifest.rows < 2050


def test_nothing_but_bad_images_is_no_data_set(folder: Folder, alone: None) -> None:
    (folder / "a").put("a.png", b"x")
    with pytest.raises(DataError, match="1 of 1 images are unusable"):
        ingest(IngestPlan.make(folder / "a", folder / "out", replace(CONFIG, max_bad_share=1.0)))


def test_storage_that_fails_costs_no_image(raw: Folder, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(*_: object, **__: object) -> bytes:
        raise ConnectionResetError(104, "Connection reset by peer")

    plan = IngestPlan.make(raw, folder, CONFIG)
    monkeypatch.setattr(type(raw.filesystem), "cat_file", reset)
    with pytest.raises(TryAgainError, match="does not answer"):
        write(plan, 0)
    assert folder.names() == []


def test_another_source_or_form_is_refused(raw: Folder, some: Folder, folder: Folder, alone: None) -> None:
    ingest(IngestPlan.make(raw, folder, CONFIG))
    refused = pytest.raises(ConfigurationError, match=rf"holds an ingest of {raw.url} as it was.*: give another folder")
    for source, config in ((some, CONFIG), (raw, replace(CONFIG, side=16))):
        plan = IngestPlan.make(source, folder, config)
        for ask in (lambda plan=plan: ingest(plan), lambda plan=plan: plan.complete, plan.finished):
            with refused:
                ask()
        with refused:
            dry_run(IngestJob(source=source.url, out=folder.url, ingest=config))
    # As long as it is not finished, too; and of a data set without a word of which ingest it is.
    (folder / "begun").put("ingest.json", folder.get("ingest.json"))
    (folder / "other").put("manifest.json", folder.get("manifest.json"))
    for name, source in (("begun", some), ("other", some), ("other", raw)):
        with refused:
            dry_run(IngestJob(source=source.url, out=(folder / name).url, ingest=CONFIG))
        with refused:
            ingest(IngestPlan.make(source, folder / name, CONFIG))
    assert (folder / "other").names() == ["manifest.json"]
    plan = IngestPlan.make(raw, folder / "begun", CONFIG)
    assert not plan.complete and plan.finished() is None


def test_labels_of_a_list(some: Folder, folder: Folder, tmp_path: Path, alone: None) -> None:
    lines = [f'"{i:02d} ü [1] what?*.png",{"odd" if i % 2 else "even"}' for i in range(19)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *lines, "elsewhere.png,third"]), encoding="utf-8")
    config = replace(CONFIG, labels=str(tmp_path / "labels.csv"), max_bad_share=0.2)
    manifest = ingest(IngestPlan.make(some, folder, config))
    assert manifest.labels == ["even", "odd", "third"] and manifest.label_counts == [10, 9, 0]
    assert manifest.quarantined == 3
    assert "19 ü [1] what?*.png" in folder.get("quarantine.jsonl").decode()
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *lines]), encoding="utf-8")
    with pytest.raises(ConfigurationError, match="holds an ingest of"):
        ingest(IngestPlan.make(some, folder, config))


def test_captions_are_no_labels(folder: Folder, digits: Digits, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.ingest.MAX_LABELS", 9)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for i in range(10):
            add(file, f"{i}.png", encode(digits[0][i], "png"))
            add(file, f"{i}.txt", f"the digit number {i}".encode())
    (folder / "tars").put("a.tar", buffer.getvalue())
    says = r"has 10 different labels, such as 'the digit number 9': are these captions\? Set ingest.labels to none"
    with pytest.raises(DataError, match=says):
        ingest(IngestPlan.make(folder / "tars", folder / "out", CONFIG))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"side": 0, "encoding": "raw"}, "ingest.side is 0 and ingest.encoding raw"),
        ({"side": 8, "encoding": "keep"}, "keep, which leaves.*: set ingest.side to 0"),
        ({"side": 8, "encoding": "in-place"}, "in-place, which leaves.*: set ingest.side to 0"),
        ({"labels": "folders"}, "ingest.labels is 'folders'; it must be folder, none, or the URL of a CSV file"),
        ({"labels": ""}, "it must be folder, none, or the URL of a CSV file"),
        ({"side": 4097}, "must lie in 1..4096"),
        ({"jpeg_quality": 0}, "must lie in 1..100"),
        ({"shard_rows": -1}, "ingest.shard_rows is -1"),
        ({"row_group_rows": -1}, "ingest.row_group_rows is -1"),
        ({"max_bad_share": 1.5}, "must lie in 0..1"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        replace(CONFIG, **changes)


def test_tars_cannot_be_read_in_place(tars: Folder, folder: Folder) -> None:
    with pytest.raises(ConfigurationError, match="holds files of kind tar; only image files can be read in place"):
        IngestPlan.make(tars, folder, IngestConfig(side=0, encoding="in-place"))


def test_rows_are_made_for_windows() -> None:
    """About a megabyte, 1 to 128 rows; shards of whole row groups of about 64."""
    assert rows_for(64, 0, 0) == (128, 8192)
    assert rows_for(64 * 64 * 3, 0, 0) == (85, 64 * 85)
    assert rows_for(5 << 20, 0, 0) == (1, 12)
    assert rows_for(1 << 30, 0, 0) == (1, 1)
    assert rows_for(64, 10, 0) == (10, 8190) and rows_for(64, 10, 7) == (10, 7)


def test_a_job_says_what_it_did_and_would_do(some: Folder, folder: Folder, alone: None) -> None:
    job = IngestJob(source=some.url, out=folder.url, ingest=replace(CONFIG, max_bad_share=0.1, drop_duplicates=True))
    would = dry_run(job)
    assert folder.names() == []
    assert (would["images"], would["files"], would["source_kind"], would["parts"]) == (22, 22, "files", 1)
    did = ingest_job(job)
    assert (did["images"], did["quarantined"], did["duplicates"], did["shards"]) == (20, 2, 0, 1)
    assert did["digest"] == Manifest.load(folder).digest
    assert dry_run(job)["complete"]


@pytest.mark.parametrize(("source", "out"), [("a", "a"), ("a", "a/b/c"), ("a/b", "a")])
@pytest.mark.parametrize("root", ["", "memory://nested"])
def test_a_data_set_does_not_lie_in_its_own_source(source: str, out: str, root: str, tmp_path: Path) -> None:
    """Or the next listing would find it there."""
    above = Folder(root or str(tmp_path))
    (above / source).put("a.png", b"x")
    with pytest.raises(ConfigurationError) as caught:
        IngestPlan.make(above / source, above / out, CONFIG)
    says = f"the data set is to be {above.url}/{out}, and its source is {above.url}/{source}: one lies in the other"
    assert says in str(caught.value) and "give a folder beside the source" in str(caught.value)


def test_a_data_set_may_lie_beside_its_source(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "a.png").write_bytes(b"x")
    plan = IngestPlan.make(Folder(str(tmp_path / "digits")), Folder(str(tmp_path / "digits-8x8")), CONFIG)
    assert plan.parts == 1
    (tmp_path / "link").symlink_to(tmp_path / "digits")
    with pytest.raises(ConfigurationError, match="one lies in the other"):
        IngestPlan.make(Folder(str(tmp_path / "link")), Folder(str(tmp_path / "digits" / "out")), CONFIG)


def test_images_beside_the_folders_of_labels_are_named(
    folder: Folder, digits: Digits, alone: None, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("cat/a.png", "dog/b.png"):
        (folder / "raw").put(name, encode(digits[0][0], "png"))
    assert IngestPlan.make(folder / "raw", folder / "out", CONFIG).labels == ["cat", "dog"] and not caplog.text
    for i in range(5):
        (folder / "raw").put(f"stray-{i}.png", encode(digits[0][0], "png"))
    assert IngestPlan.make(folder / "raw", folder / "out", CONFIG).labels == []
    (record,) = caplog.records
    assert record.name == "brickyard.ingest" and record.levelname == "WARNING"
    says = (
        "5 of 7 images lie in no folder, such as stray-0.png, stray-1.png, stray-2.png; therefore no labels are taken"
    )
    assert says in record.message and "move them into folders, or set ingest.labels to none" in record.message
    caplog.clear()
    assert IngestPlan.make(folder / "raw", folder / "out", replace(CONFIG, labels="none")).labels == []
    (folder / "flat").put("a.png", b"x")
    assert IngestPlan.make(folder / "flat", folder / "out", CONFIG).labels == [] and not caplog.text


def test_a_label_column_that_is_in_no_file_is_refused(folder: Folder, digits: Digits, alone: None) -> None:
    """Unless nobody asked for it: by default there is one or there is none."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [encode(digits[0][0], "png")], "kind": ["cat"]}), buffer)
    (folder / "raw").put("broken.parquet", b"no Parquet")
    (folder / "raw").put("a.parquet", buffer.getvalue())
    (folder / "raw").put("b.parquet", buffer.getvalue())
    config = replace(CONFIG, max_bad_share=0.9)
    with pytest.raises(ConfigurationError, match=r"ingest.label_column is 'kinds'; .* the columns image, kind: set it"):
        IngestPlan.make(folder / "raw", folder / "out", replace(config, label_column="kinds"))
    made = IngestPlan.make(folder / "raw", folder / "out", replace(config, label_column="kinds", labels="none"))
    assert made.labels == [], "no column is asked for"
    assert ingest(IngestPlan.make(folder / "raw", folder / "a", replace(config, label_column="kind"))).labels == ["cat"]
    assert ingest(IngestPlan.make(folder / "raw", folder / "b", config)).labels == []
    (folder / "bad").put("broken.parquet", b"no Parquet")
    assert IngestPlan.make(folder / "bad", folder / "out", replace(config, label_column="kind")).parts == 1


def test_files_without_any_image_are_no_data_set(folder: Folder, alone: None) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), buffer)
    for name in ("a.parquet", "b.parquet"):
        (folder / "parquet").put(name, buffer.getvalue())
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        add(file, "notes.md", b"x")
    (folder / "tar").put("a.tar", buffer.getvalue())
    for kind, files in (("parquet", 2), ("tar", 1)):
        for duplicates in (False, True):
            config = replace(CONFIG, drop_duplicates=duplicates)
            with pytest.raises(DataError, match=rf"no images in {files} files of kind {kind} below .*/{kind}; check"):
                ingest(IngestPlan.make(folder / kind, folder / f"{kind}-{duplicates}", config))


def test_labels_of_a_list_go_to_the_tars_that_they_are_of(folder: Folder) -> None:
    """Looked through once, however many tars there are; a tar in a folder named like a tar is of both."""
    names = ["a.tar", "a.tar/b.tar", "ab.tar", "x/a.tar"]
    for name in names[1:]:  # a file system has no file and folder of one name; an object store may
        (folder / "raw").put(name, b"x")
    paths = ["a.tar/1.png", "a.tar/b.tar/d/2.png", "ab.tar/3.png", "x/a.tar/4.png", "x/5.png", "a.tar", "z.tar/6.png"]
    folder.put("labels.csv", "\n".join(["path,label", *(f"{path},{path[-5:]}" for path in paths)]).encode())
    plan = IngestPlan.make(folder / "raw", folder / "out", replace(CONFIG, labels=f"{folder.url}/labels.csv"))

    class Counted(dict[str, str]):
        looks = 0

        def items(self) -> Any:
            Counted.looks += 1
            return super().items()

    plan = replace(plan, files=[Stored("a.tar", 1, ""), *plan.files], listed=Counted(plan.listed))
    assert [part.files[0].name for part in map(plan.part, range(plan.parts))] == names
    assert [list(plan.part(number).listed) for number in range(4)] == [[paths[0], paths[1]], *([p] for p in paths[1:4])]
    assert Counted.looks == 1


def test_a_part_that_is_done_is_not_made_again(raw: Folder, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = IngestPlan.make(raw, folder, replace(CONFIG, side=0, encoding="in-place", drop_duplicates=False))
    ingest(plan)
    (Path(folder.path("manifest.json"))).unlink()
    (Path(folder.path("records/000002.json"))).unlink()
    made: list[int] = []
    part = IngestPlan.part
    monkeypatch.setattr(IngestPlan, "part", lambda self, n, *dropped: made.append(n) or part(self, n, *dropped))
    ingest(plan)
    assert made == [2]
