"""Draws the picture of the README: a sentence, the spikes of one neuron layer, and the label.

python docs/draw_spikes.py outputs/quickstart/model docs/spikes.png    # after `make demo`

The picture in the repository is of the distilled checkpoint, of which only the head was trained, on 2,100 film reviews.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from transformers import AutoTokenizer

from modeling_snn_bert import SNNBertForSequenceClassification

SENTENCE = "An utterly charming film, with wonderful performances."
LAYER = "encoder.layer.2.attention.self.value_neuron"
NEURONS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a classifier: a folder or a Hub id")
    parser.add_argument("picture", type=Path, help="the file to write")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = SNNBertForSequenceClassification.from_pretrained(args.model).eval()
    batch = tokenizer(SENTENCE, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**batch, output_spikes=True)
    (index,) = [i for i, name in enumerate(model.neuron_names()) if name.endswith(LAYER)]
    spikes = outputs.spikes[index][0, :, :NEURONS]
    probability, label = outputs.logits.softmax(-1)[0].max(-1)

    figure, axes = plt.subplots(figsize=(7.2, 2.6), layout="constrained")
    token, neuron = spikes.nonzero(as_tuple=True)
    axes.scatter(token, neuron, s=14, marker="_", linewidths=1.6, color="tab:blue")
    axes.set(xlim=(-0.6, len(spikes) - 0.4), ylim=(-1, NEURONS), ylabel=f"{NEURONS} neurons")
    axes.set_yticks([])
    axes.set_xticks(range(len(spikes)), tokenizer.convert_ids_to_tokens(batch["input_ids"][0]), rotation=35, ha="right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(SENTENCE, fontsize=10, loc="left")
    verdict = f"{model.config.id2label[label.item()]}\n{probability:.0%}"
    axes.text(1.02, 0.5, verdict, transform=axes.transAxes, fontsize=13, fontweight="bold", va="center")
    figure.savefig(args.picture, dpi=110)
    print(f"{verdict!r}, firing rate {spikes.float().mean():.2f}; written to {args.picture}")


if __name__ == "__main__":
    main()
