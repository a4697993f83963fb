"""What can go wrong, and the exit code that a job leaves with when it does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class BrickyardError(Exception):
    """An error that says what to do about it; to do the same again at once would only meet it again.

    Its words stay as they are: Ray Data adds its own, about retries, to the arguments of what it passes on.
    """

    @property
    def args(self) -> tuple[Any, ...]:
        """What it was made of."""
        return BaseException.args.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @args.setter
    def args(self, others: tuple[Any, ...]) -> None:
        pass


class ConfigurationError(BrickyardError, ValueError):
    """What was asked for cannot be: exit 2. The message names the field, the value, the rule and the way out."""


class OtherFormatError(ConfigurationError):
    """Something is whole, and of a format that this version of the code does not know."""


class DataError(BrickyardError):
    """Data or storage cannot be used as they are: exit 3."""


class DamagedError(DataError):
    """An object is missing, or is not what was written."""


CHANGED = "is not the object that was listed: it has changed since; list the source again, as another data set"


class TryAgainError(BrickyardError):
    """Something outside failed that may be well later; the same command continues: exit 75 (EX_TEMPFAIL)."""


def root(error: BaseException) -> BaseException:
    """Return the error that is behind what Ray, and whoever else passed it on, made of it."""
    while inside := _inside(error):
        error = inside
    return error


def ours(error: BaseException | None) -> BrickyardError | None:
    """Return the error of ours that is behind what Ray made of it, or None."""
    while error is not None:
        if isinstance(error, BrickyardError) and not _of_ray(error):
            return error
        error = _inside(error)
    return None


def _of_ray(error: BaseException) -> BaseException | None:
    """Return what Ray has put a frame around, if this is such a frame, which may have the type of what is in it."""
    cause = getattr(error, "cause", None) or getattr(error, "health_check_failure", None)
    return cause if isinstance(cause, BaseException) else None


def _inside(error: BaseException) -> BaseException | None:
    return _of_ray(error) or error.__cause__


@contextmanager
def checked() -> Iterator[None]:
    """Within this context a ValueError, as the mathematics raise it, is one of the configuration."""
    try:
        yield
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
