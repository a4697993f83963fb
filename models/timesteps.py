"""How t is drawn: one t per image, a function of (seed, position), the same on any number of workers.

A number u in [0, 1) belongs to each position; t is where u falls in the distribution of t. Integers throughout, so t
is the same on every device. ``loss-aware`` alone also depends on the losses of the batches before: on any workers up to
the rounding of those losses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from models.choice import check_choice
from models.noise import words
from models.schedule import Schedule

Kind: TypeAlias = Literal["stratified", "uniform", "loss-aware", "log-snr-normal"]
REMEMBERED_LOSSES = 10
"""Observations of a t that its second moment remembers; and how many each t must have before the moments are used."""
UNIFORM_SHARE = 0.01
"""Part of the loss-aware draws that is uniform, so that no weight exceeds 100."""
LARGEST = 2.0**10
"""Of the squared losses that are told apart: a loss above 32, or one that is not a number, counts as 32. The weights
stay what they must be for an unbiased mean; only the variance is then not the least."""


@dataclass(frozen=True, kw_only=True)
class TimestepConfig:
    """How t is drawn."""

    kind: Kind = "stratified"
    """Evenly over 1..T in each global batch; independently (uniform); often where the loss is large, and weighted so
    that its mean stays what it is (loss-aware); or so that the log of the SNR is normal, which weighs the middle."""
    log_snr_mean: float = 2.4
    """Of log-snr-normal. As in EDM, whose ln σ has the mean -1.2 and the deviation 1.2, and log SNR = -2 ln σ."""
    log_snr_std: float = 2.4
    """Of log-snr-normal."""

    def __post_init__(self) -> None:
        check_choice("fit.timesteps.kind", self.kind, Kind)
        if not self.log_snr_std > 0:
            raise ValueError(f"fit.timesteps.log_snr_std is {self.log_snr_std}; it must be positive: try 2.4")

    def check_schedule(self, schedule: Schedule) -> None:
        """Raise ValueError if the schedule does not reach where t is to be drawn."""
        if self.kind == "log-snr-normal":
            log_snr_normal(schedule, self.log_snr_mean, self.log_snr_std)


class Timesteps:
    """Draws t for the positions of a run, and learns from the losses where it is told to.

    ``state`` is what a checkpoint must hold: empty, but for ``loss-aware``.
    """

    def __init__(self, config: TimestepConfig, schedule: Schedule, batch_images: int, device: torch.device) -> None:
        self.config, self.T, self.batch_images = config, schedule.steps, batch_images
        self.state: dict[str, Tensor] = {}
        self._edges: Tensor | None = None  # int64 [T], where each t ends on the way from 0 to 2³²; None: evenly
        if config.kind == "loss-aware":
            self.state = {
                "second_moment": torch.zeros(self.T, dtype=torch.float64, device=device),
                "seen": torch.zeros(self.T, dtype=torch.int64, device=device),
            }
            self._observed = torch.zeros(2, self.T, dtype=torch.int64, device=device)  # Σ loss² in fixed point, count
            # Sums of integers do not depend on who adds first. Of this scale, a batch of the largest losses at one t
            # does not overflow, and losses down to 10⁻⁶ are told from 0 as long as the batch is below 4,096 images.
            self._scale = 2.0 ** min(40, 62 - 10 - batch_images.bit_length())
        elif config.kind == "log-snr-normal":
            self._edges = edges(log_snr_normal(schedule, config.log_snr_mean, config.log_snr_std)).to(device)

    def draw(self, seed: int, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return t in 1..T and its weight in the loss, int64 [B] and float64 [B], for each position (int64 [B]).

        The weight makes the mean over the draws an unbiased estimate of the mean over 1..T; where another
        distribution is what was asked for, and where t is uniform, it is 1.
        """
        if self.config.kind == "uniform":
            return uniform(seed, position, self.T), torch.ones_like(position, dtype=torch.float64)
        if self._edges is None:
            t = stratified(seed, position, self.batch_images, self.T)
            return t, torch.ones_like(position, dtype=torch.float64)
        t = stratified_by(self._edges, seed, position, self.batch_images)
        if self.config.kind == "log-snr-normal":
            return t, torch.ones_like(position, dtype=torch.float64)
        return t, 1 / (self.T * probabilities(self._edges)[t - 1])

    def observe(self, t: Tensor, losses: Tensor) -> None:
        """Take note of the losses of a micro-batch, float [B], before any weight of :meth:`draw`."""
        if self.config.kind == "loss-aware":
            squared = losses.detach().double().square().nan_to_num(nan=LARGEST).clamp(max=LARGEST)
            squared = (squared * self._scale).round().long()
            self._observed.index_add_(1, t - 1, torch.stack([squared, torch.ones_like(squared)]))

    def learn(self, total: Callable[[Tensor], Tensor]) -> None:
        """Fold what all workers observed since the last time into the state. (all ranks)

        Args:
            total: the sum of an int64 tensor over all workers.
        """
        if self.config.kind != "loss-aware":
            return
        squared, count = total(self._observed)
        moment, seen = self.state["second_moment"], self.state["seen"]
        seen += count
        mean = squared.double() / (self._scale * count.clamp(min=1))
        share = count.double() / seen.clamp(1, REMEMBERED_LOSSES)  # at first of all seen, then of the last
        moment.lerp_(mean, share.clamp(max=1))
        self._observed.zero_()
        self.refresh()

    def forget(self) -> None:
        """Drop what was observed since the last time."""
        if self.config.kind == "loss-aware":
            self._observed.zero_()

    def refresh(self) -> None:
        """Find the distribution of t again after ``state`` was loaded."""
        if not self.state:
            return
        self._edges = None
        if int(self.state["seen"].min()) >= REMEMBERED_LOSSES:
            # The distribution of least variance of the loss is ∝ √E[loss²] (Nichol and Dhariwal, 2021).
            moment = self.state["second_moment"]
            # Even where nothing was lost; and on the CPU, where sums are in order.
            wanted = moment.cpu().sqrt().clamp(min=2.0**-64)
            drawn = edges((1 - UNIFORM_SHARE) * wanted / wanted.sum() + UNIFORM_SHARE / self.T)
            self._edges = drawn.to(moment.device)


