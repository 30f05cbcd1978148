"""BPSN, LIF and PSN against their equations, written out in loops, and the properties that the design claims."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from modeling_snn_bert import SNNBertModel
from modeling_snn_bert.spiking_neurons import BPSN, LIF, PSN
from modeling_snn_bert.surrogate_gradients import SURROGATES

IMPLEMENTATIONS = ("toeplitz", "chunked", "stencil", "auto")
SPIKE_TYPES = ("binary", "ternary")

every_spike_type = pytest.mark.parametrize("spike_type", SPIKE_TYPES)
every_normalize = pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "sum"])
every_direction = pytest.mark.parametrize("bidirectional", [True, False], ids=["bidirectional", "forward"])


def random_current(batch, length, channels, dtype=torch.float64, seed=0, mean=0.3):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, length, channels, generator=generator, dtype=torch.float64) + mean).to(dtype)


def masks(batch, length):
    t = torch.arange(length).expand(batch, -1)
    row = torch.arange(batch)[:, None]
    return {
        "none": None,
        "right": t < length - 3 * row,
        "left": t >= 1 + 5 * row,
        "holes": (t * 5 + row) % 3 != 0,
        "row-all-masked": (row > 0).expand(-1, length),
    }


def randomized(neuron, seed=0):
    """The neuron in float64 with its own value for each group and channel, and spikes that flow."""
    generator = torch.Generator().manual_seed(seed)
    neuron.double()
    with torch.no_grad():
        for name, parameter in neuron.named_parameters():
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("logit"):
                parameter.copy_(4 * noise - 2.5)
            elif name == "reset_strength":
                parameter.copy_(2 * noise - 0.7)
            elif name == "v_threshold":
                parameter.copy_(0.1 + 0.6 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return neuron


def assert_spikes_flow(spikes, spike_type="binary", attention_mask=None):
    valid = spikes if attention_mask is None else spikes[attention_mask != 0]
    assert set(spikes.unique().tolist()) <= {"binary": {0, 1}, "ternary": {-1, 0, 1}}[spike_type]
    assert 0 < valid.detach().abs().double().mean() < 1
    if spike_type == "ternary":
        assert valid.min() == -1 and valid.max() == 1
    if attention_mask is not None:
        assert (spikes[attention_mask == 0] == 0).all()


def step(potential, v_threshold, spike_type):
    spikes = (potential >= v_threshold).astype(float)
    return spikes - (potential <= -v_threshold) if spike_type == "ternary" else spikes


def parameters_of(neuron):
    """The neuron's values a channel, from its parameters: (v_threshold, decay_forward, decay_backward, reset)."""
    state = {name: value.detach().double().numpy() for name, value in neuron.named_parameters()}
    repeats = neuron.num_channels // neuron.num_groups
    zero = np.zeros(neuron.num_groups)

    def decay(name):
        return 1 / (1 + np.exp(-state[name])) if name in state else zero

    groups = (decay("decay_forward_logit"), decay("decay_backward_logit"), np.abs(state.get("reset_strength", zero)))
    return state["v_threshold"], *(value.repeat(repeats) for value in groups)


def loops(neuron, current, attention_mask=None):
    """BPSN by its definition, two loops over the tokens. Returns the potential, the reset received and the spikes."""
    v_threshold, f, b, reset = parameters_of(neuron)
    batch, length, channels = current.shape
    m = np.ones((batch, length)) if attention_mask is None else attention_mask.double().numpy()
    x = np.where(m[..., None] > 0, current.detach().double().numpy(), 0)
    a = {lag: f**lag if lag >= 0 else b**-lag for lag in range(-length, length)}

    def leaky(z, without_self=False):
        total = np.zeros((batch, length, channels))
        for t in range(length):
            for j in range(length):
                if j != t or not without_self:
                    total[:, t] += a[t - j] * z[:, j]
        return total

    m = m[..., None]
    n = leaky(np.broadcast_to(m, x.shape)) if neuron.normalize else np.ones_like(x)
    n = np.where(m > 0, n, 1)
    v = leaky(x) / n
    s, r = step(v, v_threshold, neuron.spike_type), np.zeros_like(v)
    for _ in range(neuron.reset_iterations):
        r = leaky(m * s, without_self=True) / n
        s = step(v - reset * r, v_threshold, neuron.spike_type)
    return torch.from_numpy(v * m), torch.from_numpy(r), torch.from_numpy(s * m)


