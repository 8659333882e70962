"""report.html, as a reader meets it: opened from disk in headless Chromium."""

import copy
import io
import json
import shutil

import numpy as np
import pytest
from example_report import FPS, FRAMES, HOSTILE, example, write_videos
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ditcache.report.page import TEMPLATE, embedded, write_page

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
IN_STEP = """pair => {
  const [a, b] = pair.querySelectorAll('video');
  return !a.paused && !b.paused && !a.seeking && !b.seeking && !a.ended && !b.ended;
}"""


@pytest.fixture(scope="module")
def chromium():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"needs one of {', '.join(BROWSERS)}")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A folder with videos, and the dictionary of its page."""
    folder = tmp_path_factory.mktemp("report")
    return folder, example(write_videos(folder))


@pytest.fixture
def visit(chromium, report):
    """Open the page in a fresh window; afterwards nothing may have gone wrong or been fetched."""
    pages, complaints, requests = [], [], []

    def visit(data=None, width=1280, height=900, **options):
        folder, original = report
        write_page(folder, original if data is None else data)
        page = chromium.new_page(viewport={"width": width, "height": height}, **options)
        page.set_default_timeout(30_000)
        pages.append(page)
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((folder / "report.html").as_uri())
        return page

    yield visit
    for page in pages:
        page.close()
    assert not complaints
    assert requests and all(url.startswith("file://") for url in requests), requests


def pair(page, order):
    """The pair at this place, scrolled to where it loads."""
    found = page.locator(".pair").nth(order)
    found.scroll_into_view_if_needed()
    found.evaluate("pair => pair.querySelector('.stage').scrollIntoView({block: 'center'})")
    return found


def still(page, order, frame):
    """Pixels [H, W, 3] of a pair's difference, paused at one frame."""
    found = pair(page, order)
    ready = "pair => [...pair.querySelectorAll('video')].every(video => video.readyState >= 2)"
    wait(page, found, ready)
    found.locator("input[type=range]").fill(str(frame))
    shown = f"""pair => [...pair.querySelectorAll('video')].every(
        video => video.paused && !video.seeking && video.shown === {frame})"""
    wait(page, found, shown)
    page.wait_for_timeout(200)
    image = Image.open(io.BytesIO(found.locator("canvas").screenshot())).convert("RGB")
    return np.asarray(image)[4:-4, 4:-4].astype(int)  # the corners are round


def wait(page, locator, condition):
    page.wait_for_function(condition, arg=locator.element_handle())


def test_every_video_plays_in_sync(visit):
    page = visit()
    for order in range(page.locator(".pair").count()):
        found = pair(page, order)
        wait(page, found, IN_STEP)
        apart = found.evaluate(
            """async (pair, inStep) => {
              const [a, b] = pair.querySelectorAll('video'), playing = eval(inStep), found = [];
              for (let i = 0; i < 300 && found.length < 40; i++) {
                await new Promise(requestAnimationFrame);
                if (playing(pair)) found.push([a.currentTime, b.currentTime]);
              }
              return found;
            }""".replace("eval(inStep)", IN_STEP)
        )
        a, b = np.array(apart).T
        assert len(a) == 40
        assert np.ptp(a) > 0.2 and np.ptp(b) > 0.2, "time advances"
        within = np.mean(np.abs(a - b) < 1 / FPS)
        assert within > 0.9, f"{within:.0%} of samples within a frame"
        assert found.locator("video").evaluate_all("all => all.every(video => video.muted)")


def test_videos_loop_and_the_cursor_follows(visit):
    page = visit()
    found = pair(page, 0)
    wait(page, found, IN_STEP)
    frames = found.evaluate(
        """async pair => {
          const slider = pair.querySelector('input'), cursor = pair.querySelector('.cursor');
          const seen = [], end = performance.now() + 3500;
          while (performance.now() < end) {
            await new Promise(requestAnimationFrame);
            seen.push([Number(slider.value), parseFloat(cursor.getAttribute('d').slice(1))]);
          }
          return seen;
        }"""
    )
    values, x = np.array(frames).T
    assert (np.diff(values) < 0).sum() >= 2, "came round at least twice"
    assert len(np.unique(values)) > FRAMES // 2
    assert np.corrcoef(values, x)[0, 1] > 0.999


