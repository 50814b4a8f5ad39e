"""transformers as the oracle of route="full", of greedy text, and of SmolLM2.

Every model but SmolLM2 is a tiny random Llama that transformers saved and our loader read. Ours and
the oracle's sdpa run the same operations in the same order, so there the logits are the same bits.
Its eager attention, with scores, mask and softmax written out, is the second opinion, to 1e-5.
"""
import json
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402

from flexidepth import FlexiDepth, KVCache, Tokenizer, generate  # noqa: E402

transformers.utils.logging.disable_progress_bar()

THETA = {"rope_type": "default", "rope_theta": 500.0}  # not the 10000 of a file that names none
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "gqa": {}, "mha": {"num_key_value_heads": 4}, "head_dim": {"head_dim": 20},
    "llama3": {"rope_parameters": LLAMA3}, "tied": {"tie_word_embeddings": True},
}
# All of these but the tied head, because a tied head of random weights repeats its input.
ALL = CASES["head_dim"] | CASES["llama3"]
# bfloat16 counts exactly to 256. More tokens than that show positions that are rounded to it.
INPUT_IDS = torch.randint(160, (2, 300), generator=torch.Generator().manual_seed(0))
in_every_case = pytest.mark.parametrize("changes", CASES.values(), ids=CASES)


def save_llama(folder: Path, shard_size: str = "1GB", **changes) -> transformers.LlamaForCausalLM:
    """A random Llama, saved in the folder. Its eps and weights are large enough to matter."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{
        "vocab_size": 160, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 320,
        "rms_norm_eps": 1e-3, "initializer_range": 0.1, "rope_parameters": THETA,
        "bos_token_id": None, "eos_token_id": None} | changes))
    for parameter in model.parameters():
        if parameter.ndim == 1:  # The norms start as ones, and a model without them would pass.
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model.eval()


def oracle(folder: Path, **options) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model, **options) -> torch.Tensor:
    return model(INPUT_IDS, **options).logits


# ---- The model -----------------------------------------------------------------------------------
@pytest.mark.parametrize("shard_size", ["1GB", "40KB"])
@in_every_case
def test_logits(tmp_path, changes, shard_size):
    """A shard may not be read, a head may be tied or not tied wrongly, head_dim may be taken for
    48 / 4, key/value heads may be repeated as 0101 for 0011, or the mask may be missing."""
    model = save_llama(tmp_path, shard_size, **changes)
    model.set_attn_implementation("eager")
    assert (tmp_path / "model.safetensors").is_file() == (shard_size == "1GB")
    ours = logits(FlexiDepth.from_pretrained(tmp_path), route="full")
    torch.testing.assert_close(ours, logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@in_every_case
def test_same_bits(tmp_path, changes, dtype):
    """An operation may run in another order or precision, such as an RMSNorm or a rotary table in
    bfloat16. Neither 1e-5 nor a greedy text shows it, and it can flip a gate near the threshold."""
    save_llama(tmp_path, **changes)
    expected = logits(oracle(tmp_path, dtype=dtype, attn_implementation="sdpa"))
    ours = FlexiDepth.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(logits(ours, route="full"), expected)
    # The same holds when it is cast after loading. In transformers .to() would also round the
    # rotary frequencies.
    ours = FlexiDepth.from_pretrained(tmp_path).to(dtype)
    assert torch.equal(logits(ours, route="full"), expected)


def test_bfloat16_error(tmp_path):
    """A step may round more than it need. Eager attention has other bits than ours, but both round
    after every operation outside attention, so their errors are alike. Over these 96,000 logits
    the root mean squares differed by at most 4 % in 30 models, hence the bound of 1.25."""
    exact = logits(save_llama(tmp_path))
    ours = FlexiDepth.from_pretrained(tmp_path, dtype=torch.bfloat16)
    theirs = oracle(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    error, allowed = ((x - exact).square().mean().sqrt()
                      for x in (logits(ours, route="full"), logits(theirs)))
    assert error <= 1.25 * allowed


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_type", "type"])
@pytest.mark.parametrize("rope", [THETA, LLAMA3], ids=["default", "llama3"])
def test_rope_spellings(tmp_path, rope, spelling):
    """rope_theta or a scaling may be read in one spelling of config.json and ignored in another."""
    expected = logits(save_llama(tmp_path, rope_parameters=rope))
    config = json.loads((tmp_path / "config.json").read_text())
    saved = config.pop("rope_parameters")
    if spelling == "rope_parameters":
        config["rope_parameters"] = saved
    else:  # transformers 4
        config["rope_theta"] = saved.pop("rope_theta")
        kind = saved.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {spelling: kind} | saved
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = logits(FlexiDepth.from_pretrained(tmp_path), route="full")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    # The file that was rewritten here is one that transformers reads in the same way.
    torch.testing.assert_close(logits(oracle(tmp_path)), expected, rtol=0, atol=1e-5)


def test_cached_logits(tmp_path):
    """Positions may start again at 0 after the prompt, a mask may be aligned to the wrong end of
    the keys, or the cache may hand out its unused rest."""
    expected = logits(save_llama(tmp_path, **ALL))
    model = FlexiDepth.from_pretrained(tmp_path)
    cache = KVCache(model.config, 2, 310)
    with torch.no_grad():
        chunks = [model(ids, cache, "full").logits for ids in INPUT_IDS.split([7, 1, 130, 162], 1)]
    ours = torch.cat(chunks, 1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_greedy(tmp_path, write_ranks):
    """A token may be fed back twice or at the wrong position, only the first of several end tokens
    may count, an answer may lack its end token, or a depth may not be that of all layers."""
    model = save_llama(tmp_path, **ALL, vocab_size=560)
    prompt = torch.tensor([[3, 14, 15, 92, 65]])
    free = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, 5:].tolist()
    assert len(set(free)) > 5  # A text that only repeats itself would show little.
    ours = list(generate(FlexiDepth.from_pretrained(tmp_path), prompt, 20, route="full"))
    assert [(step.token.item(), step.depth.item()) for step in ours] == [(t, 3) for t in free]

    write_ranks(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [159, free[8]]}))
    theirs = oracle(tmp_path).generate(prompt, max_new_tokens=20, do_sample=False)[0, 5:].tolist()
    assert theirs == free[:free.index(free[8]) + 1]
    ours = generate(FlexiDepth.from_pretrained(tmp_path), prompt, 20, route="full",
                    stop_ids=Tokenizer.from_pretrained(tmp_path).stop_ids)
    assert [step.token.item() for step in ours] == theirs


# ---- SmolLM2 -------------------------------------------------------------------------------------
def test_smollm2_text(smollm2):
    """A model that others trained may give other logits, by a bit, or another text."""
    tokenizer = Tokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "12 + 30 ="}]
    ids = torch.tensor([tokenizer.encode_chat(chat, True)])
    theirs = oracle(smollm2, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        expected = theirs(ids).logits
        text = theirs.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    ours = FlexiDepth.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(ours(ids, route="full").logits, expected)
    tokens = generate(ours, ids, 20, route="full", stop_ids=tokenizer.stop_ids)
    assert [step.token.item() for step in tokens] == text[0, ids.shape[1]:].tolist()
