"""A node that will be taken away tells its cluster, once a metadata service as strict as AWS's has said so."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.infra.imds import ADVICE, NOTICE, Service
from tests.infra.tools import BIN, INFRA
from tests.processes import kill, wait_for

DRAIN = INFRA / "image" / "drain.py"
NODE = "ab" * 28
LEFT = "--deadline-remaining-seconds="


@pytest.fixture
def imds() -> Iterator[Service]:
    service = Service()
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield service
    service.shutdown()
    service.server_close()
    thread.join()


@pytest.fixture(scope="module")
def drain() -> Any:
    spec = importlib.util.spec_from_file_location("drain", DRAIN)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Watching = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def watching(imds: Service, ray_that_notes: Path) -> Iterator[Watching]:
    """Starts a watcher, which is not left behind by a test that fails."""
    started: list[subprocess.Popen[str]] = []

    def one(*flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, DRAIN, "--watch", "--every=0.05", "--address=head:6379", f"--node-id={NODE}", *flags]
        environment = {"PATH": str(ray_that_notes), "AWS_EC2_METADATA_SERVICE_ENDPOINT": imds.url}
        started.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        )
        return started[-1]

    yield one
    for process in started:
        kill(process)


def asked(fake: Path) -> list[list[str]]:
    return [json.loads(line)[1:] for line in (fake.parent / "asked").read_text().splitlines()]


def test_it_drains_when_the_notice_comes_and_not_before(
    imds: Service, ray_that_notes: Path, watching: Watching
) -> None:
    process = watching()
    wait_for(lambda: len(imds.asked) > 3, process)
    assert not (ray_that_notes.parent / "asked").exists() and len(imds.tokens) == 1
    imds.announce(120)
    assert process.wait(timeout=60) == 0
    (command,) = asked(ray_that_notes)
    assert command[:3] == ["drain-node", "--address=head:6379", f"--node-id={NODE}"]
    assert "--reason=DRAIN_NODE_REASON_PREEMPTION" in command
    assert 0 < int(command[-1].removeprefix(LEFT)) <= 120
    assert set(imds.asked) == {NOTICE}, "the recommendation is not asked for unless it counts"


def test_a_token_that_has_run_out_is_asked_for_again(imds: Service, ray_that_notes: Path, watching: Watching) -> None:
    process = watching()
    wait_for(lambda: len(imds.asked) > 1, process)
    imds.forgotten = len(imds.tokens)
    imds.announce(120)
    assert process.wait(timeout=60) == 0
    assert len(imds.tokens) == 2 and len(asked(ray_that_notes)) == 1


@pytest.mark.parametrize("code", [500, 503])
def test_a_service_that_fails_is_asked_again(
    code: int, imds: Service, ray_that_notes: Path, watching: Watching
) -> None:
    imds.broken = code
    imds.announce(120)
    process = watching()
    wait_for(lambda: len(imds.asked) > 1, process)
    imds.broken = 0
    assert process.wait(timeout=60) == 0
    assert len(asked(ray_that_notes)) == 1


def test_a_cluster_that_does_not_take_it_is_asked_again(
    imds: Service, ray_that_notes: Path, watching: Watching
) -> None:
    (ray_that_notes.parent / "refusals").write_text("2")
    imds.announce(120)
    assert watching().wait(timeout=60) == 0
    assert len(asked(ray_that_notes)) == 3


def test_an_error_of_rays_own_does_not_end_the_watch(
    imds: Service, ray_that_notes: Path, drain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster that is busy in the minute of the notice."""
    from ray.exceptions import RpcError

    answers = iter([RpcError("busy"), ("head:6379", NODE)])

    def this_node() -> tuple[str, str]:
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    imds.announce(120)
    monkeypatch.setattr(drain, "this_node", this_node)
    monkeypatch.setattr(sys, "argv", [str(DRAIN), "--watch", "--every=0.05"])
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", imds.url)
    monkeypatch.setenv("PATH", str(ray_that_notes))
    assert drain.main() == 0
    (command,) = asked(ray_that_notes)
    assert command[:3] == ["drain-node", "--address=head:6379", f"--node-id={NODE}"]


def test_a_recommendation_counts_if_it_is_to(imds: Service, ray_that_notes: Path, watching: Watching) -> None:
    imds.said[ADVICE] = json.dumps({"noticeTime": "2026-11-26T08:22:00Z"})
    assert watching("--rebalance=600").wait(timeout=60) == 0
    (command,) = asked(ray_that_notes)
    assert 500 < int(command[-1].removeprefix(LEFT)) <= 600 and "2026-11-26T08:22:00Z" in command[-2]


