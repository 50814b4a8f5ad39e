"""Train the routers and adapters of a Llama; the Llama itself stays as it is.

    python train.py                                       # the tiny Llama, about two minutes
    python train.py --model smollm2 --data chat.jsonl     # a real one, an hour or two on a laptop
    python train.py --model meta-llama/Meta-Llama-3-8B-Instruct --data tulu.jsonl
    torchrun --nproc-per-node 8 train.py --model ...      # on 8 GPUs

Each line of the data is {"messages": [{"role": "user", "content": ...}, ...]} or {"text": ...}.
Rows with the same "task", which is optional, share a line of the tables. A valid.jsonl beside the
data holds the held-out rows. The folder --out, which all machines of a run have to share, gets

    flexidepth.safetensors    routers and adapters, for sample.py and FlexiDepth.from_pretrained
    train.json                the settings and the table of held-out rows
    metrics.jsonl             a line a step
    tokens*.pt                the data as tokens
    checkpoint.pt             for --resume; it is deleted when the run has ended

At each routed layer a router gives a token a gate g in (0, 1). Above 0.5 the token runs the layer,
whose mlp's output is multiplied by g. Else a small adapter runs in place of attention and mlp, and
its output is multiplied by 1 - g. Through these factors L_lm reaches the router. L_lm is the
cross-entropy of the next tokens, L_skip the mean over tokens of (sum of the token's gates over the
routed layers)², and alpha the price of depth. flexidepth.py has the equations.

One step: the rows of a batch are sorted by length and cut into micro-batches, which are dealt out
to the processes. Each micro-batch adds its part to the gradients of L_lm + alpha * L_skip. L_lm is
a mean over the tokens of the whole batch that count, which may be those of the answers alone, and
L_skip over all its tokens that have a next one. So the gradients are the same however the batch was
cut (up to rounding). Then AdamW moves the routers and adapters. The base does not change.
"""
import argparse
import gzip
import hashlib
import json
import math
import os
import sys
import time
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from flexidepth import (
    Config, FlexiDepth, Route, Tokenizer, find_folder, layers_used, read_json, save_trained,
    skip_loss, whole_file)

TINY = Path(__file__).resolve().parent / "tests" / "tiny-llama"
RECIPES = {
    # The paper's, for Llama-3-8B-Instruct.
    "paper": dict(plain_end=0, alpha=1e-3, falling_alpha=False, open_warmup=0.0, lr=1e-4,
                  router_lr=1.0, epochs=3.0, batch_size=64, micro_batch_size=1, seq_len=2048,
                  answers_only=False),
    # For a real model of a few hundred million parameters, such as SmolLM2-135M, on a laptop: short
    # rows, small batches, a third of an epoch. tests/paper/README.md says what the rest gained.
    "smol": dict(plain_end=1, alpha=2e-3, falling_alpha=True, open_warmup=0.1, lr=2e-3,
                 router_lr=0.1, epochs=0.34, batch_size=8, micro_batch_size=2, seq_len=256,
                 answers_only=True),
    # For tests/tiny-llama.
    "tiny": dict(plain_end=0, alpha=3.5e-4, falling_alpha=False, open_warmup=0.0, lr=5e-3,
                 router_lr=1.0, epochs=7.35, batch_size=32, micro_batch_size=32, seq_len=256,
                 answers_only=True),
}

# torchrun tells each process its place. A WORLD_SIZE without LOCAL_RANK is none of torchrun's.
WORLD = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
RANK = int(os.environ["RANK"]) if WORLD > 1 else 0

