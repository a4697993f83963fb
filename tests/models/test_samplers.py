"""What every sampler keeps to: what it yields, asks for and is told; that a sample is its seed; and clipping."""

import inspect
import math
from functools import partial

import pytest
import torch

from models.init import initialize
from models.noise import normal
from models.process import demolish, x_0_from_eps
from models.samplers import SAMPLERS, build, clip_x_0, ddim, posterior, random, sample, sample_noise
from models.schedule import article
from models.unet import UNet, UNetConfig
from tests.models.independent import SCHEDULES, alpha_bars, best_for_gaussian

WHOLE = article()
ALPHA_BAR = alpha_bars(SCHEDULES["article"])
STOCHASTIC = {"random", "posterior"}


def no_noise(step):
    raise AssertionError(f"noise was asked for at step {step}")


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_picture_on_the_way_is_yielded_from_x_T_to_x_0(name, steps):
    x_T = normal(0, "x_T", torch.arange(2), (1, 2, 2)).double()
    schedule, eps_theta = WHOLE.respaced(steps), best_for_gaussian(0.0, 0.5, ALPHA_BAR)
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
    # Heun's second look at a stride is at its end, and the last stride has none: β̄ is 0 there.
    expected = (1000, 750, 750, 500, 500, 250, 250) if name == "heun" else (1000, 750, 500, 250)
    assert [t.tolist() for t in told] == [[t] * 3 for t in expected]
    assert all(t.dtype == torch.int64 for t in told)


@pytest.mark.parametrize("spacing", ["even", "rising", "quadratic", "log-snr"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_network_is_asked_once_a_stride_and_by_heun_twice_less_one(name, spacing):
    told = []
    sample(
        SAMPLERS[name],
        lambda x_t, t: told.append(int(t[0])) or x_t,
        WHOLE,
        torch.arange(2),
        (1, 2, 2),
        6,
        spacing=spacing,
    )
    assert len(told) == (11 if name == "heun" else 6)
    assert sorted(set(told)) == WHOLE.respaced(6, spacing).time[1:].tolist()


@pytest.mark.parametrize(
    ("sampler", "asked"),
    [
        (random, [3, 2, 1]),
        (posterior, [3, 2]),
        (partial(ddim, eta=1.0), [3, 2]),
        (partial(ddim, eta=0.2), [3, 2]),
        (partial(ddim, eta=0.0), []),
    ],
)
def test_noise_is_asked_for_once_a_step_by_its_index(sampler, asked):
    # The last step of `posterior` and of DDIM has σ_1 = 0: x_0 is known there.
    steps = []

    def noise(i):
        steps.append(i)
        return torch.zeros(1, 1, 1, 1)

    build(sampler, lambda x_t, t: torch.zeros_like(x_t), torch.ones(1, 1, 1, 1), WHOLE.respaced(3), noise)
    assert steps == asked


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - STOCHASTIC))
def test_a_deterministic_sampler_asks_for_no_noise(name):
    build(
        SAMPLERS[name],
        best_for_gaussian(0.0, 1.0, ALPHA_BAR),
        torch.ones(1, 1, 1, 1).double(),
        WHOLE.respaced(5),
        no_noise,
    )


def shy(x_t, t):
    """A predictor that is not linear and treats each image and pixel by itself."""
    return torch.tanh(x_t) * (1 + t.view(-1, 1, 1, 1) / 1000)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_is_its_seed_in_every_batch(name):
    def samples(seeds):
        return sample(SAMPLERS[name], shy, WHOLE, seeds, (3, 5, 5), steps=20)

    seeds = torch.cat([torch.tensor([4, 0, 99, 1 << 40, 17]), torch.arange(1000, 1059)])
    together = samples(seeds)
    assert len(together) == 64
    for i in (0, 1, 2, 3, 4, 31, 63):
        assert torch.equal(samples(seeds[i : i + 1])[0], together[i])
        assert not any(torch.equal(together[i], together[j]) for j in range(i))
    assert torch.equal(samples(seeds.flip(0)).flip(0), together)
    assert torch.equal(torch.cat([samples(part) for part in seeds.split(24)]), together)


