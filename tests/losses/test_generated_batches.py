"""One update in micro-batches equals the update of the whole batch, for generated batches and losses of the user's."""

import dataclasses
import functools
import tempfile
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BatchEncoding, Trainer, TrainingArguments
from transformers.utils import ModelOutput

from hf_accel import AccelTrainer, accelerated

CLASSES, WORDS = 3, 11


# Batches --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Columns(ModelOutput):
    """A batch with attributes."""

    ids: Any = None
    labels: Any = None


def padded(rows, value):
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def collated(examples, structure, labels):
    """Return a batch; texts are padded with 0, and labels of their tokens with -100."""
    rows = [example["ids"] for example in examples]
    if structure == "examples":
        return [{"ids": torch.tensor(e["ids"]), "labels": target(e["labels"], labels)} for e in examples]
    ids: Any = padded(rows, 0)
    found: Any = None
    if labels != "none":
        found = [target(example["labels"], labels) for example in examples]
        if structure != "ragged":
            found = nn.utils.rnn.pad_sequence(found, True, -100) if labels == "tokens" else torch.stack(found)
    if structure == "ragged":
        ids = [torch.tensor(row) for row in rows]
    if structure == "dataclass":
        return Columns(ids, found)
    if structure in ("tuple", "list"):
        return (tuple if structure == "tuple" else list)([ids] if found is None else [ids, found])
    batch = {"ids": ids} if found is None else {"ids": ids, "labels": found}
    if structure == "nested":
        return {"text": {"ids": ids}, "target": {"labels": found}}
    return BatchEncoding(batch) if structure == "BatchEncoding" else batch


def target(value, labels):
    return torch.tensor(value, dtype=torch.float64 if labels in ("several", "numbers") else torch.int64)


def columns_of(batch, structure):
    """Return the texts and the labels of a batch, padded."""
    if structure == "examples":
        ids, found = [e["ids"] for e in batch], [e["labels"] for e in batch]
    elif structure == "nested":
        ids, found = batch["text"]["ids"], batch["target"]["labels"]
    elif structure in ("tuple", "list"):
        ids, found = batch[0], batch[1] if len(batch) > 1 else None
    elif structure in ("dataclass", "BatchEncoding"):
        ids, found = batch.ids, batch.get("labels")
    else:
        ids, found = batch["ids"], batch.get("labels")
    if isinstance(ids, list):
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    if isinstance(found, list):
        found = (
            nn.utils.rnn.pad_sequence(found, True, -100)
            if found[0].dim() and not found[0].is_floating_point()
            else torch.stack(found)
        )
    return ids, found


# Losses ---------------------------------------------------------------------------------------------------------------


class Texts(nn.Module):
    """Logits of every word and of every text; padding counts nothing."""

    def __init__(self, labels, structure, loss):
        super().__init__()
        self.labels, self.structure, self.loss = labels, structure, loss
        generator = torch.Generator().manual_seed(0)
        self.words = nn.Parameter(torch.randn(WORDS, 4, generator=generator, dtype=torch.float64))
        self.head = nn.Parameter(torch.randn(4, CLASSES, generator=generator, dtype=torch.float64))

    def forward(self, batch, num_items_in_batch=None):
        ids_BL, found = columns_of(batch, self.structure)
        real_BL = ids_BL.ne(0)
        hidden_BLD = self.words[ids_BL].tanh() * real_BL[..., None]
        if self.labels != "tokens":
            hidden_BLD = hidden_BLD.sum(1) / real_BL.sum(1, keepdim=True)
        logits = hidden_BLD @ self.head
        losses, weights, counted = self.of_items(logits, found)
        return LOSSES[self.loss](losses, weights, counted, num_items_in_batch, self)

    def of_items(self, logits, found):
        """Return the losses of all items, (B, L), their weights and whether they count."""
        if self.labels in ("classes", "tokens"):
            found = found.view(len(found), -1)
            logits = logits.view(*found.shape, CLASSES)
            losses = F.cross_entropy(logits.flatten(0, 1), found.flatten(), reduction="none").view_as(found)
            return losses, torch.tensor([1.0, 5.0, 2.0], dtype=torch.float64)[found.clamp(min=0)], found.ne(-100)
        if self.labels == "several":
            losses = F.binary_cross_entropy_with_logits(logits, found, reduction="none").mean(1, keepdim=True)
        elif self.labels == "numbers":
            losses = (logits.sum(1) - found).square()[:, None]
        else:
            losses = logits.square().mean(1, keepdim=True)
        return losses, torch.ones_like(losses), torch.ones_like(losses, dtype=torch.bool)


def mean_of_examples(losses, weights, counted, num_items, model):
    return ((losses * counted).sum(1) / counted.sum(1).clamp(min=1)).mean()


def mean_of_items(losses, weights, counted, num_items, model):
    return losses[counted].mean()


def sum_over_items(losses, weights, counted, num_items, model):
    return losses[counted].sum() / (counted.sum() if num_items is None else num_items)


