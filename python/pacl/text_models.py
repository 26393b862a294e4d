"""Text towers from local folders: encoders of transformers and of sentence-transformers, with their own pooling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .failures import describe
from .pretrained import check_local_model, why_not_loaded
from .settings import Damaged, read_list, read_settings, short
from .weights import few, load_weights

PADDING = -1  # id of a place without a token; a tokenizer may use one id for padding and for the end of a text
OWN_POOLING = {  # models of transformers that pool by themselves, by `config.model_type`: the class and its output
    **dict.fromkeys(("clip", "clip_text_model"), ("CLIPTextModelWithProjection", "text_embeds")),
    **dict.fromkeys(("siglip", "siglip_text_model"), ("SiglipTextModel", "pooler_output")),
    **dict.fromkeys(("siglip2", "siglip2_text_model"), ("Siglip2TextModel", "pooler_output")),
}
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken")  # in the order of their outputs
ACTIVATIONS = {"Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU, "SiLU": nn.SiLU}


class TextModel(nn.Module):
    """A text encoder and its pooling. Takes ids `[B, L]`, PADDING after the end of a text; returns `[B, D]`.

    Args:
        encoder: a model of transformers.
        output: the name of its pooled output, or None for an encoder of tokens.
        poolings: names of POOLINGS; their results are concatenated. Without an `output` alone.
        layers: what follows the pooling.
        padding: the id that the encoder gets for PADDING.
    """

    def __init__(
        self, encoder: nn.Module, output: str | None, poolings: Sequence[str], layers: nn.Module, padding: int
    ):
        super().__init__()
        self.encoder, self.output, self.poolings = encoder, output, tuple(poolings)
        self.layers, self.padding = layers, padding

    def forward(self, ids: Tensor) -> Tensor:
        there = ids != PADDING
        ids = ids.masked_fill(~there, self.padding)
        if self.output is not None:  # such a model sees the padding, as in its training
            return getattr(self.encoder(input_ids=ids), self.output)
        tokens = self.encoder(input_ids=ids, attention_mask=there.long()).last_hidden_state
        return self.layers(torch.cat([_pooled(tokens, there, name) for name in self.poolings], -1))

    def lengths(self, ids: Tensor) -> Tensor:
        """Return how many ids of each text [B, L] its embedding depends on, int64 [B]."""
        seen = (ids != PADDING).sum(1)
        return seen if self.output is None else torch.full_like(seen, ids.shape[1])


class Normalize(nn.Module):
    """Divide embeddings by their norms."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


def load_text_model(name: str) -> tuple[TextModel, Callable[[list[str]], Tensor]]:
    """Load a text encoder, and the function from strings to its ids, from a folder of transformers.

    The `modules.json` of sentence-transformers says how to pool, and what follows. Without it CLIP and SigLIP pool by
    themselves, and any other encoder's tokens are averaged, as sentence-transformers does.

    name: the folder, with or without `local-dir:` before it. Raises ValueError, which names the argument text_model.
    """
    folder = Path(name.removeprefix("local-dir:"))
    what = f"text_model: got {name!r}"
    if not folder.is_dir():
        raise ValueError(f"{what}, which is not a folder; expected one with config.json and weights of a text encoder")
    try:
        parts = _parts(folder, what)
    except Damaged as error:
        raise ValueError(f"{what}, but {error}") from error
    home = folder / parts[0][1]
    weights = check_local_model("text_model", name, home, "config.json", "model_type")
    try:
        encoder, output, tokenizer = _load(home, what)
    except Exception as error:  # transformers, the unpickler and the state dict raise many types
        if describe(error) is not None or isinstance(error, ValueError) and str(error).startswith(what):
            raise
        raise ValueError(why_not_loaded(error, what, weights, home)) from error
    if output is not None and len(parts) > 1:
        raise ValueError(f"{what}, a {type(encoder).__name__} with modules that follow it; expected the encoder alone")
    try:
        poolings, layers = _following(folder, parts[1:])
        options = _options(folder, home)
    except Damaged as error:
        raise ValueError(f"{what}, but {error}") from error
    text = TextModel(encoder, output, poolings, layers, tokenizer.pad_token_id)
    return text, _tokenize_by(tokenizer, encoder.config, options, whole=output is not None)


