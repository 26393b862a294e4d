"""Compare cross-attention with φ in the two worlds of study.py: quality after the same training, and cost of pairs.

    python benchmarks/cross_attention.py run DIR            # one process of one thread; rerun to resume
    python benchmarks/cross_attention.py report DIR --json FILE

Worlds, models and measures are those of study.py. Runs of one seed start from the same embedder and see the same
batches. The learning rate is that of study.py for this batch size; it was chosen for φ. The cost is processor time of
one thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import study
import torch
from outputs import run_and_report, write_json
from pacl.backbones import patch_tokens
from pacl.cross_attention import CrossAttention
from pacl.files import write_bytes
from report import machine
from safetensors.torch import load_file, save
from study_readings import frozen_clip
from study_tables import cross_attention
from study_worlds import WORLDS, Size, training_scenes, words, write_world

from pacl_kernels import compatibility

METHODS = {"all pairs": "phi", "cross-attention": "cross-attention"}  # `pooling` of study.Run -> --align
MEASURES = ("miou", "patch_accuracy", "retrieval_r1")
SIZES = ("images", "scenes", "eval_scenes", "clip_steps", "clip_scenes")
COST_BATCHES = (16, 32, 64)


def prepare(world: str, out: Path, size: Size) -> None:
    """Write tokens, text embeddings and words of a world; train its CLIP if `out` has none."""
    path = out / f"{world}.safetensors"
    if path.exists():
        return
    clip = frozen_clip(world, out, size)
    towers = {"clip": partial(patch_tokens, clip.visual)}
    write_world(out / "partial.safetensors", world, size, clip, towers, *training_scenes(world, size.scenes))
    write_bytes(path, save(load_file(out / "partial.safetensors") | words(world, size, clip)))
    (out / "partial.safetensors").unlink()


def plan(batch: int, lr: float, seeds: int) -> list[study.Run]:
    """Return the runs, all of a seed together."""
    return [
        study.Run(world, batch, lr, seed, pooling=method)
        for seed in range(seeds)
        for world in WORLDS
        for method in METHODS
    ]


def work(out: Path, size: Size, settings: dict) -> None:
    """Prepare both worlds, do the missing runs, and measure the cost. settings: the arguments of `plan`."""
    (out / "runs").mkdir(parents=True, exist_ok=True)
    write_bytes(out / "settings.json", json.dumps(settings).encode())
    study.write_size(out, size)
    for world in WORLDS:
        prepare(world, out, size)
    study.train_missing(plan(**settings), out, size)
    if not (out / "cost.json").exists():
        write_bytes(out / "cost.json", json.dumps(cost()).encode())


def cost(patches: int = 64, count: int = 16, dim: int = 128, repeats: int = 3) -> list[dict]:
    """Return the processor time of one thread for the scores of B x B pairs, by φ and by a head: the least of several.

    The sizes are those of the worlds: patches of an image, words of a caption and width.
    """
    torch.manual_seed(0)
    head, rows = CrossAttention(dim), []
    for batch in COST_BATCHES:
        images, texts = torch.randn(batch, patches, dim), torch.randn(batch, count, dim)
        captions = texts[:, 0].contiguous()
        scorers = {
            "phi": (partial(compatibility, images, captions, attn_temperature=0.05, form="cosine"), 10 * repeats),
            "cross-attention": (lambda x=images, y=texts: list(head.score(x, y)), repeats),
        }
        seconds = {name: min(_seconds(score) for _ in range(times)) for name, (score, times) in scorers.items()}
        rows.append({"batch": batch, "patches": patches, "words": count, "dim": dim, "seconds": seconds})
    return rows


def _seconds(function: Callable[[], object]) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin


def report(out: Path) -> dict:
    """Return every method's measures in each world, over the seeds that both methods have, and the cost of pairs."""
    settings = json.loads((out / "settings.json").read_text())
    runs = plan(**settings)
    found = {run: points[-1] for run in runs if (points := study.result_of(out, run)) is not None}
    rows = []
    for world in WORLDS:
        last = {
            method: {run.seed: x for run, x in found.items() if (run.world, run.pooling) == (world, method)}
            for method in METHODS
        }
        seeds = sorted(set.intersection(*map(set, last.values())))
        for method, name in METHODS.items():
            if not seeds:
                continue
            own = [last[method][seed] for seed in seeds]
            row = {"world": world, "align": name, "steps": own[0]["step"], "seeds": seeds}
            row |= {x: study.spread([each[x] for each in own]) for x in MEASURES}
            if name != "phi":
                pairs = [(last[method][seed], last["all pairs"][seed]) for seed in seeds]
                row["differences"] = {x: study.spread([a[x] - b[x] for a, b in pairs]) for x in MEASURES}
            rows.append(row)
    return {
        "machine": machine(torch.device("cpu"), None),
        "size": json.loads((out / "size.json").read_text()),
        **settings,
        "head_lr": study.HEAD_LR,
        "missing_runs": len(runs) - len(found),
        "rows": rows,
        "cost": json.loads((out / "cost.json").read_text()) if (out / "cost.json").exists() else [],
    }


def main() -> None:
    parser, run, _ = run_and_report(__doc__)
    run.add_argument("--batch", type=int, default=64, help="Batch size (default: %(default)s).")
    run.add_argument("--lr", type=float, default=16e-3, help="Learning rate of the embedder (default: %(default)s).")
    run.add_argument("--seeds", type=int, default=3, help="Number of seeds (default: %(default)s).")
    defaults = Size(images=4_096, scenes=6_144, eval_scenes=96, points=1)
    for name in SIZES:
        flag, value = f"--{name.replace('_', '-')}", getattr(defaults, name)
        run.add_argument(flag, type=int, default=value, help=f"{name} of study.py (default: %(default)s).")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "run":
        size = {name: getattr(arguments, name) for name in SIZES}
        settings = {name: getattr(arguments, name) for name in ("batch", "lr", "seeds")}
        work(arguments.out, Size(**size, points=1), settings)
        return
    result = report(arguments.out)
    print(cross_attention(result, "quality"), cross_attention(result, "cost"), sep="\n\n")
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
