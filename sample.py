"""Generate text, and see how many layers each token took.

    python sample.py --show-depth                                # the tiny Llama of tests/
    python sample.py --table --prompt "37 + 48 ="                # a row a token, with the layers it ran
    python sample.py --route both                                # beside the pre-trained model, all layers
    python sample.py --model meta-llama/Llama-3.2-1B-Instruct --flexidepth out --chat
    python sample.py --prompt-file prompts.jsonl --depth-map depth.jsonl --html depth.html --summary

A prompt is the user's message of a chat; with --raw it is text to be continued. Routers and adapters
are those of --flexidepth, or what train.py left in out/ for this model, or those in the model's own folder.
Each generation is one record (README.md has its fields); terminal, --depth-map and --html are views of it.
"""
import argparse
import base64
import codecs
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import BinaryIO, TextIO

import torch

from flexidepth import Config, FlexiDepth, Tokenizer, generate

TINY = Path(__file__).resolve().parent / "tests" / "tiny-llama"
EXAMPLES = ["Finish: the early bird", "Repeat: 47 12 85", "Copy 2 to 3: 31 58 64 90", "38 + 47 =",
            "Tom has 38 figs and gets 47 more.", "7 * 58 ="]
# From light to dark blue: an order that the colour-blind can read too. The steps between, in 256 colours.
PALE, DEEP, SHADES = (214, 234, 255), (10, 45, 125), (195, 159, 117, 75, 33, 26, 19)

def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser("sample.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("--model", default=os.path.relpath(TINY), help="folder of a Llama, or a hub name in the local cache")
    add("--flexidepth", type=Path, help="folder or file of trained routers and adapters")
    add("--prompt", action="append", help="what to ask; may be given several times")
    add("--prompt-file", type=Path, help="a prompt a line, or .jsonl rows with prompt or messages, any task")
    add("--chat", action="store_true", help="read messages from the terminal, and remember them")
    add("--raw", action="store_true", help="continue the prompt as plain text, without chat format")
    add("--show-depth", action="store_true", help="show how many layers each token of the answer used")
    add("--table", action="store_true", help="a row a token too: its layers, and the routed ones it ran (#)")
    add("--depth-map", type=Path, help="append a record a line to this JSONL file, going on after its last")
    add("--html", type=Path, help="write a page: text shaded by depth, tokens x layers, distribution")
    add("--summary", action="store_true", help="at the end, layers by kind of token and by task")
    add("--gates", action="store_true", help="gate scores in the records, too")
    add("--max-new-tokens", type=int, default=200, help="at most so many tokens an answer (200)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this mass (1)")
    add("--seed", type=int, default=0, help="of the drawing for the first prompt; the next has one more (0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's own")
    add("--threshold", type=float, default=0.5, help="a gate is open above it (0.5); more skips more")
    add("--route", choices=["learned", "full", "both"], default="learned", help="full: the pre-trained model")
    args = parser.parse_args()
    args.show_depth |= args.table
    # Answers appear in the terminal unless another view is all that is asked for.
    args.print = args.show_depth or args.chat or not (args.depth_map or args.html or args.summary)
    if args.max_new_tokens < 1:
        fail(f"--max-new-tokens is {args.max_new_tokens}; expected at least 1")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device) or (
            args.device != "cpu" and int(args.device[5:] or 0) >= torch.cuda.device_count()):
        fail(f"--device {args.device}: torch finds {torch.cuda.device_count()} GPUs; expected cpu, cuda, ...")
    if args.chat and args.depth_map and args.depth_map.is_file() and args.depth_map.stat().st_size:
        fail(f"--depth-map {args.depth_map} holds records, and a chat can't go on from them; give a new name")
    if args.html and args.html.suffix != ".html":
        fail(f"--html {args.html}: expected a name that ends in .html")
    return args

