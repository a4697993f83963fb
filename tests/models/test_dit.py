"""The Diffusion Transformer: equal to the peer's, the identity at first, and compiled without a break."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel

from models.dit import SIZES, Attention, Block, DiT, DiTConfig, modulated, patchify, places, unpatchify, waves
from models.init import initialize
from models.noise import normal

SMALL = DiTConfig(depth=2, width=16, heads=2, patch=2)


def wake(module):
    """Move every weight away from zero, as after some training."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            noise = normal(0, "weights", torch.tensor([i]), tuple(parameter.shape))[0]
            parameter.copy_(noise * 0.7 / parameter[0].numel() ** 0.5)
    return module.eval()


def awake(config=SMALL, image_channels=1, side=8, classes=0):
    return wake(DiT(config, image_channels, side, classes))


def pictures(n=3, channels=1, side=8):
    return normal(0, "x", torch.arange(n), (channels, side, side))


def apart(a, b):
    return float((a - b).abs().amax((1, 2, 3)).min())


@pytest.mark.parametrize(
    ("config", "image_channels", "side"),
    [
        (SMALL, 1, 8),
        (DiTConfig(depth=1, width=4, heads=1, patch=1), 2, 3),
        (DiTConfig(width=12, heads=3, patch=4), 3, 12),
    ],
)
def test_the_prediction_has_the_shape_of_the_picture(config, image_channels, side):
    x = pictures(2, image_channels, side)
    prediction = awake(config, image_channels, side)(x, torch.tensor([1, 1000]))
    assert prediction.shape == x.shape
    assert prediction.abs().max() > 0
    assert torch.isfinite(prediction).all()


def theirs_with_the_weights_of(ours, side):
    """The peer's network. It has one encoder of t and label per block, and its attention takes q, k and v apart."""
    config = ours.config
    theirs = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=3,
        num_layers=config.depth,
        sample_size=side,
        patch_size=config.patch,
        num_embeds_ada_norm=ours.classes,
        norm_eps=1e-6,
    ).eval()
    weights, layers = {}, {"pos_embed.proj": ours.patches, "proj_out_1": ours.modulation, "proj_out_2": ours.out}
    for i, block in enumerate(ours.stack):
        name = f"transformer_blocks.{i}"
        time, label = f"{name}.norm1.emb.timestep_embedder", f"{name}.norm1.emb.class_embedder.embedding_table"
        layers |= {f"{time}.linear_1": ours.time[0], f"{time}.linear_2": ours.time[2], label: ours.label}
        layers |= {f"{name}.norm1.linear": block.modulation, f"{name}.attn1.to_out.0": block.attention.out}
        layers |= {f"{name}.ff.net.0.proj": block.perceptron[0], f"{name}.ff.net.2": block.perceptron[2]}
        for leaf, parameter in block.attention.qkv.named_parameters():
            q, k, v = parameter.detach().chunk(3)
            weights |= {f"{name}.attn1.to_{part}.{leaf}": value for part, value in zip("qkv", (q, k, v), strict=True)}
        # As in the paper's code; the peer puts cosines first and spaces the frequencies otherwise unless told.
        theirs.transformer_blocks[i].norm1.emb.time_proj.downscale_freq_shift = 0
        theirs.transformer_blocks[i].norm1.emb.time_proj.flip_sin_to_cos = False
    for name, layer in layers.items():
        weights |= {f"{name}.{leaf}": parameter.detach() for leaf, parameter in layer.named_parameters()}
    cut = weights["pos_embed.proj.weight"].view(config.width, config.patch, config.patch, 3)  # ours: channel fastest
    weights["pos_embed.proj.weight"] = cut.permute(0, 3, 1, 2)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert (set(missing) - {"pos_embed.pos_embed"}, unexpected) == (set(), [])  # a buffer, computed
    return theirs


@pytest.mark.parametrize(
    ("config", "side"),
    [(DiTConfig(depth=3, width=48, heads=3, patch=2), 12), (DiTConfig(depth=1, width=32, heads=4, patch=4), 8)],
)
def test_it_is_the_transformer_of_the_peer(config, side):
    ours = awake(config, 3, side, classes=10)
    theirs = theirs_with_the_weights_of(ours, side)
    x, t, label = pictures(4, 3, side), torch.tensor([1, 2, 500, 1000]), torch.tensor([0, 9, 4, -1])
    with torch.no_grad():
        peer = theirs(x, t - 1, torch.where(label < 0, 10, label)).sample
        prediction = ours(x, t, label)
    assert peer.std() > 0.1
    torch.testing.assert_close(prediction, peer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "count", "published"),
    [("S", 32_858_896, 33), ("B", 130_303_504, 130), ("L", 457_824_272, 458), ("XL", 674_816_272, 675)],
)
def test_the_sizes_of_the_paper_have_their_numbers_of_parameters(size, count, published):
    config = SIZES[size]
    with torch.device("meta"):
        net = DiT(config, image_channels=4, side=32, classes=1000)
    assert sum(p.numel() for p in net.parameters()) == count
    # The paper learns a variance too, which doubles the outputs: 4 channels of a patch of 4 pixels, weights and biases.
    assert round((count + (config.width + 1) * 4 * 4) / 1e6) == published