@pytest.fixture(scope="module")
def unet():
    """A network of the real kind whose every weight is away from zero."""
    net = UNet(UNetConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), groups=4), image_channels=1, side=8)
    initialize(net, seed=0)
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter.add_(normal(0, "weights", torch.tensor([i]), tuple(parameter.shape))[0], alpha=0.1)
    return net.eval()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_of_a_real_network_is_its_seed_but_for_rounding(name, unet):
    # Convolutions of another batch size may add in another order; clipping keeps that from growing.
    seeds = torch.arange(64)
    together = sample(SAMPLERS[name], unet, WHOLE, seeds, (1, 8, 8), steps=3)
    for i in (0, 40, 63):
        alone = sample(SAMPLERS[name], unet, WHOLE, seeds[i : i + 1], (1, 8, 8), steps=3)[0]
        torch.testing.assert_close(alone, together[i], rtol=0, atol=1e-3)
        assert (together[i] - together[i - 1]).abs().max() > 0.1


@pytest.mark.parametrize("clip", [True, False])
def test_to_sample_is_to_build_from_the_noise_of_the_seeds(clip):
    seeds = torch.tensor([3, 1 << 35])
    x_T, noise = sample_noise(seeds, (1, 4, 4))
    eps_theta = clip_x_0(shy, WHOLE) if clip else shy
    expected = build(random, eps_theta, x_T, WHOLE.respaced(8), noise)
    assert torch.equal(sample(random, shy, WHOLE, seeds, (1, 4, 4), steps=8, clip=clip), expected)


@pytest.mark.parametrize("n", [1, 3, 700])  # of so many that one step is drawn alone, and of fewer
def test_the_noise_of_a_step_is_that_of_its_address_whatever_was_asked_for_before(n):
    seeds, shape = 5 + torch.arange(n), (3, 4, 4)
    x_T, noise = sample_noise(seeds, shape)
    assert torch.equal(x_T, normal(0, "sample x_T", seeds, shape))
    for i in (1000, 999, 998, 3, 2, 1, 500, 1000):
        assert torch.equal(noise(i), normal(0, "sample z", seeds, shape, i))


def test_no_seeds_are_no_samples():
    assert sample(random, shy, WHOLE, torch.empty(0, dtype=torch.int64), (1, 4, 4), steps=3).shape == (0, 1, 4, 4)


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


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_clipped_walk_ends_within_the_bounds(name):
    def eps_theta(x_t, t):  # a predictor that drives every picture out of bounds
        return -3 * x_t

    x_T = normal(0, "x_T", torch.arange(8), (1, 4, 4)).double()
    schedule = WHOLE.respaced(30)
    zero = torch.zeros_like(x_T).mul
    assert build(SAMPLERS[name], eps_theta, x_T, schedule, zero).abs().max() > 2
    assert build(SAMPLERS[name], clip_x_0(eps_theta, WHOLE), x_T, schedule, zero).abs().max() <= 1 + 1e-9


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_sampler_clips_by_itself(name):
    # Data far outside of [-1, 1] come out where they are: clipping is the caller's to ask for, in one place.
    x_T, noise = sample_noise(torch.arange(50), (1, 2, 2))
    x_0 = build(SAMPLERS[name], best_for_gaussian(7.0, 0.1, ALPHA_BAR), x_T, WHOLE.respaced(100), noise)
    assert abs(float(x_0.mean()) - 7) < 0.1


def test_samples_are_clipped_by_default():
    assert inspect.signature(sample).parameters["clip"].default is True


def test_sampling_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    sample(random, shy, WHOLE, torch.arange(2), (1, 2, 2), steps=3)
    assert torch.equal(torch.get_rng_state(), before)
