"""Clips that are whole, whatever wraps them, and clips that are not. Made by soundfile, numpy and bytes."""

import struct

import librosa
import numpy as np
import pytest
import soundfile

import dataset
from dataset import UserError
from tests.manual import make_manifests

KINDS = {  # suffix, soundfile's settings
    "wav 16 bit": ("wav", {"subtype": "PCM_16"}),
    "wav 24 bit": ("wav", {"subtype": "PCM_24"}),
    "wav float": ("wav", {"subtype": "FLOAT"}),
    "wav extensible": ("wav", {"format": "WAVEX", "subtype": "PCM_16"}),
    "rf64": ("wav", {"format": "RF64", "subtype": "PCM_16"}),
    "w64": ("w64", {"subtype": "PCM_16"}),
    "aiff": ("aiff", {"subtype": "PCM_16"}),
    "flac": ("flac", {}),
    "ogg vorbis": ("ogg", {"subtype": "VORBIS"}),
    "ogg opus": ("opus", {"format": "OGG", "subtype": "OPUS"}),
    "mp3 constant": ("mp3", {"bitrate_mode": "CONSTANT", "compression_level": 0.5}),
    "mp3 variable": ("mp3", {"bitrate_mode": "VARIABLE", "compression_level": 0.5}),
}
PICTURE = b"\xff\xd8\xff\xe0" + np.random.default_rng(0).bytes(60_000)  # as random as a compressed one
ID3 = b"ID3\3\0\0" + bytes([0, 3, 86, 110]) + b"APIC" + struct.pack(">IH", 60_004, 0) + PICTURE
ID3 += bytes(10 + (3 * 128 + 86) * 128 + 110 - len(ID3))
APE = b"APETAGEX" + struct.pack("<IIII8x", 2000, len(PICTURE) + 55, 1, 0xA0000000)
APE += struct.pack("<II", len(PICTURE), 2) + b"Cover Art (Front)\0" + PICTURE[:-3]
LIST = b"LIST" + struct.pack("<I", 4012) + b"INFOICMT" + struct.pack("<I", 4000) + b"a b " * 1000
MADE = [("wav 16 bit", 24_000, 1), ("mp3 constant", 24_000, 1), ("mp3 variable", 44_100, 2)]


def speech_like(seconds, rate):
    """Loud and soft by turns, so that a variable bit rate varies; the first is the loudest."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(7).normal(size=len(time)) * 0.2
    return noise * np.exp(-3 * (time % 1)) * np.exp(-time) + 0.05 * np.sin(2 * np.pi * 220 * time)


def make(folder, kind, seconds=3.0, rate=24_000, channels=1):
    suffix, settings = KINDS[kind]
    path = folder / f"{kind.replace(' ', '_')}_{rate}_{seconds}.{suffix}"
    wave = speech_like(seconds, rate)
    soundfile.write(path, np.stack([wave] * channels, axis=1), rate, **settings)
    return path


def frame_size(header):
    """Bytes of an mp3 frame, from its first four."""
    mpeg1 = header[1] & 8
    rates = [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320]
    rates = rates if mpeg1 else [0, *range(8, 65, 8), *range(80, 161, 16)]
    sample_rate = [44_100, 48_000, 32_000][header[2] >> 2 & 3] // (1 if mpeg1 else 2)
    return (144 if mpeg1 else 72) * 1000 * rates[header[2] >> 4] // sample_rate + (header[2] >> 1 & 1)


def without_xing(content):
    assert make_manifests.XING.match(content)
    return content[frame_size(content) :]


def save(path, content):
    path = path.with_name(f"changed_{path.name}")
    path.write_bytes(content)
    return path


def assert_as_inference(path, seconds=None):
    wave = make_manifests.load_whole(str(path), 24_000)
    expected, _ = librosa.load(path, sr=24_000)
    # To the bit: both decode and resample the same bytes by the same calls, in one thread
    assert np.array_equal(wave, expected) and wave.dtype == np.float32
    assert seconds is None or abs(len(wave) / 24_000 - seconds) < 0.0005
    return len(wave) / 24_000


@pytest.mark.parametrize("rate, channels", [(24_000, 1), (48_000, 2), (16_000, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_clips_are_those_of_inference(tmp_path, kind, rate, channels):
    assert_as_inference(make(tmp_path, kind, 1.337, rate, channels), 1.337)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.3, 0.5, 0.9, 0.99])
def test_cut_clips_are_refused(tmp_path, kind, part):
    content = make(tmp_path, kind).read_bytes()
    path = save(tmp_path / f"cut.{KINDS[kind][0]}", content[: int(len(content) * part)])
    with pytest.raises(UserError, match=f"{path}: .* again"):
        make_manifests.load_whole(path, 24_000)


@pytest.mark.parametrize("kind", ["ogg vorbis", "ogg opus"])
def test_an_ogg_cut_in_the_header_of_its_last_page_is_refused(tmp_path, kind):
    content = make(tmp_path, kind).read_bytes()
    for left in (6, 10, 26):
        path = save(tmp_path / "cut.ogg", content[: content.rindex(b"OggS\0") + left])
        with pytest.raises(UserError, match="its last page is missing: fetch it again"):
            make_manifests.load_whole(path, 24_000)


def test_a_wav_whose_header_tells_a_wrong_byte_rate_is_whole(tmp_path):
    """libsndfile's log says of that number, too, what it should be."""
    content = bytearray(make(tmp_path, "wav 16 bit").read_bytes())
    content[28:32] = struct.pack("<I", 96_000)
    assert_as_inference(save(tmp_path / "a.wav", content), 3.0)


