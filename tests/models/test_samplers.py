"""Samplers against data whose best predictor is known.

For Gaussian data N(μ, s²) the best prediction of the noise is affine in x_t, and every sampler is affine in x_t, in its
past and in its noise. So x_0 = d + c x_T + Σ g_i z_i, and the numbers d, c and g are found twice: from the published
formulas, one scalar at a time, and by sending zeros and ones through the sampler.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from models.noise import normal
from models.process import demolish, x_0_from_eps
from models.samplers import (
    SAMPLERS,
    build,
    clip_x_0,
    ddim,
    dpm_solver,
    greedy,
    posterior,
    random,
    sample,
    sample_noise,
)
from models.schedule import article

WHOLE = article()
STOCHASTIC = {"random", "posterior"}


def best_for_gaussian(mu, s):
    """The best ε̂ for data N(μ, s²): β̄_t (x_t - ᾱ_t μ)/(ᾱ_t² s² + β̄_t²). It is told t, so it reads the whole tables."""

    def eps_theta(x_t, t):
        a, b = (table[t].view(-1, 1, 1, 1) for table in (WHOLE.alpha_bar, WHOLE.beta_bar))
        return b * (x_t - a * mu) / (a**2 * s**2 + b**2)

    return eps_theta


def no_noise(step):
    raise AssertionError(f"noise was asked for at step {step}")


def column(values):
    return torch.as_tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def strides(steps, T=1000):
    """The t of each index, and ᾱ² of those t as plain products: nothing of this comes from the code under test."""
    alpha_bar_squared = np.cumprod([1.0] + [1 - 0.02 * t / T for t in range(1, T + 1)])
    time = [round(i * T / steps) for i in range(steps + 1)]
    return [float(alpha_bar_squared[t]) for t in time]


def by_formula(name, mu, s, steps):
    """Return d, c and [g_1 .. g_S] of x_0 = d + c x_T + Σ g_i z_i by the papers' own formulas."""
    abar2 = strides(steps)
    x = np.zeros(steps + 2)  # the coefficients of 1, x_T, z_1, ..., z_S
    x[1], x_0_before, h_before = 1.0, None, None
    for i in range(steps, 0, -1):
        a2, a2_next = abar2[i], abar2[i - 1]
        a, b, a_next, b_next = math.sqrt(a2), math.sqrt(1 - a2), math.sqrt(a2_next), math.sqrt(1 - a2_next)
        stride2 = a2 / a2_next  # α² of the stride; β² is 1 minus it
        beta2 = 1 - stride2
        x_0 = a * s**2 / (a2 * s**2 + b**2) * x  # E[x_0 | x_t]
        x_0[0] += b**2 * mu / (a2 * s**2 + b**2)
        if name in ("greedy", "random", "posterior"):
            # The mean of q(x_{t-1} | x_t, x_0), equation 7 of the DDPM paper.
            x = (a_next * beta2 * x_0 + math.sqrt(stride2) * b_next**2 * x) / b**2
            x[1 + i] += {"greedy": 0, "random": math.sqrt(beta2), "posterior": math.sqrt(beta2) * b_next / b}[name]
        elif name == "ddim":
            x = a_next * x_0 + b_next * (x - a * x_0) / b  # equation 12 of the DDIM paper
        elif i == 1:
            x = x_0  # λ_0 is infinite: all of the step is the predicted picture
        else:
            # Algorithm 2 of the DPM-Solver++ paper, whose h is a stride of λ = log(ᾱ/β̄).
            h = math.log(a_next / b_next) - math.log(a / b)
            D = x_0
            if x_0_before is not None:
                r = h_before / h
                D = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * x_0_before
            x = b_next / b * x - a_next * (math.exp(-h) - 1) * D
            x_0_before, h_before = x_0, h
    return x[0], x[1], x[2:]


def by_probing(name, mu, s, steps):
    """The same by running the sampler: on x_T = 0, on x_T = 1, and once for each step with z = 1 at that step."""
    probes = torch.arange(-1, steps + 1)  # -1: x_T = 0; 0: x_T = 1; i: z_i = 1
    x_0 = build(
        SAMPLERS[name],
        best_for_gaussian(mu, s),
        column(probes == 0),
        WHOLE.respaced(steps),
        lambda i: column(probes == i),
    ).flatten()
    d = float(x_0[0])
    return d, float(x_0[1]) - d, x_0[2:].numpy() - d