def lif_loop(neuron, current, spike_type="binary"):
    """The soft-reset LIF, token after token."""
    v_threshold = neuron.v_threshold.detach().double().numpy()
    decay = 1 / (1 + np.exp(-neuron.decay_logit.detach().double().numpy()))
    decay = decay.repeat(neuron.num_channels // neuron.num_groups)
    x = current.detach().double().numpy()
    spikes, v, s = np.zeros_like(x), np.zeros_like(x[:, 0]), np.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        v = decay * (v - v_threshold * s) + x[:, t]
        s = spikes[:, t] = step(v, v_threshold, spike_type)
    return torch.from_numpy(spikes)


def as_lif(neuron, length, **settings):
    """The BPSN of the LIF identity, from a LIF."""
    bpsn = BPSN(
        neuron.num_channels,
        neuron.num_groups,
        v_threshold=neuron.initial_v_threshold,
        decay=neuron.initial_decay,
        reset=neuron.initial_v_threshold,
        **{"reset_iterations": length, "normalize": False, "bidirectional": False, **settings},
        spike_type=neuron.spike_type,
    )
    return bpsn.double()


NEURONS = {
    "bpsn": lambda **kw: BPSN(8, 2, **{"v_threshold": 0.3, "decay": 0.3, "reset": 0.5, **kw}),
    "bpsn-forward": lambda **kw: BPSN(
        8, 2, **{"v_threshold": 0.5, "decay": 0.6, "reset": 0.5, "bidirectional": False, "normalize": False, **kw}
    ),
    "lif": lambda **kw: LIF(8, 2, **{"v_threshold": 0.6, **kw}),
    "psn": lambda **kw: PSN(8, 2, length=40, **{"v_threshold": 0.4, **kw}),
}
every_neuron = pytest.mark.parametrize("neuron_type", NEURONS)


class TestExactness:
    @every_normalize
    @every_direction
    @every_spike_type
    @pytest.mark.parametrize("reset_iterations", [0, 1, 2, 5], ids=lambda n: f"sweeps={n}")
    def test_bpsn_is_its_equations(self, normalize, bidirectional, spike_type, reset_iterations):
        settings = {"normalize": normalize, "bidirectional": bidirectional, "spike_type": spike_type}
        settings["reset_iterations"] = reset_iterations
        current = random_current(3, 40, 8)
        cases = (("none", 1), ("right", 2), ("left", 8), ("holes", 4), ("row-all-masked", 2))
        for (name, groups), implementation in product(cases, IMPLEMENTATIONS):
            m = masks(3, 40)[name]
            neuron = randomized(BPSN(8, groups, implementation=implementation, **settings), seed=groups)
            if implementation == IMPLEMENTATIONS[0]:
                potential, _, spikes = loops(neuron, current, m)
                before_reset = step(potential.numpy(), parameters_of(neuron)[0], spike_type)
                differs = (before_reset != spikes.numpy()).any()
                assert differs if reset_iterations else not differs
            got = neuron(current, m)
            assert_spikes_flow(got, spike_type, m)
            assert torch.equal(got, spikes), (name, groups, implementation)
            torch.testing.assert_close(neuron.membrane_potential(current, m), potential, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(
        "make",
        [
            *(
                pytest.param(lambda name=name, **kw: BPSN(6, 2, implementation=name, **kw), id=f"bpsn-{name}")
                for name in ("naive", *IMPLEMENTATIONS)
            ),
            pytest.param(lambda **kw: LIF(6, 2, **kw), id="lif"),
            pytest.param(lambda **kw: PSN(6, 2, length=1, **kw), id="psn"),
        ],
    )
    def test_a_potential_at_the_threshold_fires(self, make):
        current = torch.tensor([[[0.5, 0.499, -0.5, -0.499, 2.0, -2.0]]])
        assert make(v_threshold=0.5)(current).flatten().tolist() == [1, 0, 0, 0, 1, 0]
        assert make(v_threshold=0.5, spike_type="ternary")(current).flatten().tolist() == [1, 0, -1, 0, 1, -1]

    @every_spike_type
    @pytest.mark.parametrize("implementation", ["naive", *IMPLEMENTATIONS])
    def test_bpsn_implementations_agree(self, spike_type, implementation):
        current = random_current(2, 36, 8)
        neuron = randomized(BPSN(8, 2, spike_type=spike_type, implementation=implementation, reset_iterations=2))
        spikes = neuron(current)
        assert_spikes_flow(spikes, spike_type)
        assert torch.equal(spikes, loops(neuron, current)[-1])

    @every_spike_type
    @pytest.mark.parametrize("decay", [0.05, 0.5, 0.9, 0.99])
    @pytest.mark.parametrize("v_threshold", [0.3, 1.0, 2.5])
    def test_bpsn_swept_to_the_end_is_lif(self, spike_type, decay, v_threshold):
        for length, implementation in product((2, 33, 100), ("toeplitz", "chunked")):
            current = random_current(4, length, 16)
            lif = LIF(16, 2, v_threshold=v_threshold, decay=decay, spike_type=spike_type).double()
            expected = lif(current)
            assert 0 < expected.abs().mean() < 1
            assert torch.equal(as_lif(lif, length, implementation=implementation)(current), expected)

    def test_the_lif_identity_needs_the_sweeps_and_no_more(self):
        current, lif = random_current(4, 40, 16), LIF(16, 2, v_threshold=0.5, decay=0.9).double()
        expected = lif(current)
        assert_spikes_flow(expected)
        assert not torch.equal(as_lif(lif, 1)(current), expected)
        for sweeps in (39, 40, 80):
            assert torch.equal(as_lif(lif, sweeps)(current), expected)

    @every_spike_type
    @pytest.mark.parametrize(
        "mask",
        [
            "right",
            "left",
            "holes",
        ],
    )
    def test_the_lif_identity_holds_under_a_mask(self, spike_type, mask):
        current, m = random_current(3, 40, 16, mean=0.6), masks(3, 40)[mask]
        lif = LIF(16, 2, v_threshold=0.5, decay=0.9, spike_type=spike_type).double()
        assert_spikes_flow(lif(current, m), spike_type, m)
        assert torch.equal(as_lif(lif, 40)(current, m), lif(current, m))

    @every_spike_type
    @pytest.mark.parametrize("groups", [1, 2, 8])
    def test_lif_is_its_loop(self, spike_type, groups):
        neuron = randomized(LIF(8, groups, spike_type=spike_type))
        for length in (1, 7, 200):
            current = random_current(3, length, 8)
            spikes = neuron(current)
            assert_spikes_flow(spikes, spike_type)
            assert torch.equal(spikes, lif_loop(neuron, current, spike_type))

    @every_spike_type
    def test_repeat_coding_steps_each_token_through_the_time_steps(self, spike_type):
        num_timesteps, batch, length = 4, 3, 10
        current = random_current(num_timesteps * batch, length, 8)
        neuron = randomized(LIF(8, 2, num_timesteps=num_timesteps, spike_type=spike_type))
        by_token = current.reshape(num_timesteps, batch * length, 8).transpose(0, 1)
        expected = lif_loop(neuron, by_token, spike_type).transpose(0, 1).reshape(current.shape)
        assert_spikes_flow(expected, spike_type)
        assert torch.equal(neuron(current), expected)
        m = masks(batch, length)["right"].repeat(num_timesteps, 1)
        assert torch.equal(neuron(current, m), expected * m[..., None])

    @every_spike_type
    def test_psn_is_a_matrix_product(self, spike_type):
        current, m = random_current(3, 40, 8), masks(3, 40)["holes"]
        neuron = randomized(PSN(8, 2, length=40, spike_type=spike_type))
        for mask in (None, m):
            x = current if mask is None else current * mask[..., None]
            v = neuron.weight.detach() @ x
            expected = torch.from_numpy(step(v.numpy(), neuron.v_threshold.detach().numpy(), spike_type))
            expected = expected if mask is None else expected * mask[..., None]
            assert_spikes_flow(expected, spike_type, mask)
            assert torch.equal(neuron(current, mask), expected)

    def test_psn_starts_without_mixing_tokens(self):
        current = random_current(2, 12, 8)
        spikes = PSN(8, 2, length=12, v_threshold=0.2)(current)
        assert_spikes_flow(spikes)
        assert torch.equal(spikes, (current >= torch.tensor(0.2).double()).double())

    @pytest.mark.parametrize("length", [1, 11, 13])
    def test_psn_refuses_another_length(self, length):
        with pytest.raises(ValueError, match=f"exactly 12 tokens, got seq_len = {length}"):
            PSN(8, 2, length=12)(torch.zeros(1, length, 8))


class TestNoRunAway:
    @pytest.mark.parametrize("decay", [0.05, 0.5, 0.99, 0.9999])
    @pytest.mark.parametrize("length", [1, 64, 8192])
    @every_direction
    def test_potential_is_bounded_by_the_currents(self, decay, length, bidirectional):
        current = random_current(1, length, 8, torch.float32, mean=1.0)
        neuron = BPSN(8, 2, decay=decay, bidirectional=bidirectional)
        potential = neuron.membrane_potential(current)
        assert 0 < potential.abs().max() <= current.abs().max() * (1 + 1e-5)

    def test_the_plain_sum_is_not(self):
        current = random_current(1, 8192, 8, torch.float32, mean=1.0)
        potential = BPSN(8, 2, decay=0.9999, normalize=False).membrane_potential(current)
        assert potential.abs().max() > 1000 * current.abs().max()

    @every_direction
    @pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
    @pytest.mark.parametrize("length", [64, 4096])
    def test_constant_current_below_threshold(self, decay, length, bidirectional):
        current = torch.full((1, length, 8), 0.95)
        settings = {"decay": decay, "bidirectional": bidirectional, "v_threshold": 1.0}
        assert BPSN(8, 2, **settings)(current).sum() == 0
        assert BPSN(8, 2, **settings, reset_iterations=0)(current).sum() == 0
        without_end = BPSN(8, 2, **settings, reset_iterations=0, normalize=False)(current)
        assert (without_end[:, 1:] == 1).all()


def run_lengths(spikes):
    """Lengths of the uninterrupted runs of spikes along the tokens."""
    rows = torch.nn.functional.pad(spikes.transpose(1, 2).flatten(0, 1).int(), (1, 1)).diff(dim=1)
    return ((rows == -1).nonzero()[:, 1] - (rows == 1).nonzero()[:, 1]).double()


class TestRuns:
    @staticmethod
    def statistics(neuron, current):
        spikes = neuron.double()(current).detach()
        assert_spikes_flow(spikes)
        runs = run_lengths(spikes)
        return {
            "rate": spikes.mean().item(),
            "mean": runs.mean().item(),
            "p99": runs.quantile(0.99).item(),
            "always": (spikes.mean(1) > 0.95).double().mean().item(),
        }

    def test_run_lengths(self):
        spikes = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).T[None]
        assert sorted(run_lengths(spikes).tolist()) == [1, 2, 5]

    @pytest.mark.parametrize(
        ("decay", "reset_iterations", "shorter"),
        [
            pytest.param(0.5, 1, 1.9, id="decay=0.5-sweeps=1"),
            pytest.param(0.5, 2, 1.6, id="decay=0.5-sweeps=2"),
            pytest.param(0.5, 5, 1.9, id="decay=0.5-sweeps=5"),
            pytest.param(0.9, 1, 4, id="decay=0.9-sweeps=1"),
            pytest.param(0.9, 5, 4, id="decay=0.9-sweeps=5"),
        ],
    )
    def test_the_reset_breaks_the_runs(self, decay, reset_iterations, shorter):
        current = random_current(4, 512, 64, mean=0.5)
        # The same threshold for a mean of weight n as 1.0 for the sum.
        v_threshold = (1 - decay) / (1 + decay)
        no_reset = self.statistics(BPSN(64, 4, decay=decay, normalize=False, reset_iterations=0), current)
        bpsn = self.statistics(
            BPSN(64, 4, decay=decay, v_threshold=v_threshold, reset=0.5, reset_iterations=reset_iterations), current
        )
        lif = self.statistics(LIF(64, 4, decay=decay), current)
        assert lif["mean"] < bpsn["mean"] < no_reset["mean"] / shorter
        assert lif["p99"] < bpsn["p99"] < no_reset["p99"] / shorter
        assert lif["rate"] < 0.5 and 0.4 < bpsn["rate"] < 0.55 < no_reset["rate"]
        assert lif["always"] == bpsn["always"] == 0
        assert no_reset["always"] > 0.9 or decay == 0.5

    def test_an_even_number_of_sweeps_undoes_a_strong_reset(self):
        """The sweeps alternate, as the docstring of `BPSN` warns."""
        current = random_current(4, 512, 64, mean=0.5)
        rates = [
            self.statistics(BPSN(64, 4, decay=0.9, v_threshold=0.1 / 1.9, reset=0.5, reset_iterations=n), current)[
                "rate"
            ]
            for n in (1, 2, 3)
        ]
        assert rates[1] > 0.9 > 0.6 > max(rates[0], rates[2])

    def test_rate_falls_as_the_reset_grows(self):
        current = random_current(4, 512, 64, mean=0.5)
        table = [
            self.statistics(BPSN(64, 4, decay=0.9, v_threshold=0.05, reset=reset), current)
            for reset in (0.0, 0.1, 0.3, 0.5, 0.7)
        ]
        for key in ("rate", "mean", "p99", "always"):
            values = [row[key] for row in table]
            assert values == sorted(values, reverse=True) and values[0] > values[-1]


class TestAdaptiveLength:
    @every_spike_type
    @pytest.mark.parametrize("length", [1, 64, 513, 8192])
    def test_one_module_for_all_lengths(self, spike_type, length):
        neuron = randomized(BPSN(4, 2, spike_type=spike_type))
        current = random_current(1, length, 4)
        spikes = neuron(current)
        assert spikes.shape == current.shape
        v_threshold, f, b, reset = parameters_of(neuron)

        def leaky(x):
            total, charge = -x, np.zeros(4)
            for t in range(length):
                charge = f * charge + x[t]
                total[t] += charge
            charge = np.zeros(4)
            for t in reversed(range(length)):
                charge = b * charge + x[t]
                total[t] += charge
            return total

        x = current[0].numpy()
        n = leaky(np.ones_like(x))
        v = leaky(x) / n
        s = step(v, v_threshold, spike_type)
        expected = step(v - reset * (leaky(s) - s) / n, v_threshold, spike_type)
        assert length == 1 or 0 < np.abs(expected).mean() < 1
        assert torch.equal(spikes[0], torch.from_numpy(expected))

    def test_far_tokens_do_not_reach_a_leaky_neuron(self):
        neuron = BPSN(8, 2, decay=0.1, v_threshold=0.3, reset=0.5).double()
        current = random_current(1, 8192, 8)
        short, long = neuron(current[:, :64]), neuron(current)
        assert_spikes_flow(short)
        assert torch.equal(short[:, :32], long[:, :32])

    def test_parameters_know_no_length(self):
        neuron = NEURONS["bpsn"]()
        before = {name: value.clone() for name, value in neuron.state_dict().items()}
        for length in (64, 8192, 3):
            neuron(random_current(1, length, 8, torch.float32))
        assert all(torch.equal(value, before[name]) for name, value in neuron.state_dict().items())


class TestPadding:
    @every_neuron
    @every_spike_type
    @pytest.mark.parametrize("mask", ["right", "left", "holes", "row-all-masked"])
    def test_what_stands_in_it_changes_nothing(self, neuron_type, spike_type, mask):
        neuron = randomized(NEURONS[neuron_type](spike_type=spike_type))
        current, m = random_current(3, 40, 8), masks(3, 40)[mask]
        results = []
        for junk in (0.0, math.nan, math.inf, -math.inf, 1e300):
            x = current.masked_fill(~m[..., None], junk).requires_grad_()
            spikes = neuron(x, m)
            assert_spikes_flow(spikes, spike_type, m)
            inputs = (x, *neuron.parameters())
            gradients = torch.autograd.grad(spikes.sum(), inputs)
            assert all(gradient.isfinite().all() for gradient in gradients)
            assert (gradients[0][~m] == 0).all()
            results.append((spikes, *gradients))
        for result in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))

    @pytest.mark.parametrize("neuron_type", ["bpsn", "bpsn-forward", "lif"])
    @every_spike_type
    @pytest.mark.parametrize(("left", "right"), [(0, 1), (1, 0), (0, 90), (90, 0), (5, 70)])
    def test_adding_it_changes_nothing(self, neuron_type, spike_type, left, right):
        neuron = randomized(NEURONS[neuron_type](spike_type=spike_type))
        current = random_current(3, 40, 8)
        alone = neuron(current)
        assert_spikes_flow(alone, spike_type)
        padded = torch.nn.functional.pad(current, (0, 0, left, right), value=5.0)
        m = torch.nn.functional.pad(torch.ones(3, 40), (left, right))
        got = neuron(padded, m)
        assert torch.equal(got[:, left : left + 40], alone)
        assert got.count_nonzero() == alone.count_nonzero()

    @pytest.mark.parametrize(
        "neuron_type",
        [
            "bpsn",
            "bpsn-forward",
            "lif",
        ],
    )
    def test_left_padding_changes_nothing_at_a_negative_threshold(self, neuron_type):
        neuron = NEURONS[neuron_type](v_threshold=-0.2).double()
        current = random_current(3, 40, 8, mean=-0.5)
        alone = neuron(current)
        assert_spikes_flow(alone)
        m = torch.nn.functional.pad(torch.ones(3, 40), (9, 0))
        assert torch.equal(neuron(torch.nn.functional.pad(current, (0, 0, 9, 0)), m)[:, 9:], alone)

    @every_neuron
    @every_spike_type
    def test_batch_mates_change_nothing(self, neuron_type, spike_type):
        neuron = randomized(NEURONS[neuron_type](spike_type=spike_type))
        current, m = random_current(4, 40, 8), masks(4, 40)["right"]
        together = neuron(current, m)
        assert_spikes_flow(together, spike_type, m)
        mates = current.clone()
        mates[1:] = math.nan
        assert torch.equal(neuron(mates, m)[0], together[0])
        for row in range(4):
            assert torch.equal(neuron(current[row : row + 1], m[row : row + 1])[0], together[row])


