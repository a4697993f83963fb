"""Trains as jobs/train.py does, but that each worker writes down what it is handed, and that one of them may die of it,
when there is a checkpoint in the root, the folder that OUT lies in.

python -m tests.jobs.recorded OUT DIE_AT FLAGS... [--then FLAGS...]
"""

import functools
import json
import os
import signal
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jobs.train import main
from pipelines import worker, workers
from pipelines.cluster import cluster
from pipelines.plan import Plan
from pipelines.stream import Batch, Deal, batches


class Entry(NamedTuple):
    """What was handed out at a position."""

    row: int
    label: int
    pixels: int
    """Their checksum."""


class Attempt(NamedTuple):
    """What the workers of one start were handed, together."""

    world: int
    ledger: dict[int, Entry]


def written(out: Path) -> dict[int, Attempt]:
    """Read what the workers wrote, by the position that they started at; no two of one start may have been handed the
    same."""
    attempts: dict[int, Attempt] = {}
    for file in out.iterdir():
        head, *lines = map(json.loads, file.read_text().splitlines())
        world, ledger = attempts.setdefault(head["start"], Attempt(head["world"], {}))
        assert world == head["world"]
        for position, *entry in (image for line in lines for image in line):
            assert position not in ledger, f"{position} was handed out twice"
            ledger[position] = Entry(*entry)
    return dict(sorted(attempts.items()))


def check_ids(attempts: dict[int, Attempt], plan: Plan) -> None:
    """See that each image is the one of the plan, which an uninterrupted run of any number of workers follows, and that
    between two starts none is left out."""
    starts = list(attempts)
    for at, until in zip(starts, [*starts[1:], None], strict=True):
        ledger = attempts[at].ledger
        assert ledger, f"none of the workers that started at {at} was handed anything"
        end = max(ledger) + 1
        assert list(range(at, until or end)) == sorted(position for position in ledger if position < (until or end))
        ids = plan.rows(at, end)
        assert {position: entry.row for position, entry in ledger.items()} == {p: ids[p - at] for p in ledger}


def mlflow_runs(root: Path) -> list[Any]:
    """The runs on the record of a root."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    return list(client.search_runs([client.get_experiment_by_name("brickyard").experiment_id]))


def record(out: str, die_at: int, shard: Any, deal: Deal, rank: int, world: int) -> Iterator[Batch]:
    """Stand in for :func:`pipelines.stream.batches` in a worker."""
    file = os.open(f"{out}/{uuid.uuid4().hex}.jsonl", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(file, (json.dumps({"start": deal.start, "world": world}) + "\n").encode())
    for batch in batches(shard, deal, rank, world):
        sums = [zlib.crc32(image.tobytes()) for image in batch.image]
        images = list(zip(batch.position.tolist(), batch.row.tolist(), batch.label.tolist(), sums, strict=True))
        os.write(file, (json.dumps(images) + "\n").encode())  # whole or not at all
        if deal.start == 0 and die_at in batch.position:
            end = time.monotonic() + 120  # without a checkpoint the next start would be at 0 again, and die again
            while time.monotonic() < end and not list(Path(out).parent.glob("runs/*/checkpoint-*/manifest.json")):
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


def train_worker(out: str, die_at: int, task: worker.TrainTask) -> None:
    """Stand in for :func:`pipelines.worker.train_worker`."""
    worker.batches = functools.partial(record, out, die_at)
    worker.train_worker(task)  # in the process of a worker it is the one of the product


if __name__ == "__main__":
    out, die_at, *flags = sys.argv[1:]
    workers.train_worker = functools.partial(train_worker, out, int(die_at))
    then = flags.index("--then") if "--then" in flags else len(flags)
    with cluster():  # one for both
        code = main(flags[:then])
        if not code and flags[then:]:
            code = main(flags[then + 1 :])
        sys.exit(code)
