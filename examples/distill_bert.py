"""Distil a BERT, or an MPNet, into an SNN-BERT on unlabelled text.

    python examples/distill_bert.py --train_file reviews.txt news.txt.xz --output_dir outputs/distilled
    accelerate launch examples/distill_bert.py --dataset_name wikimedia/wikipedia ...

The BERT (`--model_name_or_path`, by default all-MiniLM-L6-v2 from the Python package index) is converted by calibration
on the first blocks of text and then taught the BERT's hidden states. Takes all flags of TrainingArguments. Writes a
Hub-ready folder with tokenizer, and distillation_results.json, to `--output_dir`: `SNNBertFor....from_pretrained` and
the other scripts start from there.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from fetch_inputs import minilm_folder
from transformers import AutoConfig, AutoTokenizer, BertModel, HfArgumentParser, MPNetModel, PreTrainedModel, set_seed
from transformers.hf_argparser import HfArg

from modeling_snn_bert import SNNBertModel
from modeling_snn_bert.atomic_writes import write_json
from modeling_snn_bert.batches import Batches
from modeling_snn_bert.conversion import convert_bert
from modeling_snn_bert.distillation import check_same_shape, embedding_loss, hidden_state_loss
from modeling_snn_bert.seeds import checkpoint_of
from modeling_snn_bert.settings import parse_settings
from modeling_snn_bert.text_blocks import TextArguments, TextBlocks
from modeling_snn_bert.trainer import DistillationTrainer, DistillationTrainingArguments

RESULTS_FILE = "distillation_results.json"
TEACHERS = {"bert": BertModel, "mpnet": MPNetModel}


@dataclass
class StudentArguments:
    """Teacher and student."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "the BERT or MPNet: folder or Hub id (default: all-MiniLM-L6-v2)"}
    )
    student_name_or_path: str | None = field(
        default=None, metadata={"help": "an SNN-BERT to go on from, in place of a calibrated one"}
    )
    firing_rate: float = field(default=0.2, metadata={"help": "firing rate at calibration"})
    threshold_per: Literal["channel", "layer"] = field(
        default="channel", metadata={"help": "at calibration, a threshold for each channel, or one for a neuron layer"}
    )
    config_overrides: str | None = HfArg(
        default=None, aliases=["--setting"], help="settings of SNNBertConfig: spike_type=ternary,decay=0.1"
    )
    freeze_embeddings: bool = field(default=False, metadata={"help": "keep the BERT's embeddings as they are"})

    def __post_init__(self) -> None:
        if not 0 < self.firing_rate < 1:
            raise ValueError(f"--firing_rate must lie in (0, 1), got {self.firing_rate}")


