"""The network's shape, its dependence on t, and its indifference to the rest of the batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.encoding import sinusoidal
from models.init import initialize
from models.noise import normal
from models.unet import Downsample, ResidualBlock, SelfAttention, Stage, UNet, UNetConfig, Upsample

SMALL = UNetConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=4, groups=4)
PAPER = UNetConfig(channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), groups=32)
CHANNELS_LAST = torch.channels_last


def awake(config=SMALL, image_channels=1, side=8, classes=0):
    """A network whose every weight is away from zero, as after some training."""
    net = UNet(config, image_channels, side, classes)
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
        (UNetConfig(channels=8, multipliers=(1, 3, 2), blocks=2, attention=(8, 2), head_channels=4), 3, 8),
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
    block, attention = ResidualBlock(8, 8, SMALL), SelfAttention(8, SMALL)
    for module in (block, attention):
        initialize(module, seed=0)
    x = pictures(2, 8, 4)
    assert torch.equal(block(x, torch.ones(2, 32)), x)
    assert torch.equal(attention(x), x)


def test_the_network_of_the_digits_has_its_known_number_of_parameters():
    assert size(UNet(UNetConfig(blocks=1), 1, 8)) == 701_345


def test_the_papers_network_has_the_papers_number_of_parameters():
    # 35.7 million, as its section 4 has it for CIFAR-10.
    with torch.device("meta"):
        assert size(UNet(PAPER, 3, 32)) == 35_746_307


def size(module):
    return sum(p.numel() for p in module.parameters())


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
    code = sinusoidal(torch.arange(1001), 32, slowest=15)
    assert code.shape == (1001, 32)
    assert torch.cdist(code, code).fill_diagonal_(1).min() > 1e-2


def test_the_code_of_t_is_sines_and_cosines_of_falling_frequency():
    t, size = torch.tensor([0, 1, 7, 1000]), 6
    angles = torch.tensor([[t * 10_000 ** (-i / 2) for i in range(3)] for t in t.tolist()], dtype=torch.float64)
    expected = torch.cat([angles.sin(), angles.cos()], dim=1)
    torch.testing.assert_close(sinusoidal(t, size, slowest=2).double(), expected, rtol=0, atol=2e-4)


def test_the_paper_counts_time_from_0():
    net, codes = awake(), []
    net.time.register_forward_pre_hook(lambda module, inputs: codes.append(inputs[0]))
    net(pictures(2), torch.tensor([1, 1000]))
    assert torch.equal(codes[0], sinusoidal(torch.tensor([0, 999]), SMALL.channels, SMALL.channels // 2 - 1))
    assert codes[0][0].tolist() == [0.0] * 4 + [1.0] * 4


def test_halving_looks_at_each_even_place_and_past_the_end_at_zeros():
    layer, x = Downsample(1), pictures(1, 1, 6)
    for row, column in ((0, 0), (0, 2), (2, 2)):
        with torch.no_grad():
            layer.conv.bias.zero_()
            layer.conv.weight.zero_()[0, 0, row, column] = 1
            assert torch.equal(layer(x), F.pad(x, (0, 2, 0, 2))[:, :, row : row + 6 : 2, column : column + 6 : 2])


def test_doubling_in_one_step_is_doubling_and_then_a_convolution():
    layer, x = awake_module(Upsample(3)).double(), pictures(2, 3, 5).double()
    two_steps = layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(layer(x), two_steps, rtol=1e-12, atol=1e-12)
    cotangent = normal(1, "y", torch.arange(2), (3, 10, 10)).double()
    gradients = [torch.autograd.grad(y, layer.parameters(), cotangent) for y in (layer(x), two_steps)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


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
    assert isinstance(net.middle.attention, SelfAttention)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_that_of_torch(heads):
    ours = awake_module(SelfAttention(8, UNetConfig(channels=8, head_channels=8 // heads, groups=4)))
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


def test_no_label_and_minus_1_are_the_same_and_each_label_is_another():
    net, x, t = awake(classes=3), pictures(1).expand(5, -1, -1, -1), torch.full((5,), 500)
    with torch.no_grad():
        without = net(x, t)
        labelled = net(x, t, torch.tensor([-1, 0, 1, 2, -1]))
    assert torch.equal(labelled[[0, 4]], without[[0, 4]])
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(labelled[i], labelled[j], atol=1e-4)


def test_a_label_is_added_to_the_encoding_of_t_before_the_last_activation():
    net, x, t, times = awake(classes=2), pictures(3), torch.tensor([1, 30, 900]), []
    net.middle.register_forward_pre_hook(lambda module, inputs: times.append(inputs[1]))
    net(x, t, torch.tensor([1, -1, 0]))
    torch.testing.assert_close(
        times[0], F.silu(net.time(sinusoidal(t - 1, 8, slowest=3)) + net.label.weight[[1, 2, 0]])
    )


@pytest.mark.parametrize(("label", "rows"), [([2, 2, 0], {0, 2}), ([1, -1, -1], {1, 4}), (None, {4})])
def test_the_gradient_reaches_the_rows_of_the_labels_that_were_seen(label, rows):
    net = awake(classes=4)
    net(pictures(), torch.tensor([1, 500, 1000]), label and torch.tensor(label)).square().mean().backward()
    assert set(net.label.weight.grad.abs().amax(1).nonzero().flatten().tolist()) == rows
    assert len(net.label.weight) == 5


def test_a_label_for_a_network_without_classes_is_refused():
    with pytest.raises(ValueError, match="without classes"):
        awake()(pictures(1), torch.tensor([1]), torch.tensor([0]))


def test_its_blocks_come_in_the_order_of_execution_and_hold_nearly_all_parameters_once():
    net, seen = awake(), []
    for block in net.blocks():
        block.register_forward_hook(lambda module, inputs, output: seen.append(module))
    net(pictures(1), torch.tensor([1]))
    assert seen == net.blocks()
    held = [id(p) for block in net.blocks() for p in block.parameters()]
    assert len(set(held)) == len(held)
    with torch.device("meta"):
        paper = UNet(PAPER, 3, 32)
    assert sum(map(size, paper.blocks())) > 0.9 * size(paper)


class Copies(TorchDispatchMode):
    """Notes each copy of a tensor of three dimensions or more."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kinds = ("aten::clone", "aten::copy_", "aten::_to_copy", "aten::contiguous")
        if func._schema.name in kinds and args[0].dim() >= 3:
            self.seen.append((func._schema.name, tuple(args[0].shape)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("x_format", [CHANNELS_LAST, torch.contiguous_format])
@pytest.mark.parametrize("image_channels", [1, 3])
def test_pictures_stay_channels_last_all_the_way_and_nothing_is_copied(image_channels, x_format):
    config = UNetConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(8, 4), head_channels=4, groups=4)
    net, seen = awake(config, image_channels).to(memory_format=CHANNELS_LAST), []
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm | Upsample) and module is not net.conv_in:
            module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = pictures(2, image_channels).contiguous(memory_format=x_format)
    with torch.no_grad(), Copies() as copies:
        prediction = net(x, torch.tensor([1, 700]))
    assert len(seen) > 30
    assert all(h.is_contiguous(memory_format=CHANNELS_LAST) and not h.is_contiguous() for h in seen)
    assert prediction.is_contiguous(memory_format=CHANNELS_LAST)
    assert copies.seen == []


def test_it_compiles_into_one_graph_that_does_the_same():
    config = UNetConfig(channels=4, multipliers=(1, 1), blocks=1, attention=(), groups=2)
    net, x, t = awake(config, classes=3), pictures(2), torch.tensor([1, 700])
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    outcomes = []
    for network in (net, compiled):
        prediction = network(x, t, torch.tensor([2, -1]))
        outcomes.append([prediction, *torch.autograd.grad(prediction.square().mean(), net.parameters())])
        with torch.no_grad():
            outcomes[-1].append(network(x, t))
    for eager, graph in zip(*outcomes, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences():
    net, x = awake(side=4).double(), pictures(1, side=4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: net(x, torch.tensor([300])), (x,), fast_mode=True)


def test_a_far_corner_of_the_picture_matters():
    net, x = awake(), pictures(1).requires_grad_()
    net(x, torch.tensor([10]))[0, 0, 0, 0].backward()
    assert (x.grad.abs() > 0).all()
