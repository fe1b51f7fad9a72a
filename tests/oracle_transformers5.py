"""An independent oracle: the loss of transformers' own port of this model (fidelity, property 7).

boson_multimodal needs transformers before 4.47, the port came with 5: it takes another environment. From the
repository's folder, in its own environment (two minutes for the first two lines, 20 seconds for the third):

    python3 -m venv /tmp/oracle
    /tmp/oracle/bin/pip install torch==2.11.0 'transformers>=5' safetensors
    python -m tests.oracle_transformers5 /tmp/oracle/bin/python

Our half makes a random tiny checkpoint, puts LoRA on it, collates samples and computes the trainer's loss.
It hands over the merged weights, the samples' token ids before expansion and their codes before the delay
pattern. The port, HiggsAudioV2ForConditionalGeneration in the other Python, gets its inputs from them by
the rules of its own HiggsAudioV2Processor. Two differences are accounted for: the port sums over codebooks
where we take the mean, and it does not train the end of stream. Its processor would also label the system
and user turns, and not <|audio_out_bos|>; here it is given our text labels.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

EOS = 1025  # audio_stream_eos_id
CLIP_LENGTHS = dict(reference_a=20, reference_b=13, target_a=40, target_b=9, target_c=28)  # frames


def make_entries(folder):
    """Both layouts of a reference, a reply of text and two clips, and one without a clip."""
    def clip(name):
        return {"audio_url": f"{folder}/{name}.npy"}
    return [
        {"messages": [
            {"role": "system", "content": ["Speak in this voice: ", clip("reference_a")]},
            {"role": "user", "content": [clip("reference_b"), "صباح الخير"]},
            {"role": "assistant", "content": ["نعم. ", clip("target_a"), " ثم ", clip("target_b")]}]},
        {"start_index": 2, "messages": [
            {"role": "user", "content": "أهلا"}, {"role": "assistant", "content": clip("reference_a")},
            {"role": "user", "content": "مساء الخير"},
            {"role": "assistant", "content": clip("target_c")}]},
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]}]


def our_half(folder):
    """Write what the port needs; returns our text and audio loss, the latter as trained and as the port's."""
    import numpy as np

    import dataset
    import lora
    import trainer
    from tests import tiny_checkpoint

    tiny_checkpoint.make_model(folder / "model")
    rng = np.random.default_rng(0)
    for name, length in CLIP_LENGTHS.items():
        np.save(folder / f"{name}.npy", rng.integers(0, 1024, (8, length)))  # (num_codebooks, frames)
    entries = make_entries(folder)
    assert not [problem for entry in entries for problem in dataset.check_entry(entry, str(folder))]
    clips = {name: (name,) for entry in entries for _, _, name in dataset.clips_of(entry)}
    config, tokenizer = lora.open_base(folder / "model")
    collator = lora.build_collator(config, None, return_audio_in_tokens=True)
    data = dataset.StepDataset(entries, clips, tokenizer, collator, batch_size=len(entries), max_tokens=None)

    model = lora.attach(lora.load_base(folder / "model", torch.float32, "cpu"), 8, 16, 0.0, seed=0).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    text_head = lora.take_text_head(model.get_base_model())
    [(batch, counts)] = data[range(len(entries)), True]
    with torch.no_grad():
        outputs = model(**batch)
        trained = trainer.loss_sums(outputs, batch, counts, text_head) / counts[:-3]  # (1 + num_codebooks,)
        labels = batch["label_audio_ids"]
        labels[labels == EOS] = -100
        sums = trainer.loss_sums(outputs, batch, counts, text_head)[1:]
    codebooks = sums / (labels[:, 1:] != -100).sum(1)  # (num_codebooks,)

    model.get_base_model().audio_decoder_proj.text_lm_head = text_head
    save_file(model.merge_and_unload().state_dict(), folder / "merged.safetensors")
    fields = ("input_ids", "label_ids", "audio_ids_concat", "audio_ids_start")
    samples = [vars(data.sample(i)[1]) for i in range(len(entries))]
    torch.save([{field: sample[field] for field in fields} for sample in samples], folder / "samples.pt")
    return trained[0].item(), codebooks.sum().item(), trained[1:].mean().item()


def port_config(settings):
    """The port's configuration from boson_multimodal's config.json."""
    from transformers import HiggsAudioV2Config

    text = settings["text_config"]
    shared = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"]
    return HiggsAudioV2Config(
        **{name: text[name] for name in shared}, pad_token_id=settings["pad_token_id"],
        rope_parameters={**text["rope_scaling"], "rope_theta": text["rope_theta"]},
        num_codebooks=settings["audio_num_codebooks"], codebook_size=settings["audio_codebook_size"] + 2,
        audio_token_id=settings["audio_out_token_idx"], audio_bos_token_id=settings["audio_out_bos_token_id"],
        audio_delay_token_id=text["vocab_size"] - 1, eos_token_id=None)  # spare; its other name for a frame


