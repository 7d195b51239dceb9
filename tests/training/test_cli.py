"""The command line, run folders, and what bad input gets."""

import inspect
import json
import os
import re
import shutil
import signal

import lightning as L
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sklearn.metrics import balanced_accuracy_score, confusion_matrix
from small_runs import CONFIGS, SMALL

from sagan_attn import grafts_of
from sagan_attn.errors import CheckpointError
from sagan_attn.training.cli import SaganCLI, best_precision, main
from sagan_attn.training.data import LookupData
from sagan_attn.training.module import ClassifierModule
from sagan_attn.training.run import RunPaths, load_run


def test_a_fit_leaves_the_run_folder(small_run):
    names = {str(p.relative_to(small_run)) for p in small_run.rglob("*") if p.is_file() and "tfevents" not in p.name}
    assert names - {"tensorboard/hparams.yaml"} >= {
        "config.yaml", "environment.json", "classes.json", "transform.json", "metrics.csv",
        "checkpoints/best.ckpt", "checkpoints/last.ckpt",
    }  # fmt: skip
    assert list((small_run / "tensorboard").glob("events.out.tfevents*"))
    table = pd.read_csv(small_run / "metrics.csv")
    assert table["epoch"].tolist() == [0, 1]
    assert {"train/loss", "val/loss", "val/accuracy", "lr/host", "gamma/local.act.grafts.sagan"} <= set(table)
    assert not table.isna().any().any()
    assert json.loads((small_run / "classes.json").read_text()) == [str(i) for i in range(10)]
    environment = json.loads((small_run / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert len(environment["data"]["fingerprint"]) == 64
    config = yaml.safe_load((small_run / "config.yaml").read_text())
    assert config["trainer"]["precision"] == best_precision("cpu")
    assert "ckpt_path" not in config


def test_test_and_predict_take_the_best_checkpoint(small_run, capsys):
    assert main(["test", "--config", str(small_run / "config.yaml")]) == 0
    assert main(["predict", "--config", str(small_run / "config.yaml")]) == 0
    assert "predictions.csv" in capsys.readouterr().out
    paths, run = RunPaths(small_run), load_run(small_run)
    saved = load_file(paths.test_logits)
    split = LookupData(**run.config["data"]["init_args"]).test_slots()
    logits = run.model(run.transform.normalize(split.images))
    torch.testing.assert_close(saved["logits"], logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(saved["labels"], split.labels)
    metrics = json.loads(paths.test_metrics.read_text())
    assert metrics["images"] == 64
    assert metrics["test/accuracy"] == pytest.approx((logits.argmax(1) == split.labels).float().mean().item())
    assert metrics["test/nll"] == pytest.approx(metrics["test/loss"], rel=1e-5)
    assert metrics["test/balanced_accuracy"] == pytest.approx(balanced_accuracy_score(split.labels, logits.argmax(1)))
    confusion = pd.read_csv(paths.test / "confusion.csv", index_col=0)
    assert (confusion.to_numpy() == confusion_matrix(split.labels, logits.argmax(1), labels=range(10))).all()
    assert pd.read_csv(paths.test / "classes.csv")["images"].tolist() == split.labels.bincount(minlength=10).tolist()
    assert pd.read_csv(paths.test / "calibration.csv")["images"].sum() == 64
    worst = pd.read_csv(paths.test / "worst.csv")
    wrong = (logits.argmax(1) != split.labels).nonzero().squeeze(1).tolist()
    assert sorted(worst["index"]) == wrong
    assert worst["probability_class"].is_monotonic_increasing
    assert {path.name for path in paths.test.glob("*.png")} == {"confusion.png", "reliability.png", "worst.png"}
    predictions = pd.read_csv(paths.predictions)
    assert predictions["image"].tolist() == list(range(64))
    assert predictions["prediction"].tolist() == [int(run.classes[i]) for i in logits.argmax(1)]
    assert predictions[run.classes].sum(axis=1).to_numpy() == pytest.approx(1.0, abs=1e-5)


def test_load_run_gives_a_plain_module(small_run):
    run = load_run(small_run, checkpoint="last")
    assert not run.model.training
    assert [graft.site for graft in grafts_of(run.model)] == ["local"]
    saved = torch.load(RunPaths(small_run).checkpoint("last"), weights_only=True)["state_dict"]
    for key, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, saved[f"network.{key}"])


def test_print_config_and_every_shipped_config(capsys):
    for path in sorted(CONFIGS.glob("*.yaml")):
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", str(path), "--print_config"])
        assert stop.value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["model"]["host"]["name"] == yaml.safe_load(path.read_text())["model"]["host"]["name"]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(small_run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    arguments = ["fit", *SMALL, "--run_dir", str(folder)]

    def stop(module):
        if module.current_epoch == 1:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierModule, "on_train_epoch_start", stop)
        with pytest.raises(RuntimeError, match="power cut"):
            main(arguments)
    environment = (folder / "environment.json").read_text()
    assert main([*arguments, "--ckpt_path", "last"]) == 0
    never_stopped = pd.read_csv(small_run / "metrics.csv")
    pd.testing.assert_frame_equal(pd.read_csv(folder / "metrics.csv"), never_stopped)
    assert (folder / "environment.json").read_text() == environment


@pytest.mark.slow
def test_a_terminated_run_ends_with_143(tmp_path, monkeypatch):
    step = ClassifierModule.training_step

    def terminated(module, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(ClassifierModule, "training_step", terminated)
    assert main(["fit", *SMALL, "--run_dir", str(tmp_path / "run")]) == 143


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--trainer.max_epochs=3", "trainer.max_epochs 2 -> 3"),
        ("--model.optimizer.lr=5", "model.optimizer.lr 0.003 -> 5.0"),
        ("--model.freeze_host=true", "model.freeze_host False -> True"),
        ("--data.batch_size=64", "data.init_args.batch_size 32 -> 64"),
    ],
)
def test_a_run_is_not_continued_under_another_config(small_run, capsys, change, named):
    before = {path: path.read_bytes() for path in small_run.rglob("*") if path.is_file()}
    assert main(["fit", *SMALL, "--run_dir", str(small_run), "--ckpt_path", "last", change]) == 1
    assert named in capsys.readouterr().err
    assert {path: path.read_bytes() for path in small_run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_last_is_the_last_epoch_and_best_the_best(tmp_path, monkeypatch):
    scores = iter([0.1, 0.9, 0.5, 0.4])

    class Scripted(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                trainer.callback_metrics["val/accuracy"] = torch.tensor(next(scores))

    original = SaganCLI.instantiate_trainer

    def with_script(cli):
        trainer = original(cli)
        trainer.callbacks.insert(0, Scripted())
        return trainer

    monkeypatch.setattr(SaganCLI, "instantiate_trainer", with_script)
    monkeypatch.setattr(ClassifierModule, "validation_step", lambda *arguments: None)
    assert main(["fit", *SMALL, "--trainer.max_epochs=4", "--run_dir", str(tmp_path / "run")]) == 0
    paths = RunPaths(tmp_path / "run")
    assert torch.load(paths.checkpoint("best"), weights_only=True)["epoch"] == 1
    assert torch.load(paths.checkpoint("last"), weights_only=True)["epoch"] == 3


@pytest.mark.slow
def test_a_run_that_was_not_validated_is_tested_with_its_last_checkpoint(tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert main(["fit", *SMALL, "--trainer.limit_val_batches=0", "--run_dir", folder]) == 0
    assert not RunPaths(folder).checkpoint("best").exists()
    assert main(["test", "--config", f"{folder}/config.yaml"]) == 0
    assert "was not validated and has no best checkpoint: taking the last one" in capsys.readouterr().out
    assert RunPaths(folder).test_metrics.is_file()
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*best.ckpt"):
        load_run(folder)
    assert load_run(folder, checkpoint="last").classes


@pytest.mark.slow
def test_fast_dev_run_and_limited_tests_write_nothing(small_run, tmp_path, capsys):
    assert main(["fit", *SMALL, "--trainer.fast_dev_run=true", "--run_dir", str(tmp_path / "run")]) == 0
    assert not list((tmp_path / "run").rglob("*.*"))
    before = sorted(small_run.iterdir())
    config = ["--config", str(small_run / "config.yaml")]
    for command in (["test", "--trainer.limit_test_batches=1"], ["predict", "--trainer.limit_predict_batches=1"]):
        capsys.readouterr()
        assert main([command[0], *config, *command[1:]]) == 0
        assert "only 32 of 64 test images were seen: nothing is written" in capsys.readouterr().out
    assert set(before) <= set(small_run.iterdir())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(small_run, tmp_path):
    assert main(["fit", *SMALL, "--run_dir", str(tmp_path / "again")]) == 0
    first = pd.read_csv(small_run / "metrics.csv")
    pd.testing.assert_frame_equal(first, pd.read_csv(tmp_path / "again/metrics.csv"))


BAD_VALUES = [
    (["--model.grafts", '[{"at": "local", "block": "sagn"}]'], "unknown block 'sagn'; did you mean sagan"),
    (["--model.num_classes", "9"], r"num_classes \(9\) does not match the data, which have 10"),
    (["--ckpt_path", "nowhere.ckpt"], "there is no checkpoint nowhere.ckpt"),
    (["--trainer.devices", "0"], "trainer: "),
    (["--data.batch_size", "0"], r"batch_size \(0\)"),
    (["--data", "FolderData", "--data.root", "nowhere"], "nowhere"),
]
MORE_BAD_VALUES = [
    (["--model.grafts", '[{"at": "locale"}]'], "matches the name 'locale'; near names: local"),
    (["--model.grafts", '[{"at": "local", "options": {"haeds": 2}}]'], "no option 'haeds'; it has heads"),
    (["--model.grafts", '[{"at": "local", "options": {"heads": 3}}]'], r"heads \(3\) must divide"),
    (["--model.grafts", '[{"at": "head"}]'], "puts out a tensor of shape"),
    (["--model.host.name", "resnet19"], "unknown host 'resnet19'; near names: .*resnet"),
    (["--model.optimizer.name", "adamx"], "adamx"),
    (["--ckpt_path", "last"], "there is no checkpoint .*last.ckpt"),
    (["--model.host.name", "torchvision/alexnet"], r"does not take images of shape \(3, 48, 48\).*small_images"),
    (
        ["--model.host.name", "torchvision/googlenet", "--model.grafts", "[]"],
        "gives a GoogLeNetOutputs in training",
    ),
    (["--model.host.name", "timm/resnet18.nope"], "timm/resnet18.nope"),
    (["--trainer.accelerator", "xyz"], "trainer: "),
    (["--trainer.gradient_clip_algorithm", "foo"], "trainer: "),
    (["--trainer.max_epochs", "-1"], "max_epochs must be given"),
    (["--seed_everything", "-1"], "seed_everything"),
    (["--model.schedule.warmup_epochs", "2"], r"warmup_epochs \(2.0\) must lie in \[0, 2\)"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), [*BAD_VALUES, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE_BAD_VALUES)]
)
def test_bad_values_get_one_line_and_leave_nothing(arguments, message, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["fit", *SMALL, "--run_dir", str(folder), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") or "\nerror: " in error
    assert "Traceback" not in error
    assert re.search(message, error)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {host: {name: lookup-cnn}, grafs: []}", "grafs"),
        ("model: {host: {name: lookup-cnn}, grafts: [{att: local}]}", "att"),
        ("trainer: {max_epoch: 3}", "'trainer.max_epoch'; did you mean 'trainer.max_epochs'?"),
        ("data: {class_path: LookupData, init_args: {n_trian: 3}}", "n_trian"),
        ("data: {class_path: NoData}", "NoData"),
    ],
)
def test_a_wrong_key_is_named_and_ends_with_code_2(text, message, tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *SMALL, "--config", str(tmp_path / "wrong.yaml"), "--run_dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "usage:" not in error  # seventy lines
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten(small_run, tmp_path, capsys):
    assert main(["fit", *SMALL, "--run_dir", str(small_run)]) == 1
    assert "already holds a run" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(small_run, other)
    checkpoint = str(other / "checkpoints/best.ckpt")
    assert main(["test", "--config", str(small_run / "config.yaml"), "--ckpt_path", checkpoint]) == 1
    assert "is not of the run in" in capsys.readouterr().err


@pytest.mark.parametrize("made_before", [False, True])
def test_a_run_that_fails_at_its_start_leaves_nothing(tmp_path, monkeypatch, made_before):
    def fail(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ClassifierModule, "training_step", fail)
    if made_before:
        (tmp_path / "run").mkdir()
    with pytest.raises(RuntimeError, match="out of memory"):
        main(["fit", *SMALL, "--run_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_does_not_fit_is_refused(small_run, capsys):
    assert main(["test", "--config", str(small_run / "config.yaml"), "--model.grafts", "[]"]) == 1
    assert "grafts.sagan" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"junk", {"state_dict": {}}, [1]])
def test_foreign_checkpoints_are_refused(content, tmp_path, capsys):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert main(["test", *SMALL, "--run_dir", str(tmp_path / "run"), "--ckpt_path", str(path)]) == 1
    error = capsys.readouterr().err
    assert "is not a whole checkpoint of this library" in error
    assert error.count("\n") == 1


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.slow
def test_a_checkpoint_cannot_name_classes_or_options(small_run, tmp_path):
    checkpoint = torch.load(small_run / "checkpoints/best.ckpt", weights_only=True)
    assert "hyper_parameters" not in checkpoint
    target = tmp_path / "touched"
    checkpoint["hyper_parameters"] = {
        "label_smoothing": 0.9,
        "host": {"class_path": "os.system", "init_args": {"command": f"touch {target}"}},
        "_class_path": "os.system",
    }
    hostile = tmp_path / "hostile.ckpt"
    torch.save(checkpoint, hostile)
    cli = SaganCLI(["test", *SMALL, "--run_dir", str(tmp_path), "--ckpt_path", str(hostile)])
    assert cli.model.label_smoothing == 0.0
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", None, "config.yaml is missing"),
        ("config.yaml", "model: [", "config.yaml cannot be read"),
        ("config.yaml", "model: {}", "is not the config of a run"),
        ("config.yaml", "model: !!python/object/apply:os.system ['true']", "config.yaml cannot be read"),
        ("classes.json", '["0", ', "classes.json cannot be read"),
        ("checkpoints/best.ckpt", "not a checkpoint", "is not a whole checkpoint"),
        ("checkpoints/best.ckpt", None, "there is no checkpoint"),
    ],
)
def test_damaged_run_folders_are_named(small_run, tmp_path, name, content, message):
    folder = tmp_path / "copy"
    shutil.copytree(small_run, folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_run(folder)


def test_there_is_no_run_folder():
    with pytest.raises(CheckpointError, match="there is no run folder nowhere"):
        load_run("nowhere")


def test_precision_is_bf16_only_where_the_hardware_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for amx, avx, expected in ((False, False, "32-true"), (True, False, "bf16-mixed"), (False, True, "bf16-mixed")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert best_precision("auto") == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert best_precision("gpu") == "16-mixed"


def test_every_trainer_flag_is_there(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    shown = capsys.readouterr().out
    for flag in set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}:
        assert f"--trainer.{flag}" in shown
