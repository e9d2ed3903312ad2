import math
import os
from functools import cache
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

from hf_accel.losses import ClassHead, ExampleLosses, head_from, head_of, honors_num_items, weighted_mean

B, L, V, C = 4, 7, 33, 3
TEXT = dict(
    vocab_size=V, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=0,
    max_position_embeddings=32, num_key_value_heads=2, eos_token_id=2, bos_token_id=1,
)  # fmt: skip
BART = dict(
    vocab_size=V, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, pad_token_id=0, eos_token_id=2, bos_token_id=1,
    decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
T5 = dict(vocab_size=V, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0, decoder_start_token_id=0)
GPT2 = dict(vocab_size=V, n_embd=8, n_layer=1, n_head=2, n_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
DISTIL = dict(vocab_size=V, dim=8, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=32, pad_token_id=0)
MODERN = dict(TEXT, cls_token_id=1, sep_token_id=2)
IMAGE = dict(image_size=8, patch_size=4, num_channels=3)
VIT = dict(IMAGE, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
WAV = dict(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8,), conv_stride=(4,),
    conv_kernel=(4,), num_feat_extract_layers=1, num_conv_pos_embeddings=2, num_conv_pos_embedding_groups=2,
    classifier_proj_size=4, mask_time_prob=0.0,
)  # fmt: skip
WHISPER = dict(BART, num_mel_bins=4, max_source_positions=8, max_target_positions=16)
MOONSHINE = dict(
    vocab_size=V, hidden_size=8, intermediate_size=16, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1,
    encoder_num_attention_heads=2, decoder_num_attention_heads=2, pad_token_id=0, max_position_embeddings=32,
)  # fmt: skip


def text_config():
    return {"vocab_size": V, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "model_type": "llama"}  # fmt: skip


LLAVA = dict(
    text_config=text_config(),
    vision_config=dict(VIT, model_type="clip_vision_model", projection_dim=8),
    image_token_index=32,
)

CAUSAL = {
    "LlamaForCausalLM": TEXT,
    "Qwen2ForCausalLM": TEXT,
    "GPT2LMHeadModel": GPT2,
    "BertLMHeadModel": dict(TEXT, is_decoder=True),
    "OPTForCausalLM": dict(TEXT, ffn_dim=16, word_embed_proj_dim=8),
    "BloomForCausalLM": dict(vocab_size=V, hidden_size=8, n_layer=1, n_head=2, pad_token_id=0, bos_token_id=1,
                             eos_token_id=2),
    "MixtralForCausalLM": dict(TEXT, num_local_experts=2, num_experts_per_tok=1),
    "BartForCausalLM": BART,
    "LlavaForConditionalGeneration": LLAVA,
}  # fmt: skip
MASKED = {
    "BertForMaskedLM": TEXT,
    "RobertaForMaskedLM": TEXT,
    "DistilBertForMaskedLM": DISTIL,
    "ElectraForMaskedLM": dict(TEXT, embedding_size=8),
    "ModernBertForMaskedLM": MODERN,
    "DebertaV2ForMaskedLM": TEXT,
}
SEQ2SEQ = {
    "T5ForConditionalGeneration": T5,
    "BartForConditionalGeneration": BART,
    "MarianMTModel": BART,
    "M2M100ForConditionalGeneration": BART,
    "WhisperForConditionalGeneration": WHISPER,
    "MoonshineForConditionalGeneration": MOONSHINE,
}
CLASSIFICATION = {
    "BertForSequenceClassification": TEXT,
    "RobertaForSequenceClassification": TEXT,
    "DistilBertForSequenceClassification": DISTIL,
    "ElectraForSequenceClassification": dict(TEXT, embedding_size=8),
    "ModernBertForSequenceClassification": MODERN,
    "DebertaV2ForSequenceClassification": TEXT,
    "GPT2ForSequenceClassification": GPT2,
    "LlamaForSequenceClassification": TEXT,
    "BartForSequenceClassification": BART,
    "T5ForSequenceClassification": dict(T5, eos_token_id=2),
}
IMAGES = {
    "ViTForImageClassification": VIT,
    "Dinov2ForImageClassification": VIT,
    "ResNetForImageClassification": dict(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1]),
    "ConvNextForImageClassification": dict(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, patch_size=2),
}
ONE_OF_SEVERAL = {
    "BertForMultipleChoice": TEXT,
    "BertForNextSentencePrediction": TEXT,
    "Wav2Vec2ForSequenceClassification": WAV,
}
TOKENS = {
    "BertForTokenClassification": TEXT,
    "DistilBertForTokenClassification": DISTIL,
    "ModernBertForTokenClassification": MODERN,
    "GPT2ForTokenClassification": GPT2,
    "LlamaForTokenClassification": TEXT,
    "T5ForTokenClassification": T5,
}
ANSWERS = {
    "BertForQuestionAnswering": TEXT,
    "DistilBertForQuestionAnswering": DISTIL,
    "LlamaForQuestionAnswering": TEXT,
    "ModernBertForQuestionAnswering": MODERN,
    "BartForQuestionAnswering": BART,
}
LANGUAGE = {**CAUSAL, **MASKED, **SEQ2SEQ}
EVERYTHING = {**LANGUAGE, **CLASSIFICATION, **IMAGES, **ONE_OF_SEVERAL, **TOKENS, **ANSWERS}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def build(name, **options):
    """A tiny model in float64, without dropout, in training mode."""
    cls = getattr(hf, name)
    config = cls.config_class(**{**EVERYTHING[name], **options})
    config._attn_implementation = config._experts_implementation = "eager"
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    torch.manual_seed(1)
    model = cls(config).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for parameter in model.parameters():  # away from the initial near-uniform predictions
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@cache
def shared(name):
    return build(name)


def text(rows=B, length=L):
    lengths = torch.randint(4, length + 1, (rows,))
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(3, V - 1, (rows, length))
    ids[torch.arange(rows), lengths - 1] = 2  # Bart pools where the end of the sequence is
    return {"input_ids": ids * mask, "attention_mask": mask}


def labels_for(inputs, classes, ignored=0.3):
    labels = torch.randint(0, classes, inputs["input_ids"].shape)
    labels[torch.rand(labels.shape) < ignored] = -100
    return labels.masked_fill(inputs["attention_mask"] == 0, -100)


def batch_for(name):
    if name in IMAGES:
        return {"pixel_values": torch.randn(B, 3, 8, 8).double(), "labels": torch.randint(0, 2, (B,))}
    if name == "Wav2Vec2ForSequenceClassification":
        return {"input_values": torch.randn(B, 64).double(), "labels": torch.randint(0, 2, (B,))}
    inputs = text()
    if name in CAUSAL:
        return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
    if name == "MoonshineForConditionalGeneration":
        return {"input_values": torch.randn(B, 2000).double(), "labels": labels_for(text(), V)}
    if name == "WhisperForConditionalGeneration":
        return {"input_features": torch.randn(B, 4, 16).double(), "labels": labels_for(text(), V)}
    if name in MASKED or name in SEQ2SEQ:
        return {**inputs, "labels": labels_for(inputs, V)}
    if name in TOKENS:
        return {**inputs, "labels": labels_for(inputs, 2)}
    if name in ANSWERS:
        return {**inputs, "start_positions": torch.tensor([0, 1, L, 3]), "end_positions": torch.tensor([2, 40, 9, -1])}
    if name == "BertForMultipleChoice":
        inputs = {key: value.unsqueeze(1).repeat(1, C, 1) for key, value in inputs.items()}
        inputs["input_ids"] = torch.randint(3, V, (B, C, L))
    return {**inputs, "labels": torch.randint(0, 2, (B,))}


def recomposed(model, inputs, **weights):
    head = head_of(model)
    example = head.losses(model(**head.without_labels(model, inputs)), inputs, B)
    return weighted_mean(example, head.count(inputs, B), **weights), example


def close_to_own(loss, own):
    """Some losses transformers computes in float32, whatever the logits are; their formula is tested in float64."""
    return torch.allclose(loss, own.double(), rtol=1e-12 if own.dtype == torch.float64 else 1e-6, atol=0)


def gradient(model, loss):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


# The model's own loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERYTHING)
def test_recomposes_the_models_own_loss(name):
    model, inputs = shared(name), batch_for(name)
    for training in (True, False):
        model.train(training)
        loss, example = recomposed(model, inputs)
        own = model(**inputs).loss
        assert close_to_own(loss, own)
        assert example.losses_BL.dtype == torch.float64 and example.losses_BL.shape == example.mask_BL.shape
        assert not example.losses_BL[~example.mask_BL].any()
    model.train()


@pytest.mark.parametrize("name", [*LANGUAGE, *TOKENS])
def test_equals_the_formula_in_float64(name):
    model, inputs = shared(name), batch_for(name)
    loss, example = recomposed(model, inputs)
    log_p = model(**inputs).logits.log_softmax(-1)
    shifted, terms = head_of(model).shift, []
    assert shifted == (name in CAUSAL and name != "BartForCausalLM")
    for b in range(B):
        for t in range(L - 1 if shifted else L):
            target = inputs["labels"][b, t + 1 if shifted else t].item()
            assert example.mask_BL[b, t] == (target != -100)
            if target != -100:
                terms.append(-log_p[b, t, target])
                assert torch.allclose(example.losses_BL[b, t], terms[-1], rtol=1e-12)
    assert torch.allclose(loss, torch.stack(terms).mean(), rtol=1e-12)
    assert head_of(model).count(inputs).tolist() == [len(terms)]


SOME = ["LlamaForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration", "WhisperForConditionalGeneration",
        "ResNetForImageClassification", "BertForQuestionAnswering", "LlamaForTokenClassification"]  # fmt: skip


@pytest.mark.parametrize("name", SOME)
def test_gradient_is_the_models_own(name):
    model, inputs = shared(name), batch_for(name)
    ours, own = gradient(model, recomposed(model, inputs)[0]), gradient(model, model(**inputs).loss)
    for a, b in zip(ours, own, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-7))


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
@pytest.mark.parametrize("name", [*CLASSIFICATION, *IMAGES])
def test_every_problem_type(name, problem):
    deberta = name.startswith("Deberta")
    for num_labels in (1, C) if problem == "regression" else (C,):
        inputs = batch_for(name)
        if problem == "multi_label_classification":
            inputs["labels"] = torch.randint(0, 2, (B, C)).double()
        elif problem == "regression":
            inputs["labels"] = torch.randn(B, num_labels).double().squeeze(1)
            inputs["labels"].view(-1)[0] = -100.0  # a number like any other
        else:
            inputs["labels"][1] = -100
        model = build(name, num_labels=num_labels)
        inferred = "multi_label_classification" if problem == "regression" and num_labels > 1 else problem
        for given in (problem, None):
            if deberta and given is None and inferred == "multi_label_classification":
                continue  # refused: below
            model.config.problem_type = given
            loss, _ = recomposed(model, inputs)
            assert model.config.problem_type == (given or inferred)  # settled as the model does
            model.config.problem_type = given
            assert close_to_own(loss, model(**inputs).loss)
            assert model.config.problem_type == (given or (None if deberta else inferred))


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_shares_of_classes_are_the_shares_of_two_losses(epsilon):
    logits = torch.randn(6, 5, dtype=torch.float64)
    a, b, share = torch.randint(5, (6,)), torch.randint(5, (6,)), torch.rand(6, dtype=torch.float64)
    labels = torch.zeros(6, 5, dtype=torch.float64)
    for i in range(6):
        labels[i, a[i]] += share[i]
        labels[i, b[i]] += 1 - share[i]
    head = ClassHead("classification", hf.BertConfig(num_labels=5, problem_type="single_label_classification"))
    found = head.losses(SimpleNamespace(logits=logits), {"labels": labels}, 6, label_smoothing=epsilon)

    def loss_of(i, label):
        log_shares = [float(x - logits[i].logsumexp(0)) for x in logits[i]]
        return -(1 - epsilon) * log_shares[label] - epsilon * sum(log_shares) / 5

    for i in range(6):
        expected = float(share[i]) * loss_of(i, a[i]) + float(1 - share[i]) * loss_of(i, b[i])
        assert found.losses_BL[i, 0].item() == pytest.approx(expected, rel=1e-12)
    assert head.count({"labels": labels}).tolist() == [6] and found.mask_BL.all()


