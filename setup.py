"""What `pip install` needs to know. The build system and the settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"


def read_version() -> str:
    """`__version__` of the package, read as text: importing it would need torch, which a build does without."""
    source = (ROOT / "modeling_snn_bert" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise RuntimeError('modeling_snn_bert/__init__.py has no line like `__version__ = "1.2.3"`')
    return match.group(1)


EXAMPLES = [
    "accelerate>=1.1.0",  # what transformers' Trainer asks for
    "datasets",
    "evaluate",
    "matplotlib",
    "peft",
    "scikit-learn",
    "scipy",
    "tqdm",
]
TESTS = [
    "hypothesis",
    "mypy",
    "parameterized",
    "pytest",
    "pytest-xdist",
    "ruff",
]

setup(
    name="snn-bert",
    version=read_version(),
    description="SNN-BERT: a spiking BERT for Hugging Face transformers",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["spiking neural networks", "SNN", "BERT", "transformers", "energy efficiency"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=["modeling_snn_bert"],
    package_data={"modeling_snn_bert": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "huggingface-hub",
        "torch>=2.6",
        # 5.4 made configurations strict dataclasses; tests/test_packaging.py runs the package on the lower bound.
        "transformers>=5.4.0,<6",
    ],
    extras_require={
        "examples": EXAMPLES,
        "gpu": ["triton; platform_system == 'Linux'"],
        "tests": EXAMPLES + TESTS,
    },
)