GROUP = 8         # rows of like length that stay together in a batch
POOL = 16         # batches whose rows are sorted by length to make such groups
LOGITS = 1 << 24  # at most so many logits are computed at a time
# Checkpoints hold whole tensors, however they were split, and none of the frozen base's.
FULL_STATE = StateDictOptions(
    full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def parse_args() -> argparse.Namespace:
    tiny = TINY.relative_to(Path.cwd()) if TINY.is_relative_to(Path.cwd()) else TINY
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"train.py: {message}")
    add = parser.add_argument
    add("--model", default=str(tiny), help="folder of a Llama, or a cached hub name")
    add("--data", type=Path, help="training rows, JSONL (default: train.jsonl of the model)")
    add("--valid", type=Path, help="held-out rows (default: valid.jsonl beside the training rows)")
    add("--out", type=Path, default=Path("out"), help="folder for the result (default: out)")
    add("--flexidepth", type=Path, help="start from these routers and adapters, not random ones")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, if any")
    add("--seed", type=int, default=0, help="of new routers and of the order of rows (0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    add("--dtype", choices=["float32", "bfloat16"],
        help="of the base (default: its own, but float32 on a CPU)")
    add("--save-every", type=int, default=200, help="steps between checkpoints (200)")
    add("--eval-every", type=int, default=0, help="steps between tables; 0: only at the end")
    add("--shard", action="store_true", help="split the model too among the processes (FSDP)")
    add("--checkpoint-activations", action="store_true",
        help="less memory, more time: compute routed layers again for their gradients")
    add("--beta2", type=float, default=0.999, help="decay of AdamW's second moments (0.999)")
    add("--clip", type=float, default=0.0, help="largest norm of the gradients (0: no clipping)")
    add("--recipe", choices=RECIPES,
        help="defaults of the options below (default: tiny for tests/tiny-llama, smol up to a "
             "hidden size of 1024, else paper)")
    add("--plain-end", type=int,
        help="half of the layers are routed, by default the last half; this moves them down by so "
             "many, and as many last layers stay plain (for new routers)")
    add("--alpha", type=float, help="price of depth, the weight of L_skip")
    add("--falling-alpha", action=argparse.BooleanOptionalAction,
        help="let alpha rise and fall with the learning rate")
    add("--open-warmup", type=float,
        help="share of the steps, at first, in which every token runs every layer")
    add("--lr", type=float, help="peak learning rate")
    add("--router-lr", type=float, help="factor on --lr for the routers")
    add("--epochs", type=float, help="passes over the data; 0 trains nothing, but evaluates")
    add("--steps", type=int, help="optimiser steps, in place of --epochs")
    add("--batch-size", type=int, help="rows a step, of all processes together")
    add("--micro-batch-size", type=int, help="rows on a device at a time")
    add("--seq-len", type=int, help="longer rows, in tokens, are left out")
    add("--answers-only", action=argparse.BooleanOptionalAction,
        help="L_lm on the answers of conversations alone")
    args = parser.parse_args()

    recipe = args.recipe or default_recipe(args.model)
    parser.set_defaults(recipe=recipe, **RECIPES[recipe])
    args = parser.parse_args()  # again, with the recipe's defaults
    for name in ("batch_size", "micro_batch_size", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    for name in ("plain_end", "alpha", "open_warmup", "lr", "router_lr", "beta2", "clip", "epochs",
                 "steps", "eval_every", "seed"):
        if not 0 <= (getattr(args, name) or 0) < 2**63:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a number "
                         "from 0 to 2**63")
    args.micro_batch_size = min(args.micro_batch_size, max(1, args.batch_size // WORLD))
    if args.batch_size % (WORLD * args.micro_batch_size):
        parser.error(f"--batch-size {args.batch_size} is no multiple of {WORLD} processes times "
                     f"--micro-batch-size {args.micro_batch_size}")
    if WORLD == 1 and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        parser.error("srun started several processes that know nothing of each other; let srun "
                     "start torchrun, once on each node (or unset SLURM_NTASKS)")
    if args.shard and WORLD == 1:
        parser.error("--shard needs several processes: torchrun --nproc-per-node 2 train.py ...")
    return args


def default_recipe(model: str) -> str:
    if Path(model).resolve() == TINY:
        return "tiny"
    hidden_size = read_json(find_folder(model) / "config.json").get("hidden_size", 0)
    return "smol" if hidden_size <= 1024 else "paper"


def say(text: str, end: str = "\n") -> None:
    """Print once, however many processes there are. A closed pipe does not end the run."""
    if RANK == 0:
        try:
            print(text, end=end, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- Data ----------------------------------------------------------------------------------------
@dataclass
class Row:
    ids: np.ndarray      # (T,) int32
    counted: np.ndarray  # (T,) bool, where a token counts in L_lm
    task: str


def open_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, which may be gzipped or a pipe. ValueError if it is gzipped badly."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as lines:
        try:
            yield from lines
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: not a whole gzip file ({error})") from None


def read_rows(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, dict]]:
    """Line numbers and JSON objects of the lines of a JSONL file. ValueError names a bad one."""
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig").strip()
            row = json.loads(text) if text else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number}: expected a JSON object on each line (JSONL, "
                             f"no array): {str(error)[:120]}") from None
        if row is None:
            continue
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number}: expected a JSON object on each line (JSONL, "
                             f"no array), found a {type(row).__name__}")
        yield number, row


ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
         "human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}


