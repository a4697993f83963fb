"""The network's shape, its dependence on t, and its indifference to the rest of the batch."""

import pytest
import torch
from torch import nn

from models.init import initialize
from models.noise import normal
from models.unet import ResidualBlock, SelfAttention, Stage, UNet, UNetConfig, sinusoidal

SMALL = UNetConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), heads=2, groups=4)


def awake(config=SMALL, image_channels=1, side=8):
    """A network whose every weight is away from zero, as after some training."""
    net = UNet(config, image_channels, side)
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            noise = normal(0, "weights", torch.tensor([i]), tuple(parameter.shape))[0]
            parameter.copy_(noise * 0.5 / max(1, parameter[0].numel()) ** 0.5 + (parameter.dim() == 1))
    return net.eval()


def pictures(n=3, channels=1, side=8):
    return normal(0, "x", torch.arange(n), (channels, side, side))


@pytest.mark.parametrize(
    ("config", "image_channels", "side"),
    [
        (SMALL, 1, 8),
        (SMALL, 3, 12),
        (UNetConfig(channels=4, multipliers=(1,), groups=2, blocks=2, attention=()), 2, 5),
        (UNetConfig(channels=8, multipliers=(2, 1, 3), blocks=2, attention=(8, 2), heads=4), 3, 8),
    ],
)
def test_the_prediction_has_the_shape_of_the_picture(config, image_channels, side):
    x, t = pictures(2, image_channels, side), torch.tensor([1, 1000])
    prediction = awake(config, image_channels, side)(x, t)
    assert prediction.shape == x.shape
    assert prediction.abs().max() > 0
    assert torch.isfinite(prediction).all()


def test_a_fresh_network_predicts_zero():
    net = UNet(SMALL, 3, 8)
    initialize(net, seed=0)
    assert torch.equal(net(pictures(2, 3), torch.tensor([1, 1000])), torch.zeros(2, 3, 8, 8))


def test_a_fresh_residual_block_is_its_skip_and_a_fresh_attention_the_identity():
    block, attention = ResidualBlock(8, 8, 16, groups=4), SelfAttention(8, heads=2, groups=4)
    for module in (block, attention):
        initialize(module, seed=0)
    x = pictures(2, 8, 4)
    assert torch.equal(block(x, torch.ones(2, 16)), x)
    assert torch.equal(attention(x), x)


def test_the_network_of_the_digits_has_its_known_number_of_parameters():
    assert sum(p.numel() for p in UNet(UNetConfig(blocks=1), 1, 8).parameters()) == 701_345


@pytest.mark.parametrize("blocks", [1, 2])
def test_every_residual_block_depends_on_t(blocks):
    config = UNetConfig(channels=8, multipliers=(1, 2), blocks=blocks, groups=4)
    net = awake(config)
    calls = []
    for module in net.modules():
        if isinstance(module, ResidualBlock):
            module.register_forward_hook(lambda module, inputs, output: calls.append((module, inputs, output)))
    with torch.no_grad():
        net(pictures(2), torch.tensor([3, 700]))
        recorded = list(calls)
        assert len(recorded) == 2 * blocks + 2 + 2 * (blocks + 1)
        for module, (x, time), output in recorded:
            # The same x with the times of the two images exchanged: only t can make the difference.
            assert ((module(x, time.flip(0)) - output).abs().amax((1, 2, 3)) > 1e-3).all()


def test_the_prediction_depends_on_t_alone_when_the_picture_stays():
    net, x = awake(), pictures(1)
    with torch.no_grad():
        predictions = [net(x, torch.tensor([t])) for t in (1, 2, 500, 501, 1000)]
    for i, a in enumerate(predictions):
        for b in predictions[:i]:
            assert not torch.allclose(a, b, atol=1e-4)


def test_no_two_times_share_a_code():
    code = sinusoidal(torch.arange(1001), 32)
    assert code.shape == (1001, 32)
    assert torch.cdist(code, code).fill_diagonal_(1).min() > 1e-2


