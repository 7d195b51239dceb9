"""Every form is trained from a config by its name, and comes back from the run folder."""

import pytest
import torch
from block_forms import CONTROLS
from small_runs import SMALL

from sagan_attn import grafts_of
from sagan_attn.blocks import block_names
from sagan_attn.training import load_run
from sagan_attn.training.cli import main

QUICK = ["nonlocal"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in block_names() if n != "sagan"]
)
def test_fit(name: str, tmp_path):
    run_dir = tmp_path / "run"
    small = ["--data.n_train=64", "--data.n_val=32", "--trainer.max_epochs=1", "--model.schedule.warmup_epochs=0"]
    grafts = f'[{{"at": "local", "block": "{name}", "options": {{"path": "chunked"}}}}]'
    if name in CONTROLS:
        grafts = f'[{{"at": "local", "block": "{name}"}}]'
    assert main(["fit", *SMALL, *small, "--model.grafts", grafts, "--run_dir", str(run_dir)]) == 0
    model = load_run(run_dir).model
    (graft,) = grafts_of(model)
    assert graft.site == "local"
    image = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        trained = model(image)
        with grafts_of(model).disabled():
            assert not torch.equal(model(image), trained)
