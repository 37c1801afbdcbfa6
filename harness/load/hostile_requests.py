"""Requests over HTTP that two servers may read differently, put together at random; the same seed makes the same bytes.

A connection carries up to three requests, told apart by the X-Request-Id that the service sends back: `before`, which
is ordinary; `hostile`, made of `LINES`, `VERSIONS`, `HOSTS`, `FRAMINGS`, `CHUNKS`, `FIELDS` and `LINE_ENDS`; `behind`,
ordinary again. A fourth, `hidden`, stands where nothing but a body, an extension or a trailer belongs. Each part of
`hostile` says what may become of it, by RFC 9110 and 9112.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from plaudit import wire

FUZZ_KEY = "a-key-of-the-fuzz"
PATH = b"/v1/rewards"
REFUSALS = frozenset({*range(400, 500), 501})
ORDINARY = frozenset({200})
ANY = ORDINARY | REFUSALS


class Meaning(IntEnum):
    """What becomes of a request with such a feature; of several features the largest counts."""

    SERVED = 0
    """Every server reads it alike. It is answered."""
    EITHER = 1
    """RFC 9112 lets a server serve or refuse it."""
    UNFINISHED = 2
    """More of it is to come, and never does: what follows on the connection is its body."""
    REFUSED = 3
    """Servers disagree about it, or it is no HTTP/1.x. It is refused, and the connection is closed."""


SERVED, EITHER, UNFINISHED, REFUSED = Meaning


class Feature(NamedTuple):
    """A part of a request. `{n}` in its bytes is the number of bytes of the body."""

    sent: bytes
    meaning: Meaning = SERVED
    statuses: frozenset[int] = ORDINARY
    """The answers of a service that serves it."""
    closes: bool | None = False
    """Whether the connection ends after the answer; None leaves it open."""


def _refused(*sent: bytes) -> list[Feature]:
    return [Feature(each, REFUSED) for each in sent]


def _either(*sent: bytes, statuses: frozenset[int] = ANY) -> list[Feature]:
    return [Feature(each, EITHER, statuses, None) for each in sent]


LINES = [
    *[Feature(method + b" " + PATH, statuses=frozenset({405})) for method in (b"GET", b"PUT", b"DELETE", b"OPTIONS")],
    Feature(b"HEAD " + PATH, statuses=frozenset({405})),
    Feature(b"POST /nowhere", statuses=frozenset({404})),
    Feature(b"POST " + PATH + b"?a=b"),
    Feature(b"\r\nPOST " + PATH),
    Feature(b"POST /" + b"a" * 70_000, EITHER, frozenset({431}), None),
    *_either(
        b"\rPOST /v1/rewards",
        b"\r\n\r\n\r\nPOST /v1/rewards",
        b"\nPOST /v1/rewards",
        b"POST  /v1/rewards",
        b"POST\t/v1/rewards",
        b"POST //v1/rewards",
        b"POST http://y/v1/rewards",
        b"POST http://u:p@y:80/v1/rewards",
        b"POST https://[::1/v1/rewards",
        b"POST http://",
        b"POST *",
        b"OPTIONS *",
        b"POST x:80",
        b"POST /v1/rewards#a",
        b"POST /livez/../v1/rewards",
        b"POST /%2e%2e/v1/rewards",
        b"POST /v1%2frewards",
        b"POST /v1/rewards%00",
        b"POST /v1/rewards?\xff",
        b"POST /v1/rewards;a=b",
        b"POST \\v1\\rewards",
        b"M-SEARCH *",
        b"SOURCE /v1/rewards",
    ),
    *_refused(
        b"post /v1/rewards",
        b" POST /v1/rewards",
        b"P\0ST /v1/rewards",
        b"PO ST /v1/rewards",
        b"POST",
        b"POST /v1/rewards\0",
        b"POST /v1/re wards",
        b"POST\r\n/v1/rewards",
        b"A" * 300 + b" /v1/rewards",
        b"CONNECT y:80",
        b"PRI *",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
        b"\0POST /v1/rewards",
    ),
]
"""Request lines without their version."""
VERSIONS = [
    *[Feature(b"HTTP/1.0", closes=True)] * 6,
    *_either(b"HTTP/1.2", b"RTSP/1.0"),
    *_refused(
        b"HTTP/2.0",
        b"HTTP/0.9",
        b"HTTP/3.0",
        b"HTTP/9",
        b"HTTP/1",
        b"HTTP/1.1.1",
        b"HTTP /1.1",
        b"http/1.1",
        b"HTTP/01.1",
        b"HTTP/1.1 a",
        b"HTTP/1.1\0",
        b"HTTP/1.\xb9",
        b"ICY/1.1",
        b"",
    ),
]
HOSTS = [
    *[Feature(host) for host in (b"Host: [::1]:8000", b"Host: y:1", b"hOST:x", b"Host:\t x \t")],
    *_either(b"Host:", b"Host: :80", b"Host: %41"),
    *_refused(
        b"",
        b"Host: x\r\nHost: x",
        b"Host: x\r\nHost: y",
        b"Host: x y",
        b"Host: x, y",
        b"Host: http://x",
        b"Host: x/",
        b"Host: x\0",
        b"Host: x\ry",
        b"Host: u@x",
        b"Host : x",
        b"Host\0: x",
        b"Host: x\r\nhost:",
    ),
]
"""HTTP/1.0 alone may have none."""
LENGTH = b"Content-Length: {n}"
CODING = b"Transfer-Encoding: chunked"
FRAMINGS = [
    *[Feature(CODING)] * 12,
    *[
        Feature(framing)
        for framing in (b"content-LENGTH:{n}", b"Transfer-Encoding: Chunked", b"Transfer-Encoding:\tchunked ")
    ],
    *_either(b"Content-Length: 000{n}", b"Transfer-Encoding: chunked,", b"Transfer-Encoding: , chunked"),
    Feature(b"Content-Length: 99999999", UNFINISHED, frozenset({413})),
    Feature(b"Content-Length: 1{n}00", UNFINISHED),
    *_refused(
        # Both, in any order and guise.
        LENGTH + b"\r\n" + CODING,
        CODING + b"\r\n" + LENGTH,
        CODING + b"\r\nContent-Length: 0",
        b"Transfer-Encoding: identity\r\n" + LENGTH,
        b"Transfer-Encoding:\r\n" + LENGTH,
        LENGTH + b"\r\nTransfer-Encoding:\r\n chunked",
        LENGTH + b"\nTransfer-Encoding: chunked",
        LENGTH + b"\r\nTransfer-Encoding : chunked",
        LENGTH + b"\r\nTransfer-Encoding\0: chunked",
        LENGTH + b"\r\n Transfer-Encoding: chunked",
        LENGTH + b"\r\nTransfer-Encoding: xchunked",
        LENGTH + b"\r\nX: a\rTransfer-Encoding: chunked",
        LENGTH + b"\r\nX: a\n\nTransfer-Encoding: chunked",
        # Two lengths, equal or not, and what isn't a number of bytes.
        LENGTH + b"\r\n" + LENGTH,
        LENGTH + b"\r\nContent-Length: 0",
        b"Content-Length: 0\r\n" + LENGTH,
        b"Content-Length: {n}, {n}",
        b"Content-Length: 0, {n}",
        b"Content-Length: {n},",
        b"Content-Length: +{n}",
        b"Content-Length: -{n}",
        b"Content-Length: -1",
        b"Content-Length: 0x{n}",
        b"Content-Length: {n}.0",
        b"Content-Length: {n} 0",
        b"Content-Length: {n}\0",
        b"Content-Length: {n}a",
        b"Content-Length:",
        b"Content-Length: a",
        b"Content-Length: 1_0",
        b"Content-Length: \xd9\xa1",
        b"Content-Length: 1e2",
        b'Content-Length: "{n}"',
        b"Content-Length: 18446744073709551616",
        b"Content-Length: 18446744073709551617",
        b"Content-Length: " + b"9" * 400,
        b"Content-Length : {n}",
        b"Content-Length\t: {n}",
        b"Content-Length:\r\n {n}\r\nContent-Length: 0",
        # Codings that are not chunked, or not only.
        b"Transfer-Encoding: gzip",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: chunked, gzip",
        b"Transfer-Encoding: chunked, chunked",
        CODING + b"\r\n" + CODING,
        CODING + b"\r\nTransfer-Encoding: identity",
        b"Transfer-Encoding: identity\r\n" + CODING,
        b"Transfer-Encoding: identity",
        b'Transfer-Encoding: "chunked"',
        b"Transfer-Encoding: chunked;q=1",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunked\0",
        b"Transfer-Encoding: \x0bchunked",
        b"Transfer-Encoding: chun\rked",
        b"Transfer-Encoding: deflate",
        b"Transfer-Encoding : chunked",
        b"Transfer-Encoding\t: chunked",
        b" Transfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\x85",
        b"Transfer-Encoding: chunked chunked",
        b"Transfer-Encoding;: chunked",
    ),
]
"""What says where the body ends."""
NO_FRAMING = [
    b"Transfer_Encoding: chunked",
    b"Content_Length: {n}",
    b"X-Transfer-Encoding: chunked",
    b"Trailer: Content-Length",
]
"""What says nothing about it, though it may seem so. The body has no bytes then, and what follows is a request."""
FIELDS = [
    *[
        Feature(field)
        for field in (
            *(b"Connection: content-length", b"Connection: transfer-encoding, host", b"Connection: authorization"),
            *(b"Keep-Alive: timeout=1", b"TE: trailers", b"Trailer: Authorization", b"Content_Length: 0"),
            *(b"X-HTTP-Method-Override: DELETE", b"X-Original-URL: /v1/model:reload", b"X-Forwarded-Host: y"),
            *(
                b"X-High: \xe9\xff",
                b"X-Empty:",
                b"Expect: 100-continue",
                b"Max-Forwards: 0",
                b"Transfer_Encoding: chunked",
            ),
        )
    ],
    Feature(b"Connection: close", closes=True),
    Feature(b"Connection: Keep-Alive, CLOSE", closes=True),
    Feature(b"Authorization: Bearer " + FUZZ_KEY.encode(), statuses=frozenset({401})),
    Feature(b"Authorization: Bearer other", statuses=frozenset({401})),
    Feature(b"X-Long: " + b"a" * 70_000, EITHER, frozenset({431}), None),
    Feature(b"\r\n".join([b"X-%d: a" % number for number in range(9000)]), EITHER, frozenset({431}), None),
    *_either(
        b"X-Folded: a\r\n b",
        b"X-Folded: a\r\n\tContent-Length: 0",
        b"X-Line: a\nX-Feed: b",
        b"X-Control: a\x01b\x7f",
        b"Expect: banana",
        b"Content-Encoding: gzip",
        b"Content-Type: text/plain",
        b"Upgrade: h2c",
        b"Proxy-Connection: close",
    ),
    *_refused(
        b"X-Nul\0: a",
        b"X-Nul: a\0b",
        b"X-Return: a\rb",
        b"X-Return: a\rContent-Length: 0",
        b"No-Colon",
        b": a",
        b"X Y: a",
        b"X-High\x80: a",
        b"(X): a",
        b"X-Space : a",
        b"X-Tab\t: a",
        b" X-Fold: a",
        b"\tX-Fold: a",
        b"X\x7f: a",
        b"\x0bX: a",
        b"X-Line: a\nContent-Length: 0",
        b"GET /v1/model HTTP/1.1",
        b"Content-Length: 0",
        b"Transfer-Encoding: gzip",
        b"Connection: Upgrade\r\nUpgrade: h2c",
        b"Connection: Upgrade\r\nUpgrade: websocket",
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA",
    ),
]
"""Fields more. A second framing of the body is refused, and an upgrade of a request that has one."""
LINE_ENDS = [*_either(b"\n"), *_refused(b"\r", b"\r\r\n", b"\n\r", b"\0\n", b"\r\n\0", b"\x0b\n", b" \r\0\n")]
HIDDEN = b"\r\n".join(
    [
        b"GET /v1/model HTTP/1.1",
        b"Host: x",
        b"Authorization: Bearer " + FUZZ_KEY.encode(),
        b"X-Request-Id: hidden",
        b"",
        b"",
    ]
)
"""Nothing else asks for this route, so that the service's own count says whether it was run."""
Chunked = Callable[[bytes], bytes]


