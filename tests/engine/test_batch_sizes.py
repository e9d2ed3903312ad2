"""How many examples and tokens a batch has, and budgets in them under collators of every structure."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_accel import AccelTrainer, Budget, RandomSubset, attach
from hf_accel.engine.batch_sizes import num_examples, num_tokens
from hf_accel.testing import losses_of, tiny_trainer

ROWS = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("batch", "examples"),
    [
        ({"input_ids": ROWS}, 4),
        ({"scale": torch.tensor(2.0), "input_ids": ROWS}, 4),
        ((ROWS, torch.zeros(4)), 4),
        ([ROWS, torch.zeros(4)], 4),
        ([{"prompt": "a"}, {"prompt": "b"}], 2),
        ({"input_ids": [torch.arange(3), torch.arange(5)], "labels": torch.zeros(2)}, 2),
        ({"query": {"x": ROWS}, "passage": {"x": ROWS}}, 4),
        (ROWS, 4),
        ({"scale": 2.0}, None),
        (object(), None),
    ],
)
def test_num_examples(batch, examples):
    assert num_examples(batch) == examples


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        ({"input_ids": torch.ones(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])}, 4),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long)}, 8),
        ({"input_ids": [torch.arange(3), torch.arange(5)]}, 8),
        ({"query": {"attention_mask": torch.ones(2, 3)}, "answer": {"attention_mask": torch.ones(2, 2)}}, 10),
        ({"a_attention_mask": torch.ones(2, 3), "b_attention_mask": torch.ones(2, 2)}, 10),
        ({"input_ids": torch.ones(2, 4)}, None),
        ([{"prompt": "a"}], None),
    ],
)
def test_num_tokens(batch, tokens):
    assert num_tokens(batch, "input_ids") == tokens


class Pairs(nn.Module):
    """Two towers; takes nested inputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, query, passage):
        scores = self.layer(query["x"]) @ self.layer(passage["x"]).T
        return {"loss": F.cross_entropy(scores, torch.arange(len(scores)))}


def nested(rows):
    return {name: {"x": torch.stack([row[name] for row in rows])} for name in ("query", "passage")}


class Chosen(nn.Module):
    """A model that sees two rows for each example, like those of preferences."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x):
        chosen, rejected = self.layer(x).chunk(2)
        return {"loss": -F.logsigmoid(chosen - rejected).mean()}


class Linear(nn.Module):
    """A model of a tuple's first entry."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x)


class OfTuples(AccelTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return F.cross_entropy(model(inputs[0]), inputs[1])


def llama():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )


EXAMPLES = 20
KINDS = {
    "nested": (AccelTrainer, Pairs, [{"query": torch.randn(3), "passage": torch.randn(3)} for _ in range(20)], nested),
    "preferences": (AccelTrainer, Chosen, [torch.randn(2, 3) for _ in range(20)],
                    lambda rows: {"x": torch.stack(rows).transpose(0, 1).flatten(0, 1)}),
    "tuples": (OfTuples, Linear, [(torch.randn(3), torch.tensor(i % 2)) for i in range(20)],
               lambda rows: tuple(map(torch.stack, zip(*rows, strict=True)))),
    "flattened": (AccelTrainer, llama, [{"input_ids": [1, 2, 3 + i % 5][: 2 + i % 2]} for i in range(20)],
                  DataCollatorWithFlattening()),
}  # fmt: skip


def trainer_of(kind, tmp_path, budget, **kwargs):
    cls, model, data, collate = KINDS[kind]
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, remove_unused_columns=False, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    given = {"model": model(), "args": args, "train_dataset": data, "data_collator": collate}
    return cls(**given, techniques=[Budget(budget)], **kwargs)


