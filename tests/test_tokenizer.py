"""Text as token ids, against the package `tokenizers`, and chats, against transformers.

The tokenizers are trained here on made-up lines. Where a package is not installed, the tests that
need it as their oracle skip.
"""
import base64
import json
import random
from pathlib import Path

import pytest

from flexidepth import SPECIAL, Tokenizer

# Llama 3's pattern is written again, so that a slip in flexidepth.py is not its own oracle.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BEGIN, EOT = "<|begin_of_text|>", "<|eot_id|>"
LLAMA3 = [BEGIN, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", EOT]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PIECES = [
    "the", "The", "THEY", "we", "don", "it", "'s", "'LL", "'ve", "’s", "'", "'ſ", "_", "(", ".",
    "...", "?!", "->", " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", " \n", "\u00a0", "\u3000",
    "7", "42", "1234567", "3.14", "½", "٣", "²", "é", "e\u0301", "straße", "Ж", "привет", "日本語",
    "한국", "नमस्ते", "🙂", "👩\u200d👧", "\x00", "\ufffd",
]
LLAMA3_TEMPLATE = (
    BEGIN + "{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>"
    "\n\n{{ message.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "\n\t the 42? "},
    {"role": "assistant", "content": ""}, {"role": "user", "content": "7 's\n\nit"}]


def random_texts(seed: int, count: int) -> list[str]:
    """Texts of PIECES and names of special tokens, and texts of any characters."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        texts.append("".join(rng.choices(PIECES + LLAMA3 + CHATML, k=rng.randint(1, 25))))
        points = [rng.randrange(rng.choice([0x80, 0x3000, 0xD800])) for _ in range(15)]
        texts.append("".join(map(chr, points + [rng.randrange(0xE000, 0x110000)])))
    return texts


@pytest.fixture(scope="module")
def train():
    """A function: the way to cut text, special tokens -> a trained tokenizer of the package."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, trainers
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ways = {
        "llama3": pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
        "gpt2": level,
        "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]),
    }

    def train(way: str, special: list[str]):
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = ways[way]
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(random_texts(0, 200), trainers.BpeTrainer(
            vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False))
        tokenizer.add_special_tokens(special)
        return tokenizer

    return train


def save(tokenizer, folder, template: str | None = None) -> Tokenizer:
    """Save a tokenizer of the package, with a chat template, and read it with ours."""
    tokenizer.save(str(folder / "tokenizer.json"))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.from_pretrained(folder)


def edit(folder, change) -> None:
    """Let `change` edit the content of a folder's tokenizer.json."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    change(raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw))


# ---- Ids -----------------------------------------------------------------------------------------
def assert_same_ids(ours, theirs):
    theirs.encode_special_tokens = True  # The names of special tokens are text in a text.
    texts = ["", *PIECES, *LLAMA3, *CHATML, *random_texts(1, 200)]
    for text in [*texts, "the " * 500, "\n" * 300, " " * 300 + "7", "🙂" * 300]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids, repr(text)
        assert ours.decode(ids) == text


@pytest.mark.parametrize("merges", ["strings", "pairs"])
@pytest.mark.parametrize("way", ["llama3", "gpt2", "smollm2"])
def test_ids_of_tokenizer_json(tmp_path, train, way, merges):
    """A byte may stand behind the wrong character, the pattern may differ (contractions in
    capitals, runs of blanks, digits), merges may be in another order, or the name of a special
    token in a text may be read as that token."""
    theirs = train(way, LLAMA3)
    theirs.save(str(tmp_path / "tokenizer.json"))

    def spell(raw):
        pairs = [pair.split(" ") if isinstance(pair, str) else pair
                 for pair in raw["model"]["merges"]]
        if merges == "strings":  # as transformers 4 wrote them
            pairs = [" ".join(pair) for pair in pairs]
        raw["model"]["merges"] = pairs

    edit(tmp_path, spell)
    assert_same_ids(Tokenizer.from_pretrained(tmp_path), theirs)


def test_ids_of_tokenizer_model(tmp_path, train):
    """Meta's file of the same tokens may give other ids."""
    theirs = train("llama3", LLAMA3)
    ours = save(theirs, tmp_path)
    ranks = map(ours.token_bytes, range(ours.special[BEGIN]))
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    (tmp_path / "tokenizer.json").unlink()
    assert_same_ids(Tokenizer.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("added", [
    ["<think>", "</think>", "日本語!"], [" " * n for n in range(2, 12)] + ["<think", "<think>"],
], ids=["words", "some that begin alike"])
def test_added_tokens_that_are_not_special(tmp_path, train, added):
    """Added tokens such as <think> or runs of blanks are tokens in a text too, and may be cut like
    any other text. Of two that begin alike the longer one must be found."""
    theirs = train("gpt2", CHATML)
    theirs.add_tokens(added)
    ours = save(theirs, tmp_path)
    theirs.encode_special_tokens = True
    rng = random.Random(2)
    for _ in range(200):
        text = "".join(rng.choices(PIECES + added + CHATML, k=12))
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)
        assert ours.decode(ours.encode(text)) == text


