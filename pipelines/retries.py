"""Patience with storage: which answers are worth asking again for, how long, how often it was done, and what is left.

One request is asked again, never a whole operation: a listing of a thousand pages goes on at the page that failed.
"""

import errno
import logging
import os
import re
import threading
import time

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_before_delay, wait_random_exponential

from pipelines.errors import BrickyardError, DamagedError, DataError, TryAgainError

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0
"""The waits double from the first to the longest; each is drawn between nothing and that, so that clients part ways."""
QUIET_S = 60.0
"""What went wrong at one server in one way is said again after this long."""
STATUSES = {408, 429, 500, 502, 503, 504}
"""Of HTTP: the server is busy, or broken for now."""
CODES = {
    "InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout", "ConditionalRequestConflict",
    "OperationAborted", "Throttling", "ThrottlingException", "RequestLimitExceeded",
}  # fmt: skip
"""Of S3, for the same; a few come with a status that means something else."""
_CODE = re.compile(rb"<Code>(\w+)</Code>")
EXPIRED = {
    # of S3 and its kin
    "ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "InvalidToken",
    "ExpiredAuthenticationToken",
    # what a client raises that cannot renew what it had
    "TokenRetrievalError", "CredentialRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError", "RefreshError",
}  # fmt: skip
"""Credentials that were good once, by error code or by exception."""

log = logging.getLogger("brickyard.storage")
_lock = threading.Lock()
_retries = 0
_said: dict[tuple[str, str], float] = {}


class TransientError(Exception):
    """An answer that may be another one later. The message says which."""


def patience_s() -> float:
    """Return for how long one request may be asked again (BRICKYARD_RETRY_S)."""
    return float(os.environ.get("BRICKYARD_RETRY_S", "120"))


def answer_s() -> float:
    """Return for how long a server may say nothing (BRICKYARD_ANSWER_S)."""
    return float(os.environ.get("BRICKYARD_ANSWER_S", "20"))


def retries() -> int:
    """Return how many requests this process has asked again so far, with those that it was told of."""
    return _retries


def count_elsewhere(several: int) -> None:
    """Count, among those of this process, requests that other processes have asked again for it."""
    global _retries  # noqa: PLW0603
    with _lock:
        _retries += several


def check(url: str, status: int, body: bytes) -> None:
    """Look at an answer that may be no answer; under a status of success, too, a body may hold an error.

    Raises:
        TransientError: if it is worth another try.
        TryAgainError: if the credentials have expired.
    """
    codes = [found.decode() for found in _CODE.findall(body)]
    if status in STATUSES or CODES.intersection(codes):
        raise TransientError(" ".join(["answers", str(status), *codes[:1]]))
    if status >= 400 and EXPIRED.intersection(codes):
        raise _renew(url, codes[0])


def patient(url: str, server: str) -> AsyncRetrying:
    """Return the retries of one request, to be iterated over.

    Args:
        url: what is asked for.
        server: whose troubles are told together.

    Raises:
        TryAgainError: from the iteration, if the patience is used up.
    """

    def again(state: RetryCallState) -> None:
        global _retries  # noqa: PLW0603
        kind = _kind(state)
        with _lock:
            _retries += 1
            now, last = time.monotonic(), _said.get((server, kind))
            if last is not None and now < last + QUIET_S:
                return
            _said[server, kind] = now
        log.warning("%s %s; asking again for up to %g s (%d retries so far)", url, kind, patience_s(), _retries)

    def give_up(state: RetryCallState) -> None:
        raise TryAgainError(
            f"{url} {_kind(state)}, also when asked {state.attempt_number} times within {patience_s():g} s "
            "(BRICKYARD_RETRY_S); check the address, or run the same command later"
        ) from _error(state)

    return AsyncRetrying(
        retry=retry_if_exception_type(TransientError),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        stop=stop_before_delay(patience_s()),
        before_sleep=again,
        retry_error_callback=give_up,
    )


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _kind(state: RetryCallState) -> str:
    return str(_error(state))


def error_code(error: BaseException) -> str:
    """Return the code of the answer that is behind an error, or nothing."""
    return str(getattr(_answer(error), "response", {}).get("Error", {}).get("Code", ""))


def answers_head(error: BaseException) -> bool:
    """Whether a HEAD request was refused: the answer has no body, so nobody knows why."""
    return getattr(_answer(error), "operation_name", "").startswith("Head")


def explained(url: str, error: Exception) -> Exception:
    """Return what an error of a storage client is in words of ours."""
    said, code = f"{type(error).__name__}: {error}", error_code(error)
    if isinstance(error, BrickyardError):
        return error
    if code == "NoSuchBucket":
        return DataError(f"{url} cannot be read or written: there is no such bucket; make it, or check the address")
    if isinstance(error, FileNotFoundError):
        return DamagedError(f"{url} does not exist")
    if EXPIRED.intersection((code, type(error).__name__)):
        return _renew(url, code or type(error).__name__)
    if isinstance(error, TimeoutError | ConnectionError):
        return TryAgainError(f"{url} does not answer: {said}; try again later")
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    way_out = "make room there" if full else "check the address, the credentials and their rights"
    return DataError(f"{url} cannot be read or written: {said}; {way_out}")


def _answer(error: BaseException | None) -> BaseException | None:
    """Return what botocore made of an answer; s3fs raises errors of Python and leaves botocore's behind them."""
    while error is not None and not hasattr(error, "operation_name"):
        error = error.__cause__
    return error


def _renew(url: str, code: str) -> TryAgainError:
    return TryAgainError(
        f"{url}: the credentials have expired ({code}): renew them and run the same command; it goes on from there"
    )
