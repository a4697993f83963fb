"""t covers 1..T evenly in every global batch, and each slot's t is uniform and known to any worker."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from models.noise import words
from models.schedule import article
from models.timesteps import TimestepConfig, Timesteps, edges, stratified, stratified_by, uniform


def global_batch(s, batch_images):
    return torch.arange(s * batch_images, (s + 1) * batch_images)


@settings(max_examples=100)
@given(
    seed=st.integers(),
    s=st.integers(0, 1 << 40),
    batch_images=st.integers(1, 300),
    T=st.one_of(st.integers(1, 2000), st.just((1 << 31) - 1)),
)
def test_each_global_batch_has_one_t_in_each_stratum(seed, s, batch_images, T):
    t = stratified(seed, global_batch(s, batch_images), batch_images, T).sort().values
    for j, value in enumerate(t.tolist()):  # the j-th smallest is 1 + ⌊(j + u) T/B⌋ for a u in [0, 1)
        assert 1 + j * T // batch_images <= value <= -(-(j + 1) * T // batch_images)


@pytest.mark.parametrize(("T", "batch_images"), [(1, 7), (10, 10), (10, 30), (16, 64), (250, 1000), (1000, 1000)])
def test_a_batch_of_a_multiple_of_T_has_each_t_equally_often(T, batch_images):
    for s in range(5):
        t = stratified(0, global_batch(s, batch_images), batch_images, T)
        assert t.bincount().tolist() == [0] + [batch_images // T] * T


def test_no_stratum_leaks_into_its_neighbour():
    # A draw that sits on the edge of its stratum: one in 10⁷, so the seed and the batch were searched for.
    t = stratified(0, global_batch(16, 300_000), 300_000, 1000)
    assert t.bincount().tolist() == [0] + [300] * 1000


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_workers_find_the_same_t_in_any_order(workers):
    batch_images, position = 24, torch.arange(7, 7 + 24 * 5)  # not aligned with the batches
    whole = stratified(3, position, batch_images, 1000)
    order = torch.randperm(len(position), generator=torch.Generator().manual_seed(workers))
    again = torch.empty_like(whole)
    for w in range(workers):
        mine = order[w::workers]
        again[mine] = stratified(3, position[mine], batch_images, 1000)
    assert torch.equal(again, whole)


def test_an_image_alone_has_the_t_that_it_has_in_its_batch():
    position = global_batch(9, 32)
    whole = stratified(3, position, 32, 1000)
    alone = torch.cat([stratified(3, position[i : i + 1], 32, 1000) for i in range(32)])
    assert torch.equal(alone, whole)


def test_t_is_uniform():
    T, batch_images = 50, 32
    t = stratified(1, torch.arange(40_000), batch_images, T)
    assert t.dtype == torch.int64
    assert stats.chisquare(t.bincount(minlength=T + 1)[1:].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("slot", [0, 15])
def test_t_is_uniform_in_each_slot(slot):
    T, batch_images = 20, 16
    t = stratified(2, torch.arange(slot, 16 * 1000, 16), batch_images, T)
    assert stats.chisquare(t.bincount(minlength=T + 1)[1:].numpy()).pvalue > 1e-3


def test_t_is_uniform_within_its_stratum():
    T, batch_images = 1000, 10
    t = stratified(3, torch.arange(10_000), batch_images, T)
    assert stats.chisquare(((t - 1) % (T // batch_images)).bincount(minlength=100).numpy()).pvalue > 1e-3


def test_t_knows_nothing_of_its_slot_nor_of_the_batch_before():
    batches, batch_images = 1000, 32
    t = stratified(4, torch.arange(batches * batch_images), batch_images, 1000).view(batches, batch_images).double()
    slot = torch.arange(batch_images).expand_as(t).double()
    bound = 5 / math.sqrt(t.numel())
    assert abs(float(torch.corrcoef(torch.stack([t.flatten(), slot.flatten()]))[0, 1])) < bound
    assert abs(float(torch.corrcoef(torch.stack([t[1:].flatten(), t[:-1].flatten()]))[0, 1])) < bound


@pytest.mark.parametrize("first", [0, 1 << 32, (1 << 40) + 123, 1 << 60])
def test_batches_differ_and_so_do_seeds_however_late_in_the_run(first):
    s = first // 64
    here = stratified(0, global_batch(s, 64), 64, 1000)
    others = [stratified(0, global_batch(s + later, 64), 64, 1000) for later in (1, 1 << 16, 1 << 32)]
    others.append(stratified(1, global_batch(s, 64), 64, 1000))
    for other in others:
        # Another deal of the strata, not only another draw within each.
        assert not torch.equal(here.argsort(), other.argsort())


KINDS = ("uniform", "stratified", "loss-aware", "log-snr-normal")


def ready(kind, T=100, batch_images=24):
    """Draws of a kind on the article's T; one that learns has learned that the loss falls like 1/t."""
    timesteps = Timesteps(TimestepConfig(kind=kind), article(T), batch_images, torch.device("cpu"))
    t = torch.arange(1, T + 1).repeat(10)
    timesteps.observe(t, 1 / t)
    timesteps.learn(lambda of_one_worker: of_one_worker)
    return timesteps


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_function_of_the_position(kind, workers):
    timesteps, position = ready(kind), torch.arange(7, 7 + 24 * 5)  # not aligned with the batches
    t, weight = timesteps.draw(3, position)
    assert (t.dtype, weight.dtype) == (torch.int64, torch.float64)
    assert int(t.min()) >= 1
    assert int(t.max()) <= 100
    order = torch.randperm(len(position), generator=torch.Generator().manual_seed(workers))
    for w in range(workers):
        mine = order[w::workers]
        t_mine, weight_mine = ready(kind).draw(3, position[mine])
        assert torch.equal(t_mine, t[mine])
        assert torch.equal(weight_mine, weight[mine])


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_and_another_stretch_of_the_run_draw_otherwise(kind):
    timesteps, position = ready(kind), torch.arange(240)
    drawn = [timesteps.draw(seed, position + first)[0] for seed, first in ((3, 0), (4, 0), (3, 240), (3, 240 << 32))]
    for i, j in itertools.combinations(range(4), 2):
        assert (drawn[i] == drawn[j]).double().mean() < 0.5
    assert torch.equal(timesteps.draw(3, position)[0], drawn[0])  # drawing changes nothing


