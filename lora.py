"""The model's side: open base and codec, put LoRA on the DualFFN projections, make it ready to train, merge.

    python lora.py merge --base_ckpt bosonai/higgs-audio-v2-generation-3B-base --adapter out --output_dir new

The adapter is plain PEFT: PeftModel.from_pretrained(HiggsAudioModel.from_pretrained(base), folder) loads it.
"""

import argparse
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
import uuid
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from boson_multimodal.audio_processing.higgs_audio_tokenizer import load_higgs_audio_tokenizer
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioSampleCollator
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoProcessor, AutoTokenizer, PretrainedConfig, get_cosine_schedule_with_warmup

import dataset
from dataset import PipelineError, blaming

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # DataLoader workers are forks: tokenizers warns of each
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


def local(name):
    """The folder `name`, or the copy of the hub's repository of that name, downloaded where need be."""
    return Path(name if os.path.exists(name) else snapshot_download(name))


def open_base(name):
    """A base checkpoint's (config, text tokenizer, fingerprint). PipelineError where there is none."""
    with blaming(f"--base_ckpt {name}: no Higgs Audio checkpoint there"):
        settings, _ = PretrainedConfig.get_config_dict(name)
        if settings.get("model_type") != "higgs_audio":
            raise PipelineError(f"--base_ckpt {name} is {settings.get('model_type')}, not higgs_audio")
        weights = fingerprint([(folder := local(name)) / "config.json", *folder.glob("*.safetensors")])
        return HiggsAudioConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name), weights


def open_codec(name, config):
    """Find the codec: (folder, fingerprint). Raises PipelineError where there is none or it does not fit."""
    with blaming(f"--audio_tokenizer {name}: no codec there"):
        folder = local(name)
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


def take_text_head(base):
    """Remove the text head from the forward and return it: outputs.logits become the hidden states.

    Upstream would multiply every position, most of them audio, with the whole vocabulary (128,256 columns).
    """
    projector = base.audio_decoder_proj
    head, projector.text_lm_head = projector.text_lm_head, torch.nn.Identity()
    return head


def base_dtype(args, device):
    """What the frozen base is held and computed in; the adapter is float32 in both."""
    bf16 = args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def build_model(args, device):
    """The base with LoRA, as `args` say, ready to train: (model, the text head that was taken out of it)."""
    base = load_base(args.base_ckpt, base_dtype(args, device), device)
    text_head = take_text_head(base)
    model = attach(base, args.lora_r, args.lora_alpha, args.lora_dropout, args.seed)
    for module in model.modules():
        if isinstance(module, LoraLayer):  # autocast gives lora_A bfloat16: no float32 copies of its inputs
            module.cast_input_dtype_enabled = False
    for layer in base.layers if args.gradient_checkpointing else ():  # they ignore transformers' own switch
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return model.train(), text_head


def forward(model, batch, text_head):
    """(outputs, batch) on the text head's device; a bfloat16 base computes float32 adapters in bfloat16."""
    device, bf16 = text_head.weight.device, text_head.weight.dtype == torch.bfloat16
    batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return model(**batch), batch


def distribute(model):
    """`model` under DDP, with rank 0's adapter: DDP itself would send the whole frozen base (init_sync)."""
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        dist.broadcast(parameter.data, src=0)
    return DDP(model, broadcast_buffers=False, init_sync=False, gradient_as_bucket_view=True)


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


def load_adapter(base, name):
    """`base` with adapter `name` on it. PipelineError where that is damaged, or of another base or rank."""
    with blaming(f"--adapter {name}: no LoRA adapter there, or a damaged one"):
        folder = local(name)
        tensors = load_file(folder / "adapter_model.safetensors")
        model = PeftModel(base, LoraConfig.from_pretrained(folder)).eval()
    found, expected = ({name: tuple(tensor.shape) for name, tensor in state.items()}
                       for state in (tensors, get_peft_model_state_dict(model)))
    differing = [f"{key} is {found.get(key, 'missing')}, expected {expected.get(key, 'none')}"
                 for key in sorted(found.keys() | expected.keys()) if found.get(key) != expected.get(key)]
    if differing:
        raise PipelineError(f"--adapter {name} does not fit the base: {differing[0]}; {len(differing)} such")
    if broken := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise PipelineError(f"--adapter {name} holds numbers that are not finite, in {broken[0]}")
    set_peft_model_state_dict(model, tensors)
    return model


def merge(base_ckpt, adapter, output_dir, dtype):
    """Write base and adapter as one checkpoint like the base's own, whole or not at all. dtype None: its own.

    Memory: one copy of the model and one shard. PEFT adds a float32 product to each weight: rounded once.
    """
    own = open_base(base_ckpt)[0].torch_dtype or torch.float32
    dtype = getattr(torch, dtype) if dtype else own
    if output_dir.exists():
        raise PipelineError(f"--output_dir {output_dir} is there already; choose another, or remove it")
    base = load_base(base_ckpt, torch.promote_types(own, dtype), "cpu")
    model = load_adapter(base, adapter).merge_and_unload().to(dtype)
    with (blaming(f"--output_dir {output_dir} cannot be written"),
          tempfile.TemporaryDirectory(dir=output_dir.absolute().parent, prefix="unfinished_") as folder):
        model.save_pretrained(unfinished := Path(folder) / "merged")
        for file in filter(Path.is_file, local(base_ckpt).iterdir()):  # tokenizer, licence and the like
            weights = file.name.endswith((".safetensors", ".bin", ".pth", ".index.json"))
            if not weights and not (unfinished / file.name).exists():
                shutil.copyfile(file, unfinished / file.name)
        unfinished.rename(output_dir)
    print(f"{output_dir}: base and adapter as one checkpoint in {dtype}; load it as you load the base")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    command = parser.add_subparsers(required=True, metavar="merge").add_parser("merge")
    command.add_argument("--base_ckpt", required=True, help="the base that the adapter was trained on")
    command.add_argument("--adapter", required=True, help="trainer.py's --output_dir, or a checkpoint in it")
    command.add_argument("--output_dir", type=Path, required=True, help="a new folder for the whole model")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the base's")
    try:
        merge(**vars(parser.parse_args()))
    except PipelineError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
