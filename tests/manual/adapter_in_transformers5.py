"""One adapter, heard in two engines: boson_multimodal's, where it was trained, and transformers 5's.

    python -m tests.manual.adapter_in_transformers5 [DIR] [--transformers VERSION]

DIR is what `validate_pipeline.py --keep DIR` left; DIR/transformers5 is added to it. Without it a tiny
checkpoint is made and an adapter trained first. Then speak_in_transformers5.py, to which the README sends
people, speaks each entry, and merges. A second adapter, trained on replies of a text and then a clip,
speaks, too. The last rows make a mistake in the script on purpose, which must show. Exit code 1 where a row
fails. Two other processes do the work, in a folder where `tiny` is DIR: "boson" with boson_multimodal, "port"
with transformers 5 (tests/support/transformers5.py).
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import soundfile
import torch
from safetensors.torch import load_file

from tests.support import transformers5
from tests.support.bounds import TINY, rounding_bound
from tests.support.transformers5 import print_rows, run

ROOT = transformers5.ROOT
BOS, EOS = 1024, 1025  # audio_stream_bos_id, audio_stream_eos_id
FRAME_RATE = 25
# Of a logit, which is at most the product of two norms: of a hidden state, 256 numbers of about 1, and of a
# head's row, 3 (tiny_checkpoint.make_model)
TOLERANCE = rounding_bound(**TINY, scale=16 * 3)
SCRIPT = (ROOT / "tests/manual/speak_in_transformers5.py").read_text(encoding="utf-8")
# Entry 0, as the script has it
REFERENCE, TEXT = "tiny/clips/voice_a.wav", "صباح الخير يا صديقي"
OTHER_LAYOUT = {
    "messages": [
        {"role": "user", "content": "أين تقع المكتبة؟"},
        {"role": "assistant", "content": [{"type": "audio", "audio_url": "tiny/clips/voice_b.wav"}]},
        {"role": "user", "content": "صباح الخير يا صديقي"},
        {"role": "assistant", "content": [{"type": "audio", "audio_url": "tiny/clips/target_a.wav"}]},
    ]
}


def make_tiny(folder):
    """A tiny checkpoint in `folder`, and in folder/out an adapter that knows its three entries by heart."""
    hub = folder / "huggingface"
    folder.mkdir()
    run("-m", "tests.support.tiny_checkpoint", folder, hub=hub)
    train(folder, folder / "train.json", folder / "out", steps=80)


def train(folder, manifest, output_dir, steps):
    """Train an adapter on the tiny checkpoint in `folder` until it knows three entries by heart."""
    paths = [
        f"--train_manifest={manifest}",
        f"--base_ckpt={folder}/model",
        f"--audio_tokenizer={folder}/codec",
        f"--output_dir={output_dir}",
    ]
    flags = (
        f"--lora_dropout=0 --lr=5e-3 --batch_size=3 --grad_accum=1 --max_steps={steps} --save_steps={steps}"
    )
    run("trainer.py", *paths, *flags.split(), hub=folder / "huggingface")


def text_then_clip(entry):
    """The entry in a layout whose reply is the text, and then its clip."""
    _, asked, answered = entry["messages"]
    clip, text = asked["content"]
    transcript = {"type": "text", "text": "أين تقع المكتبة؟"}
    instruction = {
        "type": "text",
        "text": f"Please generate speech in reference audio's voice: {text['text']}",
    }
    return {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
            {"role": "user", "content": [transcript, clip, instruction]},
            {"role": "assistant", "content": [text, *answered["content"]]},
        ]
    }


def read_entries(work=Path()):
    """The manifest's entries, their clips' paths as from the folder `work`."""
    entries = json.loads((work / "tiny/train.json").read_text(encoding="utf-8"))
    for entry in entries:
        for turn in entry["messages"]:
            for part in turn["content"]:
                if "audio_url" in part:
                    part["audio_url"] = f"tiny/{part['audio_url']}"
    return entries


def expect(engine, adapter, entries):
    """What upstream's engine makes of each entry: its target's codes, and logits with the adapter."""
    import librosa
    from peft import PeftModel

    model = PeftModel.from_pretrained(engine.model, adapter).eval()
    expected = []
    for entry in entries:
        target = entry["messages"][-1]["content"][-1]
        wave, rate = librosa.load(target["audio_url"], sr=engine.audio_tokenizer.sampling_rate)
        codes = engine.audio_tokenizer.encode(wave, rate).squeeze(0)  # (num_codebooks, T)
        with torch.no_grad():
            logits = model(**engine._prepare_inputs(entry)).audio_logits  # (frames, num_codebooks, 1026)
        delayed = codes.shape[1] + len(codes) + 1  # BOS and EOS added, and the last codebook's delay
        expected.append({"codes": codes, "logits": logits[-delayed:].flatten(1)})
    model.unload()
    return expected


def boson_half():
    """Write what upstream's engine expects of both adapters."""
    from boson_multimodal.serve.serve_engine import HiggsAudioServeEngine
    from loguru import logger

    logger.disable("boson_multimodal")  # it tells each of its steps
    engine = HiggsAudioServeEngine("tiny/model", "tiny/codec", device="cpu", torch_dtype=torch.float32)
    engine.collator.return_audio_in_tokens = True
    entries = read_entries()
    expected = {
        "clip": expect(engine, "tiny/out", [*entries, OTHER_LAYOUT]),
        "text, then clip": expect(engine, "text_then_clip", map(text_then_clip, entries)),
    }
    torch.save(expected, "expected.pt")


