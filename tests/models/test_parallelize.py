"""Each way of spreading a model trains the same model. Run as a program, this file is one of several workers."""

import functools
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from models.dit import DiT, DiTConfig
from models.ema import EMA, EMAConfig
from models.init import initialize
from models.noise import normal
from models.parallelize import ParallelConfig, accumulating, clip_gradient, construct
from models.unet import UNet, UNetConfig
from tests.processes import side_by_side

CPU, SEED, BATCH, STEPS, LONGEST = torch.device("cpu"), 3, 8, 3, 0.1
# What becomes of a graph needs a C++ compiler, which not every machine has; what becomes a graph does not.
GRAPHS_ONLY = functools.partial(torch.compile, backend="aot_eager")
COMPILERS_OWN_WARNING = "The .grad attribute of a Tensor that is not a leaf"
NETWORKS = {
    "unet": lambda: UNet(UNetConfig(channels=8, multipliers=(1, 2), blocks=1, groups=4), 3, 8, classes=3),
    "dit": lambda: DiT(DiTConfig(depth=2, width=16, heads=2), 3, 8, classes=3),
}
WAYS = {
    "ddp": ParallelConfig(),
    "fsdp": ParallelConfig(strategy="fsdp"),
    "hybrid": ParallelConfig(strategy="hybrid", shards=2),
    "ddp, checkpointed": ParallelConfig(checkpoint_activations=True),
    "fsdp, checkpointed": ParallelConfig(strategy="fsdp", checkpoint_activations=True),
    "hybrid, checkpointed": ParallelConfig(strategy="hybrid", shards=2, checkpoint_activations=True),
    "ddp, compiled": ParallelConfig(compile=True),
    "fsdp, compiled": ParallelConfig(strategy="fsdp", checkpoint_activations=True, compile=True),
    "ddp, bfloat16": ParallelConfig(precision="bfloat16"),
    "fsdp, bfloat16": ParallelConfig(strategy="fsdp", precision="bfloat16"),
    "hybrid, bfloat16": ParallelConfig(strategy="hybrid", shards=2, precision="bfloat16", checkpoint_activations=True),
}
# Workers, network, way, micro-batches of each worker and step.
TRAINED = [
    *[(2, "dit", f"{way}{more}", micro) for way in ("ddp", "fsdp")
      for more, micro in (("", 1), ("", 2), (", checkpointed", 1), (", compiled", 2))],
    *[(2, "unet", way, micro) for way, micro in (("ddp", 2), ("fsdp, checkpointed", 2))],
    *[(4, "dit", f"{way}{more}", micro) for way in ("ddp", "fsdp", "hybrid")
      for more, micro in (("", 1), ("", 2), (", checkpointed", 2))],
    *[(4, "unet", way, micro) for way, micro in (("fsdp", 1), ("hybrid, checkpointed", 2))],
]  # fmt: skip
LOWERED = [
    *[(2, kind, f"{way}, bfloat16", 2) for kind in NETWORKS for way in ("ddp", "fsdp")],
    (4, "dit", "hybrid, bfloat16", 2),
]


def network(kind, dtype=torch.float64):
    """A network of which no layer starts at zero, so that every gradient is there from the first step on."""
    net = NETWORKS[kind]().to(dtype)
    for module in net.modules():
        module.starts_at_zero = False
    return net


def without_memory(kind, dtype):
    """The same, for `construct`, which must not let it have any memory."""
    net = network(kind, dtype)
    assert all(p.is_meta for p in net.parameters())
    return net


def loss_of(net, share, dtype):
    """The mean over some of the images 0, 1, 2, …"""
    x = normal(0, "x", share, (3, 8, 8)).to(dtype, memory_format=torch.channels_last)
    return net(x, 1 + 100 * (share % 8), share % 4 - 1).square().mean()


