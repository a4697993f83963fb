"""From the bytes of a picture to what training takes, uint8 [64, 64, 3], in two ways that every contestant can use."""

import io
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.images import View

Decoder: TypeAlias = Literal["full", "same"]
SIDE = 64
"""Height and width of what is trained on, in pixels."""


def full(data: bytes) -> NDArray[np.uint8]:
    """Decode as most people do: every pixel, to RGB, then :func:`fitted`."""
    with Image.open(io.BytesIO(data)) as image:
        return fitted(image.convert("RGB"))


def fitted(image: Any) -> NDArray[np.uint8]:
    """Resize the short side and cut the middle out, as ``Resize`` and ``CenterCrop`` of torchvision do."""
    scale = SIDE / min(image.size)
    width, height = (max(SIDE, round(length * scale)) for length in image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(resized.crop((left, top, left + SIDE, top + SIDE)))


DECODERS: dict[Decoder, Callable[[bytes], NDArray[np.uint8]]] = {
    "full": full,
    "same": View(side=SIDE, channels=3).of_file,
}
"""``same`` is our stream's own: at the smallest scale that leaves enough pixels, crop and resize in one."""
