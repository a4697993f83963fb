"""What the sweep `article` found, in one picture: how good its networks are, and what they draw from the same seeds.

python jobs/sweep.py article
python benchmarks/article.py --sweep ~/brickyard/sweeps/article --out docs/article.png
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure, SubFigure  # no pyplot: nothing global, and no window

from pipelines.images import Pixels, grid
from pipelines.sample_set import MANIFEST
from pipelines.sample_shards import read_samples
from pipelines.scoring import METRIC
from pipelines.storage import Folder

SAMPLES = 16
KINDS = {"article": "falling α_t, the article's", "constant": "constant α_t"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Draw what the sweep found."""

    sweep: str
    """Folder of the sweep."""
    out: Path
    """The picture."""


@dataclass(frozen=True)
class Child:
    """A child of the sweep that is done."""

    config: dict[str, Any]
    score: float
    samples: Folder

    @staticmethod
    def read(folder: Folder, name: str) -> "Child":
        about = json.loads(folder.get(name))
        return Child(about["config"], about["said"][METRIC], Folder(about["said"]["samples"]))

    @property
    def of_the_grid(self) -> bool:
        """Whether it is one of those that differ in T and in the kind of α_t alone."""
        plain = self.config["fit"]["objective"]["loss"] == "reduced" and self.config["draw"]["sampler"] == "random"
        return plain and self.config["draw"]["steps"] == self.config["schedule"]["T"]

    @property
    def words(self) -> str:
        schedule, draw = self.config["schedule"], self.config["draw"]
        if self.of_the_grid:
            return f"{schedule['kind']} α_t, T = {schedule['T']}"
        loss = self.config["fit"]["objective"]["loss"]
        return f"T = {schedule['T']}, {loss} loss,\n{draw['steps']} {draw['sampler']} steps"

    def pictures(self) -> Pixels:
        """Return the samples of the first seeds, side by side."""
        about = json.loads(self.samples.get(MANIFEST))
        found = read_samples(self.samples, [about["files"][0]["name"]], tuple(about["shape"]))
        return grid(found[:SAMPLES], SAMPLES, scale=4)


def draw_scores(figure: SubFigure, children: list[Child]) -> None:
    axes = figure.subplots()
    for kind, words in KINDS.items():
        points = sorted(
            (child.config["schedule"]["T"], child.score)
            for child in children
            if child.of_the_grid and child.config["schedule"]["kind"] == kind
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=words)
        for T, score in points:
            axes.annotate(f"{score:.2f}", (T, score), xytext=(5, 6), textcoords="offset points", fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel="T, and steps of the way back", ylabel="Fréchet distance")
    axes.margins(x=0.15, y=0.15)
    axes.set_title("Fréchet distance, the smaller the better; ᾱ_T is e^-5.04")
    axes.legend()


def draw_samples(figure: SubFigure, children: list[Child]) -> None:
    rows = sorted(children, key=lambda child: (not child.of_the_grid, child.score))
    for axes, child in zip(figure.subplots(len(rows), 1), rows, strict=True):
        axes.imshow(np.squeeze(child.pictures()), cmap="gray", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_ylabel(f"{child.words}: {child.score:.2f}", rotation=0, ha="right", va="center", fontsize=9)


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    folder = Folder(settings.sweep)
    children = [
        Child.read(folder, name) for name in folder.names() if name.endswith(".json") and name.startswith(folder.name)
    ]
    figure = Figure(figsize=(14, 0.55 * len(children) + 0.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.7])
    draw_scores(left, children)
    draw_samples(right, children)
    figure.savefig(settings.out, dpi=100)


if __name__ == "__main__":
    main()
