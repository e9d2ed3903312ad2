"""The operations of a run against closed forms; what is counted in forks changes no run and is charged to none."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments, set_seed

from hf_accel import AccelTrainer, LayerFreezing, Muon
from hf_accel.compare.operations import Operations
from hf_accel.compare.worker import make_trainer
from hf_accel.recipe import Recipe
from hf_accel.technique import Technique

WIDTH, INNER, LAYERS, VOCABULARY, LENGTH, SIZE = 16, 48, 2, 50, 12, 4
STEPS = 3


def task():
    set_seed(3)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    ids = torch.randint(VOCABULARY, (SIZE * STEPS, LENGTH))
    return {"model": LlamaForCausalLM(config), "train_dataset": [{"input_ids": row, "labels": row} for row in ids]}


def run(folder, *techniques: Technique, counted=True):
    args = {"per_device_train_batch_size": SIZE, "report_to": "none", "disable_tqdm": True, "output_dir": str(folder)}
    args |= {"save_strategy": "no", "logging_strategy": "no", "seed": 1}
    if techniques:
        arguments = TrainingArguments(**args, num_train_epochs=1)
        trainer = AccelTrainer(args=arguments, techniques=list(techniques), **task())
    else:
        trainer = make_trainer(task(), args, Recipe(), "1epochs", TrainerCallback())
    if not counted:
        trainer.train()
        return trainer, None
    operations = Operations(trainer)
    operations.train(trainer)
    return trainer, operations


def products():
    """Of a forward pass over one step: (a block, the head)."""
    tokens = SIZE * LENGTH
    block = 2 * tokens * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER) + 2 * 2 * SIZE * LENGTH * LENGTH * WIDTH
    return block, 2 * tokens * WIDTH * VOCABULARY


def dense_step():
    """Backward takes twice as much as forward; fused attention computes the scores again: 5 products instead of 4."""
    block, head = products()
    # rotary embeddings: the angles of all positions, an outer product
    angles = 2 * LENGTH * (WIDTH // 2 // 2)
    return 3 * (LAYERS * block + head) + LAYERS * 2 * SIZE * LENGTH * LENGTH * WIDTH + angles


def test_a_plain_run_takes_what_the_closed_form_says(tmp_path):
    _, operations = run(tmp_path)
    assert operations.executed == pytest.approx(STEPS * dense_step(), rel=1e-3)


def test_updates_count(tmp_path):
    """Newton-Schulz in five iterations: of a square matrix X directly, X X^T, its square, and the product with X; of
    three times as many columns by its Gram matrix, made of X and at the end applied to it, with five squares, four
    products of factors, and four times two to update it."""
    _, operations = run(tmp_path, Muon())
    square, wide = 2 * 5 * 3 * WIDTH**3, 2 * (3 + 5 + 4 + 8 + 3) * WIDTH**3
    assert INNER == 3 * WIDTH
    update = LAYERS * (4 * square + 3 * wide)
    assert operations.executed == pytest.approx(STEPS * (dense_step() + update), rel=1e-3)


class Scoring(Technique):
    def on_train_begin(self, args, state, control, **kwargs):
        torch.mm(torch.ones(100, 200), torch.ones(200, 300))


def test_what_comes_before_the_first_step_counts(tmp_path):
    _, operations = run(tmp_path, Scoring())
    assert operations.executed == pytest.approx(STEPS * dense_step() + 2 * 100 * 200 * 300, rel=1e-3)


@pytest.mark.parametrize("kinds", [(), (LayerFreezing,), (Muon,)])
def test_counting_changes_no_bit_and_is_not_charged(tmp_path, kinds):
    counted, operations = run(tmp_path / "a", *(kind() for kind in kinds))
    plain, _ = run(tmp_path / "b", *(kind() for kind in kinds), counted=False)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, counted.model.state_dict()[name]), name
    assert operations.spent["cpu_seconds"] > 0 and operations.spent["wall_seconds"] > 0


def test_a_kernel_without_a_formula_makes_the_count_unknown_and_not_smaller(tmp_path, capfd):
    class Solving(Technique):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.lm_head.register_forward_pre_hook(lambda *_: torch.linalg.lstsq(torch.eye(2), torch.eye(2)) and None)

    trainer, operations = run(tmp_path, Solving())
    assert trainer.state.global_step == STEPS and operations.executed != operations.executed
    assert "there is no formula for its FLOPs" in capfd.readouterr().err
