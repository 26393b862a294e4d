"""The `pacl` command line lists its commands and all their options, and every spelling of an option has its meaning."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from pacl.cli import COMMANDS, main
from pacl.commands import EXAMPLES
from pacl.data.command import ACTIONS
from pacl.evaluate.command import TASKS
from pacl.training.config import TrainConfig, dump_config
from pictures import encode, picture

OF_MODEL = "--checkpoint --model --pretrained --templates --stride --max-image-pixels --device --help"
OF_IMAGES = (
    f"{OF_MODEL} --words --classes --short-side --window --window-stride --threshold --entropy --logit-scale --out"
)
OF_PAIRS = "--dataset-type --csv-separator --csv-img-key --csv-caption-key --image-root --help"
OF_TASKS = "--checkpoint --model --pretrained --out --device"
OF_DATA = f"{OF_TASKS} --data-root --dataset --class-file --limit --partial"
OPTIONS = {
    "look": f"{OF_IMAGES} --scale",
    "segment": OF_IMAGES,
    "serve": f"{OF_MODEL} --port --examples --no-browser",
    "data pack": f"{OF_PAIRS} --scenes --masks --max-image-pixels --out --shard-size --shuffle --seed",
    "data check": f"{OF_PAIRS} --scenes --masks --max-image-pixels --sample --json",
    "demo": "--out --quick --full --seed --threads --clip-steps --embedder-steps --help",
    "doctor": "--json --help",
    "evaluate": "--help",
}
EVALUATE_OPTIONS = {
    "segmentation": f"{OF_DATA} --protocol --stride --threshold --check",
    "retrieval": f"{OF_TASKS} {OF_PAIRS} --data --scenes --plain --batch-size --workers",
    "alignment": f"{OF_DATA} --short-side --templates --plain",
    "coherence": f"{OF_DATA} --short-side --patches --pairs --seed",
    "classification": f"{OF_DATA} --templates --no-plain --batch-size --workers",
    "table": "--help",
}


@pytest.fixture
def photo(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(encode(picture(0, 48, 64)))
    return str(tmp_path / "photo.jpg")


@pytest.mark.parametrize("given", ["--help", "-h", "", "lok", "-v"])
@pytest.mark.parametrize(
    "parent, commands",
    [("", COMMANDS), ("evaluate", TASKS), ("data", ACTIONS)],
    ids=["pacl", "evaluate", "data"],
)
def test_commands_are_listed(parent, commands, given, capsys):
    asked = given in ("--help", "-h")
    assert main([*parent.split(), *given.split()]) == (0 if asked else 2)
    said = capsys.readouterr()
    listed = said.out if asked else said.err
    assert all(f"  {name} " in listed for name in commands)
    if not asked:
        got = f"got {given!r}" if given else "got none"
        assert listed.splitlines()[-1] == f"pacl: error: command: {got}, expected one of {', '.join(commands)}"


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_all_options_and_does_not_wait_for_torch(command):
    code = f"""if True:
        import sys
        from pacl.cli import main
        try:
            sys.exit(main([*"{command}".split(), "--help"]))
        finally:
            assert "torch" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    words = done.stdout.replace(",", " ").split()
    assert set(OPTIONS[command].split()) <= set(words)


