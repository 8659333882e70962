"""The command line: instant help, prompts as people type them, one readable line for every
mistake.
"""

import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ditcache import cli
from ditcache.arguments import hydra_arguments, quoted_override


def parsed(arguments):
    """What the configuration holds after Hydra has read these arguments."""
    overrides = OverridesParser.create().parse_overrides(hydra_arguments(arguments))
    values = OmegaConf.create({o.key_or_group: o.value() for o in overrides})
    return OmegaConf.to_container(values, resolve=True)


@pytest.mark.parametrize(
    "prompt",
    [
        "a fox's tail (night), schön",
        "[a b] {c}, d: e; f = g",
        "\"quoted\" and 'quoted'",
        "E = mc2 on a board",
        "100 % ${x} $HOME `x` \\ \\' \\\\${y}",
        "wow! #1 @home ~ 东京",
        "null",
        "3.5",
        "trailing \\",
        "two\nlines",
    ],
)
def test_prompts_arrive_as_typed(prompt):
    assert parsed([prompt])["prompt"] == [prompt]
    assert parsed([f"prompt={prompt}"])["prompt"] == prompt


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_text_survives_quoting(text):
    assert parsed(["cache=none", f"prompt={'x' + text + 'x'}"])["prompt"] == f"x{text}x"


def test_several_prompts_make_a_list_and_overrides_stay():
    values = parsed(["a red star, left", "model=tiny", "b", "cache.policy.every=3"])
    assert values == {"model": "tiny", "cache.policy.every": 3, "prompt": ["a red star, left", "b"]}


def test_hydra_users_may_quote_twice_or_give_a_list():
    assert parsed(["prompt='a, b'"])["prompt"] == "a, b"
    assert parsed(["prompt=['a, b','c']"])["prompt"] == ["a, b", "c"]


def test_a_prompt_may_begin_and_end_with_quotes():
    assert parsed(['prompt="stop" said the "fox"'])["prompt"] == '"stop" said the "fox"'
    assert parsed(["prompt='a' or 'b' or 'c'"])["prompt"] == "'a' or 'b' or 'c'"
    assert parsed(['"quoted" alone'])["prompt"] == ['"quoted" alone']


@settings(max_examples=200, deadline=None)
@given(st.text("ab'\"\\${}, ", min_size=1))
def test_any_free_prompt_survives(text):
    assert parsed(["x" + text])["prompt"] == ["x" + text]


def test_flags_go_first_whatever_the_order():
    arguments = ["a prompt", "steps=2", "--config-dir", "my conf", "-m", "~cache.head", "--cfg=job"]
    assert hydra_arguments(arguments) == [
        "--config-dir", "my conf", "-m", "--cfg", "job", "steps=2", "~cache.head", "prompt=['a prompt']",
    ]  # fmt: skip


def test_paths_are_quoted_only_where_they_must_be():
    assert quoted_override("image=my cat (1).png") == "image='my cat (1).png'"
    assert quoted_override("model.path=/data/Wan2.1-T2V") == "model.path=/data/Wan2.1-T2V"
    assert quoted_override("prompt_file='a b.txt'") == "prompt_file='a b.txt'"


