"""Generates docs/configuration.md from the settings: `python -m docs.reference_pages.configuration` prints it."""

from __future__ import annotations

from typing import get_args, get_origin

from pydantic.fields import FieldInfo

from adaptive_spec.config.load import as_section, sections
from adaptive_spec.config.settings import SidecarSettings


def configuration_page() -> str:
    """Return docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Made by `make docs` from `adaptive_spec/config/settings.py`; do not edit.",
        "",
        "`adaptive-spec sidecar --config FILE` reads YAML. All keys are optional. An unknown or duplicate key, a wrong type or a",
        "value out of range is an error: one line with the key, its value and what is allowed, and exit status 2.",
        "",
    ]
    for prefix, section in sections(SidecarSettings):
        fields = {name: info for name, info in section.model_fields.items() if as_section(info) is None}
        lines += [f"## {f'`{prefix[:-1]}`' if prefix else 'Sidecar'}", "", " ".join((section.__doc__ or "").split()), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for name, info in fields.items():
            default = "by user and port" if info.default_factory else "none" if info.default is None else f"`{info.default}`"
            lines.append(f"| `{prefix}{name}` | {_type_words(info)} | {default} | {info.description} |")
        lines.append("")
    return "\n".join(lines)


def _type_words(info: FieldInfo) -> str:
    choices = [str(choice) for choice in get_args(info.annotation) if isinstance(choice, str)]
    if choices:
        return " or ".join(f"`{choice}`" for choice in choices)
    names = {"int": "whole number", "float": "number", "str": "text", "Path": "path", "bool": "true or false"}
    if get_origin(info.annotation) is list:
        return "list of texts"
    # A checked type, as FolderPath, is Annotated[Path, ...]: its first argument is the type.
    optional = [getattr(kind, "__origin__", kind) for kind in get_args(info.annotation) if kind is not type(None)]
    if len(optional) == 1:
        return f"{names[optional[0].__name__]} or nothing"
    return names[getattr(info.annotation, "__name__", "")]


if __name__ == "__main__":
    print(configuration_page(), end="")
