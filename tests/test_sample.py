"""sample.py: what it prints, writes and refuses; one record a generation, in three views."""
import gzip
import io
import json
import os
import runpy
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
from flexidepth import FlexiDepth, Tokenizer, generate, layers_used

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny-llama"
HOSTILE = "</script><img src=x onerror=alert(1)><style>*{}</style>\"'><b onclick=x>&lt;"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def script(monkeypatch):
    """A function that runs sample.py in this process, as its command line does. It returns None,
    or the one line with which the script ended in failure."""
    def script(*arguments):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
        except SystemExit as end:
            # Python prints a text to standard error and exits with status 1.
            assert isinstance(end.code, str) and end.code.count("\n") == 0, end.code
            return end.code
    return script


@pytest.fixture
def call(monkeypatch):
    """A function that runs main() of the imported module, parts of which a test may replace."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        sample.main()
    return call


@pytest.fixture
def rows(tmp_path):
    """A prompt file of twelve of the tiny Llama's rows, two a task."""
    lines = (TINY / "valid.jsonl").read_text().splitlines(keepends=True)
    tasks = [json.loads(line)["task"] for line in lines]
    first = [tasks.index(task) for task in dict.fromkeys(tasks)]
    (tmp_path / "rows.jsonl").write_text("".join(lines[i] + lines[i + 1] for i in first))
    return tmp_path / "rows.jsonl"


@pytest.fixture(scope="module")
def tiny():
    return FlexiDepth.from_pretrained(TINY, flexidepth=TINY), Tokenizer.from_pretrained(TINY)


def request(**changes):
    """The fields of a record before its generation."""
    return {"model": "tiny", "flexidepth": "tiny", "num_hidden_layers": 12,
            "routing_layers": list(range(6, 12)), "threshold": 0.5, "route": "learned", "seed": 0,
            "gates": True, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 9} | changes


def quiet(token, depth):
    """A view of the generation that shows nothing."""


def read(file):
    """The records of a depth map in the order of their prompts, without what differs from run to
    run."""
    records = [json.loads(line) for line in Path(file).read_text().splitlines()]
    records.sort(key=lambda record: record["seed"])
    return [{key: value for key, value in record.items() if key not in ("seconds", "tokens_per_s")}
            for record in records]


def lines_of(out):
    return [line for line in out.splitlines() if line]


# ---- The terminal --------------------------------------------------------------------------------
def test_plain_text(script, capsys):
    """Colour codes would appear in a pipe, or a depth or the mean would not be shown."""
    assert script("--show-depth") is None
    out = capsys.readouterr().out
    assert "\033" not in out and out.count("layers on average") == len(sample.EXAMPLES)
    assert "the number behind each token, 6 to 12" in out
    assert all(f"> {prompt}" in out for prompt in sample.EXAMPLES)
    assert script("--route", "full", "--prompt", "7 * 58 =") is None
    out = capsys.readouterr().out
    assert out.endswith("\n406\n") and "all layers for every token" in out


def test_prompts_of_the_command_line_and_a_file(script, capsys):
    """A prompt would be lost on its way from the command line, a file or a pipe."""
    Path("prompts.txt").write_text("Repeat: 11 22 33\n\n7 * 11 =\r\n")
    assert script("--prompt-file", "prompts.txt", "--prompt", "2 * 34 =") is None
    said = lines_of(capsys.readouterr().out)[1:]
    assert said[:2] == ["> 2 * 34 =", "68"]
    assert {tuple(said[i:i + 2]) for i in (2, 4)} == {
        ("> Repeat: 11 22 33", "11 22 33"), ("> 7 * 11 =", "77")}

    source, sink = os.pipe()
    os.write(sink, b"7 * 11 =\n")
    os.close(sink)
    try:
        assert script("--prompt-file", f"/dev/fd/{source}") is None
    finally:
        os.close(source)
    assert capsys.readouterr().out.endswith("> 7 * 11 =\n77\n")