@pytest.mark.parametrize("rate", [24_000, 44_100])
def test_a_cut_mp3_without_xing_is_refused_unless_cut_between_frames(tmp_path, rate):
    """Then nothing tells its length. Here five of a frame's bytes are gone, or there."""
    content = without_xing(make(tmp_path, "mp3 constant", rate=rate).read_bytes())
    starts = [0]
    while starts[-1] < len(content):
        starts.append(starts[-1] + frame_size(content[starts[-1] :]))
    for start in starts[len(starts) // 2 : -1 : 20]:
        for cut in (start - 5, start + 5):
            with pytest.raises(UserError, match="its last frame is cut: fetch it again"):
                make_manifests.load_whole(save(tmp_path / "a.mp3", content[:cut]), 24_000)
        assert_as_inference(save(tmp_path / "a.mp3", content[:start]))
    assert_as_inference(save(tmp_path / "a.mp3", content))


@pytest.mark.parametrize(
    "kind", ["wav 16 bit", "wav float", "rf64", "flac", "ogg vorbis", "ogg opus", *list(KINDS)[-2:]]
)
def test_joined_clips_are_refused(tmp_path, kind):
    """The second one short, too. soundfile itself refuses wav."""
    first, second = (make(tmp_path, kind, seconds).read_bytes() for seconds in (2.0, 0.3))
    for joined in (first + second, second + first):
        with pytest.raises(UserError, match="write it again,? as wav"):
            make_manifests.load_whole(save(tmp_path / f"joined.{KINDS[kind][0]}", joined), 24_000)


def test_joined_mp3_with_tags_between_and_without_xing(tmp_path):
    constant = make(tmp_path, "mp3 constant").read_bytes()
    with pytest.raises(UserError, match="bytes follow: write it again, as wav"):
        make_manifests.load_whole(
            save(tmp_path / "a.mp3", constant + b"TAG" + bytes(125) + ID3 + constant), 24_000
        )
    bare = without_xing(constant)
    path = save(tmp_path / "a.mp3", bare + bare)  # all of it is decoded
    assert assert_as_inference(path) == pytest.approx(6, abs=0.2)


def test_variable_bit_rate_without_xing_is_refused_where_sound_is_left(tmp_path):
    """libsndfile takes the first frame's bit rate for all."""
    content = without_xing(make(tmp_path, "mp3 variable", 8.0, 44_100).read_bytes())
    path = save(tmp_path / "a.mp3", content)
    assert soundfile.info(path).duration < 6
    with pytest.raises(UserError, match=r"[1-5]\.\d+ s of it are decoded, but \d+ of its \d+ bytes follow"):
        make_manifests.load_whole(path, 24_000)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000, 0x7FFFFFFF, 0x80000000])
def test_a_streamed_wav_is_whole(tmp_path, size):
    """Its writer could not go back to its header."""
    content = bytearray(make(tmp_path, "wav 16 bit").read_bytes())
    content[4:8] = content[40:44] = struct.pack("<I", size)
    assert_as_inference(save(tmp_path / "a.wav", content), 3.0)


