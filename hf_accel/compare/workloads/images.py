"""Photographs of 32 x 32 pixels in ten classes, and a residual network or a vision transformer from scratch.

There is no random augmentation: the training set is a fixed choice of images and their mirror images.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

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
from hf_accel.compare.workloads.workload import Workload, sample, transformer

TRAIN, TEST = "image/cifar10/train.parquet", "image/cifar10/test.parquet"
SMALL, WHOLE = {"train": 10000, "validation": 2000}, {"train": None, "validation": None}


@dataclass
class Cifar10(Workload):
    """A fixed choice of CIFAR-10, stored as JPEG files in tables."""

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
    budget = "32000samples"
    files = (TRAIN, TEST)
    packages = {"PIL": "vision"}

    def build(self) -> dict[str, Any]:
        images, labels = decode(TRAIN, self.size["train"])
        return {
            "model": self.model(),
            "train_dataset": TensorDataset(torch.cat([images, images.flip(-1)]), torch.cat([labels, labels])),
            "eval_dataset": TensorDataset(*decode(TEST, self.size["validation"])),
            "data_collator": collate,
            "compute_metrics": accuracy,
        }

    def model(self) -> PreTrainedModel:
        """Return the model at this scale."""
        raise NotImplementedError


def decode(path: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """Return images as bytes (number, channel, row, column), and labels, of a fixed choice of a table's rows."""
    from PIL import Image

    table = sample(path, ["image", "label"], limit)
    images = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in table["image"].to_pylist()])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_pylist())


def collate(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return a batch of images, with mean about 0 and standard deviation about 1, and labels."""
    images, labels = zip(*examples, strict=True)
    return {"pixel_values": (torch.stack(images).float() - 121) / 63, "labels": torch.stack(labels)}


@dataclass
class Cifar10ResNet(Cifar10):
    """A residual network whose first layer suits small images: 3 x 3, without pooling."""

    name = "cifar10-resnet"
    scales = {
        "cpu": SMALL | {"stride": 2, "embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1]},
        "gpu": WHOLE
        | {"stride": 1, "embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
        | {"budget": "10epochs", "args": {"per_device_train_batch_size": 256, "bf16": True}},
    }

    def model(self) -> PreTrainedModel:
        sizes = {name: self.size[name] for name in ("embedding_size", "hidden_sizes", "depths")}
        config = ResNetConfig(layer_type="basic", **sizes)
        config.num_labels = 10
        model = ResNetForImageClassification(config)
        stem: Any = model.resnet.embedder
        stem.embedder = ResNetConvLayer(3, config.embedding_size, kernel_size=3, stride=self.size["stride"])
        stem.pooler = nn.Identity()
        return model


@dataclass
class Cifar10Vit(Cifar10):
    """A vision transformer on patches of 8 x 8 pixels, or of 4 x 4 at the scale ``gpu``."""

    name = "cifar10-vit"
    scales = {
        "cpu": SMALL | {"model": {"patch_size": 8, **transformer(64, 128, 4, 4)}},
        "gpu": WHOLE
        | {"model": {"patch_size": 4, **transformer(384, 1536, 12, 6)}}
        | {"budget": "30epochs", "args": {"per_device_train_batch_size": 256, "learning_rate": 5e-4, "bf16": True}},
    }

    def model(self) -> PreTrainedModel:
        config = ViTConfig(image_size=32, **self.size["model"])
        config.num_labels = 10
        return ViTForImageClassification(config)
