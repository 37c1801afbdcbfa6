"""Write a commented settings file for one's own data, and print the commands that use it.

Failure mode: a file that a command refuses. The written settings are therefore loaded for every stage before the file
is put in place.
"""

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plaudit.data.guesses import Columns, guess
from plaudit.data.labels import NEGATIVE_POSITIVE, read_labels, spelled
from plaudit.data.tables import Table, load_table
from plaudit.errors import ConfigError
from plaudit.run.storage import write_text
from plaudit.settings import files
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.init import InitConfig
from plaudit.settings.ppo import PPOConfig
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.settings.sft import SFTConfig

STAGES = (SFTConfig, RewardModelConfig, PPOConfig, EvaluateConfig)


@dataclass(frozen=True)
class _Plan:
    """What is written for this data."""

    columns: Columns
    label_names: tuple[str, ...] | None
    """For the file, if the default names don't fit the labels."""
    label: str | None
    """The label whose logit is the reward; None without labels."""

    @property
    def has_reward_model(self) -> bool:
        return self.label is not None or self.columns.ranked


def run(config: InitConfig) -> Path:
    """Look at the data, write `config.output`, say what was guessed and what to run. Returns the file.

    Raises:
        ConfigError: the file exists, the data can't be read, or no column has texts.
    """
    if config.output.exists():
        raise ConfigError(f"{config.output} exists and is not overwritten: give another --output, or move it away")
    table = load_table(config.data)
    columns = guess(table)
    if not any((columns.text, columns.messages, columns.prompt, columns.ranked)):
        raise ConfigError(
            f"data={config.data!r} has no column of texts or conversations among {', '.join(table.columns) or 'none'}"
        )
    plan = _planned(columns, table)
    text = _settings_text(config, plan)
    with tempfile.TemporaryDirectory() as scratch:
        trial = Path(scratch, "settings.yaml")
        trial.write_text(text, encoding="utf-8")
        for stage in STAGES:
            if stage is not RewardModelConfig or plan.has_reward_model:
                files.load(stage, trial)
    write_text(config.output, text)
    print(f"{config.data} has {len(table)} rows. Guessed:")
    for line in columns.lines(table):
        print(f"  {line}")
    print(f"Wrote {config.output}; change what is wrong there. Then run:\n")
    for command in commands(config, plan):
        print(command)
    if not plan.has_reward_model:
        print("\nNo labels or rankings were found, so write a reward function first; the file shows one.")
    return config.output


def commands(config: InitConfig, plan: _Plan) -> list[str]:
    """The commands that train and evaluate with the written file."""
    flag = f"--config {shlex.quote(str(config.output))}"
    judge = [
        f"plaudit reward-model {flag}",
        f"plaudit-reward --model runs/judge{f' --label {shlex.quote(plan.label)}' if plan.label else ''} "
        f"--port {config.port} &",
    ]
    return [
        f"plaudit sft {flag}",
        *(judge if plan.has_reward_model else []),
        f"plaudit ppo {flag}",
        f"plaudit evaluate {flag}",
    ]


def _planned(columns: Columns, table: Table) -> _Plan:
    if columns.label is None:
        return _Plan(columns, None, None)
    labels = [value for value in table.columns[columns.label] if value not in (None, "")]
    try:
        read_labels(labels, NEGATIVE_POSITIVE, table.class_names.get(columns.label))
    except ConfigError:
        names = tuple(sorted({spelled(label) for label in labels}))
        return _Plan(columns, names, names[-1])
    return _Plan(columns, None, NEGATIVE_POSITIVE[1])


def _settings_text(config: InitConfig, plan: _Plan) -> str:
    columns = plan.columns
    data = [f"data: {_scalar(config.data)}"]
    if columns.text is not None:
        data.append(f"text_column: {_scalar(columns.text)}")
    if columns.label is not None:
        data.append(f"label_column: {_scalar(columns.label)}")
    data.append("held_out_fraction: 0.1  # the same in every stage; no stage trains on these rows")
    parts = [
        _section("sft", "Stage 1: the language model learns to write such texts.", _sft(config, columns, data)),
        *(
            [_section("reward-model", "Stage 2: a model that judges texts.", _judge(config, plan))]
            if plan.has_reward_model
            else []
        ),
        _section("ppo", "Stage 3: the language model learns from the rewards.", _ppo(config, plan)),
        _section("evaluate", "Compare the model before and after stage 3, on held-out prompts.", _evaluate()),
    ]
    head = f"""# Settings of all stages for {config.data}. Each command reads its own part:
#   plaudit sft --config {config.output}
# A flag overrides a line here. `plaudit COMMAND --help` lists every setting. Lines with # in front show defaults.
stages:
"""
    return head + "\n".join(parts)


