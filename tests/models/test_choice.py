"""A word that no configuration knows is refused where it is made, not only on the command line."""

import pytest

from models.network import NetworkConfig
from models.objective import ObjectiveConfig
from models.schedule import ScheduleConfig, article
from models.timesteps import TimestepConfig


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ObjectiveConfig(loss="foo"), "fit.objective.loss is 'foo'; it must be one of reduced, two-noise, rec"),
        (lambda: ObjectiveConfig(target="foo"), "fit.objective.target is 'foo'; it must be one of eps, x_0, v"),
        (lambda: ObjectiveConfig(weight="foo"), "fit.objective.weight is 'foo'; it must be one of simple, article"),
        (lambda: TimestepConfig(kind="foo"), "fit.timesteps.kind is 'foo'; it must be one of stratified, uniform"),
        (lambda: ScheduleConfig(kind="foo"), "schedule.kind is 'foo'; it must be one of article, linear"),
        (lambda: NetworkConfig(kind="foo"), "network.kind is 'foo'; it must be one of unet, dit"),
        (lambda: article().respaced(5, "foo"), "spacing is 'foo'; it must be one of even, rising"),
    ],
)
def test_a_word_that_is_none_of_those_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