def test_answers_come_in_the_order_of_prompts(script, capsys):
    """Prompts of a file are run by length. Their answers would be shown under other prompts."""
    Path("prompts.txt").write_text("7 * 11 =\nRepeat: 11 22 33\n2 * 34 =\n")
    assert script("--prompt-file", "prompts.txt") is None
    said = lines_of(capsys.readouterr().out)[1:]
    answers = dict(zip(said[::2], said[1::2]))
    assert answers == {"> 7 * 11 =": "77", "> Repeat: 11 22 33": "11 22 33", "> 2 * 34 =": "68"}


def test_special_tokens_of_a_raw_prompt(script, capsys):
    """A pasted chat would be spelled out letter by letter without a word, or every prompt warned
    of."""
    assert script("--raw", "--max-new-tokens", 1, "--prompt", "2 * 34 =") is None
    assert "warning" not in capsys.readouterr().err
    assert script("--raw", "--max-new-tokens", 1, "--prompt", "2 * 34 =<|eot_id|>") is None
    assert capsys.readouterr().err.count("warning: a special token's name") == 1


def test_chat(script, monkeypatch, capsys):
    """A conversation would forget what was said though the context has room for it, or lose a line
    that has no end."""
    again = "Again " + "1 2 3 " * 12
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"2 * 34 =\n\n  \n{again}"))
    assert script("--chat", "--depth-map", "map.jsonl", "--max-new-tokens", 256) is None
    assert "> 2 * 34 =\n68\n" in capsys.readouterr().out
    said = [message["content"] for message in read("map.jsonl")[1]["messages"]]
    assert said == ["2 * 34 =", "68", again]


def test_chat_that_outgrows_the_context(script, monkeypatch, capsys, tiny):
    """A long chat would end with an error and lose its page. The oldest turns are dropped with a
    word, a message that has no room alone is not sent, and the chat goes on."""
    lines = ["2 * 34 =", "1 2 3 " * 12, "4 5 6 " * 12, "1 " * 300, "7 * 11 ="]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    assert script("--chat", "--depth-map", "map.jsonl", "--html", "page.html",
                  "--max-new-tokens", 90) is None
    out = capsys.readouterr().out
    assert "(the context is full: the oldest 2 messages are dropped)" in out
    assert out.count("(not sent: it has ") == 1 and "and the context 256)" in out
    assert out.count("are dropped") < 3

    records = read("map.jsonl")
    asked = [record["messages"][-1]["content"] for record in records]
    assert asked == [line for line in lines if line != lines[3]]
    for record in records:
        assert record["messages"][0]["role"] == "user"
        assert {m["role"] for m in record["messages"][::2]} == {"user"}
        assert all(m["content"] != lines[3] for m in record["messages"])
        assert len(record["prompt"]["ids"]) + len(record["answer"]["ids"]) <= 257
    assert records[1]["messages"][0]["content"] == lines[0]
    assert records[-1]["messages"][0]["content"] in lines[1:3]
    assert Path("page.html").read_text().count("<h2>") == 4


def test_characters_come_out_whole(monkeypatch, capsys, tiny):
    """Half a character would be printed as U+FFFD, or all depths would have one shade."""
    _, tokenizer = tiny
    printer = sample.Printer(tokenizer, request(), True)
    for token in tokenizer.encode("é"):
        printer.write(token, 7)
    assert capsys.readouterr().out == "[7]é[7]"

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    printer = sample.Printer(tokenizer, request(), True)
    assert len({printer.shade("x", depth) for depth in range(6, 13)}) == 7
    printer.write(ord("A"), 6)
    printer.write(ord("\n"), 6)
    assert capsys.readouterr().out == printer.shade("A", 6) + "\n"
    assert printer.legend().count("\033[48;5;") == 7
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in sample.Printer(tokenizer, request(), True).legend()


