"""The fingerprint of a picture: two that have the same one have the same pixels."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from pipelines.images import Pixels

SIZE = 32
"""Bytes of a fingerprint."""


def fingerprint(picture: Pixels) -> bytes:
    """Return the sha256 of the shape and the pixels of a picture, uint8 [H, W, C]."""
    digest = hashlib.sha256(repr(picture.shape).encode())
    digest.update(picture.tobytes())
    return digest.digest()


def fingerprints(pixels: Pixels) -> NDArray[np.uint8]:
    """Return the fingerprint of each of n pictures, uint8 [n, H, W, C]: uint8 [n, 32]."""
    return np.frombuffer(b"".join(map(fingerprint, pixels)), np.uint8).reshape(-1, SIZE)
