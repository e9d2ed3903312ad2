"""What is planned for: a model that is not loaded, and batches for it."""

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

# What is planned for -------------------------------------------------------------------------------------------------


USUAL_SIDE = 224
"""Pixels along a side of images, where a configuration does not say."""

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
    """A model that is not loaded, and what it is trained on.

    Args:
        name: For people.
        build: Makes it, of the type its weights are saved in, or that a recipe trains them in.
        rows: Examples of a forward pass on a device.
        length: Positions of an example; None: of images, which have a size of their own.
        labels: ``tokens`` or ``rows``: of what the labels are.
    """

    name: str
    config: Any
    build: Callable[[], nn.Module]
    rows: int
    length: int | None
    labels: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.config.dtype or torch.float32

    def model(self, dtype: torch.dtype) -> nn.Module:
        """The model with weights of another type."""
        return self.build().to(dtype)

    def inputs(self, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """A batch without padding; images of a type."""
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
    """What a folder, a ``config.json``, a name of the Hub or a recipe says; ValueError where it says too little."""
    path = Path(model)
    if path.suffix in (".yaml", ".yml"):
        return _subject_of_recipe(Recipe.load(path), path.stem, rows, length)
    config = _read_config(model)
    names = config.architectures or []
    name = next((name for name in names if name.endswith(tuple(_LABELS))), None)
    if name is None:
        raise ValueError(
            f"model({model!r}): its configuration names {', '.join(names) or 'no architecture'}, and plan knows "
            "language models and classifiers. Give a recipe with a task, or write 'architectures' into config.json."
        )
    return _subject(path.name, config, getattr(transformers, name), name, rows or 8, length)


def _subject(name: str, config: Any, make: Callable, kind: str, rows: int, length: int | None) -> Subject:
    if hasattr(config, "vocab_size") and config.pad_token_id is None:
        config.pad_token_id = 0  # classifiers of rows ask for one
    _drop_nothing_in_attention(config)
    labels = next(labels for ending, labels in _LABELS.items() if kind.endswith(ending))
    if not hasattr(config, "vocab_size"):
        if not hasattr(config, "num_channels"):
            raise ValueError(f"model({name!r}): takes neither text alone nor images alone. Plan knows no others.")
        if length is not None:
            raise ValueError(f"length({length}): {name} is trained on images, which have none. Leave it out.")
        return Subject(name, config, lambda: make(config), rows, None, labels)
    longest = getattr(config, "max_position_embeddings", None)
    if length is not None and longest is not None and length > longest:
        raise ValueError(f"length({length}): {name} has {longest} positions. Give at most these.")
    return Subject(name, config, lambda: make(config), rows, length or min(longest or 2048, 2048), labels)


def _drop_nothing_in_attention(config: Any) -> None:
    """Kernels of accelerators do not keep scores for dropout, as those of the CPU would, with which is traced."""
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
        raise ValueError(f"task({recipe.task!r}): plan does not know it. {nearest(str(recipe.task), TASKS)}")
    if recipe.model is None:
        raise ValueError("recipe: it names no model. Write 'model: path' or 'model: {config: {model_type: ...}}'.")
    if isinstance(recipe.model, dict) and "quantization_config" in recipe.model:
        raise ValueError("model.quantization_config: plan does not count quantized weights. Add --set model=PATH.")
    kind = getattr(transformers, TASKS[recipe.task])
    if isinstance(recipe.model, str) or "path" in recipe.model:
        saved = {"path": recipe.model} if isinstance(recipe.model, str) else recipe.model
        config = _read_config(saved["path"])
        config.dtype = dtype_of(saved.get("dtype", "float32"))  # as `load_model` has it
    else:
        with torch.device("meta"):
            config = load_model(kind, recipe.model, load_tokenizer(recipe.data.get("tokenizer"), recipe.model)).config
    rows = rows or int(recipe.args.get("per_device_train_batch_size", 8))
    length = length or recipe.data.get("context") or recipe.data.get("max_length")
    return _subject(name, config, kind.from_config, TASKS[recipe.task].removeprefix("AutoModel"), rows, length)
