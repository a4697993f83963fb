"""Checkpoints: committed by their manifest, verified before they are loaded, loadable on any number of workers.

``<run>/checkpoint-<position>/`` holds the state as torch.distributed.checkpoint files, one or more per worker, and
``manifest.json``, written last by rank 0 when every worker has delivered its part: no manifest, no checkpoint. The
manifest has the size and the sha256 of each file, the position, the configuration, the data digest and the git
revision. torch unpickles the index of such a checkpoint, so nothing is given to it whose digest is not in a manifest.
"""

import hashlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from pipelines.errors import DamagedError, DataError
from pipelines.fit import State
from pipelines.storage import Folder
from pipelines.world import World

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"

log = logging.getLogger("brickyard.checkpoints")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The content of a checkpoint's manifest."""

    position: int
    """Images seen: where the stream goes on."""
    files: dict[str, tuple[int, str]]
    """Size in bytes and sha256 of each file."""
    config: dict[str, Any]
    """The resolved configuration of the run, as it is written to YAML."""
    data_digest: str
    data_url: str
    shape: tuple[int, int, int]
    """Channels, height and width of the images."""
    labels: list[str]
    tracking_uri: str
    tracking_run: str
    git_revision: str
    snapshots: list[str] = field(default_factory=list)
    """Names of the run's power-function averages until here."""

    @property
    def digest(self) -> str:
        """The sha256 of the manifest's content; it names these weights in every lineage."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def folder_name(position: int) -> str:
    """Return the name of a checkpoint's folder; names sort by position."""
    return f"{PREFIX}{position:012d}"


def commit(run: Folder, state: State, about: Checkpoint, world: World) -> Checkpoint:
    """Write the state as the run's checkpoint at its position. (all ranks)

    Args:
        run: the folder of the run.
        state: what to write.
        about: the manifest but for the position and the files.
        world: this worker's place.

    Returns:
        The manifest as it was committed.
    """
    folder = run / folder_name(state.position)
    with tempfile.TemporaryDirectory(prefix="brickyard-") as local:
        with _alone_is_fine():
            dcp.save(_tensors(state), checkpoint_id=local, no_dist=world.size == 1)
        mine = {path.name: _upload(folder, path) for path in sorted(Path(local).iterdir())}
    parts: list[Any] = [mine]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, mine)  # also the barrier after which everything is there
    files = {name: entry for part in parts for name, entry in part.items()}
    if unseen := files.keys() - set(folder.names()):
        raise DataError(
            f"{folder.url} is not the same folder for all workers: {sorted(unseen)} were written and are not there; "
            "give a --root on storage that all nodes share"
        )
    manifest = Checkpoint(**{**asdict(about), "position": state.position, "files": files})
    if world.rank == 0:
        folder.put(MANIFEST, json.dumps(asdict(manifest), indent=1).encode())
    if world.size > 1:
        dist.barrier()  # nobody goes on from a checkpoint that is not committed
    return manifest


def keep_newest(run: Folder, keep: int, position: int) -> None:
    """Tidy up after the commit at a position: keep that checkpoint and the committed ones before it. (rank 0)

    What lies beyond the position is damaged or half written, since the run came back to before it; it goes as well.
    """
    names = [name for name in run.names() if name.startswith(PREFIX)]
    until_here = [name for name in names if name <= folder_name(position) and (run / name).exists(MANIFEST)]
    for name in set(names) - set(until_here[-keep:]):
        (run / name).delete()


def read(folder: Folder) -> Checkpoint:
    """Read the manifest of a checkpoint.

    Raises:
        DataError: if there is none, or it is not one.
    """
    text = folder.get(MANIFEST)
    try:
        return TypeAdapter(Checkpoint).validate_json(text)
    except ValidationError as error:
        raise DamagedError(f"{folder.url}/{MANIFEST} is not the manifest of a checkpoint: {error}") from error


