"""The demo's raw images: the 1,797 handwritten digits that come with scikit-learn, as PNG files in label folders."""

import numpy as np

from pipelines.images import encode
from pipelines.storage import Folder

DIGITS, LABELS = 1797, [str(digit) for digit in range(10)]


def write_digits(folder: Folder) -> None:
    """Write ``<label>/<index>.png`` for each digit, 8 × 8 pixels in grey, unless all are there."""
    from sklearn.datasets import load_digits  # seconds to import, and no worker needs it

    digits = load_digits()
    names = [f"{label}/{i:04d}.png" for i, label in enumerate(digits.target)]
    present = {found.name for found in folder.find()}
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # [1797, 8, 8, 1], 17 levels of grey
    for name, picture in zip(names, pixels, strict=True):
        if name not in present:
            folder.put(name, encode(picture, "png"))
