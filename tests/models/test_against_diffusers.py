"""The same maths by other hands: `diffusers` on the same betas, step by step, with a predictor that is not linear.

The peer computes its tables in float32, where 1 - ᾱ² has lost half of its digits near t = 1. Its own formulas are
therefore given the same tables in float64, and agreement is asked to 1e-9; one test looks at the tables themselves.
"""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler

from models.noise import normal
from models.process import demolish, v_from_eps, x_0_from_v
from models.samplers import clip_x_0, ddim, dpm_solver, heun, posterior, random
from models.schedule import ScheduleConfig, article, cosine, linear

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


@pytest.mark.parametrize(
    ("ours", "options"),
    [
        (linear(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        (cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (
            linear(200, 0.1),
            {"beta_schedule": "linear", "beta_start": 5e-4, "beta_end": 0.1, "num_train_timesteps": 200},
        ),
        (cosine(50), {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}),
    ],
)
def test_the_line_and_the_cosine_are_the_peers(ours, options):
    scheduler = DDPMScheduler(**{"num_train_timesteps": T, **options})
    torch.testing.assert_close(scheduler.betas.double(), ours.beta[1:].square(), rtol=2e-5, atol=1e-8)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), ours.alpha_bar[1:].square(), rtol=1e-4, atol=0)


def test_the_stretch_to_zero_terminal_snr_is_the_peers_but_for_the_end():
    # In the peer's float32; its end is an ᾱ² of 0, which ours is not, to be divided by.
    scheduler = DDIMScheduler(num_train_timesteps=T, beta_schedule="linear", beta_end=0.02, rescale_betas_zero_snr=True)
    ours = ScheduleConfig(kind="linear", zero_terminal_snr=True).tables()
    torch.testing.assert_close(scheduler.alphas_cumprod.sqrt().double(), ours.alpha_bar[1:], rtol=1e-5, atol=2.0**-12)
    assert float(scheduler.alphas_cumprod[-1]) == 0
    assert float(ours.alpha_bar[-1]) == pytest.approx(2.0**-12)


def test_velocity_agrees():
    t = torch.tensor([1, 2, 17, 500, 999, 1000])
    x_0, eps = normal(0, "x", t, (3, 4, 4)).double(), normal(0, "eps", t, (3, 4, 4)).double()
    x_t, theirs = demolish(x_0, t, eps, WHOLE), peer(DDPMScheduler).get_velocity(x_0, eps, t - 1)
    torch.testing.assert_close(v_from_eps(x_t, t, eps, WHOLE), theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x_0_from_v(x_t, t, theirs, WHOLE), x_0, rtol=1e-9, atol=1e-9)


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


@pytest.mark.parametrize(  # the peer's own strides, which must divide T
    ("steps", "eta"), [(10, 0.0), (50, 0.0), (10, 0.3), (1000, 0.3), (10, 1.0), (50, 1.0)]
)
def test_walks_of_ddim_agree_given_the_same_noise(steps, eta):
    scheduler = peer(DDIMScheduler, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    schedule, x = WHOLE.respaced(steps), start()
    assert scheduler.timesteps.tolist() == [t - 1 for t in times(schedule)]
    walk, theirs = list(ddim(eps_theta, x, schedule, step_noise, eta=eta)), [x]
    for i, t in zip(range(steps, 0, -1), scheduler.timesteps.tolist(), strict=True):
        eps, generator = eps_theta(x, torch.full((3,), t + 1)), torch.Generator().manual_seed(i)
        x = scheduler.step(eps, t, x, eta=eta, generator=generator).prev_sample
        theirs.append(x)
    assert_same_walk(walk, theirs)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_clipped_walks_agree(eta):
    # The peer takes ε̂ again from the picture that it clipped, if it is told to: ours always does.
    scheduler = peer(DDIMScheduler, clip_sample=True, set_alpha_to_one=True, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    schedule, x = WHOLE.respaced(20), start()
    walk, theirs = list(ddim(clip_x_0(eps_theta, WHOLE), x, schedule, step_noise, eta=eta)), [x]
    for i, t in zip(range(20, 0, -1), scheduler.timesteps.tolist(), strict=True):
        eps, generator = eps_theta(x, torch.full((3,), t + 1)), torch.Generator().manual_seed(i)
        x = scheduler.step(eps, t, x, eta=eta, use_clipped_model_output=True, generator=generator).prev_sample
        theirs.append(x)
    assert_same_walk(walk, theirs)
    assert theirs[-1].abs().max() <= 1 + 1e-9


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # the peer's own np.array(tensor)
@pytest.mark.parametrize("spacing", ["even", "quadratic", "log-snr"])
@pytest.mark.parametrize("steps", [2, 7, 50])
def test_walks_of_heun_agree(steps, spacing):
    scheduler = peer(HeunDiscreteScheduler)
    schedule, x = WHOLE.respaced(steps, spacing), start()
    scheduler.set_timesteps(timesteps=[t - 1 for t in times(schedule)])
    # The peer keeps its σ = β̄/ᾱ in float32; the same in float64, in its own order: each but the ends stands twice.
    abar2 = np.cumprod(1 - BETAS)[np.array(times(schedule)) - 1]
    sigmas = torch.tensor([*np.sqrt((1 - abar2) / abar2), 0.0]).double()
    sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    torch.testing.assert_close(scheduler.sigmas.double(), sigmas, rtol=1e-6, atol=0)
    scheduler.sigmas = sigmas

    walk, theirs, y = list(heun(eps_theta, x, schedule, step_noise)), [x], x / schedule.alpha_bar[-1]  # y = x/ᾱ
    for step, t in enumerate(scheduler.timesteps):
        eps = eps_theta(scheduler.scale_model_input(y, t), torch.full((3,), int(t) + 1))
        y = scheduler.step(eps, t, y).prev_sample
        if step % 2 == 1 or step == 2 * steps - 2:  # two evaluations a stride, and one in the last
            theirs.append(y * schedule.alpha_bar[steps - len(theirs)])
    assert_same_walk(walk, theirs)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # the peer's own np.array(tensor)
@pytest.mark.parametrize("spacing", ["even", "rising"])
@pytest.mark.parametrize("steps", [2, 5, 10, 20, 64])
def test_second_order_walks_agree(steps, spacing):
    scheduler = peer(DPMSolverMultistepScheduler, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint")
    schedule, x = WHOLE.respaced(steps, spacing), start(torch.float32)
    scheduler.set_timesteps(timesteps=[t - 1 for t in times(schedule)])
    walk, theirs = list(dpm_solver(eps_theta, x, schedule, step_noise)), [x]
    for t in times(schedule):
        x = scheduler.step(eps_theta(x, torch.full((3,), t)), t - 1, x).prev_sample
        theirs.append(x)
    assert_same_walk(walk, theirs, tolerance=2e-5)  # this peer steps in float32 whatever it is given
