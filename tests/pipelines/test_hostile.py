"""Every file of tests/pipelines/hostile.py becomes exactly what it must, and costs no other."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.images import BadImageError, View, as_stored, encode, read_picture
from pipelines.ingest import ingest
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.manifest import Manifest
from pipelines.storage import Folder
from tests.pipelines.hostile import Case, bad, good, write_hostile

pytestmark = [  # Pillow warns of what it then passes over, or refuses
    pytest.mark.filterwarnings("ignore:Corrupt EXIF data"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

CONFIG = IngestConfig(side=32, encoding="raw", max_bad_share=0.5)
KEPT = replace(CONFIG, side=0, encoding="keep")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, dict[str, Case]]:
    folder = Folder(str(tmp_path_factory.mktemp("hostile files")))
    return folder, write_hostile(folder)


@pytest.mark.parametrize(("name", "case"), good().items(), ids=good())
def test_a_good_file_becomes_its_pixels(name: str, case: Case) -> None:
    assert case.pixels is not None
    pixels = read_picture(case.data, channels=3, side=None)
    assert pixels.shape == case.pixels.shape
    difference = np.abs(pixels.astype(int) - case.pixels.astype(int)).mean()
    assert difference <= case.close, difference
    luma = read_picture(case.data, channels=1, side=None)
    assert np.abs(luma[..., 0].astype(int) - np.asarray(Image.fromarray(case.pixels).convert("L"))).mean() <= case.close


@pytest.mark.parametrize(("name", "case"), good().items(), ids=good())
def test_a_view_of_a_good_file_is_a_view_of_its_pixels(name: str, case: Case) -> None:
    assert case.pixels is not None
    view, at = View(side=16, channels=3, zoom=1.25), (0.2, 0.9)
    seen, wanted = view.of_file(case.data, at).astype(int), view.of_pixels(case.pixels, at).astype(int)
    # A JPEG is decoded at a smaller scale: not the same pixels, but the same picture.
    limit = case.close and 8
    assert np.abs(seen - wanted).mean() <= limit


@pytest.mark.parametrize(("name", "case"), bad().items(), ids=bad())
def test_a_bad_file_says_what_is_wrong(name: str, case: Case) -> None:
    for read in (
        lambda: read_picture(case.data, channels=3, side=None),
        lambda: View(side=8, channels=3).of_file(case.data),
    ):
        with pytest.raises(BadImageError) as caught:
            read()
        assert re.search(case.reason, str(caught.value)), str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_stored_picture_of_another_size_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard may be a stranger's too: 100 kB of it would be 64 million pixels."""
    bomb = encode(np.zeros((8000, 8000, 1), np.uint8), "png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(BadImageError, match="8000 x 8000 pixels"):
        as_stored(bomb, (32, 32, 1))


def quarantined(out: Folder) -> dict[str, str]:
    lines = [json.loads(line) for line in out.get("quarantine.jsonl").decode().splitlines()]
    assert len({line["path"] for line in lines}) == len(lines)
    return {line["path"]: line["reason"] for line in lines}


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg", "keep"])
def test_an_ingest_takes_the_good_and_lists_the_bad(
    encoding: str, hostile: tuple[Folder, dict[str, Case]], folder: Folder, alone: None
) -> None:
    raw, cases = hostile
    config = KEPT if encoding == "keep" else replace(CONFIG, encoding=encoding)
    manifest = ingest(IngestPlan.make(raw, folder, config))
    assert manifest == Manifest.load(folder)
    assert manifest.rows == len(good()) and manifest.quarantined == len(bad())
    reasons = quarantined(folder)
    assert reasons.keys() == bad().keys()
    assert all(re.search(cases[name].reason, reason) for name, reason in reasons.items())

    view = View(side=32, channels=3) if encoding == "keep" else None
    rows = manifest.read(folder, np.arange(manifest.rows), view)
    assert not rows.bad
    for name, picture in zip(paths(folder, manifest), rows.image, strict=True):
        wanted = read_picture(cases[name].data, channels=3, side=32).astype(int)
        limit = {"raw": 0, "png": 0, "jpeg": 3, "keep": 8}[encoding]
        assert np.abs(picture.astype(int) - wanted).mean() <= limit, name


def test_in_place_a_bad_file_is_replaced_by_the_next_good_one(
    hostile: tuple[Folder, dict[str, Case]], folder: Folder
) -> None:
    raw, cases = hostile
    manifest = ingest(IngestPlan.make(raw, folder, replace(KEPT, encoding="in-place")))
    assert set(quarantined(folder)) == {"empty.png", "empty.jpg"}, "what the listing tells, and no more"
    names = paths(folder, manifest)
    assert sorted(names) == sorted(name for name, case in cases.items() if case.data)
    wanted = np.random.default_rng(0).permutation(manifest.rows)
    view = View(side=16, channels=3)
    rows = manifest.read(folder, wanted, view)
    assert {bad_row.path for bad_row in rows.bad} == {name for name, case in bad().items() if case.data}
    for bad_row in rows.bad:
        assert names[bad_row.row] == bad_row.path and re.search(cases[bad_row.path].reason, bad_row.reason)
    for asked, row, picture in zip(wanted.tolist(), rows.row.tolist(), rows.image, strict=True):
        while cases[names[asked]].pixels is None:
            asked = (asked + 1) % manifest.rows  # noqa: PLW2901
        assert row == asked
        assert np.array_equal(picture, view.of_file(cases[names[row]].data)), names[row]


def paths(folder: Folder, manifest: Manifest) -> list[str]:
    return [
        path
        for shard in manifest.shards
        for path in pq.read_table(folder.path(shard.name), columns=["path"])["path"].to_pylist()
    ]


def test_a_name_that_is_not_utf_8_is_quarantined(folder: Folder, tmp_path: Path, alone: None) -> None:
    case = good()["plain.png"]
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "good.png").write_bytes(case.data)
    (raw / b"b\xffd.png".decode(errors="surrogateescape")).write_bytes(case.data)
    for i, encoding in enumerate(("raw", "in-place")):
        config = CONFIG if encoding == "raw" else replace(KEPT, encoding=encoding)
        manifest = ingest(IngestPlan.make(Folder(str(raw)), folder / str(i), config))
        assert manifest.rows == 1
        assert quarantined(folder / str(i)) == {r"b\udcffd.png": "its name is not UTF-8"}


def test_a_side_that_jpeg_has_no_room_for_costs_its_image(folder: Folder) -> None:
    for name, width in (("long.png", 65_600), ("fine.png", 8)):
        (folder / "in").put(name, encode(np.zeros((2, width, 3), np.uint8), "png"))
    manifest = ingest(IngestPlan.make(folder / "in", folder / "out", replace(CONFIG, side=0, encoding="jpeg")))
    assert manifest.rows == 1
    ((path, reason),) = quarantined(folder / "out").items()
    assert path == "long.png" and "cannot be written as jpeg" in reason