def test_deberta_with_float_labels_must_say_its_problem():
    model = build("DebertaV2ForSequenceClassification", num_labels=C)
    inputs = {**text(), "labels": torch.rand(B, C)}
    with pytest.raises(ValueError, match=r"problem type of deberta-v2 is open\. Set config.problem_type"):
        recomposed(model, inputs)


def test_shift_labels_given():
    model, inputs = shared("LlamaForCausalLM"), batch_for("LlamaForCausalLM")
    inputs["shift_labels"] = labels_for(inputs, V)
    loss, example = recomposed(model, inputs)
    assert close_to_own(loss, model(**inputs).loss)
    assert torch.equal(example.mask_BL, inputs["shift_labels"] != -100)
    assert head_of(model).count(inputs).item() == (inputs["shift_labels"] != -100).sum()
    assert "shift_labels" not in head_of(model).without_labels(model, inputs)


def test_a_subclass_has_the_loss_that_transformers_gives_it():
    class Mine(hf.ModernBertForMaskedLM):
        """By its name transformers takes it for a causal LM, so its loss is shifted."""

        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    inputs, model = batch_for("ModernBertForMaskedLM"), Mine(hf.ModernBertConfig(**MODERN)).double().eval()
    assert head_of(model).shift and honors_num_items(model)
    assert close_to_own(recomposed(model, inputs)[0], model(**inputs).loss)

    class MyModernBertForMaskedLM(hf.ModernBertForMaskedLM):
        def forward(self, input_ids, attention_mask=None, labels=None):
            return super().forward(input_ids, attention_mask=attention_mask, labels=labels)

    class Narrower(Mine):
        def forward(self, input_ids, labels=None):
            return super().forward(input_ids, labels=labels)

    assert not honors_num_items(Narrower(hf.ModernBertConfig(**MODERN)))
    model = MyModernBertForMaskedLM(hf.ModernBertConfig(**MODERN)).double().eval()
    assert not head_of(model).shift and not honors_num_items(model)
    assert close_to_own(recomposed(model, inputs)[0], model(**inputs).loss)


