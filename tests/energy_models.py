"""Models for the tests of the energy report, and what they count in a way of their own."""

import torch

SETTINGS = {
    "bpsn": {},
    "ternary": {"spike_type": "ternary"},
    "lif": {"neuron_type": "lif"},
    "repeat": {"neuron_type": "lif", "coding": "repeat", "num_timesteps": 3},
    "psn": {"neuron_type": "psn", "psn_length": 32},
    "spiking-attention": {"attention_type": "spiking"},
    "position-bias": {"relative_attention_num_buckets": 8},
    "spiking-position-bias": {"attention_type": "spiking", "relative_attention_num_buckets": 8},
    "spiking-ternary-repeat": {
        "attention_type": "spiking",
        "spike_type": "ternary",
        "neuron_type": "lif",
        "coding": "repeat",
        "num_timesteps": 2,
    },
}


def rows_of(cost, part):
    return [row for row in cost.rows if row.part == part]


def spikes_by_place(model, batches):
    """All spikes, `[time-steps, sequences, tokens, channels]` per neuron layer, of each batch."""
    for batch in batches:
        with torch.no_grad():
            spikes = model(**batch, output_spikes=True).spikes
        steps = model.config.num_timesteps
        unfolded = [s.unflatten(0, (steps, -1)) for s in spikes]
        yield batch, dict(zip(model.neuron_names(), unfolded, strict=True))
