"""Samples as jobs/sample.py does, but that each actor leaves word of what it has drawn.

python -m tests.jobs.drawn FLAGS...
"""

import sys

from jobs.sample import main
from pipelines import sampling
from tests.pipelines.helpers import WhereItDraws

if __name__ == "__main__":
    sampling.DrawShard = WhereItDraws  # type: ignore[misc]
    sys.exit(main())
