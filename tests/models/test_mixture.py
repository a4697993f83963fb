"""Samplers on data of two modes: what no affine predictor can show, that each mode is found as often as it is there."""

import math
from functools import partial

import pytest
import torch

from models.noise import normal
from models.samplers import build, ddim, dpm_solver, greedy, heun, posterior, random
from tests.models.independent import SCHEDULES, alpha_bars

SHARE = 0.3
MEANS = torch.tensor([[-0.7, 0.3], [0.5, -0.4]], dtype=torch.float64)  # of pictures of two pixels, in both by turns
S, N = 0.1, 3000
SEEDS = torch.arange(N)


def best_for_mixture(alpha_bar):
    """The best ε̂ for 0.3 N(μ_1, s²) + 0.7 N(μ_2, s²): each one's own, by how likely it is that x_t came of it."""
    whole, shares = torch.tensor(alpha_bar), torch.tensor([SHARE, 1 - SHARE], dtype=torch.float64)

    def eps_theta(x_t, t):
        a = whole[t][:, None, None]  # [B, 1, 1]
        v = a**2 * S**2 + 1 - a**2
        away = x_t.view(-1, 1, 2) - a * MEANS  # [B, modes, pixels]
        likely = (shares.log() - away.square().sum(2) / (2 * v[:, :, 0])).softmax(1)  # [B, modes]
        return ((1 - a**2).sqrt() / v * likely[:, :, None] * away).sum(1).view_as(x_t)

    return eps_theta


def built(sampler, kind="article", steps=100, spacing="even"):
    """N samples, as [N, 2]."""
    config = SCHEDULES[kind]
    x_T = normal(8, "x_T", SEEDS, (1, 1, 2)).double()
    x_0 = build(
        sampler,
        best_for_mixture(alpha_bars(config)),
        x_T,
        config.tables().respaced(steps, spacing),
        lambda i: normal(8, "z", SEEDS, (1, 1, 2), step=i).double(),
    )
    return x_0.flatten(1)


def modes(x_0):
    """Of each sample: whether it is nearer to the first mode, and the way to the nearer one, [N] and [N, 2]."""
    way = x_0[:, None] - MEANS
    nearest = way.square().sum(2).argmin(1)
    return nearest == 0, way[torch.arange(len(x_0)), nearest]


WAYS = {
    "random": (random, "article", 250, "even"),
    "posterior": (posterior, "article", 250, "even"),
    "ddim η=1": (partial(ddim, eta=1.0), "article", 250, "even"),
    "ddim η=½": (partial(ddim, eta=0.5), "article", 150, "even"),
    "ddim": (ddim, "article", 100, "even"),
    "ddim in log-snr": (ddim, "cosine", 60, "log-snr"),
    "dpm-solver": (dpm_solver, "article", 50, "even"),
    "dpm-solver in log-snr": (dpm_solver, "linear", 40, "log-snr"),
    "heun": (heun, "article", 50, "even"),
    "heun in quadratic strides": (heun, "linear", 40, "quadratic"),
    "posterior from nothing": (posterior, "zero terminal", 250, "even"),
    "heun from nothing": (heun, "zero terminal", 60, "log-snr"),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_two_modes_are_found_in_proportion_and_in_shape(way):
    first, away = modes(built(*way))
    assert abs(float(first.double().mean()) - SHARE) < 5 * math.sqrt(SHARE * (1 - SHARE) / N)
    assert (away.norm(dim=1) < 8 * S).all()  # nothing is left between them
    for mode in (first, ~first):
        found = away[mode]
        assert found.mean(0).abs().max() < 0.03
        assert (found.std(0) - S).abs().max() < 0.04
        assert abs(float(torch.corrcoef(found.T)[0, 1])) < 0.2


def test_greedy_collapses():
    # Each sample runs to one point; so what comes out is of no width at all, and not in proportion.
    first, away = modes(built(greedy, steps=1000))
    assert float(away[~first].std(0).max()) < S / 20
    assert abs(float(first.double().mean()) - SHARE) > 10 * math.sqrt(SHARE * (1 - SHARE) / N)


def test_what_is_random_depends_on_its_noise_and_what_is_not_on_x_T_alone():
    config = SCHEDULES["article"]
    x_T = torch.zeros(N, 1, 1, 2, dtype=torch.float64)  # all start at one point
    eps_theta, schedule = best_for_mixture(alpha_bars(config)), config.tables().respaced(100)

    def noise(i):
        return normal(8, "z", SEEDS, (1, 1, 2), step=i).double()

    first, _ = modes(build(posterior, eps_theta, x_T, schedule, noise).flatten(1))
    assert abs(float(first.double().mean()) - SHARE) < 5 * math.sqrt(SHARE * (1 - SHARE) / N)
    walked = build(ddim, eps_theta, x_T, schedule, noise)
    assert torch.equal(walked, walked[:1].expand_as(walked))
