"""A consumer that stands still is not read for without end: what waits for it is bounded by memory, not by the run."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from pipelines.digits import write_digits
from pipelines.images import View
from pipelines.ingest import ingest
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.plan import Plan
from pipelines.storage import Folder
from pipelines.stream import Deal, ReadWindow, batches, open_stream

pytestmark = pytest.mark.ray

STORE = 96 << 20
"""Bytes of the object store."""
BATCH, WINDOWS = 64, 150
VIEW = View(side=128, channels=3)
WINDOW_BYTES = 4 * BATCH * 128 * 128 * 3  # 12 MB, of 1.9 GB in all


class Counted(ReadWindow):
    """Leaves a file behind for each window that it begins."""

    def read(self, window: int) -> Iterator[dict[str, Any]]:
        self.quarantine.put(f"{window}", b"")
        return super().read(window)


@pytest.fixture
def small_cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=3, object_store_memory=STORE, include_dashboard=False, log_to_driver=False,
             logging_level="ERROR")  # fmt: skip
    yield
    ray.shutdown()


def test_what_is_read_ahead_is_bounded(tmp_path: Path, alone: None, small_cluster: None) -> None:
    write_digits(Folder(f"{tmp_path}/raw"))
    data, begun = Folder(f"{tmp_path}/data"), Folder(f"{tmp_path}/begun")
    manifest = ingest(IngestPlan.make(Folder(f"{tmp_path}/raw"), data, IngestConfig(side=8, channels=1)))
    deal = Deal(start=0, stop=WINDOWS * 4 * BATCH, batch_images=BATCH, micro_images=BATCH, window_batches=4,
                image_bytes=128 * 128 * 3)  # fmt: skip
    plan = Plan(0, manifest.rows, manifest.row_group_rows, 4 * BATCH)
    read = Counted(data, manifest, plan, deal, VIEW, random_crop=False, max_bad_share=0.0, quarantine=begun)
    (shard,) = open_stream(read).streaming_split(1, equal=True)
    stream = batches(shard, deal, 0, 1)
    assert np.array_equal(next(stream).row, plan.rows(0, BATCH))

    # It stands still, until nobody has begun another window for a while.
    seen, since = -1, time.monotonic()
    while time.monotonic() < since + 4:
        if (now := len(begun.names())) != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.1)
    # All that is decoded lies in the store, or is one window in the hands of each of three tasks.
    assert seen <= STORE / WINDOW_BYTES + 3 < WINDOWS / 10

    # It goes on, and so do they.
    while len(begun.names()) <= 2 * seen:
        next(stream)

    # Who reads no further leaves no thread of Ray's behind, that the end of the cluster would surprise in a wait.
    stream.close()
    for thread in threading.enumerate():
        if thread.name == "iter_threaded":
            thread.join(timeout=60)
            assert not thread.is_alive()
