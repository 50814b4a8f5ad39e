"""Loading, saving, tokenizers, generation: the edges of flexidepth.py, on models made on the spot."""
import base64
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flexidepth import (SPECIAL, TRAINED, Config, FlexiDepth, KVCache, Tokenizer,
                        generate, layers_used)

# Real data that some machines have beside the checkout; the tests that need it skip elsewhere.
DATA = Path(os.environ.get("FLEXIDEPTH_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no folder of real data beside the checkout")
CONFIG = {"model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48,
          "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
          "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}


def write_checkpoint(folder, dtype=torch.float32, routers=False, shards=1, **config):
    """A random Llama in the official layout, with routers and adapters if asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    known = {key: value for key, value in (CONFIG | config).items() if key != "model_type"}
    known = {key: value for key, value in known.items() if key in Config.__dataclass_fields__}
    state = {name: t.to(dtype) for name, t in FlexiDepth(Config(**known)).state_dict().items()
             if routers or not TRAINED.match(name)}
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if shards == 1:
        save_file(state, folder / "model.safetensors")
    else:
        weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
                      for i, name in enumerate(sorted(state))}
        for file in set(weight_map.values()):
            save_file({name: t for name, t in state.items() if weight_map[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "llama")


def ids(*shape):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(1))


# ---- Checkpoints

def test_plain_llama_gets_routers_in_its_latter_half(folder):
    """Gates that start shut or open: a fresh router must be a coin flip, or it never learns."""
    torch.manual_seed(1)
    model = FlexiDepth.from_pretrained(folder)
    gates = model(ids(8, 16)).gates
    assert model.config.routing_layers == [2, 3] and gates.shape == (8, 16, 2)
    assert abs(gates.mean() - 0.5) < 0.2 and gates.std() > 0.01
    assert FlexiDepth.from_pretrained(folder, routing_layers=[0, 3]).config.routing_layers == [0, 3]


def test_size_of_the_8b():
    """Widths that are not those of the released checkpoint: its 16 routers and adapters are about
    210 M parameters beside Llama-3-8B's 8.03 G."""
    with torch.device("meta"):
        model = FlexiDepth(Config(128256, 4096, 14336, 32, 32, 8))
    sizes = {trained: sum(p.numel() for name, p in model.named_parameters()
                          if bool(TRAINED.match(name)) == trained) for trained in (True, False)}
    assert sizes == {True: 16 * (2 * 4096 * 256 + 256 + 4096 + 3 * 4096 * 896), False: 8_030_261_248}
    assert round(sizes[True] / 1e6) == 210


@pytest.mark.parametrize("target", ["trained.safetensors", "a/folder"])
def test_save_and_load_round_trip(folder, tmp_path, target):
    """A tensor that is left out, renamed or rounded on its way through the file."""
    model = FlexiDepth.from_pretrained(folder, routing_layers=[1, 2])
    file = model.save_flexidepth(tmp_path / target)
    assert sorted(load_file(file)) == sorted(n for n in model.state_dict() if TRAINED.match(n))
    again = FlexiDepth.from_pretrained(folder, flexidepth=tmp_path / target)
    assert again.config.routing_layers == [1, 2]
    assert torch.equal(model(ids(2, 9)).logits, again(ids(2, 9)).logits)


def test_save_leaves_what_was_there(folder, tmp_path, monkeypatch):
    """A full disk in the middle of writing: the last good file must stay, and no litter."""
    model = FlexiDepth.from_pretrained(folder)
    file = model.save_flexidepth(tmp_path / "out")
    before = file.read_bytes()

    def no_space(self, data):
        self.touch()
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(OSError, match="No space"):
        model.save_flexidepth(tmp_path / "out")
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("shards", [1, 3])
def test_released_layout(tmp_path, shards):
    """A folder with router tensors: its layers and widths are those of the tensors, not of a
    config.json that says nothing or something else."""
    folder = write_checkpoint(tmp_path, routers=True, shards=shards, routing_layers=[1, 3],
                              router_size=5, adapter_size=7)
    config = json.loads((folder / "config.json").read_text())
    del config["router_size"], config["adapter_size"]
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "ddllama", "routing_layers": [0]}))
    model = FlexiDepth.from_pretrained(folder)
    assert model.config.routing_layers == [1, 3]
    assert (model.config.router_size, model.config.adapter_size) == (5, 7)
    other = FlexiDepth.from_pretrained(folder, flexidepth=folder)
    assert torch.equal(model(ids(1, 9)).logits, other(ids(1, 9)).logits)


