# SPDX-License-Identifier: Apache-2.0
"""The built site in Chromium, with every other host out of reach."""

import functools
import http.server
import shutil
import threading

import pytest

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PHONE = {"width": 390, "height": 844}
CONTRAST = """
([selector]) => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const element = document.querySelector(selector);
  let behind = element;
  while (parse(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const [a, b] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]
    .map(text => light(parse(text))).sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}
"""
# Elements of the text that reach beyond the window, other than inside a box that scrolls.
CUT_OFF = """
() => [...document.querySelectorAll('article *')].filter(element => {
  if (element.getBoundingClientRect().right <= innerWidth + 1) return false;
  if (element.closest('mjx-assistive-mml, .visually-hidden')) return false;
  for (let box = element.parentElement; box.tagName !== 'ARTICLE'; box = box.parentElement)
    if (getComputedStyle(box).overflowX !== 'visible') return false;
  return true;
}).map(element => element.outerHTML.slice(0, 120))
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="session")
def serve():
    """Serve folders on localhost; give a function from a folder to its address."""
    servers = []

    def start(folder):
        handler = functools.partial(Quiet, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def browser():
    """Chromium, installed on the machine or by playwright."""
    installed = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright_api.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=installed, args=FLAGS)
        except playwright_api.Error as error:
            pytest.skip(f"no Chromium on this machine: {error.message.splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A new page that notes what it asked for and what went wrong."""
    context = browser.new_context(viewport=PHONE)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab = context.new_page()
    tab.requests, tab.problems = [], []
    tab.on("request", lambda request: tab.requests.append(request.url))
    tab.on("pageerror", lambda error: tab.problems.append(f"error: {error}"))

    def note_message(message):
        if message.type in ("error", "warning"):
            tab.problems.append(f"{tab.url}: {message.text} {message.location.get('url')}")

    tab.on("console", note_message)
    yield tab
    context.close()


def elsewhere(requests, address):
    """List the requests that went to another host."""
    return [url for url in requests if not url.startswith((address, "data:", "blob:"))]


def count_equations(page):
    """Count the page's formulas, all of which were typeset when the site was built."""
    count = page.locator("article .math").count()
    assert page.locator("article .math > mjx-container annotation").count() == count
    assert page.locator("mjx-merror").count() == 0
    return count


def test_every_page_of_the_site(page, serve, project_html):
    address = serve(project_html)
    names = [path.relative_to(project_html).as_posix() for path in project_html.rglob("*.html")]
    drawn = 0
    for name in sorted(name for name in names if not name.startswith("_static/")):
        page.goto(f"{address}/{name}")
        drawn += count_equations(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], name
        assert page.evaluate(CUT_OFF) == [], name
        assert page.evaluate("document.querySelectorAll('img:not([alt])').length") == 0, name
    assert drawn > 0
    assert elsewhere(page.requests, address) == []
    assert page.problems == []


def test_root_and_search(page, serve, project_html):
    address = serve(project_html)
    page.goto(f"{address}/")
    title = page.locator("h1").inner_text()
    assert "NeMo RL" in title
    page.goto(f"{address}/search.html?q=DPO")
    results = page.locator("article .section-hits li a, .bd-search-container .section-hits li a")
    results.first.wait_for()
    links = [results.nth(i).get_attribute("href") for i in range(results.count())]
    assert any("custom-dpo.html" in link for link in links), links
    page.goto(f"{address}/{links[0].split('?')[0]}")
    assert page.locator("article h1").count() == 1
    assert elsewhere(page.requests, address) == []


def test_light_and_dark(browser, serve, built):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page = context.new_page()
    page.goto(f"{serve(built.site.html)}/deep/down/losses.html")
    backgrounds = set()
    for scheme in ("light", "dark"):
        page.locator("button.dropdown-toggle:has(.theme-switch)").first.click()
        page.locator(f"button.theme-change-button[data-mode={scheme}]").first.click()
        assert page.locator("html").get_attribute("data-theme") == scheme
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for selector in (
            "article > section > p",
            ".cell_input .highlight pre",
            ".cell_output .highlight pre",
            ".notebook-links a",
            ".embedded-from a",
            ".cell_output .text_html td",
            "button.copy-text",
            ".listing-copy span",
        ):
            assert page.evaluate(CONTRAST, [selector]) >= 4.5, (scheme, selector)
    assert len(backgrounds) == 2
    context.close()


def test_wide_things_scroll_in_their_box(page, serve, built):
    page.goto(f"{serve(built.site.html)}/wide.html")
    assert count_equations(page) == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.evaluate(CUT_OFF) == []
    scrolling = page.evaluate("""
        [...document.querySelectorAll('article *')].filter(e =>
            e.scrollWidth > e.clientWidth + 1 &&
            ['auto', 'scroll'].includes(getComputedStyle(e).overflowX)).length
    """)
    assert scrolling >= 5  # a code cell, its text, its table, the page's table, the equation


