"""Demolition: how a picture x_0 becomes noise, and what a prediction of the noise says about the picture."""

from torch import Tensor

from models.schedule import Schedule, at


def demolish_step(x: Tensor, t: Tensor, eps_t: Tensor, schedule: Schedule) -> Tensor:
    """x_t = α_t x_{t-1} + β_t ε_t: one step. x, eps_t [B, C, H, W]; t [B]."""
    return at(schedule.alpha, t, x) * x + at(schedule.beta, t, x) * eps_t


def demolish(x_0: Tensor, t: Tensor, eps: Tensor, schedule: Schedule) -> Tensor:
    """x_t = ᾱ_t x_0 + β̄_t ε: t steps at once. x_0, eps [B, C, H, W]; t [B]."""
    return at(schedule.alpha_bar, t, x_0) * x_0 + at(schedule.beta_bar, t, x_0) * eps


def x_0_from_eps(x_t: Tensor, t: Tensor, eps: Tensor, schedule: Schedule) -> Tensor:
    """x_0 = (x_t - β̄_t ε)/ᾱ_t, the picture that a prediction of the noise implies."""
    return (x_t - at(schedule.beta_bar, t, x_t) * eps) / at(schedule.alpha_bar, t, x_t)


def eps_from_x_0(x_t: Tensor, t: Tensor, x_0: Tensor, schedule: Schedule) -> Tensor:
    """ε = (x_t - ᾱ_t x_0)/β̄_t, the noise that a picture implies; t >= 1."""
    return (x_t - at(schedule.alpha_bar, t, x_t) * x_0) / at(schedule.beta_bar, t, x_t)


def v_from_eps(x_t: Tensor, t: Tensor, eps: Tensor, schedule: Schedule) -> Tensor:
    """v = ᾱ_t ε - β̄_t x_0 = (ε - β̄_t x_t)/ᾱ_t, the velocity of a picture that turns into noise."""
    return (eps - at(schedule.beta_bar, t, x_t) * x_t) / at(schedule.alpha_bar, t, x_t)


def eps_from_v(x_t: Tensor, t: Tensor, v: Tensor, schedule: Schedule) -> Tensor:
    """ε = ᾱ_t v + β̄_t x_t."""
    return at(schedule.alpha_bar, t, x_t) * v + at(schedule.beta_bar, t, x_t) * x_t


def x_0_from_v(x_t: Tensor, t: Tensor, v: Tensor, schedule: Schedule) -> Tensor:
    """x_0 = ᾱ_t x_t - β̄_t v."""
    return at(schedule.alpha_bar, t, x_t) * x_t - at(schedule.beta_bar, t, x_t) * v
