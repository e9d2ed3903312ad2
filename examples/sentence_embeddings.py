"""Sentence embeddings with sentence-transformers' trainer: batches of one length, which ends on time.

python examples/sentence_embeddings.py
python examples/sentence_embeddings.py --model microsoft/mpnet-base --dataset sentence-transformers/gooaq

Needs: pip install -c constraints.txt -e . sentence-transformers
"""

import argparse
import random
import tempfile

import datasets
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, ByT5Tokenizer, set_seed

from hf_accel import Budget, ExponentialMovingAverage, accelerated

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="of the Hub; without one, a small BERT that knows nothing")
parser.add_argument("--dataset", help="of the Hub; without one, numbers and their names")
options = parser.parse_args()

set_seed(0)
if options.model is None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        words = Transformer(folder)
    model = SentenceTransformer(modules=[words, Pooling(64)])
else:
    model = SentenceTransformer(options.model)
if options.dataset is None:
    tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    ones = ["", " one", " two", " three", " four", " five", " six", " seven", " eight", " nine"]
    names = {10 * i + j: ten + one for i, ten in enumerate(tens, 2) for j, one in enumerate(ones)}
    rows = [{"anchor": f"{prefix} {n}", "positive": name} for prefix in ("no.", "number") for n, name in names.items()]
    random.shuffle(rows)
    data = datasets.Dataset.from_list(rows).train_test_split(32, seed=0)
else:
    data = datasets.load_dataset(options.dataset, split="train").train_test_split(0.01, seed=0)

trainer = accelerated(SentenceTransformerTrainer)(
    model=model,
    args=SentenceTransformerTrainingArguments(
        "accel_sentences", per_device_train_batch_size=16, learning_rate=2e-3, save_strategy="no", report_to="none"
    ),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    loss=MultipleNegativesRankingLoss(model),
    techniques=[Budget("10epochs"), ExponentialMovingAverage(half_life=10)],
)
trainer.train()
print(trainer.evaluate())