def test_difference_is_drawn_and_black_where_identical(visit):
    page = visit()
    assert still(page, 0, 12).std() > 5
    assert still(page, 3, 12).max() == 0
    louder = still(page, 1, 9).mean()
    page.locator("#gain").fill("0")
    assert page.locator(".gain").first.text_content() == "1"
    assert 0 < still(page, 1, 9).mean() < louder / 3


def test_videos_far_below_are_not_loaded(visit, report):
    _, data = report
    many = {**data, "videos": data["videos"] * 10}
    page = visit(many)
    wait(page, pair(page, 0), IN_STEP)
    loaded = "[...document.querySelectorAll('video')].filter(v => v.hasAttribute('src')).length"
    assert 2 <= page.evaluate(loaded) <= 10
    page.evaluate("document.querySelector('#all').scrollIntoView()")
    page.wait_for_function("() => !document.querySelector('.pair video').hasAttribute('src')")
    assert page.evaluate(loaded) <= 10


def test_pairs_come_worst_first_and_text_is_only_text(visit):
    page = visit()
    prompts = page.locator(".prompt").all_text_contents()
    assert [text[0] for text in prompts] == ["1", "2", "3", "4"]
    assert "large blue disc" in prompts[0] and "two yellow rings" in prompts[3]
    assert HOSTILE in prompts[1]
    assert page.locator(".prompt b, #raw td b, main img, main script").count() == 0


def test_what_has_no_number_says_so(visit, report):
    page = visit()
    floor = page.locator("#summary-table tr.is-noise_floor").text_content()
    assert "identical" in floor and "NaN" not in floor
    assert "–" in page.locator("#summary-table tr.is-a").text_content()
    assert "PSNR identical" in page.locator(".pair").nth(3).text_content()
    assert "LPIPS" not in page.locator("#summary-table").text_content()

    bare = nothing_measured(copy.deepcopy(report[1]))
    page = visit(bare)
    text = page.locator("main").inner_text()
    assert not any(word in text for word in ("NaN", "null dB", "undefined", "Infinity"))
    assert "None: A and B are the same configuration." in text
    assert page.locator("#gate").count() == 0


def nothing_measured(report):
    """The report with every number that may be null set to null."""
    report.update(difference=[], gate=None, notes=[], points=[])
    for row in report["rows"]:
        row.update(dict.fromkeys(["compute_ratio", "bound", "reached", "speedup", "memory_bytes"]))
        row.update(dict.fromkeys(["psnr", "ssim", "temporal", "flicker", "latent", "state_bytes"]))
        row["seconds"] = dict.fromkeys(row["seconds"])
    for video in report["videos"]:
        video.update(dict.fromkeys(["psnr", "ssim", "worst_frame", "temporal", "latent"]))
        video.update(speedup=None, identical=False, psnr_per_frame=[], strips={})
    return report


def test_summary_has_every_run_and_the_verdict(visit):
    page = visit()
    head = page.locator("#summary-table thead").text_content()
    assert head.index("Speed-up") < head.index("Compute ratio") < head.index("Peak memory")
    assert page.locator("#summary-table tbody tr").count() == 4
    candidate = page.locator("#summary-table tr.is-b").text_content()
    for figure in ("taylorseer", "2.23×", "2.11–2.29", "2.40×", "29.84", "worst 24.37"):
        assert figure in candidate
    assert page.locator("#summary-table [aria-label='lower is better']").count() == 4
    assert "Gate failed" in page.locator("#gate").text_content()
    assert "psnr: at least 30, got 29.84" in page.locator("#gate").text_content()


def test_sorting_by_every_column(visit):
    page = visit()
    heads = page.locator("#raw th")
    for index in range(heads.count()):
        head = heads.nth(index)
        was = head.get_attribute("aria-sort")
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == ("descending" if was else "ascending")
        assert page.locator("#raw th[aria-sort]").count() == 1

    def column(name):
        index = heads.all_text_contents().index(name)
        return page.locator(f"#raw tbody td:nth-child({index + 1})").all_text_contents()

    page.get_by_role("button", name="Seed").click()
    assert column("Seed") == ["0", "1", "2", "3"]
    page.get_by_role("button", name="Seed").click()
    assert column("Seed") == ["3", "2", "1", "0"]
    page.locator("#raw").get_by_role("button", name="PSNR").click()
    *finite, last = column("PSNR, dB")
    assert last == "identical" and finite == sorted(finite, key=float)
    page.locator("#raw").get_by_role("button", name="PSNR").click()
    assert column("PSNR, dB") == ["identical", *finite[::-1]]


