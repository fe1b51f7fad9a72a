"""Run a program of ours on the emulated CUDA, as `python program options` would on a GPU.

    python -m tests.support.cuda_figures FIGURES program [option ...]

At its end the file FIGURES holds, as JSON: `forwards`, how often the model ran; `waits`, how often the host
waited for the GPU, by the function (of our modules, upstream's or transformers') that made it wait; `large`,
how many results of LARGE elements or more a forward and its loss have, by dtype and function; `attention`,
how often each kernel of attention was chosen.
"""

import json
import os
import runpy
import sys
from collections import Counter
from pathlib import Path

from tests.support import cuda_on_cpu  # before torch

# isort: split

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

LARGE = 10_000
ROOT = Path(__file__).resolve().parents[2]
OURS = [str(ROOT / name) for name in ("dataset.py", "lora.py", "trainer.py", "validate_pipeline.py")]
UPSTREAM = "/boson_multimodal/", "/transformers/", "/peft/"
found = {"forwards": 0, "waits": Counter(), "large": Counter(), "attention": Counter()}


def name_function():
    """(innermost function of ours or upstream's, as module.function; whether it belongs to a forward)."""
    frame, name, forward = sys._getframe(2), "", False  # the caller of watch
    while frame:
        code = frame.f_code
        if code.co_name == "_engine_run_backward":  # with checkpointing it repeats forwards
            return name or "backward", False
        if not name and (code.co_filename in OURS or any(x in code.co_filename for x in UPSTREAM)):
            name = f"{Path(code.co_filename).stem}.{code.co_qualname}"
            forward = name.startswith("trainer.")  # the loss, which may be apart from the model
        forward = forward or code.co_qualname == "HiggsAudioModel.forward"
        frame = frame.f_back
    return name, forward


def watch(op, args, kwargs, result):
    """One of cuda_on_cpu.watchers."""
    if waits := cuda_on_cpu.host_waits(op, args, kwargs):
        found["waits"][name_function()[0]] += waits
    if cuda_on_cpu.is_cuda_attention(op):
        found["attention"][op.name()] += 1
    for x in cuda_on_cpu.leaves(result):
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel() >= LARGE:
            name, forward = name_function()
            if forward:
                found["large"][f"{x.dtype} {name}"] += 1


def count_forward(module, _):
    if type(module).__name__ == "HiggsAudioModel":
        found["forwards"] += 1


def run(figures, program):
    """Run `program`, a file of the repository; write `figures` also where it ends by os._exit, as ours do."""
    leave, own = os._exit, os.getpid()

    def write():
        if os.getpid() == own:  # not in a fork
            Path(figures).write_text(json.dumps(found))

    def write_and_leave(code):
        write()
        leave(code)

    os._exit = write_and_leave
    cuda_on_cpu.install()
    cuda_on_cpu.watchers.append(watch)
    register_module_forward_pre_hook(count_forward)
    try:
        runpy.run_path(ROOT / program, run_name="__main__")
    finally:
        write()


if __name__ == "__main__":
    figures, *sys.argv = sys.argv[1:]
    run(figures, sys.argv[0])
