"""Train a CNN with grafted attention: `python train.py` for the default run, `python train.py --help` for all else."""

from pathlib import Path

from sagan_attn.training.cli import main

if __name__ == "__main__":
    raise SystemExit(main(default_config=Path(__file__).parent / "configs" / "lookup.yaml"))
