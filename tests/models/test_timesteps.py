"""t covers 1..T evenly in every global batch, and each slot's t is uniform and known to any worker."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from models.timesteps import stratified


def global_batch(s, batch_images):
    return torch.arange(s * batch_images, (s + 1) * batch_images)


@settings(deadline=None, derandomize=True, max_examples=100)
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
