"""The tables of α_t, β_t, ᾱ_t and β̄_t."""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STEPS = 100_000
MOST_LEFT, LEAST_LEFT = 0.05, 1e-6
"""Bounds of ᾱ_T. Above, x_T is not the noise that building starts from; below, dividing by it ruins float32."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The article's schedule, α_t = √(1 - rate · t/T)."""

    T: int = 1000
    """Steps of demolition. More steps make x_t and x_{t-1} more alike."""
    rate: float = 0.02
    """β_T²; each step's β_t² grows linearly up to it."""

    def __post_init__(self) -> None:
        if not 1 <= self.T <= MAX_STEPS:
            raise ValueError(f"schedule.T is {self.T}; it must lie in 1..{MAX_STEPS}: try 1000")
        if not 0 < self.rate < 1:
            raise ValueError(f"schedule.rate is {self.rate}; it must lie between 0 and 1: try 0.02")
        left = float(article(self.T, self.rate).alpha_bar[-1])
        if not LEAST_LEFT <= left <= MOST_LEFT:
            raise ValueError(
                f"schedule.rate is {self.rate}; with schedule.T = {self.T} it leaves ᾱ_T = {left:.2g} of the picture "
                f"at the end, and building starts from pure noise: ᾱ_T must lie in {LEAST_LEFT}..{MOST_LEFT}; try "
                f"{min(20 / self.T, 0.95):.2g}"
            )


@dataclass(frozen=True)
class Schedule:
    """Float64 tables of shape [S+1], index 0 being the clean image.

    ``time[i]`` is the t that the network is told at index i: i itself on the whole schedule, S = T, and a chosen few
    of 1..T on a respaced one.
    """

    alpha: Tensor
    beta: Tensor
    alpha_bar: Tensor
    beta_bar: Tensor
    log_alpha_bar: Tensor
    time: Tensor

    @property
    def steps(self) -> int:
        return len(self.time) - 1

    def respaced(self, steps: int) -> "Schedule":
        """Return the schedule that walks the same road in fewer strides: S = ``steps`` of the T, evenly spaced.

        ᾱ at the chosen t stays what it was; α_t and β_t become those of one stride, ᾱ_t/ᾱ_s and √(1 - α²).

        Raises:
            ValueError: if there are not 1 <= steps <= S.
        """
        if not 1 <= steps <= self.steps:
            raise ValueError(f"steps is {steps}; it must lie in 1..{self.steps}, the steps of the schedule")
        chosen = torch.linspace(0, self.steps, steps + 1, dtype=torch.float64).round().long()
        return _from_log_alpha_bar(self.log_alpha_bar[chosen], self.time[chosen])


def article(T: int = 1000, rate: float = 0.02) -> Schedule:
    """α_t = √(1 - 0.02 t/T), the article's schedule. For T = 1000, ᾱ_T = 0.006482."""
    t = torch.arange(T + 1, dtype=torch.float64)
    log_alpha = 0.5 * torch.log1p(-rate * t / T)
    return _from_log_alpha_bar(log_alpha.cumsum(0), t.long())


def _from_log_alpha_bar(log_alpha_bar: Tensor, time: Tensor) -> Schedule:
    # expm1 keeps all digits of β near t = 0, where 1 - ᾱ² would cancel them.
    log_alpha = log_alpha_bar.diff(prepend=log_alpha_bar[:1])
    return Schedule(
        alpha=log_alpha.exp(),
        beta=(-torch.expm1(2 * log_alpha)).sqrt(),
        alpha_bar=log_alpha_bar.exp(),
        beta_bar=(-torch.expm1(2 * log_alpha_bar)).sqrt(),
        log_alpha_bar=log_alpha_bar,
        time=time,
    )


def at(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """Read a table at t (int64 [B]), in the dtype and on the device of x, shaped to multiply x: [B, 1, 1, 1]."""
    values = table.to(x.device)[t].to(x.dtype)
    return values.view(-1, *[1] * (x.dim() - 1))
