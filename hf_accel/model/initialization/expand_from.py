"""Start a wider and deeper model from a smaller trained checkpoint.

The trainer's model is the larger one, made from a configuration.  Its first values come from the checkpoint.  In each
dimension (width of the residual stream, heads, MLP), new unit j copies old unit s(j) = j mod old size.  Layers that
read a unit with c copies divide its weight among them unequally,

    W'[i, j] = W[s(i), s(j)] / c + e[i, j]        sum of e[i, j] over the copies of a unit = 0,

with e of ``noise`` * rms(W) / c before it is centered.  The sum stays the same, and so does the function.  But copies
get different gradients and diverge, which equal shares would never allow under Adam.

Norms over the width see the same mean and variance if every unit has the same number of copies.  If the head shares the
matrix of the embeddings, the norm before it divides the weight instead.  Heads are copied whole, with their size,
positions, keys and values.  New blocks copy old ones, with zeros in their last projections.  That makes them the
identity if norms come first.

The function equals the checkpoint's, up to rounding, if the new width is a multiple of the old one.  BERT and RoBERTa
also need the old depth.  A warning names anything else.  The optimizer starts fresh.

Recommendation: Use ExpandFrom if you already have a trained, smaller model of the same family and vocabulary.
When to use: A smaller Llama, Mistral, Qwen, GPT-2, BERT or RoBERTa with the same vocabulary exists already.
When not to use: The smaller model must be trained first, because its time counts.  A peak learning rate that is high
for a trained model undoes the copy: warm up, to a lower peak than from random weights.
Example: ``ExpandFrom(checkpoint="path/to/smaller-model")``
Defaults: ``depth`` is StackingBERT's.  ``noise`` is not taken from a paper.
Differences from the paper: All shares get relative noise; Net2Net adds some to copies.
References: Chen et al. (2016), Net2Net, https://arxiv.org/abs/1511.05641; Chen et al. (2022), bert2BERT,
https://arxiv.org/abs/2110.07143; unequal shares: Wang et al. (2023), LEMON, https://arxiv.org/abs/2310.07999; ``depth``
as in `hf_accel.surgery.depth_growth`.
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

from hf_accel.surgery.depth_growth import interleaved, middle, on_top, repeats, stacked, zero_residual_branches
from hf_accel.surgery.dimensions import NORMS_FIRST, Sizes, elements
from hf_accel.surgery.source_checkpoint import head_sources, write_from
from hf_accel.surgery.weight_init import CheckpointInit

logger = logging.get_logger(__name__)

DEPTHS = {"stacked": stacked, "interleaved": interleaved, "on_top": on_top, "middle": middle}


def copies(old: Sizes, new: Sizes) -> dict[str, Tensor]:
    """Return the old element that each new element of a dimension copies."""
    kv_heads = torch.arange(new.kv_heads) % old.kv_heads
    units = {
        "width": torch.arange(new.width) % old.width,
        "heads": head_sources(kv_heads, old.heads // old.kv_heads),
        "kv_heads": kv_heads,
        "mlp": torch.arange(new.mlp) % old.mlp,
    }
    return elements(units, new)


def shared_out(values: Tensor, dim: int, sources: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Divide values along an axis among copies, so that the copies of a unit sum to the unit's value.

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
class ExpandFrom(CheckpointInit):
    """Start from a smaller trained model.

    Args:
        checkpoint: Folder or id of the smaller model, or ``package.module:function`` that returns one.
        depth: Old block that each new block copies: the repeated stack, each block repeated, the last block repeated,
            or the middle of the stack twice.
        noise: Size of the differences between the shares of copies relative to equal shares, at least 0; with 0, copies
            stay equal forever.
    """

    depth: Literal["stacked", "interleaved", "on_top", "middle"] = "stacked"
    noise: Annotated[float, at.Ge(0)] = 0.1
    probe_fields: ClassVar = {"checkpoint": "hf_accel.testing:tiny_smaller"}

    def write(self, model: Any) -> None:
        assert self.run_ is not None
        donor, lacking, old, new, depths = self.compared(model, grows=True)
        blocks = DEPTHS[self.depth](*depths)
        generator = torch.Generator().manual_seed(self.run_.args.seed)
        read = functools.partial(shared_out, noise=self.noise, generator=generator)
        self.written_ = write_from(model, donor, lacking, copies(old, new), blocks, read)
        norms_first = model.config.model_type in NORMS_FIRST
        if norms_first:
            zero_residual_branches(model, repeats(blocks))
        self.losses_ = self._losses(old, new, depths, norms_first, model.config)
        for loss in self.losses_:
            logger.warning(f"{self!r}: {loss}, so the model does not start as the checkpoint's function.")

    def _losses(self, old: Sizes, new: Sizes, depths: tuple[int, int], norms_first: bool, config: Any) -> list[str]:
        """Return the reasons why the function differs."""
        losses = []
        if new.width % old.width:
            losses.append(f"the width, {new.width}, is no multiple of {old.width}, so norms see other statistics")
        if depths[0] != depths[1] and not norms_first:
            losses.append("norms follow the additions, so no new block is the identity")
        if depths[0] != depths[1] and getattr(config, "scale_attn_by_inverse_layer_idx", False):
            losses.append("attention is scaled by the index of its block, which changes")
        return losses

    def report(self) -> Mapping[str, Any]:
        """Report the number of written parameters, and whether the model starts as the checkpoint's function."""
        return {**super().report(), "preserving": not self.losses_}
