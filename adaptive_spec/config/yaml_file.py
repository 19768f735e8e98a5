"""YAML files: plain values, in bounded time and memory.

No anchors, aliases or tags: a few hundred bytes of aliases are gigabytes of values. At most LARGEST_BYTES long (a configuration
CONFIG_BYTES) and DEEPEST levels deep; numbers of at most LONGEST_NUMBER characters. A date is a text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import yaml

from adaptive_spec.config.shown import shortened, shown_value
from adaptive_spec.errors import BadInput, one_line
from adaptive_spec.regular_file import read_regular_file

CONFIG_BYTES = 32 << 10
LARGEST_BYTES = 1 << 20
"""Of a scenario, which may hold a measured curve. PyYAML reads about 100 KB/s."""
DEEPEST = 20
LONGEST_NUMBER = 40
"""Characters; 64-bit numbers have at most 20 digits. Python takes quadratic time for long ones."""


def _wrong(problem: str, place: yaml.Event | yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=cast("yaml.error.Mark", place.start_mark))


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without anchors, aliases and tags. A duplicate key is an error."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]  # types-PyYAML leaves it out
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _wrong("anchors and aliases are not allowed", event)
        if getattr(event, "tag", None) is not None:
            raise _wrong("tags are not allowed", event)
        self._depth += 1
        try:
            if self._depth > DEEPEST:
                problem = f"must be at most {DEEPEST} levels deep"
                raise _wrong(problem, event)
            node: yaml.Node | None = super().compose_node(parent, index)
            return node
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"duplicate key {shown_value(key.value)}", problem_mark=key.start_mark)
                seen.add(key.value)
            if not isinstance(key, yaml.ScalarNode) or re.fullmatch(".*:(bool|float|null)", key.tag):
                raise _wrong("a key must be a text", key)
        return super().construct_mapping(node, deep)

    def construct_date(self, node: yaml.ScalarNode) -> str:
        return str(self.construct_scalar(node))

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        if len(node.value) > LONGEST_NUMBER:
            problem = f"a number must be at most {LONGEST_NUMBER} characters long"
            raise _wrong(problem, node)
        number: int | float = self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)
        return number


_PlainLoader.add_constructor("tag:yaml.org,2002:timestamp", _PlainLoader.construct_date)
_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_number)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _PlainLoader.construct_number)


def read_yaml(path: Path, largest_bytes: int = LARGEST_BYTES) -> object:
    """Parse a YAML file. Raises BadInput with one line: file, line, reason."""
    try:
        text = read_regular_file(path, largest_bytes, follow_links=True).data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: cannot be read: not UTF-8 text") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise BadInput(f"{path}: cannot be read: {reason}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> object:
    """Parse YAML; `name` begins the message. Raises BadInput with one line."""
    try:
        return yaml.load(text, Loader=_PlainLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise BadInput(f"{name}: {line}not valid YAML: {shortened(one_line(_Problem(error)))}") from error
    except Exception as error:  # PyYAML raises LookupError, AttributeError and others for some values that are not valid
        raise BadInput(f"{name}: not valid YAML: {shortened(one_line(error))}") from error


class _Problem(Exception):  # noqa: N818 - carries the problem of a YAML error to one_line
    def __init__(self, error: yaml.MarkedYAMLError) -> None:
        super().__init__(error.problem or error.context or "no reason is known")
