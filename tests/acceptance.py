"""The acceptance table of validate_pipeline.py: train the embedded tiny checkpoint, check each promise.

Each check_* takes the lab (open_lab) and returns (passed, the figure it measured).
"""

import contextlib
import copy
import dataclasses
import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioBatchInput
from boson_multimodal.data_types import AudioContent, ChatMLSample
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from boson_multimodal.model.higgs_audio.utils import revert_delay_pattern
from boson_multimodal.serve.serve_engine import HiggsAudioServeEngine
from loguru import logger
from peft import PeftModel
from safetensors.torch import load_file

import dataset
import lora
import trainer
from tests.support import tiny_checkpoint
from tests.support.batches import CPU, micro_batches
from tests.support.bounds import TINY, rounding_bound

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
READY = """torchrun --nproc_per_node=8 trainer.py --train_manifest train.json --output_dir out \\
    --base_ckpt bosonai/higgs-audio-v2-generation-3B-base \\
    --batch_size 2 --lr 2e-4 --epochs 2 --grad_accum 8 --lora_r 16 --lora_alpha 32 --lora_dropout 0.05"""
OVERFIT = ["--lora_dropout", "0", "--lr", "5e-3", "--grad_accum", "1", "--max_steps", "60"]


def run(*command):
    """Run a command as a user would; its output is shown only where it fails."""
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"FAILED: {' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")


def train(folder):
    """Overfit the three entries on two ranks; then step 21 alone, from checkpoint-20, on one and on two."""
    flags = [
        f"--train_manifest={folder}/train.json",
        f"--base_ckpt={folder}/model",
        f"--audio_tokenizer={folder}/codec",
        *OVERFIT,
    ]
    run(
        *TORCHRUN,
        "--standalone",
        "--nproc_per_node=2",
        "trainer.py",
        *flags,
        "--batch_size=2",
        "--save_steps=20",
        f"--output_dir={folder}/out",
    )
    flags += [
        f"--resume_from_checkpoint={folder}/out/checkpoint-20",
        "--max_steps=21",
        "--save_steps=21",
        "--max_grad_norm=1e9",
    ]
    runs = {
        1: [[*flags, "--batch_size=4", f"--output_dir={folder}/one_rank"]],
        2: [[*flags, "--batch_size=2", f"--output_dir={folder}/two_ranks"]],
    }
    run(sys.executable, "-m", "tests.support.ranks", json.dumps(runs))


def open_lab(folder):
    """Upstream's engine, set to hear references, and the trainer's own view of the same manifest."""
    logger.disable("boson_multimodal")  # it tells every step of its start
    transformers.logging.set_verbosity_error()
    engine = HiggsAudioServeEngine(
        str(folder / "model"),
        str(folder / "codec"),
        device="cpu",
        torch_dtype=torch.float32,
        kv_cache_lengths=[1024],
    )
    engine.collator.return_audio_in_tokens = True
    args = trainer.parse_args(
        [
            f"--train_manifest={folder}/train.json",
            f"--base_ckpt={folder}/model",
            f"--output_dir={folder}/new",
            f"--audio_tokenizer={folder}/codec",
        ]
    )
    data = trainer.open_inputs(args, CPU)[0]
    return SimpleNamespace(
        folder=folder, engine=engine, model=engine.model, args=args, data=data, entries=data.entries
    )


def prompt_of(entry):
    """What inference is given: the entry without its reply."""
    return ChatMLSample(entry.messages[:-1])


def check_preprocessing(lab):
    """Token ids, attention and reference codes equal HiggsAudioServeEngine's up to the assistant header.

    The codes, too: on one machine both encode the same sound by the same codec in the same shapes, and in one
    thread (environment). Another number of threads can sum in another order, and two entries of a codebook
    can be equally near.
    """
    compared = 0
    for i, entry in enumerate(lab.entries):
        theirs, [(ours, _)] = lab.engine._prepare_inputs(prompt_of(entry)), micro_batches(lab.data, [i])
        length = theirs["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask", "audio_in_ids"):
            mine = ours[name] if name == "audio_in_ids" else ours[name][:, :length]
            if not torch.equal(theirs[name], mine):
                return False, f"entry {i}: {name} differ"
            compared += mine.numel()
    return True, f"{compared} numbers of {len(lab.entries)} entries equal, 0 differ"


def check_forward_kwargs(lab):
    """A batch has exactly the fields of upstream's HiggsAudioBatchInput, and forward takes them all."""
    [(batch, _)] = micro_batches(lab.data, [0, 1])
    fields = {field.name for field in dataclasses.fields(HiggsAudioBatchInput)}
    accepted = set(inspect.signature(HiggsAudioModel.forward).parameters)
    passed = set(batch) == fields and fields <= accepted
    return passed, f"{len(set(batch) & fields)} of {len(fields)} fields, and no other"


