import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.schedule import article
from pipelines import checkpoints
from pipelines.errors import ConfigurationError
from pipelines.fit import DivergedError, fit, mirrored, pixels_to_x_0, x_0_to_pixels
from pipelines.fit_config import FitConfig
from pipelines.storage import Folder
from pipelines.world import World
from tests.pipelines.states import ABOUT, FIT, Ear, Noticed, everything, micro_batches, tiny_state

Digits = tuple[np.ndarray, np.ndarray]


def test_it_learns(digits: Digits, tiny_fit: FitConfig) -> None:
    ear = Ear()
    config = replace(tiny_fit, images=1920, checkpoint_images=1920)
    fit(config, tiny_state(config), article(), 0, micro_batches(digits[0], config), ear)
    losses = [metrics["loss"] for _, metrics in ear.reports]
    assert losses[0] > 0.8
    assert losses[-1] < 0.4


def test_it_speaks_when_it_should(digits: Digits, tiny_fit: FitConfig) -> None:
    ear = Ear()
    fit(tiny_fit, tiny_state(tiny_fit), article(), 0, micro_batches(digits[0], tiny_fit), ear)
    assert [position for position, _ in ear.reports] == [64, 128, 192, 256, 320, 384]
    assert [position for position, _ in ear.pictures] == [192, 384]
    assert ear.checkpoints == [128, 256, 384]
    grid = ear.pictures[-1][1]
    assert grid.shape == (64, 1, 8, 8) and grid.abs().max() < 1.001
    assert ear.evaluations == 2 * 20, "a grid is longer than a step, and no silence"
    bands = {f"loss_band_{i}_of_4" for i in range(1, 5)}
    assert set(ear.reports[0][1]) == bands | {
        "loss", "gradient_norm", "learning_rate", "images_per_s", "data_wait_percent", "images_replaced",
        "storage_retries", "steps_skipped", "ema_distance", "images_per_s_per_worker", "memory_mb_per_worker",
    }  # fmt: skip