def spread(name, s, steps=1000):
    _, c, g = by_probing(name, 0.0, s, steps)
    return math.sqrt(c**2 + (g**2).sum())


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 1000])
@pytest.mark.parametrize(("mu", "s"), [(0.0, 1.0), (0.4, 0.25)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_gaussian_data_come_out_as_the_formulas_say(name, mu, s, steps):
    d, c, g = by_formula(name, mu, s, steps)
    d_probed, c_probed, g_probed = by_probing(name, mu, s, steps)
    assert d_probed == pytest.approx(d, abs=1e-9)
    assert c_probed == pytest.approx(c, abs=1e-9)
    np.testing.assert_allclose(g_probed, g, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_crowd_of_gaussian_samples_has_the_mean_and_the_spread_of_the_formulas(name):
    mu, s, steps, n = 0.4, 0.25, 50, 2000
    d, c, g = by_formula(name, mu, s, steps)
    position = torch.arange(n)

    def noise(i):
        return normal(1, "z", position, (1, 4, 4), step=i).double()

    x_T = normal(1, "x_T", position, (1, 4, 4)).double()
    x_0 = build(SAMPLERS[name], best_for_gaussian(mu, s), x_T, WHOLE.respaced(steps), noise)
    std = math.sqrt(c**2 + (g**2).sum())
    assert abs(float(x_0.mean()) - d) < 5 * std / math.sqrt(x_0.numel())
    assert abs(float(x_0.std()) / std - 1) < 5 / math.sqrt(2 * x_0.numel())


@pytest.mark.parametrize(
    ("name", "std", "digits"),
    [("random", 1.0, 4), ("posterior", 0.9956, 4), ("ddim", 0.998, 3), ("greedy", 0.00648, 5)],
)
def test_the_spread_of_unit_data_after_a_thousand_steps(name, std, digits):
    assert round(spread(name, s=1.0), digits) == std


def test_random_keeps_unit_variance_exactly_and_greedy_keeps_none_of_it():
    assert spread("random", s=1.0) == pytest.approx(1, abs=1e-9)
    assert spread("greedy", s=1.0) == pytest.approx(float(WHOLE.alpha_bar[-1]), rel=1e-9)


def test_posterior_is_exact_for_data_that_is_one_point():
    assert spread("posterior", s=0.0) < 1e-9
    assert by_probing("posterior", 0.3, 0.0, 100)[0] == pytest.approx(0.3, abs=1e-9)


def error(sampler, steps, strides, mu=0.3, s=0.5):
    """The largest distance from the exact probability-flow walk after so many of the strides, for some x_T.

    For Gaussian data that walk keeps (x_t - ᾱ_t μ)/√(ᾱ_t² s² + β̄_t²) as it was.
    """
    schedule = WHOLE.respaced(steps)

    def place(i):
        a, b = float(schedule.alpha_bar[i]), float(schedule.beta_bar[i])
        return a * mu, math.sqrt(a**2 * s**2 + b**2)

    x_T = torch.linspace(-3, 3, 13, dtype=torch.float64).view(-1, 1, 1, 1)
    (mean_T, std_T), (mean, std) = place(steps), place(steps - strides)
    exact = mean + std * (x_T - mean_T) / std_T
    walk = list(sampler(best_for_gaussian(mu, s), x_T, schedule, no_noise))
    return float((walk[strides] - exact).abs().max())


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpm_solver, 2)])
def test_strides_of_half_the_length_cut_the_error_by_the_order_of_the_solver(sampler, order):
    # On the way from T to T/4. Near t = 0 evenly spaced t are not evenly spaced in λ, whose last strides stay log 2 and
    # more however many there are, and the order shows late.
    errors = [error(sampler, steps, strides=steps * 3 // 4) for steps in (20, 40, 80, 160)]
    for long, short in itertools.pairwise(errors):
        assert math.log2(long / short) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("steps", [20, 50, 100])
def test_the_second_order_solver_ends_nearer_to_the_exact_walk(steps):
    assert 3 * error(dpm_solver, steps, strides=steps) < error(ddim, steps, strides=steps)


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_picture_on_the_way_is_yielded_from_x_T_to_x_0(name, steps):
    x_T = normal(0, "x_T", torch.arange(2), (1, 2, 2)).double()
    schedule, eps_theta = WHOLE.respaced(steps), best_for_gaussian(0.0, 0.5)
    way = list(SAMPLERS[name](eps_theta, x_T, schedule, torch.full_like(x_T, 0.1).mul))
    assert len(way) == steps + 1
    assert torch.equal(way[0], x_T)
    assert torch.equal(way[-1], build(SAMPLERS[name], eps_theta, x_T, schedule, torch.full_like(x_T, 0.1).mul))
    assert all(x.shape == x_T.shape and x.dtype == x_T.dtype for x in way)
    assert len({float(x.flatten()[0]) for x in way}) == steps + 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_network_is_told_the_t_of_the_whole_schedule(name):
    told = []

    def eps_theta(x_t, t):
        told.append(t)
        return torch.zeros_like(x_t)

    x_T = torch.zeros(3, 1, 1, 1)
    build(SAMPLERS[name], eps_theta, x_T, WHOLE.respaced(4), torch.zeros_like(x_T).mul)
    assert [t.tolist() for t in told] == [[t] * 3 for t in (1000, 750, 500, 250)]
    assert all(t.dtype == torch.int64 for t in told)


@pytest.mark.parametrize(("name", "asked"), [("random", [3, 2, 1]), ("posterior", [3, 2])])
def test_noise_is_asked_for_once_a_step_by_its_index(name, asked):
    # The last step of `posterior` has σ_1 = 0: x_0 is known there.
    steps = []

    def noise(i):
        steps.append(i)
        return torch.zeros(1, 1, 1, 1)

    build(SAMPLERS[name], lambda x_t, t: torch.zeros_like(x_t), torch.ones(1, 1, 1, 1), WHOLE.respaced(3), noise)
    assert steps == asked


@pytest.mark.parametrize("name", SAMPLERS.keys() - STOCHASTIC)
def test_a_deterministic_sampler_asks_for_no_noise(name):
    build(SAMPLERS[name], best_for_gaussian(0.0, 1.0), torch.ones(1, 1, 1, 1).double(), WHOLE.respaced(5), no_noise)


def shy(x_t, t):
    """A predictor that is not linear and treats each image and pixel by itself."""
    return torch.tanh(x_t) * (1 + t.view(-1, 1, 1, 1) / 1000)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_is_its_seed_in_every_batch(name):
    def samples(seeds):
        return sample(SAMPLERS[name], shy, WHOLE, seeds, (3, 5, 5), steps=20)

    seeds = torch.tensor([4, 0, 99, 1 << 40, 17])
    together = samples(seeds)
    for i in range(len(seeds)):
        assert torch.equal(samples(seeds[i : i + 1])[0], together[i])
        assert not any(torch.equal(together[i], together[j]) for j in range(i))
    assert torch.equal(samples(seeds.flip(0)).flip(0), together)


@pytest.mark.parametrize("clip", [True, False])
def test_to_sample_is_to_build_from_the_noise_of_the_seeds(clip):
    seeds = torch.tensor([3, 1 << 35])
    x_T, noise = sample_noise(seeds, (1, 4, 4))
    eps_theta = clip_x_0(shy, WHOLE) if clip else shy
    expected = build(random, eps_theta, x_T, WHOLE.respaced(8), noise)
    assert torch.equal(sample(random, shy, WHOLE, seeds, (1, 4, 4), steps=8, clip=clip), expected)


def test_each_noise_of_a_sample_is_another():
    x_T, noise = sample_noise(torch.arange(2000), (1, 4, 4))
    draws = torch.stack([x_T, *(noise(i) for i in (1, 2, 3, 1000))]).flatten(1)
    assert (torch.corrcoef(draws) - torch.eye(5)).abs().max() < 5 / math.sqrt(draws.shape[1])


def test_samples_are_clipped_unless_told_otherwise():
    seeds = torch.arange(4)
    assert sample(ddim, lambda x_t, t: -3 * x_t, WHOLE, seeds, (1, 4, 4), 10).abs().max() <= 1
    assert sample(ddim, lambda x_t, t: -3 * x_t, WHOLE, seeds, (1, 4, 4), 10, clip=False).abs().max() > 2


def test_more_steps_than_the_schedule_has_are_refused():
    with pytest.raises(ValueError, match=r"steps is 1001; .* 1\.\.1000"):
        sample(ddim, shy, WHOLE, torch.arange(1), (1, 2, 2), steps=1001)


def test_build_keeps_no_graph():
    weight = torch.ones(1, requires_grad=True)
    x_0 = build(ddim, lambda x_t, t: weight * x_t, torch.ones(1, 1, 1, 1), WHOLE.respaced(3), no_noise)
    assert not x_0.requires_grad


def test_clipping_changes_nothing_while_the_picture_is_inside():
    position = torch.arange(200)
    t = 1 + position * 5
    x_0 = normal(0, "x", position, (1, 4, 4)).double().clamp(-1, 1)
    eps = normal(0, "eps", position, (1, 4, 4)).double()
    x_t = demolish(x_0, t, eps, WHOLE)
    torch.testing.assert_close(clip_x_0(lambda x_t, t: eps, WHOLE)(x_t, t), eps, rtol=0, atol=1e-9)


def test_clipping_brings_the_picture_to_the_nearest_bound():
    position = torch.arange(200)
    t = 1 + position * 5
    x_0 = 2 * normal(0, "x", position, (1, 4, 4)).double()
    eps = normal(0, "eps", position, (1, 4, 4)).double()
    x_t = demolish(x_0, t, eps, WHOLE)
    clipped = clip_x_0(lambda x_t, t: eps, WHOLE)(x_t, t)
    implied = x_0_from_eps(x_t, t, clipped, WHOLE)
    torch.testing.assert_close(implied, x_0.clamp(-1, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", [greedy, random, posterior, ddim])
def test_a_clipped_walk_ends_within_the_bounds(sampler):
    def eps_theta(x_t, t):  # a predictor that drives every picture out of bounds
        return -3 * x_t

    x_T = normal(0, "x_T", torch.arange(8), (1, 4, 4)).double()
    schedule = WHOLE.respaced(30)
    zero = torch.zeros_like(x_T).mul
    assert build(sampler, eps_theta, x_T, schedule, zero).abs().max() > 2
    assert build(sampler, clip_x_0(eps_theta, WHOLE), x_T, schedule, zero).abs().max() <= 1 + 1e-9


@pytest.mark.parametrize(("name", "steps"), [("random", 500), ("ddim", 100), ("dpm-solver", 50)])
def test_two_modes_are_found_in_proportion(name, steps):
    share, means, s = 0.3, torch.tensor([-0.7, 0.5]).double(), 0.1
    weights = torch.tensor([share, 1 - share]).double()

    def eps_theta(x_t, t):
        a, b = (table[t].view(-1, 1, 1, 1) for table in (WHOLE.alpha_bar, WHOLE.beta_bar))
        v = a**2 * s**2 + b**2
        distance = [x_t - a * mean for mean in means]
        logits = torch.stack([w.log() - d**2 / (2 * v) for w, d in zip(weights, distance, strict=True)])
        return b / v * (logits.softmax(0) * torch.stack(distance)).sum(0)

    n = 3000
    seeds = torch.arange(n // 4)
    x_T = normal(8, "x_T", seeds, (1, 2, 2)).double()
    x_0 = build(
        SAMPLERS[name],
        eps_theta,
        x_T,
        WHOLE.respaced(steps),
        lambda i: normal(8, "z", seeds, (1, 2, 2), step=i).double(),
    ).flatten()
    left = x_0 < -0.1
    assert abs(float(left.double().mean()) - share) < 5 * math.sqrt(share * (1 - share) / n)
    for mean, found in zip(means.tolist(), (x_0[left], x_0[~left]), strict=True):
        assert abs(float(found.mean()) - mean) < 0.02
        assert abs(float(found.std()) - s) < 0.03
