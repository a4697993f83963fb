#!/usr/bin/env python3
"""Train ε_θ on images, then draw samples from it and score them."""

import sys

from jobs.cli import run
from jobs.presets import PRESETS
from pipelines.config import TrainJob
from pipelines.rehearsal import dry_run
from pipelines.training import train


def main(argv: list[str] | None = None) -> int:
    """Run the job and return its exit code."""
    return run(TrainJob, argv, work=train, plan=dry_run, presets=PRESETS)


if __name__ == "__main__":
    sys.exit(main())
