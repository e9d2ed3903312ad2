import io
import json
import re

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    ByT5Tokenizer,
    TrainingArguments,
)

from hf_accel import AccelTrainer, RandAugment, Recipe, RecipeError
from hf_accel.tasks import build_task
from hf_accel.tasks.causal_lm import split, tokenize

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}

VIT = {"model_type": "vit", "patch_size": 4, "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} \u00fc\n" for i in range(400)))
    return str(path)


@pytest.fixture
def labeled(tmp_path):
    rows = pandas.DataFrame({"text": [f"text {i}" for i in range(6)], "label": ["b", "a"] * 3})
    rows.to_parquet(tmp_path / "train.parquet")
    rows.head(4).to_parquet(tmp_path / "validation.parquet")
    return {"train": str(tmp_path / "train.parquet"), "validation": str(tmp_path / "validation.parquet")}


def test_bytes_are_those_of_the_tokenizer():
    tokenizer = ByT5Tokenizer(extra_ids=0)
    text = "def f():\n\treturn '\u00fc \u4e2d'"
    assert tokenize([text], tokenizer)[0].tolist() == tokenizer(text)["input_ids"]


def test_documents_are_split_by_their_text():
    documents = [f"document {i % 50}" for i in range(100)]
    train, validation = split(documents, 0.2)
    assert len(train) + len(validation) == 100 and not set(train) & set(validation)
    assert 5 <= len(validation) <= 40
    assert split(documents[::-1], 0.2)[1] == validation[::-1], "the order plays no part"
    assert split(["0123456789"], 0.2) == (["01234567"], ["89"])


def test_causal_lm_in_blocks(text):
    data = {"source": text, "context": 32, "validation_share": 0.25, "validation_limit": 8}
    task = build_task(Recipe("causal-lm", {"config": LLAMA}, data))
    train = task["train_dataset"]
    assert {len(row) for row in train["input_ids"]} == {32} and train["input_ids"][:] == train["labels"][:]
    assert len(task["eval_dataset"]) == 8
    assert task["model"].config.vocab_size == 259 and task["model"].config.eos_token_id == 1
    text_again = task["processing_class"].decode(np.concatenate(train["input_ids"][:]).tolist())
    assert text_again.startswith("line 0 \u00fc\nline 1")
    batch = task["data_collator"]([train[0], train[1]])
    loss = task["model"](**batch).loss
    assert torch.isfinite(loss) and abs(loss.item() - np.log(259)) < 1


