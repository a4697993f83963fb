import hashlib
import io
import threading
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipelines.images import encode
from pipelines.manifest import Manifest, Shard
from pipelines.plan import Plan
from pipelines.storage import Folder
from pipelines.stream import MAX_TASK_ROWS, TASK_BYTES, Deal, StreamOrderError, batches, open_stream

Digits = tuple[np.ndarray, np.ndarray]
Ledger = dict[int, int]
"""Position to row, of every image that a worker was given."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> tuple[Folder, Manifest]:
    """The digits in shards of uneven sizes, none of them a multiple of a row group."""
    folder, shards = Folder(str(tmp_path_factory.mktemp("digits"))), []
    for i, rows in enumerate(np.split(np.arange(1797), [500, 517, 1300])):
        table = pa.table(
            {
                "image": [encode(picture, "raw") for picture in digits[0][rows]],
                "label": [str(label) for label in digits[1][rows]],
                "path": [str(row) for row in rows],
            }
        )
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=128)
        data = buffer.getvalue()
        folder.put(f"{i}.parquet", data)
        sha256 = hashlib.sha256(data).hexdigest()
        shards.append(Shard(name=f"{i}.parquet", rows=len(rows), size_bytes=len(data), sha256=sha256))
    manifest = Manifest(
        side=8, channels=1, encoding="raw", row_group_rows=128, labels=[str(i) for i in range(10)],
        label_counts=np.bincount(digits[1]).tolist(), quarantined=0, source="", shards=shards,
    )  # fmt: skip
    manifest.save(folder)
    return folder, manifest


def test_rows_are_read_in_any_order_across_shards(data: tuple[Folder, Manifest], digits: Digits) -> None:
    folder, _ = data
    rows = np.random.default_rng(0).permutation(1797)[:700]
    read = Manifest.load(folder).read(folder, rows)
    assert np.array_equal(read.image, digits[0][rows])
    assert np.array_equal(read.label, digits[1][rows])
    assert np.array_equal(read.row, rows)


def consume(
    data: tuple[Folder, Manifest], deal: Deal, world: int, check: Callable[[np.ndarray, np.ndarray], None]
) -> Ledger:
    """Stream to ``world`` consumers side by side; return what they were given."""
    folder, manifest = data
    stream = open_stream(folder, manifest, Plan(0, manifest.rows, 128, 4), deal)
    shards = stream.streaming_split(world, equal=True)
    ledgers: list[Ledger] = [{} for _ in range(world)]
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            for batch in batches(shards[rank], deal, rank, world):
                check(batch.row, batch.image)
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
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 1280], ids=["from the start", "from the middle"])
def test_any_number_of_workers_sees_the_plan(
    world: int, start: int, data: tuple[Folder, Manifest], digits: Digits, ray_cluster: None
) -> None:
    stop = 2 * 1797 // 128 * 128  # nearly two epochs, of 28 global batches
    deal = Deal(start=start, stop=stop, batch_images=128, micro_images=16, image_bytes=64)
    assert deal.batches_together == 32  # more than there are: the last group reaches beyond the end

    def check(row: np.ndarray, image: np.ndarray) -> None:
        assert np.array_equal(image, digits[0][row])

    ledger = consume(data, deal, world, check)
    plan = Plan(0, 1797, 128, 4)
    assert [ledger[position] for position in range(start, stop)] == plan.rows(start, stop).tolist()
    assert len(ledger) == stop - start
    if start == 0:
        assert sorted(ledger[position] for position in range(1797)) == list(range(1797)), "an epoch has each image once"


@pytest.mark.ray
def test_large_images_are_dealt_batch_by_batch(data: tuple[Folder, Manifest], ray_cluster: None) -> None:
    deal = Deal(start=96, stop=960, batch_images=96, micro_images=24, image_bytes=1 << 20)  # as if of a megabyte
    assert deal.batches_together == 1 and deal.stretch_rows == 24
    ledger = consume(data, deal, 2, lambda row, image: None)
    assert [ledger[position] for position in range(96, 960)] == Plan(0, 1797, 128, 4).rows(96, 960).tolist()


class Delivers:
    """Stands for a worker's part of a stream."""

    def __init__(self, blocks: list[dict[str, np.ndarray]]) -> None:
        self.blocks = blocks

    def iter_batches(self, **_: object) -> list[dict[str, np.ndarray]]:
        return self.blocks


def block(deal: Deal, number: int) -> dict[str, np.ndarray]:
    position = deal.positions(0)[number * deal.block_rows : (number + 1) * deal.block_rows]
    return {"position": position, "row": position, "label": position, "image": position}


def test_another_block_than_the_one_that_is_due_is_refused() -> None:
    deal = Deal(start=0, stop=64, batch_images=32, micro_images=8, image_bytes=64)
    good = [block(deal, 1), block(deal, 3)]
    assert len(list(batches(Delivers(good), deal, rank=1, world=2))) == 4
    with pytest.raises(StreamOrderError, match="was due the images from position 8 and got"):
        list(batches(Delivers(good[::-1]), deal, rank=1, world=2))
    with pytest.raises(StreamOrderError, match="ended before position 24"):
        list(batches(Delivers(good[:1]), deal, rank=1, world=2))


@given(
    micro=st.integers(1, 64),
    per_batch=st.integers(1, 16),
    first=st.integers(0, 5),
    steps=st.integers(1, 200),
    image_bytes=st.sampled_from([64, 3072, 12_288, 196_608, 1 << 22]),
)
def test_a_deal_covers_its_positions_once_in_blocks_of_one_size(
    micro: int, per_batch: int, first: int, steps: int, image_bytes: int
) -> None:
    B = micro * per_batch
    deal = Deal(start=first * B, stop=(first + steps) * B, batch_images=B, micro_images=micro, image_bytes=image_bytes)
    assume(deal.stretches <= 300)
    dealt = np.concatenate([deal.positions(stretch) for stretch in range(deal.stretches)])
    assert np.array_equal(np.sort(dealt), np.arange(deal.start, deal.start + len(dealt)))
    assert deal.start + len(dealt) >= deal.stop
    assert deal.stretch_rows % deal.block_rows == 0
    assert deal.stretch_rows <= max(MAX_TASK_ROWS, micro) and (
        deal.stretch_rows * image_bytes <= TASK_BYTES or deal.stretch_rows == micro
    )
    for start in range(0, len(dealt), micro):  # micro-batches stay whole
        assert dealt[start] % micro == 0 and dealt[start + micro - 1] == dealt[start] + micro - 1
