"""A configuration as plain content, and back: dictionaries for JSON, YAML for people, flags for the command line."""

import difflib
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from pipelines.errors import ConfigurationError, DataError
from pipelines.storage import Folder

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain lists, dictionaries and scalars, as it goes into YAML and JSON."""
    content: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return content


def to_yaml(config: Any) -> str:
    """Return a configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"fit.images": …}: one flat name for every setting."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def from_dict(cls: type[T], content: Any, where: str) -> T:
    """Build a configuration from plain content, rejecting what it does not know.

    Raises:
        ConfigurationError: naming the field, its value and the nearest name that exists.
    """
    _reject_unknown(cls, content, where)
    try:
        return TypeAdapter(cls).validate_python(content)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        value = "" if isinstance(problem["input"], dict) else f" is {problem['input']!r};"
        raise ConfigurationError(f"{where}: {place}{value} {problem['msg'].removeprefix('Value error, ')}") from error


def _reject_unknown(cls: Any, content: Any, where: str, prefix: str = "") -> None:
    if not isinstance(content, dict):
        raise ConfigurationError(f"{where}: {prefix or 'the file'} must be a mapping of fields to values")
    known = {f.name: f.type for f in fields(cls)}
    for name, value in content.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"it has {', '.join(known)}"
            raise ConfigurationError(f"{where}: {prefix}{name} is no field; {hint}")
        if is_dataclass(known[name]):
            _reject_unknown(known[name], value, where, f"{prefix}{name}.")


def file_as_flags(cls: type[Any], file: str) -> list[str]:
    """Return what a YAML file says as the flags that would say it, so that later flags can say otherwise.

    Raises:
        ConfigurationError: if the file cannot be read, or names a field that does not exist.
    """
    folder, slash, name = file.rpartition("/")
    try:
        content = yaml.safe_load(Folder(folder or slash or ".").get(name))
    except (yaml.YAMLError, DataError) as error:
        raise ConfigurationError(f"--config {file}: {error}") from error
    _reject_unknown(cls, content, file)
    flags: list[str] = []
    for field_, value in flatten(content).items():
        path = field_.replace("_", "-")
        if isinstance(value, bool):
            group, _, leaf = path.rpartition(".")
            flags.append(f"--{path}" if value else f"--{group}.no-{leaf}".replace("--.", "--"))
        else:
            flags += [f"--{path}", *map(str, value if isinstance(value, list) else [value])]
    return flags
