"""The tiny checkpoint, built once a session, and the trainer's own view of manifests over its clips."""

import gc
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

FOLDER = Path(tempfile.mkdtemp(prefix="tiny_checkpoint_"))
# huggingface_hub reads these once, when it is imported: by the tests' files, later. Nor is anything else
# imported here that takes seconds: pytest-xdist's own process, which runs no test, comes here first
os.environ.update(
    HF_HOME=f"{FOLDER}/huggingface",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # two workers share two cores
    CUDA_VISIBLE_DEVICES="",
)  # where there is one GPU it cannot have two ranks


def pytest_unconfigure():
    shutil.rmtree(FOLDER)


def pytest_collection_modifyitems(items):
    """Fast tests first; then a few short trainings; then the long ones, the longest of all first, so that
    the two workers end at about the same time."""
    last = [
        "test_output",
        "test_merge",
        "test_training",
        "test_inputs",
        "test_readme",
        "test_cuda",
        "test_workers",
        "test_kills",
        "test_ranks",
        "test_hub",
        "test_controls",
        "test_recordings",
        "test_listen",
        "test_preflight",
        "test_benchmark",
    ]
    items.sort(key=lambda item: last.index(item.path.stem) if item.path.stem in last else -1)


@pytest.fixture(scope="session")
def tiny():
    """Folder with model, codec, clips/ and train.json (see tiny_checkpoint.py)."""
    from tests.support import tiny_checkpoint

    tiny_checkpoint.make_everything(FOLDER)
    return FOLDER


@pytest.fixture(scope="session", autouse=True)
def process_group():
    """A group of one rank, as trainer.py makes without torchrun: its functions ask for the world size."""
    import torch

    import trainer

    gc.freeze()  # lora.load_base collects each time: not all that was imported, too
    trainer.start()
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def open_data(tiny, tmp_path_factory):
    """Call it with entries (paths as in train.json) and flags: the StepDataset that trainer.py trains on."""
    import torch

    import dataset
    import lora
    import trainer

    def open_data(entries, *flags, model=None):
        manifest = tiny / f"manifest_{len(list(tiny.glob('manifest_*')))}.json"
        manifest.write_text(json.dumps(entries))
        args = trainer.parse_args(
            [
                f"--train_manifest={manifest}",
                f"--base_ckpt={model or tiny / 'model'}",
                f"--audio_tokenizer={tiny / 'codec'}",
                f"--output_dir={tmp_path_factory.mktemp('out')}",
                *flags,
            ]
        )
        cpu = torch.device("cpu")
        data, _, codec, _ = trainer.open_inputs(args, cpu)
        dataset.encode_missing(data.code_files, lambda: lora.load_codec(codec, cpu), num_workers=0)
        return data

    return open_data


@pytest.fixture
def lora_model(tiny):
    """A fresh PeftModel on the tiny base in float32; B is moved off its initial zero, so that A matters."""
    import torch

    import lora

    base = lora.load_base(tiny / "model", torch.float32, "cpu")
    model = lora.attach_lora(base, r=4, alpha=8, dropout=0.0, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


@pytest.fixture(scope="session")
def entries(tiny):
    """The entries of train.json, afresh from the file."""
    return json.loads((tiny / "train.json").read_text())
