"""The page in a browser, one session: pick, zoom, write, click on a line, ask, add a slide, and what goes wrong."""

import json
import shutil
import threading
import time

import pytest
import uvicorn

from encoders import load_encoder
from inference.answers import Answering
from inference.app_routes import create_app
from inference.decoding import Decoding
from inference.report_writer import ReportWriter
from inference.slide_folder import SlideFolder
from tests.slides import DrawnSlide
from tests.test_app import HOSTS, TILING
from tests.test_inference import save_model
from vlm_loading import load_vlm

GATE = threading.Event()  # reports are written while it is set
GATE.set()
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class GatedWriter(ReportWriter):
    def _write(self, job, path, question):
        job.progress("Before the gate")
        while not GATE.wait(0.01):
            job.progress("Before the gate")
        return super()._write(job, path, question)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of three slides, one without tissue and one broken."""
    root = tmp_path_factory.mktemp("slides")
    DrawnSlide(width=1100, height=900, num_levels=2).write(root / "one.tiff")
    DrawnSlide(width=700, height=600, num_levels=1, pieces=()).write(root / "blank.tiff")
    (root / "broken.tiff").write_bytes((root / "one.tiff").read_bytes()[:900])
    return root


@pytest.fixture(scope="module")
def address(corpus, root, tmp_path_factory):
    """The page, served to a port of this machine."""
    encoder = load_encoder(str(corpus.encoder))
    about = {"encoder": str(corpus.encoder), "encoder_fingerprint": encoder.fingerprint(), "tiling": TILING}
    folder = save_model(tmp_path_factory.mktemp("m") / "final_model", corpus, patch_width=encoder.width, **about)
    model, tokenizer = load_vlm(folder)
    answering = Answering(Decoding(num_beams=1, max_new_tokens=12))
    writer = GatedWriter(model, tokenizer, encoder, answering=answering, num_workers=1)
    shown = {"model": "tiny", "llm": "tiny", "encoder": "tiny", "tile_size": 64, "mpp": 2.0}
    app = create_app(SlideFolder(root, 3_000_000), writer, shown, HOSTS)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=20)


@pytest.fixture(scope="module")
def page(address):
    """The page opened in headless Chromium; whatever the browser complains about is kept in `page.complaints`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium starts here (apt-get install chromium): {str(error).splitlines()[0]}")
        page = browser.new_page(viewport={"width": 1300, "height": 800}, color_scheme="dark", accept_downloads=True)
        page.set_default_timeout(60_000)
        page.complaints = []
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("console", lambda m: complain(page, m))
        page.goto(address)
        yield page
        browser.close()


def complain(page, message) -> None:
    """Keep what the browser calls an error, but for refused requests: slides are broken, or taken away."""
    refused = ("Failed to load resource", "Tile %s failed to load")
    if message.type == "error" and not message.text.startswith(refused):
        page.complaints.append(message.text)


def painted(page) -> int:
    """Pixels of the drawings above the slide that are not clear."""
    return page.evaluate(
        """() => { const c = document.querySelector('.marks');
        const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; }"""
    )


def shade(page) -> int:
    """How opaque the drawings above the slide are, all pixels together."""
    return page.evaluate(
        """() => { const c = document.querySelector('.marks');
        const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i]; return n; }"""
    )


def painted_navigator(page) -> bool:
    return page.evaluate("getComputedStyle(document.getElementById('navigator')).visibility") == "visible"


def pick(page, name: str) -> None:
    page.get_by_role("button", name=name).click()


def until(page, script: str) -> None:
    """Wait until an expression is true; the page's own policy forbids Playwright's `wait_for_function`."""
    deadline = time.monotonic() + 60
    while not page.evaluate(script):
        assert time.monotonic() < deadline, script
        page.wait_for_timeout(30)


def test_list_and_empty_state(page):
    page.get_by_role("button", name="one.tiff").wait_for()
    assert page.locator(".slide").count() == 3
    assert "Pick a slide" in page.locator("#view-message").inner_text()
    assert page.get_by_role("button", name="Write the report").is_disabled()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.fill("#search", "nothing of this name")
    assert "No slide" in page.locator("#slides").inner_text()
    page.fill("#search", "")


