"""Loaded by every Python process that has this folder on PYTHONPATH: lets torchvision be imported beside a CPU-only torch.

torchvision's wheel is linked against CUDA, so its extension does not load here, and `import torchvision` ends in an error about
the operator torchvision::nms. Declaring that operator just before the import is enough: it is never called.
"""

from __future__ import annotations

import importlib.abc
import sys


class _TorchvisionOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _TorchvisionOperators())
