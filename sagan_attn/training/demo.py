"""The default run: a host alone, with attention, and with the control attention has to beat."""

import json
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sagan_attn.surgery import grafts_of
from sagan_attn.training.cli import SaganCLI
from sagan_attn.training.data import LookupData
from sagan_attn.training.run import RunPaths, load_run, write_json
from sagan_attn.training.stopping import StoppedBySignalError
from sagan_attn.viz import attention_at, attention_overlay
from sagan_attn.viz.draw import save_figure

__all__ = ["default_run"]

SITE = "local"
VARIANTS = {"host": None, "context-max": "context-max", "sagan": "sagan"}


@dataclass(frozen=True)
class Row:
    """One line of the table: test accuracy, parameters in all, seconds of training, gamma at the end."""

    variant: str
    accuracy: float
    parameters: int
    seconds: float
    gamma: float | None


def default_run(config: Path) -> None:
    """Train each variant with the same config and seed, print the table, draw one picture, and say where things are."""
    console = Console()
    folder = Path("runs") / f"lookup-{datetime.now():%Y%m%d-%H%M%S}"
    console.print("Which digit stands on the square of the marker's colour? Three runs with the same seed and data:")
    try:
        rows = [_train(config, folder / variant, variant, block) for variant, block in VARIANTS.items()]
    except StoppedBySignalError as stopped:
        advice = (
            f"python train.py fit --config {stopped.folder / 'config.yaml'} --resume auto goes on with this one of the "
            "three runs; the comparison itself begins anew"
        )
        raise StoppedBySignalError(stopped.signum, stopped.folder, advice) from None
    console.print(_table(rows))
    host, context, sagan = rows
    console.print(
        f"Attention brings {100 * (sagan.accuracy - host.accuracy):+.1f} points over the host alone and "
        f"{100 * (sagan.accuracy - context.accuracy):+.1f} over the control, which has the same number of parameters "
        "and sees the whole image too, but gives every position the same summary. Only the second figure is "
        "attention's own. One seed."
    )
    shares = _draw(folder / "sagan", folder / "attention.png")
    right = int((shares > 0.9).sum())
    console.print(
        f"The marker's positions put {shares.mean():.2f} of their weight on the square of its colour on average, and "
        f"over 0.9 in {right} of {len(shares)} test images."
    )
    write_json(
        folder / "results.json",
        {"rows": [asdict(row) for row in rows], "share_mean": float(shares.mean()), "over_0.9": right},
    )
    console.print(
        f"Picture: {folder / 'attention.png'}\nCheckpoint: {folder / 'sagan/checkpoints/best.ckpt'}\nAll: {folder}"
    )


def _train(config: Path, folder: Path, variant: str, block: str | None) -> Row:
    grafts = [] if block is None else [{"at": SITE, "block": block}]
    arguments = ["--config", str(config), "--model.grafts", json.dumps(grafts), "--run_dir", str(folder)]
    started = time.perf_counter()
    cli = SaganCLI(["fit", *arguments])
    seconds = time.perf_counter() - started
    best = str(RunPaths(folder).checkpoint("best"))
    (metrics,) = cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=best, verbose=False)
    network = cli.model.network
    gammas = [gamma.item() for gamma in grafts_of(network).gammas().values()]
    parameters = sum(p.numel() for p in network.parameters())
    return Row(variant, metrics["test/accuracy"], parameters, seconds, gammas[0] if gammas else None)


def _table(rows: list[Row]) -> Table:
    table = Table(title="lookup, test split")
    for column in ("model", "accuracy", "parameters", "seconds", "gamma"):
        table.add_column(column, justify="left" if column == "model" else "right")
    labels = {"host": "host alone", "context-max": "host + context-max (control)", "sagan": "host + sagan (attention)"}
    for row in rows:
        gamma = "" if row.gamma is None else f"{row.gamma:.2f}"
        table.add_row(labels[row.variant], f"{row.accuracy:.3f}", f"{row.parameters:,}", f"{row.seconds:.0f}", gamma)
    return table


def _draw(folder: Path, picture: Path, count: int = 500, shown: int = 4) -> torch.Tensor:
    """Draw the attention of the marker in some test images; return its share on the right square in `count` [count]."""
    run = load_run(folder)
    (graft,) = grafts_of(run.model)
    split = LookupData(**run.config["data"]["init_args"]).test_slots()
    images = run.transform.normalize(split.images[:count])
    marker, target = split.marker_slot[:count], split.target_slot[:count]
    side = 12  # cells of the map: 4 a slot
    centre = (marker // 3 * 4 + 1) * side + marker % 3 * 4 + 1
    queries = torch.stack([centre, centre + 1, centre + side, centre + side + 1], dim=1)  # the marker's inner cells
    weights = attention_at(run.model, graft, images, queries).mean(dim=1)  # [B, Q, M], over heads
    maps = weights.unflatten(2, (side, side))
    slots = maps.unflatten(3, (3, 4)).unflatten(2, (3, 4)).sum(dim=(3, 5)).flatten(2)  # [B, Q, 9]
    shares = slots.take_along_dim(target[:, None, None], dim=2).squeeze(2).mean(dim=1)  # [B]
    predicted = run.model(images[:shown]).argmax(dim=1)
    figure = attention_overlay(
        list(split.images[:shown]),
        list(maps[:shown, 0]),
        [divmod(int(query), side) for query in queries[:shown, 0]],
        titles=[f"label {label}, predicted {run.classes[int(p)]}" for label, p in zip(split.labels, predicted)],  # noqa: B905
        title="Where the marker looks: test images, attention of the cell with the cross",
    )
    save_figure(figure, picture)
    return shares
