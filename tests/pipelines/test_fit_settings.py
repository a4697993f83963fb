"""The loop with every loss, target, way to draw t, and with labels: it learns, and stays a function of positions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.objective import ObjectiveConfig, Target
from models.timesteps import REMEMBERED_LOSSES, TimestepConfig, Timesteps
from pipelines import checkpoints
from pipelines.fit import fit, told_labels
from pipelines.fit_config import FitConfig
from pipelines.storage import Folder
from pipelines.world import World
from tests.pipelines.states import ABOUT, VARIANTS, Ear, micro_batches, tiny_state

Digits = tuple[np.ndarray, np.ndarray]
LOSS_AWARE = VARIANTS["loss-aware"]


@pytest.mark.parametrize(
    ("objective", "kind"),
    [
        (ObjectiveConfig(target="x_0", weight="min-snr"), "uniform"),
        (ObjectiveConfig(target="v"), "log-snr-normal"),
        (ObjectiveConfig(target="article"), "stratified"),
        (ObjectiveConfig(loss="two-noise"), "stratified"),
        (ObjectiveConfig(loss="reconstruction"), "stratified"),
    ],
)
def test_it_learns_whatever_it_is_asked_for(
    objective: ObjectiveConfig, kind: str, digits: Digits, tiny_fit: FitConfig
) -> None:
    config = replace(
        tiny_fit, images=1280, checkpoint_images=1280, objective=objective, timesteps=TimestepConfig(kind=kind)
    )
    # In a thousand small steps next to nothing of what two noises make of the loss can be learned; in 20 it can.
    variant = VARIANTS["plain" if objective.loss == "reduced" else "loss-aware"]._replace(classes=0)
    ear = Ear()
    fit(config, tiny_state(config, variant=variant), variant.schedule, 0, micro_batches(digits[0], config), ear)
    losses = [metrics["loss"] for _, metrics in ear.reports]
    assert losses[-1] < 0.9 * losses[0]
    assert ear.pictures[-1][1].isfinite().all()


@pytest.mark.parametrize("target", ["eps", "x_0", "v", "article"])
def test_the_grid_is_drawn_from_what_the_network_puts_out(target: Target, digits: Digits, tiny_fit: FitConfig) -> None:
    """A network of zeros says, as its x_0, that every picture is grey; as its ε, that there is no noise."""
    config = replace(tiny_fit, images=32, log_images=32, checkpoint_images=32, grid_images=32, learning_rate=1e-12,
                     objective=ObjectiveConfig(target=target))  # fmt: skip
    ear = Ear()
    fit(config, tiny_state(config), VARIANTS["plain"].schedule, 0, micro_batches(digits[0], config), ear)
    grey = bool(ear.pictures[-1][1].abs().max() < 1e-3)
    assert grey == (target == "x_0")


def test_the_losses_of_the_run_steer_its_later_draws(digits: Digits) -> None:
    state = tiny_state(LOSS_AWARE.fit, variant=LOSS_AWARE)
    fit(LOSS_AWARE.fit, state, LOSS_AWARE.schedule, 0, micro_batches(digits[0], LOSS_AWARE.fit), Ear())
    assert state.timesteps.state["seen"].sum() == 384
    assert state.timesteps.state["seen"].min() >= REMEMBERED_LOSSES
    position = torch.arange(384, 384 + 3200)
    t, weight = state.timesteps.draw(0, position)
    evenly, _ = tiny_state(LOSS_AWARE.fit, variant=LOSS_AWARE).timesteps.draw(0, position)
    assert not torch.equal(t, evenly)
    assert weight.std() > 0.05
    assert float((weight * (t <= 10)).mean()) == pytest.approx(0.5, abs=0.02)  # weighted, t is uniform again


def test_a_run_that_is_steered_by_its_losses_goes_on_bit_for_bit(digits: Digits, folder: Folder) -> None:
    config = LOSS_AWARE.fit
    whole, again = tiny_state(config, variant=LOSS_AWARE), tiny_state(config, 1, variant=LOSS_AWARE)
    ear = Ear(lambda state: checkpoints.commit(folder, state, ABOUT, World()))
    fit(config, whole, LOSS_AWARE.schedule, 0, micro_batches(digits[0], config), ear)
    at = folder / checkpoints.folder_name(256)
    checkpoints.load(at, checkpoints.read(at), again)
    fit(config, again, LOSS_AWARE.schedule, 0, micro_batches(digits[0], config, start=256), Ear())
    for mine, theirs in [
        (dict(again.model.named_parameters()), dict(whole.model.named_parameters())),
        (again.timesteps.state, whole.timesteps.state),
        (again.ema.power["0.05"], whole.ema.power["0.05"]),
        (again.ema.power["0.1"], whole.ema.power["0.1"]),
    ]:
        assert mine.keys() == theirs.keys() and len(mine)
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name


def test_a_label_is_dropped_or_not_by_its_position(tiny_fit: FitConfig) -> None:
    heard: list[torch.Tensor] = []

    def network(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        heard.append(label)
        return x

    config, position, label = replace(tiny_fit, label_dropout=0.25), torch.arange(4000), torch.arange(4000) % 10
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    for which in (torch.arange(4000), order):
        told_labels(network, label[which], 0, position[which], config)(torch.zeros(1), torch.zeros(1))  # type: ignore[arg-type]
    assert torch.equal(heard[1], heard[0][order])
    dropped = heard[0] == -1
    assert 0.22 < dropped.double().mean() < 0.28
    assert torch.equal(heard[0][~dropped], label[~dropped])


@pytest.mark.parametrize(("share", "dropped"), [(0.0, 0), (1.0, 1000)])
def test_none_or_all_labels_are_dropped(share: float, dropped: int, tiny_fit: FitConfig) -> None:
    heard: list[torch.Tensor] = []
    config = replace(tiny_fit, label_dropout=share)
    network = lambda x, t, label: heard.append(label)  # noqa: E731
    told_labels(network, torch.zeros(1000, dtype=torch.int64), 0, torch.arange(1000), config)(
        torch.zeros(1), torch.zeros(1)
    )  # type: ignore[arg-type]
    assert int((heard[0] == -1).sum()) == dropped


def test_a_bad_share_is_named(tiny_fit: FitConfig) -> None:
    with pytest.raises(ValueError, match=r"fit\.label_dropout is 1\.5; it must lie in 0\.\.1: try 0\.1"):
        replace(tiny_fit, label_dropout=1.5)


def test_t_that_the_schedule_does_not_have_is_refused_before_training(tiny_fit: FitConfig) -> None:
    config = TimestepConfig(kind="log-snr-normal", log_snr_mean=100.0, log_snr_std=1.0)
    with pytest.raises(ValueError, match=r"fit\.timesteps\.log_snr_mean is 100\.0"):
        Timesteps(config, VARIANTS["plain"].schedule, 32, torch.device("cpu"))
