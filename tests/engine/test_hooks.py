"""Every hook and slot of a technique, against loops written by hand."""

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks
from transformers import Trainer

from hf_accel import SequenceLengthWarmup, Technique
from hf_accel.technique import HOOKS, SLOTS
from hf_accel.testing import (
    CountingText,
    collate_padded,
    largest_difference,
    losses_of,
    tiny_llama,
    tiny_trainer,
    weights_of,
)

EXACT: dict[str, Any] = {"dropout": 0.0, "dtype": torch.float64}


class Quiet(Technique):
    def __init__(self):
        pass


def first_gradient(techniques, tmp_path, **args):
    """The gradient of the first update, before clipping."""
    trainer = tiny_trainer(techniques, tmp_path, max_steps=1, max_grad_norm=0.0, **EXACT, **args)
    gradients = {}
    step = trainer._get_grad_norm

    def spy(model, grad_norm=None):
        gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return step(model, grad_norm)

    trainer._get_grad_norm = spy
    trainer.train()
    return trainer, gradients


def first_examples(n=8):
    ids = torch.randperm(64, generator=torch.Generator().manual_seed(7))[:n]
    return ids, collate_padded([CountingText()[int(i)] for i in ids])


def by_hand(weight_of, tmp_path, extra=None):
    """The gradient of sum_i weight_i(token, example) * loss / number of tokens, of the first eight examples."""
    model = tiny_trainer([], tmp_path, **EXACT).model
    ids, batch = first_examples()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, i in enumerate(ids.tolist()):
        for t in range(batch["labels"].shape[1] - 1):
            label = batch["labels"][row, t + 1]
            if label != -100:
                total = total + weight_of(i, t) * F.cross_entropy(logits[row, t], label)
                count += 1
    loss = total / count
    if extra is not None:
        loss = loss + extra(logits) / count
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


class ByExample(Quiet):
    def loss_weights(self, losses, ids_B):
        return ids_B.double() / 10


class ByToken(Quiet):
    def loss_weights(self, losses, ids_B):
        return torch.arange(losses.losses_BL.shape[1]).double().expand_as(losses.losses_BL) + 1


class Extra(Quiet):
    def extra_loss(self, model, inputs, outputs):
        return (outputs.logits.float() ** 2).sum()


@pytest.mark.parametrize("size", [8, 3])
def test_weights_multiply_and_sums_add(size, tmp_path):
    _, found = first_gradient([ByExample(), ByToken()], tmp_path, micro_batch_size=size)
    expected = by_hand(lambda i, t: i / 10 * (t + 1), tmp_path)
    assert largest_difference(found, expected) < 1e-6


def test_a_model_that_takes_no_number_of_items_has_the_same_step(tmp_path):
    """Trainer divides such a model's loss by the micro-batches; that of a weighted step is divided already."""
    model = tiny_llama(**EXACT)
    model.accepts_loss_kwargs = False
    _, found = first_gradient([ByExample()], tmp_path, micro_batch_size=3, model=model)
    assert largest_difference(found, by_hand(lambda i, t: i / 10, tmp_path)) < 1e-6


def test_extra_losses_are_added(tmp_path):
    _, found = first_gradient([Extra()], tmp_path)
    expected = by_hand(lambda i, t: 1.0, tmp_path, extra=lambda logits: (logits**2).sum())
    assert largest_difference(found, expected) < 1e-6


class KeepThree(Quiet):
    """Keeps the three examples of highest loss, each counting double."""

    def step_select(self, ids_B, losses_B):
        kept = losses_B.topk(3).indices.sort().values
        self.kept_ = ids_B[kept].tolist()
        return kept, torch.full((3,), 2.0)


def test_examples_of_a_step_are_chosen_by_their_losses(tmp_path):
    technique = KeepThree()
    trainer, found = first_gradient([technique], tmp_path)
    model = tiny_trainer([], tmp_path, **EXACT).model
    ids, _ = first_examples()
    losses = {}
    for i in ids.tolist():
        losses[i] = model(**collate_padded([CountingText()[i]])).loss.item()
    best = sorted(losses, key=losses.get)[-3:]
    assert sorted(technique.kept_) == sorted(best)
    batch = collate_padded([CountingText()[i] for i in technique.kept_])
    (2 * model(**batch).loss).backward()
    assert largest_difference(found, {n: p.grad for n, p in model.named_parameters()}) < 1e-6
    assert trainer.receipt.samples == 3


