"""How far do the loss and its gradient scatter from batch to batch, rung by rung of the article's ladder?

    python benchmarks/variance.py --out /tmp/brickyard-variance

The article's reason for its last loss is variance. Here it is measured on the 1,797 digits, with the network of the
preset `digits`, at fixed weights, at several stages of its training. Each estimate costs the same on every rung:
B = 128 images, one t each, one forward and one backward. Image, t and ε are functions of the position, and the same
images and the same ε serve all rungs. The ladder:

- ``two-noise, rescaled``: the article's loss of two noises, t uniform. It has other weights than the reduced loss and a
  constant beside it, so as it stands the two cannot be compared. From its expectation, (β_t²/β̄_t²) reduced +
  α_t² β̄_{t-1}²/β̄_t², it is brought to that of the reduced loss: times β̄_t²/β_t², less the constant;
- ``reduced``: the article's last loss, t uniform;
- ``stratified``: the same, every batch covers 1..T evenly;
- ``loss-aware``: the same, t drawn in proportion to √E loss², in strata of equal probability, and weighed to make up
  for it. It has learned the losses of the weights at hand from 51,200 images that are not counted.

So that nothing is flattered by the rescaling, two more, of the same expectation up to the constant, stand beside:

- ``two-noise as written``: unscaled;
- ``reduced, so weighed``: the reduced loss times β_t²/β̄_t².

Told are the variance of the batch's loss over its squared mean, and the trace of the covariance of the batch's gradient
over the squared norm of its mean. The mean is that of ``stratified`` for the ladder and of ``reduced, so weighed`` for
the two beside it; only the loss of ``two-noise as written`` is over its own mean, in which the constant is most of it.
Brackets are 95 % intervals from a bootstrap over the batches. ``apart`` says whether a rung estimates the same
gradient: the squared distance of the two means, over what independent estimates of one gradient would show. It is about
1 or less, as the rungs share images and ε. Last comes where the variance of ``reduced`` is from: t, ε when the images
and t are known (from estimates that differ in nothing but ε), and the images.

A CSV and a picture go into the folder.
"""

import csv
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.common import Silent, digits, micro_batches
from jobs.presets import DIGITS
from models.init import initialize
from models.network import EpsNetwork, build
from models.noise import words
from models.objective import EpsTheta, reduced_loss, two_noise_loss
from models.schedule import Schedule, article
from models.timesteps import Kind, TimestepConfig, Timesteps
from pipelines.fit import State, fit, new_state, noise_like, pixels_to_x_0

B, RESAMPLES = DIGITS.fit.batch_images, 2000
LEARNED_IMAGES = 51_200
"""What the loss-aware rung learns from: about five times what it asks for before it uses what it has seen."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure the variance of the loss and of its gradient on each rung of the ladder."""

    out: Path
    """Folder for variance.csv and variance.png."""
    marks: tuple[int, ...] = (5_120, 51_200, 153_600)
    """Images that the network has trained on when it is measured."""
    batches: int = 200
    """Estimates of each rung."""
    seed: int = 0


Losses = Callable[[EpsTheta, Tensor, Tensor, Callable[[str], Tensor], Schedule], Tensor]
"""The loss of each image, float [B], of ε̂, x_0, t, the noise by the name of its stream, and the schedule."""


def reduced(eps_theta: EpsTheta, x_0: Tensor, t: Tensor, noise: Callable[[str], Tensor], schedule: Schedule) -> Tensor:
    return reduced_loss(eps_theta, x_0, t, noise("eps"), schedule)


def reduced_so_weighed(
    eps_theta: EpsTheta, x_0: Tensor, t: Tensor, noise: Callable[[str], Tensor], schedule: Schedule
) -> Tensor:
    """(β_t²/β̄_t²) reduced."""
    return (schedule.beta / schedule.beta_bar)[t].square().float() * reduced(eps_theta, x_0, t, noise, schedule)


def as_written(
    eps_theta: EpsTheta, x_0: Tensor, t: Tensor, noise: Callable[[str], Tensor], schedule: Schedule
) -> Tensor:
    return two_noise_loss(eps_theta, x_0, t, noise("eps"), noise("eps_t"), schedule)


def two_noise(
    eps_theta: EpsTheta, x_0: Tensor, t: Tensor, noise: Callable[[str], Tensor], schedule: Schedule
) -> Tensor:
    """(β̄_t²/β_t²) two-noise - α_t² β̄_{t-1}²/β_t²: the expectation of the reduced loss."""
    scale = (schedule.beta_bar / schedule.beta)[t].square()
    beyond = (schedule.alpha[t] * schedule.beta_bar[t - 1] / schedule.beta[t]).square()
    return scale.float() * as_written(eps_theta, x_0, t, noise, schedule) - beyond.float()


class Rung(NamedTuple):
    """One way to estimate the loss."""

    losses: Losses
    timesteps: Kind
    same: str
    """The rung whose mean this one shares."""


