"""The Whisper pathway: references that reach the model through its audio tower (fidelity, property 5)."""

import json

import librosa
import numpy as np
import pytest
import soundfile
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoProcessor, WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

import dataset
import lora
import trainer
import validate_pipeline
from dataset import PipelineError
from tests import tiny_checkpoint

CPU = torch.device("cpu")


def clips(*names):
    return [{"audio_url": f"clips/{name}.wav"} for name in names]


def entry(*references, system=(), target="target_c"):
    """One that has references in its system and user turns."""
    return {"messages": [{"role": "system", "content": [*clips(*system), "Speak."]},
                         {"role": "user", "content": [*clips(*references), "سلام"]},
                         {"role": "assistant", "content": clips(target)}]}


@pytest.fixture(scope="module", params=[True, False], ids=["codes_too", "tower_only"])
def whisper(request, tmp_path_factory):
    """A folder with a checkpoint that has the audio tower, and a Whisper processor for it.

    The parameter is encode_audio_in_tokens: whether it hears the references' codes as well.
    """
    folder = tmp_path_factory.mktemp("whisper")
    tiny_checkpoint.make_model(folder / "model", encode_whisper_embed=True, skip_audio_tower=False,
                               encode_audio_in_tokens=request.param)
    (folder / "vocab.json").write_text('{"<|endoftext|>": 0}')  # the processor's text side is not used
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = WhisperTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=128), tokenizer)
    processor.save_pretrained(folder / "processor")
    return folder


@pytest.fixture
def open_whisper(whisper, open_data):
    """Call it with entries: the StepDataset that trainer.py would train this checkpoint on."""
    def open_whisper(*entries):
        return open_data(entries, "--batch_size=4", f"--whisper_processor={whisper}/processor",
                         model=whisper / "model")
    return open_whisper


def test_references_reach_the_tower_as_mel_features_in_order(tiny, whisper, open_whisper):
    """Catches waves at the codec's 24 kHz or a file's own rate, and another order: of the turns, of several
    references in one turn, of the rows (longest first) in the batch.
    """
    data = open_whisper(entry("voice_a"), entry(), entry("voice_a", "voice_b", system=["target_a"]))
    order = sorted(range(3), key=lambda i: -data.sample(i)[0])
    assert order == [2, 0, 1]
    model = lora.load_base(whisper / "model", torch.float32, "cpu").eval()
    heard = []
    model.audio_tower.register_forward_pre_hook(lambda tower, inputs: heard.extend(inputs))
    [(batch, _)] = data[range(3), True]
    with torch.no_grad():
        model(**batch)
    waves = [librosa.load(tiny / "clips" / f"{name}.wav", sr=16_000)[0]
             for name in ("target_a", "voice_a", "voice_b", "voice_a")]
    extractor = AutoProcessor.from_pretrained(whisper / "processor").feature_extractor
    expected = extractor(waves, sampling_rate=16_000, return_tensors="pt").input_features
    assert expected.shape == (4, 128, 3000)
    assert torch.equal(torch.cat(heard), expected)  # one and the same computation: no tolerance


def test_swapping_the_reference_changes_the_logits(whisper, open_whisper):
    """Catches features that do not reach the model, and codes that do where the checkpoint takes none."""
    model = lora.load_base(whisper / "model", torch.float32, "cpu").eval()
    [(a, _)], [(b, _)] = (open_whisper(entry(voice))[[0], True] for voice in ("voice_a", "voice_b"))

    def change(*names):  # of the first frame's logits, where only these inputs are swapped
        swapped = a | {name: b[name] for name in names}
        with torch.no_grad():
            before, after = (model(**batch).audio_logits[0] for batch in (a, swapped))
        return (before - after).abs().max().item()

    features = change("audio_features")  # not their length
    codes = change("audio_in_ids", "audio_in_ids_start")
    print(f"the reference's features change the logits by {features:.3f}, its codes by {codes:.3f}")
    assert features > 1e-2
    assert codes > 1e-2 if model.config.encode_audio_in_tokens else a["audio_in_ids"] is None


