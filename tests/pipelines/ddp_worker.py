"""One rank of the test that more workers train the same network: folder, world, rank."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from models.schedule import article
from pipelines.fit import World, fit
from tests.pipelines.helpers import FIT, Ear, micro_batches, tiny_state

folder, world, rank = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", world_size=world, rank=rank)
state, ear = tiny_state(FIT, dtype=torch.float64), Ear()
fit(
    FIT,
    state,
    article(),
    0,
    micro_batches(np.load(folder / "pixels.npy"), FIT, rank=rank, world=world),
    ear,
    World(rank, world),
)
found = {
    "model": {name: p.detach() for name, p in state.model.named_parameters()},
    "ema": state.ema.shadow,
    "losses": [metrics["loss"] for _, metrics in ear.reports],
}
if rank == 0:
    found["grid"] = ear.pictures[-1][1]
torch.save(found, folder / f"rank-{rank}.pt")
dist.destroy_process_group()
