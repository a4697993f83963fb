"""The tables against products taken one by one, and the articles' own numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import schedule as kinds
from models.schedule import article, at, constant, cosine, linear
from tests.models.independent import SCHEDULES, alpha_bars, betas, schedules

TABLES = ("alpha", "beta", "alpha_bar", "beta_bar")
lengths = st.integers(1, 3000)


def close(a, b, rtol=1e-12):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=0)


@given(T=lengths, rate=st.floats(1e-4, 0.5))
def test_the_schedule_is_the_articles(T, rate):
    schedule = article(T, rate)
    close(schedule.alpha[1:], [math.sqrt(1 - rate * t / T) for t in range(1, T + 1)])
    close(schedule.beta[1:], [math.sqrt(rate * t / T) for t in range(1, T + 1)])


@given(kind=st.sampled_from(["article", "linear", "constant", "cosine"]), T=lengths, rate=st.floats(1e-4, 0.5))
def test_each_kind_has_the_betas_of_its_formula(kind, T, rate):
    schedule = cosine(T) if kind == "cosine" else getattr(kinds, kind)(T, rate)
    expected = betas(kind, T, rate)
    # The cosine's 1 - f_t/f_{t-1} cancels near t = 0: both sides have lost digits there.
    np.testing.assert_allclose(schedule.beta[1:] ** 2, expected, rtol=1e-10, atol=1e-14)
    close(schedule.alpha_bar[1:], np.sqrt(np.cumprod([1 - beta for beta in expected])), rtol=1e-9)


@given(given_betas=st.lists(st.floats(1e-4, 0.9), min_size=1, max_size=40))
def test_given_betas_are_taken_as_they_are(given_betas):
    schedule = kinds.given(given_betas)
    close(schedule.beta[1:] ** 2, given_betas, rtol=1e-9)
    close(schedule.alpha[1:] ** 2, [1 - beta for beta in given_betas])


@pytest.mark.parametrize("config", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_a_configuration_makes_the_tables_that_it_names(config):
    schedule = config.tables()
    close(schedule.alpha_bar, alpha_bars(config), rtol=1e-9)
    assert schedule.steps == config.T


def test_the_line_is_the_ddpm_papers():
    # "T = 1000 ... forward process variances increasing linearly from 10⁻⁴ to 0.02"
    beta2 = linear(1000, 0.02).beta ** 2
    assert (round(float(beta2[1]), 12), round(float(beta2[1000]), 12)) == (1e-4, 0.02)
    close(beta2[1:].diff(), np.full(999, 0.0199 / 999), rtol=1e-9)


def test_the_cosine_is_half_way_where_its_paper_draws_it():
    # ᾱ² = ½ where (t/T + s)/(1 + s) = ½ of the way, up to f(0); the last steps are held at β² = 0.999.
    schedule = cosine(1000)
    assert float(schedule.alpha_bar[496] ** 2) == pytest.approx(0.5, abs=2e-3)
    assert float(schedule.beta[1000] ** 2) == pytest.approx(0.999, rel=1e-12)
    assert (schedule.beta**2).max() <= 0.999 + 1e-12


@given(T=lengths, rate=st.floats(1e-4, 0.5))
def test_the_constant_kind_spends_as_much_as_the_article(T, rate):
    same = constant(T, rate).beta[1:] ** 2
    close(same, np.full(T, float(same[0])), rtol=1e-9)
    close(same.sum(), (article(T, rate).beta ** 2).sum(), rtol=1e-9)


@given(schedule=schedules())
def test_each_table_is_made_of_the_others(schedule):
    close(schedule.alpha**2 + schedule.beta**2, np.ones(schedule.steps + 1))
    close(schedule.alpha_bar**2 + schedule.beta_bar**2, np.ones(schedule.steps + 1))
    close(schedule.alpha_bar, np.cumprod(schedule.alpha.numpy()), rtol=1e-10)
    close(schedule.alpha_bar, schedule.log_alpha_bar.exp())
    # The step carries on from where the steps before it ended: β̄_t² = α_t² β̄_{t-1}² + β_t².
    before = schedule.beta_bar[:-1] ** 2
    close(schedule.beta_bar[1:] ** 2, schedule.alpha[1:] ** 2 * before + schedule.beta[1:] ** 2, rtol=1e-9)


def test_alpha_bar_of_a_thousand_steps_is_the_known_one():
    assert round(float(article(1000).alpha_bar[-1]), 6) == 0.006482


@given(T=lengths)
def test_alpha_bar_keeps_the_articles_bound(T):
    # log ᾱ_T = ½ Σ log(1 - 0.02 t/T) < -½ Σ 0.02 t/T = -0.005 (T + 1)
    assert math.log(article(T).alpha_bar[-1]) < -0.005 * (T + 1)


@given(schedule=schedules())
def test_alpha_bar_of_any_kind_keeps_the_same_bound(schedule):
    # log(1 - β²) < -β², whatever the β².
    assert float(schedule.log_alpha_bar[-1]) < -0.5 * float((schedule.beta**2).sum())


@pytest.mark.parametrize("config", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_index_0_is_the_clean_image(config):
    for schedule in (config.tables(), config.tables().respaced(7)):
        assert [float(getattr(schedule, table)[0]) for table in TABLES] == [1, 0, 1, 0]
        assert schedule.time[0] == 0
        assert schedule.log_snr[0] == math.inf


@pytest.mark.parametrize("config", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_tables_are_float64_with_one_entry_more_than_there_are_steps(config):
    schedule = config.tables()
    assert schedule.steps == config.T
    for table in (*TABLES, "log_alpha_bar", "log_snr"):
        assert getattr(schedule, table).dtype == torch.float64
        assert getattr(schedule, table).shape == (config.T + 1,)
    assert schedule.time.dtype == torch.int64
    assert schedule.time.tolist() == list(range(config.T + 1))


@given(schedule=schedules(most=3000))
def test_each_step_leaves_less_of_the_picture(schedule):
    signal_to_noise = (schedule.alpha_bar / schedule.beta_bar)[1:]
    assert (signal_to_noise.diff() < 0).all()
    assert torch.isfinite(signal_to_noise).all()
    assert (schedule.log_snr.diff() < 0).all()
    close(schedule.log_snr[1:], 2 * signal_to_noise.log(), rtol=1e-9)


def test_the_log_of_the_snr_keeps_its_digits_at_both_ends():
    # Near 0, where 1 - ᾱ² would cancel: SNR_1 = (1 - β_1²)/β_1². Near T, where it is ᾱ_T² to a few digits.
    fine = article(10_000, 0.002)
    assert float(fine.log_snr[1]) == pytest.approx(math.log(1 / 2e-7 - 1), rel=1e-14, abs=0)
    a2 = alpha_bars(SCHEDULES["linear"])[-1] ** 2
    assert float(SCHEDULES["linear"].tables().log_snr[-1]) == pytest.approx(math.log(a2 / (1 - a2)), rel=1e-13, abs=0)


def test_the_tables_move_together():
    schedule = article(10).to(torch.device("meta"))
    assert {table.device.type for table in vars(schedule).values()} == {"meta"}
    assert {name: table.shape for name, table in vars(schedule).items()} == {
        name: table.shape for name, table in vars(article(10)).items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_table_is_read_per_image_in_the_dtype_of_the_picture(dtype):
    table, t = torch.tensor([10.0, 11.0, 12.0], dtype=torch.float64), torch.tensor([2, 0])
    read = at(table, t, torch.zeros(2, 3, 4, 5, dtype=dtype))
    assert read.dtype == dtype
    assert read.shape == (2, 1, 1, 1)
    assert read.flatten().tolist() == [12, 10]
