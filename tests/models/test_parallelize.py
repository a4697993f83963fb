"""Each way of spreading a model trains the same model. Run as a program, this file is one of two workers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from models.dit import DiT, DiTConfig
from models.ema import EMA, EMAConfig
from models.noise import normal
from models.parallelize import parallelize
from models.unet import UNet, UNetConfig

WORKERS, CPU = 2, torch.device("cpu")
NETWORKS = {
    "unet": lambda: UNet(UNetConfig(channels=8, multipliers=(1, 2), blocks=1, groups=4), 3, 8, classes=3),
    "dit": lambda: DiT(DiTConfig(depth=2, width=16, heads=2), 3, 8, classes=3),
}


def network(kind):
    """A network of float64 whose every weight is away from zero, its convolutions channels last as in a run."""
    net = NETWORKS[kind]().double()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(0.3 * normal(0, name, torch.tensor([0]), tuple(p.shape))[0])
    return net.to(memory_format=torch.channels_last)


def loss_and_gradients(net, rank=0, workers=1):
    """Go forward and back on a worker's share of eight images."""
    share = torch.arange(8).chunk(workers)[rank]
    x = normal(0, "x", share, (3, 8, 8)).double().to(memory_format=torch.channels_last)
    loss = net(x, 1 + 100 * share, share % 4 - 1).square().mean()
    loss.backward()
    return loss.detach(), {name.removeprefix("module."): p.grad for name, p in net.named_parameters()}


@torch.no_grad()
def predictions(net):
    """Predict with the weights, with others in their place, and with the weights again."""
    ema, x, t = EMA(net, EMAConfig()), normal(0, "x", torch.arange(2), (3, 8, 8)).double(), torch.tensor([1, 500])
    torch._foreach_mul_(list(ema.shadow.values()), 0.5)
    first = net(x, t)
    with ema.applied_to(net):
        averaged = net(x, t)
    return torch.stack([first, averaged, net(x, t)])


def take_part(folder, rank):
    """Be one of two workers, and save what a parallel model has computed there, gathered, and which part it holds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", world_size=WORKERS, rank=rank)
    found = {}
    meshes = {"ddp": None, "fsdp": None, "fsdp-mesh": init_device_mesh("cpu", (WORKERS,))}
    for kind in NETWORKS:
        for case, mesh in meshes.items():
            net = parallelize(network(kind), case.partition("-")[0], CPU, mesh)
            loss, gradients = loss_and_gradients(net, rank, WORKERS)
            dist.all_reduce(loss)
            found[kind, case] = {
                "loss": loss / WORKERS,
                "gradients": {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()},
                "sharded": [name for name, module in net.named_modules() if isinstance(module, FSDPModule)],
                "parts": {n: p.to_local().detach() for n, p in net.named_parameters() if isinstance(p, DTensor)},
                "predictions": predictions(net),
            }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """What each of two real processes has found, with gloo between them."""
    folder, root = tmp_path_factory.mktemp("workers"), Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-m", "tests.models.test_parallelize", str(folder)]
    started = [subprocess.Popen([*command, str(rank)], cwd=root) for rank in range(WORKERS)]
    assert [worker.wait(timeout=120) for worker in started] == [0] * WORKERS
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORKERS)]


@pytest.mark.parametrize("case", ["ddp", "fsdp", "fsdp-mesh"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_two_workers_compute_the_loss_and_the_gradients_of_one(kind, case, workers):
    """In float64, so that only the order of sums differs."""
    loss, gradients = loss_and_gradients(network(kind))
    assert all(g.abs().max() > 1e-6 for g in gradients.values())
    for found in workers:
        torch.testing.assert_close(found[kind, case]["loss"], loss, rtol=1e-10, atol=0)
        assert found[kind, case]["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = (found[kind, case]["gradients"][name] - gradient).abs().max()
            assert error <= 1e-10 * max(1, gradient.abs().max()), name


@pytest.mark.parametrize("case", ["fsdp", "fsdp-mesh"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_each_worker_holds_its_part_of_every_parameter(kind, case, workers):
    parts = [found[kind, case]["parts"] for found in workers]
    for name, whole in network(kind).named_parameters():
        assert torch.equal(torch.cat([part[name] for part in parts]), whole), name
        assert all(len(part[name]) <= -(-len(whole) // WORKERS) for part in parts), name


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_blocks_are_sharded_one_by_one_and_the_root_takes_the_rest(kind, workers):
    net = network(kind)
    names = {module: name for name, module in net.named_modules()}
    assert set(workers[0][kind, "fsdp"]["sharded"]) == {"", *(names[block] for block in net.blocks())}
    assert workers[0][kind, "ddp"]["sharded"] == []


@pytest.mark.parametrize("case", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_average_takes_the_place_of_the_weights_and_they_come_back(kind, case, workers):
    first, averaged, again = expected = predictions(network(kind))
    assert torch.equal(first, again) and (first - averaged).abs().max() > 1e-2
    for found in workers:
        torch.testing.assert_close(found[kind, case]["predictions"], expected, rtol=1e-10, atol=1e-10)


def test_one_worker_trains_the_model_itself():
    net = nn.Linear(2, 2)
    assert parallelize(net, "single", CPU) is net


def test_an_unknown_strategy_is_named():
    with pytest.raises(ValueError, match="strategy is 'pipeline'; it must be 'single', 'ddp' or 'fsdp'"):
        parallelize(nn.Linear(2, 2), "pipeline", CPU)


if __name__ == "__main__":
    take_part(Path(sys.argv[1]), int(sys.argv[2]))
