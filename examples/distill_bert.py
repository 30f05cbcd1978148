"""Distil a BERT into an SNN-BERT on unlabelled text.

    python examples/distill_bert.py --train_file reviews.txt news.txt.xz --output_dir outputs/distilled
    accelerate launch examples/distill_bert.py --dataset_name wikimedia/wikipedia ...

The BERT (`--model_name_or_path`, by default all-MiniLM-L6-v2 from the Python package index) is converted by calibration
on the first blocks of text and then taught the BERT's hidden states. Writes a Hub-ready folder with tokenizer, and
distillation_results.json, to `--output_dir`: `SNNBertFor....from_pretrained` and the other scripts start from there.
"""

import argparse
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from accelerate_loop import TrainingLoop, add_loop_arguments, check_loop_arguments, make_accelerator
from fetch_inputs import minilm_folder
from glue_models import add_student_arguments, check_student_arguments, parse_overrides
from pair_similarity import embedding_loss
from text_blocks import TextBlocks, add_text_arguments, calibration_batches, check_text_arguments, token_file
from transformers import AutoConfig, AutoTokenizer, BertModel, PreTrainedModel, PreTrainedTokenizerBase

from modeling_snn_bert import SNNBertModel
from modeling_snn_bert.conversion import convert_bert
from modeling_snn_bert.distillation import attention_loss, check_same_shape, hidden_state_loss

RESULTS_FILE = "distillation_results.json"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="the BERT: folder or Hub id (default: all-MiniLM-L6-v2)")
    parser.add_argument("--student_name_or_path", help="an SNN-BERT to go on from, in place of a calibrated one")
    parser.add_argument("--attention_weight", type=float, default=0.0, help="weight of the loss on attention maps")
    parser.add_argument(
        "--embedding_weight",
        type=float,
        default=0.0,
        help="weight of the loss on the mean of the last hidden states, which is what a sentence encoder gives",
    )
    parser.add_argument("--freeze_embeddings", action="store_true", help="keep the BERT's embeddings as they are")
    add_student_arguments(parser)
    add_text_arguments(parser)
    add_loop_arguments(parser, learning_rate=5e-4, max_train_steps=1000)
    args = parser.parse_args(arguments)
    check_student_arguments(parser, args)
    check_text_arguments(parser, args)
    check_loop_arguments(parser, args)
    for name in ("attention_weight", "embedding_weight"):
        if not getattr(args, name) >= 0:
            parser.error(f"--{name} must be >= 0, got {getattr(args, name)}")
    if args.embedding_weight and args.per_device_train_batch_size < 2:
        parser.error("--embedding_weight compares the blocks of a batch: --per_device_train_batch_size must be >= 2")
    return args


def main() -> None:
    args = parse_args()
    accelerator = make_accelerator(args)
    loop, tokenizer, results = distil(args, accelerator)
    student = loop.finish()
    if accelerator.is_main_process:
        student.embeddings.requires_grad_(True)
        loop.publish(student, tokenizer, RESULTS_FILE, results)


