"""A tiny checkpoint of the real classes, a tiny codec, speech-like clips and an Arabic manifest over them.

    HF_HOME=DIR/huggingface python tests/support/tiny_checkpoint.py DIR

writes DIR/model (HiggsAudioModel, config and text tokenizer), DIR/codec (HiggsAudioTokenizer), the HuBERT
that the codec's class asks the hub for (DIR/huggingface, laid out as the hub's cache), DIR/clips and
DIR/train.json.
Everything is seeded. HF_HOME must be set when Python starts: huggingface_hub reads it once.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from boson_multimodal.audio_processing.higgs_audio_tokenizer import HiggsAudioTokenizer
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import HubertConfig, HubertModel, PreTrainedTokenizerFast

SAMPLE_RATE = 24_000
NAMES = """
    begin_of_text end_of_text finetune_right_pad_id start_header_id end_header_id eom_id eot_id python_tag
    audio_bos audio_eos audio_out_bos AUDIO AUDIO_OUT recipient scene_desc_start scene_desc_end
    generation_instruction_start generation_instruction_end"""
SPECIAL_TOKENS = [f"<|{name}|>" for name in NAMES.split()]
SPECIAL_TOKENS += ["<SE>", "</SE>", "<SE_s>", "</SE_s>", "<SE_e>", "</SE_e>"]
SYSTEM = "Generate speech in the voice of the reference audio."
TEXTS = ("صباح الخير يا صديقي", "أين تقع المكتبة؟")


def make_tokenizer(folder):
    """Byte-level BPE without merges: every text is its UTF-8 bytes, every special token one id."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
    )
    fast.save_pretrained(folder)
    return fast


