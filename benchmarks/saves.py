"""What does a save cost training?

    python benchmarks/saves.py

For how long the loop stands still at a save, in training steps, and the images per second of a loop that saves every
50 steps over those of one that does not. W, the loop without; B, with saves in the background
(:class:`pipelines.saver.Saver`); S, with saves that everybody waits for (:func:`pipelines.checkpoints.commit`).

They take turns of 50 steps within one process of one thread, W B S W B S: a turn of B begins with a save, whose thread
runs beside the steps that follow and is waited for at the end of the turn; a turn of S begins with one that is done
before the first step. CPU seconds are those of the process, the thread that saves among them. Targets: a stall of less
than one step, B/W at least 0.97.
"""

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from benchmarks.common import MicroBatch, Stopwatch, digits, micro_batches, spread
from jobs.presets import DIGITS
from models.init import initialize
from models.network import NetworkConfig, build
from models.noise import normal
from models.schedule import article
from models.unet import UNetConfig
from pipelines.checkpoint_manifest import Checkpoint
from pipelines.checkpoints import commit
from pipelines.fit import Listener, fit, new_state
from pipelines.fit_config import FitConfig
from pipelines.saver import Saved, Saver
from pipelines.storage import Folder
from pipelines.world import World

ABOUT = Checkpoint(
    position=0, files={}, config={}, data_digest="", data_url="", shape=(1, 8, 8), labels=[], tracking_uri="none",
    tracking_run="", git_revision="",
)  # fmt: skip
LARGE = NetworkConfig(unet=UNetConfig(channels=64, multipliers=(1, 2, 2, 2), blocks=2))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure what saving costs."""

    rounds: int = 5
    steps: int = 50
    """Between two saves."""
    large_steps: int = 10
    """The same for the larger network, whose steps are long: what comes out is a bound."""
    out: str = ""
    """Where to save to; a temporary folder if not given."""


class OverError(Exception):
    """A turn has ended. At the end of a run the loop would draw samples, which is not what is measured."""


class Turn(Listener):
    """Listens to a loop: saves nothing by itself, and ends it with its first report."""

    def report(self, metrics: dict[str, float], position: int) -> None:
        raise OverError


def repeated(config: FitConfig, side: int, channels: int) -> Iterator[MicroBatch]:
    """Yield micro-batches of noise, again and again."""
    pixels = (normal(0, "pixels", torch.arange(config.micro_images), (side, side, channels)) * 50 + 128).clamp(0, 255)
    image, position = pixels.byte().numpy(), torch.arange(config.micro_images).numpy()
    start = 0
    while True:
        yield MicroBatch(position + start, position * 0 - 1, image)
        start += config.micro_images


def run(
    name: str, network: NetworkConfig, config: FitConfig, side: int, channels: int, steps: int, s: Settings
) -> None:
    """Print what one network pays."""
    model = build(network, channels, side, 0)
    initialize(model, 0)
    state = new_state(model.to(memory_format=torch.channels_last), config, article())  # type: ignore[call-overload]
    turn = steps * config.batch_images
    never = turn << 30
    everlasting = replace(config, images=never, log_images=turn, checkpoint_images=never, grid_images=never)
    batches = micro_batches(digits(), everlasting, 0) if side == 8 else repeated(config, side, channels)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    with tempfile.TemporaryDirectory() as temporary:
        folder, told = Folder(s.out or temporary), list[Saved]()
        saver = Saver(folder, ABOUT, World(), 2, told.append)
        turns: dict[str, list[NDArray[np.float64]]] = {"W": [], "B": [], "S": []}
        stalls: list[float] = []
        for number in range(s.rounds + 1):
            for way, seconds in turns.items():
                watch = Stopwatch()
                if way == "B":
                    saver.save(state)
                    stalls.append(float(watch.read()[0]))
                elif way == "S":
                    commit(folder / "waited for", state, ABOUT, World())
                with suppress(OverError):
                    fit(everlasting, state, article(), 0, batches, Turn())
                saver.flush()
                seconds.append(watch.read())
            if not number:  # the first of each makes buffers, caches and the optimizer's state
                for measured in (*turns.values(), stalls, told):
                    measured.clear()
    step = median(float(wall) for wall, _ in turns["W"]) / steps
    print(f"{name}, {millions:.1f} M parameters, {1000 * step:.0f} ms a step, saves every {steps} steps")
    print(f"  in the background each takes {spread([saved.seconds for saved in told], 2)} s")
    print(f"  stall {spread([1000 * stall for stall in stalls], 0)} ms", end=", ")
    print(f"{spread([stall / step for stall in stalls])} steps")
    for way, words in (("B", "in the background"), ("S", "waited for")):
        ratios = [without / with_ for without, with_ in zip(turns["W"], turns[way], strict=True)]
        wall, cpu = zip(*ratios, strict=True)
        print(f"  {way}/W {spread(wall)}, by CPU seconds {spread(cpu)} ({words})", flush=True)


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(1)
    run("digits", DIGITS.network, DIGITS.fit, 8, 1, settings.steps, settings)
    config = replace(DIGITS.fit, batch_images=8, micro_images=8)
    run("larger", LARGE, config, 32, 3, settings.large_steps, settings)


if __name__ == "__main__":
    main()
