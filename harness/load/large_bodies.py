"""The largest valid body of every route, grown from the examples in the service's own OpenAPI document."""

import json
from collections.abc import Iterator
from typing import Any

TEXT = "a film that is good, bad and \N{LATIN SMALL LETTER E WITH ACUTE}tonnant. "


def bodies(document: dict[str, Any], size: int, items: int) -> Iterator[tuple[str, str, bytes]]:
    """Path, the example's name, and a body of nearly `size` bytes and at most `items` texts."""
    for path, methods in document["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        for name, example in content.get("application/json", {}).get("examples", {}).items():
            value = example["value"]
            many = items if any(isinstance(member, list) for member in value.values()) else 1
            texts = many * json.dumps(_grown(value, 1, "\0")).count("\\u0000")
            # The messages of a conversation share the limit of one text.
            chars = min(900_000 // (texts if "messages" in value else 1), int(size * 0.93) // texts)
            text = (TEXT * (chars // len(TEXT) + 1))[:chars]
            body = json.dumps(_grown(value, many, text), ensure_ascii=False).encode()
            assert len(body) <= size, (path, name, len(body))
            yield path.replace("{model}", "reward").replace("{version}", "1"), name, body


def _grown(value: Any, many: int, text: str, *, inside: bool = False) -> Any:
    if isinstance(value, dict):
        return {
            name: [many] if name == "shape" else _grown(member, many, text, inside=inside)
            for name, member in value.items()
        }
    if isinstance(value, list) and not inside and value and isinstance(value[0], dict) and "datatype" in value[0]:
        return [_grown(member, many, text) for member in value]  # tensors, of which there is one
    if isinstance(value, list) and not inside and len(value) > 1 and isinstance(value[0], str):
        return [_grown(member, many, text) for member in value]  # a pair, and no list of texts
    if isinstance(value, list):
        first = _grown(value[0], many, text, inside=True) if value else None
        return [first] * (1 if inside else many)
    return text if isinstance(value, str) and " " in value else value
