"""`--recipe paper`: the paper's values, the reported deviations from them, and the second text of an image."""

from __future__ import annotations

import dataclasses
import shlex
import shutil

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import torch
import yaml
from pacl.backbones import patch_tokens
from pacl.cli import main
from pacl.data.texts import find_nouns
from pacl.training.command import _parse
from pacl.training.recipe import command, fill_batch, recipe_config, recipe_notes
from pacl.training.run import Run
from running import assert_same_state, final, flags
from small_towers import registered

from pacl_kernels.reference import pacl_loss


@pytest.fixture
def world(run_world):
    return run_world


def recipe_flags(world, logs, **changes):
    defaults = {"recipe": "paper", "pretrained": "None", "accum_freq": 1, "max_steps": 8, "save_frequency": 3}
    return flags(world, logs, **(defaults | changes))


def test_the_papers_values():
    """The recipe has the values of appendix A.2.1 of the PACL paper."""
    config = _parse(["--recipe=paper", "--train-data", "a.tar"], "pacl train")
    assert (config.lr, config.wd, config.beta1, config.beta2, config.eps) == (5e-4, 0.2, 0.9, 0.98, 1e-6)
    assert (config.lr_scheduler, config.warmup, config.epochs, config.max_steps) == ("cosine", 0, 10, None)
    assert config.batch_size * config.accum_freq == 4096
    assert (config.form, config.attn_temperature, config.nouns) == ("dot", 1.0, "words")
    notes = recipe_notes(config, 4096)
    assert notes["deviations"] == {} and "attn_temperature" in notes["left_open"]


@pytest.mark.parametrize("recipe", [[], ["--recipe=paper"]])
def test_the_command_gives_the_config(recipe):
    flags = ["--form=cosine", "--attn-temperature=0.05", "--accum-freq=1", "--nouns=None", "--batch-size=64"]
    config = _parse([*recipe, "--train-data=a b.tar", *flags], "pacl train")
    program, verb, *words = shlex.split(command(config))
    assert (program, verb) == ("pacl", "train") and _parse(words, "pacl train") == config


@pytest.mark.parametrize("batch_size, processes, accum_freq", [(256, 1, 16), (256, 4, 4), (1024, 4, 1), (4096, 1, 1)])
def test_the_papers_batch(batch_size, processes, accum_freq):
    config = dataclasses.replace(recipe_config(), batch_size=batch_size)
    assert fill_batch(config, processes).accum_freq == accum_freq


@pytest.mark.parametrize("batch_size, processes", [(300, 1), (256, 3), (1024, 8)])
def test_a_batch_that_does_not_divide_the_papers(batch_size, processes):
    config = dataclasses.replace(recipe_config(), batch_size=batch_size)
    with pytest.raises(ValueError, match=f"batch_size: got {batch_size} in {processes} process.* --accum-freq"):
        fill_batch(config, processes)
    given = dataclasses.replace(config, accum_freq=2)
    assert fill_batch(given, processes) is given


def test_a_run_lists_its_deviations(world, tmp_path, capsys):
    assert main(["train", *recipe_flags(world, tmp_path, lr=1e-3)]) == 0
    assert "lr 0.001 for 0.0005; global_batch 12 for 4096" in capsys.readouterr().out
    values = yaml.safe_load((tmp_path / "pacl/config.yaml").read_text())
    assert set(values["deviations"]) == {"model", "pretrained", "max_steps", "lr", "global_batch"}
    assert values["deviations"]["lr"] == {"paper": 5e-4, "run": 1e-3}
    assert values["nouns"] == "words" and "form" in values["left_open"]
    assert final(tmp_path)["state_dict"]["log_scale"].exp().item() == pytest.approx(100), "it is not learned"

    assert main(["train", "--config", str(tmp_path / "pacl/config.yaml"), "--name", "again"]) == 0
    again = yaml.safe_load((tmp_path / "again/config.yaml").read_text())
    assert again == values | {"name": "again"}
    for name in ("pacl", "again"):
        shutil.move(tmp_path / name, tmp_path / f"{name}s" / "pacl")
    assert_same_state(final(tmp_path / "pacls")["state_dict"], final(tmp_path / "agains")["state_dict"])


def test_a_local_model_has_its_own_weights(world, tmp_path, capsys):
    """The recipe's weights are those of its model alone: not of a model in a folder, nor of random towers."""
    words = flags(world, tmp_path, recipe="paper", accum_freq=1, max_steps=1)
    assert "--pretrained" not in words and main(["train", *words]) == 0
    values = yaml.safe_load((tmp_path / "pacl/config.yaml").read_text())
    assert values["deviations"]["pretrained"] == {"paper": "openai", "run": None}
    config = _parse(words, "pacl train")
    assert "--pretrained" not in command(config) and _parse(shlex.split(command(config))[2:], "pacl train") == config

    random = {"model": registered(tmp_path), "random_towers": None, "name": "random"}
    assert main(["train", *flags(world, tmp_path, recipe="paper", accum_freq=1, max_steps=1, **random)]) == 0
    given = {"recipe": "paper", "accum_freq": 1, "pretrained": "openai"}
    assert main(["train", *flags(world, tmp_path, **given, name="given")]) == 1
    assert "which has its own weights; expected none" in capsys.readouterr().err


def test_no_recipe_says_nothing(world, tmp_path):
    assert main(["train", *flags(world, tmp_path, max_steps=1)]) == 0
    values = yaml.safe_load((tmp_path / "pacl/config.yaml").read_text())
    assert not {"deviations", "left_open"} & set(values)


def test_the_loss_is_that_of_the_chosen_texts(world, tmp_path):
    config = _parse(recipe_flags(world, tmp_path, batch_size=24), "pacl train")
    run = Run(config)
    batch, _ = next(run._batches())
    texts = sum(run._texts(batch), [])
    kept = [text == caption for text, caption in zip(texts, batch["caption"], strict=True)]
    assert 4 < sum(kept) < 20, sum(kept)
    for text, caption in zip(texts, batch["caption"], strict=True):
        assert text == caption or any(noun in text for noun in find_nouns(caption))
    with torch.no_grad():
        patches = run.model.embedder(patch_tokens(run.towers.visual, batch["image"]))
        embedded = run.towers.encode_text(run.towers.tokenize(texts))
        expected = pacl_loss(patches, embedded, 100.0, attn_temperature=1.0, form="dot")
    torch.testing.assert_close(run._step(batch), expected, rtol=1e-5, atol=1e-6)

    run.step = run.epoch_steps  # the next epoch
    assert sum(run._texts(batch), []) != texts


def test_a_resumed_run_draws_the_same_texts(world, tmp_path):
    words = recipe_flags(world, tmp_path, save_frequency=3, max_steps=6)
    assert main(["train", *words]) == 0
    whole = final(tmp_path)
    (tmp_path / "pacl/checkpoints/step_00000006.pt").unlink()
    assert main(["train", *words, "--resume", "latest"]) == 0
    assert_same_state(final(tmp_path), whole)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 100, "accum_freq": "None"}, "batch_size: got 100 in 1 process(es)"),
        ({"config": "config.yaml"}, "recipe: got --recipe and --config"),
    ],
)
def test_bad_input_is_one_line(changes, message, world, tmp_path, capsys):
    assert main(["train", *recipe_flags(world, tmp_path, **changes)]) == 1
    assert message in capsys.readouterr().err
