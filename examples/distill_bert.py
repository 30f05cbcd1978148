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
from typing import Literal

import torch
from accelerate.utils import gather_object
from fetch_inputs import minilm_folder
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, PreTrainedModel, set_seed
from transformers.hf_argparser import HfArg

from modeling_snn_bert import SNNBertModel
from modeling_snn_bert.batches import Batches
from modeling_snn_bert.commands.common import load_bert
from modeling_snn_bert.conversion import convert_bert, initialize_from_bert
from modeling_snn_bert.distillation import check_same_shape, embedding_loss, hidden_state_loss
from modeling_snn_bert.seeds import checkpoint_of
from modeling_snn_bert.settings import ConversionArguments, refuse_given
from modeling_snn_bert.teacher_inputs import longest_input
from modeling_snn_bert.text_blocks import TextArguments, TextBlocks
from modeling_snn_bert.trainer import DistillationTrainer, DistillationTrainingArguments

RESULTS_FILE = "distillation_results.json"


@dataclass
class StudentArguments(ConversionArguments):
    """Teacher and student."""

    model_name_or_path: str | None = HfArg(default=None, help="the BERT or MPNet (default: all-MiniLM-L6-v2)")
    student_name_or_path: str | None = HfArg(default=None, help="an SNN-BERT to go on from, in place of a new one")
    threshold_per: Literal["channel", "layer"] = HfArg(
        default="channel", help="at calibration, a threshold for each channel, or one for a neuron layer"
    )


@dataclass
class Arguments(DistillationTrainingArguments):
    """DistillationTrainingArguments for a run on text: hidden states are taught."""

    learning_rate: float = HfArg(default=5e-4, help="of all but the neurons")
    max_steps: int = HfArg(default=1000, help="steps of the run")
    hidden_weight: float = HfArg(default=1.0, help="weight of the loss on hidden states")
    # There are no logits, so that there are no flags of their loss.
    logit_weight: float = field(default=0.0, init=False)
    temperature: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding_weight and self.per_device_train_batch_size < 2:
            raise ValueError(
                "--embedding_weight compares the blocks of a batch: --per_device_train_batch_size must be >= 2"
            )


def main() -> None:
    parser = HfArgumentParser([StudentArguments, TextArguments, Arguments], description=__doc__)
    student_args, text_args, args = parser.parse_args_into_dataclasses()
    student_path, settings = student_args.student_name_or_path, student_args.settings()
    if student_path:
        of_conversion = ["firing_rate", "threshold_per", "calibration_tokens"]
        refuse_given(parser, of_conversion, "is of a new student: leave it out, or --student_name_or_path")
    set_seed(args.seed)
    teacher_path = student_args.model_name_or_path or str(minilm_folder())
    tokenizer = AutoTokenizer.from_pretrained(teacher_path)
    teacher = load_encoder_teacher(teacher_path, text_args.max_seq_length, args.attention_weight > 0).to(args.device)
    attention = "eager" if args.attention_weight else "sdpa"
    if student_path:
        settings |= {"attn_implementation": attention, "dtype": torch.float32}
        student = SNNBertModel.from_pretrained(student_path, **settings).to(args.device)
    else:
        # An uncalibrated copy refuses bad settings before the work.
        student = initialize_from_bert(teacher, **settings)
    check_same_shape(student.config, teacher.config)
    checkpoint = checkpoint_of(args.output_dir, args.resume_from_checkpoint)
    with args.main_process_first(desc="tokenize the text"):
        blocks = text_args.blocks(tokenizer, args.seed)
    started = time.perf_counter()
    if not student_path:
        # A checkpoint brings the weights, so that a little text will do.
        calibration = blocks.calibration(1 if checkpoint else text_args.calibration_tokens)
        rate, threshold_per = student_args.firing_rate, student_args.threshold_per
        student = convert_bert(teacher, calibration, rate, threshold_per=threshold_per, **settings)
        student.set_attn_implementation(attention)
    calibration_seconds = time.perf_counter() - started
    # Dropout off in both: the student is to hit the teacher's states, and noise in either only blurs them. The student
    # is in training mode all the same: gradient checkpointing works in that mode only.
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer = DistillationTrainer(
        student.train(),
        args,
        teacher=teacher,
        train_dataset=Batches.of_run(blocks.of_run(args), args),
        processing_class=tokenizer,
        figures_of=lambda model: evaluate_states(trainer, model, blocks),
    )
    before = None if checkpoint else trainer.evaluate()
    training_seconds = trainer.train_as_told()
    results = {
        **trainer.results(),
        "teacher": teacher_path,
        "text_tokens": blocks.blocks.size,
        "before_training": before,
        "seconds": {"calibration": round(calibration_seconds, 1), "training": training_seconds},
        "arguments": {**asdict(student_args), **asdict(text_args)},
    }
    trainer.save_run(RESULTS_FILE, results)


def load_encoder_teacher(path: str, max_seq_length: int, attention_weights: bool) -> PreTrainedModel:
    """The BERT, or the MPNet.

    Raises:
        ValueError: if it is another kind of model, or takes no sequences of that length.
    """
    config = AutoConfig.from_pretrained(path)
    # transformers' MPNet has no other attention.
    attention = "eager" if config.model_type == "mpnet" or attention_weights else "sdpa"
    teacher = load_bert(path, "Model", None, attn_implementation=attention, dtype=torch.float32)
    positions = longest_input(config)
    if positions is not None and max_seq_length > positions:
        raise ValueError(
            f"--max_seq_length must be at most {positions}, the positions that {path} has; got {max_seq_length}"
        )
    return teacher


def evaluate_states(trainer: DistillationTrainer, model: PreTrainedModel, blocks: TextBlocks) -> dict[str, float]:
    """On the held-out blocks: loss over all layers, of the last one and of its mean, and the mean firing rate."""
    args, totals = trainer.args, torch.zeros(4, device=model.device)
    embeddings, wanted_embeddings = [], []
    for batch in blocks.validation(args.per_device_eval_batch_size, args.process_index, args.world_size):
        batch = {name: x.to(model.device) for name, x in batch.items()}
        wanted = trainer.ask_teacher(batch, output_hidden_states=True).hidden_states
        outputs = model(**batch, output_hidden_states=True, output_firing_rates=True)
        states, rows = outputs.hidden_states, len(batch["input_ids"])
        rate = torch.stack([rate.mean() for rate in outputs.firing_rates]).mean()
        figures = [hidden_state_loss(states, wanted), hidden_state_loss(states[-2:], wanted[-2:]), rate]
        totals += rows * torch.stack([*figures, torch.ones_like(rate)])
        embeddings += outputs.last_hidden_state.float().mean(1).tolist()
        wanted_embeddings += wanted[-1].float().mean(1).tolist()
    loss, last_layer_loss, rate, rows = trainer.accelerator.reduce(totals, reduction="sum").tolist()
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