def test_dtype(tmp_path):
    """A checkpoint in bfloat16 that is silently upcast, or routers left in another dtype."""
    folder = write_checkpoint(tmp_path, dtype=torch.bfloat16)
    model = FlexiDepth.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} == {model(ids(1, 4)).logits.dtype}
    assert {p.dtype for p in FlexiDepth.from_pretrained(folder, dtype=torch.float32).parameters()} == {torch.float32}


def test_hub_name(tmp_path, monkeypatch):
    """A model that was downloaded and is not found, or one that is not there and no word how to get it."""
    snapshot = tmp_path / "models--some--Llama" / "snapshots" / "abc"
    write_checkpoint(snapshot)
    (tmp_path / "models--some--Llama" / "refs").mkdir()
    (tmp_path / "models--some--Llama" / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert FlexiDepth.from_pretrained("some/Llama").config.vocab_size == 40
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="hf download some/Llama"):
        FlexiDepth.from_pretrained("some/Llama")


@pytest.mark.parametrize("change, word", [
    ({"hidden_act": "gelu"}, "gelu"), ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"), ({"sliding_window": 4096}, "sliding_window"),
    ({"model_type": "qwen2"}, "qwen2"), ({"rope_scaling": {"type": "yarn", "factor": 2}}, "yarn"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, "linear"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3"), ({"routing_layers": [9]}, "9"),
    ({"vocab_size": None}, "vocab_size"), ({"hidden_size": 64}, "size mismatch"),
])
def test_config_that_would_compute_something_else(folder, change, word):
    """A setting that is ignored gives wrong text without a word."""
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ValueError, match=word):
        FlexiDepth.from_pretrained(folder)


def test_broken_folders(folder, tmp_path):
    """Each fault by its own message, which names the file."""
    def broken(match, error=ValueError, **options):
        with pytest.raises(error, match=match):
            FlexiDepth.from_pretrained(folder, **options)
    whole = (folder / "model.safetensors").read_bytes()
    broken("routing_layers", routing_layers=[4])
    broken("no flexidepth.safetensors", FileNotFoundError, flexidepth=folder)
    broken("nothing.safetensors", FileNotFoundError, flexidepth=tmp_path / "nothing.safetensors")
    (folder / "model.safetensors").write_bytes(whole[:-100])
    broken("model.safetensors: not a whole safetensors file")
    save_file({"lm_head.weight": torch.zeros(40, 32)}, folder / "model.safetensors")
    broken("Missing key.*model.embed_tokens.weight")
    (folder / "model.safetensors").unlink()
    broken("model.safetensors", FileNotFoundError)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1-of-2.safetensors"}}')
    broken("model-1-of-2.safetensors", FileNotFoundError)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "config.json").write_text("{")
    broken("config.json: not a JSON object")


def test_training_changes_routers_and_adapters_alone(folder):
    """A base tensor that is trained, or decays, along with the gates: its every bit must stay."""
    model = FlexiDepth.from_pretrained(folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(3):
        out = model(ids(2, 8))
        (out.logits.square().mean() + out.gates.mean()).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != bool(TRAINED.match(name)), name


def test_adapter_without_rows_gets_zero_gradients(folder):
    """None in place of zeros stalls training on several processes, which wait for each gradient."""
    model = FlexiDepth.from_pretrained(folder)
    model(ids(1, 4), route=lambda i, g: torch.ones_like(g, dtype=torch.bool)).logits.sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in grads.values())
    assert all((g == 0).all() == ("router_proj" in name) for name, g in grads.items())


# ---- The cost of a token

