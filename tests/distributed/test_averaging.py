"""Averages in AccelTrainer on two ranks: evaluated, checkpointed, resumed, returned and saved."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ranks import BACKENDS, assert_backend, backend_args, run_on_ranks
from safetensors.torch import load_file
from transformers import Trainer

from hf_accel import ExponentialMovingAverage, LatestWeightAveraging, Lookahead, StochasticWeightAveraging
from hf_accel.testing import again, largest_difference, losses_of, tiny_llama, tiny_trainer
from hf_accel.weights import gather, local_parameters

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.ci,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft asks for it
]

EVERY = {
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "save_steps": 2,
    "eval_steps": 2,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
}
WORST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
"""Calls the largest loss the best, so that the best checkpoint is not the last one."""


def lora():
    torch.manual_seed(1)
    return get_peft_model(tiny_llama(), LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))


def raw_weights(checkpoint):
    name = "adapter_model" if (checkpoint / "adapter_model.safetensors").exists() else "model"
    return load_file(checkpoint / f"{name}.safetensors")


def averages(checkpoint):
    return load_file(checkpoint / "averaged.safetensors")


def logged(trainer):
    return {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}


def equal(one, other):
    return largest_difference(one, other) == 0.0


def in_file_names(tensors):
    """Names of parameters as peft's files have them, which leave the adapter's name out."""
    return {name.replace(".default.", "."): tensor for name, tensor in tensors.items()}


EMA, SWA, LAWA = ExponentialMovingAverage(2.0), StochasticWeightAveraging(start=0.1), LatestWeightAveraging(2)
CELLS = [
    *((backend, EMA, tiny_llama) for backend in BACKENDS),
    ("ddp", EMA, lora),
    ("fsdp2", SWA, tiny_llama),
    ("zero2", SWA, tiny_llama),
    ("fsdp2", LAWA, tiny_llama),
    ("zero3", LAWA, tiny_llama),
    ("ddp", LAWA, lora),
    ("ddp", Lookahead(2), tiny_llama),
    ("fsdp2", Lookahead(2), tiny_llama),
]


@pytest.mark.parametrize(
    ("backend", "technique", "make_model"),
    CELLS,
    ids=[f"{backend}-{type(technique).__name__}-{make_model.__name__}" for backend, technique, make_model in CELLS],
)
def test_averages_under_each_backend(backend, technique, make_model, tmp_path):
    moves_weights = isinstance(technique, Lookahead)

    def averaging(name, **args):
        techniques = [again(technique)]
        return tiny_trainer(techniques, tmp_path / name, model=make_model(), **EVERY, **backend_args(backend), **args)

    def rank():
        plain = tiny_trainer(
            [], tmp_path / "plain", trainer_class=Trainer, model=make_model(), **EVERY, **backend_args(backend)
        )
        plain.train()
        straight = averaging("straight")
        straight.train()
        assert_backend(straight, backend)
        straight.save_model(str(tmp_path / "saved"))
        seen = {
            "losses": [losses_of(plain), losses_of(straight)],
            "logged": [logged(plain), logged(straight)],
            "returned": [gather(straight.model, local_parameters(straight.model))],
            "returned loss": straight.evaluate()["eval_loss"],
        }
        for step in (4, 6):
            resumed = averaging(f"resumed{step}")
            resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
            seen["returned"].append(gather(resumed.model, local_parameters(resumed.model)))
            seen["losses"].append(losses_of(resumed))
            seen["logged"].append(logged(resumed))
        best = averaging("best", **WORST)
        best.train()
        seen["best"] = gather(best.model, local_parameters(best.model))
        seen["best loss"] = [best.state.best_metric, best.evaluate()["eval_loss"]]
        return seen

    seen, others = run_on_ranks(rank, backend=backend, timeout=120)
    straight = tmp_path / "straight"

    # Training is the same with averages, and after a resume; on all ranks.
    plain, first, *resumed = seen["losses"]
    assert all(losses == first for losses in resumed) and others["losses"] == seen["losses"]
    assert (plain == first) != moves_weights
    without, with_averages, *resumed = seen["logged"]
    assert all(losses == with_averages for losses in resumed) and others["logged"] == seen["logged"]

    # Checkpoints hold raw weights, and averages by which the same step was evaluated.
    start = {name: p for name, p in make_model().named_parameters() if p.requires_grad}
    for step, loss in with_averages.items():
        checkpoint = straight / f"checkpoint-{step}"
        beside = raw_weights(tmp_path / "plain" / checkpoint.name)
        assert equal(raw_weights(checkpoint), beside) != moves_weights
        assert averages(checkpoint).keys() == start.keys()
        model = make_model()
        assert not model.load_state_dict(averages(checkpoint), strict=False).unexpected_keys
        # The loss of a pair of batches is the mean over their tokens, so one process evaluates twice as many at once.
        alone = tiny_trainer([], tmp_path, trainer_class=Trainer, model=model, per_device_eval_batch_size=8)
        assert alone.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert without[step] != pytest.approx(loss, rel=2e-5)
    after_resume = tmp_path / "resumed4" / "checkpoint-6"
    assert equal(raw_weights(after_resume), raw_weights(straight / "checkpoint-6"))
    assert equal(averages(after_resume), averages(straight / "checkpoint-6"))

    # The averages are returned and saved.
    last = averages(straight / "checkpoint-6")
    assert all(equal(returned, last) for returned in seen["returned"])
    assert seen["returned loss"] == others["returned loss"] == with_averages[6]
    assert equal(raw_weights(tmp_path / "saved"), in_file_names(last))

    # The best model is the averages of the best checkpoint.
    assert equal(seen["best"], averages(tmp_path / "best" / "checkpoint-2"))
    assert seen["best loss"] == pytest.approx([with_averages[2]] * 2, rel=1e-6)
