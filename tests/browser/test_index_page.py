"""index.html in a real browser: filters, evidence, keyboard, names for screen readers, colours."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benched import DEVICE, bench_cell
from observed import PROVEN, REFUSED, find, make_large, observe, observe_run
from tables import write_tables

from quantmatrix.measure import thumbnails
from quantmatrix.proof import columns
from quantmatrix.proof import store as records
from quantmatrix.proof.record import CheckResult, Evidence
from quantmatrix.proof.scopes import SCOPES
from quantmatrix.report import answers, page_data, ranking, render
from quantmatrix.report.history import Version
from quantmatrix.report.recommend import list_commands, recommend
from quantmatrix.tables import read
from quantmatrix.tables.rows import Matrix

FAILING = "fp8-flux-2@cpu"
ROOT = Path(__file__).parents[2]
FRAMES, HEIGHT, WIDTH = 5, 30, 41
"""Of the clip whose pictures the proven cell shows."""


def make_records(tables: Matrix) -> dict[str, Evidence]:
    noise = torch.Generator().manual_seed(0)
    clip = torch.randint(0, 256, (FRAMES, HEIGHT, WIDTH, 3), generator=noise, dtype=torch.uint8)
    proven = observe_run(tables, find(tables, PROVEN))
    latents = proven.checks["latents"]
    pictures = thumbnails.draw(clip, clip.flip(0))
    latents = replace(latents, metrics={**latents.metrics, "thumbnails": pictures})
    loaded = CheckResult("pass", {"bf16_peak_bytes": 2**30})
    proven = replace(proven, checks={**proven.checks, "load": loaded, "latents": latents})
    proven = records.decode(records.encode(proven))  # a record as it lies on disk
    failing = observe(tables, FAILING, fails="generate", commit="<b>bold</b>")
    return {PROVEN: proven, FAILING: failing, REFUSED: observe(tables, REFUSED)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    tables = read.read(write_tables(folder / "matrix"))
    timed = {PROVEN: bench_cell(tables, PROVEN)}
    before = Version("stand-in", "2026-10-01", "abc", "pass", 40.0, None)
    pages = render.render(tables, make_records(tables), timed, past={PROVEN: [before]})
    (folder / "index.html").write_bytes(pages["index.html"])
    return folder / "index.html"


@pytest.fixture
def page(browser: Any, small: Path) -> Any:
    browser.get("about:blank")
    browser.get(small.as_uri())
    yield browser
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe, severe


def run(page: Any, script: str, *words: Any) -> Any:
    return page.execute_script(script, *words)


def choose(page: Any, **values: str) -> list[str]:
    """Set filters as a reader would; returns the names of the buttons that are left."""
    script = """
      for (const [id, value] of Object.entries(arguments[0])) {
        document.getElementById(id).value = value;
        document.getElementById(id).dispatchEvent(new Event("input", { bubbles: true }));
      }
    """
    run(page, script, values)
    return unfold(page)


def unfold(page: Any) -> list[str]:
    """Open what is folded in the matrix; returns the names of its buttons."""
    script = """
      for (const one of document.querySelectorAll("#body details:not([open])")) {
        one.open = true;
        one.dispatchEvent(new Event("toggle"));
      }
      return [...document.querySelectorAll(".state .spoken")].map(b => b.textContent);
    """
    return list(run(page, script))


def open_cell(page: Any, name: str) -> str:
    number = next(n for n, found in enumerate(unfold(page)) if found.startswith(f"{name}:"))
    button = page.find_elements("css selector", ".state")[number]
    button.click()
    return page.find_element("id", "cell").text


def test_every_cell_is_a_named_button(page: Any) -> None:
    names = choose(page)
    assert set(names) == {
        f"{PROVEN}: proven · stand-in, 47.0 dB",
        f"{REFUSED}: refused · stand-in",
        f"{FAILING}: failing · stand-in",
        "fp8-flux-1@cpu+reference: unproven",
        "fp8-flux-1@h100+reference: unproven",
        "fp8-flux-1@h100+decode: unproven",
        "svdq-flux-1@cpu: planned",
        "svdq-flux-1@b200: planned",
    }
    assert page.find_element("id", "status").text == "8 of 8 cells of 3 of 3 checkpoints"
    assert page.find_element("id", "counts").text.split("\n")[0] == "✓ 1 proven · stand-in"


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({"family": "nunchaku-svdq"}, 3),
        ({"model": "flux-2"}, 1),
        ({"hardware": "h100"}, 3),
        ({"state": "unproven"}, 3),
        ({"scope": "stand-in"}, 3),
        ({"scope": "published"}, 0),
        ({"scope": "stand-in", "state": "proven"}, 1),
        ({"hardware": "h100", "state": "refused"}, 1),
        ({"text": "FLUX2-fp8"}, 1),
        ({"text": "hopper"}, 1),
        ({"text": "svdq flux"}, 3),
        ({"text": "svdq h100"}, 1),
        ({"text": " H100  decode "}, 1),
        ({"text": "nothing"}, 0),
    ],
)
def test_filters(page: Any, values: dict[str, str], count: int) -> None:
    names = choose(page, **values)
    assert len(names) == count
    assert page.find_element("id", "status").text.startswith(f"{count} of 8 cells")
    heads = page.find_elements("css selector", "#head th[scope=col]")
    places = {name.partition("@")[2].partition(":")[0].partition("+")[0] for name in names}
    assert len(heads) == len(places) + 1
    assert page.find_element("id", "empty").is_displayed() == (count == 0)
    way_back = "#all" if count == 0 else "#filters button[type=reset]"
    page.find_element("css selector", way_back).click()
    run(page, "return new Promise(done => setTimeout(done, 50))")
    assert len(choose(page)) == 8


@pytest.fixture(scope="module")
def own() -> Path:
    """The committed page, and what Python would answer: `quantmatrix report --check` holds both to the tables."""
    return ROOT / "reports"


def test_the_report_says_the_scope_in_every_proven_cell(browser: Any, own: Path) -> None:
    """Of the project's own matrix: in the button, its name, and its class."""
    browser.get("about:blank")
    browser.get((own / "index.html").as_uri())
    run(browser, "drawAll()")
    unfold(browser)
    script = """
      return [...document.querySelectorAll("button.state.proven:not(.other)")].map(
        (b) => [b.textContent, b.querySelector(".spoken").textContent, b.className]);
    """
    found = run(browser, script)
    assert found
    for text, name, classes in found:
        [scope] = [scope for scope in SCOPES if f"proven · {scope}" in name]
        assert text.startswith(f"✓ {scope}")
        assert f"scope-{scope.replace(' ', '-')}" in classes


