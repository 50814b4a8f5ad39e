"""What several test files share, as fixtures, because tests import nothing from each other.

The tests import flexidepth.py, train.py and sample.py from the folder above this one, however
pytest is started. Two environment variables name real files, which most machines do not have:

    FLEXIDEPTH_TEST_DATA   a folder of real data; by default shared/data beside the checkout
    FLEXIDEPTH_SMOLLM2     the folder of SmolLM2-135M-Instruct, as downloaded from the hub

Tests that need such files skip where they are absent.
"""
import base64
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # On a busy machine two threads wait for each other 40 times longer.

from flexidepth import FlexiDepth, read_config  # noqa: E402

CONFIG = {"model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48,
          "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
          "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}


@pytest.fixture
def data() -> Path:
    """The folder of real data."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FLEXIDEPTH_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip("no folder of real data; FLEXIDEPTH_TEST_DATA can name one")
    return folder


@pytest.fixture
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct."""
    folder = os.environ.get("FLEXIDEPTH_SMOLLM2")
    if not folder:
        pytest.skip("FLEXIDEPTH_SMOLLM2 names no folder")
    return Path(folder)


@pytest.fixture
def ids():
    """A function: shape -> random ids of the 40 tokens of `write_checkpoint`, always the same."""
    def random_ids(*shape: int) -> torch.Tensor:
        return torch.randint(40, shape, generator=torch.Generator().manual_seed(1))

    return random_ids


@pytest.fixture
def write_checkpoint():
    """A function that writes a random Llama of four layers in the official layout.

    routers: with routers and adapters in the latter two layers, or in those of routing_layers.
    shards: the number of weight files. Further arguments are settings of config.json. Returns the
    folder."""
    def write(folder: Path, dtype=torch.float32, routers=False, shards=1, **settings) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(CONFIG | settings))
        torch.manual_seed(0)
        model = FlexiDepth(read_config(folder / "config.json"))
        state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        names = sorted(name for name in state if routers or ".router" not in name)
        for i in range(shards):
            part = f"-{i + 1:05}-of-{shards:05}" if shards > 1 else ""
            tensors = {name: state[name] for name in names[i::shards]}
            save_file(tensors, folder / f"model{part}.safetensors")
        return folder

    return write


@pytest.fixture
def folder(tmp_path, write_checkpoint) -> Path:
    """A random Llama without routers, in float32."""
    return write_checkpoint(tmp_path / "llama")


@pytest.fixture
def model(folder) -> FlexiDepth:
    """This Llama, with new routers in layers 2 and 3, whose gates lie on both sides of 0.5."""
    torch.manual_seed(1)
    return FlexiDepth.from_pretrained(folder)


@pytest.fixture
def write_ranks():
    """A function that writes Meta's tokenizer.model: the 256 bytes, then the given tokens."""
    def write(folder: Path, *tokens: bytes) -> None:
        every = [*(bytes([b]) for b in range(256)), *tokens]
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(every)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_text("".join(lines))

    return write