class TestBidirectional:
    @every_normalize
    @every_spike_type
    @pytest.mark.parametrize("mask", ["none", "right", "holes"])
    def test_reversal_exchanges_the_decays(self, normalize, spike_type, mask):
        current, m = random_current(3, 70, 8), masks(3, 70)[mask]
        neuron = randomized(BPSN(8, 2, normalize=normalize, spike_type=spike_type, reset_iterations=2))
        mirrored = randomized(BPSN(8, 2, normalize=normalize, spike_type=spike_type, reset_iterations=2))
        with torch.no_grad():
            mirrored.decay_forward_logit.copy_(neuron.decay_backward_logit)
            mirrored.decay_backward_logit.copy_(neuron.decay_forward_logit)
        spikes = neuron(current, m)
        assert_spikes_flow(spikes, spike_type, m)
        reversed_mask = None if m is None else m.flip(1)
        assert torch.equal(mirrored(current.flip(1), reversed_mask).flip(1), spikes)
        assert not torch.equal(neuron(current.flip(1), reversed_mask).flip(1), spikes)

    @every_direction
    @pytest.mark.parametrize("length", [2, 20, 70])
    def test_ends_reach_each_other(self, bidirectional, length):
        neuron = BPSN(8, 2, decay=0.9, bidirectional=bidirectional).double()
        current = random_current(1, length, 8).requires_grad_()
        potential = neuron.membrane_potential(current)
        (to_first,) = torch.autograd.grad(potential[:, 0].sum(), current, retain_graph=True)
        (to_last,) = torch.autograd.grad(potential[:, -1].sum(), current)
        assert (to_last[:, 0] > 0).all()
        assert (to_first[:, -1] > 0).all() == bidirectional
        assert bidirectional or (to_first[:, 1:] == 0).all()

    def test_forward_only_is_causal(self):
        neuron = randomized(NEURONS["bpsn-forward"](reset_iterations=3))
        current = random_current(2, 80, 8)
        spikes = neuron(current)
        assert_spikes_flow(spikes)
        later = current.clone()
        later[:, 50:] += 3
        assert torch.equal(neuron(later)[:, :50], spikes[:, :50])
        assert not torch.equal(neuron(later)[:, 50:], spikes[:, 50:])


