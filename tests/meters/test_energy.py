"""`hf_accel.meters.energy`: counters in a folder like the kernel's, which the test moves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hf_accel import Budget, LearningRateSearch, Technique
from hf_accel.meters.energy import EnergyMeter
from hf_accel.testing import tiny_trainer

CPU = torch.device("cpu")
RANGE = 65_532_610_987


@pytest.fixture
def powercap(tmp_path):
    """Two packages, one with memory that is counted apart and cores that are not."""
    zones = {"0": "package-0", "0:0": "core", "0:1": "dram", "1": "package-1", "2": "psys"}
    for zone, name in zones.items():
        folder = tmp_path / "powercap" / f"intel-rapl:{zone}"
        folder.mkdir(parents=True)
        (folder / "name").write_text(name + "\n")
        (folder / "energy_uj").write_text("1000000\n")
        (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
    return tmp_path / "powercap"


def move(powercap, zone, joules):
    file = powercap / f"intel-rapl:{zone}" / "energy_uj"
    file.write_text(f"{(int(file.read_text()) + round(joules * 1e6)) % RANGE}\n")


def test_packages_and_memory_add_up(powercap):
    meter = EnergyMeter(CPU, powercap=powercap)
    assert meter() == 0.0
    for zone, joules in (("0", 5), ("0:0", 4), ("0:1", 1), ("1", 2), ("2", 9)):
        move(powercap, zone, joules)
    assert meter() == pytest.approx(5 + 1 + 2)
    assert meter() == pytest.approx(8)


def test_counters_wrap_around(powercap):
    meter = EnergyMeter(CPU, powercap=powercap)
    for _ in range(5):
        move(powercap, "1", 30_000)
        meter()
    assert meter() == pytest.approx(150_000)


def test_one_process_of_a_machine_counts(powercap):
    meter = EnergyMeter(CPU, machine=False, powercap=powercap)
    move(powercap, "0", 5)
    assert meter() == 0.0


def test_nothing_is_estimated_where_nothing_is_counted(tmp_path):
    with pytest.raises(ValueError, match=r"joules: this machine counts no energy .* Budget time instead\."):
        EnergyMeter(CPU, powercap=tmp_path)


@dataclass(eq=False)
class Draws(Technique):
    """What the machine draws: so many joules a step."""

    folder: Path = Path()
    joules: float = 50.0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        move(self.folder, "0", self.joules)


def test_a_budget_in_joules_is_kept(powercap, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_accel.meters.energy.POWERCAP", powercap)
    trainer = tiny_trainer([Draws(powercap), Budget("5kJ")], tmp_path)
    trainer.train()
    assert 0.8 * 5000 < trainer.receipt.joules <= 5000
    assert trainer.receipt.final_learning_rate == 0.0
    assert trainer.receipt.to_dict()["joules"] == trainer.state.global_step * 50


@pytest.mark.ci
def test_a_search_of_the_rate_takes_its_share_of_energy(powercap, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_accel.meters.energy.POWERCAP", powercap)
    trainer = tiny_trainer([Draws(powercap), Budget("30kJ"), LearningRateSearch(share=0.6)], tmp_path)
    trainer.train()
    assert 0 < trainer.clock.excluded_cost["joules"] <= 0.6 * 30_000
    assert 0.8 * 30_000 < trainer.receipt.joules <= 30_000
    assert trainer.receipt.final_learning_rate == 0.0


def test_a_budget_in_joules_that_holds_no_step(powercap, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_accel.meters.energy.POWERCAP", powercap)
    trainer = tiny_trainer([Draws(powercap), Budget("40J")], tmp_path)
    with pytest.raises(ValueError, match="is too small for one step and the evaluation and checkpoint after it"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_energy_since_the_last_checkpoint_counts_after_a_kill(powercap, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_accel.meters.energy.POWERCAP", powercap)
    monkeypatch.setattr("hf_accel.engine.callbacks.BEAT_SECONDS", 0.0)

    class Killed(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 30:
                raise KeyboardInterrupt

    saving = {"save_strategy": "steps", "save_steps": 20}
    killed = tiny_trainer([Draws(powercap), Budget("5kJ")], tmp_path, **saving)
    killed.add_callback(Killed())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = tiny_trainer([Draws(powercap), Budget("5kJ")], tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.receipt.joules == 50 * (resumed.state.global_step + 10)  # ten steps were made twice
    assert 0.8 * 5000 < resumed.receipt.joules <= 5000
