"""transformers 5 beside ours: its packages in a folder of their own, and our checkpoints in its format.

boson_multimodal needs transformers before 4.47; HiggsAudioV2ForConditionalGeneration, the port of its model,
came with 5.3. So one half of a test runs in another process, with the folder that `install` filled before
our packages. The hub's main has had the port's format since April 2026; the tiny checkpoint is in boson's
own, as training needs it: `convert`, which runs in that half, writes what the hub would give.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_VERSION = "5.24.0"
DELAY_TOKEN = "</SE_e>"  # the released <|reserved_special_token_6|> is not among the tiny tokenizer's

# The parts of a base, and of a residual unit of the codec, as the port names them
BASE_PARTS = {
    "audio_codebook_embeddings": "model.embed_audio_tokens.embed_audio_tokens",
    "embed_tokens": "model.embed_tokens",
    "layers": "model.layers",
    "norm": "model.norm",
}
RESIDUAL_UNIT = ("snake1", "conv1", "snake2", "conv2")
TEXT_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
)
# Settings of a base that are the same numbers in both formats, {the port's name: boson's}
BASE_SETTINGS = {
    "num_codebooks": "audio_num_codebooks",
    "audio_token_id": "audio_out_token_idx",
    "audio_bos_token_id": "audio_out_bos_token_id",
    "audio_stream_bos_id": "audio_stream_bos_id",
    "audio_stream_eos_id": "audio_stream_eos_id",
    "pad_token_id": "pad_token_id",
}

# Stands in for the template that comes with the hub's base, out of reach here: like that one it leaves out
# the reference of a user's turn
STOCK_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% elif m.role == 'assistant' %}"
    "<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>{% endif %}{% endfor %}<|eot_id|>{% endfor %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|>"
)


def install(version, folder):
    """Put transformers `version` and what it requires into `folder`; torch, peft and the rest stay ours."""
    numpy = importlib.metadata.version("numpy")  # compiled packages that stay ours are built for this one
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--target",
        str(folder),
        f"transformers=={version}",
        f"numpy=={numpy}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\nFAILED: cannot install transformers {version}; is a registry in reach?")


def run(*command, hub):
    """Run a command as a user would, with the HuBERT in the folder `hub`; shown where it fails."""
    environment = os.environ | {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"FAILED: {' '.join(command)}\n{done.stdout}\n{done.stderr}")


def run_beside(folder, module, *arguments):
    """Run a module of tests with the packages in `folder` before ours; its failure is ours."""
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment)
    if done.returncode:
        sys.exit(done.returncode)


def print_rows(rows):
    """Print (name, passed, figure) rows; returns the names of those that failed."""
    failed = []
    for name, passed, figure in rows:
        print(f"{'pass' if passed else 'FAIL'}  {name}: {figure}", flush=True)
        if not passed:
            failed.append(name)
    return failed


def base_name(name):
    """The port's name of a weight of HiggsAudioModel."""
    part, rest = name.split(".", 1)
    if part == "audio_decoder_proj":  # its two heads are the port's own
        return rest
    return f"{BASE_PARTS[part]}.{rest}"


def base_config(settings, delay_token_id, eos_token_id):
    """The port's configuration from boson_multimodal's config.json."""
    from transformers import HiggsAudioV2Config

    text = settings["text_config"]
    return HiggsAudioV2Config(
        **{name: text[name] for name in TEXT_SETTINGS},
        **{port: settings[boson] for port, boson in BASE_SETTINGS.items()},
        rope_parameters={**text["rope_scaling"], "rope_theta": text["rope_theta"]},
        codebook_size=settings["audio_codebook_size"] + 2,  # the port counts the marks for begin and end
        audio_delay_token_id=delay_token_id,
        eos_token_id=eos_token_id,
    )


def open_base(folder):
    """(the port's model with both heads, tokenizer) of a base in boson's format."""
    from transformers import HiggsAudioV2ForConditionalGeneration, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    delay, eos = tokenizer.convert_tokens_to_ids([DELAY_TOKEN, "<|eot_id|>"])
    config = base_config(json.loads((folder / "config.json").read_text()), delay, eos)
    model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True).eval()
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({base_name(name): value for name, value in weights.items()})  # strict
    return model, tokenizer


