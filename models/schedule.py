"""The tables of α_t, β_t, ᾱ_t and β̄_t, and the roads from the picture to the noise that they describe."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from models.choice import check_choice

MAX_STEPS = 100_000
MOST_LEFT, LEAST_LEFT = 0.05, 1e-6
"""Bounds of ᾱ_T. Above, x_T is not the noise that building starts from; below, dividing by it ruins float32."""
NOTHING_LEFT = 2.0**-12
"""ᾱ_T of a schedule of zero terminal SNR, an SNR of 2⁻²⁴. A true zero could not be divided by: x̂_0 would be lost."""

Kind: TypeAlias = Literal["article", "linear", "cosine", "constant", "given"]
Spacing: TypeAlias = Literal["even", "rising", "quadratic", "log-snr"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How a picture is demolished. What is called beta in the DDPM paper is β_t² here."""

    kind: Kind = "article"
    """α_t = √(1 - rate · t/T) of the article; β_t² that rises in a line from rate/200 to rate, as in the DDPM paper;
    ᾱ_t² that falls like a squared cosine; the same α_t at each t, which ends where the article's does; or given."""
    T: int = 1000
    """Steps of demolition. More steps make x_t and x_{t-1} more alike."""
    rate: float = 0.02
    """β_T² of the kinds article and linear, twice the β_t² of the kind constant; the others have no use for it."""
    betas: tuple[float, ...] = ()
    """β_1² .. β_T², for the kind given."""
    zero_terminal_snr: bool = False
    """Stretch ᾱ so that nothing of the picture is left at T (Lin et al., 2024). Needs the target v or x_0."""

    def __post_init__(self) -> None:
        check_choice("schedule.kind", self.kind, Kind)
        if not 1 <= self.T <= MAX_STEPS:
            raise ValueError(f"schedule.T is {self.T}; it must lie in 1..{MAX_STEPS}: try 1000")
        if not 0 < self.rate < 1:
            raise ValueError(f"schedule.rate is {self.rate}; it must lie between 0 and 1: try 0.02")
        if (self.kind == "given") != bool(self.betas):
            raise ValueError(
                f"schedule.betas has {len(self.betas)} values and schedule.kind is {self.kind}; betas go with the kind "
                "given, and only with it"
            )
        if self.betas and len(self.betas) != self.T:
            raise ValueError(
                f"schedule.T is {self.T}; schedule.betas has {len(self.betas)} values, one for each t: give "
                f"schedule.T {len(self.betas)}"
            )
        for t, beta in enumerate(self.betas, start=1):
            if not 0 < beta < 1:
                raise ValueError(f"schedule.betas has {beta} at t = {t}; each must lie between 0 and 1")
        left = float(self.tables().alpha_bar[-1])
        if not LEAST_LEFT <= left <= MOST_LEFT:
            raise ValueError(self._wrong_end(left))

    def _wrong_end(self, left: float) -> str:
        rate = (
            f"try {min(20 / self.T, 0.95):.2g}" if self.T >= 8 else "take schedule.T 8 or more"
        )  # fewer need other rates
        what, way_out = {
            "cosine": (f"schedule.T is {self.T} and schedule.kind cosine", "take fewer steps"),
            "given": ("schedule.betas ends at the wrong place", f"{'raise' if left > MOST_LEFT else 'lower'} them"),
        }.get(self.kind, (f"schedule.rate is {self.rate}", rate))
        return (
            f"{what}; with schedule.T = {self.T} it leaves ᾱ_T = {left:.2g} of the picture at the end, and building "
            f"starts from pure noise: ᾱ_T must lie in {LEAST_LEFT}..{MOST_LEFT}; {way_out}"
        )

    def tables(self) -> "Schedule":
        """Return the tables that this describes."""
        make: dict[Kind, Callable[[], Schedule]] = {
            "article": lambda: article(self.T, self.rate),
            "linear": lambda: linear(self.T, self.rate),
            "cosine": lambda: cosine(self.T),
            "constant": lambda: constant(self.T, self.rate),
            "given": lambda: given(self.betas),
        }
        schedule = make[self.kind]()
        return zero_terminal_snr(schedule) if self.zero_terminal_snr else schedule


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

    @property
    def log_snr(self) -> Tensor:
        """log(ᾱ_t²/β̄_t²), float64 [S+1]; infinite at 0."""
        return 2 * (self.log_alpha_bar - self.beta_bar.log())

    def to(self, device: torch.device) -> "Schedule":
        """Return the tables on a device, so that :func:`at` has nothing to move there."""
        return Schedule(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def respaced(self, steps: int, spacing: Spacing = "even") -> "Schedule":
        """Return the schedule that walks the same road in fewer strides: S = ``steps`` of the T.

        ᾱ at the chosen t stays what it was; α_t and β_t become those of one stride, ᾱ_t/ᾱ_s and √(1 - α²).

        Args:
            steps: strides, 1 <= steps <= S.
            spacing: ``even`` in t; ``quadratic``, t ∝ i² (the DDIM paper's for CIFAR-10); ``rising``, t ∝ i^1.5,
                between the two; or even in ``log-snr`` down to t = 1 (the DPM-Solver paper's).

        Raises:
            ValueError: if there are not as many steps, or for another spacing.
        """
        if not 1 <= steps <= self.steps:
            raise ValueError(f"steps is {steps}; it must lie in 1..{self.steps}, the steps of the schedule")
        chosen = distinct(self._spaced(steps, spacing).round().long(), self.steps)
        return _from_log_alpha_bar(self.log_alpha_bar[chosen], self.time[chosen])

    def _spaced(self, steps: int, spacing: Spacing) -> Tensor:
        """Return where the strides would end if they could end between indices: float64 [steps+1]."""
        check_choice("spacing", spacing, Spacing)
        share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        power = {"even": 1.0, "rising": 1.5, "quadratic": 2.0}
        if spacing in power:
            return share ** power[spacing] * self.steps
        falling = self.log_snr[1:]
        wanted = torch.linspace(float(falling[0]), float(falling[-1]), steps, dtype=torch.float64)
        if steps == 1:
            wanted = falling[-1:]
        return torch.cat([share[:1], 1 + _where(falling, wanted)])


def distinct(rising: Tensor, last: int) -> Tensor:
    """Move integers 0 <= … <= last (int64 [n]), where some are alike, apart by as little as makes all differ."""
    i = torch.arange(len(rising))
    apart = (rising - i).cummax(0).values + i
    return torch.minimum(apart, last - (len(rising) - 1) + i)


def _where(falling: Tensor, wanted: Tensor) -> Tensor:
    """Return the index, with its fraction, at which a falling table has the wanted values."""
    above = (torch.searchsorted(-falling, -wanted) - 1).clamp(0, max(len(falling) - 2, 0))
    below = (above + 1).clamp(max=len(falling) - 1)
    drop = falling[above] - falling[below]
    return above + torch.where(drop > 0, (falling[above] - wanted) / drop, 0.0)


def article(T: int = 1000, rate: float = 0.02) -> Schedule:
    """α_t = √(1 - 0.02 t/T), the article's schedule. For T = 1000, ᾱ_T = 0.006482."""
    t = torch.arange(T + 1, dtype=torch.float64)
    return _from_beta_squared(rate * t[1:] / T)


def linear(T: int = 1000, rate: float = 0.02) -> Schedule:
    """β_t² from rate/200 to rate in a line: the DDPM paper's own, whose betas run from 10⁻⁴ to 0.02 for T = 1000."""
    return _from_beta_squared(torch.linspace(rate / 200, rate, T, dtype=torch.float64))


def constant(T: int = 1000, rate: float = 0.02) -> Schedule:
    """β_t² = ½ rate (T+1)/T at every t: the sum of the article's, so about as little is left at the end.

    The article asks why α_t should fall. With this one the picture is torn down fastest where it is still a picture.
    """
    return _from_beta_squared(torch.full((T,), rate / 2 * (T + 1) / T, dtype=torch.float64))


def cosine(T: int = 1000, offset: float = 0.008) -> Schedule:
    """ᾱ_t² = f(t)/f(0), f(t) = cos²(π/2 · (t/T + s)/(1 + s)), β_t² <= 0.999 (Nichol and Dhariwal, 2021)."""
    t = torch.arange(T + 1, dtype=torch.float64)
    f = (math.pi / 2 * (t / T + offset) / (1 + offset)).cos().square()
    return _from_beta_squared((1 - f[1:] / f[:-1]).clamp(max=0.999))


def rate_that_leaves(kind: Literal["article", "linear", "constant"], T: int, alpha_bar_T: float) -> float:
    """Return the rate with which a schedule of T steps ends at ᾱ_T, so that schedules of any T tear down as much.

    Raises:
        ValueError: if no rate below 1 tears down as much in so few steps.
    """
    make = {"article": article, "linear": linear, "constant": constant}[kind]
    low, high = 0.0, min(1.0, 2 * T / (T + 1)) * (1 - 1e-12)
    if float(make(T, high).log_alpha_bar[-1]) > math.log(alpha_bar_T):
        raise ValueError(f"schedule.T is {T}; {kind} cannot tear down to ᾱ_T = {alpha_bar_T:.3g} in so few steps")
    while (middle := (low + high) / 2) not in (low, high):  # ᾱ_T falls as the rate rises
        low, high = (low, middle) if make(T, middle).log_alpha_bar[-1] < math.log(alpha_bar_T) else (middle, high)
    return high


def given(betas: Sequence[float]) -> Schedule:
    """β_t² as given for t = 1..T: what the DDPM paper and `diffusers` call betas."""
    return _from_beta_squared(torch.tensor(betas, dtype=torch.float64))


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Stretch ᾱ linearly so that ᾱ_T is nothing and ᾱ_1 stays (Lin et al., 2024, algorithm 1).

    Nothing is :data:`NOTHING_LEFT`. A schedule of one step only has no ᾱ_1 to keep: all of it becomes nothing.

    Raises:
        ValueError: if as little as that is left at t = 1 already.
    """
    alpha_bar = schedule.alpha_bar[1:]
    first, last = alpha_bar[0], alpha_bar[-1]
    if schedule.steps > 1 and first <= NOTHING_LEFT:
        raise ValueError(
            f"schedule.betas leaves ᾱ_1 = {float(first):.2g} of the picture after one step; with "
            f"schedule.zero_terminal_snr it must be more than the {NOTHING_LEFT:.2g} of the end: lower its first value"
        )
    if schedule.steps > 1:
        stretched = NOTHING_LEFT + (alpha_bar - last) * (first - NOTHING_LEFT) / (first - last)
    else:
        stretched = torch.full_like(alpha_bar, NOTHING_LEFT)
    return _from_log_alpha_bar(torch.cat([schedule.log_alpha_bar[:1], stretched.log()]), schedule.time)


def _from_beta_squared(beta_squared: Tensor) -> Schedule:
    log_alpha = 0.5 * torch.log1p(-beta_squared)
    log_alpha_bar = torch.cat([torch.zeros(1, dtype=torch.float64), log_alpha.cumsum(0)])
    return _from_log_alpha_bar(log_alpha_bar, torch.arange(len(log_alpha_bar)))


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
