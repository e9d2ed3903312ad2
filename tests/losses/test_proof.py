"""A run trains on the user's loss: of the model, of the trainer's class or of its instance."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutput, SequenceClassifierOutput

from hf_accel import AccelTrainer, ImportanceSampling, InfoBatch, accelerated

N = 16
TEXT = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
IDS = [[1, i + 3, 2, 7] for i in range(N)]


class WeightedClasses(BertForSequenceClassification):
    def forward(self, input_ids=None, labels=None):
        logits = self.classifier(self.bert(input_ids)[1])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, labels, torch.tensor([1.0, 20.0]), reduction="sum") / len(labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Focal(BertForSequenceClassification):
    def forward(self, input_ids=None, labels=None):
        logits = self.classifier(self.bert(input_ids)[1])
        loss = None
        if labels is not None:
            entropy = F.cross_entropy(logits, labels, reduction="none")
            loss = ((1 - (-entropy).exp()) ** 2 * entropy).mean()
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Penalized(BertForSequenceClassification):
    def forward(self, input_ids=None, labels=None):
        outputs = super().forward(input_ids=input_ids, labels=labels)
        if labels is not None:
            outputs.loss = outputs.loss + 1000 * outputs.logits.square().mean()
        return outputs


class OwnShift(LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def model_of(kind):
    torch.manual_seed(0)
    return kind(LlamaConfig(**TEXT) if issubclass(kind, LlamaForCausalLM) else BertConfig(**TEXT, **NO_DROPOUT))


def labeled(kind=BertForSequenceClassification):
    labels = IDS if issubclass(kind, LlamaForCausalLM) else [int(i % 8 == 0) for i in range(N)]
    return Dataset.from_dict({"input_ids": IDS, "labels": labels})


def trained(cls, model, dataset, tmp_path, **kwargs):
    """The loss that is logged for one update of the whole data set, and the weights after it."""
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=len(dataset), max_steps=1, optim="sgd", learning_rate=1.0,
        lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True, label_names=["labels"],
    )  # fmt: skip
    compute_loss = kwargs.pop("compute_loss", None)
    trainer = cls(model=model, args=args, train_dataset=dataset, **kwargs)
    if compute_loss is not None:
        trainer.compute_loss = compute_loss
    trainer.train()
    return trainer.state.log_history[0]["loss"], {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same(found, right):
    assert found[0] == pytest.approx(right[0], rel=2e-4)
    for name, value in right[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("micro_batch_size", [4, 5])
@pytest.mark.parametrize("kind", [WeightedClasses, Focal, Penalized, OwnShift])
def test_a_models_own_loss_is_trained_on_in_micro_batches(kind, micro_batch_size, tmp_path):
    dataset = labeled(kind)
    right = trained(Trainer, model_of(kind), dataset, tmp_path)
    assert_same(trained(AccelTrainer, model_of(kind), dataset, tmp_path, micro_batch_size=micro_batch_size), right)


@pytest.mark.parametrize("technique", [ImportanceSampling, InfoBatch])
@pytest.mark.parametrize("kind", [WeightedClasses, Focal, Penalized])
def test_a_technique_that_needs_losses_of_examples_refuses_an_unknown_loss(kind, technique, tmp_path):
    model, dataset = model_of(kind), labeled(kind)
    with torch.no_grad():
        own = model(**{name: torch.tensor(dataset[name]) for name in dataset.column_names}).loss.item()
    with pytest.raises(ValueError, match=rf"{own:.4f}.*example_loss_func="):
        trained(AccelTrainer, model, dataset, tmp_path, techniques=[technique()])


def test_a_known_loss_is_computed_once_for_each_micro_batch(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    rows = []
    model.register_forward_pre_hook(
        lambda module, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    trained(AccelTrainer, model, labeled(LlamaForCausalLM), tmp_path, micro_batch_size=4)
    assert rows == [4, 4, 4, 4]


@pytest.mark.parametrize("micro_batch_size", [2, 1])
def test_the_auxiliary_loss_of_experts_is_the_mean_over_micro_batches(micro_batch_size, tmp_path):
    rows = torch.randint(3, 32, (8, 6), generator=torch.Generator().manual_seed(1))
    dataset = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})

    def made():
        torch.manual_seed(0)
        experts = dict(num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=1.0)
        return MixtralForCausalLM(MixtralConfig(**TEXT | {"vocab_size": 32}, **experts))

    order = torch.randperm(8, generator=torch.Generator().manual_seed(42)).view(-1, micro_batch_size)
    model = made()
    means = [model(input_ids=rows[ids], labels=rows[ids]).loss for ids in order]  # each row has as many labels
    loss = sum(means) / len(means)
    loss.backward()
    right = loss.item(), {n: (p - p.grad).detach() for n, p in model.named_parameters()}
    assert_same(trained(AccelTrainer, made(), dataset, tmp_path, micro_batch_size=micro_batch_size), right)


def weighted_mean_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
    labels = inputs["labels"]
    logits = model(input_ids=inputs["input_ids"]).logits
    return (torch.tensor([1.0, 3.0])[labels] * F.cross_entropy(logits, labels, reduction="none")).mean()


def with_own_loss(base):
    class OwnLoss(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return weighted_mean_loss(model, inputs)

    return OwnLoss


OWN_LOSSES = {
    "class of ours": (with_own_loss(AccelTrainer), {}),
    "class of Trainer": (accelerated(with_own_loss(Trainer)), {}),
    "instance": (AccelTrainer, {"compute_loss": weighted_mean_loss}),
    "function": (
        AccelTrainer,
        {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: F.cross_entropy(outputs.logits, labels)},
    ),
}


@pytest.mark.parametrize("where", OWN_LOSSES)
@pytest.mark.parametrize("micro_batch_size", [4, 5])
def test_a_trainers_own_mean_is_averaged_over_micro_batches(where, micro_batch_size, tmp_path):
    cls, given = OWN_LOSSES[where]
    plain = Trainer if given else with_own_loss(Trainer)
    right = trained(plain, model_of(BertForSequenceClassification), labeled(), tmp_path, **given)
    model = model_of(BertForSequenceClassification)
    assert_same(trained(cls, model, labeled(), tmp_path, micro_batch_size=micro_batch_size, **given), right)


def test_a_trainers_own_sum_over_the_given_items_is_left_as_it_is(tmp_path):
    calls = []

    def loss(outputs, labels, num_items_in_batch=None):
        calls.append(len(labels))
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    given = {"compute_loss_func": loss}
    right = trained(Trainer, model_of(BertForSequenceClassification), labeled(), tmp_path, **given)
    calls.clear()
    model = model_of(BertForSequenceClassification)
    assert_same(trained(AccelTrainer, model, labeled(), tmp_path, micro_batch_size=4, **given), right)
    assert calls == [4, 4, 4, 4]


def masked_mean(outputs, labels, num_items_in_batch=None):
    """A mean that is 0 / 0, as are its gradients, where no label counts."""
    counts = labels[:, 1:].ne(-100)
    losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return (losses * counts).sum() / counts.sum()


def masked_mean_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    return masked_mean(model(**inputs), labels)


@pytest.mark.parametrize("micro_batch_size", [1, 5])
@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (OwnShift, {}),
        (LlamaForCausalLM, {"compute_loss_func": masked_mean}),
        (LlamaForCausalLM, {"compute_loss": masked_mean_loss}),
    ],
    ids=["model", "function", "trainer"],
)
def test_a_micro_batch_without_labels_has_no_share(kind, given, micro_batch_size, tmp_path):  # karpathy/nanochat#618
    labels = [[-100] * 4 if i % 3 else [*ids[: i % 4 + 1], *[-100] * (3 - i % 4)] for i, ids in enumerate(IDS)]
    labels[0] = IDS[0]
    dataset = Dataset.from_dict({"input_ids": IDS, "labels": labels})
    right = trained(Trainer, model_of(kind), dataset, tmp_path, **given)
    found = trained(AccelTrainer, model_of(kind), dataset, tmp_path, micro_batch_size=micro_batch_size, **given)
    assert_same(found, right)


def test_a_proof_leaves_nothing_in_the_trainers_own_metrics(tmp_path):
    class Recording(AccelTrainer):  # as the trainers of TRL do
        def __init__(self, **kwargs):
            self._metrics = {"train": [], "eval": []}
            super().__init__(**kwargs)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self._metrics["train" if model.training else "eval"].append(len(inputs["labels"]))
            return F.cross_entropy(model(input_ids=inputs["input_ids"]).logits, inputs["labels"])

    made = []

    def recording(**kwargs):
        made.append(Recording(**kwargs))
        return made[0]

    trained(recording, model_of(BertForSequenceClassification), labeled(), tmp_path, micro_batch_size=4)
    assert made[0]._metrics["eval"] == [] and set(made[0]._metrics["train"]) == {4}
