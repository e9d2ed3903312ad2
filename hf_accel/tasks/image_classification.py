"""Classification of images: a table with image files and labels, or a folder with a folder of images per class."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import annotated_types as at
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, ViTImageProcessor
from transformers.models.auto.image_processing_auto import get_image_processor_config

from hf_accel.recipe import RecipeError, check_fields
from hf_accel.tasks.files import existing, read_table
from hf_accel.tasks.models import load_model
from hf_accel.tasks.sequence_classification import accuracy, numbered


@dataclass
class ImageData:
    """Describe the images and their labels.

    Args:
        train: Table of the training examples, or a folder with a folder of images for each class.
        validation: The same for validation.
        image_column: Column of the image files, as bytes.
        label_column: Column of the labels, numbers or names.
        size: Height and width of the model's input, in pixels.
    """

    train: str
    validation: str
    image_column: str = "image"
    label_column: str = "label"
    size: Annotated[int, at.Ge(8)] = 224


class Images(Dataset):
    """Pairs of an image, (C, H, W), and the number of its class; files are read on access.

    ``mean`` and ``std`` have one entry per channel, for values in [0, 1].
    """

    def __init__(
        self, files: list[bytes | Path], classes: list[int], size: int, mean: Sequence[float], std: Sequence[float]
    ):
        self.files, self.classes, self.size = files, classes, size
        self.mean_C11, self.std_C11 = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        file = self.files[index]
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
            image = opened.convert("RGB")
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return (values / 255 - self.mean_C11) / self.std_C11, self.classes[index]


def image_classification(model: str | dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Build the model, data, collator and accuracy for the classification of images."""
    try:
        from PIL import Image
    except ImportError:
        message = "task('image-classification'): needs pillow. Install it with: pip install 'hf-accel[vision]'."
        raise RecipeError(message) from None
    check_fields("data", data, ImageData)
    for key in ("train", "validation"):
        if key not in data:
            raise RecipeError(f"data: {key!r} is missing. Name the file or folder of the {key} examples.")
    options = ImageData(**data)
    sources = (options.train, options.validation)
    files, labels = zip(*(read_images(source, options) for source in sources), strict=True)
    classes, names = numbered(dict(zip(sources, labels, strict=True)), options.train)
    path = model if isinstance(model, str) else model.get("path")
    if path is None:
        names["image_size"] = options.size
    loaded = load_model(AutoModelForImageClassification, model, None, ignore_mismatched_sizes=True, **names)
    saved = {} if path is None else get_image_processor_config(path)
    mean, std = (np.broadcast_to(saved.get(f"image_{name}", 0.5), 3).tolist() for name in ("mean", "std"))
    return {
        "model": loaded,  # a head for other classes is replaced by a new one
        "processing_class": ViTImageProcessor(
            size={"height": options.size, "width": options.size},
            resample=Image.Resampling.BICUBIC,
            image_mean=mean,  # as in pretraining
            image_std=std,
        ),
        "train_dataset": Images(files[0], classes[options.train], options.size, mean, std),
        "eval_dataset": Images(files[1], classes[options.validation], options.size, mean, std),
        "data_collator": collate,
        "compute_metrics": accuracy,
    }


def read_images(source: str, options: ImageData) -> tuple[list[bytes | Path], list[Any]]:
    """Read the image files and their labels."""
    if existing(source).is_dir():
        paths = sorted(path for path in existing(source).glob("*/*") if path.is_file())
        if not paths:
            raise RecipeError(f"data({source!r}): the folder has no folders of images. Make one for each class.")
        return list(paths), [path.parent.name for path in paths]
    table = read_table(source, [options.image_column, options.label_column])
    files = [row["bytes"] if isinstance(row, dict) else row for row in table[options.image_column].to_pylist()]
    if not all(isinstance(file, bytes) for file in files):
        raise RecipeError(f"data({source!r}): {options.image_column!r} holds no image files. Name another column.")
    return files, table[options.label_column].to_pylist()


def collate(examples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Stack images and classes into a batch."""
    images, classes = zip(*examples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(classes)}
