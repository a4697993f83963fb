from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from models.init import initialize
from models.unet import UNet, UNetConfig
from pipelines.checkpoints import Checkpoint
from pipelines.fit import FitConfig, State, new_state
from pipelines.plan import Plan
from pipelines.stream import Batch

TINY = UNetConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), groups=4)


FIT = FitConfig(
    images=384, batch_images=32, micro_images=8, warm_up_images=64, log_images=64, checkpoint_images=128,
    grid_images=192,
)  # fmt: skip
"""A run of 12 steps."""


ABOUT = Checkpoint(
    position=0, files={}, config={"seed": 0}, data_digest="d", data_url="file:///d", shape=(1, 8, 8), labels=[],
    tracking_uri="none", tracking_run="", git_revision="",
)  # fmt: skip


def tiny_state(config: FitConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    model = UNet(TINY, image_channels=1, side=8)
    initialize(model, seed)
    return new_state(model.to(dtype).to(memory_format=torch.channels_last), config)


def micro_batches(
    pixels: np.ndarray, config: FitConfig, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """What the stream delivers, from memory."""
    plan = Plan(0, len(pixels), 128, 4)
    for first in range(start + rank * config.micro_images, config.images, world * config.micro_images):
        row = plan.rows(first, first + config.micro_images)
        yield Batch(np.arange(first, first + config.micro_images), row, np.full(len(row), -1), pixels[row])


class Ear:
    """A listener that remembers."""

    def __init__(self, on_checkpoint: Callable[[State], None] | None = None) -> None:
        self.reports: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[int, Tensor]] = []
        self.checkpoints: list[int] = []
        self._on_checkpoint = on_checkpoint

    def report(self, metrics: dict[str, float], position: int) -> None:
        self.reports.append((position, metrics))

    def picture(self, pixels: Tensor, position: int) -> None:
        self.pictures.append((position, pixels))

    def checkpoint(self, state: State) -> None:
        self.checkpoints.append(state.position)
        if self._on_checkpoint:
            self._on_checkpoint(state)
