"""From a worker's stream to its device, with an account of what it cost."""

import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class OnDevice(NamedTuple):
    """A micro-batch on the device that works on it."""

    position: Tensor
    """int64 [b]."""
    label: Tensor
    """int64 [b]."""
    image: Tensor
    """uint8 [b, H, W, C]: pixels stay bytes until they are there."""
    counted: bool
    """Whether it counts, or only keeps step with the other workers."""


class Feed:
    """An iterator over micro-batches (:class:`pipelines.stream.Batch`), each sent to a device, in their order.

    To a GPU each is copied out of pinned memory, on a stream of its own, while the one before it is worked on.
    """

    def __init__(self, batches: Iterable[Any], device: torch.device) -> None:
        self._batches, self._device = iter(batches), device
        self._sent = self._ahead() if device.type == "cuda" else map(self._send, self._batches)
        self.waited_s = 0.0
        """Time that the taker has waited since the last :meth:`reset`."""
        self.replaced = self.retried = 0
        """Images that were replaced, and requests to storage that were repeated, likewise."""

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> OnDevice:
        asked = time.perf_counter()
        batch = next(self._sent)
        self.waited_s += time.perf_counter() - asked
        return batch

    def reset(self) -> None:
        """Begin the account anew."""
        self.waited_s, self.replaced, self.retried = 0.0, 0, 0

    def _send(self, batch: Any) -> OnDevice:
        self.replaced += batch.replaced
        self.retried += batch.retried
        position, label, image = (self._moved(column) for column in (batch.position, batch.label, batch.image))
        return OnDevice(position, label, image, batch.counted)

    def _moved(self, values: NDArray[Any]) -> Tensor:
        own = torch.from_numpy(np.array(values))  # a copy: what Ray Data hands out is read-only
        return own.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else own

    def _ahead(self) -> Iterator[OnDevice]:
        beside: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        coming = None
        for batch in self._batches:
            with torch.cuda.stream(beside):
                sent = self._send(batch)
            if coming:
                yield coming
            here = torch.cuda.current_stream(self._device)
            here.wait_stream(beside)
            for tensor in sent[:3]:
                tensor.record_stream(here)
            coming = sent
        if coming:
            yield coming
