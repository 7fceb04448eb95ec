"""PackForcing: long autoregressive video from a bounded, three-partition KV cache (arXiv 2603.25730)."""

from .errors import PackForcingError

__all__ = ["PackForcingError", "__version__"]
__version__ = "0.1.0"
