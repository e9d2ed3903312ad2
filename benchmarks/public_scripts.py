"""Public scripts, unmodified: plain ``python`` and ``hf-accel run`` without a recipe give the same bits; with one they
train with its techniques.

    python benchmarks/public_scripts.py FOLDER DATA [--record docs/evidence/public-scripts.json]

FOLDER holds run_clm.py, run_mlm.py and run_glue.py of transformers' examples, and ``accuracy/accuracy.py`` and
``glue/glue.py``, local metrics for their ``evaluate.load``; TRL's script is that of the installed package.  DATA is the
folder of data of the tests.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import transformers
import trl

COMMON = "--do_train --do_eval --per_device_train_batch_size 8 --num_train_epochs 1 --report_to none --seed 3 --use_cpu"
SCRIPTS = {
    "run_clm.py": (
        "--model_name_or_path {data}/pretrained/stories260K --train_file {work}/novel.txt --block_size 64 "
        "--validation_file {work}/novel.txt --max_train_samples 64 --max_eval_samples 16 " + COMMON,
        ["Packing()", "ExponentialMovingAverage(half_life=5)"],
    ),
    "run_mlm.py": (
        "--model_type bert --config_overrides hidden_size=32,num_hidden_layers=2,num_attention_heads=2,"
        "intermediate_size=64 --tokenizer_name {data}/tokenizer/bert-base-uncased --train_file {work}/novel.txt "
        "--validation_file {work}/novel.txt --line_by_line --max_seq_length 32 --max_train_samples 64 "
        "--max_eval_samples 16 " + COMMON,
        ["LengthGrouped()", "ExponentialMovingAverage(half_life=5)"],
    ),
    "run_glue.py": (
        "--model_name_or_path {work}/bert --train_file {work}/train.csv --validation_file {work}/validation.csv "
        "--max_seq_length 32 " + COMMON,
        ["InfoBatch(keep=0.5)", "LengthGrouped()"],
    ),
    str(Path(trl.__file__).parent / "scripts" / "sft.py"): (
        "--model_name_or_path {data}/pretrained/stories260K --dataset_name {work}/sft --max_length 128 "
        "--per_device_train_batch_size 8 --max_steps 8 --report_to none --seed 3 --use_cpu --bf16 false "
        "--gradient_checkpointing false --eval_strategy no",
        ["LengthGrouped()", "ExponentialMovingAverage(half_life=5)"],
    ),
}
"""Arguments and techniques by script."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        prepare(options.data.resolve(), Path(work))
        found = {}
        for script, (arguments, techniques) in SCRIPTS.items():
            told = arguments.format(data=options.data.resolve(), work=work)
            found[Path(script).name] = compare(options.folder.resolve(), script, told.split(), techniques, Path(work))
            print(Path(script).name, found[Path(script).name], flush=True)
    document = {
        "versions": {"transformers": transformers.__version__, "trl": trl.__version__},
        "scripts": found,
    }
    if options.record is not None:
        options.record.write_text(json.dumps(document, indent=1) + "\n")
    if not all(entry["bit_identical"] and entry["trained_with"] for entry in found.values()):
        sys.exit(1)


def prepare(data: Path, work: Path) -> None:
    """Small files of the kinds that the scripts read, and a model for those that want one."""
    with gzip.open(data / "lm" / "gutenberg_novels" / "validation.txt.gz", "rt", encoding="utf-8") as file:
        (work / "novel.txt").write_text(file.read(60_000), encoding="utf-8")
    for split, rows in (("train", 96), ("validation", 32)):
        table = pd.read_parquet(data / "text_cls" / "sst2" / f"{split}.parquet").head(rows)
        table.rename(columns={"text": "sentence"}).to_csv(work / f"{split}.csv", index=False)
    (work / "sft").mkdir()
    pd.read_parquet(data / "sft" / "gsm8k" / "train.parquet").head(64).to_parquet(work / "sft" / "train.parquet")
    tokenizer = transformers.AutoTokenizer.from_pretrained(data / "tokenizer" / "bert-base-uncased")
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    transformers.set_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(work / "bert")
    tokenizer.save_pretrained(work / "bert")


def compare(folder: Path, script: str, arguments: list[str], techniques: list[str], work: Path) -> dict:
    """Run a script three ways; whether two are the same bits, and what the receipt of the third names."""
    hosted = ["-m", "hf_accel.cli", "run"]
    attached = [part for technique in techniques for part in ("--technique", technique)]
    ways = {"plain": [], "empty": hosted, "techniques": [*hosted, *attached]}
    weights = {}
    for way, prefix in ways.items():
        out = work / f"{Path(script).stem}-{way}"
        command = [sys.executable, *prefix, script, *arguments, "--output_dir", str(out)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        weights[way] = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    receipt = json.loads((out / "receipt.json").read_text())
    return {
        "bit_identical": weights["plain"] == weights["empty"],
        "changed_by_techniques": weights["plain"] != weights["techniques"],
        "trained_with": [entry["technique"] for entry in receipt["techniques"]],
        "steps": receipt["steps"],
    }


if __name__ == "__main__":
    main()
