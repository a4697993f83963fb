"""Features by a network in a file, TorchScript or torch.export, and how pictures are prepared for it.

Such a file is a program. It is run only if its sha256 is the one that was asked for: whoever gives that trusts it.
"""

import hashlib
import io
import warnings
import zipfile
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from pipelines.errors import ConfigurationError, DataError
from pipelines.features import MAX_FEATURES, FeatureConfig
from pipelines.images import Pixels
from pipelines.storage import Folder


class FileFeatures:
    """Maps uint8 [n, H, W, C] to features [n, D] in float64, batch by batch."""

    def __init__(self, config: FeatureConfig) -> None:
        torch.set_num_threads(1)  # one process each core does more than one process on all
        self.config = config
        self.device = torch.device("cuda" if config.use_gpu else "cpu")
        self.module = _load(config, self.device)

    def __call__(self, pixels: Pixels) -> NDArray[np.float64]:
        size = self.config.batch_images
        found = [self._batch(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        return np.concatenate(found).astype(np.float64)

    @torch.inference_mode()
    def _batch(self, pixels: Pixels) -> NDArray[Any]:
        # Always full: a convolution may round differently in a batch of another size, and a file may know one only.
        filled = np.concatenate([pixels, np.repeat(pixels[-1:], self.config.batch_images - len(pixels), axis=0)])
        given = prepared(torch.from_numpy(filled).to(self.device), self.config)
        try:
            found = self.module(given, **dict.fromkeys(self.config.flags, True))
        except Exception as error:  # whatever a program of others may raise
            raise DataError(f"{self.config.url} does not take {list(given.shape)}: {error}") from error
        return self._checked(found, len(filled)).float().cpu().numpy()[: len(pixels)]

    def _checked(self, found: object, n: int) -> Tensor:
        """Return the features as [n, D], if that is what they are."""
        if not (isinstance(found, Tensor) and found.dim() > 1 and found.numel() == n * max(found.shape[1:])):
            what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise DataError(f"{self.config.url} puts out {what} for {n} pictures; it must be features, [{n}, D]")
        flat = found.flatten(1)
        if flat.shape[1] > MAX_FEATURES:
            raise DataError(f"{self.config.url} puts out {flat.shape[1]} features, more than {MAX_FEATURES}")
        if not flat.isfinite().all():
            raise DataError(f"{self.config.url} puts out features that are not finite: is features.low..high right?")
        return flat


def prepared(pixels: Tensor, config: FeatureConfig) -> Tensor:
    """Return uint8 [n, H, W, C] as the file takes it: float32 [n, C, side, side] in low..high."""
    x = pixels.permute(0, 3, 1, 2).float()
    if config.rgb and x.shape[1] == 1:
        x = x.expand(-1, 3, -1, -1)
    if config.side and tuple(x.shape[2:]) != (config.side, config.side):
        size = (config.side, config.side)
        x = interpolate(x, size, mode=config.resize, align_corners=False, antialias=config.antialias)
        x = x.clamp(0, 255)  # a cubic shoots beyond
    return (x * ((config.high - config.low) / 255) + config.low).contiguous()


def check_digest(config: FeatureConfig) -> bytes:
    """Return the content of the file.

    Raises:
        ConfigurationError: if its digest is not the one that is given, or none is.
    """
    parent, _, name = config.url.rpartition("/")
    content = Folder(parent or ".").get(name)
    digest = hashlib.sha256(content).hexdigest()
    if not config.sha256:
        raise ConfigurationError(
            f"features.sha256 is empty; {config.url} is a program that would be run, and has {digest}: if you trust "
            "it, give that"
        )
    if config.sha256 != digest:
        raise ConfigurationError(f"features.sha256 is {config.sha256}; {config.url} has {digest}, and is not run")
    return content


def _load(config: FeatureConfig, device: torch.device) -> Any:
    content = check_digest(config)
    try:
        names = zipfile.ZipFile(io.BytesIO(content)).namelist()
        if any(name.endswith("/archive_format") for name in names):
            module: Any = torch.export.load(io.BytesIO(content)).module().to(device)
        else:
            with warnings.catch_warnings():  # TorchScript will go, but the files that everybody compares by are it
                warnings.simplefilter("ignore", DeprecationWarning)
                script = torch.jit.load(io.BytesIO(content), map_location=device)  # type: ignore[no-untyped-call]
                module = script.eval()
        # TorchScript knows no get_submodule.
        return reduce(getattr, config.member.split("."), module) if config.member else module
    except Exception as error:
        raise DataError(f"{config.url} cannot be loaded as TorchScript or torch.export: {error}") from error
