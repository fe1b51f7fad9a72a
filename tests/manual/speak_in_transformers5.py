"""Let an adapter of this project speak in transformers >= 5.3, in an environment of its own.

Install it by `pip install "transformers>=5.3" torch peft librosa soundfile`, copy this file there and change
the names below. A clip in the last user turn comes before the text, or every score is masked.
"""

from peft import PeftModel
from transformers import AutoProcessor, HiggsAudioV2ForConditionalGeneration

base, adapter = "tiny/transformers5", "tiny/out"  # or bosonai/higgs-tts-2-3b-base, and out/checkpoint-300
merged = None  # or a new folder for vLLM-Omni, which gets base and adapter as one model
system = "Generate speech in the voice of the reference audio."
reference, text = "tiny/clips/voice_a.wav", "صباح الخير يا صديقي"
# Or what the reference says: then in the second layout, without a system turn, as make_manifests writes it
said = None
said_first = None  # or the text that the reply begins with, where such replies were trained

# The base's own template leaves out a reference in the user's turn. This one gives the ids that were trained.
# A last turn of the assistant's that has a text alone is not finished: the clip follows.
template = (
    "{% set begun = messages[-1].role == 'assistant' and "
    "messages[-1].content | map(attribute='type') | unique | list == ['text'] %}"
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% elif m.role == 'assistant' %}"
    "<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>{% else %}<|audio_bos|><|AUDIO_OUT|><|audio_eos|>{% endif %}"
    "{% endfor %}{% if not (begun and loop.last) %}<|eot_id|>{% endif %}{% endfor %}"
    "{% if not begun %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}<|audio_out_bos|>"
)
prompt = [
    {"role": "system", "content": [{"type": "text", "text": system}]},
    {"role": "user", "content": [{"type": "audio", "url": reference}, {"type": "text", "text": text}]},
]
if said:
    prompt = [
        {"role": "user", "content": [{"type": "text", "text": said}]},
        {"role": "assistant", "content": [{"type": "audio", "url": reference}]},
        {"role": "user", "content": [{"type": "text", "text": text}]},
    ]
if said_first:
    prompt.append({"role": "assistant", "content": [{"type": "text", "text": said_first}]})

processor = AutoProcessor.from_pretrained(base, device_map="auto")
model = HiggsAudioV2ForConditionalGeneration.from_pretrained(base, device_map="auto")
# In place, on the decoder inside; on `model` itself PEFT raises
PeftModel.from_pretrained(model.model, adapter)
inputs = processor.apply_chat_template(
    prompt, chat_template=template, tokenize=True, return_dict=True, return_tensors="pt"
)
frames = model.generate(**inputs.to(model.device), max_new_tokens=1024, do_sample=False)
processor.save_audio(processor.batch_decode(frames)[0], "tiny/answer5.wav")

if merged:
    whole = HiggsAudioV2ForConditionalGeneration.from_pretrained(base, use_text_head=True)
    PeftModel.from_pretrained(whole.model, adapter).merge_and_unload()
    whole.save_pretrained(merged)
    processor.save_pretrained(merged)
