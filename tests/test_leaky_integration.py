"""The fast forms of the leaky integration against its definition and against a sequential recursion, in float64."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_snn_bert.leaky_integration import (
    IMPLEMENTATIONS,
    STENCIL_MAX_REACH,
    check_implementation,
    fast_stencil,
    leaky_integration,
    leaky_sum,
    stencil_kernel,
    stencil_reach,
    total_weight,
)

FAST = ("toeplitz", "chunked", "stencil", "auto")
# Each direction's decays, one a group.
DECAYS = {
    "zero": ([0.0], [0.0]),
    "vanishing": ([1e-30], [1e-30]),
    "small": ([0.05], [0.03]),
    "half": ([0.5], [0.5]),
    "forward-only": ([0.9], [0.0]),
    "backward-only": ([0.0], [0.9]),
    "asymmetric": ([0.99], [0.2]),
    "slow": ([0.9999], [0.9999]),
    "one": ([1.0], [1.0]),
    "one-and-zero": ([1.0], [0.0]),
    "mixed": ([0.0, 1.0, 0.5, 1e-30], [0.9999, 0.0, 0.7, 1.0]),
}
MASKS = {
    "none": lambda batch, length: None,
    "right": lambda batch, length: _mask(batch, length, lambda b, t: t < max(1, length - 1 - b)),
    "left": lambda batch, length: _mask(batch, length, lambda b, t: t >= min(length - 1, length // 2 + b)),
    "holes": lambda batch, length: _mask(batch, length, lambda b, t: (t * 7 + b) % 3 != 1),
    "one-valid": lambda batch, length: _mask(batch, length, lambda b, t: t == length // 2),
    "row-all-masked": lambda batch, length: _mask(batch, length, lambda b, t: b > 0),
}

every_fast = pytest.mark.parametrize("implementation", FAST)
every_decay = pytest.mark.parametrize("decays", DECAYS)
every_mask = pytest.mark.parametrize("mask", MASKS)
every_normalize = pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "sum"])


def _mask(batch, length, valid):
    return torch.tensor([[int(valid(b, t)) for t in range(length)] for b in range(batch)])


def decay_pair(name, dtype=torch.float64):
    return tuple(torch.tensor(values, dtype=dtype) for values in DECAYS[name])


def random_current(batch, length, channels, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, length, channels, generator=generator, dtype=torch.float64) + 0.1).to(dtype)


def recursion(current, decay_forward, decay_backward, attention_mask=None, normalize=True):
    """The definition as two sequential passes in float64, O(seq_len); independent of the package."""
    batch, length, channels = current.shape
    repeats = channels // len(decay_forward)
    f = decay_forward.double().numpy().repeat(repeats)
    b = decay_backward.double().numpy().repeat(repeats)
    m = np.ones((batch, length)) if attention_mask is None else attention_mask.double().numpy()
    x = np.where(m[..., None] > 0, current.double().numpy(), 0)
    x = np.concatenate((x, np.broadcast_to(m[..., None], x.shape)))
    total = -x
    charge = np.zeros_like(x[:, 0])
    for t in range(length):
        charge = f * charge + x[:, t]
        total[:, t] += charge
    charge = np.zeros_like(charge)
    for t in reversed(range(length)):
        charge = b * charge + x[:, t]
        total[:, t] += charge
    total, weight = total[:batch], total[batch:]
    total = total / np.where(m[..., None] > 0, weight, 1) if normalize else total
    return torch.from_numpy(np.where(m[..., None] > 0, total, 0))


def assert_equal_to_precision(got, expected, tolerance=1e-11):
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements in the largest tensor that an operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


class TestExactness:
    @every_decay
    @every_mask
    def test_naive_is_the_recursion(self, decays, mask):
        for length, normalize in product((1, 2, 20), (True, False)):
            current, (f, b), m = random_current(2, length, 4), decay_pair(decays), MASKS[mask](2, length)
            naive = leaky_integration(current, f, b, m, normalize=normalize, implementation="naive")
            assert naive.abs().sum() > 0
            assert_equal_to_precision(naive, recursion(current, f, b, m, normalize))

    @every_fast
    @every_decay
    @pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33, 64, 65, 100])
    def test_equals_naive(self, implementation, decays, length):
        current, (f, b) = random_current(2, length, 4), decay_pair(decays)
        for normalize in (True, False) if length < 100 else (True,):
            expected = _naive_result(decays, length, normalize)
            got = leaky_integration(current, f, b, normalize=normalize, implementation=implementation)
            assert_equal_to_precision(got, expected)

    @every_fast
    @every_decay
    @every_mask
    def test_equals_recursion_under_a_mask(self, implementation, decays, mask):
        for length, normalize in product((3, 65, 257), (True, False)):
            current, (f, b), m = random_current(3, length, 8), decay_pair(decays), MASKS[mask](3, length)
            got = leaky_integration(current, f, b, m, normalize=normalize, implementation=implementation)
            assert got.abs().sum() > 0
            assert_equal_to_precision(got, recursion(current, f, b, m, normalize))
            if m is not None:
                assert (got[m == 0] == 0).all()

    @every_fast
    @pytest.mark.parametrize("groups", [1, 2, 3, 6], ids=lambda groups: f"groups={groups}")
    @pytest.mark.parametrize(("batch", "length"), [(1, 5), (4, 40), (2, 1025)])
    def test_groups_own_blocks_of_channels(self, implementation, groups, batch, length):
        current = random_current(batch, length, 6)
        f, b = torch.linspace(0.1, 0.95, groups).double(), torch.linspace(0.8, 0.0, groups).double()
        got = leaky_integration(current, f, b, implementation=implementation)
        assert_equal_to_precision(got, recursion(current, f, b))
        apart = [
            leaky_integration(part, f[g : g + 1], b[g : g + 1], implementation=implementation)
            for g, part in enumerate(current.chunk(groups, dim=-1))
        ]
        assert_equal_to_precision(got, torch.cat(apart, dim=-1))

    @pytest.mark.parametrize(("implementation", "length"), [("toeplitz", 700), ("chunked", 1024), ("chunked", 2500)])
    @every_decay
    def test_equals_recursion_at_length(self, implementation, decays, length):
        current, (f, b), m = random_current(2, length, 4), decay_pair(decays), MASKS["holes"](2, length)
        got = leaky_integration(current, f, b, m, implementation=implementation)
        assert_equal_to_precision(got, recursion(current, f, b, m), 1e-10)

    @pytest.mark.parametrize("length", [8192, 32_768])
    @every_normalize
    def test_float32_holds_at_any_length(self, length, normalize):
        f, b = torch.tensor([1e-30, 0.9999, 0.5, 1.0]), torch.tensor([0.9999, 1e-30, 0.99, 0.0])
        current = random_current(1, length, 4, torch.float32)
        got = leaky_integration(current, f, b, normalize=normalize)
        expected = recursion(current, f, b, normalize=normalize)
        assert got.dtype == torch.float32 and got.isfinite().all()
        scale = expected.abs().amax(dim=1, keepdim=True)
        assert ((got - expected).abs() / scale).max() < 2e-5

    @pytest.mark.parametrize("length", [1, 16, 64, 65, 1000])
    def test_auto_agrees_with_them(self, length):
        current, (f, b) = random_current(1, length, 4), decay_pair("mixed")
        auto = leaky_integration(current, f, b)
        for name in ("toeplitz", "chunked"):
            torch.testing.assert_close(auto, leaky_integration(current, f, b, implementation=name), rtol=0, atol=1e-13)

    def test_total_weight_is_the_sum_of_ones(self):
        f, b = decay_pair("mixed")
        m = MASKS["holes"](2, 50)
        expected = recursion(torch.ones(2, 50, 4), f, b, m, normalize=False).masked_fill(m[..., None] == 0, 1)
        for implementation in IMPLEMENTATIONS:
            weight = total_weight(torch.ones(2, 50, 8).double(), f, b, m, implementation)
            assert weight.min() >= 1
            assert_equal_to_precision(weight, expected)


_NAIVE_RESULTS = {}


def _naive_result(decays, length, normalize):
    key = decays, length, normalize
    if key not in _NAIVE_RESULTS:
        current = random_current(2, length, 4)
        _NAIVE_RESULTS[key] = leaky_integration(
            current, *decay_pair(decays), normalize=normalize, implementation="naive"
        )
    return _NAIVE_RESULTS[key]


class TestDtypes:
    @every_fast
    @every_normalize
    @pytest.mark.parametrize("decays", ["vanishing", "asymmetric", "mixed"])
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str
    )
    def test_low_precision_rounds_only_the_result(self, implementation, normalize, decays, dtype, tolerance):
        current, (f, b) = random_current(2, 300, 4, dtype), decay_pair(decays, torch.float32)
        got = leaky_integration(current, f, b, normalize=normalize, implementation=implementation)
        expected = recursion(current, f, b, normalize=normalize)
        assert got.dtype == dtype
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=1e-5 * scale)

    def test_dtype_is_that_of_the_current_whatever_the_decays(self):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for decay_dtype in (torch.float64, torch.float32, torch.bfloat16):
                assert (
                    leaky_integration(random_current(1, 4, 4, dtype), *decay_pair("half", decay_dtype)).dtype == dtype
                )

    @pytest.mark.parametrize("implementation", ["toeplitz", "chunked"])
    def test_autocast_changes_nothing(self, implementation):
        current, (f, b), m = random_current(2, 200, 4, torch.float32), decay_pair("asymmetric", torch.float32), None
        expected = leaky_integration(current, f, b, m, implementation=implementation)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = leaky_integration(current, f, b, m, implementation=implementation)
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)

    @pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16], ids=str)
    def test_any_mask_dtype(self, mask_dtype):
        current, (f, b), m = random_current(3, 40, 4), decay_pair("mixed"), MASKS["right"](3, 40)
        assert torch.equal(leaky_integration(current, f, b, m.to(mask_dtype)), leaky_integration(current, f, b, m))

    @every_fast
    def test_strided_current(self, implementation):
        current, (f, b) = random_current(2, 70, 8), decay_pair("mixed")
        strided = current.transpose(0, 1).contiguous().transpose(0, 1)
        assert not strided.is_contiguous()
        assert_equal_to_precision(
            leaky_integration(strided, f, b, implementation=implementation), recursion(current, f, b)
        )


class TestPadding:
    @pytest.mark.parametrize("implementation", [*FAST, "naive"])
    @pytest.mark.parametrize("mask", ["right", "left", "holes", "one-valid", "row-all-masked"])
    @pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30], ids=str)
    def test_what_stands_in_it_changes_nothing(self, implementation, mask, junk):
        length = 20 if implementation == "naive" else 70
        current, m = random_current(3, length, 4), MASKS[mask](3, length)
        decays = [d.requires_grad_() for d in decay_pair("mixed")]
        results = []
        for x in (current, current.masked_fill(m[..., None] == 0, junk)):
            x.requires_grad_()
            out = leaky_integration(x, *decays, m, implementation=implementation)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, *decays))))
        assert results[0][0].abs().sum() > 0
        for clean, dirty in zip(*results, strict=True):
            assert dirty.isfinite().all()
            assert torch.equal(clean, dirty)
        assert (results[1][1][m == 0] == 0).all()

    @every_fast
    @every_normalize
    @pytest.mark.parametrize("left", [0, 1, 40])
    @pytest.mark.parametrize("right", [0, 1, 100])
    def test_adding_it_changes_nothing(self, implementation, normalize, left, right):
        current, (f, b) = random_current(2, 37, 4), decay_pair("mixed")
        padded = torch.nn.functional.pad(current, (0, 0, left, right), value=7.0)
        m = torch.nn.functional.pad(torch.ones(2, 37), (left, right))
        alone = leaky_integration(current, f, b, normalize=normalize, implementation=implementation)
        got = leaky_integration(padded, f, b, m, normalize=normalize, implementation=implementation)
        assert_equal_to_precision(got[:, left : left + 37], alone)

    @every_fast
    def test_batch_mates_change_nothing(self, implementation):
        current, (f, b), m = random_current(4, 70, 4), decay_pair("mixed"), MASKS["right"](4, 70)
        together = leaky_integration(current, f, b, m, implementation=implementation)
        for row in range(4):
            alone = leaky_integration(current[row : row + 1], f, b, m[row : row + 1], implementation=implementation)
            assert_equal_to_precision(together[row : row + 1], alone)
        mates = current.clone()
        mates[1:] = float("nan")
        got = leaky_integration(mates, f, b, m, implementation=implementation)
        assert_equal_to_precision(got[0], together[0])


class TestGradients:
    @pytest.mark.parametrize("implementation", ["naive", *FAST])
    @every_normalize
    @pytest.mark.parametrize("mask", ["none", "holes", "row-all-masked"])
    def test_gradcheck(self, implementation, normalize, mask):
        length = 6 if implementation == "naive" else 35
        current, m = random_current(2, length, 2).requires_grad_(), MASKS[mask](2, length)
        f = torch.tensor([0.6, 0.1], dtype=torch.float64, requires_grad=True)
        b = torch.tensor([0.2, 0.95], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x, f, b: leaky_integration(x, f, b, m, normalize=normalize, implementation=implementation),
            (current, f, b),
            fast_mode=True,
        )

    @pytest.mark.parametrize("implementation", ["naive", *FAST])
    def test_at_decay_zero_only_the_next_token_counts(self, implementation):
        current, weight = random_current(2, 35, 2), random_current(2, 35, 2, seed=1)
        zeros = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        out = leaky_sum(current, *zeros, implementation)
        forward, backward = torch.autograd.grad((out * weight).sum(), zeros)
        assert torch.equal(out, current)
        assert forward.item() == pytest.approx((weight[:, 1:] * current[:, :-1]).sum().item())
        assert backward.item() == pytest.approx((weight[:, :-1] * current[:, 1:]).sum().item())

    @every_decay
    @every_normalize
    @pytest.mark.parametrize("length", [1, 20, 65])
    def test_all_implementations_have_the_same(self, decays, normalize, length):
        current, m = random_current(2, length, 4), MASKS["holes"](2, length)
        weight = random_current(2, length, 4, seed=1)
        gradients = {}
        for implementation in IMPLEMENTATIONS:
            if implementation == "naive" and length > 20:
                continue
            inputs = [x.clone().requires_grad_() for x in (current, *decay_pair(decays))]
            out = leaky_integration(*inputs, m, normalize=normalize, implementation=implementation)
            gradients[implementation] = torch.autograd.grad((out * weight).sum(), inputs, materialize_grads=True)
        reference = gradients.pop("naive", gradients["toeplitz"])
        assert all(gradient.isfinite().all() for gradient in reference)
        assert reference[0].abs().sum() > 0
        for gradient in gradients.values():
            for got, expected in zip(gradient, reference, strict=True):
                assert_equal_to_precision(got, expected, 1e-10)

    @every_fast
    @pytest.mark.parametrize("length", [10, 70])
    def test_inputs_are_left_alone(self, implementation, length):
        inputs = [random_current(2, length, 4).requires_grad_(), *(d.requires_grad_() for d in decay_pair("mixed"))]
        grad_output = random_current(2, length, 4, seed=1)
        tensors = (*inputs, grad_output)
        before = [x.detach().clone() for x in tensors]
        leaky_integration(*inputs, implementation=implementation).backward(grad_output)
        assert all(torch.equal(x, copy) for x, copy in zip(tensors, before, strict=True))

    @pytest.mark.parametrize("length", [1, 40, 8192])
    def test_finite_in_float32(self, length):
        inputs = [random_current(1, length, 4, torch.float32), *decay_pair("mixed", torch.float32)]
        out = leaky_integration(*[x.requires_grad_() for x in inputs])
        for gradient in torch.autograd.grad(out.square().sum(), inputs):
            assert gradient.isfinite().all()


class TestStencil:
    """The filter that small decays allow, in float32: what a model without the compiled kernels runs on."""

    # Decays of six groups, of which the largest decides.
    DECAYS = {
        "as-trained": [0.03, 0.1, 0.05, 0.07, 0.04, 0.06],
        "tiny": [1e-12, 0.0, 1e-3, 1e-30, 1e-6, 1e-38],
        "wide": [0.6, 0.02, 0.3, 0.0, 0.5, 1e-20],
    }

    def problem(self, name, length, mask="none", batch=3, channels=48):
        f = torch.tensor(self.DECAYS[name])
        return random_current(batch, length, channels, torch.float32), f, f.flip(0), MASKS[mask](batch, length)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("decay", [0.0, 1e-30, 0.03, 0.1, 0.5, 0.9])
    def test_what_lies_beyond_the_reach_cannot_be_seen(self, decay, dtype):
        decays = torch.tensor([decay / 2, decay], dtype=dtype)
        reach = stencil_reach(decays, decays.flip(0), 10_000)
        further = torch.arange(reach + 1, 20_000, dtype=torch.float64)
        rounding = torch.finfo(dtype).eps
        assert (decay**further).sum() <= rounding
        assert (further * decay ** (further - 1)).sum() <= rounding
        assert reach == 1 or (
            torch.arange(reach, 20_000) * float(decays[1]) ** (torch.arange(reach, 20_000) - 1)
        ).sum() > (rounding)

    def test_reach_ends_with_the_sequence(self):
        assert stencil_reach(*decay_pair("one"), 5) == 5
        assert stencil_reach(*decay_pair("small"), 0) == 0

    @pytest.mark.parametrize("length", [1, 2, 3, 8, 20, 129, 2500])
    @pytest.mark.parametrize("name", DECAYS)
    @pytest.mark.parametrize("mask", MASKS)
    def test_float32_equals_the_recursion(self, name, length, mask):
        current, f, b, m = self.problem(name, length, mask)
        assert fast_stencil(current, f, b) is not None
        for normalize in (True, False):
            got = leaky_integration(current, f, b, m, normalize=normalize)
            expected = recursion(current.double(), f.double(), b.double(), m, normalize)
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-6)

    @pytest.mark.parametrize("length", [1, 2, 9, 70, 1300])
    @pytest.mark.parametrize("name", DECAYS)
    @pytest.mark.parametrize("mask", ["none", "left", "holes"])
    def test_float32_gradients(self, name, length, mask):
        *inputs, m = self.problem(name, length, mask)
        weight = random_current(3, length, 48, torch.float32, seed=1)
        narrow = [x.clone().requires_grad_() for x in inputs]
        wide = [x.double().requires_grad_() for x in inputs]
        got = torch.autograd.grad((leaky_integration(*narrow, m) * weight).sum(), narrow)
        out = leaky_integration(*wide, m, implementation="chunked")
        for g, e in zip(got, torch.autograd.grad((out * weight.double()).sum(), wide), strict=True):
            torch.testing.assert_close(g.double(), e, rtol=0, atol=1e-5 * max(1.0, e.abs().max().item()))

    def test_is_taken_where_it_is_fast(self):
        current, f, b, _ = self.problem("as-trained", 200)
        assert fast_stencil(current, f, b).shape[1] < 2 * STENCIL_MAX_REACH
        assert fast_stencil(current, f, torch.full_like(b, 0.95)) is None
        assert fast_stencil(current.double(), f.double(), b.double()) is None
        expected = leaky_sum(current, f, b)
        if hasattr(torch.backends.mkldnn, "conv"):
            conv, before = torch.backends.mkldnn.conv, torch.backends.mkldnn.conv.fp32_precision
            conv.fp32_precision = "bf16"
            try:
                assert fast_stencil(current, f, b) is None
            finally:
                conv.fp32_precision = before
        with torch.backends.mkldnn.flags(enabled=False):
            assert fast_stencil(current, f, b) is None
            for name in ("auto", "stencil"):
                torch.testing.assert_close(leaky_sum(current, f, b, name), expected, rtol=0, atol=2e-6)

    def test_tensors_without_values(self):
        with FakeTensorMode() as mode:
            current, f, b = (mode.from_tensor(x) for x in self.problem("as-trained", 20)[:3])
            assert fast_stencil(current, f, b) is None
            assert leaky_sum(current, f, b).shape == current.shape

    def test_rows_and_padding_change_nothing(self):
        current, f, b, _ = self.problem("as-trained", 37)
        together = leaky_sum(current, f, b)
        padded = torch.nn.functional.pad(current, (0, 0, 11, 6))
        assert torch.equal(leaky_sum(current[1:2], f, b), together[1:2])
        torch.testing.assert_close(leaky_sum(padded, f, b)[:, 11:-6], together, rtol=0, atol=1e-6)

    def test_kernel_has_no_denormal_numbers(self):
        tiny = torch.tensor([1e-9, 0.2])
        kernel = stencil_kernel(tiny, tiny, 12)
        assert kernel[kernel != 0].min() >= 1e-10
        assert kernel[:, 12].tolist() == [1, 1]


class TestCost:
    @staticmethod
    def largest(implementation, length):
        current, (f, b) = random_current(2, length, 8, torch.float32), decay_pair("mixed", torch.float32)
        with LargestTensor() as largest:
            leaky_integration(current, f, b, implementation=implementation)
        return largest.numel

    @pytest.mark.parametrize("implementation", ["chunked", "auto"])
    @pytest.mark.parametrize("length", [1024, 4096, 16_384])
    def test_is_linear_in_length(self, implementation, length):
        assert self.largest(implementation, length) <= 2 * (2 * length * 8)

    @pytest.mark.parametrize("length", [256, 512, 1024])
    def test_toeplitz_is_quadratic_in_length(self, length):
        assert self.largest("toeplitz", length) == 4 * length**2


class TestCompile:
    def test_sum_compiles_without_a_graph_break(self):
        self.check(leaky_sum)

    def test_integration_compiles_without_a_graph_break(self):
        self.check(leaky_integration)

    @staticmethod
    def check(function):
        inputs = [random_current(2, 40, 4, torch.float32), *decay_pair("asymmetric", torch.float32)]
        inputs = [x.requires_grad_() for x in inputs]
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        got, expected = compiled(*inputs), function(*inputs)
        torch.testing.assert_close(got, expected)
        for one, other in zip(
            torch.autograd.grad(got.square().sum(), inputs),
            torch.autograd.grad(expected.square().sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


class TestErrors:
    good = {
        "current": torch.zeros(2, 5, 4),
        "decay_forward": torch.tensor([0.5, 0.5]),
        "decay_backward": torch.tensor([0.5, 0.5]),
    }

    @pytest.mark.parametrize(
        ("changes", "name", "error"),
        [
            pytest.param({"current": torch.zeros(5, 4)}, "current", ValueError, id="current-2d"),
            pytest.param({"current": torch.zeros(1, 2, 5, 4)}, "current", ValueError, id="current-4d"),
            pytest.param({"current": torch.zeros(2, 0, 4)}, "current", ValueError, id="no-tokens"),
            pytest.param({"current": torch.zeros(2, 5, 4).long()}, "current", TypeError, id="current-int"),
            pytest.param({"decay_forward": torch.tensor(0.5)}, "decay_forward", ValueError, id="decay-0d"),
            pytest.param({"decay_forward": torch.zeros(2, 1)}, "decay_forward", ValueError, id="decay-2d"),
            pytest.param({"decay_forward": torch.zeros(3)}, "decay_forward", ValueError, id="groups-do-not-divide"),
            pytest.param({"decay_backward": torch.zeros(1)}, "decay_backward", ValueError, id="groups-differ"),
            pytest.param(
                {"decay_forward": torch.zeros(0), "decay_backward": torch.zeros(0)},
                "decay_forward",
                ValueError,
                id="no-groups",
            ),
            pytest.param({"decay_forward": torch.tensor([0.5, 1.01])}, "decay_forward", ValueError, id="decay>1"),
            pytest.param({"decay_backward": torch.tensor([-0.1, 0.5])}, "decay_backward", ValueError, id="decay<0"),
            pytest.param({"decay_backward": torch.tensor([float("nan"), 0])}, "decay_backward", ValueError, id="nan"),
            pytest.param({"attention_mask": torch.ones(2, 4)}, "attention_mask", ValueError, id="mask-length"),
            pytest.param({"attention_mask": torch.ones(2, 5, 1)}, "attention_mask", ValueError, id="mask-3d"),
            pytest.param({"implementation": "fft"}, "implementation", ValueError, id="implementation"),
        ],
    )
    def test_bad_arguments_are_named(self, changes, name, error):
        with pytest.raises(error, match=f"`{name}`"):
            leaky_integration(**{**self.good, **changes})

    def test_implementation_names(self):
        for name in ("auto", *IMPLEMENTATIONS):
            check_implementation(name)
        with pytest.raises(ValueError, match=r"chunked.*naive.*toeplitz.*'Auto'"):
            check_implementation("Auto")


@st.composite
def problems(draw):
    groups, width = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 140))
    decay = st.one_of(st.sampled_from([0.0, 1e-30, 0.9999, 1.0]), st.floats(0, 1))
    f, b = (
        torch.tensor(draw(st.lists(decay, min_size=groups, max_size=groups)), dtype=torch.float64) for _ in range(2)
    )
    seed = draw(st.integers(0, 2**31))
    current = random_current(batch, length, groups * width, seed=seed) * draw(st.sampled_from([1e-3, 1.0, 1e3]))
    m = None
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(seed)
        m = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    return current, f, b, m


property_test = settings(derandomize=True, deadline=None, max_examples=60)


@property_test
@given(problems(), st.booleans())
def test_implementations_are_equivalent(problem, normalize):
    current, f, b, m = problem
    expected = recursion(current, f, b, m, normalize)
    for implementation in FAST:
        got = leaky_integration(current, f, b, m, normalize=normalize, implementation=implementation)
        assert_equal_to_precision(got, expected, 1e-10)


@property_test
@given(problems())
def test_mean_is_bounded_by_the_currents(problem):
    current, f, b, m = problem
    valid = current if m is None else current[m]
    if valid.numel():
        potential = leaky_integration(current, f, b, m)
        assert potential.abs().max() <= valid.abs().max() * (1 + 1e-12)


@property_test
@given(problems())
def test_reversal_exchanges_the_decays(problem):
    current, f, b, m = problem
    expected = leaky_integration(current, f, b, m)
    got = leaky_integration(current.flip(1), b, f, None if m is None else m.flip(1)).flip(1)
    assert_equal_to_precision(got, expected, 1e-10)


@property_test
@given(problems())
def test_is_linear_in_the_current(problem):
    current, f, b, m = problem
    other = random_current(*current.shape, seed=3)
    total = leaky_integration(2 * current - 3 * other, f, b, m)
    parts = 2 * leaky_integration(current, f, b, m) - 3 * leaky_integration(other, f, b, m)
    assert_equal_to_precision(total, parts, 1e-9)
