"""YAML node -> checked dataclass. The only place that resolves `_target_`; importing it does not
import torch.

A component's dataclass fields are its YAML keys. Its `__post_init__` raises `ValueError("field:
must be ..., got ...")`, which becomes one line with the whole path in front: `cache.policy.every:
must be >= 1, got 0`.
"""

import dataclasses
import importlib
import os
import sys
import types
import typing
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ditcache.arguments import escape_interpolation
from ditcache.cli import conf_dir, options
from ditcache.errors import ConfigError, first_line, one_of

T = TypeVar("T")


def build(cfg: DictConfig, key: str, base: type[T]) -> T:
    """`cfg[key]` (all of `cfg` if `key` is "") -> an instance of `base` or of the subclass its
    `_target_` names.

    Raises ConfigError for anything a user can mend: an unknown key or class, a wrong type, a value
    out of range.
    """
    node = OmegaConf.select(cfg, key) if key else cfg
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{key}: needs a group of keys with `_target_`, got {node!r}")
    cls = target_class(node, key, base)
    if not dataclasses.is_dataclass(cls):
        raise ConfigError(
            f"{path(key, '_target_')}: {cls.__module__}.{cls.__qualname__} is not a dataclass"
        )
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls) if field.init}
    parts: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name in (str(n) for n in node if n not in ("_target_", "hydra")):
        if name not in fields:
            raise ConfigError(f"{path(key, name)}: no such key. {one_of(name, fields)}")
        child, part = component_of(hints[name]), resolved(node, name, key)
        if child is not None and part is None and type(None) not in typing.get_args(hints[name]):
            raise ConfigError(f"{path(key, name)}: needs an option, not null")
        if child is not None:
            parts[name] = None if part is None else build(cfg, path(key, name), child)
        else:
            values[name] = (
                OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part
            )
    checked = {name: convert(path(key, name), hints[name], value) for name, value in values.items()}
    try:
        return typing.cast(T, cls(**checked, **parts))
    except TypeError:
        missing = [
            f.name for f in dataclasses.fields(cls) if required(f) and f.name not in checked | parts
        ]
        if not missing:
            raise
        raise ConfigError(f"{path(key, missing[0])}: needs a value") from None
    except ValueError as error:
        raise ConfigError(path(key, str(error))) from None


def path(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def resolved(node: DictConfig, name: str, key: str) -> Any:
    try:
        return node[name]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path(key, name)}: {first_line(error)}") from None


def convert(where: str, hint: Any, value: Any) -> Any:
    """One resolved value checked and converted by OmegaConf's own rules for `hint`."""
    holder = dataclasses.make_dataclass("Value", [("value", hint)])
    try:
        typed = OmegaConf.merge(OmegaConf.structured(holder), {"value": literal(value)})
        return typing.cast(dict, OmegaConf.to_container(typed, resolve=True))["value"]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {first_line(error)}") from None


def literal(value: Any) -> Any:
    """A value whose `${` stay as they are: interpolations have been resolved, what is left is
    text.
    """
    if isinstance(value, str):
        return escape_interpolation(value)
    if isinstance(value, dict):
        return {key: literal(part) for key, part in value.items()}
    return [literal(part) for part in value] if isinstance(value, list) else value


def component_of(hint: Any) -> type | None:
    """The dataclass a field holds (`X` or `X | None`), or None for plain values."""
    choices = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint)
        else (hint,)
    )
    classes = [c for c in choices if isinstance(c, type) and dataclasses.is_dataclass(c)]
    return classes[0] if classes else None


def target_class(node: DictConfig, key: str, base: type) -> type:
    """The class `_target_` names, which must derive from `base`; `base` itself where there is no
    `_target_`.
    """
    where = path(key, "_target_")
    if OmegaConf.is_missing(node, "_target_"):
        raise ConfigError(f"{where}: needs package.module.Class, a {base.__name__}")
    target = node.get("_target_")
    if target is None:
        return base
    cls = locate(str(target), where)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ConfigError(f"{where}: {target} is not a {base.__name__}")
    return cls


def locate(target: str, where: str) -> Any:
    """Import `package.module.Name`; the working directory counts, so that users can keep their own
    classes there.
    """
    module_name, _, name = target.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{where}: cannot import {target}: {first_line(error)}") from None
    except (ValueError, TypeError):
        raise ConfigError(f"{where}: needs package.module.Class, got '{target}'") from None
    if not hasattr(module, name):
        names = [n for n in vars(module) if isinstance(vars(module)[n], type)]
        raise ConfigError(f"{where}: {module_name} has no '{name}'. {one_of(name, names)}")
    return getattr(module, name)


def load_yaml(group: str, name: str) -> DictConfig:
    """conf/<group>/<name>.yaml as it stands, for the Python API, which needs no Hydra."""
    path = conf_dir() / group / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"{group}: no option '{name}'. {one_of(name, options(group))}")
    node = OmegaConf.load(path)
    assert isinstance(node, DictConfig)
    return node
