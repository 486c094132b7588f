"""The memory explorer: what the page computes is what attnlab.memory computes, to the byte."""

import itertools

import pytest

from attnlab import MistralConfig, memory
from attnlab.errors import AttnlabError, ConfigError
from attnlab.explorer import MemoryExplorer
from attnlab.explorer.memory import MAX_BATCH, MAX_CONTEXT

# Turns every control to a setting, and reads what the tables say then: [[row, first, second], …] twice.
DRIVE = """settings => {
  const root = document.querySelector("[data-explorer]");
  const labelled = text => [...root.querySelectorAll("label")].find(label =>
    label.querySelector("span").textContent === text).querySelector("input, select");
  const tell = input => input.dispatchEvent(new Event("input", { bubbles: true }));
  const pick = (text, wanted) => {
    const input = labelled(text);
    const index = [...input.options].findIndex(option => option.text === wanted);
    if (index < 0) throw new Error(`${text} has no ${wanted}`);
    if (input.selectedIndex === index) return;
    input.selectedIndex = index;
    tell(input);
  };
  const type = (label, n) => {
    const field = root.querySelector(`input[type=number][aria-label="${label}"]`);
    if (field.disabled || field.value === String(n)) return;
    field.value = n;
    tell(field);
  };
  return settings.map(s => {
    const fill = labelled("each its largest batch");
    if (fill.checked !== s.fill) {
      fill.checked = s.fill;
      tell(fill);
    }
    pick("first model", s.models[0]);
    pick("second model", s.models[1]);
    pick("weights and cache in", s.dtype);
    pick("linear weights in", s.quantize ?? "the same");
    pick("card", s.card);
    type("context, tokens, exactly", s.context);
    type("batch, rows, exactly", s.batch);
    return [...root.querySelectorAll("table")].map(table =>
      Object.fromEntries([...table.tBodies[0].rows].map(row => {
        const [name, ...cells] = [...row.cells].map(cell => cell.textContent);
        return [name, cells];
      })));
  });
}"""


def setting(**changes) -> dict:
    plain = {
        "models": ["mistral-7b-v0.2", "llama-2-7b"], "context": 4096, "batch": 1, "dtype": "bfloat16", "quantize": None,
        "card": "H100 SXM, 80 GB", "fill": False,
    }  # fmt: skip
    return plain | changes


def expected(model: memory.Model, s: dict, card: memory.Card | None = None) -> tuple[dict, dict]:
    """What both tables must say of a model, from attnlab.memory."""
    card, context, how = card or memory.CARDS[s["card"]], s["context"], (s["dtype"], s["quantize"])
    largest = memory.largest_batch(model, card.nbytes, context, *how)
    rows = largest if s["fill"] else s["batch"]
    weights = memory.weight_bytes(model, *how)
    cache = memory.kv_cache_bytes(model, context, rows, s["dtype"]) if rows else 0
    reserve = memory.reserve_bytes(weights + cache)
    if rows:
        fit = memory.fits(model, card.nbytes, context, rows, *how)
        assert (fit.weights, fit.cache, fit.reserve) == (weights, cache, reserve)
    total = weights + cache + reserve
    spare = card.nbytes - total
    per_token = memory.kv_bytes_per_token(model, s["dtype"])
    step = memory.bytes_per_step(model, context, rows, *how) if rows else memory.bytes_per_step(model, 0, 1, *how)
    ceiling = memory.decode_ceiling(model, card.bandwidth, context, rows, *how) if rows else None
    short = {
        "parameters": f"{memory.n_params(model) / 1e9:.2f} × 10⁹",
        "weights": memory.human_bytes(weights),
        "cache, one token": memory.human_bytes(per_token),
        "cache, all rows": memory.human_bytes(cache),
        "reserve": memory.human_bytes(reserve),
        "together": memory.human_bytes(total),
        "spare": memory.human_bytes(spare).replace("-", "−"),
        "largest batch": f"{largest:,}",
        "batch here": f"{rows:,}",
        "bytes a step reads": memory.human_bytes(step) if rows else "–",
        "ceiling, tokens/s": f"{ceiling:,.1f}" if rows else "–",
        "ceiling for one row": f"{ceiling / rows:,.1f}" if rows else "–",
    }
    exact = {
        "parameters": memory.n_params(model), "weights": weights, "cache, one token": per_token,
        "cache, all rows": cache, "reserve": reserve, "together": total, "spare": spare, "a step": step,
    }  # fmt: skip
    return short, {name: f"{n:,}".replace("-", "−") for name, n in exact.items()}


