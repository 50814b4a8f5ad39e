"""Make a very small Llama in the official layout, trained from a seed.

    python tests/tiny-llama/make.py                    # this folder again, half an hour on a CPU
    python tests/tiny-llama/make.py --steps 0          # only tokenizer, rows and config

It learns six tasks whose answers differ in how much they need. Four have a rule, and no row of
their valid.jsonl is trained on. Two are tables to memorise: train and valid have all their rows.
The routers and adapters (flexidepth.safetensors) are not made here but by train.py.

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

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from flexidepth import Config, FlexiDepth, Tokenizer, read_config  # noqa: E402
from train import collate, evaluate, load_rows, print_table, tokenize  # noqa: E402

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
TRAIN_ROWS = {"phrase": 300, "repeat": 400, "copy": 800, "add": 900, "story": 800}
VALID_ROWS = 200  # of each task with a rule
BATCH_SIZE = 96
LR = 2e-3
# How often a task is drawn in the training: sums and products need the most practice.
WEIGHTS = {"phrase": 1, "repeat": 2, "copy": 3, "add": 5, "story": 3, "multiply": 5}


# ---- Rows ----------------------------------------------------------------------------------------
def sayings() -> list[list[str]]:
    return [line.split(" | ") for line in SAYINGS.strip().splitlines()]


def make_row(task: str, question: str, answer: str) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "task": task}


def question_of(row: dict) -> str:
    return row["messages"][0]["content"]


def draw(task: str, rng: random.Random) -> dict:
    """A random row of a task."""
    if task == "phrase":
        start, end = rng.choice(sayings())
        return make_row(task, f"Finish: {start}", end)
    if task == "multiply":
        a, b = rng.randint(2, 9), rng.randint(10, 99)
        return make_row(task, f"{a} * {b} =", str(a * b))
    if task == "add":
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        return make_row(task, f"{a} + {b} =", str(a + b))
    if task == "story":
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        name, things = rng.choice(NAMES), rng.choice(THINGS)
        return make_row(task, f"{name} has {a} {things} and gets {b} more.",
                        f"Now {name} has {a + b} {things}.")

    numbers = [str(rng.randint(10, 99)) for _ in range(rng.randint(3, 5))]
    if task == "repeat":
        return make_row(task, f"Repeat: {' '.join(numbers)}", " ".join(numbers))
    first = rng.randint(1, len(numbers) - 1)
    last = rng.randint(first + 1, min(first + 2, len(numbers)))
    return make_row(task, f"Copy {first} to {last}: {' '.join(numbers)}",
                    " ".join(numbers[first - 1:last]))


def whole_table(task: str) -> list[dict]:
    if task == "phrase":
        return [make_row(task, f"Finish: {start}", end) for start, end in sayings()]
    return [make_row(task, f"{a} * {b} =", str(a * b))
            for a in range(2, 10) for b in range(10, 100)]


def is_held_out_sum(row: dict) -> bool:
    """True for a tenth of all pairs of summands, spread by a multiplicative hash."""
    if row["task"] not in ("add", "story"):
        return False
    a, b = [int(word) for word in question_of(row).split() if word.isdigit()]
    return (a * 100 + b) * 2654435761 % 2**32 < 2**32 // 10


def draw_for_training(task: str, rng: random.Random, held_out: set[str]) -> dict:
    """A random row of a task that is not held out."""
    while True:
        row = draw(task, rng)
        if question_of(row) not in held_out and not is_held_out_sum(row):
            return row


def make_rows(rng: random.Random) -> tuple[list[dict], list[dict], set[str]]:
    """The rows of train and valid, and the questions that are kept out of all training."""
    valid = whole_table("phrase") + whole_table("multiply")
    held_out = set()
    for task in ("repeat", "copy", "add", "story"):
        count = 0
        while count < VALID_ROWS:
            row = draw(task, rng)
            fit = task in ("repeat", "copy") or is_held_out_sum(row)
            if fit and question_of(row) not in held_out:
                held_out.add(question_of(row))
                valid.append(row)
                count += 1

    train = whole_table("multiply")
    for task, count in TRAIN_ROWS.items():
        train += [draw_for_training(task, rng, held_out) for _ in range(count)]
    return train, valid, held_out


# ---- Files ---------------------------------------------------------------------------------------
def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tokenizer(file: Path) -> None:
    """256 bytes, then whole words: tiktoken takes a word that has a rank as one token."""
    words = {"user", "assistant", "system", "\n\n", "Finish", "Repeat", "Copy", "Now", " to",
             " has", " and", " gets", " more", " +", " *", " ="}
    words.update(NAMES)
    words.update(f" {word}" for word in NAMES + THINGS)
    for start, end in sayings():
        words.update(f" {word}" for word in start.split() + end.split())
        words.add(end.split()[0])
    tokens = [bytes([b]) for b in range(256)]
    tokens += [word.encode() for word in sorted(words) if len(word) > 1]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    file.write_text("".join(lines))


def write_config(file: Path, tokenizer: Tokenizer) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": tokenizer.vocab_size, "hidden_size": 96, "intermediate_size": 192,
        "num_hidden_layers": 12, "num_attention_heads": 6, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
        "torch_dtype": "float32", "bos_token_id": tokenizer.special["<|begin_of_text|>"],
        "eos_token_id": tokenizer.special["<|eot_id|>"]}
    file.write_text(json.dumps(config, indent=2) + "\n")


# ---- Training ------------------------------------------------------------------------------------
def new_base(config: Config) -> tuple[FlexiDepth, dict[str, torch.Tensor]]:
    """A model with random weights, and the parameters of its base by name, to be trained."""
    model = FlexiDepth(config)
    base = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:  # of the base, not of a router or adapter
            base[name] = p.requires_grad_(True)
            if p.ndim == 2:
                std = p.shape[1] ** -0.5
                # Two matrices a layer write to the residual stream. They start small.
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std *= (2 * config.num_hidden_layers) ** -0.5
                torch.nn.init.normal_(p, std=std)
    return model, base


def train_base(folder: Path, steps: int, tokenizer: Tokenizer, held_out: set[str]) -> FlexiDepth:
    model, base = new_base(read_config(folder / "config.json"))
    print(f"{sum(p.numel() for p in base.values()):,} parameters", flush=True)
    matrices = [p for p in base.values() if p.ndim == 2]
    norms = [p for p in base.values() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=LR, betas=(0.9, 0.98))
    rng = random.Random(1)
    started = time.time()
    for step in range(steps):
        # The rate goes down to a quarter, not to zero. A base that is driven to no loss at all
        # hangs on each of its layers: gates that skip a quarter of them then lose 2 % of the
        # answers in place of none.
        decay = (5 + 3 * math.cos(math.pi * step / steps)) / 8
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / 200) * decay

        tasks = rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=BATCH_SIZE)
        rows = [draw_for_training(task, rng, held_out) for task in tasks]
        batch = [tokenize(row, tokenizer, answers_only=True) for row in rows]
        input_ids, targets, _ = collate(batch, "cpu")
        logits = model(input_ids, route="full").logits                            # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(base.values(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == steps:
            print(f"step {step}  loss {loss.item():.4f}  {time.time() - started:.0f} s", flush=True)

    tensors = {name: p.detach() for name, p in base.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=HERE, help="folder to write (default: the one of this script)")
    add("--steps", type=int, default=2000, help="of the training; 0: no model.safetensors")
    args = parser.parse_args()

    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    train, valid, held_out = make_rows(random.Random(0))
    write_rows(args.out / "train.jsonl", train)
    write_rows(args.out / "valid.jsonl", valid)
    write_tokenizer(args.out / "tokenizer.model")
    tokenizer = Tokenizer.from_pretrained(args.out)
    write_config(args.out / "config.json", tokenizer)
    if args.steps > 0:
        model = train_base(args.out, args.steps, tokenizer, held_out)
        settings = argparse.Namespace(
            seq_len=256, answers_only=True, micro_batch_size=128, device="cpu")
        rows = load_rows(args.out / "valid.jsonl", tokenizer, settings)
        print_table(evaluate(model, rows, settings), model.config.num_hidden_layers)


if __name__ == "__main__":
    main()
