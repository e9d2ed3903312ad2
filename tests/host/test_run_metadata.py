"""What a run leaves behind: logs for `report_to`, recipe, receipt, model card and what is pushed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import torch
from huggingface_hub import CommitInfo, RepoUrl
from rich.console import Console
from transformers import TrainerCallback, TrainingArguments

from hf_accel import AccelTrainer, Budget, ExponentialMovingAverage, InfoBatch, Recipe
from hf_accel.receipt import PHASES, Receipt
from hf_accel.testing import CountingText, collate_padded, tiny_llama, tiny_trainer

TECHNIQUES = ["Budget(limit='20steps')", "InfoBatch(keep=0.5, end=0.875)", "ExponentialMovingAverage(half_life=5.0)"]


def techniques():
    return [Budget("20steps"), InfoBatch(), ExponentialMovingAverage(5.0)]


class Reporting(TrainerCallback):
    """Stands for what `report_to` names."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_progress_is_reported(tmp_path):
    trainer, reporting = tiny_trainer(techniques(), tmp_path), Reporting()
    trainer.add_callback(reporting)
    trainer.train()
    progress = [logs["accel/progress"] for logs in reporting.seen if "loss" in logs]
    assert progress == pytest.approx([step / 20 for step in range(1, 21)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    settings = {"save_strategy": "steps", "save_steps": 10, "weight_decay": 0.1, "seed": 3}
    settings |= {"eval_strategy": "steps", "eval_steps": 10}
    settings |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}}
    trainer = tiny_trainer(techniques(), directory, **settings)
    trainer.train()
    trainer.save_model(str(directory / "saved"))
    return trainer


def test_recipe_and_receipt_lie_where_the_model_does(run):
    output = Path(run.args.output_dir)
    for place, names in {
        output: {"recipe.yaml", "receipt.json"},
        output / "saved": {"recipe.yaml", "receipt.json", "model.safetensors"},
        output / "checkpoint-10": {"recipe.yaml"},
        output / "checkpoint-20": {"recipe.yaml"},
    }.items():
        assert names <= {path.name for path in place.iterdir()}
    assert not (output / "checkpoint-10" / "receipt.json").exists()


def test_the_parts_of_a_receipt_are_not_cut_off(run):
    console = Console(width=60, file=io.StringIO())
    console.print(run.receipt.table())
    text = console.file.getvalue()
    assert "\u2026" not in text and "2.Exponential" not in text


@pytest.mark.parametrize("place", ["", "saved", "checkpoint-10"])
def test_the_recipe_builds_the_same_run(place, run, tmp_path):
    recipe = Recipe.load(Path(run.args.output_dir, place, "recipe.yaml"))
    assert [repr(technique) for technique in recipe.build_techniques()] == TECHNIQUES
    longer = recipe.with_changes("budget=7steps").build_techniques()
    assert repr(longer[0]) == repr(Budget("7steps")) and list(map(repr, longer[1:])) == TECHNIQUES[1:]
    again = AccelTrainer(
        tiny_llama(),
        TrainingArguments(str(tmp_path), report_to=[]),
        data_collator=collate_padded,
        train_dataset=CountingText(),
        eval_dataset=CountingText(16, seed=1),
        recipe=recipe,
    )
    theirs, ours = again.args.to_dict(), run.args.to_dict()
    assert {name for name in ours if ours[name] != theirs[name]} <= {"output_dir", "logging_dir", "run_name"}
    assert [repr(technique) for technique in again.techniques] == TECHNIQUES


def test_a_run_of_its_recipe_is_the_same_run(run, tmp_path):
    again = AccelTrainer(
        tiny_llama(),
        TrainingArguments(str(tmp_path), report_to=[]),
        data_collator=collate_padded,
        train_dataset=CountingText(),
        eval_dataset=CountingText(16, seed=1),
        recipe=Path(run.args.output_dir, "recipe.yaml"),
    )
    again.train()
    theirs, ours = again.model.state_dict(), run.model.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_the_receipt_survives_as_json(run):
    document = json.loads(Path(run.args.output_dir, "receipt.json").read_text())
    assert document == run.receipt.to_dict()
    rates = {document.pop("samples_per_second"), document.pop("tokens_per_second")}
    assert Receipt(**document) == run.receipt and rates == {
        run.receipt.samples / run.receipt.wall_seconds,
        run.receipt.tokens / run.receipt.wall_seconds,
    }


class Counting(TrainerCallback):
    """Counts at the model's door."""

    def __init__(self, model):
        self.samples = self.tokens = 0
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, inputs):
        if module.training:
            self.samples += len(inputs["input_ids"])
            self.tokens += int(inputs["attention_mask"].sum())


