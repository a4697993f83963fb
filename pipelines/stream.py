"""The deterministic stream: positions of a run to batches on workers, in one Ray Data execution.

A lazy source of stretches of positions → read the stretch's rows, in plan order → blocks of equal size →
``streaming_split``. With ``preserve_order`` the splitter deals equal blocks round robin: block j goes to worker
j mod W. That is not trusted but checked: each image says which position it has, and :func:`batches` refuses any other
than the one that is due.

What is in a block. A global batch of B images is B/b micro-batches of b. Blocks of one micro-batch each would do, but
Ray spends milliseconds on a block however small it is. So G global batches are dealt together: block i of the group
holds the i-th micro-batch of each of them.

    positions of a group, G = 2, B/b = 4      block 0    block 1    block 2    block 3
    batch s                                   micro 0    micro 1    micro 2    micro 3
    batch s+1                                 micro 4    micro 5    micro 6    micro 7

Every W that divides B/b gets whole batches out of this, the same ones, and the layout knows nothing of W.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray.data
from numpy.typing import NDArray
from ray.data import DataContext, Dataset, ExecutionOptions

from pipelines.images import Pixels
from pipelines.manifest import Manifest
from pipelines.plan import Plan
from pipelines.storage import Folder

BLOCK_BYTES = 1 << 20
"""Pixels in a block, in bytes, up to which batches are dealt together."""
MAX_BATCHES_TOGETHER = 32
TASK_BYTES = 32 << 20
"""Pixels that one read task delivers, in bytes: enough to be worth a task, small enough to have several at once."""
MAX_TASK_ROWS = 8192


class Batch(NamedTuple):
    """A micro-batch: the b images that one worker computes at once."""

    position: NDArray[np.int64]
    """[b], contiguous and rising: the place of each image in the run."""
    row: NDArray[np.int64]
    """[b], the row of the data set that the plan put there: the id in every ledger."""
    label: NDArray[np.int64]
    """[b], an index into the manifest's labels, or -1."""
    image: Pixels
    """uint8 [b, H, W, C]."""


class StreamOrderError(Exception):
    """Ray Data delivered other positions than the ones that were due: a defect, never to be trained on."""


@dataclass(frozen=True, kw_only=True)
class Deal:
    """How a stretch of a run is cut into blocks."""

    start: int
    """The first position, where a global batch starts."""
    stop: int
    """The end of the run, where a global batch ends."""
    batch_images: int
    """B, the global batch."""
    micro_images: int
    """b, what one worker computes at once; it divides B."""
    image_bytes: int

    def __post_init__(self) -> None:
        assert self.batch_images % self.micro_images == 0, self
        assert self.start % self.batch_images == 0 and self.stop % self.batch_images == 0, self

    @property
    def batches_together(self) -> int:
        """G, chosen by the size of the images alone."""
        by_block = BLOCK_BYTES // (self.micro_images * self.image_bytes)
        by_task = min(TASK_BYTES // self.image_bytes, MAX_TASK_ROWS) // self.batch_images
        return max(1, min(by_block, by_task, MAX_BATCHES_TOGETHER))

    @property
    def block_rows(self) -> int:
        return self.batches_together * self.micro_images

    @property
    def stretch_rows(self) -> int:
        """Images of one read task: whole groups, or whole blocks where a group is a single batch."""
        unit = self.batches_together * self.batch_images if self.batches_together > 1 else self.micro_images
        return max(1, min(TASK_BYTES // self.image_bytes, MAX_TASK_ROWS) // unit) * unit

    @property
    def stretches(self) -> int:
        # The last one may reach beyond the end of the run: the plan goes on for ever, and nobody takes those images.
        return -(-(self.stop - self.start) // self.stretch_rows)

    def positions(self, stretch: int) -> NDArray[np.int64]:
        """Return the positions of a stretch in the order of its blocks, int64 [stretch_rows]."""
        first = self.start + stretch * self.stretch_rows
        shape = (-1, 1, 1, self.micro_images)
        if self.batches_together > 1:
            shape = (-1, self.batches_together, self.batch_images // self.micro_images, self.micro_images)
        groups = np.arange(first, first + self.stretch_rows).reshape(shape)
        return groups.transpose(0, 2, 1, 3).ravel()


@dataclass(frozen=True)
class ReadStretch:
    """The read task: the number of a stretch to its images."""

    folder: Folder
    manifest: Manifest
    plan: Plan
    deal: Deal

    def __call__(self, stretches: dict[str, NDArray[np.int64]]) -> Iterator[dict[str, Any]]:
        for stretch in stretches["id"].tolist():
            position = self.deal.positions(stretch)
            first = int(position[0])
            row = self.plan.rows(first, first + len(position))[position - first]
            read = self.manifest.read(self.folder, row)
            yield {"position": position, "row": read.row, "label": read.label, "image": read.image}


def execution_options() -> ExecutionOptions:
    """Return the options without which the order is left to chance."""
    return ExecutionOptions(preserve_order=True)


def open_stream(folder: Folder, manifest: Manifest, plan: Plan, deal: Deal) -> Dataset:
    """Return the lazy Ray data set of a run's images, in the blocks of the deal."""
    context = DataContext.get_current()
    context.execution_options = execution_options()
    context.enable_progress_bars = False
    read = ReadStretch(folder, manifest, plan, deal)
    return (
        ray.data.range(deal.stretches, override_num_blocks=deal.stretches)
        .map_batches(read, batch_size=None, zero_copy_batch=True)
        # A streaming repartition does not merge rows across tasks: that is why a stretch is whole blocks.
        .repartition(target_num_rows_per_block=deal.block_rows)
    )


def batches(shard: Any, deal: Deal, rank: int, world: int) -> Iterator[Batch]:
    """Yield this worker's micro-batches in the order of their positions, each checked to be the one that is due.

    Args:
        shard: the worker's part of the stream, a Ray Data iterator.
        deal: how the stream was cut.
        rank: this worker, 0..world-1.
        world: W, the number of workers; it divides B/b.

    Raises:
        StreamOrderError: if another block came, or too few did.
    """
    b, share = deal.micro_images, deal.batch_images // deal.micro_images // world
    blocks = iter(shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2 * share))
    for group in range(deal.start, deal.stop, deal.batches_together * deal.batch_images):
        mine = [next(blocks, None) for _ in range(share)]
        for batch in range(deal.batches_together):
            for turn, block in enumerate(mine):
                due = group + batch * deal.batch_images + (turn * world + rank) * b
                if due >= deal.stop:
                    return
                yield _micro_batch(block, slice(batch * b, (batch + 1) * b), due, rank, world)


def _micro_batch(block: dict[str, Any] | None, rows: slice, due: int, rank: int, world: int) -> Batch:
    if block is None:
        raise StreamOrderError(f"the stream of worker {rank} of {world} ended before position {due}")
    position = block["position"][rows]
    if not np.array_equal(position, np.arange(due, due + rows.stop - rows.start)):
        raise StreamOrderError(f"worker {rank} of {world} was due the images from position {due} and got {position}")
    return Batch(position, block["row"][rows], block["label"][rows], block["image"][rows])