class TestGradients:
    @every_normalize
    @every_direction
    @pytest.mark.parametrize(("implementation", "length"), [("toeplitz", 6), ("chunked", 35)])
    @pytest.mark.parametrize("mask", ["none", "holes"])
    def test_potential_passes_gradcheck(self, normalize, bidirectional, implementation, length, mask):
        settings = {"normalize": normalize, "bidirectional": bidirectional, "implementation": implementation}
        neuron, m = randomized(BPSN(4, 2, **settings)), masks(2, length)[mask]
        names = [name for name, _ in neuron.named_parameters() if name.endswith("logit")]
        assert len(names) == 1 + bidirectional
        module = Potential(neuron)

        def potential(current, *logits):
            values = {f"neuron.{name}": logit for name, logit in zip(names, logits, strict=True)}
            return functional_call(module, values, (current, m))

        logits = [getattr(neuron, name).detach().clone().requires_grad_() for name in names]
        current = random_current(2, length, 4).requires_grad_()
        assert torch.autograd.gradcheck(potential, (current, *logits), fast_mode=length > 6)

    @every_spike_type
    @every_normalize
    @pytest.mark.parametrize(
        ("reset_iterations", "mask"), [(1, "none"), (3, "holes")], ids=["sweeps=1-none", "sweeps=3-holes"]
    )
    @pytest.mark.parametrize("surrogate", sorted(SURROGATES))
    def test_reset_is_a_constant_to_backward(self, spike_type, normalize, reset_iterations, mask, surrogate):
        settings = {"spike_type": spike_type, "normalize": normalize, "reset_iterations": reset_iterations}
        alpha = 1.5
        neuron = randomized(BPSN(8, 2, surrogate=surrogate, surrogate_alpha=alpha, **settings))
        current, m = random_current(2, 20, 8).requires_grad_(), masks(2, 20)[mask]
        weight = random_current(2, 20, 8, seed=1)
        spikes = neuron(current, m)
        assert_spikes_flow(spikes, spike_type, m)
        inputs = (current, *neuron.parameters())
        got = torch.autograd.grad((spikes * weight).sum(), inputs)

        # What arrives at masked tokens, whose spikes are 0 whatever happens, must not come through.
        weight = weight if m is None else weight * m[..., None]
        received = loops(neuron, current, m)[1]
        assert received.abs().max() > 0.1
        reset = neuron.reset_strength.abs().repeat_interleave(4)
        potential = neuron.membrane_potential(current, m) - reset * received
        slope = SURROGATES[surrogate]((potential - neuron.v_threshold).detach(), alpha)
        surrogate_spikes = slope * (potential - neuron.v_threshold)
        if spike_type == "ternary":
            slope = SURROGATES[surrogate]((-potential - neuron.v_threshold).detach(), alpha)
            surrogate_spikes = surrogate_spikes - slope * (-potential - neuron.v_threshold)
        expected = torch.autograd.grad((surrogate_spikes * weight).sum(), inputs)
        for one, other in zip(got, expected, strict=True):
            assert other.abs().sum() > 0
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)

    @every_neuron
    def test_threshold_gradient_is_the_surrogate_named(self, neuron_type):
        current = random_current(2, 40, 8)
        gradients = []
        for surrogate, alpha in [*product(sorted(SURROGATES), (2.0,)), ("atan", 4.0)]:
            neuron = randomized(NEURONS[neuron_type](surrogate=surrogate, surrogate_alpha=alpha))
            gradients.append(torch.autograd.grad(neuron(current).sum(), neuron.v_threshold)[0])
        for i, gradient in enumerate(gradients):
            assert (gradient < 0).all()
            assert not any(torch.allclose(gradient, other, rtol=1e-3) for other in gradients[:i])

    @every_spike_type
    @pytest.mark.parametrize("num_timesteps", [None, 4])
    def test_lif_resets_are_constants_to_backward(self, spike_type, num_timesteps):
        neuron = randomized(LIF(8, 2, spike_type=spike_type, num_timesteps=num_timesteps))
        current = random_current(4, 12, 8).requires_grad_()
        inputs = (current, *neuron.parameters())
        spikes = neuron(current)
        assert_spikes_flow(spikes, spike_type)
        got = torch.autograd.grad((spikes * spikes.detach().cos()).sum(), inputs)

        along = 1 if num_timesteps is None else 0
        decay = torch.sigmoid(neuron.decay_logit).repeat_interleave(4)
        v, reset, total = 0, 0, 0
        for x, s in zip(current.unbind(along), spikes.detach().unbind(along), strict=True):
            v = decay * (v - reset) + x
            reset = neuron.v_threshold.detach() * s
            for sign in (1, -1) if spike_type == "ternary" else (1,):
                u = sign * v - neuron.v_threshold
                total = total + (sign * SURROGATES["atan"](u.detach(), 2.0) * u * s.cos()).sum()
        for one, other in zip(got, torch.autograd.grad(total, inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)

    @every_neuron
    @every_spike_type
    def test_each_parameter_gets_one(self, neuron_type, spike_type):
        neuron = NEURONS[neuron_type](spike_type=spike_type)
        current = random_current(2, 40, 8, torch.float32).requires_grad_()
        spikes = neuron(current)
        assert_spikes_flow(spikes, spike_type)
        (spikes * random_current(2, 40, 8, torch.float32, seed=1)).sum().backward()
        for name, parameter in (("current", current), *neuron.named_parameters()):
            assert parameter.grad.isfinite().all(), name
            assert (parameter.grad != 0).any(), name

    @every_neuron
    @pytest.mark.parametrize("mask", ["none", "holes"])
    def test_inputs_are_left_alone(self, neuron_type, mask):
        neuron, m = randomized(NEURONS[neuron_type]()), masks(3, 40)[mask]
        current, grad_spikes = random_current(3, 40, 8).requires_grad_(), random_current(3, 40, 8, seed=1)
        tensors = (current, grad_spikes, *neuron.parameters())
        before = [x.detach().clone() for x in tensors]
        neuron(current, m).backward(grad_spikes)
        assert all(torch.equal(x, copy) for x, copy in zip(tensors, before, strict=True))

    def test_a_reset_of_zero_can_grow(self):
        neuron = NEURONS["bpsn"](reset=0.0)
        spikes = neuron(random_current(2, 40, 8, torch.float32))
        assert_spikes_flow(spikes)
        spikes.sum().backward()
        assert (neuron.reset_strength.grad != 0).all()

    def test_default_bpsn_trains(self):
        current, target = random_current(4, 30, 8, torch.float32), torch.zeros(4, 30, 8)
        neuron = NEURONS["bpsn"]()
        optimizer = torch.optim.Adam(neuron.parameters(), lr=0.05)
        rates = []
        for _ in range(30):
            spikes = neuron(current)
            rates.append(spikes.mean().item())
            optimizer.zero_grad()
            (spikes - target).square().mean().backward()
            optimizer.step()
        assert rates[0] > 0.2 and rates[-1] < rates[0] / 2


class Potential(torch.nn.Module):
    def __init__(self, neuron):
        super().__init__()
        self.neuron = neuron

    def forward(self, *args):
        return self.neuron.membrane_potential(*args)


class TestReset:
    def test_never_negative(self):
        current = random_current(2, 40, 8)
        neuron, mirrored = NEURONS["bpsn"]().double(), NEURONS["bpsn"]().double()
        with torch.no_grad():
            mirrored.reset_strength.neg_()
        assert (mirrored.soft_reset >= 0).all() and torch.equal(neuron.soft_reset, mirrored.soft_reset)
        spikes = neuron(current)
        assert_spikes_flow(spikes)
        assert torch.equal(mirrored(current), spikes)

    def test_only_takes_spikes_away_from_binary_neurons(self):
        current = random_current(2, 40, 8)
        without = NEURONS["bpsn"](reset_iterations=0).double()(current)
        with_reset = NEURONS["bpsn"]().double()(current)
        assert_spikes_flow(with_reset)
        assert (with_reset <= without).all() and with_reset.sum() < without.sum()

    def test_off(self):
        current = random_current(2, 40, 8)
        off, zero = NEURONS["bpsn"](reset_iterations=0).double(), NEURONS["bpsn"](reset=0.0).double()
        assert (off.soft_reset == 0).all() and "reset_strength" not in off.state_dict()
        assert_spikes_flow(off(current))
        assert torch.equal(off(current), zero(current))
        assert torch.equal(off(current), (off.membrane_potential(current) >= off.v_threshold).double())


class TestDtypes:
    @every_neuron
    @every_spike_type
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_spikes_have_the_dtype_of_the_current(self, neuron_type, spike_type, dtype):
        neuron = NEURONS[neuron_type](spike_type=spike_type)
        current = random_current(2, 40, 8, dtype)
        spikes = neuron(current)
        assert spikes.dtype == dtype
        assert_spikes_flow(spikes, spike_type)
        if dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(spikes.float(), neuron(current.float()))
        current.requires_grad_()
        neuron(current).sum().backward()
        for tensor in (current, *neuron.parameters()):
            assert tensor.grad.dtype == tensor.dtype and tensor.grad.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_potential_has_the_dtype_of_the_current(self, dtype):
        potential = NEURONS["bpsn"]().membrane_potential(random_current(2, 40, 8, dtype))
        assert potential.dtype == dtype and potential.abs().sum() > 0

    @every_neuron
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_low_precision_module(self, neuron_type, dtype):
        neuron = NEURONS[neuron_type]().to(dtype)
        current = random_current(2, 40, 8, dtype).requires_grad_()
        spikes = neuron(current)
        assert spikes.dtype == dtype
        assert_spikes_flow(spikes)
        spikes.sum().backward()
        for parameter in (current, *neuron.parameters()):
            assert parameter.grad.dtype == dtype and parameter.grad.isfinite().all()
        close_to = NEURONS[neuron_type]().double()(current.detach().double())
        assert (spikes != close_to).double().mean() < 0.02

    @every_neuron
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast_changes_nothing(self, neuron_type, dtype):
        neuron = randomized(NEURONS[neuron_type]()).float()
        current, m = random_current(3, 40, 8, torch.float32), masks(3, 40)["right"]
        expected = neuron(current, m)
        with torch.autocast("cpu", dtype=dtype):
            got = neuron(current, m)
        assert got.dtype == torch.float32
        assert_spikes_flow(got, attention_mask=m)
        assert torch.equal(got, expected)

    @every_neuron
    @pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32], ids=str)
    def test_any_mask_dtype(self, neuron_type, mask_dtype):
        neuron = randomized(NEURONS[neuron_type]())
        current, m = random_current(3, 40, 8), masks(3, 40)["right"]
        assert_spikes_flow(neuron(current, m), attention_mask=m)
        assert torch.equal(neuron(current, m.to(mask_dtype)), neuron(current, m))


