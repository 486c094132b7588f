"""The attention explorer: what it sends is the record, within a stated error, and what it cannot show it refuses."""

import base64
import dataclasses
import importlib.util
import json
import re
import zlib
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest

from attnlab.attention import causal_mask
from attnlab.errors import CapacityError, ConfigError, InputError, ShapeError
from attnlab.explorer import attention
from attnlab.explorer.attention import AttentionExplorer
from attnlab.record import AttentionRecord, decode, encode, sent_cells

MARKUP = "<img src=x onerror=window.ran=1>"


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def make_record(L=2, H=4, T=9, S=None, n_kv_heads=2, window=None, causal=True, sink=0.0, seed=0, **changes):
    """Random weights; ``sink`` is added to the first key's scores."""
    S = S or T
    scores = 2 * np.random.default_rng(seed).standard_normal((L, H, T, S))
    scores[..., 0] += sink
    if causal:
        scores[..., ~causal_mask(T, S, window).numpy()] = -np.inf
    words = ["<s>", *(f"word{i}" for i in range(1, S))]
    parts = {"query_tokens": words[S - T :], "key_tokens": words, "n_kv_heads": n_kv_heads, "window": window,
             "causal": causal, "model_name": "made up"}  # fmt: skip
    return AttentionRecord(softmax(scores).astype(np.float16), **(parts | changes))


def unpacked(text):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)


def sent(record):
    return sent_cells(*record.weights.shape[2:], record.causal)


# --- bytes


@pytest.mark.parametrize(
    "shape",
    [{}, {"window": 4}, {"sink": 12.0}, {"T": 1}, {"T": 3, "S": 9}, {"T": 9, "S": 9, "causal": False},
     {"T": 5, "S": 7, "causal": False, "query_tokens": list("abcde")}, {"n_kv_heads": 1}, {"L": 1, "H": 1, "n_kv_heads": 1}],
)  # fmt: skip
def test_every_weight_comes_back_within_half_a_level(shape):
    record = make_record(**shape)
    data = attention.payload(record)
    assert len(data["layers"]) == record.weights.shape[0]
    for layer, text in zip(record.weights, data["layers"], strict=True):
        again = decode(unpacked(text), len(layer), sent(record))
        assert again.shape == layer.shape
        assert np.abs(again - layer).max() <= 1 / 510 + 1e-9
        assert (again[:, ~sent(record)] == 0).all()


def test_what_a_sink_leaves_is_as_fine_as_any():
    record = make_record(T=24, sink=14.0)
    first = record.weights[..., 2:, 0].astype(float)
    assert first.min() > 0.9  # nearly all of every row
    again = decode(unpacked(attention.payload(record)["layers"][0]), 4, sent(record))
    for h, q in np.ndindex(4, 24):
        rest = record.weights[0, h, q, 1:].astype(float)
        if q and rest.max() > 2**-16:
            left = again[h, q, 1:] / again[h, q, 1:].sum() - rest / rest.sum()
            assert np.abs(left).max() < 0.02  # plain 255ths would leave nothing of most


def test_a_worked_example_in_bytes():
    weights = np.array([[[1, 0], [0.5, 0.5]]], dtype=np.float16)  # one head
    data = encode(weights, causal_mask(2, 2).numpy())
    # row 0: no other key, so the smallest scale; 1 in 255ths. Row 1: 2^(-16/16) is the half; 128 of 255 and all of it
    assert data.tolist() == [255, 255, 16, 128, 255]


def test_a_row_that_sees_no_key_has_no_bytes():
    weights = np.zeros((1, 3, 2), dtype=np.float16)
    weights[0, 1:, 0] = 1
    data = encode(weights, causal_mask(3, 2).numpy())
    assert len(data) == 2 + 3
    assert (decode(data, 1, causal_mask(3, 2).numpy()) == weights).all()


