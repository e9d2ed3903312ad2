"""NoiseScaleRamp: how far a noise scale lets the batch grow, and a run that grows with what it measures."""

import math
import re

import pytest
import torch

from hf_accel import NoiseScaleRamp
from hf_accel.optim.large_batch.noise_scale_ramp import doublings
from hf_accel.testing import tiny_trainer


@pytest.mark.parametrize("factor", [1, 2, 7, 8])
@pytest.mark.parametrize("scale", [0.0, 1.0, 11.3, 11.4, 16.0, 22.0, 23.0, 33.0, 1e9])
def test_the_batch_is_the_nearest_that_is_allowed(scale, factor):
    sizes = {k: 8 * 2**k for k in range(10) if 2**k <= factor}
    nearest = min(sizes, key=lambda k: max(sizes[k] / max(scale, 8), max(scale, 8) / sizes[k]))
    assert doublings(scale, 8, factor) == nearest


def test_it_waits_until_it_knows_and_never_shrinks():
    technique = NoiseScaleRamp(factor=8)
    technique.doublings_ = 0
    sizes = []
    for scale, number in [(90.0, 9), (12.0, 10), (90.0, 11), (3.0, 12), (-1.0, 13), (1e6, 14), (1.0, 15)]:
        technique.means_ = torch.tensor([math.copysign(1.0, scale), abs(scale), number])
        sizes.append(technique.batch(torch.arange(1000), 8))
    assert sizes == [8, 16, 64, 64, 64, 64, 64]


def test_a_run_grows_as_far_as_it_measured(tmp_path):
    technique = NoiseScaleRamp(half_life=5.0, factor=4)
    trainer = tiny_trainer([technique], tmp_path, num_train_epochs=6)
    seen, draw = [], technique.transform_batch

    def record(batch):
        seen.append((batch.num_examples, technique.noise_scale(), int(technique.means_[2])))
        return draw(batch)

    technique.transform_batch = record
    trainer.train()
    expected, largest = [], 8
    for _, scale, number in seen:
        if number >= 10 and scale is not None and math.isfinite(scale):
            while largest < 32 and 2**0.5 * largest < scale:
                largest *= 2
        expected.append(largest)
    last_of_epoch = {i for i in range(len(seen)) if sum(n for n, *_ in seen[: i + 1]) % 64 == 0}
    assert all(n == e or i in last_of_epoch for i, ((n, *_), e) in enumerate(zip(seen, expected, strict=True)))
    assert sum(n for n, *_ in seen) == 6 * 64 and expected[-1] > 8
    report = trainer.receipt.techniques[0]["report"]
    assert report["mean_batch"] == pytest.approx(6 * 64 / len(seen)) and report["last_batch"] == expected[-1]


def test_one_micro_batch_a_step_is_refused(tmp_path):
    sentence = f"{NoiseScaleRamp()!r}: a step of 8 examples is one micro-batch, so its noise cannot be measured. Set"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        tiny_trainer([NoiseScaleRamp()], tmp_path, micro_batch_size=8).train()
    alone = f"{NoiseScaleRamp()!r}: a step of 1 examples is one micro-batch"
    with pytest.raises(ValueError, match=re.escape(alone) + ".*Set gradient_accumulation_steps=2 or more"):
        tiny_trainer([NoiseScaleRamp()], tmp_path, per_device_train_batch_size=1).train()
