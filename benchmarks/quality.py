"""How good are the samples after the demo's budget, beside what a user of diffusers gets for the same budget?

    python benchmarks/quality.py --out /tmp/quality

Both sides train on the 1,797 digits, one process with one thread each, at the same time on two cores: the same images,
batch, optimizer, learning rate, warm-up and clipping of the gradient. *Ours* is ``pipelines.fit.fit`` alone with the
preset `digits`. *diffusers* is a loop as in its ``train_unconditional.py``: ``UNet2DModel`` of about the same size,
``DDPMScheduler`` and ``EMAModel`` with their own defaults, t uniform, noise from ``torch.randn``.

At each mark both draw 1,797 samples from their averaged weights with 20 steps of DPM-Solver++, three times, and the
table shows

- ``frechet``: the Fréchet distance to the 1,797 real digits, in pixels of [0, 1], as the mean over the three sets;
  ``±`` is half of the range from the best to the worst set;
- ``loss``: the mean training loss over the last tenth of the images. The schedules differ a little, so it compares
  only roughly;
- ``eps_mse``: ‖ε - ε̂‖² of the averaged weights on all digits, at 10 noise levels that both schedules have: it compares;
- ``img/s`` and ``img/cpu-s``: images per second on the wall, and per second of the process, without the first report
  and without the drawing.

Two references stand below: a resample of the real digits, and one Gaussian fitted to them. A CSV and a contact sheet
of each side and mark go into the folder.
"""

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.common import Stopwatch, digits, micro_batches
from jobs.presets import DIGITS
from models.ema import EMAConfig
from models.init import initialize
from models.network import build
from models.objective import EpsTheta
from models.samplers import dpm_solver, sample
from models.schedule import article
from pipelines.features import pixel_features
from pipelines.fit import Listener, State, fit, new_state, pixels_to_x_0, x_0_to_pixels
from pipelines.fit_config import FitConfig
from pipelines.images import encode
from pipelines.moments import Moments, frechet_distance
from pipelines.pictures import contact_sheet

SAMPLES, STEPS, SHAPE = 1797, 20, (1, 8, 8)
LEVELS = torch.arange(50, 1000, 100)
"""t of the article's schedule at which both networks are compared."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Compare ours with diffusers at equal budget."""

    out: Path
    """Folder for quality.csv and the contact sheets."""
    marks: tuple[int, ...] = (51_200, 102_400, 204_800)
    """Images seen at which both sides are measured; the last one ends the training."""
    seed: int = 0
    draws: int = 3
    """Sets of samples at each mark."""
    side: Literal["both", "ours", "diffusers"] = "both"
    fit: FitConfig = field(default_factory=lambda: DIGITS.fit)
    """Learning rate, warm-up, batch and clipping hold for both sides, the rest for ours."""
    half_life_images: float = DIGITS.fit.ema.half_life_images
    """Of our average of the weights."""
    ema_warm_up: float = DIGITS.fit.ema.warm_up
    """Of our average of the weights."""


@dataclass(frozen=True)
class Row:
    """What a side has come to at a mark."""

    side: str
    seed: int
    images: int
    parameters: int
    images_per_s: float
    images_per_cpu_s: float
    loss: float
    eps_mse: float
    frechet: float
    frechet_half_range: float

    def __str__(self) -> str:
        return (
            f"{self.side:10} seed {self.seed} {self.images:8,} images "
            f"{self.images_per_s:5.0f} img/s {self.images_per_cpu_s:5.0f} img/cpu-s  "
            f"loss {self.loss:.4f}  eps_mse {self.eps_mse:.4f}  "
            f"frechet {self.frechet:.4f} ± {self.frechet_half_range:.4f}"
        )


class Examiner:
    """Keeps the books of one side and measures it at the marks."""

    def __init__(self, settings: Settings, side: str, alpha_bar: Tensor, model: nn.Module) -> None:
        self.settings, self.side, self.alpha_bar, self.model = settings, side, alpha_bar, model
        self.losses: list[tuple[int, float]] = []  # images seen, and the mean loss since the entry before
        self.watch, self.timed_from = Stopwatch(), 0

    def hear(self, images: int, loss: float) -> None:
        """Take the mean loss since the last time. The clock starts with the first: before it torch warms up."""
        if not self.losses:
            self.watch, self.timed_from = Stopwatch(), images
        self.losses.append((images, loss))

    def examine(self, images: int, eps_theta: EpsTheta, draw: Callable[[int], Tensor]) -> None:
        """Measure the averaged weights at a mark, print the row as JSON and save pictures of the first set."""
        elapsed = self.watch.read()
        with self.watch.stopped(), torch.no_grad():
            sets = [x_0_to_pixels(draw(i)).numpy() for i in range(self.settings.draws)]
            distances = [frechet(pixels) for pixels in sets]
            speed = (images - self.timed_from) / elapsed
            row = Row(
                side=self.side,
                seed=self.settings.seed,
                images=images,
                parameters=sum(p.numel() for p in self.model.parameters()),
                images_per_s=float(speed[0]),
                images_per_cpu_s=float(speed[1]),
                loss=float(np.mean([loss for seen, loss in self.losses if seen > 0.9 * images])),
                eps_mse=eps_mse(eps_theta, self.alpha_bar),
                frechet=float(np.mean(distances)),
                frechet_half_range=(max(distances) - min(distances)) / 2,
            )
            name = f"{self.side}-seed{self.settings.seed}-{images}.png"
            (self.settings.out / name).write_bytes(encode(contact_sheet(sets[0][:64]), "png"))
            print(json.dumps(asdict(row)), flush=True)


def frechet(pixels: NDArray[np.uint8]) -> float:
    """Return the distance of pictures from the real digits."""
    return frechet_distance(Moments.of(pixel_features(pixels)), Moments.of(pixel_features(digits())))