def test_encoder_decoder_model():
    decoder = hf.BertConfig(**dict(TEXT, is_decoder=True, add_cross_attention=True))
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(hf.BertConfig(**TEXT), decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = hf.EncoderDecoderModel(config).double().eval()
    inputs = batch_for("BertForMaskedLM")
    with pytest.warns(FutureWarning):
        assert close_to_own(recomposed(model, inputs)[0], model(**inputs).loss)


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "WhisperForConditionalGeneration"])
def test_decoder_inputs(name):
    model, inputs = shared(name), batch_for(name)
    head = head_of(model)
    bare = head.without_labels(model, inputs)
    if name.startswith("T5"):
        assert "labels" not in bare and bare["decoder_input_ids"].shape == (B, L)
    else:  # no method for it: the model makes them itself
        assert bare["labels"] is inputs["labels"]
    given = {**inputs, "decoder_input_ids": torch.ones(B, L, dtype=torch.long)}
    bare = head.without_labels(model, given)
    assert bare["decoder_input_ids"] is given["decoder_input_ids"] and "labels" not in bare
    assert close_to_own(recomposed(model, given)[0], model(**given).loss)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about transformers
def test_peft():
    from peft import LoraConfig, get_peft_model

    base = build("LlamaForCausalLM")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).double()
    inputs = batch_for("LlamaForCausalLM")
    assert head_of(model) == head_of(base) and honors_num_items(model)
    assert close_to_own(recomposed(model, inputs)[0], model(**inputs).loss)


