"""Averages of the weights along the run: what samples are drawn from. Time is counted in images.

The exponential one has a half-life and a warm-up. The power-function ones (Karras et al., "Analyzing and Improving the
Training Dynamics of Diffusion Models", https://arxiv.org/abs/2312.02696) keep their shape as the run grows: at t
images, with θ(τ) the weights that the step over image τ led to,

    θ̄(t) = ∫ p_t(τ) θ(τ) dτ,   p_t(τ) = (γ+1) τ^γ / t^(γ+1) on [0, t]
    mean of p_t: t (γ+1)/(γ+2)   standard deviation: σ_rel t,   σ_rel² = (γ+1)/((γ+2)²(γ+3))
    step of B images to n: θ̄ ← k θ̄ + (1-k) θ,   k = (1 - B/n)^(γ+1)

The average of any width at any time is then a weighted sum Σ c_i θ̄_i of stored ones, whose profiles make up the wanted
one: c minimises ∫ (p - Σ c_i p_i)² where Σ c_i = 1. With s ≤ t the times of two profiles, and γ_t that of the later,

    ∫ p_a p_b = (γ_a+1)(γ_b+1)/(γ_a+γ_b+1) · (s/t)^γ_t / t
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

WIDEST = 12**-0.5
"""The σ_rel of the plain mean, γ = 0."""


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Averages whose length is counted in images, so that it does not change with the batch."""

    half_life_images: float = 50_000
    """Images after which a weight's share in the exponential average has halved."""
    warm_up: float = 0.1
    """The half-life is never longer than this share of the images seen, so that early weights are forgotten."""
    power_stds: tuple[float, ...] = ()
    """Widths σ_rel of power-function averages that are tracked beside the exponential one, such as 0.05 0.10; from
    their snapshots any width can be made afterwards."""

    def __post_init__(self) -> None:
        for name, way_out in (("half_life_images", "50000"), ("warm_up", "0.1")):
            if not getattr(self, name) > 0:
                raise ValueError(f"fit.ema.{name} is {getattr(self, name)}; it must be positive: try {way_out}")
        for std in self.power_stds:
            check_std("fit.ema.power_stds", std)
        if len(self.power_stds) == 1 or len(set(self.power_stds)) < len(self.power_stds):
            raise ValueError(
                f"fit.ema.power_stds is {self.power_stds}; other widths are made from two or more that differ: try "
                "0.05 0.10, or none"
            )


