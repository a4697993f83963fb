"""The first weights are a function of (seed, name): not of the order, the process or the global generator."""

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn

from models.dit import DiT, DiTConfig
from models.init import initialize
from models.unet import UNet, UNetConfig

CONFIG = UNetConfig(channels=8, blocks=1, groups=4)


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def fresh(seed=0):
    net = UNet(CONFIG, 1, 8)
    initialize(net, seed)
    return net


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_seed_gives_the_same_weights_whatever_torch_was_seeded_with():
    torch.manual_seed(1)
    a = fresh(3)
    torch.manual_seed(2)
    b = fresh(3)
    assert_same(weights(a), weights(b))


def test_the_global_generator_stays_where_it_was():
    net = UNet(CONFIG, 1, 8)
    before = torch.get_rng_state()
    initialize(net, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_modules_made_in_another_order_have_the_same_weights():
    def model(names):
        made = nn.Module()
        for name in names:
            made.add_module(name, nn.Linear(6, 5) if name == "b" else nn.Conv2d(3, 4, 3))
        initialize(made, seed=1)
        return weights(made)

    forwards, backwards = model("abc"), model("cba")
    assert list(forwards) != list(backwards)
    assert_same(forwards, backwards)


def test_a_module_has_the_same_weights_whatever_stands_beside_it():
    alone, beside = nn.Module(), nn.Module()
    beside.first = nn.Linear(9, 9)
    for model in (alone, beside):
        model.layer = nn.Linear(6, 5)
        initialize(model, seed=1)
    assert torch.equal(alone.layer.weight, beside.layer.weight)


def test_another_process_draws_the_same_weights():
    program = """
import hashlib
from models.init import initialize
from models.unet import UNet, UNetConfig
net = UNet(UNetConfig(channels=8, blocks=1, groups=4), 1, 8)
initialize(net, 5)
print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in net.parameters())).hexdigest())
"""
    other = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = hashlib.sha256(b"".join(p.numpy().tobytes() for p in weights(fresh(5)).values())).hexdigest()
    assert other.stdout.strip() == here


def test_other_seeds_and_other_names_draw_other_weights():
    drawn = []
    for seed in (0, 1):
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
        initialize(model, seed)
        drawn += [model["a"].weight, model["b"].weight, model["a"].bias, model["b"].bias]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert not torch.isin(a.detach(), b.detach()).any()


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [(nn.Linear(50, 400), 50), (nn.Conv2d(20, 100, 3), 180), (nn.Conv2d(8, 1000, 1), 8), (nn.Linear(1, 2001), 1)],
)
def test_weights_are_uniform_up_to_one_over_the_root_of_the_fan_in(layer, fan_in):
    initialize(layer, seed=2)
    bound = 1 / math.sqrt(fan_in)
    for parameter in layer.parameters():
        values = parameter.detach().double().flatten()
        assert values.abs().max() <= bound
        n = len(values)
        # Var x = b²/3 and Var x² = 4b⁴/45: five standard errors.
        assert abs(float(values.mean())) < 5 * bound / math.sqrt(3 * n)
        assert abs(float(values.square().mean()) - bound**2 / 3) < 5 * bound**2 * math.sqrt(4 / 45 / n)
        assert stats.kstest(values.numpy(), "uniform", args=(-bound, 2 * bound)).pvalue > 1e-3


def test_a_size_that_is_no_multiple_of_four_is_filled_to_its_end():
    layer = nn.Linear(3, 7)
    nn.init.constant_(layer.weight, math.nan)
    nn.init.constant_(layer.bias, math.nan)
    initialize(layer, seed=0)
    assert all(torch.isfinite(p).all() and p.unique().numel() == p.numel() for p in layer.parameters())


def test_normalisations_start_as_the_identity():
    norm = nn.GroupNorm(2, 6)
    nn.init.constant_(norm.weight, 5.0)
    nn.init.constant_(norm.bias, 5.0)
    initialize(norm, seed=0)
    assert torch.equal(norm.weight, torch.ones(6))
    assert torch.equal(norm.bias, torch.zeros(6))


def test_every_parameter_of_the_network_is_filled():
    net = UNet(CONFIG, 1, 8)
    for parameter in net.parameters():
        nn.init.constant_(parameter, math.nan)
    initialize(net, seed=0)
    assert_same(weights(net), weights(fresh(0)))
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_a_network_made_without_memory_gets_the_same_weights():
    with torch.device("meta"):
        net = UNet(CONFIG, 1, 8)
    net.to_empty(device="cpu")
    initialize(net, seed=4)
    assert_same(weights(net), weights(fresh(4)))


