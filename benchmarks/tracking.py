"""What does the record cost training, and what when the tracker is away?

    python benchmarks/tracking.py

The loop and the tracker share one process of one thread here, and each step reports, which is harder on the loop than
a training job is: there the loop has processes of its own, and a report follows many steps. N, nothing is recorded; W,
in a real MLflow server that is well; H, in one that takes connections and never answers; E, in one that answers 500.
They take turns of ``--steps`` steps, N W H E N W H E, each with a start of its run of its own, so that nothing of one
goes on during the turn of another. The cost of a record is the time of the call that records it, within the turns of W.

Targets: a record costs at most 1 % of a step; the step time of H and E is within 5 % of that of W, and of N; the end of
a job leaves a server that is away within 10 s.
"""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import tyro
from numpy.typing import NDArray

from benchmarks.common import Stopwatch, digits, micro_batches, spread
from jobs.presets import DIGITS
from models.init import initialize
from models.network import build
from models.schedule import article
from pipelines.fit import Listener, fit, new_state
from pipelines.mlflow_door import TIMEOUT_S
from pipelines.storage import Folder
from pipelines.tracking import Tracker, open_tracker
from pipelines.tracking_config import TrackingConfig

BROKEN = """
import http.server, sys

class Broken(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(500)
    do_POST = do_PUT = do_PATCH = do_GET
    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Broken).serve_forever()
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure what recording costs."""

    rounds: int = 5
    steps: int = 20
    """Of a turn."""


class OverError(Exception):
    """A turn has ended."""


class Turn(Listener):
    """Records each step, and ends the loop after some."""

    def __init__(self, tracker: Tracker, steps: int) -> None:
        self.spent: list[float] = []
        self._tracker, self._left = tracker, steps

    def report(self, metrics: dict[str, float], position: int) -> None:
        began = time.perf_counter()
        self._tracker.metrics(metrics, position)
        self.spent.append(time.perf_counter() - began)
        self._left -= 1
        if not self._left:
            raise OverError


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def served(command: list[str], url: str) -> Iterator[str]:
    """Run a server until the context ends; it begins when the server answers, whatever it answers."""
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            assert process.poll() is None, command
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
            except urllib.error.HTTPError:
                break
            except OSError:
                time.sleep(0.2)
                continue
            break
        yield url
    finally:
        process.terminate()
        process.wait()


@contextmanager
def hung() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        taken: list[socket.socket] = []

        def take() -> None:
            with suppress(OSError):
                while True:
                    taken.append(server.accept()[0])

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(1)
    model = build(DIGITS.network, 1, 8, 0)
    initialize(model, 0)
    never = DIGITS.fit.batch_images << 30
    config = replace(
        DIGITS.fit, images=never, log_images=DIGITS.fit.batch_images, checkpoint_images=never, grid_images=never
    )
    state = new_state(model.to(memory_format=torch.channels_last), config, article())  # type: ignore[call-overload]
    batches = micro_batches(digits(), config, 0)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port, broken = free_port(), free_port()
        where = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/files"]
        real = [sys.executable, "-m", "mlflow", "server", *where, "--port", str(port), "--workers", "1"]
        uris = {
            "N": "none",
            "W": stack.enter_context(served(real, f"http://127.0.0.1:{port}")),
            "H": stack.enter_context(hung()),
            "E": stack.enter_context(served([sys.executable, "-c", BROKEN, str(broken)], f"http://127.0.0.1:{broken}")),
        }
        root = Folder(str(folder))
        turns: dict[str, list[NDArray]] = {way: [] for way in uris}
        spent: dict[str, list[float]] = {way: [] for way in uris}
        ends: dict[str, list[float]] = {way: [] for way in uris}
        for number in range(settings.rounds + 1):
            for way, uri in uris.items():
                tracker = open_tracker(TrackingConfig(uri=uri), root, root / way, way, way, {}, {}, number + 1)
                turn, watch = Turn(tracker, settings.steps), Stopwatch()
                with suppress(OverError):
                    fit(config, state, article(), 0, batches, turn)
                figures = watch.read() / settings.steps
                began = time.perf_counter()
                tracker.finish("FINISHED")
                if number:  # the first of each makes buffers, caches and the optimizer's state
                    turns[way].append(figures)
                    spent[way] += turn.spent
                    ends[way].append(time.perf_counter() - began)
                time.sleep(float(TIMEOUT_S) + 1)  # until the last request of this turn is over
        step = median(float(wall) for wall, _ in turns["N"])
        print(f"a step without a record {1000 * step:.1f} ms")
        for way in "WHE":
            calls = [1000 * seconds for seconds in spent[way]]
            print(f"{way}: a record {spread(calls)} ms, {median(calls) / step / 10:.2f} % of a step", end="; ")
            for other in "NW"[: 1 if way == "W" else 2]:
                wall, cpu = zip(*[mine / its for mine, its in zip(turns[way], turns[other], strict=True)], strict=True)
                print(f"{way}/{other} {spread(wall)}, by CPU seconds {spread(cpu)}", end="; ")
            print(flush=True)
        for way in "WHE":
            print(f"{way}: the end waits {spread(ends[way])} s")


if __name__ == "__main__":
    main()
