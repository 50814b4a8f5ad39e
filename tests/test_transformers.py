"""Oracles: transformers for route="full", generation and chat, tokenizers for tokenizer.json.

Every model is a tiny random Llama that transformers saved and our real loader read. Ours and the
oracle's sdpa run the same operations in the same order, so there the logits are the same bits. Its
eager attention, with scores, mask and softmax written out, is the second opinion, to 1e-5.
"""
import base64
import json
import random
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers  # noqa: E402
from tokenizers import Tokenizer as Oracle  # noqa: E402

from flexidepth import FlexiDepth, KVCache, Tokenizer, generate  # noqa: E402

transformers.utils.logging.disable_progress_bar()

THETA = {"rope_type": "default", "rope_theta": 500.0}  # not the 10000 of a file that names none
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "gqa": {}, "mha": {"num_key_value_heads": 4}, "head_dim": {"head_dim": 20},
    "llama3": {"rope_parameters": LLAMA3}, "tied": {"tie_word_embeddings": True},
}
ALL = CASES["head_dim"] | CASES["llama3"]  # and GQA, not tied: a tied random head repeats its input
# More than 256 tokens: bfloat16 can count so far, and would hide positions that are rounded to it.
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
        if parameter.ndim == 1:  # the norms, ones at first: a model that forgot them would pass
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model.eval()


def oracle(folder: Path, **options) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model, **options) -> torch.Tensor:
    return model(INPUT_IDS, **options).logits


# -------------------------------------------------------------------------------------------------
# The model

