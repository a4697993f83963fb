"""Checkpoints behind the back of the loop: what is in them, what is not, and what storage does to them."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from pipelines import checkpoints, dcp_files, saver, snapshots
from pipelines.errors import TryAgainError
from pipelines.saver import Saved, Saver
from pipelines.storage import Folder
from pipelines.world import World
from tests.faults.proxy import FaultProxy, Rule
from tests.pipelines.states import ABOUT, flat, fresh, loaded, stepped, tensors
from tests.processes import CODE, kill, side_by_side, wait_for

ALONE = World()


class Gate:
    """Holds a thread up before it writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        write = saver.write

        def when_open(*arguments: object) -> object:
            self.open.wait()
            return write(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(saver, "write", when_open)


def test_what_was_copied_is_what_is_saved_whatever_the_loop_does_next(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, state = Gate(monkeypatch), stepped(32)
    before = flat(state).clone()
    saves = Saver(folder, ABOUT, ALONE, keep=2)
    saves.save(state)
    for value in tensors(state):
        value.add_(1)
    state.position = 64
    assert not torch.equal(flat(state), before)
    gate.open.set()
    saves.flush()
    again = loaded(folder)
    assert again.position == 32
    assert torch.equal(flat(again), before)


def test_the_copy_of_the_second_save_is_not_that_of_the_first(folder: Folder) -> None:
    """The buffers are the same ones."""
    saves = Saver(folder, ABOUT, ALONE, keep=2)
    state = stepped(32)
    saves.save(state)
    with torch.no_grad():
        for p in state.model.parameters():
            p.add_(1)
    state.position = 64
    saves.save(state)
    saves.flush()
    assert torch.equal(flat(loaded(folder)), flat(state))
    first = fresh(seed=9)
    at = folder / checkpoints.folder_name(32)
    checkpoints.load(at, checkpoints.read(at), first)
    assert torch.equal(flat(first), flat(stepped(32)))


def test_a_save_waits_for_the_one_before_and_says_how_long(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, told = Gate(monkeypatch), list[Saved]()
    saves = Saver(folder, ABOUT, ALONE, 2, told.append)
    saves.save(stepped(32))
    assert not told
    threading.Timer(0.2, gate.open.set).start()
    saves.save(stepped(64))
    assert told[0].position == 32
    saves.flush()
    first, second = told
    assert second.waited_s > first.waited_s
    assert second.copied_s > 0 and not first.failure and not second.failure
    assert checkpoints.newest(folder)[1].position == 64  # type: ignore[index]


def test_what_goes_wrong_in_torch_is_not_taken_for_a_checkpoint(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch makes it an error that `except Exception` does not see."""

    def exhausted(*_: object) -> NoReturn:
        raise MemoryError("no more")

    told: list[Saved] = []
    saves = Saver(folder, ABOUT, ALONE, 2, told.append)
    with monkeypatch.context() as patched:
        patched.setattr(dcp_files.FileSystemWriter, "write_data", exhausted)
        saves.save(stepped(32))
        with pytest.raises(MemoryError, match="no more"):
            saves.flush()
    assert [saved.failure for saved in told] == ["MemoryError: no more"]
    assert checkpoints.newest(folder) is None
    saves.save(stepped(64))
    saves.flush()
    assert checkpoints.newest(folder)[1].position == 64  # type: ignore[index]


def test_the_newest_stay_with_their_snapshots(folder: Folder) -> None:
    saves = Saver(folder, ABOUT, ALONE, keep=2)
    for position in (32, 64, 96):
        saves.save(stepped(position))
    saves.flush()
    saves.flush()
    names = [checkpoints.folder_name(position) for position in (64, 96)]
    assert [name for name in folder.names() if name != "ema"] == names
    about = checkpoints.read(folder / names[-1])
    assert about.snapshots == (folder / "ema").names() and len(about.snapshots) == 6
    made = snapshots.average(folder, about.snapshots, 96, 0.05)
    power = stepped(96).ema.power["0.05"]
    assert all(torch.allclose(made[name], power[name], atol=1e-6) for name in power)


def test_a_full_disk_costs_checkpoints_and_leaves_the_last_one(tmp_path: Path) -> None:
    """A real one, of 16 MB, that others fill up twice. A checkpoint takes 3 MB of it."""
    mounted = f'mount -t tmpfs -o size=16m disk "{tmp_path}" && exec "$0" -m tests.pipelines.full_disk "{tmp_path}"'
    private = ["unshare", "--mount", *(["--map-root-user"] if os.getuid() else [])]
    done = subprocess.run(
        [*private, "sh", "-c", mounted, sys.executable], cwd=CODE, capture_output=True, text=True, check=False,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    first, second, third, fourth, fifth, end = done.stdout.splitlines()
    assert first == "100 100 "
    assert second.startswith("200 100 DataError: ") and "No space left on device; make room there" in second
    assert third == "300 300 ", "there was room again"
    assert fourth.startswith("400 300 ") and fifth.startswith("500 300 ")
    assert "2 checkpoints in a row could not be written" in end
    assert "No space left on device; make room there" in end
    assert f"the newest is file://{tmp_path}/run/{checkpoints.folder_name(300)}" in end
    assert "there is no checkpoint at 500 images" in done.stderr


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("BRICKYARD_RETRY_S", "0.3")
        yield proxy


def test_storage_that_fails_while_saving(s3: Folder, proxy: FaultProxy, caplog: pytest.LogCaptureFixture) -> None:
    told: list[Saved] = []
    saves = Saver(Folder(s3.url), ABOUT, ALONE, 2, told.append)
    saves.save(stepped(32))
    saves.flush()
    proxy.rules = [Rule("503", method="PUT", path="checkpoint")]
    saves.save(stepped(64))
    saves.save(stepped(96))  # the one before is lost, which is told
    assert "answers 503" in told[1].failure
    assert f"the newest is {s3.url}/{checkpoints.folder_name(32)}" in caplog.text
    with pytest.raises(TryAgainError, match=r"2 checkpoints in a row could not .* answers 503"):
        saves.save(stepped(128))
    proxy.rules, saves = [], Saver(Folder(s3.url), ABOUT, ALONE, 2)  # as the same command would
    saves.save(stepped(128))
    saves.flush()
    assert checkpoints.newest(s3)[1].position == 128  # type: ignore[index]
    proxy.rules = [Rule("503", method="PUT", path=r"checkpoint.*manifest")]
    saves.save(stepped(160))
    with pytest.raises(TryAgainError, match=r"the last checkpoint could not be written: .* answers 503"):
        saves.flush()
    assert checkpoints.newest(s3)[1].position == 128  # type: ignore[index]


def test_killed_in_the_middle_of_an_upload(s3: Folder, proxy: FaultProxy, caplog: pytest.LogCaptureFixture) -> None:
    proxy.rules = [Rule("slow", method="PUT", path=rf"{checkpoints.folder_name(64)}/__0_0", slow_s=60)]
    code = (
        "from pipelines.saver import Saver; from pipelines.storage import Folder; from pipelines.world import World\n"
        "from tests.pipelines.states import *\n"
        f"saves = Saver(Folder({s3.url!r}), ABOUT, World(), 2)\n"
        "for position in (32, 64):\n    saves.save(stepped(position))\n"
        "saves.flush()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=CODE, text=True, stderr=subprocess.PIPE)
    wait_for(lambda: any("64/__0_0" in path for method, path in proxy.requests if method == "PUT"), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    proxy.rules = []
    partial = s3 / checkpoints.folder_name(64)
    assert partial.names() == [".metadata"]
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest(s3)[1].position == 32  # type: ignore[index]
    assert f"{partial.url} was never committed" in caplog.text
    saves = Saver(s3, ABOUT, ALONE, 2)
    saves.save(stepped(48))
    saves.flush()
    assert [name for name in s3.names() if name != "ema"] == [checkpoints.folder_name(n) for n in (32, 48)]


def start(folder: Path, scenario: str, size: int, *more: str) -> list[int]:
    command = [sys.executable, "-W", "error", "-m", "tests.pipelines.saver_worker", folder, scenario, size]
    return side_by_side([*command, rank, *more] for rank in range(size))


def test_a_checkpoint_of_one_layout_is_that_of_all_others(tmp_path: Path) -> None:
    """Saved by two that share a network out, then loaded and saved by others, again and again."""
    assert start(tmp_path, "chain", 2, "fsdp:0", "ddp:1") == [0] * 2
    assert start(tmp_path, "chain", 4, "hybrid:2", "fsdp:3", "fsdp:4") == [0] * 4
    alone = loaded(Folder(f"{tmp_path}/run-4"))
    saves = Saver(Folder(f"{tmp_path}/run-5"), ABOUT, ALONE, 2)
    saves.save(alone)
    saves.flush()
    assert start(tmp_path, "chain", 2, "fsdp:6") == [0] * 2
    states = [loaded(Folder(f"{tmp_path}/run-{number}")) for number in range(7)]
    assert {state.position for state in states} == {64}
    assert float(flat(states[0]).abs().sum()) > 0 and not torch.equal(flat(states[0]), flat(fresh(0)))
    for state in states[1:]:
        assert torch.equal(flat(state), flat(states[0]))
    names = [checkpoints.read(checkpoints.newest(Folder(f"{tmp_path}/run-{number}"))[0]).snapshots  # type: ignore[index]
             for number in range(7)]  # fmt: skip
    for rank in range(4):
        brought = json.loads((tmp_path / f"brought-4-{rank}.json").read_text())
        assert sorted(brought) == sorted({".metadata", "__0_0.distcp", f"__{rank}_0.distcp"}), (
            "its own, and what all have"
        )
    assert names[0] and all(several == names[0] for several in names), "they have the digest of their bytes in them"


def test_all_learn_what_storage_did_to_one(tmp_path: Path) -> None:
    assert start(tmp_path, "refused", 2) == [0, 0]
    said = [json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(2)]
    assert said[0][0] == said[1][0]
    assert [bool(words) for words in said[0][0]] == [False, False, False, True]
    assert "2 checkpoints in a row could not be written" in said[0][0][3] and "File too large" in said[0][0][3]
    assert [("File too large" in words) for words in said[0][1]] == [False, True, True]
    run = Folder(f"{tmp_path}/run")
    assert run.names() == [checkpoints.folder_name(32), "ema"], "what rank 0 had delivered of the others is gone"
    assert checkpoints.newest(Folder(f"{tmp_path}/run"))[1].position == 32  # type: ignore[index]


def test_a_worker_that_dies_while_saving_is_not_waited_for(tmp_path: Path) -> None:
    assert start(tmp_path, "dies", 2) == [0, -signal.SIGKILL]
    assert (tmp_path / "said").exists()
    assert checkpoints.newest(Folder(f"{tmp_path}/run"))[1].position == 32  # type: ignore[index]


def test_a_worker_that_stands_still_at_a_checkpoint_is_not_taken_for_slow_storage(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.pipelines.saver_worker", str(tmp_path), "stands_still", "2"]
    waits, still = (
        subprocess.Popen([*command, str(rank)], cwd=CODE, text=True, stdout=subprocess.PIPE, start_new_session=True)
        for rank in range(2)
    )
    try:
        said, _ = waits.communicate(timeout=120)
    finally:
        kill(still)
        kill(waits)
    assert waits.returncode == 70, said
    assert "Hanging(" in said and "stands_still" in said, "where it stands"
