"""The same road in fewer strides: where they end, and that ᾱ at their ends is what it was."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.schedule import ScheduleConfig, article, distinct
from tests.models.independent import SCHEDULES, alpha_bars, schedules

TABLES = ("alpha", "beta", "alpha_bar", "beta_bar", "log_alpha_bar")
SPACINGS = ("even", "rising", "quadratic", "log-snr")


def close(a, b, rtol=1e-9):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=1e-13)


@given(data=st.data(), whole=schedules(), spacing=st.sampled_from(SPACINGS))
def test_fewer_strides_walk_the_same_road(data, whole, spacing):
    steps = data.draw(st.integers(1, whole.steps), label="steps")
    few = whole.respaced(steps, spacing)
    assert few.steps == steps
    assert (int(few.time[0]), int(few.time[-1])) == (0, whole.steps)
    assert (few.time.diff() > 0).all()
    close(few.alpha_bar, whole.alpha_bar[few.time])
    close(few.beta_bar, whole.beta_bar[few.time])
    close(few.alpha**2 + few.beta**2, np.ones(steps + 1))
    close(few.log_alpha_bar, few.alpha.log().cumsum(0))
    assert (few.log_snr.diff() < 0).all()


@given(data=st.data(), T=st.integers(1, 1500))
def test_even_strides_end_at_the_nearest_integers(data, T):
    steps = data.draw(st.integers(1, T), label="steps")
    time = article(T).respaced(steps).time.tolist()
    assert all(abs(t - i * T / steps) <= 0.5 for i, t in enumerate(time))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("config", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_as_many_strides_as_steps_change_nothing(config, spacing):
    whole = config.tables()
    again = whole.respaced(whole.steps, spacing)
    assert torch.equal(again.time, whole.time)
    for table in TABLES:
        close(getattr(again, table), getattr(whole, table))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_one_stride_takes_all_of_the_road(spacing):
    one = article(1000).respaced(1, spacing)
    assert one.time.tolist() == [0, 1000]
    close(one.alpha[1], article(1000).alpha_bar[-1])


def test_quadratic_strides_grow_with_t():
    time = article(1000).respaced(10, "quadratic").time
    assert time.tolist() == [0, 10, 40, 90, 160, 250, 360, 490, 640, 810, 1000]
    between = article(1000).respaced(10, "rising").time
    assert between.tolist() == [0, 32, 89, 164, 253, 354, 465, 586, 716, 854, 1000]  # 1000 (i/10)^1.5
    # 50 strides begin with t = 0.4, 1.6, 3.6, ...: the first are pushed apart, and the rest are where they belong.
    time = article(1000).respaced(50, "quadratic").time.tolist()
    assert time[:6] == [0, 1, 2, 4, 6, 10]
    assert all(abs(t - i * i * 0.4) <= 0.5 for i, t in enumerate(time) if i > 1)


@given(
    name=st.sampled_from([name for name, config in SCHEDULES.items() if config.T > 100]),
    steps=st.integers(2, 8),
)
def test_a_few_strides_are_even_in_log_snr_as_far_as_integers_allow(name, steps):
    config = SCHEDULES[name]
    a2 = alpha_bars(config)[1:] ** 2
    log_snr = np.log(a2 / (1 - a2))
    wanted = np.linspace(log_snr[0], log_snr[-1], steps)
    exact = np.interp(-wanted, -log_snr, np.arange(1, config.T + 1))
    time = config.tables().respaced(steps, "log-snr").time.tolist()
    assert time[:2] == [0, 1]
    if len(set(np.rint(exact))) == steps:  # else some had to move
        assert all(abs(t - x) <= 0.5 + 1e-6 for t, x in zip(time[1:], exact, strict=True))


@pytest.mark.parametrize("steps", [20, 50, 100])
def test_where_no_two_strides_fall_together_they_are_even_in_log_snr(steps):
    # Near t = 1 the integers are too far apart. Beyond, each stride is within a step of the whole road at each end.
    whole = article(1000)
    few = whole.respaced(steps, "log-snr")
    stride = (whole.log_snr[1] - whole.log_snr[-1]) / (steps - 1)
    free = few.time[:-1] > 4 * steps
    assert free.sum() >= steps / 4
    drop = whole.log_snr[few.time[:-1] - 1] - whole.log_snr[few.time[:-1]]  # of one step at the upper end
    assert ((-few.log_snr.diff() - stride).abs()[free] <= drop[free]).all()


def test_respacing_twice_is_respacing_once():
    once, twice = article(1000).respaced(20), article(1000).respaced(100).respaced(20)
    assert torch.equal(twice.time, once.time)
    for table in TABLES:
        close(getattr(twice, table), getattr(once, table))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [-1, 0, 11])
def test_a_bad_number_of_strides_is_named(steps, spacing):
    with pytest.raises(ValueError, match=rf"steps is {steps}; .* 1\.\.10"):
        article(10).respaced(steps, spacing)


def test_another_spacing_is_refused_by_name():
    with pytest.raises(ValueError, match=r"spacing is 'karras'; .* even, rising, quadratic, log-snr"):
        article(10).respaced(5, "karras")


@pytest.mark.parametrize("steps", range(1, 12))
def test_the_shortest_roads_can_be_walked_in_any_spacing(steps):
    # T from 1: with a table of one entry there is nothing to look between.
    for T, spacing in itertools.product(range(steps, 12), SPACINGS):
        time = ScheduleConfig(T=T, zero_terminal_snr=True).tables().respaced(steps, spacing).time
        assert (time.diff() > 0).all()
        assert (int(time[0]), int(time[-1])) == (0, T)


@st.composite
def crowded(draw):
    """Integers 0 <= … <= last that begin and end there, and room for all of them to differ."""
    last = draw(st.integers(1, 40))
    between = draw(st.lists(st.integers(0, last), max_size=last - 1))
    return [0, *sorted(between), last], last


@given(crowded())
def test_what_is_alike_is_pushed_apart_and_no_further(case):
    rising, last = case
    apart = distinct(torch.tensor(rising), last).tolist()
    expected = list(rising)
    for i in range(1, len(expected)):  # up, away from the one before
        expected[i] = max(expected[i], expected[i - 1] + 1)
    expected[-1] = min(expected[-1], last)
    for i in range(len(expected) - 2, -1, -1):  # and back, where the end leaves no room
        expected[i] = min(expected[i], expected[i + 1] - 1)
    assert apart == expected
    assert (apart[0], apart[-1]) == (0, last)
    assert all(a < b for a, b in itertools.pairwise(apart))
    if len(set(rising)) == len(rising):
        assert apart == rising
