"""The rolling-buffer explorer: every step of the page is one that RollingKVCache takes."""

import itertools

import pytest
import torch

from attnlab import RollingKVCache
from attnlab.attention import causal_mask, scaled_dot_product_attention
from attnlab.errors import AttnlabError, ConfigError, InputError
from attnlab.explorer import RollingBufferExplorer
from attnlab.explorer.rolling_buffer import MAX_TOKENS, MAX_WINDOW, steps, telling

SETTINGS = [
    (window, n_tokens, chunk)
    for window, n_tokens, chunk in itertools.product((1, 2, 3, 4, 7, 12), (1, 2, 5, 12, 24), (1, 2, 3, 5, 24))
    if chunk <= n_tokens
]

# Turns the sliders to each setting and reads the table of every step: [[step, query, sees, written, overwritten, kept], …]
DRIVE = """settings => {
  const root = document.querySelector("[data-explorer]");
  const set = (text, value) => {
    const input = [...root.querySelectorAll("label")].find(label => label.querySelector("span").textContent === text)
      .querySelector("input");
    input.value = value;
    input.dispatchEvent(new Event("input", { bubbles: true }));
  };
  return settings.map(([window, tokens, chunk]) => {
    set("tokens", tokens);
    set("window", window);
    set("chunk", chunk);
    return [...root.querySelector("tbody").rows].map(row => [...row.cells].map(cell => cell.textContent));
  });
}"""

# What is drawn at the step that is shown.
DRAWN = """() => {
  const root = document.querySelector("[data-explorer]");
  const all = (selector, name) => [...root.querySelectorAll(selector)].map(one => one.dataset[name]);
  return {
    held: all(".rolling-held", "position"),
    seen: all(".rolling-cell.rolling-seen:not(.rolling-held)", "position"),
    over: all(".rolling-cell.rolling-over", "position"),
    waiting: all(".rolling-cell.rolling-waiting", "position"),
    gone: all(".rolling-cell.rolling-gone", "position"),
    now: all(".rolling-row.rolling-now", "query"),
    row: all(".rolling-row.rolling-now .rolling-seen", "key"),
    marked: all("rect.rolling-mark", "kept"),
    seenInAll: [...root.querySelectorAll(".rolling-row .rolling-seen")].map(
      one => [one.parentNode.dataset.query, one.dataset.key].map(Number)),
  };
}"""


def shown(positions) -> str:
    return " ".join("–" if p is None else str(p) for p in positions) or "–"


def text(positions) -> list[str]:
    return [str(p) for p in positions]


# ---- in Python


def test_the_steps_of_the_worked_example_in_the_cache_are_these():
    taken = steps(window=3, n_tokens=5)
    assert [step.held for step in taken] == [(0, None, None), (0, 1, None), (0, 1, 2), (3, 1, 2), (3, 4, 2)]
    assert taken[-1] == (4, (2, 3, 4), (4,), (1,), (3, 4, 2))


def test_whatever_the_chunk_a_query_sees_its_window_and_the_last_window_positions_are_kept():
    for window, n_tokens, chunk in SETTINGS:
        taken = steps(window, n_tokens, chunk)
        looks = [(step.query, list(step.sees)) for step in taken if step.query is not None]
        mask = causal_mask(n_tokens, window=window)
        assert looks == [(query, row.nonzero().flatten().tolist()) for query, row in enumerate(mask)]
        for step in taken:
            if step.written:
                last = step.written[-1]
                assert sorted(p for p in step.held if p is not None) == list(range(max(0, last - window + 1), last + 1))
                assert all(p is None or p % window == slot for slot, p in enumerate(step.held))
                assert all(p <= last - window for p in step.overwritten)  # beyond every later window
        held = new_cache(window).held_positions(torch.tensor([n_tokens]))[0].tolist()
        assert taken[-1].held == tuple(p if p >= 0 else None for p in held)


def new_cache(window: int) -> RollingKVCache:
    return RollingKVCache(n_layers=1, batch=1, n_kv_heads=1, head_dim=1, window=window)


