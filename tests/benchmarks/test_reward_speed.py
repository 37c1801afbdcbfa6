"""The comparison of reward servers: what is timed, and what is compared with what."""

import argparse
import functools
import math
import runpy
import sys

import pytest

from benchmarks.service import servers, speed
from benchmarks.service.comparison import Difference, Timing, difference_of, per_cpu_s, ratio, refusal_of, tables

LIAR = """
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "15")
        self.end_headers()
        self.wfile.write(b'{"reward": 0.0}')

http.server.ThreadingHTTPServer.request_queue_size = 64
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def timing(server, number_format, callers, rps, *, a_cpu_s=0.0, errors=0):
    return Timing(server, number_format, callers, rps, a_cpu_s, 0.2, 0.35, 0.5, errors)


TIMINGS = [
    timing("ours", "fp32", 64, 30.0, a_cpu_s=40.0),
    timing("ours-int8", "int8", 64, 75.0),
    timing("naive", "fp32", 64, 20.0, a_cpu_s=50.0),
    timing("onnxruntime", "fp32", 64, 24.0, a_cpu_s=25.0),
    timing("onnxruntime-int8", "int8", 64, 50.0, errors=2),
    timing("ours", "fp32", 1, 21.0),
    timing("ours-int8", "int8", 1, 45.0),
    timing("naive", "fp32", 1, 28.0),
    timing("onnxruntime", "fp32", 1, 20.0),
    timing("onnxruntime-int8", "int8", 1, 60.0),
]


def test_a_format_is_compared_with_the_best_other_of_the_same_format_and_number_of_callers():
    ours, ours_int8 = TIMINGS[:2]
    assert ratio(ours, TIMINGS) == 1.25
    assert ratio(ours_int8, TIMINGS) == 1.5
    assert ratio(TIMINGS[5], TIMINGS) == 0.75
    assert ratio(ours, TIMINGS, per_cpu_s) == 0.8
    assert math.isnan(ratio(ours_int8, TIMINGS[:4]))


def test_the_tables_sort_each_format_by_speed_and_name_the_best_other():
    apart = Difference(2e-7, 1e-7)
    differences = dict.fromkeys((each.server for each in TIMINGS), apart)
    assert tables(TIMINGS, differences) == [
        "| format | server | 64 callers | 1 caller | p50, p95 at 64, ms | largest, mean distance |",
        "| --- | --- | --- | --- | --- | --- |",
        "| fp32 | ours | 30.0 | 21.0 | 200, 350 | 2e-07, 1e-07 |",
        "| fp32 | onnxruntime | 24.0 | 20.0 | 200, 350 | 2e-07, 1e-07 |",
        "| fp32 | naive | 20.0 | 28.0 | 200, 350 | 2e-07, 1e-07 |",
        "| int8 | ours-int8 | 75.0 | 45.0 | 200, 350 | 2e-07, 1e-07 |",
        "| int8 | onnxruntime-int8 | 50.0 (2 errors) | 60.0 | 200, 350 | 2e-07, 1e-07 |",
        "",
        "| ours over the best other | 64 callers | 1 caller |",
        "| --- | --- | --- |",
        "| ours | 1.25 (onnxruntime) | 0.75 (naive) |",
        "| ours-int8 | 1.50 (onnxruntime-int8) | 0.75 (onnxruntime-int8) |",
    ]


@pytest.mark.parametrize(
    ("number_format", "rewards", "refused"),
    [
        ("fp32", [1.0, 2.0, 3.00009], ""),
        ("fp32", [1.0, 2.0, 3.00011], "a reward is 1.1e-04 from the model's; in fp32 at most 1e-04 is allowed"),
        ("fp32", [1.0, 2.0, math.nan], "a reward is nan"),
        ("int8", [1.3, 2.3, 3.3], ""),
        (
            "int8",
            [2.0, 2.0, 2.0],
            "rewards are 6.7e-01 from the model's on average; in int8 at most 4.1e-01 is allowed",
        ),
        ("int8", [math.nan, 2.0, 3.0], "rewards are nan"),
    ],
)
def test_rewards_that_are_not_the_models_are_refused(number_format, rewards, refused):
    expected = [1.0, 2.0, 3.0]
    said = refusal_of(number_format, difference_of(rewards, expected), expected)
    assert said.startswith(refused)
    assert bool(said) == bool(refused)


def test_a_server_with_a_missing_reward_is_an_error():
    with pytest.raises(ValueError, match="longer"):
        difference_of([1.0], [1.0, 2.0])


@pytest.fixture
def one_layer(monkeypatch):
    monkeypatch.setattr(servers, "random_distilbert", functools.partial(servers.random_distilbert, layers=1))


@pytest.mark.slow
@pytest.mark.usefixtures("one_layer")
def test_only_a_server_that_answers_as_the_model_is_timed(tmp_path, monkeypatch, capsys):
    program = tmp_path / "liar.py"
    program.write_text(LIAR)
    liar = servers.Recipe((sys.executable, str(program), "{port}"))
    silent = servers.Recipe((sys.executable, "-c", "raise SystemExit('no model here')"))
    monkeypatch.setattr(servers, "RECIPES", {**servers.RECIPES, "liar": liar, "silent": silent})
    with servers.servers(["liar", "silent", "batched"], {}) as started:
        # Texts of different lengths share its batches.
        (batched,) = started
        assert batched.name == "batched"
        assert batched.difference.largest < 1e-6
    said = capsys.readouterr().err
    assert "liar is not timed: a reward is " in said
    assert "silent does not answer: no model here" in said


def test_an_engine_without_its_package_says_how_to_install_it(monkeypatch, tmp_path):
    engines = runpy.run_path(str(servers.PEERS / "engines.py"))
    monkeypatch.setitem(engines["PACKAGES"], ("onnxruntime", "int8"), ("torch", "no_such_engine"))
    with pytest.raises(SystemExit, match=r"onnxruntime in int8 needs no_such_engine: .* -m pip install no_such_engine"):
        engines["load"]("onnxruntime", "int8", str(tmp_path))


@pytest.mark.parametrize(
    ("named", "message"), [("onnx=/bin/sh", "no server is called 'onnx'"), ("openvino=/no/python", "names no Python")]
)
def test_a_peer_that_cannot_be_started_is_refused(named, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        speed.peer(named)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--servers", "openvino"], "openvino runs in an environment of its own: --peer openvino=PYTHON"),
        (["--into", "no-such-file.md", "--lengths", "uniform"], "has no line <!-- reward servers, uniform -->"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_measured(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed", "closed", *flags])
    with pytest.raises(SystemExit):
        speed.main()
    assert message in capsys.readouterr().err
