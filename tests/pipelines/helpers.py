"""Tasks that leave word of where their work was done."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ray

from pipelines.draw_shard import DrawShard
from pipelines.images import Pixels
from pipelines.parts import DigestPart, WritePart
from pipelines.storage import Folder
from pipelines.stream import ReadWindow


class WhereItWrites(WritePart):
    """Leaves the id of its node behind for each part that it writes."""

    def __call__(self, row: dict[str, bytes]) -> dict[str, int]:
        told = super().__call__(row)
        self.out.put(f"nodes/write-{told['part']}", ray.get_runtime_context().get_node_id().encode())
        return told


class WritesTwo(WritePart):
    """Writes two parts, whoever is asked for them; in the middle of the next it stands still."""

    def __call__(self, row: dict[str, bytes]) -> dict[str, int]:
        turns = Folder(f"{self.out.url}-turns")
        if not any(turns.create(turn, b"") for turn in ("first", "second")):
            os.fsync = lambda file: time.sleep(600)
        return super().__call__(row)


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


class Drawn(NamedTuple):
    """A batch of samples that has been drawn."""

    seed: int
    """The first of it."""
    process: int
    node: str


class WhereItDraws(DrawShard):
    """Leaves word of each batch that it has drawn, beside the folder of the samples."""

    def _draw(self, seeds: range) -> Pixels:
        pixels = super()._draw(seeds)
        word = Drawn(seeds.start, os.getpid(), ray.get_runtime_context().get_node_id())
        (beside(self.plan.out.path()) / "-".join(map(str, word))).touch()
        return pixels


class WaitsOnceDrawn(WhereItDraws):
    """Stands still, once it has drawn two batches, until it is let go."""

    def _draw(self, seeds: range) -> Pixels:
        pixels = super()._draw(seeds)
        home = beside(self.plan.out.path())
        while sum(one.process == os.getpid() for one in drawn(home)) >= 2 and not (home / "go").exists():
            time.sleep(0.05)
        return pixels


def beside(out: str) -> Path:
    """The folder of the words about the samples in another."""
    home = Path(f"{out}-drawn")
    home.mkdir(exist_ok=True)
    return home


def drawn(home: Path) -> list[Drawn]:
    """The batches that were drawn, of which one that two processes drew is there twice."""
    words = [path.name.split("-") for path in home.iterdir() if path.name != "go"]
    return [Drawn(int(seed), int(process), node) for seed, process, node in words]
