"""Name the axes of a transformer's parameters: width of the residual stream, heads, key-value heads, MLP.

Models of one family and of different widths differ only in the lengths of these axes, so values carry over axis by
axis.  An axis *reads* if a parameter sums over it, as a linear layer sums over its inputs.  A head that shares its
weights with the embeddings reads through the norm before it, represented by the norm's scale (and shift).

    axes_of(model)["model.layers.0.self_attn.o_proj.weight"]
    (Axis("width"), Axis("heads", reads=True))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Axis(NamedTuple):
    """One axis of a parameter."""

    dimension: str | None
    """``width``, ``heads``, ``kv_heads`` or ``mlp``; None if it is the same at any width (vocabulary, positions)."""
    reads: bool = False
    parts: int = 1
    """Number of repeats of the dimension: 3 for queries, keys and values in one matrix."""


LLAMA = {
    "embed_tokens.weight": "- width",
    "self_attn.q_proj.weight": "heads <width",
    "self_attn.q_proj.bias": "heads",
    "self_attn.k_proj.weight": "kv_heads <width",
    "self_attn.k_proj.bias": "kv_heads",
    "self_attn.v_proj.weight": "kv_heads <width",
    "self_attn.v_proj.bias": "kv_heads",
    "self_attn.o_proj.weight": "width <heads",
    "self_attn.o_proj.bias": "width",
    "self_attn.q_norm.weight": "-",
    "self_attn.k_norm.weight": "-",
    "mlp.gate_proj.weight": "mlp <width",
    "mlp.gate_proj.bias": "mlp",
    "mlp.up_proj.weight": "mlp <width",
    "mlp.up_proj.bias": "mlp",
    "mlp.down_proj.weight": "width <mlp",
    "mlp.down_proj.bias": "width",
    "input_layernorm.weight": "width",
    "post_attention_layernorm.weight": "width",
    "norm.weight": "width",
    "lm_head.weight": "- <width",
    "score.weight": "- <width",
}
GPT2 = {
    "wte.weight": "- width",
    "wpe.weight": "- width",
    "ln_1.weight": "width",
    "ln_1.bias": "width",
    "attn.c_attn.weight": "<width 3heads",
    "attn.c_attn.bias": "3heads",
    "attn.c_proj.weight": "<heads width",
    "attn.c_proj.bias": "width",
    "ln_2.weight": "width",
    "ln_2.bias": "width",
    "mlp.c_fc.weight": "<width mlp",
    "mlp.c_fc.bias": "mlp",
    "mlp.c_proj.weight": "<mlp width",
    "mlp.c_proj.bias": "width",
    "ln_f.weight": "width",
    "ln_f.bias": "width",
    "lm_head.weight": "- <width",
    "score.weight": "- <width",
}
BERT = {
    "word_embeddings.weight": "- width",
    "position_embeddings.weight": "- width",
    "token_type_embeddings.weight": "- width",
    "attention.self.query.weight": "heads <width",
    "attention.self.query.bias": "heads",
    "attention.self.key.weight": "heads <width",
    "attention.self.key.bias": "heads",
    "attention.self.value.weight": "heads <width",
    "attention.self.value.bias": "heads",
    "attention.output.dense.weight": "width <heads",
    "intermediate.dense.weight": "mlp <width",
    "intermediate.dense.bias": "mlp",
    "output.dense.weight": "width <mlp",
    "output.dense.bias": "width",
    "LayerNorm.weight": "width",
    "LayerNorm.bias": "width",
    "pooler.dense.weight": "width <width",
    "pooler.dense.bias": "width",
    "transform.dense.weight": "width <width",
    "transform.dense.bias": "width",
    "decoder.weight": "- <width",
    "decoder.bias": "-",
    "predictions.bias": "-",
    "seq_relationship.weight": "- <width",
    "seq_relationship.bias": "-",
    "lm_head.dense.weight": "width <width",
    "lm_head.dense.bias": "width",
    "lm_head.layer_norm.weight": "width",
    "lm_head.layer_norm.bias": "width",
    "lm_head.bias": "-",
    "classifier.dense.weight": "width <width",
    "classifier.dense.bias": "width",
    "classifier.out_proj.weight": "- <width",
    "classifier.out_proj.bias": "-",
    "classifier.weight": "- <width",
    "classifier.bias": "-",
    "qa_outputs.weight": "- <width",
    "qa_outputs.bias": "-",
}
"""Axes of each parameter by the end of its name; the first match decides; ``<`` marks an axis that reads."""

FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA),
    "gpt2": GPT2,
    **dict.fromkeys(("bert", "roberta"), BERT),
}
"""Axes by the ``model_type`` of a configuration."""

NORMS_FIRST = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
"""Families in which a block with branches of zero is the identity."""

BEFORE_THE_HEAD = ("model.norm.", "ln_f.", "transform.LayerNorm.", "lm_head.layer_norm.")
"""Norms with outputs that only the head of a language model reads."""


class Sizes(NamedTuple):
    """Number of units of each dimension, and of elements of a unit of ``heads`` and ``kv_heads``."""

    width: int
    heads: int
    kv_heads: int
    mlp: int
    head_size: int


def sizes_of(config: Any) -> Sizes:
    """Return the sizes of a model, from its configuration."""
    width, heads = config.hidden_size, config.num_attention_heads
    inner = config.n_inner or 4 * width if config.model_type == "gpt2" else config.intermediate_size
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return Sizes(width, heads, kv_heads, inner, getattr(config, "head_dim", None) or width // heads)


def axes_of(model: nn.Module) -> dict[str, tuple[Axis, ...]]:
    """Return the axes of each saved parameter by name, or raise ValueError if some are unknown."""
    if not isinstance(model, PreTrainedModel) or (known := FAMILIES.get(model.config.model_type)) is None:
        raise ValueError(
            f"{type(model).__name__}: the axes of its parameters are known for {', '.join(FAMILIES)} only. Remove the "
            "technique for this model."
        )
    inputs: Any = model.get_input_embeddings()
    outputs: Any = model.get_output_embeddings()
    tied = outputs is not None and outputs.weight is inputs.weight
    axes, saved = {}, model.state_dict().keys()
    for name, parameter in model.named_parameters():
        if name not in saved:
            continue
        words = next((words for end, words in known.items() if f".{name}".endswith(f".{end}")), None)
        if words is None or len(words.split()) != parameter.dim():
            raise ValueError(
                f"{type(model).__name__}: the axes of {name} {tuple(parameter.shape)} are unknown. Remove the "
                "technique "
                "for this model."
            )
        through_norm = tied and any(norm in name for norm in BEFORE_THE_HEAD)
        axes[name] = (Axis("width", reads=True),) if through_norm else tuple(map(_axis, words.split()))
    return axes


def _axis(word: str) -> Axis:
    reads, word = word.startswith("<"), word.removeprefix("<")
    parts, word = (3, word[1:]) if word.startswith("3") else (1, word)
    return Axis(None if word == "-" else word, reads, parts)


def elements(units: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Turn indices of units into indices of elements: a head stands for all of its elements."""
    within = torch.arange(sizes.head_size)
    return {
        dimension: (index[:, None] * sizes.head_size + within).flatten() if "heads" in dimension else index
        for dimension, index in units.items()
    }


def gathered(values: Tensor, axes: tuple[Axis, ...], sources: Mapping[str, Tensor]) -> Tensor:
    """Select, along each axis, the elements that ``sources`` holds for its dimension."""
    for dim, axis in enumerate(axes):
        if axis.dimension is not None:
            length, index = values.shape[dim] // axis.parts, sources[axis.dimension]
            values = values.index_select(dim, torch.cat([index + part * length for part in range(axis.parts)]))
    return values
