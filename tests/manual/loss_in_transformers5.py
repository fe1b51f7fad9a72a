"""An independent oracle: the loss of transformers' own port of this model (fidelity, property 7).

    python -m tests.manual.loss_in_transformers5

It needs another transformers than boson_multimodal does: tests/support/transformers5.py installs that for a
while, and converts the weights (80 seconds on two CPU cores, most of them for the installation).

Our half makes a random tiny checkpoint, puts LoRA on it, collates samples and computes the trainer's loss.
It hands over the merged model, the samples' token ids before expansion and their codes before the delay
pattern. The port, HiggsAudioV2ForConditionalGeneration in the other process, gets its inputs from them by
the rules of its own HiggsAudioV2Processor. Two differences are accounted for: the port sums over codebooks
where we take the mean, and it does not train the end of stream. Its processor would also label the system
and user turns, and not <|audio_out_bos|>; here it is given our text labels.
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from tests.support import transformers5
from tests.support.bounds import TINY, rounding_bound

EOS = 1025  # audio_stream_eos_id
CLIP_LENGTHS = {"reference_a": 20, "reference_b": 13, "target_a": 40, "target_b": 9, "target_c": 28}  # frames


def make_entries(folder):
    """Both layouts of a reference, a reply of text and two clips, and one without a clip."""

    def clip(name):
        return {"audio_url": f"{folder}/{name}.npy"}

    return [
        {
            "messages": [
                {"role": "system", "content": ["Speak in this voice: ", clip("reference_a")]},
                {"role": "user", "content": [clip("reference_b"), "صباح الخير"]},
                {"role": "assistant", "content": ["نعم. ", clip("target_a"), " ثم ", clip("target_b")]},
            ]
        },
        {
            "start_index": 2,
            "messages": [
                {"role": "user", "content": "أهلا"},
                {"role": "assistant", "content": clip("reference_a")},
                {"role": "user", "content": "مساء الخير"},
                {"role": "assistant", "content": clip("target_c")},
            ],
        },
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]},
    ]


def our_half(folder):
    """Write what the port needs; returns our text and audio loss, the latter as trained and as the port's."""
    import numpy as np

    import dataset
    import lora
    import trainer
    from tests.support import tiny_checkpoint
    from tests.support.batches import micro_batches

    tiny_checkpoint.make_model(folder / "model")
    rng = np.random.default_rng(0)
    for name, length in CLIP_LENGTHS.items():
        np.save(folder / f"{name}.npy", rng.integers(0, 1024, (8, length)))  # (num_codebooks, frames)
    (folder / "train.json").write_text(json.dumps(make_entries(folder)))
    entries = dataset.load_manifest(folder / "train.json")
    clips = {path: path for entry in entries for path in dataset.clips_of(entry)}
    config, tokenizer = lora.open_base(folder / "model")
    collator = dataset.build_collator([], config)
    data = dataset.StepDataset(entries, clips, tokenizer, collator)

    model = lora.attach_lora(
        lora.load_base(folder / "model", torch.float32, "cpu"), 8, 16, 0.0, seed=0
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    [(batch, counts)] = micro_batches(data, range(len(entries)), 10**6)
    loss_model = trainer.LossModel(model)
    with torch.no_grad():
        trained = loss_model(batch) / counts[:-2]  # (1 + num_codebooks,)
        labels = batch["label_audio_ids"]
        labels[labels == EOS] = -100
        sums = loss_model(batch)[1:]
    codebooks = sums / (labels[:, 1:] != -100).sum(1)  # (num_codebooks,)

    model.get_base_model().audio_decoder_proj.text_lm_head = loss_model.text_head
    model.merge_and_unload().save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    fields = ("input_ids", "label_ids", "audio_ids_concat", "audio_ids_start")
    samples = [vars(data.load_sample(i)[1]) for i in range(len(entries))]
    torch.save([{field: sample[field] for field in fields} for sample in samples], folder / "samples.pt")
    return trained[0].item(), codebooks.sum().item(), trained[1:].mean().item()


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
        for column, padding in zip(zip(*rows), (settings["pad_token_id"], -100, 0))
    )  # (B, T)
    audio_ids, audio_labels = torch.cat(frames)[None], torch.cat(frame_labels)[None]  # (1, A, num_codebooks)
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "audio_input_ids": audio_ids,
        "audio_input_ids_mask": torch.ones(audio_ids.shape[:2], dtype=torch.bool),
    }
    return batch, labels, audio_labels


def port_half(folder):
    """In the other process: write the port's text loss and audio loss."""
    model, _ = transformers5.open_base(folder / "merged")
    settings = json.loads((folder / "merged/config.json").read_text())
    batch, labels, audio_labels = port_inputs(torch.load(folder / "samples.pt"), settings)
    with torch.no_grad():
        text = model(**batch, labels=labels).loss
        audio = model(**batch, audio_labels=audio_labels).loss
    torch.save([text.item(), audio.item()], folder / "losses.pt")


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        transformers5.install(transformers5.DEFAULT_VERSION, folder / "packages")
        text, audio, as_trained = our_half(folder)
        transformers5.run_beside(folder / "packages", "tests.manual.loss_in_transformers5", "port", folder)
        port_text, port_audio = torch.load(folder / "losses.pt")
    errors = abs(text / port_text - 1), abs(audio / port_audio - 1)
    print(f"text loss: ours {text:.6f}, the port's {port_text:.6f}, relative error {errors[0]:.1e}")
    print(
        f"audio loss, summed over codebooks, without the end of stream: ours {audio:.6f}, "
        f"the port's {port_audio:.6f}, relative error {errors[1]:.1e}"
    )
    print(f"audio loss as trained, the mean over codebooks with the end of stream: {as_trained:.6f}")
    if max(errors) > rounding_bound(**TINY):  # of the logits, which are float32 sums in another order
        sys.exit("FAILED: the losses differ")


if __name__ == "__main__":
    if sys.argv[1:2] == ["port"]:
        port_half(Path(sys.argv[2]))
    else:
        main()