def read_verified(folder: Folder) -> Checkpoint:
    """Read the manifest of a checkpoint, and prove that every file is as it was committed.

    Raises:
        DataError: if one is not.
    """
    checkpoint = read(folder)
    with _verified(folder, checkpoint):
        return checkpoint


def newest(run: Folder) -> tuple[Folder, Checkpoint] | None:
    """Return the newest checkpoint of a run whose every byte is as committed, or None; say which were passed over."""
    for name in reversed([name for name in run.names() if name.startswith(PREFIX)]):
        folder = run / name
        if not folder.exists(MANIFEST):
            log.warning("%s was never committed; passing it over", folder.url)
            continue
        try:
            return folder, read_verified(folder)
        except DamagedError as error:
            log.warning("passing over a damaged checkpoint: %s", error)
    return None


def load(folder: Folder, checkpoint: Checkpoint, state: State, world: World) -> None:
    """Fill the state from a checkpoint. (all ranks)

    Raises:
        DataError: if a file is missing or is not what was committed.
    """
    tensors = _tensors(state)
    with _verified(folder, checkpoint) as local, _alone_is_fine():
        dcp.load(tensors, checkpoint_id=str(local), no_dist=world.size == 1)
    state.model.load_state_dict(tensors["model"])
    optimizer = _optimizer_state(state)
    optimizer.update(tensors["optimizer"])
    set_optimizer_state_dict(
        state.model, state.optimizer, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
    )
    state.ema.shadow.update(tensors["ema"])
    state.ema.power.update(tensors["ema_power"])
    state.timesteps.state.update(tensors["timesteps"])
    state.timesteps.refresh()
    state.losses.copy_(tensors["report"]["losses"])
    state.position = checkpoint.position


def load_weights(folder: Folder, checkpoint: Checkpoint, model: torch.nn.Module, averaged: bool) -> None:
    """Fill a model with a checkpoint's weights, or with their average.

    Raises:
        DataError: if a file is missing or is not what was committed.
    """
    weights = {name: p.detach() for name, p in model.named_parameters()}
    with _verified(folder, checkpoint) as local, _alone_is_fine():
        dcp.load({"ema" if averaged else "model": weights}, checkpoint_id=str(local), no_dist=True)


def _tensors(state: State) -> dict[str, dict[str, Any]]:
    """All that a checkpoint holds: tensors only. The rest of the optimizer is the configuration."""
    optimizer = {name: value for name, value in _optimizer_state(state).items() if isinstance(value, Tensor)}
    return {
        "model": dict(state.model.state_dict()),
        "optimizer": optimizer,
        "ema": dict(state.ema.shadow),
        "ema_power": {std: dict(shadow) for std, shadow in state.ema.power.items()},
        "timesteps": dict(state.timesteps.state),
        "report": {"losses": state.losses},
    }


def _optimizer_state(state: State) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return dict(get_optimizer_state_dict(state.model, state.optimizer, options=options))


def _upload(folder: Folder, path: Path) -> tuple[int, str]:
    data = path.read_bytes()
    folder.put(path.name, data)
    return len(data), hashlib.sha256(data).hexdigest()


@contextmanager
def _verified(folder: Folder, checkpoint: Checkpoint) -> Iterator[Path]:
    """Bring the files of a checkpoint into a local folder, each proved to be what was committed."""
    with tempfile.TemporaryDirectory(prefix="brickyard-") as local:
        for name, (size, sha256) in checkpoint.files.items():
            path = Path(local) / name
            folder.download(name, path)
            if path.stat().st_size != size:
                raise DamagedError(f"{folder.url}/{name} has {path.stat().st_size} bytes, {size} were committed")
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                raise DamagedError(f"{folder.url}/{name} has sha256 {found[:16]}…, {sha256[:16]}… was committed")
        yield Path(local)


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Keep torch from warning that a single process saves and loads alone, as it was told to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
