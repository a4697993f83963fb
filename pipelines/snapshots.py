"""Power-function averages along a run, kept below its ``ema/``, so that one of any width can be made afterwards.

A snapshot's name holds its position, its width and the first half of its sha256, which is checked on reading. A
checkpoint's manifest lists the snapshots until there, so what is made of them is a function of the checkpoint. They are
never deleted: each takes the room of the weights, for each width, at each checkpoint.
"""

import hashlib
import re
from collections.abc import Iterator

import safetensors.torch
from torch import Tensor

from models.ema import coefficients, reconstruct
from pipelines.errors import ConfigurationError, DamagedError
from pipelines.fit import State
from pipelines.storage import Folder

FOLDER = "ema"
NAME = re.compile(r"(\d{12})-(0\.\d+)-([0-9a-f]{32})\.safetensors")


def keep(run: Folder, state: State) -> list[str]:
    """Write the power-function averages of a state, if it has any. Again is the same. (rank 0)

    Returns:
        The names of the run's snapshots until here, one for each position and width.
    """
    if not state.ema.power:
        return []
    folder = run / FOLDER
    names = {match[0][:-len(".safetensors") - 33]: match[0] for match in map(NAME.fullmatch, folder.names())
             if match and int(match[1]) < state.position}  # fmt: skip
    for std, average in state.ema.power.items():
        data = safetensors.torch.save({name: value.contiguous() for name, value in average.items()})
        what = f"{state.position:012d}-{float(std):.6f}"
        names[what] = f"{what}-{_digest(data)}.safetensors"
        folder.put(names[what], data)
    return sorted(names.values())


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
