"""The data of train.py: rows of JSONL as tokens, and the order in which training takes them."""
import gzip
import json
import math
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from flexidepth import GPT2_SPLIT, Tokenizer, Vocabulary

TINY = Path(__file__).resolve().parent / "tiny-llama"
QUESTION = {"role": "user", "content": "7 * 58 ="}
ANSWER = {"role": "assistant", "content": "406"}


@pytest.fixture(scope="module")
def llama3():
    return Tokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def chatml():
    """A tokenizer whose tokens are the bytes, and which speaks ChatML, as SmolLM2 does."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    special = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    return Tokenizer(Vocabulary(ranks, special, {}, GPT2_SPLIT, None))


@pytest.fixture
def read(tmp_path, llama3):
    """A function that reads rows, given as objects, bytes or a path, into train.Rows."""
    def read(content, **changes):
        args = Namespace(**{"seq_len": 256, "answers_only": True} | changes)
        if isinstance(content, list):
            content = b"".join(json.dumps(row).encode() + b"\n" for row in content)
        if isinstance(content, bytes):
            (tmp_path / "rows.jsonl").write_bytes(content)
            content = tmp_path / "rows.jsonl"
        return train.Rows(content, tmp_path / "tokens.pt", llama3, args)
    return read


def counted_text(row, tokenizer):
    return tokenizer.decode(row.ids[row.counted].tolist())


# ---- What counts ---------------------------------------------------------------------------------
def test_answers_only_in_llama3(llama3):
    """Training would learn to ask, or would not learn to end, if more or less than each answer and
    its end token counted. A tool's result is context."""
    messages = [{"role": "system", "content": "Be short."}, QUESTION,
                {"role": "assistant", "content": " 406 \n"}, {"role": "tool", "content": "12"},
                {"role": "assistant", "content": "twelve"}]
    row = train.tokenize({"messages": messages}, llama3, True)
    assert row.ids.tolist() == llama3.encode_chat(messages)
    assert counted_text(row, llama3) == "406<|eot_id|>twelve<|eot_id|>"
    assert train.tokenize({"messages": messages}, llama3, False).counted.all()


def test_answers_only_in_chatml(chatml):
    """In ChatML the role, its line end, or the line end after a turn would count as answer."""
    messages = [QUESTION, ANSWER, QUESTION, {"role": "assistant", "content": "is 406"}]
    row = train.tokenize({"messages": messages}, chatml, True)
    assert chatml.decode(row.ids.tolist()) == (
        "<|im_start|>user\n7 * 58 =<|im_end|>\n<|im_start|>assistant\n406<|im_end|>\n"
        "<|im_start|>user\n7 * 58 =<|im_end|>\n<|im_start|>assistant\nis 406<|im_end|>\n")
    assert counted_text(row, chatml) == "406<|im_end|>is 406<|im_end|>"


def test_every_token_of_a_text_counts(llama3, chatml):
    """A row of text would begin or end without its tokens, or count only in part."""
    for tokenizer, begin, end in ((llama3, "<|begin_of_text|>", "<|end_of_text|>"),
                                  (chatml, "", "<|endoftext|>")):
        row = train.tokenize({"text": "7 * 58 ="}, tokenizer, True)
        assert row.counted.all()
        assert tokenizer.decode(row.ids.tolist()) == f"{begin}7 * 58 ={end}"


def test_padding_and_prompt_count_in_no_loss(llama3):
    """Targets would be off by one, padding would be taken for text, or the prompt would count."""
    answers = ("406", "4 0 6")
    rows = [train.tokenize({"messages": [QUESTION, ANSWER | {"content": answer}]}, llama3, True)
            for answer in answers]
    input_ids, targets, real = train.collate(rows, "cpu")

    for i, answer in enumerate(answers):
        ids, T = rows[i].ids, len(rows[i].ids) - 1
        assert llama3.decode(targets[i][targets[i] != -100].tolist()) == f"{answer}<|eot_id|>"
        assert input_ids[i, :T].tolist() == ids[:-1].tolist()
        due = (targets[i] != -100).nonzero()[:, 0]
        assert targets[i, due].tolist() == ids[due + 1].tolist()
        assert real[i].tolist() == [j < T for j in range(real.shape[1])]
        assert (targets[i, T:] == -100).all() and (input_ids[i, T:] == 0).all()


