"""The tables of README.md and docs are those of the files in `benchmarks/results`."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import fill_tables
import result_tables
from fill_tables import ROOT, Results, fill

RESULTS = Results()
DOT = "h100-bfloat16-dot"


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes results, by their file names, to a folder, and reads the folder."""

    def write(**files):
        for name, result in files.items():
            (tmp_path / name).write_text(json.dumps(result))
        return Results(tmp_path)

    return write


@pytest.mark.parametrize("page", fill_tables.pages(), ids=lambda path: path.name)
def test_a_page_has_the_tables_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert fill(text, RESULTS) == text, f"{page.name} differs: run python benchmarks/fill_tables.py"


def test_every_kind_of_table_is_in_a_page():
    """A misspelt comment would leave its table as it is, for ever."""
    found, kinds = {}, "|".join(fill_tables.TABLES)
    for page in fill_tables.pages():
        text = page.read_text("utf-8")
        found[page.name] = [match[1] for match in fill_tables.MARK.finditer(text)]
        assert len(found[page.name]) == len(re.findall(rf"<!-- (?:{kinds})\b", text)), f"{page.name}: unpaired"
    assert {name for names in found.values() for name in names} >= set(fill_tables.TABLES)
    assert {"step_table", "demo_table"} <= set(found["README.md"])


def test_the_command_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import fill_tables; fill_tables.main(['--check'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "checked: no page differs\n"


def test_a_page_that_differs_is_named_and_written(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    after = "After.\n<!-- other -->\nx\n<!-- /other -->\n"
    page.write_text(f"Before.\n<!-- table: {DOT} -->\n| old |\n<!-- /table -->\n{after}")
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(fill_tables, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"^tables differ from benchmarks/results: README.md; run python"):
        fill_tables.main(["--check"])
    assert "| old |" in page.read_text(), "--check wrote"
    fill_tables.main([])
    assert capsys.readouterr().out == "written: README.md\n"
    text = page.read_text()
    assert "| old |" not in text and "**fused cuda**" in text
    assert text.startswith("Before.\n<!-- table") and text.endswith(after)
    fill_tables.main(["--check"])
    page.write_text("<!-- table: lost -->\n<!-- /table -->\n")
    with pytest.raises(SystemExit, match=r"^README.md: benchmarks/results has no file named lost"):
        fill_tables.main([])


def test_the_newest_result_of_a_name_counts(folder):
    older, newer, before = (copy.deepcopy(RESULTS.read(DOT)) for _ in range(3))
    for result, ms in ((older, 77.7), (newer, 21.5), (before, 20.5)):
        result["rows"][0] |= {"step_ms": ms}
    files = {f"2026-01-02-{DOT}.json": newer, f"2026-01-01-{DOT}.json": older, f"2026-01-03-{DOT}-before.json": before}
    results = folder(**files)
    summary = fill_tables.TABLES["summary"](results)
    assert "| 21.5 |" in summary and len(summary.splitlines()) == 3, "one row: the newest, and nothing of `-before`"
    assert "77.7" not in fill_tables.TABLES["table"](results, DOT)
    both = fill_tables.TABLES["before_after"](results, "-before")
    assert both.index("20.5") < both.index("21.5")
    with pytest.raises(ValueError, match=r"no file named h100-float32-dot, expected DATE-h100-float32-dot\.json"):
        fill_tables.TABLES["table"](results, "h100-float32-dot")


@pytest.mark.parametrize("ratio, lead, first, second", [(0.99, 1.31, "met", "met"), (1.01, 1.29, *["**not met**"] * 2)])
def test_a_goal_is_met_or_not_by_its_newest_file(ratio, lead, first, second, folder):
    result = copy.deepcopy(RESULTS.read(DOT))
    result_tables.best(result).update(step_vs_products=ratio, step_vs_best_peer=lead)
    lines = fill_tables.TABLES["goals"](folder(**{f"2026-01-01-{DOT}.json": result})).splitlines()
    assert any(line.endswith(f"| ≤ 1.00 | {ratio} | {first} | `{DOT}` |") for line in lines)
    assert any(line.endswith(f"| ≥ 1.30 | {lead} | {second} | `{DOT}` |") for line in lines)
    assert any(line.endswith("| ≤ 0.60 | - | not measured | - |") for line in lines), "there is no file of a CPU"


def test_a_machine_without_a_name_is_an_error():
    with pytest.raises(ValueError, match="MACHINES of result_tables.py has no machine for abacus-float32-dot"):
        result_tables.summary({"abacus-float32-dot": RESULTS.read(DOT)})


def test_the_step_table_has_the_fastest_of_each():
    result = copy.deepcopy(RESULTS.read(DOT))
    rows = {row["name"]: row for row in result["rows"]}
    rows["fused triton"]["step_ms"], rows["compiled, pooled patch"]["step_ms"] = 11.1, 22.2
    rows["compiled, pooled patch"]["extra_memory_mib"] = 1536
    ours, products, compiled, eager = result_tables.one_step(result).splitlines()[2:]
    assert "| 11.1 |" in ours and "| 18.9 | - |" in products and "| 22.2 | 1.5 GiB |" in compiled and "183" in eager


def test_rows_that_did_not_run_are_listed_with_the_reason():
    table = result_tables.throughput(RESULTS.read("h100-bfloat16-cosine"))
    assert "Not run: eager, pooled patch (paper) (needs about 111.3 GiB" in table
    assert "\n| eager, pooled patch (paper) |" not in table


def test_the_study_says_what_its_file_says():
    last = {
        (row["world"], row["pooling"]): row["points"][-1]
        for row in RESULTS.read("epyc-avx2-2cores-study")["rows"]
        if (row["batch"], row["tau"], row["form"], row["tower"]) == (256, 0.05, "cosine", "clip")
    }
    page = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    for world in ("demo", "hard"):
        for measure in ("miou", "retrieval_r1"):
            ours, paired = (100 * last[world, pooling][measure]["mean"] for pooling in ("all pairs", "paired"))
            assert re.search(rf"{ours:.1f} against\s+{paired:.1f}", page), (world, measure)
