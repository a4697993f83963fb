"""How does our stream stand beside the loaders that people use: in images per second, CPU time and memory?

    python benchmarks/loaders/data.py --folder /tmp/brickyard-loaders --peers /tmp/peers-venv
    python benchmarks/loaders/compare.py --folder /tmp/brickyard-loaders --peers /tmp/peers-venv

The peers live in an environment of their own (``python -m venv``, ``pip install torch==2.13.0``, then ``pip install -r
benchmarks/peers-requirements.txt``). JPEGs of 256 to 512 pixels a side become uint8 [64, 64, 64, 3], shuffled, by
``--workers`` worker processes. Each run is a tree of processes of its own; the contestants take turns, round after
round. Two decoders: ``full``, PIL as it is mostly used, and ``same``, the one of our stream.

Told of a run: images per second of its epochs after the first, the turns of epochs included; of the first, from the
opening of the loader on; CPU seconds of the tree per 1,000 images, after the first epoch; the peak of the tree's
memory, looked at twice a second, a page that n processes share counted 1/n in each (PSS); seconds to the first batch,
from the opening of the loader (libraries imported, Ray's cluster started) and from the start of the process. The
ceiling is the decoder alone, out of memory, in one process, times the workers. Ratios are taken within a round; where
other programs share the machine, CPU seconds over the decoder's are the ones to trust. ``--contestants`` and
``--decoders`` choose. Only when they are asked for run `ours_unordered`, our stream without its order; `ours_pixels`,
out of shards of decoded pixels; and `plain`, Ray Data without our stream.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeAlias

import tyro

from benchmarks.common import spread
from benchmarks.loaders.decoders import Decoder
from benchmarks.loaders.tree import pss_bytes

ROOT = Path(__file__).parents[2]
CEILING = "ceiling"
PEERS = {"dataloader": "raw", "webdataset": "shards", "litdata": "shards", "mosaicml": "shards"}
"""What each of them reads: they are held against those that read the like."""
OURS = {
    "ours_raw": "raw",
    "ours_shards": "shards",
    "ours_unordered": "shards",
    "ours_pixels": "shards",
    "plain": "shards",
}
"""Contestants of our own environment."""
ONE_DECODER = ("ours_raw", "ours_shards", "ours_unordered", "ours_pixels")
"""Those that cannot decode otherwise than `same`."""
CEILING_IMAGES = 1024
TIME_LIMIT_S = 300
Run: TypeAlias = tuple[str, Decoder]
"""A contestant and its decoder."""
Told: TypeAlias = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Compare our stream with torch's DataLoader, WebDataset, LitData and MosaicML Streaming."""

    folder: Path
    """Where data.py put the pictures."""
    peers: Path
    """The peers' virtual environment."""
    url: str | None = None
    """Where the pictures are read, if not in the folder: the s3:// URL that data.py copied them to."""
    contestants: tuple[str, ...] = (CEILING, *PEERS, "ours_raw", "ours_shards")
    decoders: tuple[Decoder, ...] = ("full", "same")
    epochs: int = 3
    """Length of a run, at least 2: the first is told by itself."""
    workers: int = 2
    """Worker processes of each peer: as many as there are cores."""
    rounds: int = 3

    @property
    def runs(self) -> list[Run]:
        """The runs of a round, in their order."""
        return [
            (name, decoder)
            for name in self.contestants
            for decoder in self.decoders
            if decoder == "same" or name not in ONE_DECODER
        ]


def measure(settings: Settings, name: str, decoder: Decoder) -> Told:
    """Run a contestant once, in a process group of its own that ends with it."""
    python = sys.executable if name in OURS else settings.peers / "bin" / "python"
    module = "ours" if name in OURS else "contestants"
    url = settings.url if settings.url and name != CEILING else settings.folder.absolute()
    images = CEILING_IMAGES if name == CEILING else sum(1 for _ in (settings.folder / "raw").rglob("*.jpg"))
    words = [python, "-m", "benchmarks.loaders.run", module, name, url, decoder]
    words += [settings.workers, images, settings.epochs]
    with tempfile.TemporaryDirectory(prefix="loaders-") as cache, (Path(cache) / "said").open("w+") as said:
        process = subprocess.Popen(
            [str(word) for word in words],
            cwd=ROOT,
            env=environment(cache),
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,
        )
        try:
            peak = peak_bytes(process)
            lines = process.communicate(timeout=10)[0].splitlines()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            raise RuntimeError(f"{name}, {decoder}: exit {process.returncode}\n{Path(said.name).read_text()[-4000:]}")
    return json.loads(lines[-1]) | {"peak_bytes": peak}


