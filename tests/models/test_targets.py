"""What a network may put out: each target is one ε̂, its errors are those of ε in other units, and so are weights."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.noise import normal
from models.objective import (
    ObjectiveConfig,
    as_eps,
    in_the_articles_scale,
    reduced_loss,
    target_loss,
    training_loss,
    weights,
)
from models.process import v_from_eps, x_0_from_eps
from models.schedule import article
from tests.models.independent import SCHEDULES

SCHEDULE = article()
TARGETS = ("eps", "x_0", "v", "article")
WEIGHTS = ("simple", "article", "min-snr")
T = torch.tensor([1, 30, 500, 1000])
ALLOWED = [
    ObjectiveConfig(loss=loss, target=target, weight=weight, gamma=3.0)
    for loss, target, weight in itertools.product(("reduced", "two-noise", "reconstruction"), TARGETS, WEIGHTS)
    if loss == "reduced" or weight == "simple" or (loss, weight) == ("two-noise", "article")
]


def name(config):
    return f"{config.loss}-{config.target}-{config.weight}"


def bent(x_t, t):
    """An ε̂ that is neither linear nor near to any truth."""
    return torch.tanh(1.5 * x_t + t.view(-1, 1, 1, 1) / 1000)


def putting_out(target, eps_theta, schedule=SCHEDULE):
    """A network whose output is the target of ε̂."""

    def network(x_t, t):
        eps = eps_theta(x_t, t)
        return {
            "eps": lambda: eps,
            "x_0": lambda: x_0_from_eps(x_t, t, eps, schedule),
            "v": lambda: v_from_eps(x_t, t, eps, schedule),
            "article": lambda: in_the_articles_scale(eps, t, schedule),
        }[target]()

    return network


def drawn(n=4):
    return [normal(0, stream, torch.arange(n), (2, 3, 3)).double() for stream in ("x", "eps", "eps_t")]


def noise(stream):
    return normal(0, stream, torch.arange(4), (2, 3, 3)).double()


@given(
    schedule=st.sampled_from(list(SCHEDULES)).map(lambda kind: SCHEDULES[kind].tables()),
    t=st.lists(st.integers(1, 100), min_size=4, max_size=4).map(torch.tensor),
    target=st.sampled_from(TARGETS),
)
def test_every_target_of_one_prediction_is_that_prediction(schedule, t, target):
    x_t = drawn()[0]
    eps_theta = as_eps(putting_out(target, bent, schedule), target, schedule)
    torch.testing.assert_close(eps_theta(x_t, t), bent(x_t, t), rtol=1e-9, atol=1e-9)


@given(
    schedule=st.sampled_from(list(SCHEDULES)).map(lambda kind: SCHEDULES[kind].tables()),
    t=st.lists(st.integers(1, 100), min_size=4, max_size=4).map(torch.tensor),
)
def test_an_error_of_eps_is_snr_times_that_of_x_0_and_alpha_bar_squared_times_that_of_v(schedule, t):
    x_0, eps, _ = drawn()
    in_units = {
        target: target_loss(putting_out(target, bent, schedule), target, x_0, t, eps, schedule) for target in TARGETS
    }
    a2 = schedule.alpha_bar[t] ** 2
    of_eps = reduced_loss(bent, x_0, t, eps, schedule)
    for target, factor in (("eps", 1), ("article", 1), ("x_0", a2 / (1 - a2)), ("v", a2)):
        torch.testing.assert_close(factor * in_units[target], of_eps, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("target", TARGETS)
def test_a_network_that_puts_out_its_target_loses_nothing(target):
    x_0, eps, _ = drawn()
    knowing = putting_out(target, lambda x_t, t: eps)
    assert target_loss(knowing, target, x_0, T, eps, SCHEDULE).max() < 1e-20


def snr(schedule):
    a2 = schedule.alpha_bar[1:] ** 2
    return a2 / (1 - a2)


@pytest.mark.parametrize("schedule", [config.tables() for config in SCHEDULES.values()], ids=SCHEDULES.keys())
@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_is_that_of_its_paper_in_each_unit(schedule, gamma):
    ratio = snr(schedule)
    least = ratio.clamp(max=gamma)
    # Hang et al., section 3.4: min(SNR, γ) of x_0, min(SNR, γ)/SNR of ε, min(SNR, γ)/(SNR + 1) of v.
    for units, expected in (
        ("x_0", least),
        ("eps", least / ratio),
        ("article", least / ratio),
        ("v", least / (ratio + 1)),
    ):
        torch.testing.assert_close(weights("min-snr", units, schedule, gamma)[1:], expected, rtol=1e-9, atol=0)


def test_the_articles_weight_is_beta_over_alpha_squared_of_eps():
    t = torch.arange(1, 1001).double()
    expected = (0.02 * t / 1000) / (1 - 0.02 * t / 1000)
    torch.testing.assert_close(weights("article", "eps", SCHEDULE)[1:], expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("units", TARGETS)
def test_the_simple_weight_is_1_in_any_units(units):
    assert weights("simple", units, SCHEDULE).tolist() == [0.0] + [1.0] * 1000


@pytest.mark.parametrize("units", TARGETS)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_are_finite_and_none_is_of_the_clean_image(kind, units):
    for config in SCHEDULES.values():
        weight = weights(kind, units, config.tables())
        assert weight.dtype == torch.float64
        assert weight[0] == 0
        assert (weight[1:] > 0).all()
        assert torch.isfinite(weight).all()


@pytest.mark.parametrize("weight", ["article", "min-snr"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_costs_an_error_the_same_whatever_the_target(weight, target):
    x_0 = noise("x")
    losses = [
        training_loss(ObjectiveConfig(target=kind, weight=weight), putting_out(kind, bent), x_0, T, noise, SCHEDULE)
        for kind in ("eps", target)
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("config", ALLOWED, ids=name)
def test_the_configured_loss_is_the_product_of_its_parts(config):
    x_0, eps, eps_t = drawn()
    got = training_loss(config, putting_out(config.target, bent), x_0, T, noise, SCHEDULE)
    a2, b2 = SCHEDULE.alpha[T] ** 2, SCHEDULE.beta[T] ** 2
    ratio = snr(SCHEDULE)[T - 1]
    if config.loss == "reduced":
        error = (
            eps - bent(SCHEDULE.alpha_bar[T].view(-1, 1, 1, 1) * x_0 + SCHEDULE.beta_bar[T].view(-1, 1, 1, 1) * eps, T)
        ) ** 2
        scale = {"x_0": 1 / ratio, "v": 1 + 1 / ratio}.get(config.target, 1.0) if config.weight == "simple" else 1.0
    else:
        carried = SCHEDULE.alpha[T] * SCHEDULE.beta_bar[T - 1]
        parts = zip((SCHEDULE.alpha_bar[T], carried, SCHEDULE.beta[T]), (x_0, eps, eps_t), strict=True)
        x_t = sum(share.view(-1, 1, 1, 1) * picture for share, picture in parts)
        error = (eps_t - (SCHEDULE.beta[T] / SCHEDULE.beta_bar[T]).view(-1, 1, 1, 1) * bent(x_t, T)) ** 2
        scale = b2 / a2 if config.loss == "reconstruction" else 1.0
    weight = {"simple": 1.0, "article": b2 / a2, "min-snr": ratio.clamp(max=3.0) / ratio}[config.weight]
    torch.testing.assert_close(got, error.flatten(1).mean(1) * scale * weight, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("config", ALLOWED, ids=name)
def test_the_gradient_of_every_configuration_is_that_of_finite_differences(config):
    t, x_0 = torch.tensor([1, 60, 400, 900]), noise("x")
    parameters = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)

    def loss(parameters):
        def network(x_t, t):
            return torch.tanh(parameters[0] * x_t + parameters[1])

        # In shares of their own size: at t = 1 the error of ε is 10⁵ times that of x_0.
        losses = training_loss(config, network, x_0, t, noise, SCHEDULE)
        return losses / first

    first = 1.0
    first = loss(parameters).detach()
    assert torch.autograd.gradcheck(loss, (parameters,))
    [gradient] = torch.autograd.grad(loss(parameters).sum(), parameters)
    assert (gradient != 0).all()


@pytest.mark.parametrize(
    ("loss", "streams"), [("reduced", ["eps"]), ("two-noise", ["eps", "eps_t"]), ("reconstruction", ["eps", "eps_t"])]
)
@pytest.mark.parametrize("target", TARGETS)
def test_only_the_noise_that_a_loss_needs_is_drawn_and_each_once(loss, streams, target):
    asked = []
    training_loss(
        ObjectiveConfig(loss=loss, target=target), bent, noise("x"), T, lambda s: asked.append(s) or noise(s), SCHEDULE
    )
    assert asked == streams


@pytest.mark.parametrize("config", ALLOWED, ids=name)
def test_losses_keep_the_dtype_of_the_pictures_and_stay_apart(config):
    x_0 = noise("x").float()
    losses = training_loss(config, bent, x_0, T, lambda s: noise(s).float(), SCHEDULE)
    assert losses.dtype == torch.float32
    assert losses.shape == (4,)
    for i in range(4):
        alone = training_loss(
            config, bent, x_0[i : i + 1], T[i : i + 1], lambda s, i=i: noise(s).float()[i : i + 1], SCHEDULE
        )
        torch.testing.assert_close(alone, losses[i : i + 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan])
def test_a_gamma_that_is_not_positive_is_refused(gamma):
    with pytest.raises(ValueError, match=rf"fit\.objective\.gamma is {gamma}; it must be positive: try 5"):
        ObjectiveConfig(gamma=gamma)


def test_a_weight_on_top_of_the_weight_of_reconstruction_is_refused():
    with pytest.raises(
        ValueError,
        match=r"fit\.objective\.weight is article; .*: take fit\.objective\.weight simple, or .*loss two-noise",
    ):
        ObjectiveConfig(loss="reconstruction", weight="article")


@pytest.mark.parametrize("loss", ["two-noise", "reconstruction"])
def test_min_snr_is_for_the_reduced_loss(loss):
    # The others carry β_t²/β̄_t² in them already: min(SNR, γ) on top of that would not be what it is called.
    with pytest.raises(ValueError, match=rf"weight is min-snr; the {loss} loss .* take fit\.objective\.loss reduced"):
        ObjectiveConfig(loss=loss, weight="min-snr")
