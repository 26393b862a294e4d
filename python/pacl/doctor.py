"""The command line of `pacl doctor`: what can run here, what is missing and how to get it, and a self-check."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence


def main(argv: Sequence[str], prog: str = "pacl doctor") -> int:
    """Print the report; 1 if a backend fails, or computes something else than the reference."""
    # Not tyro: this command says that it is missing.
    parser = argparse.ArgumentParser(prog=prog, description="What can run here, what is missing, and a self-check.")
    parser.add_argument("--json", action="store_true", help="for a bug report")
    as_json = parser.parse_args(argv).json
    from .self_check import report  # torch takes seconds, which --help has not

    found = report()
    wrong = any(check["failure"] is not None for check in found["checks"].values())
    if as_json:
        print(json.dumps(found, indent=2))
        return int(wrong)
    print(f"pacl_kernels {found['pacl_kernels']}, Python {found['python']}, {found['platform']}")
    for name, version in found["packages"].items():
        print(f"  {name:<16} {version or 'not installed'}")
    if None in [version for name, version in found["packages"].items() if name != "triton"]:
        print("  what is not installed comes with: pip install 'pacl-kernels[train]'")
    cpu = found["cpu"]
    print(f"{cpu['cores']} cores, {cpu['threads']} threads, {cpu['isa'] or 'no native module'}")
    print(f"GPUs: {', '.join(found['gpus']) or 'none'}; {found['disk_free_gib']} GiB free on this disk")
    print("Backends, and their largest error against float64:")
    for name, reason in found["backends"].items():
        state = "available" if reason is None else reason
        if (check := found["checks"].get(name)) is not None:
            where = "" if check["device"] is None else f" ({check['dtype']} on {check['device']})"
            state = f"{check['error']:.1e}{where}" if check["failure"] is None else f"FAILED{where}: {check['failure']}"
        print(f"  {name:<10} {state}")
    return int(wrong)