def read_messages(row: dict) -> list[dict]:
    """The conversation of a row, [{"role": ..., "content": text}, ...], or [] if it has none.
    Besides "messages" it reads ShareGPT's "conversations". Messages without content, such as tool
    calls, are left out. ValueError for an unknown role, or content that is no text."""
    messages = []
    for turn in row.get("messages") or row.get("conversations") or []:
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        if content is None:
            continue
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(f"unknown role {role!r}, or content that is no text")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def tokenize(row: dict, tokenizer: Tokenizer, answers_only: bool) -> Row:
    """A row of JSON as tokens; of a conversation all tokens count, or those of the answers."""
    task = str(row.get("task") or "all")
    messages = read_messages(row)
    if not messages and isinstance(row.get("text"), str):
        ids = tokenizer.encode(row["text"], bos=True, eos=True) if row["text"].strip() else []
        return Row(np.array(ids, np.int32), np.ones(len(ids), bool), task)
    if not {"messages", "conversations"} & row.keys():
        raise ValueError('expected {"messages": [{"role": ..., "content": ...}, ...]} or '
                         f'{{"text": ...}}; found {[*row][:4]}')
    ids = list(tokenizer.begin_chat)
    counted = [not answers_only] * len(ids)
    for message in messages:
        new_ids, said = tokenizer.encode_message(message)  # said: not the header
        ids += new_ids
        if answers_only:
            counted += said if message["role"] == "assistant" else [False] * len(said)
        else:
            counted += [True] * len(said)
    return Row(np.array(ids, np.int32), np.array(counted, bool), task)


