"""What does an encoding of the shards cost: bytes, time to write, time to read?

    python benchmarks/encodings.py

Crops of scikit-learn's two photographs, 256 to 512 pixels a side, as JPEGs of quality 90, are ingested by each encoding
and read again as 64 × 64 RGB in the order of a shuffle, by one process on local disk; with in-place the files are read
as they lie. The encodings take turns, round after round, and the least CPU time of each is told, in
microseconds per image: on a machine with other guests the least is what the code itself costs. For scale: the decoder
alone, in full and at reduced scale, with nothing around it; and what the view's filters cost and differ.
"""

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import tyro
from PIL import Image
from sklearn.datasets import load_sample_images

from pipelines import ingest as module
from pipelines.images import View
from pipelines.ingest import ingest
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.parts import do
from pipelines.storage import Folder

VIEW = View(side=64, channels=3)
FORMS: dict[str, dict[str, Any]] = {
    "raw": {"side": 64, "encoding": "raw"},
    "raw, zstd": {"side": 64, "encoding": "raw", "compression": "zstd"},
    "png": {"side": 64, "encoding": "png"},
    "png, zstd": {"side": 64, "encoding": "png", "compression": "zstd"},
    "jpeg, 95": {"side": 64, "encoding": "jpeg"},
    "jpeg, 85": {"side": 64, "encoding": "jpeg", "jpeg_quality": 85},
    "keep": {"side": 0, "encoding": "keep"},
    "in-place": {"side": 0, "encoding": "in-place"},
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure the encodings."""

    images: int = 400
    rounds: int = 5


def jpegs(n: int) -> Iterator[bytes]:
    """Yield JPEGs of crops of two photographs."""
    rng, photographs = np.random.default_rng(0), load_sample_images().images
    for i in range(n):
        photograph = photographs[i % 2]
        height, width = int(rng.integers(256, 428)), int(rng.integers(256, 513))
        top = int(rng.integers(0, photograph.shape[0] - height + 1))
        left = int(rng.integers(0, photograph.shape[1] - width + 1))
        buffer = io.BytesIO()
        Image.fromarray(photograph[top : top + height, left : left + width]).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def decoded(data: bytes, scaled_to: int | None, filter_: Image.Resampling | None) -> np.ndarray[Any, Any] | None:
    """Decode with nothing around it; None for no resize."""
    image: Image.Image = Image.open(io.BytesIO(data))
    if scaled_to:
        image.draft("RGB", (scaled_to, scaled_to))
    if filter_ is None:
        image.load()
        return None
    (width, height), short = image.size, min(image.size)
    left, top = (width - short) / 2, (height - short) / 2
    return np.asarray(image.resize((64, 64), filter_, box=(left, top, left + short, top + short), reducing_gap=2.0))


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    files, n = list(jpegs(settings.images)), settings.images
    module.do = lambda runs, task, *_: do(runs, task, False)  # type: ignore[attr-defined]  # one process
    with tempfile.TemporaryDirectory() as folder:
        source = Folder(f"{folder}/source")
        for i, data in enumerate(files):
            source.put(f"{i:04d}.jpg", data)
        rows = np.random.default_rng(0).permutation(n)

        def write(name: str, to: str) -> Any:
            return ingest(IngestPlan.make(source, Folder(f"{folder}/{to}"), IngestConfig(**FORMS[name])))

        manifests = {name: write(name, name) for name in FORMS}
        work: dict[str, Callable[[int], object]] = {}
        for name, manifest in manifests.items():
            view = None if manifest.side else VIEW
            work[f"write {name}"] = lambda turn, name=name: write(name, f"{name}-{turn}")
            work[f"read {name}"] = lambda _, name=name, manifest=manifest, view=view: manifest.read(
                Folder(f"{folder}/{name}"), rows, view
            )
        for label, scaled_to in (("in full", None), ("at 64 or more", 64), ("at 128 or more", 128)):
            work[f"PIL {label}"] = lambda _, s=scaled_to: [decoded(data, s, None) for data in files]
        filters = [Image.Resampling[name] for name in ("BOX", "BILINEAR", "BICUBIC", "LANCZOS")]
        for filter_, scaled_to in chain.from_iterable(((f, None), (f, 64), (f, 128)) for f in filters):
            work[f"PIL {scaled_to} {filter_.name}"] = lambda _, s=scaled_to, f=filter_: [
                decoded(data, s, f) for data in files
            ]
        work["View.of_file"] = lambda _: [VIEW.of_file(data) for data in files]
        least = dict.fromkeys(work, float("inf"))
        for turn in range(settings.rounds):
            for name, do_it in work.items():
                began = time.process_time()
                do_it(turn)
                least[name] = min(least[name], 1e6 * (time.process_time() - began) / n)

    print(f"{n} JPEGs of {np.mean([len(data) for data in files]):,.0f} bytes → 64 × 64 RGB, one process\n")
    print("| encoding | bytes per image | rows of a row group | write, µs | read, µs |\n|---|---|---|---|---|")
    for name, manifest in manifests.items():
        size = sum(shard.size_bytes for shard in manifest.shards) / n
        print(
            f"| {name} | {size:,.0f} | {manifest.row_group_rows} | {least[f'write {name}']:,.0f} "
            f"| {least[f'read {name}']:,.0f} |"
        )
    print("\n| decoder alone | µs | dB to in full, LANCZOS |\n|---|---|---|")
    exact = [decoded(data, None, Image.Resampling.LANCZOS) for data in files]
    for name, spent in least.items():
        if name.startswith(("PIL", "View")):
            print(f"| {name} | {spent:,.0f} | {_likeness(name, files, exact)} |")


def _likeness(name: str, files: list[bytes], exact: list[Any]) -> str:
    words = name.split()
    if words[-1] not in ("View.of_file", *Image.Resampling.__members__):
        return ""
    if name == "View.of_file":
        seen: list[Any] = [VIEW.of_file(data) for data in files]
    else:
        scaled_to = None if words[1] == "None" else int(words[1])
        seen = [decoded(data, scaled_to, Image.Resampling[words[2]]) for data in files]
    errors = [max(float(((a.astype(float) - b) ** 2).mean()), 1e-9) for a, b in zip(seen, exact, strict=True)]
    return "" if max(errors) < 1e-6 else f"{np.mean([10 * np.log10(255**2 / error) for error in errors]):.1f}"


if __name__ == "__main__":
    main()