def test_a_slide_opens_zooms_and_shows_tissue_and_tiles(page):
    zooms = []
    page.on("response", lambda answer: "/zoom/" in answer.url and zooms.append((answer.url, answer.status)))
    pick(page, "one.tiff")
    page.locator("#scale").wait_for()
    assert "1,100 × 900 px" in page.locator("#slide-facts").inner_text()
    assert page.locator("#magnification").inner_text().endswith("×")
    assert not painted_navigator(page), "the whole slide is in view"
    before = page.locator("#scale-text").inner_text()
    for _ in range(3):
        page.get_by_role("button", name="Zoom in").click()
    until(page, f"document.getElementById('scale-text').textContent !== {before!r}")
    assert painted_navigator(page)
    page.get_by_role("button", name="Show the whole slide").click()
    until(page, f"document.getElementById('scale-text').textContent === {before!r}")
    assert zooms and all(status == 200 for _, status in zooms)
    assert painted(page) == 0
    for name in ("Tissue", "Tiles"):
        page.get_by_role("button", name=name, exact=True).click()
    until(page, "document.getElementById('legend').innerText.includes('% of the slide')")
    assert " tiles" in page.locator("#legend").inner_text()
    both = painted(page)
    page.get_by_role("button", name="Tissue", exact=True).click()
    assert both > painted(page) > 0
    page.get_by_role("button", name="Tiles", exact=True).click()
    assert painted(page) == 0


def test_a_report_is_written_and_a_click_on_a_line_shows_its_evidence(page):
    page.get_by_role("button", name="Write the report").click()
    line = page.locator(".lines button").first
    line.wait_for()
    line.click()
    page.locator(".lines [aria-pressed=true]").wait_for()
    assert painted(page) > 1000 and page.locator("#legend").is_visible()
    page.locator(".tiles button img").first.wait_for()
    until(page, "document.querySelector('.tiles img').naturalWidth > 0")
    width = "document.querySelector('#scale i').style.width"
    before = page.evaluate(width)
    page.locator(".tiles button").first.click()
    until(page, f"{width} !== {before!r}")
    strong = shade(page)
    page.locator("#strength").fill("0.1")
    assert shade(page) < strong, "less colour, more tissue"
    page.get_by_role("button", name="Evidence", exact=True).click()
    assert painted(page) == 0
    page.get_by_role("button", name="Evidence", exact=True).click()
    line.press("Enter")  # by keyboard, and off again
    assert painted(page) == 0 and page.locator(".tiles").count() == 0
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert line.inner_text().strip() in page.evaluate("navigator.clipboard.readText()")
    for name, suffix in (("Report", ".txt"), ("GeoJSON", ".geojson"), ("Overlay (PNG)", ".png")):
        with page.expect_download() as download:
            page.get_by_role("link", name=name, exact=True).click()
        assert download.value.suggested_filename.endswith(suffix)
        assert download.value.path().stat().st_size > 0


def test_a_question_is_answered(page):
    page.fill("#question", "Which organ? <b>bold</b>")
    page.locator("#question").press("Enter")
    until(page, "document.querySelectorAll('.downloads').length === 2")
    assert page.locator(".card h3", has_text="<b>bold</b>").count() == 1, "text stays text"


def test_what_goes_wrong_is_said(page, tmp_path):
    pick(page, "broken.tiff")
    until(page, "document.getElementById('view-message').textContent.includes('cannot be shown')")
    pick(page, "blank.tiff")
    page.get_by_role("button", name="Write the report").click()
    page.locator(".card.bad").wait_for()
    assert "no tissue" in page.locator(".card.bad").inner_text()
    page.get_by_role("button", name="Try again").click()
    page.locator(".card.bad").wait_for()
    (tmp_path / "a.pdf").write_bytes(b"x")
    (tmp_path / "text.tiff").write_bytes(b"no slide")
    page.set_input_files("#file", tmp_path / "a.pdf")
    page.locator("#uploads .bad").wait_for()
    assert "a.pdf" in page.locator("#uploads .bad").inner_text()
    page.set_input_files("#file", tmp_path / "text.tiff")
    until(page, "document.querySelector('#uploads .bad')?.textContent.includes('this file')")


def test_a_slide_is_added_and_opened(page, tmp_path):
    DrawnSlide(width=600, height=500, num_levels=1, seed=4).write(tmp_path / "added.tiff")
    page.set_input_files("#file", tmp_path / "added.tiff")
    until(page, "document.getElementById('slide-name').textContent === 'added.tiff'")
    assert page.locator(".slide").count() == 4
    assert page.locator(".slide[aria-current=true] b").text_content().startswith("added.tiff")


