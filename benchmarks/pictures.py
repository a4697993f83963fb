"""The pictures of the README: the roads to the noise, and the ways back.

    python benchmarks/pictures.py --out docs [--checkpoint FOLDER]

- ``schedules.png``: ᾱ_t, log SNR_t and β_t of each kind of schedule; dashed with zero terminal SNR;
- ``photograph.png``: a photograph torn down by the article's schedule and by one of constant α_t, with the same ε: why
  α_t should fall;
- ``greedy_random.png``: samples of the same seeds by the greedy, random and posterior samplers in 1000 steps, and by
  DPM-Solver++ in 20, with how far the samples of a row are apart beside that of real pictures.

The network is that of a checkpoint, or of a run's folder. Without one, the preset `digits` is trained in memory,
without Ray, which takes about five minutes of a core.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # no pyplot: nothing global, and no window
from PIL import Image, ImageOps
from torch import Tensor

from benchmarks.common import digits
from benchmarks.variance import train
from jobs.presets import DIGITS
from models.noise import normal
from models.objective import EpsTheta
from models.process import demolish
from models.samplers import SAMPLERS, sample
from models.schedule import Schedule, ScheduleConfig, article
from pipelines.fit import State, pixels_to_x_0, x_0_to_pixels
from pipelines.images import Pixels, grid
from pipelines.lineage import Trained

KINDS = ("article", "linear", "cosine", "constant")
WAYS = (("greedy", 1000), ("random", 1000), ("posterior", 1000), ("dpm-solver", 20))
SAMPLES, SIDE, STAGES = 16, 96, 9


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Draw the pictures of the README."""

    out: Path
    """Folder for the pictures."""
    checkpoint: str = ""
    """Folder of a run of jobs/train.py or of one checkpoint; empty: train the digits in memory."""
    images: int = DIGITS.fit.images
    """Images to train on, without a checkpoint."""


def draw_schedules(path: Path) -> None:
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    for i, kind in enumerate(KINDS):
        whole = ScheduleConfig(kind=kind).tables()
        # The article's and the paper's are all but one: the wider line shows beside the narrower.
        _draw_tables(panels, whole, color=f"C{i}", linewidth=4 if kind == "article" else 1.6, label=kind)
        zero = ScheduleConfig(kind=kind, zero_terminal_snr=True).tables()
        _draw_tables(panels, zero, color=f"C{i}", linewidth=1, linestyle="--")
    titles = ("ᾱ_t: what is left of the picture", "log SNR_t = 2 log(ᾱ_t/β̄_t)", "β_t: the noise of one step")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title)
        panel.set_xlabel("t")
        panel.grid(alpha=0.25)
    panels[2].set_yscale("log")
    panels[0].plot([], [], "k--", linewidth=1, label="with zero terminal SNR")
    panels[0].legend()
    figure.savefig(path, dpi=100)


def _draw_tables(panels: Sequence[Axes], schedule: Schedule, **style: Any) -> None:
    for panel, table in zip(panels, (schedule.alpha_bar, schedule.log_snr, schedule.beta), strict=True):
        panel.plot(range(1, schedule.steps + 1), table[1:], **style)


@functools.cache
def photograph(side: int) -> Pixels:
    """Return the flower that comes with scikit-learn, cut to a square: uint8 [side, side, 3]."""
    from sklearn.datasets import load_sample_image

    return np.asarray(ImageOps.fit(Image.fromarray(load_sample_image("flower.jpg")), (side, side)))


