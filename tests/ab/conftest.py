import json
import os
from types import SimpleNamespace

import pytest

from ditcache import cli
from ditcache.ab import runs
from ditcache.pipeline.render import Renderer

SMALL = ["steps=5", "controls=1", "upscale=1", "cache.head=1"]


@pytest.fixture
def ab(tmp_path, monkeypatch, capsys):
    """Runs the command in a folder of its own. `ab.rendered`: what was rendered since the last run
    began, as (cache, case, steps).
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "CHECKED", {})
    state = SimpleNamespace(rendered=[], folder=tmp_path, err="", out="")
    render = Renderer.render

    def counted(self, index, prompt, cache, picture, **more):
        state.rendered.append((cache.name, index, more.get("steps") or self.settings.steps))
        return render(self, index, prompt, cache, picture, **more)

    monkeypatch.setattr(Renderer, "render", counted)

    def run(*arguments, code=0, name="run", small=True):
        state.rendered.clear()
        own = SMALL if small else []
        found = cli.run(["ab-test", *own, *arguments, f"hydra.run.dir={tmp_path / name}"])
        captured = capsys.readouterr()
        state.out, state.err = captured.out, captured.err
        assert found == code, captured.err
        path = tmp_path / name / "report.json"
        return json.loads(path.read_text()) if path.is_file() else None

    state.run = run
    yield state
    os.chdir("/")
