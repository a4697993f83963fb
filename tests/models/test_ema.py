"""The averages against weighted sums, written out."""

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.ema import EMA, WIDEST, EMAConfig, gamma_of
from models.noise import normal

TRACKED = (0.05, 0.10)


def model(value=0.0):
    made = nn.Linear(2, 3).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(value)
    return made


def shadow(ema):
    [value] = {float(value) for tensor in ema.shadow.values() for value in tensor.flatten()}
    return value


def remaining_share(config, batches, images_seen):
    """What is left in the average of weights that were 1, after batches of weights that are 0."""
    net = model(1.0)
    ema = EMA(net, config)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    for batch in batches:
        images_seen += batch
        ema.update(net, images_seen, batch)
    return shadow(ema)


def test_the_average_is_the_weighted_sum_of_all_weights_so_far():
    config = EMAConfig(half_life_images=700, warm_up=0.4)
    values, batches = [2.0, -1.0, 0.5, 4.0, 3.0, -2.5], [100, 300, 50, 2000, 100]
    net = model(values[0])
    ema = EMA(net, config)
    seen, keep = 0, []
    for value, batch in zip(values[1:], batches, strict=True):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(value)
        seen += batch
        ema.update(net, seen, batch)
        keep.append(2 ** (-batch / min(700, 0.4 * seen)))
    expected = values[0] * math.prod(keep)
    for i, value in enumerate(values[1:]):
        expected += value * (1 - keep[i]) * math.prod(keep[i + 1 :])
    assert shadow(ema) == pytest.approx(expected, rel=1e-12)


def test_each_parameter_is_averaged_with_itself():
    net = nn.Sequential(nn.Linear(2, 3), nn.GroupNorm(1, 3), nn.Linear(3, 3)).double()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    ema = EMA(net, EMAConfig(half_life_images=100, warm_up=1.0))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3).add_(1)
    ema.update(net, images_seen=1000, batch_images=100)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(ema.shadow[name], (before[name] + parameter.detach()) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch", [1, 50, 1000])
def test_after_a_half_life_half_is_left(batch):
    config = EMAConfig(half_life_images=1000)
    share = remaining_share(config, [batch] * (1000 // batch), images_seen=1_000_000)
    assert share == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize("parts", [[64], [32, 32], [16] * 4, [1] * 64, [63, 1]])
def test_the_size_of_the_batch_does_not_matter_after_the_warm_up(parts):
    config = EMAConfig(half_life_images=500)
    assert remaining_share(config, parts, images_seen=10_000) == pytest.approx(2 ** (-64 / 500), rel=1e-9)


@pytest.mark.parametrize("warm_up", [0.05, 0.5])
def test_while_warming_up_the_average_forgets_by_shares_of_the_run(warm_up):
    # d log(share) = -ln 2 · dn/(warm_up · n): from n images to m the share falls to (n/m)^(ln 2/warm_up).
    config = EMAConfig(half_life_images=1e12, warm_up=warm_up)
    for n in (1000, 3000):
        share = remaining_share(config, [1] * (n // 10), images_seen=n)
        assert share == pytest.approx((1 / 1.1) ** (math.log(2) / warm_up), rel=0.01)


def test_the_first_step_forgets_the_weights_that_were_drawn():
    assert remaining_share(EMAConfig(warm_up=0.05), [32], images_seen=0) == pytest.approx(2**-20, rel=1e-9)


def test_the_shadow_starts_as_a_copy_and_is_not_the_model():
    net = model(1.5)
    ema = EMA(net, EMAConfig())
    assert shadow(ema) == 1.5
    nn.init.zeros_(net.weight)
    assert shadow(ema) == 1.5
    assert not any(tensor.requires_grad for tensor in ema.shadow.values())


def test_the_shadow_keeps_names_shapes_and_dtypes():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1).half())
    ema = EMA(net, EMAConfig())
    assert {n: (s.shape, s.dtype) for n, s in ema.shadow.items()} == {
        n: (p.shape, p.dtype) for n, p in net.named_parameters()
    }


def test_the_distance_of_the_average_is_that_of_all_weights_as_one_vector():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    ema = EMA(model, EMAConfig())
    assert ema.distance(model) == 0
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.1 * (i + 1))
    own = torch.cat([p.detach().flatten() for p in model.parameters()])
    average = torch.cat([value.flatten() for value in ema.shadow.values()])
    assert ema.distance(model) == pytest.approx(float((own - average).norm() / own.norm()), rel=1e-5)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert ema.distance(model) == 0


def test_an_update_leaves_the_model_and_its_gradients_alone():
    net = model(2.0)
    net(torch.ones(1, 2).double()).sum().backward()
    weight, grad = net.weight.detach().clone(), net.weight.grad.clone()
    EMA(net, EMAConfig()).update(net, 100, 10)
    assert torch.equal(net.weight, weight)
    assert torch.equal(net.weight.grad, grad)


def test_the_average_is_applied_within_the_context_only():
    net = model(1.0)
    ema = EMA(net, EMAConfig())
    nn.init.zeros_(net.weight)
    identity = net.weight
    with ema.applied_to(net):
        assert net.weight is identity
        assert torch.equal(net.weight, torch.ones(3, 2).double())
    assert torch.equal(net.weight, torch.zeros(3, 2).double())
    assert torch.equal(net.bias, torch.ones(3).double())
    assert shadow(ema) == 1.0


def test_the_weights_return_after_an_exception():
    net = model(1.0)
    ema = EMA(net, EMAConfig())
    nn.init.zeros_(net.weight)
    with pytest.raises(KeyError, match="sampling failed"), ema.applied_to(net):
        raise KeyError("sampling failed")
    assert torch.equal(net.weight, torch.zeros(3, 2).double())


@pytest.mark.parametrize(("field", "way_out"), [("half_life_images", "try 50000"), ("warm_up", "try 0.1")])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_a_bad_configuration_names_its_field_its_value_and_a_way_out(field, value, way_out):
    with pytest.raises(ValueError, match=rf"fit\.ema\.{field} is {value}; it must be positive: {way_out}"):
        EMAConfig(**{field: value})


def drawn(stream, n, *shape):
    return normal(0, stream, torch.arange(n), shape).double()  # [n, *shape]


class Weights(nn.Module):
    """A vector of weights that goes where it is told."""

    def __init__(self, value):
        super().__init__()
        self.w = nn.Parameter(value.clone())

    def go(self, value):
        self.w.data.copy_(value)


def averages(path, batches, stds):
    """The power averages, by width, after steps of so many images along a path [steps, n] of weights."""
    net = Weights(drawn("first", 1, path.shape[1])[0])
    ema = EMA(net, EMAConfig(power_stds=stds))
    images = 0
    for value, batch in zip(path, batches, strict=True):
        net.go(value)
        images += batch
        ema.update(net, images, batch)
    return {std: ema.power[str(std)]["w"] for std in stds}


@given(std=st.floats(0.01, 0.28))
def test_a_width_gives_the_gamma_that_gives_the_width(std):
    gamma = gamma_of(std)
    assert gamma > 0
    assert math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) == pytest.approx(std, rel=1e-13)


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94), (1e-4, 9997.0), (WIDEST - 1e-9, 0.0)])
def test_known_pairs_of_width_and_gamma(std, gamma):
    assert gamma_of(std) == pytest.approx(gamma, abs=5e-3)


