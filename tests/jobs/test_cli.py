"""What every job does, whatever it is: here, one that waits."""

import json
import os
import subprocess
import sys
import time

from tests.processes import CODE

WAITS = """
import sys, time
from jobs.cli import run
from pipelines.replay import ReplayJob

def work(job):
    print("works", file=sys.stderr, flush=True)
    time.sleep(600)

sys.exit(run(ReplayJob, ["--runs", "nowhere"], work=work, plan=work))
"""
STARTS_IT = """
import os, subprocess, sys
job = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=os.environ | {"BRICKYARD_LEAVE_WITH": str(os.getpid())})
job.wait()
"""


def test_a_job_leaves_with_the_one_that_started_it() -> None:
    """As if somebody had sent it SIGTERM; the other one has no chance to."""
    parent = subprocess.Popen(
        [sys.executable, "-c", STARTS_IT, WAITS],
        cwd=CODE, env=os.environ | {"PYTHONPATH": str(CODE)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout and parent.stderr
    while "works" not in parent.stderr.readline():
        assert parent.poll() is None
    time.sleep(1.5)
    assert parent.poll() is None, "as long as there is somebody, it goes on"
    parent.kill()
    said = json.loads(parent.stdout.read().splitlines()[-1])  # until the job, too, has closed it
    assert said == {"error": "interrupted", "exit_code": 130}


def test_whoever_has_read_enough_of_the_help_is_not_told_so() -> None:
    command = f"{sys.executable} jobs/train.py --help | head -1"
    done = subprocess.run(command, shell=True, cwd=CODE, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage") and not done.stderr
