"""Nouns of captions, and the second texts that the paper's recipe builds from them."""

from __future__ import annotations

import re
from collections import Counter
from importlib.resources import files

import pytest

pytest.importorskip("open_clip")
from pacl.data.texts import PROMPTS, choose_text, find_nouns, noun_finder


@pytest.mark.parametrize(
    "caption, nouns",
    [
        ("A dog runs on the beach.", ["dog", "beach"]),
        ("two dogs, three puppies and a few wolves", ["dog", "puppy", "wolf"]),
        ("Women and men with their children", ["woman", "man", "child"]),
        ("people crossing a street", ["person", "street"]),
        ("firemen wash the boxes and benches of a fire truck", ["fireman", "box", "bench", "fire truck"]),
        ("The FIRE TRUCKS are red", ["fire truck"]),
        ("fire, truck", ["fire", "truck"]),
        ("a fire - truck", ["fire", "truck"]),
        ("a fire-truck in a man-made lake beside a snow-covered hill", ["fire truck", "lake", "hill"]),
        ("Boy in a T-shirt eats ice-cream", ["boy", "t-shirt", "ice cream"]),
        ("a dog and another dog", ["dog"]),
        ("the dog’s bowl, the cats' basket and a Rubik's cube!", ["dog", "bowl", "cat", "basket", "rubik's cube"]),
        ("potatoes, knives and glasses of wine", ["potato", "knife", "glass of wine"]),
        ("a pair of scissors", ["pair of scissors"]),
        ("sheep and a goose; (two geese)", ["sheep", "goose"]),
        ("a german shepherd in the sunset", ["german shepherd", "sunset"]),
        ("an AXOLOTL and two newts", ["axolotl", "newt"]),  # words of ImageNet
        ("an orange wall", ["wall"]),
        ("kites", ["kite"]),
        ("everything is so beautiful today", []),
        ("dogged catering carpeted", []),
        ("--- !!! 123 '", []),
        ("", []),
    ],
)
def test_nouns_of_real_sentences(caption, nouns):
    assert find_nouns(caption) == nouns


def test_every_listed_noun_is_found():
    lines = files("pacl.data").joinpath("nouns.txt").read_text(encoding="utf-8").splitlines()
    assert lines == sorted(set(lines)) and len(lines) > 1500
    for line in lines:
        assert re.fullmatch(r"[a-z][a-z' -]*(, [a-z -]+)?", line), line
        noun, *plurals = line.split(", ")
        for form in (noun, *plurals):
            assert find_nouns(f"The {form.upper()}.") == [noun]


def test_a_choice_is_the_caption_or_a_noun_in_a_prompt():
    caption = "two dogs beside a fire truck"
    texts = [choose_text(caption, f"key{i}", seed=0, epoch=0, nouns=find_nouns) for i in range(4000)]
    counts = Counter(texts)
    possible = {prompt.format(noun) for prompt in PROMPTS for noun in ("dog", "fire truck")}
    assert set(counts) == possible | {caption}
    assert abs(counts[caption] - 2000) < 150  # 4.7 standard deviations
    assert all(abs(counts[text] - 2000 / 14) < 60 for text in possible)


def test_a_choice_depends_on_seed_epoch_and_key_alone():
    def choices(seed=0, epoch=0, keys=range(40)):
        return [choose_text("a dog and a cat", str(key), seed=seed, epoch=epoch, nouns=find_nouns) for key in keys]

    first = choices()
    assert choices(keys=reversed(range(40))) == first[::-1]
    assert choices(seed=1) != first and choices(epoch=1) != first and len(set(first)) > 5


def test_a_caption_without_a_noun_stays():
    assert {choose_text("so nice", str(key), seed=0, epoch=0, nouns=find_nouns) for key in range(50)} == {"so nice"}


def test_unknown_finder():
    with pytest.raises(ValueError, match="nouns: got 'spell', expected words or nltk"):
        noun_finder("spell")


def test_nltk_says_what_is_missing(monkeypatch):
    try:
        import nltk
    except ImportError:
        with pytest.raises(ValueError, match="pip install 'nltk>=3.9'"):
            noun_finder("nltk")
    else:
        monkeypatch.setattr(nltk.data, "path", [])
        with pytest.raises(ValueError, match="nltk.downloader averaged_perceptron_tagger_eng"):
            noun_finder("nltk")


def test_nltk_with_a_tagger_of_our_own(tmp_path, monkeypatch):
    """NLTK's tagger finds nouns. The test trains a small one and puts it where NLTK's downloader puts the real one."""
    nltk = pytest.importorskip("nltk", minversion="3.9")
    from nltk.tag.perceptron import PerceptronTagger

    sentences = [
        "A/DT red/JJ fire/NN truck/NN stands/VBZ near/IN the/DT dogs/NNS ./.",
        "John/NNP sees/VBZ a/DT gramophone/NN ,/, two/CD dogs/NNS and/CC a/DT fire/NN truck/NN ./.",
    ]
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    tagger = PerceptronTagger(load=False)
    tagger.train([[tuple(word.rsplit("/", 1)) for word in line.split()] for line in sentences], nr_iter=20)
    (tmp_path / "taggers").mkdir()
    tagger.save_to_json(lang="eng", loc=str(tmp_path / "taggers/averaged_perceptron_tagger_eng"))
    find = noun_finder("nltk")
    assert find("John sees a gramophone, two dogs and a fire truck.") == ["gramophone", "dogs", "fire truck"]
    assert find("") == []
