"""What does it cost to kill a sampling job and to fire it again?

    python benchmarks/kills.py --checkpoint yard/runs/digits --root /tmp/brickyard-kills

The job, on a Ray of its own, runs once undisturbed. Then SIGKILL meets all of its processes at once, as soon as so many
of its shards are there, and it is fired again. Each actor leaves word of each batch that it has drawn. Told are the
shards that had been drawn to their end and were not there (at most one for each actor), the images of all that was
drawn for nothing, and the seconds of both firings beyond those of the undisturbed one: most of that is a second start.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

from tests.pipelines.helpers import beside, drawn
from tests.processes import CODE, kill


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Kill a sampling job."""

    checkpoint: str
    """The folder of a run."""
    root: Path
    """Folder for the samples; it must be new or empty."""
    shards: int = 16
    shard_images: int = 256
    batch_images: int = 64
    actors: int = 2
    at: tuple[int, ...] = (1, 4, 8, 12, 15)
    """Shards that are there when the job is killed."""


def start(settings: Settings, out: Path) -> subprocess.Popen[str]:
    last = settings.shards * settings.shard_images - 1
    flags = [
        f"--checkpoint={settings.checkpoint}", f"--out={out}", f"--seeds=0-{last}",
        f"--draw.shard-images={settings.shard_images}", f"--draw.batch-images={settings.batch_images}",
        f"--draw.actors={settings.actors}", "--tracking.uri=none",
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "tests.jobs.drawn", *flags], cwd=CODE, env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> int:
    """Return how many images it has drawn."""
    said, _ = process.communicate()
    assert process.returncode == 0
    return int(json.loads(said.splitlines()[-1])["drawn_now"])


def there(out: Path) -> set[int]:
    return {int(path.stem.removeprefix("part-")) for path in out.glob("part-*.parquet")}


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    settings.root.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    finish(start(settings, settings.root / "undisturbed"))
    undisturbed = time.monotonic() - began
    print(f"undisturbed: {undisturbed:.1f} s", flush=True)
    for at in settings.at:
        out, began = settings.root / f"killed-at-{at}", time.monotonic()
        process = start(settings, out)
        while len(there(out)) < at:
            assert process.poll() is None
            time.sleep(0.01)
        kill(process)
        words = drawn(beside(str(out)))
        batches, kept = Counter(word.seed // settings.shard_images for word in words), there(out)
        lost = {shard: count for shard, count in batches.items() if shard not in kept}
        whole = [shard for shard, count in lost.items() if count == settings.shard_images // settings.batch_images]
        second = finish(start(settings, out))
        assert second == (settings.shards - len(kept)) * settings.shard_images, "none is stored twice"
        extra = time.monotonic() - began - undisturbed
        print(
            f"killed with {len(kept)} shards there: {len(whole)} shards were drawn to their end twice, "
            f"{sum(lost.values()) * settings.batch_images} images for nothing, {extra:.1f} s more",
            flush=True,
        )


if __name__ == "__main__":
    main()
