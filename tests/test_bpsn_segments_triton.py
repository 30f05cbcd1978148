"""The kernels for long sequences on a GPU: in Triton's interpreter on a CPU, and on a GPU where there is one."""

import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from bpsn_checks import (
    check,
    check_on_gpu,
    check_one_token,
    interpreted,
    make_neuron,
    masks,
    needs_gpu,
    reference_of,
    run,
)
from torch.utils.checkpoint import checkpoint

from modeling_snn_bert import bpsn, triton_tiles
from modeling_snn_bert import bpsn_segments_triton as kernels
from modeling_snn_bert.surrogate_gradients import SURROGATES


@pytest.fixture
def on_cpu(monkeypatch):
    """Neurons take these kernels on a CPU, with chunks and segments so short that few tokens have several of them."""
    monkeypatch.setattr("modeling_snn_bert.bpsn.MAX_TOKENS", 0)
    monkeypatch.setattr(triton_tiles, "_DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(kernels, "CHUNK", 4)
    monkeypatch.setattr(kernels, "SEGMENT", 8)
    monkeypatch.setattr(kernels, "WEIGHT_TILE", 8)


@interpreted
@pytest.mark.usefixtures("on_cpu")
class TestInterpreted:
    @pytest.mark.parametrize("length", [2, 7])
    def test_one_segment(self, length):
        neuron = make_neuron(16, 2)
        check(neuron, torch.randn(2, length, 16) + 0.3)

    def test_one_token(self):
        check_one_token()

    @pytest.mark.parametrize(
        ("mask", "spike_type"),
        [
            ("none", "ternary"),
            ("right", "binary"),
            ("left", "ternary"),
            ("holes", "binary"),
            ("row-all-masked", "binary"),
        ],
    )
    def test_several_segments(self, mask, spike_type):
        neuron = make_neuron(16, 2, spike_type=spike_type)
        current, m = torch.randn(2, 18, 16) + 0.2, masks(2, 18)[mask]
        if m is not None:
            # Junk in the padding.
            current[~m] = math.nan
        check(neuron, current, m)

    @pytest.mark.slow
    @pytest.mark.parametrize("length", [6, 11], ids=["one-segment", "segments"])
    @pytest.mark.parametrize("reset_iterations", [0, 3], ids=lambda n: f"sweeps={n}")
    @pytest.mark.parametrize(("normalize", "bidirectional", "mask"), [(True, True, "none"), (False, False, "right")])
    def test_settings(self, length, reset_iterations, normalize, bidirectional, mask):
        settings = {"reset_iterations": reset_iterations, "normalize": normalize, "bidirectional": bidirectional}
        neuron = make_neuron(16, 2, spike_type="ternary", **settings)
        check(neuron, torch.randn(2, length, 16) + 0.1, masks(2, length)[mask])

    @pytest.mark.parametrize("surrogate", sorted(SURROGATES))
    def test_surrogates(self, surrogate):
        neuron = make_neuron(16, 2, surrogate=surrogate, spike_type="ternary")
        check(neuron, torch.randn(1, 6, 16) + 0.1)

    @pytest.mark.parametrize(("channels", "groups"), [(24, 2), (12, 1), (7, 7), (96, 12)], ids=lambda n: str(n))
    def test_groups_of_any_size(self, channels, groups):
        neuron = make_neuron(channels, groups)
        check(neuron, torch.randn(2, 6, channels) + 0.3, masks(2, 6)["holes"])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, dtype):
        neuron = make_neuron(16, 2, reset_iterations=2)
        check(neuron, (torch.randn(2, 11, 16) + 0.3).to(dtype))

    def test_decays_whose_powers_vanish_and_that_hardly_leak(self):
        neuron = make_neuron(16, 2)
        with torch.no_grad():
            neuron.decay_forward_logit.copy_(torch.tensor([-70.0, 9.0]))
            neuron.decay_backward_logit.copy_(torch.tensor([9.0, -70.0]))
        current = torch.randn(1, 20, 16) + 0.3
        spikes = neuron(current)
        assert 0 < spikes.mean() < 1
        assert torch.equal(spikes, reference_of(neuron)(current.double()).float())

    def test_a_current_that_is_not_contiguous(self):
        neuron = make_neuron(16, 2)
        check(neuron, (torch.randn(16, 6, 2) + 0.3).transpose(0, 2))

    def test_an_empty_batch(self):
        neuron = make_neuron(16, 2)
        current = torch.zeros(0, 6, 16, requires_grad=True)
        spikes = neuron(current)
        assert spikes.shape == current.shape
        gradients = torch.autograd.grad(spikes.sum(), (current, *neuron.parameters()))
        assert all((gradient == 0).all() for gradient in gradients)

    def test_operators(self):
        torch.manual_seed(0)
        current, mask = torch.randn(2, 6, 16) + 0.3, masks(2, 6)["right"]
        parameters = [torch.rand(16), torch.rand(2), torch.rand(2), torch.rand(2)]
        torch.library.opcheck(kernels.bpsn_forward, (current, mask, *parameters, True, 1, False))
        backward = (torch.randn(2, 6, 16), current, None, *parameters, True, 1, True, "atan", 2.0)
        torch.library.opcheck(kernels.bpsn_backward, backward)

    @pytest.mark.parametrize("way", ["compile", "checkpoint", "autocast"])
    def test_what_wraps_a_model_sees_the_operator(self, way):
        neuron, current = make_neuron(16, 2), torch.randn(2, 6, 16) + 0.3
        weight = torch.randn(2, 6, 16)
        spikes, _, gradients = run(neuron, current, None, weight)
        assert 0 < spikes.mean() < 1
        call = {
            "compile": torch.compile(neuron, backend="aot_eager", fullgraph=True),
            "checkpoint": partial(checkpoint, neuron, use_reentrant=False),
            "autocast": torch.autocast("cpu", torch.bfloat16)(neuron.forward),
        }[way]
        current = current.clone().requires_grad_()
        got = call(current)
        assert torch.equal(got, spikes)
        inputs = (current, *neuron.parameters())
        for one, other in zip(torch.autograd.grad(got, inputs, weight), gradients, strict=True):
            torch.testing.assert_close(one, other)

    def test_other_currents_and_named_implementations_go_another_way(self, monkeypatch):
        def refuse(*arguments):
            raise AssertionError("the kernel was called")

        refusing = bpsn._OPERATORS["triton_segments"]._replace(forward=refuse)
        monkeypatch.setitem(bpsn._OPERATORS, "triton_segments", refusing)
        current = torch.randn(2, 6, 16) + 0.3
        assert 0 < make_neuron(16, 2)(current.double()).mean() < 1
        assert 0 < make_neuron(16, 2, implementation="chunked")(current).mean() < 1
        with pytest.raises(AssertionError, match="the kernel was called"):
            make_neuron(16, 2)(current)


