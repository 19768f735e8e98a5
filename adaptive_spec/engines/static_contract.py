"""Checks statically what a plugin needs of an engine: names, signatures, attributes, calls. Nothing of the engine is imported.

The needs of one plugin are one table of `Need`, in groups that may fail separately (see `engines/sglang/contract.py`).
`unmet(tree, needs)` says which of them a source tree does not meet; the tree is a wheel or an installed package
(`installed`). It costs milliseconds per module read, and knows no engine.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from adaptive_spec.engines.source_tree import Found, FunctionNode, SourceTree


class Need(NamedTuple):
    """One thing that must be there.

    group: what fails without it. path: dotted path of a function, class, member of a class, or module-level name.
    parameters: names of the first positional parameters, in this order; of a class: of its constructor, without `self`.
    keywords: parameters that can be given by name. attributes: of objects of the class at `path`.
    calls: functions or methods that the body of the function at `path` calls, by their last name.
    hook: the plugin's name for its hook on this function, "" for none. called: the plugin itself calls it with exactly
    `parameters` and `keywords`, so that no other parameter may be required. extensible: the plugin sets attributes of its own on
    objects of this class.
    """

    group: str
    path: str
    parameters: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    hook: str = ""
    called: bool = False
    extensible: bool = False


class Unmet(NamedTuple):
    """A need that is not met. text: what is wrong, without the path."""

    group: str
    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


class _Signature(NamedTuple):
    """positional: in order. keyword_only. required: those without a default. var_*: whether *args and **kwargs are taken."""

    positional: tuple[str, ...]
    keyword_only: tuple[str, ...]
    required: frozenset[str]
    var_positional: bool
    var_keyword: bool


def installed(package: str) -> SourceTree | None:
    """The source of an installed package, which is not imported; None when it is not installed."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a stand-in module that was not loaded from anywhere
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return SourceTree(Path(next(iter(spec.submodule_search_locations))).parent)


def unmet(tree: SourceTree, needs: Iterable[Need]) -> list[Unmet]:
    """What a source tree lacks, in the order of the needs. Empty: all is there. Never raises for what the tree contains."""
    found: list[Unmet] = []
    for need in needs:
        try:
            texts = _wrong(tree, need)
        except (SyntaxError, UnicodeDecodeError) as error:
            texts = [f"its source cannot be read: {' '.join(str(error).split())}"]
        found.extend(Unmet(need.group, need.path, text) for text in texts)
    return found


def _wrong(tree: SourceTree, need: Need) -> list[str]:
    found = tree.find(need.path)
    if found is None:
        return ["not there"]
    texts = []
    if need.hook and not (isinstance(found.node, FunctionNode) and not _is_property(found.node)):
        texts.append("not a function that can be hooked")
    elif need.hook or need.parameters or need.keywords or need.called:
        signature = _signature(tree, found)
        texts.extend(_wrong_parameters(signature, need) if signature is not None else ["not a function or class"])
    if need.attributes and not isinstance(found.node, ast.ClassDef):
        texts.append("not a class")
    elif need.attributes:
        texts.extend(f"no attribute {name}" for name in need.attributes if not tree.has_attribute(found, name))
    if need.extensible and _closed(tree, found):
        texts.append("takes no attributes of others (slots)")
    if need.calls:
        made = _calls(found.node) if found.node is not None else frozenset()
        texts.extend(f"does not call {name}" for name in need.calls if name not in made)
    return texts


def _wrong_parameters(signature: _Signature, need: Need) -> list[str]:
    texts = []
    for at, name in enumerate(need.parameters):
        if at < len(signature.positional):
            if signature.positional[at] != name:
                texts.append(f"parameter {at + 1} is {signature.positional[at]}, not {name}")
        elif name in signature.keyword_only or not signature.var_positional:
            texts.append(f"no positional parameter {name}")
    by_name = {*signature.positional, *signature.keyword_only}
    texts.extend(f"no parameter {name}" for name in need.keywords if name not in by_name and not signature.var_keyword)
    if need.called:
        given = {*need.parameters, *need.keywords}
        texts.extend(f"requires a parameter {name} as well" for name in sorted(signature.required - given))
    return texts


def _signature(tree: SourceTree, found: Found) -> _Signature | None:
    if isinstance(found.node, FunctionNode):
        return _of_function(found.node, skip=0)
    if not isinstance(found.node, ast.ClassDef):
        return None
    constructor = tree.member(found, "__init__")
    if constructor is not None and isinstance(constructor.node, FunctionNode):
        return _of_function(constructor.node, skip=1)
    return _of_fields(tree, found)


def _of_function(node: FunctionNode, skip: int) -> _Signature:
    """skip: leading parameters that the caller does not give."""
    arguments = node.args
    positional = [a.arg for a in arguments.posonlyargs + arguments.args]
    required = positional[: len(positional) - len(arguments.defaults)][skip:]
    required += [a.arg for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is None]
    return _Signature(
        tuple(positional[skip:]),
        tuple(a.arg for a in arguments.kwonlyargs),
        frozenset(required),
        arguments.vararg is not None,
        arguments.kwarg is not None,
    )


def _of_fields(tree: SourceTree, found: Found) -> _Signature:
    """The constructor that dataclass, NamedTuple and msgspec.Struct make of annotated fields."""
    fields: dict[str, bool] = {}
    for one in reversed(list(tree.classes(found))):
        assert isinstance(one.node, ast.ClassDef)
        for statement in one.node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                fields[statement.target.id] = statement.value is None
    required = frozenset(name for name, bare in fields.items() if bare)
    return _Signature(tuple(fields), (), required, False, False)


def _is_property(node: FunctionNode) -> bool:
    names = {
        d.attr if isinstance(d, ast.Attribute) else d.id for d in node.decorator_list if isinstance(d, ast.Name | ast.Attribute)
    }
    return bool(names & {"property", "cached_property"})


def _closed(tree: SourceTree, found: Found) -> bool:
    """Whether objects of a class have slots only: msgspec.Struct, NamedTuple, `slots=True`; or `__slots__`."""
    for one in tree.classes(found):
        assert isinstance(one.node, ast.ClassDef)
        bases = {
            b.attr if isinstance(b, ast.Attribute) else b.id for b in one.node.bases if isinstance(b, ast.Name | ast.Attribute)
        }
        keywords = [k for d in one.node.decorator_list if isinstance(d, ast.Call) for k in d.keywords]
        slots = any(k.arg == "slots" and isinstance(k.value, ast.Constant) and k.value.value is True for k in keywords)
        if slots or bases & {"Struct", "NamedTuple"} or tree.member(Found(one.module, one.node), "__slots__") is not None:
            return True
    return False


def _calls(node: ast.AST) -> frozenset[str]:
    functions = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
    return frozenset(
        f.attr if isinstance(f, ast.Attribute) else f.id for f in functions if isinstance(f, ast.Name | ast.Attribute)
    )
