"""The folders in hub_configs/ are ready to push: they load, and their cards say what is true of their models."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distilled_checkpoint import NAMES
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from modeling_snn_bert import SNNBertConfig
from modeling_snn_bert.configuration_snn_bert import AUTO_MAP

ROOT = Path(__file__).parents[1]
HUB_CONFIGS = ROOT / "hub_configs"
# (layers, hidden size, heads) as the README promises them: written down here a second time on purpose.
SIZES = {
    "snn-bert-tiny": (2, 128, 2),
    "snn-bert-mini": (4, 256, 4),
    "snn-bert-small": (4, 512, 8),
    "snn-bert-minilm": (6, 384, 12),
    "snn-bert-base": (12, 768, 12),
}
each_size = pytest.mark.parametrize("name", SIZES)


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """A folder with what hub_configs/generate.py writes."""
    folder = tmp_path_factory.mktemp("hub_configs")
    subprocess.run([sys.executable, HUB_CONFIGS / "generate.py", "--output_dir", folder], check=True)
    return folder


def bert_parameters(config):
    """Parameters of a BertModel (with pooler) of that shape, counted by hand."""
    hidden, inner = config.hidden_size, config.intermediate_size
    embeddings = (config.vocab_size + config.max_position_embeddings + config.type_vocab_size) * hidden + 2 * hidden
    attention = 4 * (hidden * hidden + hidden) + 2 * hidden
    mlp = (hidden * inner + inner) + (inner * hidden + hidden) + 2 * hidden
    pooler = hidden * hidden + hidden
    return embeddings + config.num_hidden_layers * (attention + mlp) + pooler


def test_there_is_a_folder_for_each_size_and_no_other():
    folders = {path.name for path in HUB_CONFIGS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    # The checkpoints have their own tests.
    assert folders == {*SIZES, *NAMES}


@each_size
def test_config_loads_with_the_promised_shape(name):
    config = AutoConfig.from_pretrained(HUB_CONFIGS / name)
    assert type(config) is SNNBertConfig
    shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
    assert shape == SIZES[name]
    assert config.intermediate_size == 4 * config.hidden_size
    assert config.vocab_size == 30522


@each_size
def test_config_file_names_the_code_and_no_version(name):
    settings = json.loads((HUB_CONFIGS / name / "config.json").read_text(encoding="utf-8"))
    assert settings["auto_map"] == AUTO_MAP
    assert settings["model_type"] == "snn_bert"
    assert "transformers_version" not in settings


@each_size
@pytest.mark.parametrize("file", ["config.json", "README.md"])
def test_files_are_what_the_script_generates(name, file, generated):
    kept = (HUB_CONFIGS / name / file).read_text(encoding="utf-8")
    assert kept == (generated / name / file).read_text(encoding="utf-8"), "run `python hub_configs/generate.py`"


@each_size
def test_card_is_valid_and_states_the_right_numbers_of_parameters(name):
    text = (HUB_CONFIGS / name / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["spiking-neural-network", "snn", "bert"]
    assert "{{" not in text and "{%" not in text, "a placeholder of the template was left"

    config = AutoConfig.from_pretrained(HUB_CONFIGS / name)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    neuron_parameters = sum(
        parameter.numel() for path, parameter in model.named_parameters() if re.search(r"neuron\.[^.]+$", path)
    )
    stated = [int(number.replace(",", "")) for number in re.findall(r"parameters of .*\| ([\d,]+) \|", text)]
    assert stated == [parameters, neuron_parameters]
    # What is left are BERT's own parameters, and a gain and an offset per channel of the queries.
    query_affine = 2 * config.num_hidden_layers * config.hidden_size
    assert parameters - neuron_parameters == bert_parameters(config) + query_affine


def test_tiny_runs_and_its_spikes_flow():
    model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(HUB_CONFIGS / "snn-bert-tiny")).eval()
    input_ids = torch.randint(1000, 30522, (2, 24))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 15:] = 0
    with torch.no_grad():
        outputs = model(input_ids, attention_mask=attention_mask, output_firing_rates=True)
    assert outputs.logits.shape == (2, 24, 30522)
    assert outputs.logits.isfinite().all()
    rates = dict(zip(model.neuron_names(), [rate.mean().item() for rate in outputs.firing_rates], strict=True))
    assert rates and all(0 < rate < 1 for rate in rates.values()), rates


@pytest.mark.slow
def test_the_card_s_snippet_for_an_untrained_model_runs(tmp_path):
    text = (HUB_CONFIGS / "snn-bert-tiny" / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    snippet = next(snippet for snippet in snippets if "from_config" in snippet)
    script = tmp_path / "snippet.py"
    script.write_text(f"{snippet}\nprint(type(model).__name__)\n", encoding="utf-8")
    # In a fresh process, as in the reader's: nothing is registered there yet.
    result = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "SNNBertForMaskedLM"
