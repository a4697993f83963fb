"""What the folder of a run says of itself, and who is first to say it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from pipelines import run_folder
from pipelines.storage import Folder


@pytest.fixture(params=["on this machine", "on s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(str(tmp_path)) if request.param == "on this machine" else request.getfixturevalue("s3")


def test_starters_at_once_agree_on_a_run_and_count_themselves(folder: Folder) -> None:
    together = Barrier(8)

    def start(number: int) -> tuple[bool, str, int]:
        together.wait()
        first = run_folder.claim(folder, {"seed": number})
        return first, run_folder.run_id(folder), run_folder.count_start(folder, f"by: {number}")

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(start, range(8)))
    assert sum(first for first, _, _ in found) == 1 == len({run for _, run, _ in found})
    assert sorted(number for _, _, number in found) == list(range(1, 9))
    assert run_folder.identity(folder) == {"seed": [first for first, _, _ in found].index(True)}
    for by, (_, _, number) in enumerate(found):
        assert folder.get(f"start-{number:04d}.yaml") == f"by: {by}".encode()
