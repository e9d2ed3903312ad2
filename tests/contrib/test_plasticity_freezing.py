import math

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers import default_data_collator as collate

from hf_accel.contrib.plasticity_freezing import PlasticityFreezing, settled_by_plasticity, similarities
from hf_accel.testing import VOCABULARY, tiny_llama


def data(num=32):
    ids = torch.randint(3, VOCABULARY, (num, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def test_plasticity_settles_where_it_is_small_twice():
    plasticity = [[1.0, 1.0, 1.0], [0.1, 0.1, 0.5], [0.15, 0.1, 0.1]]
    assert settled_by_plasticity(plasticity[:1], 0, 0.2) == 0
    assert settled_by_plasticity(plasticity[:2], 0, 0.2) == 0
    assert settled_by_plasticity(plasticity, 0, 0.2) == 2
    assert settled_by_plasticity(plasticity, 1, 0.2) == 2
    assert settled_by_plasticity([row[::-1] for row in plasticity], 0, 0.2) == 0  # a prefix only
    assert settled_by_plasticity(plasticity, 0, 0.6) == 3


def test_similarities_are_those_of_each_two():
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i, row in enumerate(similarities(x)):
        products = [float(x[i].dot(other)) for other in x]
        torch.testing.assert_close(row.tolist(), [p / math.hypot(*products) for p in products])


def by_hand(x, y):
    """The similarity-preserving loss of two layers' activations, (N, H) each."""
    a, b = ([[float(r.dot(q)) for q in z] for r in z] for z in (x, y))
    a, b = ([[v / math.hypot(*row) for v in row] for row in m] for m in (a, b))
    return sum((v - w) ** 2 for r, q in zip(a, b, strict=True) for v, w in zip(r, q, strict=True)) / len(a) ** 2


def test_plasticity_is_the_change_of_similarities(tmp_path):
    technique, model = PlasticityFreezing(), tiny_llama(dropout=0.0).double()
    args = TrainingArguments(tmp_path, use_cpu=True, seed=3)
    technique.on_train_begin(args, None, None, model=model, train_dataloader=DataLoader(data(), collate_fn=collate))
    batch = {k: torch.cat([inputs[k] for inputs in technique.examples_]) for k in ("input_ids", "labels")}
    assert len(batch["input_ids"]) == 16 == len({tuple(row) for row in batch["input_ids"].tolist()})
    modes = [module.training for module in model.eval().train().modules()]
    hidden = []
    for _ in range(2):
        with torch.no_grad():
            hidden.append([h.mean(1) for h in model(**batch, output_hidden_states=True).hidden_states[1:-1]])
            technique._measure(model)
            model.model.layers[1].mlp.down_proj.weight += 0.1
    (found,), hooks = technique.plasticity_, [len(module._forward_hooks) for module in model.modules()]
    assert found[0] == 0.0 and found[1] > 0
    assert found[:3] == pytest.approx([by_hand(x, y) for x, y in zip(*hidden, strict=True)], rel=1e-5)
    assert [module.training for module in model.modules()] == modes
    assert technique._similarities(model).shape == (4, 16, 16)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    with pytest.raises(ValueError, match="PlasticityFreezing.*examples of a training set.*Use GradientNormFreezing"):
        technique.on_train_begin(args, None, None, model=model, train_dataloader=DataLoader(data(1)))
