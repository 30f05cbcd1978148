"""What takes long to build and more than one test needs: built once for all of pytest's processes."""

import fcntl
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_SPEC = importlib.util.spec_from_file_location("build_wheel", ROOT / "build_wheel.py")
build_wheel = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(build_wheel)


def has_compiler():
    """Whether the compiler that setuptools would call is there."""
    command = os.environ.get("CC") or sysconfig.get_config_var("CC") or ""
    return bool(command) and shutil.which(command.split()[0]) is not None


def build_once(tmp_path_factory, name, build):
    """The file that `build(folder)` made, in this process or in another one of the same run of pytest."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        note = Path(f"{folder}.built")
        if not note.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            note.write_text(str(build(folder)))
        return Path(note.read_text())


def why_no_kernels_wheel():
    """Why the wheel with kernels cannot be built here, or `None`."""
    if sys.platform != "linux" or os.uname().machine not in build_wheel.ARCHITECTURES:
        return "the wheel with kernels is for Linux on x86-64 and ARM"
    return None if has_compiler() else "no C compiler"
