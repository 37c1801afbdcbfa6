"""Answer prompts with a trained policy: a run's adapters, its merged model, or one of its checkpoints.

Failure mode: prompts are prepared differently from training, without its chat template, system message or stop strings.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plaudit.data.chat_templates import render, use_chat_template
from plaudit.data.conversations import as_text, messages_of, with_system
from plaudit.data.tables import DataError, Table, kind_of, read_file
from plaudit.errors import ConfigError
from plaudit.parallel.devices import device_named, settle_arithmetic
from plaudit.policy.checks import check_policy, room_for_prompts
from plaudit.policy.endings import Endings
from plaudit.policy.generation import Draws, generate
from plaudit.policy.model import Policy
from plaudit.policy.pretrained import load_tokenizer
from plaudit.policy.reading import settle
from plaudit.policy.samples import Samples
from plaudit.policy.texts import tokens_in_front
from plaudit.policy.uncached_generation import generate_uncached
from plaudit.policy.writer import Writer, load_writer, revision_of
from plaudit.run import checkpoint as checkpoints
from plaudit.settings.generate import GenerateConfig
from plaudit.settings.policy import GenerationSettings
from plaudit.settings.ppo import PPOConfig
from plaudit.stages.trained_policy import load_checkpoint, settings_of
from plaudit.wire import ChatMessage

Prompt = str | list[ChatMessage]


@dataclass(frozen=True)
class Answer:
    """A prompt with its answer."""

    prompt: Prompt
    response: str
    ended: bool
    """Whether it ended with an end token or a stop string, not at the length limit."""


def run(config: GenerateConfig) -> list[Answer]:
    """Answer every prompt, and print the answers as they are generated."""
    settle_arithmetic()
    settle(config.run)
    trained = settings_of(config.run)
    writer = _writer(config, trained)
    prompts = prompts_of(config, trained)
    token_ids = _tokens(config, trained, writer, prompts)
    settings = _generation(config, trained)
    _require_room(writer, prompts, token_ids, settings)
    answers = []
    for answer in _answers(config, writer, prompts, token_ids, settings):
        print(_shown(config, answer, alone=len(prompts) == 1), flush=True)
        answers.append(answer)
    return answers


def _writer(config: GenerateConfig, trained: PPOConfig | None) -> Writer:
    device = device_named(config.device)
    if trained is None or not (Path(config.run) / checkpoints.MANIFEST).is_file():
        return load_writer(config.run, device=device)
    directory = Path(config.run)
    policy = load_checkpoint(trained, directory, device)
    model = policy.language_model.eval()
    cached = check_policy(Policy(model).eval(), config.run)
    return Writer(config.run, model, load_tokenizer(trained.policy), cached, revision_of(directory))


def prompts_of(config: GenerateConfig, trained: PPOConfig | None) -> list[Prompt]:
    """The prompts, from the arguments, the file, or standard input.

    Raises:
        DataError: there are none, the file can't be read, or a row contains no prompt.
    """
    prompts: list[Prompt]
    if config.file is not None:
        prompts = _in_file(config, trained, read_file(config.file))
    elif config.texts:
        prompts = list(config.texts)
    else:
        if _from_a_terminal():
            print("prompts, one a line; Ctrl-D ends them", file=sys.stderr)
        prompts = [line for line in (text.rstrip("\r\n") for text in sys.stdin) if line.strip()]
    for number, prompt in enumerate(prompts, start=1):
        if isinstance(prompt, str) and not prompt.strip():
            raise DataError(f"prompt {number} is empty")
    if not prompts:
        raise DataError("there is no prompt: give some as arguments, with --file FILE, or on the standard input")
    return prompts


def _from_a_terminal() -> bool:
    return sys.stdin.isatty()


def _in_file(config: GenerateConfig, trained: PPOConfig | None, table: Table) -> list[Prompt]:
    of_run = trained.prompts if trained is not None else None
    texts = config.column or (of_run.column if of_run else None)
    conversations = config.messages_column or (of_run.messages_column if of_run else None)
    named = [config.messages_column or config.column, conversations, texts, "messages", "prompt", "text"]
    name = next((name for name in named if name in table.columns), None)
    if name is None or (named[0] is not None and name != named[0]):
        wanted = named[0] or "messages, prompt or text"
        raise DataError(
            f"{config.file} has no column {wanted}; it has: {', '.join(table.columns) or 'none at all'}. Name one with "
            "--column or --messages-column"
        )
    prompts: list[Prompt] = []
    for number, value in enumerate(table.columns[name], start=1):
        where = f"{config.file}, row {number}, column {name!r}"
        if name in (conversations, "messages"):
            prompts.append(messages_of(value, where))
        elif isinstance(value, str):
            prompts.append(value)
        else:
            raise DataError(f"{where}: {value!r:.60} is {kind_of(value)} and no text")
    return prompts


def _tokens(
    config: GenerateConfig, trained: PPOConfig | None, writer: Writer, prompts: Sequence[Prompt]
) -> list[list[int]]:
    """The prompts prepared as in the run's training."""
    tokenizer = writer.tokenizer
    of_run = trained.prompts if trained is not None else None
    template = config.chat_template or (of_run.chat_template if of_run is not None else None)
    if template is not None and config.chat_template is None and not template.is_file() and tokenizer.chat_template:
        template = None  # the run saved it with its tokenizer
    chat = config.chat
    if chat is None:
        chat = of_run.kind == "messages" if of_run is not None else bool(tokenizer.chat_template)
    chat = chat or template is not None or any(not isinstance(prompt, str) for prompt in prompts)
    system = config.system if config.system is not None else (of_run.system if of_run is not None else None)
    if not chat:
        if config.system is not None:
            raise ConfigError(f"system={config.system!r:.60} needs a chat template: give --chat True")
        in_front = tokens_in_front(tokenizer)
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        return [[*in_front, *ids] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    use_chat_template(tokenizer, template, f"run={config.run!r}")
    conversations = [
        with_system([ChatMessage(role="user", content=prompt)] if isinstance(prompt, str) else prompt, system)
        for prompt in prompts
    ]
    return render(tokenizer, conversations, lambda i: f"prompt {i + 1}")


def _generation(config: GenerateConfig, trained: PPOConfig | None) -> GenerationSettings:
    """The run's settings without drawn lengths, overridden by the settings given here."""
    base = GenerationSettings() if trained is None else trained.generation
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "stop")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    most = given.get("max_new_tokens", base.max_new_tokens)
    return dataclasses.replace(
        base,
        **given,
        min_new_tokens=min(base.min_new_tokens, most),
        draw_lengths=False,
        batch_size=config.batch_size,
        static_cache=None,
    )