def test_normalisations_of_layers_start_as_the_identity_with_a_shift_or_without():
    for norm in (nn.LayerNorm(6), nn.LayerNorm(6, bias=False)):
        for parameter in norm.parameters():
            nn.init.constant_(parameter, 5.0)
        initialize(norm, seed=0)
        x = torch.arange(12.0).view(2, 6)
        assert torch.equal(norm(x), nn.functional.layer_norm(x, (6,)))


def asked_for(layer, first_weights):
    layer.first_weights = first_weights
    return layer


@pytest.mark.parametrize("layer", [nn.Embedding(200, 60), asked_for(nn.Linear(60, 200), "normal")])
def test_embeddings_and_those_who_ask_for_it_start_normal(layer):
    initialize(layer, seed=2)
    values = layer.weight.detach().double().flatten()
    assert stats.kstest(values.numpy(), "norm", args=(0, 0.02)).pvalue > 1e-3
    assert abs(float(values.std()) / 0.02 - 1) < 5 / math.sqrt(2 * len(values))
    assert getattr(layer, "bias", None) is None or torch.equal(layer.bias, torch.zeros(200))


@pytest.mark.parametrize(("layer", "fans"), [(nn.Linear(40, 300), 340), (nn.Conv2d(10, 30, 3), 360)])
def test_those_who_ask_for_xavier_start_uniform_by_both_fans(layer, fans):
    initialize(asked_for(layer, "xavier"), seed=2)
    bound = math.sqrt(6 / fans)
    values = layer.weight.detach().double().flatten()
    assert bound * 0.99 < values.abs().max() <= bound
    assert stats.kstest(values.numpy(), "uniform", args=(-bound, 2 * bound)).pvalue > 1e-3
    assert torch.equal(layer.bias, torch.zeros_like(layer.bias))


def test_other_seeds_and_other_names_draw_other_normals():
    drawn = []
    for seed in (0, 1):
        model = nn.ModuleDict({"a": nn.Embedding(8, 8), "b": nn.Embedding(8, 8)})
        initialize(model, seed)
        drawn += [model["a"].weight, model["b"].weight]
    for i, a in enumerate(drawn):
        assert not any(torch.isin(a.detach(), b.detach()).any() for b in drawn[:i])


def test_a_marker_of_zero_comes_before_any_other():
    layer = asked_for(nn.Linear(3, 4), "xavier")
    layer.starts_at_zero = True
    initialize(layer, seed=0)
    assert not any(parameter.any() for parameter in layer.parameters())


def test_the_first_weights_of_a_layer_stay_what_they_were():
    """Else the same configuration and seed would be another run than last year."""
    model = nn.ModuleDict({"layer": nn.Linear(2, 1)})
    initialize(model, seed=3)
    weight, bias = model["layer"].weight.detach(), model["layer"].bias.detach()
    assert [*weight[0].tolist(), *bias.tolist()] == [-0.05084395408630371, -0.5813745856285095, -0.40917542576789856]


def test_the_transformer_starts_as_in_its_paper():
    with torch.device("meta"):
        net = DiT(DiTConfig(depth=1, width=64, heads=2), image_channels=3, side=8, classes=9)
    net.to_empty(device="cpu")
    initialize(net, seed=0)
    block, spread = net.stack[0], {}
    for name, p in net.named_parameters():
        spread[name] = float(p.detach().double().std())
        assert torch.isfinite(p).all()
    for name in ("modulation", "out", "stack.0.modulation"):
        assert spread[f"{name}.weight"] == 0
    assert all(not p.any() for name, p in net.named_parameters() if name.endswith("bias"))
    for name in ("time.0.weight", "time.2.weight", "label.weight"):
        assert spread[name] == pytest.approx(0.02, rel=0.15)
    for name, layer in {"patches": net.patches, "stack.0.attention.qkv": block.attention.qkv}.items():
        fans = sum(layer.weight.shape)
        assert spread[f"{name}.weight"] == pytest.approx(math.sqrt(2 / fans), rel=0.1)


@pytest.mark.parametrize("kind", [lambda: nn.Bilinear(2, 2, 2), lambda: nn.RNN(2, 2), lambda: nn.Conv1d(1, 1, 1)])
def test_a_module_without_a_rule_is_refused_by_name(kind):
    model = nn.ModuleDict({"known": nn.Linear(2, 2), "stranger": kind()})
    with pytest.raises(TypeError, match=f"stranger, a {type(model['stranger']).__name__}"):
        initialize(model, seed=0)
