"""Ranks come to one verdict about a loss, though only one of them sees that it differs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_accel import AccelTrainer, ImportanceSampling

pytestmark = [pytest.mark.distributed, pytest.mark.ci]

SIZES = dict(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
LABELS = [0, 0, 0, 0, 1, 0, 1, 0]
"""Sequential: the first rank has 4 of class 0, of which the loss is the usual one."""
ROWS = [{"input_ids": torch.tensor([1, i + 3, 2]), "labels": torch.tensor(LABELS[i])} for i in range(8)]


class Weighted(BertForSequenceClassification):
    def forward(self, input_ids=None, labels=None):
        logits = self.classifier(self.bert(input_ids)[1])
        losses = F.cross_entropy(logits, labels, torch.tensor([1.0, 20.0], dtype=logits.dtype), reduction="none")
        return SequenceClassifierOutput(loss=losses.mean(), logits=logits)


def model():
    torch.manual_seed(0)
    return Weighted(BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).double()


def train(directory, micro_batch_size, techniques=()):
    args = TrainingArguments(
        str(directory), per_device_train_batch_size=4, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = AccelTrainer(
        model(), args, train_dataset=ROWS, micro_batch_size=micro_batch_size, techniques=list(techniques)
    )
    trainer.train()
    return trainer.accel.step.head is None, {n: p.detach() for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("micro_batch_size", [4, 2])
def test_the_loss_of_the_model_is_kept_on_every_rank(micro_batch_size, tmp_path):
    whole = model()
    inputs = {name: torch.stack([row[name] for row in ROWS]) for name in ROWS[0]}
    whole(**inputs).loss.backward()
    right = {n: (p - p.grad).detach() for n, p in whole.named_parameters() if p.grad is not None}
    for dropped, weights in run_on_ranks(train, tmp_path, micro_batch_size):
        assert dropped
        for name, value in right.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-12)


def test_a_technique_is_refused_on_every_rank(tmp_path):
    def refused():
        with pytest.raises(ValueError, match=r"ImportanceSampling\(.*does not support the loss of Weighted"):
            train(tmp_path, 4, [ImportanceSampling()])
        return True

    assert run_on_ranks(refused) == [True, True]


class OverTokens(torch.nn.Module):
    """A mean over examples of their own means over labels that count."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).double())

    def forward(self, input_ids, labels):
        losses = F.cross_entropy(self.table[input_ids].flatten(0, 1), labels.flatten(), reduction="none")
        counted = labels.ne(-100)
        return {"loss": (losses.view_as(labels).mul(counted).sum(1) / counted.sum(1)).mean()}


def rows_of_tokens():
    """Only the second rank has micro-batches with other shares of labels that count."""
    rows = []
    for i in range(8):
        labels = torch.tensor([i % 5, (i + 1) % 5, (i + 2) % 5])
        labels[1:] = torch.where(torch.tensor(i >= 6), torch.tensor(-100), labels[1:])
        rows.append({"input_ids": torch.tensor([i + 1, i + 2, i + 3]), "labels": labels})
    return rows


def train_over_tokens(directory):
    args = TrainingArguments(
        str(directory), per_device_train_batch_size=4, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = AccelTrainer(OverTokens(), args, train_dataset=rows_of_tokens(), micro_batch_size=2)
    trainer.train()
    return trainer.accel.step.proof._mean_over, trainer.model.table.detach()


def test_ranks_agree_on_what_a_loss_is_a_mean_of(tmp_path):
    whole, rows = OverTokens(), rows_of_tokens()
    whole(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]})["loss"].backward()
    right = (whole.table - whole.table.grad).detach()
    found = run_on_ranks(train_over_tokens, tmp_path)
    assert [over for over, _ in found] == ["", ""]
    for _, table in found:
        torch.testing.assert_close(table, right, rtol=1e-9, atol=1e-12)