# ---- Rows ----------------------------------------------------------------------------------------
def test_spellings_of_a_conversation(llama3):
    """A data set in another spelling would be refused, or give other tokens. A turn without
    content, such as a tool call, is left out."""
    expected = train.tokenize({"messages": [QUESTION, ANSWER]}, llama3, True)
    parts = [{"type": "text", "text": "7 *"}, {"type": "text", "text": " 58 ="}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "multiply"}]}
    spellings = [
        {"conversations": [{"from": "human", "value": "7 * 58 ="},
                           {"from": "gpt", "value": "406"}]},
        {"conversations": [QUESTION, ANSWER]},
        {"messages": None, "conversations": [QUESTION, ANSWER]},
        {"messages": [QUESTION | {"content": parts}, ANSWER]},
        {"messages": [QUESTION, call, ANSWER], "text": None}]
    for spelling in spellings:
        row = train.tokenize(spelling, llama3, True)
        assert row.ids.tolist() == expected.ids.tolist(), spelling
        assert row.counted.tolist() == expected.counted.tolist(), spelling

    speakers = ("human", "function_call", "observation", "gpt")
    tools = {"conversations": [{"from": speaker, "value": str(value)}
                               for value, speaker in enumerate(speakers, 7)]}
    assert counted_text(train.tokenize(tools, llama3, True), llama3) == "8<|eot_id|>10<|eot_id|>"


def test_task_that_is_null(read):
    """A row whose task is null or absent would make a task "None" in the table."""
    rows = read([{"messages": [QUESTION, ANSWER]} | task
                 for task in ({"task": None}, {}, {"task": "sum"}, {"task": 3})])
    assert rows.tasks == ["all", "all", "sum", "3"]
    assert rows[2].task == "sum"


def test_rows_come_back_as_they_were(read, llama3, capsys):
    """A row would come back with a neighbour's tokens, its ids cut to 16 bits, or out of place."""
    talks = [{"text": "long " * length, "task": str(length)} for length in (1, 7, 3)]
    rows = read(talks, answers_only=False)
    assert len(rows) == 3 and rows.lengths.tolist() == [len(rows[i].ids) for i in range(3)]
    for i, talk in enumerate(talks):
        assert rows[i].ids.dtype == np.int32 and rows[i].task == talk["task"]
        assert rows[i].ids.tolist() == llama3.encode(talk["text"], bos=True, eos=True)
    assert capsys.readouterr().out == ""


def test_a_row_is_a_line(read):
    """A line would be cut at U+2028 or another of Python's line ends, which JSON allows within a
    string. A byte order mark, \\r\\n and empty lines do no harm."""
    line = json.dumps({"text": "a\u2028b\u0085c"}, ensure_ascii=False)
    assert len(read(f"\ufeff{line}\r\n\n{line}".encode())) == 2


def test_rows_left_out_are_counted_by_reason(read, capsys):
    """Rows would be lost without a word, or all be put down to their length."""
    rows = read([{"messages": [QUESTION, ANSWER]}, {"messages": []}, {"text": ""},
                 {"messages": [QUESTION]}, {"messages": [QUESTION, ANSWER | {"content": None}]},
                 {"text": "long " * 300}, {"text": "long " * 400}, {"text": "long " * 500}])
    assert len(rows) == 1
    said = capsys.readouterr().out
    for reason in ("3 of more than --seq-len 256 tokens", "2 without an answer", "2 empty"):
        assert reason in said
    with pytest.raises(ValueError, match="no row to use; left out: 1 without an answer"):
        read([{"messages": [QUESTION]}])
    with pytest.raises(ValueError, match="no row to use"):
        read(b"\n\n")


def test_chat_markers_in_text_are_warned_of_once(read, capsys):
    """Text that was put into chat format by hand would be trained on as plain characters, without
    a word or with a word a row."""
    marked = "<|start_header_id|>user<|end_header_id|>"
    read([{"text": marked}] * 3 + [{"text": "plain"}] * 2
         + [{"conversations": [QUESTION, ANSWER], "text": marked}])  # its text is not read
    said = capsys.readouterr().out
    assert said.count("warning") == 1 and "3 rows of text hold special tokens" in said


def test_compressed_rows_and_a_pipe(tmp_path, read):
    """Rows in a .gz file or from a pipe would not be read, or a pipe would be read twice."""
    content = json.dumps({"messages": [QUESTION, ANSWER]}).encode() + b"\n"
    for name in ("rows.jsonl.gz", "ROWS.JSONL.GZ"):
        (tmp_path / name).write_bytes(gzip.compress(content * 2))
        assert len(read(tmp_path / name)) == 2

    source, sink = os.pipe()
    os.write(sink, content * 3)
    os.close(sink)
    try:
        assert len(read(Path(f"/dev/fd/{source}"))) == 3
    finally:
        os.close(source)


