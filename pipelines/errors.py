"""What can go wrong, and the exit code that a job leaves with when it does."""

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigurationError(ValueError):
    """What was asked for cannot be: exit 2. The message names the field, the value, the rule and the way out."""


class DataError(Exception):
    """Data or storage cannot be used as they are: exit 3."""


class DamagedError(DataError):
    """An object is missing, or is not what was written."""


CHANGED = "is not the object that was listed: it has changed since; list the source again, as another data set"


class TryAgainError(Exception):
    """Something outside failed that may be well later; the same command continues: exit 75 (EX_TEMPFAIL)."""


@contextmanager
def checked() -> Iterator[None]:
    """Within this context a ValueError, as the mathematics raise it, is one of the configuration."""
    try:
        yield
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
