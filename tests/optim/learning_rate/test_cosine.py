import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_cosine_with_min_lr_schedule_with_warmup

from hf_accel.optim.learning_rate.cosine import Cosine


@pytest.mark.parametrize("warmup", [0, 5, 30])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_it_is_that_of_transformers(warmup, final):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    if final:
        published = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, 100, min_lr_rate=final)
    else:
        published = get_cosine_schedule_with_warmup(optimizer, warmup, 100)
    schedule = Cosine(warmup=warmup / 100, final=final).schedule
    for step in range(101):
        assert schedule(step / 100) == pytest.approx(published.lr_lambdas[0](step), abs=1e-12)


def test_it_ends_exactly():
    assert Cosine().schedule(1.0) == 0.0 and Cosine(final=0.1).schedule(1.0) == 0.1
    assert Cosine().schedule(0.0) == 0.0 and Cosine(warmup=0.0).schedule(0.0) == 1.0


def test_a_bad_value_names_itself():
    with pytest.raises(ValueError, match=r"Cosine\(final=1.5\): final must be >= 0 and <= 1"):
        Cosine(final=1.5)
