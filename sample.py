"""Generate text, and see how many layers each token took.

    python sample.py --show-depth                                # the tiny Llama of tests/
    python sample.py --show-depth --prompt "37 + 48 =" --html page.html
    python sample.py --model meta-llama/Llama-3.2-1B-Instruct --flexidepth out --chat
    python sample.py --prompt-file prompts.jsonl --depth-map depth.jsonl

A prompt is the user's message of a chat; with --raw it is text to be continued. A prompt file has
JSONL rows with a "prompt" or (not with --raw) "messages", and any "task". Routers and adapters are
those of --flexidepth, or what train.py left in out/ for this model, or those in the model's own
folder.

A router gives each token a gate at each routed layer. Where the gate is above the threshold, the
token runs the layer. Otherwise it skips the layer, and runs a small adapter instead. Every token
runs the plain layers, which have no router. The depth of a token is the number of layers that ran.
At each position the model reads one token and predicts the next one. A prompt's token has the depth
of its own position. An answer's token has the depth of the position before it, which predicted it.

A record is a dict of the settings, a prompt and its answer, with the depths of all tokens. Its
fields are in README.md. --depth-map writes each record as a line, and --html draws each record.
"""
import argparse
import codecs
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from html import escape
from os.path import expanduser, realpath, relpath
from pathlib import Path
from statistics import mean

import torch

from flexidepth import FlexiDepth, Tokenizer, compile_decode, generate, read_json
from train import TINY, read_jsonl

EXAMPLES = ["Finish: the early bird", "Repeat: 47 12 85", "Copy 2 to 3: 31 58 64 90", "38 + 47 =",
            "Tom has 38 figs and gets 47 more.", "7 * 58 ="]
ROLES = ("system", "user", "assistant", "tool")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"sample.py: {printable(message)}")
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group().add_argument
    add("--model", type=expanduser, default=relpath(TINY), help="folder or cached hub name")
    add("--flexidepth", type=expanduser, help="folder or file of trained routers and adapters")
    source("--prompt", action="append", help="what to ask; may be given several times")
    source("--prompt-file", type=expanduser, help="JSONL of prompts or messages")
    source("--chat", action="store_true", help="read messages from the terminal, and answer each")
    add("--raw", action="store_true", help="continue the prompt as plain text, no chat format")
    add("--show-depth", action="store_true", help="show how many layers each token used")
    add("--depth-map", type=expanduser, help="write a record a line to this new JSONL file")
    add("--html", type=expanduser, help="write a page: text shaded by depth, maps of the layers")
    add("--route", choices=["learned", "full"], default="learned", help="full: the base model")
    add("--threshold", type=float, help="a gate above it keeps the layer (default: as trained)")
    add("--max-new-tokens", type=int, default=200, help="at most so many tokens in an answer (200)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this total (1)")
    add("--seed", type=int, default=0, help="seed of the first prompt; each later one adds 1 (0)")
    add("--compile", action="store_true", help="compile decoding: slower at first, then faster")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's")
    args = parser.parse_args()

    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {args.max_new_tokens}: expected at least 1")
    if args.chat and args.raw:
        parser.error("--chat needs a chat format; --raw goes with --prompt or --prompt-file")
    if args.depth_map and os.path.exists(args.depth_map):
        parser.error(f"{args.depth_map} exists; give --depth-map the name of a new file")
    return args


def load(args: argparse.Namespace) -> tuple[FlexiDepth, dict]:
    """The model, and the settings that all records share."""
    flexidepth = args.flexidepth or args.model
    result = Path("out", "train.json")
    if args.route == "full":
        flexidepth = None
    elif not args.flexidepth and result.is_file():
        trained_for = read_json(result).get("settings", {}).get("model", "")
        if trained_for and realpath(trained_for) == realpath(args.model):
            flexidepth = "out"
    dtype = args.dtype and getattr(torch, args.dtype)
    model = FlexiDepth.from_pretrained(args.model, flexidepth, device=args.device, dtype=dtype)
    config = model.config
    if args.threshold is not None:
        config.threshold = args.threshold
    if args.compile:
        compile_decode(model)
    return model, {
        "version": 2,
        "model": args.model,
        "flexidepth": flexidepth,
        "dtype": str(model.model.norm.weight.dtype).removeprefix("torch."),
        "num_hidden_layers": config.num_hidden_layers,
        "routing_layers": config.routing_layers if flexidepth else [],
        "route": args.route,
        "threshold": config.threshold,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens}