def test_attention_over_what_the_explorer_shows_is_attention_through_the_cache():
    """The positions that a step lists are all that its query needs."""
    torch.manual_seed(0)
    k, v, q = torch.randn(3, 1, 1, 12, 2).unbind()  # (B, H, T, D) each
    cache = RollingKVCache(n_layers=1, batch=1, n_kv_heads=1, head_dim=2, window=4)
    outputs = []
    for start in range(0, 12, 3):
        keys, values, sees = cache.update(0, k[:, :, start : start + 3], v[:, :, start : start + 3])
        outputs.append(scaled_dot_product_attention(q[:, :, start : start + 3], keys, values, **sees))
        cache.advance(3)
    through = torch.cat(outputs, dim=2)
    for step in RollingBufferExplorer(window=4, tokens=12, chunk=3).steps:
        if step.query is not None:
            at, seen = step.query, list(step.sees)
            listed = scaled_dot_product_attention(q[:, :, at : at + 1], k[:, :, seen], v[:, :, seen])
            assert torch.allclose(listed[0, 0, 0], through[0, 0, at], atol=1e-6)


def test_it_opens_where_there_is_something_to_see():
    single = RollingBufferExplorer()
    assert single.steps[single.opens_at] == (5, (2, 3, 4, 5), (5,), (1,), (4, 5, 2, 3))
    chunked = RollingBufferExplorer(window=4, tokens=12, chunk=3)
    opening = chunked.steps[chunked.opens_at]
    assert opening.query == 3 and set(opening.sees) >= {0, 1}  # which its chunk goes over
    assert chunked.steps[chunked.opens_at + 3].overwritten == (0, 1)
    assert telling(steps(4, 3)) == 2  # nothing is overwritten: the last
    assert telling(steps(2, 3)) == 2  # once alone
    assert telling(steps(2, 8, 8)) == 8  # all of it one chunk, which overwrites nothing


def test_words_are_tokens_and_a_chunk_is_no_longer_than_the_text():
    made = RollingBufferExplorer(tokens=["a", "b", "c"], chunk=8)
    assert (made.n_tokens, made.chunk, made.data["words"], made.data["max_tokens"]) == (3, 3, ["a", "b", "c"], 3)
    assert RollingBufferExplorer(tokens=3).data["max_tokens"] == MAX_TOKENS


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"window": 0}, ConfigError, "window is a whole number from 1 to 12"),
        ({"window": MAX_WINDOW + 1}, ConfigError, "got 13"),
        ({"window": None}, ConfigError, "got None"),
        ({"tokens": 0}, ConfigError, "tokens is a whole number from 1 to 24"),
        ({"tokens": []}, ConfigError, "tokens is a whole number from 1 to 24"),
        ({"tokens": ["x"] * 25}, ConfigError, "got 25"),
        ({"chunk": 0}, ConfigError, "chunk is a whole number"),
        ({"chunk": 2.5}, ConfigError, "got 2.5"),
        ({"tokens": "the cat sat"}, InputError, r"'the cat sat'.split\(\)"),
        ({"tokens": ["the", 3]}, InputError, "got 3 among them"),
        ({"tokens": 2.5}, InputError, "a number or a list of words; got 2.5"),
    ],
)
def test_bad_input_is_refused_in_words(options, error, words):
    with pytest.raises(AttnlabError, match=words) as raised:
        RollingBufferExplorer(**options)
    assert isinstance(raised.value, error)


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "beyond the window"),
        ({"chunk": 3}, "before the chunk is written"),
        ({"tokens": 3}, "no slot is overwritten"),
        ({"tokens": 24, "window": 1}, "beyond the window"),
        ({"tokens": 24, "window": 12, "chunk": 24}, "no slot is overwritten"),
    ],
)
def test_the_still_has_every_position_in_its_slot_and_says_what_happens(options, said):
    made = RollingBufferExplorer(**options)
    slots, mask = made.still().axes
    places = {label.get_text(): int(label.get_position()[0]) for label in slots.texts[: made.n_tokens]}
    assert places == {str(p): p % made.window for p in range(made.n_tokens)}
    assert [label.get_text() for label in slots.texts[made.n_tokens :]] == [
        "–" if p is None else str(p) for p in made.steps[made.opens_at].held
    ]
    assert len(mask.patches) == 2 * made.n_tokens + 1 and said in made.alt


# ---- in the browser


@pytest.mark.browser
def test_at_every_setting_the_pages_steps_are_those_of_the_cache(kept_open):
    settings = SETTINGS[::3]
    assert {chunk for _, _, chunk in settings} == {chunk for _, _, chunk in SETTINGS}
    assert {window for window, _, _ in settings} == {window for window, _, _ in SETTINGS}
    page = kept_open(RollingBufferExplorer(tokens=MAX_TOKENS))
    for setting, rows in zip(settings, page.evaluate(DRIVE, settings), strict=True):
        taken = steps(*setting)
        assert [row[0] for row in rows] == text(range(1, len(taken) + 1)), setting
        for row, step in zip(rows, taken, strict=True):
            query = "–" if step.query is None else str(step.query)
            assert row[1:] == [query, *map(shown, (step.sees, step.written, step.overwritten, step.held))], setting


