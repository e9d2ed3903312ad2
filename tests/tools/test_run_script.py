"""``hf-accel run``: unmodified scripts, with and without techniques."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_other_trainers import BUILDERS
from transformers import Trainer
from typer.testing import CliRunner

from hf_accel import Recipe
from hf_accel.cli import app
from hf_accel.tools.run_script import attached
from hf_accel.trainer import AccelTrainerMixin

SCRIPT = """
import sys

from transformers import Trainer, TrainingArguments, set_seed

from hf_accel.testing import CountingText, collate_padded, tiny_llama

class Own(Trainer):
    def log(self, *args, **kwargs):
        super().log(*args, **kwargs)

set_seed(1)
kind = Own if "--own" in sys.argv else Trainer
args = TrainingArguments(
    sys.argv[1], num_train_epochs=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no"
)
trainer = kind(tiny_llama(), args, train_dataset=CountingText(16), data_collator=collate_padded)
trainer.train()
trainer.save_model()
"""
pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' own


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(autouse=True)
def as_found(monkeypatch):
    """What the command changes of its process ends with the test."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))


def run(*arguments):
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.ci
def test_nothing_attached_is_plain_python(script, tmp_path):
    subprocess.run([sys.executable, script, tmp_path / "plain"], check=True, capture_output=True)
    done = run(script, tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "run"))
    assert not (tmp_path / "run" / "receipt.json").exists()


@pytest.mark.parametrize("own", [(), ("--own",)], ids=["Trainer", "a subclass of the script's own"])
def test_techniques_are_attached(own, script, tmp_path):
    done = run(
        "--technique",
        "InfoBatch(keep=0.5)",
        "--technique",
        "Packing()",
        "--budget",
        "7steps",
        script,
        tmp_path / "out",
        *own,
    )
    assert done.exit_code == 0, done.output
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert [entry["technique"].partition("(")[0] for entry in receipt["techniques"]] == [
        "Budget",
        "InfoBatch",
        "Packing",
    ]
    assert receipt["steps"] == 7 and receipt["final_learning_rate"] == 0.0


def test_a_recipe_gives_arguments_too(script, tmp_path):
    Recipe(args={"learning_rate": 1e-2}, budget="5steps").save(tmp_path / "recipe.yaml")
    done = run("--recipe", tmp_path / "recipe.yaml", script, tmp_path / "out")
    assert done.exit_code == 0, done.output
    saved = Recipe.load(tmp_path / "out" / "recipe.yaml")
    assert saved.args["learning_rate"] == 1e-2 and saved.build_techniques()[0].limit == "5steps"


def test_a_recipe_gives_the_size_of_a_batch_and_the_seed(script, tmp_path):
    script.write_text(SCRIPT.replace("per_device_train_batch_size=4, ", ""))
    runs = []
    for seed in (1, 2):
        args = {"per_device_train_batch_size": 2, "seed": seed, "report_to": "none"}
        Recipe(args=args, budget="5steps").save(tmp_path / "recipe.yaml")
        done = run("--recipe", tmp_path / "recipe.yaml", script, tmp_path / "out")
        assert done.exit_code == 0, done.output
        assert json.loads((tmp_path / "out" / "receipt.json").read_text())["samples"] == 10
        runs.append(weights(tmp_path / "out"))
    assert not same(*runs)


def test_a_plain_run_resumes_with_techniques_if_changes_are_allowed(script, tmp_path):
    resumes = "trainer.train(resume_from_checkpoint='--resume' in sys.argv)"
    script.write_text(SCRIPT.replace('"no"', '"epoch"').replace("trainer.train()", resumes))
    assert run(script, tmp_path / "out").exit_code == 0
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    given = ("--technique", "InfoBatch(keep=0.5)", script, tmp_path / "out", "--resume")
    refused, done = run(*given), run("--allow-changes", *given)
    assert refused.exit_code == 2 and "or set allow_changes=True" in refused.output
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "receipt.json").read_text())["progress"] == 1


@pytest.mark.parametrize("name", ["label_smoothing_factor", "full_determinism", "enable_jit_checkpoint"])
def test_what_a_trainer_has_settled_is_refused(name, script, tmp_path):
    value = 0.1 if name == "label_smoothing_factor" else True
    Recipe(args={name: value}, budget="5steps").save(tmp_path / "recipe.yaml")
    done = run("--recipe", tmp_path / "recipe.yaml", script, tmp_path / "out")
    assert done.exit_code == 2 and f"args.{name}: the script built its trainer" in done.output


