"""A sweep, as a user says it: grids over any settings of a training job, and the children that they mean."""

import difflib
import itertools
import re
from dataclasses import dataclass
from typing import Any

import yaml

from pipelines.config import TrainJob
from pipelines.errors import ConfigurationError
from pipelines.plain import flatten, from_dict, to_dict
from pipelines.storage import Folder

COMMA = re.compile(r",(?![^\[]*\])")
"""Between values; not those within a list."""


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """Train several networks that differ in some settings, and compare them."""

    name: str = "sweep"
    """The sweep's name: its folder below the root, and the name of the run that holds its children in MLflow."""
    grid: tuple[str, ...]
    """Grids such as "fit.learning_rate=1e-3,2e-3 seed=0,1": any settings of jobs/train.py, each with its values, of
    which every combination is a child; lists are written [1,2]. Several grids add up."""
    side_by_side: int = 0
    """Children that train at once; 0: as many as the cluster has room for."""
    train: TrainJob
    """What they have in common. Its name is not used."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ConfigurationError(
                f"name is {self.name!r}; it becomes a folder: letters, digits, '.', '_' and '-', such as rates-2"
            )
        if self.side_by_side < 0:
            raise ConfigurationError(f"side_by_side is {self.side_by_side}; it must not be negative: try 0")
        self.children  # noqa: B018  (it checks)

    @property
    def folder(self) -> Folder:
        return Folder(self.train.root) / "sweeps" / self.name

    @property
    def children(self) -> dict[str, TrainJob]:
        """The jobs by what sets each apart, such as ``fit.learning_rate=0.001 seed=0``, in the order of the grids.

        Raises:
            ConfigurationError: naming the grid, if it cannot be understood or a child cannot be.
        """
        if not self.grid:
            raise ConfigurationError('grid is empty: give --grid "seed=0,1,2", settings of jobs/train.py with values')
        found: dict[str, TrainJob] = {}
        for grid in self.grid:
            axes = [self._axis(grid, axis) for axis in grid.split()]
            for values in itertools.product(*(values for _, values in axes)):
                settings = dict(zip((name for name, _ in axes), values, strict=True))
                apart = " ".join(f"{name}={value}" for name, value in settings.items())
                found[apart] = self._child(grid, apart, settings)
        if len({child.name for child in found.values()}) < len(found):
            raise ConfigurationError(f"grid is {' '.join(self.grid)!r}; two of its children would have one name")
        return found

    def _child(self, grid: str, apart: str, settings: dict[str, str]) -> TrainJob:
        content = to_dict(self.train)
        for name, value in settings.items():
            *groups, last = name.split(".")
            place = content
            for group in groups:
                place = place[group]
            place[last] = _value(grid, value)
        short = "_".join(f"{name.rpartition('.')[2]}-{value}" for name, value in settings.items())
        content["name"] = f"{self.name}.{re.sub(r'[^A-Za-z0-9._-]+', '-', short)}"
        return from_dict(TrainJob, content, f"grid {grid!r}, child {apart!r}")

    def _axis(self, grid: str, axis: str) -> tuple[str, list[str]]:
        name, equals, values = axis.partition("=")
        name, known = name.removeprefix("--").replace("-", "_"), flatten(to_dict(self.train))
        listed = COMMA.split(values)
        if not equals or not all(listed):
            raise ConfigurationError(
                f"grid is {grid!r}, of which {axis!r} is no SETTING=VALUE,VALUE: try fit.learning_rate=1e-3,2e-3"
            )
        if name not in known or name in {"name", "root"}:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigurationError(
                f"grid is {grid!r}; {name} is no setting of jobs/train.py that children could differ in"
                + (f": did you mean {near[0]}?" if near else ", whose --help lists them")
            )
        return name, listed

    def room(self, resources: dict[str, float]) -> int:
        """Return how many children train at once on a cluster with these resources, at least one."""
        if self.side_by_side:
            return self.side_by_side
        cpus, gpus = (max(of_one) for of_one in zip(*map(_needs, self.children.values()), strict=True))
        rooms = [resources.get("CPU", 0) / cpus] + ([resources.get("GPU", 0) / gpus] if gpus else [])
        return max(1, int(min(rooms)))


def _value(grid: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(
            f"grid is {grid!r}; {text!r} is no value: quote it, as YAML would want it, or write a list as [1,2]"
        ) from error


def _needs(child: TrainJob) -> tuple[float, float]:
    """The CPUs and the GPUs that a child cannot do without."""
    scaling, draw = child.scaling, child.draw
    drawing = draw.actors if child.evaluate_images else 0
    cpus = max(scaling.workers * scaling.cpus_per_worker + 1, 0 if draw.use_gpu else drawing)  # one reads
    gpus = max(scaling.workers * scaling.use_gpu + scaling.validate_on_gpu, drawing * draw.use_gpu)
    return cpus, gpus
