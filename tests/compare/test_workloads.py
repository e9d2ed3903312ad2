"""The workloads build, train and evaluate on data made here; where HF_ACCEL_DATA is set, on the real data, too."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertTokenizer, EvalPrediction, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_accel.compare import build_workload
from hf_accel.compare.worker import measure
from hf_accel.compare.workloads import WORKLOADS, workload
from hf_accel.compare.workloads.metrics import evaluate_metric
from hf_accel.compare.workloads.text_classification import without_unused

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it

REAL_DATA = os.environ.get("HF_ACCEL_DATA")

WORDS = "the film was good bad long short my card is lost where new pin what a plot ##s ##ing".split()
COLUMNS = {
    "sst2": {"input_ids", "attention_mask", "labels"},
    "banking77": {"input_ids", "attention_mask", "labels"},
    "gsm8k-sft": {"input_ids", "attention_mask", "labels"},
    "gsm8k-lora": {"input_ids", "attention_mask", "labels"},
    "cifar10-resnet": {"pixel_values", "labels"},
    "cifar10-vit": {"pixel_values", "labels"},
}
FROM_FILES = pytest.mark.parametrize("name", COLUMNS)


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Small files with the names and columns of the real ones."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(7)

    def texts(count, words):
        return [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(count)]

    for folder, classes, names in (("sst2", 2, ("train", "validation", "test")), ("banking77", 5, ("train", "test"))):
        for name in names:
            labels = np.arange(30) % classes
            write(root / "text_cls" / folder / f"{name}.parquet", text=texts(30, WORDS[:12]), label=labels)
    vocabulary = root / "tokenizer" / "bert-base-uncased" / "vocab.txt"
    vocabulary.parent.mkdir(parents=True)
    vocabulary.write_text("\n".join(["[PAD]", "unused", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")

    sums = ["one", "two", "plus", "is", "three", "?", "####"]
    vocab = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "\n", *sums])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(root / "pretrained" / "stories260K")
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(root / "pretrained" / "stories260K")
    for name in ("train", "test"):
        write(
            root / "sft" / "gsm8k" / f"{name}.parquet",
            prompt=[*texts(20, sums), "one " * 600],
            completion=texts(21, sums),
        )

    novels = root / "lm" / "gutenberg_novels"
    novels.mkdir(parents=True)
    for name in ("train", "validation"):
        (novels / f"{name}.txt.gz").write_bytes(gzip.compress(b"It is a truth universally acknowledged. " * 100))

    for name in ("train", "test"):
        files = []
        for pixels in rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG")
            files.append(file.getvalue())
        write(root / "image" / "cifar10" / f"{name}.parquet", image=files, label=(np.arange(24) % 10).astype("int16"))
    return root


@pytest.fixture(autouse=True)
def made_data(made, monkeypatch):
    monkeypatch.setenv("HF_ACCEL_DATA", str(made))


def build(name, seed=0, **options):
    torch.manual_seed(seed)
    return build_workload(name, options).build()


def batch_of(task, rows):
    return task["data_collator"]([task["train_dataset"][row] for row in rows])


# Every workload with files --------------------------------------------------------------------------------------------


@FROM_FILES
def test_a_workload_has_its_columns_and_trains(name):
    task = build(name)
    batch = batch_of(task, range(4))
    assert set(batch) == COLUMNS[name]
    if "pixel_values" in batch:
        assert batch["pixel_values"].shape == (4, 3, 32, 32) and batch["labels"].shape == (4,)
    else:
        longest = max(len(task["train_dataset"][row]["input_ids"]) for row in range(4))
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, longest), "padded to the longest only"
        assert batch["labels"].shape == ((4, longest) if "gsm8k" in name else (4,))
    small = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "dataloader_pin_memory": False}
    args = build_workload(name).baseline_args() | small
    run = {"workload": name, "options": {}, "recipe": {"args": args}, "budget": "2steps", "seed": 1}
    record = measure(run)
    assert record["costs"]["steps"] == 2
    assert np.isfinite(record["metrics"]["eval_loss"])
    assert ("eval_accuracy" in record["metrics"]) == ("gsm8k" not in name)


@FROM_FILES
def test_the_seed_decides_the_model_and_not_the_data(name):
    first, same, other = build(name, seed=1), build(name, seed=1), build(name, seed=2)
    weights = [{key: value for key, value in task["model"].state_dict().items()} for task in (first, same, other)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert all(torch.equal(value, weights[2][key]) for key, value in weights[0].items()) == (name == "gsm8k-sft")
    rows = range(len(first["train_dataset"]))
    for task in (same, other):
        pairs = zip(batch_of(first, rows).items(), batch_of(task, rows).values(), strict=True)
        assert all(torch.equal(value, again) for (_, value), again in pairs)


@FROM_FILES
def test_what_is_missing_is_said_in_a_sentence(name, tmp_path, monkeypatch):
    assert build_workload(name).missing() is None
    monkeypatch.setenv("HF_ACCEL_DATA", str(tmp_path))
    assert "there is no such file. Set HF_ACCEL_DATA, or --data" in build_workload(name).missing()
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    if name == "gsm8k-lora":
        assert (
            build_workload(name).missing() == "peft: is not installed. Install it with: pip install 'hf-accel[peft]'."
        )
    if "cifar" in name:
        assert (
            build_workload(name).missing() == "PIL: is not installed. Install it with: pip install 'hf-accel[vision]'."
        )


@pytest.mark.parametrize("name", [*COLUMNS, "novels-lm"])
def test_the_larger_scale(name):
    small, large = build_workload(name), build_workload(name, {"scale": "gpu"})
    assert large.nominal_budget() != small.nominal_budget()
    assert large.baseline_args()["bf16"] and "bf16" not in small.baseline_args()
    task = build(name, scale="gpu")
    sizes = [sum(p.numel() for p in model.parameters()) for model in (build(name)["model"], task["model"])]
    assert sizes[0] == sizes[1] if "gsm8k" in name else sizes[1] > 4 * sizes[0]
    batch = {key: value[:2] for key, value in batch_of(task, range(2)).items()}
    assert torch.isfinite(task["model"](**batch)["loss"])


@pytest.mark.parametrize("name", ["digits", "synthetic", "recipe"])
def test_a_scale_that_a_workload_has_not_is_refused(name):
    sentence = f"scale('gpu'): the workload '{name}' does not support it. Set scale='cpu'."
    with pytest.raises(ValueError) as error:
        build_workload(name, {"scale": "gpu"})
    assert str(error.value) == sentence


def test_all_workloads_are_tried_here():
    assert set(WORKLOADS) == {*COLUMNS, "code-lm", "novels-lm", "digits", "synthetic", "recipe"}


# Tuned baselines ------------------------------------------------------------------------------------------------------


def test_the_record_of_a_tuned_baseline_has_precedence(tmp_path, monkeypatch):
    untuned = build_workload("sst2").baseline_args()
    monkeypatch.setattr(workload, "TUNED", tmp_path)
    record = {"args": {"learning_rate": 0.125}, "tuned": "8 trials", "seed_sigma": 0.5, "trials": []}
    (tmp_path / "sst2.json").write_text(json.dumps(record))
    found = build_workload("sst2")
    assert found.baseline_args() == untuned | {"learning_rate": 0.125}
    assert (found.tuned, found.seed_sigma) == ("8 trials", 0.5) and found.margin > found.margin_floor
    larger = build_workload("sst2", {"scale": "gpu"})
    assert (larger.tuned, larger.seed_sigma) == ("", 0.0) and larger.baseline_args()["learning_rate"] != 0.125
    assert build_workload("banking77").tuned == ""


# Texts, sums, images --------------------------------------------------------------------------------------------------


def test_a_smaller_vocabulary_cuts_the_training_texts_alike(made):
    whole = BertTokenizer(str(made / "tokenizer" / "bert-base-uncased" / "vocab.txt"))
    texts = ["The films was long", "my pins"]
    small = without_unused(whole, texts)
    assert small.get_vocab().keys() == {
        *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        *("the", "film", "##s", "was", "long", "my", "pin"),
    }
    for text in [*texts, "long pins"]:
        assert small.tokenize(text) == whole.tokenize(text) and "[UNK]" not in whole.tokenize(text)
    assert small.tokenize("good") == ["[UNK]"]
    assert small("my pins")["input_ids"][0] == small.cls_token_id


def test_sst2_is_evaluated_on_all_sentences_by_length():
    task = build("sst2")
    lengths = [len(row) for row in task["eval_dataset"]["input_ids"]]
    assert len(lengths) == 60 and lengths == sorted(lengths)


def test_only_completions_are_learnt(made):
    task = build("gsm8k-sft")
    table = pyarrow.parquet.read_table(made / "sft" / "gsm8k" / "train.parquet").to_pylist()
    assert len(task["train_dataset"]) == len(table) - 1, "what does not fit is left out"
    tokenizer, pairs = task["processing_class"], {(row["prompt"], row["completion"]) for row in table}
    for row in task["train_dataset"]:
        learned = [label != -100 for label in row["labels"]]
        start = learned.index(True)
        assert all(learned[start:]) and row["labels"][start:] == row["input_ids"][start:]
        words = tokenizer.convert_ids_to_tokens(row["input_ids"])
        assert (words[0], words[start - 1], words[-1]) == ("<s>", "\n", "</s>")
        assert (" ".join(words[1 : start - 1]), " ".join(words[start:-1])) in pairs
    padded = batch_of(task, range(4))
    assert (padded["labels"][padded["attention_mask"] == 0] == -100).all()


def test_lora_trains_its_matrices_only():
    from peft import PeftModel

    model = build("gsm8k-lora")["model"]
    assert isinstance(model, PeftModel)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = {name.partition(".layers.0.")[2].partition(".lora_")[0] for name in trained}
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    assert layers == attention | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert len(trained) == 2 * len(layers) and all("lora_" in name for name in trained)


def test_images_are_those_of_the_files_and_their_mirror_images(made):
    images, labels = build("cifar10-vit")["train_dataset"].tensors
    rows = pyarrow.parquet.read_table(made / "image" / "cifar10" / "train.parquet").to_pylist()
    assert len(images) == 2 * len(rows)
    assert torch.equal(labels[: len(rows)], labels[len(rows) :])
    found = {
        image.tobytes(): int(label) for image, label in zip(images.permute(0, 2, 3, 1).numpy(), labels, strict=True)
    }
    for row in rows:
        image = Image.open(io.BytesIO(row["image"]))
        mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert found[image.tobytes()] == found[mirrored.tobytes()] == row["label"]


# Metrics --------------------------------------------------------------------------------------------------------------

LOCAL_METRIC = """
import datasets
import evaluate
import numpy as np


