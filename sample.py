"""Generate text, and see how many layers each token took.

    python sample.py --show-depth                                # the tiny Llama of tests/
    python sample.py --show-depth --prompt "37 + 48 =" --html page.html
    python sample.py --model meta-llama/Llama-3.2-1B-Instruct --flexidepth out --chat
    python sample.py --prompt-file prompts.jsonl --depth-map depth.jsonl

A prompt is the user's message of a chat; with --raw it is text to be continued. Routers and
adapters are those of --flexidepth, or what train.py left in out/ for this model, or those in the
model's own folder.

A router gives each token a gate at each routed layer. Where the gate is above the threshold, the
token keeps the layer, else it skips it and goes through a small adapter. Plain layers have no
router, and every token runs them. The depth of a position is the number of layers that it ran. A
token of a prompt has the depth of the position that read it, and a token of an answer that of the
position that predicted it, which is the one before it.

A request is a dict of the settings, a seed and a prompt. `make_records` answers requests: a record
is a request with tokens, depths and times added, and README.md has its fields. The terminal,
--depth-map and --html are three views of records.
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
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from flexidepth import FlexiDepth, Tokenizer, compile_decode, generate, read_json, whole_file
from train import TINY, open_lines, read_messages, read_rows

EXAMPLES = ["Finish: the early bird", "Repeat: 47 12 85", "Copy 2 to 3: 31 58 64 90", "38 + 47 =",
            "Tom has 38 figs and gets 47 more.", "7 * 58 ="]


def parse_args() -> argparse.Namespace:
    tiny = TINY.relative_to(Path.cwd()) if TINY.is_relative_to(Path.cwd()) else TINY
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"sample.py: {message}")
    add = parser.add_argument
    add("--model", default=str(tiny), help="folder of a Llama, or a hub name in the local cache")
    add("--flexidepth", type=Path, help="folder or file of trained routers and adapters")
    add("--prompt", action="append", help="what to ask; may be given several times")
    add("--prompt-file", type=Path, help="a prompt a line, or JSONL of prompts or messages")
    add("--chat", action="store_true", help="read messages from the terminal, and remember them")
    add("--raw", action="store_true", help="continue the prompt as plain text, no chat format")
    add("--show-depth", action="store_true", help="show how many layers each token used")
    add("--depth-map", type=Path, help="write a record a line to this JSONL file, or go on with it")
    add("--html", type=Path, help="write a page: text shaded by depth, and maps of the layers")
    add("--gates", action="store_true", help="gate scores in the records, too")
    add("--route", choices=["learned", "full"], default="learned", help="full: the base model")
    add("--threshold", type=float, help="a gate above it keeps the layer (default: as trained)")
    add("--max-new-tokens", type=int, default=200, help="at most so many tokens in an answer (200)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this total (1)")
    add("--seed", type=int, default=0, help="seed of the first prompt; prompt i has seed + i (0)")
    add("--batch-size", type=int, default=64, help="prompts of a file to run together (64)")
    add("--compile", action="store_true",
        help="compile what a single token runs: some seconds once, then it may be faster")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's")
    args = parser.parse_args()

    if args.max_new_tokens < 1 or args.batch_size < 1 or not 0 <= args.seed < 2**62:
        parser.error(f"--max-new-tokens {args.max_new_tokens}, --batch-size {args.batch_size}, "
                     f"--seed {args.seed}: expected at least 1, 1 and 0")
    if args.chat and (args.raw or args.prompt or args.prompt_file):
        parser.error("--chat reads its prompts from the terminal, in chat format")
    if args.chat and args.depth_map and args.depth_map.is_file():
        parser.error(f"{args.depth_map}: a chat does not go on; give a new --depth-map")
    for path in (args.depth_map, args.html):
        if path and (path.is_dir() or not path.parent.is_dir()):
            parser.error(f"{path}: expected the name of a file, in a folder that is there")
    return args


def find_flexidepth(args: argparse.Namespace) -> Path | str | None:
    """Where the routers and adapters are, None if the base is to run without."""
    if args.route == "full":
        return None
    if args.flexidepth:
        return args.flexidepth
    result = Path("out", "train.json")
    if result.is_file():
        trained_for = read_json(result)["settings"]["model"]
        if Path(trained_for).resolve() == Path(args.model).resolve():
            return result.parent
    return args.model


def load(args: argparse.Namespace) -> tuple[FlexiDepth, dict]:
    """The model, and the settings that all requests share."""
    flexidepth = find_flexidepth(args)
    dtype = args.dtype and getattr(torch, args.dtype)
    try:
        model = FlexiDepth.from_pretrained(
            args.model, flexidepth, device=args.device, dtype=dtype)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} (train.py makes routers and adapters; --route full "
                                "needs none)") from None
    config = model.config
    if args.threshold is not None:
        config.threshold = args.threshold
    if args.compile:
        compile_decode(model)

    shared = {
        "version": 1,
        "model": args.model,
        "flexidepth": None,
        "sha256": None,
        "dtype": str(model.model.norm.weight.dtype).removeprefix("torch."),
        "num_hidden_layers": config.num_hidden_layers,
        "routing_layers": [],
        "route": args.route,
        "threshold": config.threshold,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
        "gates": args.gates,
    }
    if flexidepth:
        # It lets resume_depth_map refuse a map that was made with other routers or adapters.
        digest = hashlib.sha256()
        for parameter in model.parameters():
            if parameter.requires_grad:
                digest.update(parameter.detach().cpu().view(torch.uint8).numpy())
        shared["flexidepth"] = str(flexidepth)
        shared["sha256"] = digest.hexdigest()
        shared["routing_layers"] = config.routing_layers
    return model, shared


def describe(shared: dict) -> str:
    """What the answers come from."""
    if shared["flexidepth"] is None:
        return f"{shared['model']}, all layers for every token"
    return (f"{shared['model']}, routers and adapters of {shared['flexidepth']}, "
            f"threshold {shared['threshold']}")


# ---- Prompts -------------------------------------------------------------------------------------
def read_prompts(args: argparse.Namespace) -> list[dict]:
    """All prompts, as `as_prompt` makes them: those of --prompt, then those of --prompt-file; the
    examples where there is neither. ValueError names the line of an unfit one."""
    texts = args.prompt or []
    if not texts and not args.prompt_file:
        texts = EXAMPLES
    prompts = [as_prompt({"prompt": text}, args.raw) for text in texts]
    if args.prompt_file:
        for number, row in read_prompt_file(args.prompt_file):
            try:
                prompts.append(as_prompt(row, args.raw))
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise ValueError(f"{args.prompt_file}: line {number}: expected a prompt, or "
                                 f"messages to answer: {error}") from None
    if not prompts:
        raise ValueError(f"{args.prompt_file}: no prompt in it")
    return prompts


def read_prompt_file(path: Path) -> list[tuple[int, dict]]:
    """Line numbers and rows of a file: JSONL if its name says so or it begins with {, else a prompt
    a line."""
    lines = [line.rstrip(b"\r\n") for line in open_lines(path)]
    if ".json" in path.name.lower() or b"".join(lines).lstrip(b"\xef\xbb\xbf \t").startswith(b"{"):
        return list(read_rows(path, lines))

    rows = []
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: line {number}: {error}") from None
        if text.strip():
            rows.append((number, {"prompt": text}))
    return rows


def as_prompt(row: dict, raw: bool) -> dict:
    """A prompt as a record holds it: {"messages": [...]}, or with --raw {"text": ...}, and any
    "task". ValueError if there is nothing to answer."""
    if raw:
        if "prompt" not in row:
            raise ValueError("--raw needs rows with a prompt")
        asked = row["prompt"]
        prompt = {"text": asked}
    else:
        if row.get("prompt") is not None:
            row = row | {"messages": [{"role": "user", "content": row["prompt"]}]}
        messages = read_messages(row)
        # A conversation's last answer is the reference. The model must not see it.
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        asked = messages[-1]["content"] if messages else ""
        prompt = {"messages": messages}

    if not asked.strip():
        raise ValueError("an empty prompt")
    if row.get("task") is not None:
        prompt["task"] = str(row["task"])
    return prompt


def encode(tokenizer: Tokenizer, prompt: dict) -> list[int]:
    if "text" in prompt:
        return tokenizer.encode(prompt["text"], bos=True)
    return tokenizer.encode_chat(prompt["messages"], add_generation_prompt=True)


# ---- Requests ------------------------------------------------------------------------------------
def make_batches(args: argparse.Namespace, tokenizer: Tokenizer, context: int,
                 requests: list[dict]) -> Iterator[list[dict]]:
    """Requests whose prompts have one length, so that they need no padding. Without a prompt file
    they come one by one, in order. ValueError if a prompt is too long."""
    groups = defaultdict(list)
    for request in requests:
        length = len(encode(tokenizer, request))
        if not 0 < length <= context:
            number = request["seed"] - args.seed + 1
            raise ValueError(f"prompt {number} has {length} tokens; expected 1 to {context}")
        if any(name in request.get("text", "") for name in tokenizer.special):
            print("sample.py: warning: a special token's name in the prompt is read as plain text; "
                  "without --raw prompts get the model's own chat format", file=sys.stderr)
        key = length if args.prompt_file else request["seed"]
        groups[key].append(request)
    for group in groups.values():
        for start in range(0, len(group), args.batch_size):
            yield group[start:start + args.batch_size]


def chat(args: argparse.Namespace, tokenizer: Tokenizer, context: int, shared: dict,
         answer: Callable[[list[dict]], list[dict]]) -> None:
    """Answer each message of the terminal or a pipe, with the conversation before it."""
    # An answer needs room: what it may take, but at most a quarter of the context.
    room = context - min(args.max_new_tokens, context // 4)
    messages = []
    seed = args.seed
    while True:
        print("\nyou: ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue

        message = {"role": "user", "content": line.rstrip("\n")}
        length = len(encode(tokenizer, {"messages": [message]}))
        if length > context:
            print(f"(not sent: it has {length} tokens, and the context {context})")
            continue
        messages.append(message)
        while len(messages) > 1 and len(encode(tokenizer, {"messages": messages})) > room:
            del messages[:2]
            print("(the context is full: the oldest 2 messages are dropped)")

        record, = answer([shared | {"seed": seed, "messages": list(messages)}])
        ids = [i for i in record["answer"]["ids"] if i not in tokenizer.stop_ids]
        messages.append({"role": "assistant", "content": tokenizer.decode(ids)})
        seed += 1


# ---- Records -------------------------------------------------------------------------------------
def make_records(model: FlexiDepth, tokenizer: Tokenizer, requests: list[dict],
                 write: Callable[[int, int], None]) -> list[dict]:
    """Generate from prompts of one length, and return a record for each. `write` is called with
    the tokens of the first answer and their depths, as they come."""
    settings = requests[0]
    prompts = [encode(tokenizer, request) for request in requests]
    T = len(prompts[0])
    # By layer, gates and decisions: (2, B, T) of the prompts, then (2, B, 1) of each token.
    seen = defaultdict(list)

    def collect(layer: nn.Module, inputs: tuple, output: tuple) -> None:
        _, gate, kept = output
        seen[layer.index].append(torch.stack([gate, kept]))

    routed = [model.model.layers[index] for index in settings["routing_layers"]]
    hooks = [layer.register_forward_hook(collect) for layer in routed]
    generators = [torch.Generator().manual_seed(request["seed"]) for request in requests]
    answers = [[] for _ in prompts]
    ended = set()
    started = time.perf_counter()
    for tokens, depths in generate(
            model, torch.tensor(prompts), settings["max_new_tokens"], settings["temperature"],
            settings["top_p"], generators, tokenizer.stop_ids, settings["route"]):
        for row, token in enumerate(tokens.tolist()):
            if row in ended:
                continue
            answers[row].append(token)
            if row == 0:
                write(token, depths[0].item())
            if token in tokenizer.stop_ids:
                ended.add(row)
    seconds = time.perf_counter() - started

    for hook in hooks:
        hook.remove()
    # Gates and decisions of all routed layers (2, B, positions, R); R is 0 where none is routed.
    found = torch.empty(2, len(prompts), T + settings["max_new_tokens"], 0)
    if routed:
        layers = [torch.cat(seen[index], -1) for index in settings["routing_layers"]]
        found = torch.stack(layers, -1)
    records = []
    for row, (request, prompt, answer) in enumerate(zip(requests, prompts, answers)):
        # Position t read token t of the prompt.
        of_prompt = found[:, row, :T]
        # Position T - 1 + i predicted token i of the answer.
        of_answer = found[:, row, T - 1:T - 1 + len(answer)]
        records.append(request | {
            "prompt": token_fields(tokenizer, request, prompt, of_prompt),
            "answer": token_fields(tokenizer, request, answer, of_answer),
            "seconds": round(seconds, 4),  # of the whole batch
            "tokens_per_s": round(len(answer) / seconds, 2),  # of this answer alone
        })
    return records


def token_fields(tokenizer: Tokenizer, settings: dict, ids: list[int], found: Tensor) -> dict:
    """The lists of a prompt or an answer of N tokens. found (2, N, R): gates, and 1 where kept. The
    digits of a decision are in the order of routing_layers."""
    gates = found[0]
    kept = found[1].int()
    fields = {
        "ids": ids,
        "texts": [text_or_bytes(tokenizer.token_bytes(token)) for token in ids],
        "layers": (plain_layers(settings) + kept.sum(-1)).tolist(),
        "decisions": ["".join(map(str, token)) for token in kept.tolist()],
    }
    if settings["gates"]:
        fields["gates"] = [[round(gate, 4) for gate in token] for token in gates.tolist()]
    return fields


def text_or_bytes(token: bytes) -> str | list[int]:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return list(token)


def plain_layers(settings: dict) -> int:
    """The number of layers that every token runs: the least possible depth."""
    return settings["num_hidden_layers"] - len(settings["routing_layers"])


def share_of_depth(depth: int, settings: dict) -> float:
    """From 0 at the least depth to 1 at the greatest."""
    return (depth - plain_layers(settings)) / max(1, len(settings["routing_layers"]))


def depth_summary(part: dict, settings: dict) -> str:
    depths = part["layers"]
    mean = sum(depths) / len(depths)
    return f"{len(depths)} tokens, {mean:.2f} of {settings['num_hidden_layers']} layers on average"


def resume_depth_map(file: Path, requests: list[dict]) -> list[dict]:
    """The records that the file holds already. Half a record after them, from a run that was
    stopped, is removed. ValueError if the file is of another run, or has no whole record."""
    if not file.is_file():
        return []
    *lines, rest = file.read_bytes().split(b"\n")
    # By text, because a line of another program may have any kind of "seed".
    by_seed = {str(request["seed"]): request for request in requests}
    records = []
    for number, record in read_rows(file, lines):
        request = by_seed.get(str(record.get("seed")))
        whole = {"prompt", "answer"} <= record.keys()
        if request is None or record | request != record or not whole:
            raise ValueError(f"{file}: line {number} is of another run: its prompt, model, gates "
                             "or settings differ; give a new --depth-map")
        records.append(record)
    if rest and not records:
        raise ValueError(f"{file}: not a depth map; give a new --depth-map")
    os.truncate(file, file.stat().st_size - len(rest))
    return records


# ---- The terminal --------------------------------------------------------------------------------
# What could steer a terminal or hide the order of a text: control and bidirectional characters.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
                    "\ud800-\udfff]")
# Background colours from light to dark, of a terminal's 256. Black text can be read on all of them.
SHADES = (195, 159, 117, 111, 75, 69, 63)


def printable(text: str) -> str:
    """Text that can't steer the terminal: UNSAFE characters are escaped."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def utf8_decoder() -> codecs.IncrementalDecoder:
    """Decodes token by token. A character comes with the token that completes it."""
    return codecs.getincrementaldecoder("utf-8")("replace")


class Printer:
    """Prints answers. With show_depth each token is coloured by its depth or followed by it."""
    def __init__(self, tokenizer: Tokenizer, shared: dict, show_depth: bool):
        self.tokenizer = tokenizer
        self.shared = shared
        self.show_depth = show_depth
        self.in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.decoder = utf8_decoder()

    def shade(self, text: str, depth: int) -> str:
        """Text on a background. The end of a line has none: it would paint the rest of the line."""
        share = share_of_depth(depth, self.shared)
        colour = SHADES[int(share * (len(SHADES) - 1))]
        return re.sub("(.+)", f"\033[48;5;{colour};38;5;16m\\1\033[0m", text)

    def legend(self) -> str:
        least = plain_layers(self.shared)
        layers = self.shared["num_hidden_layers"]
        if not self.in_colour:
            return f"layers used: the number behind each token, {least} to {layers}"
        depths = [self.shade(f" {depth} ", depth) for depth in range(least, layers + 1)]
        return "layers used: " + " ".join(depths)

    def begin(self, request: dict) -> None:
        """Print what was asked."""
        asked = request.get("text") or request["messages"][-1]["content"]
        print(f"\n> {printable(asked.strip())}")
        self.decoder.reset()

    def write(self, token: int, depth: int) -> None:
        """Print what a token adds to the text. The end of an answer shows only with its depth."""
        if token in self.tokenizer.stop_ids and not self.show_depth:
            return
        text = printable(self.decoder.decode(self.tokenizer.token_bytes(token)))
        if self.show_depth and self.in_colour:
            text = self.shade(text, depth)
        elif self.show_depth:
            text = f"{text}[{depth}]"
        print(text, end="", flush=True)

    def end(self, record: dict) -> None:
        """Print the mean depth of an answer."""
        print(self.decoder.decode(b"", final=True))  # half a character, if the answer was cut there
        if self.show_depth:
            print(f"({depth_summary(record['answer'], record)}, {record['tokens_per_s']:.0f} "
                  "tokens/s)")

    def show(self, record: dict) -> None:
        """Print a whole record."""
        self.begin(record)
        for token, depth in zip(record["answer"]["ids"], record["answer"]["layers"]):
            self.write(token, depth)
        self.end(record)


# ---- The page ------------------------------------------------------------------------------------
PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Layers used by each token</title>
<style>
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
h2 { font-size: 1rem; border-top: 1px solid #8886; padding-top: 1rem }
pre { font: inherit; line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere }
span { padding: .15em 0; border-right: 1px solid Canvas;
       background: rgb(40 120 240 / calc(.75 * var(--depth))) }
.map { font: 14px/14px monospace; white-space: pre; overflow: auto hidden; color: #3274c7 }
</style>
<h1>Layers used by each token</h1>
<p>The stronger its blue, the more layers a token used. A token of a prompt has the depth of the
position that read it, one of an answer that of the position that predicted it. In the map below a
text each column is a token, and layers go upwards: █ kept, ░ skipped, ▒ a plain layer.
"""


def escape(text: str) -> str:
    return html.escape(printable(text))


def draw(part: dict, settings: dict) -> str:
    """The prompt or the answer of a record: its text, each token shaded by its depth, and its map,
    a line for each layer with a cell for each token."""
    layers = settings["num_hidden_layers"]
    routed = settings["routing_layers"]
    decoder = utf8_decoder()
    drawn = ["<pre>"]
    for i, (text, depth) in enumerate(zip(part["texts"], part["layers"])):
        whole = text.encode() if isinstance(text, str) else bytes(text)
        shown = escape(decoder.decode(whole)).replace("\n", "↵\n")
        shown = shown or "·"  # the character is not complete yet
        title = f"{text!r}: {depth} of {layers} layers"
        if "gates" in part:
            title += f"\ngates {part['gates'][i]}"
        share = share_of_depth(depth, settings)
        drawn.append(f'<span style="--depth:{share:.2f}" title="{escape(title)}">{shown}</span>')

    drawn.append('</pre>\n<pre class="map">')
    for layer in reversed(range(layers)):
        cells = "▒" * len(part["ids"])
        if layer in routed:
            bits = [decision[routed.index(layer)] for decision in part["decisions"]]
            cells = "".join(bits).replace("0", "░").replace("1", "█")
        drawn.append(f"{layer:3} {escape(cells)}\n")
    return "".join([*drawn, "</pre>\n"])


def write_page(file: Path, shared: dict, records: list[dict]) -> None:
    """The page of all records. It appears under its name only when it is complete."""
    page = PAGE + f"<p>{escape(describe(shared))}\n"
    for number, record in enumerate(records, 1):
        page += f"<h2>{number}. {escape(record.get('task', ''))}</h2>\n"
        for name in ("prompt", "answer"):
            page += f"{name}: {depth_summary(record[name], record)}\n{draw(record[name], record)}"
    with whole_file(file) as temporary:
        temporary.write_text(page, encoding="utf-8")


# ---- All together --------------------------------------------------------------------------------
def main() -> None:
    args = parse_args()
    sys.stdout = sys.stdout or open(os.devnull, "w")  # it is None where it was closed
    sys.stdout.reconfigure(errors="backslashreplace")
    tokenizer = Tokenizer.from_pretrained(args.model)
    prompts = [] if args.chat else read_prompts(args)
    model, shared = load(args)
    context = model.config.max_position_embeddings
    print(printable(describe(shared)))

    printer = Printer(tokenizer, shared, args.show_depth)
    if args.show_depth:
        print(printer.legend())

    requests = [shared | {"seed": args.seed + i} | prompt for i, prompt in enumerate(prompts)]
    records = []
    if args.depth_map:
        records = resume_depth_map(args.depth_map, requests)
    done = {record["seed"] for record in records}
    requests = [request for request in requests if request["seed"] not in done]

    def answer(batch: list[dict]) -> list[dict]:
        """Answer requests and show their records: the first as it comes, the others after it."""
        printer.begin(batch[0])
        made = make_records(model, tokenizer, batch, printer.write)
        records.extend(made)
        if args.depth_map:
            with open(args.depth_map, "a") as file:
                file.writelines(json.dumps(record) + "\n" for record in made)
        printer.end(made[0])
        for record in made[1:]:
            printer.show(record)
        return made

    try:
        if args.chat:
            chat(args, tokenizer, context, shared, answer)
        else:
            for batch in make_batches(args, tokenizer, context, requests):
                answer(batch)
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
