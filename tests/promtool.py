"""promtool: this machine's, or Debian's."""

import os
import subprocess

import pytest

from tests.processes import CODE


def promtool(*words: object, given: str = "") -> str:
    """Run it; return what it says."""
    command = [CODE / "infra/prometheus/promtool.sh", *map(str, words)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode == 69 and not os.environ.get("CI"):
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
