"""The learning rate of a narrow model in a wide one."""

import copy
import math

import numpy as np
import pytest
import torch
from architectures import inputs_for, tiny
from transformers import AutoModelForCausalLM

from hf_accel import LoRA, MuParametrization
from hf_accel.testing import losses_of, tiny_llama, tiny_trainer, weights_of

NO_DROPOUT = dict.fromkeys(
    "attention_dropout hidden_dropout_prob attention_probs_dropout_prob attn_pdrop resid_pdrop embd_pdrop".split(), 0.0
)
WIDTHS = (64, 128, 256, 512)
FAMILIES = [("Llama", False), ("Llama", True), ("Qwen", False), ("GPT-2", True), ("GPT-2", False), ("BERT", True)]


def wide(name, width, tied, dtype=torch.float32, **values):
    """A model of two blocks, with heads of 16."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 16}
    sizes |= {"num_hidden_layers": 2, "tie_word_embeddings": tied, "num_key_value_heads": width // 16}
    return tiny(name, dtype, **(sizes | NO_DROPOUT | ({"head_dim": 16} if name == "Qwen" else {}) | values))


def steps_of(model, optimizer, steps, ids_BL):
    """Train on one batch again and again, by hand."""
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids_BL, labels=ids_BL).loss.backward()
        optimizer.step()


def few_words(seed=0):
    """Of eight words, for random words of a narrow model overlap by chance, which has nothing to do with rates."""
    return torch.randint(3, 11, (4, 16), generator=torch.Generator().manual_seed(seed))


def changes(name, tied, techniques, width, directory):
    """Mean change, in a few steps, of what the embeddings, each block and the head give."""
    trainer = tiny_trainer(techniques, directory, model=wide(name, width, tied), learning_rate=3e-3)
    ids_BL, model = few_words(), trainer.model

    def given():
        with torch.no_grad():
            outputs = model.eval()(input_ids=ids_BL, output_hidden_states=True)
        hidden = outputs.hidden_states if name == "BERT" else outputs.hidden_states[:-1]  # the last is after its norm
        return [*hidden, outputs.logits]

    before = given()
    steps_of(model, trainer.create_optimizer(), 5, ids_BL)
    return [float((new - old).abs().mean()) for new, old in zip(given(), before, strict=True)]


def slopes(name, tied, directory, **fields):
    """By layer, the exponent of the width in the size of the change."""
    techniques = [MuParametrization(**fields)] if fields else []
    sizes = [changes(name, tied, techniques, width, directory) for width in WIDTHS]
    return np.polyfit(np.log(WIDTHS), np.log(sizes), 1)[0]


@pytest.mark.parametrize("name, tied", FAMILIES)
def test_activations_change_alike_at_any_width(name, tied, tmp_path):
    """The coordinate check of Tensor Programs V; without the technique, wide models change more."""
    assert np.abs(slopes(name, tied, tmp_path, base_width=64)).max() < 0.15
    without = slopes(name, tied, tmp_path)
    assert without[1:].max() > 0.4 and without[-1] > 0.3


def as_in_table_8(model, m, lr, weight_decay):
    """An optimizer and a multiplier on the logits, written by hand, for a model that is m times as wide."""
    inside, outside, vectors = [], [], []
    for name, parameter in model.named_parameters():
        in_block = any(part in name for part in (".layers.", ".h.", ".layer.", "transform.dense"))
        (vectors if parameter.dim() == 1 else inside if in_block else outside).append(parameter)
    with torch.no_grad():
        for matrix in inside:
            matrix /= math.sqrt(m)

    def multiply(head, inputs, logits):
        bias = 0 if head.bias is None else head.bias
        return (logits - bias) / m + bias

    model.get_output_embeddings().register_forward_hook(multiply)
    groups = [
        {"params": inside, "lr": lr / m, "weight_decay": weight_decay * m},
        {"params": outside, "lr": lr, "weight_decay": weight_decay},
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, eps=1e-30)


@pytest.mark.parametrize("name, tied", FAMILIES)
def test_it_is_table_8_without_its_multiplier(name, tied, tmp_path):
    """The oracle multiplies the logits, and neither the head's matrix nor the norm before it is treated in any way."""
    oracle = wide(name, 64, tied, torch.float64)
    settings = {"learning_rate": 1e-3, "weight_decay": 0.1, "adam_epsilon": 1e-30, "optim": "adamw_torch"}
    model = copy.deepcopy(oracle)
    trainer = tiny_trainer([MuParametrization(base_width=16)], tmp_path, model=model, **settings)
    by_hand = as_in_table_8(oracle, 4, 1e-3, 0.1)
    ids_BL = few_words()
    before = oracle(input_ids=ids_BL).logits
    steps_of(oracle, by_hand, 4, ids_BL)
    steps_of(trainer.model, trainer.create_optimizer(), 4, ids_BL)
    with torch.no_grad():
        logits, expected = (m.eval()(input_ids=ids_BL).logits for m in (trainer.model, oracle))
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_at_the_width_of_the_base_it_changes_nothing(tmp_path):
    plain = tiny_trainer([], tmp_path)
    plain.train()
    trainer = tiny_trainer([MuParametrization(base_width=16)], tmp_path)
    trainer.train()
    assert losses_of(trainer) == losses_of(plain)
    assert all(torch.equal(value, weights_of(plain)[name]) for name, value in weights_of(trainer).items())


def test_a_model_that_is_narrower_than_the_base_learns_faster_within_its_width(tmp_path):
    trainer = tiny_trainer([MuParametrization(base_width=32)], tmp_path, weight_decay=0.1)
    groups = trainer.accel.optimization.parameter_groups(trainer.model)
    rates = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert rates["model.layers.0.mlp.up_proj.weight"] == pytest.approx((2 * 5e-3, 0.05))
    assert rates["lm_head.weight"] == pytest.approx((2 * 5e-3, 0.05))
    assert rates["model.embed_tokens.weight"] == pytest.approx((5e-3, 0.1))
    assert rates["model.norm.weight"] == pytest.approx((5e-3, 0.0))
    ratio = trainer.model.lm_head.weight / tiny_llama().lm_head.weight
    assert torch.allclose(ratio, torch.tensor(2.0))


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_an_ordinary_checkpoint(tied, tmp_path):
    model = tiny("GPT-2", tie_word_embeddings=tied)
    trainer = tiny_trainer([MuParametrization(base_width=4)], tmp_path, model=model, max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    inputs = inputs_for("GPT-2")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, trainer.model.eval()(**inputs).logits)
    assert loaded.config.to_dict().keys() == tiny("GPT-2").config.to_dict().keys()


def test_what_cannot_be_parametrized_is_refused(tmp_path):
    technique = MuParametrization(base_width=4)
    with pytest.raises(ValueError, match=r"MuParametrization\(.*T5ForConditionalGeneration: the axes of its"):
        tiny_trainer([technique], tmp_path, model=tiny("T5"))
    with pytest.raises(ValueError, match="its rates need an optimizer like Adam, not optim='sgd'. Set"):
        tiny_trainer([technique], tmp_path, optim="sgd")
    with pytest.raises(ValueError, match="base_width must be >= 1"):
        MuParametrization(base_width=0)
    with pytest.raises(ValueError, match="both claim the weights under adapters"):
        tiny_trainer([technique, LoRA()], tmp_path)