def test_keyboard_plays_pauses_and_steps(visit):
    page = visit()
    first = pair(page, 0)
    wait(page, first, IN_STEP)
    paused = "pair => [...pair.querySelectorAll('video')].every(video => video.paused)"
    page.keyboard.press("Space")
    wait(page, first, paused)
    page.keyboard.press("Space")
    wait(page, first, IN_STEP)
    first.focus()
    page.keyboard.press("Space")
    wait(page, first, paused)
    assert first.get_by_role("button").text_content() == "Play"
    assert page.locator(".pair").nth(1).get_by_role("button").text_content() == "Pause"
    slider = first.locator("input[type=range]")
    before = int(slider.input_value())
    for key, frame in (
        ("ArrowRight", before + 1),
        ("ArrowLeft", before),
        ("ArrowLeft", before - 1),
    ):
        page.keyboard.press(key)
        expected = frame % FRAMES
        wait(
            page,
            first,
            f"pair => [...pair.querySelectorAll('video')].every(v => v.shown === {expected})",
        )
        assert int(slider.input_value()) == expected
    first.get_by_role("button").click()
    wait(page, first, IN_STEP)
    page.locator("#play-all").click()
    wait(page, first, paused)


def test_points_have_tooltips_for_pointer_and_keyboard(visit):
    page = visit()
    tip = page.locator("#tip")
    assert tip.is_hidden()
    page.locator(".point.k-b").hover()
    assert "taylorseer" in tip.text_content() and "PSNR 29.84 dB" in tip.text_content()
    page.mouse.move(5, 5)
    assert tip.is_hidden()
    page.locator(".point.k-noise_floor").focus()
    assert tip.is_visible() and "PSNR identical" in tip.text_content()
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    shapes = page.locator(".point .mark").evaluate_all("all => all.map(mark => mark.tagName)")
    assert {"circle", "rect", "polygon"} <= set(shapes)
    page.get_by_role("button", name="SSIM", exact=True).click()
    assert page.locator(".point").count() == 7
    assert "SSIM" in page.locator("#pareto-plot svg").get_attribute("aria-label")


def test_light_and_dark(visit):
    page = visit(color_scheme="light")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark != light
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light
    page = visit(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark


def test_the_command_is_copied(visit, report):
    page = visit()
    page.locator("#copy").click()
    page.wait_for_function("() => document.querySelector('#copy').textContent === 'Copied'")
    assert page.locator("#command").text_content() == report[1]["command"]


def test_nothing_moves_by_itself_under_reduced_motion(visit):
    page = visit(reduced_motion="reduce")
    first = pair(page, 0)
    wait(page, first, "pair => pair.querySelector('video').readyState >= 2")
    page.wait_for_timeout(500)
    assert first.locator("video").evaluate_all("all => all.every(v => v.currentTime === 0)")
    assert first.get_by_role("button").text_content() == "Play"


@pytest.mark.parametrize("width", [390, 1280])
def test_no_sideways_scroll(visit, report, width):
    data = {**report[1], "title": "x" * 300, "command": "y" * 400}
    page = visit(data, width=width, height=844)
    pair(page, 0)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".scroll").first.evaluate("e => getComputedStyle(e).overflowX") == "auto"


@given(st.text() | st.sampled_from([HOSTILE, "</SCRIPT>", "<!--<script>", "\u2029", "\ud800"]))
def test_embedded_json_cannot_leave_its_element(text):
    found = embedded({"prompt": text})
    assert found.isascii() and "<" not in found and ">" not in found and "&" not in found
    assert json.loads(found) == {"prompt": text}


def test_page_is_one_file_without_addresses(tmp_path):
    write_page(tmp_path, example())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    text = TEMPLATE.read_text().replace("http://www.w3.org/2000/svg", "")
    assert "http" not in text.replace("http-equiv", "") and "@import" not in text


def test_infinity_becomes_null(tmp_path):
    assert json.loads(embedded({"psnr": float("inf")})) == {"psnr": None}
