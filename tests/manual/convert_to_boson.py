"""A base and a codec in transformers' format, converted to the format that boson_multimodal reads.

    python -m tests.manual.convert_to_boson --model FOLDER --codec FOLDER --output_dir DIR
    python -m tests.manual.convert_to_boson [--transformers VERSION]

Since April 2026 the hub's main has transformers' format. boson_multimodal, and so the trainer, reads only the
revisions before that, and nobody promises that they stay. If they are deleted, the first command converts
what main has: FOLDERs as `huggingface-cli download` leaves them, of bosonai/higgs-tts-2-3b-base and of
bosonai/higgs-audio-v2-tokenizer. It writes DIR/model, DIR/codec, and DIR/huggingface, a hub cache with the
codec's HuBERT. It runs in the project's own environment, without transformers 5.

The second command shows it on a tiny checkpoint: from boson's format to transformers' and back. It installs
transformers 5 in a temporary folder for the first half, and exits with 1 where a row of its table fails.
"""

import argparse
import copy
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import librosa
import torch
from boson_multimodal.audio_processing.higgs_audio_tokenizer import (
    HiggsAudioTokenizer,
    load_higgs_audio_tokenizer,
)
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, HubertConfig, HubertModel

from tests.support import transformers5
from tests.support.bounds import OTHER_CODES, rounding_bound

# The settings below are not in transformers' configuration: they have the released files' values. Further
# settings of HiggsAudioConfig have these as defaults.
MODEL_CONSTANTS = {
    "audio_adapter_type": "dual_ffn_fast_forward",
    "encode_audio_in_tokens": True,
    "encode_whisper_embed": False,
    "skip_audio_tower": True,
    "use_delay_pattern": True,
}
CODEC_CONSTANTS = {
    "n_filters": 32,
    "target_bandwidths": [0.5, 1, 1.5, 2, 4],
    "semantic_techer": "hubert_base_general",
}  # boson_multimodal's own spelling
HUBERT_REPOSITORY = "models--bosonai--hubert_base"  # where the codec's class looks for it in the hub's cache
HUBERT = "semantic_model."  # the prefix of HuBERT's weights in both formats of the codec
SPECTRUM_MASK = "masked_spec_embed"  # only HuBERT's own training uses this weight: a file may lack it
# Nothing reads these: ids of text tokens, and the size of an audio tower that is skipped. The tiny checkpoint
# has other values than the released one.
SETTINGS_WITHOUT_USE = ("text_config.bos_token_id", "text_config.eos_token_id", "audio_encoder_config.")
NORM_TOLERANCE = rounding_bound(1)  # of a product of weight norm, relative: one float32 multiplication
TRAINING_FLAGS = ["--batch_size=3", "--grad_accum=1", "--max_steps=3", "--logging_steps=1"]


def read_settings(folder: Path, model_type: str) -> dict:
    """Return config.json of a folder in transformers' format; exit where it is of another model type."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if settings.get("model_type") != model_type:
        sys.exit(f"error: {folder} has the model type {settings.get('model_type')}, expected {model_type}")
    return settings


def special_token_ids(folder: Path) -> dict[str, int]:
    """Return the ids of the special tokens in a folder's tokenizer.json."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return {token["content"]: token["id"] for token in tokenizer["added_tokens"]}


