from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("kornia", reason="RandAugment needs kornia (pip install 'hf-accel[vision]')")
Image = pytest.importorskip("PIL.Image", reason="the oracle is Pillow")
from PIL import ImageEnhance, ImageOps  # noqa: E402

from hf_accel import RandAugment  # noqa: E402
from hf_accel.batch import MicroBatch, StepBatch, StepPlan  # noqa: E402
from hf_accel.data.regularization.rand_augment import NAMES, operations  # noqa: E402
from hf_accel.testing import tiny_convnext, tiny_trainer  # noqa: E402

BILINEAR = Image.Resampling.BILINEAR


def affine(a, b, c, d, e, f):
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), BILINEAR)


ORACLES = {
    "nothing": lambda s: lambda image: image,
    "autocontrast": lambda s: ImageOps.autocontrast,
    "equalize": lambda s: ImageOps.equalize,
    "rotate": lambda s: lambda image: image.rotate(30 * s, BILINEAR),
    "shear_x": lambda s: affine(1, -0.3 * s, 0, 0, 1, 0),
    "shear_y": lambda s: affine(1, 0, 0, -0.3 * s, 1, 0),
    "shift_x": lambda s: affine(1, 0, -0.45 * s * 40, 0, 1, 0),
    "shift_y": lambda s: affine(1, 0, 0, 0, 1, -0.45 * s * 32),
    "solarize": lambda s: lambda image: ImageOps.solarize(image, 255 * (1 - abs(s))),
    "posterize": lambda s: lambda image: ImageOps.posterize(image, 8 - round(4 * abs(s))),
    "color": lambda s: lambda image: ImageEnhance.Color(image).enhance(1 + 0.9 * s),
    "contrast": lambda s: lambda image: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s),
    "brightness": lambda s: lambda image: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s),
    "sharpness": lambda s: lambda image: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s),
}


def smooth_images():
    coarse = torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, (32, 40), mode="bicubic").clamp(0, 1) * 0.8
    return (images * 255).round() / 255


@pytest.mark.parametrize("name", NAMES)
def test_each_operation_is_pillows(name):
    """In the inner part, and on the average over it, as borders and half pixels are rounded in different ways."""
    images, strengths = smooth_images(), torch.tensor([0.3, -0.6, 0.9])
    found = operations()[name](images, strengths)
    for i, strength in enumerate(strengths.tolist()):
        given = Image.fromarray((images[i] * 255).round().byte().permute(1, 2, 0).numpy())
        expected = torch.from_numpy(np.array(ORACLES[name](strength)(given))).permute(2, 0, 1) / 255
        assert (found[i] - expected)[:, 2:-2, 2:-2].abs().mean() < 0.03
        if name != "nothing":
            assert (expected - images[i]).abs().mean() > 0.001 or name == "sharpness"
    assert set(ORACLES) == set(NAMES)


def started(progress=1.0, processing_class=None, **fields):
    technique = RandAugment(**fields)
    technique.run_ = SimpleNamespace(
        clock=SimpleNamespace(progress=progress), args=SimpleNamespace(device=torch.device("cpu"))
    )
    technique.on_train_begin(None, None, None, model=tiny_convnext(), processing_class=processing_class)
    return technique


def changed(technique, images, ids, epoch=0):
    ids = torch.tensor(ids)
    batch = StepBatch(StepPlan(epoch, ids, None, 8), [MicroBatch({"pixel_values": images}, ids, None)])
    return technique.transform_batch(batch).micro_batches[0].inputs["pixel_values"]


def test_an_image_depends_on_its_own_key_alone():
    images, technique = smooth_images(), started()
    together = changed(technique, images, [4, 5, 6])
    for i in range(3):
        assert torch.allclose(changed(technique, images[i : i + 1], [4 + i])[0], together[i], atol=1e-6)
    assert not torch.allclose(changed(technique, images, [4, 5, 6], epoch=1), together, atol=1e-3)
    assert technique.report()["changes"] == pytest.approx(2 * 13 / 14, abs=0.6)


def test_normalized_images_are_changed_as_they_were_before():
    images, mean, std = smooth_images(), [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    shape = (3, 1, 1)
    normalized = (images - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    processor = SimpleNamespace(do_normalize=True, image_mean=mean, image_std=std)
    found = changed(started(processing_class=processor), normalized, [1, 2, 3])
    expected = changed(started(), images, [1, 2, 3])
    found = found * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    assert (found - expected).abs().mean() < 0.01  # a pixel may fall on the other side of a threshold
    with pytest.raises(ValueError, match=r"needs pixel_values in \[0, 1\] before normalization. Set processing_class="):
        changed(started(), normalized, [1, 2, 3])


def test_strength_zero_leaves_what_has_a_strength():
    images = smooth_images()
    for name in NAMES:
        if name not in ("autocontrast", "equalize"):
            assert torch.allclose(operations()[name](images, torch.zeros(3)), images, atol=1e-4), name


def test_text_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"RandAugment\(.*LlamaForCausalLM because it reads input_ids, not pixel_values"
    ):
        tiny_trainer([RandAugment()], tmp_path, modality="text").train()