@dataclass
class Arguments(DistillationTrainingArguments):
    """DistillationTrainingArguments for a run on text: hidden states are taught."""

    learning_rate: float = field(default=5e-4, metadata={"help": "of all but the neurons"})
    max_steps: int = field(default=1000, metadata={"help": "steps of the run"})
    hidden_weight: float = field(default=1.0, metadata={"help": "weight of the loss on hidden states"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding_weight and self.per_device_train_batch_size < 2:
            raise ValueError(
                "--embedding_weight compares the blocks of a batch: --per_device_train_batch_size must be >= 2"
            )


def parse_args(arguments: list[str] | None = None) -> tuple[StudentArguments, TextArguments, Arguments]:
    parser = HfArgumentParser([StudentArguments, TextArguments, Arguments], description=__doc__)
    return parser.parse_args_into_dataclasses(arguments)


def main() -> None:
    student_args, text_args, args = parse_args()
    trainer, results = distil(student_args, text_args, args)
    trainer.model.embeddings.requires_grad_(True)
    trainer.save_model()
    if trainer.is_world_process_zero():
        flags = {**asdict(student_args), **asdict(text_args)}
        write_json(Path(args.output_dir) / RESULTS_FILE, {**results, "arguments": flags})
    if args.push_to_hub:
        trainer.push_to_hub()


def distil(
    student_args: StudentArguments, text_args: TextArguments, args: Arguments
) -> tuple[DistillationTrainer, dict[str, Any]]:
    """Train the student as the arguments say: the trainer that has run, and what the results say.

    Raises:
        ValueError: if arguments, models and text do not fit together.
    """
    set_seed(args.seed)
    teacher_path = student_args.model_name_or_path or str(minilm_folder())
    tokenizer = AutoTokenizer.from_pretrained(teacher_path)
    teacher = load_teacher(teacher_path, text_args.max_seq_length, args.attention_weight > 0).to(args.device)
    with args.main_process_first(desc="tokenize the text"):
        blocks = text_args.blocks(tokenizer, Path(args.output_dir), args.seed)
    checkpoint = checkpoint_of(args.output_dir, args.resume_from_checkpoint)
    # A checkpoint brings the weights, so that a little text will do.
    calibration = blocks.calibration(1 if checkpoint else text_args.calibration_tokens)
    started = time.perf_counter()
    student = make_student(student_args, teacher, calibration, attention_of(args.attention_weight > 0))
    calibration_seconds = time.perf_counter() - started
    check_same_shape(student.config, teacher.config)
    student.embeddings.requires_grad_(not student_args.freeze_embeddings)
    # Dropout off in both: the student is to hit the teacher's states, and noise in either only blurs them. The student
    # is in training mode all the same: gradient checkpointing works in that mode only.
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer = DistillationTrainer(
        student.train(),
        args,
        teacher=teacher,
        train_dataset=Batches(
            lambda number: blocks.batch(number, args.per_device_train_batch_size, args.process_index, args.world_size),
            args.max_steps * args.gradient_accumulation_steps,
        ),
        processing_class=tokenizer,
        figures_of=lambda model: evaluate_states(
            trainer.accelerator, model, teacher, blocks, args.per_device_eval_batch_size
        ),
    )
    before = None if checkpoint else trainer.evaluate()
    seconds = {"calibration": round(calibration_seconds, 1)}
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        seconds["training"] = round(result.metrics["train_runtime"], 1)
    return trainer, {
        **trainer.results(),
        "teacher": teacher_path,
        "text_tokens": blocks.blocks.size,
        "before_training": before,
        "seconds": seconds,
    }


def load_teacher(path: str, max_seq_length: int, attention_weights: bool) -> BertModel | MPNetModel:
    """The BERT, or the MPNet.

    Raises:
        ValueError: if it is another kind of model, or takes no sequences of that length.
    """
    config = AutoConfig.from_pretrained(path)
    if config.model_type not in TEACHERS:
        raise ValueError(
            f"--model_name_or_path must be a BERT or an MPNet, {path} is of the type {config.model_type!r}"
        )
    positions = config.max_position_embeddings
    if config.model_type == "mpnet":
        positions -= config.pad_token_id + 1  # those of padding
    if max_seq_length > positions:
        raise ValueError(
            f"--max_seq_length must be at most {positions}, the positions that {path} has; got {max_seq_length}"
        )
    # transformers' MPNet has no other attention.
    attention = "eager" if config.model_type == "mpnet" else attention_of(attention_weights)
    return TEACHERS[config.model_type].from_pretrained(path, attn_implementation=attention, dtype=torch.float32).eval()


def attention_of(attention_weights: bool) -> str:
    """The implementation of attention: only the eager one can return its weights."""
    return "eager" if attention_weights else "sdpa"


def make_student(
    args: StudentArguments,
    teacher: BertModel | MPNetModel,
    batches: list[dict[str, torch.Tensor]],
    attention: str,
) -> PreTrainedModel:
    """The SNN-BERT that training starts from, with that implementation of attention."""
    settings = parse_settings(args.config_overrides)
    if args.student_name_or_path:
        settings |= {"attn_implementation": attention, "dtype": torch.float32}
        return SNNBertModel.from_pretrained(args.student_name_or_path, **settings).to(teacher.device)
    student = convert_bert(teacher, batches, args.firing_rate, threshold_per=args.threshold_per, **settings)
    student.set_attn_implementation(attention)
    return student


def evaluate_states(
    accelerator: Accelerator, model: torch.nn.Module, teacher: PreTrainedModel, blocks: TextBlocks, batch_size: int
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
