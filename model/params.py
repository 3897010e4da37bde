"""Reading and writing YAML files of fields: `params.yaml` and what `--set` changes in it, as validated sections; errors are one line."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from model.config import PRESETS, Experiment, Section
from model.errors import UserError

MAX_YAML_BYTES = 1_000_000
"""A params file is a few kB. `yaml.safe_load` is quick on an alias bomb, walking its result is not: cap the size, forbid aliases."""

SectionType = TypeVar("SectionType", bound=Section)


class _Loader(yaml.SafeLoader):
    """Safe, without aliases, and a key given twice is an error instead of a silent loss."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {parent.start_mark.line + 1}: aliases (*name) are not allowed; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: the key {key!r} is not a word")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text. `source` names it in errors.

    Raises:
        UserError: not YAML, too large, an alias, a duplicate key, or a Python object.
    """
    if len(text) > MAX_YAML_BYTES:
        raise UserError(f"{source}: larger than {MAX_YAML_BYTES:,} bytes; a params file is a few kB")
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader, made stricter)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        what = getattr(error, "problem", None) or str(error) or "not valid YAML"
        raise UserError(f"{source}: {where}{' '.join(str(what).split())}") from None


def read_yaml(path: Path) -> Any:
    """The value of a YAML file; see `parse_yaml`. A missing or unreadable file is a `UserError`, too."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), path.name)
    except FileNotFoundError:
        raise UserError(f"{path.name}: not found in {path.parent}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name}: cannot be read: {error}") from None


def check_experiment_name(name: str) -> str:
    """The name itself, if it can be a folder's name, a registered model's, and a key of DVC's (where a dot separates keys).

    Raises:
        UserError: it is a path, or holds anything but letters, digits, `_`, `-`.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise UserError(f"experiment: {name[:80]!r} is not a name: letters, digits, '_' and '-', at most 64")
    return name


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section. Choosing another preset drops the base's own shape fields."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            if key == "model" and "preset" in value:
                old = {k: v for k, v in old.items() if k not in PRESETS["small"]}
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """`["training.max_steps=100"]` as `{"training": {"max_steps": 100}}`. Values are YAML.

    Raises:
        UserError: an assignment without `=`, or two that contradict each other.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        field, equals, text = assignment.partition("=")
        keys = field.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f"--set {assignment}: write SECTION.FIELD=VALUE, such as training.max_steps=100")
        value = parse_yaml(text, f"--set {field}")
        if isinstance(value, dict):
            raise UserError(f"--set {field}: give one field's value, not a group")
        section = overrides
        for key in keys[:-1]:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise UserError(f"--set {field}: contradicts another --set")
        if isinstance(section.get(keys[-1]), dict):
            raise UserError(f"--set {field}: names a group of fields; give one field")
        section[keys[-1]] = value
    return overrides


def load_experiment(params: Any, name: str, overrides: dict[str, Any] | None = None) -> Experiment:
    """The experiment `name` of a parsed `params.yaml`: defaults, its own entry, then `overrides`, validated.

    Raises:
        UserError: unknown experiment, unknown field, wrong type, value out of range: one line that names the field.
    """
    check_experiment_name(name)
    if not isinstance(params, dict) or set(params) != {"defaults", "experiments"}:
        raise UserError("params.yaml: needs the two groups `defaults` and `experiments`, and nothing else")
    defaults, experiments = params["defaults"] or {}, params["experiments"]
    if not isinstance(experiments, dict) or not isinstance(defaults, dict):
        raise UserError("params.yaml: `defaults` and `experiments` must be groups of fields")
    if name not in experiments:
        raise UserError(f"params.yaml: no experiment {name!r}; there are {', '.join(sorted(experiments))}")
    own = experiments[name] or {}
    if not isinstance(own, dict):
        raise UserError(f"params.yaml: experiments.{name} must be a group of fields")
    return validated(Experiment, merge(merge(defaults, own), overrides or {}), f"experiments.{name}")


def validated(kind: type[SectionType], fields: Any, source: str) -> SectionType:
    """`fields` as a `kind`; pydantic's complaints as one line, each naming its field after `source`."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise UserError("; ".join(f"{source}.{_complaint(detail)}" for detail in error.errors()[:5])) from None


def _complaint(detail: Any) -> str:
    field = ".".join(str(part) for part in detail["loc"])
    what = {"extra_forbidden": "no such field", "missing": "is missing"}.get(detail["type"])
    if what is None:
        what = detail["msg"].removeprefix("Value error, ")
        given = detail.get("input")
        if isinstance(given, str | int | float | bool | None) and detail["type"] != "value_error":
            what = f"{what[0].lower()}{what[1:]}, not {given!r}"
    return f"{field}: {what}" if field else what


def write_yaml(path: Path, value: Any) -> None:
    """Write `value` to `path` in one move: a reader sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")
    os.replace(partial, path)
