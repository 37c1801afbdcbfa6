"""The page in a real browser: keyboard, no script, a phone, no network, an ended session, hostile texts, axe."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from harness.machine.browser import browser as running_browser
from harness.ranking_service import RankingService, rows
from plaudit.wire import rankings as wire
from plaudit.wire.rankings import Turn

DESKTOP = {"width": 1280, "height": 800}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
TALK = [
    Turn(role="system", content="Answer briefly."),
    Turn(role="user", content="Can tomatoes grow on a balcony?"),
    Turn(role="assistant", content="Yes."),
    Turn(role="user", content="In which pots?"),
]
LONG = "\n\n".join(f"Paragraph {i}. " + "All work and no play makes a long answer. " * 12 for i in range(20))
SIGN_IN = "a[href='/']"

OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with running_browser() as running:
        yield running


@pytest.fixture
def open_page(chromium: Browser, service: RankingService) -> Iterator[OpenPage]:
    """Opens the service as somebody new who has followed their link. What goes wrong in a page fails the test."""
    complaints: list[str] = []
    contexts = []

    def open_(*, role: str = "annotator", token: str | None = None, **settings: Any) -> Page:
        context = chromium.new_context(**({"viewport": DESKTOP} | settings))
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: complaints.append(f"a dialog: {dialog.message}"))
        page.on(
            "request",
            lambda request: None if request.url.startswith(service.url) else complaints.append(request.url),
        )
        page.goto(f"{service.url}/i/{token or service.invite(role=role).token}")
        page.get_by_role("button", name="Begin").click()
        page.wait_for_url(f"{service.url}/")
        return page

    yield open_
    for context in contexts:
        context.close()
    # Chromium writes failed requests to the console; what was meant to fail is no complaint.
    assert [text for text in complaints if "Failed to load resource" not in text] == []


def ready(page: Page) -> None:
    """Until the script has taken over."""
    page.wait_for_selector("html.js")


def choose(page: Page, *places: int) -> None:
    """Click a rank on each card, from the first to the last."""
    for letter, place in zip("ABCDEFGHI", places, strict=False):
        page.locator(f"#card-{letter} label", has_text=f"is {place}").click()


def ranks_in_order_shown(row: dict[str, Any]) -> list[int]:
    return [row["ranks"][i] for i in row["shown_order"]]


def axe(page: Page) -> list[str]:
    """What axe complains about."""
    return [
        f"{violation['id']}: {violation['nodes'][0]['html'][:200]}"
        for violation in Axe().run(page).response["violations"]
    ]


def test_four_answers_are_five_keystrokes(service: RankingService, open_page: OpenPage) -> None:
    service.upload(rows(2), overlap_share=0)
    page = open_page()
    ready(page)
    first = page.locator("#rank").get_attribute("action")
    for key in ("2", "1", "4", "4", "Enter"):
        page.keyboard.press(key)
    expect(page.locator(f"#rank[action='{first}']")).to_have_count(0)
    (row,) = service.rankings()
    assert ranks_in_order_shown(row) == [2, 1, 3, 3]
    assert row["seconds"] < 60
    expect(page.locator(".mine")).to_have_text("1 by you")


def test_keys_move_between_cards_and_enter_waits_for_every_answer(service: RankingService, open_page: OpenPage) -> None:
    service.upload(rows(1), overlap_share=0)
    page = open_page()
    ready(page)
    expect(page.locator("#card-A")).to_be_focused()
    for key in ("j", "ArrowDown", "k", "3"):
        page.keyboard.press(key)
    expect(page.locator("#card-B input[value='3']")).to_be_checked()
    expect(page.locator("#card-C")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_contain_text("Give every answer a rank first")
    assert service.rankings() == []
    expect(page.locator("#order")).to_have_text("B  ·  3 to go")


def test_keys_are_letters_in_a_text_box(service: RankingService, open_page: OpenPage) -> None:
    service.upload(rows(1), overlap_share=0)
    page = open_page()
    ready(page)
    choose(page, 1, 2, 3, 4)
    page.get_by_text("Add a note").click()
    page.get_by_label("Note, for the people who asked").focus()
    page.keyboard.type("1 s f u ?\n")
    assert service.rankings() == []
    expect(page.get_by_label("Note, for the people who asked")).to_have_value("1 s f u ?\n")
    page.get_by_role("button", name="Submit").click()
    page.get_by_role("heading", name="Thank you").wait_for()
    (row,) = service.rankings()
    assert row["note"] == "1 s f u ?\n"


def test_keys_can_be_turned_off(service: RankingService, open_page: OpenPage) -> None:
    service.upload(rows(1), overlap_share=0)
    page = open_page()
    ready(page)
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
    page.get_by_label("Use these keys").uncheck()
    page.keyboard.press("Escape")
    page.locator("#card-A").focus()
    page.keyboard.press("1")
    expect(page.locator("input:checked[type=radio]")).to_have_count(0)
    page.reload()
    ready(page)
    page.keyboard.press("s")
    assert service.rankings() == []


def test_skip_flag_and_undo_by_keyboard(service: RankingService, open_page: OpenPage) -> None:
    service.upload(rows(4), overlap_share=0)
    page = open_page()
    ready(page)
    page.keyboard.press("s")
    expect(page.locator(".mine")).to_have_text("1 by you")
    ready(page)
    page.keyboard.press("f")
    page.keyboard.press("Space")
    page.get_by_role("button", name="Flag and go on").press("Enter")
    expect(page.locator(".mine")).to_have_text("2 by you")
    ready(page)
    for key in ("1", "2", "2", "3", "Enter"):
        page.keyboard.press(key)
    expect(page.locator(".mine")).to_have_text("3 by you")
    ready(page)
    page.keyboard.press("u")
    page.wait_for_url(f"{service.url}/a/*")
    ready(page)
    expect(page.locator("#order")).to_have_text("A  ›  B = C  ›  D")
    page.keyboard.press("4")
    page.keyboard.press("Enter")
    page.wait_for_url(f"{service.url}/")
    found = sorted((row["status"], row["version"]) for row in service.rankings())
    assert found == [("counted", 3), ("flagged", 1), ("skipped", 1)]


def test_everything_works_without_javascript(service: RankingService, open_page: OpenPage) -> None:
    service.upload(rows(3), overlap_share=0)
    page = open_page(java_script_enabled=False)
    choose(page, 1, 2)
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("alert")).to_contain_text("Give every answer a rank first")
    expect(page.locator("#card-B input[value='2']")).to_be_checked()
    choose(page, 1, 2, 2, 3)
    page.get_by_role("button", name="Submit").click()
    expect(page.locator(".mine")).to_have_text("1 by you")
    page.get_by_role("button", name="Skip").click()
    expect(page.locator(".mine")).to_have_text("2 by you")
    page.get_by_role("button", name="Undo last").click()
    page.wait_for_url(f"{service.url}/a/*")
    page.get_by_text("Something is wrong with this task").click()
    page.get_by_label("The text is broken or cut off").check()
    page.get_by_role("button", name="Flag and go on").click()
    expect(page.locator(".mine")).to_have_text("2 by you")
    assert sorted(row["status"] for row in service.rankings()) == ["counted", "flagged"]
    page.get_by_role("link", name="My rankings").click()
    expect(page.get_by_role("listitem")).to_have_count(2)


def test_a_phone_shows_everything_and_a_thumb_can_hit_it(service: RankingService, open_page: OpenPage) -> None:
    service.upload(rows(1, k=9), overlap_share=0, instructions="Which reads best?")
    page = open_page(**PHONE)
    ready(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    small = page.evaluate(
        """[...document.querySelectorAll('.ranks span, .bar button')].filter((e) => e.checkVisibility())
           .map((e) => e.getBoundingClientRect()).filter((r) => r.width < 44 || r.height < 44).length"""
    )
    assert small == 0
    for letter in "ABCDEFGHI":
        page.locator(f"#card-{letter} label", has_text="is 1").tap()
    page.get_by_role("button", name="Submit").tap()
    page.get_by_role("heading", name="Thank you").wait_for()
    (row,) = service.rankings()
    assert row["ranks"] == [1] * 9


def test_offline_and_back_the_ranking_is_sent_once(service: RankingService, open_page: OpenPage) -> None:
    service.upload(rows(1), overlap_share=0)
    page = open_page()
    ready(page)
    page.context.set_offline(True)
    for key in ("1", "2", "3", "4", "Enter"):
        page.keyboard.press(key)
    expect(page.locator("#notice")).to_contain_text("You are offline")
    assert service.rankings() == []
    page.context.set_offline(False)
    page.get_by_role("heading", name="Thank you").wait_for()
    assert len(service.rankings()) == 1


def test_an_answer_that_never_arrives_is_asked_for_again_under_one_key(
    service: RankingService, open_page: OpenPage
) -> None:
    service.upload(rows(1), overlap_share=0)
    page = open_page()
    ready(page)
    lost: list[str] = []

    def lose(route: Any) -> None:
        if lost:
            route.continue_()
        else:
            lost.append(str(route.fetch().status))  # the service has it, and the page never hears of it
            route.abort()

    page.route("**/ranking", lose)
    for key in ("1", "2", "3", "4", "Enter"):
        page.keyboard.press(key)
    page.get_by_role("heading", name="Thank you").wait_for()
    assert lost == ["200"]
    (row,) = service.rankings()
    assert row["version"] == 1


def test_a_database_that_is_locked_is_said_and_the_ranking_is_sent_again(
    service: RankingService, open_page: OpenPage
) -> None:
    service.upload(rows(1), overlap_share=0)
    page = open_page()
    ready(page)
    refused: list[str] = []

    def refuse(route: Any) -> None:
        if refused:
            route.continue_()
        else:
            refused.append(route.request.url)
            route.fulfill(status=503, headers={"retry-after": "1"}, content_type="application/problem+json", body="{}")

    page.route("**/ranking", refuse)
    for key in ("1", "2", "2", "4", "Enter"):
        page.keyboard.press(key)
    expect(page.locator("#notice")).to_contain_text("kept and sent again in 1 s")
    page.get_by_role("heading", name="Thank you").wait_for()
    (row,) = service.rankings()
    assert ranks_in_order_shown(row) == [1, 2, 2, 3]


def test_a_service_that_is_killed_and_restarted_gets_the_ranking(service: RankingService, open_page: OpenPage) -> None:
    service.upload(rows(1), overlap_share=0)
    page = open_page()
    ready(page)
    service.kill(signal.SIGKILL)
    for key in ("1", "2", "3", "4", "Enter"):
        page.keyboard.press(key)
    expect(page.locator("#notice")).to_be_visible()
    service.start()
    page.get_by_role("heading", name="Thank you").wait_for()
    assert len(service.rankings()) == 1


def test_a_session_that_has_ended_keeps_the_ranking_until_the_link_is_opened_again(
    service: RankingService, open_page: OpenPage
) -> None:
    service.upload(rows(1), overlap_share=0)
    token = service.invite().token
    page = open_page(token=token)
    ready(page)
    page.context.clear_cookies()
    for key in ("1", "2", "3", "4", "Enter"):
        page.keyboard.press(key)
    expect(page.locator("#notice")).to_contain_text("Your session has ended")
    page.get_by_role("link", name="Sign in").click()
    page.get_by_label("Invitation link").fill(f"{service.url}/i/{token}")
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("heading", name="Thank you").wait_for()
    assert len(service.rankings()) == 1


def test_a_draft_outlives_a_reload_and_is_there_on_another_device(service: RankingService, open_page: OpenPage) -> None:
    service.upload(rows(1), overlap_share=0)
    token = service.invite().token
    page = open_page(token=token)
    ready(page)
    with page.expect_response("**/draft") as saved:
        choose(page, 3, 1)
    assert saved.value.ok
    other = open_page(token=token)
    ready(other)
    expect(other.locator("#order")).to_have_text("B  ›  A  ·  2 to go")
    page.context.set_offline(True)
    choose(page, 2)
    page.context.set_offline(False)
    page.reload()
    ready(page)
    expect(page.locator("#order")).to_have_text("B  ›  A  ·  2 to go")
    expect(page.locator("#card-A input[value='2']")).to_be_checked()


def test_two_tabs_that_differ_show_both_and_one_of_them_wins(service: RankingService, open_page: OpenPage) -> None:
    service.upload(rows(1), overlap_share=0)
    page = open_page()
    ready(page)
    other = page.context.new_page()
    other.goto(service.url)
    ready(other)
    choose(page, 1, 2, 3, 4)
    page.get_by_role("button", name="Submit").click()
    page.get_by_role("heading", name="Thank you").wait_for()
    choose(other, 4, 3, 2, 1)
    other.get_by_role("button", name="Submit").click()
    expect(other.get_by_role("alert")).to_contain_text("A, then B, then C, then D")
    expect(other.get_by_role("alert")).to_contain_text("D, then C, then B, then A")
    assert axe(other) == []
    other.get_by_role("button", name="Submit").click()
    other.get_by_role("heading", name="Thank you").wait_for()
    (row,) = service.rankings()
    assert (ranks_in_order_shown(row), row["version"]) == ([4, 3, 2, 1], 2)


def test_two_people_at_once_share_the_work(service: RankingService, open_page: OpenPage) -> None:
    service.upload(rows(6), overlap_share=0)
    people = [open_page(), open_page()]
    for _ in range(3):
        for page in people:
            ready(page)
        for page in people:
            before = page.locator("#rank").get_attribute("action")
            for key in ("1", "2", "3", "4", "Enter"):
                page.keyboard.press(key)
            expect(page.locator(f"#rank[action='{before}']")).to_have_count(0)
    found = service.rankings()
    assert len({row["task"] for row in found}) == len(found) == 6
    assert len({row["annotator"] for row in found}) == 2


HOSTILE = [
    "<script>window.broken = 1; alert(1)</script><img src=x onerror='window.broken = 1'>",
    "</div></fieldset></form><form action='https://evil.example'><button>Submit</button>",
    "\u202e\u2067 right to left \u2066 and back \u202c",
    "NUL \x00 and escape \x1b[31m and {{ 7 * 7 }}",
    "x" * 100_000,
    "<a href='javascript:window.broken = 1'>a</a> ${window.broken = 1}",
]


def test_hostile_answers_are_read_and_run_nothing(service: RankingService, open_page: OpenPage) -> None:
    answers = [wire.new_answer(text) for text in HOSTILE]
    row = wire.new_answers_row("b1", [Turn(role="user", content=HOSTILE[0])], answers)
    service.upload([row], overlap_share=0, instructions=HOSTILE[0])
    page = open_page()
    ready(page)
    assert page.evaluate("window.broken") is None
    assert page.locator("form").count() == 3  # ours, and those that sign out and close the help
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for text in HOSTILE[:2]:
        expect(page.locator(".card .text", has_text=text)).to_have_count(1)
    for _ in HOSTILE:
        page.keyboard.press("1")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Thank you").wait_for()
    (recorded,) = service.rankings()
    assert [answer["text"] for answer in recorded["answers"]] == HOSTILE
    assert page.evaluate("window.broken") is None


def test_text_from_right_to_left_is_shown_so_whatever_the_page_is(service: RankingService, open_page: OpenPage) -> None:
    answers = [wire.new_answer(text) for text in ("رائعا من البداية", "It was fine.")]
    service.upload([wire.new_answers_row("b1", "كان هذا الفيلم", answers)], overlap_share=0)
    page = open_page()
    ready(page)
    for text, direction in (("رائعا من البداية", "rtl"), ("It was fine.", "ltr"), ("كان هذا الفيلم", "rtl")):
        found = page.locator(".text", has_text=text)
        assert found.evaluate("(element) => getComputedStyle(element).direction") == direction


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_axe_finds_nothing(service: RankingService, open_page: OpenPage, scheme: str, size: str) -> None:
    talk = wire.new_answers_row("b1", TALK, [wire.new_answer(LONG), wire.new_answer("Big ones.")])
    service.upload([talk, *rows(2)], overlap=3, overlap_share=1, instructions="Which answer helps more?")
    for _ in range(2):
        with service.annotator() as other:
            while (task := other.get("/").json())["assignment"]:
                ranks = {answer["id"]: place for place, answer in enumerate(task["answers"], start=1)}
                other.post(f"/a/{task['assignment']}/ranking", json={"key": task["key"], "version": 0, "ranks": ranks})
    settings = PHONE if size == "phone" else {}
    page = open_page(role="admin", color_scheme=scheme, **settings)
    ready(page)
    found = axe(page)
    page.keyboard.press("?")
    found += axe(page)
    page.keyboard.press("Escape")
    page.locator(".bar .primary").click()  # incomplete: the notice
    page.get_by_text("Add a note").click()
    page.get_by_text("Something is wrong with this task").click()
    found += axe(page)
    page.get_by_role("button", name="Skip").click()
    expect(page.locator(".mine")).to_have_text("1 by you")
    for path in ("/mine", "/admin", "/nothing-here"):
        page.goto(service.url + path)
        found += axe(page)
    for _ in range(2):
        page.goto(service.url)
        ready(page)
        with page.expect_navigation():
            page.get_by_role("button", name="Skip").click()
    page.get_by_role("heading", name="Thank you").wait_for()
    found += axe(page)
    page.goto(f"{service.url}/i/nobody")
    found += axe(page)
    page.goto(f"{service.url}/i/{service.invite().token}")
    found += axe(page)
    assert found == []


def test_a_page_with_its_files_has_at_most_30_kb_on_the_wire(service: RankingService, open_page: OpenPage) -> None:
    service.upload(rows(1), overlap_share=0, instructions="Which reads best?")
    page = open_page()
    sizes: list[int] = []
    page.on("response", lambda response: sizes.append(len(response.body())))
    page.reload()
    ready(page)
    assert sum(sizes) <= 30_000
