"""Masked language modeling: predict hidden tokens of texts from the tokens on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import annotated_types as at
from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling

from hf_accel.recipe import RecipeError, check_fields
from hf_accel.tasks.causal_lm import TextData, read_examples
from hf_accel.tasks.models import load_model, load_tokenizer


@dataclass
class MaskedTextData(TextData):
    """Describe the texts, how to cut them, and how many tokens to hide.

    Args:
        masked: Share of the tokens to predict.
    """

    masked: Annotated[float, at.Gt(0), at.Lt(1)] = 0.25  # Geiping and Goldstein (2022), Cramming, arXiv:2212.14034


def masked_lm(model: str | dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Build the model, data and collator for masked language modeling."""
    check_fields("data", data, MaskedTextData)
    options = MaskedTextData(**data)
    tokenizer = load_tokenizer(options.tokenizer, model)
    if tokenizer.mask_token is None:
        if type(tokenizer).__name__ != "ByT5Tokenizer":
            raise RecipeError(f"tokenizer({options.tokenizer!r}): has no mask token. Choose another.")
        tokenizer.mask_token = tokenizer.unk_token  # unused otherwise, because every byte is known
    train, validation = (examples.remove_columns("labels") for examples in read_examples(options, tokenizer))
    return {
        "model": load_model(AutoModelForMaskedLM, model, tokenizer),
        "train_dataset": train,
        "eval_dataset": validation,
        "processing_class": tokenizer,
        "data_collator": DataCollatorForLanguageModeling(tokenizer, mlm_probability=options.masked),
    }
