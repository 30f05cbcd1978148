"""Writes `config.json` and the model card of every size: `python hub_configs/generate.py`.

The sizes are those of BERT-tiny, -mini, -small and -base, and of MiniLM. The cards come from `model_card_template.md`.
Run it again whenever the configuration, the model or the template changes; tests/test_hub_configs.py says when.
"""

import argparse
import json
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData

from modeling_snn_bert import SNNBertConfig, SNNBertModel, SpikingNeuron

FOLDER = Path(__file__).parent
# Layers, hidden size, attention heads.
SIZES = {
    "snn-bert-tiny": (2, 128, 2),
    "snn-bert-mini": (4, 256, 4),
    "snn-bert-small": (4, 512, 8),
    "snn-bert-minilm": (6, 384, 12),
    "snn-bert-base": (12, 768, 12),
}


def make_config(name: str) -> SNNBertConfig:
    """The configuration of the size `name`."""
    layers, hidden_size, heads = SIZES[name]
    return SNNBertConfig(
        num_hidden_layers=layers,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
    )


def config_text(config: SNNBertConfig) -> str:
    """`config.json`: every setting of SNN-BERT, and those that all models share where they differ from the default."""
    settings = config.to_diff_dict()
    # The file does not depend on the version that happened to write it.
    settings.pop("transformers_version", None)
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"


def card_text(name: str, config: SNNBertConfig) -> str:
    """The model card, with the numbers of parameters counted on a model without storage."""
    with torch.device("meta"):
        model = SNNBertModel(config)
    neurons = [module for module in model.modules() if isinstance(module, SpikingNeuron)]
    card_data = ModelCardData(
        library_name="transformers", license="apache-2.0", tags=["spiking-neural-network", "snn", "bert"]
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(FOLDER / "model_card_template.md"),
        model_name=name,
        config=config,
        parameters=model.num_parameters(),
        neuron_parameters=sum(parameter.numel() for neuron in neurons for parameter in neuron.parameters()),
    )
    return str(card).rstrip("\n") + "\n"


def generate(folder: Path) -> None:
    """Write `<folder>/<size>/config.json` and `<folder>/<size>/README.md` for every size."""
    for name in SIZES:
        config = make_config(name)
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(config_text(config), encoding="utf-8")
        (folder / name / "README.md").write_text(card_text(name, config), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="folder of the folders (default: this one)")
    generate(parser.parse_args().output_dir)
