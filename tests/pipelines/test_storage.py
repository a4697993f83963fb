import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import ConfigurationError, DamagedError, DataError, TryAgainError
from pipelines.storage import Folder, absolute


@pytest.fixture(params=["file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "store") if request.param == "file" else f"memory://{tmp_path}/store")


def test_what_is_put_is_got_and_listed(folder: Folder) -> None:
    before = time.time()
    assert folder.names() == [] and folder.find() == []
    folder.put("a/b.txt", b"one")
    folder.put("c.txt", b"three")
    assert folder.get("a/b.txt") == b"one"
    assert folder.names() == ["a", "c.txt"]
    assert [found[:2] for found in folder.find()] == [("a/b.txt", 3), ("c.txt", 5)]
    assert (folder / "a").exists("b.txt") and not folder.exists("b.txt")
    written = folder.written_at("c.txt")
    assert written is not None and before - 1 <= written <= time.time() + 1
    with pytest.raises(DataError, match=r"none\.txt does not exist"):
        folder.written_at("none.txt")
    folder.delete()
    assert folder.names() == []


def test_of_many_creators_one_wins(folder: Folder) -> None:
    won: list[int] = []
    start = threading.Barrier(8)

    def create(i: int) -> None:
        start.wait()
        if folder.create("lock", str(i).encode()):
            won.append(i)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if folder.is_local:  # fsspec's memory file system, a stand-in for tests of its users, checks and then writes
        assert len(won) == 1
    assert folder.get("lock").decode() in map(str, won)
    assert not folder.create("lock", b"late")


def test_a_put_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path / "store"))
    folder.put("a", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"store/a cannot be read or written: .*No space left.*; make room there"):
        folder.put("a", b"new")
    assert folder.get("a") == b"old"
    assert folder.names() == ["a"]


def test_urls_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert absolute("data") == f"file://{tmp_path}/data"
    assert absolute("file:data") == f"file://{tmp_path}/data"
    assert absolute("file:///data/") == "file:///data"
    assert absolute("~/data") == "file:///home/someone/data"
    assert absolute("s3://bucket/data/") == "s3://bucket/data"
    with pytest.raises(ConfigurationError, match="empty"):
        absolute("")


def test_a_missing_object_is_named(folder: Folder) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt does not exist"):
        folder.get("nothing.txt")


def test_an_unknown_scheme_says_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"scheme 's4'.*did you mean s3://"):
        Folder("s4://bucket/x").names()


def test_a_scheme_without_its_driver_says_what_to_install() -> None:
    with pytest.raises(ConfigurationError, match=r"needs a driver that is not installed.*gcsfs"):
        Folder("gs://bucket/x").names()


def test_storage_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:1", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("BRICKYARD_RETRY_S", "0.1")
    with pytest.raises(TryAgainError, match=r"GET http://127.0.0.1:1/bucket/x/y does not answer as it should"):
        Folder("s3://bucket/x").get("y")


def test_a_file_in_the_way_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"file/x cannot be read or written: (NotADirectory|FileExists)Error"):
        Folder(str(tmp_path / "file")).put("x", b"")


def test_links_are_followed_and_what_leads_nowhere_is_empty(tmp_path: Path) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    (elsewhere / "dogs").mkdir(parents=True)
    (elsewhere / "dogs" / "a.png").write_bytes(b"dog")
    (root / "cats").mkdir(parents=True)
    (root / "cats" / "b.png").write_bytes(b"a cat")
    (root / "dogs").symlink_to(elsewhere / "dogs")
    (root / "c.png").symlink_to(elsewhere / "dogs" / "a.png")
    (root / "gone.png").symlink_to(elsewhere / "gone.png")
    (root / "cats" / "round").symlink_to(root)
    folder = Folder(str(root))
    found = folder.find()
    assert [(file.name, file.size_bytes) for file in found] == [
        ("c.png", 3), ("cats/b.png", 5), ("dogs/a.png", 3), ("gone.png", 0),
    ]  # fmt: skip
    there = [file for file in found if file.size_bytes]
    assert folder.get_unchanged([f.name for f in there], [f.version for f in there]) == [b"dog", b"a cat", b"dog"]
    os.utime(elsewhere / "dogs" / "a.png", (1, 1))
    with pytest.raises(DamagedError, match=r"c\.png is not the object that was listed"):
        folder.get_unchanged(["c.png"], [found[0].version])


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    scandir = os.scandir

    def refused(path: str) -> Any:  # root, who runs some tests, may read all
        if str(path).endswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match="Permission denied"):
        Folder(str(tmp_path)).find()
