"""How much of the base's benchmark scores FlexiDepth keeps, by lm-evaluation-harness (lm_eval).

    HF_ALLOW_CODE_EVAL=1 python tests/paper/benchmarks.py --flexidepth out --device cuda \\
        --model meta-llama/Meta-Llama-3-8B-Instruct \\
        --tasks mmlu hellaswag winogrande gsm8k humaneval coqa    # humaneval runs the model's code

The route "full" is the base, and "learned" is what the gates decide. "coin" keeps the same share of
each routed layer as "learned" did in the task, but for random tokens. In the table, kept is the
score over the base's. Answers and prompts are layers used: a position that predicts a token of an
answer (a continuation) belongs to the answer, and the others to the prompt, each time they are run.
Skipped is the share of all layers that was skipped in both.
"""
import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

import torch
from lm_eval import simple_evaluate, tasks, utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from flexidepth import FlexiDepth, Tokenizer, generate, layers_used  # noqa: E402

ROUTES = ["full", "learned", "coin"]
BATCH_SIZE = 16  # requests that run together
COLUMNS = ["score", "error", "kept", "answers", "prompts", "skipped"]
# The score of a task, if it is not the first one that the harness gives.
SCORES = {"hellaswag": "acc_norm,none", "lambada_openai": "acc,none", "coqa": "f1,none"}
LOCAL = {  # doc_to_text, doc_to_choice and doc_to_target of rows in llm-foundry's format
    "piqa": ("{{query.strip()}}\nAnswer:", "choices", "gold"),
    "arc_easy": ("{{query}}\nAnswer:", "choices", "gold"),
    "hellaswag": ("query", "choices", "gold"),
    "winogrande": ("gold", "context_options", "continuation"),  # the choices are contexts
    "lambada_openai": ("context", None, "{{' ' + continuation}}"),
}


class HarnessModel(TemplateLM):
    """FlexiDepth as a model of the harness. `seen` collects the decisions (T, R) of all tokens,
    with the number of those that belong to a prompt. Route "full" leaves it empty."""
    eot_token_id = prefix_token_id = None  # plain attributes, where the base class has properties

    def __init__(self, model: FlexiDepth, tokenizer: Tokenizer):
        super().__init__()
        self.model = model
        self.text = tokenizer
        self.max_length = model.config.max_position_embeddings
        self.eot_token_id = tokenizer.encode("", eos=True)[-1]
        self.prefix_token_id = [self.eot_token_id, *tokenizer.encode("", bos=True)][-1]
        self.route = "full"
        self.seen = []

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        return self.text.encode(string, bos=add_special_tokens is not False)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False) -> list[tuple[float, bool]]:
        # What is too long for the context loses its first tokens. The last token is not run.
        rows = [torch.tensor((context + answer)[-self.max_length - 1:])
                for _, context, answer in requests]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        results = {}
        for start in tqdm(range(0, len(rows), BATCH_SIZE), disable=disable_tqdm):
            batch = order[start:start + BATCH_SIZE]
            ids = pad_sequence([rows[i] for i in batch], batch_first=True)        # (B, T + 1)
            ids = ids.to(self.model.lm_head.weight.device)
            # The head, whose vocabulary is large, runs below, and only for answers.
            head, self.model.lm_head = self.model.lm_head, torch.nn.Identity()
            x, _, kept = self.model(ids[:, :-1], route=self.route)
            self.model.lm_head = head
            for b, i in enumerate(batch):
                end = len(rows[i]) - 1
                begin = max(0, end - len(requests[i][2]))
                logits = head(x[b, begin:end]).float()                            # (answer, V)
                targets = ids[b, begin + 1:end + 1, None]                         # (answer, 1)
                score = logits.log_softmax(-1).gather(-1, targets).sum().item()
                results[i] = score, torch.equal(logits.argmax(-1, keepdim=True), targets)
                if kept is not None:
                    self.seen.append((begin, kept[b, :end].cpu()))
        return [results[i] for i in range(len(rows))]

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        totals = []
        for request in tqdm(requests, disable=disable_tqdm):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1)
            parts = [(None, *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(parts, True)))
        return totals

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        answers = []
        for request in tqdm(requests, disable=disable_tqdm):
            options = normalize_gen_kwargs(request.args[1])
            room = max(1, self.max_length - options["max_gen_toks"])
            ids = torch.tensor([self.tok_encode(request.args[0])[-room:]])
            new = []
            for step in generate(
                    self.model, ids, options["max_gen_toks"], options.get("temperature", 0.0),
                    options.get("top_p", 1.0), stop_ids=self.text.stop_ids, route=self.route):
                if step.kept is not None:
                    self.seen.append((step.kept.shape[1] - 1, step.kept[0].cpu()))
                new += [token for token in step.token.tolist() if token not in self.text.stop_ids]
                text = self.text.decode(new)
                answer = postprocess_generated_text(text, options["until"], None)
                if answer != text:
                    break
            answers.append(answer)
        return answers


