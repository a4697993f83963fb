import pickle

import pytest
from ray.exceptions import RayTaskError

from pipelines.errors import BrickyardError, ConfigurationError, DamagedError, TryAgainError, ours, root


@pytest.mark.parametrize("kind", [ConfigurationError, DamagedError, TryAgainError])
def test_an_error_of_ours_keeps_its_words_and_is_found_behind_what_ray_makes_of_it(kind: type[BrickyardError]) -> None:
    error = kind("renew them")
    error.args = ("renew them\nTo change retry attempts, configure something",)
    error = pickle.loads(pickle.dumps(error))
    assert type(error) is kind and str(error) == "renew them" and error.args == ("renew them",)
    around = RayTaskError("read", "a long traceback", error, ip="127.0.0.1").as_instanceof_cause()
    assert isinstance(around, kind) and str(around) != str(error)
    failed = RuntimeError("training failed")
    failed.__cause__ = around
    assert ours(error) is ours(around) is ours(failed) is error
    assert ours(RuntimeError("another's")) is None and ours(None) is None


def test_the_root_of_an_error_is_what_happened_whoever_passed_it_on() -> None:
    error = ConnectionError("reset")
    around = RayTaskError("read", "a long traceback", error, ip="127.0.0.1").as_instanceof_cause()
    failed = RuntimeError("training failed")
    failed.__cause__ = around
    assert root(failed) is root(around) is root(error) is error
