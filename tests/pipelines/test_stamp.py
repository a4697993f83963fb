import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from pipelines.errors import DataError
from pipelines.images import encode
from pipelines.stamp import MAX_BYTES, bare, stamp_of, stamped
from tests.pipelines.hostile import chunk

LINEAGE = {"seed": 7, "label": -1, "checkpoint_digest": "ab" * 32, "draw": {"steps": 20, "sampler": "dpm-solver"}}
PICTURE = np.arange(48 * 3, dtype=np.uint8).reshape(6, 8, 3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        body = png[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", png, at + 8 + length)[0] == zlib.crc32(kind + body)
        found.append((kind, body))
        at += 12 + length
    assert at == len(png)
    return found


def png(*before_pixels: bytes) -> bytes:
    plain = encode(PICTURE, "png")
    return b"".join([plain[:33], *before_pixels, plain[33:]])


def text(kind: bytes, content: bytes) -> bytes:
    return chunk(kind, b"brickyard\0" + content)


def palette() -> bytes:
    """A PNG of many chunks, whose order counts: the palette before its transparency, both before the pixels."""
    image = Image.fromarray(PICTURE[..., 0] % 4).convert("P")
    image.putpalette(list(range(12)))
    about = PngImagePlugin.PngInfo()
    about.add_text("Author", "somebody")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=1, dpi=(72, 72), pnginfo=about)
    return buffer.getvalue()


@pytest.mark.parametrize("plain", [png(), palette()], ids=["plain", "palette"])
def test_pillow_reads_the_lineage_and_the_pixels_are_not_touched(plain: bytes) -> None:
    carried = stamped(plain, LINEAGE)
    with Image.open(io.BytesIO(carried)) as image, Image.open(io.BytesIO(plain)) as before:
        assert json.loads(image.text["brickyard"]) == LINEAGE  # type: ignore[attr-defined]  # before it is decoded
        assert image.mode == before.mode and image.info.get("transparency") == before.info.get("transparency")
        assert image.tobytes() == before.tobytes()
    with_it = chunks(carried)
    assert with_it.pop(1)[0] == b"tEXt" and with_it == chunks(plain)
    assert stamp_of(carried) == LINEAGE and stamp_of(plain) is None


def test_a_second_stamp_takes_the_place_of_the_first() -> None:
    again = stamped(stamped(png(), {"seed": 1}), LINEAGE)
    assert again == stamped(png(), LINEAGE) and stamped(again, LINEAGE) == again


@pytest.mark.parametrize("plain", [png(), palette(), png() + b"more"], ids=["plain", "palette", "more"])
def test_without_its_stamps_a_picture_is_what_it_was(plain: bytes) -> None:
    wrong = text(b"tEXt", b"{}")[:-1] + b"?"
    assert bare(stamped(plain, LINEAGE)) == bare(plain) == plain
    assert bare(plain[:33] + wrong + text(b"iTXt", b"") + plain[33:]) == plain


def test_what_follows_the_end_stays() -> None:
    assert stamped(png() + b"more", LINEAGE) == stamped(png(), LINEAGE) + b"more"


@given(st.dictionaries(st.text(max_size=9), JSON, max_size=3))
def test_any_json_comes_back(lineage: dict[str, object]) -> None:
    assert stamp_of(stamped(png(), lineage)) == lineage


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("international", [False, True])
def test_a_program_may_write_the_text_as_it_likes(zipped: bool, international: bool) -> None:
    about, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    add = about.add_itxt if international else about.add_text
    add("brickyard", json.dumps(LINEAGE), zip=zipped)
    Image.fromarray(PICTURE).save(buffer, "PNG", pnginfo=about)
    assert stamp_of(buffer.getvalue()) == LINEAGE
    assert stamp_of(stamped(buffer.getvalue(), {"seed": 1})) == {"seed": 1}


BOMB = zlib.compress(b'{"a":"' + b" " * (64 << 20) + b'"}')
HOSTILE = {
    "not one": (b"GIF89a", "does not begin like one"),
    "no header": (png()[:8] + png()[33:], "first chunk is b'IDAT'"),
    "long": (png(text(b"tEXt", b'"' + b"a" * (1 << 20) + b'"')), f"longer than {MAX_BYTES}"),
    "a little too long": (png(text(b"tEXt", b'"' + b"a" * MAX_BYTES + b'"')), f"longer than {MAX_BYTES}"),
    "a bomb": (png(text(b"zTXt", b"\0" + BOMB[: 60 << 10])), f"longer than {MAX_BYTES}"),
    "a bomb in iTXt": (png(text(b"iTXt", b"\1\0\0\0" + BOMB[: 60 << 10])), f"longer than {MAX_BYTES}"),
    "not deflated": (png(text(b"zTXt", b"\0nonsense")), "damaged"),
    "cut iTXt": (png(text(b"iTXt", b"\1\0en")), "its iTXt chunk is cut off"),
    "empty iTXt": (png(text(b"iTXt", b"")), "its iTXt chunk is cut off"),
    "empty zTXt": (png(text(b"zTXt", b"")), "is not JSON"),
    "no JSON": (png(text(b"tEXt", b"seed 7")), "is not JSON"),
    "no UTF-8": (png(text(b"tEXt", b'{"a":"\xff"}')), "is not JSON"),
    "no object": (png(text(b"tEXt", b"[7]")), "no object"),
    "deep": (png(text(b"tEXt", b"[" * MAX_BYTES)), "is not JSON"),
    "large number": (png(text(b"tEXt", b'{"seed":' + b"9" * 60000 + b"}")), "is not JSON"),
    "two": (png(text(b"tEXt", b'{"seed":1}'), text(b"tEXt", b'{"seed":2}')), "carries more than one lineage"),
    "a wrong CRC": (png(text(b"tEXt", b'{"seed":1}')[:-1] + b"?"), "its CRC differs"),
    "a length beyond the end": (png()[:33] + b"\xff\xff\xff\xfftEXtbrickyard\0", "must have 4294967295 bytes"),
}


@pytest.mark.parametrize(("data", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_picture_is_told_what_is_wrong_with_it(data: bytes, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        stamp_of(data)
    assert reason in str(caught.value)


def test_of_many_stamps_no_more_than_two_are_looked_at() -> None:
    """The file is cut off after the second, which nobody gets to learn."""
    twice = png(text(b"tEXt", b'{"seed":1}'), text(b"tEXt", b'{"seed":2}'), b"\xff\xff\xff\xfftEXt")
    with pytest.raises(DataError, match="more than one lineage"):
        stamp_of(twice)


def test_a_picture_that_is_cut_off_anywhere_is_known_to_be() -> None:
    whole = stamped(palette(), LINEAGE)
    for length in range(len(whole)):
        for ask in (stamp_of, lambda data: stamped(data, LINEAGE)):
            with pytest.raises(DataError):
                ask(whole[:length])


def test_a_lineage_that_is_too_long_is_not_written() -> None:
    with pytest.raises(DataError, match="too long for a stamp"):
        stamped(png(), {"a": "b" * MAX_BYTES})
