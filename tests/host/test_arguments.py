"""Every field of TrainingArguments while the stream is active: honored, re-interpreted or refused, and shown to be so.

A field is honored where a streamed run with another value than the default is a plain Trainer's run with that value:
weights, log, files, state and outfit.  ``pytest tests/host/test_arguments.py -m "not full" --write-docs`` writes
docs/training_arguments.md from what passed.
"""

import datetime
import functools
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import ParallelismConfig
from ranks import backend_args, run_on_ranks
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import SchedulerType

from hf_accel import AccelTrainer, Budget, LengthGrouped, Technique
from hf_accel.checkpoints.format import integrity_error
from hf_accel.engine.callbacks import SigtermCallback
from hf_accel.host import REFUSED, REINTERPRETED, TESTED, treatment
from hf_accel.testing import CountingText, collate_padded, largest_difference, losses_of, tiny_trainer, weights_of

pytestmark = pytest.mark.ci

TABLE = Path(__file__).parents[2] / "docs" / "training_arguments.md"
FIELDS = [field.name for field in fields(TrainingArguments)]


@dataclass(eq=False)
class Watch(Technique):
    """Sees every example's loss and changes nothing; so batches come from the stream."""

    def observe(self, ids_B, losses_B):
        pass


EVALUATED = {"eval_strategy": "steps", "eval_steps": 5}
SAVED = {"save_strategy": "steps", "save_steps": 4}
BEST = EVALUATED | SAVED | {"save_steps": 5, "load_best_model_at_end": True}
DIVERGING = {"optim": "sgd", "learning_rate": 1e9, "max_grad_norm": 0.0}

HONORED = {
    "output_dir": ("elsewhere", SAVED),
    "learning_rate": (1e-3, {}),
    "lr_scheduler_kwargs": ({"num_cycles": 2}, {"lr_scheduler_type": "cosine_with_restarts"}),
    "optim": ("sgd", {}),
    "optim_args": ("momentum=0.9", {"optim": "sgd"}),
    "weight_decay": (0.1, {}),
    "adam_beta1": (0.8, {}),
    "adam_beta2": (0.9, {}),
    "adam_epsilon": (1e-3, {}),
    "max_grad_norm": (0.1, {}),
    "label_smoothing_factor": (0.1, {}),
    "bf16": (True, {}),
    "bf16_full_eval": (True, EVALUATED),
    "fp16_full_eval": (True, EVALUATED),
    "activation_checkpointing": (True, {}),
    "activation_checkpointing_kwargs": ({"use_reentrant": True}, {"activation_checkpointing": True}),
    "gradient_checkpointing": (True, {}),
    "gradient_checkpointing_kwargs": ({"use_reentrant": True}, {"gradient_checkpointing": True}),
    "use_cache": (True, {}),
    "neftune_noise_alpha": (5.0, {}),
    "logging_strategy": ("epoch", {}),
    "logging_first_step": (True, {"logging_steps": 5}),
    "logging_nan_inf_filter": (False, DIVERGING),
    "include_num_input_tokens_seen": ("all", {}),
    "log_level": ("error", {}),
    "disable_tqdm": (False, {}),
    "eval_strategy": ("epoch", {}),
    "eval_delay": (7, EVALUATED),
    "per_device_eval_batch_size": (4, EVALUATED),
    "prediction_loss_only": (True, EVALUATED),
    "eval_on_start": (True, EVALUATED),
    "eval_do_concat_batches": (False, EVALUATED),
    "include_for_metrics": (["inputs", "loss"], EVALUATED),
    "batch_eval_metrics": (True, EVALUATED | {"per_device_eval_batch_size": 4}),
    "save_only_model": (True, SAVED),
    "save_strategy": ("epoch", {}),
    "load_best_model_at_end": (True, EVALUATED | SAVED | {"save_steps": 5}),
    "metric_for_best_model": ("eval_parts", BEST),
    "greater_is_better": (True, BEST),
    "seed": (11, {}),
    "data_seed": (11, {}),
    "full_determinism": (True, {}),
    "dataloader_drop_last": (True, {"per_device_train_batch_size": 7}),
    "remove_unused_columns": (False, {}),
    "label_names": (["labels", "attention_mask"], EVALUATED),
    "skip_memory_metrics": (False, {}),
}
"""Another value than the default, and the arguments beside which it matters."""

