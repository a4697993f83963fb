"""The article's three losses: where their values are known, and what each is of the others."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.noise import normal
from models.objective import in_the_articles_scale, reconstruction_loss, reduced_loss, two_noise_loss
from models.process import demolish, eps_from_x_0
from models.schedule import article, at
from tests.models.independent import SCHEDULES

SCHEDULE = article()


@pytest.fixture
def batch():
    position = torch.arange(6)
    x_0, eps = normal(0, "x", position, (3, 4, 4)).double(), normal(0, "eps", position, (3, 4, 4)).double()
    return x_0, torch.tensor([1, 2, 10, 300, 999, 1000]), eps


def test_a_predictor_that_knows_the_picture_loses_nothing(batch):
    x_0, t, eps = batch
    loss = reduced_loss(lambda x_t, t: eps_from_x_0(x_t, t, x_0, SCHEDULE), x_0, t, eps, SCHEDULE)
    assert loss.shape == (6,)
    assert loss.max() < 1e-20


def test_a_predictor_of_nothing_loses_the_power_of_the_noise_of_each_image(batch):
    x_0, t, eps = batch
    loss = reduced_loss(lambda x_t, t: torch.zeros_like(x_t), x_0, t, eps, SCHEDULE)
    expected = [sum(value**2 for value in image.flatten().tolist()) / 48 for image in eps]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_an_image_that_is_wrong_by_a_constant_loses_its_square(batch):
    x_0, t, eps = batch
    wrong = torch.arange(6.0).double().view(-1, 1, 1, 1)
    loss = reduced_loss(lambda x_t, t: eps + wrong, x_0, t, eps, SCHEDULE)
    torch.testing.assert_close(loss, torch.tensor([0.0, 1, 4, 9, 16, 25]).double())


def test_the_predictor_sees_the_demolished_picture_and_its_t(batch):
    x_0, t, eps = batch
    seen = []

    def eps_theta(x_t, t):
        seen.append((x_t, t))
        return eps

    reduced_loss(eps_theta, x_0, t, eps, SCHEDULE)
    [(x_t, t_seen)] = seen
    assert torch.equal(x_t, demolish(x_0, t, eps, SCHEDULE))
    assert torch.equal(t_seen, t)


def test_the_best_predictor_of_gaussian_data_loses_what_cannot_be_known():
    # For data N(0, s²), ε given x_t has variance ᾱ² s²/(ᾱ² s² + β̄²): no predictor loses less on average.
    s, n, t = 0.5, 4000, torch.tensor([50, 200, 600])
    alpha_bar, beta_bar = SCHEDULE.alpha_bar[t].tolist(), SCHEDULE.beta_bar[t].tolist()
    for a, b, time in zip(alpha_bar, beta_bar, t.tolist(), strict=True):
        position = torch.arange(n)
        x_0, eps = s * normal(1, "x", position, (1, 4, 4)).double(), normal(1, "eps", position, (1, 4, 4)).double()
        v = a**2 * s**2 + b**2
        loss = reduced_loss(lambda x_t, t, b=b, v=v: b / v * x_t, x_0, torch.full((n,), time), eps, SCHEDULE).mean()
        least = a**2 * s**2 / v
        assert abs(float(loss) - least) < 5 * least * math.sqrt(2 / (16 * n))


def test_the_gradient_is_that_of_finite_differences():
    position = torch.arange(3)
    x_0, eps = normal(2, "x", position, (1, 2, 2)).double(), normal(2, "eps", position, (1, 2, 2)).double()
    t = torch.tensor([1, 400, 1000])
    weight = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)

    def loss(weight):
        return reduced_loss(lambda x_t, t: torch.tanh(weight[0] * x_t + weight[1]), x_0, t, eps, SCHEDULE)

    assert torch.autograd.gradcheck(loss, (weight,))


def bent(x_t, t):
    """A predictor that is neither linear nor near to any truth."""
    time = t.view(-1, 1, 1, 1) / 1000
    return torch.tanh(1.5 * x_t + time) - 0.3 * torch.sin(4 * x_t)


def rotated(eps, omega, t, schedule):
    """(ε̄, ε_t) of the article's rotation (ε, ω): β̄_t ε = α_t β̄_{t-1} ε̄ + β_t ε_t, β̄_t ω = β_t ε̄ - α_t β̄_{t-1} ε_t."""
    beta, beta_bar = at(schedule.beta, t, eps), at(schedule.beta_bar, t, eps)
    carried = at(schedule.alpha, t, eps) * at(schedule.beta_bar, t - 1, eps)
    return (carried * eps + beta * omega) / beta_bar, (beta * eps - carried * omega) / beta_bar


def drawn(seed, n=3):
    """Pictures and two noises in float64: [n, 2, 3, 3] each."""
    position = seed + torch.arange(n)
    return [normal(0, stream, position, (2, 3, 3)).double() for stream in ("x", "eps", "omega")]


def shares(t, schedule):
    """β_t²/β̄_t² and α_t² β̄_{t-1}²/β̄_t², float64 [B]: they add up to 1."""
    return (schedule.beta / schedule.beta_bar)[t] ** 2, (
        schedule.alpha[t] * schedule.beta_bar[t - 1] / schedule.beta_bar[t]
    ) ** 2