class Twice(Quiet):
    def objective(self, model, backward):
        backward()
        return backward()


def test_an_objective_owns_the_gradient(tmp_path):
    _, once = first_gradient([], tmp_path)
    _, twice = first_gradient([Twice()], tmp_path, micro_batch_size=4)
    assert max(float((2 * once[n] - twice[n]).abs().max()) for n in once) < 1e-9


class Rules(Quiet):
    def __init__(self, lr=1.0, group=None):
        self.lr, self.group = lr, group

    def parameter_rules(self, name, parameter):
        rules = {"lr": self.lr} if "layers.0" in name else {}
        return rules | ({"group": self.group} if self.group and "bias" not in name else {})


def test_parameter_rules_multiply_and_join(tmp_path):
    trainer = tiny_trainer([Rules(0.5, "a"), Rules(0.1, "b")], tmp_path, max_steps=1, weight_decay=0.1)
    trainer.train()
    groups = {(round(g["initial_lr"], 8), g["weight_decay"], g["group"]) for g in trainer.optimizer.param_groups}
    assert groups == {(2.5e-4, 0.1, "a/b"), (2.5e-4, 0.0, "a/b"), (5e-3, 0.1, "a/b"), (5e-3, 0.0, "a/b")}


class Prepares(Quiet):
    def __init__(self, log):
        self.log = log

    def prepare_args(self, args):
        args.max_grad_norm = 0.25
        return args

    def prepare_dataset(self, dataset):
        return torch.utils.data.Subset(dataset, range(16))

    def prepare_model(self, model):
        model.marked = True
        return model

    @contextlib.contextmanager
    def for_inference(self, model):
        self.log.append("enters")
        yield
        self.log.append("leaves")


def test_what_is_asked_before_training_and_around_it(tmp_path):
    log = []
    trainer = tiny_trainer([Prepares(log)], tmp_path, eval_strategy="epoch", num_train_epochs=1)
    given = trainer.train_dataset
    trainer.train()
    assert trainer.model.marked and trainer.args.max_grad_norm == 0.25
    assert trainer.state.global_step == 2 and trainer.train_dataset is given
    assert log == ["enters", "leaves"]
    trainer.save_model(str(tmp_path / "saved"))
    assert log[2:] == ["enters", "leaves"]


class OnlyNow(Quiet):
    def __init__(self):
        self.asked = 0

    def synchronize(self):
        self.asked += 1
        return False


@pytest.mark.distributed
@pytest.mark.ci
def test_gradients_that_are_not_synchronized_stay_with_their_rank(tmp_path):
    def gradients(techniques):
        trainer = tiny_trainer(
            techniques, tmp_path, per_device_train_batch_size=4, max_steps=1, max_grad_norm=0.0, **EXACT
        )
        found = {}
        step = trainer._get_grad_norm

        def spy(model, grad_norm=None):
            found.update({n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()})
            return step(model, grad_norm)

        trainer._get_grad_norm = spy
        trainer.train()
        return found

    together = run_on_ranks(gradients, [])
    apart = run_on_ranks(lambda: gradients([OnlyNow(), Watch()]))
    assert largest_difference(*together) == 0.0
    assert largest_difference(*apart) > 0
    mean = {n: (apart[0][n] + apart[1][n]) / 2 for n in apart[0]}
    assert largest_difference(mean, together[0]) < 1e-9


class Watch(Quiet):
    def observe(self, ids_B, losses_B):
        pass


@pytest.mark.distributed
@pytest.mark.ci
def test_nothing_is_observed_of_a_rank_without_examples(tmp_path):
    """Of 65 examples in steps of 8, the last step has one, and the other rank a filler."""

    class See(Quiet):
        seen = ()

        def observe(self, ids_B, losses_B):
            self.seen = [*self.seen, *zip(ids_B.tolist(), losses_B.tolist(), strict=True)]

    def observed(size):
        args = {"per_device_train_batch_size": size, "num_train_epochs": 1, "learning_rate": 0.0}
        trainer = tiny_trainer([see := See()], tmp_path, **args, **EXACT)
        trainer.train_dataset = CountingText(65)
        trainer.train()
        return see.seen

    one, two = dict(observed(8)), run_on_ranks(observed, 4)
    assert len(one) == 65
    for seen in two:
        assert sorted(i for i, _ in seen) == list(range(65))
        assert dict(seen) == pytest.approx(one)


