"""The neuron by torch's operations, as it runs where there are no kernels, in float32 against float64."""

import pytest
import torch
from float64_checks import compare, make_neuron, random_mask

from modeling_snn_bert import bpsn, bpsn_in_place
from modeling_snn_bert.surrogate_gradients import SURROGATES


class TestInPlace:
    DECAYS = {"as-trained": (0.02, 0.11), "wide": (0.3, 0.6), "wider-than-a-stencil": (0.9, 0.97)}

    @pytest.fixture(autouse=True)
    def no_kernels(self, monkeypatch):
        monkeypatch.setattr(bpsn, "kernels_available", lambda: False)

    def make(self, decays, channels, groups, **settings):
        neuron = make_neuron(channels, groups, **settings)
        low, high = self.DECAYS[decays]
        with torch.no_grad():
            for name, parameter in neuron.named_parameters():
                if name.startswith("decay"):
                    values = torch.linspace(low, high, groups)
                    parameter.copy_((values if name == "decay_forward_logit" else values.flip(0)).logit())
        return neuron

    @pytest.mark.parametrize("mask", ["none", "right", "left", "holes"])
    @pytest.mark.parametrize(
        "spike_type, reset_iterations", [("binary", 0), ("binary", 1), ("ternary", 1), ("binary", 3)]
    )
    @pytest.mark.parametrize("decays", DECAYS)
    @pytest.mark.parametrize(
        "shape, groups", [((1, 1, 8), 1), ((3, 7, 16), 2), ((5, 40, 36), 4), ((4, 130, 96), 12)], ids=str
    )
    def test_is_the_neuron(self, shape, groups, decays, spike_type, reset_iterations, mask, monkeypatch):
        # One row a piece, but two in the shape of five: the last piece is short.
        monkeypatch.setattr(bpsn_in_place, "PIECE", 2 * 40 * 36)
        neuron = self.make(decays, shape[-1], groups, reset_iterations=reset_iterations, spike_type=spike_type)
        spikes = compare(neuron, shape, random_mask(mask, *shape[:2]), min_clear=0.2)
        if shape[1] > 1:
            assert 0 < spikes.abs().mean() < 1

    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("bidirectional", [True, False])
    @pytest.mark.parametrize("surrogate", list(SURROGATES))
    def test_settings(self, normalize, bidirectional, surrogate):
        settings = {"normalize": normalize, "bidirectional": bidirectional, "surrogate": surrogate}
        neuron = self.make("as-trained", 32, 2, **settings)
        assert 0 < compare(neuron, (2, 60, 32), random_mask("left", 2, 60)).mean() < 1

    def test_a_long_sequence(self):
        neuron = self.make("as-trained", 24, 3)
        assert 0 < compare(neuron, (2, 3000, 24), random_mask("holes", 2, 3000), min_clear=0.05).mean() < 1

    def test_nothing_at_all_is_valid(self):
        neuron = self.make("as-trained", 16, 2)
        current = torch.randn(2, 9, 16, requires_grad=True)
        spikes = neuron(current, random_mask("all_masked", 2, 9))
        spikes.sum().backward()
        assert not spikes.any() and not current.grad.any()

    @pytest.mark.parametrize("decays", DECAYS)
    def test_pieces_change_nothing(self, decays, monkeypatch):
        neuron, mask = self.make(decays, 48, 3), random_mask("right", 5, 50)
        current = torch.randn(5, 50, 48, generator=torch.Generator().manual_seed(0), requires_grad=True)
        results = []
        for piece in (1, 2 * 50 * 48, 2**18):
            monkeypatch.setattr(bpsn_in_place, "PIECE", piece)
            spikes = neuron(current, mask)
            weight = torch.linspace(-1, 1, spikes.numel()).view_as(spikes)
            results.append((spikes, *torch.autograd.grad((spikes * weight).sum(), [current, *neuron.parameters()])))
        assert 0 < results[0][0].mean() < 1
        for other in results[1:]:
            assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])
            torch.testing.assert_close(other[2:], results[0][2:], rtol=1e-4, atol=1e-4)

    def test_under_autocast(self):
        neuron = self.make("as-trained", 48, 3)
        current = torch.randn(2, 40, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
        expected = neuron(current.float())
        with torch.autocast("cpu", torch.bfloat16):
            narrow, wide = neuron(current), neuron(current.float())
        assert narrow.dtype == torch.bfloat16 and 0 < expected.mean() < 1
        assert torch.equal(narrow.float(), expected) and torch.equal(wide, expected)
