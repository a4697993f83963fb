"""The actor of a sampling job: it loads the network once, then draws shard after shard, and writes one while it draws
the next."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import torch

from models.network import EpsNetwork
from models.samplers import sample
from pipelines import sample_shards
from pipelines.fit import x_0_to_pixels
from pipelines.images import Pixels
from pipelines.lease import Fence
from pipelines.sample_plan import SamplePlan


class DrawShard:
    """Draws the shards that it is given the numbers of.

    Args:
        plan: what to draw.
        anew: draw those that are there already, too.
        fence: of the lease under which they are drawn, if there is one.
    """

    def __init__(self, plan: SamplePlan, anew: bool = False, fence: Fence | None = None) -> None:
        torch.set_num_threads(1)
        self.plan, self.anew, self.fence = plan, anew, fence
        self.device = torch.device("cuda" if plan.draw.use_gpu else "cpu")
        self.schedule = plan.trained.schedule()

    @cached_property
    def network(self) -> EpsNetwork:
        # Not in the constructor: what fails there is told as a dead actor, and tried again.
        draw = self.plan.draw
        network = self.plan.trained.network(averaged=draw.weights == "ema", std=draw.ema_std).to(self.device)
        if draw.compile:
            network.compile(mode="reduce-overhead" if self.device.type == "cuda" else "default")
        return network

    def __call__(self, rows: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Draw and write shards; yield number, images and seconds of each when it is written."""
        with ThreadPoolExecutor(1, "writer") as writer:
            writing: Future[dict[str, Any]] | None = None
            for shard in rows["id"].tolist():
                began = time.perf_counter()
                # A call whose actor has died is made again: what it had written is there.
                if not self.anew and self.plan.out.exists(sample_shards.shard_name(shard)):
                    yield _row(shard, 0, began)
                    continue
                seeds, size, pixels = self.plan.shard_seeds(shard), self.plan.draw.batch_images, list[Pixels]()
                starts = range(0, len(seeds), size)
                for start in starts:
                    if writing and start == starts[-1]:  # so that a kill costs one whole shard, and no two
                        yield writing.result()
                        writing = None
                    pixels.append(self._draw(seeds[start : start + size]))
                writing = writer.submit(self._write, shard, seeds, np.concatenate(pixels), began)
            if writing:
                yield writing.result()

    def _draw(self, seeds: range) -> Pixels:
        draw, size = self.plan.draw, len(seeds)
        # Batches are always full: a convolution may round differently in a batch of another size.
        full = torch.arange(seeds.start, seeds.start + draw.batch_images, device=self.device)
        trained = self.plan.trained
        eps_theta = trained.eps_theta(self.network, self.plan.labels(full), draw.guidance)
        with torch.inference_mode():
            x_0 = sample(
                draw.walk, eps_theta, self.schedule, full, trained.checkpoint.shape, draw.steps, draw.clip, draw.spacing
            )
        return x_0_to_pixels(x_0)[:size].cpu().numpy()

    def _write(self, shard: int, seeds: range, pixels: Pixels, began: float) -> dict[str, Any]:
        plan = self.plan
        labels = plan.labels(torch.tensor(seeds)).tolist()
        if self.fence:
            self.fence.check()
        sample_shards.write(
            plan.out, shard, seeds, labels, plan.trained.labels, pixels, plan.lineage, plan.also, self.anew
        )
        return _row(shard, len(seeds), began)


def _row(shard: int, images: int, began: float) -> dict[str, Any]:
    return {"shard": [shard], "images": [images], "seconds": [time.perf_counter() - began]}