def _chunk(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


def _whole(body: bytes) -> bytes:
    return (_chunk(body) if body else b"") + b"0\r\n\r\n"


def _first(line: Callable[[int], bytes]) -> Chunked:
    """A body of one chunk whose size line is `line`."""
    return lambda body: line(len(body)) + body + b"\r\n0\r\n\r\n"


def _trailer(lines: bytes) -> Chunked:
    return lambda body: _whole(body)[:-2] + lines + b"\r\n\r\n"


CHUNKS: list[tuple[str, Chunked, Meaning]] = [
    ("a byte a chunk", lambda body: b"".join(_chunk(body[i : i + 1]) for i in range(len(body))) + b"0\r\n\r\n", SERVED),
    ("an extension", _first(lambda n: b"%x;a=b\r\n" % n), SERVED),
    ("a quoted extension", _first(lambda n: b'%X;a="b;c"\r\n' % n), SERVED),
    ("a trailer", _trailer(b"X-Request-Id: hidden"), SERVED),
    ("a deadline in a trailer", _trailer(b"X-Request-Timeout: -1"), SERVED),
    ("a key in a trailer", _trailer(b"Authorization: Bearer other"), SERVED),
    ("a media type in a trailer", _trailer(b"Content-Type: application/msgpack"), SERVED),
    ("zeros before a size", _first(lambda n: b"000%x\r\n" % n), EITHER),
    ("many zeros before a size", _first(lambda n: b"0" * 300 + b"%x\r\n" % n), EITHER),
    ("many zeros at the end", lambda body: _chunk(body) + b"0" * 300 + b"\r\n\r\n", EITHER),
    ("a space after a size", _first(lambda n: b"%x \r\n" % n), EITHER),
    ("an empty extension", _first(lambda n: b"%x;\r\n" % n), EITHER),
    ("1,000 bytes of extension", _first(lambda n: b"%x;%s\r\n" % (n, b"a" * 1000)), EITHER),
    ("a length in a trailer", _trailer(b"Content-Length: 5"), EITHER),
    ("a coding in a trailer", _trailer(b"Transfer-Encoding: chunked"), EITHER),
    ("a folded trailer", _trailer(b"X-Folded: a\r\n b"), EITHER),
    ("an upgrade in a trailer", _trailer(b"Connection: Upgrade\r\nUpgrade: h2c"), EITHER),
    ("no last chunk", lambda body: _chunk(body), UNFINISHED),
    ("a chunk that doesn't come", lambda body: _chunk(body) + b"7fffffff\r\n", UNFINISHED),
    ("no end of the trailers", lambda body: _whole(body)[:-2] + b"X-Trailer: a\r\nX-Behind: ", UNFINISHED),
    ("100,000 bytes of extension", _first(lambda n: b"%x;%s\r\n" % (n, b"a" * 100_000)), EITHER),
    ("100,000 bytes of trailer", _trailer(b"X-Long: " + b"a" * 100_000), EITHER),
    ("a size of 2**64 and more", _first(lambda n: b"1%016x\r\n" % n), REFUSED),
    ("a size of 2**68 - 1", _first(lambda n: b"f" * 17 + b"\r\n"), REFUSED),
    ("a size of 400 digits", _first(lambda n: b"1" * 400 + b"\r\n"), REFUSED),
    ("0x before a size", _first(lambda n: b"0x%x\r\n" % n), REFUSED),
    ("a sign before a size", _first(lambda n: b"+%x\r\n" % n), REFUSED),
    ("a negative size", _first(lambda n: b"-%x\r\n" % n), REFUSED),
    ("a space before a size", _first(lambda n: b" %x\r\n" % n), REFUSED),
    ("no size", _first(lambda n: b"\r\n"), REFUSED),
    ("no number for a size", _first(lambda n: b"g%x\r\n" % n), REFUSED),
    ("an underscore in a size", _first(lambda n: b"0_%x\r\n" % n), REFUSED),
    ("a NUL after a size", _first(lambda n: b"%x\0\r\n" % n), REFUSED),
    ("a size and no line end", _first(lambda n: b"%x" % n), REFUSED),
    ("a bare LF after a size", _first(lambda n: b"%x\n" % n), REFUSED),
    ("a bare CR after a size", _first(lambda n: b"%x\r" % n), REFUSED),
    ("a bare LF in an extension", lambda body: b"%x;a\n%s\r\n0\r\n\r\n" % (len(body), body), REFUSED),
    ("a request behind a bare LF in an extension", lambda body: b"2;\nxx\r\n%s%s" % (_whole(HIDDEN), HIDDEN), REFUSED),
    ("a bare CR in an extension", _first(lambda n: b"%x;a\rb\r\n" % n), REFUSED),
    ("a NUL in an extension", _first(lambda n: b"%x;a\0b\r\n" % n), REFUSED),
    ("a chunk that is longer than its size", lambda body: b"%x\r\n%s\r\n0\r\n\r\n" % (len(body) // 2, body), REFUSED),
    ("a chunk that ends with LF", lambda body: b"%x\r\n%s\n0\r\n\r\n" % (len(body), body), REFUSED),
    ("a chunk that ends with CR", lambda body: b"%x\r\n%s\r0\r\n\r\n" % (len(body), body), REFUSED),
    ("a chunk that ends with two other bytes", lambda body: b"%x\r\n%sab0\r\n\r\n" % (len(body), body), REFUSED),
    ("a request for a trailer", lambda body: _whole(body)[:-2] + HIDDEN, REFUSED),
    ("a trailer without a colon", _trailer(b"No-Colon"), REFUSED),
    ("a NUL in a trailer", _trailer(b"X-Nul: a\0b"), REFUSED),
    ("a body that is not chunked", lambda body: body, REFUSED),
]
"""Chunked bodies; each with a body of one byte or more."""


@dataclass(frozen=True)
class Exchange:
    """What is sent on one connection, and what may come back."""

    kind: str
    pieces: Sequence[bytes]
    meaning: Meaning
    texts: Mapping[str, str]
    """Of `before`, `hostile` and `behind`: what their rewards are for."""
    statuses: frozenset[int]
    closes: bool | None
    waits_for_before: bool = False
    """The first piece is `before`; the others go when it is answered."""
    leftover: bool = False
    """What follows the answered request is no request: it is refused."""
    garbled: bool = False
    """Some bytes were changed, so that nobody knows what they mean. Nothing may be answered twice all the same."""
    bodiless: bool = False
    """`hostile` is a HEAD request: the answer has no body."""


def ordinary(text: str, request_id: str, *fields: bytes) -> bytes:
    """A request for the reward of `text`."""
    body = _body_of(text)
    lines = [b"POST " + PATH + b" HTTP/1.1", b"Host: x", *_fields_of(request_id), b"Content-Length: %d" % len(body)]
    return b"\r\n".join([*lines, *fields, b"", body])


def _body_of(text: str) -> bytes:
    return json.dumps({"items": [{"prompt": text, "response": ""}], "label": "POSITIVE"}).encode()


def _fields_of(request_id: str) -> list[bytes]:
    return [
        b"Content-Type: application/json",
        b"Authorization: Bearer " + FUZZ_KEY.encode(),
        b"X-Request-Id: " + request_id.encode(),
        wire.REQUEST_ID_HEADER.encode() + b": " + request_id.encode(),
    ]


def exchange(draw: random.Random, texts: Sequence[str]) -> Exchange:
    """One connection's bytes, at random."""
    named = dict(zip(("before", "hostile", "behind"), draw.sample(texts, 3), strict=True))
    hostile = _hostile(draw, named["hostile"])
    sent = hostile.sent
    garbled = draw.random() < 0.12 and HIDDEN not in sent  # changed, its head may end before it
    if garbled:
        sent = _garbled(sent, draw)
    behind = ordinary(named["behind"], "behind", b"Connection: close")
    before = ordinary(named["before"], "before")
    together = before if (first := draw.random()) < 0.15 else b""
    nothing_follows = hostile.meaning is UNFINISHED and draw.random() < 0.5
    pieces = _in_pieces(draw, together + sent + (b"" if nothing_follows else behind))
    waits = 0.15 <= first < 0.4
    return Exchange(
        kind=" + ".join(hostile.names),
        pieces=[before, *pieces] if waits else pieces,
        meaning=hostile.meaning,
        texts=named if together or waits else {name: named[name] for name in ("hostile", "behind")},
        statuses=hostile.statuses,
        closes=hostile.closes,
        waits_for_before=waits,
        leftover=hostile.leftover,
        garbled=garbled,
        bodiless=hostile.sent.lstrip().startswith(b"HEAD"),
    )


@dataclass
class _Hostile:
    names: list[str]
    sent: bytes = b""
    meaning: Meaning = SERVED
    statuses: frozenset[int] = ORDINARY
    closes: bool | None = False
    leftover: bool = False

    def add(self, feature: Feature, kind: str) -> bytes:
        """Take the feature's meaning over; gives its bytes."""
        self.names.append(f"{kind} {feature.sent[:60]!r}")
        self.meaning = max(self.meaning, feature.meaning)
        if feature.statuses != ORDINARY:
            self.statuses = feature.statuses if self.statuses == ORDINARY else self.statuses | feature.statuses
        if self.closes is not True:
            self.closes = feature.closes if feature.closes is not False else self.closes
        return feature.sent


def _hostile(draw: random.Random, text: str) -> _Hostile:
    made = _Hostile([])
    parts = ["line", "version", "host", "framing", "chunks", "field", "line ends", "no framing", "body", "body"]
    chosen = set(draw.choices(parts, k=draw.choice([0, 1, 1, 1, 1, 2, 2, 3])))
    line = made.add(draw.choice(LINES), "line") if "line" in chosen else b"POST " + PATH
    version = made.add(draw.choice(VERSIONS), "version") if "version" in chosen else b"HTTP/1.1"
    host = b"Host: x"
    if "host" in chosen:
        other = draw.choice(HOSTS)
        # There were no hosts when HTTP/1.0 was written.
        host = made.add(Feature(b"") if version == b"HTTP/1.0" and not other.sent else other, "host")
    fields = _fields_of("hostile")
    if "field" in chosen:
        fields.append(made.add(draw.choice(FIELDS), "field"))
    body, framing = _body_of(text), draw.choice([LENGTH, CODING])
    if "body" in chosen:
        # Where it is served, the bytes are no JSON. Where it isn't, they are no request.
        made.names.append("a request for a body")
        body = HIDDEN
        made.statuses = frozenset({400}) if made.statuses == ORDINARY else made.statuses | {400}
    if "no framing" in chosen and not chosen & {"framing", "chunks", "field"}:
        framing = made.add(Feature(draw.choice(NO_FRAMING), statuses=frozenset({400, 422})), "no framing")
        body = b"%x\r\n%s" % (len(body), body)  # its first line is no request's
        made.leftover = True
    elif "framing" in chosen:
        framing = made.add(draw.choice(FRAMINGS), "framing")
    chunked = b"chunked" in framing.lower() and not made.leftover
    after = body
    if chunked and "chunks" in chosen:
        name, put, meaning = draw.choice(CHUNKS)
        made.names.append(f"chunks: {name}")
        made.meaning = max(made.meaning, meaning)
        after = put(body)
    elif chunked:
        after = _whole(body)
    if version == b"HTTP/1.0" and (chunked or (not made.leftover and b"ransfer-" in framing)):
        made.meaning = REFUSED  # such a server has never heard of chunks
    end = made.add(draw.choice(LINE_ENDS), "line ends") if "line ends" in chosen else b"\r\n"
    framing = framing.replace(b"{n}", b"%d" % len(body))
    lines = [host, framing, *fields]
    if "field" not in chosen or draw.random() < 0.5:
        draw.shuffle(lines)
    made.sent = end.join([b" ".join(filter(None, [line, version])), *filter(None, lines), b"", b""]) + after
    return made


def _garbled(sent: bytes, draw: random.Random) -> bytes:
    """Up to three bytes changed, taken out or put in, in the head or not far behind it."""
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(min(len(sent), 600))
        byte = draw.choice([draw.randrange(256).to_bytes(), draw.choice([b"\r", b"\n", b"\0", b" ", b":", b"0", b"1"])])
        sent = sent[:place] + draw.choice([b"", byte, byte]) + sent[place + draw.randint(0, 1) :]
    return sent


def _in_pieces(draw: random.Random, sent: bytes) -> list[bytes]:
    """As it is, cut at random, or a byte at a time until some of the body has gone."""
    how = draw.random()
    if how < 0.6:
        return [sent]
    if how < 0.95 or len(sent) > 3000:
        cuts = sorted(draw.sample(range(1, len(sent)), k=draw.randint(1, 6)))
    else:
        cuts = list(range(1, min(len(sent), 450)))
    return [sent[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
