"""How few steps are enough? And what does a sampler cost beside its network?

    python benchmarks/steps.py --run yard/runs/digits --ways random:even:1000 --sets 3
    python benchmarks/steps.py --run yard/runs/digits --ways dpm-solver:even:10 heun:log-snr:6 --sets 3
    python benchmarks/steps.py --run yard/runs/digits --overhead

Sets of 1,797 samples are drawn from the averaged weights of a run, from the same x_T for each way, and compared with
the 1,797 digits: the Fréchet distance in pixels of [0, 1]. Told are the mean of the sets and half their range, and the
evaluations of the network for each sample. ``--overhead`` times the parts of a step outside the network.
"""

import time
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
import tyro
from torch import Tensor

from benchmarks.common import digits
from models.samplers import SAMPLERS, build, clip_x_0, sample, sample_noise
from pipelines.features import pixel_features
from pipelines.fit import x_0_to_pixels
from pipelines.lineage import Trained
from pipelines.moments import Moments, frechet_distance

SAMPLES, BATCH, ROUNDS = 1797, 64, 7


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Compare ways from noise to a picture."""

    run: str
    """The folder of a run, or of a DDPMPipeline."""
    ways: tuple[str, ...] = ()
    """SAMPLER:SPACING:STEPS."""
    sets: int = 3
    """Sets of 1,797 samples for each way, of seeds of their own."""
    overhead: bool = False
    """Time what a step does outside the network."""


def distance(trained: Trained, way: str, start: int) -> tuple[float, int]:
    """Return the Fréchet distance of the samples of 1,797 seeds, and the evaluations that each took."""
    sampler, spacing, steps = way.split(":")
    network, evaluations, drawn = trained.network(averaged=True), 0, []

    def counted(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        nonlocal evaluations
        evaluations += len(x)
        return network(x, t, label)

    for first in range(start, start + SAMPLES, BATCH):
        seeds = torch.arange(first, min(first + BATCH, start + SAMPLES))
        eps_theta = trained.eps_theta(counted, torch.full_like(seeds, -1), guidance=1.0)
        x_0 = sample(SAMPLERS[sampler], eps_theta, trained.schedule(), seeds, (1, 8, 8), int(steps), spacing=spacing)
        drawn.append(x_0_to_pixels(x_0).numpy())
    real = Moments.of(pixel_features(digits()))
    return frechet_distance(Moments.of(pixel_features(np.concatenate(drawn))), real), evaluations // SAMPLES


def overhead(trained: Trained) -> None:
    """Print the share of a sampler's time that is not the network's, with and without clipping."""
    network, schedule = trained.network(averaged=True), trained.schedule()
    unlabelled = torch.full((BATCH,), -1)
    seeds = torch.arange(BATCH)
    x_T, noise = sample_noise(seeds, (1, 8, 8))
    inside = 0.0

    def timed(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        nonlocal inside
        began = time.process_time()
        eps = network(x, t, label)
        inside += time.process_time() - began
        return eps

    for name, sampler in SAMPLERS.items():
        for clip in (True, False):
            shares = []
            for _ in range(ROUNDS):
                inside, began = 0.0, time.process_time()
                eps_theta = trained.eps_theta(timed, unlabelled, guidance=1.0)
                build(sampler, clip_x_0(eps_theta, schedule) if clip else eps_theta, x_T, schedule.respaced(20), noise)
                shares.append(1 - inside / (time.process_time() - began))
            print(
                f"{name:12s} {'clipped' if clip else 'as it is':8s} {100 * median(shares):5.2f} % outside the network"
            )


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(1)
    trained = Trained.find(settings.run)
    with torch.inference_mode():
        for way in settings.ways:
            found = [distance(trained, way, i * SAMPLES) for i in range(settings.sets)]
            distances = [d for d, _ in found]
            print(
                f"{way:24s} {found[0][1]:5d} evaluations  frechet {np.mean(distances):.4f} ± "
                f"{(max(distances) - min(distances)) / 2:.4f}  {' '.join(f'{d:.4f}' for d in distances)}",
                flush=True,
            )
        if settings.overhead:
            overhead(trained)


if __name__ == "__main__":
    main()
