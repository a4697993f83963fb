"""Workers that must stop before the end of the run, and errors that no new start would mend.

Ray Train starts its workers anew when one dies, when a node is about to be taken away, and when there is room for more
of them. What sits here in Ray Train's controller makes the second and the third cost nothing: each worker is told to
leave, all ranks agree on the step after which they do, commit a checkpoint, and go. And it ends the job for an error
that would only be met again.

But for the last, these are hooks of Ray Train's own, not of its public interface: tests/faults holds them against each
Ray.
"""

import threading
from collections.abc import Callable
from typing import Any, NoReturn

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError, RayError
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import RayTrainError, WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import PreemptingState, RunningState
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from pipelines.errors import TryAgainError, ours, root
from pipelines.world import World

OUTSIDE = RayError, RayTrainError, OSError
"""What befalls a worker from outside: its process, its node, the network."""
WAITING_S = 60.0
"""After which it is said that the workers have not started."""
# In a worker's process: it is told on the actor's own thread, the loop runs on another.
_told = threading.Event()
_why = ""


def be_told(why: str) -> None:
    """Tell this worker to leave after its next steps. (called in the controller's name)"""
    global _why  # noqa: PLW0603
    _why = why
    _told.set()


def leave() -> NoReturn:
    """End this worker in a way that Ray Train counts as an interruption, not as a failure. (all ranks)"""
    raise RayActorError(error_msg=f"left: {_why}", preempted=True)


class Notice:
    """Whether any of the ranks was told to leave, asked once a step. (all ranks)

    The ranks' answers are added up while the next step is computed, and read after it: nobody waits for them. So the
    notice is a step old, and the same on all ranks.
    """

    def __init__(self, world: World) -> None:
        # Of its own and on the CPU: in NCCL's group the host would wait for the GPU at each step.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._asked: tuple[Any, torch.Tensor] | None = None

    def __call__(self) -> bool:
        if self._group is None:
            return _told.is_set()
        answer = False
        if self._asked:
            work, told = self._asked
            work.wait()
            answer = bool(told.item())
        told = torch.tensor([float(_told.is_set())])
        self._asked = dist.all_reduce(told, group=self._group, async_op=True), told
        return answer

    @property
    def why(self) -> str:
        return _why


def may_pass(error: BaseException) -> bool:
    """Return whether new workers may be spared an error: a loss, or what the loss of a peer looks like to a rank."""
    certain = torch.OutOfMemoryError, NotImplementedError, RecursionError  # RuntimeErrors, of the code alone
    return isinstance(error, (*OUTSIDE, RuntimeError)) and not isinstance(error, certain)


class NotAgain(UserCallback):  # type: ignore[misc]
    """Ends the job for an error that new workers would meet again: one of ours, one of the code, or any that has kept
    them from a new checkpoint too often. A worker that just dies is Ray Train's to mend."""

    def __init__(self, max_failures: int, started_at: Callable[[], int]) -> None:
        """Begin to count.

        Args:
            max_failures: how often in a row workers may fail that started at one position.
            started_at: returns that position, in images.
        """
        self._max_failures, self._started_at = max_failures, started_at
        self._failures, self._position = 0, -1

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise what is to end the job: Ray Train answers an error in here with that."""
        for told in filter(None, map(ours, worker_exceptions.values())):
            raise told
        errors = [root(error) for error in worker_exceptions.values()]
        for error in errors:
            if not may_pass(error):
                raise error
        if any(isinstance(error, RayActorError) and error.preempted for error in errors):
            return
        position = self._started_at()
        self._failures = self._failures + 1 if position == self._position else 1
        self._position = position
        if self._failures > self._max_failures:
            lost = next((error for error in errors if isinstance(error, OUTSIDE)), None)
            if lost is None:
                raise errors[0]
            raise TryAgainError(
                f"workers that started at {position} images have failed {self._failures} times in a row, with no new "
                f"checkpoint, the last time by {type(lost).__name__}: {lost}; run the same command to go on"
            )


class Foreman(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Passes on notices to the workers, and sees to it that they start: it says so if they take long, and ends the job
    if they die again and again before their work begins, which Ray Train would go on with for ever."""

    def __init__(self, max_failures: int, wait_in_vain: Callable[[], None]) -> None:
        """Make one.

        Args:
            max_failures: how often in a row workers may die while they start.
            wait_in_vain: is called when no workers have started for WAITING_S, at each wait.
        """
        self._max_failures, self._failures = max_failures, 0
        self._wait_in_vain = wait_in_vain
        self._timer: threading.Timer | None = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._workers = worker_group

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, PreemptingState) and not isinstance(previous_state, PreemptingState):
            self._workers.execute_async(be_told, "a node is taken away")
        if isinstance(current_state, RunningState):
            self._failures = 0
        failed = getattr(current_state, "training_failed_error", None)
        behind = getattr(failed, "controller_failure", None)
        if isinstance(behind, WorkerGroupStartupFailedError) and current_state is not previous_state:
            self._failures += 1
            if self._failures > self._max_failures:
                raise TryAgainError(
                    f"workers have died {self._failures} times in a row while they started: {behind}; run the same "
                    "command to go on"
                )
        waits = not isinstance(current_state, RunningState | PreemptingState) and not current_state.is_terminal()
        if waits and self._timer is None:
            self._timer = threading.Timer(WAITING_S, self._wait_in_vain)
            self._timer.daemon = True
            self._timer.start()
        elif not waits and self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _WithNotice(ElasticScalingPolicy):  # type: ignore[misc]
    """Has workers leave of themselves before there are more or fewer of them, and counts no node that is gone or about
    to go. Ray gives those no new work, yet reserves them up to 20 s longer: the start would wait for them a minute."""

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Tell the workers instead of ending them. When they have left, as many as there is room for are started."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if not isinstance(decision, ResizeDecision):
            return decision
        for worker in worker_group_state.workers:
            worker.execute_async(be_told, f"there is room for {decision.num_workers} of the workers")
        return NoopDecision()

    def _count_possible_workers(self, reserved_resources: dict[str, Any]) -> int:
        staying = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        staying -= ray._private.state.state.get_draining_nodes().keys()
        return int(
            super()._count_possible_workers(
                {node: reserved_resources[node] for node in staying & reserved_resources.keys()}
            )
        )


class Trainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer whose number of workers, if it may change, follows the nodes that stay."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = _WithNotice(self.scaling_config)
        return super()._initialize_and_run_controller(**arguments)
