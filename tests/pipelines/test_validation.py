import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs.presets import DIGITS
from models.network import EpsNetwork, NetworkConfig, build
from models.noise import normal
from models.objective import ObjectiveConfig, Target
from models.schedule import ScheduleConfig
from pipelines import checkpoints, validation
from pipelines.config import DataConfig, TrainJob
from pipelines.fit import new_state
from pipelines.images import View, encode
from pipelines.ingest import ingest
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.lineage import Trained
from pipelines.manifest import Manifest
from pipelines.plain import to_dict
from pipelines.plan import held_out_rows
from pipelines.storage import Folder
from pipelines.tracking import Tracker
from pipelines.validation import (
    METRIC,
    HeldOut,
    Validator,
    in_bands,
    losses,
    read_held_out,
    timesteps,
    validation_curve,
)
from pipelines.worker import TrainTask
from pipelines.world import World
from tests.models.independent import SCHEDULES, alpha_bars, best_for_gaussian
from tests.pipelines.states import ABOUT, FIT, TINY

Digits = tuple[np.ndarray, np.ndarray]
GREY = View(side=8, channels=1)


def held_of(digits: Digits, count: int = 100) -> HeldOut:
    return HeldOut(count, np.arange(count), digits[1][:count].astype(np.int64), digits[0][:count])


@pytest.mark.parametrize(("count", "T"), [(1, 1000), (97, 1000), (1000, 1000), (3000, 1000), (1234, 100), (7, 3)])
def test_the_timesteps_lie_evenly(count: int, T: int) -> None:
    t = timesteps(torch.arange(count), count, T)
    assert int(t.min()) >= 1 and int(t.max()) <= T
    below = np.searchsorted(np.sort(t), np.arange(T + 1), side="right")  # how many are at most 0 .. T
    assert np.abs(below - count * np.arange(T + 1) / T).max() <= 0.5
    if count > 50:  # in no order: neighbours of a data set are often alike
        assert abs(np.corrcoef(t, np.arange(count))[0, 1]) < 0.3


@pytest.mark.parametrize("name", ["article", "cosine", "zero terminal"])
def test_the_best_predictor_of_gaussian_data_has_the_loss_that_it_must_have(name: str) -> None:
    """Of data N(μ, s²) it is ᾱ²s²/(ᾱ²s² + β̄²) at each t; what is measured scatters by its chi-squared."""
    config, mu, s, count = SCHEDULES[name], 0.1, 0.25, 600
    picture = mu + s * np.random.default_rng(0).normal(size=(count, 8, 8, 1))
    pixels = np.rint((picture + 1) * 127.5).clip(0, 255).astype(np.uint8)
    held = HeldOut(count, np.arange(count), np.full(count, -1), pixels)
    predictor = best_for_gaussian(mu, s, alpha_bars(config))
    t, loss = losses(lambda label: predictor, config.tables(), held)
    signal = (alpha_bars(config)[t] * s) ** 2
    expected = signal / (signal + 1 - alpha_bars(config)[t] ** 2)
    T = len(alpha_bars(config)) - 1
    for band, measured in in_bands(t, loss, T).items():
        at = np.full(count, True) if band == METRIC else (t.numpy() - 1) * 4 // T == int(band[-6]) - 1
        error = math.sqrt(2 / 64 * (expected[at] ** 2).sum()) / at.sum()
        assert abs(measured - expected[at].mean()) < 4 * error, band
    assert len(in_bands(t, loss, T)) == 5


def network_of(target: Target, labels: bool, seed: int = 0) -> tuple[EpsNetwork, TrainJob]:
    """A network that says something else for each label, and the job of it."""
    job = replace(
        DIGITS,
        seed=seed,
        network=NetworkConfig(unet=TINY, labels=labels),
        fit=replace(DIGITS.fit, objective=ObjectiveConfig(target=target)),
        data=DataConfig(builtin="digits", held_out=100, ingest=IngestConfig(side=8, channels=1)),
    )
    network = build(job.network, 1, 8, classes=10)
    weights = torch.Generator().manual_seed(7)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=weights)
    return network.to(memory_format=torch.channels_last), job


def committed(folder: Folder, network: EpsNetwork, job: TrainJob, position: int = 128) -> Trained:
    state = new_state(network, FIT, job.schedule.tables())
    state.position = position
    for p in network.parameters():
        p.data.add_(0.5)  # so that the last weights are not the average
    about = replace(ABOUT, config=to_dict(job), labels=[str(i) for i in range(10)])
    return Trained(folder / checkpoints.folder_name(position), checkpoints.commit(folder, state, about, World()))


EPS: dict[Target, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "eps": lambda out, x, a, b: out,
    "x_0": lambda out, x, a, b: (x - a * out) / b,
    "v": lambda out, x, a, b: a * out + b * x,
}
"""ε of what a network of each target puts out for x, at ᾱ and β̄."""


@pytest.mark.parametrize("target", EPS)
@pytest.mark.parametrize("labels", [False, True])
def test_it_is_the_error_of_the_average_at_fixed_t_and_eps(
    target: Target, labels: bool, folder: Folder, digits: Digits
) -> None:
    network, job = network_of(target, labels)
    average = {name: value.clone() for name, value in network.state_dict().items()}
    found = validation_curve(committed(folder, network, job), held_of(digits)).means
    network.load_state_dict(average)
    ones = []
    for i in range(100):
        x_0 = torch.tensor(digits[0][i : i + 1]).permute(0, 3, 1, 2).float() / 127.5 - 1
        t = timesteps(torch.tensor([i]), 100, 1000)
        a = torch.tensor(alpha_bars(ScheduleConfig())[t], dtype=torch.float32)
        b = (1 - a**2).sqrt()
        eps = normal(0, "validation eps", torch.tensor([i]), (1, 8, 8))
        x = a * x_0 + b * eps
        with torch.no_grad():
            out = network(x, t, torch.tensor([digits[1][i]])) if labels else network(x, t)
        ones.append(float((EPS[target](out, x, a, b) - eps).square().mean()))
    assert found[METRIC] == pytest.approx(np.mean(ones), rel=1e-4)


