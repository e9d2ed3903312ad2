"""Expansion: a trained checkpoint becomes a wider and deeper model, which begins where the smaller one ended.

The model of the trainer is the larger one, made from a configuration; its first values come from the checkpoint.  Of
each dimension (width of the residual stream, heads, MLP), new unit j is a copy of old unit s(j) = j mod old size.
Whoever reads a unit of which there are c copies shares its weight out among them, unequally,

    W'[i, j] = W[s(i), s(j)] / c + e[i, j]        sum of e[i, j] over the copies of a unit = 0,

with e of ``noise`` * rms(W) / c before it is centered.  The sum stays what it was, and so does the function; but copies
get gradients of their own and part, which equal shares would never let them do under Adam.  Norms over the width see
the same mean and variance where each unit has as many copies.  Where the head is the matrix of the embeddings, the norm
before it shares out in its place.  Heads are copied whole, with their size, positions and keys and values.  New blocks
are copies of old ones whose last projections are zero, which makes them the identity where norms come first.

The function is that of the checkpoint, up to rounding, where the new width is a multiple of the old one and, for BERT
and RoBERTa, the depth is the old one; anything else is said in a warning.  The optimizer starts anew.

Reference: Chen et al. (2016), Net2Net, https://arxiv.org/abs/1511.05641; Chen et al. (2022), bert2BERT,
https://arxiv.org/abs/2110.07143; unequal shares: Wang et al. (2023), LEMON, https://arxiv.org/abs/2310.07999; ``depth``
as in `hf_accel.surgery.depth_growth`.  Departure: relative noise on all shares, where Net2Net adds some to copies.

When to use: a smaller model of the same family and vocabulary is there already, of Llama, Mistral, Qwen, GPT-2, BERT or
RoBERTa.
When not to use: the smaller model would have to be trained for it, and its time counted; a peak learning rate that is
high for a trained model undoes what was copied: warm up, to less than from random weights.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as at
import torch
from torch import Tensor
from transformers.utils import logging

from hf_accel.model.initialization.weight_init import WeightInit, refuse_adapters
from hf_accel.surgery.depth_growth import interleaved, middle, on_top, repeats, stacked, zero_residual_branches
from hf_accel.surgery.dimensions import NORMS_FIRST, Sizes, axes_of, elements, sizes_of
from hf_accel.surgery.source_checkpoint import check_alike, head_sources, load_donor, write_from

logger = logging.get_logger(__name__)

DEPTHS = {"stacked": stacked, "interleaved": interleaved, "on_top": on_top, "middle": middle}


def copies(old: Sizes, new: Sizes) -> dict[str, Tensor]:
    """For each new element of a dimension, the old one that it is a copy of."""
    kv_heads = torch.arange(new.kv_heads) % old.kv_heads
    units = {
        "width": torch.arange(new.width) % old.width,
        "heads": head_sources(kv_heads, old.heads // old.kv_heads),
        "kv_heads": kv_heads,
        "mlp": torch.arange(new.mlp) % old.mlp,
    }
    return elements(units, new)


def shared_out(values: Tensor, dim: int, sources: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Values of copies along an axis, changed so that those of the copies of a unit sum to the unit's.

    ``noise`` is the size of the differences between shares, relative to an equal share.
    """
    shape = [1] * values.dim()
    shape[dim] = -1
    counts = sources.bincount()
    shares = values / counts[sources].view(shape)
    extra = torch.randn(values.shape, generator=generator).to(values) * noise * shares.square().mean().sqrt()
    sums = extra.new_zeros([len(counts) if d == dim else n for d, n in enumerate(values.shape)])
    means = sums.index_add(dim, sources, extra) / counts.view(shape)
    return shares + extra - means.index_select(dim, sources)


@dataclass(eq=False)
class ExpandFrom(WeightInit):
    """Starts from a smaller trained model.

    Args:
        checkpoint: Folder or id of the smaller model, or ``package.module:function`` that gives one.
        depth: Which old block each new one copies: the stack again and again, each block again and again, the last
            block again and again, or the middle of the stack twice.
        noise: Size of the differences between the shares of copies, at least 0, relative to equal shares; with 0 copies
            stay alike for ever.
    """

    checkpoint: str | None = None
    depth: Literal["stacked", "interleaved", "on_top", "middle"] = "stacked"  # StackingBERT
    noise: Annotated[float, at.Ge(0)] = 0.1
    expected_failed_checks: ClassVar = {
        "check_tied_head": "refused: the checkpoint must be tied where the model is, and that of the contract is not"
    }
    probe_fields: ClassVar = {"checkpoint": "hf_accel.testing:tiny_smaller"}
    variations: ClassVar = {"checkpoint": "hf_accel.testing:tiny_teacher"}
    claims: ClassVar = frozenset({"initial_blocks", "initial_weights", "pretrained_weights"})

    def write(self, model: Any) -> None:
        assert self.run_ is not None
        axes_of(model)
        donor, lacking = load_donor(self, self.checkpoint, model)
        check_alike(model, donor)
        old, new = sizes_of(donor.config), sizes_of(model.config)
        depths = donor.config.num_hidden_layers, model.config.num_hidden_layers
        for name, before, after in [*zip(Sizes._fields, old, new, strict=True), ("number of blocks", *depths)]:
            if after < before:
                raise ValueError(
                    f"its {name} is {after}, and that of the checkpoint {before}. Give a smaller checkpoint, or take "
                    "ShrinkFrom."
                )
        blocks = DEPTHS[self.depth](*depths)
        generator = torch.Generator().manual_seed(self.run_.args.seed)
        read = functools.partial(shared_out, noise=self.noise, generator=generator)
        self.written_ = write_from(model, donor, lacking, copies(old, new), blocks, read)
        norms_first = model.config.model_type in NORMS_FIRST
        if norms_first:
            zero_residual_branches(model, repeats(blocks))
        self.losses_ = self._losses(old, new, depths, norms_first, model.config)
        for loss in self.losses_:
            logger.warning(f"{self!r}: {loss}, and the model does not begin as the checkpoint's function.")

    def _losses(self, old: Sizes, new: Sizes, depths: tuple[int, int], norms_first: bool, config: Any) -> list[str]:
        """Why the function is another one."""
        losses = []
        if new.width % old.width:
            losses.append(f"the width, {new.width}, is no multiple of {old.width}, and norms see other statistics")
        if depths[0] != depths[1] and not norms_first:
            losses.append("norms follow the additions, and no new block is the identity")
        if depths[0] != depths[1] and getattr(config, "scale_attn_by_inverse_layer_idx", False):
            losses.append("attention is scaled by the number of its block, which is another one")
        return losses

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        refuse_adapters(self, model)

    def report(self) -> Mapping[str, Any]:
        """Parameters that were written, and whether the model began as the checkpoint's function."""
        return {"parameters": self.written_, "preserving": not self.losses_}

    def took_effect(self, report: Mapping[str, Any]) -> bool:
        return report["parameters"] > 0
