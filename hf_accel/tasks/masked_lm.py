"""Masked language modeling: the tokens of texts that were hidden, from those on both sides of them."""

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
    """Where the texts are, how they are cut and how much of them is hidden.

    Args:
        masked: Share of the tokens that is to be predicted.
    """

    masked: Annotated[float, at.Gt(0), at.Lt(1)] = 0.25  # Geiping and Goldstein (2022), Cramming, arXiv:2212.14034


def masked_lm(model: str | dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Model, data and collator for masked language modeling."""
    check_fields("data", data, MaskedTextData)
    options = MaskedTextData(**data)
    tokenizer = load_tokenizer(options.tokenizer, model)
    if tokenizer.mask_token is None:
        if type(tokenizer).__name__ != "ByT5Tokenizer":
            raise RecipeError(f"tokenizer({options.tokenizer!r}): has no token for what is masked. Choose another.")
        tokenizer.mask_token = tokenizer.unk_token  # every byte is known
    train, validation = (examples.remove_columns("labels") for examples in read_examples(options, tokenizer))
    return {
        "model": load_model(AutoModelForMaskedLM, model, tokenizer),
        "train_dataset": train,
        "eval_dataset": validation,
        "processing_class": tokenizer,
        "data_collator": DataCollatorForLanguageModeling(tokenizer, mlm_probability=options.masked),
    }
