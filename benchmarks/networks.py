"""How fast is our U-Net beside the same network in diffusers?

    python benchmarks/networks.py
    python benchmarks/networks.py --only digits --more
    python benchmarks/networks.py --device cuda --batch 256 --more

*ours* is ``models.unet.UNet`` in channels-last memory, as the pipelines run it; *diffusers* is its ``UNet2DModel`` as
it comes, of the same architecture and, through ``models.interchange``, the same weights; all are first seen to predict
the same. Timed are a *training* step (forward, mean squared error, backward, a fused AdamW on either side) and a
*sampling* step (the network alone under ``inference_mode``), for the network of the preset ``digits`` (0.7 M
parameters, 8 × 8, 64 images) and for the DDPM paper's (35.7 M, 32 × 32, 4 images). ``--more`` adds diffusers in
channels-last memory and both compiled.

One process, one thread. In each round all take turns, in the other order in every second one, so whatever else the
machine does meets them alike. On a CPU the CPU time of the process counts, and wall time is told beside it. A ratio is
taken within a round, theirs over ours. Target: at least 1.15 in both.

On a GPU (not tried yet: none was at hand) it runs in bfloat16 under autocast, counts wall time between two waits for
the device, compiles sampling into CUDA graphs, and says what share of ``--peak-tflops`` the operations reach.
"""

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import tyro
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import Stopwatch, spread
from models.interchange import to_diffusers
from models.noise import normal
from models.unet import UNet, UNetConfig

CHANNELS_LAST = torch.channels_last


@dataclass(frozen=True, kw_only=True)
class Size:
    """A network and the batch that it is given."""

    config: UNetConfig
    image_channels: int
    side: int
    batch: int
    steps: int
    """Steps of each side in a round."""
    rounds: int