def first_audio_logits(lab, reference, heard):
    """Logits of entry 0's first frame with another reference clip, (num_codebooks, codebook_size + 2)."""
    entry = copy.deepcopy(lab.entries[0])
    for part in entry.messages[1].content:
        if isinstance(part, AudioContent):
            part.audio_url = reference
    collator = dataset.build_collator([], lab.model.config)
    collator.return_audio_in_tokens = heard
    data = dataset.StepDataset([entry], lab.data.code_files, lab.data.tokenizer, collator)
    [(batch, _)] = micro_batches(data, [0])
    with torch.no_grad():
        return lab.model(**batch).audio_logits[0]


def check_reference_heard(lab):
    """Another reference clip changes the logits; a base that would not hear it is refused.

    By more than rounding can: the logits' standard deviation is 3 (tiny_checkpoint.make_model), so that none
    is far above 15. Where the clip is not heard the inputs are the same numbers, and so is every bit.
    """
    voices = [dataset.clips_of(lab.entries[i])[0] for i in (0, 1)]
    heard, unheard = (
        (first_audio_logits(lab, voices[0], on) - first_audio_logits(lab, voices[1], on)).abs().max()
        for on in (True, False)
    )
    try:
        dataset.build_collator(lab.entries, SimpleNamespace(encode_audio_in_tokens=False))
        is_refused = False
    except dataset.UserError:
        is_refused = True
    passed = heard > rounding_bound(**TINY, scale=15) and unheard == 0 and is_refused
    return passed, f"logits change by {heard:.3f}, unheard by {unheard:.0f}; a deaf base is refused"


def loss_in_float64(outputs, batch):
    """The design's formula, written out in NumPy: text and mean codebook cross entropy, shifted by one."""

    def cross_entropy(logits, labels):  # (T, V) and (T,), already shifted; sum and count
        logits, keep = logits.double().numpy()[labels != -100], labels[labels != -100].numpy()
        log_sum = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        return (log_sum - logits[np.arange(len(keep)), keep]).sum(), len(keep)

    rows = [
        cross_entropy(logits[:-1], labels[1:])
        for logits, labels in zip(outputs.logits, outputs.expanded_labels)
    ]
    text = sum(total for total, _ in rows) / sum(count for _, count in rows)
    audio = [
        cross_entropy(outputs.audio_logits[:-1, k], labels[1:])
        for k, labels in enumerate(batch["label_audio_ids"])
    ]
    return text + np.mean([total / count for total, count in audio])


def check_dual_loss(lab):
    """The trainer's loss on two clips of different length equals the formula in float64.

    The formula's logits come from another forward in float32: the loss is as exact as they are.
    """
    [(batch, counts)] = micro_batches(lab.data, [0, 1])
    with torch.no_grad():
        expected = loss_in_float64(lab.model(**batch), batch)
        base = lora.load_base(lab.folder / "model", torch.float32, CPU)
        model = trainer.LossModel(lora.attach_lora(base, 4, 8, 0.0, seed=0))
        means = model(batch) / counts[:-2]
    error = abs((means[0] + means[1:].mean()).item() / expected - 1)
    return error < rounding_bound(**TINY), f"{expected:.6f} in float64, relative error {error:.1e}"


