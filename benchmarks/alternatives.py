"""What a user would choose instead of an SNN-BERT: sentence encoders side by side on one machine, on a CPU.

    python benchmarks/alternatives.py --data_dir glue                           all of them
    python benchmarks/alternatives.py --data_dir glue --subjects minilm_float32 snn_int8 --figures speed

All are used through sentence-transformers. all-MiniLM-L6-v2 runs in PyTorch, in ONNX Runtime (int8, quantized
dynamically) and in OpenVINO (int8, quantized statically on training sentences of STS-B); static embeddings are
distilled from it by model2vec; SNN-BERT is this repository's snn-bert-minilm-sentences. `--data_dir` holds GLUE's
STS-B in its standard layout. A subject whose packages are missing is left out, and the program says why:

    pip install ".[examples,alternatives]" sentence-transformers

The ready-made backends "onnx" and "openvino" of sentence-transformers need optimum-onnx and optimum-intel, no version
of which goes with the transformers of constraints.txt. So the same two runtimes are called by themselves here, and
pooling, batching and sorting stay those of sentence-transformers.

The models are built once and kept in `--model_dir`. Writes alternatives.json.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import (
    check_firing_rate,
    in_fresh_process,
    interleaved_seconds,
    onnx_session,
    peak_resident_bytes,
    quantized_onnx,
    ratio,
    spread,
)
from report import Table, write_results
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import InputModule, Pooling, StaticEmbedding
from transformers import AutoConfig, AutoTokenizer, BertModel, PreTrainedTokenizerBase

from modeling_snn_bert import SNNBertModel
from modeling_snn_bert.atomic_writes import folder_written_whole, write_json
from modeling_snn_bert.energy import energy_report, tokenized_batches
from modeling_snn_bert.energy.operation_counts import MemoryTraffic, ModelCost, OperationCount
from modeling_snn_bert.export import export_onnx
from modeling_snn_bert.muon import multiplies_bfloat16_fast

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from distilled_checkpoint import HUB_CONFIGS, NAMES, unpack
from fetch_inputs import minilm_folder
from glue_tasks import TASKS, read_glue_folder, score

REFERENCE = "minilm_float32"
SOURCES = ("bert", "snn_bert")
FIGURES = ("accuracy", "speed", "memory", "energy")
BATCH_SIZES = (1, 32)
INPUT_NAMES = ("input_ids", "attention_mask")
# Sentences that OpenVINO's quantization is calibrated on.
CALIBRATION_SENTENCES = 300
# Width of the static embeddings, model2vec's own choice.
STATIC_WIDTH = 256
# A runtime's embeddings have at least this mean cosine with those of PyTorch in float32; a wrong model has far less.
LEAST_COSINE = 0.9


@dataclasses.dataclass(frozen=True)
class Sources:
    """Folders of the BERT and of the SNN-BERT that all is made of, and sentences to calibrate on."""

    bert: Path
    snn_bert: Path
    calibration: tuple[str, ...]


class RuntimeTransformer(InputModule):
    """The first module of a SentenceTransformer whose BERT runs outside of PyTorch.

    Args:
        folder: of the tokenizer.
        run: takes arrays by the names of `INPUT_NAMES`, returns the last hidden states.
    """

    def __init__(self, folder: Path, run: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.run = run

    def preprocess(self, inputs, prompt=None, **kwargs):
        return dict(self.tokenizer(list(inputs), padding=True, truncation=True, return_tensors="pt"))

    def forward(self, features, **kwargs):
        states = self.run({name: features[name].numpy() for name in INPUT_NAMES})
        return {**features, "token_embeddings": torch.from_numpy(states)}

    def save(self, output_path, *args, **kwargs) -> None:
        self.tokenizer.save_pretrained(output_path)


def build_minilm(sources: Sources, target: Path, dtype: torch.dtype) -> None:
    BertModel.from_pretrained(sources.bert, dtype=dtype).save_pretrained(target)
    save_tokenizer(sources, target)


def build_snn_bert(sources: Sources, target: Path) -> None:
    SNNBertModel.from_pretrained(sources.snn_bert, dtype=torch.float32).save_pretrained(target)
    AutoTokenizer.from_pretrained(sources.snn_bert).save_pretrained(target)


def build_onnx(sources: Sources, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        quantized_onnx(export(sources, folder), target / "int8.onnx")
    save_tokenizer(sources, target)


def build_openvino(sources: Sources, target: Path) -> None:
    import nncf
    import openvino

    tokenizer = AutoTokenizer.from_pretrained(sources.bert)
    rows = [tokenizer(sentence, return_tensors="np") for sentence in sources.calibration]
    dataset = nncf.Dataset([{name: row[name] for name in INPUT_NAMES} for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        model = openvino.convert_model(export(sources, folder))
        model = nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))
    openvino.save_model(model, target / "int8.xml")
    save_tokenizer(sources, target)


def build_static(sources: Sources, target: Path) -> None:
    from model2vec.distill import distill

    model = distill(str(sources.bert), device="cpu", pca_dims=STATIC_WIDTH, quantize_to="float32")
    model.save_pretrained(str(target))


def export(sources: Sources, folder: str) -> Path:
    """Write the BERT as ONNX in float32 into `folder`; `export_onnx` holds the file to the model."""
    bert = BertModel.from_pretrained(sources.bert, add_pooling_layer=False).eval()
    return export_onnx(bert, Path(folder, "float32.onnx"), INPUT_NAMES)


def save_tokenizer(sources: Sources, target: Path) -> None:
    """Write the BERT's tokenizer, which cuts texts at what the BERT can take, and its width."""
    config = AutoConfig.from_pretrained(sources.bert)
    tokenizer = AutoTokenizer.from_pretrained(sources.bert)
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    tokenizer.save_pretrained(target)
    config.save_pretrained(target)