def test_the_preflight_tells_the_ways_apart(whisper, open_whisper, capsys):
    """Catches one that finds the reference deaf in spite of Whisper, or heard by it because of the codes."""
    data = open_whisper(entry("voice_a"))
    args = trainer.parse_args([f"--base_ckpt={whisper}/model", "--train_manifest=a", "--output_dir=b"])
    capsys.readouterr()
    validate_pipeline.check_heard(*lora.build_model(args, CPU), data)
    told = capsys.readouterr().out
    assert "by Whisper (backwards it changes the last hidden state by " in told
    assert ("heard as codes (backwards" in told) == data.collator.return_audio_in_tokens


def test_it_trains_and_the_tower_stays_as_it_is(whisper, open_whisper):
    """Catches LoRA on the tower (PEFT's usual suffixes match it), a tower that is trained, and a batch that
    fails on entries without a reference.
    """
    data = open_whisper(entry("voice_a"), entry("voice_b", target="target_a"), entry("voice_b", "voice_a"),
                        entry())
    micro_batches = [*data[range(4), True], *data[[3], True]]
    model = lora.attach(lora.load_base(whisper / "model", torch.float32, "cpu"), 4, 8, 0.0, seed=0)
    hearing = [model.get_base_model().audio_tower, model.get_base_model().audio_encoder_proj]
    before = [parameter.clone() for module in hearing for parameter in module.parameters()]
    text_head = lora.take_text_head(model.get_base_model())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, fused=True)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    ddp, losses = DistributedDataParallel(model.train()), []
    for _ in range(4):
        sums, counts = trainer.compute_gradients(ddp, text_head, micro_batches, torch.zeros(1))
        trainer.update(optimizer, schedule, parameters, 1.0)
        losses.append((sums / counts[:-3]).mean().item())
    print("losses", losses)
    assert losses[-1] < 0.9 * losses[0]
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad and (
        "lora" not in name or "audio_tower" in name or "audio_encoder_proj" in name)]
    after = [parameter for module in hearing for parameter in module.parameters()]
    assert all(map(torch.equal, before, after)) and len(before) == len(after) == 39


def test_references_that_whisper_fails_on_are_refused(tiny, tmp_path, open_whisper):
    """Catches an IndexError of upstream's collator in the middle of training, and a refusal of what does
    work: a reference just under 30 s, and one before a spoken clip.
    """
    for name, seconds in (("under_30s", 29.9), ("over_30s", 30.1)):
        soundfile.write(tiny / "clips" / f"{name}.wav", tiny_checkpoint.speech_like(seconds, seed=7), 24_000)
    turns = [{"role": "user", "content": [*clips("voice_a"), "a"]},
             {"role": "assistant", "content": clips("target_a")}]
    manifest = [entry("under_30s"), {"messages": turns}, entry("over_30s"), {"messages": [*turns, *turns]}]
    (tiny / "unfit.json").write_text(json.dumps(manifest))
    entries, usual = dataset.load_manifest(tiny / "unfit.json"), open_whisper(entry("voice_a"))
    found = dataset.find_clips(entries, tmp_path, "zeros")  # to encode 30 s takes 20, and codes do not matter
    for file, _, part in found.values():
        np.save(file, np.zeros((8, round(25 * soundfile.info(part["audio_url"]).duration)), dtype=np.int16))
    data = dataset.StepDataset(entries, found, usual.tokenizer, usual.collator, 4, None)
    with pytest.raises(PipelineError) as refused:
        dataset.measure(entries, found, usual.collator)
    refused = [line.split(":")[0].strip() for line in str(refused.value).splitlines()[1:]]
    assert refused == ["entry 2", "entry 3"]
    for unfit in (2, 3):  # so the refusal is needed
        with pytest.raises(IndexError):
            data[[unfit], True]
    assert len(data[[0, 1], True][0][0]["audio_features"]) == 2
