"""What differs between ComfyUI's versions: the adapter over the ComfyUI that is here, and over stand-ins for others.

A stand-in does what the version that it names does; `docs/comfyui-versions.md` says which versions ran as a whole.
"""

from __future__ import annotations

import importlib
import itertools
from types import ModuleType, SimpleNamespace

import pytest
import torch
from comfyui import REPO, Client, Server
from graphs import Prompt, bare_latents
from torch import Tensor

from packforcing.demo.models import demo_preview, demo_vae

CPU = torch.device("cpu")
DTYPE = torch.float32


def weights() -> dict[str, Tensor]:
    """The demo VAE's, 8 wide."""
    return {name: tensor.to(DTYPE) for name, tensor in demo_vae(CPU).items()}


@pytest.fixture(scope="module")
def version(pack: ModuleType) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.nodes.version")


# --- compute types ---------------------------------------------------------------------------------------------------


def test_the_compute_type_is_the_models_own_whatever_ran_before(server: Server, client: Client):
    seconds = itertools.count(1.0, 0.25)  # each time another length: the server remembers a prompt that it has run

    def computed_in(dtype: str | None) -> Tensor:
        prompt = Prompt()
        model = prompt.demo()[0]
        if dtype is not None:
            model = prompt.add("ModelComputeDtype", model=model, dtype=dtype)[0]
        return bare_latents(server, client, prompt, model=model, seconds=next(seconds))[:, :, :4]

    plain, half, again, after = (computed_in(dtype) for dtype in (None, "bf16", "bf16", None))
    assert not torch.equal(half, plain)
    assert torch.equal(again, half)
    assert torch.equal(after, plain)
    first = torch.stack((half[:, :, 0].flatten(), plain[:, :, 0].flatten()))
    assert torch.corrcoef(first)[0, 1] > 0.9


# --- the VAE ---------------------------------------------------------------------------------------------------------


class LazyVae:
    """A VAE whose weights are in the file's type while it computes in another.

    Comfy-Org/ComfyUI 0.33.0, comfy/sd.py: `VAE.__init__` loads with `assign=True` under dynamic VRAM.
    """

    vae_dtype = torch.bfloat16
    device = CPU

    def get_sd(self) -> dict[str, Tensor]:
        return weights()


def test_the_vae_computes_in_its_own_type_whatever_its_weights_are_kept_in(adapter: ModuleType):
    module, patcher = adapter.wan_vae(LazyVae())
    assert {tensor.dtype for tensor in module.state_dict().values()} == {LazyVae.vae_dtype}
    assert patcher.model.vae is module


def test_the_vaes_weights_are_shared_where_their_type_is_right(adapter: ModuleType):
    vae = adapter.demo_vae(weights(), DTYPE)
    module, _ = adapter.wan_vae(vae)
    name = "decoder.conv1.weight"
    assert module.state_dict()[name].data_ptr() == vae.get_sd()[name].data_ptr()


