"""Reads the sidecar's YAML configuration file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.errors import BadInput, one_line

_WANTED = {
    "float_type": "a number",
    "float_parsing": "a number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "finite_number": "a finite number",
    "model_type": "a section of keys and values",
    "model_attributes_type": "a section of keys and values",
    "string_too_short": "text that is not empty",
    "list_type": "a list",
    "dict_type": "a section of keys and values",
    "too_short": "a longer list",
}
"""What is allowed, by pydantic's type of error."""

Section = TypeVar("Section", bound=BaseModel)


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML loader that refuses a duplicate key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_settings(path: Path | None, overrides: Mapping[str, object] | None = None) -> SidecarSettings:
    """Read a configuration file (None: all defaults). overrides: values of top-level keys, which take precedence.

    Raises BadInput with one line: file, dotted key, what is allowed, value.
    """
    settings = SidecarSettings() if path is None else settings_from(read_yaml(path), str(path))
    return settings.model_copy(update=dict(overrides or {}))


def read_yaml(path: Path) -> object:
    """Parse a YAML file without duplicate keys. Raises BadInput with one line: file, line, reason."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise BadInput(f"{path}: cannot be read: {reason}") from error
    try:
        return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise BadInput(f"{path}: {line}not valid YAML: {error.problem or error}") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise BadInput(f"{path}: not valid YAML: {one_line(error)}") from error


def settings_from(data: object, name: str) -> SidecarSettings:
    """Check parsed YAML (None: all defaults). Raises BadInput like `load_settings`, beginning with `name`."""
    if data is None:
        return SidecarSettings()
    settings = validated(SidecarSettings, data, name)
    policy = settings.controller.policy
    if policy.k_min > policy.k_max:
        raise BadInput(f"{name}: controller.policy.k_min: must be at most k_max, which is {policy.k_max}, got {policy.k_min}")
    return settings


def validated(section: type[Section], data: object, name: str) -> Section:
    """Check parsed YAML against a section. Raises BadInput: `name`, dotted key, what is allowed, value."""
    if not isinstance(data, dict):
        raise BadInput(f"{name}: must be keys and values, got a {type(data).__name__}")
    try:
        # Strict, and from JSON: "5" is not a number and true is not 1, but text is accepted as a path.
        return section.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise BadInput(f"{name}: {_explain(error.errors(include_url=False)[0], section)}") from error


def _explain(error: ErrorDetails, root: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    if kind == "extra_forbidden":
        fields = _section(root, error["loc"][:-1]).model_fields
        return f"{key}: unknown key; must be one of {', '.join(info.alias or name for name, info in fields.items())}"
    if kind == "missing":
        return f"{key}: is missing"
    bounds = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    wanted = next((f"{words} {context[bound]:g}" for bound, words in bounds.items() if bound in context), None)
    if kind == "literal_error":
        wanted = str(context["expected"])
    wanted = wanted or _WANTED.get(kind)
    return f"{key}: must be {wanted}, got {value!r}" if wanted else f"{key}: {error['msg']}, got {value!r}"


def _section(root: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The section at a location, which may lead through lists and through keys chosen by the user."""
    section = root
    for part in location:
        info = section.model_fields.get(str(part))
        if info is not None:
            section = next(sections_in(info.annotation), section)
    return section


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Sections in an annotation: itself, or the members of its list, dict or union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from sections_in(part)


def as_section(info: FieldInfo) -> type[BaseModel] | None:
    return info.annotation if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel) else None


def sections(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    yield prefix, section
    for name, info in section.model_fields.items():
        if (inner := as_section(info)) is not None:
            yield from sections(inner, f"{prefix}{name}.")
