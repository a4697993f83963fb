"""Classifier-free guidance: what its scale means, that it may come before any conversion, and what it costs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.noise import normal
from models.objective import as_eps, in_the_articles_scale
from models.process import v_from_eps, x_0_from_eps
from models.samplers import build, ddim, dpm_solver, guided, heun, posterior
from models.schedule import article
from tests.models.independent import SCHEDULES, alpha_bars, best_for_gaussian

WHOLE = article()
TARGETS = ("eps", "x_0", "v", "article")
LABEL = torch.tensor([0, 2, 1, 2])
T = torch.tensor([1, 300, 700, 1000])


def eps_of(x_t, t, label):
    """An ε̂ that is not linear, of pictures of each label; -1 for none."""
    shift = (label.double() * 0.4).view(-1, 1, 1, 1)
    return torch.tanh(1.5 * x_t + shift) + shift * torch.sin(x_t + t.view(-1, 1, 1, 1))


def putting_out(target):
    def network(x_t, t, label):
        eps = eps_of(x_t, t, label)
        convert = {"x_0": x_0_from_eps, "v": v_from_eps}.get(target)
        if convert:
            return convert(x_t, t, eps, WHOLE)
        return in_the_articles_scale(eps, t, WHOLE) if target == "article" else eps

    return network


def pictures(n=4):
    return normal(0, "x", torch.arange(n), (2, 3, 3)).double()


def none(label=LABEL):
    return torch.full_like(label, -1)


def test_the_scale_1_is_the_labels_own_and_0_is_that_of_no_label():
    x_t = pictures()
    assert torch.equal(guided(eps_of, LABEL)(x_t, T), eps_of(x_t, T, LABEL))
    assert torch.equal(guided(eps_of, LABEL, 1.0)(x_t, T), eps_of(x_t, T, LABEL))
    assert torch.equal(guided(eps_of, LABEL, 0.0)(x_t, T), eps_of(x_t, T, none()))


@given(scale=st.floats(-2, 10))
def test_any_other_goes_on_along_the_line_through_both(scale):
    x_t = pictures()
    with_label, without = eps_of(x_t, T, LABEL), eps_of(x_t, T, none())
    expected = (1 - scale) * without + scale * with_label
    torch.testing.assert_close(guided(eps_of, LABEL, scale)(x_t, T), expected, rtol=1e-12, atol=1e-12)


@given(target=st.sampled_from(TARGETS), scale=st.floats(-2, 10))
def test_to_guide_a_target_is_to_guide_eps(target, scale):
    x_t = pictures()
    before = as_eps(guided(putting_out(target), LABEL, scale), target, WHOLE)(x_t, T)
    torch.testing.assert_close(before, guided(eps_of, LABEL, scale)(x_t, T), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("scale", "calls"), [(1.0, [4]), (3.0, [8]), (0.0, [8])])
def test_a_guided_prediction_is_one_call_of_twice_the_batch(scale, calls):
    seen = []

    def network(x_t, t, label):
        seen.append((x_t, t, label))
        return eps_of(x_t, t, label)

    x_t = pictures()
    assert guided(network, LABEL, scale)(x_t, T).shape == x_t.shape
    assert [len(x) for x, _, _ in seen] == [len(t) for _, t, _ in seen] == [len(label) for _, _, label in seen] == calls
    [(x, t, label)] = seen
    assert torch.equal(x, torch.cat([x_t] * (len(x) // 4)))
    assert torch.equal(t, torch.cat([T] * (len(x) // 4)))
    assert sorted(label.tolist()) == sorted(LABEL.tolist() + [-1] * (len(x) - 4))
    assert label.dtype == torch.int64


def test_a_guided_picture_is_its_own_in_every_batch():
    x_t = pictures()
    together = guided(eps_of, LABEL, 2.5)(x_t, T)
    for i in range(4):
        assert torch.equal(guided(eps_of, LABEL[i : i + 1], 2.5)(x_t[i : i + 1], T[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("sampler", [posterior, ddim, dpm_solver, heun])
def test_guided_gaussians_are_built_around_the_exaggerated_mean(sampler, scale):
    # Labels of N(μ, s²) with one s: the guided ε̂ is that of N(μ_∅ + scale (μ_label - μ_∅), s²).
    s, means, alpha_bar = 0.2, {-1: 0.1, 0: -0.3, 1: 0.4}, alpha_bars(SCHEDULES["article"])
    label = torch.arange(2000) % 2
    by_label = {k: best_for_gaussian(mean, s, alpha_bar) for k, mean in means.items()}

    def network(x_t, t, label):
        each = torch.stack([eps_theta(x_t, t) for eps_theta in by_label.values()])
        return each[label + 1, torch.arange(len(x_t))]

    x_T = normal(1, "x_T", torch.arange(2000), (1, 1, 2)).double()

    def noise(i):
        return normal(1, "z", torch.arange(2000), (1, 1, 2), step=i).double()

    x_0 = build(sampler, guided(network, label, scale), x_T, WHOLE.respaced(60), noise)
    for k in (0, 1):
        mean = means[-1] + scale * (means[k] - means[-1])
        assert abs(float(x_0[label == k].mean()) - mean) < 5 * s / math.sqrt(2000) + 0.01  # and ᾱ_T μ, from the start
        assert abs(float(x_0[label == k].std()) / s - 1) < 0.2
