"""What runs are fed, and who leaves word of where its work was done."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import ray

from pipelines.fit_config import FitConfig
from pipelines.parts import DigestPart, WritePart
from pipelines.plan import Plan
from pipelines.stream import Batch, ReadWindow


def micro_batches(
    pixels: np.ndarray, config: FitConfig, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """What the stream delivers, from memory."""
    plan = Plan(0, len(pixels), 128, 512)
    b, n = config.micro_images, config.micro_batches
    for step in range(start // config.batch_images, config.images // config.batch_images):
        mine = [j for j in range(step * n, (step + 1) * n) if (j - start // b) % world == rank]
        for turn in range(-(-n // world)):
            first = mine[min(turn, len(mine) - 1)] * b
            row = plan.rows(first, first + b)
            yield Batch(np.arange(first, first + b), row, row % 10, pixels[row], counted=turn < len(mine))


class WhereItWrites(WritePart):
    """Leaves the id of its node behind for each part that it writes."""

    def __call__(self, row: dict[str, bytes]) -> dict[str, int]:
        told = super().__call__(row)
        self.out.put(f"nodes/write-{told['part']}", ray.get_runtime_context().get_node_id().encode())
        return told


class WhereItDigests(DigestPart):
    """Leaves the id of its node behind for each part that it takes the digests of."""

    def __call__(self, row: dict[str, bytes]) -> dict[str, int]:
        told = super().__call__(row)
        self.out.put(f"nodes/digest-{told['part']}", ray.get_runtime_context().get_node_id().encode())
        return told


class WhereItReads(ReadWindow):
    """Leaves the id of its node behind for each window that it reads."""

    def read(self, window: int) -> Iterator[dict[str, Any]]:
        node = ray.get_runtime_context().get_node_id()
        self.folder.put(f"nodes/read-{window}", node.encode())
        return super().read(window)