@pytest.mark.browser
@pytest.mark.parametrize("window, n_tokens, chunk", [(4, 12, 1), (3, 13, 5)])
def test_at_every_step_slots_and_mask_are_drawn_as_the_cache_has_them(opened, window, n_tokens, chunk):
    made = RollingBufferExplorer(window, n_tokens, chunk)
    page = opened(made).page
    page.get_by_role("button", name="First").click()
    gone: set[int] = set()
    mask = causal_mask(n_tokens, window=window).nonzero().tolist()
    for i, step in enumerate(made.steps):
        drawn = page.evaluate(DRAWN)
        assert drawn["held"] == ["" if p is None else str(p) for p in step.held]
        assert drawn["seen"] == text(step.sees) and drawn["over"] == text(step.overwritten)
        if step.written:
            gone |= set(range(step.written[-1])) - set(step.held)
            assert drawn["gone"] == text(sorted(gone - set(step.overwritten))) and drawn["waiting"] == []
        else:
            assert str(step.query) in drawn["waiting"]
        assert drawn["now"] == ([] if step.query is None else [str(step.query)])
        assert drawn["row"] == (text(step.sees) if step.query is not None else [])
        assert sorted(drawn["marked"], key=int) == text(sorted(p for p in step.held if p is not None))
        assert drawn["seenInAll"] == mask
        if i + 1 < len(made.steps):
            page.get_by_role("button", name="Forward").click()
    assert page.get_by_role("button", name="Forward").get_attribute("aria-disabled") == "true"


@pytest.mark.browser
def test_it_opens_at_the_stills_step_and_says_in_words_what_happens(opened):
    made = opened(RollingBufferExplorer())
    says = made.page.locator(".rolling-says")
    assert says.inner_text() == (
        "Position 5 goes to slot 1 (5 mod 4), over position 1, which no query sees from here on. "
        "Then its query sees positions 2 to 5: all that is kept."
    )
    made.page.get_by_role("button", name="First").click()
    assert says.inner_text().startswith("Position 0 goes to slot 0 (0 mod 4), which was empty. Then its query sees position 0")  # fmt: skip
    assert not made.complaints and not made.strangers()


@pytest.mark.browser
def test_a_chunk_looks_before_it_is_written_and_the_page_says_why(opened):
    page = opened(RollingBufferExplorer(window=4, tokens=12, chunk=3)).page
    says, forward = page.locator(".rolling-says"), page.get_by_role("button", name="Forward")
    assert says.inner_text() == (
        "The query at 3 looks before its chunk, 3 to 5, is written. It sees positions 0 to 2 from the cache and 3 of the "
        "chunk. Had the chunk been written first, 0 and 1 would be gone."
    )
    forward.click()
    assert says.inner_text().endswith("Had the chunk been written first, 1 would be gone.")
    forward.click()
    assert says.inner_text().endswith("It sees position 2 from the cache and 3 to 5 of the chunk.")
    forward.click()
    assert says.inner_text() == (
        "The chunk has looked, and is written: positions 3 to 5 to slots 3, 0 and 1, "
        "over positions 0 and 1, which no query sees from here on."
    )
    page.get_by_role("slider", name="chunk").fill("6")
    page.get_by_role("button", name="First").click()
    for _ in range(6):
        forward.click()
    assert says.inner_text() == (
        "The chunk has looked, and is written: positions 2 to 5 to slots 2, 3, 0 and 1, which were empty. "
        "Positions 0 and 1 are never written: the cache keeps the last 4."
    )


