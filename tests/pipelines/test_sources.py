"""Image files, Parquet files and tars, whole and broken, as streams of entries."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import sources as module
from pipelines.errors import ConfigurationError, DataError, TryAgainError
from pipelines.images import encode
from pipelines.labels import read_labels, sorted_labels
from pipelines.sources import Entry, Source, kind_of, of_kind, portions
from pipelines.storage import Folder
from pipelines.stored import Stored

N = 30
PICTURES = [encode(np.full((4, 4, 3), i, np.uint8), "png") for i in range(N)]


def entries(
    folder: Folder, kind: Any, labels: Any = "own", listed: dict[str, str] | None = None, **columns: str
) -> list[Entry]:
    source = Source(
        folder=folder, kind=kind, labels=labels, **{"image_column": "image", "label_column": "label"} | columns
    )
    return list(source.entries(of_kind(folder.find(), kind), listed or {}))


def tar(members: list[tuple[str, bytes]], end: bool = True) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            file.addfile(about, io.BytesIO(data))
        stop = file.offset
    return buffer.getvalue() if end else buffer.getvalue()[:stop]


def samples(extension: str = "png") -> list[tuple[str, bytes]]:
    return [
        member
        for i, picture in enumerate(PICTURES)
        for member in ((f"a/{i:03d}.{extension}", picture), (f"a/{i:03d}.cls", str(i % 3).encode()))
    ]


def parquet(columns: dict[str, Any], rows: int = 8, metadata: dict[bytes, bytes] | None = None) -> bytes:
    table, buffer = pa.table(columns), io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), buffer, row_group_size=rows)
    return buffer.getvalue()


def test_the_kind_is_seen_in_the_names(folder: Folder) -> None:
    def listed(*names: str) -> list[Stored]:
        return [Stored(name, 1, "") for name in names]

    assert kind_of(listed("a.JPG", "readme.txt"), "auto", "u") == "files"
    assert kind_of(listed("a.parquet", "_SUCCESS", "b.parquet"), "auto", "u") == "parquet"
    assert kind_of(listed("x/a.tar"), "auto", "u") == "tar"
    both = listed("a.jpg", "b.png", "c.tar")
    says = r"several kinds, 2 of kind files and 1 of kind tar: set ingest.source_kind to one, such as files"
    with pytest.raises(ConfigurationError, match=says):
        kind_of(both, "auto", "u")
    assert kind_of(both, "tar", "u") == "tar"
    with pytest.raises(DataError, match=r"holds no images: none of its 3 files ends in \.parquet"):
        kind_of(both, "parquet", "u")
    with pytest.raises(DataError, match=r"holds no images: there is nothing there"):
        kind_of([], "auto", "u")


def test_files_are_fetched_a_few_at_a_time() -> None:
    sizes = [1] * 70 + [module.FETCH_BYTES * 2, 5, module.FETCH_BYTES - 5, 1]
    cut = list(portions(sizes))
    assert [i for part in cut for i in range(part.start, part.stop)] == list(range(len(sizes)))
    for part in cut:
        assert part.stop - part.start <= module.FETCH_FILES
        assert part.stop - part.start == 1 or sum(sizes[part]) <= module.FETCH_BYTES
    assert len(cut) == 6 and list(portions([])) == []


def test_files_have_the_labels_of_their_folders(folder: Folder) -> None:
    for i, picture in enumerate(PICTURES):
        folder.put(f"deep/{i % 3}/{i:03d}.png", picture)
    found = entries(folder, "files")
    assert [entry.label for entry in found] == sorted(str(i % 3) for i in range(N))
    assert {entry.path: entry.data for entry in found} == {
        f"deep/{i % 3}/{i:03d}.png": p for i, p in enumerate(PICTURES)
    }
    assert all(entry.label is None for entry in entries(folder, "files", "none"))


def test_a_file_that_is_too_large_is_not_fetched(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 1000)
    folder.put("a.png", PICTURES[0])
    folder.put("b.png", bytes(1001))
    folder.put("t.tar", tar([("c.png", bytes(1001)), ("d.png", PICTURES[0])]))
    fetched: list[str] = []
    get_many = Folder.get_many
    monkeypatch.setattr(Folder, "get_many", lambda self, names: fetched.extend(names) or get_many(self, names))
    good, large = entries(folder, "files")
    assert (good.data, large.reason) == (PICTURES[0], "1001 bytes are more than 1000")
    assert fetched == ["a.png"]
    large, good = entries(folder, "tar")
    assert (good.data, large.reason) == (PICTURES[0], "1001 bytes are more than 1000")
    folder.put("p.parquet", parquet({"image": pa.array([bytes(1001), PICTURES[0]], pa.binary())}))
    large, good = entries(folder, "parquet")
    assert (good.data, large.data, large.reason) == (PICTURES[0], b"", "1001 bytes are more than 1000")


@pytest.mark.parametrize("extension", ["png", "PNG", "jpg", "webp"])
def test_a_tar_holds_samples(extension: str, folder: Folder) -> None:
    folder.put("x/0.tar", tar(samples(extension)))
    found = entries(folder, "tar")
    assert found == [Entry(f"x/0.tar/a/{i:03d}.{extension}", PICTURES[i], str(i % 3)) for i in range(N)]


def test_what_else_a_sample_may_hold(folder: Folder) -> None:
    a, b = PICTURES[:2]
    members = [
        ("d/", b""), ("1.json", b'{"label": 7, "caption": "x"}'), ("1.png", a),  # the label may come first
        ("2.seg.png", b), ("2.png", a), ("2.txt", b" a label \n"),  # 2.seg.png is something else
        ("3.jpg", a), ("3.png", b), ("3.json", b'{"label": 7}'), ("3.cls", b"5"),  # .cls before .json, the first image
        ("4.png", a), ("4.json", b'{"caption": "no label"}'), ("4.npy", b"x"),
        ("5.txt", b"no image"), ("6.png", a), ("6.json", b"[}"), ("7.png", a), ("7.cls", b"\xff"),
        ("other/7.png", a), ("7.png", b), ("ü 8.png", b),
    ]  # fmt: skip
    folder.put("t.tar", tar(members))
    assert entries(folder, "tar") == [
        Entry("t.tar/1.png", a, "7"),
        Entry("t.tar/2.png", a, "a label"),
        Entry("t.tar/3.jpg", a, "5"),
        Entry("t.tar/4.png", a, None),
        Entry("t.tar/5", b"", None, "the sample has no image"),
        Entry("t.tar/6.png", b"", None, "its label cannot be read: Expecting value: line 1 column 2 (char 1)"),
        Entry("t.tar/7.png", b"", None, found_reason(folder, "t.tar/7.png")),
        Entry("t.tar/other/7.png", a, None),
        Entry("t.tar/7.png", b, None),
        Entry("t.tar/ü 8.png", b, None),
    ]


def found_reason(folder: Folder, path: str) -> str:
    reason = next(entry.reason for entry in entries(folder, "tar") if entry.path == path)
    assert "its label cannot be read: 'utf-8' codec" in reason
    return reason


@pytest.mark.parametrize("cut", ["in a picture", "in a header", "between members", "a broken header", "empty", "text"])
def test_a_broken_tar_costs_what_comes_after_the_break(cut: str, folder: Folder) -> None:
    whole = tar(samples())
    block = 4 * 512  # picture and label, each with its header
    assert len(PICTURES[0]) < 512
    data, good = {
        "in a picture": (whole[: 10 * block + 512 + 40], 10),
        "in a header": (whole[: 10 * block + 200], 9),  # the tenth may have had more members
        "between members": (whole[: 10 * block], 9),
        "a broken header": (whole[: 10 * block] + b"x" * 512 + whole[10 * block + 512 :], 9),
        "empty": (b"", 0),
        "text": (b"no tar at all" * 100, 0),
    }[cut]
    folder.put("bad.tar", data)
    folder.put("fine.tar", whole)
    found = entries(folder, "tar")
    assert [entry.data for entry in found if not entry.reason][-N:] == PICTURES
    broken = [i for i, entry in enumerate(found) if entry.reason]
    assert len(broken) == 1 and found[broken[0]].rest_lost and found[broken[0]].path == "bad.tar"
    assert [entry.data for entry in found[: broken[0]]] in (PICTURES[:good], PICTURES[: good + 1])


@pytest.mark.parametrize("label", ['{"label": "\\ud83d"}', "[" * 100_000], ids=["half a character", "too deep"])
def test_a_label_that_nothing_can_hold_costs_its_image(label: str, folder: Folder) -> None:
    folder.put("t.tar", tar([("1.png", PICTURES[0]), ("1.json", label.encode()), ("2.png", PICTURES[1])]))
    bad, fine = entries(folder, "tar")
    assert bad.data == b"" and bad.label is None and bad.reason.startswith("its label ")
    assert fine == Entry("t.tar/2.png", PICTURES[1], None)


def test_a_name_that_never_ends_costs_what_comes_after_it(folder: Folder) -> None:
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 5
    chain = (long_name.tobuf(tarfile.GNU_FORMAT) + b"name\0".ljust(512, b"\0")) * 2000
    folder.put("bad.tar", tar([("1.png", PICTURES[0])], end=False) + chain + bytes(1024))
    folder.put("fine.tar", tar(samples()))
    found = entries(folder, "tar")
    assert [entry.path for entry in found if entry.reason] == ["bad.tar"]
    assert [entry.data for entry in found if not entry.reason][-N:] == PICTURES


def test_a_tar_without_its_end_is_broken(folder: Folder) -> None:
    """All members are there, but who can know?"""
    folder.put("a.tar", tar(samples(), end=False))
    found = entries(folder, "tar")
    assert len(found) == N + 1 and "it has no end, and is cut off or damaged at byte" in found[-1].reason


def test_a_tar_is_read_in_pieces(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its size, little of it is in memory, and each byte is fetched once."""
    monkeypatch.setattr(module, "_READ_BYTES", 4096)
    folder.put("a.tar", tar(samples()))
    sizes: list[int] = []
    get_range = Folder.get_range

    def counted(self: Folder, name: str, start: int, stop: int) -> bytes:
        sizes.append(stop - start)
        return get_range(self, name, start, stop)

    monkeypatch.setattr(Folder, "get_range", counted)
    assert len(entries(folder, "tar")) == N
    assert max(sizes) <= 1 << 20 and sum(sizes) <= len(folder.get("a.tar")) + 512