def test_the_code_of_t_is_sines_and_cosines_of_falling_frequency():
    t, size = torch.tensor([0, 1, 7, 1000]), 6
    angles = torch.tensor([[t * 10_000 ** (-i / 3) for i in range(3)] for t in t.tolist()], dtype=torch.float64)
    expected = torch.cat([angles.sin(), angles.cos()], dim=1)
    torch.testing.assert_close(sinusoidal(t, size).double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("attention", [(), (16,), (8,), (4,), (16, 4)])
def test_attention_stands_exactly_at_the_chosen_sides(attention):
    config = UNetConfig(channels=4, multipliers=(1, 1, 1), blocks=1, attention=attention, groups=2)
    net = UNet(config, 1, 16)
    seen = {True: set(), False: set()}

    def note(module, inputs, output):
        seen[isinstance(module.attention, SelfAttention)].add(output.shape[-1])

    for module in net.modules():
        if isinstance(module, Stage):
            module.register_forward_hook(note)
    net(pictures(1, 1, 16), torch.tensor([1]))
    assert seen == {True: set(attention), False: {16, 8, 4} - set(attention)}
    assert isinstance(net.middle_attention, SelfAttention)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_that_of_torch(heads):
    ours = awake_module(SelfAttention(8, heads, groups=4))
    theirs = nn.MultiheadAttention(8, heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
        x = pictures(2, 8, 3)
        tokens = ours.norm(x).flatten(2).transpose(1, 2)
        mixed, _ = theirs(tokens, tokens, tokens)
        torch.testing.assert_close(ours(x), x + mixed.transpose(1, 2).reshape(x.shape), rtol=1e-5, atol=1e-5)


def awake_module(module):
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(1, "weights", torch.tensor([i]), tuple(parameter.shape))[0])
    return module


@pytest.mark.parametrize("side", [8, 12])
def test_an_image_does_not_see_the_others_in_its_batch(side):
    net = awake(image_channels=3, side=side)
    x, t = pictures(5, 3, side), torch.tensor([1, 30, 500, 999, 1000])
    order = torch.tensor([3, 0, 4, 2, 1])
    with torch.no_grad():
        together = net(x, t)
        torch.testing.assert_close(net(x[order], t[order]), together[order], rtol=1e-4, atol=1e-5)
        alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(5)])
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter():
    net = awake()
    net(pictures(), torch.tensor([1, 500, 1000])).square().mean().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


def test_the_gradient_is_that_of_finite_differences():
    net, x = awake(side=4).double(), pictures(1, side=4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: net(x, torch.tensor([300])), (x,), fast_mode=True)


def test_a_far_corner_of_the_picture_matters():
    net, x = awake(), pictures(1).requires_grad_()
    net(x, torch.tensor([10]))[0, 0, 0, 0].backward()
    assert (x.grad.abs() > 0).all()


@pytest.mark.parametrize(
    ("field", "value", "way_out"),
    [
        ("multipliers", (), "try (1, 2)"),
        ("multipliers", (1, 0), "try (1, 2)"),
        ("blocks", 0, "at least 1"),
        ("channels", 0, "try 32"),
        ("channels", 7, "try 32"),
        ("channels", -2, "try 32"),
        ("groups", 0, "try 1"),
        ("groups", 5, "must divide network.channels, which is 32"),
        ("heads", 0, "try 1"),
        ("heads", 3, "must divide network.channels, which is 32"),
    ],
)
def test_a_bad_configuration_names_its_field_its_value_and_a_way_out(field, value, way_out):
    with pytest.raises(ValueError, match=rf"network\.{field} is ") as caught:
        UNetConfig(**{field: value})
    assert f"network.{field} is {value}; " in str(caught.value)
    assert way_out in str(caught.value)


@pytest.mark.parametrize(("multipliers", "side"), [((1, 2), 7), ((1, 2, 4), 6), ((1, 1, 1, 1), 28)])
def test_a_side_that_cannot_be_halved_is_named(multipliers, side):
    config = UNetConfig(multipliers=multipliers)
    multiple = 2 ** (len(multipliers) - 1)
    with pytest.raises(ValueError, match=f"side of {side} pixels.*must be a multiple of {multiple}:"):
        config.check_side(side)
    with pytest.raises(ValueError, match=f"side of {side} pixels"):
        UNet(config, 1, side)


@pytest.mark.parametrize(("multipliers", "side"), [((1,), 7), ((1, 2), 8), ((1, 2, 4), 28), ((1, 1, 1, 1), 8)])
def test_a_side_that_can_be_halved_is_taken(multipliers, side):
    UNetConfig(multipliers=multipliers).check_side(side)