@pytest.mark.parametrize(
    ("kind", "micro_batch_size"),
    # Scores of pairs are between all examples of a micro-batch.
    [(kind, size) for kind in KINDS for size in (None, 4) if (kind, size) != ("nested", 4)],
)
def test_a_budget_of_an_epochs_samples_is_one_epoch(kind, micro_batch_size, tmp_path):
    trainer = trainer_of(kind, tmp_path, f"{EXAMPLES}samples", micro_batch_size=micro_batch_size)
    trainer.train()
    assert trainer.state.global_step == 3  # of 8, 8 and 4
    assert trainer.receipt.samples == EXAMPLES
    assert trainer.receipt.progress == 1.0
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([5e-5, 5e-5 * (1 - 8 / 20), 5e-5 * (1 - 16 / 20)])


@pytest.mark.parametrize("kind", ["nested", "preferences"])
def test_a_budget_in_tokens_that_cannot_be_counted_is_refused(kind, tmp_path):
    with pytest.raises(ValueError, match=r"Budget\(.*\) does not support tokens here .* Give the budget in"):
        trainer_of(kind, tmp_path, "100tok").train()


def test_a_budget_in_samples_that_cannot_be_counted_is_refused(tmp_path):
    class OwnLoader(AccelTrainer):
        def get_train_dataloader(self):
            return [{"scale": torch.tensor(1.0)}] * 4

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, scale):
            return {"loss": (self.weight * scale) ** 2}

    args = TrainingArguments(str(tmp_path), report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True)
    trainer = OwnLoader(model=Scaled(), args=args, train_dataset=[{"scale": 1.0}] * 4, techniques=[Budget("2samples")])
    with pytest.raises(ValueError, match=r"Budget\(limit='2samples'\) does not support samples here"):
        trainer.train()


def test_lists_of_examples_are_taken_as_trainer_takes_them(tmp_path):
    class OfLists(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return F.cross_entropy(model(torch.stack([x for x, _ in inputs])), torch.stack([y for _, y in inputs]))

    class OfListsToo(AccelTrainer):
        compute_loss = OfLists.compute_loss

    after = []
    for cls in (OfLists, OfListsToo):
        torch.manual_seed(0)
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, num_train_epochs=1, remove_unused_columns=False,
            report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, learning_rate=0.1,
        )  # fmt: skip
        data = [(torch.arange(3.0) * i, torch.tensor(i % 2)) for i in range(8)]
        trainer = cls(model=Linear(), args=args, train_dataset=data, data_collator=list)
        trainer.train()
        after.append(trainer.model.layer.weight.detach().clone())
    assert torch.equal(*after)


ACCUMULATION = {"gradient_accumulation_kwargs": {"num_steps": 4}}


@pytest.mark.parametrize("how", ["stream", "budget", "attached"])
def test_accelerates_number_of_accumulated_batches_is_trainers(how, tmp_path):
    """64 examples in batches of 4, of which 4 are an update: 4 updates in an epoch."""
    techniques = [Budget("2epochs")] if how == "budget" else [RandomSubset(keep=1.0)]
    logs = []
    for name in ("plain", how):
        args = {"accelerator_config": copy.deepcopy(ACCUMULATION), "per_device_train_batch_size": 4}
        if name == "plain" or how == "attached":
            trainer = tiny_trainer([], tmp_path, trainer_class=Trainer, num_train_epochs=2, **args)
            if name == how:
                attach(trainer, techniques)
        else:
            epochs = {} if how == "budget" else {"num_train_epochs": 2}
            trainer = tiny_trainer(techniques, tmp_path, **epochs, **args)
        trainer.train()
        logs.append((trainer.state.global_step, losses_of(trainer)))
    assert logs[0] == logs[1] and logs[0][0] == 8
    assert trainer.accel.nominal_batch_size == 16


def test_two_numbers_of_accumulated_batches_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`num_steps` is set but gradient_accumulation_steps=2 .*Remove one\."):
        tiny_trainer([RandomSubset()], tmp_path, accelerator_config=ACCUMULATION, gradient_accumulation_steps=2)


def test_arguments_serve_two_trainers(tmp_path):
    args = TrainingArguments(str(tmp_path), accelerator_config=copy.deepcopy(ACCUMULATION), report_to=[], use_cpu=True)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    )
    assert [AccelTrainer(model, args).args.gradient_accumulation_steps for _ in range(2)] == [4, 4]
