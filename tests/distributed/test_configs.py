"""Every setting that we ship is read by those it is for, and what processes on CPUs can run is run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from ranks import assert_backend, run_on_ranks

from hf_accel import Budget
from hf_accel.testing import losses_of, tiny_trainer

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
ACCELERATE = sorted((CONFIGS / "accelerate").glob("*.yaml"))
DEEPSPEED = sorted((CONFIGS / "deepspeed").glob("*.json"))
ON_CPUS = {"overlap_comm": False}
SCRIPT = """
import sys
from transformers import Trainer, TrainingArguments
from hf_accel.testing import CountingText, collate_padded, tiny_llama

args = TrainingArguments(sys.argv[1], max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
Trainer(tiny_llama(), args, train_dataset=CountingText(16), data_collator=collate_padded).train()
"""


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_files(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    if config.deepspeed_config:
        assert ROOT / config.deepspeed_config["deepspeed_config_file"] in DEEPSPEED
    if config.fsdp_config:
        assert config.fsdp_config["fsdp_version"] == 2


@pytest.mark.ci
@pytest.mark.parametrize("name", [pytest.param("single", marks=pytest.mark.full), "ddp"])
def test_accelerate_launches(name, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        CONFIGS / "accelerate" / f"{name}.yaml",
    ]
    command = [*launch, "--mixed_precision", "no", "-m", "hf_accel.cli", "run", "--technique", "InfoBatch()"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, tmp_path / "script.py", tmp_path], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert (receipt["world_size"], receipt["steps"]) == ({"single": 1, "ddp": 2}[name], 2)


def train(directory, backend, **args):
    trainer = tiny_trainer([Budget("3steps")], directory, **args)
    trainer.train()
    assert_backend(trainer, backend)
    return losses_of(trainer)


@pytest.mark.ci
@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_trains_with_its_files(path, tmp_path):
    config = json.loads(path.read_text())
    config["zero_optimization"] |= ON_CPUS
    if "offload" in path.stem:
        config["zero_force_ds_cpu_optimizer"] = False  # its own is compiled for minutes
    backend = f"zero{config['zero_optimization']['stage']}"
    args = {"use_cpu": False, "optim": "adamw_torch", "deepspeed": config}
    ranks = run_on_ranks(train, tmp_path, backend, backend=backend, **args)
    assert ranks[0] == ranks[1] and all(map(math.isfinite, ranks[0]))


@pytest.mark.ci
def test_fsdp2_trains_with_its_file(tmp_path):
    args = {"use_cpu": True, "fsdp": True, "fsdp_config": str(CONFIGS / "fsdp" / "fsdp2.json")}
    ranks = run_on_ranks(train, tmp_path, "fsdp2", backend="fsdp2", **args)
    assert ranks[0] == ranks[1] and all(map(math.isfinite, ranks[0]))