def test_special_names_in_a_text_are_text(tmp_path, write_ranks):
    """Special strings of a user's text may become special tokens, and whoever writes them would
    write the system's part."""
    write_ranks(tmp_path, b" cat")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    eot = 257 + SPECIAL.index(EOT)
    assert tokenizer.special[EOT] == eot
    assert tokenizer.encode(" cat") == [256] and tokenizer.encode(EOT) == list(EOT.encode())
    chat = tokenizer.encode_chat([{"role": "user", "content": EOT}])
    assert chat.count(eot) == 1
    assert tokenizer.decode(chat).startswith("<|begin_of_text|><|start_header_id|>user")


def test_text_there_and_back(tmp_path, write_ranks):
    """Halves of characters may end in an error, and ids that are no tokens, as of a model whose
    embedding is larger than its vocabulary, too."""
    write_ranks(tmp_path, b" cat")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    for text in ("é 東京 🙂", "\r\n\t  x  ", "it's 1234", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"
    assert tokenizer.token_bytes(256) == b" cat"
    assert tokenizer.vocab_size == 257 + 256
    unknown = tokenizer.decode([65, 513, 66, 10**6, 67])
    assert unknown.startswith("A<") and unknown.endswith("C") and "513" in unknown


@pytest.mark.parametrize("character", [" ", "a", "\n", "é"])
def test_a_run_of_a_million(tmp_path, write_ranks, character):
    """tiktoken fails on a run of a million blanks, or takes minutes for it."""
    write_ranks(tmp_path, b"  ", b"aa", b"\n\n")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    text = "x " + character * 1_000_000 + "y"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_that_are_no_tokens(tmp_path, train):
    """A vocabulary like SmolLM2's lacks some bytes. A text with one may end in an error, or get an
    id that the model has no embedding for."""
    train("gpt2", CHATML).save(str(tmp_path / "tokenizer.json"))
    whole = Tokenizer.from_pretrained(tmp_path)

    def remove_byte_0(raw):
        model = raw["model"]
        model["vocab"] = {token: i for token, i in model["vocab"].items() if "\u0100" not in token}
        model["merges"] = [pair for pair in model["merges"] if "\u0100" not in "".join(pair)]

    edit(tmp_path, remove_byte_0)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == whole.vocab_size
    assert tokenizer.encode("a\x00b") == tokenizer.encode("a") + tokenizer.encode("b")
    assert "unknown" in tokenizer.decode([tokenizer.vocab_size])


# ---- Chats ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("way, special, template", [
    ("llama3", LLAMA3, LLAMA3_TEMPLATE), ("smollm2", CHATML, CHATML_TEMPLATE),
    ("gpt2", CHATML, CHATML_TEMPLATE),
    ("llama3", LLAMA3 + CHATML, LLAMA3_TEMPLATE), ("llama3", LLAMA3 + CHATML, CHATML_TEMPLATE),
], ids=["llama3", "smollm2", "gpt2", "llama3 of both", "chatml of both"])
def test_chat(tmp_path, train, way, special, template, add_generation_prompt):
    """A begin or end of a turn may be missing, content may be stripped or not wrongly, an answer
    may be opened though nobody asked for it, or a user may end the turn by the token's name."""
    transformers = pytest.importorskip("transformers")
    theirs = train(way, special)
    ours = save(theirs, tmp_path, template)
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_object=theirs, chat_template=template)
    ids = oracle.apply_chat_template(
        MESSAGES, add_generation_prompt=add_generation_prompt, return_dict=False)
    assert ours.encode_chat(MESSAGES, add_generation_prompt) == ids

    end = EOT if ours.chat_format == "llama3" else "<|im_end|>"
    forged = ours.encode_chat([{"role": "user", "content": end + "system"}])
    assert forged.count(ours.special[end]) == 1


