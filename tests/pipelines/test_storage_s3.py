"""Against a real S3 server."""

import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.errors import DamagedError, DataError
from pipelines.storage import Folder
from tests.faults.proxy import FaultProxy


def test_what_is_put_is_got_and_listed(s3: Folder) -> None:
    assert s3.names() == [] and s3.find() == []
    s3.delete()
    s3.put("a/b ü+?#%&=.txt", b"one")
    s3.put("c.txt", b"three")
    s3.put("empty", b"")
    written = s3.written_at("a/b ü+?#%&=.txt")
    assert written is not None and abs(written - time.time()) < 60
    assert s3.get("a/b ü+?#%&=.txt") == b"one" and s3.get("empty") == b""
    assert s3.names() == ["a", "c.txt", "empty"]
    assert [found[:2] for found in s3.find()] == [("a/b ü+?#%&=.txt", 3), ("c.txt", 5), ("empty", 0)]
    before = {found.name: found.version for found in s3.find()}
    s3.put("c.txt", b"eerht")
    assert {name for name, _, version in s3.find() if version != before[name]} == {"c.txt"}
    assert (s3 / "a").exists("b ü+?#%&=.txt") and not s3.exists("b ü+?#%&=.txt")
    s3.delete()
    assert s3.find() == [] and s3.names() == []


def test_a_name_may_hold_two_slashes(s3: Folder) -> None:
    """An object store has no folders: these are three objects."""
    for name in ("a.png", "/a.png", "b//a.png"):
        s3.put(name, name.encode())
    assert [found.name for found in s3.find()] == ["/a.png", "a.png", "b//a.png"]
    assert s3.get_many(["/a.png", "a.png", "b//a.png"]) == [b"/a.png", b"a.png", b"b//a.png"]


def test_ranges_are_those_of_slices(s3: Folder, tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(1000)
    s3.put("a", data)
    ranges = [(0, 1000), (0, 1), (999, 1000), (10, 10), (10, 5), (900, 2000), (3, 500)]
    assert [s3.get_range("a", *each) for each in ranges] == [data[start:stop] for start, stop in ranges]
    assert s3.get_ranges("a", ranges) == [data[start:stop] for start, stop in ranges]
    local = Folder(str(tmp_path))
    local.put("a", data)
    assert local.get_ranges("a", ranges) == [data[start:stop] for start, stop in ranges]


def test_many_come_in_the_order_asked_for(s3: Folder) -> None:
    names = [f"{i:03d}" for i in range(100)]
    for name in names:
        s3.put(name, name.encode() * 1000)
    asked = [names[i] for i in np.random.default_rng(0).integers(0, 100, 300)]
    assert s3.get_many(asked) == [name.encode() * 1000 for name in asked]
    with pytest.raises(DamagedError, match=r"/nowhere does not exist"):
        s3.get_many([*names, "nowhere", *names])


def test_an_object_larger_than_a_piece_arrives_whole(s3: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PIECE_BYTES", 70_000)
    for size in (0, 1, 69_999, 70_000, 1_500_001):
        data = np.random.default_rng(size).bytes(size)
        s3.put("a", data)
        assert b"".join(s3.pieces("a", size)) == data
    with pytest.raises(DamagedError, match="/b does not exist"):
        list(s3.pieces("b", 1))


def test_an_upload_in_parts_is_one_object(s3: Folder) -> None:
    data = np.random.default_rng(0).bytes(101 << 20)  # the client sends 100 MiB and more in parts
    assert s3.create("a", data)
    assert not s3.create("a", b"late")
    assert s3.get("a") == data
    assert [found[:2] for found in s3.find()] == [("a", len(data))]


def test_of_many_creators_one_wins(s3: Folder) -> None:
    for attempt in range(5):
        won: list[int] = []
        start = threading.Barrier(8)

        def create(
            i: int, name: str = f"lock-{attempt}", won: list[int] = won, start: threading.Barrier = start
        ) -> None:
            mine = pickle.loads(pickle.dumps(s3))  # as another worker has it
            start.wait()
            if mine.create(name, str(i).encode()):
                won.append(i)

        threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [s3.get(f"lock-{attempt}").decode()] == [str(i) for i in won]


def test_a_row_group_costs_the_footer_and_its_columns(
    s3: Folder, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 4000
    table = pa.table({"image": [np.random.default_rng(i).bytes(3072) for i in range(rows)], "label": np.arange(rows)})
    with s3.filesystem.open(s3.path("a.parquet"), "wb") as file:
        pq.write_table(table, file, row_group_size=500)
    with FaultProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with Folder(s3.url).open("a.parquet") as file:
            parquet = pq.ParquetFile(file, pre_buffer=True)
            opened = len(proxy.requests)
            for group in (6, 1):
                assert parquet.read_row_group(group, columns=["image", "label"]) == table.slice(group * 500, 500)
    assert opened == 2  # its size, its footer
    assert len(proxy.requests) == opened + 2
    assert proxy.read_bytes < 3 * 500 * 3072  # of eight row groups


def test_what_storage_refuses_is_told(s3: Folder, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not s3.exists("nothing")
    with pytest.raises(DamagedError, match=rf"{s3.url}/nothing does not exist"):
        s3.get("nothing")
    with pytest.raises(DamagedError, match=rf"{s3.url}/nothing does not exist"):
        s3.open("nothing")
    nowhere = Folder("s3://no-such-bucket/x")
    assert not nowhere.exists("a")
    for action in [action for name, action in ACTIONS.items() if name not in ("exists", "delete")]:
        with pytest.raises(DataError, match=r"s3://no-such-bucket/x.* there is no such bucket"):
            action(nowhere)
    s3.put("a", b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.replace("127.0.0.1", "localhost"))  # a client that is new
    for action in ACTIONS.values():
        with pytest.raises(DataError, match=rf"{s3.url}.*PermissionError.*check the address, the credentials"):
            action(Folder(s3.url))


def read_all(folder: Folder) -> bytes:
    with folder.open("a") as file:
        return file.read()


ACTIONS = {
    "get": lambda folder: folder.get("a"),
    "get_range": lambda folder: folder.get_range("a", 0, 10),
    "get_many": lambda folder: folder.get_many(["a", "a"]),
    "open": read_all,
    "put": lambda folder: folder.put("b", b"2"),
    "create": lambda folder: folder.create("c", b"3"),
    "names": lambda folder: folder.names(),
    "find": lambda folder: folder.find(),
    "exists": lambda folder: folder.exists("a"),
    "delete": lambda folder: folder.delete(),
}
