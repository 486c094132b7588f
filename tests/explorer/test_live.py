"""The live companion in a page: it runs on the reader's text, shows what the model says, and survives what goes wrong."""

import functools
import re

import pytest
import torch

import attnlab
from attnlab import companion
from attnlab.errors import ConfigError, InputError
from attnlab.explorer import LiveExplorer, base, live
from attnlab.loading import LanguageModel
from attnlab.tokenizer import load_tokenizer

TEXT = "def add(a, b):\n    return a"
STILL = "figure > img"
HOSTILE = "<img src=x onerror=window.hacked=1></script><script>window.hacked=1</script>"
quantized = functools.cache(live.quantized)  # read only


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(companion.folder())


def start(page) -> None:
    """Press the button and wait for the first maps."""
    page.get_by_role("button", name=re.compile("^Run the")).click()
    settle(page)


def settle(page) -> None:
    """Until it has done what was asked, maps and all."""
    page.wait_for_selector("[data-explorer][data-working=false]")


def write(page, text: str) -> None:
    """What the reader types or pastes, read to the end."""
    page.get_by_label("Text", exact=True).evaluate(
        """(box, text) => {
          box.select();
          const clipboardData = new DataTransfer();
          clipboardData.setData("text/plain", text);
          if (!box.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }))) return;
          box.value = text; // the page left it to the browser
          box.dispatchEvent(new Event("input", { bubbles: true }));
        }""",
        text,
    )
    settle(page)


def choose(page, name: str) -> None:
    page.get_by_role("button", name=re.compile(f"^{name}:")).click()
    settle(page)


def candidates(page) -> list[tuple[str, str]]:
    rows = page.locator(".live-candidate").all()
    return [(row.locator(".live-piece").text_content(), row.locator(".live-share").inner_text()) for row in rows]


def expected_candidates(name: str, tokenizer, ids: list[int]) -> list[tuple[str, float]]:
    with torch.inference_mode():
        odds = quantized(name)(torch.tensor([ids]))[0, -1].softmax(-1).topk(10)
    return [(tokenizer.piece(id), value) for id, value in zip(odds.indices.tolist(), odds.values.tolist(), strict=True)]


def check_candidates(page, name: str, tokenizer, ids: list[int]) -> None:
    for (piece, share), (right, value) in zip(candidates(page), expected_candidates(name, tokenizer, ids), strict=True):
        assert piece == right
        assert share == "<0.1 %" or float(share.removesuffix(" %")) == pytest.approx(100 * value, abs=0.11)


# ---- in Python


def test_what_cannot_be_run_is_refused():
    for text in ("", None, 3):
        with pytest.raises(InputError, match="expected some text"):
            LiveExplorer(text)
    with pytest.raises(ConfigError, match=r"got \['mistral'\]"):
        LiveExplorer(models=("companion", "mistral"))
    with pytest.raises(ConfigError, match="got none"):
        LiveExplorer(models=())


def test_a_cell_holds_no_weights_and_names_the_files_that_do():
    made = LiveExplorer()
    shown = made.figure_html()
    assert len(shown) < 100_000
    assert [one["name"] for one in made.data["models"]] == ["companion", "multi-head", "grouped-query", "multi-query"]
    named = {file["file"]: file["length"] for one in made.data["models"] for file in one["files"]}
    assert named == {name: len(text) for name, text in made.files().items()}
    assert all(f'"{name}"' in shown for name in named)


def test_the_notebooks_kernel_hands_over_a_file_and_no_other(monkeypatch):
    made, sent = LiveExplorer(models=("multi-query",)), []
    monkeypatch.setattr(type(made), "send", lambda self, content: sent.append(content))
    name, text = next(iter(live.files("multi-query").items()))
    for message in ({"file": name}, {"file": "../secret"}, {}, {"file": next(iter(live.files("companion")))}):
        made._handle_custom_msg(message, [])
    assert sent == [{"file": name, "text": text}]


# ---- before it runs


@pytest.mark.browser
def test_nothing_runs_before_the_button_says_how_much_it_loads_and_is_pressed(opened):
    page = opened(LiveExplorer(TEXT, ("companion",)))
    size = sum(map(len, live.files("companion").values())) / 1e6
    assert page.page.get_by_role("button", name=f"Run the companion here ({size:.1f} MB)").is_visible()
    assert page.page.is_visible(STILL)
    assert page.page.workers == []
    start(page.page)
    assert not page.page.is_visible(STILL)
    assert len(page.page.workers) == 1
    assert page.strangers() == [] and page.complaints == []


