"""What a job did, in words for a person."""

from typing import Any

from pipelines import validation
from pipelines.scoring import METRIC


def in_words(summary: dict[str, Any]) -> str:
    """Return what a training job did as a few lines for a person."""
    lines = [
        f"{summary['images']:,} images seen, {summary['trained_images']:,} of them now, {summary['seconds']:.0f} s"
    ]
    if "loss" in summary:
        lines += [f"learned    to a loss of {summary['loss']:.4f}"]
    if validation.METRIC in summary:
        lines += [f"held out   a loss of {summary[validation.METRIC]:.4f}"]
    if METRIC in summary:
        lines += [
            f"score      Fréchet distance {summary[METRIC]:.4f} between samples and data, in pixels (0: alike)",
            f"pictures   {summary['contact_sheet']}",
            f"           {summary['strip']}",
        ]
    lines += [f"network    {summary['run']}/export"]
    if summary["see"]:
        lines += [f"record     {summary['see']}"]
    return "done\n\n  " + "\n  ".join(lines) + "\n"