UNSEEN = {
    "torch_empty_cache_steps": (2, {}),
    "log_on_each_node": (False, {}),
    "log_level_replica": ("error", {}),
    "run_name": ("a run", {}),
    "project": ("a project", {}),
    "eval_use_gather_object": (True, EVALUATED),
    "eval_accumulation_steps": (1, EVALUATED),
    "save_on_each_node": (True, SAVED),
    "dataloader_num_workers": (2, {}),
    "dataloader_pin_memory": (True, {}),
    "dataloader_persistent_workers": (True, {"dataloader_num_workers": 1}),
    "dataloader_prefetch_factor": (4, {"dataloader_num_workers": 1}),
    "dataloader_multiprocessing_context": ("forkserver", {"dataloader_num_workers": 1, "num_train_epochs": 1}),
    "do_train": (True, {}),
    "do_eval": (True, {}),
    "do_predict": (True, {}),
    "resume_from_checkpoint": ("checkpoint-1", {}),
    "debug": ("underflow_overflow", {}),
    "torch_compile": (True, {"torch_compile_backend": "eager", "num_train_epochs": 1}),
    "torch_compile_backend": ("aot_eager", {"torch_compile": True, "num_train_epochs": 1}),
}
"""The same, where one process on a CPU gives the same outcome with the default value."""


NOT_RUN = {
    "fp16": "needs a GPU",
    "tf32": "needs a GPU",
    "use_liger_kernel": "needs a GPU and liger-kernel",
    "liger_kernel_config": "needs a GPU and liger-kernel",
    "torch_compile_mode": "its modes other than the default need a GPU",
    "optim_target_modules": "needs galore-torch, apollo-torch or q-galore-torch",
    "report_to": "needs a tracker; `Trainer.log` is called as ever",
    "trackio_space_id": "needs a hub",
    "trackio_bucket_id": "needs a hub",
    "trackio_static_space_id": "needs a hub",
    "push_to_hub": "needs a hub",
    "hub_token": "needs a hub",
    "hub_private_repo": "needs a hub",
    "hub_model_id": "needs a hub",
    "hub_strategy": "needs a hub",
    "hub_always_push": "needs a hub",
    "hub_revision": "needs a hub",
    "local_rank": "set by the launcher",
}
"""Honored as far as we know, for the stream does not touch them; why it is not shown here."""

ELSEWHERE = {
    "fsdp": "tests/distributed/test_contract.py",
    "fsdp_config": "tests/distributed/test_contract.py",
    "deepspeed": "tests/distributed/test_contract.py",
}
"""Shown by other tests."""

ON_RANKS = {
    "average_tokens_across_devices": False,
    "ddp_find_unused_parameters": False,
    "ddp_bucket_cap_mb": 1,
    "ddp_broadcast_buffers": False,
    "ddp_static_graph": True,
    "ddp_backend": "gloo",
    "ddp_timeout": 77,
}
"""Honored on two ranks under DDP: another value than the default."""