def _require_room(
    writer: Writer, prompts: Sequence[Prompt], token_ids: Sequence[Sequence[int]], settings: GenerationSettings
) -> None:
    room = room_for_prompts(writer.model, settings)
    for number, (prompt, ids) in enumerate(zip(prompts, token_ids, strict=True), start=1):
        if not ids:
            raise DataError(f"prompt {number}, {_readable(prompt)!r:.60}, has no token")
        if room is not None and len(ids) > room:
            raise ConfigError(
                f"prompt {number}, {_readable(prompt)!r:.60}, has {len(ids)} tokens; with "
                f"max_new_tokens={settings.max_new_tokens} the model takes {room}: shorten it, or give "
                "--max-new-tokens less"
            )


def _answers(
    config: GenerateConfig,
    writer: Writer,
    prompts: Sequence[Prompt],
    token_ids: Sequence[Sequence[int]],
    settings: GenerationSettings,
) -> Iterator[Answer]:
    draws = Draws.of(settings, len(prompts), seed=config.seed, step=0)
    endings = Endings.of(writer.model, writer.tokenizer, settings)
    draw = generate if writer.cached else generate_uncached
    for start in range(0, len(prompts), config.batch_size):
        stop = min(start + config.batch_size, len(prompts))
        samples: Samples = draw(
            writer.model, token_ids[start:stop], draws.rows(start, stop), settings, writer.tokenizer
        )
        texts, ended = endings.texts(samples), endings.ended(samples)
        yield from map(Answer, prompts[start:stop], texts, ended)


def _shown(config: GenerateConfig, answer: Answer, *, alone: bool) -> str:
    if config.json:
        prompt: Any = answer.prompt if isinstance(answer.prompt, str) else [m.model_dump() for m in answer.prompt]
        row = {"prompt": prompt, "response": answer.response, "ended": answer.ended}
        return json.dumps(row, ensure_ascii=False)
    return answer.response if alone else f"{_readable(answer.prompt)}\n  -> {answer.response}\n"


def _readable(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else as_text(prompt)
