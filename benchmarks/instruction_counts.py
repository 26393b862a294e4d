"""Count the instructions of the AVX2 kernels, and compare them with the stored counts of the same compiler.

    python benchmarks/instruction_counts.py          # a table of counts, stored counts and ratios, in half a minute
    python benchmarks/instruction_counts.py --check  # exits with 1 if a count differs from the stored one by over 1 %
    python benchmarks/instruction_counts.py --store  # stores the counts, after a change that is meant to move them
    python benchmarks/instruction_counts.py --form dot --functions  # the functions in which the instructions are

Valgrind's tool callgrind counts the instructions. The counts are the same on every run, even on a busy machine, so they
show losses that timings hide. They say nothing about caches, page faults or threads.

instruction_counts.cpp makes the calls, at B = K = 32, N = 49 and D = 128. This script compiles it with the kernels and
the flags of CMakeLists.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STORED = Path(__file__).with_suffix(".json")  # {compiler: {"compiler", "libc", "date", "counts": {call: instructions}}}
LIMIT = 0.01  # of a count, more or fewer
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden")
AVX2 = ("-mavx2", "-mfma", "-DPACL_ISA=avx2")
SOURCES = {  # and the flags that each one adds
    "csrc/cpu/kernels.cpp": AVX2,
    "csrc/cpu/compatibility.cpp": (),
    "csrc/cpu/max.cpp": (),
    "benchmarks/instruction_counts.cpp": (),
}
COUNTED = "counted_call"  # the function of instruction_counts.cpp
STORE = "run python benchmarks/instruction_counts.py --store"


def compiler() -> list[str]:
    """Return the command of the C++ compiler that installs the kernels, or an empty list if there is none."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command if shutil.which(command[0]) else []
    return [found] if (found := next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)) else []


def why_not() -> str | None:
    """Return the sentence that says why nothing can be counted here, or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"this machine is {platform.system()} on {platform.machine()}, expected Linux on x86_64"
    if " avx2" not in Path("/proc/cpuinfo").read_text():
        return "this processor has no AVX2"
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    return None if compiler() else "no C++ compiler (GCC or Clang) is installed"


def version() -> tuple[str, str]:
    """Return the compiler's name with its major version, by which counts are stored, and its full version."""
    command = [*compiler(), "-dM", "-E", "-x", "c++", os.devnull]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    macros = {name: value for _, name, *value in (line.split(" ", 2) for line in lines)}
    prefix = "__clang" if "__clang_major__" in macros else "__GNUC"
    names = ("major__", "minor__", "patchlevel__") if prefix == "__clang" else ("_", "MINOR__", "PATCHLEVEL__")
    numbers = [macros[f"{prefix}_{name}"][0] for name in names]
    return f"{'clang' if prefix == '__clang' else 'gcc'} {numbers[0]}", ".".join(numbers)


def build(folder: Path) -> Path:
    """Compile the kernels and instruction_counts.cpp in `folder`, and return the program."""
    objects = []
    for source, flags in SOURCES.items():
        objects.append(folder / f"{len(objects)}.o")
        command = [*compiler(), *FLAGS, *flags, f"-I{ROOT / 'csrc'}", "-c", ROOT / source, "-o", objects[-1]]
        if subprocess.run(command).returncode:
            raise SystemExit(f"{source} does not compile (see above); instruction_counts.cpp must fit csrc/cpu/calls.h")
    program = folder / "program"
    # Without -z now, the first call of each library function would count the dynamic linker.
    if subprocess.run([*compiler(), *objects, "-pthread", "-Wl,-z,now", "-o", program]).returncode:
        raise SystemExit("instruction_counts.cpp does not link with the files of csrc/cpu in SOURCES (see above)")
    return program


def count(program: Path, form: str | None = None) -> dict[str, Counter[str]]:
    """Return the instructions of each function of each call, by the call's name; of one form, or of all."""
    files = program.parent / "callgrind"
    tool = ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={files}"]
    limits = [f"--toggle-collect={COUNTED}", f"--dump-after={COUNTED}"]
    plain = ["--compress-strings=no", "--compress-pos=no"]
    run = subprocess.run(
        [*tool, *limits, *plain, program, *([form] if form else [])], stdout=subprocess.PIPE, text=True
    )
    if run.returncode:
        raise SystemExit(f"valgrind ended with {run.returncode} (see above), expected 0")
    # callgrind writes a file for each call, in order
    return {name: functions(Path(f"{files}.{number}")) for number, name in enumerate(run.stdout.splitlines(), 1)}


