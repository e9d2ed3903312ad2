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
    budget = "4800samples"
    args = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 32,
        "learning_rate": 3e-3,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
    }
    size: ClassVar[dict[str, Any]] = {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }

    def data(self) -> dict[str, Any]:
        """Where the texts are."""
        return {"source": "stdlib"}

    def build(self) -> dict[str, Any]:
        data = self.data() | {"context": 128, "validation_limit": 256}
        return build_task(Recipe(task="causal-lm", model={"config": self.size}, data=data))


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
