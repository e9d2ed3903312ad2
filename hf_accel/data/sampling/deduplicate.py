"""Deduplicate: leave out examples that say what an earlier one says, word for word or nearly.

A repeated example costs a step and teaches little.  An example is the set S of its shingles, each a run of ``ngram``
tokens (lower-cased words of a text, or token ids), and two examples are alike by

    J = |S_1 and S_2| / |S_1 or S_2|          (Jaccard)

An example is left out where J >= ``threshold`` with an earlier one that is kept; ``threshold=1`` leaves out those whose
tokens are equal.  Pairs to compare are found by MinHash: two examples agree on the smallest hash of their shingles with
probability J.  Of P = 128 such hashes, bands of r are compared, with the largest r that finds a pair at the threshold
with probability 1 - (1 - J^r)^(P/r) >= 0.99; every pair that is found is then compared exactly.  So nothing is left out
below the threshold, and little above it is missed.

Reference: Broder (1997), On the resemblance and containment of documents,
https://doi.org/10.1109/SEQUEN.1997.666900; Lee et al. (2022), Deduplicating Training Data Makes Language Models Better,
https://arxiv.org/abs/2107.06499 (5-grams, threshold 0.8).

When to use: text from the web or from several sources; before any other choice of examples.
When not to use: repeats that are meant (oversampling, templates of which the differing word is the label).  Where no
example is a duplicate, it only costs the search.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import annotated_types as at
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from hf_accel.data.sampling.static_subset import StaticSubset, rows_of
from hf_accel.features.columns import column_chunks
from hf_accel.technique import Technique

HASHES = 128
RECALL = 0.99
ROWS = 2_000
"""Examples that are hashed at once; their hashes stay in the processor's cache."""
ODD = np.uint64(0x9E3779B97F4A7C15)
Hashes = NDArray[np.uint64]


class Shingles(NamedTuple):
    """The hashed shingles of some examples, one after another."""

    hashes: Hashes
    starts: NDArray[np.int64]
    """Where each example's shingles begin; each has at least one."""


def mixed(values: Hashes) -> Hashes:
    """A permutation of 64-bit numbers that leaves no pattern (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def tokens_of(chunk: pa.Array, asking: Technique) -> tuple[Hashes, NDArray[np.int64]]:
    """Hashed tokens of examples, end to end, and the borders between examples."""
    if pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type):
        chunk = pc.call_function("utf8_split_whitespace", [pc.call_function("utf8_lower", [chunk])])
        words = chunk.flatten().dictionary_encode()
        hashes = [zlib.crc32(word.encode()) for word in words.dictionary.to_pylist()]
        tokens = np.array(hashes, dtype=np.uint64)[words.indices.to_numpy()]
    elif pa.types.is_nested(chunk.type) and pa.types.is_integer(chunk.type.value_type):
        tokens = chunk.flatten().to_numpy().astype(np.int64).view(np.uint64)
    else:
        raise ValueError(f"{asking!r}: the column holds {chunk.type}. Name one of text or of token ids.")
    lengths = pc.call_function("list_value_length", [chunk]).fill_null(0).to_numpy()
    return mixed(tokens + np.uint64(1)), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def shingles_of(tokens: Hashes, borders: NDArray[np.int64], ngram: int) -> Shingles:
    """Runs of ``ngram`` tokens; of an example with fewer, the one run that it has."""
    lengths = np.diff(borders)
    counts = np.maximum(lengths - ngram + 1, 1)
    starts = np.concatenate([[0], np.cumsum(counts)])
    first = np.arange(starts[-1]) + np.repeat(borders[:-1] - starts[:-1], counts)
    end = np.repeat(borders[1:], counts)
    padded = np.concatenate([tokens, np.zeros(ngram, dtype=np.uint64)])
    hashes = np.zeros(len(first), dtype=np.uint64)
    for j in range(ngram):
        token = np.where(first + j < end, padded[first + j], np.uint64(0))
        hashes = hashes * ODD + token
    return Shingles(mixed(hashes), starts[:-1])


def rows_per_band(threshold: float) -> int:
    """The largest number of hashes a band that finds a pair at the threshold with the wanted probability."""
    found = [r for r in range(1, HASHES + 1) if 1 - (1 - threshold**r) ** (HASHES // r) >= RECALL]
    return max(found, default=1)


def band_keys(shingles: Shingles, rows: int) -> Hashes:
    """A key for each band of each example, (bands, examples): equal where all MinHashes of the band are."""
    generator = np.random.Generator(np.random.PCG64(1))
    factors = generator.integers(2**63, size=HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    shifts = generator.integers(2**63, size=HASHES, dtype=np.uint64)
    keys = np.zeros((HASHES // rows, len(shingles.starts)), dtype=np.uint64)
    hashed = np.empty_like(shingles.hashes)
    for band, key in enumerate(keys):
        for i in range(band * rows, (band + 1) * rows):
            np.multiply(shingles.hashes, factors[i], out=hashed)
            np.add(hashed, shifts[i], out=hashed)
            key *= ODD
            key += np.minimum.reduceat(hashed, shingles.starts) >> np.uint64(32)
    return mixed(keys)


def digests_of(tokens: Hashes, borders: NDArray[np.int64]) -> Hashes:
    """A number for each example, equal where all its tokens are."""
    lengths = np.diff(borders)
    positions = np.arange(len(tokens)) - np.repeat(borders[:-1], lengths)
    sums = np.concatenate([[np.uint64(0)], np.cumsum(mixed(tokens + mixed(positions.astype(np.uint64))))])
    return sums[borders[1:]] - sums[borders[:-1]] + mixed(lengths.astype(np.uint64))


def equal_pairs(keys: Hashes, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pairs of ids (smaller first) with equal keys: each with the first of its group and with the one before it."""
    order = np.argsort(keys, kind="stable")
    keys, ids = keys[order], ids[order]
    same = keys[1:] == keys[:-1]
    leader = np.maximum.accumulate(np.where(np.concatenate([[True], ~same]), np.arange(len(keys)), 0))
    later = same.nonzero()[0] + 1
    pairs = np.concatenate([np.stack([ids[leader[later]], ids[later]], 1), np.stack([ids[later - 1], ids[later]], 1)])
    return np.unique(pairs, axis=0)


