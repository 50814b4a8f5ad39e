"""Which tokens use many layers? Means over a depth map, by kind of token, by task and by depth.

    python sample.py --prompt-file tests/tiny-llama/valid.jsonl --depth-map depth.jsonl
    python tests/paper/depth_by_kind.py depth.jsonl

A token of a prompt has the depth of the position that read it, and one of an answer that of the
position that predicted it. The share is of all tokens of the prompts, or of the answers. A token
"repeats" if the same token stood after the same one before, in this prompt or answer.
"""
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator

KINDS = ["special token", "role of a speaker", "part of a character", "white space", "punctuation",
         "digits", "start of a sentence", "start of a word", "rest of a word"]
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


def groups_of(record: dict) -> Iterator[tuple[str, str, int]]:
    """Of a record of a depth map: "prompt" or "answer", a group and the depth, for each token and
    each group that it is in."""
    prompt, answer = record["prompt"], record["answer"]
    kinds = list(kinds_of(prompt["texts"] + answer["texts"]))
    seen = set()
    last = None
    for name, part in (("prompt", prompt), ("answer", answer)):
        of_part = kinds[:len(part["ids"])]
        kinds = kinds[len(part["ids"]):]
        for token, depth, kind in zip(part["ids"], part["layers"], of_part, strict=True):
            yield name, kind, depth
            if (last, token) in seen:
                yield name, "repeats", depth
            seen.add((last, token))
            last = token
            if "task" in record:
                yield name, f"task {record['task']}", depth
            yield name, f"{depth:2} layers", depth
            yield name, "all tokens", depth


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    tokens, layers = Counter(), Counter()  # (name, group) -> tokens, and the sum of their depths
    with open(sys.argv[1], encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                if record["version"] != 1:
                    raise ValueError(f"version {record['version']}")
                for name, group, depth in groups_of(record):
                    tokens[name, group] += 1
                    layers[name, group] += depth
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"line {number}: expected a record of sample.py --depth-map "
                                 f"({error!r})") from None
    if not tokens:
        raise ValueError("no records in it")

    def order(group: str) -> tuple:
        """Kinds, repeats, tasks, depths, all; kinds and tasks by their depth in answers."""
        section = 0 if group in KINDS else 2
        section = {"repeats": 1, "all tokens": 4}.get(group, section)
        if re.fullmatch(r"[ \d]\d layers", group):
            section = 3
        name = "answer" if tokens["answer", group] else "prompt"
        return section, layers[name, group] / tokens[name, group]

    print(f"{'':24}{'answer: tokens':>16}{'share':>8}{'layers':>8}"
          f"{'prompt: tokens':>18}{'share':>8}{'layers':>8}")
    for group in sorted({group for _, group in tokens}, key=order):
        cells = ""
        for name, width in (("answer", 16), ("prompt", 18)):
            count = tokens[name, group]
            share, mean = "", ""
            if count:
                share = f"{count / tokens[name, 'all tokens']:.1%}"
                mean = f"{layers[name, group] / count:.2f}"
            cells += f"{count:>{width},}{share:>8}{mean:>8}"
        print(f"{repr(group)[1:-1]:24.24}{cells}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"depth_by_kind.py: {sys.argv[1]}: {error}")
