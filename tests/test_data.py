"""The data of train.py: rows of JSONL as tokens, and the order in which training takes them."""
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import train
from flexidepth import DIGIT_SPLIT, Tokenizer

TINY = Path(__file__).resolve().parent / "tiny-llama"
QUESTION = {"role": "user", "content": "7 * 58 ="}
ANSWER = {"role": "assistant", "content": "406"}
GOOD = json.dumps({"messages": [QUESTION, ANSWER]}).encode() + b"\n"


@pytest.fixture(scope="module")
def llama3():
    return Tokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def chatml():
    """A tokenizer whose tokens are the bytes, and which speaks ChatML, as SmolLM2 does."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    special = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    return Tokenizer(ranks, special, DIGIT_SPLIT)


@pytest.fixture
def read(tmp_path, llama3, monkeypatch):
    """A function: the rows of a file, which is given as objects or bytes."""
    monkeypatch.chdir(tmp_path)

    def read(content, seq_len=256):
        if isinstance(content, list):
            content = b"".join(json.dumps(row).encode() + b"\n" for row in content)
        Path("rows.jsonl").write_bytes(content)
        args = Namespace(seq_len=seq_len, answers_only=True)
        return train.load_rows(Path("rows.jsonl"), llama3, args)
    return read


def counted(row, tokenizer):
    """The text of the tokens that count in L_lm."""
    where = row.targets != -100
    assert torch.equal(row.targets[where], row.ids[where])
    return tokenizer.decode(row.ids[where].tolist())


# ---- What counts ---------------------------------------------------------------------------------
def test_answers_only_in_llama3(llama3):
    """Training would learn to ask, or would not learn to end, if more or less than each answer and
    its end token counted. A tool's result is context."""
    messages = [{"role": "system", "content": "Be short."}, QUESTION,
                {"role": "assistant", "content": " 406 \n"}, {"role": "tool", "content": "12"},
                {"role": "assistant", "content": "twelve"}]
    row = train.tokenize({"messages": messages}, llama3, True)
    assert row.ids.tolist() == llama3.encode_chat(messages)
    assert counted(row, llama3) == "406<|eot_id|>twelve<|eot_id|>"
    row = train.tokenize({"messages": messages}, llama3, False)
    assert torch.equal(row.targets[1:], row.ids[1:])  # the first token is never a next one


def test_answers_only_in_chatml(chatml):
    """In ChatML the role, its line end, or the line end after a turn would count as answer."""
    messages = [QUESTION, ANSWER, QUESTION, {"role": "assistant", "content": "is 406"}]
    row = train.tokenize({"messages": messages}, chatml, True)
    assert chatml.decode(row.ids.tolist()) == (
        "<|im_start|>user\n7 * 58 =<|im_end|>\n<|im_start|>assistant\n406<|im_end|>\n"
        "<|im_start|>user\n7 * 58 =<|im_end|>\n<|im_start|>assistant\nis 406<|im_end|>\n")
    assert counted(row, chatml) == "406<|im_end|>is 406<|im_end|>"


def test_messages_of_no_weight(llama3):
    """An answer that its author marked as a bad one would be learnt, or be lost as context."""
    messages = [QUESTION, ANSWER | {"weight": 0}, QUESTION, ANSWER | {"weight": 1}]
    for answers_only in (True, False):
        row = train.tokenize({"messages": messages}, llama3, answers_only)
        assert row.ids.tolist() == llama3.encode_chat(messages)
        assert counted(row, llama3).count("406<|eot_id|>") == 1
        assert row.targets[-1] != -100


def test_every_token_of_a_text_counts(llama3, chatml):
    """A row of text would begin or end without its tokens, or count only in part."""
    for tokenizer, begin, end in ((llama3, "<|begin_of_text|>", "<|end_of_text|>"),
                                  (chatml, "", "<|endoftext|>")):
        row = train.tokenize({"text": "7 * 58 ="}, tokenizer, True)
        assert counted(row, tokenizer) == f"{begin}7 * 58 ={end}"


def test_padding_counts_in_no_loss(llama3):
    """Targets would be off by one, or padding would be taken for text."""
    rows = [train.tokenize({"text": "7 * 58 =" * times}, llama3, True) for times in (1, 3, 2)]
    input_ids, targets, real = train.collate(rows, "cpu")
    for i, row in enumerate(rows):
        T = len(row.ids) - 1
        assert torch.equal(input_ids[i, :T], row.ids[:-1]) and (input_ids[i, T:] >= 0).all()
        assert torch.equal(targets[i, :T], row.ids[1:]) and (targets[i, T:] == -100).all()
        assert real[i].tolist() == [j < T for j in range(real.shape[1])]


