"""sample.py: what it prints, writes and refuses; one record a generation, in three views."""
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import flexidepth
import sample
from flexidepth import FlexiDepth, Tokenizer, generate, layers_used

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny-llama"
HOSTILE = "</script><img src=x onerror=alert(1)><style>*{}</style>\"'><b onclick=x>&lt;"
UNSEEN = "\033[2J\x07\x7f\x9b\r\x08\u202e\u2066\u200f\u061c\u2028\ufeff\U000e0041"
HIDDEN = set(UNSEEN) - set("[2J")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def script(monkeypatch):
    """A function that runs sample.py in this process, as its command line does. It returns what the
    script exits with: None, or the one line that Python prints before it exits with status 1."""
    def script(*arguments):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
        except SystemExit as end:
            assert "\n" not in str(end.code)
            return end.code
    return script


@pytest.fixture
def rows(tmp_path):
    """A prompt file of six of the tiny Llama's rows, one a task."""
    lines = (TINY / "valid.jsonl").read_text().splitlines(keepends=True)
    first = {json.loads(line)["task"]: line for line in reversed(lines)}
    (tmp_path / "rows.jsonl").write_text("".join(first.values()))
    return tmp_path / "rows.jsonl"


@pytest.fixture
def bare(tmp_path):
    """A folder with the tiny Llama alone, without routers and adapters."""
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        shutil.copy(TINY / name, tmp_path / "bare")
    return tmp_path / "bare"


@pytest.fixture(scope="module")
def tiny():
    return FlexiDepth.from_pretrained(TINY, flexidepth=TINY), Tokenizer.from_pretrained(TINY)


def request(**changes):
    """The fields of a record before its generation."""
    return {"num_hidden_layers": 12, "routing_layers": list(range(6, 12)), "route": "learned",
            "seed": 0, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 9} | changes


def read(file):
    """The records of a depth map."""
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


# ---- The terminal --------------------------------------------------------------------------------
def test_plain_text(script, capsys):
    """Colour codes would appear in a pipe, a depth stand behind another token than README shows, or
    the mean not be shown."""
    assert script("--show-depth") is None
    out = capsys.readouterr().out
    title, legend = out.splitlines()[:2]
    tiny = os.path.relpath(TINY)
    assert title == f"{tiny}, routers and adapters of {tiny}"
    assert legend == "legend: a 6-layer token[6] a 12-layer token[12]"
    assert "\033" not in out and out.count("layers on average") == len(sample.EXAMPLES)
    assert all(f"\n> {prompt}\n" in out for prompt in sample.EXAMPLES)
    assert ("\n> Tom has 38 figs and gets 47 more.\n"
            "Now[10] Tom[8] has[7] [7]8[10]5[11] figs[10].[8]<|eot_id|>[7]\n"
            "(9 tokens, 8.67 of 12 layers on average, ") in out

    assert script("--route", "full", "--prompt", "7 * 58 =", "--flexidepth", TINY) is None
    title, *_, asked, said = capsys.readouterr().out.splitlines()
    assert title == f"{tiny}, all layers for every token" and (asked, said) == ("> 7 * 58 =", "406")


def test_colours(script, tiny, capsys, monkeypatch):
    """All depths would have one shade, a line end would paint the rest of the line, half a
    character be printed as U+FFFD, or colours come though the user wants none."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    shades = {sample.shade("x", depth, request()) for depth in range(6, 13)}
    assert len(shades) == 7 and all(shade.startswith("\033[48;5;") for shade in shades)
    assert sample.shade("A\n", 6, request()) == sample.shade("A", 6, request()) + "\n"
    assert script("--show-depth", "--prompt", "7 * 58 =") is None
    assert capsys.readouterr().out.count("\033[0m") == 2 + 4

    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sample, "generate", lambda *_: (
        flexidepth.Step(torch.tensor([token]), torch.tensor([7]), None, None)
        for token in tiny[1].encode("é\n\033")))
    sample.answer(*tiny, request(text="x"), show_depth=True)
    assert capsys.readouterr().out == "[7]é[7]\n[7]\\x1b[7]\n"


def test_text_that_is_not_seen(script, capsys):
    """A prompt or a token could steer the terminal, turn text around or hide some of it."""
    assert script("--raw", "--prompt", f"a{UNSEEN}b", "--max-new-tokens", 1) is None
    out = capsys.readouterr().out
    assert r"> a\x1b[2J\x07\x7f\x9b\r\x08\u202e\u2066\u200f\u061c\u2028\ufeff\U000e0041b" in out
    assert not HIDDEN & set(out)
    assert sample.printable("\ud800 é 漢字 می\tx\ny 😀") == "\\ud800 é 漢字 می\tx\ny 😀"


@pytest.mark.parametrize("stream, words", [
    (io.TextIOWrapper(io.BytesIO(), "cp1252"), b"> \\u6f22\\u5b57 \xe9"), (io.StringIO(), "> 漢字 é"),
    (None, "")])
def test_output_of_other_kinds(script, monkeypatch, stream, words):
    """A terminal in cp1252 would end the run at the first character that it does not have, and a
    notebook's stream, like StringIO, or a closed one at a method that it does not have."""
    monkeypatch.setattr(sys, "stdout", stream)
    assert script("--prompt", "漢字 é", "--max-new-tokens", 2, "--depth-map", "map.jsonl") is None
    assert len(read("map.jsonl")) == 1
    if stream:
        said = getattr(stream, "buffer", stream).getvalue()
        assert words in said and said[-1:] in ("\n", b"\n")  # nothing is left to be flushed


