"""The cache configuration node, with the plan that it shows; and configurations that are made for a checkpoint."""

from __future__ import annotations

from dataclasses import fields, replace

from comfy_api.latest import io

from ..packforcing.config import ARCHIVE_DEVICES, KV_DTYPES, SELECTIONS, CacheConfig
from ..packforcing.presets import PRESET_NAMES, preset_named
from . import routes, types

routes.register()

DEFAULTS = CacheConfig()


def storage_inputs() -> list[io.Input]:
    """Where cached blocks lie, and in what: the inputs that are about the machine, not about the checkpoint."""
    return [
        io.Combo.Input(
            "archive_device",
            options=list(ARCHIVE_DEVICES),
            default=DEFAULTS.archive_device,
            tooltip="Where compressed blocks wait that are not attended: on the device, in host memory, in a file in "
            "ComfyUI's temporary folder (disk), or on the device up to the budget and then in host memory (auto).",
        ),
        io.Float.Input(
            "archive_budget_gb",
            default=DEFAULTS.archive_budget_gb,
            min=0.0,
            max=1024.0,
            step=0.1,
            tooltip="Device memory for the archive when archive_device is auto, in GB (10^9 bytes).",
        ),
        io.Combo.Input(
            "kv_dtype",
            options=list(KV_DTYPES),
            default=DEFAULTS.kv_dtype,
            optional=True,  # workflows from before it existed go on working
            tooltip="What cached keys and values are kept in: the model's own type, or fp8_e4m3 for half the "
            "memory (the inspector tells the rounding error).",
        ),
    ]


class CacheConfigNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PackForcingCacheConfig",
            display_name="PackForcing Cache Config",
            category=types.CATEGORY,
            description="Sizes of the three-partition KV cache: sink and recent blocks at full resolution, and the "
            "compressed mid blocks of which the most relevant are attended. Shows what they cost.",
            inputs=[
                io.Int.Input(
                    "block_frames",
                    default=DEFAULTS.block_frames,
                    min=1,
                    max=16,
                    tooltip="Latent frames a block; a property of the checkpoint. 4 in PackForcing, 3 in Self-Forcing, "
                    "Causal-Forcing and LongLive (chunk-wise), 1 in frame-wise checkpoints.",
                ),
                io.Int.Input(
                    "sink_frames",
                    default=DEFAULTS.sink_frames,
                    min=0,
                    max=4096,
                    tooltip="Latent frames at the start of the video that are kept at full resolution for ever. Whole "
                    "blocks. 0 lets the subject drift, 16 freezes the motion (paper).",
                ),
                io.Int.Input(
                    "recent_frames",
                    default=DEFAULTS.recent_frames,
                    min=0,
                    max=4096,
                    tooltip="Latent frames before the current block that are kept at full resolution. Whole blocks.",
                ),
                io.Int.Input(
                    "top_k",
                    default=DEFAULTS.top_k,
                    min=0,
                    max=4096,
                    tooltip="Compressed mid blocks attended at most. 0 runs without mid blocks and without compressor.",
                ),
                io.Combo.Input(
                    "selection",
                    options=list(SELECTIONS),
                    default=DEFAULTS.selection,
                    tooltip="How mid blocks are chosen: by affinity to the current block, or the newest ones.",
                ),
                io.Float.Input(
                    "query_fraction",
                    default=DEFAULTS.query_fraction,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the current block's queries that the affinity samples.",
                ),
                io.Float.Input(
                    "head_fraction",
                    default=DEFAULTS.head_fraction,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the attention heads that the affinity sums over.",
                ),
                io.Int.Input(
                    "position_range",
                    default=DEFAULTS.position_range,
                    min=0,
                    max=4096,
                    tooltip="0 keeps the paper's spacing of positions. N squeezes the mid blocks so that the whole "
                    "context lies in N latent frames, such as the 21 that most models were trained on.",
                ),
                *storage_inputs(),
            ],
            outputs=[types.CacheConfig.Output(display_name="cache_config")],
        )

    @classmethod
    def validate_inputs(cls, **values) -> bool | str:
        """Tells a mistake in a widget before anything runs, by an exception.

        An error that is returned instead, ComfyUI repeats for each input that this function takes.
        """
        CacheConfig(**{f.name: values[f.name] for f in fields(CacheConfig) if values.get(f.name) is not None})
        return True

    @classmethod
    def execute(cls, **values) -> io.NodeOutput:
        return io.NodeOutput(CacheConfig(**values))


class CachePresetNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PackForcingCachePreset",
            display_name="PackForcing Cache Preset",
            category=types.CATEGORY,
            description="A cache configuration that is made for a kind of checkpoint, in place of the sizes of "
            "PackForcing Cache Config. Each has its reason and its source in docs/presets.md.",
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(PRESET_NAMES),
                    default=PRESET_NAMES[0],
                    tooltip="training-free: Self-Forcing, Causal-Forcing, CausVid, Krea. deep-sink: the same without "
                    "mid blocks. frame-wise: checkpoints with blocks of one frame. packforcing: trained with its "
                    "compressor. The others are named after their model.",
                ),
                *storage_inputs(),
            ],
            outputs=[types.CacheConfig.Output(display_name="cache_config")],
        )

    @classmethod
    def execute(cls, preset: str, **storage) -> io.NodeOutput:
        return io.NodeOutput(replace(preset_named(preset).config, **storage))
