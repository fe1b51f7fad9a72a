"""lora.py merge: one checkpoint that upstream loads as it loads the base, or a reason and nothing."""

import json
import resource
import shutil

import pytest
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from boson_multimodal.serve.serve_engine import HiggsAudioServeEngine
from loguru import logger
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

import lora
from dataset import UserError
from tests.support import launcher
from tests.support.batches import micro_batches
from tests.support.bounds import TINY, rounding_bound
from tests.support.tiny_checkpoint import make_model

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path, lora_model):
    """A folder with an adapter of rank 4 whose B is not zero."""
    lora_model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    return tmp_path / "adapter"


@pytest.fixture(scope="module")
def bf16_base(tiny):
    """The tiny checkpoint as the released one is: in bfloat16, sharded, with a generation config."""
    model = HiggsAudioModel.from_pretrained(tiny / "model", torch_dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(max_new_tokens=77)
    shutil.copytree(tiny / "model", tiny / "bf16", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(tiny / "bf16", max_shard_size="2MB")
    (tiny / "bf16/LICENSE").write_text("theirs")
    return tiny / "bf16"


def merge(base, adapter, output_dir, *more):
    return launcher.run(
        "lora.py", "merge", "--base_ckpt", base, "--adapter", adapter, "--output_dir", output_dir, *more
    )


def test_the_engine_loads_what_was_merged(tiny, bf16_base, adapter, tmp_path):
    """By upstream's engine, in the base's dtype; each weight is the float32 sum, rounded once.

    Catches a product that is rounded to bfloat16 before it is added: it differs in about a third of them.
    A product may differ in its last bits from ours, which is a sum of four terms at another address: where
    the sum with the base's weight then lies between two bfloat16 numbers, it is rounded to the other one.
    That happens to a share of eps of float32 over eps of bfloat16, times ten for other processors. Weights
    without LoRA are copies, equal to the bit.
    """
    done = merge(bf16_base, adapter, tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    logger.disable("boson_multimodal")
    engine = HiggsAudioServeEngine(str(tmp_path / "merged"), str(tiny / "codec"), device="cpu")
    assert engine.model.dtype == torch.bfloat16 and engine.model.generation_config.max_new_tokens == 77
    config = (tmp_path / "merged/config.json").read_text()
    assert str(tiny) not in config and str(tmp_path) not in config
    modes = {path.stat().st_mode for path in (tmp_path / "merged").iterdir()}
    assert modes == {(bf16_base / "LICENSE").stat().st_mode}  # a plain file's
    assert (tmp_path / "merged/LICENSE").read_text() == "theirs" and not list(tmp_path.glob("unfinished*"))
    assert not list((tmp_path / "merged").glob("*.unfinished")) and engine.tokenizer.get_vocab() == (
        AutoTokenizer.from_pretrained(bf16_base).get_vocab()
    )
    base = HiggsAudioModel.from_pretrained(bf16_base, torch_dtype=torch.bfloat16).state_dict()
    tensors, changed = load_file(adapter / WEIGHTS), 0
    for name, weight in engine.model.state_dict().items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        expected, share = base[name], 0.0
        if key.format("A") in tensors:
            product = 2 * tensors[key.format("B")] @ tensors[key.format("A")]  # alpha / r = 8 / 4
            expected, changed = (expected.float() + product).bfloat16(), changed + 1
            share = 10 * torch.finfo(torch.float32).eps / torch.finfo(torch.bfloat16).eps
        assert (weight != expected).double().mean() <= share, name
    assert changed == 20


def test_a_float32_merge_computes_the_same(tiny, adapter, tmp_path, open_data, entries):
    """The merged model has one product where base and adapter have three: sums in another order. Catches
    a scaling of LoRA that is wrong by a hundredth.
    """
    lora.merge(tiny / "model", adapter, tmp_path / "a/b/merged")  # what is missing of the path is made
    (tmp_path / "a/b/merged").rename(tmp_path / "merged")
    base = HiggsAudioModel.from_pretrained(tiny / "model", torch_dtype=torch.float32)
    merged = HiggsAudioModel.from_pretrained(tmp_path / "merged", torch_dtype="auto")
    [(batch, _)] = micro_batches(open_data(entries), range(3))
    with torch.no_grad():
        before = base(**batch)
        expected = PeftModel.from_pretrained(base, adapter)(**batch)
        found = merged.eval()(**batch)
    assert merged.dtype == torch.float32
    for name in ("logits", "audio_logits"):
        bound = rounding_bound(**TINY, scale=expected[name].abs().max())
        assert (found[name] - expected[name]).abs().max() < bound
        # A hundredth of what the adapter adds would then show
        assert (before[name] - expected[name]).abs().max() > 100 * bound


def config_with(adapter, **settings):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | settings))


def without_one(adapter):
    tensors = load_file(adapter / WEIGHTS)
    del tensors[next(iter(tensors))]
    save_file(tensors, adapter / WEIGHTS)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (
            lambda folder: config_with(folder, r=8),
            "size mismatch",
        ),
        (without_one, "missing adapter keys"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"damaged"), "SafetensorError"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no LoRA adapter there"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "no LoRA adapter there"),
        (lambda folder: config_with(folder, peft_type="IA3"), "no LoRA adapter there"),
        (lambda folder: config_with(folder, target_modules=["nothing"]), "no LoRA adapter there"),
        (lambda folder: config_with(folder, target_modules=r".*embed_tokens"), "no LoRA adapter there"),
    ],
    ids=range(8),
)
def test_an_adapter_that_is_damaged_or_foreign_is_refused(tiny, adapter, damage, reason):
    """Catches PEFT's own way: a tensor that is missing is a warning, and the base speaks alone."""
    damage(adapter)
    base = lora.load_base(tiny / "model", torch.float32, "cpu")
    with pytest.raises(UserError, match=reason):
        lora.load_adapter(base, adapter, "unknown")