@pytest.mark.parametrize("refusals", [0, 1])
def test_told_to_it_drains_at_once(refusals: int, ray_that_notes: Path) -> None:
    """As before the end of a pod, which does not wait for longer than was said, nor if the cluster refuses."""
    (ray_that_notes.parent / "refusals").write_text(str(refusals))
    done = subprocess.run(
        [sys.executable, DRAIN, "--seconds=8", "--address=head:6379", f"--node-id={NODE}"],
        env={"PATH": str(ray_that_notes)}, check=False, timeout=60, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert done.returncode == refusals
    (command,) = asked(ray_that_notes)
    assert 0 < int(command[-1].removeprefix(LEFT)) <= 8 and f"--node-id={NODE}" in command


def test_seconds_left(imds: Service, drain: Any) -> None:
    """To the second, never none at all, and the interruption before the recommendation."""
    metadata, end = drain.Metadata(imds.url), datetime(2026, 11, 26, 8, 22, tzinfo=UTC)
    imds.said[ADVICE] = json.dumps({"noticeTime": "x"})
    assert drain.seconds_left(metadata, 0, end) is None
    assert drain.seconds_left(metadata, 600, end)[0] == 600
    imds.said[NOTICE] = json.dumps({"action": "stop", "time": "2026-11-26T08:22:00Z"})
    for before, left in ((120, 120), (1.5, 1), (0, 1), (-30, 1)):
        assert drain.seconds_left(metadata, 600, end - timedelta(seconds=before))[0] == left


def test_what_is_no_json_says_nothing(imds: Service, drain: Any) -> None:
    for said in ("<html>", "5", "null", "[1]"):
        imds.said[NOTICE] = said
        assert drain.Metadata(imds.url).get("spot/instance-action") is None
    assert drain.Metadata("http://127.0.0.1:9").get("spot/instance-action") is None


@pytest.mark.parametrize(
    "notice", [{}, {"time": ""}, {"time": None}, {"time": "soon"}, {"time": "2026-11-26T08:22:00"}]
)
def test_a_notice_without_a_time_is_asked_for_again(
    notice: dict[str, str], imds: Service, ray_that_notes: Path, watching: Watching
) -> None:
    imds.said[NOTICE] = json.dumps({"action": "terminate"} | notice)
    process = watching()
    wait_for(lambda: len(imds.asked) > 3, process)
    assert not (ray_that_notes.parent / "asked").exists()
    imds.announce(120)
    assert process.wait(timeout=60) == 0
    assert process.stderr and "has no time to go by" in process.stderr.read()
    assert len(asked(ray_that_notes)) == 1


def test_without_ray_it_says_so_and_tries_again(imds: Service, ray_that_notes: Path, watching: Watching) -> None:
    (ray_that_notes / "ray").rename(ray_that_notes / "later")
    imds.announce(120)
    process = watching()
    wait_for(lambda: len(imds.asked) > 3, process)
    (ray_that_notes / "later").rename(ray_that_notes / "ray")
    assert process.wait(timeout=60) == 0
    assert process.stderr and "`ray` cannot be run" in process.stderr.read()
    assert len(asked(ray_that_notes)) == 1


def test_told_to_without_ray_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, DRAIN, "--seconds=2", "--address=head:6379", f"--node-id={NODE}"],
        env={"PATH": str(tmp_path)}, check=False, timeout=60, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "`ray` cannot be run" in done.stderr and "Traceback" not in done.stderr


def test_a_head_that_has_gone_keeps_no_pod() -> None:
    """Ray itself would look for it long after the pod's time is over."""
    done = subprocess.run(
        [sys.executable, DRAIN, "--seconds=9"], env=os.environ | {"RAY_ADDRESS": "127.0.0.1:9"}, check=False,
        timeout=60, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGALRM and "SIGALRM ends this in 9 s" in done.stderr


def told_to(path: str, seconds: int) -> subprocess.CompletedProcess[str]:
    """On a machine with a node, whose cluster has a second to say where it is."""
    code = f"""import sys; sys.path.insert(0, {str(DRAIN.parent)!r}); import drain; drain.PATIENCE_S = 1
drain.this_node = lambda: ("head:6379", {NODE!r}); drain.raylet_runs = lambda: False; sys.exit(drain.main())"""
    return subprocess.run(
        [sys.executable, "-c", code, f"--seconds={seconds}"], env={"PATH": path}, check=False, timeout=60,
        capture_output=True, text=True,
    )  # fmt: skip


def test_a_cluster_that_has_answered_may_take_its_time(ray_that_notes: Path) -> None:
    """On a node that is busy, each step is slow."""
    (ray_that_notes / "ray").rename(ray_that_notes / "late")
    (ray_that_notes / "ray").write_text(f'#!/bin/sh\n/bin/sleep 2\nexec {ray_that_notes}/late "$@"\n')
    (ray_that_notes / "ray").chmod(0o755)
    assert told_to(str(ray_that_notes), 50).returncode == 0
    assert len(asked(ray_that_notes)) == 1


def test_a_drain_that_hangs_ends_with_the_pods_time(tmp_path: Path) -> None:
    """And nothing of it is left behind."""
    (tmp_path / "ray").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec /bin/sleep 100\n")
    (tmp_path / "ray").chmod(0o755)
    done = told_to(str(tmp_path), 3)
    assert done.returncode == 1 and "no answer" in done.stderr and "Traceback" not in done.stderr
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


@pytest.mark.ray
def test_a_real_node_is_drained(imds: Service, tmp_path: Path) -> None:
    """By its own id, which it finds by itself; the rest of the cluster is told, with the deadline."""
    import ray
    from ray.cluster_utils import Cluster

    assert not ray.is_initialized(), "one Ray cluster at a time"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        imds.announce(120)
        environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_ADDRESS": cluster.address}
        environment["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = imds.url
        found = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(DRAIN.parent)!r}); import drain; "
             "print(*drain.this_node())"], env=environment, capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
        assert found[0] == cluster.address and found[1] in {node["NodeID"] for node in ray.nodes()}
        done = subprocess.run(
            [sys.executable, DRAIN, "--watch", f"--address={cluster.address}", f"--node-id={second.node_id}"],
            env=environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        left = int(re.findall(r"for (\d+) s", done.stderr)[-1])
        assert 0 < left <= 120
        end = time.monotonic() + 60
        # It was idle, so it has left, or is about to; nothing is placed on it any more.
        while any(node["NodeID"] == second.node_id and node["Alive"] for node in ray.nodes()):
            assert time.monotonic() < end, "an idle node that is drained leaves"
            time.sleep(0.2)
        assert sum(node["Alive"] for node in ray.nodes()) == 1
    finally:
        ray.shutdown()
        cluster.shutdown()
