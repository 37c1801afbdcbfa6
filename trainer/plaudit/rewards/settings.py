"""Settings of the reward client. Needs only pydantic and the standard library."""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self
from urllib.parse import urlsplit, urlunsplit

from plaudit.checks import positive, require
from plaudit.rewards.combining import Combination

EndpointKind = Literal[
    "auto",
    "plaudit",
    "tei",
    "openrlhf",
    "vllm-classify",
    "vllm-pooling",
    "sglang",
    "infinity",
    "hf-inference",
    "kserve",
    "slime",
    "chat-judge",
]


@dataclass(frozen=True)
class JudgeSettings:
    """The prompt of a generative judge, and how a number is read from its answer (`kind` chat-judge)."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    prompt: Path | None = None
    """File with the question. {response} stands for the response to judge, {conversation} for the prompt's messages,
    {prompt} for the last of them, {fields.NAME} for a column, {fields} for the columns in `fields` as JSON."""
    answer: Literal["pattern", "json", "logprobs"] = "pattern"
    """Source of the score: the match of a pattern, JSON that follows a schema (response_format), or the probabilities
    of the first token (top_logprobs)."""
    pattern: str = r"[Ss]core:\s*\**\s*(-?\d+(?:\.\d+)?)"
    """Regular expression whose first group is the score. The last match in the answer counts."""
    schema: Path | None = None
    """File with the JSON schema. Default: an object with a number `score`."""
    key: str = "score"
    """Path of the score in the JSON, for example result.score."""
    scores: tuple[str, ...] = ("1", "2", "3", "4", "5")
    """The tokens that are scores. The reward is their mean, weighted by their probabilities."""
    fields: tuple[str, ...] = ()
    """Columns that {fields} shows."""
    low: float | None = None
    """The lowest valid score. Answers outside the range count as no score."""
    high: float | None = None
    """The highest valid score."""
    tries: int = 3
    """Maximum number of requests for an answer without a score before the run stops. At temperature 0 a judge may
    repeat its answer."""
    max_tokens: int = 512
    """Maximum length of the judge's answer, in tokens."""
    temperature: float = 0.0
    """Of the judge's sampling; 0 takes the likeliest token."""

    def __post_init__(self) -> None:
        positive(self, "tries", "max_tokens")
        require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"reward.judge.temperature={self.temperature} must be 0 or more",
        )
        try:
            re.compile(self.pattern)
        except re.error as error:
            require(False, f"reward.judge.pattern={self.pattern!r} is no regular expression: {error}")
        require(bool(self.scores), "reward.judge.scores is empty: name the tokens that are scores, such as 1 2 3 4 5")
        for score in self.scores:
            require(_is_number(score), f"reward.judge.scores has {score!r}, which is no number")
        require(
            self.low is None or self.high is None or self.low < self.high,
            f"reward.judge.low={self.low} must be less than reward.judge.high={self.high}",
        )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


@dataclass(frozen=True)
class RewardComponent:
    """One reward: its endpoints or function, and its weight."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    """In lists of rewards in settings files, a misspelt key is an error."""

    name: str = "reward"
    """Name of the reward in the metrics."""
    weight: float = 1.0
    """Factor of this reward in the sum."""
    url: tuple[str, ...] = ()
    """Base URL of a reward endpoint. Several endpoints share the load."""
    kind: EndpointKind = "auto"
    """Protocol of the endpoints. `auto` detects it by asking them."""
    label: str | None = None
    """Name of the label whose raw logit is the reward. Default: the service's default label (`plaudit-reward --label`),
    or the model's only one."""
    label_index: int | None = None
    """Index of the label's logit, for protocols that don't name the labels (vllm, sglang, kserve)."""
    model: str | None = None
    """The model's name in requests, if a server has several models (vllm, infinity, kserve)."""
    accept_probabilities: bool = False
    """Accept probabilities from endpoints that return no raw logits. They flatten the reward near 0 and 1."""
    render: str | None = None
    """Render conversations to texts in the client, for endpoints that accept only texts. Names the judge's tokenizer
    (directory or hub id), or a Jinja file with its chat template. Needs plaudit[render]."""
    label_field: str = "label"
    """Column sent as the row's label, for protocols with such a field (openrlhf, slime)."""
    judge: JudgeSettings = JudgeSettings()
    header: tuple[str, ...] = ()
    """Additional request header, for example "X-Tenant: blue"."""
    api_key_file: Path | None = None
    """File with the bearer token. Alternative for the first reward: PLAUDIT_REWARD_API_KEY in the environment, which is
    not sent to the URLs of other rewards."""
    ca_file: Path | None = None
    """PEM file of the certificate authority for https endpoints."""
    function: str | None = None
    """A Python function as a reward: `file.py:name`, or `module:name` if it can be imported. It takes prompts and
    responses and returns one number for each; it may be async. It also receives the columns that its further parameters
    name."""

    def __post_init__(self) -> None:
        for url in self.url:
            _check_url(url)
        for line in self.header:
            name, colon, _ = line.partition(":")
            require(
                bool(colon and name.strip()) and line.isascii() and line.isprintable(),
                f"reward.header={line!r} must be a name and a value in plain ASCII, as in X-Tenant: blue",
            )
        if self.function is not None:
            module, _, name = self.function.rpartition(":")
            require(
                bool(module and name.isidentifier()),
                f"reward.function={self.function!r} must be file.py:name or module:name",
            )
        require(
            not (self.url and self.function),
            f"reward {self.name!r} has both url and function: list them as two rewards under reward.components in a "
            "settings file, each with its weight",
        )
        require(math.isfinite(self.weight), f"reward.weight={self.weight} must be finite")

    @property
    def says_whom_to_ask(self) -> bool:
        """Whether there is a URL or a function. A settings file may leave both to the command line."""
        return bool(self.url or self.function)


