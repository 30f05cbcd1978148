"""What programs import from `modeling_snn_bert.energy`."""

import modeling_snn_bert.energy
from modeling_snn_bert import loading, text_files


def test_names():
    energy = modeling_snn_bert.energy
    assert all(hasattr(energy, name) for name in energy.__all__)
    assert {"energy_report", "measure_spikes"} <= set(energy.__all__)
    # Not about energy, and known by this path as well.
    assert energy.load_model is loading.load_model and energy.tokenized_batches is loading.tokenized_batches
    assert energy.read_texts is text_files.read_texts