def test_a_skipped_token_costs_what_the_method_says(folder):
    """Work that is done and thrown away: a skipped token is due its router, key, value and adapter
    (norms are no products and not counted), a kept one its query, attention, o_proj and mlp."""
    model = FlexiDepth.from_pretrained(folder)
    D, kv, inner, router, adapter, T = 32, 16, 48, 2, 3, 8

    def flops(route):
        # The plain backend, as torch does not count the products of the fused ones on a CPU.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(ids(1, T), route=route)
        return counter.get_total_flops()
    # A product of a token with an (m, n) matrix is 2mn; attention of one query over T keys 4TD.
    skipped = 2 * (2 * D * kv) + 2 * (D * router + router * D + D) + 2 * 3 * D * adapter
    kept = 2 * (2 * D * kv) + 2 * (D * router + router * D + D) + 2 * (2 * D * D + 3 * D * inner) + 4 * T * D
    plain_layers_and_head = 2 * T * (2 * (2 * D * kv + 2 * D * D + 3 * D * inner) + 4 * T * D) + T * 2 * D * 40
    for n in (0, 1, 5, T):  # tokens kept, in each of two layers
        expected = plain_layers_and_head + 2 * (n * kept + (T - n) * skipped)
        assert flops(lambda i, g: (torch.arange(T) < n)[None]) == expected, n


# ---- Generation

def test_generate_is_the_uncached_model(folder):
    """A cache or depth that is off by one: each token and depth must be that of a fresh forward."""
    model, prompt = FlexiDepth.from_pretrained(folder), ids(1, 5)
    tokens = list(generate(model, prompt, 12))
    whole = torch.cat([prompt, torch.tensor([[token for token, _ in tokens]])], 1)
    out = model(whole[:, :-1])
    assert [t for t, _ in tokens] == out.logits[0, 4:].argmax(-1).tolist()
    assert [d for _, d in tokens] == layers_used(out.kept, model.config)[0, 4:].tolist()
    assert len({d for _, d in tokens}) > 1
    assert {d for _, d in generate(model, prompt, 3, route="full")} == {4}


def test_generate_stops(folder):
    """An answer that runs past its stop token, the count asked for or the end of the context."""
    model, prompt = FlexiDepth.from_pretrained(folder), ids(1, 5)
    tokens = [t for t, _ in generate(model, prompt, 6)]
    stop = tokens[2]
    assert [t for t, _ in generate(model, prompt, 6, stop_ids={stop})] == tokens[:tokens.index(stop) + 1]
    assert len(tokens) == 6
    # 64 positions: of 5 + 60 tokens the last one is not fed back.
    assert len(list(generate(model, prompt, 1000))) == 60
    assert len(list(generate(model, ids(1, 64), 1000))) == 1


def test_sampling(folder):
    """A seed that does not repeat, a nucleus that lets the tail through or loses its best token."""
    model, prompt = FlexiDepth.from_pretrained(folder), ids(1, 5)

    def draw(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return [t for t, _ in generate(model, prompt, 20, generator=generator, **options)]
    assert draw(0, temperature=1.0) == draw(0, temperature=1.0) != draw(1, temperature=1.0)
    assert draw(0, temperature=1.0, top_p=1e-6) == draw(0)
    probs = model(prompt).logits[0, -1].softmax(-1).sort(descending=True)
    nucleus = set(probs.indices[:int((probs.values.cumsum(0) < 0.3).sum()) + 1].tolist())
    first = {draw(seed, temperature=1.0, top_p=0.3)[0] for seed in range(40)}
    assert first <= nucleus and len(first) > 1


@pytest.mark.parametrize("options, word", [
    ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "input_ids"), ({"input_ids": ids(2, 3)}, "input_ids"),
    ({"input_ids": ids(1, 65)}, "64"), ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"),
    ({"route": "random"}, "'random'"),
])
def test_generate_refuses(folder, options, word):
    """An empty or too long prompt that crashes deep inside, or an option that does nothing."""
    model = FlexiDepth.from_pretrained(folder)
    with pytest.raises(ValueError, match=word):
        list(generate(model, **{"input_ids": ids(1, 3), "max_new_tokens": 2} | options))


