"""Finds what plugin sources use of an engine, so that a test can hold it against the plugin's contract.

Three kinds of use: imports of the engine's names; strings that are dotted paths of the engine (hook targets); attributes of
objects of the engine. Such an object is a parameter, field or variable annotated `Any`, or whatever was taken from one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Use(NamedTuple):
    """name: dotted path, or an attribute. line: in the source."""

    name: str
    line: int


def imports(tree: ast.Module, package: str) -> Iterator[Use]:
    """Dotted paths of what is imported from the package, at any level of the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] == package:
            yield from (Use(f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (Use(a.name, node.lineno) for a in node.names if a.name.partition(".")[0] == package)


def paths(tree: ast.Module, prefix: str) -> Iterator[Use]:
    """Strings that are dotted paths below the prefix, also put together with `+` from constants of the module."""
    constants: dict[str, tuple[str, ...]] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
            constants[statement.targets[0].id] = _texts(statement.value, constants)
    yield from _paths_in(tree, prefix, constants)


def _paths_in(node: ast.AST, prefix: str, constants: dict[str, tuple[str, ...]]) -> Iterator[Use]:
    if isinstance(node, ast.Constant | ast.BinOp):
        for text in _texts(node, constants):
            if text.startswith(prefix) and all(part.isidentifier() for part in text.split(".")):
                yield Use(text, node.lineno)
    if isinstance(node, ast.BinOp):
        return  # its parts are no paths of their own
    for generator in getattr(node, "generators", ()):
        if isinstance(generator.target, ast.Name) and isinstance(generator.iter, ast.Tuple):
            items = tuple(text for item in generator.iter.elts for text in _texts(item, constants))
            constants = {**constants, generator.target.id: items}
    for child in ast.iter_child_nodes(node):
        yield from _paths_in(child, prefix, constants)


def _texts(node: ast.expr, constants: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Strings an expression may be."""
    if isinstance(node, ast.Constant):
        return (node.value,) if isinstance(node.value, str) else ()
    if isinstance(node, ast.Name):
        return constants.get(node.id, ())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return tuple(a + b for a in _texts(node.left, constants) for b in _texts(node.right, constants))
    return ()


def attributes(tree: ast.Module, package: str) -> Iterator[Use]:
    """Attributes read from, or set on, objects of the engine."""
    engine_names = {use.name.rpartition(".")[2] for use in imports(tree, package)}
    fields = {name for owner in ast.walk(tree) if isinstance(owner, ast.ClassDef) for name in _fields(owner)}
    outer = [*tree.body, *(s for owner in tree.body if isinstance(owner, ast.ClassDef) for s in owner.body)]
    for function in outer:
        if isinstance(function, ast.FunctionDef):
            yield from _of_function(function, fields, engine_names)


def _fields(owner: ast.ClassDef) -> Iterator[str]:
    """Fields of `self` that are annotated `Any`, or set to a parameter that is."""
    for method in owner.body:
        if not isinstance(method, ast.FunctionDef):
            continue
        given = set(_any_parameters(method))
        for node in ast.walk(method):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute) and _is_any(node.annotation):
                yield node.target.attr
            elif isinstance(node, ast.Assign):
                for target, value in _pairs(node):
                    if isinstance(target, ast.Attribute) and _root(value) in given and not isinstance(value, ast.Call):
                        yield target.attr


def _of_function(function: ast.FunctionDef, fields: set[str], engine_names: set[str]) -> Iterator[Use]:
    known = set(_any_parameters(function))

    def theirs(node: ast.expr) -> bool:
        """Whether an expression is taken from an object of the engine."""
        if isinstance(node, ast.Name):
            return node.id in known
        if isinstance(node, ast.Attribute):
            on_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            return node.attr in fields if on_self else theirs(node.value)
        if isinstance(node, ast.Call):
            own = isinstance(node.func, ast.Name) and node.func.id in engine_names
            return own or (isinstance(node.func, ast.Attribute) and theirs(node.func))
        return isinstance(node, ast.Subscript) and theirs(node.value)

    for _ in range(3):  # names may be bound from names bound below
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                known |= {t.id for t, value in _pairs(node) if isinstance(t, ast.Name) and theirs(value)}
            elif isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, ast.Name) and theirs(node.iter):
                known.add(node.target.id)
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and theirs(node.value):
            yield Use(node.attr, node.lineno)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            name = node.args[1]
            if theirs(node.args[0]) and isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield Use(name.value, node.lineno)


def _pairs(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Targets and values of an assignment, one by one where both are tuples."""
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        else:
            yield target, node.value


def _any_parameters(function: ast.FunctionDef) -> Iterable[str]:
    nested = [f for f in ast.walk(function) if isinstance(f, ast.FunctionDef)]
    given = [a for f in nested for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)]
    return [a.arg for a in given if a.annotation is not None and _is_any(a.annotation) and a.arg != "self"]


def _is_any(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "Any"


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
