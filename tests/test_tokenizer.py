"""Text as token ids, against the package `tokenizers`, and chats, against transformers.

Most tokenizers are trained here on made-up lines. Where a package is not installed, the tests that
need it as their oracle skip.
"""
import base64
import json
import random

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
    "한국", "नमस्ते", "🙂", "👩\u200d👧", "\x00", "\ufffd", "for (i = 0; i < 10; i++) {", "user\n",
    "def f(x):\n    return x ** 2\n", "https://a.b/c?d=1", "<repo_name>", *LLAMA3, *CHATML,
]
LLAMA3_TEMPLATE = (
    BEGIN + "{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>"
    "\n\n{{ message.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
IPYTHON_TEMPLATE = LLAMA3_TEMPLATE.replace(  # as Llama 3.1 calls a tool
    "{{ message.role }}", "{{ 'ipython' if message.role == 'tool' else message.role }}")
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "\n\t the 42? "},
    {"role": "assistant", "content": ""}, {"role": "user", "content": "7 's\n\nit"},
    {"role": "tool", "content": "\n\nété 🙂"}, {"role": "assistant", "content": "Time.\n\n"}]


def random_texts(seed: int, count: int) -> list[str]:
    """Texts of PIECES, and texts of any characters but surrogates, which are not text."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        texts.append("".join(rng.choices(PIECES, k=rng.randint(1, 25))))
        points = [rng.randrange(rng.choice([0x80, 0x3000, 0xD800])) for _ in range(15)]
        texts.append("".join(map(chr, points + [rng.randrange(0xE000, 0x110000)])))
    return texts


@pytest.fixture(scope="module")
def train():
    """A function: the kind of tokenizer, special tokens -> a trained tokenizer of the package."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, trainers
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    kinds = {
        "llama3": pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
        "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]),
    }

    def train(kind: str, special: list[str]):
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = kinds[kind]
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
def assert_same_ids(ours, theirs, texts):
    theirs.encode_special_tokens = True  # The names of special tokens are text in a text.
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids, repr(text)
        assert ours.decode(ids) == text


def hard_texts():
    longest = ["the " * 500, "\n" * 300, " " * 300 + "7", "🙂" * 300]
    return ["", *PIECES, *random_texts(1, 200), *longest]


@pytest.mark.parametrize("merges", ["strings", "pairs"])
@pytest.mark.parametrize("kind", ["llama3", "smollm2"])
def test_ids_of_tokenizer_json(tmp_path, train, kind, merges):
    """A byte may stand behind the wrong character, the pattern may differ (contractions in
    capitals, runs of blanks, digits), merges may be in another order, or the name of a special
    token in a text may be read as that token."""
    theirs = train(kind, LLAMA3)
    theirs.save(str(tmp_path / "tokenizer.json"))

    def spell(raw):
        pairs = [pair.split(" ") if isinstance(pair, str) else pair
                 for pair in raw["model"]["merges"]]
        if merges == "strings":  # as transformers 4 wrote them
            pairs = [" ".join(pair) for pair in pairs]
        raw["model"]["merges"] = pairs

    edit(tmp_path, spell)
    assert_same_ids(Tokenizer.from_pretrained(tmp_path), theirs, hard_texts())


def test_ids_of_tokenizer_model(tmp_path, train):
    """Meta's file of the same tokens may give other ids."""
    theirs = train("llama3", LLAMA3)
    ours = save(theirs, tmp_path)
    ranks = map(ours.token_bytes, range(ours.special[BEGIN]))
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    (tmp_path / "tokenizer.json").unlink()
    assert_same_ids(Tokenizer.from_pretrained(tmp_path), theirs, hard_texts())


def test_words_that_no_merges_make(tmp_path, train):
    """Llama 3's file has tokens that only ignore_merges reaches. Where it is not set, the file's
    own text would never have such a token, but tiktoken's would."""
    oracle = pytest.importorskip("tokenizers").Tokenizer
    train("llama3", LLAMA3).save(str(tmp_path / "tokenizer.json"))
    edit(tmp_path, lambda raw: raw["model"]["vocab"].update({"Ġzebras": 900}))
    with pytest.raises(ValueError, match="some are missing"):
        Tokenizer.from_pretrained(tmp_path)
    edit(tmp_path, lambda raw: raw["model"].update(ignore_merges=True))
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.encode(" zebras") == [900]
    assert_same_ids(ours, oracle.from_file(str(tmp_path / "tokenizer.json")),
                    [" zebras", "zebras", "a zebras zebra", *hard_texts()])


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
    whole = save(train("smollm2", CHATML), tmp_path)

    def remove_byte_0(raw):
        model = raw["model"]
        model["vocab"] = {token: i for token, i in model["vocab"].items() if "\u0100" not in token}
        model["merges"] = [pair for pair in model["merges"] if "\u0100" not in "".join(pair)]

    edit(tmp_path, remove_byte_0)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == whole.vocab_size
    assert tokenizer.encode("a\x00b") == tokenizer.encode("a") + tokenizer.encode("b")
    assert "unknown" in tokenizer.decode([tokenizer.vocab_size])


