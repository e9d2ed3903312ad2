"""Handwritten digits of 8 x 8 pixels, which come with scikit-learn, and a small vision transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset
from transformers import EvalPrediction, ViTConfig, ViTForImageClassification

from hf_accel.compare.workloads.workload import Workload, transformer


@dataclass
class Digits(Workload):
    """1,347 training and 450 validation images, in a fixed random order."""

    name = "digits"
    budget = "15epochs"
    args = {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 450,
        "learning_rate": 2e-3,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.05,
        "remove_unused_columns": False,
    }
    packages = {"sklearn": "compare"}

    def build(self) -> dict[str, Any]:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        images = torch.tensor(pixels[order] / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
        targets = torch.tensor(labels[order])
        config = ViTConfig(
            image_size=8, patch_size=2, num_channels=1, hidden_dropout_prob=0.1, **transformer(64, 128, 4, 4)
        )
        config.num_labels = 10
        return {
            "model": ViTForImageClassification(config),
            "train_dataset": TensorDataset(images[450:], targets[450:]),
            "eval_dataset": TensorDataset(images[:450], targets[:450]),
            "data_collator": collate,
            "compute_metrics": accuracy,
        }


def collate(examples: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return a batch of images and labels."""
    images, labels = zip(*examples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of images that are classified correctly."""
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}
