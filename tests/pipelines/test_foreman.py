import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from models.schedule import article
from pipelines import checkpoints
from pipelines.errors import DataError, TryAgainError
from pipelines.fit import DivergedError, State, fit
from pipelines.fit_config import FitConfig
from pipelines.foreman import Foreman, leave
from pipelines.storage import Folder
from pipelines.world import World
from tests.pipelines.helpers import ABOUT, Ear, micro_batches, tiny_state
from tests.processes import CODE


def poll(errors: dict[int, Exception]) -> None:
    Foreman().after_worker_group_poll_status(SimpleNamespace(errors=errors))


@pytest.mark.parametrize("error", [TryAgainError("storage"), DataError("a shard"), DivergedError("positions 0..31")])
def test_an_error_of_ours_ends_the_job_whoever_has_it(error: Exception) -> None:
    with pytest.raises(type(error)) as alone:
        poll({0: RuntimeError("connection closed by peer"), 1: error})
    assert alone.value is error
    of_a_task = RayTaskError("read", "traceback", error).as_instanceof_cause()
    with pytest.raises(type(error)) as within:
        poll({1: of_a_task})
    assert within.value is error, "as it was raised, without Ray's frame around it"


def test_a_worker_that_dies_or_leaves_is_left_to_ray() -> None:
    with pytest.raises(RayActorError) as left:
        leave()
    assert left.value.preempted, "Ray counts it as a preemption, not as a failure"
    poll({0: ActorDiedError(), 1: RuntimeError("connection closed by peer"), 2: left.value})


class Told(Ear):
    """Is told to leave at a step."""

    def __init__(self, step: int, run: Folder) -> None:
        super().__init__(lambda state: checkpoints.commit(run, state, ABOUT, World()) and None)
        self.steps, self.flushed, self._told_at = 0, 0, step

    def notice(self) -> bool:
        self.steps += 1
        return self.steps == self._told_at

    def flush(self) -> None:
        self.flushed += 1

    def leave(self, state: State) -> NoReturn:
        assert self.flushed == 1, "what is left behind is committed"
        raise KeyError(state.position)


@pytest.mark.parametrize("step", [4, 6, 7, 12])
def test_who_leaves_at_a_notice_goes_on_bit_for_bit(
    step: int, digits: tuple[np.ndarray, np.ndarray], tiny_fit: FitConfig, folder: Folder
) -> None:
    """Beside a checkpoint that is due anyway, between two, and at the end, where nobody leaves any more."""
    config = replace(tiny_fit, images=12 * tiny_fit.batch_images)
    whole, state, ear = tiny_state(config), tiny_state(config), Told(step, folder)
    fit(config, whole, article(), 0, micro_batches(digits[0], config), Ear())
    try:
        fit(config, state, article(), 0, micro_batches(digits[0], config), ear)
    except KeyError as left:
        assert left.args[0] == step * config.batch_images < config.images
    assert ear.checkpoints == sorted({*ear.checkpoints, step * config.batch_images}), "each position once"
    gone_on = tiny_state(config, seed=1)
    found = checkpoints.newest(folder)
    assert found and found[1].position == step * config.batch_images
    checkpoints.load(*found, gone_on, World())
    fit(config, gone_on, article(), 0, micro_batches(digits[0], config, gone_on.position), Ear())
    for a, b in zip(whole.model.parameters(), gone_on.model.parameters(), strict=True):
        assert a.equal(b)


RANK = """
import sys, time
import torch.distributed as dist
from pipelines.foreman import Notice, be_told
from pipelines.world import World

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", world_size=3, rank=rank)
notice = Notice(World(rank, 3))
for step in range(100):
    if (rank, step) == (1, 5):
        be_told("a node is taken away", 0)
    time.sleep(0.01 * rank)
    if notice():
        break
print(step)
dist.destroy_process_group()
"""


def test_all_ranks_leave_after_the_same_step_whoever_was_told(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, tmp_path, str(rank)], cwd=CODE, stdout=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    assert [rank.communicate(timeout=300)[0] for rank in ranks] == ["6\n"] * 3