class TestModule:
    @every_neuron
    def test_reset_parameters_restores(self, neuron_type):
        neuron = NEURONS[neuron_type]()
        fresh = {name: value.clone() for name, value in neuron.state_dict().items()}
        randomized(neuron).float()
        assert not any(torch.equal(value, fresh[name]) for name, value in neuron.state_dict().items())
        neuron.reset_parameters()
        assert all(torch.equal(value, fresh[name]) for name, value in neuron.state_dict().items())

    @pytest.mark.parametrize(
        ("make", "names"),
        [
            pytest.param(
                lambda: BPSN(8, 2),
                {"v_threshold", "decay_forward_logit", "decay_backward_logit", "reset_strength"},
                id="bpsn",
            ),
            pytest.param(
                lambda: BPSN(8, 2, bidirectional=False, reset_iterations=0),
                {"v_threshold", "decay_forward_logit"},
                id="bpsn-forward-no-reset",
            ),
            pytest.param(lambda: LIF(8, 2), {"v_threshold", "decay_logit"}, id="lif"),
            pytest.param(lambda: PSN(8, 2, length=5), {"v_threshold", "weight"}, id="psn"),
        ],
    )
    def test_state_is_its_parameters(self, make, names):
        neuron = make()
        assert set(neuron.state_dict()) == {name for name, _ in neuron.named_parameters()} == names
        assert list(neuron.buffers()) == []

    def test_initial_values(self):
        neuron = BPSN(8, 2, v_threshold=0.7, decay=0.2, reset=0.4)
        torch.testing.assert_close(neuron.v_threshold, torch.full((8,), 0.7))
        for name, value in (("decay_forward", 0.2), ("decay_backward", 0.2), ("soft_reset", 0.4)):
            torch.testing.assert_close(getattr(neuron, name), torch.full((2,), value))
        assert (BPSN(8, 2, bidirectional=False).decay_backward == 0).all()
        torch.testing.assert_close(LIF(8, 2, decay=0.3).decay, torch.full((2,), 0.3))

    @pytest.mark.parametrize("decay", [1e-30, 1e-6, 0.5, 0.9999])
    def test_any_decay_starts_as_given(self, decay):
        assert BPSN(2, 1, decay=decay).decay_forward.item() == pytest.approx(decay, rel=1e-4)

    @every_neuron
    def test_repr_names_what_it_is(self, neuron_type):
        assert "8, 2, surrogate='atan', spike_type='binary'" in repr(NEURONS[neuron_type]())

    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(NEURONS["bpsn"], id="bpsn"),
            pytest.param(lambda: NEURONS["bpsn-forward"](spike_type="ternary", reset_iterations=2), id="bpsn-forward"),
            pytest.param(NEURONS["lif"], id="lif"),
            pytest.param(NEURONS["psn"], id="psn"),
        ],
    )
    def test_compiles_without_a_graph_break(self, make):
        neuron = make()
        length = 8 if isinstance(neuron, LIF) else 40
        current, m = random_current(3, length, 8, torch.float32), masks(3, length)["holes"]
        compiled = torch.compile(neuron, fullgraph=True, backend="aot_eager")
        results = []
        for module in (neuron, compiled):
            spikes = module(current, m)
            results.append((spikes, *torch.autograd.grad(spikes.sum(), tuple(neuron.parameters()))))
        assert_spikes_flow(results[0][0], neuron.spike_type, m)
        assert torch.equal(results[0][0], results[1][0])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("make", [BPSN, LIF, lambda *a, **kw: PSN(*a, length=8, **kw)], ids=["bpsn", "lif", "psn"])
    def test_compiles_again_for_another_surrogate(self, make):
        """The second sharpness makes torch.compile take it for a symbol."""
        for alpha in (2.0, 3.0, 4.0):
            neuron = make(8, 2, surrogate_alpha=alpha)
            current = random_current(3, 8, 8, torch.float32)
            compiled = torch.compile(neuron, fullgraph=True, backend="aot_eager")
            spikes, wanted = compiled(current), neuron(current)
            assert_spikes_flow(wanted, neuron.spike_type)
            assert torch.equal(spikes, wanted)
            grads = (torch.autograd.grad(x.sum(), neuron.v_threshold)[0] for x in (spikes, wanted))
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