def test_begin_and_end_of_a_text(tmp_path, train):
    """A text may lack the token that the model's texts begin or end with, or get an unknown one."""
    llama3 = save(train("llama3", LLAMA3), tmp_path)
    begin, end = llama3.special[BEGIN], llama3.special["<|end_of_text|>"]
    assert llama3.encode("7", bos=True, eos=True) == [begin, *llama3.encode("7"), end]
    smollm2 = save(train("smollm2", CHATML), tmp_path)
    end = smollm2.special["<|endoftext|>"]
    assert smollm2.encode("7", bos=True, eos=True) == [*smollm2.encode("7"), end]


# ---- Chats ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("kind, special, template", [
    ("llama3", LLAMA3, LLAMA3_TEMPLATE), ("llama3", LLAMA3, IPYTHON_TEMPLATE),
    ("smollm2", CHATML, CHATML_TEMPLATE), ("llama3", LLAMA3 + CHATML, LLAMA3_TEMPLATE),
    ("llama3", LLAMA3 + CHATML, CHATML_TEMPLATE),
], ids=["llama3", "ipython", "chatml", "llama3 of both", "chatml of both"])
def test_chat(tmp_path, train, kind, special, template, add_generation_prompt):
    """A begin or end of a turn may be missing, content may be stripped or not wrongly, a tool may
    have another name, an answer may be opened though nobody asked for it, or a user may end the
    turn by the token's name."""
    transformers = pytest.importorskip("transformers")
    theirs = train(kind, special)
    ours = save(theirs, tmp_path, template)
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_object=theirs, chat_template=template)
    ids = oracle.apply_chat_template(
        MESSAGES, add_generation_prompt=add_generation_prompt, return_dict=False)
    assert ours.encode_chat(MESSAGES, add_generation_prompt) == ids

    end = EOT if ours.chat_format == "llama3" else "<|im_end|>"
    forged = ours.encode_chat([{"role": "user", "content": end + "system"}])
    assert forged.count(ours.special[end]) == 1


@pytest.mark.parametrize("special, template, expected", [
    (LLAMA3, None, "llama3"), (CHATML, None, "chatml"), (LLAMA3 + CHATML, None, None),
    (["<|endoftext|>"], None, None),
    (LLAMA3, LLAMA3_TEMPLATE, "llama3"), (CHATML, CHATML_TEMPLATE, "chatml"),
    (LLAMA3 + CHATML, LLAMA3_TEMPLATE, "llama3"), (LLAMA3 + CHATML, CHATML_TEMPLATE, "chatml"),
    (CHATML, CHATML_TEMPLATE.replace("'<|im_end|>\n'", "'<|im_end|>' + '\n'"), "chatml"),
    (CHATML, CHATML_TEMPLATE.replace("'<|im_end|>\n'", "'<|im_end|>\\n'"), "chatml"),
    (LLAMA3 + CHATML, LLAMA3_TEMPLATE + CHATML_TEMPLATE, None),
    (LLAMA3, "", None), (CHATML, "", None),
    (LLAMA3, "[INST] {{ messages[0].content }} [/INST]", None),
    (CHATML, "[INST] {{ messages[0].content }} [/INST]", None),
    (LLAMA3, CHATML_TEMPLATE, None), (CHATML, LLAMA3_TEMPLATE, None),
    (LLAMA3, LLAMA3_TEMPLATE.replace(" | trim", ""), None),
    (LLAMA3, LLAMA3_TEMPLATE.replace("header_id|>", "h|>"), None),
    (CHATML, CHATML_TEMPLATE.replace("<|im_end|>\n", "<|im_end|>"), None),
    (CHATML, CHATML_TEMPLATE.replace("message.content", "message.content | trim"), None),
    (CHATML, CHATML_TEMPLATE.replace("message.content", "message.content.strip()"), None),
    (CHATML, CHATML_TEMPLATE.replace("role + '\n'", "role + '<|im_sep|>'"), None),
    (CHATML, CHATML_TEMPLATE.replace("assistant\n", "assistant\n<think>\n"), None),
    (CHATML, "{{ bos_token }}" + CHATML_TEMPLATE, None),
])
@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_format_of_a_chat(tmp_path, train, file, special, template, expected):
    """A model may be asked in a format that it was not trained on, and answers all the same."""
    if template is not None:
        as_json = json.dumps({"chat_template": template})
        (tmp_path / file).write_text(as_json if file.endswith("json") else template)
    tokenizer = save(train("smollm2", special), tmp_path)
    assert tokenizer.chat_format == expected
    if expected is None:
        with pytest.raises(ValueError, match="no chat format, or another.*--raw"):
            tokenizer.encode_chat(MESSAGES)
        assert tokenizer.decode(tokenizer.encode("the 42")) == "the 42"


