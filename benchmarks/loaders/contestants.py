"""The peers as their users run them: each a function that returns an iterable, one pass over it an epoch.

A batch is (uint8 [n, 64, 64, 3], labels), n = 64 but for the last ones. What a peer documents as usual is what is done
here, with one favour: worker processes live on from epoch to epoch where the peer allows it. Each function imports its
peer itself, for they live in an environment of their own.
"""

import functools
import importlib
import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loaders.decoders import DECODERS, Decoder, fitted

BATCH = 64
SHUFFLE = 1000
"""Images in a shuffle buffer, where there is one."""
LIBRARIES = {"webdataset": "webdataset", "litdata": "litdata", "mosaicml": "streaming"}


def ready(name: str) -> AbstractContextManager[Any]:
    """Import what a contestant needs, which is not counted in its time to the first batch."""
    if name != "ceiling":
        import torch.utils.data

        torch.set_num_threads(1)
    if name == "mosaicml":
        provide_torchvision()
    if name in LIBRARIES:
        importlib.import_module(LIBRARIES[name])
    return nullcontext()


def listed(url: str) -> list[str]:
    """Return the paths or URLs of all files below a URL, sorted."""
    import fsspec

    filesystem, root = fsspec.url_to_fs(url)
    return [filesystem.unstrip_protocol(path) if "://" in url else path for path in sorted(filesystem.find(root))]


def read(url: str) -> bytes:
    """Return the bytes of a file, or of an object by this process's own boto3 client."""
    if "://" not in url:
        return Path(url).read_bytes()
    bucket, key = url.removeprefix("s3://").split("/", 1)
    return client(os.getpid()).get_object(Bucket=bucket, Key=key)["Body"].read()


@functools.cache
def client(process: int) -> Any:
    """Return the boto3 client of a process: one that was made before a fork must not be used after it."""
    import boto3

    return boto3.client("s3")


class Files:
    """A data set in the manner of torch: the i-th picture and the number of its folder."""

    def __init__(self, url: str, decoder: Decoder) -> None:
        self.paths, self.decode = listed(f"{url}/raw"), DECODERS[decoder]
        folders = [path.split("/")[-2] for path in self.paths]
        numbers = {name: i for i, name in enumerate(sorted(set(folders)))}
        self.labels = [numbers[name] for name in folders]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        import torch

        return torch.from_numpy(self.decode(read(self.paths[i]))), self.labels[i]


def dataloader(url: str, decoder: Decoder, workers: int) -> Iterable[Any]:
    """torch: raw files; PIL; ``shuffle=True``. From S3 each file is one request of boto3."""
    from torch.utils.data import DataLoader

    files: Any = Files(url, decoder)
    return DataLoader(files, batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=True)


def webdataset(url: str, decoder: Decoder, workers: int) -> Iterable[Any]:
    """WebDataset: tars, in any order of the tars, through a shuffle buffer. From S3 by its ``pipe:``, with curl."""
    import torch
    import webdataset as wds

    tars = listed(f"{url}/tars")
    if "://" in url:
        sign = '--aws-sigv4 "aws:amz:$AWS_DEFAULT_REGION:s3" --user "$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY"'
        sign += " --header x-amz-content-sha256:UNSIGNED-PAYLOAD"
        tars = [f"pipe:curl -sf {sign} $AWS_ENDPOINT_URL/{tar.removeprefix('s3://')}" for tar in tars]
    pipeline = wds.WebDataset(tars, shardshuffle=len(tars)).shuffle(SHUFFLE)
    if decoder == "full":
        pipeline = pipeline.decode("pil").to_tuple("jpg", "cls").map_tuple(fitted, int)
    else:
        pipeline = pipeline.to_tuple("jpg", "cls").map_tuple(DECODERS[decoder], int)
    pipeline = pipeline.map_tuple(torch.from_numpy, int).batched(BATCH)
    return wds.WebLoader(pipeline, batch_size=None, num_workers=workers, persistent_workers=True)


def decoding(dataset: Any, decoder: Decoder, **settings: Any) -> Any:
    """Return a streaming data set, LitData's or MosaicML's, that decodes what it reads."""
    import torch

    decode = DECODERS[decoder]

    class Decoding(dataset):  # type: ignore[misc]
        def __getitem__(self, i: Any) -> tuple[Any, int]:
            row = super().__getitem__(i)
            return torch.from_numpy(decode(row["image"])), row["label"]

    return Decoding(**settings)


def litdata(url: str, decoder: Decoder, workers: int) -> Iterable[Any]:
    """LitData: its chunks of JPEG bytes, shuffled in its way. What comes from S3 is kept on the disk."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    cache = {}
    if "://" in url:
        cache = {"cache_dir": f"{os.environ['CACHE']}/lit"}
        # Its client refuses a server on loopback, which has no TLS, and no setting reaches that switch.
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    rows = decoding(StreamingDataset, decoder, input_dir=f"{url}/lit", shuffle=True, drop_last=False, **cache)
    return StreamingDataLoader(rows, batch_size=BATCH, num_workers=workers, persistent_workers=True)


def mosaicml(url: str, decoder: Decoder, workers: int) -> Iterable[Any]:
    """MosaicML Streaming: MDS shards of JPEG bytes, shuffled in its way. What comes from S3 is kept on the disk."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    where = {"local": f"{url}/mds"}
    if "://" in url:
        where = {"remote": f"{url}/mds", "local": f"{os.environ['CACHE']}/mds"}
    rows = decoding(StreamingDataset, decoder, shuffle=True, batch_size=BATCH, **where)
    return DataLoader(rows, batch_size=BATCH, num_workers=workers, persistent_workers=True)


def provide_torchvision() -> None:
    """Make torchvision importable, which ``streaming`` wants for data sets that nobody here uses.

    Its wheel from PyPI is linked against CUDA: beside a torch for CPUs its operators do not load, and the import stops
    at the first two that it describes.
    """
    import torch

    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        import torchvision  # noqa: F401


class ceiling:  # noqa: N801  (called like the others)
    """The ceiling: decodes out of memory, in this process, and hands nothing over."""

    def __init__(self, url: str, decoder: Decoder, workers: int) -> None:
        self.files = [Path(path).read_bytes() for path in itertools.islice(listed(f"{url}/raw"), 1024)]
        self.decode = DECODERS[decoder]

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.files), BATCH):
            yield np.stack([self.decode(data) for data in self.files[start : start + BATCH]]), None