def local_task(folder: Path, name: str) -> dict:
    """The harness's own task with rows from disk. Only as a member of a group does it stay that."""
    files = [str(file) for file in folder.glob(f"{name}*.jsonl")]
    if name not in LOCAL or not files:
        raise ValueError(f"{folder}: no {name}*.jsonl; expected one of {', '.join(LOCAL)}")
    text, choice, target = LOCAL[name]
    return {"group": "local", "task": [{
        "task": name, "dataset_path": "json", "dataset_name": None, "process_docs": None,
        "dataset_kwargs": {"data_files": {"test": files}},
        "training_split": None, "validation_split": None, "test_split": "test",
        "doc_to_text": text, "doc_to_choice": choice, "doc_to_target": target}]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of a Llama, or a hub name in the local cache")
    add("--flexidepth", help="routers and adapters (default: those in the model's folder)")
    add("--tasks", nargs="+", required=True, help="tasks or groups of the harness, by name")
    add("--data", type=Path, help=f"folder of rows, TASK*.jsonl, for {', '.join(LOCAL)}")
    add("--limit", type=int, help="rows of each task (default: all)")
    add("--device", default="cpu", help="cpu, cuda, mps (cpu)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's")
    add("--out", type=Path, help="write all figures to this JSON file")
    args = parser.parse_args()
    specs = {task: local_task(args.data, task) if args.data else task for task in args.tasks}

    gates = args.flexidepth or args.model
    dtype = args.dtype and getattr(torch, args.dtype)
    model = FlexiDepth.from_pretrained(args.model, gates, device=args.device, dtype=dtype)
    lm = HarnessModel(model, Tokenizer.from_pretrained(args.model))
    config = model.config
    manager = tasks.TaskManager()
    generator = torch.Generator()

    def coin(layer_index: int, gate: torch.Tensor) -> torch.Tensor:
        rate = rates[config.routing_layers.index(layer_index)]  # of "learned", which ran before
        return torch.rand(gate.shape, generator=generator).to(gate.device) < rate

    rows = []
    for task, spec in specs.items():
        base = torch.nan
        for route in ROUTES:
            lm.route = coin if route == "coin" else route
            lm.seen = []
            generator.manual_seed(0)
            run = simple_evaluate(
                lm, tasks=[spec], limit=args.limit, task_manager=manager, bootstrap_iters=1000,
                log_samples=False, confirm_run_unsafe_code=True)
            results = run["results"][task]
            name = SCORES.get(task) or next(name for name in results if "," in name)
            error = results[name.replace(",", "_stderr,")]
            if route == "full":
                base = results[name]

            seen = lm.seen or [(1, torch.ones(2, len(config.routing_layers)))]  # none is skipped
            prompts = torch.cat([kept[:count] for count, kept in seen])
            answers = torch.cat([kept[count:] for count, kept in seen])
            rates = torch.cat([prompts, answers]).float().mean(0)                 # (R,)
            rows.append({
                "task": task, "route": route, "score": results[name],
                "error": torch.nan if error == "N/A" else error,
                "kept": results[name] / base if base else torch.nan,
                "answers": layers_used(answers, config).float().mean().item(),
                "prompts": layers_used(prompts, config).float().mean().item(),
                "skipped": 1 - layers_used(rates, config).item() / config.num_hidden_layers,
                "rates": rates.tolist(), "results": results})
        means = [{"task": "mean", "route": route} | {
            name: fmean(row[name] for row in rows if row["route"] == route) for name in COLUMNS
        } | {"error": torch.nan} for route in ROUTES]
        if args.out:
            figures = {"settings": vars(args), "rows": rows, "means": means}
            args.out.write_text(json.dumps(figures, indent=1, default=str))
    print(f"{'task':16}{'route':8}", *(f"{name:>8}" for name in COLUMNS))
    for row in rows + means:
        print(f"{row['task']:16}{row['route']:8}", *(f"{row[name]:8.4f}" for name in COLUMNS))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"benchmarks.py: {error}")