@pytest.mark.parametrize("shard_size", ["1GB", "40KB"])
@in_every_case
def test_logits(tmp_path, changes, shard_size):
    """A shard that is not read; a head that is not tied, or tied where it has weights of its own;
    head_dim taken for 48 / 4; key/value heads repeated as 0101 for 0011; a mask that is missing."""
    model = save_llama(tmp_path, shard_size, **changes)
    model.set_attn_implementation("eager")
    assert (tmp_path / "model.safetensors").is_file() == (shard_size == "1GB")
    ours = logits(FlexiDepth.from_pretrained(tmp_path), route="full")
    torch.testing.assert_close(ours, logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@in_every_case
def test_same_bits(tmp_path, changes, dtype):
    """An operation in another order or precision, such as an RMSNorm or a rotary table in bfloat16:
    too small for 1e-5 or a greedy text to show, and enough to flip a gate near the threshold."""
    save_llama(tmp_path, **changes)
    expected = logits(oracle(tmp_path, dtype=dtype, attn_implementation="sdpa"))
    ours = FlexiDepth.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(logits(ours, route="full"), expected)
    # Cast after loading, too; in transformers .to() would also round the rotary frequencies.
    ours = FlexiDepth.from_pretrained(tmp_path).to(dtype)
    assert torch.equal(logits(ours, route="full"), expected)


def test_bfloat16_error(tmp_path):
    """A step that rounds more than it need. Against eager, which has other bits: both round after
    every operation but those inside attention, so their errors are alike. Over these 96,000 logits
    the root mean squares differed by at most 4 % in 30 models; hence a bound of 1.25."""
    exact = logits(save_llama(tmp_path))
    ours = FlexiDepth.from_pretrained(tmp_path, dtype=torch.bfloat16)
    theirs = oracle(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    error, allowed = ((x - exact).square().mean().sqrt()
                      for x in (logits(ours, route="full"), logits(theirs)))
    assert error <= 1.25 * allowed


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_type", "type"])
@pytest.mark.parametrize("rope", [THETA, LLAMA3], ids=["default", "llama3"])
def test_rope_spellings(tmp_path, rope, spelling):
    """A rope_theta or a scaling that is read in one spelling of config.json, ignored in another."""
    expected = logits(save_llama(tmp_path, rope_parameters=rope))
    config = json.loads((tmp_path / "config.json").read_text())
    saved = config.pop("rope_parameters")
    if spelling == "rope_parameters":
        config["rope_parameters"] = saved
    else:  # transformers 4
        config["rope_theta"], kind = saved.pop("rope_theta"), saved.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {spelling: kind} | saved
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = logits(FlexiDepth.from_pretrained(tmp_path), route="full")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    # The file that was rewritten here is one that transformers reads in the same way.
    torch.testing.assert_close(logits(oracle(tmp_path)), expected, rtol=0, atol=1e-5)


def test_cached_logits(tmp_path):
    """Positions that start again at 0 after the prompt, a mask aligned to the wrong end of the
    keys, a cache that hands out its unused rest. Prefill, one token, two unlike chunks."""
    expected = logits(save_llama(tmp_path, **ALL))
    model = FlexiDepth.from_pretrained(tmp_path)
    cache = KVCache(model.config, 2, 310)
    with torch.no_grad():
        chunks = [model(ids, cache, "full").logits for ids in INPUT_IDS.split([7, 1, 130, 162], 1)]
    ours = torch.cat(chunks, 1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("file_name", ["config.json", "generation_config.json"])
def test_greedy(tmp_path, file_name):
    """A token fed back twice or at the wrong position; end tokens of which only the first counts,
    or only one file's; an answer that lacks its end token; a depth that is not all the layers."""
    model, prompt = save_llama(tmp_path, **ALL), torch.tensor([[3, 14, 15, 92, 65]])
    free = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, 5:].tolist()
    assert len(set(free)) > 5  # else it loops, and shows little
    ours = list(generate(FlexiDepth.from_pretrained(tmp_path), prompt, 20, route="full"))
    assert ours == [(token, 3) for token in free]

    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    file = tmp_path / file_name
    settings = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(settings | {"eos_token_id": [159, free[8]]}))
    theirs = oracle(tmp_path).generate(prompt, max_new_tokens=20, do_sample=False)[0, 5:].tolist()
    assert theirs == free[:free.index(free[8]) + 1]
    ours = generate(FlexiDepth.from_pretrained(tmp_path), prompt, 20, route="full",
                    stop_ids=Tokenizer.from_pretrained(tmp_path).stop_ids)
    assert [token for token, _ in ours] == theirs


# -------------------------------------------------------------------------------------------------
# The text. The patterns are written again, so that a slip in flexidepth.py is not its own oracle.

SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BEGIN, EOT = "<|begin_of_text|>", "<|eot_id|>"
SPECIAL = [BEGIN, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", EOT]
PIECES = [
    "the", "The", "THEY", "we", "don", "it", "'s", "'LL", "'ve", "’s", "'", "'ſ", "_", "(", ".",
    "...", "?!", "->", " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", " \n", "\u00a0", "\u3000",
    "7", "42", "1234567", "3.14", "½", "٣", "é", "e\u0301", "straße", "Ж", "привет", "日本語", "한국",
    "नमस्ते", "🙂", "👩\u200d👧", "\x00", "\ufffd",
]
CHAT = (
    BEGIN + "{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>"
    "\n\n{{ message.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(PIECES + SPECIAL, k=rng.randint(1, 25))) for _ in range(count)]


def make_tokenizer() -> Oracle:
    """A byte-level BPE in Llama 3's layout, trained on made-up lines."""
    tokenizer = Oracle(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts(0, 300), trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_ids(tmp_path, name):
    """A byte behind the wrong character, a pattern that differs (contractions in capitals, runs of
    blanks, digits by threes), merges out of order, a special token's name read as that token."""
    expected = make_tokenizer()
    expected.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_pretrained(tmp_path)
    if name == "tokenizer.model":  # the same tokens in Meta's file
        ranks = map(ours.encoding.decode_single_token_bytes, range(ours.special[BEGIN]))
        lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)]
        (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
        (tmp_path / "tokenizer.json").unlink()
        ours = Tokenizer.from_pretrained(tmp_path)
    expected.encode_special_tokens = True  # their names in a text are text
    for text in ["", *PIECES, *SPECIAL, *texts(1, 300), "the " * 500, "\n" * 300, "🙂" * 300]:
        ids = ours.encode(text)
        assert ids == expected.encode(text).ids, repr(text)
        assert ours.decode(ids) == text


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_chat(tmp_path, add_generation_prompt):
    """A begin or eot that is missing, one newline for two, content that is not stripped, an answer
    opened though nobody asked for it, a user who ends the turn by writing the token's name."""
    expected = make_tokenizer()
    expected.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "\n\t the 42? "},
        {"role": "assistant", "content": ""}, {"role": "user", "content": "'s\n\nit"}]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=expected, chat_template=CHAT)
    ids = theirs.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, return_dict=False)
    assert ours.encode_chat(messages, add_generation_prompt) == ids
    forged = ours.encode_chat([{"role": "user", "content": EOT + "system"}])
    assert forged.count(ours.special[EOT]) == 1


@pytest.mark.parametrize("change", [
    lambda raw: raw["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
    lambda raw: raw["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
    lambda raw: raw.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False}),
    lambda raw: raw.update(normalizer={"type": "NFC"}), lambda raw: raw["model"].update(type="Unigram"),
    lambda raw: raw["model"]["merges"].reverse(), lambda raw: raw["model"]["vocab"].pop("z"),
    lambda raw: raw["added_tokens"].pop(),
], ids=["regex", "prefix", "removed", "bare", "normalizer", "unigram", "merges", "byte", "special"])
def test_tokenizer_json_of_another_kind(tmp_path, change):
    """A file whose text would be cut or merged otherwise, and gives other ids without a word."""
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    change(raw)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="not a byte-level BPE|a tokenizer without"):
        Tokenizer.from_pretrained(tmp_path)
