"""The model's side: open base and codec, put LoRA on the DualFFN projections, save and load adapter and run.

The adapter is plain PEFT: PeftModel.from_pretrained(HiggsAudioModel.from_pretrained(base), folder) loads it.
"""

import functools
import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import torch
from boson_multimodal.audio_processing.higgs_audio_tokenizer import load_higgs_audio_tokenizer
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoProcessor, AutoTokenizer, PretrainedConfig

from dataset import PipelineError

# Matched against the whole name: suffixes like peft's usual q_proj would reach audio_tower.layers... too.
# The Whisper tower, the heads and the embeddings stay as they are.
TARGET_MODULES = r"layers\.\d+\.((self_attn|audio_attn)\.[qkvo]_proj|(mlp|audio_mlp)\.(gate|up|down)_proj)"


def open_base(name):
    """Read a base checkpoint's config and text tokenizer. Raises PipelineError where there is none."""
    try:
        settings, _ = PretrainedConfig.get_config_dict(name)
        if settings.get("model_type") != "higgs_audio":
            raise PipelineError(f"--base_ckpt {name} is {settings.get('model_type')}, not higgs_audio")
        return HiggsAudioConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"--base_ckpt {name}: no Higgs Audio checkpoint there ({error})") from None


def open_codec(name, config):
    """Find the codec: (folder, fingerprint). Raises PipelineError where there is none or it does not fit."""
    try:
        folder = Path(name if os.path.exists(name) else snapshot_download(name))
        codec = json.loads((folder / "config.json").read_text())
        with open(folder / "model.pth", "rb") as weights:
            fingerprint = hashlib.file_digest(weights, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise PipelineError(f"--audio_tokenizer {name}: no codec there ({error})") from None
    codebooks, size = codec.get("n_q", 8), codec.get("bins", 1024)  # the defaults of HiggsAudioTokenizer
    if codebooks < config.audio_num_codebooks or size != config.audio_codebook_size:
        raise PipelineError(f"--audio_tokenizer {name} has {codebooks} codebooks of {size}, the base needs "
                            f"{config.audio_num_codebooks} of {config.audio_codebook_size}")
    return folder, fingerprint


def load_codec(folder, device):
    """Load the codec onto `device`. Raises PipelineError where that fails, or it was never trained."""
    try:
        codec = load_higgs_audio_tokenizer(str(folder), device=str(device))
    # OSError: its HuBERT (bosonai/hubert_base) is not to be had; the others: model.pth is no such file
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise PipelineError(f"--audio_tokenizer {folder} cannot be loaded ({error})") from None
    if not all(buffer.all() for name, buffer in codec.named_buffers() if name.endswith("inited")):
        raise PipelineError(f"--audio_tokenizer {folder} has codebooks that were never trained")
    return codec


def open_whisper(name):
    """The processor of checkpoints that embed Whisper features. Raises PipelineError where there is none."""
    try:
        return AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise PipelineError(f"--whisper_processor {name}: no processor there ({error})") from None


def load_base(name, dtype, device):
    """Load the frozen HiggsAudioModel straight to `device`, never whole into CPU memory first."""
    try:
        model, info = HiggsAudioModel.from_pretrained(name, torch_dtype=dtype, device_map={"": device},
                                                      output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise PipelineError(f"--base_ckpt {name}: its weights cannot be loaded ({error})") from None
    if info["missing_keys"]:  # transformers would go on with random numbers in their place
        raise PipelineError(f"--base_ckpt {name} lacks the weights {sorted(info['missing_keys'])[:5]}")
    return model.requires_grad_(False)


def find_target_modules(model):
    """Names of the modules that get LoRA: the decoder layers' projections in attention and in both FFNs.

    On the released model 280: 28 layers of 4 + 3 + 3. Raises PipelineError where there are none.
    """
    names = [name for name, _ in model.named_modules() if re.fullmatch(TARGET_MODULES, name)]
    if not names:
        raise PipelineError(f"{type(model).__name__} has no layers.0.self_attn.q_proj or the like for LoRA")
    return names


def attach(model, r, alpha, dropout, seed):
    """Wrap `model` in LoRA; the adapter is float32 whatever the base's dtype, and drawn from `seed`.

    No task type: PEFT's CAUSAL_LM would pass `labels`, which HiggsAudioModel.forward does not take.
    """
    find_target_modules(model)
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout,
                                            target_modules=TARGET_MODULES))


def take_text_head(model):
    """Remove the text head from the forward and return it: outputs.logits become the hidden states.

    Upstream would multiply every position, most of them audio, with the whole vocabulary (128,256 columns).
    """
    projector = model.get_base_model().audio_decoder_proj
    head, projector.text_lm_head = projector.text_lm_head, torch.nn.Identity()
    return head


def checkpoint_gradients(model):
    """Recompute each decoder layer in backward. Upstream's layers ignore gradient_checkpointing_enable()."""
    for layer in model.get_base_model().layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def save(model, folder):
    """Write adapter_config.json and adapter_model.safetensors, LoRA tensors only, into `folder`."""
    model.save_pretrained(str(folder), save_embedding_layers=False)


def load(model, folder, trainable=False):
    """Put the adapter in `folder` on the base `model`; returns a PeftModel."""
    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)


def checkpoints(output_dir):
    """The checkpoint folders in `output_dir`, oldest first."""
    found = [folder for folder in output_dir.glob("checkpoint-*") if folder.name[11:].isdecimal()]
    return sorted(found, key=lambda folder: int(folder.name[11:]))


def find_checkpoint(output_dir, wanted):
    """The checkpoint to resume from, or None. Raises PipelineError where results would be overwritten."""
    found, finished = checkpoints(output_dir), (output_dir / "adapter_model.safetensors").exists()
    if wanted == "auto" and (found or not finished):
        return found[-1] if found else None
    if wanted not in (None, "auto"):
        if not (Path(wanted) / "trainer_state.pt").is_file():
            raise PipelineError(f"--resume_from_checkpoint {wanted}: there is no trainer_state.pt in it")
        return Path(wanted)
    if found or finished:
        raise PipelineError(f"--output_dir {output_dir} already holds an adapter or checkpoints; choose "
                            "another, or go on with --resume_from_checkpoint auto")
    return None


def save_checkpoint(output_dir, model, state, keep):
    """Write checkpoint-<step> whole or not at all, then remove all but the newest `keep`."""
    unfinished = output_dir / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    save(model, unfinished)
    torch.save(state, unfinished / "trainer_state.pt")
    whole = output_dir / f"checkpoint-{state['step']}"
    shutil.rmtree(whole, ignore_errors=True)  # of an earlier run, where this one resumed before it
    unfinished.rename(whole)
    for folder in checkpoints(output_dir)[:-keep]:
        shutil.rmtree(folder)


def restore(folder, model, optimizer, schedule, run):
    """Load a checkpoint into this run; returns its step. Raises PipelineError where it is another run's."""
    state = torch.load(folder / "trainer_state.pt", map_location="cpu", weights_only=True)
    before = state["run"]
    differing = [f"{key} was {before.get(key)}, is {run[key]}" for key in run if before.get(key) != run[key]]
    if differing:
        raise PipelineError(f"{folder} belongs to another run: " + "; ".join(differing))
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["step"]