def boson_config(settings: dict, token_ids: dict[str, int]) -> HiggsAudioConfig:
    """Return boson_multimodal's configuration of a base from transformers' settings."""
    rope = dict(settings["rope_parameters"])
    rope_theta = rope.pop("rope_theta")
    text = {
        "model_type": "llama",
        **{name: settings[name] for name in transformers5.TEXT_SETTINGS},
        "rope_theta": rope_theta,
        "rope_scaling": rope,
        "bos_token_id": token_ids["<|begin_of_text|>"],
        "eos_token_id": token_ids["<|end_of_text|>"],
    }
    return HiggsAudioConfig(
        text_config=text,
        hidden_size=settings["hidden_size"],
        audio_ffn_hidden_size=settings["hidden_size"],
        audio_ffn_intermediate_size=settings["intermediate_size"],
        audio_dual_ffn_layers=list(range(settings["num_hidden_layers"])),
        audio_codebook_size=settings["codebook_size"] - 2,  # transformers counts the marks for begin and end
        **{boson: settings[port] for port, boson in transformers5.BASE_SETTINGS.items()},
        audio_in_token_idx=token_ids["<|AUDIO|>"],
        audio_eos_token_id=token_ids["<|audio_eos|>"],
        architectures=["HiggsAudioModel"],
        torch_dtype=settings.get("dtype"),
        **MODEL_CONSTANTS,
    )


def exit_if_different(folder: Path, found: dict, expected: dict) -> None:
    """Exit where a folder's weights are not those of boson_multimodal's class; both are {name: shape}.

    The codec's own loader would be silent about them, and leave random numbers in their place.
    """
    wrong = [
        f"  {name}: is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if wrong:
        sys.exit("\n".join([f"error: {len(wrong)} weights of {folder} do not fit:", *wrong[:20]]))


def shapes_of(weights: dict[str, torch.Tensor]) -> dict[str, tuple]:
    """Return {name: shape} of {name: tensor}."""
    return {name: tuple(value.shape) for name, value in weights.items()}


def convert_model(source: Path, target: Path) -> None:
    """Write the base in `source`, in transformers' format, to the new folder `target` in boson's."""
    settings = read_settings(source, "higgs_audio_v2")
    config = boson_config(settings, special_token_ids(source))
    with torch.device("meta"):  # of a copy: a model notes its attention in the configuration that it gets
        expected = shapes_of(HiggsAudioModel(copy.deepcopy(config)).state_dict())
    boson_name = {transformers5.base_name(name): name for name in expected}
    files = sorted(source.glob("*.safetensors"))
    found = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no dict)
                found[boson_name.get(name, name)] = tuple(weights.get_slice(name).get_shape())
    exit_if_different(source, found, expected)
    config.save_pretrained(target)
    for file in files:  # one after the other: the released base has 11.5 GB
        weights = {boson_name[name]: value for name, value in load_file(file).items()}
        save_file(weights, target / file.name, metadata={"format": "pt"})
        shutil.copymode(target / "config.json", target / file.name)  # safetensors makes it 0600
    index_file = source / "model.safetensors.index.json"
    if index_file.exists():
        index = json.loads(index_file.read_text())
        index["weight_map"] = {boson_name[name]: file for name, file in index["weight_map"].items()}
        (target / index_file.name).write_text(json.dumps(index, indent=2))
    copy_tokenizer(source, target)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the text tokenizer and the licence, under the class name that transformers 4 has for it."""
    for pattern in ("tokenizer.json", "special_tokens_map.json", "LICENSE*"):
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    text = json.dumps(settings, ensure_ascii=False, indent=2)
    (target / "tokenizer_config.json").write_text(text, encoding="utf-8")


def codec_settings(settings: dict, weights: dict[str, torch.Tensor]) -> dict:
    """Return config.json of boson_multimodal's codec from transformers' settings and weights."""
    codebooks = [value for name, value in weights.items() if name.endswith(".codebook.embed")]
    acoustic = settings["acoustic_model_config"]
    return {
        **CODEC_CONSTANTS,
        "D": acoustic["hidden_size"],
        "ratios": acoustic["downsampling_ratios"],
        "codebook_dim": settings["codebook_dim"],
        "sample_rate": settings["sample_rate"],
        "bins": len(codebooks[0]),
        "n_q": len(codebooks),
    }


def hubert_config(settings: dict, weights: dict[str, torch.Tensor]) -> HubertConfig:
    """Return the configuration of the codec's HuBERT for transformers 4."""
    known = HubertConfig().to_dict().keys()
    config = HubertConfig(**{key: settings[key] for key in known & settings.keys()})
    config.mask_time_prob = 0.05 if HUBERT + SPECTRUM_MASK in weights else 0.0
    config.mask_feature_prob = 0.0
    return config