def write_rows(data: Path, file: Path, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Tokenise a JSONL file into one file of tensors. Rows left out are counted by the reason."""
    ids = array("i")
    counted = bytearray()
    lengths = []
    tasks = []
    left_out = Counter()
    marked = 0
    for number, raw in read_rows(data, open_lines(data)):
        try:
            row = tokenize(raw, tokenizer, args.answers_only)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{data}: line {number}: not a row to train on: {error}") from None
        if len(row.ids) > args.seq_len:
            left_out[f"of more than --seq-len {args.seq_len} tokens"] += 1
        elif len(row.ids) < 2:
            left_out["empty"] += 1
        elif not row.counted[1:].any():
            left_out["without an answer"] += 1
        else:
            ids.frombytes(row.ids.tobytes())
            counted += row.counted.tobytes()
            lengths.append(len(row.ids))
            tasks.append(row.task)
            text = "" if read_messages(raw) else raw["text"]
            marked += any(name in text for name in tokenizer.special)

    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    if not lengths:
        raise ValueError(f"{data}: no row to use" + (f"; left out: {reasons}" if reasons else ""))
    if reasons:
        say(f"{data}: {len(lengths)} rows; left out: {reasons}")
    if marked:
        say(f"{data}: warning: {marked} rows of text hold special tokens by name, such as chat "
            "markers. They are read as plain text; rows of messages get the model's own format.")
    content = {"ids": torch.frombuffer(ids, dtype=torch.int32),
               "counted": torch.frombuffer(counted, dtype=torch.bool),
               "lengths": torch.tensor(lengths),
               "tasks": tasks}
    with whole_file(file) as temporary:
        torch.save(content, temporary)


class Rows:
    """The rows of a JSONL file as tokens, in a file that all processes map into their memory."""
    def __init__(self, data: Path, file: Path, tokenizer: Tokenizer, args: argparse.Namespace):
        if RANK == 0:
            write_rows(data, file, tokenizer, args)
        if WORLD > 1:
            dist.barrier()
        content = torch.load(file, mmap=True, weights_only=True)
        self.ids = content["ids"].numpy()
        self.counted = content["counted"].numpy()
        self.lengths = content["lengths"].numpy()
        self.tasks = content["tasks"]
        self.ends = self.lengths.cumsum()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Row:
        here = slice(self.ends[i] - self.lengths[i], self.ends[i])
        return Row(self.ids[here], self.counted[here], self.tasks[i])


def plan_batches(lengths: np.ndarray, steps: int, args: argparse.Namespace) -> Tensor:
    """The rows of every step, int64 (steps, batch_size). They depend on the rows' lengths, the
    batch size and the seed alone, so that a run can be resumed anywhere. Each epoch has an order of
    its own. Rows that do not fill its last batch are left for other epochs.

    Rows of like length need little padding where they share a micro-batch. A batch of 64 rows or
    more, if a multiple of GROUP, is therefore made of groups of GROUP rows of like length, in
    random order. In other batches the groups are single rows, which is a plain shuffle: small ones
    would have too little variety otherwise."""
    generator = torch.Generator().manual_seed(args.seed)
    lengths = torch.from_numpy(lengths)
    size = args.batch_size
    group_size = GROUP if size >= 64 and size % GROUP == 0 else 1
    batches = [torch.empty(0, size, dtype=torch.int64)]
    while sum(map(len, batches)) < steps:
        order = torch.randperm(len(lengths), generator=generator)
        order = order[:len(lengths) // size * size]
        for pool in order.split(POOL * size):
            by_length = pool[lengths[pool].argsort(stable=True)]
            groups = by_length.view(-1, group_size)
            shuffled = groups[torch.randperm(len(groups), generator=generator)]
            batches.append(shuffled.view(-1, size))
    return torch.cat(batches)[:steps]


def collate(rows: list[Row], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as padded tensors (B, T): input_ids; targets, -100 where a next token does not count in
    L_lm; and real, False where a row has no next token. Padding is at the end of a row, where no
    real token can attend to it."""
    ids = pad_sequence([torch.from_numpy(row.ids).long() for row in rows], batch_first=True)
    counted = pad_sequence([torch.from_numpy(row.counted) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row.ids) for row in rows])
    real = torch.arange(1, ids.shape[1]) < lengths[:, None]
    input_ids = ids[:, :-1] * real  # zeros where a row has no next token
    targets = ids[:, 1:].masked_fill(~counted[:, 1:], -100)
    return input_ids.to(device), targets.to(device), real.to(device)


# ---- Losses --------------------------------------------------------------------------------------
class TokenLosses(nn.Module):
    """A FlexiDepth model and its loss as one module, which DDP and FSDP can wrap.

    forward takes input_ids and targets (B, T), as `collate` makes them, and a route, as in
    flexidepth.py: "full" is the base alone. At the N places where a target counts it returns the
    losses (N,), float32, and the likeliest tokens (N,). For the R routed layers it returns gates
    (B, T, R) and kept (B, T, R), True where a token runs the layer, or None with route "full"."""
    def __init__(self, model: FlexiDepth):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, targets: Tensor, route: Route = "learned"
                ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        dtype = self.model.model.embed_tokens.weight.dtype
        # The trained parts are float32. Autocast computes in the base's dtype where they meet it.
        with torch.autocast(input_ids.device.type, dtype, enabled=dtype != torch.float32):
            x, gates, kept = self.model.hidden_states(input_ids, route=route)
            counted = targets != -100
            chunk = max(1, LOGITS // self.model.config.vocab_size)
            head_loss = self.head_loss
            if counted.sum() > chunk:  # the logits of a chunk are not kept, but computed once more
                head_loss = partial(checkpoint, self.head_loss, use_reentrant=False)
            parts = [head_loss(*part)
                     for part in zip(x[counted].split(chunk), targets[counted].split(chunk))]
        losses, likeliest = (torch.cat(part) for part in zip(*parts))
        return losses, likeliest, gates, kept

    def head_loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model.head(x).float()
        return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1)


def keep_all(layer_index: int, gate: Tensor) -> Tensor:
    """A route by which every token runs the layer. Unlike with route "full", the mlp's output is
    multiplied by the gate, which gives the gate a gradient."""
    return torch.ones_like(gate, dtype=torch.bool)


