"""What else a user can get wrong, before the first step: clips, checkpoint, codec, folders, settings."""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import torch
from boson_multimodal.audio_processing.higgs_audio_tokenizer import load_higgs_audio_tokenizer
from safetensors.torch import load_file, save_file

import dataset
import lora
import trainer
from dataset import UserError
from tests.support import launcher, tiny_checkpoint

ROOT = Path(__file__).parent.parent
TONE = tiny_checkpoint.speech_like(0.5, seed=7)


def reply_with(clip):
    return {
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": {"type": "audio", "audio_url": str(clip)}},
        ]
    }


@pytest.fixture(scope="session")
def bad_clips(tmp_path_factory):
    """One file for each way in which a clip can be useless: {name: (path, what the error says)}."""
    folder = tmp_path_factory.mktemp("bad")
    contents = {
        "empty": (b"", "cannot be decoded"),
        "text": (b"this is no sound", "cannot be decoded"),
        "cut header": (b"RIFF\x24\x00\x00\x00WAVEfmt ", "cannot be decoded"),
        "no samples": (TONE[:0], "0.000 s decoded, not all or under 0.1"),
        "too short": (TONE[:2000], "0.083 s decoded, not all or under 0.1"),
    }
    for name, (content, _) in contents.items():
        if isinstance(content, bytes):
            (folder / f"{name}.wav").write_bytes(content)
        else:
            soundfile.write(folder / f"{name}.wav", content, 24_000, subtype="FLOAT")
    return {name: (folder / f"{name}.wav", message) for name, (_, message) in contents.items()}


def test_all_bad_clips_are_reported_at_once(open_data, bad_clips):
    with pytest.raises(UserError) as error:
        open_data([reply_with(clip) for clip, _ in bad_clips.values()])
    for clip, message in bad_clips.values():
        assert f"{clip}: {message}" in str(error.value)


def test_bad_samples_are_reported_at_once(open_data, tmp_path):
    """Found in decoding, after resampling too. A clip of several entries is named once."""
    for name, rate, bad in (("nan", 24_000, np.nan), ("inf", 44_100, np.inf)):
        wave = tiny_checkpoint.speech_like(0.5, seed=7, sample_rate=rate)
        wave[100] = bad
        soundfile.write(tmp_path / f"{name}.wav", wave, rate, subtype="FLOAT")
    once, other = (reply_with(tmp_path / f"{name}.wav") for name in ("nan", "inf"))
    twice = {"messages": once["messages"] * 2}
    with pytest.raises(UserError) as error:
        open_data([once, other, twice] + [once] * 6)
    error = str(error.value)
    assert len(re.findall(".*nan.wav: cannot be decoded .*finite", error)) == 1
    assert re.search(".*inf.wav: cannot be decoded .*not finite everywhere", error)


@pytest.mark.parametrize(
    "rate, channels, suffix",
    [(24_000, 1, "wav"), (44_100, 2, "wav"), (16_000, 1, "flac"), (48_000, 2, "mp3"), (22_050, 1, "ogg")],
)
def test_codes_are_those_of_inference(open_data, tiny, tmp_path, rate, channels, suffix):
    """Any rate, mono or stereo: the codes that HiggsAudioServeEngine computes.

    All of them, on any machine: both encode the same numbers by the same codec, in the same shapes, in one
    process. Codes of another machine can differ, where two entries of a codebook are equally near.
    """
    wave = tiny_checkpoint.speech_like(0.6, seed=3, sample_rate=rate)
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.stack([wave] * channels, axis=1), rate)
    data = open_data([reply_with(path)])
    codec = load_higgs_audio_tokenizer(str(tiny / "codec"), device="cpu")
    wave, _ = librosa.load(path, sr=codec.sampling_rate)
    expected = codec.encode(wave, codec.sampling_rate).squeeze(0)
    assert torch.equal(data.load_sample(0)[1].audio_ids_concat, expected)


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("--base_ckpt", "/nowhere/model", "--base_ckpt /nowhere/model: no such folder"),
        (
            "--base_ckpt",
            "nobody/nothing",
            "--base_ckpt nobody/nothing: no such folder, .*hf download nobody/nothing --revision main",
        ),
        ("--audio_tokenizer", "/nowhere/codec", "--audio_tokenizer /nowhere/codec: no such folder"),
        ("--audio_tokenizer", "/tmp", "--audio_tokenizer /tmp: no config.json"),
        (
            "--code_cache",
            "/dev/null/cache",
            "--code_cache /dev/null/cache not written .*Not a directory",
        ),
        ("--code_cache", "/proc/self", "--code_cache /proc/self not written"),
    ],
)
def test_what_is_not_there(open_data, entries, flag, value, message):
    with pytest.raises(UserError, match=message):
        open_data(entries, f"{flag}={value}")


