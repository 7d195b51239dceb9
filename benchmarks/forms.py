"""Every form of the block against its published formula: `python benchmarks/forms.py [--quick]`.

For each form: the largest differences of output and gradients from an independent float64 reference and, where the
class is at hand, from torch's or timm's own; whether a fresh graft is the identity bit for bit; how many parameters
have moved after five steps; and whether it compiles, exports and runs in onnxruntime. `--quick` leaves out the last
three. Writes benchmarks/forms.json and prints a Markdown table. Needs the test dependencies.
"""

import argparse
import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.non_local_attn import NonLocalAttn
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from machine import save
from references import fill, parameters_of, reference

from sagan_attn import graft
from sagan_attn.blocks import block_names, convert, create_block

CHANNELS, SIZE = 32, (6, 8)
SOURCES = {
    "sagan": "Zhang et al. 2019, common PyTorch code",
    "sagan-paper": "Zhang et al. 2019, text",
    "biggan": "Zhang et al. 2019, TensorFlow code; Brock et al. 2019",
    "fastai": "fastai's layer",
    "botnet": "Srinivas et al. 2021, behind a gate",
    "nonlocal": "Wang et al. 2018",
    "nonlocal-caffe2": "Wang et al. 2018, Caffe2 code",
    "nonlocal-alexhex7": "AlexHex7's PyTorch code",
    "nonlocal-mmcv": "mmcv's NonLocal2d",
    "nonlocal-timm": "timm's NonLocalAttn",
    "multihead": "Vaswani et al. 2017",
    "additive": "Bahdanau et al. 2014",
    "cross": "Vaswani et al. 2017",
    "encoder": "Vaswani et al. 2017, norm first",
    "decoder": "Vaswani et al. 2017, norm first",
    "context-max": "control, of this library",
    "context-mean": "control, of this library",
    "identity": "control, of this library",
    "conv": "control, of this library",
    "se": "Hu et al. 2018, behind a gate",
    "gc": "Cao et al. 2019, behind a gate",
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in block_names()),
    *(("nonlocal", {"mode": mode}) for mode in ("gaussian", "dot_product", "concatenation")),
    ("multihead", {"position": "relative", "position_size": SIZE}),
    ("multihead", {"position": "sinusoidal"}),
]


def compare(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], wanted: list[Tensor], x: Tensor):
    """Largest difference of outputs and of gradients, each over the largest number compared."""
    outputs = ours(x), theirs(x)
    towards = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(output, [x, *wanted], towards) for output in outputs]
    return distance(outputs[0], outputs[1]), max(map(distance, *gradients))


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp(min=1)).item()


