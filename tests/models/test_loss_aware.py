"""Draws that go where the loss is: as far as they should, without bias, and alike on any number of workers."""

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.noise import normal
from models.schedule import article
from models.timesteps import (
    REMEMBERED_LOSSES,
    UNIFORM_SHARE,
    TimestepConfig,
    Timesteps,
    edges,
    probabilities,
    stratified,
)

T, BATCH = 20, 64
EACH = torch.arange(1, T + 1)


def new(kind="loss-aware", batch_images=BATCH, T=T):
    return Timesteps(TimestepConfig(kind=kind), article(T), batch_images, torch.device("cpu"))


def alone(observed):
    """The total of a run of one worker."""
    return observed


def loss(t):
    """A known loss of each t: large for small t, as that of ε is."""
    return 3.0 / t + 0.05


def taught(batch_images=BATCH):
    timesteps = new(batch_images=batch_images)
    timesteps.observe(EACH.repeat(REMEMBERED_LOSSES), loss(EACH.repeat(REMEMBERED_LOSSES)))
    timesteps.learn(alone)
    return timesteps


def batch(s, batch_images=BATCH):
    return torch.arange(s * batch_images, (s + 1) * batch_images)


def shares(timesteps, images=100_000):
    """The probability of each t, as the counts of one large batch show it, and the weight of each t: float64 [T]."""
    timesteps.batch_images = images
    t, weight = timesteps.draw(0, batch(0, images))
    of_t = torch.zeros(T, dtype=torch.float64)
    of_t[t - 1] = weight
    assert torch.equal(of_t[t - 1], weight)  # one weight for each t
    return t.bincount(minlength=T + 1)[1:].double() / images, of_t


@given(masses=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=200))
def test_ends_give_each_t_its_probability_to_the_last_of_32_bits(masses):
    wanted = torch.tensor(masses, dtype=torch.float64)
    found = probabilities(edges(wanted))
    assert float(found.sum()) == 1
    assert (found >= 0).all()
    assert (found - wanted / wanted.sum()).abs().max() <= 2.0**-32 + 1e-15


def test_t_is_even_and_has_no_weight_until_each_was_seen_often_enough():
    timesteps = new()
    for t in range(1, T + 1):
        seen = [REMEMBERED_LOSSES] * t + [REMEMBERED_LOSSES - 1] * (T - t)  # the last t is the last to be seen enough
        timesteps = new()
        often = EACH.repeat_interleave(torch.tensor(seen))
        timesteps.observe(often, loss(often))
        timesteps.learn(alone)
        drawn, weight = timesteps.draw(7, batch(3))
        assert torch.equal(drawn, stratified(7, batch(3), BATCH, T)) == (t < T)
        assert bool((weight == 1).all()) == (t < T)


def test_t_goes_where_the_root_of_the_squared_loss_is():
    found, _ = shares(taught())
    wanted = loss(EACH.double())
    wanted = (1 - UNIFORM_SHARE) * wanted / wanted.sum() + UNIFORM_SHARE / T
    assert (found - wanted).abs().max() < 2 / 100_000  # a batch has each t as often as its share, or once more or less


