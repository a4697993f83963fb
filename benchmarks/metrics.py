"""What does it cost a step to be counted for Prometheus?

    python benchmarks/metrics.py

The first worker counts each step by ``pipelines.metrics.IMAGES.add``; the driver sets some ten gauges at each report.
Measured is the CPU time of a call, with Ray running and without it, in microseconds; a step of the preset `digits`, the
smallest network here, takes some 200,000 of them. Target: less than a thousandth of that.
"""

import ray

from benchmarks.common import Stopwatch, spread
from pipelines.cluster import cluster
from pipelines.metrics import IMAGES, RATE

ROUNDS, CALLS = 15, 20_000


def main() -> None:
    """Measure and print."""
    measure("without Ray")
    with cluster():
        measure("with Ray")


def measure(where: str) -> None:
    for name, call in (("add", IMAGES.add), ("set", RATE.set)):
        microseconds = []
        for _ in range(ROUNDS):
            watch = Stopwatch()
            for _ in range(CALLS):
                call("run", 128)
            microseconds.append(watch.read()[1] / CALLS * 1e6)
        print(f"{where}: {name} takes {spread(microseconds, 2)} µs")
    assert ray.is_initialized() == (where == "with Ray")


if __name__ == "__main__":
    main()
