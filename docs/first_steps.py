# %% [markdown]
# # First steps with SNN-BERT
#
# A BERT becomes a spiking BERT: convert it, look at its spikes, fine-tune it, see what it costs, save it and load it
# again. Open this file as a notebook (VS Code and PyCharm do by themselves; in Jupyter, `pip install jupytext` and
# open it by its context menu), or run it: `python docs/first_steps.py`. It needs the package with its examples,
# `pip install -c constraints.txt ".[examples]"`, and no network.

# %% [markdown]
# ## A BERT and some text
#
# Give the folder or the Hub id of a BERT of your own by `SNN_BERT_FIRST_STEPS_BERT`. Without one, this makes a tiny
# BERT of random weights, which knows nothing, but goes through every step in seconds.

# %%
import os
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

torch.manual_seed(0)
work = Path(tempfile.mkdtemp(prefix="snn-bert-"))
good = ["a joy from start to end", "warm and funny and true", "the best film of the year", "a gripping story"]
bad = ["dull and far too long", "a waste of two hours", "the jokes fall flat", "loud and empty and cold"]
texts = good + bad
data = Dataset.from_dict({"sentence": texts, "label": [1] * len(good) + [0] * len(bad)})

checkpoint = os.environ.get("SNN_BERT_FIRST_STEPS_BERT")
if checkpoint is None:
    words = sorted({word for text in texts for word in text.split()})
    (work / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizer(vocab=str(work / "vocab.txt"), model_max_length=64)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=0.1,
    )
    checkpoint = str(work / "bert")
    BertForSequenceClassification(config).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)

tokenizer = AutoTokenizer.from_pretrained(checkpoint)
bert = BertForSequenceClassification.from_pretrained(checkpoint, num_labels=2)

# %% [markdown]
# ## Convert it
#
# Calibration runs a few batches of text through the BERT. It sets each neuron's threshold for the firing rate that
# you ask for, and fits the weights to spikes. On a real task give it some 10,000 tokens.

# %%
from modeling_snn_bert.conversion import convert_bert

batch = tokenizer(texts, padding=True, return_tensors="pt")
model = convert_bert(bert, [batch], firing_rate=0.2)
print(f"{bert.num_parameters():,} parameters before, {model.num_parameters():,} after: the rest is the neurons'")

# %% [markdown]
# ## Look at the spikes
#
# A token is a time-step. Each neuron layer stands in front of a matrix product; what enters the product is 0 or 1.

# %%
with torch.no_grad():
    outputs = model(**batch, output_spikes=True)
name, spikes = model.neuron_names()[1], outputs.spikes[1][0]
print(name, "fires", set(spikes.unique().tolist()))
for token, row in zip(tokenizer.convert_ids_to_tokens(batch["input_ids"][0]), spikes, strict=True):
    print(f"{token:>10}  " + "".join("█" if spike else "·" for spike in row[:40].tolist()))

# %% [markdown]
# ## Fine-tune it
#
# Everything that trains a BERT trains this model. The callback logs the firing rates beside the loss.

# %%
from modeling_snn_bert.callbacks import FiringRateCallback

rows = data.map(lambda row: tokenizer(row["sentence"], truncation=True), remove_columns=["sentence"])
arguments = TrainingArguments(
    str(work / "trainer"), learning_rate=2e-3, max_steps=30, logging_steps=10, save_strategy="no", report_to="none"
)
trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
trainer.add_callback(FiringRateCallback(trainer))
trainer.train()
predictions = trainer.predict(rows).predictions.argmax(-1)
print(f"{(predictions == data['label']).mean():.0%} of its own training sentences are right")

# %% [markdown]
# ## What it costs
#
# Every operation is counted at its published energy (45 nm), at the firing rates measured on your text, beside a BERT
# of the same shape. `report.save(folder)` writes the whole report with pictures.

# %%
from modeling_snn_bert.energy import energy_report

report = energy_report(model, [tokenizer(texts, padding=True, return_tensors="pt")], run_lengths=False)
for cost in report.costs:
    products, everything = cost.matrix_product_picojoules / 1e6, cost.picojoules / 1e6
    print(f"{cost.name:<34} {products:8.3f} uJ in matrix products, {everything:8.3f} uJ in all arithmetic")

# %% [markdown]
# ## Save it, and load it where the package is not
#
# The code travels with the weights. `model.push_to_hub("you/your-model")` sends the same files. Where the package is
# not installed add `trust_remote_code=True` to the calls below; here it is imported, and its own code is used.

# %%
model.save_pretrained(work / "snn-bert")
tokenizer.save_pretrained(work / "snn-bert")
again = AutoModelForSequenceClassification.from_pretrained(work / "snn-bert").eval()
with torch.no_grad():
    difference = (again(**batch).logits - model.eval()(**batch).logits).abs().max().item()
print(f"the loaded model's logits differ by {difference}")
classifier = pipeline("text-classification", model=str(work / "snn-bert"))
print(classifier("a joy from start to end"))

# %% [markdown]
# ## From here
#
# `docs/index.md` lists the guides: pipelines and sentence embeddings, monitoring, the command line, and more.
# `examples/quickstart.py` does all of this on real film reviews, with distillation, and compares with the BERT.
