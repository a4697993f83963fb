import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import DamagedError, DataError
from pipelines.images import View, encode
from pipelines.ingest import ingest
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.manifest import Manifest
from pipelines.plan import Plan, held_out_rows, uniforms
from pipelines.shards import PICTURES, ShardWriter
from pipelines.storage import Folder
from pipelines.stream import Batch, Deal, ReadWindow, StreamOrderError, batches, open_stream

Digits = tuple[np.ndarray, np.ndarray]
Ledger = dict[int, int]
"""Position to row, of every image that a worker was given."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> tuple[Folder, Manifest]:
    """The digits in shards of uneven sizes, none of them a multiple of a row group."""
    folder, shards = Folder(str(tmp_path_factory.mktemp("digits"))), []
    for i, rows in enumerate(np.split(np.arange(1797), [500, 517, 1300])):
        writer = ShardWriter(folder, f"part-{i}", PICTURES, 10_000, 128, "none")
        for row in rows:
            writer.add(encode(digits[0][row], "raw"), str(digits[1][row]), f"{row}.png")
        shards += writer.close()
    manifest = Manifest(
        side=8, channels=1, encoding="raw", row_group_rows=128, labels=[str(digit) for digit in range(10)],
        label_counts=np.bincount(digits[1]).tolist(), quarantined=0, source="", shards=shards,
    )  # fmt: skip
    manifest.save(folder)
    return folder, manifest


def test_rows_are_read_in_any_order_across_shards(data: tuple[Folder, Manifest], digits: Digits) -> None:
    folder, _ = data
    rows = np.random.default_rng(0).permutation(1797)[:700]
    found = Manifest.load(folder).read(folder, rows)
    assert np.array_equal(found.image, digits[0][rows])
    assert np.array_equal(found.label, digits[1][rows])


VIEW = View(side=8, channels=1)


def read(data: tuple[Folder, Manifest], deal: Deal, view: View = VIEW, random_crop: bool = False) -> ReadWindow:
    folder, manifest = data
    plan = Plan(0, manifest.rows, manifest.row_group_rows, deal.window_batches * deal.batch_images)
    return ReadWindow(folder, manifest, plan, deal, view, random_crop, 0.01, quarantine=folder / "quarantine")


def joined(parts: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The columns of a window, whole."""
    several = list(parts)
    return {name: np.concatenate([part[name] for part in several]) for name in several[0]}


def consume(task: ReadWindow, world: int, check: Callable[[Batch], None]) -> Ledger:
    """Stream to ``world`` consumers side by side; return what they were given."""
    deal = task.deal
    shards = open_stream(task).streaming_split(world, equal=True)
    ledgers: list[Ledger] = [{} for _ in range(world)]
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            taken = list(batches(shards[rank], deal, rank, world))
            assert len(taken) == (deal.stop - deal.start) // deal.batch_images * -(-deal.micro_batches // world)
            for batch in (batch for batch in taken if batch.counted):
                check(batch)
                for position, row in zip(batch.position.tolist(), batch.row.tolist(), strict=True):
                    assert position not in ledgers[rank]
                    ledgers[rank][position] = row
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not errors, errors
    assert sum(map(len, ledgers)) == len(set().union(*ledgers)), "an image went to two workers"
    step = [{position // deal.batch_images for position in ledger} for ledger in ledgers]
    assert all(steps == step[0] for steps in step), "every worker has a part of every global batch"
    return {position: row for ledger in ledgers for position, row in ledger.items()}


@pytest.mark.ray
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 12])
@pytest.mark.parametrize("start", [0, 768], ids=["from the start", "from within a window"])
def test_any_number_of_workers_sees_the_plan(
    world: int, start: int, data: tuple[Folder, Manifest], digits: Digits, ray_cluster: None
) -> None:
    stop = 2 * 1797 // 192 * 192  # nearly two epochs, of 18 global batches
    deal = Deal(start=start, stop=stop, batch_images=192, micro_images=16, window_batches=8, image_bytes=64)
    assert deal.batches_together == 8  # more than are left for the last window, and before the start in the first

    def check(batch: Batch) -> None:
        assert np.array_equal(batch.image, digits[0][batch.row])
        assert np.array_equal(batch.label, digits[1][batch.row])
        assert (batch.replaced, batch.retried) == (0, 0)

    ledger = consume(read(data, deal), world, check)
    plan = Plan(0, 1797, 128, 8 * 192)
    assert [ledger[position] for position in range(start, stop)] == plan.rows(start, stop).tolist()
    assert len(ledger) == stop - start
    if start == 0:
        assert sorted(ledger[position] for position in range(1797)) == list(range(1797)), "an epoch has each image once"


