"""Our programs as on two GPUs, emulated on the CPU; support/cuda_on_cpu.py says what that shows, what not.

Each program is started by its command line, in bfloat16 as on a GPU. What they print and write is compared
with a run on the CPU in float32. How often the host waits for the GPU, and in which dtype the model computes,
is counted below the programs (support/cuda_figures.py).
"""

import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import soundfile
import torch
from safetensors.torch import load_file

from tests.support import cuda_runtime, launcher, tiny_checkpoint
from tests.support.bounds import TINY, rounding_bound

WHY_NOT = cuda_runtime.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
LAYERS = 2  # of the tiny model
FLOAT32 = {  # functions whose large results may be float32, and why
    "modeling_llama.LlamaRMSNorm.forward": "upstream's norm computes its mean in float32 and goes back",
    "modeling_higgs_audio.HiggsAudioModel.forward": "upstream returns the logits of the audio in float32",
    "trainer.": "the loss is computed in float32",
}


@pytest.fixture(scope="module")
def programs(tiny, tmp_path_factory):
    return Programs(tiny, tmp_path_factory.mktemp("cuda"))


class Programs:
    """Starts our programs on four short entries over two clips; what has one name runs only once."""

    def __init__(self, tiny, folder):
        clips = [f"{folder}/{name}.wav" for name in ("short", "shorter")]
        for clip, seconds in zip(clips, (0.28, 0.2), strict=True):
            soundfile.write(clip, tiny_checkpoint.speech_like(seconds, seed=60), tiny_checkpoint.SAMPLE_RATE)
        entries = [
            {"messages": tiny_checkpoint.voice_cloning_entry(text, reference, target)["messages"][1:]}
            for text in ("a", "b")
            for reference, target in (clips, clips[::-1])
        ]
        (folder / "train.json").write_text(json.dumps(entries))
        self.folder, self.results = folder, {}
        self.inputs = [
            f"--train_manifest={folder}/train.json",
            f"--base_ckpt={tiny}/model",
            f"--audio_tokenizer={tiny}/codec",
            "--num_workers=1",
        ]
        self.on_cpu = ThreadPoolExecutor().submit(self.train_on_cpu)  # beside what runs on emulated GPUs

    def run(self, name, program, *flags):
        """(what the program printed, the figures of cuda_figures.py)."""
        if name not in self.results:
            figures = self.folder / f"{name}.json"
            done = launcher.run("tests/support/cuda_figures.py", figures, program, *flags, cuda=True)
            assert done.returncode == 0, done.stderr
            self.results[name] = done.stdout, json.loads(figures.read_text())
        return self.results[name]

    def preflight(self):
        """What it prints. It also encodes the clips: no training has to, which would wait for the GPU."""
        return self.run("preflight", "validate_pipeline.py", *self.inputs)[0]

    def training_flags(self, name, *flags):
        """Of a run with the same samples in a step, however they are split."""
        output = [f"--output_dir={self.folder / name}", "--logging_steps=1", "--save_steps=1"]
        return [*self.inputs, *output, "--lora_dropout=0", *flags]

    def train(self, name, *flags):
        """(metrics of each step, figures) of trainer.py on one emulated GPU."""
        self.preflight()
        _, figures = self.run(name, "trainer.py", *self.training_flags(name, *flags))
        return self.metrics(name), figures

    def metrics(self, name):
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def one_rank(self):
        return self.train("one_rank", "--batch_size=1", "--grad_accum=4", "--max_steps=2", "--max_tokens=1")

    def train_on_cpu(self):
        """Metrics of each step in float32; after the last of them the adapter has learned the clips."""
        flags = ["--batch_size=2", "--grad_accum=2", "--max_steps=20", "--lr=5e-3", "--save_steps=20"]
        done = launcher.run("trainer.py", *self.training_flags("float32", *flags))
        assert done.returncode == 0, done.stderr
        return self.metrics("float32")


def assert_first_steps_agree(metrics, expected):
    """A step in bfloat16 and one in float32. Products are added in float32 and rounded to bfloat16 once, so
    that a label's loss is off by eps of bfloat16 times the logits' standard deviation, which is 3
    (tiny_checkpoint.make_model), times the layers. Means of more labels are off by a root of their number
    less: the four replies have the same 3 of text, and 8 codebooks in 8 or 6 columns.
    """
    for name, labels in (("text_loss", 3), ("audio_loss", 8 * (2 * 8 + 2 * 6))):
        bound = rounding_bound(1, LAYERS, scale=3, dtype=torch.bfloat16) / math.sqrt(labels)
        assert metrics[0][name] == pytest.approx(expected[0][name], abs=bound), name
    bound = rounding_bound(1, LAYERS, dtype=torch.bfloat16) / math.sqrt(3)
    assert metrics[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=bound)


