"""Saves on a disk that gets full, told step by step: the folder of a small disk, which holds nothing yet.

`python -m tests.pipelines.full_disk FOLDER` exits as a job would.
"""

import contextlib
import sys
import threading
from pathlib import Path

from pipelines import checkpoints
from pipelines.errors import TryAgainError
from pipelines.saver import Saved, Saver
from pipelines.storage import Folder
from pipelines.world import World
from tests.pipelines.states import ABOUT, stepped

disk = Path(sys.argv[1])
ended = threading.Event()
run, state = Folder(f"{disk}/run"), stepped(100)


def say(saved: Saved) -> None:
    newest = checkpoints.newest(run)
    sys.stdout.write(f"{saved.position} {newest and newest[1].position} {saved.failure}\n")
    ended.set()


saver = Saver(run, ABOUT, World(), 2, say)
full = disk / "of others"
for position in (100, 200, 300, 400, 500, 600):
    if position in (200, 400):
        with full.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
    if position == 300:
        full.unlink()
    state.position = position
    try:
        saver.save(state)
        ended.wait()  # to fill the disk meanwhile would be another test
        ended.clear()
    except TryAgainError as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(75)
