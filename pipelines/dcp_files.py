"""The files of torch.distributed.checkpoint without a disk between: what is saved lies in memory until it is uploaded,
what is loaded is brought and verified when it is asked for.
"""

import io
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from pipelines.errors import DamagedError

INDEX = ".metadata"
"""The file that says where everything is. torch unpickles it, and so would run whatever stands in it."""
PARTS = {
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}  # fmt: skip
"""What an index is made of. Nothing of this does anything when it is made."""
# For good, not around the calls: the filters are all threads', and one that saves would change them under the others.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def dump(content: dict[str, Any], world_size: int, group: dist.ProcessGroup | None) -> dict[str, bytes]:
    """Return this worker's part of the files that hold some content, by name. (all ranks)

    Args:
        content: tensors by name, in groups, which may be sharded. What several ranks have is written by one of them: by
            each its share, but where some are sharded by the lowest, so that a worker finds what it needs later in few
            files.
        world_size: W; a worker that is alone needs no group.
        group: whom to agree with on who writes what.
    """
    writer = FileSystemWriter("", sync_files=False)
    writer.fs = files = _Memory()
    sharded = any(isinstance(value, DTensor) for values in content.values() for value in values.values())
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=sharded)
    with _what_failed():
        dcp.save(content, storage_writer=writer, planner=planner, process_group=group, no_dist=world_size == 1)
    return {name: data for name, kept in files.kept.items() if (data := kept.getvalue())}


def fill(content: dict[str, Any], bring: Callable[[str], io.BytesIO]) -> None:
    """Fill nested dictionaries of tensors in place, each worker for itself.

    Args:
        content: the tensors, of any sharding; those that hold a part ask for the files of that part only.
        bring: returns the bytes of a file, as good as they were; what it raises goes through.

    Raises:
        DamagedError: if the index is more than an index of tensors: whoever wrote it may have had other things in mind.
    """
    index = bring(INDEX)  # before torch, which would take an error here for a file of another kind
    _check(index)
    reader = FileSystemReader("")
    # Of an index that it can make nothing of torch would read others, one for each rank.
    reader.fs = _Brought(lambda name: index if name.endswith(INDEX) else bring(name))
    with _what_failed():
        dcp.load(content, storage_reader=reader, no_dist=True)


def _check(index: io.BytesIO) -> None:
    try:
        found = _Index(index).load()
        tensors = all(isinstance(one, TensorStorageMetadata) for one in found.state_dict_metadata.values())
        index.seek(0)
    except Exception as error:  # pickle raises whatever comes to pass
        raise DamagedError(f"the index of a checkpoint ({INDEX}) is none, and is not read: {error}") from error
    if not tensors:  # torch unpickles the others too
        raise DamagedError(f"the index of a checkpoint ({INDEX}) is of more than tensors, and is not read")


class _Index(pickle.Unpickler):
    """Reads an index, and makes nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # which before Python 3.11.4 is how an Enum is pickled
            return _member
        if name not in PARTS.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place there")
        return super().find_class(module, name)


def _member(of: Any, name: str) -> Any:
    if of is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"{of}.{name} has no place there")
    return _MEM_FORMAT_ENCODING[name]


@contextmanager
def _what_failed() -> Iterator[None]:
    """Raise what went wrong, on whichever rank: torch wraps it into what is no Exception."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


class _Memory(FileSystemBase):  # type: ignore[misc]
    """Takes what a writer of torch's writes."""

    def __init__(self) -> None:
        self.kept: dict[str, _Kept] = {}

    @contextmanager
    def create_stream(self, path: str, mode: str) -> Iterator[io.BytesIO]:
        self.kept[path] = stream = _Kept()
        yield stream

    def concat_path(self, path: str, suffix: str) -> str:
        return suffix

    def init_path(self, path: str) -> str:
        return os.fspath(path)

    def mkdir(self, path: str) -> None:
        pass

    def rename(self, path: str, new_path: str) -> None:
        self.kept[new_path] = self.kept.pop(path)

    def exists(self, path: str) -> bool:
        return path in self.kept

    def rm_file(self, path: str) -> None:
        del self.kept[path]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str) -> bool:
        return True


class _Brought(_Memory):
    """Gives a reader of torch's what it asks for."""

    def __init__(self, bring: Callable[[str], io.BytesIO]) -> None:
        super().__init__()
        self._bring = bring

    @contextmanager
    def create_stream(self, path: str, mode: str) -> Iterator[io.BytesIO]:
        yield self._bring(path)


class _Kept(io.BytesIO):
    """Bytes that are still there after the file was closed."""

    def close(self) -> None:
        pass
