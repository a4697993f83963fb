"""Files as people really have them, and as nobody should: what each is, and what must become of it."""

import io
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from pipelines.images import Pixels
from pipelines.storage import Folder

NOT_IMAGES = ("notes.txt", "Thumbs.db", "sub/.DS_Store", "picture.gif", "no suffix")
"""Names that are passed over: they are neither good nor bad."""


class Case(NamedTuple):
    """A file, and what it must become."""

    data: bytes
    pixels: Pixels | None
    """uint8 [H, W, 3] as it must be decoded, upright, in RGB; None if it must be quarantined."""
    close: float = 0.0
    """The mean difference from these that lossy encoders may make."""
    reason: str = ""
    """What the quarantine must say, as a regular expression."""


def photograph() -> Pixels:
    """Return a picture that is not its own mirror image in any way: uint8 [48, 64, 3]."""
    whole = Image.fromarray(load_sample_image("flower.jpg")).resize((80, 60))
    return np.array(whole)[6:54, 10:74]


def file(picture: Pixels | Image.Image, kind: str, **options: Any) -> bytes:
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return one chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, bits: int, colour: int, lines: bytes, extra: bytes = b"") -> bytes:
    """Return a PNG made by hand, such as no library of ours would write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def grey(pixels: Pixels) -> Pixels:
    """Return grey pixels [H, W] as RGB."""
    return np.repeat(pixels[..., None], 3, axis=2)


def good() -> dict[str, Case]:
    """Return what must be used, by name."""
    picture = photograph()
    height, width, _ = picture.shape
    plain = file(picture, "PNG")
    cases = {
        "plain.png": Case(plain, picture),
        "UPPER.PNG": Case(plain, picture),
        "plain.jpg": Case(file(picture, "JPEG", quality=95), picture, 4),
        "progressive.JPeG": Case(file(picture, "JPEG", quality=95, progressive=True), picture, 4),
        "trailing.jpg": Case(file(picture, "JPEG", quality=95) + b"\0 and more", picture, 4),
        "plain.webp": Case(file(picture, "WEBP", lossless=True), picture),
        "really-a-png.jpg": Case(plain, picture),
        "really-a-jpeg.webp": Case(file(picture, "JPEG", quality=95), picture, 4),
        "cmyk.jpg": Case(file(Image.fromarray(picture).convert("CMYK"), "JPEG", quality=95), picture, 4),
        "grey.jpg": Case(file(picture[..., 0], "JPEG", quality=95), grey(picture[..., 0]), 3),
        "one-bit.png": Case(
            file(Image.fromarray(picture[..., 0] > 99), "PNG"), grey((picture[..., 0] > 99) * np.uint8(255))
        ),
        "30000-wide.png": Case(file(np.tile(picture[:2], (1, 469, 1)), "PNG"), np.tile(picture[:2], (1, 469, 1))),
    }
    deep = picture[..., 0].astype(np.uint16) * 257 ^ 0x0055  # the low byte is not that of the high one
    sixteen = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    cases["sixteen-grey.png"] = Case(png(width, height, 16, 0, sixteen), grey((deep >> 8).astype(np.uint8)))
    deep = picture.astype(np.uint16) * 256 + 0xAA
    sixteen = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    cases["sixteen-rgb.png"] = Case(png(width, height, 16, 2, sixteen), picture)

    index = (picture[..., 0] // 64).astype(np.uint8)  # 0..3
    palette = np.array([[250, 10, 20], [1, 200, 2], [3, 4, 150], [90, 80, 70]], np.uint8)
    lines = b"".join(b"\0" + row.tobytes() for row in index)
    extra = chunk(b"PLTE", palette.tobytes())
    cases["palette.png"] = Case(png(width, height, 8, 3, lines, extra), palette[index])
    seen = np.where(index[..., None] == 1, 0, palette[index]).astype(np.uint8)
    clear = chunk(b"tRNS", bytes([255, 0]))  # entry 1 is not to be seen
    cases["palette-transparent.png"] = Case(png(width, height, 8, 3, lines, extra + clear), seen)
    alpha = np.where(picture[..., :1] > 99, 255, 0).astype(np.uint8)
    over_black = np.where(alpha > 0, picture, 0).astype(np.uint8)
    layered = Image.fromarray(np.concatenate([picture, alpha], axis=2))
    cases["transparent.png"] = Case(file(layered, "PNG"), over_black)
    cases["transparent.webp"] = Case(file(layered, "WEBP", lossless=True, exact=True), over_black)
    key = chunk(b"tRNS", struct.pack(">HHH", *palette[2].tolist()))
    lines = b"".join(b"\0" + row.tobytes() for row in palette[index])
    seen = np.where(index[..., None] == 2, 0, palette[index]).astype(np.uint8)
    cases["colour-key.png"] = Case(png(width, height, 8, 2, lines, key), seen)

    more = [Image.fromarray(picture[::-1]), Image.fromarray(255 - picture)]
    animated: dict[str, Any] = {"save_all": True, "append_images": more, "duration": 50}
    cases["animated.png"] = Case(file(picture, "PNG", **animated), picture)
    cases["animated.webp"] = Case(file(picture, "WEBP", lossless=True, **animated), picture)

    turned = {
        1: picture, 2: picture[:, ::-1], 3: picture[::-1, ::-1], 4: picture[::-1], 5: picture.transpose(1, 0, 2),
        6: np.rot90(picture, -1), 7: picture[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(picture),
    }  # fmt: skip
    for orientation, upright in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        cases[f"exif-{orientation}.jpg"] = Case(file(picture, "JPEG", quality=95, exif=exif), upright, 4)
    exif[0x0112] = 6
    cases["exif.png"] = Case(file(picture, "PNG", exif=exif), turned[6])
    cases["exif.webp"] = Case(file(picture, "WEBP", lossless=True, exif=exif), turned[6])
    nonsense = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"
    cases["exif-nonsense.jpg"] = Case(file(picture, "JPEG", quality=95, exif=nonsense), picture, 4)

    for name in (
        "with spaces.png", "ünï çødé 日本語 🧱.png", "hash#tag.png", "100%.png", "per%20cent.png", "what?.png",
        "star*.png", "[1].png", "{a,b}.png", "a+b&c=d;e.png", "'quote\".png", "-dash.png", "~tilde.png", "co:lon@.png",
        "a.b.c.png",
    ):  # fmt: skip
        cases[name] = Case(plain, picture)
    return cases


def bad() -> dict[str, Case]:
    """Return what must be quarantined, by name."""
    picture = photograph()
    noise = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    plain, jpeg = file(picture, "PNG"), file(picture, "JPEG", quality=95)
    webp = file(picture, "WEBP", quality=80)
    size = jpeg.index(b"\xff\xc0") + 5
    huge_jpeg = jpeg[:size] + struct.pack(">HH", 65000, 65000) + jpeg[size + 4 :]
    text = chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(100 << 20), 9))
    files = {
        "empty.png": (b"", "the file is empty"),
        "empty.jpg": (b"", "the file is empty"),
        "truncated.png": (plain[: len(plain) // 2], "truncated|Truncated"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.webp": (webp[: len(webp) // 2], "Error"),
        "header-only.jpg": (jpeg[:4], "Error"),
        "text.png": (b"I am a text, whatever my name says.", "cannot identify"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "cannot identify"),
        "noise.webp": (noise, "cannot identify"),
        "really-a-gif.png": (file(picture, "GIF"), "cannot identify"),
        "really-a-tiff.jpg": (file(picture, "TIFF"), "cannot identify"),
        "._photograph.jpg": (b"\0\x05\x16\x07\0\x02\0\0Mac OS X" + bytes(64), "cannot identify"),
        "bomb.png": (png(30_000, 30_000, 8, 2, b""), "pixel"),
        "large.png": (png(9_000, 8_000, 1, 0, b""), "9000 x 8000 pixels are more than"),
        "bomb.jpg": (huge_jpeg, "pixel"),
        "text-bomb.png": (png(8, 8, 8, 0, bytes(72), text), "too large"),
        "flipped.png": (plain[:60] + bytes([plain[60] ^ 255]) + plain[61:], "Error"),
        "no-pixels.png": (png(0, 0, 8, 2, b""), "Error"),
    }
    return {name: Case(data, None, reason=reason) for name, (data, reason) in files.items()}


def write_hostile(folder: Folder) -> dict[str, Case]:
    """Write every good and bad file, and some that are no images, into a folder. Return the first two, by name."""
    cases = {**good(), **bad()}
    for name, case in cases.items():
        folder.put(name, case.data)
    for name in NOT_IMAGES:
        folder.put(name, b"not an image, and not taken for one")
    return cases