def test_the_sizes_of_the_paper_have_its_depths_widths_and_heads():
    assert {name: (size.depth, size.width, size.heads) for name, size in SIZES.items()} == {
        "S": (12, 384, 6),
        "B": (12, 768, 12),
        "L": (24, 1024, 16),
        "XL": (28, 1152, 16),
    }


def test_a_fresh_network_predicts_zero():
    net = DiT(SMALL, 3, 8, classes=4)
    initialize(net, seed=0)
    x, t = pictures(2, 3), torch.tensor([1, 1000])
    assert torch.equal(net(x, t, torch.tensor([3, -1])), torch.zeros(2, 3, 8, 8))


def test_each_fresh_block_is_the_identity():
    net = DiT(SMALL, 1, 8)
    initialize(net, seed=0)
    x, condition = normal(0, "tokens", torch.arange(2), (5, 16)), normal(0, "condition", torch.arange(2), (16,))
    assert len(net.blocks()) == 2
    for block in net.blocks():
        assert torch.equal(block(x, condition), x)
        assert block.attention(x).abs().min() > 0, "only the gates are closed"


def test_the_blocks_are_in_the_order_in_which_they_run():
    net, ran = awake(DiTConfig(depth=4, width=16, heads=2)), []
    for block in net.blocks():
        block.register_forward_hook(lambda module, inputs, output: ran.append(module))
    net(pictures(1), torch.tensor([1]))
    assert ran == net.blocks()
    assert len(ran) == 4 and all(isinstance(block, Block) for block in ran)


