"""`snn-bert serve` under load over loopback, beside the same model called in batches.

    python benchmarks/serving.py --model_name_or_path my-model --data_file texts.txt --clients 1 8 32

Each client sends its next request when it has the answer to the last one. The clients run in a process of their own on
the same processor as the server, so what they take is missing there. Every answer is compared with what the model says
to that text by itself; one that is lost, late or another text's ends the program with exit code 1. Prints a table; with
`--output_file` it is written as JSON too.
"""

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from report import Table, write_results

from modeling_snn_bert.commands.classifier import TextClassifier
from modeling_snn_bert.commands.common import load_classifier
from modeling_snn_bert.commands.predict import predict_all
from modeling_snn_bert.event_kernels import WEIGHT_TYPES
from modeling_snn_bert.text_files import read_texts

# How far a probability may be from that of the text by itself: in another batch sums are rounded otherwise, and a
# potential that lies at its threshold makes a spike more or less. The largest difference is printed.
TOLERANCE = 0.05
SECONDS = 120.0


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="a spiking classifier: folder or Hub id")
    parser.add_argument("--data_file", type=Path, required=True, help="texts, as for `snn-bert predict`")
    parser.add_argument("--text_column", help="the column of texts (default: found by its name)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="clients at once")
    parser.add_argument("--texts_per_request", type=int, nargs="+", default=[1])
    parser.add_argument("--max_samples", type=int, default=1000, help="texts that are sent, each once")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--weight_dtype", choices=WEIGHT_TYPES, default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the model, in batches and served")
    parser.add_argument("--output_file", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    torch.set_num_threads(args.threads)
    texts = read_texts(args.data_file, args.text_column)[: args.max_samples]
    classifier = TextClassifier(*load_classifier(args.model_name_or_path, None), args.weight_dtype)
    expected = [prediction.scores for text in texts for prediction in classifier([text])]
    # In the order of their lengths, as `predict` runs them, and as they come, as a server has to.
    rows: list[dict[str, Any]] = []
    for name, size in (("in batches, sorted by length", len(texts)), ("in batches, as they come", args.batch_size)):
        started = time.perf_counter()
        for start in range(0, len(texts), size):
            predict_all(classifier, texts[start : start + size], args.batch_size)
        rows.append({"what": name, "texts_per_second": len(texts) / (time.perf_counter() - started)})
    command = [sys.executable, "-m", "modeling_snn_bert", "serve", args.model_name_or_path, "--port", "0"]
    command += ["--batch_size", str(args.batch_size), "--weight_dtype", args.weight_dtype]
    surroundings = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=surroundings) as server:
        try:
            assert server.stdout is not None
            address = re.search(r"http://\S+", server.stdout.readline())
            if address is None:
                raise SystemExit("the server did not start")
            for count in args.clients:
                for size in args.texts_per_request:
                    rows.append(asyncio.run(under_load(address[0], texts, expected, count, size)))
        finally:
            server.terminate()
    for row in rows:
        row["of_batches"] = row["texts_per_second"] / rows[1]["texts_per_second"]
    lengths = [len(classifier.tokenizer(text)["input_ids"]) for text in texts]
    table = Table(
        "Texts a second, served and in batches",
        {
            "what": "",
            "texts_per_second": "texts a second",
            "of_batches": "of the batches' (as they come)",
            "median_milliseconds": "median, ms",
            "p95_milliseconds": "p95, ms",
        },
        rows,
        [
            f"{len(texts)} texts of {statistics.mean(lengths):.1f} tokens on average, batches of at most "
            f"{args.batch_size}, {args.weight_dtype} weights, {args.threads} threads; all answers came, the "
            f"probabilities within {max(row.get('largest_difference', 0.0) for row in rows):.1e} of a text by itself"
        ],
    )
    print(table.markdown())
    if args.output_file is not None:
        write_results(args.output_file, vars(args), [table])


async def under_load(
    address: str, texts: list[str], expected: list[list[float]], clients: int, texts_per_request: int
) -> dict[str, Any]:
    """Sends each text once, from so many clients at once; returns throughput and latencies in seconds."""
    starts = iter(range(0, len(texts), texts_per_request))
    latencies: list[float] = []
    answered, largest = 0, 0.0

    async def client(session: httpx.AsyncClient) -> None:
        nonlocal answered, largest
        for start in starts:
            sent = texts[start : start + texts_per_request]
            begun = time.perf_counter()
            response = await session.post("/predict", json={"texts": sent, "all_scores": True})
            latencies.append(time.perf_counter() - begun)
            if response.status_code != 200:
                raise SystemExit(f"the request for {sent} got {response.status_code}: {response.text}")
            found = [list(row["scores"].values()) for row in response.json()["predictions"]]
            wanted = expected[start : start + texts_per_request]
            difference = (torch.tensor(found) - torch.tensor(wanted)).abs().max().item()
            if difference > TOLERANCE:
                raise SystemExit(f"the answer to {sent} is {difference:.1e} from that of the model")
            answered += len(sent)
            largest = max(largest, difference)

    async with httpx.AsyncClient(base_url=address, timeout=SECONDS) as session:
        await session.get("/health")
        begun = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        seconds = time.perf_counter() - begun
    if answered != len(texts):
        raise SystemExit(f"{len(texts) - answered} texts got no answer")
    p95 = statistics.quantiles(latencies, n=20, method="inclusive")[-1] if len(latencies) > 1 else latencies[0]
    return {
        "what": f"served, {clients} clients, {texts_per_request} texts a request",
        "clients": clients,
        "texts_per_request": texts_per_request,
        "texts_per_second": len(texts) / seconds,
        "largest_difference": largest,
        "median_milliseconds": 1000 * statistics.median(latencies),
        "p95_milliseconds": 1000 * p95,
    }


if __name__ == "__main__":
    main()