def test_output_that_nobody_reads():
    """`sample.py --depth-map map.jsonl | head -1` would end as if the depth map were whole, or with
    a traceback, or with an error more when Python ends."""
    source, sink = os.pipe()
    os.close(source)
    ended = subprocess.run([sys.executable, ROOT / "sample.py", "--depth-map", "map.jsonl"],
                           stdout=sink, stderr=subprocess.PIPE, text=True)
    os.close(sink)
    assert (ended.returncode, ended.stderr) == (1, "sample.py: [Errno 32] Broken pipe\n")


# ---- A chat --------------------------------------------------------------------------------------
def typed(monkeypatch, text):
    """Let standard input be a pipe with these bytes in it."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), "utf-8"))


def test_chat(script, monkeypatch, capsys):
    """A conversation would forget what was said, or lose a line that has no end; or bytes that are
    not UTF-8 would end it."""
    typed(monkeypatch, b"2 * 34 =\n\n  \nof \xff\xfe\n7 * 58 =")
    assert script("--chat", "--depth-map", "map.jsonl", "--seed", 3) is None
    out = capsys.readouterr().out
    assert "> 2 * 34 =\n68\n" in out and out.count("you: ") == 6
    first, second, third = read("map.jsonl")
    assert [record["seed"] for record in (first, second, third)] == [3, 4, 5]
    assert len(first["messages"]) == 1
    (_, asked), (_, said), (_, broken), _, (role, last) = map(dict.values, third["messages"])
    assert (asked, said, role, last) == ("2 * 34 =", "68", "user", "7 * 58 =")
    assert broken.startswith("of ")


def test_chat_that_outgrows_the_context(script, monkeypatch, capsys):
    """A full context would give a traceback, or cost what the chat has written."""
    typed(monkeypatch, b"2 * 34 =\n" + b"1 " * 300 + b"\n7 * 58 =\n")
    ended = script("--chat", "--depth-map", "map.jsonl", "--html", "page.html")
    assert "the context is full: it holds 256 tokens" in ended
    assert "68\n" in capsys.readouterr().out and len(read("map.jsonl")) == 1
    assert Path("page.html").read_text(encoding="utf-8").count("<h2>") == 1


# ---- Which routers and adapters ------------------------------------------------------------------
def test_routers_by_default(script, capsys):
    """Another model's routers would be taken, or what train.py has made not be found."""
    def routers(*arguments):
        assert script("--prompt", "7 * 58 =", "--max-new-tokens", 1, *arguments) is None
        return capsys.readouterr().out.splitlines()[0].split("adapters of ")[1]

    shutil.copytree(TINY, "copy")
    Path("out").mkdir()
    shutil.copy(TINY / "flexidepth.safetensors", "out")
    assert routers() == os.path.relpath(TINY)
    Path("out/train.json").write_text(json.dumps({"settings": {"model": str(TINY)}}))
    assert routers() == "out"
    assert routers("--model", TINY / ".." / "tiny-llama") == "out"
    assert routers("--model", "copy") == "copy"
    assert routers("--flexidepth", "copy") == "copy"
    Path("out/train.json").write_text(json.dumps({"settings": {"model": "copy"}}))
    assert routers("--model", Path("copy").resolve()) == "out"


def test_a_model_alone(script, capsys, bare):
    """A plain Llama would babble through random routers, in place of a word that it has none. A
    base model would get a chat format that it has never seen."""
    command = ("--model", bare, "--prompt", "7 * 58 =")
    assert "routers and adapters" in script(*command)
    assert script(*command, "--route", "full") is None
    assert capsys.readouterr().out.endswith("406\n")
    (bare / "chat_template.jinja").write_text("{{ messages }}")
    assert "--raw" in script(*command, "--route", "full")
    assert script(*command, "--route", "full", "--raw") is None