def draw_photograph(path: Path) -> None:
    t = torch.linspace(0, 1000, STAGES).round().long()
    x_0 = pixels_to_x_0(torch.tensor(photograph(SIDE)[None])).expand(STAGES, -1, -1, -1)
    eps = normal(0, "strip", torch.zeros(1, dtype=torch.long), (3, SIDE, SIDE)).expand(STAGES, -1, -1, -1)
    rows = []
    for kind in ("article", "constant"):
        schedule = ScheduleConfig(kind=kind).tables()
        of_the_picture = [f"ᾱ = {value:.2f}" for value in schedule.alpha_bar[t].tolist()]
        rows.append((f"{kind} α_t", x_0_to_pixels(demolish(x_0, t, eps, schedule)).numpy(), of_the_picture))
    figure = Figure(figsize=(STAGES * 1.06 + 0.3, 2.6), layout="constrained")
    for panels, (name, pixels, captions) in zip(figure.subplots(2, STAGES), rows, strict=True):
        for panel, picture, caption in zip(panels, pixels, captions, strict=True):
            _show(panel, picture)
            panel.set_xlabel(caption, fontsize=8)
        panels[0].set_ylabel(name)
    for panel, at in zip(figure.axes, t.tolist(), strict=False):
        panel.set_title(f"t = {at}", fontsize=9)
    figure.savefig(path, dpi=100)


def draw_ways(eps_theta: EpsTheta, schedule: Schedule, real: Tensor, path: Path) -> None:
    """Draw the same seeds by each sampler, below some real pictures [n, C, H, W]."""
    shape, seeds = tuple(real.shape[1:]), torch.arange(SAMPLES)
    rows = [("real", real[:SAMPLES], real)]
    for name, at_most in WAYS:
        steps = min(at_most, schedule.steps)
        samples = sample(SAMPLERS[name], eps_theta, schedule, seeds, shape, steps)
        rows.append((f"{name}\n{steps} steps", samples, samples))
    figure = Figure(figsize=(SAMPLES * 0.72 + 2.4, 0.78 * len(rows)), layout="constrained")
    for panel, (name, shown, all_of_them) in zip(figure.subplots(len(rows), 1), rows, strict=True):
        pixels = x_0_to_pixels(shown).numpy()
        _show(panel, grid(pixels, SAMPLES, scale=max(1, 96 // pixels.shape[1])))
        panel.set_ylabel(name, rotation=0, ha="right", va="center")
        panel.set_title(f"apart {_apart(all_of_them):.2f}", x=1.01, y=0.35, loc="left", fontsize=9)
        print(f"{name!r}: the pictures are {_apart(all_of_them):.3f} apart")
    figure.savefig(path, dpi=100)


def _apart(x_0: Tensor) -> float:
    """The root mean square difference of a pixel in two pictures of [n, C, H, W], of a range of 2."""
    return float((2 * x_0.clamp(-1, 1).var(0).mean()).sqrt())


def _show(panel: Axes, picture: Pixels) -> None:
    panel.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=255)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)


def real_pictures(channels: int, side: int) -> Tensor:
    """Return real pictures for a network of this shape: the digits, or else cuttings of the photograph."""
    if (channels, side) == (1, 8):
        return pixels_to_x_0(torch.tensor(digits()))
    whole = pixels_to_x_0(torch.tensor(photograph(4 * side)[None]))
    tiles = whole.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, side, side)
    return tiles if channels == 3 else tiles.mean(1, keepdim=True).expand(-1, channels, -1, -1)


def draw_network(eps_theta: Callable[[int], EpsTheta], schedule: Schedule, channels: int, side: int, out: Path) -> None:
    """Draw what needs a network. ``eps_theta(n)`` is its ε̂ for n samples."""
    real = real_pictures(channels, side)
    draw_ways(eps_theta(SAMPLES), schedule, real, out / "greedy_random.png")


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    draw_schedules(settings.out / "schedules.png")
    draw_photograph(settings.out / "photograph.png")
    if settings.checkpoint:
        trained = Trained.find(settings.checkpoint)
        channels, side, _ = trained.checkpoint.shape
        network = trained.network(averaged=True)

        def of_checkpoint(n: int) -> EpsTheta:
            label = torch.arange(n) % max(len(trained.labels), 1)  # one after the other, if it knows labels
            return trained.eps_theta(network, label, guidance=1.0)

        draw_network(of_checkpoint, trained.schedule(), channels, side, settings.out)
        return

    def at_end(state: State) -> None:
        with state.ema.applied_to(state.model), torch.no_grad():
            draw_network(lambda n: state.model, article(), 1, 8, settings.out)

    train((settings.images,), seed=0, at_mark=at_end)


if __name__ == "__main__":
    main()