def test_hostile_text_in_the_terminal(script, capsys):
    """A prompt or a token could steer the terminal or turn text around. Joiners of emoji and other
    scripts must stay."""
    bad = "\033[2J\x07\x7f\x9b\r\x08\u202e\u2066\u200f\u061c\u2028\ud800"
    shown = sample.printable(bad)
    assert shown == ("\\x1b[2J\\x07\\x7f\\x9b\\r\\x08\\u202e\\u2066\\u200f\\u061c\\u2028\\ud800")
    good = "👩‍💻 é 漢字 می‌خواهم\tx\ny"
    assert sample.printable(good) == good

    assert script("--raw", "--prompt", f"a{bad[:-1]}👩‍💻b", "--max-new-tokens", 1) is None
    out = capsys.readouterr().out
    assert "\\x1b[2J" in out and "👩‍💻" in out
    assert not sample.UNSAFE.search(out) and not set("\x1b\x07\r\u202e\u2028") & set(out)


def test_output_in_a_narrow_encoding(script, monkeypatch):
    """A terminal in cp1252 would end the run at the first character that it does not have."""
    stream = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    assert script("--prompt", "漢字 é", "--max-new-tokens", 2, "--show-depth") is None
    assert b"> \\u6f22\\u5b57 \xe9" in stream.buffer.getvalue()


