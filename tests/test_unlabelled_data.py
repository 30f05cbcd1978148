"""Unlabelled rows made of text and of tasks."""

import random
from collections import Counter

import numpy as np
import pytest
from made_text import make_text

from modeling_snn_bert.unlabelled_data import (
    ALL_FUNCTION_WORDS,
    GROUP_OF,
    Corruption,
    UnlabelledRows,
    forms_of,
    nearest_by_tfidf,
    negation,
    passages_of,
    read_passages,
    usable_sentences,
)

SENTENCE = "the old fox walks to the river at night .".split()


@pytest.fixture
def corruption():
    return Corruption(word for words in usable_sentences(make_text(200)) for word in words)


def edited(corruption, name, sentence=SENTENCE):
    """The copies that an edit has made of a sentence in a hundred draws."""
    copies, rng = [], random.Random(0)
    for _ in range(100):
        copies.append(list(sentence))
        getattr(corruption, name)(copies[-1], rng.randrange(len(sentence) - 1), rng)
    assert all(copy[-1] == "." for copy in copies), "the full stop has moved"
    assert sum(copy != sentence for copy in copies) > 50
    return copies


@pytest.mark.parametrize("name", ["swap", "move"])
def test_edits_of_the_order(corruption, name):
    assert all(sorted(copy) == sorted(SENTENCE) for copy in edited(corruption, name))


@pytest.mark.parametrize("name, change", [("leave_out", -1), ("repeat", 1), ("put_in", 1)])
def test_edits_of_the_length(corruption, name, change):
    for copy in edited(corruption, name):
        assert len(copy) == len(SENTENCE) + change
        more, fewer = Counter(copy) - Counter(SENTENCE), Counter(SENTENCE) - Counter(copy)
        [word] = [*more, *fewer]
        assert word in (ALL_FUNCTION_WORDS if name == "put_in" else SENTENCE)


@pytest.mark.parametrize("name", ["inflect", "exchange", "replace"])
def test_edits_of_a_word(corruption, name):
    for copy in edited(corruption, name):
        changed = [(old, new) for old, new in zip(SENTENCE, copy, strict=True) if old != new]
        assert len(changed) <= 1
        for old, new in changed:
            if name == "inflect":
                assert old == "walks" and new in ("walk", "walked", "walking")
            elif name == "exchange":
                assert new in GROUP_OF[old]
            else:
                assert new in corruption.words


def test_a_copy_differs_always(corruption):
    # Of a text in which no word is frequent as well.
    assert all(Corruption(SENTENCE)(SENTENCE, random.Random(seed)) != SENTENCE for seed in range(100))
    rng = random.Random(0)
    for sentence in (SENTENCE, ["fox", "."], ["no", "fox", "."]):
        before = list(sentence)
        copies = [corruption(sentence, rng) for _ in range(300)]
        assert all(copy != sentence and copy[-1] == "." for copy in copies) and sentence == before
        assert len({tuple(copy) for copy in copies}) > 20


def test_forms():
    forms = forms_of(["walk", "walks", "walked", "fox", "foxes", "is", "his", "rivers", "river's", "bus"])
    assert forms["walk"] == ["walked", "walks"] and forms["foxes"] == ["fox"]
    # Too short for a stem, and a stem that is no word.
    assert not {"is", "his", "bus", "rivers", "river's"} & set(forms)


def test_usable_sentences():
    text = (
        "and the end of one. The fox's den was here.<br /><br />He said: it is late! Too short. "
        "No 1 of 22 or 333 or 4. A café is not plain ASCII. " + "Word " * 30 + "was too long. What was it then?"
    )
    assert [" ".join(words) for words in usable_sentences(text)] == [
        "the fox's den was here .",
        "he said : it is late !",
        "what was it then ?",
    ]


def test_more_edits_change_more(corruption):
    def changed(edits):
        rng = random.Random(0)
        copies = [corruption(SENTENCE, rng, edits) for _ in range(200)]
        return sum(sum((Counter(SENTENCE) - Counter(copy)).values()) for copy in copies) / len(copies)

    assert 0.3 < changed(1) < changed(3) < changed(6)


def test_negation():
    rng = random.Random(0)
    assert negation("it is not late .".split(), rng) == "it is late .".split()
    found = {tuple(negation("the fox was here and was old .".split(), rng)) for _ in range(20)}
    assert found == {tuple(f"the fox was {word} here and was old .".split()) for word in ("not", "never")}
    denied = negation(SENTENCE, rng)
    assert denied[-len(SENTENCE) :] == SENTENCE and denied[0] in ("it", "nobody")


