"""The script that makes labelled data of sentences and corrupted copies of them."""

import random
from collections import Counter

import pytest
from corrupted_sentences import ALL_FUNCTION_WORDS, GROUP_OF, Corruption, forms_of, usable_sentences
from example_scripts import refused, run_script
from glue_tasks import load_task

NAMES = ["fox", "dog", "river", "clock", "night", "film", "boat", "house"]
VERBS = ["walks", "walked", "walking", "walk", "watches", "watched", "watch"]
SENTENCE = "the old fox walks to the river at night .".split()


def make_text(count):
    generator = random.Random(0)
    lines = []
    for _ in range(count):
        first, second, third = generator.sample(NAMES, 3)
        verb = generator.choice(VERBS)
        lines.append(f"The {first} {verb} to the {second} with a {third}. Is it the {second} of the {first}?")
    return "\n".join(lines) + "\n"


@pytest.fixture
def corruption():
    return Corruption((word for words in usable_sentences(make_text(200)) for word in words), random.Random(0))


def edited(corruption, name, sentence=SENTENCE):
    """The copies that an edit has made of a sentence in a hundred draws."""
    copies = []
    for _ in range(100):
        copies.append(list(sentence))
        getattr(corruption, name)(copies[-1], corruption.rng.randrange(len(sentence) - 1))
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
    assert all(Corruption(SENTENCE, random.Random(seed))(SENTENCE) != SENTENCE for seed in range(100))
    for sentence in (SENTENCE, ["fox", "."], ["no", "fox", "."]):
        before = list(sentence)
        copies = [corruption(sentence) for _ in range(300)]
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


def test_script(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(make_text(60), encoding="utf-8")
    arguments = ["--train_file", tmp_path / "a.txt", tmp_path / "b.txt", "--max_sentences", 40]
    arguments += ["--validation_sentences", 8]
    for seed, output in ((0, "one"), (0, "again"), (1, "other")):
        run_script("corrupted_sentences", *arguments, "--seed", seed, "--output_dir", tmp_path / output)
    files = {output: (tmp_path / output / "CoLA" / "train.tsv").read_bytes() for output in ("one", "again", "other")}
    assert files["one"] == files["again"] != files["other"]

    _, data = load_task(task_name="cola", data_dir=str(tmp_path / "one"))
    assert len(data["train"]) == 64 and len(data["validation"]) == 16
    for rows in data.values():
        assert rows["label"] == [1, 0] * (len(rows) // 2)
        assert all(good != bad for good, bad in zip(rows["sentence"][::2], rows["sentence"][1::2], strict=True))
    assert not list((tmp_path / "one").rglob("*.partial"))


def test_shares_of_the_files(tmp_path):
    (tmp_path / "a.txt").write_text(make_text(300), encoding="utf-8")
    (tmp_path / "b.txt").write_text(make_text(300).replace("The", "Every"), encoding="utf-8")
    arguments = ["--train_file", tmp_path / "a.txt", tmp_path / "b.txt", "--source_shares", 0.9, 0.1]
    arguments += ["--max_sentences", 200, "--validation_sentences", 5]
    run_script("corrupted_sentences", *arguments, "--output_dir", tmp_path / "out")
    _, data = load_task(task_name="cola", data_dir=str(tmp_path / "out"))
    good = [text for rows in data.values() for text in rows["sentence"][::2]]
    assert len(good) == 200 and 0 < sum(text.startswith("every") for text in good) <= 20


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param([], "--train_file", id="no-text"),
        pytest.param(["--train_file", "missing.txt"], "there is no file missing.txt", id="missing"),
        pytest.param(["--train_file", "{text}", "--source_shares", 0.5, 0.5], "must be 1 positive", id="shares"),
        pytest.param(["--train_file", "{text}", "--source_shares", 0.9], "add up to 1", id="sum"),
        pytest.param(["--train_file", "{text}", "--max_sentences", 5], "--validation_sentences", id="held-out"),
        pytest.param(["--train_file", "{text}", "--validation_sentences", 0], ">= 1", id="none-held-out"),
        pytest.param(["--train_file", "{text}", "--max_sentences", 5000], "too few", id="too-few"),
    ],
)
def test_refuses(tmp_path, capsys, arguments, message):
    text = tmp_path / "text.txt"
    text.write_text(make_text(10), encoding="utf-8")
    arguments = [text if x == "{text}" else x for x in arguments]
    assert message in refused(capsys, "corrupted_sentences", *arguments, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
