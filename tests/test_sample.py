"""sample.py: what it prints, writes and refuses; one record in three views."""
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import sample
from flexidepth import FlexiDepth, Tokenizer, layers_used

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny-llama"
HOSTILE = "</script><img src=x onerror=alert(1)><style>*{}</style>\"'><b onclick=x>&lt;"


def call(monkeypatch, *arguments):
    """main() in this process."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    sample.main()


def refused(capsys, *arguments):
    """Exit status and standard error of main() in this process."""
    sys.argv = ["sample.py", *map(str, arguments)]
    with pytest.raises(SystemExit) as stopped:
        sample.main()
    return stopped.value.code, capsys.readouterr().err


def read(file):
    """The records of a depth map, without what differs from run to run."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in r.items() if "second" not in key and key != "tokens_per_s"} for r in records]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A prompt file of twelve of the tiny Llama's rows, two a task."""
    monkeypatch.chdir(tmp_path)
    lines = (TINY / "valid.jsonl").read_text().splitlines(keepends=True)
    tasks = [json.loads(line)["task"] for line in lines]
    first = [tasks.index(task) for task in dict.fromkeys(tasks)]
    (tmp_path / "rows.jsonl").write_text("".join(lines[i] + lines[i + 1] for i in first))
    return tmp_path / "rows.jsonl"


def test_sample_in_plain_text(tmp_path, monkeypatch, capsys):
    """Colour codes in a pipe or despite NO_COLOR, a depth or the mean that is not shown."""
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, "--show-depth", "--table")
    out = capsys.readouterr().out
    assert "\033" not in out and "layers on average" in out
    assert out.count("> ") >= len(sample.EXAMPLES)
    table = [line.split()[-2:] for line in out.splitlines() if line.startswith("'")]
    assert len(table) > 20 and all(int(depth) == 6 + ran.count("#") and len(ran) == 6 for depth, ran in table)
    call(monkeypatch, "--route", "full", "--prompt", "7 * 58 =")
    assert capsys.readouterr().out.splitlines()[-1] == "406"


def test_sample_reads_prompts(tmp_path, monkeypatch, capsys):
    """A prompt that is lost on its way: from the command line, a file, a pipe or a conversation; a conversation
    that forgets."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("Repeat: 11 22 33\n\n7 * 11 =\n")
    call(monkeypatch, "--prompt-file", "prompts.txt", "--prompt", "2 * 34 =")
    assert [line for line in capsys.readouterr().out.splitlines()[1:] if line] == [
        "> 2 * 34 =", "68", "> Repeat: 11 22 33", "11 22 33", "> 7 * 11 =", "77"]
    source, sink = os.pipe()
    os.write(sink, b"7 * 11 =\n")
    os.close(sink)
    call(monkeypatch, "--prompt-file", f"/dev/fd/{source}")
    assert capsys.readouterr().out.endswith("> 7 * 11 =\n77\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("2 * 34 =\nAgain\n"))
    call(monkeypatch, "--chat", "--depth-map", "map.jsonl")
    assert "> 2 * 34 =\n68\n" in capsys.readouterr().out
    assert [m["content"] for m in read(tmp_path / "map.jsonl")[1]["messages"]] == ["2 * 34 =", "68", "Again"]


def test_a_late_error_costs_no_page(tmp_path, monkeypatch, capsys):
    """A long chat that outgrows the context, and takes with it the page of all that was said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("2 * 34 =\n" + "1 " * 300 + "\n"))
    code, err = refused(capsys, "--chat", "--html", "page.html")
    assert code == 2 and "a prompt of" in err and "<h2>1. </h2>" in (tmp_path / "page.html").read_text()


