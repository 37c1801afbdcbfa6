"""Protocols of reward endpoints, one module each. All translate to and from `plaudit.wire`."""

from collections.abc import Callable
from typing import Any

from plaudit.rewards.errors import RewardRejected
from plaudit.rewards.protocols.base import BrokenBody, Dialect, Get, UnusableAnswer, from_json
from plaudit.rewards.protocols.chat_judge import ChatJudge
from plaudit.rewards.protocols.hf_inference import HFInference
from plaudit.rewards.protocols.infinity import Infinity
from plaudit.rewards.protocols.kserve import KServe
from plaudit.rewards.protocols.openrlhf import OpenRLHF
from plaudit.rewards.protocols.plaudit import Plaudit
from plaudit.rewards.protocols.sglang import SGLang
from plaudit.rewards.protocols.slime import Slime
from plaudit.rewards.protocols.tei import TEI
from plaudit.rewards.protocols.vllm import VLLMClassify, VLLMPooling
from plaudit.rewards.settings import RewardComponent

_ALL: tuple[type[Dialect], ...] = (
    *(Plaudit, TEI, OpenRLHF, VLLMClassify, VLLMPooling, SGLang, Infinity, HFInference, KServe, Slime, ChatJudge),
)
DIALECTS: dict[str, type[Dialect]] = {dialect.name: dialect for dialect in _ALL}

_TELLTALES: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "/v1/model": ("plaudit", lambda about: "limits" in about),
    "/info": ("tei", lambda about: "max_client_batch_size" in about),
    "/get_model_info": ("sglang", lambda about: "model_path" in about),
    "/models": ("infinity", lambda about: _owner(about) == "infinity"),
    "/v1/models": ("vllm-classify", lambda about: _owner(about) not in (None, "infinity")),
    "/v2": ("kserve", lambda about: "extensions" in about),
}
"""Routes, and tests for answers that only this protocol gives. Plaudit comes first: its service supports several."""


async def recognise(component: RewardComponent, get: Get) -> Dialect:
    """Detect the endpoint's protocol by requesting each protocol's description route.

    Raises what `get` raises while the server isn't up, and `UnusableAnswer` if no protocol is recognised.
    """
    for path, (name, is_its) in _TELLTALES.items():
        try:
            about = from_json(await get(path))
        except BrokenBody:
            continue
        except RewardRejected as error:
            status = error.exchange.status if error.exchange else None
            if status in (None, 401, 403) or status in range(300, 400):
                raise
            continue
        if isinstance(about, dict) and is_its(about):
            return DIALECTS[name](component)
    kinds = ", ".join(kind for kind in DIALECTS)
    raise UnusableAnswer(
        f"its protocol is not recognised. Is it a reward service? Say what it speaks, --reward.kind: {kinds}"
    )


def _owner(models: dict[str, Any]) -> str | None:
    """The owner of the first model in an OpenAI-style list. It distinguishes infinity from vLLM."""
    try:
        return str(models["data"][0]["owned_by"])
    except (KeyError, TypeError, IndexError):
        return None
