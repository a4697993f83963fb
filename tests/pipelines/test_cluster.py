"""The end of a cluster of our own, while other threads go on."""

import subprocess
import sys

import pytest

from tests.processes import CODE, without_ray

pytestmark = pytest.mark.ray

ENDS = """
import threading, time
import ray
from pipelines.cluster import cluster

class Node:
    pass

def work():
    while refs:
        node = Node()
        node.itself, node.ref = node, refs.pop()  # only the collector of cycles frees it, and what is Ray's with it
        kept = [[] for _ in range(3000)]  # which sets it off, in this thread

with cluster():
    refs = [ray.put(0) for _ in range(60_000)]
    threading.Thread(target=work, daemon=True).start()
    time.sleep(0.1)
assert refs, "there was nothing left to collect"
print("went on")
"""


def test_what_is_collected_meanwhile_does_not_end_the_process() -> None:
    """Ray ends a process, with 1, that touches it while it shuts down."""
    done = subprocess.run(
        [sys.executable, "-c", ENDS], cwd=CODE, env=without_ray() | {"PYTHONPATH": str(CODE)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
