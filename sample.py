"""Generate text, and see how many layers each token took.

    python sample.py --show-depth                                # the tiny Llama of tests/
    python sample.py --show-depth --table --prompt "37 + 48 ="   # a row a token, with a bar
    python sample.py --route full                                # the pre-trained model, all layers
    python sample.py --model meta-llama/Llama-3.2-1B-Instruct --flexidepth out --chat

A prompt is the user's message of a chat; with --raw it is text to be continued. Routers and adapters
are those of --flexidepth, or what train.py left in out/ for this model, or those in the model's own folder.
"""
import argparse
import codecs
import json
import os
import re
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import torch

from flexidepth import Config, FlexiDepth, Tokenizer, generate

TINY = Path(__file__).resolve().parent / "tests" / "tiny-llama"
EXAMPLES = ["Finish: the early bird", "Repeat: 47 12 85", "Copy 2 to 3: 31 58 64 90", "38 + 47 =",
            "Tom has 38 figs and gets 47 more.", "7 * 58 ="]
# 256-colour codes from light to dark: an order that the colour-blind can read too.
SHADES = (195, 159, 117, 75, 33, 26, 19)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("--model", default=os.path.relpath(TINY), help="folder of a Llama, or a hub name in the local cache")
    add("--flexidepth", type=Path, help="folder or file of trained routers and adapters")
    add("--prompt", action="append", help="what to ask; may be given several times")
    add("--prompt-file", type=Path, help="a text file with a prompt a line")
    add("--chat", action="store_true", help="read messages from the terminal, and remember them")
    add("--raw", action="store_true", help="continue the prompt as plain text, without chat format")
    add("--show-depth", action="store_true", help="show how many layers each token used")
    add("--table", action="store_true", help="show depth as a row a token too, with a bar")
    add("--max-new-tokens", type=int, default=200, help="at most so many tokens an answer (200)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this mass (1)")
    add("--seed", type=int, default=0, help="of the drawing (0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's own")
    add("--threshold", type=float, default=0.5, help="a gate is open above it (0.5); more skips more")
    add("--route", choices=["learned", "full"], default="learned", help="full: the pre-trained model")
    args = parser.parse_args()
    args.show_depth |= args.table
    if args.max_new_tokens < 1:
        fail(f"--max-new-tokens is {args.max_new_tokens}; expected at least 1")
    if not (args.device == "cpu" or re.fullmatch(r"cuda(:\d+)?", args.device) and torch.cuda.is_available()):
        fail(f"--device {args.device}: not found by torch; expected cpu, or cuda where there is a GPU")
    return args