# ---- Prompts -------------------------------------------------------------------------------------
def as_prompt(row: dict, raw: bool) -> dict:
    """A prompt as a record holds it: {"messages": [...]}, or, if raw, {"text": ...}; and any task.
    Raises ValueError, TypeError or AttributeError for a row of another form."""
    messages = row.get("messages", [])
    if raw or "prompt" in row:
        messages = [{"role": "user", "content": row.get("prompt")}]
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise ValueError(f"expected a role of {ROLES} and a text; found {message!r:.99}")
    # The last message may be the expected answer. The model must not see it.
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or not messages[-1]["content"].strip():
        raise ValueError("there is no prompt, or no message to answer")
    prompt = {"text": row["prompt"]} if raw else {"messages": messages}
    if row.get("task"):
        prompt["task"] = str(row["task"])
    return prompt


def encode(tokenizer: Tokenizer, prompt: dict, context: int) -> list[int]:
    """Token ids of a prompt. Raises ValueError if they are more than the context holds."""
    if "text" in prompt:
        ids = tokenizer.encode(prompt["text"], bos=True)
    else:
        ids = tokenizer.encode_chat(prompt["messages"], add_generation_prompt=True)
    if len(ids) > context:
        raise ValueError(f"the context is full: it holds {context} tokens, and the prompt has "
                         f"{len(ids)}; shorten it, or start a new chat")
    return ids


def read_prompts(args: argparse.Namespace, tokenizer: Tokenizer, context: int) -> list[dict]:
    """The prompts of --prompt and --prompt-file, or the examples. ValueError names a bad one."""
    rows = [("--prompt", {"prompt": text}) for text in args.prompt or EXAMPLES]
    if args.prompt_file:
        rows = [*read_jsonl(Path(args.prompt_file))]
    if not rows:
        raise ValueError(f"{args.prompt_file}: holds no prompt")
    prompts = []
    for place, row in rows:
        try:
            prompts.append(as_prompt(row, args.raw))
            encode(tokenizer, prompts[-1], context)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{place} can't be answered: {error}") from None
    return prompts


def read_chat(messages: list[dict]) -> Iterator[dict]:
    """Prompts from the terminal or a pipe. The caller appends each answer to the same list."""
    print("\nyou: ", end="", flush=True)
    for line in sys.stdin:
        if line.strip():
            messages.append({"role": "user", "content": line.rstrip("\n")})
            yield {"messages": messages}
        print("\nyou: ", end="", flush=True)
    print()


# ---- Records -------------------------------------------------------------------------------------
UTF8Decoder = codecs.getincrementaldecoder("utf-8")  # it holds a character back until it is whole


