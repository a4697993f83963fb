"""The cluster of infra/local/up as a user has it: jobs are submitted, a node goes and another comes, all of it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from pipelines.slots import folder_name, slot_id
from pipelines.storage import Folder
from tests.conftest import free_ports, need_postgres
from tests.infra.tools import BIN, INFRA
from tests.processes import CODE, kill, wait_for, without_ray

pytestmark = pytest.mark.ray

NET = "127.1.0"
TRAIN = [
    "jobs/train.py", "digits", "--root=s3://yard", "--fit.images=14400", "--fit.batch-images=96",
    "--fit.micro-images=32", "--fit.log-images=960", "--fit.checkpoint-images=2400", "--fit.grid-images=14400",
    "--evaluate-images=0", "--scaling.workers=3", "--scaling.cpus-per-worker=2", "--scaling.min-workers=1",
    "--tracking.register=digits",
]  # fmt: skip
SAMPLE = [
    "python", "-m", "jobs.sample", "--checkpoint=models:/digits@candidate", "--seeds=0-255", "--out=s3://yard/samples/nightly",
    "--draw.steps=5", "--draw.shard-images=64", "--firing.every=1d", "--firing.seeds=fresh",
]  # fmt: skip


@dataclass
class Stack:
    """A stack of this test's own, and what `up` said of it."""

    data: Path
    asked: dict[str, str]
    """The environment of stack.sh."""
    said: dict[str, str]
    """The environment of its users."""
    ports: dict[str, int] = field(default_factory=dict)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """One of infra/local."""
        return subprocess.run(
            [INFRA / "local" / command[0], *command[1:]], env=self.asked, capture_output=True, text=True, check=False
        )

    def submit(self, *command: str) -> subprocess.Popen[str]:
        """As a user submits a job, who waits for it."""
        return subprocess.Popen(
            ["ray", "job", "submit", "--working-dir", ".", "--", *command], cwd=CODE, env=self.said, text=True,
            stdout=(self.data / "job.log").open("w"), stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    @property
    def log(self) -> str:
        """What the job that was last submitted has said until now."""
        return (self.data / "job.log").read_text()

    def ask(self, path: str, **headers: str) -> Any:
        """The dashboard, with the token unless there are headers."""
        token = (self.data / "ray-token").read_text().strip()
        url = f"{self.said['RAY_API_SERVER_ADDRESS']}{path}"
        request = urllib.request.Request(url, headers=headers or {"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def processes(self, node: int | str = "", word: bytes = b"") -> list[int]:
        """Those that a node has started, or any of them, with a word in their command line."""
        mark, found = f"BRICKYARD_LOCAL={self.data}:node-{node}".encode(), []
        for each in Path("/proc").glob("[0-9]*"):
            try:
                environment = (each / "environ").read_bytes().split(b"\0")
                if any(one == mark if node else one.startswith(mark) for one in environment):
                    found += [int(each.name)] * (word in (each / "cmdline").read_bytes())
            except OSError:
                continue
        return found

    def nodes(self) -> list[dict[str, Any]]:
        """Those of Ray that are alive."""
        found = self.ask("/api/v0/nodes?detail=1")["data"]["result"]["result"]
        return [one for one in found if one["state"] == "ALIVE"]

    def has_nodes(self, several: int) -> bool:
        """Whether it has so many, as far as is known: a dashboard that is busy does not know."""
        time.sleep(0.5)
        try:
            return len(self.nodes()) == several
        except OSError:
            return False


def some_ports() -> dict[str, int]:
    """Of a stack of three nodes, all free."""
    first = free_ports(26)
    return {"S3_PORT": first, "MLFLOW_PORT": first + 14, "RAY_PORT": first + 16, "DASHBOARD_PORT": first + 24}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    need_postgres()
    assert not ray.is_initialized(), "one Ray cluster at a time"
    data, ports = tmp_path_factory.mktemp("stack"), some_ports()
    plain = {name: value for name, value in without_ray().items() if not name.startswith(("AWS_", "S3_"))}
    asked = plain | {"STACK_DATA": f"{data}/a stack", "STACK_BIN": str(BIN), "OMP_NUM_THREADS": "1"}
    stack = Stack(
        data / "a stack", asked | {name: str(value) for name, value in ports.items()} | {"STACK_NET": NET}, {}
    )
    try:
        done = stack.run("up", "3")
        assert done.returncode == 0, done.stderr
        stack.ports, stack.asked = ports, asked  # from now on it knows them
        # What it prints is for a shell, so a shell reads it.
        tell = f"{sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
        read = subprocess.run(["bash", "-c", f"{done.stdout}\n{tell}"], env=plain, capture_output=True, check=True)
        stack.said = json.loads(read.stdout)
        yield stack
    finally:
        assert stack.run("stack.sh", "wipe").returncode == 0


def test_what_is_up_is_healthy_and_up_again_changes_nothing(stack: Stack) -> None:
    assert stack.run("stack.sh", "status").stdout.split("\n")[:-1] == [
        "s3 healthy", "mlflow healthy", "1 healthy", "2 healthy", "3 healthy"
    ]  # fmt: skip
    before = {one["node_id"]: one["node_ip"] for one in stack.nodes()}
    assert sorted(before.values()) == [f"{NET}.2", f"{NET}.3", f"{NET}.4"]
    again = stack.run("up")
    assert again.returncode == 0 and again.stdout == stack.run("stack.sh", "env").stdout
    assert {one["node_id"]: one["node_ip"] for one in stack.nodes()} == before


def refused(what: Callable[[], Any]) -> int:
    with pytest.raises(urllib.error.HTTPError) as error:
        what()
    return error.value.code


def test_who_has_no_secret_is_refused(stack: Stack) -> None:
    assert refused(lambda: stack.ask("/api/jobs/", Accept="*/*")) == 401
    assert refused(lambda: stack.ask("/api/jobs/", Authorization=f"Bearer {'0' * 64}")) == 403
    assert stack.ask("/api/jobs/") == []
    for name in ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"):
        assert refused(lambda name=name: urllib.request.urlopen(stack.said[name] + "/yard")) in (401, 403)
    stranger = {name: value for name, value in stack.said.items() if not name.startswith("RAY_AUTH")}
    address = f"{NET}.2:{stack.ports['RAY_PORT']}"
    command = [sys.executable, "-c", f"import ray; ray.init({address!r}); print('came', 'in')"]
    guess = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    done = subprocess.run(command, env=stranger | guess, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "came in" not in done.stdout
    assert "token" in done.stderr, done.stderr
    command = ["ray", "job", "submit", "--", "true"]
    done = subprocess.run(command, env=stranger, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "token" in done.stdout + done.stderr


def test_servers_listen_on_loopback_only(stack: Stack) -> None:
    dashboard, mlflow, s3 = (stack.ports[f"{name}_PORT"] for name in ("DASHBOARD", "MLFLOW", "S3"))
    ports = {dashboard, mlflow, mlflow + 1, *range(s3, s3 + 13)}
    found = {(one.laddr.port, one.laddr.ip) for one in psutil.net_connections("tcp") if one.status == "LISTEN"}
    of_ours = {(port, ip) for port, ip in found if port in ports}
    assert {port for port, _ in of_ours} >= {dashboard, mlflow, mlflow + 1, s3}
    assert {ip for _, ip in of_ours} == {"127.0.0.1"}


def test_a_run_outlives_a_node_and_its_samples_are_made_once(stack: Stack) -> None:
    train = stack.submit(*TRAIN)
    try:
        wait_for(lambda: "checkpoint at 2400" in stack.log, train)
        assert all(stack.processes(node, b"RayTrainWorker") for node in (1, 2, 3)), "there is room for one on each"
        assert stack.run("down", "3").returncode == 0
        wait_for(lambda: stack.has_nodes(2), train)  # the cluster finds out
        wait_for(lambda: "the workers leave at" in stack.log, train)  # by the notice, or for want of room
        assert stack.run("up", "3").returncode == 0
        assert len(stack.nodes()) == 3
        assert train.wait(timeout=400) == 0, stack.log[-5000:]
    finally:
        kill(train)
    said = last_word(stack.log)
    assert (said["images"], said["exit_code"]) == (14400, 0)
    assert re.search(r"\b2 workers train from (?!0 )", stack.log), "it went on with those that were left"
    # What MLflow has not taken by the end, on a busy machine, waits in the bucket.
    command = [sys.executable, "jobs/replay.py", "s3://yard/runs/digits", "--patience-s=120"]
    subprocess.run(command, cwd=CODE, env=stack.said, check=True, capture_output=True)

    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    for attempt in ("done", "already done"):
        sample = stack.submit(*SAMPLE, f"--firing.slot={slot_id(today)}")
        try:
            assert sample.wait(timeout=300) == 0, stack.log[-5000:]
        finally:
            kill(sample)
        (state,) = last_word(stack.log)["slots"].values()
        assert state["state"] == attempt
    names = {name for name in in_bucket(stack, f"samples/nightly/{folder_name(today)}") if name.startswith("part-")}
    assert names == {f"part-{number:06d}.parquet" for number in range(4)}


def last_word(log: str) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(next(line for line in reversed(log.splitlines()) if line.startswith("{")))
    return said


def in_bucket(stack: Stack, path: str) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stack.said.items():
            if name.startswith("AWS_"):
                patch.setenv(name, value)
        return Folder(f"s3://yard/{path}").names()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["up", "no"], "give how many nodes there shall be"),
        (["down", "9"], "there is no such node, but 1 2 3"),
        (["down", "1"], "the head goes with all of it"),
    ],
)
def test_what_cannot_be_is_said(stack: Stack, command: list[str], says: str) -> None:
    done = stack.run(*command)
    assert done.returncode == 1 and says in done.stderr
    assert len(stack.nodes()) == 3


def another(stack: Stack, folder: Path) -> Stack:
    """One that has nothing in common with it."""
    settings = {name: str(value) for name, value in some_ports().items()}
    return Stack(folder, stack.asked | settings | {"STACK_DATA": str(folder), "STACK_NET": "127.2.0"}, {})


def test_a_port_of_another_is_not_taken_for_ours(stack: Stack, tmp_path: Path) -> None:
    for name in ("MLFLOW_PORT", "DASHBOARD_PORT"):
        theirs = another(stack, tmp_path / "s")
        theirs.asked[name] = str(stack.ports[name])
        done = theirs.run("up")
        assert done.returncode == 1 and re.search(f"give another .*{name}", done.stderr)
        assert not (tmp_path / "s" / "s3").exists(), "it is said before anything is begun"


def test_nor_by_the_scripts_of_one_server(stack: Stack, tmp_path: Path) -> None:
    """Which would have told it a password of ours."""
    for script, port in (("mlflow.sh", "MLFLOW_PORT"), ("s3.sh", "S3_PORT")):
        where = str(tmp_path / script), str(stack.ports[port])
        status = stack.run(script, "status", *where)
        assert (status.returncode, status.stdout) == (1, "down\n")
        done = stack.run(script, "up", *where)
        assert done.returncode == 1 and f"port {where[1]} is another's" in done.stderr
        assert stack.run(script, "stop", *where).returncode == 0
        assert [path.name for path in (tmp_path / script).iterdir()] == ["lock"]


def test_what_was_begun_with_other_ports_is_left_alone(stack: Stack) -> None:
    elsewhere = Stack(stack.data, stack.asked | {"RAY_PORT": "6379"}, {})
    for command in (["down"], ["stack.sh", "wipe"], ["up"]):
        done = elsewhere.run(*command)
        assert done.returncode == 1 and f"RAY_PORT is 6379, and was {stack.ports['RAY_PORT']}" in done.stderr
    assert len(stack.nodes()) == 3


def test_without_a_server_no_node_is_started(stack: Stack, tmp_path: Path) -> None:
    half = another(stack, tmp_path / "s")
    half.asked["POSTGRES_BIN"] = "/nowhere"
    try:
        done = half.run("up")
        assert done.returncode == 1 and done.stdout == "" and "mlflow.sh: " in done.stderr
        assert (half.data / "s3").exists() and not half.processes()
    finally:
        assert half.run("stack.sh", "wipe").returncode == 0
    assert not half.data.exists() and not servers(half)


def test_of_a_node_whose_first_process_was_killed_nothing_is_left(stack: Stack) -> None:
    mark = {"BRICKYARD_LOCAL": f"{stack.data}:node-3"}
    left = subprocess.Popen(["sleep", "600"], env=os.environ | mark)  # what Ray leaves depends on the moment
    before = set(stack.processes(3))
    os.kill(int((stack.data / "node-3.pid").read_text()), signal.SIGKILL)
    assert stack.run("up").returncode == 0
    assert left.wait() == -signal.SIGKILL
    assert not before & set(stack.processes(3)) and stack.processes(3)


def test_it_ends_without_a_trace(stack: Stack, tmp_path: Path) -> None:
    """The last of this file: afterwards there is none of it."""
    stack.asked["TMPDIR"] = str(tmp_path)  # the shell that ends it is another
    (stack.data / "node-2.pid").unlink()  # as if `up` had been interrupted before it was written
    assert stack.processes(), "a check that finds nothing while it runs would find nothing afterwards either"
    assert stack.run("down").returncode == 0
    assert not stack.processes() and not servers(stack)
    assert not [*stack.data.glob("run"), *stack.data.glob("*/run")], "nor of where sockets were, for another to take"
    assert (stack.data / "s3").exists() and stack.run("stack.sh", "status").returncode == 1
    assert stack.run("stack.sh", "wipe").returncode == 0
    assert not stack.data.exists()
    assert not list(Path(tempfile.gettempdir()).glob(f"brickyard-*.{os.getuid()}.{stack.ports['RAY_PORT']}"))
    assert not list(Path(tempfile.gettempdir()).glob(f"brickyard-*.{os.getuid()}.{stack.ports['S3_PORT']}"))


def servers(stack: Stack) -> list[str]:
    """Command lines with the stack's folder in them: S3, PostgreSQL and MLflow."""
    lines = [" ".join(one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(stack.data) in line]
