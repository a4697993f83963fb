"""Reading rows of a data set: whatever the encoding, exactly what was asked for, or a word on why not."""

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import manifest as module
from pipelines.errors import ConfigurationError, DamagedError, DataError
from pipelines.images import View, encode, read_picture
from pipelines.manifest import Manifest
from pipelines.shards import IN_PLACE, PICTURES, Shard, ShardWriter
from pipelines.storage import Folder
from tests.pipelines.hostile import file, photograph

LABELS = ["cat", "dog", "elk"]


def pictures(n: int, side: int = 12) -> np.ndarray:
    """Return n different pictures: uint8 [n, side, side, 3]."""
    whole = np.tile(photograph(), (1, 2, 1))
    return np.stack([np.roll(whole, 5 * i, axis=(0, 1))[:side, i % 40 : i % 40 + side] for i in range(n)])


def label_of(row: int) -> str | None:
    return [*LABELS, None][row % 4]


def write(
    folder: Folder, encoding: Any, n: int = 50, group: int = 7, side: int = 12, broken: Collection[int] = ()
) -> tuple[Manifest, np.ndarray]:
    """Write a data set of three shards; return its manifest and what its rows must look like."""
    stored, schema = pictures(n, side), IN_PLACE if encoding == "in-place" else PICTURES
    raw, shards = folder / "raw", list[Shard]()
    for part, rows in enumerate(np.split(np.arange(n), [20, 39])):
        writer = ShardWriter(folder, f"shard-{part}", schema, 1000, group, "none")
        for i in rows.tolist():
            content = encode(stored[i], encoding if encoding in ("raw", "jpeg") else "png")
            if i in broken:
                content = content[:40] + bytes(len(content) - 40)
            if encoding == "in-place":
                raw.put(f"{i}.png", content)
                (found,) = [found for found in raw.find() if found.name == f"{i}.png"]
                writer.add(*found, label_of(i))
            else:
                writer.add(content, label_of(i), f"{i}.png")
            if encoding == "jpeg":
                stored[i] = read_picture(content, 3, None)
        shards += writer.close()
    fixed = side if encoding not in ("keep", "in-place") else 0
    manifest = Manifest(
        side=fixed, channels=3, encoding=encoding, row_group_rows=group, labels=LABELS, label_counts=[13, 13, 12],
        quarantined=0, source=raw.url, shards=shards,
    )  # fmt: skip
    manifest.save(folder)
    return manifest, stored


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg", "keep", "in-place"])
@pytest.mark.parametrize("view", [None, View(side=8, channels=3, zoom=1.5), View(side=8, channels=1, zoom=1.2)])
def test_rows_come_in_the_order_asked_for(encoding: str, view: View | None, folder: Folder) -> None:
    _, stored = write(folder, encoding)
    view = view or (View(side=12, channels=3) if encoding in ("keep", "in-place") else None)
    rng = np.random.default_rng(0)
    wanted, at = rng.integers(0, 50, 120), rng.random((120, 2))  # some rows twice, some never
    rows = Manifest.load(folder).read(folder, wanted, view, at)
    assert np.array_equal(rows.row, wanted) and not rows.bad
    assert rows.label.tolist() == [-1 if i % 4 == 3 else i % 4 for i in wanted]
    assert rows.image.dtype == np.uint8
    for picture, row, place in zip(rows.image, wanted, at, strict=True):
        exact = stored[row] if view is None else view.of_pixels(stored[row], (place[0], place[1]))
        if encoding == "jpeg" and view:
            assert np.abs(picture.astype(int) - exact).mean() < 12  # grey comes from the file's own luma
        else:
            assert np.array_equal(picture, exact)


def test_the_middle_is_the_default(folder: Folder) -> None:
    manifest, stored = write(folder, "raw")
    view = View(side=8, channels=3, zoom=1.5)
    seen = manifest.read(folder, np.arange(50), view).image
    assert np.array_equal(seen, stored[:, 2:10, 2:10])


def test_no_rows_are_no_rows(folder: Folder) -> None:
    manifest, _ = write(folder, "raw")
    assert manifest.read(folder, np.arange(0)).image.shape == (0, 12, 12, 3)


