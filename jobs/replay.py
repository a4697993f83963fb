#!/usr/bin/env python3
"""Deliver what runs have recorded while their tracker was away."""

import sys

from jobs.cli import run
from pipelines.replay import ReplayJob, dry_run, replay


def main(argv: list[str] | None = None) -> int:
    """Run the job and return its exit code; folders may come first, without a flag."""
    words = sys.argv[1:] if argv is None else argv
    return run(ReplayJob, ["--runs", *words] if words and not words[0].startswith("-") else words, replay, dry_run)


if __name__ == "__main__":
    sys.exit(main())
