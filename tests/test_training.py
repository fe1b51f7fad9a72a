"""Samples, counts, steps and checkpoints; in process where that is enough, else by `python trainer.py`."""

import json
import shutil

import numpy as np
import pytest
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

import dataset
import lora
import trainer
from tests.manual import benchmark
from tests.support import launcher
from tests.support.batches import CPU, micro_batches
from tests.support.tiny_checkpoint import make_config

VOICE, TARGET_A, TARGET_B = (
    {"type": "audio", "audio_url": f"clips/{name}.wav"} for name in ("voice_a", "target_a", "target_b")
)


def turns(*contents):
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


LAYOUTS = {
    "text only": {"messages": turns("hello", "good day")},
    "two clips": {"messages": turns([VOICE, "two"], [TARGET_A, "and", TARGET_B])},
    "reference masked": {"messages": turns("first", [VOICE], "second", [TARGET_A]), "start_index": 3},
    "text then audio": {"messages": turns([VOICE, "say it"], ["so it is", TARGET_B])},
    "in the system": {"messages": [{"role": "system", "content": ["like", VOICE]}, *turns("go", TARGET_A)]},
}


def test_epoch_two_trains_the_labels_of_epoch_one(open_data, entries):
    """Catches a dataset that keeps its samples: upstream's collator writes -100 into them."""
    data = open_data(entries)
    first, second = (micro_batches(data, [0, 1, 2]) for _ in range(2))
    for (batch, counts), (again, counts_again) in zip(first, second, strict=True):
        assert torch.equal(counts, counts_again) and counts[1] > 0
        assert torch.equal(batch["label_audio_ids"], again["label_audio_ids"])
        assert torch.equal(batch["label_ids"], again["label_ids"])


@pytest.mark.parametrize(
    "name, text, clips",
    [
        # text labels: the reply's bytes, and for each clip <|audio_out_bos|> <|audio_eos|>, and <|eot_id|>
        ("text only", 8 + 1, 0),
        ("two clips", 3 + 2 * 2 + 1, 2),
        ("reference masked", 2 + 1, 1),
        ("text then audio", 8 + 2 + 1, 1),
        ("in the system", 2 + 1, 1),
    ],
)
def test_only_the_trained_reply_is_labelled(open_data, name, text, clips):
    """Catches a masked turn with loss, a reply without, and an end of stream that is not trained."""
    [(batch, counts)] = micro_batches(open_data([LAYOUTS[name]]), [0])
    assert counts[0] == text
    if not clips:
        assert counts[1:-2].sum() == 0 and batch["label_audio_ids"].numel() == 0
        return
    starts = [*batch["audio_out_ids_start"].tolist(), batch["label_audio_ids"].shape[1]]
    trained = [(batch["label_audio_ids"][:, a:b] != -100).sum(1) for a, b in zip(starts, starts[1:])]
    assert sum(bool(labels.any()) for labels in trained) == clips  # the masked one is there, unlabelled
    frames = [b - a - 9 for a, b in zip(starts, starts[1:])]
    expected = sum(n + 1 for n, labels in zip(frames, trained) if labels.any())  # every frame, and the end
    assert counts[1:-2].tolist() == [expected] * 8


