"""Averages of any width, made afterwards of what a run left."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.presets import DIGITS
from models.ema import EMAConfig
from models.network import NetworkConfig
from pipelines import checkpoints, snapshots
from pipelines.errors import ConfigurationError, DamagedError
from pipelines.fit import State, fit
from pipelines.lineage import Trained
from pipelines.plain import to_dict
from pipelines.storage import Folder
from pipelines.world import World
from tests.pipelines.states import ABOUT, FIT, TINY, VARIANTS, Ear, micro_batches, tiny_state

SCHEDULE = VARIANTS["plain"].schedule
CONFIG = replace(FIT, checkpoint_images=32, log_images=32, ema=EMAConfig(power_stds=(0.05, 0.1)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]) -> tuple[Folder, State, State]:
    """A run that left snapshots at each of its 12 steps, its end, and the end of one that tracked σ_rel = 0.15."""
    folder = Folder(str(tmp_path_factory.mktemp("run")))
    about = replace(ABOUT, config=to_dict(replace(DIGITS, network=NetworkConfig(unet=TINY))))

    def commit(state: State) -> None:
        checkpoints.commit(folder, state, about, World())

    state, direct = tiny_state(CONFIG), tiny_state(replace(CONFIG, ema=EMAConfig(power_stds=(0.1, 0.15))))
    fit(CONFIG, state, SCHEDULE, 0, micro_batches(digits[0], CONFIG), Ear(commit))
    fit(CONFIG, direct, SCHEDULE, 0, micro_batches(digits[0], CONFIG), Ear())
    return folder, state, direct


def average(folder: Folder, position: int, std: float) -> dict[str, torch.Tensor]:
    """What the checkpoint at a position gives."""
    names = checkpoints.read(folder / checkpoints.folder_name(position)).snapshots
    return snapshots.average(folder, names, position, std)


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def test_a_width_that_was_tracked_comes_back(run: tuple[Folder, State, State]) -> None:
    folder, state, _ = run
    for std in (0.05, 0.1):
        made = flat(average(folder, 384, std))
        torch.testing.assert_close(made, flat(state.ema.power[str(std)]), rtol=0, atol=1e-6)


def test_a_width_that_was_not_is_nearly_what_tracking_it_gives(run: tuple[Folder, State, State]) -> None:
    folder, state, direct = run
    wanted, made = flat(direct.ema.power["0.15"]), flat(average(folder, 384, 0.15))
    off = float((made - wanted).norm())
    assert off < 0.05 * float((flat(state.ema.power["0.1"]) - wanted).norm()), "hardly better than the nearest one"


def test_samples_are_drawn_from_it(run: tuple[Folder, State, State]) -> None:
    folder, _, _ = run
    network = Trained.find(folder.url).network(averaged=True, std=0.15)
    made = average(folder, 384, 0.15)
    assert torch.equal(flat(dict(network.named_parameters())), flat(made))


def test_an_earlier_checkpoint_has_its_own(run: tuple[Folder, State, State]) -> None:
    folder, _, _ = run
    early = Trained.find((folder / checkpoints.folder_name(256)).url).network(averaged=True, std=0.1)
    assert torch.equal(flat(dict(early.named_parameters())), flat(average(folder, 256, 0.1)))
    assert not torch.equal(flat(average(folder, 256, 0.1)), flat(average(folder, 384, 0.1)))


def test_without_snapshots_the_way_out_is_told(tmp_path: Path) -> None:
    run = Folder(str(tmp_path))
    assert snapshots.keep(run, tiny_state(FIT).ema.power, 0) == []  # it tracks none
    with pytest.raises(ConfigurationError, match=r"draw\.ema_std is 0\.1; .* train with fit\.ema\.power_stds"):
        snapshots.average(run, [], 384, 0.1)


@pytest.mark.parametrize("std", [0.5, -0.1])
def test_a_width_that_cannot_be_is_refused(std: float, run: tuple[Folder, State, State]) -> None:
    with pytest.raises(ConfigurationError, match=rf"draw\.ema_std is {std}: "):
        average(run[0], 384, std)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    run, state = Folder(str(tmp_path)), tiny_state(CONFIG)
    state.position = 32
    names = snapshots.keep(run, state.ema.power, state.position)
    assert names == (run / "ema").names()
    name = names[0]
    data = bytearray((run / "ema").get(name))
    data[-1] ^= 1
    (run / "ema").put(name, bytes(data))
    with pytest.raises(DamagedError, match="is not what was written"):
        snapshots.average(run, names, 32, 0.1)


def test_what_is_made_is_a_function_of_the_checkpoint(run: tuple[Folder, State, State], tmp_path: Path) -> None:
    """A snapshot more changes nothing, even one of the same time and width; a snapshot less is said."""
    copy = Folder(str(tmp_path / "run"))
    shutil.copytree(run[0].path(), copy.path())
    before = flat(average(copy, 256, 0.12))
    other = tiny_state(CONFIG, seed=9)
    other.position = 256
    twins = snapshots.keep(copy, other.ema.power, other.position)
    assert len((copy / "ema").names()) == 26 and len(twins) == 16, "two widths at 8 positions, the twins for the old"
    assert torch.equal(flat(average(copy, 256, 0.12)), before)
    gone = next(name for name in checkpoints.read(copy / checkpoints.folder_name(256)).snapshots if "0128-" in name)
    Path((copy / "ema").path(gone)).unlink()
    with pytest.raises(DamagedError, match=gone):
        average(copy, 256, 0.12)


def test_very_narrow_widths_have_names_too(tmp_path: Path) -> None:
    run, config = Folder(str(tmp_path)), replace(CONFIG, ema=EMAConfig(power_stds=(0.00005, 0.1)))
    state = tiny_state(config)
    state.position = 32
    names = snapshots.keep(run, state.ema.power, state.position)
    assert flat(snapshots.average(run, names, 32, 0.05)).isfinite().all()
