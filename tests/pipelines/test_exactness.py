"""The stream under fire: what is killed, and what storage does, costs time and nothing else.

From a real S3 server, behind a proxy that makes it fail; the ledger of each run, ids and pixels, is held against one
that was made without Ray.
"""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from pipelines.ingest import ingest
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.storage import Folder
from tests.faults.proxy import FaultProxy, Rule
from tests.pipelines import ledger
from tests.processes import CODE, kill, of_session, wait_for, without_ray

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def data(s3_server: str) -> Folder:
    """200 photographs as JPEG files on S3, ingested as they are."""
    source, out = Folder("s3://yard/exactness/raw"), Folder("s3://yard/exactness/data")
    photographs = [np.asarray(image) for image in load_sample_images().images]
    for i in range(200):
        top, left = 7 * i % 100, 13 * i % 200
        buffer = io.BytesIO()
        Image.fromarray(photographs[i % 2][top : top + 300, left : left + 400]).save(buffer, "JPEG", quality=90)
        source.put(f"{i % 5}/photograph {i}.jpg", buffer.getvalue())
    ingest(IngestPlan.make(source, out, IngestConfig(side=0, encoding="keep", row_group_rows=8)))
    return out


@pytest.fixture(scope="module")
def expected(data: Folder) -> dict[int, ledger.Entry]:
    whole = ledger.expected(data)
    assert sorted(whole) == list(range(ledger.STOP))
    return whole


@pytest.fixture
def proxy(s3_server: str) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server) as proxy:
        yield proxy


def start(data: Folder, out: Path, workers: int, at: int, endpoint: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.pipelines.ledger", data.url, str(out), str(workers), str(at)],
        cwd=CODE, env=without_ray() | {"AWS_ENDPOINT_URL": endpoint, "BRICKYARD_ANSWER_S": "6"}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-5000:]


def test_storage_that_fails_and_tasks_that_die_change_nothing(
    data: Folder, expected: dict[int, ledger.Entry], proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.rules = [
        Rule("500", method="GET", every=7),
        Rule("503", method="GET", every=11),
        Rule("429", method="GET", every=13),
        Rule("reset", method="GET", every=17),
        Rule("truncated", method="GET", every=19),
        Rule("slow", method="GET", every=101, slow_s=8),
    ]
    process = start(data, tmp_path, 3, 0, proxy.url)
    for _ in range(2):
        found: list[int] = []
        wait_for(lambda found=found: found.extend(of_session(process.pid, b"ReadWindow")) or bool(found), process)
        os.kill(found[0], signal.SIGKILL)
        time.sleep(0.5)
    finish(process)
    assert ledger.written(tmp_path) == expected
    assert set(proxy.injected) == {"500", "503", "429", "reset", "truncated", "slow"}
    assert 0 < ledger.retried(tmp_path) <= sum(proxy.injected.values())


def test_a_driver_that_is_killed_goes_on_with_other_numbers_of_workers(
    data: Folder, expected: dict[int, ledger.Entry], s3_server: str, tmp_path: Path
) -> None:
    whole: dict[int, ledger.Entry] = {}
    for workers in (4, 2, 3):
        at, out = len(whole), tmp_path / f"{workers} workers"
        process = start(data, out, workers, at, s3_server)
        if workers != 3:
            wait_for(lambda out=out: out.exists() and len(ledger.written(out)) >= 9 * ledger.BATCH, process)
            kill(process)
        else:
            finish(process)
        # What a checkpoint would hold: the global batches that all workers have done.
        done = ledger.written(out)
        while at < ledger.STOP and all(position in done for position in range(at, at + ledger.BATCH)):
            whole |= {position: done[position] for position in range(at, at + ledger.BATCH)}
            at += ledger.BATCH
    assert whole == expected