@pytest.mark.browser
@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        ("<script>delete globalThis.Worker</script>", "This browser starts no workers"),
        (
            '<meta http-equiv="Content-Security-Policy" content="worker-src \'none\'">',
            "its worker could not be started",
        ),
    ],
)
def test_without_a_worker_a_sentence_says_so_and_the_picture_stays(opened, head, sentence):
    page = opened(LiveExplorer(TEXT, ("companion",)), change=lambda text: text.replace("<head>", "<head>" + head)).page
    if (button := page.get_by_role("button")).count():
        button.click()
    page.get_by_text(sentence).wait_for()
    assert page.is_visible(STILL)


@pytest.mark.browser
def test_a_download_that_breaks_off_is_taken_up_where_it_stopped(opened):
    name, text = list(live.files("companion").items())[3]

    def lose(page: str) -> str:
        whole = base.data_script(name, text)
        assert whole in page
        return page.replace(whole, whole.replace(text, text[: len(text) // 2]))

    page = opened(LiveExplorer(TEXT, ("companion",)), change=lose).page
    run = page.get_by_role("button", name=re.compile("^Run the"))
    for _ in range(2):
        run.click()
        page.get_by_role("alert").filter(has_text="broke off after 1.6 MB").wait_for()
        assert page.is_visible(STILL)
    page.evaluate(
        """([name, text]) => {
          const { file } = attnlabExplorers;
          globalThis.asked = [];
          attnlabExplorers.file = (what) => (asked.push(what.file), file(what));
          attnlabExplorers.data(name, text);
        }""",
        [name, text],
    )
    start(page)
    assert page.evaluate("asked") == list(live.files("companion"))[3:]  # the first three were kept
    assert page.get_by_role("alert").filter(has_text="broke").count() == 0


@pytest.mark.browser
def test_without_javascript_and_on_paper_the_picture_shows(opened):
    page = opened(LiveExplorer(TEXT, ("companion",)), wait=False, java_script_enabled=False).page
    assert page.is_visible(STILL) and len(page.get_attribute(STILL, "alt")) > 20
    page = opened(LiveExplorer(TEXT, ("companion",))).page
    start(page)
    page.emulate_media(media="print")
    assert page.is_visible(STILL)


# ---- running


@pytest.fixture(scope="module")
def running(kept_open):
    """A page where all four models can be run, and the companion runs."""
    page = kept_open(LiveExplorer(TEXT))
    start(page)
    return page


@pytest.mark.browser
@pytest.mark.parametrize("name", live.MODELS)
def test_next_tokens_maps_and_cache_are_those_of_the_model_that_is_chosen(running, tokenizer, name):
    write(running, TEXT)
    choose(running, name)
    ids = tokenizer.encode(TEXT)
    check_candidates(running, name, tokenizer, ids)
    config = live.described(name)
    nbytes = len(ids) * 2 * config["n_layers"] * config["n_kv_heads"] * config["head_dim"] * 4
    assert f"= {nbytes:,} bytes." in running.locator(".live-cache ~ p").first.inner_text()
    row = running.get_by_role("table", name="Model beside model").get_by_role("row", name=re.compile(f"^{name} "))
    assert row.locator("td").nth(2).inner_text() == f"{nbytes:,}"
    # the maps: one head's weights in the attention explorer's own table
    record = attnlab.record_attention(quantized(name), ids)
    running.get_by_role("button", name=re.compile("^layer 2, head 5")).click()
    running.locator(".attention-title", has_text="Layer 2, head 5").wait_for()
    running.get_by_text("The weights in numbers").click()
    cells = running.locator(".attention-table tbody tr").evaluate_all(
        "rows => rows.map((row) => [...row.cells].slice(1).map((cell) => cell.textContent))"
    )
    for q, row in enumerate(cells):
        for k, cell in enumerate(row):
            weight = record.weights[2, 5, q, k]
            assert (cell == "–") == (k > q)
            if k <= q:
                assert weight < 0.008 if cell == "<0.01" else abs(float(cell) - weight) < 0.0085


@pytest.mark.browser
def test_generating_adds_the_tokens_that_attnlab_generates_and_the_cache_grows(running, tokenizer):
    choose(running, "companion")
    write(running, TEXT)
    ids = tokenizer.encode(TEXT)
    model = quantized("companion")
    lm = LanguageModel(model, tokenizer, model.config, "companion")
    written = running.locator(".live-text b")
    running.get_by_role("button", name="Next token").click()
    settle(running)
    assert written.text_content() == attnlab.generate(lm, TEXT, max_new_tokens=1, temperature=0)
    assert running.locator(".live-cache").get_attribute("aria-label").startswith(f"KV cache: {len(ids) + 1} of ")
    running.get_by_role("button", name="Generate 48 tokens").click()
    settle(running)
    assert written.text_content() == attnlab.generate(lm, TEXT, max_new_tokens=49, temperature=0)
    assert running.locator(".live-cache").get_attribute("aria-label").startswith(f"KV cache: {len(ids) + 49} of ")
    rate = running.get_by_role("row", name=re.compile("^companion ")).locator("td").last.inner_text()
    assert int(rate.replace(",", "")) > 0
    running.get_by_role("button", name="Take them back").click()
    settle(running)
    assert written.text_content() == ""
    check_candidates(running, "companion", tokenizer, ids)


@pytest.mark.browser
def test_another_model_goes_on_with_the_same_text_by_as_many_tokens(running, tokenizer):
    text = TEXT + " +"  # the table is of one text
    choose(running, "companion")
    write(running, text)
    for _ in range(3):
        running.get_by_role("button", name="Next token").click()
        settle(running)
    choose(running, "multi-head")
    model = quantized("multi-head")
    lm = LanguageModel(model, tokenizer, model.config, "multi-head")
    assert running.locator(".live-text b").text_content() == attnlab.generate(lm, text, max_new_tokens=3, temperature=0)
    rows = running.get_by_role("table", name="Model beside model").locator("tbody tr")
    bytes_now = {row.locator("th").inner_text(): row.locator("td").nth(2).inner_text() for row in rows.all()}
    count = len(tokenizer.encode(text)) + 3
    assert bytes_now == {"companion": f"{2048 * count:,}", "multi-head": f"{8192 * count:,}"}


@pytest.mark.browser
def test_a_candidate_that_is_pressed_goes_into_the_text(running, tokenizer):
    choose(running, "companion")
    write(running, TEXT)
    ids = tokenizer.encode(TEXT)
    fourth = expected_candidates("companion", tokenizer, ids)[3][0]
    running.locator(".live-candidate").nth(3).focus()
    running.keyboard.press("Enter")
    settle(running)
    id = next(id for id in range(tokenizer.vocab_size) if tokenizer.piece(id) == fourth)
    assert running.locator(".live-text b").text_content() == tokenizer.decode([id])
    check_candidates(running, "companion", tokenizer, [*ids, id])
    assert running.locator(".live-candidate").nth(3).evaluate("one => one === document.activeElement")


@pytest.mark.browser
def test_generating_can_be_stopped_and_the_page_answers_meanwhile(running):
    choose(running, "companion")
    write(running, TEXT)
    before = int(running.locator(".live-cache").get_attribute("aria-label").split()[2])
    running.evaluate(  # press Stop as soon as the third token is there
        """before => new Promise((resolve) => {
          const [go] = [...document.querySelectorAll("button")].filter((one) => one.textContent.startsWith("Generate"));
          const picture = document.querySelector(".live-cache");
          const watch = new MutationObserver(() => {
            if (Number(picture.getAttribute("aria-label").split(" ")[2]) < before + 3) return;
            watch.disconnect();
            go.click();
            resolve();
          });
          watch.observe(picture, { attributes: true });
          go.click();
        })""",
        before,
    )
    settle(running)
    after = int(running.locator(".live-cache").get_attribute("aria-label").split()[2])
    assert before + 3 <= after < before + 48


@pytest.mark.browser
def test_beyond_its_window_the_companions_cache_stops_growing_and_the_page_is_full_in_the_end(running, tokenizer):
    choose(running, "companion")
    write(running, "x = [1, 2, 3]\n" * 100)
    assert "the last 255 of " in running.get_by_role("status").first.inner_text()
    for _ in range(4):
        running.get_by_role("button", name=re.compile("^Generate")).click()
        settle(running)
    words = running.locator(".live-cache ~ p").first.inner_text()
    assert words.startswith("384 tokens seen, the last 256 kept") and "= 524,288 bytes." in words
    assert "it is full" in running.get_by_role("status").first.inner_text()
    slot = running.locator(".live-slot")
    assert slot.get_attribute("x") == str((384 - 1) % 256)


# ---- any text


@pytest.mark.browser
@pytest.mark.parametrize(
    "text",
    [
        "", " ", "\n", "日本語のテキスト", "مرحبا بالعالم", "🙂👩‍👩‍👧‍👦", "\x00\x07", HOSTILE, "a" * 3000, "e\u0301" * 200,
        "🙂" * 10_000, "漢字かな" * 3000, "def f(x):\n    return x\n" * 2000, "a b\n" * 250_000,
    ],
    ids=lambda text: f"{len(text)} of {text[:2]!r}",
)  # fmt: skip
def test_text_of_any_kind_and_length_is_read_and_what_is_cut_is_said(running, tokenizer, text):
    choose(running, "companion")
    write(running, text)
    kept = text[-10_000:]
    bos, *ids = tokenizer.encode(kept)
    said = running.get_by_role("status").first.inner_text()
    assert ("the last 10,000 of" in said) == (len(text) > 10_000)
    assert ("the last 255 of" in said) == (len(ids) > 255)
    assert f"{min(len(ids), 255)}" in said
    if len(text) > 10_000:
        assert f"of {len(text):,} characters" in said
    check_candidates(running, "companion", tokenizer, [bos, *ids[-255:]])
    assert running.get_by_label("Text", exact=True).input_value() == kept  # so that the box stays quick
    assert running.evaluate("window.hacked") is None


# ---- for everyone


@pytest.mark.browser
@pytest.mark.parametrize(("width", "theme"), [(900, "light"), (900, "dark"), (320, "light"), (320, "dark")])
def test_axe_finds_nothing_and_nothing_sticks_out_before_and_after(opened, width, theme):
    page = opened(LiveExplorer(TEXT, ("companion",)), width=width, theme=theme)
    assert page.violations() == [] and not page.wider_than_the_screen()
    start(page.page)
    page.page.get_by_role("button", name="Next token").click()
    settle(page.page)
    assert page.violations() == [] and not page.wider_than_the_screen()
    small = page.page.locator("[data-explorer] :is(button, select, textarea, input)").evaluate_all(
        "all => all.map((e) => e.getBoundingClientRect()).filter((b) => b.width && (b.width < 24 || b.height < 24)).length"
    )
    assert small == 0


@pytest.mark.browser
def test_all_of_it_works_by_keyboard_and_what_was_written_is_announced(opened):
    page = opened(LiveExplorer(TEXT, ("companion", "multi-query"))).page
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector(".live-maps .attention-title")
    assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # Next token
    settle(page)
    assert page.locator(".live-text b").text_content() != ""
    page.locator(".x-announcement", has_text="added").wait_for(state="attached")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # Generate
    page.locator(".x-announcement", has_text="tokens:").wait_for(state="attached")


@pytest.mark.browser
def test_what_the_reader_chose_in_the_maps_stays_when_a_token_comes(running):
    choose(running, "companion")
    write(running, TEXT)
    running.get_by_role("button", name=re.compile("^layer 1, head 7")).click()
    running.locator(".attention-title", has_text="Layer 1, head 7").wait_for()
    running.get_by_label("Hide the first token and rescale").check()
    running.get_by_role("button", name="Next token").click()
    settle(running)
    assert running.locator(".attention-title").inner_text().startswith("Layer 1, head 7")
    assert running.get_by_label("Hide the first token and rescale").is_checked()
    running.get_by_label("Average the heads").check()
    choose(running, "multi-head")
    assert running.get_by_label("Average the heads").count() == 0  # no two heads share a K/V head
    assert running.get_by_label("Hide the first token and rescale").is_checked()


@pytest.mark.browser
def test_taken_away_it_ends_its_worker(opened):
    page = opened(LiveExplorer(TEXT, ("companion",))).page
    ended = page.evaluate(
        """async () => {
          const data = JSON.parse(document.querySelector("script[type='application/json']").textContent);
          const model = { get: () => data, on: () => {}, off: () => {} };
          const el = document.createElement("div");
          document.body.append(el);
          let module;
          const host = attnlabExplorers;
          globalThis.attnlabExplorers = { module: (kind, make) => (module = make()), file: host.file };
          new Function(document.scripts[document.scripts.length - 1].textContent)();
          const end = await module.render({ model, el });
          el.querySelector("button").click();
          while (!el.querySelector(".live-maps .attention-title")) await new Promise((done) => setTimeout(done, 20));
          end();
          return el.childNodes.length;
        }"""
    )
    assert ended == 0
    page.wait_for_timeout(100)
    assert page.workers == []
