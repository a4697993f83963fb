"""The scores by other hands: torchmetrics, on the same features and on the same pictures.

It takes any module where most give it an Inception network, so no weights are needed, and adds up in float64 as we do.
Of Σ₁Σ₂, which is not symmetric, it takes the eigenvalues as they are; we take those of a symmetric matrix like it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from pipelines.features import FeatureConfig, pixel_features
from pipelines.moments import Moments, frechet_distance, merged
from pipelines.storage import Folder
from tests.pipelines.test_features import put, script
from tests.pipelines.test_moments import correlated
from tests.pipelines.test_pairs import measure

Prepare = Callable[[NDArray[np.uint8]], Tensor]


class Given(nn.Identity):
    """In place of a network: what is given are features."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features


def peers_distance(a: Any, b: Any, network: nn.Module) -> float:
    fid = FrechetInceptionDistance(network)
    for several, real in ((a, False), (b, True)):
        for part in torch.as_tensor(several).split(50):
            fid.update(part, real=real)
    return fid.compute().item()


def ours(*sets: NDArray[np.float64]) -> float:
    a, b = (merged(Moments.of(part) for part in np.array_split(one, 3)) for one in sets)
    return frechet_distance(a, b)


def test_the_frechet_distance_of_features() -> None:
    rng = np.random.default_rng(0)
    a, b = correlated(rng, 500, 32), correlated(rng, 700, 32)
    assert ours(a, b) == pytest.approx(peers_distance(a, b, Given(32)), rel=1e-11)


def test_the_frechet_distance_where_some_features_never_change(digits: tuple[np.ndarray, np.ndarray]) -> None:
    """Pixels that are black in all digits. An eigenvalue that is 0 comes out as 1e-16 or so, and its root as 1e-8."""
    a, b = pixel_features(digits[0][:800]), pixel_features(digits[0][800:])
    assert np.linalg.matrix_rank(np.cov(b.T)) < 64
    assert ours(a, b) == pytest.approx(peers_distance(a, b, Given(64)), abs=64 * 1e-8)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all")
def test_the_kernel_distance_of_all_pairs() -> None:
    """Its one subset is all there is, in an order by chance, on which nothing depends."""
    rng = np.random.default_rng(1)
    a, b = (correlated(rng, 90, 6).astype(np.float32) for _ in range(2))
    kid = KernelInceptionDistance(Given(6), subsets=1, subset_size=90)
    kid.update(torch.tensor(a).double(), real=False)
    kid.update(torch.tensor(b).double(), real=True)
    assert measure(a, b, 1).kid() == pytest.approx(kid.compute()[0].item(), rel=1e-11)


class Network(nn.Module):
    """With the doors of the file that most FIDs are made with, but far smaller."""

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.layers.num_features = 8  # which the peer asks for
        for weights in self.parameters():
            weights.data = torch.randn(weights.shape, generator=drawn)
            weights.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x - 128) / 128)


def as_clean_fid(side: int) -> Prepare:
    """clean-fid 0.1.35: Pillow's bicubic filter on each channel as floats, cut off at 0 and 255, (x - 128) / 128."""

    def prepare(picture: NDArray[np.uint8]) -> Tensor:
        channels = np.asarray(Image.fromarray(picture.squeeze()).convert("RGB"), np.float32).transpose(2, 0, 1)
        resized = [Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC) for one in channels]
        return (torch.tensor(np.stack(resized)).clamp(0, 255) - 128) / 128

    return prepare


def as_pytorch_fid(side: int) -> Prepare:
    """pytorch-fid 0.3.0: pixels in [0, 1], torch's plain bilinear interpolation, 2x - 1."""

    def prepare(picture: NDArray[np.uint8]) -> Tensor:
        rgb = np.asarray(Image.fromarray(picture.squeeze()).convert("RGB"))
        x = torch.tensor(rgb).permute(2, 0, 1)[None] / 255
        return 2 * interpolate(x, (side, side), mode="bilinear", align_corners=False)[0] - 1

    return prepare


def pictures(seed: int, channels: int) -> NDArray[np.uint8]:
    """[150, 20, 20, C], with white and black beside each other: a cubic filter shoots beyond both."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal(100 + 30 * seed, 90, (150, 20, 20, channels)) * [1.0, 0.7, 0.4][:channels]
    return drawn.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [9, 29])
@pytest.mark.parametrize(
    ("peer", "settings", "other"),
    [
        (as_clean_fid, {"high": 127 / 128}, {"resize": "bilinear"}),
        (as_pytorch_fid, {"resize": "bilinear", "antialias": False}, {"high": 0.9}),
    ],
    ids=["clean-fid", "pytorch-fid"],
)
def test_the_distance_of_pictures_that_others_prepared(
    peer: Callable[[int], Prepare],
    settings: dict[str, Any],
    other: dict[str, Any],
    side: int,
    channels: int,
    folder: Folder,
) -> None:
    """From pixels to the score, with settings as docs/scores.md says them; and other settings give another score."""
    network, (a, b) = Network(), (pictures(seed, channels) for seed in range(2))
    prepared = [torch.stack([peer(side)(picture) for picture in several]) for several in (a, b)]
    expected = peers_distance(*prepared, network.layers)
    config = put(folder, script(network), member="layers", rgb=True, side=side, **{"low": -1.0, "high": 1.0} | settings)

    def found(config: FeatureConfig) -> float:
        extract = config.load()
        return ours(extract(a), extract(b))

    assert found(config) == pytest.approx(expected, rel=1e-6), "features, and so the peer's result, are in float32"
    assert found(replace(config, **other)) != pytest.approx(expected, rel=1e-2)
