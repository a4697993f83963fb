"""Records a run as the driver of a training job does, in a process of its own, a phase for each line on stdin.

python -m tests.pipelines.recorder URI ROOT ENTRIES
"""

import json
import logging
import sys

import numpy as np

from pipelines.storage import Folder
from pipelines.tracking import open_tracker
from pipelines.tracking_config import TrackingConfig

NAME, RUN_ID = "digits", "an id of ours"


def values(position: int) -> dict[str, float]:
    """What is measured at a position."""
    return {"loss": 1 / position, "images_per_s": position / 7}


def picture(position: int) -> np.ndarray:
    return np.full((8, 8, 1), position % 256, np.uint8)


def tell(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


def main(uri: str, root: str, entries: int) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    folder = Folder(root)
    tell("ready")
    position = 0
    tracker = open_tracker(
        TrackingConfig(uri=uri), folder, folder / "runs" / NAME, NAME, RUN_ID, {"seed": 3}, {"starts": "1"}
    )
    for line in sys.stdin:
        if line.strip() == "end":
            break
        for _ in range(entries):
            position += 100
            tracker.metrics(values(position), position)
        tracker.picture(picture(position), "samples", position)
        tracker.file("config.yaml", f"position: {position}".encode())
        tracker.tags({"position": str(position)})
        tell(f"recorded {position}")
    tracker.finish("FINISHED")
    tell(json.dumps({"tracker_id": tracker.tracker_id, "see": tracker.see}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