def test_logits_of_half_precision_are_widened():
    model = build("LlamaForCausalLM").bfloat16()
    loss, _ = recomposed(model, inputs := batch_for("LlamaForCausalLM"))
    assert loss.dtype == torch.float32 and torch.allclose(loss, model(**inputs).loss, rtol=1e-6)


# Counts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in EVERYTHING if n not in ANSWERS])
def test_counts_what_the_trainer_counts(name, tmp_path):
    inputs, model = batch_for(name), shared(name)
    trainer = hf.Trainer(model, hf.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    trainer.model_accepts_loss_kwargs = True
    stock = trainer._get_num_items_in_batch([inputs, inputs], torch.device("cpu"))
    ours = 2 * head_of(model).count(inputs, B)
    if name in ("GPT2LMHeadModel", "BertLMHeadModel"):
        # Trainer tells by the name ...ForCausalLM that labels are shifted, so it counts first tokens for these.
        assert stock == ours + 2 * B
    elif name == "BartForCausalLM":  # and for this one, which does not shift, it counts none
        assert stock == ours - 2 * B
    else:
        assert stock == ours


def test_count_of_answers_leaves_out_what_is_beyond_the_text():
    head = head_of(shared("BertForQuestionAnswering"))
    inputs = batch_for("BertForQuestionAnswering")
    assert head.count(inputs).tolist() == [3, 2] and head.terms == 2
    embedded = {**inputs, "inputs_embeds": torch.zeros(B, L, 8)}
    del embedded["input_ids"]
    assert head.count(embedded).tolist() == [3, 2]


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "T5ForConditionalGeneration", "ViTForImageClassification", "BertForQuestionAnswering"]
)
def test_micro_batches_with_a_shared_count_are_the_whole_batch(name):
    model, inputs = shared(name), batch_for(name)
    head = head_of(model)
    items, total = head.count(inputs, B), 0
    for rows in (slice(0, 1), slice(1, 4)):
        micro = {key: value[rows] for key, value in inputs.items()}
        example = head.losses(model(**head.without_labels(model, micro)), micro, len(micro[min(micro)]))
        total = total + weighted_mean(example, items)
    whole, _ = recomposed(model, inputs)
    assert torch.allclose(total, whole, rtol=1e-12)
    for a, b in zip(gradient(model, total), gradient(model, whole), strict=True):
        assert a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_nothing_that_counts_is_no_loss():
    model, inputs = shared("LlamaForCausalLM"), batch_for("LlamaForCausalLM")
    inputs["labels"].fill_(-100)
    loss, example = recomposed(model, inputs)
    assert loss == 0 and not example.per_example(B).any()
    assert all(g is None or not g.any() for g in gradient(model, loss))


