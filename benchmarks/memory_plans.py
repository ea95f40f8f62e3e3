"""Memory plans of LLaMA-7B, 13B and 70B, and the state of comoving as a share of AdamW's on LLaMA-1B's matrices.

    python benchmarks/memory_plans.py [--out benchmarks/results/memory] [--docs docs/memory.md]

Writes plans.json, plans.md and a picture for each model, and puts the tables between the markers of the page in docs.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import comoving
from comoving.memory.plan import STATE, Plan, drafted, state_by_part
from comoving.memory.report import picture
from comoving.memory.shapes import subject
from comoving.units import UNITS, show_bytes
from comoving.weights import quantize

RANKS = {"llama-7b": 1024, "llama-13b": 1280, "llama-70b": 2048}
WIDE, FOUR = {"moments": "full"}, {"moments": "int4", "codec": "int4"}
LEAST = FOUR | {"bases": "int4"}
TOKENS = 256
HEADINGS = ("weights", "gradients", "moments", "frames", "feedback", "temporaries", "activations")
QUANTIZED = "Q-GaLore, weights in 8 bits"
"""The row whose matrices are stored in codes, all but the output head."""
BEGIN, END = "<!-- plans: written by benchmarks/memory_plans.py -->", "<!-- end of plans -->"


def rows() -> list[tuple[str, str, dict[str, Any]]]:
    """Name, recipe and options of each row."""
    return [
        ("AdamW", "adamw", {}),
        ("8-bit AdamW", "adamw", {"moments": "int8"}),
        ("GaLore", "galore", {}),
        ("LDAdam", "ldadam", {}),
        ("8-bit GaLore", "galore", {"moments": "int8"}),
        ("Q-GaLore, weights in bf16", "q-galore", {}),
        (QUANTIZED, "q-galore", {}),
        ("comoving-adamw", "comoving-adamw", {}),
        ("comoving-adamw, 4 bits", "comoving-adamw", FOUR),
        ("comoving-adamw, frames in 4 bits too", "comoving-adamw", LEAST),
    ]


def plans(model: str) -> dict[bool, list[tuple[str, Plan]]]:
    """The rows of one model, by whether parameters are stepped in the backward pass."""
    plain, coded = subject(model, torch.bfloat16), subject(model, torch.bfloat16)
    quantize(coded.module, skip=("lm_head",))
    made = dict[bool, list[tuple[str, Plan]]]()
    for layerwise in (False, True):
        caches: dict[bool, dict[Any, Any]] = {False: {}, True: {}}
        made[layerwise] = []
        for name, recipe, options in rows():
            known, cache = (coded if name == QUANTIZED else plain), caches[name == QUANTIZED]
            plan = drafted(
                known, recipe, RANKS[model], batch=1, sequence=TOKENS, ddp=None, fsdp=None, layerwise=layerwise,
                checkpointing=False, device="cuda", options={"foreach": False, **options}, cache=cache,
            )  # fmt: skip
            made[layerwise].append((name, plan))
            print(f"{model} {name} layerwise={layerwise}: {show_bytes(plan.peak_bytes)}", flush=True)
    return made


def table(lines: list[tuple[str, Plan]]) -> str:
    """A markdown table in GB."""
    text = [f"| | {' | '.join(HEADINGS)} | peak |", "|---|" + "---:|" * (len(HEADINGS) + 1)]
    for name, plan in lines:
        parts = plan.parts()
        cells = [f"{parts[part] / UNITS['GB']:.2f}" if parts[part] else "" for part in HEADINGS]
        text.append(f"| {name} | {' | '.join(cells)} | **{plan.peak_bytes / UNITS['GB']:.1f}** |")
    return "\n".join(text)


def shares() -> list[tuple[str, dict[str, float]]]:
    """comoving's state of LLaMA-1B's projected matrices at rank 1/8, by part, as shares of AdamW's in float32."""
    found: list[tuple[str, dict[str, float]]] = []
    for name, options in (
        ("moments in float32, feedback in 8 bits", WIDE),
        ("8 bits (default)", {}),
        ("4 bits", FOUR),
        ("4 bits, frames too", LEAST),
    ):
        module = subject("llama-1b", torch.bfloat16).module
        optimizer = comoving.build("comoving-adamw", module, 1e-3, 0.125, **options)
        projected = {p: site for p, site in optimizer.sites.items() if site.projected}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p in projected]
        adamw = 2 * 4 * sum(p.numel() for p in projected)
        parts = state_by_part(optimizer)
        found.append((name, {part: parts[part] / adamw for part in STATE if parts[part]}))
    return found


def share_table(found: list[tuple[str, dict[str, float]]]) -> str:
    """The shares as markdown."""
    parts = ("moments", "frames", "feedback")
    text = [f"| comoving, rank 1/8 | {' | '.join(parts)} | all |", "|---|---:|---:|---:|---:|"]
    for name, own in found:
        cells = " | ".join(f"{own.get(part, 0):.3f}" for part in parts)
        text.append(f"| {name} | {cells} | **{sum(own.values()):.3f}** |")
    return "\n".join(text)


def main() -> None:
    """Plan, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory"))
    parser.add_argument("--docs", type=Path, default=Path("docs/memory.md"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"torch": torch.__version__, "tokens": TOKENS, "models": {}}
    sections: list[str] = []
    for model, rank in RANKS.items():
        made = plans(model)
        record["models"][model] = {
            "layerwise" if layerwise else "step": {name: plan.to_dict() for name, plan in lines}
            for layerwise, lines in made.items()
        }
        bars = [(name, plan) for name, plan in made[False]] + [
            (f"{name}, layerwise", replace(plan)) for name, plan in made[True]
        ]
        (given.out / f"{model}.png").write_bytes(picture(bars))
        sections += [
            f"**{model}, rank {rank}, GB at the peak of `step()`**\n\n{table(made[False])}",
            f"**{model}, rank {rank}, GB at the peak, layer by layer in the backward pass**\n\n{table(made[True])}",
        ]
    found = shares()
    record["llama-1b, rank 1/8, share of AdamW's float32 state"] = dict(found)
    sections.append(f"**Share of AdamW's float32 state, LLaMA-1B's projected matrices**\n\n{share_table(found)}")
    text = "\n\n".join(sections) + "\n"
    (given.out / "plans.json").write_text(json.dumps(record, indent=1) + "\n")
    (given.out / "plans.md").write_text(text)
    if given.docs.exists():
        page = given.docs.read_text()
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        given.docs.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
