"""Fine-tuning: a pretrained Llama of 260,000 parameters, which knows stories for children, learns to do sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, PreTrainedModel

from hf_accel.compare.workloads.workload import Workload, data_file, sample

TRAIN, TEST, PRETRAINED = "sft/gsm8k/train.parquet", "sft/gsm8k/test.parquet", "pretrained/stories260K"
IGNORED = -100


@dataclass
class Gsm8kSft(Workload):
    """Grade-school mathematics: a question, and the steps to its answer.

    Only the answers have a loss.  Examples longer than the context are left out.  All weights are trained.
    """

    name = "gsm8k-sft"
    budget = "480samples"
    args = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 32,
        "learning_rate": 3e-3,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
    }
    scales = {
        "cpu": {"train": 4000, "context": 256},
        "gpu": {
            "budget": "3epochs",
            "args": {"per_device_train_batch_size": 32, "bf16": True},
            "train": None,
            "context": 512,
        },
    }
    files = (TRAIN, TEST, f"{PRETRAINED}/config.json")

    def build(self) -> dict[str, Any]:
        folder = data_file(PRETRAINED)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        evaluated = encode(TEST, None, tokenizer, self.size["context"])
        by_length = np.argsort([len(row) for row in evaluated["input_ids"]], kind="stable")
        return {
            "model": self.adapted(AutoModelForCausalLM.from_pretrained(folder, use_cache=False)),
            "train_dataset": encode(TRAIN, self.size["train"], tokenizer, self.size["context"]),
            "eval_dataset": evaluated.select(by_length),
            "processing_class": tokenizer,
            "data_collator": DataCollatorForSeq2Seq(tokenizer),
        }

    def adapted(self, model: PreTrainedModel) -> Any:
        """Return the model to train."""
        return model


@dataclass
class Gsm8kLora(Gsm8kSft):
    """The same with frozen weights, and LoRA of rank 8 on all linear layers except the head."""

    name = "gsm8k-lora"
    args = Gsm8kSft.args | {"learning_rate": 1e-2}
    packages = {"peft": "peft"}

    def adapted(self, model: PreTrainedModel) -> Any:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def encode(path: str, limit: int | None, tokenizer: Any, context: int) -> Dataset:
    """Return a fixed choice of a table's examples, without those that do not fit into the context."""
    table = sample(path, ["prompt", "completion"], limit)
    prompts = tokenizer([f"{prompt}\n" for prompt in table["prompt"].to_pylist()])["input_ids"]
    completions = tokenizer(table["completion"].to_pylist(), add_special_tokens=False)["input_ids"]
    rows = [
        {
            "input_ids": [*prompt, *completion, tokenizer.eos_token_id],
            "attention_mask": [1] * (len(prompt) + len(completion) + 1),
            "labels": [IGNORED] * len(prompt) + [*completion, tokenizer.eos_token_id],
        }
        for prompt, completion in zip(prompts, completions, strict=True)
        if len(prompt) + len(completion) < context
    ]
    return Dataset.from_list(rows)
