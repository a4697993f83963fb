"""The same run on any layout. Run as a program, this file is one of W workers, real processes with gloo between them.

Every case is a whole run of a few steps: labels that are dropped, t that follows the losses, two power averages.
"""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.parallelize import ParallelConfig
from pipelines import checkpoints
from pipelines import fit as loop
from pipelines.fit import DivergedError, State, fit
from pipelines.fit_config import FitConfig
from pipelines.storage import Folder
from pipelines.world import World
from tests.pipelines.states import ABOUT, VARIANTS, Ear, Noticed, everything, micro_batches, tiny_state
from tests.processes import side_by_side

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
BAD = range(64, 96)
"""Positions of the step in which the last worker's gradient is not finite, in the cases that have one."""


class Case(NamedTuple):
    how: ParallelConfig
    n: int
    """Micro-batches of a global batch."""
    notice: bool = False
    bad: bool = False

    def __str__(self) -> str:
        what = ", left and gone on" * self.notice + ", one bad gradient" * self.bad
        return f"{self.how.strategy}, {self.n} micro-batches{what}"


CASES = {
    1: [*(Case(how, SEVERAL) for how in (DDP, FSDP, HYBRID)), Case(DDP, 1)],
    2: [
        Case(DDP, SEVERAL), Case(DDP, 2, notice=True), Case(FSDP, SEVERAL, notice=True), Case(FSDP, 2),
        Case(HYBRID, SEVERAL), Case(HYBRID, 2), Case(DDP, SEVERAL, bad=True), Case(FSDP, 2, bad=True),
    ],
    3: [Case(DDP, SEVERAL, notice=True), Case(FSDP, SEVERAL)],  # which 3 does not divide
    4: [*(Case(how, n) for how in (DDP, FSDP, HYBRID) for n in (SEVERAL, 2 * SEVERAL)), Case(HYBRID, 4, bad=True)],
}  # fmt: skip


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
        "skipped": [m["steps_skipped"] for _, m in ear.reports],
        "grid": {"samples": ear.pictures[-1][1]} if ear.pictures else {},
    }


class Watcher(Ear):
    """Keeps what this worker has of a state as it is after each step."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state

    def notice(self) -> bool:
        self.last = everything(self.state)
        return False


def spoil(state: State, rounds: int) -> None:
    """Let this worker's loss be no number in the step of BAD."""
    calls = 0

    def no_number(_: object, __: object, out: Tensor) -> Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return out * torch.nan if (calls - 1) // rounds == BAD.start // FIT.batch_images else out

    state.model.register_forward_hook(no_number)


