"""Training is inference: decoding, labels, precision, gradients (fidelity, properties 1, 4, 6 and 8)."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from boson_multimodal.data_types import ChatMLSample
from boson_multimodal.model.higgs_audio.utils import revert_delay_pattern
from boson_multimodal.serve.serve_engine import HiggsAudioServeEngine
from loguru import logger
from torch.nn.parallel import DistributedDataParallel
from transformers import LogitsProcessor

import lora
import trainer
from tests.acceptance import loss_in_float64
from tests.support.batches import CPU, micro_batches
from tests.support.bounds import TINY, rounding_bound

EOS = 1025  # of the audio stream
SYSTEM = {"role": "system", "content": "Speak."}


def clip(name):
    return {"audio_url": f"clips/{name}.wav"}


def random_entries(seed):
    """One of each layout with random texts: the reference in the user's turn, and in an assistant turn."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("ابتثجحخد abc"), size=n)) for n in rng.integers(1, 30, size=6)]
    voice, target = rng.choice(["voice_a", "voice_b"]), rng.choice(["target_a", "target_b", "target_c"])
    user, assistant = ({"role": role, "content": None} for role in ("user", "assistant"))
    reply = {**assistant, "content": [texts[0], clip(target), texts[1]]}
    return [
        {"messages": [SYSTEM, {**user, "content": [clip(voice), texts[2]]}, reply]},
        {
            "start_index": 3,
            "messages": [
                SYSTEM,
                {**user, "content": texts[3]},
                {**assistant, "content": [clip(voice)]},
                {**user, "content": texts[4]},
                reply,
            ],
        },
    ]


class ForcedReply(LogitsProcessor):
    """Notes the logits that upstream's generate samples from, then leaves it the sample's next token only."""

    def __init__(self, text, codes):
        self.text, self.codes = text, codes  # (text tokens,), (num_codebooks, columns)
        self.text_logits, self.audio_logits = [], []

    def __call__(self, input_ids, scores):
        is_audio = input_ids is None  # so upstream asks for the codes of the next column
        noted, targets = (self.audio_logits, self.codes.T) if is_audio else (self.text_logits, self.text)
        target = targets[len(noted)].view(-1, 1)
        noted.append(scores.clone())
        return torch.full_like(scores, -torch.inf).scatter(1, target, 0.0)


@pytest.fixture(scope="module")
def engine(tiny):
    """Upstream's engine, set to hear references; decoding outgrows its smaller caches."""
    logger.disable("boson_multimodal")  # it tells every step of its start
    engine = HiggsAudioServeEngine(
        str(tiny / "model"),
        str(tiny / "codec"),
        device="cpu",
        torch_dtype=torch.float32,
        kv_cache_lengths=list(range(64, 513, 32)),
    )
    engine.collator.return_audio_in_tokens = True
    return engine


def decode(engine, entry, token_ids, codes, caches):
    """Upstream's generate, forced to reply `token_ids` and `codes`: logits of each text and audio step."""
    prompt = engine._prepare_inputs(ChatMLSample(entry.messages[:-1]))
    engine._prepare_kv_caches()
    reply = token_ids[prompt["input_ids"].shape[1] :]
    reply = reply[reply != engine.tokenizer.convert_tokens_to_ids("<|audio_eos|>")]  # it is never sampled
    forced = ForcedReply(reply, codes[:, 1:])  # the first column, all BOS, is not sampled either
    engine.model.generate(
        **prompt,
        max_new_tokens=len(reply) + codes.shape[1] - 1,
        do_sample=False,
        logits_processor=[forced],
        past_key_values_buckets=caches,
        use_cache=True,
    )
    return torch.cat(forced.text_logits), torch.stack(forced.audio_logits)


def kept(text_head):
    """A list that `text_head` leaves its outputs in: the logits that the trainer's loss reads."""
    outputs = []
    text_head.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    return outputs


def sum_losses(text_head, outputs, batch):
    """The trainer's loss sums, from a model's outputs that are there already."""
    text_head.weight = getattr(text_head, "weight", torch.empty(0))
    return trainer.LossModel.forward(SimpleNamespace(text_head=text_head, model=lambda **_: outputs), batch)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("seed", [0, 1])
