"""Lets PyPI's torchvision, a CUDA build, be imported beside a torch for CPUs: run by the python of that environment.

torchvision's Python files insist on two operators that its CUDA library would bring; they are declared here, without an
implementation. Its transforms, which are all that vLLM's processors use, are plain torch.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

CODE = """
import importlib.abc
import sys


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if not torch.version.cuda and not hasattr(torch.ops.torchvision, "nms"):
                self.library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                torch._tokprune_torchvision_shim = self
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
"""

if __name__ == "__main__":
    site = Path(sysconfig.get_path("purelib"))
    (site / "_torchvision_shim.py").write_text(CODE.lstrip(), encoding="utf-8")
    (site / "torchvision_shim.pth").write_text("import _torchvision_shim\n", encoding="utf-8")
