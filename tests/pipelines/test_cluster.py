"""The end of a cluster of our own, while other threads go on."""

import subprocess
import sys

import pytest

from tests.processes import CODE, without_ray

pytestmark = pytest.mark.ray

ENDS = """
import gc, threading, time
import ray
from pipelines.cluster import cluster

class Node:
    pass

def work():
    while not done:  # objects that come and go set off the collector of cycles, in this thread
        kept = [[] for _ in range(2000)]

done = False
gc.disable()
with cluster():
    for _ in range(20_000):
        node = Node()
        node.itself, node.ref = node, ray.put(0)  # only the collector frees it, and what is Ray's with it
    threading.Thread(target=work, daemon=True).start()
    gc.enable()
done = True
print("went on")
"""


def test_what_is_collected_meanwhile_does_not_end_the_process() -> None:
    """Ray ends a process, with 1, that touches it while it shuts down."""
    done = subprocess.run(
        [sys.executable, "-c", ENDS], cwd=CODE, env=without_ray() | {"PYTHONPATH": str(CODE)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
