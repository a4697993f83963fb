import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image

from pipelines.errors import ConfigurationError
from pipelines.images import BadImageError, Pixels, View, decode, encode, read_picture


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exact(pixels: Pixels, view: View, at: tuple[float, float]) -> Pixels:
    """The view as its words say it: resize the whole picture, then cut, in so fine a grid that rounding is nothing."""
    height, width = pixels.shape[:2]
    scale = view.zoom * view.side / min(height, width)
    top, left = (at[0] * (height - view.side / scale), at[1] * (width - view.side / scale))
    box = (left, top, left + view.side / scale, top + view.side / scale)
    crop = Image.fromarray(pixels).transform(
        (view.side * 6,) * 2, Image.Transform.EXTENT, box, Image.Resampling.BICUBIC
    )
    return np.asarray(crop.resize((view.side,) * 2, Image.Resampling.BOX))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("side", [16, 53, 64, 100])
@pytest.mark.parametrize("at", [(0.5, 0.5), (1.0, 1.0), (0.1, 0.8)])
@pytest.mark.parametrize("zoom", [1.0, 1.25])
def test_a_view_is_what_it_says(kind: str, side: int, at: tuple[float, float], zoom: float) -> None:
    photograph = load_sample_image("china.jpg")  # 427 × 640
    view = View(side=side, channels=3, zoom=zoom)
    seen = view.of_file(file(Image.fromarray(photograph), kind, quality=95), at)
    assert seen.shape == view.shape == (side, side, 3) and seen.dtype == np.uint8
    wanted = exact(photograph, view, at).astype(int)
    assert np.abs(seen.astype(int) - wanted).mean() < 10
    others = [exact(photograph, view, other).astype(int) for other in ((0.5, 0.3), (0.5, 0.6))]
    assert all(np.abs(seen.astype(int) - other).mean() > 2 * np.abs(seen - wanted).mean() for other in others)


@pytest.mark.parametrize("side", [8, 26, 27, 53, 54, 106, 107, 213, 214, 300])
@pytest.mark.parametrize("zoom", [1.0, 1.25, 2.0])
def test_a_jpeg_is_decoded_no_smaller_than_it_is_needed(
    side: int, zoom: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """427 pixels: at an eighth 54, a quarter 107, a half 214; never smaller than side · zoom, nor twice as large."""
    decoded: list[int] = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, *args, **rest: decoded.append(min(self.size)) or resize(self, *args, **rest)
    )
    View(side=side, channels=3, zoom=zoom).of_file(file(Image.fromarray(load_sample_image("china.jpg")), "JPEG"))
    needed = side * zoom
    assert decoded[0] == min(size for size in (54, 107, 214, 427) if size > needed or size == 427)


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    side=st.integers(1, 30),
    zoom=st.floats(1, 8),
    at=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    channels=st.sampled_from([1, 3]),
)
def test_every_view_has_its_shape(
    height: int, width: int, side: int, zoom: float, at: tuple[float, float], channels: Any
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    view = View(side=side, channels=channels, zoom=zoom)
    seen = view.of_pixels(pixels, at)
    assert seen.shape == view.shape
    assert np.array_equal(view.of_file(encode(pixels, "png"), at), seen)


def test_where_nothing_is_resized_pixels_stay_what_they_are() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (72, 90, 3), np.uint8)
    view = View(side=64, channels=3, zoom=72 / 64)
    for at, top, left in (((0.5, 0.5), 4, 13), ((0, 0), 0, 0), ((1, 1), 8, 26), ((0.3, 0.9), 2, 23)):
        cut = pixels[top : top + 64, left : left + 64]
        assert np.array_equal(view.of_pixels(pixels, at), cut)
        assert np.array_equal(view.of_file(encode(pixels, "png"), at), cut)


def test_a_view_that_cannot_be_is_refused() -> None:
    for side, zoom in ((0, 1.0), (8, 0.9), (8, float("nan"))):
        with pytest.raises(ConfigurationError, match="of a view is"):
            View(side=side, channels=3, zoom=zoom)