def weighted_classes(losses, weights, counted, num_items, model):
    return (losses * weights)[counted].sum() / weights[counted].sum()


def penalized(losses, weights, counted, num_items, model):
    return sum_over_items(losses, weights, counted, num_items, model) + 0.1 * model.words.square().sum()


LOSSES = {f.__name__: f for f in (mean_of_examples, mean_of_items, sum_over_items, weighted_classes, penalized)}


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(inputs, num_items_in_batch)


class OwnLossOfOurs(AccelTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(inputs, num_items_in_batch)


# Cases ----------------------------------------------------------------------------------------------------------------

STRUCTURES = ["dict", "nested", "tuple", "list", "ragged", "examples", "dataclass", "BatchEncoding"]
LABELS = ["classes", "several", "numbers", "tokens", "none"]


@st.composite
def cases(draw):
    labels = draw(st.sampled_from(LABELS))
    structure = draw(st.sampled_from([s for s in STRUCTURES if s != "examples" or labels != "none"]))
    number = draw(st.integers(2, 7))
    examples = []
    a_class = st.sampled_from([*range(CLASSES), -100])
    for i in range(number):
        ids = draw(st.lists(st.integers(1, WORDS - 1), min_size=1, max_size=4))
        if labels == "classes":
            value = draw(a_class) if i else 0
        elif labels == "tokens":
            value = [draw(a_class) if i else 0 for _ in ids]
        else:
            value = (
                draw(st.integers(-2, 2)) / 2
                if labels == "numbers"
                else [draw(st.integers(0, 1)) for _ in range(CLASSES)]
            )
        examples.append({"ids": ids, "labels": value})
    return structure, labels, examples, draw(st.integers(1, number)), draw(st.sampled_from(sorted(LOSSES)))


def whole(model, batches):
    """The loss and gradient of the mean over batches, weighted by their examples, by torch alone."""
    total = sum(size * model(batch) for batch, size in batches) / sum(size for _, size in batches)
    model.zero_grad()
    total.backward()
    return total.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def num_items(examples, labels):
    """Labels that count, or else examples."""
    values = [e["labels"] if labels == "tokens" else [e["labels"]] for e in examples]
    return sum(value != -100 for row in values for value in row)


def check(case, cls):
    structure, labels, examples, size, loss = case
    collate = functools.partial(collated, structure=structure, labels=labels)
    right = whole(Texts(labels, structure, loss), [(collate(examples), len(examples))])
    model = Texts(labels, structure, loss)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        args = TrainingArguments(
            folder, per_device_train_batch_size=len(examples), max_steps=1, optim="sgd", learning_rate=1.0,
            lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=True, remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = cls(model, args, train_dataset=examples, data_collator=collate, micro_batch_size=size)
        trainer.train()
    warned = any("not the mean of its micro-batches" in str(w.message) for w in caught)
    if loss == "weighted_classes":  # no mean of micro-batches, so they are accumulated as Trainer does
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(42)).tolist()
        parts = [[examples[i] for i in order[a : a + size]] for a in range(0, len(order), size)]
        weights = [len(part) if warned else num_items(part, labels) for part in parts]
        pairs = [(collate(part), weight) for part, weight in zip(parts, weights, strict=True) if weight]
        right = whole(Texts(labels, structure, loss), pairs)
    else:
        assert not warned
    assert trainer.state.log_history[0]["loss"] == pytest.approx(right[0], rel=1e-6)  # Trainer sums in float32
    for name, p in model.named_parameters():
        torch.testing.assert_close(before[name] - p.detach(), right[1][name], rtol=1e-10, atol=1e-12)


def on_batches(number):
    return settings(
        max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


a_class = st.sampled_from([accelerated(OwnLoss), OwnLossOfOurs])


@on_batches(10)
@given(case=cases(), cls=a_class)
def test_an_update_in_micro_batches_equals_that_of_the_whole_batch(case, cls):
    check(case, cls)


@pytest.mark.ci
@on_batches(100)
@given(case=cases(), cls=a_class)
def test_an_update_in_micro_batches_equals_that_of_the_whole_batch_in_all(case, cls):
    check(case, cls)


class Contrast(nn.Module):
    """Texts are told apart by their words, and each from the others of its batch."""

    def __init__(self):
        super().__init__()
        self.words = nn.Parameter(torch.randn(WORDS, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids):
        texts_BD = self.words[ids].mean(1)
        return {"loss": F.cross_entropy(texts_BD @ texts_BD.T, torch.arange(len(ids)))}


def test_a_loss_that_compares_examples_is_not_split_in_silence(tmp_path):
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no",
    )  # fmt: skip
    dataset = [{"ids": torch.tensor([i + 1, i + 2])} for i in range(8)]
    trainer = AccelTrainer(Contrast(), args, train_dataset=dataset, micro_batch_size=4)
    with pytest.warns(UserWarning, match="not the mean of its micro-batches.*micro_batch_size=8"):
        trainer.train()
