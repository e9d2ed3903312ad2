"""Techniques in trainers that are not ours: each trains, or is refused with a reason, as docs/trainers.md says.

``pytest tests/test_other_trainers.py -m trainers --write-docs`` writes the table from what ran; otherwise it is
checked.
"""

from __future__ import annotations

import math
import traceback
from pathlib import Path

import cells
import datasets
import pytest
import torch
from hook_classes import one_for_each_hook
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

from hf_accel import (
    Budget,
    ExponentialMovingAverage,
    InfoBatch,
    Packing,
    PaddingFree,
    RandomSubset,
    Recipe,
    TargetMetric,
    accelerated,
    attach,
)
from hf_accel.losses import head_of
from hf_accel.recipe import known_techniques
from hf_accel.testing import CountingText, collate_padded, largest_difference, losses_of, tiny_llama, weights_of

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.ci,
    pytest.mark.filterwarnings("ignore"),  # other libraries' own
]

TABLE = Path(__file__).parents[1] / "docs" / "trainers.md"
SETTINGS = {
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
}
TRL = SETTINGS | {"bf16": False}
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
TEXTS = [" ".join(WORDS[i % 8 : i % 8 + 1 + i % 5]) for i in range(16)]
FEATURES = [
    {"input_ids": row["input_ids"], "labels": row["input_ids"][: 3 + i % 4]} for i, row in enumerate(CountingText(16))
]


def tokenizer():
    """One token for each byte; nothing is downloaded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *alphabet])
    }
    bytewise = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def byte_llama(dropout=0.0):
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2
    )
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer()), attention_dropout=dropout, **sizes, **special))


def both(data, hosting):
    """The training set, and the same to evaluate on where that is asked for."""
    return {"train_dataset": data} | ({"eval_dataset": data} if hosting.pop("evaluated", False) else {})


def trainer(directory, kind=Trainer, **hosting):
    return kind(
        model=tiny_llama(),
        args=TrainingArguments(str(directory), **SETTINGS),
        **both(CountingText(16), hosting),
        data_collator=collate_padded,
        **hosting,
    )


def seq2seq(directory, kind=Seq2SeqTrainer, **hosting):
    torch.manual_seed(0)
    sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=4, num_heads=2, vocab_size=48, decoder_start_token_id=0)
    return kind(
        model=T5ForConditionalGeneration(T5Config(**sizes)),
        args=Seq2SeqTrainingArguments(str(directory), **SETTINGS),
        **both(datasets.Dataset.from_list(FEATURES), hosting),
        data_collator=DataCollatorForSeq2Seq(tokenizer()),
        **hosting,
    )


def sft(directory, kind=SFTTrainer, **hosting):
    return kind(
        model=byte_llama(),
        args=SFTConfig(str(directory), **TRL | hosting.pop("args", {})),
        **both(datasets.Dataset.from_dict({"text": TEXTS}), hosting),
        processing_class=tokenizer(),
        **hosting,
    )


def dpo(directory, kind=DPOTrainer, **hosting):
    pairs = {"prompt": TEXTS, "chosen": [" yes, indeed"] * 16, "rejected": [" no"] * 16}
    return kind(
        model=byte_llama(),
        ref_model=byte_llama(),
        args=DPOConfig(str(directory), **TRL),
        **both(datasets.Dataset.from_dict(pairs), hosting),
        processing_class=tokenizer(),
        **hosting,
    )


def sentence_transformer(directory, kind=SentenceTransformerTrainer, **hosting):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    BertModel(BertConfig(vocab_size=len(tokenizer()), **sizes)).save_pretrained(directory / "bert")
    tokenizer().save_pretrained(directory / "bert")
    model = SentenceTransformer(modules=[Transformer(str(directory / "bert")), Pooling(16)], device="cpu")
    return kind(
        model=model,
        loss=MultipleNegativesRankingLoss(model),
        args=SentenceTransformerTrainingArguments(str(directory), **SETTINGS),
        **both(datasets.Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]}), hosting),
        **hosting,
    )


BUILDERS = {
    "Trainer": trainer,
    "Seq2SeqTrainer": seq2seq,
    "SFTTrainer": sft,
    "DPOTrainer": dpo,
    "SentenceTransformerTrainer": sentence_transformer,
}
PLAIN = "Trainer(callbacks=[...])"
NAMES = [name for name, kind in known_techniques().items() if kind.modality == "text"]
OTHERS = sorted(name for name, kind in known_techniques().items() if kind.modality != "text")
KINDS = {
    "Trainer": Trainer,
    "Seq2SeqTrainer": Seq2SeqTrainer,
    "SFTTrainer": SFTTrainer,
    "DPOTrainer": DPOTrainer,
    "SentenceTransformerTrainer": SentenceTransformerTrainer,
}


def make(name):
    kind = known_techniques()[name]
    return kind(**kind.probe_fields, **({"limit": "3epochs"} if name == "Budget" else {}))


def outcome(column, technique, directory):
    """``trains``, after a whole run in which the technique took effect, or why it was refused."""
    evaluated = isinstance(technique, TargetMetric)
    try:
        if column == PLAIN:
            hosted = trainer(directory, callbacks=[technique], evaluated=evaluated)
        else:
            size = technique.probe_micro_batch_size
            hosted = BUILDERS[column](
                directory,
                accelerated(KINDS[column]),
                techniques=[technique],
                micro_batch_size=size,
                evaluated=evaluated,
            )
        hosted.train()
    except ValueError as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        assert "/hf_accel/" in last, f"not refused by us: {error!r}"
        return " ".join(str(error).split())
    assert hosted.state.global_step > 0 and all(map(math.isfinite, losses_of(hosted)))
    if column != PLAIN:
        assert technique.took_effect(hosted.receipt.techniques[0]["report"])
    return "trains"


@pytest.fixture(scope="module")
def table(request):
    """What the document says; written anew from what ran, where this was asked for."""
    found = cells.read(TABLE.read_text()) if TABLE.exists() else {}
    yield found
    if request.config.getoption("write_docs"):
        columns = {column: f"`{column}`" for column in [*BUILDERS, PLAIN]}
        TABLE.write_text(cells.written(HEADING, NAMES, columns, found, "trains"))


CHOSEN = one_for_each_hook({name: known_techniques()[name] for name in NAMES})
"""In continuous integration; they answer to all hooks together."""


@pytest.mark.parametrize("column", [*BUILDERS, PLAIN])
@pytest.mark.parametrize("name", [n if n in CHOSEN else pytest.param(n, marks=pytest.mark.full) for n in NAMES])
def test_it_trains_or_is_refused_as_the_table_says(name, column, table, tmp_path, request):
    found = outcome(column, make(name), tmp_path)
    if request.config.getoption("write_docs"):
        table[name, column] = found
    assert table[name, column] == found


HEADING = f"""# Techniques in other trainers

