"""Averages that are made afterwards, against the tracked ones; and the averages of a sharded network."""

import sys
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.ema import EMA, EMAConfig, coefficients, gamma_of, reconstruct
from models.noise import normal, words
from models.objective import reduced_loss
from models.schedule import article
from tests.processes import side_by_side

TRACKED = (0.05, 0.10)
WANTED = (0.04, 0.07, 0.15, 0.20)


def drawn(stream, n, *shape):
    return normal(0, stream, torch.arange(n), shape).double()  # [n, *shape]


def profile_of(time, images, std):
    """p at each time, [m]."""
    gamma = gamma_of(std)
    return np.where(time <= images, (gamma + 1) * (time / images) ** gamma / images, 0.0)


def by_quadrature(snapshots, images, std):
    """The wanted profile [m] and the snapshots' [m, n] at the nodes of Gauss, times the roots of their weights."""
    ends = np.unique([0, images, *(at for at, _ in snapshots)])
    nodes, weight = np.polynomial.legendre.leggauss(20)
    middle, half = (ends[1:] + ends[:-1])[:, None] / 2, np.diff(ends)[:, None] / 2
    time, root = (middle + half * nodes).ravel(), np.sqrt(half * weight).ravel()
    stored = [profile_of(time, *snapshot) * root for snapshot in snapshots]
    return profile_of(time, images, std) * root, np.stack(stored, axis=1)


@settings(max_examples=40)
@given(
    times=st.lists(st.integers(1, 20), min_size=1, max_size=6, unique=True),
    stds=st.lists(st.sampled_from([0.03, 0.05, 0.10, 0.20]), min_size=2, max_size=3, unique=True),
    share=st.floats(0.05, 1),
    std=st.floats(0.01, 0.28),
)
def test_the_coefficients_are_the_best_of_sum_one(times, stds, share, std):
    snapshots = [(1000 * time, width) for time in times for width in stds]
    images = max(1, round(share * 1000 * max(times)))
    c = coefficients(snapshots, images, std)
    wanted, stored = by_quadrature(snapshots, images, std)
    rest = stored[:, 1:] - stored[:, :1]
    least = rest @ np.linalg.lstsq(rest, wanted - stored[:, 0], rcond=1e-9)[0] + stored[:, 0] - wanted
    assert float(c.sum()) == pytest.approx(1, abs=1e-9)
    assert np.linalg.norm(stored @ c.numpy() - wanted) <= np.linalg.norm(least) + 1e-6 * np.linalg.norm(wanted)


def run_of_a_walk(steps):
    yield from drawn("walk", steps, 64).cumsum(0)


def run_of_a_training(steps):
    """A small ε_θ learns the four corners of a square, whose weights are yielded after each step."""
    net = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 2)).double()
    for i, p in enumerate(net.parameters()):
        p.data = drawn(f"weights {i}", 1, *p.shape)[0] / 2
    schedule, optimizer = article(), torch.optim.AdamW(net.parameters(), lr=5e-3)

    def eps_theta(x_t, t):
        return net(torch.cat([x_t.flatten(1), t[:, None] / 1000], dim=1)).reshape_as(x_t)

    for step in range(steps):
        position = torch.arange(16) + 16 * step
        draw = words(0, "corners and t", position, step=0, blocks=1)
        x_0 = torch.cat([draw[0] % 2, draw[1] % 2], dim=1).double().reshape(16, 2, 1, 1) * 2 - 1
        eps = normal(0, "eps", position, (2, 1, 1)).double()
        reduced_loss(eps_theta, x_0, draw[2][:, 0] % 1000 + 1, eps, schedule).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield nn.utils.parameters_to_vector(net.parameters()).detach()


STEPS, B = 512, 16
RUNS = {"walk": run_of_a_walk, "training": run_of_a_training}


@pytest.fixture(scope="module")
def tracked():
    """By run: the averages of every width after every fourth step, by images and width."""
    return {name: track(list(run(STEPS))) for name, run in RUNS.items()}


