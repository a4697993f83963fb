"""A worker that makes its state, takes a step and says how many bytes each part of it has."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.dit import DiTConfig
from models.ema import EMAConfig
from models.network import NetworkConfig, build
from models.parallelize import ParallelConfig, construct
from models.schedule import article
from pipelines.fit import new_state
from pipelines.fit_config import FitConfig

CLASSES = 10
# Widths that four workers cannot share out evenly, so that the first has more.
NETWORK = NetworkConfig(kind="dit", dit=DiTConfig(depth=3, width=24, heads=3, patch=2), labels=True)
FIT = FitConfig(images=1280, ema=EMAConfig(power_stds=(0.05, 0.1)), batch_images=128, micro_images=16)
HOW = {
    "ddp": ParallelConfig(strategy="ddp"),
    "fsdp": ParallelConfig(strategy="fsdp"),
    "hybrid": ParallelConfig(strategy="hybrid", shards=2),
}


def held(how: ParallelConfig) -> dict[str, int]:
    """The bytes of this worker, by name, after a step of the optimizer on images of 8 x 8. (all ranks)"""
    model, parallel = construct(lambda: build(NETWORK, 1, 8, CLASSES), 0, how, torch.device("cpu"))
    state = new_state(model, FIT, article(), parallel)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1)
    state.optimizer.step()
    averages = [state.ema.shadow, *state.ema.power.values()]
    return {
        "weights": count(model.parameters()),
        "gradient": count(p.grad for p in model.parameters()),
        "optimizer": count(t for p in model.parameters() for t in state.optimizer.state[p].values()),
        "averages": count(t for average in averages for t in average.values()),
    }


def count(tensors: Iterable[Tensor]) -> int:
    own = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in own)


def work(folder: str, workers: int, rank: int) -> None:
    """Be one of them. The first, which has the largest part, writes down what it holds."""
    meeting = f"file://{folder}/meeting-{workers}"
    dist.init_process_group("gloo", init_method=meeting, world_size=workers, rank=rank)
    told = {name: held(how) for name, how in HOW.items() if how.shards < workers}
    if rank == 0:
        Path(folder, f"{workers}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(sys.argv[1], *map(int, sys.argv[2:]))