def agrees(page, settings: list[dict], own: dict | None = None, card: memory.Card | None = None) -> None:
    own = own or {}
    for s, tables in zip(settings, page.evaluate(DRIVE, settings), strict=True):
        for side, name in enumerate(s["models"]):
            right = expected(own.get(name, name), s, card)
            shown = tuple({row: cells[side] for row, cells in table.items()} for table in tables)
            assert shown == right, (name, s)


@pytest.fixture(scope="module")
def page(kept_open):
    """One page that the comparisons share; each turns every control."""
    return kept_open(MemoryExplorer())


# ---- the page against attnlab.memory


@pytest.mark.parametrize("dtype", memory.BYTES_PER_ELEMENT)
@pytest.mark.parametrize("quantize", [None, *memory.QUANTIZED])
def test_every_model_on_every_page_is_to_the_byte_what_python_says(page, dtype, quantize):
    names = list(memory.SHAPES)
    pairs = list(zip(names, names[1:] + names[:1], strict=True))[:: 1 if quantize is None else 2]
    settings = [
        setting(models=pair, context=context, batch=batch, dtype=dtype, quantize=quantize, fill=fill)
        for pair in pairs
        for context, batch, fill in ((1, 1, False), (4096, 3, False), (4097, 17, False), (131_071, 4096, False), (5000, 1, True))
    ]  # fmt: skip
    agrees(page, settings)


def test_every_card_fills_as_python_says(page):
    pairs = [("mistral-7b-v0.1", "llama-2-7b"), ("gemma-2-9b", "deepseek-v2"), ("falcon-7b", "mixtral-8x7b")]
    agrees(page, [
        setting(models=pair, card=card, context=context, fill=fill, quantize=quantize, batch=5)
        for pair, card, context, fill, quantize in itertools.product(
            pairs, memory.CARDS, (2047, 32_768), (True, False), (None, "int4"))
    ])  # fmt: skip


def test_the_largest_settings_are_exact_too(page):
    agrees(page, [
        setting(models=(name, name), context=MAX_CONTEXT, batch=MAX_BATCH, dtype="float32")
        for name in ("llama-2-13b", "gemma-7b", "palm-540b", "deepseek-v3")
    ])  # fmt: skip


def test_a_models_own_windows_latents_and_cards_are_counted(opened):
    config = MistralConfig(
        vocab_size=61,
        d_model=24,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        d_ff=40,
        window=300,
        tie_embeddings=True,
        name="mine",
    )
    weights = memory.Weights(1_000_003, 77, 1234, 55, 500_001, 33)
    shape = memory.ModelShape("odd", 5, 6, 3, 7, windows=(1, None, 64, 64, 4097), latent_dim=None, weights=weights)
    latent = memory.ModelShape("latent", 2, 6, 6, 7, windows=(100, None), latent_dim=13, weights=weights)
    card = memory.Card("this machine", 12_345_679, 9.87e9, "measured")
    for other in (shape, latent):
        page = opened(MemoryExplorer(config, other, card=card, context=99)).page
        contexts = (1, 63, 64, 65, 300, 301, 4096, 4097, 4098)
        agrees(
            page,
            [
                setting(
                    models=["mine", other.name], context=context, card=card.name, fill=fill, batch=2, quantize=quantize
                )
                for context, fill, quantize in itertools.product(contexts, (True, False), (None, "int8", "int4"))
            ],
            own={"mine": config, other.name: other},
            card=card,
        )


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_row_fits_on_the_byte_and_not_one_byte_before(opened, quantize):
    shape = memory.ModelShape("odd", 3, 4, 2, 5, weights=memory.Weights(1_000_001, 101, 33, 7))
    fit = memory.fits(shape, 1e9, 10, 7, quantize=quantize)
    assert fit.reserve < memory.RESERVE_BYTES and (fit.weights + fit.cache) % 10
    for nbytes, rows in ((fit.total, "7"), (fit.total - 1, "6")):
        page = opened(MemoryExplorer(shape, shape, 10, quantize=quantize, card=memory.Card("it", nbytes, 1e9))).page
        assert cell(page, "largest batch") == rows