def without_duplicates(pairs: NDArray[np.int64], num_examples: int) -> NDArray[np.bool_]:
    """Which examples are kept: all but those that are alike to an earlier one that is kept."""
    kept = np.ones(num_examples, dtype=bool)
    for earlier, later in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]:
        if kept[earlier]:
            kept[later] = False
    return kept


def jaccard(a: Hashes, b: Hashes) -> float:
    """Of two sets, as sorted arrays."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


@dataclass(eq=False)
class Deduplicate(StaticSubset):
    """Trains on examples of which no two are alike.

    Args:
        column: The column of the training set that is compared: token ids, or text.
        threshold: Jaccard similarity, in (0, 1], from which two examples are alike; 1: only where all tokens are equal.
        ngram: Tokens of a shingle, at least 1.
    """

    column: str = "input_ids"
    threshold: Annotated[float, at.Interval(gt=0, le=1)] = 0.8
    ngram: Annotated[int, at.Ge(1)] = 5
    fidelity: ClassVar = "lossy"
    variations: ClassVar = {"column": "text"}
    counters: ClassVar = (*StaticSubset.counters, "equal", "alike")

    def choose(self, dataset: Any) -> Tensor:
        """The first of those that are alike."""
        rows = rows_per_band(self.threshold)
        digests, keys = [], []
        for tokens, borders in self._read(dataset, "hash"):
            digests.append(digests_of(tokens, borders))
            if self.threshold < 1:
                keys.append(band_keys(shingles_of(tokens, borders, self.ngram), rows))
        kept = np.unique(np.concatenate(digests), return_index=True)[1]
        kept.sort()
        self.equal_ = len(dataset) - len(kept)
        if self.threshold < 1:
            pairs = [equal_pairs(band[kept], kept) for band in np.concatenate(keys, 1)]
            alike = self._alike(dataset, np.unique(np.concatenate(pairs), axis=0))
            kept = kept[without_duplicates(alike, len(dataset))[kept]]
        self.alike_ = len(dataset) - self.equal_ - len(kept)
        return torch.from_numpy(kept)

    def _alike(self, dataset: Any, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of some pairs whose similarity reaches the threshold."""
        ids = np.unique(pairs)
        sets: dict[int, Hashes] = {}
        if len(ids):
            found = (
                np.unique(hashes)
                for tokens, borders in self._read(rows_of(dataset, torch.from_numpy(ids)), "compare")
                for hashes in np.split(*_split(shingles_of(tokens, borders, self.ngram)))
            )
            sets = dict(zip(ids.tolist(), found, strict=True))
        reached = [jaccard(sets[a], sets[b]) >= self.threshold for a, b in pairs.tolist()]
        return pairs[np.array(reached, dtype=bool)]

    def _read(self, dataset: Any, purpose: str) -> Iterator[tuple[Hashes, NDArray[np.int64]]]:
        run: Any = self.run_
        quiet = run.args.disable_tqdm or not run.is_world_process_zero()
        with tqdm(total=len(dataset), desc=f"Deduplicate: {purpose}", disable=quiet) as bar:
            for chunk in column_chunks(dataset, self.column, self, ROWS):
                yield tokens_of(chunk, self)
                bar.update(len(chunk))

    def report(self) -> Mapping[str, Any]:
        """The share of the examples that is kept; how many were equal to an earlier one, and how many only alike."""
        return {**super().report(), "equal": self.equal_, "alike": self.alike_}


def _split(shingles: Shingles) -> tuple[Hashes, NDArray[np.int64]]:
    return shingles.hashes, shingles.starts[1:]
