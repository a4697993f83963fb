from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import numpy as np
import ray
import torch
from torch import Tensor

from models.ema import EMAConfig
from models.objective import ObjectiveConfig
from models.parallelize import ParallelConfig, construct
from models.schedule import Schedule, article
from models.timesteps import TimestepConfig
from models.unet import UNet, UNetConfig
from pipelines.checkpoints import Checkpoint
from pipelines.fit import Listener, State, new_state
from pipelines.fit_config import FitConfig
from pipelines.parts import DigestPart, WritePart
from pipelines.plan import Plan
from pipelines.stream import Batch, ReadWindow

CPU = torch.device("cpu")

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


class Variant(NamedTuple):
    """What a run of 12 steps learns, and how."""

    fit: FitConfig = FIT
    schedule: Schedule = article()
    classes: int = 0


STEERED = replace(
    FIT,
    timesteps=TimestepConfig(kind="loss-aware"),
    objective=ObjectiveConfig(target="v", weight="min-snr"),
    label_dropout=0.25,
    ema=EMAConfig(power_stds=(0.05, 0.1)),
)
VARIANTS = {
    "plain": Variant(),
    # Few t, so that the losses of each are soon known and steer the draws for the second half of the run.
    "loss-aware": Variant(STEERED, article(20, 0.6), classes=10),
}


def tiny_state(
    config: FitConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    variant: Variant = VARIANTS["plain"],
    how: ParallelConfig = ParallelConfig(),  # noqa: B008  (frozen)
) -> State:
    """The state at position 0 of this worker; of all workers of the default group, if there is one."""

    def make() -> UNet:
        return UNet(TINY, image_channels=1, side=8, classes=variant.classes).to(dtype)

    model, parallel = construct(make, seed, how, CPU)
    return new_state(model, config, variant.schedule, parallel)


def everything(state: State) -> torch.Tensor:
    """All the numbers of a state, in a row."""
    optimizer = [
        value.flatten()
        for p in state.model.parameters()
        for value in state.optimizer.state[p].values()
        if isinstance(value, torch.Tensor)
    ]
    return torch.cat([*(p.detach().flatten() for p in state.model.parameters()), *optimizer,
                      *(v.flatten() for v in state.ema.shadow.values())])  # fmt: skip


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


class Ear(Listener):
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

    def leave(self, state: State) -> NoReturn:
        raise AssertionError("nobody asked to")


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
