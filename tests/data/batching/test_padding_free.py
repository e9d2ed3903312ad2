import logging
from types import SimpleNamespace

import pytest
import torch
from ranks import run_on_ranks
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    TrainingArguments,
)

from hf_accel import AccelTrainer, Packing
from hf_accel.batch import MicroBatch
from hf_accel.data.batching.padding_free import PaddingFree, flatten
from hf_accel.features.flattening_trial import flattening_fault
from hf_accel.testing import (
    CountingText,
    collate_padded,
    largest_difference,
    losses_of,
    tiny_llama,
    tiny_trainer,
    weights_of,
)

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LENGTHS = (5, 1, 9, 3)


def tiny(kind, auto=AutoModelForCausalLM, attention="sdpa", **fields):
    torch.manual_seed(0)
    fields = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | fields
    model = auto.from_config(AutoConfig.for_model(kind, use_cache=False, **fields), attn_implementation=attention)
    return model.double().train()


def features(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in LENGTHS]
    return [{"input_ids": row, "labels": [-100 if token % 5 == 0 else token for token in row]} for row in rows]


def pad(rows):
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    full = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {k: torch.tensor([r[k] + [v] * (width - len(r[k])) for r in full]) for k, v in fill.items()}


def pad_to_8(rows):
    batch = pad(rows)
    extra = -batch["input_ids"].shape[1] % 8
    return {k: torch.nn.functional.pad(v, (0, extra), value=-100 if k == "labels" else 0) for k, v in batch.items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("kind", "fields"), [("llama", GROUPED), ("qwen2", GROUPED), ("gpt2", GPT2)])
@pytest.mark.parametrize("collator", [pad, pad_to_8])
def test_loss_and_gradient_are_those_of_the_padded_batch(kind, fields, attention, collator):
    dropless = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if kind == "gpt2" else {}
    model = tiny(kind, attention=attention, **fields, **dropless)
    flat = PaddingFree().collate(features(), collator)
    assert flat["input_ids"].shape == (1, sum(LENGTHS)) and "attention_mask" not in flat
    found = []
    for inputs in (collator(features()), flat):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    # transformers' own loss is computed in float32
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    losses = []
    for inputs in (collator(features()), flat):
        model.zero_grad()
        logits, labels = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits, inputs["labels"]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        losses.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    in_float32 = attention == "eager" and kind != "gpt2"  # the softmax of these, whatever the dtype of the model
    rtol, atol = (1e-5, 1e-5) if in_float32 else (1e-9, 1e-12)
    torch.testing.assert_close(losses[0], losses[1], rtol=rtol, atol=atol)


def test_the_row_is_that_of_the_definition():
    rows = [{"input_ids": torch.tensor([[7, 8, 9]])}, {"input_ids": torch.tensor([[5, 6]])}]
    for row in rows:
        row["labels"] = row["input_ids"].clone()
    flat = flatten(rows, PaddingFree())
    assert {name: value.tolist() for name, value in flat.items()} == {
        "input_ids": [[7, 8, 9, 5, 6]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "labels": [[-100, 8, 9, -100, 6]],
    }
    assert rows[0]["labels"].tolist() == [[7, 8, 9]]
    with pytest.raises(ValueError, match=r"'pixels' of shape \(1, 2\) because input_ids have shape \(1, 3\)"):
        flatten([rows[0] | {"pixels": torch.zeros(1, 2)}], PaddingFree())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "fields"), [("llama", GROUPED), ("gpt2", GPT2), ("gpt_neox", SMALL)])
def test_it_accepts_models_that_keep_examples_apart_and_leaves_them_as_found(kind, fields, dtype):
    model = tiny(kind, **fields).to(dtype)
    next(model.children()).eval()
    modes = [m.training for m in model.modules()]
    rng, before = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    assert PaddingFree().prepare_model(model) is model
    assert modes == [m.training for m in model.modules()] and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


ENCODERS = [
    ("bert", AutoModelForMaskedLM, SMALL),
    ("bert", AutoModelForTokenClassification, SMALL),
    ("electra", AutoModelForMaskedLM, SMALL),
    ("roberta", AutoModelForMaskedLM, SMALL | {"pad_token_id": 1, "bos_token_id": 0}),
    ("xlm-roberta", AutoModelForTokenClassification, SMALL | {"pad_token_id": 1, "bos_token_id": 0}),
]


EAGER = [
    ("albert", AutoModelForMaskedLM, SMALL | {"embedding_size": 16}),
    ("mpnet", AutoModelForMaskedLM, SMALL | {"pad_token_id": 1, "bos_token_id": 0}),
    ("roformer", AutoModelForMaskedLM, SMALL | {"embedding_size": 32}),
]
CASES = [(*encoder, attention) for encoder in ENCODERS for attention in ("sdpa", "eager")]
CASES += [(*encoder, "eager") for encoder in EAGER]


