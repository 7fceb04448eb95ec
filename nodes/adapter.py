"""What differs between ComfyUI's versions or belongs to its internals: attention, types, loading, VAE, previews.

Everything else in `nodes/` keeps to ComfyUI's node API.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.ldm.wan.vae
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch
from comfy.cli_args import args
from comfy.ldm.modules.attention import optimized_attention
from comfy_execution.utils import get_executing_context
from einops import rearrange
from server import PromptServer
from torch import Tensor, nn

from ..packforcing.demo.models import demo_preview
from ..packforcing.errors import PackForcingError
from ..packforcing.files.scaled_fp8 import HEADER_KEY, LayerFormats
from ..packforcing.known_models import MODELS, TINY, ModelShape
from ..packforcing.model.attention import Attention, fast_attention
from ..packforcing.model.causal_wan import CausalWan
from ..packforcing.model.latent_preview import LatentPreview
from ..packforcing.model.read_ahead import AtHand, StreamedWeights, Weights
from ..packforcing.model.vae import WanVAE, load_vae

# By this, ComfyUI's model detection takes a Wan for a causal one, whose MODEL its node Sampler AR Video runs.
CAUSAL_CONFIG = json.dumps({"transformer": {"causal_ar": True}})
CAUSAL_MODEL = "WAN21_CausalAR_T2V"  # in comfy.supported_models since that node exists


def load_diffusion_model(
    state_dict: dict[str, Tensor], options: Mapping[str, Any], formats: LayerFormats
) -> comfy.model_patcher.ModelPatcher | None:
    """A MODEL of a causal Wan's state dict; None where this ComfyUI does not know the model.

    Args:
        options: ComfyUI's `model_options`.
        formats: in which formats layers are, if they are quantised.

    Raises PackForcingError when this ComfyUI cannot read one of the formats: it would load them without their scales.
    """
    load = comfy.sd.load_diffusion_model_state_dict
    takes_metadata = "metadata" in inspect.signature(load).parameters
    needed = sorted({layer["format"] for layer in formats.values()})
    unknown = [name for name in needed if not takes_metadata or name not in known_formats()]
    if unknown:
        raise PackForcingError(
            f"The model's weights are quantised as {', '.join(unknown)}, which this version of ComfyUI does not read: "
            "update ComfyUI, or choose a bf16 or fp16 version of the model."
        )
    metadata = {HEADER_KEY: json.dumps({"format_version": "1.0", "layers": formats})} if formats else {}
    if hasattr(comfy.supported_models, CAUSAL_MODEL):
        metadata["config"] = CAUSAL_CONFIG
    given = {"metadata": metadata} if takes_metadata and metadata else {}
    return load(state_dict, model_options=dict(options), **given)


def known_formats() -> set[str]:
    """The formats of quantised layers that this ComfyUI knows."""
    try:
        from comfy.quant_ops import QUANT_ALGOS
    except ImportError:
        return set()
    return set(QUANT_ALGOS)


def with_lora(
    model: comfy.model_patcher.ModelPatcher, lora: Mapping[str, Tensor], strength: float
) -> comfy.model_patcher.ModelPatcher:
    """The MODEL with a LoRA under ComfyUI's names patched onto it, as the core LoRA loader does."""
    patched, _ = comfy.sd.load_lora_for_models(model, None, dict(lora), strength, 0)
    if len(patched.patches) == len(model.patches):
        raise PackForcingError("ComfyUI found nothing in the LoRA to patch: apply it with a LoRA loader node.")
    return patched


def model_shift(model: comfy.model_patcher.ModelPatcher) -> float:
    """The flow shift of a MODEL: what ModelSamplingSD3 patched onto it, or its own.

    Raises PackForcingError when its noise schedule has none.
    """
    shift = getattr(model.get_model_object("model_sampling"), "shift", None)
    if not shift:
        raise PackForcingError(
            "The sampler's shift is 0, which means the MODEL's own, but the MODEL has none: set the sampler's shift, 5 "
            "for most causal Wan models."
        )
    return float(shift)


