"""The compiled kernels at every level of the instruction set: clean under the sanitizers, safe to load on a processor
that lacks a level, with the results of the plain level.

python tests/test_kernel_levels.py      builds and runs them under the sanitizers without pytest
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest
from cpu_levels import CPU_LEVELS

from modeling_snn_bert import cpu_kernels

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc").glob("*.c"))
DRIVER = ROOT / "tests" / "kernel_levels.c"
COMMON = ["-std=gnu11", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Files that run before the processor was asked what it can do.
BASELINE = ["dispatch", "event_driven"]
LIBRARY = Path(cpu_kernels.__file__).parent / cpu_kernels.FILENAME
# Processors that the emulator knows, and the levels that they have; it has no AVX-512.
EMULATED = {"qemu64": ["plain"], "Haswell": ["plain", "avx2"]}
needs_kernels = pytest.mark.skipif(not CPU_LEVELS, reason="no compiled kernels in the installed package")


def compiler():
    """The C compiler's command, or `None` if there is none."""
    command = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]
    return command if shutil.which(command[0]) else None


COMPILERS = {"gcc": compiler(), "clang": ["clang"] if shutil.which("clang") else None}


def call(command):
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=0",
        "OMP_WAIT_POLICY": "passive",
    }
    return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)


def printed_by(command):
    """What a command printed; an error with its complaint if it did not end well."""
    result = call(command)
    assert result.returncode == 0, f"{shlex.join(map(str, command))}: {result.returncode}\n{result.stderr}"
    return result.stdout


def levels_run(command):
    """The levels that a program made from `DRIVER` ran at; it has compared them and has seen spikes."""
    *levels, spikes = printed_by(command).split()
    assert int(spikes) > 0
    return levels


def can_sanitize(command, folder):
    """Whether the sanitizers' libraries are installed beside the compiler."""
    source = folder / "empty.c"
    source.write_text("int main(void) { return 0; }")
    return call([*command, *SANITIZERS, "-fopenmp", source, "-o", folder / "empty"]).returncode == 0


def build_and_run_sanitized(command, folder):
    """The levels that ran; an error with the sanitizers' report if they found anything."""
    program = folder / "kernels"
    printed_by([*command, *COMMON, *SANITIZERS, "-O0", "-g1", "-fopenmp", *SOURCES, DRIVER, "-o", program, "-lm"])
    return levels_run([program])


@pytest.mark.slow
def test_kernels_are_clean(tmp_path):
    command = compiler()
    if command is None or not can_sanitize(command, tmp_path):
        pytest.skip("no C compiler with the sanitizers' libraries")
    levels = build_and_run_sanitized(command, tmp_path)
    assert levels == list(CPU_LEVELS) or not CPU_LEVELS


class TestBeforeTheProcessorIsAsked:
    """Nothing that runs when the library is loaded, or that chooses a level, may need more than the plain processor."""

    @pytest.mark.parametrize("flags", ["-O0", "-O2", "-O3", "-O0 -fsanitize=address,undefined"])
    @pytest.mark.parametrize("name", COMPILERS)
    def test_baseline_files_are_plain(self, tmp_path, name, flags):
        if COMPILERS[name] is None or not shutil.which("objdump"):
            pytest.skip(f"no {name}, or no objdump")
        for source in BASELINE:
            compiled = tmp_path / f"{source}.o"
            printed_by([*COMPILERS[name], *COMMON, *flags.split(), "-c", ROOT / f"csrc/{source}.c", "-o", compiled])
            assert not raised_instructions(compiled)

    @pytest.mark.parametrize("name", COMPILERS)
    def test_raised_files_run_nothing_by_themselves(self, tmp_path, name):
        """Neither constructors nor functions that the loader calls to resolve a symbol."""
        if COMPILERS[name] is None or not shutil.which("objdump"):
            pytest.skip(f"no {name}, or no objdump")
        for source in SOURCES:
            if source.stem not in BASELINE:
                compiled = tmp_path / f"{source.stem}.o"
                printed_by([*COMPILERS[name], *COMMON, "-O0", "-c", source, "-o", compiled])
                listing = printed_by(["objdump", "-h", "-t", compiled])
                assert not re.search(r"\.(init_array|ctors|preinit_array)\b|^\S+ \S* *i ", listing, re.MULTILINE), (
                    source
                )

    def test_the_search_finds_what_it_looks_for(self, tmp_path):
        """Its own proof: a constructor in a file of a raised level has both marks."""
        command = compiler()
        if command is None or not shutil.which("objdump") or "avx2" not in CPU_LEVELS:
            pytest.skip("no C compiler that has levels, or no objdump")
        source, compiled = tmp_path / "raised.c", tmp_path / "raised.o"
        source.write_text(
            '#include "level_v3.h"\nfloat x[8];\n'
            "__attribute__((constructor)) void f(void) { for (int k = 0; k < 8; k++) x[k] = 2 * x[k] + 1; }\n"
        )
        printed_by([*command, *COMMON, "-O3", "-c", source, "-o", compiled])
        assert raised_instructions(compiled) and ".init_array" in printed_by(["objdump", "-h", compiled])


def raised_instructions(compiled):
    """Instructions with registers or encodings that came with AVX or later, from an object file for x86-64."""
    listing = printed_by(["objdump", "-d", "--no-show-raw-insn", compiled])
    assert "ret" in listing
    return re.findall(
        r"\t(v[a-z0-9]+ .*|.*%[yz]mm.*|(?:tile|tdp|pext|pdep|shlx|shrx|sarx|rorx|mulx|andn|bzhi)\S* .*)", listing
    )


@pytest.fixture(scope="module")
def installed_program(tmp_path_factory):
    """`DRIVER` on the library as it is installed."""
    command = compiler()
    if command is None:
        pytest.skip("no C compiler")
    program = tmp_path_factory.mktemp("levels") / "levels"
    # The library takes its OpenMP runtime from the process.
    options = [*COMMON, "-O1", "-fopenmp", f"-Wl,-rpath,{LIBRARY.parent}"]
    printed_by([*command, *options, DRIVER, LIBRARY, "-lm", "-o", program])
    return program


@needs_kernels
def test_every_level_has_the_plain_results(installed_program):
    assert levels_run([installed_program]) == list(CPU_LEVELS)


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("processor", EMULATED)
def test_installed_library_on_another_processor(installed_program, processor):
    assert emulate(processor, installed_program) == [level for level in EMULATED[processor] if level in CPU_LEVELS]


@pytest.mark.slow
def test_clangs_library_on_another_processor(tmp_path):
    if COMPILERS["clang"] is None:
        pytest.skip("no clang")
    program = tmp_path / "levels"
    printed_by(["clang", *COMMON, "-O2", *SOURCES, DRIVER, "-o", program, "-lm"])
    assert emulate("qemu64", program) == ["plain"]


def emulate(processor, program):
    """The levels at which `program` ran on an emulated processor."""
    if not shutil.which("qemu-x86_64") or os.uname().machine != "x86_64":
        pytest.skip("no qemu-x86_64 (Debian's package qemu-user), or no library for x86-64")
    return levels_run(["qemu-x86_64", "-cpu", processor, program])


if __name__ == "__main__":
    command = compiler()
    if command is None:
        sys.exit("there is no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        print(*build_and_run_sanitized(command, Path(folder)))
