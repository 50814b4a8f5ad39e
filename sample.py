"""Generate text, and see how many layers each token took.

    python sample.py --show-depth                                # the tiny Llama of tests/
    python sample.py --show-depth --prompt "37 + 48 =" --html page.html
    python sample.py --model meta-llama/Llama-3.2-1B-Instruct --flexidepth out --chat
    python sample.py --prompt-file prompts.jsonl --depth-map depth.jsonl

A prompt is the user's message of a chat; with --raw it is text to be continued. Routers and
adapters are those of --flexidepth, or what train.py left in out/ for this model, or those in the
model's own folder. Each generation makes one record (README.md has its fields): the terminal,
--depth-map and --html are three views of it.
"""
import argparse
import codecs
import hashlib
import html
import json
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from flexidepth import FlexiDepth, Tokenizer, generate, whole_file

TINY = Path(__file__).resolve().parent / "tests" / "tiny-llama"
EXAMPLES = ["Finish: the early bird", "Repeat: 47 12 85", "Copy 2 to 3: 31 58 64 90", "38 + 47 =",
            "Tom has 38 figs and gets 47 more.", "7 * 58 ="]
SHADES = (195, 159, 117, 75, 33, 26, 19)  # of blue among a terminal's 256 colours, light to dark
# What could steer a terminal or hide the order of a text: control and bidirectional characters.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
                    "\ud800-\udfff]")


def parse_args() -> argparse.Namespace:
    tiny = TINY.relative_to(Path.cwd()) if TINY.is_relative_to(Path.cwd()) else TINY
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"sample.py: {message}")
    add = parser.add_argument
    add("--model", default=str(tiny), help="folder of a Llama, or a hub name in the local cache")
    add("--flexidepth", type=Path, help="folder or file of trained routers and adapters")
    add("--prompt", action="append", help="what to ask; may be given several times")
    add("--prompt-file", type=Path, help="a prompt a line, or JSONL with prompt or messages, task")
    add("--chat", action="store_true", help="read messages from the terminal, and remember them")
    add("--raw", action="store_true", help="continue the prompt as plain text, no chat format")
    add("--show-depth", action="store_true", help="show how many layers each token used")
    add("--depth-map", type=Path, help="append one record a line to this JSONL file, or resume it")
    add("--html", type=Path, help="write a page: text shaded by depth, and maps of the layers")
    add("--gates", action="store_true", help="gate scores in the records, too")
    add("--route", choices=["learned", "full"], default="learned", help="full: the base model")
    add("--threshold", type=float, help="a gate is open above it (default: as trained, 0.5)")
    add("--max-new-tokens", type=int, default=200, help="at most so many tokens in an answer (200)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this sum (1)")
    add("--seed", type=int, default=0, help="seed of the first prompt; prompt i has seed + i (0)")
    add("--batch-size", type=int, default=64, help="prompts of one length to run together (64)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's")
    args = parser.parse_args()

    if args.max_new_tokens < 1 or args.batch_size < 1:
        parser.error("--max-new-tokens and --batch-size: expected at least 1")
    if not 0 <= args.seed < 2**62:
        parser.error(f"--seed {args.seed}: expected 0 to 2**62")
    if args.chat and (args.raw or args.prompt or args.prompt_file):
        parser.error("--chat reads its prompts from the terminal, in chat format")
    if args.chat and args.depth_map and args.depth_map.is_file():
        parser.error(f"--depth-map {args.depth_map} is there; a chat needs a new file")
    for path in (args.depth_map, args.html):
        if path and (path.is_dir() or not path.parent.is_dir()):
            parser.error(f"{path}: expected the name of a file, in a folder that is there")
    if args.html and args.html == args.depth_map:
        parser.error("--html and --depth-map name the same file")
    return args


