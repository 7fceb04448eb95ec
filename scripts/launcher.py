"""Runs ComfyUI's `main.py` in this process: `python launcher.py COMFYUI_DIR [main.py options]`.

Two things a plain `python main.py` does not do:

* A torchvision built for CUDA cannot load its compiled operators beside a CPU build of torch, and its import then
  stops at operators nobody declared. Declaring them (their schemas, no code) is enough for all that ComfyUI's
  start-up imports. `declare_torchvision_operators` arranges it, and leaves a matching pair alone.
* When the starting process dies, however it dies, the server goes with it: it ends at the end of its standard input.
"""

from __future__ import annotations

import importlib.machinery
import os
import runpy
import sys
import threading

# What torchvision's Python files register fake kernels for while they are imported.
TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _BeforeTorchvision:
    """An import finder that finds nothing; it only notices that torchvision is about to be imported."""

    library = None  # torch drops the schemas when this object dies, so it is kept

    def find_spec(self, name, path=None, target=None):
        """Declare the operators when `name` is torchvision and its own cannot be loaded; never answer."""
        if name == "torchvision":
            sys.meta_path.remove(self)
            self._declare_if_needed()
        return None

    def _declare_if_needed(self) -> None:
        spec = importlib.machinery.PathFinder.find_spec("torchvision", None)
        if spec is None or not spec.submodule_search_locations:
            return
        import torch  # not before: ComfyUI wants to set the allocator up before torch is first imported

        compiled = importlib.machinery.PathFinder.find_spec("_C", list(spec.submodule_search_locations))
        try:
            if compiled is not None and compiled.origin is not None:
                torch.ops.load_library(compiled.origin)
                return
        except OSError:
            pass  # built for another torch: its CUDA libraries are not there
        type(self).library = torch.library.Library("torchvision", "DEF")
        for schema in TORCHVISION_SCHEMAS:
            self.library.define(schema)


def declare_torchvision_operators() -> None:
    """Make `import torchvision` work beside a torch it was not built for, from the next import on."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _BeforeTorchvision) for f in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())


def _end_with_parent() -> None:
    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="end-with-parent").start()


def main() -> None:
    """Become ComfyUI: its folder first on the path, its arguments in `sys.argv`, its `main.py` as `__main__`."""
    comfyui = os.path.abspath(sys.argv[1])
    sys.path[0] = comfyui  # was this file's folder
    sys.argv = [os.path.join(comfyui, "main.py"), *sys.argv[2:]]
    declare_torchvision_operators()
    _end_with_parent()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
