#!/usr/bin/env python3
"""Find out where an image comes from: seed, sampler, checkpoint, MLflow run, data and git revision."""

import sys

from jobs.cli import run
from pipelines.trace import dry_run, trace
from pipelines.trace_config import TraceJob


def main(argv: list[str] | None = None) -> int:
    """Run the job and return its exit code; the image may come first, without a flag."""
    words = sys.argv[1:] if argv is None else argv
    return run(TraceJob, ["--image", *words] if words and not words[0].startswith("-") else words, trace, dry_run)


if __name__ == "__main__":
    sys.exit(main())
