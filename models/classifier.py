"""A small classifier, whose last hidden layer are features that know what pictures show.

Convolutions of stride 2 halve the picture until it has 4 × 4 pixels or fewer, each followed by a group norm, so that
what comes out for a picture depends on no other; the mean over what is left goes through one hidden layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

GROUPS = 8
UNLABELLED = -1


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The shape of the classifier."""

    channels: int = 32
    """Of the first convolution, a multiple of 8; they double with each halving of the picture, up to eight times."""
    features: int = 64
    """D, what it makes of a picture before it decides."""

    def __post_init__(self) -> None:
        if self.channels < GROUPS or self.channels % GROUPS:
            raise ValueError(f"classifier.channels is {self.channels}; it must be a multiple of {GROUPS}: try 32")
        if self.features < 1:
            raise ValueError(f"classifier.features is {self.features}; it must be at least 1: try 64")


class Classifier(nn.Module):
    """Maps pictures in [-1, 1], [B, C, side, side], to logits [B, classes]."""

    def __init__(self, config: ClassifierConfig, image_channels: int, side: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(image_channels, config.channels, 3, padding=1)]
        width = config.channels
        while side > 4:
            wider = min(2 * width, 8 * config.channels)
            layers += [nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, wider, 3, stride=2, padding=1)]
            width, side = wider, -(-side // 2)
        layers += [nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
        layers += [nn.GroupNorm(GROUPS, width), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.hidden = nn.Linear(width, config.features)
        self.head = nn.Linear(config.features, classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the last hidden layer, [B, D]."""
        return silu(self.hidden(self.body(x).mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]


class Features(nn.Module):
    """The classifier without its decision, [B, C, side, side] to [B, D]: what is exported."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier.features(x)


def classification_loss(classifier: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    """Return the mean cross-entropy over the pictures that have a label (int64 [B], -1 for none); 0 if none has."""
    known = (label != UNLABELLED).sum().clamp(min=1)
    return cross_entropy(classifier(x), label, ignore_index=UNLABELLED, reduction="sum") / known


@torch.inference_mode()
def right(classifier: nn.Module, x: Tensor, label: Tensor) -> int:
    """Return how many pictures are told right."""
    return int((classifier(x).argmax(1) == label).sum())
