"""The demo models' CLIP: the library's text encoder behind the interface that core nodes call."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch

from ..packforcing.demo.text import encode_prompt


class DemoClip(comfy.sd.CLIP):
    """A CLIP without weights. Its tokens are the prompt itself, and its conditioning [1, L, 4096]."""

    def __init__(self) -> None:
        super().__init__(no_init=True)
        self.cond_stage_model = torch.nn.Module()
        self.tokenizer = None
        cpu = torch.device("cpu")
        # LoRA loaders and memory management ask for a patcher; there is nothing to patch or to move.
        self.patcher = comfy.model_patcher.ModelPatcher(self.cond_stage_model, load_device=cpu, offload_device=cpu)
        self.layer_idx = None
        self.use_clip_schedule = False
        self.apply_hooks_to_conds = None
        self.tokenizer_options = {}

    def clone(self, *args, **kwargs) -> DemoClip:
        other = DemoClip()
        other.patcher = self.patcher.clone()
        other.layer_idx, other.use_clip_schedule = self.layer_idx, self.use_clip_schedule
        other.apply_hooks_to_conds, other.tokenizer_options = self.apply_hooks_to_conds, self.tokenizer_options.copy()
        return other

    def tokenize(self, text: str, *args, **kwargs) -> dict[str, str]:
        return {"prompt": text}

    def encode_from_tokens(self, tokens, return_pooled: bool | str = False, return_dict: bool = False):
        cond = encode_prompt(tokens["prompt"]).to(comfy.model_management.intermediate_device())
        if return_dict:
            return {"cond": cond, "pooled_output": None}
        return (cond, None) if return_pooled else cond

    def encode_from_tokens_scheduled(self, tokens, unprojected: bool = False, add_dict=None, show_pbar: bool = True):
        said = self.add_hooks_to_dict({"pooled_output": None}) | (add_dict or {})
        return [[self.encode_from_tokens(tokens), said]]

    def load_model(self, *args, **kwargs):
        return self.patcher

    def get_sd(self) -> dict:
        return {}
