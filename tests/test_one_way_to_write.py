"""The library writes its files through `files.write_whole` and `whole_file` alone: read from its source."""

import ast
from pathlib import Path

import pytest

import sagan_attn

SOURCE = Path(sagan_attn.__file__).parent

# Functions and methods that write a file, by their name, with the number of arguments from which they do.
WRITERS = {
    **dict.fromkeys(("dump", "copy", "copy2", "copyfile", "copytree", "move", "link", "symlink", "ZipFile"), 2),
    **dict.fromkeys(("savefig", "save", "write_text", "write_bytes", "tofile", "save_file", "save_model", "savez"), 1),
    **dict.fromkeys(("to_csv", "to_json", "to_parquet", "to_pickle", "to_excel", "to_html", "to_hdf"), 1),
    **dict.fromkeys(("imsave", "save_image", "write_image", "write_html", "symlink_to", "hardlink_to", "rename"), 1),
    **dict.fromkeys(("NamedTemporaryFile", "mkstemp", "touch"), 0),
    **dict.fromkeys(("FileIO", "SummaryWriter"), 1),
}
GIVE_BYTES = ("safetensors.torch.save", "safetensors.numpy.save")
FLAGS = ("O_WRONLY", "O_RDWR", "O_CREAT")
# Where files are written otherwise, how the call begins, and why none of them can be half of what somebody needs.
EXEMPT = {
    ("__main__.py", "os.open(os.devnull"): "nothing is kept there",
    ("ablation/cell.py", "os.open(log"): "appended to while the cell runs",
    ("ablation/store.py", "os.open(self.file(key, 'attempts')"): "a line is appended",
    ("ablation/store.py", "open(handle, 'a'"): "that line",
    ("ablation/store.py", "os.open(lock"): "a lock, always empty",
    ("ablation/store.py", "os.open(self.prepare(key) / 'lock'"): "a lock, always empty",
    ("ablation/store.py", "path.rename"): "a damaged file gets another name",
    ("commands/bench_data_sources.py", "Image.fromarray(pixels.numpy()).save"): "in a temporary folder",
}


def writing(source: str) -> list[str]:
    """The calls of a module that write files, or may: not what goes to stdout or stays in memory."""
    nodes = list(ast.walk(ast.parse(source)))
    known = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    known |= {node.name: f"sagan_attn.{node.name}" for node in nodes if isinstance(node, ast.FunctionDef)}
    streams = {
        target.id
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        for target in node.targets
        if isinstance(target, ast.Name) and ast.unparse(node.value) in ("io.BytesIO()", "io.StringIO()")
    }
    streams |= {
        ast.unparse(node.optional_vars)
        for node in nodes
        if isinstance(node, ast.withitem)
        and node.optional_vars
        and ast.unparse(node.context_expr)[:11] == "whole_file("
    }
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    return [ast.unparse(call) for call in calls if _writes(call, known, streams | {"sys.stdout"})]


def _writes(call: ast.Call, known: dict[str, str], streams: set[str]) -> bool:
    if isinstance(call.func, ast.Name):
        function = known.get(call.func.id, call.func.id)
    elif isinstance(call.func, ast.Attribute):
        function = f".{call.func.attr}"
    else:
        return False
    name = function.rpartition(".")[2]
    if name not in ("open", "replace") and name not in WRITERS:
        return False
    words = [ast.unparse(argument) for argument in [*call.args, *(keyword.value for keyword in call.keywords)]]
    if function.startswith("sagan_attn.") or function in GIVE_BYTES or not streams.isdisjoint(words):
        return False  # the library's own are looked at where they are
    if name == "open":
        modes = [word[1:-1] for word in words if word.startswith("'") and len(word) <= 5]
        return any(set(mode) & set("wax+") for mode in modes) or any(flag in word for flag in FLAGS for word in words)
    if name == "replace":  # not that of words, nor that of data classes
        return ast.unparse(call.func) == "os.replace" or (len(call.args) == 1 and not call.keywords)
    named = any(keyword.arg in ("path_or_buf", "path", "fname", "file", "stream") for keyword in call.keywords)
    return named or len(call.args) >= WRITERS[name]


def test_the_library_writes_files_in_one_way():
    found = [
        (path.relative_to(SOURCE).as_posix(), call)
        for path in SOURCE.rglob("*.py")
        if path != SOURCE / "files.py"
        for call in writing(path.read_text(encoding="utf-8"))
    ]
    others = [
        f"{module}: {call}"
        for module, call in found
        if not any(module == where and call.startswith(start) for where, start in EXEMPT)
    ]
    assert others == [], "write these with files.write_whole"
    for where, start in EXEMPT:
        assert any(module == where and call.startswith(start) for module, call in found), f"{where} no longer does that"


@pytest.mark.parametrize(
    "call",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "path.open('r+b')",
        "os.open(path, os.O_RDWR)",
        "path.write_text(words)",
        "torch.save(state, path)",
        "with lock(path) as file:\n    torch.save(state, file)",
        "json.dump(content, file)",
        "figure.savefig(path)",
        "table.to_csv(path)",
        "table.to_csv(path_or_buf=path)",
        "np.save(path, values)",
        "card.save(path)",
        "os.replace(one, other)",
        "one.replace(other)",
        "shutil.copy(one, other)",
    ],
)
def test_such_calls_are_found(call: str):
    assert writing(call) == [call.rpartition("\n")[2].strip()]


@pytest.mark.parametrize(
    "call",
    [
        "open(path)",
        "open(path, 'rb')",
        "json.dumps(content)",
        "words.replace('w', '+')",
        "table.to_csv(index=False)",
        "json.dump(content, sys.stdout)",
        "out = io.BytesIO()\nfigure.savefig(out)",
        "with whole_file(path) as file:\n    torch.save(state, file)",
        "from dataclasses import replace\nreplace(one, rows=1)",
    ],
)
def test_such_calls_are_not(call: str):
    assert writing(call) == []


def test_functions_are_known_by_where_they_come_from():
    assert writing("from torch import save\nsave(state, path)") == ["save(state, path)"]
    for module in ("torch", "numpy"):
        assert writing(f"from safetensors.{module} import save\nsave(state, {{'a': 'b'}})") == []