def compute_dtype(model: comfy.model_patcher.ModelPatcher) -> torch.dtype:
    """The type that hidden states are computed in, which is not that of the weights when those are fp8, say.

    Asked of the patcher: the model itself is shared, and shows the patches of whichever MODEL was loaded last.
    """
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


def comfy_attention(model: comfy.model_patcher.ModelPatcher) -> Attention:
    """The attention that the user chose for this model: an override patched onto it, or ComfyUI's choice.

    On the CPU ComfyUI's choice is a chunked fallback for small memory; the library's is the better one there.
    """
    options: dict[str, Any] = dict(model.model_options.get("transformer_options", {}))
    if model.load_device.type == "cpu" and "optimized_attention_override" not in options:
        return fast_attention
    parameters = inspect.signature(optimized_attention).parameters.values()
    takes_options = any(p.name == "transformer_options" or p.kind is p.VAR_KEYWORD for p in parameters)
    extra = {"transformer_options": options} if takes_options else {}

    def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        heads = queries.shape[2]
        flat = (x.flatten(2) for x in (queries, keys, values))
        return rearrange(optimized_attention(*flat, heads=heads, **extra), "b l (h d) -> b l h d", h=heads)

    return attention


def causal_wan(model: comfy.model_patcher.ModelPatcher) -> CausalWan:
    """The library's causal forward over a MODEL's module tree. Raises PackForcingError when it is not Wan 2.1's."""
    modules = getattr(model.model, "diffusion_model", None)
    if modules is None:
        raise PackForcingError(
            f"The model is not a Wan 2.1 transformer but {type(model.model).__name__}: connect a causal Wan 2.1 model."
        )
    return CausalWan(modules, comfy_attention(model), compute_dtype(model), model.load_device)


def weights_ahead(model: comfy.model_patcher.ModelPatcher, wan: CausalWan) -> Weights:
    """What reads the weights of a MODEL that does not fit its device ahead of the layer that needs them.

    ComfyUI itself brings each operation its weights when it is called. On a CPU, and where a ComfyUI with dynamic VRAM
    has no queue for whole layers, that stays so.
    """
    if model.load_device.type != "cuda":
        return AtHand()
    layers: list[nn.Module] = list(wan.modules.blocks)
    if not (hasattr(model, "is_dynamic") and model.is_dynamic()):
        return StreamedWeights(layers, model.load_device)
    try:
        from comfy import model_prefetch
    except ImportError:
        return AtHand()
    return QueuedWeights(model_prefetch, layers, model.load_device)


class QueuedWeights:
    """`Weights` under dynamic VRAM: ComfyUI's own queue faults a layer's weights in while the one before computes."""

    bytes = 0  # ComfyUI sees to its buffers

    def __init__(self, prefetch: ModuleType, layers: Sequence[nn.Module], device: torch.device) -> None:
        self._prefetch = prefetch
        self._layers = layers
        self._device = device
        self._queue: Any = None  # of the pass that runs

    @contextmanager
    def at(self, layer: int) -> Iterator[None]:
        prefetch = self._prefetch
        if layer == 0:
            wanted = {"prefetch_dynamic_vbars": True}
            self._queue = prefetch.make_prefetch_queue(list(self._layers), self._device, wanted)
        try:
            prefetch.prefetch_queue_pop(self._queue, self._device, self._layers[layer])
            yield
            if layer == len(self._layers) - 1:
                prefetch.prefetch_queue_pop(self._queue, self._device, None)
        except BaseException:
            prefetch.cleanup_prefetch_queues()
            raise

    def prompt(self, layer: int) -> AbstractContextManager[None]:
        return nullcontext()


def wan_vae(vae) -> tuple[WanVAE, comfy.model_patcher.ModelPatcher]:
    """The library's streaming VAE over the tensors of a ComfyUI VAE, and the patcher by which ComfyUI loads it.

    Raises PackForcingError when the VAE is not Wan 2.1's.
    """
    # Where ComfyUI loads weights lazily, they are still in the file's type.
    module = load_vae(vae.get_sd(), vae.vae_dtype)
    # In a container, since the patcher sets attributes such as `device` on the module that it is given.
    patcher = comfy.model_patcher.ModelPatcher(
        torch.nn.ModuleDict({"vae": module}),
        load_device=vae.device,
        offload_device=comfy.model_management.vae_offload_device(),
    )
    return module, patcher


