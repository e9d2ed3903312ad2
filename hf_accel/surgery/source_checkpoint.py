"""Give a model its first values from a trained one of the same family with other sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from hf_accel.surgery.depth_growth import block_path, origin
from hf_accel.surgery.dimensions import axes_of, gathered, sizes_of
from hf_accel.surgery.frozen_model import called
from hf_accel.technique import Technique

ALIKE = (
    "vocab_size",
    "hidden_act",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rope_parameters",
    "sliding_window",
    "attention_bias",
    "mlp_bias",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings",
)
"""Settings that must be equal, beside the size of heads and the queries per key-value head."""


def load_donor(technique: Technique, source: str | None, model: Any) -> tuple[Any, Collection[str]]:
    """Return the model of ``source``, and the names of parameters that it lacks, for example those of a new head.

    ``source`` is a folder, an id or ``package.module:function``.  Class and dtype are those of ``model``.
    """
    if source is None:
        raise ValueError("checkpoint is None. Name the folder or the id of a trained model.")
    if ":" in source and not Path(source).exists():
        donor: Any = called(source)
        if type(donor) is not type(model):
            raise ValueError(f"{source!r} returns a {type(donor).__name__}. It must return a {type(model).__name__}.")
        return donor.to("cpu", model.dtype), ()
    run: Any = technique.run_
    try:
        theirs, ours = AutoConfig.from_pretrained(source).model_type, model.config.model_type
        if theirs != ours:
            raise ValueError(f"its model_type is {theirs!r}, and the model's {ours!r}")
        with torch.random.fork_rng(devices=[]), _not_sharded(run.args):
            donor, found = type(model).from_pretrained(source, dtype=model.dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{source!r} cannot be loaded ({reason}). Give the folder or the id of a model.") from None
    blocks = block_path(model)
    if lacking := next((name for name in found["missing_keys"] if name.startswith(f"{blocks}.")), None):
        raise ValueError(f"{source!r} has no {lacking}. Give a checkpoint of {type(model).__name__}.")
    return donor, found["missing_keys"]


@contextlib.contextmanager
def _not_sharded(args: Any) -> Iterator[None]:
    """Load whole models inside, also under ZeRO-3."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.hf_deepspeed_config)


def check_alike(model: Any, donor: PreTrainedModel) -> None:
    """Raise ValueError unless two models differ in sizes only, by whole heads."""
    ours, theirs = model.config, donor.config
    for key in ALIKE:
        pair = getattr(ours, key, None), getattr(theirs, key, None)
        if pair[0] != pair[1]:
            raise ValueError(f"{key} is {pair[0]!r}, and the checkpoint has {pair[1]!r}. Set {key}={pair[1]!r}.")
    new, old = sizes_of(ours), sizes_of(theirs)
    if new.head_size != old.head_size:
        raise ValueError(
            f"heads have {new.head_size} elements, and the checkpoint's have {old.head_size}. Keep the size of heads "
            "and change their number."
        )
    if new.heads * old.kv_heads != old.heads * new.kv_heads:
        raise ValueError(
            f"{new.heads} heads share {new.kv_heads} keys and values, and the checkpoint's {old.heads} share "
            f"{old.kv_heads}. Keep the ratio."
        )


def head_sources(kv_heads: Tensor, heads: int) -> Tensor:
    """Return the old head of each new one, given those of key-value heads that ``heads`` queries share."""
    return (kv_heads[:, None] * heads + torch.arange(heads)).flatten()


@torch.no_grad()
def write_from(
    model: Any,
    donor: Any,
    lacking: Collection[str],
    sources: Mapping[str, Tensor],
    blocks: Sequence[int],
    read: Callable[[Tensor, int, Tensor], Tensor] | None = None,
) -> int:
    """Give each parameter that the donor has the donor's values, and return their number.

    ``sources`` holds the old element of each new one by dimension, and ``blocks`` the old block of each new one.
    ``read`` changes the values along each axis that reads, given the axis and its sources.
    """
    path, state, written = block_path(model), donor.state_dict(), 0
    kinds, old_kinds = (getattr(m.config, "layer_types", None) for m in (model, donor))
    if kinds and old_kinds and kinds != (copied := [old_kinds[block] for block in blocks]):
        raise ValueError(f"its blocks are {kinds}, and those that they copy {copied}. Choose another depth.")
    for name, axes in axes_of(model).items():
        if (old := origin(name, path, blocks)) in lacking:
            continue
        parameter, values = model.get_parameter(name), gathered(state[old], axes, sources)
        if values.shape != parameter.shape:
            raise ValueError(f"{name} is {tuple(parameter.shape)}, and from the checkpoint {tuple(values.shape)}.")
        for dim, axis in enumerate(axes):
            if axis.reads and read is not None:
                assert axis.dimension is not None
                values = read(values, dim, sources[axis.dimension])
        parameter.copy_(values)
        written += 1
    return written
