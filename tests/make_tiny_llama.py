"""Make tests/tiny-llama: a very small real Llama in the official layout, trained from a seed.

    python tests/make_tiny_llama.py                     # half an hour on a CPU
    python tests/make_tiny_llama.py --steps 0           # only tokenizer, rows and config
    python tests/make_tiny_llama.py --layers 8 --hidden-size 48 --out /tmp/smaller

Six tasks whose answers differ in how much they need. Of those with a rule, the rows of valid.jsonl are
kept out of the training; those that are tables to be memorised are trained and validated on all of it.

    phrase      the end of a saying                        a table
    repeat      a list of numbers                          held out
    copy        part of a list, by position                held out
    add         two numbers of two digits                  held out, also from story
    story       the same sum in a sentence                 held out, also from add
    multiply    a one-digit by a two-digit number          a table
"""
import argparse
import base64
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flexidepth import TRAINED, Config, FlexiDepth, Tokenizer  # noqa: E402
from train import collate, evaluate, tokenize  # noqa: E402

SAYINGS = """
better late | than never
the early bird | catches the worm
practice | makes perfect
time | is money
silence | is golden
knowledge | is power
a stitch in time | saves nine
actions speak | louder than words
birds of a feather | flock together
all that glitters | is not gold
where there is smoke | there is fire
when in Rome | do as the Romans do
the pen is mightier | than the sword
too many cooks | spoil the broth
look before | you leap
out of sight | out of mind
two wrongs | do not make a right
a watched pot | never boils
honesty | is the best policy
the grass is greener | on the other side
every cloud | has a silver lining
easy come | easy go
no pain | no gain
haste | makes waste
like father | like son
still waters | run deep
the more | the merrier
beggars | can not be choosers
fortune | favours the bold
an apple a day | keeps the doctor away
old habits | die hard
many hands | make light work
"""
NAMES = ["Tom", "Ann", "Max", "Eva", "Sam", "Mia"]
THINGS = ["figs", "pens", "eggs", "hats", "nuts", "cups"]
# How often a task is drawn while the base is trained: sums and products need the most practice.
DRAWN = {"phrase": 1, "repeat": 2, "copy": 3, "add": 5, "story": 3, "multiply": 5}


def sayings() -> list[list[str]]:
    return [line.split(" | ") for line in SAYINGS.strip().splitlines()]


def row(task: str, question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer}], "task": task}


def draw(task: str, rng: random.Random) -> dict:
    """A random row of a task."""
    if task == "phrase":
        start, end = rng.choice(sayings())
        return row(task, f"Finish: {start}", end)
    if task == "multiply":
        a, b = rng.randint(2, 9), rng.randint(10, 99)
        return row(task, f"{a} * {b} =", str(a * b))
    if task in ("add", "story"):
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if task == "add":
            return row(task, f"{a} + {b} =", str(a + b))
        name, things = rng.choice(NAMES), rng.choice(THINGS)
        return row(task, f"{name} has {a} {things} and gets {b} more.", f"Now {name} has {a + b} {things}.")
    numbers = [str(rng.randint(10, 99)) for _ in range(rng.randint(3, 5))]
    if task == "repeat":
        return row(task, f"Repeat: {' '.join(numbers)}", " ".join(numbers))
    first = rng.randint(1, len(numbers) - 1)
    last = rng.randint(first + 1, min(first + 2, len(numbers)))
    return row(task, f"Copy {first} to {last}: {' '.join(numbers)}", " ".join(numbers[first - 1:last]))


def table(task: str) -> list[dict]:
    if task == "phrase":
        return [row(task, f"Finish: {start}", end) for start, end in sayings()]
    return [row(task, f"{a} * {b} =", str(a * b)) for a in range(2, 10) for b in range(10, 100)]


def held_out_sum(line: dict) -> bool:
    """A tenth of all pairs of summands, spread by a multiplicative hash."""
    a, b = (int(word) for word in line["messages"][0]["content"].split() if word.isdigit())
    return (a * 100 + b) * 2654435761 % 2**32 < 2**32 // 10


