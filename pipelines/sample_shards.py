"""The files of a set of samples: what is in a shard, in each form, and whether it is what it must be.

Shard i is ``part-<i>.parquet``: seed, label and the picture as PNG. On request the same pictures are in
``tar/part-<i>.tar``, as WebDataset reads them, and in ``png/part-<i>/<seed>.png``. Parquet is written last: where that
is, the others are.
"""

import hashlib
import io
import json
import tarfile
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import DamagedError, DataError
from pipelines.images import BadImageError, Pixels, decode, encode
from pipelines.sample_set import read_shard
from pipelines.stamp import stamped
from pipelines.storage import Folder

Form = Literal["tar", "png"]
"""What samples are written as beside Parquet."""
SHARD = "part-"
"""What the names of shards begin with."""


class DamagedShardError(DataError):
    """A shard is not what it must be. Drawn again it will be."""


def shard_name(shard: int) -> str:
    """Return the name of a shard: its Parquet file."""
    return f"{SHARD}{shard:06d}.parquet"


def write(
    out: Folder, shard: int, seeds: range, labels: list[int], names: list[str], pixels: Pixels, lineage: dict[str, Any],
    also: tuple[Form, ...], anew: bool = False,
) -> None:  # fmt: skip
    """Write a shard in each form.

    Args:
        out: the folder of the samples.
        shard: its number.
        seeds: of its samples.
        labels: of its samples, -1 for none.
        names: of the labels.
        pixels: uint8 [n, H, W, C].
        lineage: what the samples come from.
        also: the forms beside Parquet.
        anew: over what is there. Otherwise that stays, since whoever wrote it may have finished the set; what a job
            that was killed has left of another revision is found when all is read back.
    """
    write_one = out.put if anew else out.create
    images = [encode(picture, "png") for picture in pixels]
    for name, data in _beside(shard, list(seeds), labels, names, images, lineage, also).items():
        write_one(name, data)
    table = pa.table(
        {
            "seed": pa.array(seeds, pa.int64()),
            "label": pa.array(labels, pa.int32()),
            "image": pa.array(images, pa.binary()),
        }
    ).replace_schema_metadata({"brickyard": json.dumps(lineage)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none")  # PNG is compressed
    write_one(shard_name(shard), buffer.getvalue())


def _beside(
    shard: int, seeds: list[int], labels: list[int], names: list[str], images: list[bytes], lineage: dict[str, Any],
    also: tuple[Form, ...],
) -> dict[str, bytes]:  # fmt: skip
    """Return the files of a shard beside Parquet, by name. A picture that goes its own way says where it comes from."""
    if not also:
        return {}
    several = list(zip(seeds, labels, images, strict=True))
    own = [stamped(image, {**lineage, "seed": seed, "label": label}) for seed, label, image in several]
    files = {png_name(shard, seed): image for seed, image in zip(seeds, own, strict=True)} if "png" in also else {}
    return files | ({tar_name(shard): _tar(seeds, labels, names, own)} if "tar" in also else {})


def tar_name(shard: int) -> str:
    """Return the name of the tar of a shard."""
    return f"tar/part-{shard:06d}.tar"


def png_name(shard: int, seed: int) -> str:
    """Return the name of a single picture."""
    return f"png/part-{shard:06d}/{seed:012d}.png"


def _tar(seeds: list[int], labels: list[int], names: list[str], images: list[bytes]) -> bytes:
    """Return a tar whose bytes are a function of what is in it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for seed, label, image in zip(seeds, labels, images, strict=True):
            about = {"seed": seed} | ({"label": names[label]} if label >= 0 else {})
            files = {"png": image, "json": json.dumps(about).encode()}
            if label >= 0:
                files["cls"] = str(label).encode()
            for suffix, data in files.items():
                entry = tarfile.TarInfo(f"{seed:012d}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def check(
    out: Folder, shard: int, seeds: range, shape: tuple[int, int, int], also: tuple[Form, ...], names: list[str]
) -> dict[str, Any]:
    """Read a shard back in each form: every picture of it.

    Args:
        out: the folder of the samples.
        shard: its number.
        seeds: those that it must hold.
        shape: of its pictures, [C, H, W].
        also: the forms beside Parquet.
        names: of the labels.

    Returns:
        Its name, how many images, and the sha256 of the Parquet file, of which the others are functions.

    Raises:
        DamagedShardError: if it is not what it must be.
    """
    name = shard_name(shard)
    data = _present(out, name)
    try:
        found = read_shard(data, f"{out.url}/{name}")
    except DamagedError as error:
        raise DamagedShardError(f"{out.url}/{name} is damaged: {error}") from error
    drawn = found.seed.tolist()
    if drawn != list(seeds):
        raise DamagedShardError(f"{out.url}/{name} does not hold the seeds that it must")
    channels, height, width = shape
    try:
        decode(found.image, "png", (height, width, channels))
        beside = _beside(shard, drawn, found.label.tolist(), names, found.image, found.lineage, also)
    except (BadImageError, DataError, ValueError, TypeError, IndexError) as error:
        raise DamagedShardError(f"{out.url}/{name} holds a picture that is none: {error}") from error
    try:
        there = out.get_many(list(beside))
    except DataError as error:
        raise DamagedShardError(str(error)) from error
    for (other, expected), content in zip(beside.items(), there, strict=True):
        if content != expected:
            raise DamagedShardError(f"{out.url}/{other} does not hold what {name} does")
    return {"name": name, "images": len(seeds), "sha256": hashlib.sha256(data).hexdigest()}


def _present(out: Folder, name: str) -> bytes:
    if not out.exists(name):
        raise DamagedShardError(f"{out.url}/{name} does not exist")
    return out.get(name)


def read_samples(folder: Folder, names: list[str], shape: tuple[int, int, int]) -> Pixels:
    """Read the pictures of sample shards; ``shape`` is [C, H, W] and the result uint8 [n, H, W, C]."""
    channels, height, width = shape
    images = [image for name in names for image in read_shard(folder.get(name), f"{folder.url}/{name}").image]
    return decode(images, "png", (height, width, channels))