def test_it_is_the_root_of_the_mean_square_not_the_mean():
    timesteps = new()
    t = EACH.repeat(REMEMBERED_LOSSES)
    losses = torch.where(torch.arange(len(t)) // T % 2 == 0, 0.0, 2.0)  # half the time 0, half the time 2 ...
    losses[t == 1] = 1.0  # ... and always 1: the same mean, and half the square
    timesteps.observe(t, losses)
    timesteps.learn(alone)
    assert timesteps.state["second_moment"].tolist() == pytest.approx([1] + [2] * (T - 1))
    found, _ = shares(timesteps)
    assert float(found[1] / found[0]) == pytest.approx(math.sqrt(2), rel=0.01)


def test_the_weights_make_up_for_the_draws_exactly():
    # Σ q_t w_t f(t) = mean f for any f is q_t w_t = 1/T for every t.
    timesteps = taught()
    found, weight = shares(timesteps)
    assert float((1 / (T * weight)).sum()) == pytest.approx(1, abs=1e-12)
    assert (found - 1 / (T * weight)).abs().max() < 2 / 100_000
    for f in (torch.ones(T), loss(EACH), EACH.square(), (EACH == 7)):
        assert float((found * weight * f).sum()) == pytest.approx(float(f.double().mean()), rel=1e-3)


def test_no_weight_exceeds_the_inverse_of_the_uniform_share():
    timesteps = new()
    t = EACH.repeat(REMEMBERED_LOSSES)
    timesteps.observe(t, torch.where(t == 5, 1000.0, 0.0))
    timesteps.learn(alone)
    found, weight = shares(timesteps)
    assert float(weight.max()) == pytest.approx(1 / UNIFORM_SHARE, rel=1e-5)
    assert (found > 0).all()


def test_a_run_that_has_lost_nothing_goes_on_evenly():
    timesteps = new()
    timesteps.observe(EACH.repeat(REMEMBERED_LOSSES), torch.zeros(T * REMEMBERED_LOSSES))
    timesteps.learn(alone)
    found, weight = shares(timesteps)
    assert (found - 1 / T).abs().max() < 2 / 100_000
    assert (weight - 1).abs().max() < 1e-6


def test_a_moment_is_the_mean_at_first_and_forgets_later():
    timesteps = new(T=3)
    squares = torch.tensor([4.0, 1.0, 9.0, 0.25])
    for square in squares:
        timesteps.observe(torch.tensor([2]), square.sqrt().view(1))
        timesteps.learn(alone)
    assert timesteps.state["seen"].tolist() == [0, 4, 0]
    assert timesteps.state["second_moment"].tolist() == pytest.approx([0, float(squares.mean()), 0])
    # With 20 seen, five of 16.0 are half of what is remembered; and eleven of 100.0 are all of it.
    for count, value in ((16, math.sqrt(squares.mean())), (5, 4.0), (11, 10.0)):
        before = float(timesteps.state["second_moment"][1])
        timesteps.observe(torch.full((count,), 2), torch.full((count,), value))
        timesteps.learn(alone)
        kept = 1 - min(count / REMEMBERED_LOSSES, 1) if count != 16 else 0.0
        expected = kept * before + (1 - kept) * value**2
        assert float(timesteps.state["second_moment"][1]) == pytest.approx(expected, rel=1e-6)


def test_what_was_observed_counts_once():
    timesteps = taught()
    before = {name: value.clone() for name, value in timesteps.state.items()}
    timesteps.learn(alone)
    for name, value in timesteps.state.items():
        assert torch.equal(value, before[name])


def run(workers, steps=6, micro_images=5, shuffled=0):
    """Train on ``workers`` workers at once, each with its own Timesteps, and return the first's."""
    barrier, given = Barrier(workers), [torch.empty(0)] * workers
    generator = torch.Generator().manual_seed(shuffled)
    orders = [torch.randperm(BATCH, generator=generator) if shuffled else torch.arange(BATCH) for _ in range(steps)]

    def total_of(rank):
        def total(observed):
            given[rank] = observed.clone()
            barrier.wait(timeout=20)
            summed = torch.stack(given).sum(0)
            barrier.wait(timeout=20)
            return summed

        return total

    def work(rank):
        timesteps = new()
        for s in range(steps):
            mine = batch(s)[orders[s]][rank::workers]
            for micro in mine.split(micro_images):
                t, _ = timesteps.draw(1, micro)
                # The loss of an image is its own, wherever it is computed; of very different sizes.
                losses = loss(t) * normal(2, "loss", micro, ()).square() * torch.where(micro % 7 == 0, 300.0, 1.0)
                timesteps.observe(t, losses)
            timesteps.learn(total_of(rank))
        return timesteps

    with ThreadPoolExecutor(workers) as pool:
        all_of_them = list(pool.map(work, range(workers)))
    for other in all_of_them[1:]:
        assert_same(other, all_of_them[0])
    return all_of_them[0]


def assert_same(a, b):
    for name in ("second_moment", "seen"):
        assert torch.equal(a.state[name], b.state[name])
    for x, y in zip(a.draw(9, batch(50)), b.draw(9, batch(50)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("workers", "micro_images", "shuffled"), [(1, 64, 3), (2, 5, 0), (3, 1, 1), (8, 3, 2)])
def test_what_is_learned_is_the_same_to_the_bit_on_any_workers_in_any_order(workers, micro_images, shuffled):
    one = run(workers=1)
    assert int(one.state["seen"].min()) >= REMEMBERED_LOSSES  # so later steps drew where earlier losses sent them
    assert_same(run(workers, micro_images=micro_images, shuffled=shuffled), one)


def test_a_run_that_is_resumed_draws_and_learns_as_if_it_had_not_stopped():
    whole = taught()
    resumed = new()
    for name, value in whole.state.items():
        resumed.state[name].copy_(value)
    resumed.refresh()
    for s in range(4):
        for timesteps in (whole, resumed):
            t, _ = timesteps.draw(1, batch(s))
            timesteps.observe(t, loss(t) * (s + 1))
            timesteps.learn(alone)
        assert_same(resumed, whole)


def test_a_state_of_too_few_is_loaded_over_one_of_enough():
    timesteps = taught()
    for value in timesteps.state.values():
        value.zero_()
    timesteps.refresh()
    assert torch.equal(timesteps.draw(7, batch(3))[0], stratified(7, batch(3), BATCH, T))


def estimates(timesteps, batches=300):
    """The loss of each of many batches, of images whose losses vary around that of their t."""
    position = torch.arange(batches * timesteps.batch_images)
    t, weight = timesteps.draw(4, position)
    losses = loss(t) * normal(5, "loss", position, ()).double().square()
    return (weight * losses).view(batches, -1).mean(1)


@pytest.mark.parametrize("other", ["uniform", "stratified"])
def test_the_loss_is_estimated_without_bias_and_with_less_variance(other):
    aware, even = estimates(taught()), estimates(new(other))
    mean = float(loss(EACH.double()).mean())
    for means in (aware, even):
        assert abs(float(means.mean()) - mean) < 5 * float(means.std()) / math.sqrt(len(means))
    # Of draws each for itself: 3 (Σ f/T)² - m² against 3 Σ f²/T - m², m the mean of f, is 0.35. Even strata take the
    # variance between the t away from either side: 2 (Σ f/T)² against 2 Σ f²/T is 0.46.
    f = loss(EACH.double())
    power = float(f.square().mean())
    expected = 2 * mean**2 / ((3 * power - mean**2) if other == "uniform" else 2 * power)
    assert expected < 0.5
    assert float(aware.var() / even.var()) / expected == pytest.approx(1, abs=5 * math.sqrt(4 / len(aware)))


@pytest.mark.parametrize("kind", ["uniform", "stratified", "log-snr-normal"])
def test_the_other_kinds_learn_nothing_and_ask_no_worker(kind):
    def total(observed):
        raise AssertionError("workers were asked for a total")

    timesteps = new(kind)
    before = timesteps.draw(1, batch(0))
    timesteps.observe(EACH, loss(EACH))
    timesteps.learn(total)
    timesteps.refresh()
    assert all(torch.equal(a, b) for a, b in zip(timesteps.draw(1, batch(0)), before, strict=True))


@pytest.mark.parametrize("batch_images", [128, 8192, 65_536])
@pytest.mark.parametrize("loss", [1e4, math.inf, math.nan])
def test_a_batch_of_enormous_losses_at_one_t_does_not_overflow(batch_images: int, loss: float) -> None:
    timesteps = Timesteps(TimestepConfig(kind="loss-aware"), article(T, 0.6), batch_images, torch.device("cpu"))
    timesteps.observe(torch.full((batch_images,), 3), torch.full((batch_images,), loss))
    timesteps.observe(torch.arange(1, T + 1).repeat(REMEMBERED_LOSSES), torch.ones(T * REMEMBERED_LOSSES))
    timesteps.learn(lambda observed: observed)
    assert timesteps.state["second_moment"][2] == pytest.approx(1024, rel=0.1)
    t, weight = timesteps.draw(0, torch.arange(batch_images))
    assert weight.min() > 0 and weight.isfinite().all()
    assert set(t.tolist()) == set(range(1, T + 1))
