"""vLLM's `messages`: one conversation in place of `input`, which the judge's chat template writes out.

Failure mode: an option that changes the tokens and is ignored.
"""

from typing import Any

from plaudit import wire
from plaudit.reward_service.engine.batching import Chat
from plaudit.reward_service.http.service import Service
from plaudit.reward_service.problems import ProblemError
from plaudit.reward_service.protocols.common import Foreign

EXAMPLE = {
    "messages": [{"role": "user", "content": "How was it?"}, {"role": "assistant", "content": "A wonderful movie."}],
    "use_activation": False,
}


class Conversation(Foreign):
    """The members of vLLM's bodies that concern a conversation."""

    messages: wire.Conversation
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def chat_of(service: Service, wanted: Conversation) -> list[Chat]:
    """The conversation to judge, whose last turn is the response, as the only text of a request.

    Raises:
        ProblemError: the service takes no conversations, the texts are too long, or the request asks for other tokens
            than those of the service's own template.
    """
    service.require_conversations()
    for name in ("add_generation_prompt", "continue_final_message", "add_special_tokens"):
        if getattr(wanted, name):
            raise ProblemError("invalid-request", f"{name}=true is not supported: the whole conversation is judged")
    for name in ("chat_template", "chat_template_kwargs"):
        if getattr(wanted, name):
            raise ProblemError(
                "invalid-request", f"{name} is not supported: start the service with --chat-template FILE"
            )
    turns = tuple((turn.role, turn.content) for turn in wanted.messages)
    service.check_limits([("".join(content for _, content in turns), None)])
    return [Chat(turns)]