def distribute(model: FlexiDepth, args: argparse.Namespace) -> nn.Module:
    """TokenLosses of the model, ready for several processes. Each runs micro-batches of its own;
    with DDP it holds the whole model, with FSDP (--shard) a part of every tensor."""
    if args.checkpoint_activations:
        for index in model.config.routing_layers:
            layer = model.model.layers[index]
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    token_losses = TokenLosses(model)
    if args.shard:
        mesh = init_device_mesh(torch.device(args.device).type, (WORLD,))
        for module in (*model.model.layers, token_losses):  # the last one takes what is left
            fully_shard(module, mesh=mesh)
    elif WORLD > 1:
        return DistributedDataParallel(token_losses, gradient_as_bucket_view=True)
    return token_losses


@torch.no_grad()
def evaluate(token_losses: nn.Module, rows: Rows, config: Config, args: argparse.Namespace
             ) -> dict[str, dict]:
    """The table of held-out rows, {task: {figure: value}}, for the tokens that count in L_lm:

    base_loss, loss      cross-entropy of the base and of FlexiDepth
    same                 share of tokens for which both find the same token likeliest
    layers               mean depth: the number of layers that a token runs, plain ones too
    base_exact, exact    share of rows in which every token that counts is the likeliest one. Where
                         that is one answer a row, greedy decoding would give just this answer

    Of several processes each evaluates all rows: FSDP needs them to run in step."""
    order = np.argsort(rows.lengths, kind="stable")
    totals = defaultdict(Counter)
    for start in range(0, len(order), args.micro_batch_size):
        batch = [rows[i] for i in order[start:start + args.micro_batch_size]]
        input_ids, targets, _ = collate(batch, args.device)
        counted = targets != -100
        base_loss, base_best, _, _ = token_losses(input_ids, targets, "full")
        loss, best, _, kept = token_losses(input_ids, targets, "learned")
        layers = layers_used(kept, config)[counted]
        figures = torch.stack([base_loss, loss, best == base_best, layers,
                               base_best == targets[counted], best == targets[counted]], 1)
        for row, tokens in zip(batch, figures.split(counted.sum(1).tolist())):
            sums = tokens.sum(0).tolist()
            exact = tokens[:, 4:].all(0).tolist()
            totals[row.task].update(
                rows=1, tokens=len(tokens), base_loss=sums[0], loss=sums[1], same=sums[2],
                layers=sums[3], base_exact=exact[0], exact=exact[1])

    table = {}
    for task, total in sorted(totals.items()):
        table[task] = {"rows": total["rows"], "tokens": total["tokens"]}
        for key in ("base_loss", "loss", "same", "layers"):
            table[task][key] = total[key] / total["tokens"]
        for key in ("base_exact", "exact"):
            table[task][key] = total[key] / total["rows"]
    return table


def print_table(table: dict[str, dict], num_layers: int) -> None:
    """What `evaluate` found, lowest depth first, and the mean over tasks."""
    keys = next(iter(table.values()))
    mean = {key: sum(line[key] for line in table.values()) / len(table) for key in keys}
    say(f"\n{'':24}{'loss':>14}{'next tokens':>19}{'exact match':>15}{'layers used':>17}\n"
        f"{'task':12}{'rows':>6}{'base':>9}{'FlexiDepth':>12}{'as the base':>17}"
        f"{'base':>9}{'FlexiDepth':>12}{f'of {num_layers}':>11}")
    lines = sorted(table.items(), key=lambda item: item[1]["layers"])
    for task, line in [*lines, ("task mean", mean)]:
        rows = "" if line is mean else line["rows"]
        exact = f"{'-':>9}{'-':>12}"
        if line["base_exact"] > 0:
            exact = f"{line['base_exact']:>9.1%}{line['exact']:>12.1%}"
        say(f"{ascii(task)[1:-1]:12.12}{rows:>6}{line['base_loss']:>9.4f}{line['loss']:>12.4f}"
            f"{line['same']:>17.1%}{exact}{line['layers']:>11.2f}")
    summary = (f"{1 - mean['layers'] / num_layers:.1%} of all layers skipped, "
               f"{mean['same']:.1%} of next tokens as the base's")
    if mean["base_exact"] > 0:
        summary += f", {mean['exact'] / mean['base_exact']:.1%} of exact match kept"
    say(summary)