def load(args: argparse.Namespace) -> tuple[FlexiDepth, dict]:
    """The model, and the fields that all its records share."""
    flexidepth = args.flexidepth or args.model
    trained = Path("out", "train.json")
    if args.flexidepth is None and trained.is_file():
        trained_for = str(json.loads(trained.read_text())["settings"]["model"])
        if Path(trained_for).resolve() == Path(args.model).resolve():
            flexidepth = trained.parent
    if args.route == "full":
        flexidepth = None
    dtype = args.dtype and getattr(torch, args.dtype)
    try:
        model = FlexiDepth.from_pretrained(
            args.model, flexidepth, device=args.device, dtype=dtype)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} (train.py makes routers and adapters; --route full "
                                "needs none)") from None
    if args.threshold is not None:
        model.config.threshold = args.threshold

    config = model.config
    shared = {
        "version": 1, "model": args.model, "flexidepth": None, "sha256": None,
        "dtype": str(model.model.norm.weight.dtype).removeprefix("torch."),
        "num_hidden_layers": config.num_hidden_layers, "routing_layers": [], "route": args.route,
        "threshold": config.threshold, "temperature": args.temperature, "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens, "gates": args.gates}
    print(f"{args.model},", f"routers and adapters of {flexidepth}" if flexidepth
          else "all layers for every token")
    if flexidepth:
        digest = hashlib.sha256()  # other routers or adapters give other records
        for parameter in model.parameters():
            if parameter.requires_grad:
                values = parameter.detach().cpu().contiguous().view(torch.uint8)
                digest.update(values.numpy())
        shared |= {"flexidepth": str(flexidepth), "sha256": digest.hexdigest(),
                   "routing_layers": config.routing_layers}
    return model, shared


# ---- Prompts -------------------------------------------------------------------------------------
def read_prompts(args: argparse.Namespace) -> list[dict]:
    """One dict for each prompt, {"messages": [...]} or with --raw {"text": ...}, and any "task".
    Where no prompt is given, they are the examples. ValueError names the line of an unfit one."""
    prompts = [as_prompt({"prompt": prompt}, args.raw) for prompt in args.prompt or []]
    if args.prompt_file:
        for number, row in read_prompt_file(args.prompt_file):
            try:
                prompts.append(as_prompt(row, args.raw))
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise ValueError(f"{args.prompt_file}: line {number}: expected a prompt or "
                                 f"messages that end with a user's: {error}") from None
        if not prompts:
            raise ValueError(f"{args.prompt_file}: no prompt in it")
    return prompts or [as_prompt({"prompt": prompt}, args.raw) for prompt in EXAMPLES]


def read_prompt_file(path: Path) -> list[tuple[int, dict]]:
    """Line numbers and rows of a file: JSONL by its name or its first line, else lines of text."""
    from train import open_lines, read_rows  # only here, as it takes a second to load

    lines = [line.rstrip(b"\r\n") for line in open_lines(path)]
    first = next((line.strip() for line in lines if line.strip()), b"")
    name = path.name.lower().removesuffix(".gz")
    looks_like_json = first[:1] == b"{" or first == b"[" or first[:2] in (b"[{", b'["')
    if looks_like_json or name.endswith((".json", ".jsonl", ".ndjson")):
        return list(read_rows(path, lines))
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig")
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from None
        if text.strip():
            rows.append((number, {"prompt": text}))
    return rows


def as_prompt(row: dict, raw: bool) -> dict:
    """One prompt, as a record holds it. A conversation's last answer is the reference and is left
    out. ValueError if there is nothing to answer."""
    task = {} if row.get("task") is None else {"task": str(row["task"])}
    if raw:
        text = row.get("prompt") or row["text"]
        if not text.strip():
            raise ValueError("an empty prompt")
        return {"text": text} | task
    if row.get("prompt") is not None:
        messages = [{"role": "user", "content": row["prompt"]}]
    else:
        from train import read_messages
        messages = read_messages(row)
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError("an empty prompt, or no message of a user at the end")
    return {"messages": messages} | task


def encode(tokenizer: Tokenizer, prompt: dict) -> list[int]:
    if "text" in prompt:
        marked = [name for name in tokenizer.special if name in prompt["text"]]
        if marked:
            print(f"sample.py: warning: {marked[0]} in the prompt is read as plain text; without "
                  "--raw prompts get the model's own chat format", file=sys.stderr)
        return tokenizer.encode(prompt["text"], bos=True)
    return tokenizer.encode_chat(prompt["messages"], add_generation_prompt=True)


# ---- Records -------------------------------------------------------------------------------------
# The head of a record is what is known before anything is generated: settings, seed and prompt.
def make_records(model: FlexiDepth, tokenizer: Tokenizer, heads: list[dict],
                 prompts: list[list[int]], write: Callable) -> list[dict]:
    """Generate from prompts of one length, and return a record for each. `write` is called with
    the tokens and depths of all rows, (B,) each, as they come."""
    head = heads[0]
    T = len(prompts[0])
    gates = defaultdict(list)
    decisions = defaultdict(list)

    def record_route(layer_index: int, gate: torch.Tensor) -> torch.Tensor:
        """Decides as route="learned" does, and keeps what it saw and decided."""
        kept = gate > model.config.threshold
        gates[layer_index].append(gate)
        decisions[layer_index].append(kept)
        return kept

    started = time.time()
    answers = [[] for _ in prompts]
    ended = set()
    for tokens, depths in generate(
            model, torch.tensor(prompts), head["max_new_tokens"], head["temperature"],
            head["top_p"], [torch.Generator().manual_seed(each["seed"]) for each in heads],
            tokenizer.stop_ids, "full" if head["route"] == "full" else record_route):
        write(tokens, depths)
        for row, token in enumerate(tokens.tolist()):
            if row not in ended:
                answers[row].append(token)
                if token in tokenizer.stop_ids:
                    ended.add(row)
    seconds = time.time() - started
    positions = T - 1 + max(map(len, answers))

    def by_position(seen: dict[int, list[torch.Tensor]]) -> list:
        """Lists (B, positions, R) of what the route saw, layer by layer, (B, T) each."""
        if not seen:  # --route full
            return torch.empty(len(prompts), positions, 0).tolist()
        return torch.stack([torch.cat(parts, 1) for parts in seen.values()], -1).tolist()

    scores = by_position(gates)
    kept = by_position(decisions)
    plain = head["num_hidden_layers"] - len(head["routing_layers"])

    def token_fields(row: int, ids: list[int], first_position: int) -> dict:
        """The lists of a prompt or an answer. ids[i] has the depth of first_position + i."""
        here = slice(first_position, first_position + len(ids))
        record = {
            "ids": ids,
            "texts": [text_or_bytes(tokenizer.token_bytes(token)) for token in ids],
            "layers": [plain + sum(position) for position in kept[row][here]],
            "decisions": ["".join("01"[k] for k in position) for position in kept[row][here]]}
        if head["gates"]:
            record["gates"] = [[round(g, 4) for g in position] for position in scores[row][here]]
        return record

    records = []
    for row, (head, prompt, answer) in enumerate(zip(heads, prompts, answers)):
        records.append(head | {
            # A prompt's token has the depth of the position that read it. Token i of the answer was
            # predicted at position T - 1 + i, and has the depth of that one.
            "prompt": token_fields(row, prompt, 0),
            "answer": token_fields(row, answer, T - 1),
            "seconds": round(seconds, 4),
            "tokens_per_s": round(len(answer) / seconds, 2)})
    return records


def text_or_bytes(token: bytes) -> str | list[int]:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return list(token)


def resume_depth_map(file: Path, heads: list[dict]) -> list[dict]:
    """The records that the file holds already. Half a record at its end, from a run that was
    stopped, is removed. ValueError if the file is of another run, or no depth map."""
    if not file.is_file():
        return []
    *lines, rest = file.read_bytes().split(b"\n")
    by_seed = {head["seed"]: head for head in heads}
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            head = by_seed[record["seed"]]
            different = [key for key in head if record.get(key) != head[key]]
        except (ValueError, KeyError, TypeError):
            different = ["form"]
        if different:
            raise ValueError(f"{file}: line {number} is of another run: its {different[0]} "
                             "differs; give a new --depth-map")
        records.append(record)
    if rest:
        begins = [json.dumps(head)[:-1].encode() for head in heads]
        if not any(begin.startswith(rest) or rest.startswith(begin) for begin in begins):
            raise ValueError(f"{file}: not a depth map of this run; give a new --depth-map")
        os.truncate(file, file.stat().st_size - len(rest))
    return records


# ---- The terminal --------------------------------------------------------------------------------
def printable(text: str) -> str:
    """Text that can't steer the terminal: UNSAFE characters are escaped."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Printer:
    """Writes tokens as they come: coloured by depth or, in plain text, each with its depth."""
    def __init__(self, tokenizer: Tokenizer, shared: dict, show_depth: bool):
        self.tokenizer = tokenizer
        self.show_depth = show_depth
        self.layers = shared["num_hidden_layers"]
        self.least = self.layers - len(shared["routing_layers"])
        self.colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.start()

    def start(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps half a character

    def shade(self, text: str, depth: int) -> str:
        share = (depth - self.least) / max(1, self.layers - self.least)
        colour = SHADES[int(share * (len(SHADES) - 1))]
        ink = 16 if share < 0.6 else 231
        return f"\033[48;5;{colour};38;5;{ink}m{text}\033[0m" if text else ""

    def legend(self) -> str:
        if not self.colour:
            return f"layers used: the number behind each token, {self.least} to {self.layers}"
        depths = range(self.least, self.layers + 1)
        return "layers used: " + " ".join(self.shade(f" {depth} ", depth) for depth in depths)

    def write(self, token: int, depth: int) -> None:
        """Print what a token adds to the text."""
        text = printable(self.decoder.decode(self.tokenizer.token_bytes(token)))
        if token in self.tokenizer.stop_ids and not self.show_depth:
            text = ""
        if self.show_depth and self.colour:  # a line's end is not shaded: it would paint the line
            text = "\n".join(self.shade(line, depth) for line in text.split("\n"))
        print(text, end=f"[{depth}]" if self.show_depth and not self.colour else "", flush=True)

    def end(self, record: dict) -> None:
        """Print the rest of an answer, and its mean depth."""
        print(printable(self.decoder.decode(b"", final=True)))  # U+FFFD for half a character
        depths = record["answer"]["layers"]
        if self.show_depth:
            print(f"({len(depths)} tokens, {sum(depths) / len(depths):.2f} of {self.layers} layers "
                  f"on average, {record['tokens_per_s']:.0f} tokens/s)")


# ---- The page ------------------------------------------------------------------------------------
PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Layers used by each token</title>
<style>
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
h2 { font-size: 1rem; border-top: 1px solid #8886; padding-top: 1rem }
small { color: GrayText }
pre { font: inherit; line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere }
span { padding: .15em 0; border-right: 1px solid Canvas;
       background: rgb(40 120 240 / calc(.75 * var(--depth))) }
span:hover { outline: 2px solid #e69f00 }
.map { font: 14px/14px monospace; white-space: pre; overflow-x: auto; color: #3274c7 }
</style>
<h1>Layers used by each token</h1>
"""
LEGEND = """<p><small>A token of a prompt has the depth of the position that read it, one of an
answer that of the position that predicted it. In a map each column is a position, and layers go
upwards: █ kept, ░ skipped, ▒ a plain layer. Right of the line, positions predict the answer.
</small>
"""


def span(text: str, depth: int, least: int, layers: int, title: str) -> str:
    share = (depth - least) / max(1, layers - least)
    return f'<span style="--depth:{share:.2f}" title="{html.escape(title)}">{text}</span>'


def draw(record: dict, number: int) -> str:
    """A record as HTML: its text shaded by depth, and below it the map, a line a layer."""
    layers = record["num_hidden_layers"]
    routed = record["routing_layers"]
    least = layers - len(routed)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    out = [f"<h2>{number}. {html.escape(printable(record.get('task', '')))}</h2>\n"]
    for name in ("prompt", "answer"):
        part = record[name]
        mean = sum(part["layers"]) / len(part["layers"])
        out.append(f"<small>{name}: {len(part['ids'])} tokens, {mean:.2f} layers on average"
                   "</small>\n<pre>")
        for i, (text, depth) in enumerate(zip(part["texts"], part["layers"])):
            whole = text.encode() if isinstance(text, str) else bytes(text)
            shown = html.escape(printable(decoder.decode(whole))).replace("\n", "↵\n") or "·"
            title = f"{printable(repr(text))}: {depth} of {layers} layers"
            if "gates" in part:
                title += f"\ngates {part['gates'][i]}"
            out.append(span(shown, depth, least, layers, title))
        out.append("</pre>\n")

    # The prompt's last position predicts the answer's first token. It is in both lists.
    positions = record["prompt"]["decisions"] + record["answer"]["decisions"][1:]
    begin = len(record["prompt"]["ids"]) - 1
    out.append('<pre class="map">')
    for layer in reversed(range(layers)):
        row = "▒" * len(positions)
        if layer in routed:
            row = "".join("░█"[int(kept[routed.index(layer)])] for kept in positions)
        out.append(f"{layer:3} {row[:begin]}│{row[begin:]}\n")
    return "".join([*out, "</pre>\n"])


def write_page(file: Path, shared: dict, records: list[dict]) -> None:
    """The page of all records. It appears under its name only when it is complete."""
    layers = shared["num_hidden_layers"]
    least = layers - len(shared["routing_layers"])
    depths = "".join(span(f"&nbsp;{depth}&nbsp;", depth, least, layers, "")
                     for depth in range(least, layers + 1))
    caption = "all layers for every token"
    if shared["flexidepth"]:
        caption = f"gates of {shared['flexidepth']}, threshold {shared['threshold']}"
    title = html.escape(printable(f"{shared['model']}, {caption}"))
    body = [draw(record, number) for number, record in enumerate(records, 1)]
    head = f"<p>{title}<p>{depths} of {layers} layers\n"
    page = "".join([PAGE, head, LEGEND, *body, "</html>\n"])
    with whole_file(file) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")


# ---- All together --------------------------------------------------------------------------------
def ask(question: str) -> str | None:
    """A line from the terminal or a pipe, None at its end."""
    if sys.stdin.isatty():
        print(question, end="", flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def main() -> None:
    args = parse_args()
    sys.stdout = sys.stdout or open(os.devnull, "w")  # it is None where it was closed
    sys.stdout.reconfigure(errors="backslashreplace")
    tokenizer = Tokenizer.from_pretrained(args.model)
    prompts = [] if args.chat else read_prompts(args)
    model, shared = load(args)
    context = model.config.max_position_embeddings
    printer = Printer(tokenizer, shared, args.show_depth)
    # Answers appear in the terminal unless another view is all that is asked for.
    printing = args.show_depth or args.chat or not (args.depth_map or args.html)
    if args.show_depth:
        print(printer.legend())

    def run(heads: list[dict], ids: list[list[int]]) -> list[dict]:
        """The records of prompts of one length; printed, and appended to the depth map."""
        def write(tokens, depths):
            if printing and len(heads) == 1:
                printer.write(tokens.item(), depths.item())

        if printing and len(heads) == 1:
            print_question(heads[0])
        made = make_records(model, tokenizer, heads, ids, write)
        for record in made:
            if printing and len(heads) > 1:
                print_question(record)
                for token, depth in zip(record["answer"]["ids"], record["answer"]["layers"]):
                    printer.write(token, depth)
            if printing:
                printer.end(record)
        if args.depth_map:
            with open(args.depth_map, "ab") as file:
                for record in made:
                    file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        return made

    def print_question(head: dict) -> None:
        printer.start()
        asked = head["text"] if args.raw else head["messages"][-1]["content"]
        print(f"\n> {printable(asked.strip())}")

    records = []
    try:
        if args.chat:
            messages = []
            while (line := ask("\nyou: ")) is not None:
                if not line.strip():
                    continue
                asked = [*messages, {"role": "user", "content": line}]
                dropped = 0
                room = context - min(args.max_new_tokens, context // 4)
                while len(asked) > 1 and len(encode(tokenizer, {"messages": asked})) > room:
                    del asked[:2]
                    dropped += 2
                ids = encode(tokenizer, {"messages": asked})
                if len(ids) > context:
                    print(f"(not sent: it has {len(ids)} tokens, and the context {context})")
                    continue
                if dropped:
                    print(f"(the context is full: the oldest {dropped} messages are dropped)")
                head = shared | {"seed": args.seed + len(records), "messages": asked}
                records += run([head], [ids])
                answer = [i for i in records[-1]["answer"]["ids"] if i not in tokenizer.stop_ids]
                messages = [*asked, {"role": "assistant", "content": tokenizer.decode(answer)}]
        else:
            heads = [shared | {"seed": args.seed + i} | row for i, row in enumerate(prompts)]
            encoded = [encode(tokenizer, row) for row in prompts]
            for i, ids in enumerate(encoded):
                if not 0 < len(ids) <= context:
                    raise ValueError(
                        f"prompt {i + 1} has {len(ids)} tokens; expected 1 to {context}")
            if args.depth_map:
                records = resume_depth_map(args.depth_map, heads)
            done = {record["seed"] for record in records}
            # Prompts of a file run in batches of one length, which need no padding. Others run one
            # by one, so that their answers appear token by token.
            groups = defaultdict(list)
            for head, ids in zip(heads, encoded):
                if head["seed"] not in done:
                    groups[len(ids) if args.prompt_file else head["seed"]].append((head, ids))
            for group in groups.values():
                for i in range(0, len(group), args.batch_size):
                    batch = group[i:i + args.batch_size]
                    records += run([head for head, _ in batch], [ids for _, ids in batch])
    finally:
        if args.html and records:
            records.sort(key=lambda record: record["seed"])
            write_page(args.html, shared, records)
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # as of `| head`: nobody reads on, not even what is left to be flushed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        sys.exit(f"sample.py: {printable(' '.join(str(error).split()))}")
    except KeyboardInterrupt:
        sys.exit(130)
