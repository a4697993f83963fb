"""Many training jobs that differ in some settings, side by side, under one run that holds them together.

A *child* is a training job of its own, in a process of its own: it can be killed, it goes on when the sweep is run
again, and the same settings make the same run outside of a sweep too. The sweep keeps, below ``<root>/sweeps/<name>/``,
what each child that is done has said, and does not start it again.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from pipelines import run_folder, validation
from pipelines.cluster import cluster
from pipelines.config import TrainJob
from pipelines.environment import environment
from pipelines.errors import BrickyardError, TryAgainError
from pipelines.invocation import LEAVE_WITH
from pipelines.plain import to_dict, to_yaml
from pipelines.replay import ReplayJob, replay
from pipelines.scoring import METRIC
from pipelines.storage import Folder
from pipelines.sweep_plan import SweepJob
from pipelines.tracking import ending, open_tracker, resolve_uri
from pipelines.training import prepare

TRAIN = Path(__file__).parent.parent / "jobs" / "train.py"
COLUMNS = (METRIC, validation.METRIC, "loss", "images", "images_per_s", "seconds")
"""What a child says that goes into the table."""
AGAIN = {75, 130, -signal.SIGKILL, -signal.SIGTERM}
"""Exit codes of children that the same command continues."""
LEAVE_S = 60.0
"""How long children may take to leave before they are killed; it is theirs to tell the tracker, and Ray."""

log = logging.getLogger("brickyard.sweep")


@dataclass(frozen=True)
class Outcome:
    """How a child ended."""

    code: int
    """Its exit code, or minus the signal that ended it."""
    said: dict[str, Any]
    """The line that it put on stdout."""


class _Children:
    """Runs children in processes of their own, and ends those that run when the sweep has to."""

    def __init__(self, job: SweepJob, parent: str) -> None:
        self._job, self._parent = job, parent
        self._lock, self._ending = threading.Lock(), False
        self._running: set[subprocess.Popen[str]] = set()

    def run(self, apart: str, child: TrainJob) -> Outcome:
        """Run a child to its end, in a thread. Its log goes to ``<its name>.log`` in the sweep's folder."""
        asked = replace(child, tracking=replace(child.tracking, parent=self._parent))
        with tempfile.TemporaryDirectory() as folder:
            config, written = Path(folder) / "config.yaml", f"{child.name}.log"
            where = self._job.folder  # on this machine it can be followed there
            log_file = Path(where.path(written)) if where.is_local else Path(folder) / "log"
            config.write_text(to_yaml(asked))
            with log_file.open("w") as stderr, self._lock:
                if self._ending:
                    return Outcome(130, {})
                process = subprocess.Popen(
                    [sys.executable, str(TRAIN), "--config", str(config)],
                    stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True,
                    env=os.environ | {LEAVE_WITH: str(os.getpid())},  # or a sweep that was killed would have left it
                )  # fmt: skip
                self._running.add(process)
            log.info("%s: starts", apart)
            out, _ = process.communicate()
            with self._lock:
                self._running.discard(process)
            outcome = Outcome(process.returncode, _last_line(out))
            try:
                _keep(self._job, apart, child, outcome)
                if not where.is_local:
                    where.put(written, log_file.read_bytes())
            except BrickyardError as error:  # the others are none the worse
                log.warning("%s: what it said is not kept: %s", apart, error)
        return outcome

    def end(self) -> None:
        """Have the children that run leave, as by Ctrl-C; they can be gone on with."""
        with self._lock:
            self._ending, running = True, list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(timeout=LEAVE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def sweep(job: SweepJob) -> dict[str, Any]:
    """Run the children that are not done, and make the table of all.

    Returns:
        The rows of the table, best score first, and where it is.

    Raises:
        TryAgainError: if children did not get to their ends that may with the same command.
        BrickyardError: if others failed.
    """
    began, children, folder = time.perf_counter(), job.children, job.folder
    run_folder.claim(folder, {"sweep": job.name})
    parent = run_folder.run_id(folder)
    tracker = open_tracker(
        job.train.tracking, Folder(job.train.root), folder, job.name, parent,
        parameters={"grid": " | ".join(job.grid), "children": len(children)}, tags={"brickyard.sweep": job.name},
        start=run_folder.count_start(folder, to_yaml(job)),
    )  # fmt: skip
    with ending(tracker):
        tracker.file("sweep.yaml", to_yaml(job).encode())
        outcomes = _run(job, children, parent)
        with environment({"MLFLOW_TRACKING_URI": resolve_uri(job.train.tracking, Folder(job.train.root))}):
            _deliver(children)
        rows = _table(children, outcomes)
        text = _in_words(rows)
        for name, content in (("table.json", json.dumps(rows, indent=1)), ("table.txt", text)):
            data = f"{content}\n".encode()
            folder.put(name, data)
            tracker.file(name, data)
        log.info("done\n\n%s\n", text)
        _check(job, children, outcomes)
    return {
        "children": rows,
        "table": f"{folder.url}/table.txt",
        "seconds": round(time.perf_counter() - began, 1),
        "mlflow_run": tracker.tracker_id,
        "see": tracker.see,
    }


def dry_run(job: SweepJob) -> dict[str, Any]:
    """Return which children there are and which of them are done, having changed nothing."""
    done = {apart for apart, child in job.children.items() if _done(job, child)}
    return {
        "dry_run": True,
        "children": {apart: "done" if apart in done else "to train" for apart in job.children},
        "folder": job.folder.url,
    }


def _run(job: SweepJob, children: dict[str, TrainJob], parent: str) -> dict[str, Outcome]:
    outcomes = {apart: found for apart, child in children.items() if (found := _done(job, child))}
    to_do = {apart: child for apart, child in children.items() if apart not in outcomes}
    if not to_do:
        return outcomes
    with cluster():
        _prepare(to_do)
        room = min(job.room(ray.cluster_resources()), len(to_do))
        log.info("%d children, %d of them done; %d train at once", len(children), len(outcomes), room)
        processes, pool = _Children(job, parent), ThreadPoolExecutor(room)
        with environment({"RAY_ADDRESS": ray.get_runtime_context().gcs_address}):  # one cluster for all
            try:
                waiting: dict[Future[Outcome], str] = {
                    pool.submit(processes.run, apart, child): apart for apart, child in to_do.items()
                }
                while waiting:
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        apart = waiting.pop(future)
                        outcomes[apart] = outcome = future.result()
                        said = outcome.said.get(METRIC, outcome.said.get("loss", outcome.said.get("error", "")))
                        log.info("%d of %d: %s: exit %d, %s", len(outcomes), len(children), apart, outcome.code, said)
            finally:
                processes.end()
                pool.shutdown(cancel_futures=True)
    return outcomes


def _prepare(children: dict[str, TrainJob]) -> None:
    """Ingest what children learn from, once: not each of them at the same time."""
    with ExitStack() as stack:
        for child in {child.data: child for child in children.values()}.values():
            try:
                prepare(child, stack)
            except BrickyardError as error:  # which it will end with; the others are none the worse
                log.warning("%s: %s", child.name, error)


def _deliver(children: dict[str, TrainJob]) -> None:
    """Deliver what children could not: each waited for the tracker for a moment only, while others used the machine."""
    homes = [child.run.url for child in children.values() if child.run.exists(run_folder.RUN)]
    try:
        if homes and (delivered := replay(ReplayJob(runs=tuple(homes)))["delivered"]):
            log.info("%d records that children had left are delivered", delivered)
    except Exception as error:  # whatever it is, what they have learned is none the worse
        log.warning("what children left to be recorded is still there: %s", error)


def _last_line(out: str) -> dict[str, Any]:
    try:
        return dict(json.loads(out.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):  # it was killed while it spoke, or before
        return {}


def _keep(job: SweepJob, apart: str, child: TrainJob, outcome: Outcome) -> None:
    if outcome.code == 0:
        about = {"apart": apart, "config": to_dict(child), "said": outcome.said}
        job.folder.put(f"{child.name}.json", json.dumps(about, indent=1).encode())


def _done(job: SweepJob, child: TrainJob) -> Outcome | None:
    """Return what a child said that is done, if it was asked for the same; otherwise it is started and finds out."""
    name = f"{child.name}.json"
    if not job.folder.exists(name):
        return None
    about = json.loads(job.folder.get(name))
    return Outcome(0, about["said"]) if about["config"] == to_dict(child) else None


def _table(children: dict[str, TrainJob], outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
    rows = [
        {"child": apart, **{name: outcomes[apart].said[name] for name in COLUMNS if name in outcomes[apart].said}}
        | ({} if outcomes[apart].code == 0 else {"error": outcomes[apart].said.get("error", outcomes[apart].code)})
        for apart in children
    ]
    order = next((name for name in COLUMNS if any(name in row for row in rows)), "child")
    return sorted(rows, key=lambda row: (order not in row, row.get(order, 0)))


def _in_words(rows: list[dict[str, Any]]) -> str:
    """Return the table for people, a line for each child."""
    names = [name for name in ("child", *COLUMNS, "error") if any(name in row for row in rows)]
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _check(job: SweepJob, children: dict[str, TrainJob], outcomes: dict[str, Outcome]) -> None:
    failed = {apart: outcome for apart, outcome in outcomes.items() if outcome.code}
    if not failed:
        return
    kind = TryAgainError if all(outcome.code in AGAIN for outcome in failed.values()) else BrickyardError
    words = "; ".join(
        f"{apart}: exit {outcome.code}, {outcome.said.get('error', 'no word')}" for apart, outcome in failed.items()
    )
    raise kind(
        f"{len(failed)} of {len(children)} children did not get to their end: {words}. Their logs are in "
        f"{job.folder.url}; run the same command to go on"
    )
