"""The hub as it is since April 2026, in its cache's layout, offline: names, revisions, what is refused."""

import json
import re
import shutil

import pytest

import lora
from dataset import UserError
from tests.support import launcher

BASE, CODEC = lora.BASE, lora.CODEC
TODAY = "bosonai/higgs-tts-2-3b-base"  # the base's name since June 2026
HUBERT_MAIN = "models--bosonai--hubert_base/refs/main"
NEW = "f" * 40  # main's revision: transformers' own format
EVIL_REVISION, ADAPTER_REVISION = "e" * 40, "a" * 40  # of HuBERT: with code; with an adapter of such a one
EVIL = """
from pathlib import Path
from transformers import HubertModel
Path({!r}).touch()
class Evil(HubertModel):
    pass
"""


def add_repository(hub, name, original, new_config):
    """`name` in the hub's cache: main is `new_config` alone, the old revision a copy of `original`."""
    folder = hub / f"models--{name.replace('/', '--')}"
    shutil.copytree(original, folder / "snapshots" / lora.REVISIONS[name])
    (folder / "snapshots" / NEW).mkdir()
    (folder / "snapshots" / NEW / "config.json").write_text(json.dumps(new_config))
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(NEW)


@pytest.fixture(scope="module")
def hub(tiny):
    """The hub's cache: base and codec as on today's hub, beside the HuBERT of the tiny checkpoint."""
    hub = tiny / "huggingface/hub"
    for name in (BASE, TODAY):
        add_repository(hub, name, tiny / "model", {"model_type": "higgs_audio_v2"})
    add_repository(
        hub,
        CODEC,
        tiny / "codec",
        {"model_type": "higgs_audio_v2_tokenizer", "acoustic_model_config": {"model_type": "dac"}},
    )
    main = hub / HUBERT_MAIN
    revision = main.read_text()
    yield hub
    main.write_text(revision)  # what else is there now has names that no other test asks for


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def trained(tiny, hub, folder):
    """--output_dir of the user's own flags, on two ranks, which name the base and no codec."""
    out = folder / "out"
    flags = f"""--train_manifest {tiny}/train.json --output_dir {out} --base_ckpt {BASE} --batch_size 2
        --lr 2e-4 --epochs 2 --grad_accum 8 --lora_r 16 --lora_alpha 32 --lora_dropout 0.05"""
    done = launcher.run("tests/support/ranks.py", json.dumps({2: [flags.split()]}))
    assert done.returncode == 0, done.stderr
    return out


def test_the_users_command_starts_by_name_alone(trained):
    config = json.loads((trained / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, lora.REVISIONS[BASE])
    assert json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 1


@pytest.fixture(scope="module")
def told(tiny, hub, folder, trained):
    """[(exit code, output)] of the commands below; the last finds code of its own beside HuBERT's config."""
    for config in (hub / "models--bosonai--hubert_base/snapshots").glob("*/config.json"):
        settings = json.loads(config.read_text())
        settings["auto_map"] = {"AutoModel": "evil.Evil"}
        evil = config.parent.parent / EVIL_REVISION
        shutil.copytree(config.parent, evil)
        (evil / "config.json").write_text(json.dumps(settings))
        (evil / "evil.py").write_text(EVIL.format(str(folder / "it_ran")))
        other = hub / "models--evil--repo"
        shutil.copytree(evil, other / "snapshots" / EVIL_REVISION)
        (other / "refs").mkdir()
        (other / "refs/main").write_text(EVIL_REVISION)
        shutil.copytree(config.parent, evil.parent / ADAPTER_REVISION)
        (evil.parent / ADAPTER_REVISION / "adapter_config.json").write_text(
            '{"base_model_name_or_path": "evil/repo", "peft_type": "LORA"}'
        )
    train = ["trainer.py", "--train_manifest", tiny / "train.json", "--output_dir", folder / "new"]
    commands = [
        ["lora.py", "merge", "--base_ckpt", BASE, "--adapter", trained, "--output_dir", folder / "a/merged"],
        [
            "validate_pipeline.py",
            "--base_ckpt",
            f"{BASE}@{lora.REVISIONS[BASE]}",
            "--train_manifest",
            tiny / "train.json",
            "--adapter",
            trained,
            "--output_dir",
            folder / "listen",
        ],
        [*train, "--base_ckpt", f"{BASE}@main"],
        [*train, "--audio_tokenizer", f"{CODEC}@{NEW}"],
        [*train, "--base_ckpt", f"{BASE}@{'0' * 40}"],
        ["lora.py", "merge", "--base_ckpt", BASE, "--adapter", folder / "b", "--output_dir", folder / "d"],
        ["lora.py", "merge", "--base_ckpt", TODAY, "--adapter", trained, "--output_dir", folder / "c"],
        [*train, "--base_ckpt", f"{TODAY}@main"],
    ]
    runs = [launcher.run(*command) for command in commands]
    for revision in (EVIL_REVISION, ADAPTER_REVISION):
        (hub / HUBERT_MAIN).write_text(revision)
        runs.append(launcher.run(*train, "--code_cache", folder / "empty"))
    return [(done.returncode, done.stdout + done.stderr) for done in runs]


def test_merge_and_comparison_take_names(folder, told):
    (merged, _), (compared, losses) = told[:2]
    assert merged == compared == 0 and "smallest    " in losses


def test_todays_name_means_the_same_revision(folder, told):
    """Catches a download of the new format, 11.5 GB, before it is refused.

    The same program merged the same weights twice on one machine: every byte is the same.
    """
    code, output = told[6]
    assert code == 0, output
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("a/merged", "c")]
    assert weights[0] == weights[1]


def test_the_new_format_is_refused_with_the_remedy(told):
    for (code, output), name in zip([*told[2:4], told[7]], (BASE, CODEC, BASE), strict=True):
        assert code == 1 and "Traceback" not in output
        assert re.search("has model_type higgs_audio_v2.*expected ", output)
        assert f"hf download {name} --revision {lora.REVISIONS[name]}" in output


def test_what_is_not_cached_is_named_with_its_revision(folder, told):
    (base, no_base), (adapter, no_adapter) = told[4:6]
    assert base == adapter == 1
    assert f"hf download {BASE} --revision {'0' * 40}" in no_base
    assert f"--adapter {folder}/b: no LoRA adapter there" in no_adapter and "hf download" not in no_adapter


def test_code_from_the_hub_does_not_run(folder, told):
    """Catches the codec's class, which loads HuBERT with trust_remote_code=True."""
    for (code, output), revision in zip(told[-2:], (EVIL_REVISION, ADAPTER_REVISION), strict=True):
        assert code == 1 and f"bosonai/hubert_base, revision {revision}, would run code" in output
    assert "evil.Evil" in told[-2][1] and not (folder / "it_ran").exists()


def test_a_folder_in_the_new_format_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "higgs_audio_v2_tokenizer"}')
    with pytest.raises(
        UserError,
        match=f"has model_type higgs_audio_v2_tokenizer, .*{CODEC} --revision {lora.REVISIONS[CODEC]}",
    ):
        lora.download("--audio_tokenizer", tmp_path)