QUESTIONS = [
    ("rtx-4090", "flux-1", "16"),
    ("h200", "wan-2-2", ""),
    ("cpu", "qwen-image", ""),
]


@pytest.mark.parametrize(("hardware", "model", "memory"), QUESTIONS)
def test_three_questions_are_answered_by_three_clicks(
    browser: Any, own: Path, hardware: str, model: str, memory: str
) -> None:
    from selenium.webdriver.support.ui import Select

    browser.get("about:blank")
    browser.get((own / "index.html").as_uri())
    Select(browser.find_element("id", "my-hardware")).select_by_value(hardware)
    Select(browser.find_element("id", "my-model")).select_by_value(model)
    if memory:
        browser.find_element("id", "my-memory").send_keys(memory)
    known = answers.decode((own / "answers.json").read_bytes(), own)
    wanted = recommend(known, read.read(), hardware, model, float(memory) if memory else None)
    fit, best = wanted.usable[0]
    first = browser.find_elements("css selector", "#answer-rows tr")[0].text
    assert best.checkpoint in first
    assert best.relative_l2 is not None
    assert f"{best.relative_l2:.3f}" in first
    assert f"{best.weights_mib / 1024:.1f} GiB" in first
    assert ranking.FITS[fit] in first
    said = [box.text for box in browser.find_elements("css selector", "#best pre")]
    assert said == list(list_commands(fit, best))
    assert best.checkpoint in browser.find_element("id", "answer-status").text