@pytest.mark.parametrize(("kind", "auto", "fields", "attention"), CASES)
def test_encoders_get_a_mask_and_train_as_on_padded_batches(kind, auto, fields, attention):
    dropless = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    model = tiny(kind, auto, attention, **fields, **dropless, num_labels=97)
    padding = fields.get("pad_token_id", 0)

    def padded(rows):
        batch = pad(rows)
        return batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, padding)}

    technique = PaddingFree()
    technique.run_ = SimpleNamespace(args=SimpleNamespace(device=torch.device("cpu"), use_cache=False))
    technique.prepare_model(model)
    technique.on_train_begin(SimpleNamespace(torch_compile=False), None, None, model=model)
    flat = technique.collate(features(), padded)
    assert "attention_mask" not in flat and flat["labels"][0, 0] == features()[0]["labels"][0]
    found = []
    for inputs in (padded(features()), flat):
        model.zero_grad()
        logits, labels = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits, inputs["labels"]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    model.eval()
    padded_logits = [model(**inputs).logits for inputs in (padded(features()[:1]),)]
    technique.on_train_end(None, None, None, model=model)
    torch.testing.assert_close(padded_logits, [model(**padded(features()[:1])).logits], rtol=0, atol=0)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("technique", [PaddingFree, Packing])
@pytest.mark.parametrize(
    ("kind", "attention", "fields"),
    [
        ("modernbert", "sdpa", {"local_attention": 4}),
        ("modernbert", "eager", {"local_attention": 4}),
        ("longformer", "eager", {"attention_window": 4}),
        ("deberta-v2", "eager", {}),
    ],
)
def test_encoders_of_local_or_relative_attention_are_refused_by_name(kind, attention, fields, technique):
    model = tiny(kind, AutoModelForMaskedLM, attention, **SMALL | fields)
    with pytest.raises(ValueError, match=rf"{technique.__name__}\(.*\) does not support {type(model).__name__} with "):
        technique().prepare_model(model)


def test_an_encoder_trains_in_the_trainer_as_on_padded_batches(tmp_path):
    runs = []
    for techniques in ([PaddingFree()], []):
        trainer = tiny_trainer(
            techniques, tmp_path, modality="masked text", dropout=0.0, dtype=torch.float64, micro_batch_size=4
        )
        trainer.train()
        runs.append(weights_of(trainer))
    assert largest_difference(*runs) < 1e-9
    assert trainer.model.config.use_cache is False


def test_models_of_a_model_init_keep_examples_apart(tmp_path):
    """Trainer turns the cache of the model off that it is built with, and not of those that it makes to train."""
    runs = []
    for given in ({"model": tiny_llama(dropout=0.0)}, {"model_init": lambda: tiny_llama(dropout=0.0)}):
        args = tiny_trainer([], tmp_path, max_steps=3).args
        trainer = AccelTrainer(
            args=args, train_dataset=CountingText(), data_collator=collate_padded, techniques=[PaddingFree()], **given
        )
        trainer.train()
        runs.append(weights_of(trainer))
    assert largest_difference(*runs) == 0.0
    args.use_cache = True
    with pytest.raises(ValueError, match=r"PaddingFree\(\).*use_cache=False"):
        AccelTrainer(tiny_llama(), args, train_dataset=CountingText(), techniques=[PaddingFree()])


def test_batches_of_other_columns_and_other_models_are_refused():
    with pytest.raises(ValueError, match=r"PaddingFree\(\) needs input_ids in the batch \(chosen_input_ids, labels\)"):
        flatten([{"chosen_input_ids": torch.ones(1, 3), "labels": torch.ones(1, 3)}], PaddingFree())
    with pytest.raises(ValueError, match=r"PaddingFree\(\).*Linear because it is not a transformers model"):
        PaddingFree().prepare_model(torch.nn.Linear(2, 2))
    images = tiny("llama", **GROUPED)
    images.config.image_token_id = 5
    with pytest.raises(ValueError, match=r"PaddingFree\(\).*image_token_id"):
        PaddingFree().prepare_model(images)


class LatePositions(GPT2LMHeadModel):
    """Counts positions from 2 where it is not told them, as RoBERTa does."""

    def forward(self, input_ids, position_ids=None, **kwargs):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None] + 2
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


def test_it_refuses_models_that_count_positions_from_elsewhere():
    model = LatePositions(AutoConfig.for_model("gpt2", use_cache=False, **GPT2))
    assert flattening_fault(model) == "it does not count positions from 0"