def environment(cache: str) -> dict[str, str]:
    """Return the variables of a run: one thread a process, and a cache that is new."""
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CACHE": cache}
    if "AWS_ENDPOINT_URL" in os.environ:
        ours["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]  # MosaicML's name for it
    return os.environ | ours


def peak_bytes(process: subprocess.Popen[str]) -> int:
    """Wait for a process; return the most memory that its tree held.

    Raises:
        TimeoutError: if it runs too long.
    """
    peak, late = 0, time.monotonic() + TIME_LIMIT_S
    while process.poll() is None:
        peak = max(peak, pss_bytes(process.pid))
        if time.monotonic() > late:
            raise TimeoutError(f"{process.args} ran longer than {TIME_LIMIT_S} s")
        time.sleep(0.5)
    return peak


def best_peers(settings: Settings, told: dict[Run, list[Told]], kind: str, decoder: Decoder) -> list[float]:
    """Return for each round the speed of the fastest peer that reads a kind of data."""
    peers = [
        told[name, decoder] for name in settings.contestants if PEERS.get(name) == kind and (name, decoder) in told
    ]
    return [max(run["images_per_s"] for run in of_a_round) for of_a_round in zip(*peers, strict=True)]


def ratios(values: Iterable[float], others: list[float]) -> str:
    """Return min / median / max of the ratios, round by round."""
    return spread([a / b for a, b in zip(values, others, strict=True)], 2) if others else "–"


def table(settings: Settings, told: dict[Run, list[Told]]) -> str:
    """Return what was told as a table in Markdown."""
    head = ["loader", "decoder", "images/s", "first epoch", "÷ best peer, full", "÷ best peer, same", "÷ ceiling"]
    head += ["CPU-s per 1,000", "÷ decoder's", "peak MB", "first batch, s", "from start, s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (name, decoder), runs in told.items():
        speeds = [run["images_per_s"] for run in runs]
        kind = (PEERS | OURS).get(name)
        full, same = (best_peers(settings, told, kind, each) if kind else [] for each in ("full", "same"))
        ceiling = [settings.workers * run["images_per_s"] for run in told.get((CEILING, decoder), [])]
        decoding = [run["cpu_s"] for run in told.get((CEILING, decoder), [])]
        spent = [run["cpu_s"] for run in runs]
        cells = [
            "the decoder alone, 1 process" if name == CEILING else f"{name} ({kind})",
            decoder,
            spread(speeds, 0),
            f"{median(run['early_images_per_s'] for run in runs):,.0f}",
            ratios(speeds, full),
            ratios(speeds, same),
            "–" if name == CEILING else ratios(speeds, ceiling),
            spread(spent, 2),
            "–" if name == CEILING else ratios(spent, decoding),
            f"{max(run['peak_bytes'] for run in runs) / 1e6:,.0f}",
            f"{median(run['first_batch_s'] for run in runs):.1f}",
            f"{median(run['ready_s'] for run in runs):.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    assert settings.epochs > 1, settings.epochs
    told: dict[Run, list[Told]] = defaultdict(list)
    for number in range(settings.rounds):
        for name, decoder in settings.runs:
            run = measure(settings, name, decoder)
            told[name, decoder].append(run)
            said = f"{run['images_per_s']:,.0f} images/s, {run['cpu_s']:.2f} CPU-s per 1,000, "
            print(f"round {number}: {name}, {decoder}: {said}{run['peak_bytes'] / 1e6:,.0f} MB", flush=True)
    print(table(settings, told))


if __name__ == "__main__":
    main()