def load_torch(folder: Path) -> SentenceTransformer:
    # Without modules of its own a folder gets a Transformer and a mean.
    return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "auto"})


def load_event_driven(folder: Path) -> SentenceTransformer:
    encoder = load_torch(folder)
    transformer: Any = encoder[0]
    transformer.auto_model.to_event_driven("int8")
    return encoder


def load_onnx(folder: Path) -> SentenceTransformer:
    session = onnx_session(folder / "int8.onnx")
    return with_mean(folder, lambda inputs: session.run(None, inputs)[0])


def load_openvino(folder: Path) -> SentenceTransformer:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(folder / "int8.xml", "CPU", settings)
    return with_mean(folder, lambda inputs: compiled(inputs)[0])


def with_mean(folder: Path, run: Callable[[dict[str, Any]], Any]) -> SentenceTransformer:
    width = AutoConfig.from_pretrained(folder).hidden_size
    return SentenceTransformer(modules=[RuntimeTransformer(folder, run), Pooling(width, "mean")], device="cpu")


def load_static(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(modules=[StaticEmbedding.from_model2vec(str(folder))], device="cpu")


@dataclasses.dataclass(frozen=True)
class Subject:
    """One sentence encoder.

    Attributes:
        label: its name in the table.
        build: writes what `load` needs into a folder.
        load: the encoder of such a folder, on as many threads as torch has.
        folder: name of that folder.
        packages: what must be installed to load it.
        tools: what must be installed to build it, beside that.
        cost: its name in the energy report, if that counts it.
        same_states: whether it is to compute what the BERT does.
    """

    label: str
    build: Callable[[Sources, Path], None]
    load: Callable[[Path], SentenceTransformer]
    folder: str
    packages: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    cost: str | None = None
    same_states: bool = True


SUBJECTS = {
    REFERENCE: Subject(
        "MiniLM, PyTorch float32",
        partial(build_minilm, dtype=torch.float32),
        load_torch,
        "minilm-float32",
        cost="BERT, float32",
    ),
    "minilm_bfloat16": Subject(
        "MiniLM, PyTorch bfloat16", partial(build_minilm, dtype=torch.bfloat16), load_torch, "minilm-bfloat16"
    ),
    "minilm_onnx_int8": Subject(
        "MiniLM, ONNX Runtime int8",
        build_onnx,
        load_onnx,
        "minilm-onnx-int8",
        ("onnxruntime",),
        ("onnx", "onnxscript"),
        "BERT, int8",
    ),
    "minilm_openvino_int8": Subject(
        "MiniLM, OpenVINO int8",
        build_openvino,
        load_openvino,
        "minilm-openvino-int8",
        ("openvino",),
        ("onnx", "onnxscript", "onnxruntime", "nncf"),
        "BERT, int8",
    ),
    "static": Subject(
        "static embeddings (model2vec, from MiniLM)",
        build_static,
        load_static,
        "static",
        ("model2vec",),
        ("model2vec.distill",),
        same_states=False,
    ),
    "snn_dense": Subject("SNN-BERT, dense float32", build_snn_bert, load_torch, "snn-bert", same_states=False),
    "snn_int8": Subject(
        "SNN-BERT, event-driven int8",
        build_snn_bert,
        load_event_driven,
        "snn-bert",
        cost="SNN-BERT, int8 weights",
        same_states=False,
    ),
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="GLUE's folder, or that of STS-B")
    parser.add_argument("--bert", type=Path, help="folder of another BERT in the place of MiniLM")
    parser.add_argument("--snn_bert", type=Path, help="folder of another SNN-BERT, of the same shape")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), metavar="SUBJECT")
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="FIGURE")
    parser.add_argument("--sentences", type=int, default=256, help="of the dev set, to time and to count on")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--seed", type=int, default=0, help="which sentences")
    parser.add_argument("--model_dir", type=Path, default=Path("outputs/alternatives"), help="models, once built")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args(arguments)
    for name in ("sentences", "threads", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(args, name)}")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    torch.set_num_threads(args.threads)
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)  # of the tokenizers
    data = read_glue_folder(args.data_dir, TASKS["stsb"])
    dev = data["validation"]
    pairs = list(dev["sentence1"]), list(dev["sentence2"])
    sentences = sample([*pairs[0], *pairs[1]], args.sentences, args.seed)
    calibration = sample([*data["train"]["sentence1"]], CALIBRATION_SENTENCES, args.seed)
    sources = find_sources(args, calibration)
    check_shapes(sources)

    rows: dict[str, dict[str, Any]] = {}
    encoders = {}
    for name in args.subjects:
        subject = SUBJECTS[name]
        reason = missing(name)
        if reason:
            print(f"{subject.label} is left out: {reason}", flush=True)
            continue
        folder = args.model_dir / subject.folder
        if not folder.is_dir():
            with folder_written_whole(folder) as unfinished:
                subject.build(sources, unfinished)
        encoders[name] = subject.load(folder)
        size = sum(path.stat().st_size for path in folder.iterdir())
        rows[name] = {"subject": name, "label": subject.label, "disk_megabytes": size / 1e6}
    if not rows:
        raise SystemExit("no subject is left")
    for name, cosine in cosines_with_reference(encoders, sentences).items():
        rows[name]["mean_cosine"] = cosine
    if "accuracy" in args.figures:
        for name, encoder in encoders.items():
            rows[name]["correlation"] = 100 * correlation(encoder, pairs, [float(x) for x in dev["label"]])
    if "memory" in args.figures:
        for name, row in rows.items():
            folder = args.model_dir / SUBJECTS[name].folder
            peak = in_fresh_process(peak_bytes, args.threads, name, folder, sentences)
            row["peak_mebibytes"] = None if peak is None else peak / 2**20
    if "energy" in args.figures:
        for name, figures in energies(sources, encoders, sentences).items():
            rows[name] |= figures
    if "speed" in args.figures:
        for size in BATCH_SIZES:
            add_speeds(rows, encoders, sentences, size, args.repeats)
    table = Table(
        f"Sentence encoders, {len(sentences)} sentences of STS-B's dev set, {args.threads} threads",
        {
            "label": "model",
            "correlation": "STS-B dev, correlation x 100",
            "sentences_per_second_1": "sentences / s, batch 1",
            "sentences_per_second_32": "sentences / s, batch 32",
            "peak_mebibytes": "peak MiB",
            "disk_megabytes": "MB on disk",
            "arithmetic_microjoules": "arithmetic, uJ",
            "memory_microjoules": "memory traffic, uJ",
        },
        list(rows.values()),
        [
            "Correlation: mean of Pearson and Spearman, no training. Speed: medians of interleaved rounds (quartiles), "
            "text to embedding. Peak: what loading and encoding add to a fresh process with the libraries imported. "
            "Energy: an estimate by counting, at 45 nm, of a mean sentence at batch 1; nothing is measured."
        ],
    )
    print(table.markdown())
    used = {package for name in rows for package in (*SUBJECTS[name].packages, *SUBJECTS[name].tools)}
    packages = sorted({package.partition(".")[0] for package in used})
    versions = {name: importlib.metadata.version(name) for name in ["sentence-transformers", *packages]}
    write_results(args.output_dir / "alternatives.json", vars(args), [table], packages=versions)