class Annotated(CountingText):
    """With a column that the model does not take."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"remark": index}


class NotingCollator:
    """Pads, and notes whether the column that the model does not take came through."""

    def __init__(self):
        self.remarks = set()

    def __call__(self, features):
        self.remarks.add("remark" in features[0])
        return collate_padded(features)


class Noting(TrainerCallback):
    """Notes events and positions, as a callback of somebody else sees them."""

    def __init__(self):
        self.events = []

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(("step", state.global_step, state.epoch))

    def on_evaluate(self, args, state, control, **kwargs):
        self.events.append(("evaluate", state.global_step, state.epoch))

    def on_save(self, args, state, control, **kwargs):
        self.events.append(("save", state.global_step, state.epoch))


def describe_predictions(predictions, compute_result=True):
    """Metrics that show how Trainer evaluates."""
    parts, labels = predictions.predictions, predictions.label_ids
    return {
        "parts": len(parts),
        "labels": len(labels) if isinstance(labels, tuple | list) else 0,
        "listed": isinstance(parts, list),
        "inputs": predictions.inputs is not None,
        "losses": predictions.losses is not None,
        "last": compute_result,
    }


def trainer_of(kind, directory, **args):
    """A trainer with everything that an argument might touch."""
    args = {"num_train_epochs": 2, "output_dir": str(directory / "out")} | args
    if not Path(args["output_dir"]).is_absolute():
        args["output_dir"] = str(directory / args["output_dir"])
    trainer = tiny_trainer([Watch()] if kind is AccelTrainer else [], directory, trainer_class=kind, **args)
    trainer.train_dataset, trainer.data_collator = Annotated(), NotingCollator()
    trainer.compute_metrics = describe_predictions
    trainer.noting = Noting()
    trainer.add_callback(trainer.noting)
    return trainer


def outcome(trainer, directory):
    """What a finished run shows."""
    ours = ("accel_", "recipe.yaml", "receipt.json")
    timed = ("runtime", "per_second", "accel/")
    logs = [
        {k: repr(v) if "_mem_" not in k else "some bytes" for k, v in entry.items() if not any(t in k for t in timed)}
        for entry in trainer.state.log_history
    ]
    callbacks = [c for c in trainer.callback_handler.callbacks if not type(c).__module__.startswith("hf_accel")]
    state, model, optimizer = trainer.state, trainer.model, trainer.optimizer
    recomputing = getattr(model.model.layers[0], "_gradient_checkpointing_func", None)
    shown = {
        "weights": {k: v.numpy().tobytes() for k, v in weights_of(trainer).items()},
        "logs": logs,
        "events": trainer.noting.events,
        "files": sorted(
            str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file() and not p.name.startswith(ours)
        ),
        "state": [state.global_step, state.epoch, state.num_input_tokens_seen, state.total_flos],
        "best": [state.best_metric, state.best_global_step, str(state.best_model_checkpoint).split("/")[-1]],
        "callbacks": [type(c).__name__ for c in callbacks if not isinstance(c, Watch)],
        "optimizer": [type(getattr(optimizer, "optimizer", optimizer)).__name__, repr(optimizer)],
        "model": [type(trainer.model_wrapped).__name__, model.config.use_cache],
        "recomputing": [model.model.layers[0].gradient_checkpointing, getattr(recomputing, "keywords", None)],
        "globals": [transformers.logging.get_verbosity(), torch.are_deterministic_algorithms_enabled()],
        "remarks": trainer.data_collator.remarks,
    }
    afterwards = trainer.evaluate()
    timed += ("_mem_",)
    return shown | {"afterwards": {k: repr(v) for k, v in afterwards.items() if not any(t in k for t in timed)}}


@contextmanager
def globals_restored():
    """Some arguments change global switches of libraries."""
    level = transformers.logging.get_verbosity()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        torch.use_deterministic_algorithms(False)
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()


def run(kind, **args):
    with tempfile.TemporaryDirectory() as folder, globals_restored():
        trainer = trainer_of(kind, Path(folder), **args)
        trainer.train()
        return outcome(trainer, Path(folder))


@functools.cache
def plain_run_beside(name):
    return run(Trainer, **HONORED[name][1])


@pytest.fixture(scope="module")
def shown(request):
    """How each field was shown to be treated as it is said; written down where this was asked for."""
    rows = {}
    yield rows
    if request.config.getoption("write_docs"):
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(table(rows))


def table(rows):
    torch_version = f"torch {torch.__version__.split('+')[0]}"
    lines = [
        "# TrainingArguments",
        "",
        f"{datetime.date.today()}, transformers {transformers.__version__}, {torch_version} on CPUs.",
        "",
        "This table applies while batches come from the techniques' stream. Without such a technique, Trainer handles",
        "every argument itself. *Honored*: a run with a value other than the default equals Trainer's run bit for bit,",
        "in weights, log, files, state and events.",
        "",
        'Written by `pytest tests/host/test_arguments.py -m "not full" --write-docs`.',
        "",
        "| argument | treatment | meaning | shown by |",
        "|---|---|---|---|",
    ]
    for name in FIELDS:
        kind, meaning = treatment(name)
        lines.append(f"| `{name}` | {kind} | {meaning} | {rows.get(name, 'NOT SHOWN')} |")
    return "\n".join(lines) + "\n"


def note(shown, name, how):
    shown[name] = f"{shown[name]}; {how}" if name in shown else how


@pytest.mark.filterwarnings("ignore")  # of arguments that torch and transformers think unwise
@pytest.mark.ci
@pytest.mark.parametrize("name", [name for name in HONORED if name in FIELDS])
def test_honored(name, shown):
    value, beside = HONORED[name]
    plain = run(Trainer, **beside, **{name: value})
    assert plain != plain_run_beside(name), "the value shows nowhere"
    hosted = run(AccelTrainer, **beside, **{name: value})
    for part in plain:
        assert hosted[part] == plain[part], part
    note(shown, name, f"`{value!r}`")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.full
@pytest.mark.parametrize("name", UNSEEN)
def test_honored_without_a_trace(name, shown):
    value, beside = UNSEEN[name]
    plain = run(Trainer, **beside, **{name: value})
    hosted = run(AccelTrainer, **beside, **{name: value})
    for part in plain:
        assert hosted[part] == plain[part], part
    note(shown, name, f"`{value!r}`")


# Two ranks ------------------------------------------------------------------------------------------------------------


def runs_on_ranks(kind, directory):
    """Weights, losses and what DDP was told, for each argument that matters on several ranks."""
    found = {}
    for name, value in {"default": None, **ON_RANKS}.items():
        args = backend_args("ddp") | {"per_device_train_batch_size": 4, "num_train_epochs": 1}
        args |= {} if value is None else {name: value}
        trainer = tiny_trainer([Watch()] if kind is AccelTrainer else [], directory, trainer_class=kind, **args)
        trainer.train()
        wrapped = trainer.model_wrapped
        outfit = [wrapped.find_unused_parameters, wrapped.broadcast_buffers, wrapped.static_graph]
        outfit += [wrapped.bucket_bytes_cap, trainer.args.ddp_timeout, torch.distributed.get_backend()]
        found[name] = weights_of(trainer), losses_of(trainer), outfit
    return found


@pytest.mark.distributed
@pytest.mark.ci
@pytest.mark.filterwarnings("ignore")
def test_honored_on_two_ranks(shown, tmp_path):
    plain = run_on_ranks(runs_on_ranks, Trainer, tmp_path, timeout=150)[0]
    hosted = run_on_ranks(runs_on_ranks, AccelTrainer, tmp_path, timeout=150)[0]
    for name, value in ON_RANKS.items():
        if name != "ddp_backend":  # gloo is the only one on a CPU
            assert plain[name][1:] != plain["default"][1:], f"{name} shows nowhere"
        assert largest_difference(hosted[name][0], plain[name][0]) == 0.0, name
        assert hosted[name][1:] == plain[name][1:], name
        note(shown, name, f"`{value!r}` on two ranks")


# Honored in ways of their own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in SchedulerType if k.value not in ("reduce_lr_on_plateau", "greedy")])
def test_named_schedules_are_trainers(kind, shown):
    kwargs = {
        "cosine_with_min_lr": {"min_lr": 1e-3},
        "cosine_warmup_with_min_lr": {"min_lr": 1e-3},
        "warmup_stable_decay": {"num_decay_steps": 6},
    }.get(kind.value, {})
    args = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": kwargs, "warmup_steps": 0.2}
    plain, hosted = run(Trainer, **args), run(AccelTrainer, **args)
    for part in plain:
        assert hosted[part] == plain[part], part
    note(shown, "lr_scheduler_type", f"`{kind.value}`")


class Counter(TrainerCallback, ExportableState):
    """Counts steps, over a resume where its state is restored."""

    def __init__(self, count=0):
        self.count = count

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"args": {"count": self.count}, "attributes": {}}


def test_callback_states_are_restored(shown, tmp_path):
    for restore, count in ((True, 16), (False, 12)):
        for kind in (Trainer, AccelTrainer):
            first = trainer_of(kind, tmp_path / kind.__name__, **SAVED)
            first.add_callback(Counter())
            first.train()
            second = trainer_of(kind, tmp_path / "second", restore_callback_states_from_checkpoint=restore)
            second.add_callback(Counter())
            second.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-4")
            counter = next(c for c in second.callback_handler.callbacks if isinstance(c, Counter))
            assert counter.count == count, (kind, restore)
            assert largest_difference(weights_of(second), weights_of(first)) == 0.0
    shown["restore_callback_states_from_checkpoint"] = "`True`, resumed"


def test_other_settings_of_the_accelerator(shown):
    """What it does not refuse is honored."""
    settings = {"even_batches": False, "non_blocking": True, "gradient_accumulation_kwargs": {"sync_each_batch": True}}
    plain, hosted = (run(kind, accelerator_config=settings) for kind in (Trainer, AccelTrainer))
    for part in plain:
        assert hosted[part] == plain[part], part
    note(shown, "accelerator_config", "`even_batches`, `non_blocking`, `sync_each_batch`")


class Sized(CountingText):
    """Says how long its examples are, wrongly."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"size": index}


