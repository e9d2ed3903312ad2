"""Classification of short texts by a small BERT from scratch: sentiment of film reviews, intents of bank customers.

The tokenizer is BERT's, without the pieces that no training text uses: their embeddings would never be trained, and an
optimizer that passes over 30,522 rows at every step would be most of the cost of models of this size.  Training texts
are cut into the same pieces as with the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, DataCollatorWithPadding

from hf_accel.compare.workloads.workload import Workload, data_file, missing_file
from hf_accel.tasks.files import read_table
from hf_accel.tasks.sequence_classification import accuracy

VOCABULARY = ("tokenizer", "bert-base-uncased", "vocab.txt")


@dataclass
class TextClassification(Workload):
    """Texts and labels in tables: a fixed choice of the training texts, all texts for validation."""

    folder: ClassVar[tuple[str, ...]]
    validation: ClassVar[tuple[str, ...]]
    """Tables that the evaluation reads."""

    args = {
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 128,
        "learning_rate": 2e-3,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
    }

    def missing(self) -> str | None:
        tables = [(*self.folder, name) for name in ("train.parquet", *self.validation)]
        return next(filter(None, (missing_file(*file) for file in [VOCABULARY, *tables])), None)

    def read(self, *names: str) -> pyarrow.Table:
        """Texts and labels of tables."""
        return pyarrow.concat_tables(
            read_table(str(data_file(*self.folder, name)), ["text", "label"]) for name in names
        )

    def build(self) -> dict[str, Any]:
        train, validation = self.read("train.parquet"), self.read(*self.validation)
        classes = len(train["label"].unique())
        train = train.take(np.random.default_rng(0).permutation(len(train))[: self.size["train"]])
        tokenizer = without_unused(BertTokenizer(str(data_file(*VOCABULARY))), train["text"].to_pylist())
        config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **self.size["model"])
        config.num_labels = classes
        evaluated = encode(validation, tokenizer)
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
    """The tokenizer of the special tokens and of the pieces in these texts."""
    used = set(tokenizer.all_special_ids).union(*tokenizer(texts)["input_ids"])
    pieces = tokenizer.convert_ids_to_tokens(sorted(used))
    return BertTokenizer({piece: number for number, piece in enumerate(pieces)})


def encode(table: pyarrow.Table, tokenizer: BertTokenizer) -> Dataset:
    """Examples of at most 128 tokens."""
    texts = table["text"].to_pylist()
    encoded = tokenizer(texts, truncation=True, max_length=128, return_token_type_ids=False)
    return Dataset.from_dict({**encoded, "labels": table["label"].to_pylist()})


@dataclass
class Sst2(TextClassification):
    """Sentiment of film reviews: trained on phrases, evaluated on the 2,693 sentences of validation and test."""

    name = "sst2"
    budget = "24000samples"
    args = TextClassification.args | {"learning_rate": 1e-3}
    folder = ("text_cls", "sst2")
    validation = ("validation.parquet", "test.parquet")
    scales = {
        "cpu": {
            "train": 30000,
            "model": {
                "hidden_size": 32,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "hidden_dropout_prob": 0.3,
                "attention_probs_dropout_prob": 0.0,
            },
        },
        "gpu": {
            "budget": "3epochs",
            "train": None,
            "args": {"per_device_train_batch_size": 128, "learning_rate": 3e-4, "bf16": True},
            "model": {
                "hidden_size": 256,
                "intermediate_size": 1024,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
            },
        },
    }


@dataclass
class Banking77(TextClassification):
    """What customers of a bank want: 77 intents, 3,080 texts for validation."""

    name = "banking77"
    budget = "8epochs"
    args = TextClassification.args | {"per_device_train_batch_size": 32, "learning_rate": 1e-3}
    folder = ("text_cls", "banking77")
    validation = ("test.parquet",)
    scales = {
        "cpu": {
            "train": 3000,
            "model": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "attention_probs_dropout_prob": 0.0,
            },
        },
        "gpu": {
            "budget": "30epochs",
            "train": None,
            "args": Sst2.scales["gpu"]["args"],
            "model": Sst2.scales["gpu"]["model"],
        },
    }
