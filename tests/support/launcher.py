"""Run our programs as a user does, but in children of one process that has done the imports already.

A start takes a second instead of ten. What a child prints, and its exit code, are those of the program.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import gc, json, os, runpy, signal, sys
import librosa, validate_pipeline
librosa.load, librosa.effects.trim  # imported when they are named: seconds of numba and scipy
gc.freeze()  # no collection looks at what was imported, nor copies its memory in a child
for line in sys.stdin:
    command, cwd, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(600)  # a program that hangs ends by it, with exit code -14
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY), stream)
        os.chdir(cwd)
        sys.argv = command
        if command[0] == "-c":
            sys.argv = command[1:]
            exec(command[1], {"__name__": "__main__"})
        else:
            runpy.run_path(command[0], run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def start(cuda=False):
    """The process that has done the imports. With `cuda` its children can call cuda_on_cpu.install()."""
    source, environment = SERVER, dict(os.environ)
    if cuda:
        source = f"import tests.support.cuda_on_cpu  # before torch\n{SERVER}"
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    return subprocess.Popen(
        [sys.executable, "-c", source],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run(program, *options, cwd=ROOT, cuda=False):
    """`python program options`, a file of the repository or -c and code: subprocess.CompletedProcess."""
    if program != "-c":
        program = ROOT / program
    command, server = list(map(str, [program, *options])), start(cuda)
    with tempfile.TemporaryDirectory() as folder:
        server.stdin.write(json.dumps([command, str(cwd), folder]) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        told = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(command, code, *told)