def test_the_demo_vae_loads_where_every_wan_vae_is_taken_to_be_96_wide(
    adapter: ModuleType, comfy: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    """Comfy-Org/ComfyUI 0.3.60 to 0.3.75, comfy/sd.py: `ddconfig = {"dim": 96, ...}` for the Wan 2.1 VAE."""
    wan = importlib.import_module("comfy.ldm.wan.vae")
    network = wan.WanVAE

    class OldVae(adapter.comfy.sd.VAE):
        def __init__(self, sd: dict[str, Tensor], dtype: torch.dtype) -> None:
            width = 96
            self.first_stage_model = wan.WanVAE(
                dim=width, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
                temperal_downsample=[False, True, True], dropout=0.0,
            ).to(dtype)  # fmt: skip
            self.first_stage_model.load_state_dict(sd)

    with pytest.raises(RuntimeError, match="size mismatch"):
        OldVae(weights(), DTYPE)
    monkeypatch.setattr(adapter.comfy.sd, "VAE", OldVae)
    vae = adapter.demo_vae(weights(), DTYPE)
    assert all(torch.equal(vae.first_stage_model.state_dict()[name], tensor) for name, tensor in weights().items())
    assert wan.WanVAE is network  # users' VAEs load as ever


# --- memory ----------------------------------------------------------------------------------------------------------


def test_out_of_memory_is_known_in_all_its_forms(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Comfy-Org/ComfyUI 0.17.0 and later, comfy/model_management.py: `is_oom` knows AcceleratorError, too."""
    management = adapter.comfy.model_management
    oom = torch.cuda.OutOfMemoryError("CUDA out of memory")
    accelerator = RuntimeError("accelerator: out of memory")
    monkeypatch.delattr(management, "is_oom", raising=False)
    assert adapter.is_out_of_memory(oom)
    assert not adapter.is_out_of_memory(accelerator)
    monkeypatch.setattr(management, "is_oom", lambda error: error in (oom, accelerator), raising=False)
    assert adapter.is_out_of_memory(accelerator)
    assert not adapter.is_out_of_memory(ValueError("something else"))


def test_memory_that_the_user_keeps_free_is_not_planned_with(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Comfy-Org/ComfyUI 0.25.0 and later, comfy/cli_args.py: `--vram-headroom`, in GB."""
    whole = adapter.device_memory(CPU)
    monkeypatch.setattr(adapter.args, "vram_headroom", 0.5, raising=False)
    assert adapter.device_memory(CPU) == whole - 2**29


# --- what the browser shows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chosen", "shown"), [(None, True), ("default", True), ("auto", True), ("none", False)])
def test_previews_that_the_user_turned_off_for_a_prompt_are_not_made(
    adapter: ModuleType, progress: ModuleType, monkeypatch: pytest.MonkeyPatch, chosen: str | None, shown: bool
):
    """Comfy-Org/ComfyUI 0.5.0 and later, execution.py: `extra_data["preview_method"]` of the prompt that runs."""
    extra_data = {} if chosen is None else {"preview_method": chosen}
    queue = SimpleNamespace(currently_running={0: (1, "id", {}, extra_data, [])})
    server = SimpleNamespace(instance=SimpleNamespace(prompt_queue=queue))
    monkeypatch.setattr(adapter, "PromptServer", server)
    picture = progress.preview(torch.zeros(1, 16, 1, 8, 8), None, demo_preview())
    assert (picture is not None) == shown


def test_a_program_may_call_the_nodes_without_a_server(
    adapter: ModuleType, progress: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(adapter, "PromptServer", SimpleNamespace())
    monkeypatch.setattr(adapter, "get_executing_context", lambda: None)
    adapter.show_on_node("nobody sees this")
    assert progress.preview(torch.zeros(1, 16, 1, 8, 8), None, demo_preview()) is not None


# --- the demo's CLIP -------------------------------------------------------------------------------------------------


def test_the_demos_clip_has_all_that_a_core_clip_has(pack: ModuleType, comfy: ModuleType):
    clip = pack.NODE_CLASS_MAPPINGS["PackForcingDemoModels"].execute().result[1]
    core = importlib.import_module("comfy.sd").CLIP
    other = clip.clone(disable_dynamic=True)  # an argument of 0.12 and later
    assert type(other) is type(clip)
    assert isinstance(clip, core)
    assert other.patcher is not clip.patcher
    assert other.patcher.model is clip.patcher.model
    other.tokenizer_options["a"] = 1
    assert clip.tokenizer_options == {}
    text = clip.tokenize("a red circle")
    cond = clip.encode_from_tokens(text)
    assert torch.equal(clip.encode_from_tokens(text, return_pooled=True)[0], cond)
    assert torch.equal(clip.encode_from_tokens(text, return_pooled=True, return_dict=True)["cond"], cond)
    [[scheduled, said]] = other.encode_from_tokens_scheduled(text, add_dict={"b": 2})
    assert torch.equal(scheduled, cond)
    assert said == {"pooled_output": None, "b": 2}


# --- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", ["0.3.60", "0.3.75", "0.4.0", "0.38.1", "1.0.0", "0.99", "dev", "0.3.59rc1", ""])
def test_new_versions_and_names_that_are_no_versions_pass(version: ModuleType, found: str):
    version.check_version(found)


@pytest.mark.parametrize("found", ["0.3.59", "0.3.9", "0.2"])
def test_an_older_version_is_refused_in_one_sentence(version: ModuleType, found: str):
    with pytest.raises(ImportError) as refused:
        version.check_version(found)
    assert str(refused.value) == (
        f"ComfyUI-PackForcing needs ComfyUI 0.3.60 or newer, but this is {found}: update ComfyUI, and start it again."
    )


def test_documents_and_manager_name_the_same_oldest_version(version: ModuleType):
    assert f'requires-comfyui = ">={version.OLDEST}"' in (REPO / "pyproject.toml").read_text()
    for page in ("README.md", "docs/comfyui-versions.md"):
        assert f"ComfyUI {version.OLDEST} or newer" in (REPO / page).read_text()