def test_a_jpeg_keeps_the_colour_of_each_pixel() -> None:
    columns = np.zeros((16, 16, 3), np.uint8)
    columns[:, ::2, 0] = 255  # red and black in turn: 4:2:0 would make it one brown
    data = encode(columns, "jpeg", 95)
    assert np.abs(read_picture(data, channels=3, side=None).astype(int) - columns).mean() < 6
    assert len(encode(columns, "jpeg", 20)) < len(data)


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 3]),
    st.sampled_from(["raw", "png"]),
    st.integers(0, 2**32),
)
def test_encoding_loses_nothing(height: int, width: int, channels: int, encoding: Any, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, height, width, channels), np.uint8)
    data = [encode(picture, encoding) for picture in pixels]
    assert np.array_equal(decode(data, encoding, (height, width, channels)), pixels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_photograph_is_cropped_in_the_middle_and_resized(kind: str) -> None:
    photograph = load_sample_image("china.jpg")  # 427 × 640
    pixels = read_picture(file(Image.fromarray(photograph), kind), channels=3, side=64)
    middle = Image.fromarray(photograph[:, 106:533]).resize((64, 64), Image.Resampling.LANCZOS)
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels.astype(int) - np.asarray(middle).astype(int)).mean() < 8


def test_a_picture_of_the_right_size_is_left_alone(digits: tuple[np.ndarray, np.ndarray]) -> None:
    for picture in digits[0][:20]:
        assert np.array_equal(read_picture(encode(picture, "png"), channels=1, side=8), picture)


def test_a_turned_photograph_is_put_upright() -> None:
    image = Image.new("RGB", (20, 10), "black")
    image.paste("white", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: the left edge is the top
    pixels = read_picture(file(image, "JPEG", exif=exif, quality=95), channels=3, side=None)
    assert pixels.shape == (20, 10, 3)
    assert pixels[:8].min() > 200 and pixels[-8:].max() < 50


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_becomes_grey_or_rgb(mode: str) -> None:
    image = Image.new("L", (8, 8), 255).convert("I").convert("I;16") if mode == "I;16" else Image.new(mode, (8, 8))
    assert read_picture(file(image), channels=1, side=8).shape == (8, 8, 1)
    assert read_picture(file(image), channels=3, side=8).shape == (8, 8, 3)


def test_sixteen_bits_become_eight() -> None:
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    pixels = read_picture(file(Image.fromarray(ramp)), channels=1, side=8)
    assert np.array_equal(pixels[..., 0], ramp >> 8)


def test_cmyk_and_the_first_picture_of_an_animation_are_taken() -> None:
    red = Image.new("RGB", (8, 8), (200, 0, 0))
    pixels = read_picture(file(red.convert("CMYK"), "JPEG", quality=95), channels=3, side=8)
    assert pixels[..., 0].min() > 150 and pixels[..., 1:].max() < 60
    animated = file(red, "PNG", save_all=True, append_images=[Image.new("RGB", (8, 8), (0, 0, 200))])
    assert np.array_equal(read_picture(animated, channels=3, side=8), np.asarray(red))


def test_what_is_transparent_becomes_black() -> None:
    assert read_picture(file(Image.new("RGBA", (8, 8), (255, 255, 255, 0))), channels=3, side=8).max() == 0


GOOD = file(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (GOOD[: len(GOOD) // 2], "truncated|OSError"),
        (b"hello, I am a text", "cannot identify"),
        (file(Image.new("RGB", (8, 8)), "GIF"), "cannot identify"),
        (file(Image.new("1", (9000, 9000))), "9000 x 9000 pixels"),
    ],
    ids=["empty", "truncated", "text", "gif", "bomb"],
)
def test_a_bad_file_says_what_is_wrong_with_it(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        read_picture(data, channels=3, side=8)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_whatever_a_file_holds_nothing_else_is_raised(place: int, byte: int) -> None:
    data = bytearray(GOOD)
    data[place] = byte
    try:
        assert read_picture(bytes(data), channels=3, side=8).shape == (8, 8, 3)
        assert View(side=8, channels=1).of_file(bytes(data)).shape == (8, 8, 1)
    except BadImageError as error:
        assert str(error)