class Shout(Quiet):
    """Sees each step batch, doubled labels and all."""

    def transform_batch(self, batch):
        micro = [m._replace(inputs=m.inputs | {"labels": m.inputs["labels"].clone()}) for m in batch.micro_batches]
        for m in micro:
            m.inputs["labels"][:, : m.inputs["labels"].shape[1] // 2] = -100
        return replace(batch, micro_batches=micro)


def test_batches_are_transformed_before_items_are_counted(tmp_path):
    _, found = first_gradient([Shout()], tmp_path)
    model = tiny_trainer([], tmp_path, **EXACT).model
    _, batch = first_examples()
    batch["labels"][:, : batch["labels"].shape[1] // 2] = -100
    model(**batch).loss.backward()
    assert largest_difference(found, {n: p.grad for n, p in model.named_parameters()}) < 1e-9


@dataclass(eq=False)
class Schedule(Technique):
    def schedule(self, progress):
        return (1 - progress) ** 2


def test_a_schedule_is_asked_at_progress(tmp_path):
    trainer = tiny_trainer([Schedule()], tmp_path)
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert rates == pytest.approx([5e-3 * (1 - k / 24) ** 2 for k in range(24)])


def test_all_hooks_and_slots_exist():
    assert all(callable(getattr(Technique, name)) for name in (*HOOKS, *SLOTS))
    assert Technique.implemented_hooks() == frozenset()


def test_losses_are_those_of_the_weighted_step(tmp_path):
    trainer, _ = first_gradient([ByExample()], tmp_path)
    model = tiny_trainer([], tmp_path, **EXACT).model
    ids, _ = first_examples()
    total = count = 0.0
    for i in ids.tolist():
        single = collate_padded([CountingText()[i]])
        tokens = single["labels"].shape[1] - 1
        total += i / 10 * tokens * model(**single).loss.item()
        count += tokens
    assert losses_of(trainer)[0] == pytest.approx(total / count, rel=1e-5)
    assert set(weights_of(trainer)) == set(model.state_dict())


class Ones(Quiet):
    def loss_weights(self, losses, ids_B):
        return torch.ones(len(ids_B))


def test_under_weights_labels_are_smoothed_as_trainer_smooths_them(tmp_path):
    settings = {"label_smoothing_factor": 0.1, "max_steps": 3, **EXACT}
    plain = tiny_trainer([], tmp_path, trainer_class=Trainer, **settings)
    weighted = tiny_trainer([Ones()], tmp_path, **settings)
    for trainer in (plain, weighted):
        trainer.train()
    assert losses_of(weighted) == pytest.approx(losses_of(plain), rel=1e-6)
    assert largest_difference(weights_of(weighted), weights_of(plain)) < 1e-6


def test_an_example_in_pieces_is_observed_once_by_the_mean_of_its_tokens(tmp_path):
    class Watch(Technique):
        """Keeps what each example lost."""

        def __init__(self):
            self.seen = []

        def observe(self, ids_B, losses_B):
            self.seen += list(zip(ids_B.tolist(), losses_B.tolist(), strict=True))

    settings = {"num_train_epochs": 1, "learning_rate": 0.0, "dropout": 0.0, "dtype": torch.float64}
    cut = SequenceLengthWarmup(cut="rechunk", start=0.3, end=1.0, multiple=1)
    trainer = tiny_trainer([cut, watch := Watch()], tmp_path, **settings)
    pieces = []  # of each example, the loss of each token that is predicted

    def see(module, args, inputs, output):
        if not module.training:  # the first step is evaluated, too, to see which loss the model has
            return
        logits, labels = output.logits[:, :-1].detach(), inputs["labels"][:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        rows = zip(trainer.accel.step.micro_batch.ids_B.tolist(), losses, labels != -100, strict=True)
        pieces.extend((i, loss[there].tolist()) for i, loss, there in rows)

    trainer.model.register_forward_hook(see, with_kwargs=True)
    trainer.train()
    expected = {}
    for i, losses in pieces:
        expected[i] = [*expected.get(i, []), *losses]
    assert len(pieces) > len(watch.seen) == len(trainer.train_dataset) == len(dict(watch.seen))
    for i, loss in watch.seen:
        assert loss == pytest.approx(sum(expected[i]) / max(len(expected[i]), 1), rel=1e-5)
