"""Building: from noise x_T back to a picture x_0, one plain generator for each way.

Every sampler takes the network as a callable ε̂ and yields x at each index of the schedule, from x_T down to x_0, so
that whoever wants the pictures on the way takes them and whoever wants the last takes the last (:func:`build`).
Noise comes from a callable of the step, so that a sample is a function of its seed. Give a respaced schedule to take
fewer, longer strides. x_T and all that is yielded are float [B, C, H, W], of one dtype and on one device.

None of them clips. Where pictures are known to lie in [-1, 1], wrap the network in :func:`clip_x_0`, once, outside.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from models.noise import normal
from models.objective import EpsTheta, Network
from models.process import eps_from_x_0, x_0_from_eps
from models.schedule import Schedule, Spacing

DRAWN_TOGETHER = 1 << 17
"""Numbers of the noise, up to which steps are drawn together."""
Noise: TypeAlias = Callable[[int], Tensor]
"""z at a step (an index of the schedule): float [B, C, H, W], standard normal."""
LabelledNetwork: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A network that is told labels too: int64 [B], -1 for none."""
Sampler: TypeAlias = Callable[[EpsTheta, Tensor, Schedule, Noise], Iterator[Tensor]]


def greedy(eps_theta: EpsTheta, x_T: Tensor, schedule: Schedule, noise: Noise) -> Iterator[Tensor]:
    """σ_t = 0: the most probable step every time. It runs to the mode, so samples are all alike: never score it."""
    return _ancestral(eps_theta, x_T, schedule, noise, sigma=torch.zeros_like(schedule.beta))


def random(eps_theta: EpsTheta, x_T: Tensor, schedule: Schedule, noise: Noise) -> Iterator[Tensor]:
    """σ_t = β_t: put back the variance that the demolition step took out. Exact for data of unit variance.

    The last of this noise stays in the picture: little of it on the whole schedule, plain to see in a few long strides.
    """
    return _ancestral(eps_theta, x_T, schedule, noise, sigma=schedule.beta)


def posterior(eps_theta: EpsTheta, x_T: Tensor, schedule: Schedule, noise: Noise) -> Iterator[Tensor]:
    """σ_t = β_t β̄_{t-1}/β̄_t: the spread of x_{t-1} when x_t and x_0 are known. Exact for data that is one point."""
    return _ancestral(eps_theta, x_T, schedule, noise, sigma=_posterior_sigma(schedule))


def _posterior_sigma(schedule: Schedule) -> Tensor:
    previous = schedule.beta_bar.roll(1)
    return torch.where(schedule.time > 0, schedule.beta * previous / schedule.beta_bar, 0.0)


def _ancestral(eps_theta: EpsTheta, x_T: Tensor, schedule: Schedule, noise: Noise, sigma: Tensor) -> Iterator[Tensor]:
    x = x_T
    yield x
    for i, t in _downwards(schedule, x):
        alpha, beta, beta_bar = float(schedule.alpha[i]), float(schedule.beta[i]), float(schedule.beta_bar[i])
        # x_{t-1} = (x_t - β_t ε_θ)/α_t + σ_t z, where the article's ε_θ is (β_t/β̄_t) ε̂.
        x = (x - beta * (beta / beta_bar * eps_theta(x, t))) / alpha
        if sigma[i] > 0:
            x = x + float(sigma[i]) * noise(i)
        yield x


def ddim(eps_theta: EpsTheta, x_T: Tensor, schedule: Schedule, noise: Noise, eta: float = 0.0) -> Iterator[Tensor]:
    """x_{t-1} = ᾱ_{t-1} x̂_0 + √(β̄_{t-1}² - σ_t²) ε̂ + σ_t z (Song, Meng and Ermon, 2021).

    σ_t is ``eta`` times that of :func:`posterior`: with η = 0 the walk is deterministic, with η = 1 it is posterior's.

    Raises:
        ValueError: unless 0 <= eta <= 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must lie in 0..1: try 0")
    sigma = eta * _posterior_sigma(schedule)
    x = x_T
    yield x
    for i, t in _downwards(schedule, x):
        eps = eps_theta(x, t)
        x_0 = (x - float(schedule.beta_bar[i]) * eps) / float(schedule.alpha_bar[i])
        along = (schedule.beta_bar[i - 1] ** 2 - sigma[i] ** 2).clamp(min=0).sqrt()
        x = float(schedule.alpha_bar[i - 1]) * x_0 + float(along) * eps
        if sigma[i] > 0:
            x = x + float(sigma[i]) * noise(i)
        yield x


def heun(eps_theta: EpsTheta, x_T: Tensor, schedule: Schedule, noise: Noise) -> Iterator[Tensor]:
    """Heun's second-order steps along the probability-flow ODE, d(x/ᾱ)/d(β̄/ᾱ) = ε̂ (Karras et al., 2022).

    Two evaluations of the network a step, but one in the last, which ends where β̄ is 0: 2S - 1 in all. β̄/ᾱ is huge
    where next to nothing of the picture is left (the cosine schedule, zero terminal SNR): a few strides from there
    overshoot, and float32 loses digits (20 strides of the cosine schedule end 0.1 beside the same in float64). Take
    many, or :func:`dpm_solver`.
    """
    x = x_T
    yield x
    ratio = schedule.beta_bar / schedule.alpha_bar
    for i, t in _downwards(schedule, x):
        stride = float(ratio[i - 1] - ratio[i])
        before, alpha_bar = x / float(schedule.alpha_bar[i]), float(schedule.alpha_bar[i - 1])
        slope = eps_theta(x, t)
        x = alpha_bar * (before + stride * slope)
        if i > 1:
            slope = (slope + eps_theta(x, _time(schedule, i - 1, x))) / 2
            x = alpha_bar * (before + stride * slope)
        yield x


def dpm_solver(eps_theta: EpsTheta, x_T: Tensor, schedule: Schedule, noise: Noise) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al., 2022): second order in λ = log(ᾱ/β̄), one evaluation a step, deterministic.

    The first step and the last, where λ_0 is infinite, are of first order; so on times that are even in t the error
    falls with the square of the strides only as far as the last few of them allow.
    """
    lambdas = schedule.log_snr / 2
    x, x_0_before = x_T, None
    yield x
    for i, t in _downwards(schedule, x):
        x_0 = D = (x - float(schedule.beta_bar[i]) * eps_theta(x, t)) / float(schedule.alpha_bar[i])
        if x_0_before is not None and i > 1:
            r = float((lambdas[i] - lambdas[i + 1]) / (lambdas[i - 1] - lambdas[i]))
            D = x_0 + (x_0 - x_0_before) / (2 * r)
        shrink = schedule.beta_bar[i - 1] / schedule.beta_bar[i]
        x = float(shrink) * x + float(schedule.alpha_bar[i - 1] - shrink * schedule.alpha_bar[i]) * D
        x_0_before = x_0
        yield x


