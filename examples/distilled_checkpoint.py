"""The distilled SNN-BERTs of this repository as folders to load, fine-tune or push; and how their files are made.

    python examples/distilled_checkpoint.py --output_dir outputs/snn-bert-minilm-distilled
    python examples/distilled_checkpoint.py --name snn-bert-minilm-sentences --output_dir outputs/sentences
    python examples/distilled_checkpoint.py --name snn-bert-minilm-multitask --output_dir outputs/multitask
    python examples/distilled_checkpoint.py --pack outputs/distilled --output_dir hub_configs/snn-bert-minilm-distilled

The repository keeps the encoder, its matrices in int8 with a scale per output channel, and the heads if there are any
(`ENCODER_FILE`, 11 MB). Embeddings are those of all-MiniLM-L6-v2, from the Python package index (see
`fetch_inputs.py`), which the training left as they are, and so is a pooler that is not in the file. The last command
makes such a file of a folder that `distill_bert.py --freeze_embeddings` or `run_multitask.py --freeze_embeddings` has
written.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from fetch_inputs import minilm_folder
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertModel, PreTrainedTokenizerBase

from modeling_snn_bert import SNNBertConfig, SNNBertForSequenceClassification, SNNBertModel
from modeling_snn_bert.atomic_writes import write_json, written_whole
from modeling_snn_bert.event_weights import round_weights
from modeling_snn_bert.modeling_snn_bert import SNNBertPreTrainedModel
from modeling_snn_bert.seeds import RESULTS_FILE

HUB_CONFIGS = Path(__file__).resolve().parents[1] / "hub_configs"
# To be fine-tuned; a sentence encoder, and a classifier of five tasks, which both went on from there.
NAMES = ("snn-bert-minilm-distilled", "snn-bert-minilm-sentences", "snn-bert-minilm-multitask")
ENCODER_FILE = "encoder_int8.safetensors"
DISTILLATION_RESULTS = "distillation_results.json"
SCALE = ".scale"
POOLER, CLASSIFIER = "pooler.", "classifier."


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--name", choices=NAMES, default=NAMES[0], help="which one (default: %(default)s)")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="make the file of this folder, for --output_dir")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: written; 1: an input is missing, damaged or does not fit."""
    args = parse_args(arguments)
    try:
        if args.pack:
            pack(args.pack, args.output_dir, bert_of_checkpoint())
        else:
            folder = HUB_CONFIGS / args.name
            model, tokenizer = unpack(folder)
            model.save_pretrained(args.output_dir)
            tokenizer.save_pretrained(args.output_dir)
            shutil.copy(folder / "README.md", args.output_dir / "README.md")
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written to {args.output_dir}")
    return 0


def bert_of_checkpoint() -> BertModel:
    """The BERT that gives what the training has left as it is."""
    return BertModel.from_pretrained(minilm_folder())


def unpack(
    folder: Path = HUB_CONFIGS / NAMES[0], bert: BertModel | None = None
) -> tuple[SNNBertPreTrainedModel, PreTrainedTokenizerBase]:
    """The model that `pack` has written to `folder`, and its tokenizer: a classifier if it has heads, or an encoder.

    Args:
        folder: with `config.json` and `ENCODER_FILE`.
        bert: gives the tokenizer and what the file does not have; by default all-MiniLM-L6-v2.

    Raises:
        ValueError: if the file is damaged, or file, configuration and BERT do not fit together.
        FileNotFoundError: if there is no such file.
        RuntimeError: if the BERT cannot be downloaded.
    """
    file = folder / ENCODER_FILE
    if not file.is_file():
        raise FileNotFoundError(f"there is no {ENCODER_FILE} in {folder}")
    try:
        packed = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    bert = bert_of_checkpoint() if bert is None else bert
    weights = {name: x.float() for name, x in packed.items() if not name.endswith(SCALE)}
    for name in (name for name in packed if name.endswith(SCALE)):
        weights[name.removesuffix(SCALE)] *= packed[name][:, None]
    weights = {**_rest(bert), **weights}
    config = SNNBertConfig.from_pretrained(folder)
    has_heads = any(name.startswith(CLASSIFIER) for name in weights)
    model = SNNBertForSequenceClassification(config) if has_heads else SNNBertModel(config)
    if has_heads:
        base = f"{model.base_model_prefix}."
        weights = {name if name.startswith(CLASSIFIER) else base + name: x for name, x in weights.items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{file}, its configuration and the BERT do not fit together: {error}") from error
    return model.eval(), AutoTokenizer.from_pretrained(bert.name_or_path)


def pack(source: Path, folder: Path, bert: BertModel) -> None:
    """Write `config.json`, `ENCODER_FILE` and the results of the model in `source`, if it has any, to `folder`.

    Raises:
        ValueError: if it is no encoder or classifier of sentences, or its embeddings are not those of `bert`.
        OSError: if there is no such model.
    """
    kinds = {kind.__name__: kind for kind in (SNNBertModel, SNNBertForSequenceClassification)}
    [found] = SNNBertConfig.from_pretrained(source).architectures or [None]
    if found not in kinds:
        raise ValueError(f"{source} must hold one of {', '.join(kinds)}, it holds {found}")
    model = kinds[found].from_pretrained(source)
    state = model.base_model.state_dict()
    packed = {name: x for name, x in model.state_dict().items() if name.startswith(CLASSIFIER)}
    for name, x in _rest(bert).items():
        if torch.allclose(state[name], x, atol=1e-3):
            continue
        if not name.startswith(POOLER):
            raise ValueError(f"{name} in {source} is not that of the BERT: train with --freeze_embeddings")
        packed[name] = state[name]
    for name, x in state.items():
        if name.startswith("encoder.") and x.dim() == 2:
            packed[name], scale = round_weights(x, "int8")
            assert scale is not None  # int8 has one
            packed[name + SCALE] = scale
        elif name.startswith("encoder."):
            packed[name] = x
    with written_whole(folder / ENCODER_FILE) as partial:
        save_file(packed, partial, metadata={"format": "pt"})
    # Without the version that happened to write it, as in the other folders.
    settings = model.config.to_diff_dict()
    write_json(folder / "config.json", {k: v for k, v in settings.items() if k != "transformers_version"})
    for name in (DISTILLATION_RESULTS, RESULTS_FILE):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def _rest(bert: BertModel) -> dict[str, torch.Tensor]:
    """What an SNN-BERT has beside its encoder."""
    return {name: x for name, x in bert.state_dict().items() if not name.startswith("encoder.")}


if __name__ == "__main__":
    sys.exit(main())