def test_several_slides_are_added_one_after_another(page, root, tmp_path):
    for number in (1, 2):
        DrawnSlide(width=600, height=500, num_levels=1, seed=number).write(tmp_path / f"many {number}.tiff")
    (tmp_path / "many.pdf").write_bytes(b"x")
    page.set_input_files("#file", [tmp_path / name for name in ("many 1.tiff", "many.pdf", "many 2.tiff")])
    until(page, "document.getElementById('slide-name').textContent === 'many 2.tiff'")
    assert page.locator("#uploads .card").count() == 1 and "many.pdf" in page.locator("#uploads .bad").inner_text()
    page.locator("#uploads").get_by_role("button", name="Close").click()
    for number in (1, 2):
        page.locator(f'.slide[title="many {number}.tiff"]').wait_for()
        (root / f"many {number}.tiff").unlink()
    page.get_by_role("button", name="Look at the folder again").click()
    until(page, "document.querySelector('.slide[title^=many]') === null")
    pick(page, "added.tiff")
    page.get_by_role("button", name="Write the report").wait_for()


def test_a_report_goes_on_while_others_wait_and_the_page_is_left(page, address):
    GATE.clear()
    page.get_by_role("button", name="Write the report").click()
    page.locator(".card progress").wait_for()
    other = page.context.browser.new_context().new_page()
    other.goto(address)
    pick(other, "one.tiff")
    assert other.locator(".card").count() == 0, "another browser has reports of its own"
    other.get_by_role("button", name="Write the report").click()
    until(other, "document.querySelector('.card')?.innerText.includes('1 other before you')")
    page.reload()
    until(page, "document.querySelector('.card .row')?.innerText.includes('Before the gate')")
    assert page.get_by_role("button", name="Write the report").is_hidden(), "not a second time"
    pick(page, "one.tiff")
    until(page, "document.querySelectorAll('.lines').length === 2")  # its report and the answer are still there
    assert "writing" in page.get_by_role("button", name="added.tiff").text_content()
    GATE.set()
    until(page, "document.querySelector('[title=\"added.tiff\"]').textContent.includes('reported')")
    pick(page, "added.tiff")
    page.locator(".lines button").first.wait_for()
    assert page.locator(".lines").count() == 1
    other.locator(".lines button").first.wait_for()
    other.context.close()


def test_a_report_is_given_up(page):
    pick(page, "blank.tiff")
    page.locator("#cards").get_by_role("button", name="Close").click()  # what went wrong with it before
    GATE.clear()
    page.get_by_role("button", name="Write the report").click()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Write the report").wait_for()
    assert page.locator(".card").count() == 0
    GATE.set()


def test_a_model_of_whole_slides_shows_its_report_without_evidence(page, monkeypatch):
    monkeypatch.setattr(ReportWriter, "no_evidence", "This model reads the slide as a whole.")
    pick(page, "one.tiff")
    page.fill("#question", "Which grade?")
    page.get_by_role("button", name="Ask").click()
    until(page, "document.querySelectorAll('.lines').length === 3")
    last = page.locator(".card").last
    assert last.locator(".lines > p").count() > 0 == last.locator(".lines button").count()
    assert last.locator(".downloads a").all_inner_texts() == ["Answer"]


def test_a_slide_that_is_taken_away_is_said(page, root):
    for name in ("gone.tiff", "gone later.tiff"):
        shutil.copy(root / "one.tiff", root / name)
    page.reload()
    page.get_by_role("button", name="gone.tiff").wait_for()
    page.route("**/api/slides", lambda route: route.abort())  # as if it had not been looked at since
    until(page, "!document.getElementById('offline').hidden")  # nor is a look under way
    (root / "gone.tiff").unlink()
    pick(page, "gone.tiff")
    until(page, "document.getElementById('view-message').innerText.includes('no such slide')")
    page.unroute("**/api/slides")
    page.get_by_role("button", name="Look at the folder again").click()
    until(page, "document.querySelector('.slide[title=\"gone.tiff\"]') === null")
    assert page.locator("#offline").is_hidden()
    pick(page, "gone later.tiff")
    until(page, "document.getElementById('view-message').innerText === ''")  # a part of it is shown
    (root / "gone later.tiff").unlink()
    for _ in range(4):
        page.get_by_role("button", name="Zoom in").click()
    until(page, "document.getElementById('view-message').innerText.includes('no such slide')")
    until(page, "document.querySelector('.slide[title=\"gone later.tiff\"]') === null")
    assert page.locator("#slide-warning").inner_text() == "No longer in the folder"


