"""How fast `Deduplicate` is and what it finds: near-duplicates planted among texts, on two cores.

Texts are of words with Zipf's frequencies, 40 to 400 of them.  A tenth of the texts are copies of others with words
replaced, dropped or added, whose Jaccard similarity, computed here from sets of 5-grams of words, is at least 0.9; as
many are decoys, for which it lies between 0.4 and 0.7.  Found is a planted pair of which one is left out; falsely
found is any other text that is left out.

    python benchmarks/deduplicate.py [--examples 200000] [--out docs/evidence/deduplicate.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import numpy as np

from hf_accel import Deduplicate

VOCABULARY, NGRAM = 50_000, 5
WORDS = np.array([f"w{i}" for i in range(VOCABULARY)])


def similarity(a: list[int], b: list[int]) -> float:
    """Jaccard, of the sets of n-grams."""
    first, second = ({tuple(x[i : i + NGRAM]) for i in range(len(x) - NGRAM + 1)} for x in (a, b))
    return len(first & second) / len(first | second)


def rewritten(text: list[int], edits: range, low: float, high: float, draw: np.random.Generator) -> list[int]:
    """A copy with some words replaced, dropped or added whose similarity lies in [low, high]."""
    while True:
        copy = list(text)
        for _ in range(draw.integers(edits.start, edits.stop)):
            at, word = int(draw.integers(len(copy))), int(draw.integers(VOCABULARY))
            at = draw.choice([at, 0, len(copy) - 1])
            copy[at : at + draw.integers(2)] = [word] * draw.integers(2)
        if low <= similarity(text, copy) <= high and copy != text:
            return copy


def texts(number: int, draw: np.random.Generator) -> tuple[list[str], list[tuple[int, int]], set[int]]:
    """Texts in random order, the pairs that are near-duplicates, and the decoys."""
    weights = 1 / np.arange(1, VOCABULARY + 1)
    bounds = np.cumsum(weights / weights.sum())
    planted = number // 10
    lengths = np.clip(draw.lognormal(np.log(120), 0.5, number - 2 * planted), 40, 400).astype(int)
    words = np.searchsorted(bounds, draw.random(lengths.sum())).clip(max=VOCABULARY - 1)
    rows = [row.tolist() for row in np.split(words, np.cumsum(lengths)[:-1])]
    sources = draw.permutation(len(rows))[: 2 * planted].tolist()
    copies = [rewritten(rows[i], range(1, 5), 0.9, 1.0, draw) for i in sources[:planted]]
    decoys = [
        rewritten(rows[i], range(len(rows[i]) // 12, len(rows[i]) // 6), 0.4, 0.7, draw) for i in sources[planted:]
    ]
    pairs = [(i, len(rows) + k) for k, i in enumerate(sources[:planted])]
    first_decoy = len(rows) + planted
    place = draw.permutation(number).tolist()
    shuffled = [""] * number
    for i, row in enumerate([*rows, *copies, *decoys]):
        shuffled[place[i]] = " ".join(WORDS[row])
    return shuffled, [(place[a], place[b]) for a, b in pairs], {place[i] for i in range(first_decoy, number)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=200_000)
    parser.add_argument("--out", default="docs/evidence/deduplicate.json")
    options = parser.parse_args()
    rows, pairs, decoys = texts(options.examples, np.random.default_rng(0))
    dataset = datasets.Dataset.from_dict({"text": rows})
    technique = Deduplicate(column="text", ngram=NGRAM)
    arguments = SimpleNamespace(disable_tqdm=False)
    technique.run_ = SimpleNamespace(args=arguments, is_world_process_zero=lambda: True)
    began, worked = time.perf_counter(), time.process_time()
    kept = np.zeros(len(rows), dtype=bool)
    kept[technique.choose(dataset).numpy()] = True
    seconds, processor_seconds = time.perf_counter() - began, time.process_time() - worked
    found = sum(not (kept[a] and kept[b]) for a, b in pairs)
    in_pairs = {i for pair in pairs for i in pair}
    others = [i for i in range(len(rows)) if i not in in_pairs]
    record = {
        "what": "Deduplicate on texts with planted near-duplicates (Jaccard >= 0.9) and decoys (0.4 to 0.7)",
        "texts": len(rows),
        "words": sum(row.count(" ") + 1 for row in rows),
        "threshold": technique.threshold,
        "ngram": technique.ngram,
        "planted": len(pairs),
        "found": found,
        "recall": found / len(pairs),
        "decoys": len(decoys),
        "decoys_left_out": sum(not kept[i] for i in decoys),
        "falsely_left_out": sum(not kept[i] for i in others),
        "false_positive_share": sum(not kept[i] for i in others) / len(others),
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor_seconds, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": round(os.getloadavg()[0], 1),
        "versions": {"numpy": np.__version__, "datasets": datasets.__version__},
    }
    Path(options.out).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
