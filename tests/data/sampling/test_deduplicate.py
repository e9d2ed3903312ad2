import random

import datasets
import numpy as np
import pyarrow as pa
import pytest

from hf_accel.data.sampling.deduplicate import HASHES, Deduplicate, rows_per_band, tokens_of
from hf_accel.testing import tiny_trainer


def shingles(tokens, ngram):
    return {tuple(tokens[i : i + ngram]) for i in range(max(len(tokens) - ngram + 1, 1))}


def similarity(a, b, ngram):
    a, b = shingles(a, ngram), shingles(b, ngram)
    return len(a & b) / len(a | b)


def by_hand(rows, threshold, ngram):
    """Greedy, over all pairs."""
    kept = []
    for i, row in enumerate(rows):
        if threshold == 1:
            alike = any(rows[j] == row for j in kept)
        else:
            alike = any(similarity(rows[j], row, ngram) >= threshold for j in kept)
        if not alike:
            kept.append(i)
    return kept


def planted(draw, number=120, words=40, vocabulary=300):
    """Random texts, of which every third is a copy of an earlier one, as it is or with some words changed."""
    rows = []
    for i in range(number):
        row = [draw.randrange(vocabulary) for _ in range(draw.randrange(words // 2, words))]
        if i and i % 3 == 0:
            row = list(draw.choice(rows))
            for _ in range(draw.choice([0, 1, 1, 3, 8])):
                row[draw.randrange(len(row))] = draw.randrange(vocabulary)
        rows.append(row)
    return rows


def kept(tmp_path, table, **fields):
    technique = Deduplicate(**fields)
    tiny_trainer([technique], tmp_path)
    chosen = technique.prepare_dataset(table)
    assert len(chosen) == len(technique.ids_N_)
    return technique.ids_N_.tolist(), technique.report()


@pytest.mark.parametrize(("threshold", "ngram"), [(1.0, 5), (0.8, 3), (0.5, 2), (0.9, 1)])
def test_what_is_kept_is_that_of_brute_force(threshold, ngram, tmp_path):
    """Pairs far above the threshold are found for certain, and nothing below it is left out."""
    rows = planted(random.Random(3))
    rows += [[], [7], [7], [7, 8], []]
    ids, report = kept(tmp_path, datasets.Dataset.from_dict({"input_ids": rows}), threshold=threshold, ngram=ngram)
    assert ids == by_hand(rows, threshold, ngram)
    assert report["examples"] == len(ids) and report["equal"] == len(rows) - len(by_hand(rows, 1, ngram))
    assert report["equal"] + report["alike"] + len(ids) == len(rows)


def test_text_is_compared_by_its_words(tmp_path):
    texts = ["The cat  sat on\nthe mat", "the CAT sat on the mat", "a dog sat on the mat", "", "word", "word"]
    table = datasets.Dataset.from_dict({"text": texts, "n": range(6)})
    assert kept(tmp_path, table, column="text", threshold=1.0)[0] == [0, 2, 3, 4]
    assert kept(tmp_path, [{"text": text} for text in texts], column="text", threshold=1.0)[0] == [0, 2, 3, 4]
    assert kept(tmp_path, table, column="text", threshold=0.5, ngram=1)[0] == [0, 3, 4]  # 4 of 7 words


def test_all_ways_to_hold_tokens_are_alike():
    rows = [[1, 2, 3], [], [4]]
    technique = Deduplicate()
    tokens, borders = tokens_of(pa.array(rows), technique)
    assert borders.tolist() == [0, 3, 3, 4]
    for kind in (pa.list_(pa.int32()), pa.large_list(pa.int64())):
        assert np.array_equal(tokens_of(pa.array(rows, kind), technique)[0], tokens)
    fixed = tokens_of(pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2)), technique)
    joined = tokens_of(pa.array([[1, 2, 3, 4]]), technique)
    assert fixed[1].tolist() == [0, 2, 4] and np.array_equal(fixed[0], joined[0])
    sliced = tokens_of(pa.array([[9, 9], *rows])[1:], technique)
    assert np.array_equal(sliced[0], tokens) and sliced[1].tolist() == borders.tolist()


def test_where_nothing_is_alike_all_is_kept_and_a_bar_shows_the_search(tmp_path, capfd):
    rows = [[5 * i + k for k in range(5)] for i in range(20)]
    technique = Deduplicate()
    tiny_trainer([technique], tmp_path, disable_tqdm=False)
    table = datasets.Dataset.from_dict({"input_ids": rows})
    assert technique.prepare_dataset(table) is table
    assert technique.report() == {"kept": 1.0, "examples": 20, "equal": 0, "alike": 0}
    assert "Deduplicate: hash: 100%" in capfd.readouterr().err


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95])
def test_a_pair_at_the_threshold_is_found_with_the_promised_probability(threshold):
    rows = rows_per_band(threshold)
    bands = HASHES // rows
    assert 1 - (1 - threshold**rows) ** bands >= 0.99
    assert 1 - (1 - threshold ** (rows + 1)) ** (HASHES // (rows + 1)) < 0.99


def test_planted_near_duplicates_are_found(tmp_path):
    draw = random.Random(0)
    originals = [[draw.randrange(5000) for _ in range(80)] for _ in range(1500)]
    copies = []
    for row in originals:
        copy = list(row)
        copy[draw.choice([0, -1])] = 5000  # two of 77 different shingles: J = 75 / 77
        copies.append(copy)
    ids, report = kept(tmp_path, datasets.Dataset.from_dict({"input_ids": originals + copies}))
    assert all(i in ids for i in range(1500))
    assert report["alike"] >= 0.99 * 1500


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"column": "body"}, "no column 'body', only 'input_ids', 'x'"),
        ({"column": "x"}, "double. Name one of text"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(fields, sentence, tmp_path):
    with pytest.raises(ValueError, match=f"Deduplicate.*{sentence}"):
        kept(tmp_path, datasets.Dataset.from_dict({"input_ids": [[1]], "x": [0.5]}), **fields)


@pytest.mark.parametrize("fields", [{"threshold": 0.0}, {"ngram": 0}])
def test_a_bad_value_names_itself(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"Deduplicate\\({name}="):
        Deduplicate(**fields)


def characters(text, ngram=5):
    return {text[i : i + ngram] for i in range(len(text) - ngram + 1)}


UNSPACED = {
    "Chinese": (
        "小猫睡在旧门旁温暖的垫子上鸟儿在高高的树上唱歌雨水落在屋顶上孩子们在院子里玩耍老人们坐在长椅上聊天",
        "了",
        "吧",
    ),
    "Japanese": (
        "小さな猫は古い扉のそばの暖かい敷物の上で眠り鳥は高い木の上で歌い雨は屋根の上に降りカメラで遊んでいる",
        "よ",
        "ね",
    ),
    "Thai": ("แมวตัวเล็กนอนหลับบนเสื่ออุ่นใกล้ประตูเก่าและนกร้องเพลงบนต้นไม้สูงขณะที่ฝนตกบนหลังคา", "นะ", "ค่ะ"),
    "Khmer": ("ឆ្មាតូចដេកលើកន្ទេលក្តៅក្បែរទ្វារចាស់ហើយបក្សីច្រៀងនៅលើដើមឈើខ្ពស់", "ណា", "ហើយ"),
}


@pytest.mark.parametrize("script", UNSPACED)
def test_scripts_without_spaces_are_compared_by_their_characters(script, tmp_path):
    start, one, other = UNSPACED[script]
    first, second = characters(start + one), characters(start + other)
    similar = len(first & second) / len(first | second)
    assert 0.8 < similar < 1
    unlike = start[::-1]
    table = datasets.Dataset.from_dict({"text": [start + one, start + other, unlike, start + one]})
    assert kept(tmp_path, table, column="text", threshold=similar)[0] == [0, 2]
    assert kept(tmp_path, table, column="text", threshold=similar + 0.001)[0] == [0, 1, 2]
    assert kept(tmp_path, table, column="text", threshold=1.0)[0] == [0, 1, 2]


def test_words_and_characters_of_a_mixed_text_are_tokens(tmp_path):
    mixed = ["GPU 版本 is new", "gpu版本is new", "gpu 版 本 is new", "gpu 本版 is new"]
    table = datasets.Dataset.from_dict({"text": mixed})
    assert kept(tmp_path, table, column="text", threshold=1.0)[0] == [0, 3]
    korean = datasets.Dataset.from_dict({"text": ["고양이가 잔다", "고양이가잔다"]})
    assert kept(tmp_path, korean, column="text", threshold=1.0)[0] == [0, 1], "Korean has spaces"


@pytest.mark.parametrize("threshold", [1.0, 0.8])
def test_a_threshold_of_one_is_equality_of_tokens(threshold, tmp_path):
    texts = ["a b c d e", "a b c d e\n", "\ta  b c d e ", "a b c d f", "", None, "  ", "e d c b a"]
    table = datasets.Dataset.from_dict({"text": texts})
    assert kept(tmp_path, table, column="text", threshold=threshold)[0] == [0, 3, 4, 7]
    # These two words have the same CRC-32.
    words = datasets.Dataset.from_dict({"text": ["plumless", "buckeroo"]})
    assert kept(tmp_path, words, column="text", threshold=threshold)[0] == [0, 1]