@pytest.mark.parametrize("prefer", ranking.PREFERENCES)
@pytest.mark.parametrize("memory", [0.0, 8.0, 24.0])
def test_the_page_ranks_as_the_command_does(
    browser: Any, own: Path, memory: float, prefer: str
) -> None:
    if not browser.current_url.startswith(own.as_uri()):
        browser.get((own / "index.html").as_uri())
    script = """
      const [memory, prefer] = arguments;
      return DATA.hardware.map(([hardware]) => DATA.models.map(([model]) =>
        rank(hardware, model, memory, prefer).map(([fit, one]) => [fit, one.checkpoint, one.kernel])));
    """
    shown = run(browser, script, memory * 1024, prefer)
    known = answers.decode((own / "answers.json").read_bytes(), own)
    tables = read.read()
    for hardware, by_model in zip(tables.hardware, shown, strict=True):
        for model, found in zip(tables.models, by_model, strict=True):
            place = (hardware, model)
            options = [one for one in known.options if (one.hardware, one.model) == place]
            ranked = ranking.rank(options, memory * 1024, prefer)
            assert found == [[fit, one.checkpoint, one.kernel] for fit, one in ranked], place


def test_a_heading_sorts(page: Any) -> None:
    def names() -> list[str]:
        heads = page.find_elements("css selector", "#body th")
        return [head.text.split("\n")[1] for head in heads]

    before = names()
    assert before == ["flux-1-fp8", "flux-1-svdq", "flux-2-fp8"]
    [button] = page.find_elements("css selector", '#head button[data-column="0"]')  # cpu
    button.click()
    assert names() == ["flux-1-fp8", "flux-2-fp8", "flux-1-svdq"]  # proven, failing, planned
    head = page.find_element("css selector", "#head th[aria-sort=ascending]")
    assert head.text.startswith("cpu")
    page.switch_to.active_element.click()  # the heading that was chosen keeps the focus
    assert names() == ["flux-1-svdq", "flux-2-fp8", "flux-1-fp8"]
    assert page.find_element("css selector", "#head th[aria-sort=descending]").text.startswith(
        "cpu"
    )


@pytest.fixture
def committed(browser: Any, own: Path) -> Any:
    """The committed page as it opens, and no complaint of the browser about it."""
    browser.get("about:blank")
    browser.get((own / "index.html").as_uri())
    yield browser
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe, severe


def list_others(page: Any) -> list[str]:
    """Names of the cells of other programs that are drawn."""
    script = "return [...document.querySelectorAll('.other .spoken')].map(b => b.textContent)"
    return list(run(page, script))


def test_other_programs_are_columns_of_the_matrix(committed: Any) -> None:
    tables, found = read.read(), columns.read_folder(ROOT / "reports" / columns.RUNTIMES)
    heads = [
        head.get_attribute("textContent")
        for head in committed.find_elements("css selector", "#groups th")
    ]
    assert heads == ["quantmatrix", "Other programs"]
    run(committed, "drawAll()")
    drawn = list_others(committed)
    assert {name.partition(":")[0] for name in drawn} >= set(found)  # every run
    spoken = "fp8-qwen-image-comfyui@cpu~diffusers: works · stand-in (undocumented)"
    assert any(name.startswith(spoken) for name in drawn)
    said = {
        one.checkpoint
        for one in tables.runtime_cells
        if tables.find_statements("sglang", one.checkpoint)
    }
    assert {name for name in drawn if name.endswith("~sglang: documented: works")} == {
        f"{checkpoint}~sglang: documented: works" for checkpoint in said
    }


@pytest.mark.parametrize(
    ("values", "program", "ours"),
    [
        ({"program": "quantmatrix"}, None, True),
        ({"program": "diffusers", "state": "wrong numbers"}, "diffusers", False),
        ({"program": "sglang", "hardware": "h200"}, "sglang", False),
        ({"text": "comfyui fp8-flux", "program": "comfyui"}, "comfyui", False),
        ({"hardware": "cpu", "state": "crashes"}, "diffusers", False),
    ],
)
def test_filters_take_other_programs(
    committed: Any, values: dict[str, str], program: str | None, ours: bool
) -> None:
    choose(committed, **values)
    names = list_others(committed)
    assert {name.partition("~")[2].partition(":")[0] for name in names} == (
        {program} if program else set()
    )
    assert bool(committed.find_elements("css selector", ".state:not(.other)")) == ours
    assert not committed.find_element("id", "empty").is_displayed()


