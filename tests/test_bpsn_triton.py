"""The kernels for a GPU: in Triton's interpreter on a CPU, in Triton's compiler, and on a GPU where there is one."""

import json
import math
import os
import subprocess
import sys

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

from modeling_snn_bert import SNNBertForSequenceClassification, SNNBertModel, bpsn, triton_tiles
from modeling_snn_bert import bpsn_triton as kernels
from modeling_snn_bert.surrogate_gradients import SURROGATES


@pytest.fixture
def launches(monkeypatch):
    """Neurons take these kernels on a CPU, with small programs; the names of the kernels as they are launched."""
    monkeypatch.setattr(triton_tiles, "_DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(kernels, "CHUNK", 4)
    for name in ("FORWARD_TILES", "BACKWARD_TILES"):
        monkeypatch.setattr(kernels, name, {8: (16, 1), 16: (8, 1), 32: (8, 1)})
    monkeypatch.setattr(kernels, "SUM_ROWS", 2)
    monkeypatch.setattr(kernels, "SUM_CHANNELS", 4)
    monkeypatch.setattr(bpsn, "MAX_TOKENS", 32)
    names = []

    def spy(function):
        names.append(function.__name__)
        return function

    monkeypatch.setattr(kernels, "kernel_in_operator", spy)
    return names


FORWARD, BACKWARD = ["_bpsn_forward"], ["_bpsn_backward", "_sum_rows"]


@interpreted
class TestInterpreted:
    @pytest.mark.parametrize("length", [2, 4, 7, 8, 9, 16, 29])
    def test_lengths(self, launches, length):
        check(make_neuron(16, 2), torch.randn(3, length, 16) + 0.3)
        assert launches == FORWARD + BACKWARD

    def test_one_token(self, launches):
        check_one_token()
        assert launches == FORWARD + BACKWARD

    @pytest.mark.parametrize("spike_type", ["binary", "ternary"])
    @pytest.mark.parametrize("mask", ["right", "left", "holes", "row-all-masked"])
    def test_masks(self, launches, mask, spike_type):
        neuron = make_neuron(16, 2, spike_type=spike_type)
        current, mask = torch.randn(2, 14, 16) + 0.2, masks(2, 14)[mask]
        # Junk in the padding.
        current[~mask] = math.nan
        check(neuron, current, mask)
        assert launches == FORWARD + BACKWARD

    @pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.bfloat16, torch.uint8], ids=str)
    def test_masks_of_any_dtype(self, launches, dtype):
        neuron, current, mask = make_neuron(16, 2), torch.randn(2, 6, 16) + 0.3, masks(2, 6)["holes"]
        wanted = neuron(current, mask)
        assert 0 < wanted.mean() < 1
        assert torch.equal(neuron(current, mask.to(dtype)), wanted)
        # No launch and no operation on the mask comes before the kernel.
        assert launches == 2 * FORWARD

    @pytest.mark.parametrize("reset_iterations", [0, 2, 3], ids=lambda n: f"sweeps={n}")
    @pytest.mark.parametrize(
        ("normalize", "bidirectional", "mask"),
        [(True, True, "none"), (False, True, "holes"), (True, False, "left"), (False, False, "right")],
    )
    def test_settings(self, launches, reset_iterations, normalize, bidirectional, mask):
        settings = {"reset_iterations": reset_iterations, "normalize": normalize, "bidirectional": bidirectional}
        neuron = make_neuron(16, 2, spike_type="ternary", **settings)
        check(neuron, torch.randn(2, 11, 16) + 0.1, masks(2, 11)[mask])
        assert launches == FORWARD + BACKWARD

    @pytest.mark.parametrize("surrogate", sorted(SURROGATES))
    def test_surrogates(self, launches, surrogate):
        neuron = make_neuron(16, 2, surrogate=surrogate, spike_type="ternary")
        check(neuron, torch.randn(1, 6, 16) + 0.1)

    @pytest.mark.parametrize(
        ("channels", "groups"), [(24, 2), (12, 1), (7, 7), (96, 12), (40, 2)], ids=lambda n: str(n)
    )
    def test_groups_of_any_size(self, launches, channels, groups):
        check(make_neuron(channels, groups), torch.randn(2, 6, channels) + 0.3, masks(2, 6)["holes"])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, launches, dtype):
        check(make_neuron(16, 2, reset_iterations=2), (torch.randn(2, 11, 16) + 0.3).to(dtype))

    def test_parameters_in_half_precision(self, launches):
        neuron = make_neuron(16, 2).bfloat16()
        current, weight = (torch.randn(3, 9, 16) + 0.3).bfloat16(), torch.randn(3, 9, 16)
        spikes, _, gradients = run(neuron, current, None, weight)
        wanted, _, wanted_gradients = run(reference_of(neuron), current.double(), None, weight.bfloat16().double())
        assert 0 < wanted.mean() < 1 and torch.equal(spikes.double(), wanted)
        for got, expected in zip(gradients, wanted_gradients, strict=True):
            assert got.dtype == torch.bfloat16
            scale = expected.abs().max().item()
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=4 * torch.finfo(got.dtype).eps * scale)

    def test_decays_whose_powers_vanish_and_that_hardly_leak(self, launches):
        neuron = make_neuron(16, 2)
        with torch.no_grad():
            neuron.decay_forward_logit.copy_(torch.tensor([-70.0, 9.0]))
            neuron.decay_backward_logit.copy_(torch.tensor([9.0, -70.0]))
        current = torch.randn(1, 20, 16) + 0.3
        spikes = neuron(current)
        assert 0 < spikes.mean() < 1
        assert torch.equal(spikes, reference_of(neuron)(current.double()).float())

    def test_tensors_that_are_not_contiguous(self, launches):
        neuron = make_neuron(16, 2)
        check(neuron, (torch.randn(16, 6, 2) + 0.3).transpose(0, 2), masks(6, 2)["none"])
        mask = masks(2, 12)["holes"][:, ::2]
        check(neuron, torch.randn(2, 6, 16) + 0.3, mask)

    def test_an_empty_batch(self, launches):
        neuron = make_neuron(16, 2)
        current = torch.zeros(0, 6, 16, requires_grad=True)
        spikes = neuron(current)
        assert spikes.shape == current.shape
        gradients = torch.autograd.grad(spikes.sum(), (current, *neuron.parameters()))
        assert all((gradient == 0).all() for gradient in gradients)
        assert launches == []

    def test_longer_sequences_go_to_the_kernels_for_segments(self, launches):
        check(make_neuron(16, 2), torch.randn(1, 33, 16) + 0.3)
        assert launches == []

    @pytest.mark.slow
    def test_operators(self, launches):
        current, mask = torch.randn(2, 6, 16) + 0.3, masks(2, 6)["right"]
        parameters = [torch.rand(16), torch.rand(2), torch.rand(2), torch.rand(2)]
        torch.library.opcheck(kernels.bpsn_tile_forward, (current, mask, *parameters, True, 1, False))
        for some in (parameters, [*parameters[:2], None, None]):
            backward = (torch.randn(2, 6, 16), current, None, *some, True, 1, True, "atan", 2.0)
            torch.library.opcheck(kernels.bpsn_tile_backward, backward)

    @pytest.mark.slow
    def test_model(self, launches, make_config, assert_spikes_flow, monkeypatch):
        model = SNNBertModel(make_config(num_hidden_layers=1, hidden_size=16, intermediate_size=16)).train()
        inputs = {"input_ids": torch.randint(5, 100, (2, 9)), "attention_mask": masks(2, 9)["right"].long()}

        def step():
            model.zero_grad()
            outputs = model(**inputs, output_firing_rates=True)
            outputs.last_hidden_state.square().sum().backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            return outputs.last_hidden_state.detach(), gradients

        by_triton = step()
        monkeypatch.setattr(triton_tiles, "_DEVICE_TYPES", ())
        assert launches.count("_bpsn_forward") == 7 == launches.count("_sum_rows")
        assert_spikes_flow(model, **inputs)
        wanted = step()
        torch.testing.assert_close(by_triton[0], wanted[0])
        assert by_triton[1].keys() == wanted[1].keys()
        for name, gradient in wanted[1].items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(by_triton[1][name], gradient, rtol=0, atol=1e-4 * scale + 1e-6, msg=name)