def make_config(tokenizer, hidden=256, layers=2, vocab_size=None, **overrides):
    """The released config's flags at another size; `overrides` replace any of them."""
    token = tokenizer.convert_tokens_to_ids
    settings = dict(
        text_config=dict(
            model_type="llama",
            vocab_size=vocab_size or len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 64,
            head_dim=32,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            rope_scaling=dict(
                rope_type="llama3",
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
        ),
        audio_encoder_config=dict(
            model_type="higgs_audio_encoder",
            d_model=64,
            encoder_layers=2,
            num_mel_bins=128,
            encoder_attention_heads=2,
            encoder_ffn_dim=128,
        ),
        hidden_size=hidden,
        audio_ffn_hidden_size=hidden,
        audio_ffn_intermediate_size=2 * hidden,
        audio_adapter_type="dual_ffn_fast_forward",
        audio_dual_ffn_layers=list(range(layers)),
        use_delay_pattern=True,
        audio_num_codebooks=8,
        audio_codebook_size=1024,
        audio_stream_bos_id=1024,
        audio_stream_eos_id=1025,
        encode_audio_in_tokens=True,
        encode_whisper_embed=False,
        skip_audio_tower=True,
        audio_in_token_idx=token("<|AUDIO|>"),
        audio_out_token_idx=token("<|AUDIO_OUT|>"),
        audio_out_bos_token_id=token("<|audio_out_bos|>"),
        audio_eos_token_id=token("<|audio_eos|>"),
        pad_token_id=token("<|end_of_text|>"),
    )
    return HiggsAudioConfig(**{**settings, **overrides})


def released_config():
    """The shape of bosonai/higgs-audio-v2-generation-3B-base: 28 layers of 3072, 5,771,283,456 parameters."""
    text = dict(
        model_type="llama",
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        head_dim=128,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
    )
    return HiggsAudioConfig(
        text_config=text,
        hidden_size=3072,
        audio_adapter_type="dual_ffn_fast_forward",
        audio_dual_ffn_layers=list(range(28)),
        audio_num_codebooks=8,
        use_delay_pattern=True,
        skip_audio_tower=True,
        encode_whisper_embed=False,
        encode_audio_in_tokens=True,
    )


def make_model(folder, seed=0, **config):
    """A random HiggsAudioModel with its text tokenizer, its heads drawn with std 3/sqrt(hidden).

    With the default initialisation (std 0.02) a frozen head's logits span too little for any adapter to reach
    a small loss; with a hidden size under 256 the eight codebooks' rows get into each other's way.
    """
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(seed)
    model = HiggsAudioModel(make_config(tokenizer, **config))
    for head in (model.audio_decoder_proj.text_lm_head, model.audio_decoder_proj.audio_lm_head):
        torch.nn.init.normal_(head.weight, std=3 / head.in_features**0.5)
    model.save_pretrained(folder)


def make_hubert(hub):
    """The semantic teacher, as wide as the codec asks but one layer, where AutoModel finds it offline."""
    config = HubertConfig(
        hidden_size=768,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(32,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    repo = hub / "models--bosonai--hubert_base"
    HubertModel(config).save_pretrained(repo / "snapshots" / "tiny")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("tiny")


def make_codec(folder, seed=0, n_q=8, bins=1024):
    """The real codec class, 24 kHz, 25 frames/s; its codebooks come from 8 s of speech-like sound.

    Four strides, not the released codec's five: 74 million weights, not 108, and encoding takes half as long.
    """
    config = dict(
        n_filters=32,
        D=64,
        codebook_dim=32,
        target_bandwidths=[0.5, 1, 1.5, 2, 4],
        ratios=[10, 6, 4, 4],
        sample_rate=SAMPLE_RATE,
        bins=bins,
        n_q=n_q,
        semantic_techer="hubert_base_general",
    )
    torch.manual_seed(seed)
    codec = HiggsAudioTokenizer(**config, device="cpu").eval()
    for layer in codec.quantizer.vq.layers:
        layer._codebook.kmeans_iters = 1  # the default is 50: a random codec gains nothing by more
    codec.encode(speech_like(8.0, seed=99), SAMPLE_RATE)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    # Its weights are hashed and read at each start: half as long in float16, which boson's
    # loader copies into a float32 codec
    torch.save({name: tensor.half() for name, tensor in codec.state_dict().items()}, folder / "model.pth")


def speech_like(seconds, seed, sample_rate=SAMPLE_RATE):
    """A gliding voice with formants that change four times a second, and some breath: float32 (samples,)."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * sample_rate)) / sample_rate
    pitch = rng.uniform(90, 250) * 2 ** (0.3 * np.sin(2 * np.pi * rng.uniform(0.5, 2) * t))
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
    syllable = (t * 4).astype(int)
    formants = rng.uniform(300, 3000, size=(syllable.max() + 1, 2))[syllable]  # (samples, 2), Hz
    voice = sum(
        np.sin(k * phase) * np.exp(-(((k * pitch[:, None] - formants) / 250) ** 2)).sum(1)
        for k in range(1, 20)
    )
    wave = voice * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * t)) + 0.02 * rng.standard_normal(len(t))
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


def voice_cloning_entry(text, reference, target):
    """One sample in the README's layout: the user's turn has the reference, the assistant's the target."""
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {
                "role": "user",
                "content": [{"type": "audio", "audio_url": reference}, {"type": "text", "text": text}],
            },
            {"role": "assistant", "content": [{"type": "audio", "audio_url": target}]},
        ]
    }


def make_clips(folder):
    """Two voices, three targets; two entries share their text: only the reference tells them apart."""
    (folder / "clips").mkdir()
    lengths = {"voice_a": 0.8, "voice_b": 1.0, "target_a": 1.2, "target_b": 1.04, "target_c": 0.96}
    for seed, (name, seconds) in enumerate(lengths.items()):
        rate = 44_100 if name == "voice_b" else SAMPLE_RATE
        soundfile.write(folder / "clips" / f"{name}.wav", speech_like(seconds, seed, rate), rate)
    entries = [
        voice_cloning_entry(TEXTS[0], "clips/voice_a.wav", "clips/target_a.wav"),
        voice_cloning_entry(TEXTS[0], "clips/voice_b.wav", "clips/target_b.wav"),
        voice_cloning_entry(TEXTS[1], "clips/voice_a.wav", "clips/target_c.wav"),
    ]
    (folder / "train.json").write_text(json.dumps(entries, ensure_ascii=False, indent=2), encoding="utf-8")


def make_everything(folder):
    """Write model, codec, HuBERT, clips and manifest below `folder` (HF_HOME must be folder/huggingface)."""
    make_model(folder / "model")
    make_hubert(Path(os.environ["HF_HOME"]) / "hub")
    make_codec(folder / "codec")
    make_clips(folder)


if __name__ == "__main__":
    make_everything(Path(sys.argv[1]).resolve())
