"""With a backend that runs what was traced as it is: compiling takes many seconds.  Ours is what is compiled."""

import shutil

import pytest
import torch
from transformers import Trainer

from hf_accel import AccelTrainer, RegionalCompile
from hf_accel.testing import largest_difference, losses_of, tiny_convnext, tiny_llama, tiny_trainer, weights_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # torch's own, of its compiler
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]
TRACED = {"backend": "eager", "min_steps": 1}


@pytest.mark.parametrize("plain", [True, False])
def test_blocks_are_compiled_once_for_all_shapes(plain, tmp_path):
    usual = tiny_trainer([], tmp_path, trainer_class=Trainer, num_train_epochs=1)
    usual.train()
    technique, kind = RegionalCompile(**TRACED), Trainer if plain else AccelTrainer
    trainer = tiny_trainer([] if plain else [technique], tmp_path, trainer_class=kind, num_train_epochs=1)
    if plain:
        trainer.add_callback(technique)
    lengths = set()
    trainer.model.register_forward_pre_hook(
        lambda _, args, inputs: lengths.add(inputs["input_ids"].shape[1]) if "input_ids" in inputs else None,
        with_kwargs=True,
    )
    trainer.train()
    assert technique.report() == {"blocks": 4, "compilations": 1, "code": "dynamic, eager"} and len(lengths) > 1
    assert losses_of(trainer) == losses_of(usual)
    assert largest_difference(weights_of(trainer), weights_of(usual)) == 0.0  # under the same names
    assert all(module._compiled_call_impl is None for module in trainer.model.modules())
    if not plain:
        assert trainer.receipt.techniques[0]["seconds"] > 0
        assert trainer.receipt.seconds["0.RegionalCompile"] == trainer.receipt.techniques[0]["seconds"]


@pytest.mark.ci
def test_a_resumed_run_is_the_same(tmp_path):
    straight = tiny_trainer([RegionalCompile(**TRACED)], tmp_path, save_strategy="steps", save_steps=13)
    straight.train()
    resumed = tiny_trainer([RegionalCompile(**TRACED)], tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-13"))
    assert losses_of(resumed) == losses_of(straight)
    assert largest_difference(weights_of(resumed), weights_of(straight)) == 0.0


def test_a_shape_has_a_code_of_its_own(tmp_path):
    technique = RegionalCompile(shapes="static", **TRACED)
    trainer = tiny_trainer([technique], tmp_path, num_train_epochs=1)
    lengths = set()
    trainer.model.register_forward_pre_hook(
        lambda _, args, inputs: lengths.add(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    trainer.train()
    assert technique.report()["compilations"] == min(len(lengths), 8) > 1


def test_short_runs_are_left_as_they_are(tmp_path):
    technique = RegionalCompile(backend="eager", min_steps=25)
    tiny_trainer([technique], tmp_path).train()
    report = technique.report()
    assert (report["blocks"], report["compilations"], report["why"]) == (0, 0, "fewer than 25 steps")
    assert technique.took_effect(report)


@pytest.mark.full  # minutes
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_compiler_makes_the_same_model(tmp_path):
    usual, compiled = (
        tiny_trainer(techniques, tmp_path, max_steps=2, model=tiny_llama(dropout=0.0))
        for techniques in ([], [RegionalCompile(min_steps=1)])
    )
    usual.train()
    compiled.train()
    assert compiled.receipt.techniques[0]["report"]["compilations"] >= 1
    for name, value in weights_of(usual).items():
        torch.testing.assert_close(weights_of(compiled)[name], value, rtol=1e-3, atol=1e-3)


def test_what_it_cannot_do_is_refused(tmp_path):
    def refused(technique, **settings):
        with pytest.raises(ValueError) as caught:
            tiny_trainer([technique], tmp_path, **settings).train()
        return str(caught.value)

    assert "RegionalCompile(backend='none'" in refused(RegionalCompile(backend="none"))
    assert "does not support torch_compile because that compiles the whole model. Set" in refused(
        RegionalCompile(), torch_compile=True
    )
    model = tiny_convnext()
    model._no_split_modules = []
    assert "no list of the blocks" in refused(RegionalCompile(**TRACED), model=model, modality="image")