@pytest.mark.ray
def test_large_images_are_dealt_batch_by_batch(data: tuple[Folder, Manifest], ray_cluster: None) -> None:
    view = View(side=512, channels=1)
    deal = Deal(start=96, stop=480, batch_images=96, micro_images=24, window_batches=4, image_bytes=512 * 512)
    assert deal.batches_together == 1
    ledger = consume(read(data, deal, view), 2, lambda batch: None)
    assert [ledger[position] for position in range(96, 480)] == Plan(0, 1797, 128, 384).rows(96, 480).tolist()


def test_a_cut_is_a_function_of_the_position(data: tuple[Folder, Manifest], digits: Digits) -> None:
    """From 8 pixels made 10, a square of 8 is cut: the same for a position whatever the window is read as."""
    folder, manifest = data
    view = View(side=8, channels=1, zoom=1.25)
    deal = Deal(start=0, stop=256, batch_images=64, micro_images=16, window_batches=4, image_bytes=64)
    whole = joined(read(data, deal, view, random_crop=True).read(0))
    rest = joined(read(data, replace(deal, start=128), view, random_crop=True).read(0))
    image = dict(zip(whole["position"], whole["image"], strict=True))
    for position, picture in zip(rest["position"], rest["image"], strict=True):
        assert np.array_equal(picture, image[position] if position >= 128 else np.zeros((8, 8, 1)))
    at = uniforms(0, "crop", whole["position"])
    expected = manifest.read(folder, whole["row"], view, at).image
    assert np.array_equal(whole["image"], expected)
    centred = manifest.read(folder, whole["row"], view).image
    assert (whole["image"] != centred).any(axis=(1, 2, 3)).mean() > 0.8


def test_what_is_unusable_is_replaced_listed_and_limited(alone: None, folder: Folder) -> None:
    """Files in place are first looked at in training: each bad one costs one image, and too many the run."""
    source, out = folder / "raw", folder / "data"
    for i in range(120):
        picture = np.full((8, 8, 3), i, np.uint8)
        source.put(f"{i:03d}.png", b"no picture" if i % 15 == 7 else encode(picture, "png"))
    manifest = ingest(IngestPlan.make(source, out, IngestConfig(side=0, encoding="in-place")))
    assert manifest.rows == 120
    deal = Deal(start=0, stop=128, batch_images=32, micro_images=32, window_batches=4, image_bytes=192)
    task = replace(read((out, manifest), deal, View(side=8, channels=3)), max_bad_share=0.1)
    found = joined(task.read(0))
    epoch = found["row"][found["position"] < 120]
    assert found["replaced"][found["position"] < 120].sum() == 8
    assert len(set(epoch.tolist())) == 112
    listed = [json.loads(task.quarantine.get(name)) for name in task.quarantine.names()]
    assert {entry["path"] for entry in listed} == {f"{i:03d}.png" for i in range(7, 120, 15)}
    with pytest.raises(DataError, match=r"8 of 128 images are unusable, more than data.ingest.max_bad_share = 0.001"):
        joined(replace(task, max_bad_share=0.001).read(0))


def test_no_epoch_shows_an_image_that_is_held_out(alone: None, folder: Folder) -> None:
    """Nor does one take the place of a picture that is unusable, as most of its neighbours are here."""
    source, out = folder / "raw", folder / "data"
    for i in range(120):
        source.put(f"{i:03d}.png", encode(np.full((8, 8, 3), i, np.uint8), "png"))
    manifest = ingest(IngestPlan.make(source, out, IngestConfig(side=0, encoding="in-place")))
    held = held_out_rows(120, 24)
    seen = manifest.read(out, np.arange(120), View(side=8, channels=3)).image[:, 0, 0, 0]
    before = sorted(set((held - 1).tolist()) - set(held.tolist()) - {-1})
    for row in before:
        source.put(f"{seen[row]:03d}.png", b"no picture")
    manifest = ingest(IngestPlan.make(source, out / "2", IngestConfig(side=0, encoding="in-place")))
    deal = Deal(start=0, stop=480, batch_images=32, micro_images=32, window_batches=4, image_bytes=192)
    task = replace(read((out / "2", manifest), deal, View(side=8, channels=3)), max_bad_share=0.5)
    task = replace(task, plan=replace(task.plan, held_out=24))
    parts = [joined(task.read(window)) for window in deal.windows]
    position, row, image = (np.concatenate([part[name] for part in parts]) for name in ("position", "row", "image"))
    row, image = row[position < 480], image[position < 480]  # five epochs of 96
    assert not set(row.tolist()) & set(held.tolist())
    assert not set(image[:, 0, 0, 0].tolist()) & set(seen[held].tolist())
    usable = set(range(120)) - set(held.tolist()) - set(before)
    assert set(row.tolist()) == usable and all((row == one).sum() >= 5 for one in usable)


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_a_file_in_place_that_changed_is_refused(where: str, alone: None, request: pytest.FixtureRequest) -> None:
    base: Folder = request.getfixturevalue(where)
    noise = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)  # which no PNG makes shorter
    for i in range(4):
        (base / "raw").put(f"{i}.png", encode(noise[i], "png"))
    manifest = ingest(IngestPlan.make(base / "raw", base / "data", IngestConfig(side=0, encoding="in-place")))
    view = View(side=8, channels=3)
    assert manifest.read(base / "data", np.arange(4), view).bad == []
    other = encode(noise[4], "png")
    assert len(other) == len((base / "raw").get("2.png"))
    (base / "raw").put("2.png", other)
    with pytest.raises(DamagedError, match=r"2\.png is not the object that was listed: it has changed since"):
        manifest.read(base / "data", np.arange(4), view)


