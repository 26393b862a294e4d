"""A second text of an image: a prompt with a noun of its caption, which the paper's training adds."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from random import Random

# Mukhoti et al., CVPR 2023, appendix A.2.2. A subset of OpenAI's prompts, except that OpenAI's fifth of them is
# "a {} in a video game."
PROMPTS = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "{} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
# Names of ImageNet that captions use more often in another sense, or not as nouns.
AMBIGUOUS = {"boxer", "fly", "orange", "ram", "safe", "ski", "swing", "tick"}


def noun_finder(name: str) -> Callable[[str], list[str]]:
    """Return a function from a caption to its nouns, in order, without repetition.

    name: "words" looks up the package's nouns.txt and ImageNet's class names, longest first, and returns singulars; it
        takes a verb that is spelled like a noun for the noun. "nltk" uses NLTK's part-of-speech tagger, joins adjacent
        common nouns ("fire truck"), keeps their spelling, and leaves out names of people and places.
    Raises ValueError for another name, or if NLTK or its tagger's data are not installed.
    """
    if name == "words":
        return find_nouns
    if name == "nltk":
        return _nltk()
    raise ValueError(f"nouns: got {name!r}, expected words or nltk")


def find_nouns(caption: str) -> list[str]:
    """Return the nouns of a caption by the word list; see noun_finder."""
    nouns, longest = _listed()
    found: dict[str, None] = {}
    for phrase in re.split(r"[^\w\s'’-]+|\s-+\s|--+", caption.lower()):  # no noun crosses a comma or a dash
        words = [re.sub(r"['’]s?$", "", word) for word in phrase.replace("-", "- ").split()]
        at = 0
        while at < len(words):
            for size in range(min(longest, len(words) - at), 0, -1):
                part = words[at : at + size]
                # "fire-truck" is a fire truck, but "man-made" contains no man.
                whole = not part[-1].endswith("-") and not (at and words[at - 1].endswith("-"))
                noun = nouns.get(" ".join(part).replace("-", "")) if whole else None
                if noun is not None:
                    found[noun] = None
                    break
            at += size
    return list(found)


def choose_text(caption: str, key: str, *, seed: int, epoch: int, nouns: Callable[[str], list[str]]) -> str:
    """Return the caption or, half of the time, one of PROMPTS with one of its nouns; without a noun the caption.

    The choice depends on the arguments alone, not on earlier choices or the number of processes.
    """
    rng = Random(f"{seed} {epoch} {key}")
    if rng.random() < 0.5:
        return caption
    found = nouns(caption)
    return rng.choice(PROMPTS).format(rng.choice(found)) if found else caption


@lru_cache
def _listed() -> tuple[dict[str, str], int]:
    """Return a table from singulars and plurals, in lower case with spaces for hyphens, to nouns; and the most words
    in a key.
    """
    from open_clip import IMAGENET_CLASSNAMES

    lines = files("pacl.data").joinpath("nouns.txt").read_text(encoding="utf-8").splitlines()
    entries = [line.split(", ") for line in lines]
    # "kite (bird of prey)" is a kite; "bell or wind chime" and "carton / box" are each two names, all in our list.
    names = [re.sub(r" \(.*", "", name) for name in IMAGENET_CLASSNAMES if not re.search(r" or | / ", name)]
    entries += [[name] for name in names if name.lower() not in AMBIGUOUS]
    table: dict[str, str] = {}
    for noun, *_ in entries:
        table.setdefault(_key(noun), noun)
    for noun, *plurals in entries:  # after all singulars, so that "glasses" is itself and not the plural of "glass"
        for plural in plurals or [_plural(noun)]:
            table.setdefault(_key(plural), noun)
    return table, max(len(key.split()) for key in table)


def _key(noun: str) -> str:
    return noun.lower().replace("'s", "").replace("-", " ")


def _plural(noun: str) -> str:
    """Return the regular plural of a noun for which nouns.txt gives none."""
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun[:-3] + "men" if noun.endswith("man") and noun != "human" else noun + "s"


def _nltk() -> Callable[[str], list[str]]:
    try:
        from nltk.tag.perceptron import PerceptronTagger
        from nltk.tokenize import TreebankWordTokenizer

        if not hasattr(PerceptronTagger, "load_from_json"):
            raise ImportError  # older versions unpickle their weights
        tag = PerceptronTagger().tag
    except ImportError as error:
        raise ValueError("nouns: got nltk, which is missing or older than 3.9 (pip install 'nltk>=3.9')") from error
    except LookupError as error:
        raise ValueError(
            "nouns: got nltk, whose tagger is missing (python -m nltk.downloader averaged_perceptron_tagger_eng)"
        ) from error

    def find(caption: str) -> list[str]:
        found: dict[str, None] = {}
        run: list[str] = []
        for word, kind in [*tag(TreebankWordTokenizer().tokenize(caption)), ("", ".")]:
            if kind in ("NN", "NNS"):
                run.append(word.lower())
            elif run:
                found[" ".join(run)] = None
                run = []
        return list(found)

    return find
