import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.controller.state import InitializingState, ReschedulingState, RunningState
from ray.train.v2.api.exceptions import ControllerError

from pipelines import foreman
from pipelines.errors import DataError, TryAgainError
from pipelines.fit import DivergedError
from pipelines.foreman import Foreman, NotAgain, leave
from pipelines.stream import StreamOrderError
from tests.processes import CODE

GONE = RuntimeError("connection closed by peer")
"""What a rank meets whose peer is no more."""


def poll(errors: dict[int, Exception]) -> None:
    NotAgain(3, lambda: 0).after_exception(None, errors)


@pytest.mark.parametrize("error", [TryAgainError("storage"), DataError("a shard"), DivergedError("positions 0..31")])
def test_an_error_of_ours_ends_the_job_whoever_has_it(error: Exception) -> None:
    with pytest.raises(type(error)) as alone:
        poll({0: GONE, 1: error})
    assert alone.value is error
    of_a_task = RayTaskError("read", "traceback", error).as_instanceof_cause()
    with pytest.raises(type(error)) as within:
        poll({1: of_a_task})
    assert within.value is error, "as it was raised, without Ray's frame around it"


def test_a_worker_that_dies_or_leaves_is_left_to_ray() -> None:
    with pytest.raises(RayActorError) as left:
        leave()
    assert left.value.preempted, "Ray counts it as a preemption, not as a failure"
    poll({0: ActorDiedError(), 1: GONE, 2: left.value})


@pytest.mark.parametrize(
    "error",
    [StreamOrderError("position 8"), AssertionError("a shape"), ValueError("a value"), torch.OutOfMemoryError("GPU 0")],
)
def test_an_error_of_the_code_is_not_met_again(error: Exception) -> None:
    with pytest.raises(type(error)) as alone:
        poll({0: GONE, 1: RayTaskError("read", "traceback", error).as_instanceof_cause()})
    assert alone.value is error


def test_workers_that_get_no_further_are_not_started_for_ever() -> None:
    at = [0]
    judge = NotAgain(2, lambda: at[0])
    for position in (0, 0, 1280, 1280, 2560, 2560):  # twice from each
        at[0] = position
        judge.after_exception(None, {0: GONE, 1: ActorDiedError()})
    left = RayActorError(error_msg="left", preempted=True)
    judge.after_exception(None, {0: left})
    with pytest.raises(TryAgainError, match="started at 2560 images have failed 3 times in a row"):
        judge.after_exception(None, {0: GONE, 1: ActorDiedError()})


def test_ranks_that_fail_again_and_again_with_no_loss_fail_of_themselves() -> None:
    judge = NotAgain(1, lambda: 0)
    judge.after_exception(None, {0: GONE})
    with pytest.raises(RuntimeError) as last:
        judge.after_exception(None, {0: GONE})
    assert last.value is GONE


def test_workers_that_wait_for_room_are_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    said = threading.Semaphore(0)
    waiting, running = InitializingState(), RunningState()
    monkeypatch.setattr(foreman, "WAITING_S", 0.01)
    one = Foreman(3, said.release)
    for _ in range(2):  # at each wait once
        one.after_controller_state_update(running, waiting)
        one.after_controller_state_update(waiting, waiting)
        assert said.acquire(timeout=60)
        one.after_controller_state_update(waiting, running)
    one.after_controller_state_update(running, waiting)
    waits = one._timer
    one.after_controller_state_update(waiting, running)
    assert waits is not None and waits.finished.is_set() and one._timer is None, "they have started"


def test_workers_that_die_while_they_start_are_not_started_for_ever() -> None:
    one = Foreman(1, lambda: None)
    again = [ReschedulingState(ControllerError(WorkerGroupStartupFailedError("killed"))) for _ in range(3)]
    one.after_controller_state_update(InitializingState(), again[0])
    one.after_controller_state_update(again[0], again[0])  # it waits
    one.after_controller_state_update(again[0], RunningState())
    one.after_controller_state_update(RunningState(), again[1])
    with pytest.raises(TryAgainError, match="died 2 times in a row while they started: killed"):
        one.after_controller_state_update(again[1], again[2])
    one.after_controller_state_update(again[2], RunningState())


def test_a_worker_whose_node_was_taken_away_is_no_failure() -> None:
    gone = WorkerHealthCheckFailedError("no answer", RayActorError(error_msg="taken away", preempted=True))
    judge = NotAgain(0, lambda: 0)
    for _ in range(3):
        judge.after_exception(None, {0: GONE, 1: gone})
    with pytest.raises(TryAgainError, match="failed 1 times in a row"):
        judge.after_exception(None, {1: WorkerHealthCheckFailedError("no answer", ActorDiedError())})


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
        be_told("a node is taken away")
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
