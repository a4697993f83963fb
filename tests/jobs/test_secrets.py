"""Jobs that fail where secrets are in play, at servers that say too much: none of it is said, kept or recorded."""

import base64
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray

from jobs import train
from tests.processes import CODE, with_word, without_ray

PASSWORD, KEY, TOKEN = "correct horse/battery", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "FwoGZXIvYXdzEBAaDEXAMPLE"
SECRETS = (
    PASSWORD, KEY, TOKEN, "horse%20", "horse+", "horse%2F", base64.b64encode(f"me:{PASSWORD}".encode()).decode(),
    "wJalr", "FwoGZ", "abcdefgh", "s3cret",
)  # fmt: skip
"""As they are, and as they may be written down."""


class Gossip(BaseHTTPRequestHandler):
    """Refuses everything, and says in its error whatever it knows of who has asked."""

    def refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        header = self.headers.get("Authorization", "")
        known = base64.b64decode(header.partition(" ")[2]).decode() if header.startswith("Basic") else f"the key {KEY}"
        said = f"not you: {known}, who sent {dict(self.headers)}"
        if header.startswith("AWS4"):
            text = said.replace("&", "&amp;").replace("<", "&lt;")
            body = f"<Error><Code>AccessDenied</Code><Message>{text}</Message></Error>".encode()
        else:
            body = json.dumps({"error_code": "INTERNAL_ERROR", "message": said}).encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_HEAD = do_PATCH = refuse

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gossip() -> Iterator[str]:
    """Its address, without http://."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gossip)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def job(gossip: str, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    secrets = {
        "AWS_ENDPOINT_URL": f"http://{gossip}", "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": KEY, "AWS_SESSION_TOKEN": TOKEN, "AWS_REGION": "us-east-1",
        "MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "BRICKYARD_ALERT_URL": "http://127.0.0.1:1/abcdefgh",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *command],
        cwd=CODE, env=without_ray() | {"PYTHONPATH": str(CODE), "OMP_NUM_THREADS": "1"} | secrets | env,
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


def said_by(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """What it said in its one line; there is no secret in that, nor in anything else that it has printed."""
    assert not [secret for secret in SECRETS if secret in done.stdout + done.stderr], done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    said = json.loads(line)
    assert said["exit_code"] == done.returncode
    return dict(said)


def test_storage_that_repeats_what_it_was_sent(gossip: str, tmp_path: Path) -> None:
    done = job(gossip, "jobs/ingest.py", "--source", "s3://bucket/images", "--out", str(tmp_path / "out"))
    said = said_by(done)
    assert done.returncode == 3
    for words in (done.stderr, str(said["error"])):
        assert "not you: the key ***" in words and "'X-Amz-Security-Token': '***'" in words
        assert "SignedHeaders=" in words and "Signature=***" in words, "what is no secret is still there"


@pytest.mark.parametrize("in_address", [False, True], ids=["environment", "address"])
def test_a_tracker_that_repeats_what_it_was_sent(in_address: bool, gossip: str, tmp_path: Path) -> None:
    given = {"MLFLOW_TRACKING_URI": f"http://{gossip}"}
    if in_address:
        word = PASSWORD.replace(" ", "%20").replace("/", "%2F")
        given = {"MLFLOW_TRACKING_URI": f"http://me:{word}@{gossip}", "MLFLOW_TRACKING_PASSWORD": ""}
    done = job(gossip, "jobs/train.py", "digits", "--root", str(tmp_path / "yard"), "--dry-run", **given)
    said = said_by(done)
    assert done.returncode == 0, done.stderr
    assert "not you: me:***" in str(said["tracker"]) and "'Authorization': 'Basic ***'" in str(said["tracker"])


@pytest.mark.parametrize(
    ("flag", "value", "before"),
    [
        ("--data.url", "https://me:s3cret@127.0.0.1:1/images", "https://"),
        ("--data.url", "s3://AKIA:s3cret/+@bucket/images", "s3://"),
        ("--data.url", "s3://bucket/token=s3cret/images", "token="),
        ("--root", "https://s3cret@127.0.0.1:1/yard", "https://"),
        ("--tracking.uri", "http://me:s3cret@127.0.0.1:1", "http://"),
        (
            "--data.ingest.labels",
            "https://b.s3.amazonaws.com/l?X-Amz-Credential=s3cret&X-Amz-Signature=s3cret",
            "Credential=",
        ),
    ],
)
@pytest.mark.parametrize("how", ["two words", "one word", "file"])
def test_a_setting_with_a_secret_is_refused_before_it_is_printed_or_kept(
    how: str, flag: str, value: str, before: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [flag, value] if how == "two words" else [f"{flag}={value}"]
    if how == "file":
        content: Any = value
        for name in reversed(flag.removeprefix("--").split(".")):
            content = {name: content}
        (tmp_path / "c.yaml").write_text(json.dumps(content))
        given = ["--config", str(tmp_path / "c.yaml")]
    there = set(tmp_path.iterdir())
    assert train.main(["digits", "--root", str(tmp_path / "yard"), *given]) == 2
    out, err = capfd.readouterr()
    assert "s3cret" not in out + err
    error = json.loads(out)["error"]
    assert error.startswith(f"{flag} holds a password, a token or a signature, judging by what follows {before!r}")
    assert set(tmp_path.iterdir()) == there


CARELESS = """
import logging, sys, threading, warnings
import ray
from jobs.cli import run
from pipelines.replay import ReplayJob

