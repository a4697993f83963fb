#!/usr/bin/env python3
"""Make a data set of raw images: Parquet shards and a manifest."""

import sys

from jobs.cli import run
from pipelines.ingest import IngestJob, dry_run, ingest_job


def main(argv: list[str] | None = None) -> int:
    """Run the job and return its exit code."""
    return run(IngestJob, argv, work=ingest_job, plan=dry_run)


if __name__ == "__main__":
    sys.exit(main())
