"""What is compared of pictures: their features, vectors of one length."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError
from pipelines.images import Pixels

MAX_PIXELS = 3072
"""Pixels of a picture up to which they serve as its features: 32 × 32 in RGB. Σxxᵀ is the square of that."""
Extract = Callable[[Pixels], NDArray[np.float64]]
"""Maps uint8 [n, H, W, C] to features [n, D], each row a function of its own picture."""


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """What pictures are compared by."""

    kind: Literal["pixels"] = "pixels"
    """Their pixels in [0, 1], for small pictures."""

    @property
    def identity(self) -> str:
        """What two sets of features must have in common to be compared, in words for a reader."""
        return "pixels in [0, 1]"

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raise DataError unless these are features of pictures of a shape, [H, W, C]."""
        if np.prod(shape) > MAX_PIXELS:
            raise DataError(f"pixels serve as features up to {MAX_PIXELS} of them; these have {np.prod(shape)}")

    def load(self) -> Extract:
        """Return the extractor; called once by each task or actor that needs it."""
        return pixel_features


def pixel_features(pixels: Pixels) -> NDArray[np.float64]:
    """Map uint8 [n, H, W, C] to [n, HWC] in [0, 1]."""
    return pixels.reshape(len(pixels), -1) / 255.0