def run(case: Case, dtype: torch.dtype, pixels: np.ndarray, world: World, away: Folder | None = None) -> dict[str, Any]:
    """Train from the first image to the last, in the way of a case, leaving if there is where to. (all ranks)"""
    how, n, _, bad = case
    config, ear = replace(FIT, micro_images=FIT.batch_images // n, not_finite="skip" if bad else "stop"), Ear()

    def new(seed: int = 0) -> State:
        state = tiny_state(config, seed, dtype, VARIANT, how)
        if bad and world.rank == world.size - 1:
            spoil(state, -(-n // world.size))
        return state

    def go_on(state: State, config: FitConfig, ear: Ear) -> None:
        feed = micro_batches(pixels, config, state.position, world.rank, world.size)
        fit(config, state, VARIANT.schedule, 0, feed, ear, world)

    stopped: dict[str, Any] = {}
    if bad:
        state = new()
        watcher = Watcher(state)
        try:
            go_on(state, replace(config, not_finite="stop"), watcher)
        except DivergedError as error:
            stopped = {"said": str(error), "moved": not torch.equal(everything(state), watcher.last)}
    state = new()
    if away:
        noticed = Noticed(NOTICE, lambda state: checkpoints.commit(away, state, ABOUT, world) and None)
        go_on(state, config, noticed)
        assert noticed.left == NOTICE
        state, found = new(seed=1), checkpoints.newest(away)
        assert found and found[1].position == NOTICE
        checkpoints.load(*found, state)
        ear.reports = noticed.reports
    with pytest.MonkeyPatch.context() as patched:
        if dtype == torch.float32:  # samplers compute in it anyhow: once is enough
            patched.setattr(loop, "draw_grid", lambda *_: torch.zeros(0))
        go_on(state, config, ear)
    return outcome(state, ear) | {"stopped": stopped}


def take_part(folder: Path, size: int, rank: int) -> None:
    """Be one of the workers, in every case of so many of them."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", world_size=size, rank=rank)
    pixels, found = np.load(folder / "pixels.npy"), {}
    for number, case in enumerate(CASES[size]):
        # What is saved and loaded is the same bits, in whichever dtype: one is enough.
        away = Folder(f"{folder}/{number}") if case.notice else None
        found[str(case)] = {torch.float64: run(case, torch.float64, pixels, World(rank, size), away)}
        if not case.bad:
            found[str(case)][torch.float32] = run(case, torch.float32, pixels, World(rank, size))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_worker(digits: tuple[np.ndarray, np.ndarray]) -> Any:
    """What each case must come to: no process group, no layout."""
    return cache(lambda dtype, bad: run(Case(DDP, SEVERAL, bad=bad), dtype, digits[0], World()))


@pytest.fixture(scope="module")
def workers(digits: tuple[np.ndarray, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each of W processes found in each case."""

    @cache
    def start(size: int) -> list[Any]:
        folder = tmp_path_factory.mktemp(f"{size}-workers")
        np.save(folder / "pixels.npy", digits[0])
        # A worker that dies in a library says where. No forks: what a library's threads hold, a fork may hold for ever.
        python = [sys.executable, "-W", "error", "-X", "faulthandler"]
        command = [*python, "-m", "tests.pipelines.test_layouts", folder, size]
        assert side_by_side([*command, rank] for rank in range(size)) == [0] * size
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]

    return start


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference between two sets of tensors, as a share of the largest number of each tensor, or of 1."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - value).abs().max() / value.abs().max().clamp(min=1)) for name, value in expected.items()
    )


EACH = [pytest.param(size, case, id=f"{size}-workers, {case}") for size, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("size", "case"), EACH)
def test_it_is_the_same_run(size: int, case: Case, workers: Any, one_worker: Any) -> None:
    """In float64 to 1e-10: only the order of sums differs. That measured up to 2e-15."""
    expected = one_worker(torch.float64, case.bad)
    for found in workers(size):
        exact = found[str(case)][torch.float64]
        for which in ("weights", "average", "power average", "timesteps"):
            assert apart(exact[which], expected[which]) < 1e-10
        assert torch.equal(exact["timesteps"]["seen"], expected["timesteps"]["seen"])
    exact = workers(size)[0][str(case)][torch.float64]
    for which in ("losses", "norms"):
        torch.testing.assert_close(exact[which], expected[which], rtol=1e-10, atol=1e-10, equal_nan=True)
    assert apart(exact["grid"], expected["grid"]) < 1e-5  # samplers compute in float32


ROUNDING = FIT.images // FIT.batch_images * torch.finfo(torch.float32).eps
"""One in each of the 8 steps, 1e-6 in all: what a sum in another order may change, as a share of it."""


@pytest.mark.parametrize(("size", "case"), [each for each in EACH if not each.values[1].bad])  # type: ignore[attr-defined]
def test_it_is_the_same_run_in_float32(size: int, case: Case, workers: Any, one_worker: Any) -> None:
    """To the rounding of 8 steps in what is a sum; in the weights to 20 times that, as a share of the way that they
    have gone from the first ones.

    AdamW divides a gradient by its own size. So where one is next to nothing its rounding is as large as it is, and the
    step of that weight is another. Few are, so the lengths of the difference and of the way tell all else: measured up
    to 3e-6, over all cases. A single weight may be off by more, up to 5e-5 of the largest way measured, so that has ten
    times as much. One micro-batch that is left out, or that weighs a thousandth more than the others, is beyond both.
    """
    expected = one_worker(torch.float32, False)
    first = dict(tiny_state(FIT, variant=VARIANT).model.named_parameters())
    for found in workers(size):
        rounded = found[str(case)][torch.float32]
        for which in ("weights", "average", "power average"):
            off, way = (
                torch.cat([(a[name] - b[name]).detach().flatten() for name in first])
                for a, b in ((rounded[which], expected[which]), (expected[which], first))
            )
            assert off.norm() < 20 * ROUNDING * way.norm()
            assert off.abs().max() < 500 * ROUNDING * way.abs().max()
        told, steered = rounded["timesteps"], expected["timesteps"]
        assert torch.equal(told["seen"], steered["seen"])  # so each t was the same
        torch.testing.assert_close(told["second_moment"], steered["second_moment"], rtol=2 * ROUNDING, atol=0)
    rounded = workers(size)[0][str(case)][torch.float32]
    for which in ("losses", "norms"):
        torch.testing.assert_close(rounded[which], expected[which], rtol=2 * ROUNDING, atol=0)


@pytest.mark.parametrize(("size", "case"), [each for each in EACH if each.values[1].bad])  # type: ignore[attr-defined]
def test_one_bad_gradient_stops_all_workers_before_the_optimizer_moves(size: int, case: Case, workers: Any) -> None:
    """Where it is skipped, :func:`test_it_is_the_same_run` says that all workers have skipped it."""
    for found in workers(size):
        stopped = found[str(case)][torch.float64]["stopped"]
        assert stopped["said"].startswith(f"the gradient of positions {BAD.start}..{BAD.stop - 1} is nan")
        assert not stopped["moved"], "weights, optimizer, averages and what steers t are those of the step before"
    skipped = workers(size)[0][str(case)][torch.float64]["skipped"]
    assert skipped == [0, 1, 0, 0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    take_part(Path(sys.argv[1]), *map(int, sys.argv[2:]))