def numbers(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Differences in float64 and float32 from the reference, and from the real class if there is one."""
    found: dict[str, Any] = {}
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        block = fill(create_block(name, CHANNELS, **options)).to(dtype).eval()
        exact = copy.deepcopy(block).double()
        x = torch.randn(2, CHANNELS, *SIZE, dtype=dtype, requires_grad=True)
        wide = x.detach().double().requires_grad_()
        output, expected = block(x), reference(name, options, parameters_of(exact), wide)
        towards = torch.randn_like(output)
        ours, theirs = ([p for p in one.parameters() if p.requires_grad] for one in (block, exact))
        ours = torch.autograd.grad(output, [x, *ours], towards)
        theirs = torch.autograd.grad(expected, [wide, *theirs], towards.double())
        key = str(dtype).removeprefix("torch.")
        found[f"output_{key}"] = distance(output.double(), expected)
        found[f"gradient_{key}"] = max(distance(a.double(), b) for a, b in zip(ours, theirs, strict=True))
    real = REAL.get(name) if not options else None
    if real is not None:
        found["real_class"], found["real_output"], found["real_gradient"] = real(name)
    return found


def against(name: str, theirs: nn.Module, call: Callable[[Tensor], Tensor], **options: Any) -> tuple[str, float, float]:
    block = create_block(name, CHANNELS, **options).double().eval()
    theirs = fill(theirs.double()).eval()
    block.load_state_dict(convert(theirs.state_dict()), strict=True)
    x = torch.randn(2, CHANNELS, *SIZE, dtype=torch.float64, requires_grad=True)
    package = "timm" if type(theirs).__module__.startswith("timm") else "torch"
    return f"{package} {type(theirs).__name__}", *compare(block, call, [], x)


def rows(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def as_map(rows: Tensor) -> Tensor:
    return rows.transpose(1, 2).unflatten(2, SIZE)


def timm_non_local(name: str) -> tuple[str, float, float]:
    theirs = NonLocalAttn(CHANNELS)
    return against(name, theirs, theirs)


def timm_bottleneck(name: str) -> tuple[str, float, float]:
    theirs = BottleneckAttn(CHANNELS, feat_size=SIZE)
    return against(name, theirs, lambda x: x + theirs(x), position_size=SIZE)


def torch_attention(name: str) -> tuple[str, float, float]:
    theirs = nn.MultiheadAttention(CHANNELS, 4, batch_first=True)
    return against(name, theirs, lambda x: x + as_map(theirs(rows(x), rows(x), rows(x))[0]), bias=True)


def torch_encoder(name: str) -> tuple[str, float, float]:
    theirs = nn.TransformerEncoderLayer(
        CHANNELS, 4, 4 * CHANNELS, dropout=0, activation="gelu", batch_first=True, norm_first=True
    )
    return against(name, theirs, lambda x: as_map(theirs(rows(x))))


def torch_decoder(name: str) -> tuple[str, float, float]:
    theirs = nn.TransformerDecoderLayer(
        CHANNELS, 4, 4 * CHANNELS, dropout=0, activation="gelu", batch_first=True, norm_first=True
    )
    memory = torch.randn(2, CHANNELS, 3, 5, dtype=torch.float64)
    block = create_block(name, CHANNELS).double().eval()
    theirs = fill(theirs.double()).eval()
    block.load_state_dict(convert(theirs.state_dict()), strict=True)
    x = torch.randn(2, CHANNELS, *SIZE, dtype=torch.float64, requires_grad=True)
    found = compare(lambda x: block(x, memory), lambda x: as_map(theirs(rows(x), rows(memory))), [], x)
    return "torch TransformerDecoderLayer", *found


REAL = {
    "nonlocal-timm": timm_non_local,
    "botnet": timm_bottleneck,
    "multihead": torch_attention,
    "cross": torch_attention,
    "encoder": torch_encoder,
    "decoder": torch_decoder,
}


def identity(name: str, options: dict[str, Any]) -> bool:
    """Whether a grafted resnet18 puts out the same bits, in eval and train mode, float32 and under autocast."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10)
    images = torch.randn(2, 3, 64, 64)
    same = []
    grafted = copy.deepcopy(model)
    graft(grafted, ["layer2", "layer3"], block=name, options=options, example_input=images)
    for training in (False, True):
        for autocast in (False, True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outputs = [one.train(training)(images) for one in (model, grafted)]
            same.append(torch.equal(*outputs) and outputs[0].stride() == outputs[1].stride())
    return all(same)


def moved(name: str, options: dict[str, Any]) -> tuple[int, int, list[str]]:
    """Tensors of parameters that five steps from a fresh block changed by more than rounding; all; the others."""
    torch.manual_seed(0)
    block = create_block(name, CHANNELS, **options).double().train()
    before = {key: value.detach().clone() for key, value in block.named_parameters()}
    optimizer = torch.optim.Adam(block.parameters(), lr=1e-2, eps=1e-4)  # rounding alone is no step
    x, target = (torch.randn(4, CHANNELS, *SIZE, dtype=torch.float64) for _ in range(2))
    for _ in range(5):
        optimizer.zero_grad()
        (block(x) - target).square().sum().backward()
        optimizer.step()
    still = [key for key, value in block.named_parameters() if (value - before[key]).abs().max() < 1e-6]
    return len(before) - len(still), len(before), still


def compilers(name: str, options: dict[str, Any]) -> dict[str, bool]:
    """Whether torch.compile (inductor, no graph break), torch.export and onnxruntime agree, at two map sizes."""
    import onnxruntime

    torch.manual_seed(0)
    block = fill(create_block(name, CHANNELS, **options)).eval()
    inputs = [torch.randn(2, CHANNELS, 6, 8), torch.randn(3, CHANNELS, 4, 5)]
    with torch.no_grad():
        expected = [block(x) for x in inputs]

        def agree(run: Callable[[Tensor], Tensor]) -> bool:
            return all(torch.allclose(run(x), y, rtol=1e-4, atol=1e-4) for x, y in zip(inputs, expected, strict=True))

        torch.compiler.reset()
        found = {"compile": agree(torch.compile(block, fullgraph=True, dynamic=True))}
        auto = torch.export.Dim.AUTO
        dynamic = ({0: auto, 2: auto, 3: auto},)
        found["export"] = agree(torch.export.export(block, (inputs[0],), dynamic_shapes=dynamic).module())
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/block.onnx"
            torch.onnx.export(block, (inputs[0],), path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
            session = onnxruntime.InferenceSession(path)
            feed = session.get_inputs()[0].name
            found["onnx"] = agree(lambda x: torch.from_numpy(session.run(None, {feed: x.numpy()})[0]))
    return found


def table(results: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        "| form | source | output | gradient | real class: both | identity | moved | compile, export, ONNX |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        options = ", ".join(f"{key} {value}" for key, value in r["options"].items() if key != "position_size")
        real = f"{r['real_class']}: {r['real_output']:.0e}, {r['real_gradient']:.0e}" if "real_class" in r else ""
        still = f" (not {', '.join(r['without_effect'])})" if r["without_effect"] else ""
        tools = ", ".join("yes" if r[tool] else "NO" for tool in ("compile", "export", "onnx")) if "onnx" in r else ""
        lines.append(
            f"| `{r['form']}`{' ' + options if options else ''} | {r['source']} | {r['output_float64']:.0e} | "
            f"{r['gradient_float64']:.0e} | {real} | {'yes' if r['identity'] else 'NO'} | "
            f"{r['moved']} of {r['parameters']}{still} | {tools} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without compilers")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore")  # of the compilers, about themselves
    results = []
    for name, options in VARIANTS:
        changed, total, still = moved(name, options)
        result = {"form": name, "options": options, "source": SOURCES[name], **numbers(name, options)}
        result |= {"identity": identity(name, options), "moved": changed, "parameters": total, "without_effect": still}
        results.append(result if quick else result | compilers(name, options))
        print(f"{name} {options}", file=sys.stderr)
    print(table(results))
    if not quick:
        save("forms", {"channels": CHANNELS, "map": SIZE, "forms": results})


if __name__ == "__main__":
    main()
