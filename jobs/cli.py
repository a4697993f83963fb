"""What all jobs share: preset < file < flags, the resolved configuration in print, one JSON line, the exit code."""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

import tyro

from pipelines.errors import ConfigurationError, DataError, TryAgainError, ours
from pipelines.invocation import LEAVE_WITH, Invocation
from pipelines.plain import file_as_flags, to_yaml
from pipelines.redaction import before_secret, guarded, redacted_in

J = TypeVar("J")
DONE, FAILED, BAD_CONFIGURATION, BAD_DATA, TRY_AGAIN, INTERRUPTED = 0, 1, 2, 3, 75, 130
EXIT_CODES = (
    "exit codes: 0 done, 1 failed, 2 bad configuration, 3 data or storage unusable, 75 try again, 130 interrupted"
)
_CODES = ((ConfigurationError, BAD_CONFIGURATION), (DataError, BAD_DATA), (TryAgainError, TRY_AGAIN))

log = logging.getLogger("brickyard")


def parse(cls: type[J], presets: dict[str, tuple[str, J]], argv: list[str]) -> Invocation[J]:
    """Resolve a command line: a preset's name first if there are any, then a file, then flags.

    Raises:
        ConfigurationError: for an unknown preset, a file that cannot be used, or a secret among the settings.
        SystemExit: 2 for flags that cannot be used, and 0 after --help.
    """
    default: J | None = None
    if argv and not argv[0].startswith("-"):
        default, argv = _preset(presets, argv[0]), argv[1:]
    _refuse_secrets(argv)
    if file := _flag(argv, "--config"):
        _refuse_secrets(said := file_as_flags(cls, file))
        argv = [*said, *argv]
    lines = [cls.__doc__ or "", "", EXIT_CODES]
    if presets:
        lines[1:1] = [
            "",
            "presets, to be named first:",
            *(f"  {name}: {words}" for name, (words, _) in presets.items()),
        ]
    # The type is known at run time only, and a default replaces what it must have.
    return tyro.cli(
        Invocation[cls],  # type: ignore[valid-type]
        args=argv,
        default=None if default is None else Invocation[Any](job=default),  # type: ignore[arg-type]
        description="\n".join(lines),
    )


def _preset(presets: dict[str, tuple[str, J]], name: str) -> J:
    if name in presets:
        return presets[name][1]
    near = get_close_matches(name, presets, n=1)
    hint = (
        f"did you mean {near[0]!r}?" if near else f"there are {', '.join(presets)}" if presets else "this job has none"
    )
    raise ConfigurationError(f"{name!r} is no preset; {hint}")


def _refuse_secrets(argv: list[str]) -> None:
    """Raise ConfigurationError if a flag has a secret in it, which is not said."""
    flag = "the command line"
    for word in argv:
        if word.startswith("--"):
            flag = word.partition("=")[0]
        if before := before_secret(word):
            raise ConfigurationError(
                f"{flag} holds a password, a token or a signature, judging by what follows {before!r}, and settings "
                "are printed, kept and recorded: give the address alone, and the credentials where its client looks "
                "for them, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD; a folder that only looks like one needs another name"
            )


def _flag(argv: list[str], flag: str) -> str:
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return ""


def run(
    cls: type[J],
    argv: list[str] | None,
    work: Callable[[J], dict[str, Any]],
    plan: Callable[[J], dict[str, Any]],
    presets: dict[str, tuple[str, J]] | None = None,
) -> int:
    """Parse, print the resolved configuration, call one function, print what it did as one JSON line on stdout.

    Args:
        cls: the job's configuration.
        argv: the command line; None for that of the process.
        work: does the job.
        plan: what --dry-run does instead.
        presets: named jobs with a line about each.

    Returns:
        The exit code.
    """
    with guarded():
        outcome, code = _run(cls, sys.argv[1:] if argv is None else argv, work, plan, presets or {})
    if outcome is not None:
        print(json.dumps(redacted_in({**outcome, "exit_code": code})), flush=True)
    return code


def _run(
    cls: type[J],
    argv: list[str],
    work: Callable[[J], dict[str, Any]],
    plan: Callable[[J], dict[str, Any]],
    presets: dict[str, tuple[str, J]],
) -> tuple[dict[str, Any] | None, int]:
    """Return what a job did, or None if nobody reads it, and the exit code."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    try:
        try:
            asked = parse(cls, presets, argv)
        except BrokenPipeError:  # whoever read has seen enough, as in `--help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return None, INTERRUPTED
        with _sigterm_as_interrupt(), _stdout_as_stderr():
            _leave_with(os.environ.pop(LEAVE_WITH, ""))
            log.setLevel(logging.DEBUG if asked.verbose else logging.INFO)
            print("# the resolved configuration\n" + to_yaml(asked.job), file=sys.stderr, end="", flush=True)
            return (plan if asked.dry_run else work)(asked.job), DONE
    except SystemExit as error:  # --help, or flags that the command line's library has already spoken about
        if not error.code:
            raise
        return {"error": "the command line cannot be used; see stderr"}, BAD_CONFIGURATION
    except KeyboardInterrupt:
        log.error("interrupted; run the same command to go on")
        return {"error": "interrupted"}, INTERRUPTED
    except Exception as error:
        code, told = _judge(error)
        log.error("%s", told, exc_info=None if ours(error) else error)
        return {"error": str(told)}, code
    finally:
        log.removeHandler(handler)


def _judge(error: BaseException) -> tuple[int, BaseException]:
    """Find what went wrong behind what Ray made of it, and the exit code that belongs to it."""
    told = ours(error)
    if told is None:
        return FAILED, error
    return next((code for kind, code in _CODES if isinstance(told, kind)), FAILED), told


def _leave_with(parent: str) -> None:
    """Have this job end, as by SIGTERM, when the process that has started it, and is named, is no more."""

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent:
        threading.Thread(target=watch, name="parent", daemon=True).start()


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM, as clusters send it, end a job like Ctrl-C."""

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _stdout_as_stderr() -> Iterator[None]:
    """Send what anyone prints, in this process or below it, to stderr: stdout is for the one line at the end."""
    sys.stdout.flush()
    stdout = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)
