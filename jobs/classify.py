#!/usr/bin/env python3
"""Train a small classifier on a labelled data set, for features that scores can go by."""

import sys

from jobs.cli import run
from pipelines.classify import ClassifyJob, classify, dry_run


def main(argv: list[str] | None = None) -> int:
    """Run the job and return its exit code."""
    return run(ClassifyJob, argv, work=classify, plan=dry_run)


if __name__ == "__main__":
    sys.exit(main())
