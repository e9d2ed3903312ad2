"""The doctor names what was planted, first."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from ranks import run_on_ranks
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from typer.testing import CliRunner

from hf_accel import Budget, LengthGrouped, LocalSGD, Recipe
from hf_accel.cli import app
from hf_accel.testing import CountingText, collate_padded
from hf_accel.tools.doctor import _memory_and_seconds, examine, limited_steps, planned_evaluations, planned_steps
from hf_accel.tools.watch import Watch

pytestmark = pytest.mark.ci

SETTINGS = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
SETTINGS |= {"num_train_epochs": 40, "per_device_train_batch_size": 8, "logging_steps": 50}


class Even(CountingText):
    """All of one length."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        ids = (row["input_ids"] * 24)[:24]
        return {"input_ids": ids, "labels": list(ids)}


def llama():
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes))


def healthy(directory, kind=Trainer, collate=collate_padded, train=None, **args):
    trainer = kind(
        model=llama(),
        args=TrainingArguments(str(directory), **SETTINGS | args),
        train_dataset=train or Even(64),
        eval_dataset=Even(16, seed=1),
        data_collator=collate,
    )
    trainer.pop_callback(PrinterCallback)
    return trainer


def slow_collator(directory):
    def collate(features):
        time.sleep(0.05)
        return collate_padded(features)

    return healthy(directory, collate=collate)


def much_padding(directory):
    def collate(features):
        batch = collate_padded(features)
        return {
            name: torch.nn.functional.pad(value, (0, 60), value=-100 if name == "labels" else 0)
            for name, value in batch.items()
        }

    return healthy(directory, collate=collate)


def values_at_every_step(directory):
    class Printing(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.last = loss.item()
            return loss

    return healthy(directory, kind=Printing)


def logging_at_every_step(directory):
    return healthy(directory, logging_steps=1)


def evaluation_too_often(directory):
    return healthy(directory, eval_strategy="steps", eval_steps=2)


def checkpointing_without_need(directory):
    return healthy(directory, activation_checkpointing=True)


@pytest.mark.parametrize(
    ("planted", "named"),
    [
        (slow_collator, "Data loading: a step waits"),
        (much_padding, "Padding: 71% of the positions"),
        (
            values_at_every_step,
            "Waiting for numbers: every step reads values of tensors (.item(), float(), print) in",
        ),
        (logging_at_every_step, "Logging: logging_steps=1"),
        (evaluation_too_often, "Evaluation: 160 of"),
        pytest.param(  # it compares times of milliseconds, which a busy machine may turn round
            checkpointing_without_need, "Activation checkpointing: it recomputes", marks=pytest.mark.full
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_was_planted_comes_first(planted, named, tmp_path):
    found = examine(planted(tmp_path))
    assert found.findings[0].what.startswith(named), found.findings
    if planted is values_at_every_step:
        assert "test_doctor.py:" in found.findings[0].what
    assert not list(tmp_path.iterdir())


def test_nothing_is_found_where_nothing_was_planted(tmp_path):
    found = examine(healthy(tmp_path))
    assert found.findings == [] and found.traps == []
    assert found.run_seconds == pytest.approx(320 * sum(found.seconds.values()), rel=0.5)


def test_its_own_look_at_a_mask_is_not_the_users(tmp_path):
    class Weighted(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            assert "attention_mask" in inputs
            return 2 * model(**inputs).loss

    found = examine(healthy(tmp_path, kind=Weighted))
    assert not [finding for finding in found.findings if finding.what.startswith("Waiting")]


def test_callbacks_that_want_evaluations_or_report_are_left_out(tmp_path):
    class Told(TensorBoardCallback):
        def __init__(self):
            pass

        def on_train_begin(self, *args, **kwargs):
            raise AssertionError("an examination is not to be reported")

    settings = {"eval_strategy": "steps", "eval_steps": 200, "metric_for_best_model": "loss"}
    trainer = healthy(tmp_path, **settings | {"load_best_model_at_end": True, "save_steps": 200})
    for callback in (EarlyStoppingCallback(), Told()):
        trainer.add_callback(callback)
    assert sum(examine(trainer).seconds.values()) > 0


def test_checkpointing_that_memory_needs_is_no_finding(tmp_path):
    def refuse(model, inputs):
        if not model.is_gradient_checkpointing:
            raise torch.OutOfMemoryError("out of memory")

    trainer = checkpointing_without_need(tmp_path)
    trainer.model.register_forward_pre_hook(refuse)
    assert examine(trainer).findings == []


def test_what_a_forward_pass_keeps_is_counted_once_and_without_weights():
    class Squared(torch.nn.Linear):
        def forward(self, x):
            hidden = super().forward(x)
            return SimpleNamespace(loss=(hidden * hidden).sum())

    inputs = {"x": torch.ones(3, 4, requires_grad=True)}
    trainer = SimpleNamespace(
        model=Squared(4, 5, bias=False), accel=SimpleNamespace(host=SimpleNamespace(prepare_inputs=dict))
    )
    assert _memory_and_seconds(trainer, inputs)[0] == 4 * (3 * 4 + 3 * 5)


def test_techniques_of_a_recipe_are_examined_with_it(tmp_path):
    uneven = examine(healthy(tmp_path, train=CountingText(256, longest=60)))
    grouped = examine(healthy(tmp_path, train=CountingText(256, longest=60)), [LengthGrouped()])
    assert uneven.findings[0].what.startswith("Padding") and "LengthGrouped() would leave" in uneven.findings[0].remedy
    assert not any(finding.what.startswith("Padding") for finding in grouped.findings)


def test_what_grouping_by_length_would_leave():
    watch = Watch()
    watch.lengths_ = [[2, 8], [8, 2], [4, 4]]
    watch.positions_, watch.padding_ = 40, 12
    assert watch.padding == 0.3
    assert watch.padding_when_grouped == 0.0


@pytest.mark.parametrize(
    ("args", "steps", "evaluations"),
    [
        ({}, 320, 0),
        ({"max_steps": 7}, 7, 0),
        ({"gradient_accumulation_steps": 3}, 120, 0),
        ({"eval_strategy": "epoch"}, 320, 40),
        ({"eval_strategy": "steps", "eval_steps": 0.1}, 320, 10),
    ],
)
def test_what_the_run_would_have_been(args, steps, evaluations, tmp_path):
    trainer = healthy(tmp_path, **args)
    assert planned_steps(trainer) == steps
    assert planned_evaluations(trainer.args, steps, trainer.args.num_train_epochs) == evaluations


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"steps": 4}, 4),
        ({"epochs": 2.5}, 20),
        ({"samples": 100}, 12),
        ({"tokens": 1000}, 10),
        ({"seconds": 6, "steps": 50}, 12),
        ({"joules": 5}, None),
    ],
)
def test_what_a_budget_buys(limits, steps):
    each = {"steps": 1.0, "epochs": 0.125, "samples": 8.0, "tokens": 100.0, "seconds": 0.5, "joules": 0.0}
    assert limited_steps(limits, each) == steps


@pytest.mark.parametrize(("budget", "seconds"), [("4steps", 8.0), ("3epochs", 48.0), ("1min", 60.0)])
def test_a_run_lasts_as_long_as_its_budget(budget, seconds, tmp_path, monkeypatch):
    """Of 8 steps in an epoch, each of which takes 2 seconds; the arguments alone ask for 320."""
    monkeypatch.setattr("hf_accel.tools.doctor.statistics.median", lambda values: 2.0)
    found = examine(healthy(tmp_path), [LengthGrouped()], Budget(budget).budget().amounts)
    assert found.run_seconds == pytest.approx(seconds)


def test_a_loss_that_is_mis_scaled_is_a_trap(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=48, **sizes))
    rows = [{"input_ids": [1, 2, 3], "labels": i % 2} for i in range(64)]
    args = TrainingArguments(str(tmp_path), **SETTINGS | {"gradient_accumulation_steps": 4, "num_train_epochs": 60})
    found = examine(Trainer(model, args, train_dataset=rows))
    assert "4 times too large" in found.traps[0].what