def test_passages_are_consecutive_sentences():
    first, second = "The old fox walks to the river at night.", "Is it the dog of the boat and of the house?"
    fourth = "Nobody knew why the old clock had stopped."
    text = f"{first} {second} Short one. {fourth}<br />{first}"
    assert passages_of(text) == [[first, second], [fourth, first]]
    assert passages_of("Nothing. Here. " + "word " * 60) == []


def test_reading_passages(tmp_path):
    for name, word in (("a", "The"), ("b", "Every")):
        (tmp_path / f"{name}.txt").write_text(make_text(200).replace("The", word), encoding="utf-8")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    passages = read_passages(files, 61)
    sentences = [sentence for passage in passages for sentence in passage]
    # As many of each file; whole lines of two sentences, but for the last of a file.
    assert len(sentences) == 62 and all(len(passage) in (1, 2) for passage in passages)
    assert sum(passage[0].startswith("Every") for passage in passages) == len(passages) / 2
    assert passages == read_passages(files, 61) and passages != read_passages(files, 61, seed=1)
    (tmp_path / "b.txt").write_text("Too short.\n")
    with pytest.raises(ValueError, match=r"b\.txt has no sentences of 25 to 220 characters"):
        read_passages(files, 61)


def tfidf(texts):
    """Unit vectors by the definition: log counts, smoothed inverse document frequencies."""
    words = sorted({word for text in texts for word in text.split()})
    counts = np.array([[text.split().count(word) for word in words] for text in texts], dtype=float)
    weights = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0)
    weights *= np.log((1 + len(texts)) / (1 + (counts > 0).sum(0))) + 1
    return weights / np.linalg.norm(weights, axis=1, keepdims=True)


def test_nearest_by_tfidf():
    rng = random.Random(0)
    texts = [" ".join(rng.choices("the red fox and dog a of house clock river".split(), k=5)) for _ in range(60)]
    texts += ["nothing shares these", "alone"]
    likeness = tfidf(texts) @ tfidf(texts).T
    np.fill_diagonal(likeness, -1)
    for row, others in enumerate(nearest_by_tfidf(texts, 3)):
        assert len(others) == (3 if row < 60 else 0) and row not in others
        # Others may be as near as the third.
        np.testing.assert_allclose(likeness[row, others], np.sort(likeness[row])[::-1][: len(others)], atol=1e-6)
    # Fewer where there are fewer.
    assert nearest_by_tfidf(["the fox", "the dog", "clock"], 3) == [[1], [0], []]


def test_frequent_words_of_many_texts_do_not_count():
    rare = [f"the word{number // 2} stands here" for number in range(1200)]
    assert nearest_by_tfidf(rare, 3)[:4] == [[1], [0], [3], [2]]
    # Unless there are no others.
    nearest = nearest_by_tfidf(["the fox", "the dog"] * 600, 3)
    assert all(set(others) <= set(range(row % 2, 1200, 2)) for row, others in enumerate(nearest))
    assert all(len(others) == 3 for others in nearest)


PAIRS = [("the old fox is here .", "the fox is old ."), ("she reads all night !", "is it a film ?")] * 4
SINGLES = ["it rained all night .", "nobody knew why the clock stopped", "fox"]
PASSAGES = [
    ["The quick brown fox jumps over the lazy dog.", "It rained all night, and the river rose."],
    ["A long train of empty wagons crossed the bridge.", "Is this film worth seeing at noon?", "She was not here."],
]


@pytest.fixture
def rows(tokenizer):
    return UnlabelledRows(PASSAGES, SINGLES, PAIRS, tokenizer, 48, single_share=0.3)


def test_rows_are_tokenised_as_by_the_tokenizer(rows, tokenizer):
    for text, words in zip([s for passage in PASSAGES for s in passage], rows.sentences, strict=False):
        wanted = tokenizer(text, truncation=True, max_length=48)
        assert rows.tokenized(words) == dict(wanted)
        other = rows.sentences[1]
        assert rows.tokenized(other, words) == dict(tokenizer(" ".join(other), text, truncation=True, max_length=48))