@pytest.mark.parametrize("name", EVERYTHING)
def test_honors_num_items_as_the_model_does(name):
    model, inputs = shared(name), batch_for(name)
    plain = model(**inputs).loss  # also settles an open problem type
    count = head_of(model).count(inputs, B)[0]
    given = model(**inputs, num_items_in_batch=10 * count).loss
    if name in ("LlamaForQuestionAnswering", "ModernBertForQuestionAnswering"):
        assert not honors_num_items(model)  # it divides both terms by it, but their counts differ
        return
    honors = torch.allclose(given, plain / 10, rtol=1e-5)
    assert honors or torch.equal(given, plain)
    assert honors_num_items(model) == honors


def test_honors_depends_on_the_problem():
    model = build("ViTForImageClassification", num_labels=C)
    assert not honors_num_items(model)  # labels have not settled it yet
    for problem, honors in [
        ("single_label_classification", True),
        ("multi_label_classification", False),
        ("regression", False),
    ]:
        model.config.problem_type = problem
        assert honors_num_items(model) == honors
    model = build("LlamaForCausalLM")
    model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    assert not honors_num_items(model) and not honors_num_items(nn.Linear(1, 1))


# Label smoothing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM", "BartForConditionalGeneration",
             "BertForSequenceClassification", "ResNetForImageClassification", "BertForTokenClassification"]
)  # fmt: skip
def test_label_smoothing_is_the_trainers(name, epsilon):
    model, inputs = shared(name), batch_for(name)
    inputs["labels"].view(-1)[3] = -100
    head, outputs = head_of(model), model(**head_of(model).without_labels(model, inputs))
    example, items = head.losses(outputs, inputs, B, label_smoothing=epsilon), head.count(inputs, B)
    for num_items in (None, 3 * items[0]):
        loss = weighted_mean(example, items if num_items is None else 3 * items)
        stock = LabelSmoother(epsilon)(outputs, inputs["labels"], name in CAUSAL, num_items)
        assert torch.allclose(loss, stock.double(), rtol=1e-6)  # it sums over classes in float32
    log_p, total = outputs.logits.log_softmax(-1), 0
    targets = inputs["labels"]
    if name in CAUSAL:
        log_p, targets = log_p[:, :-1], targets[:, 1:]
    for row, target in zip(log_p.flatten(0, -2), targets.flatten().tolist(), strict=True):
        total = total if target == -100 else total - (1 - epsilon) * row[target] - epsilon * row.mean()
    assert torch.allclose(weighted_mean(example, items), total / items[0], rtol=1e-12)