@pytest.mark.parametrize("layout", ["bytes", "large bytes", "struct", "named"])
def test_parquet_holds_rows(layout: str, folder: Folder) -> None:
    images: Any = {
        "bytes": pa.array(PICTURES, pa.binary()),
        "large bytes": pa.array(PICTURES, pa.large_binary()),
    }.get(layout, pa.array([{"bytes": picture, "path": "x"} for picture in PICTURES]))
    names = {"info": {"features": {"kind": {"names": ["cat", "dog", "elk"], "_type": "ClassLabel"}}}}
    metadata = {b"huggingface": json.dumps(names).encode()} if layout == "named" else None
    labels = [-1 if i == 29 else i % 3 for i in range(N)]
    column = {"image": "image", "label": "label"} if layout != "named" else {"image": "img", "label": "kind"}
    folder.put("a.parquet", parquet({column["label"]: labels, column["image"]: images, "other": labels}, 8, metadata))
    found = entries(folder, "parquet", image_column=column["image"], label_column=column["label"])
    words = ["cat", "dog", "elk"] if layout == "named" else ["0", "1", "2"]
    assert found == [
        Entry(f"a.parquet/{i}", PICTURES[i], (None if layout == "named" else "-1") if i == 29 else words[i % 3])
        for i in range(N)
    ]


