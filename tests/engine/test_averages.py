"""Averages in AccelTrainer: the weights that it trains, evaluates, checkpoints, returns and saves."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from hf_accel import (
    ExponentialMovingAverage,
    LatestWeightAveraging,
    Lookahead,
    StochasticWeightAveraging,
    Technique,
)
from hf_accel.testing import largest_difference, losses_of, tiny_llama, tiny_trainer, weights_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it

HALF_LIFE = 3.0
EVERY = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 4, "eval_steps": 4, "max_steps": 12}
WORST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
"""Calls the largest loss the best, so that the best checkpoint is not the last one."""


@dataclass(eq=False)
class Watch(Technique):
    """Brings the stream in."""

    def observe(self, ids_B, losses_B):
        pass


def lora():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(tiny_llama(), LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))


MODELS = {"llama": tiny_llama, "lora": lora}
HOSTS = {"": [], "stream": [Watch()]}


@pytest.fixture(params=MODELS)
def make_model(request):
    return MODELS[request.param]


@pytest.fixture(params=HOSTS)
def others(request):
    return HOSTS[request.param]


def averaging(directory, make_model, others=(), technique=None, **args):
    techniques = [technique or ExponentialMovingAverage(HALF_LIFE), *others]
    return tiny_trainer(techniques, directory, model=make_model(), **(EVERY | args))


def plain(directory, make_model, **args):
    return tiny_trainer([], directory, trainer_class=Trainer, model=make_model(), **(EVERY | args))


def raw_weights(checkpoint):
    """What `checkpoint` holds as the model, under the names of the files."""
    name = "adapter_model" if (checkpoint / "adapter_model.safetensors").exists() else "model"
    return load_file(checkpoint / f"{name}.safetensors")


def averages(checkpoint):
    return load_file(checkpoint / "averaged.safetensors")


def in_file_names(tensors):
    """Names of parameters as peft's files have them, which leave the adapter's name out."""
    return {name.replace(".default.", "."): tensor for name, tensor in tensors.items()}


def independent_loss(directory, make_model, tensors):
    """The evaluation of a model with these parameters by a Trainer that never heard of averages."""
    model = make_model()
    missing = model.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys
    return plain(directory, lambda: model).evaluate()["eval_loss"]


def logged(trainer):
    return {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def equal(one, other):
    return largest_difference(one, other) == 0.0


def test_training_is_the_same_and_evaluations_are_those_of_the_averages(make_model, others, tmp_path):
    without = plain(tmp_path / "plain", make_model)
    without.train()
    trainer = averaging(tmp_path / "ema", make_model, others)
    trainer.train()
    assert losses_of(trainer) == losses_of(without)
    assert logged(trainer).keys() == {4, 8, 12}
    for step, loss in logged(trainer).items():
        checkpoint = tmp_path / "ema" / f"checkpoint-{step}"
        raw, averaged = raw_weights(checkpoint), averages(checkpoint)
        assert equal(raw, raw_weights(tmp_path / "plain" / checkpoint.name))
        assert averaged.keys() == trainable(make_model()).keys()
        assert not equal(in_file_names(averaged), {name: raw[name] for name in in_file_names(averaged)})
        assert independent_loss(tmp_path, make_model, averaged) == pytest.approx(loss, rel=1e-6)
        assert logged(without)[step] != pytest.approx(loss, rel=1e-4)


def test_averages_are_the_weighted_mean_of_all_checkpoints(make_model, tmp_path):
    trainer = averaging(tmp_path, make_model, save_steps=1, eval_strategy="no")
    start = in_file_names(trainable(trainer.model))
    trainer.train()
    iterates = [start, *(raw_weights(tmp_path / f"checkpoint-{step}") for step in range(1, 13))]
    r = 0.5 ** (1 / HALF_LIFE)
    shares = [r**12, *((1 - r) * r ** (12 - step) for step in range(1, 13))]
    returned = in_file_names(trainable(trainer.model))
    for name in start:
        expected = sum(share * iterate[name].double() for share, iterate in zip(shares, iterates, strict=True))
        torch.testing.assert_close(returned[name].double(), expected, rtol=1e-5, atol=1e-7)


def test_the_returned_and_the_saved_model_are_the_averages(make_model, tmp_path):
    trainer = averaging(tmp_path / "run", make_model)
    trainer.train()
    last = averages(tmp_path / "run" / "checkpoint-12")
    assert equal(trainable(trainer.model), last)
    assert trainer.evaluate()["eval_loss"] == logged(trainer)[12]
    trainer.save_model(str(tmp_path / "saved"))
    if make_model is lora:
        assert equal(load_file(tmp_path / "saved" / "adapter_model.safetensors"), in_file_names(last))
        model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved", is_trainable=True)
        assert equal(trainable(model), last)
    else:
        model = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
        assert equal(trainable(model), last)
    assert plain(tmp_path, lambda: model).evaluate()["eval_loss"] == pytest.approx(logged(trainer)[12], rel=1e-6)


def test_the_best_model_is_the_averages_of_the_best_checkpoint(make_model, tmp_path):
    trainer = averaging(tmp_path, make_model, **WORST)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert trainer.state.best_metric == logged(trainer)[4] == max(logged(trainer).values())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
    assert equal(trainable(trainer.model), averages(tmp_path / "checkpoint-4"))


OTHER_AVERAGES = [StochasticWeightAveraging(start=0.25), LatestWeightAveraging(3), Lookahead(3)]


@pytest.mark.parametrize("technique", OTHER_AVERAGES, ids=lambda technique: type(technique).__name__)
def test_other_averages_are_evaluated_returned_saved_and_resumed_as_well(technique, make_model, tmp_path):
    trainer = averaging(tmp_path / "run", make_model, technique=technique, **WORST)
    trainer.train()
    for step, loss in logged(trainer).items():
        averaged = averages(tmp_path / "run" / f"checkpoint-{step}")
        assert independent_loss(tmp_path, make_model, averaged) == pytest.approx(loss, rel=1e-6)
    best = averages(tmp_path / "run" / "checkpoint-4")
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-4")
    assert equal(trainable(trainer.model), best)
    trainer.save_model(str(tmp_path / "saved"))
    assert equal(in_file_names(best), {name: raw_weights(tmp_path / "saved")[name] for name in in_file_names(best)})

    resumed = averaging(tmp_path / "resumed", make_model, technique=technique)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    assert losses_of(resumed) == losses_of(trainer) and logged(resumed) == logged(trainer)
    assert equal(trainable(resumed.model), averages(tmp_path / "run" / "checkpoint-12"))


@pytest.mark.parametrize("best", [{}, WORST], ids=["last", "best"])
@pytest.mark.parametrize("step", [4, 12])
def test_resumed_runs_are_the_same(step, best, make_model, others, tmp_path):
    straight = averaging(tmp_path / "straight", make_model, others, **best)
    straight.train()
    resumed = averaging(tmp_path / "resumed", make_model, others, **best)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
    assert resumed.state.global_step == 12
    assert losses_of(resumed) == losses_of(straight) and logged(resumed) == logged(straight)
    assert equal(weights_of(resumed), weights_of(straight))
    assert resumed.receipt.techniques[0]["report"] == straight.receipt.techniques[0]["report"]
    for later in range(step + 4, 13, 4):
        names = (tmp_path / "straight" / f"checkpoint-{later}", tmp_path / "resumed" / f"checkpoint-{later}")
        assert equal(*map(raw_weights, names)) and equal(*map(averages, names))


class SavingAndPredicting(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.trainer.save_model(f"{args.output_dir}/saved")
            self.predicted = self.trainer.predict(self.trainer.eval_dataset).metrics["test_loss"]


def train(trainer, callback):
    callback.trainer = trainer
    trainer.add_callback(callback)
    trainer.train()
    return trainer


def test_saving_and_predicting_in_mid_training_give_averages_and_leave_training_alone(make_model, tmp_path):
    without = train(plain(tmp_path / "plain", make_model), SavingAndPredicting())
    trainer = train(averaging(tmp_path / "ema", make_model), callback := SavingAndPredicting())
    assert equal(raw_weights(tmp_path / "ema" / "saved"), in_file_names(averages(tmp_path / "ema" / "checkpoint-4")))
    assert callback.predicted == logged(trainer)[4]
    assert losses_of(trainer) == losses_of(without)


def test_two_evaluation_sets_are_both_evaluated_with_averages(tmp_path):
    trainer = averaging(tmp_path, tiny_llama)
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
    trainer.train()
    for step in (4, 8, 12):
        seen = [e[key] for e in trainer.state.log_history for key in e if e["step"] == step and key.endswith("_loss")]
        expected = independent_loss(tmp_path, tiny_llama, averages(tmp_path / f"checkpoint-{step}"))
        assert seen[0] == seen[1] == pytest.approx(expected)


def test_what_is_frozen_is_not_averaged(tmp_path):
    def half_frozen():
        model = tiny_llama()
        model.model.embed_tokens.requires_grad_(False)
        return model

    trainer = averaging(tmp_path, half_frozen)
    trainer.train()
    assert "model.embed_tokens.weight" not in averages(tmp_path / "checkpoint-4")
    assert torch.equal(trainer.model.model.embed_tokens.weight, tiny_llama().model.embed_tokens.weight)
