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
from collections.abc import Callable, Iterator
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

pytestmark = pytest.mark.ray
CODE = Path(__file__).parents[2]


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
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.pipelines.ledger", data.url, str(out), str(workers), str(at)],
        cwd=CODE, env=environment | {"AWS_ENDPOINT_URL": endpoint, "BRICKYARD_ANSWER_S": "2"}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-5000:]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read()[-5000:]  # type: ignore[union-attr]
        assert time.monotonic() < end, "the moment to strike never came"
        time.sleep(0.01)


def reading(session: int) -> list[int]:
    """The processes of a run that read a window right now."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            reads = entry.name.isdigit() and b"ReadWindow" in (entry / "cmdline").read_bytes()
            if reads and int((entry / "stat").read_text().rsplit(")", 1)[1].split()[3]) == session:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_storage_that_fails_and_tasks_that_die_change_nothing(
    data: Folder, expected: dict[int, ledger.Entry], proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.rules = [
        Rule("500", method="GET", every=7),
        Rule("503", method="GET", every=11),
        Rule("429", method="GET", every=13),
        Rule("reset", method="GET", every=17),
        Rule("truncated", method="GET", every=19),
        Rule("slow", method="GET", every=101, slow_s=4),
    ]
    process = start(data, tmp_path, 3, 0, proxy.url)
    for _ in range(2):
        wait_for(lambda: bool(reading(process.pid)), process)
        os.kill(reading(process.pid)[0], signal.SIGKILL)
        time.sleep(0.5)
    finish(process)
    assert ledger.written(tmp_path) == expected
    assert set(proxy.injected) >= {"500", "503", "429", "reset", "truncated"}
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
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        else:
            finish(process)
        # What a checkpoint would hold: the global batches that all workers have done.
        done = ledger.written(out)
        while at < ledger.STOP and all(position in done for position in range(at, at + ledger.BATCH)):
            whole |= {position: done[position] for position in range(at, at + ledger.BATCH)}
            at += ledger.BATCH
    assert whole == expected