def fail(message: str):
    """One line and exit status 2, as for every error that the user can mend."""
    print(f"sample.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)

def load(args: argparse.Namespace) -> tuple[FlexiDepth, dict]:
    """The model with the routers and adapters given, or last trained for it, or that came with it; and the
    fields that all its records share."""
    full, dtype, digest = args.route == "full", args.dtype and getattr(torch, args.dtype), hashlib.sha256()
    flexidepth, trained = args.flexidepth or args.model, Path("out", "train.json")
    if args.flexidepth is None and trained.is_file():
        trained_for = str(json.loads(trained.read_text()).get("settings", {}).get("model"))
        if trained_for == args.model or Path(trained_for).resolve() == Path(args.model).resolve():
            flexidepth = trained.parent
    try:
        model = FlexiDepth.from_pretrained(args.model, None if full else flexidepth, None, args.device, dtype)
    except FileNotFoundError as error:
        more = "" if full else "; train.py makes routers and adapters, --route full needs none"
        raise FileNotFoundError(f"{error}{more}") from None
    print(f"{args.model},", "all layers for every token" if full else f"routers and adapters of {flexidepth}")
    model.config.threshold = args.threshold
    for parameter in model.parameters():
        if parameter.requires_grad:  # trained: other routers or adapters give other records
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    config, settings = model.config, ("route", "threshold", "temperature", "top_p", "max_new_tokens", "gates")
    shared = {"version": 1, "model": args.model, "flexidepth": str(flexidepth), "sha256": digest.hexdigest(),
              "dtype": str(next(model.parameters()).dtype)[6:], "num_hidden_layers": config.num_hidden_layers,
              "routing_layers": config.routing_layers, **{key: vars(args)[key] for key in settings}}
    return model, shared | ({"flexidepth": None, "sha256": None, "routing_layers": []} if full else {})

# ---- From prompts to records ---------------------------------------------------------------------
def read_prompts(args: argparse.Namespace, file: BinaryIO, encode: Callable) -> Iterator[dict]:
    """{"messages": [...]}, with --raw {"text": ...}, and any task, of each prompt asked for, else of the
    examples; with --chat those of the user, as they come. ValueError, with its line, if one is unfit."""
    def row(prompt=None, messages=None, task=None, **_) -> dict:
        messages = [{"role": "user", "content": prompt}] if messages is None else messages
        messages = [{key: message[key] for key in ("role", "content")} for message in messages]
        if messages[-1]["role"] == "assistant":  # the reference answer
            messages.pop()
        if not all([message["content"].strip() for message in messages]) or messages[-1]["role"] != "user":
            raise ValueError("an empty prompt, or no message of a user at the end")
        row = {"text": prompt} if args.raw else {"messages": messages}
        encode(row)  # does it fit the context?
        return row | ({} if task is None else {"task": str(task)})

    for prompt in args.prompt or ([] if args.prompt_file or args.chat else EXAMPLES):
        yield row(prompt)
    for number, line in enumerate(file, 1):
        try:
            line = line.decode("utf-8-sig").strip("\r\n")
            if line.strip():
                yield row(**json.loads(line)) if args.prompt_file.suffix == ".jsonl" else row(line)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            hint = "" if type(error) is ValueError else 'expected {"prompt": ...} or {"messages": [...]}; '
            raise ValueError(f"{args.prompt_file}: line {number}: {hint}{error}") from None
    while args.chat:
        if sys.stdin.isatty():
            print("\nyou: ", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield row(line.rstrip("\n"))

def answer(model: FlexiDepth, tokenizer: Tokenizer, ids: list[int], head: dict, write: Callable) -> dict:
    """Generate from token ids: the record. write is called with each token and its depth as it comes."""
    gates, kept, tokens, started = defaultdict(list), defaultdict(list), [], time.time()

    def route(layer_index: int, gate: torch.Tensor) -> torch.Tensor:  # as "learned" does; and noted down
        decision = gate > model.config.threshold
        gates[layer_index] += gate[0].tolist()
        kept[layer_index] += decision[0].tolist()
        return decision

    for token, depth in generate(model, torch.tensor([ids]), head["max_new_tokens"], head["temperature"],
                                 head["top_p"], torch.Generator().manual_seed(head["seed"]),
                                 tokenizer.stop_ids, "full" if head["route"] == "full" else route):
        tokens.append(token)
        write(token, depth)
    seconds, plain = time.time() - started, head["num_hidden_layers"] - len(head["routing_layers"])
    decisions = ["".join("01"[open] for open in row) for row in zip(*kept.values())]  # by position
    scores = [[round(gate, 4) for gate in row] for row in zip(*gates.values())]

    def part(ids: list[int], first: int) -> dict:  # first: the position whose depth is that of ids[0]
        raw, here = map(tokenizer.encoding.decode_single_token_bytes, ids), slice(first, first + len(ids))
        texts = [text if (text := r.decode(errors="replace")).encode() == r else [*r] for r in raw]
        rows = decisions[here] or [""] * len(ids)
        return {"ids": ids, "texts": texts, "layers": [plain + row.count("1") for row in rows],
                "decisions": rows} | ({"gates": scores[here]} if head["gates"] else {})
    return head | {"prompt": part(ids, 0), "answer": part(tokens, len(ids) - 1),
                   "seconds": round(seconds, 4), "tokens_per_s": round(len(tokens) / seconds, 2)}

class DepthMap:
    """Records, one a line. What the file holds already is read back first, and checked; then it grows."""
    def __init__(self, path: Path):
        self.path, self.number, self.writer = path, 0, open(path, "ab", buffering=0)
        self.reader = open(path, "rb") if path.is_file() else io.BytesIO()

    def read(self, head: dict) -> dict | None:
        """The record of this head, or None where the file ends. ValueError if another stands there."""
        line, self.number = self.reader.readline(), self.number + 1
        if not line.endswith(b"\n") and b'{"version": 1, '.startswith(line[:15]):
            if line:  # half a record: the run was stopped as it wrote
                self.writer.truncate(self.reader.tell() - len(line))
            self.reader = io.BytesIO()
            return None
        try:
            record = json.loads(line)
            other = next((key for key in head if record.get(key) != head[key]), None)
        except (ValueError, AttributeError):
            other = "form"
        if other:
            raise ValueError(f"{self.path}: line {self.number} is of another run, its {other} differs")
        return record

    def append(self, record: dict) -> None:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            while line:
                line = line[self.writer.write(line):]
        except OSError as error:  # half a record may be there: it goes when the run goes on
            raise OSError(f"{self.path}: {error.strerror}; its whole records stay") from None

# ---- What the depth says -------------------------------------------------------------------------
def kind(text: str | list[int], before: str | list[int]) -> str:
    """The kind of a token, given the one before it."""
    if isinstance(text, list):
        return "part of a character"
    if text.isspace() or text.strip().isdigit():
        return "white space" if text.isspace() else "digits"
    if re.fullmatch(r"<\|\w+\|>", text):
        return "special"
    if not any(map(str.isalnum, text)):
        return "punctuation"
    return "rest of a word" if text[0].isalpha() and str(before)[-1:].isalpha() else "start of a word"

class Statistics:
    """Sums over all records, answers and prompts apart; they take no more room as records come."""
    def __init__(self):
        self.tokens, self.layers, self.full, self.both = Counter(), Counter(), Counter(), Counter()

    def add(self, record: dict) -> None:
        seen, before = set(), ("", None)
        for name in ("prompt", "answer"):
            for text, token, depth in zip(*(record[name][key] for key in ("texts", "ids", "layers"))):
                groups = [(0, kind(text, before[0]))]  # by number they stand in the table
                groups += [(1, "repeats earlier context")] if (before[1], token) in seen else []
                groups += [(2, f"task {record['task']}")] if "task" in record else []
                groups += [(3, f"{depth} layers"), (4, "all tokens")]
                for group in groups:
                    self.tokens[name, group] += 1
                    self.layers[name, group] += depth
                    self.full[name, group] += depth == record["num_hidden_layers"]
                seen.add((before[1], token))
                before = text, token
        if full := record.get("full"):
            ids, theirs = record["answer"]["ids"], full["ids"]
            self.both.update(answers=1, same=int(ids == theirs), tokens=len(ids), full_tokens=len(theirs),
                             seconds=record["seconds"], full_seconds=full["seconds"])

    def rows(self) -> Iterator[list[str]]:
        """The table: kinds of token, tasks, depths, all; kinds and tasks from few layers to many."""
        columns = "tokens", "share", "layers", "full depth"
        yield ["", f"answer: {columns[0]}", *columns[1:], f"prompt: {columns[0]}", *columns[1:]]
        def order(group: tuple[int, str]) -> tuple:
            key = ("answer" if self.tokens["answer", group] else "prompt"), group
            return group[0], self.layers[key] / self.tokens[key], group
        for group in sorted({group for _, group in self.tokens}, key=order):
            cells = [" ".join(printable(group[1]).split())]
            for name in ("answer", "prompt"):
                n, layers, full = (count[name, group] for count in (self.tokens, self.layers, self.full))
                share = n / max(1, self.tokens[name, (4, "all tokens")])
                cells += [f"{n:,}", f"{share:.1%}", f"{layers / n:.2f}", f"{full / n:.1%}"] if n else [""] * 4
            yield cells

# ---- Views: terminal and page --------------------------------------------------------------------
def printable(text: str) -> str:
    """Text that can't steer the terminal: control and format characters but newline and tab escaped."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else
                   c.encode("unicode_escape").decode() for c in text)

def cells(part: dict) -> Iterator[tuple[str, str, str]]:
    """Of each token: itself in quotes and on one line, its layers, its routed layers kept (#) or skipped."""
    for text, depth, decisions in zip(part["texts"], part["layers"], part["decisions"]):
        token = repr(text if isinstance(text, str) else bytes(text))
        yield token, str(depth), decisions.replace("1", "#").replace("0", ".")

def align(rows: list) -> Iterator[str]:
    """Lines of a table, its first column to the left. Wide characters take two places, combining ones 0."""
    def size(text: str) -> int:
        return sum((unicodedata.east_asian_width(c) in "WF") + (unicodedata.category(c) not in ("Mn", "Me"))
                   for c in text)
    widths = [max(map(size, column)) for column in zip(*rows)]
    for first, *row in rows:
        yield "  ".join([first + " " * (widths[0] - size(first)), *map(str.rjust, row, widths[1:])]).rstrip()

class Printer:
    """Writes tokens as they come: coloured by depth or, in plain text, each with its depth behind it."""
    def __init__(self, tokenizer: Tokenizer, config: Config, show_depth: bool):
        self.tokenizer, self.show_depth, self.layers = tokenizer, show_depth, config.num_hidden_layers
        self.least = self.layers - len(config.routing_layers)
        self.colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back half a character

    def shade(self, text: str, depth: int) -> str:
        share = (depth - self.least) / max(1, self.layers - self.least)
        paper = f"5;{SHADES[int(share * (len(SHADES) - 1))]}"
        if os.environ.get("COLORTERM") in ("truecolor", "24bit"):
            paper = "2;" + ";".join(f"{a + (b - a) * share:.0f}" for a, b in zip(PALE, DEEP))
        return f"\033[48;{paper};38;5;{16 if share < 0.6 else 231}m{text}\033[0m" if text else ""

    def write(self, token: int, depth: int) -> None:
        """Print what a token adds to the text."""
        if token in self.tokenizer.stop_ids:
            text = self.tokenizer.decode([token]) if self.show_depth else ""
        else:
            text = printable(self.decoder.decode(self.tokenizer.encoding.decode_single_token_bytes(token)))
        if self.show_depth and self.colour:  # not over a line's end, or the rest of the line is painted too
            text = "\n".join(self.shade(line, depth) for line in text.split("\n"))
        print(text, end=f"[{depth}]" if self.show_depth and not self.colour else "", flush=True)

    def legend(self) -> str:
        if not self.colour:
            return f"layers used: the number behind each token, {self.least} to {self.layers}"
        return "layers used: " + " ".join(self.shade(f" {d} ", d) for d in range(self.least, self.layers + 1))

    def end(self, record: dict, table: bool) -> None:
        """Print what follows an answer: the rest of its text, table, means, how all layers compare."""
        part = record["answer"]
        print(self.decoder.decode(b"", final=True))  # U+FFFD, if it ends within a character
        if table:
            print(*align([("token", "layers", "routed"), *cells(part)]), sep="\n")
        if self.show_depth:
            mean = sum(part["layers"]) / len(part["layers"])
            print(f"({len(part['ids'])} tokens, {mean:.2f} of {self.layers} layers on average, "
                  f"{record['tokens_per_s']:.0f} tokens/s)")
        if "full" in record:
            full, same = record["full"], len(os.path.commonprefix([part["ids"], record["full"]["ids"]]))
            says = "the same tokens" if part["ids"] == full["ids"] else f"others from token {same + 1} on"
            print(f"(all layers: {says}, {len(full['ids']) / full['seconds']:.0f} tokens/s beside "
                  f"{record['tokens_per_s']:.0f})")

STYLE = """:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem 8rem}
h2{font-size:1rem;border-top:1px solid #8886;padding-top:1rem}small{color:GrayText}
pre{font:inherit;line-height:1.9;white-space:pre-wrap;overflow-wrap:anywhere;margin:.2rem 0}
b{font-weight:400;padding:.2em .5em}span{padding:.15em 0;border-right:1px solid Canvas}
span:hover,span:focus{outline:2px solid #e69f00}span:hover:after,span:focus:after{content:attr(data-t);
position:fixed;left:1rem;bottom:1rem;max-width:90vw;white-space:pre-wrap;font:13px/1.5 monospace;
background:#1b1f24;color:#fff;padding:.6rem}
.map{font:14px/14px monospace;white-space:pre;overflow-x:auto;color:#3274c7;margin:1rem 0}
td{padding:.1rem .5rem;text-align:right;white-space:nowrap}td:first-child{text-align:left}
progress{width:4rem}"""
PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta http-equiv="Content-Security-Policy"
content="default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'">
<title>Layers used by each token</title><style>{style}</style><h1>Layers used by each token</h1>
<p>{title}<p>{legend} of {layers} layers. <a href="#all">All in figures</a>
<p><small>A token of a prompt has the depth of the position that read it, one of an answer that of the
position that predicted it. In a map each column is a position, and layers go upwards: █ kept, ░ skipped,
▒ a plain layer. From the line on the answer is predicted.</small>
<!----><h2 id="all">All in figures</h2><table>{table}</table></html>
"""

def draw(record: dict, number: int) -> str:
    """A record as HTML: its text shaded by depth, and below it the map, a line a layer."""
    decoder, routed = codecs.getincrementaldecoder("utf-8")("replace"), record["routing_layers"]
    prompt, reply, L = record["prompt"], record["answer"], record["num_hidden_layers"]
    out = [f"<h2>{number}. {escape(record.get('task', ''))}</h2>"]
    for name, part in (("prompt", prompt), ("answer", reply)):
        n = len(part["ids"])
        out += [f"<small>{name}: {n:,} tokens, {sum(part['layers']) / n:.2f} layers on average</small><pre>"]
        gates = [f"\ngates {row}" for row in part.get("gates", ())] or [""] * n
        for text, depth, gate, (token, _, ran) in zip(part["texts"], part["layers"], gates, cells(part)):
            tip = f"{token}  {depth} of {L} layers\n{ran} of {routed}{gate}"
            text = printable(decoder.decode(text.encode() if isinstance(text, str) else bytes(text))) or "·"
            out += [f'<span class="d{depth}" tabindex="0" data-t="{escape(tip)}">',
                    escape(text).replace("\n", "↵\n"), "</span>"]
        out += ["</pre>"]
    rows = zip(*prompt["decisions"], *reply["decisions"][1:])  # its first is the prompt's last position
    rows, begin = dict(zip(routed, map("".join, rows))), len(prompt["ids"]) - 1
    out += ['<pre class="map" tabindex="0">']
    for layer in reversed(range(L)):
        row = rows.get(layer, "+" * (begin + len(reply["ids"]))).translate(str.maketrans("1+0", "█▒░"))
        out += [f"{layer:3} {row[:begin]}│{row[begin:]}\n"]
    return "".join([*out, "</pre>"])

def write_page(path: Path, head: dict, drawn: TextIO, statistics: Statistics) -> None:
    """The page: the records as drawn, then the figures. To a temporary file, renamed when it is whole."""
    L, R = head["num_hidden_layers"], len(head["routing_layers"])
    temporary = path.with_name(f".{path.name}.part")
    gates = f"routers and adapters of {head['flexidepth']}, threshold {head['threshold']}"
    title = f"{head['model']}, {gates if R else 'all layers for every token'}"
    style, legend, table = STYLE, "", ""
    for depth in range(L - R, L + 1):  # more of one hue, over light and dark: black or white stays readable
        style += f".d{depth}{{background:rgb(40 120 240/{0.75 * (depth - L + R) / max(1, R):.2f})}}"
        legend += f'<b class="d{depth}">{depth}</b>'
    for first, *row in statistics.rows():
        for i in (1, 5):  # the shares
            row[i] += f' <progress max="100" value="{row[i][:-1]}"></progress>' if "%" in row[i] else ""
        table += f"<tr><td>{'<td>'.join([escape(first), *row])}"
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    start, end = PAGE.format(style=style, digest=digest, layers=L, title=escape(title), legend=legend,
                             table=table).split("<!---->")
    try:
        with open(temporary, "w", encoding="utf-8", errors="xmlcharrefreplace") as file:
            file.write(start)
            drawn.seek(0)
            shutil.copyfileobj(drawn, file)
            file.write(end)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

# ---- All together --------------------------------------------------------------------------------
def make_records(args: argparse.Namespace, model: FlexiDepth, tokenizer: Tokenizer,
                 shared: dict) -> Iterator[dict]:
    """The records of all prompts: those that --depth-map holds already, then new ones, made and printed."""
    def encode(row: dict) -> list[int]:
        ids = (tokenizer.encode(row["text"], bos=True) if args.raw else
               tokenizer.encode_chat(row["messages"], add_generation_prompt=True))
        if len(ids) > (context := model.config.max_position_embeddings):
            raise ValueError(f"a prompt of {len(ids)} tokens; expected from 1 to {context}")
        return ids

    file = open(args.prompt_file, "rb") if args.prompt_file else io.BytesIO()
    file = file if file.seekable() else io.BytesIO(file.read())  # read twice: its faults are found at once
    total = 0 if args.chat else sum(1 for _ in read_prompts(args, file, encode))
    if args.prompt_file and not (total or args.chat):
        raise ValueError(f"{args.prompt_file}: no prompt in it")
    file.seek(0)
    depth_map, history, new = DepthMap(args.depth_map) if args.depth_map else None, [], 0
    in_place, started = sys.stderr.isatty() and not args.print, (said := time.time())
    for index, row in enumerate(read_prompts(args, file, encode)):
        if args.chat and not args.raw:
            row["messages"] = history + row["messages"]
        head = shared | {"seed": args.seed + index} | row
        record = depth_map.read(head) if depth_map else None
        if record is None:
            ids, new, printer = encode(row), new + 1, Printer(tokenizer, model.config, args.show_depth)
            if args.print:
                asked = row["text"] if args.raw else row["messages"][-1]["content"]
                print(f"\n> {printable(asked.strip())}")
            record = answer(model, tokenizer, ids, head, printer.write if args.print else lambda *_: None)
            if args.route == "both":
                full = answer(model, tokenizer, ids, head | {"route": "full"}, lambda *_: None)
                record["full"] = {"ids": full["answer"]["ids"], "seconds": full["seconds"]}
            if depth_map:
                depth_map.append(record)
            if args.print:
                printer.end(record, args.table)
            if total > 10 and (in_place or time.time() - said > 10):
                said = time.time()
                left = (said - started) / new * (total - index - 1)
                print(f"{index + 1} of {total} prompts, {left:.0f} s left", file=sys.stderr, flush=True,
                      end="\033[K\r" if in_place else "\n")
        yield record
        reply = tokenizer.decode(id for id in record["answer"]["ids"] if id not in tokenizer.stop_ids)
        history = row.get("messages", []) + [{"role": "assistant", "content": reply}]

def run(args: argparse.Namespace) -> None:
    tokenizer, (model, shared), statistics = Tokenizer.from_pretrained(args.model), load(args), Statistics()
    if args.show_depth:
        print(Printer(tokenizer, model.config, True).legend())
    stopped = None
    with (tempfile.TemporaryFile("w+", encoding="utf-8", errors="xmlcharrefreplace", dir=args.html.parent)
          if args.html else io.StringIO()) as drawn:
        try:
            for number, record in enumerate(make_records(args, model, tokenizer, shared), 1):
                statistics.add(record)
                if args.html:
                    drawn.write(draw(record, number))
        except (KeyboardInterrupt, OSError, ValueError) as error:
            stopped = error  # what there is so far is shown first
        if args.html and statistics.tokens:
            write_page(args.html, shared, drawn, statistics)
    if args.summary and statistics.tokens:
        print("", *align([*statistics.rows()]), sep="\n")
    if both := statistics.both:
        print(f"\n{both['same']} of {both['answers']} answers have the same tokens with all layers, at "
              f"{both['full_tokens'] / both['full_seconds']:.0f} tokens/s beside "
              f"{both['tokens'] / both['seconds']:.0f}")
    if stopped:
        raise stopped

def main() -> None:
    args = parse_args()
    try:
        run(args)
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        try:
            sys.stdout.flush()
        except OSError:  # as of `| head`: nobody reads on, not even what is still to be flushed
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            fail(error)
    except KeyboardInterrupt:
        sys.exit(130)

if __name__ == "__main__":
    main()
