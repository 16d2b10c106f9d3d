"""`compare`: the results of two files side by side."""

import argparse
from pathlib import Path

from minisgl.bench.record import Json, load

_KEYS = (
    "workload",
    "stage",
    "variant",
    "prompt_tokens",
    "run",
)  # what makes two results the same measurement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, help="a JSON file that this program wrote")
    parser.add_argument("after", type=Path, help="another one")


def run(args: argparse.Namespace) -> None:
    before, after = load(args.before), load(args.after)
    for name in ("hardware", "commit", "model"):
        if before.get(name) != after.get(name):
            print(f"{name}: {before.get(name)} -> {after.get(name)}")
    olds = {_key(result): result for result in before["results"]}
    matched = [(olds[_key(result)], result) for result in after["results"] if _key(result) in olds]
    if not matched:
        raise ValueError(f"{args.before} and {args.after} have no measurement in common")
    for old, new in matched:
        title = ", ".join(f"{key} {new[key]}" for key in _KEYS if key in new).removeprefix("workload ")
        print(f"\n{title}\n{'':<28}{'before':>14}{'after':>14}{'ratio':>8}   spread of the runs")
        for name in _metrics(old):
            if name in _metrics(new):
                a, b = _metrics(old)[name], _metrics(new)[name]
                ratio = f"{b / a:.3f}" if a else "-"
                spread = f"   {_spread(old, name)}, {_spread(new, name)}"
                print(f"  {name:<26}{a:>14,.5g}{b:>14,.5g}{ratio:>8}{spread}")


def _key(result: Json) -> tuple[str, ...]:
    return tuple(str(result.get(key)) for key in _KEYS)


def _metrics(result: Json) -> dict[str, float]:
    """All numbers of a result but single runs, those of a group such as percentiles under both names."""
    found = {}
    for name, value in result.items():
        if isinstance(value, list) and not name.startswith("all_"):  # the turns of a chat
            value = {str(turn): number for turn, number in enumerate(value, 1)}
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for sub, number in inner:
            if isinstance(number, int | float) and not isinstance(number, bool) and name not in _KEYS:
                found[f"{name}.{sub}" if sub else name] = float(number)
    return found


def _spread(result: Json, name: str) -> str:
    """How far the runs lie apart, relative to their median."""
    runs = result.get(f"all_{name}")
    if not isinstance(runs, list) or len(runs) < 2 or not result[name]:
        return "-"
    return f"{(max(runs) - min(runs)) / result[name]:.1%}"
