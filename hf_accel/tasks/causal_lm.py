"""Language modeling: predict the next token of texts, in blocks of equal length or one text per example."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Annotated, Any

import annotated_types as at
import numpy as np
import pyarrow
from datasets import Dataset
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq

from hf_accel.recipe import RecipeError, check_fields
from hf_accel.tasks.files import read_documents
from hf_accel.tasks.models import load_model, load_tokenizer


@dataclass
class TextData:
    """Describe the texts, and how to cut them.

    Args:
        source: ``stdlib`` (the source of Python's standard library), a text file, a table or a folder of text files.
        validation: Source for validation; None: documents of ``source``, or the end of its only document.
        validation_share: Share of the documents for validation if ``validation`` is None.
        validation_limit: Most examples of an evaluation, evenly spaced; None: all.
        text_column: Column of a table.
        tokenizer: ``bytes``, a path or a name; None: the tokenizer of the model's folder, or ``bytes``.
        context: Tokens per example.
        blocks: Join texts and cut them into blocks; otherwise each text is an example, cut at ``context``.
    """

    source: str = "stdlib"
    validation: str | None = None
    validation_share: Annotated[float, at.Gt(0), at.Lt(1)] = 0.05
    validation_limit: Annotated[int, at.Gt(0)] | None = None
    text_column: str = "text"
    tokenizer: str | None = None
    context: Annotated[int, at.Ge(2)] = 128
    blocks: bool = True


def causal_lm(model: str | dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Build the model, data and collator for language modeling."""
    check_fields("data", data, TextData)
    options = TextData(**data)
    tokenizer = load_tokenizer(options.tokenizer, model)
    train, validation = read_examples(options, tokenizer)
    return {
        "model": load_model(AutoModelForCausalLM, model, tokenizer),
        "train_dataset": train,
        "eval_dataset": validation,
        "processing_class": tokenizer,
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
    }


def read_examples(options: TextData, tokenizer: Any) -> tuple[Dataset, Dataset]:
    """Read training and validation examples, with their tokens as labels."""
    train = read_documents(options.source, options.text_column)
    if options.validation is None:
        train, validation = split(train, options.validation_share)
    else:
        validation = read_documents(options.validation, options.text_column)
    cut = cut_blocks if options.blocks else cut_texts
    sets = []
    for name, documents in (("training", train), ("validation", validation)):
        examples = cut(tokenize(documents, tokenizer), options.context)
        if len(examples) == 0:
            raise RecipeError(
                f"data({options.source!r}): the {name} text is shorter than one block of {options.context} tokens. "
                "Give more text, or a smaller context."
            )
        sets.append(examples)
    if options.validation_limit is not None and len(sets[1]) > options.validation_limit:
        sets[1] = sets[1].select(np.linspace(0, len(sets[1]) - 1, options.validation_limit).astype(int))
    return sets[0], sets[1]


def split(documents: list[str], share: float) -> tuple[list[str], list[str]]:
    """Split documents into training and validation by a checksum of the text; cut a single document near its end."""
    if len(documents) == 1:
        cut = int(len(documents[0]) * (1 - share))
        return [documents[0][:cut]], [documents[0][cut:]]
    # Equal documents fall on the same side.
    held_out = [zlib.crc32(document.encode()) < share * 2**32 for document in documents]
    if not any(held_out):
        held_out[-1] = True
    train = [document for document, held in zip(documents, held_out, strict=True) if not held]
    return train, [document for document, held in zip(documents, held_out, strict=True) if held]


def tokenize(documents: list[str], tokenizer: Any) -> list[np.ndarray]:
    """Return the token ids of each document, followed by the end-of-text token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if type(tokenizer).__name__ == "ByT5Tokenizer":
        first = tokenizer.offset  # the ids of bytes follow those of special tokens; this is a thousand times faster
        rows = [np.frombuffer(document.encode(), np.uint8).astype(np.int32) + first for document in documents]
    else:
        rows = [np.array(row, np.int32) for row in tokenizer(documents, add_special_tokens=False)["input_ids"]]
    return [np.append(row, end).astype(np.int32) for row in rows]


def cut_blocks(rows: list[np.ndarray], context: int) -> Dataset:
    """Concatenate all rows and cut them into blocks of equal length; drop the rest at the end."""
    tokens = np.concatenate(rows)
    tokens = tokens[: len(tokens) // context * context]
    blocks = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(tokens), context)
    return Dataset(pyarrow.table({"input_ids": blocks, "labels": blocks}))


def cut_texts(rows: list[np.ndarray], context: int) -> Dataset:
    """Make one example per row, of at most ``context`` tokens."""
    texts = pyarrow.array([row[:context] for row in rows if len(row) > 1], pyarrow.list_(pyarrow.int32()))
    return Dataset(pyarrow.table({"input_ids": texts, "labels": texts}))