def demo_vae(state_dict: dict[str, Tensor], dtype: torch.dtype) -> comfy.sd.VAE:
    """A ComfyUI VAE of a small Wan 2.1 VAE's tensors. Before 0.3.76 ComfyUI takes every Wan VAE to be 96 wide."""
    module, width = comfy.ldm.wan.vae, state_dict["decoder.head.0.gamma"].numel()
    network = module.WanVAE
    module.WanVAE = lambda **sizes: network(**(sizes | {"dim": width}))
    try:
        return comfy.sd.VAE(sd=state_dict, dtype=dtype)
    finally:
        module.WanVAE = network


def device_memory(device: torch.device) -> int:
    """Bytes of a device that ComfyUI can make free for a run by moving weights away."""
    headroom = int(getattr(args, "vram_headroom", 0) * 1024**3)  # GB that the user wants to stay free; since 0.25
    return comfy.model_management.get_total_memory(device) - comfy.model_management.extra_reserved_memory() - headroom


def load_models(models: list[comfy.model_patcher.ModelPatcher], working_bytes: int) -> None:
    """Loads models as ComfyUI sees fit, leaving `working_bytes` of the device free for the run."""
    comfy.model_management.load_models_gpu(models, memory_required=working_bytes)


def free_memory() -> None:
    """Unloads all models, as ComfyUI itself does after it has run out of memory."""
    comfy.model_management.unload_all_models()


def check_interrupted() -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception means that a device's memory is used up. PyTorch has several for it."""
    management = comfy.model_management
    return management.is_oom(error) if hasattr(management, "is_oom") else isinstance(error, management.OOM_EXCEPTION)


def normalised(model: comfy.model_patcher.ModelPatcher, samples: Tensor) -> Tensor:
    """LATENT samples in ComfyUI's convention -> the model's, [B, 16, T, h, w] float32."""
    return model.model.process_latent_in(samples.float())


def comfy_samples(model: comfy.model_patcher.ModelPatcher, latents: Tensor) -> Tensor:
    """The model's latents [B, 16, T, h, w] -> LATENT samples in ComfyUI's convention."""
    return model.model.process_latent_out(latents.float()).to(comfy.model_management.intermediate_device())


_nodes_with_text: set[str] = set()


def show_on_node(text: str) -> None:
    """Shows a text on the node that runs now. The browser keeps it, so an empty text takes an earlier run's away."""
    context = get_executing_context()
    if context is None or not (text or context.node_id in _nodes_with_text):
        return
    PromptServer.instance.send_progress_text(text, context.node_id)
    _nodes_with_text.discard(context.node_id)
    if text:
        _nodes_with_text.add(context.node_id)


def previews_wanted() -> bool:
    """False where the user turned previews off for the prompt that runs, which the browser can since 0.5.

    ComfyUI's own switch, --preview-method, is not asked: it is off by default, since it costs other samplers time.
    """
    server = getattr(PromptServer, "instance", None)  # none where a program calls the nodes itself
    running = server.prompt_queue.currently_running.values() if server is not None else ()
    return all(item[3].get("preview_method") != "none" for item in running)


def preview_side() -> int:
    """Pixels of a preview's longer side at most, as the user set it."""
    return args.preview_size


def latent_preview(shape: ModelShape) -> LatentPreview:
    """The map from a model's latents to a preview's colours: fitted for the demo, ComfyUI's own for Wan 2.1's VAE."""
    if shape == MODELS[TINY]:
        return demo_preview()
    latent_format = comfy.latent_formats.Wan21()
    factors = torch.tensor(latent_format.latent_rgb_factors)
    return LatentPreview(((factors.T, torch.tensor(latent_format.latent_rgb_factors_bias)),))
