"""The reduced loss where its value is known."""

import math

import pytest
import torch

from models.noise import normal
from models.objective import reduced_loss
from models.process import demolish, eps_from_x_0
from models.schedule import article

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
