"""From an image back to all that it is a function of.

What it says it comes from is read out of the image's shard, or out of the PNG itself, or found by its pixels; then what
can be proved is proved. A PNG, or a shard of no finished set, may come from a stranger: what it says is told, and
compared with files that are here, but no weights are loaded, and nobody whom it names is asked, because it says so.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import ray.data

from pipelines.cluster import cluster
from pipelines.errors import ConfigurationError, DamagedError, DataError
from pipelines.fingerprint import fingerprint
from pipelines.images import MAX_FILE_BYTES, BadImageError, Pixels, read_picture
from pipelines.sample_set import MANIFEST, SUCCESS, SampleSet, read_shard
from pipelines.stamp import bare, is_png, stamp_of
from pipelines.storage import Folder, absolute
from pipelines.trace_checks import Claims, check_all
from pipelines.trace_config import TraceJob

HERE_IMAGES = 20_000
"""Samples that are looked through here, in seconds; more are shared out."""

log = logging.getLogger("brickyard.trace")


@dataclass(frozen=True)
class Hit:
    """A sample with the pixels that were looked for."""

    part: int
    seed: int
    label: int


@dataclass(frozen=True)
class LookInPart:
    """The task: the number of a shard to the samples in it that have a fingerprint."""

    samples: SampleSet
    wanted: bytes

    def __call__(self, row: dict[str, int]) -> list[dict[str, int]]:
        return [vars(hit) for hit in self.hits(int(row["id"]))]

    def hits(self, part: int) -> list[Hit]:
        """Return those of a shard."""
        read = self.samples.read(part)
        pixels = self.samples.decoded(read.image, self.samples.names[part])
        found = [i for i, picture in enumerate(pixels) if fingerprint(picture) == self.wanted]
        return [Hit(part, int(read.seed[i]), int(read.label[i])) for i in found]


def look(samples: SampleSet, picture: Pixels) -> list[Hit]:
    """Return every sample of a set that has the pixels of a picture [H, W, C], in the order of the seeds."""
    task, parts = LookInPart(samples, fingerprint(picture)), len(samples.names)
    if samples.count <= HERE_IMAGES:
        return [hit for part in range(parts) for hit in task.hits(part)]
    log.info("trace: looking through %d shards of %s", parts, samples.folder.url)
    with cluster():
        dataset = ray.data.range(parts, override_num_blocks=parts).flat_map(task)
        found = [Hit(**{name: int(value) for name, value in row.items()}) for row in dataset.iter_rows()]
    return sorted(found, key=lambda hit: hit.part)


def trace(job: TraceJob) -> dict[str, Any]:
    """Return all that is known of an image, and what of it could be proved.

    Raises:
        ConfigurationError: if nothing says where the image comes from.
        DataError: if it is no image, is not found, or a shard is not what was written.
    """
    told, claims = (_of_shard if job.image.endswith(".parquet") else _of_picture)(job)
    names, checked = check_all(job, claims)
    return {
        "image": absolute(job.image),
        **told,
        "seed": claims.seed,
        "label": claims.label,
        "label_name": names[claims.label] if 0 <= claims.label < len(names) else None,
        "pixels_sha256": fingerprint(claims.picture).hex(),
        "lineage": claims.lineage,
        "checked": told.get("checked", {}) | checked,
    }


def _of_shard(job: TraceJob) -> tuple[dict[str, Any], Claims]:
    """Find a sample in its shard by its seed."""
    folder, name = _place(job.image)
    data, where = folder.get(name), f"{folder.url}/{name}"
    is_proved = folder.exists(SUCCESS)
    if is_proved:
        samples = SampleSet.find(folder)
        if name not in samples.names:
            raise DamagedError(f"{folder.url}/{MANIFEST} knows nothing of {name}")
        read = samples.proved(samples.names.index(name), data)
        checked = "it is what was written, by its sha256"
    else:
        read = read_shard(data, where)
        checked = "it is part of no finished set of samples, so nothing proves it"
    seeds = read.seed.tolist()
    if job.seed not in seeds:
        raise DataError(f"{where} does not hold seed {job.seed}; it holds {min(seeds)}-{max(seeds)}")
    index = seeds.index(job.seed)
    picture = _picture(read.image[index], None, where)
    claims = Claims(read.lineage, job.seed, int(read.label[index]), picture, is_ours=is_proved)
    return {"found_by": "its seed", "samples": folder.url, "shard": name, "checked": {"shard": checked}}, claims


def _of_picture(job: TraceJob) -> tuple[dict[str, Any], Claims]:
    """Find what a file says of itself, and where it is among samples."""
    folder, name = _place(job.image)
    data = folder.get_range(name, 0, MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise DataError(f"{job.image} has more than {MAX_FILE_BYTES} bytes")
    stamp, damage = None, ""
    try:
        stamp = stamp_of(data) if is_png(data) else None
    except DataError as error:
        if not job.samples:
            raise DataError(f"{job.image}: {error}") from error
        damage = f"damaged: {error}"
        with suppress(DataError):  # its pixels may be found all the same
            data = bare(data)
    if job.samples:
        return _among_samples(job, data, stamp, damage)
    if stamp is None:
        said = "carries no lineage" if is_png(data) else "is no PNG, so it carries no lineage"
        raise ConfigurationError(
            f"{job.image} {said}, and samples is not given: give --samples FOLDER to look for it by its pixels"
        )
    seed, label = stamp.get("seed"), stamp.get("label", -1)
    if not isinstance(seed, int) or not isinstance(label, int) or not 0 <= seed < 1 << 63:
        raise DataError(f"{job.image} carries a lineage whose seed is {seed!r} and whose label is {label!r}")
    claims = Claims(stamp, seed, label, _picture(data, None, job.image), is_ours=False)
    return {"found_by": "the lineage that it carries", "samples": None, "shard": None}, claims


def _among_samples(
    job: TraceJob, data: bytes, stamp: dict[str, Any] | None, damage: str
) -> tuple[dict[str, Any], Claims]:
    """Find a picture among samples by its pixels; ``damage`` says what is wrong with a stamp that cannot be read."""
    samples = SampleSet.find(Folder(job.samples))
    height, width, channels = samples.shape
    picture = _picture(data, channels, job.image)
    hits = look(samples, picture) if picture.shape == samples.shape else []
    if not hits:
        raise DataError(
            f"{job.image}, {picture.shape[0]} x {picture.shape[1]} pixels, is none of the {samples.count} samples of "
            f"{samples.folder.url} ({height} x {width}): none has the same pixels"
        )
    # Pixels that several seeds have do not say which of them it is; its own word then may.
    said = stamp.get("seed") if stamp else None
    hit = next((hit for hit in hits if hit.seed == said), hits[0])
    lineage = samples.read(hit.part).lineage
    carried = damage or _agreement(lineage, hit, stamp)
    told: dict[str, Any] = {
        "found_by": "its pixels",
        "samples": samples.folder.url,
        "shard": samples.names[hit.part],
        "checked": {"shard": "it is what was written, by its sha256", "carried": carried},
    }
    if len(hits) > 1:
        told["seeds_with_these_pixels"] = [hit.seed for hit in hits]
    return told, Claims(lineage, hit.seed, hit.label, picture, is_ours=True)


def _agreement(lineage: dict[str, Any], hit: Hit, stamp: dict[str, Any] | None) -> str:
    """Say whether what a picture carries is what its shard says."""
    if stamp is None:
        return "it carries no lineage of its own"
    mine = lineage | {"seed": hit.seed, "label": hit.label}
    names = ("seed", "label", "checkpoint_digest", "draw", "data_digest", "tracking_run", "git_revision")
    wrong = [
        f"{name} {stamp.get(name)!r}, not {mine.get(name)!r}" for name in names if stamp.get(name) != mine.get(name)
    ]
    return f"it carries another lineage: {'; '.join(wrong)}" if wrong else "the lineage that it carries agrees"


def _place(image: str) -> tuple[Folder, str]:
    """Return the folder of a file, and its name."""
    parent, _, name = absolute(image).rpartition("/")
    return Folder(f"{parent}/"), name


def _picture(data: bytes, channels: Literal[1, 3] | None, where: str) -> Pixels:
    """Decode a picture in so many channels; None: in those that a PNG has."""
    try:
        return read_picture(data, channels or (1 if data[25:26] in (b"\0", b"\4") else 3), None)
    except BadImageError as error:
        raise DataError(f"{where} is no picture: {error}") from error


def dry_run(job: TraceJob) -> dict[str, Any]:
    """Return what would be looked at."""
    folder, name = _place(job.image)
    if not folder.exists(name):
        raise DamagedError(f"{folder.url}/{name} does not exist")
    shards = len(SampleSet.find(Folder(job.samples)).names) if job.samples else 0
    return {"dry_run": True, "image": f"{folder.url}/{name}", "shards_to_look_through": shards, "redraw": job.redraw}