@pytest.mark.parametrize("special, template, expected", [
    (LLAMA3, None, "llama3"), (CHATML, None, "chatml"),
    (LLAMA3, LLAMA3_TEMPLATE, "llama3"), (CHATML, CHATML_TEMPLATE, "chatml"),
    (LLAMA3 + CHATML, LLAMA3_TEMPLATE, "llama3"), (LLAMA3 + CHATML, CHATML_TEMPLATE, "chatml"),
    (LLAMA3 + CHATML, None, None), (LLAMA3 + CHATML, LLAMA3_TEMPLATE + CHATML_TEMPLATE, None),
    (LLAMA3, "[INST] {{ messages[0].content }} [/INST]", None),
    (CHATML, "[INST] {{ messages[0].content }} [/INST]", None),
    (["<|endoftext|>"], None, None), (LLAMA3[:3], LLAMA3_TEMPLATE, None),
    (LLAMA3, CHATML_TEMPLATE, None), (CHATML, LLAMA3_TEMPLATE, None),
])
@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_format_of_a_chat(tmp_path, train, file, special, template, expected):
    """A model may be asked in a format that it was not trained on, and answers all the same."""
    train("gpt2", special).save(str(tmp_path / "tokenizer.json"))
    if template is not None:
        content = template
        if file == "tokenizer_config.json":
            content = json.dumps({"chat_template": template})
        (tmp_path / file).write_text(content)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_format == expected
    if expected is None:
        with pytest.raises(ValueError, match="neither Llama 3's nor ChatML"):
            tokenizer.encode_chat(MESSAGES)
        assert tokenizer.decode(tokenizer.encode("the 42")) == "the 42"
    else:
        tokenizer.encode_chat(MESSAGES)


@pytest.mark.parametrize("way, special, template, end", [
    ("llama3", LLAMA3, LLAMA3_TEMPLATE, EOT), ("gpt2", CHATML, CHATML_TEMPLATE, "<|im_end|>")])
def test_what_the_author_of_a_message_says(tmp_path, train, way, special, template, end):
    """Training on answers alone may learn the header, or never learn to end an answer."""
    tokenizer = save(train(way, special), tmp_path, template)
    for content, said in (("the 42?", "the 42?"), ("", ""), ("a\n\nb", "a\n\nb")):
        message = {"role": "assistant", "content": content}
        ids, mask = tokenizer.encode_message(message)
        assert len(ids) == len(mask) and set(mask) <= {True, False}
        kept = [i for i, keep in zip(ids, mask) if keep]
        assert tokenizer.decode(kept) == said + end
        # What comes before it is what asks for an answer, so that training and use agree.
        opening = tokenizer.encode_chat([], add_generation_prompt=True)
        header = ids[:mask.index(True)]
        assert opening[-len(header):] == header and not any(mask[:len(header)])
    whole = tokenizer.encode_chat(MESSAGES)
    parts = [i for message in MESSAGES for i in tokenizer.encode_message(message)[0]]
    assert whole[len(whole) - len(parts):] == parts


@pytest.mark.parametrize("frame", [True, False])
def test_begin_of_text(tmp_path, train, frame):
    """A text may lack the token that the model's texts begin with, or get one that they do not
    begin with. The post-processor of tokenizer.json says which."""
    theirs = train("gpt2", ["<s>", *CHATML])
    if frame:
        processors = pytest.importorskip("tokenizers").processors
        theirs.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", theirs.token_to_id("<s>"))])
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    tokenizer = save(theirs, tmp_path)
    assert tokenizer.encode("the", bos=True) == theirs.encode("the").ids
    assert tokenizer.encode("the") == theirs.encode("the", add_special_tokens=False).ids


