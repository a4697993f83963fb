"""The deterministic stream: positions of a run to batches on workers, in one Ray Data execution.

A lazy source of window numbers → read a window's rows, in plan order → blocks of equal size → ``streaming_split``.
With ``preserve_order`` the splitter deals equal blocks round robin: block j goes to worker j mod W. That is not trusted
but checked: each image says which position it has, and :func:`batches` refuses any other than the one that is due.

What is in a block. A global batch of B images is B/b micro-batches of b. Blocks of one micro-batch each would do, but
Ray spends milliseconds on a block however small it is. So G global batches are dealt together: block i of the group
holds the i-th micro-batch of each of them.

    positions of a group, G = 2, B/b = 4      block 0    block 1    block 2    block 3
    batch s                                   micro 0    micro 1    micro 2    micro 3
    batch s+1                                 micro 4    micro 5    micro 6    micro 7

Every W up to B/b gets whole batches out of this, the same ones, and the layout knows nothing of W. Where W does not
divide B/b some workers have a micro-batch less of a global batch than others; they are given their last one again, not
to be counted, so that all take the same number and meet in every collective.

Groups lie where positions are multiples of their size, whatever the position that a run starts at: what lies before it,
or beyond the end, is neither read nor handed out, and stands in the block as zeros. Ray cuts what is left over when it
has dealt W blocks each time into W equal parts: so blocks of zeros come after the last, enough that only they are cut.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray.data
from numpy.typing import NDArray
from ray.data import DataContext, Dataset, ExecutionOptions

from pipelines.errors import DataError
from pipelines.images import Pixels, View
from pipelines.manifest import BadRow, Manifest, RowGroups
from pipelines.plan import Plan, uniforms
from pipelines.retries import retries
from pipelines.storage import Folder

BLOCK_BYTES = 8 << 20
"""Pixels in a block, in bytes, up to which batches are dealt together."""
MAX_BATCHES_TOGETHER = 32
NUMBERS = 64
"""Of windows, that one task deals out."""
ROW_BYTES = 32
"""Bytes of a row beside its pixels."""
PART_BYTES = 8 << 20
"""Pixels that a read task decodes before it hands them out, in bytes."""


class Batch(NamedTuple):
    """A micro-batch: the b images that one worker computes at once."""

    position: NDArray[np.int64]
    """[b], contiguous and rising: the place of each image in the run."""
    row: NDArray[np.int64]
    """[b], the row of the data set that stands there: the id in every ledger."""
    label: NDArray[np.int64]
    """[b], an index into the manifest's labels, or -1."""
    image: Pixels
    """uint8 [b, H, W, C]."""
    replaced: int = 0
    """Images in it that could not be used, in whose place another stands."""
    retried: int = 0
    """Requests to storage that had to be repeated since the last batch."""
    counted: bool = True
    """False: given out once more, to a worker that has no further one of this global batch; to be computed in step with
    the others, and not to be counted."""


class StreamOrderError(Exception):
    """Ray Data delivered other positions than the ones that were due: a defect, never to be trained on."""