SIZES = {
    "digits": Size(
        config=UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention=(4,), groups=8),
        image_channels=1,
        side=8,
        batch=64,
        steps=5,
        rounds=20,
    ),
    "paper": Size(
        config=UNetConfig(channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), groups=32),
        image_channels=3,
        side=32,
        batch=4,
        steps=1,
        rounds=8,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Compare our U-Net with the same network in diffusers."""

    only: Literal["digits", "paper"] | None = None
    """One size instead of both."""
    more: bool = False
    """Also diffusers in channels-last memory, and both compiled."""
    rounds: int | None = None
    batch: int | None = None
    """Images of a step."""
    device: str = "cpu"
    peak_tflops: float = 989.0
    """What the GPU can do in bfloat16, in 10¹² operations a second: an H100's or H200's."""


Predict = Callable[[Tensor, Tensor], Tensor]
"""x [B, C, H, W] and t int64 [B] in 1..T to a prediction."""
Step = Callable[[], object]


def awake(size: Size) -> UNet:
    """Return the network with all weights away from zero, as after some training."""
    network = UNet(size.config, size.image_channels, size.side)
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            drawn = normal(0, "weights", torch.tensor([i]), tuple(parameter.shape))[0]
            parameter.copy_(drawn / (2 * max(1, parameter[0].numel()) ** 0.5) + (parameter.dim() == 1))
    return network


def peer(size: Size, network: UNet) -> UNet2DModel:
    """Return the same network in diffusers."""
    config, weights = to_diffusers(size.config, size.image_channels, size.side, 0, network.state_dict())
    model = UNet2DModel.from_config(config)
    model.load_state_dict(weights)
    return model


def contestants(size: Size, settings: Settings, sampling: bool) -> dict[str, tuple[nn.Module, Predict]]:
    """Return each network with its weights, and how it predicts."""
    network = awake(size)
    ours = network.to(memory_format=CHANNELS_LAST)
    theirs = {"diffusers": peer(size, network)}
    if settings.more:
        theirs["diffusers, channels-last"] = peer(size, network).to(memory_format=CHANNELS_LAST)
    models: dict[str, nn.Module] = {"ours": ours, "ours, in rows": awake(size)} | theirs
    if settings.more:
        mode = "reduce-overhead" if sampling and settings.device != "cpu" else None
        models["ours, compiled"] = torch.compile(awake(size).to(memory_format=CHANNELS_LAST), mode=mode)
        models["diffusers, compiled"] = torch.compile(peer(size, network), mode=mode)
    for model in models.values():
        model.to(settings.device).train(not sampling)
    return {
        name: (model, model if "ours" in name else lambda x, t, model=model: model(x, t - 1, return_dict=False)[0])
        for name, model in models.items()
    }


def training(model: nn.Module, predict: Predict, x: Tensor, t: Tensor, eps: Tensor) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            loss = (predict(x, t) - eps).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sampling(predict: Predict, x: Tensor, t: Tensor) -> Step:
    def step() -> Tensor:
        with torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            return predict(x, t)

    return step


def wait(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def race(steps: dict[str, Step], size: Size, device: str) -> dict[str, list[tuple[float, float]]]:
    """Let all take turns; return the wall and the CPU milliseconds of a step of each, round by round."""
    ms: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for r in range(-1, size.rounds):  # round -1 warms up
        for name in sorted(steps, reverse=bool(r % 2)):
            for _ in range(2 if r < 0 else 0):
                steps[name]()
            wait(device)
            watch = Stopwatch()
            for _ in range(size.steps):
                steps[name]()
            wait(device)
            if r >= 0:
                wall, cpu = 1000 * watch.read() / size.steps
                ms[name].append((wall, cpu))
    return ms


def compare(title: str, steps: dict[str, Step], size: Size, settings: Settings) -> None:
    """Race and print: milliseconds of a step, and how many times ours they are."""
    with FlopCounterMode(display=False) as counter:
        steps["diffusers"]()
    operations = counter.get_total_flops()
    ms = race(steps, size, settings.device)
    clock = 1 if settings.device == "cpu" else 0
    print(
        f"{title}: {size.batch} images and {operations / 1e9:.1f} GFLOP a step; "
        f"min / median / max of {size.rounds} rounds"
    )
    for name, figures in ms.items():
        wall, counted = ([each[i] for each in figures] for i in (0, clock))
        speed = [1000 * size.batch / each for each in counted]
        ratios = [a[clock] / b[clock] for a, b in zip(figures, ms["ours"], strict=True)]
        walls = [a[0] / b[0] for a, b in zip(figures, ms["ours"], strict=True)]
        print(f"  {name:26}{spread(counted, 2):>32} ms{spread(speed, 1):>32} images/s", end="")
        print(f"   over ours {spread(ratios)}" + (f", wall {spread(walls)}" if clock else ""), end="")
        if settings.device != "cpu":
            print(f"   {operations / min(wall) * 1e-9 / settings.peak_tflops:.1%} of the peak", end="")
        print(flush=True)


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(1)
    for name in [settings.only] if settings.only else list(SIZES):
        size = SIZES[name]
        size = replace(size, rounds=settings.rounds or size.rounds, batch=settings.batch or size.batch)
        x = torch.randn(size.batch, size.image_channels, size.side, size.side, device=settings.device)
        eps, t = torch.randn_like(x), torch.randint(1, 1001, (size.batch,), device=settings.device)
        who = contestants(size, settings, sampling=False)
        with torch.no_grad():
            predictions = [predict(x, t) for _, predict in who.values()]
        for each in predictions:
            torch.testing.assert_close(each, predictions[0], rtol=1e-4, atol=1e-4)
        steps = {each: training(model, predict, x, t, eps) for each, (model, predict) in who.items()}
        compare(f"{name}, training", steps, size, settings)
        who = contestants(size, settings, sampling=True)
        compare(
            f"{name}, sampling", {each: sampling(predict, x, t) for each, (_, predict) in who.items()}, size, settings
        )


if __name__ == "__main__":
    main()
