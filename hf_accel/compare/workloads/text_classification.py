"""Classification of short texts by a small BERT from scratch: sentiment of film reviews, intents of bank customers.

The tokenizer is BERT's without the pieces that no training text uses.  Their embeddings would never be trained, and an
optimizer that passes over 30,522 rows at every step would dominate the cost of such small models.  Training texts are
split into the same pieces as with the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, DataCollatorWithPadding

from hf_accel.compare.workloads.workload import Workload, data_file, sample, transformer
from hf_accel.tasks.files import read_table
from hf_accel.tasks.sequence_classification import accuracy

VOCABULARY = "tokenizer/bert-base-uncased/vocab.txt"


@dataclass
class TextClassification(Workload):
    """Texts and labels in tables: a fixed choice of the training texts, and all texts for validation."""

    train: ClassVar[str]
    validation: ClassVar[tuple[str, ...]]

    args = {
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 128,
        "learning_rate": 2e-3,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
    }

    @property
    def files(self) -> tuple[str, ...]:  # type: ignore[override]
        """The vocabulary and the tables."""
        return (VOCABULARY, self.train, *self.validation)

    def build(self) -> dict[str, Any]:
        classes = len(read_table(str(data_file(self.train)), ["label"])["label"].unique())
        train = sample(self.train, ["text", "label"], self.size["train"])
        tokenizer = without_unused(BertTokenizer(str(data_file(VOCABULARY))), train["text"].to_pylist())
        config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **self.size["model"])
        config.num_labels = classes
        tables = [read_table(str(data_file(path)), ["text", "label"]) for path in self.validation]
        evaluated = encode(pyarrow.concat_tables(tables), tokenizer)
        by_length = np.argsort([len(row) for row in evaluated["input_ids"]], kind="stable")
        return {
            "model": BertForSequenceClassification(config),
            "train_dataset": encode(train, tokenizer),
            "eval_dataset": evaluated.select(by_length),
            "processing_class": tokenizer,
            "data_collator": DataCollatorWithPadding(tokenizer),
            "compute_metrics": accuracy,
        }


def without_unused(tokenizer: BertTokenizer, texts: list[str]) -> BertTokenizer:
    """Return the tokenizer with only the special tokens and the pieces in these texts."""
    used = set(tokenizer.all_special_ids).union(*tokenizer(texts)["input_ids"])
    pieces = tokenizer.convert_ids_to_tokens(sorted(used))
    return BertTokenizer({piece: number for number, piece in enumerate(pieces)})


def encode(table: pyarrow.Table, tokenizer: BertTokenizer) -> Dataset:
    """Return examples of at most 128 tokens."""
    texts = table["text"].to_pylist()
    encoded = tokenizer(texts, truncation=True, max_length=128, return_token_type_ids=False)
    return Dataset.from_dict({**encoded, "labels": table["label"].to_pylist()})


LARGE = {
    "train": None,
    "args": {"per_device_train_batch_size": 128, "learning_rate": 3e-4, "bf16": True},
    "model": transformer(256, 1024, 4, 4),
}


@dataclass
class Sst2(TextClassification):
    """Sentiment of film reviews: trained on phrases, evaluated on the 2,693 sentences of validation and test."""

    name = "sst2"
    budget = "24000samples"
    args = TextClassification.args | {"learning_rate": 1e-3}
    train = "text_cls/sst2/train.parquet"
    validation = ("text_cls/sst2/validation.parquet", "text_cls/sst2/test.parquet")
    scales = {
        "cpu": {
            "train": 30000,
            "model": transformer(32, 128, 2, 2) | {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.0},
        },
        "gpu": LARGE | {"budget": "3epochs"},
    }


@dataclass
class Banking77(TextClassification):
    """Intents of a bank's customers: 77 classes, 3,080 texts for validation."""

    name = "banking77"
    budget = "8epochs"
    args = TextClassification.args | {"per_device_train_batch_size": 32, "learning_rate": 1e-3}
    train = "text_cls/banking77/train.parquet"
    validation = ("text_cls/banking77/test.parquet",)
    scales = {
        "cpu": {"train": 3000, "model": transformer(64, 128, 2, 2) | {"attention_probs_dropout_prob": 0.0}},
        "gpu": LARGE | {"budget": "30epochs"},
    }
