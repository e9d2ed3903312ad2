"""Make tiny models, examples that they can learn, and trainers, for the contract of techniques."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    WhisperConfig,
    WhisperForAudioClassification,
)

from hf_accel.technique import Technique
from hf_accel.trainer import AccelTrainer, AccelTrainerMixin

__all__ = [
    "EPOCHS",
    "EXAMPLES",
    "PROBES",
    "VOCABULARY",
    "CountingText",
    "Patterns",
    "Probe",
    "again",
    "collate_masked",
    "collate_padded",
    "collate_replaced",
    "collate_stacked",
    "largest_difference",
    "losses_of",
    "modality_of",
    "tiny_bert",
    "tiny_convnext",
    "tiny_larger",
    "tiny_llama",
    "tiny_smaller",
    "tiny_teacher",
    "tiny_tokenizer",
    "tiny_trainer",
    "tiny_whisper",
    "weights_of",
]

VOCABULARY = 48
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
"""Sizes of the tiny models of text."""
EXAMPLES = 64
EPOCHS = 3


class CountingText(Dataset):
    """Sequences of mixed length that count upward modulo the vocabulary; a language model can learn them.

    The model does not see the columns ``label`` (the stride), ``score`` (the start) and ``text``.
    """

    def __init__(self, num_examples: int = EXAMPLES, longest: int = 24, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(3, VOCABULARY, (num_examples,), generator=generator)
        strides = torch.randint(1, 4, (num_examples,), generator=generator)
        lengths = torch.randint(longest // 4, longest + 1, (num_examples,), generator=generator)
        self.rows = [
            ((start + stride * torch.arange(int(length))) % (VOCABULARY - 3) + 3).tolist()
            for start, stride, length in zip(starts, strides, lengths, strict=True)
        ]
        self.labels, self.scores = (strides - 1).tolist(), (starts / VOCABULARY).tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        unseen = {"label": self.labels[index], "score": self.scores[index], "text": " ".join(map(str, row[::2]))}
        return {"input_ids": row, "labels": list(row), **unseen}


def collate_padded(features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad to the longest example; padding has no label."""
    longest = max(len(f["input_ids"]) for f in features)

    def padded(key: str, value: int) -> Tensor:
        return torch.tensor([f[key] + [value] * (longest - len(f[key])) for f in features])

    mask = torch.tensor([[1] * len(f["input_ids"]) + [0] * (longest - len(f["input_ids"])) for f in features])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def _seeded(kind: Any, config: Any, dtype: torch.dtype, seed: int) -> Any:
    """Return a model that depends only on its configuration and the seed; keep the global generator unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).to(dtype)


def tiny_llama(
    dropout: float = 0.1, dtype: torch.dtype = torch.float32, seed: int = 0, tied: bool = False
) -> LlamaForCausalLM:
    """Return a Llama of four blocks and 15,000 parameters from a seed; keep the global generator unchanged."""
    config = LlamaConfig(
        **SIZES,
        num_hidden_layers=4,
        num_key_value_heads=2,
        attention_dropout=dropout,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )
    return _seeded(LlamaForCausalLM, config, dtype, seed)


def tiny_teacher() -> LlamaForCausalLM:
    """Return another model than `tiny_llama`, for the same vocabulary."""
    return tiny_llama(dropout=0.0, seed=1)


def tiny_smaller() -> LlamaForCausalLM:
    """Return a Llama with half the width and depth of `tiny_llama`, and heads of the same size."""
    return _resized_llama(hidden_size=8, intermediate_size=16, num_hidden_layers=2, heads=1)


def tiny_larger() -> LlamaForCausalLM:
    """Return a Llama with twice the width and depth of `tiny_llama`, and heads of the same size."""
    return _resized_llama(hidden_size=32, intermediate_size=64, num_hidden_layers=8, heads=4)


def _resized_llama(heads: int, **sizes: int) -> LlamaForCausalLM:
    config = tiny_llama(dropout=0.0).config
    config.update(sizes | {"num_attention_heads": heads, "num_key_value_heads": heads})
    return _seeded(LlamaForCausalLM, config, torch.float32, seed=1)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of numbers below the vocabulary's size; 0 is padding and 1 is the mask."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="2"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", mask_token="1", unk_token="2")


def collate_masked(features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Collate like `collate_padded`, with fewer words, and masks and labels at every fifth token."""
    batch = collate_padded(features)
    ids_BL, mask_BL = batch["input_ids"], batch["attention_mask"]
    ids_BL = torch.where(mask_BL == 1, ids_BL % 12 + 3, 0)
    masked_BL = (mask_BL == 1) & (torch.arange(ids_BL.shape[1]) % 5 == 0)
    labels_BL = ids_BL.masked_fill(~masked_BL, -100)
    return {"input_ids": ids_BL.masked_fill(masked_BL, 1), "labels": labels_BL, "attention_mask": mask_BL}


