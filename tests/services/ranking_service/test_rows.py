"""Rows of JSON lines."""

from plaudit.wire import rankings as wire


def test_only_a_newline_ends_a_row() -> None:
    texts = ["two\u2028lines", "next\u0085line", "a form\x0cfeed", "a\r\nb"]
    rows = [wire.new_answers_row("b1", text, [wire.new_answer(text), wire.new_answer("x")]) for text in texts]
    lines = "".join(row.model_dump_json() + "\n" for row in rows)
    assert len(lines.splitlines()) > len(rows)
    assert wire.rows_of(lines, wire.AnswersRow) == rows