def distil(
    args: argparse.Namespace, accelerator: Accelerator, convert: Callable[..., PreTrainedModel] = convert_bert
) -> tuple[TrainingLoop, PreTrainedTokenizerBase, dict[str, object]]:
    """Train the student as the flags say: the loop that has run, the tokenizer, and what the results say besides.

    `convert` makes the SNN-BERT of the BERT, with the arguments of `convert_bert`. Flags and files that do not fit end
    the program with a message.
    """
    set_seed(args.seed)
    teacher_path = args.model_name_or_path or str(minilm_folder())
    tokenizer = AutoTokenizer.from_pretrained(teacher_path)
    teacher = load_teacher(args, teacher_path)
    try:
        with accelerator.main_process_first():
            tokens = token_file(args, tokenizer, args.output_dir)
        blocks = TextBlocks.from_arguments(args, tokens, tokenizer)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    teacher.to(accelerator.device)
    started = time.perf_counter()
    student = make_student(args, teacher, blocks, convert)
    calibration_seconds = time.perf_counter() - started
    try:
        check_same_shape(student.config, teacher.config)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if args.freeze_embeddings:
        student.embeddings.requires_grad_(False)
    # Dropout off in both: the student is to hit the teacher's states, and noise in either only blurs them. The student
    # is in training mode all the same: gradient checkpointing works in that mode only.
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    student.train()

    # In several processes the model will be wrapped.
    config = student.config
    extras = {"output_hidden_states": True, "output_attentions": args.attention_weight > 0}

    def loss_of(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.no_grad():
            wanted = teacher(**batch, **extras)
        outputs = model(**batch, **extras)
        loss = hidden_state_loss(outputs.hidden_states, wanted.hidden_states)
        figures = {"hidden_state_loss": loss}
        if args.attention_weight:
            figures["attention_loss"] = attention_loss(outputs.attentions, wanted.attentions)
            loss = loss + args.attention_weight * figures["attention_loss"]
        if args.embedding_weight:
            everything = torch.ones_like(batch["input_ids"])
            figures["embedding_loss"] = embedding_loss(outputs.last_hidden_state, wanted.last_hidden_state, everything)
            loss = loss + args.embedding_weight * figures["embedding_loss"]
        if outputs.firing_rate_penalty is not None:
            figures["firing_rate_penalty"] = outputs.firing_rate_penalty
            loss = loss + config.firing_rate_weight * outputs.firing_rate_penalty
        return loss, figures

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        return evaluate_states(accelerator, model, teacher, blocks, args.per_device_eval_batch_size)

    loop = TrainingLoop(accelerator, student, args, loss_of, evaluate, "distill_bert")
    before = None
    if not loop.log:
        before = loop.evaluate_now()
        accelerator.print("before training:", before)
    batch_size, part, parts = args.per_device_train_batch_size, accelerator.process_index, accelerator.num_processes
    loop.run(lambda number: blocks.batch(number, batch_size, part, parts), "distil")
    results: dict[str, object] = {
        "teacher": teacher_path,
        "text_tokens": blocks.blocks.size,
        "before_training": before,
        "seconds": {"calibration": round(calibration_seconds, 1), "training": round(loop.seconds, 1)},
    }
    return loop, tokenizer, results


def load_teacher(args: argparse.Namespace, path: str) -> BertModel:
    """The BERT, frozen; anything else ends the program with a message."""
    config = AutoConfig.from_pretrained(path)
    if config.model_type != "bert":
        raise SystemExit(f"--model_name_or_path must be a BERT, {path} is of the type {config.model_type!r}")
    if args.max_seq_length > config.max_position_embeddings:
        raise SystemExit(
            f"--max_seq_length must be at most {config.max_position_embeddings}, the positions that {path} has; "
            f"got {args.max_seq_length}"
        )
    # Only the eager attention can return its weights.
    attention = "eager" if args.attention_weight else "sdpa"
    return (
        BertModel.from_pretrained(path, attn_implementation=attention, dtype=torch.float32).eval().requires_grad_(False)
    )


def make_student(
    args: argparse.Namespace, teacher: BertModel, blocks: TextBlocks, convert: Callable[..., PreTrainedModel]
) -> PreTrainedModel:
    """The SNN-BERT that training starts from; a checkpoint to resume from brings the weights later."""
    settings = parse_overrides(args.config_overrides)
    if args.student_name_or_path:
        settings |= {"attn_implementation": teacher.config._attn_implementation, "dtype": torch.float32}
        student = SNNBertModel.from_pretrained(args.student_name_or_path, **settings)
        return student.to(teacher.device)
    batches = calibration_batches(args, blocks)
    if args.resume_from_checkpoint is not None:
        batches = batches[:1]
    return convert(teacher, batches, args.firing_rate, threshold_per=args.threshold_per, **settings)


def evaluate_states(
    accelerator, model: torch.nn.Module, teacher: BertModel, blocks: TextBlocks, batch_size: int
) -> dict[str, float]:
    """On the held-out blocks: loss over all layers, of the last one and of its mean, and the mean firing rate."""
    totals = torch.zeros(4, device=accelerator.device)
    embeddings, wanted_embeddings = [], []
    for batch in blocks.validation(batch_size, accelerator.process_index, accelerator.num_processes):
        batch = {name: x.to(accelerator.device) for name, x in batch.items()}
        wanted = teacher(**batch, output_hidden_states=True).hidden_states
        outputs = model(**batch, output_hidden_states=True, output_firing_rates=True)
        states, rows = outputs.hidden_states, len(batch["input_ids"])
        rate = torch.stack([rate.mean() for rate in outputs.firing_rates]).mean()
        figures = [hidden_state_loss(states, wanted), hidden_state_loss(states[-2:], wanted[-2:]), rate]
        totals += rows * torch.stack([*figures, torch.ones_like(rate)])
        embeddings += outputs.last_hidden_state.float().mean(1).tolist()
        wanted_embeddings += wanted[-1].float().mean(1).tolist()
    loss, last_layer_loss, rate, rows = accelerator.reduce(totals, reduction="sum").tolist()
    # Of all blocks at once: a batch may hold one, whose embedding has no variance. Each stands for a one-token block.
    found, wanted = (torch.tensor(gather_object(x))[:, None] for x in (embeddings, wanted_embeddings))
    return {
        "loss": loss / rows,
        "last_layer_loss": last_layer_loss / rows,
        "embedding_loss": embedding_loss(found, wanted, torch.ones(found.shape[:2])).item(),
        "firing_rate": rate / rows,
    }


if __name__ == "__main__":
    main()
