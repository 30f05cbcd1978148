"""What `pip install` needs to know. The build system and the settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

ROOT = Path(__file__).parent
README = ROOT / "README.md"


def read_version() -> str:
    """`__version__` of the package, read as text: importing it would need torch, which a build does without."""
    source = (ROOT / "modeling_snn_bert" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise RuntimeError('modeling_snn_bert/__init__.py has no line like `__version__ = "1.2.3"`')
    return match.group(1)


class BuildKernels(build_ext):
    """Builds the CPU kernels with OpenMP, or on one thread with a compiler that lacks it.

    They are a plain shared library that ctypes loads and no module of Python, and their name is none either, so that
    whoever walks the package's modules does not try to import them.

    The library names no OpenMP runtime that it needs and so takes the one in the process, which is torch's. With a
    runtime of its own there would be two, whose threads wait for each other's cores.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.shared"

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
            if b"__kmpc_" in Path(self.get_ext_fullpath(ext.name)).read_bytes():
                # clang calls functions of a runtime that torch's need not have.
                ext.extra_link_args = ["-fopenmp"]
                self.force = True
                super().build_extension(ext)
        except BaseError:
            self.warn("the CPU kernels do not build with OpenMP; trying without")
            ext.extra_compile_args.remove("-fopenmp")
            ext.extra_link_args = []
            super().build_extension(ext)


class WheelForEveryPython(bdist_wheel):
    """Names the wheel for its platform alone: ctypes loads the kernels in every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        if not any(Path(self.bdist_dir).rglob("*.shared")):
            platform = "any"
        return self.python_tag, "none", platform


KERNELS = Extension(
    "modeling_snn_bert._cpu_kernels",
    sources=sorted(f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*.c")),
    depends=sorted(f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*.[ch]")),
    extra_compile_args=["-std=gnu11", "-O3", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi"],
    # Where there is no compiler the package installs without them, and runs on torch's operations.
    optional=True,
)

TRITON = "triton; platform_system == 'Linux'"
TRAIN = ["accelerate>=1.1.0"]  # what transformers' Trainer asks for
SERVE = ["starlette", "uvicorn"]
EXAMPLES = [
    *TRAIN,
    "datasets",
    "evaluate",
    "matplotlib",
    "numpy",
    "peft",
    "scikit-learn",
    "scipy",
    "tqdm",
]
SPACE = ["gradio>=6", "matplotlib"]
DOCS = ["furo", "myst-parser", "sphinx"]
EXPORT = [
    "nir",
    "onnx",
    "onnxruntime",
    "onnxscript",
]
TESTS = [
    "auditwheel",
    "hypothesis",
    "mypy",
    "optuna",
    "parameterized",
    "playwright",  # drives a Chromium that is installed already; without one that test is skipped
    "pytest",
    "pytest-xdist",
    "ruff",
    "sentence-transformers",
    "tensorboard",
    TRITON,  # runs the GPU's kernels in its interpreter where there is no GPU
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
    packages=["modeling_snn_bert", "modeling_snn_bert.commands", "modeling_snn_bert.energy"],
    package_data={"modeling_snn_bert": ["py.typed"]},
    ext_modules=[KERNELS],
    cmdclass={"bdist_wheel": WheelForEveryPython, "build_ext": BuildKernels},
    python_requires=">=3.10",
    install_requires=[
        "huggingface-hub",
        "markdown-it-py",  # reports as HTML; typer asks for it too
        "torch>=2.6",
        # 5.4 made configurations strict dataclasses; tests/test_packaging.py runs the package on the lower bound.
        "transformers>=5.4.0,<6",
        "typer",  # the command line; transformers asks for it too
    ],
    entry_points={"console_scripts": ["snn-bert = modeling_snn_bert.cli:main"]},
    extras_require={
        # What benchmarks/alternatives.py compares with, beside what `examples` and `tests` ask for.
        "alternatives": ["model2vec[distill]", "nncf", "onnx", "onnxruntime", "onnxscript", "openvino"],
        # Only benchmarks/neuron.py uses it. It asks for torchvision and torchaudio but works without them:
        # `pip install --no-deps spikingjelly loguru` leaves the installed torch alone.
        "benchmarks": ["loguru", "spikingjelly>=2; python_version >= '3.11'"],
        "docs": DOCS,
        "examples": EXAMPLES,
        "export": EXPORT,
        "gpu": [TRITON],
        "serve": SERVE,
        "space": SPACE,
        "tests": EXAMPLES + EXPORT + SPACE + SERVE + DOCS + TESTS,
        "train": TRAIN,
    },
)
