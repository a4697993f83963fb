"""Spreading a finished model over workers, from beside it: no network knows about any of this."""

from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

Strategy: TypeAlias = Literal["single", "ddp", "fsdp"]


def parallelize(
    model: nn.Module, strategy: Strategy, device: torch.device, mesh: DeviceMesh | None = None
) -> nn.Module:
    """Return the model ready to train on this worker's device. (all ranks)

    The order, and why: the first weights come before, since their names are their keys, and so does anything that
    changes the model's modules; then the device; then the wrapper. With ``fsdp`` the optimizer and the average of the
    weights come after, since it puts sharded parameters in the place of the whole ones.

    Args:
        model: built, its weights the same on all ranks or about to be loaded.
        strategy: ``single`` is the model itself; ``ddp`` copies it to every worker and averages the gradients; ``fsdp``
            gives each worker a part of every parameter, of its gradient and of its optimizer state. The model needs
            ``blocks()`` for it.
        device: where this worker computes.
        mesh: the workers that share one copy of the model, for ``fsdp``; all of the default group if not given.
    """
    model = model.to(device)
    if strategy == "single":
        return model
    if strategy == "fsdp":
        # Left to itself, FSDP2 would take the GPUs of a machine that has some.
        return _shard(model, mesh or init_device_mesh(device.type, (dist.get_world_size(),)))
    if strategy != "ddp":
        raise ValueError(f"strategy is {strategy!r}; it must be 'single', 'ddp' or 'fsdp'")
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def _shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    # FSDP2 refuses parameters that lie channels last; pictures that do are still computed so.
    model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    # Each block is gathered just before it runs and let go after it: one block is whole at a time, not the model.
    for block in model.blocks():  # type: ignore[operator]
        fully_shard(block, mesh=mesh)
    # The root comes last and takes what is in no block: the ends of the network. It is let go too, else a forward pass
    # without a backward one would leave whole parameters behind, and later changes of the sharded ones without effect.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def accumulating(parallel, last):
    from contextlib import nullcontext

    return parallel.no_sync() if not last and hasattr(parallel, "no_sync") else nullcontext()


def clip_gradients(model, max_norm):
    return float(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
