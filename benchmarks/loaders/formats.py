"""Writes a folder of JPEGs again in the formats of the peers, by the peers' own writers, the bytes as they are.

    python -m benchmarks.loaders.formats FOLDER

It runs in the peers' environment: FOLDER/raw becomes FOLDER/tars, FOLDER/lit and FOLDER/mds, in a shuffled order, in
pieces of about 16 MB: several for each worker.
"""

import random
import sys
from pathlib import Path
from typing import Any

from benchmarks.loaders.contestants import Files, provide_torchvision

PIECE_BYTES = 1 << 24


def row(item: tuple[str, int]) -> dict[str, Any]:
    """Return a file's bytes and its label."""
    path, label = item
    return {"image": Path(path).read_bytes(), "label": label}


def main() -> None:
    folder = Path(sys.argv[1])
    files = Files(str(folder), "full")
    items = list(zip(files.paths, files.labels, strict=True))
    random.Random(0).shuffle(items)
    write_tars(items, folder / "tars")
    write_lit(items, folder / "lit")
    write_mds(items, folder / "mds")


def write_tars(items: list[tuple[str, int]], out: Path) -> None:
    import webdataset as wds

    out.mkdir()
    with wds.ShardWriter(f"{out}/%06d.tar", maxsize=PIECE_BYTES, verbose=0) as writer:
        for i, (path, label) in enumerate(items):
            writer.write({"__key__": f"{i:08d}", "jpg": Path(path).read_bytes(), "cls": label})


def write_lit(items: list[tuple[str, int]], out: Path) -> None:
    from litdata import optimize

    optimize(
        row, items, output_dir=str(out), chunk_bytes=PIECE_BYTES, num_workers=1, reorder_files=False, verbose=False
    )


def write_mds(items: list[tuple[str, int]], out: Path) -> None:
    provide_torchvision()
    from streaming import MDSWriter

    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(out), columns=columns, size_limit=PIECE_BYTES) as writer:
        for item in items:
            writer.write(row(item))


if __name__ == "__main__":
    main()
