"""Pictures of numbers, for the record of a run: its schedule, and its loss over t."""

import io
from typing import TYPE_CHECKING

from models.schedule import Schedule
from pipelines.validation import Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 20
"""Stretches of 1..T whose mean loss is drawn."""


def schedule_figure(schedule: Schedule) -> bytes:
    """Draw what a schedule leaves of a picture, ᾱ_t, and how much noise each step adds, β_t, as a PNG file."""
    figure = blank(9, 3.2)
    left, right = figure.subplots(1, 2)
    t = schedule.time
    left.plot(t, schedule.alpha_bar, label="ᾱ_t, of the picture")
    left.plot(t, schedule.beta_bar, label="β̄_t, of noise")
    left.set(xlabel="t", ylim=(0, 1.02), title="what x_t is made of")
    left.legend()
    right.plot(t[1:], schedule.beta[1:])
    right.set(xlabel="t", ylim=(0, None), title="β_t, the noise of one step")
    return png(figure)


def loss_figure(curve: Curve) -> bytes:
    """Draw the loss of each image at its t, and the mean of each twentieth of 1..T, as a PNG file."""
    t, loss, T = curve.t, curve.loss, curve.T
    figure = blank(7, 4)
    axes = figure.subplots()
    axes.scatter(t, loss, s=6, alpha=0.35, label="one image that was held out")
    bins = (t - 1) * BINS // T
    filled = sorted(set(bins.tolist()))
    means = [float(loss[bins == i].mean()) for i in filled]
    axes.plot([(i + 0.5) * T / BINS for i in filled], means, color="black", label=f"mean of T/{BINS} steps")
    axes.set(xlabel="t", ylabel="‖ε - ε̂‖², a pixel", yscale="log")
    axes.set_title(f"the loss over t, after {curve.position:,} images")
    axes.legend()
    return png(figure)


def blank(width: float, height: float) -> "Figure":
    """Return an empty figure, sizes in inches."""
    from matplotlib.figure import Figure  # at the end of a run, not at its start; no pyplot: nothing global, no window

    return Figure(figsize=(width, height), layout="constrained")


def png(figure: "Figure") -> bytes:
    """Return a figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