def test_a_checkpoint_of_another_model(open_data, entries, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="has model_type llama, expected higgs_audio"):
        open_data(entries, f"--base_ckpt={tmp_path}")


def test_a_checkpoint_without_some_weights(tiny, tmp_path):
    """transformers only warns, and goes on with random numbers."""
    shutil.copytree(tiny / "model", tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    tensors = load_file(weights)
    del tensors["norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks the weights .'norm.weight'."):
        lora.load_base(tmp_path / "model", torch.float32, "cpu")


@pytest.mark.parametrize(
    "change, seen",
    [({"n_q": 4}, "another base's"), ({"bins": 512}, "(?s)cannot be loaded with HuBERT.*size mismatch")],
)
def test_a_codec_that_does_not_fit(open_data, entries, tiny, tmp_path, change, seen):
    config = json.loads((tiny / "codec/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    (tmp_path / "model.pth").symlink_to(tiny / "codec/model.pth")
    with pytest.raises(UserError, match=seen):
        open_data(entries, f"--audio_tokenizer={tmp_path}").load_sample(0)[0]


def test_references_that_are_not_heard_are_refused(open_data, entries, tiny, tmp_path):
    """On a checkpoint that takes no codes of references; in the masked layout it hears them."""
    shutil.copytree(tiny / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"encode_audio_in_tokens": False}))
    with pytest.raises(UserError, match="this base hears no reference in a user's turn"):
        open_data(entries, model=tmp_path / "model")
    turns = [turn for clip in ("voice_a", "target_a") for turn in reply_with(f"clips/{clip}.wav")["messages"]]
    open_data([{"messages": turns, "start_index": 3}], model=tmp_path / "model").load_sample(0)[0]


def test_a_second_run_encodes_nothing(open_data, entries, monkeypatch):
    open_data(entries)
    monkeypatch.setattr(lora, "load_codec", None)  # calling it would raise TypeError
    open_data(entries)


def test_one_bad_clip_ends_all_ranks_with_one_message(tiny, tmp_path, bad_clips):
    """Only the rank that was dealt the clip sees it: the others must neither hang nor go on. (Under torchrun:
    test_a_rank_that_fails_alone_ends_the_job.)
    """
    manifest = tmp_path / "train.json"
    clips = bad_clips["text"][0], tiny / "clips/voice_b.wav"
    manifest.write_text(json.dumps([reply_with(clip) for clip in clips]))
    flags = [
        f"--train_manifest={manifest}",
        f"--output_dir={tmp_path}/out",
        f"--base_ckpt={tiny}/model",
        f"--audio_tokenizer={tiny}/codec",
    ]
    done = launcher.run("tests/support/ranks.py", json.dumps({2: [flags]}))
    assert "terminated with exit code 1" in done.stderr
    assert done.returncode == 1 and done.stderr.count("error: clips: 1 problem(s)") == 1
    assert f"{bad_clips['text'][0]}: cannot be decoded" in done.stderr
    assert 'trainer.py", line' not in done.stderr and not (tmp_path / "out/metrics.jsonl").exists()


def test_one_process_exits_1_without_a_traceback(tmp_path):
    manifest = tmp_path / "none.json"
    done = launcher.run("trainer.py", "--train_manifest", manifest, "--output_dir", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: --train_manifest {manifest} cannot be read")


def test_a_codec_that_does_not_load(tiny, tmp_path):
    """Found when it is loaded: codebooks without training (they would come from the first clip that is
    encoded, so codes would depend on the order), weights of another shape, no HuBERT.
    """
    shutil.copytree(tiny / "codec", tmp_path / "codec", ignore=shutil.ignore_patterns("model.pth"))
    weights = torch.load(tiny / "codec/model.pth")
    for name in weights:
        if name.endswith("inited"):
            weights[name].zero_()
    torch.save(weights, tmp_path / "codec/model.pth")
    with pytest.raises(UserError, match="codebooks that were never trained"):
        lora.load_codec(tmp_path / "codec", "cpu")
    torch.save({name: value[..., :1] for name, value in weights.items()}, tmp_path / "codec/model.pth")
    with pytest.raises(UserError, match="(?s)cannot be loaded with HuBERT.*size mismatch"):
        lora.load_codec(tmp_path / "codec", "cpu")


def test_a_rank_that_fails_alone_ends_the_job(tiny, tmp_path):
    """Catches an exit that waits for its workers (they ignore SIGTERM), while other ranks wait for it."""
    manifest = tmp_path / "train.json"
    text = [
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": f"{i}"}]}
        for i in range(40)
    ]
    manifest.write_text(json.dumps(text))
    program = tmp_path / "program.py"
    program.write_text(FAILS_ALONE.format(root=ROOT))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            program,
            "--train_manifest",
            manifest,
            "--output_dir",
            tmp_path / "out",
            "--base_ckpt",
            tiny / "model",
            "--audio_tokenizer",
            tiny / "codec",
            "--batch_size=1",
            "--grad_accum=1",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1 and done.stderr.count("error: entry 30 is bad") == 1


FAILS_ALONE = """
import runpy, sys
sys.path.insert(0, "{root}")
import dataset
sample = dataset.StepDataset.load_sample
def fail_at_30(self, index):
    if index == 30:
        raise dataset.UserError("entry 30 is bad")
    return sample(self, index)
dataset.StepDataset.load_sample = fail_at_30
runpy.run_path("{root}/trainer.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("--batch_size", "0", "--batch_size is 0; expected 1 or more"),
        ("--grad_accum", "-1", "--grad_accum is -1"),
        ("--max_tokens", "0", "--max_tokens is 0; expected 1 or more"),
        ("--save_steps", "0", "--save_steps is 0"),
        ("--logging_steps", "0", "--logging_steps is 0"),
        ("--num_workers", "-1", "--num_workers is -1"),
        ("--lr", "-1e-4", "--lr is -0.0001"),
        ("--lr", "nan", "--lr is nan"),
        ("--seed", "-1", "--seed is -1"),
        ("--epochs", "two", "--epochs: invalid int value"),
        ("--precision", "fp16", "invalid choice: 'fp16'"),
    ],
)
def test_numbers_that_make_no_run(capsys, flag, value, message):
    with pytest.raises(SystemExit) as exit:
        trainer.parse_args(["--train_manifest=a", "--output_dir=b", f"{flag}={value}"])
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_damaged_and_lost_codes_are_named(open_data, entries):
    data = open_data(entries)
    file = data.code_files[dataset.clips_of(data.entries[0])[0]]
    content = file.read_bytes()
    for damaged in (None, b"", content[:40], content[:-9], content.replace(b"'", b" ", 1)):
        file.unlink(missing_ok=True)
        if damaged is not None:
            file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"codes {file}: damaged, .*: remove them; or not on this node"):
            data.load_sample(0)
    file.unlink()  # as the message says
    assert open_data(entries).code_files == data.code_files and file.read_bytes() == content


def test_links_share_the_codes(tiny, tmp_path):
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", tiny_checkpoint.speech_like(0.2 + i / 10, seed=30 + i), 24_000)
    (tmp_path / "link.wav").symlink_to(tmp_path / "3.wav")
    manifest = tmp_path / "train.json"
    manifest.write_text(json.dumps([reply_with(f"{name}.wav") for name in (0, 1, 2, 3, "link")]))
    entries = dataset.load_manifest(manifest)
    clips = dataset.code_files(entries, tmp_path, "any")
    assert len(clips) == 5 and clips[f"{tmp_path}/link.wav"] == clips[f"{tmp_path}/3.wav"]
    dataset.encode_missing(clips, lambda: lora.load_codec(tiny / "codec", "cpu"), 0)
    assert {file.name for file in clips.values()} == {file.name for file in tmp_path.glob("*.npy")}


def test_a_cache_that_is_full(tiny, tmp_path):
    """The flag is named, nothing torn is left. A file-size limit stands for a full disk or a quota."""
    manifest = tmp_path / "train.json"
    manifest.write_text(json.dumps([reply_with(tiny / "clips/target_a.wav")]))
    cache = tmp_path / "cache"
    cache.mkdir()
    entries = dataset.load_manifest(manifest)
    files = dataset.code_files(entries, cache, "any")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(UserError, match=f"--code_cache {cache} not written .*File too large"):
            dataset.encode_missing(files, lambda: lora.load_codec(tiny / "codec", "cpu"), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(file.exists() for file in files.values())


def test_a_gpu_that_cannot_be_used_is_refused(monkeypatch):
    """Catches eight ranks that train in float32 on the CPU, without a word, where the driver is too old."""
    monkeypatch.setattr(trainer.os.path, "exists", lambda path: path == "/dev/nvidiactl")
    monkeypatch.setattr(trainer.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert trainer.start() == torch.device("cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match="cannot use this machine's GPU: update its driver to 580 or newer"):
        trainer.start()
