"""What tests hold the maths against: tables as plain products, and data whose best predictor is known."""

import functools
import math

import numpy as np
import torch
from hypothesis import strategies as st

from models import schedule as ours

FALLING = tuple(0.001 + 0.0198 * (1 - i / 999) for i in range(1000))
"""Betas such as no kind makes: they fall."""


def betas(kind, T, rate=0.02, given=()):
    """β_1² .. β_T² of a kind of schedule, one by one."""
    if kind == "article":
        return [rate * t / T for t in range(1, T + 1)]
    if kind == "linear":
        return [rate / 200 + (rate - rate / 200) * (t - 1) / max(T - 1, 1) for t in range(1, T + 1)]
    if kind == "constant":
        return [rate * (T + 1) / (2 * T)] * T
    if kind == "cosine":
        f = [math.cos(math.pi / 2 * (t / T + 0.008) / 1.008) ** 2 for t in range(T + 1)]
        return [min(1 - f[t] / f[t - 1], 0.999) for t in range(1, T + 1)]
    return list(given)


@functools.cache
def alpha_bars(config):
    """ᾱ_0 .. ᾱ_T of a ScheduleConfig, as plain products."""
    beta2 = np.array(betas(config.kind, config.T, config.rate, config.betas))
    alpha_bar = np.sqrt(np.cumprod([1.0, *(1 - beta2)]))
    if config.zero_terminal_snr:
        first, last, nothing = alpha_bar[1], alpha_bar[-1], 2.0**-12
        way = (alpha_bar[1:] - last) / (first - last) if config.T > 1 else 0.0
        alpha_bar[1:] = nothing + way * (first - nothing)
    alpha_bar.flags.writeable = False
    return alpha_bar


SCHEDULES = {
    "article": ours.ScheduleConfig(),
    "short": ours.ScheduleConfig(T=100, rate=0.2),
    "linear": ours.ScheduleConfig(kind="linear"),
    "cosine": ours.ScheduleConfig(kind="cosine", T=300),
    "constant": ours.ScheduleConfig(kind="constant"),
    "given": ours.ScheduleConfig(kind="given", betas=FALLING),
    "zero terminal": ours.ScheduleConfig(kind="linear", zero_terminal_snr=True),
}
"""One configuration of each kind, by a name for the tests that are run on each."""


@st.composite
def schedules(draw, most=1500):
    """A schedule of any kind and any T up to ``most``, whose end may be anywhere."""
    kind = draw(st.sampled_from(["article", "linear", "cosine", "constant", "given"]))
    if kind == "given":
        return ours.given(draw(st.lists(st.floats(1e-6, 0.6), min_size=1, max_size=200)))
    T, rate = draw(st.integers(1, most)), draw(st.floats(1e-4, 0.5))
    return ours.cosine(T) if kind == "cosine" else getattr(ours, kind)(T, rate)


def column(values):
    """Numbers as float64 pictures of one pixel: [B, 1, 1, 1]."""
    return torch.as_tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def best_for_gaussian(mu, s, alpha_bar):
    """The best ε̂ for data N(μ, s²): β̄_t (x_t - ᾱ_t μ)/(ᾱ_t² s² + β̄_t²), of whole tables ᾱ (numpy [T+1])."""
    whole = torch.tensor(alpha_bar)

    def eps_theta(x_t, t):
        a = whole[t].view(-1, 1, 1, 1)
        b2 = 1 - a**2
        return b2.sqrt() * (x_t - a * mu) / (a**2 * s**2 + b2)

    return eps_theta
