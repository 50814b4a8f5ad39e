"""The tables of README.md, made of results.json, which reproduce.py measured.

Kept: exact match over the base's, mean over tasks, in percent. Layers used: of the tokens of the
answers, mean over tasks. Figures with ± are means over seeds and their standard deviation."""
from statistics import fmean, stdev

TASKS = ["phrase", "repeat", "copy", "story", "add", "multiply"]
POSITIONS = ["1", "2", "3", "4", "5", "6", "end"]  # of a token in the answer
BASE = "12x96"  # layers and width of tests/tiny-llama
LAYERS = 12

# What the paper keeps of Llama-3-8B-Instruct's quality, in percent, where it says so.
METHODS = {
    "attention only, by sequence": ("attention only, by sequence (MindSkip)", "60.2"),
    "random": ("random", ""),
    "random, adapters trained": ("random, adapters trained", ""),
    "last layers dropped": ("last layers dropped (LayerSkip)", "43.9"),
    "layers dropped by influence": ("layers dropped by influence (ShortGPT)", "32.0")}
PARTS = {
    "full": "102.1", "no K, V for skipped tokens": "84.3", "linear router": "68.7",
    "no adapter": "28.1", "no factors g, 1 - g": "", "linear penalty": "",
    "linear penalty, 3 alpha": "", "both paths seen": "", "both paths seen, linear router": "",
    "both paths seen, no adapter": ""}
# The layers that it uses by task, of 32, of which 16 are routed.
PAPER_DEPTH = {"repeat": 20.09, "copy": 21.95, "add": 22.45, "multiply": 23.90}


def of_seeds(results: dict, what: str) -> list[dict]:
    """The figures of a run with every seed."""
    seeds = range(results["settings"]["seeds"])
    return [results["runs"][f"{BASE}/{what}/{seed}"] for seed in seeds]


def of_flexidepth(results: dict) -> list[dict]:
    return of_seeds(results, f"alpha {results['settings']['alpha']:g}")


def mean_depth(figures: dict) -> float:
    return fmean(figures["layers"].values())


def kept(figures: dict, results: dict) -> float:
    base = results["runs"][f"{BASE}/base/0"]
    return 100 * fmean(figures["exact"][task] / base["exact"][task] for task in TASKS)


def with_spread(values: list[float], digits: int = 2) -> str:
    text = f"{fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    return text


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- The tiny Llama ------------------------------------------------------------------------------
QUALITY_HEAD = ["", "paper: kept, %", "kept, %", "layers used", *TASKS]


def quality_cells(results: dict, found: list[dict], depths: list[float]) -> list[str]:
    """Kept, layers used, and exact match of every task, of the seeds of one method."""
    return [with_spread([kept(figures, results) for figures in found], 1), with_spread(depths),
            *(f"{100 * fmean(figures['exact'][task] for figures in found):.1f}" for task in TASKS)]


def skipping(results: dict) -> str:
    base = results["runs"][f"{BASE}/base/0"]
    untrained = of_seeds(results, "untrained")
    depths = [mean_depth(figures) for figures in of_flexidepth(results)]
    rows = [["the base", "100", *quality_cells(results, [base], [mean_depth(base)])],
            ["FlexiDepth", "100.7", *quality_cells(results, of_flexidepth(results), depths)]]
    for method, (label, paper) in METHODS.items():
        if method in untrained[0]:
            found = [figures[method] for figures in untrained]
        else:
            found = of_seeds(results, method)
        used = depths  # methods that drop whole layers have FlexiDepth's mean depth by design
        if "layers" in found[0]:
            used = [mean_depth(figures) for figures in found]
        rows.append([label, paper, *quality_cells(results, found, used)])
    return markdown(QUALITY_HEAD, rows)


def parts(results: dict) -> str:
    rows = []
    for part, paper in PARTS.items():
        found = of_flexidepth(results) if part == "full" else of_seeds(results, part)
        depths = [mean_depth(figures) for figures in found]
        rows.append([part, paper, *quality_cells(results, found, depths)])
    return markdown(QUALITY_HEAD, rows)


def depth(results: dict) -> str:
    found = of_flexidepth(results)
    plain = LAYERS // 2
    lines = []
    for task in TASKS:
        layers = [figures["layers"][task] for figures in found]
        share = (fmean(layers) - plain) / plain
        spread = fmean(figures["spread"][task] for figures in found)
        row = [task, with_spread(layers), f"{spread:.2f}", f"{100 * share:.0f}", ""]
        if task in PAPER_DEPTH:
            row[-1] = f"{100 * (PAPER_DEPTH[task] - 16) / 16:.0f}"
        positions = [figures["positions"][task] for figures in found]
        for at in POSITIONS:
            known = at in positions[0]
            row.append(f"{fmean(each[at] for each in positions):.1f}" if known else "")
        lines.append((fmean(layers), row))
    head = ["task", "layers used", "spread of tokens", "routed layers run, %", "the same, paper",
            "token 1", *POSITIONS[1:]]
    return markdown(head, [row for _, row in sorted(lines)])


def alpha(results: dict) -> str:
    rows = []
    for price in results["settings"]["alphas"]:
        found = of_seeds(results, f"alpha {price:g}")
        rows.append([
            f"{price:g}", with_spread([mean_depth(figures) for figures in found]),
            with_spread([figures["layers_with_prompt"] for figures in found]),
            with_spread([100 * fmean(figures["exact"].values()) for figures in found], 1),
            with_spread([kept(figures, results) for figures in found], 1)])
    return markdown(["alpha", "layers used", "with the prompt", "exact match, %", "kept, %"], rows)


def make_tables(results: dict) -> dict[str, str]:
    """Markdown by name."""
    return {make.__name__: make(results) for make in (skipping, parts, depth, alpha)}
