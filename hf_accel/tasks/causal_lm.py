"""Language modeling: the next token of texts, in blocks of equal length or one text an example."""

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
    """Where the texts are and how they are cut.

    Args:
        source: ``stdlib`` (the source of Python's standard library), a text file, a table or a folder of text files.
        validation: The same for validation; None: documents of the source, or the end of its only one.
        validation_share: Share of the documents that are for validation where ``validation`` is None.
        validation_limit: Most examples that an evaluation reads, evenly spaced; None: all.
        text_column: Column of a table.
        tokenizer: ``bytes``, a path or a name; None: the tokenizer of the model's folder, or ``bytes``.
        context: Tokens of an example.
        blocks: Whether texts are joined and cut into blocks; otherwise a text is an example, cut at ``context``.
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
    """Model, data and collator for language modeling."""
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
    """Training and validation examples, whose labels are their tokens."""
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
    """Training and validation documents, by a checksum of the text; a single document is cut near its end."""
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
    """Token ids of each document, with the token that ends a text after them."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if type(tokenizer).__name__ == "ByT5Tokenizer":
        first = tokenizer.offset  # the ids of bytes follow those of special tokens; this is a thousand times faster
        rows = [np.frombuffer(document.encode(), np.uint8).astype(np.int32) + first for document in documents]
    else:
        rows = [np.array(row, np.int32) for row in tokenizer(documents, add_special_tokens=False)["input_ids"]]
    return [np.append(row, end).astype(np.int32) for row in rows]


def cut_blocks(rows: list[np.ndarray], context: int) -> Dataset:
    """All rows after each other, cut into blocks of equal length; what is left at the end is dropped."""
    tokens = np.concatenate(rows)
    tokens = tokens[: len(tokens) // context * context]
    blocks = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(tokens), context)
    return Dataset(pyarrow.table({"input_ids": blocks, "labels": blocks}))


def cut_texts(rows: list[np.ndarray], context: int) -> Dataset:
    """One example a row, of at most ``context`` tokens."""
    texts = pyarrow.array([row[:context] for row in rows if len(row) > 1], pyarrow.list_(pyarrow.int32()))
    return Dataset(pyarrow.table({"input_ids": texts, "labels": texts}))
