import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from pipelines.errors import DataError
from pipelines.fingerprint import fingerprint, fingerprints
from pipelines.neighbours import Block, Nearest, Queries, nearest, recut, squared_distances

Digits = tuple[np.ndarray, np.ndarray]


def block(pixels: np.ndarray, rows: np.ndarray, scale: float = 255, offset: float = 0, mirrored: bool = False) -> Block:
    seen = [pixels[rows], pixels[rows][:, :, ::-1]][: 1 + mirrored]
    vectors = [np.ascontiguousarray(view.reshape(len(view), -1) / scale + offset) for view in seen]
    return Block(rows, vectors, [fingerprints(view) for view in seen])


def queries(pixels: np.ndarray, own: np.ndarray | None = None, scale: float = 255, offset: float = 0) -> Queries:
    vectors = pixels.reshape(len(pixels), -1) / scale + offset
    return Queries(vectors, np.full(len(pixels), -1) if own is None else own, fingerprints(pixels))


def in_blocks(asked: Queries, pixels: np.ndarray, cuts: list[int], k: int, order: int = 1, **how: object) -> Nearest:
    found = Nearest.none(len(asked.features), k)
    for rows in np.split(np.arange(len(pixels)), cuts)[::order]:
        if len(rows):
            found = found.merged(nearest(asked, block(pixels, rows, **how), k))  # type: ignore[arg-type]
    return found


def by_integers(asked: np.ndarray, pixels: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest by whole numbers, in which nothing is rounded, and of equal ones the lower row."""
    a, b = (np.int64(part.reshape(len(part), -1)) for part in (asked, pixels))
    squared = np.stack([np.square(b - one).sum(1) for one in a])
    row = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(squared, row, 1), row


def test_the_neighbours_of_real_digits_are_those_of_scikit_learn(digits: Digits) -> None:
    pixels = digits[0]
    found = nearest(queries(pixels, np.arange(1797)), block(pixels, np.arange(1797)), 50)
    features = pixels.reshape(1797, -1) / 255
    distance, row = NearestNeighbors(algorithm="brute").fit(features).kneighbors(features, 51)
    np.testing.assert_allclose(np.sqrt(found.squared), distance[:, 1:], atol=1e-12)
    tied = np.isclose(distance[:, 1], distance[:, 2], rtol=0, atol=1e-12)  # of which either is the nearest to them
    assert tied.sum() < 20 and (found.row[~tied, 0] == row[~tied, 1]).all()


@pytest.mark.parametrize("offset", [0, 1 << 29])
def test_ties_and_near_ties_are_told_apart_as_by_whole_numbers(digits: Digits, offset: int) -> None:
    """Far from the origin a matrix product knows squares to thousands only: what it may not decide is decided."""
    pixels = digits[0]
    asked = queries(pixels[:300], scale=1, offset=offset)
    found = in_blocks(asked, pixels, [1790, 1791], 20, scale=1, offset=offset)
    squared, row = by_integers(pixels[:300], pixels, 20)
    assert (found.squared == squared).all() and (found.row == row).all()


@given(st.lists(st.integers(0, 400), max_size=6), st.sampled_from([1, -1]), st.integers(1, 30), st.booleans())
def test_no_bit_depends_on_the_blocks_or_their_order(
    digits: Digits, cuts: list[int], order: int, k: int, mirrored: bool
) -> None:
    base = np.concatenate([digits[0][:350], digits[0][:50]])  # with rows that are there twice
    asked = queries(digits[0][300:400], np.arange(300, 400))
    whole = in_blocks(asked, base, [], k, mirrored=mirrored)
    for mine, theirs in zip(whole, in_blocks(asked, base, sorted(cuts), k, order, mirrored=mirrored), strict=True):
        assert mine.tobytes() == theirs.tobytes()


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 12))
def test_queries_are_cut_anew_whatever_files_they_were_in(digits: Digits, files: list[int], size: int) -> None:
    n = sum(files)
    whole = queries(digits[0][:120], np.arange(120)).of(slice(n))
    ends = np.cumsum(files)
    several = [whole.of(slice(end - one, end)) for one, end in zip(files, ends, strict=True)]
    parts = list(recut(several, lambda numbers: size + numbers - 64))
    assert [len(part.own) for part in parts] == [size] * (n // size) + [n % size] * (n % size > 0)
    for name in ("own", "features", "fingerprint"):
        joined = [getattr(part, name) for part in parts]
        assert not n or np.concatenate(joined).tobytes() == getattr(whole, name).tobytes()


def test_a_distance_depends_on_nothing_but_the_two(digits: Digits) -> None:
    features = digits[0].reshape(1797, -1) / 255
    together = squared_distances(features[7], features)
    assert all(squared_distances(features[7], features[i : i + 1])[0] == together[i] for i in range(0, 1797, 13))


def test_equal_pictures_come_in_the_order_of_their_rows() -> None:
    """All are as near as the others, so all are candidates: memory holds, and the lowest rows win."""
    pixels = np.full((1000, 4, 4, 1), 7, np.uint8)
    found = in_blocks(queries(pixels[:3], np.array([0, 1, -1])), pixels, [300, 700], 4, order=-1)
    assert found.row.tolist() == [[1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 2, 3]]
    assert found.same.tolist() == [1, 0, 0] and not found.squared.any()


def test_fewer_rows_than_neighbours_leave_the_rest_open(digits: Digits) -> None:
    found = in_blocks(queries(digits[0][:2], np.array([0, -1])), digits[0][:3], [1], 5)
    assert (found.row[0, 2:] == -1).all() and np.isinf(found.squared[0, 2:]).all()
    assert set(found.row[0, :2].tolist()) == {1, 2} and set(found.row[1, :3].tolist()) == {0, 1, 2}


def test_a_mirror_image_counts_where_it_is_to(digits: Digits) -> None:
    turned = np.ascontiguousarray(digits[0][[3, 40, 200]][:, :, ::-1])
    assert (nearest(queries(turned), block(digits[0], np.arange(1797)), 1).same == -1).all()
    found = in_blocks(queries(turned), digits[0], [100], 1, mirrored=True)
    assert found.row[:, 0].tolist() == found.same.tolist() == [3, 40, 200]
    assert found.mirrored.all() and not found.squared.any()


def test_features_that_are_no_numbers_are_refused(digits: Digits) -> None:
    asked = queries(digits[0][:4])
    asked.features[2, 5] = np.nan
    with pytest.raises(DataError, match="features of 1 of 4 pictures are not finite"):
        nearest(asked, block(digits[0], np.arange(10)), 2)


def test_a_fingerprint_knows_the_shape_and_every_pixel(digits: Digits) -> None:
    picture = digits[0][0]
    other = picture.copy()
    other[7, 7, 0] ^= 1
    kinds = [picture, other, picture.reshape(4, 16, 1), picture.reshape(8, 4, 2)]
    assert len({fingerprint(one) for one in kinds}) == 4
    assert fingerprint(picture[:, ::-1][:, ::-1]) == fingerprint(picture)  # however it lies in memory
