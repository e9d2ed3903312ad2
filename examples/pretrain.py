"""Pre-training from scratch within a given time, on text, byte by byte.

python examples/pretrain.py --budget 10min
python examples/pretrain.py --budget 8h --dataset roneneldan/TinyStories

Needs: pip install -c constraints.txt -e .
"""

import argparse
import json
from pathlib import Path

import datasets
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from hf_accel import AccelTrainer, Budget, Muon, SequenceLengthWarmup, WarmupStableDecay

parser = argparse.ArgumentParser()
parser.add_argument("--budget", default="20s")
parser.add_argument("--dataset", help="of the Hub, with a column 'text'; without one, the source of Python's json")
options = parser.parse_args()

CONTEXT = 128
set_seed(0)
if options.dataset is None:
    text = "\n".join(path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py")))
else:
    text = "\n".join(datasets.load_dataset(options.dataset, split="train[:1%]")["text"])
data = text.encode()
examples = [
    {"input_ids": list(data[i : i + CONTEXT]), "labels": list(data[i : i + CONTEXT])}
    for i in range(0, len(data) - CONTEXT, CONTEXT)
]
config = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=CONTEXT,
)
trainer = AccelTrainer(
    model=LlamaForCausalLM(config),
    args=TrainingArguments(
        "accel_pretrain", per_device_train_batch_size=8, learning_rate=1e-2, save_strategy="no", report_to="none"
    ),
    train_dataset=examples[:-16],
    eval_dataset=examples[-16:],
    techniques=[Budget(options.budget), WarmupStableDecay(), SequenceLengthWarmup(), Muon()],
)
trainer.train()
print(trainer.receipt.to_dict()["seconds"])
print(trainer.evaluate())
