"""What a job says has no secret in it: passwords and signatures by their form, what the environment holds by its value.

A job that is asked for something with a secret in it does not begin (:func:`before_secret`): settings are printed, kept
and recorded. What others may still say, such as a server that repeats the header of a request in its error, is made
harmless where it leaves the process (:func:`guarded`), whoever says it: our log, a traceback, Ray, MLflow.
"""

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast
from urllib.parse import quote, quote_plus, unquote, urlsplit

MASK = "***"
LEAST = 8
"""Characters of a secret that is looked for by its value. Shorter ones are words and numbers too, and a log in which
each of these is hidden says nothing any more; in an address or a header they are hidden all the same."""
_NAMES = re.compile(r"SECRET|PASSW|PASSPHRASE|TOKEN|CREDENTIAL|CONNECTION_STRING|HOOK|ALERT|KEY$", re.IGNORECASE)
"""Variables of the environment that hold a secret, by name …"""
_PLACES = re.compile(r"(FILE|PATH|DIR|URI|ID|MODE)$", re.IGNORECASE)
"""… but for those that say where one is."""
_IS = r"(?:\\?['\"]\s*[:,]|\s*[:=])\s*b?(?:\\?['\"])?"
"""Between the name of a header and its value, as headers, dictionaries and pairs are written down."""
_FORMS = tuple(
    (re.compile(form, re.IGNORECASE), rf"\g<1>{MASK}")
    for form in (
        # scheme://user:password@, whatever is in the password, but not host:port/what@ever
        r"(\b[a-z][a-z0-9+.-]*://)(?!\[)[^\s/?#:@'\"<>]*:(?!\d*(?:[/?#\s'\"<>),]|$))[^\s'\"<>]{0,999}(?=@)",
        # https://user@, which is how tokens are given; elsewhere it is a name, as in abfs://container@account
        r"(\bhttps?://)[^\s/?#:@'\"<>]+(?=@)",
        # password=…, ?token=…, and what presigned addresses are signed with
        r"((?:\b|_|pg)(?:password|passwd|secret|token|api_?key|secret_?(?:access_?)?key|account_?key|awsaccesskeyid|sig|"
        r"signature|credential)=)[^\s&;,'\"<>\\)}]+",
        # the same as a header, however it is written down
        rf"(\bx-(?:amz|goog)-(?:signature|credential|security-token){_IS})[^\s&;,'\"<>\\)}}]+",
        rf"(\bauthorization{_IS}(?:basic|bearer|digest|negotiate|token)\s+)[^\s,'\"<>\\)}}]+",
        r"(\b(?:basic|bearer)\s+)(?=[^\s,'\"<>\\)}]*[\d=])[\w+/.~=-]{16,}",
    )
)
_WORDS = re.compile(
    rf"((?:\b|_)(?:password|passwd|client_secret|secret_?(?:access_?)?key|api_?key|(?:auth|session)_?token){_IS})"
    r"[^\s&;,'\"<>\\)}]+",
    re.IGNORECASE,
)
"""What follows such a word in a dictionary or a line of a file; in a setting it may stand for another reason."""


def redacted(text: str) -> str:
    """Return a text without the secrets that are in it."""
    for secret in _of_environment():
        text = text.replace(secret, MASK)
    for form, harmless in (*_FORMS, (_WORDS, rf"\g<1>{MASK}")):
        text = form.sub(harmless, text)
    return text


def redacted_in(value: Any) -> Any:
    """Return plain content, as JSON has it, without the secrets that are in its texts."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {redacted_in(name): redacted_in(one) for name, one in value.items()}
    return [redacted_in(one) for one in value] if isinstance(value, list | tuple) else value


def before_secret(text: str) -> str:
    """Return what stands before a secret in a text, such as ``https://`` or ``token=``; nothing if it has the form of
    none."""
    for form, harmless in _FORMS:
        found = form.search(text)
        if found and form.sub(harmless, text) != text:
            return found[1]
    return ""


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Within this context nothing that this process prints, or writes to a log on stderr, has a secret in it.

    What other processes write is theirs: Ray's workers, for one, which have no setting with a secret in it to tell of.
    """
    before = sys.stderr
    with contextlib.redirect_stdout(_guard(sys.stdout)), contextlib.redirect_stderr(_guard(before)):
        found = [handler for handler in _handlers() if handler.stream is before]  # Ray's is as old as its import
        for handler in found:
            handler.setStream(sys.stderr)
        try:
            yield
        finally:
            for handler in found:
                handler.setStream(before)


class _Guarded:
    """A stream of text, and all that it can, through which no secret goes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _guard(stream: TextIO) -> TextIO:
    return cast(TextIO, _Guarded(stream))


def _handlers() -> Iterator["logging.StreamHandler[TextIO]"]:
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):  # those of which only children are known have none
            if isinstance(handler, logging.StreamHandler):
                yield handler


def _of_environment() -> list[str]:
    """Return the secrets of the environment as they may be written down, the longest first. It is read each time, since
    MLflow's password may get there later."""
    found = set[str]()
    for name, value in os.environ.items():
        if _NAMES.search(name) and not _PLACES.search(name):
            found |= {value, value.partition("://")[2].partition("/")[2]}  # of a webhook the path is the secret
        if "@" in value and "://" in value:
            with contextlib.suppress(ValueError):
                password = urlsplit(value).password or ""
                found |= {password, unquote(password)}
    forms = {
        form
        for secret in found
        for form in (secret, quote(secret, safe=""), quote_plus(secret), json.dumps(secret)[1:-1], repr(secret)[1:-1])
    }
    return sorted((form for form in forms if len(form) >= LEAST), key=lambda form: (-len(form), form))