def test_an_adapter_knows_its_base(tiny, adapter, tmp_path):
    """Merging twice, or onto another base of the same shape, would speak noise: each weight fits."""
    base_id = lora.fingerprint((tiny / "model").glob("*.safetensors"))
    (adapter / "args.json").write_text(json.dumps({"base_fingerprint": base_id, "base_ckpt": "the/first"}))
    lora.merge(tiny / "model", adapter, tmp_path / "merged")
    with pytest.raises(UserError, match="was trained on another base: the/first"):
        lora.merge(tmp_path / "merged", adapter, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    tensors = load_file(tiny / "model/model.safetensors")
    shutil.copytree(tiny / "model", tmp_path / "other")
    tensors["layers.1.audio_mlp.up_proj.weight"][0] += 1
    save_file(tensors, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    assert lora.fingerprint((tmp_path / "other").glob("*.safetensors")) != base_id
    (tmp_path / "other/model.safetensors").unlink()
    with pytest.raises(UserError, match="has no .*safetensors; the download is not whole: hf download"):
        lora.merge(tmp_path / "other", adapter, tmp_path / "none")
    with pytest.raises(UserError, match="no config.json .an adapter is no model.; hf download"):
        lora.merge(adapter, adapter, tmp_path / "none")


def test_another_bases_adapter_is_refused_and_nothing_is_left(tmp_path, adapter):
    make_model(tmp_path / "smaller", hidden=128)
    done = merge(tmp_path / "smaller", adapter, tmp_path / "merged")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: --adapter {adapter}: no LoRA adapter there, or a damaged one" in done.stderr
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob("unfinished*"))


def test_nothing_is_left_where_there_is_no_room_and_nothing_is_overwritten(tiny, tmp_path, adapter):
    """A file-size limit stands for a full disk: the same OSError in the same calls."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(UserError, match="--output_dir .*merged cannot be written"):
            lora.merge(tiny / "model", adapter, tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    (tmp_path / "merged").mkdir()
    with pytest.raises(UserError, match="merged is there already; choose another"):
        lora.merge(tiny / "model", adapter, tmp_path / "merged")