GOOD = json.dumps({"messages": [QUESTION, ANSWER]}).encode() + b"\n"


@pytest.mark.parametrize("content, words", [
    (GOOD + b"{oops\n", "line 2: expected a JSON object"),
    (GOOD + b'\n{"text": "\xff' + b"x" * 9999 + b'"}', "line 3: expected a JSON object"),
    (b"[" * 99999, "line 1: expected a JSON object"),
    (b'[{"text": "a"}]', "line 1: expected a JSON object"),
    (b'[\n{"text": "a"}\n]', "line 1: expected a JSON object"),
    (b"7", "line 1: expected a JSON object"),
    (GOOD.replace(b"user", b"wizard"), "line 1: not a row to train on: unknown role 'wizard'"),
    (b'{"messages": ["a"]}', "line 1: not a row to train on"),
    (b'{"messages": "abc"}', "line 1: not a row to train on"),
    (b'{"messages": 7}', "line 1: not a row to train on"),
    (b'{"messages": [{"role": "user", "content": 7}]}', "line 1: not a row to train on"),
    (b'{"messages": [{"role": ["user"], "content": "a"}]}', "line 1: not a row to train on"),
    (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "line 1: not a row"),
    (b'{"prompt": "a", "completion": "b"}', "line 1: not a row to train on: expected"),
    (b'{"text": 7}', "line 1: not a row to train on: expected"),
])
def test_a_bad_row_is_named(read, content, words):
    """A traceback, or a screenful, would come in place of the file and the line that is bad."""
    with pytest.raises(ValueError) as raised:
        read(content)
    message = str(raised.value)
    assert "rows.jsonl: " + words in message
    assert "\n" not in message and len(message.split("rows.jsonl")[1]) < 300


@pytest.mark.parametrize("damage", ["cut off", "changed", "not compressed"])
def test_a_damaged_gz_file_is_named(tmp_path, read, damage):
    """A download that was cut off would end in a traceback."""
    content = gzip.compress(json.dumps({"text": "".join(map(chr, range(40, 120)))}).encode())
    damaged = {"cut off": content[:-12], "changed": content[:12] + b"\xff" * 20 + content[32:],
               "not compressed": b'{"text": "a"}\n'}
    (tmp_path / "rows.jsonl.gz").write_bytes(damaged[damage])
    with pytest.raises((OSError, ValueError), match="rows.jsonl.gz"):
        read(tmp_path / "rows.jsonl.gz")


# ---- The plan ------------------------------------------------------------------------------------
def test_plan_of_batches():
    """Rows would be padded to the longest of a random few, left out, seen twice in an epoch, or
    grouped by length so that a step sees only long ones."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 1, 20000), 16, 2048).astype(np.int64)  # like Tulu's
    args = Namespace(batch_size=64, micro_batch_size=8, seed=0)
    steps_an_epoch = 20000 // 64
    plan = train.plan_batches(lengths, 3 * steps_an_epoch, args)

    for epoch in plan.split(steps_an_epoch):
        assert torch.bincount(epoch.flatten(), minlength=20000).max() == 1
    in_micro_batches = torch.from_numpy(lengths)[plan].sort(1)[0].view(-1, 8)
    longest = in_micro_batches.max(1)[0] * 8
    assert 1 - in_micro_batches.sum() / longest.sum() < 0.05
    means = torch.from_numpy(lengths)[plan].double().mean(1)
    assert means.std() < 3 * lengths.std() / math.sqrt(64 / 8)


def test_the_plan_depends_on_the_seed_alone():
    """A resumed run, or one with other micro-batches, would go on with other rows."""
    lengths = np.arange(3, 43)
    args = Namespace(batch_size=8, micro_batch_size=8, seed=0)
    plan = train.plan_batches(lengths, 12, args)
    assert plan.shape == (12, 8)

    torch.rand(7)  # torch's global generator has no part in it
    assert torch.equal(plan, train.plan_batches(lengths, 12, args))
    assert torch.equal(plan[:9], train.plan_batches(lengths, 9, args))
    args.micro_batch_size = 2
    assert torch.equal(plan, train.plan_batches(lengths, 12, args))
    assert not torch.equal(plan[:5], plan[5:10])
    args.seed = 1
    assert not torch.equal(plan, train.plan_batches(lengths, 12, args))
    assert train.plan_batches(lengths, 0, args).shape == (0, 8)