def test_a_cell_of_another_program_opens_its_message_command_and_log(committed: Any) -> None:
    tables, found = read.read(), columns.read_folder(ROOT / "reports" / columns.RUNTIMES)
    name = "modelopt-nvfp4-flux-2-file@cpu~diffusers"
    record, [said] = found[name], tables.find_statements("diffusers", name.partition("@")[0])
    choose(committed, text="modelopt-nvfp4-flux-2-file", program="diffusers")
    [button] = committed.find_elements("css selector", ".other")
    assert "documented to work" in button.text
    button.click()
    text = committed.find_element("id", "cell").text
    for words in (record.reason, record.version, said.quote, said.source, record.tried[0]):
        assert words in text
    boxes = [box.text for box in committed.find_elements("css selector", "#cell pre")]
    assert boxes[0] == record.command
    assert boxes[-1] == record.again
    assert boxes[1].split()[-1] == record.log.split()[-1]
    address = committed.current_url
    committed.get("about:blank")
    committed.get(address)
    assert committed.find_element("id", "cell-title").text.startswith(f"{name}: ")


def test_a_column_of_another_program_sorts(committed: Any) -> None:
    [button] = committed.find_elements("css selector", '#head button[data-column="program-0"]')
    run(committed, "arguments[0].click()", button)
    first = committed.find_elements("css selector", "#body tr")[0]
    assert "✓ works" in first.text
    [head] = committed.find_elements("css selector", "#head th[aria-sort=ascending]")
    assert head.get_attribute("textContent").startswith("diffusers")


AXE = """
  const done = arguments[0];
  axe.run(document, { resultTypes: ["violations"] }).then(({ violations }) =>
    done(violations.map(({ id, impact, nodes }) => `${id} (${impact}): ${nodes[0].html}`)));
"""


@pytest.fixture(scope="module")
def axe() -> str:
    """The checker's source; `nox -s browser` fetches it and says where it is."""
    path = os.environ.get("AXE_CORE")
    if path is None:
        pytest.skip(
            "no axe-core: npm install axe-core, then AXE_CORE=node_modules/axe-core/axe.min.js"
        )
    return Path(path).read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(page: Any, axe: str, scheme: str) -> None:
    """Of any weight: as the page opens, with an answer, with nothing found, and with a cell open."""
    page.set_script_timeout(300)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    run(page, axe)
    try:
        assert page.execute_async_script(AXE) == []
        ask(page, "cpu", "flux-1")
        choose(page, text="nothing like it")
        assert page.execute_async_script(AXE) == []
        choose(page, text="")
        open_cell(page, PROVEN)
        assert page.execute_async_script(AXE) == []
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation_in_the_committed_page(
    committed: Any, axe: str, scheme: str
) -> None:
    """Of any weight: as it opens, answered, wholly drawn, and with a cell of ours and of another program open."""
    committed.set_script_timeout(300)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    committed.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    run(committed, axe)
    try:
        ask(committed, "h200", "flux-1")
        assert committed.execute_async_script(AXE) == []
        run(
            committed,
            "openCell(DATA.cells.find((cell) => DATA.scopes[cell[SCOPE]] === 'true size'))",
        )
        assert committed.execute_async_script(AXE) == []
        run(committed, "openOther(DATA.others.find((one) => one[RUN] >= 0 && one[SAID]))")
        assert committed.execute_async_script(AXE) == []
    finally:
        committed.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def ask(page: Any, hardware: str, model: str) -> None:
    """Ask the question as a reader would."""
    choose(page, **{"my-hardware": hardware, "my-model": model})
    assert page.find_element("id", "answer").is_displayed()