def sample(texts: list[str], count: int, seed: int) -> list[str]:
    """`count` different texts of `texts`, or all if there are fewer."""
    texts = sorted(set(texts))
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return [texts[i] for i in order[:count].tolist()]


def find_sources(args: argparse.Namespace, calibration: list[str]) -> Sources:
    """The models that all is made of; an end with a message if `--model_dir` holds models of others."""
    note = args.model_dir / "sources.json"
    given = {name: str(folder.resolve()) if folder else None for name, folder in vars(args).items() if name in SOURCES}
    if not note.exists():
        write_json(note, given)
    kept = json.loads(note.read_text(encoding="utf-8"))
    if kept != given:
        raise SystemExit(
            f"--model_dir {args.model_dir} holds models made of {kept}, not of {given}: give another folder"
        )
    snn_bert = args.snn_bert or args.model_dir / NAMES[1]
    if not snn_bert.is_dir():
        model, tokenizer = unpack(HUB_CONFIGS / NAMES[1])
        with folder_written_whole(snn_bert) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    return Sources(args.bert or minilm_folder(), snn_bert, tuple(calibration))


def check_shapes(sources: Sources) -> None:
    """An end with a message unless BERT and SNN-BERT have the same shape, which the energy report takes for given."""
    names = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size".split()
    configs = [AutoConfig.from_pretrained(folder) for folder in (sources.bert, sources.snn_bert)]
    bert, snn_bert = ({name: getattr(config, name) for name in names} for config in configs)
    if bert != snn_bert:
        raise SystemExit(f"--bert and --snn_bert must have the same shape, got {bert} and {snn_bert}")


