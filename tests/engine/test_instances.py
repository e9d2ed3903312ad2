"""An instance of a technique belongs to one run at a time; a class is no instance."""

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_accel import (
    AccelTrainer,
    BatchSizeRamp,
    ExponentialMovingAverage,
    LayerFreezing,
    LengthGrouped,
    Muon,
    ProgressiveLayerDrop,
    accelerated,
    attach,
)
from hf_accel.technique import Technique
from hf_accel.testing import CountingText, collate_padded, tiny_llama, tiny_trainer


def build(cls, tmp_path, techniques):
    args = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    return cls(
        model=tiny_llama(), args=args, train_dataset=CountingText(), data_collator=collate_padded, techniques=techniques
    )  # fmt: skip


def attached(tmp_path, techniques):
    trainer = tiny_trainer([], tmp_path, trainer_class=Trainer)
    attach(trainer, techniques)
    return trainer


WAYS = {
    "AccelTrainer": lambda tmp_path, techniques: build(AccelTrainer, tmp_path, techniques),
    "accelerated": lambda tmp_path, techniques: build(accelerated(type("Own", (Trainer,), {})), tmp_path, techniques),
    "attach": attached,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [LengthGrouped, ExponentialMovingAverage, Muon])
def test_a_class_is_refused_and_left_alone(kind, way, tmp_path):
    with pytest.raises(ValueError, match=rf"not an instance of a technique. Pass one, such as {kind.__name__}\(\)"):
        WAYS[way](tmp_path, [kind])
    assert kind.run_ is Technique.run_ is None
    trainer = tiny_trainer([], tmp_path, trainer_class=Trainer)
    trainer.add_callback(kind())
    with pytest.raises(ValueError, match="which a callback of a plain Trainer cannot do"):
        trainer.train()


@pytest.mark.parametrize("way", WAYS)
def test_after_a_run_a_plain_trainer_refuses_the_technique(way, tmp_path):
    technique = LengthGrouped()
    WAYS[way](tmp_path, [technique]).train()
    for callback in (technique, LengthGrouped()):
        trainer = tiny_trainer([], tmp_path, trainer_class=Trainer)
        trainer.add_callback(callback)
        with pytest.raises(ValueError, match=r"a plain Trainer cannot do. Use AccelTrainer"):
            trainer.train()


SHARED = [BatchSizeRamp, LayerFreezing, ProgressiveLayerDrop, ExponentialMovingAverage, LengthGrouped]


@pytest.mark.parametrize("kind", SHARED)
def test_one_instance_trains_in_two_trainers_in_turn(kind, tmp_path):
    """Both are built before the first trains, as for cross-validation."""
    alone = tiny_trainer([kind()], tmp_path / "alone")
    alone.train()
    technique = kind()
    for trainer in [tiny_trainer([technique], tmp_path / name) for name in ("first", "second")]:
        trainer.train()
        assert trainer.receipt.techniques[0]["report"] == alone.receipt.techniques[0]["report"]
        assert trainer.state.global_step == alone.state.global_step


def test_an_instance_that_is_training_is_refused_elsewhere(tmp_path):
    technique = LengthGrouped()
    outer = tiny_trainer([technique], tmp_path / "outer", max_steps=2)
    plain = tiny_trainer([], tmp_path / "inner", trainer_class=Trainer)

    class Inner(TrainerCallback):
        refused = 0

        def on_step_end(self, args, state, control, **kwargs):
            given = {"model": plain.model, "args": plain.args, "techniques": [technique]}
            for make in (AccelTrainer, accelerated(Trainer)):
                with pytest.raises(ValueError, match="is training in another trainer. Make a new instance."):
                    make(**given)
            with pytest.raises(ValueError, match="is training in another trainer. Make a new instance."):
                attach(plain, [technique])
            self.refused += 1

    outer.add_callback(inner := Inner())
    outer.train()
    assert inner.refused == outer.state.global_step == 2 and type(plain) is Trainer


def test_an_interrupted_run_frees_its_techniques(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    technique = LengthGrouped()
    trainer = tiny_trainer([technique], tmp_path)
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    tiny_trainer([technique], tmp_path, max_steps=1).train()
