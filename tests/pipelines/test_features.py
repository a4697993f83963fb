import hashlib
import io
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipelines.errors import ConfigurationError, DataError
from pipelines.features import FeatureConfig, pixel_features
from pipelines.file_features import prepared
from pipelines.storage import Folder

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (9, 12, 12, 1), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (9, 12, 12, 3), dtype=np.uint8)


class Layers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Detector(nn.Module):
    """With the door of the Inception file that most scores are made with: pixels 0..255 in, features on request."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        features = self.layers((x - 128) / 128)
        if return_features:
            return features[:, :, None, None]
        return features.sum(1, keepdim=True)


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 4).flatten(1)


def script(module: nn.Module) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


def program(module: nn.Module, shape: tuple[int, ...]) -> bytes:
    """Of torch.export, for batches of one size only."""
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(module.eval(), (torch.zeros(shape),)), buffer)
    return buffer.getvalue()


def put(folder: Folder, content: bytes, **settings: object) -> FeatureConfig:
    folder.put("network.pt", content)
    said = {"sha256": hashlib.sha256(content).hexdigest(), "low": 0.0, "high": 255.0} | settings
    return FeatureConfig(kind="file", url=f"{folder.url}/network.pt", **said)  # type: ignore[arg-type]


def test_pixels_are_features_as_before() -> None:
    found = FeatureConfig().load()(GREY)
    np.testing.assert_array_equal(found, GREY.reshape(9, -1) / 255.0)
    assert FeatureConfig().identity == "pixels in [0, 1]" and FeatureConfig().suffix == ""
    np.testing.assert_array_equal(found, pixel_features(GREY))
    with pytest.raises(DataError, match="up to 3072 of them; these have 4096"):
        FeatureConfig().check_shape((64, 64, 1))


def test_torchscript_is_given_pixels_and_asked_for_features(folder: Folder) -> None:
    expected = (COLOUR.mean((1, 2)) - 128) / 128
    content = script(Detector())
    whole = put(folder, content, flags=("return_features",)).load()(COLOUR)
    part = put(folder, content, member="layers", low=-1.0, high=127 / 128).load()(COLOUR)  # 0..255 → (x - 128)/128
    for found in (whole, part):
        assert found.dtype == np.float64 and found.shape == (9, 3)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert put(folder, content).load()(COLOUR).shape == (9, 1), "the flag is what asks for them"


@pytest.mark.parametrize("batch_images", [1, 4, 64])
def test_a_program_is_given_full_batches_of_the_one_size_that_it_knows(batch_images: int, folder: Folder) -> None:
    config = put(folder, program(Pooled(), (batch_images, 1, 12, 12)), batch_images=batch_images)
    expected = GREY[..., 0].reshape(9, 3, 4, 3, 4).mean((2, 4)).reshape(9, 9)
    np.testing.assert_allclose(config.load()(GREY), expected, atol=1e-4)


def test_a_file_is_run_only_if_it_is_the_one_that_was_named(folder: Folder, tmp_path: Path) -> None:
    config = put(folder, script(Detector()))
    unsaid = FeatureConfig(kind="file", url=config.url)
    with pytest.raises(ConfigurationError, match=rf"features\.sha256 is empty; .* has {config.sha256}: if you trust"):
        unsaid.load()
    folder.put("network.pt", script(Pooled()))
    with pytest.raises(ConfigurationError, match=rf"features\.sha256 is {config.sha256}; .*, and is not run"):
        config.load()
    with pytest.raises(DataError, match="cannot be loaded as TorchScript"):
        put(folder, b"no network").load()
    with pytest.raises(DataError):
        FeatureConfig(kind="file", url=str(tmp_path / "none.pt"), sha256="0" * 64).load()


def test_what_is_no_feature_is_refused(folder: Folder) -> None:
    class Infinite(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) / 0.0

    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Many(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).repeat(1, 40)

    for module, message in ((Infinite(), "not finite"), (Same(), r"\[64, 1, 12, 12\] for 64"), (Many(), "5760 feat")):
        with pytest.raises(DataError, match=message):
            put(folder, script(module)).load()(GREY + 1)
    with pytest.raises(DataError, match=r"does not take \[64, 1, 12, 12\]"):
        put(folder, script(nn.Conv2d(3, 1, 1))).load()(GREY)


@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side", [5, 8, 29])
def test_pictures_are_resized_as_pillow_does_it_without_rounding(resize: str, side: int) -> None:
    """The way that makes FIDs comparable (Parmar et al., 2022): a filter that widens, on floats, per channel."""
    config = FeatureConfig(side=side, resize=resize, low=0, high=255)  # type: ignore[arg-type]
    found = prepared(torch.from_numpy(COLOUR), config).numpy()
    filter_ = Image.Resampling.BICUBIC if resize == "bicubic" else Image.Resampling.BILINEAR
    for n, c in np.ndindex(9, 3):
        channel = Image.fromarray(COLOUR[n, ..., c].astype(np.float32)).resize((side, side), filter_)
        np.testing.assert_allclose(found[n, c], np.asarray(channel).clip(0, 255), atol=2e-3)


def test_without_antialias_it_is_torchs_plain_interpolation() -> None:
    config = FeatureConfig(side=5, resize="bilinear", antialias=False, low=-1, high=1)
    x = torch.from_numpy(COLOUR).permute(0, 3, 1, 2).float() / 255
    expected = (2 * interpolate(x, (5, 5), mode="bilinear", align_corners=False) - 1).numpy()
    np.testing.assert_allclose(prepared(torch.from_numpy(COLOUR), config).numpy(), expected, atol=1e-6)
    assert (
        np.abs(prepared(torch.from_numpy(COLOUR), FeatureConfig(side=5, resize="bilinear")).numpy() - expected).max()
        > 0.1
    )


def test_grey_pictures_become_three_equal_channels_on_request() -> None:
    found = prepared(torch.from_numpy(GREY), FeatureConfig(rgb=True, low=0, high=255))
    assert found.shape == (9, 3, 12, 12)
    np.testing.assert_array_equal(found, np.repeat(GREY.transpose(0, 3, 1, 2), 3, axis=1))
    assert prepared(torch.from_numpy(GREY), FeatureConfig()).shape == (9, 1, 12, 12)


def test_the_identity_is_all_that_features_depend_on_and_no_more() -> None:
    first = FeatureConfig(kind="file", url="/a/network.pt", sha256="a" * 64, side=8)
    same = replace(first, url="s3://b/x", batch_images=7, actors=9, use_gpu=True, name="n")
    assert first.identity == same.identity
    others: list[dict[str, Any]] = [
        {"sha256": "b" * 64}, {"side": 0}, {"low": 0.0}, {"high": 2.0}, {"rgb": True}, {"member": "a"},
        {"flags": ("f",)}, {"antialias": False}, {"resize": "bilinear"},
    ]  # fmt: skip
    assert len({first.identity} | {replace(first, **other).identity for other in others}) == 10
    assert first.suffix == "_aaaaaaaa" and same.suffix == "_n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "inception"}, r"features\.kind is 'inception'; it must be one of pixels, file"),
        ({"url": "/a.pt"}, r"features\.kind pixels: add --features\.kind file"),
        ({"kind": "file"}, r"features\.url is empty"),
        ({"sha256": "abc"}, r"features\.sha256 is 'abc'; it must be 64 hex"),
        ({"batch_images": 0}, r"features\.batch_images is 0; it must be at least 1"),
        ({"low": 1.0}, r"features\.low is 1\.0; it must be less"),
        ({"name": "a b"}, r"features\.name is 'a b'"),
    ],
)
def test_bad_features_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FeatureConfig(**change)  # type: ignore[arg-type]
