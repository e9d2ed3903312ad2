import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_accel import CutMix, Mixup
from hf_accel.batch import StepPlan
from hf_accel.data.regularization.mixup import mix
from hf_accel.losses import head_of
from hf_accel.stream.reader import StepReader
from hf_accel.testing import Patterns, collate_stacked, largest_difference, tiny_convnext, tiny_llama, tiny_trainer
from hf_accel.testing import weights_of as weights

DATA = Patterns("pixel_values", (3, 16, 16), 24, 0, torch.float64)


def hosted(*techniques, progress=1.0, model=None, reads=None):
    """Started techniques with a host that reads `DATA`."""
    model = model or tiny_convnext()
    reader = StepReader(DATA, collate_stacked)

    def read(plan):
        if reads is not None:
            reads.append(plan)
        return reader[plan]

    host = SimpleNamespace(
        args=SimpleNamespace(device=torch.device("cpu")),
        clock=SimpleNamespace(progress=progress),
        head=head_of(model),
        model=model,
        stream=SimpleNamespace(read=read),
        techniques=list(techniques),
    )
    for technique in techniques:
        technique.run_ = host
        technique.on_train_begin(None, None, None, model=model)
    return reader


def transformed(reader, plan, *techniques):
    """Images and labels of a step by example, after all techniques."""
    batch = reader[plan]
    for technique in techniques:
        batch = technique.transform_batch(batch)
    found = {}
    for micro in batch.micro_batches:
        for row, i in enumerate(micro.ids_B.tolist()):
            found[i] = (micro.inputs["pixel_values"][row], micro.inputs["labels"][row])
    return found


def test_the_mix_is_a_loop():
    images, others, shares = torch.rand(3, 2, 4, 5), torch.rand(3, 2, 4, 5), torch.rand(3)
    mixed = mix(images, others, shares)
    for i in range(3):
        assert torch.allclose(mixed[i], float(shares[i]) * images[i] + (1 - float(shares[i])) * others[i], atol=1e-6)


def test_one_step_is_that_of_a_hand_written_loss(tmp_path):
    """SGD on lam * CE(a) + (1 - lam) * CE(b) of the images of neighbors, in micro-batches of three."""
    trainer = tiny_trainer(
        [Mixup(alpha=1.0)],
        tmp_path,
        dropout=0.0,
        dtype=torch.float64,
        micro_batch_size=3,
        max_steps=1,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    data, model = trainer.train_dataset, tiny_convnext(dropout=0.0, dtype=torch.float64)
    ids = torch.randperm(len(data), generator=torch.Generator().manual_seed(7))[:8].tolist()
    terms = []
    for position, i in enumerate(ids):
        j = ids[position + 1 if position % 2 == 0 else position - 1]
        share = np.random.default_rng((7, 0, i, zlib.crc32(b"Mixup"))).beta(1.0, 1.0)
        image = share * data[i]["pixel_values"] + (1 - share) * data[j]["pixel_values"]
        log_probs = model(pixel_values=image[None]).logits[0].log_softmax(-1)
        terms.append(-share * log_probs[data[i]["labels"]] - (1 - share) * log_probs[data[j]["labels"]])
    torch.stack(terms).mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    trainer.train()
    assert largest_difference(weights(trainer), model.state_dict()) < 1e-6  # lam is kept in float32
    assert trainer.state.log_history[0]["loss"] == pytest.approx(torch.stack(terms).mean().item(), rel=1e-6)


@pytest.mark.parametrize("number", [1, 2, 7, 8])
def test_neither_ranks_nor_micro_batches_change_what_is_mixed(number):
    """Also where a second technique mixes what the first one has mixed."""
    ids = torch.randperm(24, generator=torch.Generator().manual_seed(number))[:number]
    techniques = Mixup(alpha=1.0), CutMix()
    reads = []
    reader = hosted(*techniques, reads=reads)
    whole = transformed(reader, StepPlan(3, ids, None, number, seed=5), *techniques)
    assert not reads
    for size, world in ((4, 1), (3, 1), (1, 1), (2, 2), (3, 2), (4, 3)):
        parts = {}
        for rank in range(world):
            parts |= transformed(reader, StepPlan(3, ids, None, size, rank, world, seed=5), *techniques)
        parts.pop(-1, None)
        assert parts.keys() == whole.keys()
        for i, (image, label) in whole.items():
            assert torch.equal(parts[i][0], image) and torch.equal(parts[i][1], label)
    assert reads or number < 3


def test_labels_are_the_shares_and_examples_count_as_before():
    technique = Mixup(alpha=1.0)
    reader = hosted(technique)
    plan = StepPlan(0, torch.arange(4), torch.tensor([1.0, 2.0, 1.0, 1.0]), 4)
    micro = technique.transform_batch(reader[plan]).micro_batches[0]
    assert torch.equal(micro.weights_B, plan.weights_N)
    assert torch.allclose(micro.inputs["labels"].sum(1), torch.ones(4))
    classes = [DATA[i]["labels"] for i in range(4)]
    for i, label in enumerate(micro.inputs["labels"]):
        assert set(label.nonzero().flatten().tolist()) == {classes[i], classes[i ^ 1]}
    assert 0 < technique.report()["mixed"] < 0.5
    unweighted = technique.transform_batch(reader[StepPlan(0, torch.arange(4), None, 4)])
    assert unweighted.micro_batches[0].weights_B.tolist() == [1.0] * 4


def test_the_strength_rises_and_other_epochs_draw_anew():
    technique = Mixup(alpha=0.4, ramp=0.5)
    reader = hosted(technique, progress=0.0)
    plan = StepPlan(0, torch.arange(8), None, 8)
    batch = reader[plan]
    assert technique.transform_batch(batch) is batch

    def lesser(progress, epoch=0):
        technique.run_.clock.progress = progress
        found = transformed(reader, StepPlan(epoch, torch.arange(8), None, 8), technique)
        return [float(1 - label.max()) for _, label in found.values()]

    assert sum(lesser(0.05)) < sum(lesser(0.5))
    assert lesser(0.5) == lesser(0.9) != lesser(0.9, epoch=1)


@pytest.mark.parametrize("kind", [Mixup, CutMix])
def test_other_models_and_labels_are_refused(kind, tmp_path):
    with pytest.raises(
        ValueError, match=rf"{kind.__name__}\(.*LlamaForCausalLM because it reads input_ids, not pixel_values"
    ):
        tiny_trainer([kind()], tmp_path, modality="text").train()
    several = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, problem_type="regression")
    with pytest.raises(ValueError, match="problem_type='regression' and 2 labels because its loss takes no shares"):
        hosted(kind(), model=ViTForImageClassification(several))
    assert tiny_llama().main_input_name == "input_ids"
    technique = kind()
    reader = hosted(technique)
    batch = reader[StepPlan(0, torch.arange(4), None, 4)]
    batch.micro_batches[0].inputs["labels"][0] = -100
    with pytest.raises(ValueError, match="does not support labels outside 0 to 3"):
        technique.transform_batch(batch)


def test_smoothed_and_weighted_shares_train(tmp_path):
    trainer = tiny_trainer([Mixup(), CutMix()], tmp_path, label_smoothing_factor=0.1, max_steps=2)
    trainer.train()
    assert all(entry["report"] and sum(entry["report"].values()) > 0 for entry in trainer.receipt.techniques)