def test_a_shard_of_the_same_size_that_holds_something_else_is_refused(
    data: tuple[Folder, Manifest], digits: Digits, tmp_path: Path
) -> None:
    folder, manifest = data
    other = Folder(str(tmp_path))
    for mask in range(1, 256):  # the checksums of Parquet's pages are of varying length, and so are files
        writer = ShardWriter(other, "part-0", PICTURES, 10_000, 128, "none")
        for row in range(500):
            writer.add(encode(digits[0][row] ^ np.uint8(mask), "raw"), str(digits[1][row]), f"{row}.png")
        (shard,) = writer.close()
        if shard.size_bytes == manifest.shards[0].size_bytes:
            break
    assert (shard.size_bytes, shard.rows) == (manifest.shards[0].size_bytes, manifest.shards[0].rows)
    for name in folder.names():
        if name.endswith(".parquet") and not other.exists(name):
            other.put(name, folder.get(name))
    assert manifest.read(other, np.arange(600, 900)).bad == []
    with pytest.raises(DamagedError, match=r"part-0-0000\.parquet cannot be read: row group 0 is not what was written"):
        manifest.read(other, np.arange(600))


class Delivers:
    """Stands for a worker's part of a stream."""

    def __init__(self, blocks: list[dict[str, np.ndarray]]) -> None:
        self.blocks = blocks

    def iter_batches(self, **_: object) -> list[dict[str, np.ndarray]]:
        return self.blocks


def block(deal: Deal, number: int) -> dict[str, np.ndarray]:
    position = deal.positions(0)[number * deal.block_rows : (number + 1) * deal.block_rows]
    none = np.zeros_like(position)
    return dict.fromkeys(("position", "row", "label", "image"), position) | {"replaced": none, "retried": none}


def test_another_block_than_the_one_that_is_due_is_refused() -> None:
    deal = Deal(start=0, stop=64, batch_images=32, micro_images=8, window_batches=2, image_bytes=64)
    good = [block(deal, 1), block(deal, 3)]
    assert len(list(batches(Delivers(good), deal, rank=1, world=2))) == 4
    with pytest.raises(StreamOrderError, match="was due the images from position 8 and got"):
        list(batches(Delivers(good[::-1]), deal, rank=1, world=2))
    with pytest.raises(StreamOrderError, match="ended before position 24"):
        list(batches(Delivers(good[:1]), deal, rank=1, world=2))


@given(
    micro=st.integers(1, 64),
    per_batch=st.integers(1, 16),
    first=st.integers(0, 40),
    steps=st.integers(1, 200),
    window=st.sampled_from([1, 2, 8, 64]),
    image_bytes=st.sampled_from([64, 3072, 12_288, 196_608, 1 << 22]),
)
def test_a_deal_covers_its_positions_once_in_blocks_of_one_size(
    micro: int, per_batch: int, first: int, steps: int, window: int, image_bytes: int
) -> None:
    B = micro * per_batch
    deal = Deal(
        start=first * B, stop=(first + steps) * B, batch_images=B, micro_images=micro, window_batches=window,
        image_bytes=image_bytes,
    )  # fmt: skip
    parts = [deal.positions(number) for number in deal.windows]
    dealt = np.concatenate(parts)
    assert len(set(dealt.tolist())) == len(dealt)
    assert set(range(deal.start, deal.stop)) <= set(dealt.tolist())
    beyond = [p for p in dealt.tolist() if not deal.start <= p < deal.stop]
    assert len(beyond) < 2 * deal.group_rows, "only what makes the first group and the last whole"
    assert all(len(part) % deal.block_rows == 0 and set(part // (window * B)) == {n}
               for part, n in zip(parts, deal.windows, strict=True))  # fmt: skip
    for start in range(0, len(dealt), micro):  # micro-batches stay whole
        assert dealt[start] % micro == 0 and dealt[start + micro - 1] == dealt[start] + micro - 1
