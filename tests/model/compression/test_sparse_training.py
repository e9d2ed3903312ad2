import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, ResNetConfig, TrainerCallback

from hf_accel.model.compression.lora import add_adapters
from hf_accel.model.compression.sparse_training import (
    SparseTraining,
    dropped_fraction,
    erk_densities,
    moved,
    risen_sparsity,
)
from hf_accel.surgery.blocks import linear_layers
from hf_accel.testing import EXAMPLES, collate_padded, tiny_bert, tiny_llama, tiny_trainer


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8, 0.99])
def test_densities_are_those_of_the_formula(sparsity):
    shapes = [(4, 4), (64, 64), (64, 256), (8, 512)]
    densities = erk_densities(shapes, sparsity)
    sizes = [a * b for a, b in shapes]
    assert sum(d * n for d, n in zip(densities, sizes, strict=True)) == pytest.approx((1 - sparsity) * sum(sizes))
    ratios = {d / ((a + b) / (a * b)) for d, (a, b) in zip(densities, shapes, strict=True) if d < 1}
    assert max(ratios) == pytest.approx(min(ratios))
    assert all(0 < d <= 1 for d in densities)
    # A layer that is dense would be more than that with the constant of the others.
    assert all(max(ratios) * (a + b) / (a * b) >= 1 for d, (a, b) in zip(densities, shapes, strict=True) if d == 1)


def test_the_smallest_die_and_the_dead_with_the_largest_score_rise():
    generator = np.random.default_rng(0)
    weight, score = generator.normal(size=(6, 7)), generator.random((6, 7))
    mask = generator.random((6, 7)) < 0.4
    new = moved(*map(torch.tensor, (mask, weight, score)), fraction=0.3).numpy()
    alive = sorted(zip(*np.nonzero(mask), strict=True), key=lambda place: abs(weight[place]))
    count = int(0.3 * mask.sum())
    rest = sorted([*zip(*np.nonzero(~mask), strict=True), *alive[:count]], key=lambda place: -score[place])
    assert count > 0
    assert set(zip(*np.nonzero(new), strict=True)) == {*alive[count:], *rest[:count]}


def test_a_weight_that_dies_may_rise_at_once_and_keeps_its_value():
    """As in RigL's own code, where all that is not kept competes."""
    mask, gradient = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).bool(), torch.tensor([10, 0, 0, 0, 0.1, 0.05, 0, 0])
    weight = torch.tensor([0.01, 1, 2, 3, 0, 0, 0, 0])
    assert moved(mask, weight, gradient, 0.25).tolist() == mask.tolist()
    assert moved(mask, weight, gradient, 0.5).int().tolist() == [1, 0, 1, 1, 1, 0, 0, 0]


def test_schedules_are_their_equations():
    for i in range(11):
        progress = i / 10
        assert dropped_fraction(progress, drop=0.3, stop=0.5) == pytest.approx(
            0.15 * (1 + math.cos(math.pi * min(2 * progress, 1)))
        )
        assert risen_sparsity(progress, sparsity=0.9, stop=0.5) == pytest.approx(
            0.9 - 0.9 * (1 - min(2 * progress, 1)) ** 3
        )


class Masks(TrainerCallback):
    """Which weights are not zero after each step."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.alive = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.alive.append({path: layer.weight != 0 for path, layer in linear_layers(model).items()})


def test_rigl_is_a_loop_by_hand(tmp_path):
    options = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.5}
    technique = SparseTraining(sparsity=0.6, interval=0.25, drop=0.4, stop=1.0)
    trainer = tiny_trainer(
        [technique], tmp_path, dropout=0.0, dtype=torch.float64, train_sampling_strategy="sequential",
        num_train_epochs=1, **options,
    )  # fmt: skip
    trainer.train()

    model = tiny_llama(dropout=0.0, dtype=torch.float64).train()
    weights = {path: layer.weight for path, layer in model.named_modules() if path.endswith("_proj")}
    shapes = [tuple(weight.shape) for weight in weights.values()]
    masks = {}
    for (path, weight), density in zip(weights.items(), erk_densities(shapes, 0.6), strict=True):
        size = weight.detach().abs()
        masks[path] = size >= size.flatten().sort(descending=True).values[round(density * size.numel()) - 1]
        weight.data *= masks[path]
    steps = EXAMPLES // 8
    for step in range(steps):
        batch = collate_padded([trainer.train_dataset[i] for i in range(8 * step, 8 * step + 8)])
        model.zero_grad()
        model(**batch).loss.backward()
        for path, weight in weights.items():
            if step in (2, 4, 6):  # an interval is two of the eight steps
                alive, dead = masks[path].nonzero().tolist(), (~masks[path]).nonzero().tolist()
                alive.sort(key=lambda place: abs(weight[tuple(place)].item()))
                count = int(0.2 * (1 + math.cos(math.pi * step / steps)) * len(alive))
                rest = sorted(dead + alive[:count], key=lambda place: -abs(weight.grad[tuple(place)].item()))
                for place in alive[:count]:
                    masks[path][tuple(place)] = False
                for place in rest[:count]:
                    masks[path][tuple(place)] = True
                weight.data *= masks[path]
            weight.grad *= masks[path]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), parameter, rtol=1e-9, atol=1e-12)
    assert technique.risen_ > 0


@pytest.mark.parametrize("method", ["rigl", "set", "magnitude"])
def test_most_weights_are_zero_and_plain_loading_gives_them(method, tmp_path):
    masks = Masks()
    technique = SparseTraining(sparsity=0.7, method=method, interval=0.1, stop=0.5)
    trainer = tiny_trainer([technique], tmp_path, weight_decay=0.1)
    trainer.add_callback(masks)
    trainer.train()
    shares = [
        1 - sum(int(m.sum()) for m in alive.values()) / sum(m.numel() for m in alive.values()) for alive in masks.alive
    ]
    changed = [
        i for i in range(1, 24) if any((masks.alive[i][p] & ~masks.alive[i - 1][p]).any() for p in masks.alive[0])
    ]
    if method == "magnitude":
        assert not changed and shares == sorted(shares) and shares[0] == 0.0
    else:
        assert min(shares) >= 0.7 - 1e-3 and changed and max(changed) <= 13
    assert shares[-1] == pytest.approx(0.7, abs=1e-3) == technique.report()["zeros"]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for path, layer in linear_layers(loaded).items():
        assert torch.equal(layer.weight != 0, masks.alive[-1][path])


@pytest.mark.parametrize(("make_model", "layers"), [(tiny_bert, 12), (tiny_llama, 28)])
def test_layers_are_those_in_blocks(make_model, layers):
    assert len(linear_layers(make_model())) == layers


def test_what_it_cannot_do_is_refused():
    args = SimpleNamespace(deepspeed_plugin=None, fsdp=None, seed=0)

    def begin(model):
        SparseTraining().on_train_begin(args, None, None, model=model)

    with pytest.raises(
        ValueError, match=r"SparseTraining\(.*does not support PeftModel because adapters are small.*Remove one"
    ):
        begin(add_adapters(tiny_llama(), rank=4, alpha=8))
    with pytest.raises(ValueError, match=r"trainable linear layer in a block; LlamaForCausalLM has none\. Remove"):
        begin(tiny_llama().requires_grad_(False))
    resnet = AutoModelForImageClassification.from_config(ResNetConfig(hidden_sizes=[4], depths=[1], embedding_size=4))
    with pytest.raises(ValueError, match=r"SparseTraining\(.*ResNet.*no list of the blocks"):
        begin(resnet)
