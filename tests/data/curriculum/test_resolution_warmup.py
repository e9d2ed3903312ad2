from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_accel import ResolutionWarmup
from hf_accel.batch import MicroBatch, StepBatch, StepPlan
from hf_accel.data.curriculum.resolution_warmup import scale_at
from hf_accel.testing import tiny_trainer

SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


def vit(**options):
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=48, patch_size=8, **options)).eval()


def started(model, progress=0.0, **fields):
    technique = ResolutionWarmup(**fields)
    technique.run_ = SimpleNamespace(
        clock=SimpleNamespace(progress=progress), args=SimpleNamespace(device=torch.device("cpu"))
    )
    technique.on_train_begin(None, None, None, model=model)
    return technique


def resized(technique, images):
    ids = torch.arange(len(images))
    batch = StepBatch(StepPlan(0, ids, None, 8), [MicroBatch({"pixel_values": images, "labels": ids}, ids, None)])
    return technique.transform_batch(batch).micro_batches[0].inputs


def test_the_scale_follows_the_equation():
    for i in range(101):
        risen = max(Fraction(i, 100) - Fraction(2, 10), 0) / Fraction(5, 10)
        expected = min(Fraction(1, 4) + Fraction(3, 4) * risen, 1)
        assert scale_at(i / 100, start=0.25, delay=0.2, end=0.7) == pytest.approx(float(expected), rel=1e-12)
    assert scale_at(0.0, start=0.5, delay=0.0, end=1.0) == 0.5
    assert scale_at(0.6, start=0.5, delay=0.9, end=0.5) == 1.0


def test_sizes_are_multiples_and_images_are_resized():
    image = pytest.importorskip("PIL.Image", reason="the oracle is Pillow")
    technique = started(vit(), multiple=12)  # with patches of 8: 24
    pixels = torch.rand(2, 3, 48, 96, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.avg_pool2d(pixels, 5, 1, 2)
    images = (images * 255).round() / 255
    inputs = resized(technique, images)
    assert inputs["pixel_values"].shape == (2, 3, 24, 48) and inputs["interpolate_pos_encoding"] is True
    for i in range(2):
        given = image.fromarray((images[i] * 255).byte().permute(1, 2, 0).numpy())
        expected = np.array(given.resize((48, 24), image.Resampling.BILINEAR))
        found = inputs["pixel_values"][i].permute(1, 2, 0) * 255
        assert (found - torch.from_numpy(expected)).abs().max() < 1.5
    technique.run_.clock.progress = 0.8
    inputs = resized(technique, images)
    assert inputs["pixel_values"] is images and "interpolate_pos_encoding" not in inputs
    assert technique.report() == {"pixels": pytest.approx((0.25 + 1) / 2)}


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_models_read_the_small_images(kind):
    model = vit()
    if kind == "resnet":
        sizes = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        model = ResNetForImageClassification(ResNetConfig(**sizes)).eval()
    inputs = resized(started(model), torch.rand(2, 3, 48, 48))
    assert model(**inputs).logits.shape == (2, 2)
    assert ("interpolate_pos_encoding" in inputs) == (kind == "vit")


def test_models_of_one_size_are_refused(tmp_path):
    vision = dict(SMALL, image_size=16, patch_size=4)
    clip = CLIPForImageClassification(CLIPConfig(vision_config=vision, text_config=dict(SMALL, vocab_size=20)))
    with pytest.raises(ValueError, match="CLIPForImageClassification because .*position.* forward takes no interp"):
        started(clip)
    with pytest.raises(
        ValueError, match=r"ResolutionWarmup\(.*LlamaForCausalLM because it reads input_ids, not pixel_values"
    ):
        tiny_trainer([ResolutionWarmup()], tmp_path, modality="text").train()
    with pytest.raises(ValueError, match="does not support pixel_values of"):
        resized(started(vit()), torch.rand(2, 4, 3, 48, 48))


def test_a_vit_trains_on_growing_images(tmp_path):
    sizes = []
    model = ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=4))
    trainer = tiny_trainer([ResolutionWarmup(delay=0.0, end=0.75)], tmp_path, model=model, max_steps=4)
    model.register_forward_pre_hook(
        lambda module, _, inputs: sizes.append(inputs["pixel_values"].shape[-1]) if module.training else None,
        with_kwargs=True,
    )
    trainer.train()
    assert sizes == [8, 12, 16, 16]  # 8, 10.7 and 13.3 in patches of 4
