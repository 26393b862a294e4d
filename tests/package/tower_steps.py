"""Train three steps, each on 12 pairs shared by all processes, for test_towers.py and test_packed_training.py."""

import json
import sys
from pathlib import Path

import torch
from pacl.data.samples import collate
from pacl.training.config import TrainConfig
from pacl.training.run import Run

WORDS = "red blue green large small old new round flat hot cold wet".split()


def main(values: dict) -> None:
    """Train with `values` as the fields of TrainConfig, and save a checkpoint."""
    run = Run(TrainConfig(**values | {"log_dir": Path(values["log_dir"])}))
    random = torch.Generator().manual_seed(0)
    mine = slice(12 // run.world * run.rank, 12 // run.world * (run.rank + 1))
    for step in range(3):
        images = list(torch.randn(12, 3, 64, 64, generator=random))
        if run.towers.variable:
            images = [x[:, : 16 + 16 * (i % 3), : 16 + 16 * (i % 4)] for i, x in enumerate(images)]
        captions = [f"a {word} thing {step}" for word in WORDS]
        names = {"key": WORDS[mine], "origin": [""] * len(WORDS[mine])}
        samples = [{"image": x, "caption": y} for x, y in zip(images[mine], captions[mine], strict=True)]
        run._step(collate(samples) | names)
        run.step += 1
    run.save()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
