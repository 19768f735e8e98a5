"""Reads the sidecar's YAML configuration file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.config.shown import shortened, shown_key, shown_value
from adaptive_spec.config.yaml_file import CONFIG_BYTES, read_yaml
from adaptive_spec.errors import BadInput

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
    "too_long": "a shorter list",
}
"""What is allowed, by pydantic's type of error."""

URL_KEYS = ("profile_store", "url")
"""Keys whose value may hold a secret."""

Section = TypeVar("Section", bound=BaseModel)


def load_settings(path: Path | None, overrides: Mapping[str, object] | None = None) -> SidecarSettings:
    """Read a configuration file (None: all defaults). overrides: values of top-level keys, which take precedence.

    Raises BadInput with one line: file, dotted key, what is allowed, value.
    """
    settings = SidecarSettings() if path is None else settings_from(read_yaml(path, CONFIG_BYTES), str(path))
    given = {key: str(value) if isinstance(value, Path) else value for key, value in (overrides or {}).items()}
    checked = validated(SidecarSettings, given, "command line")
    update = {key: getattr(checked, key) for key in given}
    if "server_port" in given and not settings.model_fields_set & {"runtime_dir"} and "runtime_dir" not in given:
        update["runtime_dir"] = checked.runtime_dir  # the default follows the port
    return settings.model_copy(update=update)


def settings_from(data: object, name: str) -> SidecarSettings:
    """Check parsed YAML (None: all defaults). Raises BadInput like `load_settings`, beginning with `name`."""
    if data is None:
        return SidecarSettings()
    settings = validated(SidecarSettings, data, name)
    policy = settings.controller.policy
    if policy.k_min > policy.k_max:
        raise BadInput(f"{name}: controller.policy.k_min: must be at most k_max, which is {policy.k_max}, got {policy.k_min}")
    if settings.profile_store_key_file is not None and settings.profile_store is None:
        raise BadInput(f"{name}: profile_store_key_file: needs profile_store, which is not set")
    for key in ("keyfile", "client_ca"):
        if getattr(settings, key) is not None and settings.certfile is None:
            raise BadInput(f"{name}: {key}: needs certfile, which is not set")
    return settings


def validated(section: type[Section], data: object, name: str) -> Section:
    """Check parsed YAML against a section. Raises BadInput: `name`, dotted key, what is allowed, value."""
    if not isinstance(data, dict):
        raise BadInput(f"{name}: must be keys and values, got a {type(data).__name__}")
    if (key := _not_unicode(data)) is not None:
        raise BadInput(f"{name}: {key}must be Unicode text, without unpaired surrogates")
    try:
        # Strict, and from JSON: "5" is not a number and true is not 1, but text is accepted as a path.
        return section.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise BadInput(f"{name}: {_explain(error.errors(include_url=False)[0], section)}") from error


def _not_unicode(data: object, key: str = "") -> str | None:
    """The place, as `key.key: `, of a text that cannot be encoded; None when there is none."""
    if isinstance(data, str):
        return None if data.isascii() or data.encode(errors="ignore").decode() == data else key
    for name, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        place = f"{key.removesuffix(': ')}{'.' if key else ''}{shown_key(name)}: "
        found = _not_unicode(name, place) if isinstance(name, str) else None
        if (found or _not_unicode(value, place)) is not None:
            return found or _not_unicode(value, place)
    return None


def _explain(error: ErrorDetails, root: type[BaseModel]) -> str:
    key = ".".join(shown_key(part) for part in error["loc"])
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
    shown = shown_value(value, is_url=error["loc"][-1] in URL_KEYS)
    reason = f"must be {wanted}" if wanted else shortened(error["msg"].removeprefix("Value error, "))
    return f"{key}: {reason}, got {shown}"


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