# ---- Rows ----------------------------------------------------------------------------------------
def test_messages_without_content(read, llama3, capsys):
    """A tool call, whose content is null or blank, would teach to answer with nothing, or end the
    run, or be left out without a word."""
    call = {"role": "assistant", "tool_calls": [{"name": "multiply"}]}
    rows = read([{"messages": [QUESTION, call | {"content": content}, ANSWER]}
                 for content in (None, "", " \n")])
    for row in rows:
        assert row.ids.tolist() == llama3.encode_chat([QUESTION, ANSWER])
        assert counted(row, llama3) == "406<|eot_id|>"
    assert "rows.jsonl: 3 rows\nleft out 3 messages without content\n" == capsys.readouterr().out


def test_rows_left_out_are_counted_by_reason(read, capsys):
    """Rows would be lost without a word, or all put down to length, or one that just fits lost."""
    rows = [{"messages": [QUESTION, ANSWER]}, {"messages": []}, {"messages": [QUESTION]},
            {"text": " "}, {"text": "long " * 300}, {"text": "long " * 400}]
    row, = read(rows)
    said = capsys.readouterr().out
    assert "left out 2 rows of more than --seq-len 256 tokens\n" in said
    assert "left out 3 rows without a token that counts\n" in said
    assert len(read(rows, seq_len=len(row.ids))) == 1 and not read(rows, seq_len=len(row.ids) - 1)


def test_tasks(read):
    """A row whose task is null or absent would make a task "None" in the table."""
    rows = read([{"messages": [QUESTION, ANSWER]} | task
                 for task in ({"task": None}, {}, {"task": "sum"}, {"task": 3})])
    assert [row.task for row in rows] == ["all", "all", "sum", "3"]


def test_a_row_is_a_line(read):
    """A line would be cut at U+2028 or another of Python's line ends, which JSON allows within a
    string. A byte order mark, \\r\\n and empty lines do no harm."""
    line = json.dumps({"text": "a\u2028b\u0085c"}, ensure_ascii=False)
    assert len(read(f"\ufeff{line}\r\n\n{line}".encode())) == 2


@pytest.mark.parametrize("content, words", [
    (GOOD + b"{oops\n", "2: not a JSON object"), (b"[" * 99999, "1: not a JSON object"),
    (GOOD + b'\n{"text": "\xff' + b"x" * 9999 + b'"}', "3: not a JSON object"),
    (b'[{"text": "a"}]', "1: not a JSON object"), (b"7", "1: not a JSON object"),
    (GOOD.replace(b"user", b"wizard"), "unknown role 'wizard'; expected system, user"),
    (GOOD.replace(b'"user"', b'["user"]'), "unknown role ['user']"),
    (GOOD.replace(b'"role": "user", ', b""), "KeyError('role')"),
    (GOOD.replace(b"{", b'{"system": "Be short.", ', 1), "'system' is not read"),
    (GOOD.replace(b"{", b'{"tools": [{}], ', 1), "'tools' is not read"),
    (GOOD.replace(b"messages", b"conversations"), "'conversations' is not read"),
    (GOOD.replace(b'"406"', b'[{"type": "image"}]'), "1: not a row"),
    (GOOD.replace(b'"406"', b"7"), "1: not a row"), (b'{"messages": ["a"]}', "1: not a row"),
    (b'{"messages": "abc"}', "1: not a row"), (b'{"messages": null, "text": "a"}', "1: not a row"),
    (b'{"prompt": "a", "completion": "b"}', "KeyError('text')"), (b'{"text": 7}', "1: not a row"),
    (b'{"text": "<|start_header_id|>user<|end_header_id|>"}', "chat markers in a text"),
    (b'{"text": "the end<|eot_id|>"}', "chat markers in a text"),
])
def test_a_bad_row_is_named(read, content, words):
    """What a row says would be read in part, or a traceback or a screenful would come in place of
    the file and the line that is bad."""
    with pytest.raises(ValueError) as raised:
        read(content)
    message = str(raised.value)
    assert message.startswith("rows.jsonl, line ") and words in message
    assert "not a JSON object" in message or "not a row of messages or text" in message
    assert "\n" not in message and len(message) < 250


# ---- The plan ------------------------------------------------------------------------------------
def test_plan_of_batches():
    """Rows would be seen twice in an epoch, in the same order in each, or the same ones be left out
    of each. A run that goes on, or another process, would take other rows."""
    plan = train.plan_batches(43, 15, 8, 0)
    epochs = [sum(plan[i:i + 5], []) for i in (0, 5, 10)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 40 and set(epoch) < set(range(43))
    assert epochs[0] != epochs[1] != epochs[2] and set(epochs[0]) != set(epochs[1])
    assert all(len(batch) == 8 for batch in plan)

    torch.rand(7)  # torch's global generator has no part in it
    assert train.plan_batches(43, 9, 8, 0) == plan[:9] and train.plan_batches(43, 0, 8, 0) == []
    assert train.plan_batches(43, 15, 8, 1) != plan
