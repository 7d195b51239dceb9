"""Arguments of a short run on a few lookup images."""

from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = [
    "--config",
    str(CONFIGS / "lookup.yaml"),
    "--trainer.max_epochs=2",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--model.schedule.warmup_epochs=1",
    "--data.n_train=256",
    "--data.n_val=64",
    "--data.n_test=64",
    "--data.batch_size=32",
]
