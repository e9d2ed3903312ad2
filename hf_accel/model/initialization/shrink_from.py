"""Start a narrower and shallower model from some of the weights of a larger trained checkpoint.

The trainer's model is the smaller one, made from a configuration.  Its first values are some of the checkpoint's.  In
each dimension (width of the residual stream, heads, MLP), new unit i of n is old unit

    s(i) = floor(i * N / n)    uniform: at equal distances          s(i) = i    first

of N.  The choice is the same for all parameters and blocks, so each layer reads what the previous one writes:

    W'[i, j] = W[s(i), s(j)]

Heads are taken whole, with their size, positions and the queries of their keys and values.  Blocks are the first ones,
or some at equal distances.  The function differs from the checkpoint's.  Only the starting point carries over, which
the paper finds better than random values, above all on little data.  The optimizer starts fresh.

Recommendation: Use ShrinkFrom if you train a small model and have a larger one of the same family and vocabulary.
When to use: Training a small Llama, Mistral, Qwen, GPT-2, BERT or RoBERTa, with a larger one of the same family and
vocabulary at hand.  Combine it with `Distillation` from the larger one.
When not to use: A trained small model exists, too.  Long runs on much data, which forget the start.
Example: ``ShrinkFrom(checkpoint="path/to/larger-model")``
Defaults: The values are those of Xu et al.
Differences from the paper: Heads stay whole; the paper selects elements without regard to them.
References: Xu et al. (2023), Initializing Models with Larger Ones, https://arxiv.org/abs/2311.18823; blocks at equal
distances: Sanh et al. (2019), DistilBERT, https://arxiv.org/abs/1910.01108.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_accel.surgery.depth_growth import interleaved
from hf_accel.surgery.dimensions import Sizes, elements
from hf_accel.surgery.source_checkpoint import head_sources, write_from
from hf_accel.surgery.weight_init import CheckpointInit


def first(size: int, new_size: int) -> list[int]:
    """Return the first indices."""
    return list(range(min(size, new_size)))


def selected(old: Sizes, new: Sizes, uniform: bool) -> dict[str, Tensor]:
    """Return the old element that each new element of a dimension takes."""
    choose = interleaved if uniform else first
    kv_heads = torch.tensor(choose(old.kv_heads, new.kv_heads))
    units = {
        "width": torch.tensor(choose(old.width, new.width)),
        "heads": head_sources(kv_heads, old.heads // old.kv_heads),
        "kv_heads": kv_heads,
        "mlp": torch.tensor(choose(old.mlp, new.mlp)),
    }
    return elements(units, new)


@dataclass(eq=False)
class ShrinkFrom(CheckpointInit):
    """Start from a part of a larger trained model.

    Args:
        checkpoint: Folder or id of the larger model, or ``package.module:function`` that returns one.
        elements: Kept units of a dimension: some at equal distances, or the first ones.
        blocks: Kept blocks: the first ones, or some at equal distances.
    """

    elements: Literal["uniform", "first"] = "uniform"
    blocks: Literal["first", "interleaved"] = "first"
    probe_fields: ClassVar = {"checkpoint": "hf_accel.testing:tiny_larger"}

    def write(self, model: Any) -> None:
        donor, lacking, old, new, depths = self.compared(model, grows=False)
        blocks = (first if self.blocks == "first" else interleaved)(*depths)
        sources = selected(old, new, uniform=self.elements == "uniform")
        self.written_ = write_from(model, donor, lacking, sources, blocks)
