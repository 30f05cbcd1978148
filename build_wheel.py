"""Builds the wheel that serves every Python on Linux with its CPU kernels compiled, and checks that it can.

    python build_wheel.py                            for this machine's processor
    python build_wheel.py --architecture aarch64     for ARM, by the cross-compiler aarch64-linux-gnu-gcc

`make wheel` does this in the project's environment, which has auditwheel.
"""

import argparse
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
LIBRARY = "modeling_snn_bert/_cpu_kernels.shared"
# glibc 2.28, as torch's own wheels.
PLATFORM = "manylinux_2_28"
ARCHITECTURES = ("x86_64", "aarch64")
CROSS_COMPILER = "{}-linux-gnu-gcc"
# What the library may take from the OpenMP runtime that torch has brought: in GNU's since 2013, and in LLVM's.
OPENMP_SYMBOLS = {
    "GOMP_atomic_end",
    "GOMP_atomic_start",
    "GOMP_barrier",
    "GOMP_parallel",
    "omp_get_num_threads",
    "omp_get_thread_num",
}


def copy_sources(folder: Path) -> Path:
    """What a build reads, copied into `folder`: setuptools leaves its traces in the folder that it builds."""
    folder.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("modeling_snn_bert", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.shared"))
    return folder


def build(folder: Path, architecture: str | None = None, **variables: str) -> Path:
    """The wheel, built in the empty `folder` with `variables` in the environment.

    Without an `architecture` it is what `pip install` makes on this machine: for this system, and without kernels where
    there is no compiler. Raises `CalledProcessError` if the build fails.
    """
    environment = {**os.environ, **variables}
    source, target = copy_sources(folder / "source"), folder / "wheel"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if architecture is not None:
        command.append(f"--config-settings=--build-option=--plat-name={PLATFORM}_{architecture}")
        if architecture != platform.machine():
            environment["CC"] = CROSS_COMPILER.format(architecture)
    subprocess.run([*command, "--wheel-dir", target, source], check=True, env=environment)
    (wheel,) = target.iterdir()
    return wheel


def faults(wheel: Path, architecture: str) -> list[str]:
    """Why `wheel` would not do on every Linux that its name promises; empty if it does."""
    tag = f"py3-none-{PLATFORM}_{architecture}"
    with zipfile.ZipFile(wheel) as archive:
        if LIBRARY not in archive.namelist():
            return [f"{wheel.name} has no {LIBRARY}: the kernels did not compile"]
        library = archive.read(LIBRARY)
    found = [] if wheel.name.endswith(f"-{tag}.whl") else [f"{wheel.name} does not end in {tag}.whl"]
    machine, needed, symbols = read_elf(library)
    if machine != architecture:
        found.append(f"the library is for {machine} in place of {architecture}")
    loaders = {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    if not needed <= {"libc.so.6", "libm.so.6", *loaders}:
        found.append(f"the library needs {sorted(needed)}, where it should need the C library alone")
    if symbols - OPENMP_SYMBOLS:
        found.append(f"the library wants {sorted(symbols - OPENMP_SYMBOLS)}, which is in no library that it needs")
    if not symbols & OPENMP_SYMBOLS:
        found.append("the library was compiled without OpenMP")
    return found + audit(wheel, architecture)


def read_elf(library: bytes) -> tuple[str, set[str], set[str]]:
    """Architecture of a shared library, the libraries that it names, and what it takes from none of these."""
    from elftools.elf.elffile import ELFFile

    elf = ELFFile(io.BytesIO(library))
    needed = {entry.needed for entry in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
    versions = elf.get_section_by_name(".gnu.version")
    unversioned = set()
    for index, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
        if symbol["st_shndx"] == "SHN_UNDEF" and symbol["st_info"]["bind"] == "STB_GLOBAL":
            # A version other than these two is that of a library that is named.
            version = "VER_NDX_GLOBAL" if versions is None else versions.get_symbol(index)["ndx"]
            if version in ("VER_NDX_LOCAL", "VER_NDX_GLOBAL"):
                unversioned.add(symbol.name)
    return {"EM_X86_64": "x86_64", "EM_AARCH64": "aarch64"}.get(elf["e_machine"], elf["e_machine"]), needed, unversioned


def audit(wheel: Path, architecture: str) -> list[str]:
    """What auditwheel finds: symbols of a newer C library, or libraries that would have to be put into the wheel."""
    command = [sys.executable, "-m", "auditwheel", "show", "--json", wheel]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    if "error" in report:
        return [f"auditwheel: {report['error']}"]
    version = re.fullmatch(rf"manylinux_(\d+)_(\d+)_{architecture}", report["overall_tag"])
    wanted = re.fullmatch(r"manylinux_(\d+)_(\d+)", PLATFORM)
    assert wanted is not None
    if version is None or tuple(map(int, version.groups())) > tuple(map(int, wanted.groups())):
        return [f"auditwheel: fit for {report['overall_tag']} only, with the symbols {report['versioned_symbols']}"]
    return [f"auditwheel: {name} is not on every Linux" for name in report["external_libs"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default=platform.machine())
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "wheels")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder), args.architecture)
        found = faults(wheel, args.architecture)
        if found:
            sys.exit("\n".join([f"{wheel.name} is not fit to be given away:", *found]))
        args.output_dir.mkdir(parents=True, exist_ok=True)
        print(shutil.copy(wheel, args.output_dir))


if __name__ == "__main__":
    main()
