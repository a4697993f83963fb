"""Checkpoints behind the back of the loop: it stands still while its state is copied into host memory, no longer.

A thread of each worker then writes, uploads and commits the copy (:func:`pipelines.checkpoints.write`), over a gloo
group that the loop never uses: so the collectives of the two never meet, on GPUs neither.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from pipelines.checkpoint_manifest import Checkpoint
from pipelines.checkpoints import Content, content, folder_name, keep_newest, write
from pipelines.errors import DataError, TryAgainError
from pipelines.fit import State
from pipelines.storage import Folder
from pipelines.world import World

PATIENCE = timedelta(minutes=30)
"""For how long workers that have delivered their part of a checkpoint wait for one that has not."""

log = logging.getLogger("brickyard.checkpoints")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """How a save ended."""

    position: int
    seconds: float
    """From the copy to the end."""
    waited_s: float
    """For how long the loop stood still because the save before had not ended."""
    copied_s: float
    """And because the state was copied."""
    failure: str = ""
    """Why there is no checkpoint; empty: there is one."""


class Saver:
    """Commits checkpoints of a run in the background, one at a time, and keeps the newest. (all ranks)

    One that storage does not take is told, and training goes on without it. If the next one fails too, or if it was the
    last of the run, there is no sense in going on.
    """

    def __init__(
        self,
        run: Folder,
        about: Checkpoint,
        world: World,
        keep: int,
        tell: Callable[[Saved], None] = lambda saved: None,
    ) -> None:
        """Make the group. (all ranks)

        Args:
            run: the folder of the run.
            about: the manifest of its checkpoints, but for the position, the files and the snapshots.
            world: this worker's place.
            keep: how many checkpoints stay.
            tell: is called at the end of each save, by the thread. (rank 0)
        """
        self._run, self._about, self._world, self._keep, self._tell = run, about, world, keep, tell
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if world.size > 1 else None
        cuda = world.device.type == "cuda"
        # It holds on to its buffers, and fills them again at the next save.
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
        )
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failed = 0  # in a row
        self._newest = "none was written since the start"

    def save(self, state: State) -> None:
        """Copy a state and begin to commit it, as soon as the save before has ended. (all ranks)

        Raises:
            TryAgainError: on all ranks, if storage took neither of the last two.
        """
        began = time.perf_counter()
        self._wait()
        copying = time.perf_counter()
        copy = self._stager.stage(content(state))
        now = time.perf_counter()
        about = Saved(position=state.position, seconds=0, waited_s=copying - began, copied_s=now - copying)
        # A daemon: should this process have to end, it does not wait for a worker elsewhere that may be no more.
        self._thread = threading.Thread(target=self._commit, args=(about, copy), name="checkpoint", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Wait until the last save has ended. (all ranks)

        Raises:
            TryAgainError: on all ranks, if storage did not take it.
        """
        self._wait(allowed=0)

    def _wait(self, allowed: int = 1) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._error is not None and not isinstance(self._error, DataError | TryAgainError):
                raise self._error  # no matter of storage
            self._failed = self._failed + 1 if self._error else 0
        if self._failed > allowed:
            which = "the last checkpoint" if self._failed == 1 else f"{self._failed} checkpoints in a row"
            raise TryAgainError(
                f"{which} could not be written: {self._error} ({self._newest}); then run the same command to go on"
            )

    def _commit(self, saved: Saved, copy: Content) -> None:
        """Write a copy. (all ranks, each in a thread)"""
        began, self._error = time.perf_counter(), None
        if self._world.device.type == "cuda":  # a thread begins with the first GPU
            torch.cuda.set_device(self._world.device)
        try:
            write(self._run, replace(self._about, position=saved.position), copy, self._world, self._group)
        except BaseException as error:  # for the loop, which is told when it comes by
            self._error = error
        failure = "" if self._error is None else f"{type(self._error).__name__}: {self._error}"
        if not failure:
            self._newest = f"the newest is {self._run.url}/{folder_name(saved.position)}"
        if self._world.rank > 0:
            return
        if failure:
            log.warning("there is no checkpoint at %d images: %s; %s", saved.position, failure, self._newest)
        else:
            self._tidy_up(saved.position)
        self._tell(replace(saved, seconds=time.perf_counter() - began, failure=failure))

    def _tidy_up(self, position: int) -> None:
        try:
            keep_newest(self._run, self._keep, position)
        except (DataError, TryAgainError) as error:  # the new one is safe
            log.warning("older checkpoints stay: %s", error)