@pytest.mark.parametrize(("first", "second"), [(40, 40), (3, 90), (90, 3), (22, 23), (1, 1)])
def test_long_pairs_are_cut_the_longer_text_first(rows, first, second):
    row = rows.tokenized(["fox"] * first, ["dog"] * second)
    fox, dog = (row["input_ids"].count(rows.pieces[word][0]) for word in ("fox", "dog"))
    assert len(row["input_ids"]) == min(48, first + second + 3) == fox + dog + 3
    assert min(fox, dog) >= min(first, second, 22) and fox <= first and dog <= second
    assert row["token_type_ids"] == [0] * (fox + 2) + [1] * (dog + 1)


def test_kinds_of_rows(rows):
    """Each kind gives what its name says, and different rows."""
    sentences, singles = list(map(tuple, rows.sentences)), list(map(tuple, rows.singles))
    rng = random.Random(0)
    drawn = {
        kind: [tuple(tuple(text) for text in getattr(rows, kind)(rng)) for _ in range(100)]
        for kind in [*rows.KINDS_OF_SINGLES, *rows.KINDS_OF_PAIRS]
    }
    for kind, found in drawn.items():
        assert all(len(row) == (1 if kind in rows.KINDS_OF_SINGLES else 2) for row in found)
        assert len(set(found)) > (1 if kind in ("single", "task_pair", "following") else 5), kind
    pairs = [(sentences[a], sentences[b]) for a, b in rows.task_pairs]
    assert len(pairs) == len(PAIRS) and set(drawn["task_pair"]) == set(pairs)
    assert {row[0] for row in drawn["single"]} == set(singles)
    assert {row[0] for row in drawn["sentence"]} <= set(sentences)
    assert not {row[0] for row in drawn["faulty_single"]} & set(singles)
    assert set(drawn["following"]) == {(sentences[a], sentences[a + 1]) for a in (0, 2, 3)}
    assert not set(drawn["faulty_task_pair"]) & set(pairs)
    for first, second in drawn["faulty"]:
        assert first != second and (first in sentences or second in sentences)
    for first, second in drawn["negated"]:
        assert abs(len(first) - len(second)) in (1, 3, 5)
    for first, second in drawn["near"]:
        a, b = sentences.index(first), sentences.index(second)
        near = {sentences[i] for i in rows.nearest[a]} | {sentences[i] for i in rows.nearest[b]}
        assert {first, second} & near or not (rows.nearest[a] and rows.nearest[b])
    exact = 0
    for whole, part in drawn["part"]:
        starts = range(len(whole) - len(part) + 1)
        exact += any(whole[start : start + len(part)] == part for start in starts)
    assert 30 < exact < 80


def test_what_there_is_nothing_for_is_not_drawn(tokenizer):
    def kinds(*data, share):
        rows = UnlabelledRows(*data, tokenizer, 32, single_share=share)
        rng = random.Random(0)
        drawn = [rows(rng) for _ in range(200)]
        pairs = sum(1 in row["token_type_ids"] for row in drawn)
        return {draw.__name__ for draw in (*rows._singles[0], *rows._pairs[0])}, pairs

    found, pairs = kinds([], SINGLES, [], share=1.0)
    assert {"single", "faulty_single"} <= found and not {"sentence", "task_pair", "following"} & found and pairs == 0
    found, pairs = kinds(PASSAGES, [], [], share=0.0)
    assert {"near", "following"} <= found and not {"single", "task_pair"} & found and pairs == 200
    found, pairs = kinds([["One sentence that is here alone."]], [], PAIRS, share=0.5)
    assert "task_pair" in found and "following" not in found and 60 < pairs < 140


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        pytest.param(([], [], []), {}, "no text to draw rows from", id="nothing"),
        pytest.param(([], SINGLES, []), {"single_share": 0.5}, "no text to draw pairs from", id="no-pairs"),
        pytest.param((PASSAGES, [], []), {"single_share": 1.5}, "`single_share` must lie in", id="share"),
        pytest.param((PASSAGES, [], []), {"neighbours": 0}, "`neighbours` must be >= 1", id="neighbours"),
        pytest.param((PASSAGES, [], []), {"max_seq_length": 4}, "`max_seq_length` must be >= 5", id="length"),
    ],
)
def test_rows_refuse(tokenizer, data, settings, message):
    settings = {"max_seq_length": 32, "single_share": 1.0, **settings}
    with pytest.raises(ValueError, match=message):
        UnlabelledRows(*data, tokenizer, **settings)
