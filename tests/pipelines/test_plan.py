import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.plan import Plan

plans = st.builds(
    Plan,
    seed=st.integers(0, 5),
    N=st.integers(1, 700),
    chunk_rows=st.integers(3, 60),
    window_chunks=st.integers(2, 9),
)


@given(plan=plans, epoch=st.integers(0, 3))
def test_an_epoch_has_each_row_once(plan: Plan, epoch: int) -> None:
    rows = plan.rows(epoch * plan.N, (epoch + 1) * plan.N)
    assert sorted(rows) == list(range(plan.N))


@given(plan=plans, data=st.data())
def test_any_stretch_reads_as_it_does_within_the_whole(plan: Plan, data: st.DataObject) -> None:
    whole = plan.rows(0, 3 * plan.N)
    start = data.draw(st.integers(0, 3 * plan.N))
    stop = data.draw(st.integers(start, 3 * plan.N))
    assert np.array_equal(plan.rows(start, stop), whole[start:stop])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = Plan(0, 1797, 128, 16), Plan(1, 1797, 128, 16)
    orders = [first.rows(0, 1797), first.rows(1797, 2 * 1797), second.rows(0, 1797)]
    for i, a in enumerate(orders):
        for b in orders[i + 1 :]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.1
        assert abs(np.corrcoef(a, np.arange(1797))[0, 1]) < 0.1


def test_a_window_touches_no_more_chunks_than_it_has() -> None:
    plan = Plan(0, 10_000, 100, 5)
    for window in range(20):
        rows = plan.rows(window * 500, (window + 1) * 500)
        assert len(np.unique(rows // 100)) == 5


def test_reading_in_a_billion_takes_the_memory_of_a_window() -> None:
    plan = Plan(0, 10**9, 1024, 8)
    tracemalloc.start()
    rows = plan.rows(5 * 10**9 - 2000, 5 * 10**9 + 2000)  # across the end of an epoch
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(rows[:2000])) == 2000
    assert rows.max() < 10**9
    assert peak < 8 << 20
