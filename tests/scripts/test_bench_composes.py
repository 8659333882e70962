"""The benchmark of compile, offload and cache together, on a few steps."""

import re

import bench_composes
import pytest
import torch


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["", "--steps", "6", "--rounds", "1", "--backend", "eager"])
    monkeypatch.setattr(bench_composes, "SLACK", 0.0)  # six steps say nothing about time

    def run():
        bench_composes.main()
        return capsys.readouterr().out

    yield run
    torch._dynamo.reset()


def test_results_are_equal_and_skipped_forwards_fetch_nothing(run):
    text = run()
    rows = {way: next(x for x in text.splitlines() if x.startswith(f"| {way} |"))
            for way in bench_composes.WAYS}  # fmt: skip
    for way, line in rows.items():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[7] == "0.00"
        assert (float(cells[6]) > 5) == ("offloaded" in way), "the embedded blocks hold 10 MiB"
        away = re.match(r"(\S+) apart", cells[5])
        assert cells[5] == "equal" or float(away[1]) < 1e-4
        assert cells[3].endswith("(1.50x)")


def test_a_skipped_forward_that_fetches_is_a_fault(run, monkeypatch):
    one_run = bench_composes.one_run

    def leaky(*args):
        found = one_run(*args)
        found.skipped = [b + 1 for b in found.skipped]
        return found

    monkeypatch.setattr(bench_composes, "WAYS", ("eager",))
    monkeypatch.setattr(bench_composes, "one_run", leaky)
    with pytest.raises(SystemExit, match="eager: a skipped forward fetched weights"):
        run()