def test_closed_output(script, monkeypatch):
    """`sample.py | head -1`, or a closed standard output, would end in an error."""
    source, sink = os.pipe()
    os.close(source)
    with open(sink, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert script("--prompt", "7 * 11 =") is None
    monkeypatch.setattr(sys, "stdout", None)
    assert script("--prompt", "7 * 11 =", "--depth-map", "map.jsonl") is None
    assert len(read("map.jsonl")) == 1


# ---- Refusals ------------------------------------------------------------------------------------
GOOD = json.dumps({"messages": [{"role": "user", "content": "a"},
                                {"role": "assistant", "content": "b"}]}) + "\n"
FILES = {
    "empty.txt": "\n", "broken.jsonl": GOOD + "\n{oops\n", "numbers.jsonl": "[1]\n",
    "array.json": '[{"prompt": "a"}]', "lines.json": '[\n{"prompt": "a"},\n{"prompt": "b"}\n]',
    "reply.jsonl": GOOD + '{"messages": [{"role": "assistant", "content": "b"}]}\n',
    "number.jsonl": '{"prompt": 7}\n', "null.jsonl": '{"prompt": null}\n',
    "long.txt": "a\n" + "1 " * 300, "deep.jsonl": "[" * 99999, "latin.txt": b"a\n\xff\n",
    "cut.txt.gz": gzip.compress(b"7 * 11 =\n" * 99)[:-12], "no.txt.gz": b"no gzip\n"}


@pytest.mark.parametrize("arguments, words", [
    (["--model", "nowhere"], "nowhere: no such folder"),
    (["--flexidepth", "empty.txt"], "empty.txt"),
    (["--prompt", " "], "empty prompt"), (["--prompt", " ", "--raw"], "empty prompt"),
    (["--prompt", "1 " * 300], "expected 1 to 256"), (["--prompt-file", "none.txt"], "none.txt"),
    (["--prompt-file", "."], "Is a directory"), (["--prompt-file", "empty.txt"], "no prompt in it"),
    (["--prompt-file", "broken.jsonl"], "broken.jsonl: line 3"),
    (["--prompt-file", "numbers.jsonl"], "line 1: expected a JSON object"),
    (["--prompt-file", "array.json"], "line 1: expected a JSON object"),
    (["--prompt-file", "lines.json"], "line 1: expected a JSON object"),
    (["--prompt-file", "reply.jsonl"], "reply.jsonl: line 2"),
    (["--prompt-file", "reply.jsonl", "--raw"], "reply.jsonl: line 1"),
    (["--prompt-file", "number.jsonl"], "number.jsonl: line 1: expected"),
    (["--prompt-file", "null.jsonl"], "null.jsonl: line 1: expected"),
    (["--prompt-file", "long.txt"], "prompt 2 has "), (["--prompt-file", "deep.jsonl"], "line 1"),
    (["--prompt-file", "latin.txt"], "latin.txt: line 2"),
    (["--prompt-file", "cut.txt.gz"], "cut.txt.gz"), (["--prompt-file", "no.txt.gz"], "no.txt.gz"),
    (["--temperature", "-1"], "temperature -1"), (["--top-p", "1.5"], "top_p 1.5"),
    (["--temperature", "nan"], "temperature nan"), (["--seed", "-1"], "--seed -1"),
    (["--max-new-tokens", "0"], "--max-new-tokens"), (["--batch-size", "0"], "--batch-size"),
    (["--route", "random"], "invalid choice: 'random'"), (["--device", "gpu7"], "gpu7"),
    (["--device", "cuda:99"], "cuda"), (["--promt", "a"], "--promt"),
    (["--html", "none/page.html"], "none"),
    (["--depth-map", "none/map.jsonl"], "none"),
    (["--depth-map", "."], "expected the name of a file"), (["--chat", "--prompt", "a"], "--chat reads"),
    (["--chat", "--depth-map", "broken.jsonl"], "give a new --depth-map"),
])
def test_refusals(script, tmp_path, capsys, arguments, words):
    """A traceback would come in place of one line, or the fault of the third prompt would be found
    after generating from two."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    ended = script(*arguments)
    assert ended and ended.startswith("sample.py: ") and words in ended and len(ended) < 400
    assert "\n> " not in capsys.readouterr().out or "--prompt-file" not in arguments


@pytest.fixture
def bare(tmp_path):
    """A folder with the tiny Llama alone, without routers and adapters."""
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        shutil.copy(TINY / name, tmp_path / "bare")
    return tmp_path / "bare"


def test_a_model_without_routers(script, capsys, bare):
    """A plain Llama would babble through random routers, in place of a word that it has none."""
    ended = script("--model", bare, "--prompt", "7 * 58 =", "--flexidepth", bare)
    assert "--route full" in ended
    assert "--route full" in script("--model", bare, "--prompt", "7 * 58 =")
    capsys.readouterr()
    assert script("--model", bare, "--prompt", "7 * 58 =", "--route", "full") is None
    assert capsys.readouterr().out.endswith("406\n")


def test_logits_that_are_no_numbers(script, bare):
    """Broken weights would give nonsense, or end in a traceback."""
    tensors = load_file(bare / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, bare / "model.safetensors")
    for more in ([], ["--temperature", 1, "--depth-map", "map.jsonl"]):
        ended = script("--model", bare, "--route", "full", "--prompt", "7 * 58 =", *more)
        assert "not finite numbers" in ended
    assert not Path("map.jsonl").exists()


# ---- Prompt files --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["rows.json", "ROWS.JSONL", "rows.ndjson", "rows", "rows.jsonl.gz",
                                  "rows.GZ", "rows.txt"])
def test_names_of_a_prompt_file(name):
    """JSONL under another name would be asked line by line, braces and all."""
    content = b'\n{"prompt": "2 * 3 =", "task": "m"}\r\n\r\n{"prompt": "a\\u2028b"}'
    if name.lower().endswith(".gz"):
        content = gzip.compress(content)
    Path(name).write_bytes(content)
    found = sample.read_prompt_file(Path(name))
    assert found == [(2, {"prompt": "2 * 3 =", "task": "m"}), (4, {"prompt": "a\u2028b"})]


def test_prompts_of_a_file(script, rows):
    """The reference answer would be given away to the model, a task lost, a byte order mark or a
    line end of Python's be part of the prompt, or a raw prompt be in chat format."""
    conversation = [{"role": "system", "content": "s"}, {"role": "user", "content": "a\u2028b"},
                    {"role": "assistant", "content": "c"}]
    shared = [{"from": "human", "value": "d"}, {"from": "gpt", "value": "e"}]
    lines = [json.dumps({"prompt": "2 * 3 =", "task": "m"}), "",
             json.dumps({"messages": conversation, "id": 7, "task": None}, ensure_ascii=False),
             json.dumps({"conversations": shared})]
    rows.write_bytes("\r\n".join(["\ufeff" + lines[0], *lines[1:]]).encode())
    assert script("--prompt-file", rows, "--depth-map", "map.jsonl", "--max-new-tokens", 1) is None
    first, second, third = read("map.jsonl")
    assert first["messages"] == [{"role": "user", "content": "2 * 3 ="}] and first["task"] == "m"
    assert second["messages"] == conversation[:2] and "task" not in second
    assert third["messages"] == [{"role": "user", "content": "d"}]

    Path("raw.txt").write_text(" 2 * 3 =")
    assert script("--prompt-file", "raw.txt", "--depth-map", "raw.jsonl", "--raw",
                  "--max-new-tokens", 1) is None
    raw, = read("raw.jsonl")
    assert raw["text"] == " 2 * 3 ="
    assert "".join(raw["prompt"]["texts"]) == "<|begin_of_text|> 2 * 3 ="


# ---- The record ----------------------------------------------------------------------------------
def test_record_tells_what_the_model_did(tiny):
    """Decisions, gates or depths would be those of the position before or after, or of another
    layer, row or threshold. They are held against one forward pass over the whole text."""
    model, tokenizer = tiny
    chats = [[{"role": "user", "content": f"Repeat: 11 {n}"}] for n in (22, 47)]
    prompts = [tokenizer.encode_chat(chat, True) for chat in chats]
    requests = [request(temperature=1.0, top_p=0.9, threshold=0.4, seed=i, messages=chat)
                for i, chat in enumerate(chats)]
    seen = []
    model.config.threshold = 0.4
    try:
        records = sample.make_records(
            model, tokenizer, requests, lambda token, depth: seen.append((token, depth)))
        for row, (record, ids) in enumerate(zip(records, prompts, strict=True)):
            prompt, answer = record["prompt"], record["answer"]
            with torch.no_grad():
                out = model(torch.tensor([prompt["ids"] + answer["ids"]]))
            layers = layers_used(out.kept[0], model.config).tolist()
            kept = out.kept[0].int().tolist()
            for part, first in ((prompt, 0), (answer, len(ids) - 1)):
                here = slice(first, first + len(part["ids"]))
                assert part["layers"] == layers[here]
                assert part["decisions"] == ["".join(map(str, token)) for token in kept[here]]
                torch.testing.assert_close(
                    torch.tensor(part["gates"]), out.gates[0, here], atol=1e-4, rtol=0)
            assert prompt["ids"] == ids
            if row == 0:  # the first answer is shown as it comes
                assert seen == list(zip(answer["ids"], answer["layers"]))
    finally:
        model.config.threshold = 0.5

    full, = sample.make_records(
        model, tokenizer,
        [request(route="full", routing_layers=[], gates=False, messages=chats[0])], quiet)
    assert set(full["prompt"]["layers"] + full["answer"]["layers"]) == {12}
    assert set(full["answer"]["decisions"]) == {""} and "gates" not in full["prompt"]


def test_records_in_batches_equal_single_ones(rows, script):
    """A prompt's draws would depend on the prompts beside it, or a row that has ended would go on
    in its record."""
    for name, more in (("batches", []), ("single", ["--batch-size", 1])):
        assert script("--prompt-file", rows, "--depth-map", f"{name}.jsonl", "--temperature", 1.5,
                      "--max-new-tokens", 12, *more) is None
    batches, single = read("batches.jsonl"), read("single.jsonl")
    assert len(batches) == 12 and batches == single
    lengths = [len(record["prompt"]["ids"]) for record in batches]
    assert len(set(lengths)) < 12 and len({len(r["answer"]["ids"]) for r in batches}) > 1


def test_a_record_stands_alone(script):
    """A record could not be made again without all the prompts before it, or would lack a field
    of the documented form."""
    hot = ("--temperature", 1.5, "--max-new-tokens", 12, "--prompt")
    assert script(*hot, "2 * 3 =", "--prompt", "Finish: time", "--depth-map", "two.jsonl") is None
    assert script(*hot, "Finish: time", "--seed", 1, "--depth-map", "one.jsonl") is None
    assert read("two.jsonl")[1] == read("one.jsonl")[0]

    record = json.loads(Path("one.jsonl").read_text())
    part = {"ids", "texts", "layers", "decisions"}
    assert set(record) == {
        "version", "model", "flexidepth", "sha256", "dtype", "num_hidden_layers",
        "routing_layers", "threshold", "route", "temperature", "top_p", "max_new_tokens", "seed",
        "gates", "messages", "prompt", "answer", "seconds", "tokens_per_s"}
    assert set(record["prompt"]) == set(record["answer"]) == part
    assert record["version"] == 1 and record["dtype"] == "float32" and record["gates"] is False
    assert len(record["sha256"]) == 64 and record["seconds"] > 0


def test_bytes_that_are_no_text_can_be_recovered(tiny):
    """U+FFFD would stand in a data set where a character takes several tokens."""
    model, tokenizer = tiny
    text = "né 漢字 \ufffd ok"
    record, = sample.make_records(
        model, tokenizer, [request(max_new_tokens=1, text=text)], quiet)
    _, *texts = json.loads(json.dumps(record["prompt"]["texts"]))  # but for the beginning of text
    assert b"".join(t.encode() if isinstance(t, str) else bytes(t) for t in texts).decode() == text
    assert [0xc3] in texts and "n" in texts and "\ufffd" not in texts


# ---- The depth map -------------------------------------------------------------------------------
def test_killed_and_gone_on(call, monkeypatch):
    """After kill -9 more would be lost than the batch in hand, or half a record would be kept, or
    one be there twice, or another text come than without it."""
    Path("prompts.txt").write_text("".join(f"{n} * 7 =\n" for n in range(6)))
    command = ("--prompt-file", "prompts.txt", "--temperature", 1.5, "--max-new-tokens", 4,
               "--batch-size", 1, "--depth-map")
    left_by_kill = []

    def noted(*arguments):
        file = Path("whole.jsonl")
        left_by_kill.append(file.read_bytes() if file.is_file() else b"")
        return generate(*arguments)

    monkeypatch.setattr(sample, "generate", noted)
    call(*command, "whole.jsonl")
    assert [content.count(b"\n") for content in left_by_kill] == list(range(6))
    assert all(content.endswith(b"\n") for content in left_by_kill[1:])
    whole = Path("whole.jsonl").read_bytes().splitlines(keepends=True)

    file = Path("cut.jsonl")
    for half in (b"", b'{"versi', whole[4][:-9], whole[4][:-1]):
        file.write_bytes(left_by_kill[4] + half)
        call(*command, "cut.jsonl")
        assert read(file) == read("whole.jsonl")

    before = file.read_bytes()
    monkeypatch.setattr(sample, "generate", lambda *_: pytest.fail("made again"))
    call(*command, "cut.jsonl")
    assert file.read_bytes() == before


def test_another_runs_depth_map_is_left_alone(rows, script):
    """Records of two settings, prompts or gates would be mixed in one data set."""
    command = ("--prompt-file", rows, "--depth-map", "map.jsonl", "--max-new-tokens", 1)
    assert script(*command) is None
    before = Path("map.jsonl").read_bytes()
    tensors = load_file(TINY / "flexidepth.safetensors")
    tensors["model.layers.6.router.router_head.weight"] *= 2
    save_file(tensors, "other.safetensors")
    for arguments in (("--threshold", 0.6), ("--seed", 1), ("--gates",), ("--prompt", "x"),
                      ("--flexidepth", "other.safetensors"), ("--dtype", "bfloat16"),
                      ("--route", "full")):
        assert "map.jsonl: line 1 is of another run" in script(*command, *arguments)
        assert Path("map.jsonl").read_bytes() == before


def test_a_file_that_is_no_depth_map_is_left_alone(rows, script):
    """A file of another kind would be cut or grow."""
    Path("notes.txt").write_text("no line end")
    Path("brace.txt").write_text('{"version": 2, ')
    Path("page.json").write_text('{"version": 1, "name": "other"}')
    Path("list.json").write_text("[]\n")
    for file in (rows, *map(Path, ("notes.txt", "brace.txt", "page.json", "list.json"))):
        before = file.read_bytes()
        assert str(file) in script("--depth-map", file, "--prompt", "7 * 11 =")
        assert file.read_bytes() == before


# ---- The page ------------------------------------------------------------------------------------
class Tags(HTMLParser):
    """Tags and attributes of a page, and its text."""
    def __init__(self, page):
        super().__init__()
        self.found, self.attributes, self.text, self.titles = set(), set(), "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.titles += [value for name, value in attributes if name == "title"]

    def handle_data(self, data):
        self.text += data


def test_hostile_text_in_the_page(tiny):
    """Markup of a model's name, a prompt, a token or a task would become part of the page and run,
    or its characters would turn text around."""
    model, tokenizer = tiny
    known = request(model="tiny", task="add", max_new_tokens=2, text="7 * 58 =")
    record, = sample.make_records(model, tokenizer, [known], quiet)
    sample.write_page(Path("plain.html"), known, [record])
    plain = Tags(Path("plain.html").read_text(encoding="utf-8"))

    bad = HOSTILE + "\u202e\0"
    known |= {"model": bad, "flexidepth": bad, "task": bad + "\ud800", "text": HOSTILE}
    record, = sample.make_records(model, tokenizer, [known], quiet)
    record["prompt"]["texts"][0] = "<b onclick=x>" + HOSTILE
    record["answer"]["texts"] = [bad] * len(record["answer"]["texts"])
    sample.write_page(Path("page.html"), known, [record])
    page = Tags(Path("page.html").read_text(encoding="utf-8"))

    assert page.found == plain.found and page.attributes == plain.attributes
    assert not page.found & {"script", "img", "b", "link", "iframe"}
    assert not [name for name in page.attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) >= 5
    assert not {"\u202e", "\0", "\ud800"} & set(page.text + "".join(page.titles))


def test_page_shows_what_the_records_say(rows, script):
    """A view would be missing, be of other positions, or be unreadable on a dark screen."""
    assert script("--prompt-file", rows, "--html", "page.html", "--gates",
                  "--depth-map", "map.jsonl", "--max-new-tokens", 12) is None
    content = Path("page.html").read_text(encoding="utf-8")
    assert "color-scheme: light dark" in content and "default-src 'none'" in content
    assert not list(Path().glob(".page*")) and "http" not in content.replace("http-equiv", "")
    page = Tags(content)
    records = read("map.jsonl")
    headings = [line.split(". ")[1].split("</h2>")[0] for line in content.split("<h2>")[1:]]
    assert headings == [record["task"] for record in records]

    decisions = "".join("".join(record["prompt"]["decisions"] + record["answer"]["decisions"])
                        for record in records)
    for cell, count in (("█", decisions.count("1")), ("░", decisions.count("0")),
                        ("▒", len(decisions))):
        assert page.text.count(cell) == count + 1  # one is in the legend
    tokens = [(text, layers) for record in records for part in (record["prompt"], record["answer"])
              for text, layers in zip(part["texts"], part["layers"])]
    titles = [title for title in page.titles if title]
    assert len(titles) == len(tokens) and all("gates [" in title for title in titles)
    for title, (text, layers) in zip(titles, tokens):
        assert title.startswith(f"{text!r}: {layers} of 12 layers")

    assert script("--prompt", "2 * 3 =", "--route", "full", "--html", "full.html") is None
    full = Tags(Path("full.html").read_text(encoding="utf-8")).text
    assert "all layers for every token" in full and "None" not in full
    assert full.count("▒") % 12 == 1 and full.count("█") == full.count("░") == 1


def test_page_has_the_order_of_prompts(script):
    """Prompts of one length run together, and would stand together in the page."""
    prompts = {"first": "7 * 11 =", "second": "Repeat: 11 22 33", "third": "2 * 34 ="}
    Path("rows.jsonl").write_text("".join(
        json.dumps({"prompt": prompt, "task": task}) + "\n" for task, prompt in prompts.items()))
    assert script("--prompt-file", "rows.jsonl", "--html", "page.html") is None
    content = Path("page.html").read_text(encoding="utf-8")
    headings = [part.split("</h2>")[0] for part in content.split("<h2>")[1:]]
    assert headings == ["1. first", "2. second", "3. third"]


def test_a_late_interruption_costs_no_page(rows, call, monkeypatch):
    """Ctrl-C would throw away the page of what is done."""
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(*arguments)

    monkeypatch.setattr(sample, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("--prompt-file", rows, "--html", "page.html", "--batch-size", 1, "--max-new-tokens", 2)
    assert Path("page.html").read_text().count("<h2>") == 3
