"""The arrows between the package's parts (DESIGN.md), read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sagan_attn

ROOT = Path(sagan_attn.__file__).parent
LAYERS = {
    "errors": set(),
    "files": set(),
    "functional": {"errors", "kernels"},  # kernels through one lazy door
    "kernels": {"errors", "functional"},
    "blocks": {"errors", "functional", "kernels"},
    "surgery": {"errors", "files", "functional", "kernels", "blocks"},
}
LAYERS["viz"] = LAYERS["bench"] = {*LAYERS["surgery"], "surgery"}
LAYERS["evaluation"] = {*LAYERS["viz"], "viz"}
LAYERS["training"] = {*LAYERS["evaluation"], "evaluation", "bench"}
LAYERS["ablation"] = LAYERS["inference"] = LAYERS["export"] = {*LAYERS["training"], "training"}
LAYERS["commands"] = {*LAYERS["ablation"], "ablation", "inference", "export"}
LAYERS["__main__"] = {*LAYERS["commands"], "commands"}
HEAVY = {"lightning", "matplotlib", "timm", "torchvision", "pytorch_lightning", "sklearn", "pandas", "jsonargparse"}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    """Full names of the modules a file imports anywhere, in functions too."""
    return [name for node in ast.walk(ast.parse(path.read_text())) for name in imported_by(node)]


def imported_by(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import of {node.module}"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path: Path):
    layer = layer_of(path)
    assert layer in LAYERS, f"{path} is in no layer of DESIGN.md"
    own = [name.split(".") for name in imported(path) if name.split(".")[0] == "sagan_attn"]
    for parts in own:
        assert len(parts) > 1, f"{path} imports the package root"
        if parts[1] in LAYERS:
            assert parts[1] == layer or parts[1] in LAYERS[layer], f"{layer} imports {'.'.join(parts)}"
        else:
            assert parts[1] == "__version__", f"{layer} imports {'.'.join(parts)}"
    if layer in LAYERS["surgery"] | {"surgery"}:
        heavy = {name.split(".")[0] for name in imported(path)} & HEAVY
        assert not heavy, f"{path} imports {heavy}"


def test_the_arrows_are_seen():
    assert "torch.nn" in imported(ROOT / "surgery" / "point.py")
    assert "torch.utils.flop_counter" in imported(ROOT / "surgery" / "cost.py")  # a lazy one
    assert {layer_of(path) for path in FILES} >= {"errors", "functional", "kernels", "blocks", "surgery"}


def test_functional_has_one_door_to_the_kernels():
    """A lazy one, behind which the operators are; and Triton is behind these, at the first call."""
    functional = [path for path in FILES if layer_of(path) == "functional"]
    doors = [path for path in functional if any(name.startswith("sagan_attn.kernels") for name in imported(path))]
    assert doors == [ROOT / "functional" / "door.py"]
    at_once = [name for node in ast.parse(doors[0].read_text()).body for name in imported_by(node)]
    assert not [name for name in at_once if name.startswith("sagan_attn.kernels")]
    of_triton = {path.name for path in FILES if any(name.split(".")[0] == "triton" for name in imported(path))}
    assert of_triton == {"backward.py", "forward.py", "tiles.py"}


def test_importing_the_package_loads_torch_alone():
    """So do the operators behind the kernels and attention in chunks with its derivative, which compile nothing."""
    code = """
import sys, sagan_attn

def loaded(*names):
    print(sorted({*names} & {*sys.modules}))

loaded(%HEAVY)
from sagan_attn import record_attention
import sagan_attn.kernels.op
from sagan_attn.functional import attend
x = sagan_attn.SelfAttention2d(8).gamma.new_ones(1, 1, 4, 3).requires_grad_()
attend(x, x, x, path="chunked").sum().backward()
loaded(%HEAVY)
from sagan_attn import HubGrafts
loaded("huggingface_hub")
assert HubGrafts is sagan_attn.HubGrafts
"""
    heavy = repr(sorted({*HEAVY, "torch._dynamo", "triton", "huggingface_hub"})).strip("[]")
    command = [sys.executable, "-c", code.replace("%HEAVY", heavy)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines() == ["[]", "[]", "['huggingface_hub']"]


def test_public_names_exist():
    for name in sagan_attn.__all__:
        assert getattr(sagan_attn, name) is not None
    assert sagan_attn.__all__ == sorted(sagan_attn.__all__)
