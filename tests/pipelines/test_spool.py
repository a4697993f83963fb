import json
import logging
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.entries import Begin, End, Entry, File, Metrics, Parameters, Picture, Tags, Target
from pipelines.spool import MB, Spool, waiting
from tests.processes import CODE

TARGET = Target(uri="http://tracker:5000", experiment="e", artifacts="", name="n", run_id="r")
ALL: list[Entry] = [
    Begin(7, 8),
    Parameters({"seed": "0"}),
    Metrics({"loss": 0.1, "gone": float("inf")}, 100, 8),
    Metrics({"loss": -1e-300}, 200, 9),
    Tags({"ü": "\n"}, 7),
    Picture("samples", 200, 10, b"\x00PNG"),
    File("a/b.bin", 7, bytes(range(256))),
    Metrics({"loss": 0.5}, 300, 11),
    End("KILLED", 12, 7, 0),
]


def emptied(spool: Spool) -> list[Entry | None]:
    found = []
    while several := spool.oldest():
        found += [entry for _, entry in several]
        spool.remove([number for number, _ in several])
    return found


def test_what_comes_out_is_what_went_in(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", TARGET)
    assert all(spool.append(entry) for entry in ALL)
    assert [entry for _, entry in spool.oldest()] == ALL[:1]
    again = Spool(tmp_path / "spool.db", None)  # of another process, perhaps
    assert again.target == TARGET and again.entries() == len(ALL)
    assert emptied(again) == ALL
    assert spool.oldest() == [] and (spool.entries(), spool.size_bytes()) == (0, 0)


def test_metrics_in_a_row_come_out_together_up_to_what_one_request_takes(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", TARGET)
    several = [Metrics({f"m{i}": float(i) for i in range(300)}, position, 0) for position in range(5)]
    for entry in [*several, Tags({}, 0), several[0]]:
        spool.append(entry)
    assert [entry for _, entry in spool.oldest()] == several[:3]
    assert [entry for _, entry in spool.oldest(alone=True)] == several[:1]
    spool.remove([number for number, _ in spool.oldest()])
    assert [entry for _, entry in spool.oldest()] == several[3:]


def test_a_full_spool_takes_what_still_fits_and_counts_the_rest(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", TARGET, max_bytes=MB)
    half = File("half", 7, bytes(MB // 2 - 1000))
    assert [spool.append(half), spool.append(half), spool.append(half), spool.append(Tags({"a": "b"}, 0))] == [
        True, True, False, True,
    ]  # fmt: skip
    assert spool.append(File("rest", 7, bytes(MB - spool.size_bytes() - 200)))
    assert not spool.append(Metrics({"m" * 200: 0.0}, 0, 0)) and spool.dropped() == 2
    assert spool.append(End("FINISHED", 0, 0, 2)), "a run that ends must be seen to end"
    assert spool.size_bytes() <= MB + 200
    spool.remove([spool.oldest()[0].number])
    assert spool.append(Metrics({"m" * 200: 0.0}, 0, 0))
    emptied(spool)
    assert spool.size_bytes() == 0
    spool.close()
    assert (tmp_path / "spool.db").stat().st_size < MB // 2, "the disk has got its room back"


def test_two_processes_append_and_one_takes(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    code = (
        "import sys; from pathlib import Path; from tests.pipelines.test_spool import TARGET, Metrics, Spool\n"
        "spool = Spool(Path(sys.argv[1]), TARGET)\n"
        "for i in range(300): spool.append(Metrics({sys.argv[2]: float(i)}, i, 0))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, path, name], cwd=CODE) for name in ("a", "b")]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    spool, other = Spool(path, None), Spool(path, None)
    with spool.locked() as first, other.locked() as second:
        assert (first, second) == (True, False)
    with other.locked() as first:
        assert first
    found = [entry for entry in emptied(spool) if isinstance(entry, Metrics)]
    for name in ("a", "b"):
        assert [entry.position for entry in found if name in entry.values] == list(range(300))


def test_a_damaged_spool_is_put_aside_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "spool.db"
    path.write_bytes(b"not a database, but long enough to be taken for one" * 100)
    with caplog.at_level(logging.WARNING):
        spool = Spool(path, TARGET)
    assert spool.append(ALL[0]) and emptied(spool) == ALL[:1]
    assert "is damaged" in caplog.text and len(list(tmp_path.glob("spool.db.damaged-*"))) == 1


def test_a_look_changes_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", TARGET)
    for entry in ALL:
        spool.append(entry)
    assert waiting(spool.path) == len(ALL) == len(emptied(spool))
    spool.close()
    assert waiting(spool.path) == 0
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"not a database, but long enough to be taken for one" * 100)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(sqlite3.DatabaseError):
        waiting(damaged)
    with pytest.raises(sqlite3.OperationalError):
        waiting(tmp_path / "nothing.db")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_another_version_wrote_is_known_to_be_unknown(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", TARGET)
    spool.append(ALL[0])
    spool.append(ALL[1])
    spool._database.execute("UPDATE entries SET kind = 'Later' WHERE number = 1")
    spool._database.execute("UPDATE entries SET fields = ? WHERE number = 2", [json.dumps({"values": {}, "more": 1})])
    assert emptied(spool) == [None, None]


def test_a_copy_holds_what_is_then_forgotten_here(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", TARGET)
    for entry in ALL:
        spool.append(entry)
    with pytest.raises(OSError, match="storage"), spool.copied():
        raise OSError("storage took no copy")
    assert spool.entries() == len(ALL)
    with spool.copied() as content:
        spool.append(File("late", 7, b""))  # while the copy is on its way
        (tmp_path / "copy.db").write_bytes(content)
    assert emptied(Spool(tmp_path / "copy.db", None)) == ALL
    assert emptied(spool) == [File("late", 7, b"")]
