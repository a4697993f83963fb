"""One rank of a training over several processes: folder, variant, world, where to stop, rank.

It goes on from a checkpoint.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from models.parallelize import ParallelConfig
from pipelines import checkpoints
from pipelines.fit import fit
from pipelines.storage import Folder
from pipelines.world import World
from tests.pipelines.states import ABOUT, VARIANTS, Ear, micro_batches, tiny_state

folder, run, (size, stop, rank) = Path(sys.argv[1]), Folder(f"{sys.argv[1]}/run"), map(int, sys.argv[3:6])
HOW = {2: ParallelConfig(strategy="fsdp"), 4: ParallelConfig(strategy="hybrid", shards=2)}
variant, world = VARIANTS[sys.argv[2]], World(rank, size)
config = replace(variant.fit, images=stop)
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{size}", world_size=size, rank=rank)
state = tiny_state(config, 0, torch.float64, variant, HOW[size])
if found := checkpoints.newest(run):
    checkpoints.load(*found, state)
ear = Ear(lambda state: checkpoints.commit(run, state, ABOUT, world))
pixels = np.load(folder / "pixels.npy")
fit(config, state, variant.schedule, 0, micro_batches(pixels, config, state.position, rank, size), ear, world)
result = {name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in state.model.named_parameters()}
torch.save(result, folder / f"rank-{rank}.pt")
dist.destroy_process_group()
