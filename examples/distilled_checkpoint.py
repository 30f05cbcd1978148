"""The distilled SNN-BERTs of this repository as folders to load, fine-tune or push; and how their files are made.

    python examples/distilled_checkpoint.py --output_dir outputs/snn-bert-minilm-distilled
    python examples/distilled_checkpoint.py --name snn-bert-minilm-sentences --output_dir outputs/sentences
    python examples/distilled_checkpoint.py --pack outputs/distilled --output_dir hub_configs/snn-bert-minilm-distilled

The repository keeps the encoder only, its matrices in int8 with a scale per output channel (`ENCODER_FILE`, 11 MB).
Embeddings and pooler are those of all-MiniLM-L6-v2, from the Python package index (see `fetch_inputs.py`): the
distillation left them as they are. The last command makes such a file of a folder that
`distill_bert.py --freeze_embeddings` has written.
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

from modeling_snn_bert import SNNBertConfig, SNNBertModel
from modeling_snn_bert.atomic_writes import write_json, written_whole
from modeling_snn_bert.event_weights import round_weights

HUB_CONFIGS = Path(__file__).resolve().parents[1] / "hub_configs"
# To be fine-tuned; and a sentence encoder, which went on from there.
NAMES = ("snn-bert-minilm-distilled", "snn-bert-minilm-sentences")
ENCODER_FILE = "encoder_int8.safetensors"
RESULTS_FILE = "distillation_results.json"
SCALE = ".scale"


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
    """The BERT that gives embeddings and pooler."""
    return BertModel.from_pretrained(minilm_folder())


def unpack(
    folder: Path = HUB_CONFIGS / NAMES[0], bert: BertModel | None = None
) -> tuple[SNNBertModel, PreTrainedTokenizerBase]:
    """The model that `pack` has written to `folder`, and its tokenizer.

    Args:
        folder: with `config.json` and `ENCODER_FILE`.
        bert: gives embeddings, pooler and tokenizer; by default all-MiniLM-L6-v2.

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
    model = SNNBertModel(SNNBertConfig.from_pretrained(folder))
    try:
        model.load_state_dict({**_rest(bert), **weights})
    except RuntimeError as error:
        raise ValueError(f"{file}, its configuration and the BERT do not fit together: {error}") from error
    return model.eval(), AutoTokenizer.from_pretrained(bert.name_or_path)


def pack(source: Path, folder: Path, bert: BertModel) -> None:
    """Write `config.json`, `ENCODER_FILE` and `RESULTS_FILE` of the distilled model in `source` to `folder`.

    Raises:
        ValueError: if embeddings or pooler are not those of `bert`.
        OSError: if there is no such model.
    """
    model = SNNBertModel.from_pretrained(source)
    state = model.state_dict()
    for name, x in _rest(bert).items():
        if not torch.allclose(state[name], x, atol=1e-3):
            raise ValueError(f"{name} in {source} is not that of the BERT: distil with --freeze_embeddings")
    packed = {}
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
    if (source / RESULTS_FILE).is_file():
        shutil.copy(source / RESULTS_FILE, folder / RESULTS_FILE)


def _rest(bert: BertModel) -> dict[str, torch.Tensor]:
    """What an SNN-BERT has beside its encoder."""
    return {name: x for name, x in bert.state_dict().items() if not name.startswith("encoder.")}


if __name__ == "__main__":
    sys.exit(main())
