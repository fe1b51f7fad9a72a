"""The model's side: open base and codec, put LoRA on the DualFFN projections, save and load adapter and run.

The adapter is plain PEFT: PeftModel.from_pretrained(HiggsAudioModel.from_pretrained(base), folder) loads it.
"""

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import uuid
from pathlib import Path

import numpy as np
import torch
from boson_multimodal.audio_processing.higgs_audio_tokenizer import load_higgs_audio_tokenizer
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioSampleCollator
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from huggingface_hub import snapshot_download
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoProcessor, AutoTokenizer, PretrainedConfig, get_cosine_schedule_with_warmup

import dataset
from dataset import PipelineError, blaming

CHECKPOINT = "adapter_config.json", "adapter_model.safetensors", "trainer_state.pt"
# Matched against the whole name: suffixes like peft's usual q_proj would reach audio_tower.layers... too.
# The Whisper tower, the heads and the embeddings stay as they are.
TARGET_MODULES = r"layers\.\d+\.((self_attn|audio_attn)\.[qkvo]_proj|(mlp|audio_mlp)\.(gate|up|down)_proj)"


def fingerprint(files):
    """sha256 of each file's size and of 16 MiB at 64 places in it: up to 1 GiB that is all of it."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with open(file, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            for place in range(64):
                stream.seek(size * place // 64)
                digest.update(stream.read(min(2**24, -(-size // 64))))
    return digest.hexdigest()


def open_base(name):
    """A base checkpoint's (config, text tokenizer, fingerprint). PipelineError where there is none."""
    with blaming(f"--base_ckpt {name}: no Higgs Audio checkpoint there"):
        settings, _ = PretrainedConfig.get_config_dict(name)
        if settings.get("model_type") != "higgs_audio":
            raise PipelineError(f"--base_ckpt {name} is {settings.get('model_type')}, not higgs_audio")
        folder = Path(name if os.path.exists(name) else snapshot_download(name))
        weights = fingerprint([folder / "config.json", *folder.glob("*.safetensors")])
        return HiggsAudioConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name), weights


def open_codec(name, config):
    """Find the codec: (folder, fingerprint). Raises PipelineError where there is none or it does not fit."""
    with blaming(f"--audio_tokenizer {name}: no codec there"):
        folder = Path(name if os.path.exists(name) else snapshot_download(name))
        codec = json.loads((folder / "config.json").read_text())
        weights = fingerprint([folder / "config.json", folder / "model.pth"])
    codebooks, size = codec.get("n_q", 8), codec.get("bins", 1024)  # the defaults of HiggsAudioTokenizer
    if codebooks < config.audio_num_codebooks or size != config.audio_codebook_size:
        raise PipelineError(f"--audio_tokenizer {name} has {codebooks} codebooks of {size}, the base needs "
                            f"{config.audio_num_codebooks} of {config.audio_codebook_size}")
    return folder, weights


def check_references(entries, config, setting):
    """Whether user and system clips go to the model as codes; refuses those that it would not hear at all."""
    encodes = config.encode_audio_in_tokens
    as_codes = {"auto": encodes, "true": True, "false": False}[setting]
    heard = (as_codes and encodes) or config.encode_whisper_embed
    deaf = [([i], "its reference clip never reaches the model") for i, entry in enumerate(entries)
            if not heard and any(role != "assistant" for role, _, _ in dataset.clips_of(entry))]
    if setting != "false":
        dataset.refuse(f"encode_audio_in_tokens {encodes}, --return_audio_in_tokens {setting} (use auto, or "
                       "put references into assistant turns before start_index)", deaf)
    elif deaf and os.environ.get("RANK", "0") == "0":
        print(f"warning: {len(deaf)} entries train deaf, the first is {deaf[0][0]}", file=sys.stderr)
    return as_codes


def build_collator(config, whisper_processor, return_audio_in_tokens):
    """The collator exactly as serve_engine.py builds it, but for `return_audio_in_tokens`."""
    whisper = None
    if config.encode_whisper_embed:
        with blaming(f"--whisper_processor {whisper_processor}: no processor there"):
            whisper = AutoProcessor.from_pretrained(whisper_processor)
    return HiggsAudioSampleCollator(
        whisper_processor=whisper, encode_whisper_embed=config.encode_whisper_embed,
        audio_in_token_id=config.audio_in_token_idx, audio_out_token_id=config.audio_out_token_idx,
        audio_stream_bos_id=config.audio_stream_bos_id, audio_stream_eos_id=config.audio_stream_eos_id,
        pad_token_id=config.pad_token_id, return_audio_in_tokens=return_audio_in_tokens, round_to=1,
        use_delay_pattern=config.use_delay_pattern, audio_num_codebooks=config.audio_num_codebooks)