def answer(model: FlexiDepth, tokenizer: Tokenizer, request: dict, show_depth: bool) -> dict:
    """Generate, and print the answer as it comes. A request has the settings, a seed and a prompt.
    Returns a record, which is the request with the results added."""
    prompt = encode(tokenizer, request, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(request["seed"])
    decoder = UTF8Decoder("replace")
    ids = []
    decisions = []  # at each position, a string with a digit for each routed layer
    started = time.perf_counter()
    for step in generate(
            model, torch.tensor([prompt]), request["max_new_tokens"], request["temperature"],
            request["top_p"], generator, tokenizer.stop_ids, request["route"]):
        token = step.token.item()
        ids.append(token)
        if step.kept is not None:  # of all the prompt's positions first, then of one at a time
            decisions += ["".join(map(str, kept)) for kept in step.kept[0].int().tolist()]
        text = printable(decoder.decode(tokenizer.token_bytes(token)))
        if show_depth:
            text = shade(text, step.depth.item(), request)
        if show_depth or token not in tokenizer.stop_ids:
            print(text, end="", flush=True)
    seconds = time.perf_counter() - started
    print(decoder.decode(b"", final=True))  # half a character, if the answer was cut there

    T = len(prompt)
    decisions = decisions or [""] * (T + len(ids) - 1)  # route="full" decides nothing
    return request | {
        "prompt": token_lists(tokenizer, request, prompt, decisions[:T]),
        # Position T - 1, the last of the prompt, predicted the first token of the answer.
        "answer": token_lists(tokenizer, request, ids, decisions[T - 1:]),
        "seconds": round(seconds, 4), "tokens_per_s": round(len(ids) / seconds, 2)}


def token_lists(tokenizer: Tokenizer, settings: dict, ids: list[int], decisions: list[str]) -> dict:
    """The lists of a prompt or an answer. The digits of a decision are in the order of
    routing_layers, 1 where the token kept the layer."""
    texts = []
    for token in ids:
        text = tokenizer.token_bytes(token)
        try:
            texts.append(text.decode())
        except UnicodeDecodeError:  # the bytes of a part of a character
            texts.append(list(text))
    depths = [settings["num_hidden_layers"] - decision.count("0") for decision in decisions]
    return {"ids": ids, "texts": texts, "layers": depths, "decisions": decisions}


def depth_summary(record: dict, name: str) -> str:
    depths = record[name]["layers"]
    return (f"{len(depths)} tokens, {mean(depths):.2f} of {record['num_hidden_layers']} layers "
            "on average")


def share_of_depth(depth: int, settings: dict) -> float:
    """From 0 for a token that skipped all routed layers to 1 for one that skipped none."""
    skipped = settings["num_hidden_layers"] - depth
    return 1 - skipped / (len(settings["routing_layers"]) or 1)


# ---- The terminal --------------------------------------------------------------------------------
# Seven background colours of a terminal's 256, from light to dark. Black text is legible on each.
SHADES = (195, 159, 117, 111, 75, 69, 63)


def printable(text: str) -> str:
    """Text with an escape for each character that can't be seen, or could steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode()
                   for c in text)


def shade(text: str, depth: int, settings: dict) -> str:
    """Text with its depth, as the colour of its background or as a number behind it."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return f"{text}[{depth}]"
    colour = SHADES[round(6 * share_of_depth(depth, settings))]
    # A newline has no background, because it would paint the rest of the line.
    return re.sub("(.+)", f"\033[48;5;{colour};38;5;16m\\1\033[0m", text)


# ---- The page ------------------------------------------------------------------------------------
PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Layers used by each token</title>
<style>:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
pre { font: inherit; line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere }
span { background: rgb(40 120 240 / calc(.75 * var(--depth))); border-right: 1px solid Canvas }
.map { font: 14px/14px monospace; white-space: pre; overflow: auto hidden; color: #3274c7 }
</style><h1>Layers used by each token</h1>
<p>The stronger its blue, the more layers a token used. In the map below a text each column is a
token, and layers go upwards: █ kept, ░ skipped, ▒ a plain layer.
"""


def draw(record: dict) -> str:
    """Prompt and answer of a record, each as its text, with tokens shaded by their depths, and its
    map, with a line for each layer and a column for each token."""
    drawn = f"<h2>{escape(printable(record.get('task', '')))}</h2>\n"
    for name in ("prompt", "answer"):
        part = record[name]
        drawn += f"{name}: {depth_summary(record, name)}\n<pre>"
        decoder = UTF8Decoder("replace")
        for text, depth in zip(part["texts"], part["layers"]):
            shown = decoder.decode(text.encode() if isinstance(text, str) else bytes(text))
            shown = escape(printable(shown)).replace("\n", "↵\n") or "·"  # half a character
            share = share_of_depth(depth, record)
            drawn += f'<span style="--depth:{share:.2f}" title="{depth} layers">{shown}</span>'

        drawn += '</pre>\n<pre class="map">'
        kept = dict(zip(record["routing_layers"], zip(*part["decisions"])))
        for layer in reversed(range(record["num_hidden_layers"])):
            digits = kept.get(layer, "2" * len(part["ids"]))  # 2: a plain layer
            cells = "".join("░█▒"[int(digit)] for digit in digits)
            drawn += f"{layer:3} {cells}\n"
        drawn += "</pre>\n"
    return drawn


# ---- All together --------------------------------------------------------------------------------
def main() -> None:
    args = parse_args()
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    tokenizer = Tokenizer.from_pretrained(args.model)
    model, settings = load(args)
    context = model.config.max_position_embeddings
    messages = []  # of a chat
    prompts = read_chat(messages) if args.chat else read_prompts(args, tokenizer, context)

    title = f"{args.model}, all layers for every token"
    if settings["flexidepth"]:
        title = f"{args.model}, routers and adapters of {settings['flexidepth']}"
    print(printable(title))
    if args.show_depth:
        layers = settings["num_hidden_layers"]
        least = layers - len(settings["routing_layers"])
        print("legend:", *[shade(f"a {n}-layer token", n, settings) for n in (least, layers)])

    with (open(args.html or os.devnull, "w", encoding="utf-8") as page,
          open(args.depth_map or os.devnull, "w") as depth_map):
        page.write(f"{PAGE}<p>{escape(printable(title))}\n")
        for i, prompt in enumerate(prompts):
            if not (args.chat and sys.stdin.isatty()):  # a terminal shows what is typed
                asked = prompt.get("text") or prompt["messages"][-1]["content"]
                print(f"\n> {printable(asked)}")
            request = settings | {"seed": args.seed + i} | prompt
            record = answer(model, tokenizer, request, args.show_depth)
            if args.show_depth:
                print(f"({depth_summary(record, 'answer')}, {record['tokens_per_s']:.0f} tokens/s)")
            print(json.dumps(record), file=depth_map, flush=True)
            page.write(draw(record))
            said = [token for token in record["answer"]["ids"] if token not in tokenizer.stop_ids]
            messages.append({"role": "assistant", "content": tokenizer.decode(said)})


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last two are torch's
        sys.exit(f"sample.py: {printable(' '.join(str(error).split()))[:500]}")
    except KeyboardInterrupt:
        sys.exit(130)