<!-- Written by pytest tests/test_other_trainers.py -m trainers --write-docs, from what ran. -->

`accelerated(SFTTrainer)(..., techniques=[...])` and `attach(trainer, [...])` add techniques to other trainers.
*Trains*: the technique trained a tiny model. A number refers to the error below, which comes before the first step.

The table has text models only. Techniques for images, speech and masked language models were tested in `AccelTrainer`
only: {", ".join(OTHERS)}.
"""


# Losses of examples where the trainer computes its own ----------------------------------------------------------------


def sft_run(directory, kind=SFTTrainer, **hosting):
    hosted = sft(directory, kind, **hosting)
    hosted.train()
    return hosted


def test_sft_with_the_models_head_is_sft(tmp_path):
    """Losses of tokens through `hf_accel.losses`, with weights of 1, are SFTTrainer's own, over micro-batches too."""
    plain = sft_run(tmp_path / "plain")
    model_head = head_of(byte_llama())
    neutral = sft_run(
        tmp_path / "ours", accelerated(SFTTrainer), techniques=[InfoBatch(keep=1.0)], example_loss_func=model_head
    )
    assert losses_of(neutral) == pytest.approx(losses_of(plain), rel=1e-5)
    assert largest_difference(weights_of(neutral), weights_of(plain)) < 1e-4
    small = sft_run(
        tmp_path / "small",
        accelerated(SFTTrainer),
        techniques=[InfoBatch(keep=1.0)],
        example_loss_func=model_head,
        micro_batch_size=3,
    )
    assert losses_of(small) == pytest.approx(losses_of(plain), rel=1e-4)


def test_sft_with_the_models_head_prunes(tmp_path):
    pruned = sft_run(
        tmp_path,
        accelerated(SFTTrainer),
        techniques=[InfoBatch(keep=0.5)],
        example_loss_func=head_of(byte_llama()),
    )
    assert pruned.receipt.samples < 3 * 16 and pruned.receipt.techniques[0]["report"]["kept"] < 1


def test_observed_losses_are_those_of_the_examples(tmp_path):
    seen = {}

    class Watch(InfoBatch):
        def observe(self, ids_B, losses_B):
            seen.update(zip(ids_B.tolist(), losses_B.tolist(), strict=True))
            super().observe(ids_B, losses_B)

    still = {"learning_rate": 0.0, "num_train_epochs": 1}
    hosted = sft_run(
        tmp_path, accelerated(SFTTrainer), techniques=[Watch()], example_loss_func=head_of(byte_llama()), args=still
    )
    model = hosted.model.eval()
    for i, row in enumerate(hosted.train_dataset):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        expected = -log_probs.gather(1, ids[0, 1:, None]).mean().item()
        assert seen[i] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("technique", [PaddingFree, Packing])
def test_sft_without_padding_is_sft(technique, tmp_path):
    plain = sft_run(tmp_path / "plain")
    flattened = sft_run(tmp_path / "ours", accelerated(SFTTrainer), techniques=[technique()])
    assert losses_of(flattened) == pytest.approx(losses_of(plain), rel=1e-4)
    tokens = [[row.get("num_tokens") for row in run.state.log_history] for run in (plain, flattened)]
    assert tokens[1] == tokens[0] and None not in tokens[0][:-1]


