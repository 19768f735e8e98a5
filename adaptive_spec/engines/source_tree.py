"""What a package defines, read from its source text. Nothing of it is imported or run.

A `SourceTree` reads a folder or a wheel (both by the interface of `pathlib.Path`), parses a module at its first use, and
finds functions, classes, and the attributes of objects. It follows re-exports (`from .new import X`), aliases (`Y = X`) and base
classes inside the tree. It knows no engine.

What only exists at run time is not seen: names made by `setattr` with a computed name, by metaclasses and by decorators.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Module:
    """One parsed module. name: dotted. is_package: whether it is an `__init__.py`."""

    def __init__(self, name: str, text: str, is_package: bool) -> None:
        self.name, self.is_package = name, is_package
        self.body = ast.parse(text).body
        self.bindings: dict[str, list[ast.stmt]] = {}
        """Statements at module level that bind a name, also inside `if`, `try` and `with`."""
        self.stars: list[ast.ImportFrom] = []
        for statement in _statements(self.body):
            if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
                self.stars.append(statement)
            for bound in _bound(statement):
                self.bindings.setdefault(bound, []).append(statement)

    @cached_property
    def words(self) -> frozenset[str]:
        """Names, attributes, keywords and string constants written anywhere in the module."""
        found: set[str] = set()
        for statement in self.body:
            for node in ast.walk(statement):
                if isinstance(node, ast.Name):
                    found.add(node.id)
                elif isinstance(node, ast.Attribute):
                    found.add(node.attr)
                elif isinstance(node, ast.keyword) and node.arg is not None:
                    found.add(node.arg)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                    found.add(node.value)
        return frozenset(found)


class Found(NamedTuple):
    """What a path stands for. node: None for something outside the tree, or a module. owner: the class a member was found in."""

    module: Module
    node: ast.stmt | None
    owner: ast.ClassDef | None = None


class SourceTree:
    """root: the folder that holds the top-level package, or such a folder inside a wheel (`open_wheel`)."""

    def __init__(self, root: Path | zipfile.Path) -> None:
        self._root = root
        self._modules: dict[str, Module | None] = {}
        self._set_by_methods: dict[ast.ClassDef, set[str]] = {}

    def module(self, name: str) -> Module | None:
        """None for a module that is not in the tree. Raises SyntaxError for one this Python cannot parse."""
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    def _read(self, name: str) -> Module | None:
        path = name.replace(".", "/")
        for file, is_package in ((f"{path}.py", False), (f"{path}/__init__.py", True)):
            found = self._root.joinpath(file)
            if found.is_file():
                return Module(name, found.read_text(encoding="utf-8"), is_package)
        return None

    def find(self, path: str) -> Found | None:
        """Find `package.module.Class.method`; None when it is not there."""
        parts = path.split(".")
        for length in range(len(parts), 0, -1):
            module = self.module(".".join(parts[:length]))
            if module is None:
                continue
            if length == len(parts):
                return Found(module, None)
            found = self._name(module, parts[length], frozenset())
            for part in parts[length + 1 :]:
                found = self.member(found, part) if found is not None else None
            return found
        return None

    def member(self, owner: Found, name: str) -> Found | None:
        """A method, property or class-level name of a class, or of its base classes in the tree."""
        for found in self.classes(owner):
            assert isinstance(found.node, ast.ClassDef)
            for statement in _statements(found.node.body):
                if name in _bound(statement):
                    return Found(found.module, statement, found.node)
        return None

    def has_attribute(self, owner: Found, name: str) -> bool:
        """Whether objects of a class have an attribute: a member, or one that a method sets on `self`.

        A class with `__getattr__` may answer any name: there it is enough that the class's module writes the name somewhere.
        """
        if self.member(owner, name) is not None:
            return True
        for found in self.classes(owner):
            assert isinstance(found.node, ast.ClassDef)
            if name in self._set_on_self(found.node):
                return True
            dynamic = any(isinstance(s, FunctionNode) and s.name == "__getattr__" for s in found.node.body)
            if dynamic and name in found.module.words:
                return True
        return False

    def classes(self, owner: Found) -> Iterator[Found]:
        """The class itself and its base classes in the tree, nearest first."""
        waiting, seen = [owner], set()
        while waiting:
            found = waiting.pop(0)
            if not isinstance(found.node, ast.ClassDef) or id(found.node) in seen:
                continue
            seen.add(id(found.node))
            yield found
            for base in found.node.bases:
                resolved = self._expression(found.module, base, frozenset())
                if resolved is not None:
                    waiting.append(resolved)

    def _set_on_self(self, node: ast.ClassDef) -> set[str]:
        if node not in self._set_by_methods:
            self._set_by_methods[node] = _set_on_self(node)
        return self._set_by_methods[node]

    # -- inside --------------------------------------------------------------------------------------------------------

    def _name(self, module: Module, name: str, seen: frozenset[tuple[str, str]]) -> Found | None:
        """A name at module level; definitions before imports, imports before plain values."""
        key = (module.name, name)
        if key in seen:
            return None
        seen |= {key}
        value: Found | None = None
        for statement in module.bindings.get(name, ()):
            if isinstance(statement, Definition):
                return Found(module, statement)
        for statement in module.bindings.get(name, ()):
            found = self._bound_to(module, statement, name, seen)
            if found is not None and isinstance(found.node, Definition):
                return found
            value = value or found
        if value is not None:
            return value
        for star in module.stars:
            source = self.module(_source(module, star))
            found = self._name(source, name, seen) if source is not None else None
            if found is not None:
                return found
        submodule = self.module(f"{module.name}.{name}") if module.is_package else None
        return Found(submodule, None) if submodule is not None else None

    def _bound_to(self, module: Module, statement: ast.stmt, name: str, seen: frozenset[tuple[str, str]]) -> Found | None:
        if isinstance(statement, ast.ImportFrom):
            original = next(alias.name for alias in statement.names if (alias.asname or alias.name) == name)
            target = _source(module, statement)
            source = self.module(target)
            if source is not None:
                return self._name(source, original, seen)
            # Of this package and not there: the import would fail. Of another package: it is not ours to know.
            return None if target.partition(".")[0] == module.name.partition(".")[0] else Found(module, None)
        if isinstance(statement, ast.Import):
            alias = next(a for a in statement.names if (a.asname or a.name.partition(".")[0]) == name)
            source = self.module(alias.name if alias.asname else name)
            return Found(source, None) if source is not None else Found(module, None)
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name | ast.Attribute):
            return self._expression(module, statement.value, seen) or Found(module, statement)
        return Found(module, statement)

    def _expression(self, module: Module, node: ast.expr, seen: frozenset[tuple[str, str]]) -> Found | None:
        """What a name or dotted name stands for."""
        if isinstance(node, ast.Subscript):
            return self._expression(module, node.value, seen)
        if isinstance(node, ast.Name):
            return self._name(module, node.id, seen)
        if isinstance(node, ast.Attribute):
            owner = self._expression(module, node.value, seen)
            if owner is None:
                return None
            return self.member(owner, node.attr) if owner.node is not None else self._name(owner.module, node.attr, seen)
        return None


def open_wheel(path: Path) -> SourceTree:
    """The tree of a wheel, which is read as it is. Raises OSError or zipfile.BadZipFile."""
    return SourceTree(zipfile.Path(zipfile.ZipFile(path)))


def _source(module: Module, statement: ast.ImportFrom) -> str:
    """Absolute name of the module an import takes from."""
    if not statement.level:
        return statement.module or ""
    parts = module.name.split(".")
    kept = parts[: len(parts) - statement.level + module.is_package]
    return ".".join([*kept, *([statement.module] if statement.module else [])])


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when a module or class is made; not what only type checkers see."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If):
            yield from _statements(statement.orelse if _type_checking(statement.test) else statement.body + statement.orelse)
        elif isinstance(statement, ast.Try):
            handlers = [s for handler in statement.handlers for s in handler.body]
            yield from _statements(statement.body + handlers + statement.orelse + statement.finalbody)
        elif isinstance(statement, ast.With):
            yield from _statements(statement.body)
        elif isinstance(statement, ast.For | ast.While):
            yield from _statements(statement.body + statement.orelse)


def _type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _bound(statement: ast.stmt) -> set[str]:
    """Names a statement binds."""
    if isinstance(statement, Definition):
        return {statement.name}
    if isinstance(statement, ast.ImportFrom):
        return {alias.asname or alias.name for alias in statement.names}
    if isinstance(statement, ast.Import):
        return {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
    if isinstance(statement, ast.Assign):
        return {node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return {statement.target.id}
    return set()


def _set_on_self(owner: ast.ClassDef) -> set[str]:
    """Attributes that the methods of a class set on their first parameter, also by `setattr` and `register_...`."""
    found: set[str] = set()
    for method in owner.body:
        if not isinstance(method, FunctionNode) or not (method.args.posonlyargs + method.args.args):
            continue
        first = (method.args.posonlyargs + method.args.args)[0].arg
        for node in ast.walk(method):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is(node.value, first):
                found.add(node.attr)
            elif isinstance(node, ast.Call):
                found |= _named_by_call(node, first)
    return found


def _named_by_call(call: ast.Call, first: str) -> set[str]:
    function, arguments = call.func, call.args
    if isinstance(function, ast.Name) and function.id == "setattr" and len(arguments) > 1 and _is(arguments[0], first):
        arguments = arguments[1:]
    elif not (isinstance(function, ast.Attribute) and function.attr.startswith("register_") and _is(function.value, first)):
        return set()
    named = arguments[0] if arguments else None
    return {named.value} if isinstance(named, ast.Constant) and isinstance(named.value, str) else set()


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
