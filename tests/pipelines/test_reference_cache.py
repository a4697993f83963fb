import logging
from pathlib import Path

import numpy as np
import pytest

from pipelines.moments import Moments
from pipelines.reference_cache import ReferenceCache
from pipelines.storage import Folder

ABOUT = {"digest": "d", "features": "pixels"}
KEPT = [Moments.of(np.random.default_rng(i).normal(size=(9 + i, 4))) for i in range(3)]


def test_what_was_kept_comes_back_to_the_last_digit_and_for_the_same_thing_only(folder: Folder) -> None:
    cache = ReferenceCache(folder, ABOUT)
    assert cache.load() is None
    cache.save(KEPT)
    found = ReferenceCache(folder, dict(reversed(ABOUT.items()))).load()
    assert found is not None and [one.n for one in found] == [9, 10, 11]
    for one, other in zip(found, KEPT, strict=True):
        np.testing.assert_array_equal(one.sum, other.sum)
        np.testing.assert_array_equal(one.outer, other.outer)
    assert ReferenceCache(folder, ABOUT | {"features": "others"}).load() is None


def test_nothing_is_kept_without_a_folder() -> None:
    cache = ReferenceCache(None, ABOUT)
    cache.save(KEPT)
    assert cache.load() is None


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "other"])
def test_a_damaged_cache_is_said_and_not_used(harm: str, folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    cache = ReferenceCache(folder, ABOUT)
    cache.save(KEPT)
    path = Path(folder.path(cache.name))
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[content.find(KEPT[0].outer.tobytes()[:16]) + 3] ^= 1
    elif harm == "other":
        elsewhere = ReferenceCache(folder, ABOUT | {"digest": "e"})
        elsewhere.save(KEPT)
        content = bytearray(folder.get(elsewhere.name))
    path.write_bytes(content[: {"cut": len(content) // 2, "empty": 0}.get(harm, len(content))])
    with caplog.at_level(logging.WARNING):
        assert cache.load() is None
    assert "are not used, but made anew" in caplog.text
    cache.save(KEPT)
    assert cache.load() is not None


def test_a_folder_that_cannot_be_written_costs_no_score(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = ReferenceCache(Folder(str(tmp_path / "file")), ABOUT)
    with caplog.at_level(logging.WARNING):
        cache.save(KEPT)
        assert cache.load() is None
    assert "are not kept" in caplog.text
