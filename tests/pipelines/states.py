"""States of a tiny run, to train, to save and to load, and who listens. Nothing here imports Ray, which takes long."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.ema import EMAConfig
from models.objective import ObjectiveConfig
from models.parallelize import ParallelConfig, construct
from models.schedule import Schedule, article
from models.timesteps import TimestepConfig
from models.unet import UNet, UNetConfig
from pipelines import checkpoints
from pipelines.checkpoint_manifest import Checkpoint
from pipelines.fit import Listener, State, new_state
from pipelines.fit_config import FitConfig
from pipelines.plan import Plan
from pipelines.storage import Folder

CPU = torch.device("cpu")
TINY = UNetConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), groups=4)
ABOUT = Checkpoint(
    position=0, files={}, config={"seed": 0}, data_digest="d", data_url="file:///d", shape=(1, 8, 8), labels=[],
    tracking_uri="none", tracking_run="", git_revision="",
)  # fmt: skip
FIT = FitConfig(
    images=384, batch_images=32, micro_images=8, warm_up_images=64, log_images=64, checkpoint_images=128,
    grid_images=192,
)  # fmt: skip
"""A run of 12 steps."""
SAVED = FitConfig(
    images=1024, batch_images=32, micro_images=32, log_images=32, checkpoint_images=32, grid_images=32,
    ema=EMAConfig(power_stds=(0.05, 0.1)),
)  # fmt: skip
"""Of states that are saved, and not trained."""


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


def everything(state: State) -> Tensor:
    """All the numbers of a state, in a row; of one that is shared out, those of this worker."""
    optimizer = [value for p in state.model.parameters() for value in state.optimizer.state[p].values()]
    found = [*state.model.parameters(), *optimizer, *state.ema.shadow.values(), *state.timesteps.state.values()]
    mine = [t.to_local() if isinstance(t, DTensor) else t for t in found if isinstance(t, Tensor)]
    return torch.cat([t.detach().flatten().double() for t in mine])


class Given(NamedTuple):
    """What :class:`pipelines.stream.Batch` is to the loop, where Ray is not."""

    position: np.ndarray
    row: np.ndarray
    label: np.ndarray
    image: np.ndarray
    replaced: int = 0
    retried: int = 0
    counted: bool = True


def micro_batches(
    pixels: np.ndarray, config: FitConfig, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[Given]:
    """What the stream delivers, from memory."""
    plan = Plan(0, len(pixels), 128, 512)
    b, n = config.micro_images, config.micro_batches
    for step in range(start // config.batch_images, config.images // config.batch_images):
        mine = [j for j in range(step * n, (step + 1) * n) if (j - start // b) % world == rank]
        for turn in range(-(-n // world)):
            first = mine[min(turn, len(mine) - 1)] * b
            row = plan.rows(first, first + b)
            yield Given(np.arange(first, first + b), row, row % 10, pixels[row], counted=turn < len(mine))


class Ear(Listener):
    """A listener that remembers."""

    def __init__(self, on_checkpoint: Callable[[State], None] | None = None) -> None:
        self.reports: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[int, Tensor]] = []
        self.checkpoints: list[int] = []
        self.evaluations = 0
        self._on_checkpoint = on_checkpoint

    def at_work(self) -> None:
        self.evaluations += 1

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


class Noticed(Ear):
    """Is told at a position that a worker is about to go."""

    def __init__(self, at: int, on_checkpoint: Callable[[State], None]) -> None:
        super().__init__(on_checkpoint)
        self.at, self.asked, self.left = at, 0, 0

    def notice(self) -> bool:
        self.asked += FIT.batch_images
        return self.asked == self.at

    def leave(self, state: State) -> None:
        self.left = state.position


def fresh(seed: int) -> State:
    return tiny_state(SAVED, seed)


def stepped(position: int) -> State:
    """A state whose optimizer has moved."""
    state = fresh(0)
    for p in state.model.parameters():
        p.grad = torch.full_like(p, 0.1)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.position = position
    state.ema.update(state.model, position, 32)
    return state


def loaded(run: Folder) -> State:
    """What the newest checkpoint of a run holds."""
    found, state = checkpoints.newest(run), fresh(seed=9)
    assert found
    checkpoints.load(*found, state)
    return state


def tensors(state: State) -> list[Tensor]:
    """All that a checkpoint of a state holds."""
    found, groups = [], list(checkpoints.content(state).values())
    while groups:
        for value in groups.pop(0).values():
            if isinstance(value, dict):
                groups.append(value)
            else:
                found.append(value.detach())
    return found


def flat(state: State) -> Tensor:
    """The same, one after the other."""
    return torch.cat([value.flatten().double() for value in tensors(state)])