def test_a_broken_row_costs_itself_and_no_label_is_none(folder: Folder) -> None:
    folder.put("a.parquet", parquet({"image": pa.array([PICTURES[0], None, b"", PICTURES[1]], pa.binary())}))
    found = entries(folder, "parquet")
    assert [entry.data for entry in found] == [PICTURES[0], b"", b"", PICTURES[1]]
    assert all(entry.label is None and not entry.reason for entry in found)  # the decoder will say that it is empty


@pytest.mark.parametrize("what", ["no column", "a column of text", "text", "empty", "cut", "a flipped page"])
def test_a_broken_parquet_file_costs_itself(what: str, folder: Folder) -> None:
    good = parquet({"image": pa.array(PICTURES, pa.binary()), "label": list(range(N))})
    big = pa.array([np.random.default_rng(i).bytes(2000) for i in range(N)], pa.binary())
    checked = io.BytesIO()
    pq.write_table(pa.table({"image": big}), checked, row_group_size=8, write_page_checksum=True)
    flipped = bytearray(checked.getvalue())
    flipped[30_000] ^= 1
    data, says = {
        "no column": (parquet({"img": PICTURES, "label": list(range(N))}), "no column 'image' but img, label; set"),
        "a column of text": (parquet({"image": ["a.png"] * N}), "its column 'image' holds string, not the bytes"),
        "text": (b"not parquet at all", "Parquet"),
        "empty": (b"", "Parquet|empty|size is 0"),
        "cut": (good[: len(good) // 2], "Parquet"),
        "a flipped page": (bytes(flipped), "CRC"),
    }[what]
    folder.put("bad.parquet", data)
    folder.put("fine.parquet", good)
    found = entries(folder, "parquet")
    assert [entry.data for entry in found][-N:] == PICTURES
    (broken,) = [entry for entry in found if entry.reason]
    assert broken.path == "bad.parquet" and broken.rest_lost
    assert any(word in broken.reason for word in says.split("|")), broken.reason
    assert len(found) - N - 1 == (8 if what == "a flipped page" else 0), "the row groups before the break are good"


@pytest.mark.parametrize("kind", ["files", "parquet", "tar"])
def test_storage_that_fails_is_not_a_broken_file(kind: str, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.put("a.png", PICTURES[0])
    folder.put("a.parquet", parquet({"image": pa.array(PICTURES, pa.binary())}))
    folder.put("a.tar", tar(samples()))

    def reset(*_: object, **__: object) -> bytes:
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(type(folder.filesystem), "cat_file", reset)
    with pytest.raises(TryAgainError, match="does not answer"):
        entries(folder, kind)


def test_labels_from_a_list(folder: Folder, tmp_path: Path) -> None:
    for i, picture in enumerate(PICTURES[:3]):
        folder.put(f"{i},ü.png", picture)
    folder.put("a.tar", tar([("x.png", PICTURES[3]), ("x.cls", b"9")]))
    (tmp_path / "labels.csv").write_text(
        '\ufefflabel,path,note\ncat,"0,ü.png",x\n"a dog, b","1,ü.png",\nelk,a.tar/x.png,\n', encoding="utf-8"
    )
    listed = read_labels(str(tmp_path / "labels.csv"))
    assert listed == {"0,ü.png": "cat", "1,ü.png": "a dog, b", "a.tar/x.png": "elk"}
    found = entries(folder, "files", "listed", listed)
    assert [entry.label for entry in found] == ["cat", "a dog, b", None]
    assert [entry.reason for entry in found] == ["", "", "the list of labels has no line for it"]
    assert [entry.label for entry in entries(folder, "tar", "listed", listed)] == ["elk"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"0.png,cat\n", "its first line must name the columns path,label"),
        (b"", "its first line must name the columns path,label"),
        (b"path,label\n0.png\n", "line 2, lacks the path or the label"),
        (b"path,label\n0.png,cat\n0.png,dog\n", "gives 0.png two labels, cat and dog"),
        (b"path,label\n\xff\xfe,cat\n", "is not a CSV file in UTF-8"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(text: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(text)
    with pytest.raises(DataError, match=says):
        read_labels(str(tmp_path / "labels.csv"))
    with pytest.raises(DataError, match="does not exist"):
        read_labels(str(tmp_path / "missing.csv"))


def test_a_list_may_lie_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "our-labels.csv").write_text("path,label\na.png,cat\n")
    Folder("memory://").put("our-labels.csv", b"path,label\na.png,dog\n")
    monkeypatch.chdir(tmp_path)
    for url in ("our-labels.csv", "./our-labels.csv", "file:our-labels.csv", f"file://{tmp_path}/our-labels.csv"):
        assert read_labels(url) == {"a.png": "cat"}
    assert read_labels("memory://our-labels.csv") == {"a.png": "dog"}
    for url in ("/our-labels.csv", "file:///our-labels.csv"):
        with pytest.raises(DataError, match=r"our-labels.csv does not exist"):  # in the root, not here
            read_labels(url)


def test_numbers_are_sorted_as_numbers() -> None:
    assert sorted_labels({"10", "9", "0", "b", "a", "²"}) == ["a", "b", "²", "0", "9", "10"]