SAMPLERS: dict[str, Sampler] = {
    "greedy": greedy,
    "random": random,
    "posterior": posterior,
    "ddim": ddim,
    "dpm-solver": dpm_solver,
    "heun": heun,
}


def clip_x_0(eps_theta: EpsTheta, schedule: Schedule) -> EpsTheta:
    """Wrap ε̂ so that the picture that it implies stays within [-1, 1]. ``schedule`` is the whole one, of 1..T."""

    def clipped(x_t: Tensor, t: Tensor) -> Tensor:
        x_0 = x_0_from_eps(x_t, t, eps_theta(x_t, t), schedule).clamp(-1, 1)
        return eps_from_x_0(x_t, t, x_0, schedule)

    return clipped


def guided(network: LabelledNetwork, label: Tensor, scale: float = 1.0) -> Network:
    """Return the network as it sees pictures of the given labels (int64 [B]), exaggerated by a scale.

    Classifier-free guidance (Ho and Salimans, 2022): F_∅ + scale · (F_label - F_∅), one evaluation on twice the batch;
    with the scale 1 it is F_label itself. Every target is affine in ε, so this may be done before :func:`as_eps`.
    """

    def of_label(x_t: Tensor, t: Tensor) -> Tensor:
        return network(x_t, t, label)

    def exaggerated(x_t: Tensor, t: Tensor) -> Tensor:
        both = network(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([label, torch.full_like(label, -1)]))
        with_label, without = both.chunk(2)
        return without + scale * (with_label - without)

    return of_label if scale == 1 else exaggerated


@torch.no_grad()
def build(sampler: Sampler, eps_theta: EpsTheta, x_T: Tensor, schedule: Schedule, noise: Noise) -> Tensor:
    """Run a sampler to its end and return x_0 [B, C, H, W]."""
    return deque(sampler(eps_theta, x_T, schedule, noise), maxlen=1)[0]


def sample(
    sampler: Sampler,
    eps_theta: EpsTheta,
    schedule: Schedule,
    seeds: Tensor,
    shape: tuple[int, ...],
    steps: int,
    clip: bool = True,
    spacing: Spacing = "even",
) -> Tensor:
    """Build the samples of the given seeds (int64 [n]): float32 [n, *shape]. A sample is its seed, in any batch.

    Args:
        sampler: one of :data:`SAMPLERS`.
        eps_theta: ε̂, such as :func:`models.objective.as_eps` makes of a network.
        schedule: the whole schedule that it was trained on, on the CPU.
        seeds: which samples.
        shape: [C, H, W].
        steps: strides, at most T; the network is evaluated as often, or twice less one by :func:`heun`.
        clip: keep the picture that each prediction implies within [-1, 1].
        spacing: where the strides end (:meth:`Schedule.respaced`).
    """
    x_T, noise = sample_noise(seeds, shape)
    clipped = clip_x_0(eps_theta, schedule.to(x_T.device)) if clip else eps_theta
    return build(sampler, clipped, x_T, schedule.respaced(steps, spacing), noise)


def sample_noise(seeds: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Noise]:
    """Return x_T and the noise of each step for the samples of the given seeds (int64 [n])."""
    # A few small steps are drawn at once: what an operator costs to call is then shared among them.
    together = max(1, DRAWN_TOGETHER // max(1, len(seeds) * math.prod(shape)))

    @functools.lru_cache(maxsize=1)
    def stretch(first: int) -> Tensor:
        step = torch.arange(first, first + together, device=seeds.device)
        drawn = normal(0, "sample z", seeds.repeat(together), shape, step.repeat_interleave(len(seeds))[:, None])
        return drawn.view(together, len(seeds), *shape)

    return normal(0, "sample x_T", seeds, shape), lambda i: stretch(i - i % together)[i % together]


def _downwards(schedule: Schedule, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the index i from S down to 1, and the network's t there: int64 [B]."""
    for i in range(schedule.steps, 0, -1):
        yield i, _time(schedule, i, x)


def _time(schedule: Schedule, i: int, x: Tensor) -> Tensor:
    return torch.full((len(x),), int(schedule.time[i]), device=x.device)
