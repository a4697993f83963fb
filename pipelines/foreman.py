"""Workers that must stop before the end of the run, and errors that no new start would mend.

Ray Train starts its workers anew when one dies, when a node is about to be taken away, and when there is room for more
of them. The *foreman* sits in Ray Train's controller and makes the second and the third cost nothing: it tells each
worker to leave, all ranks agree on the step after which they do, commit a checkpoint, and go. And it ends the job at
once for an error of ours, which would only be met again.

But for the last, these are hooks of Ray Train's own callbacks, not of its public ones: tests/faults holds them against
each Ray.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import PreemptingState, ResizingState
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from pipelines.errors import ours
from pipelines.world import World

log = logging.getLogger("brickyard.train")

PATIENCE_S = 300.0
"""How long a planned change of the number of workers waits for their checkpoint; then they go on from the last one."""
# In a worker's process: it is told on the actor's own thread, the loop runs on another.
_told = threading.Event()
_gone = threading.Event()
_why = ""


def be_told(why: str, wait_s: float) -> bool:
    """Tell this worker to leave after its next steps; return whether it has within the time. (called by the foreman)"""
    global _why  # noqa: PLW0603
    _why = why
    _told.set()
    return _gone.wait(wait_s)


@contextmanager
def present() -> Iterator[None]:
    """Who waits for this worker to leave waits until the end of this block, however it ends."""
    try:
        yield
    finally:
        _gone.set()


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


class NotAgain(UserCallback):  # type: ignore[misc]
    """Ends the run at an error of ours, whichever rank has it; a worker that just dies is Ray Train's to mend."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for told in filter(None, map(ours, worker_exceptions.values())):
            raise told  # Ray Train answers an error in here with the end


class Foreman(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """What the controller of Ray Train does for us."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._workers = worker_group

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, PreemptingState) and not isinstance(previous_state, PreemptingState):
            self._workers.execute_async(be_told, "a node is taken away", 0)
        elif isinstance(current_state, ResizingState):
            workers = current_state.scaling_decision.num_workers
            said = self._workers.execute_async(be_told, f"there is room for {workers} of the workers", PATIENCE_S)
            ray.wait(said, num_returns=len(said), timeout=PATIENCE_S)


class _NodesThatStay(ElasticScalingPolicy):  # type: ignore[misc]
    """Counts no node that is gone or about to go. Ray gives those no new work, yet reserves them up to 20 s longer: the
    workers' start would wait for them a minute."""

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
            arguments["scaling_policy"] = _NodesThatStay(self.scaling_config)
        return super()._initialize_and_run_controller(**arguments)
