"""Let the trained model speak the prompt of a manifest's entry, as the comparison's page did.

python -m tests.manual.speak --base_ckpt merged --manifest held_out.json
    gives upstream's engine the first entry without its reply, and writes answer.wav
python -m tests.manual.speak --adapter out/checkpoint-300 --manifest held_out.json --text "..."
    puts the adapter on the base, unmerged, and says another text in the voice of that entry
"""

import argparse
import sys
from pathlib import Path

import soundfile
import torch
from boson_multimodal.data_types import ChatMLSample
from boson_multimodal.serve.serve_engine import HiggsAudioServeEngine
from loguru import logger

import dataset
import lora


def read_prompt(manifest: Path, index: int, text: str | None) -> ChatMLSample:
    """An entry without its last reply; `text` replaces the last text in it. Raises UserError."""
    entries = dataset.load_manifest(manifest)
    if not 0 <= index < len(entries):
        raise dataset.UserError(f"--entry {index}: {manifest} has entries 0 to {len(entries) - 1}")
    messages = entries[index].messages
    reply = max(i for i, message in enumerate(messages) if message.role == "assistant")
    prompt = messages[:reply]
    if text is not None:
        texts = [part for part in prompt[-1].content if part.type == "text"] if prompt else []
        if not texts:
            raise dataset.UserError(
                f"--text: no text to replace before the reply of {manifest}, entry {index}"
            )
        texts[-1].text = text
    return ChatMLSample(prompt)


def load_engine(args) -> HiggsAudioServeEngine:
    """Upstream's engine with the model, or with base and adapter, in the comparison's dtype."""
    # Not "cuda": the engine would then capture CUDA graphs of the base alone, without an adapter
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    model = lora.download("--base_ckpt", args.base_ckpt)
    codec = lora.download("--audio_tokenizer", args.audio_tokenizer)
    logger.disable("boson_multimodal")  # it tells each of its steps
    lora.load_codec(codec, "cpu")  # refuses a HuBERT with code, which the engine would run
    dtype = lora.base_dtype("auto", device)
    engine = HiggsAudioServeEngine(str(model), str(codec), device=str(device), torch_dtype=dtype)
    # Otherwise the engine does not hear a reference in a user's turn
    engine.collator.return_audio_in_tokens = engine.model.config.encode_audio_in_tokens
    if args.adapter:  # a merged model is refused here: the adapter is in it already
        base_id = lora.fingerprint(model.glob("*.safetensors"))
        engine.model, _ = lora.load_adapter(engine.model, args.adapter, base_id)
    return engine


def speak(args) -> None:
    """Write the answer to args.output. Raises UserError where no sound came out."""
    prompt = read_prompt(args.manifest, args.entry, args.text)
    args.output.unlink(missing_ok=True)  # of another model, if this one says nothing
    engine = load_engine(args)
    try:
        answer = engine.generate(
            prompt, args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed
        )
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:  # upstream's, where no sound came out, or too little
        told = "the model answered without sound: it may be trained too little; else try another --seed"
        raise dataset.UserError(told) from error
    soundfile.write(args.output, answer.audio, answer.sampling_rate)
    seconds = len(answer.audio) / answer.sampling_rate
    print(f"{args.output} has {seconds:.1f} s: {answer.generated_text}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. The defaults are the comparison's, but for the longest babble."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--base_ckpt", default=lora.BASE, help="a merged folder, or the base (default: the hub's)"
    )
    parser.add_argument("--audio_tokenizer", default=lora.CODEC, help="the codec (default: the hub's)")
    parser.add_argument(
        "--adapter", help="trainer.py's --output_dir, or a checkpoint in it; for an unmerged base"
    )
    parser.add_argument("--manifest", type=Path, required=True, help="its entries are the prompts")
    parser.add_argument("--entry", type=int, default=0, help="which entry's prompt (default: 0, the first)")
    parser.add_argument("--text", help="say this; it replaces the last text before the reply, all of it")
    # The page has upstream's temperature and top_p, and trainer.py's seed
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="lower is steadier, flatter (default: 0.7)"
    )
    parser.add_argument("--top_p", type=float, default=0.95, help="share of likely codes (default: 0.95)")
    parser.add_argument("--seed", type=int, default=42, help="another one is another answer (default: 42)")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="25 are 1 s (default: 1024)")
    parser.add_argument("--output", type=Path, default="answer.wav", help="(default: answer.wav)")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    try:
        speak(args)
    except dataset.UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