@dataclass(frozen=True)
class RewardSettings:
    """The rewards, their endpoints, and timeouts."""

    components: tuple[RewardComponent, ...] = ()
    """The rewards."""
    combination: Combination = "weighted_sum"
    """How several rewards become one, each multiplied by its weight first: their sum, the minimum (worst case), or
    their mean minus std_multiple times their standard deviation."""
    std_multiple: float = 1.0
    """Multiple of the standard deviation with combination=mean_minus_std."""
    patience_s: float = 600.0
    """How long to retry without any usable answer before the run saves a checkpoint and exits with 75."""
    request_timeout_s: float = 60.0
    """Time limit of one request."""
    connect_timeout_s: float = 5.0
    """Time limit for a connection to a reward service."""
    chunk_size: int = 32
    """Maximum number of completions in one request."""
    max_in_flight: int = 8
    """Maximum number of concurrent requests to each endpoint."""
    hedge_after_s: float | None = None
    """With several endpoints: send a request to a second one if the first has not answered by then. The first answer is
    used."""
    check_order: bool = True
    """At the start, score four texts together and one by one, to check that rewards come back in the texts' order."""
    allow_revision_change: bool = False
    """Continue if the reward model changes during the run."""

    def __post_init__(self) -> None:
        positive(
            self,
            "patience_s",
            "request_timeout_s",
            "connect_timeout_s",
            "chunk_size",
            "max_in_flight",
            "hedge_after_s",
        )
        require(
            self.hedge_after_s is None or self.hedge_after_s < self.request_timeout_s,
            f"hedge_after_s={self.hedge_after_s} must be less than request_timeout_s={self.request_timeout_s}",
        )
        require(
            self.std_multiple >= 0 and math.isfinite(self.std_multiple),
            f"reward.std_multiple={self.std_multiple} must be 0 or more",
        )
        names = [component.name for component in self.components]
        require(len(set(names)) == len(names), f"rewards need different names, not {', '.join(names)}")
        for component in self.components[1:]:
            require(component.says_whom_to_ask, f"reward {component.name!r} needs either url or function")

    @property
    def says_whom_to_ask(self) -> bool:
        """Whether any reward has a URL or a function."""
        return any(component.says_whom_to_ask for component in self.components)

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Settings for one reward, from its fields and the shared ones: `of(url=("http://…",), patience_s=60)`."""
        own = {f.name: values.pop(f.name) for f in dataclasses.fields(RewardComponent) if f.name in values}
        return cls((RewardComponent(**own),), **values)

    def asking(self, *urls: str) -> Self:
        """These settings with other URLs for the first reward."""
        first, *others = self.components or (RewardComponent(),)
        return dataclasses.replace(self, components=(dataclasses.replace(first, url=urls), *others))


def without_credentials(url: str) -> str:
    """The URL without user name and password, for messages and files."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _check_url(url: str) -> None:
    shown = without_credentials(url) if "://" in url else url
    require(
        url.startswith(("http://", "https://")),
        f"reward.url={shown!r} must start with http:// or https://, for example http://127.0.0.1:8000",
    )
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    require(usable, f"reward.url={shown!r} must name a host, and a port from 1 to 65535 if it names one")
    require(
        not (parts.query or parts.fragment), f"reward.url={shown!r} must end with its path: no ?query, no #fragment"
    )
