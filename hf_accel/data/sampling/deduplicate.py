"""Leave out examples that repeat an earlier one, exactly or nearly.

Repeated examples cost steps and teach little.  An example is the set S of its shingles, which are runs of ``ngram``
tokens: token ids, or the lower-cased words of a text.  Scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer,
Burmese, Tibetan) are split into characters.  The similarity of two examples is

    J = |S_1 and S_2| / |S_1 or S_2|          (Jaccard)

An example is left out if J >= ``threshold`` with an earlier one that is kept; ``threshold=1`` requires equality of all
tokens.  MinHash finds the pairs to compare: two examples have the same smallest hash of their shingles with probability
J.  There are P = 128 such hashes in bands of r.  The search uses the largest r that finds a pair at the threshold with
probability 1 - (1 - J^r)^(P/r) >= 0.99.  Every pair found is then compared exactly, so no example below the threshold
is left out, and few above it are missed.

Recommendation: Use Deduplicate on text from the web or from several sources, before any other selection of examples.
When to use: text from the web or from several sources.
When not to use:
- Intended repeats, such as oversampling, or templates in which one word decides the label.
- Data without duplicates, where it only costs the search.
Differences from the paper:
- Lee et al. use 9,000 hashes, also require a high edit similarity, and keep one example of each cluster of duplicates.
- They split all texts at spaces.
References: Broder (1997), On the resemblance and containment of documents,
https://doi.org/10.1109/SEQUEN.1997.666900; Lee et al. (2022), Deduplicating Training Data Makes Language Models Better,
https://arxiv.org/abs/2107.06499.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated, Any, ClassVar

import annotated_types as at
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from hf_accel.features.columns import column_chunks
from hf_accel.features.static_subset import StaticSubset, rows_of
from hf_accel.technique import Technique

# MinHash is a dozen lines here (`band_keys`).  With rensa 0.5 instead, the whole search takes 1.8 times the CPU seconds
# on banking77, 1.3 times on sst2, and 0.8 times on texts of 130 words.  With datasketch 2.0, it takes 30 times as many.
HASHES = 128
RECALL = 0.99
ROWS = 2_000
"""Examples hashed at once; their hashes stay in the processor's cache."""
ODD = np.uint64(0x9E3779B97F4A7C15)
UNSPACED = "".join(rf"\p{{{name}}}" for name in "Han Hiragana Katakana Thai Lao Khmer Myanmar Tibetan".split())
Hashes = NDArray[np.uint64]
Borders = NDArray[np.int64]
"""Where each example begins, and where the last one ends."""


def mixed(values: Hashes) -> Hashes:
    """Permute 64-bit numbers so that no pattern is left (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def words_of(texts: pa.Array) -> pa.Array:
    """Split texts into lower-cased words, and scripts without spaces into characters."""
    texts = pc.call_function("utf8_lower", [texts])
    spaced = pc.ReplaceSubstringOptions(f"([{UNSPACED}])", r" \1 ")
    texts = pc.call_function("replace_substring_regex", [texts], spaced)
    texts = pc.call_function("utf8_trim_whitespace", [texts])
    texts = pc.call_function("if_else", [pc.call_function("equal", [texts, ""]), pa.scalar(None, texts.type), texts])
    return pc.call_function("utf8_split_whitespace", [texts])


def tokens_of(chunk: pa.Array, asking: Technique) -> tuple[Hashes, Borders]:
    """Hash the tokens of examples, end to end."""
    if pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type):
        chunk = words_of(chunk)
        words = chunk.flatten().dictionary_encode()
        digests = [blake2b(word.encode(), digest_size=8).digest() for word in words.dictionary.to_pylist()]
        tokens = np.frombuffer(b"".join(digests), dtype=np.uint64)[words.indices.to_numpy()]
    elif pa.types.is_nested(chunk.type) and pa.types.is_integer(chunk.type.value_type):
        tokens = chunk.flatten().to_numpy().astype(np.int64).view(np.uint64)
    else:
        raise ValueError(f"{asking!r}: the column holds {chunk.type}. Name one of text or of token ids.")
    lengths = pc.call_function("list_value_length", [chunk]).fill_null(0).to_numpy()
    return mixed(tokens + np.uint64(1)), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def shingles_of(tokens: Hashes, borders: Borders, ngram: int) -> tuple[Hashes, Borders]:
    """Hash the runs of ``ngram`` tokens, end to end; an example with fewer tokens has one run."""
    counts = np.maximum(np.diff(borders) - ngram + 1, 1)
    starts = np.concatenate([[0], np.cumsum(counts)])
    first = np.arange(starts[-1]) + np.repeat(borders[:-1] - starts[:-1], counts)
    end = np.repeat(borders[1:], counts)
    padded = np.concatenate([tokens, np.zeros(ngram, dtype=np.uint64)])
    hashes = np.zeros(len(first), dtype=np.uint64)
    for j in range(ngram):
        hashes = hashes * ODD + np.where(first + j < end, padded[first + j], np.uint64(0))
    return mixed(hashes), starts


def digests_of(tokens: Hashes, borders: Borders) -> Hashes:
    """Hash whole examples."""
    lengths = np.diff(borders)
    positions = np.arange(len(tokens)) - np.repeat(borders[:-1], lengths)
    sums = np.concatenate([[np.uint64(0)], np.cumsum(mixed(tokens + mixed(positions.astype(np.uint64))))])
    return sums[borders[1:]] - sums[borders[:-1]] + mixed(lengths.astype(np.uint64))


def rows_per_band(threshold: float) -> int:
    """Return the largest number of hashes per band that finds a pair at the threshold with the wanted probability."""
    found = [r for r in range(1, HASHES + 1) if 1 - (1 - threshold**r) ** (HASHES // r) >= RECALL]
    return max(found, default=1)


def band_keys(hashes: Hashes, borders: Borders, rows: int) -> Hashes:
    """Return a key for each band of each example, (bands, examples); equal if all MinHashes of the band are."""
    generator = np.random.Generator(np.random.PCG64(1))
    factors = generator.integers(2**63, size=HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    shifts = generator.integers(2**63, size=HASHES, dtype=np.uint64)
    keys = np.zeros((HASHES // rows, len(borders) - 1), dtype=np.uint64)
    hashed = np.empty_like(hashes)
    for band, key in enumerate(keys):
        for i in range(band * rows, (band + 1) * rows):
            np.multiply(hashes, factors[i], out=hashed)
            np.add(hashed, shifts[i], out=hashed)
            key *= ODD
            key += np.minimum.reduceat(hashed, borders[:-1]) >> np.uint64(32)
    return mixed(keys)


def equal_pairs(keys: Hashes, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pair ids with equal keys (smaller first): each with the first of its group and with the one before it."""
    order = np.argsort(keys, kind="stable")
    keys, ids = keys[order], ids[order]
    same = keys[1:] == keys[:-1]
    leader = np.maximum.accumulate(np.where(np.concatenate([[True], ~same]), np.arange(len(keys)), 0))
    later = same.nonzero()[0] + 1
    pairs = np.concatenate([np.stack([ids[leader[later]], ids[later]], 1), np.stack([ids[later - 1], ids[later]], 1)])
    return np.unique(pairs, axis=0)