def test_label_smoothing_leaves_several_labels_and_spans_alone_and_refuses_numbers():
    model = build("BertForSequenceClassification", num_labels=C)
    inputs = {**text(), "labels": torch.randint(0, 2, (B, C)).double()}
    head, outputs = head_of(model), model(**text())
    smooth, plain = head.losses(outputs, inputs, B, 0.1), head.losses(outputs, inputs, B)
    assert torch.equal(smooth.losses_BL, plain.losses_BL)
    model.config.problem_type = "regression"
    with pytest.raises(ValueError, match=r"label_smoothing_factor\(0.1\): numbers have no classes"):
        head.losses(outputs, inputs, B, 0.1)
    model, inputs = shared("BertForQuestionAnswering"), batch_for("BertForQuestionAnswering")
    head, outputs = head_of(model), model(**inputs)
    smooth, plain = head.losses(outputs, inputs, B, 0.1), head.losses(outputs, inputs, B)
    assert torch.equal(smooth.losses_BL, plain.losses_BL)


# Examples and weights -------------------------------------------------------------------------------------------------


def random_losses(terms=None):
    columns = terms or 6
    mask = torch.rand(5, columns) < 0.6
    losses = torch.rand(5, columns).double().masked_fill(~mask, 0).requires_grad_()
    example = torch.randint(0, 4, (5, 1)).expand(5, columns) if terms else torch.randint(0, 4, (5, columns))
    return ExampleLosses(losses, mask, example)


def test_per_example_is_a_loop():
    losses = random_losses()
    means = losses.per_example(6)
    assert means.dtype == torch.float32 and not means.requires_grad and means.shape == (6,)
    for b in range(6):
        values = [
            losses.losses_BL[i, j].item()
            for i in range(5)
            for j in range(6)
            if losses.mask_BL[i, j] and losses.example_BL[i, j] == b
        ]
        assert math.isclose(means[b].item(), sum(values) / len(values) if values else 0.0, rel_tol=1e-6)