def test_cache_refuses_other_rows_and_more_tokens(folder):
    """A cache of other rows would be spread over them without a word."""
    model = FlexiDepth.from_pretrained(folder)
    for shape in ((1, 4), (2, 9)):
        with pytest.raises(ValueError, match="for 2 of 8"):
            model(ids(*shape), cache=KVCache(model.config, 2, 8))


@needs_data
def test_a_real_llama_says_what_it_said_elsewhere():
    """200 tokens of a trained model that nobody here made: any slip in Llama or cache."""
    folder = DATA / "stories260K"
    expected = json.loads((folder / "greedy_ids.json").read_text())
    model = FlexiDepth.from_pretrained(folder)
    tokens = generate(model, torch.tensor([expected[:1]]), len(expected) - 1, route="full")
    assert expected[:1] + [t for t, _ in tokens] == expected


# ---- Tokenizer

@needs_data
def test_official_tokenizer():
    """Another split pattern, special token or template than Llama 3's."""
    tokenizer = Tokenizer.from_pretrained(DATA / "llama3-tokenizer")
    text = "This is a test sentence."
    golden = [128000, 2028, 374, 264, 1296, 11914, 13, 128001]
    assert tokenizer.encode(text, bos=True, eos=True) == golden
    assert tokenizer.decode(golden[1:-1]) == text and tokenizer.encode(text) == golden[1:-1]
    assert tokenizer.stop_ids == {128001, 128009}
    assert tokenizer.encode_chat([{"role": "user", "content": " Hi \n"}], add_generation_prompt=True) == [
        128000, 128006, 882, 128007, 271, 13347, 128009, 128006, 78191, 128007, 271]
    assert SPECIAL[255] == "<|reserved_special_token_250|>" and tokenizer.encoding.n_vocab == 128256


def write_ranks(folder, ranks):
    (folder / "tokenizer.model").write_text("".join(
        f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)))


def test_tokenizer_model(tmp_path):
    """Special strings of a user's text that become special tokens: whoever writes them would
    write the system's part. Bytes, whole words, halves of characters, stop ids of all the configs."""
    write_ranks(tmp_path, [bytes([b]) for b in range(256)] + [b" cat"])
    (tmp_path / "config.json").write_text('{"eos_token_id": [1, 2]}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    eot = 257 + SPECIAL.index("<|eot_id|>")
    assert tokenizer.encode(" cat") == [256] and tokenizer.stop_ids == {1, 2, 3, 258, eot}
    assert tokenizer.encode("<|eot_id|>") == list(b"<|eot_id|>")
    chat = tokenizer.encode_chat([{"role": "user", "content": "<|eot_id|>"}])
    assert chat.count(eot) == 1 and tokenizer.decode(chat).startswith("<|begin_of_text|><|start_header_id|>user")
    for text in ("é 東京 🙂", "\r\n\t  x  ", "it's 1234", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


def test_original_folder_and_json(tmp_path):
    """Folders that keep tokenizer.model in original/, or have tokenizer.json alone."""
    (tmp_path / "original").mkdir()
    write_ranks(tmp_path / "original", [bytes([b]) for b in range(256)])
    assert Tokenizer.from_pretrained(tmp_path).encode("A") == [65]
    with pytest.raises(FileNotFoundError, match="neither tokenizer.model nor tokenizer.json"):
        Tokenizer.from_pretrained(Path(__file__).parent)


@pytest.mark.parametrize("name, content, word", [
    ("tokenizer.model", b"QQ== 0\n\x0a\x0b sentencepiece", "line 2"),
    ("tokenizer.json", b"{", "not a JSON object"),
    ("tokenizer.json", b'{"model": {"type": "Unigram"}}', "not a byte-level BPE"),
])
def test_broken_tokenizer(tmp_path, name, content, word):
    """A tokenizer of another kind that is half understood."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=word):
        Tokenizer.from_pretrained(tmp_path)
