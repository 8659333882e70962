"""report.md holds the page's numbers in tables that keep their shape."""

import re

from example_report import HOSTILE, example, write_videos

from ditcache.report.markdown import code, fenced, markdown, plain, write_markdown


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_tables_are_whole_and_worst_comes_first(tmp_path):
    write_markdown(tmp_path, example(write_videos(tmp_path)))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    assert len(tables) == 3
    for table in tables:
        lines = table.splitlines()
        assert len({len(cells(line)) for line in lines}) == 1, table
    summary, difference, pairs = (
        [cells(line) for line in table.splitlines()[2:]] for table in tables
    )
    assert [row[0] for row in summary] == ["none", "taylorseer", "none, 10 steps", "none again"]
    assert summary[1][3:6] == ["2.23x (2.11–2.29)", "2.40x", "94%"]
    assert summary[0][9] == "–" and summary[3][9] == "identical"
    assert difference[1] == ["`cache.policy.every`", "`absent`", "`3`"]
    found = [row[2] for row in pairs]
    assert found[-1] == "identical" and found[:-1] == sorted(found[:-1], key=float)


def test_verdict_command_and_notes():
    report = example()
    text = markdown(report)
    assert "**Gate failed**\n- psnr: at least 30, got 29.84" in text
    assert f"```\n{report['command']}\n```" in text
    assert "- LPIPS was left out" in text
    assert "**Gate" not in markdown({**report, "gate": None})
    assert "Nothing: A and B" in markdown({**report, "difference": []})


def test_a_prompt_is_only_text():
    text = plain(HOSTILE)
    assert "<" not in text and "\n" not in text and not re.search(r"(?<!\\)[|`*]", text)
    assert code("a `b` | c") == "`` a `b` \\| c ``"
    assert fenced("a ```` b").startswith("`````\n")


def test_what_was_not_measured_is_a_dash():
    report = example()
    row = report["rows"][1]
    row.update(dict.fromkeys(["psnr", "ssim", "speedup", "reached", "memory_bytes"]))
    line = next(line for line in markdown(report).splitlines() if line.startswith("| taylorseer"))
    assert [cells(line)[i] for i in (3, 5, 7, 9, 10)] == ["–"] * 5
