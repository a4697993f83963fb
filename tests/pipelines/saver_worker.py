"""One rank of several that save: folder, scenario, world, rank, and what the scenario asks for."""

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from models.noise import normal
from models.parallelize import ParallelConfig
from pipelines import checkpoints
from pipelines.config import DataConfig, TrainJob
from pipelines.fit import State
from pipelines.record import Message
from pipelines.saver import Saved, Saver
from pipelines.scaling import ScalingConfig
from pipelines.storage import Folder
from pipelines.worker import TrainTask, WorkerListener
from pipelines.world import World
from tests.pipelines.states import ABOUT, SAVED, tiny_state

BROUGHT: list[str] = []


class Counted(Folder):
    """Remembers what was read of it."""

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        BROUGHT.append(name)
        return super().pieces(name, size)


def spread(strategy: str, size: int, seed: int) -> State:
    """A state of a tiny network that is spread over the workers."""
    how = {
        "fsdp": ParallelConfig(strategy="fsdp"),
        "hybrid": ParallelConfig(strategy="hybrid", shards=max(size // 2, 2)),
    }.get(strategy, ParallelConfig())
    return tiny_state(SAVED, seed, how=how)


def step(state: State) -> None:
    """An optimizer step on the same images everywhere."""
    x = normal(0, "x", torch.arange(2), (1, 8, 8))
    state.model(x, torch.tensor([1, 500])).square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.position += 32
    state.ema.update(state.model, state.position, 32)


def chain(folder: Path, world: World, *runs: str) -> None:
    """Load what the run before has left, in one way, and save it again, in another: fsdp:0 ddp:1 …"""
    for run in runs:
        strategy, _, number = run.partition(":")
        state = spread(strategy, world.size, seed=int(number))
        if int(number):
            found = checkpoints.newest(Folder(f"{folder}/run-{int(number) - 1}"))
            assert found
            BROUGHT.clear()
            checkpoints.load(Counted(found[0].url), found[1], state)
            (folder / f"brought-{number}-{world.rank}.json").write_text(json.dumps(BROUGHT))
        else:
            step(state)
            step(state)
        saver = Saver(Folder(f"{folder}/run-{number}"), ABOUT, world, keep=2)
        saver.save(state)
        step(state)  # too late to be in it
        saver.flush()


def refused(folder: Path, world: World) -> None:
    """Save four times; from the second to the third the files of rank 1 may not be as long as they are."""
    told: list[Saved] = []
    saver = Saver(Folder(f"{folder}/run"), ABOUT, world, 2, told.append)
    state, said = spread("fsdp", world.size, 0), ["", "", "", ""]
    for i in range(4):  # the fourth tells how the third ended
        if world.rank == 1:
            most = 1000 if i in (1, 2) else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        step(state)
        try:
            saver.save(state)
            saver._thread.join()  # type: ignore[union-attr]
        except checkpoints.TryAgainError as error:
            said[i] = str(error)
    (folder / f"said-{world.rank}.json").write_text(json.dumps([said, [saved.failure for saved in told]]))


def dies(folder: Path, world: World) -> None:
    """Rank 1 is killed while rank 0 waits for what it has to say."""
    saver = Saver(Folder(f"{folder}/run"), ABOUT, world, 2)
    state = spread("fsdp", world.size, 0)
    step(state)
    saver.save(state)
    saver.flush()
    step(state)
    if world.rank == 1:
        checkpoints._upload = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    saver.save(state)
    try:
        saver.flush()
    except Exception as error:
        (folder / "said").write_text(f"{type(error).__name__}: {error}")
    os._exit(0)  # the group is broken


class Heard(WorkerListener):
    """Prints what it has to say."""

    def send(self, message: Message) -> None:
        sys.stdout.write(f"{message}\n")
        sys.stdout.flush()


def stands_still(folder: Path, world: World) -> None:
    """Rank 1 is stopped at the first checkpoint, where rank 0 waits for nothing but storage."""
    job = TrainJob(root=str(folder), data=DataConfig(builtin="digits"), fit=SAVED, scaling=ScalingConfig(hang_s=2))
    listener = Heard(TrainTask(job, None, None, ABOUT, None), world, 0, None)  # type: ignore[arg-type]
    state = spread("ddp", world.size, 0)
    step(state)
    listener.notice()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    listener.checkpoint(state)
    listener.notice()
    dist.barrier()  # the gradient of the next step


if __name__ == "__main__":
    folder, scenario, size, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting-{'-'.join([scenario, *sys.argv[5:]])}"
    dist.init_process_group("gloo", init_method=meeting, world_size=size, rank=rank)
    scenarios = {"chain": chain, "refused": refused, "dies": dies, "stands_still": stands_still}
    scenarios[scenario](folder, World(rank, size), *sys.argv[5:])
    dist.destroy_process_group()
