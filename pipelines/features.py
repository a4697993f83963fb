"""What is compared of pictures: their features, vectors of one length.

They are the pixels themselves, or what a network in a file makes of pictures that were prepared for it as the settings
say. :attr:`FeatureConfig.identity` is all of that but where the file lies and how the work is dealt out: two sets of
features with one identity can be compared.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from models.choice import check_choice
from pipelines.errors import ConfigurationError, DataError, checked
from pipelines.images import Pixels
from pipelines.storage import settled

MAX_PIXELS = 3072
"""Pixels of a picture up to which they serve as its features: 32 × 32 in RGB. Σxxᵀ is the square of that."""
MAX_FEATURES = 4096
"""Of a network, for the same reason."""
Extract = Callable[[Pixels], NDArray[np.float64]]
"""Maps uint8 [n, H, W, C] to features [n, D], each row a function of its own picture."""
Kind: TypeAlias = Literal["pixels", "file"]
Resize: TypeAlias = Literal["bicubic", "bilinear"]


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """What pictures are compared by."""

    kind: Kind = "pixels"
    """Their pixels in [0, 1], for small pictures; or what a network in a file makes of them."""
    url: str = ""
    """Of the file: TorchScript, or a program of torch.export, that maps float32 [B, C, H, W], with C red, green and
    blue, or grey, to features [B, D] or [B, D, 1, 1]. It is a program: what is in it is run, with all that this job
    may do."""
    sha256: str = ""
    """Of the content of the file, which is not run if it is another; empty: the job says what it is, and stops."""
    name: str = ""
    """What scores by this file are called in MLflow, such as inception; empty: by its digest."""
    side: int = 0
    """Height and width that pictures are resized to for the file; 0: none, as where the file does it itself."""
    resize: Resize = "bicubic"
    """The filter. The result is kept in 0..255 and not rounded."""
    antialias: bool = True
    """Widen the filter where pictures are made smaller, as Pillow does; without, it is torch's plain interpolation."""
    low: float = -1.0
    """What the file is given for a black pixel."""
    high: float = 1.0
    """What the file is given for a white pixel; 255, with 0 for black, for pixels as they are."""
    rgb: bool = False
    """Grey pictures are given as three equal channels."""
    member: str = ""
    """The part of the file's module that is called in place of the whole, such as layers."""
    flags: tuple[str, ...] = ()
    """Arguments that are given as True, such as return_features."""
    batch_images: int = 64
    """Pictures that the file is given at once, always as many: the last batch is filled up."""
    actors: int = 2
    """Actors that have the file loaded, one CPU (or GPU) each."""
    use_gpu: bool = False
    """One GPU for each actor."""

    def __post_init__(self) -> None:
        with checked():
            check_choice("features.kind", self.kind, Kind)
            check_choice("features.resize", self.resize, Resize)
        object.__setattr__(self, "url", settled(self.url))
        for name, least in (("batch_images", 1), ("actors", 1), ("side", 0)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"features.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.kind == "pixels" and self.url:
            raise ConfigurationError(f"features.url is {self.url} and features.kind pixels: add --features.kind file")
        if self.kind == "file" and not self.url:
            raise ConfigurationError("features.url is empty; features.kind file needs one, of a TorchScript file or so")
        if self.sha256 and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ConfigurationError(f"features.sha256 is {self.sha256!r}; it must be 64 hexadecimal digits")
        if not re.fullmatch(r"[A-Za-z0-9_-]*", self.name):
            raise ConfigurationError(f"features.name is {self.name!r}; it must be of letters, digits, '_' and '-'")
        if not self.low < self.high:
            raise ConfigurationError(f"features.low is {self.low}; it must be less than features.high, {self.high}")

    @property
    def identity(self) -> str:
        """What two sets of features must have in common to be compared, in words for a reader."""
        if self.kind == "pixels":
            return "pixels in [0, 1]"
        size = f"{self.side} pixels, {self.resize}{' antialiased' * self.antialias}" if self.side else "any size"
        called = f"{self.member or 'module'}({', '.join(self.flags)})"
        return (
            f"sha256 {self.sha256}: {called} of {size}, black {self.low!r}, white {self.high!r}"
            f"{', grey as RGB' * self.rgb}"
        )

    @property
    def suffix(self) -> str:
        """What the name of a metric has behind it where it is of these features."""
        return "" if self.kind == "pixels" else f"_{self.name or self.sha256[:8]}"

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raise DataError unless these are features of pictures of a shape, [H, W, C]."""
        if self.kind == "pixels" and np.prod(shape) > MAX_PIXELS:
            raise DataError(f"pixels serve as features up to {MAX_PIXELS} of them; these have {np.prod(shape)}")

    def load(self) -> Extract:
        """Return the extractor; called once by each task or actor that needs it.

        Raises:
            DataError: if the file is not there, or is no network.
            ConfigurationError: if its digest is another, or was not given.
        """
        if self.kind == "pixels":
            return pixel_features
        from pipelines.file_features import FileFeatures  # torch, which the pixels do not need

        return FileFeatures(self)


def pixel_features(pixels: Pixels) -> NDArray[np.float64]:
    """Map uint8 [n, H, W, C] to [n, HWC] in [0, 1]."""
    return pixels.reshape(len(pixels), -1) / 255.0
