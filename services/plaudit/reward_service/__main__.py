"""`plaudit-reward`: load a model, serve it, drain on SIGTERM. An unusable setting is one line on stderr, exit 2."""

import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

from pydantic import SecretStr, ValidationError

from plaudit.reward_service.keys import KeyFileError, Keys, read_keys, require_usable
from plaudit.reward_service.settings import Secrets, Settings
from plaudit.serving.listening import StartError, bound_socket, log_event, url_of, write_ready_file

EXIT_USAGE = 2
PROGRAM = "plaudit-reward"


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; 0 after a clean drain, 2 when the settings can't work."""
    # Until there is something to drain, SIGTERM ends the process. Without a handler, process 1 would ignore it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    # While there is no model to reload, SIGHUP is ignored.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        settings = parse_settings(sys.argv[1:] if arguments is None else list(arguments))
        keys = all_keys(settings)
        with bound_socket(settings.host, settings.port) as listener:
            serve(settings, keys, listener)
    except StartError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
    return EXIT_USAGE


def parse_settings(arguments: list[str]) -> Settings:
    """Flags, else REWARD_* variables, else defaults. Raises `StartError`; `SystemExit` for --help and unknown flags."""
    try:
        settings = Settings(_cli_parse_args=arguments)  # type: ignore[call-arg]
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise StartError(first["msg"].removeprefix("Value error, ")) from None
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        if first["type"] == "missing":
            raise StartError(f"{flag} is missing; give a sequence-classification directory or hub id") from None
        raise StartError(f"{flag} {first['input']}: {first['msg']}") from None
    for flag, value in (("--model", settings.model), ("--label", settings.label or "")):
        try:
            value.encode()
        except UnicodeEncodeError:
            encoding = sys.getfilesystemencoding()
            raise StartError(f"{flag} {value} can't be encoded in this locale ({encoding}); set PYTHONUTF8=1") from None
    return settings


def api_keys(settings: Settings) -> list[str]:
    """The accepted bearer keys: REWARD_API_KEY and the lines of --api-key-file."""
    try:
        keys = _key_in_environment("REWARD_API_KEY", Secrets().api_key)
        if settings.api_key_file is not None:
            keys += read_keys(settings.api_key_file, "--api-key-file")
    except KeyFileError as error:
        raise StartError(str(error)) from None
    return keys


def all_keys(settings: Settings) -> Keys:
    """The callers' and the administrators' keys; key files are read again when they change. Raises `StartError`."""
    secrets = Secrets()
    try:
        return Keys(
            _key_in_environment("REWARD_API_KEY", secrets.api_key),
            file=settings.api_key_file,
            admin_keys=_key_in_environment("REWARD_ADMIN_KEY", secrets.admin_key),
            admin_file=settings.admin_key_file,
            log=log_event,
        )
    except KeyFileError as error:
        raise StartError(str(error)) from None


def _key_in_environment(name: str, secret: SecretStr | None) -> list[str]:
    if secret is None:
        return []
    key = secret.get_secret_value().strip()  # a variable made from a file may end with a line end
    if not key:
        raise StartError(f"{name} is empty; set a key or unset it")
    require_usable(key, name)
    return [key]


def serve(settings: Settings, keys: Keys, listener: socket.socket) -> NoReturn:
    """Load the model, serve on `listener` until a signal, and end the process. Raises `StartError`."""
    from plaudit.reward_service.engine.model_files import ModelError
    from plaudit.reward_service.engine.model_source import ModelOrigins

    try:
        origins = ModelOrigins(settings.model, settings.revision)
        origins.files()
    except ModelError as error:
        raise StartError(str(error)) from None

    # Imported here, so that --help, a wrong flag or a missing directory don't wait for torch.
    from plaudit.reward_service.app_factory import app_from_settings
    from plaudit.reward_service.engine.scorer import TransformersScorer
    from plaudit.reward_service.http import garbage_collection
    from plaudit.reward_service.http.server import Hooks, Server
    from plaudit.reward_service.http.tracing import TracingError, finish
    from plaudit.reward_service.problems import ProblemError

    try:
        app = app_from_settings(settings, keys, origins=origins)
    except (ModelError, TracingError) as error:
        raise StartError(str(error)) from None
    engine = app.state.service.engine
    url = url_of(settings.host, listener.getsockname()[1])

    def announce() -> None:
        garbage_collection.freeze()
        if settings.ready_file is not None:
            try:
                write_ready_file(settings.ready_file, url)
            except OSError as error:
                print(
                    f"{PROGRAM}: --ready-file {settings.ready_file} can't be written ({error.strerror}): free "
                    "space, or name another file",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_USAGE)
        assert isinstance(engine.scorer, TransformersScorer)
        scorer = engine.scorer
        conversation = {} if (tokens := scorer.example()) is None else {"conversation": tokens}
        log_event("ready", url=url, pid=os.getpid(), revision=scorer.revision, checked=scorer.checked, **conversation)

    async def reload() -> None:
        keys.refresh()
        try:
            reloaded = await app.state.service.reload_model()
            assert isinstance(reloaded, TransformersScorer)
            log_event("reloaded", revision=reloaded.revision, checked=reloaded.checked)
        except ProblemError as problem:
            log_event("reload-failed", detail=problem.detail)

    Server(app, settings.grace_s, Hooks(announce, reload, log_event), max_connections=settings.max_connections).run(
        sockets=[listener]
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
    if app.state.traces is not None:
        finish(app.state.traces)
    # Skips the interpreter's own shutdown: unloading torch takes a second or more, beyond the grace time.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