def track(path):
    stds = (*TRACKED, *WANTED)
    net = nn.ParameterDict({"w": torch.zeros_like(path[0])})
    ema, found = EMA(net, EMAConfig(power_stds=stds)), {}
    for step, value in enumerate(path, start=1):
        net["w"].data.copy_(value)
        ema.update(net, B * step, B)
        if step % 4 == 0:
            found |= {(B * step, std): ema.power[str(std)]["w"].clone() for std in stds}
    return found


def snapshots_at(*times):
    """Both widths at each of these 64ths of the run."""
    return [(B * STEPS * time // 64, width) for time in times for width in TRACKED]


def evenly(count):
    return snapshots_at(*range(64 // count, 65, 64 // count))


def error(tracked, snapshots, images, std):
    """How far the average made of these snapshots is from the tracked one, relative to it."""
    made = reconstruct(({"w": tracked[snapshot]} for snapshot in snapshots), coefficients(snapshots, images, std))
    wanted = tracked[images, std]
    return float((made["w"] - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("images", [B * STEPS, B * STEPS * 5 // 8, B * STEPS // 2])
@pytest.mark.parametrize(("std", "bound"), [(0.04, 1e-4), (0.07, 3e-5), (0.15, 8e-5), (0.20, 1e-3)])
def test_a_width_that_was_not_tracked_is_made_from_two_that_were(tracked, run, images, std, bound):
    """Measured from 64 snapshots, the worst of the six: 4e-5, 1e-5, 3e-5 and 4e-4. Twice as many: 8 times better."""
    errors = [error(tracked[run], evenly(count), images, std) for count in (8, 16, 32, 64)]
    assert errors[-1] < bound
    assert all(later < earlier / 3 for earlier, later in pairwise(errors))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("std", [0.04, 0.07, 0.10, 0.15, 0.20])
def test_between_two_snapshots_the_average_is_near(tracked, run, std):
    """Half way between two: measured 3e-3 at worst from 64 snapshots, 8e-2 from 8."""
    images = B * STEPS // 2 + B * STEPS // 128
    few, many = (error(tracked[run], evenly(count), images, std) for count in (8, 64))
    assert many < min(7e-3, few / 10)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("count", [1, 8, 64])
def test_a_tracked_average_is_made_from_itself(tracked, run, count):
    for std in TRACKED:
        assert error(tracked[run], evenly(count), B * STEPS, std) < 1e-10
        assert count == 1 or error(tracked[run], evenly(count), B * STEPS // 2, std) < 1e-10


def test_snapshots_that_came_later_help_between_two(tracked):
    images = B * STEPS // 2 + B * STEPS // 128
    last_only = [*evenly(64)[:64], *snapshots_at(64)]
    assert error(tracked["walk"], last_only, images, 0.07) > 5 * error(tracked["walk"], evenly(64), images, 0.07)


@pytest.mark.parametrize(
    ("count", "stds", "bound"),
    [(256, (0.05, 0.10), 3e-5), (64, (0.04, 0.05, 0.07, 0.10, 0.20), 1e-6), (64, (0.05, 0.05, 0.10), 4e-4)],
)
def test_many_and_nearly_equal_snapshots_are_no_danger(count, stds, bound):
    """Condition 5e7, 2e17 and infinite. Rounding of the stored weights is multiplied by Σ |c|, measured 1.6 at most."""
    snapshots = [(1000 * (i + 1), width) for i in range(count) for width in stds]
    c = coefficients(snapshots, 1000 * count, 0.08)
    wanted, stored = by_quadrature(snapshots, 1000 * count, 0.08)
    assert np.linalg.norm(stored @ c.numpy() - wanted) < bound * np.linalg.norm(wanted)
    assert float(c.abs().sum()) < 3


def test_the_order_of_the_snapshots_does_not_matter():
    snapshots = [(1000 * (i + 1), width) for i in range(8) for width in TRACKED]
    c = coefficients(snapshots, 7000, 0.15)
    torch.testing.assert_close(coefficients(snapshots[::-1], 7000, 0.15), c.flip(0), rtol=0, atol=1e-10)


def test_the_sum_is_in_float64_and_the_result_as_stored():
    stored = [{"a": drawn("a", 40, 6)[i].float(), "b": drawn("b", 40, 2)[i].bfloat16()} for i in range(40)]
    shares = 1e4 * drawn("shares", 40)
    made = reconstruct(stored, shares)
    for name, value in made.items():
        wanted = torch.stack([snapshot[name].double() for snapshot in stored]).mul(shares[:, None]).sum(0)
        assert torch.equal(value, wanted.to(stored[0][name].dtype))


def test_one_snapshot_is_held_at_a_time():
    alive = []

    def read(i):
        assert not any(ref() is not None for ref in alive)
        value = torch.full((4,), float(i))
        alive.append(weakref.ref(value))
        return {"w": value}

    made = reconstruct((read(i) for i in range(5)), torch.full((5,), 0.2))
    assert made["w"].tolist() == pytest.approx([2.0] * 4)
    assert len(alive) == 5


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([["a"]], r"1 of the 2 snapshots are missing; give all"),
        ([["a"]] * 3, r"more than 2 snapshots; give just those"),
        ([["a"], ["a", "b"]], r"not of one network: 'b' is in some"),
        ([["a", "b"], ["a"]], r"not of one network: 'b' is in some"),
    ],
)
def test_snapshots_that_do_not_fit_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        reconstruct([{name: torch.ones(1) for name in some} for some in names], torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize(
    ("snapshots", "images", "std", "message"),
    [
        (
            [(10, 0.05), (20, 0.05)],
            10,
            0.1,
            r"2 snapshots of less than two widths; .* fit\.ema\.power_stds 0\.05 0\.10",
        ),
        ([], 10, 0.1, r"0 snapshots of less than two widths"),
        ([(10, 0.05), (20, 0.1)], 21, 0.1, r"images is 21; .* up to the last snapshot: try 20"),
        ([(10, 0.05), (20, 0.1)], 0, 0.1, r"images is 0; .* try 20"),
        ([(0, 0.05), (20, 0.1)], 10, 0.1, r"a snapshot is of 0 images; .* leave it out"),
        ([(10, 0.05), (20, 0.1)], 10, 0.3, r"std is 0\.3; .* below 1/√12 = 0\.2887.*: try 0\.10"),
        ([(10, 0.05), (20, 0.4)], 10, 0.1, r"std is 0\.4"),
    ],
)
def test_an_average_that_cannot_be_made_says_why(snapshots, images, std, message):
    with pytest.raises(ValueError, match=message):
        coefficients(snapshots, images, std)


def train_a_little(net):
    """A few steps of gradient descent, the same on every rank, and the averages after them."""
    ema = EMA(net, EMAConfig(power_stds=TRACKED))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(5):
        net(drawn("x", 4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(net, 16 * (step + 1), 16)
    return {"exponential": ema.shadow, **ema.power, "made": reconstruct(ema.power.values(), torch.tensor([0.25, 0.75]))}


def small_network():
    net = nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 3)).double()
    for i, p in enumerate(net.parameters()):
        p.data = drawn(f"weights {i}", 1, *p.shape)[0]
    return net


def worker(folder, rank):
    """One of two ranks that share the network by FSDP2."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", world_size=2, rank=rank)
    net = small_network()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    averages = train_a_little(net)
    for average in averages.values():
        for (name, p), (key, value) in zip(net.named_parameters(), average.items(), strict=True):
            assert (name, type(p), p.placements, p.shape) == (key, type(value), value.placements, value.shape)
            assert p.to_local().shape == value.to_local().shape != value.shape
    whole = {kind: {name: value.full_tensor() for name, value in a.items()} for kind, a in averages.items()}
    torch.save(whole, Path(folder) / f"rank-{rank}.pt")
    dist.destroy_process_group()


def test_the_averages_of_a_sharded_network_are_sharded_and_the_same(tmp_path):
    program = f"from tests.models.{Path(__file__).stem} import worker; worker({str(tmp_path)!r}, "
    assert side_by_side([sys.executable, "-W", "error", "-c", f"{program}{rank})"] for rank in range(2)) == [0, 0]
    alone = train_a_little(small_network())
    for rank in range(2):
        together = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        for kind, average in alone.items():
            for name, value in average.items():
                assert torch.equal(together[kind][name], value), (kind, name)
