"""From a folder that holds hostile files, on a real S3 server behind a proxy that makes it fail: ingest and training,
killed and run again."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.presets import DIGITS
from pipelines import checkpoints
from pipelines.digits import write_digits
from pipelines.manifest import NAME, Manifest
from pipelines.parts import RECORDS
from pipelines.plan import Plan, window_batches
from pipelines.storage import Folder
from tests.faults.proxy import FaultProxy, Rule
from tests.jobs import recorded
from tests.pipelines.hostile import write_hostile
from tests.processes import CODE, kill, wait_for, without_ray

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's own dependencies
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SHORT = [
    "--fit.images=2560", "--fit.log-images=640", "--fit.checkpoint-images=640", "--fit.grid-images=2560",
    "--fit.warm-up-images=640", "--evaluate-images=0", "--data.builtin=none", "--data.side=8", "--data.zoom=1.25",
    "--data.crop=random", "--data.ingest.max-bad-share=0.1",
]  # fmt: skip


@pytest.fixture
def proxy(s3_server: str) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server) as proxy:
        yield proxy


@pytest.fixture
def raw(s3: Folder) -> tuple[Folder, set[str], set[str]]:
    """Digits and hostile files; which of them are pictures, and which look like pictures and are none."""
    write_digits(s3 / "raw")
    digits = {found.name for found in (s3 / "raw").find()}
    cases = write_hostile(s3 / "raw" / "0")
    good = {f"0/{name}" for name, case in cases.items() if case.pixels is not None}
    return s3 / "raw", digits | good, {f"0/{name}" for name in cases} - good


def start(endpoint: str, *command: str) -> subprocess.Popen[str]:
    environment = without_ray() | {"AWS_ENDPOINT_URL": endpoint, "BRICKYARD_ANSWER_S": "3"}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=CODE, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int = 0) -> dict[str, Any]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err[-5000:]
    (line,) = out.splitlines()
    return json.loads(line)  # type: ignore[no-any-return]


def paths(folder: Folder, shard: str) -> list[str]:
    return pq.read_table(io.BytesIO(folder.get(shard)), columns=["path"])["path"].to_pylist()  # type: ignore[no-any-return]


def kill_when(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    wait_for(condition, process)
    kill(process)


def test_from_hostile_files_on_s3_to_a_trained_network(
    raw: tuple[Folder, set[str], set[str]], s3: Folder, proxy: FaultProxy, tmp_path: Path
) -> None:
    source, pictures, broken = raw
    out = s3 / "data"
    proxy.rules = [Rule("503", method="GET", every=23), Rule("reset", method="GET", every=31),
                   Rule("truncated", method="GET", every=41), Rule("500", method="PUT", every=7)]  # fmt: skip

    ingest = ["jobs/ingest.py", "--source", source.url, "--out", out.url, "--ingest.encoding=keep", "--ingest.side=0",
              "--ingest.channels=1", "--ingest.shard-rows=150", "--ingest.max-bad-share=0.1"]  # fmt: skip
    kill_when(lambda: len((out / RECORDS).names()) >= 2, start(proxy.url, *ingest))
    assert not out.exists(NAME)
    said = finish(start(proxy.url, *ingest))
    assert said["storage_retries"] > 0
    assert (said["images"], said["quarantined"]) == (len(pictures), len(broken))
    manifest = Manifest.load(out)
    stored = [path for shard in manifest.shards for path in paths(out, shard.name)]
    assert len(stored) == len(pictures) and set(stored) == pictures, "each once"
    listed = [json.loads(line) for line in out.get("quarantine.jsonl").splitlines()]
    assert len(listed) == len(broken) and {entry["path"] for entry in listed} == broken
    assert all(entry["reason"] for entry in listed)
    before = {found.name: found.version for found in out.find()}
    assert finish(start(proxy.url, *ingest))["digest"] == said["digest"]
    assert {found.name: found.version for found in out.find()} == before, "a finished ingest writes nothing"

    flags = ["digits", *SHORT, f"--data.url={out.url}", f"--root={s3.url}/yard",
             f"--tracking.uri=sqlite:///{tmp_path}/mlflow.db"]  # fmt: skip
    (tmp_path / "handed").mkdir()
    train = ["-m", "tests.jobs.recorded", f"{tmp_path}/handed", "-1", *flags]
    run = s3 / "yard" / "runs" / "digits"
    kill_when(lambda: checkpoints.newest(run) is not None, start(proxy.url, *train))
    # Another number of workers: the same stream, dealt otherwise.
    said = finish(start(proxy.url, *train, "--scaling.workers=1"))
    attempts = recorded.written(tmp_path / "handed")
    assert [attempt.world for attempt in attempts.values()] == [2, 1]
    assert max(max(attempt.ledger) for attempt in attempts.values()) == 2559
    rows = 128 * window_batches(DIGITS.data.window_bytes, manifest.row_bytes, 128)
    recorded.check_ids(attempts, Plan(0, manifest.rows, manifest.row_group_rows, rows))
    # What was on its way to storage at the blow may still have arrived: one checkpoint, or two.
    assert said["images"] == 2560 and said["trained_images"] in (2560 - 640, 2560 - 1280, 2560 - 1920)
    assert said["images_replaced"] == 0
    assert said["storage_retries"] > 0
    assert {"503", "reset", "500"} <= set(proxy.injected)

    # The data are not what they were: the run is refused.
    shard = manifest.shards[0].name
    out.put(shard, out.get(shard)[:-1])
    error = finish(start(proxy.url, "jobs/train.py", *flags, "--fit.images=3200"), code=3)["error"]
    assert shard in error and "ingest the data again" in error


def expire(train: list[str], proxy: FaultProxy, *rules: Rule) -> tuple[str, str]:
    """Run into expired credentials; what the job says of it, and all that it said."""
    proxy.rules = [*rules]
    process = start(proxy.url, *train)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 75, err[-5000:]
    proxy.rules = []
    return json.loads(out)["error"], err


def test_raw_files_train_where_they_are_and_credentials_expire(
    raw: tuple[Folder, set[str], set[str]], s3: Folder, proxy: FaultProxy
) -> None:
    source, _, broken = raw
    train = ["jobs/train.py", "digits", *SHORT, f"--data.url={source.url}", f"--root={s3.url}/yard",
             "--tracking.uri=none", "--data.ingest.encoding=in-place", "--data.ingest.side=0",
             "--data.window-bytes=1"]  # fmt: skip
    way_out = "the credentials have expired (ExpiredToken): renew them and run the same command; it goes on from there"

    error, err = expire(train, proxy, Rule("expired"))
    assert error.endswith(way_out) and "workers train" not in err
    # In a task of an ingest, which reads what this process has only listed.
    ingest = ["jobs/ingest.py", "--source", source.url, "--out", f"{s3.url}/data", "--ingest.encoding=keep",
              "--ingest.side=0", "--ingest.max-bad-share=0.1"]  # fmt: skip
    error, err = expire(ingest, proxy, Rule("expired", method="GET", path=r"/raw/\d/.*png"))
    assert re.search(r"/raw/\d/.*png", error) and way_out in error and "parts" in err
    assert not (s3 / "data").exists(NAME)
    # In the middle of the stream, and again of all checkpoints from one on: the first is said, the second is the end.
    # The workers are not started once more to meet the same.
    for read_or_write in (
        Rule("expired", method="GET", path=r"/raw/\d/.*png", after=500, status=403),
        Rule("expired", method="PUT", path=r"/checkpoint-0+(1280|1920|2560)/"),
    ):
        error, err = expire(train, proxy, read_or_write)
        assert re.search(read_or_write.path, error) and way_out in error
        assert err.count("2 workers train from 0 images on") == 1 == err.count("workers train from")

    said = finish(start(proxy.url, *train))
    assert (said["images"], said["trained_images"]) == (2560, 2560 - 640)
    # What cannot be used costs itself each time that it is met, and is listed once.
    (data,) = (s3 / "yard" / "data").names()
    manifest = Manifest.load(s3 / "yard" / "data" / data)
    at_once = (s3 / "yard" / "data" / data).get("quarantine.jsonl").splitlines()  # by their size, when they were listed
    bad = [int(name.removesuffix(".json")) for name in (s3 / "yard" / "runs" / "digits" / "quarantine").names()]
    assert len(at_once) + len(bad) == len(broken)
    met = Plan(0, manifest.rows, manifest.row_group_rows, 128).rows(640, 2560)
    assert said["images_replaced"] == np.isin(met, bad).sum() > 0
