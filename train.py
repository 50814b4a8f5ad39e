"""Train the routers and adapters of a Llama; the Llama itself stays as it is.

    python train.py                                       # the tiny Llama, under two minutes
    python train.py --alpha 1e-3 --out deep-cut           # a higher price for every layer used
    python train.py --model meta-llama/Meta-Llama-3-8B-Instruct --data tulu.jsonl
    torchrun --nproc-per-node 8 train.py --model ...      # on 8 GPUs

Data is JSONL: {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]} or
{"text": ...} a line, with any "task" to tell rows apart in the tables. The folder --out gets
flexidepth.safetensors, which sample.py and FlexiDepth.from_pretrained(model, flexidepth=out) take;
train.json, the settings and results; metrics.jsonl, a line a step; the data as tokens; and, until
the end, checkpoints for --resume.
"""
import argparse
import hashlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from flexidepth import (
    TRAINED, FlexiDepth, Tokenizer, find_folder, layers_used, read_json, skip_loss)

TINY = Path(__file__).resolve().parent / "tests" / "tiny-llama"
ROLES = ("system", "user", "assistant")
RECIPES = {  # the second stage of "released" has alpha 1e-5 and starts from the gates of the first
    "paper": {"alpha": 1e-3, "lr": 1e-4, "beta2": 0.999, "clip": 0.0, "epochs": 3.0,
              "batch_size": 64, "micro_batch_size": 1, "seq_len": 2048, "answers_only": False},
    "released": {"alpha": 1e-4, "lr": 1e-4, "beta2": 0.95, "clip": 1.0, "epochs": 1.0,
                 "batch_size": 32, "micro_batch_size": 1, "seq_len": 2048, "answers_only": False},
    "tiny": {"alpha": 3.5e-4, "lr": 5e-3, "beta2": 0.999, "clip": 0.0, "epochs": 7.35,
             "batch_size": 32, "micro_batch_size": 32, "seq_len": 256, "answers_only": True}}
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
POOL = 16         # batches among which rows of like length are sought
ANSWER = 1 << 31  # set in the stored id of a token of an answer
LOGITS = 1 << 26  # computed at a time: a float32 copy takes 268 MB

