"""Checkpoints: committed by their manifest, verified before they are loaded, loadable on any number of workers.

``<run>/checkpoint-<position>/`` holds the state as torch.distributed.checkpoint files, one or more per worker, and
``manifest.json``, written last by rank 0 when every worker has delivered its part: no manifest, no checkpoint. The
manifest has the size and the sha256 of each file, the position, the configuration, the data digest and the git
revision. torch unpickles the index of such a checkpoint, so nothing is given to it whose digest is not in a manifest.
"""

import hashlib
import io
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from pipelines import dcp_files, snapshots
from pipelines.checkpoint_manifest import Checkpoint, parse
from pipelines.errors import ConfigurationError, DamagedError, DataError, TryAgainError
from pipelines.fit import State
from pipelines.storage import Folder
from pipelines.world import World

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"
CHOSEN = "goes-on-at"
"""The object of a run that says at which position its workers were last told to go on."""
T = TypeVar("T")
Content = dict[str, dict[str, Any]]
"""Tensors by name, in groups."""

log = logging.getLogger("brickyard.checkpoints")


def folder_name(position: int) -> str:
    """Return the name of a checkpoint's folder; names sort by position."""
    return f"{PREFIX}{position:012d}"


def content(state: State) -> Content:
    """Return all that a checkpoint holds, the state's own tensors. The rest of the optimizer is the configuration."""
    optimizer = {name: value for name, value in _optimizer_state(state).items() if isinstance(value, Tensor)}
    return {
        "model": dict(state.model.state_dict()),
        "optimizer": optimizer,
        "ema": dict(state.ema.shadow),
        "ema_power": {std: dict(shadow) for std, shadow in state.ema.power.items()},
        "timesteps": dict(state.timesteps.state),
        "report": {"losses": state.losses},
    }


def commit(run: Folder, state: State, about: Checkpoint, world: World) -> Checkpoint:
    """Write the state as the run's checkpoint at its position, while everybody waits. (all ranks)

    :class:`pipelines.saver.Saver` does so behind the back of the loop.
    """
    return write(run, replace(about, position=state.position), content(state), world, None)


def write(
    run: Folder, about: Checkpoint, content: Content, world: World, group: dist.ProcessGroup | None
) -> Checkpoint:
    """Write a checkpoint. (all ranks)

    Args:
        run: the folder of the run.
        about: the manifest but for the files and the snapshots.
        content: what to write.
        world: this worker's place.
        group: the workers, if there are several.

    Returns:
        The manifest as it was committed.

    Raises:
        DataError, TryAgainError: on all ranks, if storage refuses one of them, or does not answer it for long.
        ConfigurationError: on all ranks, if they do not write into one folder.
    """
    folder = run / folder_name(about.position)
    # What lies there was passed over, or the run would not come by here again. Before its files change it must not look
    # committed. The others meet this rank in what follows, before they write.
    cleared = _attempt(folder.delete) if world.rank == 0 else None
    files = dcp_files.dump(content, world.size, group)
    power = {std: snapshots.whole(average, world.rank, group) for std, average in content["ema_power"].items()}

    def deliver() -> tuple[dict[str, tuple[int, str]], list[str]]:
        if isinstance(cleared, Exception):
            raise cleared
        entries = {name: _upload(folder, name, data) for name, data in sorted(files.items())}
        return entries, snapshots.keep(run, power, about.position) if world.rank == 0 else []

    parts: list[Any] = [_attempt(deliver)]
    if world.size > 1:
        mine, parts = parts[0], [None] * world.size
        dist.all_gather_object(parts, mine, group=group)  # also the barrier after which everything is there
    if failed := next((part for part in parts if isinstance(part, Exception)), None):
        if world.rank == 0:
            with suppress(DataError, TryAgainError):
                folder.delete()  # on a full disk it is in the way
        raise failed
    entries = {name: entry for part, _ in parts for name, entry in part.items()}
    manifest = replace(about, files=entries, snapshots=parts[0][1])
    outcome = [_attempt(lambda: _close(folder, manifest)) if world.rank == 0 else None]
    if world.size > 1:  # nobody goes on from a checkpoint that is not committed
        dist.broadcast_object_list(outcome, group=group)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return manifest


def _upload(folder: Folder, name: str, data: bytes) -> tuple[int, str]:
    folder.put(name, data)
    return len(data), hashlib.sha256(data).hexdigest()


def _close(folder: Folder, manifest: Checkpoint) -> None:
    """Write the manifest, if what it names is there."""
    if unseen := manifest.files.keys() - set(folder.names()):
        raise ConfigurationError(
            f"{folder.url} is not the same folder for all workers: {sorted(unseen)} were written and are not there; "
            "give a --root on storage that all nodes share"
        )
    folder.put(MANIFEST, manifest.to_json())


