"""Fetches transformers' own test suite, in the version that is installed, and makes it importable.

The suite is not part of the wheel, but of the source distribution, which pip downloads. It is kept in the folder
`$SNN_BERT_CACHE` (default: `~/.cache/snn-bert`).
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

SUITE_FILES = ("test_modeling_common.py", "test_configuration_common.py")
# What those files import from the rest of transformers' repository, which is not in the source distribution.
STAND_INS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": (
        "config_common_kwargs = {\n"
        '    "return_dict": False,\n'
        '    "output_hidden_states": True,\n'
        '    "output_attentions": True,\n'
        '    "dtype": "float16",\n'
        '    "chunk_size_feed_forward": 5,\n'
        '    "architectures": ["BertModel"],\n'
        '    "id2label": {0: "label"},\n'
        '    "label2id": {"label": "0"},\n'
        '    "problem_type": "regression",\n'
        "}\n"
    ),
}


def cache_folder():
    """Where fetched files are kept."""
    return Path(os.environ.get("SNN_BERT_CACHE") or Path.home() / ".cache" / "snn-bert")


def fetch(version):
    """The source distribution of transformers as a local file, downloaded by pip unless it is in the cache."""
    archive = cache_folder() / f"transformers-{version}.tar.gz"
    if archive.exists():
        return archive
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        requirement = f"transformers=={version}"
        options = ["--quiet", "--no-deps", "--no-binary", "transformers", "--dest", folder, requirement]
        command = [sys.executable, "-m", "pip", "download", *options]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        found = list(Path(folder).glob("transformers-*.tar.gz"))
        if result.returncode or len(found) != 1:
            raise RuntimeError(
                f"transformers' own test suite could not be fetched: `pip download --no-deps --no-binary transformers "
                f"{requirement}` failed. Where there is no package index, put the source distribution of transformers "
                f"{version} at {archive}, or its folder in the variable SNN_BERT_CACHE.\npip said:\n"
                f"{result.stdout}{result.stderr}"
            )
        os.replace(found[0], archive)
    return archive


def unpack(version):
    """The folder, named after the version, that holds the suite as the package `tests`."""
    folder = cache_folder() / f"transformers-suite-{version}"
    if folder.exists():
        return folder
    archive = fetch(version)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary:
        package = Path(temporary) / "suite" / f"transformers_tests_{version.replace('.', '_')}"
        with tarfile.open(archive) as tar:
            for name in SUITE_FILES:
                content = tar.extractfile(f"transformers-{version}/tests/{name}").read()
                _write(package / name, content)
        for name, text in STAND_INS.items():
            _write(package / name, text.encode())
        try:
            os.replace(package.parent, folder)
        except OSError:
            # Another process has put the same files there in the meantime.
            if not folder.exists():
                raise
    return folder


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def load():
    """`ModelTesterMixin` and `ConfigTester` of the installed version of transformers."""
    version = transformers.__version__
    folder = str(unpack(version))
    if folder not in sys.path:
        sys.path.append(folder)
    package = f"transformers_tests_{version.replace('.', '_')}"
    modeling = importlib.import_module(f"{package}.test_modeling_common")
    configuration = importlib.import_module(f"{package}.test_configuration_common")
    return modeling, configuration.ConfigTester