# Compiles for three generations of GPUs. It needs none, but finds what the interpreter lets pass.
COMPILE = """
import inspect, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from modeling_snn_bert import bpsn_segments_triton as kernels

arch, stage, dtype = int(sys.argv[1]), sys.argv[2], sys.argv[3]
numbers = "tokens channels group_size batch".split()
pointers = "weight v_threshold decay_forward decay_backward reset carries current_earlier current_later".split()
halves = ["current"]
if stage == "spikes":
    halves.append("spikes")
else:
    halves += ["grad_spikes", "grad_sum"]
    pointers += "received_before slope_forward slope_backward grad_parameters grad_earlier grad_later".split()
pointers += ["spikes_earlier", "spikes_later"]
types = {**dict.fromkeys(numbers, "i32"), **dict.fromkeys(pointers, "*fp32"), **dict.fromkeys(halves, f"*{dtype}")}
types |= {"alpha": "fp32", **({"packed": "*u8"} if stage == "spikes" else {})}
constants = {"RESET": True, "TERNARY": True, "SURROGATE": "atan", "PADDED": True, "ONE_GROUP": False}
constants |= {"CHUNK": 4, "SEGMENT": 256, "BLOCK": 64}
kernel = getattr(kernels, f"_{stage}")
names = list(inspect.signature(kernel.fn).parameters)
signature = {name: types.get(name, "constexpr") for name in names}
constexprs = {(i,): constants.get(name) for i, name in enumerate(names) if signature[name] == "constexpr"}
compiled = compile(ASTSource(kernel, signature, constexprs), target=GPUTarget("cuda", arch, 32))
assert compiled.asm["cubin"]
# A batch of 1, or a length that is a multiple of 16, must not become a constant of a kernel of its own.
free = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
assert free == set(numbers) - {"channels", "group_size"}, free
"""


@pytest.mark.slow
@pytest.mark.skipif(not triton_tiles._AVAILABLE, reason="triton is not installed")
@pytest.mark.parametrize(
    ("arch", "stage", "dtype"), [(80, "spikes", "fp16"), (90, "gradient", "bf16"), (90, "finish_gradient", "fp16")]
)
def test_compiles_for_a_gpu(arch, stage, dtype, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(arch), stage, dtype]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]


# Each line is two kernels to compile or more, ten seconds or so, and together they have every dtype and setting.
@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("length", "dtype", "channels", "groups", "settings"),
    [
        (513, torch.bfloat16, 768, 12, {}),
        (4096, torch.bfloat16, 768, 12, {}),
        (700, torch.float32, 96, 12, {"reset_iterations": 3, "spike_type": "ternary"}),
        (1025, torch.float16, 7, 7, {"reset_iterations": 0, "normalize": False, "bidirectional": False}),
    ],
)
def test_agrees_with_the_scans_on_a_gpu(length, dtype, channels, groups, settings):
    check_on_gpu(make_neuron(channels, groups, **settings), length, dtype)
