"""Describe a model that is not loaded, and make batches for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from hf_accel.recipe import Recipe
from hf_accel.recipe.technique_syntax import nearest
from hf_accel.tasks.models import dtype_of, load_model, load_tokenizer

USUAL_SIDE = 224
"""Pixels along a side of images, if the configuration has no size."""

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}

_LABELS = {
    "ForCausalLM": "tokens",
    "LMHeadModel": "tokens",
    "ForMaskedLM": "tokens",
    "ForConditionalGeneration": "tokens",
    "ForTokenClassification": "tokens",
    "ForSequenceClassification": "rows",
    "ForImageClassification": "rows",
}


@dataclass(frozen=True)
class Subject:
    """A model that is not loaded, and its inputs.

    Args:
        name: Name for messages.
        build: Makes the model in the dtype of its saved weights, or of its recipe.
        rows: Examples per forward pass on a device.
        length: Positions per example; None for images with the size in ``config``.
        labels: ``tokens`` if each token has a label, ``rows`` if each example has one.
    """

    name: str
    config: Any
    build: Callable[[], nn.Module]
    rows: int
    length: int | None
    labels: str

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""
        return self.config.dtype or torch.float32

    def model(self, dtype: torch.dtype) -> nn.Module:
        """Build the model with weights of another dtype."""
        return self.build().to(dtype)

    def inputs(self, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Make a batch without padding; images have the given dtype."""
        if self.length is None:
            side = getattr(self.config, "image_size", USUAL_SIDE)
            sides = side if isinstance(side, list | tuple) else (side, side)
            images = torch.zeros(rows, self.config.num_channels, *sides, dtype=dtype)
            return {"pixel_values": images, "labels": self._labels(rows)}
        ids_BL = torch.zeros(rows, self.length, dtype=torch.long)
        labels = torch.zeros_like(ids_BL) if self.labels == "tokens" else self._labels(rows)
        return {"input_ids": ids_BL, "labels": labels}

    def _labels(self, rows: int) -> Tensor:
        regression = self.config.num_labels == 1
        return torch.zeros(rows, dtype=torch.float32 if regression else torch.long)


def subject_of(model: str, *, rows: int | None = None, length: int | None = None) -> Subject:
    """Describe the model of a folder, a ``config.json``, a name on the Hub or a recipe.

    Raise ValueError if the source says too little.
    """
    path = Path(model)
    if path.suffix in (".yaml", ".yml"):
        return _subject_of_recipe(Recipe.load(path), path.stem, rows, length)
    config = _read_config(model)
    names = config.architectures or []
    name = next((name for name in names if name.endswith(tuple(_LABELS))), None)
    if name is None:
        raise ValueError(
            f"model({model!r}): plan does not support {', '.join(names) or 'a configuration without architecture'}, "
            "only language models and classifiers. Give a recipe with a task, or write 'architectures' into "
            "config.json."
        )
    return _subject(path.name, config, getattr(transformers, name), name, rows or 8, length)


def _subject(name: str, config: Any, make: Callable, kind: str, rows: int, length: int | None) -> Subject:
    if hasattr(config, "vocab_size") and config.pad_token_id is None:
        config.pad_token_id = 0  # classifiers of rows need one
    _drop_nothing_in_attention(config)
    labels = next(labels for ending, labels in _LABELS.items() if kind.endswith(ending))
    if not hasattr(config, "vocab_size"):
        if not hasattr(config, "num_channels"):
            raise ValueError(f"model({name!r}): plan supports models of text or of images only. Choose one of these.")
        if length is not None:
            raise ValueError(f"length({length}): {name} reads images, which have no length. Remove --length.")
        return Subject(name, config, lambda: make(config), rows, None, labels)
    longest = getattr(config, "max_position_embeddings", None)
    if length is not None and longest is not None and length > longest:
        raise ValueError(f"length({length}): {name} has {longest} positions. Give at most {longest}.")
    return Subject(name, config, lambda: make(config), rows, length or min(longest or 2048, 2048), labels)


def _drop_nothing_in_attention(config: Any) -> None:
    """Turn off dropout in attention: the traced CPU kernels keep scores for it, and kernels of accelerators do not."""
    for key in ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "attention_dropout_prob"):
        if getattr(config, key, None):
            setattr(config, key, 0.0)


def _read_config(model: str) -> Any:
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        if Path(model).exists():
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"model({model!r}): its configuration cannot be read ({reason}). Check it.") from None
        raise ValueError(f"model({model!r}): neither a path nor found on the Hub. Check the path.") from None


def _subject_of_recipe(recipe: Recipe, name: str, rows: int | None, length: int | None) -> Subject:
    if recipe.task not in TASKS:
        raise ValueError(f"task({recipe.task!r}): plan does not support it. {nearest(str(recipe.task), TASKS)}")
    if recipe.model is None:
        raise ValueError("recipe: it names no model. Write 'model: path' or 'model: {config: {model_type: ...}}'.")
    if isinstance(recipe.model, dict) and "quantization_config" in recipe.model:
        raise ValueError("model.quantization_config: plan does not support it. Remove quantization_config.")
    kind = getattr(transformers, TASKS[recipe.task])
    if isinstance(recipe.model, str) or "path" in recipe.model:
        saved = {"path": recipe.model} if isinstance(recipe.model, str) else recipe.model
        config = _read_config(saved["path"])
        config.dtype = dtype_of(saved.get("dtype", "float32"))  # as in `load_model`
    else:
        with torch.device("meta"):
            config = load_model(kind, recipe.model, load_tokenizer(recipe.data.get("tokenizer"), recipe.model)).config
    rows = rows or int(recipe.args.get("per_device_train_batch_size", 8))
    length = length or recipe.data.get("context") or recipe.data.get("max_length")
    return _subject(name, config, kind.from_config, TASKS[recipe.task].removeprefix("AutoModel"), rows, length)