def test_a_question_is_in_the_address(page: Any, small: Path) -> None:
    ask(page, "cpu", "flux-1")
    address = page.current_url
    assert "my-hardware=cpu" in address
    page.get("about:blank")
    page.get(address)
    assert "flux-1-fp8" in page.find_element("id", "answer-rows").text
    [button] = page.find_elements("css selector", "#answer-rows button")[:1]
    button.click()
    assert page.find_element("id", "cell-title").text == f"{PROVEN}: proven · stand-in"


def test_nothing_that_runs_says_why(page: Any) -> None:
    choose(page, **{"my-hardware": "b200", "my-model": "flux-2"})
    assert not page.find_element("id", "answer").is_displayed()
    assert "flux-2 on b200: nothing runs" in page.find_element("id", "answer-status").text


def test_a_narrow_screen_scrolls_tables_alone(page: Any) -> None:
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        ask(page, "cpu", "flux-1")
        assert run(page, "return document.documentElement.scrollWidth") <= 390
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_paper_has_tables_and_no_forms(page: Any) -> None:
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert not page.find_element("id", "filters").is_displayed()
        style = "return getComputedStyle(document.getElementById('matrix')).maxHeight"
        assert run(page, style) == "none"
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


SIZE = "return [arguments[0].naturalWidth, arguments[0].naturalHeight]"
COLOURS = """
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [arguments[0].naturalWidth, arguments[0].naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(arguments[0], 0, 0);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
"""


def test_a_cell_opens_its_evidence(page: Any) -> None:
    text = open_cell(page, PROVEN)
    assert f"{PROVEN}: proven · stand-in" in text
    assert "stand-in: random weights at a tiny size" in text
    assert "quantmatrix generate --model-path some/flux-1" in text
    assert "Command that ran" in text
    assert "With the published repository: not yet run" in text
    for words in ("layers.transformer.worst", "psnr_db.at_least", "numerics.W8A8", "0.300 s"):
        assert words in text, words
    assert "torch\n2.13.0+cpu" in text
    assert "bf16_peak_bytes" in text
    assert "1024.0 MiB" in text
    link = page.find_element("link text", "The record as JSON")
    assert link.get_attribute("href").endswith("/evidence/cpu/fp8-flux-1+decode.json")
    curves = page.find_elements("css selector", "figure svg[role=img]")
    assert [curve.get_attribute("aria-label").split(":")[0] for curve in curves] == [
        "PSNR dB per step",
        "relative L2 per step",
    ]
    assert "step 2: 49" in curves[0].get_attribute("aria-label")
    assert "limit 40.5" in curves[0].get_attribute("aria-label")
    assert len(curves[0].find_elements("css selector", "circle")) == 4
    pictures = page.find_elements("css selector", "#cell figure img")
    shown = "frames 1, 3, 5 of 5; random weights at a tiny size"
    names = [
        f"BF16: {shown}",
        f"quantized: {shown}",
        f"difference, amplified 8x (black = identical): {shown}",
    ]
    assert [picture.get_attribute("alt") for picture in pictures] == names
    assert [picture.accessible_name for picture in pictures] == names
    captions = page.find_elements("css selector", "#cell figure:has(img) figcaption")
    assert [caption.text for caption in captions] == names
    sizes = [run(page, SIZE, picture) for picture in pictures]
    assert sizes == [[3 * WIDTH, HEIGHT]] * 3
    colours = [run(page, COLOURS, picture) for picture in pictures]
    assert colours[0] > 50
    assert colours[1] > 50
    assert 1 < colours[2] <= 16


def test_a_cell_shows_since_when_it_is_better(page: Any) -> None:
    text = open_cell(page, PROVEN)
    assert "stand-in: better since 2026-" in text
    [table] = [
        found
        for found in page.find_elements("css selector", "#cell table")
        if found.accessible_name.startswith("Runs that changed")
    ]
    latest, first = (row.text for row in table.find_elements("css selector", "tbody tr"))
    assert "▲ better pass 47.00 –" in latest
    assert first == "2026-10-01 abc stand-in first run pass 40.00 –"


