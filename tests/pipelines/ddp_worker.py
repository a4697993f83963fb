"""One rank of a training over several processes: folder, world, where to stop, rank. It goes on from a checkpoint."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from models.schedule import article
from pipelines import checkpoints
from pipelines.fit import World, fit
from pipelines.storage import Folder
from tests.pipelines.helpers import ABOUT, FIT, Ear, micro_batches, tiny_state

folder, run, (size, stop, rank) = Path(sys.argv[1]), Folder(f"{sys.argv[1]}/run"), map(int, sys.argv[2:5])
config, world = replace(FIT, images=stop), World(rank, size)
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{size}", world_size=size, rank=rank)
state = tiny_state(config, seed=rank, dtype=torch.float64)  # DDP gives all of them the weights of rank 0
if found := checkpoints.newest(run):
    checkpoints.load(*found, state, world)
ear = Ear(lambda state: checkpoints.commit(run, state, ABOUT, world))
pixels = np.load(folder / "pixels.npy")
fit(config, state, article(), 0, micro_batches(pixels, config, state.position, rank, size), ear, world)
result = {
    "model": {name: p.detach() for name, p in state.model.named_parameters()},
    "ema": state.ema.shadow,
    "losses": [metrics["loss"] for _, metrics in ear.reports],
    **({"grid": ear.pictures[-1][1]} if ear.pictures else {}),
}
torch.save(result, folder / f"rank-{rank}.pt")
dist.destroy_process_group()
