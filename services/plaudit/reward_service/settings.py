"""Settings. Every field is a flag of `plaudit-reward` and a `REWARD_*` environment variable."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from plaudit import wire

DType = Literal["fp32", "bf16", "fp16", "int8"]


class Settings(BaseSettings):
    # The first line is indented like the others, so that --help shows all of them at its margin.
    """
    Serve a sequence classifier's logits as rewards over HTTP.

    Every flag is also a variable: --max-tokens is REWARD_MAX_TOKENS. SIGHUP reloads the model; SIGTERM answers the
    accepted requests and ends. OTEL_EXPORTER_OTLP_ENDPOINT says where traces go. See docs/how-to/reward-service.md.
    """

    model_config = SettingsConfigDict(
        env_prefix="REWARD_",
        cli_prog_name="plaudit-reward",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        use_attribute_docstrings=True,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
    )

    model: str
    """Sequence-classification directory or hub id. Which of the two it is gets decided once, at start."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; a reload fetches the same one, or fails."""
    label: str | None = None
    """The label whose logit is the reward when a request names none."""
    join: wire.Join = "concat"
    """How prompt and response are joined: one string, the tokenizer's own pair encoding, or its chat template."""
    chat_template: Path | None = None
    """File with the chat template (jinja) of --join chat; the tokenizer's own unless given."""
    truncation_side: Literal["left", "right"] = "right"
    """Which end of a text that is too long is cut off."""
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    """Longest token sequence; the model's own limit unless given."""
    dtype: DType = "fp32"
    """Number format of weights and arithmetic (drift: docs/how-to/reward-service.md). int8: dynamic, for CPUs."""
    devices: Annotated[tuple[str, ...], NoDecode, Field(min_length=1)] = ("cpu",)
    """torch devices, comma separated, one replica on each: cuda:0,cuda:1. CPU replicas (cpu,cpu) share weights."""
    deterministic: bool = False
    """Score each text in its own forward pass: bit-identical in any batch, but without the speed of batching."""
    compile: bool = False
    """Compile the model of padded batches (torch.compile): about a minute more to start, somewhat faster after."""
    threads: Annotated[int, Field(gt=0)] | None = None
    """CPU threads of the forward pass; torch's default unless given."""
    batch_tokens: Annotated[int, Field(gt=0)] = 1024
    """Tokens in one batch, padding included. A GPU gains from more; a CPU gains nothing above about 512."""
    max_queue_tokens: Annotated[int, Field(gt=0)] = 65_536
    """Tokens that may wait before requests get 429: a bound on how long callers wait."""
    max_items: Annotated[int, Field(gt=0, le=wire.MAX_ITEMS_PER_REQUEST)] = wire.MAX_ITEMS_PER_REQUEST
    """Items one request may hold."""
    max_text_chars: Annotated[int, Field(gt=0, le=wire.MAX_TEXT_CHARS)] = wire.MAX_TEXT_CHARS
    """Characters one prompt or response may hold."""
    max_body_bytes: Annotated[int, Field(gt=0)] = 16 * 1024 * 1024
    """Bytes one request body may hold."""
    max_held_bytes: Annotated[int, Field(gt=0)] = 128 * 1024 * 1024
    """Memory budget in bytes for the bodies of all unanswered requests; beyond it requests get 503."""
    max_connections: Annotated[int, Field(gt=0)] = 1024
    """Connections that may be open; fewer if the limit on open files is lower. Health probes are answered beyond it."""
    cache_items: Annotated[int, Field(ge=0)] = 0
    """Scores to cache for repeated texts; 0 turns the cache off."""
    api_key_file: Path | None = None
    """File with the accepted bearer keys, one on each line, read again when it changes. REWARD_API_KEY in the
    environment holds a single key."""
    admin_key_file: Path | None = None
    """File with the keys that may also reload the model. REWARD_ADMIN_KEY in the environment holds a single key."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 listens on every interface."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 picks a free port; --ready-file says which."""
    ready_file: Path | None = None
    """File to write {"url", "pid"} to, as JSON, once the service is ready."""
    grace_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds that SIGTERM leaves for accepted requests."""

    @field_validator("devices", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_body_fits(self) -> "Settings":
        if self.max_held_bytes < self.max_body_bytes:
            raise ValueError(
                f"--max-held-bytes {self.max_held_bytes} is less than --max-body-bytes {self.max_body_bytes}: not even "
                "one body would fit"
            )
        return self

    @model_validator(mode="after")
    def _a_template_is_for_chats(self) -> "Settings":
        if self.chat_template is not None and self.join != "chat":
            raise ValueError(f"--chat-template goes with --join chat, and --join is {self.join}")
        return self

    @model_validator(mode="after")
    def _int8_is_for_cpus(self) -> "Settings":
        if self.dtype == "int8" and any(not device.startswith("cpu") for device in self.devices):
            raise ValueError(f"--dtype int8 runs on CPUs only, and --devices is {','.join(self.devices)}")
        return self

    @model_validator(mode="after")
    def _int8_is_not_compiled(self) -> "Settings":
        if self.compile and self.dtype == "int8":
            raise ValueError("--compile needs a floating-point --dtype, and it is int8")
        return self


class Secrets(BaseSettings):
    """Secrets: they have no flag, because a process list shows flags."""

    model_config = SettingsConfigDict(env_prefix="REWARD_", extra="ignore", frozen=True)

    api_key: SecretStr | None = None
    admin_key: SecretStr | None = None