def test_a_cell_shows_speed_and_memory_beside_bf16(page: Any) -> None:
    text = open_cell(page, PROVEN)
    assert f"a tiny stand-in on {DEVICE}" in text
    assert "wall clock" in text
    titles = [
        "Latency of a step compared with BF16",
        "Loading compared with BF16",
        "Memory compared with BF16",
    ]
    pictures = {
        picture.get_attribute("aria-label").partition(":")[0]: picture
        for picture in page.find_elements("css selector", "#cell svg[role=img]")
    }
    assert set(titles) <= set(pictures)
    steps = pictures[titles[0]]
    said = "transformer step, BF16 10.0 ms, transformer step, quantized 8.00 ms"
    assert steps.get_attribute("aria-label").endswith(said)
    widths = [
        float(bar.get_attribute("width")) for bar in steps.find_elements("css selector", "rect")
    ]
    assert widths[1] / widths[0] == pytest.approx(0.8)
    assert "transformer weights, quantized 16.0 MiB" in pictures[titles[2]].get_attribute(
        "aria-label"
    )
    for box in page.find_elements("css selector", "#cell svg[role=img]"):  # nothing overlaps
        names = box.find_elements("css selector", "text")
        bars = box.find_elements("css selector", "rect")
        for name, bar in zip(names[::2], bars, strict=False):
            assert name.rect["x"] + name.rect["width"] <= bar.rect["x"], name.text
    [table] = [
        found
        for found in page.find_elements("css selector", "#cell table")
        if "faster than BF16" in found.accessible_name
    ]
    lines = [row.text for row in table.find_elements("css selector", "tbody tr")]
    assert lines[1].startswith("transformer step 10 8 0.800 0.792 to 0.808 1.4 % faster")
    link = page.find_element("link text", "The benchmark as JSON")
    assert link.get_attribute("href").endswith("/benchmarks/cpu/fp8-flux-1+decode.json")
    page.find_element("id", "close").click()
    open_cell(page, REFUSED)
    assert not page.find_elements("css selector", "#cell svg")


def test_a_command_can_be_copied(page: Any) -> None:
    open_cell(page, PROVEN)
    button = page.find_element("css selector", "#cell .copy")
    button.click()
    run(page, "return new Promise(done => setTimeout(done, 200))")
    assert button.text in ("Copied", "Selected: press Ctrl+C")
    shown = page.find_element("css selector", "#cell pre").text
    assert run(page, "return getSelection().toString()") == shown


def test_failures_refusals_and_gaps_say_why(page: Any) -> None:
    text = open_cell(page, FAILING)
    assert "generate: too far" in text
    assert "<b>bold</b>" in text  # words of a record stay words
    page.find_element("id", "close").click()
    assert "no integer units; use cpu" in open_cell(page, REFUSED)
    page.find_element("id", "close").click()
    text = open_cell(page, "svdq-flux-1@b200")
    assert "no kernel yet" in text
    assert "There is no evidence yet." in text
    assert not page.find_elements("css selector", "#cell svg")


def test_keyboard_alone_is_enough(page: Any) -> None:
    name = f"{PROVEN}: proven · stand-in, 47.0 dB"
    keys = __import__("selenium.webdriver", fromlist=["Keys"]).Keys
    seen = []
    for _ in range(40):
        page.switch_to.active_element.send_keys(keys.TAB)
        active = page.switch_to.active_element
        seen.append(active.get_attribute("id") or active.get_attribute("class"))
        if active.get_attribute("textContent").endswith(name):
            break
    fields = ["my-hardware", "my-model", "my-memory", "my-prefer"]
    fields += ["text", "family", "model", "hardware", "state"]  # no program: nobody ran another one
    assert [name for name in seen if name in fields] == fields
    page.switch_to.active_element.send_keys(keys.ENTER)
    dialog = page.find_element("id", "cell")
    assert dialog.get_attribute("open") is not None
    assert run(page, "return arguments[0].contains(document.activeElement)", dialog)
    page.switch_to.active_element.send_keys(keys.ESCAPE)
    assert dialog.get_attribute("open") is None
    assert page.switch_to.active_element.get_attribute("textContent").endswith(name)


