"""Pictures between the bytes of a file and uint8 arrays of shape [H, W, C]."""

import io
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from pipelines.errors import ConfigurationError

Pixels: TypeAlias = NDArray[np.uint8]
Encoding: TypeAlias = Literal["raw", "png", "jpeg", "keep", "in-place"]
Mode: TypeAlias = Literal["L", "RGB"]
Place: TypeAlias = tuple[float, float]
"""Where a cut is made in what is left over: the share of the rows and of the columns before it, each in 0..1."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
"""What is tried, by content: a PNG that is called .jpg is a PNG."""
MAX_PIXELS = 64_000_000
"""Pictures with more pixels than this are refused by their header, before anything is decoded."""
MAX_FILE_BYTES = 256 << 20
"""Files with more bytes than this are refused before they are fetched."""
MIDDLE = (0.5, 0.5)
EMPTY = "the file is empty"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a picture is put upright, by its EXIF orientation."""
_MAY_SAY_ORIENTATION = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")


class BadImageError(Exception):
    """A file that is not a picture that can be used; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class View:
    """How training sees a stored picture: its short side is made ``zoom`` times ``side`` pixels, and a square of
    ``side`` is cut out. One antialiased bicubic resize does both; a JPEG is decoded at half, a quarter or an eighth of
    its size first, as long as that leaves enough pixels."""

    side: int
    """Height and width of what is cut out, in pixels."""
    channels: Literal[1, 3]
    """1 for grey, 3 for RGB."""
    zoom: float = 1.0
    """1 leaves no choice along the short side; 1.125 leaves an eighth of ``side`` to cut from."""

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ConfigurationError(f"side of a view is {self.side}; it must be at least 1 pixel")
        if not 1 <= self.zoom <= 8:
            raise ConfigurationError(f"zoom of a view is {self.zoom}; it must lie in 1..8")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.side, self.side, self.channels

    @property
    def mode(self) -> Mode:
        return "L" if self.channels == 1 else "RGB"

    def of_file(self, data: bytes, at: Place = MIDDLE) -> Pixels:
        """Decode a PNG, JPEG or WebP file: uint8 [side, side, channels].

        Raises:
            BadImageError: whatever is wrong with the file, and nothing else.
        """
        try:
            # -(-x // 1) is x rounded up.
            image = _upright(data, self.mode, enough=int(-(-self.side * self.zoom // 1)))
            return np.asarray(self._cut(image, at)).reshape(self.shape)
        except BadImageError:
            raise
        except Exception as error:  # a decoder may raise anything at all on hostile bytes
            raise _bad(error) from error

    def of_pixels(self, pixels: Pixels, at: Place = MIDDLE) -> Pixels:
        """Look at pixels, uint8 [H, W, C], in the same way: uint8 [side, side, channels]."""
        height, width, channels = pixels.shape
        left, top, right, bottom = _box(width, height, self.side, self.zoom, at)
        if channels == self.channels and right - left == self.side:
            return pixels[int(top) : int(bottom), int(left) : int(right)]
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        return np.asarray(self._cut(image.convert(self.mode), at)).reshape(self.shape)

    def _cut(self, image: Image.Image, at: Place) -> Image.Image:
        return _square(image, self.side, self.zoom, at, Image.Resampling.BICUBIC)


def read_picture(data: bytes, channels: Literal[1, 3], side: int | None) -> Pixels:
    """Decode the bytes of an image file once and for all, upright, in grey or RGB, with the best of filters.

    Args:
        data: the content of a PNG, JPEG or WebP file; of an animated one the first picture is taken.
        channels: 1 for grey, 3 for RGB; transparency is laid over black.
        side: crop the middle square and resize it to side × side; None keeps the picture as it is.

    Returns:
        uint8 [H, W, channels].

    Raises:
        BadImageError: whatever is wrong with the file, and nothing else.
    """
    try:
        # Twice the pixels that are needed: what JPEG's own scaling does to the picture is then lost in the resize.
        image = _upright(data, "L" if channels == 1 else "RGB", enough=None if side is None else 2 * side)
        if side is not None:
            image = _square(image, side, 1.0, MIDDLE, Image.Resampling.LANCZOS)
    except BadImageError:
        raise
    except Exception as error:  # a decoder may raise anything at all on hostile bytes
        raise _bad(error) from error
    return np.asarray(image).reshape(image.height, image.width, channels)


def _bad(error: Exception) -> BadImageError:
    # Pillow names its file by the place in memory, which is another each time; what an ingest writes is not.
    said = re.sub(r" <[^<>]+ object at 0x[0-9a-f]+>", "", str(error))
    return BadImageError(f"{type(error).__name__}: {said}".replace("\n", " "))


def _upright(data: bytes, mode: Mode, enough: int | None) -> Image.Image:
    """Decode a file, upright, in a mode; a JPEG with at least ``enough`` pixels on a side, None for all of them."""
    if not data:
        raise BadImageError(EMPTY)
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImageError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
    if enough:
        image.draft(mode, (enough, enough))  # a JPEG decodes fewer coefficients; the others know nothing of it
    image.load()
    turn = _turn(image)
    if image.mode != mode or "transparency" in image.info:
        image = _flat(image).convert(mode)
    return image if turn is None else image.transpose(turn)


def _flat(image: Image.Image) -> Image.Image:
    """Return the picture in 8 bits and without transparency, which is laid over black."""
    if image.mode.startswith("I"):  # 16 bits; convert() would clip them
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return image


def _turn(image: Image.Image) -> Image.Transpose | None:
    if not any(word in image.info for word in _MAY_SAY_ORIENTATION):
        return None
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF turns nothing; the picture itself may be whole
        return None


def _box(width: int, height: int, side: int, zoom: float, at: Place) -> tuple[float, float, float, float]:
    """Return the square to cut out of a picture (left, top, right, bottom) that becomes side × side."""
    cut = min(width, height) / zoom
    top, left = at[0] * (height - cut), at[1] * (width - cut)
    if abs(cut - side) < 1e-6:  # nothing to resize: whole pixels stay what they are
        top, left, cut = round(top), round(left), side
    return left, top, min(left + cut, width), min(top + cut, height)


def _square(image: Image.Image, side: int, zoom: float, at: Place, resampling: Image.Resampling) -> Image.Image:
    """Cut and resize in one: only what is kept is computed, and nothing is rounded in between."""
    return image.resize((side, side), resampling, box=_box(*image.size, side, zoom, at), reducing_gap=2.0)


def encode(pixels: Pixels, encoding: Literal["raw", "png", "jpeg"], quality: int = 95) -> bytes:
    """Encode uint8 [H, W, C]; raw and png lose nothing, a JPEG keeps the colour of each pixel (4:4:4)."""
    if encoding == "raw":
        return pixels.tobytes()
    buffer = io.BytesIO()
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    if encoding == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def decode(data: list[bytes], encoding: Literal["raw", "png"], shape: tuple[int, int, int]) -> Pixels:
    """Decode what :func:`encode` made without loss of n pictures of one shape [H, W, C]: uint8 [n, H, W, C]."""
    if encoding == "raw":
        return np.frombuffer(b"".join(data), np.uint8).reshape(-1, *shape)
    pixels = np.empty((len(data), *shape), np.uint8)
    for row, item in zip(pixels, data, strict=True):
        row[:] = as_stored(item, shape)
    return pixels


def as_stored(data: bytes, shape: tuple[int, int, int]) -> Pixels:
    """Decode an image file that holds a picture of a shape [H, W, C], and in no other way than it is.

    Raises:
        BadImageError: if it cannot be decoded, or has another shape.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if (image.height, image.width) != shape[:2]:  # by the header: a bomb is not decoded
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            return np.asarray(image).reshape(shape)
    except Exception as error:
        raise _bad(error) from error


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
