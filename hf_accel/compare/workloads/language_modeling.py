"""Language models from scratch: a small Llama learns bytes, of Python's standard library or of English novels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_accel.compare.workloads.workload import Workload, data_file, transformer
from hf_accel.recipe import Recipe
from hf_accel.tasks import build_task

TRAIN, VALIDATION = "lm/gutenberg_novels/train.txt.gz", "lm/gutenberg_novels/validation.txt.gz"


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
    scales = {
        "cpu": {"context": 128, "validation_limit": 256, "model": transformer(128, 384, 4, 4)},
        "gpu": {
            "budget": "96000samples",
            "args": {"per_device_train_batch_size": 32, "learning_rate": 1e-3, "bf16": True},
            "context": 512,
            "validation_limit": 1024,
            "model": transformer(512, 1408, 8, 8),
        },
    }

    def data(self) -> dict[str, Any]:
        """Return where the texts are."""
        return {"source": "stdlib"}

    def build(self) -> dict[str, Any]:
        data = self.data() | {name: self.size[name] for name in ("context", "validation_limit")}
        sizes = self.size["model"] | {"max_position_embeddings": self.size["context"]}
        model = {"config": {"model_type": "llama", "tie_word_embeddings": True, **sizes}}
        return build_task(Recipe(task="causal-lm", model=model, data=data))


@dataclass
class NovelsLm(CodeLm):
    """English novels of 1811 to 1902, split by book."""

    name = "novels-lm"
    files = (TRAIN,)

    def data(self) -> dict[str, Any]:
        return {"source": str(data_file(TRAIN)), "validation": str(data_file(VALIDATION))}