def test_attach_to_a_trainer_of_trl(tmp_path):
    attached, built = sft(tmp_path), sft(tmp_path, accelerated(SFTTrainer), techniques=[Budget("5steps")])
    attach(attached, [Budget("5steps")])
    for each in (attached, built):
        torch.manual_seed(0)
        each.train()
    assert attached.state.global_step == 5 and losses_of(attached) == losses_of(built)


class OwnSampler(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def test_a_sampler_of_the_users_is_not_replaced_in_silence(tmp_path):
    with pytest.raises(ValueError, match=r"OwnSampler._get_train_sampler makes its own batches, which InfoBatch\("):
        trainer(tmp_path, accelerated(OwnSampler), techniques=[InfoBatch()])
    trainer(tmp_path, accelerated(OwnSampler), techniques=[Budget("2steps")]).train()


def test_arguments_of_a_recipe_alone_are_of_the_trainers_kind(tmp_path):
    pairs = {"prompt": TEXTS, "chosen": [" yes, indeed"] * 16, "rejected": [" no"] * 16}
    recipe = Recipe(args={"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"})
    given = {"model": byte_llama(), "processing_class": tokenizer(), "recipe": recipe}
    for kind, arguments, data, more in (
        (SFTTrainer, SFTConfig, {"text": TEXTS}, {}),
        (DPOTrainer, DPOConfig, pairs, {"ref_model": byte_llama()}),
    ):
        made = accelerated(kind)(train_dataset=datasets.Dataset.from_dict(data), **given, **more)
        assert type(made.args) is arguments
        assert made.args.learning_rate == arguments(str(tmp_path), use_cpu=True, bf16=False).learning_rate


# Trainers whose batches are lists of prompts --------------------------------------------------------------------------


def reward(completion_ids, **kwargs):
    return [float(sum(ids) % 7) for ids in completion_ids]


def teacher():
    model = byte_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    return model


def of_prompts(config, **settings):
    def make(directory, kind, steps, **hosting):
        given = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "max_steps": steps}
        return kind(
            model=byte_llama(),
            args=config(str(directory), **TRL | given | settings),
            train_dataset=datasets.Dataset.from_dict({"prompt": TEXTS[:8]}),
            processing_class=tokenizer(),
            **hosting,
        )

    return make


SAMPLED = {"beta": 0.0, "num_generations": 2, "max_completion_length": 4}
OF_PROMPTS = {
    GRPOTrainer: (of_prompts(GRPOConfig, **SAMPLED), {"reward_funcs": reward}),
    RLOOTrainer: (of_prompts(RLOOConfig, **SAMPLED), {"reward_funcs": reward}),
    DistillationTrainer: (of_prompts(DistillationConfig, max_completion_length=4), {"teacher_model": teacher()}),
}


@pytest.mark.parametrize("budget", ["2steps", "8samples"])
@pytest.mark.parametrize("kind", OF_PROMPTS, ids=lambda kind: kind.__name__)
def test_trainers_of_prompts_train_as_without_us(kind, budget, tmp_path):
    make, given = OF_PROMPTS[kind]
    plain = make(tmp_path / "plain", kind, 2, **given)
    before = weights_of(plain)
    plain.train()
    techniques = [Budget(budget), ExponentialMovingAverage(**ExponentialMovingAverage.neutral)]
    ours = make(tmp_path / "ours", accelerated(kind), -1, techniques=techniques, **given)
    ours.train()
    assert largest_difference(before, weights_of(plain)) > 0
    assert largest_difference(weights_of(ours), weights_of(plain)) == 0.0
    assert ours.state.global_step == plain.state.global_step == 2 and ours.receipt.samples == 8


@pytest.mark.parametrize("kind", OF_PROMPTS, ids=lambda kind: kind.__name__)
def test_the_batches_of_trainers_of_prompts_are_not_replaced(kind, tmp_path):
    make, given = OF_PROMPTS[kind]
    with pytest.raises(
        ValueError, match=rf"{kind.__name__}.get_train_dataloader makes its own batches, .* Remove InfoBatch"
    ):
        make(tmp_path, accelerated(kind), 2, techniques=[InfoBatch()], **given)


def test_generalized_distillation_trains_as_without_us(tmp_path):
    runs, words = [], tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    turns = [[{"role": "user", "content": t}, {"role": "assistant", "content": "yes"}] for t in TEXTS[:8]]
    for kind, hosting in ((GKDTrainer, {}), (accelerated(GKDTrainer), {"techniques": [RandomSubset(keep=1.0)]})):
        hosted = kind(
            model=byte_llama(),
            teacher_model=teacher(),
            args=GKDConfig(str(tmp_path), **TRL | {"max_steps": 2, "max_new_tokens": 4, "lmbda": 0.0}),
            train_dataset=datasets.Dataset.from_dict({"messages": turns}),
            processing_class=words,
            **hosting,
        )
        before = weights_of(hosted)
        hosted.train()
        runs.append(weights_of(hosted))
    assert largest_difference(runs[0], runs[1]) == 0.0 < largest_difference(before, runs[0])
