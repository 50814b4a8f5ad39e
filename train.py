"""Train the routers and adapters of a Llama; the Llama itself stays as it is.

    python train.py                                       # the tiny Llama of tests/, under two minutes
    python train.py --alpha 1e-3 --out deep-cut           # a higher price for every layer used
    python train.py --model meta-llama/Meta-Llama-3-8B-Instruct --data tulu.jsonl --valid held-out.jsonl
    torchrun --nproc-per-node 8 train.py --model ...      # on 8 GPUs; --shard where the base does not fit one

Data is JSONL: {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]} or {"text": ...}
a line, with any "task" to tell rows apart in the tables. The folder --out gets flexidepth.safetensors, which
sample.py and FlexiDepth.from_pretrained(model, flexidepth=out) take; train.json, the settings and results;
metrics.jsonl, a line a step; the data as tokens; and, until the end, checkpoints for --resume.
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
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from flexidepth import TRAINED, FlexiDepth, Tokenizer, find_folder, layers_used, read_json, skip_loss

TINY = Path(__file__).resolve().parent / "tests" / "tiny-llama"
ROLES = ("system", "user", "assistant")
# Where nothing is given on the command line: the paper's recipe; that of the authors' later repository, whose
# second stage has alpha 1e-5 and starts from the gates of the first; that of the tiny Llama.
RECIPES = {  # option: (paper, released, tiny, help)
    "alpha": (1e-3, 1e-4, 3.5e-4, "price of depth, the weight of L_skip"),
    "lr": (1e-4, 1e-4, 5e-3, "peak learning rate"),
    "beta2": (0.999, 0.95, 0.999, "of AdamW"),
    "clip": (0.0, 1.0, 0.0, "largest norm of the gradients, 0 for any"),
    "epochs": (3.0, 1.0, None, "passes over the data"),
    "steps": (None, None, 900, "optimiser steps, instead of epochs"),
    "batch_size": (64, 32, 32, "rows a step, of all processes together"),
    "micro_batch_size": (1, 1, 32, "rows on a device at a time"),
    "seq_len": (2048, 2048, 256, "rows with more tokens, or more than the context, are left out")}
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
TRAINED_ONLY = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
POOL = 16         # batches among which rows of like length are sought
OVERWRITTEN = "" if sys.stdout.isatty() else "\n"  # the end of a line of progress
ANSWER = 1 << 31  # set in the stored id of a token of an answer
LOGITS = 1 << 26  # computed at a time: a float32 copy takes 268 MB


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail

    def add(flag, type, default, text, **more):
        parser.add_argument(flag, type=type, default=default, help=text, **more)

    def switch(flag, text):
        parser.add_argument(flag, action="store_true", help=text)
    add("--model", str, os.path.relpath(TINY), "folder of the pre-trained Llama, or a hub name in the local cache")
    add("--data", Path, None, "training rows, JSONL (default: the model folder's train.jsonl)")
    add("--valid", Path, None, "held-out rows for the table (default: the model folder's valid.jsonl)")
    add("--out", Path, Path("out"), "folder for the result (default: out); all machines have to see it")
    add("--flexidepth", Path, None, "start from these routers and adapters, not from random ones")
    add("--recipe", str, None, "defaults of the next nine (default: paper)", choices=("paper", "released", "tiny"))
    for name, (*values, text) in RECIPES.items():
        kind, shown = type(values[0] or values[2]), ", ".join(f"{value or '-'}" for value in values)
        add(f"--{name.replace('_', '-')}", kind, None, f"{text} (paper, released, tiny: {shown})")
    add("--device", str, "cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, ...")
    add("--seed", int, 0, "of the routers' and adapters' start and the order of the rows")
    add("--save-every", int, 200, "steps between checkpoints (200)")
    add("--eval-every", int, 0, "steps between tables of the held-out rows; 0: only at the end (0)")
    parser.add_argument("--answers-only", action=argparse.BooleanOptionalAction,
                        help="language-model loss on assistant tokens alone (default: only for the tiny Llama)")
    switch("--resume", "go on from the last checkpoint in --out, with the same settings")
    switch("--shard", "split the model among the processes (FSDP) and not just the rows (DDP)")
    switch("--checkpoint-activations", "less memory, more time: compute routed layers again for their gradients")
    switch("--full", "write out/full too: the whole model as the released one is laid out")
    args = parser.parse_args()
    tiny = Path(args.model).resolve() == TINY
    recipe, given = ("paper", "released", "tiny").index(args.recipe or ("tiny" if tiny else "paper")), vars(args)
    if args.epochs is None and args.steps is None:
        args.epochs, args.steps = RECIPES["epochs"][recipe], RECIPES["steps"][recipe]
    for name in RECIPES.keys() - {"epochs", "steps"}:
        given[name] = RECIPES[name][recipe] if given[name] is None else given[name]
    args.answers_only = tiny if args.answers_only is None else args.answers_only
    for name in ("lr", "epochs", "steps", "batch_size", "micro_batch_size", "seq_len", "save_every"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            fail(f"--{name.replace('_', '-')} is {value}; expected more than 0")
    for name, end in (("alpha", math.inf), ("clip", math.inf), ("eval_every", math.inf), ("beta2", 1)):
        if not 0 <= getattr(args, name) < end:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected 0 or more, less than {end}")
    args.micro_batch_size = min(args.micro_batch_size, max(1, args.batch_size // WORLD))
    if args.batch_size % (WORLD * args.micro_batch_size):
        fail(f"--batch-size {args.batch_size} can't be cut into parts of --micro-batch-size "
             f"{args.micro_batch_size} for each of {WORLD} processes; expected a multiple of both")
    if not (args.device == "cpu" or re.fullmatch(r"cuda(:\d+)?", args.device) and torch.cuda.is_available()):
        fail(f"--device {args.device}: not found by torch; expected cpu, or cuda where there is a GPU")
    if args.shard and WORLD == 1:
        fail("--shard needs several processes: torchrun --nproc-per-node 2 train.py --shard ...")
    return args


def fail(message: str):
    """One line and exit status 2, as for every error that the user can mend."""
    print(f"train.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def say(text: str, end: str = "\n") -> None:
    """Print it once, however many processes there are, over the progress line if there is one."""
    if RANK == 0:
        print(f"\r\033[K{text}" if sys.stdout.isatty() else text, end=end, flush=True)


def progress(step: int, steps: int, text: str) -> None:
    """A line that stays in place on a terminal, and is printed now and then elsewhere."""
    line = f"step {step}/{steps}  {text}"
    if sys.stdout.isatty():  # cut to the width, as a line that wraps can't be overwritten
        say(line[:shutil.get_terminal_size().columns - 1], end=OVERWRITTEN)
    elif step % max(1, steps // 20) == 0 or step in (1, steps):
        say(line)


@contextmanager
def whole(file: Path) -> Iterator:
    """A file to write, which gets its name when all is written: no half one is ever left under it."""
    temporary = file.with_name(f".{file.name}.part")
    try:
        with open(temporary, "wb") as opened:
            yield opened
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


# ---- Data

@dataclass
class Row:
    ids: Sequence[int]
    counted: Sequence[bool]  # where a token counts in the language-model loss
    task: str


class Rows(Sequence):
    """The rows of a token file, uint32, that have no more than seq_len tokens. They stay on disk, mapped."""
    def __init__(self, file: Path, seq_len: int, answers_only: bool):
        self.tokens, self.answers_only = np.memmap(file.with_suffix(".bin"), np.uint32, "r"), answers_only
        index = read_json(file.with_suffix(".json"))
        lengths, answers, tasks = np.array(index["rows"], np.int64).reshape(-1, 3).T
        starts = lengths.cumsum() - lengths
        fits, teaches = lengths <= seq_len, (answers if answers_only else lengths - 1) > 0
        self.dropped = int((~fits).sum())
        self.lengths, self.starts, tasks = (each[fits & teaches] for each in (lengths, starts, tasks))
        self.name, self.tasks = file.stem, [index["tasks"][i] for i in tasks]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Row:
        stored = self.tokens[self.starts[i]:self.starts[i] + self.lengths[i]]
        counted = (stored >= ANSWER) | (not self.answers_only)
        return Row((stored & (ANSWER - 1)).astype(np.int64), counted, self.tasks[i])


def load_rows(data: Path, tokenizer: Tokenizer, folder: Path, seq_len: int, answers_only: bool) -> Rows:
    """The rows of a JSONL file, tokenised once: the first process makes a token file in `folder` unless there
    is one for the same data, tokenizer and template. ValueError gives file and line of a bad row."""
    probe = tokenize({"messages": [{"role": role, "content": " a\n"} for role in ROLES]}, tokenizer, True)
    key, size = hashlib.sha256(pickle.dumps((tokenizer.encoding, probe))), data.stat().st_size
    with open(data, "rb") as lines:
        for block in iter(lambda: lines.read(1 << 20), b""):
            key.update(block)
    file = folder / f"tokens-{key.hexdigest()[:16]}.bin"
    if RANK == 0 and not file.with_suffix(".json").is_file():
        read, index, tasks = partial(read_line, data), [], {}
        with (open(data, "rb") as lines, whole(file) as out,
              Pool(os.cpu_count(), start_worker, (tokenizer,)) as pool):
            for number, row in enumerate(pool.imap(read, enumerate(lines, 1), chunksize=64), 1):
                if row is not None:
                    tokens, answers, task = row
                    out.write(tokens)
                    index.append((len(tokens), answers, tasks.setdefault(task, len(tasks))))
                if number % 10000 == 0:
                    say(f"{data}: {number:,} rows tokenised, {lines.tell() / size:.0%}", end=OVERWRITTEN)
            if not index:
                raise ValueError(f"{data}: no row to use")
        with whole(file.with_suffix(".json")) as out:  # written last: it says that both are whole
            out.write(json.dumps({"tasks": list(tasks), "rows": index}).encode())
    if WORLD > 1:
        dist.barrier()
    rows = Rows(file, seq_len, answers_only)
    if not len(rows):
        raise ValueError(f"{data}: no row to use ({rows.dropped} have more than --seq-len {seq_len} tokens)")
    if rows.dropped:
        say(f"{data}: {rows.dropped} rows have more than {seq_len} tokens, left out; {len(rows)} are used")
    return rows


def start_worker(tokenizer: Tokenizer) -> None:
    global TOKENIZER
    TOKENIZER = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it


def read_line(data: Path, numbered: tuple[int, bytes]) -> tuple[np.ndarray, int, str] | None:
    """Stored tokens, number of those of answers, and task of a line of JSON."""
    number, line = numbered
    try:
        row = tokenize(json.loads(line), TOKENIZER, answers_only=True) if line.strip() else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{data}: line {number}: expected {{\"messages\": [{{\"role\": ..., \"content\": "
                         f"...}}, ...]}} or {{\"text\": ...}}, found {line[:60]!r} ({error!r})") from None
    counted = np.array(row.counted, np.uint32) if row else None
    return row and (np.array(row.ids, np.uint32) + ANSWER * counted, int(counted[1:].sum()), row.task)


def tokenize(raw: dict, tokenizer: Tokenizer, answers_only: bool) -> Row:
    """A row of JSON as tokens; of a conversation all tokens count, or those of the answers."""
    task = str(raw.get("task", "all"))
    if "text" in raw:
        ids = tokenizer.encode(raw["text"], bos=True, eos=True)
        return Row(ids, [True] * len(ids), task)
    ids, *header = tokenizer.encode_chat([], add_generation_prompt=True)
    ids, counted = [ids], [not answers_only]
    for message in raw["messages"]:
        if message["role"] not in ROLES or not isinstance(message["content"], str):
            raise ValueError(f"unknown role {message['role']!r}, or content that is no text")
        part = tokenizer.encode_chat([message])[1:]
        ids += part
        counted += [not answers_only or message["role"] == "assistant" and i >= len(header) for i in range(len(part))]
    return Row(ids, counted, task)


def plan_batches(lengths: np.ndarray, steps: int, args: argparse.Namespace) -> Tensor:
    """The rows of every step, (steps, batch_size), by seed alone: so a run can be resumed anywhere.

    Every epoch is in an order of its own. Where a batch is several micro-batches, each of these gets rows
    of like length, which need little padding, and the batch gets micro-batches at random.
    """
    generator, count = torch.Generator().manual_seed(args.seed), steps * args.batch_size
    epochs = [torch.randperm(len(lengths), generator=generator) for _ in range(-(-count // len(lengths)))]
    order, lengths = torch.cat(epochs)[:count], torch.from_numpy(lengths)
    if args.micro_batch_size < args.batch_size:
        pools = []
        for pool in order.split(POOL * args.batch_size):
            groups = pool[lengths[pool].argsort(stable=True)].view(-1, args.micro_batch_size)
            pools.append(groups[torch.randperm(len(groups), generator=generator)].flatten())
        order = torch.cat(pools)
    return order.view(steps, args.batch_size)


def collate(rows: list[Row], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids and targets (B, T), -100 where no loss is due, and real (B, T), False at padding."""
    length = max(len(row.ids) for row in rows) - 1
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    targets = torch.full((len(rows), length), -100)
    real = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids, counted = torch.as_tensor(row.ids), torch.as_tensor(row.counted)
        input_ids[i, :len(ids) - 1] = ids[:-1]
        targets[i, :len(ids) - 1] = torch.where(counted, ids, -100)[1:]
        real[i, :len(ids) - 1] = True
    return input_ids.to(device), targets.to(device), real.to(device)


