"""The pictures: what is drawn where, and files that are images, whole or not at all."""

import matplotlib.image
import pytest
import torch

from modeling_snn_bert.energy import energy_report, measure_spikes
from modeling_snn_bert.energy.plots import (
    PART_COLORS,
    plot_energy,
    plot_firing_rates,
    plot_spikes,
    raster_panels,
    save_figure,
)


def test_names_and_pictures(make_with_batches, tmp_path):
    model, batches = make_with_batches(spike_type="ternary")
    names = model.neuron_names()
    statistics = measure_spikes(model, batches)
    plot_firing_rates(statistics.rates, names, tmp_path / "rates.png")
    words = [str(i) for i in statistics.example_ids]
    for panels in (1, 3):
        plot_spikes(statistics.example_spikes[:panels], names[:panels], words, tmp_path / f"spikes{panels}.png")
    for name in ("rates", "spikes1", "spikes3"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("settings", [{}, {"attention_type": "spiking", "neuron_type": "lif"}])
def test_every_part_has_a_colour(make_with_batches, tmp_path, settings):
    model, batches = make_with_batches(**settings)
    costs = energy_report(model, batches, run_lengths=False).costs
    assert {row.part for cost in costs for row in cost.rows} - {"GELU"} <= set(PART_COLORS)
    plot_energy(costs, tmp_path / "energy.png")
    assert matplotlib.image.imread(tmp_path / "energy.png").std() > 0


def test_a_spike_is_a_mark(tmp_path):
    """A raster with spikes has blue for 1 and red for -1; a silent one has neither."""
    seen = {}
    for name, value in (("none", 0), ("positive", 1), ("negative", -1)):
        plot_spikes([torch.full((3, 8), value)], ["layer.0.output.neuron"], ["a", "b", "c"], tmp_path / f"{name}.png")
        image = matplotlib.image.imread(tmp_path / f"{name}.png")
        red, blue = (int(((image[..., i] - image[..., j]) > 0.3).sum()) for i, j in ((0, 2), (2, 0)))
        seen[name] = red > 0, blue > 0
    assert seen == {"none": (False, False), "positive": (False, True), "negative": (True, False)}


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        (1, ["0.attention.self.neuron", "0.output.neuron", "0.attention.output.neuron"]),
        (6, ["0.attention.self.neuron", "3.output.neuron", "5.attention.output.neuron"]),
    ],
)
def test_panels_of_the_raster(make_with_batches, layers, wanted):
    model, _ = make_with_batches(num_hidden_layers=layers)
    names = model.neuron_names()
    assert [names[i] for i in raster_panels(names)] == [f"bert.encoder.layer.{place}" for place in wanted]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    class Fails:
        def savefig(self, path, dpi):
            path.write_bytes(b"half")
            raise OSError("the disk is full")

    (tmp_path / "x.png").write_bytes(b"before")
    with pytest.raises(OSError, match="full"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.pyplot.close", lambda figure: None)
        save_figure(Fails(), tmp_path / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    assert (tmp_path / "x.png").read_bytes() == b"before"