def missing(name: str) -> str | None:
    """Why the subject `name` cannot be had here, or `None` if it can."""
    if name == "minilm_bfloat16" and not multiplies_bfloat16_fast(torch.device("cpu")):
        return "the processor has no instructions for bfloat16"
    try:
        for package in (*SUBJECTS[name].packages, *SUBJECTS[name].tools):
            importlib.import_module(package)
    except ImportError as error:
        return f'{error}; pip install ".[alternatives]"'
    return None


def encode(encoder: SentenceTransformer, sentences: list[str], batch_size: int) -> torch.Tensor:
    """Embeddings of `sentences`, `[sentences, width]`, in float32; with a batch size of 1, a call for each."""
    parts = [sentences] if batch_size > 1 else [[sentence] for sentence in sentences]
    settings: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": False, "convert_to_tensor": True}
    return torch.cat([encoder.encode(part, **settings).float() for part in parts])


def cosines_with_reference(encoders: dict[str, SentenceTransformer], sentences: list[str]) -> dict[str, float]:
    """Mean cosine of each runtime's embeddings with those of the BERT in PyTorch.

    Raises:
        RuntimeError: if one does not compute what the BERT does.
    """
    if REFERENCE not in encoders:
        return {}
    wanted = encode(encoders[REFERENCE], sentences, BATCH_SIZES[-1])
    cosines = {}
    for name in (name for name in encoders if SUBJECTS[name].same_states and name != REFERENCE):
        embeddings = encode(encoders[name], sentences, BATCH_SIZES[-1])
        cosines[name] = torch.cosine_similarity(embeddings, wanted).mean().item()
        if not cosines[name] >= LEAST_COSINE:
            raise RuntimeError(f"{name} has a mean cosine of {cosines[name]:.3f} with {REFERENCE}: it is another model")
    return cosines


