"""Samplers against data whose best predictor is known.

For Gaussian data N(μ, s²) the best prediction of the noise is affine in x_t, and every sampler is affine in x_t, in its
past and in its noise. So x_0 = d + c x_T + Σ g_i z_i, and the numbers d, c and g are found twice: from the published
formulas, one scalar at a time, and by sending zeros and ones through the sampler.
"""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from models.noise import normal
from models.samplers import SAMPLERS, build, ddim, dpm_solver, heun, posterior
from models.schedule import ScheduleConfig
from tests.models.independent import SCHEDULES, alpha_bars, best_for_gaussian, column

ARTICLE = SCHEDULES["article"]
WALKS = {**SAMPLERS, "ddim η=½": partial(ddim, eta=0.5), "ddim η=1": partial(ddim, eta=1.0)}
ETA = {"ddim": 0.0, "ddim η=½": 0.5, "ddim η=1": 1.0}


def no_noise(step):
    raise AssertionError(f"noise was asked for at step {step}")


class Known:
    """E[x_0 | x_t] of N(μ, s²), of x_t as its coefficients of 1, x_T, z_1 .. z_S (numpy [S+2])."""

    def __init__(self, mu, s):
        self.mu, self.s = mu, s

    def picture(self, x, a):
        v = a**2 * self.s**2 + 1 - a**2
        x_0 = a * self.s**2 / v * x
        x_0[0] += (1 - a**2) * self.mu / v
        return x_0


def ancestral(name, known, x, i, a, a_next):
    # The mean of q(x_{t-1} | x_t, x_0), equation 7 of the DDPM paper.
    b2, b2_next, stride2 = 1 - a**2, 1 - a_next**2, (a / a_next) ** 2
    mean = (a_next * (1 - stride2) * known.picture(x, a) + math.sqrt(stride2) * b2_next * x) / b2
    sigma2 = {"greedy": 0.0, "random": 1 - stride2, "posterior": (1 - stride2) * b2_next / b2}[name]
    mean[1 + i] += math.sqrt(sigma2)
    return mean


def implicit(eta, known, x, i, a, a_next):
    # Equations 12 and 16 of the DDIM paper.
    x_0, b2, b2_next = known.picture(x, a), 1 - a**2, 1 - a_next**2
    sigma2 = eta**2 * b2_next / b2 * (1 - (a / a_next) ** 2)
    x = a_next * x_0 + math.sqrt(b2_next - sigma2) * (x - a * x_0) / math.sqrt(b2)
    x[1 + i] += math.sqrt(sigma2)
    return x


def karras(known, x, a, a_next):
    # Algorithm 1 of Karras et al.: dy/dσ = (y - D(y, σ))/σ of y = x/ᾱ, σ = β̄/ᾱ.
    y, sigma, sigma_next = x / a, math.sqrt(1 - a**2) / a, math.sqrt(1 - a_next**2) / a_next
    d = (y - known.picture(x, a)) / sigma
    y_next = y + (sigma_next - sigma) * d
    if sigma_next > 0:
        d_next = (y_next - known.picture(a_next * y_next, a_next)) / sigma_next
        y_next = y + (sigma_next - sigma) * (d + d_next) / 2
    return a_next * y_next


def multistep(known, x, a, a_next, before):
    # Algorithm 2 of the DPM-Solver++ paper, whose h is a stride of λ = log(ᾱ/β̄). λ_0 is infinite: D is the end there.
    x_0, b, b_next = known.picture(x, a), math.sqrt(1 - a**2), math.sqrt(1 - a_next**2)
    if b_next == 0:
        return x_0, None
    h, D = math.log(a_next / b_next) - math.log(a / b), x_0
    if before is not None:
        x_0_before, h_before = before
        r = h_before / h
        D = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * x_0_before
    return b_next / b * x - a_next * math.expm1(-h) * D, (x_0, h)


def by_formula(name, known, alpha_bar):
    """Return d, c and [g_1 .. g_S] of x_0 = d + c x_T + Σ g_i z_i by the papers' own formulas, of ᾱ_0 .. ᾱ_S."""
    steps = len(alpha_bar) - 1
    x, before = np.zeros(steps + 2), None
    x[1] = 1.0
    for i in range(steps, 0, -1):
        a, a_next = alpha_bar[i], alpha_bar[i - 1]
        if name in ETA:
            x = implicit(ETA[name], known, x, i, a, a_next)
        elif name == "heun":
            x = karras(known, x, a, a_next)
        elif name == "dpm-solver":
            x, before = multistep(known, x, a, a_next, before)
        else:
            x = ancestral(name, known, x, i, a, a_next)
    return x[0], x[1], x[2:]


