"""Power-function averages along a run, kept below its ``ema/``, so that one of any width can be made afterwards.

A snapshot's name holds its position, its width and the first half of its sha256, which is checked on reading. A
checkpoint's manifest lists the snapshots until there, so what is made of them is a function of the checkpoint. They are
never deleted: each takes the room of the weights, for each width, at each checkpoint.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.ema import coefficients, reconstruct
from pipelines.errors import ConfigurationError, DamagedError
from pipelines.storage import Folder

FOLDER = "ema"
NAME = re.compile(r"(\d{12})-(0\.\d+)-([0-9a-f]{32})\.safetensors")


def keep(run: Folder, power: dict[str, dict[str, Tensor]], position: int) -> list[str]:
    """Write power-function averages at a position, if there are any. Again is the same. (rank 0)

    Args:
        run: the folder of the run.
        power: the averages by width, each a tensor by name, on the CPU and whole.
        position: the images seen.

    Returns:
        The names of the run's snapshots until here, one for each position and width.
    """
    if not power:
        return []
    folder = run / FOLDER
    names = {match[0][:-len(".safetensors") - 33]: match[0] for match in map(NAME.fullmatch, folder.names())
             if match and int(match[1]) < position}  # fmt: skip
    for std, average in power.items():
        data = safetensors.torch.save({name: value.contiguous() for name, value in average.items()})
        what = f"{position:012d}-{float(std):.6f}"
        names[what] = f"{what}-{_digest(data)}.safetensors"
        folder.put(names[what], data)
    return sorted(names.values())


def whole(average: dict[str, Tensor], rank: int, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Return an average with its sharded tensors, which lie on the CPU, put together; elsewhere than on rank 0 nothing.

    (all ranks)
    """
    if not any(isinstance(value, DTensor) for value in average.values()):
        return average if rank == 0 else {}
    mine = {name: _part(value) for name, value in average.items()}
    parts: list[Any] | None = [None] * dist.get_world_size(group) if rank == 0 else None
    dist.gather_object(mine, parts, dst=0, group=group)
    found = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in average.items()} if parts else {}
    for part in parts or []:
        for name, (offsets, local) in part.items():
            found[name][tuple(slice(o, o + n) for o, n in zip(offsets, local.shape, strict=True))] = local
    return found


def _part(value: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """Return what this worker holds of a tensor, and where in it that begins."""
    if not isinstance(value, DTensor):
        return (0,) * value.ndim, value
    chunk = value.__create_chunk_list__()[0]  # type: ignore[no-untyped-call]  # torch.distributed.checkpoint asks so
    return tuple(chunk.offsets), value.to_local()


def average(run: Folder, names: list[str], position: int, std: float) -> dict[str, Tensor]:
    """Return the average of width ``std`` at a position, made of the named snapshots of the run.

    Raises:
        ConfigurationError: if there are none that it can be made of, or for a width that cannot be.
        DamagedError: if a snapshot is missing or is not what was written.
    """
    found = [match for match in map(NAME.fullmatch, names) if match]
    if not found:
        raise ConfigurationError(
            f"draw.ema_std is {std}; {run.url} has no snapshots: train with fit.ema.power_stds 0.05 0.10, "
            "or leave it at 0"
        )
    try:
        shares = coefficients([(int(match[1]), float(match[2])) for match in found], position, std)
    except ValueError as error:
        raise ConfigurationError(f"draw.ema_std is {std}: {error}") from error
    return reconstruct(_read(run / FOLDER, [match[0] for match in found]), shares)


def _read(folder: Folder, names: list[str]) -> Iterator[dict[str, Tensor]]:
    for name in names:
        data = folder.get(name)
        if f"-{_digest(data)}." not in name:
            raise DamagedError(f"{folder.url}/{name} is not what was written: its sha256 differs; delete it")
        yield safetensors.torch.load(data)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