def open_inputs(args, device):
    """Open and check all that a user can get wrong, before anything is loaded; `run`: what identifies it."""
    entries = dataset.load_manifest(args.train_manifest)
    config, tokenizer, base = open_base(args.base_ckpt)
    codec, weights = open_codec(args.audio_tokenizer, config)
    cache = args.code_cache or args.train_manifest.parent / "code_cache"
    with blaming(f"--code_cache {cache} cannot be made"):
        cache.mkdir(parents=True, exist_ok=True)
    clips = dataset.find_clips(entries, cache, f"{weights} {device.type}")
    heard = check_references(entries, config, args.return_audio_in_tokens)
    collator = build_collator(config, args.whisper_processor, heard)
    run = dict(base_ckpt=base, audio_tokenizer=weights, train_manifest=fingerprint([args.train_manifest]),
               lora_r=args.lora_r, lora_alpha=args.lora_alpha, seed=args.seed)
    return entries, clips, codec, tokenizer, collator, run


def load_codec(folder, device):
    """Load the codec onto `device`. Raises PipelineError where that fails, or it was never trained."""
    with blaming(f"--audio_tokenizer {folder}, or its HuBERT (bosonai/hubert_base), cannot be loaded"):
        codec = load_higgs_audio_tokenizer(str(folder), device=str(device))
    if not all(buffer.all() for name, buffer in codec.named_buffers() if name.endswith("inited")):
        raise PipelineError(f"--audio_tokenizer {folder} has codebooks that were never trained")
    return codec


def encode_clips(clips, codec, num_workers, store, show):
    """Encode `clips` together with the other ranks; a file appears whole or not at all. Refuses bad ones.

    A rank takes the next clip when it is ready, by a counter in the group's `store`: shares balance by the
    time that clips take. The bar of the rank that is to `show` counts all of them.
    """
    rate = codec.sampling_rate
    following = iter(lambda: min(store.add("clips taken", 1) - 1, len(clips)), len(clips))  # 0, 1, ...
    waves = DataLoader(clips, sampler=following, batch_size=None, num_workers=num_workers,
                       collate_fn=lambda clip: (*clip[:2], dataset.load_waveform(rate, clip[2])),
                       worker_init_fn=dataset.ignore_signals)
    problems, bar = [], tqdm(desc="encoding clips", total=len(clips), disable=not show)
    for file, entries, wave in waves:
        if isinstance(wave, str):
            problems.append((entries, wave))
            continue
        # One clip at a time: padding a batch of clips changes their codes
        codes = codec.encode(wave, rate).squeeze(0).cpu()  # (num_codebooks, T)
        unfinished = file.with_name(f"{uuid.uuid4().hex}.unfinished")
        try:
            with blaming(f"--code_cache {file.parent} cannot be written"):
                with open(unfinished, "wb") as stream:
                    np.save(stream, codes.numpy().astype(np.int16))
                unfinished.rename(file)
        except PipelineError:
            unfinished.unlink(missing_ok=True)
            store.add("clips taken", len(clips))  # let the other ranks end, too
            raise
        bar.update(store.add("clips done", 1) - bar.n)
    dataset.refuse("clips", problems)


def load_base(name, dtype, device):
    """Load the frozen HiggsAudioModel straight to `device`, never whole into CPU memory first."""
    with blaming(f"--base_ckpt {name}: its weights cannot be loaded"):
        model, info = HiggsAudioModel.from_pretrained(name, torch_dtype=dtype, device_map={"": device},
                                                      output_loading_info=True)
    if info["missing_keys"]:  # transformers would go on with random numbers in their place
        raise PipelineError(f"--base_ckpt {name} lacks the weights {sorted(info['missing_keys'])[:5]}")
    return model.requires_grad_(False)


def attach(model, r, alpha, dropout, seed):
    """Wrap `model` in LoRA, drawn from `seed`, float32 whatever the base's dtype; 280 modules as released."""
    torch.manual_seed(seed)  # and no task type: PEFT would pass `labels` to a forward that takes none
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout,
                                            target_modules=TARGET_MODULES))


def take_text_head(model):
    """Remove the text head from the forward and return it: outputs.logits become the hidden states.

    Upstream would multiply every position, most of them audio, with the whole vocabulary (128,256 columns).
    """
    projector = model.get_base_model().audio_decoder_proj
    head, projector.text_lm_head = projector.text_lm_head, torch.nn.Identity()
    return head


def build_model(args, device):
    """The base with LoRA, as `args` say, ready to train: (model, the text head that was taken out of it)."""
    bf16 = args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda")
    base = load_base(args.base_ckpt, torch.bfloat16 if bf16 else torch.float32, device)
    model = attach(base, args.lora_r, args.lora_alpha, args.lora_dropout, args.seed)
    text_head = take_text_head(model)
    for layer in base.layers if args.gradient_checkpointing else ():  # they ignore transformers' own switch
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return model.train(), text_head


def open_output(output_dir, wanted):
    """Claim the folder; find the checkpoint to resume from (`wanted`: auto, path, None)."""
    with blaming(f"--output_dir {output_dir} cannot be written, or another run is training into it"):
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(output_dir / "lock", os.O_CREAT | os.O_RDWR)  # never closed: the kernel frees it when
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # this process ends, however that happens
    found, finished = checkpoints(output_dir), (output_dir / "adapter_model.safetensors").exists()
    if wanted == "auto" and (found or not finished):
        return found[-1] if found else None
    newest = wanted and (not found or found[-1].resolve() == Path(wanted).resolve())
    if finished or found and not newest:
        raise PipelineError(f"--output_dir {output_dir} already holds an adapter or checkpoints; choose "
                            "another or, from a checkpoint, go on with --resume_from_checkpoint auto")
    return wanted and Path(wanted)