class TestErrors:
    @pytest.mark.parametrize("make", [BPSN, LIF, lambda *a, **kw: PSN(*a, length=5, **kw)], ids=["bpsn", "lif", "psn"])
    @pytest.mark.parametrize(
        ("sizes", "settings", "name"),
        [
            pytest.param((8, 3), {}, "num_groups", id="groups-do-not-divide"),
            pytest.param((8, 0), {}, "num_groups", id="no-groups"),
            pytest.param((0, 1), {}, "num_channels", id="no-channels"),
            pytest.param((-8, -2), {}, "num_channels", id="negative"),
            pytest.param((8, 2), {"v_threshold": math.nan}, "v_threshold", id="threshold-nan"),
            pytest.param((8, 2), {"v_threshold": math.inf}, "v_threshold", id="threshold-inf"),
            pytest.param((8, 2), {"surrogate": "step"}, "surrogate", id="surrogate"),
            pytest.param((8, 2), {"surrogate_alpha": 0.0}, "surrogate_alpha", id="alpha"),
            pytest.param((8, 2), {"spike_type": "graded"}, "spike_type", id="spike-type"),
        ],
    )
    def test_shared_arguments_are_named(self, make, sizes, settings, name):
        with pytest.raises(ValueError, match=f"`{name}`"):
            make(*sizes, **settings)

    @pytest.mark.parametrize(
        ("make", "settings", "name"),
        [
            pytest.param(BPSN, {"decay": 0.0}, "decay", id="bpsn-decay=0"),
            pytest.param(BPSN, {"decay": 1.0}, "decay", id="bpsn-decay=1"),
            pytest.param(BPSN, {"decay": math.nan}, "decay", id="bpsn-decay=nan"),
            pytest.param(BPSN, {"reset": -0.1}, "reset", id="reset<0"),
            pytest.param(BPSN, {"reset": math.inf}, "reset", id="reset=inf"),
            pytest.param(BPSN, {"reset": math.nan}, "reset", id="reset=nan"),
            pytest.param(BPSN, {"reset_iterations": -1}, "reset_iterations", id="sweeps<0"),
            pytest.param(BPSN, {"implementation": "fft"}, "implementation", id="implementation"),
            pytest.param(LIF, {"decay": 0.0}, "decay", id="lif-decay=0"),
            pytest.param(LIF, {"decay": 1.5}, "decay", id="lif-decay>1"),
            pytest.param(LIF, {"num_timesteps": 0}, "num_timesteps", id="timesteps=0"),
            pytest.param(PSN, {"length": 0}, "length", id="length=0"),
        ],
    )
    def test_own_arguments_are_named(self, make, settings, name):
        with pytest.raises(ValueError, match=f"`{name}`"):
            make(8, 2, **settings)

    @every_neuron
    @pytest.mark.parametrize(
        ("current", "attention_mask", "name", "error"),
        [
            pytest.param(torch.zeros(40, 8), None, "current", ValueError, id="current-2d"),
            pytest.param(torch.zeros(2, 0, 8), None, "current", ValueError, id="no-tokens"),
            pytest.param(torch.zeros(2, 40, 4), None, "current", ValueError, id="channels"),
            pytest.param(torch.zeros(2, 40, 8).int(), None, "current", TypeError, id="int"),
            pytest.param(torch.zeros(2, 40, 8), torch.ones(2, 39), "attention_mask", ValueError, id="mask-length"),
            pytest.param(torch.zeros(2, 40, 8), torch.ones(1, 40), "attention_mask", ValueError, id="mask-batch"),
        ],
    )
    def test_inputs_are_named(self, neuron_type, current, attention_mask, name, error):
        neuron = NEURONS[neuron_type]()
        with pytest.raises(error, match=f"`{name}`"):
            neuron(current, attention_mask)
        if isinstance(neuron, BPSN):
            with pytest.raises(error, match=f"`{name}`"):
                neuron.membrane_potential(current, attention_mask)

    def test_repeat_coding_needs_whole_time_steps(self):
        with pytest.raises(ValueError, match="`current` must hold 4 time-steps"):
            LIF(8, 2, num_timesteps=4)(torch.zeros(6, 5, 8))