# ---- Refusals ------------------------------------------------------------------------------------
def refused(ended, words):
    assert words in ended and len(ended) < 400 and not HIDDEN & set(ended)


@pytest.mark.parametrize("arguments, words", [
    (["--model", "no\033where"], "no\\x1bwhere"), (["--pro\033mt", "a"], "pro\\x1bmt"),
    (["--flexidepth", "none.jsonl"], "none.jsonl"),
    (["--prompt", " "], "no prompt"), (["--prompt", "", "--raw"], "no prompt"),
    (["--prompt", "1 " * 300], "holds 256 tokens"), (["--prompt-file", "no.jsonl"], "no.jsonl"),
    (["--prompt-file", "."], "Is a directory"), (["--temperature", "-1"], "temperature -1"),
    (["--temperature", "nan"], "temperature nan"), (["--top-p", "1.5"], "top_p 1.5"),
    (["--max-new-tokens", "0"], "at least 1"),
    (["--route", "random"], "invalid choice: 'random'"), (["--device", "gpu7"], "gpu7"),
    (["--device", "cuda:99"], "CUDA"), (["--html", "."], "'.'"),
    (["--html", "none/page.html"], "none/page.html"),
    (["--depth-map", "none/map.jsonl"], "none/map.jsonl"), (["--depth-map", "."], ". exists"),
    (["--depth-map", "old.jsonl"], "old.jsonl exists"), (["--chat", "--prompt", "a"], "--chat"),
    (["--chat", "--raw"], "--chat"), (["--prompt-file", "a", "--prompt", "a"], "--prompt"),
])
def test_refusals(script, capsys, arguments, words):
    """A traceback would come in place of one line, a file that can't be written be found after
    generating, or an older depth map be lost."""
    Path("old.jsonl").write_text("old")
    refused(script(*arguments), words)
    assert "\n> " not in capsys.readouterr().out or arguments[0] in ("--temperature", "--top-p")
    assert Path("old.jsonl").read_text() == "old"


GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.mark.parametrize("text, place, more", [
    ("\n", "rows.jsonl", []), (GOOD + "\n{oops\n", "line 3", []), (GOOD + "[1]\n", "line 2", []),
    (GOOD + '{"messages": [{"role": "assistant", "content": "b"}]}', "line 2", []),
    (GOOD + '{"messages": [{"role": "human", "content": "b"}]}', "line 2", []),
    ('{"messages": [{"role": "user", "content": null}]}', "and a text; found", []),
    ('{"messages": "a"}', "line 1", []), ('{"messages": null}', "line 1", []),
    ('{"prompt": 7}', "line 1", []), (GOOD, "line 1", ["--raw"]),
    ('{"text": "a"}', "line 1", []), (json.dumps({"messages": [{"role": UNSEEN}]}), "line 1", []),
    (GOOD + json.dumps({"prompt": "1 " * 300}), "line 2", []), (GOOD + "{\udcff}", "line 2", [])])
def test_bad_rows(script, capsys, text, place, more):
    """A traceback would come in place of a row's place, or the fault of the second row be found
    after an answer to the first."""
    Path("rows.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")
    ended = script("--prompt-file", "rows.jsonl", "--depth-map", "map.jsonl", *more)
    refused(ended, "rows.jsonl")
    refused(ended, place)
    assert "\n> " not in capsys.readouterr().out and not Path("map.jsonl").exists()


def test_trouble_while_generating(script, bare, rows, monkeypatch):
    """Broken weights would give nonsense. These, a full memory and Ctrl-C would end in a traceback,
    or cost the depth map and the page of what is done."""
    done = []

    def interrupted(*arguments):
        done.append(len(read("map.jsonl")))
        if len(done) % 4 == 0:
            raise trouble
        return generate(*arguments)

    monkeypatch.setattr(flexidepth, "generate", interrupted)
    for trouble, words in ((KeyboardInterrupt(), "130"),
                           (torch.OutOfMemoryError("CUDA out of\nmemory"), "CUDA out of memory")):
        Path("map.jsonl").unlink(missing_ok=True)
        ended = script("--prompt-file", rows, "--html", "page.html", "--depth-map", "map.jsonl")
        assert words in str(ended) and len(read("map.jsonl")) == 3
        assert Path("page.html").read_text(encoding="utf-8").count("<h2>") == 3
    assert done == [0, 1, 2, 3] * 2

    monkeypatch.setattr(flexidepth, "generate", generate)
    tensors = load_file(bare / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, bare / "model.safetensors")
    command = ("--model", bare, "--route", "full", "--prompt", "7 * 58 =")
    assert "not finite numbers" in script(*command)
    assert "not finite numbers" in script(*command, "--temperature", 1)


