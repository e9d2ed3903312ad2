"""Methods of a user's own trainer are honored, or refused by name before the first step."""

import pytest
import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_accel import (
    AccelTrainer,
    Budget,
    ExponentialMovingAverage,
    InfoBatch,
    LayerwiseDecay,
    LengthGrouped,
    LinearToZero,
    Muon,
    accelerated,
    attach,
)

CONFIG = BertConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
DATA = Dataset.from_dict({"input_ids": [[1, i + 3, 2] for i in range(16)], "labels": [i % 2 for i in range(16)]})


def built(cls, tmp_path, techniques=(), callbacks=(), **args):
    torch.manual_seed(0)
    given = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    hosting = {"techniques": list(techniques)} if techniques else {}
    model = BertForSequenceClassification(CONFIG)
    args = TrainingArguments(**given | args)
    return cls(model=model, args=args, train_dataset=DATA, eval_dataset=DATA, callbacks=list(callbacks), **hosting)


def rates(trainer):
    return [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]


def with_own_groups(base):
    class OwnGroups(base):
        def create_optimizer(self, model=None):
            if self.optimizer is None:
                self.optimizer = torch.optim.SGD(self.model.classifier.parameters(), lr=1.0)
            return self.optimizer

    return OwnGroups


def with_own_schedule(base):
    class OwnSchedule(base):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: 0.25)
            return self.lr_scheduler

    return OwnSchedule


def both_ways(make):
    return [make(AccelTrainer), accelerated(make(Trainer))]


@pytest.mark.parametrize("technique", [LayerwiseDecay, Muon])
@pytest.mark.parametrize("cls", both_ways(with_own_groups))
def test_an_own_optimizer_is_not_replaced(cls, technique, tmp_path):
    with pytest.raises(ValueError, match=r"does not support OwnGroups\.create_optimizer"):
        built(cls, tmp_path, [technique()])


@pytest.mark.parametrize("cls", both_ways(with_own_groups))
def test_an_own_optimizer_is_used_beside_other_techniques(cls, tmp_path):
    trainer = built(cls, tmp_path, [LengthGrouped()], max_steps=2)
    before = trainer.model.bert.pooler.dense.weight.detach().clone()
    trainer.train()
    assert torch.equal(trainer.model.bert.pooler.dense.weight, before)


@pytest.mark.parametrize("technique", [LinearToZero(), Budget("1000tok")], ids=repr)
@pytest.mark.parametrize("cls", both_ways(with_own_schedule))
def test_an_own_schedule_is_not_replaced(cls, technique, tmp_path):
    with pytest.raises(ValueError, match="does not support .*(create_scheduler|custom learning-rate schedule)"):
        built(cls, tmp_path, [technique])


@pytest.mark.parametrize("technique", [LengthGrouped(), Budget("4steps")], ids=repr)
@pytest.mark.parametrize("cls", both_ways(with_own_schedule))
def test_an_own_schedule_in_steps_is_followed(cls, technique, tmp_path):
    trainer = built(cls, tmp_path, [technique], num_train_epochs=1)
    trainer.train()
    assert rates(trainer) == pytest.approx([0.25e-2] * 4)