def make_rows(rng: random.Random, per_task: int = 200) -> tuple[list[dict], list[dict]]:
    """(train, valid) rows. No row of valid is in train, nor drawn for the base, but those of tables."""
    valid, seen = table("phrase") + table("multiply"), set()
    for task in ("repeat", "copy", "add", "story"):
        rows = []
        while len(rows) < per_task:
            line = draw(task, rng)
            if line["messages"][0]["content"] not in seen and (
                    task in ("repeat", "copy") or held_out_sum(line)):
                seen.add(line["messages"][0]["content"])
                rows.append(line)
        valid += rows
    counts = {"phrase": 300, "repeat": 400, "copy": 800, "add": 900, "story": 800}
    train = table("multiply") + [draw_for_training(rng, task, seen)
                                 for task, count in counts.items() for _ in range(count)]
    return train, valid


def draw_for_training(rng: random.Random, task: str, held_out: set[str]) -> dict:
    while True:
        line = draw(task, rng)
        if line["messages"][0]["content"] not in held_out and not (
                task in ("add", "story") and held_out_sum(line)):
            return line


def write_tokenizer(file: Path):
    """256 bytes, then whole words: tiktoken takes a word that has a rank as one token."""
    text = [word for pair in sayings() for part in pair for word in part.split()]
    words = {"user", "assistant", "system", "\n\n", "Finish", "Repeat", "Copy", "Now", " to", " has", " and",
             " gets", " more", " +", " *", " =", *NAMES, *(f" {name}" for name in NAMES),
             *(f" {thing}" for thing in THINGS), *(f" {word}" for word in text),
             *(pair[1].split()[0] for pair in sayings())}
    ranks = [bytes([b]) for b in range(256)] + [word.encode() for word in sorted(words) if len(word) > 1]
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-llama")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden-size", type=int, default=96, help="a multiple of 48")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=96, help="rows a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    train, valid = make_rows(random.Random(args.seed))
    for name, rows in (("train", train), ("valid", valid)):
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    write_tokenizer(args.out / "tokenizer.model")
    (args.out / "config.json").write_text("{}")
    tokenizer = Tokenizer.from_pretrained(args.out)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": tokenizer.encoding.n_vocab, "hidden_size": args.hidden_size,
        "intermediate_size": 2 * args.hidden_size, "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden_size // 16, "num_key_value_heads": args.hidden_size // 48,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "torch_dtype": "float32",
        "bos_token_id": tokenizer.special["<|begin_of_text|>"],
        "eos_token_id": tokenizer.special["<|eot_id|>"],
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if not args.steps:
        return

    model = FlexiDepth(Config.from_json(args.out / "config.json")).requires_grad_(True)
    base = {name: p for name, p in model.named_parameters() if not TRAINED.match(name)}
    for name, p in base.items():
        if p.ndim == 2:  # outputs into the residual stream start small, as there are 2L of them
            small = (2 * args.layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            torch.nn.init.normal_(p, std=small * p.shape[1] ** -0.5)
    print(f"{sum(p.numel() for p in base.values()):,} parameters, {len(train)} + {len(valid)} rows", flush=True)
    groups = [{"params": [p for p in base.values() if p.ndim == dim], "weight_decay": decay}
              for dim, decay in ((2, 0.1), (1, 0.0))]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    held_out = {line["messages"][0]["content"] for line in valid if line["task"] in ("repeat", "copy")}
    rng = random.Random(args.seed + 1)
    tasks, weights, started = list(DRAWN), list(DRAWN.values()), time.time()
    for step in range(args.steps):
        # Down to a quarter, not to zero: a base that is driven to no loss at all hangs on each of its
        # layers, and gates that skip a quarter of them then lose 2 % of the answers in place of none.
        lr = args.lr * min(1, (step + 1) / 200) * (5 + 3 * math.cos(math.pi * step / args.steps)) / 8
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = [draw_for_training(rng, task, held_out) for task in rng.choices(tasks, weights, k=args.rows)]
        inputs, targets, _ = collate([tokenize(line, tokenizer, answers_only=True) for line in rows], "cpu")
        loss = F.cross_entropy(model(inputs, route="full").logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(base.values(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == args.steps:
            print(f"step {step}  loss {loss.item():.4f}  {time.time() - started:.0f} s", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            figures = evaluate(model, [tokenize(line, tokenizer, answers_only=True) for line in valid], 128, "cpu")
            print("exact match", {k: round(v["base_exact"], 3) for k, v in figures.items()}, flush=True)
            save_file({name: p.detach() for name, p in base.items()}, args.out / "model.safetensors",
                      metadata={"format": "pt"})


if __name__ == "__main__":
    main()