class Wrong(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        wrong = [p != r for p, r in zip(predictions, references)]
        return {"wrong": np.float64(sum(wrong)), "each": wrong}
"""


@pytest.fixture
def local_metric(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "wrong"
    folder.mkdir()
    (folder / "wrong.py").write_text(LOCAL_METRIC)
    return str(folder)


def test_a_local_metric_counts_what_the_largest_logits_say(local_metric):
    logits = np.array([[0.0, 1.0, 0.5], [2.0, 1.0, 0.0], [0.0, 0.1, 0.2]])
    compute = evaluate_metric(local_metric)
    assert compute(EvalPrediction(logits, np.array([1, 2, 2]))) == {"wrong": 1.0}, "numbers only"
    assert compute(EvalPrediction((logits, logits), np.array([0, 1, 1]))) == {"wrong": 3.0}, "as often as asked"


@pytest.mark.parametrize("shape, labels", [((3, 5, 7), np.zeros((3, 5), int)), ((3, 1), np.zeros(3))])
def test_a_metric_of_anything_else_is_refused(local_metric, shape, labels):
    with pytest.raises(ValueError, match="only logits with one label per example are supported"):
        evaluate_metric(local_metric)(EvalPrediction(np.zeros(shape), labels))


def test_a_metric_that_cannot_be_loaded_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot load it .* give the folder of a local metric") as error:
        evaluate_metric(str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)


# Real data ------------------------------------------------------------------------------------------------------------


@pytest.mark.ci
@FROM_FILES
def test_real_data(name, monkeypatch):
    if REAL_DATA is None:
        pytest.skip("HF_ACCEL_DATA is not set: no real data sets")
    monkeypatch.setenv("HF_ACCEL_DATA", REAL_DATA)
    if (reason := build_workload(name).missing()) is not None:
        pytest.skip(reason)
    task = build(name)
    assert len(task["train_dataset"]) >= 1000
    assert len(task["eval_dataset"]) >= (300 if "gsm8k" in name else 2000)
    assert torch.isfinite(task["model"](**batch_of(task, range(8)))["loss"])
