"""Train an SNN-BERT as a masked language model, from scratch or from a checkpoint, with transformers' Trainer.

    python examples/run_mlm.py --config_name hub_configs/snn-bert-mini --tokenizer_name bert-base-uncased \\
        --train_file text.txt.xz --max_steps 10000 --output_dir outputs/mlm

`--model_name_or_path` goes on from an SNN-BERT, or with `--convert` from a BERT with a masked-LM head, calibrated on
the first blocks of text. A dataset on the Hub is read as a stream, up to `--max_text_tokens`. Takes all flags of
TrainingArguments. Writes a Hub-ready folder with tokenizer, and mlm_results.json, to `--output_dir`.
"""

import math
from dataclasses import asdict, dataclass

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.hf_argparser import HfArg

from modeling_snn_bert import SNNBertConfig, SNNBertForMaskedLM
from modeling_snn_bert.batches import Batch, Batches
from modeling_snn_bert.conversion import convert_bert, initialize_from_bert
from modeling_snn_bert.settings import ConversionArguments, refuse_given
from modeling_snn_bert.text_blocks import TextArguments, TextBlocks
from modeling_snn_bert.trainer import DistillationTrainer, SNNBertTrainingArguments

RESULTS_FILE = "mlm_results.json"


@dataclass
class ModelArguments(ConversionArguments):
    """The model, and how much of the text is masked."""

    model_name_or_path: str | None = HfArg(default=None, help="an SNN-BERT to go on from, or a BERT with --convert")
    config_name: str | None = HfArg(default=None, help="configuration of an SNN-BERT that is trained from scratch")
    tokenizer_name: str | None = HfArg(default=None, help="default: the model's")
    convert: bool = HfArg(default=False, help="convert the BERT by calibration on the text")
    mlm_probability: float = HfArg(default=0.15, help="share of tokens that are to be predicted")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.model_name_or_path) == bool(self.config_name):
            raise ValueError("give either --model_name_or_path or, to train from scratch, --config_name")
        if self.config_name and not self.tokenizer_name:
            raise ValueError("--config_name needs --tokenizer_name")
        if self.convert and not self.model_name_or_path:
            raise ValueError("--convert needs --model_name_or_path, a BERT")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"--mlm_probability must lie in (0, 1), got {self.mlm_probability}")


@dataclass
class Arguments(SNNBertTrainingArguments):
    """SNNBertTrainingArguments for a run on text."""

    learning_rate: float = HfArg(default=5e-4, help="of all but the neurons")
    max_steps: int = HfArg(default=1000, help="steps of the run")


def main() -> None:
    parser = HfArgumentParser([ModelArguments, TextArguments, Arguments], description=__doc__)
    model_args, text_args, args = parser.parse_args_into_dataclasses()
    if not model_args.convert:
        refuse_given(parser, ["firing_rate", "calibration_tokens"], "needs --convert")
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path)
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer must have a mask token")
    config = load_config(model_args, text_args.max_seq_length, tokenizer)
    if model_args.convert:
        bert = BertForMaskedLM.from_pretrained(model_args.model_name_or_path, dtype=torch.float32).to(args.device)
        # An uncalibrated copy refuses bad settings before the work.
        initialize_from_bert(bert, **model_args.settings())
    with args.main_process_first(desc="tokenize the text"):
        blocks = text_args.blocks(tokenizer, args.seed)
    if model_args.convert:
        calibration = blocks.calibration(text_args.calibration_tokens)
        model = convert_bert(bert, calibration, model_args.firing_rate, **model_args.settings())
    elif model_args.model_name_or_path:
        weights = {"config": config, "dtype": torch.float32}
        model = SNNBertForMaskedLM.from_pretrained(model_args.model_name_or_path, **weights)
    else:
        model = SNNBertForMaskedLM(config)
    blocks_of = blocks.of_run(args)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=model_args.mlm_probability)

    def batch_of(number: int) -> Batch:
        # Masks follow from seed and number too, so that a run is resumed exactly.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((args.seed * 1_000_003 + number) * args.world_size + args.process_index)
            return masked(collator, blocks_of(number))

    trainer = DistillationTrainer(
        model,
        args,
        train_dataset=Batches.of_run(batch_of, args),
        processing_class=tokenizer,
        figures_of=lambda model: evaluate_masked_lm(trainer, model, collator, blocks),
    )
    trainer.train_as_told()
    flags = {**asdict(model_args), **asdict(text_args)}
    trainer.save_run(RESULTS_FILE, {**trainer.results(), "text_tokens": blocks.blocks.size, "arguments": flags})


def load_config(args: ModelArguments, max_seq_length: int, tokenizer: PreTrainedTokenizerBase) -> SNNBertConfig:
    """The configuration of the SNN-BERT that is trained, or of the BERT that is converted.

    Raises:
        ValueError: if it is another kind of model, or does not fit the text.
    """
    path = args.model_name_or_path or args.config_name
    config = AutoConfig.from_pretrained(path)
    wanted = "bert" if args.convert else SNNBertConfig.model_type
    if config.model_type != wanted:
        raise ValueError(f"{path} must be of the type {wanted!r}, it is {config.model_type!r} (--convert takes a BERT)")
    if not args.convert:
        sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} if args.config_name else {}
        config = SNNBertConfig.from_pretrained(path, **{**sizes, **args.settings()})
    if config.vocab_size < len(tokenizer):
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model only {config.vocab_size}")
    if max_seq_length > config.max_position_embeddings:
        raise ValueError(
            f"--max_seq_length must be at most {config.max_position_embeddings}, the positions that the model has; "
            f"got {max_seq_length}"
        )
    return config


def masked(collator: DataCollatorForLanguageModeling, batch: Batch) -> Batch:
    """A batch with a share of its tokens masked, and the tokens themselves as labels."""
    input_ids, labels = collator.torch_mask_tokens(batch["input_ids"].clone())
    return {**batch, "input_ids": input_ids, "labels": labels}


def evaluate_masked_lm(
    trainer: DistillationTrainer, model: PreTrainedModel, collator: DataCollatorForLanguageModeling, blocks: TextBlocks
) -> dict[str, float]:
    """Loss, perplexity and accuracy at masked tokens of the held-out blocks, masked the same way each time."""
    args, totals = trainer.args, torch.zeros(3, device=model.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for batch in blocks.validation(args.per_device_eval_batch_size, args.process_index, args.world_size):
            batch = {name: x.to(model.device) for name, x in masked(collator, batch).items()}
            outputs = model(**batch)
            chosen = batch["labels"] != -100
            right = (outputs.logits[chosen].argmax(-1) == batch["labels"][chosen]).sum()
            totals += torch.stack([outputs.loss * chosen.sum(), right, chosen.sum()])
    loss, right, count = trainer.accelerator.reduce(totals, reduction="sum").tolist()
    loss, accuracy = loss / count, right / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": accuracy}


if __name__ == "__main__":
    main()
