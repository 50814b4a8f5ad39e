"""Loading and saving: what is tolerated, what is refused, and that nothing changes on the way."""
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import flexidepth
from flexidepth import TRAINED, Config, FlexiDepth, Tokenizer

CACHES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


def change_config(folder, **changes):
    """Change settings of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def copy_tensors(file):
    """The tensors of a file, in memory of their own, so that the file can be written anew."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def change_tensors(folder, change):
    """Let `change` edit the dict of a folder's tensors."""
    file = folder / "model.safetensors"
    tensors = copy_tensors(file)
    change(tensors)
    save_file(tensors, file)


def dtypes(model):
    return {p.dtype for p in model.parameters()}


def assert_same_tensors(model, other):
    state, others = model.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    for name, tensor in state.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


# ---- Routers and adapters ------------------------------------------------------------------------
def test_routing_layers_of_new_routers(folder):
    """New routers may stand in other layers than those asked for."""
    assert FlexiDepth.from_pretrained(folder).config.routing_layers == [2, 3]
    model = FlexiDepth.from_pretrained(folder, routing_layers=[3, 0])
    assert model.config.routing_layers == [0, 3]
    routed = [layer.router is not None for layer in model.model.layers]
    assert routed == [True, False, False, True]


@pytest.mark.parametrize("target", ["trained.safetensors", "a/folder"])
def test_save_and_load_round_trip(folder, tmp_path, target):
    """A tensor may be left out, renamed or rounded on its way through the file."""
    model = FlexiDepth.from_pretrained(folder, routing_layers=[1, 2])
    file = model.save_flexidepth(tmp_path / target)
    assert sorted(load_file(file)) == sorted(n for n in model.state_dict() if TRAINED.match(n))
    again = FlexiDepth.from_pretrained(folder, flexidepth=tmp_path / target)
    assert again.config.routing_layers == [1, 2]
    assert_same_tensors(again, model)


def test_a_threshold_goes_with_its_routers(folder, tmp_path):
    """Routers that were trained with another threshold may be used with 0.5."""
    model = FlexiDepth.from_pretrained(folder)
    assert model.config.threshold == 0.5
    model.config.threshold = 0.1 + 0.2
    file = model.save_flexidepth(tmp_path / "out")
    with safe_open(file, "pt") as opened:
        assert float(opened.metadata()["threshold"]) == 0.1 + 0.2
    again = FlexiDepth.from_pretrained(folder, flexidepth=file)
    assert again.config.threshold == 0.1 + 0.2

    save_file(copy_tensors(file), file)  # Files of others have no such metadata.
    assert FlexiDepth.from_pretrained(folder, flexidepth=file).config.threshold == 0.5