class EMA:
    """The averages of a model's parameters. Buffers are not averaged: the networks here have none.

    The shadow of each parameter keeps its shape, dtype, device and sharding.
    """

    def __init__(self, model: nn.Module, config: EMAConfig) -> None:
        self.config = config
        self.shadow = _copy(model)
        self.power: dict[str, dict[str, Tensor]] = {str(std): _copy(model) for std in config.power_stds}

    @torch.no_grad()
    def update(self, model: nn.Module, images_seen: int, batch_images: int) -> None:
        """Move the averages after an optimizer step of ``batch_images`` that took the run to ``images_seen``."""
        assert 0 < batch_images <= images_seen, (batch_images, images_seen)
        half_life = min(self.config.half_life_images, self.config.warm_up * images_seen)
        _move(self.shadow, model, keep=0.5 ** (batch_images / half_life))
        for std, shadow in self.power.items():
            _move(shadow, model, keep=(1 - batch_images / images_seen) ** (gamma_of(float(std)) + 1))

    @torch.no_grad()
    def distance(self, model: nn.Module) -> float:
        """Return ‖θ - θ̄‖ / ‖θ‖, how far the weights are from their exponential average. (all ranks)

        Small while the average follows: it then says little that the weights do not. 0 if all weights are 0.
        """
        pairs = [(p.detach(), self.shadow[name]) for name, p in model.named_parameters()]
        apart = _norm([torch.linalg.vector_norm(own - average) for own, average in pairs])  # one difference at a time
        whole = _norm([torch.linalg.vector_norm(own) for own, _ in pairs])
        return apart / whole if whole else 0.0

    @contextmanager
    def applied_to(self, model: nn.Module, average: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Within this context the model's weights are an average, the exponential one unless another is given.

        Afterwards they are its own again.
        """
        own = _copy(model)
        _fill(model, self.shadow if average is None else average)
        try:
            yield
        finally:
            _fill(model, own)


def _norm(norms: Sequence[Tensor]) -> float:
    """Return the norm of vectors laid end to end, of their norms."""
    norm = torch.linalg.vector_norm(torch.stack(list(norms)))
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def gamma_of(std: float) -> float:
    """Return the γ > 0 of a width σ_rel.

    With u = γ+2 and s = 1/σ_rel² it is the largest of the three roots of u³ + u² - s u + s = 0, in closed form: Viète's
    cosine for v³ - p v + q = 0, v = u + 1/3.
    """
    check_std("std", std)
    s = std**-2
    p, q = s + 1 / 3, 4 * s / 3 + 2 / 27
    radius = 2 * math.sqrt(p / 3)
    return radius * math.cos(math.acos(-3 * q / (p * radius)) / 3) - 7 / 3


def coefficients(snapshots: Sequence[tuple[int, float]], images: int, std: float) -> Tensor:
    """Return c, the share of each snapshot in the average of width ``std`` at ``images``: float64 [n], of sum 1.

    It is most exact at the time of a snapshot. Elsewhere the snapshots that came later help, so give all of them.

    Args:
        snapshots: the images and the σ_rel of each, of two widths at least, in any order.
        images: the time of the wanted average, 1 up to that of the last snapshot.
        std: its σ_rel.
    """
    _check_snapshots(snapshots, images)
    t = torch.tensor([at for at, _ in snapshots], dtype=torch.float64)  # [n]
    gamma = torch.tensor([gamma_of(width) for _, width in snapshots], dtype=torch.float64)  # [n]
    A = _inner(t, gamma, t, gamma)  # [n, n]
    b = _inner(t, gamma, t.new_tensor([images]), t.new_tensor([gamma_of(std)]))[:, 0]  # [n]
    # Profiles of neighbours are nearly one: the condition of A grows with n⁴. So they are brought to norm 1, directions
    # below the rounding are left out, and no inverse is ever formed, which would lose half of the digits.
    norm = A.diagonal().sqrt()
    sides = torch.stack([b, torch.ones_like(b)], dim=1) / norm[:, None]  # [n, 2]
    free, ones = torch.linalg.lstsq(A / norm / norm[:, None], sides, driver="gelsd").solution.T / norm
    # A c = b + μ 1, with the μ at which the sum is 1: weights that stood still come out as they are.
    c: Tensor = free + ones * (1 - free.sum()) / ones.sum()
    return c


@torch.no_grad()
def reconstruct(snapshots: Iterable[Mapping[str, Tensor]], shares: Tensor) -> dict[str, Tensor]:
    """Return Σ c_i θ̄_i, summed in float64 and then of the snapshots' dtype and sharding.

    Args:
        snapshots: tensors by name, in the order of the shares; one at a time is held.
        shares: c from :func:`coefficients`, [n].
    """
    total: dict[str, Tensor] = {}
    left = shares.tolist()
    for snapshot in snapshots:
        if not left:
            raise ValueError(f"there are more than {len(shares)} snapshots; give just those that the shares are of")
        if not total:
            dtypes = {name: value.dtype for name, value in snapshot.items()}
            total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in snapshot.items()}
        _add(total, snapshot, left.pop(0))
        del snapshot  # before the next one is read
    if left:
        raise ValueError(f"{len(left)} of the {len(shares)} snapshots are missing; give all that the shares are of")
    return {name: value.to(dtypes[name]) for name, value in total.items()}


def _add(total: dict[str, Tensor], snapshot: Mapping[str, Tensor], share: float) -> None:
    if differing := snapshot.keys() ^ total.keys():
        raise ValueError(f"the snapshots are not of one network: {min(differing)!r} is in some and not in others")
    for name, value in snapshot.items():
        total[name].add_(value, alpha=share)


def _inner(s: Tensor, a: Tensor, t: Tensor, b: Tensor) -> Tensor:
    """∫ p_a p_b of each pair of profiles, [n, m]: times ``s`` and γ ``a``, [n], with times ``t`` and γ ``b``, [m]."""
    s, a = s[:, None], a[:, None]
    early, late = torch.minimum(s, t), torch.maximum(s, t)
    return (a + 1) * (b + 1) / (a + b + 1) * (early / late) ** torch.where(s > t, a, b) / late


def check_std(name: str, std: float) -> None:
    """Raise ValueError, with the name of the field, unless an average can be of this width."""
    if not 0 < std < WIDEST:
        raise ValueError(
            f"{name} is {std}; a width σ_rel must be above 0 and below 1/√12 = 0.2887, that of the plain mean: try 0.10"
        )


def _check_snapshots(snapshots: Sequence[tuple[int, float]], images: int) -> None:
    for at, _ in snapshots:
        if at < 1:
            raise ValueError(f"a snapshot is of {at} images; before the first image there is no average: leave it out")
    if len({width for _, width in snapshots}) < 2:
        raise ValueError(
            f"there are {len(snapshots)} snapshots of less than two widths; other widths are made from two or more "
            "that differ: train with fit.ema.power_stds 0.05 0.10"
        )
    last = max(at for at, _ in snapshots)
    if not 1 <= images <= last:
        raise ValueError(f"images is {images}; an average can be made at 1 up to the last snapshot: try {last}")


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def _fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.copy_(values[name])


def _move(shadow: dict[str, Tensor], model: nn.Module, keep: float) -> None:
    torch._foreach_lerp_(list(shadow.values()), [p.detach() for p in model.parameters()], 1 - keep)