def _parts(folder: Path, what: str) -> list[tuple[str, str]]:
    """Return the kinds and the subfolders of sentence-transformers' modules, or those of an encoder alone."""
    path = folder / "modules.json"
    if not path.is_file():
        return [("Transformer", "")]
    parts = []
    for part in read_list(path):
        if not isinstance(part, dict) or not all(isinstance(part.get(x), str) for x in ("type", "path")):
            raise Damaged(path, "a module lacks its type or its path")
        inside = Path(part["path"])
        if inside.is_absolute() or ".." in inside.parts:
            raise Damaged(path, f"a module is in {part['path']!r}, expected a folder below")
        parts.append((part["type"].rpartition(".")[2], part["path"]))
    known = ("Transformer", "Pooling", "Dense", "Normalize", "Dropout")
    wrong = [kind for kind, _ in parts if kind not in known]
    if wrong or [kind for kind, _ in parts[:2]] != ["Transformer", "Pooling"]:
        got = ", ".join(kind for kind, _ in parts) or "nothing"
        raise ValueError(f"{what}, which has the modules {got}; expected Transformer, Pooling, and Dense or Normalize")
    return parts


def _load(home: Path, what: str) -> tuple[Any, str | None, Any]:
    """Load an encoder in float32, the name of its pooled output if it has one, and its tokenizer."""
    import transformers

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(home, **local)
    kind, output = OWN_POOLING.get(config.model_type, (None, None))
    if kind is None:
        # T5 and its kin have an encoder alone only here.
        listed = type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
        kind = "AutoModelForTextEncoding" if listed else "AutoModel"
    loaded = getattr(transformers, kind).from_pretrained(home, output_loading_info=True, **local)
    model, missing = loaded[0].float(), [x for x in loaded[1]["missing_keys"] if "pooler." not in x or output]
    if missing:
        raise ValueError(f"{what}, whose weights lack {few(sorted(missing))}; expected those of a text encoder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(home, **local)
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{what}, whose tokenizer has no token for padding; expected one with pad_token")
    tokenizer.padding_side = "right"
    return model, output, tokenizer


def _following(folder: Path, parts: Sequence[tuple[str, str]]) -> tuple[list[str], nn.Module]:
    """Return the poolings, and the layers after them, of sentence-transformers' modules after the encoder."""
    poolings, layers = ["mean"], nn.Sequential()
    for kind, inside in parts:
        path = folder / inside / "config.json"
        if kind == "Pooling":
            poolings = _poolings(read_settings(path), path)
        elif kind == "Dense":
            layers.append(_dense(read_settings(path), path))
        elif kind == "Normalize":
            layers.append(Normalize())
    return poolings, layers


def _poolings(values: dict[str, Any], path: Path) -> list[str]:
    if not values.get("include_prompt", True):
        raise Damaged(path, "include_prompt is False, which is not supported")
    mode = values.get("pooling_mode")  # of new versions; earlier ones have a flag for each
    names = [mode] if isinstance(mode, str) else mode
    if names is None:
        ends = {"cls": "_token", "lasttoken": ""}
        names = [name for name in POOLINGS if values.get(f"pooling_mode_{name}{ends.get(name, '_tokens')}") is True]
    else:
        names = [str(name).removesuffix("_tokens") for name in names]
    if not names or not set(names) <= set(POOLINGS):
        raise Damaged(path, f"its pooling is {short(names)}, expected some of {', '.join(POOLINGS)}")
    return names


def _dense(values: dict[str, Any], path: Path) -> nn.Module:
    sizes: list[Any] = [values.get(name) for name in ("in_features", "out_features")]
    if not all(type(x) is int and 0 < x <= 2**20 for x in sizes):
        raise Damaged(path, f"in_features and out_features are {short(sizes)}, expected positive numbers")
    kind = str(values.get("activation_function", "Identity")).rpartition(".")[2]
    if kind not in ACTIVATIONS:
        raise Damaged(path, f"activation_function is {short(kind)}, expected one of {', '.join(ACTIVATIONS)}")
    layer = nn.Sequential()
    layer.add_module("linear", nn.Linear(sizes[0], sizes[1], bias=values.get("bias", True) is not False))
    layer.add_module("activation", ACTIVATIONS[kind]())
    file = path.with_name("model.safetensors")
    if file.is_file():
        load_weights(layer, file, {})
        return layer
    file = path.with_name("pytorch_model.bin")
    try:
        layer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except FileNotFoundError as error:
        raise Damaged(path.parent, "it has neither model.safetensors nor pytorch_model.bin") from error
    except Exception as error:  # on damaged bytes, and on weights of another layer
        raise Damaged(file, f"it does not hold a layer from {sizes[0]} to {sizes[1]}") from error
    return layer


def _options(folder: Path, home: Path) -> dict[str, Any]:
    """Return sentence-transformers' settings of texts: max_seq_length, do_lower_case and the default prompt."""
    found: dict[str, Any] = {}
    if (path := home / "sentence_bert_config.json").is_file():
        found |= read_settings(path)
    if (path := folder / "config_sentence_transformers.json").is_file():
        values = read_settings(path)
        prompts, name = values.get("prompts") or {}, values.get("default_prompt_name")
        if name is not None and (not isinstance(prompts, dict) or not isinstance(prompts.get(name), str)):
            raise Damaged(path, f"default_prompt_name is {short(name)}, expected the name of a prompt")
        found["prompt"] = prompts[name] if name is not None else ""
    length = found.get("max_seq_length")
    if length is not None and not (type(length) is int and length > 0):
        raise Damaged(home / "sentence_bert_config.json", f"max_seq_length is {short(length)}, expected a number")
    return found


def _tokenize_by(tokenizer: Any, config: Any, options: dict[str, Any], *, whole: bool) -> Callable[[list[str]], Tensor]:
    """Return the function from strings to ids [B, L], int64. whole: pad to the model's length, as SigLIP needs."""
    config = getattr(config, "text_config", config)
    places = getattr(config, "max_position_embeddings", None)
    most = options.get("max_seq_length")
    if most is None and tokenizer.model_max_length < 1_000_000:  # else it means "not known"
        most = tokenizer.model_max_length
    if most is None or whole and places:
        # RoBERTa's positions begin behind the padding's.
        most = 512 if places is None else places if whole else max(1, places - 2)
    prompt, lower = options.get("prompt", ""), options.get("do_lower_case") is True

    def tokenize(texts: list[str]) -> Tensor:
        texts = [prompt + (text.lower() if lower else text) for text in texts]
        found = tokenizer(
            texts,
            padding="max_length" if whole else True,
            max_length=most,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return found["input_ids"].masked_fill(found["attention_mask"] == 0, PADDING)

    return tokenize


def _pooled(tokens: Tensor, there: Tensor, name: str) -> Tensor:
    """Pool tokens [B, L, C], of which `there` [B, L] are a text's, to [B, C]."""
    mask = there[..., None]
    if name == "cls":
        return tokens[:, 0]
    if name == "max":
        return tokens.masked_fill(~mask, float("-inf")).amax(1)
    if name == "lasttoken":
        last = there.sum(1).clamp(min=1) - 1
        return tokens[torch.arange(len(tokens), device=tokens.device), last]
    weights = mask.to(tokens.dtype)
    if name == "weightedmean":
        weights = weights * torch.arange(1, tokens.shape[1] + 1, device=tokens.device)[:, None]
    total, count = (tokens * weights).sum(1), weights.sum(1).clamp(min=1e-9)
    return total / (count.sqrt() if name == "mean_sqrt_len" else count)