def checkpoints(output_dir):
    """The checkpoint folders in `output_dir`, oldest first."""
    found = [folder for folder in output_dir.glob("checkpoint-*") if folder.name[11:].isdecimal()]
    return sorted(found, key=lambda folder: int(folder.name[11:]))


def read_checkpoint(folder, run):
    """A checkpoint's state. Raises PipelineError where it is damaged, or another run's than `run`."""
    with blaming(f"{folder} is damaged, or no checkpoint of this trainer; remove it, and "
                 "--resume_from_checkpoint auto takes the one before"):
        if (folder / "checksum").read_text() != fingerprint(folder / name for name in CHECKPOINT):
            raise ValueError("its checksum differs")
        state = torch.load(folder / "trainer_state.pt", map_location="cpu", weights_only=True)
        before = dict(state["run"], step=state["step"], optimizer=state["optimizer"])
        state["adapter"] = load_file(folder / "adapter_model.safetensors")
    differing = [f"{key} was {before.get(key)}, is {run[key]}" for key in run if before.get(key) != run[key]]
    if differing:
        raise PipelineError(f"{folder} belongs to another run: " + "; ".join(differing))
    return state


def build_optimizer(model, args, total, state):
    """AdamW, cosine schedule and adapter at state["step"] of `total`: (parameters, optimizer, schedule)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([{"params": parameters, "initial_lr": args.lr}], lr=args.lr,
                                  weight_decay=args.weight_decay, fused=True)
    if state["step"]:  # learning rate and weight decay are the command line's
        set_peft_model_state_dict(model, state["adapter"])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
    schedule = get_cosine_schedule_with_warmup(optimizer, int(args.warmup_ratio * total), total,
                                               last_epoch=state["step"] - 1)
    return parameters, optimizer, schedule


def save_checkpoint(output_dir, model, optimizer, run, keep, step):
    """Write checkpoint-<step> whole or not at all, then remove all but the newest `keep`."""
    unfinished, whole = output_dir / "unfinished", output_dir / f"checkpoint-{step}"
    try:
        with blaming(f"{whole} cannot be written; those before it are whole: make room, and go on with "
                     "--resume_from_checkpoint auto"):
            model.save_pretrained(str(unfinished), save_embedding_layers=False)
            torch.save(dict(run=run, step=step, optimizer=optimizer.state_dict()["state"]),
                       unfinished / "trainer_state.pt")
            (unfinished / "checksum").write_text(fingerprint(unfinished / name for name in CHECKPOINT))
            os.sync()  # all of it on the disk before it has its name
            unfinished.rename(whole)
            for folder in checkpoints(output_dir)[:-keep]:
                shutil.rmtree(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def publish(checkpoint, output_dir):
    """Copy a checkpoint's adapter to where the final one belongs, each file whole or not at all."""
    with blaming(f"the adapter of {checkpoint} cannot be copied to --output_dir; make room and start again"):
        for name in CHECKPOINT[:2]:
            shutil.copy(checkpoint / name, output_dir / f"{name}.unfinished")
            os.replace(output_dir / f"{name}.unfinished", output_dir / name)


def open_board(output_dir, step):
    """TensorBoard's writer; and takes out of metrics.jsonl what a killed run had written after `step`."""
    file, kept = output_dir / "metrics.jsonl", output_dir / "metrics.unfinished"
    with blaming(f"--output_dir {output_dir} cannot be written"):
        lines = file.read_text(errors="replace").splitlines(keepends=True) if file.exists() else []
        steps = [re.match(r'{"step": (\d+), .*}\n', line) for line in lines]  # None of a torn line
        kept.write_text("".join(found[0] for found in steps if found and int(found[1]) <= step))
        kept.replace(file)
        return SummaryWriter(output_dir / "runs", purge_step=step + 1)


def report(output_dir, board, losses, metrics):
    """Add a line to metrics.jsonl and points to TensorBoard. losses: the text's, then each codebook's."""
    audio_loss = sum(codebooks := losses[1:]) / len(codebooks)
    metrics |= {"loss": losses[0] + audio_loss, "text_loss": losses[0], "audio_loss": audio_loss}
    curves = metrics | {f"codebook_{k}": loss for k, loss in enumerate(codebooks)}
    line = metrics | {"audio_loss_per_codebook": codebooks}
    with blaming(f"--output_dir {output_dir} cannot be written"):
        with open(output_dir / "metrics.jsonl", "a") as stream:
            stream.write(re.sub("-?(NaN|Infinity)", "null", json.dumps(line)) + "\n")  # JSON has neither
        for name in curves.keys() - {"step"}:
            board.add_scalar(name, curves[name], metrics["step"])
        board.flush()