def test_length_column_is_the_techniques(shown, tmp_path):
    lengths = []
    for name in ("size", "length"):
        technique = LengthGrouped()
        trainer = tiny_trainer([technique], tmp_path, num_train_epochs=1, length_column_name=name)
        trainer.train_dataset = Sized()
        trainer.train()
        lengths.append(technique.lengths_.longest_N.tolist())
    assert lengths[0] == list(range(64))
    assert lengths[1] == [len(row) for row in CountingText().rows]
    shown["length_column_name"] = "`LengthGrouped`"


# Re-interpreted -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Shrinking(Technique):
    """Epochs of half the length after the first, so that steps and progress part; notes what each step was."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps_, self.rates_ = [], []

    def select(self, epoch, num_examples, generator):
        return torch.arange(num_examples if epoch == 0 else num_examples // 2), None

    def transform_batch(self, batch):
        self.steps_.append([len(micro.ids_B) for micro in batch.micro_batches])
        self.rates_.append((self.run_.clock.progress, self.run_.optimizer.param_groups[0]["lr"]))
        return batch


def test_batch_size_and_accumulation_are_the_examples_of_an_update(shown, tmp_path):
    args = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_train_epochs": 1}
    weights = []
    for size, first in ((None, [4, 4, 4]), (5, [5, 5, 2]), (12, [12])):
        watch = Shrinking()
        exact = {"dropout": 0.0, "dtype": torch.float64, "micro_batch_size": size}
        trainer = tiny_trainer([watch], tmp_path, **exact, **args)
        trainer.train()
        assert watch.steps_[0] == first and sum(watch.steps_[-1]) == 64 % 12
        assert trainer.args.gradient_accumulation_steps == 1 and trainer.state.global_step == 6
        weights.append(weights_of(trainer))
    assert largest_difference(weights[0], weights[1]) < 1e-9 > largest_difference(weights[0], weights[2])
    shown["per_device_train_batch_size"] = shown["gradient_accumulation_steps"] = "micro-batches of 4, 5 and 12"


def test_auto_find_batch_size_keeps_the_examples_of_an_update(shown, tmp_path):
    runs = []
    for args in ({"auto_find_batch_size": True}, {"micro_batch_size": 4}):
        trainer = tiny_trainer([Watch()], tmp_path, **args)

        def no_more_than_five(module, positional, inputs):
            if module.training and len(inputs["input_ids"]) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        trainer.model.register_forward_pre_hook(no_more_than_five, with_kwargs=True)
        trainer.train()
        runs.append((trainer.state.global_step, trainer.receipt.samples, trainer.micro_batch_size, losses_of(trainer)))
    assert runs[0] == runs[1] and runs[0][:3] == (24, 192, 4)
    shown["auto_find_batch_size"] = "memory for 5 of 8 examples"


@pytest.mark.parametrize("kind, event", [("logging", "loss"), ("eval", "eval_loss"), ("save", None)])
def test_fractions_are_of_progress(kind, event, shown, tmp_path):
    args = {f"{kind}_strategy": "steps", f"{kind}_steps": 0.25}
    trainer = tiny_trainer([Shrinking()], tmp_path, num_train_epochs=4, **args)
    noting = Noting()
    trainer.add_callback(noting)
    trainer.train()
    # Epochs of 8, 4, 4 and 4 steps: a quarter of the budget each, though not of the steps.
    ends = [8, 12, 16, 20]
    if kind == "save":
        assert [step for what, step, _ in noting.events if what == "save"] == ends
    else:
        assert [entry["step"] for entry in trainer.state.log_history if event in entry] == ends
    shown[f"{kind}_steps"] = "`0.25`, with epochs of unequal length"


def test_warmup_is_of_progress(shown, tmp_path):
    watch = Shrinking()
    args = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.75, "num_train_epochs": 4}
    tiny_trainer([watch], tmp_path, **args).train()
    for progress, rate in watch.rates_:
        assert rate == pytest.approx(5e-3 * min(progress / 0.75, 1.0))
    assert any(progress > 0.75 for progress, _ in watch.rates_)
    shown["warmup_steps"] = "`0.75`, with epochs of unequal length"


def test_the_budget_is_of_epochs_or_steps_where_there_is_no_other(shown, tmp_path):
    for args, limits in (({"num_train_epochs": 2}, {"epochs": 2.0}), ({"max_steps": 5}, {"steps": 5.0})):
        trainer = tiny_trainer([Watch()], tmp_path, **args)
        trainer.train()
        assert trainer.clock.limits == limits and trainer.clock.progress == 1.0
        assert trainer.receipt.final_learning_rate == 0.0
    trainer = tiny_trainer([Watch(), Budget("1epoch")], tmp_path, num_train_epochs=5)
    trainer.train()
    assert trainer.state.epoch == 1.0
    with pytest.raises(ValueError, match=r"max_steps=5: Budget"):
        tiny_trainer([Watch(), Budget("1epoch")], tmp_path, max_steps=5)
    shown["num_train_epochs"] = shown["max_steps"] = "with and without `Budget`"


def test_a_signal_saves_at_the_end_of_a_step(shown):
    """What it does then is shown by ``tests/test_stopped.py``."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = tiny_trainer([Budget("1epoch")], directory, enable_jit_checkpoint=True)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert SigtermCallback in kinds and JITCheckpointCallback not in kinds
    shown["enable_jit_checkpoint"] = "`True`"