def functions(path: Path) -> Counter[str]:
    """Return the instructions of each function without those it calls, from a file of callgrind.

    callgrind_annotate reads the first of several files alone: in the others it gives all instructions to `main`.
    """
    costs: Counter[str] = Counter()
    name, is_call = "", False
    for line in path.read_text().splitlines():
        if line.startswith("fn="):
            name = line[3:]
        elif line.startswith("calls="):
            is_call = True  # the next line has the instructions of the called function
        elif line[:1].isdigit():
            costs[name] += 0 if is_call else int(line.split()[1])
            is_call = False
    return costs


def differences(counts: dict[str, int], stored: dict[str, int]) -> list[str]:
    """Return a sentence for each call whose count is more than LIMIT from the stored one, or has no counterpart."""
    found = []
    for name in sorted(counts.keys() | stored.keys()):
        if name not in stored:
            found.append(f"{name}: no count is stored; {STORE}")
        elif name not in counts:
            found.append(f"{name}: a count is stored, but no such call is made; {STORE}")
        elif abs(change := counts[name] / stored[name] - 1) > LIMIT:
            numbers = (
                f"{counts[name]:,} instructions, {abs(change):.1%} {'more' if change > 0 else 'fewer'} than stored"
            )
            found.append(f"{name}: {numbers}; {'if that is meant, ' if change > 0 else ''}{STORE}")
    return found


def table(counts: dict[str, int], stored: dict[str, int]) -> str:
    rows = [f"{'':26}{'instructions':>14}{'stored':>14}{'ratio':>9}"]
    for name, number in counts.items():
        old = stored.get(name)
        rows.append(f"{name:26}{number:14,}" + (f"{old:14,}{number / old:9.4f}" if old else f"{'-':>14}{'-':>9}"))
    return "\n".join(rows)


def shares(costs: Counter[str]) -> str:
    """Return the functions that have at least 1 % of a call's instructions, the largest share first."""
    rows = []
    for function, number in costs.most_common():
        if (share := number / costs.total()) >= 0.01:
            short = re.sub(r"\(anonymous namespace\)::|pacl::|^(void|float|double|bool) ", "", function)
            rows.append(f"{share:8.1%}{number:14,}  {short.split('(')[0]}")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Count the instructions of the AVX2 kernels under callgrind.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="Exit with 1 if a count differs from the stored one.")
    what.add_argument("--store", action="store_true", help="Store the counts for this compiler.")
    parser.add_argument("--form", choices=("dot", "cosine", "max"), help="Count the calls of one form.")
    parser.add_argument("--functions", action="store_true", help="Print the functions with the most instructions.")
    args = parser.parse_args(argv)
    if missing := why_not():
        print(f"instruction counts: {missing}, so nothing is counted")
        return 0 if args.check else 1

    key, full = version()
    libc = " ".join(platform.libc_ver())  # max's backward clears memory with its memset, which is 3 % of the count
    every = json.loads(STORED.read_text())
    entry = every.get(key, {"counts": {}})
    stored = entry["counts"]
    if args.check and not stored:
        print(f"instruction counts: none are stored for {key}, only for {', '.join(every)}, so nothing is checked")
        return 0
    with tempfile.TemporaryDirectory(prefix="instruction-counts-") as folder:
        calls = count(build(Path(folder)), args.form)
    counts = {name: costs.total() for name, costs in calls.items()}
    others = {name: number for name, number in stored.items() if args.form and name.split()[0] != args.form}
    print(table(counts, stored), f"counted: {key} ({full}), {libc}", sep="\n")
    if stored:
        print(f"stored: {key} ({entry['compiler']}), {entry['libc']}, {entry['date']}")
    for name, costs in calls.items() if args.functions else ():
        print(f"\n{name}", shares(costs), sep="\n")
    if args.store:
        every[key] = {"compiler": full, "libc": libc, "date": str(date.today()), "counts": others | counts}
        STORED.write_text(json.dumps(every, indent=1) + "\n")
    found = differences(others | counts, stored) if args.check else []
    for sentence in found:
        print(sentence, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
