"""Makes the pictures that the loaders are compared on, in the format of each contestant.

    python benchmarks/loaders/data.py --folder /tmp/brickyard-loaders --peers /tmp/peers-venv

The pictures are crops of the two photographs that come with scikit-learn, resized to 256 to 512 pixels a side, mirrored
or not, in other colours, as JPEGs of quality 85 to 90 in ten folders: the same files each time. What is there already
is not made again. ``--to s3://bucket/prefix`` copies all of it to object storage, at the server that the variables
AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_DEFAULT_REGION name.
"""

import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from benchmarks.loaders.decoders import SIDE

ROOT = Path(__file__).parents[2]
CLASSES = 10
PARQUET_ROWS = 512
COPIED = ("raw", "parquet", "tars", "lit", "mds", "keep", "pixels")
"""What goes to object storage too; an ``in-place`` data set is of one place, and is made anew there."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Make the pictures that the loaders are compared on."""

    folder: Path
    """Where they are put."""
    peers: Path
    """The peers' virtual environment, made of benchmarks/peers-requirements.txt."""
    images: int = 4000
    to: str | None = None
    """A URL to copy them to."""


def picture(photographs: list[NDArray[np.uint8]], i: int) -> bytes:
    """Return the i-th JPEG."""
    draw = np.random.Generator(np.random.Philox(key=[4, i]))
    photograph = Image.fromarray(photographs[i % len(photographs)])
    width, height = (int(length) for length in draw.integers(256, 513, size=2))
    share = draw.uniform(0.5, 1) * min(photograph.width / width, photograph.height / height)
    cut = (share * width, share * height)
    left, top = draw.uniform(0, photograph.width - cut[0]), draw.uniform(0, photograph.height - cut[1])
    box = (left, top, left + cut[0], top + cut[1])
    image = photograph.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if draw.random() < 0.5:
        image = ImageOps.mirror(image)
    for change in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        image = change(image).enhance(draw.uniform(0.7, 1.3))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(draw.integers(85, 91)))
    return buffer.getvalue()


def write_raw(out: Path, images: int) -> None:
    """Write the JPEGs into folders that are their classes."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    for i in range(images):
        path = out / f"class-{i % CLASSES}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(photographs, i))


def write_parquet(raw: Path, out: Path) -> None:
    """Write the JPEGs into Parquet files, for the plain Ray Data pipeline."""
    out.mkdir()
    paths = np.array(sorted(raw.rglob("*.jpg")))
    paths = np.random.Generator(np.random.Philox(key=4)).permutation(paths)
    for start in range(0, len(paths), PARQUET_ROWS):
        some = paths[start : start + PARQUET_ROWS]
        labels = [int(path.parent.name.removeprefix("class-")) for path in some]
        table = pa.table({"image": [path.read_bytes() for path in some], "label": labels})
        pq.write_table(table, out / f"{start:06d}.parquet", row_group_size=128, compression="none")


def run(python: Path | str, *words: str) -> None:
    """Run one of our scripts in an environment."""
    subprocess.run([str(python), *words], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def ingest(url: str, out: str, encoding: str, side: int) -> None:
    """Make one of our data sets of the raw files; one that is there already is left alone."""
    words = ["--source", f"{url}/raw", "--out", f"{url}/{out}", "--ingest.encoding", encoding]
    run(sys.executable, "-m", "jobs.ingest", *words, "--ingest.side", str(side))


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    folder = settings.folder.absolute()
    if not (folder / "raw").exists():
        write_raw(folder / "raw", settings.images)
    if not (folder / "parquet").exists():
        write_parquet(folder / "raw", folder / "parquet")
    if not (folder / "mds").exists():
        run(settings.peers / "bin" / "python", "-m", "benchmarks.loaders.formats", str(folder))
    ingest(str(folder), "in-place", "in-place", 0)
    ingest(str(folder), "keep", "keep", 0)
    ingest(str(folder), "pixels", "raw", SIDE)
    sizes = [path.stat().st_size for path in (folder / "raw").rglob("*.jpg")]
    print(f"{len(sizes)} JPEGs of {min(sizes)} to {max(sizes)} bytes, {sum(sizes) / 1e6:.0f} MB together, in {folder}")
    if settings.to:
        filesystem, root = fsspec.url_to_fs(settings.to)
        filesystem.makedirs(root.split("/")[0], exist_ok=True)
        for name in COPIED:  # and nothing else that lies there
            filesystem.put(f"{folder}/{name}/", f"{root}/{name}/", recursive=True)
        ingest(settings.to, "in-place", "in-place", 0)


if __name__ == "__main__":
    main()