def collate_replaced(features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Collate like `collate_masked`, with every fifth token replaced, and labels that mark these tokens."""
    batch = collate_masked(features)
    replaced_BL, mask_BL = batch["labels"] != -100, batch["attention_mask"]
    ids_BL = torch.where(replaced_BL, (batch["labels"] + 20) % VOCABULARY, batch["input_ids"])
    return {
        "input_ids": ids_BL,
        "labels": replaced_BL.long().masked_fill(mask_BL == 0, -100),
        "attention_mask": mask_BL,
    }


def tiny_bert(
    dropout: float = 0.1, dtype: torch.dtype = torch.float32, seed: int = 0, kind: Any = BertForMaskedLM
) -> PreTrainedModel:
    """Return a BERT of two blocks from a seed, with a head for masked tokens or that of ``kind``."""
    config = BertConfig(
        **SIZES,
        num_hidden_layers=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return _seeded(kind, config, dtype, seed)


class Patterns(Dataset):
    """Noisy copies, in [0, 1], of four coarse patterns, which are the classes; a classifier can learn them."""

    def __init__(self, name: str, shape: tuple[int, int, int], num_examples: int, seed: int, dtype: torch.dtype):
        patterns = torch.rand(4, shape[0], 2, 2, generator=torch.Generator().manual_seed(99))
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(4, (num_examples,), generator=generator)
        noise = torch.rand(num_examples, *shape, generator=generator)
        values = 0.7 * F.interpolate(patterns, shape[1:], mode="bilinear")[labels] + 0.3 * noise
        self.rows = [
            {name: value.squeeze(0).to(dtype), "labels": label}
            for value, label in zip(values, labels.tolist(), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def collate_stacked(features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack examples of one shape."""
    return {name: torch.stack([torch.as_tensor(f[name]) for f in features]) for name in features[0]}


def tiny_convnext(dropout: float = 0.1, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Return a ConvNeXt of two blocks for images of any size, from a seed.

    A ViT would not do: a plain Trainer of transformers 5.23 cannot resume models that save weights under other names.
    """
    config = ConvNextConfig(
        num_stages=2,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        patch_size=2,
        drop_path_rate=dropout,
        num_labels=4,  # type: ignore[call-arg]
    )
    return _seeded(ConvNextForImageClassification, config, dtype, seed)


def tiny_whisper(dropout: float = 0.1, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Return a Whisper encoder of two blocks that classifies 40 frames of 8 bands, from a seed."""
    config = WhisperConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=20,
        classifier_proj_size=16,
        dropout=dropout,
        num_labels=4,  # type: ignore[call-arg]
    )
    return _seeded(WhisperForAudioClassification, config, dtype, seed)


class Probe(NamedTuple):
    """Model, examples and collator of one modality, for the contract's runs."""

    model: Callable[[float, torch.dtype], PreTrainedModel]
    examples: Callable[[int, int, torch.dtype], Dataset]
    """Return examples, given their number, a seed and a type."""
    collate: Callable[[Sequence[Any]], dict[str, Tensor]]
    tokenizer: Callable[[], PreTrainedTokenizerFast] | None = None


def _counting_text(number: int, seed: int, dtype: torch.dtype) -> CountingText:
    return CountingText(number, seed=seed)


PROBES = {
    "text": Probe(tiny_llama, _counting_text, collate_padded),
    "masked text": Probe(tiny_bert, _counting_text, collate_masked, tiny_tokenizer),
    "replaced text": Probe(
        functools.partial(tiny_bert, kind=BertForTokenClassification), _counting_text, collate_replaced, tiny_tokenizer
    ),
    "image": Probe(tiny_convnext, functools.partial(Patterns, "pixel_values", (3, 16, 16)), collate_stacked),
    "speech": Probe(tiny_whisper, functools.partial(Patterns, "input_features", (1, 8, 40)), collate_stacked),
}


def modality_of(techniques: Sequence[Technique]) -> str:
    """Return the modality that all techniques can train on."""
    return next((t.modality for t in techniques if t.modality != "text"), "text")


def tiny_trainer(
    techniques: Sequence[Technique],
    directory: str | Path,
    *,
    trainer_class: type[Trainer] = AccelTrainer,
    dropout: float = 0.1,
    dtype: torch.dtype = torch.float32,
    model: torch.nn.Module | None = None,
    micro_batch_size: int | None = None,
    modality: str | None = None,
    **args: Any,
) -> Any:
    """Return a trainer of a modality's probe, for 24 updates of 8 examples; ``args`` are TrainingArguments.

    The default modality is that of the techniques; text is `tiny_llama` on `CountingText`.
    """
    probe = PROBES[modality or modality_of(techniques)]
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "linear",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    hosting: dict[str, Any] = {}
    if issubclass(trainer_class, AccelTrainerMixin):
        sizes = [t.probe_micro_batch_size for t in techniques if t.probe_micro_batch_size is not None]
        if micro_batch_size is None:
            micro_batch_size = min(sizes, default=None)
        hosting = {"techniques": list(techniques), "micro_batch_size": micro_batch_size}
    if probe.tokenizer is not None:
        hosting["processing_class"] = probe.tokenizer()
    schedules = any("schedule" in t.implemented_hooks() for t in techniques)
    if schedules:
        del settings["lr_scheduler_type"]
    trainer = trainer_class(
        model=model or probe.model(dropout, dtype),
        args=TrainingArguments(**(settings | args)),
        train_dataset=probe.examples(EXAMPLES, 0, dtype),
        eval_dataset=probe.examples(16, 1, dtype),
        data_collator=probe.collate,
        **hosting,
    )
    trainer.pop_callback(PrinterCallback)
    return trainer


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """Return a copy of the model's state."""
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def losses_of(trainer: Trainer) -> list[float]:
    """Return the training loss of every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the largest difference between two models' weights, infinite if the shapes differ."""
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a):
        return math.inf
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def again(technique: Technique) -> Technique:
    """Return a new technique with the same hyperparameters."""
    return dataclasses.replace(technique)  # type: ignore[type-var]
