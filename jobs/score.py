#!/usr/bin/env python3
"""Measure how far two sets of pictures are apart: samples, data sets, or one of each."""

import sys

from jobs.cli import run
from pipelines.score_config import ScoreJob
from pipelines.scoring import dry_run, score_job


def main(argv: list[str] | None = None) -> int:
    """Run the job and return its exit code."""
    return run(ScoreJob, argv, work=score_job, plan=dry_run)


if __name__ == "__main__":
    sys.exit(main())
