"""LLaMA shapes as light module trees without data: names and shapes, nothing that computes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Llama:
    """The sizes of a LLaMA (arXiv 2302.13971; grouped key and value heads: 2307.09288).

    Args:
        hidden, intermediate: widths of the residual stream and of the gated MLP.
        layers: blocks.
        heads, kv_heads: of queries, and of keys and values.
        vocabulary: tokens; embedding and output head are two matrices.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000

    @property
    def kv_width(self) -> int:
        """The width of keys, and of values."""
        return self.hidden // self.heads * self.kv_heads

    def build(self, dtype: torch.dtype) -> nn.Module:
        """A module tree on the meta device, with the names that transformers gives its parameters."""
        options: dict[str, Any] = {"device": torch.device("meta"), "dtype": dtype}

        def linear(wide: int, out: int) -> nn.Linear:
            return nn.Linear(wide, out, bias=False, **options)

        blocks: list[nn.Module] = []
        for _ in range(self.layers):
            attention = {
                "q_proj": linear(self.hidden, self.hidden),
                "k_proj": linear(self.hidden, self.kv_width),
                "v_proj": linear(self.hidden, self.kv_width),
                "o_proj": linear(self.hidden, self.hidden),
            }
            mlp = {
                "gate_proj": linear(self.hidden, self.intermediate),
                "up_proj": linear(self.hidden, self.intermediate),
                "down_proj": linear(self.intermediate, self.hidden),
            }
            parts: dict[str, nn.Module] = {
                "self_attn": nn.ModuleDict(attention),
                "mlp": nn.ModuleDict(mlp),
                "input_layernorm": nn.RMSNorm(self.hidden, **options),
                "post_attention_layernorm": nn.RMSNorm(self.hidden, **options),
            }
            blocks.append(nn.ModuleDict(parts))
        trunk: dict[str, nn.Module] = {
            "embed_tokens": nn.Embedding(self.vocabulary, self.hidden, **options),
            "layers": nn.ModuleList(blocks),
            "norm": nn.RMSNorm(self.hidden, **options),
        }
        return nn.ModuleDict({"model": nn.ModuleDict(trunk), "lm_head": linear(self.hidden, self.vocabulary)})


LLAMAS: dict[str, Llama] = {
    "llama-60m": Llama(512, 1376, 8, 8, 8),
    "llama-130m": Llama(768, 2048, 12, 12, 12),
    "llama-350m": Llama(1024, 2736, 24, 16, 16),
    "llama-1b": Llama(2048, 5461, 24, 32, 32),
    "llama-7b": Llama(4096, 11008, 32, 32, 32),
    "llama-13b": Llama(5120, 13824, 40, 40, 40),
    "llama-70b": Llama(8192, 28672, 80, 64, 8),
}
"""Those of the GaLore paper (60M to 7B, arXiv 2403.03507), of LLaMA-13B, and of Llama-2-70B."""
