from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, BertForTokenClassification

from hf_accel import ReplacedTokenDetection, TokenCutoff
from hf_accel.optim.objective.replaced_token_detection import Generator, draw_from
from hf_accel.testing import largest_difference, tiny_bert, tiny_llama, tiny_trainer

EXACT = {"dropout": 0.0, "dtype": torch.float64}


class Kept(ReplacedTokenDetection):
    """Keeps what it made of the first step."""

    def transform_batch(self, batch):
        batch = super().transform_batch(batch)
        if not hasattr(self, "first_"):
            self.first_ = [
                (*texts, micro.inputs) for texts, micro in zip(self.texts_, batch.micro_batches, strict=True)
            ]
        return batch


def test_classes_are_drawn_by_their_probabilities():
    logits = torch.tensor([0.0, 1.0, -2.0, 2.0])
    n = 100_000
    points = (torch.arange(n) + 0.5) / n
    drawn = draw_from(logits.expand(n, 4), points)
    assert torch.allclose(torch.bincount(drawn).double() / n, logits.double().softmax(-1), atol=1e-4)
    assert draw_from(logits[None], torch.tensor([0.0])).item() == 0
    assert draw_from(logits[None], torch.tensor([1.0])).item() == 3


def test_the_generator_is_narrow_and_borrows_the_embeddings():
    model = tiny_bert(kind=BertForTokenClassification)
    generator = Generator(model, 0.5)
    config = generator.encoder.config
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (8, 1, 16)
    assert config.num_hidden_layers == 2
    vocabulary = model.config.vocab_size
    assert [n for n, p in generator.named_parameters() if vocabulary in p.shape] == ["bias"]


@pytest.mark.parametrize("size", [8, 3])
def test_the_gradient_is_that_of_a_loop(size, tmp_path):
    technique = Kept(rate=0.3, weight=7.0)
    trainer = tiny_trainer([technique], tmp_path, max_steps=1, max_grad_norm=0.0, micro_batch_size=size, **EXACT)
    model = trainer.model
    found, before = {}, {name: value.clone() for name, value in model.state_dict().items()}

    def spy(wrapped, grad_norm=None):
        found.update({n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None})
        return type(trainer)._get_grad_norm(trainer, wrapped, grad_norm)

    trainer._get_grad_norm = spy
    trainer.train()

    model.load_state_dict(before)
    model.zero_grad()
    tokens = sum(int(inputs["attention_mask"].sum()) for *_, inputs in technique.first_)
    total = torch.zeros((), dtype=torch.float64)
    embeddings = model.bert.embeddings.word_embeddings
    for new, ids, chosen, inputs in technique.first_:
        seen = inputs["attention_mask"].bool()
        assert torch.equal(new[~chosen], ids[~chosen]) and torch.equal(inputs["input_ids"], new)
        assert not chosen[~seen].any() and not torch.isin(ids[chosen], torch.tensor([0, 1, 2])).any()
        answers = model(input_ids=new, attention_mask=inputs["attention_mask"]).logits
        gaps = torch.where(chosen, 1, ids)
        states = model.generator.encoder(inputs_embeds=embeddings(gaps), attention_mask=inputs["attention_mask"])[0]
        logits = model.generator.predictions(states) @ embeddings.weight.T + model.generator.bias
        for row, t in seen.nonzero().tolist():
            replaced = int(new[row, t] != ids[row, t])
            sigmoid = torch.sigmoid(answers[row, t, 1] - answers[row, t, 0])
            total = total - 7.0 * torch.log(sigmoid if replaced else 1 - sigmoid)
            if chosen[row, t]:
                total = total + F.cross_entropy(logits[row, t], ids[row, t]) / 0.3
    (total / tokens).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(expected) == set(found) and largest_difference(found, expected) < 1e-9


def test_so_many_tokens_are_masked_and_the_generator_learns(tmp_path):
    technique = ReplacedTokenDetection(width=1.0, rate=0.3)
    trainer = tiny_trainer([technique], tmp_path, learning_rate=1e-2)
    shares, losses = [], []
    extra = technique.extra_loss

    def spy(model, inputs, outputs):
        loss = extra(model, inputs, outputs)
        (_, _, chosen), *_ = technique.texts_
        shares.append((int(chosen.sum()), int(inputs["attention_mask"].sum())))
        losses.append(float(loss.detach()) * 0.3 / int(chosen.sum()))
        return loss

    technique.extra_loss = spy
    trainer.train()
    masked, tokens = map(sum, zip(*shares, strict=True))
    assert abs(masked / tokens - 0.3) < 4 * (0.3 * 0.7 / tokens) ** 0.5
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.5
    assert 0 < trainer.receipt.techniques[0]["report"]["replaced"] < 0.3


def test_what_is_saved_is_the_model_alone(tmp_path):
    trainer = tiny_trainer([ReplacedTokenDetection()], tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved, report = AutoModelForTokenClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    own = {n: v for n, v in trainer.model.state_dict().items() if not n.startswith("generator.")}
    assert largest_difference(own, dict(saved.state_dict())) == 0.0 and len(own) < len(trainer.model.state_dict())


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            lambda: tiny_llama(),
            "does not support LlamaForCausalLM because it needs a model for token classification",
        ),
        (lambda: tiny_bert(), "does not support BertForMaskedLM because it needs a model for token classification"),
    ],
)
def test_other_models_are_refused(model, sentence, tmp_path):
    with pytest.raises(ValueError, match=f"ReplacedTokenDetection.*{sentence}"):
        tiny_trainer([ReplacedTokenDetection()], tmp_path, model=model())


def test_the_size_of_micro_batches_is_given(tmp_path):
    with pytest.raises(ValueError, match="tokens are replaced before .* Set micro_batch_size to a number"):
        tiny_trainer([ReplacedTokenDetection()], tmp_path, micro_batch_size="auto").train()


def test_a_mask_token_is_needed(tmp_path):
    trainer = tiny_trainer([ReplacedTokenDetection()], tmp_path)
    trainer.processing_class = SimpleNamespace(mask_token_id=None)
    with pytest.raises(ValueError, match="needs a mask token. Pass a tokenizer"):
        trainer.train()


def test_texts_that_are_changed_after_it_are_refused(tmp_path):
    sentence = r"ReplacedTokenDetection\(.*changed the texts after it\. List ReplacedTokenDetection last"
    with pytest.raises(ValueError, match=sentence):
        tiny_trainer([ReplacedTokenDetection(), TokenCutoff()], tmp_path).train()
    trainer = tiny_trainer([TokenCutoff(), ReplacedTokenDetection()], tmp_path, max_steps=2)
    trainer.train()
    assert trainer.receipt.steps == 2


def test_what_is_pushed_is_the_model_alone(tmp_path):
    trainer = tiny_trainer([ReplacedTokenDetection()], tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(_internal_call=True)  # as `push_to_hub` does
    assert not [name for name in load_file(tmp_path / "model.safetensors") if name.startswith("generator")]