def edited(script, old, new):
    """The script with one thing in it replaced; `old` must be there, once."""
    assert script.count(old) == 1, f"{old!r} is not in the script, or more than once"
    return script.replace(old, new)


def speak(script):
    """Run the script; returns all that it has set."""
    names = {}
    with torch.no_grad():
        exec(script, names)
    return names


def generated_codes(spoken):
    """(codes (num_codebooks, T) without delay, whether the clip ended by itself) of the script's `frames`."""
    frames = spoken["frames"][0]  # (prompt and answer, num_codebooks)
    start = (frames == BOS).all(1).nonzero()[-1, 0]  # where the answer begins
    stopped = bool((frames[-1] == EOS).all())
    return spoken["processor"].revert_delay_pattern(frames[start + 1 : -1]).T, stopped


def port_messages(entry):
    """Boson's messages as the port's processor takes them."""
    messages = []
    for turn in entry["messages"]:
        parts = []
        if isinstance(turn["content"], str):
            parts.append({"type": "text", "text": turn["content"]})
        else:
            for part in turn["content"]:
                if part["type"] == "audio":
                    parts.append({"type": "audio", "url": part["audio_url"]})
                else:
                    parts.append(part)
        messages.append({"role": turn["role"], "content": parts})
    return messages


def reply_logits(spoken, messages):
    """The port's logits on the frames of the last clip, teacher-forced: (frames, num_codebooks * 1026)."""
    inputs = spoken["processor"].apply_chat_template(
        messages, chat_template=spoken["template"], tokenize=True, return_dict=True, return_tensors="pt"
    )
    model = spoken["model"]
    with torch.no_grad():
        logits = model(**inputs.to(model.device)).logits[0]
    clips = [model.config.audio_token_id, model.config.audio_delay_token_id]
    return logits[torch.isin(inputs["input_ids"][0], torch.tensor(clips))]


def difference(logits, expected):
    """The largest difference of the last frames' logits."""
    return (logits[-len(expected) :] - expected).abs().max().item()


def share(codes, target):
    """How many of the codes are the target's: 0 where there are more, or fewer."""
    if codes.shape != target.shape:
        return 0.0
    return (codes == target).float().mean().item()


