"""The report in a real browser: it opens from a file, asks nobody for anything, and answers."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from helpers import browser, reports
from tvlens.figures.report.page import report_page

EVIL = "</script><img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"

pytestmark = pytest.mark.skipif(
    browser.find() is None and not browser.required(), reason=browser.NOT_RUN
)


@pytest.fixture(scope="module")
def chromium():
    with browser.browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """The page of a made-up run."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report_page(reports.contents()), encoding="utf-8")
    return path


class Shown:
    """A page that is open, and what went wrong with it."""

    def __init__(self, chromium: Any, file: Path, **options: Any) -> None:
        self.context = chromium.new_context(**({"viewport": SIZE} | options))
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_function("Bokeh.documents.length > 0 && Bokeh.documents[0].is_idle")

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def point_at(self, place: str, x: float, y: float) -> None:
        """Moves the pointer to where the picture has these coordinates."""
        drawn = self.page.locator(f"#{place}")
        drawn.scroll_into_view_if_needed()
        self.page.wait_for_timeout(300)
        left, top = self.page.evaluate(WHERE, [place, x, y])
        self.page.mouse.move(left - 3, top)
        self.page.mouse.move(left, top)

    def pixels(self) -> np.ndarray:
        """What is seen, red, green and blue from 0 to 1."""
        return image.imread(io.BytesIO(self.page.screenshot()))[..., :3]


SIZE = {"width": 1100, "height": 800}
WHERE = """([place, x, y]) => {
  const model = Bokeh.documents[0].roots().find((each) =>
    document.getElementById(place).contains(Bokeh.index.get(each).el));
  const view = Bokeh.index.get(model);
  const box = view.canvas_view.el.getBoundingClientRect();
  const frame = view.frame;
  return [box.left + frame.x_scale.compute(x), box.top + frame.y_scale.compute(y)];
}"""


@pytest.fixture
def shown(chromium, file):
    """The page, which must not have complained when the test is over."""
    opened = Shown(chromium, file)
    yield opened
    assert opened.complaints == []
    assert opened.requests[0] == file.as_uri()
    # Pictures that programs make themselves come from nowhere.
    assert {url.split(":")[0] for url in opened.requests[1:]} <= {"data", "blob"}
    opened.context.close()


def place_of(page: Any, title: str) -> str:
    """The picture of this title."""
    return page.get_by_role("img", name=title, exact=True).get_attribute("id")


def test_every_picture_is_drawn(shown):
    places = shown.page.locator(".drawn")
    assert places.count() == 11
    for i in range(places.count()):
        place = places.nth(i)
        place.scroll_into_view_if_needed()
        assert place.locator("canvas").first.bounding_box()["width"] > 200


def test_pointing_at_a_head_tells_all_its_scores(shown):
    shown.point_at(place_of(shown.page, "Causal mediation (AIE), antonym"), 1, 2)
    tip = shown.page.locator(".tip:visible")
    tip.wait_for()
    assert tip.inner_text().split("\n") == [
        "layer 2, head 1",
        "AIE: 0.5000 [0.4800, 0.5200], rank 1 of 24",
        "LTV weight: 0.1000, rank 15 of 24",
        "LTV contribution: -1.0000, rank 13 of 24",
    ]


def test_clicking_a_head_shows_what_it_attends_to(shown):
    page = shown.page
    shown.point_at(place_of(page, "Learnable Task Vector (LTV), present-past"), 1, 2)
    page.mouse.down()
    page.mouse.up()
    place = page.locator('.attention[data-task="present-past"]')
    place.get_by_role("heading", name="Layer 2, head 1").wait_for()
    said = place.inner_text()
    assert "AIE: 0.5000 [0.4800, 0.5200], rank 1 of 24" in said
    assert "the logit of the answer, over the mean of the vocabulary, “went”: 1.250" in said
    assert "From the last token it attends most to “A” (4) 1.00" in said
    assert "Q: go↵A:" in said
    assert place.locator(".pattern canvas").bounding_box()["width"] > 200
    assert place.locator('[data-head="2.1"]').get_attribute("aria-pressed") == "true"
    # Each token attends to the one before it: blue below the diagonal, none on it.
    place.locator(".pattern").scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    assert _share(shown.pixels(), [0, 0x72 / 255, 0xB2 / 255]) > 0.005
    # A head without a stored pattern says so.
    shown.point_at(place_of(page, "Learnable Task Vector (LTV), present-past"), 3, 5)
    page.mouse.down()
    page.mouse.up()
    place.get_by_role("heading", name="Layer 5, head 3").wait_for()
    assert "No pattern of this head is stored" in place.inner_text()
    assert place.locator('[aria-pressed="true"][data-head]').count() == 0


