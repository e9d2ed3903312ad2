"""What Trainer honors and resumes, the stream does too."""

import json
import os
import signal

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_accel import AccelTrainer, BatchSizeRamp, Budget
from hf_accel.checkpoints.format import CheckpointError
from hf_accel.checkpoints.reader import Heartbeat


class Line(nn.Module):
    """A line through the origin; keeps what it read, and calls something in its third forward pass."""

    def __init__(self, in_third=lambda: None):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))
        self.read, self.in_third = [], in_third

    def forward(self, x, labels=None):
        self.read.append(sorted(x.int().tolist()))
        if len(self.read) == 3:
            self.in_third()
        return {"loss": ((self.slope * x - labels) ** 2).mean()}


def data(n):
    return [{"x": torch.tensor(float(i)), "labels": torch.tensor(2.0 * i)} for i in range(n)]


def trainer(cls, model, tmp_path, n=40, techniques=(), micro_batch_size=None, **args):
    given = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    hosting = {"techniques": list(techniques), "micro_batch_size": micro_batch_size} if cls is AccelTrainer else {}
    return cls(model=model, args=TrainingArguments(**given | args), train_dataset=data(n), **hosting)


@pytest.mark.parametrize("batch_size", [8, 16])
def test_drop_last_leaves_out_what_trainer_leaves_out(batch_size, tmp_path):
    args = dict(
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=4, dataloader_drop_last=True,
        num_train_epochs=2,
    )  # fmt: skip
    found = []
    for cls in (Trainer, AccelTrainer):
        model = Line()
        run = trainer(cls, model, tmp_path, micro_batch_size=batch_size, **args)
        run.train()
        found.append((run.state.global_step, sum(map(len, model.read)), run.state.epoch))
    assert found[1] == found[0]


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_the_checkpoint_of_a_sigterm_is_resumed_with_every_example_read_once(micro_batch_size, tmp_path):
    args = dict(
        per_device_train_batch_size=4, num_train_epochs=1, enable_jit_checkpoint=True, save_strategy="steps",
        save_steps=50, learning_rate=1e-3, optim="sgd",
    )  # fmt: skip
    straight = Line()
    trainer(AccelTrainer, straight, tmp_path / "straight", micro_batch_size=micro_batch_size, **args).train()
    killed = Line(lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        run = trainer(AccelTrainer, killed, tmp_path / "killed", micro_batch_size=micro_batch_size, **args)
        run.train()
        assert run.state.global_step == 3
        resumed = Line()
        run = trainer(AccelTrainer, resumed, tmp_path / "killed", micro_batch_size=micro_batch_size, **args)
        run.train(resume_from_checkpoint=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert killed.read + resumed.read == straight.read
    assert torch.equal(resumed.slope, straight.slope)


def test_a_run_that_is_over_takes_no_step_more(tmp_path):
    args = dict(max_steps=5, save_strategy="steps", save_steps=5, per_device_train_batch_size=8)
    trainer(AccelTrainer, Line(), tmp_path, micro_batch_size=8, **args).train()
    model = Line()
    run = trainer(AccelTrainer, model, tmp_path, micro_batch_size=8, **args)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 5 and model.read == []


def delete_optimizer(checkpoint):
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "scheduler.pt").unlink()


def clear_log(checkpoint):
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | {"log_history": []}))


def replace_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    torch.save({"slope": torch.tensor(1.5)}, checkpoint / "pytorch_model.bin")


@pytest.mark.parametrize("edit", [delete_optimizer, clear_log, replace_weights])
def test_edited_checkpoints_resume_as_in_trainer(edit, tmp_path):
    args = dict(max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=8)
    slopes = []
    for cls in (Trainer, AccelTrainer):
        folder = tmp_path / cls.__name__
        trainer(cls, Line(), folder, **args).train()
        edit(folder / "checkpoint-2")
        run = trainer(cls, Line(), folder, **args)
        run.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        slopes.append((run.state.global_step, run.model.slope.item()))
    assert slopes[0] == slopes[1]


