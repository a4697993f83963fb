"""What does a score cost beside what its features cost, and does memory stay flat?

    python benchmarks/scoring.py --folder /tmp/brickyard-scoring

Two data sets of 50,000 pictures of 32 × 32 in RGB are made in the folder, once: digits, enlarged, each in a colour and
with noise of its own, as PNG. Their features come from a convolutional network in a file, 128 numbers a picture: with
`--channels 16` in half a millisecond each on one core, with 32 by four times the operations. A round is, in turn:

- E, the extractor by itself: as many plain processes as the job has actors, each reading its part of the pictures and
  taking their features batch by batch, and nothing else. Two clocks: from the start of the processes, and (E') from
  when all have the network loaded.
- S, the score in a warm cluster, from its call, upon which its actors start and load, to its end, of pictures of which
  the reference's statistics are kept.

Told are images per second and the ratios of their times within a round, and for each quarter of one score's way the
peak of what all processes hold (PSS: a page that n share counts 1/n). Then, once, what the metrics take that hold every
picture against every other.
"""

import hashlib
import itertools
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import tyro

from benchmarks.common import spread
from benchmarks.loaders.tree import Watch

IMAGES, SIDE, PROGRAM = 50_000, 32, "network.pt2"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure what a score costs."""

    folder: Path
    """Where the pictures are put; they are found there the next time."""
    rounds: int = 3
    images: int = IMAGES
    actors: int = 2
    channels: int = 16
    """Of the network."""
    pairs: bool = True
    """Also the metrics that hold every picture against every other."""


def make_pictures(folder: Path, images: int) -> None:
    """Write the data sets `samples` and `reference`, unless they are there."""
    from pipelines.images import encode
    from pipelines.ingest import ingest
    from pipelines.ingest_plan import IngestConfig, IngestPlan
    from pipelines.storage import Folder

    for seed, name in enumerate(("samples", "reference")):
        raw, out = Folder(str(folder / f"{name}-{images}-raw")), Folder(str(folder / f"{name}-{images}"))
        if out.exists("manifest.json"):
            continue
        import pyarrow as pa
        import pyarrow.parquet as pq
        from sklearn.datasets import load_digits

        digits, rng = load_digits().images / 16, np.random.default_rng(seed)
        Path(raw.path()).mkdir(parents=True, exist_ok=True)
        for start in range(0, images, 5000):
            chosen = digits[rng.integers(0, len(digits), 5000)].repeat(4, 1).repeat(4, 2)[..., None]
            colour, noise = rng.uniform(0.3, 1, (5000, 1, 1, 3)), rng.normal(0, 0.05, (5000, SIDE, SIDE, 3))
            pixels = np.rint(255 * (chosen * colour + noise).clip(0, 1)).astype(np.uint8)
            table = pa.table({"image": pa.array([encode(picture, "png") for picture in pixels], pa.binary())})
            pq.write_table(table, f"{raw.path()}/{start:06d}.parquet")
        config = IngestConfig(side=SIDE, channels=3, encoding="png", labels="none")
        ingest(IngestPlan.make(raw, out, config))


def make_network(folder: Path, channels: int) -> dict[str, Any]:
    """Write the network, whose weights are a function of their names; return the settings of its features."""
    import torch

    from models.classifier import Classifier, ClassifierConfig
    from models.init import empty, initialize
    from pipelines.classify import program

    network = empty(lambda: Classifier(ClassifierConfig(channels=channels, features=128), 3, SIDE, 10))
    initialize(network, 0)
    torch.set_num_threads(1)
    content = program(network.requires_grad_(False).eval(), 64, (SIDE, SIDE, 3))
    (folder / PROGRAM).write_bytes(content)
    return {"kind": "file", "url": str(folder / PROGRAM), "sha256": hashlib.sha256(content).hexdigest()}


def extract(settings: Settings, features: dict[str, Any], part: int, gate: Any, told: Any) -> None:
    """Be one plain process: read a part of the pictures, take their features, throw them away."""
    from pipelines.features import FeatureConfig
    from pipelines.images import View
    from pipelines.manifest import Manifest
    from pipelines.storage import Folder

    folder = Folder(str(settings.folder / f"samples-{settings.images}"))
    manifest, view, network = Manifest.load(folder), View(side=SIDE, channels=3), FeatureConfig(**features).load()
    network(np.zeros((64, SIDE, SIDE, 3), np.uint8))
    gate.wait()
    rows = np.array_split(np.arange(settings.images), settings.actors)[part]
    for start in range(0, len(rows), 2500):
        network(manifest.read(folder, rows[start : start + 2500], view).image)
    told.put(part)


def extractor_alone(settings: Settings, features: dict[str, Any]) -> tuple[float, float]:
    """Return how long plain processes side by side take from their start, and from when all are ready."""
    spawn = multiprocessing.get_context("spawn")
    gate, told = spawn.Barrier(settings.actors + 1), spawn.Queue()
    processes = [
        spawn.Process(target=extract, args=(settings, features, part, gate, told)) for part in range(settings.actors)
    ]
    began = time.perf_counter()
    for process in processes:
        process.start()
    gate.wait()
    ready = time.perf_counter()
    for _ in processes:
        told.get()
    ended = time.perf_counter()
    for process in processes:
        process.join()
    return ended - began, ended - ready


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    from pipelines.cluster import cluster
    from pipelines.features import FeatureConfig
    from pipelines.score_config import ScoreJob
    from pipelines.scoring import score

    settings.folder.mkdir(parents=True, exist_ok=True)
    features = make_network(settings.folder, settings.channels)
    samples, reference = (str(settings.folder / f"{name}-{settings.images}") for name in ("samples", "reference"))

    def job(*metrics: Any) -> ScoreJob:
        chosen = FeatureConfig(**features, actors=settings.actors)
        return ScoreJob(samples=samples, reference=reference, features=chosen, metrics=metrics)

    with cluster():
        make_pictures(settings.folder, settings.images)
        print(f"a first score, which keeps the reference's statistics: {score(job('frechet'))['frechet_distance']:.2e}")
        times: dict[str, list[float]] = {"E": [], "E'": [], "S": []}
        for _ in range(settings.rounds):
            alone, ready = extractor_alone(settings, features)
            began = time.perf_counter()
            score(job("frechet"))
            seconds = time.perf_counter() - began
            for name, value in (("E", alone), ("E'", ready), ("S", seconds)):
                times[name].append(value)
            print(f"E {alone:.1f} s, E' {ready:.1f} s, S {seconds:.1f} s", flush=True)
        for name, values in times.items():
            print(f"{name}: images/s {spread([settings.images / value for value in values], 0)}")
        for name in ("E", "E'"):
            ratios = [one / other for one, other in zip(times[name], times["S"], strict=True)]
            print(f"{name}/S: {spread(ratios)} (0.9 wanted)", flush=True)
        quarters = [time.monotonic()]
        with Watch() as watch:
            score(job("frechet"))
        quarters += [quarters[0] + (time.monotonic() - quarters[0]) * i / 4 for i in range(1, 5)]
        for i, (begin, end) in enumerate(itertools.pairwise(quarters)):
            held = max((held for at, held, _ in watch.seen if begin <= at < end), default=0)
            print(f"quarter {i + 1} of a score: all processes hold {held / 1e6:,.0f} MB", flush=True)
        for metrics in (("kid",), ("precision-recall", "density-coverage")) if settings.pairs else ():
            began = time.perf_counter()
            with Watch() as watch:
                score(job(*metrics))
            print(f"{', '.join(metrics)}: {time.perf_counter() - began:.1f} s with the features of both sets, "
                  f"{watch.peak / 1e6:,.0f} MB at most", flush=True)  # fmt: skip
    assert not ray.is_initialized()


if __name__ == "__main__":
    main()
