"""ComfyUI's side of the pack: each node reads inputs, checks them, calls the library, and shapes outputs."""
