import subprocess
import sys

from tests.processes import CODE

LOOP = """
import os, sys, time
from pipelines.watch import Watch

def stuck_in_a_collective():
    time.sleep(60)

def come_round():
    for _ in range(25):
        time.sleep(0.2)  # more than the limit in all, far less each time
        watch.step()

watch = Watch(4, lambda stacks: os.write(1, stacks.encode()))
time.sleep(5)  # to start may take longer than a step
come_round()
watch.pause()
time.sleep(5)  # so may storage
os.write(1, b"so far so good\\n")
come_round()
stuck_in_a_collective()
"""


def test_a_loop_that_does_not_come_round_says_where_it_stands_and_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOOP], check=False, cwd=CODE, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 70, done.stderr
    before, stacks = done.stdout.split("so far so good\n")
    assert before == ""
    assert "stuck_in_a_collective" in stacks and "come_round" not in stacks