def correlation(encoder: SentenceTransformer, pairs: tuple[list[str], list[str]], labels: list[float]) -> float:
    """STS-B's score of the cosines of `pairs`."""
    first, second = (encode(encoder, sentences, BATCH_SIZES[-1]) for sentences in pairs)
    return score(TASKS["stsb"], torch.cosine_similarity(first, second)[:, None].tolist(), labels)["combined"]


def peak_bytes(name: str, folder: Path, sentences: list[str]) -> int | None:
    """What loading the subject and encoding add to the resident memory of this process at most."""
    for package in SUBJECTS[name].packages:
        importlib.import_module(package)

    def load_and_encode() -> None:
        encoder = SUBJECTS[name].load(folder)
        for size in BATCH_SIZES:
            encode(encoder, sentences, size)

    return peak_resident_bytes(load_and_encode)


def energies(
    sources: Sources, encoders: dict[str, SentenceTransformer], sentences: list[str]
) -> dict[str, dict[str, float]]:
    """Estimates for a mean sentence, by the energy report; for static embeddings by the same table."""
    model = SNNBertModel.from_pretrained(sources.snn_bert).eval()
    batches = tokenized_batches(model, AutoTokenizer.from_pretrained(sources.snn_bert), sentences, BATCH_SIZES[-1])
    report = energy_report(model, batches, run_lengths=False)
    for name, rate in report.firing_rates().items():
        check_firing_rate(name, rate)
    costs: dict[str | None, ModelCost] = {cost.name: cost for cost in report.costs}
    found = {}
    for name, encoder in encoders.items():
        cost = costs.get(SUBJECTS[name].cost)
        if isinstance(encoder[0], StaticEmbedding):
            width = encoder[0].embedding_dim
            tokens = len(encoder[0].preprocess(sentences)["input_ids"]) / len(sentences)
            # The vectors added up, and the sum divided by their number.
            count = OperationCount("embeddings", additions=tokens * width, multiplications=width)
            cost = ModelCost(name, "", [count], MemoryTraffic(4 * tokens * width, 0.0))
        if cost is not None:
            found[name] = {
                "matrix_product_microjoules": cost.matrix_product_picojoules / 1e6,
                "arithmetic_microjoules": cost.picojoules / 1e6,
                "memory_microjoules": cost.memory.picojoules / 1e6,
            }
    return found


def add_speeds(
    rows: dict[str, dict[str, Any]],
    encoders: dict[str, SentenceTransformer],
    sentences: list[str],
    batch_size: int,
    repeats: int,
) -> None:
    """Add sentences per second at `batch_size` to `rows`, and the speed relative to `REFERENCE` round by round."""
    samples = interleaved_seconds(
        {name: partial(encode, encoder, sentences, batch_size) for name, encoder in encoders.items()}, repeats
    )
    for name, seconds in samples.items():
        rows[name][f"sentences_per_second_{batch_size}"] = spread([len(sentences) / x for x in seconds])
        if REFERENCE in samples:
            rows[name][f"speedup_{batch_size}"] = ratio(samples, REFERENCE, name)


if __name__ == "__main__":
    main()
