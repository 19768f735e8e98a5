"""Hooks a method of a class in place, for an engine that has no registry of hooks of its own."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

_MARK = "_adaptive_spec_hook"


def hook_method(path: str, hook: Callable[..., Any]) -> None:
    """Replace the method at `package.module.Class.method` by `hook(original, self, ...)`. A second call changes nothing.

    Raises ImportError or AttributeError when it is not there.
    """
    class_path, name = path.rsplit(".", 1)
    module, class_name = class_path.rsplit(".", 1)
    owner = getattr(importlib.import_module(module), class_name)
    original = getattr(owner, name)
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    setattr(hooked, _MARK, True)
    setattr(owner, name, hooked)
