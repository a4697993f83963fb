"""What is to be recorded, on its way to a tracker: a queue on disk that outlives the process, and has a bound.

One SQLite file in WAL mode for each run and tracker. To append takes no word from any server and no flush of the disk,
so it takes a fraction of a millisecond; SIGKILL loses nothing of it, a power cut perhaps the last moment. What is in it
is JSON and bytes: nothing of it is ever executed.
"""

import fcntl
import json
import logging
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

from pipelines.entries import KINDS, Begin, End, Entry, Metrics, Target

MB = 1 << 20
ROW_BYTES = 64
"""What an entry takes beside its content, about."""
BATCH = 1000
"""Values of metrics that are handed out at once: MLflow takes as many in one request."""
FEW = 100
"""Parameters, or tags, in one entry: MLflow takes as many in one request."""
BUSY_S = 5.0
"""How long one process waits until another has written."""

log = logging.getLogger("brickyard.tracking")


class Numbered(NamedTuple):
    """An entry and its place in the spool. An entry that another version wrote may be unknown here: None."""

    number: int
    entry: Entry | None


class Spool:
    """The queue of one run for one tracker. Several threads may use it, and several processes.

    Args:
        path: the file; it is made if there is none, and one that is damaged is put aside.
        target: where its entries belong; None: what the file says.
        max_bytes: what it may hold.

    Raises:
        sqlite3.Error, OSError: from any method, if the file cannot be used.
        ValueError: if neither says where its entries belong.
    """

    def __init__(self, path: Path, target: Target | None, max_bytes: int = 256 * MB) -> None:
        self.path, self.max_bytes = path, max_bytes
        self.filled = threading.Event()
        """Set by :meth:`append`."""
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = _open(path)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            if target is None:  # it would be made anew for nothing
                raise
            aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
            path.rename(aside)
            log.warning("%s is damaged (%s) and was put aside as %s; what it held is not on record", path, error, aside)
            self._database = _open(path)
        self.target = self._known(target)

    def _known(self, target: Target | None) -> Target:
        with self._transaction() as database:
            if target:
                database.execute("INSERT OR REPLACE INTO about VALUES ('target', ?)", [json.dumps(asdict(target))])
                return target
            found = database.execute("SELECT value FROM about WHERE name = 'target'").fetchone()
        if not found:
            raise ValueError(f"{self.path} does not say where its entries belong; it is no spool")
        return Target(**json.loads(found[0]))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def append(self, entry: Entry) -> bool:
        """Add an entry; return whether it fitted. A begin and an end, which are small, always do."""
        content = {field.name: getattr(entry, field.name) for field in fields(entry)}
        data = content.pop("data", b"")
        text = json.dumps(content)
        size = len(text) + len(data) + ROW_BYTES
        with self._transaction() as database:
            (held,) = database.execute("SELECT bytes FROM held").fetchone()
            fits = held + size <= self.max_bytes or isinstance(entry, Begin | End)
            if fits:
                row = (type(entry).__name__, text, data, size)
                database.execute("INSERT INTO entries (kind, fields, data, bytes) VALUES (?, ?, ?, ?)", row)
                database.execute("UPDATE held SET bytes = bytes + ?", [size])
            else:
                database.execute("UPDATE held SET dropped = dropped + 1")
        self.filled.set()
        return fits

    def oldest(self, alone: bool = False) -> list[Numbered]:
        """Return the oldest entry, with the metrics that follow it if it is one, unless it is wanted alone."""
        with self._lock:
            row = self._database.execute(
                "SELECT number, kind, fields, data FROM entries ORDER BY number LIMIT 1"
            ).fetchone()
            if row is None:
                return []
            found = [_read(*row)]
            if row[1] != Metrics.__name__ or alone:
                return found
            following = self._database.execute(
                "SELECT number, kind, fields FROM entries WHERE number > ? ORDER BY number LIMIT ?", [row[0], BATCH]
            )
            values = len(found[0].entry.values) if isinstance(found[0].entry, Metrics) else BATCH
            for number, kind, text in following:
                if kind != Metrics.__name__:
                    break
                more = _read(number, kind, text, b"")
                values += len(more.entry.values) if isinstance(more.entry, Metrics) else BATCH
                if values > BATCH:
                    break
                found.append(more)
        return found

    def remove(self, numbers: Sequence[int]) -> None:
        """Forget entries."""
        marks = ",".join("?" * len(numbers))
        self._forget(f"number IN ({marks})", list(numbers))

    def _forget(self, which: str, values: Sequence[int]) -> None:
        with self._transaction() as database:
            (size,) = database.execute(f"SELECT COALESCE(SUM(bytes), 0) FROM entries WHERE {which}", values).fetchone()
            database.execute(f"DELETE FROM entries WHERE {which}", values)
            database.execute("UPDATE held SET bytes = bytes - ?", [size])

    def entries(self) -> int:
        """Return how many entries wait."""
        return self._one("SELECT COUNT(*) FROM entries")

    def size_bytes(self) -> int:
        """Return what the entries take."""
        return self._one("SELECT bytes FROM held")

    def dropped(self) -> int:
        """Return how many entries did not fit, ever."""
        return self._one("SELECT dropped FROM held")

    def _one(self, question: str) -> int:
        with self._lock:
            return int(self._database.execute(question).fetchone()[0])

    @contextmanager
    def copied(self) -> Iterator[bytes]:
        """Hand out a file with all that the spool holds, which it forgets when the context ends without an error."""
        last = self._one("SELECT COALESCE(MAX(number), 0) FROM entries")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "spool.db"
            with self._lock:
                self._database.execute("VACUUM INTO ?", [str(copy)])
            yield copy.read_bytes()
        self._forget("number <= ?", [last])

    def close(self) -> None:
        """Let go of the file, and give what it no longer needs back to the disk."""
        with self._lock:
            self._database.executescript("PRAGMA incremental_vacuum")  # execute() would free one page
            self._database.close()

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Whether this context is the only one, in all processes, that takes from the spool."""
        # A file of its own: to close any other handle of a database would drop the locks that SQLite has on it.
        handle = os.open(f"{self.path}.lock", os.O_CREAT | os.O_RDWR, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(handle)


def waiting(path: Path) -> int:
    """Return how many entries wait in a spool, having changed nothing.

    Raises:
        sqlite3.Error: if the file is none.
    """
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_S)) as database:
        return int(database.execute("SELECT COUNT(*) FROM entries").fetchone()[0])


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    for statement in (
        "PRAGMA auto_vacuum = INCREMENTAL",
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = NORMAL",
        # AUTOINCREMENT: a number is never given twice, so what was copied is what it was.
        "CREATE TABLE IF NOT EXISTS entries (number INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT, fields TEXT, "
        "data BLOB, bytes INTEGER)",
        "CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT)",
        "CREATE TABLE IF NOT EXISTS held (one INTEGER PRIMARY KEY CHECK (one = 1), bytes INTEGER, dropped INTEGER)",
        "INSERT OR IGNORE INTO held VALUES (1, 0, 0)",
    ):
        database.execute(statement)
    return database


def _read(number: int, kind: str, text: str, data: bytes) -> Numbered:
    try:
        known = KINDS[kind]
        blob = {"data": data} if any(field.name == "data" for field in fields(known)) else {}
        return Numbered(number, known(**json.loads(text), **blob))
    except (KeyError, TypeError, ValueError):
        return Numbered(number, None)