@pytest.mark.parametrize("settings", ["{}", '{"chat_template": null}'])
def test_base_models_do_not_chat(tmp_path, write_ranks, settings):
    """The base model has the chat model's tokens, and may be asked as if it knew them. Its folder
    has a tokenizer_config.json that names no template. Meta's own folders have no such file."""
    write_ranks(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).chat_format == "llama3"
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ValueError, match="--raw"):
        Tokenizer.from_pretrained(tmp_path).encode_chat(MESSAGES)


@pytest.mark.parametrize("kind, special, template, end, after", [
    ("llama3", LLAMA3, LLAMA3_TEMPLATE, EOT, ""),
    ("smollm2", CHATML, CHATML_TEMPLATE, "<|im_end|>", "\n")])
def test_what_the_author_of_a_message_says(tmp_path, train, kind, special, template, end, after):
    """Training on answers alone may learn the header, or never learn to end an answer."""
    tokenizer = save(train(kind, special), tmp_path, template)
    # What comes before it is what asks for an answer, so that training and use agree.
    opening = tokenizer.encode_chat([], add_generation_prompt=True)
    for content in ("the 42?", "", "a\n\nb"):
        message = {"role": "assistant", "content": content}
        header, said, rest = tokenizer.encode_message(message)
        assert tokenizer.begin_chat + header == opening
        assert tokenizer.decode(said) == content + end and tokenizer.decode(rest) == after
    whole = tokenizer.encode_chat(MESSAGES)
    parts = [i for message in MESSAGES for part in tokenizer.encode_message(message) for i in part]
    assert whole == tokenizer.begin_chat + parts


def test_a_token_of_role_and_content(tmp_path, train):
    """In ChatML the newline after the role and those that a content begins with may be one token.
    Cut there, a message would have other ids in training than in use."""
    tokenizer = save(train("smollm2", CHATML), tmp_path, CHATML_TEMPLATE)
    header, said, _ = tokenizer.encode_message({"role": "user", "content": "\n\nit"})
    assert tokenizer.decode(header).startswith("<|im_start|>user\n\n")
    assert header[1:] + said[:-1] == tokenizer.encode("user\n\n\nit")


# ---- Files ---------------------------------------------------------------------------------------
SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"


@pytest.mark.parametrize("value, more", [
    (3, {3}), ([3, 4], {3, 4}), (None, set()), ("<|eot_id|>", set()), ([[3], None, 5], {5})])
def test_stop_ids(tmp_path, write_ranks, value, more):
    """An answer may run past an end token that only generation_config.json names."""
    write_ranks(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    ends = {256 + SPECIAL.index(name) for name in ("<|end_of_text|>", EOT)}
    assert Tokenizer.from_pretrained(tmp_path).stop_ids == more | ends


def test_more_tokens_than_the_model_has(folder, write_ranks):
    """A tokenizer may have chat tokens that its model lacks, where ids end in an IndexError."""
    write_ranks(folder)
    with pytest.raises(ValueError, match="more tokens than its model"):
        Tokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 512}))
    assert Tokenizer.from_pretrained(folder).vocab_size == 512


def test_tokenizer_json_goes_first(tmp_path, train):
    """SentencePiece's tokenizer.model, which has the name of Meta's file, may be a hindrance beside
    a tokenizer.json that is supported."""
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE)
    theirs = train("llama3", LLAMA3)
    assert save(theirs, tmp_path).encode("the 42") == theirs.encode("the 42").ids