def check_targets(lab):
    """Modules and parameters that LoRA reaches, on the tiny model and on the released shape."""
    found = []
    with torch.device("meta"):
        for config in (lab.model.config, tiny_checkpoint.released_config()):
            model = lora.attach_lora(HiggsAudioModel(config), 16, 32, 0.05, seed=0)
            trainable = [p.numel() for p in model.parameters() if p.requires_grad]
            found.append((len(trainable) // 2, sum(trainable)))  # an A and a B for each module
    (tiny, small), (modules, parameters) = found
    passed = (tiny, modules, parameters) == (20, 280, 39_452_672)
    return passed, f"tiny {tiny} modules, {small:,} parameters; released shape {modules}, {parameters:,}"


def check_scaling(lab):
    """Two ranks on disjoint samples have the gradient that one rank has on all of them.

    It is a sum over the positions of all samples, of what comes forward and backward through the layers.
    """

    def moments(folder):
        state = torch.load(folder / "trainer_state.pt", weights_only=True)["optimizer"]
        return torch.cat([state[i]["exp_avg"].double().flatten() for i in range(len(state))])

    before = moments(lab.folder / "out/checkpoint-20")  # AdamW: exp_avg' = 0.9 exp_avg + 0.1 gradient
    one, two = (
        10 * (moments(lab.folder / name / "checkpoint-21") - 0.9 * before)
        for name in ("one_rank", "two_ranks")
    )
    error = ((one - two).norm() / one.norm()).item()
    positions = sum(lab.data.load_sample(i)[0] for i in range(len(lab.entries)))
    bound = rounding_bound(positions, 2 * TINY["layers"])
    return error < bound, f"gradients of {one.numel():,} parameters differ by {error:.1e} (relative norm)"


def check_checkpoint(lab):
    """The saved file holds LoRA tensors only, and plain PEFT loads all of it."""
    tensors = load_file(lab.folder / "out/adapter_model.safetensors")
    base = HiggsAudioModel.from_pretrained(lab.folder / "model", torch_dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, lab.folder / "out").state_dict()
    only_lora = all(".lora_A." in name or ".lora_B." in name for name in tensors)
    same = [
        only_lora and torch.equal(loaded[name.replace(".weight", ".default.weight")], value)
        for name, value in tensors.items()
    ]
    size = (lab.folder / "out/adapter_model.safetensors").stat().st_size
    passed = only_lora and all(same) and len(same) == 40  # A and B of 20 modules
    return passed, f"{len(same)} LoRA tensors and no other, {size / 1e6:.1f} MB"


def generate(engine, entry):
    """Greedy, unforced generation by upstream's engine: (codes (num_codebooks, T), stopped by itself)."""
    limit = 100
    try:
        answer = engine.generate(prompt_of(entry), max_new_tokens=limit, temperature=0.0, ras_win_len=None)
    except (IndexError, RuntimeError):  # upstream's way to say that no audio came out, or too little
        return None, False
    codes = revert_delay_pattern(torch.from_numpy(answer.generated_audio_tokens))[:, 1:-1]
    return codes, answer.usage["completion_tokens"] < limit and answer.generated_text.endswith("<|eot_id|>")


def answer_all(lab, adapter):
    """Let upstream's engine with the adapter answer each entry's prompt: (shares of codes that are the
    target's, whether it stopped by itself), a list each.
    """
    lab.engine.model = PeftModel.from_pretrained(lab.model, lab.folder / adapter).eval()
    accuracies, stops = [], []
    for entry in lab.entries:
        file = lab.data.code_files[dataset.clips_of(entry)[-1]]
        target = torch.from_numpy(np.load(file))  # (num_codebooks, T)
        codes, stopped = generate(lab.engine, entry)
        same_length = codes is not None and codes.shape == target.shape
        accuracies.append((codes == target).float().mean().item() if same_length else 0.0)
        stops.append(stopped)
    lab.engine.model = lab.engine.model.unload()
    return accuracies, stops


def judge(accuracies, stops):
    """Of answer_all's two lists: (whether all entries are spoken to their ends, the figure).

    The likeliest code is the target's wherever its loss is below ln 2 = 0.69, and the mean is 0.04: one code
    in a hundred may be off where a processor rounds otherwise.
    """
    shares = ", ".join(f"{accuracy:.1%}" for accuracy in accuracies)
    passed = min(accuracies) >= 0.99 and all(stops)
    return passed, f"{shares} of the codes are the target's; {sum(stops)} of {len(stops)} stop by themselves"


def check_learned(lab):
    """Given the prompt alone, upstream's engine with the adapter speaks each entry's own target codes."""
    return judge(*answer_all(lab, "out"))


TABLE = {
    "Bit-for-bit preprocessing": check_preprocessing,
    "Identical forward kwargs": check_forward_kwargs,
    "Reference audio is heard": check_reference_heard,
    "Dual loss computation": check_dual_loss,
    "DualFFN LoRA targeting": check_targets,
    "DDP scaling": check_scaling,
    "LoRA-only checkpoints": check_checkpoint,
    "It learns what inference runs": check_learned,
}


def validate(folder):
    """Build everything in `folder`, train as a user would, check each row; returns those that failed."""
    print("building a tiny checkpoint, codec, clips and manifest", flush=True)
    tiny_checkpoint.make_everything(folder)
    print("training on them: torchrun --nproc_per_node=2 trainer.py ...", flush=True)
    train(folder)
    lab, failed = open_lab(folder), []
    for name, check in TABLE.items():
        passed, figure = check(lab)
        print(f"{'pass' if passed else 'FAIL'}  {name}: {figure}", flush=True)
        failed += [] if passed else [name]
    return failed


def environment(folder):
    """What the libraries read once, when they are imported."""
    return {
        "HF_HOME": f"{folder}/huggingface",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # as torchrun's ranks have: with more threads sums are rounded otherwise
    }  # one GPU cannot have two ranks; and the same figures for all


def accept(keep):
    """Build, train and check everything in the folder `keep`, or in a temporary one."""
    with contextlib.nullcontext(keep) if keep else tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        settings = environment(folder)
        if not settings.items() <= os.environ.items():
            if any(folder.glob("*")):
                sys.exit(f"--keep {folder} is not empty; choose another folder")
            command = [sys.executable, sys.argv[0], "--keep", folder]
            sys.exit(subprocess.call(command, env=os.environ | settings))
        if failed := validate(folder):
            sys.exit(f"FAILED: {', '.join(failed)}")
    print("🎉 ALL VALIDATION TESTS PASSED!")
    print("📋 Ready for training with torchrun command...")
    print(READY)