def help_of(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("task", EVALUATE_OPTIONS)
def test_help_of_tasks_names_all_options(task, capsys):
    assert set(EVALUATE_OPTIONS[task].split()) <= set(help_of(f"evaluate {task}", capsys).replace(",", " ").split())


def test_every_help_is_ascii_and_ends_with_an_example_of_its_flags(capsys):
    parents = {"evaluate": TASKS, "data": ACTIONS}
    commands = [f"{x} {y}".strip() for x in COMMANDS for y in parents.get(x, [""])]
    assert sorted(EXAMPLES) == sorted(f"pacl {command}" for command in commands)
    for command in commands:
        shown = help_of(command, capsys)
        assert set(re.sub(r"[\x00-\x7f]", "", shown)) <= set("╭╮╰╯│─"), command
        last = shown.rstrip().splitlines()[-1]
        assert last.startswith(f"example: pacl {command} ")
        flags = {word for word in shlex.split(last) if word.startswith("--")}
        assert flags <= set(shown.rpartition("example:")[0].replace(",", " ").split()), command


def test_help_and_names_on_a_terminal_with_ascii_only(tmp_path):
    terminal = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    row = {"task": "t", "dataset": "Straße", "model": "m", "pretrained": None, "embedder": None, "metrics": {"acc1": 1}}
    (tmp_path / "row.json").write_text(json.dumps(row | {"protocol": {"name": "n"}}))
    code = f"""if True:
        from pacl.cli import main
        assert main(["evaluate", "table", {str(tmp_path / "row.json")!r}]) == 0
        main(["evaluate", "retrieval", "--help"])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=terminal, check=False)
    shown = done.stdout.decode("ascii")
    assert (done.returncode, done.stderr) == (0, b"") and "Stra\\xdfe" in shown and "compatibility" in shown


def test_help_of_train_is_in_groups_of_all_flags(tmp_path, capsys):
    """The flags keep their names and are all there; the values of a config are the defaults that are shown."""
    (tmp_path / "config.yaml").write_text(dump_config(TrainConfig(train_data="a.tar", form="dot"), {}))
    shown = help_of(f"train --config {tmp_path / 'config.yaml'}", capsys)
    titles = re.findall(r"^\W*(\w+) options\W*$", shown, re.M)
    assert titles == [*TrainConfig.GROUPS] == "data towers schedule loss machine validation log".split()
    words = set(shown.replace(",", " ").split())
    assert {f"--{item.name.replace('_', '-')}" for item in dataclasses.fields(TrainConfig)} <= words
    assert re.search(r"--form \{dot,cosine,max\}\W+default: dot\b", shown)


def test_version_without_importing_torch():
    code = "import sys; from pacl.cli import main; main(['--version']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = re.fullmatch(r"pacl-kernels (\S+), torch (\S+)\n", done.stdout)
    assert found and found[2] == torch.__version__.partition("+")[0] == found[2].partition("+")[0]


def test_all_options_of_segment(photo, untrained, tmp_path):
    """Options take blanks or =, hyphens or underscores and negative numbers, and stand before or after the images."""
    checkpoint = str(untrained / "run/embedder")
    flags = ["--words", "dog,red ball", "--templates=none", "--stride", "2", "--short_side", "72", "--window=64"]
    flags += ["--window-stride", "8", "--threshold", "-0.5", "--entropy=1.5", "--logit_scale=50", "--device", "cpu"]
    flags += ["--max_image_pixels=8000", f"--out={tmp_path / 'out'}"]
    assert main(["segment", photo, photo, "--checkpoint", checkpoint, *flags]) == 0
    assert main(["segment", "--checkpoint", checkpoint, *flags, photo]) == 0
    found = json.loads((tmp_path / "out/photo-scores.json").read_text())
    assert found["settings"] == {
        "stride": 2,
        "short_side": 72,
        "window": 64,
        "window_stride": 8,
        "templates": "none",
        "tokens": "plain",
        "model": checkpoint,
        "threshold": -0.5,
        "entropy": 1.5,
        "logit_scale": 50.0,
    }
    assert [x["name"] for x in found["classes"]] == ["background", "dog", "red ball"]
    assert (tmp_path / "out/photo~2-scores.json").is_file()


def test_scale_and_class_file_of_look(photo, untrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.txt").write_text("dog\n")
    flags = ["--model", f"local-dir:{untrained / 'clip'}", "--classes", "classes.txt"]
    maps = {}
    for scale in ("--scale=-1,1", "--scale 0.1,0.2", ""):
        assert main(["look", photo, *flags, *scale.split()]) == 0
        maps[scale] = (tmp_path / "pacl-look/photo-01-dog.png").read_bytes()
    assert len(set(maps.values())) == 3


@pytest.mark.parametrize(
    "argv, message",
    [
        (["look", "a.jpg", "--words", "dog"], "--checkpoint, --model"),
        (["look", "a.jpg", "--words", "dog", "--model", "x", "--checkpoint", "y"], "not allowed together"),
        (["segment", "a.jpg", "--model", "x"], "--words, --classes"),
        (["segment", "a.jpg", "--model", "x", "--words", "dog", "--classes", "c.txt"], "not allowed together"),
        (["segment", "--model", "x", "--words", "dog"], "images: got none, expected files or folders of images"),
        (["look", "a.jpg", "--model", "x", "--words", "dog", "--scale", "0.5,0.5"], "two increasing numbers"),
        (["look", "a.jpg", "--model", "x", "--words", "dog", "--scale", "0.5"], "two increasing numbers"),
        (["look", "a.jpg", "--model", "x", "--words", "dog", "--stride", "a"], "--stride"),
        (["look", "a.jpg", "--model", "x", "--words", "dog", "--strides", "2"], "--strides"),
        (["segment", "a.jpg", "--model", "x", "--words", "dog", "--scale", "0,1"], "--scale"),
        (["serve"], "--checkpoint, --model"),
        (["serve", "--model", "x", "photo.jpg"], "photo.jpg"),
        (["doctor", "--yaml"], "--yaml"),
    ],
)
def test_wrong_options_have_status_2(argv, message, capsys):
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and message in capsys.readouterr().err
