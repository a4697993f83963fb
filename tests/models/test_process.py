"""Demolition step by step is demolition at once, and its conversions undo each other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.noise import normal
from models.process import (
    demolish,
    demolish_step,
    eps_from_v,
    eps_from_x_0,
    v_from_eps,
    x_0_from_eps,
    x_0_from_v,
)
from models.schedule import article
from tests.models.independent import SCHEDULES

SCHEDULE = article()


def image(value):
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


@given(t=st.integers(1, 300))
def test_t_single_steps_are_one_jump_in_distribution(t):
    # Every step is linear: x_t = m_t x_0 + Σ gains · noise. The picture passes with noise off, and the variance by
    # sending a standard deviation through the noise alone, step by step.
    one, zero = image(1.0), image(0.0)
    mean, variance = one, 0.0
    for i in range(1, t + 1):
        index = torch.tensor([i])
        mean = demolish_step(mean, index, zero, SCHEDULE)
        carried = float(demolish_step(one, index, zero, SCHEDULE))
        added = float(demolish_step(zero, index, one, SCHEDULE))
        variance = carried**2 * variance + added**2
    index = torch.tensor([t])
    torch.testing.assert_close(mean, demolish(one, index, zero, SCHEDULE), rtol=1e-10, atol=0)
    torch.testing.assert_close(image(variance).sqrt(), demolish(zero, index, one, SCHEDULE), rtol=1e-10, atol=0)


def test_a_picture_of_unit_variance_keeps_it_at_every_t():
    t = torch.arange(1001)
    share_of_picture = demolish(torch.ones(1001, 1, 1, 1).double(), t, torch.zeros(1001, 1, 1, 1), SCHEDULE)
    share_of_noise = demolish(torch.zeros(1001, 1, 1, 1).double(), t, torch.ones(1001, 1, 1, 1), SCHEDULE)
    torch.testing.assert_close(
        share_of_picture**2 + share_of_noise**2, torch.ones(1001, 1, 1, 1).double(), rtol=1e-12, atol=0
    )


@given(
    t=st.integers(1, 1000),
    x_0=st.floats(-1, 1),
    eps=st.floats(-6, 6),
)
def test_noise_and_picture_are_found_again(t, x_0, eps):
    index = torch.tensor([t])
    x_t = demolish(image(x_0), index, image(eps), SCHEDULE)
    torch.testing.assert_close(x_0_from_eps(x_t, index, image(eps), SCHEDULE), image(x_0), rtol=0, atol=1e-11)
    torch.testing.assert_close(eps_from_x_0(x_t, index, image(x_0), SCHEDULE), image(eps), rtol=0, atol=1e-11)


@given(
    t=st.integers(1, 1000),
    x_t=st.floats(-6, 6),
    eps=st.floats(-6, 6),
)
def test_the_conversions_invert_each_other(t, x_t, eps):
    index = torch.tensor([t])
    x_0 = x_0_from_eps(image(x_t), index, image(eps), SCHEDULE)
    torch.testing.assert_close(eps_from_x_0(image(x_t), index, x_0, SCHEDULE), image(eps), rtol=0, atol=1e-10)


@given(name=st.sampled_from(list(SCHEDULES)), t=st.integers(1, 100), x_t=st.floats(-6, 6), eps=st.floats(-6, 6))
def test_noise_picture_and_velocity_turn_into_each_other(name, t, x_t, eps):
    schedule, index = SCHEDULES[name].tables(), torch.tensor([t])
    x_t, eps = image(x_t), image(eps)
    v, x_0 = v_from_eps(x_t, index, eps, schedule), x_0_from_eps(x_t, index, eps, schedule)
    for again in (eps_from_v(x_t, index, v, schedule), eps_from_x_0(x_t, index, x_0, schedule)):
        torch.testing.assert_close(again, eps, rtol=0, atol=1e-9)
    torch.testing.assert_close(x_0_from_v(x_t, index, v, schedule), x_0, rtol=0, atol=1e-9)
    # The three are what they are called: x_t = ᾱ x_0 + β̄ ε, and v turns with it a quarter ahead.
    torch.testing.assert_close(demolish(x_0, index, eps, schedule), x_t, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        schedule.alpha_bar[t] * eps - schedule.beta_bar[t] * x_0, v, rtol=1e-9, atol=1e-9
    )  # fmt: skip


@pytest.mark.parametrize("t", [1, 2, 500, 1000])
def test_the_velocity_is_the_derivative_along_the_circle(t):
    # With ᾱ = cos φ and β̄ = sin φ, x_φ = cos φ x_0 + sin φ ε and v = dx/dφ, asked of a small turn either way.
    turn, x_0, eps = 1e-4, 0.3, -1.7
    phi = math.atan2(float(SCHEDULE.beta_bar[t]), float(SCHEDULE.alpha_bar[t]))
    here, ahead, behind = (math.cos(p) * x_0 + math.sin(p) * eps for p in (phi, phi + turn, phi - turn))
    v = v_from_eps(image(here), torch.tensor([t]), image(eps), SCHEDULE)
    assert float(v) == pytest.approx((ahead - behind) / (2 * turn), rel=1e-7)


def test_t_0_is_the_picture_itself():
    x_0 = normal(0, "x", torch.arange(2), (3, 4, 4))
    t = torch.zeros(2, dtype=torch.int64)
    assert torch.equal(demolish(x_0, t, torch.ones_like(x_0), SCHEDULE), x_0)


def test_each_image_is_demolished_at_its_own_t():
    x_0, eps = normal(0, "x", torch.arange(5), (3, 4, 4)), normal(0, "eps", torch.arange(5), (3, 4, 4))
    t = torch.tensor([1, 1000, 20, 500, 1])
    together = demolish(x_0, t, eps, SCHEDULE)
    for i in range(5):
        alone = demolish(x_0[i : i + 1], t[i : i + 1], eps[i : i + 1], SCHEDULE)
        assert torch.equal(together[i : i + 1], alone)
    assert together.dtype == torch.float32


def test_float32_pictures_survive_the_round_trip():
    t = torch.arange(1, 1001)
    x_0, eps = normal(0, "x", t, (1, 2, 2)).clamp(-1, 1), normal(0, "eps", t, (1, 2, 2))
    again = x_0_from_eps(demolish(x_0, t, eps, SCHEDULE), t, eps, SCHEDULE)
    torch.testing.assert_close(again, x_0, rtol=0, atol=1e-4)  # 1/ᾱ_T = 154 magnifies the rounding
