"""What is drawn of each result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bars import Bar, Panel

Result = Mapping[str, Any]


def seconds(value: float) -> str:
    return f"{value:.2f} s" if abs(value) >= 0.1 else f"{value * 1e3:.1f} ms"


def nbytes(value: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} bytes"


def sums(
    medians: Mapping[str, Mapping[str, float]],
    keys: Sequence[str],
    tell: Callable[[float], str] = seconds,
) -> list[Bar]:
    """Return a bar for each method: its values of these keys, one after the other."""
    rows = {name: [one[key] for key in keys] for name, one in medians.items()}
    return [
        Bar(name, [max(value, 0.0) for value in values], tell(sum(values)))
        for name, values in rows.items()
    ]


def save(result: Result) -> list[Panel]:
    medians = result["medians"]
    blocking = {name: one for name, one in medians.items() if "blocked" in one}
    cores = f"GPT-2 124M with AdamW, 1.49 GB; {result['threads']} threads compute"
    return [
        Panel(
            "Training time lost per checkpoint (seconds)",
            sums(medians, ["lost"]),
            f"{cores}; until the checkpoint is durable",
        ),
        Panel(
            "Time until the call to save returns (seconds)", sums(blocking, ["blocked_in_training"])
        ),
        Panel(
            "Time until the checkpoint is durable, nothing else running (seconds)",
            [
                *sums({"bare direct write and sync": median_of(medians, "bare")}, ["bare"]),
                *sums(medians, ["durable"]),
            ],
        ),
        Panel("Extra memory at its peak", sums(medians, ["extra_memory"], nbytes)),
    ]


def device(result: Result) -> list[Panel]:
    medians = result["medians"]
    rates = {"pinned copy of 1 GiB": median_of(medians, "bare")}
    rates |= {f"{name}: snapshot": {"bare": one["copy"]} for name, one in medians.items()}
    about = "transformer of 1 B parameters, AdamW, on a CUDA device"
    return [
        Panel("Training time lost per checkpoint (seconds)", sums(medians, ["lost"]), about),
        Panel("One step (seconds)", sums(medians, ["step"])),
        Panel("Bytes copied from the device in one second", sums(rates, ["bare"], nbytes)),
    ]


def median_of(medians: Mapping[str, Mapping[str, float]], key: str) -> dict[str, float]:
    values = sorted(one[key] for one in medians.values())
    return {key: values[len(values) // 2]}


def load(result: Result) -> list[Panel]:
    medians = result["medians"]
    floor = {
        "bare direct read and a step": {
            "cold": median_of(medians, "bare")["bare"],
            "cold_first_step": median_of(medians, "step")["step"],
        }
    }
    parts = ("load", "first step after it")
    return [
        Panel(
            "Loading from a cold disk into a live model (seconds)",
            sums({**floor, **medians}, ["cold", "cold_first_step"]),
            "GPT-2 124M with AdamW, 1.49 GB; ours verifies every byte, the others none",
            parts,
        ),
        Panel(
            "Loading from the page cache (seconds)",
            sums(medians, ["hot", "hot_first_step"]),
            parts=parts,
        ),
        Panel(
            "Extra memory at its peak, from a cold disk",
            sums(medians, ["cold_extra_memory"], nbytes),
        ),
    ]


def resume(result: Result) -> list[Panel]:
    parts = ("python", "imports", "model", "resume", "step")
    medians = {
        f"{name}, at step {int(depth):,}" if depth.isdigit() else method: one
        for method, one in result["medians"].items()
        for name, _, depth in [method.rpartition(", ")]
    }
    parts = tuple(part for part in parts if all(part in one for one in medians.values()))
    return [
        Panel(
            "From the start of a process to the end of the first resumed step (seconds)",
            sums(medians, parts),
            "GPT-2 124M with AdamW; parts in the order of time",
            parts,
        )
    ]


def size(result: Result) -> list[Panel]:
    found: dict[str, list[Bar]] = {}
    for method, one in result["medians"].items():
        name, _, training = method.rpartition(", ")
        text = f"{nbytes(one['later'])} of {nbytes(one['first'])}"
        bar = Bar(name, [one["later"]], text, behind=one["first"])
        found.setdefault(training, []).append(bar)
    titles = {
        "full": "Bytes that each later checkpoint writes: full fine-tuning",
        "LoRA": "Bytes that each later checkpoint writes: LoRA, rank 8",
        "frozen": "Bytes that each later checkpoint writes: all frozen but the last block",
    }
    notes = {"full": "GPT-2 124M; the pale bar behind: the first checkpoint"}
    return [Panel(titles[key], bars, notes.get(key, "")) for key, bars in found.items()]


def goodput(result: Result) -> list[Panel]:
    medians = result["medians"]
    named = {
        f"{name}, a save every {one['save_steps']:.0f} steps": one for name, one in medians.items()
    }
    kills = round(result["seconds"] / result["between_kills"])
    return [
        Panel(
            f"Steps done in {result['seconds']:.0f} seconds, with {kills} kills",
            sums(named, ["steps"], lambda value: f"{value:.0f}"),
            "GPT-2 124M with AdamW; each saves at its best interval (Young, Daly)",
        )
    ]


def spread_of(one: Mapping[str, float]) -> tuple[float, float]:
    return one["lower_quartile"], one["upper_quartile"]


def step_overhead(result: Result) -> list[Panel]:
    titles = {"tiny": "tiny GPT-2 (1.7 ms a step)", "small": "small GPT-2 (0.25 s a step)"}
    return [
        Panel(
            f"Steps per second, relative to a bare loop: {titles[size]}",
            [
                Bar(name, [ratio["median"]], f"{ratio['median']:.2f}", spread=spread_of(ratio))
                for name, ratio in one["speed_over_bare"].items()
            ],
            "medians; the thin line spans the quartiles",
        )
        for size, one in result["sizes"].items()
    ]


def check_overhead(result: Result) -> list[Panel]:
    names = {"full": "every byte", "sampled": "samples"}
    return [
        Panel(
            f"Time that the recorder of unbroken check adds to a step: {size} GPT-2",
            [
                Bar(
                    f"unbroken check, {name}",
                    [one[key]["overhead"]["median"]],
                    f"{one[key]['overhead']['median']:.1%}",
                )
                for key, name in names.items()
            ],
        )
        for size, one in result["sizes"].items()
    ]


def resume_depth(result: Result) -> list[Panel]:
    bars = [
        Bar(f"unbroken, after {int(depth):,} steps", [value], seconds(value))
        for depth, value in result["seconds"].items()
    ]
    return [Panel("From train() to the end of the first resumed step", bars)]


def drop_in(result: Result) -> list[Panel]:
    bars = []
    for name, one in result["steps_per_second"].items():
        low, _, high = one["quartiles"]
        text = f"{one['ratio']:.2f}"
        bars.append(Bar(f"unbroken, {name}", [one["ratio"]], text, spread=(low, high)))
    title = "Steps per second of our Hugging Face Trainer, relative to transformers' own"
    return [Panel(title, bars, "medians; the thin line spans the quartiles")]


def distributed(result: Result) -> list[Panel]:
    steps = {name: one["step"] for name, one in result["steps"].items()}
    loads = {name: one for name, one in result["checkpoints"].items() if "load" in one}
    return [
        Panel("One step on two gloo ranks (seconds)", sums(steps, ["seconds"])),
        *(
            Panel(title, sums({name: one[key] for name, one in rows.items()}, ["seconds"]))
            for title, key, rows in (
                (
                    "Saving 354 MB of an FSDP2 model: time until durable (seconds)",
                    "durable",
                    result["checkpoints"],
                ),
                ("Time until the call to save returns (seconds)", "blocked", result["checkpoints"]),
                ("Loading it (seconds)", "load", loads),
            )
        ),
    ]


def stock_trainers(result: Result) -> list[Panel]:
    bars = []
    for trainer, cases in result["cases"].items():
        exact = sum(case["status"] == "exact" for case in cases.values())
        bars.append(Bar(trainer, [exact], f"{exact} of {len(cases)}", behind=len(cases)))
    title = "Stock configurations that resume exactly, of those that were checked"
    return [Panel(title, bars)]


DRAWINGS: dict[str, Callable[[Result], list[Panel]]] = {
    one.__name__: one
    for one in (
        device,
        save,
        load,
        resume,
        size,
        goodput,
        step_overhead,
        check_overhead,
        resume_depth,
        drop_in,
        distributed,
        stock_trainers,
    )
}
