#!/usr/bin/env python3
"""Look for copies of training images among samples."""

import sys

from jobs.cli import run
from pipelines.audit import audit_job, dry_run
from pipelines.audit_config import AuditJob


def main(argv: list[str] | None = None) -> int:
    """Run the job and return its exit code."""
    return run(AuditJob, argv, work=audit_job, plan=dry_run)


if __name__ == "__main__":
    sys.exit(main())
