"""Where the spools of a run lie, and what becomes of those that could not be delivered.

The spool of a run whose folder is on this machine lies in that folder. Of one in object storage it lies in the user's
cache, since a database must be a local file; what is left in it when the job ends is moved to the run's folder, so that
a start on another machine finds it.
"""

import logging
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.entries import Target
from pipelines.errors import BrickyardError
from pipelines.spool import Spool
from pipelines.spool import waiting as waiting_in
from pipelines.storage import Folder

FOLDER = "spool"
"""Within that of the run."""
COMMAND = "python jobs/replay.py"

log = logging.getLogger("brickyard.tracking")


def spool_path(home: Folder, target: Target) -> Path:
    """Return where the spool of a run is to lie on this machine."""
    if home.is_local:
        return Path(home.path(f"{FOLDER}/{target.key}.db"))
    return _cache() / f"{target.run_id}-{target.key}.db"


def here(home: Folder, run_id: str) -> list[Path]:
    """Return the spools of a run that lie on this machine."""
    if home.is_local:
        return sorted(Path(home.path(FOLDER)).glob("*.db"))
    return sorted(_cache().glob(f"{run_id}-*.db"))


def brought(home: Folder, key: str = "") -> Iterator[Spool]:
    """Yield copies of what other jobs have moved to the folder of a run, the oldest first; what is emptied is removed.

    Args:
        home: the folder of the run.
        key: of a target; empty: all.
    """
    try:
        for name in _moved(home, key):
            with _fetched(home, name) as path:
                try:
                    spool = Spool(path, None)
                except Exception as error:  # damaged, or of another version: the others are none the worse
                    log.warning("%s/%s/%s cannot be delivered: %s", home.url, FOLDER, name, error)
                    continue
                yield spool
                if spool.entries() == 0:
                    (home / FOLDER / name).delete()
                spool.close()
    except BrickyardError as error:  # what this job records does not wait for it
        log.warning("what an earlier job left to be recorded could not be fetched: %s", error)


def waiting(home: Folder, run_id: str) -> int:
    """Return how many entries of a run wait to be delivered, having changed nothing."""
    found = sum(_waiting(path) for path in here(home, run_id))
    for name in _moved(home):
        with _fetched(home, name) as path:
            found += _waiting(path)
    return found


def _waiting(path: Path) -> int:
    try:
        return waiting_in(path)
    except sqlite3.Error as error:
        log.warning("%s cannot be delivered: %s", path.name, error)
        return 0


def _moved(home: Folder, key: str = "") -> list[str]:
    """Return the names of the spools that were moved to the folder of a run in object storage, the oldest first."""
    if home.is_local:
        return []
    names = [name for name in (home / FOLDER).names() if name.endswith(".db") and name.startswith(key)]
    return sorted(names, key=lambda name: name.partition("-")[2])


@contextmanager
def _fetched(home: Folder, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes((home / FOLDER).get(name))
        yield path


def hand_on(spool: Spool, home: Folder) -> str:
    """Move what a spool still holds to the run's folder, if that is elsewhere; return where it is."""
    if home.is_local:
        return str(spool.path)
    name = f"{FOLDER}/{spool.target.key}-{time.time_ns()}.db"
    try:
        with spool.copied() as content:
            home.put(name, content)
    except Exception as error:  # storage has its bad days too
        log.warning("%s could not be copied to %s: %s", spool.path, home.url, error)
        return str(spool.path)
    return f"{home.url}/{name}"


def _cache() -> Path:
    """Return the folder of spools in the user's cache; of a user who cannot write there, among temporary files."""
    found = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "brickyard" / FOLDER
    try:
        found.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=found):  # a folder on a file system that is read only is there, too
            return found
    except OSError:
        return Path(tempfile.gettempdir()) / f"brickyard-{os.getuid()}" / FOLDER