@pytest.mark.browser
def test_the_keyboard_reaches_everything_and_steps(opened):
    page = opened(RollingBufferExplorer(tokens=list("abcdefgh"))).page
    reached = []
    for _ in range(10):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("""() => {
              const at = document.activeElement;
              return at.getAttribute("aria-label") ?? at.closest("label")?.querySelector("span").textContent ?? at.textContent;
            }""")
        )
    assert reached == [
        "window", "tokens", "chunk", "First", "Back", "Forward", "step", "The slots", "The mask", "Every step in a table",
    ]  # fmt: skip
    step = page.get_by_role("slider", name="step", exact=True)
    step.focus()
    for key, at in (("Home", "1"), ("ArrowRight", "2"), ("ArrowRight", "3"), ("ArrowLeft", "2"), ("End", "8")):
        page.keyboard.press(key)
        assert step.get_attribute("aria-valuetext") == f"{at} of 8"
    page.get_by_role("button", name="Forward").focus()  # the same keys on the buttons, which keep the focus at the end
    for key, at in (("Home", "1"), ("Enter", "2"), ("ArrowRight", "3"), ("ArrowLeft", "2"), ("End", "8"), ("Enter", "8")):  # fmt: skip
        page.keyboard.press(key)
        assert step.get_attribute("aria-valuetext") == f"{at} of 8"
    assert page.evaluate("document.activeElement.textContent") == "Forward" and page.evaluate("scrollY") == 0
    page.wait_for_function(
        "document.querySelector('[role=status]').textContent.includes('Step 8 of 8. Position 7 “h”')"
    )


@pytest.mark.browser
def test_a_setting_turned_keeps_the_query_where_there_still_is_one(opened):
    page = opened(RollingBufferExplorer()).page
    step, says = page.get_by_role("slider", name="step", exact=True), page.locator(".rolling-says")
    page.get_by_role("slider", name="window").fill("3")
    assert says.inner_text().startswith("Position 5 goes to slot 2 (5 mod 3), over position 2")
    page.get_by_role("slider", name="chunk").fill("4")
    assert says.inner_text().startswith("The query at 5 looks before its chunk, 4 to 7")
    page.get_by_role("slider", name="tokens").fill("2")
    assert step.get_attribute("aria-valuetext") == "3 of 3"
    assert page.get_by_role("slider", name="chunk").get_attribute("aria-valuetext") == "2"


@pytest.mark.browser
def test_a_row_of_the_mask_can_be_chosen(opened):
    page = opened(RollingBufferExplorer(), width=400, has_touch=True).page
    page.locator(".rolling-row").nth(7).tap()
    assert page.locator(".rolling-says").inner_text().startswith("Position 7 goes to slot 3")


@pytest.mark.browser
def test_words_are_shown_as_they_are_and_not_run(opened):
    hostile = ["<img src=x onerror=window.hacked=1>", "</script><script>window.hacked=1</script>", "the"]
    made = opened(RollingBufferExplorer(window=2, tokens=hostile))
    assert made.root.locator(".rolling-cell small").all_text_contents()[-3:] == hostile
    assert made.page.evaluate("window.hacked") is None and made.complaints == []


@pytest.mark.browser
def test_where_there_is_much_the_step_comes_into_view_and_the_page_stays(opened):
    made = opened(RollingBufferExplorer(window=1, tokens=MAX_TOKENS), width=320)
    made.page.get_by_role("slider", name="step", exact=True).press("End")
    for mark in (".rolling-cell.rolling-now", ".rolling-row.rolling-now text"):
        box, frame = (
            made.page.locator(one).bounding_box() for one in (mark, f".rolling-box:has({mark})")
        )  # fmt: skip
        assert frame["y"] <= box["y"] and box["y"] + box["height"] <= frame["y"] + frame["height"]
    assert made.page.evaluate("scrollX") == 0


@pytest.mark.browser
def test_without_javascript_the_picture_shows(opened):
    page = opened(RollingBufferExplorer(), wait=False, java_script_enabled=False).page
    assert page.locator("figure > img").bounding_box()["width"] > 200


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [900, 320])
def test_axe_finds_nothing_and_nothing_sticks_out(opened, width, theme):
    made = opened(RollingBufferExplorer(tokens=list("abcdefgh"), chunk=3), width=width, theme=theme)
    assert made.violations() == []
    for _ in range(3):  # to the chunk's end, where slots are overwritten
        made.page.get_by_role("button", name="Forward").click()
    made.page.click("summary")
    assert made.page.locator(".rolling-cell.rolling-over").count() == 2 and made.violations() == []
    assert not made.wider_than_the_screen()
    for target in made.page.locator("input, button, summary").all():
        box = target.bounding_box()
        assert min(box["width"], box["height"]) >= 24, target
    assert made.complaints == []


@pytest.mark.browser
def test_the_largest_there_is_scrolls_in_its_own_boxes(opened):
    made = opened(RollingBufferExplorer(MAX_WINDOW, MAX_TOKENS), width=320)
    assert not made.wider_than_the_screen()
    boxes = made.page.locator(".rolling-box").evaluate_all("all => all.map(e => [e.scrollWidth > e.clientWidth, e.tabIndex])")  # fmt: skip
    assert boxes == [[True, 0], [True, 0]]