def uniform(seed: int, position: Tensor, T: int) -> Tensor:
    """Return t in 1..T for each position (int64 [B]), each drawn for itself."""
    return 1 + (_word(seed, position) * T >> 32)


def stratified(seed: int, position: Tensor, batch_images: int, T: int) -> Tensor:
    """Return t in 1..T for each position (int64 [B]), so that every global batch covers 1..T evenly.

    The ``batch_images`` slots of global batch s are dealt the strata 0..batch_images-1 by a permutation drawn for s;
    within its stratum t is uniform. A worker computes the slots that it was given, without asking anyone.
    ``batch_images`` and ``T`` are below 2**31.
    """
    # 1 + ⌊(stratum + u) T/B⌋ for a u of 32 bits in [0, 1).
    return 1 + (_stratum(seed, position, batch_images) * T + (_word(seed, position) * T >> 32)) // batch_images


def stratified_by(edges: Tensor, seed: int, position: Tensor, batch_images: int) -> Tensor:
    """Return t in 1..T for each position (int64 [B]), so that every global batch covers a distribution evenly.

    ``edges`` (int64 [T]) says where each t ends on the way from 0 to 2³²; ``batch_images`` is below 2**31.
    """
    u = (_stratum(seed, position, batch_images) << 32) + _word(seed, position)  # of batch_images · 2³²
    return 1 + torch.searchsorted(edges * batch_images, u, right=True)


def edges(probability: Tensor) -> Tensor:
    """Return where each t ends on the way from 0 to 2³², int64 [T], for probabilities float64 [T]."""
    reached = probability.cumsum(0)
    return (reached / reached[-1] * 2.0**32).round().long()


def probabilities(edges: Tensor) -> Tensor:
    """Return the probabilities that edges really give, float64 [T]."""
    return edges.diff(prepend=edges.new_zeros(1)).double() * 2.0**-32


def log_snr_normal(schedule: Schedule, mean: float, std: float) -> Tensor:
    """Return the probability of each t, float64 [T], that makes log(ᾱ_t²/β̄_t²) normal within the range it has.

    Raises:
        ValueError: if next to nothing of that distribution lies within the range.
    """
    log_snr = schedule.log_snr[1:]  # falls
    between = (log_snr[1:] + log_snr[:-1]) / 2
    ends = torch.cat([log_snr[:1], between, log_snr[-1:]])
    probability: Tensor = torch.special.ndtr((ends[:-1] - mean) / std) - torch.special.ndtr((ends[1:] - mean) / std)
    if not probability.sum() > 1e-3:
        raise ValueError(
            f"fit.timesteps.log_snr_mean is {mean} and fit.timesteps.log_snr_std {std}; next to nothing of that lies "
            f"in the schedule's range of log SNR, {float(ends[-1]):.1f}..{float(ends[0]):.1f}: try 2.4 and 2.4"
        )
    return probability


def _word(seed: int, position: Tensor) -> Tensor:
    """Return 32 random bits for each position: int64 [B]."""
    return words(seed, "t", position, step=0, blocks=1)[0][:, 0]


def _stratum(seed: int, position: Tensor, batch_images: int) -> Tensor:
    """Return the stratum that each position was dealt within its global batch: int64 [B]."""
    batch, slot = position // batch_images, position % batch_images
    stratum = torch.empty_like(slot)
    for s in torch.unique(batch):
        here = batch == s
        stratum[here] = _strata(seed, s.view(1), batch_images)[slot[here]]
    return stratum


def _strata(seed: int, batch: Tensor, batch_images: int) -> Tensor:
    """Return the stratum of each slot of a global batch (int64 [1]): the order of random words, int64 [B]."""
    drawn = words(seed, "strata", batch, step=0, blocks=-(-batch_images // 4))  # four of [1, blocks]
    return torch.stack(drawn, dim=-1).flatten()[:batch_images].argsort(stable=True)
