"""Records of runs that were never made, for tests of the inspector."""

from __future__ import annotations

from typing import Any

from packforcing.config import CacheConfig, FrameSize
from packforcing.generate.record import CacheRecord
from packforcing.known_models import ModelShape


def empty_record(layers: int, config: CacheConfig, **changes: Any) -> CacheRecord:
    """A record without blocks: 832x480, 16 frames a second, no compressor, float32 on a CPU unless told otherwise."""
    usual = {"fps": 16.0, "temporal_stride": 2, "compressor": "none", "dtype": "float32", "device": "cpu"}
    return CacheRecord(ModelShape(layers, 256, 2), config, FrameSize(832, 480), **(usual | changes))