def test_mistral_s_1024_heads_at_24_tokens_take_half_a_megabyte_at_most():
    record = make_record(L=32, H=32, T=24, n_kv_heads=8)  # random, which compresses worse than a trained model's
    assert len(AttentionExplorer(record).figure_html().encode()) <= 500_000


def test_mistral_s_1024_heads_at_64_tokens_take_three_megabytes_and_little_before_a_layer_is_opened():
    data = attention.payload(make_record(L=32, H=32, T=64, n_kv_heads=8))
    assert len(json.dumps(data)) <= 3_000_000
    at_once = len(json.dumps(data | {"layers": []}))
    assert at_once + max(map(len, data["layers"])) <= 400_000


def test_thumbnails_keep_thin_lines():
    weights = np.zeros((1, 1, 64, 64), dtype=np.float16)
    weights[0, 0, np.arange(1, 64), np.arange(63)] = 1  # the previous token
    small = attention.thumbnails(weights)[0, 0]
    assert small.shape == (16, 16) and (np.diag(small) == 255).all() and small[0, 5] == 0
    assert attention.payload(make_record())["thumbnails"] is None  # a small record's layers come at once


# --- numbers


def test_numbers_are_what_they_say():
    T = 8
    previous, first, even = np.zeros((T, T)), np.zeros((T, T)), np.tril(np.ones((T, T)))
    previous[np.arange(1, T), np.arange(T - 1)] = previous[0, 0] = 1
    first[:, 0] = 1
    even /= even.sum(-1, keepdims=True)
    record = make_record(L=1, H=3, T=T, n_kv_heads=3)
    record.weights = np.stack([previous, first, even])[None].astype(np.float16)
    numbers = attention.payload(record)["numbers"]["heads"]
    queries = np.arange(1, T)  # the first has no choice
    assert numbers["entropy"][:2] == [0, 0]
    assert numbers["entropy"][2] == pytest.approx(np.log2(queries + 1).mean(), abs=0.01)
    assert numbers["distance"] == pytest.approx([1, queries.mean(), queries.mean() / 2], abs=0.01)
    assert numbers["first"] == pytest.approx([1 / (T - 1), 1, (1 / (queries + 1)).mean()], abs=0.01)
    later = np.arange(2, T)  # with the first key gone, the second query has no choice either
    assert numbers["entropy_without_first"] == pytest.approx([0, 0, np.log2(later).mean()], abs=0.01)
    assert numbers["distance_without_first"] == pytest.approx([1, 0, ((later - 1) / 2).mean()], abs=0.01)


def test_numbers_of_groups_are_those_of_the_mean_map():
    record = make_record(H=4, n_kv_heads=2)
    means = record.weights.astype(np.float32).reshape(2, 2, 2, 9, 9).mean(2)
    merged = dataclasses.replace(record, weights=means.astype(np.float16))
    groups = attention.payload(record)["numbers"]["groups"]
    for name, values in attention.payload(merged)["numbers"]["heads"].items():
        assert groups[name] == pytest.approx(values, abs=0.011)
    assert attention.payload(make_record(H=4, n_kv_heads=4))["numbers"]["groups"] is None


def test_cross_attention_has_no_distance_and_a_cached_text_s_queries_stand_at_its_end():
    cross = make_record(T=3, S=5, causal=False, query_tokens=list("abc"))
    assert attention.is_cross(cross) and attention.payload(cross)["numbers"]["heads"]["distance"] is None
    assert not attention.is_cross(make_record(causal=False))
    cached = make_record(T=2, S=6)
    assert not attention.is_cross(cached)
    cached.weights[:] = 0
    cached.weights[..., 4] = 1  # the key beside the first of the two queries
    assert attention.payload(cached)["numbers"]["heads"]["distance"][0] == 0.5


# --- what is refused


def spoiled(where, value, **shape):
    record = make_record(**shape)
    record.weights[where] = value
    return record