# ---- Losses

def logits_in_chunks(model: FlexiDepth, x: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Float32 logits (n, V) of hidden states x (N, D), and targets (n,), no more than LOGITS at a time."""
    size = max(1, LOGITS // model.config.vocab_size)
    for start in range(0, len(x), size):
        yield model.head(x[start:start + size]).float(), targets[start:start + size]


def lm_loss(model: FlexiDepth, x: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of x (N, D) over count, and its gradient (N, D). The head is frozen, so
    the gradient can be had chunk by chunk, and no logits need to be kept for it."""
    x, loss = x.detach().requires_grad_(), 0.0
    for logits, target in logits_in_chunks(model, x, targets):
        part = F.cross_entropy(logits, target, reduction="sum") / count           # L_lm
        part.backward()
        loss = loss + part.detach()
    return loss, x.grad


def backward(model: FlexiDepth, batch: list[Row], args: argparse.Namespace, forward: Callable = None) -> list:
    """Gradients of L = alpha * L_skip + L_lm. Returns L_lm, L_skip and the keep rate of each routed layer.

    All processes are given the whole batch, and each runs its share in micro-batches. Both losses are means
    over the tokens of the whole batch: gradients do not depend on how it was split.
    """
    batch = sorted(batch, key=lambda row: len(row.ids))  # rows of one length need no padding
    real_tokens = sum(len(row.ids) - 1 for row in batch)
    counted_tokens = sum(np.count_nonzero(row.counted[1:]) for row in batch)
    parts = [batch[i:i + args.micro_batch_size] for i in range(0, len(batch), args.micro_batch_size)][RANK::WORLD]
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
        # Gradients of x and of L_skip go on from here. DDP and FSDP take means over processes; these are sums.
        torch.autograd.backward([x, skip], [gradient * WORLD, torch.full_like(skip, args.alpha * WORLD)])
        sums += torch.cat([torch.stack([lm, skip.detach()]), kept[real].sum(0) / real_tokens])
    return over_processes(sums).tolist()


def over_processes(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if WORLD > 1:
        dist.all_reduce(values)
    return values


def autocast(model: FlexiDepth) -> torch.autocast:
    """Compute in the base's dtype where the trained parts, in float32, meet it."""
    weight = model.model["embed_tokens"].weight
    return torch.autocast(weight.device.type, weight.dtype, enabled=weight.dtype != torch.float32)


# ---- Training

def distribute(model: FlexiDepth, args: argparse.Namespace) -> Callable:
    """What to call in place of model.hidden_states, so that the processes' gradients meet."""
    for layer in model.model["layers"] if args.checkpoint_activations else ():
        if layer.router is not None:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if args.shard:  # every process holds a part of each layer, and gets the others as it runs
        for module in (*model.model["layers"], model):
            fully_shard(module)
        register_fsdp_forward_method(model, "hidden_states")
    elif WORLD > 1:
        model.forward = model.hidden_states  # DDP runs forward; the head comes after it, in chunks
        return DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)
    return model.hidden_states


def train(model: FlexiDepth, rows: Rows, held_out: Rows | None, args: argparse.Namespace, run_of: dict) -> None:
    """Adam on routers and adapters; the base neither learns nor changes. Ctrl-C saves and ends it."""
    config, forward = model.config, distribute(model, args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, args.beta2), weight_decay=0.0)
    steps = args.steps or math.ceil(args.epochs * len(rows) / args.batch_size)
    batches, begun = plan_batches(rows.lengths, steps, args), resume(model, optimizer, args, run_of)
    plain, usual, warned = config.num_hidden_layers - len(config.routing_layers), 0.5, ""
    started, signals = time.time(), []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: (signals.append(1), say("stopping after this step ...")))
    metrics = open_metrics(args.out / "metrics.jsonl", begun)
    for step in range(begun + 1, steps + 1):
        batch, before = [rows[i] for i in batches[step - 1]], time.time()
        # Warm-up over 3 % of the steps, then a cosine to zero.
        lr = args.lr * min(step / (0.03 * steps), (1 + math.cos(math.pi * (step - 1) / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        lm, skip, *keep = backward(model, batch, args, forward)
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip or math.inf)
        norm = float(norm.full_tensor() if args.shard else norm)
        if not math.isfinite(lm + skip + norm):
            raise ValueError(f"step {step}: loss {lm}, gradient norm {norm}; a lower --lr or --clip 1 may help")
        optimizer.step()
        now, tokens, layers = time.time(), sum(len(row.ids) for row in batch), plain + sum(keep)
        note(metrics, step=step, lm_loss=lm, skip_loss=skip, layers=layers, kept=keep, grad_norm=norm, lr=lr,
             tokens_per_s=tokens / (now - before), memory=peak_memory(args.device))
        progress(step, steps, f"loss {lm:.4f}  skip loss {skip:6.3f}  layers used {layers:5.2f} of "
                 f"{config.num_hidden_layers}  {tokens / (now - before):,.0f} tokens/s  "
                 f"{(now - started) / (step - begun) * (steps - step):.0f} s left")
        usual = 0.97 * usual + 0.03 * np.array(keep)  # from the coin flips that gates begin with
        if step % max(1, steps // 20) == 0 and (warning := collapse(usual, config.routing_layers)) != warned:
            warned = warning
            say(warning or "routing no longer collapses")
        if args.eval_every and step % args.eval_every == 0 and held_out and step < steps:
            table = evaluate(model, held_out, args.micro_batch_size, args.device)
            note(metrics, step=step, valid=table)
            mean = mean_over_tasks(table)
            say(f"step {step}/{steps}  held out: loss of the base {mean['base_loss']:.4f}, with FlexiDepth "
                f"{mean['flexidepth_loss']:.4f}, layers used {mean['layers']:.2f}")
        stop = bool(over_processes(torch.tensor(float(bool(signals)), device=args.device)))
        if step % args.save_every == 0 or stop or step == steps:
            save_checkpoint(model, optimizer, step, args, run_of)
        if stop and step < steps:
            say(f"stopped after step {step}; the same command with --resume goes on from there")
            sys.exit(130)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nothing is left to save
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def open_metrics(file: Path, begun: int):
    """metrics.jsonl to append to, less what a stopped run noted after its last checkpoint."""
    if RANK:
        return None
    lines = []
    with suppress(ValueError):  # a last line may be half written
        lines += [line for line in (file.read_bytes().splitlines(True) if begun and file.is_file() else ())
                  if json.loads(line)["step"] <= begun]
    with whole(file) as out:
        out.writelines(lines)
    return open(file, "a", buffering=1, encoding="utf-8")


def note(metrics, **figures) -> None:
    if metrics:
        metrics.write(json.dumps(figures) + "\n")


def peak_memory(device: str) -> int:
    """Bytes: the most that torch held on the GPU, or this process in memory."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def collapse(keep: Sequence[float], layers: list[int]) -> str:
    """A warning in words if of a layer, or of all, nearly all tokens or nearly none keep it; else ''."""
    text = []
    for which, remedy, found in (
            ("nearly all tokens keep", "they save nothing: try a larger --alpha", [k > 0.99 for k in keep]),
            ("nearly no token keeps", "if the loss suffers, try a smaller --alpha or --lr", [k < 0.01 for k in keep])):
        if any(found):
            names = [layer for layer, yes in zip(layers, found) if yes]
            text += [f"{which} {'ANY routed layer' if all(found) else f'layers {names}'}; {remedy}"]
    return f"warning: routing collapses: {'. '.join(text)}" if text else ""


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("checkpoint-*.pt"))


def save_checkpoint(model, optimizer, step: int, args: argparse.Namespace, run_of: dict) -> None:
    """What --resume needs. A disk that is full costs the checkpoint, not the run."""
    state = get_state_dict(model, optimizer, options=TRAINED_ONLY)  # all processes give their parts
    if RANK == 0:
        try:
            with whole(args.out / f"checkpoint-{step:08}.pt") as out:
                torch.save({"step": step, "run": run_of, "state": state}, out)
            for old in checkpoints(args.out)[:-2]:
                old.unlink()
        except (OSError, RuntimeError) as error:
            say(f"warning: no checkpoint of step {step} ({error}); the last good ones stay: "
                f"{[file.name for file in checkpoints(args.out)]}")


def resume(model, optimizer, args: argparse.Namespace, run_of: dict) -> int:
    """Take on the newest checkpoint that can be read. Returns its step, 0 without checkpoints."""
    files = checkpoints(args.out)
    if files and not args.resume:
        raise ValueError(f"{args.out} holds an unfinished run ({files[-1].name}): give --resume, or another --out")
    for file in reversed(files):
        try:
            saved = torch.load(file, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            say(f"warning: {file} is not whole ({str(error)[:60]}...); trying the one before")
            continue
        if differ := [name for name in run_of if run_of[name] != saved["run"].get(name)]:
            raise ValueError(f"{file} is of another run: " + ", ".join(
                f"{name} was {saved['run'].get(name)!r}, is {run_of[name]!r}" for name in differ))
        state, optimizer_state = saved["state"]
        set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optimizer_state,
                       options=StateDictOptions(full_state_dict=True, strict=False))
        say(f"going on from step {saved['step']} ({file})")
        return saved["step"]
    if files:
        raise ValueError(f"{args.out}: none of its checkpoints can be read; remove them to begin anew")
    return 0


# ---- Results

@torch.no_grad()
def evaluate(model: FlexiDepth, rows: Sequence[Row], batch_size: int, device: str) -> dict[str, dict[str, float]]:
    """By task: rows, exact match and loss of base and FlexiDepth, mean layers used, of counted tokens.

    Greedy decoding gives a row's answer just if each of its tokens is the likeliest after those
    before it: one pass over whole rows tells what decoding them would match, and at what depth.
    """
    names = ("rows", "tokens", "base_exact", "base_loss", "flexidepth_exact", "flexidepth_loss", "layers")
    rows, tasks = sorted(rows, key=lambda row: len(row.ids)), sorted({row.task for row in rows})
    sums = torch.zeros(len(tasks), len(names), dtype=torch.float64, device=device)
    for start in range(0, len(rows), batch_size * WORLD):
        mine = rows[start:start + batch_size * WORLD][RANK::WORLD]
        part = mine or rows[:1]  # without rows of its own a process runs along, as FSDP needs, and adds nothing
        input_ids, targets, _ = collate(part, device)
        counted = targets != -100
        in_row, targets = counted.nonzero()[:, 0], targets[counted]

        def per_row(values: Tensor) -> Tensor:
            return sums.new_zeros(len(part)).index_add(0, in_row, values.double())
        figures = [sums.new_ones(len(part)), per_row(torch.ones_like(in_row))]
        for route in ("full", "learned"):
            with autocast(model):
                x, _, kept = model.hidden_states(input_ids, route=route)
                chunks = [(logits.argmax(-1) != target, F.cross_entropy(logits, target, reduction="none"))
                          for logits, target in logits_in_chunks(model, x[counted], targets)]
            wrong, losses = (per_row(torch.cat(each)) for each in zip(*chunks))
            figures += [wrong == 0, losses]
        figures += [per_row(layers_used(kept, model.config)[counted])]
        task = torch.tensor([tasks.index(row.task) for row in mine], dtype=torch.long, device=device)
        sums.index_add_(0, task, torch.stack([each.double() for each in figures], 1)[:len(mine)])
    table = dict(zip(tasks, (dict(zip(names, line)) for line in over_processes(sums).tolist())))
    return {task: {name: value if name in names[:2] else value / s["rows" if name.endswith("exact") else "tokens"]
                   for name, value in s.items()} for task, s in table.items()}


def mean_over_tasks(table: dict[str, dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in table.values()) / len(table) for key in next(iter(table.values()))}


def print_table(table: dict[str, dict[str, float]], layers: int) -> None:
    """The rows of `evaluate`, lowest depth first, and their mean over tasks."""
    mean, by_depth = mean_over_tasks(table), sorted(table.items(), key=lambda item: item[1]["layers"])
    say(f"\n{'':18}{'exact match':>19}{'loss':>20}{'layers used':>15}\n{'task':12}{'rows':>6}"
        f"{'base':>8}{'FlexiDepth':>12}{'base':>9}{'FlexiDepth':>12}{f'of {layers}':>14}")
    for task, row in [*by_depth, ("mean", mean)]:
        rows = "" if task == "mean" else round(row["rows"])
        say(f"{ascii(task)[1:-1]:12.12}{rows:>6}{row['base_exact']:>8.1%}{row['flexidepth_exact']:>12.1%}"
            f"{row['base_loss']:>9.4f}{row['flexidepth_loss']:>12.4f}{row['layers']:>14.2f}")
    kept = f", {mean['flexidepth_exact'] / mean['base_exact']:.1%} of exact match kept" if mean["base_exact"] else ""
    say(f"{1 - mean['layers'] / layers:.1%} of all layers skipped{kept}")


def write_full(model: FlexiDepth, args: argparse.Namespace, tensors: dict[str, Tensor]) -> None:
    """out/full: the base's files, linked where that can be, with the trained tensors as one shard more."""
    base, new, full = find_folder(args.model), args.out / ".full.part", args.out / "full"
    if (base / "model.safetensors").is_file():
        with safe_open(base / "model.safetensors", framework="pt") as opened:
            places = dict.fromkeys(opened.keys(), "model.safetensors")
    else:
        places = read_json(base / "model.safetensors.index.json")["weight_map"]
    places = {name: shard for name, shard in places.items() if not TRAINED.match(name)} | dict.fromkeys(tensors, "~")
    shards = sorted({*places.values()})  # "~", the new one, comes last
    called = {shard: f"model-{i:05}-of-{len(shards):05}.safetensors" for i, shard in enumerate(shards, 1)}
    others = [str(file.relative_to(base)) for pattern in ("*token*", "generation_config.json", "chat_template*",
                                                          "original/tokenizer.model") for file in base.glob(pattern)]
    shutil.rmtree(new, ignore_errors=True)
    for name in {*shards[:-1], *others}:
        target = new / called.get(name, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link((base / name).resolve(), target)
        except OSError:  # on another disk
            shutil.copyfile(base / name, target)
    dtype = model.model["embed_tokens"].weight.dtype
    (new / called["~"]).write_bytes(save({name: t.to(dtype) for name, t in tensors.items()}, {"format": "pt"}))
    size = sum(p.numel() * dtype.itemsize for p in model.parameters())
    index = {"metadata": {"total_size": size}, "weight_map": {name: called[shard] for name, shard in places.items()}}
    config = {"model_type": "ddllama", "routing_layers": model.config.routing_layers}
    for name, content in (("model.safetensors.index", index), ("config", read_json(base / "config.json") | config)):
        (new / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    shutil.rmtree(full, ignore_errors=True)
    new.replace(full)


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    if WORLD > 1:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl", timeout=timedelta(hours=1))
    data = args.data or find_folder(args.model) / "train.jsonl"
    valid = args.valid or (None if args.data else find_folder(args.model) / "valid.jsonl")
    if not args.data and not data.is_file():
        raise ValueError(f"{args.model} holds no train.jsonl; name a file of training rows with --data")
    # A base to be split is not copied to a device whole: its files are mapped, and each layer sent by itself.
    model = FlexiDepth.from_pretrained(args.model, args.flexidepth, device="cpu" if args.shard else args.device)
    for name, p in model.named_parameters():
        p.data = p.data.float() if TRAINED.match(name) else p.data  # bfloat16 would lose small updates
    config, tokenizer = model.config, Tokenizer.from_pretrained(args.model)
    if tokenizer.encoding.n_vocab > config.vocab_size:
        raise ValueError(f"{args.model}: its tokenizer has {tokenizer.encoding.n_vocab} tokens, its model {config.vocab_size}")
    args.seq_len = min(args.seq_len, config.max_position_embeddings)
    args.out.mkdir(parents=True, exist_ok=True)  # now, and not when there is something to lose
    rows = load_rows(data, tokenizer, args.out, args.seq_len, args.answers_only)
    held_out = load_rows(valid, tokenizer, args.out, args.seq_len, args.answers_only) if valid else []
    if len(rows) < args.batch_size:
        raise ValueError(f"{data}: {len(rows)} rows to use, fewer than --batch-size {args.batch_size}")
    say(f"{args.model}: layers {config.routing_layers} of {config.num_hidden_layers} route, "
        f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters to train, {len(rows)} rows")
    # What makes a run the one that it is; a checkpoint of another is refused. Norms tell bases of one shape apart.
    norms = [p.float().sum().item() for name, p in model.named_parameters() if "norm" in name and not p.requires_grad]
    names = ("alpha", "lr", "beta2", "clip", "epochs", "steps", "batch_size", "micro_batch_size", "seq_len", "seed",
             "answers_only")
    run_of = {"model": asdict(config), "norms": norms, "data": rows.name} | {name: getattr(args, name) for name in names}
    train(model, rows, held_out, args, run_of)
    tensors = get_model_state_dict(model, options=TRAINED_ONLY)
    table = evaluate(model, held_out, args.micro_batch_size, args.device) if held_out else {}
    if table:
        print_table(table, config.num_hidden_layers)
    if RANK == 0:
        with whole(args.out / "flexidepth.safetensors") as out:
            out.write(save(tensors, {"format": "pt"}))
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        with whole(args.out / "train.json") as out:
            out.write(json.dumps({"settings": settings, "config": asdict(config), "valid": table}, indent=2).encode())
        if args.full:
            write_full(model, args, tensors)
        for file in checkpoints(args.out):
            file.unlink()
        say(f"wrote {args.out / 'flexidepth.safetensors'}; see it at work: python sample.py --show-depth"
            + (f" --model {args.model}" if Path(args.model).resolve() != TINY else "")
            + (f" --flexidepth {args.out}" if args.out != Path("out") else ""))
    if WORLD > 1:
        dist.destroy_process_group()


def main() -> None:
    args = parse_args()
    try:
        run(args)
    except (OSError, ValueError) as error:
        fail(error)
    except torch.OutOfMemoryError as error:
        fail(f"{error}; a smaller --micro-batch-size or --seq-len, --checkpoint-activations or --shard needs less memory")
    except KeyboardInterrupt:  # outside of the training, which saves what it has
        sys.exit(130)


if __name__ == "__main__":
    main()