def test_home(script, rows, bare, monkeypatch):
    """The shell leaves the ~ of --html=~/page.html alone, and a folder named ~ would be missing."""
    monkeypatch.setenv("HOME", str(rows.parent))
    monkeypatch.chdir("/")
    assert script("--model=~/bare", f"--flexidepth={TINY}", "--prompt-file=~/rows.jsonl",
                  "--depth-map=~/map.jsonl", "--html=~/page.html", "--max-new-tokens", 1) is None
    shutil.copy(TINY / "flexidepth.safetensors", bare)
    assert script("--flexidepth=~/bare", "--prompt", "7 * 58 =", "--max-new-tokens", 1) is None
    assert "page.html" in os.listdir(rows.parent)
    assert read(rows.with_name("map.jsonl"))[0]["model"] == str(bare)


# ---- The record ----------------------------------------------------------------------------------
def test_prompts_of_a_file(script):
    """The reference answer would be given away to the model, a task lost, a byte order mark be part
    of the prompt, or a raw prompt be in chat format."""
    conversation = [{"role": "system", "content": "s"}, {"role": "user", "content": "a\u2028b"},
                    {"role": "assistant", "content": "c"}]
    lines = [json.dumps({"prompt": " 2 * 3 =", "task": "m"}), "",
             json.dumps({"messages": conversation, "id": 7, "task": None}, ensure_ascii=False)]
    Path("rows.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    command = ("--max-new-tokens", 1, "--prompt-file", "rows.jsonl", "--depth-map")
    assert script(*command, "map.jsonl") is None
    first, second = read("map.jsonl")
    assert first["messages"] == [{"role": "user", "content": " 2 * 3 ="}] and first["task"] == "m"
    assert second["messages"] == conversation[:2] and "task" not in second

    Path("rows.jsonl").write_text(lines[0])
    assert script(*command, "raw.jsonl", "--raw") is None
    raw, = read("raw.jsonl")
    assert raw["text"] == " 2 * 3 =" and raw["task"] == "m" and "messages" not in raw
    assert "".join(raw["prompt"]["texts"]) == "<|begin_of_text|> 2 * 3 ="


def test_record_tells_what_the_model_did(tiny, script, capsys):
    """Decisions or depths would be those of the position before or after, or of another layer or
    threshold. They are held against one forward pass over the whole text."""
    model, tokenizer = tiny
    assert script("--prompt", "Repeat: 11 47", "--threshold", 0.8, "--temperature", 1,
                  "--top-p", 0.9, "--depth-map", "map.jsonl", "--max-new-tokens", 9) is None
    record, = read("map.jsonl")
    prompt, answer = record["prompt"], record["answer"]
    model.config.threshold = record["threshold"]
    with torch.no_grad():
        kept = model(torch.tensor([prompt["ids"] + answer["ids"]])).kept[0]
    model.config.threshold = 0.5
    decisions = ["".join(map(str, token)) for token in kept.int().tolist()]
    layers = layers_used(kept, model.config).tolist()
    T = len(prompt["ids"])
    for part, here in ((prompt, slice(0, T)), (answer, slice(T - 1, -1))):
        assert part["layers"] == layers[here] and part["decisions"] == decisions[here]
    ids = tokenizer.encode_chat([{"role": "user", "content": "Repeat: 11 47"}], True)
    assert prompt["ids"] == ids and len(set(decisions)) > 3 and record["threshold"] == 0.8

    assert script("--prompt", "7 * 58 =", "--route", "full", "--depth-map", "full.jsonl",
                  "--dtype", "bfloat16") is None
    full, = read("full.jsonl")
    assert full["route"] == "full" and full["flexidepth"] is None and full["routing_layers"] == []
    assert full["dtype"] == "bfloat16"
    for part in (full["prompt"], full["answer"]):
        assert set(part["layers"]) == {12} and set(part["decisions"]) == {""}
        assert len(part["layers"]) == len(part["decisions"]) == len(part["ids"])


def test_a_record_stands_alone(script):
    """A record could not be made again without all the prompts before it, or would lack a field
    of the documented form."""
    hot = ("--temperature", 4, "--max-new-tokens", 12, "--prompt")
    assert script(*hot, "2 * 3 =", "--prompt", "Finish: time", "--depth-map", "two.jsonl") is None
    assert script(*hot, "Finish: time", "--seed", 1, "--depth-map", "one.jsonl") is None
    assert script(*hot, "Finish: time", "--seed", 2, "--depth-map", "other.jsonl") is None
    again, = read("one.jsonl")
    assert set(again) == {
        "version", "model", "flexidepth", "dtype", "num_hidden_layers", "routing_layers",
        "threshold", "route", "temperature", "top_p", "max_new_tokens", "seed", "messages",
        "prompt", "answer", "seconds", "tokens_per_s"}
    assert set(again["prompt"]) == set(again["answer"]) == {"ids", "texts", "layers", "decisions"}
    assert again["version"] == 2 and again["dtype"] == "float32" and again["threshold"] == 0.5
    tokens = len(again["answer"]["ids"])
    assert again["seconds"] * again["tokens_per_s"] == pytest.approx(tokens, rel=0.05)
    first = read("two.jsonl")[1]
    assert first == again | {name: first[name] for name in ("seconds", "tokens_per_s")}
    assert read("other.jsonl")[0]["answer"] != again["answer"]


def test_bytes_that_are_no_text_can_be_recovered(tiny, capsys):
    """U+FFFD would stand in a data set where a character takes several tokens."""
    text = "né 漢字 \ufffd ok"
    record = sample.answer(*tiny, request(max_new_tokens=1, text=text), show_depth=False)
    _, *texts = json.loads(json.dumps(record["prompt"]["texts"]))  # but for the beginning of text
    assert b"".join(t.encode() if isinstance(t, str) else bytes(t) for t in texts).decode() == text
    assert [0xc3] in texts and "n" in texts and "\ufffd" not in texts


# ---- The page ------------------------------------------------------------------------------------
class Page(HTMLParser):
    """The names of a page's tags and attributes, and its text."""
    def __init__(self, content):
        super().__init__()
        self.names, self.text = set(), ""
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.names |= {tag, *dict(attributes)}

    def handle_data(self, data):
        self.text += data


def test_hostile_text_in_the_page(script):
    """Markup of a model's name, a prompt, a token or a task would become part of the page and run,
    or its characters would turn text around."""
    model = "a'\"><b onclick=x>\u202e"
    shutil.copytree(TINY, model)
    bad = HOSTILE + UNSEEN
    Path("rows.jsonl").write_text(json.dumps({"prompt": bad, "task": bad + "\ud800"}))
    assert script("--prompt-file", "rows.jsonl", "--html", "page.html", "--model", model,
                  "--depth-map", "map.jsonl") is None
    record, = read("map.jsonl")
    record["answer"]["texts"][0] = bad
    content = Path("page.html").read_text(encoding="utf-8") + sample.draw(record)
    page = Page(content)
    assert page.names <= Page(sample.PAGE).names | {"h2", "pre", "span", "class", "style", "title"}
    assert page.text.count(HOSTILE) == 5 and "a'\"><b onclick=x>" in page.text
    assert not {*HIDDEN, "\ud800"} & set(content)


def test_page_shows_what_the_records_say(rows, script):
    """A view would be missing, be of other positions, or be unreadable on a dark screen."""
    Path("page.html").write_text("of a run before")
    assert script("--prompt-file", rows, "--max-new-tokens", 12, "--html", "page.html",
                  "--depth-map", "map.jsonl") is None
    content = Path("page.html").read_text(encoding="utf-8")
    assert content.startswith("<!DOCTYPE html>") and "color-scheme: light dark" in content
    assert "http" not in content and "<script" not in content
    records = read("map.jsonl")
    assert re.findall("<h2>(.*)</h2>", content) == [record["task"] for record in records]

    parts = [record[name] for record in records for name in ("prompt", "answer")]
    assert re.findall('--depth:(.*?)" title="(.*?)"', content) == [
        (f"{(depth - 6) / 6:.2f}", f"{depth} layers") for part in parts for depth in part["layers"]]
    for part, drawn in zip(parts, content.split('<pre class="map">')[1:], strict=True):
        lines = drawn.split("</pre>")[0].splitlines()
        for layer, line in zip(reversed(range(12)), lines, strict=True):
            cells = "".join("░█"[int(kept[layer - 6])] for kept in part["decisions"])
            assert line.split() == [str(layer), cells if layer > 5 else "▒" * len(cells)]

    assert script("--prompt", "né", "--route", "full", "--html", "full.html") is None
    full = Page(Path("full.html").read_text(encoding="utf-8")).text
    assert "all layers for every token" in full and "None" not in full and "n·é" in full
    assert full.count("▒") % 12 == 1 and full.count("█") == full.count("░") == 1
