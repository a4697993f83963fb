import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before Ray is imported: the tests are not its field study, and warnings of its own future are not ours to mend.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:  # the tests of the mathematics run where none of the rest is installed
    from pipelines.storage import Folder

settings.register_profile("brickyard", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("brickyard")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """One Ray for the tests of a file; other files may start clusters of their own, one at a time."""
    import ray

    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def free_ports(several: int) -> int:
    """The first of several ports in a row that nobody listens on; below those that the system deals out."""
    for first in range(20000 + os.getpid() % 500 * several % 10000, 32000, several):
        try:
            for port in range(first, first + several):
                with socket.socket() as taken:
                    taken.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a real S3 server with an empty bucket `yard`; the environment of this process knows it."""
    from pipelines.s3 import filesystem

    script = Path(__file__).parents[1] / "infra" / "local" / "s3.sh"
    where = [str(tmp_path_factory.mktemp("s3")), str(free_ports(13))]
    context = pytest.MonkeyPatch()
    try:
        done = subprocess.run([script, "up", *where], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        for name, value in re.findall(r"(AWS_\w+)=(\S+)", done.stdout):
            context.setenv(name, value)
        context.delenv("AWS_ENDPOINT_URL_S3", raising=False)
        filesystem().mkdir("yard")
        yield os.environ["AWS_ENDPOINT_URL"]
    finally:
        context.undo()
        subprocess.run([script, "wipe", *where], check=True)


@pytest.fixture(scope="session")
def patient() -> Iterator[None]:
    """From the first server of the session on, this process and its children wait longer for one than jobs do: it may
    be busy, and is not to be taken for away."""
    from pipelines import tracking

    with pytest.MonkeyPatch.context() as context:
        context.setattr(tracking, "SERVER_PATIENCE_S", 60.0)
        context.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
        yield


@pytest.fixture(scope="session")
def mlflow_on_sqlite(tmp_path_factory: pytest.TempPathFactory, patient: None) -> Iterator[str]:
    """The address of an MLflow server on SQLite, without users: several times faster than the one below."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_ports(1)
    url = f"http://127.0.0.1:{port}"
    where = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]
    command = [sys.executable, "-m", "mlflow", "server", *where, "--port", str(port), "--workers", "1"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 120
        while not answers(f"{url}/api/2.0/mlflow/experiments/search?max_results=1"):  # it opens its database
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-3000:]
            time.sleep(0.1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def need_postgres() -> None:
    """Leave the test out where there is no PostgreSQL, but not where all is to be tested."""
    if not (any(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or shutil.which("initdb") or os.environ.get("CI")):
        pytest.skip("there is no PostgreSQL: apt-get install postgresql")


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, s3_server: str, patient: None) -> Iterator[str]:
    """The address of a real MLflow server, on PostgreSQL and S3; the environment of this process has its password."""
    need_postgres()
    script = Path(__file__).parents[1] / "infra" / "local" / "mlflow.sh"
    where = [str(tmp_path_factory.mktemp("mlflow")), str(free_ports(2))]
    context = pytest.MonkeyPatch()
    try:
        context.setenv("MLFLOW_BIN", str(Path(sys.executable).parent / "mlflow"))
        done = subprocess.run([script, "up", *where], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said = dict(re.findall(r"(MLFLOW_\w+)=(\S+)", done.stdout))
        url = said.pop("MLFLOW_TRACKING_URI")  # tests say where they record
        for name, value in said.items():
            context.setenv(name, value)
        yield url
    finally:
        context.undo()
        subprocess.run([script, "wipe", *where], check=True)


@pytest.fixture
def s3(s3_server: str) -> "Folder":
    """An empty folder on a real S3 server."""
    from pipelines.storage import Folder

    return Folder(f"s3://yard/{uuid.uuid4().hex}")


@pytest.fixture
def ray_that_notes(tmp_path: Path) -> Path:
    """A folder to be on the PATH, whose `ray` writes where it is started and what it is asked into the file `asked`
    beside it, and fails as many times as the file `refusals` says."""
    fake = tmp_path / "bin" / "ray"
    fake.parent.mkdir()
    (tmp_path / "refusals").write_text("0")
    fake.write_text(
        f"#!{sys.executable}\nimport json, os, pathlib, sys\nfolder = pathlib.Path({str(tmp_path)!r})\n"
        "open(folder / 'asked', 'a').write(json.dumps([os.getcwd(), *sys.argv[1:]]) + '\\n')\n"
        "left = int((folder / 'refusals').read_text())\n"
        "(folder / 'refusals').write_text(str(max(0, left - 1)))\nsys.exit(bool(left))\n"
    )
    fake.chmod(0o755)
    return fake.parent


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 digits as uint8 [n, 8, 8, 1], and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return np.rint(found.images * (255 / 16)).astype(np.uint8)[..., None], found.target
