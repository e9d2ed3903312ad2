"""Techniques of the model and of optimization on models that are not their own: each works, or is refused by name."""

import traceback

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PrinterCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_accel import AccelTrainer
from hf_accel.evidence.cards import area
from hf_accel.recipe import known_techniques

KINDS = {name: kind for name, kind in known_techniques().items() if area(kind) in ("model", "optimization")}
IMAGE = 31


class Net(nn.Module):
    """A module that is no model of transformers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 16, batch_first=True) for _ in range(3)])
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids, labels=None):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def example_loss(outputs, inputs):
    return nn.functional.cross_entropy(outputs["logits"], inputs["labels"], reduction="none")


def plain():
    data = [{"input_ids": [5, i % 40 + 3, 7], "labels": i % 2} for i in range(16)]
    return Net(), data, default_data_collator, {"example_loss_func": example_loss}


def llava():
    """Rows with none to two images."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    text = LlamaConfig(**sizes, vocab_size=32)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE))
    data = [
        {"input_ids": [1, 5] + [IMAGE] * 4 * (i % 3) + [7 + i % 9] * 6, "images": torch.randn(i % 3, 3, 8, 8)}
        for i in range(16)
    ]
    return model, data, collate_images, {}


def collate_images(rows):
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], True)
    mask = (ids != 0).long()
    images = torch.cat([row["images"] for row in rows])
    labels = ids.masked_fill((mask == 0) | (ids == IMAGE), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels} | (
        {"pixel_values": images} if len(images) else {}
    )


@pytest.mark.parametrize("make", [plain, pytest.param(llava, marks=pytest.mark.full)], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", KINDS)
def test_it_works_or_is_refused_before_the_first_step(name, make, tmp_path):
    torch.manual_seed(0)
    model, data, collate, hosting = make()
    args = TrainingArguments(
        tmp_path, per_device_train_batch_size=4, max_steps=3, save_strategy="steps", save_steps=3, report_to=[],
        disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    technique = KINDS[name](**KINDS[name].probe_fields)
    steps = 0
    try:
        trainer = AccelTrainer(
            model=model, args=args, train_dataset=data, data_collator=collate, techniques=[technique], **hosting
        )
        trainer.pop_callback(PrinterCallback)
        trainer.train()
    except ValueError as error:
        if "trainer" in locals():
            steps = trainer.state.global_step
        assert steps == 0 and "/hf_accel/" in traceback.extract_tb(error.__traceback__)[-1].filename, error
        assert type(technique).__name__ in str(error)
    else:
        assert trainer.state.global_step == 3
