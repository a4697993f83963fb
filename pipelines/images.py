"""Pictures between the bytes of a file and uint8 arrays of shape [H, W, C]."""

import io
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels: TypeAlias = NDArray[np.uint8]
Encoding: TypeAlias = Literal["raw", "png"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 64_000_000
"""Pictures with more pixels than this are refused by their header, before anything is decoded."""


class BadImageError(Exception):
    """A file that is not a picture that can be used; the message is the reason."""


def read_picture(data: bytes, channels: Literal[1, 3], side: int | None) -> Pixels:
    """Decode the bytes of an image file, upright, in grey or RGB.

    Args:
        data: the content of a PNG, JPEG or WebP file.
        channels: 1 for grey, 3 for RGB; transparency is laid over black.
        side: crop the middle square and resize it to side × side; None keeps the picture as it is.

    Returns:
        uint8 [H, W, channels].

    Raises:
        BadImageError: whatever is wrong with the file, and nothing else.
    """
    if not data:
        raise BadImageError("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImageError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "black"), upright.convert("RGBA"))
            if upright.mode.startswith("I"):  # 16 bits; convert() would clip them
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            picture = upright.convert("L" if channels == 1 else "RGB")
            if side is not None and picture.size != (side, side):
                picture = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
    except BadImageError:
        raise
    except Exception as error:  # a decoder may raise anything at all on hostile bytes
        raise BadImageError(f"{type(error).__name__}: {error}".replace("\n", " ")) from error
    return np.asarray(picture).reshape(picture.height, picture.width, channels)


def encode(pixels: Pixels, encoding: Encoding) -> bytes:
    """Encode uint8 [H, W, C] without loss."""
    if encoding == "raw":
        return pixels.tobytes()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def decode(data: list[bytes], encoding: Encoding, shape: tuple[int, int, int]) -> Pixels:
    """Decode what :func:`encode` made of n pictures of one shape [H, W, C]: uint8 [n, H, W, C]."""
    if encoding == "raw":
        return np.frombuffer(b"".join(data), np.uint8).reshape(-1, *shape)
    pixels = np.empty((len(data), *shape), np.uint8)
    for row, item in zip(pixels, data, strict=True):
        with Image.open(io.BytesIO(item), formats=("PNG",)) as image:
            row[:] = np.asarray(image).reshape(shape)
    return pixels


def grid(pixels: Pixels, columns: int, scale: int = 1, gap: int = 4) -> Pixels:
    """Lay n pictures [n, H, W, C] out in rows of ``columns``, each enlarged ``scale`` times, white between them."""
    larger = np.stack([_enlarged(picture, scale) for picture in pixels])
    n, height, width, channels = larger.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for i, picture in enumerate(larger):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def _enlarged(picture: Pixels, scale: int) -> Pixels:
    """Enlarge smoothly: an eye reads a digit of 8 × 8 pixels in its shades, not in its squares."""
    height, width, channels = picture.shape
    size = (width * scale, height * scale)
    layers = [Image.fromarray(picture[..., c]).resize(size, Image.Resampling.BICUBIC) for c in range(channels)]
    return np.stack([np.asarray(layer) for layer in layers], axis=-1)
