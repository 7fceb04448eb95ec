"""The socket types that the pack's nodes pass among themselves."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "PackForcing"

Compressor = io.Custom("PACKFORCING_COMPRESSOR")  # packforcing.model.compressor.CompressorChoice
CacheConfig = io.Custom("PACKFORCING_CACHE_CONFIG")  # packforcing.config.CacheConfig
Schedule = io.Custom("PACKFORCING_SCHEDULE")  # packforcing.generate.schedule.Schedule
LivePrompt = io.Custom("PACKFORCING_LIVE_PROMPT")  # nodes.live.Speaker
VideoState = io.Custom("PACKFORCING_STATE")  # packforcing.files.state_file.VideoState
CacheRecord = io.Custom("PACKFORCING_CACHE_RECORD")  # packforcing.generate.record.CacheRecord
