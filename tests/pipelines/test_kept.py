"""What was read from object storage is kept on the disk, as long as it is what it was and there is room."""

import os
import pickle
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.errors import DataError
from pipelines.kept import KeptFolder, kept
from pipelines.storage import Folder
from tests.processes import CODE

DATA = bytes(range(256)) * 40


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.fixture
def remote(s3: Folder) -> Folder:
    s3.put("shard-0.parquet", DATA)
    return s3


def files(home: Path) -> list[Path]:
    return sorted(path for path in home.rglob("*") if path.is_file())


def test_what_was_read_is_not_fetched_again(remote: Folder, home: Path) -> None:
    """By its name and its range, of which neither is another's; and by another process, which is handed the folder."""
    remote.put("part/shard-1.parquet", DATA[::-1])
    folder = kept(remote, "d", 1)
    ranges = {("shard-0.parquet", 0, 10), ("shard-0.parquet", 0, 20), ("part/shard-1.parquet", 0, 10)}
    handed_on = pickle.loads(pickle.dumps(folder))
    read = {one: (handed_on if one[2] == 20 else folder).get_range(*one) for one in ranges}
    assert read == {
        (name, start, stop): (DATA if "0." in name else DATA[::-1])[start:stop] for name, start, stop in read
    }
    remote.delete()
    for again in (folder, handed_on):
        assert {one: again.get_range(*one) for one in ranges} == read
        with pytest.raises(DataError, match="does not exist"):
            again.get_range("shard-0.parquet", 1, 10)
    assert len(files(home)) == 3


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: bytes(4),
        None,
    ],
    ids=["emptied", "cut off", "a flipped bit", "a flipped bit of the checksum", "the checksum of nothing", "removed"],
)
def test_what_is_no_longer_what_it_was_is_fetched_again(
    harm: Callable[[bytes], bytes] | None, remote: Folder, home: Path
) -> None:
    folder = kept(remote, "d", 1)
    folder.get_range("shard-0.parquet", 100, 5000)
    (file,) = files(home)
    whole = file.read_bytes()
    if harm is None:
        file.unlink()
    else:
        file.write_bytes(harm(whole))
    assert folder.get_range("shard-0.parquet", 100, 5000) == DATA[100:5000]
    assert file.read_bytes() == whole


def test_where_there_is_no_room_nothing_more_is_kept_and_what_is_there_stays(remote: Folder, home: Path) -> None:
    folder = kept(remote, "d", 3500e-9)
    for epoch in range(2):
        for start in range(0, 10_000, 1000):
            assert folder.get_range("shard-0.parquet", start, start + 1000) == DATA[start : start + 1000], epoch
    assert [path.stat().st_size for path in files(home)] == [1004] * 3


def test_what_another_process_keeps_takes_room_too(remote: Folder, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.kept.LOOK_EVERY", 2)
    ours, theirs = (kept(remote, "d", 3500e-9) for _ in range(2))
    for start, folder in ((0, ours), (1000, theirs), (2000, theirs), (3000, ours), (4000, ours), (5000, ours)):
        folder.get_range("shard-0.parquet", start, start + 1000)
    assert len(files(home)) == 4, "it had counted on room for one more, and then looked"


def test_other_data_stay_where_there_is_room(remote: Folder, home: Path) -> None:
    for digest in ("one", "other"):
        kept(remote, digest, 3500e-9).get_range("shard-0.parquet", 0, 1000)
    assert {path.parent.name for path in files(home)} == {"one", "other"}


def test_other_data_make_room_and_are_never_taken_for_these(remote: Folder, home: Path) -> None:
    old = kept(remote, "old", 3500e-9)
    for start in (0, 1000, 2000):
        old.get_range("shard-0.parquet", start, start + 1000)
    remote.put("shard-0.parquet", DATA[::-1])
    new = kept(remote, "new", 3500e-9)
    assert new.get_range("shard-0.parquet", 0, 1000) == DATA[::-1][:1000]
    assert {path.parent.name for path in files(home)} == {"new"}


def test_a_disk_that_takes_nothing_costs_nothing_but_the_fetching(remote: Folder, home: Path) -> None:
    home.rmdir()
    home.write_text("in the way")
    assert kept(remote, "d", 1).get_range("shard-0.parquet", 3, 30) == DATA[3:30]


def test_a_folder_that_others_may_write_is_neither_read_nor_written(remote: Folder, home: Path) -> None:
    kept(remote, "d", 1).get_range("shard-0.parquet", 0, 10)
    (file,) = files(home)
    forged = b"forged....."[:10]
    file.write_bytes(forged + zlib.crc32(forged).to_bytes(4, "big"))
    assert kept(remote, "d", 1).get_range("shard-0.parquet", 0, 10) == forged, "this is how it would be"
    file.parent.parent.chmod(0o777)
    assert kept(remote, "d", 1).get_range("shard-0.parquet", 0, 10) == DATA[:10]
    assert file.read_bytes().startswith(forged)


def test_a_folder_of_another_user_is_not_written(remote: Folder, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes it first in a folder that all may write would say what is read."""
    somebody = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: somebody)
    assert kept(remote, "d", 1).get_range("shard-0.parquet", 0, 10) == DATA[:10]
    assert (home / f"brickyard-kept-{somebody}").stat().st_uid != somebody and not files(home)


def test_several_processes_keep_one_copy(remote: Folder, home: Path) -> None:
    read = (
        "import sys; from pipelines.kept import kept; from pipelines.storage import Folder\n"
        "for start in range(0, 10000, 500):\n"
        "    data = kept(Folder(sys.argv[1]), 'd', 1).get_range('shard-0.parquet', start, start + 500)\n"
        "    assert data == (bytes(range(256)) * 40)[start:start + 500]"
    )
    several = [
        subprocess.Popen([sys.executable, "-c", read, remote.url], cwd=CODE, env=os.environ | {"TMPDIR": str(home)})
        for _ in range(4)
    ]
    assert [process.wait() for process in several] == [0] * 4
    assert [path.stat().st_size for path in files(home)] == [504] * 20, "and nothing half written beside it"


def test_a_local_folder_is_read_as_it_is(folder: Folder) -> None:
    assert kept(folder, "d", 1) is folder


def test_without_room_nothing_is_kept(s3: Folder) -> None:
    assert not isinstance(kept(s3, "d", 0), KeptFolder)
