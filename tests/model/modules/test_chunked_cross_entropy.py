import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_accel import ChunkedCrossEntropy, InfoBatch
from hf_accel.losses import head_of
from hf_accel.model.modules import chunked_cross_entropy as module
from hf_accel.model.modules.chunked_cross_entropy import _ends_in, chunked_cross_entropy
from hf_accel.testing import losses_of, tiny_convnext, tiny_llama, tiny_trainer

OF_ADAM = {"rtol": 1e-6, "atol": 1e-6}
"""It divides gradients that are nothing but rounding by their own size."""


def problem(tokens=37, width=6, vocabulary=11, dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[::4] = -100
    return draw(tokens, width), draw(vocabulary, width), draw(vocabulary) if bias else None, targets


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("logits", [11, 30, 10**6])
def test_losses_and_gradients_are_those_of_all_logits(smoothing, bias, even, logits, monkeypatch):
    monkeypatch.setitem(module.LOGITS_OF_A_CHUNK, "cpu", logits)
    hidden, weight, offset, targets = problem(bias=bias)
    leaves = [leaf for leaf in (hidden, weight, offset) if leaf is not None]
    weights = torch.ones(len(targets)) if even else torch.arange(len(targets)) / 10
    dense = F.cross_entropy(
        F.linear(hidden, weight, offset), targets, reduction="none", label_smoothing=smoothing, ignore_index=-100
    )
    expected = torch.autograd.grad((dense * weights).sum() * 0.3, leaves)
    chunked = chunked_cross_entropy(hidden, weight, offset, targets, smoothing)
    torch.testing.assert_close(chunked, dense, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad((chunked * weights).sum() * 0.3, leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_what_is_frozen_or_has_no_label_gets_no_gradient():
    hidden, weight, _, targets = problem(bias=False)
    weight.requires_grad_(False)
    chunked_cross_entropy(hidden, weight, None, targets).sum().backward()
    assert weight.grad is None and hidden.grad[targets == -100].abs().max() == 0
    nothing = torch.full_like(targets, -100)
    hidden.grad = None
    chunked_cross_entropy(hidden, weight.requires_grad_(), None, nothing).sum().backward()
    assert hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside it hold at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor.untyped_storage())
        return out

    def hold(self, storage):
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = weakref.finalize(storage, self.free, key, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def free(self, key, size):
        del self.alive[key]
        self.now -= size


@pytest.mark.ci
def test_a_large_vocabulary_takes_a_quarter_of_the_memory_or_less():
    tokens, width, vocabulary = 4096, 64, 50257
    hidden, weight, _, targets = problem(tokens, width, vocabulary, torch.float32, bias=False)
    targets = targets.where(targets >= 0, 0)

    def measured(loss):
        hidden.grad = weight.grad = None
        with PeakBytes() as mode:
            value = loss()
            value.backward()
        return mode.peak, value.detach(), hidden.grad, weight.grad

    dense = measured(lambda: F.cross_entropy(F.linear(hidden, weight), targets))
    chunked = measured(lambda: chunked_cross_entropy(hidden, weight, None, targets).mean())
    assert chunked[0] < dense[0] / 4
    for a, b in zip(chunked[1:], dense[1:], strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_training_is_that_with_all_logits(tmp_path):
    exact = {"dropout": 0.0, "dtype": torch.float64}
    dense = tiny_trainer([], tmp_path, **exact)
    dense.train()
    chunked = tiny_trainer([ChunkedCrossEntropy()], tmp_path, **exact)
    chunked.train()
    assert losses_of(chunked) == pytest.approx(losses_of(dense), abs=1e-4)  # logged with four digits
    for name, value in dense.model.state_dict().items():
        torch.testing.assert_close(chunked.model.state_dict()[name], value, **OF_ADAM)
    assert chunked.evaluate()["eval_loss"] == pytest.approx(dense.evaluate()["eval_loss"])
    assert "forward" not in vars(chunked.model.lm_head)


def test_autocast_holds_for_the_projection_too(tmp_path, monkeypatch):
    dtypes = []
    chunks = module._chunks

    def see(hidden, weight, bias, wide):
        dtypes.append(weight.dtype)
        return chunks(hidden, weight, bias, wide)

    monkeypatch.setattr(module, "_chunks", see)
    found = []
    for techniques in ([], [ChunkedCrossEntropy()]):
        trainer = tiny_trainer(techniques, tmp_path, dropout=0.0, bf16=True, max_steps=1, optim="sgd", max_grad_norm=0)
        start = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        changes = [(trainer.model.state_dict()[name] - value).flatten() for name, value in start.items()]
        found.append((losses_of(trainer)[0], torch.cat(changes)))
    (dense_loss, dense), (loss, chunked) = found
    assert set(dtypes) == {torch.bfloat16}
    assert loss == pytest.approx(dense_loss, rel=1e-2)
    assert (chunked - dense).norm() < 2e-2 * dense.norm()


def test_examples_have_the_losses_they_have_with_all_logits(tmp_path):
    weighted = [
        tiny_trainer([InfoBatch(), *more], tmp_path, dropout=0.0, dtype=torch.float64)
        for more in ([], [ChunkedCrossEntropy()])
    ]
    for trainer in weighted:
        trainer.train()
    torch.testing.assert_close(weighted[0].model.lm_head.weight, weighted[1].model.lm_head.weight, **OF_ADAM)


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}


def test_the_end_of_a_model_is_tried():
    bert = BertForMaskedLM(BertConfig(**SMALL))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )
    for model in (bert, t5, tiny_llama()):
        assert _ends_in(model, model.get_output_embeddings())
        assert head_of(model).kind in ("masked LM", "seq2seq", "causal LM")
    capped = Gemma2ForCausalLM(Gemma2Config(num_key_value_heads=1, head_dim=8, **SMALL))
    assert not _ends_in(capped, capped.get_output_embeddings())


def test_models_without_a_projection_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not end in one linear projection to a vocabulary. Remove"):
        tiny_trainer([ChunkedCrossEntropy()], tmp_path, model=tiny_convnext(), modality="image")


def test_whisper_which_cannot_do_without_its_own_loss_is_refused(tmp_path):
    config = WhisperConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, num_mel_bins=8,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not support WhisperForConditionalGeneration .* its own loss. Remove"):
        tiny_trainer([ChunkedCrossEntropy()], tmp_path, model=WhisperForConditionalGeneration(config))


def test_a_model_that_cannot_be_tried_is_refused(tmp_path):
    class Particular(LlamaForCausalLM):
        def forward(self, input_ids=None, *, wanted, **kwargs):
            return super().forward(input_ids, **kwargs)

    model = Particular(tiny_llama().config)
    with pytest.raises(ValueError, match="does not support Particular because a trial .* Remove ChunkedCrossEntropy"):
        tiny_trainer([ChunkedCrossEntropy()], tmp_path, model=model)
