from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from hf_accel.optim.large_batch.batch_size_ramp import BatchSizeRamp, ramped_batch_size


@pytest.mark.parametrize("shape", ["linear", "doubling"])
@pytest.mark.parametrize("batch", [64, 96, 6, 1])
@pytest.mark.parametrize("start", [0.01, 0.25, 0.3, 1.0])
def test_it_never_falls_and_ends_at_the_nominal_size(shape, batch, start):
    kwargs = {"start": start, "end": 0.4, "shape": shape}
    sizes = [ramped_batch_size(i / 200, batch, **kwargs) for i in range(201)]
    assert sizes == sorted(sizes) and sizes[80] == sizes[-1] == batch
    assert all(size >= 1 for size in sizes)
    assert sizes[0] == max(int(Fraction(start) * batch), 1)


def test_the_linear_ramp_is_its_equation():
    for i in range(50):
        share = Fraction(1, 4) + Fraction(3, 4) * Fraction(i, 50)
        size = ramped_batch_size(i / 100, 1000, start=0.25, end=0.5)
        assert abs(size - share * 1000) <= 1 and size <= share * 1000 + Fraction(1, 10**9)


def test_doubling_stages_are_equally_long():
    sizes = [ramped_batch_size(i / 100, 128, start=0.125, end=0.6, shape="doubling") for i in range(61)]
    assert [sizes.count(size) for size in (16, 32, 64, 128)] == [20, 20, 20, 1]


def test_the_technique_asks_the_clock_and_counts():
    technique = BatchSizeRamp(start=0.3, end=0.5)
    technique.run_ = SimpleNamespace(clock=SimpleNamespace(progress=0.1))
    technique.on_train_begin(None, None, None)
    size = technique.batch(torch.arange(1000), 64)
    assert size == 28  # 64 * 0.44
    for num in (size, 64):
        technique.transform_batch(SimpleNamespace(num_examples=num))
    assert technique.report() == {"first_batch": 28, "mean_batch": 46.0}
    assert technique.took_effect(technique.report())
    other = BatchSizeRamp()
    other.run_ = technique.run_
    other.on_train_begin(None, None, None)
    other.load_state_dict("global", technique.state_dict("global"))
    assert other.report() == technique.report()


def test_a_bad_shape_names_the_choices():
    with pytest.raises(ValueError, match="shape must be one of 'linear', 'doubling'"):
        BatchSizeRamp(shape="cubic")