LADDER = {
    "two-noise, rescaled": Rung(two_noise, "uniform", "stratified"),
    "reduced": Rung(reduced, "uniform", "stratified"),
    "stratified": Rung(reduced, "stratified", "stratified"),
    "loss-aware": Rung(reduced, "loss-aware", "stratified"),
}
AS_WRITTEN = {
    "two-noise as written": Rung(as_written, "uniform", "reduced, so weighed"),
    "reduced, so weighed": Rung(reduced_so_weighed, "uniform", "reduced, so weighed"),
}
NAMES = (
    "two-noise\nas written",
    "reduced in\nits weights",
    "two-noise\nrescaled",
    "reduced",
    "reduced\nstratified t",
    "reduced\nloss-aware t",
)
"""Of both, for the picture: the first two are weighed alike, and so are the last four."""


@dataclass(frozen=True)
class Row:
    """What a rung has come to at a mark: relative variances, and the ends of their intervals."""

    images: int
    rung: str
    batches: int
    loss: float
    loss_low: float
    loss_high: float
    gradient: float
    gradient_low: float
    gradient_high: float
    apart: float

    def __str__(self) -> str:
        loss = f"{self.loss:.3g} [{self.loss_low:.3g}, {self.loss_high:.3g}]"
        gradient = f"{self.gradient:.3g} [{self.gradient_low:.3g}, {self.gradient_high:.3g}]"
        return f"{self.images:8,}  {self.rung:21} {loss:32} {gradient:26} {self.apart:5.2f}"


class Scatter:
    """The variance of estimates [n, d], summed over d, and their mean."""

    def __init__(self, values: Tensor) -> None:
        self.n, self.mean = len(values), values.mean(0)  # [d]
        squared = torch.stack([(value - self.mean).square().sum() for value in values]).double().numpy()  # [n]
        self.each: NDArray[np.float64] = squared * self.n / (self.n - 1)
        self.variance = float(self.each.mean())

    def over(self, other: "Scatter") -> tuple[float, float, float]:
        """Return the variance over the squared norm of the mean of another, and the ends of its 95 % interval."""
        squared_mean = float(other.mean.double().square().sum()) - other.variance / other.n  # without bias
        drawn = np.random.default_rng(0).integers(0, self.n, (RESAMPLES, self.n))
        low, high = np.quantile(self.each[drawn].mean(1), [0.025, 0.975])
        return self.variance / squared_mean, float(low) / squared_mean, float(high) / squared_mean

    def apart(self, other: "Scatter") -> float:
        """Return ‖mean - mean of another‖² over what is to be expected of independent estimates of one quantity."""
        distance = float((self.mean - other.mean).double().square().sum())
        return distance / (self.variance / self.n + other.variance / other.n)