def fail(message: str):
    """One line and exit status 2, as for every error that the user can mend."""
    print(f"sample.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def load(args: argparse.Namespace) -> FlexiDepth:
    """The model with the routers and adapters given, or last trained for it, or that came with it."""
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.route == "full":
        print(f"{args.model}, all layers for every token")
        return FlexiDepth.from_pretrained(args.model, device=args.device, dtype=dtype)
    flexidepth, record = args.flexidepth or args.model, Path("out", "train.json")
    if args.flexidepth is None and record.is_file():
        trained_for = str(json.loads(record.read_text()).get("settings", {}).get("model"))
        if trained_for == args.model or Path(trained_for).resolve() == Path(args.model).resolve():
            flexidepth = record.parent
    try:
        model = FlexiDepth.from_pretrained(args.model, flexidepth, device=args.device, dtype=dtype)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; train.py makes routers and adapters, --route full needs none") from None
    model.config.threshold = args.threshold
    print(f"{args.model}, routers and adapters of {flexidepth}")
    return model


def printable(text: str) -> str:
    """Text that can't steer the terminal: control and format characters but newline and tab escaped."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else
                   c.encode("unicode_escape").decode() for c in text)


class Printer:
    """Writes tokens as they come: coloured by depth or, in plain text, each with its depth behind it."""

    def __init__(self, tokenizer: Tokenizer, config: Config, show_depth: bool):
        self.tokenizer, self.show_depth, self.layers = tokenizer, show_depth, config.num_hidden_layers
        self.least = self.layers - len(config.routing_layers)
        self.colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back half a character

    def shade(self, text: str, depth: int) -> str:
        step = (depth - self.least) * (len(SHADES) - 1) // max(1, self.layers - self.least)
        ink = 16 if step < 4 else 231  # black on the light ones, white on the dark
        return f"\033[48;5;{SHADES[step]};38;5;{ink}m{text}\033[0m" if text else ""

    def write(self, token: int, depth: int) -> str:
        """Print what a token adds to the text, and return it."""
        if token in self.tokenizer.stop_ids:
            text = self.tokenizer.decode([token]) if self.show_depth else ""
        else:
            text = printable(self.decoder.decode(self.tokenizer.encoding.decode_single_token_bytes(token)))
        if not self.show_depth:
            shown = text
        elif self.colour:  # no colour over a line's end, or the terminal paints the rest of the line
            shown = "\n".join(self.shade(line, depth) for line in text.split("\n"))
        else:
            shown = f"{text}[{depth}]"
        print(shown, end="", flush=True)
        return text

    def legend(self) -> str:
        if not self.colour:
            return f"layers used: the number behind each token, {self.least} to {self.layers}"
        return "layers used: " + " ".join(self.shade(f" {d} ", d) for d in range(self.least, self.layers + 1))


def answer(model: FlexiDepth, tokenizer: Tokenizer, ids: list[int], args: argparse.Namespace,
           generator: torch.Generator) -> str:
    """Generate from token ids, printing as it goes. Returns the text of the answer."""
    printer, layers, tokens = Printer(tokenizer, model.config, args.show_depth), model.config.num_hidden_layers, []
    started = time.time()
    for token, depth in generate(model, torch.tensor([ids]), args.max_new_tokens, args.temperature,
                                 args.top_p, generator, tokenizer.stop_ids, args.route):
        tokens.append((token, depth, printer.write(token, depth)))
    seconds = time.time() - started
    print(printer.decoder.decode(b"", final=True))  # U+FFFD, if it ends within a character
    if args.show_depth:
        for _, depth, text in tokens if args.table else ():
            print(f"{depth:4d} {'#' * depth}{'.' * (layers - depth)} {text!r}")
        mean = sum(depth for _, depth, _ in tokens) / len(tokens)
        print(f"({len(tokens)} tokens, {mean:.2f} of {layers} layers on average, {len(tokens) / seconds:.0f} tokens/s)")
    return tokenizer.decode(token for token, _, _ in tokens if token not in tokenizer.stop_ids)


def read_prompts(args: argparse.Namespace) -> Iterator[str]:
    """The prompts asked for, or the examples; with --chat those of the user, as they come."""
    given = args.prompt or []
    if args.prompt_file:
        given += [line for line in args.prompt_file.read_text(encoding="utf-8").split("\n") if line.strip()]
    if args.prompt_file and not given:
        raise ValueError(f"{args.prompt_file}: no prompt in it")
    yield from given or (EXAMPLES if not args.chat else [])
    while args.chat:
        if sys.stdin.isatty():
            print("\nyou: ", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line


def run(args: argparse.Namespace) -> None:
    tokenizer, model = Tokenizer.from_pretrained(args.model), load(args)
    if args.show_depth:
        print(Printer(tokenizer, model.config, True).legend())
    generator, messages = torch.Generator().manual_seed(args.seed), []
    for prompt in read_prompts(args):
        if not prompt.strip():
            raise ValueError("an empty prompt; give it some text")
        messages = (messages if args.chat else []) + [{"role": "user", "content": prompt}]
        ids = (tokenizer.encode(prompt, bos=True) if args.raw else
               tokenizer.encode_chat(messages, add_generation_prompt=True))
        print(f"\n> {printable(prompt.strip())}")
        messages += [{"role": "assistant", "content": answer(model, tokenizer, ids, args, generator)}]


def main() -> None:
    args = parse_args()
    try:
        run(args)
    except BrokenPipeError:  # as of `| head`: nobody reads on, not even what is still to be flushed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
