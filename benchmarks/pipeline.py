"""How fast does a network draw here, and how fast as a pipeline of diffusers?

    python benchmarks/pipeline.py --export yard/runs/digits/export

Both draw from the same weights, on one thread, in batches of 64 and with as many strides even in t: A is what an actor
of ``jobs/sample.py`` does (``posterior``, the DDPM paper's σ), noise and uint8 included; B is ``DDPMPipeline`` with its
``DDPMScheduler`` ("fixed_small", the same σ), as its users call it. They take turns; ratios are taken within a round,
by the wall clock and by CPU seconds. A/B should be at least 1.1. The network must be one without labels.
"""

import os
import tempfile
from dataclasses import dataclass

import torch
import tyro
from diffusers import DDPMPipeline
from numpy.typing import NDArray

from benchmarks.common import Stopwatch, spread
from pipelines.draw_config import DrawConfig
from pipelines.draw_shard import DrawShard
from pipelines.sample_config import SampleJob
from pipelines.sample_plan import plan_samples
from pipelines.storage import Folder


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Compare our sampling with a pipeline of diffusers."""

    export: str
    """The folder of a run's export."""
    steps: int = 50
    batch: int = 64
    rounds: int = 8


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    draw = DrawConfig(sampler="posterior", steps=settings.steps, batch_images=settings.batch)
    with tempfile.TemporaryDirectory() as out:
        ours = DrawShard(plan_samples(SampleJob(checkpoint=settings.export, out=out, draw=draw)))
    theirs = DDPMPipeline.from_pretrained(Folder(settings.export).path())
    theirs.set_progress_bar_config(disable=True)

    def a(first: int) -> NDArray[float]:  # type: ignore[type-var]
        watch = Stopwatch()
        ours._draw(range(first, first + settings.batch))
        return watch.read()

    def b(first: int) -> NDArray[float]:  # type: ignore[type-var]
        generator = torch.Generator().manual_seed(first)
        watch = Stopwatch()
        theirs(settings.batch, generator, num_inference_steps=settings.steps, output_type="np")
        return watch.read()

    a(0), b(0)  # what is done once is not counted
    rounds = [(a(number), b(number)) for number in range(1, settings.rounds + 1)]
    for i, clock in enumerate(("wall", "CPU")):
        print(f"{clock}: A {settings.batch / min(one[i] for one, _ in rounds):,.0f} images/s at best, "
              f"B {settings.batch / min(other[i] for _, other in rounds):,.0f}; "
              f"A/B {spread([other[i] / one[i] for one, other in rounds])}")  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(tyro.cli(Settings, description=__doc__))
