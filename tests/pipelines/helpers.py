"""Tasks that leave word of where their work was done."""

from collections.abc import Iterator
from typing import Any

import ray

from pipelines.parts import DigestPart, WritePart
from pipelines.stream import ReadWindow


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
