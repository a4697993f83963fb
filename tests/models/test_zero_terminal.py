"""Zero terminal SNR: nothing of the picture is left at T, ᾱ_1 stays, and the maths survives the end of the road."""

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given
from hypothesis import strategies as st

from models.noise import normal
from models.objective import ObjectiveConfig, as_eps, target_loss
from models.process import demolish, eps_from_x_0, v_from_eps
from models.samplers import SAMPLERS, clip_x_0, sample
from models.schedule import NOTHING_LEFT, ScheduleConfig, article, cosine, zero_terminal_snr
from tests.models.independent import SCHEDULES, betas, column

WHOLE = SCHEDULES["zero terminal"].tables()
KINDS = [
    ("article", 1000, 0.02),
    ("linear", 1000, 0.02),
    ("constant", 100, 0.2),
    ("cosine", 50, 0.0),
    ("linear", 2, 0.9),
]


@pytest.mark.parametrize(("kind", "T", "rate"), KINDS)
def test_the_stretch_is_the_peers_up_to_the_little_that_is_left(kind, T, rate):
    # The peer's ᾱ ends at 0 and ours at n = 2⁻¹²: ours is the peer's + n (1 - the peer's/ᾱ_1), so within n of it.
    beta2 = torch.tensor(betas(kind, T, rate), dtype=torch.float64)
    theirs = (1 - rescale_zero_terminal_snr(beta2)).cumprod(0).sqrt()
    ours = ScheduleConfig(kind=kind, T=T, rate=rate or 0.02, zero_terminal_snr=True).tables().alpha_bar[1:]
    assert theirs[-1] == 0
    torch.testing.assert_close(ours, theirs + 2.0**-12 * (1 - theirs / theirs[0]), rtol=1e-9, atol=1e-12)
    assert (ours - theirs).abs().max() <= 2.0**-12 + 1e-12


@given(T=st.integers(2, 2000), left=st.floats(1e-6, 0.5))
def test_the_first_stays_and_the_last_is_nothing(T, left):
    before = article(T, min(-4 * np.log(left) / (T + 1), 0.9))
    after = zero_terminal_snr(before)
    assert float(after.alpha_bar[1]) == pytest.approx(float(before.alpha_bar[1]), rel=1e-12)
    assert float(after.alpha_bar[-1]) == pytest.approx(NOTHING_LEFT, rel=1e-12)
    np.testing.assert_allclose(after.alpha**2 + after.beta**2, 1, rtol=1e-12)
    np.testing.assert_allclose(after.alpha_bar**2 + after.beta_bar**2, 1, rtol=1e-12)
    assert (after.log_snr.diff() < 0).all()
    assert torch.equal(after.time, before.time)
    # Linear in ᾱ: what was a share of the way from ᾱ_1 to ᾱ_T is the same share of it now.
    share_before, share_after = (
        (a - a[-1]) / (a[0] - a[-1]) for a in (before.alpha_bar[1:], after.alpha_bar[1:])
    )  # fmt: skip
    np.testing.assert_allclose(share_after, share_before, rtol=0, atol=1e-10)


def test_of_one_step_only_nothing_is_left():
    assert zero_terminal_snr(article(1)).alpha_bar.tolist() == pytest.approx([1, NOTHING_LEFT])


def test_a_road_that_begins_where_it_should_end_is_refused():
    with pytest.raises(ValueError, match=r"ᾱ_1 = 2\.4e-05 .* lower its first value"):
        zero_terminal_snr(ScheduleConfig(kind="given", T=2, betas=(1 - 6e-10, 0.5)).tables())


def test_the_cosines_last_step_may_end_below_and_is_lifted():
    # The cosine of T = 1000 leaves 4.9e-5, less than nothing is here.
    assert float(cosine(1000).alpha_bar[-1]) < NOTHING_LEFT
    after = zero_terminal_snr(cosine(1000))
    assert float(after.alpha_bar[-1]) == pytest.approx(NOTHING_LEFT)
    assert (after.alpha_bar.diff() < 0).all()


@pytest.mark.parametrize("target", ["eps", "article"])
def test_a_target_that_says_nothing_of_the_picture_is_refused(target):
    with pytest.raises(ValueError, match=rf"fit\.objective\.target is {target}; .* take fit\.objective\.target v"):
        ObjectiveConfig(target=target).check_schedule(ends_in_nothing=True)
    ObjectiveConfig(target=target).check_schedule(ends_in_nothing=False)


@pytest.mark.parametrize("target", ["x_0", "v"])
def test_a_target_that_tells_the_picture_is_taken(target):
    ObjectiveConfig(target=target).check_schedule(ends_in_nothing=True)


def of_picture(x_0, target):
    """A network that knows the picture, and puts out its target."""

    def network(x_t, t):
        return x_0.to(x_t.dtype) if target == "x_0" else v_from_eps(x_t, t, eps_from_x_0(x_t, t, x_0, WHOLE), WHOLE)

    return network


@pytest.mark.parametrize("target", ["x_0", "v"])
def test_the_loss_of_one_who_knows_is_nothing_at_T_too(target):
    position, t = torch.arange(4), torch.tensor([1, 500, 999, 1000])
    x_0, eps = (normal(0, stream, position, (1, 4, 4)).double() for stream in ("x", "eps"))
    assert target_loss(of_picture(x_0, target), target, x_0, t, eps, WHOLE).max() < 1e-20


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_builds_in_float32_what_the_network_knows(name):
    # The v of a picture in float32: x̂_0 at T is 4096 times a difference of float32, and clipping holds it.
    x_0 = normal(3, "x", torch.arange(5), (1, 4, 4)).clamp(-1, 1)
    eps_theta = as_eps(of_picture(x_0, "x_0"), "x_0", WHOLE)
    built = sample(SAMPLERS[name], eps_theta, WHOLE, torch.arange(5), (1, 4, 4), steps=50)
    assert built.dtype == torch.float32
    # `random` leaves the last of its noise in the picture: σ_1 = β_1 of the stride.
    spread = float(WHOLE.respaced(50).beta[1]) if name == "random" else 0.0
    assert (built - x_0).abs().max() < 1e-3 + 5 * spread


def test_at_T_the_picture_changes_x_T_by_less_than_float32_noise_shows():
    # What Lin et al. ask for: x_T holds the mean of the picture in no way that a network could read.
    T = torch.tensor([1000])
    black, white = (demolish(column([value]), T, column([0.7]), WHOLE) for value in (-1.0, 1.0))
    assert float((white - black).abs()) == pytest.approx(2 * 2.0**-12)
    usual_black, usual_white = (demolish(column([value]), T, column([0.7]), article()) for value in (-1.0, 1.0))
    assert float((usual_white - usual_black).abs()) > 0.01


def test_clipping_at_T_says_a_picture_within_bounds():
    x_T, T = normal(0, "x_T", torch.arange(20), (1, 2, 2)), torch.full((20,), 1000)
    eps = clip_x_0(lambda x_t, t: 0.9 * x_t, WHOLE)(x_T, T)
    assert torch.isfinite(eps).all()
    assert (x_T - eps).abs().max() <= 2 * 2.0**-12 + 1e-6  # ε is x_T but for the little that is left of a picture
