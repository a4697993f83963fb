"""t whose log SNR is normal, within the range that the schedule has."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from models.schedule import article
from models.timesteps import TimestepConfig, Timesteps, log_snr_normal
from tests.models.independent import SCHEDULES, alpha_bars


def log_snr(config):
    """log SNR of t = 1..T by plain products, and where one t ends and the next begins, from the largest down."""
    a2 = alpha_bars(config)[1:] ** 2
    values = np.log(a2 / (1 - a2))
    return values, np.concatenate([values[:1], (values[1:] + values[:-1]) / 2, values[-1:]])


@pytest.mark.parametrize(("mean", "std"), [(2.4, 2.4), (-1.0, 0.7), (0.0, 20.0)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_each_t_has_the_normals_share_of_its_stretch_of_log_snr(name, mean, std):
    found = log_snr_normal(SCHEDULES[name].tables(), mean, std)
    ends = stats.norm.cdf(log_snr(SCHEDULES[name])[1], mean, std)
    np.testing.assert_allclose(found, ends[:-1] - ends[1:], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("mean", "std"), [(2.4, 2.4), (-1.0, 0.7)])
@pytest.mark.parametrize("name", ["article", "cosine", "zero terminal"])
def test_the_histogram_of_a_global_batch_is_the_normals(name, mean, std):
    config, n = SCHEDULES[name], 20_000
    kind = TimestepConfig(kind="log-snr-normal", log_snr_mean=mean, log_snr_std=std)
    t, weight = Timesteps(kind, config.tables(), n, torch.device("cpu")).draw(0, torch.arange(n))
    assert (weight == 1).all()
    # As many below the end of each t as the normal has there, give or take one: far less than chance would leave.
    cdf = stats.norm.cdf(log_snr(config)[1], mean, std)
    below = np.bincount(t.numpy(), minlength=config.T + 1)[1:].cumsum()
    assert np.abs(below - n * (cdf[0] - cdf[1:]) / (cdf[0] - cdf[-1])).max() < 1 + 1e-3


def test_draws_of_many_batches_are_normal_to_kolmogorov_and_smirnov():
    schedule, n = article(20_000, 0.001), 1000  # a fine road: the grain of its t does not show
    kind = TimestepConfig(kind="log-snr-normal", log_snr_mean=0.5, log_snr_std=1.0)
    timesteps = Timesteps(kind, schedule, batch_images=1, device=torch.device("cpu"))  # each draw for itself
    t, _ = timesteps.draw(1, torch.arange(n))
    assert stats.kstest(schedule.log_snr[t].numpy(), "norm", args=(0.5, 1.0)).pvalue > 1e-3


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan])
def test_a_deviation_that_is_not_positive_is_refused(std):
    with pytest.raises(ValueError, match=rf"fit\.timesteps\.log_snr_std is {std}; it must be positive: try 2\.4"):
        TimestepConfig(log_snr_std=std)


@pytest.mark.parametrize(("mean", "std"), [(40.0, 2.4), (-40.0, 1.0), (13.0, 0.1)])
def test_a_normal_that_lies_beyond_the_schedule_is_refused(mean, std):
    config = TimestepConfig(kind="log-snr-normal", log_snr_mean=mean, log_snr_std=std)
    says = rf"log_snr_mean is {mean} and .*log_snr_std {std}; .* -10\.1\.\.10\.8: try 2\.4 and 2\.4"
    with pytest.raises(ValueError, match=says):
        Timesteps(config, article(), 32, torch.device("cpu"))
