"""Many threads on one model give what one gives; thousands of batches leave no memory behind."""

import gc
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import modeling_snn_bert.event_driven as event_driven_module
from modeling_snn_bert import SNNBertForSequenceClassification
from modeling_snn_bert.cpu_kernels import available
from modeling_snn_bert.event_driven import dense, event_driven

THREADS = 8
BATCHES, WARM_UP = 2000, 200
# What the soak does in turn.
KINDS = ("training", "dense", "event_driven", "dense", "event_driven", "dense", "event_driven")


def random_batches(count, seed=0):
    """Batches of different sizes and lengths, with and without padding on either side."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    batches = []
    for _ in range(count):
        rows, length = rng.randint(1, 4), rng.randint(1, 48)
        batch = {"input_ids": torch.randint(5, 120, (rows, length), generator=generator)}
        if rng.random() < 0.7:
            valid = torch.randint(1, length + 1, (rows, 1), generator=generator)
            mask = (torch.arange(length) < valid).long()
            batch["attention_mask"] = mask.flip(1) if rng.random() < 0.5 else mask
        batches.append(batch)
    return batches


def logits_of(model, batch):
    # The mode is a thread's own.
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture(params=["dense", "event_driven-kernels", "event_driven-torch", "event_driven-int8"])
def form(request, monkeypatch):
    if request.param == "event_driven-kernels" and not available():
        pytest.skip("there are no compiled kernels here")
    if request.param == "event_driven-torch":
        monkeypatch.setattr(event_driven_module, "available", lambda: False)
    return request.param


def test_threads_give_what_one_gives(make_config, assert_spikes_flow, form):
    """From the first call on, in which the event-driven form lays out its weights."""
    batches = random_batches(40)
    model = SNNBertForSequenceClassification(make_config(hidden_size=64, intermediate_size=64)).eval()
    assert_spikes_flow(model, **batches[0])

    def prepare():
        if form == "dense":
            return model
        weights = "int8" if form.endswith("int8") else "float32"
        return event_driven(dense(model), weights, dense_above=1.0)

    alone = prepare()
    wanted = [logits_of(alone, batch) for batch in batches]
    together = prepare()
    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(lambda batch: logits_of(together, batch), batches))
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.slow
def test_soak(make_config, assert_spikes_flow):
    """No tensor is left over, and the process grows by less than the hidden states of its batches would take."""
    config = make_config(num_hidden_layers=1, firing_rate_target=0.1)
    models = {kind: SNNBertForSequenceClassification(config).eval() for kind in ("dense", "event_driven", "training")}
    assert_spikes_flow(models["dense"], input_ids=torch.arange(5, 45)[None])
    event_driven(models["event_driven"], dense_above=1.0)
    optimizer = torch.optim.SGD(models["training"].train().parameters(), lr=1e-4)
    # The longest batch comes first, so that the allocator has seen it.
    longest = {"input_ids": torch.randint(5, 120, (4, 48))}
    batches = [longest, longest, longest, *random_batches(BATCHES)]

    def run(number):
        batch, kind = batches[number], KINDS[number % len(KINDS)]
        if kind == "training":
            models[kind](**batch, labels=torch.zeros(len(batch["input_ids"]), dtype=torch.long)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            with torch.no_grad():
                models[kind](**batch, output_firing_rates=number % 3 == 0, output_hidden_states=number % 7 == 0)

    for number in range(WARM_UP):
        run(number)
    tensors, memory = live_tensors(), resident_bytes()
    for number in range(WARM_UP, len(batches)):
        run(number)
    assert live_tensors() <= tensors
    assert resident_bytes() - memory < 8 * 2**20