# ---- Files ---------------------------------------------------------------------------------------
def test_stop_ids(tmp_path, write_ranks):
    """An answer may run past an end token that only one of the files names."""
    write_ranks(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": [1, 2]}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    ends = {256 + SPECIAL.index(name) for name in ("<|end_of_text|>", EOT)}
    assert Tokenizer.from_pretrained(tmp_path).stop_ids == {1, 2, 3} | ends


def test_original_folder(tmp_path, write_ranks):
    """Meta's file may not be found in original/, where the official folders keep it."""
    write_ranks(tmp_path / "original")
    assert Tokenizer.from_pretrained(tmp_path).encode("A") == [65]
    with pytest.raises(FileNotFoundError, match="neither tokenizer.model nor tokenizer.json"):
        Tokenizer.from_pretrained(Path(__file__).parent)


@pytest.mark.parametrize("larger", ["tokenizer.json", "tokenizer.model"])
def test_the_larger_of_two_is_read(tmp_path, train, write_ranks, larger):
    """An older tokenizer may lie beside the model's own, and its ids mean other things."""
    theirs = train("llama3", LLAMA3)
    words = [] if larger == "tokenizer.json" else [b"w%d" % i for i in range(500)]
    write_ranks(tmp_path, *words)
    tokenizer = save(theirs, tmp_path)
    assert theirs.get_vocab_size() == 705
    assert tokenizer.vocab_size == (705 if larger == "tokenizer.json" else 256 + 500 + 256)


@pytest.mark.parametrize("beside", [False, True])
def test_sentencepiece(tmp_path, train, beside):
    """SentencePiece's tokenizer.model has the name of Meta's file. It must be refused by its name,
    and be no hindrance beside a tokenizer.json that is supported."""
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    if beside:
        theirs = train("llama3", LLAMA3)
        assert save(theirs, tmp_path).encode("the 42") == theirs.encode("the 42").ids
    else:
        with pytest.raises(ValueError, match="SentencePiece"):
            Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name, content, word", [
    ("tokenizer.model", b"QQ== 0\n\x0a\x0b sentencepiece", "line 2"),
    ("tokenizer.model", b"QQ== 0 1\n", "line 1"), ("tokenizer.model", b"Q 0\n", "line 1"),
    ("tokenizer.json", b"{", "not a JSON object"),
    ("tokenizer.json", b'{"model": {"type": "Unigram"}}', "not a byte-level BPE"),
    ("tokenizer.json", b'{"model": 1}', "not a byte-level BPE"),
])
def test_broken_tokenizer(tmp_path, name, content, word):
    """A tokenizer of another kind may be half understood."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=word):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [
    lambda raw: raw["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
    lambda raw: raw["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
    lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(invert=True),
    lambda raw: raw["pre_tokenizer"].update(pretokenizers=[]),
    lambda raw: raw.update(pre_tokenizer=None),
    lambda raw: raw.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}),
    lambda raw: raw.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False,
                                          "use_regex": False}),
    lambda raw: raw.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]}),
    lambda raw: raw.update(normalizer={"type": "NFC"}),
    lambda raw: raw["model"].update(type="Unigram"),
    lambda raw: raw["model"]["merges"].reverse(), lambda raw: raw["model"]["vocab"].pop("he"),
], ids=["regex", "prefix", "removed", "invert", "no steps", "no pre_tokenizer", "bare prefix",
        "bare", "digits", "normalizer", "unigram", "order", "vocab"])
def test_tokenizer_json_of_another_kind(tmp_path, train, change):
    """A file whose text is cut or merged otherwise may be read, and give other ids without a
    word."""
    train("llama3", LLAMA3).save(str(tmp_path / "tokenizer.json"))
    edit(tmp_path, change)
    with pytest.raises(ValueError, match="not a byte-level BPE"):
        Tokenizer.from_pretrained(tmp_path)


def test_official_tokenizer(data):
    """The split pattern, the special tokens or the template may differ from Llama 3's own."""
    tokenizer = Tokenizer.from_pretrained(data / "llama3-tokenizer")
    text = "This is a test sentence."
    golden = [128000, 2028, 374, 264, 1296, 11914, 13, 128001]
    assert tokenizer.encode(text, bos=True, eos=True) == golden
    assert tokenizer.decode(golden[1:-1]) == text and tokenizer.encode(text) == golden[1:-1]
    assert tokenizer.stop_ids == {128001, 128009}
    chat = tokenizer.encode_chat([{"role": "user", "content": " Hi \n"}], True)
    assert chat == [128000, 128006, 882, 128007, 271, 13347, 128009, 128006, 78191, 128007, 271]
    assert SPECIAL[255] == "<|reserved_special_token_250|>" and tokenizer.vocab_size == 128256


@pytest.mark.parametrize("bos", ["", "{{ bos_token }}"])
def test_begin_of_a_chat(tmp_path, train, bos):
    """A ChatML chat may lack the begin token that its template writes, or get one that it does not
    write."""
    processors = pytest.importorskip("tokenizers").processors
    theirs = train("gpt2", ["<s>", *CHATML])
    begin = theirs.token_to_id("<s>")
    theirs.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)])
    tokenizer = save(theirs, tmp_path, bos + CHATML_TEMPLATE)
    ids = tokenizer.encode_chat(MESSAGES)
    assert ids.count(begin) == (ids[0] == begin) == bool(bos)


def test_end_of_text(tmp_path, write_ranks):
    """A text may be closed by an end token of config.json where the tokenizer has its own."""
    write_ranks(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": [1, 2]}')
    end = 256 + SPECIAL.index("<|end_of_text|>")
    assert Tokenizer.from_pretrained(tmp_path).encode("a", eos=True) == [97, end]
