"""A large Parquet file is spread over tasks, and nobody can tell from the data set how."""

import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import DataError, TryAgainError
from pipelines.images import encode
from pipelines.ingest import IngestJob, dry_run, ingest
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.parts import DigestPart, WritePart, as_row
from pipelines.storage import Folder

N, SHARD = 300, 48
CONFIG = IngestConfig(side=8, channels=1, shard_rows=SHARD, row_group_rows=16, max_bad_share=0.2)
BAD = {0: b"no image", 47: None, 48: b"", 130: b"\x89PNG\r\n\x1a\n", 299: None}
"""Rows that cannot be used: first and last ones of parts among them."""
Digits = tuple[np.ndarray, np.ndarray]


def table(digits: Digits, rows: Iterable[int] = range(N)) -> Any:
    """Digits as PNG files: row 200 + i is the same picture as row i for i < 20, but for the bad ones."""
    which = [row - 200 if 200 <= row < 220 else row for row in rows]
    images = [BAD.get(row, encode(digits[0][i], "png")) for row, i in zip(rows, which, strict=True)]
    return pa.table({"image": pa.array(images, pa.binary()), "label": pa.array(digits[1][which])})


def put(folder: Folder, name: str, rows: Any, group_rows: int) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, row_group_size=group_rows, write_page_checksum=True, use_dictionary=False)
    folder.put(name, buffer.getvalue())
    return buffer.getvalue()


def made(folder: Folder) -> dict[str, bytes]:
    """All that an ingest makes but for what names its source."""
    found = {file.name: folder.get(file.name) for file in folder.find()}
    return {name: data for name, data in found.items() if name not in ("ingest.json", "manifest.json")}


def tasks(plan: IngestPlan) -> list[list[int]]:
    return plan.runs(list(range(plan.parts)))


@pytest.mark.parametrize("duplicates", [False, True])
def test_a_split_file_is_the_data_set_that_it_is_unsplit(
    duplicates: bool, folder: Folder, digits: Digits, alone: None
) -> None:
    """One row group is one task; the shards are those of the rows that they are of, whatever the row groups."""
    config, rows = replace(CONFIG, drop_duplicates=duplicates), table(digits)
    made_of: dict[int, tuple[str, dict[str, bytes]]] = {}
    for group_rows, expected in ((N, 1), (299, 1), (150, 2), (64, 5), (50, 6), (48, 7), (7, 7), (1, 7)):
        put(folder / f"raw-{group_rows}", "a.parquet", rows, group_rows)
        plan = IngestPlan.make(folder / f"raw-{group_rows}", folder / f"out-{group_rows}", config)
        assert (plan.parts, len(tasks(plan))) == (7, expected), group_rows
        manifest = ingest(plan)
        made_of[group_rows] = manifest.digest, made(plan.out)
    assert all(one == made_of[N] for one in made_of.values())

    twice = {200 + i for i in range(20) if i not in BAD and duplicates}
    good = [row for row in range(N) if row not in BAD and row not in twice]
    assert [shard.rows for shard in manifest.shards] == [
        sum(first <= row < first + SHARD for row in good) for first in range(0, N, SHARD)
    ]
    which = np.array([row - 200 if 200 <= row < 220 else row for row in good])
    read = manifest.read(folder / f"out-{N}", np.arange(len(good)))
    assert np.array_equal(read.image, digits[0][which]) and np.array_equal(read.label, digits[1][which])
    listed = [json.loads(line)["path"] for line in (folder / f"out-{N}").get("quarantine.jsonl").splitlines()]
    assert listed == [f"a.parquet/{row}" for row in BAD]
    assert (manifest.quarantined, manifest.duplicates) == (len(BAD), len(twice))


@pytest.mark.parametrize("runs", [[[0], [1], [2], [3], [4], [5], [6]], [[6], [3, 4, 5], [0, 2], [1]], [[0, 1, 5, 6]]])
def test_how_parts_are_dealt_to_tasks_changes_nothing(runs: list[list[int]], folder: Folder, digits: Digits) -> None:
    put(folder / "raw", "a.parquet", table(digits), 50)
    plan, one = (IngestPlan.make(folder / "raw", folder / name, CONFIG) for name in ("out", "one"))
    for of, dealt in ((plan, runs), (one, [list(range(7))])):
        for numbers in dealt:
            row = as_row([of.part(number) for number in numbers])
            counts = [task(row) for task in (DigestPart(of.source, of.out), WritePart(of.source, of.out, of.form))]
            assert all(told["part"] == numbers[0] for told in counts)
    done = [f"{number:06d}" for numbers in runs for number in numbers]
    assert made(plan.out) == {
        name: data for name, data in made(one.out).items() if any(number in name for number in done)
    }
    assert len(made(plan.out)) == 3 * len(done), "a shard, its record and its digests"