def test_bytes_for_people_round_as_python_rounds_them(page):
    amounts = [0, 1, 1023, 1024, 1152, 1157, 1_048_575, 1_048_576, 1_054_000, 10**9, 2**40 - 1, 2**40, 5 * 10**15]
    amounts += [1024 * n // 8 for n in range(9, 90)]  # eighths of a KiB: halves of the last digit among them
    page_says = page.evaluate(
        "amounts => { const source = document.scripts[document.scripts.length - 1].textContent;"
        " const body = source.match(/function human_bytes[^]*?\\n}/)[0]; return amounts.map(eval(`(${body})`)); }",
        amounts,
    )
    assert page_says == [memory.human_bytes(amount) for amount in amounts]


# ---- turning the knobs


def cell(page, row: str, side: int = 0) -> str:
    return page.locator("table").first.locator("tr", has=page.get_by_role("rowheader", name=row, exact=True)).locator("td").nth(side).inner_text()  # fmt: skip


def test_keys_and_typing_turn_it_and_the_bars_follow(opened):
    made = opened(MemoryExplorer("mistral-7b-v0.1", "llama-2-7b", card="L40S, 48 GB"))
    page = made.page
    before = cell(page, "cache, all rows")
    slider = page.get_by_role("slider", name="context, tokens")
    slider.focus()
    for _ in range(4):
        slider.press("ArrowRight")
    assert page.get_by_role("spinbutton", name="context, tokens, exactly").input_value() == "16384"
    assert slider.get_attribute("aria-valuetext") == "16,384"
    assert cell(page, "cache, all rows") == before  # the window is full
    assert cell(page, "cache, all rows", 1) == memory.human_bytes(memory.kv_cache_bytes("llama-2-7b", 16_384))
    widths = page.locator(".memory-bar .memory-cache").evaluate_all("all => all.map(one => one.offsetWidth)")
    assert widths[1] > 10 * widths[0]

    assert "fits" in page.locator(".memory-name").nth(1).inner_text()
    field = page.get_by_role("spinbutton", name="batch, rows, exactly")
    field.fill("7")
    assert "does not fit" in page.locator(".memory-name").nth(1).inner_text()
    end = page.locator(".memory-bar .memory-end").nth(1).bounding_box()
    last = page.locator(".memory-bar .memory-reserve").nth(1).bounding_box()
    assert last["x"] + last["width"] > end["x"]
    page.wait_for_function("document.querySelector('.x-announcement')?.textContent.includes('does not fit')")
    assert not made.complaints and not made.strangers()


def test_what_cannot_be_is_said_and_the_last_numbers_stay(opened):
    page = opened(MemoryExplorer()).page
    before = cell(page, "cache, all rows")
    field = page.get_by_role("spinbutton", name="context, tokens, exactly")
    for wrong in ("0", "-3", "2.5", "9999999", ""):
        field.fill(wrong)
        assert "a whole number from 1 to 1,048,576" in page.locator(".memory-amount").first.inner_text()
        assert cell(page, "cache, all rows") == before
    field.fill("8192")
    assert "whole number" not in page.locator(".memory-amount").first.inner_text()
    assert cell(page, "cache, all rows") != before


def test_the_same_batch_gains_little_and_each_its_largest_almost_the_ratio_of_the_caches(opened):
    page = opened(MemoryExplorer("mistral-7b-v0.2", "llama-2-7b", context=512)).page
    ratio = page.locator(".memory-ratio")
    assert float(ratio.inner_text()) < 1  # little in the cache: the heavier weights count
    page.get_by_role("checkbox", name="each its largest batch").check()
    assert 3.9 < float(ratio.inner_text()) < 4
    assert page.get_by_role("slider", name="batch, rows").is_disabled()


def test_a_model_too_large_for_the_card_says_so(opened):
    page = opened(MemoryExplorer("palm-540b", "mistral-7b-v0.1", card="T4, 16 GB", quantize="int8", fill=True)).page
    assert "palm-540b: not even one row fits" in page.locator(".memory-summary").inner_text()
    assert cell(page, "ceiling, tokens/s") == "–" and cell(page, "largest batch") == "0"


def test_what_the_numbers_take_for_granted_is_said(opened):
    page = opened(MemoryExplorer("gemma-2-9b", "mixtral-8x7b", context=65_536, batch=2)).page
    notes = page.locator(".memory-notes").inner_text()
    assert "21 of 42 layers keep no more than 4,096 tokens" in notes
    assert "made for 8,192 tokens" in notes and "made for 32,768 tokens" in notes
    assert "experts of one token" in notes
    page = opened(MemoryExplorer("deepseek-v3", "deepseek-v3")).page
    assert page.locator(".memory-notes").inner_text().count("keeps a latent of 576 numbers") == 1


def test_the_exact_numbers_stay_open_while_a_knob_turns(opened):
    page = opened(MemoryExplorer()).page
    page.get_by_text("In bytes, exactly").click()
    page.get_by_role("slider", name="context, tokens").press("ArrowLeft")
    assert page.get_by_text("a step", exact=True).is_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 900])