def jaccard(a: Hashes, b: Hashes) -> float:
    """Return the similarity of two sets, given as sorted arrays."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


@dataclass(eq=False)
class Deduplicate(StaticSubset):
    """Leaves out examples that are equal or similar to an earlier one.

    Args:
        column: Column of the training set to compare: token ids, or text.
        threshold: Jaccard similarity, in (0, 1], from which two examples count as duplicates; 1: equality of tokens.
        ngram: Tokens per shingle, at least 1.
    """

    column: str = "input_ids"  # as tokenizers name it
    threshold: Annotated[float, at.Interval(gt=0, le=1)] = 0.8  # Lee et al. (2022)
    ngram: Annotated[int, at.Ge(1)] = 5  # Lee et al. (2022)
    fidelity: ClassVar = "lossy"
    variations: ClassVar = {"column": "text"}
    counters: ClassVar = (*StaticSubset.counters, "equal", "alike")

    def choose(self, dataset: Any) -> Tensor:
        """Return the ids of the first of each group of duplicates."""
        rows = rows_per_band(self.threshold)
        digests, keys = [], []
        for tokens, borders in self._read(dataset, "hash"):
            digests.append(digests_of(tokens, borders))
            if self.threshold < 1:
                keys.append(band_keys(*shingles_of(tokens, borders, self.ngram), rows))
        ids = np.unique(np.concatenate(digests), return_index=True)[1]
        ids.sort()
        self.equal_ = len(dataset) - len(ids)
        kept = np.zeros(len(dataset), dtype=bool)
        kept[ids] = True
        if self.threshold < 1:
            pairs = np.unique(np.concatenate([equal_pairs(band[ids], ids) for band in np.concatenate(keys, 1)]), axis=0)
            similar = self._similar(dataset, pairs)
            for earlier, later in similar[np.lexsort((similar[:, 0], similar[:, 1]))]:
                kept[later] &= not kept[earlier]
        self.alike_ = len(ids) - int(kept.sum())
        return torch.from_numpy(kept.nonzero()[0])

    def _similar(self, dataset: Any, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the pairs whose similarity reaches the threshold."""
        ids, sets = np.unique(pairs), []
        if len(ids):
            for tokens, borders in self._read(rows_of(dataset, torch.from_numpy(ids)), "compare"):
                hashes, starts = shingles_of(tokens, borders, self.ngram)
                sets += map(np.unique, np.split(hashes, starts[1:-1]))
        reached = [jaccard(sets[a], sets[b]) >= self.threshold for a, b in np.searchsorted(ids, pairs)]
        return pairs[np.array(reached, dtype=bool)]

    def _read(self, dataset: Any, purpose: str) -> Iterator[tuple[Hashes, Borders]]:
        run: Any = self.run_
        quiet = run.args.disable_tqdm or not run.is_world_process_zero()
        with tqdm(total=len(dataset), desc=f"Deduplicate: {purpose}", disable=quiet) as bar:
            for chunk in column_chunks(dataset, self.column, self, ROWS):
                yield tokens_of(chunk, self)
                bar.update(len(chunk))

    def report(self) -> Mapping[str, Any]:
        """Report the share of kept examples, how many equaled an earlier one, and how many were only similar."""
        return {**super().report(), "equal": self.equal_, "alike": self.alike_}