def fail():
    raise ValueError("of a thread: http://me:s3cret@host")

def work(job):
    print("print: http://me:s3cret@host")
    warnings.warn("warning: http://me:s3cret@host")
    logging.getLogger("ray").error("of Ray: http://me:s3cret@host")
    logging.getLogger("another").error("of another: http://me:s3cret@host")
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    try:
        fail()
    except ValueError as error:
        raise RuntimeError("of nobody: http://me:s3cret@host") from error

sys.exit(run(ReplayJob, ["--runs", "nowhere"], work=work, plan=work))
"""


def test_whatever_prints_it_and_whatever_goes_wrong(gossip: str) -> None:
    done = job(gossip, "-c", CARELESS)
    assert said_by(done)["error"] == "of nobody: http://***@host" and done.returncode == 1
    for words in ("print", "warning", "of Ray", "of another", "ValueError: of a thread", "RuntimeError: of nobody"):
        assert f"{words}: http://***@host" in done.stderr, words


@pytest.mark.ray
def test_a_run_leaves_no_secret_anywhere(gossip: str, tmp_path: Path) -> None:
    """Nor do the logs of Ray's own processes have one, of which nothing is filtered."""
    assert not ray.is_initialized(), "one Ray cluster at a time"
    with tempfile.TemporaryDirectory(prefix="secrets-", dir="/tmp") as of_ray:  # a socket's path must be short
        done = job(
            gossip, "jobs/train.py", "digits", "--root", str(tmp_path), "--tracking.uri", f"http://{gossip}",
            "--fit.images=256", "--fit.checkpoint-images=128", "--fit.log-images=128", "--evaluate-images=0",
            "--verbose", RAY_TMPDIR=of_ray,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert "not you: me:***" in done.stderr and said_by(done)["images"] == 256
        end = time.monotonic() + 120
        while any(with_word(of_ray.encode())):  # they may still have something to say
            assert time.monotonic() < end
            time.sleep(0.1)
        spools = [path for path in tmp_path.rglob("*.db*") if b"fit.images" in path.read_bytes()]
        assert spools, "what is to be recorded waits"
        logs = [path for path in Path(of_ray).rglob("*") if path.is_file() and path.suffix in (".log", ".err", ".out")]
        assert any("worker" in path.name for path in logs)
        for path in [*(path for path in tmp_path.rglob("*") if path.is_file()), *logs]:
            found = [secret for secret in SECRETS if secret.encode() in path.read_bytes()]
            assert not found, f"{path}: {found}"
