"""The contract that every technique passes, for ours and for yours: ``check_technique(MyTechnique())``.

Each check is a function of a technique and a directory, and raises ``AssertionError`` where the contract is broken.  A
technique that is known to break one says so in ``expected_failed_checks``, with the reason.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_contract(check, tmp_path):
        check(MyTechnique(), tmp_path)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import annotated_types as at
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    WhisperConfig,
    WhisperForAudioClassification,
)

from hf_accel.technique import Technique
from hf_accel.trainer import AccelTrainer, AccelTrainerMixin

VOCABULARY = 48
EXAMPLES = 64
EPOCHS = 3


class CountingText(Dataset):
    """Sequences that count upwards modulo the vocabulary, of mixed length; a language model can learn them.

    Columns that the model does not see: ``label`` (the stride), ``score`` (the start) and ``text``.
    """

    def __init__(self, num_examples: int = EXAMPLES, longest: int = 24, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(3, VOCABULARY, (num_examples,), generator=generator)
        strides = torch.randint(1, 4, (num_examples,), generator=generator)
        lengths = torch.randint(longest // 4, longest + 1, (num_examples,), generator=generator)
        self.rows = [
            ((start + stride * torch.arange(int(length))) % (VOCABULARY - 3) + 3).tolist()
            for start, stride, length in zip(starts, strides, lengths, strict=True)
        ]
        self.labels, self.scores = (strides - 1).tolist(), (starts / VOCABULARY).tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        unseen = {"label": self.labels[index], "score": self.scores[index], "text": " ".join(map(str, row[::2]))}
        return {"input_ids": row, "labels": list(row), **unseen}


def collate_padded(features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad to the longest example; padding carries no label."""
    longest = max(len(f["input_ids"]) for f in features)

    def padded(key: str, value: int) -> Tensor:
        return torch.tensor([f[key] + [value] * (longest - len(f[key])) for f in features])

    mask = torch.tensor([[1] * len(f["input_ids"]) + [0] * (longest - len(f["input_ids"])) for f in features])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def _seeded(kind: Any, config: Any, dtype: torch.dtype, seed: int) -> Any:
    """A model from its configuration, the same for the same seed; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).to(dtype)


def tiny_llama(dropout: float = 0.1, dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of four blocks and 15,000 parameters, the same for the same seed; the global generator is left alone."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=dropout,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return _seeded(LlamaForCausalLM, config, dtype, seed)


def tiny_teacher() -> LlamaForCausalLM:
    """Another model than `tiny_llama`, for the same vocabulary."""
    return tiny_llama(dropout=0.0, seed=1)


def tiny_smaller() -> LlamaForCausalLM:
    """A Llama of half the width and depth of `tiny_llama`, with heads of the same size."""
    return _resized_llama(hidden_size=8, intermediate_size=16, num_hidden_layers=2, heads=1)


def tiny_larger() -> LlamaForCausalLM:
    """A Llama of twice the width and depth of `tiny_llama`, with heads of the same size."""
    return _resized_llama(hidden_size=32, intermediate_size=64, num_hidden_layers=8, heads=4)


def _resized_llama(heads: int, **sizes: int) -> LlamaForCausalLM:
    config = tiny_llama(dropout=0.0).config
    config.update(sizes | {"num_attention_heads": heads, "num_key_value_heads": heads})
    return _seeded(LlamaForCausalLM, config, torch.float32, seed=1)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Reads numbers below the vocabulary's size; 0 is padding and 1 the mask."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="2"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", mask_token="1", unk_token="2")


def collate_masked(features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """As `collate_padded`, of fewer words, with masks and labels at every fifth token."""
    batch = collate_padded(features)
    ids_BL, mask_BL = batch["input_ids"], batch["attention_mask"]
    ids_BL = torch.where(mask_BL == 1, ids_BL % 12 + 3, 0)
    masked_BL = (mask_BL == 1) & (torch.arange(ids_BL.shape[1]) % 5 == 0)
    labels_BL = ids_BL.masked_fill(~masked_BL, -100)
    return {"input_ids": ids_BL.masked_fill(masked_BL, 1), "labels": labels_BL, "attention_mask": mask_BL}


def collate_replaced(features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """As `collate_masked`, with every fifth token replaced, and labels that say which."""
    batch = collate_masked(features)
    replaced_BL, mask_BL = batch["labels"] != -100, batch["attention_mask"]
    ids_BL = torch.where(replaced_BL, (batch["labels"] + 20) % VOCABULARY, batch["input_ids"])
    return {
        "input_ids": ids_BL,
        "labels": replaced_BL.long().masked_fill(mask_BL == 0, -100),
        "attention_mask": mask_BL,
    }


def tiny_bert(
    dropout: float = 0.1, dtype: torch.dtype = torch.float32, seed: int = 0, kind: Any = BertForMaskedLM
) -> PreTrainedModel:
    """A BERT of two blocks with a head for masked tokens, or another one, the same for the same seed."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return _seeded(kind, config, dtype, seed)


