"""One table over the jobs of a sweep of bridge-train."""

import csv
import math
from types import SimpleNamespace

import pytest
import torch

from ditcache.bridge.evaluate import SOURCE, TARGET, Row
from ditcache.bridge.verdict import Losses, judge, paired
from ditcache.commands.bridge_train import after_sweep
from ditcache.report import bridge as report
from ditcache.report.bridge import write_bridge_report
from ditcache.report.bridge_sweep import AGAINST, REFERENCES, collect

DOMAINS = ["motion"] * 2 + ["edit"] * 2 + ["composite"] * 3
ALONE = torch.tensor([0.1, 0.2, 0.5, 0.7, 0.3, 0.4, 0.5])


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(job, words, gains): a job whose bridge's training runs are better than the target by
    `gains`, and whose router is by 0.05 in one run and 0.07 in the other.
    """

    def write_one(job, words, gains, target="wan", alone=ALONE, router=(0.05, 0.07)):
        monkeypatch.setattr(report, "command_line", lambda c: f"ditcache {c} evaluate=true {words}")
        rows = [Row(TARGET, alone, 1.0, 0), Row(SOURCE, alone + 0.5, 1.0, 0)]
        judged = []
        for i, gain in enumerate(gains):
            rows.append(Row(f"{i}|bridge", alone - gain * (1 + alone), 2.0, 1234, cost=2.25))
            bridge = rows[-1].losses.tolist()
            judged.append(Losses(bridge, alone.tolist(), {}, [0, 1], [4, 5, 6]))
        rows += [
            Row(f"{i}|router", alone - gain, 2.0, 50, cost=2.0) for i, gain in enumerate(router)
        ]
        (tmp_path / job).mkdir(exist_ok=True)
        verdicts, settings = judge(judged, 0.02), SimpleNamespace(evaluate=True)
        write_bridge_report(tmp_path / job, target, rows, DOMAINS, judged, verdicts, settings)

    return write_one


def cells(line):
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_one_line_per_job_best_first_under_what_it_is_compared_with(write, tmp_path, capsys):
    write("0", "projector=weighted", [0.01, 0.03])
    write("1", "projector=gating", [0.05, 0.06], router=(0.5, 0.5))
    write("10", "projector=full", [-0.2])
    write("2", "projector=identity", [0.03])
    capsys.readouterr()
    after_sweep(tmp_path)
    said = capsys.readouterr().out
    assert said.count("projector=gating") == 1 and str(tmp_path / "sweep.md") in said

    lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert cells(lines[0])[:3] == ["setting", "into", "parameters"]
    body = [cells(line) for line in lines[2:9]]
    names = ["gating", "identity", "weighted", "full"]
    assert [row[0] for row in body] == [
        *REFERENCES.values(), *(f"projector={name}" for name in names)
    ]  # fmt: skip
    head = cells(lines[0])
    weighted = dict(zip(head, body[5], strict=True))
    assert weighted["parameters"] == "1,234" and weighted["measured cost"] == "2.25x"
    assert weighted["motion"] == "0.1270 ± 0.0163"  # 0.15 - gain * 1.15
    assert (weighted["P1"], weighted["P2"], weighted["P3"]) == ("not told", "PASS", "not told")
    assert dict(zip(head, body[6], strict=True))["P2"] == "FAIL"
    target, _, router = (dict(zip(head, row, strict=True)) for row in body[:3])
    assert target["mean"] == f"{float(ALONE.mean()):.4f}" and target[AGAINST] == target["P1"] == ""
    # Of the first job, and not a mean over jobs.
    assert router["edit"] == "0.5400 ± 0.0141" and router[AGAINST] == "-0.0600 ± 0.0000"

    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == ["", "", "", "1", "2", "0", "10"]
    told = paired((ALONE[4:] - 0.02 * (1 + ALONE[4:])).tolist(), ALONE[4:].tolist())
    assert float(rows[5]["composite_difference"]) == pytest.approx(told.mean, abs=1e-6)
    assert float(rows[5]["composite_error"]) == pytest.approx(told.error, abs=1e-6)
    assert rows[4]["mean_spread"] == "" and float(rows[5]["mean_spread"]) > 0


def test_each_target_side_has_its_own_references(write, tmp_path):
    for side, alone in (("chrono", ALONE + 1), ("wan", ALONE)):
        write("0", "seed=[1,2]", [0.1], side, alone)
        write("1", "seed=3", [0.2], side, alone)
    found = collect(tmp_path)
    assert [line.target for line in found] == ["chrono"] * 5 + ["wan"] * 5
    assert [line.job for line in found] == ["", "", "", "1", "0"] * 2
    assert found[0].mean == pytest.approx(float(ALONE.mean()) + 1)


def test_words_in_brackets_are_shown(write, tmp_path, capsys):
    write("0", "controls=[shuffled]", [0.1])
    write("1", "controls=[lora]", [0.2])
    capsys.readouterr()
    collect(tmp_path)
    assert "controls=[shuffled]" in capsys.readouterr().out


def test_a_damaged_evaluation_is_named_and_left_out(write, tmp_path, capsys):
    for job in ("0", "1", "2", "3"):
        write(job, f"seed={job}", [0.1])
    for job, text in (("1", '{"target": "wa'), ("3", "[]")):
        (tmp_path / job / "evaluation-wan.json").write_text(text)
    found = collect(tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("ditcache bridge-train: " in line for line in said)
    assert said[0].endswith("evaluation-wan.json is damaged and left out")
    assert [line.job for line in found if line.job] == ["0", "2"]
    (tmp_path / "2" / "evaluation-wan.json").unlink()
    assert collect(tmp_path) == []


def test_a_run_that_fell_apart_is_last(write, tmp_path):
    write("0", "learning_rate=1", [math.nan])
    write("1", "learning_rate=0.1", [-0.1])
    assert [line.job for line in collect(tmp_path) if line.job] == ["1", "0"]


def test_other_clips_are_not_to_be_compared(write, tmp_path, capsys):
    write("0", "data.seed=0", [0.1])
    write("1", "data.seed=1", [0.1], alone=ALONE * 1.5)
    write("2", "mixed_precision=bf16", [0.1], alone=ALONE * 1.001)
    collect(tmp_path)
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("Not comparable")]
    assert len(said) == 1 and said[0].endswith("than the first job: data.seed=1")
    assert "Not comparable" in (tmp_path / "sweep.md").read_text()
