"""Which tokens use many layers, and which layers do they skip? Means over a depth map.

    python sample.py --prompt-file tests/tiny-llama/valid.jsonl --depth-map depth.jsonl
    python tests/paper/depth_by_kind.py depth.jsonl

A token of a prompt has the depth of the position that read it, and one of an answer that of the
position that predicted it. The share is of all tokens of the prompts, or of the answers. A token
"repeats" if the same token stood after the same one before, in this prompt or answer.

A second table has the share of tokens that keeps each routed layer. If a few layers are shut for
all tokens and the others open, the router has pruned the model, and depth does not adapt. The last
line tells: it is the share of the decisions' variance that the layer alone explains, 100 % in that
case, and 0 % if every layer is kept as often as every other.
"""
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from statistics import fmean, pvariance

SPECIAL = re.compile(r"<\|\w+\|>")
HEADERS = ("<|start_header_id|>", "<|im_start|>")  # the role of a speaker follows
# What stands before the first word of a sentence: nothing, a line's end, or the last sentence's
# end and a blank. Quotation marks and brackets may be in between.
SENTENCE = re.compile(r"""(?:^|\n|[.!?]["'”’)\]]*\s|[。！？])\s*["'“‘(\[]*$""")
WINDOW = 40  # characters before a token that its kind is told by


def kind_of(token: str | list[int], before: str) -> str:
    """The kind of a token; a list of bytes is part of a character. before: the text before it,
    from the last special token on."""
    if isinstance(token, list):
        return "part of a character"
    if SPECIAL.fullmatch(token):
        return "special token"
    if not token.strip():
        return "white space"
    if token.strip().isdigit():
        return "digits"
    if not any(character.isalnum() for character in token):
        return "punctuation"
    blanks = token[:len(token) - len(token.lstrip())]
    if SENTENCE.search(before + blanks):
        return "start of a sentence"
    if before[-1:].isalpha() and (token[0].isalpha() or token[0] in "'’"):
        return "rest of a word"
    return "start of a word"


def kinds_of(tokens: list[str | list[int]]) -> Iterator[str]:
    """The kind of each token of a text."""
    before = ""
    in_header = False
    for token in tokens:
        kind = kind_of(token, before)
        if kind == "special token":
            in_header = token in HEADERS
            before = ""
        else:
            before += token if isinstance(token, str) else "\N{REPLACEMENT CHARACTER}"
            before = before[-WINDOW:]
            if in_header and "\n" in before:  # in ChatML a line end ends the header
                in_header = False
            elif in_header:
                kind = "role of a speaker"
        yield kind


def groups_of(record: dict) -> Iterator[tuple[str, int, str, int]]:
    """Of a record of a depth map: "prompt" or "answer", a section of the table, a group and the
    depth, for each token and each group that it is in."""
    kinds = kinds_of(record["prompt"]["texts"] + record["answer"]["texts"])
    seen = set()
    last = None
    for name in ("prompt", "answer"):
        for token, depth in zip(record[name]["ids"], record[name]["layers"], strict=True):
            yield name, 0, next(kinds), depth
            if (last, token) in seen:
                yield name, 1, "repeats", depth
            seen.add((last, token))
            last = token
            if "task" in record:
                yield name, 2, f"task {record['task']}", depth
            yield name, 3, f"{depth:2} layers", depth
            yield name, 4, "all tokens", depth


def explained_by_layer(shares: list[float]) -> float:
    """The share of the decisions' variance that lies between layers, of the shares of tokens that
    keep each layer. NaN if all tokens keep all layers, or none."""
    mean = fmean(shares)
    return pvariance(shares) / (mean * (1 - mean)) if 0 < mean < 1 else math.nan


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    depths = {"answer": defaultdict(list), "prompt": defaultdict(list)}  # of each section and group
    kept = {"answer": Counter(), "prompt": Counter()}  # tokens that keep each routed layer
    with open(sys.argv[1], encoding="utf-8") as file:
        for record in map(json.loads, file):
            for name, section, group, depth in groups_of(record):
                depths[name][section, group].append(depth)
            for name, counts in kept.items():
                for decision in record[name]["decisions"]:
                    for layer, digit in zip(record["routing_layers"], decision, strict=True):
                        counts[layer] += int(digit)

    def order(group: tuple[int, str]) -> tuple[int, float]:
        """By section, and then by depth in answers, or in prompts."""
        return group[0], fmean(depths["answer"].get(group) or depths["prompt"][group])

    total = {name: len(groups[4, "all tokens"]) for name, groups in depths.items()}
    print(f"{'':24}{'answer: tokens':>16}{'share':>8}{'layers':>8}"
          f"{'prompt: tokens':>18}{'share':>8}{'layers':>8}")
    for section, group in sorted(depths["answer"].keys() | depths["prompt"], key=order):
        cells = ""
        for name, width in (("answer", 16), ("prompt", 18)):
            found = depths[name].get((section, group), [])
            share = len(found) / total[name]
            means = f"{share:>8.1%}{fmean(found):>8.2f}" if found else " " * 16
            cells += f"{len(found):>{width},}{means}"
        print(f"{repr(group)[1:-1]:24.24}{cells}".rstrip())

    routed = sorted(kept["answer"])
    if routed:  # with route="full" there is none
        shares = [[kept[name][layer] / total[name] for layer in routed] for name in kept]
        lines = [(f"layer {layer} kept", *both) for layer, *both in zip(routed, *shares)]
        lines.append(("explained by the layer", *map(explained_by_layer, shares)))
        print(f"\n{'':24}{'answer':>16}{'prompt':>18}")
        for what, answer, prompt in lines:
            print(f"{what:24}{answer:>16.1%}{prompt:>18.1%}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"depth_by_kind.py: {sys.argv[1]}: not a file of sample.py --depth-map ({error!r})")