@pytest.mark.parametrize(
    ("record", "error", "words"),
    [
        (np.zeros((1, 1, 2, 2)), InputError, "record_attention"),
        (spoiled((1, 2, 3, 1), np.nan), InputError, "layer 1, head 2: the weight from query 3 to key 1 is not a number"),
        (spoiled((0, 0, 3, 1), np.inf), InputError, "not a number"),
        (spoiled((0, 0, 3, 1), -0.5), InputError, "between 0 and 1"),
        (spoiled((0, 0, 3, 1), 1.5), InputError, "between 0 and 1"),
        (spoiled((0, 0, 3, slice(0, 4)), 0.9), InputError, "row sums to 3.6"),
        (spoiled((0, 1, 3, 5), 0.25), InputError, "from query 3 to key 5 is forbidden by the record's own mask"),
        (spoiled((0, 1, 8, 2), 0.25, window=4), InputError, "causal and window"),
        (make_record(L=0), ShapeError, "at least one layer, head"),
        (make_record(H=0), ShapeError, "at least one layer, head"),
        (make_record(L=1, H=1, T=600, n_kv_heads=1), CapacityError, "600 tokens came. Record a shorter text"),
        (make_record(L=40, H=40, T=160, n_kv_heads=8), CapacityError, "16 MB of maps, and 21 MB of maps came"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_refused_in_words(record, error, words):
    with pytest.raises(error) as raised:
        AttentionExplorer(record)
    assert words in str(raised.value)


def test_tokens_that_do_not_match_and_heads_that_are_not_there_are_refused():
    record = make_record()
    record.key_tokens = record.key_tokens[:-1]
    with pytest.raises(ShapeError, match="9 queries and 9 keys need as many tokens; got 9 and 8"):
        AttentionExplorer(record)
    record.key_tokens = [*record.key_tokens, 7]
    with pytest.raises(InputError, match="tokens are text; got 7"):
        AttentionExplorer(record)
    for head in ((2, 0), (0, 4), (-1, 0), 3):
        with pytest.raises(ConfigError, match=r"up to \(1, 3\)"):
            AttentionExplorer(make_record(), head)


def test_half_precision_s_rounding_is_not_refused():
    weights = np.full((1, 1, 300, 300), 1 / 300)
    record = AttentionRecord(weights.astype(np.float16), ["a"] * 300, ["a"] * 300, 1, None, False, "even")
    assert attention.payload(record)["n_layers"] == 1
    attention.check(record, (0, 0))


# --- in a browser


def choose(page, label, value):
    """Turn a switch, or pick an option by its words."""
    if isinstance(value, bool):
        page.get_by_role("checkbox", name=label).set_checked(value)
    else:
        page.get_by_role("combobox", name=label).select_option(label=value)


def heads(page):
    return page.locator(".attention-head")


def head_names(page):
    return heads(page).evaluate_all("all => all.map((head) => head.getAttribute('aria-label'))")


def open_head(page, layer, head):
    page.get_by_role("button", name=f"layer {layer}, head {head} (").click()
    opened_head(page, f"Layer {layer}, head {head} (").wait_for()


def opened_head(page, words):
    return page.locator(".attention-title", has_text=words)


def readout(page):
    return page.locator(".attention-readout").inner_text()


def said(text):
    """{token: weight} that the readout names."""
    return {token: float(weight) for token, weight in re.findall(r"“([^”]+)” (\d\.\d\d)", text)}


def numbers_on_page(page):
    """The table of the open head; None where it says hidden."""
    summary = page.get_by_text("The weights in numbers")
    if page.get_by_role("table", name="Weights of").count() == 0:
        summary.click()
    table = page.get_by_role("table", name="Weights of")
    table.wait_for()
    rows = table.locator("tbody tr").all()
    cells = [row.locator("td").all_inner_texts() for row in rows]
    return [[None if c == "–" else 0.0 if c == "<0.01" else float(c) for c in row] for row in cells]


def assert_shows(page, weights, mask):
    shown = numbers_on_page(page)
    for q, k in np.ndindex(*mask.shape):
        if mask[q, k]:
            assert shown[q][k] == pytest.approx(float(weights[q, k]), abs=0.005 + 1 / 510)
        else:
            assert shown[q][k] is None


def test_all_heads_are_there_grouped_under_their_key_value_head(opened):
    view = opened(AttentionExplorer(make_record(), head=(1, 2)))
    page = view.page
    assert view.root.get_attribute("data-explorer") == "attention"
    assert head_names(page) == [f"layer {l}, head {h} (K/V head {h // 2})" for l in range(2) for h in range(4)]
    assert page.locator(".attention-group").count() == 4
    for group in page.locator(".attention-group").all():
        kv = group.locator(".attention-group-label").inner_text().split()[-1]
        assert all(
            f"(K/V head {kv})" in name
            for name in group.locator("button").evaluate_all("b => b.map((x) => x.ariaLabel)")
        )
    assert page.locator(".attention-head[aria-pressed=true]").get_attribute("aria-label").startswith("layer 1, head 2")
    assert opened_head(page, "Layer 1, head 2 (K/V head 1)").is_visible()
    assert not page.locator("figure img[alt*='Heat map']").is_visible()  # the still picture has done its work
    assert view.strangers() == [] and view.complaints == []


def test_the_numbers_are_the_record_s_and_hidden_where_the_mask_hides(opened):
    record = make_record(window=4)
    page = opened(AttentionExplorer(record)).page
    for layer, head in ((0, 0), (1, 3)):
        open_head(page, layer, head)
        assert_shows(page, record.weights[layer, head], attention.visible(record))
    assert (
        "what comes after the query, what lies outside the window of 4"
        in page.locator(".attention-legend").inner_text()
    )
    limit = page.locator(".attention-limit").get_attribute("d")
    assert limit.startswith("M1 0v1L2 1v1") and limit.endswith("L5 8v1")  # causal to the right; window to the left
    figures = page.locator(".attention-figures").inner_text()
    expected = attention.payload(record)["numbers"]["heads"]
    assert f"entropy {expected['entropy'][7]:.2f} bits" in figures
    assert f"distance {expected['distance'][7]:.2f} tokens" in figures


def test_heads_that_share_a_key_value_head_are_averaged(opened):
    record = make_record()
    page = opened(AttentionExplorer(record, head=(1, 3))).page
    choose(page, "Average the heads", True)
    assert head_names(page)[3] == "layer 1, mean of heads 2 to 3 (K/V head 1)" and len(head_names(page)) == 4
    assert opened_head(page, "Layer 1, mean of heads 2 to 3").is_visible()
    assert_shows(page, record.weights[1, 2:].astype(float).mean(0), attention.visible(record))
    choose(page, "Average the heads", False)
    assert opened_head(page, "Layer 1, head 2 (K/V head 1)").is_visible() and heads(page).count() == 8


def test_the_first_token_is_hidden_and_rows_rescaled(opened):
    record = make_record(sink=8.0)
    page = opened(AttentionExplorer(record, head=(0, 1))).page
    before = page.locator(".attention-figures").inner_text()
    choose(page, "Hide the first token", True)
    page.get_by_text("hatched: what comes after the query, the first token").wait_for()
    rest = record.weights[0, 1].astype(float)
    rest[:, 0] = 0
    rest[1:] /= rest[1:].sum(-1, keepdims=True)
    mask = attention.visible(record)
    mask[:, 0] = False
    shown = numbers_on_page(page)
    for q, k in zip(*np.nonzero(mask), strict=True):  # rescaled, the bytes' error is of what is left
        assert shown[q][k] == pytest.approx(rest[q, k], abs=0.02)
    assert all(row[0] is None for row in shown)
    expected = attention.payload(record)["numbers"]["heads"]["entropy_without_first"][1]
    assert f"entropy {expected:.2f}" in page.locator(".attention-figures").inner_text() != before
    choose(page, "Hide the first token", False)
    assert page.locator(".attention-figures").inner_text() == before


def test_a_token_under_the_pointer_shows_what_it_looks_at_and_with_shift_who_looks_at_it(opened):
    record = make_record()
    page = opened(AttentionExplorer(record, head=(1, 0))).page
    weights = record.weights[1, 0].astype(float)
    page.locator(".attention-token").nth(5).hover()
    text = readout(page)
    assert text.startswith("“word5” looks at ")
    for token, weight in said(text).items():
        assert weight == pytest.approx(weights[5, record.key_tokens.index(token)], abs=0.008)
    assert f"“{record.key_tokens[weights[5].argmax()]}”" in text
    assert page.locator(".attention-token").nth(7).get_attribute("class").endswith("attention-unseen")
    drawn = page.locator(".attention-curves path[d]").count()
    assert drawn == sum(weights[5, :5] >= 0.005)
    page.keyboard.down("Shift")
    text = readout(page)
    assert text.startswith("“word5” is looked at by ")
    for token, weight in said(text).items():
        assert weight == pytest.approx(weights[record.key_tokens.index(token), 5], abs=0.008)
    page.keyboard.up("Shift")
    assert readout(page).startswith("“word5” looks at ")
    choose(page, "Who looks at it", True)
    assert readout(page).startswith("“word5” is looked at by ")


def test_everything_is_reached_by_keyboard(opened):
    record = make_record()
    page = opened(AttentionExplorer(record)).page
    page.locator(".attention-head[aria-pressed=true]").focus()
    page.keyboard.press("ArrowDown")  # a layer on
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    opened_head(page, "Layer 1, head 1 (").wait_for()
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused.startswith("layer 1, head 1") and page.locator(".attention-head[tabindex='0']").count() == 1
    page.locator(".attention-token[tabindex='0']").focus()
    page.keyboard.press("ArrowLeft")
    assert readout(page).startswith("“word7” looks at ")
    page.keyboard.down("Shift")
    page.keyboard.press("ArrowLeft")
    assert readout(page).startswith("“word6” is looked at by ")
    page.keyboard.up("Shift")
    assert readout(page).startswith("“word6” looks at ")
    page.keyboard.press("Home")
    assert readout(page) == "“<s>” looks at “<s>” 1.00"
    page.get_by_role("application", name="Heat map of layer 1, head 1").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    found = re.fullmatch(r"Query 2 “word2”, key 1 “word1”: (\d\.\d\d|<0\.01)", readout(page))
    assert float(found[1].strip("<")) == pytest.approx(float(record.weights[1, 1, 2, 1]), abs=0.011)
    page.keyboard.press("End")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert readout(page).endswith("“word4”: hidden")
    page.locator(".x-announcement", has_text="hidden").wait_for(state="attached")  # and a screen reader is told
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_the_heat_map_follows_the_pointer(opened):
    record = make_record(T=8, S=8)
    page = opened(AttentionExplorer(record)).page
    box = page.locator(".attention-heat").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 8 * 16 + 3 * 16 + 4, box["y"] + box["height"] - 2 - 16 - 6)
    assert readout(page).startswith("Query 6 “word6”, key 3 “word3”: ")


def test_heads_are_sorted_by_any_number(opened):
    record = make_record(L=3, H=4, seed=3)
    numbers = attention.payload(record)["numbers"]["heads"]
    page = opened(AttentionExplorer(record)).page

    def order():
        return [tuple(map(int, re.findall(r"layer (\d+), head (\d+)", name)[0])) for name in head_names(page)]

    for words, name, sign in (
        ("entropy, lowest first", "entropy", 1),
        ("distance, farthest first", "distance", -1),
        ("weight on the first token", "first", -1),
    ):
        choose(page, "Order of the heads", words)
        values = [numbers[name][4 * layer + head] for layer, head in order()]
        assert values == sorted(values, key=lambda value: sign * value) and len(set(order())) == 12
    page.get_by_text("All heads in numbers").click()
    table = page.get_by_role("table", name="Each a mean over the queries")
    table.wait_for()
    assert table.locator("tbody tr").count() == 12
    table.get_by_role("button", name="entropy").click()
    column = [float(cell) for cell in table.locator("tbody tr td:nth-child(4)").all_inner_texts()]
    assert column == sorted(column) == sorted(numbers["entropy"])
    assert table.get_by_role("columnheader", name="entropy").get_attribute("aria-sort") == "ascending"
    table.get_by_role("button", name="entropy").click()
    assert table.get_by_role("columnheader", name="entropy").get_attribute("aria-sort") == "descending"
    assert page.get_by_label("Order of the heads").locator("option:checked").inner_text() == "entropy, highest first"


def test_a_token_is_found(opened):
    page = opened(AttentionExplorer(make_record(T=24))).page
    search = page.get_by_label("Find a token")
    search.fill("WORD1")
    assert page.locator(".attention-token.attention-found").count() == 11  # word1, word10 to word19
    assert page.get_by_text("11 of 24").is_visible()
    search.press("Enter")  # from the last token on: around to the first
    assert readout(page).startswith("“word1” looks at")
    search.press("Enter")
    assert readout(page).startswith("“word10” looks at")
    search.fill("nowhere")
    assert page.get_by_text("0 of 24").is_visible() and page.locator(".attention-found").count() == 0


def test_an_encoder_s_map_is_whole_and_cross_attention_has_two_texts(opened):
    encoder = make_record(causal=False)
    page = opened(AttentionExplorer(encoder)).page
    assert_shows(page, encoder.weights[0, 0], np.ones((9, 9), dtype=bool))
    assert page.locator(".attention-limit").get_attribute("d") == ""
    cross = make_record(T=3, S=5, causal=False, query_tokens=["le", "chat", "dort"], n_kv_heads=4)
    page = opened(AttentionExplorer(cross)).page
    assert page.locator(".attention-text").count() == 2 and page.locator(".attention-token").count() == 8
    page.get_by_role("button", name="chat", exact=False).hover()
    assert readout(page).startswith("“chat” looks at “")
    page.locator(".attention-token").nth(5).hover()  # the third key
    text = readout(page)
    assert text.startswith("“word2” is looked at by ") and set(said(text.partition(" by ")[2])) <= {
        "le",
        "chat",
        "dort",
    }
    for token, weight in said(text.partition(" by ")[2]).items():
        assert weight == pytest.approx(float(cross.weights[0, 0, cross.query_tokens.index(token), 2]), abs=0.008)
    assert page.get_by_text("Average the heads").count() == 0  # every head has a K/V head of its own
    assert "distance" not in page.get_by_label("Order of the heads").inner_text()


def test_markup_in_a_token_is_shown_and_never_run(opened):
    tokens = ["<s>", MARKUP, "</script><script>window.ran=1</script>", "<!--", "", " ", "\n", "é\0", "\u202eabc"]
    record = make_record(query_tokens=tokens, key_tokens=tokens, model_name=MARKUP)
    view = opened(AttentionExplorer(record))
    assert view.page.locator(".attention-token-text").nth(1).inner_text() == MARKUP
    assert "(empty)" in view.page.locator(".attention-texts").inner_text()
    view.page.locator(".attention-token").nth(1).hover()
    numbers_on_page(view.page)
    view.page.get_by_text("All heads in numbers").click()
    assert view.page.evaluate("window.ran") is None
    assert view.complaints == [] and view.strangers() == []


def test_the_map_is_saved_as_svg_and_png(opened):
    page = opened(AttentionExplorer(make_record(), head=(1, 2)), theme="dark").page
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as SVG").click()
    assert saved.value.suggested_filename == "layer-1-head-2.svg"
    tree = ElementTree.parse(saved.value.path())
    svg = "{http://www.w3.org/2000/svg}"
    assert tree.getroot().tag == svg + "svg" and len(tree.findall(f".//{svg}path")) > 5
    assert "word8" in [text.text for text in tree.iter(svg + "text")]
    assert (
        tree.find(f"{svg}rect").get("fill") == "#ffffff" and tree.getroot().get("color") == "#1a1a1a"
    )  # also from dark
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as PNG").click()
    assert saved.value.suggested_filename == "layer-1-head-2.png"
    picture = plt.imread(saved.value.path())
    assert picture.shape[0] > 300 and picture[..., :3].std() > 0.1


PIXELS = """async (button) => {
  const picture = button.querySelector("img");
  await picture.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
}"""


def test_a_thumbnail_is_its_head_s_map(opened):
    record = make_record(L=1, H=2, T=9, window=4)
    previous = np.zeros((9, 9))
    previous[np.arange(1, 9), np.arange(8)] = previous[0, 0] = 1
    record.weights[0, 1] = previous
    page = opened(AttentionExplorer(record)).page
    pixels = np.reshape(page.locator(".attention-head").nth(1).evaluate(PIXELS), (9, 9, 4))[..., :3]
    colours = {tuple(map(int, c)) for c in pixels[previous == 1]}
    assert colours == {(254, 232, 56)}  # cividis of 1
    seen = attention.visible(record)
    assert {tuple(map(int, c)) for c in pixels[seen & (previous == 0)]} == {(0, 34, 78)}  # and of 0
    assert {tuple(map(int, c)) for c in pixels[~seen]} == {(125, 132, 140), (232, 235, 238)}  # hatched


def test_1024_heads_are_all_painted_and_a_layer_sharpens_when_it_is_opened(opened):
    record = make_record(L=32, H=32, T=40, n_kv_heads=8)
    page = opened(AttentionExplorer(record)).page
    page.wait_for_function("document.querySelectorAll('.attention-head').length === 1024")  # those in view came first
    page.wait_for_function("document.querySelectorAll('.attention-head img[src]').length === 1024")
    longest = "(layer) => [...document.querySelectorAll('.attention-head')].filter((h) => h.ariaLabel.startsWith(`layer ${layer},`)).map((h) => h.querySelector('img').naturalWidth)"
    assert set(page.evaluate(longest, 0)) == {40} and set(page.evaluate(longest, 31)) == {14}
    page.locator(".attention-head").nth(31 * 32 + 5).click()
    opened_head(page, "Layer 31, head 5 (").wait_for()
    assert set(page.evaluate(longest, 31)) == {40}
    assert_shows_row(page, record.weights[31, 5], 39)


def assert_shows_row(page, weights, q):
    page.locator(".attention-token").nth(q).hover()
    for token, weight in said(readout(page).partition(" looks at ")[2]).items():
        assert weight == pytest.approx(float(weights[q, int(token.removeprefix("word"))]), abs=0.008)


@pytest.fixture
def as_on_a_built_page(tmp_path):
    """What the book's build does to a page with large data: each layer goes into a file of its own."""
    file = Path(__file__).resolve().parents[2] / "book" / "_ext" / "explorers.py"
    spec = importlib.util.spec_from_file_location("book_ext_explorers", file)  # a benchmark has its file's name
    explorers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(explorers)

    def change(page):
        found = re.search(r'(<script type="application/json">)(.*?)(?=</script>)', page, re.DOTALL)
        return page.replace(found[0], found[1] + explorers.split(found[2], tmp_path / "data"))

    return change


def test_layers_are_fetched_when_they_are_opened(opened, as_on_a_built_page, tmp_path):
    record = make_record(L=5, H=32, T=100, n_kv_heads=8)
    view = opened(AttentionExplorer(record, head=(1, 0)), change=as_on_a_built_page)
    page = view.page

    def fetched():
        return [url.rsplit("/", 1)[-1] for url in view.requests if "/data/" in url]

    assert len(list((tmp_path / "data").iterdir())) == 6  # five layers, and the thumbnails of all
    page.wait_for_function("document.querySelectorAll('.attention-head img[src]').length === 160")
    assert len(fetched()) == 2
    for head, n in ((32 * 3 + 4, 3), (32 * 3 + 9, 3), (32 * 1 + 2, 3), (32 * 4, 4)):
        page.locator(".attention-head").nth(head).click()
        opened_head(page, f"Layer {head // 32}, head {head % 32} (").wait_for()
        assert len(fetched()) == n
    assert_shows_row(page, record.weights[4, 0], 60)
    choose(page, "Hide the first token", True)  # rows are rescaled in every layer
    page.get_by_text("hatched: what comes after the query, the first token").wait_for()
    assert len(fetched()) == len(set(fetched())) == 6 and view.complaints == []


def test_a_layer_s_missing_file_is_said_in_words_and_asked_for_again(opened, as_on_a_built_page, tmp_path):
    view = opened(AttentionExplorer(make_record(L=5, H=32, T=100, n_kv_heads=8)), change=as_on_a_built_page)
    files = {path: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    for path in files:
        path.unlink()
    view.page.locator(".attention-head").nth(32 * 2).click()
    alert = view.page.get_by_role("alert")
    alert.wait_for()
    assert re.search("The maps of layer 2 could not be read .*is missing", alert.inner_text())
    for path, content in files.items():
        path.write_bytes(content)
    view.page.locator(".attention-head").nth(32 * 2 + 1).click()
    opened_head(view.page, "Layer 2, head 1 (").wait_for()
    assert not alert.is_visible()


def cut(text):
    """A base64 string of the data with its second half gone."""
    return text[: len(text) // 2]


def test_a_damaged_layer_is_said_in_words_and_the_others_go_on(opened):
    record = make_record(L=3, H=32, T=100, n_kv_heads=8)  # so large that layers are unpacked when opened
    explorer = AttentionExplorer(record)
    layer = explorer.data["layers"][2]
    view = opened(explorer, change=lambda page: page.replace(layer, cut(layer)))
    view.page.locator(".attention-head").nth(2 * 32).click()
    alert = view.page.get_by_role("alert")
    alert.wait_for()
    assert "The maps of layer 2 could not be read" in alert.inner_text()
    assert not view.page.locator(".attention-heat").is_visible()
    view.page.locator(".attention-head").nth(32).click()
    opened_head(view.page, "Layer 1, head 0 (").wait_for()
    assert view.page.locator(".attention-heat").is_visible() and not alert.is_visible()


def test_where_nothing_can_be_drawn_a_sentence_says_so_and_the_picture_stays(opened):
    explorer = AttentionExplorer(make_record())
    layer = explorer.data["layers"][0]
    view = opened(explorer, wait=False, change=lambda page: page.replace(layer, cut(layer)))
    view.page.get_by_role("alert").wait_for()
    assert "could not be drawn" in view.page.get_by_role("alert").inner_text()
    assert view.page.locator("figure img[alt*='Heat map']").is_visible()
    assert view.page.locator("[data-ready]").count() == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_telephone_and_every_target_is_large_enough(opened, theme):
    view = opened(AttentionExplorer(make_record(T=24)), width=320, theme=theme)
    view.page.get_by_text("All heads in numbers").click()
    numbers_on_page(view.page)
    assert not view.wider_than_the_screen()
    small = view.page.locator("button, select, input, summary").evaluate_all(
        "all => all.filter((e) => { const box = e.getBoundingClientRect(); return box.width && (box.width < 24 || box.height < 24); }).map((e) => e.outerHTML)"
    )
    assert small == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("causal", [True, False])
def test_axe_finds_nothing(opened, theme, causal):
    words = ["<s>", "le", "chat"]
    record = make_record(window=4) if causal else make_record(T=3, S=5, causal=False, query_tokens=words)
    view = opened(AttentionExplorer(record), theme=theme)
    numbers_on_page(view.page)
    view.page.get_by_text("All heads in numbers").click()
    view.page.get_by_label("Find a token").fill("word")
    assert view.violations() == []
