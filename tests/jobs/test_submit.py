"""`ray job submit`, for real, against a cluster of its own."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipelines.storage import Folder
from tests.conftest import free_ports
from tests.jobs import recorded

pytestmark = pytest.mark.ray

TOKEN = "0123456789abcdef" * 4
CODE = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SHORT = [
    "--fit.images=640", "--fit.batch-images=64", "--fit.micro-images=32", "--fit.log-images=320",
    "--fit.checkpoint-images=320", "--fit.grid-images=640", "--scaling.workers=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, s3_server: str) -> Iterator[dict[str, str]]:
    """A head node with a dashboard on loopback, in the foreground of a process that is ended by its own id; as nodes of
    a cluster do, it has the rights to read a bucket."""
    assert not ray.is_initialized(), "one Ray cluster at a time"
    port = free_ports(3)
    dashboard, agent = port + 1, port + 2
    home = tmp_path_factory.mktemp("home")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),  # the token lies there
        "RAY_AUTH_MODE": "token",
    }
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(TOKEN)
    head = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
         f"--dashboard-agent-listen-port={agent}",
         "--dashboard-host=127.0.0.1", "--include-dashboard=true", "--num-cpus=6", "--disable-usage-stats",
         f"--temp-dir={tmp_path_factory.mktemp('r')}"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until_it_answers(f"{address}/api/version", head)
        # A job is refused with "no available agent" 10 s after it was submitted, if that is still starting.
        wait_until_it_answers(f"http://127.0.0.1:{agent}/api/local_raylet_healthz", head)
        yield environment | {"RAY_API_SERVER_ADDRESS": address}
    finally:
        head.terminate()
        head.wait(timeout=60)


def wait_until_it_answers(url: str, head: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    while time.monotonic() < end:
        assert head.poll() is None, head.stdout.read()  # type: ignore[union-attr]
        try:
            urllib.request.urlopen(request, timeout=5).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError("the cluster did not come up")


@pytest.mark.parametrize(
    "entrypoint",
    [["jobs/train.py"], ["python", "jobs/train.py"], ["python", "-m", "jobs.train"]],
    ids=["script", "python script", "python -m"],
)
def test_the_three_ways_of_saying_it(entrypoint: list[str], cluster: dict[str, str], tmp_path: Path) -> None:
    told = ["--runtime-env-json", json.dumps({"env_vars": {"BRICKYARD_GIT_REVISION": "abc+"}})]
    command = [BIN / "ray", "job", "submit", *told, "--working-dir", ".", "--", *entrypoint, "digits", *SHORT]
    evaluate = "40" if entrypoint[0] == "jobs/train.py" else "0"
    where = ["--root", str(tmp_path), f"--tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    done = subprocess.run(
        [*command, f"--evaluate-images={evaluate}", "--draw.steps=2", "--draw.actors=1", *where],
        cwd=CODE, env=cluster, text=True, capture_output=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    said = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    assert (said["exit_code"], said["trained_images"]) == (0, 640)
    assert (tmp_path / "runs/digits/export/ema.safetensors").exists()
    (run,) = recorded.mlflow_runs(tmp_path)
    assert run.data.tags["brickyard.ray_job"].startswith("raysubmit_")
    assert run.data.tags["brickyard.git_revision"] == "abc+", "there is no checkout where the code is brought to"
    if evaluate == "40":
        assert said["frechet_distance"] > 0 and Path(said["contact_sheet"].removeprefix("file://")).exists()


def test_nothing_is_shown_to_or_run_for_who_has_not_the_token(cluster: dict[str, str], tmp_path: Path) -> None:
    """Such as a page in the operator's browser, whose name leads to loopback by now."""

    def code(token: str, body: dict[str, str] | None, **headers: str) -> int:
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"{cluster['RAY_API_SERVER_ADDRESS']}/api/jobs/", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    for token in ("", "f" * len(TOKEN)):
        assert code(token, None) in (401, 403)
        assert code(token, {"entrypoint": f"touch {tmp_path}/ran"}) in (401, 403)
        assert code(token, {"entrypoint": f"touch {tmp_path}/ran"}, Host="elsewhere.example") in (401, 403)
    assert code(TOKEN, None) == 200
    assert not (tmp_path / "ran").exists()


def test_a_job_that_cannot_be_done_fails_in_ray_too(cluster: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [BIN / "ray", "job", "submit", "--working-dir", ".", "--", "jobs/train.py", "digit", "--root", str(tmp_path)],
        cwd=CODE, env=cluster, text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "'digit' is no preset; did you mean 'digits'?" in done.stdout


def test_the_code_comes_from_a_bucket_where_there_is_no_checkout(
    cluster: dict[str, str], s3: Folder, tmp_path: Path
) -> None:
    """As a pod submits it (infra/kubernetes): a zip of the revision, made as infra/README.md says."""
    zip_file = tmp_path / "brickyard.zip"
    subprocess.run(["git", "archive", "--prefix=brickyard/", "-o", zip_file, "HEAD"], cwd=CODE, check=True)
    s3.put("brickyard.zip", zip_file.read_bytes())
    done = subprocess.run(
        [BIN / "ray", "job", "submit", "--working-dir", f"{s3.url}/brickyard.zip", "--",
         "python", "jobs/train.py", "digits", "--dry-run", "--root", str(tmp_path)],
        cwd=tmp_path, env=cluster, text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    said = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    assert said["exit_code"] == 0