def test_sample_into_a_closed_pipe(tmp_path):
    """An error for those who read the first lines alone."""
    process = subprocess.Popen([sys.executable, ROOT / "sample.py"], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0


def test_sample_without_routers(tmp_path, monkeypatch, capsys):
    """A plain Llama that babbles through random routers, in place of a word that it has none."""
    monkeypatch.chdir(tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        (tmp_path / name).symlink_to(TINY / name)
    code, err = refused(capsys, "--model", ".", "--prompt", "7 * 58 =")
    assert code == 2 and "--route full" in err and err.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", ".", "--prompt", "7 * 58 =", "--route", "full"])
    sample.main()
    assert capsys.readouterr().out.endswith("406\n")


def test_characters_come_out_whole(monkeypatch, capsys):
    """Half a character printed as U+FFFD, a control sequence that reaches the terminal, a shade that
    is the same for every depth."""
    tokenizer, config = Tokenizer.from_pretrained(TINY), FlexiDepth.from_pretrained(TINY).config
    printer = sample.Printer(tokenizer, config, True)
    for token in tokenizer.encode("é\033[2J\u202e"):
        printer.write(token, 7)
    assert capsys.readouterr().out == "[7]é[7]\\x1b[7][[7]2[7]J[7][7][7]\\u202e[7]"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    printer = sample.Printer(tokenizer, config, True)
    assert len({printer.shade("x", depth) for depth in range(6, 13)}) == 7
    printer.write(ord("A"), 6)
    assert capsys.readouterr().out == printer.shade("A", 6)


@pytest.mark.parametrize("arguments, word", [
    (["--model", "nowhere"], "nowhere: no such folder"), (["--prompt", " "], "empty prompt"),
    (["--prompt", "1 " * 300], "from 1 to 256"), (["--prompt-file", "none.txt"], "none.txt"),
    (["--prompt-file", "empty.txt"], "empty.txt: no prompt"), (["--temperature", "-1"], "temperature -1"),
    (["--top-p", "1.5"], "top_p 1.5"), (["--route", "random"], "invalid choice: 'random'"),
    (["--flexidepth", "empty.txt"], "empty.txt: not a whole safetensors"), (["--device", "gpu7"], "gpu7"),
    (["--max-new-tokens", "0"], "--max-new-tokens is 0"), (["--dep"], "--dep"),
    (["--html", "page.txt"], "ends in .html"), (["--html", "none/page.html"], "none"),
    (["--depth-map", "none/map.jsonl"], "none"), (["--depth-map", "."], "Is a directory"),
    (["--depth-map", "broken.jsonl", "--chat"], "a chat can't go on"), (["--device", "cuda:9"], "cuda:9"),
    (["--prompt-file", "broken.jsonl"], "broken.jsonl: line 3"), (["--prompt-file", "list.jsonl"], "line 1"),
    (["--prompt-file", "reply.jsonl"], "line 2"), (["--prompt-file", "number.jsonl"], "line 1: expected"),
    (["--prompt-file", "long.txt"], "long.txt: line 2: a prompt of"), (["--prompt-file", "deep.jsonl"], "line 1"),
    (["--prompt-file", "latin.txt"], "latin.txt: line 2"), (["--prompt-file", "reply.jsonl", "--raw"], "line 1"),
])
def test_sample_refuses(tmp_path, monkeypatch, capsys, arguments, word):
    """A traceback where a line would help, or a fault of line 3 that is found after generating for two."""
    monkeypatch.chdir(tmp_path)
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    for name, text in {"empty.txt": "\n", "broken.jsonl": good + "\n{oops\n", "list.jsonl": "[1]\n",
                       "reply.jsonl": good + '{"messages": [{"role": "assistant", "content": "b"}]}\n',
                       "number.jsonl": '{"prompt": 7}\n', "long.txt": "a\n" + "1 " * 300,
                       "deep.jsonl": "[" * 99999, "latin.txt": b"a\n\xff\n"}.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    if any(name in word for name in ("line", "none", "dir")):
        monkeypatch.setattr(sample, "answer", lambda *_: pytest.fail("generated before it looked"))
    code, err = refused(capsys, *arguments)
    assert code == 2 and word in err and err.count("\n") == 1, err


# ---- The record

def test_record_tells_what_the_model_did():
    """Decisions, gates or depths of the position before or after, a threshold that is not the model's, a layer
    in another's place: held against one pass over the whole text. Without gates and routing where all layers run."""
    tokenizer, model = Tokenizer.from_pretrained(TINY), FlexiDepth.from_pretrained(TINY, flexidepth=TINY)
    model.config.threshold = 0.4
    head = {"num_hidden_layers": 12, "routing_layers": list(range(6, 12)), "route": "learned", "seed": 0,
            "gates": True, "temperature": 1.0, "top_p": 0.9, "max_new_tokens": 9}
    ids, seen = tokenizer.encode_chat([{"role": "user", "content": "Repeat: 11 22"}], True), []
    record = sample.answer(model, tokenizer, ids, head, lambda *token: seen.append(token))
    prompt, answer = record["prompt"], record["answer"]
    with torch.no_grad():
        out = model(torch.tensor([prompt["ids"] + answer["ids"]]))
    layers, kept, T = layers_used(out.kept[0], model.config).tolist(), out.kept[0].int().tolist(), len(ids)
    for part, first in ((prompt, 0), (answer, T - 1)):
        here = slice(first, first + len(part["ids"]))
        assert part["layers"] == layers[here]
        assert part["decisions"] == ["".join(map(str, row)) for row in kept[here]]
        torch.testing.assert_close(torch.tensor(part["gates"]), out.gates[0, here], atol=1e-4, rtol=0)
    assert prompt["ids"] == ids and seen == list(zip(answer["ids"], answer["layers"]))
    full = sample.answer(model, tokenizer, ids, head | {"route": "full", "routing_layers": [], "gates": False}, print)
    assert set(full["prompt"]["layers"] + full["answer"]["layers"]) == {12} and "gates" not in full["prompt"]


def test_bytes_that_are_no_text_can_be_recovered():
    """U+FFFD in the data set where a character takes more tokens than one, or where it is the text itself."""
    tokenizer, model = Tokenizer.from_pretrained(TINY), FlexiDepth.from_pretrained(TINY, flexidepth=TINY)
    head = {"num_hidden_layers": 12, "routing_layers": list(range(6, 12)), "route": "learned", "seed": 0,
            "gates": False, "temperature": 0, "top_p": 1, "max_new_tokens": 1}
    text = "né 漢字 \ufffd ok"
    part = sample.answer(model, tokenizer, tokenizer.encode(text), head, lambda *_: None)["prompt"]
    texts = json.loads(json.dumps(part["texts"]))
    assert b"".join(t.encode() if isinstance(t, str) else bytes(t) for t in texts).decode() == text
    assert [0xc3] in texts and "n" in texts and "\ufffd" not in texts


def test_a_record_stands_alone(tmp_path, monkeypatch):
    """A draw that depends on the prompts before, so that a record can't be made again without them all; and
    fields that the README promises."""
    monkeypatch.chdir(tmp_path)
    hot = ("--temperature", "1.5", "--max-new-tokens", "12")
    call(monkeypatch, *hot, "--prompt", "2 * 3 =", "--prompt", "Finish: time", "--depth-map", "two.jsonl")
    call(monkeypatch, *hot, "--prompt", "Finish: time", "--seed", 1, "--depth-map", "one.jsonl")
    two, one = read(tmp_path / "two.jsonl"), read(tmp_path / "one.jsonl")
    assert two[1] == one[0]
    schema = (ROOT / "README.md").read_text().split("## Depth")[1]
    assert all(f"`{key}`" in schema for key in {*two[1], *two[1]["answer"], "gates", "text", "task", "full"})


def test_prompts_of_a_file(rows, monkeypatch):
    """The reference answer given away to the model, a task lost, a system's message or a byte order mark in the
    prompt, a raw prompt in chat format."""
    rows.write_text('\ufeff{"prompt": "2 * 3 =", "task": "m"}\r\n\r\n{"messages": [{"role": "system", "content": "s"}, '
                    '{"role": "user", "content": "a\\u2028b"}, {"role": "assistant", "content": "c"}], "id": 7}')
    call(monkeypatch, "--prompt-file", rows, "--depth-map", "map.jsonl", "--max-new-tokens", 1)
    first, second = read(rows.parent / "map.jsonl")
    assert first["messages"] == [{"role": "user", "content": "2 * 3 ="}] and first["task"] == "m"
    assert [m["role"] for m in second["messages"]] == ["system", "user"] and "task" not in second
    rows.with_suffix(".txt").write_text(" 2 * 3 =")
    call(monkeypatch, "--prompt-file", "rows.txt", "--depth-map", "raw.jsonl", "--raw", "--max-new-tokens", 1)
    raw, = read(rows.parent / "raw.jsonl")
    assert raw["text"] == " 2 * 3 =" and "".join(raw["prompt"]["texts"]) == "<|begin_of_text|> 2 * 3 ="


# ---- The depth map

def test_killed_and_gone_on(rows, monkeypatch, capsys):
    """More lost than the record in hand, a record twice, half a record kept, or another text after kill -9."""
    call(monkeypatch, "--prompt-file", rows, "--depth-map", "whole.jsonl", "--temperature", 1)
    command = ["--prompt-file", str(rows), "--depth-map", "cut.jsonl", "--temperature", "1"]
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", *command], stdout=subprocess.PIPE)
    cut, deadline = rows.parent / "cut.jsonl", time.time() + 60
    while not (cut.is_file() and cut.read_bytes().count(b"\n") >= 2) and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = cut.read_bytes().count(b"\n")
    assert 2 <= kept < 12 and process.returncode == -signal.SIGKILL
    for half in (b'{"versi', (rows.parent / "whole.jsonl").read_bytes().splitlines()[kept][:-9]):
        cut.write_bytes(b"".join(cut.read_bytes().splitlines(keepends=True)[:kept]) + half)
        call(monkeypatch, *command)
        assert read(cut) == read(rows.parent / "whole.jsonl")
    before = cut.read_bytes()
    monkeypatch.setattr(sample, "answer", lambda *_: pytest.fail("made again"))
    call(monkeypatch, *command)
    assert cut.read_bytes() == before


def test_another_runs_depth_map_is_left_alone(rows, monkeypatch, capsys):
    """Records of two settings, prompts or gates in one data set; or a file that is no depth map cut or grown."""
    call(monkeypatch, "--prompt-file", rows, "--depth-map", "map.jsonl", "--max-new-tokens", 1)
    file = rows.parent / "map.jsonl"
    before = file.read_bytes()
    shutil.copy(TINY / "flexidepth.safetensors", "other.safetensors")
    for arguments, word in ((("--threshold", 0.6), "its threshold"), (("--seed", 1), "its seed"),
                            (("--gates",), "its gates"), (("--prompt", "x"), "its messages"),
                            (("--flexidepth", "other.safetensors"), "its flexidepth")):
        code, err = refused(capsys, "--prompt-file", rows, "--depth-map", file, "--max-new-tokens", 1, *arguments)
        assert code == 2 and "map.jsonl: line 1" in err and word in err and err.count("\n") == 1
    code, err = refused(capsys, "--depth-map", rows, "--prompt", "x")
    assert code == 2 and "line 1" in err and rows.read_bytes().count(b"\n") == 12
    (rows.parent / "notes.txt").write_text("no line end")
    assert refused(capsys, "--depth-map", "notes.txt", "--prompt", "x")[0] == 2
    assert (rows.parent / "notes.txt").read_text() == "no line end" and file.read_bytes() == before


def test_no_space_left(rows, monkeypatch, capsys):
    """A traceback, whole records lost, half ones kept, or a page that is cut short in the place of the old one."""
    call(monkeypatch, "--prompt-file", rows, "--html", "page.html")
    old = (rows.parent / "page.html").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for arguments, size in ((("--depth-map", "map.jsonl"), 5000), (("--html", "page.html"), 9000),
                            (("--html", "page.html"), len(old) - 9)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            code, err = refused(capsys, "--prompt-file", rows, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert code == 2 and "File too large" in err and err.count("\n") == 1, err
    assert (rows.parent / "page.html").read_bytes() == old and not [*rows.parent.glob(".page*")]
    call(monkeypatch, "--prompt-file", rows, "--depth-map", "map.jsonl")
    assert len(read(rows.parent / "map.jsonl")) == 12


# ---- Views

def test_summary(monkeypatch):
    """A kind of token told wrongly, prompt and answer in one sum, a repetition that is none."""
    kinds = {"12": "digits", " 7": "digits", "\n\n": "white space", " =": "punctuation", "<|eot_id|>": "special",
             "<|": "punctuation", "<<<<<": "punctuation", " Tom": "start of a word", "漢": "start of a word", "x2": "start of a word"}
    assert {text: sample.kind(text, ".") for text in kinds} == kinds
    assert sample.kind("ly", " part") == "rest of a word" and sample.kind([195], "") == "part of a character"
    record = {"num_hidden_layers": 4, "task": "t",
              "prompt": {"ids": [1, 2, 1], "texts": ["a", " b", "a"], "layers": [2, 2, 2]},
              "answer": {"ids": [2, 2, 3], "texts": [" b", " b", "3"], "layers": [3, 4, 4]}}
    statistics = sample.Statistics()
    for _ in range(2):
        statistics.add(record)
    table = {first: rest for first, *rest in statistics.rows()}
    assert table["digits"] == ["2", "33.3%", "4.00", "100.0%", "", "", "", ""]
    assert table["repeats earlier context"] == ["2", "33.3%", "3.00", "0.0%", "", "", "", ""]  # "a b" comes again
    assert table["task t"] == table["all tokens"] == ["6", "100.0%", "3.67", "66.7%", "6", "100.0%", "2.00", "0.0%"]
    statistics.add(record | {"task": "\033[2J\n"})
    assert "task \\x1b[2J" in [first for first, *_ in statistics.rows()]
    assert table["4 layers"] == ["4", "66.7%", "4.00", "100.0%", "", "", "", ""]


def test_terminal(monkeypatch, capsys):
    """True colour where the terminal has none or the other way about, columns that wide characters shift."""
    config = FlexiDepth.from_pretrained(TINY).config
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for colorterm, code in (("truecolor", "\033[48;2;"), ("", "\033[48;5;")):
        monkeypatch.setenv("COLORTERM", colorterm)
        assert sample.Printer(None, config, True).legend().count(code) == 7
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in sample.Printer(None, config, True).legend()
    part = {"texts": ["漢字", "\t\033[2J", [195], "e\u0301", "x"], "layers": [6, 7, 8, 9, 10], "decisions": ["01"] * 5}
    pads = (5, 0, 4, 8, 8)
    tokens = ("'漢字'", "'\\t\\x1b[2J'", "b'\\xc3'", "'e\u0301'", "'x'")
    assert [*sample.align([*sample.cells(part)])] == [
        f"{token}{' ' * pad}  {depth:2}  .#" for token, pad, depth in zip(tokens, pads, range(6, 11))]


def test_both_routes(rows, monkeypatch, capsys):
    """The pre-trained model's answer said to be the same where it is not, or counted from the wrong token."""
    call(monkeypatch, "--route", "both", "--prompt", "37 + 48 =", "--prompt", "38 + 47 =", "--depth-map", "map.jsonl",
         "--show-depth")
    out, (first, second) = capsys.readouterr().out, read(rows.parent / "map.jsonl")
    assert "(all layers: others from token 1 on" in out and "(all layers: the same tokens" in out
    assert "1 of 2 answers have the same tokens" in out
    assert second["full"]["ids"] == second["answer"]["ids"] and first["full"]["ids"] != first["answer"]["ids"]


def test_progress_and_interruption(rows, monkeypatch, capsys):
    """No sign of life from a long run; Ctrl-C that throws away the page of what is done, or hides that it came."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    real, calls = sample.answer, []

    def answer(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)
    monkeypatch.setattr(sample, "answer", answer)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--prompt-file", str(rows), "--html", "page.html"])
    with pytest.raises(SystemExit) as stopped:
        sample.main()
    assert stopped.value.code == 130 and (rows.parent / "page.html").read_text().count("<h2>") == 3
    out, err = capsys.readouterr()
    assert "3 of 12 prompts, " in err and " s left" in err and ">" not in out


class Tags(HTMLParser):
    """Tags and attributes of a page, and its text."""
    def __init__(self, page):
        super().__init__()
        self.found, self.text = set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found |= {tag} | {f"{tag} {name}" for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


def hostile(path):
    """A page whose prompt, tokens, task and model's name are markup. Returns its text."""
    tokenizer, model = Tokenizer.from_pretrained(TINY), FlexiDepth.from_pretrained(TINY, flexidepth=TINY)
    head = {"model": HOSTILE, "flexidepth": HOSTILE, "num_hidden_layers": 12, "routing_layers": list(range(6, 12)),
            "threshold": 0.5, "route": "learned", "seed": 0, "gates": True, "temperature": 0, "top_p": 1,
            "max_new_tokens": 2, "task": HOSTILE + "\ud800"}
    record = sample.answer(model, tokenizer, tokenizer.encode(HOSTILE[:50]), head, lambda *_: None)
    statistics = sample.Statistics()
    record["prompt"]["texts"][0] = "<b onclick=x>" + HOSTILE
    record["answer"]["texts"] = [HOSTILE, "\0\u202e" + HOSTILE]
    statistics.add(record)
    with open(path.with_suffix(".part"), "w+", encoding="utf-8", errors="xmlcharrefreplace") as drawn:
        drawn.write(sample.draw(record, 1))
        sample.write_page(path, head, drawn, statistics)
    return path.read_text(encoding="utf-8")


def test_page_escapes_all_that_comes_from_outside(rows, monkeypatch):
    """Markup of a model, prompt or task that becomes part of the page; a page that loads things or lacks a view."""
    page = Tags(hostile(rows.parent / "hostile.html"))
    call(monkeypatch, "--prompt-file", rows, "--html", "page.html", "--gates", "--depth-map", "map.jsonl")
    good = Tags((rows.parent / "page.html").read_text(encoding="utf-8"))
    assert page.found <= good.found and not {"script", "img", "link", "iframe"} & good.found
    assert page.text.count(HOSTILE) >= 4 and "\u202e" not in page.text
    decisions = [row for record in read(rows.parent / "map.jsonl")
                 for row in (*record["prompt"]["decisions"], *record["answer"]["decisions"][1:])]
    for cell, expected in (("█", "".join(decisions).count("1")), ("░", "".join(decisions).count("0")),
                           ("▒", 6 * len(decisions))):
        assert good.text.count(cell) == expected + 1  # one in the legend
    assert {"pre tabindex", "progress value", "span data-t", "span tabindex", "meta http-equiv"} <= good.found
    assert "repeats earlier context" in good.text and "task copy" in good.text
    call(monkeypatch, "--prompt", "2 * 3 =", "--route", "full", "--html", "full.html")
    full = Tags((rows.parent / "full.html").read_text(encoding="utf-8")).text
    assert "all layers for every token" in full and "None" not in full and full.count("▒") % 12 == 1


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_page_in_a_browser(tmp_path):
    """Markup that a browser reads differently from the parser above and runs; colours that its policy blocks."""
    hostile(tmp_path / "page.html")
    out = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--dump-dom", (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=60)
    assert "<h2>1. " in out.stdout and "<img" not in out.stdout and "<b onclick" not in out.stdout
    assert "Content Security Policy" not in out.stderr