def test_a_script_is_examined_and_goes_no_further(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from transformers import Trainer, TrainingArguments\n"
        "from hf_accel.testing import CountingText, collate_padded, tiny_llama\n"
        "args = TrainingArguments('out', report_to=[], use_cpu=True, num_train_epochs=50)\n"
        "trainer = Trainer(tiny_llama(), args, train_dataset=CountingText(32), data_collator=collate_padded)\n"
        "trainer.train()\n"
        "raise RuntimeError('it went on')\n"
    )
    done = CliRunner().invoke(app, ["doctor", str(script)])
    assert done.exit_code == 0, done.output
    assert "Where a step's time goes" in done.output and "forward" in done.output
    (tmp_path / "idle.py").write_text("print('nothing')\n")
    done = CliRunner().invoke(app, ["doctor", str(tmp_path / "idle.py")])
    assert done.exit_code == 2 and "never called Trainer.train()" in " ".join(done.output.split())


def test_a_recipe_is_examined(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i}\n" for i in range(800)))
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "max_position_embeddings": 32}
    data = {"source": str(tmp_path / "text.txt"), "context": 32}
    args = {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "report_to": "none"}
    Recipe("causal-lm", {"config": config}, data, args, "100steps", ["LengthGrouped"]).save(tmp_path / "recipe.yaml")
    done = CliRunner().invoke(app, ["doctor", str(tmp_path / "recipe.yaml")])
    assert done.exit_code == 0, done.output
    assert "Where a step's time goes" in done.output and not (tmp_path / "out").exists()


class OwnLoss(Trainer):
    """Its loss is no output of the model, which does not know the name of its labels."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("target")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def examined_on_a_rank(directory, words, techniques=()):
    """Of a model with so many words, each of which has a gradient that is sent, and little to compute."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    trainer = OwnLoss(
        model=BertForSequenceClassification(BertConfig(vocab_size=words, **sizes)),
        args=TrainingArguments(
            str(directory), **SETTINGS | {"optim": "sgd", "max_grad_norm": 0.0, "remove_unused_columns": False}
        ),
        train_dataset=[{"input_ids": [i % 40 + 1] * 8, "target": i % 2} for i in range(64)],
    )
    trainer.pop_callback(PrinterCallback)
    found = examine(trainer, list(techniques))
    return found.seconds, [finding.what for finding in found.findings]


@pytest.mark.distributed
@pytest.mark.ci
def test_communication_of_two_ranks(tmp_path):
    for seconds, findings in run_on_ranks(examined_on_a_rank, tmp_path, 60_000):
        assert findings[0].startswith("Communication: a step waits"), (seconds, findings)
        assert seconds["communication"] > seconds["forward"]
    for seconds, findings in run_on_ranks(examined_on_a_rank, tmp_path, 60_000, [LocalSGD()]):
        assert "communication" not in seconds and not any(what.startswith("Communication") for what in findings)


def test_one_process_does_not_communicate(tmp_path):
    seconds, findings = examined_on_a_rank(tmp_path, 100)
    assert "communication" not in seconds and not any(what.startswith("Communication") for what in findings)
