"""The rating page in a real browser: rate by keyboard, reload, export, go on elsewhere, score."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elmd.errors import DataError
from elmd.human.ratings import read_ratings
from elmd.human.score import score
from elmd.human.study import gather, write_study
from human_study import make_experiment, make_samples

pytestmark = pytest.mark.slow

N = 3
#: Scores of a dialogue of three replies, as keys.
KEYS = "435121"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; without a sandbox, which root does not get."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser installs it")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium or google-chrome on the PATH")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def study(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    pool = gather([str(make_experiment(tmp_path / "runs", make_samples(N)))])
    return tmp_path / "study", write_study(tmp_path / "study", pool, n=N, raters=2, seed=0)


class Rater:
    """Somebody at a browser of their own, who notices every error of the page."""

    def __init__(self, browser: Any, page: Path, **screen: Any):
        self.context = browser.new_context(**screen)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.goto(page.as_uri())

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def rate(self) -> None:
        """Rate the dialogue on the screen and go on with Enter, as its last score leaves the focus on Next."""
        self.press(*KEYS)

    @property
    def count(self) -> str:
        return self.page.inner_text("#count")

    def export(self, path: Path) -> Path:
        with self.page.expect_download() as download:
            self.page.click("#export")
        self.saved_as = download.value.suggested_filename
        download.value.save_as(path)
        return path

    def take(self, path: Path) -> str:
        self.page.set_input_files("#file", str(path))
        self.page.wait_for_function("!document.getElementById('message').hidden")
        return self.page.inner_text("#message")


def test_rate_reload_export_and_score(browser: Any, study: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, key = study
    rater = Rater(browser, folder / "rater-1.html")
    assert rater.count == f"0 of {N} dialogues, 0 of {6 * N} scores"
    rater.rate()
    rater.press("Enter", "5", "4")
    assert rater.count == f"1 of {N} dialogues, 8 of {6 * N} scores"

    rater.page.reload()
    assert rater.count == f"1 of {N} dialogues, 8 of {6 * N} scores"
    assert rater.page.locator("section:visible h2").inner_text() == f"Dialogue 2 of {N}"
    assert rater.page.locator("section:visible input:checked").evaluate_all("all => all.map(input => input.value)") == [
        "5",
        "4",
    ]
    part = rater.export(tmp_path / "part.json")
    assert rater.saved_as == "rater-1-incomplete.json"
    assert rater.page.inner_text("#message").startswith(f"Incomplete: 8 of {6 * N} scores.")
    with pytest.raises(DataError, match=r"part\.json: is incomplete: 10 scores are missing in 2 of 3 dialogues"):
        read_ratings(part, key)

    rater.press("u", *"5121")
    rater.press("Enter")
    rater.rate()
    assert rater.count == f"{N} of {N} dialogues, {6 * N} of {6 * N} scores"
    assert "All is rated" in rater.page.inner_text("#message")
    whole = rater.export(tmp_path / "rater-1.json")
    assert rater.saved_as == "rater-1.json"
    assert rater.errors == []

    ratings = read_ratings(whole, key)
    for at, item in enumerate(key["raters"]["1"]):
        wanted = KEYS if at != 1 else "545121"
        assert [ratings.scores[id_][metric] for id_ in item["responses"] for metric in ("R1", "R2")] == list(
            map(int, wanted)
        )
    assert score(key, [whole])["n"] == N


def test_go_on_elsewhere(browser: Any, study: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = study
    here = Rater(browser, folder / "rater-1.html")
    here.rate()
    part = here.export(tmp_path / "part.json")

    there = Rater(browser, folder / "rater-1.html")
    assert there.count.startswith("0 of")
    assert there.take(part) == "Taken over from part.json."
    assert there.count == f"1 of {N} dialogues, 6 of {6 * N} scores"
    assert (
        json.loads(there.export(tmp_path / "again.json").read_text())["ratings"]
        == json.loads(part.read_text())["ratings"]
    )

    other = Rater(browser, folder / "rater-2.html")
    assert other.take(part) == "part.json belongs to another study or another rater."
    (tmp_path / "no.json").write_text("{")
    assert other.take(tmp_path / "no.json") == "no.json is not a file that this page exported."
    assert other.count.startswith("0 of")
    assert here.errors + there.errors + other.errors == []


def test_keys_move_and_the_focus_shows(browser: Any, study: tuple[Path, dict[str, Any]]) -> None:
    rater = Rater(browser, study[0] / "rater-1.html")
    focused = "document.activeElement.closest('fieldset').dataset.metric + document.activeElement.value"
    rater.press("u")
    assert rater.page.evaluate(focused) == "R11"
    rater.press("3")
    assert rater.page.evaluate(focused) == "R21"
    rater.press("ArrowUp")
    assert rater.page.evaluate(focused) == "R13"
    rater.press("ArrowRight")
    assert rater.page.evaluate(focused) == "R14"
    assert rater.page.locator("section:visible input:checked").input_value() == "4"
    outline = "getComputedStyle(document.activeElement.nextElementSibling).outlineStyle"
    assert rater.page.evaluate(outline) == "solid"
    rater.press("n", "n")
    assert rater.page.locator("section:visible h2").inner_text() == "Dialogue 3 of 3"
    rater.press("p", "h")
    assert rater.page.locator("section:visible h2").inner_text() == "Dialogue 2 of 3"
    assert not rater.page.evaluate("document.getElementById('guide').open")
    assert rater.errors == []


def test_digits_change_nothing_in_a_dialogue_that_is_done(browser: Any, study: tuple[Path, dict[str, Any]]) -> None:
    rater = Rater(browser, study[0] / "rater-1.html")
    given = "all => all.map(input => input.value).join('')"
    inputs, done = rater.page.locator("section:visible input:checked"), rater.page.locator("#done")
    rater.rate()
    rater.press("3", "3")
    assert inputs.evaluate_all(given) == KEYS
    assert done.inner_text() == "Dialogue 1 is done: go on with Next (N)."
    rater.press("n", "n")
    assert done.inner_text() == ""
    rater.rate()  # the last one, and the second is open
    rater.press("3", "3")
    assert inputs.evaluate_all(given) == KEYS
    assert done.inner_text() == "Dialogue 3 is done: go on with Next unrated (U)."
    assert rater.page.evaluate("document.activeElement.id") == "unrated"
    inputs.nth(1).focus()
    rater.press("5", "4")
    assert inputs.evaluate_all(given) == KEYS[0] + "5" + KEYS[2:], "one change, where the rater went"
    rater.press("u", "1", "ArrowUp", "2")  # back to the first scale: on to the next open one
    rater.press(*KEYS[1:])
    assert inputs.evaluate_all(given) == "2" + KEYS[1:]
    assert done.inner_text() == "Dialogue 2 is done: press Export."
    assert rater.page.evaluate("document.activeElement.id") == "export"
    assert rater.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser: Any, study: tuple[Path, dict[str, Any]], scheme: str) -> None:
    screen = {"width": 390, "height": 844}
    rater = Rater(browser, study[0] / "rater-1.html", viewport=screen, color_scheme=scheme, is_mobile=True)
    assert rater.page.evaluate("document.documentElement.scrollWidth") <= 390
    light = rater.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(246, 246, 243)"
    assert light == (scheme == "light")
    smallest = rater.page.locator("section:visible .scale span").first.bounding_box()
    assert smallest["height"] >= 40
    assert smallest["width"] >= 40
