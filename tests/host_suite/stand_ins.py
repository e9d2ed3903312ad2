"""Stand in for what Transformers' tests load from the Hub: a tokenizer of bytes, tiny models and a text."""

from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SIZES = {
    "vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
WORDS = "a model reads the words of a text and learns which word comes after them".split()
TEXT = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(i % 7 * 3)) for i in range(200)]


def tokenizer(**kwargs):
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fast = Tokenizer(models.BPE(vocab=letters, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>", pad_token="[PAD]", model_max_length=64)


def language_model(**kwargs):
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def classifier(num_labels=2, **kwargs):
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=num_labels))


def install():
    """Let names of the Hub give the stand-ins, the same at every call; folders are read as ever."""
    made = {
        AutoTokenizer: tokenizer,
        AutoModelForCausalLM: language_model,
        AutoModelForSequenceClassification: classifier,
    }
    for kind, make in made.items():
        kind.from_pretrained = staticmethod(_or_folder(make, kind.from_pretrained))
    read = datasets.load_dataset
    datasets.load_dataset = lambda path, *args, **kwargs: (
        datasets.Dataset.from_dict({"text": TEXT}) if path == "Salesforce/wikitext" else read(path, *args, **kwargs)
    )


def _or_folder(make, read):
    def from_pretrained(name, *args, **kwargs):
        if Path(name).exists():
            return read(name, *args, **kwargs)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make(**kwargs)

    return from_pretrained