@pytest.mark.parametrize("terms", [None, 2])
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("by_example", [False, True])
def test_weights_are_a_loop(terms, by_example, by_token):
    losses = random_losses(terms)
    items = torch.tensor([7, 3] if terms else [11])
    by_example = torch.rand(4) if by_example else None
    by_token = torch.rand(losses.losses_BL.shape) if by_token else None
    total = 0.0
    for i in range(losses.losses_BL.shape[0]):
        for j in range(losses.losses_BL.shape[1]):
            weight = 1.0 if by_example is None else by_example[losses.example_BL[i, j]].item()
            weight *= 1.0 if by_token is None else by_token[i, j].item()
            total += weight * losses.losses_BL[i, j].item() / items[j if terms else 0].item() / len(items)
    if by_token is not None:
        by_token[~losses.mask_BL] = torch.nan
    loss = weighted_mean(losses, items, by_example, by_token)
    loss.backward()
    assert math.isclose(loss.item(), total, rel_tol=1e-6) and losses.losses_BL.grad.isfinite().all()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForTokenClassification"])
@pytest.mark.parametrize("first_position", [0, 2])
def test_a_packed_row_is_its_separate_rows(name, first_position):
    config = {"position_ids_start": first_position}
    features = [{"input_ids": torch.randint(3, V, (n,)).tolist()} for n in (4, 1, 6, 3)]
    packed = hf.DataCollatorWithFlattening(**config)(features)
    head = head_of(shared(name))
    logits = torch.randn(1, 14, V)
    together = head.losses(SimpleNamespace(logits=logits), packed, 4)
    start, means, items = 0, [], 0
    for feature in features:
        end = start + len(feature["input_ids"])
        alone = {key: value[:, start:end] for key, value in packed.items()}
        example = head.losses(SimpleNamespace(logits=logits[:, start:end]), alone, 1)
        means.append(example.per_example(1))
        items, start = items + head.count(alone), end
    assert torch.allclose(together.per_example(4), torch.cat(means)) and torch.equal(head.count(packed), items)
    assert means[1] == 0 and means[0] > 0
    padded = {key: F.pad(value, (0, 2), value=-100 if key == "labels" else 0) for key, value in packed.items()}
    padded["attention_mask"] = F.pad(torch.ones(1, 14, dtype=torch.long), (0, 2))
    longer = head.losses(SimpleNamespace(logits=F.pad(logits, (0, 0, 0, 2))), padded, 4)
    assert torch.equal(longer.per_example(4), together.per_example(4))


def test_rows_with_several_examples_each():
    head = head_of(shared("LlamaForCausalLM"))
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    labels = torch.ones(2, 5, dtype=torch.long).masked_fill(positions == 0, -100)
    outputs = SimpleNamespace(logits=torch.randn(2, 5, V))
    example = head.losses(outputs, {"labels": labels, "position_ids": positions}, 4)
    assert example.example_BL[example.mask_BL].tolist() == [0, 0, 1, 2, 3, 3]
    unmasked = {"labels": torch.ones(2, 5, dtype=torch.long), "position_ids": positions}
    across = head.losses(outputs, unmasked, 4)  # a first token's loss is its own example's
    assert across.example_BL[across.mask_BL].tolist() == [0, 0, 1, 1, 2, 3, 3, 3]
    shifted = {"labels": labels, "shift_labels": labels.roll(-1, 1), "position_ids": positions}
    same = head.losses(outputs, shifted, 4)
    assert torch.equal(same.per_example(4), example.per_example(4))


# Errors ---------------------------------------------------------------------------------------------------------------


def test_packed_rows_that_cannot_be_told_apart():
    head = head_of(shared("LlamaForCausalLM"))
    outputs, labels = SimpleNamespace(logits=torch.randn(1, 6, V)), torch.ones(1, 6, dtype=torch.long)
    with pytest.raises(ValueError, match=r"labels\(1, 6\) need position_ids"):
        head.losses(outputs, {"labels": labels}, 2)
    with pytest.raises(ValueError, match=r"position_ids\(1, 6\) start 1 examples, and the batch has 2"):
        head.losses(outputs, {"labels": labels, "position_ids": torch.arange(6)[None]}, 2)
    for name in ("BertForSequenceClassification", "BertForQuestionAnswering"):
        inputs = batch_for(name)
        with pytest.raises(ValueError, match=r"must have a row for each of 9 examples"):
            head_of(shared(name)).losses(shared(name)(**inputs), inputs, 9)


