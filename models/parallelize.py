"""One model on one worker or many, from beside it: no network knows about any of this.

Every way of spreading it trains the same model under the same names of parameters: they are the keys of the first
weights, of the averages and of the checkpoints.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from models.choice import check_choice
from models.init import initialize

M = TypeVar("M", bound=nn.Module)
Strategy: TypeAlias = Literal["ddp", "fsdp", "hybrid"]
Precision: TypeAlias = Literal["float32", "bfloat16"]
DISTINCT_SHAPES = 8
"""Shapes and modes that a block may be compiled for: of training, of samples, of validation."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the workers share the model, and how each of them computes it."""

    strategy: Strategy = "ddp"
    """A copy for each worker (ddp), a part for each (fsdp), or copies that `shards` workers share (hybrid). One worker
    alone has the model itself, whatever is said here."""
    shards: int = 1
    """Workers that share one copy, for hybrid: best those of one machine; they divide the workers."""
    precision: Precision = "float32"
    """What is computed in: weights, their gradients, the optimizer and the averages are float32 either way."""
    checkpoint_activations: bool = False
    """Keep only what goes into each block and compute the rest again on the way back: for a third more work."""
    compile: bool = False
    """Compile each block; it takes a C++ compiler (CPU) or Triton (GPU), and a while at the first step."""

    def __post_init__(self) -> None:
        check_choice("parallel.strategy", self.strategy, Strategy)
        check_choice("parallel.precision", self.precision, Precision)
        if self.strategy == "hybrid" and self.shards < 2:
            raise ValueError(
                f"parallel.shards is {self.shards} and parallel.strategy hybrid; at least 2 workers must share a copy: "
                "try 2, or parallel.strategy ddp"
            )
        if self.strategy != "hybrid" and self.shards != 1:
            raise ValueError(
                f"parallel.shards is {self.shards} and parallel.strategy {self.strategy}; only hybrid has a choice of "
                "it: take 1, or parallel.strategy hybrid"
            )

    def check_workers(self, workers: int) -> None:
        """Raise ValueError unless so many workers can share the model this way."""
        if workers > 1 and workers % self.shards:
            fitting = [shards for shards in range(2, workers + 1) if workers % shards == 0]
            raise ValueError(
                f"parallel.shards is {self.shards}; scaling.workers = {workers} is not a multiple of it: take one of "
                f"{fitting} as parallel.shards, other workers, or parallel.strategy fsdp"
            )

    def shares(self, workers: int) -> int:
        """Return how many workers hold a copy together: each has that part of every weight, moment and average."""
        self.check_workers(workers)
        if workers == 1 or self.strategy == "ddp":
            return 1
        return workers if self.strategy == "fsdp" else self.shards