def test_causal_lm_by_texts(labeled):
    data = {"source": labeled["train"], "validation": labeled["validation"], "context": 6, "blocks": False}
    task = build_task(Recipe("causal-lm", {"config": LLAMA}, data))
    assert len(task["train_dataset"]) == 6 and len(task["eval_dataset"]) == 4
    assert {len(row) for row in task["train_dataset"]["input_ids"]} == {6}
    batch = task["data_collator"](
        [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    )
    assert batch["labels"].tolist() == [[5, 6, -100], [5, 6, 7]]


def test_sequence_classification(labeled):
    task = build_task(Recipe("sequence-classification", {"config": BERT}, labeled))
    assert task["model"].config.id2label == {0: "a", 1: "b"}
    assert task["train_dataset"]["labels"][:] == [1, 0, 1, 0, 1, 0]
    prediction = type("Prediction", (), {"predictions": np.eye(2)[[0, 1, 1]], "label_ids": np.array([0, 1, 0])})
    assert task["compute_metrics"](prediction)["accuracy"] == pytest.approx(2 / 3)


def test_saved_models_are_loaded_with_their_tokenizer(text, tmp_path):
    first = build_task(Recipe("causal-lm", {"config": LLAMA}, {"source": text, "context": 32}))
    first["model"].save_pretrained(tmp_path / "model")
    first["processing_class"].save_pretrained(tmp_path / "model")
    again = build_task(Recipe("causal-lm", str(tmp_path / "model"), {"source": text, "context": 32}))
    assert again["train_dataset"][0] == first["train_dataset"][0]
    for name, value in first["model"].state_dict().items():
        assert torch.equal(value, again["model"].state_dict()[name])


def test_saved_weights_are_trained_in_single_precision(text, tmp_path):
    first = build_task(Recipe("causal-lm", {"config": LLAMA | {"dtype": "bfloat16"}}, {"source": text}))["model"]
    first.save_pretrained(tmp_path)
    path, data = str(tmp_path), {"source": text, "tokenizer": "bytes"}
    assert first.dtype is torch.bfloat16, "a configuration may say so"
    assert build_task(Recipe("causal-lm", path, data))["model"].dtype is torch.float32
    assert build_task(Recipe("causal-lm", {"path": path, "dtype": "bfloat16"}, data))["model"].dtype is torch.bfloat16
    with pytest.raises(RecipeError, match=r"model.dtype\('bf16'\): is not a dtype of weights"):
        build_task(Recipe("causal-lm", {"path": path, "dtype": "bf16"}, data))


def test_a_head_for_other_classes_is_made_anew(labeled, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**BERT, vocab_size=259, num_labels=5)
    saved = AutoModelForSequenceClassification.from_config(config)
    saved.save_pretrained(tmp_path / "model")
    data = labeled | {"tokenizer": "bytes"}
    model = build_task(Recipe("sequence-classification", str(tmp_path / "model"), data))["model"]
    assert model.classifier.weight.shape == (2, 16) and model.config.id2label == {0: "a", 1: "b"}
    for name, value in saved.base_model.state_dict().items():
        assert torch.equal(model.base_model.state_dict()[name], value)


def bad(task="causal-lm", model=None, **data):
    return task, {"config": LLAMA} if model is None else model, data


def quantized(path):
    """By a package that nobody has here."""
    return {"path": path, "quantization_config": {"quant_method": "quanto", "weights": "int4"}}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            bad(task=None),
            "recipe: it names no task. Write 'task:' with one of causal-lm, masked-lm, sequence-",
        ),
        (bad(task="causal"), "task('causal'): there is no such task. Did you mean 'causal-lm'?"),
        (("causal-lm", None, {}), "recipe: it names no model."),
        (bad(sauce="x"), "data: there is no option 'sauce'. Did you mean 'source'?"),
        (bad(context=1), "data.context(1): must be >= 2. Correct the value."),
        (bad(context="many"), "data.context('many'): must be an int, not a str."),
        (bad(validation_share=1.0), "data.validation_share(1.0): must be > 0 and < 1."),
        (bad(source="TEXT", context=10**6), "the training text is shorter than one block of 1000000 tokens."),
        (bad(source="TEXT", validation_share=0.001), "the validation text is shorter than one block"),
        (bad(source="TEXT", tokenizer="none/such/path"), "tokenizer('none/such/path'): neither a folder nor found"),
        (bad(source="TEXT", model="./none"), "model('./none'): neither a folder nor found on the Hub."),
        (bad(source="TEXT", tokenizer="bytes", model="EMPTY"), "cannot be loaded ("),
        (bad(source="TEXT", model={"path": "./x"}, tokenizer="bytes"), "must be a path or a configuration."),
        (bad(source="TEXT", model=quantized("./none")), "model('./none'): neither a folder nor found on the Hub."),
        (bad(source="TEXT", model=quantized("./none"), tokenizer="bytes"), "model('./none'): neither a folder nor"),
        (bad(source="TEXT", model=quantized("LLAMA"), tokenizer="bytes"), "quantization_config: Loading an optimum-"),
        (
            bad(source="TEXT", model={"path": "LLAMA", "quantization_config": 4}, tokenizer="bytes"),
            "model.quantization_config(4): must be a mapping. Write '{load_in_4bit: true}'.",
        ),
        (bad(source="TEXT", model={"config": {"model_type": "lama"}}), "Did you mean 'llama'?"),
        (
            bad(source="TEXT", model={"config": LLAMA | {"hiden_size": 3}}),
            "model.config: LlamaConfig has no 'hiden_size'. Did you mean 'hidden_size'?",
        ),
        (bad(source="TEXT", model={"config": LLAMA | {"hidden_size": 15}}), "model.config: "),
        (bad("sequence-classification", train="x"), "data: 'validation' is missing."),
        (bad("sequence-classification", train="NUMBERS", validation="NUMBERS"), "labels are float. Use whole numbers"),
        (bad("sequence-classification", train="ONE", validation="ONE"), "all labels are 3."),
        (bad("sequence-classification", train="TWO", validation="ONE"), "label 3 is in no training example."),
    ],
)
def test_mistakes_are_named(recipe, message, text, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"TEXT": text, "EMPTY": str(tmp_path / "empty")}
    for name, labels in {"NUMBERS": [0.5, 1.5], "ONE": [3, 3], "TWO": [1, 2]}.items():
        places[name] = str(tmp_path / f"{name}.parquet")
        pandas.DataFrame({"text": ["a", "b"], "label": labels}).to_parquet(places[name])
    task, model, data = recipe
    model = places.get(model, model) if isinstance(model, str) else model
    if isinstance(model, dict) and model.get("path") == "LLAMA":
        build_task(Recipe("causal-lm", {"config": LLAMA}, {"source": text}))["model"].save_pretrained(
            tmp_path / "llama"
        )
        model = model | {"path": str(tmp_path / "llama")}
    data = {key: places.get(value, value) if isinstance(value, str) else value for key, value in data.items()}
    with pytest.raises(RecipeError, match=re.escape(message)) as error:
        build_task(Recipe(task, model, data))
    assert "\n" not in str(error.value)


