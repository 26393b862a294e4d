"""Print what training on millions of pairs costs in storage, time and network, with live towers and from features.

    python benchmarks/scale.py                                                    # rates measured on two CPU cores
    python benchmarks/scale.py --towers 2500 --train 30000 --shard-bytes 25000    # your own

docs/scale.md has the formulas. It needs neither torch nor a GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from result_tables import grid

PAIRS = (3_000_000, 30_000_000)
SHARD_BYTES = 32_000  # of a pair; an assumption, pictures of 256 pixels
BLOCK, REQUESTS = 2**23, 3  # bytes of a read of a shard; reads of an image's features
RECORD = 200  # bytes of an image's key and captions in features, about


@dataclass
class Rates:
    """Measures of one process.

    towers: pairs a second through both frozen towers. train: pairs a second through embedder, loss, backward and
    optimiser, from tokens. shard_bytes: of a pair in the shards. patches, width: of an image's tokens. dim: of a text's
    embedding.
    """

    towers: float
    train: float
    shard_bytes: float = SHARD_BYTES
    patches: int = 196
    width: int = 768
    dim: int = 512

    @property
    def feature_bytes(self) -> int:
        """Bytes of an image with one caption in features: tokens in 16 bits, the text in 32."""
        return 2 * self.patches * self.width + 4 * self.dim + RECORD


def measured(result: dict) -> Rates:
    """Return the rates of a file of training_step.py: those of its largest batch."""
    row = result["rows"][-1]
    step = row["fused_embedder_s"] + row["fused_loss_s"]
    return Rates(towers=row["batch"] / row["towers_s"], train=row["batch"] / step)


def costs(pairs: float, epochs: float, rates: Rates) -> dict[str, dict[str, float]]:
    """Return bytes stored, seconds, bytes and requests from and to the store, and bytes a second that feed a step.

    `before` are the seconds until the first step.
    """
    shards, features = pairs * rates.shard_bytes, pairs * rates.feature_bytes
    live, step = 1 / rates.towers + 1 / rates.train, 1 / rates.train
    return {
        "live towers": {
            "stored": shards,
            "before": 0.0,
            "training": epochs * pairs * live,
            "network": epochs * shards,
            "requests": epochs * shards / BLOCK,
            "feed": rates.shard_bytes / live,
        },
        "features": {
            "stored": shards + features,
            "before": pairs / rates.towers,
            "training": epochs * pairs * step,
            "network": shards + (2 + epochs) * features,  # written, read back for the SHA-256, and once an epoch
            "requests": shards / BLOCK + epochs * pairs * REQUESTS,
            "feed": rates.feature_bytes / step,
        },
    }


def table(rates: Rates, epochs: float = 1, pairs: tuple[float, ...] = PAIRS) -> str:
    """Return a row for each number of pairs and each way."""
    rows = []
    for count in pairs:
        for way, cost in costs(count, epochs, rates).items():
            cells = [f"{count / 1e6:g} million", way, f"{cost['stored'] / 1e12:.2f}"]
            cells += [f"{cost[name] / 86400:,.1f}" for name in ("before", "training")]
            cells += [f"{cost['network'] / 1e12:.1f}", f"{cost['requests'] / 1e6:.2f}", f"{cost['feed'] / 1e6:.2f}"]
            rows.append(cells)
    head = ["pairs", "", "TB stored", "days before", "days of training", "TB of network", "million requests", "MB/s"]
    return grid(head, rows)


def scale(result: dict) -> str:
    """Return the table of the rates in a file of training_step.py, with its machine."""
    on, settings, rates = result["machine"], result["settings"], measured(result)
    where = f"{on['gpu'] or on['cpu']}, {settings['threads']} threads, commit `{on['commit']}`, {on['date'][:10]}"
    values = f"T = {rates.towers:.2f} and S = {rates.train:.0f} pairs a second, E = 1"
    sizes = f"b = {rates.shard_bytes / 1000:.0f} KB (assumed), f = {rates.feature_bytes / 1000:.0f} KB"
    return f"{result['rows'][-1]['towers']}; {settings['dtype']}, {where}: {values}, {sizes}\n\n{table(rates)}"


def main() -> None:
    from fill_tables import Results

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = measured(Results().read("epyc-zen4-2cores-training-step"))
    parser.add_argument("--pairs", type=float, nargs="+", default=PAIRS)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--towers", type=float, default=default.towers, help="Pairs a second through both towers, T.")
    parser.add_argument("--train", type=float, default=default.train, help="Pairs a second from tokens, S.")
    parser.add_argument("--shard-bytes", type=float, default=SHARD_BYTES, help="Bytes of a pair in the shards, b.")
    parser.add_argument("--patches", type=int, default=default.patches, help="Patches of an image, N.")
    parser.add_argument("--width", type=int, default=default.width, help="Width of the vision tower, W.")
    parser.add_argument("--dim", type=int, default=default.dim, help="Width of a text's embedding, D.")
    options = vars(parser.parse_args())
    pairs, epochs = tuple(options.pop("pairs")), options.pop("epochs")
    print(table(Rates(**options), epochs, pairs))


if __name__ == "__main__":
    main()
