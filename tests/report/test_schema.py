"""report.schema.json describes what the page is made from."""

import json
from pathlib import Path

import jsonschema
import pytest
from example_report import example, write_videos

import ditcache

SCHEMA = json.loads(
    (Path(ditcache.__file__).parent / "report" / "report.schema.json").read_text("utf-8")
)
CHECK = jsonschema.Draft202012Validator(SCHEMA)


def test_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_example_is_valid(tmp_path):
    CHECK.validate(json.loads(json.dumps(example(write_videos(tmp_path)))))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["schema"], 2),
        (["rows", 0, "kind"], "baseline"),
        (["rows", 1, "psnr"], 30.0),
        (["rows", 1, "speedup"], {"median": 2.0}),
        (["points", 0, "front"], "yes"),
        (["videos", 0, "a"], "/tmp/a.mp4"),
        (["videos", 0, "strips", "transformer", "cond"], "1010"),
        (["settings", "fps"], 0),
        (["gate"], "passed"),
        (["created"], "yesterday"),
    ],
)
def test_mistakes_are_found(tmp_path, path, value):
    report = example(write_videos(tmp_path) if path[0] == "videos" else None)
    place = report
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert [list(error.path)[: len(path)] for error in CHECK.iter_errors(report)] == [path]


def test_every_field_of_the_example_is_described():
    for key, part in (("row", "rows"), ("point", "points")):
        described = SCHEMA["$defs"][key]
        for entry in example()[part]:
            assert set(entry) == set(described["properties"]) == set(described["required"])
    assert set(example()) == set(SCHEMA["properties"]) == set(SCHEMA["required"])
