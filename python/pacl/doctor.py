"""The command line of `pacl doctor`: report what runs here, what is missing and how to get it, and check backends."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from .commands import example, next_command


def main(argv: Sequence[str], prog: str = "pacl doctor") -> int:
    """Print the report; returns 1 if a backend fails or disagrees with the reference, else 0."""
    # argparse, not tyro: this command must run where tyro is missing.
    about = "Report what runs here and what is missing, and check every backend against the reference."
    parser = argparse.ArgumentParser(prog=prog, description=about, epilog=example(prog))
    parser.add_argument("--json", action="store_true", help="Print the report as JSON, for a bug report.")
    as_json = parser.parse_args(argv).json
    from .self_check import report  # imports torch, which takes seconds that --help should not

    found = report()
    wrong = any(check["failure"] is not None for check in found["checks"].values())
    if as_json:
        print(json.dumps(found, indent=2))
        return int(wrong)
    print(f"pacl_kernels {found['pacl_kernels']}, Python {found['python']}, {found['platform']}")
    for name, version in found["packages"].items():
        print(f"  {name:<16} {version or 'not installed'}")
    step: str | None = next_command("demo", "--out", "toy")
    if None in [version for name, version in found["packages"].items() if name != "triton"]:
        print("  to install what is missing: pip install 'pacl-kernels[train]'")
        step = None
    cpu = found["cpu"]
    print(f"{cpu['cores']} cores, {cpu['threads']} threads, {cpu['isa'] or 'no native module'}")
    print(f"GPUs: {', '.join(found['gpus']) or 'none'}; {found['disk_free_gib']} GiB free on this disk")
    print("Backends and their largest error against float64:")
    for name, reason in found["backends"].items():
        state = "available" if reason is None else reason
        if (check := found["checks"].get(name)) is not None:
            where = "" if check["device"] is None else f" ({check['dtype']} on {check['device']})"
            state = f"{check['error']:.1e}{where}" if check["failure"] is None else f"FAILED{where}: {check['failure']}"
        print(f"  {name:<10} {state}")
    if step is not None and not wrong:
        print(step)
    return int(wrong)
