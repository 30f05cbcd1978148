"""What an SNN-BERT costs on real text: a report on operations, energy, memory traffic, firing rates and run lengths.

    snn-bert energy outputs/quickstart/model --data_file sentences.tsv

writes report.html, report.md, report.json and three pictures. `spike_statistics` measures spikes, `operation_counts`
counts and holds the conventions, `joules` reads the machine's own counters, `report` puts them together, `tables` and
`plots` show them.
"""

# The last two imports are not about energy; programs know them by this path as well.
from ..loading import load_model, tokenized_batches
from ..text_files import read_texts
from .joules import MeasuredEnergy, measured_energy
from .report import EnergyReport, energy_report
from .spike_statistics import SpikeStatistics, measure_spikes

__all__ = [
    "EnergyReport",
    "MeasuredEnergy",
    "SpikeStatistics",
    "energy_report",
    "load_model",
    "measure_spikes",
    "measured_energy",
    "read_texts",
    "tokenized_batches",
]