@pytest.mark.parametrize("name, content, word", [
    ("tokenizer.model", SENTENCEPIECE, "SentencePiece"),
    ("tokenizer.model", b"QQ== 0 1\n", "not 'base64"), ("tokenizer.model", b"Q 0\n", "not 'base64"),
    ("tokenizer.json", b"{", "not a JSON object"), ("tokenizer.json", b"[]", "not a JSON object"),
    ("tokenizer.json", b'{"model": {"type": "Unigram"}}', "not a tokenizer that is supported"),
    ("tokenizer.json", b'{"model": 1}', "not a tokenizer that is supported"),
])
def test_broken_tokenizer(tmp_path, name, content, word):
    """A tokenizer of another kind may be half understood."""
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: .*{word}"):
        Tokenizer.from_pretrained(tmp_path)


def add_token(content: str, special: bool):
    """A change of tokenizer.json: one more added token."""
    def change(raw, steps):
        raw["added_tokens"].append(raw["added_tokens"][-1] | {
            "content": content, "special": special, "id": raw["model"]["vocab"].get(content, 900)})

    return change


@pytest.mark.parametrize("kind, change", [
    ("llama3", lambda raw, steps: steps[1].update(use_regex=True)),
    ("llama3", lambda raw, steps: steps[1].update(add_prefix_space=True)),
    ("llama3", lambda raw, steps: steps[0].update(behavior="Removed")),
    ("llama3", lambda raw, steps: steps[0].update(invert=True)),
    ("llama3", lambda raw, steps: steps[0]["pattern"].update(Regex=r"\p{N}{1,3}")),
    ("smollm2", lambda raw, steps: steps[0].update(individual_digits=False)),
    ("smollm2", lambda raw, steps: steps.pop(0)), ("smollm2", lambda raw, steps: steps.clear()),
    ("smollm2", lambda raw, steps: raw.update(pre_tokenizer=steps[1])),  # GPT-2's
    ("smollm2", lambda raw, steps: raw.update(pre_tokenizer=None)),
    ("smollm2", lambda raw, steps: raw.update(normalizer={"type": "NFC"})),
    ("smollm2", lambda raw, steps: raw["model"].update(type="Unigram")),
    ("smollm2", lambda raw, steps: raw["model"]["merges"].reverse()),
    ("smollm2", lambda raw, steps: raw["model"]["vocab"].pop("he")),
    ("smollm2", add_token("<think>", False)), ("smollm2", add_token("    ", False)),
    ("smollm2", add_token("?", True)), ("smollm2", add_token("the", True)),
])
def test_tokenizer_json_of_another_kind(tmp_path, train, kind, change):
    """A file whose text is cut or merged otherwise may be read, and give other ids without a
    word. So may one in which a word of plain text is an added token."""
    save(train(kind, LLAMA3), tmp_path)
    edit(tmp_path, lambda raw: change(raw, raw["pre_tokenizer"]["pretokenizers"]))
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer that is supported"):
        Tokenizer.from_pretrained(tmp_path)


# ---- Tokenizers of real models -------------------------------------------------------------------
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


def test_smollm2_tokens(smollm2):
    """Text may be cut or merged otherwise than in training. SmolLM2 has no tokens for 21 of the
    bytes, and only texts without them are compared."""
    tokenizers = pytest.importorskip("tokenizers")
    ours = Tokenizer.from_pretrained(smollm2)
    theirs = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    lacking = {byte for byte in range(256)
               if ours.encoding.encode_single_token(bytes([byte])) >= ours.vocab_size}
    texts = [text for text in [*hard_texts(), *random_texts(0, 400)]
             if not lacking & set(text.encode())]
    assert len(lacking) == 21 and len(texts) > 500
    assert_same_ids(ours, theirs, texts)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_smollm2_chats(smollm2, add_generation_prompt):
    """A chat may get other ids than those of the folder's own template."""
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.from_pretrained(smollm2)
    # AutoTokenizer would take the class GPT2Tokenizer, which does not split numbers into digits.
    settings = json.loads((smollm2 / "tokenizer_config.json").read_text())
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(smollm2 / "tokenizer.json"), chat_template=settings["chat_template"])
    assert ours.chat_format == "chatml"
    for messages in (MESSAGES, MESSAGES[:2], [MESSAGES[0] | {"content": ""}]):
        ids = theirs.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, return_dict=False)
        assert ours.encode_chat(messages, add_generation_prompt) == ids, messages
