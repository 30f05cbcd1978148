"""Train an SNN-BERT as a masked language model, from scratch or from a checkpoint, with Accelerate.

    python examples/run_mlm_no_trainer.py --config_name hub_configs/snn-bert-mini --tokenizer_name bert-base-uncased \\
        --train_file text.txt.xz --max_train_steps 10000 --output_dir outputs/mlm

`--model_name_or_path` goes on from an SNN-BERT, or with `--convert` from a BERT with a masked-LM head, calibrated on
the first blocks of text. A dataset on the Hub is read as a stream, up to `--max_text_tokens`. Writes a Hub-ready folder
with tokenizer, and mlm_results.json, to `--output_dir`.
"""

import argparse
import math

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from accelerate_loop import Batch, TrainingLoop, add_loop_arguments, check_loop_arguments, make_accelerator
from glue_models import add_student_arguments, check_student_arguments, parse_overrides
from text_blocks import TextBlocks, add_text_arguments, calibration_batches, check_text_arguments, token_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from modeling_snn_bert import SNNBertConfig, SNNBertForMaskedLM
from modeling_snn_bert.conversion import convert_bert

RESULTS_FILE = "mlm_results.json"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="an SNN-BERT to go on from, or a BERT with --convert")
    parser.add_argument("--config_name", help="configuration of an SNN-BERT that is trained from scratch")
    parser.add_argument("--tokenizer_name", help="default: the model's")
    parser.add_argument("--convert", action="store_true", help="convert the BERT by calibration on the text")
    parser.add_argument("--mlm_probability", type=float, default=0.15, help="share of tokens that are to be predicted")
    add_student_arguments(parser)
    add_text_arguments(parser)
    add_loop_arguments(parser, learning_rate=5e-4, max_train_steps=1000)
    args = parser.parse_args()
    check_student_arguments(parser, args)
    check_text_arguments(parser, args)
    check_loop_arguments(parser, args)
    if bool(args.model_name_or_path) == bool(args.config_name):
        parser.error("give either --model_name_or_path or, to train from scratch, --config_name")
    if args.config_name and not args.tokenizer_name:
        parser.error("--config_name needs --tokenizer_name")
    if args.convert and not args.model_name_or_path:
        parser.error("--convert needs --model_name_or_path, a BERT")
    if not 0 < args.mlm_probability < 1:
        parser.error(f"--mlm_probability must lie in (0, 1), got {args.mlm_probability}")
    return args


def main() -> None:
    args = parse_args()
    accelerator = make_accelerator(args)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or args.model_name_or_path)
    if tokenizer.mask_token_id is None:
        raise SystemExit("the tokenizer must have a mask token")
    try:
        config = load_config(args, tokenizer)
        with accelerator.main_process_first():
            tokens = token_file(args, tokenizer, args.output_dir)
        blocks = TextBlocks.from_arguments(args, tokens, tokenizer)
        model = make_model(args, config, blocks, accelerator.device)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    model.train()
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=args.mlm_probability)
    process, processes = accelerator.process_index, accelerator.num_processes

    def batch_of(number: int) -> Batch:
        return masked(collator, blocks.batch(number, args.per_device_train_batch_size, process, processes))

    def loss_of(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return model(**batch).loss, {}

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        return evaluate_masked_lm(accelerator, model, collator, blocks, args.per_device_eval_batch_size)

    loop = TrainingLoop(accelerator, model, args, loss_of, evaluate, "run_mlm_no_trainer")
    loop.run(batch_of, "train")
    model = loop.finish()
    if not accelerator.is_main_process:
        return
    results: dict[str, object] = {"text_tokens": blocks.blocks.size, "seconds": round(loop.seconds, 1)}
    loop.publish(model, tokenizer, RESULTS_FILE, results)


def load_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
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
        config = SNNBertConfig.from_pretrained(path, **{**sizes, **parse_overrides(args.config_overrides)})
    if config.vocab_size < len(tokenizer):
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model only {config.vocab_size}")
    if args.max_seq_length > config.max_position_embeddings:
        raise ValueError(
            f"--max_seq_length must be at most {config.max_position_embeddings}, the positions that the model has; "
            f"got {args.max_seq_length}"
        )
    return config


def make_model(
    args: argparse.Namespace, config: PreTrainedConfig, blocks: TextBlocks, device: torch.device
) -> SNNBertForMaskedLM:
    """The masked LM that training starts from."""
    if args.convert:
        bert = BertForMaskedLM.from_pretrained(args.model_name_or_path, dtype=torch.float32).to(device)
        settings = parse_overrides(args.config_overrides)
        batches = calibration_batches(args, blocks)
        return convert_bert(bert, batches, args.firing_rate, threshold_per=args.threshold_per, **settings)
    if args.model_name_or_path:
        weights = {"config": config, "dtype": torch.float32}
        return SNNBertForMaskedLM.from_pretrained(args.model_name_or_path, **weights).to(device)
    return SNNBertForMaskedLM(config).to(device)


def masked(collator: DataCollatorForLanguageModeling, batch: Batch) -> Batch:
    """A batch with a share of its tokens masked, and the tokens themselves as labels."""
    input_ids, labels = collator.torch_mask_tokens(batch["input_ids"].clone())
    return {**batch, "input_ids": input_ids, "labels": labels}


def evaluate_masked_lm(
    accelerator: Accelerator,
    model: torch.nn.Module,
    collator: DataCollatorForLanguageModeling,
    blocks: TextBlocks,
    batch_size: int,
) -> dict[str, float]:
    """Loss, perplexity and accuracy at masked tokens of the held-out blocks, masked the same way each time."""
    totals = torch.zeros(3, device=accelerator.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for batch in blocks.validation(batch_size, accelerator.process_index, accelerator.num_processes):
            batch = {name: x.to(accelerator.device) for name, x in masked(collator, batch).items()}
            outputs = model(**batch)
            chosen = batch["labels"] != -100
            right = (outputs.logits[chosen].argmax(-1) == batch["labels"][chosen]).sum()
            totals += torch.stack([outputs.loss * chosen.sum(), right, chosen.sum()])
    loss, right, count = accelerator.reduce(totals, reduction="sum").tolist()
    loss, accuracy = loss / count, right / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": accuracy}


if __name__ == "__main__":
    main()