def test_counts_are_those_of_the_forward(open_data, lora_model):
    """Catches a count taken on labels that upstream's merge moves or drops; and wrong position figures."""
    data = open_data(list(LAYOUTS.values()))
    for batch, counts in micro_batches(data, list(range(len(LAYOUTS))), 300):
        outputs = lora_model(**batch)
        assert counts[0] == (outputs.expanded_labels[:, 1:] != -100).sum()
        assert counts[-1] == outputs.logits[..., 0].numel()
        positions = outputs.attention_mask.sum(1)  # (B,); ours are rounded up to 8, as upstream pads
        assert counts[-2] == (-(-positions // 8) * 8).sum()


def count_saved(*arguments):
    """(losses, how many numbers a forward pass keeps for the backward pass)."""
    losses, saved = benchmark.forward_saving(*arguments)
    return losses, sum(tensor.numel() for tensor in saved if not tensor.is_leaf)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_changes_memory_alone(tiny, open_data, entries, precision):
    """--gradient_checkpointing: the same gradients, bit for bit, of a fifth of the saved numbers; and in
    bfloat16 fewer than with PEFT's own casts, which make a copy of its input for each projection.

    Bit for bit on any machine: what was not saved is computed again from the same inputs, by the same
    operations on the same shapes, in one process.
    """
    [(batch, counts)] = micro_batches(open_data(entries), range(3))
    gradients, kept = [], []
    for flags in ([], ["--gradient_checkpointing"]):
        args = trainer.parse_args(
            [
                f"--base_ckpt={tiny}/model",
                "--train_manifest=a",
                "--output_dir=b",
                f"--precision={precision}",
                "--lora_dropout=0",
                *flags,
            ]
        )
        model = trainer.LossModel(lora.build_model(args, tiny / "model", CPU))
        losses, number = count_saved(model, batch, counts)
        losses.sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        kept.append(number)
        # Numbers of saved values, which no processor changes
        if not flags and precision == "bf16":
            for module in model.modules():
                module.cast_input_dtype_enabled = True
            assert number < 0.95 * count_saved(model, batch, counts)[1]
    assert all(map(torch.equal, *gradients)) and kept[1] < 0.2 * kept[0], kept


@pytest.mark.parametrize(
    "overrides, modules",
    [
        ({}, 20),
        ({"use_audio_out_self_attention": True}, 28),
        ({"audio_dual_ffn_layers": [1]}, 17),
        ({"skip_audio_tower": False, "encode_whisper_embed": True}, 20),
        ({"audio_adapter_type": "stack", "audio_dual_ffn_layers": None}, 14),
    ],
)
def test_targets_follow_the_model(tiny, overrides, modules):
    """Catches LoRA on the Whisper tower, and projections missed where a checkpoint has more of them."""
    with torch.device("meta"):
        model = HiggsAudioModel(make_config(AutoTokenizer.from_pretrained(tiny / "model"), **overrides))
    attached = lora.attach_lora(model, 4, 8, 0.0, seed=0)
    names = attached.targeted_module_names
    assert len(names) == modules and all(name.startswith("layers.") for name in names)
    assert sum(parameter.requires_grad for parameter in attached.parameters()) == 2 * modules


def run(tiny, out, *flags):
    done = launcher.run(
        "trainer.py",
        "--base_ckpt",
        tiny / "model",
        "--output_dir",
        out,
        "--audio_tokenizer",
        tiny / "codec",
        "--logging_steps",
        1,
        *flags,
    )
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return list({line["step"]: line for line in lines}.values())  # a later line of a step supersedes


def test_every_layout_trains(tiny, tmp_path):
    """In bfloat16, with recomputed layers and a token budget; the metrics are whole and finite."""
    manifest = tiny / "layouts.jsonl"
    manifest.write_text("\n".join(map(json.dumps, LAYOUTS.values())))
    [step] = run(
        tiny,
        tmp_path,
        "--train_manifest",
        manifest,
        "--precision",
        "bf16",
        "--batch_size",
        5,
        "--gradient_checkpointing",
        "--max_tokens",
        300,
        "--epochs",
        1,
        "--grad_accum",
        1,
    )
    assert set(step) == {
        "step",
        "epoch",
        "loss",
        "text_loss",
        "audio_loss",
        "audio_loss_per_codebook",
        "lr",
        "grad_norm",
        "skipped_steps",
        "samples_per_s",
        "tokens_per_s",
        "padding",
        "max_memory_gb",
    }
    assert step["step"] == 1 and step["epoch"] == 1.0 and len(step["audio_loss_per_codebook"]) == 8
    assert np.isfinite([step["loss"], step["grad_norm"]]).all() and 0 <= step["padding"] < 0.5
    audio_loss = np.mean(step["audio_loss_per_codebook"])  # of eight: rounded in float64 as often
    rounding = 10 * 8 * np.finfo(np.float64).eps
    assert step["loss"] == pytest.approx(step["text_loss"] + audio_loss, rel=rounding)
    board = EventAccumulator(str(tmp_path / "runs")).Reload().Tags()
    curves = set(step) - {"step", "audio_loss_per_codebook"} | {f"codebook_{k}" for k in range(8)}
    assert set(board["scalars"]) == curves and not board["histograms"] and not board["images"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"{tiny}/model"
    assert config["revision"] is None  # a folder has none
    flags = json.loads((tmp_path / "args.json").read_text())
    assert flags["train_manifest"] == str(manifest) and flags["max_tokens"] == 300
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"  # PEFT's own


def test_a_resumed_run_ends_where_the_straight_one_does(tiny, tmp_path):
    """Bit for bit, with dropout: catches an optimizer, schedule or order that starts anew.

    Both runs are the same program on the same machine, with as many threads and micro-batches of the same
    shapes: a difference in the last bit is a state that was not kept.
    """
    flags = [
        "--train_manifest",
        tiny / "train.json",
        "--max_steps",
        6,
        "--save_steps",
        2,
        "--batch_size",
        1,
        "--grad_accum",
        2,
        "--lr",
        "1e-2",
    ]
    straight = run(tiny, tmp_path / "straight", *flags)
    shutil.copytree(tmp_path / "straight/checkpoint-4", tmp_path / "resumed/checkpoint-4")
    shutil.copy(tmp_path / "straight/metrics.jsonl", tmp_path / "resumed")  # steps 5 and 6 are done again
    resumed = run(tiny, tmp_path / "resumed", *flags, "--resume_from_checkpoint", "auto")
    assert [step["loss"] for step in resumed] == [step["loss"] for step in straight]
    weights = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("straight", "resumed")
    ]
    assert weights[0] == weights[1]


def test_each_sample_is_trained_once_an_epoch_in_the_seeds_order(tiny, tmp_path, monkeypatch):
    """Catches a last step that is filled up from its own epoch, one order for all epochs, and a resumed run
    that starts its epoch again.
    """
    steps, read = [], dataset.StepDataset.__getitem__

    def note(data, plan):
        steps.append(sorted(sum(plan, [])))
        return read(data, plan)

    monkeypatch.setattr(dataset.StepDataset, "__getitem__", note)
    monkeypatch.setattr(trainer, "start", lambda: CPU)
    monkeypatch.setattr(trainer.signal, "signal", lambda *_: None)
    texts = [{"messages": LAYOUTS["text only"]["messages"]}] * 5
    (tmp_path / "train.json").write_text(json.dumps(texts))
    flags = [f"--train_manifest={tmp_path}/train.json", f"--base_ckpt={tiny}/model", "--batch_size=2"]
    flags += [f"--audio_tokenizer={tiny}/codec", f"--output_dir={tmp_path}/out", "--grad_accum=1"]
    flags += ["--num_workers=0", "--save_steps=1", "--resume_from_checkpoint=auto"]
    for max_steps in (3, 5):
        trainer.train(trainer.parse_args([*flags, f"--max_steps={max_steps}"]))
    orders = [np.random.default_rng((42, epoch)).permutation(5) for epoch in (0, 1)]
    expected = np.concatenate(orders).reshape(5, 2)
    assert steps[1:4] + steps[5:] == [sorted(step) for step in expected.tolist()]


def test_the_first_step_of_the_warm_up_learns():
    """Catches the library's own first rate of 0: where a single step warms up, that step was lost."""
    args = trainer.parse_args(["--train_manifest=a", "--output_dir=b", "--warmup_ratio=0.03"])
    optimizer, schedule = trainer.build_optimizer(torch.nn.Linear(2, 2), args, 40, {"step": 0})
    rates = []
    for _ in range(40):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:2] == [args.lr / 2, args.lr] and min(rates) > 0
