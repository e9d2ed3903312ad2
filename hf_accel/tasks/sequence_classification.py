"""Classification of texts: a table with a column of texts and a column of labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import annotated_types as at
import numpy as np
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, EvalPrediction

from hf_accel.recipe import RecipeError, check_fields
from hf_accel.tasks.files import read_table, texts
from hf_accel.tasks.models import load_model, load_tokenizer


@dataclass
class LabeledData:
    """Describe the texts and their labels.

    Args:
        train: Table of the training examples.
        validation: Table of the validation examples.
        text_column: Column of the texts.
        label_column: Column of the labels, numbers or names.
        tokenizer: ``bytes``, a path or a name; None: the tokenizer of the model's folder, or ``bytes``.
        context: Most tokens of an example; longer ones are cut.
    """

    train: str
    validation: str
    text_column: str = "text"
    label_column: str = "label"
    tokenizer: str | None = None
    context: Annotated[int, at.Ge(2)] = 128


def sequence_classification(model: str | dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Build the model, data, collator and accuracy for the classification of texts."""
    check_fields("data", data, LabeledData)
    for key in ("train", "validation"):
        if key not in data:
            raise RecipeError(f"data: {key!r} is missing. Name the file of the {key} examples.")
    options = LabeledData(**data)
    columns = [options.text_column, options.label_column]
    tables = {source: read_table(source, columns) for source in (options.train, options.validation)}
    found = {source: table[options.label_column].to_pylist() for source, table in tables.items()}
    classes, names = numbered(found, options.train)
    tokenizer = load_tokenizer(options.tokenizer, model)
    sets = {}
    for source, table in tables.items():
        encoded = tokenizer(texts(table, source, options.text_column), truncation=True, max_length=options.context)
        sets[source] = Dataset.from_dict({**encoded, "labels": classes[source]})
    return {
        "model": load_model(
            AutoModelForSequenceClassification, model, tokenizer, ignore_mismatched_sizes=True, **names
        ),  # a head for other classes is replaced by a new one
        "train_dataset": sets[options.train],
        "eval_dataset": sets[options.validation],
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": accuracy,
    }


def numbered(labels: dict[str, list[Any]], train: str) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Return the numbers of the classes by source, and the entries of a model's configuration for them."""
    classes = sorted_classes(labels[train], train)
    numbers = {label: number for number, label in enumerate(classes)}
    for source, own in labels.items():
        if unknown := set(own) - numbers.keys():
            raise RecipeError(
                f"data({source!r}): label {sorted(map(repr, unknown))[0]} is in no training example. Remove it."
            )
    names = {number: str(label) for number, label in enumerate(classes)}
    entries = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    return {source: [numbers[label] for label in own] for source, own in labels.items()}, entries


def sorted_classes(labels: list[Any], source: str) -> list[Any]:
    """Return the classes of a training set in order: at least two, all numbers or all names."""
    classes, kinds = set(labels), {type(label).__name__ for label in labels}
    if kinds not in ({"int"}, {"str"}, {"bool"}):
        raise RecipeError(f"data({source!r}): labels are {' and '.join(sorted(kinds))}. Use whole numbers or names.")
    if len(classes) < 2:
        raise RecipeError(f"data({source!r}): all labels are {labels[0]!r}. Give at least two classes.")
    return sorted(classes)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of examples with the largest logit at the label."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float(np.mean(np.argmax(logits, axis=-1) == prediction.label_ids))}