def alone(kind, dtype=torch.float64, steps=STEPS):
    """What each way must come to: one worker, whole batches, no help from anyone."""
    net, losses, norms, gradients = network(kind, dtype), [], [], {}
    initialize(net, SEED)
    optimizer, ema = torch.optim.AdamW(net.parameters(), lr=1e-2), EMA(net, EMAConfig(half_life_images=10))
    for step in range(steps):
        loss = loss_of(net, torch.arange(step * BATCH, (step + 1) * BATCH), dtype)
        loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in net.named_parameters()}
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in net.parameters()))
        for p in net.parameters():
            p.grad *= min(1, LONGEST / (norm + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
        ema.update(net, (step + 1) * BATCH, BATCH)
        losses.append(float(loss.detach()))
        norms.append(norm)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights, "ema": ema.shadow,
            "predictions": predictions(net, ema)}  # fmt: skip


@torch.no_grad()
def predictions(net, ema):
    """Predict with the weights, with their average in their place, and with the weights again."""
    x, t = normal(0, "x", torch.arange(2), (3, 8, 8)).to(next(net.parameters()).dtype), torch.tensor([1, 500])
    first = net(x, t)
    with ema.applied_to(net):
        averaged = net(x, t)
    return torch.stack([first, averaged, net(x, t)])


def part(tensor):
    """What this worker holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def parts(tensors):
    return {name: part(tensor).detach().clone() for name, tensor in tensors.items()}


def held(tensors):
    """Bytes of this worker's memory behind tensors."""
    storages = [part(tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def together(kind, config, micro, rank=0, workers=1, dtype=torch.float64, steps=STEPS):
    """Train as one of some workers, in some micro-batches a step. Told are this worker's parts of what is sharded."""
    net, parallel = construct(lambda: without_memory(kind, dtype), SEED, config, CPU)
    first = parts(dict(net.named_parameters()))
    optimizer, ema = torch.optim.AdamW(net.parameters(), lr=1e-2), EMA(net, EMAConfig(half_life_images=10))
    losses, norms, gradients, dtypes = [], [], {}, set()
    for step in range(steps):
        share = torch.arange(step * BATCH, (step + 1) * BATCH).chunk(workers)[rank]
        mean = torch.zeros((), dtype=torch.float64)
        for i, images in enumerate(share.chunk(micro)):
            with accumulating(parallel, last=i == micro - 1):
                loss = loss_of(parallel, images, dtype) / micro
                loss.backward()
            mean = mean + loss.detach() / workers
        if workers > 1:
            dist.all_reduce(mean)
        gradients = gradients or parts({name: p.grad for name, p in net.named_parameters()})
        dtypes |= {str(p.grad.dtype) for p in net.parameters()}
        norms.append(float(clip_gradient(net, LONGEST)))
        losses.append(float(mean))
        bytes_of_gradients = held([p.grad for p in net.parameters()])
        optimizer.step()
        optimizer.zero_grad()
        ema.update(net, (step + 1) * BATCH, BATCH)
    moments = [v for state in optimizer.state.values() for key, v in state.items() if key != "step"]
    dtypes |= {str(v.dtype) for v in (*net.parameters(), *moments, *ema.shadow.values())}
    found = {
        "losses": losses,
        "norms": norms,
        "gradients": gradients,
        "weights": parts(dict(net.named_parameters())),
        "ema": parts(ema.shadow),
        "predictions": predictions(net, ema),
        "first": first,
        "held": {
            "weights": held(net.parameters()),
            "gradients": bytes_of_gradients,
            "a moment": held(moments) / 2,
            "the average": held(ema.shadow.values()),
        },
        "dtypes": sorted(dtypes),
        "sharded": [name for name, module in net.named_modules() if isinstance(module, FSDPModule)],
    }
    # Last, since nothing can be done with it then: an image of the last worker is not finite.
    bad = torch.full((1, 3, 8, 8), math.inf if rank == workers - 1 else 1.0, dtype=dtype)
    parallel(bad, torch.ones(1, dtype=torch.long)).mean().backward()
    return {**found, "norm of something infinite": float(clip_gradient(net, LONGEST))}


def take_part(folder, rank, workers):
    """Be one of some workers, and save what was found there."""
    torch.set_num_threads(1)
    torch.compile = GRAPHS_ONLY
    warnings.filterwarnings("ignore", COMPILERS_OWN_WARNING)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", world_size=workers, rank=rank)
    found = {}
    for case in [case for case in TRAINED if case[0] == workers]:
        found[case] = together(case[1], WAYS[case[2]], case[3], rank, workers)
    for case in [case for case in LOWERED if case[0] == workers]:
        found[case] = together(case[1], WAYS[case[2]], case[3], rank, workers, torch.float32, steps=1)
    try:
        construct(NETWORKS["dit"], SEED, ParallelConfig(strategy="hybrid", shards=3), CPU)
    except ValueError as error:
        found["refused"] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """What each of two and of four real processes has found, with gloo between them: rank by rank, by their number."""
    folders = {size: tmp_path_factory.mktemp("workers") for size in (2, 4)}
    command = [sys.executable, "-W", "error", "-m", "tests.models.test_parallelize"]
    each = [(size, rank) for size in folders for rank in range(size)]
    assert side_by_side([*command, folders[size], rank, size] for size, rank in each) == [0] * len(each)
    return {
        size: [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]
        for size, folder in folders.items()
    }


@pytest.fixture(scope="module")
def one():
    """What one worker comes to, by network."""
    return {kind: alone(kind) for kind in NETWORKS}


def copies(found, shares):
    """What workers found, each `shares` of them together: a whole model's worth."""
    for start in range(0, len(found), shares):
        group = found[start : start + shares]
        kinds = ("first", "gradients", "weights", "ema")
        joined = {of: {name: torch.cat([one[of][name] for one in group]) for name in group[0][of]} for of in kinds}
        yield from ({**one, **joined} for one in group)


def found_by(workers, case):
    size, _, way, _ = case
    return list(copies([worker[case] for worker in workers[size]], WAYS[way].shares(size)))


def assert_near(found, expected, of):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-10 * max(1, value.abs().max()), (of, name)


def assert_the_same_run(found, expected):
    """In float64, so that only the order of sums differs."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-10)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-10)
    for of in ("gradients", "weights", "ema"):
        assert_near(found[of], expected[of], of)
    torch.testing.assert_close(found["predictions"], expected["predictions"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_workers_train_the_model_of_one(case, workers, one):
    all_found = found_by(workers, case)
    for found in all_found:
        assert_the_same_run(found, one[case[1]])
        assert found["norms"] == all_found[0]["norms"]  # to the last bit


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("way", ["ddp", "ddp, checkpointed", "hybrid"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_one_worker_trains_the_same_whatever_it_is_told(kind, way, micro, one):
    assert_the_same_run(together(kind, WAYS[way], micro), one[kind])


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_compared_is_worth_comparing(kind, one):
    assert all(g.abs().max() > 1e-6 for g in one[kind]["gradients"].values())
    assert all(norm > 2 * LONGEST for norm in one[kind]["norms"])
    first, averaged, again = one[kind]["predictions"]
    assert torch.equal(first, again) and (first - averaged).abs().max() > 1e-3


@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_each_worker_begins_with_its_part_of_the_weights_of_one(case, workers):
    """To the last bit, and without memory for the rest."""
    size, kind, way, _ = case
    net, shares = network(kind), {"ddp": 1, "fsdp": size, "hybrid": 2}[WAYS[way].strategy]
    initialize(net, SEED)
    bytes_of_a_part = sum(8 * -(-len(p) // shares) * p[0].numel() for p in net.parameters())
    for found in found_by(workers, case):
        assert all(torch.equal(found["first"][name], p) for name, p in net.named_parameters())
        for kind_of_tensor, size_of_it in found["held"].items():
            assert size_of_it <= 1.01 * bytes_of_a_part, kind_of_tensor


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_blocks_are_sharded_one_by_one_and_the_root_takes_the_rest(kind, workers):
    net = network(kind)
    names = {module: name for name, module in net.named_modules()}
    assert set(workers[4][0][4, kind, "fsdp", 1]["sharded"]) == {"", *(names[block] for block in net.blocks())}
    assert workers[2][0][2, kind, "ddp", 2]["sharded"] == []


@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_a_gradient_that_is_not_finite_is_seen_by_all(case, workers):
    assert not any(math.isfinite(found[case]["norm of something infinite"]) for found in workers[case[0]])


def assert_lowered(found, kind):
    """bfloat16 rounds to within 2⁻⁸. A value is rounded some 16 times on its way, and 32 times there and back, at
    random: within 2⁻⁸ √32 = 2.2 % of the whole, of which twice is allowed. Less than 10⁻⁴ would be float32."""
    expected = alone(kind, torch.float32, steps=1)
    assert found["dtypes"] == ["torch.float32"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=0.045)
    error, size = [
        math.sqrt(sum(float((g - off * found["gradients"][name]).square().sum()) for name, g in grads.items()))
        for grads, off in ((expected["gradients"], 1), (expected["gradients"], 0))
    ]
    assert 1e-4 < error / size < 0.045


@pytest.mark.parametrize("case", LOWERED, ids=str)
def test_workers_compute_in_bfloat16_and_keep_float32(case, workers):
    for found in found_by(workers, case):
        assert_lowered(found, case[1])


@pytest.mark.parametrize("kind", NETWORKS)
def test_one_worker_computes_in_bfloat16_and_keeps_float32(kind):
    assert_lowered(together(kind, WAYS["ddp, bfloat16"], 2, dtype=torch.float32, steps=1), kind)


@torch._dynamo.config.patch(recompile_limit=8)
@pytest.mark.filterwarnings(f"ignore:{COMPILERS_OWN_WARNING}")
@pytest.mark.parametrize(("kind", "graphs"), [("unet", 7), ("dit", 1)])
def test_each_kind_of_block_is_compiled_once_as_one_graph(kind, graphs, one, monkeypatch):
    """Without a break, which would be an error; all blocks of a transformer are alike. And once more for samples."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    net, _ = construct(lambda: network(kind), SEED, ParallelConfig(compile=True), CPU)
    for _ in range(2):
        loss = loss_of(net, torch.arange(BATCH), torch.float64)
        loss.backward()
    assert float(loss.detach()) == pytest.approx(one[kind]["losses"][0], rel=1e-10)
    assert counters["stats"]["unique_graphs"] == graphs
    with torch.no_grad():
        loss_of(net, torch.arange(3), torch.float64)
    assert counters["stats"]["unique_graphs"] == 2 * graphs


@pytest.mark.parametrize("kind", NETWORKS)
def test_no_setting_changes_the_names_of_the_parameters(kind):
    everything = ParallelConfig(precision="bfloat16", checkpoint_activations=True, compile=True)
    net, _ = construct(NETWORKS[kind], SEED, everything, CPU)
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in NETWORKS[kind]().named_parameters()]
    assert net.state_dict().keys() == NETWORKS[kind]().state_dict().keys()


@pytest.mark.parametrize(("kind", "inside"), [("unet", "middle.attention"), ("dit", "stack.1.attention")])
@pytest.mark.parametrize("config", [ParallelConfig(), ParallelConfig(checkpoint_activations=True)])
def test_activation_checkpointing_computes_a_block_again(kind, inside, config):
    net, _ = construct(lambda: network(kind), SEED, config, CPU)
    calls = []
    net.get_submodule(inside).register_forward_hook(lambda *_: calls.append(1))
    loss = loss_of(net, torch.arange(2), torch.float64)
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 1 + config.checkpoint_activations


def test_one_worker_has_the_model_itself_with_its_convolutions_channels_last():
    net, parallel = construct(lambda: network("unet"), SEED, ParallelConfig(strategy="fsdp"), CPU)
    assert parallel is net
    assert net.middle.residual_in.conv_1.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_short_gradient_stays_as_it_is_and_its_norm_is_told():
    layer = nn.Linear(2, 1)
    layer.weight.grad, layer.bias.grad = torch.tensor([[2.0, 3.0]]), torch.tensor([6.0])
    assert float(clip_gradient(layer, 7.5)) == 7
    assert layer.weight.grad.tolist() == [[2, 3]]
    assert float(clip_gradient(layer, 3.5)) == 7
    assert layer.weight.grad[0].tolist() == pytest.approx([1, 1.5])
    assert layer.bias.grad.tolist() == pytest.approx([3])


def test_workers_that_cannot_share_are_refused_by_all_with_every_factor(workers):
    said = (
        "parallel.shards is 3; scaling.workers = 4 is not a multiple of it: take one of [2, 4] as parallel.shards, "
        "other workers, or parallel.strategy fsdp"
    )
    assert [found["refused"] for found in workers[4]] == [said] * 4


def test_who_shares_a_copy():
    hybrid = ParallelConfig(strategy="hybrid", shards=2)
    assert [hybrid.shares(workers) for workers in (1, 2, 4, 6)] == [1, 2, 2, 2]
    assert [ParallelConfig(strategy="fsdp").shares(workers) for workers in (1, 2, 3)] == [1, 2, 3]
    assert [ParallelConfig().shares(workers) for workers in (1, 2, 3)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "pipeline"}, "parallel.strategy is 'pipeline'; it must be one of ddp, fsdp, hybrid"),
        ({"precision": "float16"}, "parallel.precision is 'float16'; it must be one of float32, bfloat16"),
        ({"strategy": "hybrid"}, "parallel.shards is 1 and parallel.strategy hybrid; at least 2 .* try 2, or"),
        ({"strategy": "fsdp", "shards": 2}, "parallel.shards is 2 and parallel.strategy fsdp; only hybrid .* 1, or"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**settings)


if __name__ == "__main__":
    take_part(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
