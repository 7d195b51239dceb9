"""`torch.export` programs and ONNX graphs: made of a model, turned into the bytes of a file, run from these bytes."""

import copy
import io
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from sagan_attn.errors import ConfigError, SaganAttnError, first_line

__all__ = [
    "INPUT",
    "ONNX_PACKAGES",
    "OPSET",
    "OUTPUT",
    "allowed_sizes",
    "load_onnx",
    "load_program",
    "require_onnx",
    "to_onnx",
    "to_program",
    "to_pt2",
]

INPUT, OUTPUT = "images", "logits"
AXES = {0: "batch", 2: "height", 3: "width"}
OPSET = 18  # what torch writes without converting it
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
ONNX_LIMIT = 2**31 - 2**24  # bytes of weights: a protobuf has less than 2 GiB, and the graph wants some of them

Runner = Callable[[Tensor], Tensor]  # images [B, 3, H, W] to logits [B, classes]


def require_onnx() -> None:
    """Raise `ConfigError` unless what ONNX needs is installed."""
    if missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]:
        raise ConfigError(
            f"onnx needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'sagan_attn[export]'"
        )


def to_program(model: nn.Module, size: tuple[int, int], fixed_size: bool) -> ExportedProgram:
    """A model in eval mode as a program for images [B, 3, H, W] of any number, and of any size unless `fixed_size`.

    size: height and width that it is shown. Where they are free, larger ones are better: of a side of 1, anywhere in
    the model, torch concludes that it is always 1.

    Raises:
        ConfigError: the exporter finds that one size alone will do, which `fixed_size` asks for.
        SaganAttnError: it cannot be exported at all, or not for any number of images.
    """
    auto = torch.export.Dim.AUTO
    dynamic = {axis: auto for axis, name in AXES.items() if name == "batch" or not fixed_size}
    kind = type(model).__name__
    # A plain layout of weights: torch.export.save has its doubts about others.
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    try:
        program = torch.export.export(model, (torch.zeros(2, 3, *size),), dynamic_shapes=(dynamic,))
    except Exception as error:  # torch raises many kinds
        if fixed_size:
            raise SaganAttnError(f"{kind} cannot be exported: {first_line(error)}") from error
        raise ConfigError(
            f"{kind} cannot be exported for images of any size: {first_line(error)}; --fixed-size may do"
        ) from error
    fixed = [name for axis, name in AXES.items() if axis in dynamic and isinstance(_shape(program)[axis], int)]
    if "batch" in fixed:
        raise SaganAttnError(f"{kind} cannot be exported for any number of images: it fixes it")
    if fixed:
        raise ConfigError(f"{kind} fixes the {' and the '.join(fixed)} of its images; use --fixed-size")
    _forget_sources(program)
    return program


def allowed_sizes(program: ExportedProgram) -> dict[str, str]:
    """Bounds that the exporter found for the sizes that are not fixed, in words: {"height": "64 and more"}."""
    sizes = {}
    for axis, name in AXES.items():
        size = _shape(program)[axis]
        if not isinstance(size, int):
            sizes[name] = _in_words(size, program.range_constraints)
    return sizes


def _in_words(size: torch.SymInt, ranges: Any) -> str:
    expression: Any = size.node.expr  # of sympy: one symbol, or several where sizes depend on each other
    least, most = (
        expression.subs({symbol: getattr(ranges[symbol], end) for symbol in expression.free_symbols})
        for end in ("lower", "upper")
    )
    least = 1 if least <= 2 else least  # torch shows its graphs no 1, and they take it all the same
    return f"{least} to {most}" if most.is_integer and most < 2**31 else f"{least} and more"


def _shape(program: ExportedProgram) -> list[Any]:
    """Sizes of the images a program takes: int where fixed, else `torch.SymInt`."""
    name = next(iter(program.graph_signature.user_inputs))
    node: Any = next(node for node in program.graph.nodes if node.name == name)
    fixed = (not isinstance(size, torch.SymInt) or size.node.expr.is_number for size in node.meta["val"].shape)
    return [int(size) if known else size for size, known in zip(node.meta["val"].shape, fixed, strict=True)]


def _forget_sources(program: ExportedProgram) -> None:
    """Leave out where in whose source files each operation comes from: it holds paths of this machine."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta.pop("stack_trace", None)


def to_pt2(program: ExportedProgram) -> bytes:
    """The file of a program."""
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def load_program(data: bytes) -> Runner:
    """What runs the file of a program."""
    return torch.export.load(io.BytesIO(data)).module()


def to_onnx(program: ExportedProgram) -> bytes:
    """A program as the file of an ONNX graph with its weights.

    Raises:
        ConfigError: more weights than one file of ONNX holds.
        SaganAttnError: an operation that ONNX does not have.
    """
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size > ONNX_LIMIT:
        raise ConfigError(f"{size:,} bytes of weights do not fit into one ONNX file of 2 GiB: use --to torch-export")
    names = {axis: name for axis, name in AXES.items() if not isinstance(_shape(program)[axis], int)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.onnx and onnxscript warn about themselves
            from onnx_ir.passes.common import ClearMetadataAndDocStringPass

            onnx = torch.onnx.export(
                program,
                (),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=(names,),
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
            assert onnx is not None  # as it is with dynamo=False
            ClearMetadataAndDocStringPass()(onnx.model)  # paths of this machine
            return onnx.model_proto.SerializeToString()
    except Exception as error:  # torch and onnxscript raise many kinds
        raise SaganAttnError(f"the model has no ONNX form: {first_line(error)}") from error


def load_onnx(data: bytes) -> Runner:
    """What runs the file of an ONNX graph: ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return run