def port_inputs(samples, settings):
    """The port's batch: each placeholder becomes its clip's frames, delayed and labelled by the port's rules.

    The processor itself takes waves, for another codec class: only its build_delay_pattern is called.
    """
    from transformers import HiggsAudioV2Processor

    bos_id = settings["audio_stream_bos_id"]
    ends = SimpleNamespace(audio_stream_bos_id=bos_id, audio_stream_eos_id=EOS)  # all it wants of a processor
    placeholders = [settings["audio_in_token_idx"], settings["audio_out_token_idx"]]
    rows, frames, frame_labels = [], [], []
    for sample in samples:
        clips = iter(sample["audio_ids_concat"].tensor_split(sample["audio_ids_start"][1:], dim=1))
        ids, labels = [], []
        for token, label in zip(sample["input_ids"].tolist(), sample["label_ids"].tolist()):
            if token in placeholders:
                codes = next(clips)  # (num_codebooks, frames)
                codes = F.pad(F.pad(codes, (1, 0), value=bos_id), (0, 1), value=EOS)
                codes = HiggsAudioV2Processor.build_delay_pattern(ends, codes[None])[0].T
                frames.append(codes)  # (frames + 9, num_codebooks)
                unlabelled = (codes == bos_id) | (codes == EOS) | (label == -100)
                frame_labels.append(codes.masked_fill(unlabelled, -100))
                ids += [settings["audio_out_token_idx"]] * len(codes)
                labels += [-100] * len(codes)
            else:
                ids.append(token)
                labels.append(label)
        rows.append((torch.tensor(ids), torch.tensor(labels), torch.ones(len(ids), dtype=torch.long)))
    input_ids, labels, attention_mask = (
        torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=padding)
        for column, padding in zip(zip(*rows), (settings["pad_token_id"], -100, 0)))  # (B, T)
    audio_ids, audio_labels = torch.cat(frames)[None], torch.cat(frame_labels)[None]  # (1, A, num_codebooks)
    batch = dict(input_ids=input_ids, attention_mask=attention_mask, audio_input_ids=audio_ids,
                 audio_input_ids_mask=torch.ones(audio_ids.shape[:2], dtype=torch.bool))
    return batch, labels, audio_labels


def port_half(folder):
    """In the other Python: print the port's text loss and audio loss."""
    from transformers import HiggsAudioV2ForConditionalGeneration

    settings = json.loads((folder / "model" / "config.json").read_text())
    names = {"audio_codebook_embeddings.": "model.embed_audio_tokens.embed_audio_tokens.",
             "embed_tokens.": "model.embed_tokens.", "layers.": "model.layers.", "norm.": "model.norm.",
             "audio_decoder_proj.": ""}
    weights = {}
    for name, value in load_file(folder / "merged.safetensors").items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        weights[names[prefix] + name[len(prefix):]] = value
    model = HiggsAudioV2ForConditionalGeneration(port_config(settings), use_text_head=True).eval()
    model.load_state_dict(weights)  # strict: every weight has its place
    batch, labels, audio_labels = port_inputs(torch.load(folder / "samples.pt"), settings)
    with torch.no_grad():
        text = model(**batch, labels=labels).loss
        audio = model(**batch, audio_labels=audio_labels).loss
    print(json.dumps([text.item(), audio.item()]))


def main(python):
    with tempfile.TemporaryDirectory() as folder:
        text, audio, as_trained = our_half(Path(folder))
        command = [python, __file__, "port", folder]
        port_text, port_audio = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    errors = abs(text / port_text - 1), abs(audio / port_audio - 1)
    print(f"text loss: ours {text:.6f}, the port's {port_text:.6f}, relative error {errors[0]:.1e}")
    print(f"audio loss, summed over codebooks, without the end of stream: ours {audio:.6f}, "
          f"the port's {port_audio:.6f}, relative error {errors[1]:.1e}")
    print(f"audio loss as trained, the mean over codebooks with the end of stream: {as_trained:.6f}")
    if max(errors) > 1e-6:  # float32, sums in another order
        sys.exit("FAILED: the losses differ")


if __name__ == "__main__":
    port_half(Path(sys.argv[2])) if sys.argv[1] == "port" else main(sys.argv[1])
