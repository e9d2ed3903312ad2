"""Supervised fine-tuning with TRL's SFTTrainer: batches of similar length, and an average of the last weights.

python examples/sft.py
python examples/sft.py --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara

Needs: pip install -c constraints.txt -e '.[trl]'
"""

import argparse
import random

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from hf_accel import Budget, LatestWeightAveraging, LengthGrouped, accelerated

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="of the Hub; without one, a small Llama that knows nothing")
parser.add_argument("--dataset", help="of the Hub; without one, sums")
options = parser.parse_args()

set_seed(0)
if options.model is None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
else:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
if options.dataset is None:
    pairs = [(a, b) for a in range(30) for b in range(30)]
    random.shuffle(pairs)
    rows = [{"prompt": f"What is {a} plus {b}?", "completion": f" It is {a + b}."} for a, b in pairs]
    data = datasets.Dataset.from_list(rows).train_test_split(100, seed=0)
else:
    data = datasets.load_dataset(options.dataset, split="train").train_test_split(0.05, seed=0)

trainer = accelerated(SFTTrainer)(
    model=model,
    processing_class=tokenizer,
    args=SFTConfig(
        "accel_sft",
        per_device_train_batch_size=32,
        learning_rate=3e-3 if options.model is None else 2e-5,
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    techniques=[Budget("3epochs"), LengthGrouped(), LatestWeightAveraging()],
)
trainer.train()
print(trainer.evaluate())
