"""Shapes that the U-Net cannot have are refused with a way out."""

import pytest

from models.unet import UNet, UNetConfig


@pytest.mark.parametrize(
    ("field", "value", "way_out"),
    [
        ("multipliers", (), "try (1, 2)"),
        ("multipliers", (1, 0), "try (1, 2)"),
        ("multipliers", (2, 4), "try (1, 2)"),
        ("blocks", 0, "at least 1"),
        ("channels", 0, "try 32"),
        ("channels", 7, "try 32"),
        ("channels", 2, "try 32"),
        ("channels", -2, "try 32"),
        ("groups", 0, "try 1"),
        ("groups", 5, "must divide network.unet.channels, which is 32"),
        ("head_channels", -1, "try 0"),
        ("head_channels", 48, "in the middle they are 64"),
    ],
)
def test_a_bad_configuration_names_its_field_its_value_and_a_way_out(field, value, way_out):
    with pytest.raises(ValueError, match=rf"network\.unet\.{field} is ") as caught:
        UNetConfig(**{field: value})
    assert f"network.unet.{field} is {value}; " in str(caught.value)
    assert way_out in str(caught.value)


def test_heads_must_fit_wherever_attention_happens_and_nowhere_else():
    config = UNetConfig(channels=32, multipliers=(1, 2), attention=(8,), head_channels=64)
    config.check_side(16)
    with pytest.raises(ValueError, match=r"head_channels is 64; .* at side 8 they are 32: try 0"):
        config.check_side(8)


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
