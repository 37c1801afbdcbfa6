"""The protocols of reward endpoints: one small file each, all translated to and from `services.wire`."""

from trainer.config import RewardComponent
from trainer.reward_client.dialects.base import BrokenBody, Dialect, Get, UnusableAnswer, from_json
from trainer.reward_client.dialects.hf_inference import HFInference
from trainer.reward_client.dialects.kserve import KServe
from trainer.reward_client.dialects.openrlhf import OpenRLHF
from trainer.reward_client.dialects.plaudit import Plaudit
from trainer.reward_client.dialects.sglang import SGLang
from trainer.reward_client.dialects.tei import TEI
from trainer.reward_client.dialects.vllm import VLLMClassify, VLLMPooling
from trainer.reward_client.errors import RewardRejected

DIALECTS: dict[str, type[Dialect]] = {
    dialect.name: dialect
    for dialect in (Plaudit, TEI, OpenRLHF, VLLMClassify, VLLMPooling, SGLang, HFInference, KServe)
}

_TELLTALES = {
    "/v1/model": ("plaudit", "limits"),
    "/info": ("tei", "max_client_batch_size"),
    "/get_model_info": ("sglang", "model_path"),
    "/v1/models": ("vllm-classify", "data"),
    "/v2": ("kserve", "extensions"),
}
"""Route, and a field that only this protocol's answer to it has. Plaudit's own comes first: its service speaks many."""


async def recognise(component: RewardComponent, get: Get) -> Dialect:
    """The dialect that the endpoint speaks, found by asking for each protocol's description of the server.

    Raises what `get` raises while the server isn't up, and `UnusableAnswer` when no protocol is recognised.
    """
    for path, (name, field) in _TELLTALES.items():
        try:
            about = from_json(await get(path))
        except BrokenBody:
            continue
        except RewardRejected as error:
            status = error.exchange.status if error.exchange else None
            if status in (None, 401, 403) or status in range(300, 400):
                raise
            continue
        if isinstance(about, dict) and field in about:
            return DIALECTS[name](component)
    kinds = ", ".join(kind for kind in DIALECTS)
    raise UnusableAnswer(
        f"its protocol is not recognised. Is it a reward service? Say what it speaks, --reward.kind: {kinds}"
    )
