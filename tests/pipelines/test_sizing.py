"""What a dry run reckons is what there is."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from jobs.presets import CIFAR10, DIGITS
from models.network import build
from models.parallelize import ParallelConfig, construct
from pipelines import sizing
from pipelines.config import TrainJob
from pipelines.errors import ConfigurationError
from pipelines.fit import State, fit
from pipelines.fit_config import FitConfig
from pipelines.images import View
from pipelines.rehearsal import dry_run
from pipelines.scaling import ScalingConfig
from pipelines.sizing import measure, memory_per_worker, size
from pipelines.sizing_config import SizingConfig
from pipelines.training import identity
from tests.pipelines.sizing_worker import CLASSES, FIT, HOW, NETWORK, held
from tests.processes import side_by_side

CPU = torch.device("cpu")
VIEW = View(side=8, channels=1)
JOB = replace(DIGITS, network=NETWORK, fit=FIT)


def job_of(strategy: str, workers: int) -> TrainJob:
    return replace(JOB, parallel=HOW[strategy], scaling=ScalingConfig(workers=workers))


@pytest.fixture(scope="module")
def bytes_of(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, int]]:
    """What the first of W workers holds, real processes with gloo between them."""
    found = {(strategy, 1): held(HOW[strategy]) for strategy in ("ddp", "fsdp")}
    folder = tmp_path_factory.mktemp("workers")
    for workers in (2, 4):
        command = [sys.executable, "-m", "tests.pipelines.sizing_worker", folder, workers]
        assert side_by_side([*command, rank] for rank in range(workers)) == [0] * workers
        told = json.loads((folder / f"{workers}.json").read_text())
        found |= {(strategy, workers): of for strategy, of in told.items()}
    return found


def test_a_worker_holds_what_the_dry_run_says(bytes_of: dict[tuple[str, int], dict[str, int]]) -> None:
    """To the byte, after a real step of the optimizer."""
    assert {workers for _, workers in bytes_of} == {1, 2, 4}
    for (strategy, workers), found in bytes_of.items():
        said, _ = memory_per_worker(job_of(strategy, workers), VIEW, CLASSES)
        assert {name: said[name] for name in found} == found, (strategy, workers)


def test_shared_out_it_falls_with_the_workers() -> None:
    alone, parameters = memory_per_worker(job_of("fsdp", 1), VIEW, CLASSES)
    assert parameters == sum(p.numel() for p in build(JOB.network, 1, 8, CLASSES).parameters())
    for workers in (2, 4):
        shared, _ = memory_per_worker(job_of("fsdp", workers), VIEW, CLASSES)
        copied, _ = memory_per_worker(job_of("ddp", workers), VIEW, CLASSES)
        assert copied == alone
        for name in ("weights", "gradient", "averages"):
            assert alone[name] / workers <= shared[name] < 1.05 * alone[name] / workers
        assert shared["activations"] == alone["activations"]
        assert 0 < shared["gathered"] < 4 * alone["weights"]
    # Two share a copy, however many copies there are; and of a number that may fall the least counts.
    assert memory_per_worker(job_of("hybrid", 4), VIEW, CLASSES) == memory_per_worker(job_of("fsdp", 2), VIEW, CLASSES)
    fewer = replace(job_of("fsdp", 4), scaling=ScalingConfig(workers=4, min_workers=2))
    assert memory_per_worker(fewer, VIEW, CLASSES) == memory_per_worker(job_of("fsdp", 2), VIEW, CLASSES)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["unet", "dit", "dit, computed again"])
def test_activations_are_what_the_allocator_still_holds_after_the_way_there(kind: str, precision: str) -> None:
    """The peer is torch's profiler, which counts what is taken and what is given back."""
    again = kind.endswith("again")
    how = ParallelConfig(precision=precision, checkpoint_activations=again)  # type: ignore[arg-type]
    job = replace(JOB if kind != "unet" else DIGITS, parallel=how)
    job = replace(job, fit=replace(job.fit, micro_images=16))
    classes = CLASSES if job.network.labels else 0
    said, _ = memory_per_worker(job, VIEW, classes)
    model, _ = construct(lambda: build(job.network, 1, 8, classes), 0, how, CPU)
    x, t = torch.zeros(16, 1, 8, 8), torch.zeros(16, dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        out = model(x, t, t) if classes else model(x, t)
    kept = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
    assert out.requires_grad and said["activations"] == pytest.approx(kept, rel=0.05)


def test_what_is_computed_again_is_not_kept() -> None:
    plain, again = (
        memory_per_worker(
            replace(CIFAR10, parallel=ParallelConfig(checkpoint_activations=said)), View(side=32, channels=3), 0
        )
        for said in (False, True)
    )
    assert again[0]["activations"] < 0.4 * plain[0]["activations"]
    assert plain[1] == 35_746_307
    assert plain[0]["weights"] == 4 * plain[1] and plain[0]["optimizer"] - 8 * plain[1] < 4 * 1000


def test_the_copy_that_is_saved_lies_in_the_host_of_a_gpu() -> None:
    view = View(side=32, channels=3)
    on_gpu, _ = memory_per_worker(CIFAR10, view, 0)
    on_cpu, _ = memory_per_worker(replace(CIFAR10, scaling=ScalingConfig(workers=8)), view, 0)
    assert on_cpu["total"] - on_gpu["total"] == on_cpu["copy_being_saved"] == 4 * 4 * 35_746_307


def test_hours_and_price_are_those_of_the_rate_that_is_given() -> None:
    """3.6 million images at 4 workers · 250 images/s are an hour, four worker-hours; at 2.50 each, 10."""
    job = replace(
        JOB,
        scaling=ScalingConfig(workers=4),
        sizing=SizingConfig(images_per_s_per_worker=250, price_per_hour=2.5),
    )
    said = size(job, VIEW, CLASSES, 3_600_000, image_bytes=3000)
    assert (said["images_per_s"], said["data_images_per_s"], said["data_mb_per_s"]) == (1000, 1000, 3)
    assert (said["hours"], said["worker_hours"], said["cost"]) == (1, 4, 10)
    assert said["images_per_s_by"] == "sizing.images_per_s_per_worker"
    # Of 8 micro-batches three workers do 3, 3 and 2: a ninth of their time they wait.
    three = size(replace(job, scaling=ScalingConfig(workers=3)), VIEW, CLASSES, 3_600_000, None)
    assert three["images_per_s"] == pytest.approx(750 * 8 / 9, rel=1e-3) and three["data_mb_per_s"] is None
    free = size(replace(job, sizing=SizingConfig(images_per_s_per_worker=250)), VIEW, CLASSES, 3_600_000, 3000)
    assert free["cost"] is None, "which is not 0"
    assert free | {"cost": 10} == said
    unknown = size(replace(job, sizing=SizingConfig()), VIEW, CLASSES, 3_600_000, None)
    assert {unknown[name] for name in ("images_per_s", "hours", "cost", "images_per_s_by")} == {None}
    assert unknown["memory_per_worker"] == said["memory_per_worker"]


def test_a_dry_run_says_it_and_the_run_is_the_same(tmp_path: Path) -> None:
    job = replace(DIGITS, root=str(tmp_path), sizing=SizingConfig(measure_steps=2, price_per_hour=1))
    said = dry_run(job)["sizing"]
    assert said["parameters"] == 701_345 and said["images_per_s_by"].startswith("measured: 2 steps")
    assert said["hours"] == pytest.approx(DIGITS.fit.images / said["images_per_s"] / 3600, rel=1e-3)
    assert said["cost"] == pytest.approx(2 * said["hours"], rel=1e-3)
    assert not list(tmp_path.iterdir())
    assert identity(job, None) == identity(DIGITS, None)


def test_what_is_measured_is_a_step_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 micro-batches of 16 a worker of three has 3 at most; they are trained on for real, and the first step, which
    makes the optimizer's memory, does not count."""
    told: list[tuple[FitConfig, State, Any]] = []

    def noted(config: FitConfig, state: State, schedule: Any, seed: int, images: Any, listener: Any) -> None:
        told.append((config, state, listener))
        fit(config, state, schedule, seed, images, listener)

    monkeypatch.setattr(sizing, "fit", noted)
    threads = torch.get_num_threads()
    job = replace(JOB, scaling=ScalingConfig(workers=3), sizing=SizingConfig(measure_steps=3))
    rate = measure(job, VIEW, CLASSES)
    ((config, state, watch),) = told
    assert (config.batch_images, config.micro_images, state.position) == (48, 16, 4 * 48)
    assert len(watch.rates) == 4 and rate == sorted(watch.rates[1:])[1] > 0
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"price_per_hour": -1.0}, r"sizing\.price_per_hour is -1.0; it must not be negative: try 0"),
        ({"images_per_s_per_worker": float("nan")}, r"sizing\.images_per_s_per_worker is nan"),
        ({"images_per_s_per_worker": 9.0, "measure_steps": 2}, "either known or measured: set one of them to 0"),
    ],
)
def test_what_cannot_be_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SizingConfig(**setting)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_cannot_be_measured_where_there_is_none() -> None:
    job = replace(CIFAR10, sizing=SizingConfig(measure_steps=2))
    with pytest.raises(ConfigurationError, match="there is no GPU here"):
        measure(job, View(side=32, channels=3), 0)
