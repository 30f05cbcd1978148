"""What of a model's folder goes to the Hub, and what is found wrong with it; test_bad_input.py has each problem."""

import pytest

from modeling_snn_bert import SNNBertForSequenceClassification
from modeling_snn_bert.publishing import check_folder, choose_files


@pytest.fixture
def folder(tmp_path, tokenizer, make_config):
    SNNBertForSequenceClassification(make_config()).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return tmp_path


def test_what_is_sent(folder):
    """The model; of a training run, and of what is hidden, nothing."""
    for name in (".git/config", "checkpoint-8/model.safetensors", "__pycache__/x.pyc", ".hidden", "rng_state_0.pth"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    (folder / "training_args.bin").write_bytes(b"")
    (folder / "figures").mkdir()
    (folder / "elsewhere").symlink_to("/tmp", target_is_directory=True)
    (folder / "figures" / "spikes.png").write_bytes(b"")
    files, left_out, problems = choose_files(folder)
    names = {str(path.relative_to(folder)) for path in files}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "modeling_snn_bert.py"} <= names
    assert "figures/spikes.png" in names and problems == []
    assert {name for name, _ in left_out} == {
        ".git/",
        "checkpoint-8/",
        "__pycache__/",
        ".hidden",
        "rng_state_0.pth",
        "training_args.bin",
        "elsewhere/",
    }
    assert not names & {name for name, _ in left_out}


def test_links_to_files(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "notes.txt"
    outside.write_text("")
    (folder / "inside.txt").symlink_to(folder / "README.md")
    (folder / "outside.txt").symlink_to(outside)
    (folder / "gone.txt").symlink_to(folder / "nothing.txt")
    (folder / "round.txt").symlink_to(folder / "round.txt")
    files, _, problems = choose_files(folder)
    assert folder / "inside.txt" in files
    wanted = {"outside.txt is a link to a file outside", "gone.txt is a link to nothing", "round.txt is a link to"}
    assert len(problems) == 3 and all(any(problem.startswith(x) for problem in problems) for x in wanted)


def test_all_problems_are_told_at_once(folder):
    assert check_folder(folder) == []
    (folder / "README.md").write_text("TO BE FILLED IN")
    (folder / "tokenizer.json").write_text("{")
    (folder / "sparsity.py").unlink()
    problems = check_folder(folder)
    for words in ("tokenizer: ", "the code lacks sparsity.py", "has no metadata", "TO BE FILLED IN"):
        assert sum(words in problem for problem in problems) == 1, problems
    assert len(problems) == 4
    assert len(check_folder(folder, has_card=False)) == 2