def test_training_reads_the_logits_of_decoding(open_data, lora_model, engine, seed, cache):
    """Catches logits read one position off, another prompt or mask, a reference that only one side hears.

    One computes all positions at once, the other a position at a time from a cache: float32 sums in another
    order.
    """
    data = open_data(random_entries(seed))
    model = engine.model = lora_model.get_base_model().eval()
    order = sorted(range(2), key=lambda i: -data.load_sample(i)[0])  # of the rows in the batch: longest first
    [(batch, _)] = micro_batches(data, order)
    with torch.no_grad():
        outputs = model(**batch)
        heads = kept(text_head := torch.nn.Identity())
        sum_losses(text_head, outputs, batch)
    text_read = heads[0].split((batch["label_ids"][:, 1:] != -100).sum(1).tolist())  # (text labels, vocab)
    starts = batch["audio_out_ids_start"][1:]
    codes, labels = (batch[name].tensor_split(starts, dim=1) for name in ("audio_out_ids", "label_audio_ids"))
    clips = [
        (codes, logits)
        for codes, labels, logits in zip(codes, labels, outputs.audio_logits.tensor_split(starts))
        if (labels != -100).any()
    ]
    errors, after, largest = [], [], max(logits.abs().max() for logits in (heads[0], outputs.audio_logits))
    for row, (i, (codes, audio_read)) in enumerate(zip(order, clips, strict=True)):  # a clip in each row
        text, audio = decode(
            engine,
            data.entries[i],
            data.load_sample(i)[1].input_ids,
            codes,
            engine.kv_caches if cache == "static" else None,
        )
        before = len(data.entries[i].messages[-1].content[0].text.encode()) + 1  # with audio_out_bos
        difference = (text - text_read[row]).abs().amax(1)  # (text labels,)
        errors += [difference[:before].max().item(), (audio - audio_read[:-1]).abs().max().item()]
        # One position on, training reads what predicts <|audio_eos|>, decoding what predicts <|AUDIO_OUT|>
        after.append(difference[before + 1 :].max().item())
    print(f"{cache} cache: {max(errors):.1e}; text after the clip, for upstream's reason: {max(after):.2f}")
    assert max(errors) < rounding_bound(**TINY, scale=largest)


LABELLED = [
    {
        "messages": [
            SYSTEM,
            {"role": "user", "content": [clip("voice_a"), "كيف حالك؟"]},
            {"role": "assistant", "content": ["نعم: ", clip("target_a"), " ثم ", clip("target_b")]},
        ]
    },
    {
        "start_index": 3,
        "messages": [
            SYSTEM,
            {"role": "user", "content": "hidden"},
            {"role": "assistant", "content": ["masked ", clip("voice_b"), " masked"]},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": clip("target_c")},
        ],
    },
    {
        "messages": [
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "I am.", "recipient": "all"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [clip("target_b"), "!"]},
            {"role": "assistant", "content": "more"},
            {"role": "user", "content": [clip("voice_b")]},
            {"role": "assistant", "content": clip("target_a")},
        ]
    },
]


def turns(entry):
    """(turn, whether it is trained) of a manifest entry."""
    return [
        (turn, turn.role == "assistant" and i >= (entry.start_index or 0))
        for i, turn in enumerate(entry.messages)
    ]


def reply_text(entry):
    """What an entry trains as text, in upstream's markup."""
    text, next_roles = "", [turn.role for turn in entry.messages[1:]] + [None]
    for (turn, trained), next_role in zip(turns(entry), next_roles):
        if trained:
            text += turn.recipient + "<|recipient|>" if turn.recipient else ""
            text += "".join(getattr(part, "text", "<|audio_out_bos|><|audio_eos|>") for part in turn.content)
            text += "<|eom_id|>" if next_role == "assistant" else "<|eot_id|>"
    return text


def targets_of(model, batch):
    """What the trainer's loss asks of each position, -100 for nothing: text (B, T), audio (A, num_codebooks).

    The gradient of a cross entropy is softmax - one_hot: negative at its target alone, and on any machine,
    as a random model gives no target a probability that rounds to 1.
    """
    with torch.no_grad():
        outputs = model(**batch)
    logits = [outputs.logits.requires_grad_(), outputs.audio_logits.requires_grad_()]
    sum_losses(torch.nn.Identity(), outputs, batch).sum().backward()
    return outputs, *(torch.where((x.grad != 0).any(-1), x.grad.argmin(-1), -100) for x in logits)


def spoken(targets):
    """The codes (num_codebooks, frames) that one clip's targets (columns, num_codebooks) ask for, or None."""
    if (targets == -100).all():
        return None
    assert (targets[-1] == -100).all()  # the clip's last column predicts nothing of the next clip
    columns = revert_delay_pattern(F.pad(targets[:-1], (0, 0, 1, 0), value=-100).T)  # BOS, codes, EOS
    assert (columns[:, 0] == -100).all() and (columns[:, -1] == EOS).all()
    assert (targets != -100).sum() == columns[:, 1:].numel()  # and nothing beside them
    return columns[:, 1:-1].tolist()


@pytest.mark.parametrize("max_tokens", [1, 4096])
def test_targets_decode_to_the_assistant_turns(open_data, lora_model, max_tokens):
    """Catches a missing or double shift, a target in a prompt, a masked turn, BOS, padding or the next clip,
    a code or an end of stream that is no target, and samples kept for epoch 2 with the collator's marks.
    """
    data = open_data(LABELLED)
    model = lora_model.get_base_model().eval()
    clips = [
        (part.audio_url, trained)
        for entry in data.entries
        for turn, trained in turns(entry)
        if turn.role == "assistant"
        for part in turn.content
        if part.type == "audio"
    ]
    said = [np.load(data.code_files[path]).tolist() if trained else None for path, trained in clips]
    for _ in ("epoch 1", "epoch 2"):
        texts, speech = [], []
        for batch, _ in micro_batches(data, range(4), max_tokens):
            outputs, text, audio = targets_of(model, batch)
            for targets, token_ids, mask in zip(text, outputs.expanded_input_ids, outputs.attention_mask):
                [positions] = (targets != -100).nonzero(as_tuple=True)
                assert torch.equal(targets[positions], token_ids[positions + 1]) and mask[positions + 1].all()
                texts.append(data.tokenizer.decode(targets[positions], clean_up_tokenization_spaces=False))
            if len(audio):
                speech += map(spoken, audio.tensor_split(batch["audio_out_ids_start"][1:]))
        assert sorted(texts) == sorted(map(reply_text, data.entries))
        assert sorted(speech, key=str) == sorted(said, key=str)