@pytest.mark.parametrize("names", [[], ["Budget"], ["Budget", "InfoBatch", "EMA"]], ids=len)
def test_the_receipt_counts_right(names, tmp_path):
    every = {"save_strategy": "steps", "save_steps": 10, "eval_strategy": "steps", "eval_steps": 10}
    trainer = tiny_trainer(techniques()[: len(names)], tmp_path, **every)
    counting = Counting(trainer.model)
    trainer.train()
    receipt = trainer.receipt
    assert (receipt.samples, receipt.tokens) == (counting.samples, counting.tokens)
    assert receipt.steps == trainer.state.global_step == (20 if names else 24)
    # Each second is charged once: phases and techniques together are the whole run.
    assert sum(receipt.seconds.values()) == pytest.approx(receipt.wall_seconds, abs=0.05)
    assert min(receipt.seconds.values()) >= 0
    assert {"other", *PHASES} <= receipt.seconds.keys()
    assert [entry["technique"] for entry in receipt.techniques] == TECHNIQUES[: len(names)]
    assert all(0 <= entry["seconds"] <= receipt.wall_seconds for entry in receipt.techniques)


def test_the_receipt_is_readable(run):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(run.receipt.table())
    text = console.export_text()
    for words in ("20 steps", "InfoBatch(keep=0.5", "half_life", "forward", "peak memory", "final learning rate"):
        assert words in text, text
    assert all(len(line) <= 100 for line in text.split("\n"))


# Cards and pushes -----------------------------------------------------------------------------------------------------


def test_the_model_card_names_techniques_budget_and_receipt(run):
    run.create_model_card(model_name="tiny")
    for _ in range(2):  # written anew each time, not once more
        run.create_model_card(model_name="tiny")
    text = Path(run.args.output_dir, "README.md").read_text()
    assert text.count("### Training with hf_accel") == 1
    assert all(f"- `{technique}`" in text for technique in TECHNIQUES)
    assert "| Training Loss | Epoch  | Step | Validation Loss |\n" in text
    assert "Limit: 20 steps." in text and "`receipt.json`" in text and "`recipe.yaml`" in text


class Hub:
    """The functions of `huggingface_hub` that speak HTTP, without it; remembers what each folder held."""

    def __init__(self):
        self.uploads = []

    def create_repo(self, repo_id, **kwargs):
        return RepoUrl(f"https://huggingface.co/someone/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, run_as_future=False, path_in_repo="", **kwargs):
        names = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*")}
        self.uploads.append((path_in_repo, names, Path(folder_path), kwargs["commit_message"]))
        url = f"https://huggingface.co/{repo_id}/commit/0"
        commit = CommitInfo(url, commit_message="", commit_description="", oid="0")
        return mock.Mock(is_done=lambda: True, result=lambda: commit) if run_as_future else commit


@pytest.fixture
def hub():
    hub = Hub()
    with (
        mock.patch.object(huggingface_hub.HfApi, "create_repo", lambda self, *a, **k: hub.create_repo(*a, **k)),
        mock.patch.object(huggingface_hub.HfApi, "upload_folder", lambda self, **k: hub.upload_folder(**k)),
        mock.patch.object(huggingface_hub.HfApi, "create_branch", lambda self, *a, **k: None),
        mock.patch("transformers.trainer.create_repo", hub.create_repo, create=True),
    ):
        yield hub


def test_a_push_holds_both_papers_and_a_card(hub, tmp_path):
    trainer = tiny_trainer(techniques(), tmp_path)
    trainer.train()
    trainer.push_to_hub()
    ((_, names, folder, _),) = hub.uploads
    assert {"recipe.yaml", "receipt.json", "model.safetensors", "README.md"} <= names
    assert "ExponentialMovingAverage" in (folder / "README.md").read_text()


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_pushes_in_mid_training_hold_whole_checkpoints(strategy, hub, tmp_path):
    every = {"save_strategy": "steps", "save_steps": 10, "push_to_hub": True, "hub_strategy": strategy}
    trainer = tiny_trainer(techniques(), tmp_path, hub_always_push=True, **every)
    trainer.train()
    places = {"checkpoint": ["last-checkpoint"] * 2, "all_checkpoints": ["checkpoint-10", "checkpoint-20"]}
    checkpoints = [(place, names) for place, names, _, _ in hub.uploads if place]
    assert [place for place, _ in checkpoints] == places.get(strategy, [])
    for _, names in checkpoints:
        assert {"accel_complete.json", "accel_state.json", "averaged.safetensors", "recipe.yaml"} <= names
        assert "accel_incomplete" not in names
    models = [names for place, names, _, _ in hub.uploads if not place]
    assert len(models) == 2 and all({"recipe.yaml", "model.safetensors"} <= names for names in models)
