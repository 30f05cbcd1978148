"""What tests/test_hub.py runs in processes of their own, against the hub of hub_server.py:

    python tests/hub_clients.py publish FOLDER    pushes everything, with the package, and has uploads fail
    python tests/hub_clients.py read FOLDER       loads everything without it, and has downloads fail
    python tests/hub_clients.py train FOLDER      trains on a dataset of the hub, whole and as a stream

FOLDER holds what the test has put there; results.json and what the models returned go to the same place.
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import transformers
from hub_server import TOKEN, counts, order

HUB = os.environ.get("HF_ENDPOINT", "")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TRUST = {"trust_remote_code": True}
# Uploads that fail: what is ordered, and whether huggingface_hub tries again by itself.
UPLOAD_FAULTS = {
    "preupload 401": ({"route": "preupload", "status": 401}, False),
    "preupload 403": ({"route": "preupload", "status": 403}, False),
    "commit 404": ({"route": "commit", "status": 404, "code": "RepoNotFound"}, False),
    "commit 409": ({"route": "commit", "status": 409}, False),
    "commit 429": ({"route": "commit", "status": 429, "retry_after": 0}, False),
    "commit broken off": ({"route": "commit", "kind": "break"}, False),
    "preupload 429, then success": ({"route": "preupload", "status": 429, "retry_after": 0}, True),
    "upload 500, then success": ({"route": "lfs_upload", "status": 500}, True),
    "upload broken off, then success": ({"route": "lfs_upload", "kind": "break"}, True),
}
WEIGHTS = {"route": "resolve", "command": "GET", "path": "model.safetensors"}
DOWNLOAD_FAULTS = {
    "weights 401": ({**WEIGHTS, "status": 401}, False),
    "weights 403": ({**WEIGHTS, "status": 403}, False),
    "weights 404": ({**WEIGHTS, "status": 404, "code": "EntryNotFound"}, False),
    "weights 409": ({**WEIGHTS, "status": 409}, False),
    "weights 500": ({**WEIGHTS, "status": 500}, False),
    "weights broken off, then success": ({**WEIGHTS, "kind": "break"}, True),
    "weights 429, then success": ({**WEIGHTS, "status": 429, "retry_after": 0}, True),
    "weights truncated, then the rest": ({**WEIGHTS, "kind": "truncate"}, True),
}


def publish(folder):
    """Push a model twice, a tokenizer, a Trainer's run, an adapter and a private model; then let uploads fail."""
    import datasets
    import peft

    import modeling_snn_bert as snn

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = snn.SNNBertConfig(vocab_size=120, max_position_embeddings=64, initializer_range=0.1, **sizes)
    model = snn.SNNBertForSequenceClassification(config).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    sentences = json.loads((folder / "sentences.json").read_text())
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    torch.save(dict(inputs), folder / "inputs.pt")
    results = {}

    def remember(name, some_model):
        with torch.no_grad():
            outputs = some_model.eval()(**inputs, output_firing_rates=True)
        assert all(0 < rate.mean() < 1 for rate in outputs.firing_rates)
        torch.save(outputs.logits, folder / f"{name}.pt")

    tokenizer.push_to_hub("tester/classifier")
    results["first"] = model.push_to_hub("tester/classifier", commit_message="the first weights").oid
    remember("first", model)
    torch.nn.init.normal_(model.classifier.weight)
    saved = folder / "again"
    model.save_pretrained(saved, push_to_hub=True, repo_id="tester/classifier", commit_message="the second weights")
    remember("second", model)
    results["secret"] = model.push_to_hub("tester/secret", private=True).oid

    rows = datasets.Dataset.from_dict(dict(inputs)).add_column("labels", [i % 2 for i in range(len(sentences))])
    arguments = transformers.TrainingArguments(
        str(folder / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        push_to_hub=True,
        hub_model_id="tester/trained",
        hub_strategy="end",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.push_to_hub()
    remember("trained", trainer.model)

    base = snn.SNNBertForSequenceClassification.from_pretrained("tester/classifier", revision=results["first"])
    lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], modules_to_save=["classifier"])
    adapted = peft.get_peft_model(base, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    results["adapter"] = adapted.push_to_hub("tester/adapter").oid
    remember("adapter", adapted)

    results["script"], results["faults"] = push_by_script(model, tokenizer, folder)
    return results


def push_by_script(model, tokenizer, folder):
    """examples/push_to_hub.py: what it prints and returns, undisturbed and with each of the faults."""
    spec = importlib.util.spec_from_file_location("push_to_hub", EXAMPLES / "push_to_hub.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    source = folder / "by_script"
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    shutil.copy(folder / "training_args.bin", source)

    def run(*arguments):
        printed, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            try:
                code = script.main(["--model_name_or_path", str(source), *map(str, arguments)])
            except SystemExit as error:
                code = error.code
        return {"code": code, "printed": printed.getvalue(), "errors": errors.getvalue()}

    def requests():
        return sum(counts(HUB).values()) - counts(HUB)["counts"]

    before = requests()
    card = ["--report", folder / "report.json", "--license", "apache-2.0"]
    script_results = {"dry_run": run("--dry_run", *card)}
    script_results["dry_run"]["requests"] = requests() - before
    to = ["--repo_id", "tester/by-script"]
    script_results["main"] = run(*to, "--private", "--commit_message", "sent by the script")
    script_results["branch"] = run(*to, "--revision", "candidate", "--commit_message", "a candidate")
    script_results["namespace"] = run("--repo_id", "somebody-else/model")
    script_results["bad_name"] = run("--repo_id", "a/b/c")
    script_results["bad_token"] = run(*to, "--token", "another-made-up-word")

    faults = {}
    for name, (fault, _) in UPLOAD_FAULTS.items():
        with torch.no_grad():
            model.classifier.bias.add_(1.0)
        model.save_pretrained(source)
        order(HUB, **fault)
        before = counts(HUB)
        result = run(*to, "--commit_message", name)
        # The route that failed and the commits, in this try alone.
        route = fault["route"]
        seen = counts(HUB)
        result["requests"] = seen[route] - before[route]
        order(HUB, route, times=0)
        if result["code"]:
            result["second"] = run(*to, "--commit_message", f"{name}, second try")
        faults[name] = result
    return script_results, faults


def read(folder):
    """Load everything at pinned revisions; then let downloads fail."""
    results = json.loads((folder / "results.json").read_text())
    inputs = torch.load(folder / "inputs.pt")
    loaded = {}
    for auto_class in json.loads((folder / "auto_classes.json").read_text()):
        model = getattr(transformers, auto_class).from_pretrained(
            "tester/classifier", revision=results["first"], ignore_mismatched_sizes=True, **TRUST
        )
        loaded[auto_class] = [type(model).__name__, type(model).__module__.split(".")[0]]
    tokenizer = transformers.AutoTokenizer.from_pretrained("tester/classifier", revision=results["first"], **TRUST)
    loaded["tokens"] = tokenizer("It rained all night.")["input_ids"]

    def logits(model):
        with torch.no_grad():
            return model.eval()(**inputs).logits

    def load(repository, revision="main", **kwargs):
        auto_class = transformers.AutoModelForSequenceClassification
        return auto_class.from_pretrained(repository, revision=revision, **TRUST, **kwargs)

    def same(name, model):
        return bool(torch.equal(logits(model), torch.load(folder / f"{name}.pt")))

    loaded["first"] = same("first", load("tester/classifier", results["first"]))
    loaded["second"] = same("second", load("tester/classifier"))
    loaded["secret"] = same("second", load("tester/secret", results["secret"]))
    loaded["trained"] = same("trained", load("tester/trained"))
    import peft

    base = load("tester/classifier", results["first"])
    loaded["adapter"] = same(
        "adapter", peft.PeftModel.from_pretrained(base, "tester/adapter", revision=results["adapter"])
    )
    pipeline = transformers.pipeline("text-classification", "tester/trained", device="cpu", **TRUST)
    loaded["pipeline"] = pipeline("It rained all night.")[0]["label"]

    def error_of(*arguments, **kwargs):
        try:
            load(*arguments, **kwargs)
        except Exception as error:
            return [type(error).__name__, str(error)]
        return None

    errors = {
        "no such repository": error_of("tester/nothing"),
        "no such revision": error_of("tester/classifier", "0" * 40),
        "private, no token": error_of("tester/secret", token=False, cache_dir=folder / "stranger"),
        "private, another token": error_of("tester/secret", token="another-word", cache_dir=folder / "stranger"),
    }
    faults = {}
    for name, (fault, _) in DOWNLOAD_FAULTS.items():
        cache = folder / "caches" / name
        order(HUB, **fault)
        before = counts(HUB)["resolve"]
        error = error_of("tester/classifier", results["first"], cache_dir=cache)
        found = {path.name: path.stat().st_size for path in cache.rglob("snapshots/*/model.safetensors")}
        order(HUB, "resolve", times=0)
        faults[name] = {"error": error, "found": found, "requests": counts(HUB)["resolve"] - before}
        faults[name]["second"] = same("first", load("tester/classifier", results["first"], cache_dir=cache))

    # Damage in the cache, which the Hub cannot know of.
    (weights,) = cache.rglob("snapshots/*/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-9] ^= 16
    weights.resolve().write_bytes(content)
    errors["damaged in the cache"] = error_of("tester/classifier", results["first"], cache_dir=cache)
    again = load("tester/classifier", results["first"], cache_dir=cache, force_download=True)
    loaded["after damage"] = same("first", again)
    return {"loaded": loaded, "errors": errors, "faults": faults}


def train(folder):
    """Train on `tester/reviews`, whole and as a stream: the rows and the losses of both."""
    import datasets

    import modeling_snn_bert as snn

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = snn.SNNBertConfig(vocab_size=120, max_position_embeddings=64, initializer_range=0.1, **sizes)
    results = {}
    for streaming in (False, True):
        rows = datasets.load_dataset("tester/reviews", split="train", streaming=streaming)
        data = rows.map(
            lambda row: {**tokenizer(row["sentence"]), "labels": row["label"]}, remove_columns=["sentence", "label"]
        )
        torch.manual_seed(0)
        model = snn.SNNBertForSequenceClassification(config)
        arguments = transformers.TrainingArguments(
            str(folder / "run-on-data"),
            max_steps=3,
            per_device_train_batch_size=2,
            train_sampling_strategy="sequential",
            logging_steps=1,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        collate = transformers.DataCollatorWithPadding(tokenizer)
        trainer = transformers.Trainer(model, arguments, train_dataset=data, data_collator=collate)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results["stream" if streaming else "whole"] = {"rows": list(rows), "losses": losses}
    return results


if __name__ == "__main__":
    assert os.environ["HF_TOKEN"] == TOKEN
    action, folder = sys.argv[1], Path(sys.argv[2])
    if action == "read":
        sys.path.insert(0, str(EXAMPLES))
        from classify import BlockPackage

        sys.meta_path.insert(0, BlockPackage())
    found = {"publish": publish, "read": read, "train": train}[action](folder)
    names = {"publish": "results.json", "read": "read.json", "train": "train.json"}
    (folder / names[action]).write_text(json.dumps(found, indent=1))
