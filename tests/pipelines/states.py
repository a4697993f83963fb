"""States of a tiny run to save and to load, in processes that are to start at once: nothing here imports Ray."""

import torch

from models.ema import EMAConfig
from models.parallelize import ParallelConfig, construct
from models.schedule import article
from models.unet import UNet, UNetConfig
from pipelines import checkpoints
from pipelines.checkpoints import Checkpoint
from pipelines.fit import State, new_state
from pipelines.fit_config import FitConfig
from pipelines.storage import Folder

CONFIG = FitConfig(images=1024, batch_images=32, micro_images=32, log_images=32, checkpoint_images=32,
                   grid_images=32, ema=EMAConfig(power_stds=(0.05, 0.1)))  # fmt: skip
ABOUT = Checkpoint(
    position=0, files={}, config={"seed": 0}, data_digest="d", data_url="file:///d", shape=(1, 8, 8), labels=[],
    tracking_uri="none", tracking_run="", git_revision="",
)  # fmt: skip


def unwritten() -> UNet:
    return UNet(UNetConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), groups=4), 1, side=8)


def fresh(seed: int) -> State:
    model, _ = construct(unwritten, seed, ParallelConfig(), torch.device("cpu"))
    return new_state(model, CONFIG, article())


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


def tensors(state: State) -> list[torch.Tensor]:
    """All that a checkpoint of a state holds."""
    found, groups = [], list(checkpoints.content(state).values())
    while groups:
        for value in groups.pop(0).values():
            if isinstance(value, dict):
                groups.append(value)
            else:
                found.append(value.detach())
    return found


def flat(state: State) -> torch.Tensor:
    """The same, one after the other."""
    return torch.cat([value.flatten().double() for value in tensors(state)])