def test_the_loss_is_the_mean_of_its_bands(digits: Digits, tiny_fit: FitConfig) -> None:
    ear = Ear()
    fit(tiny_fit, tiny_state(tiny_fit), article(), 0, micro_batches(digits[0], tiny_fit), ear)
    for _, metrics in ear.reports:  # batches are stratified, so each band has a quarter of the images
        bands = [value for name, value in metrics.items() if "band" in name]
        assert np.mean(bands) == pytest.approx(metrics["loss"], rel=1e-5)


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(digits: Digits, tiny_fit: FitConfig) -> None:
    weights = []
    for seed in (0, 0, 1):
        state = tiny_state(tiny_fit)
        fit(tiny_fit, state, article(), seed, micro_batches(digits[0], tiny_fit), Ear())
        weights.append(torch.cat([p.detach().flatten() for p in state.model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_size_of_a_micro_batch_changes_only_the_rounding(digits: Digits, tiny_fit: FitConfig) -> None:
    weights = []
    for micro in (8, 16, 32):
        config = replace(tiny_fit, micro_images=micro)
        state = tiny_state(config, dtype=torch.float64)
        fit(config, state, article(), 0, micro_batches(digits[0], config), Ear())
        weights.append(torch.cat([p.detach().flatten() for p in state.model.parameters()]))
    assert torch.allclose(weights[0], weights[1], rtol=0, atol=1e-9)
    assert torch.allclose(weights[0], weights[2], rtol=0, atol=1e-9)


def start_workers(folder: Path, world: int, stop: int, variant: str = "plain") -> None:
    """Run ddp_worker.py to its end in real processes."""
    module = "tests.pipelines.ddp_worker"
    command = [sys.executable, "-W", "error", "-m", module, str(folder), variant, str(world), str(stop)]
    workers = [subprocess.Popen([*command, str(rank)]) for rank in range(world)]
    assert [worker.wait(timeout=300) for worker in workers] == [0] * world


def test_a_run_changes_its_workers_half_way(digits: Digits, tiny_fit: FitConfig, tmp_path: Path) -> None:
    """Checkpoints of two that share the model are gone on from by four with two copies, and by one."""
    alone = tiny_state(tiny_fit, dtype=torch.float64)
    fit(tiny_fit, alone, article(), 0, micro_batches(digits[0], tiny_fit), Ear())
    np.save(tmp_path / "pixels.npy", digits[0])
    start_workers(tmp_path, 2, stop=256)
    run = Folder(str(tmp_path / "run"))
    found = checkpoints.newest(run)
    assert found is not None and found[1].position == 256
    assert {name.split("_")[2] for name in found[1].files if name != ".metadata"} == {"0", "1"}, "both have written"

    state = tiny_state(tiny_fit, seed=1, dtype=torch.float64)
    checkpoints.load(*found, state)
    fit(tiny_fit, state, article(), 0, micro_batches(digits[0], tiny_fit, start=256), Ear())
    start_workers(tmp_path, 4, stop=384)
    four = torch.load(tmp_path / "rank-0.pt", weights_only=True)
    for name, p in alone.model.named_parameters():
        assert torch.allclose(dict(state.model.named_parameters())[name], p, rtol=0, atol=1e-9), name
        assert torch.allclose(four[name], p, rtol=0, atol=1e-9), name


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer_moves(digits: Digits, tiny_fit: FitConfig) -> None:
    config = replace(tiny_fit, learning_rate=1e30, warm_up_images=0, clip_norm=1e30)
    state, short = tiny_state(config), tiny_state(config)
    with pytest.raises(DivergedError, match=r"gradient of positions \d+\.\.\d+ is (nan|inf)") as caught:
        fit(config, state, article(), 0, micro_batches(digits[0], config), Ear())
    first = int(str(caught.value).split("positions ")[1].split("..")[0])
    assert first % config.batch_images == 0 < first
    assert state.position == first + config.batch_images
    # All of it is what a run is that ends before that batch.
    until = replace(config, images=first)
    fit(until, short, article(), 0, micro_batches(digits[0], until), Ear())
    assert {int(each["step"]) for each in state.optimizer.state.values()} == {first // config.batch_images}
    torch.testing.assert_close(everything(state), everything(short), rtol=0, atol=0, equal_nan=True)


def test_the_rate_rises_and_falls_as_it_should(tiny_fit: FitConfig) -> None:
    """Against torch's own schedulers, step by step."""
    config = replace(tiny_fit, decay_images=384)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=(384 - 64) // 32)
    assert [config.learning_rate_at(position) for position in (32, 64)] == [2e-3 / 2, 2e-3]
    for position in range(96, 385, 32):
        optimizer.step()
        peer.step()
        assert config.learning_rate_at(position) == pytest.approx(peer.get_last_lr()[0], abs=1e-12)
    assert config.learning_rate_at(384) == 0
    assert tiny_fit.learning_rate_at(384) == 2e-3


class Poisoned(nn.Module):
    """A network whose gradient is not finite in the batches that start at some positions."""

    def __init__(self, model: nn.Module, steps: set[int]) -> None:
        super().__init__()
        self.model, self.steps, self.calls = model, steps, 0

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        step, self.calls = self.calls // FIT.micro_batches, self.calls + 1
        out: torch.Tensor = self.model(x, t)
        return out * torch.nan if step in self.steps else out


def test_a_gradient_that_is_not_finite_is_skipped_if_asked(digits: Digits, tiny_fit: FitConfig) -> None:
    """The step's position counts, its gradient, its losses and the optimizer's memory do not."""
    config, ear, plain = replace(tiny_fit, not_finite="skip"), Ear(), Ear()
    state, whole = tiny_state(config), tiny_state(config)
    state.parallel = Poisoned(state.model, {1, 4})
    fit(config, state, article(), 0, micro_batches(digits[0], config), ear)
    fit(config, whole, article(), 0, micro_batches(digits[0], config), plain)
    assert [metrics["steps_skipped"] for _, metrics in ear.reports] == [1, 0, 1, 0, 0, 0]
    assert all(np.isfinite(metrics["loss"]) for _, metrics in ear.reports)
    assert state.position == 384 and torch.isfinite(everything(state)).all()
    assert {int(each["step"]) for each in state.optimizer.state.values()} == {10}
    assert ear.reports[0][1]["loss"] != plain.reports[0][1]["loss"], "one step of two is in it"


def test_ten_in_a_row_are_not_skipped(digits: Digits, tiny_fit: FitConfig) -> None:
    config = replace(tiny_fit, not_finite="skip")
    state = tiny_state(config)
    state.parallel = Poisoned(state.model, set(range(1, 12)))
    with pytest.raises(DivergedError, match=r"gradient of positions 320\.\.351 is nan"):
        fit(config, state, article(), 0, micro_batches(digits[0], config), Ear())


@pytest.mark.parametrize("at", [96, 128, 384], ids=["between two", "beside one that is due", "at the end"])
def test_a_notice_becomes_a_checkpoint_and_all_goes_on_as_if_nothing_had_been(
    at: int, digits: Digits, tiny_fit: FitConfig, folder: Folder
) -> None:
    """Bit for bit, and so does the curve, of which 96 images are the middle of a point."""
    whole, ear = tiny_state(tiny_fit), Ear()
    fit(tiny_fit, whole, article(), 0, micro_batches(digits[0], tiny_fit), ear)
    noticed = Noticed(at, lambda state: checkpoints.commit(folder, state, ABOUT, World()) and None)
    fit(tiny_fit, tiny_state(tiny_fit), article(), 0, micro_batches(digits[0], tiny_fit), noticed)
    assert noticed.left == (at if at < 384 else 0), "at the end nobody leaves any more"
    assert noticed.checkpoints == [due for due in (96, 128, 256, 384) if due == at or 96 < due < at]
    found = checkpoints.newest(folder)
    assert found and found[1].position == at
    state, rest = tiny_state(tiny_fit, seed=1), Ear()
    checkpoints.load(*found, state)
    fit(tiny_fit, state, article(), 0, micro_batches(digits[0], tiny_fit, start=at), rest)
    assert torch.equal(everything(state), everything(whole))
    both = noticed.reports + rest.reports
    for name in ("loss", "loss_band_1_of_4", "gradient_norm"):
        told = [(position, metrics[name]) for position, metrics in both]
        assert told == [(position, metrics[name]) for position, metrics in ear.reports]


def test_pixels_survive_the_way_to_x_0_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    x_0 = pixels_to_x_0(pixels)
    assert x_0.min() == -1 and x_0.max() == 1 and x_0.shape == (1, 1, 16, 16)
    assert torch.equal(x_0_to_pixels(x_0), pixels)


def test_an_image_is_mirrored_or_not_by_its_position() -> None:
    x_0 = torch.arange(4.0).expand(1000, 1, 2, 4)
    position = torch.arange(1000)
    out = mirrored(x_0, 0, position)
    flipped = out[:, 0, 0, 0] == 3
    assert torch.equal(out[flipped], x_0[flipped].flip(3)) and torch.equal(out[~flipped], x_0[~flipped])
    assert 400 < flipped.sum() < 600
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mirrored(x_0, 0, position[order]), out[order])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": 100}, r"fit\.images is 100; it must be a multiple of fit\.batch_images, which is 32: try 96"),
        ({"micro_images": 12}, r"fit\.micro_images is 12; it must divide fit\.batch_images, which is 32: try 8"),
        ({"decay_images": 64}, r"fit\.decay_images is 64; it must be above fit\.warm_up_images, which is 64: try 384"),
        ({"decay_images": 320}, r"fit\.images is 384 and fit\.decay_images 320, .* 384 or more"),
        ({"learning_rate": 0.0}, r"fit\.learning_rate is 0\.0; it must be positive"),
        ({"warm_up_images": -1}, r"fit\.warm_up_images is -1; it must not be negative"),
        ({"batch_images": 0}, r"fit\.batch_images is 0; it must be at least 1"),
    ],
)
def test_bad_numbers_name_the_field_the_value_and_the_way_out(
    wrong: dict[str, float], message: str, tiny_fit: FitConfig
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        replace(tiny_fit, **wrong)


def test_more_workers_than_micro_batches_are_refused(tiny_fit: FitConfig) -> None:
    for workers in (1, 2, 3, 4):
        tiny_fit.check_workers(workers)
    with pytest.raises(ConfigurationError, match=r"scaling\.workers is 5;.* 4 micro-batches .* take 4 workers at most"):
        tiny_fit.check_workers(5)
    assert [tiny_fit.idle_share(workers) for workers in (1, 2, 3, 4)] == pytest.approx([0, 0, 1 / 3, 0])
