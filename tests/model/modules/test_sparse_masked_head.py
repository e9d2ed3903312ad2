import pytest
import torch
import torch.nn.functional as F
from ranks import backend_args, run_on_ranks
from transformers import AutoConfig, AutoModelForMaskedLM, TrainerCallback, TrainingArguments

from hf_accel import AccelTrainer, ChunkedCrossEntropy, LearningRateSearch, SharpnessAware, SparseMaskedHead
from hf_accel.model.modules.sparse_masked_head import _is_by_position
from hf_accel.testing import losses_of, tiny_bert, tiny_llama, tiny_trainer

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 48}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def model_of(kind):
    more = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}
    settings = more if kind == "distilbert" else NO_DROPOUT if kind != "modernbert" else {}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = AutoConfig.for_model(kind, **(SMALL | settings | special | {"max_position_embeddings": 64}))
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(config, dtype=torch.float64)


class Recorder(TrainerCallback):
    """What a model is given, and the gradients of the step."""

    def __init__(self, model):
        self.inputs = []
        self.hook = model.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, model, args, inputs):
        if model.training:  # the first step is evaluated, too, to see which loss the model has
            self.inputs.append(inputs)

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.hook.remove()


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "distilbert", "electra"])
def test_loss_and_gradients_are_those_of_all_positions(kind, tmp_path):
    model = model_of(kind)
    trainer = tiny_trainer(
        [SparseMaskedHead()], tmp_path, model=model, max_steps=1, micro_batch_size=4, max_grad_norm=0, learning_rate=0.0
    )
    recorder = Recorder(model)
    trainer.add_callback(recorder)
    trainer.train()
    model.zero_grad()
    total, items = 0.0, 0
    for inputs in recorder.inputs:
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        total = total + F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), reduction="sum")
        items += int((inputs["labels"] != -100).sum())
    assert len(recorder.inputs) == 2
    (total / items).backward()
    assert losses_of(trainer)[0] == pytest.approx(float(total.detach() / items), abs=1e-4)  # logged with four digits
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == recorder.grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(recorder.grads[name], grad, rtol=1e-9, atol=1e-14)


def test_the_projection_is_made_where_there_are_labels(tmp_path):
    """And everywhere in evaluation."""
    rows = {True: 0, False: 0}
    counts = {"positions": 0, "labels": 0}
    model = tiny_bert(dropout=0.0)

    def count(module, args):
        rows[module.training] += args[0].numel() // args[0].shape[-1]

    def see(module, args, inputs):
        if module.training:
            counts["positions"] += inputs["input_ids"].numel()
            counts["labels"] += int((inputs["labels"] != -100).sum())

    model.cls.predictions.decoder.register_forward_pre_hook(count)
    model.register_forward_pre_hook(see, with_kwargs=True)
    trainer = tiny_trainer([SparseMaskedHead()], tmp_path, model=model, num_train_epochs=1)
    rows[True] = rows[False] = 0
    trainer.train()
    assert rows[True] == counts["labels"] < counts["positions"] / 4
    assert trainer.receipt.techniques[0]["report"]["projected"] == counts["labels"] / counts["positions"]
    trainer.predict(trainer.eval_dataset)
    assert rows[False] >= sum(len(row["input_ids"]) for row in trainer.eval_dataset)
    expected = tiny_trainer([], tmp_path, model=model, modality="masked text").evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == expected


def test_a_batch_without_masks_has_no_loss_and_gradients_of_0(tmp_path):
    trainer = tiny_trainer([SparseMaskedHead()], tmp_path, max_steps=2)
    collate = trainer.data_collator
    trainer.data_collator = lambda features: {
        k: v if k != "labels" else v * 0 - 100 for k, v in collate(features).items()
    }
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert losses_of(trainer) == [0.0, 0.0]
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.ci
@pytest.mark.parametrize("first", [True, False])
def test_copies_of_the_model_are_trained_beside_it(first, tmp_path):
    techniques = [SparseMaskedHead(), LearningRateSearch(share=0.5), SharpnessAware()]
    trainer = tiny_trainer(techniques if first else techniques[::-1], tmp_path, num_train_epochs=12)
    trainer.train()
    assert all(t.took_effect(e["report"]) for t, e in zip(trainer.techniques, trainer.receipt.techniques, strict=True))


def test_what_it_cannot_do_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"SparseMaskedHead\(\) needs a masked language model; LlamaForCausalLM is none \(causal LM"
    ):
        tiny_trainer([SparseMaskedHead()], tmp_path, model=tiny_llama(), modality="text")
    for pair in ([SparseMaskedHead(), ChunkedCrossEntropy()], [ChunkedCrossEntropy(), SparseMaskedHead()]):
        with pytest.raises(ValueError, match=r"does not support ChunkedCrossEntropy\(\) because both read the outputs"):
            tiny_trainer(pair, tmp_path)
    model = tiny_bert()
    assert _is_by_position(model)
    model.cls.register_forward_pre_hook(lambda module, args: (args[0] - args[0].mean(1, keepdim=True),))
    with pytest.raises(ValueError, match="because its head mixes positions"):
        tiny_trainer([SparseMaskedHead()], tmp_path, model=model)


@pytest.mark.distributed
@pytest.mark.ci
def test_weights_that_zero_has_cut_are_refused(tmp_path):
    def run():
        args = TrainingArguments(str(tmp_path), **backend_args("zero3"))  # from now on models are made in parts
        model = model_of("bert")
        with pytest.raises(ValueError, match="ZeRO-3 has partitioned the model's weights.*before TrainingArguments"):
            AccelTrainer(model, args, techniques=[SparseMaskedHead()])
        return True

    assert run_on_ranks(run, backend="zero3") == [True, True]