def construct(make: Callable[[], M], seed: int, config: ParallelConfig, device: torch.device) -> tuple[M, nn.Module]:
    """Make a model with its first weights, ready to train on this worker's device. (all ranks)

    The order, and why:

    1. It is made without memory, so that no worker ever holds the whole of a model that is to be shared.
    2. Activation checkpointing, then compilation, of each block: so the compiler sees what is computed twice. Both are
       put around ``forward`` and not around the module, which would change its parameters' names.
    3. The precision, around the forward pass of the whole.
    4. Sharding, of each block and then of the rest. Its collectives stay outside of what is compiled or computed again.
    5. Memory on the device, for this worker's part only.
    6. The first weights, which are functions of (seed, name): each worker fills its part by itself.
    7. DDP last, since it adds up the gradients of memory that is there.

    The optimizer and the averages come after: what they hold is sharded as the parameters are.

    Args:
        make: makes the model, of parameters and modules only. It needs ``blocks()``, in the order of execution.
        seed: the seed of the run.
        config: how.
        device: where this worker computes.

    Returns:
        The model, under whose parameters' plain names everything is kept; and what its loss is to be computed through:
        DDP around it, else the model itself.

    Raises:
        ValueError: if the workers of the default process group (one, without a group) cannot share it this way.
    """
    workers = dist.get_world_size() if dist.is_initialized() else 1
    shares = config.shares(workers)
    with torch.device("meta"):
        model = make()
    set_how_to_compute(model, config, device)
    if shares > 1:
        _shard(model, config, device, workers // shares, shares)
    else:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.to_empty(device=device)
    initialize(model, seed)
    if workers == 1 or shares > 1:
        return model, model
    # The gradients are views of what is sent: held once.
    return model, DistributedDataParallel(model, gradient_as_bucket_view=True)


def set_how_to_compute(model: nn.Module, config: ParallelConfig, device: torch.device) -> None:
    """Take steps 2 and 3 of :func:`construct`: what a worker computes, whatever it has of the model."""
    blocks = model.blocks()  # type: ignore[operator]
    if config.compile:
        # Blocks share their code, and torch counts by code: let each have as many shapes as it would let one have.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, DISTINCT_SHAPES * len(blocks))
    if config.checkpoint_activations:  # keep what goes into a block only, and compute the rest again on the way back
        for block in blocks:
            _wrap(block, _checkpointed)
    if config.compile:
        for block in blocks:
            _wrap(block, _compiled)
    if config.precision == "bfloat16":
        _wrap(model, lambda forward: _in_bfloat16(forward, device))


@contextmanager
def accumulating(parallel: nn.Module, last: bool) -> Iterator[None]:
    """Within this context the gradient of one of several micro-batches is added to those before. (all ranks)

    After the ``last`` one it is the mean over the workers; all ranks must agree which that is. With DDP nothing is sent
    before. With sharding, the gradient of each micro-batch goes to whose part it is at once: to hold it back would cost
    each worker the gradient of the whole model in float32, which is what sharding is there to save, and would save one
    in three of what is sent. Between the copies of ``hybrid`` it waits for the last.
    """
    if isinstance(parallel, FSDPModule):
        parallel.set_is_last_backward(last)
        parallel.set_requires_all_reduce(last)
    with parallel.no_sync() if isinstance(parallel, DistributedDataParallel) and not last else nullcontext():
        yield


@torch.no_grad()
def clip_gradient(model: nn.Module, longest: float) -> Tensor:
    """Shorten the gradient to a norm of at most ``longest`` and return the norm that it had. (all ranks)

    It is that of the whole gradient, however it is shared out, and equal on all ranks: where any worker's part is not
    finite, neither is it.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(model.parameters(), longest, norm)
    return norm


Forward: TypeAlias = Callable[..., Any]


def _wrap(module: nn.Module, how: Callable[[Forward], Forward]) -> None:
    module.forward = how(module.forward)


def _checkpointed(forward: Forward) -> Forward:
    # No network draws anything, so there is no generator to bring back.
    return lambda *given: checkpoint(forward, *given, use_reentrant=False, preserve_rng_state=False)


def _compiled(forward: Forward) -> Forward:
    return torch.compile(forward, fullgraph=True, dynamic=False)


def _in_bfloat16(forward: Forward, device: torch.device) -> Forward:
    # Where autocast says so: sums over many values, such as normalisations, stay float32, and so does all outside.
    def lowered(x: Tensor, *given: Any, **named: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return forward(x, *given, **named).to(x.dtype)  # type: ignore[no-any-return]

    return lowered


def _shard(model: nn.Module, config: ParallelConfig, device: torch.device, copies: int, shares: int) -> None:
    # Left to itself, FSDP2 would take the GPUs of a machine that has some.
    if copies == 1:
        mesh = init_device_mesh(device.type, (shares,))
    else:
        mesh = init_device_mesh(device.type, (copies, shares), mesh_dim_names=("copies", "shares"))
    # Blocks are sent in what they are computed in, all of their weights; gradients are added up in float32. Which
    # operations are lowered beside that is autocast's to say, as it is without sharding, so inputs are left alone.
    lowered = config.precision == "bfloat16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if lowered else None,
        reduce_dtype=torch.float32 if lowered else None,
        cast_forward_inputs=False,
    )
    # Each block is gathered just before it runs and let go after it: one block is whole at a time, not the model.
    for block in model.blocks():  # type: ignore[operator]
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The root comes last and takes what is in no block: the ends of the network. It is let go too, else a forward pass
    # without a backward one would leave whole parameters behind, and later changes of the sharded ones without effect.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
