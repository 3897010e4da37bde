"""What a run may change of an experiment, as a form: the fields of `Experiment` with their docs, choices and bounds, none of them
required."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model
from pydantic.fields import FieldInfo

from model.config import Experiment, Section

_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most", "exclusiveMaximum": "less than"}
"""JSON schema's words for bounds, and ours: Prefect's form does not show them."""
_PYDANTICS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
"""What pydantic writes in their place where it converts a value first; nobody else knows these."""


def _optional(kind: type[Section]) -> type[BaseModel]:
    """`kind` with every field optional. What holds between fields is not asked here: that is known of the whole experiment only."""
    fields: dict[str, Any] = {name: (_annotation(field), _described(field)) for name, field in kind.model_fields.items()}
    return create_model(
        f"{kind.__name__.removesuffix('Config')}Changes",
        __doc__=kind.__doc__,
        __config__=ConfigDict(extra="forbid", strict=True, protected_namespaces=()),
        **fields,
    )


def _annotation(field: FieldInfo) -> Any:
    """The field's type and bounds; the bounds nearest to the type, where JSON schema has a word for them."""
    annotation = field.annotation
    sections = [each for each in (annotation, *get_args(annotation)) if isinstance(each, type) and issubclass(each, Section)]
    if sections:
        return _optional(sections[0]) if annotation is sections[0] else _optional(sections[0]) | None
    bounds: list[Any] = sorted(field.metadata, key=lambda bound: isinstance(bound, BeforeValidator))
    typed: Any = annotation
    for bound in bounds:
        typed = Annotated[typed, bound]
    return typed


def _described(field: FieldInfo) -> Any:
    return Field(default=None, description=field.description, json_schema_extra=_for_a_form)


def _for_a_form(schema: dict[str, Any]) -> None:
    """What Prefect's form needs to send no value for a field that was left alone: no default, and a choice of true and false in place of a
    switch, which is always one of them. A choice of one in place of a constant, which it cannot send. And the bounds in words."""
    schema.pop("default", None)
    if schema.get("type") == "boolean":
        del schema["type"]
        schema["enum"] = [True, False]
    bounds = []
    for kind in (schema, *schema.get("anyOf", [])):
        if "const" in kind:
            kind["enum"] = [kind.pop("const")]
        for theirs in _PYDANTICS.keys() & kind.keys():
            kind[_PYDANTICS[theirs]] = kind.pop(theirs)
        bounds += [f"{words} {kind[key]:,}" for key, words in _BOUNDS.items() if key in kind]
    if bounds:
        schema["description"] = f"{schema['description']} {' and '.join(bounds).capitalize()}."


if TYPE_CHECKING:

    class Changes(BaseModel):
        """The form; `changes_of` says what was filled in."""

else:
    Changes = _optional(Experiment)


def changes_of(form: Changes | None) -> dict[str, Any]:
    """The fields that were given, by section, as `overrides.yaml` holds them."""
    if form is None:
        return {}
    return {section: fields for section, fields in form.model_dump(mode="json", exclude_unset=True).items() if fields != {}}
