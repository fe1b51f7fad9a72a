"""Build cuda_runtime.c and put it before the real CUDA runtime; imports nothing of torch."""

import ctypes
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

KNOWN_TORCH = "2.11.0+cu130"  # cuda_on_cpu.py relies on private functions of torch, the C file on CUDA 13


def build(library):
    """Compile the C file into the file `library`: what gcc complains of, empty where it succeeds."""
    packages = Path(importlib.util.find_spec("torch").origin).parent.parent
    headers = [
        packages / "nvidia/cu13/include",
        packages / "triton/backends/nvidia/include",
    ]  # crt/ is Triton's
    command = ["gcc", "-shared", "-fPIC", *(f"-I{folder}" for folder in headers), "-o", library]
    # torch opens the driver by the name libcuda.so.1: it gets this library, which has that name, too
    command += [Path(__file__).with_suffix(".c"), "-Wl,-soname,libcuda.so.1", "-ldl"]
    return subprocess.run(command, capture_output=True, text=True).stderr


def why_not():
    """The reason why CUDA cannot be emulated here, or None. Loads neither torch nor the library."""
    version = runpy.run_path(Path(importlib.util.find_spec("torch").origin).with_name("version.py"))
    if version["__version__"] != KNOWN_TORCH:
        return f"CUDA is emulated for torch {KNOWN_TORCH}, this is {version['__version__']}"
    try:
        complaint = build(os.devnull)
    except FileNotFoundError:
        return "CUDA is emulated with a library that gcc builds: there is no gcc"
    return f"CUDA is emulated with a library that gcc cannot build: {complaint}" if complaint else None


def load():
    """Load the library into this process, where the linker finds its functions first."""
    if "torch" in sys.modules:
        raise ImportError("load the emulated CUDA runtime before torch, which has already found the real one")
    os.environ.setdefault("FAKE_CUDA_DEVICES", "2")
    with tempfile.NamedTemporaryFile(suffix=".so") as library:
        if complaint := build(library.name):
            raise ImportError(complaint)
        ctypes.CDLL(library.name, ctypes.RTLD_GLOBAL)