def check_entries(entries, expected):
    """Rows of what the script makes of each entry, with its reference and text in it."""
    shares, stops, seconds, errors = [], [], [], []
    for entry, target in zip(entries, expected, strict=True):
        messages = port_messages(entry)
        reference, text = messages[1]["content"]
        spoken = speak(edited(edited(SCRIPT, REFERENCE, reference["url"]), TEXT, text["text"]))
        codes, stopped = generated_codes(spoken)
        shares.append(share(codes, target["codes"]))
        stops.append(stopped)
        seconds.append(soundfile.info("tiny/answer5.wav").duration)
        errors.append(difference(reply_logits(spoken, messages), target["logits"]))
    yield "Logits", max(errors) < TOLERANCE, f"{max(errors):.1e} off boson_multimodal's at most"
    told = ", ".join(f"{same:.1%}" for same in shares)
    yield "Codes", min(shares) == 1, f"{told} of the codes are the target's"
    yield "End", all(stops), f"{sum(stops)} of {len(stops)} stop by themselves"
    wanted = [target["codes"].shape[1] / FRAME_RATE for target in expected]
    yield "Waves", seconds == wanted, f"{seconds} s written, as long as the targets"


def check_other_layout(target):
    """The row of the layout whose reference is in an earlier assistant turn, as the script writes it."""
    said, heard, asked, reply = port_messages(OTHER_LAYOUT)
    script = edited(SCRIPT, "said = None", f"said = {said['content'][0]['text']!r}")
    spoken = speak(edited(script, REFERENCE, heard["content"][0]["url"]))
    same = spoken["prompt"] == [said, heard, asked]
    error = difference(reply_logits(spoken, [*spoken["prompt"], reply]), target["logits"])
    yield "Other layout", same and error < TOLERANCE, f"logits {error:.1e} off boson_multimodal's at most"


def check_merge():
    """The row of the script's merging: the same bits as `lora.py merge`, by name. PEFT computes both, in
    float32, of the same numbers in the same shapes.
    """
    speak(edited(SCRIPT, "merged = None", 'merged = "tiny/merged5"'))
    merged = load_file("tiny/merged5/model.safetensors")
    ours = load_file("merged/model.safetensors")
    ours = {transformers5.base_name(name): value for name, value in ours.items()}
    same = sum(torch.equal(merged[name], value) for name, value in ours.items() if name in merged)
    passed = merged.keys() == ours.keys() and same == len(ours)
    yield "Merge", passed, f"{same} of {len(ours)} weights bit-equal to those of lora.py merge"


def speak_replies(entries, begun):
    """(what the script has set, [(codes, whether the clip ended by itself)]) of the text_then_clip adapter.

    The adapter expects a text before the clip, and the port speaks at once. If `begun`, the script is given
    the text, therefore.
    """
    script = edited(SCRIPT, '"tiny/out"', '"text_then_clip"')
    spoken, answers = speak(script), []
    for entry in map(text_then_clip, entries):
        *spoken["prompt"], reply = port_messages(entry)
        spoken["said_first"] = reply["content"][0]["text"] if begun else None
        exec(script[script.index("if said_first:") :], spoken)
        answers.append(generated_codes(spoken))
    return spoken, answers


def check_text_then_clip(entries, expected):
    """The row of the text_then_clip adapter, with the text given."""
    spoken, answers = speak_replies(entries, begun=True)
    shares, errors = [], []
    for entry, (codes, _), target in zip(entries, answers, expected, strict=True):
        shares.append(share(codes, target["codes"]))
        messages = port_messages(text_then_clip(entry))
        errors.append(difference(reply_logits(spoken, messages), target["logits"]))
    stops = sum(stopped for _, stopped in answers)
    told = ", ".join(f"{same:.1%}" for same in shares)
    figure = f"{told} of the codes, {stops} of {len(answers)} stop; logits {max(errors):.1e} off at most"
    passed = min(shares) == 1 and stops == len(answers) and max(errors) < TOLERANCE
    yield "Text, then clip", passed, figure


