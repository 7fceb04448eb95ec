"""The method by the letter under prompts that change: every block under its own, recent ones computed again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from wan_reference import ExplicitWan, Method, attend, rotate


class StoryWan(ExplicitWan):
    """`ExplicitWan` with several prompts. `use` says which ones the next passes attend to, and how much."""

    def __init__(self, state: dict[str, Tensor], method: Method, prompts: list[Tensor]) -> None:
        super().__init__(state, method, prompts[0])
        self.prompts = [self.embedded(prompt) for prompt in prompts]
        self.use({0: 1.0})

    def embedded(self, prompt: Tensor) -> list[tuple[Tensor, Tensor]]:
        hidden = self.mlp("text_embedding", prompt.to(self.dtype), lambda x: F.gelu(x, approximate="tanh"))
        return [self.keys_values(f"blocks.{i}.cross_attn", hidden) for i in range(self.layers)]

    def use(self, shares: dict[int, float]) -> None:
        """Prompts, by their number, and what share of the attention to the prompt is each one's."""
        self.shares = shares

    def layer(self, i: int, x: Tensor, modulations: Tensor, self_attention: Any) -> Tensor:
        name = f"blocks.{i}"
        rows = (self.state[f"{name}.modulation"][0] + modulations[:, 0, 0]).unbind()
        out = self_attention(i, self.layer_norm(x) * (1 + rows[1]) + rows[0])
        x = x + rows[2] * self.linear(f"{name}.self_attn.o", out)
        normed = self.layer_norm(x) * self.state[f"{name}.norm3.weight"] + self.state[f"{name}.norm3.bias"]
        queries = self.queries(f"{name}.cross_attn", normed)
        shared = sum(share * attend(queries, *self.prompts[p][i]) for p, share in self.shares.items())
        x = x + self.linear(f"{name}.cross_attn.o", shared)
        fed = self.layer_norm(x) * (1 + rows[4]) + rows[3]
        return x + rows[5] * self.mlp(f"{name}.ffn", fed, lambda y: F.gelu(y, approximate="tanh"))

    def refresh(self, latents: dict[int, Tensor]) -> None:
        """Replaces the recent blocks' keys and values by those of a pass that sees sinks, mid blocks that the block
        chooses, and the recent blocks up to itself; all where they stand for the block that is made next."""
        starts = self.method.starts(self.block)[0]
        for block in self.method.recents(self.block):
            positions = self.method.full_positions(starts[block])
            made: list[tuple[Tensor, Tensor]] = []
            _, modulations = self.time(0.0)

            def self_attention(i: int, hidden: Tensor, block=block, positions=positions, made=made) -> Tensor:
                queries = self.queries(f"blocks.{i}.self_attn", hidden)
                made.append(self.keys_values(f"blocks.{i}.self_attn", hidden))
                self.select(i, queries)
                keys, values = self.history(i)  # sinks, recent blocks, mid blocks
                sinks, recents = len(self.method.sinks(self.block)), self.method.recents(self.block)
                seen = [n for n in range(len(keys)) if not 0 <= n - sinks < len(recents) or recents[n - sinks] < block]
                keys = torch.cat([*(keys[n] for n in seen), rotate(made[i][0], positions)], dim=1)
                values = torch.cat([*(values[n] for n in seen), made[i][1]], dim=1)
                return attend(rotate(queries, positions), keys, values)

            hidden = self.tokens(latents[block])
            for i in range(self.layers):
                hidden = self.layer(i, hidden, modulations, self_attention)
            self.full[block] = made
        self.selected = [None] * self.layers