def test_masked_lm_hides_bytes_behind_what_is_no_byte(text):
    data = {"source": text, "context": 32, "masked": 0.3}
    task = build_task(Recipe("masked-lm", {"config": BERT}, data))
    train, unknown = task["train_dataset"], task["processing_class"].unk_token_id
    batch = task["data_collator"]([train[i] for i in range(len(train))])
    predicted = batch["labels"] != -100
    assert predicted.float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert (batch["input_ids"][predicted] == unknown).float().mean().item() == pytest.approx(0.8, abs=0.1)
    assert not (batch["input_ids"][~predicted] == unknown).any()
    loss = task["model"](**batch).loss
    assert abs(loss.item() - np.log(259)) < 1


@pytest.mark.parametrize("kind", ["table", "folder"])
def test_image_classification(kind, tmp_path):
    data = black_and_white(tmp_path, kind)
    task = build_task(Recipe("image-classification", {"config": VIT}, data))
    assert task["model"].config.id2label == {0: "black", 1: "white"} and task["model"].config.image_size == 8
    batch = task["data_collator"]([task["train_dataset"][i] for i in range(4)])
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    colors = batch["pixel_values"].mean((1, 2, 3))
    assert torch.allclose(colors, 2.0 * batch["labels"] - 1) and sorted(batch["labels"].tolist()) == [0, 0, 1, 1]
    assert torch.isfinite(task["model"](**batch).loss)


def test_images_are_augmented_and_their_processor_is_saved(tmp_path):
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none", max_steps=2)
    data = black_and_white(tmp_path, "table")
    task = build_task(Recipe("image-classification", {"config": VIT}, data))
    trainer = AccelTrainer(args=args, techniques=[RandAugment()], **task)
    trainer.train()
    assert trainer.receipt.techniques[-1]["report"]["changes"] > 0
    trainer.save_model()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    image = Image.open(io.BytesIO(pandas.read_parquet(data["train"])["image"][0]))
    values = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(values, trainer.train_dataset[0][0], rtol=0, atol=0.01)


def test_images_are_as_a_saved_model_knows_them(tmp_path):
    config = AutoConfig.for_model(**VIT, image_size=8, num_labels=5)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "model")
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 0.125]}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(said))
    task = build_task(Recipe("image-classification", str(tmp_path / "model"), black_and_white(tmp_path, "table")))
    assert task["model"].classifier.weight.shape == (2, 8)
    (black, _), (white, _) = (task["train_dataset"][i] for i in range(2))
    assert torch.allclose(black.mean((1, 2)), torch.tensor([-0.2, -0.8, -2.4]))
    assert torch.allclose(white.mean((1, 2)), torch.tensor([1.8, 3.2, 5.6]))


def black_and_white(tmp_path, kind):
    """Black and white images in turn, as a table or a folder."""
    data = {"size": 8}
    for name in ("train", "validation"):
        rows = []
        for i in range(4):
            image = Image.fromarray(np.full((6, 10, 3), 255 * (i % 2), np.uint8))
            path = tmp_path / name / ("black", "white")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            rows.append({"image": path.read_bytes(), "label": path.parent.name})
        pandas.DataFrame(rows).to_parquet(tmp_path / f"{name}.parquet")
        data[name] = str(tmp_path / (f"{name}.parquet" if kind == "table" else name))
    return data


def test_a_model_that_was_saved_quantized_needs_its_package(text, tmp_path):
    model = build_task(Recipe("causal-lm", {"config": LLAMA}, {"source": text}))["model"]
    model.config.quantization_config = quantized("x")["quantization_config"]
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(RecipeError, match=r"model\(.*saved'\): Loading an optimum-quanto quantized model requires"):
        build_task(Recipe("causal-lm", str(tmp_path / "saved"), {"source": text, "tokenizer": "bytes"}))
