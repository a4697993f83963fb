"""Named runs. Each states its command, what it runs on, how long it takes there and what comes out."""

from dataclasses import replace

from models.network import NetworkConfig
from models.unet import UNetConfig
from pipelines.config import DataConfig, TrainJob
from pipelines.draw_config import DrawConfig
from pipelines.fit_config import FitConfig
from pipelines.ingest_plan import IngestConfig
from pipelines.scaling import ScalingConfig
from pipelines.sweep_plan import SweepJob

DIGITS = TrainJob(
    name="digits",
    data=DataConfig(builtin="digits", ingest=IngestConfig(side=8, channels=1, shard_rows=512)),
    network=NetworkConfig(unet=UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention=(4,))),
    fit=FitConfig(images=204_800, batch_images=128, micro_images=64),
    scaling=ScalingConfig(workers=2),
    evaluate_images=1797,
    draw=DrawConfig(steps=20),
)
"""``jobs/train.py digits``: 1,797 handwritten digits, 8 × 8 pixels, 0.7 M parameters. On 2 CPU cores four minutes, a
loss of 0.083, a Fréchet distance in pixels between 0.04 and 0.05."""

CIFAR10 = TrainJob(
    name="cifar10",
    data=DataConfig(url="s3://bucket/cifar10", ingest=IngestConfig(side=32, channels=3)),
    network=NetworkConfig(
        unet=UNetConfig(channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), groups=32)
    ),
    fit=FitConfig(
        images=102_400_000,
        batch_images=128,
        micro_images=16,
        learning_rate=2e-4,
        warm_up_images=640_000,
        flip=True,
        log_images=128_000,
        checkpoint_images=1_280_000,
        grid_images=1_280_000,
    ),
    scaling=ScalingConfig(workers=8, use_gpu=True),
    evaluate_images=50_000,
    draw=DrawConfig(steps=50, use_gpu=True, actors=8, shard_images=1000, batch_images=500),
)
"""``jobs/train.py cifar10 --data.url s3://bucket/images``: the network and the length of the DDPM paper, for 8 GPUs.
Not yet run to its end here: nothing is promised."""

ARTICLE = SweepJob(
    name="article",
    grid=(
        # Each rate leaves the same ᾱ_T, e^-5.04.
        "schedule.kind=article schedule.T=25 schedule.rate=0.595154 draw.steps=25",
        "schedule.kind=article schedule.T=100 schedule.rate=0.186647 draw.steps=100",
        "schedule.kind=article schedule.T=1000 schedule.rate=0.02 draw.steps=1000",
        "schedule.kind=constant schedule.T=25 schedule.rate=0.637987 draw.steps=25",
        "schedule.kind=constant schedule.T=100 schedule.rate=0.189828 draw.steps=100",
        "schedule.kind=constant schedule.T=1000 schedule.rate=0.0200336 draw.steps=1000",
        "draw.sampler=random,greedy",
        "fit.objective.loss=two-noise",
    ),
    train=replace(
        DIGITS,
        data=replace(DIGITS.data, held_out=97),
        fit=replace(DIGITS.fit, images=51_200, log_images=6_400, checkpoint_images=12_800, grid_images=12_800),
        evaluate_images=512,
        draw=DrawConfig(sampler="random", steps=100),
    ),
)
"""``jobs/sweep.py article``: what the article asks. Must T be as large as 1000, and why should α_t fall? Each schedule
leaves the same ᾱ_T and is built up again in T random steps. And: the two-noise loss beside the reduced one, greedy
building beside random. Nine short runs on the digits: half an hour on 2 CPU cores."""

SWEEPS: dict[str, tuple[str, SweepJob]] = {
    "article": ("T and α_t, the loss and the way of building, as the article asks; half an hour", ARTICLE),
    "digits": ("the digits as a start for grids of your own: add --grid", SweepJob(grid=("seed=0,1",), train=DIGITS)),
}

PRESETS: dict[str, tuple[str, TrainJob]] = {
    "digits": ("1,797 real handwritten digits on a laptop, in minutes", DIGITS),
    "cifar10": ("the network of the DDPM paper on images of 32 x 32, for 8 GPUs", CIFAR10),
}
