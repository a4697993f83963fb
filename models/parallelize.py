"""Spreading a finished model over workers, from beside it: no network knows about any of this."""

from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

Strategy: TypeAlias = Literal["single", "ddp"]


def parallelize(model: nn.Module, strategy: Strategy, device: torch.device) -> nn.Module:
    """Return the model ready to train on this worker's device. (all ranks)

    Args:
        model: built, its weights the same on all ranks or about to be loaded.
        strategy: ``single`` is the model itself; ``ddp`` copies it to every worker and averages the gradients.
        device: where this worker computes.
    """
    model = model.to(device)
    if strategy == "single":
        return model
    if strategy != "ddp":
        raise ValueError(f"strategy is {strategy!r}; it must be 'single' or 'ddp'")
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
