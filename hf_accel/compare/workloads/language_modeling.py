"""Language models from scratch: a small Llama learns bytes, of Python's standard library or of English novels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hf_accel.compare.workloads.workload import Workload, data_file, missing_file
from hf_accel.recipe import Recipe
from hf_accel.tasks import build_task


@dataclass
class CodeLm(Workload):
    """Python's own standard library, byte by byte: every machine has it."""

    name = "code-lm"
    budget = "2400samples"
    args = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 32,
        "learning_rate": 2e-3,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
    }
    scales: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": {
            "context": 128,
            "validation_limit": 256,
            "model": {
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "max_position_embeddings": 128,
            },
        },
        "gpu": {
            "budget": "96000samples",
            "args": {"per_device_train_batch_size": 32, "learning_rate": 1e-3, "bf16": True},
            "context": 512,
            "validation_limit": 1024,
            "model": {
                "hidden_size": 512,
                "intermediate_size": 1408,
                "num_hidden_layers": 8,
                "num_attention_heads": 8,
                "max_position_embeddings": 512,
            },
        },
    }

    def data(self) -> dict[str, Any]:
        """Where the texts are."""
        return {"source": "stdlib"}

    def build(self) -> dict[str, Any]:
        data = self.data() | {name: self.size[name] for name in ("context", "validation_limit")}
        model = {"config": {"model_type": "llama", "tie_word_embeddings": True, **self.size["model"]}}
        return build_task(Recipe(task="causal-lm", model=model, data=data))


@dataclass
class NovelsLm(CodeLm):
    """English novels of 1811 to 1902, split by book."""

    name = "novels-lm"
    folder: ClassVar[tuple[str, ...]] = ("lm", "gutenberg_novels")

    def missing(self) -> str | None:
        return missing_file(*self.folder, "train.txt.gz")

    def data(self) -> dict[str, Any]:
        return {
            "source": str(data_file(*self.folder, "train.txt.gz")),
            "validation": str(data_file(*self.folder, "validation.txt.gz")),
        }
