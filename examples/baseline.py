"""A plain Trainer: a small Llama learns to add.

Needs: pip install -c constraints.txt -e .
"""

import random

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

set_seed(0)
sums = [f"{a:2}+{b:2}={a + b:2}".encode() for a in range(30) for b in range(30)]
random.shuffle(sums)
examples = [{"input_ids": list(text), "labels": list(text)} for text in sums]
config = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=8,
)
args = TrainingArguments(
    per_device_train_batch_size=32,
    learning_rate=3e-3,
    eval_strategy="epoch",
    save_strategy="no",
    report_to="none",
)
trainer = Trainer(
    model=LlamaForCausalLM(config),
    args=args,
    train_dataset=examples[:800],
    eval_dataset=examples[800:],
)
trainer.train()
print(trainer.evaluate())
