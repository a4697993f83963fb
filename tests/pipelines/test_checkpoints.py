import hashlib
import io
import json
import logging
import pickle
import shutil
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata, MetadataIndex

from models.schedule import article
from pipelines import checkpoints
from pipelines.errors import ConfigurationError, DataError, OtherFormatError, TryAgainError
from pipelines.fit import State, fit
from pipelines.fit_config import FitConfig
from pipelines.storage import Folder
from pipelines.world import World
from tests.pipelines.states import ABOUT, FIT, Ear, everything, micro_batches, tiny_state

ALONE = World()
Digits = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> tuple[Folder, State]:
    folder, tiny_fit = Folder(str(tmp_path_factory.mktemp("run"))), FIT
    state = tiny_state(tiny_fit)
    ear = Ear(lambda state: checkpoints.commit(folder, state, ABOUT, ALONE))
    fit(tiny_fit, state, article(), 0, micro_batches(digits[0], tiny_fit), ear)
    return folder, state


@pytest.fixture
def run(finished: tuple[Folder, State], folder: Folder) -> tuple[Folder, State]:
    """A finished run with checkpoints at 128, 256 and 384 images, to be harmed, and its last state."""
    shutil.copytree(finished[0].path(), folder.path())
    return folder, finished[1]


@pytest.mark.parametrize("position", [128, 256])
def test_going_on_from_a_checkpoint_ends_bit_for_bit_where_the_run_ended(
    position: int, run: tuple[Folder, State], digits: Digits, tiny_fit: FitConfig
) -> None:
    folder, whole = run
    state = tiny_state(tiny_fit, seed=1)  # other weights, to be replaced
    at = folder / checkpoints.folder_name(position)
    checkpoints.load(at, checkpoints.read(at), state)
    assert state.position == position
    fit(tiny_fit, state, article(), 0, micro_batches(digits[0], tiny_fit, start=position), Ear())
    assert torch.equal(everything(state), everything(whole))


def test_the_newest_is_found(run: tuple[Folder, State]) -> None:
    found = checkpoints.newest(run[0])
    assert found is not None and found[1].position == 384
    assert found[0].name == "checkpoint-000000000384"
    assert checkpoints.newest(run[0] / "nothing") is None


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda at: damage(at / "__0_0.distcp"), "has sha256"),
        (lambda at: damage(at / ".metadata"), "has sha256"),
        (lambda at: (at / "__0_0.distcp").unlink(), "does not exist"),
        (lambda at: (at / "__0_0.distcp").write_bytes(b"short"), "has 5 bytes"),
        (lambda at: (at / "manifest.json").unlink(), "was never committed"),
        (lambda at: (at / "manifest.json").write_text("{"), "is not the manifest of a checkpoint"),
    ],
    ids=["bit flipped", "index damaged", "shard missing", "shard short", "not committed", "manifest damaged"],
)
def test_what_is_damaged_is_passed_over_and_said(
    harm: object, said: str, run: tuple[Folder, State], caplog: pytest.LogCaptureFixture
) -> None:
    at = run[0] / checkpoints.folder_name(384)
    harm(Path(at.path()))  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        found = checkpoints.newest(run[0])
    assert found is not None and found[1].position == 256
    assert said in caplog.text and at.name in caplog.text


def test_one_of_another_format_is_not_passed_over(run: tuple[Folder, State]) -> None:
    """It is whole, and the first commit after an older one would sweep it."""
    at = run[0] / checkpoints.folder_name(384)
    told = json.loads(at.get(checkpoints.MANIFEST))
    assert told["format"] == 1
    at.put(checkpoints.MANIFEST, json.dumps(told | {"format": 2, "git_revision": "abc"}).encode())
    for find in (checkpoints.newest, checkpoints.choose):
        with pytest.raises(OtherFormatError, match=r"has format 2, .* knows 1: go on with .* revision abc"):
            find(run[0])
    del told["format"]  # as before there was one
    at.put(checkpoints.MANIFEST, json.dumps(told).encode())
    assert checkpoints.choose(run[0]) == 384


@pytest.mark.parametrize(
    ("harm", "position"),
    [
        (lambda at: (at / "__0_0.distcp").unlink(), 256),
        (lambda at: (at / "__0_0.distcp").write_bytes(b"short"), 256),
        (lambda at: (at / "manifest.json").unlink(), 256),
        (shutil.rmtree, 256),
        (lambda at: shutil.rmtree(at.parent / checkpoints.folder_name(256)), 384),
        (lambda at: damage(at / "__0_0.distcp"), 384),
    ],
    ids=["shard missing", "shard short", "not committed", "deleted", "an old one deleted", "bit flipped"],
)
def test_a_listing_finds_all_but_a_changed_byte(harm: object, position: int, run: tuple[Folder, State]) -> None:
    harm(Path((run[0] / checkpoints.folder_name(384)).path()))  # type: ignore[operator]
    found = checkpoints.newest(run[0], verified=False)
    assert found is not None and found[1].position == position


