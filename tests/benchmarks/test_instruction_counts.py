"""`benchmarks/instruction_counts.py` counts real calls, and its check fails where a count has changed."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import instruction_counts
from instruction_counts import AVX2, FLAGS, ROOT, differences, main


def test_differences_beyond_one_percent_are_named():
    stored = {"slower": 100_000, "faster": 100_000, "a little slower": 100_000, "a little faster": 100_000, "gone": 1}
    counts = {"slower": 101_100, "faster": 98_900, "a little slower": 100_900, "a little faster": 99_100, "new": 1}
    assert [sentence.split(";")[0] for sentence in differences(counts, stored)] == [
        "faster: 98,900 instructions, 1.1% fewer than stored",
        "gone: a count is stored, but no such call is made",
        "new: no count is stored",
        "slower: 101,100 instructions, 1.1% more than stored",
    ]


def test_the_flags_are_those_of_the_module():
    cmake = (ROOT / "CMakeLists.txt").read_text()
    *of_avx2, _ = AVX2
    assert f"set(isa_avx2 {' '.join(of_avx2)})" in cmake
    assert "set(kernel_optimisation -O3)" in cmake and "-O3" in FLAGS
    assert "${kernel_optimisation} -ffp-contract=off -fvisibility=hidden)" in cmake
    assert {"-ffp-contract=off", "-fvisibility=hidden"} < {*FLAGS}


@pytest.mark.long
def test_slower_machine_code_fails_the_check(tmp_path, monkeypatch, capfd):
    """The same kernels, compiled with fewer optimisations, take more instructions than the counts just stored."""
    if missing := instruction_counts.why_not():
        pytest.skip(missing)
    path = tmp_path / "counts.json"
    path.write_text("{}")
    monkeypatch.setattr(instruction_counts, "STORED", path)
    assert main(["--check"]) == 0 and "none are stored" in capfd.readouterr().out

    assert main(["--store", "--form", "max"]) == 0
    ((key, stored),) = json.loads(path.read_text()).items()
    assert key.split()[0] in ("gcc", "clang") and len(stored["counts"]) == 4
    assert stored["counts"]["max float32 forward"] > 32 * 49 * 32 * 128 / 8, "less than its fused multiply-adds"

    monkeypatch.setattr(instruction_counts, "FLAGS", (*FLAGS, "-O1"))
    assert main(["--check", "--form", "max"]) == 1
    assert "max float32 forward: " in capfd.readouterr().err


@pytest.mark.parametrize(("variable", "value", "words"), [("PATH", "", "valgrind is not"), ("CXX", "none", "no C++")])
def test_a_machine_without_the_tools_is_told(variable, value, words, monkeypatch, capsys):
    if missing := instruction_counts.why_not():
        pytest.skip(missing)
    monkeypatch.setenv(variable, value)
    assert main(["--check"]) == 0
    assert words in capsys.readouterr().out
    assert main([]) == 1


def test_a_source_that_does_not_compile_is_named(tmp_path, monkeypatch):
    if missing := instruction_counts.why_not():
        pytest.skip(missing)
    (source := tmp_path / "changed.cpp").write_text('#include "cpu/calls.h"\nauto call = pacl::no_such_function;\n')
    monkeypatch.setattr(instruction_counts, "SOURCES", {str(source): ()})
    with pytest.raises(SystemExit, match=r"changed\.cpp does not compile .*must fit csrc/cpu/calls\.h"):
        instruction_counts.build(tmp_path)