REFUSED = [
    ("bert", AutoModelForSequenceClassification, SMALL, "no output for each token"),
    ("bert", AutoModelForMultipleChoice, SMALL, "no output for each token"),
    ("bert", AutoModelForQuestionAnswering, SMALL, "no output for each token"),
    ("modernbert", AutoModelForMaskedLM, SMALL, "depends on the one before"),
    ("roberta", AutoModelForCausalLM, {**SMALL, "is_decoder": True}, "depends on the one before"),
    (
        "bloom",
        AutoModelForCausalLM,
        {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "depends on the one before",
    ),
    (
        "mamba",
        AutoModelForCausalLM,
        {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2},
        "depends on the one before",
    ),
    ("opt", AutoModelForCausalLM, {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}, "depends on the one before"),
    ("t5", AutoModelForSeq2SeqLM, {"vocab_size": 97, "d_model": 32, "num_layers": 2}, "not a decoder"),
    ("llama", AutoModelForSequenceClassification, GROUPED, "no output for each token"),
    (
        "xlnet",
        AutoModelForCausalLM,
        {"vocab_size": 97, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        "depends on the one before",
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "auto", "fields", "reason"), REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_it_refuses_models_that_would_mix_examples(kind, auto, fields, reason, dtype):
    logging.disable()
    attention = "eager" if kind in ("bloom", "mamba", "t5", "xlnet") else "sdpa"
    with pytest.raises(ValueError, match=f"{reason}.*Use LengthGrouped"):
        PaddingFree().prepare_model(tiny(kind, auto, attention, **fields).to(dtype))
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("kind", "auto", "fault"), [("llama", AutoModelForCausalLM, None), ("modernbert", AutoModelForMaskedLM, "depends")]
)
def test_projections_of_zero_hide_nothing(kind, auto, fault):
    model = tiny(kind, auto, **(GROUPED if kind == "llama" else SMALL))
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name or "Wo" in name:
            torch.nn.init.zeros_(parameter)
    assert (flattening_fault(model) or "").find(fault or "") >= 0 and (flattening_fault(model) is None) == (
        fault is None
    )


DEEP = {"num_hidden_layers": 12}


@pytest.mark.parametrize("place", ["meta", "zero"])
@pytest.mark.parametrize(
    ("kind", "fields", "fault"),
    [
        ("llama", GROUPED | DEEP, None),
        ("gpt2", GPT2 | {"n_layer": 12}, None),
        ("qwen2", GROUPED | DEEP | {"use_sliding_window": True, "max_window_layers": 3}, None),
        ("opt", {**SMALL, **DEEP, "ffn_dim": 48, "word_embed_proj_dim": 32}, "depends on the one before"),
    ],
)
def test_models_whose_weights_are_elsewhere_are_judged_by_a_copy(kind, fields, fault, place):
    model = tiny(kind, **fields)
    if place == "meta":
        model.to("meta")
    else:  # as ZeRO-3 leaves them
        for parameter in model.parameters():
            parameter.ds_tensor = parameter.data
            parameter.data = torch.empty(0)
    random, blocks = torch.get_rng_state(), len([name for name, _ in model.named_parameters()])
    found = flattening_fault(model, run=SimpleNamespace(args=SimpleNamespace(device=torch.device("cpu"))))
    assert found is None if fault is None else fault in found
    assert torch.equal(torch.get_rng_state(), random)
    assert len([name for name, _ in model.named_parameters()]) == blocks
    assert model.config.num_hidden_layers == 12


def test_it_is_tried_in_the_precision_of_training(tmp_path):
    model, seen = tiny_llama(), set()
    model.lm_head.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    tiny_trainer([PaddingFree()], tmp_path, model=model, bf16=True)
    assert seen == {torch.bfloat16}


def test_it_reports_the_padding_it_avoided():
    technique = PaddingFree()
    technique.run_ = SimpleNamespace(args=SimpleNamespace(device=torch.device("cpu"), use_cache=False))
    model = tiny_llama()
    technique.prepare_model(model)
    technique.on_train_begin(SimpleNamespace(torch_compile=False), None, None, model=model)
    flat = technique.collate(features(), pad)
    technique.transform_batch(SimpleNamespace(micro_batches=[MicroBatch(flat, torch.arange(4), None)]))
    assert technique.report() == {"padding_avoided": pytest.approx(1 - 18 / 36)}
    assert technique.took_effect(technique.report())
    other = PaddingFree()
    other.load_state_dict("rank", technique.state_dict("rank"))
    assert other.report() == technique.report()


@pytest.mark.ci
def test_workers_that_are_not_forks_read_the_same(tmp_path):
    runs = []
    for context in (None, "spawn"):
        workers = {} if context is None else {"dataloader_num_workers": 1}
        trainer = tiny_trainer(
            [PaddingFree()], tmp_path, dataloader_multiprocessing_context=context, max_steps=2, **workers
        )
        trainer.train()
        runs.append(weights_of(trainer))
    assert largest_difference(*runs) == 0.0


def under_zero_3(directory):
    from ranks import backend_args

    args = {"per_device_train_batch_size": 4, "max_steps": 2}
    runs = [tiny_trainer([PaddingFree()], directory, **args, **backend_args("ddp"))]
    runs[0].train()
    args |= backend_args("zero3")
    # Once there are arguments that say so, from_pretrained shards.
    held = TrainingArguments(str(directory), **args)  # noqa: F841
    model = LlamaForCausalLM.from_pretrained(directory / "model")
    assert model.lm_head.weight.numel() == 0
    runs.append(tiny_trainer([PaddingFree()], directory, model=model, **args))
    runs[1].train()
    return [losses_of(run) for run in runs]


@pytest.mark.distributed
@pytest.mark.ci
def test_models_that_are_sharded_from_the_beginning_train(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    for apart, sharded in run_on_ranks(under_zero_3, tmp_path, backend="zero3"):
        assert sharded == pytest.approx(apart, rel=1e-3)