@settings(max_examples=25)
@given(batches=st.lists(st.integers(1, 5000), min_size=1, max_size=20), std=st.floats(0.01, 0.28))
def test_a_power_average_is_the_integral_of_the_weights_under_the_profile(batches, std):
    path = drawn("path", len(batches), 3)
    gamma = gamma_of(std)
    ends = [0, *accumulate(batches)]
    share = torch.tensor([(end / ends[-1]) ** (gamma + 1) for end in ends], dtype=torch.float64).diff()
    average = averages(path, batches, (std, 0.285))[std]
    torch.testing.assert_close(average, share @ path, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("std", [0.05, 0.10, 0.20])
def test_the_profile_has_its_mean_and_its_width(std):
    """The weights of step j are the j-th unit vector, so that the average is the profile itself."""
    n = 1000
    profile = averages(torch.eye(n).double(), [1] * n, (std, 0.285))[std]
    gamma, time = gamma_of(std), torch.arange(n).double() + 0.5
    mean = float(profile @ time)
    assert float(profile.sum()) == pytest.approx(1, rel=1e-12)
    assert mean / n == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-5)
    assert math.sqrt(profile @ (time - mean) ** 2) / n == pytest.approx(std, rel=1e-4)


@pytest.mark.parametrize("parts", [[64], [32, 32], [16] * 4, [1] * 64, [63, 1]])
def test_the_size_of_the_batch_never_matters_to_a_power_average(parts):
    values = drawn("two", 2, 3)
    path = torch.stack([values[0]] + [values[1]] * len(parts))
    one = averages(values, [1000, 64], TRACKED)
    for std, average in averages(path, [1000, *parts], TRACKED).items():
        torch.testing.assert_close(average, one[std], rtol=1e-12, atol=0)


def test_after_the_first_step_a_power_average_is_the_weights_themselves():
    path = drawn("path", 1, 3)
    for average in averages(path, [128], TRACKED).values():
        assert torch.equal(average, path[0])


def test_there_is_one_shadow_for_each_width_and_none_is_another():
    net = nn.Linear(2, 3)
    ema = EMA(net, EMAConfig(power_stds=TRACKED))
    assert list(ema.power) == ["0.05", "0.1"]
    tensors = [*ema.shadow.values(), *ema.power["0.05"].values(), *ema.power["0.1"].values(), *net.parameters()]
    assert len({tensor.data_ptr() for tensor in tensors}) == 8
    assert EMA(net, EMAConfig()).power == {}


def test_the_exponential_average_is_the_same_with_and_without_power_averages():
    net = Weights(drawn("first", 1, 3)[0])
    alone, beside = EMA(net, EMAConfig()), EMA(net, EMAConfig(power_stds=TRACKED))
    net.go(torch.ones(3).double())
    for ema in (alone, beside):
        ema.update(net, 1000, 100)
    assert torch.equal(alone.shadow["w"], beside.shadow["w"])
    assert not torch.equal(beside.shadow["w"], beside.power["0.05"]["w"])


def test_another_average_is_applied_within_the_context_only():
    net = Weights(torch.zeros(2).double())
    ema = EMA(net, EMAConfig())
    with ema.applied_to(net, {"w": torch.tensor([1.0, 2.0])}):
        assert net.w.tolist() == [1, 2]
    assert net.w.tolist() == [0, 0]


@pytest.mark.parametrize("value", [0.0, -0.1, 0.2887, math.nan])
def test_a_width_that_no_profile_has_is_refused(value):
    with pytest.raises(ValueError, match=rf"fit\.ema\.power_stds is {value}; .* above 0 and below 1/√12 .*: try 0\.10"):
        EMAConfig(power_stds=(0.05, value))


@pytest.mark.parametrize("stds", [(0.05,), (0.05, 0.05), (0.05, 0.10, 0.05)])
def test_one_width_alone_is_refused(stds):
    with pytest.raises(ValueError, match=r"fit\.ema\.power_stds is \(0\.05.* that differ: try 0\.05 0\.10, or none"):
        EMAConfig(power_stds=stds)
