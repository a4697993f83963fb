import json

import numpy as np
import pytest

from pipelines.errors import ConfigurationError, DamagedError, DataError
from pipelines.images import View
from pipelines.picture_sets import Pair, as_seen
from pipelines.storage import Folder
from tests.pipelines.sets import write_data, write_samples

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (90, 8, 8, 1), dtype=np.uint8)
LARGE = RNG.integers(0, 256, (70, 12, 12, 1), dtype=np.uint8)
LABELS = np.arange(90) % 3


def as_set(pixels: np.ndarray) -> list[bytes]:
    return sorted(picture.tobytes() for picture in pixels)


@pytest.mark.usefixtures("alone")
def test_any_two_sets_are_read_part_by_part(folder: Folder) -> None:
    samples = write_samples(folder / "samples", PIXELS, LABELS, shard=40)
    write_data(folder / "data", PIXELS, LABELS)
    for first, second in ((samples, folder / "data"), (folder / "data", samples), (samples, samples)):
        pair = Pair.find(first, second)
        for one in (pair.samples, pair.reference):
            parts = [one.read(*bounds) for bounds in ((0, 35), (35, 85), (85, 90))]
            assert one.n == 90 and one.shape == (8, 8, 1)
            assert [len(part.image) for part in parts] == [35, 50, 5]
            assert np.concatenate([part.row for part in parts]).tolist() == list(range(90))
            assert as_set(np.concatenate([part.image for part in parts])) == as_set(PIXELS)
            by_picture = {p.tobytes(): label for part in parts for p, label in zip(part.image, part.label, strict=True)}
            assert all(by_picture[p.tobytes()] == label for p, label in zip(PIXELS, LABELS, strict=True))


def test_samples_come_in_the_order_of_their_seeds_across_files(folder: Folder) -> None:
    pair = Pair.find(write_samples(folder, PIXELS, shard=7), folder)
    np.testing.assert_array_equal(pair.samples.read(5, 30).image, PIXELS[5:30])


@pytest.mark.usefixtures("alone")
def test_data_are_seen_as_the_network_of_the_samples_saw_them(folder: Folder) -> None:
    data = write_data(folder / "data", LARGE)
    lineage = {"data_url": (folder / "data").url, "data_digest": data.digest, "zoom": 1.25}
    pair = Pair.find(write_samples(folder / "samples", PIXELS, **lineage), None)
    assert pair.reference.digest == data.digest and pair.reference.folder == folder / "data"
    view = View(side=8, channels=1, zoom=1.25)
    assert as_set(pair.reference.read(0, 70).image) == as_set(np.stack([view.of_pixels(picture) for picture in LARGE]))


@pytest.mark.usefixtures("alone")
def test_any_rows_of_data_are_read_piece_by_piece(folder: Folder) -> None:
    manifest = write_data(folder / "data", PIXELS)
    data = as_seen(folder / "data", manifest, 8, 1.0)
    rows = np.arange(3, 90, 2)
    pieces = list(data.pieces(rows, 10))
    assert [len(here) for here, _ in pieces] == [10, 10, 10, 10, 4]
    assert np.concatenate([here for here, _ in pieces]).tolist() == rows.tolist()
    np.testing.assert_array_equal(np.concatenate([some for _, some in pieces]), data.read(0, 90).image[rows])


@pytest.mark.usefixtures("alone")
def test_what_cannot_be_compared_is_refused(folder: Folder) -> None:
    small, large, rgb = folder / "small", folder / "large", folder / "rgb"
    write_data(small, PIXELS)
    write_data(large, LARGE)
    write_data(rgb, np.repeat(PIXELS, 3, axis=3))
    samples = write_samples(folder / "samples", PIXELS)
    larger = write_samples(folder / "larger", LARGE)
    for a, b, said in (
        (larger, small, "12 x 12 x 1, those of .* 8 x 8 x 1; they cannot be compared"),
        (samples, larger, "8 x 8 x 1, those of .* 12 x 12 x 1; they cannot"),
        (samples, rgb, "8 x 8 x 1, those of .* 8 x 8 x 3; they cannot"),
    ):
        with pytest.raises(DataError, match=said):
            Pair.find(a, b)
    with pytest.raises(
        ConfigurationError, match=r"side is 0; .* of 8 pixels and .* of 12: say which, such as --side 8"
    ):
        Pair.find(small, large)
    assert Pair.find(small, large, side=8).reference.shape == (8, 8, 1)
    with pytest.raises(DataError, match="cannot be compared"):
        Pair.find(small, large, side=12)
    with pytest.raises(ConfigurationError, match="side is 12; samples have the side that they were drawn at, 8"):
        Pair.find(samples, large, side=12)
    with pytest.raises(ConfigurationError, match=r"reference is empty, .* give --reference"):
        Pair.find(samples, None)
    with pytest.raises(ConfigurationError, match="reference is empty"):
        Pair.find(small, None)


def test_what_is_unfinished_or_damaged_is_refused(folder: Folder) -> None:
    with pytest.raises(DataError, match="is no finished set of samples, nor a data set"):
        Pair.find(folder, folder)
    samples = write_samples(folder / "samples", PIXELS)
    whole = write_samples(folder / "whole", PIXELS)
    path = samples.path("part-000000.parquet")
    with open(path, "r+b") as file:  # noqa: PTH123
        file.seek(40)
        file.write(b"\xff\xff\xff")
    with pytest.raises(DamagedError, match=r"part-000000\.parquet is not what was written"):
        Pair.find(samples, whole).samples.read(0, 5)
    samples.filesystem.rm(samples.path("_SUCCESS"))
    with pytest.raises(DataError, match="is no finished set of samples: it has no _SUCCESS"):
        Pair.find(samples, whole)
    samples.put("manifest.json", b"[1")
    with pytest.raises(DataError, match="cannot be read"):
        Pair.find(samples, whole)


@pytest.mark.usefixtures("alone")
def test_labels_are_compared_by_their_names(folder: Folder) -> None:
    data = write_data(folder / "data", PIXELS, LABELS)
    other = write_data(folder / "other", PIXELS, LABELS + 1)
    own = write_samples(folder / "own", PIXELS, LABELS, data_digest=data.digest)
    assert Pair.find(own, folder / "data").labels == ["0", "1", "2"], "what its network learned"
    with pytest.raises(DataError, match=r"per_class needs two sets with the same labels: .*/own has none; .* 1, 2, 3"):
        _ = Pair.find(own, folder / "other").labels
    with pytest.raises(DataError, match="the same labels"):
        _ = Pair.find(folder / "data", folder / "other").labels
    about = json.loads(own.get("manifest.json")) | {"labels": []}
    own.put("manifest.json", json.dumps(about).encode())
    with pytest.raises(DataError, match="/own has none"):  # its network knows none, though its data have some
        _ = Pair.find(own, folder / "data").labels
    about = json.loads(own.get("manifest.json")) | {"labels": other.labels}
    own.put("manifest.json", json.dumps(about).encode())
    assert Pair.find(own, folder / "other").labels == ["1", "2", "3"], "names that are on record"


def test_the_digest_of_samples_is_that_of_their_pictures(folder: Folder) -> None:
    first = Pair.find(write_samples(folder / "a", PIXELS), write_samples(folder / "b", PIXELS))
    assert first.samples.digest == first.reference.digest
    changed = PIXELS.copy()
    changed[80, 0, 0] ^= 1
    assert Pair.find(write_samples(folder / "c", changed), folder / "a").samples.digest != first.samples.digest
