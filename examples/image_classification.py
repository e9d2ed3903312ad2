"""A vision transformer from scratch: small images first, mixed in pairs.

python examples/image_classification.py
python examples/image_classification.py --dataset uoft-cs/cifar10 --image img --label label

Needs: pip install -c constraints.txt -e '.[compare,vision]'
"""

import argparse

import datasets
import numpy as np
import torch
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hf_accel import AccelTrainer, Budget, ExponentialMovingAverage, Mixup

parser = argparse.ArgumentParser()
parser.add_argument("--dataset", help="of the Hub; without one, the handwritten digits of scikit-learn")
parser.add_argument("--image", default="image", help="its column of images, all of one size")
parser.add_argument("--label", default="label", help="its column of labels")
options = parser.parse_args()

set_seed(0)
if options.dataset is None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images, channels = (pixels / 8 - 1).reshape(-1, 1, 8, 8), 1
else:
    rows = datasets.load_dataset(options.dataset, split="train")
    labels, channels = rows[options.label], 3
    images = np.stack([np.asarray(image.convert("RGB")) for image in rows[options.image]]) / 127.5 - 1
    images = images.transpose(0, 3, 1, 2)
examples = [
    {"pixel_values": torch.tensor(image, dtype=torch.float32), "labels": int(label)}
    for image, label in zip(images, labels, strict=True)
]
np.random.default_rng(0).shuffle(examples)
held_out = len(examples) // 10
config = ViTConfig(
    image_size=images.shape[-1],
    patch_size=2,
    num_channels=channels,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_labels=len(set(map(int, labels))),
)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


trainer = AccelTrainer(
    model=ViTForImageClassification(config),
    args=TrainingArguments(
        "accel_images", per_device_train_batch_size=64, learning_rate=2e-3, save_strategy="no", report_to="none"
    ),
    train_dataset=examples[held_out:],
    eval_dataset=examples[:held_out],
    compute_metrics=accuracy,
    techniques=[Budget("6epochs"), Mixup(), ExponentialMovingAverage(half_life=20)],
)
trainer.train()
print(trainer.evaluate())