# What Triton's compiler makes of the kernels for a GPU of compute capability 9.0; it needs none. At the shapes of a
# BERT: 12 heads, bfloat16, padding, one sweep.
COMPILE = """
import inspect, json, re, subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from modeling_snn_bert import bpsn_triton as kernels

tokens, folder = int(sys.argv[1]), Path(sys.argv[2])
cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
numbers = dict.fromkeys(["tokens", "channels", "group_size", "batch"], "i32") | {"packed_plane": "i64", "alpha": "fp32"}
halves = dict.fromkeys(["current", "spikes", "grad_spikes", "grad_current"], "*bf16")
floats = ["v_threshold", "decay_forward_logit", "decay_backward_logit", "reset_strength", "partial"]
types = {**numbers, **halves, **dict.fromkeys(floats, "*fp32"), "mask": "*i1", "packed": "*u8"}
settings = {"NORMALIZE": True, "TERNARY": False, "SURROGATE": "atan", "sweeps": 1}
for kernel, tiles in ((kernels._bpsn_forward, kernels.FORWARD_TILES), (kernels._bpsn_backward, kernels.BACKWARD_TILES)):
    tile = kernels._tile(tiles, tokens, 768, 12)
    assert tile["ONE_GROUP"]
    warps = tile.pop("num_warps")
    names = list(inspect.signature(kernel.fn).parameters)
    signature = {name: "constexpr" if name in settings or name in tile else types[name] for name in names}
    constants = {(i,): (settings | tile)[name] for i, name in enumerate(names) if signature[name] == "constexpr"}
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in ("channels", "group_size")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([cuobjdump, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups()
    free = sorted(parameter.name for parameter in kernel.params if parameter.do_not_specialize)
    shared = compiled.metadata.shared
    figures = {"registers": int(registers), "stack": int(stack), "shared": shared, "warps": warps, "free": free}
    print(json.dumps(figures))
"""


