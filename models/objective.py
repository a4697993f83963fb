"""What is minimised."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from models.process import demolish
from models.schedule import Schedule

EpsTheta: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""ε̂(x_t, t): float [B, C, H, W] and int64 [B] to float [B, C, H, W]."""


def reduced_loss(eps_theta: EpsTheta, x_0: Tensor, t: Tensor, eps: Tensor, schedule: Schedule) -> Tensor:
    """‖ε - ε̂(ᾱ_t x_0 + β̄_t ε, t)‖², the article's last loss, as a mean over the pixels of each image: float [B].

    In the article's scaling of the network this is ‖ε - (β̄_t/β_t) ε_θ‖².
    """
    x_t = demolish(x_0, t, eps, schedule)
    return (eps - eps_theta(x_t, t)).square().flatten(1).mean(1)
