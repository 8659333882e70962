"""What the README tells people to type works, and what it points to is there."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ditcache import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


def commands():
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            for line in block.splitlines():
                if line.strip() and not line.startswith("#"):
                    yield line


def test_there_are_commands():
    assert len(list(commands())) >= 5


@pytest.mark.parametrize("line", [x for x in commands() if x.startswith("ditcache ")])
def test_ditcache_commands_compose(line, capsys):
    arguments = shlex.split(line, comments=True)[1:]
    arguments = [
        a for a in arguments if a != "-m" and not (a.count(",") and "=" in a and " " not in a)
    ]
    assert cli.run([*arguments, "--cfg", "job"]) == 0
    assert "_target_" in capsys.readouterr().out


def test_the_example_policy_runs_and_is_what_the_readme_shows(tmp_path):
    example = (ROOT / "examples" / "custom_policy.py").read_text()
    shown = re.search(r"# my_policy.py\n.*?(    def should_compute.*?)```", README, re.S)
    assert shown and shown[1].strip() in example
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "custom_policy.py"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "'skipped': " in done.stdout and "'skipped': 0" not in done.stdout


@pytest.mark.parametrize("line", [x for x in commands() if x.startswith("make ")])
def test_make_targets_exist(line):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(line.split("#")[0].split()[1:]) <= set(targets)


def test_the_custom_policy_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, block in re.findall(r"```(?:python|yaml)\n# (my_\S+)\n(.*?)```", README, re.S):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(block)
    arguments = ["cache._target_=my_policy.Restless", "+cache.policy.limit=1e3", "steps=8"]
    assert cli.run(["generate", *arguments, f"hydra.run.dir={tmp_path}/run"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/steps.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["computed"] and r["branch"] == "cond"] == [0, 7]
    assert all(r["signal"] > 0 for r in rows if r["reason"] == "policy")


def test_links_and_pictures_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (
                f"{page.name}: {target}"
            )


def test_the_tree_names_real_files():
    tree = re.search(r"```\nditcache/\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    folder = ROOT
    for line in tree[0].splitlines()[1:-1]:
        name = line.split()[0]
        folder = ROOT if not line.startswith(" ") else ROOT / "ditcache"
        assert (folder / name).exists(), name
