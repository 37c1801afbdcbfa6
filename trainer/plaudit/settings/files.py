"""Read settings from a YAML file. Unknown keys and values of the wrong type are errors that name the key."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from plaudit import presets
from plaudit.errors import ConfigError
from plaudit.rewards.settings import JudgeSettings, RewardComponent, RewardSettings

OLD_REWARD_KEYS: dict[str, Any] = {"function_weight": float, "also": tuple[RewardComponent, ...]}
"""Keys of the older format, before `reward.components` was a single list."""

T = TypeVar("T")


def load(config_type: type[T], path: Path) -> T:
    """The config in the file. Settings that the file omits have their defaults."""
    values = read(config_type, path)
    try:
        return _replaced(config_type(), values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def from_dict(config_type: type[T], values: Mapping[str, Any], path: Path) -> T:
    """The config that a run saved as plain values (`settings.plain.to_dict`). `path` names the file in errors."""
    try:
        return _replaced(config_type(), _section(config_type, values, path, prefix="", root=config_type))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def unchecked_defaults(config_type: type[T], path: Path) -> T:
    """The file's settings over the defaults, *not checked against each other*.

    Only for the command line, which overrides some settings and checks the result when it builds the config. A file's
    `batch_size` may conflict with a default `mini_batch_size` that a flag then changes.
    """
    return _overlaid(config_type(), read(config_type, path))


def read(config_type: type, path: Path) -> dict[str, Any]:
    """The file's settings, nested like the dataclasses of `config_type`, each converted to its field's type.

    Raises `ConfigError` with the file, the key, the value, and the closest valid key or the expected type.
    """
    import yaml

    path = presets.find(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; the presets are {', '.join(presets.names())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the config file: {error}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if isinstance(values, Mapping) and values.keys() == {"stages"}:
        return _own_part(config_type, values["stages"], path)
    return {} if values is None else _section(config_type, values, path, prefix="", root=config_type)


def has_stages(path: Path) -> bool:
    """Whether a settings file has a part for each of several stages. False for one that can't be read."""
    import yaml

    try:
        values = yaml.safe_load(presets.find(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(values, Mapping) and values.keys() == {"stages"}


def _own_part(config_type: type, parts: object, path: Path) -> dict[str, Any]:
    """The part of a file with settings of several stages (`stages: {sft: …, ppo: …}`) that is for `config_type`."""
    stage = getattr(config_type, "stage", None)
    if not isinstance(parts, Mapping) or stage not in parts:
        there = ", ".join(map(str, parts)) if isinstance(parts, Mapping) else "nothing"
        raise ConfigError(
            f"{path}: its stages are {there}, and none of them is for this command ({stage or 'it has none'})"
        )
    values = parts[stage]
    if values is None:
        return {}
    return _section(config_type, values, Path(f"{path}, stages.{stage}"), prefix="", root=config_type)


def _section(config_type: type, values: object, path: Path, prefix: str, root: type) -> dict[str, Any]:
    types = _types(config_type) | (OLD_REWARD_KEYS if config_type is RewardSettings else {})
    if not isinstance(values, Mapping):
        found = f"{prefix.removesuffix('.')}={values!r}" if prefix else f"found {values!r}"
        raise ConfigError(f"{path}: {found}: must be lines of `key: value` with keys among {', '.join(types)}")
    result: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if key not in types:
            raise ConfigError(f"{path}: {dotted}={value!r}: no such setting; {_did_you_mean(root, dotted)}")
        wanted = types[key]
        if isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
            result[key] = _section(wanted, value, path, f"{dotted}.", root)
        else:
            result[key] = _value(wanted, value, path, dotted)
    return _listed(result, path) if config_type is RewardSettings else result


def _listed(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Reward settings in the current format, with all rewards in `components`; single-reward keys are converted."""
    own = {key: values.pop(key) for key in _types(RewardComponent) if key in values}
    also, function_weight = values.pop("also", ()), values.pop("function_weight", 1.0)
    if not own and not also:
        return values
    if "judge" in own:
        own["judge"] = JudgeSettings(**own["judge"])
    if "components" in values:
        raise ConfigError(f"{path}: reward.components and reward.{next(iter(own), 'also')} can't both be given")
    try:
        components = []
        if own.get("url") and own.get("function"):
            function = own.pop("function")
            extra = own | {"url": (), "function": function, "name": function.rpartition(":")[2]}
            components = [RewardComponent(**own), RewardComponent(**extra | {"weight": function_weight})]
        elif own.get("url") or own.get("function") or not also:
            components = [RewardComponent(**own)]
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return values | {"components": (*components, *also)}


def _value(wanted: Any, value: object, path: Path, dotted: str) -> object:
    from pydantic import TypeAdapter, ValidationError

    try:
        # Not strict: YAML 1.1 reads 1e-5, which has no dot, as a string.
        result: object = TypeAdapter(wanted).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        hint = f"; write it as a list: [{value}]" if problem["type"] == "tuple_type" else ""
        raise ConfigError(f"{path}: {dotted}={value!r}: {problem['msg'].lower()}{hint}") from None
    if isinstance(value, bool) and not isinstance(result, bool):
        raise ConfigError(f"{path}: {dotted}={value!r}: input should be a number, not true or false")
    return result


def _did_you_mean(config_type: type, dotted: str) -> str:
    keys = list(_dotted_keys(config_type))
    leaf = dotted.rpartition(".")[2]
    elsewhere = [key for key in keys if key.rpartition(".")[2] == leaf]
    section = dotted.rpartition(".")[0]
    beside = [key for key in keys if key.rpartition(".")[0] == section]
    near = elsewhere or difflib.get_close_matches(dotted, beside, n=1) or difflib.get_close_matches(dotted, keys, n=1)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"the settings here are {', '.join(beside)}"


def _dotted_keys(config_type: type, prefix: str = "") -> Iterator[str]:
    for name, wanted in _types(config_type).items():
        yield f"{prefix}{name}"
        if isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
            yield from _dotted_keys(wanted, f"{prefix}{name}.")


def _types(config_type: type) -> dict[str, Any]:
    types = typing.get_type_hints(config_type)
    if config_type is RewardSettings:
        # The keys of a single reward may appear next to the shared ones.
        types = typing.get_type_hints(RewardComponent) | types
    return {
        name: kind
        for name, kind in types.items()
        if typing.get_origin(kind) is not typing.ClassVar and kind is not typing.ClassVar
    }


def _replaced(config: T, values: Mapping[str, Any]) -> T:
    changes = {k: _replaced(getattr(config, k), v) if isinstance(v, dict) else v for k, v in values.items()}
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _overlaid(config: T, values: Mapping[str, Any]) -> T:
    result = object.__new__(type(config))  # __init__ would check
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        current = getattr(config, field.name)
        value = values.get(field.name, current)
        object.__setattr__(result, field.name, _overlaid(current, value) if isinstance(value, dict) else value)
    return result