def by_probing(name, mu, s, config, steps, spacing="even"):
    """The same by running the sampler: on x_T = 0, on x_T = 1, and once for each step with z = 1 at that step."""
    probes = torch.arange(-1, steps + 1)  # -1: x_T = 0; 0: x_T = 1; i: z_i = 1
    schedule, eps_theta = config.tables().respaced(steps, spacing), best_for_gaussian(mu, s, alpha_bars(config))
    x_0 = build(WALKS[name], eps_theta, column(probes == 0), schedule, lambda i: column(probes == i)).flatten()
    d = float(x_0[0])
    return d, float(x_0[1]) - d, x_0[2:].numpy() - d


def assert_as_the_formulas_say(name, mu, s, config, steps, spacing="even"):
    time = config.tables().respaced(steps, spacing).time.numpy()
    d, c, g = by_formula(name, Known(mu, s), alpha_bars(config)[time])
    d_probed, c_probed, g_probed = by_probing(name, mu, s, config, steps, spacing)
    assert d_probed == pytest.approx(d, rel=1e-9, abs=1e-9)
    assert c_probed == pytest.approx(c, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(g_probed, g, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("mu", "s", "steps"), [(0.0, 1.0, 1), (0.0, 1.0, 50), *((0.4, 0.25, steps) for steps in (1, 2, 10, 50, 1000))]
)
@pytest.mark.parametrize("name", WALKS)
def test_gaussian_data_come_out_as_the_formulas_say(name, mu, s, steps):
    assert_as_the_formulas_say(name, mu, s, ARTICLE, steps)


@pytest.mark.parametrize("spacing", ["even", "rising", "quadratic", "log-snr"])
@pytest.mark.parametrize("kind", [kind for kind in SCHEDULES if kind != "article"])
@pytest.mark.parametrize("name", WALKS)
def test_so_they_do_on_every_schedule_in_every_spacing(name, kind, spacing):
    for steps in (3, 25):
        assert_as_the_formulas_say(name, -0.3, 0.5, SCHEDULES[kind], steps, spacing)


@pytest.mark.parametrize("T", [1, 2, 7, 4000])
@pytest.mark.parametrize("name", WALKS)
def test_so_they_do_for_the_shortest_and_for_long_roads(name, T):
    config = ScheduleConfig(T=T, rate=min(20 / T, 0.9), zero_terminal_snr=T < 10)
    assert_as_the_formulas_say(name, 0.4, 0.25, config, steps=min(T, 40))
    assert_as_the_formulas_say(name, 0.4, 0.25, config, steps=min(T, 40), spacing="log-snr")


@pytest.mark.parametrize("spacing", ["even", "log-snr"])
@pytest.mark.parametrize("name", WALKS)
def test_a_crowd_of_gaussian_samples_has_the_mean_and_the_spread_of_the_formulas(name, spacing):
    mu, s, steps, position = 0.4, 0.25, 50, torch.arange(2000)
    schedule, alpha_bar = ARTICLE.tables().respaced(steps, spacing), alpha_bars(ARTICLE)
    d, c, g = by_formula(name, Known(mu, s), alpha_bar[schedule.time.numpy()])

    def noise(i):
        return normal(1, "z", position, (1, 4, 4), step=i).double()

    x_T = normal(1, "x_T", position, (1, 4, 4)).double()
    x_0 = build(WALKS[name], best_for_gaussian(mu, s, alpha_bar), x_T, schedule, noise)
    std = math.sqrt(c**2 + (g**2).sum())
    assert abs(float(x_0.mean()) - d) < 5 * std / math.sqrt(x_0.numel())
    assert abs(float(x_0.std()) / std - 1) < 5 / math.sqrt(2 * x_0.numel())


def spread(name, s, config=ARTICLE, steps=1000):
    _, c, g = by_probing(name, 0.0, s, config, steps)
    return math.sqrt(c**2 + (g**2).sum())


@pytest.mark.parametrize(
    ("name", "std", "digits"),
    [("random", 1.0, 4), ("posterior", 0.9956, 4), ("ddim η=1", 0.9956, 4), ("ddim", 0.998, 3), ("greedy", 0.00648, 5)],
)
def test_the_spread_of_unit_data_after_a_thousand_steps(name, std, digits):
    assert round(spread(name, s=1.0), digits) == std


@pytest.mark.parametrize("kind", SCHEDULES)
def test_random_keeps_unit_variance_exactly_and_greedy_keeps_none_of_it(kind):
    config = SCHEDULES[kind]
    for steps in (20, 100):
        assert spread("random", 1.0, config, steps) == pytest.approx(1, abs=1e-9)
        assert spread("greedy", 1.0, config, steps) == pytest.approx(alpha_bars(config)[-1], rel=1e-9)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_posterior_is_exact_for_data_that_is_one_point(kind):
    for name in ("posterior", "ddim η=1"):
        assert spread(name, 0.0, SCHEDULES[kind], 100) < 1e-9
        assert by_probing(name, 0.3, 0.0, SCHEDULES[kind], 100)[0] == pytest.approx(0.3, abs=1e-9)


@pytest.mark.parametrize("kind", ["article", "cosine", "zero terminal"])
def test_eta_1_is_posterior_with_a_predictor_of_any_kind(kind):
    schedule, position = SCHEDULES[kind].tables().respaced(40), torch.arange(4)

    def noise(i):
        return normal(2, "z", position, (2, 3, 3), step=i).double()

    def bent(x_t, t):
        return torch.tanh(1.5 * x_t) + 0.2 * torch.sin(3 * x_t + t.view(-1, 1, 1, 1))

    x_T = normal(2, "x_T", position, (2, 3, 3)).double()
    walks = [list(walk(bent, x_T, schedule, noise)) for walk in (partial(ddim, eta=1.0), posterior)]
    for a, b in zip(*walks, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


FINE = ScheduleConfig(T=16_000, rate=20 / 16_000)
"""The article's road in steps so short that strides on it are as even as their spacing says."""


def error(sampler, steps, spacing, first=1.0, mu=0.3, s=0.5):
    """The largest distance from the exact probability-flow walk over the first part of the strides, for some x_T.

    For Gaussian data that walk keeps (x_t - ᾱ_t μ)/√(ᾱ_t² s² + β̄_t²) as it was.
    """
    schedule, strides = FINE.tables().respaced(steps, spacing), int(steps * first)
    alpha_bar = alpha_bars(FINE)

    def place(i):
        a = alpha_bar[int(schedule.time[i])]
        return a * mu, math.sqrt(a**2 * s**2 + 1 - a**2)

    x_T = torch.linspace(-3, 3, 13, dtype=torch.float64).view(-1, 1, 1, 1)
    (mean_T, std_T), (mean, std) = place(steps), place(steps - strides)
    exact = mean + std * (x_T - mean_T) / std_T
    walk = list(sampler(best_for_gaussian(mu, s, alpha_bar), x_T, schedule, no_noise))
    return float((walk[strides] - exact).abs().max())


@pytest.mark.parametrize(
    ("sampler", "order", "spacing", "first"),
    [
        (ddim, 1, "even", 1.0),
        (ddim, 1, "quadratic", 1.0),
        (ddim, 1, "log-snr", 1.0),
        (heun, 2, "even", 1.0),
        (heun, 2, "quadratic", 1.0),
        (heun, 2, "log-snr", 1.0),
        # Near t = 0 the last of even strides stay log 2 and more in λ, however many there are: the order shows late.
        (dpm_solver, 2, "even", 0.75),
        (dpm_solver, 2, "quadratic", 0.5),
        (dpm_solver, 2, "log-snr", 1.0),
    ],
)
def test_strides_of_half_the_length_cut_the_error_by_the_order_of_the_solver(sampler, order, spacing, first):
    errors = [error(sampler, steps, spacing, first) for steps in (80, 160, 320)]
    for long, short in itertools.pairwise(errors):
        assert math.log2(long / short) == pytest.approx(order, abs=0.06)


@pytest.mark.parametrize("steps", [20, 50, 100])
@pytest.mark.parametrize("spacing", ["even", "rising", "quadratic", "log-snr"])
def test_the_second_order_solvers_end_nearer_to_the_exact_walk(steps, spacing):
    for sampler in (dpm_solver, heun):
        assert 2 * error(sampler, steps, spacing) < error(ddim, steps, spacing)