@pytest.mark.parametrize("name", BUILDERS)
def test_every_trainer_is_equipped(name, tmp_path):
    with attached(Recipe(budget="3steps")):
        trainer = BUILDERS[name](tmp_path)
        assert not isinstance(trainer, AccelTrainerMixin)
        trainer.train()
    assert trainer.receipt.steps == 3
    assert "attached" not in Trainer.train.__qualname__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--technique", "InfoBach()"], "Did you mean 'InfoBatch'?"),
        (["--technique", "InfoBatch(keep=2)"], "keep must be"),
        (["--budget", "half an hour"], "Write, for example, '30min'"),
        (["--recipe", "missing.yaml"], "there is no such file"),
        (["--technique", "Mixup()"], "Mixup"),
        (["--technique", "Budget('3steps')", "--budget", "4steps"], "is a budget, too"),
    ],
)
def test_a_mistake_is_one_sentence(options, message, script, tmp_path):
    done = run(*options, script, tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split()) and "Traceback" not in done.output
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_recipe_for_another_task_is_refused(script, tmp_path):
    Recipe(task="sequence-classification", budget="3steps").save(tmp_path / "recipe.yaml")
    done = run("--recipe", tmp_path / "recipe.yaml", script, tmp_path / "out")
    assert done.exit_code == 2
    assert "the script trains a LlamaForCausalLM" in " ".join(done.output.split())


def test_a_script_that_is_not_there(tmp_path):
    done = run(tmp_path / "none.py")
    assert done.exit_code == 2 and "there is no such file" in done.output


@pytest.mark.distributed
@pytest.mark.ci
def test_two_ranks_started_by_torchrun(script, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [*launcher, "-m", "hf_accel.cli", "run", "--budget", "3steps", script, tmp_path / "out"]
    root = str(Path(__file__).parents[2])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert (receipt["steps"], receipt["world_size"]) == (3, 2)


def test_a_budget_on_the_command_line_replaces_the_scripts_max_steps(script, tmp_path):
    script.write_text(SCRIPT.replace("num_train_epochs=2", "max_steps=1000"))
    done = run("--budget", "3steps", script, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "replaces max_steps=1000 of the script by max_steps=-1" in done.output
    assert json.loads((tmp_path / "out" / "receipt.json").read_text())["steps"] == 3


def test_a_recipes_max_steps_replace_the_scripts(script, tmp_path):
    script.write_text(SCRIPT.replace("num_train_epochs=2", "max_steps=1000"))
    Recipe(args={"max_steps": 5}).save(tmp_path / "recipe.yaml")
    done = run("--recipe", tmp_path / "recipe.yaml", script, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "args.max_steps of the recipe replaces max_steps=1000" in done.output
    assert json.loads((tmp_path / "out" / "receipt.json").read_text())["steps"] == 5


def test_a_script_of_an_iterable_data_set_can_be_budgeted(script, tmp_path):
    data = "datasets.Dataset.from_list([CountingText(16)[i] for i in range(16)]).to_iterable_dataset()"
    streaming = SCRIPT.replace("num_train_epochs=2", "max_steps=1000").replace("CountingText(16)", data)
    script.write_text("import datasets\n" + streaming)
    done = run("--budget", "12samples", script, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "receipt.json").read_text())["steps"] == 3


def test_a_warm_up_in_steps_becomes_its_share_of_the_budget(script, tmp_path):
    # 16 examples in batches of 4, twice: 8 updates, 2 of them a warm-up.
    rates = "\nprint('RATES', [log['learning_rate'] for log in trainer.state.log_history if 'learning_rate' in log])\n"
    script.write_text(
        SCRIPT.replace("num_train_epochs=2", "warmup_steps=2, logging_steps=1, learning_rate=1.0") + rates
    )
    script.write_text(script.read_text().replace("warmup_steps=2", "num_train_epochs=2, warmup_steps=2"))
    done = run("--budget", "64samples", script, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "replaces warmup_steps=2 of the script by warmup_steps=0.25" in done.output
    rates = json.loads(done.output.partition("RATES ")[2].partition("\n")[0])
    right = [i / 4 for i in range(4)] + [(16 - i) / 12 for i in range(4, 16)]  # 16 updates, 4 of them a warm-up
    assert rates == pytest.approx(right)


def test_a_schedule_on_the_command_line_replaces_the_scripts_warm_up(script, tmp_path):
    script.write_text(SCRIPT.replace("num_train_epochs=2", "num_train_epochs=2, warmup_steps=100"))
    done = run("--technique", "LinearToZero()", script, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "LinearToZero" in done.output and "replaces warmup_steps=100 of the script" in done.output


LOOP = "print('a loop of its own')\n"


@pytest.mark.parametrize("ending", ["", "import sys\nsys.exit(0)\n"])
def test_a_script_without_a_trainer_is_told_so(ending, tmp_path):
    path = tmp_path / "loop.py"
    path.write_text(LOOP + ending)
    done = run("--budget", "3steps", path)
    assert done.exit_code == 0
    assert "nothing was attached" in done.output


def test_a_train_of_the_scripts_own_runs_once(script, tmp_path):
    own = """
    calls = 0
    def train(self, *args, **kwargs):
        self.calls += 1
        result = super().train(*args, **kwargs)
        print("CALLS", self.calls, "STEPS", self.state.global_step)
        return result
"""
    script.write_text(SCRIPT.replace("class Own(Trainer):", "class Own(Trainer):" + own))
    done = run("--budget", "3steps", script, tmp_path / "out", "--own")
    assert done.exit_code == 0, done.output
    assert done.output.count("CALLS") == 1 and "CALLS 1 STEPS 3" in done.output
