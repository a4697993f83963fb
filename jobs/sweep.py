#!/usr/bin/env python3
"""Train several networks that differ in some settings, side by side, and compare them."""

import sys

from jobs.cli import run
from jobs.presets import SWEEPS
from pipelines.sweep import dry_run, sweep
from pipelines.sweep_plan import SweepJob


def main(argv: list[str] | None = None) -> int:
    """Run the job and return its exit code."""
    return run(SweepJob, argv, work=sweep, plan=dry_run, presets=SWEEPS)


if __name__ == "__main__":
    sys.exit(main())
