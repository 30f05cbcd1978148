"""Whether there are kernels for a GPU. Their arithmetic on tiles is tested by the kernels that are made of it."""

import subprocess
import sys

import pytest

from modeling_snn_bert import triton_tiles


@pytest.mark.parametrize(
    ("environment", "triton", "message"),
    [
        ({"SNN_BERT_TRITON_KERNELS": "0"}, triton_tiles.triton, "switched off by SNN_BERT_TRITON_KERNELS=0"),
        ({}, None, "triton is not installed"),
        ({}, type("triton", (), {"__version__": "3.1.0"}), "triton 3.1.0 is older than 3.3"),
    ],
    ids=["switched-off", "missing", "old"],
)
def test_why_there_are_no_kernels_is_logged(environment, triton, message, monkeypatch):
    messages = []
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(triton_tiles, "triton", triton)
    monkeypatch.setattr(triton_tiles.logger, "info", messages.append)
    assert triton_tiles._load() is False
    assert len(messages) == 1 and message in messages[0]


@pytest.mark.slow
def test_the_package_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from modeling_snn_bert import BPSN, triton_tiles\n"
        "assert triton_tiles.triton is None and not triton_tiles.takes(torch.zeros(1))\n"
        "rate = BPSN(16, 2, v_threshold=0.2)(torch.randn(2, 9, 16)).mean()\n"
        "assert 0 < rate < 1\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
