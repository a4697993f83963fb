"""The tables against products taken one by one, and the article's own numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.schedule import ScheduleConfig, article, at

TABLES = ("alpha", "beta", "alpha_bar", "beta_bar")
quick = settings(deadline=None, derandomize=True, max_examples=60)
lengths = st.integers(1, 3000)


def close(a, b, rtol=1e-12):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=0)


@quick
@given(T=lengths, rate=st.floats(1e-4, 0.5))
def test_the_schedule_is_the_articles(T, rate):
    schedule = article(T, rate)
    close(schedule.alpha[1:], [math.sqrt(1 - rate * t / T) for t in range(1, T + 1)])
    close(schedule.beta[1:], [math.sqrt(rate * t / T) for t in range(1, T + 1)])


@quick
@given(T=lengths)
def test_each_table_is_made_of_the_others(T):
    schedule = article(T)
    close(schedule.alpha**2 + schedule.beta**2, np.ones(T + 1))
    close(schedule.alpha_bar**2 + schedule.beta_bar**2, np.ones(T + 1))
    close(schedule.alpha_bar, np.cumprod(schedule.alpha.numpy()), rtol=1e-10)


def test_alpha_bar_of_a_thousand_steps_is_the_known_one():
    assert round(float(article(1000).alpha_bar[-1]), 6) == 0.006482


@quick
@given(T=lengths)
def test_alpha_bar_keeps_the_articles_bound(T):
    # log ᾱ_T = ½ Σ log(1 - 0.02 t/T) < -½ Σ 0.02 t/T = -0.005 (T + 1)
    assert math.log(article(T).alpha_bar[-1]) < -0.005 * (T + 1)


def test_index_0_is_the_clean_image():
    for schedule in (article(), article().respaced(7)):
        assert [float(getattr(schedule, table)[0]) for table in TABLES] == [1, 0, 1, 0]
        assert schedule.time[0] == 0


def test_tables_are_float64_with_one_entry_more_than_there_are_steps():
    schedule = article(12)
    assert schedule.steps == 12
    for table in TABLES:
        assert getattr(schedule, table).dtype == torch.float64
        assert getattr(schedule, table).shape == (13,)
    assert schedule.time.tolist() == list(range(13))


@quick
@given(T=lengths)
def test_each_step_leaves_less_of_the_picture(T):
    schedule = article(T)
    signal_to_noise = (schedule.alpha_bar / schedule.beta_bar)[1:]
    assert (signal_to_noise.diff() < 0).all()
    assert torch.isfinite(signal_to_noise).all()


@quick
@given(data=st.data(), T=st.integers(1, 1500))
def test_fewer_strides_walk_the_same_road(data, T):
    whole = article(T)
    steps = data.draw(st.integers(1, T), label="steps")
    few = whole.respaced(steps)
    assert few.steps == steps
    assert (int(few.time[0]), int(few.time[-1])) == (0, T)
    assert (few.time.diff() > 0).all()
    assert all(abs(time - i * T / steps) <= 0.5 for i, time in enumerate(few.time.tolist()))
    close(few.alpha_bar, whole.alpha_bar[few.time])
    close(few.beta_bar, whole.beta_bar[few.time], rtol=1e-9)
    close(few.alpha**2 + few.beta**2, np.ones(steps + 1))
    close(few.alpha, (few.alpha_bar / few.alpha_bar.roll(1)).index_fill(0, torch.tensor([0]), 1.0))


@quick
@given(T=lengths)
def test_as_many_strides_as_steps_change_nothing(T):
    whole, again = article(T), article(T).respaced(T)
    assert torch.equal(again.time, whole.time)
    for table in TABLES:
        close(getattr(again, table), getattr(whole, table), rtol=1e-9)


def test_respacing_twice_is_respacing_once():
    once, twice = article(1000).respaced(20), article(1000).respaced(100).respaced(20)
    assert torch.equal(twice.time, once.time)
    for table in TABLES:
        close(getattr(twice, table), getattr(once, table), rtol=1e-9)


@pytest.mark.parametrize("steps", [-1, 0, 11])
def test_a_bad_number_of_strides_is_named(steps):
    with pytest.raises(ValueError, match=rf"steps is {steps}; .* 1\.\.10"):
        article(10).respaced(steps)


@pytest.mark.parametrize("T", [0, -5, 1 << 31])
def test_a_bad_T_is_named(T):
    with pytest.raises(ValueError, match=rf"schedule\.T is {T}; .* try 1000"):
        ScheduleConfig(T=T)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0, math.nan])
def test_a_bad_rate_is_named(rate):
    with pytest.raises(ValueError, match=rf"schedule\.rate is {rate}; .* try 0\.02"):
        ScheduleConfig(rate=rate)


def test_the_default_configuration_is_the_articles():
    config = ScheduleConfig()
    assert (config.T, config.rate) == (1000, 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_table_is_read_per_image_in_the_dtype_of_the_picture(dtype):
    table, t = torch.tensor([10.0, 11.0, 12.0], dtype=torch.float64), torch.tensor([2, 0])
    read = at(table, t, torch.zeros(2, 3, 4, 5, dtype=dtype))
    assert read.dtype == dtype
    assert read.shape == (2, 1, 1, 1)
    assert read.flatten().tolist() == [12, 10]
