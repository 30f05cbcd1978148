"""The kernel that unpacks spikes on a GPU: in Triton's interpreter and compiler, and on a GPU where there is one."""

import os
import subprocess
import sys

import pytest
import torch
from bpsn_checks import interpreted, needs_gpu

from modeling_snn_bert import triton_tiles
from modeling_snn_bert.packed_spikes import pack, unpack
from modeling_snn_bert.packed_spikes_triton import takes_packed, unpack_triton

HALVES_AND_FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def random_packed(shape, ternary, device="cpu"):
    """Packed spikes, and the same as floats: some of each value, if there are enough of them."""
    spikes = torch.randint(-1 if ternary else 0, 2, shape).float()
    return pack(spikes, ternary).to(device), spikes.to(device)


@interpreted
@pytest.mark.parametrize("ternary", [False, True], ids=["binary", "ternary"])
@pytest.mark.parametrize("dtype", HALVES_AND_FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 20), (7,), (2, 9, 7, 40), (2, 0, 8)], ids=str)
def test_interpreted(monkeypatch, shape, dtype, ternary):
    packed, spikes = random_packed(shape, ternary)
    assert not takes_packed(packed, dtype)
    wanted = unpack(packed, shape[-1], dtype)
    # More than one program.
    monkeypatch.setattr("modeling_snn_bert.packed_spikes_triton.BYTES", 8)
    monkeypatch.setattr(triton_tiles, "_DEVICE_TYPES", ("cpu",))
    assert takes_packed(packed, dtype) and not takes_packed(packed, torch.float64)
    for form in (packed, packed.repeat_interleave(2, -1)[..., ::2]):
        got = unpack(form, shape[-1], dtype)
        assert got.dtype == dtype and torch.equal(got, wanted) and torch.equal(got.float(), spikes)


@interpreted
def test_operator():
    torch.library.opcheck(unpack_triton, (random_packed((3, 20), True)[0], 20, torch.bfloat16))


# The widest store, 16 bytes, in the kernel for compute capability 9.0: a thread has the eight spikes of a byte.
COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from modeling_snn_bert.packed_spikes_triton import BYTES, _unpack

names = [parameter.name for parameter in _unpack.params]
types = {"packed": "*u8", "spikes": "*bf16", "size": "i32", "width": "i32", "channels": "i32"}
constants = {"WHOLE": True, "TERNARY": False, "BYTES": BYTES}
signature = {name: types.get(name, "constexpr") for name in names}
values = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
source = ASTSource(_unpack, signature, values, {(i,): [["tt.divisibility", 16]] for i in range(2)})
compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
stores = [line for line in compiled.asm["ptx"].splitlines() if "st.global" in line]
assert stores and all("st.global.v4.b32" in line for line in stores), stores
# What goes through shared memory is the bytes alone, once.
assert compiled.metadata.shared <= 4 * BYTES, compiled.metadata.shared
"""


@pytest.mark.slow
@pytest.mark.skipif(not triton_tiles._AVAILABLE, reason="triton is not installed")
def test_compiles_to_wide_stores(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("ternary", [False, True], ids=["binary", "ternary"])
def test_on_a_gpu(ternary):
    for dtype in HALVES_AND_FLOATS:
        for shape in ((256, 128, 768), (3, 5, 20)):
            packed, spikes = random_packed(shape, ternary, "cuda")
            assert takes_packed(packed, dtype)
            got = unpack(packed, shape[-1], dtype)
            assert got.dtype == dtype and torch.equal(got.float(), spikes)