@given(
    name=st.sampled_from(list(SCHEDULES)),
    t=st.lists(st.integers(1, 100), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_the_article_s_rotation_is_one(name, t, seed):
    # So (ε, ω) are independent standard normals, as (ε̄, ε_t) are; and x_t depends on ε only.
    schedule, t = SCHEDULES[name].tables(), torch.tensor(t)
    x_0, eps, omega = drawn(seed)
    eps_bar, eps_t = rotated(eps, omega, t, schedule)
    torch.testing.assert_close(eps_bar**2 + eps_t**2, eps**2 + omega**2, rtol=1e-10, atol=1e-10)
    first, second = shares(t, schedule)
    torch.testing.assert_close(first + second, torch.ones(3).double(), rtol=1e-10, atol=0)
    seen = []
    two_noise_loss(lambda x_t, t: seen.append(x_t) or x_t, x_0, t, eps_bar, eps_t, schedule)
    torch.testing.assert_close(seen[0], demolish(x_0, t, eps, schedule), rtol=1e-10, atol=1e-10)


@given(
    name=st.sampled_from(list(SCHEDULES)),
    t=st.lists(st.integers(1, 100), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_the_second_noise_integrated_out_leaves_the_reduced_loss(name, t, seed):
    # Over ω and -ω the cross term vanishes: ½ Σ two-noise = (β_t²/β̄_t²) reduced + (α_t² β̄_{t-1}²/β̄_t²) mean(ω²).
    schedule, t = SCHEDULES[name].tables(), torch.tensor(t)
    x_0, eps, omega = drawn(seed)
    mean = sum(two_noise_loss(bent, x_0, t, *rotated(eps, o, t, schedule), schedule) for o in (omega, -omega)) / 2
    first, second = shares(t, schedule)
    expected = first * reduced_loss(bent, x_0, t, eps, schedule) + second * omega.square().flatten(1).mean(1)
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-12)


def test_it_leaves_the_gradient_of_the_reduced_loss_too():
    t, (x_0, eps, omega) = torch.tensor([1, 40, 900]), drawn(5)
    weight = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def gradient(losses):
        return torch.autograd.grad(losses.sum(), weight)[0]

    def eps_theta(x_t, t):
        return bent(weight * x_t, t)

    both = [two_noise_loss(eps_theta, x_0, t, *rotated(eps, o, t, SCHEDULE), SCHEDULE) for o in (omega, -omega)]
    scaled = shares(t, SCHEDULE)[0] * reduced_loss(eps_theta, x_0, t, eps, SCHEDULE)
    torch.testing.assert_close(gradient(sum(both) / 2), gradient(scaled), rtol=1e-10, atol=0)


@given(
    name=st.sampled_from(list(SCHEDULES)),
    t=st.lists(st.integers(1, 100), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_reconstruction_is_the_two_noise_loss_with_the_articles_weight(name, t, seed):
    schedule, t = SCHEDULES[name].tables(), torch.tensor(t)
    x_0, eps_bar, eps_t = drawn(seed)
    weight = (schedule.beta / schedule.alpha)[t] ** 2
    rebuilt = reconstruction_loss(bent, x_0, t, eps_bar, eps_t, schedule)
    torch.testing.assert_close(
        rebuilt, weight * two_noise_loss(bent, x_0, t, eps_bar, eps_t, schedule), rtol=1e-8, atol=1e-14
    )


def test_at_t_1_the_three_losses_are_one():
    # β̄_0 = 0: the first noise is not there, ε = ε_t, and both scales of ε̂ are the same.
    x_0, eps_bar, eps_t = drawn(7)
    t = torch.ones(3, dtype=torch.int64)
    reduced = reduced_loss(bent, x_0, t, eps_t, SCHEDULE)
    torch.testing.assert_close(two_noise_loss(bent, x_0, t, eps_bar, eps_t, SCHEDULE), reduced)


def test_the_articles_scale_of_the_network_is_smaller_by_beta_over_beta_bar():
    eps = drawn(0)[1]
    t = torch.tensor([1, 2, 1000])
    beta_bar = [1 - math.prod(1 - 0.02 * i / 1000 for i in range(1, time + 1)) for time in t.tolist()]
    expected = [math.sqrt(0.02 * time / 1000 / b2) for time, b2 in zip(t.tolist(), beta_bar, strict=True)]
    ratio = (in_the_articles_scale(eps, t, SCHEDULE) / eps).flatten(1)
    torch.testing.assert_close(ratio, torch.tensor(expected).double()[:, None].expand_as(ratio), rtol=1e-6, atol=0)


def test_a_network_that_undoes_the_step_rebuilds_it_exactly():
    # ε_θ = ε_t makes μ(x_t) = x_{t-1}; in the paper's scale that is ε̂ = (β̄_t/β_t) ε_t.
    t, (x_0, eps_bar, eps_t) = torch.tensor([2, 100, 1000]), drawn(9)
    scale = at(SCHEDULE.beta_bar, t, eps_t) / at(SCHEDULE.beta, t, eps_t)
    for form in (two_noise_loss, reconstruction_loss):
        assert form(lambda x_t, t: scale * eps_t, x_0, t, eps_bar, eps_t, SCHEDULE).max() < 1e-20