def codec_shapes(settings: dict, hubert: HubertConfig) -> dict[str, tuple]:
    """Return {name: shape} of the weights of boson_multimodal's codec, without making or fetching them."""

    def empty_hubert(*_, **__):  # the codec's class asks the hub for HuBERT
        return HubertModel(hubert)

    warnings.filterwarnings("ignore", message=".*weight_norm", category=FutureWarning)
    with torch.device("meta"), mock.patch.object(AutoModel, "from_pretrained", empty_hubert):
        return shapes_of(HiggsAudioTokenizer(**settings, device="meta").state_dict())


def with_weight_norm(weights: dict[str, torch.Tensor], names) -> dict[str, torch.Tensor]:
    """Return the weights under `names`, where some ask for a weight as length and direction.

    A weight is its own direction (weight_v), and its norm is the length (weight_g). The class computes
    weight_v * (weight_g / norm(weight_v)): the factor is 1 but for rounding, the product is the weight.
    """
    split = {}
    for name in names:
        if name.endswith(".weight_g"):
            split[name] = torch.norm_except_dim(weights[name.removesuffix("_g")], 2, 0)
        elif name.endswith(".weight_v"):
            split[name] = weights[name.removesuffix("_v")]
        else:
            split[name] = weights[name]
    return split


def convert_codec(source: Path, target: Path, hub: Path) -> None:
    """Write the codec in `source` to the new folder `target` in boson's format.

    boson's class asks the hub for a HuBERT before it loads its own weights: `hub` becomes a cache with one.
    """
    settings = read_settings(source, "higgs_audio_v2_tokenizer")
    weights = {}
    for file in sorted(source.glob("*.safetensors")):
        weights |= load_file(file)
    boson_settings = codec_settings(settings, weights)
    hubert = hubert_config(settings["semantic_model_config"], weights)
    shapes = codec_shapes(boson_settings, hubert)
    expected = {
        name.removesuffix("_v") if name.endswith(".weight_v") else name: shape
        for name, shape in shapes.items()
        if not name.endswith(".weight_g")
    }
    parts = transformers5.codec_parts(len(boson_settings["ratios"]))
    boson_name = {transformers5.codec_name(name, parts): name for name in expected}
    weights = {boson_name.get(name, name): value for name, value in weights.items()}
    exit_if_different(source, shapes_of(weights), expected)
    weights = with_weight_norm(weights, shapes)
    target.mkdir()
    (target / "config.json").write_text(json.dumps(boson_settings, indent=2))
    torch.save(weights, target / "model.pth")
    write_hubert(hubert, weights, hub)


def write_hubert(config: HubertConfig, weights: dict[str, torch.Tensor], hub: Path) -> None:
    """Write the codec's HuBERT as the hub's cache in the folder `hub` would have it."""
    model = HubertModel(config)
    model.load_state_dict(
        {name.removeprefix(HUBERT): value for name, value in weights.items() if name.startswith(HUBERT)}
    )
    repository = hub / "hub" / HUBERT_REPOSITORY
    model.save_pretrained(repository / "snapshots" / "converted")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("converted")


def convert(model: Path, codec: Path, output_dir: Path) -> None:
    """Convert a base and a codec to boson_multimodal's format, and say how to train on them."""
    if output_dir.exists():
        sys.exit(f"error: --output_dir {output_dir} is there already; choose another")
    output_dir.mkdir(parents=True)
    convert_model(model, output_dir / "model")
    convert_codec(codec, output_dir / "codec", output_dir / "huggingface")
    print(
        f"train with --base_ckpt {output_dir}/model --audio_tokenizer {output_dir}/codec\n"
        f"and, where the hub has no bosonai/hubert_base, with HF_HOME={output_dir.absolute()}/huggingface"
    )