def test_axe_finds_nothing_and_nothing_sticks_out(opened, theme, width):
    made = opened(MemoryExplorer("gemma-2-9b", "mixtral-8x7b", context=65_536, batch=2), theme=theme, width=width)
    made.page.get_by_text("In bytes, exactly").click()
    assert made.violations() == []
    assert not made.wider_than_the_screen()
    sizes = made.root.locator("input, select, summary").evaluate_all(
        "all => all.filter(one => one.offsetParent).map(one => [one.offsetWidth, one.offsetHeight])"
    )
    assert sizes and all(wide >= 24 and high >= 24 for wide, high in sizes)


# ---- in Python


def test_a_name_is_shown_and_never_run(opened):
    name = "<img src=x onerror=window.ran=1>"
    shape = memory.ModelShape(name, 1, 2, 1, 4, weights=memory.Weights(8, 2))
    made = opened(MemoryExplorer(shape, "gpt-2"))
    assert name in made.root.inner_text()
    assert made.page.evaluate("window.ran") is None and made.root.locator("img").count() == 0


def test_the_still_shows_both_models_against_the_card():
    made = MemoryExplorer("mistral-7b-v0.2", "llama-2-7b", context=4096, batch=30, card="A100 SXM, 80 GB")
    (ax,) = made.still().axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["mistral-7b-v0.2", "llama-2-7b"]
    assert "the bar of llama-2-7b is the longer one" in made.alt
    filled = MemoryExplorer("palm-540b", "llama-2-7b", fill=True).rows()
    assert filled[0]["batch"] == filled[0]["cache_bytes"] == 0
    assert filled[1]["batch"] == memory.largest_batch("llama-2-7b", 80e9, 4096)


def test_a_model_of_a_presets_name_takes_its_place_in_the_list():
    mine = MistralConfig(vocab_size=61, d_model=24, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=40, name="gpt-2")
    models = MemoryExplorer(mine, "llama-2-7b").data["models"]
    assert [model["n_layers"] for model in models if model["name"] == "gpt-2"] == [3]
    assert len(models) == len(memory.SHAPES)


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: MemoryExplorer("mistral"), "no model shape is called"),
        (lambda: MemoryExplorer(memory.ModelShape("mine", 2, 4, 2, 8)), "not counted"),
        (lambda: MemoryExplorer(context=0), "context must be"),
        (lambda: MemoryExplorer(batch=2.5), "batch must be"),
        (lambda: MemoryExplorer(context=2**20 + 1), "goes up to 1,048,576"),
        (lambda: MemoryExplorer(batch=5000), "goes up to 4,096"),
        (lambda: MemoryExplorer(dtype="float8"), "unknown dtype"),
        (lambda: MemoryExplorer(quantize="int3"), "quantize is None"),
        (lambda: MemoryExplorer(card="H10"), "there are T4"),
        (lambda: MemoryExplorer(card=80e9), "expected a memory.Card"),
        (lambda: MemoryExplorer(card=memory.Card("mine", 0, 1e9)), "both positive"),
        (lambda: MemoryExplorer(card=memory.Card("mine", 10**9, float("nan"))), "both positive"),
        (lambda: MemoryExplorer(memory.SHAPES["gpt-2"], MistralConfig(vocab_size=61, d_model=24, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=40, name="gpt-2")), "two different models"),
        (lambda: MemoryExplorer(memory.ModelShape("vast", 1000, 128, 128, 256, weights=memory.Weights(1, 1))), "too large"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_sent(make, expected):
    with pytest.raises(AttnlabError, match=expected) as raised:
        make()
    assert isinstance(raised.value, ConfigError)