def test_the_accessibility_tree_has_table_and_dialog(page: Any) -> None:
    table = page.find_element("css selector", "#matrix table")
    assert table.aria_role == "table"
    assert table.accessible_name.startswith("Checkpoints by hardware")
    roles = {head.aria_role for head in table.find_elements("css selector", "tbody th")}
    assert roles == {"rowheader"}
    heads = table.find_elements("css selector", "thead th")
    assert {head.aria_role for head in heads} == {"columnheader"}
    for field in page.find_elements("css selector", ".fields select, .fields input"):
        assert field.accessible_name or not field.is_displayed()
    open_cell(page, PROVEN)
    dialog = page.find_element("id", "cell")
    assert (dialog.aria_role, dialog.accessible_name) == (
        "dialog",
        f"{PROVEN}: proven · stand-in",
    )
    assert page.find_element("id", "status").get_attribute("aria-live") == "polite"


def test_an_address_opens_what_it_names(page: Any, small: Path) -> None:
    open_cell(page, PROVEN)
    address = page.current_url
    assert "cell=fp8-flux-1%40cpu%2Bdecode" in address
    page.get("about:blank")
    page.get(address)
    assert page.find_element("id", "cell-title").text == f"{PROVEN}: proven · stand-in"
    page.get("about:blank")
    page.get(f"{small.as_uri()}#state=failing")
    assert choose(page) == [f"{FAILING}: failing · stand-in"]


CONTRAST = """
  const luminance = (colour) => {
    const parts = colour.match(/[0-9.]+/g).slice(0, 3).map(v => {
      const s = v / 255;
      return s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const page = luminance(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll("button, th, small, caption, p, a, li")].map(element => {
    const [low, high] = [page, luminance(getComputedStyle(element).color)].sort((a, b) => a - b);
    return [(high + 0.05) / (low + 0.05), element.className || element.tagName];
  });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(page: Any, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        background = run(page, "return getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
        assert min(run(page, CONTRAST))[0] >= 4.5
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_pictures_without_room_are_told_of(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_data, "PICTURE_BYTES", 0)
    tables = read.read(write_tables(tmp_path / "matrix"))
    (tmp_path / "index.html").write_bytes(render.render(tables, make_records(tables))["index.html"])
    browser.get((tmp_path / "index.html").as_uri())
    text = open_cell(browser, PROVEN)
    assert "Its pictures are in the record" in text
    assert not browser.find_elements("css selector", "#cell img")


def test_the_committed_page_opens(browser: Any) -> None:
    browser.get((Path(__file__).parents[2] / "reports" / "index.html").as_uri())
    names = "return DATA.cells.map(nameOf)"
    assert run(browser, names) == [cell.id for cell in read.read().cells]


def test_ten_thousand_cells_stay_usable(
    browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("large")
    tables, evidence = make_large(folder / "matrix")
    page = folder / "index.html"
    page.write_bytes(render.render(tables, evidence)["index.html"])
    browser.get(page.as_uri())
    loaded = run(browser, "return performance.getEntriesByType('navigation')[0].duration")
    assert loaded < 5000
    assert browser.find_element("id", "status").text.startswith("10002 of 10002 cells")
    assert len(browser.find_elements("css selector", ".state")) < 1000
    timed = """
      const start = performance.now();
      document.getElementById(arguments[0]).value = arguments[1];
      document.getElementById(arguments[0]).dispatchEvent(new Event("input", { bubbles: true }));
      document.body.getBoundingClientRect();
      return performance.now() - start;
    """
    for name, value in (
        ("hardware", "h100"),
        ("text", "row-01 fp8"),
        ("state", "proven"),
        ("text", ""),
    ):
        times = sorted(run(browser, timed, name, value) for _ in range(5))
        assert times[2] < 100, (name, value, times)
    before = len(browser.find_elements("css selector", "#body tr"))
    run(browser, "document.getElementById('matrix').scrollTop = 1e9")
    run(browser, "return new Promise(done => setTimeout(done, 200))")
    assert len(browser.find_elements("css selector", "#body tr")) > before
