"""Weight selection: a large trained checkpoint becomes the first values of a narrower and shallower model.

The model of the trainer is the smaller one, made from a configuration; its first values are some of the checkpoint's.
Of each dimension (width of the residual stream, heads, MLP), new unit i of n is old unit

    s(i) = floor(i * N / n)    uniform: at equal distances          s(i) = i    first

of N, the same for all parameters and blocks, so that what one layer writes is what the next one reads,

    W'[i, j] = W[s(i), s(j)]

Heads are taken whole, with their size, positions and the queries of their keys and values.  Blocks are the first ones,
or some at equal distances.  The function is another one than the checkpoint's: what is kept is where training starts
from, which the paper finds better than random values, most of all on little data.  The optimizer starts anew.

Reference: Xu et al. (2023), Initializing Models with Larger Ones, https://arxiv.org/abs/2311.18823, whose defaults
these are; blocks at equal distances: Sanh et al. (2019), DistilBERT, https://arxiv.org/abs/1910.01108.  Departure:
heads stay whole, where the paper selects elements without regard to them.

When to use: a small model of Llama, Mistral, Qwen, GPT-2, BERT or RoBERTa is to be trained, and a larger one of the
same family and vocabulary is there; with `Distillation` from the larger one.
When not to use: the small model is there, trained, too; long runs on much data, in which the start is forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_accel.model.initialization.weight_init import WeightInit, refuse_adapters
from hf_accel.surgery.depth_growth import interleaved
from hf_accel.surgery.dimensions import Sizes, axes_of, elements, sizes_of
from hf_accel.surgery.source_checkpoint import check_alike, head_sources, load_donor, write_from


def first(size: int, new_size: int) -> list[int]:
    """The first ones."""
    return list(range(min(size, new_size)))


def selected(old: Sizes, new: Sizes, uniform: bool) -> dict[str, Tensor]:
    """For each new element of a dimension, the old one that it is."""
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
class ShrinkFrom(WeightInit):
    """Starts from a part of a larger trained model.

    Args:
        checkpoint: Folder or id of the larger model, or ``package.module:function`` that gives one.
        elements: Which units of a dimension are kept: some at equal distances, or the first ones.
        blocks: Which blocks are kept: the first ones, or some at equal distances.
    """

    checkpoint: str | None = None
    elements: Literal["uniform", "first"] = "uniform"  # Xu et al.
    blocks: Literal["first", "interleaved"] = "first"  # Xu et al.
    expected_failed_checks: ClassVar = {
        "check_tied_head": "refused: the checkpoint must be tied where the model is, and that of the contract is not"
    }
    probe_fields: ClassVar = {"checkpoint": "hf_accel.testing:tiny_larger"}
    variations: ClassVar = {"checkpoint": "hf_accel.testing:tiny_teacher"}
    claims: ClassVar = frozenset({"initial_blocks", "initial_weights", "pretrained_weights"})

    def write(self, model: Any) -> None:
        axes_of(model)
        donor, lacking = load_donor(self, self.checkpoint, model)
        check_alike(model, donor)
        old, new = sizes_of(donor.config), sizes_of(model.config)
        depths = donor.config.num_hidden_layers, model.config.num_hidden_layers
        for name, before, after in [*zip(Sizes._fields, old, new, strict=True), ("number of blocks", *depths)]:
            if after > before:
                raise ValueError(
                    f"its {name} is {after}, and that of the checkpoint {before}. Give a larger checkpoint, or take "
                    "ExpandFrom."
                )
        blocks = (first if self.blocks == "first" else interleaved)(*depths)
        sources = selected(old, new, uniform=self.elements == "uniform")
        self.written_ = write_from(model, donor, lacking, sources, blocks)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        refuse_adapters(self, model)

    def report(self) -> Mapping[str, Any]:
        """Parameters that were written."""
        return {"parameters": self.written_}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["parameters"] > 0
