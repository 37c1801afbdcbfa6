"""Refusals as RFC 9457 problem documents. Standard library only.

Failure modes: a document that quotes megabytes of the request, or text that is not valid UTF-8.
"""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

CONTENT_TYPE = "application/problem+json"
MAX_DETAIL_CHARS = 2000
"""A longer detail is cut: it may quote the request."""


class ProblemDetailsError(Exception):
    """A refusal to send to the client. Each service subclasses it with its own `statuses`."""

    statuses: ClassVar[Mapping[str, int]]
    """The HTTP status of each problem, by the name in its `type`."""

    def __init__(
        self, name: str, detail: str, *, item: int | None = None, retry_after_s: int | None = None, **extra: Any
    ) -> None:
        """`item` is the index of the item at fault. `extra` becomes further members of the document."""
        if len(detail) > MAX_DETAIL_CHARS:
            detail = f"{detail[:MAX_DETAIL_CHARS]}…"
        super().__init__(detail)
        self.name = name
        self.status = self.statuses[name]
        self.detail = detail
        self.item = item
        self.retry_after_s = retry_after_s
        self.extra = extra

    def document(self) -> dict[str, Any]:
        """The members of the problem document."""
        members = {
            "type": f"urn:plaudit:problem:{self.name}",
            "title": self.name.replace("-", " ").capitalize(),
            "status": self.status,
            "detail": self.detail,
            "item": self.item,
        }
        return {name: value for name, value in members.items() if value is not None} | self.extra

    def body(self) -> bytes:
        """The document as JSON in UTF-8. Half a surrogate pair is written as an escape."""
        text = json.dumps(self.document(), ensure_ascii=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")

    def headers(self) -> dict[str, str]:
        """The response headers that go with the problem."""
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers
