"""Loading and saving: what is tolerated, what is refused, and that nothing changes on the way."""
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexidepth import Config, FlexiDepth, Tokenizer, trained_part, whole_file

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def change_config(folder, **changes):
    """Change settings of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder, change):
    """Let `change` edit the dict of a folder's tensors."""
    file = folder / "model.safetensors"
    # In memory of their own, so that the file can be written anew.
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def dtypes(model):
    return {p.dtype for p in model.parameters()}


def assert_same_tensors(model, other):
    state, others = model.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    for name, tensor in state.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


# ---- Routers and adapters ------------------------------------------------------------------------
@pytest.mark.parametrize("layers, asked, expected", [
    (4, None, [2, 3]), (4, [3, 0], [0, 3]), (1, None, [0]), (3, None, [1, 2]), (5, None, [2, 3, 4]),
])
def test_routing_layers_of_new_routers(tmp_path, write_checkpoint, layers, asked, expected):
    """New routers may stand in other layers than those asked for, and half of an odd number of
    layers may be rounded the other way, which for one layer is none."""
    folder = write_checkpoint(tmp_path, num_hidden_layers=layers)
    model = FlexiDepth.from_pretrained(folder, routing_layers=asked)
    routed = [i for i, layer in enumerate(model.model.layers) if layer.router is not None]
    assert model.config.routing_layers == routed == expected


def test_save_and_load_round_trip(folder, tmp_path, monkeypatch):
    """A tensor may be left out, renamed or rounded on its way through the file. A shell leaves ~ in
    --model=~/llama as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    model = FlexiDepth.from_pretrained("~/llama", routing_layers=[1, 2])
    file = model.save_flexidepth("~/a/folder")
    assert file == tmp_path / "a" / "folder" / "flexidepth.safetensors"
    assert sorted(load_file(file)) == sorted(trained_part(model.state_dict()))
    for source in (file, file.parent, "~/a/folder", "~/a/folder/flexidepth.safetensors"):
        again = FlexiDepth.from_pretrained(folder, flexidepth=source)
        assert again.config.routing_layers == [1, 2]
        assert_same_tensors(again, model)


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
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32], ids=str)
def test_dtype_is_that_of_the_largest_tensor(tmp_path, write_checkpoint, ids, base):
    """A checkpoint in bfloat16 may be silently upcast, or one whose norms are in another dtype may
    fail in a product of two. What config.json says need not be true of the file."""
    folder = write_checkpoint(tmp_path, dtype=base, torch_dtype="float16")

    def change_norms(tensors):
        for name in tensors:
            if "norm" in name:
                tensors[name] = tensors[name].to(torch.float16)

    change_tensors(folder, change_norms)
    model = FlexiDepth.from_pretrained(folder)
    assert dtypes(model) == {base} == {model(ids(1, 4)).logits.dtype}
    assert dtypes(FlexiDepth.from_pretrained(folder, dtype=torch.float64)) == {torch.float64}


def test_training_in_float32(tmp_path, write_checkpoint, ids):
    """Routers and adapters are trained in float32. In use they run as rounded to the base's dtype,
    and may decide otherwise. A whole model that is saved has this one dtype."""
    folder = write_checkpoint(tmp_path, dtype=torch.bfloat16)
    model = FlexiDepth.from_pretrained(folder)
    for name, p in model.named_parameters():
        assert p.requires_grad == (".router" in name), name
        if p.requires_grad:
            p.data = p.data.float() * 1.001  # no longer what bfloat16 can hold

    file = model.save_flexidepth(tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}
    used = FlexiDepth.from_pretrained(folder, file)
    assert dtypes(used) == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        trained = model(ids(2, 30))
    out = used(ids(2, 30))
    assert torch.equal(out.gates, trained.gates) and torch.equal(out.kept, trained.kept)
    assert torch.equal(out.logits, trained.logits)

    model.save_pretrained(tmp_path / "new")
    saved = load_file(tmp_path / "new" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert_same_tensors(FlexiDepth.from_pretrained(tmp_path / "new"), used)


# ---- Files as others write them ------------------------------------------------------------------
def test_rotary_frequencies_in_a_file(folder):
    """Files of older trainers hold inv_freq of each layer, which has no place in this model."""
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.rotary_emb.inv_freq"] = torch.ones(4)

    change_tensors(folder, add)
    FlexiDepth.from_pretrained(folder)


@pytest.mark.parametrize("stored", ["no head", "the embedding again", "another head"])
def test_a_tied_head(tmp_path, write_checkpoint, stored):
    """A tied head is mostly not stored. One that is may be refused, or, where a training run has
    moved it away from the embedding, be dropped without a word."""
    folder = write_checkpoint(tmp_path / "base", routers=True, tie_word_embeddings=True)
    words = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    head = words.flip(0).contiguous() if stored == "another head" else words
    if stored != "no head":
        change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": head}))

    model = FlexiDepth.from_pretrained(folder)
    model.save_pretrained(tmp_path / "new")
    for loaded in (model, FlexiDepth.from_pretrained(tmp_path / "new")):
        assert torch.equal(loaded.model.embed_tokens.weight, words)
        assert torch.equal(loaded.lm_head.weight, head)
        pointers = {loaded.model.embed_tokens.weight.data_ptr(), loaded.lm_head.weight.data_ptr()}
        assert len(pointers) == (1 if stored == "no head" else 2)
    saved = load_file(tmp_path / "new" / "model.safetensors")
    assert ("lm_head.weight" in saved) == (stored != "no head")


# ---- The hub's cache -----------------------------------------------------------------------------
def test_hub_names(tmp_path, monkeypatch, write_checkpoint):
    """A model that was downloaded may not be found, or an older snapshot or that of another cache
    than the hub's be taken. One that is not there may be refused without a word how to get it."""
    for name in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    caches = {"HOME": ".cache/huggingface/hub", "HF_HOME": "hub", "HF_HUB_CACHE": "."}
    for vocab_size, (variable, below) in enumerate(caches.items(), 40):
        monkeypatch.setenv(variable, str(tmp_path / variable))
        with pytest.raises(FileNotFoundError, match="hf download some/Llama"):
            FlexiDepth.from_pretrained("some/Llama")
        repository = tmp_path / variable / below / "models--some--Llama"
        write_checkpoint(repository / "snapshots" / "abc", vocab_size=vocab_size)
        write_checkpoint(repository / "snapshots" / "def", vocab_size=50)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc\n")
        assert FlexiDepth.from_pretrained("some/Llama").config.vocab_size == vocab_size


# ---- Refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize("change, word", [
    ({"hidden_act": "gelu"}, "gelu"), ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"), ({"sliding_window": 4096}, "sliding_window"),
    ({"model_type": "qwen2"}, "qwen2"), ({"rope_scaling": {"type": "yarn", "factor": 2}}, "yarn"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, "linear"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor"),
    ({"rope_scaling": LLAMA3_ROPE | {"factor": "x"}}, "'x'"), ({"rope_scaling": "linear"}, ""),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"num_attention_heads": 0}, ""), ({"num_hidden_layers": 0}, "routing_layers"),
    ({"routing_layers": [9]}, "9"), ({"routing_layers": "23"}, "routing_layers"),
    ({"routing_layers": [[2]]}, ""), ({"routing_layers": []}, "routing_layers"),
    ({"vocab_size": None}, "vocab_size is None"), ({"vocab_size": "40"}, "vocab_size is '40'"),
    ({"hidden_size": 32.0}, "hidden_size is 32.0"), ({"rope_theta": "500"}, "rope_theta"),
    ({"threshold": "0.5"}, "threshold"), ({"rms_norm_eps": None}, "rms_norm_eps"),
], ids=str)
def test_config_that_would_compute_something_else(folder, change, word):
    """A setting that is ignored gives wrong text without a word, and one of another type an error
    from deep inside, if any."""
    change_config(folder, **change)
    with pytest.raises(ValueError, match=f"config.json.*{word}"):
        FlexiDepth.from_pretrained(folder)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"


@pytest.mark.parametrize("content, error, words", [
    ({}, FileNotFoundError, r"model\*.safetensors"),
    ({"pytorch_model.bin": b"x"}, FileNotFoundError, r"model\*.safetensors"),
    ({"model.safetensors": LFS}, ValueError, "model.safetensors: .*a Git LFS pointer.*download"),
    ({"config.json": b"{"}, ValueError, "config.json: not a JSON object"),
    ({"config.json": b"[1]"}, ValueError, "config.json: not a JSON object"),
    ({"config.json": b"\xff"}, ValueError, "config.json: not a JSON object"),
    ({"config.json": b'{"vocab_size": 40}'}, ValueError, "config.json: .*'hidden_size'"),
], ids=["none", "bin", "lfs", "no json", "a list", "no text", "no size"])
def test_folders_with_broken_files(folder, content, error, words):
    """Each fault must have a message of its own, which names the file and the remedy."""
    if "config.json" not in content:
        (folder / "model.safetensors").unlink()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    with pytest.raises(error, match=words):
        FlexiDepth.from_pretrained(folder)


@pytest.mark.parametrize("length", [-100, -1, 0, 4, 500])
def test_a_truncated_file(folder, length):
    """A download that was cut off may load in part."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match="model.safetensors: not a whole safetensors file"):
        FlexiDepth.from_pretrained(folder)


@pytest.mark.parametrize("change, words", [
    (lambda tensors: tensors.clear(), "model.embed_tokens"),
    (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight"),
    (lambda tensors: tensors.pop("lm_head.weight"), "lm_head.weight"),
    (lambda tensors: tensors.pop("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    (lambda tensors: tensors.update({f"transformer.h.{i}.attn.bias": torch.ones(1)
                                     for i in range(500)}), "transformer.h"),
    (lambda tensors: tensors.update({"x" * 500: torch.ones(1)}), "xxx"),
    (lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}), "model.norm.*31"),
    (lambda tensors: tensors.update({"model.layers.2.router.x": torch.ones(1)}), "layers.2.router"),
], ids=["empty", "norm", "head", "embedding", "unknown", "long", "shape", "router"])
def test_tensors_with_wrong_names(folder, change, words):
    """A file of another model may fill screens with names, or load in part."""
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=f"(?s)llama: .*{words}") as error:
        FlexiDepth.from_pretrained(folder)
    assert len(str(error.value)) <= 300


def test_other_faults(folder, model, tmp_path):
    """Each fault must have a message of its own."""
    file = model.save_flexidepth(tmp_path / "out")
    for error, words, options in (
            (ValueError, "routing_layers", dict(routing_layers=[4])),
            (ValueError, "no routers and adapters; train.py", dict(flexidepth=folder)),
            (FileNotFoundError, "nothing", dict(flexidepth=tmp_path / "nothing.safetensors")),
            (ValueError, "layers.1.router", dict(flexidepth=file, routing_layers=[1])),
            (RuntimeError, "device.*gpu", dict(device="gpu"))):
        with pytest.raises(error, match=words):
            FlexiDepth.from_pretrained(folder, **options)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        FlexiDepth.from_pretrained(folder)


# ---- Whole models, and writing -------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_save_pretrained(tmp_path, write_checkpoint, write_ranks, dtype, tied):
    """The saved folder may lack a tensor, a setting or a tokenizer file, or be read otherwise."""
    base = write_checkpoint(tmp_path / "base", dtype, tie_word_embeddings=tied, rope_theta=500.0,
                            rope_scaling=LLAMA3_ROPE, vocab_size=600)
    write_ranks(base, b" cat")
    files = {"tokenizer_config.json": "{}", "chat_template.jinja": "<|start_header_id|>trim",
             "special_tokens_map.json": "{}", "generation_config.json": '{"eos_token_id": 5}'}
    for name, content in files.items():
        (base / name).write_text(content)
    (base / "additional_chat_templates").mkdir()  # as transformers writes for several templates
    model = FlexiDepth.from_pretrained(base, routing_layers=[1, 3])
    model.config.threshold = 0.4
    model.save_pretrained(tmp_path / "new" / "folder")
    (base / "config.json").unlink()  # The new folder must not need the old one.

    folder = tmp_path / "new" / "folder"
    again = FlexiDepth.from_pretrained(folder)
    assert_same_tensors(again, model)
    assert again.config == model.config
    assert torch.equal(again.frequencies, model.frequencies)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "ddllama"
    written = {"config.json", "model.safetensors", "tokenizer.model", *files}
    assert set(os.listdir(folder)) == written
    for name, content in files.items():
        assert (folder / name).read_text() == content
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode(" cat") == [256] and 5 in tokenizer.stop_ids
    assert tokenizer.chat_format == "llama3"


@pytest.mark.parametrize("rope", [None, LLAMA3_ROPE], ids=["plain", "llama3"])
def test_save_pretrained_of_a_made_model(tmp_path, rope):
    """A model that was made from a Config, and not loaded, may lose its kind of rotation."""
    model = FlexiDepth(Config(40, 32, 48, num_hidden_layers=4, num_attention_heads=4,
                              rope_scaling=rope))
    model.save_pretrained(tmp_path)
    again = FlexiDepth.from_pretrained(tmp_path)
    assert_same_tensors(again, model)
    assert torch.equal(again.frequencies, model.frequencies)


def test_save_pretrained_spares_the_base(model, folder, write_ranks):
    """Saving into the base's own folder would overwrite the pre-trained model."""
    write_ranks(folder)
    before = contents(folder)
    with pytest.raises(OSError):
        model.save_pretrained(folder)
    assert contents(folder) == before


@pytest.fixture
def full_disk():
    """A function that calls another one while no file may grow beyond 1,000 bytes."""
    resource = pytest.importorskip("resource")

    def call(function, *arguments):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            function(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return call


def test_a_full_disk_leaves_what_was_there(folder, tmp_path, full_disk):
    """A disk that is full in the middle of writing may cost the last good file, or leave litter, or
    the new config.json beside the old weights, which do not fit it."""
    out = tmp_path / "out"
    for layer in (1, 2):
        model = FlexiDepth.from_pretrained(folder, routing_layers=[layer])
        if layer == 1:
            model.save_flexidepth(out)
            model.save_pretrained(out)
            before = contents(out)
    for save in (model.save_flexidepth, model.save_pretrained):
        with pytest.raises(OSError, match="safetensors: not written; is the disk full?"):
            full_disk(save, out)
    assert contents(out) == before


@pytest.mark.parametrize("write", [torch.save, lambda data, file: file.write_bytes(bytes(5000))],
                         ids=["torch.save", "write_bytes"])
def test_whole_file(tmp_path, full_disk, write):
    """torch.save tells of a full disk by a RuntimeError, which no caller expects. Anything else
    that goes wrong while a file is written may leave half of it."""
    file = tmp_path / "a" / "file"

    def fill(size):
        with whole_file(file) as temporary:
            temporary.write_text("half")
            assert not file.exists() or file.read_text() == "old"
            write({"tensor": torch.zeros(size)}, temporary)

    for old in (None, "old"):
        if old:
            file.write_text(old)
        with pytest.raises(OSError):
            full_disk(fill, 5000)
        with pytest.raises(KeyboardInterrupt), whole_file(file) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt
        assert contents(file.parent) == ({"file": b"old"} if old else {})
    fill(10)
    assert file.stat().st_size > 500 and os.listdir(file.parent) == ["file"]


def test_permissions(model, tmp_path):
    """What is written may be for its owner alone, as the safetensors package has it, where others
    of a group are to read it."""
    old = os.umask(0o027)
    try:
        model.save_flexidepth(tmp_path / "out")
        model.save_pretrained(tmp_path / "out")
    finally:
        os.umask(old)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").iterdir()} == {"0o640"}
