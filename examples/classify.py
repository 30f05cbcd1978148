"""Classify sentences with a saved SNN-BERT, loaded as any user would load it: from a folder or a Hub id, through the
Auto classes, with the code that travels with the checkpoint.

    python examples/classify.py --model_name_or_path outputs/quickstart/model "a joy from start to end" "dull"
"""

import argparse
import importlib.abc
import json
import sys
from pathlib import Path


class BlockPackage(importlib.abc.MetaPathFinder):
    """Makes an installed `modeling_snn_bert` invisible, so that only the checkpoint's own code can be used."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_snn_bert":
            raise ModuleNotFoundError(f"{name} is blocked by --without_package")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", nargs="+", help="sentences to classify")
    parser.add_argument("--model_name_or_path", required=True, help="folder of a checkpoint, or Hub id")
    parser.add_argument("--revision", default="main", help="revision on the Hub; pins code and weights")
    parser.add_argument("--without_package", action="store_true", help="block an installed modeling_snn_bert")
    parser.add_argument("--output_file", type=Path, help="write sentences, labels, scores and logits as JSON")
    args = parser.parse_args()
    if args.without_package:
        sys.meta_path.insert(0, BlockPackage())

    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    source = {"revision": args.revision, "trust_remote_code": True}
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, **source)
    model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, **source).eval()
    with torch.no_grad():
        logits = model(**tokenizer(args.sentences, padding=True, truncation=True, return_tensors="pt")).logits
    classifier = pipeline("text-classification", model=model, tokenizer=tokenizer)
    results = []
    for sentence, result, row in zip(args.sentences, classifier(args.sentences), logits.tolist(), strict=True):
        print(f"{result['label']:>10} {result['score']:.3f}  {sentence}")
        results.append({"sentence": sentence, **result, "logits": row})
    if args.output_file:
        args.output_file.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
