"""Train the routers and adapters of a Llama; the Llama itself stays as it is.

    python train.py                                       # the tiny Llama of tests/, under two minutes
    python train.py --alpha 1e-3 --out deep-cut           # a higher price for every layer used
    python train.py --model meta-llama/Meta-Llama-3-8B-Instruct --data tulu.jsonl --valid held-out.jsonl

Data is JSONL: {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]} or
{"text": ...} a line, with any "task" to tell rows apart in the table at the end. The folder --out gets
flexidepth.safetensors, which sample.py and FlexiDepth.from_pretrained(model, flexidepth=out) take, and
train.json, the settings and results.
"""
import argparse
import json
import math
import os
import re
import shutil
import sys
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flexidepth import TRAINED, FlexiDepth, Tokenizer, layers_used, skip_loss

TINY = Path(__file__).resolve().parent / "tests" / "tiny-llama"
ROLES = ("system", "user", "assistant")
# What is not given on the command line: the paper's recipe, or that of the tiny Llama.
PAPER = {"alpha": 1e-3, "lr": 1e-4, "batch_size": 64, "seq_len": 2048, "epochs": 3, "micro_batch_size": 1}
TINY_RECIPE = {"alpha": 3.5e-4, "lr": 5e-3, "batch_size": 32, "seq_len": 256, "steps": 900, "micro_batch_size": 32}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail

    def add(flag, type, default, text):
        parser.add_argument(flag, type=type, default=default, help=text)
    add("--model", str, os.path.relpath(TINY), "folder of the pre-trained Llama, or a hub name in the local cache")
    add("--data", Path, None, "training rows, JSONL (default: the model folder's train.jsonl)")
    add("--valid", Path, None, "held-out rows for the table (default: the model folder's valid.jsonl)")
    add("--out", Path, Path("out"), "folder for the result (default: out)")
    add("--flexidepth", Path, None, "start from these routers and adapters, not from random ones")
    add("--alpha", float, None, "price of depth, the weight of L_skip (paper: 1e-3; tiny Llama: 3.5e-4)")
    add("--lr", float, None, "peak learning rate (paper: 1e-4; tiny Llama: 5e-3)")
    add("--epochs", float, None, "passes over the data (paper: 3)")
    add("--steps", int, None, "optimiser steps, instead of epochs (tiny Llama: 900)")
    add("--batch-size", int, None, "rows a step (paper: 64; tiny Llama: 32)")
    add("--micro-batch-size", int, None, "rows on the device at a time (1; tiny Llama: 32)")
    add("--seq-len", int, None, "rows with more tokens are left out (default: 2048 or the context)")
    add("--device", str, "cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, ...")
    add("--seed", int, 0, "of the routers' and adapters' start and the order of the rows")
    parser.add_argument("--answers-only", action=argparse.BooleanOptionalAction,
                        help="language-model loss on assistant tokens alone (default: only for the tiny Llama)")
    args = parser.parse_args()
    tiny = Path(args.model).resolve() == TINY
    recipe = dict(TINY_RECIPE if tiny else PAPER)
    if args.epochs is not None or args.steps is not None:
        recipe.pop("steps", None), recipe.pop("epochs", None)
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.answers_only = tiny if args.answers_only is None else args.answers_only
    for name in ("lr", "epochs", "steps", "batch_size", "micro_batch_size", "seq_len"):
        if (value := getattr(args, name)) is not None and not value > 0:
            fail(f"--{name.replace('_', '-')} is {value}; expected more than 0")
    if not args.alpha >= 0:
        fail(f"--alpha is {args.alpha}; expected 0 or more")
    if not (args.device == "cpu" or re.fullmatch(r"cuda(:\d+)?", args.device) and torch.cuda.is_available()):
        fail(f"--device {args.device}: not found by torch; expected cpu, or cuda where there is a GPU")
    return args