def eps_mse(eps_theta: EpsTheta, alpha_bar: Tensor) -> float:
    """Return the mean of ‖ε - ε̂‖² per pixel over all digits and LEVELS, whatever the schedule numbers them."""
    x_0, generator = pixels_to_x_0(torch.tensor(digits())), torch.Generator().manual_seed(12345)
    own = alpha_bar.log() - (1 - alpha_bar**2).sqrt().log()  # log of the ratio of signal to noise, index 0 the cleanest
    table = article().alpha_bar[LEVELS]
    levels = table.log() - (1 - table**2).sqrt().log()
    errors = []
    for level in levels:
        t = (own - level).abs().argmin()
        eps = torch.randn(x_0.shape, generator=generator)
        x_t = float(alpha_bar[t]) * x_0 + math.sqrt(1 - float(alpha_bar[t]) ** 2) * eps
        errors.append((eps - eps_theta(x_t, t.expand(len(x_0)))).square().mean())
    return float(torch.stack(errors).mean())


def train_ours(settings: Settings) -> None:
    """Train with our loop, out of memory."""
    schedule, pixels, numbers = article(), digits(), torch.arange(SAMPLES)
    unit = math.gcd(*settings.marks)
    config = replace(
        settings.fit,
        images=max(settings.marks),
        log_images=unit // 10,
        checkpoint_images=unit,
        grid_images=max(settings.marks),
        ema=EMAConfig(half_life_images=settings.half_life_images, warm_up=settings.ema_warm_up),
    )
    model = build(DIGITS.network, image_channels=1, side=8)
    initialize(model, settings.seed)
    model = model.to(memory_format=torch.channels_last)
    examiner = Examiner(settings, "ours", schedule.alpha_bar, model)

    class Marks(Listener):
        def report(self, metrics: dict[str, float], position: int) -> None:
            examiner.hear(position, metrics["loss"])

        def checkpoint(self, state: State) -> None:
            if state.position in settings.marks:
                with state.ema.applied_to(state.model):
                    examiner.examine(
                        state.position,
                        state.model,
                        lambda i: sample(dpm_solver, state.model, schedule, numbers + i * SAMPLES, SHAPE, STEPS),
                    )

    batches = micro_batches(pixels, config, settings.seed)
    fit(config, new_state(model, config, schedule), schedule, settings.seed, batches, Marks())


def train_diffusers(settings: Settings) -> None:
    """Train as the users of diffusers do."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    torch.manual_seed(settings.seed)
    config, x_0 = settings.fit, pixels_to_x_0(torch.tensor(digits()))
    scheduler = DDPMScheduler()
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True
    )
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
    examiner = Examiner(settings, "diffusers", scheduler.alphas_cumprod.double().sqrt(), model)
    order, images = torch.empty(0, dtype=torch.long), 0

    while images < max(settings.marks):
        images += config.batch_images
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(images / max(config.warm_up_images, 1), 1.0)
        if len(order) < config.batch_images:
            order = torch.cat([order, torch.randperm(len(x_0))])
        rows, order = order[: config.batch_images], order[config.batch_images :]
        noise, t = torch.randn(len(rows), *SHAPE), torch.randint(0, 1000, (len(rows),))
        loss = nn.functional.mse_loss(model(scheduler.add_noise(x_0[rows], noise, t), t).sample, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        examiner.hear(images, float(loss.detach()))
        if images in settings.marks:
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
            examiner.examine(images, lambda x_t, t: model(x_t, t).sample, lambda i: draw_diffusers(model, scheduler, i))
            ema.restore(model.parameters())


def draw_diffusers(model: nn.Module, ddpm: object, seed: int) -> Tensor:
    """Draw a set of samples with the multistep solver of diffusers, as its own defaults have it."""
    from diffusers import DPMSolverMultistepScheduler

    solver = DPMSolverMultistepScheduler.from_config(ddpm.config)  # type: ignore[attr-defined]
    solver.set_timesteps(STEPS)
    x = torch.randn(SAMPLES, *SHAPE, generator=torch.Generator().manual_seed(seed))
    for t in solver.timesteps:
        x = solver.step(model(x, t).sample, t, x).prev_sample
    return x


def references() -> str:
    """Return what real digits drawn again score, and what one Gaussian does: of 20 draws each."""
    rng, real = np.random.default_rng(0), digits()
    features = pixel_features(real)
    resampled = [frechet(real[rng.integers(0, len(real), SAMPLES)]) for _ in range(20)]
    mean, covariance = features.mean(0), np.cov(features.T)
    drawn = [rng.multivariate_normal(mean, covariance, SAMPLES).clip(0, 1) for _ in range(20)]
    gaussian = [frechet(np.rint(255 * x).astype(np.uint8)) for x in drawn]
    return f"a resample of the real digits {np.mean(resampled):.4f}, one fitted Gaussian {np.mean(gaussian):.4f}"


def both(settings: Settings, argv: list[str]) -> None:
    """Run the two sides at the same time, and put what they say into a table."""
    command = [sys.executable, __file__, *argv, "--side"]
    sides = [
        subprocess.Popen([*command, side], stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        for side in ("ours", "diffusers")
    ]
    rows = [Row(**json.loads(line)) for side in sides for line in side.communicate()[0].splitlines()]
    path = settings.out / "quality.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__))
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    print(*sorted(rows, key=lambda row: (row.images, row.side)), sep="\n")
    print({row.side: row.parameters for row in rows}, "parameters;", references())


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    match settings.side:
        case "both":
            both(settings, sys.argv[1:])
        case "ours":
            train_ours(settings)
        case "diffusers":
            train_diffusers(settings)


if __name__ == "__main__":
    main()
