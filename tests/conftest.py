"""Shared fixtures. The tests run offline: only the sources of transformers' own test suite are fetched, by pip."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Read when the kernels for a GPU are imported: where there is none, they run in Triton's interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from cpu_levels import CPU_LEVELS
from fetch_inputs import minilm_folder
from shared_builds import build_once, build_wheel, why_no_kernels_wheel
from snippets import write_hub_cache
from transformers import BertTokenizer

from modeling_snn_bert import SNNBertConfig, SNNBertForSequenceClassification, cpu_kernels
from modeling_snn_bert.loading import tokenized_batches

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "It rained all night, and the river rose.",
    "Nobody knew why the old clock stopped at noon!",
    "She reads.",
    "A long train of empty wagons crossed the bridge before the sun went down behind the hills.",
    "Is this film worth seeing? I doubt it.",
]
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    for mark in ("flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test", "accelerate_tests"):
        config.addinivalue_line("markers", f"{mark}: a mark of transformers' own test suite")


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.section(f"{len(skipped)} skipped tests and their reasons")
        for report in skipped:
            terminalreporter.line(f"{report.nodeid.split('::')[-1]}: {report.longrepr[-1].removeprefix('Skipped: ')}")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def cap_cpu_level():
    """A function that sets the highest level of the instruction set that the kernels may use, until the test ends."""
    before = cpu_kernels.cpu_level()
    yield cpu_kernels.cap_cpu_level
    if before is not None:
        cpu_kernels.cap_cpu_level(before)


@pytest.fixture(params=CPU_LEVELS)
def at_every_level(request, cap_cpu_level):
    """The test runs once for each level of the instruction set that the kernels have on this machine."""
    cap_cpu_level(request.param)
    assert cpu_kernels.cpu_level() == request.param


@pytest.fixture
def make_config():
    """A function that returns a small configuration in which spikes flow; its arguments override the settings."""

    def make(**overrides):
        settings = {
            "vocab_size": 120,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.1,
        }
        attn_implementation = overrides.pop("attn_implementation", "eager")
        config = SNNBertConfig(**{**settings, **overrides})
        config._attn_implementation = attn_implementation
        return config

    return make


@pytest.fixture(scope="session")
def texts():
    """English sentences of different lengths, of at most 32 tokens."""
    return SENTENCES


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A WordPiece tokenizer for `SENTENCES`, of less than 120 pieces; words that it lacks are cut into letters."""
    words = "the a it and i is this she all of at over night river old clock dog fox sun down long quick brown".split()
    words += "lazy rained nobody knew why stopped noon train empty crossed bridge before went behind hills film".split()
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*SPECIAL_TOKENS, *words, *".,!?", *letters, *(f"##{letter}" for letter in letters)]
    pieces = list(dict.fromkeys(pieces))
    vocab = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    vocab.write_text("\n".join(pieces), encoding="utf-8")
    return BertTokenizer(vocab=str(vocab), model_max_length=64)


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory):
    """A cache of the Hub with the one BERT that the documentation names, as pip brings it."""
    cache = tmp_path_factory.mktemp("hub")
    write_hub_cache(cache, minilm_folder())
    return cache


@pytest.fixture
def make_with_batches(make_config, tokenizer, texts):
    """A function that returns a model and batches of the sentences, padded."""

    def build(head=SNNBertForSequenceClassification, **settings):
        torch.manual_seed(0)
        model = head(make_config(**settings)).eval()
        return model, tokenized_batches(model, tokenizer, texts, batch_size=4)

    return build


@pytest.fixture
def assert_spikes_flow():
    """A function that asserts that every neuron layer fires, at a rate strictly between 0 and 1."""

    def check(model, **inputs):
        with torch.no_grad():
            outputs = model(**inputs, output_firing_rates=True)
        rates = dict(zip(model.neuron_names(), [rate.mean().item() for rate in outputs.firing_rates], strict=True))
        dead = {name: rate for name, rate in rates.items() if not 0 < rate < 1}
        assert not dead, f"these neuron layers are silent or saturated: {dead}"
        return rates

    return check


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The package's wheel: the one with kernels for every Python where it can be built, or else what pip makes here."""
    architecture = os.uname().machine if why_no_kernels_wheel() is None else None
    return build_once(tmp_path_factory, "wheel", lambda folder: build_wheel.build(folder, architecture))