def _sft(config: InitConfig, columns: Columns, data: Sequence[str]) -> list[str]:
    lines = [f"model: {_scalar(config.model)}  # directory or hub id; without a hub: imdb-gpt2-mini"]
    lines += ["output_dir: runs/sft", "dataset: &data", *(f"  {line}" for line in data)]
    if columns.messages is not None:
        lines.append(f"messages_column: {_scalar(columns.messages)}")
    if columns.completion is not None or columns.ranked:
        lines += [f"prompt_column: {_scalar(columns.prompt)}"] if columns.prompt else []
        lines.append(f"completion_column: {_scalar(columns.completion or 'chosen')}")
    lines += [
        "# max_length: 128  # tokens in one row",
        "# optimizer: {learning_rate: 5.0e-5, epochs: 1}  # default: chosen",
    ]
    return lines


def _judge(config: InitConfig, plan: _Plan) -> list[str]:
    lines = [f"model: {_scalar(config.judge)}  # directory or hub id; without a hub: imdb-distilbert-mini"]
    lines += ["output_dir: runs/judge", "dataset: *data"]
    if plan.columns.ranked:
        lines += ["kind: pairwise", f"ranked: {_scalar(config.data)}"]
    elif plan.label_names is not None:
        names = ", ".join(map(_scalar, plan.label_names))
        lines.append(f"label_names: [{names}]  # plaudit-reward --label names the one whose score is the reward")
    else:
        lines.append('# label_map: ["1=NEGATIVE", "5=POSITIVE"]  # what the values mean, if the log says it wrongly')
    return [*lines, "# optimizer: {learning_rate: 2.0e-5, epochs: 2}  # default: chosen"]


def _ppo(config: InitConfig, plan: _Plan) -> list[str]:
    columns = plan.columns
    lines = ["policy: runs/sft", "output_dir: runs/ppo", "dataset: *data", "prompts: &prompts"]
    if columns.messages is not None:
        lines.append(f"  messages_column: {_scalar(columns.messages)}")
        if columns.ends_with_answer:
            lines.append("  # These conversations end with an answer. Name a column without it: PPO writes the answer.")
    elif columns.prompt is not None:
        lines.append(f"  column: {_scalar(columns.prompt)}")
        if columns.completion is not None:
            lines.append(f"  fields: [{_scalar(columns.completion)}]  # passed to the reward with each prompt")
    else:
        lines += ["  min_tokens: 2  # the prompts are openings of the texts, 2 to 8 tokens long", "  max_tokens: 8"]
    lines += ["generation: &generation", f"  max_new_tokens: {64 if columns.text is None else 16}"]
    if plan.has_reward_model:
        lines += ["reward: &reward", f"  url: [http://127.0.0.1:{config.port}]"]
    else:
        answer = f", {columns.completion}" if columns.completion and columns.completion.isidentifier() else ""
        lines += [
            "reward: &reward",
            "  function: reward.py:score  # a file that you write, for example:",
            f"  #   def score(prompts, responses{answer}):",
            "  #       return [float(len(response.split())) for response in responses]",
        ]
    return [
        *lines,
        "# steps: 50  # default: one pass over the prompts, but at least 50",
        "# ppo:  # default: chosen for the model and the data",
        "#   learning_rate: 1.0e-4",
        "#   batch_size: 128",
        "#   mini_batch_size: 128",
        "#   init_kl_coef: 0.05  # higher keeps the model closer to where it began",
    ]


def _evaluate() -> list[str]:
    return [
        "after: runs/ppo",
        "output_dir: runs/evaluation",
        "dataset: *data",
        "prompts: *prompts",
        "generation: *generation",
        "reward: *reward",
        "# n_prompts: 256  # fewer if there are fewer",
    ]


def _section(name: str, comment: str, lines: Sequence[str]) -> str:
    return f"  {name}:  # {comment}\n" + "".join(f"    {line}\n" for line in lines)


def _scalar(value: str | None) -> str:
    """A text as YAML that is read as this text."""
    import yaml

    return (
        str(yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True))
        .removesuffix("\n...\n")
        .strip()
    )
