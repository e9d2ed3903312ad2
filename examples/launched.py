"""A script with options, for one process or many.

python examples/launched.py --learning_rate 3e-3 --budget 3epochs --techniques "InfoBatch(keep=0.8)"
accelerate launch --config_file configs/accelerate/fsdp2.yaml examples/launched.py --budget 30min
accelerate launch --config_file configs/accelerate/zero2.yaml examples/launched.py --recipe recipe.yaml --bf16
torchrun --nproc_per_node 8 examples/launched.py --deepspeed configs/deepspeed/zero3.json --bf16

Needs: pip install -c constraints.txt -e .
"""

import random

from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from hf_accel import AccelArguments, AccelTrainer

accel, args = HfArgumentParser((AccelArguments, TrainingArguments)).parse_args_into_dataclasses()
set_seed(args.seed)
sums = [f"{a:2}+{b:2}={a + b:2}".encode() for a in range(30) for b in range(30)]
random.Random(0).shuffle(sums)
examples = [{"input_ids": list(text), "labels": list(text)} for text in sums]
config = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=8,
)
trainer = AccelTrainer(
    model=LlamaForCausalLM(config),
    args=args,
    train_dataset=examples[:800],
    eval_dataset=examples[800:],
    **accel.for_trainer(),
)
trainer.train()
print(trainer.evaluate())