# ---- Checkpoints ---------------------------------------------------------------------------------
def make_fingerprint(args: argparse.Namespace, model: FlexiDepth, rows: Rows) -> dict:
    """What must not change between a stop and --resume: what is trained, on which data, and how.
    How a batch is cut may change."""
    names = ("alpha", "falling_alpha", "open_warmup", "lr", "router_lr", "beta2", "clip",
             "batch_size", "seq_len", "answers_only", "seed", "steps")
    fingerprint = {name: getattr(args, name) for name in names}
    fingerprint["model"] = asdict(model.config)
    fingerprint["dtype"] = str(model.model.embed_tokens.weight.dtype)
    fingerprint["data"] = digest([rows.ids, rows.counted, rows.lengths])
    # The beginnings of its tensors are enough to tell one base from another.
    fingerprint["base"] = digest(p.detach().flatten()[:1000].float().cpu().numpy()
                                 for p in model.parameters() if not p.requires_grad)
    return fingerprint


def digest(parts: Iterable[np.ndarray]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def save_checkpoint(file: Path, model, optimizer, step: int, fingerprint: dict) -> None:
    """What --resume needs. The file takes the place of the last one only when it is complete."""
    state = get_state_dict(model, optimizer, options=FULL_STATE)  # all processes give their parts
    if RANK == 0:
        with whole_file(file) as temporary:
            torch.save({"step": step, "fingerprint": fingerprint, "state": state}, temporary)
    if WORLD > 1:
        dist.barrier()


def load_checkpoint(file: Path, model, optimizer, fingerprint: dict) -> int:
    """Take on a checkpoint and return its step, or 0 where there is none. The first process reads
    it for all of them. ValueError if it is of another run, or no checkpoint."""
    saved = [None]
    if RANK == 0 and file.is_file():
        try:
            saved = [torch.load(file, weights_only=True)]
            before = dict(saved[0])["fingerprint"].items()
        except Exception as error:  # another program's file may fail in any way
            raise ValueError(f"{file}: not a checkpoint of train.py ({str(error)[:60]}); remove "
                             "it to begin anew") from None
        for name, value in before:
            if fingerprint.get(name) != value:
                raise ValueError(f"{file} is of another run: its {name} was {str(value)[:60]}, "
                                 f"now it is {str(fingerprint.get(name))[:60]}")
    if WORLD > 1:
        dist.broadcast_object_list(saved)
    saved = saved[0]
    if saved is None:
        return 0
    model_state, optimizer_state = saved["state"]
    set_state_dict(model, optimizer, model_state_dict=model_state,
                   optim_state_dict=optimizer_state, options=FULL_STATE)
    return saved["step"]


def write_json(file: Path, content: dict) -> None:
    with whole_file(file) as temporary:
        text = json.dumps(content, indent=2, default=str)
        temporary.write_text(text + "\n", encoding="utf-8")


# ---- Training ------------------------------------------------------------------------------------
def main() -> None:
    args = parse_args()
    sys.stdout = sys.stdout or open(os.devnull, "w")  # it is None where it was closed
    sys.stdout.reconfigure(errors="replace")
    torch.manual_seed(args.seed)
    if WORLD > 1:
        if args.device.startswith("cuda"):
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        backend = "nccl" if args.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))  # tokenising may take long

    # A finished run in --out is never written over. One with a checkpoint can only be resumed.
    checkpoint_file = args.out / "checkpoint.pt"
    result_file = args.out / "train.json"
    gates_file = args.out / "flexidepth.safetensors"
    if result_file.is_file() or (gates_file.is_file() and not checkpoint_file.is_file()):
        raise ValueError(f"{args.out} holds a finished run; give another --out")
    if checkpoint_file.is_file() and not args.resume:
        raise ValueError(f"{args.out} holds an unfinished run; give --resume or another --out")
    args.out.mkdir(parents=True, exist_ok=True)

    # The model: a frozen base, and routers and adapters in float32, as bfloat16 would lose small
    # updates. A base that is to be split stays in main memory, and each layer is sent when split.
    dtype = args.dtype and getattr(torch, args.dtype)
    if args.device == "cpu":
        dtype = dtype or torch.float32
    folder = find_folder(args.model)
    routing_layers = None  # those of --flexidepth, or of config.json
    if args.flexidepth is None and "routing_layers" not in read_json(folder / "config.json"):
        count = Config.from_json(folder / "config.json").num_hidden_layers
        routing_layers = range(count // 2 - args.plain_end, count - args.plain_end)
    model = FlexiDepth.from_pretrained(
        args.model, args.flexidepth, routing_layers, dtype=dtype, trained_dtype=torch.float32,
        device="cpu" if args.shard else args.device)
    config = model.config
    tokenizer = Tokenizer.from_pretrained(args.model)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{args.model}: its tokenizer has {tokenizer.vocab_size} tokens, its "
                         f"model {config.vocab_size}")

    # The data.
    data = args.data or folder / "train.jsonl"
    if not args.data and not data.is_file():
        raise ValueError(f"{args.model} holds no train.jsonl; name a file of rows with --data")
    valid = args.valid
    if valid is None and (data.parent / "valid.jsonl").is_file():
        valid = data.parent / "valid.jsonl"
    args.seq_len = min(args.seq_len, config.max_position_embeddings)
    rows = Rows(data, args.out / "tokens.pt", tokenizer, args)
    held_out = valid and Rows(valid, args.out / "tokens-valid.pt", tokenizer, args)
    wanted = args.epochs if args.steps is None else args.steps
    if wanted and len(rows) < args.batch_size:
        raise ValueError(f"{data}: {len(rows)} rows to use, fewer than --batch-size "
                         f"{args.batch_size}")
    if args.steps is None:
        args.steps = math.ceil(args.epochs * (len(rows) // args.batch_size))
    steps = args.steps
    plan = plan_batches(rows.lengths, steps, args)
    trained_size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{args.model}: layers {config.routing_layers} of {config.num_hidden_layers} route, "
        f"{trained_size:,} parameters to train, {len(rows)} rows, held out: {valid}")

    fingerprint = make_fingerprint(args, model, rows)
    token_losses = distribute(model, args)
    named = list(model.named_parameters())  # FSDP has put new ones in place
    routers = [p for name, p in named if ".router." in name]
    # The checkpoint format calls an adapter router_proj.
    adapters = [p for name, p in named if ".router_proj." in name]
    trained = routers + adapters
    optimizer = torch.optim.AdamW(
        [{"params": routers}, {"params": adapters}], lr=args.lr, betas=(0.9, args.beta2),
        weight_decay=0.0, fused=True)
    begin = load_checkpoint(checkpoint_file, model, optimizer, fingerprint)
    say(f"going on after step {begin}" if begin else "beginning with step 1")
    metrics_file = args.out / "metrics.jsonl"
    if RANK == 0:  # line n is of step n; those after the checkpoint are written again
        lines = metrics_file.read_text().splitlines(True)[:begin] if begin else []
        with whole_file(metrics_file) as temporary:
            temporary.write_text("".join(lines))

    started = time.time()
    on_terminal = sys.stdout.isatty()
    for step in range(begin + 1, steps + 1):
        step_started = time.time()
        # The learning rate rises over 3 % of the steps, and falls towards zero along a cosine.
        warm_up = min(1, step / (0.03 * steps))
        schedule = min(warm_up, (1 + math.cos(math.pi * (step - 1) / steps)) / 2)
        lr = args.lr * schedule
        of_routers, of_adapters = optimizer.param_groups
        of_routers["lr"] = lr * args.router_lr
        of_adapters["lr"] = lr
        # --falling-alpha: layers are given up while alpha is high, and the model recovers while it
        # is low.
        alpha = args.alpha
        if args.falling_alpha:
            alpha *= schedule
        # --open-warmup: every token runs every layer at first, so that the gates learn how much the
        # layers are worth before they decide. Gates that begin shut may never open.
        route = keep_all if step <= args.open_warmup * steps else "learned"

        batch = sorted([rows[i] for i in plan[step - 1]], key=lambda row: len(row.ids))
        size = args.micro_batch_size
        micro_batches = [batch[i:i + size] for i in range(0, len(batch), size)][RANK::WORLD]
        # A micro-batch adds its sums, divided by the numbers of tokens in the whole batch.
        real_tokens = sum(len(row.ids) - 1 for row in batch)
        counted_tokens = sum(np.count_nonzero(row.counted[1:]) for row in batch)
        figures = torch.zeros(2 + len(config.routing_layers), device=args.device)
        for micro_batch in micro_batches:
            # DDP exchanges gradients in the last backward pass alone. Elsewhere this has no effect.
            token_losses.require_backward_grad_sync = micro_batch is micro_batches[-1]
            input_ids, targets, real = collate(micro_batch, args.device)
            losses, _, gates, kept = token_losses(input_ids, targets, route)
            lm_loss = losses.sum() / counted_tokens                        # its part of L_lm
            gate_loss = skip_loss(gates, real) * real.sum() / real_tokens  # its part of L_skip
            # DDP and FSDP average the gradients of the processes: WORLD makes that their sum.
            (WORLD * (lm_loss + alpha * gate_loss)).backward()
            parts = torch.stack([lm_loss.detach(), gate_loss.detach()])
            figures += torch.cat([parts, kept[real].sum(0) / real_tokens])

        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip or math.inf)
        if args.shard:
            norm = norm.full_tensor()
        if WORLD > 1:
            dist.all_reduce(figures)
        lm, skip, *kept_shares = figures.tolist()
        if not math.isfinite(lm + skip + norm.item()):
            raise ValueError(f"step {step}: losses {lm} and {skip}, gradient norm {norm.item()}; "
                             "a lower --lr or --clip 1 may help, in a new --out")
        optimizer.step()
        optimizer.zero_grad()

        # The mean depth of all tokens. The table has that of the tokens that count.
        layers = config.num_hidden_layers - len(kept_shares) + sum(kept_shares)
        speed = sum(len(row.ids) for row in batch) / (time.time() - step_started)
        note = {"step": step, "lm_loss": lm, "skip_loss": skip, "layers": layers,
                "kept": kept_shares, "grad_norm": norm.item(), "lr": lr, "alpha": alpha,
                "tokens_per_s": speed}
        if held_out and args.eval_every and step % args.eval_every == 0 and step < steps:
            note["valid"] = evaluate(token_losses, held_out, config, args)
            print_table(note["valid"], config.num_hidden_layers)
        if RANK == 0:
            with open(metrics_file, "a") as file:
                print(json.dumps(note), file=file)
        if step % args.save_every == 0 and step < steps:
            save_checkpoint(checkpoint_file, model, optimizer, step, fingerprint)

        left = (time.time() - started) / (step - begin) * (steps - step)
        bars = "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * share))] for share in kept_shares)
        line = (f"step {step}/{steps}  loss {lm:.4f}  skip loss {skip:.3f}  layers used "
                f"{layers:.2f} {bars}  {speed:,.0f} tokens/s  {left:.0f} s left")
        if step % max(1, steps // 20) == 0 or step in (1, steps):
            say(f"\r\033[K{line}" if on_terminal else line)
        elif on_terminal:
            say(f"\r\033[K{line}", end="")

    # The result. The gates are written before the table is made, which may take long.
    state = get_model_state_dict(model, options=FULL_STATE)
    if RANK == 0:
        save_trained(gates_file, state, config)
    table = evaluate(token_losses, held_out, config, args) if held_out else {}
    if table:
        print_table(table, config.num_hidden_layers)
    if RANK == 0:
        write_json(result_file, {"settings": vars(args), "config": asdict(config), "valid": table})
        checkpoint_file.unlink(missing_ok=True)
    say(f"wrote {gates_file}; see it at work:\n"
        f"python sample.py --show-depth --model {args.model} --flexidepth {args.out}")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as error:
        sys.exit(f"train.py: {error}; a smaller --micro-batch-size, --checkpoint-activations or "
                 "--shard needs less memory (a run may be resumed with them)")
    except (OSError, ValueError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ntrain.py: interrupted; --resume goes on from the last checkpoint, if any")