@pytest.mark.slow
@pytest.mark.skipif(not triton_tiles._AVAILABLE, reason="triton is not installed")
@pytest.mark.parametrize("tokens", [128, 512])
def test_compiles_for_a_gpu_without_spills(tokens, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(tokens), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    forward, backward = map(json.loads, result.stdout.splitlines())
    for kernel in (forward, backward):
        # No register is spilt to memory, and what scans exchange is a fraction of a tile.
        assert kernel["stack"] == 0 and kernel["shared"] <= 16384, kernel
        # A program fits into a multiprocessor's 65,536 registers at least twice (forward) or once.
        assert kernel["registers"] * 32 * kernel["warps"] <= 65536, kernel
        # A batch of 1, or a length that is a multiple of 16, must not become a constant of a kernel of its own.
        assert "tokens" in kernel["free"]
    assert forward["registers"] * 32 * forward["warps"] <= 65536 // (3 if tokens == 128 else 1)
    assert "packed_plane" in forward["free"] and "batch" in backward["free"]


# A training step of a model on the meta device, whose tensors have shapes and no values: to read one fails, as it would
# stall a GPU. Kernels are not run, since there is nothing to run them on, but their launches are counted.
STEP = """
import collections, json, sys
import torch
import transformers.masking_utils
import triton
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget
import modeling_snn_bert as snn
from functorch.compile import make_boxed_func
from modeling_snn_bert import bpsn_triton, packed_spikes_triton, triton_tiles

triton_tiles._DEVICE_TYPES = ("meta",)
# transformers looks for padding once a step, unless it sees that a stream is captured; autocast knows no meta device.
transformers.masking_utils.is_tracing = lambda tensor=None: True
enabled = torch.is_autocast_enabled
torch.is_autocast_enabled = lambda device="cuda": device != "meta" and enabled(device)
config = snn.SNNBertConfig(
    num_hidden_layers=1, hidden_size=64, intermediate_size=128, num_attention_heads=2, vocab_size=100,
    attn_implementation="sdpa",
)
with torch.device("meta"):
    model = snn.SNNBertForSequenceClassification(config).train()
    ids = torch.zeros(4, 20, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0]}

def eager():
    launches = collections.Counter()

    class Launcher:
        def __init__(self, kernel):
            self.name = kernel.fn.__name__

        def __getitem__(self, grid):
            return lambda *arguments, **settings: launches.update([self.name])

    for module in (bpsn_triton, packed_spikes_triton):
        module.kernel_in_operator = Launcher
    loss = model(**batch).loss
    forward = dict(launches)
    loss.backward()
    return forward, {name: count - forward.get(name, 0) for name, count in launches.items()}

def compiled():
    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())
    counts = []

    def compiler(module, inputs):
        kernels = [node for node in module.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        counts.append({"kernels": len(kernels)})
        (output,) = [node for node in module.graph.nodes if node.op == "output"]
        values = [None if node is None else node.meta["val"] for node in output.args[0]]

        def like(x):
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

        return make_boxed_func(lambda *_: [like(x) if isinstance(x, torch.Tensor) else x for x in values])

    torch.compile(model, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)(**batch).loss.backward()
    return counts

assert not triton_tiles.INTERPRETED
print(json.dumps(eager() if sys.argv[1] == "eager" else compiled()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not triton_tiles._AVAILABLE, reason="triton is not installed")
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_a_training_step_reads_no_value_and_is_one_graph(way):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, "-c", STEP, way], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    forward, backward = json.loads(result.stdout.splitlines()[-1])
    if way == "compiled":
        # One graph each way, in which the compiler sees every kernel.
        assert forward == {"kernels": 7} and backward == {"kernels": 14}
    else:
        assert forward == {"_bpsn_forward": 7}
        unpacked = backward.pop("_unpack")
        assert backward == {"_bpsn_forward": 0, "_bpsn_backward": 7, "_sum_rows": 7}
        # Six products with weights, and what attention keeps.
        assert unpacked >= 9


# Each line is two kernels to compile, or three, ten seconds or so; together they have every dtype, setting and tile.
@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("length", "dtype", "channels", "groups", "settings"),
    [
        (1, torch.float32, 384, 12, {}),
        (15, torch.bfloat16, 64, 8, {"spike_type": "ternary", "reset_iterations": 3}),
        (64, torch.float16, 96, 12, {"reset_iterations": 0}),
        (100, torch.bfloat16, 768, 12, {}),
        (128, torch.bfloat16, 768, 12, {}),
        (128, torch.float32, 384, 12, {"spike_type": "ternary"}),
        (200, torch.float16, 7, 7, {"normalize": False, "bidirectional": False}),
        (256, torch.bfloat16, 3072, 12, {}),
        (257, torch.bfloat16, 768, 12, {}),
        (512, torch.float32, 768, 12, {"reset_iterations": 2}),
    ],
)
def test_agrees_with_the_scans_on_a_gpu(length, dtype, channels, groups, settings):
    check_on_gpu(make_neuron(channels, groups, **settings), length, dtype)


@pytest.mark.gpu
@needs_gpu
def test_autocast_rounds_the_current():
    neuron = make_neuron(64, 4).cuda()
    current = torch.randn(2, 40, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        spikes = neuron(current)
    assert spikes.dtype == torch.bfloat16 and torch.equal(spikes, neuron(current.bfloat16())) and spikes.any()
    spikes.sum().backward()
    assert current.grad.dtype == torch.float32 and current.grad.any()


@pytest.mark.gpu
@needs_gpu
def test_a_graph_captures_a_training_step_and_an_inference(make_config):
    """The recipe of docs/gpu.md."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "attn_implementation": "sdpa"}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = SNNBertForSequenceClassification(make_config(**sizes, **no_dropout)).cuda().train()
    batches = [
        {
            "input_ids": torch.randint(5, 100, (4, 20), device="cuda"),
            "attention_mask": masks(4, 20)[name].long().cuda(),
            "labels": torch.randint(2, (4,), device="cuda"),
        }
        for name in ("right", "left")
    ]

    def step(batch):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        return loss

    def infer(batch):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            return model(**batch).logits

    wanted = []
    for batch in batches:
        model.zero_grad()
        loss = step(batch).item()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        wanted.append((loss, gradients, infer(batch)))
    assert wanted[0][0] != wanted[1][0] and any(gradient.abs().sum() > 0 for gradient in wanted[0][1])

    inputs = {name: tensor.clone() for name, tensor in batches[0].items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(inputs)
            infer(inputs)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    training, inference = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(training):
        loss = step(inputs)
    with torch.cuda.graph(inference):
        logits = infer(inputs)
    for batch, (wanted_loss, wanted_gradients, wanted_logits) in zip(batches, wanted, strict=True):
        for name, tensor in batch.items():
            inputs[name].copy_(tensor)
        for parameter in model.parameters():
            parameter.grad.zero_()
        training.replay()
        inference.replay()
        assert loss.item() == pytest.approx(wanted_loss, rel=1e-3)
        torch.testing.assert_close(logits, wanted_logits, rtol=1e-2, atol=1e-2)
        for parameter, gradient in zip(model.parameters(), wanted_gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=2e-2, atol=2e-2 * gradient.abs().max().item())