def codec_parts(layers):
    """{a part of boson's acoustic encoder or decoder: the port's name of it}; `layers` change the rate."""
    parts = {"fc_prior": "fc", "fc_post1": "fc1", "fc_post2": "fc2"}
    for boson, port in (("encoder.block", "acoustic_encoder"), ("decoder_2.model", "acoustic_decoder")):
        parts[f"{boson}.0"] = f"{port}.conv1"
        parts[f"{boson}.{layers + 1}"] = f"{port}.snake1"
        parts[f"{boson}.{layers + 2}"] = f"{port}.conv2"
    for layer in range(layers):
        encoder, decoder = f"encoder.block.{layer + 1}.block", f"decoder_2.model.{layer + 1}.block"
        port_encoder, port_decoder = f"acoustic_encoder.block.{layer}", f"acoustic_decoder.block.{layer}"
        parts[f"{encoder}.3"], parts[f"{encoder}.4"] = f"{port_encoder}.snake1", f"{port_encoder}.conv1"
        parts[f"{decoder}.0"], parts[f"{decoder}.1"] = f"{port_decoder}.snake1", f"{port_decoder}.conv_t1"
        for unit in range(3):  # they come first in the encoder, and last in the decoder
            for place, name in enumerate(RESIDUAL_UNIT):
                parts[f"{encoder}.{unit}.block.{place}"] = f"{port_encoder}.res_unit{unit + 1}.{name}"
                parts[f"{decoder}.{unit + 2}.block.{place}"] = f"{port_decoder}.res_unit{unit + 1}.{name}"
    return parts


def codec_name(name, parts):
    """The port's name of a weight of HiggsAudioTokenizer."""
    for boson, port in parts.items():
        if name.startswith(boson + "."):
            return port + name[len(boson) :]
    name = name.replace("quantizer.vq.layers.", "quantizer.quantizers.").replace("._codebook.", ".codebook.")
    return re.sub(r"\.(conv[12]?)\.conv\.", r".\1.", name)  # of the semantic encoder and decoder


def without_weight_norm(weights):
    """Weights of a codec with each pair of length (weight_g) and direction (weight_v) multiplied out."""
    merged = {}
    for name, value in weights.items():
        if name.endswith(".weight_g"):
            direction = weights[name.replace(".weight_g", ".weight_v")]  # (out, in, kernel)
            merged[name.removesuffix("_g")] = torch._weight_norm(direction, value, 0)  # as its class does
        elif not name.endswith(".weight_v"):
            merged[name] = value
    return merged


def open_codec(folder, hubert):
    """The port's codec from boson's; `hubert` is the folder of its semantic teacher."""
    from transformers import DacConfig, HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel, HubertConfig

    settings = json.loads((folder / "config.json").read_text())
    ratios = settings["ratios"]
    acoustic = DacConfig(
        encoder_hidden_size=64,
        decoder_hidden_size=1024,
        hidden_size=settings["D"],
        downsampling_ratios=ratios,
        upsampling_ratios=ratios,
    )
    config = HiggsAudioV2TokenizerConfig(
        target_bandwidths=[0.5, 1, 1.5, 2],
        codebook_dim=settings["codebook_dim"],  # 2 kbps: 8 codebooks
        acoustic_model_config=acoustic,
        semantic_model_config=HubertConfig.from_pretrained(hubert),
    )
    codec = HiggsAudioV2TokenizerModel(config).eval()
    parts = codec_parts(len(ratios))
    halves = torch.load(folder / "model.pth", map_location="cpu")  # float16
    weights = without_weight_norm({name: value.float() for name, value in halves.items()})
    codec.load_state_dict({codec_name(name, parts): value for name, value in weights.items()})  # strict
    return codec


def convert(folder):
    """Write the base and the codec of a tiny checkpoint to folder/transformers5, with their processor."""
    from transformers import DacFeatureExtractor, HiggsAudioV2Processor

    target = folder / "transformers5"
    model, tokenizer = open_base(folder / "model")
    model.save_pretrained(target)
    hubert = folder / "huggingface/hub/models--bosonai--hubert_base/snapshots/tiny"
    codec = open_codec(folder / "codec", hubert)
    codec.save_pretrained(target / "codec")
    codec.name_or_path = str(target / "codec")  # where the processor will look for it
    sound = DacFeatureExtractor(sampling_rate=24_000, hop_length=1, return_attention_mask=True)
    processor = HiggsAudioV2Processor(
        sound, tokenizer, codec, chat_template=STOCK_TEMPLATE, audio_delay_token=DELAY_TOKEN
    )
    processor.save_pretrained(target)


if __name__ == "__main__":
    from transformers.utils import logging

    logging.disable_progress_bar()
    convert(Path(sys.argv[1]).resolve())