def test_neither_the_seed_nor_the_size_of_a_batch_changes_it(folder: Folder, digits: Digits) -> None:
    one, two = (
        validation_curve(committed(folder / str(seed), *network_of("eps", True, seed)), held_of(digits)).means
        for seed in (0, 1)
    )
    assert one == two
    network, _ = network_of("eps", False)
    several = [
        losses(lambda label: network, ScheduleConfig().tables(), held_of(digits), batch)[1] for batch in (1, 7, 100)
    ]
    for loss in several[1:]:
        torch.testing.assert_close(loss, several[0], rtol=1e-5, atol=0)


def test_what_is_unusable_is_left_out_and_the_others_keep_their_t_and_eps(alone: None, folder: Folder) -> None:
    source, out, held = folder / "raw", folder / "data", held_out_rows(200, 70)
    form = IngestConfig(side=0, channels=1, encoding="in-place")
    for i in range(200):
        source.put(f"{i}.png", encode(np.full((9, 9, 1), i, np.uint8), "png"))
    whole = read_held_out(out, manifest_of(source, out, form), 70, GREY)
    assert whole.index.tolist() == list(range(70))
    bad = [f"{whole.image[number, 0, 0, 0]}.png" for number in (0, 33, 69)]
    for name in bad:
        source.put(name, b"no picture")
    some = read_held_out(out / "2", manifest_of(source, out / "2", form), 70, GREY)
    assert sorted(set(range(70)) - set(some.index.tolist())) == [0, 33, 69]
    assert np.array_equal(some.image, whole.image[some.index])
    assert len(held) == 70 and some.count == 70


def test_a_training_job_sees_no_image_that_it_holds_out(alone: None, folder: Folder, digits: Digits) -> None:
    for i in range(200):
        (folder / "raw").put(f"{i}.png", encode(digits[0][i], "png"))
    manifest = manifest_of(folder / "raw", folder / "data", IngestConfig(side=8, channels=1, row_group_rows=16))
    job = replace(DIGITS, data=replace(DIGITS.data, held_out=40), fit=replace(FIT, images=640, batch_images=64))
    task = TrainTask(job, folder / "data", manifest, ABOUT, wire=None)  # type: ignore[arg-type]
    for start in (0, 320):
        read = task.read_from(start)
        parts = [part for window in read.deal.windows for part in read.read(window)]
        ledger = {
            p: r for part in parts for p, r in zip(part["position"], part["row"], strict=True) if start <= p < 640
        }
        rows = np.array([ledger[position] for position in range(start, 640)])  # epochs of 160, of which four
        trained = sorted(set(range(200)) - set(held_out_rows(200, 40).tolist()))
        assert [sorted(epoch.tolist()) for epoch in rows.reshape(-1, 160)] == [trained] * ((640 - start) // 160)


def manifest_of(source: Folder, out: Folder, form: IngestConfig) -> Manifest:
    return ingest(IngestPlan.make(source, out, form))


class Remembers(Tracker):
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, dict[str, float]]] = []

    def metrics(self, values: dict[str, float], position: int) -> None:
        self.taken.append((position, values))


@pytest.mark.ray
def test_it_is_measured_beside_and_the_last_is_waited_for(
    alone: None,
    tmp_path: Path,
    digits: Digits,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    ray_cluster: None,
) -> None:
    root = Folder(str(tmp_path))
    for i in range(300):
        (root / "raw").put(f"{digits[1][i]}/{i}.png", encode(digits[0][i], "png"))
    manifest = manifest_of(root / "raw", root / "data", IngestConfig(side=8, channels=1))
    network, job = network_of("eps", True)
    job, tracker = replace(job, root=root.url), Remembers()
    with caplog.at_level(logging.WARNING), Validator(job, root / "data", manifest, tracker) as validator:
        validator.take(64)  # of which there is no checkpoint (any more): said, and no reason to stop
        trained = [committed(job.run, network, job, position) for position in (128, 256, 384)]
        for one in trained:
            validator.take(one.checkpoint.position)
        validator.take(384)
    positions = [position for position, _ in tracker.taken]
    assert positions == sorted(set(positions)) and positions[-1] == 384
    assert "validation_loss at 64 images is not on record" in caplog.text
    expected = validation_curve(trained[2], read_held_out(root / "data", manifest, 100, GREY)).means
    assert validator.last is not None
    assert validator.last.means == tracker.taken[-1][1] == pytest.approx(expected, rel=1e-6)

    measuring, end = tmp_path / "measuring", time.monotonic() + 300
    monkeypatch.setattr(validation, "measure", lambda *_: (measuring.touch(), time.sleep(60)))
    with pytest.raises(KeyError), Validator(job, root / "data", manifest, tracker) as validator:
        validator.take(128)
        while not measuring.exists():
            assert time.monotonic() < end, "it never began"
            time.sleep(0.05)
        raise KeyError("an error elsewhere is not held up")
    assert not [thread for thread in threading.enumerate() if thread.name == "validation"], "nobody waits in Ray"
    none = replace(job, data=replace(job.data, held_out=0))
    with Validator(none, root / "data", manifest, tracker) as validator:
        validator.take(384)
    assert validator.last is None
