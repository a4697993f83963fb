"""What is minimised: the article's three losses, the targets that a network can be given, and their weights.

Each loss is a mean over the pixels of each image, float [B], of images that are demolished at t (int64 [B]).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from models.choice import check_choice
from models.process import demolish, demolish_step, eps_from_v, eps_from_x_0
from models.schedule import Schedule, at

EpsTheta: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""ε̂(x_t, t): float [B, C, H, W] and int64 [B] to float [B, C, H, W]."""
Network: TypeAlias = EpsTheta
"""The same of a network, whose output is its target and need not be ε."""
Loss: TypeAlias = Literal["reduced", "two-noise", "reconstruction"]
Target: TypeAlias = Literal["eps", "x_0", "v", "article"]
Weight: TypeAlias = Literal["simple", "article", "min-snr"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the network is asked for, and what an error costs."""

    loss: Loss = "reduced"
    """The article's last loss, or its first two: the same gradient at each t up to a factor, with more variance."""
    target: Target = "eps"
    """What the network puts out: ε; the picture x_0; v = ᾱ_t ε - β̄_t x_0; or the article's ε_θ = (β_t/β̄_t) ε̂."""
    weight: Weight = "simple"
    """1 for each t, in the units of the target (of ε for the article's); the article's β_t²/α_t² on the error of ε,
    which makes the two-noise loss the reconstruction; or min-SNR-γ, for the reduced loss."""
    gamma: float = 5.0
    """The γ of min-snr: the SNR from which on cleaner pictures weigh no more (Hang et al., 2023)."""

    def __post_init__(self) -> None:
        for name, words in (("loss", Loss), ("target", Target), ("weight", Weight)):
            check_choice(f"fit.objective.{name}", getattr(self, name), words)
        if not self.gamma > 0:
            raise ValueError(f"fit.objective.gamma is {self.gamma}; it must be positive: try 5")
        if self.loss != "reduced" and self.weight == "min-snr":
            raise ValueError(
                f"fit.objective.weight is min-snr; the {self.loss} loss has weights of its own: take "
                "fit.objective.loss reduced"
            )
        if self.loss == "reconstruction" and self.weight != "simple":
            raise ValueError(
                f"fit.objective.weight is {self.weight}; the reconstruction loss has the article's weight in it "
                "already: take fit.objective.weight simple, or fit.objective.loss two-noise"
            )

    def check_schedule(self, ends_in_nothing: bool) -> None:
        """Raise ValueError if the target says nothing of the picture where nothing of it is left."""
        if ends_in_nothing and self.target not in ("x_0", "v"):
            raise ValueError(
                f"fit.objective.target is {self.target}; where nothing of the picture is left, ε says nothing of it: "
                "with schedule.zero_terminal_snr take fit.objective.target v"
            )


def reconstruction_loss(
    eps_theta: EpsTheta, x_0: Tensor, t: Tensor, eps_bar: Tensor, eps_t: Tensor, schedule: Schedule
) -> Tensor:
    """‖x_{t-1} - μ(x_t)‖², μ(x_t) = (x_t - β_t ε_θ)/α_t: how well one step is rebuilt. float [B].

    It is β_t²/α_t² times :func:`two_noise_loss`.
    """
    before = demolish(x_0, t - 1, eps_bar, schedule)  # x_{t-1}
    x_t = demolish_step(before, t, eps_t, schedule)
    alpha, beta = at(schedule.alpha, t, x_t), at(schedule.beta, t, x_t)
    mu = (x_t - beta * in_the_articles_scale(eps_theta(x_t, t), t, schedule)) / alpha
    return _mean_square(before - mu)


def two_noise_loss(
    eps_theta: EpsTheta, x_0: Tensor, t: Tensor, eps_bar: Tensor, eps_t: Tensor, schedule: Schedule
) -> Tensor:
    """‖ε_t - ε_θ(ᾱ_t x_0 + α_t β̄_{t-1} ε̄_{t-1} + β_t ε_t, t)‖², before the second noise is integrated out. float [B].

    Its expectation over the noise is β_t²/β̄_t² times that of the reduced loss, plus α_t² β̄_{t-1}²/β̄_t².
    """
    x_t = demolish_step(demolish(x_0, t - 1, eps_bar, schedule), t, eps_t, schedule)
    return _mean_square(eps_t - in_the_articles_scale(eps_theta(x_t, t), t, schedule))


def reduced_loss(eps_theta: EpsTheta, x_0: Tensor, t: Tensor, eps: Tensor, schedule: Schedule) -> Tensor:
    """‖ε - ε̂(ᾱ_t x_0 + β̄_t ε, t)‖², the article's last loss: ‖ε - (β̄_t/β_t) ε_θ‖² in its own scale. float [B]."""
    return _mean_square(eps - eps_theta(demolish(x_0, t, eps, schedule), t))


def target_loss(network: Network, target: Target, x_0: Tensor, t: Tensor, eps: Tensor, schedule: Schedule) -> Tensor:
    """The reduced loss in the units of what the network puts out, of ε for the article's. float [B].

    ‖ε - ε̂‖² is SNR_t times the error of x_0 and ᾱ_t² times that of v.
    """
    if target == "x_0":
        goal = x_0
    elif target == "v":
        goal = at(schedule.alpha_bar, t, x_0) * eps - at(schedule.beta_bar, t, x_0) * x_0
    else:
        return reduced_loss(as_eps(network, target, schedule), x_0, t, eps, schedule)
    return _mean_square(goal - network(demolish(x_0, t, eps, schedule), t))


def training_loss(
    config: ObjectiveConfig,
    network: Network,
    x_0: Tensor,
    t: Tensor,
    noise: Callable[[str], Tensor],
    schedule: Schedule,
) -> Tensor:
    """Return the configured loss of each image, weighted: float [B].

    Args:
        config: which loss, target and weight.
        network: puts out the configured target.
        x_0: float [B, C, H, W].
        t: int64 [B].
        noise: standard normals like x_0, by the name of their stream: ``eps``, and ``eps_t`` if there are two.
        schedule: the whole schedule.
    """
    if config.loss == "reduced":
        losses = target_loss(network, config.target, x_0, t, noise("eps"), schedule)
        units: Target = config.target
    else:
        form = two_noise_loss if config.loss == "two-noise" else reconstruction_loss
        eps_theta = as_eps(network, config.target, schedule)
        losses = form(eps_theta, x_0, t, noise("eps"), noise("eps_t"), schedule)
        units = "eps"
    if config.weight == "simple":
        return losses
    return losses * weights(config.weight, units, schedule, config.gamma).to(losses.device)[t].to(losses.dtype)


def weights(kind: Weight, units: Target, schedule: Schedule, gamma: float = 5.0) -> Tensor:
    """Return what the error of a target, in its own units, weighs at each t: float64 [T+1], 0 at t = 0.

    ``article`` is β_t²/α_t² on ‖ε - ε̂‖², and ``min-snr`` is min(SNR_t, γ) on ‖x_0 - x̂_0‖²; both are carried over into
    the units of the target.
    """
    snr = schedule.log_snr.exp()
    # ‖ε - ε̂‖² = per_unit · (the error in the units of the target)
    per_unit = {"x_0": snr, "v": schedule.alpha_bar.square()}.get(units, torch.ones_like(snr))
    weight = {
        "simple": torch.ones_like(snr),
        "article": (schedule.beta / schedule.alpha).square() * per_unit,
        "min-snr": snr.clamp(max=gamma) / snr * per_unit,
    }[kind]
    return torch.where(schedule.time > 0, weight, 0.0)


def as_eps(network: Network, target: Target, schedule: Schedule) -> EpsTheta:
    """Return the ε̂ that a network implies whose output is the target. ``schedule`` is the whole one, of 1..T."""
    if target == "eps":
        return network
    convert = {"x_0": eps_from_x_0, "v": eps_from_v, "article": _eps_from_article}[target]
    return partial(_converted, network, convert, schedule)


def in_the_articles_scale(eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """ε_θ = (β_t/β̄_t) ε̂: the article's scale of the network, from the paper's."""
    return at(schedule.beta, t, eps) / at(schedule.beta_bar, t, eps) * eps


def _eps_from_article(x_t: Tensor, t: Tensor, eps_theta: Tensor, schedule: Schedule) -> Tensor:
    return at(schedule.beta_bar, t, x_t) / at(schedule.beta, t, x_t) * eps_theta


def _converted(
    network: Network,
    convert: Callable[[Tensor, Tensor, Tensor, Schedule], Tensor],
    schedule: Schedule,
    x_t: Tensor,
    t: Tensor,
) -> Tensor:
    return convert(x_t, t, network(x_t, t), schedule)


def _mean_square(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(1)