def write_codes(codec: str, clips: str, file: str) -> None:
    """Save a codec's codes of all clips in a folder, a list of (num_codebooks, T).

    It runs in a process of its own: the folder of the HuBERT is read once, when Python starts.
    """
    tokenizer = load_higgs_audio_tokenizer(codec, device="cpu")
    codes = []
    for clip in sorted(Path(clips).glob("*.wav")):
        wave, rate = librosa.load(clip, sr=tokenizer.sampling_rate)
        codes.append(tokenizer.encode(wave, rate).squeeze(0))
    torch.save(codes, file)


def count_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> int:
    """Return how many of the expected weights are found with the same type and the same bits."""
    same = [
        name in found and found[name].dtype == value.dtype and torch.equal(found[name], value)
        for name, value in expected.items()
    ]
    return sum(same)


def check_model(tiny: Path, back: Path):
    """Yield the row of the base's weights."""
    expected, found = (load_file(folder / "model/model.safetensors") for folder in (tiny, back))
    equal = count_equal(found, expected)
    passed = found.keys() == expected.keys() and equal == len(expected)
    yield "Model", passed, f"{equal} of {len(expected)} weights bit-equal there and back"


def settings_of(folder: Path) -> dict:
    """Return the settings that boson_multimodal reads of a base, {name: value}, the nested ones as `a.b`."""
    flat = {}
    for name, value in HiggsAudioConfig.from_pretrained(folder).to_dict().items():
        nested = value if name in ("text_config", "audio_encoder_config") else None
        flat |= {f"{name}.{key}": item for key, item in nested.items()} if nested else {name: value}
    return {name: value for name, value in flat.items() if not name.startswith(SETTINGS_WITHOUT_USE)}


def check_settings(tiny: Path, back: Path):
    """Yield the row of both config.json: the settings that differ are named."""
    expected, found = settings_of(tiny / "model"), settings_of(back / "model")
    expected["codec"], found["codec"] = (
        json.loads((folder / "codec/config.json").read_text()) for folder in (tiny, back)
    )
    names = expected.keys() | found.keys()
    wrong = sorted(name for name in names if expected.get(name) != found.get(name))
    told = f"{len(names) - len(wrong)} of {len(names)} settings equal"
    yield "Settings", not wrong, ", not ".join([told, *wrong])


def check_codec(tiny: Path, back: Path):
    """Yield the row of the codec's weights: pairs of weight norm are compared by their products."""
    expected, found = (
        {name: value.float() for name, value in torch.load(folder / "codec/model.pth").items()}
        for folder in (tiny, back)
    )
    same_names = expected.keys() == found.keys()
    whole = {name: value for name, value in expected.items() if not name.endswith(("_g", "_v"))}
    equal, errors = count_equal(found, whole), []
    for name in expected.keys() & found.keys():
        if name.endswith(".weight_g"):
            direction = name.removesuffix("_g") + "_v"
            product = torch._weight_norm(expected[direction], expected[name], 0)
            again = torch._weight_norm(found[direction], found[name], 0)
            errors.append(((again - product).norm() / product.norm()).item())
    passed = same_names and equal == len(whole) and max(errors) < NORM_TOLERANCE
    yield (
        "Codec",
        passed,
        (
            f"{equal} of {len(whole)} weights bit-equal; {len(errors)} products of weight norm "
            f"equal to {max(errors):.1e} (relative norm)"
        ),
    )


def check_codes(tiny: Path, back: Path):
    """Yield the row of the clips' codes, each codec with its own HuBERT.

    The codecs' weights differ by rounding. Where two entries of a codebook are equally near, that can choose
    the other one, and by its rest other codes of the same frame: a hundredth of all codes may differ.
    """
    codes = []
    for folder in (tiny, back):
        file = folder / "codes.pt"
        transformers5.run(
            "-m",
            "tests.manual.convert_to_boson",
            "codes",
            folder / "codec",
            tiny / "clips",
            file,
            hub=folder / "huggingface",
        )
        codes.append(torch.load(file))
    expected, found = (torch.cat(clips, dim=1) for clips in codes)  # (num_codebooks, frames)
    same_shape, numbers = found.shape == expected.shape, expected.numel()
    equal = (found == expected).sum().item() if same_shape else 0
    yield "Codes", equal >= 0.99 * numbers > 0, f"{equal} of {numbers} codes equal"