def test_step_batches_come_in_order(shown):
    default = run(AccelTrainer, dataloader_num_workers=2)
    disorderly = run(AccelTrainer, dataloader_in_order=False, dataloader_num_workers=2)
    assert disorderly == default
    shown["dataloader_in_order"] = "`False`, two workers"


def test_rotation_keeps_a_whole_checkpoint(shown, tmp_path):
    trainer = tiny_trainer([Watch()], tmp_path, save_total_limit=1, **SAVED)
    seen = []

    class Looking(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            places = sorted(tmp_path.glob("checkpoint-*"))
            seen.append(([p.name for p in places], [integrity_error(p) for p in places]))

    trainer.add_callback(Looking())
    trainer.train()
    assert seen == [([f"checkpoint-{step}"], [None]) for step in range(4, 25, 4)]
    shown["save_total_limit"] = "`1`"


# Refused --------------------------------------------------------------------------------------------------------------


ORDERED = "Use a technique that owns the slot 'order'"
FOLLOWS = "follows the metric, not progress"
REFUSALS = [
    ("train_sampling_strategy", "group_by_length", ORDERED),
    ("train_sampling_strategy", "batch_rebalance", ORDERED),
    ("accelerator_config", {"dispatch_batches": True}, "accelerator_config.dispatch_batches=True"),
    ("accelerator_config", {"split_batches": True}, "accelerator_config.split_batches=True"),
    ("accelerator_config", {"use_seedable_sampler": False}, "accelerator_config.use_seedable_sampler=False"),
    ("ignore_data_skip", True, "ignore_data_skip=True"),
    ("lr_scheduler_type", "reduce_lr_on_plateau", FOLLOWS),
    ("lr_scheduler_type", "greedy", FOLLOWS),
    ("parallelism_config", ParallelismConfig(), "parallelism_config"),
]


@pytest.mark.parametrize("name, value, message", REFUSALS)
def test_refused(name, value, message, shown, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        tiny_trainer([Watch()], tmp_path, **EVALUATED, **{name: value})
    assert name in str(caught.value)
    note(shown, name, "refused" if isinstance(value, ParallelismConfig) else f"refused: `{value!r}`")


def test_the_sequential_strategy_is_honored(shown):
    plain, hosted = (run(kind, train_sampling_strategy="sequential") for kind in (Trainer, AccelTrainer))
    assert plain["weights"] == hosted["weights"] != run(Trainer)["weights"]
    note(shown, "train_sampling_strategy", "honored: `'sequential'`")


# The table ------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_run_here_says_why(shown):
    for name, reason in NOT_RUN.items():
        assert treatment(name)[0] == "honored"
        shown[name] = f"not run here: {reason}"
    for name, place in ELSEWHERE.items():
        assert Path(__file__).parents[2].joinpath(place).is_file()
        shown[name] = place
    shown["use_cpu"] = "every run here"


def test_every_field_is_treated_once():
    own_way = {"restore_callback_states_from_checkpoint", "length_column_name", "use_cpu"}
    honored = [*HONORED, *UNSEEN, *NOT_RUN, *ELSEWHERE, *ON_RANKS, *own_way]
    assert len(honored) == len(set(honored))
    assert {name for name in FIELDS if treatment(name)[0] == "honored"} == set(honored) & set(FIELDS)
    assert {name for name, *_ in REFUSALS} == set(REFUSED)
    assert set(REFUSED) | set(REINTERPRETED) <= set(FIELDS)
    if transformers.__version__ == TESTED[-1]:
        assert set(honored) <= set(FIELDS)


def test_the_table_is_current(request):
    if request.config.getoption("write_docs") or transformers.__version__ != TESTED[-1]:
        pytest.skip("it is being written, or of another version")
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    assert [(name.strip("`"), kind, meaning) for name, kind, meaning, _ in cells] == [
        (name, *treatment(name)) for name in FIELDS
    ]
    assert all(how != "NOT SHOWN" for *_, how in cells)
