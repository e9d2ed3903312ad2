"""Drop-in: with no technique, and with one that only watches, a run is Trainer's, bit for bit."""

from dataclasses import dataclass
from types import SimpleNamespace

import datasets
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ProgressCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.trainer_utils import HPSearchBackend

from hf_accel import (
    AccelTrainer,
    Budget,
    ChunkedCrossEntropy,
    ExponentialMovingAverage,
    LengthGrouped,
    LoRA,
    Mixup,
    RandomSubset,
    StochasticWeightAveraging,
    Technique,
    accelerated,
    attach,
)
from hf_accel.testing import (
    CountingText,
    collate_padded,
    largest_difference,
    losses_of,
    tiny_convnext,
    tiny_llama,
    tiny_trainer,
    weights_of,
)


@dataclass(eq=False)
class Watch(Technique):
    """Sees every example's loss and changes nothing."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen_ = []

    def observe(self, ids_B, losses_B):
        self.seen_ += list(zip(ids_B.tolist(), losses_B.tolist(), strict=True))


SETTINGS = {
    "default": {},
    "accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 5},
    "fraction": {"warmup_steps": 0.1, "weight_decay": 0.1, "max_grad_norm": 0.5},
    "smoothing": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    "max_steps": {"max_steps": 13},
    "sequential": {"train_sampling_strategy": "sequential"},
    "drop_last": {"dataloader_drop_last": True, "per_device_train_batch_size": 7},
    "neftune": {"neftune_noise_alpha": 5.0},
    "workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "data_seed": {"data_seed": 11},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 5},
    "local average": {"average_tokens_across_devices": False},
}


@pytest.mark.parametrize("watched", [pytest.param(False, marks=pytest.mark.ci), True], ids=["plain", "streamed"])
@pytest.mark.parametrize("args", SETTINGS.values(), ids=SETTINGS)
def test_causal_lm_is_trainers(args, watched, tmp_path):
    plain = tiny_trainer([], tmp_path, trainer_class=Trainer, **args)
    plain.train()
    hosted = tiny_trainer([Watch()] if watched else [], tmp_path, **args)
    hosted.train()
    assert losses_of(hosted) == losses_of(plain)
    assert largest_difference(weights_of(hosted), weights_of(plain)) == 0.0
    assert hosted.state.global_step == plain.state.global_step
    assert hosted.state.epoch == plain.state.epoch
    assert [e.get("epoch") for e in hosted.state.log_history] == [e.get("epoch") for e in plain.state.log_history]
    assert [e.get("eval_loss") for e in hosted.state.log_history] == [
        e.get("eval_loss") for e in plain.state.log_history
    ]


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_samplers_of_the_host_stay(strategy, tmp_path):
    runs = []
    for kind in (Trainer, AccelTrainer):
        runs.append(tiny_trainer([], tmp_path, trainer_class=kind, train_sampling_strategy=strategy))
        runs[-1].train()
    assert largest_difference(weights_of(runs[0]), weights_of(runs[1])) == 0.0
    with pytest.raises(ValueError, match=rf"train_sampling_strategy='{strategy}'.*LengthGrouped"):
        tiny_trainer([Watch()], tmp_path, train_sampling_strategy=strategy)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([CountingText()[i] for i in range(40)])


def test_iterable_data_stays(tmp_path):
    runs = []
    for kind in (Trainer, AccelTrainer):
        trainer = tiny_trainer([], tmp_path, trainer_class=kind, max_steps=7)
        trainer.train_dataset = Stream()
        trainer.train()
        runs.append(weights_of(trainer))
    assert largest_difference(*runs) == 0.0


def classifier(kind, tmp_path, techniques=None, **args):
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=48,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=3,
        )
    )
    rows = CountingText()
    data = datasets.Dataset.from_list([{"input_ids": rows[i]["input_ids"][:6], "label": i % 3} for i in range(48)])
    hosting = {} if techniques is None else {"techniques": techniques}
    return kind(
        model=model,
        args=TrainingArguments(
            str(tmp_path),
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            logging_steps=1,
            save_strategy="no",
            **args,
        ),
        train_dataset=data,
        **hosting,
    )


@pytest.mark.parametrize("accumulation", [1, 4])
def test_classification_is_trainers(accumulation, tmp_path):
    runs = []
    for kind, techniques in ((Trainer, None), (AccelTrainer, [])):
        runs.append(classifier(kind, tmp_path, techniques, gradient_accumulation_steps=accumulation))
        runs[-1].train()
    assert largest_difference(weights_of(runs[0]), weights_of(runs[1])) == 0.0


def test_the_stream_scales_losses_rightly_where_trainer_does_not(tmp_path):
    """BERT ignores num_items_in_batch; Trainer then multiplies its loss by the accumulation steps."""
    one = classifier(AccelTrainer, tmp_path, [Watch()], per_device_train_batch_size=16)
    four = classifier(AccelTrainer, tmp_path, [Watch()], per_device_train_batch_size=4, gradient_accumulation_steps=4)
    wrong = classifier(Trainer, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    for trainer in (one, four, wrong):
        trainer.model.config.hidden_dropout_prob = 0.0
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train()
    assert losses_of(four) == pytest.approx(losses_of(one), rel=1e-5)
    assert losses_of(wrong)[0] == pytest.approx(4 * losses_of(one)[0], rel=0.2)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("step", [5, 8, 13])
def test_resumes_as_trainer_does(watched, step, tmp_path):
    def build(directory):
        return tiny_trainer([Watch()] if watched else [], directory, save_strategy="steps", save_steps=1)

    straight = build(tmp_path / "a")
    straight.train()
    resumed = build(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    assert largest_difference(weights_of(straight), weights_of(resumed)) == 0.0
    if not watched:
        plain = tiny_trainer([], tmp_path / "c", trainer_class=Trainer)
        plain.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert largest_difference(weights_of(straight), weights_of(plain)) == 0.0


@pytest.mark.parametrize("length", [{"max_steps": 16}, {"num_train_epochs": 2}], ids=["steps", "epochs"])
@pytest.mark.parametrize("step", [5, 8], ids=["mid-epoch", "epoch-end"])
def test_a_stream_goes_on_where_a_plain_trainer_was(step, length, tmp_path):
    args = {"save_strategy": "steps", "save_steps": step, **length}
    plain = tiny_trainer([], tmp_path, trainer_class=Trainer, **args)
    plain.train()
    resumed = tiny_trainer([], tmp_path / "resumed", micro_batch_size=8, **args)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.state.global_step == 16 and resumed.clock.progress == 1.0 and resumed.receipt.samples == 128
    logged = [[e | {"accel/progress": 0} for e in t.state.log_history[:16]] for t in (plain, resumed)]
    assert logged[0] == logged[1]
    assert largest_difference(weights_of(resumed), weights_of(plain)) == 0.0


@pytest.mark.parametrize("select", [False, True])
def test_techniques_go_on_where_a_plain_trainer_was(select, tmp_path):
    """In the middle of its epoch; at its beginning, where examples are chosen."""
    args = {"save_strategy": "steps", "save_steps": 5, "max_steps": 16}
    tiny_trainer([], tmp_path, trainer_class=Trainer, **args).train()
    trainer = tiny_trainer([RandomSubset(keep=1.0) if select else Watch()], tmp_path / "resumed", **args)
    trainer.accel.options.allow_changes = True
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainer.state.global_step == 16 and trainer.stream.epochs == (11 / 8 if select else 2.0)


def vision_trainer(directory, **args):
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_labels=2,
    )
    images = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = [{"pixel_values": image, "labels": int(image.mean() > 0)} for image in images]
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
    settings |= {"dataloader_pin_memory": False, "num_train_epochs": 2, "learning_rate": 1e-2, "logging_steps": 1}
    return AccelTrainer(
        ViTForImageClassification(config),
        TrainingArguments(str(directory), **(settings | args)),
        train_dataset=rows,
        eval_dataset=rows,
    )


def test_weights_that_are_saved_under_other_names_are_resumed_and_the_best_are_loaded(tmp_path):
    straight = vision_trainer(tmp_path, save_strategy="steps", save_steps=3)
    straight.train()
    resumed = vision_trainer(tmp_path / "resumed", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses_of(resumed) == losses_of(straight)
    assert largest_difference(weights_of(resumed), weights_of(straight)) == 0.0
    often = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    best = vision_trainer(tmp_path / "best", **often, load_best_model_at_end=True, metric_for_best_model="eval_runtime")
    best.train()
    expected = ViTForImageClassification.from_pretrained(best.state.best_model_checkpoint).state_dict()
    assert largest_difference(weights_of(best), expected) == 0.0


def test_every_example_is_observed_once_an_epoch(tmp_path):
    watch = Watch()
    tiny_trainer([watch], tmp_path, num_train_epochs=2).train()
    assert sorted(i for i, _ in watch.seen_) == sorted(list(range(64)) * 2)


class Counting(TrainerCallback):
    def __init__(self):
        self.events, self.epochs = [], []

    def on_substep_end(self, args, state, control, **kwargs):
        self.events.append("substep")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append("step")
        self.epochs.append(state.epoch)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.events.append("epoch")


@pytest.mark.parametrize("watched", [False, True])
def test_callbacks_of_others_see_the_same_events(watched, tmp_path):
    seen = []
    args = {"gradient_accumulation_steps": 2, "num_train_epochs": 2}
    for kind, techniques in ((Trainer, []), (AccelTrainer, [Watch()] if watched else [])):
        counting = Counting()
        trainer = tiny_trainer(techniques, tmp_path, trainer_class=kind, **args)
        trainer.add_callback(counting)
        trainer.train()
        seen.append((counting.events, counting.epochs))
    assert seen[0] == seen[1]


def test_attach_equips_an_existing_trainer(tmp_path):
    built = tiny_trainer([Watch()], tmp_path)
    built.train()
    attached = tiny_trainer([], tmp_path, trainer_class=Trainer)
    attach(attached, [Watch()])
    attached.train()
    assert largest_difference(weights_of(built), weights_of(attached)) == 0.0
    with pytest.raises(ValueError, match="takes techniques itself"):
        attach(attached, [Watch()])


def test_a_technique_among_the_callbacks_is_hosted(tmp_path):
    watch = Watch()
    trainer = AccelTrainer(
        model=tiny_trainer([], tmp_path).model,
        args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=2, dataloader_pin_memory=False),
        train_dataset=CountingText(),
        data_collator=collate_padded,
        callbacks=[watch],
    )
    trainer.train()
    assert trainer.techniques == [watch] and watch.run_ is None and len(watch.seen_) == 16


@pytest.mark.parametrize("given", [LengthGrouped, "LengthGrouped", {"LengthGrouped": {}}])
def test_what_is_no_instance_of_a_technique_is_refused_and_changes_no_class(given, tmp_path):
    plain = tiny_trainer([], tmp_path, trainer_class=Trainer)
    built = {"model": plain.model, "args": plain.args, "techniques": [given]}
    for build in (lambda: AccelTrainer(**built), lambda: attach(plain, [given])):
        with pytest.raises(ValueError, match="is not an instance of a technique. Pass one, such as"):
            build()
    assert LengthGrouped.run_ is None
    plain.add_callback(LengthGrouped())
    with pytest.raises(ValueError, match="LengthGrouped"):
        plain.train()


def test_a_plain_trainer_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(ValueError, match=r"Watch\(\) needs observe, which a callback of a plain Trainer cannot do"):
        Trainer(model=tiny_trainer([], tmp_path).model, args=TrainingArguments(str(tmp_path)), callbacks=[Watch()])
    late = tiny_trainer([], tmp_path, trainer_class=Trainer)
    late.add_callback(Watch())
    late.remove_callback(Watch)
    late.add_callback(type("Late", (Watch,), {"on_train_begin": Technique.on_train_begin})())
    with pytest.raises(ValueError, match="Use AccelTrainer"):
        late.train()


def test_the_list_of_callbacks_is_that_of_trainer(tmp_path):
    trainers = [tiny_trainer([], tmp_path, trainer_class=cls) for cls in (Trainer, AccelTrainer)]
    plain, ours = ([type(c) for c in trainer.callback_handler.callbacks] for trainer in trainers)
    assert ours == plain


def test_a_training_step_outside_of_a_run_is_that_of_trainer(tmp_path):
    found = []
    for cls in (Trainer, AccelTrainer):
        trainer = tiny_trainer([], tmp_path, trainer_class=cls)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.training_step(trainer.model, batch)
        found.append([loss, *(p.grad for p in trainer.model.parameters())])
    assert len(found[0]) > 1 and all(map(torch.equal, *found))


@pytest.mark.parametrize("resume", [True, "checkpoint-8"], ids=str)
def test_a_missing_checkpoint_is_reported_in_the_words_of_trainer(resume, tmp_path):
    said = []
    for cls in (Trainer, AccelTrainer):
        with pytest.raises(ValueError) as raised:
            tiny_trainer([], tmp_path, trainer_class=cls).train(resume_from_checkpoint=resume)
        said.append(str(raised.value))
    assert said[1].startswith(said[0])


@pytest.mark.parametrize("wrong", [[Budget("1h"), Budget("2h")], [LoRA(rank=10_000)]], ids=["a slot", "a model"])
def test_a_trainer_to_which_attaching_was_refused_is_as_before(wrong, tmp_path):
    trainer = tiny_trainer([], tmp_path, trainer_class=Trainer, max_steps=4)
    callbacks, attributes = list(trainer.callback_handler.callbacks), set(vars(trainer))
    with pytest.raises(ValueError):
        attach(trainer, wrong)
    assert type(trainer) is Trainer and set(vars(trainer)) == attributes
    assert trainer.callback_handler.callbacks == callbacks
    attach(trainer, [ExponentialMovingAverage()])
    trainer.model.requires_grad_(True)
    trainer.train()
    assert trainer.receipt.steps == 4 and len(trainer.receipt.techniques) == 1


@pytest.mark.parametrize("delay, steps", [(0, [6, 12, 18, 24]), (13, [18, 24])])
def test_fractions_wait_for_the_delay_of_evaluations(delay, steps, tmp_path):
    args = {"eval_strategy": "steps", "eval_steps": 0.25, "eval_delay": delay}
    trainer = tiny_trainer([Budget("24steps")], tmp_path, **args)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == steps


def test_seq2seq_trainer(tmp_path):
    trainer = accelerated(Seq2SeqTrainer)(
        model=tiny_trainer([], tmp_path).model,
        args=Seq2SeqTrainingArguments(
            str(tmp_path),
            report_to=[],
            use_cpu=True,
            num_train_epochs=1,
            dataloader_pin_memory=False,
            save_strategy="no",
        ),
        train_dataset=CountingText(),
        eval_dataset=CountingText(16),
        data_collator=collate_padded,
        techniques=[Watch()],
    )
    trainer.train()
    assert trainer.state.global_step == 8 and trainer.evaluate()["eval_loss"] > 0


def test_two_owners_of_a_slot_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"Budget\(limit='1h'\) and Budget\(limit='2h'\) both own the slot 'budget'"):
        tiny_trainer([Budget("1h"), Budget("2h")], tmp_path)


def test_a_budget_against_max_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"max_steps=5: Budget\(limit='1h'\) limits the run already"):
        tiny_trainer([Budget("1h")], tmp_path, max_steps=5)


@pytest.mark.parametrize(
    "limit, unit, amount",
    [("20steps", "steps", 20), ("100samples", "samples", 104), ("1.5epochs", "epochs", 1.5), ("900tok", "tokens", 900)],
)
@pytest.mark.parametrize("watched", [False, True])
def test_budgets_end_where_they_say_at_learning_rate_zero(limit, unit, amount, watched, tmp_path):
    trainer = tiny_trainer([Budget(limit), *([Watch()] if watched else [])], tmp_path)
    trainer.train()
    spent = trainer.clock.spent[unit]
    assert spent == amount if unit != "tokens" else amount - 2 * 8 * 24 < spent <= amount
    assert trainer.receipt.final_learning_rate == 0.0 and trainer.lr_scheduler.get_last_lr()[0] == 0.0


def test_a_time_budget_ends_at_learning_rate_zero(tmp_path):
    trainer = tiny_trainer([Budget("6s")], tmp_path, eval_strategy="steps", eval_steps=0.3)
    trainer.train()
    assert trainer.receipt.final_learning_rate == 0.0
    assert len([e for e in trainer.state.log_history if "eval_loss" in e]) >= 3


def test_a_longer_budget_continues_at_its_own_learning_rate(tmp_path):
    tiny_trainer([Budget("12steps")], tmp_path / "short", save_strategy="steps", save_steps=12).train()
    longer = tiny_trainer([Budget("24steps")], tmp_path / "long")
    longer.accel.options.allow_changes = True
    longer.train(resume_from_checkpoint=str(tmp_path / "short" / "checkpoint-12"))
    rates = {e["step"]: e["learning_rate"] for e in longer.state.log_history if "learning_rate" in e}
    expected = {12: 5e-3 / 12, 13: 5e-3 * 12 / 24, 18: 5e-3 * 7 / 24, 24: 5e-3 / 24}
    assert {step: rates[step] for step in expected} == pytest.approx(expected)


def test_absolute_warmup_needs_a_known_number_of_steps(tmp_path):
    with pytest.raises(ValueError, match="warmup_steps=10: the budget is in seconds. Give a fraction"):
        tiny_trainer([Budget("5s")], tmp_path, warmup_steps=10).train()


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_follow_the_metric_are_refused(kind, tmp_path):
    with pytest.raises(ValueError, match=f"lr_scheduler_type='{kind}': it follows the metric, not progress"):
        tiny_trainer([Budget("5s")], tmp_path, lr_scheduler_type=kind, eval_strategy="steps")


def of_model_init(make_model, techniques, directory, **args):
    """A trainer of what `make_model` makes, each time anew."""
    modality = "image" if make_model().main_input_name == "pixel_values" else "text"
    given = tiny_trainer([], directory, modality=modality, **args)
    data = {"train_dataset": given.train_dataset, "data_collator": given.data_collator}
    return AccelTrainer(model_init=lambda: make_model(), args=given.args, techniques=techniques, **data)


def test_a_trial_of_a_search_has_a_length_and_sizes_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)  # which asks for optuna
    searched = of_model_init(tiny_llama, [LengthGrouped()], tmp_path)
    searched.hp_search_backend, searched.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    trials = (
        ({"num_train_epochs": 1, "per_device_train_batch_size": 16}, 4),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 16),
    )
    for trial, steps in trials:
        searched.train(trial=SimpleNamespace(number=steps, params=dict(trial)))
        built = of_model_init(tiny_llama, [LengthGrouped()], tmp_path, **trial)
        built.train()
        assert searched.state.global_step == built.state.global_step == steps
        assert searched.receipt.samples == built.receipt.samples == 64 * trial["num_train_epochs"]
        assert losses_of(searched) == losses_of(built)


@pytest.mark.parametrize(
    "make_model, technique", [(lambda: tiny_convnext(0.0), Mixup), (lambda: tiny_llama(0.0), ChunkedCrossEntropy)]
)
def test_the_loss_is_that_of_the_model_which_model_init_makes(make_model, technique, tmp_path):
    anew = of_model_init(make_model, [technique()], tmp_path, max_steps=4)
    anew.train()
    given = tiny_trainer([technique()], tmp_path, model=make_model(), max_steps=4)
    given.train()
    assert losses_of(anew) == losses_of(given)
    assert largest_difference(weights_of(anew), weights_of(given)) == 0.0


def test_a_plain_run_is_gone_on_with_at_its_progress(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 8, "max_steps": 16}
    tiny_trainer([], tmp_path, trainer_class=Trainer, **args).train()
    trainer = tiny_trainer([StochasticWeightAveraging(start=0.75)], tmp_path / "resumed", **args)
    trainer.accel.options.allow_changes = True
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert trainer.clock.progress == 1.0 and trainer.receipt.steps == 16
    assert trainer.receipt.techniques[0]["report"]["averaged"] > 0


@pytest.mark.parametrize("best", [False, True])
def test_what_is_evaluated_at_the_end_of_training_is_what_it_returns(best, tmp_path):
    class Last(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            self.loss = trainer.evaluate()["eval_loss"]

    args = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True} if best else {}
    trainer = tiny_trainer([ExponentialMovingAverage(4.0)], tmp_path, **args)
    trainer.add_callback(last := Last())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == last.loss


def test_callbacks_see_and_change_all_callbacks(tmp_path):
    class Steps(TrainerCallback):
        def __init__(self):
            self.seen = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.seen += 1

    class Changes(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            trainer.remove_callback(removed)
            trainer.add_callback(added)

    removed, added = Steps(), Steps()
    trainer = tiny_trainer([Budget("20steps"), ExponentialMovingAverage()], tmp_path)
    for callback in (Changes(), removed):
        trainer.add_callback(callback)
    trainer.train()
    assert (removed.seen, added.seen) == (0, 20)


def test_the_bar_of_a_budget_is_as_long_as_the_run(tmp_path):
    class Bar(ProgressCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            super().on_train_begin(args, state, control, **kwargs)
            self.training_tracker = SimpleNamespace(total=0)  # the name of a notebook's bar

        def on_train_end(self, args, state, control, **kwargs):
            self.total = self.training_bar.total
            super().on_train_end(args, state, control, **kwargs)

    trainer = tiny_trainer([Budget("20steps"), ExponentialMovingAverage()], tmp_path)
    trainer.add_callback(bar := Bar())
    trainer.train()
    assert bar.total == bar.training_tracker.total == trainer.state.global_step == 20
    assert trainer.state.num_train_epochs == 3  # of 8 steps
