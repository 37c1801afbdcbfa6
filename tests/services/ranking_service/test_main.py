"""The command line: links, files in and out, a copy, and what can't work said in one line."""

import json
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from harness.ranking_service import RankingService, in_shown_order, rows
from plaudit.ranking_service.__main__ import main


def run(*arguments: str | Path, database: str = "r.db") -> int:
    command, *rest = [str(argument) for argument in arguments]
    return main([command, "--database", database, *rest])


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK_DATABASE", "RANK_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def ranked_file(tmp_path: Path) -> Path:
    path = tmp_path / "ranked.jsonl"
    listed = [{"prompt": f"p{i}", "answers": ["a", "b", "c"]} for i in range(3)]
    path.write_text("".join(json.dumps(item) + "\n" for item in listed))
    return path


def test_links_are_printed_once_and_can_be_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("invite", "Ada", "--number", "2", "--public-url", "https://rank.example/") == 0
    first = capsys.readouterr().out.splitlines()
    assert len(first) == 3
    pseudonym, link, name = first[0].split("\t")
    assert name == "Ada"
    assert re.fullmatch(r"https://rank\.example/i/[\w-]{43}", link)
    assert run("invite", "--again", pseudonym) == 0
    assert link not in capsys.readouterr().out
    assert run("invite", "--again", "p-nobody") == 65
    assert "there is no annotator 'p-nobody'" in capsys.readouterr().err


def test_export_import_export_over_files_is_byte_identical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("import", ranked_file(tmp_path), "--batch", "b1") == 0
    assert "3 rankings added" in capsys.readouterr().err
    assert run("export", "one.jsonl") == 0
    assert run("import", "one.jsonl", database="other.db") == 0
    assert run("export", "two.jsonl", database="other.db") == 0
    assert Path("one.jsonl").read_bytes() == Path("two.jsonl").read_bytes()
    assert run("import", "one.jsonl", database="other.db") == 0
    assert "0 rankings added, 3 were there" in capsys.readouterr().err


def test_a_lossy_format_says_how_many_ties_it_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("import", ranked_file(tmp_path), "--batch", "b1")
    run("export", "all.jsonl")
    lines = [json.loads(line) for line in Path("all.jsonl").read_text().splitlines()]
    for line in lines:
        line["ranks"] = [1, 1, 2]
    Path("ties.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("import", "ties.jsonl", database="ties.db") == 0
    capsys.readouterr()
    assert run("export", "-", "--format", "trl", database="ties.db") == 0
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 6
    assert "6 lines; trl has no ties and no skips: 3 ties dropped, 0 skips and flags" in told.err


def test_answers_can_be_imported_and_are_asked_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows(4)))
    assert run("import", path, "--overlap", "2") == 0
    assert "batch b1: 4 tasks added, 0 were there" in capsys.readouterr().err
    assert run("import", path, "--overlap", "2") == 0
    assert "0 tasks added, 4 were there" in capsys.readouterr().err
    assert run("import", path, "--overlap", "5") == 65
    assert "exists with overlap=2, and the upload has 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{\n", "line 1: not JSON"),
        ('{"prompt": "p", "answers": ["a", "b"]}\n{"prompt": "p", "answers": ["a"]}\n', "row 2:"),
        ('{"id": "x", "ranks": [1]}\n', "row 1: task: Field required"),
        ('{"id": "x"}\n', "row 1: group: Field required"),
    ],
)
def test_a_file_with_a_wrong_row_is_refused_whole(
    tmp_path: Path, content: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text(content)
    assert run("import", path) == 65
    told = capsys.readouterr().err
    assert said in told
    assert "nothing was taken" in told
    run("export", "-")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dance"], "there is no command 'dance'"),
        (["serve", "--port", "99999"], "--port 99999"),
        (["serve", "--host", "999.0.0.1"], "is not an address of this machine"),
        (["serve", "--api-key-file", "none"], "--api-key-file none can't be read"),
        (["serve", "--database", "mysql://x/y"], "only sqlite and postgresql are supported"),
        (["import", "none.jsonl"], "none.jsonl can't be read"),
        (["export", "x", "--batch", "none"], "--batch none: there is no such batch"),
        (["backup", "copy.db"], "there is no such file to copy"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    for name in ("serve", "invite", "export", "import", "backup"):
        assert f"  {name} " in told


def test_a_copy_is_made_while_the_service_runs(service: RankingService, tmp_path: Path) -> None:
    service.upload(rows(2), overlap_share=0)
    me = service.annotator()
    task = me.get("/").json()
    body = {"key": task["key"], "version": 0, "ranks": in_shown_order(task)}
    assert me.post(f"/a/{task['assignment']}/ranking", json=body).is_success
    copy = tmp_path / "copy.db"
    assert run("backup", copy, database=service.database) == 0
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("SELECT count(*) FROM submissions").fetchone() == (1,)
    me.close()


def test_sigterm_ends_the_program_with_0_and_idle_connections_hold_nothing_up(service: RankingService) -> None:
    idle = httpx.Client(base_url=service.url)
    assert idle.get("/livez").is_success
    assert service.kill(signal.SIGTERM) == 0
    idle.close()


def test_a_port_in_use_is_said_at_once(service: RankingService) -> None:
    command = [sys.executable, "-m", "plaudit.ranking_service", "serve", "--port", str(service.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"can't listen on 127.0.0.1:{service.port}" in done.stderr


def test_the_ready_file_says_where_it_answers(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    running = RankingService(str(tmp_path / "x.db"), "--ready-file", str(ready))
    told = json.loads(ready.read_text())
    assert told == {"url": f"http://127.0.0.1:{running.port}", "pid": running.pid}
    running.kill(signal.SIGTERM)


def test_the_key_is_not_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--api-key", "secret"])
    assert "secret" not in capsys.readouterr().out