property_test = settings(derandomize=True, deadline=None, max_examples=40)


@st.composite
def problems(draw, **fixed):
    """A BPSN of random settings and parameters, a current and a mask; spikes flow in nearly all of them."""
    options = {
        "normalize": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "reset_iterations": draw(st.sampled_from([0, 1, 2, 3])),
        "spike_type": draw(st.sampled_from(SPIKE_TYPES)),
        **fixed,
    }
    seed = draw(st.integers(0, 2**31))
    neuron = randomized(BPSN(4, draw(st.sampled_from([1, 2, 4])), **options), seed)
    length = draw(st.integers(20, 140))
    m = None
    if draw(st.booleans()):
        m = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < draw(st.sampled_from([0.5, 0.9]))
    return neuron, random_current(2, length, 4, seed=seed), m


@property_test
@given(problems())
def test_spikes_are_whole_and_the_same_in_every_implementation(problem):
    neuron, current, m = problem
    results = []
    for implementation in IMPLEMENTATIONS:
        neuron.implementation = implementation
        results.append(neuron(current, m))
    values = {0, 1} if neuron.spike_type == "binary" else {-1, 0, 1}
    assert set(results[0].unique().tolist()) <= values
    assert 0 < results[0].abs().mean() < 1
    assert all(torch.equal(result, results[0]) for result in results[1:])


