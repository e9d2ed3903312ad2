"""Load frozen models that judge the trained one: teachers and references."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_accel.adapters import unwrapped
from hf_accel.losses import kind_of
from hf_accel.technique import Technique

LANGUAGE = ("causal LM", "masked LM", "seq2seq")
"""Kinds of loss with tokens as classes."""


def load_frozen(technique: Technique, source: str) -> PreTrainedModel:
    """Return a model in evaluation mode, on the device, with the classes of the trained model.

    ``source`` is a folder, a model id or ``package.module:function``, a function that returns a model.
    """
    run: Any = technique.run_
    student = unwrapped(run.model)
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"{technique!r} does not support ZeRO-3 because {source!r} would be sharded and never gathered. Use ZeRO-2."
        )
    by_function = ":" in source and not Path(source).exists()
    try:
        model = called(source) if by_function else _load(source, student.dtype)
    except ValueError as error:
        raise ValueError(f"{technique!r}: {error}") from None
    check_same_classes(technique, source, model, student, run.processing_class)
    _check_same_tokens(technique, source, run.processing_class)
    return freeze(model).to(run.args.device)  # type: ignore[arg-type]


def freeze(model: Any) -> Any:
    """Put a model in evaluation mode, with parameters that need no gradient."""
    return model.eval().requires_grad_(False)


def check_same_classes(technique: Technique, source: str, model: Any, student: Any, tokenizer: Any = None) -> None:
    """Raise ValueError unless two models have the same kind of loss and the same classes.

    Vocabularies may be padded to different lengths: all tokens of ``tokenizer`` must be known to both, and the source
    must have the same tokenizer.
    """
    kind, ours = kind_of(model), kind_of(student)
    if kind != ours:
        raise ValueError(
            f"{technique!r}: {source!r} ({type(model).__name__}) is not a model for {ours}, but "
            f"{type(student).__name__} is. Give one of the same kind."
        )
    tokens = kind in LANGUAGE
    theirs, ours = (num_classes(m) for m in (model, student))
    if theirs != ours and not (tokens and _has_tokenizer(source, tokenizer) and len(tokenizer) <= min(theirs, ours)):
        raise ValueError(
            f"{technique!r}: {source!r} has {theirs} {'tokens' if tokens else 'labels'}, and the model has {ours}. "
            f"Give one with the same {'vocabulary, or the same tokenizer' if tokens else 'labels'}."
        )
    names, own = model.config.id2label, student.config.id2label
    if not tokens and names != own and set(names.values()) == set(own.values()):
        raise ValueError(f"{technique!r}: {source!r} has the labels in another order, {names}. Give one with {own}.")


@torch.no_grad()
def judge(technique: Technique, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Any:
    """Return the outputs of a frozen model, and count its operations, 2 per parameter and position."""
    run: Any = technique.run_
    run.add_flops(2 * inputs[model.main_input_name].numel() * model.num_parameters(exclude_embeddings=True))
    with run.accelerator.autocast():  # as in the forward pass of the trained model
        return model(**run.head.without_labels(model, inputs))


def num_classes(model: Any) -> int:
    """Return the number of classes of a model: tokens or labels."""
    tokens = kind_of(model) in LANGUAGE
    return model.config.get_text_config().vocab_size if tokens else model.config.num_labels


def _has_tokenizer(source: str, tokenizer: Any) -> bool:
    """Return whether the source has this tokenizer."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or ":" in source:
        return False
    try:
        return AutoTokenizer.from_pretrained(source).get_vocab() == tokenizer.get_vocab()
    except (OSError, ValueError):
        return False


def _load(source: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        architecture = (AutoConfig.from_pretrained(source).architectures or ["none"])[0]
        kind = getattr(transformers, architecture, None)
        if kind is None:
            raise ValueError(f"its architecture, {architecture}, is not one of transformers")
        return kind.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{source!r} cannot be loaded ({reason}). Give the folder or the id of a model.") from None


def called(source: str) -> PreTrainedModel:
    """Return the model of a function, named by ``package.module:function``."""
    module, _, name = source.partition(":")
    try:
        model = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"{source!r} returns no model ({error}). Name a function that returns one.") from None
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{source!r} returns a {type(model).__name__}. It must return a PreTrainedModel.")
    return model


def _check_same_tokens(technique: Technique, source: str, tokenizer: Any) -> None:
    """Raise ValueError if a folder's tokenizer differs from the trainer's."""
    if not Path(source, "tokenizer_config.json").is_file() or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    if AutoTokenizer.from_pretrained(source).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{technique!r}: {source!r} has another tokenizer. Give a model of the same vocabulary.")
