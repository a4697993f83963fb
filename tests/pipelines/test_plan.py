import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.noise import words
from pipelines.plan import MAX_WINDOW_ROWS, Plan, held_out_rows, uniforms, window_batches

plans = st.builds(
    Plan,
    seed=st.integers(0, 5),
    N=st.integers(1, 400),
    chunk_rows=st.integers(1, 60),
    window_rows=st.integers(10, 500),
)


@given(plan=plans, epoch=st.integers(0, 3))
def test_an_epoch_has_each_row_once(plan: Plan, epoch: int) -> None:
    rows = plan.rows(epoch * plan.N, (epoch + 1) * plan.N)
    assert sorted(rows) == list(range(plan.N))


@given(plan=plans, data=st.data())
def test_what_is_held_out_is_in_no_epoch_and_the_others_are_once_in_each(plan: Plan, data: st.DataObject) -> None:
    plan = replace(plan, held_out=data.draw(st.integers(0, plan.N - 1)))
    held = set(held_out_rows(plan.N, plan.held_out).tolist())
    assert len(held) == plan.held_out
    rows = plan.rows(0, 3 * plan.n)
    for epoch in range(3):
        assert sorted(rows[epoch * plan.n : (epoch + 1) * plan.n].tolist()) == sorted(set(range(plan.N)) - held)
    start = data.draw(st.integers(0, 3 * plan.n))
    assert np.array_equal(plan.rows(start, 3 * plan.n), rows[start:])


def test_what_is_held_out_stands_for_the_whole_of_a_sorted_data_set() -> None:
    label = np.arange(10_000) * 10 // 10_000
    assert np.bincount(label[held_out_rows(10_000, 500)]).tolist() == [50] * 10
    assert np.ptp(np.bincount(label[held_out_rows(10_000, 333)])) <= 2
    assert len(set(np.diff(held_out_rows(10_000, 500)).tolist())) > 10, "at no fixed distance: data may have a rhythm"


def test_what_is_held_out_is_the_same_for_every_seed() -> None:
    assert np.array_equal(Plan(0, 1000, 8, 64, held_out=50).held, Plan(1, 1000, 8, 64, held_out=50).held)


@given(plan=plans, data=st.data())
def test_any_stretch_reads_as_it_does_within_the_whole(plan: Plan, data: st.DataObject) -> None:
    whole = plan.rows(0, 3 * plan.N)
    start = data.draw(st.integers(0, 3 * plan.N))
    stop = data.draw(st.integers(start, 3 * plan.N))
    assert np.array_equal(plan.rows(start, stop), whole[start:stop])


@given(plan=plans)
def test_a_chunk_that_a_cut_goes_through_lies_in_neighbouring_windows(plan: Plan) -> None:
    rows = plan.rows(0, plan.N)
    windows = [set(rows[at : at + plan.window_rows] // plan.chunk_rows) for at in range(0, plan.N, plan.window_rows)]
    for chunk in range(-(-plan.N // plan.chunk_rows)):
        inside = [i for i, chunks in enumerate(windows) if chunk in chunks]
        assert inside == list(range(inside[0], inside[-1] + 1))
        assert all(windows[i] == {chunk} for i in inside[1:-1])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = Plan(0, 1797, 128, 2048), Plan(1, 1797, 128, 2048)
    orders = [first.rows(0, 1797), first.rows(1797, 2 * 1797), second.rows(0, 1797)]
    for i, a in enumerate(orders):
        for b in orders[i + 1 :]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.1
        assert abs(np.corrcoef(a, np.arange(1797))[0, 1]) < 0.1


def test_a_window_is_shuffled_anew_in_each_epoch() -> None:
    plan = Plan(0, 128, 128, 128)  # one chunk, one window: only the order within is left to differ
    orders = [plan.rows(128 * epoch, 128 * (epoch + 1)).tolist() for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_window_touches_the_chunks_that_it_has_and_at_most_one_more() -> None:
    plan = Plan(0, 10_000, 100, 512)
    touched = [len(np.unique(plan.rows(at, min(at + 512, 10_000)) // 100)) for at in range(0, 10_000, 512)]
    assert max(touched) <= 7  # 5.12 chunks, cut at either end
    assert sum(touched) <= 100 + len(touched)  # a cut makes one chunk be read twice


def test_chunks_of_which_nothing_is_held_out_stay_whole() -> None:
    """A window reads about as many row groups as without, not two for each chunk."""
    plan = Plan(0, 100_000, 100, 512, held_out=100)
    touched = [len(np.unique(plan.rows(at, min(at + 512, plan.n)) // 100)) for at in range(0, plan.n, 512)]
    assert sum(touched) <= 1000 + 100 + len(touched)


def test_reading_in_a_billion_takes_the_memory_of_a_window() -> None:
    plan = Plan(0, 10**9, 1024, 8192, held_out=10_000)
    tracemalloc.start()
    rows = plan.rows(5 * plan.n - 2000, 5 * plan.n + 2000)  # across the end of an epoch
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(rows[:2000])) == 2000
    assert rows.max() < 10**9
    assert peak < 8 << 20


def test_a_window_mixes_as_a_full_shuffle_would() -> None:
    """How many of 64 labels meet in a batch of 64, beside a full shuffle, of a data set that lies sorted by label.

    That is the worst case: an ingest shuffles the files first. 128 chunks make a window here, so some labels are absent
    from it, and a batch has 95 % of the entropy that it could have.
    """
    N, labels = 65_536, 64
    label = np.arange(N) * labels // N
    shuffled = np.random.default_rng(0).permutation(label)
    planned = label[Plan(0, N, 16, 2048).rows(0, N)]
    entropies = [np.mean([entropy(order[i : i + 64]) for i in range(0, N, 64)]) for order in (planned, shuffled)]
    assert entropies[0] > 0.94 * entropies[1]


def entropy(labels: np.ndarray) -> float:
    """In bits, of the labels of a batch."""
    _, counts = np.unique(labels, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


@pytest.mark.parametrize("image_bytes", [64, 12_288, 196_608, 50_000_000])
@pytest.mark.parametrize("batch_images", [1, 64, 384, 10_000])
def test_a_window_is_a_power_of_two_of_batches_within_its_bytes(image_bytes: int, batch_images: int) -> None:
    n = window_batches(32 << 20, image_bytes, batch_images)
    assert n & (n - 1) == 0
    rows = n * batch_images
    assert n == 1 or (rows * image_bytes <= 32 << 20 and rows <= MAX_WINDOW_ROWS)
    assert 2 * rows * image_bytes > 32 << 20 or 2 * rows > MAX_WINDOW_ROWS


def test_uniforms_are_the_words_of_the_noise() -> None:
    position = np.array([0, 1, 77, 2**33 + 5])
    drawn = words(3, "crop", torch.from_numpy(position), step=0, blocks=1)
    expected = torch.cat(drawn[:2], dim=1).numpy() * 2.0**-32
    assert np.array_equal(uniforms(3, "crop", position), expected)


def test_fewer_images_than_a_batch_come_up_again_epoch_by_epoch() -> None:
    """The rule: a batch may hold several epochs; none is padded, and no image is left out."""
    rows = Plan(0, 5, 4, 512).rows(0, 32)
    epochs = [sorted(rows[first : first + 5].tolist()) for first in range(0, 30, 5)]
    assert epochs == [[0, 1, 2, 3, 4]] * 6
