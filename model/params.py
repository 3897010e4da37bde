"""Reading and writing YAML files of fields: `params.yaml` and what `--set` changes in it, as validated sections; errors are one line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from model import disk
from model.config import PRESETS, Experiment, Section
from model.errors import UserError

MAX_YAML_BYTES = 100_000
"""A params file is a few kB; the parser takes ten seconds for a MB."""
MAX_DEPTH = 20
"""Of groups in groups. Python's own limit comes later, and walks that recurse (merging, validating) must not meet it."""
MAX_DIGITS = 32
"""Of a number: reading more takes the square of their number."""

SectionType = TypeVar("SectionType", bound=Section)

_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_RESERVED = re.compile(r"CON|PRN|AUX|NUL|(COM|LPT)[0-9]", re.IGNORECASE)
"""Names of devices on Windows, whatever the case: no folder can have them."""


class _PlainLoader(yaml.SafeLoader):
    """Plain values only (a date stays the word that it was), of bounded depth, and a key given twice is an error instead of a silent loss.

    Not libyaml's CSafeLoader: 200,000 opening brackets end its process.
    """

    yaml_constructors = {  # noqa: RUF012 (PyYAML's own table)
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix("tag:yaml.org,2002:") in _PLAIN
    }
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: more than {MAX_DEPTH} groups in each other")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: the key {_shown(str(key))} is not a word")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: the key {_shown(key)!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and (wrong := _UNUSABLE.search(value)):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the character {wrong[0]!r} has no place in a value")
        if node.tag == "tag:yaml.org,2002:int" and len(value) > MAX_DIGITS:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: a number of {len(value)} digits")
        return value


class _Loader(_PlainLoader):
    """Without aliases, too: what is a few lines long stays a few lines long."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: aliases (*name) are not allowed; write the value out")
        return super().compose_node(parent, index)


_UNUSABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
"""Control characters (a NUL in a path, an escape sequence in what is printed) and halves of characters, which no file can hold."""


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text: groups, lists, words, numbers, true, false, null. `source` names it in errors.

    Raises:
        UserError: not YAML, too large, too deep, an alias, a duplicate key, or a Python object.
    """
    if len(text) > MAX_YAML_BYTES:
        raise UserError(f"{source}: larger than {MAX_YAML_BYTES:,} bytes; a params file is a few kB")
    return _parsed(text, source, _Loader)


def read_yaml(path: Path) -> Any:
    """The value of a YAML file; see `parse_yaml`. A missing or unreadable file is a `UserError`, too."""
    with _readable(path), path.open("rb") as file:
        text = file.read(MAX_YAML_BYTES + 1).decode()
    return parse_yaml(text, path.name)


def read_long_yaml(path: Path) -> Any:
    """The value of a YAML file that a program wrote, such as dvc.lock: of any size, and with aliases; else as `read_yaml`.

    Raises:
        UserError: the file is missing or unreadable, not YAML, too deep, a duplicate key, or a Python object.
    """
    with _readable(path):
        text = path.read_text(encoding="utf-8")
    return _parsed(text, path.name, _PlainLoader)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path.name}: not found in {path.parent}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name}: is not UTF-8 text (byte {error.start:,})") from None
    except OSError as error:
        raise UserError(f"{path.name}: cannot be read: {error.strerror or error}") from None


def _parsed(text: str, source: str, loader: type[yaml.SafeLoader]) -> Any:
    try:
        return yaml.load(text, Loader=loader)  # noqa: S506 (a SafeLoader, made stricter)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        what = getattr(error, "problem", None) or str(error) or "not valid YAML"
        raise UserError(f"{source}: {where}{_shown(' '.join(str(what).split()), 300)}") from None


def _shown(text: str, length: int = 80) -> str:
    """What a file or a command line held, as a message can hold it: short, and without characters that command a terminal."""
    printable = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text[: length + 1])
    return printable if len(text) <= length else printable[:length] + "…"


def check_experiment_name(name: str) -> str:
    """The name itself, if it can be a folder's name on any system, a registered model's, and a key of DVC's (where a dot separates keys).

    Raises:
        UserError: it is a path or a device, or holds anything but letters, digits, `_`, `-`.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise UserError(f"experiment: {name[:80]!r} is not a name: letters, digits, '_' and '-', at most 64")
    if _RESERVED.fullmatch(name):
        raise UserError(f"experiment: {name!r} is not a name: it is a device on Windows; choose another")
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
        field = field.strip()
        keys = field.split(".")
        if not equals or len(keys) > MAX_DEPTH or not all(re.fullmatch(r"[A-Za-z]\w*", key) for key in keys):
            raise UserError(f"--set {_shown(assignment)}: write SECTION.FIELD=VALUE, such as training.max_steps=100")
        field = _shown(field)
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
        raise UserError(f"params.yaml: no experiment {name!r}; there are {_shown(', '.join(sorted(experiments)), 500)}")
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
    field = _shown(".".join(str(part) for part in detail["loc"]))
    what = {"extra_forbidden": "no such field", "missing": "is missing"}.get(detail["type"])
    if what is None:
        what = detail["msg"].removeprefix("Value error, ")
        given = detail.get("input")
        if isinstance(given, str | int | float | bool | None) and detail["type"] != "value_error":
            what = f"{what[0].lower()}{what[1:]}, not {_shown(repr(given))}"
    return f"{field}: {what}" if field else what


def write_yaml(path: Path, value: Any) -> None:
    """Write `value` to `path` in one move: a reader sees the old file or the new one."""
    disk.write_file(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120).encode())
