"""The same maths by other hands: `diffusers` on the same betas, step by step, with a predictor that is not linear.

The peer computes its tables in float32, where 1 - ᾱ² has lost half of its digits near t = 1. Its own formulas are
therefore given the same tables in float64, and agreement is asked to 1e-9; one test looks at the tables themselves.
"""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from models.noise import normal
from models.process import demolish
from models.samplers import ddim, dpm_solver, posterior, random
from models.schedule import article

T = 1000
WHOLE = article(T)
BETAS = np.array([0.02 * t / T for t in range(1, T + 1)])  # the paper's beta is the article's β_t²


def peer(kind, **options):
    scheduler = kind(num_train_timesteps=T, trained_betas=BETAS, **options)
    scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - BETAS))
    return scheduler


def eps_theta(x_t, t):
    time = t.view(-1, 1, 1, 1).to(x_t.dtype) / T
    return torch.tanh(1.5 * x_t + time) * time.cos() + 0.2 * torch.sin(3 * x_t)


def start(dtype=torch.float64):
    return normal(0, "x_T", torch.arange(3), (2, 4, 4)).to(dtype)


def step_noise(i, dtype=torch.float64):
    """The noise that the peer draws when it is given a generator seeded with i."""
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(i), dtype=dtype)


def times(schedule):
    """Our t in 1..T, from noise to picture; the peer counts the same steps from 0 to T - 1."""
    return schedule.time.flip(0)[:-1].tolist()


def assert_same_walk(ours, theirs, tolerance=1e-9):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_the_tables_agree_to_the_peers_precision():
    scheduler = DDPMScheduler(num_train_timesteps=T, trained_betas=BETAS)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), WHOLE.alpha_bar[1:].square(), rtol=1e-5, atol=0)
    torch.testing.assert_close(scheduler.betas.double(), WHOLE.beta[1:].square(), rtol=1e-6, atol=0)


def test_demolition_agrees():
    t = torch.tensor([1, 2, 17, 500, 999, 1000])
    x_0, eps = normal(0, "x", t, (3, 4, 4)).double(), normal(0, "eps", t, (3, 4, 4)).double()
    theirs = peer(DDPMScheduler).add_noise(x_0, eps, t - 1)
    torch.testing.assert_close(demolish(x_0, t, eps, WHOLE), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [7, 10, 50, 1000])
@pytest.mark.parametrize(("sampler", "variance"), [(random, "fixed_large"), (posterior, "fixed_small")])
def test_ancestral_walks_agree_given_the_same_noise(sampler, variance, steps):
    scheduler = peer(DDPMScheduler, variance_type=variance, clip_sample=False)
    schedule, x = WHOLE.respaced(steps), start()
    scheduler.set_timesteps(timesteps=[t - 1 for t in times(schedule)])

    # The peer never adds noise in its last step when that is its t = 0; with wider strides its last t is above 0, and
    # it does. Ours adds σ_1 z. So the last noise of both is left out, and the means are compared there.
    walk = list(sampler(eps_theta, x, schedule, lambda i: step_noise(i) * (i > 1)))
    theirs = [x]
    for i, t in zip(range(steps, 0, -1), times(schedule), strict=True):
        eps = eps_theta(x, torch.full((3,), t))
        x = scheduler.step(eps, t - 1, x, generator=torch.Generator().manual_seed(i)).prev_sample
        if i == 1 and t > 1:
            x = x - scheduler._get_variance(t - 1) ** 0.5 * step_noise(1)
        theirs.append(x)
    assert_same_walk(walk, theirs)


@pytest.mark.parametrize(("sampler", "variance"), [(random, "fixed_large"), (posterior, "fixed_small")])
def test_the_noise_put_back_has_the_peers_variance_at_every_t(sampler, variance):
    scheduler = peer(DDPMScheduler, variance_type=variance)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for i in (2, 3, 100, 999, 1000):
        # With ε̂ = 0 the walk only rescales: what a unit of noise at step i has become after that step is σ_i.
        walk = sampler(lambda x_t, t: 0 * x_t, zero, WHOLE, lambda step, i=i: zero + (step == i))
        *_, after = (next(walk) for _ in range(T - i + 2))
        assert float(after) == pytest.approx(float(scheduler._get_variance(i - 1)) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("steps", [10, 50, 1000])  # the peer's own strides, which must divide T
def test_deterministic_walks_agree(steps):
    scheduler = peer(DDIMScheduler, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    schedule, x = WHOLE.respaced(steps), start()
    assert scheduler.timesteps.tolist() == [t - 1 for t in times(schedule)]
    walk, theirs = list(ddim(eps_theta, x, schedule, step_noise)), [x]
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(eps_theta(x, torch.full((3,), t + 1)), t, x, eta=0.0).prev_sample
        theirs.append(x)
    assert_same_walk(walk, theirs)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # the peer's own np.array(tensor)
@pytest.mark.parametrize("steps", [15, 20, 64])  # below 15 the peer falls back to first order in the last two steps
def test_second_order_walks_agree(steps):
    scheduler = peer(DPMSolverMultistepScheduler, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint")
    schedule, x = WHOLE.respaced(steps), start(torch.float32)
    scheduler.set_timesteps(timesteps=[t - 1 for t in times(schedule)])
    walk, theirs = list(dpm_solver(eps_theta, x, schedule, step_noise)), [x]
    for t in times(schedule):
        x = scheduler.step(eps_theta(x, torch.full((3,), t)), t - 1, x).prev_sample
        theirs.append(x)
    assert_same_walk(walk, theirs, tolerance=2e-5)  # this peer steps in float32 whatever it is given