@pytest.mark.parametrize("group_rows", [300, 100, 50, 9])
def test_no_row_group_is_read_more_than_twice(
    group_rows: int, folder: Folder, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many parts are in it; and nothing of the file is read to plan it but its end."""
    noise = [np.random.default_rng(i).bytes(20_000) for i in range(N)]
    size = len(put(folder / "raw", "a.parquet", pa.table({"image": noise}), group_rows))
    fetched: list[int] = []
    get_range = Folder.get_range

    def counted(self: Folder, name: str, start: int, stop: int) -> bytes:
        fetched.append(stop - start)
        return get_range(self, name, start, stop)

    monkeypatch.setattr(Folder, "get_range", counted)
    plan = IngestPlan.make(folder / "raw", folder / "out", replace(CONFIG, shard_rows=16))
    runs = tasks(plan)
    assert plan.parts == 19 and len(runs) == min(19, N // group_rows) and sum(fetched) < 1 << 18
    fetched.clear()
    for numbers in runs:
        WritePart(plan.source, plan.out, plan.form)(as_row([plan.part(number) for number in numbers]))
    assert size <= sum(fetched) < 2.1 * size + len(runs) * (64 << 10) + len(fetched) * 1024
    assert sum(plan.part(n).size_bytes for n in range(19)) == pytest.approx(size, abs=19)


def test_a_file_that_breaks_off_costs_what_comes_after_the_break(folder: Folder, digits: Digits, alone: None) -> None:
    """As if one task had read it, though others have met no break; and what is lost there is no duplicate's first."""
    rows = table(digits)
    data = bytearray(put(folder / "whole", "a.parquet", rows, 30))
    row_group = pq.read_metadata(io.BytesIO(data)).row_group(4)  # rows 120 to 149, in the part of rows 96 to 143
    data[row_group.column(0).data_page_offset + row_group.column(0).total_compressed_size - 9] ^= 1
    for name, group in (("split", 30), ("unsplit", N)):
        (folder / name).put("a.parquet", bytes(data))
        put(folder / name, "b.parquet", table(digits, range(220, 299)), group)
    config = replace(CONFIG, max_bad_share=0.5, drop_duplicates=True)
    split = IngestPlan.make(folder / "split", folder / "out", config)
    assert len(tasks(split)) == 9 and len(split.runs([0, 1, 2, 3])) == 4
    manifest = ingest(split)
    kept = [row for row in range(120) if row not in BAD]
    assert manifest.rows == len(kept) + 79 and manifest.duplicates == 0
    read = manifest.read(split.out, np.arange(manifest.rows))
    assert np.array_equal(read.image, digits[0][[*kept, *range(220, 299)]])
    listed = [json.loads(line) for line in split.out.get("quarantine.jsonl").decode().splitlines()]
    assert [line["path"] for line in listed] == [f"a.parquet/{row}" for row in BAD if row < 120] + ["a.parquet"]
    assert "CRC" in listed[-1]["reason"]

    unsplit = IngestPlan.make(folder / "unsplit", folder / "unsplit-out", config)
    for task in (DigestPart(unsplit.source, unsplit.out), WritePart(unsplit.source, unsplit.out, unsplit.form)):
        task(as_row([unsplit.part(number) for number in range(7)]))
    assert ingest(unsplit).digest == manifest.digest
    assert unsplit.out.get("quarantine.jsonl") == split.out.get("quarantine.jsonl")
    with pytest.raises(DataError, match=r"1 of 2 files are unusable, more than ingest.max_bad_share = 0.4"):
        ingest(IngestPlan.make(folder / "split", folder / "few", replace(config, max_bad_share=0.4)))


def test_a_large_file_without_the_column_is_one_bad_file(folder: Folder, digits: Digits, alone: None) -> None:
    put(folder / "raw", "a.parquet", table(digits), 50)
    put(folder / "raw", "b.parquet", table(digits).rename_columns(["img", "label"]), 50)
    put(folder / "raw", "c.parquet", table(digits, range(0)), 50)
    (folder / "raw").put("d.parquet", b"no Parquet")
    put(folder / "raw", "e.parquet", table(digits, range(SHARD)), 7)
    plan = IngestPlan.make(folder / "raw", folder / "out", replace(CONFIG, max_bad_share=0.5))
    assert [plan.part(number).files[0].name[0] for number in range(plan.parts)] == [*"aaaaaaabbbbbbbcde"]
    manifest = ingest(plan)
    listed = [json.loads(line)["path"] for line in plan.out.get("quarantine.jsonl").splitlines()]
    assert [path for path in listed if "/" not in path] == ["b.parquet", "d.parquet"]
    assert manifest.rows == N - len(BAD) + SHARD - 2
    would = dry_run(IngestJob(source=plan.source.folder.url, out=plan.out.url, ingest=plan.config))
    assert (would["parts"], would["complete"]) == (17, True)


def test_labels_of_a_list_go_to_the_rows_that_they_are_of(folder: Folder, digits: Digits, alone: None) -> None:
    put(folder / "raw", "a.parquet", table(digits), 50)
    lines = [f"a.parquet/{row},{'odd' if row % 2 else 'even'}" for row in range(290)]
    folder.put("labels.csv", "\n".join(["path,label", *lines]).encode())
    config = replace(CONFIG, labels=f"{folder.url}/labels.csv")
    plan = IngestPlan.make(folder / "raw", folder / "out", config)
    assert [len(plan.part(number).listed) for number in range(7)] == [48] * 6 + [2]
    manifest = ingest(plan)
    good = [row for row in range(290) if row not in BAD]
    assert manifest.label_counts == [sum(row % 2 == odd for row in good) for odd in (0, 1)]
    assert manifest.quarantined == N - len(good)


def test_an_ingest_of_one_file_that_is_killed_goes_on(folder: Folder, digits: Digits, alone: None) -> None:
    """SIGKILL between the second part and its record, in the middle of a task; nothing that was done is done again."""
    put(folder / "raw", "a.parquet", table(digits), N)
    out, whole = (IngestPlan.make(folder / "raw", folder / name, CONFIG) for name in ("out", "whole"))
    code = """
import os, signal, sys
from pipelines import ingest, parts
from pipelines.storage import Folder
from tests.pipelines.test_ingest_split import CONFIG

put = Folder.put
def deadly(self, name, data):
    if name == "records/000001.json":
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, name, data)
Folder.put = deadly
ingest.do = lambda runs, task, *_: parts.do(runs, task, False)
ingest.ingest(ingest.IngestPlan.make(Folder(sys.argv[1]), Folder(sys.argv[2]), CONFIG))
"""
    command = [sys.executable, "-c", code, out.source.folder.url, out.out.url]
    died = subprocess.run(command, check=False, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert (out.out / "records").names() == ["000000.json"]
    before = Path(out.out.path("shard-000000-0000.parquet")).stat().st_mtime_ns
    assert ingest(out) == ingest(whole)
    assert made(out.out) == made(whole.out)
    assert Path(out.out.path("shard-000000-0000.parquet")).stat().st_mtime_ns == before


def test_storage_that_fails_while_planning_is_not_a_broken_file(
    folder: Folder, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder / "raw", "a.parquet", table(digits), 50)

    def reset(*_: object, **__: object) -> bytes:
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(type(folder.filesystem), "cat_file", reset)
    with pytest.raises(TryAgainError, match="does not answer"):
        _ = IngestPlan.make(folder / "raw", folder / "out", CONFIG).parts


@pytest.mark.parametrize("first", [0, 1, 49, 50, 51, 170, 299])
def test_rows_are_read_from_any_on(first: int, folder: Folder, digits: Digits) -> None:
    put(folder, "a.parquet", table(digits), 50)
    plan = IngestPlan.make(folder, Folder(f"{folder.url}-out"), CONFIG)
    every = list(plan.source.entries(plan.files, {}))
    assert list(plan.source.entries(plan.files, {}, first)) == every[first:] and len(every) == N
    assert plan.source.group_rows(plan.files[0]) == [50] * 6
