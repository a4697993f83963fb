"""One rule of every configuration: a word is one of those that there are."""

from typing import Any, get_args


def check_choice(field: str, value: str, words: Any) -> None:
    """Raise ValueError unless the value of a field is one of the words of a ``Literal``."""
    if value not in get_args(words):
        raise ValueError(f"{field} is {value!r}; it must be one of {', '.join(get_args(words))}")