def start(model):
    """(LossModel under DDP, LoRA parameters), as in trainer.train."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return DistributedDataParallel(trainer.LossModel(model.train())), parameters


def count_labels(steps):
    """(1 + num_codebooks,) label counts of a step's micro-batches."""
    return torch.from_numpy(sum(counts for _, counts in steps)[:-2])


def test_bf16_computes_the_loss_in_float32(tiny, open_data):
    """Catches a cross entropy in bf16, and sums of it. The logits are the same, so that a loss differs only
    by how its labels are added.
    """
    base = lora.load_base(tiny / "model", torch.bfloat16, CPU)
    model = trainer.LossModel(lora.attach_lora(base, 4, 8, 0.0, seed=0))
    heads = kept(model.text_head)
    [(batch, counts)] = micro_batches(open_data(LABELLED[:1]), [0])
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model.model(**batch)
        sums = sum_losses(model.text_head, outputs, batch)  # without autocast, which would make it float32
    labels = outputs.expanded_labels[:, 1:]
    expected = [F.cross_entropy(heads[0].double(), labels[labels != -100], reduction="sum")]
    expected += [
        F.cross_entropy(logits.double(), labels, reduction="sum")
        for logits, labels in zip(
            outputs.audio_logits[:-1].unbind(1), batch["label_audio_ids"][:, 1:], strict=True
        )
    ]
    assert heads[0].dtype == torch.bfloat16 and sums.dtype == torch.float32
    bound = rounding_bound(counts[:-2].max().item())
    assert sums.tolist() == pytest.approx([x.item() for x in expected], rel=bound)


def test_bf16_trains_a_float32_adapter_beside_an_unchanged_base(tiny, open_data):
    """Catches an adapter, its gradients or AdamW's moments in the base's bf16, and a base that moves."""
    base = lora.load_base(tiny / "model", torch.bfloat16, "cpu")
    frozen = {name: parameter.clone() for name, parameter in base.named_parameters()}
    assert {parameter.dtype for parameter in frozen.values()} == {torch.bfloat16}
    model, parameters = start(lora.attach_lora(base, 4, 8, 0.0, seed=0))
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, fused=True)
    step = open_data(LABELLED[:1])[[[0]]]
    before = [parameter.clone() for parameter in parameters]
    for _ in range(2):  # A has no gradient before B has moved
        sums = trainer.compute_gradients(model, step, count_labels(step), CPU)
        gradients = [parameter.grad.clone() for parameter in parameters]
        optimizer.step()
        optimizer.zero_grad()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert len(moments) == 2 * len(parameters) and not any(map(torch.equal, before, parameters))
    assert {x.dtype for x in [sums, *parameters, *gradients, *moments]} == {torch.float32}
    base.audio_decoder_proj.text_lm_head = model.module.text_head
    after = {name.replace(".base_layer", ""): value for name, value in base.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


def test_gradients_are_finite_differences(tiny, open_data, monkeypatch):
    """Catches a tensor detached on the way, and a wrong weight of text, codebooks or samples in the loss.

    Autograd over four micro-batches against the design's formula, in NumPy, on one batch. All is in float64
    but for the weights 1/N, which are rounded to float32 once.
    """
    step = open_data(LABELLED)[[[i] for i in range(4)]]
    [(batch, _)] = micro_batches(open_data(LABELLED), range(4))
    model = lora.attach_lora(lora.load_base(tiny / "model", torch.float64, "cpu"), 4, 8, 0.0, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    monkeypatch.setattr(torch, "float32", torch.float64)  # upstream casts to float32 in its norms and heads,
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # and the loss does: to float64 here
    model, parameters = start(model)
    trainer.compute_gradients(model, step, count_labels(step), CPU)

    def loss():
        with torch.no_grad():
            outputs = model.module.model(**batch)
            outputs.logits = model.module.text_head(outputs.logits)
        return loss_in_float64(outputs, batch)

    errors = []
    for parameter in parameters[::3]:  # A or B of every kind of projection
        entry, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        i = gradient.abs().argmax()
        value, step = entry[i].item(), 1e-4
        entry[i] = value + step
        above = loss()
        entry[i] = value - step
        below = loss()
        entry[i] = value
        errors.append(abs((above - below) / (2 * step) / gradient[i].item() - 1))
    print(f"{len(errors)} entries differ from finite differences by up to {max(errors):.1e}")
    # The loss is float64; what a step of 1e-4 leaves out is of the order of its square, 1e-8 of the slope.
    # The weights, 1 over the number of labels, are rounded once to float32
    assert max(errors) < rounding_bound(1)