@dataclass(frozen=True, kw_only=True)
class Deal:
    """How a stretch of a run is cut into windows, and those into blocks."""

    start: int
    """The first position, where a global batch starts."""
    stop: int
    """The end of the run, where a global batch ends."""
    batch_images: int
    """B, the global batch."""
    micro_images: int
    """b, what one worker computes at once; it divides B."""
    window_batches: int
    """Global batches of a window, a power of two: what one task reads, and what the plan shuffles into each other."""
    image_bytes: int

    def __post_init__(self) -> None:
        assert self.batch_images % self.micro_images == 0, self
        assert self.start % self.batch_images == 0 and self.stop % self.batch_images == 0, self
        assert self.window_batches & (self.window_batches - 1) == 0 < self.window_batches, self

    @property
    def micro_batches(self) -> int:
        """B/b, of a global batch."""
        return self.batch_images // self.micro_images

    @property
    def batches_together(self) -> int:
        """G, a power of two, chosen by the size of the images."""
        by_block = BLOCK_BYTES // (self.micro_images * self.image_bytes)
        return min(1 << max(by_block, 1).bit_length() - 1, MAX_BATCHES_TOGETHER, self.window_batches)

    @property
    def group_rows(self) -> int:
        return self.batches_together * self.batch_images

    @property
    def block_rows(self) -> int:
        return self.batches_together * self.micro_images

    @property
    def windows(self) -> range:
        """The numbers of the windows that hold any of the positions."""
        rows = self.window_batches * self.batch_images
        return range(self.start // rows, -(-self.stop // rows))

    def positions(self, window: int) -> NDArray[np.int64]:
        """Return the positions of a window's groups in the order of its blocks: int64 [groups * group_rows].

        Positions before the start and from the stop on may be among them, to make the groups whole.
        """
        rows = self.window_batches * self.batch_images
        first = max(window * rows, self.start // self.group_rows * self.group_rows)
        last = min((window + 1) * rows, -(-self.stop // self.group_rows) * self.group_rows)
        groups = np.arange(first, last).reshape(-1, self.batches_together, self.micro_batches, self.micro_images)
        return groups.transpose(0, 2, 1, 3).ravel()


@dataclass(frozen=True)
class ReadWindow:
    """The read task: the number of a window to its images."""

    folder: Folder
    manifest: Manifest
    plan: Plan
    deal: Deal
    view: View
    random_crop: bool
    max_bad_share: float
    quarantine: Folder
    """For what proves unusable: a file each, named by its row."""

    def __call__(self, windows: dict[str, NDArray[np.int64]]) -> Iterator[dict[str, Any]]:
        for number in windows["id"].tolist():
            for part in self.read(self.deal.windows[number]):
                for first in range(0, len(part["position"]), self.deal.block_rows):
                    yield {name: column[first : first + self.deal.block_rows] for name, column in part.items()}
            if number == len(self.deal.windows) - 1:
                yield from [self._nothing()] * (self.deal.micro_batches - 1)  # W - 1 at most

    def read(self, window: int) -> Iterator[dict[str, Any]]:
        """Yield the columns of a window in the order of its blocks, about PART_BYTES of pixels at a time.

        What is kept meanwhile is the window as it is stored, not as it is decoded.
        """
        kept: RowGroups = {}
        bad: list[BadRow] = []
        # Whole groups, whose positions lie together; one batch by itself, which may be large, block by block.
        rows = self.deal.group_rows if self.deal.batches_together > 1 else self.deal.block_rows
        pieces = self.deal.positions(window).reshape(-1, rows)
        together = max(1, PART_BYTES // (rows * self.deal.image_bytes))
        for first in range(0, len(pieces), together):
            part = self._part(pieces[first : first + together].ravel(), kept, bad)
            self._check_share(bad, min(first + together, len(pieces)) * rows)
            yield part

    def _part(self, position: NDArray[np.int64], kept: RowGroups, bad: list[BadRow]) -> dict[str, Any]:
        before = retries()
        wanted = np.flatnonzero((position >= self.deal.start) & (position < self.deal.stop))
        due = position[wanted]
        planned = self.plan.rows(int(due.min()), int(due.max()) + 1)[due - due.min()]
        at = uniforms(self.plan.seed, "crop", due) if self.random_crop else None
        found = self.manifest.read(self.folder, planned, self.view, at, kept, self.plan.held)
        bad += found.bad
        for one in found.bad:  # by its row: met again, by another task or in another epoch, it is listed already
            said = json.dumps(one._asdict(), ensure_ascii=False)
            self.quarantine.create(f"{one.row:010d}.json", said.encode())
        columns: dict[str, Any] = {"position": position}
        for name, values in (("row", found.row), ("label", found.label), ("image", found.image)):
            columns[name] = values if len(due) == len(position) else _among(len(position), wanted, values)
        columns["replaced"] = _among(len(position), wanted, planned != found.row)
        columns["retried"] = np.zeros(len(position), np.int64)
        columns["retried"][wanted[0]] = retries() - before
        return columns

    def _nothing(self) -> dict[str, Any]:
        """Return a block of no positions."""
        rows = self.deal.block_rows
        columns: dict[str, Any] = {"position": np.full(rows, -1)}
        columns |= {name: np.zeros(rows, np.int64) for name in ("row", "label")}
        columns["image"] = np.zeros((rows, *self.view.shape), np.uint8)
        return columns | {"replaced": np.zeros(rows, bool), "retried": np.zeros(rows, np.int64)}

    def _check_share(self, bad: list[BadRow], images: int) -> None:
        """Raise DataError if so many of a window's images are unusable that the share of all is more than allowed."""
        allowed = self.max_bad_share * images
        if len(bad) > allowed + 4 * allowed**0.5 + 3:  # four deviations more are no accident, nor are four of none
            raise DataError(
                f"{len(bad)} of {images} images are unusable, more than data.ingest.max_bad_share = "
                f"{self.max_bad_share} allows; the first: {bad[0].path}: {bad[0].reason}; raise the share, or mend the "
                f"files that {self.quarantine.url} lists"
            )


def _among(rows: int, places: NDArray[np.int64], values: NDArray[Any]) -> NDArray[Any]:
    """Return as many rows, with the values at their places and zeros elsewhere."""
    whole = np.zeros((rows, *values.shape[1:]), values.dtype)
    whole[places] = values
    return whole


def execution_options() -> ExecutionOptions:
    """Return the options without which the order is left to chance."""
    return ExecutionOptions(preserve_order=True)


def open_stream(read: ReadWindow, node_labels: dict[str, str] | None = None) -> Dataset:
    """Return the lazy Ray data set of a run's images, in the blocks of the deal.

    Args:
        read: what each task does.
        node_labels: labels that a node must have for the tasks to run there; any node if there are none.
    """
    context = DataContext.get_current()
    context.execution_options = execution_options()
    context.enable_progress_bars = False
    # Ray closes a block when it has more bytes than this, which what the task yields has: so a block is what it yields,
    # and is on its way when it is yielded. (A repartition would cut the same blocks, but wait for the end of the task.)
    context.target_max_block_size = read.deal.block_rows * (read.deal.image_bytes + ROW_BYTES - 8)
    windows = len(read.deal.windows)
    remote = {"label_selector": node_labels} if node_labels else {}
    # Ray prepares each read task before the first starts. So a few of them deal out the numbers, one a block.
    numbers = ray.data.range(windows, override_num_blocks=-(-windows // NUMBERS)).repartition(
        target_num_rows_per_block=1
    )
    return numbers.map_batches(read, batch_size=None, zero_copy_batch=True, **remote)


def batches(shard: Any, deal: Deal, rank: int, world: int) -> Iterator[Batch]:
    """Yield this worker's micro-batches in the order of their positions, each checked to be the one that is due.

    Of each global batch every worker takes ⌈B/b / W⌉; where it has no further one, its last comes again, not counted.

    Args:
        shard: the worker's part of the stream, a Ray Data iterator.
        deal: how the stream was cut.
        rank: this worker, 0..world-1.
        world: W, the number of workers, at most B/b.

    Raises:
        StreamOrderError: if another block came, or too few did.
    """
    b, n = deal.micro_images, deal.micro_batches
    most = -(-n // world)
    blocks = iter(shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2 * most))
    groups = range(deal.start // deal.group_rows * deal.group_rows, deal.stop, deal.group_rows)
    for number, group in enumerate(groups):
        turns = range((rank - number * n) % world, n, world)  # block j of the stream is worker j mod W's
        mine = [(turn, next(blocks, None)) for turn in turns]
        for batch in range(deal.batches_together):
            first = group + batch * deal.batch_images
            if deal.start <= first < deal.stop:
                rows = slice(batch * b, (batch + 1) * b)
                for turn, block in mine:
                    given = _micro_batch(block, rows, first + turn * b, rank, world)
                    yield given
                for _ in range(most - len(mine)):
                    yield given._replace(replaced=0, retried=0, counted=False)


def _micro_batch(block: dict[str, Any] | None, rows: slice, due: int, rank: int, world: int) -> Batch:
    if block is None:
        raise StreamOrderError(f"the stream of worker {rank} of {world} ended before position {due}")
    position = block["position"][rows]
    if not np.array_equal(position, np.arange(due, due + rows.stop - rows.start)):
        raise StreamOrderError(f"worker {rank} of {world} was due the images from position {due} and got {position}")
    replaced, retried = int(block["replaced"][rows].sum()), int(block["retried"][rows].sum())
    return Batch(position, block["row"][rows], block["label"][rows], block["image"][rows], replaced, retried)
