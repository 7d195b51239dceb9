"""Write the tables of README's "Measured" from the JSON files beside this one.

    python benchmarks/readme.py

What stands between the two marks in README.md is replaced; a file that is not there leaves its lines out.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
MARKS = "<!-- measured: written by benchmarks/readme.py -->", "<!-- /measured -->"


def read(name: str) -> dict[str, Any] | None:
    path = HERE / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def measured() -> str:
    """What goes between the marks."""
    return "\n".join([*_ablations(), *_block(), *_scaling(), *_steps(), *_others()])


def _where(content: dict[str, Any]) -> str:
    machine = content["machine"]
    names = machine["gpu"] or f"{machine['threads']} cores of an {machine['cpu']} ({machine['cpu_capability']})"
    return f"{names}, torch {machine['versions']['torch']}, {machine['date'][:10]}"


def _ms(summary: dict[str, float]) -> str:
    """The median, to three figures."""
    value = summary["median"]
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _spread(summary: dict[str, float]) -> str:
    return f"{_ms(summary)} [{summary['min']:,.0f} to {summary['max']:,.0f}]"


def _ablations() -> Iterator[str]:
    """The verdicts of the longest budget, and the figures of each variant."""
    for path in sorted((HERE / "ablations").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        group = [group for group in content["groups"] if group["stage"] == "confirm"][-1]
        data = f" on {content['data']}" if content.get("data") else ""
        yield f"Ablation `{content['name']}`{data}, {group['title']} ([`RESULTS.md`](RESULTS.md) has every figure):"
        yield ""
        yield group["verdict"]
        yield ""
        headers = ("variant", "accuracy %", "difference, points", "p", "over strongest control", "parameters")
        yield "| " + " | ".join(headers) + " |"
        yield "|" + "---|" * len(headers)
        for row in group["rows"]:
            yield "| " + " | ".join(row[header] for header in headers) + " |"
        yield ""
        yield from content["status"]
        yield ""


def _block() -> Iterator[str]:
    for name in ("block_cpu", "block_cpu_bf16", "block_cuda"):
        content = read(name)
        if content is None:
            continue
        for dtype in dict.fromkeys(case["dtype"] for case in content["cases"]):
            cases = [case for case in content["cases"] if case["dtype"] == dtype and "sagan" in case["peers"]]
            yield f"The `sagan` block forward and backward, {dtype}, milliseconds ({_where(content)};"
            yield f"`benchmarks/{name}.json`). In brackets how many times as fast as the fastest peer of the same form,"
            yield "and as the usual block of `bmm`:"
            yield ""
            sides = list(dict.fromkeys((case["batch"], case["height"], case["width"]) for case in cases))
            yield "| channels | " + " | ".join(f"{b} maps of {h} x {w}" for b, h, w in sides) + " |"
            yield "|---" * (len(sides) + 1) + "|"
            for channels in dict.fromkeys(case["channels"] for case in cases):
                cells = []
                for side in sides:
                    found = [
                        case
                        for case in cases
                        if case["channels"] == channels
                        and case["backward"]
                        and (case["batch"], case["height"], case["width"]) == side
                    ]
                    cells.append(_cell(found[0]) if found else "-")
                yield f"| {channels} | " + " | ".join(cells) + " |"
            yield ""


def _cell(case: dict[str, Any]) -> str:
    ours = case["peers"]["sagan"]
    speeds = (ours["speed_over_best_peer"], ours["speed_over_plain"])
    return f"{_ms(ours['ms'])} ({', '.join('-' if s is None else f'{s:.2f}' for s in speeds)})"


def _scaling() -> Iterator[str]:
    content = read("scaling_cpu")
    if content is None:
        return
    yield "Time and peak memory of one map of 64 channels, forward and backward, beside the usual block of `bmm`"
    yield f"({_where(content)}; `benchmarks/scaling_cpu.json`):"
    yield ""
    names = ("sagan", "plain")
    yield "| map | " + " | ".join(f"{name}, ms | {name}, MB" for name in names) + " |"
    yield "|---" * 5 + "|"
    for case in content["cases"]:
        cells = []
        for name in names:
            peer = case["peers"].get(name)
            cells += ["-", "-"] if peer is None else [_ms(peer["ms"]), f"{peer['peak_bytes'] / 1e6:.1f}"]
        yield f"| {case['height']} x {case['width']} | " + " | ".join(cells) + " |"
    yield ""
    for dtype, fitted in content["exponents"].items():
        words = [
            f"{n}: time N^{fitted[n]['time']:.2f}, memory N^{fitted[n]['memory']:.2f}" for n in names if n in fitted
        ]
        yield f"Fitted from 64 x 64 on, {dtype}: {'; '.join(words)}."
    yield ""


def _steps() -> Iterator[str]:
    content = read("step_cpu")
    if content is None:
        return
    yield "A training step in float32, medians with the smallest and largest reading, and one image in eval mode"
    yield f"({_where(content)}; `benchmarks/step_cpu.json`):"
    yield ""
    yield "| host, grafts after | batch | step, ms | with grafts | peak memory | one image: host, grafted, fused, ms |"
    yield "|---" * 6 + "|"
    for case in content["cases"]:
        step, over, memory = case["step_ms"], case["grafted_over_host"], case["peak_bytes"]
        looks = ", ".join(_ms(time) for time in case["latency_ms"].values())
        yield (
            f"| {case['preset']}, `{'`, `'.join(case['at'])}` | {case['batch']} | {_spread(step['host'])} | "
            f"{_spread(step['grafted'])} ({over:.2f} times) | {memory['host'] / 1e6:,.0f} MB, "
            f"{memory['grafted'] / 1e6:,.0f} MB | {looks} |"
        )
    yield ""


def _others() -> Iterator[str]:
    yield "| what | figure | file |"
    yield "|---|---|---|"
    if content := read("cifar10_resnet20"):
        host, grafted = content["rows"][:2]
        yield (
            f"| ResNet-20 on {content['data']}, {content['epochs']} epochs, one seed, test accuracy of the last one | "
            f"host alone {host['test_accuracy']:.3f}; with `sagan` after `layer2` {grafted['test_accuracy']:.3f}: not "
            "distinguishable at one seed | `benchmarks/cifar10_resnet20.json` |"
        )
    if content := read("cifar10_fast_cpu"):
        curve = ", ".join(f"{row['val_accuracy']:.3f}" for row in content["curve"])
        yield (
            f"| `cifar10_fast_cpu.yaml` on {content['data']}: {content['wall_seconds']:.0f} s from the command's start "
            f"to its end | validation accuracy by epoch {curve}; test {content['test_accuracy']:.3f} | "
            "`benchmarks/cifar10_fast_cpu.json` |"
        )
    if content := read("grafts_alone"):
        sizes, accuracy = content["bytes"], content["test_accuracy"]
        same = all(content["bit_identical"].values())
        yield (
            f"| That host, its grafts trained alone for an epoch and saved alone: test accuracy "
            f"{accuracy['host']:.3f}, then {accuracy['host and grafts']:.3f} | {sizes['grafts']:,} bytes beside a "
            f"checkpoint of {sizes['host checkpoint']:,}; loaded onto a fresh host, "
            f"{'bit-identical' if same else 'other'} logits on all {content['test_images']:,} test images | "
            "`benchmarks/grafts_alone.json` |"
        )
    if content := read("ablation_soak"):
        kills = content["kills"]
        yield (
            f"| An ablation of {content['cells']} small runs under SIGKILL at random moments | {kills['cell']} runs "
            f"and {kills['runner']} runners killed: {content['cells_lost']} runs lost, "
            f"{len(content['files_corrupt'])} files corrupt, {content['cells_computed_again']} computed again, "
            f"of which {len(content['computed_again_without_being_killed'])} had not been killed | "
            "`benchmarks/ablation_soak.json` |"
        )
    if content := read("seeds_per_hour"):
        rate = {way: found["median"] for way, found in content["runs_per_hour"].items()}
        ratio = content["ratio"]
        yield (
            f"| Small runs an hour on {content['devices']}, `ablate --workers {content['workers']}` (each with its "
            f"test and knock-outs) against `fit` one after another | {rate['ablate']:,.0f} and {rate['fit']:,.0f}: "
            f"{ratio['median']:.2f} times as many ({ratio['min']:.2f} to {ratio['max']:.2f}) | "
            "`benchmarks/seeds_per_hour.json` |"
        )
    if content := read("survive_training"):
        yield (
            f"| Training under SIGKILL at random moments, gone on with `--resume auto` | {content['kills']} kills of "
            f"{content['runs']} runs, {content['before_the_first_step']} of them before the first step: "
            f"{len(content['damaged'])} files damaged, {len(content['could_not_go_on'])} runs that could not go on, "
            f"{len(content['ended_differently'])} that ended with other numbers than a run never stopped | "
            "`benchmarks/survive_training.json` |"
        )
    if content := read("survive_saving"):
        kinds = content["kills_between_begin_and_end_of_a_save"]
        yield (
            f"| Each of {len(kinds)} kinds of files, SIGKILL while it is replaced | {content['kills']} kills, "
            f"{sum(kinds.values())} of them between a save's begin and end: {len(content['files_corrupt'])} files "
            f"corrupt, {len(content['left_over_files'])} left over after the next save | "
            "`benchmarks/survive_saving.json` |"
        )
    if content := read("data_cpu"):
        for part, words in (("held", "held in memory"), ("streamed", "decoded anew")):
            found = content["results"].get(part)
            if found is not None:
                rates = [f"{name} {rate['median']:,.0f}" for name, rate in found["images_per_second"].items()]
                yield f"| images a second of the data path, {words} | {', '.join(rates)} | `benchmarks/data_cpu.json` |"
    if content := read("lightning_overhead"):
        words = [
            f"{values['ratio']['median']:.2f} ({values['ratio']['min']:.2f} to {values['ratio']['max']:.2f}) at "
            f"{values['ms_per_step']['bare']['median']:.0f} ms a step"
            for values in content.values()
            if isinstance(values, dict) and "ratio" in values
        ]
        yield (
            "| Lightning's overhead, an epoch of `fit` over a bare loop that ends with the same weights bit for bit | "
            f"{', '.join(words)} | `benchmarks/lightning_overhead.json` |"
        )


def main() -> None:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    README.write_text(f"{before}{MARKS[0]}\n\n{measured()}\n\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