@pytest.mark.parametrize("error", [SafetensorError("No space left"), OSError(28, "No space left")])
def test_save_leaves_what_was_there(folder, tmp_path, monkeypatch, error):
    """A disk that is full in the middle of writing may cost the last good file, or leave litter."""
    model = FlexiDepth.from_pretrained(folder)
    file = model.save_flexidepth(tmp_path / "out")
    before = file.read_bytes()

    def no_space(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half")
        raise error

    monkeypatch.setattr(flexidepth, "save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        model.save_flexidepth(tmp_path / "out")
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("shards", [1, 3])
def test_released_layout(tmp_path, write_checkpoint, shards):
    """Layers and widths may be taken from a config.json that says nothing, or something else, in
    place of the router tensors themselves."""
    folder = write_checkpoint(tmp_path, routers=True, shards=shards, routing_layers=[1, 3],
                              router_size=5, adapter_size=7)
    change_config(folder, model_type="ddllama", routing_layers=[0], router_size=None,
                  adapter_size=None)
    model = FlexiDepth.from_pretrained(folder)
    assert model.config.routing_layers == [1, 3]
    assert (model.config.router_size, model.config.adapter_size) == (5, 7)
    assert_same_tensors(FlexiDepth.from_pretrained(folder, flexidepth=folder), model)


# ---- Dtypes --------------------------------------------------------------------------------------
def test_dtype(tmp_path, write_checkpoint, ids):
    """A checkpoint in bfloat16 may be silently upcast, or its routers left in another dtype."""
    folder = write_checkpoint(tmp_path, dtype=torch.bfloat16)
    model = FlexiDepth.from_pretrained(folder)
    assert dtypes(model) == {torch.bfloat16} == {model(ids(1, 4)).logits.dtype}
    assert dtypes(FlexiDepth.from_pretrained(folder, dtype=torch.float32)) == {torch.float32}


def test_trained_dtype(tmp_path, write_checkpoint, ids):
    """Routers and adapters may be trained in bfloat16, in which small steps are lost, or the base
    may become float32 with them. In use they run as rounded to the base's dtype."""
    folder = write_checkpoint(tmp_path, dtype=torch.bfloat16)
    model = FlexiDepth.from_pretrained(folder, trained_dtype=torch.float32)
    for name, p in model.named_parameters():
        expected = torch.float32 if TRAINED.match(name) else torch.bfloat16
        assert p.dtype == expected and p.requires_grad == bool(TRAINED.match(name)), name

    file = model.save_flexidepth(tmp_path / "out")
    again = FlexiDepth.from_pretrained(folder, file, trained_dtype=torch.float32)
    assert_same_tensors(again, model)
    used = FlexiDepth.from_pretrained(folder, file)
    assert dtypes(used) == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        trained = model(ids(2, 30))
    out = used(ids(2, 30))
    assert torch.equal(out.gates, trained.gates) and torch.equal(out.kept, trained.kept)
    assert torch.equal(out.logits, trained.logits)


@pytest.mark.parametrize("settings, expected", [
    ({"torch_dtype": "float16"}, torch.float16),
    ({"dtype": "float16", "torch_dtype": None}, torch.float16),
    ({}, torch.bfloat16), ({"torch_dtype": "auto"}, torch.bfloat16),
])
def test_mixed_dtypes(tmp_path, write_checkpoint, ids, settings, expected):
    """A checkpoint whose norms are float32 may fail in a product of two dtypes."""
    folder = write_checkpoint(tmp_path, dtype=torch.bfloat16)
    change_config(folder, **settings)

    def upcast_norms(tensors):
        for name in tensors:
            if "norm" in name:
                tensors[name] = tensors[name].float()

    change_tensors(folder, upcast_norms)
    model = FlexiDepth.from_pretrained(folder)
    assert dtypes(model) == {expected} == {model(ids(1, 4)).logits.dtype}


# ---- Files as others write them ------------------------------------------------------------------
def test_rotary_frequencies_in_a_file(folder):
    """Files of older trainers hold inv_freq of each layer, which has no place in this model."""
    model = FlexiDepth.from_pretrained(folder, flexidepth=None)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.rotary_emb.inv_freq"] = torch.ones(4)

    change_tensors(folder, add)
    again = FlexiDepth.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert TRAINED.match(name) or torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("names", [["lm_head.weight"], ["model.embed_tokens.weight"],
                                   ["lm_head.weight", "model.embed_tokens.weight"]], ids=len)
def test_names_of_a_tied_head(tmp_path, write_checkpoint, names):
    """A tied head is stored under either name or both, and only one of them may be understood."""
    folder = write_checkpoint(tmp_path, routers=True, tie_word_embeddings=True)
    expected = FlexiDepth(FlexiDepth.from_pretrained(folder).config)
    expected.load_state_dict(copy_tensors(folder / "model.safetensors"))

    def rename(tensors):
        embedding = tensors.pop("model.embed_tokens.weight")
        for name in names:
            tensors[name] = embedding.clone()

    change_tensors(folder, rename)
    assert_same_tensors(FlexiDepth.from_pretrained(folder), expected)


def test_home_is_expanded(folder, tmp_path, monkeypatch):
    """A shell leaves ~ in --model=~/llama as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    model = FlexiDepth.from_pretrained("~/llama")
    model.save_flexidepth(tmp_path / "out")
    for source in ("~/out", "~/out/flexidepth.safetensors"):
        assert_same_tensors(FlexiDepth.from_pretrained("~/llama", flexidepth=source), model)


# ---- The hub's cache -----------------------------------------------------------------------------
@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """Variables that name no cache, and an empty home."""
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("variable, below", [
    ("HF_HUB_CACHE", "."), ("HUGGINGFACE_HUB_CACHE", "."), ("HF_HOME", "hub"),
    ("XDG_CACHE_HOME", "huggingface/hub"), ("HOME", ".cache/huggingface/hub"),
])
def test_hub_name(tmp_path, monkeypatch, no_cache, write_checkpoint, variable, below):
    """A model that was downloaded may not be found, or an older snapshot of it may be taken."""
    repository = tmp_path / "cache" / below / "models--some--Llama"
    for vocab_size, name in ((40, "abc"), (41, "def")):
        write_checkpoint(repository / "snapshots" / name, vocab_size=vocab_size)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    assert FlexiDepth.from_pretrained("some/Llama").config.vocab_size == 40


def test_a_cache_without_refs(tmp_path, monkeypatch, no_cache, write_checkpoint):
    """A snapshot that was copied, or downloaded by its commit, has no refs/main."""
    snapshots = tmp_path / "models--some--Llama" / "snapshots"
    for age, name in ((1, "b"), (3, "a"), (2, "c")):
        write_checkpoint(snapshots / name, vocab_size=40 + age)
        os.utime(snapshots / name, (1_700_000_000 - age, 1_700_000_000 - age))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert FlexiDepth.from_pretrained("some/Llama").config.vocab_size == 41  # the newest


def test_order_of_the_caches(tmp_path, monkeypatch, no_cache, write_checkpoint):
    """Where several variables are set, another cache than that of the hub's own client may win."""
    below = {"XDG_CACHE_HOME": "huggingface/hub", "HF_HOME": "hub", "HUGGINGFACE_HUB_CACHE": ".",
             "HF_HUB_CACHE": "."}
    for vocab_size, (variable, place) in enumerate(below.items(), 40):
        folder = tmp_path / variable / place / "models--some--Llama" / "snapshots" / "abc"
        write_checkpoint(folder, vocab_size=vocab_size)
        monkeypatch.setenv(variable, str(tmp_path / variable))
        assert FlexiDepth.from_pretrained("some/Llama").config.vocab_size == vocab_size


def test_a_name_that_is_not_in_the_cache(no_cache):
    """A model that is not there may be refused without a word how to get it."""
    with pytest.raises(FileNotFoundError, match="hf download some/Llama"):
        FlexiDepth.from_pretrained("some/Llama")


# ---- Refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize("change, word", [
    ({"hidden_act": "gelu"}, "gelu"), ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"), ({"sliding_window": 4096}, "sliding_window"),
    ({"model_type": "qwen2"}, "qwen2"), ({"rope_scaling": {"type": "yarn", "factor": 2}}, "yarn"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, "linear"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor"),
    ({"rope_scaling": "linear"}, "config.json"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3"), ({"routing_layers": [9]}, "9"),
    ({"vocab_size": None}, "vocab_size"), ({"hidden_size": 64}, "size mismatch"),
    ({"hidden_size": "32"}, "config.json"), ({"num_attention_heads": 0}, "config.json"),
])
def test_config_that_would_compute_something_else(folder, change, word):
    """A setting that is ignored gives wrong text without a word."""
    change_config(folder, **change)
    with pytest.raises(ValueError, match=word):
        FlexiDepth.from_pretrained(folder)


@pytest.mark.parametrize("content, error, words", [
    ({}, FileNotFoundError, "model.safetensors"),
    ({"model.safetensors": b"half"}, ValueError, "model.safetensors: not a whole safetensors file"),
    ({"model.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"},
     ValueError, "model.safetensors: a Git LFS pointer.*git lfs pull"),
    ({"pytorch_model.bin": b"x"}, FileNotFoundError, "only.*model.safetensors"),
    ({"model-00001-of-00002.safetensors": b"x"}, FileNotFoundError, "no model.safetensors.index"),
    ({"model.safetensors.index.json": b'{"weight_map": {"a": "model-1-of-2.safetensors"}}'},
     FileNotFoundError, "model-1-of-2.safetensors"),
    ({"model.safetensors.index.json": b"["}, ValueError, "index.json: not a JSON object"),
], ids=["none", "half", "lfs", "bin", "no index", "no shard", "no json"])
def test_folders_without_whole_weights(folder, content, error, words):
    """Each fault must have a message of its own, which names the file and the remedy."""
    (folder / "model.safetensors").unlink()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    with pytest.raises(error, match=words):
        FlexiDepth.from_pretrained(folder)


def test_a_truncated_file(folder):
    """A download that was cut off may load in part."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors: not a whole safetensors file"):
        FlexiDepth.from_pretrained(folder)


@pytest.mark.parametrize("change, words", [
    (lambda tensors: tensors.clear(), "model.safetensors|model.embed_tokens|model.layers"),
    (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight"),
    (lambda tensors: tensors.pop("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    (lambda tensors: tensors.update({f"transformer.h.{i}.attn.bias": torch.ones(1)
                                     for i in range(500)}), "transformer.h"),
    (lambda tensors: tensors.update({"x" * 500: torch.ones(1)}), "xxx"),
    (lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}), "model.norm.*31"),
], ids=["empty", "norm", "embedding", "unknown", "long", "shape"])
def test_tensors_with_wrong_names(folder, change, words):
    """A file of another model may fill screens with names, or load in part."""
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=words) as error:
        FlexiDepth.from_pretrained(folder)
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)


def test_other_faults(folder, tmp_path):
    """Each fault must have a message of its own."""
    def refused(error, words, **options):
        with pytest.raises(error, match=words):
            FlexiDepth.from_pretrained(folder, **options)

    refused(ValueError, "routing_layers", routing_layers=[4])
    refused(FileNotFoundError, "no flexidepth.safetensors", flexidepth=folder)
    refused(FileNotFoundError, "nothing", flexidepth=tmp_path / "nothing.safetensors")
    file = FlexiDepth.from_pretrained(folder).save_flexidepth(tmp_path)
    refused(ValueError, r"trained are \[2, 3\]", flexidepth=file, routing_layers=[1])
    (folder / "config.json").write_text("{")
    refused(ValueError, "config.json: not a JSON object")
    (folder / "config.json").unlink()
    refused(FileNotFoundError, "config.json")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "mps:7"])
def test_a_device_that_is_not_there(folder, device):
    """A device that is misspelled, or that this machine lacks, may end in a traceback."""
    with pytest.raises(ValueError, match=device):
        FlexiDepth.from_pretrained(folder, device=device)


# ---- save_pretrained -----------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained(tmp_path, write_checkpoint, write_ranks, dtype, tied):
    """The saved folder may lack a tensor, a setting or a tokenizer file, or be read otherwise."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}
    base = write_checkpoint(tmp_path / "base", dtype, tie_word_embeddings=tied, rope_theta=500.0,
                            rope_scaling=rope, eos_token_id=[3, 4])
    write_ranks(base / "original", b" cat")
    files = {"tokenizer_config.json": "{}", "chat_template.jinja": "<|start_header_id|>",
             "special_tokens_map.json": "{}", "generation_config.json": '{"eos_token_id": 5}'}
    for name, content in files.items():
        (base / name).write_text(content)
    model = FlexiDepth.from_pretrained(base, routing_layers=[1, 3])
    model.config.threshold = 0.4
    model.save_pretrained(tmp_path / "new" / "folder")
    (base / "config.json").unlink()  # The new folder must not need the old one.

    folder = tmp_path / "new" / "folder"
    again = FlexiDepth.from_pretrained(folder)
    assert_same_tensors(again, model)
    assert again.config == model.config
    assert torch.equal(again.frequencies, model.frequencies)
    settings = json.loads((folder / "config.json").read_text())
    assert settings["model_type"] == "ddllama" and settings["routing_layers"] == [1, 3]
    for name, content in files.items():
        assert (folder / name).read_text() == content
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode(" cat") == [256] and tokenizer.stop_ids >= {3, 4, 5}
    assert tokenizer.chat_format == "llama3"
    assert not [file for file in folder.rglob("*") if file.name.startswith(".")]


@pytest.mark.parametrize("rope", [None, {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32}])
def test_save_pretrained_of_a_made_model(tmp_path, rope):
    """A model that was made from a Config, and not loaded, may lose its kind of rotation."""
    config = Config(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                    num_attention_heads=4, rope_scaling=rope)
    model = FlexiDepth(config)
    model.save_pretrained(tmp_path / "new")
    again = FlexiDepth.from_pretrained(tmp_path / "new")
    assert_same_tensors(again, model)
    assert torch.equal(again.frequencies, model.frequencies)


def test_save_pretrained_rounds_to_the_base(tmp_path, write_checkpoint):
    """Routers that were trained in float32 may be saved so, and the folder then has two dtypes."""
    base = write_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    model = FlexiDepth.from_pretrained(base, trained_dtype=torch.float32)
    model.save_pretrained(tmp_path / "new")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert_same_tensors(FlexiDepth.from_pretrained(tmp_path / "new"), model.to(torch.bfloat16))


def test_save_pretrained_spares_the_base(folder):
    """Saving into the base's own folder would overwrite the pre-trained model."""
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="another one"):
        FlexiDepth.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_save_pretrained_that_fails_leaves_the_old_model(folder, tmp_path, monkeypatch):
    """A full disk may leave the new config.json beside the old weights, which do not fit it."""
    FlexiDepth.from_pretrained(folder, routing_layers=[1]).save_pretrained(tmp_path / "new")
    before = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
    other = FlexiDepth.from_pretrained(folder, routing_layers=[2])

    def fail(*arguments):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(flexidepth, "save_file", fail)
    with pytest.raises(OSError, match="not written"):
        other.save_pretrained(tmp_path / "new")
    assert {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()} == before


def test_save_pretrained_beside_folders(folder, tmp_path):
    """A base with a folder among its tokenizer's files, as transformers writes for a model with
    several chat templates, may not be saved at all."""
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("x")
    FlexiDepth.from_pretrained(folder).save_pretrained(tmp_path / "new")


@pytest.mark.parametrize("layers, expected", [(1, [0]), (3, [1, 2]), (5, [2, 3, 4])])
def test_latter_half_of_an_odd_number(tmp_path, write_checkpoint, layers, expected):
    """Half of an odd number of layers may be rounded the other way, which for one layer is none."""
    folder = write_checkpoint(tmp_path, num_hidden_layers=layers)
    assert FlexiDepth.from_pretrained(folder).config.routing_layers == expected


def test_a_shard_gives_what_the_index_names(tmp_path, write_checkpoint):
    """A stale copy of a tensor in another shard may win over the one that the index names."""
    folder = write_checkpoint(tmp_path, routers=True, shards=3)
    expected = FlexiDepth.from_pretrained(folder)
    stale = {name: tensor + 1 for name, tensor in expected.state_dict().items()}
    for file in folder.glob("model-*.safetensors"):
        save_file(stale | copy_tensors(file), file)
    assert_same_tensors(FlexiDepth.from_pretrained(folder), expected)


def test_save_pretrained_names_one_dtype(folder, tmp_path):
    """config.json may name the dtype of the base's file beside that in which it was saved."""
    change_config(folder, dtype="float32")
    FlexiDepth.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "new")
    settings = json.loads((tmp_path / "new" / "config.json").read_text())
    assert settings["torch_dtype"] == "bfloat16" and "dtype" not in settings


def test_the_embedding_wins_over_a_tied_head(tmp_path, write_checkpoint):
    """A stale head beside the embedding that it is tied to may take its place."""
    folder = write_checkpoint(tmp_path, tie_word_embeddings=True)
    expected = copy_tensors(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": expected + 1}))
    assert torch.equal(FlexiDepth.from_pretrained(folder).model.embed_tokens.weight, expected)


def test_threshold_of_a_whole_model(folder, tmp_path):
    """Routers taken from a folder that save_pretrained wrote may lose their threshold."""
    model = FlexiDepth.from_pretrained(folder)
    model.config.threshold = 0.7
    model.save_pretrained(tmp_path / "new")
    again = FlexiDepth.from_pretrained(folder, flexidepth=tmp_path / "new")
    assert again.config.threshold == 0.7
