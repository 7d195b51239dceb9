"""Kill a process with SIGKILL at random moments while it saves; count the files that are neither the old nor the new.

    python benchmarks/survive_saving.py [--kills 300] [--json <file>]

In each round a new process writes one kind of file over and over, through the function that writes it in use, with
content that changes and grows, until it is killed: at any moment, or every second time soon after a file appeared
beside the one that it replaces. Every file has to be, byte for byte, that of the last complete save or of the one under
way, and to load. Then the file is written once more, after which nothing else may be in its folder. Writes
survive_saving.json beside this file and ends with 1 unless that holds.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

sys.path.extend(str(Path(__file__).parents[1] / "tests" / part) for part in ("", "ablation", "faults"))

import torch
from products import PRODUCTS, REPORT, Product

from sagan_attn.bench.machine import save
from sagan_attn.files import PART

HERE = Path(__file__).parent
NUMBERS = (1, 2, 3, 4, 5)  # what the contents depend on, in turn
WITH_TIME = "bench"  # its content has the time of writing: what it says is looked at instead

Contents = Mapping[str, bytes]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected(product: Product) -> dict[int, Contents]:
    """What is in the folder after a save of each number."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for number in NUMBERS:
            product.write(Path(folder), number)
            found[number] = contents(Path(folder))
    return found


def save_until_killed(product: Product, folder: Path, first: int, told: int) -> NoReturn:
    """In a process of its own. Tells the number before each save, and 0 after it."""
    try:
        while True:
            os.write(told, bytes([NUMBERS[first % len(NUMBERS)]]))
            product.write(folder, NUMBERS[first % len(NUMBERS)])
            os.write(told, b"\0")
            first += 1
    finally:
        os._exit(1)


def kill_one(product: Product, folder: Path, first: int, seconds: float, aimed: bool) -> tuple[list[int], int | None]:
    """The numbers of the complete saves, and that of the one under way.

    seconds: to wait, from the begin of the first save or, if aimed, from when a file is being written.
    """
    read, told = os.pipe()
    child = os.fork()
    if not child:
        save_until_killed(product, folder, first, told)
    os.close(told)
    said = os.read(read, 1)
    place = (folder / product.file).parent
    while aimed and not any(name.endswith(PART) for name in os.listdir(place)):
        pass
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    while more := os.read(read, 65536):
        said += more
    os.close(read)
    if not os.WIFSIGNALED(status):
        raise RuntimeError("a save failed before it was killed")
    begun = [number for number in said if number]
    return (begun[:-1], begun[-1]) if said[-1] else (begun, None)


def is_whole(name: str, found: bytes | None, file: str, allowed: list[Contents]) -> bool:
    if found is None or name != WITH_TIME:
        return any(found == of.get(file) for of in allowed)
    try:
        return any(json.loads(found)["values"] == json.loads(of[file])["values"] for of in allowed)
    except ValueError:
        return False


def soak(kills: int, seed: int, products: Mapping[str, Product]) -> dict[str, Any]:
    """Kills in turn over the products; what was found."""
    draw = random.Random(seed)
    names = list(products)
    right = {name: expected(product) for name, product in products.items()}
    corrupt: list[str] = []
    litter: list[str] = []
    while_saving, while_writing = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    with tempfile.TemporaryDirectory(dir=HERE.parent) as place:  # on a disk: /tmp may be none
        seconds = {}
        for name, product in products.items():
            folder = Path(place) / name
            folder.mkdir()
            product.write(folder, NUMBERS[0])
            started = time.perf_counter()
            product.write(folder, NUMBERS[0])
            seconds[name] = min(time.perf_counter() - started, 0.1)
        for kill in range(kills):
            name = names[kill % len(names)]
            product, folder = products[name], Path(place) / name
            first, aimed = draw.randrange(len(NUMBERS)), kill // len(names) % 2 == 1
            wait = draw.uniform(0, 0.005) if aimed else draw.uniform(0, 3) * seconds[name]
            done, under_way = kill_one(product, folder, first, wait, aimed)
            found = contents(folder)
            left = [file for file in found if file.endswith(PART)]
            while_saving[name] += under_way is not None
            while_writing[name] += bool(left)
            last = done[-1] if done else NUMBERS[0]
            allowed = [right[name][number] for number in (last, under_way) if number]
            files = found.keys() - left | allowed[0].keys()
            wrong = [file for file in files if not is_whole(name, found.get(file), file, allowed)]
            corrupt += [f"{name}: {file} after kill {kill}" for file in wrong]
            if not wrong:
                product.load(folder / product.file)
            product.write(folder, NUMBERS[0])
            litter += [f"{name}: {file} after kill {kill}" for file in contents(folder).keys() - allowed[0].keys()]
            print(f"\r{kill + 1} kills", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {
        "kills": kills,
        "kills_between_begin_and_end_of_a_save": while_saving,
        "kills_that_left_a_file_beside": while_writing,
        "files_corrupt": corrupt,
        "left_over_files": litter,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=HERE / "survive_saving.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # what the saves print
        found = soak(arguments.kills, arguments.seed, {**PRODUCTS, "report": REPORT})
    found["seconds"] = round(time.monotonic() - started)
    save(arguments.json, found)
    print(json.dumps(found, indent=1))
    return 1 if found["files_corrupt"] or found["left_over_files"] else 0


if __name__ == "__main__":
    sys.exit(main())