def fail(message: str):
    """One line and exit status 2, as for every error that the user can mend."""
    print(f"train.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


@dataclass
class Row:
    ids: list[int]
    counted: list[bool]  # where a token counts in the language-model loss
    task: str


def read_rows(file: Path, tokenizer: Tokenizer, seq_len: int, answers_only: bool) -> list[Row]:
    """Tokenised rows of a JSONL file. ValueError gives file and line of a broken one."""
    rows, dropped = [], 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = tokenize(json.loads(line), tokenizer, answers_only)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{file}: line {number}: expected {{\"messages\": [{{\"role\": ..., \"content\": "
                                 f"...}}, ...]}} or {{\"text\": ...}}, found {line[:60]!r} ({error!r})") from None
            if len(row.ids) > seq_len:
                dropped += 1
            elif any(row.counted[1:]):  # else there is nothing to learn from it
                rows.append(row)
    if not rows:
        raise ValueError(f"{file}: no row to use ({dropped} have more than --seq-len {seq_len} tokens)")
    if dropped:
        print(f"{file}: {dropped} of {dropped + len(rows)} rows have more than {seq_len} tokens, left out")
    return rows


def tokenize(raw: dict, tokenizer: Tokenizer, answers_only: bool) -> Row:
    """A row of JSON as tokens; of a conversation all tokens count, or those of the answers."""
    task = str(raw.get("task", "all"))
    if "text" in raw:
        ids = tokenizer.encode(raw["text"], bos=True, eos=True)
        return Row(ids, [True] * len(ids), task)
    messages = raw["messages"]
    ids = tokenizer.encode_chat(messages)
    counted = [not answers_only] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] not in ROLES or not isinstance(message["content"], str):
            raise ValueError(f"unknown role {message['role']!r}, or content that is no text")
        if message["role"] == "assistant":
            start = len(tokenizer.encode_chat(messages[:i], add_generation_prompt=True))
            end = len(tokenizer.encode_chat(messages[:i + 1]))
            counted[start:end] = [True] * (end - start)
    return Row(ids, counted, task)


def collate(rows: list[Row], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids and targets (B, T), -100 where no loss is due, and real (B, T), False at padding."""
    length = max(len(row.ids) for row in rows) - 1
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    targets = torch.full((len(rows), length), -100)
    real = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids, counted = torch.tensor(row.ids), torch.tensor(row.counted)
        input_ids[i, :len(ids) - 1] = ids[:-1]
        targets[i, :len(ids) - 1] = torch.where(counted, ids, -100)[1:]
        real[i, :len(ids) - 1] = True
    return input_ids.to(device), targets.to(device), real.to(device)


def train(model: FlexiDepth, rows: list[Row], args: argparse.Namespace) -> None:
    """Adam on routers and adapters; the base neither learns nor changes. Ctrl-C ends it early."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.999), weight_decay=0.0)
    steps = args.steps or math.ceil(args.epochs * len(rows) / args.batch_size)
    generator = torch.Generator().manual_seed(args.seed)
    layers, order, tokens, started = model.config.num_hidden_layers, [], 0, time.time()
    with suppress(KeyboardInterrupt):
        for step in range(1, steps + 1):
            while len(order) < args.batch_size:
                order += torch.randperm(len(rows), generator=generator).tolist()
            batch, order = [rows[i] for i in order[:args.batch_size]], order[args.batch_size:]
            # Warm-up over 3 % of the steps, then a cosine to zero.
            lr = args.lr * min(step / (0.03 * steps), (1 + math.cos(math.pi * (step - 1) / steps)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            lm, skip, depth = backward(model, batch, args)
            optimizer.step()
            tokens, seconds = tokens + sum(len(row.ids) for row in batch), time.time() - started
            progress(step, steps, f"loss {lm:.4f}  skip loss {skip:6.3f}  layers used {depth:5.2f} of {layers}  "
                     f"{tokens / seconds:,.0f} tokens/s  {seconds / step * (steps - step):.0f} s left")
    print()


def backward(model: FlexiDepth, batch: list[Row], args: argparse.Namespace) -> tuple[float, float, float]:
    """Gradients of L = alpha * L_skip + L_lm over a batch. Returns L_lm, L_skip, mean layers used.

    Both losses are means over the tokens of the whole batch, in however many parts it is run.
    """
    batch = sorted(batch, key=lambda row: len(row.ids))  # rows of one length need no padding
    real_tokens = sum(len(row.ids) - 1 for row in batch)
    counted_tokens = sum(sum(row.counted[1:]) for row in batch)
    sums = torch.zeros(3)
    for start in range(0, len(batch), args.micro_batch_size):
        input_ids, targets, real = collate(batch[start:start + args.micro_batch_size], args.device)
        counted = targets != -100
        with autocast(model):
            x, gates, kept = model.hidden_states(input_ids)
            logits = model.head(x[counted])
        lm = F.cross_entropy(logits.float(), targets[counted], reduction="sum") / counted_tokens   # L_lm
        skip = skip_loss(gates, real) * real.sum() / real_tokens                  # L_skip
        (args.alpha * skip + lm).backward()
        depth = layers_used(kept, model.config)[real].sum() / real_tokens
        sums += torch.stack([lm.detach(), skip.detach(), depth]).cpu()
    return tuple(sums.tolist())


def autocast(model: FlexiDepth) -> torch.autocast:
    """Compute in the base's dtype where the trained parts, in float32, meet it."""
    weight = model.model["embed_tokens"].weight
    return torch.autocast(weight.device.type, weight.dtype, enabled=weight.dtype != torch.float32)


def progress(step: int, steps: int, text: str) -> None:
    """A line that stays in place on a terminal, and is printed now and then elsewhere."""
    line = f"step {step}/{steps}  {text}"
    if sys.stdout.isatty():  # cut to the width, as a line that wraps can't be overwritten
        print(f"\r{line[:shutil.get_terminal_size().columns - 1]}\033[K", end="", flush=True)
    elif step % max(1, steps // 20) == 0 or step in (1, steps):
        print(line, flush=True)


@torch.no_grad()
def evaluate(model: FlexiDepth, rows: list[Row], batch_size: int, device: str) -> dict[str, dict[str, float]]:
    """By task: rows, exact match and loss of base and FlexiDepth, mean layers used, of counted tokens.

    Greedy decoding gives a row's answer just if each of its tokens is the likeliest after those
    before it: one pass over whole rows tells what decoding them would match, and at what depth.
    """
    sums = defaultdict(lambda: defaultdict(float))
    rows = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(rows), batch_size):
        part = rows[start:start + batch_size]
        input_ids, targets, _ = collate(part, device)
        counted = targets != -100
        in_row = counted.nonzero()[:, 0]

        def per_row(values: Tensor) -> list[float]:
            return torch.zeros(len(part), device=device).index_add(0, in_row, values.float()).tolist()
        figures = {"rows": [1] * len(part), "tokens": per_row(torch.ones_like(in_row))}
        for name, route in (("base", "full"), ("flexidepth", "learned")):
            with autocast(model):
                x, _, kept = model.hidden_states(input_ids, route=route)
                logits = model.head(x[counted]).float()
            wrong = per_row(logits.argmax(-1) != targets[counted])
            figures[f"{name}_exact"] = [count == 0 for count in wrong]
            figures[f"{name}_loss"] = per_row(F.cross_entropy(logits, targets[counted], reduction="none"))
        figures["layers"] = per_row(layers_used(kept, model.config)[counted])
        for name, values in figures.items():
            for row, value in zip(part, values):
                sums[row.task][name] += value
    return {task: {name: value if name in ("rows", "tokens") else
                   value / s["rows" if name.endswith("exact") else "tokens"] for name, value in s.items()}
            for task, s in sums.items()}


def print_table(table: dict[str, dict[str, float]], layers: int) -> None:
    """The rows of `evaluate`, lowest depth first, and their mean over tasks."""
    mean = {key: sum(row[key] for row in table.values()) / len(table) for key in next(iter(table.values()))}
    by_depth = sorted(table.items(), key=lambda item: item[1]["layers"])
    print(f"{'':18}{'exact match':>19}{'loss':>20}{'layers used':>15}\n{'task':12}{'rows':>6}"
          f"{'base':>8}{'FlexiDepth':>12}{'base':>9}{'FlexiDepth':>12}{f'of {layers}':>14}")
    for task, row in [*by_depth, ("mean", mean)]:
        rows = "" if task == "mean" else round(row["rows"])
        print(f"{ascii(task)[1:-1]:12.12}{rows:>6}{row['base_exact']:>8.1%}{row['flexidepth_exact']:>12.1%}"
              f"{row['base_loss']:>9.4f}{row['flexidepth_loss']:>12.4f}{row['layers']:>14.2f}")
    kept = f", {mean['flexidepth_exact'] / mean['base_exact']:.1%} of exact match kept" if mean["base_exact"] else ""
    print(f"{1 - mean['layers'] / layers:.1%} of all layers skipped{kept}")


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = FlexiDepth.from_pretrained(args.model, flexidepth=args.flexidepth, device=args.device)
    for name, p in model.named_parameters():
        p.data = p.data.float() if TRAINED.match(name) else p.data  # bfloat16 would lose small updates
    tokenizer = Tokenizer.from_pretrained(args.model)
    seq_len = min(args.seq_len, model.config.max_position_embeddings)
    data = args.data or Path(args.model) / "train.jsonl"
    valid = args.valid or (None if args.data else Path(args.model) / "valid.jsonl")
    if not args.data and not data.is_file():
        raise ValueError(f"{args.model} holds no train.jsonl; name a file of training rows with --data")
    rows = read_rows(data, tokenizer, seq_len, args.answers_only)
    held_out = read_rows(valid, tokenizer, seq_len, args.answers_only) if valid else []
    config, trained = model.config, sum(p.numel() for n, p in model.named_parameters() if TRAINED.match(n))
    print(f"{args.model}: layers {config.routing_layers} of {config.num_hidden_layers} route, "
          f"{trained:,} parameters to train, {len(rows)} rows")
    args.out.mkdir(parents=True, exist_ok=True)  # now, and not when there is something to lose
    train(model, rows, args)
    file = model.save_flexidepth(args.out)
    table = evaluate(model, held_out, args.micro_batch_size, args.device) if held_out else {}
    if table:
        print_table(table, config.num_hidden_layers)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    temporary = args.out / f".train.json.{os.getpid()}"
    temporary.write_text(json.dumps({"settings": settings, "valid": table}, indent=2) + "\n")
    os.replace(temporary, args.out / "train.json")
    print(f"wrote {file}; see it at work: python sample.py --show-depth"
          + (f" --model {args.model}" if Path(args.model).resolve() != TINY else "")
          + (f" --flexidepth {args.out}" if args.out != Path("out") else ""))


def main() -> None:
    args = parse_args()
    try:
        run(args)
    except (OSError, ValueError) as error:
        fail(error)
    except torch.OutOfMemoryError as error:
        fail(f"{error}; a smaller --micro-batch-size or --seq-len needs less memory")
    except KeyboardInterrupt:  # outside of the training, which saves what it has
        sys.exit(130)


if __name__ == "__main__":
    main()