@pytest.mark.parametrize(
    ("block", "copied"), [(0, "make html\nmake test"), (1, 'print("x")\nfor i in y:\n    pass')]
)
def test_copy_buttons_leave_out_prompts(page, serve, built, block, copied):
    page.goto(f"{serve(built.site.html)}/prompts.html")
    page.locator("button.copybtn").nth(block).click(force=True)
    page.wait_for_selector("button.copybtn.success")
    assert page.evaluate("navigator.clipboard.readText()").strip() == copied


def test_a_listing_is_copied_with_what_it_needs_by_the_keyboard(page, serve, built):
    """Without a network: the text is in the page."""
    page.goto(f"{serve(built.site.html)}/deep/down/losses.html")
    page.wait_for_load_state("networkidle")
    page.context.set_offline(True)
    button = page.locator("button.copy-text")
    assert button.count() == 1  # the others run alone
    button.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.copy-done').textContent === 'copied'")
    assert page.evaluate("navigator.clipboard.readText()") == (
        "from nemo_rl_ref.number import NUMBER\n\nstored = NUMBER\n"
    )
    assert page.problems == []


@pytest.mark.parametrize("served", [True, False], ids=["from a server", "from a folder"])
def test_search_from_the_keyboard(page, serve, project_html, served):
    address = serve(project_html) if served else project_html.as_uri()
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto(f"{address}/get-started.html")
    assert not [url for url in page.requests if "search" in url and url.endswith("sections.js")]
    page.keyboard.press("Control+k")
    page.keyboard.type("reward hacking")
    hits = page.locator("dialog .section-hits li a")
    hits.first.wait_for()
    assert "gamed" in hits.first.inner_text()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url("**/custom-grpo.html#a-reward-that-is-gamed")
    assert page.problems == []


def test_a_term_shows_its_definition_from_the_keyboard(page, serve, project_html):
    """A title alone is shown to a pointer only."""
    page.goto(f"{serve(project_html)}/advanced/algorithm-development/custom-dpo.html")
    term = page.locator("article a.term").first
    shown = "e => getComputedStyle(e, '::after').content"
    assert term.evaluate(shown) == "none"
    term.focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert term.evaluate("e => e === document.activeElement")
    assert term.get_attribute("title") in term.evaluate(shown)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_an_equation_is_moved_from_the_keyboard(page, serve, project_html):
    address = serve(project_html)
    page.goto(f"{address}/advanced/algorithm-development/mathematical-foundations/preferences.html")
    box = page.locator("details.equation-play").first
    box.locator("summary").click()
    shown = box.locator(".equation-curve output")
    before = shown.inner_text()
    slider = box.locator("input[type=range]").first
    slider.focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert shown.inner_text() != before
    assert before.split()[0] not in ("NaN", "Infinity", "")
    assert box.locator("svg[role=img] title").text_content().count(" at ") >= 1
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.problems == []


def test_formulas_without_a_script_and_for_screen_readers(browser, serve, built):
    context = browser.new_context(viewport=PHONE, java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{serve(built.site.html)}/wide.html")
    drawn = page.locator("div.math mjx-math")
    assert drawn.get_attribute("aria-hidden") == "true"
    assert drawn.bounding_box()["height"] > 20
    assert page.locator("div.math math mfrac").count() == 1
    assert page.locator("div.math .eqno").is_visible()
    context.close()


def test_a_copied_formula_is_its_source(page, serve, built):
    page.goto(f"{serve(built.site.html)}/index.html")
    page.locator("article .math").first.wait_for()
    page.keyboard.press("Control+a")
    page.keyboard.press("Control+c")
    assert "$x^2$" in page.evaluate("navigator.clipboard.readText()")


def test_icons_are_drawn_without_a_font(page, serve, built):
    address = serve(built.site.html)
    page.goto(f"{address}/deep/down/losses.html")
    icon = page.locator("button.primary-toggle .fa-bars")
    assert icon.bounding_box()["width"] >= 14
    assert icon.evaluate("e => getComputedStyle(e).maskImage").startswith('url("data:image/svg')
    assert not [url for url in page.requests if "fontawesome" in url]


# How far the page moved by itself while it was loaded; 0.1 and less is good, above 0.25 is poor.
SHIFT = """
new Promise(resolve => {
  let sum = 0;
  new PerformanceObserver(list => {
    for (const entry of list.getEntries()) if (!entry.hadRecentInput) sum += entry.value;
  }).observe({type: 'layout-shift', buffered: true});
  setTimeout(() => resolve(sum), 500);
})
"""
THEORY = "advanced/algorithm-development/mathematical-foundations"


def test_pages_do_not_move_while_they_load(browser, serve, project_html):
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    address = serve(project_html)
    for name in (
        f"{THEORY}/ppo",
        f"{THEORY}/policy-gradient",
        f"{THEORY}/kl-and-distillation",
        "core-design/design-principles/loss-functions",
        "reference/api/tuning",
    ):
        page.goto(f"{address}/{name}.html")
        assert page.evaluate(SHIFT) <= 0.05, name
    context.close()