class Meter:
    """Draws estimates at the weights that a network has now."""

    def __init__(self, network: EpsNetwork, schedule: Schedule, settings: Settings) -> None:
        self.network, self.schedule, self.settings = network, schedule, settings
        self.x_0 = pixels_to_x_0(torch.tensor(digits()))
        self.timesteps = {kind: self._timesteps(kind) for kind in ("uniform", "stratified", "loss-aware")}
        self._learn()

    def _timesteps(self, kind: Kind) -> Timesteps:
        return Timesteps(TimestepConfig(kind=kind), self.schedule, B, torch.device("cpu"))

    @torch.no_grad()
    def _learn(self) -> None:
        """Show the losses of the stratified rung to the loss-aware one, at positions that are not measured."""
        aware, first = self.timesteps["loss-aware"], self.settings.batches
        for s in range(first, first + LEARNED_IMAGES // B):
            t, _, losses = self._losses(LADDER["stratified"], s)
            aware.observe(t, losses)
            aware.learn(lambda observed: observed)

    def _losses(self, rung: Rung, s: int, redrawn: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return t, its weight and the loss of each image of batch s. ``redrawn`` is another seed for the noise."""
        seed, position = self.settings.seed + 1, torch.arange(s * B, (s + 1) * B)  # not the seed of the training
        # Each image for itself: by the plan, batches of one epoch would not be independent of each other.
        row = words(seed, "variance image", position, step=0, blocks=1)[0][:, 0] * len(self.x_0) >> 32
        x_0 = self.x_0[row]
        t, weight = self.timesteps[rung.timesteps].draw(seed, position)
        noise = partial(noise_like, x_0, seed + redrawn, position)
        return t, weight, rung.losses(self.network, x_0, t, noise, self.schedule)

    def estimates(self, rung: Rung, redrawn: int = 0) -> tuple[Tensor, Tensor]:
        """Return the loss [n, 1] and the gradient [n, P] of n batches."""
        parameters = list(self.network.parameters())
        n, size = self.settings.batches, sum(p.numel() for p in parameters)
        loss, gradient = torch.empty(n, 1, dtype=torch.float64), torch.empty(n, size)
        for s in range(n):
            _, weight, losses = self._losses(rung, s, redrawn)
            mean = (weight.to(losses.dtype) * losses).mean()
            loss[s] = mean.detach()
            torch.cat([g.flatten() for g in torch.autograd.grad(mean, parameters)], out=gradient[s])
        return loss, gradient


def measure(meter: Meter, images: int) -> Iterator[Row | str]:
    """Yield the rows of a mark, and a sentence on where the variance comes from."""
    scatters: dict[str, tuple[Scatter, Scatter]] = {}
    for name, rung in (LADDER | AS_WRITTEN).items():
        values = meter.estimates(rung)
        scatters[name] = (Scatter(values[0]), Scatter(values[1]))
        if name == "stratified":
            again = meter.estimates(rung, redrawn=1)
            # E ½‖a - b‖² of two estimates that differ in ε alone is the variance that ε makes.
            of_eps = [float((a - b).square().sum(1).mean()) / 2 for a, b in zip(values, again, strict=True)]
    for name, rung in (LADDER | AS_WRITTEN).items():
        (loss, gradient), (same_loss, same_gradient) = scatters[name], scatters[rung.same]
        of_loss = loss.over(loss if name == "two-noise as written" else same_loss)
        yield Row(images, name, loss.n, *of_loss, *gradient.over(same_gradient), gradient.apart(same_gradient))
    for i, what in enumerate(("loss", "gradient")):
        whole, within = scatters["reduced"][i].variance, scatters["stratified"][i].variance
        parts = {"t": whole - within, "ε": of_eps[i], "the images": within - of_eps[i]}
        shares = ", ".join(f"{100 * part / whole:.0f} % {name}" for name, part in parts.items())
        yield f"{images:8,}  variance of the {what} of reduced: {shares}"


def train(marks: tuple[int, ...], seed: int, at_mark: Callable[[State], None]) -> None:
    """Train as the preset `digits` does, alone and in memory, and show the state at the marks."""
    unit = int(np.gcd.reduce(marks))
    config = replace(DIGITS.fit, images=max(marks), log_images=unit, checkpoint_images=unit, grid_images=max(marks))
    network: nn.Module = build(DIGITS.network, image_channels=1, side=8)
    initialize(network, seed)
    schedule = article()

    class Listener(Silent):
        def report(self, metrics: dict[str, float], position: int) -> None:
            print(f"{position:8,} images, loss {metrics['loss']:.4f}", flush=True)

        def checkpoint(self, state: State) -> None:
            if state.position in marks:
                at_mark(state)

    state = new_state(network.to(memory_format=torch.channels_last), config, schedule)
    fit(config, state, schedule, seed, micro_batches(digits(), config, seed), Listener())


def plot(rows: list[Row], path: Path) -> None:
    """Draw the ladder: relative variances with their intervals, one colour for each mark."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, and no window

    figure = Figure(figsize=(13, 4.8), layout="constrained")
    shown = [*AS_WRITTEN, *LADDER]
    marks = sorted({row.images for row in rows})
    for panel, what in zip(figure.subplots(1, 2), ("loss", "gradient"), strict=True):
        for i, images in enumerate(marks):
            here = [next(row for row in rows if (row.images, row.rung) == (images, name)) for name in shown]
            value, low, high = (np.array([getattr(row, what + end) for row in here]) for end in ("", "_low", "_high"))
            x, colour = np.arange(len(shown)) + 0.16 * (i - (len(marks) - 1) / 2), f"C{i}"
            label = f"after {images:,} images"
            panel.errorbar(x, value, [value - low, high - value], fmt="o", color=colour, capsize=3, label=label)
            for place, top, number in zip(x, high, value, strict=True):
                text = f"{number:.0f}" if number >= 10 else f"{number:.2g}"
                panel.annotate(text, (place, top), (0, 4), textcoords="offset points", rotation=90,
                               ha="center", va="bottom", fontsize=8, color=colour)  # fmt: skip
        panel.margins(y=0.16)
        panel.set_yscale("log")
        panel.set_xticks(range(len(shown)), NAMES, fontsize=8)
        panel.axvline(len(AS_WRITTEN) - 0.5, color="grey", linewidth=0.8)
        panel.grid(axis="y", alpha=0.4)
    loss, gradient = figure.axes
    loss.set_title(f"the loss of {B} images: variance over squared mean")
    gradient.set_title("its gradient: trace of the covariance over ‖mean‖²")
    gradient.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    told: list[Row | str] = []

    def at_mark(state: State) -> None:
        meter = Meter(state.model, article(), settings)
        for line in measure(meter, state.position):
            print(line, flush=True)
            told.append(line)

    train(settings.marks, settings.seed, at_mark)
    rows = [line for line in told if isinstance(line, Row)]
    with (settings.out / "variance.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    plot(rows, settings.out / "variance.png")
    print(f"{'images':>8}  {'rung':21} {'loss: variance / mean²':32} {'gradient, over ‖mean‖²':26} apart")
    print(*told, sep="\n")


if __name__ == "__main__":
    main()
