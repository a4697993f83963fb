from dataclasses import replace

import pytest
import torch

from models.dit import DiT, DiTConfig
from models.init import empty, initialize
from models.network import NetworkConfig, build
from models.unet import UNet, UNetConfig

CONFIG = NetworkConfig(
    unet=UNetConfig(channels=8, blocks=1, groups=4), dit=DiTConfig(depth=1, width=8, heads=1, patch=2)
)
KINDS = {"unet": UNet, "dit": DiT}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_that_is_asked_for_is_built_in_its_shape(kind):
    config = replace(CONFIG, kind=kind)
    net = empty(lambda: build(config, image_channels=3, side=8, classes=5))
    assert type(net) is KINDS[kind]
    assert net.config == config.chosen == getattr(config, kind)
    initialize(net, seed=0)
    assert net(torch.ones(2, 3, 8, 8), torch.tensor([1, 9])).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [False, True])
def test_classes_count_only_if_labels_are_learned(kind, labels):
    net = build(replace(CONFIG, kind=kind, labels=labels), image_channels=1, side=8, classes=5)
    assert net.classes == (5 if labels else 0)
    assert any(name.startswith("label.") for name, _ in net.named_parameters()) == labels


def test_labels_that_the_images_do_not_have_are_refused():
    for config in (replace(CONFIG, labels=True), replace(CONFIG, labels=True, kind="dit")):
        with pytest.raises(ValueError, match=r"network\.labels is True, and the images have no labels"):
            build(config, image_channels=1, side=8, classes=0)
        config.check_classes(1)
    CONFIG.check_classes(0)


def test_the_side_is_checked_by_the_kind_that_is_built():
    config = NetworkConfig(unet=UNetConfig(multipliers=(1, 2)), dit=DiTConfig(patch=3))
    config.check_side(8)
    replace(config, kind="dit").check_side(9)
    with pytest.raises(ValueError, match=r"network\.unet\.multipliers"):
        config.check_side(9)
    with pytest.raises(ValueError, match=r"network\.dit\.patch"):
        replace(config, kind="dit").check_side(8)


def test_an_unknown_kind_is_named_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"network\.kind is 'gan'; it must be one of unet, dit"):
        NetworkConfig(kind="gan")


def test_settings_without_effect_are_said():
    plain = NetworkConfig()
    assert plain.idle_settings(8) == []  # the attention at side 4 stands
    assert plain.idle_settings(32) == ["network.unet.attention [4] has no effect: no feature map has such a side"]
    assert replace(plain, kind="dit").idle_settings(32) == []
    unused_dit = replace(plain, dit=DiTConfig(depth=1))
    assert unused_dit.idle_settings(8) == ["network.dit has no effect: network.kind is unet"]
    assert replace(unused_dit, kind="dit").idle_settings(8) == []
    unused_unet = replace(plain, kind="dit", unet=UNetConfig(blocks=1))
    assert unused_unet.idle_settings(8) == ["network.unet has no effect: network.kind is dit"]