def check_text_left_out(entries, expected):
    """The row of the text_then_clip adapter without the text: passed where a clip is not its target."""
    _, answers = speak_replies(entries, begun=False)
    shares = []
    for (codes, _), target in zip(answers, expected, strict=True):
        frames = min(codes.shape[1], target["codes"].shape[1])
        same = codes[:, :frames] == target["codes"][:, :frames]
        shares.append(same.sum().item() / target["codes"].numel())
    told = ", ".join(f"{same:.1%}" for same in shares)
    yield "The text before the clip left out", min(shares) < 0.5, f"{told} of the codes"


def raised(script):
    """(whether running the lines raises ValueError, what it says)."""
    try:
        speak(script)
    except ValueError as error:
        return True, f"raises {str(error)[-91:]!r}"
    return False, "raises nothing"


def check_mistakes(entry, target):
    """Rows of the script with a mistake in each: passed where it shows."""
    shows, told = raised(edited(SCRIPT, "(model.model, adapter", "(model, adapter"))
    yield "Adapter on model", shows, told
    shows, told = raised(edited(SCRIPT, "chat_template=template, ", ""))
    yield "Stock template", shows, told
    spoken = speak(edited(SCRIPT, TEXT, " " + TEXT))
    messages = [*spoken["prompt"], port_messages(entry)[-1]]
    error = difference(reply_logits(spoken, messages), target["logits"])
    same = share(generated_codes(spoken)[0], target["codes"])
    yield "A blank before the text", error > TOLERANCE, f"logits {error:.1e} off ({same:.1%} of the codes)"


def port_half():
    """Convert, then print the table; exits with 1 where a row fails."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers5.convert(Path("tiny").resolve())
    entries, both = read_entries(), torch.load("expected.pt")
    expected = both["clip"]
    print(f"transformers {transformers.__version__}, an adapter that boson_multimodal trained:", flush=True)
    failed = print_rows(check_entries(entries, expected[:-1]))
    failed += print_rows(check_other_layout(expected[-1]))
    failed += print_rows(check_merge())
    failed += print_rows(check_text_then_clip(entries, both["text, then clip"]))
    print("and with a mistake in the script, which must show:", flush=True)
    failed += print_rows(check_mistakes(entries[0], expected[0]))
    failed += print_rows(check_text_left_out(entries, both["text, then clip"]))
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="what validate_pipeline.py --keep left")
    parser.add_argument("--transformers", default=transformers5.DEFAULT_VERSION, metavar="VERSION")
    args = parser.parse_args()
    # Every half in float32 on a CPU, in one thread: with more, sums and thus codes can come out otherwise
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        transformers5.install(args.transformers, work / "packages")
        folder = args.folder
        if folder is None:
            folder = work / "made"
            make_tiny(folder)
        (work / "tiny").symlink_to(folder.resolve())
        hub = folder.resolve() / "huggingface"
        entries = [text_then_clip(entry) for entry in read_entries(work)]
        manifest = work / "text_then_clip.json"
        manifest.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
        train(work / "tiny", manifest, work / "text_then_clip", steps=100)
        run("-m", "tests.manual.adapter_in_transformers5", "boson", work, hub=hub)
        merge = [
            f"--base_ckpt={work}/tiny/model",
            f"--adapter={work}/tiny/out",
            f"--output_dir={work}/merged",
        ]
        run("lora.py", "merge", *merge, hub=hub)
        transformers5.run_beside(work / "packages", "tests.manual.adapter_in_transformers5", "port", work)


if __name__ == "__main__":
    halves = {"boson": boson_half, "port": port_half}
    if len(sys.argv) == 3 and sys.argv[1] in halves:
        os.chdir(sys.argv[2])
        halves[sys.argv[1]]()
    else:
        main()
