"""A run that has left a checkpoint, without the training."""

from dataclasses import replace
from typing import Any

import torch

from jobs.presets import DIGITS
from models.network import NetworkConfig
from models.objective import ObjectiveConfig
from pipelines import checkpoints
from pipelines.plain import to_dict
from pipelines.storage import Folder
from pipelines.world import World
from tests.pipelines.states import ABOUT, FIT, TINY, VARIANTS, tiny_state


def committed(folder: Folder, classes: int, seed: int = 0, **about: Any) -> Folder:
    """A run with one checkpoint of a network that is not trivial, whose labels matter; `about` is for its manifest."""
    state = tiny_state(FIT, variant=VARIANTS["plain"]._replace(classes=classes))
    drawn = torch.Generator().manual_seed(seed)
    for shadow in state.ema.shadow.values():
        shadow.copy_(0.4 * torch.randn(shadow.shape, generator=drawn))
    state.position = 128
    fit = replace(DIGITS.fit, objective=ObjectiveConfig(target="x_0"))  # so that its output can be seen in the pictures
    config = to_dict(replace(DIGITS, fit=fit, network=NetworkConfig(unet=TINY, labels=classes > 0)))
    names = ["a", "b", "c", "d"]  # the data have labels, whether or not the network learned them
    checkpoints.commit(folder, state, replace(ABOUT, **{"config": config, "labels": names, **about}), World())
    return folder