def test_outputs_that_do_not_fit_the_labels():
    head = head_of(shared("LlamaForCausalLM"))
    inputs = batch_for("LlamaForCausalLM")
    with pytest.raises(ValueError, match=rf"logits\(4, {L + 2}, 33\) and labels\(4, {L}\) differ in positions"):
        head.losses(SimpleNamespace(logits=torch.randn(B, L + 2, V)), inputs, B)
    with pytest.raises(ValueError, match=r"logits=None"):
        head.losses(SimpleNamespace(logits=None), inputs, B)
    with pytest.raises(ValueError, match=r"inputs\(input_ids\): there are no labels"):
        head.count({"input_ids": inputs["input_ids"]})
    model = build("BertForSequenceClassification", num_labels=C)
    with pytest.raises(ValueError, match=r"labels\(4,\): multi_label_classification needs one label per logit"):
        recomposed(model, {**text(), "labels": torch.rand(B)})


def test_unknown_losses_are_refused():
    class Mixtral(hf.MixtralForCausalLM):
        def forward(self, input_ids, **kwargs):
            return fused_loss(super(), input_ids)  # noqa: F821

    tiny_vit = {"text_config": dict(TEXT, model_type="clip_text_model"), "vision_config": dict(VIT)}
    custom = build("LlamaForCausalLM")
    custom.loss_function = lambda logits, labels, **kwargs: logits.sum()
    for model in (
        nn.Linear(2, 2),
        hf.CLIPModel(hf.CLIPConfig(**tiny_vit)),
        custom,
        Mixtral(hf.MixtralConfig(**CAUSAL["MixtralForCausalLM"])),
        hf.BertModel(hf.BertConfig(**TEXT)),
        type("MyViT", (hf.ViTForImageClassification,), {})(hf.ViTConfig(**VIT)),  # transformers calls a causal LM's
    ):
        with pytest.raises(ValueError, match=rf"^{type(model).__name__}: its loss is unknown.*example_loss_func="):
            head_of(model)


def test_a_loss_with_a_term_that_is_no_examples_is_refused_under_weights():
    model, inputs = build("MixtralForCausalLM", output_router_logits=True), batch_for("MixtralForCausalLM")
    with pytest.raises(ValueError, match=r"MixtralForCausalLM\(output_router_logits=True\)"):
        head_of(model).without_labels(model, inputs)


# A loss that the user gives -------------------------------------------------------------------------------------------


def test_head_from_a_function():
    inputs = {"x": torch.randn(B, 5), "labels": torch.randn(B)}
    model = nn.Linear(5, 1)

    def squared(outputs, inputs):
        return (outputs.squeeze(1) - inputs["labels"]) ** 2

    head = head_from(squared)
    assert head.count(inputs, B).tolist() == [B] and head.without_labels(model, inputs) == inputs
    example = head.losses(model(inputs["x"]), inputs, B)
    assert torch.allclose(
        weighted_mean(example, head.count(inputs, B)), F.mse_loss(model(inputs["x"])[:, 0], inputs["labels"])
    )
    assert torch.allclose(example.per_example(B), squared(model(inputs["x"]), inputs))
    with pytest.raises(ValueError, match=r"example_loss_func\(\.\.\.\) returned the shape \(\), not one loss"):
        head_from(lambda outputs, inputs: outputs.mean()).losses(model(inputs["x"]), inputs, B)


def test_head_from_a_function_of_items():
    losses, mask = torch.rand(B, L), torch.rand(B, L) < 0.5
    mask[2] = False
    head = head_from(lambda outputs, inputs: (losses, mask))
    example = head.losses(None, {}, B)
    means = torch.stack([row[m].mean() if m.any() else torch.tensor(0.0) for row, m in zip(losses, mask, strict=True)])
    assert torch.allclose(example.per_example(B), means) and example.mask_BL[:, 0].tolist() == mask.any(1).tolist()
    assert torch.allclose(weighted_mean(example, head.count({}, B)), means.mean())
