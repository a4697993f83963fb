#!/usr/bin/env python3
"""Measure the Fréchet distance between a set of samples and a data set."""

import sys

from jobs.cli import run
from pipelines.config import ScoreJob
from pipelines.scoring import dry_run, score_job


def main(argv: list[str] | None = None) -> int:
    """Run the job and return its exit code."""
    return run(ScoreJob, argv, work=score_job, plan=dry_run)


if __name__ == "__main__":
    sys.exit(main())