def _attempt(do: Callable[[], T]) -> T | Exception:
    """Return what a function returns, or what it raises, in a form that can travel to other workers."""
    try:
        return do()
    except (ConfigurationError, DataError, TryAgainError) as error:
        return error
    except Exception as error:
        untold = RuntimeError(f"{type(error).__name__}: {error}")
        untold.__cause__ = error
        return untold


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
        OtherFormatError: if another version of this code wrote it.
    """
    return parse(folder.get(MANIFEST), f"{folder.url}/{MANIFEST}")


def read_verified(folder: Folder) -> Checkpoint:
    """Read the manifest of a checkpoint, and prove that every byte is as it was committed.

    Raises:
        DataError: if one is not.
    """
    checkpoint = _read_listed(folder)
    for name in checkpoint.files:
        _bring(folder, checkpoint, name, keep=False)
    return checkpoint


def _read_listed(folder: Folder) -> Checkpoint:
    """Read the manifest of a checkpoint, and see that every file is there and as long as it was."""
    checkpoint = read(folder)
    sizes = {stored.name: stored.size_bytes for stored in folder.find()}
    for name, (size, _) in checkpoint.files.items():
        if name not in sizes:
            raise DamagedError(f"{folder.url}/{name} does not exist")
        if sizes[name] != size:
            raise DamagedError(f"{folder.url}/{name} has {sizes[name]} bytes, {size} were committed")
    return checkpoint


def newest(
    run: Folder, verified: bool = True, say: Callable[[str], None] = log.warning
) -> tuple[Folder, Checkpoint] | None:
    """Return the newest checkpoint of a run that is as it was committed, or None; say which were passed over.

    Args:
        run: the folder of the run.
        verified: read every byte; if not, the manifest and a listing, by which a changed byte goes unnoticed.
        say: is told of each that is passed over, in a sentence.
    """
    for name in reversed([name for name in run.names() if name.startswith(PREFIX)]):
        folder = run / name
        if not folder.exists(MANIFEST):
            say(f"{folder.url} was never committed; passing it over")
            continue
        try:
            return folder, read_verified(folder) if verified else _read_listed(folder)
        except DamagedError as error:
            say(f"passing over a damaged checkpoint: {error}")
    return None


def choose(run: Folder, say: Callable[[str], None] = log.warning) -> int:
    """Verify where a run can go on, write it down for its workers, and return it: a position, 0 without a checkpoint.

    The stream is opened there, and they load what is there: none of them has to choose, or to read every byte, again.
    ``say`` is told of each checkpoint that is passed over.
    """
    found = newest(run, say=say)
    position = found[1].position if found else 0
    run.put(CHOSEN, str(position).encode())
    return position


def chosen_position(run: Folder) -> int:
    """Return where the workers were last told to go on, in images."""
    return int(run.get(CHOSEN))


def chosen(run: Folder) -> tuple[Folder, Checkpoint] | None:
    """Return the checkpoint that was chosen for the workers, or None at the beginning of a run."""
    position = chosen_position(run)
    folder = run / folder_name(position)
    return (folder, read(folder)) if position else None


def load(folder: Folder, checkpoint: Checkpoint, state: State) -> None:
    """Fill the state from a checkpoint; each worker reads the files that hold its part. (all ranks)

    Raises:
        DataError: if a file is missing or is not what was committed; the state is of no use then.
    """
    tensors = content(state)
    dcp_files.fill(tensors, lambda name: _bring(folder, checkpoint, name))
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
    dcp_files.fill({"ema" if averaged else "model": weights}, lambda name: _bring(folder, checkpoint, name))


def _optimizer_state(state: State) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return dict(get_optimizer_state_dict(state.model, state.optimizer, options=options))


def _bring(folder: Folder, checkpoint: Checkpoint, name: str, keep: bool = True) -> io.BytesIO:
    """Return the bytes of a file, proved to be what was committed, or, not kept, only the proof."""
    size, sha256 = checkpoint.files[name]
    file, found, length = io.BytesIO(), hashlib.sha256(), 0
    for piece in folder.pieces(name, size):
        found.update(piece)
        length += len(piece)
        if keep:
            file.write(piece)
    if length != size:
        raise DamagedError(f"{folder.url}/{name} has {length} bytes, {size} were committed")
    if found.hexdigest() != sha256:
        raise DamagedError(f"{folder.url}/{name} has sha256 {found.hexdigest()[:16]}…, {sha256[:16]}… was committed")
    file.seek(0)
    return file
