"""Ten kinds of objects on photographs of 32 x 32 pixels, and a residual network or a vision transformer from scratch.

There is no random augmentation: the training set is a fixed choice of images and their mirror images.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.resnet.modeling_resnet import ResNetConvLayer

from hf_accel.compare.workloads.digits import accuracy
from hf_accel.compare.workloads.workload import Workload, data_file, missing_file, missing_package
from hf_accel.tasks.files import read_table

FOLDER = ("image", "cifar10")


@dataclass
class Cifar10(Workload):
    """CIFAR-10 as JPEG files in tables; a fixed choice of them."""

    args = {
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 256,
        "learning_rate": 3e-3,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.05,
        "max_grad_norm": 1.0,
        "remove_unused_columns": False,
    }

    def missing(self) -> str | None:
        files = [missing_file(*FOLDER, name) for name in ("train.parquet", "test.parquet")]
        return missing_package("PIL", "vision") or next(filter(None, files), None)

    def build(self) -> dict[str, Any]:
        images, labels = decode("train.parquet", self.size["train"])
        return {
            "model": self.model(),
            "train_dataset": TensorDataset(torch.cat([images, images.flip(-1)]), torch.cat([labels, labels])),
            "eval_dataset": TensorDataset(*decode("test.parquet", self.size["validation"])),
            "data_collator": collate,
            "compute_metrics": accuracy,
        }

    def model(self) -> PreTrainedModel:
        """The model at this scale."""
        raise NotImplementedError


def decode(name: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """Images of bytes, (number, channel, row, column), and labels of a fixed choice of a table's rows."""
    from PIL import Image

    table = read_table(str(data_file(*FOLDER, name)), ["image", "label"])
    table = table.take(np.random.default_rng(0).permutation(len(table))[:limit])
    images = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in table["image"].to_pylist()])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_pylist())


def collate(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch of images, of mean about 0 and deviation about 1, and labels."""
    images, labels = zip(*examples, strict=True)
    return {"pixel_values": (torch.stack(images).float() - 121) / 63, "labels": torch.stack(labels)}


@dataclass
class Cifar10ResNet(Cifar10):
    """A residual network whose first layer is that for small images: 3 x 3, without pooling."""

    name = "cifar10-resnet"
    budget = "32000samples"
    scales: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": {
            "train": 10000,
            "validation": 2000,
            "stride": 2,
            "model": {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1]},
        },
        "gpu": {
            "budget": "10epochs",
            "train": None,
            "validation": None,
            "stride": 1,
            "args": {"per_device_train_batch_size": 256, "bf16": True},
            "model": {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
        },
    }

    def model(self) -> PreTrainedModel:
        config = ResNetConfig(layer_type="basic", **self.size["model"])
        config.num_labels = 10
        model = ResNetForImageClassification(config)
        stem: Any = model.resnet.embedder
        stem.embedder = ResNetConvLayer(3, config.embedding_size, kernel_size=3, stride=self.size["stride"])
        stem.pooler = nn.Identity()
        return model


@dataclass
class Cifar10Vit(Cifar10):
    """A vision transformer that reads patches of 8 x 8 pixels, at scale ``gpu`` of 4 x 4."""

    name = "cifar10-vit"
    budget = "32000samples"
    scales: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": {
            "train": 10000,
            "validation": 2000,
            "model": {
                "patch_size": 8,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
            },
        },
        "gpu": {
            "budget": "30epochs",
            "train": None,
            "validation": None,
            "args": {"per_device_train_batch_size": 256, "learning_rate": 5e-4, "bf16": True},
            "model": {
                "patch_size": 4,
                "hidden_size": 384,
                "intermediate_size": 1536,
                "num_hidden_layers": 12,
                "num_attention_heads": 6,
            },
        },
    }

    def model(self) -> PreTrainedModel:
        config = ViTConfig(image_size=32, **self.size["model"])
        config.num_labels = 10
        return ViTForImageClassification(config)
