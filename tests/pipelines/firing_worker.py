"""A job that is fired on a schedule, as a process of its own: what a test starts several of, stops and kills.

Its work is to write three parts, those that are missing, and then `_SUCCESS`. With `--step` it waits for a line on
stdin before each; with `--trouble` it does not do what it should.
"""

import sys
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from jobs.cli import run
from pipelines import deadline
from pipelines.firing import Slot, due, fire
from pipelines.firing_config import FiringConfig
from pipelines.storage import Folder


@dataclass(frozen=True, kw_only=True)
class Night:
    """Three parts."""

    out: str
    """Where."""
    step: bool = False
    """Wait for a line before each."""
    trouble: Literal["", "sleeps", "does not listen"] = ""
    """What is wrong."""
    grace_s: float = 30.0
    """Of the deadline."""
    firing: FiringConfig = field(default_factory=FiringConfig)


def work(slot: Slot, job: Night) -> dict[str, Any]:
    made = []
    say("works", slot.id)
    while job.trouble:
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            if job.trouble == "sleeps":
                raise
    for part in range(3):
        if job.step:
            sys.stdin.readline()
        if not slot.folder.exists(f"part-{part}"):
            slot.check()
            slot.folder.put(f"part-{part}", str(slot.seeds(range(10))).encode())
            made.append(part)
        say("part", part)
    slot.check()
    slot.folder.put("_SUCCESS", b"")
    return {"made": made}


def say(*words: object) -> None:
    sys.stderr.write(f"{' '.join(map(str, words))}\n")
    sys.stderr.flush()


def night(job: Night) -> dict[str, Any]:
    deadline.GRACE_S = job.grace_s
    return fire(job.firing, Folder(job.out), lambda slot: work(slot, job))


def dry_run(job: Night) -> dict[str, Any]:
    return {"slots": due(job.firing, Folder(job.out))}


if __name__ == "__main__":
    sys.exit(run(Night, None, work=night, plan=dry_run))
