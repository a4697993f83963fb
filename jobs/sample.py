#!/usr/bin/env python3
"""Draw one sample per seed, exactly once, into Parquet shards."""

import sys

from jobs.cli import run
from pipelines.sample_config import SampleJob
from pipelines.sampling import dry_run, sample_job


def main(argv: list[str] | None = None) -> int:
    """Run the job and return its exit code."""
    return run(SampleJob, argv, work=sample_job, plan=dry_run)


if __name__ == "__main__":
    sys.exit(main())