def test_the_list_follows_the_folder(page, root):
    names = page.locator(".slide b").all_text_contents()
    page.locator(".slide").first.focus()
    (root / "below").mkdir()
    shutil.copy(root / "one.tiff", root / "below" / "come later.tiff")
    page.locator('.slide[title="below/come later.tiff"]').wait_for()  # by itself
    assert page.evaluate("document.activeElement.title") == names[0], "who reads the list is not disturbed"
    assert page.locator("#count").inner_text() == str(len(names) + 1)
    (root / "below" / "come later.tiff").unlink()
    page.get_by_role("button", name="Look at the folder again").click()
    until(page, "document.querySelector('.slide[title=\"below/come later.tiff\"]') === null")
    assert page.locator(".slide b").all_text_contents() == names


def test_a_slide_whose_file_is_replaced_is_opened_anew(page, root):
    shutil.copy(root / "one.tiff", root / "changing.tiff")
    look_again = page.get_by_role("button", name="Look at the folder again")
    look_again.click()
    pick(page, "changing.tiff")
    page.get_by_role("button", name="Write the report").click()
    page.locator(".lines button").first.wait_for()
    DrawnSlide(width=600, height=500, num_levels=1, seed=5).write(root / "next.tiff")
    (root / "next.tiff").rename(root / "changing.tiff")
    look_again.click()
    until(page, "document.getElementById('slide-facts').textContent.includes('600 × 500 px')")
    until(page, "document.querySelector('.uncertain')?.innerText.includes('file that was here before')")
    assert "Another file" in page.locator("#slide-warning").inner_text()
    assert page.locator(".lines button").count() == 0, "no evidence of one slide over another"
    page.get_by_role("button", name="Write anew").click()
    page.locator(".lines button").first.wait_for()
    assert page.locator(".uncertain").count() == 0
    (root / "changing.tiff").unlink()
    look_again.click()
    until(page, "document.querySelector('.slide[title=\"changing.tiff\"]') === null")


def test_a_report_survives_a_server_that_does_not_answer_for_a_while(page):
    pick(page, "blank.tiff")
    page.get_by_role("button", name="Write the report").wait_for()
    GATE.clear()
    page.get_by_role("button", name="Write the report").click()
    until(page, "document.querySelector('.card .row')?.innerText.includes('Before the gate')")
    unheard = []

    def leave_unanswered(route) -> None:
        route.abort()
        unheard.append(route.request.method)

    page.route("**/api/**", leave_unanswered)
    until(page, "document.querySelector('.card .row')?.innerText.includes('trying again')")
    page.get_by_role("button", name="Cancel").click()
    deadline = time.monotonic() + 60
    while "DELETE" not in unheard:
        assert time.monotonic() < deadline
        page.wait_for_timeout(30)
    page.unroute("**/api/**")
    until(page, "document.querySelector('.card .row')?.innerText.includes('Before the gate')")
    page.get_by_role("button", name="Cancel").click()  # once more, since nobody heard it
    page.get_by_role("button", name="Write the report").wait_for()
    GATE.set()


def test_the_keyboard_goes_through_the_list_with_one_stop(page):
    def focus_is_on(title: str) -> None:
        until(page, f"document.activeElement.title === {json.dumps(title)}")
        assert page.locator('.slide[tabindex="0"]').count() == 1

    names = page.locator(".slide b").all_text_contents()
    page.locator("#search").focus()
    page.keyboard.press("Tab")
    focus_is_on("blank.tiff")
    for key, name in (("Home", names[0]), ("ArrowDown", names[1]), ("End", names[-1])):
        page.keyboard.press(key)
        focus_is_on(name)
    page.keyboard.press("Tab")
    until(page, "document.activeElement.id === 'file'")
    with page.expect_response("**/api/slides"):
        page.evaluate("dispatchEvent(new Event('focus'))")  # the folder is looked at meanwhile
    page.wait_for_timeout(200)
    page.keyboard.press("Shift+Tab")
    focus_is_on(names[-1])  # back to where one was
    pick(page, "added.tiff")
    page.locator("#scale").wait_for()


def test_small_screens_and_reloads(page):
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out at the side"
    page.get_by_role("button", name="light and dark").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert page.locator(".notice").is_visible()
    page.reload()
    until(page, "document.getElementById('slide-name').textContent === 'added.tiff'")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert page.complaints == []
