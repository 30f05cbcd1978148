"""The compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer, at every level of the instruction set.

python tests/test_kernel_sanitizers.py      builds and runs it without pytest
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiler():
    """The C compiler's command, or `None` if there is none."""
    command = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]
    return command if shutil.which(command[0]) else None


def call(command):
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=0",
        "OMP_WAIT_POLICY": "passive",
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def can_sanitize(command, folder):
    """Whether the sanitizers' libraries are installed beside the compiler."""
    source = folder / "empty.c"
    source.write_text("int main(void) { return 0; }")
    return call([*command, *SANITIZERS, "-fopenmp", str(source), "-o", str(folder / "empty")]).returncode == 0


def build_and_run(command, folder):
    """What the driver printed; an error with the sanitizer's report if it did not end well."""
    program = folder / "kernels"
    sources = [*sorted((ROOT / "csrc").glob("*.c")), ROOT / "tests" / "kernels_under_sanitizers.c"]
    options = ["-std=gnu11", "-O0", "-g1", "-fopenmp", "-Wno-psabi", *SANITIZERS, f"-I{ROOT / 'csrc'}"]
    built = call([*command, *options, *map(str, sources), "-o", str(program), "-lm"])
    assert built.returncode == 0, built.stderr
    result = call([str(program)])
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_kernels_are_clean(tmp_path):
    command = compiler()
    if command is None or not can_sanitize(command, tmp_path):
        pytest.skip("no C compiler with the sanitizers' libraries")
    levels, spikes = build_and_run(command, tmp_path).split(" levels, ")
    assert int(levels) >= 1 and int(spikes.split()[0]) > 0


if __name__ == "__main__":
    command = compiler()
    if command is None:
        sys.exit("there is no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        print(build_and_run(command, Path(folder)), end="")