@property_test
@given(problems(normalize=True))
def test_potential_never_exceeds_the_currents(problem):
    neuron, current, m = problem
    valid = current if m is None else current[m]
    assert neuron.membrane_potential(current, m).abs().max() <= valid.abs().max() * (1 + 1e-12)


@property_test
@given(problems(), st.integers(0, 70), st.integers(0, 70))
def test_padding_never_matters(problem, left, right):
    neuron, current, m = problem
    m = torch.ones(current.shape[:2]).bool() if m is None else m
    alone = neuron(current, m)
    padded = torch.nn.functional.pad(current, (0, 0, left, right), value=math.nan)
    got = neuron(padded, torch.nn.functional.pad(m, (left, right)))
    assert 0 < alone.abs().mean() < 1
    assert torch.equal(got[:, left : left + current.shape[1]], alone)


@property_test
@given(problems(bidirectional=True))
def test_time_reversal(problem):
    neuron, current, m = problem
    spikes = neuron(current, m)
    forward, backward = neuron.decay_forward_logit, neuron.decay_backward_logit
    neuron.decay_forward_logit, neuron.decay_backward_logit = backward, forward
    mirrored = neuron(current.flip(1), None if m is None else m.flip(1)).flip(1)
    assert 0 < spikes.abs().mean() < 1
    assert torch.equal(mirrored, spikes)


@property_test
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(20, 90),
    decay=st.floats(0.01, 0.99),
    v_threshold=st.floats(0.05, 2.0),
    mean=st.floats(-0.5, 1.0),
    spike_type=st.sampled_from(SPIKE_TYPES),
)
def test_lif_identity(seed, length, decay, v_threshold, mean, spike_type):
    current = random_current(2, length, 4, seed=seed, mean=mean)
    lif = LIF(4, 2, v_threshold=v_threshold, decay=decay, spike_type=spike_type).double()
    expected = lif(current)
    assert 0 < expected.abs().mean() < 1
    assert torch.equal(as_lif(lif, length)(current), expected)


# Names by which the tools of the field find a neuron's state and call it: spikingjelly's `functional` (reset_net,
# set_step_mode, set_backend, detach_net), snntorch's `utils.reset` and hidden states, NeuroBench's hooks. A module of
# ours has no state between batches, so it must have none of these names.
PROBED = (
    "reset detach step_mode supported_step_mode backend supported_backends store_v_seq v v_seq memories "
    "mem spk init_hidden reset_hidden reset_mem detach_hidden hidden_init instances"
).split()


@pytest.mark.parametrize("make", [BPSN, LIF, lambda *a, **kw: PSN(*a, length=5, **kw)], ids=["bpsn", "lif", "psn"])
@pytest.mark.parametrize("name", PROBED)
def test_tools_for_spiking_networks_find_nothing_to_call(make, name):
    assert not hasattr(make(8, 2), name)


def test_reset_net_does_nothing(make_config):
    """What spikingjelly's `functional.reset_net` does between batches, on every module of a model."""
    model = SNNBertModel(make_config()).eval()
    inputs = {"input_ids": torch.arange(5, 29).view(2, 12)}
    with torch.no_grad():
        before = model(**inputs, output_firing_rates=True)
        for module in model.modules():
            if hasattr(module, "reset"):
                module.reset()
        after = model(**inputs)
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)
    assert all(0 < rate.mean() < 1 for rate in before.firing_rates)
