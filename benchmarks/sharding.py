"""How much less memory does a worker need when the model is sharded?

    python benchmarks/sharding.py
    python benchmarks/sharding.py --workers 8 --strategies ddp fsdp hybrid --shards 4 --precision bfloat16 --size XL

Each line is a fresh group of W processes, with gloo between them on the CPU, or NCCL and a GPU each on a machine that
has so many. They construct a DiT without memory and take two steps: forward and backward of one micro-batch, clipping,
AdamW (fused), the average of the weights. Told are, of the worker that has most,

- what it holds between backward and step, by counting storages: parameters, gradients, both moments, the average;
- ``constructed``: how far the construction raised its memory, at the highest;
- ``peak``: how far the two steps raised it as well, at the highest. On the CPU that is resident memory over what the
  process had after its imports, out of /proc, which needs Linux; on a GPU, what torch had allocated.

glibc keeps what is freed in pieces of up to 32 MB, and blocks that come and go leave holes in it: it is told to give
back what is above 64 kB (MALLOC_MMAP_THRESHOLD_), unless the variable is set already.

Target: what is held falls as 1/W.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.dit import SIZES, DiT
from models.ema import EMA, EMAConfig
from models.parallelize import ParallelConfig, Precision, Strategy, clip_gradient, construct

CHANNELS, SIDE, STEPS, MEGA = 4, 32, 2, 1e6
"""Of the latents that the paper's DiT trains on: 256 tokens an image."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure the memory of each worker."""

    size: Literal["S", "B", "L", "XL"] = "B"
    workers: tuple[int, ...] = (2, 4)
    strategies: tuple[Strategy, ...] = ("ddp", "fsdp")
    shards: int = 2
    """Of hybrid."""
    precision: Precision = "float32"
    checkpoint_activations: bool = False
    micro_images: int = 1

    def parallel(self, strategy: Strategy) -> ParallelConfig:
        return ParallelConfig(
            strategy=strategy,
            shards=self.shards if strategy == "hybrid" else 1,
            precision=self.precision,
            checkpoint_activations=self.checkpoint_activations,
        )


class Peak:
    """The highest memory of this process on its device since the last look, in bytes over what it began with."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.began = device, 0
        self.began = self._now("VmRSS")

    def read(self) -> int:
        """Return it, and look from here on."""
        highest = self._now("VmHWM") - self.began
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        return highest

    def _now(self, what: str) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
        return int(line.split()[1]) << 10


def held(tensors: list[Tensor]) -> int:
    """Return the bytes of this worker's memory behind tensors, sharded or not."""
    storages = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def work(
    rank: int, workers: int, strategy: Strategy, settings: Settings, folder: str, out: "SimpleQueue[Told]"
) -> None:
    """Be one of the workers."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if torch.cuda.device_count() >= workers else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder}/meeting",
        world_size=workers,
        rank=rank,
    )
    peak = Peak(device)
    model, parallel = construct(
        lambda: DiT(SIZES[settings.size], CHANNELS, SIDE), 0, settings.parallel(strategy), device
    )
    constructed = peak.read()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ema = EMA(model, EMAConfig())
    x = torch.randn(settings.micro_images, CHANNELS, SIDE, SIDE, device=device)
    for step in range(STEPS):
        parallel(x, torch.full((len(x),), 500, device=device)).square().mean().backward()
        gradients = held([p.grad for p in model.parameters() if p.grad is not None])
        clip_gradient(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step + 1, 1)
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    kinds = [held(list(model.parameters())), gradients, held(moments), held(list(ema.shadow.values()))]
    out.put([*kinds, sum(kinds), constructed, peak.read()])
    dist.barrier()  # nobody leaves while others still need it
    dist.destroy_process_group()


Told = list[int]


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    print("| W | strategy | parameters | gradients | moments | average | held | ÷ W = 1 | constructed | peak |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    whole = 5 * sum(4 * p.numel() for p in on_meta(settings).parameters())
    for workers in settings.workers:
        for strategy in settings.strategies:
            out = mp.get_context("spawn").SimpleQueue()
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(work, (workers, strategy, settings, folder, out), nprocs=workers)
            most = [max(column) for column in zip(*(out.get() for _ in range(workers)), strict=True)]
            figures = " | ".join(f"{size / MEGA:,.0f}" for size in most[:5])
            print(
                f"| {workers} | {strategy} | {figures} | {most[4] / whole:.3f} | {most[5] / MEGA:,.0f} | "
                f"{most[6] / MEGA:,.0f} |",
                flush=True,
            )
    print(f"MB; one worker alone would hold {whole / MEGA:,.0f}")


def on_meta(settings: Settings) -> DiT:
    with torch.device("meta"):
        return DiT(SIZES[settings.size], CHANNELS, SIDE)


if __name__ == "__main__":
    main()
