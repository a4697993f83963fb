"""A job and how to go about it, as the command line has it. Apart from the jobs, which define no classes, and from
:mod:`pipelines.config`, which workers import and which therefore does without the command line's library."""

from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

import tyro

J = TypeVar("J")
LEAVE_WITH = "BRICKYARD_LEAVE_WITH"
"""In the environment of a job: the number of the process that has started it, without which it does not go on."""


@dataclass(frozen=True, kw_only=True)
class Invocation(Generic[J]):
    """The flags of the job carry no prefix."""

    job: Annotated[J, tyro.conf.arg(name="")]
    config: str = ""
    """YAML file or URL that is laid over the preset, such as the configuration that a run prints and keeps."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Resolve, look at the data and at storage, print the plan; change nothing."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Let Ray speak as well."""