class Patterns(Dataset):
    """Noisy copies, in [0, 1], of one of four coarse patterns, which is the class; a classifier can learn them."""

    def __init__(self, name: str, shape: tuple[int, int, int], num_examples: int, seed: int, dtype: torch.dtype):
        patterns = torch.rand(4, shape[0], 2, 2, generator=torch.Generator().manual_seed(99))
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(4, (num_examples,), generator=generator)
        noise = torch.rand(num_examples, *shape, generator=generator)
        values = 0.7 * F.interpolate(patterns, shape[1:], mode="bilinear")[labels] + 0.3 * noise
        self.rows = [
            {name: value.squeeze(0).to(dtype), "labels": label}
            for value, label in zip(values, labels.tolist(), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def collate_stacked(features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Examples of one shape, one after the other."""
    return {name: torch.stack([torch.as_tensor(f[name]) for f in features]) for name in features[0]}


def tiny_convnext(dropout: float = 0.1, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A ConvNeXt of two blocks for images of any size, the same for the same seed.

    Not a ViT: a plain Trainer of transformers 5.23 resumes nothing of models whose weights are saved under other names.
    """
    config = ConvNextConfig(
        num_stages=2,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        patch_size=2,
        drop_path_rate=dropout,
        num_labels=4,  # type: ignore[call-arg]
    )
    return _seeded(ConvNextForImageClassification, config, dtype, seed)


def tiny_whisper(dropout: float = 0.1, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A Whisper encoder of two blocks that classifies 40 frames of 8 bands, the same for the same seed."""
    config = WhisperConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=20,
        classifier_proj_size=16,
        dropout=dropout,
        num_labels=4,  # type: ignore[call-arg]
    )
    return _seeded(WhisperForAudioClassification, config, dtype, seed)


class Probe(NamedTuple):
    """What the contract trains techniques of one modality on."""

    model: Callable[[float, torch.dtype], PreTrainedModel]
    examples: Callable[[int, int, torch.dtype], Dataset]
    """Of a number, a seed and a type."""
    collate: Callable[[Sequence[Any]], dict[str, Tensor]]
    tokenizer: Callable[[], PreTrainedTokenizerFast] | None = None


def _counting_text(number: int, seed: int, dtype: torch.dtype) -> CountingText:
    return CountingText(number, seed=seed)


PROBES = {
    "text": Probe(tiny_llama, _counting_text, collate_padded),
    "masked text": Probe(tiny_bert, _counting_text, collate_masked, tiny_tokenizer),
    "replaced text": Probe(
        functools.partial(tiny_bert, kind=BertForTokenClassification), _counting_text, collate_replaced, tiny_tokenizer
    ),
    "image": Probe(tiny_convnext, functools.partial(Patterns, "pixel_values", (3, 16, 16)), collate_stacked),
    "speech": Probe(tiny_whisper, functools.partial(Patterns, "input_features", (1, 8, 40)), collate_stacked),
}


def modality_of(techniques: Sequence[Technique]) -> str:
    """The modality that techniques can be trained on together."""
    return next((t.modality for t in techniques if t.modality != "text"), "text")


def tiny_trainer(
    techniques: Sequence[Technique],
    directory: str | Path,
    *,
    trainer_class: type[Trainer] = AccelTrainer,
    dropout: float = 0.1,
    dtype: torch.dtype = torch.float32,
    model: torch.nn.Module | None = None,
    micro_batch_size: int | None = None,
    modality: str | None = None,
    **args: Any,
) -> Any:
    """A trainer of the probe of a modality, the techniques' own where none is given, for text `tiny_llama` on
    `CountingText`: 24 updates of 8 examples; ``args`` are TrainingArguments."""
    probe = PROBES[modality or modality_of(techniques)]
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "linear",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    hosting: dict[str, Any] = {}
    if issubclass(trainer_class, AccelTrainerMixin):
        sizes = [t.probe_micro_batch_size for t in techniques if t.probe_micro_batch_size is not None]
        if micro_batch_size is None:
            micro_batch_size = min(sizes, default=None)
        hosting = {"techniques": list(techniques), "micro_batch_size": micro_batch_size}
    if probe.tokenizer is not None:
        hosting["processing_class"] = probe.tokenizer()
    schedules = any("schedule" in t.implemented_hooks() for t in techniques)
    if schedules:
        del settings["lr_scheduler_type"]
    trainer = trainer_class(
        model=model or probe.model(dropout, dtype),
        args=TrainingArguments(**(settings | args)),
        train_dataset=probe.examples(EXAMPLES, 0, dtype),
        eval_dataset=probe.examples(16, 1, dtype),
        data_collator=probe.collate,
        **hosting,
    )
    trainer.pop_callback(PrinterCallback)
    return trainer


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of the model's state."""
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def losses_of(trainer: Trainer) -> list[float]:
    """The training loss of every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Between two models of the same shape; infinite where the shapes differ."""
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a):
        return math.inf
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def again(technique: Technique) -> Technique:
    """A fresh technique with the same hyperparameters."""
    return dataclasses.replace(technique)  # type: ignore[type-var]


# The checks -----------------------------------------------------------------------------------------------------------


def check_stores_only_hyperparameters(technique: Technique, directory: Path) -> None:
    """The constructor stores the fields, and draws from no global generator."""
    before = random.getstate(), str(np.random.get_state()), torch.random.get_rng_state()
    fresh = again(technique)
    fields = {f.name for f in dataclasses.fields(technique)}  # type: ignore[arg-type]
    assert set(vars(fresh)) == fields, f"{fresh!r} holds {set(vars(fresh)) - fields} before training"
    after = random.getstate(), str(np.random.get_state()), torch.random.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2]), f"{fresh!r} draws from a global generator"
    for field in dataclasses.fields(technique):  # type: ignore[arg-type]
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        assert has_default, f"{type(technique).__name__}.{field.name} has no default"


def check_names_bad_values(technique: Technique, directory: Path) -> None:
    """A value out of bounds raises an error that names the technique, the field and the value."""
    for name, bad in bad_values(type(technique)):
        try:
            dataclasses.replace(technique, **{name: bad})  # type: ignore[type-var]
        except ValueError as error:
            message = str(error)
            assert all(part in message for part in (type(technique).__name__, name, repr(bad))), message
        else:
            raise AssertionError(f"{type(technique).__name__}({name}={bad!r}) was accepted")


def bad_values(kind: type[Technique]) -> Iterator[tuple[str, Any]]:
    """Values that break the declared bounds, generated from them."""
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        for bound in _bounds(hints[field.name]):
            if isinstance(bound, at.Gt):
                yield field.name, bound.gt
            elif isinstance(bound, at.Ge):
                yield field.name, bound.ge - 1  # type: ignore[operator]
            elif isinstance(bound, at.Lt):
                yield field.name, bound.lt
            elif isinstance(bound, at.Le):
                yield field.name, bound.le + 1  # type: ignore[operator]


def _bounds(hint: Any) -> list[Any]:
    if not hasattr(hint, "__metadata__"):
        return [bound for option in get_args(hint) for bound in _bounds(option)]
    return [b for item in hint.__metadata__ for b in (item if isinstance(item, at.GroupedMetadata) else (item,))]


def check_trains(technique: Technique, directory: Path) -> None:
    """Training lowers the loss on other examples, and the report shows what the technique is for."""
    fresh = again(technique)
    trainer = tiny_trainer([fresh], directory)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before, f"{fresh!r}: the loss on other examples went from {before} to {after}"
    report = trainer.receipt.techniques[0]["report"]
    assert fresh.took_effect(report), f"{fresh!r}: no effect in its report {report}"
    assert trainer.clock.progress == 1.0


def check_neutral_is_trainer(technique: Technique, directory: Path) -> None:
    """With the neutral values, training is bit-identical to Trainer's."""
    if technique.neutral is None:
        return
    neutral = dataclasses.replace(technique, **technique.neutral)  # type: ignore[type-var]
    plain = tiny_trainer([], directory, trainer_class=Trainer, modality=technique.modality)
    plain.train()
    hosted = tiny_trainer([neutral], directory)
    averaging = hosted._owners["averaging"] is not None
    hosted.train()
    assert losses_of(hosted) == losses_of(plain), f"{neutral!r}: the losses are not Trainer's"
    if not averaging:
        assert largest_difference(weights_of(hosted), weights_of(plain)) == 0.0


def check_resumes_bit_exactly(technique: Technique, directory: Path) -> None:
    """Stopping in the middle of an epoch and at its end, and going on, gives the uninterrupted run, bit for bit."""
    straight = tiny_trainer([again(technique)], directory / "straight", save_strategy="steps", save_steps=1)
    straight.train()
    last = straight.state.global_step
    for step in sorted({max(last // 3, 1), last // 2 + 1, last - 1}):
        resumed = tiny_trainer([again(technique)], directory / f"resumed{step}")
        resumed.train(resume_from_checkpoint=str(directory / "straight" / f"checkpoint-{step}"))
        assert losses_of(resumed) == losses_of(straight), f"{technique!r}: other losses after resuming at {step}"
        difference = largest_difference(weights_of(resumed), weights_of(straight))
        assert difference == 0.0, f"{technique!r}: weights differ by {difference} after resuming at step {step}"
        assert resumed.receipt.samples == straight.receipt.samples
        assert resumed.receipt.techniques[0]["report"] == straight.receipt.techniques[0]["report"]


def check_trains_twice(technique: Technique, directory: Path) -> None:
    """The same instance gives the same run a second time."""
    fresh = again(technique)
    first = tiny_trainer([fresh], directory)
    first.train()
    second = tiny_trainer([fresh], directory)
    second.train()
    assert losses_of(first) == losses_of(second), f"{fresh!r}: the second run is another one"


def check_evaluates_what_it_returns(technique: Technique, directory: Path) -> None:
    """The last evaluation, the returned model and the saved model agree."""
    trainer = tiny_trainer([again(technique)], directory, eval_strategy="steps", eval_steps=100)
    trainer.train()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    returned = trainer.evaluate()["eval_loss"]
    assert math.isclose(logged, returned, rel_tol=1e-6), f"{technique!r}: evaluated {logged}, returned {returned}"
    trainer.save_model(str(directory / "saved"))
    saved: Any = PROBES[technique.modality].model(0.0, torch.float32)
    if (directory / "saved" / "adapter_config.json").is_file():
        from peft import PeftModel

        saved = PeftModel.from_pretrained(saved, directory / "saved")  # adapters are saved without their model
    else:
        saved = type(saved).from_pretrained(directory / "saved")
    plain = tiny_trainer([], directory, trainer_class=Trainer, model=saved, modality=technique.modality)
    reloaded = plain.evaluate()["eval_loss"]
    assert math.isclose(reloaded, returned, rel_tol=1e-6), f"{technique!r}: returned {returned}, saved {reloaded}"


def check_micro_batch_invariant(technique: Technique, directory: Path) -> None:
    """The size of a micro-batch changes nothing but rounding (float64, no dropout)."""
    runs = []
    for size in (8, 3):
        trainer = tiny_trainer([again(technique)], directory, dropout=0.0, dtype=torch.float64, micro_batch_size=size)
        trainer.train()
        runs.append(weights_of(trainer))
    difference = largest_difference(*runs)
    assert difference < 1e-9, f"{technique!r}: weights differ by {difference} between micro-batches of 8 and of 3"


def check_leaves_the_model_as_found(technique: Technique, directory: Path) -> None:
    """After training, ``requires_grad``, hooks, train/eval flags and forward methods are as before."""
    trainer = tiny_trainer([again(technique)], directory)
    model = trainer.model
    before = _outfit(model)
    trainer.train()
    assert _outfit(trainer.model) == before, f"{technique!r}: it left the model changed"


def _outfit(model: torch.nn.Module) -> list[Any]:
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        for name, module in model.named_modules()
    ]
    forwards = [name for name, module in model.named_modules() if "forward" in vars(module)]
    modes = {module.training for module in model.modules()}
    return [flags, hooks, forwards, len(modes)]  # an evaluation leaves all of the model in its mode


def check_every_option_matters(technique: Technique, directory: Path) -> None:
    """Another value of any field changes the run or its report."""

    def outcome(candidate: Technique) -> tuple[list[float], Any, list[Tensor]]:
        trainer = tiny_trainer([candidate], directory, weight_decay=0.1)
        trainer.train()
        return losses_of(trainer), trainer.receipt.techniques[0]["report"], list(weights_of(trainer).values())

    losses, report, values = outcome(again(technique))
    for name, other in other_values(technique):
        varied = dataclasses.replace(technique, **{name: other})  # type: ignore[type-var]
        losses_2, report_2, values_2 = outcome(varied)
        same = losses == losses_2 and report == report_2
        same = same and all(torch.equal(a, b) for a, b in zip(values, values_2, strict=True))
        assert not same, f"{type(technique).__name__}: {name}={other!r} changes nothing"


def other_values(technique: Technique) -> Iterator[tuple[str, Any]]:
    """For each field, a value that differs from the present one and keeps to the bounds."""
    hints = get_type_hints(type(technique), include_extras=True)
    for field in dataclasses.fields(technique):  # type: ignore[arg-type]
        if field.name in technique.variations:
            yield field.name, technique.variations[field.name]
            continue
        value, hint = getattr(technique, field.name), hints[field.name]
        options = [option for option in get_args(hint) if isinstance(option, str)]
        candidates: list[Any] = [o for o in options if o != value]
        if isinstance(value, bool):
            candidates = [not value]
        elif isinstance(value, int):
            candidates = [value * 2, value // 2, value + 1]
        elif isinstance(value, float):
            candidates = [value / 2, value * 2, value + 0.5, value + 0.25]
        for candidate in candidates:
            if candidate != value:
                try:
                    dataclasses.replace(technique, **{field.name: candidate})  # type: ignore[type-var]
                except ValueError:
                    continue
                yield field.name, candidate
                break
        else:
            raise AssertionError(f"{type(technique).__name__}.{field.name}: say another value in `variations`")


CHECKS: tuple[Callable[[Technique, Path], None], ...] = (
    check_stores_only_hyperparameters,
    check_names_bad_values,
    check_trains,
    check_neutral_is_trainer,
    check_resumes_bit_exactly,
    check_trains_twice,
    check_evaluates_what_it_returns,
    check_micro_batch_invariant,
    check_leaves_the_model_as_found,
    check_every_option_matters,
)
"""All checks of one technique on one process."""


def check_technique(technique: Technique, directory: str | Path) -> None:
    """Run all checks; those in ``expected_failed_checks`` must fail."""
    for check in CHECKS:
        place = Path(directory, check.__name__)
        place.mkdir(parents=True, exist_ok=True)
        if (reason := technique.expected_failed_checks.get(check.__name__)) is None:
            check(technique, place)
            continue
        try:
            check(technique, place)
        except Exception:
            continue
        raise AssertionError(f"{technique!r} passes {check.__name__}, which it declares to fail ({reason})")


# Techniques together --------------------------------------------------------------------------------------------------


def covering_array(
    owners_by_slot: Mapping[str, Collection[str]], free_techniques: Collection[str], seed: int = 0
) -> list[list[str]]:
    """Few runs, each an ordered list of techniques, in which every pair meets.

    Each two that may meet occur in both orders, and each technique occurs without each other; no run has two owners of
    a slot.  Greedy: of random runs, the one with most that is new.
    """
    names = sorted({*free_techniques, *(name for owners in owners_by_slot.values() for name in owners)})
    clashes = {frozenset(pair) for owners in owners_by_slot.values() for pair in combinations(owners, 2)}
    generator = random.Random(seed)

    def candidate() -> list[str]:
        share, run = generator.uniform(0.5, 1), []
        for name in generator.sample(names, len(names)):
            if generator.random() < share and not any(frozenset((name, other)) in clashes for other in run):
                run.append(name)
        return run

    def shown_by(run: list[str]) -> set[tuple[str, str, str]]:
        absent = [name for name in names if name not in run]
        return {(a, "before", b) for a, b in combinations(run, 2)} | {(a, "without", b) for a in run for b in absent}

    pairs = list(permutations(names, 2))
    missing = {(a, "without", b) for a, b in pairs}
    missing |= {(a, "before", b) for a, b in pairs if frozenset((a, b)) not in clashes}
    runs = []
    while missing:
        run = max((candidate() for _ in range(200)), key=lambda run: len(shown_by(run) & missing))
        if news := shown_by(run) & missing:
            missing -= news
            runs.append(run)
    return runs