def test_preflight(programs):
    """It encodes the clips and runs the largest micro-batch, with dropout and the batch that 60 GB hold."""
    told = programs.preflight()
    assert "micro-batch: 16 samples" in told and "ready for trainer.py" in told


def test_training_on_one_rank(programs):
    """In bfloat16, losses as the CPU's in float32; the adapter stays float32."""
    metrics, _ = programs.one_rank()
    assert_first_steps_agree(metrics, programs.on_cpu.result())
    assert metrics[1]["loss"] < metrics[0]["loss"]  # a first step takes 1.4 off 20.9, five times the bound
    tensors = load_file(programs.folder / "one_rank/adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float32"}


def test_resuming(programs):
    """Step 2 again, from what step 1 left, to all digits: the same program on the same shapes and machine."""
    uninterrupted, _ = programs.one_rank()
    flags = ["--batch_size=1", "--grad_accum=4", "--max_steps=2", "--max_tokens=1"]
    checkpoint = f"--resume_from_checkpoint={programs.folder}/one_rank/checkpoint-1"
    metrics, _ = programs.train("resumed", *flags, checkpoint)
    for name in ("loss", "audio_loss_per_codebook", "grad_norm"):
        assert metrics[-1][name] == uninterrupted[-1][name]


def test_gradient_checkpointing(programs):
    flags = ["--batch_size=4", "--grad_accum=1", "--max_steps=1", "--gradient_checkpointing"]
    metrics, _ = programs.train("checkpointing", *flags)
    assert_first_steps_agree(metrics, programs.on_cpu.result())


def test_training_on_two_ranks(programs):
    """Each on its GPU; loss and gradient are one rank's. In both runs each sample is a micro-batch of its own
    and computed alike: only the sums of them, in float32, are in another order.
    """
    flags = programs.training_flags(
        "two_ranks", "--batch_size=1", "--grad_accum=2", "--max_steps=1", "--max_tokens=1"
    )
    programs.run("two_ranks_figures", "tests/support/ranks.py", json.dumps({2: [flags]}))
    [metrics], [expected, _] = programs.metrics("two_ranks"), programs.one_rank()[0]
    for name in ("text_loss", "audio_loss", "grad_norm"):
        assert metrics[name] == pytest.approx(expected[name], rel=rounding_bound(**TINY)), name


def test_large_tensors_of_a_forward_are_bfloat16(programs):
    """But for FLOAT32: a residual stream in float32 would cost twice the memory and most of the speed."""
    large = programs.one_rank()[1]["large"]
    names = {key.split()[1] for key in large if not key.startswith("torch.bfloat16 ")}
    assert not [name for name in names if not name.startswith(tuple(FLOAT32))]
    assert large["torch.bfloat16 layer.Linear.forward"] > 100  # LoRA's: so something was seen


def test_attention_is_not_cudnns(programs):
    """Torch's first choice on an H100, which plans anew for each length of a micro-batch."""
    kernels = programs.one_rank()[1]["attention"]
    assert kernels and not [kernel for kernel in kernels if "cudnn" in kernel]


def test_host_waits_of_a_micro_batch(programs):
    """While the host waits, it gives the GPU nothing to do. Most are upstream's: boolean masks as indices.

    Counted by the difference of two runs that take as many steps, one of them with more micro-batches.
    """
    (_, more), (_, fewer) = (
        programs.one_rank(),
        programs.train(
            "few_micro_batches", "--batch_size=1", "--grad_accum=1", "--max_steps=2", "--max_tokens=1"
        ),
    )
    forwards = more["forwards"] - fewer["forwards"]
    assert forwards >= 6
    waits = Counter(more["waits"])
    waits.subtract(fewer["waits"])
    a_micro_batch = {name: count / forwards for name, count in waits.items() if count}
    ours = 3  # to find the positions of text labels: twice forward, once backward
    assert sum(a_micro_batch.values()) == 29 + 14 * LAYERS + ours, a_micro_batch


def test_comparison(programs):
    """Losses of base and adapter; upstream's engine speaks as the adapter, and captures no CUDA graph."""
    programs.on_cpu.result()
    flags = [*programs.inputs, f"--output_dir={programs.folder}/listen"]
    told, _ = programs.run(
        "comparison", "validate_pipeline.py", *flags, "--adapter", programs.folder / "float32"
    )
    assert "smallest    " in told
    spoken, target = (
        soundfile.info(programs.folder / f"listen/0-{name}.wav") for name in ("float32", "target")
    )
    assert spoken.frames == target.frames, told