def test_all_can_be_reached_by_the_keyboard(shown):
    page = shown.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to what was found"
    head = page.locator('.attention[data-task="present-past"] [data-head="3.0"]')
    for _ in range(200):
        page.keyboard.press("Tab")
        if head.evaluate("element => element === document.activeElement"):
            break
    outline = head.evaluate("element => getComputedStyle(element).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    place = page.locator('.attention[data-task="present-past"]')
    place.get_by_role("heading", name="Layer 3, head 0").wait_for()
    place.get_by_role("button", name="prompt 2").focus()
    page.keyboard.press("Space")
    assert place.get_by_role("button", name="prompt 2").get_attribute("aria-pressed") == "true"
    assert page.locator("main, nav, header, footer").count() == 4


def test_tables_are_sorted_by_their_columns(shown):
    page = shown.page
    table = page.get_by_role("table", name="present-past, with 95% intervals over test prompts")
    button = table.get_by_role("button", name="zero-shot accuracy")

    def names() -> list[str]:
        return table.locator("tbody th").all_inner_texts()

    button.click()
    assert names() == ["LTV", "FV, one layer", "no vector", "random ω", "ICL"]
    assert table.locator("th").nth(1).get_attribute("aria-sort") == "descending"
    button.focus()
    page.keyboard.press("Enter")
    assert names() == ["random ω", "no vector", "FV, one layer", "LTV", "ICL"]
    table.get_by_role("button", name="method").click()
    assert names() == ["FV, one layer", "ICL", "LTV", "no vector", "random ω"]


def test_curves_tell_their_numbers(shown):
    page = shown.page
    shown.point_at(place_of(page, "linear: vectors of each prompt"), 4, 0.1)
    tip = page.locator(".tip:visible").first
    tip.wait_for()
    assert tip.inner_text() == "LTV\n4 points: 0.1000 [0.0800, 0.1200]"
    shown.point_at(place_of(page, "present-past, accuracy without the best heads"), 0.25, 0.6)
    page.locator(".tip:visible", has_text="6 heads (25%): 0.600 [0.500, 0.700]").first.wait_for()
    shown.point_at(place_of(page, "Overlap of the best heads: all tasks, AIE and LTV"), 2, 0.5)
    page.locator(".tip:visible", has_text="best 2: 0.500 shared, chance 0.083").first.wait_for()


def test_maps_of_patching_tell_their_numbers(shown):
    title = "present-past: residual stream after the layer"
    shown.point_at(place_of(shown.page, title), 0, 1)
    tip = shown.page.locator(".tip:visible", has_text="layer 1, answers")
    tip.wait_for()
    assert "share restored: 1.000" in tip.inner_text()


def test_a_dark_theme_is_dark_and_readable(chromium, file):
    shown = Shown(chromium, file, color_scheme="dark")
    assert shown.pixels().mean() < 0.25
    ink, paper = (_brightness(shown, name) for name in ("color", "backgroundColor"))
    assert (ink + 0.05) / (paper + 0.05) > 7
    drawn = shown.page.locator(f"#{place_of(shown.page, 'Causal mediation (AIE), antonym')}")
    drawn.scroll_into_view_if_needed()
    shown.page.wait_for_timeout(500)
    seen = image.imread(io.BytesIO(drawn.screenshot()))[..., :3]
    assert seen.mean() < 0.3, "pictures are dark too"
    assert (seen.min(axis=-1) > 0.7).mean() > 0.001, "and their letters are light"
    assert shown.complaints == []
    shown.context.close()


@pytest.mark.parametrize("width", [420, 1100])
def test_nothing_is_wider_than_the_screen(chromium, file, width):
    shown = Shown(chromium, file, viewport={"width": width, "height": 800})
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    shown.page.locator('.attention [data-head="2.1"]').first.click()
    shown.page.locator(".pattern canvas").wait_for()
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    shown.context.close()


def test_it_can_be_printed(chromium, file):
    shown = Shown(chromium, file, color_scheme="dark")
    shown.page.emulate_media(media="print")
    assert not shown.page.locator("nav").is_visible()
    assert _brightness(shown, "backgroundColor") == 1
    drawn = shown.page.locator(".drawn").first
    assert drawn.evaluate("element => getComputedStyle(element).filter") == "none"
    assert shown.page.pdf(format="A4").startswith(b"%PDF")
    shown.context.close()


def test_a_screenshot_shows_the_map(shown):
    place = shown.page.locator(f"#{place_of(shown.page, 'Causal mediation (AIE), antonym')}")
    place.scroll_into_view_if_needed()
    shown.page.wait_for_timeout(500)
    seen = image.imread(io.BytesIO(place.screenshot()))[..., :3]
    # One head is dark red, 1 of 24 of what is inside the axes; the others are nearly white.
    assert 0.01 < _share(seen, [0x67 / 255, 0, 0x1F / 255]) < 0.06
    assert (seen.min(axis=-1) > 0.85).mean() > 0.5


def test_text_of_files_is_never_run(chromium, tmp_path):
    runs = reports.contents().runs
    heads = reports.heads((EVIL,))
    table = {"heads": heads, "results": reports.text_results((EVIL,)).assign(method=EVIL)}
    table |= {"patching": reports.patched().assign(task=EVIL, role=EVIL)}
    evil = type(runs[0])(EVIL, EVIL, reports.manifest(command=EVIL), table)
    shown = {EVIL: (reports.example(),)}
    path = tmp_path / "evil.html"
    made = reports.contents(model=EVIL, runs=[evil], examples=shown)
    path.write_text(report_page(made), encoding="utf-8")
    opened = Shown(chromium, path)
    opened.point_at("picture-0", 1, 2)
    opened.page.mouse.down()
    opened.page.mouse.up()
    opened.page.get_by_role("heading", name="Layer 2, head 1").wait_for()
    opened.point_at("picture-2", 0, 1)
    opened.page.locator(".tip:visible").first.wait_for()
    assert opened.page.evaluate("window.hacked") is None
    assert opened.complaints == []
    opened.context.close()


def _share(pixels: np.ndarray, colour: list[float]) -> float:
    """The share of pixels that have about this colour."""
    return float((np.abs(pixels - colour).max(axis=-1) < 0.06).mean())


def _brightness(shown: Shown, name: str) -> float:
    """Relative luminance of a colour of the page, from 0 to 1."""
    text = shown.page.evaluate(f"getComputedStyle(document.documentElement).{name}")
    parts = np.array([int(part) for part in text[4:-1].split(",")[:3]]) / 255
    linear = np.where(parts <= 0.04, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