def test_help_imports_neither_torch_nor_hydra_nor_rich():
    code = (
        "import sys; from ditcache.cli import run; run(['--help']); run(['generate', '--help']);"
        "run(['generat']); bad = {'torch', 'hydra', 'rich', 'omegaconf', 'numpy'} & set(sys.modules);"
        "sys.exit(1 if bad else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_checks_come_before_torch():
    code = (
        "import sys; from ditcache.cli import run; code = run(['generate', 'cache=fbcache', "
        "'cache.policy.threshold=-1']); sys.exit(code if 'torch' not in sys.modules else 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 2


def test_help_shows_commands_groups_and_keys(capsys):
    assert cli.run(["--help"]) == 0
    assert "generate" in capsys.readouterr().out
    assert cli.run(["generate", "--help"]) == 0
    text = capsys.readouterr().out
    for word in (
        "cache/forecaster",
        "taylorseer",
        "wan2.2_t2v",
        "num_frames",
        "compare",
        "--cfg job",
        "-m",
    ):
        assert word in text


def test_version(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ditcache 0.")


MISTAKES = {
    ("generat",): "no command 'generat'. Did you mean 'generate'?",
    (
        "generate",
        "cache=taylorsee",
    ): "cache: no option 'taylorsee'. Did you mean 'taylorseer'? One of: ",
    ("generate", "model=tny"): "model: no option 'tny'. Did you mean 'tiny'?",
    ("generate", "cache/forecaster=tailor", "cache=interval"): "Did you mean 'taylor'?",
    ("generate", "cache=null"): "cache: needs a name. Did you mean 'none'?",
    ("generate", "modle=tiny"): "modle: no such key. Did you mean 'model'?",
    (
        "generate",
        "cache=fbcache",
        "cache.policy.treshold=1",
    ): "cache.policy.treshold: no such key. Did you mean 'threshold'?",
    ("generate", "+colour=1"): "colour: no such key.",
    ("generate", "+cache.polcy=1"): "cache.polcy: no such key. Did you mean 'policy'?",
    (
        "generate",
        "steps=many",
    ): "steps: Value 'many' of type 'str' could not be converted to Integer",
    ("generate", "steps=2.5"): "steps: Value '2.5'",
    ("generate", "steps=0"): "steps: must be >= 1, got 0",
    ("generate", "seed=-1"): "seed: must be >= 0, got -1",
    ("generate", "guidance=-2"): "guidance: must be > 0, got -2.0",
    ("generate", "compare=perhaps", "cache=interval"): "compare: Value 'perhaps'",
    ("generate", "compare=true"): "compare: needs a cache to compare; set cache=<policy>",
    (
        "generate",
        "cache=fbcache",
        "cache.policy.threshold=-1",
    ): "cache.policy.threshold: must be >= 0, got -1.0",
    (
        "generate",
        "cache=fbcache",
        "cache.policy.threshold=nan",
    ): "cache.policy.threshold: must be >= 0, got nan",
    (
        "generate",
        "cache=interval",
        "cache.policy.every=0",
    ): "cache.policy.every: must be >= 1, got 0",
    ("generate", "cache=interval", "cache.head=-1"): "cache.head: must be >= 0, got -1",
    (
        "generate",
        "cache=interval",
        "cache.granularity=blocks",
    ): "cache.granularity: must be 'stack', 'per_block', 'output' or a group size",
    ("generate", "cache=interval", "cache.granularity=99"): "1 to 8, got 99",
    (
        "generate",
        "cache=taylorseer",
        "cache.forecaster.order=7",
    ): "cache.forecaster.order: must be between 0 and 3, got 7",
    (
        "generate",
        "cache=interval",
        "cache.policy._target_=os.system",
    ): "cache.policy._target_: os.system is not a Policy",
    (
        "generate",
        "cache=interval",
        "cache.policy._target_=no.such.Thing",
    ): "cannot import no.such.Thing",
    (
        "generate",
        "cache=interval",
        "cache.policy._target_=ditcache.cache.policies.interval.Intervall",
    ): "Did you mean 'Interval'?",
    ("generate", "guidance_low=3"): "guidance_low: this model has one expert",
    ("generate", "model.boundary=0.5"): "model.boundary: this model has one expert",
    ("generate", "guidance=1", "guidance_low=3"): "guidance_low: has no effect without guidance",
    (
        "generate",
        "guidance=1",
        "negative_prompt=x",
    ): "negative_prompt: has no effect without guidance",
    (
        "generate",
        "+cache.head=9",
    ): "cache.policy: without one no setting has an effect; use cache=none",
    ("generate", "cache=interval", "cache.policy=null"): "use cache=none",
    (
        "generate",
        "cache=interval",
        "cache.forecaster=null",
    ): "cache.forecaster: needs an option, not null",
    ("generate", "cache=interval", "cache.policy._target_=.a.B"): "needs package.module.Class",
    ("generate", "seed=100000000000000000000"): "seed: must be < 2**63",
    ("generate", "num_frames=801"): "num_frames: this model's position tables end at 512, got 801",
    ("generate", "model=chronoedit", "num_frames=29"): "num_frames: an edit has 5",
    ("generate", "height=70"): "height: must be a multiple of 16, got 70; nearest: 64 or 80",
    ("generate", "width=0"): "width: must be a multiple of 16, got 0; nearest: 16 or 32",
    ("generate", "num_frames=16"): "num_frames: must be 4n + 1, got 16; nearest: 13 or 17",
    ("generate", "prompt_file=missing.txt"): "prompt_file: cannot read missing.txt: No such file",
    ("generate", "prompt_file=missing.txt", "a prompt"): "not both",
    ("generate", "prompt="): "prompt: must not be empty",
    ("generate", "image=cat.png"): "image: this model does not take a picture",
    ("generate", "model=wan2.1_i2v_480p"): "image: this model starts from a picture",
    ("generate", "model.path=./nowhere"): "model.path: no folder './nowhere'",
    (
        "generate",
        "model.path=zoo:wan-tin",
    ): "model.path: the zoo has no 'wan-tin'. Did you mean 'wan-tiny'?",
    ("generate", "model.dtype=fp16"): "model.dtype: no 'fp16'. Did you mean 'float16'?",
    ("generate", "model.device=tpu0"): "model.device: cannot use 'tpu0'",
    ("generate", "model.offload=model"): "needs a GPU",
    ("generate", "model.device=cuda:99"): "model.device: cannot use 'cuda:99'",
    ("generate", "model=wan"): "set model.path=<diffusers folder>, or model=tiny",
    ("generate", "hydra.run.dir=afile/x"): "cannot write afile/x: Not a directory",
    ("generate", "steps=${steps}"): "steps",
    ("generate", "model.steps=${nope}"): "nope",
    ("generate", "steps=[1"): "cannot read 'steps=[1'",
    ("generate", "--config-dir", "nowhere"): "nowhere",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=lambda a: " ".join(a))
def test_a_mistake_is_one_line_exit_2_and_leaves_nothing(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("x")
    assert cli.run(list(arguments)) == 2
    out, err = capfd.readouterr()
    assert MISTAKES[arguments] in err
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err and out == ""
    assert [p.name for p in tmp_path.rglob("*")] == ["afile"]


def test_completion_of_command_words(monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", "ditcache ge")
    assert cli.run(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == ["generate"]


def test_completion_after_the_command_is_hydras(monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", "ditcache generate model=w")
    monkeypatch.setenv("COMP_POINT", "25")
    assert cli.run(["-sc", "query=bash"]) == 0
    assert "model=wan2.2_t2v" in capsys.readouterr().out


def test_completion_script_is_for_our_name(capsys):
    assert cli.run(["-sc", "install=bash"]) == 0
    assert "ditcache" in capsys.readouterr().out