def test_a_given_schedule_is_refused_under_a_budget_of_unknown_steps(tmp_path):
    model = BertForSequenceClassification(CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    given = optimizer, LambdaLR(optimizer, lambda step: max(1 - step / 6, 0))
    with pytest.raises(ValueError, match="custom learning-rate schedule"):
        AccelTrainer(model, args, train_dataset=DATA, optimizers=given, techniques=[Budget("1000tok")])


@pytest.mark.parametrize("method, technique", [("get_train_dataloader", LengthGrouped), ("compute_loss", InfoBatch)])
def test_a_method_of_the_instance_is_refused_under_its_own_name(method, technique, tmp_path):
    trainer = built(Trainer, tmp_path)
    setattr(trainer, method, getattr(trainer, method))
    with pytest.raises(ValueError, match=rf"{technique.__name__}.* trainer overrides|trainer\.{method} makes"):
        attach(trainer, [technique()])
    assert type(trainer) is Trainer


def test_a_training_step_that_is_given_a_whole_step_is_refused_with_a_remedy(tmp_path):
    def made(base):
        class Looks(base):
            def training_step(self, model, inputs, num_items_in_batch=None):
                self.seen = [*getattr(self, "seen", []), tuple(inputs["input_ids"].shape)]
                return super().training_step(model, inputs, num_items_in_batch)

        return Looks

    with pytest.raises(ValueError, match=r"Derive Looks from Trainer and use accelerated\(Looks\)"):
        built(made(AccelTrainer), tmp_path, [LengthGrouped()])
    for cls, techniques in ((made(AccelTrainer), []), (accelerated(made(Trainer)), [LengthGrouped()])):
        trainer = built(cls, tmp_path, techniques, max_steps=2)
        trainer.train()
        assert trainer.seen == [(4, 3), (4, 3)]


def test_an_own_evaluate_evaluates_the_average(tmp_path):
    def made(base):
        class OwnEvaluate(base):
            def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
                loader = self.get_eval_dataloader(eval_dataset)
                output = self.evaluation_loop(loader, "Evaluation", prediction_loss_only=True)
                self.log(output.metrics)
                self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, output.metrics)
                return output.metrics

        return OwnEvaluate

    args = dict(max_steps=6, eval_strategy="steps", eval_steps=2, learning_rate=3e-2)
    found = []
    for cls in (AccelTrainer, made(AccelTrainer), accelerated(made(Trainer))):
        trainer = built(cls, tmp_path, [ExponentialMovingAverage(half_life=20)], **args)
        trainer.train()
        losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
        assert losses[-1] == pytest.approx(trainer.evaluate()["eval_loss"])  # of the average, which is returned
        found.append(losses)
    assert found[1] == pytest.approx(found[0]) and found[2] == pytest.approx(found[0])


@pytest.mark.parametrize(
    "hosting", [{}, {"techniques": [LengthGrouped()]}, {"techniques": [Budget("4steps")]}], ids=str
)
def test_a_schedule_that_is_made_before_train_follows_the_run(hosting, tmp_path):
    trainer = built(AccelTrainer, tmp_path, **hosting, max_steps=-1 if "Budget" in str(hosting) else 4)
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    trainer.train()
    assert rates(trainer) == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


@pytest.mark.parametrize("technique", [LengthGrouped(), Budget("4steps")], ids=str)
def test_a_schedule_that_is_made_before_train_counts_its_own_steps(technique, tmp_path):
    trainer = built(AccelTrainer, tmp_path, [technique])
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    found = []
    for _ in range(4):
        found.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert found == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


class Looks(TrainerCallback):
    """Looks at batches, and asks how long the loader is."""

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.shape = tuple(next(iter(train_dataloader))["input_ids"].shape)

    def on_step_end(self, args, state, control, **kwargs):
        self.length = len(self.trainer.get_train_dataloader())
        next(iter(self.trainer.get_train_dataloader()))


def test_looking_at_the_loader_changes_nothing(tmp_path):
    plain = built(AccelTrainer, tmp_path, [LengthGrouped()], num_train_epochs=2)
    plain.train()
    looks = Looks()
    trainer = looks.trainer = built(AccelTrainer, tmp_path, [LengthGrouped()], [looks], num_train_epochs=2)
    batch = next(iter(trainer.get_train_dataloader()))
    assert {name: tuple(value.shape) for name, value in batch.items()} == {"input_ids": (4, 3), "labels": (4,)}
    loader = trainer.get_train_dataloader()
    assert (loader.total_batch_size, loader.num_workers, loader.prefetch_factor) == (4, 0, None)
    trainer.train()
    assert looks.shape == (4, 3) and looks.length == 4
    assert rates(trainer) == rates(plain) and trainer.state.epoch == plain.state.epoch == 2.0
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name
