"""Building: from noise x_T back to a picture x_0, one plain generator for each way.

Every sampler takes the network as a callable ε̂ and yields x at each index of the schedule, from x_T down to x_0, so
that whoever wants the pictures on the way takes them and whoever wants the last takes the last (:func:`build`).
Noise comes from a callable of the step, so that a sample is a function of its seed. Give a respaced schedule to take
fewer, longer strides.

None of them clips. Where pictures are known to lie in [-1, 1], wrap the network in :func:`clip_x_0`, once, outside.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from models.noise import normal
from models.objective import EpsTheta
from models.process import eps_from_x_0, x_0_from_eps
from models.schedule import Schedule, at

Noise: TypeAlias = Callable[[int], Tensor]
"""z at a step (an index of the schedule): float [B, C, H, W], standard normal."""
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
    previous = schedule.beta_bar.roll(1)
    sigma = torch.where(schedule.time > 0, schedule.beta * previous / schedule.beta_bar, 0.0)
    return _ancestral(eps_theta, x_T, schedule, noise, sigma=sigma)


def _ancestral(eps_theta: EpsTheta, x_T: Tensor, schedule: Schedule, noise: Noise, sigma: Tensor) -> Iterator[Tensor]:
    x = x_T
    yield x
    for t, time in _downwards(schedule, x):
        alpha, beta, beta_bar = (at(table, t, x) for table in (schedule.alpha, schedule.beta, schedule.beta_bar))
        # x_{t-1} = (x_t - β_t ε_θ)/α_t + σ_t z, where the article's ε_θ is (β_t/β̄_t) ε̂.
        x = (x - beta * (beta / beta_bar * eps_theta(x, time))) / alpha
        if sigma[t[0]] > 0:
            x = x + at(sigma, t, x) * noise(int(t[0]))
        yield x


def ddim(eps_theta: EpsTheta, x_T: Tensor, schedule: Schedule, noise: Noise) -> Iterator[Tensor]:
    """The deterministic walk x_{t-1} = ᾱ_{t-1} x̂_0 + β̄_{t-1} ε̂ (Song, Meng and Ermon, 2021; η = 0)."""
    x = x_T
    yield x
    for t, time in _downwards(schedule, x):
        eps = eps_theta(x, time)
        x_0 = x_0_from_eps(x, t, eps, schedule)
        x = at(schedule.alpha_bar, t - 1, x) * x_0 + at(schedule.beta_bar, t - 1, x) * eps
        yield x


def dpm_solver(eps_theta: EpsTheta, x_T: Tensor, schedule: Schedule, noise: Noise) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al., 2022): second order in λ = log(ᾱ/β̄), one evaluation a step, deterministic.

    The first step and the last, where λ_0 is infinite, are of first order; so on times that are even in t the error
    falls with the square of the strides only as far as the last few of them allow.
    """
    lambdas = (schedule.alpha_bar / schedule.beta_bar).log()
    x, x_0_before = x_T, None
    yield x
    for t, time in _downwards(schedule, x):
        i = int(t[0])
        x_0 = D = x_0_from_eps(x, t, eps_theta(x, time), schedule)
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
}


def clip_x_0(eps_theta: EpsTheta, schedule: Schedule) -> EpsTheta:
    """Wrap ε̂ so that the picture that it implies stays within [-1, 1]. ``schedule`` is the whole one, of 1..T."""

    def clipped(x_t: Tensor, t: Tensor) -> Tensor:
        x_0 = x_0_from_eps(x_t, t, eps_theta(x_t, t), schedule).clamp(-1, 1)
        return eps_from_x_0(x_t, t, x_0, schedule)

    return clipped


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
) -> Tensor:
    """Build the samples of the given seeds (int64 [n]): float32 [n, *shape]. A sample is its seed, in any batch.

    Args:
        sampler: one of :data:`SAMPLERS`.
        eps_theta: the network.
        schedule: the whole schedule that it was trained on.
        seeds: which samples.
        shape: [C, H, W].
        steps: evaluations of the network, at most T.
        clip: keep the picture that each prediction implies within [-1, 1].
    """
    x_T, noise = sample_noise(seeds, shape)
    return build(sampler, clip_x_0(eps_theta, schedule) if clip else eps_theta, x_T, schedule.respaced(steps), noise)


def sample_noise(seeds: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Noise]:
    """Return x_T and the noise of each step for the samples of the given seeds."""
    return normal(0, "sample x_T", seeds, shape), lambda step: normal(0, "sample z", seeds, shape, step)


def _downwards(schedule: Schedule, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the index and the network's t, each as int64 [B], from S down to 1."""
    for i in range(schedule.steps, 0, -1):
        t = torch.full((len(x),), i, device=x.device)
        yield t, schedule.time.to(x.device)[t]
