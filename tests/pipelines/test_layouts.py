"""The same run on any layout. Run as a program, this file is one of W workers, real processes with gloo between them.

Every case is a whole run of a few steps: labels that are dropped, t that follows the losses, two power averages.
"""

import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.parallelize import ParallelConfig
from pipelines import checkpoints
from pipelines.fit import State, fit
from pipelines.storage import Folder
from pipelines.world import World
from tests.pipelines.helpers import ABOUT, VARIANTS, Ear, micro_batches, tiny_state

VARIANT = VARIANTS["loss-aware"]
FIT = replace(VARIANT.fit, images=256, log_images=64, checkpoint_images=256, grid_images=256)
DDP, FSDP, HYBRID = (
    ParallelConfig(strategy=name, shards=shards)  # type: ignore[arg-type]
    for name, shards in (("ddp", 1), ("fsdp", 1), ("hybrid", 2))
)
SEVERAL = 4
"""Micro-batches of a global batch where gradients are accumulated; otherwise as many as there are workers."""
NOTICE = 96
"""Where workers leave, in the middle of a report, those of the cases that do."""
CASES = {
    1: [(DDP, SEVERAL, 0), (DDP, 1, 0)],
    2: [(DDP, SEVERAL, 0), (DDP, 2, NOTICE), (FSDP, SEVERAL, NOTICE), (FSDP, 2, 0)],
    3: [(DDP, SEVERAL, NOTICE), (FSDP, SEVERAL, 0)],  # which 3 does not divide
    4: [(how, n, 0) for how in (DDP, FSDP, HYBRID) for n in (SEVERAL, 2 * SEVERAL)],
}
NAMES = {
    f"{workers} workers, {how.strategy}, {n} micro-batches{', left and gone on' if notice else ''}": (workers, case)
    for workers, cases in CASES.items()
    for case, (how, n, notice) in enumerate(cases)
}


class Leaver(Ear):
    """Is told to leave at a position, and does with a checkpoint."""

    def __init__(self, run: Folder, world: World) -> None:
        super().__init__(lambda state: checkpoints.commit(run, state, ABOUT, world) and None)
        self.asked = 0

    def notice(self) -> bool:
        self.asked += FIT.batch_images
        return self.asked == NOTICE

    def leave(self, state: State) -> None:
        assert state.position == NOTICE


def outcome(state: State, ear: Ear) -> dict[str, Any]:
    """All that a run is at its end, gathered from whoever has a part of it. (all ranks)"""

    def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for name, t in tensors.items()}

    return {
        "weights": whole(dict(state.model.named_parameters())),
        "average": whole(state.ema.shadow),
        "power average": whole(state.ema.power["0.1"]),
        "timesteps": state.timesteps.state,
        "losses": torch.tensor([list(m.values())[:5] for _, m in ear.reports], dtype=torch.float64),
        "norms": torch.tensor([m["gradient_norm"] for _, m in ear.reports], dtype=torch.float64),
        "grid": {"samples": ear.pictures[-1][1]} if ear.pictures else {},
    }


PIXELS = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]


def run(how: ParallelConfig, n: int, dtype: torch.dtype, world: World, away: Folder | None = None) -> dict[str, Any]:
    """Train from the first image to the last, leaving once in between if there is where to leave it. (all ranks)"""
    config, ear = replace(FIT, micro_images=FIT.batch_images // n), Ear()
    state = tiny_state(config, dtype=dtype, variant=VARIANT, how=how)
    if away:
        leaver = Leaver(away, world)
        feed = micro_batches(PIXELS, config, 0, world.rank, world.size)
        fit(config, state, VARIANT.schedule, 0, feed, leaver, world)
        state, found = tiny_state(config, 1, dtype, VARIANT, how), checkpoints.newest(away)
        assert found and found[1].position == NOTICE
        checkpoints.load(*found, state)
        ear.reports = leaver.reports
    feed = micro_batches(PIXELS, config, state.position, world.rank, world.size)
    fit(config, state, VARIANT.schedule, 0, feed, ear, world)
    return outcome(state, ear)


def take_part(folder: Path, size: int, rank: int) -> None:
    """Be one of the workers, in every case of so many of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", world_size=size, rank=rank)
    found = [
        [
            run(how, n, dtype, World(rank, size), Folder(f"{folder}/{case}-{dtype}") if notice else None)
            for dtype in (torch.float64, torch.float32)
        ]
        for case, (how, n, notice) in enumerate(CASES[size])
    ]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@cache
def one_worker(dtype: torch.dtype) -> dict[str, Any]:
    return run(DDP, SEVERAL, dtype, World())


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each of W processes found in each case."""

    @cache
    def start(size: int) -> list[Any]:
        folder = tmp_path_factory.mktemp(f"{size}-workers")
        command = [sys.executable, "-W", "error", "-m", "tests.pipelines.test_layouts", str(folder), str(size)]
        started = [subprocess.Popen([*command, str(rank)]) for rank in range(size)]
        assert [worker.wait(timeout=300) for worker in started] == [0] * size
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]

    return start


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference between two sets of tensors, as a share of the largest number of each tensor, or of 1."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - value).abs().max() / value.abs().max().clamp(min=1)) for name, value in expected.items()
    )


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_same_run(name: str, workers: Any) -> None:
    """In float64 to 1e-10: only the order of sums differs.

    In float32 a sum in another order differs by some 1e-7 of it. AdamW divides a gradient by its own size, so where one
    is next to nothing that turns a step around: each of the 8 steps, of up to 2e-3, can be off by twice its length in a
    few weights, 3.2e-2 at the very most, and is by far less in the mean.
    """
    size, case = NAMES[name]
    for found in workers(size):
        exact, rounded = found[case]
        for which in ("weights", "average", "power average"):
            assert apart(exact[which], one_worker(torch.float64)[which]) < 1e-10
            expected = one_worker(torch.float32)[which]
            assert apart(rounded[which], expected) < 3.2e-2
            mean = torch.cat([(rounded[which][n] - p).abs().flatten() for n, p in expected.items()]).mean()
            assert mean < 1e-5
        expected = one_worker(torch.float64)["timesteps"]
        assert torch.equal(exact["timesteps"]["seen"], expected["seen"])
        assert apart(exact["timesteps"], expected) < 1e-10
    exact, rounded = workers(size)[0][case]
    for told, dtype, within in ((exact, torch.float64, 1e-10), (rounded, torch.float32, 1e-3)):
        for which in ("losses", "norms"):
            torch.testing.assert_close(told[which], one_worker(dtype)[which], rtol=within, atol=within)
    assert apart(exact["grid"], one_worker(torch.float64)["grid"]) < 1e-5  # samplers compute in float32


if __name__ == "__main__":
    take_part(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
