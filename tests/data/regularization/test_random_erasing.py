import zlib

import numpy as np
import pytest
import torch

from hf_accel import RandomErasing
from hf_accel.data.regularization.random_erasing import blank, draw_rectangle
from hf_accel.testing import tiny_trainer


def test_blanking_is_a_loop():
    images, boxes = torch.rand(3, 2, 5, 6), [(1, 4, 0, 2), None, (0, 5, 0, 6)]
    erased = blank(images, boxes)
    for i, box in enumerate(boxes):
        for channel in range(2):
            mean = float(sum(images[i, channel].flatten().tolist()) / 30)
            for y in range(5):
                for x in range(6):
                    inside = box is not None and box[0] <= y < box[1] and box[2] <= x < box[3]
                    expected = mean if inside else float(images[i, channel, y, x])
                    assert erased[i, channel, y, x].item() == pytest.approx(expected, rel=1e-5)


def test_rectangles_have_the_drawn_areas_shapes_and_frequency():
    generator = np.random.default_rng(0)
    drawn = [draw_rectangle(generator, 0.3, 0.2, 200, 240) for _ in range(5000)]
    boxes = [box for box in drawn if box is not None]
    assert len(boxes) / 5000 == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 5000) ** 0.5)
    areas = [(b - t) * (r - left) / 48000 for t, b, left, r in boxes]
    ratios = [(b - t) / (r - left) for t, b, left, r in boxes]
    assert 0.018 < min(areas) < 0.03 and 0.19 < max(areas) < 0.203
    assert 0.28 < min(ratios) < 0.4 and 3 < max(ratios) < 3.5
    assert all(0 <= t < b <= 200 and 0 <= left < r <= 240 for t, b, left, r in boxes)
    tops = [t / (200 - (b - t)) for t, b, *_ in boxes if b - t < 200]
    assert np.mean(tops) == pytest.approx(0.5, abs=4 * (1 / 12 / len(tops)) ** 0.5 + 0.01)
    assert draw_rectangle(generator, 0.0, 0.2, 200, 240) is None


def test_images_are_erased_by_seed_epoch_and_example(tmp_path):
    """What the model sees is what a loop over the examples draws."""
    trainer = tiny_trainer([RandomErasing(probability=0.7, ramp=0.4)], tmp_path, micro_batch_size=3, max_steps=10)
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, _, inputs: seen.append(inputs["pixel_values"]) if module.training else None, with_kwargs=True
    )
    trainer.train()
    data = trainer.train_dataset
    steps = torch.cat(seen).split(8)
    for step, epoch, progress in ((0, 0, 0.0), (1, 0, 0.1), (9, 1, 0.9)):
        ids = torch.randperm(64, generator=torch.Generator().manual_seed(7 + epoch)).split(8)[step % 8]
        for i, image in zip(ids.tolist(), steps[step], strict=True):
            generator = np.random.default_rng((7, epoch, i, zlib.crc32(b"RandomErasing")))
            box = draw_rectangle(generator, 0.7 * min(progress / 0.4, 1), 0.4, 16, 16)
            assert torch.equal(image, blank(data[i]["pixel_values"][None], [box])[0])
    assert 0 < trainer.receipt.techniques[0]["report"]["erased"] < 0.7


def test_text_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"RandomErasing\(.*LlamaForCausalLM because it reads input_ids, not pixel_values"
    ):
        tiny_trainer([RandomErasing()], tmp_path, modality="text").train()