@pytest.mark.parametrize("wrong", [-8, 0, 36])
def test_a_wav_header_may_be_off_by_its_own_size(tmp_path, wrong):
    content = bytearray(make(tmp_path, "wav 16 bit").read_bytes())
    content[4:8] = struct.pack("<I", len(content) + wrong)
    assert_as_inference(save(tmp_path / "a.wav", content), 3.0)


@pytest.mark.parametrize(
    "tail", [LIST, b"TAG" + bytes(125), ID3, bytes(4096), bytes(3)], ids=lambda tail: tail[:4]
)
def test_what_follows_the_samples_of_a_wav(tmp_path, tail):
    content = bytearray(make(tmp_path, "wav 16 bit").read_bytes())
    assert_as_inference(save(tmp_path / "a.wav", content + tail), 3.0)
    content[4:8] = struct.pack("<I", len(content + tail) - 8)
    assert_as_inference(save(tmp_path / "b.wav", content + tail), 3.0)


def test_what_precedes_the_samples_of_a_wav(tmp_path):
    """4000 bytes of text fill libsndfile's log: the size that it tells comes first."""
    content = make(tmp_path, "wav 16 bit").read_bytes()
    content = b"RIFF" + struct.pack("<I", len(content + LIST) - 8) + content[8:36] + LIST + content[36:]
    assert_as_inference(save(tmp_path / "a.wav", content), 3.0)
    with pytest.raises(
        UserError, match=r"only \d+ of the \d+ bytes that its header tells are there: fetch it again"
    ):
        make_manifests.load_whole(save(tmp_path / "a.wav", content[:-1000]), 24_000)


@pytest.mark.parametrize("xing", [True, False])
@pytest.mark.parametrize(
    "head, tail",
    [(ID3, b""), (b"", b"TAG" + bytes(125)), (b"", APE), (ID3, APE + b"TAG" + bytes(125))],
    ids=["id3v2 with a picture", "id3v1", "ape with a picture", "all"],
)
def test_tags_of_an_mp3(tmp_path, head, tail, xing):
    content = make(tmp_path, "mp3 constant", rate=44_100).read_bytes()
    content = content if xing else without_xing(content)
    assert_as_inference(save(tmp_path / "a.mp3", head + content + tail), 3.0 if xing else None)


@pytest.mark.parametrize("kind", ["ogg vorbis", "ogg opus", "flac"])
def test_what_follows_ogg_and_flac(tmp_path, kind):
    content = make(tmp_path, kind).read_bytes()
    for tail in (bytes(512), b"TAG" + bytes(125)):
        assert_as_inference(save(tmp_path / f"a.{KINDS[kind][0]}", content + tail), 3.0)


def test_mp3_of_all_lengths_are_whole(tmp_path):
    """An encoder's last frames may be padding, which is not read."""
    for samples in range(2400, 5000, 61):
        assert_as_inference(make(tmp_path, "mp3 constant", samples / 24_000), samples / 24_000)


def test_a_flac_of_unknown_length_gets_a_command_that_mends_it(tmp_path):
    """Written into a pipe, its writer could not go back to its header: the number of samples there is 0."""
    content = bytearray(make(tmp_path, "flac").read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path = save(tmp_path / "a.flac", content)
    with pytest.raises(
        UserError, match=f"{path}: its header does not tell .* as wav: ffmpeg -i {path} NEW.wav"
    ):
        make_manifests.load_whole(str(path), 24_000)
    with pytest.raises(UserError, match="its header tells no length"):
        dataset.load_waveform(str(path), 24_000)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_takes_whole_clips_and_refuses_halves(tmp_path, kind):
    """What it checks, of clips that did not come by make_manifests. Nothing tells it how long an Ogg is."""
    path = make(tmp_path, kind, 1.337)
    # To the bit: the same calls, in one thread
    assert np.array_equal(dataset.load_waveform(str(path), 24_000), librosa.load(path, sr=24_000)[0])
    content = make(tmp_path, kind).read_bytes()
    path = save(tmp_path / f"cut.{KINDS[kind][0]}", content[: len(content) // 2])
    if "ogg" not in kind:
        with pytest.raises(UserError, match=f"{path}: .* write it again"):
            dataset.load_waveform(path, 24_000)


@pytest.mark.parametrize("tail", [b"", b"TAG" + bytes(125), APE[:4000]])
def test_the_trainer_takes_an_mp3_with_tags_and_without_xing(tmp_path, tail):
    content = without_xing(make(tmp_path, "mp3 constant", 8.0).read_bytes())
    dataset.load_waveform(save(tmp_path / "a.mp3", content + tail), 24_000)