def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = fail, parser.add_argument
    add("--model", default=os.path.relpath(TINY), help="folder of a Llama, or a cached hub name")
    add("--data", type=Path, help="training rows, JSONL (default: train.jsonl of the model)")
    add("--valid", type=Path, help="held-out rows for the table (default: its valid.jsonl)")
    add("--out", type=Path, default=Path("out"), help="folder for the result (default: out)")
    add("--flexidepth", type=Path, help="start from these routers and adapters, not random ones")
    add("--recipe", choices=RECIPES, help="gives the defaults of the options that follow (default: "
        "tiny for the tiny Llama, else paper; their values stand at the top of this script)")
    add("--alpha", type=number(float), help="price of depth, the weight of L_skip")
    add("--lr", type=number(float), help="peak learning rate")
    add("--beta2", type=number(float, below=1), help="of AdamW")
    add("--clip", type=number(float), help="largest norm of the gradients, 0 for any")
    add("--epochs", type=number(float), help="passes over the data")
    add("--batch-size", type=number(int, 1), help="rows a step, of all processes together")
    add("--micro-batch-size", type=number(int, 1), help="rows on a device at a time")
    add("--seq-len", type=number(int, 2), help="longer rows, in tokens, are left out")
    add("--answers-only", action=argparse.BooleanOptionalAction, help="L_lm on answers alone")
    add("--steps", type=number(int, 1), help="optimiser steps, instead of --epochs")
    add("--seed", type=int, default=0, help="of routers, adapters and the order of rows (0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--save-every", type=number(int, 1), default=200, help="steps between checkpoints (200)")
    add("--eval-every", type=number(int), default=0, help="steps between tables; 0: at the end")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--shard", action="store_true", help="split the model too among the processes (FSDP)")
    add("--checkpoint-activations", action="store_true", help="less memory, more time: compute "
        "routed layers again for their gradients")
    add("--full", action="store_true", help="write the whole model too, laid out as the released")
    args = parser.parse_args()
    tiny = Path(args.model).resolve() == TINY
    parser.set_defaults(**RECIPES[args.recipe or ("tiny" if tiny else "paper")])
    args = parser.parse_args()  # again, now with the recipe's defaults
    args.micro_batch_size = min(args.micro_batch_size, max(1, args.batch_size // WORLD))
    if args.batch_size % (WORLD * args.micro_batch_size):
        fail(f"--batch-size {args.batch_size} is no multiple of {WORLD} processes times "
             f"--micro-batch-size {args.micro_batch_size}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device) or args.device != "cpu" and (
            WORLD > 1 and ":" in args.device
            or int(args.device[5:] or 0) >= torch.cuda.device_count()):
        fail(f"--device {args.device}: torch finds {torch.cuda.device_count()} GPUs; expected cpu, "
             "cuda, or, for one process, a GPU by number as cuda:0")
    if args.shard and WORLD == 1:
        fail("--shard needs several processes: torchrun --nproc-per-node 2 train.py --shard ...")
    return args

def number(kind: type, least: float = 0, below: float = math.inf) -> Callable:
    """A type of option: a number of `kind`, from `least` to less than `below`."""
    def convert(text: str) -> float:
        if not least <= (value := kind(text)) < below:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to less than {below}")
        return value
    convert.__name__ = kind.__name__  # for argparse's word on what is no number
    return convert

def fail(message: str) -> None:
    """One line and exit status 2, as for every error that the user can mend."""
    print(f"train.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)

def say(text: str, passing: bool = False) -> None:
    """Print it once, however many processes; what is passing only shows on a terminal, in place."""
    if RANK == 0 and sys.stdout.isatty():  # cut to the width: a line that wraps can't be wiped
        text = text[:shutil.get_terminal_size().columns - 1] if passing else text
        print(f"\r\033[K{text}", end="" if passing else "\n", flush=True)
    elif RANK == 0 and not passing:
        print(text, flush=True)

@contextmanager
def whole(file: Path) -> Iterator:
    """A file to write, which gets its name when all of it is on disk: never is half a one left."""
    temporary = file.with_name(f".{file.name}.part")
    try:
        with open(temporary, "wb") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)

# ---- Data ----------------------------------------------------------------------------------------
@dataclass
class Row:
    ids: Sequence[int]
    counted: Sequence[bool]  # where a token counts in the language-model loss
    task: str

def tokenize(raw: dict, tokenizer: Tokenizer, answers_only: bool) -> Row:
    """A row of JSON as tokens; of a conversation all tokens count, or those of the answers."""
    if "text" in raw:
        ids = tokenizer.encode(raw["text"], bos=True, eos=True)
        return Row(ids, [True] * len(ids), str(raw.get("task", "all")))
    bos, *header = tokenizer.encode_chat([], add_generation_prompt=True)
    ids, counted = [bos], [not answers_only]
    for message in raw["messages"]:
        if message["role"] not in ROLES or not isinstance(message["content"], str):
            raise ValueError(f"unknown role {message['role']!r}, or content that is no text")
        _, *part = tokenizer.encode_chat([message])
        answers = message["role"] == "assistant"
        ids += part
        counted += [not answers_only or answers and i >= len(header) for i in range(len(part))]
    return Row(ids, counted, str(raw.get("task", "all")))

def start_worker(tokenizer: Tokenizer) -> None:
    global TOKENIZER
    TOKENIZER = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it

def read_line(data: Path, numbered: tuple[int, bytes]) -> tuple[np.ndarray, str] | None:
    """The tokens of a line of JSON as they are stored, and its task. None if the line is empty."""
    number, line = numbered
    try:
        row = tokenize(json.loads(line), TOKENIZER, answers_only=True) if line.strip() else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f'{data}: line {number}: expected {{"messages": [{{"role": ..., "content":'
                         f' ...}}, ...]}} or {{"text": ...}}, not {line[:60]!r} ({error!r})'
                         ) from None
    return row and (np.array(row.ids, np.uint32) + ANSWER * np.array(row.counted, np.uint32),
                    row.task)

def write_tokens(data: Path, tokenizer: Tokenizer, file: Path) -> None:
    """Tokenise a JSONL file in parallel: `file` gets its tokens, a .json beside it the rest."""
    rows, tasks, size = [], {}, max(1, data.stat().st_size)
    with (open(data, "rb") as lines, whole(file) as out,
          Pool(os.cpu_count(), start_worker, (tokenizer,)) as pool):
        read = pool.imap(partial(read_line, data), enumerate(lines, 1), chunksize=64)
        for tokens, task in filter(None, read):
            out.write(tokens)
            rows.append((len(tokens), tasks.setdefault(task, len(tasks))))
            if len(rows) % 1000 == 0:
                done = lines.tell() / size
                say(f"{data}: {len(rows):,} rows tokenised  {'#' * int(30 * done):30}  {done:.0%}",
                    passing=True)
    if not rows:
        raise ValueError(f"{data}: no row to use")
    with whole(file.with_suffix(".json")) as out:  # written last: it says that both are whole
        out.write(json.dumps({"tasks": list(tasks), "rows": rows}).encode())

class Rows(Sequence):
    """The rows of a JSONL file that have no more than seq_len tokens. They stay on disk, mapped,
    in a token file (uint32) in `folder`, which the first process makes unless there is one for the
    same data, tokenizer and template. ValueError gives file and line of a bad row."""
    def __init__(self, data: Path, tokenizer: Tokenizer, folder: Path, args: argparse.Namespace):
        probe = [{"role": role, "content": " a\n"} for role in ROLES]
        template = tokenize({"messages": probe}, tokenizer, True)
        key = hashlib.sha256(pickle.dumps((tokenizer.encoding, template)))
        with open(data, "rb") as opened:
            for block in iter(lambda: opened.read(1 << 20), b""):
                key.update(block)
        file = folder / f"tokens-{key.hexdigest()[:16]}.bin"
        if RANK == 0 and not file.with_suffix(".json").is_file():
            write_tokens(data, tokenizer, file)
        if WORLD > 1:
            dist.barrier()
        index = read_json(file.with_suffix(".json"))
        lengths, tasks = np.array(index["rows"], np.int64).reshape(-1, 2).T
        self.tokens, starts = np.memmap(file, np.uint32, "r"), lengths.cumsum() - lengths
        used = (1 < lengths) & (lengths <= args.seq_len)
        if args.answers_only:  # a row without an answer teaches nothing
            used &= np.logical_or.reduceat(self.tokens >= ANSWER, starts)
        if dropped := int((lengths > args.seq_len).sum()):
            say(f"{data}: {dropped} rows of more than {args.seq_len} tokens are left out")
        if not used.any():
            raise ValueError(f"{data}: no row to use (--seq-len {args.seq_len} leaves out "
                             f"{dropped})")
        self.name, self.answers_only = file.stem, args.answers_only
        self.lengths, self.starts = lengths[used], starts[used]
        self.tasks = [index["tasks"][task] for task in tasks[used]]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Row:
        stored = self.tokens[self.starts[i]:self.starts[i] + self.lengths[i]]
        counted = (stored >= ANSWER) | (not self.answers_only)
        return Row((stored & (ANSWER - 1)).astype(np.int64), counted, self.tasks[i])

def plan_batches(lengths: np.ndarray, steps: int, args: argparse.Namespace) -> Tensor:
    """The rows of every step, (steps, batch_size), by seed alone: a run can be resumed anywhere.
    Each epoch has an order of its own. Where a batch is several micro-batches, each of these gets
    rows of like length, which need little padding, and the batch gets micro-batches at random."""
    generator, count = torch.Generator().manual_seed(args.seed), steps * args.batch_size
    epochs = [torch.randperm(len(lengths), generator=generator)
              for _ in range(-(-count // len(lengths)))]
    order, lengths, pools = torch.cat(epochs)[:count], torch.from_numpy(lengths), []
    for pool in order.split(POOL * args.batch_size):
        if args.micro_batch_size < args.batch_size:
            groups = pool[lengths[pool].argsort(stable=True)].view(-1, args.micro_batch_size)
            pool = groups[torch.randperm(len(groups), generator=generator)].flatten()
        pools.append(pool)
    return torch.cat(pools).view(steps, args.batch_size)

def collate(rows: list[Row], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids and targets (B, T), -100 where no loss is due; real (B, T), False at padding."""
    ids, counted = (pad_sequence([torch.as_tensor(part) for part in parts], batch_first=True)
                    for parts in ([row.ids for row in rows], [row.counted for row in rows]))
    lengths = torch.tensor([len(row.ids) for row in rows])
    real = torch.arange(1, ids.shape[1]) < lengths[:, None]
    targets = ids[:, 1:].masked_fill(~counted[:, 1:], -100)
    return tuple(part.to(device) for part in (ids[:, :-1] * real, targets, real))

# ---- Losses --------------------------------------------------------------------------------------
def autocast(model: FlexiDepth) -> torch.autocast:
    """Compute in the base's dtype where the trained parts, in float32, meet it."""
    weight = model.model["embed_tokens"].weight
    return torch.autocast(weight.device.type, weight.dtype, weight.dtype != torch.float32)

def over_processes(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if WORLD > 1:
        dist.all_reduce(values)
    return values

def logits_in_chunks(model: FlexiDepth, x: Tensor, targets: Tensor) -> Iterator:
    """Float32 logits (n, V) of hidden states x (N, D) with their targets, LOGITS at most a time."""
    size = max(1, LOGITS // model.config.vocab_size)
    for start in range(0, len(x), size):
        yield model.head(x[start:start + size]).float(), targets[start:start + size]

def lm_loss(model: FlexiDepth, x: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of x (N, D) over count, and its gradient (N, D). The head is
    frozen: the gradient can be had chunk by chunk, and no logits need to be kept for it."""
    x, loss = x.detach().requires_grad_(), 0.0
    for logits, target in logits_in_chunks(model, x, targets):
        part = F.cross_entropy(logits, target, reduction="sum") / count           # L_lm
        part.backward()
        loss = loss + part.detach()
    return loss, x.grad

def backward(model: FlexiDepth, batch: list[Row], args: argparse.Namespace,
             forward: Callable | None = None) -> list[float]:
    """Gradients of L = alpha * L_skip + L_lm. Returns L_lm, L_skip and each layer's keep rate.
    All processes are given the whole batch; each runs its share in micro-batches. Both losses are
    means over the tokens of the whole batch: gradients do not depend on how it was split."""
    batch = sorted(batch, key=lambda row: len(row.ids))  # rows of one length need no padding
    real_tokens = sum(len(row.ids) - 1 for row in batch)
    counted_tokens = max(1, sum(np.count_nonzero(row.counted[1:]) for row in batch))
    size = args.micro_batch_size
    parts = [batch[i:i + size] for i in range(0, len(batch), size)][RANK::WORLD]
    sums = torch.zeros(2 + len(model.config.routing_layers), device=args.device)
    for part in parts:
        input_ids, targets, real = collate(part, args.device)
        counted = targets != -100
        wait = isinstance(forward, DistributedDataParallel) and part is not parts[-1]
        with forward.no_sync() if wait else nullcontext(), autocast(model):
            x, gates, kept = (forward or model.hidden_states)(input_ids)
            x = x[counted]
            lm, gradient = lm_loss(model, x, targets[counted], counted_tokens)
        skip = skip_loss(gates, real) * real.sum() / real_tokens                  # L_skip
        # lm_loss cut x off: both gradients go on from here. DDP and FSDP take their mean over the
        # processes, but they are parts of a sum.
        gradients = [gradient * WORLD, torch.full_like(skip, args.alpha * WORLD)]
        torch.autograd.backward([x, skip], gradients)
        sums += torch.cat([torch.stack([lm, skip.detach()]), kept[real].sum(0) / real_tokens])
    return over_processes(sums).tolist()

# ---- Training ------------------------------------------------------------------------------------
def distribute(model: FlexiDepth, args: argparse.Namespace) -> Callable:
    """What to call in place of model.hidden_states, so that the processes' gradients meet."""
    for layer in model.model["layers"] if args.checkpoint_activations else ():
        if layer.router is not None:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if args.shard:  # every process holds a part of each layer, and gets the others as it runs
        mesh = init_device_mesh(torch.device(args.device).type, (WORLD,))
        for module in (*model.model["layers"], model):
            fully_shard(module, mesh=mesh)
        register_fsdp_forward_method(model, "hidden_states")
    elif WORLD > 1:
        model.forward = model.hidden_states  # DDP runs forward; the head comes after it, in chunks
        return DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)
    return model.hidden_states

def train(model: FlexiDepth, rows: Rows, held_out: Sequence[Row], args: argparse.Namespace,
          run_of: dict) -> None:
    """Adam on routers and adapters; the base does not change. Ctrl-C saves a checkpoint first."""
    config, forward = model.config, distribute(model, args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, args.beta2), weight_decay=0.0)
    steps = args.steps or max(1, round(args.epochs * len(rows) / args.batch_size))
    begun, noted = resume(model, optimizer, args, run_of)
    metrics = open(args.out / "metrics.jsonl" if RANK == 0 else os.devnull, "a", buffering=1)
    if RANK == 0:  # what was noted after the checkpoint comes again
        metrics.truncate(min(noted, metrics.tell()))

    def note(**figures) -> None:
        with suppress(OSError):  # where the disk is full; it is written with what comes later
            print(json.dumps(figures), file=metrics)
    plain, usual, warned = config.num_hidden_layers - len(config.routing_layers), 0.5, ""
    signals, started = [], time.time()

    def on_signal(number, frame) -> None:
        signals.append(number)
        say("stopping after this step ...")
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    for step, chosen in enumerate(plan_batches(rows.lengths, steps, args)[begun:], begun + 1):
        batch, before = [rows[i] for i in chosen], time.time()
        # Warm-up over 3 % of the steps, then a cosine to zero.
        lr = args.lr * min(step / (0.03 * steps), (1 + math.cos(math.pi * (step - 1) / steps)) / 2)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        lm, skip, *keep = backward(model, batch, args, forward)
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip or math.inf)
        norm = float(norm.full_tensor() if args.shard else norm)
        if not math.isfinite(lm + skip + norm):
            raise ValueError(f"step {step}: losses {lm} and {skip}, gradient norm {norm}; "
                             "a lower --lr or --clip 1 may help")
        optimizer.step()
        now, layers = time.time(), plain + sum(keep)
        speed = sum(len(row.ids) for row in batch) / (now - before)
        note(step=step, lm_loss=lm, skip_loss=skip, layers=layers, kept=keep, grad_norm=norm,
             lr=lr, tokens_per_s=speed, memory=peak_memory(args.device))
        now_and_then = step % max(1, steps // 20) == 0
        left = (now - started) / (step - begun) * (steps - step)
        say(f"step {step}/{steps}  loss {lm:.4f}  skip loss {skip:6.3f}  layers used {layers:5.2f}"
            f" of {config.num_hidden_layers}  {speed:,.0f} tokens/s  {left:.0f} s left",
            passing=not (now_and_then or step in (1, steps)))
        usual = 0.97 * usual + 0.03 * np.array(keep)  # from the coin flips that gates begin with
        if now_and_then and (warning := collapse(usual, config.routing_layers)) != warned:
            warned = warning
            say(warning or "routing no longer collapses")
        if held_out and args.eval_every and step % args.eval_every == 0 and step < steps:
            table = evaluate(model, held_out, args.micro_batch_size, args.device)
            note(step=step, valid=table)
            print_table(table, config.num_hidden_layers)
        stop = over_processes(torch.tensor(float(len(signals)), device=args.device)) > 0
        if step % args.save_every == 0 or stop or step == steps:
            save_checkpoint(model, optimizer, step, metrics, args, run_of)
        if stop and step < steps:
            over_processes(stop.float())  # all wait until it is written
            say(f"stopped after step {step}; the same command with --resume goes on from there")
            sys.exit(130)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nothing is left to save
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

def peak_memory(device: str) -> int:
    """Bytes: the most that torch held on the GPU, or this process in memory."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on a Mac bytes
    return peak if sys.platform == "darwin" else 1024 * peak

def collapse(keep: Sequence[float], layers: list[int]) -> str:
    """A warning in words if nearly all tokens or nearly none keep a layer, or any; else ''."""
    text = ""
    for found, what in (
            ([layer for layer, rate in zip(layers, keep) if rate > 0.99],
             "nearly all tokens keep {}: that saves nothing, try a larger --alpha"),
            ([layer for layer, rate in zip(layers, keep) if rate < 0.01],
             "nearly no token keeps {}: if the loss suffers, try a smaller --alpha or --lr")):
        where = "ANY routed layer" if found == layers else f"layers {found}"
        text += f"warning: routing collapses: {what.format(where)}. " if found else ""
    return text.strip()

def checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("checkpoint-*.pt"))

def save_checkpoint(model, optimizer, step: int, metrics, args, run_of: dict) -> None:
    """What --resume needs. A disk that is full costs the checkpoint, not the run."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_state_dict(model, optimizer, options=options)  # all processes give their parts
    try:
        if RANK == 0:
            with whole(args.out / f"checkpoint-{step:08}.pt") as out:
                torch.save({"step": step, "noted": metrics.tell(), "run": run_of,
                            "state": state}, out)
            for old in checkpoints(args.out)[:-2]:
                old.unlink()
    except (OSError, RuntimeError) as error:
        names = ", ".join(file.name for file in checkpoints(args.out)) or "none so far"
        say(f"warning: no checkpoint of step {step} ({error}); the last good ones stay: {names}")

def resume(model, optimizer, args: argparse.Namespace, run_of: dict) -> tuple[int, int]:
    """Take on the newest whole checkpoint. Returns its step and the bytes of metrics until then."""
    files = checkpoints(args.out)[::-1]
    if files and not args.resume:
        raise ValueError(f"{args.out} holds an unfinished run ({files[0].name}): give --resume, "
                         "or another --out")
    for file in files:
        try:
            saved = torch.load(file, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            say(f"warning: {file} is not whole ({str(error)[:60]}...); trying the one before")
            continue
        if differ := [f"{name} was {saved['run'].get(name)!r}, is {value!r}"
                      for name, value in run_of.items() if value != saved["run"].get(name)]:
            raise ValueError(f"{file} is of another run: {', '.join(differ)}")
        set_state_dict(model, optimizer, model_state_dict=saved["state"][0],
                       optim_state_dict=saved["state"][1],
                       options=StateDictOptions(full_state_dict=True, strict=False))
        say(f"going on from step {saved['step']} ({file})")
        return saved["step"], saved["noted"]
    if files or args.resume and (args.out / "train.json").is_file():
        what = "no checkpoint can be read; remove them" if files else "the run has ended; use --out"
        raise ValueError(f"{args.out}: {what} to begin anew")
    return 0, 0

# ---- Results -------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model: FlexiDepth, rows: Sequence[Row], batch_size: int, device: str) -> dict:
    """{task: {figure: value}}: rows, exact match and loss of base and FlexiDepth, mean layers used,
    of counted tokens. Greedy decoding gives a row's answer just if each of its tokens is the
    likeliest after those before it: one pass over whole rows tells what decoding would match."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    tasks = sorted({rows[i].task for i in order})
    sums = torch.zeros(len(tasks), 7, dtype=torch.float64, device=device)
    for start in range(0, len(rows), batch_size * WORLD):
        mine = order[start:start + batch_size * WORLD][RANK::WORLD]
        # Without rows of its own a process runs along, as FSDP needs, and adds nothing.
        part = [rows[i] for i in mine or order[:1]]
        input_ids, targets, _ = collate(part, device)
        counted = targets != -100
        in_row, targets = counted.nonzero()[:, 0], targets[counted]
        of_tokens = [torch.ones_like(in_row)]
        for route in ("full", "learned"):
            with autocast(model):
                x, _, kept = model.hidden_states(input_ids, route=route)
                scores = [(logits.argmax(-1) == target,
                           F.cross_entropy(logits, target, reduction="none"))
                          for logits, target in logits_in_chunks(model, x[counted], targets)]
            of_tokens += map(torch.cat, zip(*scores))
        of_tokens = torch.stack([*of_tokens, layers_used(kept, model.config)[counted]], 1).double()
        tokens, base, base_loss, flexi, loss, layers = sums.new_zeros(
            len(part), 6).index_add(0, in_row, of_tokens).T                       # (rows,) each
        of_rows = [tokens >= 0, tokens, base == tokens, base_loss, flexi == tokens, loss, layers]
        task = torch.tensor([tasks.index(row.task) for row in part], device=device)[:len(mine)]
        sums.index_add_(0, task, torch.stack(of_rows, 1)[:len(mine)])
    over_processes(sums)
    sums[:, [2, 4]] /= sums[:, :1]     # exact match, over rows
    sums[:, [3, 5, 6]] /= sums[:, 1:2] # losses and layers, over tokens
    names = ("rows", "tokens", "base_exact", "base_loss", "flexidepth_exact", "flexidepth_loss",
             "layers")
    return {task: dict(zip(names, line)) for task, line in zip(tasks, sums.tolist())}

def print_table(table: dict[str, dict[str, float]], layers: int) -> None:
    """What `evaluate` found, lowest depth first, and the mean over tasks."""
    mean = {key: sum(line[key] for line in table.values()) / len(table)
            for key in next(iter(table.values()))}
    by_depth = sorted(table.items(), key=lambda item: item[1]["layers"])
    say(f"\n{'':18}{'exact match':>19}{'loss':>20}{'layers used':>15}\n{'task':12}{'rows':>6}"
        f"{'base':>8}{'FlexiDepth':>12}{'base':>9}{'FlexiDepth':>12}{f'of {layers}':>14}")
    for task, line in [*by_depth, ("mean", mean)]:
        rows = "" if line is mean else round(line["rows"])
        say(f"{ascii(task)[1:-1]:12.12}{rows:>6}{line['base_exact']:>8.1%}"
            f"{line['flexidepth_exact']:>12.1%}{line['base_loss']:>9.4f}"
            f"{line['flexidepth_loss']:>12.4f}{line['layers']:>14.2f}")
    kept = mean["flexidepth_exact"] / mean["base_exact"] if mean["base_exact"] else math.nan
    say(f"{1 - mean['layers'] / layers:.1%} of all layers skipped, {kept:.1%} of exact match kept")

def write_full(base: Path, out: Path, model: FlexiDepth, trained: dict[str, Tensor]) -> None:
    """out/full: the whole model, laid out as the released one: the base's files, its shards linked
    where that can be, the trained tensors as one more, an index and a config.json for them."""
    new, full, name = out / ".full.part", out / "full", "flexidepth.safetensors"
    shutil.rmtree(new, ignore_errors=True)
    for pattern in ("model*.safetensors", "*.json", "chat_template*", "tokenizer.model",
                    "original/tokenizer.model"):
        for file in base.glob(pattern):
            target = new / file.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            place = os.link if file.suffix == ".safetensors" else shutil.copyfile
            try:
                place(file.resolve(), target)
            except OSError:  # there are no links to another disk
                shutil.copyfile(file, target)
    if (single := new / "model.safetensors").is_file():  # beside it no index would be read
        shard = single.rename(new / "model-00001-of-00001.safetensors")
        with safe_open(shard, framework="pt") as opened:
            places = dict.fromkeys(opened.keys(), shard.name)
    else:
        places = read_json(new / "model.safetensors.index.json")["weight_map"]
    places = {key: shard for key, shard in places.items() if not TRAINED.match(key)}
    dtype = model.model["embed_tokens"].weight.dtype
    size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    index = {"metadata": {"total_size": size}, "weight_map": places | dict.fromkeys(trained, name)}
    config = read_json(base / "config.json") | {
        "model_type": "ddllama", "routing_layers": model.config.routing_layers}
    trained = {key: t.to(dtype) for key, t in trained.items()}
    (new / name).write_bytes(save(trained, {"format": "pt"}))
    for file, content in (("config.json", config), ("model.safetensors.index.json", index)):
        (new / file).write_text(json.dumps(content, indent=2) + "\n")
    shutil.rmtree(full, ignore_errors=True)
    new.replace(full)

def run(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    if WORLD > 1:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl",
                                timeout=timedelta(hours=1))
    base = find_folder(args.model)
    data = args.data or base / "train.jsonl"
    own = base / "valid.jsonl"
    valid = args.valid or (own if own.is_file() and not args.data else None)
    if not data.is_file() and not args.data:
        raise ValueError(f"{args.model} holds no train.jsonl; name a file of rows with --data")
    # A base to be split is not copied to a device whole: its files are mapped, each layer sent.
    device = "cpu" if args.shard else args.device
    model = FlexiDepth.from_pretrained(args.model, args.flexidepth, device=device)
    for name, p in model.named_parameters():  # bfloat16 would lose small updates
        p.data = p.data.float() if TRAINED.match(name) else p.data
    config, tokenizer = model.config, Tokenizer.from_pretrained(args.model)
    if tokenizer.encoding.n_vocab > config.vocab_size:
        raise ValueError(f"{args.model}: its tokenizer has {tokenizer.encoding.n_vocab} tokens, "
                         f"its model {config.vocab_size}")
    args.seq_len = min(args.seq_len, config.max_position_embeddings)
    args.out.mkdir(parents=True, exist_ok=True)  # now, and not when there is something to lose
    rows = Rows(data, tokenizer, args.out, args)
    held_out = Rows(valid, tokenizer, args.out, args) if valid else []
    if len(rows) < args.batch_size:
        raise ValueError(f"{data}: {len(rows)} rows to use, fewer than --batch-size "
                         f"{args.batch_size}")
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{args.model}: layers {config.routing_layers} of {config.num_hidden_layers} route, "
        f"{count:,} parameters to train, {len(rows)} rows")
    # What makes a run the one that it is: a checkpoint of another is refused.
    run_of = {"model": asdict(config), "data": rows.name, "base": [  # norms tell bases apart
        p.cpu().float().sum().item() for name, p in model.named_parameters()
        if "norm" in name and not p.requires_grad]}
    run_of |= {name: getattr(args, name) for name in (*RECIPES["paper"], "steps", "seed")}
    train(model, rows, held_out, args, run_of)
    trained = get_model_state_dict(model, options=StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=True))
    table = evaluate(model, held_out, args.micro_batch_size, args.device) if held_out else {}
    if table:
        print_table(table, config.num_hidden_layers)
    if RANK == 0:
        with whole(args.out / "flexidepth.safetensors") as out:
            out.write(save(trained, {"format": "pt"}))
        record = {"settings": vars(args), "config": asdict(config), "valid": table}
        with whole(args.out / "train.json") as out:
            out.write(json.dumps(record, indent=2, default=str).encode())
        if args.full:
            write_full(base, args.out, model, trained)
        for file in checkpoints(args.out):
            file.unlink()
        say(f"wrote {args.out / 'flexidepth.safetensors'}; see it at work:\n"
            f"python sample.py --show-depth --model {args.model} --flexidepth {args.out}")
    if WORLD > 1:
        dist.destroy_process_group()

def main() -> None:
    args = parse_args()
    try:
        run(args)
    except (OSError, ValueError) as error:
        fail(error)
    except torch.OutOfMemoryError as error:
        fail(f"{error}; a smaller --micro-batch-size or --seq-len, --checkpoint-activations or "
             "--shard needs less memory")
    except KeyboardInterrupt:  # outside of the training, which saves what it has
        sys.exit(130)

if __name__ == "__main__":
    main()
