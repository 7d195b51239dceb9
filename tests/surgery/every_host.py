"""The promises of a graft on every convolutional model of torchvision and timm, one by one.

    python tests/surgery/every_host.py [--quick] [MODEL ...]

The hosts are those of `host_table.py`: the smallest model of each family, untrained, on small images. For each a
place is chosen from `sites`, "sagan" is grafted there, and every promise is checked. Writes benchmarks/hosts.json and
benchmarks/hosts.md; with names (timm/resnet10t) or `--quick` (neither export nor compile) it renews those rows and
flags alone.
"""

import argparse
import gc
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from host_table import ENTRIES, Entry
from hosts import assert_unchanged, count_calls, open_gates, snapshot
from machine import machine

from sagan_attn import Site, graft, sites, ungraft
from sagan_attn.errors import SaganAttnError
from sagan_attn.surgery.grafts import Grafts

PROMISES = ("identity", "keys", "once", "gate", "backward", "ungraft")
EXTRA = ("export", "compile")
JSON, TABLE = (Path(__file__).parents[2] / "benchmarks" / name for name in ("hosts.json", "hosts.md"))


def choose(found: list[Site], image: int) -> Site:
    """The outermost, last place at the second-smallest map of at least 2 x 2 whose side is a halving of the image.

    Other sizes are windows or attention weights; for a generator, whose maps grow, this is the second-smallest too.
    """
    halvings = {-(-image // 2**k) for k in range(8)} | {image // 2**k for k in range(8)}
    maps = [site for site in found if min(site.height, site.width) >= 2 and site.calls == 1] or found
    regular = [site for site in maps if site.height in halvings] or maps
    sides = sorted({site.height for site in regular})
    side = sides[1] if len(sides) > 1 else sides[0]
    places = [site for site in regular if site.height == side]
    depth = min(site.name.count(".") for site in places)
    return [site for site in places if site.name.count(".") == depth][-1]


def same(output: Any, expected: Any) -> bool:
    """Bit-identical tensors, dtype and strides included, in the same lists, tuples and dicts."""
    ours, theirs = pytree.tree_flatten(output), pytree.tree_flatten(expected)
    return ours[1] == theirs[1] and all(
        one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)
        if isinstance(other, Tensor)
        else one == other
        for one, other in zip(ours[0], theirs[0], strict=True)
    )


def close(output: Any, expected: Any) -> bool:
    """Whether two outputs agree up to rounding."""
    try:
        torch.testing.assert_close(pytree.tree_leaves(output), pytree.tree_leaves(expected), rtol=1e-3, atol=1e-3)
    except AssertionError:
        return False
    return True


def check(entry: Entry, deep: bool = True) -> dict[str, Any]:
    """The row of one host: where the block went and which promises held, or why it was refused.

    Args:
        deep: export and compile as well; where the grafted model does not, the host alone is tried.
    """
    model, inputs = entry.build(), entry.inputs()
    row: dict[str, Any] = {"library": entry.library, "family": entry.family, "model": entry.model, "image": entry.size}
    try:
        if entry.at is None:
            found = sites(model, inputs)
            site = choose(found, entry.size)
            row |= {"places": len(found), "site": site.name, "layout": site.layout, "calls": site.calls}
            row["map"] = [site.channels, site.height, site.width]
            name, calls = site.name, site.calls
        else:
            name, calls = entry.at, 1
            row["site"] = name
        row |= promises(model, inputs, name, calls)
        if deep:
            row |= compilers(model, inputs, name)
    except SaganAttnError as error:
        row["refusal"] = str(error)
    return row


def promises(model: nn.Module, inputs: Any, site: str, calls: int) -> dict[str, bool]:
    """Each promise by name, and whether it held."""
    held = {}
    before = snapshot(model)
    with torch.no_grad():
        expected = model(inputs)
        if not same(model(inputs), expected):
            raise ValueError("the host itself puts out something else each time")
        grafts = graft(model, site, example_input=inputs)
        runs = count_calls(grafts[0].block)
        held["identity"] = same(model(inputs), expected)
        held["once"] = len(runs) == calls
        state = model.state_dict()
        host = [key for key in state if ".grafts." not in f".{key}"]  # a shared module has its block's keys twice
        values = zip(host, before["values"], strict=True)
        held["keys"] = host == before["keys"] and all(torch.equal(state[key], value) for key, value in values)
        open_gates(grafts)
        held["gate"] = not same(model(inputs), expected)
    held["backward"] = reaches_every_parameter(model, inputs, grafts)
    ungraft(model)
    model.zero_grad()
    try:
        assert_unchanged(model, before)
    except AssertionError:
        held["ungraft"] = False
    else:
        with torch.no_grad():
            held["ungraft"] = same(model(inputs), expected)
    return {name: held[name] for name in PROMISES}


def reaches_every_parameter(model: nn.Module, inputs: Any, grafts: Grafts) -> bool:
    """Whether a backward pass gives each parameter of the block a finite gradient that is not 0.

    The key bias adds the same to all scores of a query, so that its gradient is 0 by nature: there it must exist.
    """
    calm(model, inputs, grafts)
    outputs = [leaf for leaf in pytree.tree_leaves(model(inputs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    sum(leaf.float().square().sum() for leaf in outputs).backward()
    grads = {name: parameter.grad for name, parameter in grafts.named_parameters()}
    return all(
        grad is not None and bool(grad.isfinite().all()) and (name.endswith("key.bias") or bool(grad.any()))
        for name, grad in grads.items()
    )


def calm(model: nn.Module, inputs: Any, grafts: Grafts) -> None:
    """Smaller queries and keys where the maps of an untrained host are large, for a softmax that is not saturated."""
    sizes: list[float] = []
    block = grafts[0].block
    handle = block.register_forward_pre_hook(lambda _, args: sizes.append(args[0].abs().max().item()))
    with torch.no_grad():
        model(inputs)
        handle.remove()
        block.query.weight.div_(max(1.0, *sizes))
        block.key.weight.div_(max(1.0, *sizes))


def compilers(model: nn.Module, inputs: Any, site: str) -> dict[str, Any]:
    """Whether the grafted model exports and compiles: True, False, or "host" where the host alone does not either."""
    row: dict[str, Any] = {}
    grafts = graft(model, site, example_input=inputs)
    open_gates(grafts)
    errors = {kind: attempt(kind, model, inputs) for kind in EXTRA}
    ungraft(model)
    for kind, error in errors.items():
        row[kind] = error is None
        if error is not None:
            alone = attempt(kind, model, inputs)
            row[kind] = False if alone is None else "host"
            row[f"{kind}_error"] = error if alone is None else alone
    return row


def attempt(kind: str, model: nn.Module, inputs: Any) -> str | None:
    """What went wrong in exporting or compiling the model, None if nothing did."""
    torch.compiler.reset()
    with torch.no_grad():
        expected = model(inputs)
        try:
            if kind == "export":
                other = torch.export.export(model, (inputs,), strict=False).module()
            else:
                other = torch.compile(model, fullgraph=True, backend="eager")
            return None if close(other(inputs), expected) else "the outputs differ"
        except Exception as error:  # whatever torch may raise: it is put down
            return first_line(error)
        finally:
            torch.compiler.reset()


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def write(rows: list[dict[str, Any]]) -> None:
    """benchmarks/hosts.json and the table of it, benchmarks/hosts.md."""
    content = json.dumps({"machine": machine(), "hosts": rows}, indent=1) + "\n"
    for path, text in ((JSON, content), (TABLE, table(rows))):
        part = path.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)  # whole at any time: a sweep may be stopped


def table(rows: list[dict[str, Any]]) -> str:
    """Totals, a row for each host, and the reasons of refusals and failures, in Markdown."""
    grafted = [row for row in rows if "identity" in row]
    refused = [row for row in rows if "refusal" in row]
    failed = [row for row in rows if "failure" in row or not all(row.get(flag, True) for flag in PROMISES + EXTRA)]
    words = {True: "yes", False: "**no**", "host": "host does not", None: ""}
    versions = machine()["versions"]
    lines = [
        "# Every host",
        "",
        "A `sagan` block grafted into the smallest model of every family of torchvision "
        f"{versions['torchvision']} and timm {versions['timm']} (torch {versions['torch']}), by "
        "`python tests/surgery/every_host.py`. The columns are explained below the table.",
        "",
        f"{len(rows)} hosts: {len(grafted)} grafted, {len(refused)} refused, {len(failed)} with a failure.",
        "",
        "| promise | held | of | host alone does not either |",
        "|---|---|---|---|",
    ]
    for flag in PROMISES + EXTRA:
        asked = [row[flag] for row in grafted if flag in row]
        lines.append(f"| {flag} | {asked.count(True)} | {len(asked)} | {asked.count('host') or ''} |")
    columns = ("family", "model", "image", "place", "map", *PROMISES, *EXTRA)
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in grafted:
        sizes = " x ".join(map(str, row.get("map", [])))
        calls = f", {row['calls']} times" if row.get("calls", 1) > 1 else ""
        cells = [f"{row['library']} {row['family']}", row["model"], str(row["image"]), f"`{row['site']}`"]
        cells += [f"{sizes} {row.get('layout', '')}{calls}", *(words[row.get(flag)] for flag in PROMISES + EXTRA)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "identity: the output right after grafting is that before, bit for bit, dtype and strides too. keys: the "
        "host's state-dict keys keep name, order and value. once: the block runs once for each time its place fires. "
        "gate: gamma of 0.7 changes the output. backward: every parameter of the block gets a gradient. ungraft: keys, "
        "tensors, hooks, modules and the output are as before. export: `torch.export.export(strict=False)`; compile: "
        '`torch.compile(fullgraph=True, backend="eager")`; both give the output of the grafted model.',
    ]
    if refused:
        lines += ["", "## Refused", "", "| family | model | asked for | reason |", "|---|---|---|---|"]
        lines += [
            f"| {row['library']} {row['family']} | {row['model']} | `{row.get('site', '')}` | {cell(row['refusal'])} |"
            for row in refused
        ]
    if failed:
        lines += ["", "## Failed", "", "| model | what |", "|---|---|"]
        for row in failed:
            broken = [flag for flag in PROMISES + EXTRA if not row.get(flag, True)]
            lines.append(f"| {row['model']} | {cell(row.get('failure', ', '.join(broken)))} |")
    alone = [(row, kind) for row in grafted for kind in EXTRA if f"{kind}_error" in row]
    if alone:
        lines += ["", "## Why a host does not export or compile", "", "| model | | error |", "|---|---|---|"]
        lines += [f"| {row['model']} | {kind} | {cell(row[f'{kind}_error'])} |" for row, kind in alone]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="names in the table; all by default")
    parser.add_argument("--quick", action="store_true", help="neither export nor compile")
    arguments = parser.parse_args()
    unknown = set(arguments.models) - {entry.key for entry in ENTRIES}
    if unknown:
        parser.error(f"no such hosts: {', '.join(sorted(unknown))}")
    warnings.simplefilter("ignore")  # of timm and torch about themselves
    old = json.loads(JSON.read_text(encoding="utf-8"))["hosts"] if JSON.exists() else []
    rows = {f"{row['library']}/{row['model']}": row for row in old}
    for entry in ENTRIES:
        if arguments.models and entry.key not in arguments.models:
            continue
        start = time.perf_counter()
        try:
            row = check(entry, deep=not arguments.quick)
        except Exception as error:  # put down as a failure, and on to the next host
            row = {"library": entry.library, "family": entry.family, "model": entry.model, "image": entry.size}
            row["failure"] = first_line(error)
        if arguments.quick:
            deep = (*EXTRA, *(f"{kind}_error" for kind in EXTRA))
            row |= {key: value for key, value in rows.get(entry.key, {}).items() if key in deep}
        rows[entry.key] = row
        print(f"{time.perf_counter() - start:6.1f} s  {json.dumps(row)}", flush=True)
        write([rows[other.key] for other in ENTRIES if other.key in rows])
        gc.collect()


if __name__ == "__main__":
    main()