def test_pictures_of_many_sizes_need_a_view(folder: Folder) -> None:
    for encoding in ("keep", "in-place"):
        manifest, _ = write(folder / encoding, encoding)
        with pytest.raises(ConfigurationError, match="have sizes of their own"):
            manifest.read(folder / encoding, np.arange(3))


def test_only_what_is_needed_is_fetched(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row group by one request, without the paths; each footer once in the life of a process."""
    manifest, _ = write(folder, "raw")
    asked: list[tuple[str, int, int]] = []
    get_range = Folder.get_range

    def counted(self: Folder, name: str, start: int, stop: int) -> bytes:
        asked.append((name, start, stop))
        return get_range(self, name, start, stop)

    monkeypatch.setattr(Folder, "get_range", counted)
    manifest.read(folder, np.arange(50))
    assert len(asked) == 3 + 3 + 3 + 2, "three footers and eight row groups"
    asked.clear()
    manifest.read(folder, np.array([49, 0, 48, 1, 2]))
    assert len(asked) == 2 and len(set(asked)) == 2
    pixels = 12 * 12 * 3
    assert all(stop - start < 7 * pixels + 300 for _, start, stop in asked)


def test_a_remote_folder_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that is not local row groups are on their way side by side."""
    for encoding in ("png", "in-place"):
        folder = Folder(f"memory://manifest-{encoding}")
        manifest, stored = write(folder, encoding)
        wanted = np.random.default_rng(1).permutation(50)
        view = View(side=12, channels=3)
        assert np.array_equal(manifest.read(folder, wanted, view).image, stored[wanted])


@pytest.mark.parametrize("encoding", ["raw", "keep"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_flipped_bit_is_found(encoding: str, share: float, folder: Folder) -> None:
    """Checksums see what a decoder would not: raw pixels have no other guard."""
    manifest, _ = write(folder, encoding, group=1000)
    shard = manifest.shards[0]
    data = bytearray(folder.get(shard.name))
    data[int(share * (len(data) - 2000))] ^= 4
    folder.put(shard.name, bytes(data))
    with pytest.raises(DamagedError, match=rf"{shard.name} cannot be read"):
        manifest.read(folder, np.arange(20), View(side=12, channels=3))
    assert manifest.read(folder, np.arange(20, 50), View(side=12, channels=3)).image.any()


@pytest.mark.parametrize("change", ["shorter", "longer", "gone", "text", "other rows", "other column"])
def test_a_shard_that_is_not_what_the_manifest_says_is_named(change: str, folder: Folder) -> None:
    manifest, _ = write(folder, "raw")
    name, says = manifest.shards[1].name, "ingest the data again"
    data = folder.get(name)
    if change == "gone":
        Path(folder.path(name)).unlink()
        says = "does not exist"
    elif change in ("shorter", "longer"):
        folder.put(name, data[:-100] if change == "shorter" else data + b"\0")
        says = f"has {len(data) + (-100 if change == 'shorter' else 1)} bytes, the manifest says {len(data)}"
    elif change == "text":
        folder.put(name, bytes(len(data)))
        says = "cannot be read"
    else:
        other, _ = write(folder / "other", "in-place" if change == "other column" else "raw", n=45)
        shard = other.shards[2 if change == "other rows" else 1]
        folder.put(name, (folder / "other").get(shard.name))
        says = "has 6 rows, the manifest says 19" if change == "other rows" else "has no column 'image', it has path"
        changed = replace(manifest.shards[1], size_bytes=shard.size_bytes)
        manifest = replace(manifest, shards=[manifest.shards[0], changed, manifest.shards[2]])
    with pytest.raises(DataError, match=says) as caught:
        manifest.read(folder, np.arange(50))
    assert name in str(caught.value)


def test_pictures_of_another_size_than_the_manifest_says_are_refused(folder: Folder) -> None:
    manifest, _ = write(folder, "raw")
    with pytest.raises(DamagedError, match="a picture is not of 13 x 13 x 3 bytes"):
        replace(manifest, side=13).read(folder, np.arange(50))


def test_a_label_that_the_manifest_does_not_know_is_refused(folder: Folder) -> None:
    manifest, _ = write(folder, "raw")
    with pytest.raises(DamagedError, match=r"does not hold what the manifest says: KeyError.'elk'"):
        replace(manifest, labels=["cat", "dog"]).read(folder, np.arange(50))


def test_a_file_in_place_that_has_changed_is_refused(folder: Folder) -> None:
    manifest, _ = write(folder, "in-place")
    raw, view = folder / "raw", View(side=8, channels=3)
    before = raw.get("7.png")
    raw.put("7.png", file(photograph(), "PNG"))
    with pytest.raises(DamagedError, match=r"raw/7.png is not the object that was listed: it has changed since"):
        manifest.read(folder, np.arange(10), view)
    raw.put("7.png", before)
    manifest, _ = write(folder, "in-place")
    assert manifest.read(folder, np.arange(10), view).image.any()
    Path(raw.path("7.png")).unlink()
    with pytest.raises(DataError, match=r"raw/7.png does not exist"):
        manifest.read(folder, np.arange(10), view)


def test_an_unusable_picture_is_replaced_and_named(folder: Folder) -> None:
    """By the next usable row, after the last by the first; whatever else is in the window."""
    stored = pictures(50)
    for bad in ({3}, {48, 49}, {0, 10, 11, 12, 49}):
        here = folder / "-".join(map(str, sorted(bad)))
        writer = ShardWriter(here, "s", PICTURES, 20, 7, "none")
        for i in range(50):
            writer.add(b"no picture" if i in bad else encode(stored[i], "png"), None, f"{i}.png")
        manifest = Manifest(
            side=0, channels=3, encoding="keep", row_group_rows=7, labels=[], label_counts=[], quarantined=0,
            source="", shards=writer.close(),
        )  # fmt: skip
        wanted = np.random.default_rng(0).permutation(50)
        rows = manifest.read(here, wanted, View(side=12, channels=3))
        for asked, row in zip(wanted.tolist(), rows.row.tolist(), strict=True):
            while asked in bad:
                asked = (asked + 1) % 50  # noqa: PLW2901
            assert row == asked
        assert np.array_equal(rows.image, stored[rows.row])
        assert {(entry.row, entry.path) for entry in rows.bad} == {(i, f"{i}.png") for i in bad}
        assert all("cannot identify" in entry.reason for entry in rows.bad) and len(rows.bad) == len(bad)


def test_a_data_set_without_a_usable_picture_is_refused(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SKIPS", 4)
    manifest, _ = write(folder, "in-place", broken=range(10, 20))
    with pytest.raises(DataError, match=r"4 pictures in a row are unusable in .*; the last: 13.png"):
        manifest.read(folder, np.array([9, 10]), View(side=8, channels=3))


def test_the_digest_names_the_data_and_nothing_else(folder: Folder) -> None:
    manifest, _ = write(folder, "in-place")
    assert replace(manifest, source="s3://elsewhere", quarantined=9, duplicates=3).digest == manifest.digest
    assert replace(manifest, side=4).digest != manifest.digest
    found = {entry.name: entry for entry in (folder / "raw").find()}
    for newer in (None, 11):
        other = ShardWriter(folder, "other", IN_PLACE, 1000, 7, "none")
        for i in range(20):
            name, size, version = found[f"{i}.png"]
            other.add(name, size, version + "later" * (i == newer), label_of(i))
        again = replace(other.close()[0], name=manifest.shards[0].name)
        same = replace(manifest, shards=[again, *manifest.shards[1:]]).digest == manifest.digest
        assert same == (newer is None), "a file has changed, or none has"


def test_the_manifest_of_a_million_images_is_small(folder: Folder) -> None:
    manifest, _ = write(folder, "raw")
    many = replace(manifest, shards=[replace(manifest.shards[0], rows=8192)] * 123)
    many.save(folder)
    assert len(folder.get("manifest.json")) < 40_000
    assert Manifest.load(folder).rows == 123 * 8192


def test_a_manifest_changed_by_hand_is_refused(folder: Folder) -> None:
    write(folder, "raw")
    content = json.loads(folder.get("manifest.json"))
    content["shards"][0]["rows"] -= 1
    folder.put("manifest.json", json.dumps(content).encode())
    with pytest.raises(DataError, match="does not agree with its own digest"):
        Manifest.load(folder)
