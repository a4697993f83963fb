import pytest
import torch
from torch.nn.functional import cross_entropy

from models.classifier import Classifier, ClassifierConfig, Features, classification_loss, right
from models.init import empty, initialize

CONFIG = ClassifierConfig(channels=8, features=5)


def network(side: int = 8, classes: int = 3) -> Classifier:
    made = empty(lambda: Classifier(CONFIG, 1, side, classes))
    initialize(made, 0)
    return made


@pytest.mark.parametrize("side", [1, 4, 7, 8, 28, 33])
def test_pictures_of_any_side_become_logits_and_features(side: int) -> None:
    x = torch.linspace(-1, 1, 2 * side * side).view(2, 1, side, side)
    made = network(side)
    assert made(x).shape == (2, 3) and Features(made)(x).shape == (2, 5)
    torch.testing.assert_close(made.head(Features(made)(x)), made(x))


def test_what_comes_out_for_a_picture_depends_on_no_other() -> None:
    x = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8).sin()
    made = network().double()
    torch.testing.assert_close(made(x.double())[2:3], made(x[2:3].double()), rtol=1e-12, atol=1e-12)


def test_pictures_without_a_label_teach_nothing() -> None:
    x, made = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8), network()
    label = torch.tensor([2, -1, 0, -1])
    expected = cross_entropy(made(x[[0, 2]]), label[[0, 2]])
    torch.testing.assert_close(classification_loss(made, x, label), expected)
    nothing = classification_loss(made, x, torch.full((4,), -1))
    nothing.backward()
    assert nothing == 0 and not any(weight.grad.any() for weight in made.parameters())


def test_only_what_is_right_is_counted() -> None:
    x, made = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8), network()
    told = made(x).argmax(1)
    assert right(made, x, told) == 4
    assert right(made, x, torch.where(torch.arange(4) < 1, told, -1)) == 1


@pytest.mark.parametrize("change", [{"channels": 12}, {"channels": 0}, {"features": 0}])
def test_a_shape_that_cannot_be_built_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"classifier.{next(iter(change))} is {next(iter(change.values()))}; it must"):
        ClassifierConfig(**change)