@pytest.mark.parametrize(("patch", "rows", "columns"), [(1, 3, 2), (2, 3, 5), (4, 2, 1)])
def test_pictures_are_cut_into_patches_and_put_together_again(patch, rows, columns):
    x = normal(0, "x", torch.arange(2), (3, rows * patch, columns * patch))
    tokens = patchify(x, patch)
    for row in range(rows):
        for column in range(columns):
            cut = x[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            expected = torch.stack([cut[:, :, i, j] for i in range(patch) for j in range(patch)], dim=1).flatten(1)
            assert torch.equal(tokens[:, row * columns + column], expected)
    assert torch.equal(unpatchify(tokens, patch, rows), x)
    assert torch.equal(patchify(x.to(memory_format=torch.channels_last), patch), tokens)


def test_the_code_of_a_place_is_sines_and_cosines_of_its_column_and_of_its_row():
    rows, columns, size = 3, 4, 8
    code = places(rows, columns, size, torch.device("cpu")).double()
    for row in range(rows):
        for column in range(columns):
            waves = [torch.tensor([n, n * 10_000**-0.5], dtype=torch.float64) for n in (column, row)]
            expected = torch.cat([f(angle) for angle in waves for f in (torch.sin, torch.cos)])
            torch.testing.assert_close(code[row * columns + column], expected, rtol=0, atol=1e-6)


def test_the_code_of_a_number_is_sines_and_cosines_of_falling_frequency():
    numbers, size = torch.tensor([0, 1, 7, 999]), 6
    angles = torch.tensor([[n * 10_000 ** (-i / 3) for i in range(3)] for n in numbers.tolist()], dtype=torch.float64)
    expected = torch.cat([angles.sin(), angles.cos()], dim=1)
    torch.testing.assert_close(waves(numbers, size).double(), expected, rtol=0, atol=2e-4)


def test_the_first_time_is_the_papers_zero():
    net, times = awake(), []
    net.time.register_forward_hook(lambda module, inputs, output: times.append(inputs[0]))
    net(pictures(2), torch.tensor([1, 4]))
    assert torch.equal(times[0], waves(torch.tensor([0, 3]), 256))


def test_it_matters_where_a_patch_stands():
    net, x, t = awake(), pictures(2), torch.tensor([5, 700])
    with torch.no_grad():
        moved = net(x.roll(2, dims=3), t).roll(-2, dims=3)  # without a code of the place: the same prediction
        turned = net(x.transpose(2, 3), t).transpose(2, 3)
        assert apart(moved, net(x, t)) > 1e-2
        assert apart(turned, net(x, t)) > 1e-2


def test_attention_is_that_of_torch():
    ours, theirs = wake(Attention(12, heads=3)), torch.nn.MultiheadAttention(12, 3, batch_first=True)
    x = normal(0, "tokens", torch.arange(2), (5, 12))
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
        torch.testing.assert_close(ours(x), theirs(x, x, x)[0], rtol=1e-5, atol=1e-6)


def test_a_block_is_the_papers_formula():
    """x + α₁ Attention(γ₁ ⊙ norm(x) + β₁), then x + α₂ MLP(…), the six from one linear layer, 1 + γ for γ."""
    block = wake(Block(8, heads=2)).double()
    x, condition = (normal(0, "b", torch.arange(2), shape).double() for shape in ((5, 8), (8,)))
    by_hand = F.linear(condition, block.modulation.weight, block.modulation.bias).view(2, 6, 1, 8)
    beta_1, gamma_1, alpha_1, beta_2, gamma_2, alpha_2 = by_hand.unbind(1)

    def norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    y = x + alpha_1 * block.attention(norm(x) * (1 + gamma_1) + beta_1)
    hidden = block.perceptron[0](norm(y) * (1 + gamma_2) + beta_2)
    gelu = hidden / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(block(x, condition), y + alpha_2 * block.perceptron[2](gelu), rtol=1e-10, atol=1e-12)


def test_a_token_of_one_value_stays_finite():
    zero = torch.zeros(1, 1, 4)
    assert torch.equal(modulated(torch.full((1, 2, 4), 3.0), zero, zero), torch.zeros(1, 2, 4))


def test_no_label_is_minus_one_and_each_label_matters():
    net, x, t = awake(classes=3), pictures(2), torch.tensor([1, 500])
    with torch.no_grad():
        none = net(x, t)
        assert torch.equal(net(x, t, torch.tensor([-1, -1])), none)
        told = [net(x, t, torch.tensor([label, label])) for label in range(3)]
        mixed = net(x, t, torch.tensor([2, -1]))
    every = [none, *told]
    for i, a in enumerate(every):
        assert all(apart(a, b) > 1e-3 for b in every[:i])
    torch.testing.assert_close(mixed, torch.stack([told[2][0], none[1]]), rtol=1e-5, atol=1e-6)


def test_a_network_without_classes_has_no_place_for_labels():
    net = awake()
    assert net.classes == 0 and not any("label" in name for name, _ in net.named_parameters())
    with pytest.raises(ValueError, match="label is given to a network without classes: pass none, or make it with"):
        net(pictures(1), torch.tensor([1]), torch.tensor([0]))


def test_every_block_and_the_output_depend_on_t():
    net = awake(DiTConfig(depth=3, width=16, heads=2))
    x, condition = normal(0, "tokens", torch.arange(2), (5, 16)), normal(0, "condition", torch.arange(2), (16,))
    with torch.no_grad():
        for block in net.blocks():
            assert ((block(x, condition.flip(0)) - block(x, condition)).abs().amax((1, 2)) > 1e-2).all()
        predictions = [net(pictures(1), torch.tensor([t])) for t in (1, 2, 500, 501, 1000)]
    for i, a in enumerate(predictions):
        assert all(apart(a, b) > 1e-4 for b in predictions[:i])


def test_an_image_does_not_see_the_others_in_its_batch():
    net, x, t = awake(image_channels=3, classes=4), pictures(4, 3), torch.tensor([1, 30, 500, 1000])
    label, order = torch.tensor([0, -1, 3, 2]), torch.tensor([3, 0, 2, 1])
    with torch.no_grad():
        together = net(x, t, label)
        torch.testing.assert_close(net(x[order], t[order], label[order]), together[order], rtol=1e-4, atol=1e-5)
        alone = torch.cat([net(x[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter():
    net = awake(classes=2)
    net(pictures(), torch.tensor([1, 500, 1000]), torch.tensor([0, 1, -1])).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_the_gradient_is_that_of_finite_differences():
    net, x = awake(side=4).double(), pictures(1, side=4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: net(x, torch.tensor([300])), (x,), fast_mode=True)


@pytest.mark.parametrize("label", [None, torch.tensor([1, -1])])
def test_compiled_in_one_graph_it_is_the_same(label):
    x, t, found = pictures(2, 3), torch.tensor([1, 700]), []
    net = awake(image_channels=3, classes=2)
    torch._dynamo.reset()
    for network in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        net.zero_grad()
        prediction = network(x, t, label)
        prediction.square().sum().backward()
        found.append((prediction.detach(), {name: p.grad.clone() for name, p in net.named_parameters()}))
    (eager, gradients), (compiled, its_gradients) = found
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(its_gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "way_out"),
    [
        ("depth", 0, "must be at least 1: try 12"),
        ("width", 0, "must be a positive multiple of 4: try 384"),
        ("width", 386, "must be a positive multiple of 4: try 384"),
        ("width", -4, "must be a positive multiple of 4: try 384"),
        ("heads", 0, "must divide network.dit.width, which is 384: try 1"),
        ("heads", 5, "must divide network.dit.width, which is 384: try 1"),
        ("patch", 0, "must be at least 1: try 2"),
    ],
)
def test_a_bad_configuration_names_its_field_its_value_and_a_way_out(field, value, way_out):
    with pytest.raises(ValueError) as caught:
        DiTConfig(**{field: value})
    assert str(caught.value) == f"network.dit.{field} is {value}; it {way_out}"


def test_a_side_that_cannot_be_cut_into_patches_is_named():
    config = DiTConfig(patch=4)
    config.check_side(8)
    for side in (0, 6):
        with pytest.raises(ValueError, match=f"side of {side} pixels, and network.dit.patch is 4; .* multiple of 4:"):
            config.check_side(side)
        with pytest.raises(ValueError, match=f"side of {side} pixels"):
            DiT(config, 1, side)