def test_edited_checkpoints_with_techniques_resume_if_changes_are_allowed(tmp_path):
    args = dict(max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=8)
    trainer(AccelTrainer, Line(), tmp_path, techniques=[BatchSizeRamp(0.5)], **args).train()
    clear_log(tmp_path / "checkpoint-2")
    run = trainer(AccelTrainer, Line(), tmp_path, techniques=[BatchSizeRamp(0.5)], **args)
    with pytest.raises(CheckpointError, match=r"Resume from .*checkpoint-4, or set allow_changes=True if you edited"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    run.accel.options.allow_changes = True
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.state.global_step == 4
    (tmp_path / "checkpoint-2" / "accel_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"not complete, accel_state.json .*Resume from .*checkpoint-4\.$"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_size_beside_the_search_for_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="auto_find_batch_size=True does not support micro_batch_size=8 because"):
        trainer(AccelTrainer, Line(), tmp_path, micro_batch_size=8, auto_find_batch_size=True)


def test_a_heartbeat_that_cannot_be_written_ends_no_run(tmp_path):
    run = trainer(AccelTrainer, Line(), tmp_path, techniques=[Budget("1h")], per_device_train_batch_size=8)
    Heartbeat(str(tmp_path), "").path.with_suffix(".tmp").mkdir(parents=True)  # writing to it fails
    run.accel.meter.clock.now = iter(range(0, 100_000, 600)).__next__
    with pytest.warns(UserWarning, match="could not be written"):
        run.train()
    assert run.state.global_step > 0


def test_an_error_that_is_not_of_the_disk_is_passed_on(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(20, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x, labels=None):
            return {"loss": self.head(self.embedding(x.long() % 20)).square().mean()}

    errors = []
    for cls in (Trainer, AccelTrainer):
        run = trainer(cls, Tied(), tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
        with pytest.raises(RuntimeError) as error:
            run.train()
        errors.append((type(error.value), str(error.value)))
    assert errors[1] == errors[0]


def test_one_technique_follows_the_run_that_asks_it(tmp_path):
    args = dict(max_steps=8, per_device_train_batch_size=8)

    def sizes(run, model):
        run.train()
        return [len(rows) for rows in model.read]

    model = Line()
    alone = sizes(trainer(AccelTrainer, model, tmp_path, techniques=[BatchSizeRamp(0.25)], **args), model)
    assert len(set(alone)) > 1
    shared, models = BatchSizeRamp(0.25), [Line(), Line()]
    runs = [trainer(AccelTrainer, model, tmp_path, techniques=[shared], **args) for model in models]
    assert [sizes(run, model) for run, model in zip(runs, models, strict=True)] == [alone, alone]


def test_a_search_of_a_stream_without_techniques_takes_each_trials_arguments(tmp_path):
    pytest.importorskip("optuna")
    from optuna.samplers import GridSampler

    grid = {"per_device_train_batch_size": [8, 16], "num_train_epochs": [1, 3]}

    def updates(cls):
        found = {}

        class Remembers(cls):
            def train(self, *args, **kwargs):
                output = super().train(*args, **kwargs)
                found[self.args.per_device_train_batch_size, self.args.num_train_epochs] = output.global_step
                return output

        hosting = {"micro_batch_size": 4} if cls is AccelTrainer else {}
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=8, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        run = Remembers(model_init=lambda: Line(), args=args, train_dataset=data(64), eval_dataset=data(8), **hosting)
        run.hyperparameter_search(
            hp_space=lambda trial: {name: trial.suggest_categorical(name, values) for name, values in grid.items()},
            n_trials=4, direction="minimize", backend="optuna", sampler=GridSampler(grid, seed=0),
        )  # fmt: skip
        return found

    assert updates(AccelTrainer) == updates(Trainer) == {(8, 1): 8, (8, 3): 24, (16, 1): 4, (16, 3): 12}