@pytest.mark.parametrize("kind", ["uniform", "stratified", "log-snr-normal"])
def test_only_draws_that_must_be_made_up_for_have_a_weight_and_a_state(kind):
    timesteps = ready(kind)
    assert (timesteps.draw(3, torch.arange(240))[1] == 1).all()
    assert timesteps.state == {}


def test_the_default_is_stratified():
    assert TimestepConfig().kind == "stratified"
    assert torch.equal(ready("stratified").draw(3, torch.arange(99))[0], stratified(3, torch.arange(99), 24, 100))


def test_independent_draws_are_uniform_and_independent():
    T, n = 50, 40_000
    t = uniform(1, torch.arange(n), T)
    assert stats.chisquare(t.bincount(minlength=T + 1)[1:].numpy()).pvalue > 1e-3
    pairs = (t[:-1:2] - 1) // 5 * 10 + (t[1::2] - 1) // 5
    assert stats.chisquare(pairs.bincount(minlength=100).numpy()).pvalue > 1e-3
    # Batches are left to chance, unlike the stratified ones: counts of a batch spread as a multinomial's.
    counts = torch.stack([batch.bincount(minlength=T + 1)[1:] for batch in t.view(-1, 500)]).double()
    assert float(counts.var(0).mean()) == pytest.approx(500 / T * (1 - 1 / T), rel=0.2)


@pytest.mark.parametrize("T", [1, 2, 7, 100_000])
def test_independent_draws_reach_both_ends_and_no_further(T):
    t = uniform(0, torch.arange(1000 if T < 10 else 500_000), T)
    assert (int(t.min()), int(t.max())) == (1, T)


@pytest.mark.parametrize("T", [1, 2, 64, 1024])
def test_a_distribution_that_is_even_gives_the_t_of_the_even_draws(T):
    # Where 2³² is a multiple of T the ends are exact, and so are the draws.
    position = torch.arange(11, 500)
    even = edges(torch.full((T,), 1 / T, dtype=torch.float64))
    assert torch.equal(stratified_by(even, 5, position, 48), stratified(5, position, 48, T))


@settings(max_examples=60)
@given(
    seed=st.integers(),
    batch_images=st.integers(1, 300),
    masses=st.lists(st.floats(1e-3, 10), min_size=1, max_size=60),
)
def test_each_global_batch_covers_any_distribution_evenly(seed, batch_images, masses):
    # At most one draw more or less than its share ends below each t, and none is beyond the last.
    ends = edges(torch.tensor(masses).double())
    t = stratified_by(ends, seed, global_batch(5, batch_images), batch_images)
    below = t.bincount(minlength=len(masses) + 1)[1:].cumsum(0)
    assert ((below - ends.double() * 2.0**-32 * batch_images).abs() < 1).all()
    assert int(below[-1]) == batch_images


def test_a_draw_on_the_very_edge_is_of_the_t_that_begins_there():
    # One draw in 2³²: so the edge is put where the draw is.
    position = torch.tensor([77])
    word = int(words(0, "t", position, step=0, blocks=1)[0])
    for end, t in ((word, 2), (word + 1, 1)):
        assert stratified_by(torch.tensor([end, 1 << 32]), 0, position, batch_images=1).tolist() == [t]


def test_the_largest_batches_and_the_longest_runs_do_not_overflow():
    batch_images = (1 << 20) - 1
    ends = edges(torch.tensor([0.25, 0.5, 0.25]).double())
    t = stratified_by(ends, 0, global_batch(1 << 40, batch_images), batch_images)
    assert (t.bincount()[1:] - torch.tensor([0.25, 0.5, 0.25]) * batch_images).abs().max() <= 1