def train(data: Path, checkpoint: Path) -> list[float]:
    """Train a few steps on a base and a codec in `checkpoint`; returns the loss of each step."""
    output = checkpoint / "trained"
    transformers5.run(
        "trainer.py",
        "--train_manifest",
        data / "train.json",
        "--base_ckpt",
        checkpoint / "model",
        "--audio_tokenizer",
        checkpoint / "codec",
        "--code_cache",
        checkpoint / "code_cache",
        "--output_dir",
        output,
        *TRAINING_FLAGS,
        hub=checkpoint / "huggingface",
    )
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def check_training(tiny: Path, back: Path):
    """Yield the row of training on the original and on the converted checkpoint.

    The first losses differ where codes do, of which a hundredth may (check_codes).
    """
    expected, found = train(tiny, tiny), train(tiny, back)
    yield (
        "Training",
        abs(found[0] - expected[0]) < OTHER_CODES,
        (f"{len(found)} steps, exit code 0; first loss {found[0]:.6f}, on the original {expected[0]:.6f}"),
    )


def check_refusal(tiny: Path, back: Path):
    """Yield the row of a base that lacks a weight: it must be refused by the weight's name."""
    shutil.copytree(tiny / "transformers5", back / "incomplete", ignore=shutil.ignore_patterns("codec"))
    file = back / "incomplete/model.safetensors"
    weights = load_file(file)
    del weights["text_lm_head.weight"]  # transformers itself runs without it
    save_file(weights, file)
    said = ""
    try:
        convert_model(back / "incomplete", back / "unwanted")
    except SystemExit as error:
        said = str(error)
    passed = "audio_decoder_proj.text_lm_head.weight: is missing" in said and not (back / "unwanted").exists()
    yield "A base without its text head", passed, "refused by that name" if passed else f"says {said!r}"


def demonstrate(version: str) -> None:
    """Convert a tiny checkpoint to transformers' format and back, and print the table."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # float32 on a CPU in every process
    with tempfile.TemporaryDirectory() as work:
        packages, tiny, back = (Path(work) / name for name in ("packages", "tiny", "back"))
        transformers5.install(version, packages)
        transformers5.run("-m", "tests.support.tiny_checkpoint", tiny, hub=tiny / "huggingface")
        transformers5.run_beside(packages, "tests.support.transformers5", tiny)
        port = tiny / "transformers5"
        transformers5.run(
            "-m",
            "tests.manual.convert_to_boson",
            "--model",
            port,
            "--codec",
            port / "codec",
            "--output_dir",
            back,
            hub=work,
        )
        print(f"a tiny checkpoint in the format of transformers {version}, and back in boson's:", flush=True)
        failed = []
        for check in (check_model, check_settings, check_codec, check_codes, check_training, check_refusal):
            failed += transformers5.print_rows(check(tiny, back))
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with the base in transformers' format")
    parser.add_argument("--codec", type=Path, help="a folder with the codec in transformers' format")
    parser.add_argument("--output_dir", type=Path, help="a new folder")
    parser.add_argument("--transformers", default=transformers5.DEFAULT_VERSION, metavar="VERSION")
    args = parser.parse_args()
    paths = [args.model, args.codec, args.output_dir]
    if all(paths):
        convert(*paths)
    elif any(paths):
        parser.error("give --model, --codec and --output_dir together, or none of them")
    else:
        demonstrate(args.transformers)


if __name__ == "__main__":
    if sys.argv[1:2] == ["codes"]:
        write_codes(*sys.argv[2:])
    else:
        main()
