"""ComfyUI's side of the pack: each node reads inputs, checks them, calls the library, and shapes outputs."""

from .version import check_comfyui

check_comfyui()  # before any node is imported: what is missing in an old ComfyUI would be an error of many lines