def test_where_the_stream_is_opened_is_where_the_workers_go_on(run: tuple[Folder, State]) -> None:
    """Though the one that they would find by a listing is another."""
    folder, _ = run
    damage(Path((folder / checkpoints.folder_name(384)).path()) / "__0_0.distcp")
    assert checkpoints.choose(folder) == 256
    found = checkpoints.chosen(folder)
    assert found is not None and (found[0].name, found[1].position) == (checkpoints.folder_name(256), 256)
    assert checkpoints.choose(folder / "new") == 0
    assert checkpoints.chosen(folder / "new") is None


def test_a_checkpoint_that_is_written_anew_does_not_look_committed_meanwhile(
    run: tuple[Folder, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, state = run
    at = Path((folder / checkpoints.folder_name(384)).path())
    damage(at / "__0_0.distcp")
    (at / "__1_0.distcp").write_bytes(b"of a run on two workers")
    seen = []

    def put(self: Folder, name: str, data: bytes) -> None:
        seen.append((name, sorted(path.name for path in at.iterdir()) if at.exists() else []))
        real(self, name, data)

    real = Folder.put
    monkeypatch.setattr(Folder, "put", put)
    again = checkpoints.commit(folder, state, ABOUT, ALONE)
    there = {name: names for name, names in seen if name in (*again.files, checkpoints.MANIFEST)}
    first, *_, last = there
    assert there[first] == [] and last == checkpoints.MANIFEST and there[last] == sorted(again.files)
    assert checkpoints.read_verified(folder / at.name) == again


def test_nothing_damaged_is_ever_given_to_torch(run: tuple[Folder, State], tiny_fit: FitConfig) -> None:
    at = run[0] / checkpoints.folder_name(384)
    about = checkpoints.read(at)
    damage(Path(at.path()) / ".metadata")
    state = tiny_state(tiny_fit, seed=1)
    before = everything_but_optimizer(state)
    with pytest.raises(DataError, match="sha256"):
        checkpoints.load(at, about, state)
    assert torch.equal(everything_but_optimizer(state), before)


class Program:
    """What a pickle may be: here, one that writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.path, "ran")


class OldPickler(pickle.Pickler):
    """Writes an Enum as Python 3.11.2 does, which Debian 12 has: by asking its class for an attribute of this name."""

    def reducer_override(self, value: object) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def rewritten(at: Folder, index: bytes) -> None:
    """Put another index into a checkpoint, with a manifest that agrees."""
    at.put(".metadata", index)
    about = checkpoints.read(at)
    files = about.files | {".metadata": (len(index), hashlib.sha256(index).hexdigest())}
    at.put(checkpoints.MANIFEST, json.dumps(asdict(replace(about, files=files))).encode())


def test_a_checkpoint_is_read_whichever_python_wrote_it(run: tuple[Folder, State]) -> None:
    at, data = run[0] / checkpoints.folder_name(384), io.BytesIO()
    OldPickler(data).dump(pickle.loads(at.get(".metadata")))
    assert b"getattr" in data.getvalue()
    before, after = tiny_state(FIT, seed=1).model, tiny_state(FIT, seed=2).model
    checkpoints.load_weights(at, checkpoints.read(at), before, averaged=False)
    rewritten(at, data.getvalue())
    checkpoints.load_weights(at, checkpoints.read(at), after, averaged=False)
    assert all(torch.equal(one, other) for one, other in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.parametrize("name", ["__class__", "mro", "no_such"])
def test_what_an_enum_is_asked_for_is_a_member(name: str, run: tuple[Folder, State]) -> None:
    class Asks:
        def __reduce__(self) -> Any:
            return getattr, (_MEM_FORMAT_ENCODING, name) if name != "no_such" else (PosixPath, "cwd")

    at = run[0] / checkpoints.folder_name(384)
    index = pickle.loads(at.get(".metadata"))
    index.planner_data = Asks()
    rewritten(at, pickle.dumps(index))
    with pytest.raises(DataError, match="has no place there"):
        checkpoints.load_weights(at, checkpoints.read(at), tiny_state(FIT).model, averaged=False)


@pytest.mark.parametrize("where", ["index", "within it", "item", "another index"])
def test_a_checkpoint_of_a_stranger_is_no_program(where: str, run: tuple[Folder, State], tmp_path: Path) -> None:
    """Whoever can write files can write their digests as well: an index that would do something is not read."""
    at = run[0] / checkpoints.folder_name(384)
    written, index = tmp_path / "written", pickle.loads(at.get(".metadata"))
    evil: object = Program(written)
    if where == "within it":
        index.planner_data, evil = evil, index
    if where == "item":  # which torch unpickles when it comes to it
        data = io.BytesIO()
        torch.save(evil, data)
        (first,) = [name for name in at.names() if name.endswith(".distcp")]
        place = next(key for key in index.state_dict_metadata if key.startswith("model."))
        stored = next(key for key in index.storage_data if key.fqn == place)
        info, evil = index.storage_data[stored], index
        index.state_dict_metadata[place] = BytesStorageMetadata()
        whole = at.get(first)
        index.storage_data[MetadataIndex(place)] = replace(info, offset=len(whole), length=len(data.getvalue()))
        at.put(first, whole + data.getvalue())
    if where == "another index":  # of a rank, to which torch goes when the first is of no use
        at.put("__0.metadata", pickle.dumps(evil))
        index.storage_meta, evil = 0, index
    at.put(".metadata", pickle.dumps(evil))
    about, names = checkpoints.read(at), [name for name in at.names() if name != checkpoints.MANIFEST]
    files = {name: (len(at.get(name)), hashlib.sha256(at.get(name)).hexdigest()) for name in names}
    at.put(checkpoints.MANIFEST, json.dumps(asdict(replace(about, files=files))).encode())
    assert checkpoints.read_verified(at).files == files, "all is as the manifest says"
    with pytest.raises(AssertionError if where == "another index" else DataError, match=r"index|metadata read failed"):
        checkpoints.load_weights(at, checkpoints.read(at), tiny_state(FIT).model, averaged=False)
    assert not written.exists()


def everything_but_optimizer(state: State) -> torch.Tensor:
    return torch.cat([v.detach().flatten().clone() for v in (*state.model.parameters(), *state.ema.shadow.values())])


def test_both_kinds_of_weights_are_read(run: tuple[Folder, State], tiny_fit: FitConfig) -> None:
    folder, whole = run
    found = checkpoints.newest(folder)
    assert found is not None
    for averaged in (False, True):
        model = tiny_state(tiny_fit, seed=1).model
        checkpoints.load_weights(*found, model, averaged)
        expected = whole.ema.shadow if averaged else dict(whole.model.named_parameters())
        for name, p in model.named_parameters():
            assert torch.equal(p, expected[name])


def test_only_the_newest_are_kept(run: tuple[Folder, State]) -> None:
    folder, _ = run
    (folder / checkpoints.folder_name(64)).put("__0_0.distcp", b"left by a crash")
    checkpoints.keep_newest(folder, 2, position=384)
    assert folder.names() == [checkpoints.folder_name(n) for n in (256, 384)]


def test_damaged_ones_beyond_never_push_out_the_one_just_written(run: tuple[Folder, State]) -> None:
    folder, _ = run
    for position in (256, 384):
        damage(Path((folder / checkpoints.folder_name(position)).path()) / "__0_0.distcp")
    (folder / checkpoints.folder_name(512)).put("__0_0.distcp", b"left by a crash")
    assert checkpoints.newest(folder)[1].position == 128  # type: ignore[index]
    checkpoints.keep_newest(folder, 2, position=128)
    assert folder.names() == [checkpoints.folder_name(128)]


def test_a_hiccup_of_storage_is_not_taken_for_damage(
    run: tuple[Folder, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reset(*_: object) -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(type(run[0].filesystem), "cat_file", reset)
    with pytest.raises(TryAgainError, match="does not answer: ConnectionResetError"):
        checkpoints.newest(run[0])


def test_a_folder_that_the_workers_do_not_share_is_refused(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Folder, "names", lambda self: [])  # as another node's disk has it
    with pytest.raises(ConfigurationError, match="is not the same folder for all workers"):
        checkpoints.commit(folder, tiny_state(FIT), ABOUT, ALONE)


def test_the_digest_names_the_content(run: tuple[Folder, State]) -> None:
    at = run[0] / checkpoints.folder_name(384)
    about = checkpoints.read(at)
    assert about.digest == checkpoints.read(at).digest
    assert about.digest != replace(about, position=1).digest
    assert json.loads(at.get("manifest.json"))["files"].keys() == {".metadata", "__0_0.distcp"}
